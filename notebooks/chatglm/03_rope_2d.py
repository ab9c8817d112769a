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
# (ch-rope-2d)=
# # RoPE in two dimensions
#
# :::{admonition} In this chapter
# :class: at-a-glance
# **45 minutes · moderate.** Afterwards you can turn one head by two positions, say what
# each half of it sees, compute how far half precision moves an angle, and explain why a
# faithful port has to be wrong in the same way.
# :::

# %% tags=["remove-input"]
from annotated_src.figures.model_map import ChatGLMMap

ChatGLMMap("rope")

# %% [markdown]
# :::{admonition} Predict before you run
# :class: predict
# You port ChatGLM-6B to float32, and compute every rotary angle as exactly as you can.
# The original, run in float32 too, has computed its own. By how much do the two differ
# at position 2040, at most: 0.0003 radians, 0.01 or 0.3? And whose should you keep?
# :::

# %%
import math
from functools import partial

import torch
from torch.nn import functional as F

from annotated_src.checkpoint import names_by_layer
from annotated_src.figures import rope_2d as figures
from annotated_src.golden import golden, golden_model
from annotated_src.masks import prefix_mask
from annotated_src.models.chatglm import HF_NAMES
from annotated_src.positions import context_lengths, prompt_positions
from annotated_src.rotary import (
    apply_rotary,
    apply_rotary_interleaved,
    rope_frequencies,
    rope_tables,
    rotate_half,
)
from annotated_src.rotary_2d import (
    apply_rotary_2d,
    half_frequencies,
    rope_table,
    rotation,
    table_rows,
)
from annotated_src.show import confirm, show

torch.manual_seed(0)
F64 = torch.float64
same = partial(torch.allclose, rtol=0, atol=1e-10)

# %% [markdown]
# ## Two numbers, one head
#
# A token of ChatGLM-6B has two positions ({ref}`ch-blanks`). Its *place* says where in
# the text it belongs; all of an answer belongs where the blank is. Its *step* says how
# far into the answer it is: 0 before the answer, then 1, 2, 3 and so on.

# %%
words, ids = figures.WORDS, figures.sentence_ids()
positions = prompt_positions(ids, figures.IDS, rows=2)  # (B, 2, T)
place, step = positions[0]
print("        " + "".join(f"{word:>7}" for word in words))
print("place   " + "".join(f"{p:7}" for p in place.tolist()))
print("step    " + "".join(f"{s:7}" for s in step.tolist()))

# %% [markdown]
# RoPE ({ref}`ch-rope`) turns a query by *one* position. What to do with two? Cut the
# head in the middle. **The first half turns by place, the second half by step**, each
# as if it were a head of its own, half as wide. As plain loops, with pairs half-split
# *within* each half:


# %%
def turn_2d_loops(x, positions, frequencies):
    """positions (B, 2, T); frequencies of half a head."""
    out = torch.empty_like(x)
    pairs = len(frequencies)
    for b in range(x.shape[0]):
        for head in range(x.shape[1]):
            for t in range(x.shape[2]):
                for row in (0, 1):  # place turns the first half, step the second
                    for i, theta in enumerate(frequencies.tolist()):
                        angle = positions[b, row, t].item() * theta
                        cos, sin = math.cos(angle), math.sin(angle)
                        first = 2 * pairs * row + i
                        second = first + pairs
                        u, v = x[b, head, t, first], x[b, head, t, second]
                        out[b, head, t, first] = cos * u - sin * v
                        out[b, head, t, second] = sin * u + cos * v
    return out


def exact_rotation(positions, head_dim, dtype=F64, base=10_000.0):
    """Turn by angles formed in float64; only cosine and sine are cast."""
    rows = positions.shape[1]
    width = head_dim // rows
    theta = base ** (-torch.arange(0, width, 2, dtype=F64) / width)
    tables = [rope_tables(row, theta, dtype) for row in positions.unbind(1)]
    return partial(apply_rotary_2d, tables=tables)


x = torch.randn(1, 3, 11, 16, dtype=F64)  # (B, heads, T, H)
theta = 10_000.0 ** (-torch.arange(4, dtype=F64) / 4)  # of 8 features, half of 16
turned = exact_rotation(positions, 16)(x)
confirm(
    "the loops are apply_rotary_2d", same(turn_2d_loops(x, positions, theta), turned)
)

# %% mystnb={"image": {"alt": "The sentence the cat slept on [MASK] all day <sop> my red mat, with four dials under each word. The two upper dials, blue, turn by place: 0 to 6 for the context, then 4, 4, 4, 4, so that all four answer tokens show the hands that [MASK] shows. The two lower dials, orange, turn by step: seven times noon for the context, then 1, 2, 3, 4."}, "figure": {"name": "fig-rope2d-clocks", "caption": "Two clocks in one head of 8 features: two hands for the place, two for the step. Hands start at noon and turn clockwise, by 45 and by 15 degrees per position. One clock runs while the other stands."}} tags=["hide-input"]
figures.draw_two_clocks(figures.two_clocks_data())

# %% [markdown]
# In {numref}`fig-rope2d-clocks`, the blue clock runs along the text and stops at the
# blank. Then the orange one starts. The four answer tokens wear the blue hands of
# `[MASK]`: by that clock, they stand in the blank. The other clock tells them apart.
#
# ## What a score sees
#
# Let $q = (q_1, q_2)$ and $k = (k_1, k_2)$ be the halves of a query and a key, $d$ the
# width of the head. Place $m$ and step $s$ turn by
#
# $$
# R_{(m,s)} = \begin{pmatrix} R_m & 0 \\ 0 & R_s \end{pmatrix}, \qquad
# \theta_i = \text{base}^{-2i/(d/2)}, \quad i = 0, \dots, d/4 - 1,
# $$ (eq-rope2d-blocks)
#
# where $R_m$ is the matrix of {eq}`eq-rope-blocks` for half a head. Both halves have
# the same frequencies. In the 6B model $d = 128$, so there are 32 pairs for place and
# 32 for step; they have every other frequency that a full head would have.


# %%
# Check eq-rope2d-blocks.
def half_matrix(position, theta):
    """R_m with its pairs half-split."""
    cos, sin = (position * theta).cos().diag(), (position * theta).sin().diag()
    return torch.cat((torch.cat((cos, -sin), dim=1), torch.cat((sin, cos), dim=1)))


basis = torch.eye(16, dtype=F64)[None, :, None]  # one basis vector per head
at_17_5 = exact_rotation(torch.tensor([[[17], [5]]]), 16)(basis)[0, :, 0].T
blocks = torch.block_diag(half_matrix(17, theta), half_matrix(5, theta))
confirm("apply_rotary_2d is that matrix", same(at_17_5, blocks))
full, half = rope_frequencies(128, 10_000.0), rope_frequencies(64, 10_000.0)
confirm(
    "32 pairs: every other one of a full head's 64", torch.allclose(half, full[::2])
)

# %% [markdown]
# Blocks multiply block by block, so {eq}`eq-rope-inner` holds in each half, and the
# score is a sum of two:
#
# $$
# \langle R_{(m,s)}\,q,\; R_{(n,t)}\,k \rangle
# = q_1^\top R_{n-m}\, k_1 + q_2^\top R_{t-s}\, k_2 .
# $$ (eq-rope2d-score)
#
# *Two* distances, kept apart. Move all places by one number and all steps by another,
# and no score changes.

# %%
# Check eq-rope2d-score.
q, k = torch.randn(2, 16, dtype=F64)


def score_at(query_at, key_at):
    at = torch.tensor([query_at, key_at]).T[None]  # (1, 2 rows, 2 tokens)
    pair = torch.stack((q, k))[None, None]  # (B, heads, T, H)
    turned_q, turned_k = exact_rotation(at, 16)(pair)[0, 0]
    return turned_q @ turned_k


by_halves = q[:8] @ half_matrix(9 - 4, theta) @ k[:8]
by_halves = by_halves + q[8:] @ half_matrix(2 - 3, theta) @ k[8:]
here = score_at((4, 3), (9, 2))
confirm("a score is the sum of its halves", same(here, by_halves))
confirm("move both clocks of both tokens", same(score_at((104, 73), (109, 72)), here))
confirm("move one clock of one", not same(score_at((5, 3), (9, 2)), here))
confirm("places and steps do not add up", not same(score_at((5, 3), (9, 3)), here))

# %% [markdown]
# With the positions of a text with a blank, three cases are left. Let the blank be at
# place $b$; context tokens stand at step 0, answer tokens at place $b$.
#
# $$
# \begin{aligned}
# \text{context looks at context:} &\quad q_1^\top R_{n-m}\,k_1 + q_2^\top k_2 \\
# \text{answer looks at answer:} &\quad q_1^\top k_1 + q_2^\top R_{t-s}\,k_2 \\
# \text{answer looks at context:} &\quad q_1^\top R_{n-b}\,k_1 + q_2^\top R_{-s}\,k_2
# \end{aligned}
# $$ (eq-rope2d-cases)
#
# (Context never looks at the answer: {ref}`ch-prefix-mask`.) Read off who is told
# apart by what. Context tokens among themselves: by the first half alone; the second
# compares content at any distance. Answer tokens among themselves: by the second alone.
# And an answer token that searches the context: its second half turns against *all*
# context tokens alike. It knows how long the answer is by now, and nothing of where they
# stand.

# %%
# Check eq-rope2d-cases.
keys = k.expand(
    1, 1, 11, -1
)  # the same content everywhere, so that only positions count
turned_keys = exact_rotation(positions, 16)(keys)[0, 0]
turned_queries = exact_rotation(positions, 16)(q.expand(1, 1, 11, -1))[0, 0]
first = turned_queries[:, :8] @ turned_keys[:, :8].T  # (query, key)
second = turned_queries[:, 8:] @ turned_keys[:, 8:].T
m, n, b, s = 5, 2, 4, 3  # all, slept, the blank, the step of red
R = partial(half_matrix, theta=theta)
red, my = words.index("red"), words.index("my")
confirm(
    "context at context",
    same(first[m, n] + second[m, n], q[:8] @ R(n - m) @ k[:8] + q[8:] @ k[8:]),
)
confirm(
    "answer at answer",
    same(first[red, my] + second[red, my], q[:8] @ k[:8] + q[8:] @ R(2 - s) @ k[8:]),
)
confirm(
    "answer at context",
    same(
        first[red, n] + second[red, n], q[:8] @ R(n - b) @ k[:8] + q[8:] @ R(-s) @ k[8:]
    ),
)


def distinct(scores):
    return len({round(score, 9) for score in scores.tolist()})


print("different scores for equal content     first half   second half")
for name, rows, columns in (
    ("context token 'all', 7 context tokens", m, slice(0, 7)),
    ("answer token 'mat', 4 answer tokens  ", 10, slice(7, 11)),
    ("answer token 'mat', 7 context tokens ", 10, slice(0, 7)),
):
    counts = distinct(first[rows, columns]), distinct(second[rows, columns])
    print(f"{name}{counts[0]:12}{counts[1]:14}")

# %% [markdown]
# ## Small enough to see
#
# A head of four features: one pair per half, both turning by 45 degrees per position.
# All contents are the same, $(1, 0, 1, 0)$, so a score is
# $\cos(45° \cdot \Delta\text{place}) + \cos(45° \cdot \Delta\text{step})$. A dot is
# hidden by the mask.

# %%
quarter = torch.tensor([math.pi / 4], dtype=F64)
table = rope_table(7, quarter)
tables = [tuple(table_rows(t, row) for t in table) for row in positions.unbind(1)]
hands = apply_rotary_2d(
    torch.tensor([1.0, 0, 1, 0]).double().expand(1, 1, 11, 4), tables
)
scores = (hands @ hands.mT)[0, 0]
visible = prefix_mask(context_lengths(ids, figures.IDS.sop), 11)[0, 0]
print(" " * 7 + "".join(f"{word:>7}" for word in words))
for word, row, seen in zip(words, scores.tolist(), visible.tolist(), strict=True):
    cells = (
        f"{round(v, 2) + 0.0:7.2f}" if ok else "      ."
        for v, ok in zip(row, seen, strict=True)
    )
    print(f"{word:7}" + "".join(cells))
places, steps = (quarter * (row[:, None] - row) for row in (place, step))
confirm("a sum of two cosines", same(scores, places.cos() + steps.cos()))

# %% [markdown]
# Compare the rows of `[MASK]` and `<sop>`, which share their place. Over the context
# they differ by one constant, $1 - \cos 45° = 0.29$: their steps differ, and that is
# the same news about every context token.

# %%
mask_row, sop_row = scores[4, :7], scores[7, :7]
constant = 1 - math.cos(math.pi / 4)
confirm("one constant apart", (mask_row - sop_row - constant).abs().max() < 1e-10)

# %% [markdown]
# ## The annotated source
#
# One table of cosines and sines serves both halves, so it must reach the larger of the
# two positions. The original's is `position_ids.max() + 1` rows long, and so is ours.

# %%
show(half_frequencies, rope_table, table_rows, apply_rotary_2d, rotation)

# %% [markdown]
# Neither clock counts further than its own part. A text of 2048 tokens whose second half
# is the answer needs half the table:

# %%
long = torch.full((1, 2048), 50)
long[0, 1023], long[0, 1024] = figures.IDS.gmask, figures.IDS.sop
two_rows = prompt_positions(long, figures.IDS, rows=2)
one_row = prompt_positions(long, figures.IDS, rows=1)
print("largest position, two rows:", two_rows.amax(dim=(0, 2)).tolist())
print("largest position, one row: ", one_row.max().item())
confirm("1025 rows will do", two_rows.max() + 1 == 1025 and one_row.max() == 2047)

# %% [markdown]
# Hold on to that; it will matter. For `half_frequencies` and `rope_table` do something
# that {ref}`ch-rope` warned of: they form angles in half precision.
#
# ## The price of half, first part: other frequencies
#
# float16 keeps 11 binary digits. Rounding a number to the nearest float16 therefore
# changes it by at most one part in 2048:
#
# $$
# \operatorname{fl}(x) = x\,(1 + \delta), \qquad |\delta| \le u = 2^{-11},
# $$ (eq-rope2d-round)
#
# as long as $x$ is neither too large (above 65504) nor too small (below $2^{-14}$).

# %%
# Check eq-rope2d-round.
u = 2.0**-11
many = 2.0 ** (torch.rand(100_000, dtype=F64) * 28 - 14)  # from 2^-14 to 2^14
delta = many.half().double() / many - 1
confirm("no number changes by more than one part in 2048", (delta.abs() <= u).all())
confirm("and some by nearly that", delta.abs().max() > 0.99 * u)

theta = 10_000.0 ** (-torch.arange(32, dtype=F64) / 32)  # half a head of the 6B model
delta = half_frequencies(64).double() / theta - 1
confirm("the 32 frequencies of the 6B model are no exception", delta.abs().max() < u)
print(f"worst relative error of a frequency: {delta.abs().max():.2%}")

# %% [markdown]
# The original rounds its frequencies once, when it is built, and *always*: casting the
# model to float32 later does not bring the digits back. A part in 2048 sounds harmless.
# But an angle counts modulo a turn, so what matters is its absolute error
#
# $$
# \varepsilon_i(m) = m\,\tilde\theta_i - m\,\theta_i = m\,\theta_i\,\delta_i ,
# \qquad \tilde\theta_i = \operatorname{fl}(\theta_i),
# $$ (eq-rope2d-linear)
#
# and $m\,\theta_i$ can be 2000.

# %%
# Check eq-rope2d-linear.
P = torch.arange(2048)
original = {}  # the angles as the original forms them
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    original[dtype] = P.to(dtype)[:, None] * half_frequencies(64).to(dtype)
error = {d: a.double() - P[:, None] * theta for d, a in original.items()}
line = P[:, None] * theta * delta
confirm(
    "a straight line for each pair", (error[torch.float32] - line).abs().max() < 1e-3
)
worst = error[torch.float32][2040].abs()
pair, radians = worst.argmax().item(), worst.max().item()
print(
    f"float32 model, position 2040: pair {pair} is off by {radians:.2f} rad,", end=" "
)
print(f"{math.degrees(radians):.0f} degrees")

# %% [markdown]
# That is the first answer to the prediction: 0.3 radians, in a model where every
# operation is in float32. Now the surprise. As RoPE, it is *perfect*. The error is a
# straight line, so it makes $\tilde\theta_i$ a frequency like any other. Put it into
# the score of a pair: query at $m$, key at $n$, and $\alpha$ for the angle that content
# adds.
#
# $$
# |q||k| \cos\bigl((m - n)\,\theta_i + \varepsilon_i(m) - \varepsilon_i(n) + \alpha\bigr)
# $$ (eq-rope2d-shifted)
#
# With a straight line, $\varepsilon_i(m) - \varepsilon_i(n) = (m - n)\,\theta_i\delta_i$
# depends on the distance only.

# %%
# Check eq-rope2d-shifted.
distance, content = 6, torch.randn(2, 32, dtype=torch.complex128)
alpha = content[0].angle() - content[1].angle()
height = content[0].abs() * content[1].abs()
steady = {}
for dtype, angles in original.items():
    turns = torch.polar(torch.ones_like(theta).expand(2048, -1), angles.double())
    query, key = content[0] * turns[distance:], content[1] * turns[:-distance]
    pairs = (query * key.conj()).real
    shift = error[dtype][distance:] - error[dtype][:-distance]
    formula = height * (distance * theta + shift + alpha).cos()
    confirm(f"{dtype}: error enters as a difference", same(pairs, formula))
    spread = (shift - shift[0]).abs().max()
    alone = (spread < 1e-3).item()
    print(f"    does it depend on distance alone? {alone}")
    steady[dtype] = alone
confirm(
    "of the three, only float32 keeps RoPE relative",
    [dtype for dtype in steady if steady[dtype]] == [torch.float32],
)

# %% [markdown]
# ## The price of half, second part: a staircase
#
# In a float16 model, which is how the checkpoint comes, the positions, the products,
# the cosines and the sines are float16 as well. Positions survive: integers are exact
# up to 2048, which is the model's longest text. The product is rounded once more. Two
# roundings of one part in 2048 each:
#
# $$
# \bigl|\operatorname{fl}(m\,\tilde\theta_i) - m\,\theta_i\bigr|
# \;\le\; m\,\theta_i\,(2u + u^2), \qquad m \le 2048 .
# $$ (eq-rope2d-staircase)

# %%
# Check eq-rope2d-staircase.
half_error = error[torch.float16]
confirm(
    "the bound holds", (half_error.abs() <= P[:, None] * theta * (2 * u + u**2)).all()
)
confirm(
    "positions to 2048 are exact",
    torch.equal(torch.arange(2049).half().long(), torch.arange(2049)),
)
confirm("2049 is not", torch.tensor(2049).half() == 2048)
at = half_error.abs().argmax().item()
print(f"worst: {half_error.abs().max():.2f} rad, position {at // 32}, pair {at % 32}")
cos, _ = rope_table(2048, half_frequencies(64))
off = cos.double() - original[torch.float16].double().cos()
confirm("rounding the cosines is nothing beside it", off.abs().max() < 3e-4)

# %% mystnb={"image": {"alt": "Two panels: error of the angle in radians against position 0 to 2048, for all 32 pairs. Above, model in float32: straight lines from zero, up to 0.32 for pair 2, 0.22 for pair 1, -0.13 for pairs 3 and 4, the others near zero. Below, model in float16: the lines split into lanes of dots that fan out, first at about position 230 for pair 2 and 680 for pair 1, and split again when the position doubles; the worst is 0.82 radians, 47 degrees, near the end."}, "figure": {"name": "fig-rope2d-phase", "caption": "How far the hand of each pair is from where it should be, half a head of the 6B model. Above, the frequency alone is rounded: a line. Below, the angle is rounded to what float16 can hold: neighbours jump between lanes, and each time the angle passes a power of two, the spacing of the lanes doubles."}} tags=["hide-input"]
figures.draw_phase_errors(figures.phase_errors_data())

# %% [markdown]
# {numref}`fig-rope2d-phase` shows both prices. Between 1024 and 2048, float16 has whole
# numbers only. Watch the angle of pair 1 there, which should grow by 0.75 radians a token:

# %%
print("position   0.75 x position   as float16   turned since the last")
angles = original[torch.float16][:, 1]
for p in range(1400, 1408):
    print(f"{p:8}{0.75 * p:18.2f}{angles[p]:13.0f}{angles[p] - angles[p - 1]:18.0f}")
still = angles[1:] == angles[:-1]
first_still = still.nonzero()[0].item() + 1
confirm(
    "every angle below 512 is exact", (angles[:683].double() == 0.75 * P[:683]).all()
)
confirm(
    "then, from position 1366 on, one token in four does not turn", first_still == 1366
)
confirm("    in four", 0.24 < still[1366:].double().mean() < 0.26)
confirm("pair 0 turns by 1, and is always right", half_error[:, 0].abs().max() == 0)

# %% [markdown]
# :::{admonition} A figure that moves: a hand and its double
# :class: moving half-angle
# One dial has the hand of a fast pair twice, where it should be and where the model puts
# it. In float16, pair 2 is off by 47° at position 2040. Take pair 1 through positions
# 1400 to 1407: each token should turn it by 43°; six turn it by 57°, two not at all. In
# float32 the error grows evenly, to 12° for pair 1 and 19° for pair 2 at position 2047.
#
# **Try** bfloat16, and find the position where pair 2 is first off by more than 10°.
# :::
#
# A clock that ticks three times and then skips a tick. So what saved the float32 model
# is gone: $\varepsilon_i(m) - \varepsilon_i(n)$ now depends on where the two tokens are,
# not only on their distance. {numref}`fig-rope2d-wander` slides a query and a key, always
# six apart, along the text.

# %% mystnb={"image": {"alt": "Three panels, each the score of the same query and key at distance 6 against position 0 to 2048. float32: a flat line at 0.74. float16: flat at first, then a band that widens in jumps, to between 0.71 and 0.78. bfloat16: a band already wide at 256, between 0.61 and 0.84 before 1024; from 1024 on it swings between about 0.6 and 1."}, "figure": {"name": "fig-rope2d-wander", "caption": "All-ones content, distance 6, the score as a share of that at distance 0. It should be a constant."}} tags=["hide-input"]
figures.draw_wander(figures.wander_data())

# %%
wander = figures.wander_data()
ends = {d: (s.min().item(), s.max().item()) for d, s in wander.scores.items()}
print(f"exact angles: {wander.true:.2f}")
for dtype, (low, high) in ends.items():
    print(f"{dtype!s:16}from {low:.2f} to {high:.2f}")
low, high = ends[torch.float32]
confirm("float32: a constant, and nearly the exact one", high - low < 1e-4)
confirm("    within 0.001 of it", abs(high - wander.true) < 1e-3)

# Random content: the wander against the spread of scores over contents.
q_pairs, k_pairs = torch.randn(2, 500, 32, dtype=torch.complex128)
for dtype, angles in original.items():
    turn = angles[distance:].double() - angles[:-distance].double()
    all_scores = torch.polar(torch.ones_like(turn), turn) @ (q_pairs * k_pairs.conj()).T
    along, across = all_scores.real.std(dim=0).mean(), all_scores.real.std(dim=1).mean()
    print(f"{dtype!s:16}wanders by {along / across:.0%} of the spread over contents")

# %% [markdown]
# So the noise in float16 is real, and small beside what content does: a score sums over
# many pairs, and the errors live in the fast ones. The slow half of the pairs, which
# carries long distance ({ref}`ch-rope`), stays right to 0.02 radians. And two short
# clocks err less than one long clock: with 1024 tokens of prompt and 1024 of answer,
# neither counts past 1024.

# %%
confirm("pairs 16 to 31: right to 0.02 rad", half_error[:, 16:].abs().max() < 0.02)
for limit in (256, 1025, 2048):
    print(
        f"positions below {limit:4}: off by up to {half_error[:limit].abs().max():.2f} rad"
    )

# %% [markdown]
# **And bfloat16?** It has three binary digits less. Its integers are exact up to 256
# only; above 1024 they are eight apart, so that many neighbours share *one* position.
# Then all their angles agree, and no pair can tell one from the other.

# %%
coarse = P.to(torch.bfloat16)
print("of 2048 positions, bfloat16 can tell apart:", coarse.unique().numel())
confirm("exact up to 256, 257 is not", coarse[256] == 256 and coarse[257] == 256)
rows = rotation(torch.tensor([[[2030, 2032, 2034], [0, 0, 0]]]), 128, torch.bfloat16)
one = torch.randn(1, 1, 1, 128).bfloat16().expand(1, 1, 3, 128)
a, b, c = rows(one)[0, 0]
confirm(
    "2030, 2032 and 2034 turn a query alike", torch.equal(a, b) and torch.equal(b, c)
)
confirm(
    "some angle is off by more than a turn",
    error[torch.bfloat16].abs().max() > 2 * math.pi,
)

# %% [markdown]
# ## The ladder of equality
#
# Now for the original. Its tensors come from `modeling_chatglm.py`, run as published on
# a small model: heads of 16 features, so 4 pairs a half. First its tables, with the real
# width of 64 up to position 2047. In float16, every bit agrees.

# %%
components = {
    torch.float32: golden("components_fp32"),
    torch.float16: golden("components_fp16"),
}
for dtype, theirs in components.items():
    atol = 0 if dtype == torch.float16 else 5e-5
    agree = partial(torch.allclose, rtol=0, atol=atol)
    name = "exactly" if atol == 0 else "to 5e-5"
    for width in (64, 128):
        cos, sin = rope_table(2048, half_frequencies(width).to(dtype))
        rows = theirs["rotary/rows"]
        wanted = [theirs[f"rotary/{f}_dim{width}"][:, 0] for f in ("cos", "sin")]
        confirm(
            f"{dtype}, width {width}: rope_table, {name}",
            agree(cos[rows], wanted[0][:, : width // 2])
            and agree(sin[rows], wanted[1][:, : width // 2]),
        )
    confirm(
        "    the original's has each pair's cosine twice",
        torch.equal(*wanted[0].chunk(2, dim=-1)),
    )
    table = rope_table(64, half_frequencies(8).to(dtype))
    at = theirs["apply_rotary/position_id"].T  # (B, T); the original is sequence-first
    looked_up = [table_rows(t, at) for t in table]
    for name in ("q", "k"):
        ours = apply_rotary(
            theirs[f"apply_rotary/{name}"].permute(1, 2, 0, 3), *looked_up
        )
        theirs_out = theirs[f"apply_rotary/{name}_out"].permute(1, 2, 0, 3)
        confirm(f"    apply_rotary of {name}", agree(ours, theirs_out))
    wanted_half = theirs["rotate_half/y"]
    confirm(
        "    rotate_half",
        torch.equal(rotate_half(theirs["rotate_half/x"]), wanted_half),
    )

# %% [markdown]
# Next both halves at once, inside a layer: queries and keys of layer 1 after turning,
# for three rows with three different blanks. This needs the weights.

# %%
models = {dtype: golden_model(dtype) for dtype in components}
for dtype, atol in ((torch.float32, 5e-5), (torch.float16, 1e-2)):
    theirs, attention = components[dtype], models[dtype].blocks[1].attention
    hidden = theirs["block/input_layernorm"].transpose(0, 1)
    queries, keys, _ = attention.split_heads(attention.qkv_proj(hidden))
    rotate = rotation(theirs["block/position_ids"], 16, dtype)
    for name, ours in (("q", rotate(queries)), ("k", rotate(keys))):
        gap = (ours - theirs[f"block/{name}"].permute(1, 2, 0, 3)).abs().max()
        confirm(f"{dtype}: {name} of a whole layer, to {atol:.0e}", gap < atol)

# %% [markdown]
# Last, the whole model, at positions up to 1990. `forward` is short enough to spell out,
# with the rotation as an argument. Then you can swap in another and see what it does.


# %%
ids = golden("ids")["gmask_train/input_ids"]
near = golden("ids")["gmask_train/get_position_ids_2d"]
far = golden("model_fp32")["far_positions/position_ids"]
print("near, place:", *near[0, 0].tolist(), "  step:", *near[0, 1].tolist())
print("far,  place:", *far[0, 0].tolist())
print("       step:", *far[0, 1].tolist())


def logits_with(rotate, dtype=torch.float32):
    model = models[dtype]
    mask = prefix_mask(context_lengths(ids, model.config.blank_ids.sop), 12)
    x = model.embedding(ids)
    for block in model.blocks:
        x = block(x, rotate, mask)
    return F.linear(model.norm(x), model.lm_head.weight)


def gap(ours, theirs):
    return (ours - theirs).abs().max().item()


ours = logits_with(rotation(far, 16, torch.float32))
confirm(
    "spelled out = ChatGLM.forward",
    gap(ours, models[torch.float32](ids, positions=far)) < 1e-4,
)
targets = {
    "near": (near, golden("model_fp32")["gmask_train/logits"]),
    "far": (far, golden("model_fp32")["far_positions/logits"]),
}
exact_gap = {}
for name, (at, theirs) in targets.items():
    rounded = gap(logits_with(rotation(at, 16, torch.float32)), theirs)
    exact_gap[name] = gap(logits_with(exact_rotation(at, 16, torch.float32)), theirs)
    confirm(f"{name}: rounded frequencies give the original's logits", rounded < 1e-4)
    print(f"    exact frequencies are off by {exact_gap[name]:.1g}")
confirm(
    "far, exact angles are a hundred times further off",
    exact_gap["far"] > 100 * exact_gap["near"],
)

# %% [markdown]
# That is the second half of the prediction: keep the original's. We cannot look into
# its training. But the weights were published with this code, and what they give with it
# is what ChatGLM-6B says. Exact angles are better mathematics and another model. The
# same holds one rounding further on, in float16:

# %%
half_logits = golden("model_fp16")["far_positions/logits"].double()
as_original = logits_with(rotation(far, 16, torch.float16), torch.float16).double()
frequencies = half_frequencies(8).float()  # so that angles are float32
careful = [rope_tables(row, frequencies, torch.float16) for row in far.unbind(1)]
as_float32 = logits_with(
    partial(apply_rotary_2d, tables=careful), torch.float16
).double()
confirm(
    "float16 angles: the original's float16 logits",
    gap(as_original, half_logits) < 0.06,
)
confirm("float32 angles, same frequencies: not", gap(as_float32, half_logits) > 0.1)

# %% [markdown]
# :::{admonition} Paper and code
# :class: paper-code
# **The paper adds.** GLM {cite:p}`du2022` learns two tables of vectors, one for each
# kind of position, and adds both to the embedding. ChatGLM-6B adds nothing and turns
# queries and keys. Its checkpoint holds no weights for positions, only the frequencies,
# and the code ignores those.
#
# **One dimension in the code.** With `position_encoding_2d` off, the same class makes a
# table as wide as the head, and one row of positions turns all of it.
#
# **A branch for bfloat16 that would come too late.** `RotaryEmbedding.forward` has one:
# it casts the *angles* to float32 before it takes the cosine. They were multiplied
# before that. `SelfAttention` asks for `torch.half`, so the branch never runs; if it
# did, it could not repair a product already rounded.
# :::

# %%
names = names_by_layer(models[torch.float32], HF_NAMES)
unused = [name for name in golden("weights") if name not in names]
confirm(
    "of the original's tensors, only inv_freq finds no place in our model",
    {name.rpartition(".")[2] for name in unused} == {"inv_freq"},
)
one_clock = rotation(torch.tensor([[[3, 1, 4]]]), 16, torch.float32)
x = torch.randn(1, 2, 3, 16)
whole = [
    table_rows(t, torch.tensor([[3, 1, 4]]))
    for t in rope_table(5, half_frequencies(16).float())
]
confirm(
    "one row turns the whole head", torch.equal(one_clock(x), apply_rotary(x, *whole))
)
late = original[torch.bfloat16].float().cos()  # cast after the product
early = (P.float()[:, None] * half_frequencies(64).float()).cos()
confirm("too late: some cosine is off by more than 1", (late - early).abs().max() > 1)

# %% [markdown]
# :::{admonition} Break it
# :class: break-it
# Six ports, each with one mistake. Which would a test with a short prompt let pass?
# :::


# %%
def tables_for(at, frequencies):
    return [
        rope_tables(row, f, torch.float32)
        for row, f in zip(at.unbind(1), frequencies, strict=True)
    ]


def joined(x, tables):
    """rotate_half over the whole head instead of inside each half."""
    cos, sin = (
        torch.cat([t.repeat(1, 1, 1, 2) for t in ts], dim=-1)
        for ts in zip(*tables, strict=True)
    )
    return x * cos + rotate_half(x) * sin


def neighbours(x, tables):
    """Pairs 2i and 2i + 1, as in the paper."""
    parts = zip(x.chunk(2, dim=-1), tables, strict=True)
    return torch.cat([apply_rotary_interleaved(p, *t) for p, t in parts], dim=-1)


good = [half_frequencies(8).float()] * 2
split = half_frequencies(16).float().chunk(2)  # fast pairs for place, slow for step
mistakes = {
    "rows swapped": lambda at: rotation(at.flip(1), 16, torch.float32),
    "frequencies of a full head": lambda at: partial(
        apply_rotary_2d, tables=tables_for(at, split)
    ),
    "paired over the whole head": lambda at: partial(
        joined, tables=tables_for(at, good)
    ),
    "neighbours paired": lambda at: partial(neighbours, tables=tables_for(at, good)),
    "step left out": lambda at: rotation(
        at * torch.tensor([[1], [0]]), 16, torch.float32
    ),
    "exact frequencies": lambda at: exact_rotation(at, 16, torch.float32),
}
probe = torch.randn(1, 4, 12, 16)
changes_lengths, hides = [], []
print(f"{'':28}{'lengths kept':>12}{'logits near':>14}{'logits far':>14}")
for name, mistake in mistakes.items():
    out = mistake(far)(probe)
    kept = torch.allclose(out.norm(dim=-1), probe.norm(dim=-1), atol=1e-4)
    off = [gap(logits_with(mistake(at)), theirs) for at, theirs in targets.values()]
    shown = [f"{v:.0f}" if v > 1 else f"{v:.1g}" for v in off]
    print(f"{name:28}{kept!s:>12}{shown[0]:>14}{shown[1]:>14}")
    changes_lengths += [] if kept else [name]
    hides += [name] if off[0] < 1e-3 else []
confirm("one changes lengths", changes_lengths == ["paired over the whole head"])
confirm("one passes near, to 0.001", hides == ["exact frequencies"])

# %% [markdown]
# Nothing crashes. Five of them are loud in the logits, and only one of these changes
# lengths: a check of lengths is no test of RoPE. The last hides. On a short prompt it is
# off by less than a thousandth, and a test with a tolerance of 0.001 lets it pass. Test
# positions near the longest text that the model takes.
#
# ## Exercises
#
# Write your function in a cell of your own and give it to `check`. A question takes its
# name and a letter: `check("place_plus_step", "a")`.

# %%
from annotated_src.exercises import check  # noqa: F401 - for your cells
from annotated_src.exercises.rope_2d import chapter as exercises

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("turn_two_clocks")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("turn_two_clocks")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
x, at = torch.randn(2, 3, 5, 16, dtype=F64), torch.randint(0, 2000, (2, 2, 5))
frequencies = half_frequencies(8).double()
mine = exercises["turn_two_clocks"].solution(x, at, frequencies)
confirm("it is the loops", same(mine, turn_2d_loops(x, at, frequencies)))

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("chatglm_cosines")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("chatglm_cosines")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
for dtype in (torch.float32, torch.float16):
    mine = exercises["chatglm_cosines"].solution(P, 64, 10_000.0, dtype)
    package, _ = rope_table(2048, half_frequencies(64).to(dtype))
    confirm(f"{dtype}: it is rope_table", torch.allclose(mine, package, atol=1e-3))

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("place_plus_step")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("place_plus_step")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
total = positions.sum(dim=1)[0]
sums = dict(zip(words, total.tolist(), strict=True))
confirm("<sop> and all collide", sums["<sop>"] == sums["all"])
confirm("my and day collide", sums["my"] == sums["day"])
confirm("both are one back from red", sums["red"] - sums["day"] == 1)
confirm("the answer's tokens do not collide", total[7:].tolist() == [5, 6, 7, 8])
pairs = {tuple(numbers) for numbers in positions[0].T.tolist()}
confirm("with two numbers, no two tokens agree", len(pairs) == len(words))

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("worst_frequency")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("worst_frequency")


# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
def worst_of(base):
    true = base ** (-torch.arange(32, dtype=F64) / 32)
    rounded = half_frequencies(64, base).double()
    relative = (rounded / true - 1).abs()
    pair = relative.argmax().item()
    return pair, relative[pair].item(), abs(rounded - true)[pair].item() * 2047


ten, hundred = worst_of(10_000.0), worst_of(100_000.0)
for base, (pair, relative, radians) in ((10_000, ten), (100_000, hundred)):
    print(f"base {base:7,}: pair {pair}, relative error {relative:.2%}", end=", ")
    print(f"angle off by {radians:.1g} rad")
slow = 100_000.0 ** (-torch.arange(32, dtype=F64) / 32)
confirm(
    "it is the slowest, 0.000014", hundred[0] == 31 and f"{slow[31]:.6f}" == "0.000014"
)
confirm("0.03 radians by position 2047", round((2047 * slow[31]).item(), 2) == 0.03)
confirm("five frequencies lie below 2^-14", (slow < 2**-14).sum() == 5)
confirm("there the bound of one part in 2048 is broken", hundred[1] > u > ten[1])
confirm("and the angle is better, fifty times and more", hundred[2] < ten[2] / 50)
rounded = half_frequencies(64, 100_000.0)
confirm("no frequency is 0", (rounded > 0).all() and torch.tensor(2.0**-24).half() > 0)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("clock_cosines")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("clock_cosines")


# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
def conversation(context, answer):
    ids = torch.full((1, context + answer), 50)
    ids[0, context - 1], ids[0, context] = figures.IDS.gmask, figures.IDS.sop
    return prompt_positions(ids, figures.IDS, rows=2)


too_short = exercises["clock_cosines"].given
failed = []
for context, answer in ((200, 30), (40, 25), (12, 40)):
    at = conversation(context, answer)
    wanted = exercises["clock_cosines"].solution(at, half_frequencies(8).float())
    try:
        got = too_short(at, half_frequencies(8).float())
        confirm(f"context {context}, answer {answer}: fine", torch.equal(got, wanted))
    except IndexError as reason:
        failed.append((context, answer))
        print(f"context {context}, answer {answer}: {reason}")
confirm("one conversation fails", failed == [(12, 40)])

# %% [markdown]
# ## What to remember
#
# - The first half of each query and key turns by place, the second by step; each half
#   is a small RoPE of its own, half-split inside.
# - A score sees two distances. In the context only the first half tells tokens apart,
#   in the answer only the second.
# - Frequencies are rounded to float16 in every ChatGLM-6B, also in float32: up to 0.32
#   radians at position 2047, and still perfectly relative.
# - In float16 the angles are rounded as well: up to 0.82 radians, and scores wander with
#   the place. In bfloat16 neighbours share a position.
# - A port is right when it agrees with the reference. Copy the rounding, and test far
#   positions.
#
# ## Where to read on
#
# - ChatGLM-6B, `modeling_chatglm.py`: `RotaryEmbedding.__init__` (the rounding) and
#   `forward` (the table, kept until a longer one is needed); `_load_from_state_dict` is
#   empty, so a stored `inv_freq` is ignored;
#   `apply_rotary_pos_emb_index`, `rotate_half`; `SelfAttention.forward` cuts the head
#   and picks the rows of the two positions.
# - {cite:t}`du2022`: two kinds of position, in the section on 2D positional encoding.
# - {cite:t}`su2021`: RoPE in one dimension; here {ref}`ch-rope`.
# - Here: {ref}`ch-half-precision` for what half precision asks of the scores,
#   {ref}`ch-chatglm` for the whole model, {py:func}`annotated_src.rotary_2d.rotation`.
