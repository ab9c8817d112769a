# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# (ch-from-pretrained)=
# # from_pretrained, slowly
#
# :::{admonition} In this chapter
# :class: at-a-glance
# **45 minutes · moderate.** Afterwards you can say what every step of `from_pretrained`
# is for, load a model into hardly more memory than it needs, work out beforehand how much
# that is, and name the mistakes that no loader can notice.
# :::

# %% tags=["remove-input"]
from annotated_src.figures.station_map import StationMap

StationMap("loading")

# %% [markdown]
# :::{admonition} Predict before you run
# :class: predict
# A checkpoint holds a model in float32. You want it in float16: half the bytes. The
# program builds the model, reads the files, copies the weights in, and casts.
#
# - At the worst moment, how many times the memory of the finished model is in use?
# - Load the same files with transformers and leave the dtype alone. While the model sits
#   there, somebody overwrites the files. Does the model change?
#
# Write down a number, and a yes or no.
# :::

# %%
import copy
import json
import shutil
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

from annotated_src.architectures import (
    WithoutInit,
    build_without_weights,
    find_architecture,
)
from annotated_src.checkpoint import (
    TensorMismatch,
    assign_strictly,
    load_model,
    names_by_layer,
    rename,
)
from annotated_src.config_json import read_config
from annotated_src.figures import from_pretrained as figures
from annotated_src.figures.chatglm import SIX_B
from annotated_src.models.chatglm import ChatGLM
from annotated_src.models.llama import HF_NAMES, Llama, LlamaConfig
from annotated_src.shards import CheckpointError, read_json, read_tensors, shard_paths
from annotated_src.show import confirm, show

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
_ = torch.set_grad_enabled(False)

# %% [markdown]
# ## A checkpoint to load
#
# {ref}`ch-checkpoint` looked into the files. Here we need some: transformers makes a
# small random Llama and saves it, 22 MB in shards of at most 3 MB. The same shards are
# also written in the older format, as pickles, because the two formats treat memory
# differently.

# %%
torch.manual_seed(11)
original = LlamaForCausalLM(
    transformers.LlamaConfig(
        vocab_size=2000,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
).eval()
for name, weight in original.named_parameters():
    if "norm" in name:
        weight.uniform_(0.5, 1.5)
tokens = torch.randint(2000, (2, 16))
expected = original(tokens).logits

temporary = TemporaryDirectory()
folder, bin_folder = Path(temporary.name) / "safetensors", Path(temporary.name) / "bin"
original.save_pretrained(folder, max_shard_size="3MB")

bin_folder.mkdir()
shutil.copy(folder / "config.json", bin_folder)
for path in shard_paths(folder):
    torch.save(load_file(path), bin_folder / f"{path.stem}.bin")
index = (folder / "model.safetensors.index.json").read_text("utf-8")
index = index.replace(".safetensors", ".bin")
(bin_folder / "pytorch_model.bin.index.json").write_text(index, "utf-8")

shards = [load_file(path) for path in shard_paths(folder)]
for i, shard in enumerate(shards, start=1):
    size = sum(weight.nbytes for weight in shard.values())
    print(f"shard {i}: {len(shard):2} tensors, {size / 1e6:.1f} MB")

# %% [markdown]
# ## Loading as plain loops
#
# The obvious program, as short as it gets. Every line is one station of this chapter:
# which class, the model, the shards, the names, the copy, the cast.


# %%
def load_by_hand(folder, dtype):
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "llama":
        raise ValueError(config["model_type"])
    model = Llama(LlamaConfig.from_hf(config))
    weights = model.state_dict()  # the model's own tensors, not copies of them
    stored = {}
    for file in sorted(folder.glob("*.bin")):
        stored.update(torch.load(file, weights_only=True))
    for name, tensor in stored.items():
        for ours, theirs in HF_NAMES.items():
            for layer in range(config["num_hidden_layers"]):
                if theirs.format(layer) == name and ours.format(layer) in weights:
                    weights[ours.format(layer)].copy_(tensor)
    return model.to(dtype)


def close(a, b):
    return torch.allclose(a, b, atol=1e-4, rtol=1e-4)


by_hand = load_by_hand(bin_folder, torch.float32)
confirm("the loops give the original's logits", close(by_hand(tokens), expected))

# %% [markdown]
# It works, and it has four faults. It builds a model full of random numbers, to throw
# them away. It holds everything at once. A tensor that has no place is dropped without a
# word, and a place that gets no tensor keeps its random numbers. The rest of the chapter mends
# them one by one.
#
# ## From config.json to a class
#
# The files of weights do not say what to compute. `config.json` does: `model_type` names
# the model, and the sizes follow. That is all there is to "Auto" in `AutoModel`: a table.

# %%
show(find_architecture)

# %%
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

config = read_config(folder)
print(config["model_type"], config["architectures"])
confirm("ours: the table says Llama", find_architecture(config, folder).model is Llama)
confirm(
    "theirs: the table says LlamaForCausalLM",
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["llama"] == "LlamaForCausalLM",
)

# %% [markdown]
# A folder from elsewhere may say anything. A billion layers would be built one by one
# until somebody pulls the plug; an odd head could not be turned in pairs by RoPE. So the
# values are checked before a single weight is read.

# %%
spoilt = Path(temporary.name) / "spoilt"  # it holds no weights at all
spoilt.mkdir()
for change in (
    {"num_hidden_layers": 10**9},
    {"rms_norm_eps": float("nan")},
    {"head_dim": 31},
    {"head_dim": None, "num_attention_heads": 7},
    {"model_type": "mamba"},
):
    (spoilt / "config.json").write_text(json.dumps(config | change), "utf-8")
    try:
        load_model(spoilt)
    except CheckpointError as error:
        print(str(error).split("config.json: ")[1])

# %% [markdown]
# ## What building costs, and the meta device
#
# A fresh `nn.Linear` starts from random numbers, as training needs. Who loads weights
# needs none of them. A `TorchDispatchMode` is called for every operation that PyTorch
# carries out; let one count the numbers that are drawn.

# %%
from torch.utils._python_dispatch import TorchDispatchMode


class CountRandom(TorchDispatchMode):
    drawn = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("normal_", "uniform_"):
            self.drawn += args[0].numel()
        return func(*args, **(kwargs or {}))


sizes = LlamaConfig.from_hf(config)
with CountRandom() as counter:
    Llama(sizes)
matrices = sum(w.numel() for w in original.parameters() if w.ndim == 2)
print(f"{counter.drawn:,} random numbers, all of them overwritten")
confirm("one for every entry of every matrix", counter.drawn == matrices)

# %% [markdown]
# PyTorch's *meta* device is the answer. A tensor there has a name, a shape and a dtype,
# and no memory at all. One can build Llama-2-7B on it, ask what it would need, and check a
# checkpoint against it; one just cannot compute.

# %%
llama_7b = LlamaConfig(
    vocab_size=32_000,
    num_layers=32,
    embed_dim=4096,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    ffn_dim=11_008,
    max_seq_len=4096,
    norm_eps=1e-5,
    rope_base=10_000.0,
    tied_head=False,
)
with torch.device("meta"), WithoutInit():
    seven = Llama(llama_7b)
    huge = torch.empty(10**6, 10**6)
print(f"{sum(w.numel() for w in seven.parameters()):,} parameters")
print("a matrix of", f"{huge.nbytes:,}", "bytes:", huge.shape, huge.device)
try:
    huge[0, 0].item()
except (RuntimeError, NotImplementedError):
    print("its first entry? There is none.")

# %%
show(build_without_weights, WithoutInit)

# %% [markdown]
# {py:class}`annotated_src.architectures.WithoutInit` skips the drawing as well. On the
# meta device the random numbers cost no memory, but the calls still run.
#
# ## Names
#
# The checkpoint calls a tensor `model.layers.3.mlp.up_proj.weight`, our model calls it
# `blocks.3.ffn.up_proj.weight`. A table holds one line for each *kind* of tensor, with
# `{}` where the layer goes; {py:func}`annotated_src.tensor_names.names_by_layer` writes it
# out for a given depth. That is the triple loop above, turned inside out.

# %%
show(names_by_layer, rename)

# %%
model = build_without_weights(find_architecture(config, folder), config, folder)
names = names_by_layer(model, HF_NAMES)
for name in list(names)[:3]:
    print(name, "->", names[name])
stored_names = [name for shard in shards for name in shard]
confirm("a name for every stored tensor", set(names) == set(stored_names))
confirm("and for every place", set(names.values()) == set(model.state_dict()))

# %% [markdown]
# ## Shard by shard
#
# Now the memory. {py:func}`annotated_src.shards.read_tensors` is a generator: it hands out
# one tensor at a time and keeps none. A safetensors file has an index of its own, so one
# tensor can be read and nothing else. A pickle is read whole; its dictionary is then
# emptied entry by entry (`pop`), and a tensor that nobody wants any longer is gone at
# once. In a pickle two tensors may be views of one storage, and while one of them lives,
# so does the storage: hence the counting there, and a `clone` for any that is not alone.

# %%
from annotated_src import shards as reader

show(read_tensors, reader._read_safetensors, reader._read_bin)

# %% [markdown]
# {py:func}`annotated_src.checkpoint.assign_strictly` takes them from the generator, and it
# does four things in one pass: look the name up, compare shape and kind, cast, let go. Only
# when all is well does the model get the results. `assign=True` makes them *the*
# parameters; nothing is copied into place.

# %%
show(assign_strictly)

# %% [markdown]
# ### Small enough to see every byte
#
# Two layers without bias: 2 × 3 and 3 × 2, in two shards, stored in float32 (4 bytes),
# wanted in float16 (2 bytes). We need a way to see memory that gives the same answer on
# every machine. So no clock and no operating system: a *ledger* counts the bytes behind
# every tensor that is alive. Each row is the moment just after a tensor was cast.


# %%
class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 3, bias=False)
        self.second = nn.Linear(3, 2, bias=False)


def toy_shards(ledger):
    for name, shape in (("first.weight", (3, 2)), ("second.weight", (2, 3))):
        yield name, torch.ones(shape)
        made = [ledger.sizes[number] for number in sorted(ledger.pages[-1][1])]
        print(f"{name:13} alive: {made} = {sum(made)} bytes")


with torch.device("meta"), WithoutInit():
    toy = Toy()
with figures.Ledger() as ledger:
    assign_strictly(toy, toy_shards(ledger), torch.float16)
confirm("a float16 weight of 12 bytes in each layer", toy.first.weight.nbytes == 12)

# %% [markdown]
# Row one: the stored tensor (24) and what the cast made of it (12). Row two: the 12 stayed,
# the 24 are gone.
#
# ## How much at the worst moment
#
# Let tensor $i$ have $n_i$ weights, $P = \sum n_i$ in all, $b_f$ bytes a weight in the file,
# $b_m$ in the finished model. The obvious way builds in float32, reads everything, and only then
# casts:
#
# $$
# \text{peak}_{\text{obvious}} = 4P + b_f P .
# $$ (eq-from-pretrained-obvious)
#
# Shard by shard, number the tensors as they come; $e(i)$ is the last tensor in the shard
# of tensor $i$. When tensor $i$ has just been cast, the results of $0, \dots, i$ exist, and
# the originals from $i$ to the end of the shard:
#
# $$
# \text{peak}_{\text{shards}} = \max_i \Bigl( b_m \sum_{j \le i} n_j
# + b_f \sum_{j=i}^{e(i)} n_j \Bigr)
# \;\le\; b_m P + b_f \max_{\text{shard } s} \sum_{j \in s} n_j .
# $$ (eq-from-pretrained-shards)
#
# One copy of the model, and one shard. If nothing is to be cast, the tensor that was read
# *is* the result, and the peak is $b_m P$: one copy, and not a byte beside it. A safetensors
# file is read tensor by tensor, so in the formula each of its tensors is a shard.

# %%
# Check eq-from-pretrained-obvious, eq-from-pretrained-shards.
show(figures.peak_by_formula)


def obvious(ledger, dtype=torch.float16, source=bin_folder):
    ledger.phase = "build"
    model = Llama(LlamaConfig.from_hf(read_json(source / "config.json")))
    ledger.phase = "read all"
    stored = dict(rename(read_tensors(source), names_by_layer(model, HF_NAMES)))
    ledger.phase = "copy"
    model.load_state_dict(stored)
    del stored
    ledger.phase = "cast"
    return model.to(dtype)


def by_shards(ledger, dtype=torch.float16, source=bin_folder):
    ledger.phase = "build"
    config = read_config(source)
    model = build_without_weights(find_architecture(config, source), config, source)
    ledger.phase = "read, cast, let go"
    names = names_by_layer(model, HF_NAMES)
    assign_strictly(model, rename(read_tensors(source), names), dtype, copy=False)
    return model


numbers = [[w.numel() for w in shard.values()] for shard in shards]
P, largest = sum(map(sum, numbers)), max(map(sum, numbers))
for dtype in (torch.float16, torch.float32):
    width = dtype.itemsize
    hill = figures.memory_data("", partial(obvious, dtype=dtype))
    road = figures.memory_data("", partial(by_shards, dtype=dtype))
    whole = figures.memory_data("", lambda _, to=dtype: load_model(bin_folder, to))
    name = str(dtype).removeprefix("torch.")
    print(
        f"{name}: {hill.peak / hill.final:.2f} and {road.peak / road.final:.2f} copies"
    )
    confirm("the obvious way: 4 P + 4 P, to the byte", hill.peak == 4 * P + 4 * P)
    exact = figures.peak_by_formula(numbers, stored=4, wanted=width)
    confirm("shard by shard: the formula, to the byte", road.peak == exact)
    confirm("at most one copy and one shard", exact <= width * P + 4 * largest)
    confirm("load_model keeps within it", whole.peak <= width * P + 4 * largest)
    single = figures.memory_data("", partial(by_shards, dtype=dtype, source=folder))
    each = [[count] for shard in numbers for count in shard]
    exact = figures.peak_by_formula(each, stored=4, wanted=width)
    print(f"        safetensors: {single.peak / single.final:.2f} copies")
    confirm("tensor by tensor: the formula, to the byte", single.peak == exact)

# %% mystnb={"image": {"alt": "Two hills of memory over the steps of loading, in copies of the finished float16 model. Above, the obvious way: a grey slope of random numbers rises to 2 copies while the model is built, an orange one of what was read rises on top of it to a peak of 4.00, stays there while the weights are copied, and falls away; only during the final cast does the blue part, the model, grow from 0 to 1. Below, shard by shard: nothing at all while the model is built, then a blue staircase up to 1 with small orange teeth on it, one for each shard, and a peak of about 1.2."}, "figure": {"name": "fig-from-pretrained-memory", "caption": "Bytes behind all living tensors while a float32 checkpoint becomes a float16 model, counted at each operation. The dashed line is the finished model."}} tags=["hide-input"]
ways = (("The obvious way", obvious), ("Meta device, then shard by shard", by_shards))
hills = [figures.memory_data(name, way) for name, way in ways]
figures.draw_memory(hills)

# %% [markdown]
# Four times the finished model, on the way to one: that is the first answer. Random
# numbers in float32 are two copies' worth, and what was read is two more. All the grey and
# all the orange is thrown away (from "cast" on, the grey holds the right numbers in the
# wrong dtype); only the blue is kept, and it comes last. Below, the blue comes first, and
# each orange tooth is a shard. The two formats part at the teeth, not at this peak: it is
# the last tensor's, the head, which has a shard to itself.
#
# The ledger sees tensors. What does the operating system see? The same, as long as files
# are *read*. `tests/test_checkpoint.py` asks it, in a process of its own. A safetensors file can
# also be *mapped*: then its tensors are views of the file, whose pages come into memory as
# they are touched, and copying them has both in memory, file and model. We shall meet that.
#
# ## The ladder of equality
#
# {py:func}`annotated_src.checkpoint.load_model` is all of this in a row. (In float32, its last
# step stores the matrices column by column: the same values in another order of memory, with
# which a processor multiplies single tokens faster. For that, one matrix at a time exists twice.) Loops, `load_model` in both formats, transformers:
# the same logits, and the same weights bit for bit.

# %%
show(load_model)

# %%
theirs, ours = LlamaForCausalLM.from_pretrained(folder), load_model(folder)
confirm("ours = the loops", close(ours(tokens), by_hand(tokens)))
confirm("by columns", ours.blocks[0].ffn.up_proj.weight.T.is_contiguous())
confirm("safetensors = .bin", torch.equal(load_model(bin_folder)(tokens), ours(tokens)))
confirm("ours = transformers", close(ours(tokens), theirs(tokens).logits))


def same_weights(ours, theirs):
    weights, mine = theirs.state_dict(), ours.state_dict()
    return all(torch.equal(mine[b], weights[a]) for a, b in names.items())


confirm("every weight = transformers', bit for bit", same_weights(ours, theirs))
half = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float16)
confirm(
    "in float16 too, cast on the way",
    same_weights(load_model(folder, torch.float16), half),
)

# %% [markdown]
# ## Casting on the way
#
# A cast rounds each weight to the nearest value that the new dtype has. With $p$ bits of
# precision (float16: 11, bfloat16: 8), as long as the weight lies in the range in which the
# dtype has all its digits,
#
# $$
# \lvert \operatorname{cast}(w) - w \rvert \;\le\; 2^{-p} \, \lvert w \rvert .
# $$ (eq-from-pretrained-cast)
#
# Once is enough: a checkpoint in bfloat16 that was made from float32 has lost its bits
# for good, and loading it as float32 does not bring them back. Nor may one go through a
# narrow dtype on the way to another, and this is why the cast happens in one step.

# %%
# Check eq-from-pretrained-cast.
weight = torch.cat([w.flatten() for w in original.parameters()]).double()
weight = weight[weight.abs() > 2**-14]  # below, float16 has fewer digits
for dtype, precision in ((torch.float16, 11), (torch.bfloat16, 8)):
    error = ((weight.to(dtype).double() - weight) / weight).abs().max()
    confirm(
        f"{dtype}: at most 2^-{precision}, and nearly reached",
        bool(0.9 * 2**-precision < error <= 2**-precision),
    )
twice, once = weight.bfloat16().half(), weight.half()
differ = (twice != once).double().mean()
confirm(
    "through bfloat16, 7 of 8 float16 weights differ: three bits are gone",
    bool((differ - 7 / 8).abs() < 0.01),
)
confirm("65520 is beyond float16", torch.tensor(65_520.0).half().isinf())

# %% [markdown]
# ## One matrix or two
#
# Many models use the embedding's matrix as the head ({ref}`ch-llama`), and
# `tie_word_embeddings` says so. Then the file needs one of the two, and old files hold
# both all the same. transformers 5 believes the files: two different matrices stay two,
# whatever `config.json` says. So do we, for Llama.

# %%
for stored in ("one", "both, equal", "both, different"):
    tied = Path(temporary.name) / f"tied, {stored}"
    tied.mkdir()
    said = config | {"tie_word_embeddings": True}
    (tied / "config.json").write_text(json.dumps(said), "utf-8")
    weights = {name: w for shard in shards for name, w in shard.items()}
    if stored == "one":
        del weights["lm_head.weight"]
    elif stored == "both, equal":
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tied / "model.safetensors", {"format": "pt"})
    mine, reference = load_model(tied), LlamaForCausalLM.from_pretrained(tied)
    shared = reference.lm_head.weight is reference.model.embed_tokens.weight
    confirm(
        f"{stored}: {'tied' if shared else 'not tied'}, in both, and logits agree",
        mine.config.tied_head == shared
        and close(mine(tokens), reference(tokens).logits),
    )

# %% [markdown]
# ## Strictness, and its report
#
# What if the files and the model differ? Here a tensor is gone, one has another shape, one
# has a name that nobody asked for, and one holds integers.

# %%
spoilt = Path(temporary.name) / "differs"
spoilt.mkdir()
shutil.copy(folder / "config.json", spoilt)
weights = {name: w for shard in shards for name, w in shard.items()}
gain = "model.layers.2.post_attention_layernorm.weight"
del weights[gain]
weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()
weights["model.layers.6.mlp.up_proj.weight"] = torch.zeros(704, 256)
value = "model.layers.0.self_attn.v_proj.weight"
weights[value] = weights[value].to(torch.int8)
save_file(weights, spoilt / "model.safetensors", {"format": "pt"})
try:
    load_model(spoilt)
except TensorMismatch as error:
    print(error)
    confirm(
        "and as lists, for a program", error.missing == ["blocks.2.ffn_norm.weight"]
    )

# %% [markdown]
# transformers takes another view: it is made for fine-tuning, where a head may well be
# new. Only another shape is an error, unless one waives it. It reports, fills in what is
# missing with fresh numbers, and goes on. The report can be had as a dictionary. Of the
# integers it says nothing: it casts them back, and what lay between -1 and 1 is now 0.

# %%
try:
    LlamaForCausalLM.from_pretrained(spoilt)
except RuntimeError as error:
    print(str(error).split(",")[0])
lenient, report = LlamaForCausalLM.from_pretrained(
    spoilt, output_loading_info=True, ignore_mismatched_sizes=True
)
for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
    print(kind, sorted(str(name) for name in report[kind]))
confirm("it runs", lenient(tokens).logits.isfinite().all())
confirm(
    "the integers have become weights, all zero",
    not lenient.model.layers[0].self_attn.v_proj.weight.any(),
)
confirm(
    "and the scores are others", (lenient(tokens).logits - expected).abs().max() > 1
)

# %% [markdown]
# ## Progress
#
# After each shard, `load_model` calls a function of yours; by itself it prints nothing.

# %%
_ = load_model(folder, progress=lambda done, total: print(f"{done}/{total}", end=" "))

# %% [markdown]
# ## Where transformers does it
#
# All of it is one call there. Version 5 (the table names symbols of 5.23) does in principle
# what we did:
#
# | Station | Here | transformers 5 |
# |---|---|---|
# | config to class | `read_config`, `find_architecture` | `AutoConfig.from_pretrained`, `_BaseAutoModelClass.from_pretrained` |
# | which files | `shard_paths` | `_get_resolved_checkpoint_files`, `cached_file`, `get_checkpoint_shard_files` |
# | which dtype | `dtype=` | `_get_dtype` |
# | an empty model | `build_without_weights` | `get_init_context`: the meta device |
# | names | `names_by_layer`, `rename` | `core_model_loading.rename_source_key` |
# | shards to weights | `assign_strictly` | `_load_pretrained_model`, `convert_and_load_state_dict_in_model` |
# | one matrix or two | `build_without_weights` | `_finalize_model_loading`, `tie_weights` |
# | the report | `TensorMismatch` | `LoadStateDictInfo`, `log_state_dict_report` |
# | ready to run | `.eval()` | `.eval()` |
#
# :::{admonition} Docs and code
# :class: paper-code
# Walks through this code on the web were mostly written for version 4, and much moved since.
# There, `low_cpu_mem_usage=True` chose the meta device; now it is accepted and
# ignored, for there is no other way. `_load_state_dict_into_meta_model` and
# `_load_state_dict_into_model`, which filled the weights in, are gone;
# `convert_and_load_state_dict_in_model` does it for every device, and where accelerate's
# `set_module_tensor_to_device` placed a tensor, `set_param_for_module` does. `torch_dtype`
# is called `dtype`, and if you leave it out you no longer get float32, but what the
# checkpoint has. `device_map="auto"` (spread layers over several devices) has no
# counterpart here: `load_model` puts everything on one `device`.
# :::

# %%
import transformers.modeling_utils as modeling
from transformers import core_model_loading
from transformers.models.auto import auto_factory
from transformers.utils import hub

contexts = LlamaForCausalLM.get_init_context(torch.float32, False, False, False)
confirm("it builds on the meta device", torch.device("meta") in contexts)
gone = ("_load_state_dict_into_meta_model", "_load_state_dict_into_model")
confirm(
    "the workhorses of version 4 are gone",
    not any(hasattr(modeling, name) for name in gone),
)
table = {
    transformers.AutoConfig: "from_pretrained",
    auto_factory._BaseAutoModelClass: "from_pretrained",
    modeling: "_get_resolved_checkpoint_files _get_dtype LoadStateDictInfo "
    "log_state_dict_report",
    hub: "cached_file get_checkpoint_shard_files",
    LlamaForCausalLM: "get_init_context _load_pretrained_model "
    "_finalize_model_loading tie_weights",
    core_model_loading: "rename_source_key convert_and_load_state_dict_in_model "
    "set_param_for_module _materialize_copy",
}
confirm(
    "every name of the table is there",
    all(hasattr(at, name) for at, names in table.items() for name in names.split()),
)
old_option = LlamaForCausalLM.from_pretrained(folder, low_cpu_mem_usage=True)
confirm(
    "low_cpu_mem_usage is taken, and changes nothing", same_weights(ours, old_option)
)
copy.deepcopy(original).half().save_pretrained(Path(temporary.name) / "half")
unsaid = LlamaForCausalLM.from_pretrained(Path(temporary.name) / "half")
confirm("no dtype asked for: the checkpoint's own", unsaid.dtype == torch.float16)

# %% [markdown]
# The second question at the top. Version 5 maps the safetensors files and, where no cast
# is needed, makes the mapped tensors the parameters. The memory *is* the file. Let us
# overwrite one.

# %%
shard = next(p for p in shard_paths(folder) if "model.norm.weight" in load_file(p))
theirs, ours = LlamaForCausalLM.from_pretrained(folder), load_model(folder)
cast = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float16)
content = shard.read_bytes()
with shard.open("r+b") as file:  # in place, as a download over it would
    file.write(bytes(len(content)))
norms = [m.model.norm.weight.any() for m in (theirs, cast)]
print("theirs:", "unchanged" if norms[0] else "all zeros")
print("theirs, cast to float16:", "unchanged" if norms[1] else "all zeros")
print("ours:", "unchanged" if ours.norm.weight.any() else "all zeros")
with shard.open("r+b") as file:
    file.write(content)
confirm("put the bytes back, and its weights are back", same_weights(ours, theirs))

# %% [markdown]
# Yes: it changes. That is a trade, and no bug: nothing is copied, and whoever touches the
# file touches the model. Ours copies, and from then on owes nothing to the disk.
#
# ## 6B by numbers
#
# What does it take to load the large ones? Both were published in float16. The meta
# device knows their tensors, the formulas do the rest; shards are cut as files on the hub
# are, in the model's order, at most 10 GB (Llama) or 2 GB (ChatGLM) each.

# %%
with torch.device("meta"), WithoutInit():
    six = ChatGLM(SIX_B)


def cut(model, most):
    pieces = [[]]
    for weight in model.state_dict().values():
        if pieces[-1] and 2 * (sum(pieces[-1]) + weight.numel()) > most:
            pieces.append([])
        pieces[-1].append(weight.numel())
    return pieces


print("peak, in GB              Llama-2-7B   ChatGLM-6B")
pieces = cut(seven, 10e9), cut(six, 2e9)
totals = [sum(map(sum, piece)) for piece in pieces]
rows = {
    "the finished model": [2 * total for total in totals],
    "the obvious way": [4 * total + 2 * total for total in totals],
    "shard by shard": [figures.peak_by_formula(p, 2, 2) for p in pieces],
    "the same, in float32": [figures.peak_by_formula(p, 2, 4) for p in pieces],
}
for name, values in rows.items():
    print(f"{name:25}" + "".join(f"{value / 1e9:10.1f}   " for value in values))
confirm("parameters", totals == [6_738_415_616, 6_173_286_400])
confirm("in float32, 7B is beyond a card of 24 GB", 4 * totals[0] > 24 * 2**30)

# %% [markdown]
# A machine of 32 GB cannot load either of them the obvious way. Shard by shard it has room
# for each of them, even in float32.
#
# :::{admonition} Break it
# :class: break-it
# A loader can compare names and shapes. Three mistakes that get past it, or past a
# lenient one. *Rows in another order*: Meta's own files pair neighbouring features for
# RoPE, Hugging Face's pair halves ({ref}`ch-rope`); load the one as the other. *No
# transposition*: other frameworks keep a linear layer as (in, out), PyTorch as (out, in); a
# square matrix fits either way. *No renaming*, with `strict=False`.
# :::


# %%
def wrong_rope(weights):
    for name, weight in weights.items():
        if "q_proj" in name or "k_proj" in name:
            heads = weight.unflatten(0, (-1, 2, 16))  # the halves of each head
            weights[name] = heads.transpose(1, 2).flatten(0, 2).contiguous()


def wrong_side(weights, of="o_proj"):
    for name, weight in weights.items():
        if of in name:
            weights[name] = weight.T.contiguous()


def logits_of(spoil):
    weights = {name: w for shard in shards for name, w in shard.items()}
    spoil(weights)
    model = build_without_weights(find_architecture(config, folder), config, folder)
    assign_strictly(model, rename(weights.items(), names), torch.float32)
    return model(tokens)


def agreement(logits):
    return (logits.argmax(-1) == expected.argmax(-1)).double().mean().item()


def wrong_at(logits):
    return (logits - expected).abs().amax(dim=(0, 2)) > 0.01


mixed, turned = logits_of(wrong_rope), logits_of(wrong_side)
confirm("another order of rows: loads without a word", mixed.isfinite().all())
confirm("the first token is right", not wrong_at(mixed)[0])
confirm("every token after it is wrong", wrong_at(mixed)[1:].all())
confirm("not transposed: loads, and is wrong from the first", wrong_at(turned).all())
queries = wrong_at(logits_of(partial(wrong_side, of="q_proj")))
confirm("of the queries alone: right at first", not queries[0] and queries[1:].all())

# %% [markdown]
# The first token gives it away. It sees only itself, so all its attention goes there,
# whatever queries and keys are. Right at first and wrong ever after means: look at the
# queries, the keys, and RoPE, which turns them.
#
# And without renaming, when nothing fits and nobody minds:

# %%
torch.manual_seed(0)
lenient = Llama(sizes)
weights = {name: w for shard in shards for name, w in shard.items()}
report = lenient.load_state_dict(weights, strict=False)
print(len(report.missing_keys), "missing,", len(report.unexpected_keys), "unexpected")
confirm(
    "only the head has the same name in both",
    set(weights) & set(lenient.state_dict()) == {"lm_head.weight"},
)
confirm("it runs all the same", lenient(tokens).isfinite().all())
confirm("as a model that has read no file", agreement(lenient(tokens)) < 0.1)

# %% [markdown]
# ## Exercises
#
# Write your function in a cell of your own and give it to `check`. A question takes its
# name and a letter: `check("eight_shards", "a")`.

# %%
from annotated_src.exercises import check  # noqa: F401 - for your cells
from annotated_src.exercises.from_pretrained import chapter as exercises

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("files_to_open")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("files_to_open")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
weight_map = read_json(folder / "model.safetensors.index.json")["weight_map"]
wanted = [name for name in weight_map if name.startswith("model.layers.2.")]
opened = exercises["files_to_open"].solution(weight_map, 2)
layer = dict(read_tensors(folder, only=wanted))
confirm(
    "the package opens the same files",
    [path.name for path in shard_paths(folder, only=wanted)] == opened,
)
confirm("one or two of them, for nine tensors", len(opened) <= 2 and len(layer) == 9)
confirm(
    "the right ones",
    all(torch.equal(original.state_dict()[n], layer[n]) for n in layer),
)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("peak_while_loading")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("peak_while_loading")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
for width in (2, 4):
    mine = exercises["peak_while_loading"].solution(numbers, 4, width)
    confirm(
        f"the formula, for this checkpoint and {width} bytes a weight",
        mine == figures.peak_by_formula(numbers, stored=4, wanted=width),
    )

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("eight_shards")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("eight_shards")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
for pieces in ([[1] * 800], [[1] * 100] * 8, [[1]] * 800):
    print(
        len(pieces), "shards:", round(figures.peak_by_formula(pieces, 4, 2) / 1600, 3)
    )


def with_a_list(ledger):
    model = build_without_weights(find_architecture(config, folder), config, folder)
    everything = list(read_tensors(bin_folder))
    assign_strictly(model, rename(everything, names), torch.float16)
    return model


hill = figures.memory_data("", with_a_list)
print(f"fed by a list: {hill.peak / hill.final:.2f} copies")
confirm("the whole file and the whole model, 2 + 1", hill.peak == 4 * P + 2 * P)
confirm("the model on the meta device can count", len(model.state_dict()) == len(names))

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("a_gain_of_ones")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("a_gain_of_ones")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
filled = logits_of(lambda weights: weights.update({gain: torch.ones(256)}))
share = agreement(filled)
confirm("at more than half of the places the best token is the same", share > 0.5)
confirm("and every place has other scores", wrong_at(filled).all())
temporary.cleanup()

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("compare_shapes")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("compare_shapes")

# %% [markdown]
# ## What to remember
#
# - `config.json` chooses a class from a table; the files of weights hold names, shapes,
#   numbers, and no architecture.
# - Build on the meta device: names and shapes without memory, without random numbers.
# - Read shard by shard, cast on the way, let go: at most one copy and one shard, and of
#   safetensors one copy and one tensor. The obvious way takes four copies to make one.
# - Be strict: missing, unexpected and mismatched names are errors, all reported at once.
# - A loader checks names and shapes. Order of rows and transposition only numbers can
#   tell: compare logits with the original. Right at the first token only: suspect queries,
#   keys or RoPE.
# - A mapped model is its file.
#
# ## Where to read on
#
# transformers: `modeling_utils.py`, `PreTrainedModel.from_pretrained` from top to bottom,
# with the table above beside it; then `_load_pretrained_model`, `tie_weights` and
# `_finalize_model_loading`; `core_model_loading.py`,
# `convert_and_load_state_dict_in_model` and `_materialize_copy`; `utils/hub.py`,
# `cached_file` and `get_checkpoint_shard_files`, which fetch what is not on the disk.
# PyTorch: `torch/nn/modules/module.py`, `Module.load_state_dict` and its `assign`. Next,
# {ref}`ch-tokens` makes ids of text, for the model to have something to read.
