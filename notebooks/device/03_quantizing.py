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
# (ch-quantizing)=
# # Quantising: fewer bits a weight
#
# :::{admonition} In this chapter
# :class: at-a-glance
# **45 minutes · moderate.** Afterwards you can round a weight to 8 or 4 bits by hand,
# foretell the error from one number, say why one outlier costs a whole row and why
# activations are harder than weights, quantise any model of this book in one call, and
# grade what came of it.
# :::

# %% tags=["remove-input"]
from annotated_src.figures.device_map import DeviceMap

DeviceMap("quantizing")

# %% [markdown]
# :::{admonition} Predict before you run
# :class: predict
# We read SmolLM2-135M into float32, 32 bits a weight.
#
# - One of its rows has 1,536 weights. They get four bits each, 16 levels, and share one
#   scale. How many become exactly 0?
# - All matrices of its blocks get four bits a weight. How many times smaller is the
#   model?
# - Eight bits for the weights; then eight bits for the activations as well. Which of
#   the two roundings costs more, and how many times?
#
# Write three numbers down.
# :::

# %%
import copy
import math

import torch
from torch import nn

from annotated_src.checkpoint import load_model
from annotated_src.figures import quantizing as figures
from annotated_src.figures.chatglm import SIX_B
from annotated_src.figures.quantizing import crest, decibels
from annotated_src.grading import Grades, grade, text_perplexity
from annotated_src.models.chatglm import ChatGLM
from annotated_src.models.gemma import GEMMA_2B, Gemma
from annotated_src.models.llama import TINYLLAMA_1_1B, Llama
from annotated_src.models.phi import PHI_2, Phi
from annotated_src.quantize import (
    DynamicLinear,
    WeightOnlyLinear,
    dequantize_groups,
    pack_int4,
    quantize_,
    quantize_groups,
    unpack_int4,
    weight_bytes,
)
from annotated_src.show import confirm, show
from annotated_src.tokenizer import TextTokenizer
from annotated_src.weights import smollm2

_ = torch.set_grad_enabled(False)  # nothing is trained here
_ = torch.manual_seed(3)

# %% [markdown]
# ## Eight weights by hand
#
# Take eight weights. Four bits can tell 16 things apart: the integers $-8$ to $7$. So
# choose a step, the *scale*, and write each weight as a whole number of steps.


# %%
def round_by_hand(weights, bits):
    half = 2 ** (bits - 1)
    scale = max(abs(w) for w in weights) / (half - 0.5)
    integers = []
    for w in weights:
        nearest = round(w / scale)
        integers.append(max(-half, min(half - 1, nearest)))
    return integers, scale


weights = [0.31, -0.52, 0.08, 0.90, -0.17, 0.02, 0.66, -0.75]
for bits in (4, 8):
    integers, scale = round_by_hand(weights, bits)
    print(f"{bits} bits, scale {scale:.4f}")
    print("  integers", *(f"{q:6}" for q in integers))
    print("  weights ", *(f"{w:6.2f}" for w in weights))
    print("  again   ", *(f"{q * scale:6.2f}" for q in integers))

# %% [markdown]
# That is all. With $b$ bits, and $L = (2^b - 1)/2$, which is 7.5 or 127.5:
#
# $$
# s = \frac{\max_i |w_i|}{L}, \qquad
# q_i = \operatorname{clamp}\Bigl(\operatorname{round}\frac{w_i}{s}\Bigr), \qquad
# \hat w_i = s\, q_i .
# $$ (eq-quantizing-round)
#
# The integers run from $-L - \tfrac12$ to $L - \tfrac12$. No weight is further than
# half a step from one of them, the largest included, so
#
# $$
# |\hat w_i - w_i| \le \frac{s}{2} .
# $$ (eq-quantizing-bound)

# %%
# Check eq-quantizing-round and eq-quantizing-bound.
row = torch.randn(64, dtype=torch.float64)
for bits in (8, 4):
    integers, scale = quantize_groups(row[None].float(), bits)
    by_hand, step = round_by_hand(row.tolist(), bits)
    others = row.abs() < row.abs().max()  # the largest is half-way: either will do
    same = integers[0].double() == torch.tensor(by_hand, dtype=torch.float64)
    confirm(f"{bits} bits: the integers", same[others].all())
    confirm(f"{bits} bits: the scale", math.isclose(scale.item(), step, rel_tol=1e-6))
    error = torch.tensor(by_hand, dtype=torch.float64) * step - row
    confirm("no error above half a step", error.abs().max() <= step / 2 * (1 + 1e-12))

# %% [markdown]
# ## The annotated source
#
# The package does so for a whole matrix. A *group* is what shares a scale: a row, or a
# stretch of some columns of it.

# %%
show(quantize_groups, dequantize_groups)

# %% [markdown]
# Four choices are in these lines.
#
# - **Symmetric.** Zero is a level, and no offset is stored. A matrix of weights lies
#   evenly around 0; an exercise tries an offset.
# - **A scale for each row, not for the matrix.** A row makes one output, so its scale
#   can wait until the sum is there. Rows are told apart for four bytes each.
# - **All levels.** $L = 7.5$ and not 7: the step is smaller, by 7 % at four bits.
# - **To the nearest.** Without data nothing better is known. Methods that look at what
#   the layer is given, such as GPTQ {cite:p}`frantar2022` and AWQ {cite:p}`lin2023`,
#   choose better integers or scales for the same layout.
#
# Two integers of four bits share a byte:

# %%
integers, _ = quantize_groups(torch.tensor([weights]), 4)
packed = pack_int4(integers)
print("integers", integers[0].tolist())
print("bytes   ", *(f"{byte:02x}" for byte in packed[0].tolist()))
confirm("and back", torch.equal(unpack_int4(packed), integers))
show(pack_int4, unpack_int4)

# %% [markdown]
# ## How large is the error?
#
# A weight falls anywhere between two levels, so its error is as good as uniform between
# $-s/2$ and $s/2$. Its mean square is
#
# $$
# \mathbb{E}\,(\hat w - w)^2 = \int_{-1/2}^{1/2} (s u)^2\, du = \frac{s^2}{12} .
# $$ (eq-quantizing-noise)
#
# Compare this with the mean square of the weights, $\mathrm{rms}^2$. What decides is
# how far the largest stands out, the *crest* $c = \max|w| / \mathrm{rms}$. Then $s = c
# \cdot \mathrm{rms} / L$, and signal to noise is
#
# $$
# \mathrm{SNR} = \frac{\mathrm{rms}^2}{s^2 / 12} = \frac{12\, L^2}{c^2}
# \approx \bigl( 6.02\, b + 4.77 - 20 \log_{10} c \bigr)\ \text{dB} .
# $$ (eq-quantizing-snr)
#
# (10 dB are a factor of ten in power.) A bit more is worth 6 dB, a quarter of the
# noise. And a crest twice as large costs exactly one bit.

# %%
# Check eq-quantizing-noise and eq-quantizing-snr.
row = torch.randn(200_000, dtype=torch.float64)
peak = crest(row[None]).item()
for bits in (4, 6, 8, 10):
    integers, scale = round_by_hand(row.tolist(), bits)
    rounded = torch.tensor(integers, dtype=torch.float64) * scale
    noise = (rounded - row).square().mean().item()
    confirm(
        f"{bits:2} bits: noise is s²/12, to 1 %", abs(noise * 12 / scale**2 - 1) < 0.01
    )
    L, snr = (2**bits - 1) / 2, decibels(row, rounded).item()
    exact = 10 * math.log10(12 * L**2 / peak**2)
    short = 6.02 * bits + 4.77 - 20 * math.log10(peak)
    print(f"{bits:2} bits: {snr:5.1f} dB")
    confirm("as 12 L² / c² says", abs(snr - exact) < 0.05)
    confirm(
        "the short form is 6 dB a bit", abs(snr - short) < (0.7 if bits == 4 else 0.2)
    )

# %% [markdown]
# ## One weight costs the row
#
# The formula has a bad end. $c$ is about 3.4 for most rows of SmolLM2. But not for all:

# %%
directory = smollm2()
real, tokenizer = load_model(directory), TextTokenizer.from_pretrained(directory)
row = real.get_submodule("blocks.28.ffn.down_proj").weight[507]
at = int(row.abs().argmax())
print(f"{len(row):,} weights, rms {row.square().mean().sqrt():.2f}")
print(f"the largest: {row[at]:.2f}, at {at}; crest {crest(row[None]).item():.0f}")
three = figures.row_data(row)

# %% mystnb={"image": {"alt": "Three panels with the same 128 weights of one row of SmolLM2, open circles before rounding and blue dots after, over the levels as green lines. One weight of minus 5.78 is far below the panels. With 8 bits and one scale the levels are dense and every dot lies in its circle. With 4 bits and one scale only three levels fall into the panel, and nearly all dots lie on zero. With 4 bits and groups of 32, three of the four groups have 16 levels of their own, a narrow band just as wide as their weights; only the group with the outlier is flat."}, "figure": {"name": "fig-quantizing-row", "caption": "128 columns of one row of SmolLM2, and the levels that they may have. One weight sets the scale for all that share it."}} tags=["hide-input"]
figures.draw_row(three, first=640)

# %%
for kind, zeros, found in zip(figures.KINDS, three.zeros, three.decibels, strict=True):
    print(f"{kind:22} {zeros:5.1%} zeros, {found:4.1f} dB")
zeros = (quantize_groups(row[None], 4)[0] == 0).sum().item()
print(f"{zeros:,} of {len(row):,} weights are gone")
confirm("more than 98 % of the row", zeros > 0.98 * len(row))
confirm("groups bring back 10 dB", three.decibels[2] - three.decibels[1] > 10)
lost = math.log2(crest(row[None]).item() / 3.4)
confirm("against a crest of 3.4 the outlier costs three bits", round(lost) == 3)

# %% [markdown]
# There is the first answer: all but 18. The row that was a direction in a space of
# 1,536 dimensions has become a handful of numbers. Eight bits survive it, at the price
# of three. Four bits do not.
#
# Groups do not remove the outlier; they lock it in. Its neighbours fare no better than
# before, and all others have a scale of their own.
#
# :::{admonition} A figure that moves: one weight that grows
# :class: moving int8-grid
# A matrix of the small ChatGLM, 512 rows of 128 weights. You choose how large its largest
# weight is; it is 0.55. Under the histogram stand the levels, and what falls into the
# filled zone around 0 becomes 0. Four bits and one scale for the matrix: 22 % of the other
# rows become 0, and 97 % when that weight is 8 times as large. With a scale for each row
# they lose 15 %, however large it is; with one for each 32 weights the rest of its own row
# is safe, too. Now eight bits, one scale for the matrix, 16 times: the error is 15 % of the
# weights. Four bits had 16 % before anything grew. The outlier has eaten four bits.
# :::
#
# ## These weights have been here before
#
# Look at the open circles again, at columns 672 to 703. Only three heights, and the
# outlier! Nobody trains such weights. Our copy of SmolLM2 comes from a file whose blocks
# have four bits a weight, llama.cpp's Q4_1 ({py:mod}`annotated_src.weights`): 32 weights
# share a scale *and an offset*. We unpacked it to float32, and the traces are still there.


# %%
def distinct(weights, group_size=32):
    """The most different values that one group has."""
    return max(len(group.unique()) for group in weights.split(group_size))


print(
    f"different values in a group: {distinct(row)}; moved by 16: {distinct(row[16:])}"
)
confirm("16 levels for each 32", distinct(row) <= 16 < distinct(row[16:]))
groups = row.unflatten(0, (-1, 32))
low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
step = (high - low) / 15  # 16 levels from the smallest to the largest
again = (((groups - low) / step).round() * step + low).flatten()
confirm("the file's own 16 levels lose nothing", torch.allclose(again, row, atol=1e-5))
confirm("ours lose a lot", decibels(row, three.rounded[2]) < 20)
matrix = real.blocks[3].ffn.up_proj.weight
for bits in (8, 4):
    integers, scale = quantize_groups(matrix, bits)
    noise = (dequantize_groups(integers, scale) - matrix).square().mean()
    same = abs(12 * noise / scale.square().mean() - 1) < 0.02
    confirm(f"{bits} bits, a matrix by rows: still s²/12, to 2 %", same)

# %% [markdown]
# Two things follow. In this chapter "in full" means *as we read it*, and every error is
# that of a second rounding, on other levels than the first. The formulas do not mind:
# what falls between our levels is spread evenly all the same. But a model rounded twice
# has both errors. There are four bits that would cost nothing here, and with ours noise
# is only 16 dB below. So quantise from the original, if you can get it.
#
# ## What groups cost
#
# A group of $g$ weights stores $g$ integers of $b$ bits and a scale in float32. A
# matrix of $R$ rows and $C$ columns takes, in bytes,
#
# $$
# B = R\, C \Bigl( \frac{b}{8} + \frac{4}{g} \Bigr) .
# $$ (eq-quantizing-bytes)
#
# With $b = 4$ and $g = 32$ this is 5 bits a weight: an eighth of the matrix of weights,
# once more, for its scales.

# %%
# Check eq-quantizing-bytes.
linear = nn.Linear(576, 1536, bias=False)
for bits, group in ((8, 576), (4, 576), (4, 64), (4, 32), (4, 8)):
    layer = WeightOnlyLinear(linear, bits, group)
    stored = weight_bytes(layer)
    per_weight = 8 * stored / linear.weight.numel()
    print(f"{bits} bits, groups of {group:3}: {per_weight:5.2f} bits a weight")
    confirm("as the formula says", stored == 1536 * 576 * (bits / 8 + 4 / group))

# %% [markdown]
# (Scales in half would be 4.5 bits: an exercise.) The layer keeps the integers, and makes
# weights of them each time that it is asked:

# %%
show(WeightOnlyLinear)

# %% [markdown]
# This saves memory, and the time to read it ({ref}`ch-decoding`), if a kernel does both
# steps in one. It saves no arithmetic: the products are floats as before. ChatGLM-6B
# ships such a scheme; {ref}`ch-chatglm` has it.
#
# ## Integers times integers
#
# A processor multiplies bytes faster than floats. For that the activations must be
# integers too. They are not known before they come, so each token is rounded when it
# arrives, as if it were a row of weights. That is *dynamic* quantisation. With $x_t
# \approx s_t p_t$ and $w_r \approx s_r q_r$,
#
# $$
# y_{tr} = \sum_i x_{ti}\, w_{ri} \approx s_t\, s_r \sum_i p_{ti}\, q_{ri} .
# $$ (eq-quantizing-integers)
#
# The sum on the right is of integers only, and exact. Both scales come out of it,
# because neither depends on $i$. (A scale for each *column* of $x$ would not.)

# %%
# Check eq-quantizing-integers.
linear, x = nn.Linear(48, 5, bias=False), torch.randn(3, 48)
layer = DynamicLinear(linear)
found = torch.zeros(3, 5, dtype=torch.float64)
for t in range(3):
    p, token_scale = quantize_groups(x[t][None], 8)
    for r in range(5):
        total = sum(a * b for a, b in zip(p[0].tolist(), layer.integers[r].tolist(), strict=True))  # fmt: skip
        found[t, r] = total * token_scale.item() * layer.scale[r].item()
confirm("the loop is the layer", torch.allclose(layer(x).double(), found, rtol=1e-6))
confirm("near what it was, but not equal", 1e-4 < (found - linear(x)).abs().max() < 0.1)
show(DynamicLinear)

# %% [markdown]
# The rows were looked at once. The tokens are new each time, and they have outliers that
# no row has. Here is the crest of all of SmolLM2's rows, and of all inputs to its
# layers while it reads a text:

# %%
text = """The llama is a domesticated South American animal, used as a meat and pack
animal by Andean cultures since before the arrival of the Spanish. Llamas are social
animals and live with others as a herd. Their wool is soft and contains only a small
amount of lanolin. Llamas can learn simple tasks after a few repetitions. When using a
pack, they can carry about 25 to 30 percent of their body weight for 8 to 13 kilometres.
The name llama was adopted by European settlers from native Peruvians. The ancestors of
llamas are thought to have originated on the Great Plains of North America about 40
million years ago, and migrated to South America about three million years ago."""
tokens = tokenizer.encode(text.replace("\n", " "))
print(tokens.shape[1], "tokens")
crests = figures.crest_data(real, tokens)

# %% mystnb={"image": {"alt": "Two histograms over the largest magnitude by the root mean square, on a logarithmic axis from 2 to 40. Rows of weights form a narrow peak at 3.4, which is 42 dB with 8 bits. Tokens spread widely from 4 to 24 with a median of 10.5, which is 32 dB, and a thin tail up to 39."}, "figure": {"name": "fig-quantizing-crest", "caption": "The crest of each row of weights in SmolLM2's blocks, and of each token that enters a layer. Twice the crest is a bit less."}} tags=["hide-input"]
figures.draw_crest(crests)

# %%
weights_crest, tokens_crest = crests.weights.median(), crests.tokens.median()
apart = 20 * torch.log10(tokens_crest / weights_crest).item()
print(f"median crest: rows {weights_crest:.1f}, tokens {tokens_crest:.1f}")
print(f"{apart:.0f} dB apart: {10 ** (apart / 10):.0f} times the noise")
confirm("about ten times the noise", 7 < 10 ** (apart / 10) < 13)

# %% [markdown]
# So the third answer can be foretold from {eq}`eq-quantizing-snr`: about ten times. Let
# us see.
#
# ## A whole model
#
# {py:func}`annotated_src.quantize.quantize_` swaps the linear layers, in place. It knows
# three schemes. `int8-weight-only` and `int4-grouped` put a `WeightOnlyLinear` in the
# place of each, with a scale for each row or for each 32 columns of it. `int8-dynamic`
# puts a `DynamicLinear`.

# %%
show(quantize_)
small = copy.deepcopy(real)
names = quantize_(small, "int8-weight-only", match=r"blocks\.0\.")
print(*names, sep="\n")

# %% [markdown]
# A tied head is the embedding, and stays in full; a head of its own is a linear layer,
# and is swapped. Everything is checked before anything is swapped, and a `match` that
# finds nothing is an error.
#
# How far is the rounded model from the model? A text tells little: at one near-tie it
# takes another turn, and all that follows differs. So both read the *same* text, and
# their scores are compared at each token. With $P$ the model's probabilities and $Q$
# the rounded one's,
#
# $$
# \mathrm{KL}(P \,\|\, Q) = \sum_v P_v \ln \frac{P_v}{Q_v}
# = \mathbb{E}_{v \sim P} \bigl[ -\ln Q_v \bigr] - \mathbb{E}_{v \sim P}
# \bigl[ -\ln P_v \bigr],
# $$ (eq-quantizing-kl)
#
# in nats: by how much a text of $P$'s own surprises $Q$ more than it surprises $P$.

# %%
# Check eq-quantizing-kl.
scores = torch.randn(2, 1, 1, 9, dtype=torch.float64)
P, Q = scores.softmax(-1)
ratio, surprises = (
    (P * (P / Q).log()).sum(),
    (-P * Q.log()).sum() - (-P * P.log()).sum(),
)
graded = grade(*scores)
confirm("both forms", torch.isclose(ratio, surprises))
confirm("and grade's", math.isclose(graded.mean_kl, ratio, rel_tol=1e-9))
same = grade(scores[0], scores[0])
confirm("0 for the same model", same == Grades(1.0, 0.0, 0.0))

# %% mystnb={"image": {"alt": "Mean KL, logarithmic from 0.003 to 1, against megabytes. A grey band up to 113 MB is the embedding, which is not quantised. At 220 MB int8 for weights only is at 0.003 and int8 for activations too at 0.03, ten times higher. int4 runs from 220 MB with groups of 8 at 0.23, over groups of 32 at 180 MB and 0.33, to whole rows at 167 MB and 0.78."}, "figure": {"name": "fig-quantizing-frontier", "caption": "SmolLM2-135M, quantised in six ways: what it takes, and how far it is from the model in full."}} tags=["hide-input"]
frontier = figures.frontier_data(real, tokens)
figures.draw_frontier(frontier)

# %%
print(f"{'in full':22} {frontier.full:4.0f} MB, perplexity {frontier.perplexity:.1f}")
for point in frontier.points:
    shown = f"KL {point.grades.mean_kl:<5.1g}"
    if point.kind == "int4":
        shown += f", perplexity {point.perplexity:.1f}"
    else:  # machines differ here: one activation at the edge of a step is enough
        small = point.perplexity < 1.1 * frontier.perplexity
        confirm("perplexity rises by less than a tenth", small)
    print(f"{point.kind}, {point.name:16} {point.megabytes:4.0f} MB, {shown}")
grades = {(point.kind, point.name): point for point in frontier.points}
weights_only, dynamic = (
    grades["int8", "weights only"],
    grades["int8", "activations too"],
)
fours = [p.grades.mean_kl for p in frontier.points if p.kind == "int4"]
rows = grades["int4", "whole rows"]
cost = dynamic.grades.mean_kl / weights_only.grades.mean_kl
grouped = grades["int4", "groups of 32"]
confirm("activations cost more than 5 times what weights do", cost > 5)
confirm("int8: of 10 best tokens 9 are the same", weights_only.grades.agreement > 0.9)
confirm("int4 in whole rows: not 7", rows.grades.agreement < 0.7)
blocks = grouped.megabytes - frontier.kept
confirm("the embedding is larger than the blocks in int4", frontier.kept > blocks)
confirm(
    "int4 is 50 to 200 times as far off as int8",
    50 < grouped.grades.mean_kl / weights_only.grades.mean_kl < 200,
)
confirm("KL rises with the size of the groups", fours == sorted(fours))
surprises = [p.perplexity for p in frontier.points if p.kind == "int4"]
confirm("perplexity does not", surprises != sorted(surprises))
confirm("int4: 3.0 times smaller", round(frontier.full / grouped.megabytes, 1) == 3.0)
eights = grades["int4", "groups of 8"]
confirm("groups of 8 are as large as int8", abs(eights.megabytes - weights_only.megabytes) < 1)  # fmt: skip
confirm(
    "and at least 30 times as far off",
    eights.grades.mean_kl > 30 * weights_only.grades.mean_kl,
)

# %% [markdown]
# - The third answer: the activations, about ten times, as their crest foretold.
# - The second: 3.0 times, not 8. The scales take a fifth of what is left of the blocks,
#   and the embedding, untouched, is more than all of that. A small model is mostly
#   vocabulary. (Converters for devices round the embedding too, {ref}`ch-exporting`:
#   a lookup does not care, and the tied head pays; see the exercises.)
# - Four bits are not half as good as eight: they cost a hundred times the KL. Each bit is
#   a quarter of the noise power, and $4^4 = 256$.
# - Smaller groups help, and soon cost more than they bring. With groups of 8 you pay for
#   eight bits and get four.
# - Perplexity would have groups of 32 better than groups of 8. It asks one
#   short text only what came; KL asks for every token that could have come. So grade by
#   KL.
#
# A larger model has a smaller share of embedding, if it has not Gemma's vocabulary of
# 256,000. Sizes need no weights; on the `meta` device there are only shapes:

# %%
with torch.device("meta"):
    models = {
        "TinyLlama 1.1B": lambda: Llama(TINYLLAMA_1_1B),
        "Gemma 2B": lambda: Gemma(GEMMA_2B),
        "Phi-2": lambda: Phi(PHI_2),
        "ChatGLM-6B": lambda: ChatGLM(SIX_B),
    }
    for name, make in models.items():
        plain = weight_bytes(make())
        ratios = []
        for scheme in ("int8-weight-only", "int4-grouped"):
            quantized = make()
            quantize_(quantized, scheme)
            ratios.append(plain / weight_bytes(quantized))
        print(f"{name:15} {plain / 1e9:5.1f} GB, int8 {ratios[0]:.1f} times smaller, int4 {ratios[1]:.1f}")  # fmt: skip
        confirm("never 4 and 8 times", ratios[0] < 4 and ratios[1] < 6.4)

# %% [markdown]
# ## The ladder of equality
#
# Loops = package, above. Now package = the library that one would use, torchao: the same
# integers, the same scales, bit for bit; and a rounded model of ours = our model with
# rounded weights.

# %%
import torchao.quantization as torchao

group = {"weight_dtype": torch.int4, "granularity": torchao.PerGroup(32)}
quiet = {"set_inductor_config": False}
configs = {
    "int8-weight-only": torchao.Int8WeightOnlyConfig(**quiet),
    "int8-dynamic": torchao.Int8DynamicActivationInt8WeightConfig(**quiet),
    "int4-grouped": torchao.IntxWeightOnlyConfig(**group),
}
x = torch.randn(4, 576)
for scheme, config in configs.items():
    ours = nn.Sequential(copy.deepcopy(real.blocks[3].ffn.up_proj))
    theirs = copy.deepcopy(ours)
    plain = ours(x)
    quantize_(ours, scheme)
    torchao.quantize_(theirs, config)
    layer, stored = ours[0], theirs[0].weight
    integers = unpack_int4(layer.integers) if layer.bits == 4 else layer.integers
    confirm(f"{scheme}: torchao's integers", torch.equal(integers, stored.qdata))
    confirm("its scales", torch.equal(layer.scale, stored.scale.view_as(layer.scale)))
    near = 1e-5 * plain.abs().max()
    confirm("its outputs", (ours(x) - theirs(x)).abs().max() < near)
    confirm("which are not the layer's", (ours(x) - plain).abs().max() > 10 * near)

by_hand = copy.deepcopy(real)
for part in by_hand.modules():
    if isinstance(part, nn.Linear):
        part.weight.data = dequantize_groups(*quantize_groups(part.weight, 4, 32))
quantize_(fours_model := copy.deepcopy(real), "int4-grouped")
few = tokens[:, :24]
logits = fours_model(few)
confirm("SmolLM2: swapped = rounded weights", torch.allclose(logits, by_hand(few), atol=1e-3))  # fmt: skip

# %% [markdown]
# Two things differ. For eight bits, torchao's scales stop at $1.2 \cdot 10^{-7}$, the
# `eps` of float32, and ours at the smallest float: a row whose largest weight is below
# $1.5 \cdot 10^{-5}$ keeps its levels here, and loses them there. And with int8 weights
# torchao scales the sums, where we scale the weights, so outputs differ in the last
# digits.
#
# :::{admonition} Paper and code
# :class: paper-code
# Dettmers et al. {cite:p}`dettmers2022` divide by the largest magnitude and multiply by
# 127, and so does ChatGLM: the integers run from $-127$ to $127$, and $-128$ is unused.
# torchao's `choose_qparams_affine` divides by 127.5, half the number of steps. With
# eight bits nobody will notice. With four it is 7 against 7.5: a step 7 % smaller, 0.6 dB
# less noise, a tenth of a bit for nothing. In short groups it is less: the largest weight
# is then exact with 7 and half a step off with 7.5, and of 32 weights it is one.
# :::

# %%
gains = {}
for size in (576, 32):
    groups = matrix.unflatten(1, (-1, size))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    narrow = ((groups / scale).round() * scale).flatten(1)
    wide = dequantize_groups(*quantize_groups(matrix, 4, size))
    gains[size] = (decibels(matrix, wide) - decibels(matrix, narrow)).item()
    print(f"four bits, groups of {size:3}: 7.5 gains {gains[size]:.1f} dB over 7")
confirm(
    "20 log10(7.5 / 7) in long rows", abs(gains[576] - 20 * math.log10(7.5 / 7)) < 0.1
)
confirm("less in short groups, but not nothing", 0.05 < gains[32] < 0.4)

# %% [markdown]
# ## The other road: a quantised graph
#
# There is another way to quantise, which the tools of devices grew up with: export the
# graph, let a *quantizer* mark it, run some data through it, convert. It is called PT2E
# (PyTorch 2 Export).
# It finds not only linear layers but whatever is in the graph, and the scales of the
# activations are *static*: written down once, from what was seen.

# %%
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch deprecates what torchao uses
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).eval()
    seen = torch.randn(64, 16)
    graph = torch.export.export(net, (seen,)).module()
    config = x86.get_default_x86_inductor_quantization_config()
    prepared = prepare_pt2e(graph, x86.X86InductorQuantizer().set_global(config))
    prepared(seen)  # calibration: observers note the range
    converted = convert_pt2e(prepared)

calls = [node.target.__name__ for node in converted.graph.nodes if node.op == "call_function"]  # fmt: skip
print(*(name for name in calls if "." in name), sep="\n")
integers, _ = quantize_groups(net[0].weight, 8)
confirm("its weights are our integers", torch.equal(dict(converted.named_buffers())["_frozen_param0"], integers))  # fmt: skip


# %%
def relative(net_like, x):
    return ((net_like(x) - net(x)).abs().max() / net(x).abs().max()).item()


quantize_(live := copy.deepcopy(net), "int8-dynamic")
for factor in (1, 100):
    errors = relative(converted, factor * seen), relative(live, factor * seen)
    print(
        f"inputs times {factor:3}: static {errors[0]:.0%} off, dynamic {errors[1]:.0%}"
    )
    confirm("dynamic does not mind", errors[1] < 0.03)
    confirm("static does" if factor > 1 else "nor does static", (errors[0] > 0.5) == (factor > 1))  # fmt: skip

# %% [markdown]
# For a network that sees pictures of one kind this is fine: nothing has to be measured
# at run time. A decoder's activations have no such range. In SmolLM2's block 11
# the first token's largest input to `down_proj` is over a hundred times any other
# token's (many heads look at the first token when
# they have nothing to look for {cite:p}`xiao2023`): a scale that holds for it
# leaves nothing of the rest.

# %%
given = {}
hook = real.get_submodule("blocks.11.ffn.down_proj").register_forward_pre_hook(
    lambda _part, inputs: given.update(x=inputs[0][0])
)
real(tokens)
hook.remove()
largest = given["x"].abs().amax(dim=-1)
print(
    f"first token {round(largest[0].item(), -2):,.0f}, all others at most {largest[1:].max():.0f}"
)
one_scale = (given["x"] / (largest[0] / 127.5)).round()[1:]
print(f"with its scale, {(one_scale == 0).float().mean():.1%} of all others become 0")
confirm("over a hundred times", largest[0] > 100 * largest[1:].max())
confirm("and nearly nothing is left", (one_scale == 0).float().mean() > 0.999)

# %% [markdown]
# So for generative models: weights by `quantize_`, activations per token or not at all.
# litert-torch, which {ref}`ch-exporting` uses, has both roads too: a `PT2EQuantizer` for
# graphs, and for language models the recipes of `generative/quantize`: dynamic, weights
# only, or half, none of them static. Such a recipe rounds the finished file, not our
# layers. The idea is the same, its integers are not quite: the file's scale is the
# largest magnitude by 127, and the embedding is rounded too.
#
# :::{admonition} Break it
# :class: break-it
# A byte holds two integers. ChatGLM puts the even column into the high half, we into
# the low one. Unpack one way what was packed the other way. Every count, every sum of
# integers, every scale is right. What does the model say?
# :::

# %%
swapped = copy.deepcopy(fours_model)
for part in swapped.modules():
    if isinstance(part, WeightOnlyLinear):
        part.integers = (part.integers << 4) | (part.integers >> 4)
a, b = (model.blocks[3].ffn.up_proj for model in (fours_model, swapped))
a, b = unpack_int4(a.integers), unpack_int4(b.integers)
confirm("the same integers in each row", torch.equal(a.sort(dim=1).values, b.sort(dim=1).values))  # fmt: skip
reference = real(few)
for name, model in (("right", fours_model), ("swapped", swapped)):
    found = model(few)
    graded, ppl = grade(reference, found), text_perplexity(found, few)
    print(f"{name:8} KL {graded.mean_kl:5.1f}, perplexity above 1,000: {ppl > 1000}")
    confirm("as before" if name == "right" else "noise", (graded.mean_kl > 3) == (name != "right"))  # fmt: skip

# %% [markdown]
# Histograms do not see it, sizes do not see it, one output does. When you read somebody
# else's integers, multiply something.
#
# ## Exercises
#
# Write your function in a cell of your own and give it to `check`. A question takes its
# name and a letter: `check("what_an_offset_buys", "a")`.

# %%
from annotated_src.exercises import check  # noqa: F401 - for your cells
from annotated_src.exercises.quantizing import chapter as exercises

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("round_rows")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("round_rows")

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("round_groups")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("round_groups")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
integers, scale = exercises["round_groups"].solution(matrix, 32)
lost = decibels(matrix, wide) - decibels(
    matrix, dequantize_groups(integers, scale.float())
)
stored = pack_int4(integers).nbytes + scale.nbytes
print(f"{8 * stored / matrix.numel()} bits a weight")
confirm("scales in half cost less than 0.01 dB", abs(lost) < 0.01)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("read_int4")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("read_int4")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
packed = pack_int4(integers)
again = exercises["read_int4"].solution(packed, scale)
confirm(
    "read_int4 = unpack and dequantise",
    torch.equal(again, dequantize_groups(unpack_int4(packed), scale.float())),
)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("what_an_offset_buys")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("what_an_offset_buys")


# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
def asymmetric(weight, group_size):
    """Levels from the smallest to the largest, 0 among them: s (q - z)."""
    parts = weight.unflatten(1, (-1, group_size))
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / 15
    zero = (-low / scale).round()  # of four bits, too
    integers = ((parts / scale).round() + zero).clamp(0, 15)
    return (scale * (integers - zero)).flatten(1)


def gain(weight, size):
    symmetric = dequantize_groups(*quantize_groups(weight, 4, size))
    return decibels(weight, asymmetric(weight, size)) - decibels(weight, symmetric)


for size in (32, 576):
    gains[size] = gain(matrix, size)
    print(f"groups of {size:3}: {gains[size]:.1f} dB for {4 / size:.3f} bits a weight")
    fresh = gain(torch.randn(1536, 576), size)
    confirm("nearly so for weights never rounded", abs(fresh - gains[size]) < 0.3)
confirm("more in small groups", gains[32] > gains[576] > 0)
# The file's Q4_1 has an offset too. It keeps the smallest weight itself, not an integer
# z; so these levels are not the file's, and random weights gain as much.

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("what_int8_leaves")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("what_int8_leaves")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
everything = copy.deepcopy(real)
quantize_(everything, "int8-weight-only")
table, before = everything.embedding.weight, weight_bytes(everything)
integers, scale = quantize_groups(table, 8)
size = before - table.nbytes + integers.nbytes + scale.nbytes
table.copy_(dequantize_groups(integers, scale))
both = grade(real(tokens), everything(tokens)).mean_kl
for kept in (before, size):
    print(f"{kept / 1e6:.0f} MB, {frontier.full * 1e6 / kept:.1f} times smaller")
confirm("more than half of it was the embedding", table.nbytes > before / 2)
confirm("KL below that of int8-dynamic", both < dynamic.grades.mean_kl)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("dynamic_product")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("dynamic_product")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
colleague, mended = (
    exercises["dynamic_product"].given,
    exercises["dynamic_product"].solution,
)
down = real.get_submodule("blocks.11.ffn.down_proj")
layer, x = DynamicLinear(down), given["x"]
stored, expected = (layer.integers, layer.scale), down(x)[1:]
alone = torch.cat([colleague(token[None], *stored) for token in x[1:]])
for name, found in (
    ("mended", mended(x, *stored)[1:]),
    ("his, one token at a time", alone),
    ("his, all at once", colleague(x, *stored)[1:]),
):
    print(f"{name:25} {decibels(expected, found):6.1f} dB")
confirm("mended it is DynamicLinear", decibels(layer(x), mended(x, *stored)) > 40)
confirm("alone his is, too", decibels(layer(x)[1:], alone) > 40)
together = decibels(expected, colleague(x, *stored)[1:])
confirm("together the first token drowns the rest", together < 1)

# %% [markdown]
# ## What to remember
#
# - To quantise is to choose a step and to count. The error is at most half a step, and
#   $s^2/12$ on average.
# - A bit is 6 dB. A crest twice as large costs a bit. One outlier sets the scale for all
#   that share it.
# - Groups lock outliers in; their scales are part of the size.
# - Activations stand out more than weights. Round them for each token, never for the
#   batch.
# - What is not quantised, the embedding of a small model, is soon most of the file.
# - Grade by KL and agreement on one text, not by what the model writes.
#
# **Where to read on.** torchao: `quantization/quant_api.py`, `quantize_` and the configs;
# `quant_primitives.py`, `choose_qparams_affine`; `pt2e/quantize_pt2e.py`, `prepare_pt2e`.
# LLM.int8() {cite:p}`dettmers2022` keeps the features with outliers in half; SmoothQuant
# {cite:p}`xiao2022` moves them into the weights; GPTQ {cite:p}`frantar2022` and AWQ
# {cite:p}`lin2023` round the weights with the data in view. Next, {ref}`ch-exporting`
# makes one file of all this.
