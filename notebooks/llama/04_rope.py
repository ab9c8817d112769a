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
# (ch-rope)=
# # RoPE, derived
#
# :::{admonition} In this chapter
# :class: at-a-glance
# **45 minutes · demanding.** Afterwards you can derive rotary position embedding from a
# single demand, implement it in both layouts of the pairs, convert weights between the
# layouts, and say what each frequency is for.
# :::

# %% tags=["remove-input"]
from annotated_src.figures.model_map import ModelMap

ModelMap("rope")

# %% [markdown]
# :::{admonition} Predict before you run
# :class: predict
# A prompt sits at positions 0 to 8. You add 1000 to every position. How many of its
# attention scores change: none, some or all? Write your answer down.
# :::

# %%
import math
from functools import partial

import torch

from annotated_src.attention import Attention, attend
from annotated_src.masks import causal_mask, padded_causal_mask
from annotated_src.positions import padded_positions
from annotated_src.rotary import (
    apply_rotary,
    apply_rotary_interleaved,
    half_split_to_interleaved,
    interleaved_to_half_split,
    rope_frequencies,
    rope_tables,
    rotate_half,
    rows_to_half_split,
)
from annotated_src.show import confirm, show

torch.manual_seed(0)
F64 = torch.float64
same = partial(torch.allclose, rtol=0, atol=1e-10)
alike = partial(torch.allclose, rtol=0, atol=1e-5)  # attend's softmax is in float32

# %% [markdown]
# ## Without positions, attention is a bag
#
# This is what you need of attention here; {ref}`ch-attention` has the rest. Each token
# makes three vectors, a *query*, a *key* and a *value*. The dot product of one token's
# query with another's key is a *score* (from here on; the scores of the words at the end
# of the model are *logits*). A softmax turns a token's scores into weights,
# and the weighted mean of the values is its answer. A *mask* says which keys a token
# may see: those before it, and its own. A model does this several times side by side,
# each time with vectors of its own; each of these is a *head*.
#
# Nothing in {py:func}`annotated_src.attention.attend` asks where a key stands. Shuffle
# the earlier tokens, and the last token gets the same answer.

# %%
queries, keys, values = torch.randn(3, 2, 3, 9, 6, dtype=F64)  # (B, heads, T, H)
# B rows of T tokens, H features per head.
shuffle = [4, 7, 0, 2, 6, 1, 5, 3, 8]  # the last token stays
before = attend(queries, keys, values, causal_mask(9))[:, :, -1]
after = attend(
    queries[:, :, shuffle], keys[:, :, shuffle], values[:, :, shuffle], causal_mask(9)
)[:, :, -1]
confirm("shuffling the earlier tokens changes nothing", alike(before, after))

# %% [markdown]
# *Dog bites man* and *man bites dog* need a difference. The first transformers added a
# vector for each position to the embedding {cite:p}`vaswani2017`. RoPE
# {cite:p}`su2021` adds nothing: it **turns** queries and keys. Take the features of a
# head in pairs, and turn pair $i$ of the token at position $m$ by the angle
# $m\theta_i$. That is the whole method, and here it is as plain loops.


# %%
def turn_loops(x, positions, frequencies):
    out = torch.empty_like(x)
    for b in range(x.shape[0]):
        for head in range(x.shape[1]):
            for t in range(x.shape[2]):
                for i, theta in enumerate(frequencies.tolist()):
                    angle = positions[b, t].item() * theta
                    cos, sin = math.cos(angle), math.sin(angle)
                    x0, x1 = x[b, head, t, 2 * i], x[b, head, t, 2 * i + 1]
                    out[b, head, t, 2 * i] = cos * x0 - sin * x1
                    out[b, head, t, 2 * i + 1] = sin * x0 + cos * x1
    return out


positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [3, 5, 6, 7, 20, 0, 1, 2, 900]])
frequencies = rope_frequencies(6, 10_000.0).double()
tables = rope_tables(positions, frequencies, F64)
confirm(
    "the loops agree with apply_rotary_interleaved",
    same(
        turn_loops(queries, positions, frequencies),
        apply_rotary_interleaved(queries, *tables),
    ),
)

# %% [markdown]
# Why turning, and why by an angle *linear* in the position? The rest of the chapter
# shows that little else is possible.
#
# ## One demand
#
# Let $f(x, m)$ be the vector that takes the place of $x$ at position $m$. A word should
# matter to another by how far away it is, wherever the two stand. So scores may depend
# on positions through the distance only. Start with heads of two features, and read the
# pair $(x_0, x_1)$ as the complex number $x_0 + i\,x_1$. The dot product becomes
#
# $$
# \langle q, k \rangle = q_0 k_0 + q_1 k_1 = \operatorname{Re}(q\,\bar k).
# $$ (eq-rope-dot)

# %%
# Check eq-rope-dot.
q, k = torch.randn(2, 1000, dtype=torch.complex128)
dots = (torch.view_as_real(q) * torch.view_as_real(k)).sum(-1)
confirm("the dot product is Re(q times conjugate k)", same(dots, (q * k.conj()).real))

# %% [markdown]
# We make the demand on the whole product. (A score is its real part only. The exercise
# on blocks of two makes do with that, for linear maps, and arrives at the same place.)
#
# $$
# f(q, m)\,\overline{f(k, n)} = h(q, k, m - n)
# \quad\text{for all } q, k, m, n, \qquad f(x, 0) = x.
# $$ (eq-rope-demand)
#
# **Put $m = n$.** The right side is $h(q, k, 0)$ at every position, so it is what it is
# at position 0, namely $q\bar k$. With $k = q$ this says $|f(q, m)| = |q|$: *lengths
# cannot change*. What is left is a turn by some angle. Compare the phases of
# $f(q, m)\,\overline{f(k, m)} = q\bar k$: the angle that $q$ was turned by equals the
# angle that $k$ was turned by. So *one angle serves all vectors at a position*:
#
# $$
# f(x, m) = x\,e^{i\psi(m)}.
# $$ (eq-rope-phase)
#
# **Put $m = n + 1$.** Now the product is $q\bar k\,e^{i(\psi(n+1) - \psi(n))}$, and it
# must be the same for every $n$. So each step adds the same angle, call it $\theta$,
# and $\psi(0) = 0$. The angle is *linear* in the position:
#
# $$
# \psi(m) = m\theta, \qquad f(x, m) = x\,e^{im\theta}.
# $$ (eq-rope-linear)
#
# Each step ruled something out. Here are four candidates with $f(x, 0) = x$; three of
# them fall at one of the steps:


# %%
# Check eq-rope-demand, eq-rope-phase and eq-rope-linear.
def unit(angle):
    return torch.polar(torch.ones_like(angle), angle)


CANDIDATES = {
    "add e^(im) - 1": lambda x, m: x + unit(m) - 1,
    "stretch, turn": lambda x, m: x * (1 + m / 10) * unit(0.3 * m),
    "turn by m^2": lambda x, m: x * unit(0.3 * m**2),
    "turn by m": lambda x, m: x * unit(0.3 * m),
}
m = torch.arange(20, dtype=F64)[:, None]  # (20, 1), against 1000 vectors
report = {}
print(f"{'f(x, m)':15}{'keeps length':>14}{'one angle':>11}{'distance only':>15}")
for name, f in CANDIDATES.items():
    ratio = f(q, m) / q  # (20, 1000)
    product = f(q, m + 3) * f(k, m).conj()  # distance 3, at 20 places
    report[name] = (
        same(f(q, m).abs(), q.abs().expand(20, -1)),
        same(ratio / ratio.abs(), (ratio / ratio.abs())[:, :1].expand(-1, 1000)),
        same(product, product[:1].expand(20, -1)),
    )
    print(f"{name:15}" + "{!s:>14}{!s:>11}{!s:>15}".format(*report[name]))
confirm(
    "at position 0 all of them leave x alone",
    all(same(f(q, m)[0], q) for f in CANDIDATES.values()),
)
confirm("only the linear turn passes", [r[2] for r in report.values()] == [0, 0, 0, 1])

# %% [markdown]
# Put {eq}`eq-rope-linear` into the score, and the positions meet as a difference:
#
# $$
# \langle f(q, m), f(k, n) \rangle
# = \operatorname{Re}\!\left(q\bar k\, e^{i(m-n)\theta}\right)
# = |q||k| \cos\bigl((m - n)\theta + \arg q - \arg k\bigr).
# $$ (eq-rope-score)
#
# A pair scores as a wave over distance. Content sets the wave's height and its starting
# phase; $\theta$ sets its wavelength.

# %%
# Check eq-rope-score.
turn, theta = CANDIDATES["turn by m"], 0.3
for at, key_at in ((5, 2), (3, 11), (1005, 1002)):
    fq, fk = (turn(x, torch.tensor(p).double()) for x, p in ((q, at), (k, key_at)))
    wave = ((at - key_at) * theta + q.angle() - k.angle()).cos() * q.abs() * k.abs()
    confirm(
        f"query at {at}, key at {key_at}: a wave over their distance",
        same((fq * fk.conj()).real, wave),
    )

# %% [markdown]
# :::{admonition} A figure that moves: one pair, turned
# :class: moving rope-pair
# A query and a key, both of length 1, stand in a text of 25 tokens, and their pair turns
# once in 19.9 tokens. Query at 8, key at 4: the product is $-0.33$. Move the query alone,
# and the product runs along its wave; at 12 it is $-1.00$. Move both, and both arrows
# turn, but not the angle between them: the product is $-0.33$ at all 21 places where
# $m - n = 4$.
#
# **Try** the slowest pair, once in 198.7 tokens: how much do 4 tokens change?
# :::
#
# ## The same with matrices
#
# Multiplying by $e^{im\theta}$ is multiplying the pair by a rotation matrix,
#
# $$
# R_m = \begin{pmatrix} \cos m\theta & -\sin m\theta \\
#                       \sin m\theta & \phantom{-}\cos m\theta \end{pmatrix},
# $$ (eq-rope-matrix)
#
# and what we derived turns into two facts about rotations. They undo themselves by
# transposing, and they add up their angles:
#
# $$
# R_m^\top R_m = I, \qquad R_m^\top R_n = R_{n-m}, \qquad
# \langle R_m q, R_n k \rangle = q^\top R_m^\top R_n\, k = q^\top R_{n-m}\, k.
# $$ (eq-rope-inner)
#
# The difference has changed its sign, because here the turn acts on $k$ and in
# {eq}`eq-rope-score` it acted on $q$.


# %%
# Check eq-rope-matrix and eq-rope-inner.
def rotation(angle):
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.tensor([[cos, -sin], [sin, cos]], dtype=F64)


pair_q, pair_k = torch.view_as_real(q[0]), torch.view_as_real(k[0])
R = {p: rotation(p * theta) for p in (7, 4, -3)}
turned = torch.view_as_real(turn(q[0], torch.tensor(7.0, dtype=F64)))
confirm("R turns the pair as e^(im theta) does", same(R[7] @ pair_q, turned))
confirm("R is orthogonal: lengths stay", same(R[7].T @ R[7], torch.eye(2, dtype=F64)))
confirm("the transpose turns back: R7' R4 = R(-3)", same(R[7].T @ R[4], R[-3]))
score = (R[7] @ pair_q) @ (R[4] @ pair_k)
confirm("the score sees the distance only", same(score, pair_q @ R[-3] @ pair_k))

# %% [markdown]
# A head has $d$ features ($H$ in the shapes; $d$ is the papers' letter): that makes $d/2$
# pairs, each with its own frequency. The big matrix has the small matrices along its
# diagonal and zeros elsewhere:
#
# $$
# R_m = \begin{pmatrix} R_m^{(0)} & & \\ & \ddots & \\ & & R_m^{(d/2-1)} \end{pmatrix},
# \qquad \theta_i = \text{base}^{-2i/d}, \quad i = 0, \dots, d/2 - 1.
# $$ (eq-rope-blocks)
#
# (Mind a name: what configurations call `rope_theta` is the base, not a $\theta_i$.)
#
# Block by block, {eq}`eq-rope-inner` holds as it stands. A score is the sum of its
# pairs' waves. Most of $R_m$ is zero, so nobody multiplies by it. Two products with
# tables do the same work, $\odot$ being element by element:
#
# $$
# R_m x = x \odot c_m + J x \odot s_m,
# $$ (eq-rope-tables)
#
# where $c_m$ and $s_m$ hold the cosine and the sine of each feature's angle, and $J$
# turns each pair by 90 degrees: $(a, b)$ becomes $(-b, a)$.

# %%
# Check eq-rope-blocks and eq-rope-tables.
d, base, m = 6, 10_000.0, 17
thetas = torch.tensor([base ** (-2 * i / d) for i in range(d // 2)], dtype=F64)
gap = (thetas / rope_frequencies(d, base).double() - 1).abs().max()
confirm("the frequencies are base^(-2i/d), to float32's precision", gap < 1e-6)

R17 = torch.block_diag(*(rotation(m * t) for t in thetas.tolist()))
J = torch.block_diag(*[rotation(math.pi / 2)] * 3)
c, s = ((m * thetas).cos(), (m * thetas).sin())
c, s = c.repeat_interleave(2), s.repeat_interleave(2)
x = torch.randn(d, dtype=F64)
confirm("two table products replace the matrix", same(R17 @ x, x * c + (J @ x) * s))
by_package = apply_rotary_interleaved(
    x[None, None, None], *rope_tables(torch.tensor([[m]]), thetas, F64)
)
confirm("apply_rotary_interleaved is that matrix", same(by_package[0, 0, 0], R17 @ x))

# %% [markdown]
# ## Small enough to see
#
# Two pairs, one turning by 90 degrees per position and one by 45. Think of each pair as
# the hand of a clock: the vector $(1, 0, 1, 0)$ has both hands at angle zero. Each row
# below is one position.

# %%
slow_turn = torch.tensor([math.pi / 2, math.pi / 4], dtype=F64)
small_tables = rope_tables(torch.arange(5)[None], slow_turn, F64)
ones = torch.tensor([1, 0, 1, 0], dtype=F64).expand(1, 1, 5, 4)
turned = apply_rotary_interleaved(ones, *small_tables)[0, 0]


def table(matrix):
    for row in matrix.tolist():
        print("".join(f"{round(value, 2) + 0.0:7.2f}" for value in row))


table(turned)

# %% [markdown]
# The scores of every query position (row) with every key position (column). Read along
# a diagonal: the distance is the same, and so is the number.

# %%
scores = turned @ turned.T
table(scores)
confirm(
    "every diagonal is constant",
    all(same(line, line[:1]) for line in map(scores.diagonal, range(-4, 5))),
)

# %% [markdown]
# With random content, 24 positions and a base of 100, {numref}`fig-rope-scores` shows
# the same stripes. Beside it, the older way: sinusoids added to the vectors.

# %% mystnb={"image": {"alt": "Two square heat maps of scores, the query's position down and the key's position across, 24 by 24. Left, with sinusoids added, the colours form irregular patches; along the outlined diagonal of distance 6 the score runs from -0.9 to 9.7. Right, with RoPE, the map is made of even diagonal stripes; along the same diagonal the score is always 2.3."}, "figure": {"name": "fig-rope-scores", "caption": "One query vector and one key vector, placed at every pair of positions. Only when they are turned is the score a function of distance."}} tags=["hide-input"]
from annotated_src.figures.rope import draw_scores, scores_data

draw_scores(scores_data())

# %% [markdown]
# ## The annotated source
#
# Tables once per call, then two products per layer. Features come in two layouts, of
# which more below; R counts the pairs.

# %%
show(rope_frequencies, rope_tables, apply_rotary_interleaved)

# %% [markdown]
# ## Many frequencies
#
# One pair is a poor clock: it cannot tell distance 0 from a full turn. Hence many
# pairs, as a watch has several hands. Pair $i$ comes round after
#
# $$
# \lambda_i = \frac{2\pi}{\theta_i} = 2\pi\,\text{base}^{\,2i/d} \text{ positions.}
# $$ (eq-rope-wavelength)

# %%
# Check eq-rope-wavelength.
i = torch.arange(32, dtype=F64)
wavelengths = {}
for base in (10_000.0, 100_000.0):
    wavelengths[base] = 2 * math.pi / rope_frequencies(64, base).double()
    formula = 2 * math.pi * base ** (2 * i / 64)
    ratio = wavelengths[base] / formula
    confirm(f"base {base:,.0f}: 2 pi base^(2i/d)", ((ratio - 1).abs() < 1e-6).all())
print("tokens per turn, heads of 64 features")
print("pair   base 10,000   base 100,000")
for pair in (0, 8, 16, 19, 20, 24, 25, 31):
    small, large = (lengths[pair].item() for lengths in wavelengths.values())
    print(f"{pair:4}{small:14,.0f}{large:15,.0f}")
for base, lengths in wavelengths.items():
    turns, unwrapped = (lengths <= 8192).sum(), (lengths >= 2 * 8192).sum()
    print(f"base {base:,.0f}: {turns} of 32 pairs complete a turn in 8192 tokens,")
    print(f"    {unwrapped} do not complete half a turn")

# %% [markdown]
# SmolLM2-135M {cite:p}`allal2025` has heads of 64 features, a context of 8192 and base
# 100,000. Its first 20 pairs come round within the context; ten do not make half a
# turn. The fast pairs separate neighbours, but at long range they have lapped many
# times: theirs is the second hand of a watch, no help for the hour. The slow ones never
# lap. Between equal contents, their score falls at every step from distance 0 to 8192.
# **Slow pairs carry long distance**, and a larger base makes more: ten, not four.
# {numref}`fig-rope-clocks` draws a smaller head, with eight pairs, as clocks.

# %%
slow = wavelengths[100_000.0] >= 2 * 8192
angles = torch.arange(8193, dtype=F64)[:, None] * (2 * math.pi / wavelengths[100_000.0])
falls = (angles.cos().diff(dim=0) < 0).all(dim=0)
confirm("the ten slow pairs, and no others, fall all the way", torch.equal(falls, slow))

# %% mystnb={"image": {"alt": "A grid of clock dials: a column for each of 8 pairs, from 6.3 tokens per turn on the left to 19,869 on the right, and a row for each of positions 0, 1, 2, 3, 10, 100 and 1000. Left hands turn fast, right hands hardly move; after a full turn the dial is filled. Below, two more rows hold two hands each: query at 13 with key at 10, and query at 1013 with key at 1010. The hands stand elsewhere, but the angle between them is the same in both rows: 172, 54, 17, 5.4 degrees and so on."}, "figure": {"name": "fig-rope-clocks", "caption": "A head of 16 features as eight clocks, base 10,000. Hands start at noon and are drawn running clockwise; a filled dial has gone round at least once. Two pairs to the right means ten times slower, as with the digits of a decimal number. Below: three tokens apart, here or a thousand positions later."}} tags=["hide-input"]
from annotated_src.figures.rope import clocks_data, draw_clocks

draw_clocks(clocks_data())

# %% [markdown]
# ## Scores fade with distance, on the whole
#
# Give every pair the same content, all ones. The waves agree at distance 0 and drift
# apart with distance $s$. Per feature, the score is
#
# $$
# \frac{1}{d}\,\langle R_m \mathbf 1, R_n \mathbf 1 \rangle
# = \frac{2}{d} \sum_{i=0}^{d/2-1} \cos(s\,\theta_i), \qquad s = m - n.
# $$ (eq-rope-ones)
#
# The paper's section 3.4.3 bounds the score of *any* content. (Mind the letter: as an
# index, $i$ counts pairs; in $e^{is\theta_i}$ the first $i$ is the imaginary unit.) Let
# $h_i = q_i \bar k_i$ for pair $i$, $h_{d/2} = 0$, and let
# $S_j = \sum_{i<j} e^{is\theta_i}$ be the sum of the first $j$ waves. Then
# $e^{is\theta_i} = S_{i+1} - S_i$. Put that in and collect the terms with the same
# $S_j$: the sum of $h_i e^{is\theta_i}$ becomes the sum of $(h_{j-1} - h_j)\,S_j$.
# Hence
#
# $$
# \Bigl|\sum_{i=0}^{d/2-1} h_i\, e^{is\theta_i}\Bigr|
# \;\le\; \max_i |h_{i+1} - h_i| \; \sum_{j=1}^{d/2} |S_j|.
# $$ (eq-rope-bound)
#
# The score is the real part of the sum on the left, so it obeys the same bound. On the
# right, content is in the first factor, distance in the second.

# %%
# Check eq-rope-ones and eq-rope-bound.
thetas = rope_frequencies(64, 10_000.0).double()
ones = torch.ones(1, 1, 1, 64, dtype=F64)
h = torch.randn(500, 32, dtype=torch.complex128)
ends = torch.cat((h, torch.zeros_like(h[:, :1])), dim=1)  # h with h_{d/2} = 0
step = ends.diff(dim=1).abs().amax(dim=1)  # (500,)
for s in (1, 30, 3000):
    at, key_at = (
        apply_rotary_interleaved(ones, *rope_tables(torch.tensor([[p]]), thetas, F64))
        for p in (s + 5, 5)
    )
    mean_wave = (s * thetas).cos().mean()
    confirm(
        f"distance {s}: a mean of cosines", same((at * key_at).sum() / 64, mean_wave)
    )
    waves = unit(s * thetas)
    bound = step * waves.cumsum(dim=0).abs().sum()
    confirm("    and the bound holds", ((h @ waves).abs() <= bound).all())

# %% mystnb={"image": {"alt": "Two panels. Left, the paper's bound against distance 0 to 256: it drops from 1 to about 0.5 within 20 positions, then falls unevenly, with bumps, to between 0.2 and 0.4. Right, the score of all-ones vectors against distance 1 to 8192 on a logarithmic scale: the means fall almost as straight lines, to about 0 with base 10,000 and to about 0.17 with base 100,000, with noise around them that grows."}, "figure": {"name": "fig-rope-decay", "caption": "Both curves for heads of 64 features, relative to distance 0. Thick lines are means over octaves of distance. The larger base fades later."}} tags=["hide-input"]
from annotated_src.figures.rope import decay_data, draw_decay

draw_decay(decay_data())

# %% [markdown]
# Both curves in {numref}`fig-rope-decay` fall, and neither falls smoothly. Nor is a
# bound a law: content can start the waves apart so that they meet elsewhere. A head
# that wants to look 100 tokens back can.

# %%
# The query asks for a key with this content, turned back by 100 positions beforehand:
# a turn that W_q could have built in.
wanted = torch.randn(1, 1, 1, 64, dtype=F64)
query = apply_rotary_interleaved(
    wanted, *rope_tables(torch.tensor([[-100]]), thetas, F64)
)
everywhere = rope_tables(torch.arange(1001)[None], thetas, F64)
keys_everywhere = apply_rotary_interleaved(wanted.expand(1, 1, 1001, 64), *everywhere)
query_there = apply_rotary_interleaved(
    query, *rope_tables(torch.tensor([[1000]]), thetas, F64)
)
best = (query_there @ keys_everywhere.mT).argmax().item()
confirm("a query at position 1000 prefers the key at 900", best == 900)

# %% [markdown]
# ## Which features form a pair?
#
# The derivation never said. Two answers are in use. The paper, Meta's code and the GGUF
# files of Llama models pair neighbours, $2i$ with $2i+1$: **interleaved**. Hugging
# Face's Llama pairs $i$ with $i + d/2$: **half-split**. There, $J$ is {py:func}`annotated_src.rotary.rotate_half`,
# which moves two blocks instead of picking every other feature.

# %%
show(rotate_half, apply_rotary, interleaved_to_half_split)

# %% [markdown]
# A permutation $P$ of the features leads from one to the other. The same $P$ acts on
# queries and keys, $P^\top P = I$, and so no score changes:
#
# $$
# R^{\text{half}} = P\,R\,P^\top, \qquad
# \langle R_m^{\text{half}} P q,\; R_n^{\text{half}} P k \rangle
# = \langle P R_m q,\; P R_n k \rangle = \langle R_m q, R_n k \rangle.
# $$ (eq-rope-permute)

# %%
# Check eq-rope-permute.
x, P = torch.arange(6), interleaved_to_half_split(torch.eye(6, dtype=F64)).T
print("interleaved", x.tolist(), "becomes", interleaved_to_half_split(x).tolist())
confirm(
    "and back", torch.equal(half_split_to_interleaved(interleaved_to_half_split(x)), x)
)
at_17 = rope_tables(torch.tensor([[17]]), frequencies, F64)
basis = torch.eye(6, dtype=F64)[None, :, None]  # one basis vector per head
R_inter = apply_rotary_interleaved(basis, *at_17)[0, :, 0].T
R_half = apply_rotary(basis, *at_17)[0, :, 0].T
confirm("P is orthogonal", same(P.T @ P, torch.eye(6, dtype=F64)))
confirm("R_half = P R P'", same(R_half, P @ R_inter @ P.T))

inter = [apply_rotary_interleaved(x, *tables) for x in (queries, keys)]
half = [apply_rotary(interleaved_to_half_split(x), *tables) for x in (queries, keys)]
confirm("all scores are the same", same(inter[0] @ inter[1].mT, half[0] @ half[1].mT))

# %% [markdown]
# Since $q = Wx$, permuting $q$ is permuting the rows of $W$, head by head, once, when
# the checkpoint is converted. Only the query and key projections: values are never
# turned. Note the two head counts, for a model with fewer key heads than query heads
# ({ref}`ch-heads`).

# %%
show(rows_to_half_split)

# %%
paper = Attention(24, num_heads=6, num_kv_heads=2, head_dim=8, bias=False).double()
converted = Attention(24, num_heads=6, num_kv_heads=2, head_dim=8, bias=False).double()
weights = paper.state_dict()
weights["q_proj.weight"] = rows_to_half_split(weights["q_proj.weight"], 6)
weights["k_proj.weight"] = rows_to_half_split(weights["k_proj.weight"], 2)
converted.load_state_dict(weights)

hidden = torch.randn(2, 9, 24, dtype=F64)
cos, sin = rope_tables(positions, rope_frequencies(8, 10_000.0).double(), F64)
interleaved = partial(apply_rotary_interleaved, cos=cos, sin=sin)
half_split = partial(apply_rotary, cos=cos, sin=sin)
with torch.no_grad():
    wanted = paper(hidden, interleaved, causal_mask(9))
    found = converted(hidden, half_split, causal_mask(9))
confirm("converted weights, other layout, same output", alike(wanted, found))

# %% [markdown]
# :::{admonition} Break it
# :class: break-it
# Forget the conversion: interleaved weights in half-split code. What will you notice?
# :::

# %%
with torch.no_grad():
    wrong_output = paper(hidden, half_split, causal_mask(9))
    raw = paper.split_heads(paper.q_proj(hidden))
wrong_queries = half_split(raw)
confirm("no crash, and the shape is right", wrong_output.shape == wanted.shape)
lengths = interleaved(raw).norm(dim=-1)
confirm("every query has its length", same(wrong_queries.norm(dim=-1), lengths))
confirm("the first token is right", alike(wrong_output[:, 0], wanted[:, 0]))
off = (wrong_output - wanted).norm(dim=-1) / wanted.norm(dim=-1)
print("relative error by token:", *(f"{error:.2f}" for error in off[0].tolist()))
confirm("every later token is wrong", (off[:, 1:] > 0.001).all())

# %% [markdown]
# The first token sees only itself, at distance 0, where every layout agrees. So a
# one-token test passes, and norms look right. Test a conversion with several tokens,
# against the original.
#
# ## Which numbers may be positions?
#
# Any, as long as their *differences* are meant.


# %%
def attention_at(positions, queries, keys, values, mask):
    tables = rope_tables(positions, frequencies, F64)
    return attend(
        apply_rotary(queries, *tables), apply_rotary(keys, *tables), values, mask
    )


at = partial(attention_at, queries=queries, keys=keys, values=values)
line = torch.arange(9).expand(2, -1)
plain = at(line, mask=causal_mask(9))
confirm(
    "moving a prompt by 1000 changes nothing",
    alike(at(line + 1000, mask=causal_mask(9)), plain),
)
confirm(
    "shuffling it now does", not alike(at(line[:, shuffle], mask=causal_mask(9)), plain)
)

# %% [markdown]
# That answers the prediction: none, rounding aside. Three uses follow. **Left padding**
# (short rows of a batch are filled up in front, {ref}`ch-attention`): a row of four
# tokens behind five pads may count its tokens from 0, or from 5, as long as the mask
# hides the pads. **Restarts**: two documents packed in one row each count from 0, when
# a mask keeps them apart. **Gaps**: tokens dropped from a cache ({ref}`ch-cache`) leave holes; those that
# stay keep their numbers and their scores. Rows of a batch need not agree.

# %%
# Left padding: row 1 has five pads, then four tokens.
is_token = torch.tensor([[True] * 9, [False] * 5 + [True] * 4])
mask = padded_causal_mask(is_token, 9)
print("counted by token:", padded_positions(is_token)[1].tolist())
counted, by_column = at(padded_positions(is_token), mask=mask), at(line, mask=mask)
confirm(
    "left padding: both ways of counting agree",
    alike(counted[1, :, 5:], by_column[1, :, 5:]),
)
alone = attention_at(
    torch.arange(4)[None],
    *(x[1:, :, 5:] for x in (queries, keys, values)),
    causal_mask(4),
)
confirm("and the padded row is what it is alone", alike(counted[1:, :, 5:], alone))

# Restarts: five tokens of one document, then four of another.
document = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1])
apart = causal_mask(9) & (document[:, None] == document)
restarted = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]]).expand(2, -1)
packed = at(restarted, mask=apart)
confirm(
    "restarts: the second document is what it is alone", alike(packed[1:, :, 5:], alone)
)

# Gaps: drop tokens 2 to 4, against hiding them by the mask.
stay = [0, 1, 5, 6, 7, 8]
mask = causal_mask(9).clone()
mask[..., 2:5] = False
short = attention_at(
    line[:, stay], *(x[:, :, stay] for x in (queries, keys, values)), causal_mask(6)
)
confirm(
    "gaps: dropped is the same as hidden", alike(short, at(line, mask=mask)[:, :, stay])
)

# %% [markdown]
# ## Turning only some features
#
# Phi-2 turns the first 32 of its 80 features and passes 48 on. These compare content at
# any distance. Mind the exponent: $d$ in {eq}`eq-rope-blocks` is then 32, not 80. In
# this package the tables decide: R pairs in them, $2R$ features turn.

# %%
wide = torch.randn(2, 3, 9, 80, dtype=F64)
partly = rope_tables(positions, rope_frequencies(32, 10_000.0).double(), F64)
out = apply_rotary(wide, *partly)
confirm(
    "the first 32 features turn",
    same(out[..., :32], apply_rotary(wide[..., :32], *partly)),
)
confirm("the other 48 pass", torch.equal(out[..., 32:], wide[..., 32:]))

# %% [markdown]
# ## Angles need float32
#
# An angle of 2000 radians counts only modulo a turn, so its *absolute* error matters.
# float16 keeps 11 bits: between 1024 and 2048 its numbers are one apart. So
# {py:func}`annotated_src.rotary.rope_tables` multiplies in float32, and casts only the
# finished cosines and sines.

# %%
exact = 10_000.0 ** (-torch.arange(32, dtype=F64) / 32)
worst = {}
print("largest error of an angle, in radians")
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for at_position in (10, 2040):
        theta = rope_frequencies(64, 10_000.0).to(dtype)
        angles = torch.tensor(at_position, dtype=dtype) * theta
        error = (angles.double() - exact * at_position).abs().max().item()
        worst[dtype, at_position] = error
        shown = f"{error:.2f}" if error > 0.01 else "below 0.01"
        print(f"{dtype!s:16}at position {at_position:<6}{shown}")
confirm("float32 is right to 0.001", worst[torch.float32, 2040] < 0.001)

# %% [markdown]
# In float16 that is 0.82 radians, or 47 degrees, at one pair. In bfloat16 the hand may
# point the opposite way. A short test, ten tokens long, shows hardly anything.
#
# ## The ladder of equality
#
# Loops, complex numbers, both layouts, and transformers' own classes: batch of two,
# positions that are not `arange`, a base that is not 10,000, six query heads on two key
# heads.

# %%
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.models.phi.configuration_phi import PhiConfig
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

q, k = torch.randn(2, 6, 9, 12), torch.randn(2, 2, 9, 12)
frequencies = rope_frequencies(12, 50_000.0)
cos, sin = rope_tables(positions, frequencies, torch.float32)
by_loops = turn_loops(q, positions, frequencies)
close = partial(torch.allclose, atol=3e-4)  # float32 angles of up to 900 radians

# A pair as one complex number, times e^(i m theta).
turns = torch.polar(torch.ones(()), positions[:, None, :, None] * frequencies)
numbers = torch.view_as_complex(q.unflatten(-1, (-1, 2)))
by_complex = torch.view_as_real(numbers * turns).flatten(-2)
confirm("loops = complex multiplication", close(by_loops, by_complex))

by_pairs = apply_rotary_interleaved(q, cos, sin)
confirm("= apply_rotary_interleaved", close(by_complex, by_pairs))

by_halves = apply_rotary(interleaved_to_half_split(q), cos, sin)
confirm(
    "= apply_rotary, permuted", close(half_split_to_interleaved(by_halves), by_pairs)
)

# The original: its own tables, its own rotation.
rope = {"rope_type": "default", "rope_theta": 50_000.0}
config = LlamaConfig(
    hidden_size=72,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=12,
    rope_parameters=rope,
)
cos_hf, sin_hf = LlamaRotaryEmbedding(config)(q, positions)
q_hf, k_hf = apply_rotary_pos_emb(q, k, cos_hf, sin_hf)
confirm("transformers' queries = apply_rotary", close(q_hf, apply_rotary(q, cos, sin)))
confirm("transformers' keys = apply_rotary", close(k_hf, apply_rotary(k, cos, sin)))

phi = PhiConfig(hidden_size=160, num_attention_heads=2, partial_rotary_factor=0.4)
theirs, ours = PhiRotaryEmbedding(phi).inv_freq, rope_frequencies(32, 10_000.0)
confirm(
    "Phi's frequencies are those of 32 features", ((theirs - ours).abs() < 1e-6).all()
)

# %% [markdown]
# :::{admonition} Paper and code
# :class: paper-code
# **Order of the cosines.** The paper's equation 34 lists
# $\cos m\theta_1, \cos m\theta_1, \cos m\theta_2, \cos m\theta_2, \dots$ and
# Hugging Face's code $\cos m\theta_1, \cos m\theta_2, \dots, \cos m\theta_1,
# \cos m\theta_2, \dots$ (the paper counts pairs from 1). You may read that the
# difference is a permuted order of frequencies. That is half of it: the *pairing* is
# permuted too. Take the paper's cosines with Hugging Face's `rotate_half` and it is no
# rotation at all: lengths change. You may also read that the frequencies begin with 0;
# they begin with $\text{base}^0 = 1$.
#
# **First position.** The paper numbers tokens from 1, code from 0. Moving all positions
# by one changes no score.
# :::

# %%
x, (cos, sin) = queries, tables  # float64, heads of 6 features
paper_cos, paper_sin = (t.repeat_interleave(2, dim=-1) for t in (cos, sin))
hf_cos, hf_sin = (torch.cat((t, t), dim=-1) for t in (cos, sin))
proper = x * hf_cos + rotate_half(x) * hf_sin
mixed = x * paper_cos + rotate_half(x) * paper_sin
confirm("Hugging Face's order keeps lengths", same(proper.norm(dim=-1), x.norm(dim=-1)))
confirm(
    "the paper's order with rotate_half does not",
    not same(mixed.norm(dim=-1), x.norm(dim=-1)),
)
confirm("the first frequency is 1, not 0", rope_frequencies(64, 10_000.0)[0] == 1)
frequencies = rope_frequencies(6, 10_000.0).double()
from_one = at(line + 1, mask=causal_mask(9))
confirm("counting from 1 changes nothing", alike(from_one, plain))

# %% [markdown]
# ## Exercises
#
# Write your function in a cell of your own and give it to `check`. A question takes its
# name and a letter: `check("powers_of_one_matrix", "a")`.

# %%
from annotated_src.exercises import check  # noqa: F401 - for your cells
from annotated_src.exercises.rope import chapter as exercises

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("apply_rope")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("apply_rope")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
x, frequencies = torch.randn(2, 6, 9, 12), rope_frequencies(12, 50_000.0)
by_package = apply_rotary(x, *rope_tables(positions, frequencies, torch.float32))
by_solution = exercises["apply_rope"].solution(x, positions, 50_000.0)
confirm("the solution is apply_rotary", close(by_solution, by_package))

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("rows_to_interleaved")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("rows_to_interleaved")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
weight = torch.randn(48, 24)
there = rows_to_half_split(weight, 6)
confirm(
    "it undoes rows_to_half_split",
    torch.equal(exercises["rows_to_interleaved"].solution(there, 6), weight),
)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("score_at")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("score_at")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
q, k = torch.randn(2, 6, dtype=F64)
frequencies = rope_frequencies(6, 10_000.0).double()
turned_q, turned_k = (
    apply_rotary_interleaved(
        x[None, None, None], *rope_tables(torch.tensor([[p]]), frequencies, F64)
    )
    for x, p in ((q, 907), (k, 900))
)
waves = exercises["score_at"].solution(q, k, 7, frequencies)
confirm("at 907 and 900: a sum of waves", same(waves, (turned_q * turned_k).sum()))

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("powers_of_one_matrix")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("powers_of_one_matrix")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
A = torch.linalg.qr(torch.randn(5, 5, dtype=F64)).Q  # orthogonal
power = partial(torch.linalg.matrix_power, A)
confirm(
    "powers of A: distance only",
    same(power(9).mT @ power(7), power(4).mT @ power(2)),
)
confirm(
    "stretched, no longer",
    not same(1.1**16 * power(9).mT @ power(7), 1.1**6 * power(4).mT @ power(2)),
)
eigenvalues = torch.linalg.eigvals(A)
real = eigenvalues[eigenvalues.imag.abs() < 1e-10].real
confirm(
    "A is made of turns of two, and of 1 or -1",
    same(eigenvalues.abs(), torch.ones(5, dtype=F64))
    and len(real) % 2 == 1
    and same(real.abs(), torch.ones_like(real)),
)
spin = torch.linalg.qr(torch.randn(3, 3, dtype=F64)).Q
spin = spin * spin.det()  # a turn of three, no mirror
axis = torch.linalg.eigvals(spin) - 1
confirm("a turn of three has an axis that stays", axis.abs().min() < 1e-10)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("convert_heads")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("convert_heads")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
small = Attention(24, num_heads=6, num_kv_heads=3, head_dim=8, bias=False).double()
patient = Attention(24, num_heads=6, num_kv_heads=3, head_dim=8, bias=False).double()
exercise = exercises["convert_heads"]
with torch.no_grad():
    healthy = small(hidden, interleaved, causal_mask(9))
    patient.load_state_dict(exercise.given(small.state_dict(), 6, 3))
    sick = patient(hidden, half_split, causal_mask(9))
    patient.load_state_dict(exercise.solution(small.state_dict(), 6, 3))
    cured = patient(hidden, half_split, causal_mask(9))
confirm("the colleague's first token is right", alike(sick[:, 0], healthy[:, 0]))
confirm("the others are not", not alike(sick[:, 1:], healthy[:, 1:]))
confirm("mended, all are", alike(cured, healthy))

# %% [markdown]
# ## What to remember
#
# - One demand, that scores depend on distance only, forces a turn by an angle linear in
#   position.
# - $R_m^\top R_n = R_{n-m}$ is the whole proof. Lengths never change; values never
#   turn.
# - Fast pairs tell neighbours apart, slow pairs carry long distance; a larger base
#   makes more slow pairs.
# - Interleaved and half-split are one model up to a permutation of q and k rows. Mixed
#   up, nothing crashes; test with more than one token.
# - Any positions will do if their differences are right. Form angles in float32.
#
# ## Where to read on
#
# - {cite:t}`su2021`: the derivation is section 3.4.1, the tables equation 34, the bound
#   section 3.4.3.
# - transformers, `modeling_llama.py`: `LlamaRotaryEmbedding`, `rotate_half`,
#   `apply_rotary_pos_emb`; `convert_llama_weights_to_hf.py` (in the repository, not in
#   the installed package): `permute`.
# - Meta's Llama, `model.py`: `precompute_freqs_cis`, `apply_rotary_emb`, in complex
#   numbers.
# - ChatGLM-6B, `modeling_chatglm.py`: `RotaryEmbedding`, and `SelfAttention`, which
#   turns one half of a head by one position and the other half by another.
# - Here: {ref}`ch-attention` for what scores do next, {ref}`ch-cache` for why keys are
#   cached after turning.
