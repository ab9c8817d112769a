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
# (ch-norms)=
# # Norms
#
# :::{admonition} In this chapter
# :class: at-a-glance
# **45 minutes · moderate.** Afterwards you can write LayerNorm and RMSNorm from their
# equations, say what each of them forgets, say why both leave half precision for a
# moment, and say what changes when the norm moves to another place in the block.
# :::

# %% tags=["remove-input"]
from annotated_src.figures.model_map import ModelMap

ModelMap("norms")

# %% [markdown]
# :::{admonition} Predict before you run
# :class: predict
# A vector holds 4096 ones, in bfloat16. You add up their squares in a loop, one after
# the other, and keep the total in bfloat16 as well. What is the total at the end?
# Write a number down. The answer comes in the section on half precision.
# :::

# %%
import math

import torch
from torch import nn

from annotated_src.figures.norm_placement import measure, no_norm, post_norm, pre_norm
from annotated_src.norms import LayerNorm, RMSNorm
from annotated_src.show import confirm, show

generator = torch.Generator().manual_seed(3)

# %% [markdown]
# ## Why a norm at all
#
# Every block of the model reads a running vector, the *residual stream*, and adds
# something to it; the part that does so is called a *branch*. Sums grow. Suppose a
# branch adds $Wx$, with random weights of mean 0 and variance $g^2/D$, where $D$ is the
# width. The new part is as likely to point one way as the other, so on average the
# squared lengths add:
#
# $$
# \mathbb{E}\,\lVert x + W x \rVert^2 = (1 + g^2)\,\lVert x \rVert^2 .
# $$ (eq-norms-drift)
#
# After $L$ blocks the factor is $(1+g^2)^L$: exponential in depth. Now write $r_L$ for
# the stream's *root mean square* (RMS). If the branch reads a copy of $x$ brought to
# mean square 1, what it adds has the same size at every depth, and $r_L^2$ grows along
# a straight line instead:
#
# $$
# \mathbb{E}\, r_L^2 = r_0^2 + L\,g^2 .
# $$ (eq-norms-growth)

# %%
# Check eq-norms-drift and eq-norms-growth.
D, L, g = 512, 24, 0.5
bare = steady = torch.randn(64, D, dtype=torch.float64, generator=generator)
start = bare.square().mean()
for _ in range(L):
    W = torch.randn(D, D, dtype=torch.float64, generator=generator) * g / math.sqrt(D)
    bare = bare + bare @ W.T
    unit = steady / steady.square().mean(dim=-1, keepdim=True).sqrt()
    steady = steady + unit @ W.T
drift, growth = (1 + g**2) ** L, 1 + L * g**2
print(f"expected mean square: bare {drift:.0f}, with a norm {growth:.0f}")
confirm(
    "bare: the power, within 15%", abs(bare.square().mean() / start / drift - 1) < 0.15
)
confirm("normed: the line, within 5%", abs(steady.square().mean() / growth - 1) < 0.05)

# %% [markdown]
# Real blocks are worse. Llama's feed-forward part multiplies two projections of its
# input ({ref}`ch-activations`), so twice the input gives about four times the output.
# Here are 32 random Llama blocks with their norms taken out:

# %%
stream = measure(no_norm, num_layers=32).stream
print("RMS of the stream, blocks 0 to 5:", *(f"{r:.2g}" for r in stream[:6].tolist()))
confirm(
    "from the third block on, each more than squares it",
    (stream[3:6] > stream[2:5] ** 2).all(),
)
confirm("after block 8 of 32 the stream is no longer finite", not stream[8].isfinite())

# %% [markdown]
# A norm in front of every branch stops this: whatever the stream has become, the branch
# reads numbers of a known size.
#
# ## LayerNorm, one number at a time
#
# LayerNorm {cite:p}`ba2016` looks at one token's vector and nothing else. Three loops:
# find the mean, find the variance, rescale.


# %%
def layer_norm_loop(x, weight, bias, eps):
    """Norm one vector, given as a list."""
    mean = 0.0
    for value in x:
        mean += value / len(x)
    variance = 0.0
    for value in x:
        variance += (value - mean) ** 2 / len(x)
    out = []
    for value, gain, shift in zip(x, weight, bias, strict=True):
        out.append((value - mean) / math.sqrt(variance + eps) * gain + shift)
    return out


def rms_norm_loop(x, weight, eps):
    """The same, with the mean left where it is, and without a shift at the end."""
    mean_square = 0.0
    for value in x:
        mean_square += value**2 / len(x)
    return [
        value / math.sqrt(mean_square + eps) * gain
        for value, gain in zip(x, weight, strict=True)
    ]


# %% [markdown]
# As equations, for a vector $x$ of $D$ numbers:
#
# $$
# \mu = \frac1D \sum_{i=1}^{D} x_i, \qquad
# \sigma^2 = \frac1D \sum_{i=1}^{D} (x_i - \mu)^2,
# $$ (eq-norms-moments)
#
# $$
# \operatorname{LayerNorm}(x)_i =
# \gamma_i\, \frac{x_i - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta_i .
# $$ (eq-norms-layernorm)
#
# $\gamma$ is the *gain* and $\beta$ the *bias*, both learned, one number per feature.
# $\epsilon$ sits inside the root and keeps a constant vector from dividing by zero.
# RMSNorm {cite:p}`zhang2019` drops $\mu$ and $\beta$:
#
# $$
# \operatorname{RMSNorm}(x)_i = \gamma_i\, \frac{x_i}{\sqrt{r^2 + \epsilon}}, \qquad
# r^2 = \frac1D \sum_{i=1}^{D} x_i^2 .
# $$ (eq-norms-rmsnorm)

# %%
# Check eq-norms-moments, eq-norms-layernorm and eq-norms-rmsnorm.
D, eps = 37, 1e-5
x, gain, bias = torch.randn(3, D, dtype=torch.float64, generator=generator)
mu, var = x.mean(), (x - x.mean()).square().mean()
confirm("the variance divides by D", torch.allclose(var, x.var(correction=0)))
confirm("torch's default divides by D - 1", torch.allclose(var * D / (D - 1), x.var()))
expected = torch.nn.functional.layer_norm(x, (D,), gain, bias, eps)
by_formula = gain * (x - mu) / torch.sqrt(var + eps) + bias
by_loop = layer_norm_loop(x.tolist(), gain.tolist(), bias.tolist(), eps)
confirm("LayerNorm: formula = torch", torch.allclose(by_formula, expected))
confirm("LayerNorm: loop = torch", torch.allclose(x.new_tensor(by_loop), expected))
expected = torch.nn.functional.rms_norm(x, (D,), gain, eps)
by_formula = gain * x / torch.sqrt(x.square().mean() + eps)
by_loop = rms_norm_loop(x.tolist(), gain.tolist(), eps)
confirm("RMSNorm: formula = torch", torch.allclose(by_formula, expected))
confirm("RMSNorm: loop = torch", torch.allclose(x.new_tensor(by_loop), expected))

# %% [markdown]
# Mind the $1/D$. `x.var()` divides by $D-1$, as a statistician does who estimates from
# a sample. Here the $D$ numbers are all there are. The slip scales the output by
# $\sqrt{(D-1)/D}$, which is 0.87 for $D = 4$, but 0.99988 for $D = 4096$, close enough
# to one to pass a loose test.
#
# ## Four numbers by hand
#
# Take $x = (1, 3, 3, 9)$. The mean is 4. The deviations are $(-3, -1, -1, 5)$, their
# squares add up to 36, so the variance is 9 and the standard deviation 3. The squares
# of $x$ itself add up to 100, so the mean square is 25 and the RMS 5. LayerNorm divides
# the deviations by 3, RMSNorm divides $x$ by 5:

# %%
x = torch.tensor([1.0, 3.0, 3.0, 9.0])
mean, std, rms = x.mean(), x.std(correction=0), x.square().mean().sqrt()
print(f"mean {mean:.0f}, standard deviation {std:.0f}, RMS {rms:.0f}")
with torch.no_grad():
    print("LayerNorm", [round(v, 3) for v in LayerNorm(4, eps=0.0)(x).tolist()])
    print("RMSNorm  ", [round(v, 3) for v in RMSNorm(4, eps=0.0)(x).tolist()])
for width in (4, 4096):
    factor = math.sqrt((width - 1) / width)
    print(f"D - 1 in place of D, at D = {width}: the output times {factor:.5f}")

# %% [markdown]
# 3, 4, 5: that is no accident of this vector. It is Pythagoras.
#
# ## What a norm does to space
#
# Write $\mathbf 1$ for the vector of ones. Subtracting the mean is a projection onto
# the hyperplane orthogonal to $\mathbf 1$:
#
# $$
# x - \mu \mathbf 1 = P x, \qquad P = I - \tfrac1D \mathbf 1 \mathbf 1^\top,
# \qquad P^2 = P, \quad P \mathbf 1 = 0 .
# $$ (eq-norms-projection)
#
# A projection cuts $x$ into two orthogonal parts, so their squares add; divide by $D$
# and you have
#
# $$
# r^2 = \mu^2 + \sigma^2 .
# $$ (eq-norms-pythagoras)
#
# With gain 1, bias 0 and $\epsilon = 0$, the division then puts the result on the
# sphere of radius $\sqrt D$:
#
# $$
# \operatorname{LayerNorm}(x) = \sqrt D\, \frac{P x}{\lVert P x \rVert}, \qquad
# \operatorname{RMSNorm}(x) = \sqrt D\, \frac{x}{\lVert x \rVert} .
# $$ (eq-norms-sphere)

# %%
# Check eq-norms-projection, eq-norms-pythagoras and eq-norms-sphere.
x = torch.randn(D, dtype=torch.float64, generator=generator) + 0.7
ones, eye = torch.ones(D, dtype=torch.float64), torch.eye(D, dtype=torch.float64)
P = eye - torch.outer(ones, ones) / D
confirm("P x subtracts the mean", torch.allclose(P @ x, x - x.mean()))
confirm("P is a projection", torch.allclose(P @ P, P))
confirm("P removes the ones", (P @ ones).abs().max() < 1e-12)
mean_square, var = x.square().mean(), x.var(correction=0)
confirm("r² = μ² + σ²", torch.allclose(mean_square, x.mean() ** 2 + var))
layer_normed = torch.nn.functional.layer_norm(x, (D,), eps=0.0)
rms_normed = torch.nn.functional.rms_norm(x, (D,), eps=0.0)
root = math.sqrt(D)
confirm(
    "LayerNorm = √D Px/|Px|",
    torch.allclose(layer_normed, root * P @ x / (P @ x).norm()),
)
confirm("RMSNorm = √D x/|x|", torch.allclose(rms_normed, root * x / x.norm()))
confirm(
    "RMSNorm(Px) = LayerNorm(x)",
    torch.allclose(torch.nn.functional.rms_norm(P @ x, (D,), eps=0.0), layer_normed),
)

# %% mystnb={"image": {"alt": "A plane. The horizontal axis runs along the vector of ones, the vertical axis holds vectors of mean zero. The point x = (1, 3, 3, 9) lies 8 to the right and 6 up, at distance 10; x minus 6 lies 4 to the left at the same height. A circle of radius 2 surrounds the origin. Straight lines from each point to the origin cross the circle at two different places, the two RMSNorms. A horizontal line through both points meets the vertical axis, and an arrow goes down from there to the top of the circle, the LayerNorm of both."}, "figure": {"name": "fig-norms-geometry", "caption": "Two ways onto the same sphere, drawn in the plane through (1, 1, 1, 1) and x. RMSNorm walks straight towards the origin. LayerNorm first goes sideways until the mean is zero, so all points on the dashed horizontal end in the same place. The lengths are √D = 2 times mean, standard deviation and RMS."}} tags=["hide-input"]
from annotated_src.figures.norms import draw_geometry, geometry_data

draw_geometry(geometry_data())

# %% [markdown]
# {numref}`fig-norms-geometry` holds the whole difference. RMSNorm is LayerNorm without
# the step sideways, and on vectors of mean zero the two agree.
#
# ## The source
#
# {py:class}`annotated_src.norms.LayerNorm` and {py:class}`annotated_src.norms.RMSNorm`:

# %%
show(LayerNorm, RMSNorm)

# %% [markdown]
# Both compute in float32 whatever arrives, even float64, as the original does. (That is
# why the float64 checks here use the formula or torch.) And compare the last lines:
# LayerNorm multiplies by the gain and then casts back, RMSNorm casts back and then
# multiplies. The reasons for both come below.

# %%
with torch.no_grad():
    out = RMSNorm(D, eps=0.0)(x)
error = (out - rms_normed).abs().max()
confirm("float64 in, float64 out", out.dtype == x.dtype == torch.float64)
confirm("but float32 in between", 1e-10 < error < 1e-6)

# %% [markdown]
# ## What each norm forgets
#
# What a norm forgets, the layer after it cannot see. Scale goes first. Take $a > 0$,
# and divide the fraction in {eq}`eq-norms-rmsnorm` above and below by $a$:
#
# $$
# \operatorname{RMSNorm}_{\epsilon}(a x) = \operatorname{RMSNorm}_{\epsilon/a^2}(x) .
# $$ (eq-norms-rescale)
#
# With $\epsilon = 0$ the scale is gone; with $\epsilon > 0$ it is gone once $a$ is
# large. LayerNorm forgets the shift as well:
#
# $$
# \operatorname{LayerNorm}_{\epsilon}(a x + b \mathbf 1)
# = \operatorname{LayerNorm}_{\epsilon/a^2}(x) .
# $$ (eq-norms-reshift)
#
# The derivative says the same thing locally. With gain 1 and $\epsilon = 0$,
#
# $$
# \frac{\partial \operatorname{RMSNorm}(x)}{\partial x}
# = \frac1r \left( I - \frac{x x^\top}{D\, r^2} \right) .
# $$ (eq-norms-jacobian)
#
# The bracket is again a projection: it removes the direction of $x$ itself. The $1/r$
# in front will matter later: on the way back, a norm divides the gradient by the size
# of what it normed.


# %%
# Check eq-norms-rescale, eq-norms-reshift and eq-norms-jacobian.
def rms_norm(x, eps=0.0):
    return torch.nn.functional.rms_norm(x, (D,), eps=eps)


def layer_norm(x, eps=0.0):
    return torch.nn.functional.layer_norm(x, (D,), eps=eps)


a, b, eps = 0.03, 2.0, 1e-3
confirm(
    "RMSNorm of a x is RMSNorm of x with a smaller or larger ε",
    torch.allclose(rms_norm(a * x, eps), rms_norm(x, eps / a**2)),
)
shifted = layer_norm(a * x + b, eps)
confirm(
    "LayerNorm of a x + b too, and b is gone",
    torch.allclose(shifted, layer_norm(x, eps / a**2)),
)
confirm(
    "RMSNorm notices a shift",
    not torch.allclose(rms_norm(x + b), rms_norm(x), atol=0.1),
)
r = x.square().mean().sqrt()
jacobian = torch.autograd.functional.jacobian(rms_norm, x)
by_formula = (eye - torch.outer(x, x) / (D * r**2)) / r
confirm("the Jacobian is its formula", torch.allclose(jacobian, by_formula))
layer_jacobian = torch.autograd.functional.jacobian(layer_norm, x)
ranks = [
    int(torch.linalg.matrix_rank(j, rtol=1e-9)) for j in (jacobian, layer_jacobian)
]
print(f"D = {D}; rank of the Jacobian: RMSNorm {ranks[0]}, LayerNorm {ranks[1]}")
confirm("RMSNorm loses one direction, LayerNorm two", ranks == [D - 1, D - 2])
counts = [
    sum(p.numel() for p in norm(D, 1e-5).parameters()) for norm in (RMSNorm, LayerNorm)
]
confirm("RMSNorm has half the parameters", counts == [D, 2 * D])

# %% [markdown]
# So RMSNorm gives up mean zero, and saves one pass over the vector and half the
# parameters. Its authors found no loss in quality and 7 to
# 64 per cent less running time, depending on the model {cite:p}`zhang2019`. Llama took
# it over {cite:p}`touvron2023`; ChatGLM-6B has LayerNorm, ChatGLM2 changed to RMSNorm.
#
# ## Epsilon: inside or outside
#
# $$
# \frac{x}{\sqrt{r^2 + \epsilon}} \quad\text{(inside)} \qquad\qquad
# \frac{x}{r + \epsilon} \quad\text{(outside)}
# $$ (eq-norms-eps)
#
# For $r$ around 1 you cannot tell them apart. For tiny vectors you can. Inside,
# $\epsilon$ takes over where $r^2 \approx \epsilon$, so at $r \approx \sqrt\epsilon$:
# 0.0032 for $\epsilon = 10^{-5}$, far larger than $\epsilon$ itself. Outside, it takes
# over at $r \approx \epsilon$.

# %%
# Check eq-norms-eps.
eps, direction = 1e-5, rms_norm(x)  # its RMS is 1


def rms_inside(size):
    return rms_norm(size * direction, eps).square().mean().sqrt()


def rms_outside(size):
    y = size * direction
    return (y / (y.square().mean().sqrt() + eps)).square().mean().sqrt()


print("RMS of x   of the output: inside   outside")
for size in (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
    print(f"{size:<8.0e} {rms_inside(size):>24.4f} {rms_outside(size):>9.4f}")
confirm(
    "inside: at r = √ε half of the mean square is left",
    math.isclose(rms_inside(eps**0.5) ** 2, 0.5),
)
confirm(
    "outside: at r = ε half of the RMS is left", math.isclose(rms_outside(eps), 0.5)
)

# %% [markdown]
# When does it matter? At the first norm of a model. Embeddings often start at a
# standard deviation of 0.02, so $r^2 = 0.0004$, and there the *value* of $\epsilon$
# shows as well:

# %%
for eps in (1e-5, 1e-6):
    first = 0.02 / math.sqrt(0.02**2 + eps)
    print(f"eps {eps:.0e}: the RMS after the first norm is {first:.3f}")

# %% [markdown]
# A loader that hard-codes $\epsilon$ is off by one per cent there, and by less wherever
# the stream has grown: a mistake that hides well. Read it from the configuration.
#
# :::{admonition} Paper and code
# :class: paper-code
# Equation 4 of the RMSNorm paper has no $\epsilon$ at all. Its authors' code
# (`rmsnorm_torch.py`) adds $10^{-8}$ *outside* the root; Llama adds $10^{-6}$ or
# $10^{-5}$ *inside*. In float16 the smaller number is worse than a matter of taste:
# $10^{-8}$ rounds to zero, and a zero vector becomes 0/0.
# :::

# %%
nothing = torch.zeros(8, dtype=torch.float16)
eps_in_half = torch.tensor(1e-8).half()
confirm("1e-8 is zero in float16", eps_in_half == 0)
confirm("a zero vector becomes NaN", (nothing / (nothing + eps_in_half)).isnan().all())
confirm("RMSNorm here keeps it zero", (RMSNorm(8, eps=1e-5).half()(nothing) == 0).all())

# %% [markdown]
# ## What half precision does to a square
#
# The two 16-bit formats spend their bits differently. float16 has 11 bits of precision
# (the leading 1 included) and ends at 65504. bfloat16 has the range of float32 and only
# 8 bits of precision. A norm squares, which float16 cannot afford, and adds, which
# bfloat16 cannot.

# %%
half = torch.tensor([255.0, 256.0, 2.0e-4, 1.5e-4], dtype=torch.float16)
print("float16 squares:", [f"{v:.3g}" for v in half.square().tolist()])
confirm("256 squared is infinite", half[1].square().isinf())
confirm("0.00015 squared is zero", half[3].square() == 0)

# %% [markdown]
# The smallest positive number of float16 is $6 \cdot 10^{-8}$. Squares below half of
# that, those of $|x| < 0.00017$, round to zero. Squaring doubles exponents, so float16
# can hold the squares of only half of its own range of exponents.
#
# Now the prediction: 4096 ones, added one at a time.

# %%
from annotated_src.figures.norms import draw_stall, running_sum, stall_data

for dtype in (torch.float32, torch.float16, torch.bfloat16):
    total = running_sum(torch.ones(4096, dtype=dtype).square())[-1]
    print(f"{str(dtype).removeprefix('torch.'):<9}{int(total):>5}")
confirm("in bfloat16, 256 + 1 is 256", torch.tensor(256.0).bfloat16() + 1 == 256)
confirm(
    "torch's own sum does not stall",
    torch.ones(4096).bfloat16().sum() == 4096,
)

# %% mystnb={"image": {"alt": "Three running totals against the number of ones added. The float32 line climbs to 4096. The float16 line leaves it at 2048 and stays flat. The bfloat16 line leaves it at 256 and stays flat."}, "figure": {"name": "fig-norms-stall", "caption": "Counting to 4096, with a total that is rounded at every step. A format with p bits of precision stops at 2 to the p."}} tags=["hide-input"]
draw_stall(stall_data())

# %% [markdown]
# The answer is 256. With 8 bits the next number after 256 is 258; 257 lies half-way,
# and a tie goes to the neighbour whose last bit is 0: back to 256, for ever
# ({numref}`fig-norms-stall`). Torch's own `sum` and `mean` keep a wider total inside; a
# loop of your own does not. Neither rescues squares that have already overflowed.
#
# Both together, over eleven orders of magnitude:

# %% mystnb={"image": {"alt": "Relative error of the RMS of a vector of 4096 numbers against its true RMS, both axes logarithmic. All in float16: 100 per cent below about 0.0002, then a floor near 4 per cent, then infinite from about 4. Squares in float16 and sum in float32: 100 per cent at the far left, falling to less than 0.00001, then infinite from about 71. All in bfloat16: flat near 30 per cent everywhere. With float32 inside: flat below 0.000001 everywhere. Left of 0.003 a grey band says that epsilon outweighs the squares."}, "figure": {"name": "fig-norms-cliffs", "caption": "The RMS of 4096 normally distributed numbers, computed in four ways. float16 has a cliff on either side; bfloat16 has none, and is wrong everywhere. The cure is to leave half precision for the length of one sum."}} tags=["hide-input"]
from annotated_src.figures.norms import cliff_data, draw_cliffs

cliffs = cliff_data()
draw_cliffs(cliffs)

# %%
sizes, middle = cliffs.sizes, (cliffs.sizes > 0.01) & (cliffs.sizes < 1)
overflows = [sizes[e.isinf()][0] for e in (cliffs.all_float16, cliffs.float16_squares)]
confirm("float16 sums overflow between 4 and 5", 4 < overflows[0] < 5)
confirm("float16 squares overflow between 60 and 80", 60 < overflows[1] < 80)
confirm(
    "all in bfloat16: 25% to 40% off",
    (cliffs.all_bfloat16[middle] - 0.325).abs().max() < 0.075,
)
confirm(
    "all in float16: 3% to 6% off",
    (cliffs.all_float16[middle] - 0.045).abs().max() < 0.015,
)
confirm("float32 inside: always below 1e-6", (cliffs.float32_inside < 1e-6).all())

# %% [markdown]
# Read {numref}`fig-norms-cliffs` from the right. The squares of 4096 numbers of size 4
# already add up to 65536, so a float16 total overflows at a size that the random stack
# at the end of this chapter reaches. With a float32 total, single squares overflow from
# about 71 on, because the largest of 4096 normal numbers is some 3.6 times their RMS.
# The left cliff is milder than it looks: in the grey band $\epsilon$ outweighs the true
# mean square, so losing it changes little. Nothing covers the right cliff.
#
# ### Multiply, then cast; or cast, then multiply
#
# In float32 nothing is cast, so the order makes no difference. In bfloat16 it does.
# Llama casts first, so its product is rounded a second time. Gemma multiplies in
# float32 and rounds once (and stores the gain minus one). One rounding to bfloat16
# changes a number by at most $2^{-8}$ of itself.

# %%
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

D = 256
gain = 1 + torch.randint(-32, 33, (D,), generator=generator) / 64  # exact in bfloat16
x = torch.randn(64, D, generator=generator).bfloat16()
llama, gemma = (norm(D, eps=1e-6).bfloat16() for norm in (LlamaRMSNorm, GemmaRMSNorm))
builtin = nn.RMSNorm(D, eps=1e-6, dtype=torch.bfloat16)
with torch.no_grad():
    llama.weight.copy_(gain)
    gemma.weight.copy_(gain - 1)
    builtin.weight.copy_(gain)
    wide = x.double()
    exact = gain * wide / torch.sqrt(wide.square().mean(dim=-1, keepdim=True) + 1e-6)
    error = {
        name: (norm(x).double() / exact - 1).abs().max()
        for name, norm in (("llama", llama), ("gemma", gemma), ("builtin", builtin))
    }
    differ = (llama(x) != gemma(x)).float().mean()
confirm("the two differ, in 20% to 30% of the numbers", 0.2 < differ < 0.3)
confirm("Gemma: one rounding, at most 2**-8", error["gemma"] < 1.001 * 2**-8)
confirm("torch.nn.RMSNorm: one rounding too", error["builtin"] < 1.001 * 2**-8)
confirm("Llama: two, sometimes beyond 1.5 * 2**-8", error["llama"] > 1.5 * 2**-8)

# %% [markdown]
# Neither is a mistake. But a checkpoint was trained with one of them, and the same bits
# need the same order. Torch's own class has Gemma's.
#
# ## The ladder of equality
#
# Loops, the package, `torch.nn`, and the original class, on rows whose scales differ by
# thirty thousand, with gains that are not one and a width that is not even.

# %%
D, eps = 37, 1e-5
sizes = torch.tensor([0.01, 1.0, 300.0])[:, None, None]
x = sizes * (torch.randn(3, 5, D, generator=generator) + 0.3)  # (B, T, D)
gain = 0.5 + torch.rand(D, generator=generator)
bias = torch.randn(D, generator=generator)


def with_weights(norm, dtype=torch.float32):
    with torch.no_grad():
        norm.weight.copy_(gain)
        if getattr(norm, "bias", None) is not None:
            norm.bias.copy_(bias)
    return norm.to(dtype).requires_grad_(False)


layer, rms = with_weights(LayerNorm(D, eps)), with_weights(RMSNorm(D, eps))
rows = x.flatten(0, 1).tolist()
loops = [layer_norm_loop(row, gain.tolist(), bias.tolist(), eps) for row in rows]
confirm(
    "LayerNorm = loops",
    torch.allclose(layer(x).flatten(0, 1), torch.tensor(loops), atol=1e-5),
)
loops = [rms_norm_loop(row, gain.tolist(), eps) for row in rows]
confirm(
    "RMSNorm = loops",
    torch.allclose(rms(x).flatten(0, 1), torch.tensor(loops), atol=1e-5),
)
confirm(
    "LayerNorm = torch",
    torch.allclose(layer(x), with_weights(nn.LayerNorm(D, eps))(x), atol=1e-5),
)
confirm(
    "RMSNorm = torch",
    torch.allclose(rms(x), with_weights(nn.RMSNorm(D, eps))(x), atol=1e-5),
)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    ours = with_weights(RMSNorm(D, eps), dtype)(x.to(dtype))
    original = with_weights(LlamaRMSNorm(D, eps), dtype)(x.to(dtype))
    same = torch.equal(ours, original) and ours.dtype == original.dtype == dtype
    confirm(f"RMSNorm = LlamaRMSNorm to the last bit in {dtype}", same)

# %% [markdown]
# One trap: a gain left in float32 promotes the product. The norm then returns float32,
# and the next matrix product, in bfloat16, complains.

# %%
confirm("a float32 gain promotes the output", rms(x.bfloat16()).dtype == torch.float32)

# %% [markdown]
# ## Where the norm sits
#
# The Transformer of 2017 {cite:p}`vaswani2017` norms the stream itself after each
# addition: *post-norm*. Llama norms what each branch reads and leaves the stream alone:
# *pre-norm*. With $F$ for attention or the feed-forward network (a function here, not
# the width),
#
# $$
# \text{post: } x \leftarrow \operatorname{Norm}(x + F(x)) \qquad
# \text{pre: } x \leftarrow x + F(\operatorname{Norm}(x)) .
# $$ (eq-norms-places)
#
# Here is one block arranged both ways:

# %%
show(pre_norm, post_norm)

# %%
# Check eq-norms-places.
D = 48
x = torch.randn(7, D, dtype=torch.float64, generator=generator)
W = torch.randn(D, D, dtype=torch.float64, generator=generator) / math.sqrt(D)


def unit(x):
    return x / x.square().mean(dim=-1, keepdim=True).sqrt()


post, pre = unit(x + x @ W.T), x + unit(x) @ W.T
confirm(
    "post-norm: the stream has RMS 1",
    torch.allclose(post.square().mean(dim=-1), post.new_ones(7)),
)
confirm(
    "post-norm forgets the stream's size",
    torch.allclose(unit(4 * x + 4 * x @ W.T), post),
)
confirm(
    "pre-norm keeps it: the change is the same",
    torch.allclose(4 * x + unit(4 * x) @ W.T - 4 * x, pre - x),
)

# %% [markdown]
# In pre-norm the gradient has a free way back: the derivative of $x +
# F(\operatorname{Norm}(x))$ is the identity plus something that {eq}`eq-norms-jacobian`
# divides by $r$, and $r$ grows with depth ({eq}`eq-norms-growth`). In post-norm every
# block multiplies the whole gradient by a norm's Jacobian. A factor of 1.13, 32 times
# over, is 50.

# %% mystnb={"image": {"alt": "Two panels. Left: RMS of the stream against blocks passed, logarithmic. Without norms it leaves the picture after three blocks; with pre-norm it rises slowly from 1 to 5.4 after 32 blocks; with post-norm it stays at 1. Right: size of the gradient of down_proj against the block, logarithmic. Post-norm with Llama's block falls along a nearly straight line from 34 at block 1 to 0.7 at block 32. Post-norm with the ReLU network of 2017 is dotted and nearly level, from 0.8 to 1.4. Pre-norm falls gently from 1 to 0.13."}, "figure": {"name": "fig-norms-depth", "caption": "32 random blocks, one forward and one backward pass, before any training. Left, the stream on its way up. Right, what arrives at each block's weights on the way back; the lines of the right panel are geometric means over four seeds."}} tags=["hide-input"]
from annotated_src.figures.norm_placement import depth_data, draw_depth

depth = depth_data()
draw_depth(depth)

# %%
for name in ("pre", "post", "post_relu"):
    gradients = getattr(depth, f"gradients_{name}")
    print(f"{name:<10} first block {gradients[0]:.2g}, last block {gradients[-1]:.2g}")
confirm("pre-norm: the stream ends at 5 to 6", 5 < depth.stream_pre[-1] < 6)
ratios = [g[0] / g[-1] for g in (depth.gradients_pre, depth.gradients_post)]
confirm("pre-norm: seven to eight times over 32 blocks", 7 < ratios[0] < 8)
confirm("post-norm: about 48 times", 46 < ratios[1] < 50)
confirm("which is a factor of 1.13 per block", abs(ratios[1] ** (1 / 31) - 1.13) < 0.01)

# %% [markdown]
# You may have read that post-norm makes gradients vanish. Not in
# {numref}`fig-norms-depth`: with Llama's gated network they *explode* towards the
# input, 48 times over 32 blocks; put the ReLU network of 2017 in its place and they
# stay nearly level. Which way it goes depends on the block and on the initial weights.
# What does not: in post-norm the factors multiply, in pre-norm they approach one as $r$
# grows.
#
# There is a second difference, which {cite:t}`xiong2020` derive: at the last block, the
# gradient does not depend on the depth in post-norm, and falls like $1/\sqrt L$ in
# pre-norm. They see in it the reason why post-norm training needs a warm-up.

# %%
last = {}
for arrange in (pre_norm, post_norm):
    for L in (8, 32):
        runs = [measure(arrange, L, seed=s).gradients[-1].log() for s in range(8)]
        last[arrange, L] = torch.stack(runs).mean().exp()
pre_falls = last[pre_norm, 8] / last[pre_norm, 32]
post_falls = last[post_norm, 8] / last[post_norm, 32]
confirm(
    "four times the depth: pre-norm's last gradient about halves", 1.6 < pre_falls < 2.5
)
confirm("post-norm's stays within a third", 0.75 < post_falls < 1.33)

# %% [markdown]
# Pre-norm has a price: the stream ends unnormed. So the model norms it once more,
# before the head (`self.norm` in
# {py:class}`annotated_src.models.llama.Llama`). Without it the logits have whatever
# size the stream has reached, and an untrained model makes wild guesses with great
# confidence. Here is its loss, against that of an even guess among 128 tokens:

# %%
run = measure(pre_norm, 32)
print(f"even guess: {math.log(128):.1f}; ", end="")
print(f"with final norm: {run.loss:.1f}; without: {run.loss_without_final_norm:.0f}")
confirm(
    "without the final norm the loss at the start is over twice as large",
    run.loss_without_final_norm > 2 * run.loss,
)

# %% [markdown]
# :::{admonition} Paper and code
# :class: paper-code
# **A name.** Hugging Face calls the second norm of a Llama block
# `post_attention_layernorm`. It is not post-norm, and no LayerNorm: it is the RMSNorm
# that the feed-forward network reads, named after what happens to come before it. Here
# it is `ffn_norm`.
#
# **A residual.** ChatGLM-6B calls its norms the same, but adds the branch to the norm's
# *output*, enlarged: $h = \alpha\,n + \operatorname{attention}(n)$ with $n =
# \operatorname{LayerNorm}(x)$, and the same again for the feed-forward part. So the
# stream is normed after all. Count each norm to the addition before it instead of the
# one after it, and you have post-norm with $\alpha x$ in place of $x$: the DeepNorm
# {cite:p}`wang2022` of GLM-130B {cite:p}`zeng2022`. $\alpha$ is $\sqrt{2 \cdot 28}$,
# from the model's 28 layers.
# :::

# %%
from transformers import LlamaConfig, LlamaModel

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
model = LlamaModel(LlamaConfig(vocab_size=50, num_hidden_layers=1, **sizes))
seen = {}
layer = model.layers[0]
layer.post_attention_layernorm.register_forward_hook(
    lambda m, i, out: seen.update(norm=out)
)
layer.mlp.register_forward_pre_hook(lambda m, i: seen.update(mlp=i[0]))
model(torch.tensor([[3, 1, 4, 1, 5]]))
confirm(
    "post_attention_layernorm feeds the MLP", torch.equal(seen["norm"], seen["mlp"])
)

# %%
alpha, D = math.sqrt(2 * 28), 48
norms = [LayerNorm(D, eps=1e-5).requires_grad_(False) for _ in range(9)]
for norm in norms:
    norm.weight.uniform_(0.5, 1.5)
    norm.bias.uniform_(-0.1, 0.1)
branches = [nn.Linear(D, D).requires_grad_(False) for _ in range(8)]


def chatglm_stack(x):
    for norm, branch in zip(norms, branches, strict=False):
        n = norm(x)
        x = alpha * n + branch(n)
    return norms[-1](x)  # final_layernorm


def post_norm_stack(x):
    x = norms[0](x)
    for norm, branch in zip(norms[1:], branches, strict=True):
        x = norm(alpha * x + branch(x))
    return x


x = 3 * torch.randn(2, 5, D)
confirm(
    "ChatGLM = post-norm with alpha",
    torch.allclose(chatglm_stack(x), post_norm_stack(x), atol=1e-5),
)
confirm(
    "so its first block forgets the size of x",
    torch.allclose(chatglm_stack(x), chatglm_stack(9 * x), atol=1e-4),
)

# %% [markdown]
# :::{admonition} Break it
# :class: break-it
# Leave out the two casts of RMSNorm, and feed it a float16 token with one large feature.
# Trained models have such features {cite:p}`sun2024`.
# :::


# %%
def wrong_rms_norm(x, weight, eps):
    """Stay in the dtype of x. Wrong on purpose."""
    return weight * (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps))


torch.manual_seed(0)
token = torch.randn(2, 4096).half()
token[1, 7] = 300.0  # the second token only
right, gain = RMSNorm(4096, eps=1e-5).half(), torch.ones(4096).half()
with torch.no_grad():
    outs = {"right": right(token), "wrong": wrong_rms_norm(token, gain, 1e-5)}
for name, out in outs.items():
    sizes = out.float().square().mean(dim=-1).sqrt().tolist()
    print(name, [f"{size:.2f}" for size in sizes], "NaN:", bool(out.isnan().any()))
first_agree = torch.allclose(outs["right"][0], outs["wrong"][0], rtol=1e-2, atol=1e-3)
confirm("the first token is the same in both, to one per cent", first_agree)

# %% [markdown]
# No NaN, no warning: $300^2$ is infinite, one over its root is zero, and the token
# comes out as 4096 zeros. The next layer reads nothing at this token, and the model
# carries on. The first token is right in both, so a test with ordinary inputs passes.
# Test norms with large inputs.
#
# ## Exercises
#
# Write your function in a cell of your own and give it to `check`. A question takes its
# name and a letter: `check("norm_of_two_numbers", "a")`.

# %%
from annotated_src.exercises import check  # noqa: F401 - for your cells
from annotated_src.exercises.norms import chapter as exercises

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("rms_norm")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("rms_norm")

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("rms_norm_in_half")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("rms_norm_in_half")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
sizes = torch.tensor([0.0003, 0.01, 1.0, 100.0, 5000.0])[:, None]
x = (sizes * torch.randn(1, 5, 64, generator=generator)).half()
norm = RMSNorm(64, 1e-5).half().requires_grad_(False)
norm.weight.copy_(0.5 + torch.rand(64, generator=generator))
mine = exercises["rms_norm_in_half"].solution(x, norm.weight, 1e-5)
confirm("it never leaves float16", mine.dtype == torch.float16)
confirm(
    "the solution agrees with RMSNorm",
    torch.allclose(mine, norm(x), rtol=1e-2, atol=1e-3),
)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("fold_norm")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("fold_norm")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
norm, linear = RMSNorm(24, 1e-5), nn.Linear(24, 10)
plain, folded = RMSNorm(24, 1e-5), nn.Linear(24, 10)
x = torch.randn(2, 5, 24, generator=generator)
with torch.no_grad():
    norm.weight.uniform_(-1.5, 1.5)
    weight, bias = exercises["fold_norm"].solution(
        norm.weight, torch.zeros(24), linear.weight, linear.bias
    )
    folded.weight.copy_(weight)
    folded.bias.copy_(bias)
    same = torch.allclose(folded(plain(x)), linear(norm(x)), atol=1e-5)
confirm("an RMSNorm's gain can move into the matrix", same)
confirm("and the bias stays", torch.equal(folded.bias, linear.bias))

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("norm_of_two_numbers")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("norm_of_two_numbers")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
pairs = 10 * torch.randn(1000, 2, dtype=torch.float64, generator=generator)
ends = torch.nn.functional.layer_norm(pairs, (2,), eps=0.0)
side = (pairs[:, :1] - pairs[:, 1:]).sign()
confirm(
    "LayerNorm tells which is larger",
    torch.allclose(ends, side * torch.tensor([1.0, -1.0])),
)
ends = torch.nn.functional.layer_norm(torch.full((1, 2), 7.0), (2,))
confirm("equal numbers become zeros", (ends == 0).all())
ends = torch.nn.functional.layer_norm(pairs, (2,), eps=100.0)
confirm(
    "a large epsilon: all smaller, and different",
    ends.abs().max() < 1 and len(ends.unique()) > 1000,
)
on_circle = torch.nn.functional.rms_norm(pairs, (2,), eps=0.0)
confirm(
    "RMSNorm: a circle of radius √2, every direction kept",
    torch.allclose(on_circle, math.sqrt(2) * pairs / pairs.norm(dim=-1, keepdim=True)),
)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("layer_norm")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("layer_norm")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
x = torch.randn(2, 6, 16, generator=generator)
changed = x.clone()
changed[:, -1] += 5.0  # only the last token
exercise, gain, shift = exercises["layer_norm"], torch.ones(16), torch.zeros(16)


def early(norm, x):
    return norm(x, gain, shift, 1e-5)[:, :-1]


confirm(
    "the right one: earlier tokens do not notice",
    torch.equal(early(exercise.solution, x), early(exercise.solution, changed)),
)
leaks = (early(exercise.given, x) - early(exercise.given, changed)).abs().max() > 0.1
confirm("the colleague's: they do", leaks)

# %% [markdown]
# ## What to remember
#
# - LayerNorm projects away the mean, then scales to the sphere of radius $\sqrt D$.
#   RMSNorm only scales. $r^2 = \mu^2 + \sigma^2$.
# - Divide by $D$. $\epsilon$ goes inside the root and matters where
#   $r \approx \sqrt\epsilon$.
# - Square and add in float32: float16 overflows into a vector of zeros, and a running
#   total of ones in bfloat16 stops at 256.
# - Llama casts, then multiplies by the gain; Gemma and `torch.nn.RMSNorm` multiply
#   first.
# - Pre-norm leaves the stream alone: it grows slowly, gradients do not compound, and a
#   final norm is needed.
#
# ## Where to read on
#
# In transformers: `modeling_llama.py`, `LlamaRMSNorm` and `LlamaDecoderLayer`;
# `modeling_gemma.py`, `GemmaRMSNorm`, with a comment on the order. In ChatGLM-6B:
# `modeling_chatglm.py`, `GLMBlock.forward`, where $\alpha$ is. The authors' RMSNorm:
# `bzhangGo/rmsnorm`, `rmsnorm_torch.py`. The next chapter, {ref}`ch-rope`, turns to
# positions.
