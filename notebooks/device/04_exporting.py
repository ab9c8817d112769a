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
# (ch-exporting)=
# # Exporting: two entries, one file
#
# :::{admonition} In this chapter
# :class: at-a-glance
# **45 minutes · moderate.** Afterwards you can turn a model with a cache into a function
# of fixed shapes, prove that junk in the cache is harmless, trace both of its entries,
# read the graphs, write them to one file, and recognise the constants that a trace
# bakes in.
# :::

# %% tags=["remove-input"]
from annotated_src.figures.device_map import DeviceMap

DeviceMap("exporting")

# %% [markdown]
# :::{admonition} Predict before you run
# :class: predict
# One file will hold the same small Llama twice, as two programs. *prefill* reads 16
# tokens of a prompt in one call. *decode* reads one token. Which of the two programs has
# more operators? Does the second program double the file, or add a half, or less?
#
# And: the cache is handed in with room for 64 tokens, and most of it is junk. Which
# scores change when the junk is 0, when it is 10000, when it is NaN? Write it all down.
# :::

# %%
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from annotated_src.attention import Attention, attend, attend_folded
from annotated_src.convert import convert, load_litert, quantize_file
from annotated_src.edge import EdgeRunner, edge_generate
from annotated_src.edge_model import (
    EdgeModel,
    FunctionalCache,
    export_programs,
    make_entries,
    write_tokens,
)
from annotated_src.export import export_tflite
from annotated_src.figures import exporting as figures
from annotated_src.generate import generate
from annotated_src.grading import grade
from annotated_src.masks import causal_mask
from annotated_src.models.llama import Llama, tiny_config
from annotated_src.quiet import quietly
from annotated_src.rotary import apply_rotary
from annotated_src.show import confirm, show
from annotated_src.tflite_file import open_tflite, operators, stored_bytes

_ = torch.set_grad_enabled(False)

# %% [markdown]
# ## A cache that is handed around
#
# In {ref}`ch-cache` the cache was an object. It had a length, which grew; each call
# found it longer. A compiler for devices wants none of this. It lays out all memory
# before the first call, so every tensor has one shape for ever, and its programs are
# functions: tensors in, tensors out, nothing remembered between calls.
#
# So the cache becomes an argument and a result. It has $S$ places from the start. The
# length is gone; in its place the caller says where the tokens stand. In plain loops:


# %%
def write_in_loops(stored, new, start):
    """Copy every place, the old one or the new one."""
    written = torch.zeros_like(stored)
    num_tokens = new.shape[2]
    for place in range(stored.shape[2]):
        if start <= place < start + num_tokens:
            written[:, :, place] = new[:, :, place - start]
        else:
            written[:, :, place] = stored[:, :, place]
    return written


before = torch.full((1, 1, 5, 2), 99.0)
after = write_in_loops(before, torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), start=1)
print(after[0, 0].int().tolist())
confirm("what was given is as it was", (before == 99).all())

# %% [markdown]
# With $C$ the keys (or values) of a layer, $X$ the new ones of $T$ tokens, and $p$ the
# position of the first:
#
# $$
# C'_s = \begin{cases} X_{s-p} & p \le s < p + T, \\ C_s & \text{otherwise.} \end{cases}
# $$ (eq-exporting-write)
#
# The package has this as one operator of its own,
# {py:func}`annotated_src.edge_model.write_tokens`, so that a compiler meets one step
# and not a loop.

# %%
show(FunctionalCache)

# %%
# Check eq-exporting-write.
stored = torch.randn(1, 2, 7, 4, dtype=torch.float64)
new = torch.randn(1, 2, 3, 4, dtype=torch.float64)
confirm(
    "write_tokens = the loops, from every place where the tokens fit",
    all(
        torch.equal(
            write_tokens(stored, new, torch.tensor(p)), write_in_loops(stored, new, p)
        )
        for p in range(5)
    ),
)
try:
    write_tokens(stored, new, torch.tensor(5))
except ValueError as error:
    print(error)

# %% [markdown]
# ## Why junk is harmless
#
# `append` now returns all $S$ places, with the unused ones among them. The mask must
# say what is real, and positions are all it needs. The token at position $p$ sees
#
# $$
# \operatorname{visible}(p, s) = [\, s \le p \,], \qquad 0 \le s < S.
# $$ (eq-exporting-mask)
#
# Compare the mask of {ref}`ch-cache`: the same rule, but the columns end at $S$, not at
# the newest token. A hidden place scores $-\infty$, so the softmax gives it the weight
# $e^{-\infty} = 0$ exactly, and
#
# $$
# o = \sum_{s=0}^{S-1} w_s v_s = \sum_{s=0}^{p} w_s v_s + 0 \cdot v_{p+1} + \dots
# + 0 \cdot v_{S-1}.
# $$ (eq-exporting-junk)
#
# Zero times any number is zero. Is it? Here is a cache of four places, two of them in
# use; every number is visible.

# %%
# Check eq-exporting-mask, eq-exporting-junk.
positions, places = torch.tensor([3, 4, 5]), torch.arange(8)
mask = (places <= positions[:, None])[None, None]
print(mask[0, 0].int())
confirm(
    "up to the newest token it is the mask of the growing cache",
    torch.equal(mask[..., :6], causal_mask(num_tokens=3, num_cached=3)),
)
confirm("beyond it nothing is visible", not mask[..., 6:].any())

query = torch.tensor([[[[1.0, 0.0]]]], dtype=torch.float64)
keys = torch.tensor([[[[0.0, 1.0], [0.0, 2.0], [7.0, 7.0], [7.0, 7.0]]]]).double()
values = torch.tensor([[[[2.0, 0.0], [0.0, 4.0], [0.0, 0.0], [0.0, 0.0]]]]).double()
sees_two = (torch.arange(4) <= 1)[None, None, None]
outputs = {}
for junk in (0.0, 1e4, torch.inf, torch.nan):
    values[:, :, 2:] = junk
    outputs[junk] = attend_folded(query, keys, values, sees_two).flatten().tolist()
    print(f"junk {junk:>7}: output {outputs[junk]}")
half = [(a + b) / 2 for a, b in ((2.0, 0.0), (0.0, 4.0))]
confirm("two scores of 0: the mean of two values", outputs[0.0] == half == [1.0, 2.0])
confirm("10000 changes nothing", outputs[1e4] == half)

# %% [markdown]
# It is not: $0 \cdot \infty$ is NaN, and so is $0 \cdot \mathrm{NaN}$. Finite junk of any
# size changes nothing, not even the last bit. One NaN anywhere in the cache spoils every
# score. A runner must begin with numbers; zeros will do.
#
# ## The annotated source
#
# The wrapper calls the model's own parts: its embedding, blocks, norm and head. It
# knows nothing of Llama, so it serves Gemma and Phi too. Rotation tables are made once,
# for all $S$ positions, and rows of them are picked by `index_select`. The mask could be
# a table as well, of $S \times S$; comparing positions costs next to nothing and keeps
# 64 MB out of a file with 8192 places.

# %%
show(EdgeModel.forward, make_entries)

# %%
config = replace(tiny_config(), num_heads=6, num_kv_heads=2, head_dim=8)
torch.manual_seed(5)
model = Llama(config).eval()
for weight in model.parameters():
    if weight.ndim == 1:
        weight.uniform_(0.5, 1.5)
    else:
        weight.normal_(std=1.5 / weight.shape[-1] ** 0.5)

P, S = 16, 64  # tokens that prefill reads, places of the cache
entries = make_entries(model, prefill=P, cache=S)
(prefill, sample), (decode, _) = entries["prefill"], entries["decode"]
for name, value in sample.items():
    shapes = {k: tuple(v.shape) for k, v in value.items()} if name == "kv" else None
    print(name, shapes or tuple(value.shape))

# %% [markdown]
# ## Two calls, of two shapes
#
# A prompt of $n$ tokens must become $P$: something fills it up, and its keys land in the
# cache as junk. No harm: the mask hides each place until the text arrives there, and
# by {eq}`eq-exporting-write` the token that arrives overwrites the place first. In
# symbols, with $\mathrm{dec}_p$ for a decode call at position $p$ and $\mathrm{pre}$ for
# prefill,
#
# $$
# \mathrm{dec}_{n-1}\bigl(x_{n-1} \mid
# \mathrm{pre}(x_0 \dots x_{n-2}, \text{filling} \mid \text{junk})\bigr)
# = F(x_0 \dots x_{n-1})_{n-1},
# $$ (eq-exporting-padding)
#
# where $F$ is the full pass. Prefill gives no scores. Only the last token's would be
# wanted, and which of the $P$ is last depends on the prompt. So the last token of the
# prompt goes through decode, where scores come anyway.


# %%
# Check eq-exporting-padding.
def start_with(kv, prompt, filling, prefill=prefill):
    padded = torch.full((1, P), filling, dtype=torch.int32)
    padded[0, : len(prompt)] = prompt
    positions = torch.arange(P, dtype=torch.int32)
    return prefill(tokens=padded, input_pos=positions, kv=kv)["kv"]


def step(kv, token, position, decode=decode):
    at = torch.tensor([position], dtype=torch.int32)
    out = decode(tokens=token.view(1, 1).int(), input_pos=at, kv=kv)
    return out["logits"][0, 0], out["kv"]


def read_text(text, n, junk=0.0, filling=0, prefill=prefill, decode=decode):
    """The scores after token n - 1 and each later one: (len - n + 1, V)."""
    kv = {name: torch.full_like(part, junk) for name, part in sample["kv"].items()}
    kv, scores = start_with(kv, text[: n - 1], filling, prefill), []
    for i in range(n - 1, len(text)):
        logits, kv = step(kv, text[i], i, decode)
        scores.append(logits)
    return torch.stack(scores)


def close(a, b):
    return torch.allclose(a, b, atol=1e-4)


text = torch.randint(config.vocab_size, (40,))
full = model(text[None])[0]
clean = read_text(text, n=6)
confirm(
    "prompts of 2, 6 and 16 tokens: the scores of the full pass",
    all(close(read_text(text, n), full[n - 1 :]) for n in (2, 6, 16)),
)
confirm(
    "another filling: not a bit changes",
    torch.equal(read_text(text, n=6, filling=95), clean),
)
confirm(
    "junk of 10000: not a bit changes",
    torch.equal(read_text(text, n=6, junk=1e4), clean),
)
confirm("junk of NaN: every score is NaN", read_text(text, 6, torch.nan).isnan().all())

# %% [markdown]
# That was the last question at the top. The picture follows the places through the
# calls: the same model, a prompt of four words in a prefill of seven, ten places.

# %% mystnb={"image": {"alt": "A grid: six calls from top to bottom, ten places of the cache from left to right. After prefill, four blue cells hold the words Once upon a time, three orange cells hold junk from the filling and three white cells still hold 99; a vertical bar, where the mask ends, stands behind the fourth word. Each of five decode calls below turns one cell blue, the one just inside the bar, which moves one place to the right; the words before it are kept in grey. The orange cells are overwritten one by one, always before the bar has passed them."}, "figure": {"name": "fig-exporting-calls", "caption": "What the cache holds after each call, found by comparing it with the keys of a full pass. It began full of 99; a 0 is filling. Nothing but tokens is ever to the left of the bar."}} tags=["hide-input"]
words = ["Once", "upon", "a", "time", "there", "was", "a", "small", "llama"]
calls = figures.calls_data(model, words, prompt_len=4, prefill=7, cache=10)
figures.draw_calls(calls)

# %%
before_bar = torch.arange(10) < calls.visible[:, None]
confirm(
    "before the bar every key is that of the full pass", calls.right[before_bar].all()
)
confirm("behind it none is", not calls.right[~before_bar].any())
confirm(
    "prefill writes 7 places, decode 1",
    calls.written.sum(1).tolist() == [7, 1, 1, 1, 1, 1],
)

# %% [markdown]
# ## From Python to a graph
#
# `torch.export` runs an entry once, with tensors that have shapes but no numbers, and
# writes down every operation. Loops, `if`, objects and the cache's class are gone
# afterwards: what remains is a list of operations. What depends on a *shape* became a
# constant. What depends on a *number* cannot be followed, and raises an error.

# %%
programs = export_programs(model, prefill=P, cache=S)
nodes = {
    name: Counter(
        str(node.target).removeprefix("aten.").split(".")[0]
        for node in program.graph.nodes
        if node.op == "call_function"
    )
    for name, program in programs.items()
}
for kind in ("linear", "matmul", "softmax", "index_select", "embedding"):
    print(f"{kind:13}", {name: count[kind] for name, count in nodes.items()})
writes = {
    name: sum("write_tokens" in str(node.target) for node in program.graph.nodes)
    for name, program in programs.items()
}
print("write_tokens ", writes)
L = config.num_layers
confirm(
    "7 products with weights in a block, and the head",
    nodes["decode"]["linear"] == 7 * L + 1,
)
confirm(
    "keys and values of each layer are written once", set(writes.values()) == {2 * L}
)
confirm("no size is left open", not any(p.range_constraints for p in programs.values()))
confirm(
    "the graphs compute what the model does, bit for bit",
    torch.equal(
        read_text(
            text,
            6,
            prefill=programs["prefill"].module(),
            decode=programs["decode"].module(),
        ),
        clean,
    ),
)

# %% [markdown]
# Here is a number that would decide what comes next, and the tracer's answer:


# %%
class Peeks(nn.Module):
    """Looks at a number to decide: which way shall a graph go?"""

    def forward(self, x):
        return x if x.sum() > 0 else -x


try:
    with quietly():
        torch.export.export(Peeks(), (torch.ones(3),))
    followed = True
except Exception as error:
    followed = False
    print(type(error).__name__)
confirm("a number cannot be followed", not followed)

# %% [markdown]
# This is the first block's way from its keys to its heads, as the graph has it:

# %%
names = [
    str(node.target).removesuffix(".default").split(".")[1]
    for node in programs["decode"].graph.nodes
    if str(node.target).startswith(("aten.", "annotated_src."))
]
first_write = names.index("write_tokens")
print(*names[first_write : first_write + 16], sep=" → ")

# %% [markdown]
# The two graphs are nearly one: the wrapper is the same function. What differs is $T$,
# and it stands in every shape. A program with $T$ left open would have to plan its
# memory anew at each call. Two programs cost little, as we shall see, and each is
# planned once.
#
# ## Into one file
#
# Now the same to a `.tflite` file, which
# {py:func}`annotated_src.export.export_tflite` writes by way of the library
# litert-torch. LiteRT calls an entry a *signature*: a name, and names for what goes in
# and comes out. Weights that the two programs share are in the file once.

# %%
folder = TemporaryDirectory()
here = Path(folder.name)
export_tflite(model, here / "both.tflite", prefill=P, cache=S)
convert({"decode": entries["decode"]}, here / "decode.tflite")

both, alone = operators(here / "both.tflite"), operators(here / "decode.tflite")
sizes = {name: (here / f"{name}.tflite").stat().st_size for name in ("both", "decode")}
print({name: len(steps) for name, steps in both.items()}, "operators")
print(f"decode alone {sizes['decode'] / 1e3:.0f} kB, both {sizes['both'] / 1e3:.0f} kB")
confirm(
    "prefill, which reads 16 tokens, has fewer operators",
    len(both["prefill"]) < len(both["decode"]),
)
confirm(
    "the second program adds a sixth",
    5.5 < sizes["decode"] / (sizes["both"] - sizes["decode"]) < 6.5,
)
weights = sum(weight.nbytes for weight in model.parameters())
tables = decode.cos.nbytes + decode.sin.nbytes
constants = stored_bytes(here / "both.tflite")["FLOAT32"]
confirm(
    "the weights and two tables are there once",
    0 <= constants - weights - tables < 1000,
)

# %% [markdown]
# A sixth, then: what the second program adds is a list of operators and of shapes. It
# grows with the number of layers, and not with their width.
#
# Prefill has *fewer* operators because it returns the cache and nothing else. The
# wrapper does not call the head: one product less, as the graphs above say. The
# compiler does the rest. It goes back from the results and keeps what they need. In the
# last layer nobody needs what comes after keys and values: its queries, its attention,
# its feed-forward network. Of the 7 products with weights in a block the last layer
# keeps 2. With $L$ layers:
#
# $$
# m_{\text{decode}} = 7L + 1, \qquad m_{\text{prefill}} = 7\,(L - 1) + 2 .
# $$ (eq-exporting-products)

# %%
# Check eq-exporting-products.
products = {name: steps.count("FULLY_CONNECTED") for name, steps in both.items()}
print(products)
confirm("7 L + 1", products["decode"] == 7 * L + 1)
confirm("7 (L - 1) + 2", products["prefill"] == 7 * (L - 1) + 2)
softmaxes = {name: steps.count("SOFTMAX") for name, steps in both.items()}
confirm("and one attention less", softmaxes == {"prefill": L - 1, "decode": L})
once, one_by_one = products["prefill"] + products["decode"], P * products["decode"]
print(f"a prompt of {P}: {once} products with weights, token by token {one_by_one}")

# %% [markdown]
# The last line is why prefill exists at all. Decode alone could read a prompt too, token
# by token, with the same result. But each product reads its whole matrix from memory,
# for one token or for sixteen. Times of both are in {doc}`/speed_device`.

# %% mystnb={"image": {"alt": "Pairs of horizontal bars, decode above prefill, for six groups of operators in the file. Arithmetic and numbers put elsewhere are the longest by far; products with weights are 15 for decode and 9 for prefill; attention, writes to the cache and look-ups are short. Every bar of decode is at least as long as that of prefill, except in numbers put elsewhere, where prefill has a few more."}, "figure": {"name": "fig-exporting-operators", "caption": "What the two programs in the file are made of. One operator in ten multiplies with weights; a third only put numbers elsewhere."}} tags=["hide-input"]
counted = figures.operators_data(here / "both.tflite")
figures.draw_operators(counted)

# %%
in_both = counted.decode + counted.prefill
shares = dict(zip(counted.groups, (in_both / in_both.sum()).tolist(), strict=True))
confirm(
    "one in ten multiplies with weights",
    round(1 / shares["products with weights"]) == 10,
)
confirm("a third put numbers elsewhere", 0.3 < shares["numbers put elsewhere"] < 0.37)

# %% [markdown]
# ## The ladder of equality
#
# The model, the functional model, the traced graph, and the file, on the device's own
# interpreter. {py:class}`annotated_src.edge.EdgeRunner` pads, calls prefill, then decode,
# as `read_text` did above; {ref}`ch-device` takes it apart.

# %%
runner = EdgeRunner(here / "both.tflite")
device = torch.from_numpy(runner.logits(text.tolist(), 6))
ours = full[5:]
print("step  torch's best  device's best")
for i in range(5):
    print(f"{i:4}  {int(ours[i].argmax()):12}  {int(device[i].argmax()):13}")
confirm("model = functional model, 35 steps within 1e-4", close(ours, clean))
confirm("model = device, 35 steps within 1e-4", close(ours, device))
prompt = text[:6]
confirm(
    "50 greedy ids are the same",
    edge_generate(here / "both.tflite", prompt.tolist(), 50)
    == generate(model, prompt[None], max_new_tokens=50)[0, 6:].tolist(),
)

# %% [markdown]
# Fewer bits come last, from the finished file, by the library ai-edge-quantizer. Its
# schemes are relatives of those in {ref}`ch-quantizing`:
#
# | `--quantize` | the idea of | different here |
# |---|---|---|
# | `int8` | `int8-dynamic` | scales are the largest magnitude / 127; the embedding, too |
# | `int8-weight-only` | the same name | as above |
# | `int4` | `int4-grouped` | activations become int8 as well |
# | `fp16` | | half precision in the file, float32 when it runs |
#
# Greedy text is no measure any more, since near-ties fall the other way; agreement at
# each step and the divergence are.

# %%
quantize_file(here / "both.tflite", here / "int8.tflite", "int8")
rounded = torch.from_numpy(EdgeRunner(here / "int8.tflite").logits(text.tolist()))
grades = grade(full[None], rounded[None])
kinds = stored_bytes(here / "int8.tflite")
matrices = sum(weight.numel() for weight in model.parameters() if weight.ndim == 2)
confirm("every matrix is int8 now, one byte a weight", kinds["INT8"] == matrices)
confirm("4 of 5 best tokens are the same, or more", grades.agreement >= 0.8)
confirm("and the divergence is below 0.03 nats", grades.mean_kl < 0.03)

interpreter = open_tflite(here / "int8.tflite")
details = interpreter.get_tensor_details(subgraph_index=1)  # of decode
in_file = [torch.from_numpy(d["quantization_parameters"]["scales"]) for d in details]


def is_in_file(matrix):
    scale = matrix.abs().amax(dim=1) / 127
    return any(x.shape == scale.shape and torch.allclose(x, scale) for x in in_file)


confirm(
    "the scale of each row is its largest magnitude / 127, the embedding's as well",
    all(is_in_file(w) for w in model.parameters() if w.ndim == 2),
)

# %% [markdown]
# `match` restricts it to operators whose name in the file fits a regular expression.
# Those are the converter's names, made of classes and fields, and not ours:

# %%
quantize_file(here / "both.tflite", here / "ffn.tflite", "int8", match="FeedForward")
in_ffn = sum(w.numel() for name, w in model.named_parameters() if ".ffn." in name)
confirm(
    "the feed-forward networks alone",
    stored_bytes(here / "ffn.tflite")["INT8"] == in_ffn,
)
try:
    quantize_file(here / "both.tflite", here / "none.tflite", "int8", match="mlp")
except ValueError as error:
    print(error)

# %% [markdown]
# The quantizer itself says nothing when a name matches no operator: it writes the file
# as it was. Ours counts the bytes afterwards.
#
# All of it is one command:
#
# ```bash
# python -m annotated_src.export MODEL_DIR out.tflite --quantize int8 --prefill 64 --cache 256
# ```
#
# It writes beside its target and renames at the end, refuses to replace a file without
# `--force`, and, before it quantises, runs the new file and compares its scores with the
# model's.
#
# ## Why queries are folded, not keys repeated
#
# Six query heads share two key/value heads here. {ref}`ch-heads` showed two ways to
# meet them: repeat the keys, or fold the query heads of a group into rows. On the
# device repeating is an operator of its own. It copies, at every step, the whole cache,
# unused places and all: with $N$ heads of width $H$ and $b$ bytes to a number,
#
# $$
# \text{copied} = 2 \cdot L \cdot N \cdot S \cdot H \cdot b .
# $$ (eq-exporting-copied)

# %%
# Check eq-exporting-copied.
repeating = make_entries(model, P, S)["decode"]
for part in repeating[0].modules():
    if isinstance(part, Attention):
        part.attend = attend
convert({"decode": repeating}, here / "repeat.tflite")
repeated = Counter(operators(here / "repeat.tflite")["decode"])
extra = repeated - Counter(both["decode"])
print("repeating adds", dict(extra))
confirm("keys and values of each layer are copied", extra["BROADCAST_TO"] == 2 * L)
confirm("folded, nothing is", "BROADCAST_TO" not in both["decode"])

interpreter = open_tflite(here / "repeat.tflite")
steps = interpreter._get_ops_details()
shapes = {item["index"]: item["shape"] for item in interpreter.get_tensor_details()}
copied = sum(
    4 * int(shapes[index].prod())
    for item in steps
    if item["op_name"] == "BROADCAST_TO"
    for index in item["outputs"]
)
N, H = config.num_heads, config.head_dim
confirm("2 L N S H b bytes a token", copied == 2 * L * N * S * H * 4)
print(f"{copied:,} bytes copied to read one token; the weights are {weights:,}")
confirm("more than a quarter", copied > weights / 4)

# %% [markdown]
# With 64 places only, that is more than a quarter of the bytes of all weights. What it
# costs in time is in {doc}`/speed_device`.
#
# The cache's write has two forms as well. Torch's own `index_copy` becomes a scatter:
# it looks up each token's place. `write_tokens` becomes one `DYNAMIC_UPDATE_SLICE`. We
# tell litert so, in the four lines of `lower`:

# %%
show(load_litert)


# %%
class Scatters(nn.Module):
    """The write in torch's own words."""

    def forward(self, stored, new, at):
        return {"written": stored.index_copy(2, at, new)}


write = {"stored": stored.float(), "new": new.float(), "at": torch.arange(3)}
convert({"write": (Scatters(), write)}, here / "scatter.tflite")
print(*operators(here / "scatter.tflite")["write"])
confirm(
    "ours: each write is one slice, and there is no scatter",
    all(
        steps.count("DYNAMIC_UPDATE_SLICE") == 2 * L
        and "STABLEHLO_SCATTER" not in steps
        for steps in both.values()
    ),
)

# %% [markdown]
# :::{admonition} Paper and code
# :class: paper-code
# The description of the on-device library that this part answers to (AI Edge Torch, now
# litert-torch) gives each entry two inputs, the tokens and their positions, with a cache
# inside the model. That would be a program with a state between its calls. In the
# library's code of today the cache is an argument, as here. The description also names
# two recipes for int8, one for linear layers only and one for all; in today's
# `quant_recipes.py` the one for all is called `full_dynamic_recipe`. Ask the file:
# :::

# %%
entry_list = open_tflite(here / "both.tflite").get_signature_list()
for name, entry in entry_list.items():
    print(name, "takes", *entry["inputs"])
    print(" " * len(name), "gives", *entry["outputs"])
confirm(
    "what decode gives back as a cache is what both take",
    {n for n in entry_list["decode"]["outputs"] if n != "logits"}
    == {n for n in entry_list["prefill"]["inputs"] if n.startswith("kv_")},
)

# %% [markdown]
# :::{admonition} Break it
# :class: break-it
# Two mistakes of exporters. One: the mask is made for a full cache, and forgets that
# most places are unused. With zeros in them nothing looks wrong: no NaN, no error. Two:
# the position is a Python number. The trace takes it for a constant.
# :::


# %%
class WrongMask(EdgeModel):
    """Everything in the cache is visible: right only when the cache is full."""

    def forward(self, tokens, input_pos, kv):
        def see_all(queries, keys, values, mask):
            return attend_folded(queries, keys, values, torch.ones_like(mask))

        for part in self.model.modules():
            if isinstance(part, Attention):
                part.attend = see_all
        return super().forward(tokens, input_pos, kv)


class WrongPosition(nn.Module):
    """Remembers by itself where it is: one more at each call. In Python."""

    def __init__(self, entry, position):
        super().__init__()
        self.entry, self.position = entry, position

    def forward(self, tokens, kv):
        at = torch.full((1,), self.position, dtype=torch.int32)
        self.position += 1
        return self.entry(tokens, at, kv)


blind = WrongMask(model, S)
errors = (read_text(text, 6, decode=blind) - ours).abs().amax(dim=-1)
print("mask forgotten, error of the steps:", *(f"{e:.1f}" for e in errors[:6].tolist()))
confirm("every step is wrong, and no step is NaN", (errors > 0.1).all())

kv = start_with(sample["kv"], text[:5], 0)
arguments = {"tokens": text[5].view(1, 1).int(), "kv": kv}
traced = torch.export.export(WrongPosition(decode, 5), (), arguments).module()
errors = []
for i in range(5, 11):
    out = traced(tokens=text[i].view(1, 1).int(), kv=kv)
    kv = out["kv"]
    errors.append(float((out["logits"][0, 0] - full[i]).abs().max()))
print("position baked in, error of the steps:", *(f"{e:.1f}" for e in errors))
confirm("the first step is right, the next is not", errors[0] < 1e-4 < 0.1 < errors[1])

# %% [markdown]
# The second is the nastier one. A test that compares one step passes. In the file place
# 5 is overwritten for ever, and the text never grows. Always compare several steps, from
# a position that is not the one of the trace.
#
# ## Exercises
#
# Write your function in a cell of your own and give it to `check`. A question takes its
# name and a letter: `check("scores_of_all_tokens", "a")`.

# %%
from annotated_src.exercises import check  # noqa: F401 - for your cells
from annotated_src.exercises.exporting import chapter as exercises

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("write_at")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("write_at")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
solved = exercises["write_at"].solution
confirm(
    "with neighbours = the loops",
    all(
        torch.equal(
            solved(stored, new, torch.arange(p, p + 3)),
            write_in_loops(stored, new, p),
        )
        for p in range(5)
    ),
)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("prefill_calls")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("prefill_calls")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
kv = sample["kv"]
for ids, places in exercises["prefill_calls"].solution(text[:30].tolist(), P, S):
    tokens, at = torch.tensor([ids]).int(), torch.tensor(places).int()
    kv = prefill(tokens=tokens, input_pos=at, kv=kv)["kv"]
logits, _ = step(kv, text[30], 30)
confirm("30 tokens in two prefills = the full pass", close(logits, full[30]))
shorter = make_entries(model, P, 60)["prefill"][0]
kv = {name: part[:, :, :60] for name, part in sample["kv"].items()}
try:
    shorter(torch.zeros(1, P).int(), torch.arange(48, 64).int(), kv)
    fits = True
except (ValueError, IndexError):
    fits = False
confirm("a call whose filling passes the end is refused", not fits)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("scores_of_all_tokens")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("scores_of_all_tokens")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
scores = 64 * 49_152 * 4
print(f"{scores / 1e6:.1f} MB of scores, {scores / 64 / 1e6:.1f} MB of them wanted")
confirm(
    "of the last layer's 7 products 5 would come back", products["prefill"] == 7 * L - 5
)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("read_prompt")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("read_prompt")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
runner_task = exercises["read_prompt"]
confirm("mended", close(runner_task.solution(model, text[:6], S), full[5]))
confirm("before", not close(runner_task.given(model, text[:6], S), full[5]))
confirm("two tokens hide it", close(runner_task.given(model, text[:2], S), full[1]))

padded = torch.zeros(1, P, dtype=torch.int32)
padded[0, :6] = text[:6]
zeros = torch.zeros(P, dtype=torch.int32)
wrong = prefill(tokens=padded, input_pos=zeros, kv=sample["kv"])["kv"]
right = start_with(sample["kv"], text[:6], filling=0)
wrong, right = ({k: v[:, :, :6] for k, v in kv.items()} for kv in (wrong, right))
turned = apply_rotary(wrong["k_0"], prefill.cos[:, :, :6], prefill.sin[:, :, :6])
confirm("layer 0: the values are right", close(wrong["v_0"], right["v_0"]))
confirm("the keys are not", not close(wrong["k_0"], right["k_0"]))
confirm("but for the turn they are", close(turned, right["k_0"]))
confirm("layer 1: the values are wrong", not close(wrong["v_1"], right["v_1"]))

# %% [markdown]
# ## What to remember
#
# - A device runs functions of fixed shapes. The cache goes in and comes out; positions
#   are an argument.
# - $[s \le p]$ hides what is unused; finite junk is then exactly harmless. NaN is not.
# - Prefill and decode are one function traced at two shapes, in one file with one set of
#   weights. What no result needs is not in the program.
# - A trace keeps shapes and Python numbers as constants. Compare several steps, on the
#   device's interpreter, from another position.
# - Fold queries; do not repeat keys. Write a slice; do not scatter.
# - Converters and quantizers are silent. Compare, and count.
#
# **Where to read on.** PyTorch: `torch/export/__init__.py`, `export`, and
# `torch/library.py`, `custom_op`. litert-torch: `_convert/core.py`,
# `convert_signatures`; `generative/custom_ops/dynamic_update_slice.py`;
# `generative/layers/kv_cache.py`, whose cache has the order (batch, tokens, heads,
# width). ai-edge-litert: `interpreter.py`, `SignatureRunner`. Next, {ref}`ch-device`
# runs the file where there is no torch.
