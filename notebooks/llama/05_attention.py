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
# (ch-attention)=
# # Attention and its mask
#
# :::{admonition} In this chapter
# :class: at-a-glance
# **60 minutes · moderate, and the heart of the book.** Afterwards you can compute attention by hand,
# say why scores are divided by $\sqrt d$ and why the softmax subtracts a maximum, write
# any mask in any library's convention, and build two heads that continue a rhyme.
# :::

# %% tags=["remove-input"]
from annotated_src.figures.model_map import ModelMap

ModelMap("attention")

# %% [markdown]
# :::{admonition} Predict before you run
# :class: predict
# A head is 64 wide. The entries of its queries and keys are independent, with mean 0
# and variance 1. One query meets 32 such keys, and you take the softmax of the 32 dot
# products, *without* dividing by $\sqrt{64}$. How large is the largest of the 32
# weights, on average: 0.03, 0.2 or 0.8?
# :::

# %%
import math
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from annotated_src.attention import Attention, attend, attend_fused
from annotated_src.figures import attention as figures
from annotated_src.masks import causal_mask, padded_causal_mask
from annotated_src.models.llama import Llama, LlamaConfig
from annotated_src.positions import padded_positions
from annotated_src.rotary import apply_rotary, rope_frequencies, rope_tables
from annotated_src.show import confirm, show

_ = torch.manual_seed(0)

# %% [markdown]
# ## A lookup that is never sure
#
# A dictionary compares what you ask for with every key and returns the value of the one
# that is equal. Attention is the same, made soft. Three vectors per token take part: a
# **query** (what I look for), a **key** (what I can be found by) and a **value** (what
# I hand over). Similarity of query and key is their dot product, the **score**. A
# softmax turns the scores into positive **weights** that sum to one, and the answer is
# the weighted mean of the values. In a decoder, token $t$ asks itself and those before
# it:
#
# $$
# w_{ts} = \frac{e^{\,q_t \cdot k_s / \sqrt d}}
# {\sum_{r \le t} e^{\,q_t \cdot k_r / \sqrt d}},
# \qquad o_t = \sum_{s \le t} w_{ts}\, v_s .
# $$ (eq-attention-lookup)
#
# Here $d$ is the width of a query and a key, the $H$ of the shapes. Why scores are divided by its root is the
# subject of the next section.
#
# This is attention in plain loops for one head, with $d = 2$ features and four tokens. Nothing
# is hidden from you: follow one row with a pocket calculator.


# %%
def attend_loops(queries, keys, values):
    """One head, lists of vectors; also returns scores and weights."""
    outputs, all_scores, all_weights = [], [], []
    for t, query in enumerate(queries):
        scores = []
        for s in range(t + 1):  # the mask: tokens after t are not even compared
            dot = sum(q * k for q, k in zip(query, keys[s], strict=True))
            scores.append(dot / math.sqrt(len(query)))
        powers = [math.exp(score) for score in scores]
        weights = [power / sum(powers) for power in powers]
        output = [0.0] * len(values[0])
        for s, weight in enumerate(weights):
            for feature, value in enumerate(values[s]):
                output[feature] += weight * value
        outputs.append(output)
        all_scores.append(scores)
        all_weights.append(weights)
    return outputs, all_scores, all_weights


queries = [[2.0, 0.0], [1.0, 1.0], [-1.0, 2.0], [2.0, 1.0]]
keys = [[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [1.0, 2.0]]
values = [[1.0, 0.0], [0.0, 1.0], [4.0, 2.0], [2.0, 4.0]]

outputs, scores, weights = attend_loops(queries, keys, values)
for t in range(4):
    line = [" ".join(f"{x:6.2f}" for x in row[t]) for row in (scores, weights, outputs)]
    print(f"token {t}   scores  {line[0]}")
    print(f"          weights {line[1]}")
    print(f"          output  {line[2]}\n")

# %% [markdown]
# Token 0 has one candidate, so its weight is 1 whatever the score. Token 1 likes both
# of its candidates equally and gets the mean of their values. Token 2 has a score below
# zero for token 0, and still takes 9% of it: a softmax never says *nothing*.
#
# The package does the same for all tokens, heads and rows at once.

# %%
# Check eq-attention-lookup.
q, k, v = (
    torch.tensor(x, dtype=torch.float64)[None, None] for x in (queries, keys, values)
)
powers = (q[0, 0] @ k[0, 0].T / math.sqrt(2)).exp().tril()
formula = powers / powers.sum(dim=1, keepdim=True) @ v[0, 0]
confirm(
    "loops are the equation", torch.allclose(formula, torch.tensor(outputs).double())
)
package = attend(q, k, v, causal_mask(4))[0, 0]
confirm("attend is the loops", torch.allclose(package, formula))

# %%
show(attend)

# %% [markdown]
# {py:func}`annotated_src.attention.attend` returns the mean, not the weights. To see
# the weights, hand it the identity as values: token $s$ then hands over a one in place
# $s$. Values are as wide as keys here, so the identity goes in a few columns at a time.


# %%
def weights_of(queries, keys, mask):
    """Let attend reveal its weights, head_dim columns of them per call."""
    num_keys, head_dim = keys.shape[-2:]
    width = math.ceil(num_keys / head_dim) * head_dim
    identity = torch.eye(num_keys, width, dtype=keys.dtype)
    pieces = identity.expand(*keys.shape[:2], -1, -1).split(head_dim, dim=-1)
    seen = [attend(queries, keys, piece, mask) for piece in pieces]
    return torch.cat(seen, dim=-1)[..., :num_keys]


seen = weights_of(q, k, causal_mask(4))[0, 0]
print(seen.numpy().round(2))
confirm(
    "identity in, weights out",
    torch.allclose(seen[3], torch.tensor(weights[3]).double()),
)
confirm(
    "each row sums to one", torch.allclose(seen.sum(dim=-1), torch.ones(4).double())
)
print("columns sum to", seen.sum(dim=0).numpy().round(2))

# %% [markdown]
# `softmax(dim=-1)` runs along a row, over the keys. A column sums to how much a token
# is looked at, which may be anything.
#
# ## Why the square root
#
# Let the entries of $q$ and $k$ be independent with mean 0 and variance 1. Each product
# $q_i k_i$ then has mean 0 and variance $E[q_i^2]\,E[k_i^2] = 1$; the cross terms of
# the square vanish, because each holds a lone factor of mean 0. So
#
# $$
# \operatorname{Var}(q \cdot k) = \sum_{i=1}^{d} E[q_i^2]\, E[k_i^2] = d .
# $$ (eq-attention-variance)
#
# Scores spread like $\sqrt d$; dividing by $\sqrt d$ brings the spread back to 1 for
# every width {cite:p}`vaswani2017`. A coin with sides $-1$ and $+1$ has mean 0 and
# variance 1, and there are finitely many vectors of coins. So you can check it exactly,
# over all of them.

# %%
# Check eq-attention-variance.
for d in (1, 2, 5, 8):
    coins = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * d).view(-1, d)
    scores = coins @ coins.T  # every query with every key
    mean = scores.mean()
    variance = (scores - mean).square().mean()
    print(
        f"d = {d}: {scores.numel():6} pairs, mean {mean:.0f}, variance {variance:.0f}"
    )
    confirm(f"the variance is {d}, exactly", variance == d)

# %% [markdown]
# Why should a spread of $\sqrt d$ hurt? Because of what the softmax does next, and of
# how it learns. Its derivative is
#
# $$
# \frac{\partial w_i}{\partial x_j} = w_i\,(\delta_{ij} - w_j),
# \qquad w = \operatorname{softmax}(x),
# $$ (eq-attention-slope)
#
# with $\delta_{ij} = 1$ if $i = j$, else 0. If one weight is nearly 1, the rest are
# nearly 0, and so is every entry of that matrix: the scores get no gradient.

# %%
# Check eq-attention-slope.
x = torch.randn(6, dtype=torch.float64)
w = x.softmax(dim=0)
jacobian = torch.func.jacrev(partial(torch.softmax, dim=0))
confirm(
    "the derivative is its formula",
    torch.allclose(jacobian(x), w[:, None] * (torch.eye(6) - w)),
)
confirm(
    "scores 40 times as far apart give a derivative below 1e-6",
    jacobian(40 * x).abs().max() < 1e-6,
)

# %% mystnb={"image": {"alt": "Two line charts against the width of the head, from 1 to 1024. Left, tokens looked at, of 32: with division the line goes from 24 to about 21 and stays there; without, it falls from 24 to 3.6 at width 16 and 1.1 at 1024. Right, slope of the largest weight, logarithmic: with division it stays near 0.13; without, it falls from 0.21 at width 16 to below 0.0001 at 1024."}, "figure": {"name": "fig-attention-scale", "caption": "One random query, 32 random keys, softmax of the scores. Left: the exponential of the entropy, the number of tokens that an even spread would have to have; mean of 1000 draws. Right: the derivative of the largest weight by its own score; median."}} tags=["hide-input"]
scale = figures.scale_data()
figures.draw_scale(scale)

# %%
at_64 = scale.widths.index(64)
print(
    f"width 64, divided:     largest weight {scale.largest['divided'][at_64]:.2f}, "
    f"{scale.looked_at['divided'][at_64]:.0f} tokens looked at"
)
print(
    f"width 64, not divided: largest weight {scale.largest['bare'][at_64]:.2f}, "
    f"{scale.looked_at['bare'][at_64]:.1f} tokens looked at"
)
confirm(
    "divided, 16 to 1024 wide make no difference",
    max(scale.looked_at["divided"][2:]) < 1.01 * min(scale.looked_at["divided"][2:]),
)
kept = torch.tensor(scale.slope["bare"]) / torch.tensor(scale.slope["divided"])
confirm("up to width 16 the undivided slope is no smaller", (kept[:3] >= 1).all())
confirm("at width 256 about a twentieth of the slope is left", 0.04 < kept[4] < 0.06)
confirm("at width 1024 less than a thousandth", kept[5] < 0.001)

# %% [markdown]
# That answers the prediction: 0.83. Before it has learned anything, the wide head
# without division looks at fewer than two tokens, chosen by chance. At width 256 the
# gradient that could tell it that they are the wrong ones is down to a twentieth, at
# 1024 to less than a thousandth ({numref}`fig-attention-scale`). Very narrow heads would
# learn without the root: up to width 16 the undivided slope is no smaller.
#
# ## A softmax that does not overflow
#
# Adding a constant to all scores multiplies every power by the same factor, and it
# cancels:
#
# $$
# \operatorname{softmax}(x)_i = \frac{e^{x_i}}{\sum_j e^{x_j}}
# = \frac{e^{x_i - c}}{\sum_j e^{x_j - c}} \quad\text{for every } c .
# $$ (eq-attention-shift)
#
# Choose $c = \max_j x_j$. The largest power is then $e^0 = 1$ and none can overflow.
# float32 ends near $3.4 \cdot 10^{38}$, just below $e^{89}$, so the choice matters.

# %%
# Check eq-attention-shift.
shifted = [torch.softmax(x - c, dim=0) for c in (-3.0, x.max(), 100.0)]
confirm("a shift changes nothing", all(torch.allclose(w, other) for other in shifted))

large = torch.tensor([89.0, 88.0])  # float32
powers = large.exp()
confirm(
    "exp(88) fits into float32, exp(89) does not",
    powers.isinf().tolist() == [True, False],
)
confirm("the formula as written gives NaN", (powers / powers.sum()).isnan().any())
powers = (large - large.max()).exp()
confirm(
    "with the maximum taken off it is right",
    torch.allclose((powers / powers.sum()).double(), large.double().softmax(dim=0)),
)

# %% [markdown]
# `attend` asks for more: `dtype=torch.float32`, then a cast back. In half precision a
# running total goes wrong, because a small number added to a large one rounds away. Add
# up the powers of 2048 keys in each precision, and see how far the weights of a row are
# from summing to one:

# %%
for dtype, at_least in ((torch.float16, 0.02), (torch.bfloat16, 0.1)):
    scores = (3 * torch.randn(64, 2048)).to(dtype)
    powers = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    total = torch.zeros(64, dtype=dtype)
    for column in powers.T:
        total = total + column
    half = powers / total[:, None]
    careful = scores.softmax(dim=-1, dtype=torch.float32).to(dtype)
    unasked = scores.softmax(dim=-1)
    error = [(w.double().sum(dim=-1) - 1).abs().max() for w in (half, careful, unasked)]
    name = str(dtype).removeprefix("torch.")
    confirm(
        f"{name}: with a {name} total, some row misses 1 by over {at_least:.0%}",
        error[0] > at_least,
    )
    confirm(f"{name}: float32 inside, cast after: by less than 0.2%", error[1] < 0.002)
    confirm(f"{name}: torch's own softmax is as careful unasked", error[2] < 0.002)

# %% [markdown]
# So here the argument repairs nothing: torch's own softmax adds up in float32 anyway.
# It states in the source what the mathematics needs, whichever softmax runs. And it
# cannot save scores that have overflowed already:

# %%
big = torch.full((1, 1, 1, 128), 30.0, dtype=torch.float16)
confirm("128 products of 30 and 30 overflow float16", (big @ big.mT).isinf().all())
confirm("and inf minus inf is NaN", attend(big, big, big, causal_mask(1)).isnan().all())
confirm(
    "dividing the query first would have fitted",
    (big / math.sqrt(128) @ big.mT).isfinite().all(),
)

# %% [markdown]
# ## The mask
#
# Equation {eq}`eq-attention-lookup` sums over $s \le t$. To compute all rows at once
# you score all pairs, then hide those above the diagonal *before* the softmax:
#
# $$
# w = \operatorname{softmax}\!\left(\frac{QK^\top}{\sqrt d} + M\right), \qquad
# M_{ts} = \begin{cases} 0 & \text{if } t \text{ may look at } s \\
# -\infty & \text{otherwise.} \end{cases}
# $$ (eq-attention-mask)
#
# Since $e^{-\infty} = 0$, a hidden token drops out above and below the fraction line. A
# row is a query, a column is a key.

# %%
show(causal_mask)

# %%
# Check eq-attention-mask.
visible = causal_mask(4)
added = torch.zeros(4, 4, dtype=torch.float64).masked_fill(~visible[0, 0], -torch.inf)
weights = (q[0, 0] @ k[0, 0].T / math.sqrt(2) + added).softmax(dim=-1)
confirm("minus infinity, added, hides", torch.allclose(weights, seen))

print("True: may look", visible[0, 0].int(), sep="\n")
print("number to add", added.float(), sep="\n")
print("True: hidden", (~visible[0, 0]).int(), sep="\n")

# %% [markdown]
# The three prints are one mask in three conventions, call them its faces, and libraries
# disagree on the face.
# PyTorch disagrees with itself.
#
# | convention | where |
# |---|---|
# | True = may look | this book; `F.scaled_dot_product_attention` |
# | 0 or a very negative number, added | transformers' eager Llama |
# | True = hidden | `torch.nn.MultiheadAttention`; ChatGLM-6B |
#
# A wrong face raises nothing. Its first symptom here is the last row, which sees no
# token and becomes $0/0$:

# %%
flipped = attend(q, k, v, ~causal_mask(4))[0, 0]
confirm("the wrong face: NaN in the last row", flipped[3].isnan().all())
confirm("and plausible numbers in the others", flipped[:3].isfinite().all())

# %% [markdown]
# With a cache ({ref}`ch-cache`) the queries are the newest tokens only, the keys are
# all. Row $t$ is then the token at position `num_cached + t`, and the diagonal moves
# right. The mask is the *bottom* of the large one:

# %%
print(causal_mask(2, num_cached=3)[0, 0].int())
confirm(
    "two new tokens after three: the last two rows of five",
    torch.equal(causal_mask(2, num_cached=3), causal_mask(5)[:, :, 3:]),
)

# %% [markdown]
# ### A mask decides where information flows
#
# Change the input of token $j$ a little: which outputs move? Differentiating answers
# for all pairs. Below are Llama blocks with random weights, under two masks.

# %% mystnb={"image": {"alt": "Four 12 by 12 tables of derivatives, output token by input token. Above, causal, 1 layer and 2 layers: the lower triangle is filled, everything above the diagonal is white and says exactly 0. Below, last 3 tokens, 1 layer: a band 3 wide along the diagonal. Last 3 tokens, 2 layers: a band 5 wide, fainter at its edge."}, "figure": {"name": "fig-attention-flow", "caption": "How strongly each output token depends on each input token. White is exactly zero."}} tags=["hide-input"]
flow = figures.flow_data()
figures.draw_flow(flow)

# %%
reach = [(size > 0).sum(dim=1).max().item() for size in flow.sizes]
confirm(
    "nothing flows back, at any depth: zero above the diagonal, exactly",
    all((size.triu(1) == 0).all() for size in flow.sizes),
)
confirm(
    "a window of 3 reaches 3 tokens through one layer, 5 through two",
    reach[2:] == [3, 5],
)

# %% [markdown]
# The upper triangles of {numref}`fig-attention-flow` are zero, not small. This is what
# lets one forward pass train on all positions at once, and what makes a cache possible:
# the past never changes when the future arrives. Reach adds up over layers: two layers
# that each see 3 tokens carry information over 5.
#
# ## Many heads
#
# A head returns *one* mean. If it looks at two words equally, it cannot tell who was
# which. Two heads, each looking at one, can.

# %%
dog, man = torch.randn(2, 8)
said, turned = torch.stack((dog, man))[None, None], torch.stack((man, dog))[None, None]
everything = torch.ones(1, 1, 1, 2, dtype=torch.bool)
even = torch.zeros(1, 1, 1, 8)  # this query likes all keys equally
keys = torch.eye(2, 8)[None, None]
one = [attend(even, keys, v, everything) for v in (said, turned)]
confirm("one head: 'dog bites man' is 'man bites dog'", torch.allclose(one[0], one[1]))

sharp = 100 * torch.eye(2, 8)[None, :, None]  # head 0 wants key 0, head 1 wants key 1
two = [
    attend(sharp, keys.expand(1, 2, 2, 8), v.expand(1, 2, 2, 8), everything)
    for v in (said, turned)
]
confirm(
    "two heads keep them apart",
    torch.allclose(two[0][0, :, 0], torch.stack((dog, man))),
)
confirm("so the order makes a difference", not torch.allclose(two[0], two[1]))

# %% [markdown]
# So the layer makes N queries, keys and values per token, each H wide, lets each head
# attend by itself, puts the N answers side by side and mixes them with one last matrix.
# In the shapes, B counts rows of the batch, T queries, S keys, and K the heads of keys
# and values, of which there are as many as heads of queries, K = N, until
# {ref}`ch-heads`. `rotate` is the subject of {ref}`ch-rope`, `cache` of
# {ref}`ch-cache`.

# %%
show(Attention)

# %%
x = torch.arange(24.0).view(1, 2, 12)  # two tokens, 12 features
layer = Attention(embed_dim=12, num_heads=3, num_kv_heads=3, head_dim=4, bias=False)
heads = layer.split_heads(x)
confirm(
    "head 1 of token 0 is its features 4 to 7", heads[0, 1, 0].tolist() == [4, 5, 6, 7]
)
confirm(
    "splitting is not reshaping: (B, N, T, H) without the transpose is another tensor",
    not torch.equal(heads, x.view(1, 3, 2, 4)),
)

# %% [markdown]
# ## Two heads that know a rhyme
#
# What can attention compute? Here are two layers of one head each, every query and key
# set by hand, no training. Head 1 asks by position: *who stands before me?* It copies
# that word. Head 2 uses those copies as keys, and asks by word: *what followed a word
# like me?* That is a key whose copy is my own word.
#
# A word that is new finds nothing. Since the weights must sum to one all the same, head
# 2 then looks at the start token, `<s>`. Trained models do that too
# {cite:p}`xiao2023`. Three scores are enough for it: 30 for a match, 15 for the start
# token, 0 for the rest. After the softmax, 15 less is a weight of next to nothing.

# %% mystnb={"image": {"alt": "The words of the rhyme 'This is the house that Jack built. This is the malt that lay in the house that Jack built' one below the other. Grey arrows on their left go from each word up to the word before it. Arcs on their right go from each repeated word back up to what followed it earlier; six of the eleven are green, came true, four orange and dashed, did not, and one is blue: after the last 'built' the heads guess 'This'. The guesses stand in the same rows, with a tick or a cross."}, "figure": {"name": "fig-attention-rhyme", "caption": "Two hand-made heads read a rhyme. An arrow goes from a word to the word it looks at, its thickness is the weight. Together they guess each next word from what they have read so far."}} tags=["hide-input"]
rhyme = figures.rhyme_data()
figures.draw_rhyme(rhyme)

# %% [markdown]
# In {numref}`fig-attention-rhyme`, "the" has been followed by "house" and by "malt", so
# the third "the" looks at both with weight ½ each. The pair has computed the word-pair
# statistics of its own context:

# %%
counts = torch.zeros_like(rhyme.guesses)
for t, word in enumerate(rhyme.words):
    followers = [s for s in range(1, t + 1) if rhyme.words[s - 1] == word] or [0]
    for s in followers:
        counts[t, rhyme.ids[s]] += 1 / len(followers)
confirm(
    "every guess is the share of what has followed the same word so far",
    torch.allclose(rhyme.guesses, counts, atol=1e-4),
)

# %%
show(figures.rhyme_data)

# %% [markdown]
# Pairs like this one appear by themselves in trained language models. The second is
# called an *induction head*; in small models its arrival coincides with a jump in what
# the model learns from its context {cite:p}`olsson2022`. It takes two layers: the keys
# of head 2 hold what head 1 fetched.
#
# ## Padding
#
# Rows of a batch have different lengths; the short ones are filled with padding. For
# generation it goes on the *left*, so that every row's newest token is in the last
# column. One thing must then hold: nobody looks at padding. The package also lets
# positions count tokens only, so that a row has the numbers that it has alone; no score
# depends on it ({ref}`ch-rope`).

# %%
show(padded_causal_mask, padded_positions)

# %%
is_token = torch.tensor([[False, False, True, True, True], [True] * 5])
print(padded_causal_mask(is_token, num_tokens=5)[0, 0].int())
print("positions", padded_positions(is_token).tolist())

# %% [markdown]
# The two ones at the upper left are padding looking at itself. They look useless.
# Without them those rows are empty, $0/0$, and NaN spreads, although every token hides
# the padding: in the next layer weight 0 meets value NaN, and $0 \cdot \text{NaN}$ is
# NaN.

# %%
x = torch.randn(1, 1, 5, 4)
wrong_mask = causal_mask(5) & is_token[:1, None, None]
first = attend(x, x, x, wrong_mask)
second = attend(first, first, first, wrong_mask)
confirm(
    "layer 1: NaN at the padding only",
    first.isnan()[0, 0, :, 0].tolist() == [True] * 2 + [False] * 3,
)
confirm("layer 2: NaN everywhere", second.isnan().all())
right_mask = padded_causal_mask(is_token[:1], 5)
tokens_alone = x[:, :, 2:]
for _ in range(2):
    x = attend(x, x, x, right_mask)
    tokens_alone = attend(tokens_alone, tokens_alone, tokens_alone, causal_mask(3))
confirm("padding that sees itself: numbers everywhere", x.isfinite().all())
confirm(
    "and the tokens are as they are alone", torch.allclose(x[:, :, 2:], tokens_alone)
)

# %% [markdown]
# Now a whole small Llama. A left-padded row must give what it gives alone.

# %%
config = LlamaConfig(
    vocab_size=50,
    num_layers=2,
    embed_dim=24,
    num_heads=3,
    num_kv_heads=3,
    head_dim=8,
    ffn_dim=40,
    max_seq_len=32,
    norm_eps=1e-5,
    rope_base=10_000.0,
    tied_head=False,
)
model = Llama(config).requires_grad_(False)
alone, other = torch.tensor([[7, 3, 9]]), torch.tensor([[4, 4, 8, 1, 6]])
batch = torch.cat((F.pad(alone, (2, 0), value=0), other))
close = partial(torch.allclose, atol=1e-5)

logits = model(batch, is_token=is_token)
confirm("the short row is as it is alone", close(logits[:1, 2:], model(alone)))
confirm("so is the full row", close(logits[1:], model(other)))
confirm(
    "without is_token the short row changes",
    not close(model(batch)[:1, 2:], model(alone)),
)
on_the_right = torch.cat((F.pad(alone, (0, 2), value=0), other))
confirm(
    "right padding needs no mask but the causal one",
    close(model(on_the_right)[:1, :3], model(alone)),
)

# %% [markdown]
# Right padding is behind every token, so the causal mask hides it already; training
# uses that. Generation cannot: the last column of a short row is padding, and the next
# token would have to go behind it.
#
# ## The ladder of equality
#
# From the loops to the original, on inputs that hide nothing: three heads, two rows,
# positions with gaps.

# %%
q, k, v = torch.randn(3, 2, 3, 5, 8)  # B 2, N 3, T 5, H 8
mask = causal_mask(5)
spelled = attend(q, k, v, mask)
loops = torch.tensor(
    [
        [attend_loops(*(x[b, n].tolist() for x in (q, k, v)))[0] for n in range(3)]
        for b in range(2)
    ]
)
confirm("loops = attend", close(loops, spelled))
confirm("attend = attend_fused", close(attend_fused(q, k, v, mask), spelled))
fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)
confirm("attend = F.scaled_dot_product_attention, is_causal", close(fused, spelled))

# %% [markdown]
# The fused call keeps a few numbers per query instead of the whole `(T, S)` table
# {cite:p}`milakov2018,dao2022`; the exercise on one pass over the keys shows how that is
# possible. It is faster, so it is what the layer calls; `attend` is what it means. Next,
# whole layers.

# %%
ours = Attention(embed_dim=24, num_heads=3, num_kv_heads=3, head_dim=8, bias=True)
theirs = nn.MultiheadAttention(embed_dim=24, num_heads=3, batch_first=True)
projections = (ours.q_proj, ours.k_proj, ours.v_proj)
theirs.load_state_dict(
    {
        "in_proj_weight": torch.cat([p.weight for p in projections]),
        "in_proj_bias": torch.cat([p.bias for p in projections]),
        "out_proj.weight": ours.out_proj.weight,
        "out_proj.bias": ours.out_proj.bias,
    }
)
x = torch.randn(2, 5, 24)
expected, _ = theirs(
    x, x, x, attn_mask=~mask[0, 0], need_weights=False
)  # True = hidden
confirm(
    "Attention = nn.MultiheadAttention, with no rotation",
    close(ours(x, nn.Identity(), mask), expected),
)

# %%
from transformers.models.llama import configuration_llama, modeling_llama

hf_config = configuration_llama.LlamaConfig(
    hidden_size=21,
    num_attention_heads=3,
    num_key_value_heads=3,
    head_dim=8,
    attn_implementation="eager",
)
original = modeling_llama.LlamaAttention(hf_config, layer_idx=0).eval()
ours = Attention(embed_dim=21, num_heads=3, num_kv_heads=3, head_dim=8, bias=False)
ours.load_state_dict(
    {
        name.replace("o_proj", "out_proj"): tensor
        for name, tensor in original.state_dict().items()
    }
)

positions = torch.tensor([[0, 1, 2, 5, 9], [3, 4, 7, 8, 20]])
cos, sin = rope_tables(positions, rope_frequencies(8, 10_000.0), torch.float32)
doubled = tuple(torch.cat((table, table), dim=-1)[:, 0] for table in (cos, sin))
x = torch.randn(2, 5, 21)
added = torch.zeros(1, 1, 5, 5).masked_fill(~mask, torch.finfo(torch.float32).min)
expected, _ = original(x, position_embeddings=doubled, attention_mask=added)
rotate = partial(apply_rotary, cos=cos, sin=sin)
confirm(
    "Attention = transformers' LlamaAttention", close(ours(x, rotate, mask), expected)
)
expected, _ = modeling_llama.eager_attention_forward(original, q, k, v, added, 8**-0.5)
confirm(
    "attend = its eager_attention_forward", close(spelled.transpose(1, 2), expected)
)

# %% [markdown]
# :::{admonition} Paper and code
# :class: paper-code
# The paper hides by "setting to $-\infty$" {cite:p}`vaswani2017` (section 3.2.3).
# transformers adds the most negative *finite* number, ChatGLM-6B fills in $-10000$. For
# a row that sees anything the results agree. For an empty row they do not: $-\infty$
# gives NaN, a finite fill gives the plain mean of everything hidden, and the fused
# kernel gives zeros.
#
# Older transformers, and the simplified Llamas copied from it, build the mask for
# `sequence_length + 1` keys. That is one column too many. It does no harm because
# attention then cuts the mask to the number of keys; leave out the cut and it fails.
# :::

# %%
nothing = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
mean = v.mean(dim=2, keepdim=True).expand_as(v)
lowest = torch.full((1, 1, 5, 5), torch.finfo(torch.float32).min)
filled, _ = modeling_llama.eager_attention_forward(original, q, k, v, lowest, 8**-0.5)
confirm("empty rows, minus infinity: NaN", attend(q, k, v, nothing).isnan().all())
confirm(
    "empty rows, lowest float: the mean of all", close(filled.transpose(1, 2), mean)
)
confirm("empty rows, fused: zeros", (attend_fused(q, k, v, nothing) == 0).all())

wide = causal_mask(6)[:, :, :5]  # 5 queries, 6 keys: one key that does not exist
confirm("the sixth column is hidden from everybody", not wide[..., 5].any())
confirm("cut to the number of keys, it is our mask", torch.equal(wide[..., :5], mask))
try:
    attend(q, k, v, wide)
except RuntimeError:
    print("uncut, 6 columns do not fit 5 scores: RuntimeError")
one_score = torch.randn(1, 1, 1, 1)
stretched = one_score.masked_fill(~causal_mask(2)[:, :, :1], -torch.inf)
confirm("a single score is stretched in silence: two columns", stretched.shape[-1] == 2)

# %% [markdown]
# How negative must a finite fill be? One visible score against one filled one:

# %%
print("   fill   visible score   weight that leaks")
for fill, score in ((-20, 0), (-20, -15), (-20, -25), (-10_000, -25)):
    leak = torch.tensor([score, fill], dtype=torch.float64).softmax(dim=0)[1]
    print(f"{fill:7} {score:10} {leak:18.1e}")

# %% [markdown]
# A fill of $-20$ looks safe while scores are small. Nothing bounds scores from below:
# at $-25$ the hidden token takes almost all. $-10000$ underflows to an exact zero.
#
# :::{admonition} Break it
# :class: break-it
# Mask *after* the softmax: multiply hidden weights by zero. The weights shown for
# hidden tokens are right, namely zero. What is wrong?
# :::


# %%
def wrong_attend(queries, keys, values, mask):
    scores = queries @ keys.mT / math.sqrt(queries.shape[-1])
    return (scores.softmax(dim=-1) * mask) @ values


right_weights = weights_of(q, k, mask)
wrong_weights = wrong_attend(q, k, torch.eye(5), mask)
print("row sums, right", right_weights.sum(dim=-1)[0, 0].numpy().round(2))
print("row sums, wrong", wrong_weights.sum(dim=-1)[0, 0].numpy().round(2))

prefix = [x[:, :, :3] for x in (q, k, v)]
for name, function in (("attend", attend), ("wrong_attend", wrong_attend)):
    same = close(function(q, k, v, mask)[:, :, :3], function(*prefix, causal_mask(3)))
    print(f"{name}: the first 3 tokens are the same without the other 2: {same}")
repaired = wrong_weights / wrong_weights.sum(dim=-1, keepdim=True)
confirm("dividing by the row sum repairs it", close(repaired, right_weights))

# %% [markdown]
# Rows no longer sum to one, and early tokens fade. Worse, the future has leaked: hidden
# scores still stand in the denominator, so how *little* is left tells a token what
# comes. Training can exploit that; generation, where the future does not exist, then
# gives other numbers. The test to remember is the second one: cut the end off, and
# nothing before the cut may change.
#
# ## Exercises
#
# Write your function in a cell of your own and give it to `check`. A question takes
# its name and a letter: `check("what_a_shuffle_changes", "a")`.

# %%
from annotated_src.exercises import check  # noqa: F401 - for your cells
from annotated_src.exercises.attention import chapter as exercises

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("masked_attention")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("masked_attention")

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("online_attention")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("online_attention")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
attend_online = exercises["online_attention"].solution
for size in (1, 100):
    online = attend_online(q[0, 0, -1], size * k[0, 0], v[0, 0])
    confirm(
        f"one pass over the keys equals attend, keys times {size}",
        close(online, attend(q, size * k, v, mask)[0, 0, -1]),
    )

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("window_mask")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("window_mask")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
a_window = exercises["window_mask"].solution
confirm(
    "a wide window is the causal mask",
    torch.equal(a_window(3, 2, 9), causal_mask(3, 2)),
)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("what_a_shuffle_changes")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("what_a_shuffle_changes")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
x = torch.randn(1, 1, 5, 8)
order = torch.tensor([2, 0, 3, 1, 4])
before, after = attend(x, x, x, mask), attend(*[x[:, :, order]] * 3, mask)
confirm("the last token does not notice", close(before[:, :, 4], after[:, :, 4]))
confirm("the others do", not close(before[:, :, order[:4]], after[:, :, :4]))
deep = [attend(y, y, y, mask)[:, :, 4] for y in (before, after)]
confirm("after a second layer the last one does", not close(*deep))

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("attend_newest")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("attend_newest")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
keys, values = torch.randn(2, 1, 1, 6, 8)
query, look = torch.randn(1, 1, 1, 8), torch.eye(6)[None, None]
weights = F.scaled_dot_product_attention(query, keys, look, is_causal=True)[0, 0, 0]
confirm(
    "six keys, one query, is_causal: it sees the first key only",
    close(weights, torch.eye(6)[0]),
)
confirm(
    "mended, it sees six keys of six",
    (exercises["attend_newest"].solution(query, keys, look) > 0).all(),
)

# %% [markdown]
# ## What to remember
#
# - Attention is a lookup with soft equality: dot products, a softmax, a weighted mean.
#   The weights of a row sum to one, so a head always looks somewhere.
# - A dot product of $d$ unit-variance entries has variance $d$. Divided by $\sqrt d$ it
#   spreads the same at every width; undivided, the softmax saturates and stops
#   learning.
# - Mask before the softmax. Ask each library which face its mask has.
# - An empty row is NaN with $-\infty$, a mean with a finite fill, zero when fused.
#   Avoid empty rows.
# - Test a mask by what flows: perturb the future, and the past must not move at all.
#
# ## Where to read on
#
# - transformers, `models/llama/modeling_llama.py`: `eager_attention_forward`,
#   `LlamaAttention`; `masking_utils.py`: `create_causal_mask`.
# - ChatGLM-6B, `modeling_chatglm.py`: `attention_fn`, with the fill of $-10000$ and the
#   query divided first; `get_masks`, True = hidden.
# - PyTorch, `torch.nn.functional.scaled_dot_product_attention`: its documentation
#   spells the computation out, alignment of `is_causal` included.
# - {cite:t}`vaswani2017`, section 3.2; {cite:t}`dao2022`, section 3.1, for the fused
#   way.
# - Next: {ref}`ch-heads`, where query heads share keys and values.
