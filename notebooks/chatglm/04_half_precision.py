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
# (ch-half-precision)=
# # Attention in half precision
#
# :::{admonition} In this chapter
# :class: at-a-glance
# **40 minutes · moderate.** Afterwards you can say where float16 ends and how coarse it
# is, explain every rounding in ChatGLM-6B's `attention_fn`, and tell why it hides a
# score with $-10000$ and not with $-\infty$.
# :::

# %% tags=["remove-input"]
from annotated_src.figures.model_map import ChatGLMMap

ChatGLMMap("scores")

# %% [markdown]
# :::{admonition} Predict before you run
# :class: predict
# Layer 28 of ChatGLM-6B divides its queries by 28, computes scores in float16, and
# multiplies the scores by 28 again. Layer 1 divides by 1. Scores near 3000 come out in
# steps. Are the steps of layer 28 finer than those of layer 1, coarser, or about the
# same?
# :::

# %%
import math
from functools import partial
from unittest.mock import patch

import torch
from torch.nn import functional as F

from annotated_src import attention_by_layer
from annotated_src.attention import attend, attend_fused
from annotated_src.attention_by_layer import (
    HIDDEN_SCORE,
    attend_by_layer,
    restore_scores,
    scores_by_layer,
)
from annotated_src.figures import half_precision as figures
from annotated_src.golden import golden, golden_config, golden_model
from annotated_src.masks import causal_mask, hide_padding
from annotated_src.models.chatglm import ChatGLM, ChatGLMConfig
from annotated_src.sampling import greedy, guard_invalid
from annotated_src.show import confirm, show

torch.manual_seed(0)
F16, F64 = torch.float16, torch.float64
close = partial(torch.allclose, rtol=0, atol=1e-5)

# %% [markdown]
# ## The same attention in an odd order
#
# At four bytes a number, 6 billion parameters take 24 GB; at two, 12. So ChatGLM-6B is
# published in float16 and runs in it. Its attention ({ref}`ch-attention`) takes more
# steps than Llama's, in an order that looks odd. Here it is for one query of layer $l$
# (counted from 1), as plain loops. `half` marks each place where a number is rounded to
# float16.


# %%
def half(number):
    return torch.tensor(number).half().item()


def attend_loops(query, keys, values, visible, layer):
    """One query; also returns what each step made."""
    divided = [half(q / (math.sqrt(len(query)) * layer)) for q in query]
    scores = [
        half(sum(q * k for q, k in zip(divided, key, strict=True))) for key in keys
    ]
    filled = [
        score if see else -10000.0 for score, see in zip(scores, visible, strict=True)
    ]
    restored = [score * layer for score in filled]  # in float32
    powers = [math.exp(score - max(restored)) for score in restored]
    weights = [half(power / sum(powers)) for power in powers]
    output = [
        half(sum(w * value[i] for w, value in zip(weights, values, strict=True)))
        for i in range(len(values[0]))
    ]
    return output, {
        "score": scores,
        "filled": filled,
        "restored": restored,
        "weight": weights,
    }


query = [6.0, 12.0, -6.0, 6.0]
keys = [[1.0, 0, 0, 0], [1.0, 1.0, 0, 0], [0.5, 1.0, 0, 0], [0, 1.0, 1.0, 1.0]]
values = [[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]

rows = {"a token": [False, True, True, True], "padding": [False] * 4}
outputs = []
for name, visible in rows.items():
    output, steps = attend_loops(query, keys, values, visible, layer=3)
    outputs.append(output)
    print(f"layer 3, {name}: it sees keys {[s for s in range(4) if visible[s]]}")
    print("key    " + "".join(f"{step:>10}" for step in steps))
    for s in range(4):
        print(
            f"{s:3}    "
            + "".join(f"{round(column[s], 3):10g}" for column in steps.values())
        )
    print()

# %% [markdown]
# The query was divided by $\sqrt 4 \cdot 3 = 6$ *before* it met the keys. Hidden scores
# were filled with $-10000$. Then everything was multiplied by 3, the fill as well: what
# the softmax saw was $-30000$. And padding, which sees nothing, averages everybody.
#
# The package does this for all rows and heads at once.

# %%
show(scores_by_layer, restore_scores, attend_by_layer)

# %%
packed = [torch.tensor(x, dtype=F16) for x in ([query] * 2, keys, values)]
q, k, v = (x[None, None] for x in packed)
visible = torch.tensor(list(rows.values()))[None, None]
answer = attend_by_layer(q, k, F.pad(v, (0, 2)), visible, 3)[0, 0, :, :2]
confirm(
    "loops = package, in float16",
    torch.allclose(answer, torch.tensor(outputs).half(), rtol=2e-3, atol=0),
)

# %% [markdown]
# Why each of these steps? First, what float16 can hold.
#
# ## Where float16 ends, and how coarse it is
#
# A float16 number has one bit for the sign, five for an exponent $e$ and ten for $m$,
# from 0 to 1023. Its size is
#
# $$
# x = \begin{cases} (1024 + m) \cdot 2^{e - 25} & 1 \le e \le 30 \\
# m \cdot 2^{-24} & e = 0, \end{cases}
# $$ (eq-half-number)
#
# and $e = 31$ is kept for $\infty$ and NaN. The largest is $2047 \cdot 2^{5} = 65504$.
# Neighbours are $2^{e-25}$ apart: between 1 and 2 that is about 0.001, between 2048 and
# 4096 it is 2. The numbers with $e = 0$, called *subnormal*, keep the last step, $2^{-24}$,
# down to zero. There are so few float16 numbers that you can look at all.

# %%
# Check eq-half-number.
every = torch.arange(31 * 1024, dtype=torch.int16).view(F16).double()  # from bits
e, m = torch.arange(31 * 1024).div(1024, rounding_mode="floor"), torch.arange(1024)
m = m.repeat(31)
formula = torch.where(e > 0, (1024 + m) * 2.0 ** (e - 25), m * 2.0**-24)
confirm("the formula gives all 31744 of them", torch.equal(every, formula))
print("largest", every.max().item())
for number in (1, 10, 1000, 3000, 10_000):
    here = torch.searchsorted(every, float(number))
    print(f"after {number:6} comes {every[here + 1].item():.8g}")

# %% [markdown]
# ## What overflows
#
# If no entry of a query or a key is larger than $a$, a sum of $d$ products reaches
# $d\,a^2$ at most, and does when signs agree. The order of the steps decides which
# number has to fit below 65504:
#
# $$
# \underbrace{d\,a^2}_{\text{product, then root}} \qquad
# \underbrace{\sqrt d\,a^2}_{\text{root, then product}} \qquad
# \underbrace{\sqrt d\,a^2 / l}_{\text{root and layer, then product}}
# $$ (eq-half-reach)
#
# ChatGLM-6B has heads of $d = 128$. What {py:func}`annotated_src.attention.attend`
# computes is the first of these: it divides the product.

# %%
# Check eq-half-reach.
d = 128
orders = {  # how to compute it, and the factor of a * a
    "product, then root": (lambda x, layer: x @ x.mT / math.sqrt(d), lambda layer: d),
    "root, then product": (
        lambda x, layer: (x / math.sqrt(d)) @ x.mT,
        lambda layer: math.sqrt(d),
    ),
    "root and layer": (
        lambda x, layer: scores_by_layer(x, x, layer),
        lambda layer: math.sqrt(d) / layer,
    ),
}
signs = torch.randint(0, 2, (1, 1, 8, d)).double() * 2 - 1
for name, (compute, factor) in orders.items():
    for layer in (1, 28):
        a = math.sqrt(65504 / factor(layer))
        below, above = (compute((r * a * signs).half(), layer) for r in (0.99, 1.01))
        confirm(
            f"{name}, layer {layer:2}: entries up to {a:5.1f}",
            below.isfinite().all() and above.isinf().any(),
        )

x = torch.full((1, 1, 4, d), 24.0, dtype=F16)
confirm(
    "entries of 24: attend gives NaN", attend(x, x, x, causal_mask(4)).isnan().all()
)
confirm(
    "attend_by_layer does not, in layer 1 as in 28",
    all(torch.equal(attend_by_layer(x, x, x, causal_mask(4), n), x) for n in (1, 28)),
)

# %% [markdown]
# Dividing first by the root gains a factor $\sqrt{128} \approx 11$ in the score, in
# every layer. Dividing by the layer's number gains another $l$: nothing in layer 1, 28
# times in the last.
#
# That is the right divisor if scores grow with depth as $l$ does. Suppose they do, by
# 3000 each layer, and find the first layer that overflows:

# %%
print("first layer of 28 with an infinite score")
for name, (compute, _) in orders.items():
    broken = []
    for layer in range(1, 29):
        size = math.sqrt(3000 * layer / math.sqrt(d))  # the largest score: 3000 l
        broken += [layer] * compute((size * signs).half(), layer).isinf().any().item()
    print(f"{name:20}{broken[0] if broken else 'none':>6}")

# %% [markdown]
# Nothing forces a model's scores to grow like that: a LayerNorm stands before each
# layer's queries and keys, and the weights decide. The trick is inherited. Megatron-LM
# has it as `apply_query_key_layer_scaling`, there as a factor of the product and not of
# the query. NVIDIA's Transformer Engine does it on request only, since July 2023: some
# models diverged when it was on by default (pull request 339).
#
# Only the *result* overflows here. While torch adds up a product on a CPU, it keeps the
# sum in float32:

# %%
large = torch.full((1, 1, 1, d), 300.0, dtype=F16)
half_negative = torch.cat((large[..., :64], -large[..., 64:]), dim=-1)
products = large * half_negative  # each one is 90000, or -90000
confirm("every product alone overflows", products.isinf().all())
confirm("yet their sum is 0", (large @ half_negative.mT == 0).all())

# %% [markdown]
# And what does an overflow do? It depends on the sign. A score of $+\infty$ ruins its
# row, since the softmax subtracts the maximum, and $\infty - \infty$ is NaN. A score of
# $-\infty$ is a weight of 0, in silence.

# %%
up = torch.tensor([1.0, torch.inf, 2.0]).softmax(dim=0)
down = torch.tensor([1.0, -torch.inf, 2.0]).softmax(dim=0)
confirm("one +inf: the row is NaN", up.isnan().all())
confirm(
    "one -inf: weight 0, the row goes on",
    down[1] == 0 and close(down.sum(), torch.tensor(1.0)),
)

# %% [markdown]
# ## Divide by the layer, multiply by the layer
#
# In exact arithmetic the number cancels, whatever it is:
#
# $$
# \operatorname{softmax}_s\!\left( l \cdot \Bigl(\frac{q}{\sqrt d\; l} \cdot k_s \Bigr)\right)
# = \operatorname{softmax}_s\!\left(\frac{q \cdot k_s}{\sqrt d}\right).
# $$ (eq-half-identity)

# %%
# Check eq-half-identity.
q, k, v = torch.randn(3, 2, 3, 7, 16, dtype=F64)
plain = (q @ k.mT / 4).softmax(dim=-1)
for layer in (1, 2, 7, 28, 1000):
    there_and_back = (layer * (q / (4 * layer) @ k.mT)).softmax(dim=-1)
    confirm(f"layer {layer:4}: the same weights", torch.allclose(there_and_back, plain))

# %% [markdown]
# In float16 the quotient is rounded, and multiplying by $l$ makes the error $l$ times
# as large. Rounding to the nearest errs by half a step. Where numbers are not
# subnormal, a step is at most $2^{-10}$ of the number. So
#
# $$
# \bigl|\, l \cdot \operatorname{half}(x / l) - x \,\bigr| \;\le\;
# \max\bigl(2^{-11}\,|x|,\; 2^{-25}\, l\bigr) \qquad \text{for } |x| \le 65504\, l .
# $$ (eq-half-rounding)
#
# The first bound knows nothing of $l$: a floating point moves along with the number.
# The second is for quotients that end up subnormal. Try all float16 numbers, and random
# ones up to the end of the range, in all 28 layers:


# %%
# Check eq-half-rounding.
def error_and_bound(x, layer):
    error = (layer * (x / layer).half().double() - x).abs()
    return error, torch.maximum(2.0**-11 * x, torch.tensor(2.0**-25 * layer))


holds, worst, exact = [], [], []
random_sizes = (65504 * 2 ** (-45 * torch.rand(30_000))).double()
for layer in range(1, 29):
    error, bound = error_and_bound(layer * random_sizes, layer)
    holds.append((error <= bound).all().item())
    error, bound = error_and_bound(every, layer)
    holds.append((error <= bound).all().item())
    normal = every > layer * 2.0**-13
    worst.append((error[normal] / every[normal]).max().item() * 2**11)
    if (error[normal] == 0).all():
        exact.append(layer)
confirm("the bound holds in all layers", all(holds))
print("no error at all, but for subnormals:", exact)
print(f"layer 7: at worst {worst[6]:.2f} of the first bound, layer 27: {worst[26]:.2f}")

# %% mystnb={"image": {"alt": "A chart with logarithmic axes: the gap to the next score, against the score. Three staircases climb on top of each other, from a score of 0.002 with a gap of 0.000002 to a score of 3000 with a gap of 2. They differ at the ends. Left, at tiny scores, layer 28 levels out at a gap of 0.0000017, layer 1 at 0.00000006. Right, product then root ends at 5790, layer 1 at 65504, layer 28 at 1.8 million, where the gap is 896. A dashed line marks a gap of 1, crossed at scores near 1000."}, "figure": {"name": "fig-half-gaps", "caption": "How far it is from a score to the next one that float16 can tell from it, heads of 128. Dividing by the layer lengthens the staircase at the top and takes away steps at the bottom. In between it changes the steps by less than a factor of 2."}} tags=["hide-input"]
gaps = figures.gaps_data()
figures.draw_gaps(gaps)

# %%
at_3000 = (gaps.scores - 3000).abs().argmin()
steps = {name: gap[at_3000].item() for name, gap in gaps.gaps.items()}
print(f"steps near 3000: layer 1 {steps['layer 1']}, layer 28 {steps['layer 28']}")
print("two scores, 3000 and 3001, and their weights")
scores = torch.tensor([[[[3000.0, 3001.0]]]])
everything = torch.ones(1, 1, 1, 2, dtype=torch.bool)
print("exact   ", scores.softmax(dim=-1).flatten().numpy().round(2))
for layer in (1, 28):
    weights = restore_scores((scores / layer).half(), everything, layer).softmax(dim=-1)
    print(f"layer {layer:2}", weights.flatten().numpy().round(2))
between = (gaps.scores > 0.002) & (gaps.scores < 65504)
ratio = (gaps.gaps["layer 28"] / gaps.gaps["layer 1"])[between]
confirm(
    "from 0.002 to 65504 the steps differ by less than 2",
    0.5 < ratio.min() < ratio.max() < 2,
)

# %% [markdown]
# That answers the prediction: about the same, 1.75 and 2. **Dividing buys range, not
# precision** ({numref}`fig-half-gaps`). At 3000, two scores that are 1 apart come out
# equal in layer 1 and 1.75 apart in layer 28, and no weight is right. Long before
# scores overflow, they blur.
#
# At the bottom it costs precision, where nobody misses it. By {eq}`eq-half-rounding` a
# small score of layer 28 moves by $28 \cdot 2^{-25} < 10^{-6}$ at most. That changes a
# weight by about as small a fraction, and float16 weights are rounded far more coarsely
# right after.

# %%
tiny = 1e-5 * torch.randn(1, 1, 50, 8)
seen = torch.ones(1, 1, 1, 8, dtype=torch.bool)
stored = (tiny / 28).half()
relative = ((28 * stored.float() - tiny).abs() / tiny.abs()).median()
confirm("scores near 0.00001: half of them are off by more than 3%", relative > 0.03)
weights = restore_scores(stored, seen, 28).softmax(dim=-1)
confirm(
    "the weights: by less than 0.0002%",
    (weights / tiny.softmax(dim=-1) - 1).abs().max() < 2e-6,
)

# %% [markdown]
# ## A fill that is multiplied, too
#
# Hidden scores are filled *before* the multiplication. So the softmax of layer $l$ does
# not see $-10000$, it sees $-10000\,l$, down to $-280000$ in the last. Float16 has no
# such number. The step before makes room for it: `.float()`.

# %%
nothing = torch.zeros(1, 1, 1, 2, dtype=torch.bool)
one_score = torch.zeros(1, 1, 1, 2, dtype=F16)
fills = [
    restore_scores(one_score, nothing, layer)[0, 0, 0, 0].item() for layer in (1, 7, 28)
]
print("layers 1, 7 and 28 see", fills)
confirm("-10000 is a float16 number", torch.tensor(HIDDEN_SCORE).half() == HIDDEN_SCORE)
confirm("-280000 is none, only -inf", torch.tensor(fills[2]).half() == -torch.inf)

# %% [markdown]
# Is it low enough? Let $c$ be the fill and $b$ the best visible score of a row. A
# hidden key's power is $e^{lc}$, and the sum of powers is at least $e^b$:
#
# $$
# w_{\text{hidden}} \;\le\; e^{\,l c \,-\, b} .
# $$ (eq-half-fill)
#
# In float32 this is an exact 0 once the exponent is below $-104$, for $e^{-104}$ is
# less than half its smallest number, $2^{-149}$. With $c = -10000$ the best score of a
# row in layer 1 would have to be below $-9896$ for anything to leak. Smaller fills leak
# sooner:

# %%
# Check eq-half-fill.
print("  fill   layer   best visible   hidden weight")
for fill, layer, best in (
    (-20, 1, -4),
    (-20, 1, -25),
    (-20, 28, -25),
    (-100, 1, -25),
    (-100, 1, -110),
    (-10_000, 1, -110),
    (-10_000, 1, -12_000),
    (-10_000, 28, -12_000),
):
    pair = torch.tensor([[[[best / layer, 0.0]]]]).half()
    sees = torch.tensor([[[[True, False]]]])
    with patch.object(attention_by_layer, "HIDDEN_SCORE", float(fill)):
        restored = restore_scores(pair, sees, layer)
    hidden = restored.softmax(dim=-1)[..., 1].item()
    print(f"{fill:6} {layer:7} {best:14} {hidden:15.2g}")

scores = 30 * torch.randn(1000, 8, dtype=F64)
for fill, layer in ((-20.0, 1), (-20.0, 3), (-100.0, 1)):
    filled = torch.cat((scores, torch.full((1000, 1), layer * fill, dtype=F64)), dim=1)
    hidden = filled.softmax(dim=1)[:, -1]
    bound = (layer * fill - scores.amax(dim=1)).exp() * (1 + 1e-9)
    confirm(f"fill {fill:.0f}, layer {layer}: the bound holds", (hidden <= bound).all())
confirm("float32: exp(-105) is 0", torch.tensor(-105.0).exp() == 0)

# %% [markdown]
# The last but one line is no misprint. Nothing forbids a row whose best score is
# $-12000$; float16 can hold it, and in layer 1 the hidden key then takes everything.
# The fill is safe as long as scores stay away from there, not by construction. Mind the
# third line, too: with depth even $-20$ turns into a fill that hides.
#
# ## Why not minus infinity
#
# $-\infty$ would be safe by construction, and {ref}`ch-attention` uses it. But a row
# that sees nothing then has no maximum to subtract. With $S$ equal scores,
#
# $$
# w_s = \frac{e^{c - c}}{\sum_{r=1}^{S} e^{c - c}} = \frac 1 S
# \quad\text{for every finite } c, \qquad
# (-\infty) - (-\infty) = \text{NaN} .
# $$ (eq-half-empty)

# %%
# Check eq-half-empty.
for c in (0.0, -20.0, -10_000.0, -280_000.0):
    weights = torch.full((6,), c, dtype=F64).softmax(dim=0)
    confirm(
        f"all scores {c:.0f}: 1/6 each",
        torch.allclose(weights, torch.tensor(1 / 6).double()),
    )
lowest = torch.full((6,), -torch.inf, dtype=F64)
confirm("-inf minus -inf is NaN", (lowest - lowest.max()).isnan().all())
confirm("so are the weights", lowest.softmax(dim=0).isnan().all())

# %% mystnb={"image": {"alt": "Six bar charts of the softmax weights of six keys, two of padding and four of tokens. Upper row, a token's row with visible scores from -26 to -24: with a fill of -20 the two hidden keys take 0.49 each, with -10000 and with minus infinity they take nothing and the four tokens share the weight. Lower row, padding's row, which sees nothing: with -20 and with -10000 all six keys get one sixth, with minus infinity it says NaN."}, "figure": {"name": "fig-half-fills", "caption": "Weights of a row that sees four keys (blue) and of one that sees none, by what hidden scores (orange, hatched) are filled with. Only the middle column is right above and finite below."}} tags=["hide-input"]
fill_data = figures.fills_data()
figures.draw_fills(fill_data)

# %%
token, padding = fill_data.weights
print("hidden keys of the token's row take", token[:, :2].sum(dim=1).numpy().round(2))
confirm(
    "-10000 equals minus infinity where a row sees anything",
    torch.equal(token[1], token[2]),
)
confirm(
    "only minus infinity gives NaN",
    padding.isnan().all(dim=1).tolist() == [False, False, True],
)

# %% [markdown]
# The lower row of {numref}`fig-half-fills` is no invention. ChatGLM's tokenizer pads on
# the left, and its mask takes padding out in both directions: it is not seen, and sees
# nothing.

# %%
is_token = torch.tensor([[False, False, True, True, True]])
print(hide_padding(causal_mask(5), is_token)[0, 0].int())

# %% [markdown]
# (In {ref}`ch-attention` each padding saw itself, so no row was empty.)
#
# Nobody looks at padding, so why care about NaN in its rows? Because of one product.
# Load the small model that the original's golden tensors come from, a batch in which
# row 0 is full and rows 1 and 2 begin with padding, and swap the fill.

# %%
settings = golden_config()
given = golden("ids")
tokens = given["batch_leftpad/input_ids"]
stand = given["batch_leftpad/tokenizer_position_ids"]
see = ~given["batch_leftpad/tokenizer_attention_mask"]  # there True hides


def run(model):
    return model(tokens, positions=stand, mask=see)


is_token = tokens != settings["pad_token_id"]
model = golden_model(torch.float32)
logits = run(model)
with patch.object(attention_by_layer, "HIDDEN_SCORE", -torch.inf):
    broken = run(model)
print("1: a token    1: its logits are NaN, with a fill of -inf")
for row in range(3):
    nan = broken[row].isnan().any(dim=-1)
    print(*is_token[row].int().tolist(), "  ", *nan.int().tolist())
confirm("with -10000 all logits are finite", logits.isfinite().all())

# %% [markdown]
# Every token of a padded row, not its padding alone. The first layer makes NaN of the
# padding's outputs. In the second layer they are *values*, and a token gives them
# weight 0. But $0 \cdot \text{NaN}$ is NaN, and the sum takes it in. One layer is
# enough to make it, one more to spread it:

# %%
wrong = {}
for num_layers in (1, 2):
    deep = ChatGLM(ChatGLMConfig.from_hf({**settings, "num_layers": num_layers}))
    deep = deep.requires_grad_(False)
    with patch.object(attention_by_layer, "HIDDEN_SCORE", -torch.inf):
        wrong[num_layers] = run(deep).isnan().any(dim=-1)
confirm(
    "after 1 layer: NaN at padding, and nowhere else", torch.equal(wrong[1], ~is_token)
)
confirm(
    "after 2: in all of each padded row",
    wrong[2].all(dim=1).tolist() == [False, True, True],
)

# %% [markdown]
# The original's generation then makes it worse. `InvalidScoreLogitsProcessor` replaces
# broken logits, those of the whole batch: every row says token 5, the healthy one too.

# %%
said = [greedy(guard_invalid(x[:, -1])).tolist() for x in (logits, broken)]
confirm("row 0 itself is healthy", broken[0].isfinite().all())
confirm("and yet says 5, as all do", said[1] == [5, 5, 5] and said[0][0] != 5)

# %% [markdown]
# With $-10000$ padding becomes the mean of everything, which is nonsense but finite,
# and weight 0 makes a true zero of it.
#
# ## The ladder of equality
#
# In float32 the odd order must be plain attention, for any layer.

# %%
q, k, v = torch.randn(3, 2, 3, 7, 16)
mask = causal_mask(7)
for layer in (1, 5, 28):
    ours = attend_by_layer(q, k, v, mask, layer)
    confirm(f"layer {layer:2}: = attend", close(ours, attend(q, k, v, mask)))
fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)
confirm("= F.scaled_dot_product_attention", close(ours, fused))

# %% [markdown]
# Now the original's `attention_fn`. You have met all of its steps but two:
#
# | `attention_fn` | what it does |
# |---|---|
# | `query_key_layer_scaling_coeff` | $l$; `layer_id` counts from 0 |
# | `query_layer / (math.sqrt(…) * …)` | root and layer, before the product |
# | `torch.empty`, `torch.baddbmm(…, beta=0.0)` | the product, with no sum around it |
# | `if not (attention_mask == 0).all()` | no fill when nothing is hidden |
# | `masked_fill_(attention_mask, -10000.0)` | True hides there |
# | `.float()`, `* query_key_layer_scaling_coeff` | to float32, then times $l$ |
# | `.type(dtype)`, `torch.bmm` | weights back to float16, the mean of the values |
#
# `baddbmm` adds `beta` times its first argument to a product. That argument is memory
# nobody has filled, and may hold anything. With `beta` 0 torch does not even read it:

# %%
anything = torch.full((6, 7, 7), torch.nan)
q, k = torch.randn(2, 6, 7, 16)
product = torch.baddbmm(anything, q, k.mT, beta=0.0, alpha=1.0)
confirm("baddbmm with beta 0 is the product", close(product, q @ k.mT))

# %% [markdown]
# So all of it can be compared, step by step and in both precisions. The original's
# tensors are `(seq, batch, heads, head_dim)`. The case `layer2_noscale` calls it with
# `scaling_attention_score=False`. You might read this as *no scaling*. The query is not
# divided, but the scores are multiplied by the layer's number all the same: three times
# $q \cdot k$. Undo our division, and you have it.

# %%
cases = {  # the original's case: our layer, what its query is multiplied by first
    "layer0_nomask": (1, 1),
    "layer0_mask": (1, 1),
    "layer27_mask": (28, 1),
    "layer2_past": (3, 1),
    "layer2_noscale": (3, 3 * math.sqrt(16)),
}
for precision, near in (("fp32", (5e-5, 1e-5)), ("fp16", (1e-2, 1e-3))):
    tensors = golden(f"components_{precision}")
    given_to = {
        name: tensors[f"attention_fn/{name}"].permute(1, 2, 0, 3)  # (B, N, T, H)
        for name in ("q", "k", "v", "past_k", "past_v")
    }
    seen = ~tensors["attention_fn/mask"]  # there True hides
    for case, (layer, factor) in cases.items():
        q, k, v = given_to["q"] * factor, given_to["k"], given_to["v"]
        mask = torch.ones_like(seen) if case == "layer0_nomask" else seen
        if case == "layer2_past":
            k = torch.cat((given_to["past_k"], k), dim=2)
            v = torch.cat((given_to["past_v"], v), dim=2)
            mask = F.pad(seen, (3, 0), value=True)
        scores = scores_by_layer(q, k, layer)
        restored = restore_scores(scores, mask, layer)
        context = attend_by_layer(q, k, v, mask, layer)
        ours = {
            "raw_scores": scores.flatten(0, 1),
            "softmax_in": restored,
            "probs": restored.softmax(dim=-1).type_as(v).flatten(0, 1),
            "context": context.permute(2, 0, 1, 3).flatten(2),
        }
        same = [
            x.dtype == theirs.dtype
            and torch.allclose(x, theirs, atol=near[0], rtol=near[1])
            for name, x in ours.items()
            for theirs in [tensors[f"attention_fn/{case}/{name}"]]
        ]
        confirm(
            f"{precision} {case}: scores, softmax input, weights, context", all(same)
        )

fill = golden("components_fp16")["attention_fn/layer27_mask/softmax_in"].min()
confirm("the original's softmax in its last layer sees -280000", fill == -280_000)

# %% [markdown]
# And the whole model on the padded batch. float16 gets a wider tolerance: sums in
# another order round to other neighbours, and layers add that up.

# %%
for dtype, precision, atol in ((torch.float32, "fp32", 1e-4), (F16, "fp16", 6e-2)):
    expected = golden(f"model_{precision}")["batch_leftpad_tokenizer/logits"]
    ours = run(golden_model(dtype))
    confirm(
        f"{precision}: ChatGLM = the original, padding included",
        ours.dtype == dtype and torch.allclose(ours, expected, rtol=0, atol=atol),
    )

# %% [markdown]
# :::{admonition} Paper and code
# :class: paper-code
# CogView, from the same group, met the same overflow and called its remedy
# *precision-bottleneck relaxation*, PB-relax {cite:p}`ding2021`. It divides by a
# constant $\alpha$ and takes the maximum off *before* it multiplies back:
#
# $$
# \operatorname{softmax}(x) =
# \operatorname{softmax}\!\left(\alpha \Bigl(\frac{x}{\alpha} - \max_j \frac{x_j}{\alpha}\Bigr)\right).
# $$ (eq-half-relax)
#
# Then nothing is positive. What overflows becomes $-\infty$, a weight of 0, and no
# float32 is needed. ChatGLM-6B keeps the division, with $l$ for $\alpha$, and goes to
# float32 instead of subtracting. That makes the weights hardly more exact: the scores
# have been rounded before. CogView's released code does neither: a comment in
# `standard_attention` says that PB-relax is switched off, and that dividing the query
# first was enough for most training.
# :::


# %%
# Check eq-half-relax.
def relaxed_softmax(scores, alpha):
    """The dtype of the scores all the way."""
    return ((scores - scores.amax(dim=-1, keepdim=True)) * alpha).softmax(dim=-1)


x = 30 * torch.randn(100, 8, dtype=F64)
confirm("the identity", torch.allclose(relaxed_softmax(x / 32, 32), x.softmax(dim=-1)))

x = torch.tensor([[84_000.0, 80_000.0, -90_000.0]])
stored = (x / 32).half()
confirm(
    "float16, multiplied back as it is: NaN",
    (stored * 32).softmax(dim=-1).isnan().all(),
)
confirm(
    "float16, relaxed: right",
    torch.equal(relaxed_softmax(stored, 32).float(), x.softmax(dim=-1)),
)
empty = torch.full((1, 6), HIDDEN_SCORE).half()
confirm(
    "and an empty row is even",
    close(relaxed_softmax(empty, 32).float(), torch.tensor(1 / 6).half().float()),
)

x = 3 * torch.randn(1000, 64)
stored = (x / 32).half()
errors = torch.stack(
    [
        (weights.float() - x.softmax(dim=-1)).abs()
        for weights in (
            relaxed_softmax(stored, 32),
            (stored.float() * 32).softmax(dim=-1),
        )
    ]
)
confirm("ordinary scores: both within 0.005 of the truth", errors.max() < 0.005)
mean = errors.mean(dim=(1, 2))
confirm("their mean errors differ by less than a fifth", mean.max() < 1.2 * mean.min())

# %% [markdown]
# :::{admonition} Break it
# :class: break-it
# Swap two steps: multiply in float16, and go to float32 after. All scores of an
# ordinary model fit, so what could happen? Try it in float16 models of 6, 7 and 8
# layers.
# :::


# %%
def float_too_late(scores, mask, layer):
    return (scores.masked_fill(~mask, HIDDEN_SCORE) * layer).float()


for num_layers in (6, 7, 8):
    deep = ChatGLM(ChatGLMConfig.from_hf({**settings, "num_layers": num_layers}))
    deep = deep.half().requires_grad_(False)
    with patch.object(attention_by_layer, "restore_scores", float_too_late):
        nan = run(deep).isnan().any(dim=-1)
        in_float32 = run(deep.float())
    parts = [
        f"{nan[part].sum()} of {part.sum()} {name}"
        for name, part in (("paddings", ~is_token), ("tokens", is_token))
    ]
    print(f"{num_layers} layers: NaN in {' and '.join(parts)}")
confirm("8 layers: the row without padding is sound", not nan[0].any())
confirm("8 layers in float32: all rows are", in_float32.isfinite().all())

# %% [markdown]
# $-10000 \cdot 6$ fits into float16, $-10000 \cdot 7$ is $-\infty$. From layer 7 on the
# empty rows are NaN, and layer 8 spreads it. A test on a small model passes, a row
# without padding passes, and float32 passes. The order of two harmless lines shows in a
# deep model, in half precision, on the shorter rows of a batch.
#
# ## Exercises
#
# Write your function in a cell of your own and give it to `check`. A question takes its
# name and a letter: `check("bfloat16_scores", "a")`.

# %%
from annotated_src.exercises import check  # noqa: F401 - for your cells
from annotated_src.exercises.half_precision import chapter as exercises

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("attend_in_half")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("attend_in_half")

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("bfloat16_scores")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("bfloat16_scores")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
b16 = torch.bfloat16
confirm("bfloat16 reaches 3e38", torch.finfo(b16).max > 3e38)
confirm(
    "3000, and the next numbers: 16 apart",
    torch.tensor([2992.0, 2999.0, 3001.0, 3008.0]).to(b16).tolist()
    == [2992, 2992, 3008, 3008],
)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("scores_split")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("scores_split")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
scores_split = exercises["scores_split"].solution
q, k = torch.randn(2, 1, 1, 64, d, dtype=F64)
confirm(
    "in float64 it makes no difference",
    torch.allclose(scores_split(q, k, 28), scores_by_layer(q, k, 28)),
)
small, big = (q / 1000).half(), (k * 1000).half()
exact = scores_by_layer(small.double(), big.double(), 28)
error = [
    (way(small, big, 28).double() - exact).abs().mean()
    for way in (scores_split, scores_by_layer)
]
confirm("here splitting is over 5 times as exact", 5 * error[0] < error[1])
divided = (small / (math.sqrt(d) * 28)).abs()
confirm("for the divided queries are subnormal", (divided < 2**-14).all())
factor = math.sqrt(d) * 28
print(f"the factor {factor:.0f}, its root {math.sqrt(factor):.0f}")

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("hidden_weights")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("hidden_weights")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
lowest = torch.finfo(F16).min
for score in (20.0, 0.0, -15.0, -17.0):
    total = torch.tensor(score).half() + lowest
    print(f"{score:5.0f} + lowest = {total.item():.0f}")
confirm(
    "steps are 32 there: 16 more towards minus infinity, and it is reached",
    torch.tensor(-16.0).half() + lowest == -torch.inf,
)
added = exercises["hidden_weights"].given
for scores, is_nan in (([-17.0, -40.0], True), ([-17.0, 3.0], False)):
    weights = added(torch.tensor(scores).half(), torch.tensor([False, False]))
    confirm(
        f"a row that sees nothing, scores {scores}: NaN {is_nan}",
        weights.isnan().any() == is_nan,
    )

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("fused_empty_rows")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("fused_empty_rows")


# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
def fused_by_layer(queries, keys, values, mask, layer):
    return attend_fused(queries, keys, values, mask)


with patch.object(attention_by_layer, "attend_by_layer", fused_by_layer):
    fused = run(model)
change = (fused - logits).abs().amax(dim=-1)
confirm("the logits of padding change, all of them", (change[~is_token] > 0.1).all())
confirm("no logits of a token do", (change[is_token] < 1e-4).all())

# %% [markdown]
# ## What to remember
#
# - float16 ends at 65504, and its steps are about a thousandth of the number. Large scores
#   overflow; before that, they blur.
# - Divide the query before the product: a factor $\sqrt d$ in every layer. The layer's
#   number adds a factor $l$. Both move the range; neither makes a step finer.
# - Order matters: fill, to float32, times the layer, softmax, back. The fill is
#   $-10000\,l$.
# - A finite fill makes an empty row a mean. $-\infty$ makes it NaN, and
#   $0 \cdot \text{NaN}$ carries it to every token one layer later.
# - Test half-precision attention on a deep model with a padded batch. Elsewhere these
#   mistakes do not show.
#
# ## Where to read on
#
# - ChatGLM-6B, `modeling_chatglm.py`: `attention_fn`, from
#   `query_key_layer_scaling_coeff` to `attention_probs`. The branch of
#   `self.scale_mask_softmax` never runs: `SelfAttention` sets it to `None`.
# - Megatron-LM, `megatron/model/transformer.py`: `CoreAttention`, where `norm_factor`
#   holds root and layer, and `FusedScaleMaskSoftmax` multiplies back.
# - CogView, `mpu/sparse_transformer.py`: `standard_attention`; {cite:t}`ding2021`, on
#   stabilising training.
# - Whisper, `whisper/model.py`: `MultiHeadAttention.qkv_attention`, the split of
#   `scores_split` above, with the fourth root of the width.
# - Next: {ref}`ch-block`, where this attention meets its residual.
