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
# (ch-llama)=
# # Llama assembled
#
# :::{admonition} In this chapter
# :class: at-a-glance
# **60 minutes · moderate.** Afterwards you can write a Llama from its parts, count its
# parameters on paper, load a checkpoint so that nothing can go missing, prove layer by
# layer that your model is the original, and watch a real one make up its mind.
# :::

# %% tags=["remove-input"]
from annotated_src.figures.model_map import ModelMap

ModelMap("everything")

# %% [markdown]
# :::{admonition} Predict before you run
# :class: predict
# SmolLM2-135M has 30 blocks and a vocabulary of 49152. Asked for the capital of Japan,
# it answers "The capital of Japan is Tokyo."
#
# - What share of its parameters is the embedding table?
# - After which of the 30 blocks is *Tokyo* first in place among all words?
# - Take one block in the middle out. Does it still answer?
#
# Write three answers down.
# :::

# %%
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers

from annotated_src.checkpoint import (
    assign_strictly,
    load_model,
    names_by_layer,
    rename,
)
from annotated_src.figures import llama as figures
from annotated_src.generate import generate
from annotated_src.models.llama import HF_NAMES, Llama, LlamaBlock, LlamaConfig
from annotated_src.shards import (
    CheckpointError,
    read_json,
    read_tensors,
    shard_paths,
)
from annotated_src.show import confirm, show
from annotated_src.tokenizer import TextTokenizer
from annotated_src.weights import smollm2

transformers.utils.logging.disable_progress_bar()
_ = torch.set_grad_enabled(False)  # nothing is trained here

# %% [markdown]
# ## The whole model as loops
#
# Every part but the two ends has had its chapter. Before we look at how the package joins them, here is
# a complete Llama that uses nothing of the package: a dictionary of weights, no batch, one
# token and one head at a time. Four helpers come first, each the sum of a chapter.


# %%
def rms_norm(x, gain, eps):  # norms
    return gain * x / (x.square().mean() + eps).sqrt()


def turn(x, position, base):  # RoPE, half-split pairs
    half, out = len(x) // 2, x.clone()
    for i in range(half):
        angle = position * base ** (-i / half)
        a, b = x[i], x[i + half]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = a * math.sin(angle) + b * math.cos(angle)
    return out


def look_back(query, keys, values):  # attention of one query
    scores = torch.stack([query @ key for key in keys]) / len(query) ** 0.5
    return sum(w * v for w, v in zip(scores.softmax(0), values, strict=True))


def gated(x, gate, up, down):  # the feed-forward network
    opened = gate @ x
    return down @ (opened * torch.sigmoid(opened) * (up @ x))


# %% [markdown]
# And the model itself. `w` holds the weights by name, `c` the sizes; `stream` is a list of
# vectors, one a token, which each block replaces by new ones.


# %%
def llama_by_loops(ids, w, c):
    stream = [w["embedding.weight"][i] for i in ids]
    for layer in range(c.num_layers):
        part = {  # this block's weights, by short names: "ffn.up_proj"
            name.split(".", 2)[2].removesuffix(".weight"): weight
            for name, weight in w.items()
            if name.startswith(f"blocks.{layer}.")
        }
        keys, values = [], []  # of the tokens so far
        for t, x in enumerate(stream):
            normed = rms_norm(x, part["attention_norm"], c.norm_eps)
            queries = (part["attention.q_proj"] @ normed).split(c.head_dim)
            new_keys = (part["attention.k_proj"] @ normed).split(c.head_dim)
            keys.append([turn(k, t, c.rope_base) for k in new_keys])
            values.append((part["attention.v_proj"] @ normed).split(c.head_dim))
            heads = []
            for n, query in enumerate(queries):
                kv = n * c.num_kv_heads // c.num_heads  # the head that n shares
                query = turn(query, t, c.rope_base)
                past = [k[kv] for k in keys], [v[kv] for v in values]
                heads.append(look_back(query, *past))
            x = x + part["attention.out_proj"] @ torch.cat(heads)
            normed = rms_norm(x, part["ffn_norm"], c.norm_eps)
            stream[t] = x + gated(
                normed,
                part["ffn.gate_proj"],
                part["ffn.up_proj"],
                part["ffn.down_proj"],
            )
    head = w["embedding.weight" if c.tied_head else "lm_head.weight"]
    return torch.stack(
        [head @ rms_norm(x, w["norm.weight"], c.norm_eps) for x in stream]
    )


# %% [markdown]
# That is all there is. Causality needs no mask here: token $t$ is computed when only the
# keys and values up to $t$ exist. Now the same weights in the package's
# {py:class}`annotated_src.models.llama.Llama`, with sizes on which mistakes cannot
# hide: $N H \ne D$, three query heads to a key/value head, gains that are not one. (The
# package forms angles, norms and softmax in float32 even in a float64 model; hence the
# bound.)


# %%
def scatter(model):
    """Random weights that keep the stream near size one; gains that are not one."""
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.uniform_(0.5, 1.5)
        else:
            weight.normal_(std=weight.shape[-1] ** -0.5)
    return model


small = LlamaConfig(
    vocab_size=101,
    num_layers=3,
    embed_dim=20,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    ffn_dim=28,
    max_seq_len=64,
    norm_eps=1e-5,
    rope_base=500.0,
    tied_head=False,
)
torch.manual_seed(8)
model = scatter(Llama(small).double())
tokens = torch.randint(small.vocab_size, (2, 7))
logits = model(tokens)
by_loops = [llama_by_loops(row.tolist(), model.state_dict(), small) for row in tokens]

print("ids", tuple(tokens.shape), "to scores", tuple(logits.shape))
confirm(
    "loops over layers, tokens and heads = the package's Llama",
    torch.allclose(torch.stack(by_loops), logits, atol=1e-5),
)

# %% [markdown]
# ## Block, stack, ends
#
# Now the loops in three lines. Write $x^{(l)}_t$ for the vector of token $t$ that enters
# block $l$, and $x^{(l)}$ for all of them. A block adds to them twice: first attention,
# which reads all tokens up to $t$, then the feed-forward network, which reads token $t$
# alone.
#
# $$
# h^{(l)} = x^{(l)} + \operatorname{attn}^{(l)}\bigl(\operatorname{norm}(x^{(l)})\bigr),
# \qquad
# x^{(l+1)} = h^{(l)} + \operatorname{ffn}^{(l)}\bigl(\operatorname{norm}(h^{(l)})\bigr).
# $$ (eq-llama-block)
#
# (Each norm has a gain of its own.)
#
# The ends turn ids into vectors, and vectors into scores. $E$ is the embedding table
# of shape $(V, D)$. The head $W$ has the same shape; in a *tied* model it is the same
# matrix.
#
# $$
# x^{(0)}_t = E_{\mathrm{id}_t}, \qquad
# \mathrm{logits}_t = W \operatorname{norm}\bigl(x^{(L)}_t\bigr).
# $$ (eq-llama-ends)
#
# Insert {eq}`eq-llama-block` into itself from $l = 0$ to $L - 1$. Nothing ever
# overwrites $x$; each part only adds:
#
# $$
# x^{(L)} = x^{(0)} + \sum_{l=0}^{L-1} \bigl( a^{(l)} + f^{(l)} \bigr),
# $$ (eq-llama-stream)
#
# where $a^{(l)}$ and $f^{(l)}$ are what attention and feed-forward put out in block
# $l$. This sum is the **residual stream** of {ref}`ch-norms` {cite:p}`elhage2021`: a
# vector of width $D$ per token, running from the embedding to the head, from which every part
# reads and to which every part writes.
#
# To check all three, record what leaves every part of the small model. A *hook* is a
# function that torch calls with a module's output; `places` lists the modules to hook,
# under names that will serve for the original model, too.


# %%
# Check eq-llama-block, eq-llama-ends and eq-llama-stream.
def record(model, places, tokens):
    """Run the model; return what leaves each named submodule."""
    seen = {}

    def keep(name):
        def hook(_module, _inputs, out):
            seen[name] = out[0] if isinstance(out, tuple) else out

        return hook

    hooks = [
        model.get_submodule(path).register_forward_hook(keep(name))
        for name, path in places.items()
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return seen


def places(config, names):
    """Our name of each submodule to look at, and names' path to it."""
    return (
        {"embedding": names["embedding"]}
        | {
            f"blocks.{layer}{part}": names["blocks"].format(layer) + names[part]
            for layer in range(config.num_layers)
            for part in (".attention_norm", ".attention", ".ffn_norm", ".ffn", "")
        }
        | {"norm": names["norm"]}
    )


parts = ("embedding", ".attention_norm", ".attention", ".ffn_norm", ".ffn", "norm")
OURS = {part: part for part in parts} | {"": "", "blocks": "blocks.{}"}
seen = record(model, places(small, OURS), tokens)

x = seen["embedding"]  # add up by hand what the parts put out
for layer in range(small.num_layers):
    h = x + seen[f"blocks.{layer}.attention"]
    x = h + seen[f"blocks.{layer}.ffn"]
    confirm(f"block {layer} adds twice", torch.equal(x, seen[f"blocks.{layer}"]))
added = [out for name, out in seen.items() if name.endswith((".attention", ".ffn"))]
confirm(
    "row t of the embedding is row id_t of E",
    torch.equal(seen["embedding"], model.embedding.weight[tokens]),
)
confirm(
    "the stream's end is the embedding plus 6 outputs",
    torch.allclose(x, seen["embedding"] + sum(added)),
)
confirm(
    "the logits are W norm(x)",
    torch.allclose(logits, model.norm(x) @ model.lm_head.weight.T),
)

# %% [markdown]
# ## The annotated source
#
# The package writes the same equations down, once, with a batch and a cache.
# {py:class}`annotated_src.models.llama.LlamaConfig` holds sizes, and decides nothing.
# {py:class}`annotated_src.models.llama.LlamaBlock` is {eq}`eq-llama-block`.

# %%
show(LlamaBlock)

# %% [markdown]
# {py:class}`annotated_src.models.llama.Llama` makes positions, mask and rotation once,
# hands them to every block, and closes with norm and head.

# %%
show(Llama)

# %% [markdown]
# ## Counting the parameters
#
# Every number that a Llama has learnt sits in one of twelve kinds of tensor. Here are all
# twelve for sizes small enough to count with a finger: $V = 5$, one block, $D = 4$,
# $N = 2$, $K = 1$, $H = 2$, $F = 3$.

# %%
toy = LlamaConfig(5, 1, 4, 2, 1, 2, 3, 8, 1e-5, 10_000.0, tied_head=False)
for name, weight in Llama(toy).named_parameters():
    print(f"{name:34} {tuple(weight.shape)!s:8} {weight.numel():3}")

# %% [markdown]
# In letters, with $u = 1$ for a head of its own and $u = 0$ for a tied one (this $P$ counts
# every number; the $P$ of {ref}`ch-cache` left out the norms and an embedding that is only
# looked up):
#
# $$
# P = \underbrace{(1 + u)\, V D}_{\text{embedding, head}}
# + L \bigl(
# \underbrace{2 D H (N + K)}_{\text{attention}}
# + \underbrace{3 D F}_{\text{feed-forward}}
# + \underbrace{2 D}_{\text{norms}} \bigr) + D.
# $$ (eq-llama-count)
#
# $q$ and $o$ have $D \cdot N H$ numbers each, $k$ and $v$ have $D \cdot K H$. The check
# needs no memory: on torch's *meta* device a tensor has a shape and no numbers, so even
# a model of 69 billion parameters is built at once.


# %%
# Check eq-llama-count.
def count(c):
    attention = 2 * c.embed_dim * c.head_dim * (c.num_heads + c.num_kv_heads)
    block = attention + 3 * c.embed_dim * c.ffn_dim + 2 * c.embed_dim
    ends = (1 + (not c.tied_head)) * c.vocab_size * c.embed_dim + c.embed_dim
    return ends + c.num_layers * block


sizes = {"SmolLM2-135M": LlamaConfig.from_hf(read_json(smollm2() / "config.json"))}
for name, layers, width, heads, kv_heads, head_dim, ffn_dim in (
    ("TinyLlama-1.1B", 22, 2048, 32, 4, 64, 5632),
    ("Llama-2-7B", 32, 4096, 32, 32, 128, 11008),
    ("Llama-2-70B", 80, 8192, 64, 8, 128, 28672),
):
    sizes[name] = LlamaConfig(
        32_000, layers, width, heads, kv_heads, head_dim, ffn_dim, 4096, 1e-5, 1e4, False
    )  # fmt: skip

for name, config in {"toy": toy, **sizes}.items():
    with torch.device("meta"):
        shapes = Llama(config)
    built = sum(weight.numel() for weight in shapes.parameters())
    confirm(f"{name}: {built:,}, as the formula says", built == count(config))
confirm("SmolLM2-135M: 134 515 008", count(sizes["SmolLM2-135M"]) == 134_515_008)
confirm("Llama-2-7B: 6 738 415 616", count(sizes["Llama-2-7B"]) == 6_738_415_616)

# %% mystnb={"image": {"alt": "Four bars of equal length, one a model, each cut into three: embedding and head, attention, feed-forward. The embedding takes 21.0 percent of SmolLM2-135M, 11.9 of TinyLlama-1.1B, 3.9 of Llama-2-7B and 0.8 of Llama-2-70B. Feed-forward is the largest part everywhere, 59 to 82 percent."}, "figure": {"name": "fig-llama-parameters", "caption": "Where the parameters sit. The norms are there too: too thin to see in any of them."}} tags=["hide-input"]
shares = figures.parameter_data(sizes)
figures.draw_parameters(shares)

# %%
table = dict(zip(shares.names, shares.shares, strict=True))
confirm("SmolLM2: a fifth is embedding", 0.20 < table["SmolLM2-135M"][0] < 0.22)
confirm("Llama-2-70B: under 1 %", table["Llama-2-70B"][0] < 0.01)
confirm("feed-forward is more than half of each", (shares.shares[:, 2] > 0.5).all())
confirm("norms are under 0.03 % of each", (shares.shares[:, 3] < 3e-4).all())
for name in ("SmolLM2-135M", "Llama-2-70B"):
    one = sizes[name].vocab_size * sizes[name].embed_dim
    print(f"{name}: one matrix of V x D is {one / count(sizes[name]):.1%} of the whole")

# %% [markdown]
# The first answer: 21 % of SmolLM2 is its embedding table.
# For a given vocabulary the embedding grows with $D$, a block with $D^2$. So a small model spends on
# words what a large one spends on layers ({numref}`fig-llama-parameters`), which is why
# SmolLM2 ties its head; Llama-2-70B has two matrices and does not feel it.
#
# ## Loading, strictly
#
# A checkpoint is a folder: `config.json` with the sizes, and tensors with names, often
# cut into several files (*shards*) and an index that says which tensor is where. Hugging
# Face's library transformers is the original to compare with: it makes a small Llama with
# random weights, and saves it in shards.

# %%
torch.manual_seed(9)
theirs = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
        vocab_size=101,
        hidden_size=36,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=52,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
).eval()
scatter(theirs)
temporary = TemporaryDirectory()
folder = Path(temporary.name)
theirs.save_pretrained(folder, max_shard_size="100KB")
ours = load_model(folder)

index = read_json(folder / "model.safetensors.index.json")["weight_map"]
for name in ("embed_tokens", "layers.0.mlp.up_proj", "layers.3.mlp.up_proj"):
    print(name, "is in", index[f"model.{name}.weight"])
confirm("the weights lie in several files", len(shard_paths(folder)) > 1)

# %% [markdown]
# {py:func}`annotated_src.checkpoint.load_model` builds the model on the meta device,
# reads tensor by tensor, translates the names with a table (`HF_NAMES`), and puts all
# tensors in, or none.

# %%
show(load_model, assign_strictly)

# %% [markdown]
# What does strictness buy? Spoil a copy of the checkpoint in three ways: a tensor is gone,
# one is too short, one belongs to a layer that this model does not have.

# %%
from safetensors.torch import save_file

tensors = dict(read_tensors(folder))
gain = "model.layers.2.post_attention_layernorm.weight"
del tensors[gain]
tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
tensors["model.layers.4.mlp.up_proj.weight"] = torch.zeros(52, 36)
spoilt = folder / "spoilt"
spoilt.mkdir()
(spoilt / "config.json").write_text((folder / "config.json").read_text())
save_file(tensors, spoilt / "model.safetensors")
try:
    load_model(spoilt)
except CheckpointError as error:
    print(error)

# %% [markdown]
# All three in one message, by name. The alternative is a model that runs, with whatever
# its constructor had left in the missing tensor:

# %%
lenient = Llama(small)
report = lenient.load_state_dict({"norm.weight": torch.ones(20)}, strict=False)
print(
    "load_state_dict(strict=False) went on without", len(report.missing_keys), "tensors"
)
lenient(tokens).shape

# %% [markdown]
# The same goes for `config.json`. A key that asks for something this Llama does not do
# is an error, not a shrug. Some checkpoints stretch their rotations for longer texts:
# Llama 3.1's way is known here, others are refused by name.

# %%
config = read_json(folder / "config.json")
config["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 500_000.0}
try:
    LlamaConfig.from_hf(config)
except ValueError as error:
    print(error)

# %% [markdown]
# ## The ladder of equality, layer by layer
#
# Loops = package was the first rung. The second: package = transformers, on the shards
# just loaded. Equal logits would do as proof; but when they differ, you want to know
# *where* they start to. So we hook both models in corresponding places and compare all
# the way down.

# %%
THEIRS = {
    "embedding": "model.embed_tokens",
    "blocks": "model.layers.{}",
    ".attention_norm": ".input_layernorm",
    ".attention": ".self_attn",
    ".ffn_norm": ".post_attention_layernorm",
    ".ffn": ".mlp",
    "": "",
    "norm": "model.norm",
}


def compare(ours, theirs, tokens, bound=1e-5):
    """Whether each place agrees, relative to the largest number there."""
    mine = record(ours, places(ours.config, OURS), tokens)
    yours = record(theirs, places(ours.config, THEIRS), tokens)
    return {
        name: bool(
            (mine[name] - yours[name]).abs().max() < bound * yours[name].abs().max()
        )
        for name in places(ours.config, OURS)
    }


def difference_begins(agrees):
    return next((name for name, same in agrees.items() if not same), None)


# %%
tokens = torch.randint(101, (3, 11))
agrees = compare(ours, theirs, tokens)
for part in ("attention_norm", "attention", "ffn_norm", "ffn"):
    row = [agrees[f"blocks.{layer}.{part}"] for layer in range(4)]
    print(f"{part:15}", *("< 1e-5" if same else "DIFFERS" for same in row))
print(
    f"{'whole block':15}",
    *("< 1e-5" if agrees[f"blocks.{i}"] else "DIFFERS" for i in range(4)),
)
confirm("no place differs, embedding and last norm included", all(agrees.values()))
confirm(
    "and the logits are equal",
    torch.allclose(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5),
)

# %% [markdown]
# :::{admonition} Paper and code
# :class: paper-code
# The LLaMA paper normalises the input of each sub-layer, not its output
# {cite:p}`touvron2023`. So does the code, but one of its names says otherwise:
# `post_attention_layernorm`, which {ref}`ch-norms` has met. Hence our `ffn_norm`, and a
# line of comment in `HF_NAMES`. What it reads is not even attention's output, but the
# stream that attention has added to.
# :::

# %%
block = theirs.model.layers[0]
met = {}
hooks = [
    block.post_attention_layernorm.register_forward_hook(
        lambda _m, _i, out: met.update(norm_out=out)
    ),
    block.mlp.register_forward_pre_hook(
        lambda _m, inputs: met.update(mlp_in=inputs[0])
    ),
    block.self_attn.register_forward_hook(
        lambda _m, _i, out: met.update(attention_out=out[0])
    ),
    block.post_attention_layernorm.register_forward_pre_hook(
        lambda _m, inputs: met.update(norm_in=inputs[0])
    ),
]
theirs(tokens)
for hook in hooks:
    hook.remove()
confirm(
    "what leaves post_attention_layernorm enters the MLP",
    torch.equal(met["norm_out"], met["mlp_in"]),
)
confirm(
    "what enters it is not attention's output",
    not torch.allclose(met["norm_in"], met["attention_out"]),
)
stream = theirs.model.embed_tokens(tokens) + met["attention_out"]
confirm(
    "but the stream that attention has added to", torch.equal(met["norm_in"], stream)
)

# %% [markdown]
# :::{admonition} Break it
# :class: break-it
# Fall into the trap. Give each block's two gains to each other. All names are there and
# all shapes fit, so the strictest loader has no objection.
# :::

# %%
wrong_names = HF_NAMES | {
    "blocks.{}.attention_norm.weight": HF_NAMES["blocks.{}.ffn_norm.weight"],
    "blocks.{}.ffn_norm.weight": HF_NAMES["blocks.{}.attention_norm.weight"],
}


def load_with(names, directory):
    model = Llama(LlamaConfig.from_hf(read_json(directory / "config.json")))
    renamed = rename(read_tensors(directory), names_by_layer(model, names))
    assign_strictly(model, renamed, torch.float32)
    return model


trapped = load_with(wrong_names, folder)
begins = difference_begins(compare(trapped, theirs, tokens))
print("it loads, it runs; the difference begins at", begins)
confirm("at the first norm, of the first block", begins == "blocks.0.attention_norm")
confirm("the embedding before it agrees", compare(trapped, theirs, tokens)["embedding"])
same = trapped(tokens).argmax(-1) == theirs(tokens).logits.argmax(-1)
confirm("hardly a prediction survives", same.float().mean() < 0.5)

# %% [markdown]
# Names and shapes are what a loader can check. Only numbers from the original can check
# the rest; that is why this rung of the ladder is in the test suite, too.
#
# ## The real one
#
# Now 134.5 million trained weights {cite:p}`allal2025`. They travel in a GGUF file, of a
# little less than 6 bits a weight, and are unpacked once (the rows of $W_q$ and $W_k$
# reordered, as {ref}`ch-rope` shows); both models below read the same unpacked file. The
# same `load_model`, the same comparison, on a conversation of two questions:

# %%
directory = smollm2()
real = load_model(directory)
tokenizer = TextTokenizer.from_pretrained(directory)
original = transformers.LlamaForCausalLM.from_pretrained(directory)

chat = tokenizer.chat(
    [
        {"role": "user", "content": "What is a llama?"},
        {"role": "assistant", "content": "An animal of South America, with soft wool."},
        {"role": "user", "content": "And what does it eat?"},
    ]
)
mine, yours = real(chat)[0].log_softmax(-1), original(chat).logits[0].log_softmax(-1)
print(chat.shape[1], "tokens, each with", mine.shape[1], "log-probabilities")
confirm("every log-probability within 0.001", (mine - yours).abs().max() < 1e-3)
confirm(
    "the same best word after every token",
    torch.equal(mine.argmax(-1), yours.argmax(-1)),
)
confirm(
    "and all 30 blocks agree, part by part",
    all(compare(real, original, chat, 1e-4).values()),
)
del original, yours

# %% [markdown]
# And an answer:

# %%
question = tokenizer.chat(
    [{"role": "user", "content": "What is the capital of Japan?"}]
)
text = generate(real, question, max_new_tokens=20, stop_ids=[tokenizer.eos_id])
asked = question.shape[1]
print(tokenizer.decode(text[0, asked:]))

best = real(text)[0, asked - 1 : -1].topk(2).values
margin = best[:, 0] - best[:, 1]
confirm(
    "no step is a near tie: the best logit leads by more than 0.5", margin.min() > 0.5
)

# %% [markdown]
# The margin matters: where the two best words are closer than rounding, another machine
# may say something else, and both are right. *Correct* here means: what the original
# computes. Whether Tokyo is the capital is the weights' business.
#
# ## Reading the stream
#
# By {eq}`eq-llama-stream` the stream has the same form at every depth, so nothing stops
# you from applying the last norm and the head *early*, to what leaves block 5 or 20.
# This is the **logit lens** {cite:p}`nostalgebraist2020`. Below, each column is one step
# of the answer: a token comes in at the top, and at the bottom the next one is said.
# Each cell shows the word that would be said at that depth. Its shade shows the place,
# among all 49152 words, of the one that is said in the end. (In this section blocks count
# from 1, as depths do: block 24 is `blocks.23` in the code.)

# %% mystnb={"image": {"alt": "A table of 31 rows, the embedding and 30 blocks, and 8 columns, the tokens of the answer The capital of Japan is Tokyo. Cells turn dark where the word finally said is in first place. The word of is dark from block 6 on, with a gap at 9 and 10; is from block 20; the full stop, too, with a gap at 27; capital from block 29; The, Japan, Tokyo and the end of the turn only at block 30. Above, the cells hold commas, brackets and other filler."}, "figure": {"name": "fig-llama-lens", "caption": "The logit lens on a real answer. Dark: the word that will be said is in first place. A raised dot is a space. Grammar is settled early; *Japan* and *Tokyo* come last."}} tags=["hide-input"]
lens = figures.lens_data(real, tokenizer, text[:, :-1], first=asked - 1)
figures.draw_lens(lens)

# %%
place = dict(zip(lens.answers, lens.place.T, strict=True))
confirm("the last depth says the answer", (lens.place[-1] == 1).all())
confirm("'of' is first from block 11 on", (place["·of"][11:] == 1).all())
confirm("'Tokyo' is beyond place 10 000 after block 23", place["·Tokyo"][23] > 10_000)
confirm("within 3 000 after block 24", place["·Tokyo"][24] < 3_000)
confirm("and in first place only after block 30", (place["·Tokyo"][:30] > 1).all())

# %% [markdown]
# Read {numref}`fig-llama-lens` with care. The head was trained on the last depth only,
# so the commas in the middle need not mean that the model is thinking of commas; the
# middle of the stream may simply not be written in the head's language. What the figure
# does show is when the answer becomes *readable*. That answers the second question at the top:
# *Tokyo* is first only after the last block, the 30th. But something happens to it at
# block 24.
#
# Which part did it? The stream is a sum. The last norm divides it by one number, its root
# mean square, and all else up to the logits is multiplication by fixed weights. So a
# logit is a sum as well, one term for each part that wrote to the stream. Let $\gamma$ be
# the gain of the last norm, $r$ the root mean square of $x^{(L)}$ (with the norm's
# epsilon under the root), $W_v$ the row of the head for word $v$, and $\odot$ the product
# entry by entry:
#
# $$
# \mathrm{logit}_v = \sum_{p} \frac{W_v \odot \gamma}{r} \cdot p,
# \qquad p \in \bigl\{x^{(0)}, a^{(0)}, f^{(0)}, \dots, a^{(L-1)}, f^{(L-1)}\bigr\}.
# $$ (eq-llama-votes)
#
# The dot is an inner product. Call the terms **votes**: one of the embedding, and two a
# block. To count only what sets *Tokyo* apart, we take the average row of $W$ off $W_v$;
# that takes the same number off all logits, which the softmax ignores.

# %%
# Check eq-llama-votes.
row = torch.randint(101, (1, 9))
seen = record(model, places(small, OURS), row)
end = seen[f"blocks.{small.num_layers - 1}"][0, -1]
wrote = [
    out[0, -1] for name, out in seen.items() if name.endswith((".attention", ".ffn"))
]
root = end.square().mean().add(small.norm_eps).sqrt()
votes = torch.stack([seen["embedding"][0, -1], *wrote]) @ (
    model.lm_head.weight[42] * model.norm.weight / root
)
confirm(
    "small model: 1 + 2 L votes add up to the logit",
    torch.allclose(votes.sum(), model(row)[0, -1, 42], atol=1e-5),
)

prompt = text[:, : asked + 5]  # up to "is"
tokyo = int(text[0, asked + 5])
voted = figures.votes_data(real, tokenizer, prompt, tokyo)
scores = real(prompt)[0, -1]
confirm(
    "real model: 61 votes do, too",
    abs(voted.total - (scores[tokyo] - scores.mean())) < 1e-3,
)

# %% mystnb={"image": {"alt": "Bars for 30 blocks, two a block: what attention and what the feed-forward network add to the score of Tokyo. Up to block 20 all are near zero. The tallest is attention in block 24, at 5; then feed-forward in blocks 30 and 25, at 3.7 and 3.0. Feed-forward in block 21 votes against, at minus 1.2."}, "figure": {"name": "fig-llama-votes", "caption": "The votes for *Tokyo*, after *The capital of Japan is*. Attention in block 24 brings something from earlier tokens; feed-forward networks after it add to it."}} tags=["hide-input"]
figures.draw_votes(voted)

# %%
confirm(
    "no vote is larger than that of attention in block 24",
    voted.attention[23] > voted.ffn.max(),
)
late = voted.attention[23:].sum() + voted.ffn[23:].sum()
print(f"blocks 24 to 30 give {late / voted.total:.0%} of the score")

# %% [markdown]
# And if a block could not vote? The sum has two terms less, and the blocks after it read
# a stream that lacks something. Take one out:


# %%
def next_without(model, skipped, tokens):
    """The next word of a model that lacks one block, and the lead of its logit."""
    blocks, model.blocks = (
        model.blocks,
        torch.nn.ModuleList(
            block for i, block in enumerate(model.blocks, 1) if i != skipped
        ),
    )
    logits = model(tokens)[0, -1]
    model.blocks = blocks
    first, second = logits.topk(2).values
    return tokenizer.decode([logits.argmax()]), first - second


for skipped in (13, 24, 27):
    word, lead = next_without(real, skipped, prompt)
    print(f"without block {skipped}: The capital of Japan is{word}")
    confirm("and that is no near tie", lead > 1)
confirm("without block 1: not Tokyo", next_without(real, 1, prompt)[0] != " Tokyo")

# %% [markdown]
# That answers the third question: it depends on the block. Without block 13 or 27 the
# answer stands. Without block 24 the sentence goes on, but not to Tokyo. Block 1 is
# another matter: all the others were trained on what it makes of the
# embeddings.
#
# ## Exercises
#
# Write your function in a cell of your own and give it to `check`. A question takes
# its name and a letter: `check("what_shrank_attention", "a")`.

# %%
from annotated_src.exercises import check  # noqa: F401 - for your cells
from annotated_src.exercises.llama import chapter as exercises

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("residual_block")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("residual_block")

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("where_models_part")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("where_models_part")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
# A model whose table of names has one mistake. No loader can see it.
gate, up = "blocks.{}.ffn.gate_proj.weight", "blocks.{}.ffn.up_proj.weight"
suspect = load_with(HF_NAMES | {gate: HF_NAMES[up], up: HF_NAMES[gate]}, folder)
suspect_left = record(suspect, places(suspect.config, OURS), tokens)
theirs_left = record(theirs, places(suspect.config, THEIRS), tokens)
solved_where = exercises["where_models_part"].solution
begins = solved_where(suspect_left, theirs_left, 1e-5)
print("the difference begins at", begins)
confirm("in the feed-forward network of block 0", begins == "blocks.0.ffn")
first = suspect.blocks[0].ffn
confirm(
    "gate and up have changed places",
    torch.equal(first.gate_proj.weight, ours.blocks[0].ffn.up_proj.weight),
)
confirm(
    "and have the same shape",
    first.gate_proj.weight.shape == first.up_proj.weight.shape,
)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("head_votes")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("head_votes")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
# Which head of block 24 votes for Tokyo, and what does it look at?
from unittest.mock import patch

from annotated_src.attention import Attention, attend, repeat_kv

end = figures.stream_by_depth(real, prompt)[-1, -1]
rows = real.embedding.weight[tokyo] - real.embedding.weight.mean(0)
root = end.square().mean().add(real.config.norm_eps).sqrt()
attention, caught = real.blocks[23].attention, []
hook = attention.out_proj.register_forward_pre_hook(
    lambda _module, inputs: caught.append(inputs[0][0, -1])
)
real(prompt)
hook.remove()
direction = rows * real.norm.weight / root
inputs = caught[0], attention.out_proj.weight, direction, attention.head_dim
nine = exercises["head_votes"].solution(*inputs)
print(f"head {nine.argmax()} gives {nine.max() / nine.sum():.0%} of the bar")
confirm("the nine add up to the bar", (nine.sum() - voted.attention[23]).abs() < 1e-3)
confirm("head 4 gives more than half", nine.argmax() == 4 and nine[4] > nine.sum() / 2)
given = exercises["head_votes"].given(*inputs)
confirm(
    "here N H = D: the broken function runs, and its sum is another",
    (given.sum() - voted.attention[23]).abs() > 0.1,
)

weights = []


def attend_and_keep(queries, keys, values, mask):
    every = repeat_kv(keys, queries.shape[1] // keys.shape[1])
    scores = queries[:, :, -1:] @ every.mT / queries.shape[-1] ** 0.5
    weights.append(scores.softmax(-1)[0, :, 0])
    return attend(queries, keys, values, mask)


with patch.object(Attention, "attend", staticmethod(attend_and_keep)):
    real(prompt)
japan = prompt[0] == tokenizer.encode(" Japan")[0, 0]
print("' Japan' occurs", int(japan.sum()), "times in the prompt")
confirm("head 4 gives it over 90 % of its weight", weights[23][4, japan].sum() > 0.9)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("what_shrank_attention")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("what_shrank_attention")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
from dataclasses import replace

names = ("Llama-2-7B", "Llama-2-70B")
shared = replace(sizes["Llama-2-7B"], num_kv_heads=4)
chosen = figures.parameter_data({x: sizes[x] for x in names} | {"7B, shared": shared})
for name, share in zip(chosen.names, chosen.shares, strict=True):
    print(f"{name}: attention is {share[1]:.1%}")
for name in names:
    c = sizes[name]
    by_hand = 2 * (1 + c.num_kv_heads / c.num_heads), 3 * c.ffn_dim / c.embed_dim
    print(f"{name}: in units of D² {by_hand[0]:.2f} and {by_hand[1]:.2f}")
confirm("the ends take under 4 % of either", (chosen.shares[:2, 0] < 0.04).all())

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("a_head_untied")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("a_head_untied")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
with torch.device("meta"):
    untied = Llama(replace(real.config, tied_head=False))
try:
    renamed = rename(read_tensors(directory), names_by_layer(untied, HF_NAMES))
    assign_strictly(untied, renamed, torch.float32)
except CheckpointError as error:
    print(error)
temporary.cleanup()

# %% [markdown]
# ## What to remember
#
# - A Llama is an embedding, $L$ blocks that each *add* twice to a stream, a norm, a head.
# - $P = (1+u) VD + L(2DH(N+K) + 3DF + 2D) + D$. A fifth of SmolLM2-135M is vocabulary,
#   under 1 % of Llama-2-70B.
# - A loader can check names and shapes, and must check both strictly. That two norms
#   have changed places, only the original's numbers can tell: compare layer by layer.
# - `post_attention_layernorm` is the norm in front of the feed-forward network.
# - Because the stream is a sum, it can be read at any depth, and a score can be split
#   into who voted for it.
#
# ## Where to read on
#
# - transformers, `models/llama/modeling_llama.py`: `LlamaDecoderLayer`, `LlamaModel`,
#   `LlamaForCausalLM`. Find our three lines in its `forward`.
# - Meta's `llama/model.py`: `TransformerBlock` calls the same norms `attention_norm` and
#   `ffn_norm`, as we do.
# - {cite:t}`elhage2021` on the residual stream; {cite:t}`nostalgebraist2020` on the lens.
# - The parts: {ref}`ch-activations`, {ref}`ch-norms`, {ref}`ch-rope`,
#   {ref}`ch-attention`, {ref}`ch-heads`, {ref}`ch-cache`.
