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
# (ch-activations)=
# # Activations
#
# :::{admonition} In this chapter
# :class: at-a-glance
# **35 minutes · moderate, with two pages of calculus.** Afterwards you can derive GELU and
# the constants in its approximation, say when a 16-bit model can tell the two apart,
# build a layer that multiplies, and explain why Llama's feed-forward width is such an
# odd number.
# :::

# %% tags=["remove-input"]
from annotated_src.figures.model_map import ModelMap

ModelMap("activations", "ffn")

# %% [markdown]
# :::{admonition} Predict before you run
# :class: predict
# A feed-forward layer receives two numbers, $x$ and $y$. It should return their product
# $xy$, exactly, however large they are. You may set its weights by hand. A plain layer
# has a thousand hidden units; a gated one has two. Which of them can do it? Write down
# your answer before you read on.
# :::

# %%
import math

import numpy as np
import torch
from torch.nn import functional as F

from annotated_src.activations import GELU_CUBIC, gelu_exact, gelu_tanh, silu
from annotated_src.feed_forward import FeedForward, GatedFeedForward
from annotated_src.figures.activations import (
    TAYLOR_CUBIC,
    gated_product,
    plain_product,
    tanh_gate,
)
from annotated_src.show import confirm, show

torch.set_default_dtype(torch.float64)  # the equations are checked in float64


def phi(x):
    """The bell curve's height."""
    return torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def cdf(x):
    """The bell curve's area to the left of x."""
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


# %% [markdown]
# ## The feed-forward layer as loops
#
# After attention has moved information between tokens, the feed-forward layer works on
# each token alone. Llama's has three matrices. For every hidden unit it takes two dot
# products with the token, bends one of them, and multiplies the two; then it mixes the
# hidden units back down to the model's width.


# %%
def feed_forward_by_loops(token, gate, up, down):
    hidden = []
    for gate_row, up_row in zip(gate, up, strict=True):
        g = sum(w * t for w, t in zip(gate_row, token, strict=True))
        u = sum(w * t for w, t in zip(up_row, token, strict=True))
        hidden.append(g / (1 + math.exp(-g)) * u)  # silu(g) * u
    return [sum(w * h for w, h in zip(row, hidden, strict=True)) for row in down]


torch.manual_seed(0)
layer = GatedFeedForward(embed_dim=6, ffn_dim=7, activation=silu)
layer.requires_grad_(False)
x = torch.randn(2, 3, 6)  # (B, T, D)
weights = [w.tolist() for w in layer.state_dict().values()]  # gate, up, down
by_loops = torch.tensor(
    [[feed_forward_by_loops(t, *weights) for t in row] for row in x.tolist()]
)
confirm("loops give what GatedFeedForward gives", torch.allclose(by_loops, layer(x)))

# %% [markdown]
# Two questions are left: why bend at all, and why multiply?
#
# ## Why a bend
#
# Without one, two linear maps are one linear map, however wide the middle is:
#
# $$
# W_d\,(W_u x + b_u) + b_d = (W_d W_u)\,x + (W_d b_u + b_d).
# $$ (eq-activations-collapse)
#
# The layer below has 38 parameters and can do no more than one `nn.Linear` with 12.

# %%
# Check eq-activations-collapse.
unbent = FeedForward(3, 5, activation=lambda h: h).requires_grad_(False)
up, down = unbent.up_proj, unbent.down_proj
single = torch.nn.Linear(3, 3).requires_grad_(False)
single.weight.copy_(down.weight @ up.weight)
single.bias.copy_(down.weight @ up.bias + down.bias)
x = torch.randn(2, 4, 3)
confirm("one matrix does the same", torch.allclose(unbent(x), single(x)))


def count(module):
    return sum(p.numel() for p in module.parameters())


print(count(unbent), "parameters against", count(single))

# %% [markdown]
# The simplest bend is ReLU, $\max(x, 0)$: a gate that looks at the sign of $x$ and is
# open or shut. Where it is shut the slope is exactly 0, so nothing is learnt there.
#
# ## GELU is a random gate, averaged
#
# Hendrycks and Gimpel {cite:p}`hendrycks2016` let chance decide. Draw $Z$ from the
# standard normal distribution and let $x$ through if $Z \le x$. A large $x$ nearly
# always passes, a very negative one hardly ever. GELU is what comes out on average:
#
# $$
# \begin{aligned}
# \mathrm{GELU}(x) &= \mathbb{E}\big[x\,\mathbf{1}\{Z \le x\}\big]
# = x\,P(Z \le x) = x\,\Phi(x), \\
# \Phi(x) &= \int_{-\infty}^{x} \frac{e^{-z^2/2}}{\sqrt{2\pi}}\,dz.
# \end{aligned}
# $$ (eq-activations-gelu)
#
# The integral has no elementary form. Substitute $z = \sqrt2\,t$ and it becomes the
# error function, which every maths library has:
#
# $$
# \Phi(x) = \tfrac12\left(1 + \operatorname{erf}\frac{x}{\sqrt2}\right).
# $$ (eq-activations-erf)
#
# To check it you need no random numbers. Integrate the bell curve itself, with 100
# Gauss–Legendre points between −12 and $x$; what lies below −12 is smaller than
# $10^{-32}$.

# %%
# Check eq-activations-gelu and eq-activations-erf.
nodes, node_weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(100))


def probability_below(x, far=-12.0):
    half = (x - far) / 2  # maps the nodes from (-1, 1) to (far, x)
    return half * (node_weights * phi(far + half * (nodes + 1))).sum()


xs = torch.linspace(-6, 6, 25)
integrated = torch.stack([probability_below(x) for x in xs])
confirm("the integral is erf's", (integrated - cdf(xs)).abs().max() < 1e-13)
confirm("x P(Z <= x) is gelu_exact", torch.allclose(xs * integrated, gelu_exact(xs)))

# %% [markdown]
# ## Where 0.7979 and 0.044715 come from
#
# For speed the paper also offers a tanh, and gives its constants without a derivation.
# Here is one. Expand $\Phi$ at 0, where the bell curve is
# $(1 - z^2/2 + \dots)/\sqrt{2\pi}$:
#
# $$
# \Phi(x) = \frac12 + \frac{1}{\sqrt{2\pi}}\left(x - \frac{x^3}{6} + O(x^5)\right).
# $$ (eq-activations-taylor)
#
# Expand a tanh gate with two free constants, using $\tanh u = u - u^3/3 + \dots$:
#
# $$
# \tfrac12\big(1 + \tanh(c\,(x + a x^3))\big)
# = \frac12 + \frac{c}{2}\left(x + \Big(a - \frac{c^2}{3}\Big)x^3 + O(x^5)\right).
# $$ (eq-activations-tanh)
#
# Equal slopes at 0 give $c$. Equal cubes would give $a$:
#
# $$
# c = \sqrt{\frac{2}{\pi}}, \qquad
# a_{\text{Taylor}} = \frac{c^2}{3} - \frac16 = \frac{4 - \pi}{6\pi}.
# $$ (eq-activations-constants)

# %%
# Check eq-activations-taylor, eq-activations-tanh and eq-activations-constants.
small = torch.tensor([0.005, 0.01, 0.02])
c = math.sqrt(2 / math.pi)
a = c**2 / 3 - 1 / 6
taylor = 0.5 + (small - small**3 / 6) / math.sqrt(2 * math.pi)
left = (cdf(small) - taylor).abs()
confirm("what Phi's expansion leaves is O(x^5)", (left < small**5).all())
for any_a in (0.0, a, GELU_CUBIC, 1.0):
    expansion = 0.5 + c / 2 * (small + (any_a - c**2 / 3) * small**3)
    left = (tanh_gate(small, any_a) - expansion).abs()
    confirm(f"and of the tanh gate's with a = {any_a:.6f}", (left < small**5).all())
confirm("c^2/3 - 1/6 is (4 - pi)/(6 pi)", math.isclose(a, TAYLOR_CUBIC))
for constant, meets in ((a, True), (GELU_CUBIC, False)):
    left = (tanh_gate(small, constant) - cdf(small)).abs()
    verdict = "meets" if meets else "misses"
    confirm(f"{constant:.6f} {verdict} Phi to O(x^5)", (left < small**5).all() == meets)
print(f"c = {c:.4f}   a = {a:.5f}   but the paper has {GELU_CUBIC}")

# %% [markdown]
# The paper's $c$ is Taylor's, its $a$ is not: 0.044715 against 0.04554. Taylor is best
# near 0, and you need a gate that is good everywhere. So leave $c$ as it is, and look
# for the $a$ whose *largest* error is smallest. A larger $a$ raises the tanh gate at
# every $x > 0$: it lifts the error's peak, and fills its trough. If peak and trough are
# equally far from 0, any change of $a$ makes one of them worse. So equal extremes mean
# the best $a$.
#
# The paper also has a cheaper gate, $\sigma(1.702x)$; with it you get what transformers
# calls the quick GELU. The same search finds its constant.

# %%
grid = torch.linspace(0, 6, 20_001)


def best_constant(largest_error, low, high):
    """Golden-section search for the lowest point of a function with one valley."""
    shrink = (math.sqrt(5) - 1) / 2
    while high - low > 1e-10:
        left, right = high - shrink * (high - low), low + shrink * (high - low)
        if largest_error(left) < largest_error(right):
            high = right
        else:
            low = left
    return (low + high) / 2


def gate_error(a):
    return (tanh_gate(grid, a) - cdf(grid)).abs().max().item()


def gelu_error(a):
    return (grid * (tanh_gate(grid, a) - cdf(grid))).abs().max().item()


def quick_error(k):
    return (torch.sigmoid(k * grid) - cdf(grid)).abs().max().item()


best_gate = best_constant(gate_error, 0.04, 0.05)
best_gelu = best_constant(gelu_error, 0.04, 0.05)
print("a          error of Phi   error of GELU")
for name, constant in (
    ("Taylor", TAYLOR_CUBIC),
    ("paper", GELU_CUBIC),
    ("best Phi", best_gate),
    ("best GELU", best_gelu),
):
    of_phi, of_gelu = gate_error(constant), gelu_error(constant)
    print(f"{constant:.6f}   {of_phi:.2e}       {of_gelu:.2e}        {name}")
signed = tanh_gate(grid, GELU_CUBIC) - cdf(grid)
print(f"trough at {grid[signed.argmin()]:.2f}, peak at {grid[signed.argmax()]:.2f}")
confirm("0.044715 is the best a for Phi", abs(best_gate - GELU_CUBIC) < 2e-7)
confirm("its trough and peak agree to 0.1%", -signed.min() / signed.max() > 0.999)
best_quick = best_constant(quick_error, 1.5, 1.9)
confirm("1.702 is the best k in sigmoid(k x)", abs(best_quick - 1.702) < 5e-4)

# %% [markdown]
# So 0.044715 is, to its last digit, the constant with the smallest largest error *in
# Φ*, and so is 1.702 for its gate. For GELU itself, where the error is multiplied by
# $x$, 0.044715 is not quite the best: 0.04438 would be better by almost a fifth.

# %% mystnb={"image": {"alt": "Left: the error of the tanh gate in units of 0.0001. With 0.044715 it falls to minus 1.79 near 1.24, rises to plus 1.79 near 2.59 and just touches both edges of a shaded band. With the Taylor constant 0.04554 it stays at zero near 0, then rises to 3.13 near 2.29. Right: on a logarithmic axis, the difference of the two GELUs has four humps up to 0.00047. For positive x it stays below half a step of float16; left of about minus 0.8 it is above it."}, "figure": {"name": "fig-activations-constant", "caption": "Left: with 0.044715, peak and trough of the gate's error have the same height, which makes it the best constant; Taylor's is better only near 0. Right: the error of GELU against the most that rounding to 16 bits can move it."}} tags=["hide-input"]
from annotated_src.figures.activations import constant_data, draw_constant

draw_constant(constant_data())

# %% [markdown]
# ### What 16 bits see
#
# ({ref}`ch-norms` says how the two 16-bit formats, float16 and bfloat16, differ.) The two
# GELUs differ by at most 0.00047, near $x = \pm2.70$. For positive $x$ that is
# less than half a step of float16 ({numref}`fig-activations-constant`): after rounding
# they are the same number or neighbours. For negative $x$ the value is itself close to
# 0, where floats are dense, and the stored numbers do differ. After the second matrix
# it hardly matters: in a random layer, rounding to bfloat16 moves the output far more
# than the other GELU does. Such a mix-up hides in bfloat16, and shows in float32.

# %%
difference = (gelu_tanh(grid) - gelu_exact(grid)).abs()
at = grid[difference.argmax()]
print(f"largest difference {difference.max():.2e}, at {at:.2f}")
mirrored = gelu_tanh(-grid) - gelu_exact(-grid)
confirm("it is the same at -x", torch.allclose(mirrored.abs(), difference, atol=1e-15))
data = constant_data()
seen = data.gelu_error > data.half_steps["float16"]
confirm(
    "no difference reaches half a step of float16 for x > 0",
    not seen[data.wide > 0].any(),
)
for at in (-1.0, -3.0):
    confirm(f"float16 can see it at {at:.0f}", seen[(data.wide - at).abs().argmin()])


def random_layer(activation):
    """Make the same weights every time, so that only the bend differs."""
    generator = torch.Generator().manual_seed(1)
    made = FeedForward(64, 256, activation).requires_grad_(False)
    for p in made.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[-1]))
        p.copy_(p.bfloat16())  # so that every type below holds the same weights
    return made


def rms(t):
    return t.square().mean().sqrt().item()


x = torch.randn(2, 64, 64).bfloat16().double()
exact = random_layer(gelu_exact)(x)
swap = rms(exact - random_layer(gelu_tanh)(x))
rounding = {
    dtype: rms(exact - random_layer(gelu_exact).to(dtype)(x.to(dtype)).double())
    for dtype in (torch.bfloat16, torch.float32)
}
confirm(
    "rounding to bfloat16 moves the output over 8 times as much as the other GELU",
    rounding[torch.bfloat16] > 8 * swap,
)
confirm("float32, over 100 times less", rounding[torch.float32] < swap / 100)

# %% [markdown]
# ## SiLU, and the dip
#
# Let the logistic curve play the part of $\Phi$, and you have SiLU, also called Swish
# {cite:p}`ramachandran2017` (with its $\beta = 1$). The quick GELU is SiLU measured
# with another ruler:
#
# $$
# \mathrm{SiLU}(x) = x\,\sigma(x) = \frac{x}{1 + e^{-x}}, \qquad
# x\,\sigma(1.702x) = \frac{\mathrm{SiLU}(1.702x)}{1.702}.
# $$ (eq-activations-silu)
#
# Between two matrices such factors disappear into the weights: a plain layer with the
# quick GELU *is* one with SiLU and other weights. The slopes are
#
# $$
# \mathrm{GELU}'(x) = \Phi(x) + x\,\varphi(x), \qquad
# \mathrm{SiLU}'(x) = \sigma(x)\big(1 + x\,(1 - \sigma(x))\big),
# $$ (eq-activations-slopes)
#
# with $\varphi$ the bell curve. Both are $\tfrac12$ at 0, both turn negative: unlike
# ReLU, these curves dip. For SiLU the lowest point is a nice surprise. Set the slope to
# 0, multiply by $1 + e^x$ and write $x = -(1+w)$:
#
# $$
# \begin{aligned}
# 1 + e^x + x = 0 \quad &\iff \quad w\,e^w = e^{-1}, \quad w = 0.2785\ldots, \\
# \mathrm{SiLU}\big(-(1 + w)\big) &= -w.
# \end{aligned}
# $$ (eq-activations-dip)
#
# For the second line, the first says that $1 + e^x = -x$ there, so that
# $\mathrm{SiLU}(x) = x\,e^x/(1 + e^x) = -e^x = 1 + x$. The value at the bottom is its
# position plus one.


# %%
# Check eq-activations-silu, eq-activations-slopes and eq-activations-dip.
def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


x = torch.linspace(-6, 6, 49).requires_grad_()
s = torch.sigmoid(x)
confirm("silu is x sigmoid(x)", torch.allclose(silu(x), x / (1 + torch.exp(-x))))
same = torch.allclose(quick_gelu(x), silu(1.702 * x) / 1.702)
confirm("quick GELU is SiLU, rescaled", same)
# The slopes, against autograd.
for function, formula in (
    (gelu_exact, cdf(x) + x * phi(x)),
    (silu, s * (1 + x * (1 - s))),
):
    (slope,) = torch.autograd.grad(function(x).sum(), x)
    confirm(f"slope of {function.__name__}", torch.allclose(slope, formula))
# A layer with the quick GELU, and its twin with SiLU.
quick = FeedForward(4, 9, quick_gelu).requires_grad_(False)
rescaled = FeedForward(4, 9, silu).requires_grad_(False)
rescaled.load_state_dict(quick.state_dict())
for p in rescaled.up_proj.parameters():
    p.mul_(1.702)
rescaled.down_proj.weight.div_(1.702)
x = torch.randn(2, 3, 4)
confirm("with other weights SiLU does it", torch.allclose(rescaled(x), quick(x)))
# The bottom of the dip, first from the equation, then by search.
w = torch.tensor(0.25)
for _ in range(50):
    w = torch.exp(-1 - w)  # the equation, solved for the w in front
confirm("w e^w = 1/e", torch.isclose(w * torch.exp(w), torch.tensor(math.exp(-1))))
confirm("SiLU(-(1 + w)) = -w", torch.isclose(silu(-1 - w), -w))


for function in (gelu_exact, gelu_tanh, quick_gelu, silu):

    def value(x, function=function):
        return function(torch.tensor(x)).item()

    lowest = best_constant(value, -3.0, 0.0)
    depth = value(lowest)
    print(f"{function.__name__:10} lowest at {lowest:.4f}, value {depth:.4f}")

# %% mystnb={"image": {"alt": "Left: ReLU, GELU and SiLU near 0. GELU dips to minus 0.17 at minus 0.75, SiLU to minus 0.28 at minus 1.28, ReLU is flat. Right: their slopes. ReLU's jumps from 0 to 1; GELU's and SiLU's cross one half at 0, go below 0 on the left and above 1 on the right, GELU's up to 1.13 at 1.41, SiLU's up to 1.10 at 2.40."}, "figure": {"name": "fig-activations-bend", "caption": "ReLU, GELU and SiLU, and their slopes. Where ReLU is flat the other two still have a slope to learn from."}} tags=["hide-input"]
from annotated_src.figures.activations import bend_data, draw_bend

draw_bend(bend_data())

# %% [markdown]
# ## Gates
#
# So far a unit gates *itself*: $\Phi(x)$ or $\sigma(x)$ decides how much of the same
# $x$ passes. A gated linear unit {cite:p}`dauphin2017` uses two projections: one opens
# the gate, another goes through. Shazeer {cite:p}`shazeer2020` tried several bends in
# the gate; with SiLU it is SwiGLU (Llama), with GELU it is GEGLU (Gemma):
#
# $$
# \mathrm{FFN}(x) = W_{\text{down}}\big(\mathrm{SiLU}(W_{\text{gate}}\,x) \odot W_{\text{up}}\,x\big).
# $$ (eq-activations-gate)
#
# Here are both layers as this book's models use them:

# %%
show(FeedForward, GatedFeedForward)

# %%
# Check eq-activations-gate.
x = torch.randn(2, 3, 6)
gate, up, down = layer.state_dict().values()
vectorised = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
confirm("the formula is the module", torch.allclose(vectorised, layer(x)))

# %% [markdown]
# ### Two units that multiply
#
# Since $\sigma(a) + \sigma(-a) = 1$, the dip and the bend cancel in a pair:
# $\mathrm{SiLU}(a) - \mathrm{SiLU}(-a) = a$. Let each of the two open a gate for the
# same $b$:
#
# $$
# \mathrm{SiLU}(a)\,b - \mathrm{SiLU}(-a)\,b = a\,b \qquad \text{for all } a, b.
# $$ (eq-activations-product)
#
# Two gated units multiply *exactly*. This is the layer, and all its numbers for
# $x = 3$, $y = -2$ (its second output is not used, and stays 0):

# %%
show(gated_product)

# %%
# Check eq-activations-product.
multiplier = gated_product()
token = torch.tensor([[[3.0, -2.0]]])
gate, up = multiplier.gate_proj(token), multiplier.up_proj(token)
for name, numbers in (
    ("gate", gate),
    ("silu(gate)", silu(gate)),
    ("up", up),
    ("silu(gate) * up", silu(gate) * up),
    ("down", multiplier(token) + 0.0),
):
    print(f"{name:16}", "  ".join(f"{v:8.4f}" for v in numbers.flatten().tolist()))
pairs = 100 * torch.randn(1, 1000, 2)
product = pairs.prod(dim=-1)
confirm(
    "exact for 1000 pairs, large and small",
    torch.allclose(multiplier(pairs)[..., 0], product, rtol=1e-12),
)

# %% [markdown]
# That answers the prediction: the two gated units can. A plain layer can imitate. It
# uses that $4xy = (x+y)^2 - (x-y)^2$, and that $\mathrm{SiLU}(z) + \mathrm{SiLU}(-z)$
# is about $z^2/2$ for small $z$. But for large $z$ that sum is about $|z|$, and instead
# of the product comes the smaller of $|x|$ and $|y|$. More units, or smaller input
# weights, only push the failure outwards: far from 0 every plain unit is a ramp or
# nothing, so if you double the input, the output doubles. A product must grow fourfold.

# %%
imitation = plain_product()
small = 0.05 * torch.randn(1, 50, 2)
product = small.prod(dim=-1)
off = (imitation(small)[..., 0] - product).abs().max() / product.abs().max()
confirm("near 0 the plain layer multiplies, to 1%", off < 0.01)
far = torch.tensor([[[30.0, 20.0]]])
print("30 * 20: plain", round(imitation(far)[0, 0, 0].item(), 3), end=", ")
print("gated", round(multiplier(far)[0, 0, 0].item(), 3))

torch.manual_seed(4)
plain = FeedForward(6, 1000, silu).requires_grad_(False)
gated = GatedFeedForward(6, 1000, silu).requires_grad_(False)
ray = 1e6 * torch.randn(1, 1, 6)
for name, ffn, times in (("plain", plain, 2.0), ("gated", gated, 4.0)):
    growth = ffn(2 * ray) / ffn(ray)
    confirm(
        f"twice the input, {times:.0f} times the output of a {name} layer",
        torch.allclose(growth, torch.full_like(growth, times), rtol=1e-3),
    )

# %% mystnb={"image": {"alt": "Four maps over x and y from minus 4 to 4. One plain unit: vertical stripes. One gated unit: flat on the left half; on the right half it rises upwards and falls downwards. Four plain units: the signs of a product, but contours that bend into right angles and reach only 4 in the corners. Two gated units: the hyperbolas of xy, up to plus and minus 16 in the corners."}, "figure": {"name": "fig-activations-product", "caption": "What a gate can do. One plain unit sees one direction; a gated unit lets $x$ decide how strongly it answers to $y$. Four plain units (22 parameters) only imitate a product near 0; two gated units (12 parameters) are one. Dashed lines are negative."}} tags=["hide-input"]
from annotated_src.figures.activations import draw_product, product_data

draw_product(product_data())

# %% [markdown]
# {numref}`fig-activations-product` shows why the gate pays: *if this feature is
# present, read that one* is a product. In a model the norm before the layer
# ({ref}`ch-norms`) keeps the squares from running away.
#
# ### The price: a third matrix
#
# A plain layer of the usual width $4D$ has two matrices, $8D^2$ weights. A gated layer
# has three. For the same budget its width must shrink:
#
# $$
# 3\,D\,F = 2\,D\,(4D) \iff F = \tfrac83 D.
# $$ (eq-activations-width)
#
# SmolLM2-135M has $D = 576$, and $\tfrac83 \cdot 576 = 1536$ is its $F$. For
# Llama-2-7B, $D = 4096$, that would be 10922.67; Meta's code cuts it to 10922 and
# rounds up to a multiple of 256: 11008.

# %%
# Check eq-activations-width.
with torch.device("meta"):  # shapes without memory
    plain = FeedForward(576, 4 * 576, silu)
    gated = GatedFeedForward(576, 1536, silu)
matrices = sum(p.numel() for p in plain.parameters() if p.ndim == 2)
confirm("SmolLM2's gate costs what width 4D would", count(gated) == matrices)
confirm("8/3 of 576 is 1536", 8 * 576 == 3 * 1536)
cut = int(2 * (4 * 4096) / 3)
print("Llama-2-7B:", cut, "->", math.ceil(cut / 256) * 256)
attention = 2 * 576 * 576 + 2 * 576 * 192  # q and out; k and v, 3 heads of 64
confirm("and has 3 times the weights of attention", count(gated) == 3 * attention)

# %% [markdown]
# ## The ladder of equality
#
# {py:func}`annotated_src.activations.gelu_exact` and its siblings against PyTorch's,
# then the layers against the original models' own classes with the same weights. Mind
# the names: in Hugging Face configurations `gelu` is the exact one, `gelu_new` and
# `gelu_pytorch_tanh` are the tanh.

# %%
show(gelu_exact, gelu_tanh, silu)

# %%
from transformers import GemmaConfig, LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP

x = 3 * torch.randn(2, 3, 6)
one = x[0, 0, 0].item()
by_hand = one * 0.5 * (1 + math.erf(one / math.sqrt(2)))
ours = gelu_exact(x)[0, 0, 0].item()
confirm("plain Python = gelu_exact", math.isclose(by_hand, ours))
confirm("gelu_exact = F.gelu", torch.allclose(gelu_exact(x), F.gelu(x)))
confirm(
    "gelu_tanh = F.gelu(approximate='tanh')",
    torch.allclose(gelu_tanh(x), F.gelu(x, approximate="tanh")),
)
confirm("silu = F.silu", torch.allclose(silu(x), F.silu(x)))
for key, ours in (
    ("gelu", gelu_exact),
    ("gelu_new", gelu_tanh),
    ("gelu_pytorch_tanh", gelu_tanh),
    ("quick_gelu", quick_gelu),
    ("silu", silu),
):
    same = torch.allclose(ACT2FN[key](x), ours(x))
    confirm(f"transformers' {key} = {ours.__name__}", same)

sizes = {"hidden_size": 6, "intermediate_size": 7, "num_attention_heads": 3}
for original, config, bend in (
    (LlamaMLP, LlamaConfig(**sizes), silu),
    (GemmaMLP, GemmaConfig(**sizes, hidden_act="gelu_pytorch_tanh"), gelu_tanh),
):
    theirs = original(config).requires_grad_(False)
    ours = GatedFeedForward(6, 7, bend).requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())  # the names agree too
    same = torch.allclose(ours(x), theirs(x))
    confirm(f"GatedFeedForward = {original.__name__}", same)

# %% [markdown]
# :::{admonition} Paper and code
# :class: paper-code
# In ChatGLM-6B's code the feed-forward class is called `GLU`. It has no gate: one
# matrix up, tanh GELU, one matrix down, with biases. A class `GEGLU` stands above it
# and is never used. It would halve the last dimension, since one half gates the other,
# and then the second matrix would not fit. The shapes in the checkpoint tell you which
# of the two you have.
# :::

# %%
with torch.device("meta"):
    chatglm = FeedForward(4096, 16384, gelu_tanh)
    geglu_style = GatedFeedForward(4096, 16384, gelu_exact)
    hidden = chatglm.up_proj(torch.empty(1, 1, 4096))
original_shapes = {  # mlp.dense_h_to_4h and mlp.dense_4h_to_h of ChatGLM-6B
    "up_proj.weight": (16384, 4096),
    "up_proj.bias": (16384,),
    "down_proj.weight": (4096, 16384),
    "down_proj.bias": (4096,),
}
shapes = {name: tuple(p.shape) for name, p in chatglm.state_dict().items()}
confirm("ChatGLM-6B's GLU has a plain layer's shapes", shapes == original_shapes)
names = geglu_style.state_dict().keys()
confirm("a gated layer has other parameters", names != shapes.keys())
half = hidden.chunk(2, dim=-1)[0].shape[-1]  # what GEGLU would hand on
print(f"GEGLU would leave {half} features; the second matrix takes 16384")
confirm("so GEGLU would not fit", half != chatglm.down_proj.in_features)

# %% [markdown]
# :::{admonition} Break it
# :class: break-it
# `gate_proj` and `up_proj` have the same shape. Load each into the other's place and
# nothing complains. What do you see?
# :::

# %%
torch.manual_seed(0)
right = GatedFeedForward(64, 4096, silu).requires_grad_(False)
for p in right.parameters():
    p.copy_(torch.randn(p.shape) / math.sqrt(p.shape[-1]))
gate_name, up_name = "gate_proj.weight", "up_proj.weight"
swapped = {gate_name: up_name, up_name: gate_name}
wrong_layer = GatedFeedForward(64, 4096, silu).requires_grad_(False)
wrong_layer.load_state_dict(
    {swapped.get(name, name): p for name, p in right.state_dict().items()}
)
x = torch.randn(4, 64, 64)
a, b = right(x).flatten(), wrong_layer(x).flatten()
print(f"spread      {a.std() / b.std():.1f}, right over wrong")
print(f"correlation {torch.corrcoef(torch.stack((a, b)))[0, 1]:.1f}")
close = torch.isclose(a, b, rtol=0.01, atol=0).double().mean()
confirm("fewer than 2 numbers in 100 are right to 1%", close < 0.02)

# %% [markdown]
# The same shape, the same spread, a correlation of 0.7: the output looks healthy. A
# comparison with the original, number by number, gives the mistake away at once. That
# is what the ladder is for.
#
# ## Exercises
#
# Write your function in a cell of your own and give it to `check`. A question takes its
# name and a letter: `check("bilinear_layer", "a")`.

# %%
from annotated_src.exercises import check  # noqa: F401 - for your cells
from annotated_src.exercises.activations import chapter as exercises

torch.set_default_dtype(torch.float32)  # as it was: the equations are checked

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("packed_feed_forward")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("packed_feed_forward")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
from transformers import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3MLP

solved = exercises["packed_feed_forward"].solution
x = torch.randn(2, 3, 6).double()
gate, up, down = layer.state_dict().values()
packed = solved(x, torch.cat((gate, up)), down)
confirm("packed = GatedFeedForward", torch.allclose(packed, layer(x)))
phi3 = Phi3MLP(Phi3Config(**sizes, pad_token_id=0)).double().requires_grad_(False)
packed = solved(x, phi3.gate_up_proj.weight, phi3.down_proj.weight)
confirm("packed = Phi3MLP", torch.allclose(packed, phi3(x)))

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("llama_ffn_dim")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("llama_ffn_dim")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
ffn_dim = exercises["llama_ffn_dim"].solution
confirm("Llama-2-7B", ffn_dim(4096, 256, 1.0) == LlamaConfig().intermediate_size)
confirm("Llama-2-70B", ffn_dim(8192, 4096, 1.3) == 28672)
confirm("Llama-3-8B", ffn_dim(4096, 1024, 1.3) == 14336)
confirm("SmolLM2-135M", ffn_dim(576, 256, 1.0) == 1536)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("bilinear_layer")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("bilinear_layer")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
x = torch.randn(2, 3, 6).double()
gate, up, down = layer.state_dict().values()


def bilinear(x, up=up):
    return ((x @ gate.T) * (x @ up.T)) @ down.T


confirm(
    "twice the input, four times the output",
    torch.allclose(bilinear(2 * x), 4 * bilinear(x)),
)
confirm(
    "with equal matrices too",
    torch.allclose(bilinear(2 * x, gate), 4 * bilinear(x, gate)),
)
doubled = GatedFeedForward(6, 14, silu).double().requires_grad_(False)
doubled.gate_proj.weight.copy_(torch.cat((gate, -gate)))
doubled.up_proj.weight.copy_(torch.cat((up, up)))
doubled.down_proj.weight.copy_(torch.cat((down, -down), dim=1))
confirm(
    "SwiGLU with twice the units is the same", torch.allclose(doubled(x), bilinear(x))
)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("exact_gelu")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("exact_gelu")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
for suspect in (gelu_tanh, quick_gelu, silu):
    gap = (suspect(grid) - gelu_exact(grid)).abs()
    at = grid[gap.argmax()].item()
    print(f"{suspect.__name__:10} differs by {gap.max():.4f}, most at {at:.2f}")
gap = (quick_gelu(grid) - gelu_exact(grid)).abs()
confirm("it is the quick GELU", abs(gap.max() - 0.0203) < 5e-5)
confirm("the tanh is 40 times closer", gap.max() > 40 * difference.max())

# %% [markdown]
# ## What to remember
#
# - Without a bend two matrices are one.
# - GELU is $x$ times the chance that a normal variable falls below $x$; SiLU is $x$
#   times its own sigmoid. Both dip below 0.
# - In the tanh GELU, $\sqrt{2/\pi}$ comes from the slope at 0, and 0.044715 is the best
#   fit to $\Phi$, not the Taylor coefficient 0.04554.
# - Exact and tanh differ by up to 0.00047: visible in float32, buried under rounding in
#   bfloat16.
# - A gate multiplies two projections of a token, and so computes products exactly.
# - Three matrices for the price of two: $F = \tfrac83 D$, rounded up.
#
# ## Where to read on
#
# - transformers, `modeling_llama.py`, `LlamaMLP`; `activations.py`, `ACT2FN`, for all
#   the names.
# - ChatGLM-6B, `modeling_chatglm.py`, `gelu_impl`, `GEGLU` and `GLU`.
# - Meta's `llama` repository, `llama/model.py`, `FeedForward`: the rounding of the
#   width.
# - Hendrycks and Gimpel {cite:p}`hendrycks2016`, section 2, one page; Shazeer
#   {cite:p}`shazeer2020`, a short paper with a disarming conclusion about why gates
#   help.
# - {ref}`ch-norms` is what stands before this layer, {ref}`ch-llama` puts it in its
#   block.
