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
# (ch-heads)=
# # Sharing heads
#
# :::{admonition} In this chapter
# :class: at-a-glance
# **40 minutes · moderate.** Afterwards you can say which query head reads which key and
# value head, tell a view from a copy, compute the size of any model's KV cache in your
# head, and explain why a model with fewer KV heads writes faster.
# :::

# %% tags=["remove-input"]
from annotated_src.figures.model_map import ModelMap

ModelMap("heads")

# %% [markdown]
# :::{admonition} Predict before you run
# :class: predict
# Llama-2-70B has ten times the weights of Llama-2-7B, two and a half times the layers
# and twice the query heads, all of the same width. Both have read the same 4,096
# tokens. How many times the memory of the 7B's KV cache does the 70B's take? Write your
# guess down.
# :::
#
# In the original Transformer's attention ({ref}`ch-attention`) every query head has
# keys and values of its own. For training that is fine. For writing it is costly: each
# new token makes the model read the keys and values of all tokens before it. They are
# kept in memory, in the *KV cache*, which {ref}`ch-cache` builds; here you only need to
# know that it holds them. The remedy is to let several query heads read the *same* keys
# and values.
#
# Two words for later. The call that reads the whole prompt at once is the *prefill*;
# each call after it writes one token and is a *decode step*.

# %%
import math
from functools import partial

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from annotated_src.attention import Attention, attend, repeat_kv
from annotated_src.figures import heads as figures
from annotated_src.masks import causal_mask
from annotated_src.rotary import apply_rotary, rope_frequencies, rope_tables
from annotated_src.show import confirm, show

# %% [markdown]
# ## One family
#
# Let a layer have $N$ query heads and $K$ heads of keys and values, *KV heads* for
# short, where $K$ divides $N$. The query heads form $K$ groups of
# $G = N / K$ neighbours, and each group reads one KV head. Query head $n$ computes
#
# $$
# o_n = \operatorname{softmax}\!\left(\frac{q_n\, k_{g(n)}^\top}{\sqrt H}\right)
# v_{g(n)}, \qquad g(n) = \left\lfloor n / G \right\rfloor .
# $$ (eq-heads-shared)
#
# (The mask is left out of the formula, not out of the code.) Three names cover the
# family:
#
# | name | heads of keys, $K$ | queries each, $G$ | |
# |---|---|---|---|
# | multi-head attention, MHA | $N$ | $1$ | {cite:t}`vaswani2017` |
# | grouped-query attention, GQA | in between | $N/K$ | {cite:t}`ainslie2023` |
# | multi-query attention, MQA | $1$ | $N$ | {cite:t}`shazeer2019` |
#
# Written as loops, there is nothing to it but one integer division:


# %%
def attend_loops(queries, keys, values, mask):
    """One row, one query head, one query at a time."""
    batch, num_heads, num_tokens, head_dim = queries.shape
    group = num_heads // keys.shape[1]
    result = torch.zeros_like(queries)
    for b in range(batch):
        for n in range(num_heads):
            shared = n // group
            for t in range(num_tokens):
                visible = mask[0, 0, t]
                k, v = keys[b, shared][visible], values[b, shared][visible]
                weights = (k @ queries[b, n, t] / math.sqrt(head_dim)).softmax(0)
                result[b, n, t] = weights @ v
    return result


def example(num_kv_heads, num_tokens=5, num_cached=3):
    """Two rows, six query heads of width 8, in the middle of a text."""
    generator = torch.Generator().manual_seed(num_kv_heads)
    shapes = [(6, num_tokens)] + 2 * [(num_kv_heads, num_cached + num_tokens)]
    tensors = [
        torch.randn(2, heads, length, 8, generator=generator, dtype=torch.float64)
        for heads, length in shapes
    ]
    return *tensors, causal_mask(num_tokens, num_cached)


# Check eq-heads-shared.
for num_kv_heads in (6, 3, 2, 1):
    inputs = example(num_kv_heads)
    confirm(
        f"6 query heads on {num_kv_heads}: attend computes the loops",
        torch.allclose(attend_loops(*inputs), attend(*inputs), atol=1e-6),
    )

# %% [markdown]
# The tolerance is $10^{-6}$ because `attend` takes its softmax in float32, on purpose.
# One function serves the whole family because its first step hands every query head a
# KV head. That step is two lines:

# %%
show(repeat_kv)

# %% [markdown]
# ## 0 0 1 1, and what it costs
#
# Take two KV heads for four query heads, two tokens, two features: eight numbers, all
# visible.

# %%
x = torch.arange(8.0).view(1, 2, 2, 2)  # (B, K, S, H)
print("two KV heads  ", x[0].flatten(1).tolist())
for n, head in enumerate(repeat_kv(x, 2)[0]):
    print(f"query head {n} reads", head.flatten().tolist())

# %% [markdown]
# Why `expand`, then `flatten`? A tensor is a piece of memory and a recipe for walking
# through it. The recipe is its *strides*: how many numbers to skip to get to the next
# index of each axis. `expand` writes a stride of 0 into the recipe: the next query head
# of the group starts where this one did. That costs no memory. `flatten` must
# then merge the axes $(K, G)$ into one. Its four query heads would have to start at the
# numbers 0, 0, 4, 4 of the memory; but one axis has one stride $s$, and its entries
# start at $0, s, 2s, 3s$. No $s$ fits. So `flatten` copies.


# %%
def describe(name, y):
    own = y.untyped_storage()
    in_x = own.data_ptr() == x.untyped_storage().data_ptr()
    place = "x's memory" if in_x else "new"
    shape, strides = str(tuple(y.shape)), str(y.stride())
    print(f"{name:11}{shape:17}{strides:17}{own.nbytes():3} bytes, {place}")


shared = x[:, :, None].expand(-1, -1, 2, -1, -1)
print(f"{'':11}{'shape':17}strides")
describe("x", x)
describe("expanded", shared)
describe("flattened", repeat_kv(x, 2))
confirm("nbytes counts the recipe, not the memory", shared.nbytes == 2 * x.nbytes)
confirm("a group of 1 copies nothing", repeat_kv(x, 1).data_ptr() == x.data_ptr())

# %% [markdown]
# And this happens often: every key (and, in a second call, every value) in the cache is
# copied $G$ times, in every layer, for every token written. The exceptions are those
# where one stride is enough: $G = 1$, and also a single KV head, whose stride can
# stay 0.

# %%
single = x[:, :1]
confirm("one KV head: no copy", repeat_kv(single, 4).data_ptr() == single.data_ptr())
confirm("its axis of query heads has stride 0", repeat_kv(single, 4).stride(1) == 0)

# %% [markdown]
# The same in other words: `repeat_kv` is `repeat_interleave` along the heads, as its
# docstring in transformers says.

# %%
from transformers.models.llama import modeling_llama

keys = example(num_kv_heads=2)[1]
confirm(
    "repeat_kv is repeat_interleave on axis 1",
    torch.equal(repeat_kv(keys, 3), keys.repeat_interleave(3, dim=1)),
)
confirm(
    "and transformers' repeat_kv",
    torch.equal(repeat_kv(keys, 3), modeling_llama.repeat_kv(keys, 3)),
)

# %% [markdown]
# :::{admonition} Break it
# :class: break-it
# `repeat` sounds right, is shorter, and gives the right shape. It tiles: 0 1 0 1.
# :::


# %%
def wrong_repeat_kv(x, group):
    return x.repeat(1, group, 1, 1)


queries, keys, values, mask = example(num_kv_heads=2)
right = attend(queries, keys, values, mask)
wrong = attend(queries, wrong_repeat_kv(keys, 3), wrong_repeat_kv(values, 3), mask)
confirm("the shapes agree", right.shape == wrong.shape)
same = [torch.allclose(right[:, n], wrong[:, n], atol=1e-6) for n in range(6)]
for n in range(6):
    print(f"query head {n}: should read {n // 3}, reads {n % 2}, right: {same[n]}")
confirm("four heads of six are right", same == [True, False, True, True, False, True])
for num_kv_heads in (1, 6):
    keys = example(num_kv_heads)[1]
    tiled = wrong_repeat_kv(keys, 6 // num_kv_heads)
    confirm(
        f"K = {num_kv_heads}: the mistake does not show",
        torch.equal(tiled, repeat_kv(keys, 6 // num_kv_heads)),
    )

# %% [markdown]
# No error, the right shapes, a believable scale, and most heads even right. A test on
# an MHA or an MQA layer passes too. Test with $1 < K < N$, and compare every head.
#
# ## The way that copies nothing
#
# The queries of one group all meet the same keys. Vectors that all meet one matrix can
# be the rows of a single product: that is what the $T$ queries of one head already are.
# So do not copy the keys for each query head. Stack the $G$ query heads of a group as
# $G\,T$ rows, and multiply once per KV head (*fold* below). A second idea is to let the
# product repeat the keys by broadcasting:
#
# | | queries | | keys, transposed | | scores |
# |---|---|---|---|---|---|
# | repeat | $(B, N, T, H)$ | @ | $(B, N, H, S)$ | = | $(B, N, T, S)$ |
# | broadcast | $(B, K, G, T, H)$ | @ | $(B, K, 1, H, S)$ | = | $(B, K, G, T, S)$ |
# | fold | $(B, K, G\,T, H)$ | @ | $(B, K, H, S)$ | = | $(B, K, G\,T, S)$ |
#
# In the code, the folded scores are unfolded to $(B, N, T, S)$ for the mask and the
# softmax, which treat each head alike, and folded again to meet the values.


# %%
def fold(x, num_kv_heads):
    return x.unflatten(1, (num_kv_heads, -1)).flatten(2, 3)  # (B, K, G * T, ...)


def unfold(x, num_tokens):
    return x.unflatten(2, (-1, num_tokens)).flatten(1, 2)  # (B, N, T, ...)


def weigh(scores, mask, head_dim):
    return (scores / math.sqrt(head_dim)).masked_fill(~mask, -torch.inf).softmax(-1)


def attend_folded(queries, keys, values, mask):
    (num_tokens, head_dim), num_kv_heads = queries.shape[2:], keys.shape[1]
    scores = unfold(fold(queries, num_kv_heads) @ keys.transpose(-2, -1), num_tokens)
    weights = weigh(scores, mask, head_dim)  # (B, N, T, S)
    return unfold(fold(weights, num_kv_heads) @ values, num_tokens)


def attend_broadcast(queries, keys, values, mask):
    grouped = queries.unflatten(1, (keys.shape[1], -1))  # (B, K, G, T, H)
    scores = grouped @ keys[:, :, None].transpose(-2, -1)
    weights = weigh(scores, mask[:, :, None], queries.shape[-1])
    return (weights @ values[:, :, None]).flatten(1, 2)


fused = partial(F.scaled_dot_product_attention, enable_gqa=True)
for num_kv_heads in (6, 3, 2, 1):
    queries, keys, values, mask = example(num_kv_heads)
    loops = attend_loops(queries, keys, values, mask)
    confirm(
        f"6 on {num_kv_heads}: loops = repeated = broadcast = folded = torch's own",
        torch.allclose(loops, attend(queries, keys, values, mask), atol=1e-6)
        and torch.allclose(loops, attend_broadcast(queries, keys, values, mask))
        and torch.allclose(loops, attend_folded(queries, keys, values, mask))
        and torch.allclose(loops, fused(queries, keys, values, attn_mask=mask)),
    )

# %% [markdown]
# Equal results, unequal work. Attention reads the keys and values of the whole cache
# for every token it writes, so count bytes. With $b$ bytes a number and one text, the
# ways that copy read $K$ heads, write $N$ and read those $N$; folding only reads the
# cache:
#
# $$
# \text{copied: } 2\,(K + 2N)\, S H b, \qquad \text{folded: } 2\, K S H b .
# $$ (eq-heads-traffic)
#
# The leading 2 is for keys and values.
# {py:func}`annotated_src.figures.heads.count_moves` is a witness: it watches every
# operation that torch runs and adds up the bytes of keys and values that the operation
# reads and writes (any tensor at least as large as the keys counts as one of them).
# Views move nothing. (Bytes that fit into a chip's own small caches
# cost less; the cache of a long text does not fit.)

# %%
# Check eq-heads-traffic.
N, S, H, b = 6, 40, 64, 8
generator = torch.Generator().manual_seed(1)
queries = torch.randn(1, N, 1, H, generator=generator, dtype=torch.float64)
for K in (6, 3, 2):
    keys, values = torch.randn(2, 1, K, S, H, generator=generator, dtype=torch.float64)
    inputs = (queries, keys, values, causal_mask(1, S - 1))
    moved = {
        way.__name__: sum(figures.count_moves(way, *inputs))
        for way in (attend, attend_broadcast, attend_folded)
    }
    copied, folded = 2 * (K + 2 * N) * S * H * b, 2 * K * S * H * b
    confirm(f"6 on {K}: folding moves 2KSHb", moved["attend_folded"] == folded)
    if K < N:
        confirm(f"6 on {K}: repeating moves 2(K+2N)SHb", moved["attend"] == copied)
        confirm("  so does broadcasting", moved["attend_broadcast"] == copied)
        confirm(
            f"  that is {1 + 2 * N // K} times as much",
            copied / folded == 1 + 2 * N / K,
        )

# %% [markdown]
# Broadcasting is a surprise: it *reads* as if nothing were repeated, but torch's
# `matmul` expands and copies before it multiplies. The same happens to a single KV
# head: `repeat_kv` returns a view, and as soon as there are two rows, `matmul` copies
# it.

# %%
for B in (1, 2):
    queries = torch.zeros(B, N, 1, H, dtype=torch.float64)
    keys = values = torch.zeros(B, 1, S, H, dtype=torch.float64)
    moves = figures.count_moves(attend, queries, keys, values, causal_mask(1, S - 1))
    copied = 2 * N * B * S * H * b
    confirm(
        f"multi-query, {B} row(s): {'something' if B > 1 else 'nothing'} is copied",
        moves.written == (copied if B > 1 else 0),
    )

# %% [markdown]
# The sizes of Llama-3-8B show a second surprise.

# %% mystnb={"image": {"alt": "Four horizontal bars of bytes moved for one token in one layer. Multi-head attention, 32 on 32, reads 64 MiB from the cache. 32 on 8, repeated, moves 144 MiB: 16 read from the cache, 64 written as a copy, 64 read from the copy. Broadcasting moves the same 144 MiB. Folded, 32 on 8 moves 16 MiB."}, "figure": {"name": "fig-heads-traffic", "caption": "Bytes that one decode step moves in one layer: 4,096 tokens in the cache, heads of width 128, float16. Counted by running the four ways on shapes without numbers."}} tags=["hide-input"]
traffic = figures.traffic_data(
    {
        "multi-head, 32 on 32": (32, attend),
        "32 on 8, repeated": (8, attend),
        "32 on 8, broadcast": (8, attend_broadcast),
        "32 on 8, folded": (8, attend_folded),
    }
)
figures.draw_traffic(traffic)

# %%
unshared, repeated, broadcast, folded = (sum(m) for m in traffic.moves.values())
confirm("repeated: 2.25 times the traffic of multi-head", repeated / unshared == 2.25)
confirm("folded: a quarter of it", folded / unshared == 0.25)

# %% [markdown]
# Shared heads that are repeated take a quarter of the *room*, and yet move *more* bytes
# than heads that are not shared: $(K + 2N)/N = 2 + 1/G$ times as many
# ({numref}`fig-heads-traffic`). Sharing makes the cache smaller. Only folding, or a
# fused kernel that looks up head $\lfloor n/G \rfloor$ by itself, also makes the step
# cheaper. `repeat_kv` is the clearest way to write it, so
# {py:func}`annotated_src.attention.attend` and transformers' eager attention use it.
# What our models run, {py:func}`annotated_src.attention.attend_fused`, leaves the sharing
# to torch (`enable_gqa`). So does transformers' fused path where it can; where it
# cannot, it folds the decode step (`pack_gqa`):

# %%
from transformers.integrations import sdpa_attention

queries = example(num_kv_heads=2, num_tokens=1)[0]
confirm(
    "transformers' pack_gqa is the fold of one token",
    torch.equal(sdpa_attention.pack_gqa(queries, 3), fold(queries, 2)),
)

# %% [markdown]
# ## How big is the cache?
#
# Two tensors, $L$ layers, $K$ heads, width $H$, $S$ tokens, $B$ rows, $b$ bytes a
# number:
#
# $$
# \text{cache bytes} = 2 \, L \, K \, H \, S \, B \, b .
# $$ (eq-heads-cache)
#
# $N$ is not in it. To check it on real sizes you need no memory: on torch's `meta`
# device, a tensor has a shape and a dtype, and no numbers.

# %%
# Check eq-heads-cache.
print(f"{'':16}{'L':>4}{'N':>4}{'K':>4}{'H':>5}{'MiB':>7}{'KiB a token':>13}")
agree = []
for name, c in figures.MODELS.items():
    model = figures.weightless(c, torch.float16)
    cache = model.new_cache(batch_size=1, max_seq_len=4096)
    reserved = sum(layer.num_bytes for layer in cache)
    formula = 2 * c.num_layers * c.num_kv_heads * c.head_dim * 4096 * 1 * 2
    agree.append(reserved == formula)
    sizes = f"{c.num_layers:4}{c.num_heads:4}{c.num_kv_heads:4}{c.head_dim:5}"
    amounts = f"{reserved / 2**20:7.0f}{reserved / 4096 / 2**10:13.1f}"
    print(f"{name:16}{sizes}{amounts}")
confirm("the formula is what new_cache reserves, for all of them", all(agree))

# %% mystnb={"image": {"alt": "Above, six query heads wired to KV heads: multi-head one to one; grouped-query 0, 1, 2 to KV head 0 and 3, 4, 5 to KV head 1; multi-query all to one. Below, bars of cache size to scale, one stripe per KV head: Llama-2-7B 2 GiB in 32 stripes; Llama-2-70B 1.25 GiB in 8 wide stripes, unshared 10 GiB; Llama-3-8B 512 MiB in 8 stripes; TinyLlama 88 MiB in 4; SmolLM2 90 MiB in 3; ChatGLM-6B 1.75 GiB in 32; ChatGLM2-6B 112 MiB in 2."}, "figure": {"name": "fig-heads-sharing", "caption": "Sharing, drawn and weighed. Above: who reads whom when six query heads share. Below: the caches of real models at 4,096 tokens (a yardstick: TinyLlama and ChatGLM-6B were made for 2,048). A stripe is as wide as one KV head of all layers is large."}} tags=["hide-input"]
sharing = figures.sharing_data(num_tokens=4096)
figures.draw_sharing(sharing)

# %%
cache = sharing.cache
confirm(
    "the 70B's cache is 0.625 times the 7B's",
    cache["Llama-2-70B"] / cache["Llama-2-7B"] == 0.625,
)
confirm(
    "without sharing it would take 10 GiB",
    sharing.unshared["Llama-2-70B"] == 10 * 2**30,
)
confirm(
    "ChatGLM2-6B's is a sixteenth of ChatGLM-6B's",
    cache["ChatGLM-6B"] / cache["ChatGLM2-6B"] == 16,
)
confirm(
    "SmolLM2's is larger than TinyLlama's",
    cache["SmolLM2-135M"] > cache["TinyLlama-1.1B"],
)


def count_weights(config):
    return sum(p.numel() for p in figures.weightless(config).parameters())


weights = {name: count_weights(figures.MODELS[name]) for name in list(cache)[:5]}
for large, small in (("Llama-2-70B", "Llama-2-7B"), ("TinyLlama-1.1B", "SmolLM2-135M")):
    print(
        f"{large}: {weights[large] / weights[small]:.0f} times the weights of {small}"
    )

# %% [markdown]
# That answers the opening question: 0.625 times, so *less*. The 70B has 2.5 times the
# layers, but a quarter of the KV heads; without sharing it would take 10 GiB. The two
# ChatGLMs, alike in layers, query heads and width, are 16 times apart. And the number
# of weights is a poor guide to the cache: TinyLlama has eight times the weights of
# SmolLM2, and the smaller cache ({numref}`fig-heads-sharing`).
#
# :::{admonition} A figure that moves: wires that fold together
# :class: moving gqa-groups
# Eight query heads share 8, 4, 2 or 1 KV heads. On 8 each has its own; on 2, query heads
# 0 to 3 read KV head 0 and 4 to 7 read KV head 1; on 1 all read the same. Half the KV
# heads are half the cache: Llama-3-8B would keep 512 KiB a token with 32 of them, and
# keeps 128 KiB with its 8. Try the mistake from above: with `repeat` and 4 KV heads, only
# query heads 0 and 7 still read the right one.
# :::
#
# ## Why it writes faster
#
# To write one token, each layer multiplies queries with keys: a multiplication and an
# addition for each of $N$ heads, $S$ tokens and $H$ features, so $2NSH$ operations.
# Then attention weights with values: $2NSH$ more. That is $4NSH$, whatever $K$ is. What
# it must read, if nothing is copied, is the cache, $2KSHb$ bytes. The ratio is the
# *arithmetic intensity* of decoding:
#
# $$
# I = \frac{\text{operations}}{\text{bytes read}} = \frac{4 N S H}{2 K S H b}
# = \frac{2G}{b} .
# $$ (eq-heads-intensity)
#
# In half precision $b = 2$, and the intensity is simply $G$. Length and width cancel.
# So does the batch: a weight that was read once serves every row, but every row has a
# cache of its own.

# %%
# Check eq-heads-intensity.
for B, S, K in ((1, 40, 6), (1, 40, 3), (5, 90, 2)):
    queries = torch.zeros(B, N, 1, H, dtype=torch.float64)
    keys = values = torch.zeros(B, K, S, H, dtype=torch.float64)
    inputs = (queries, keys, values, causal_mask(1, S - 1))
    with FlopCounterMode(display=False) as counter:
        attend_folded(*inputs)
    operations = counter.get_total_flops()
    read = sum(figures.count_moves(attend_folded, *inputs))
    confirm(
        f"batch {B}, {S} tokens, 6 on {K}: 4NSHB operations, 2G/b of them a byte",
        operations == 4 * N * S * H * B and operations / read == 2 * (N / K) / 8,
    )

# %% [markdown]
# Set that against a machine. The data sheet of NVIDIA's A100 (80 GB, SXM) promises 312
# trillion half-precision operations and 2.039 trillion bytes per second:

# %%
balance = 312 / 2.039
print(f"operations an A100 can do while it reads a byte: {balance:.0f}")
for name, c in figures.MODELS.items():
    group = c.num_heads // c.num_kv_heads
    print(f"  {name:15} has {group:2} for it, {group / balance:6.1%}")

# %% [markdown]
# Decoding attention leaves such a machine waiting for memory in every model of the
# table. Its time is then the bytes divided by the bandwidth, and a group of $G$ divides
# the bytes by $G$. That is why sharing speeds up writing, and why it hardly changes the
# prefill, where $T$ queries of each head already read the same keys. {cite:t}`pope2022`
# do this sum for a whole model.
#
# ## What it saves in weights
#
# `k_proj` and `v_proj` have $KH$ output rows in place of $NH$, so in all layers
# together sharing saves
#
# $$
# 2 \, L \, D \, H \, (N - K)
# $$ (eq-heads-weights)
#
# weights.

# %%
# Check eq-heads-weights.
from dataclasses import replace

for name in ("SmolLM2-135M", "Llama-2-70B"):
    c = figures.MODELS[name]
    shared, unshared = (
        count_weights(sizes) for sizes in (c, replace(c, num_kv_heads=c.num_heads))
    )
    saved = 2 * c.num_layers * c.embed_dim * c.head_dim * (c.num_heads - c.num_kv_heads)
    confirm(f"{name} saves 2LDH(N - K) weights", unshared - shared == saved)
    print(f"  {saved / 1e6:,.1f} million, {saved / unshared:.0%} of the unshared model")

# %% [markdown]
# Some of that is spent elsewhere: when Llama 2's authors compare the three variants,
# they widen the feed-forward layer of the sharing ones to level the parameter counts
# {cite:p}`touvron2023llama2`.
#
# ## To multi-head attention and back
#
# The rows of `k_proj` come in blocks, one block of $H$ rows for each KV head. Repeat a
# block, and the layer's output has that head twice. A GQA layer is thus an MHA layer
# with repeated rows. Cut the weight into its blocks, and they are an axis of heads:
# `repeat_kv` itself repeats them.


# %%
def repeat_rows(weight, num_kv_heads, group):
    heads = weight.unflatten(0, (num_kv_heads, -1))[None]  # (1, K, H, D)
    return repeat_kv(heads, group).flatten(0, 2)


def with_kv_weights(layer, num_kv_heads, change):
    """The same layer with other key and value weights."""
    out = Attention(24, 6, num_kv_heads, 8, bias=False).double()
    weights = layer.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        weights[name] = change(weights[name])
    out.load_state_dict(weights)
    return out


torch.manual_seed(0)
x = torch.randn(2, 5, 24, dtype=torch.float64)
positions = torch.tensor([[3, 4, 5, 6, 7], [0, 2, 5, 9, 40]])
cos, sin = rope_tables(positions, rope_frequencies(8, 10_000.0), torch.float64)
rotate = partial(apply_rotary, cos=cos, sin=sin)
mask = causal_mask(5)

with torch.no_grad():
    grouped = Attention(24, 6, 2, 8, bias=False).double()
    repeated = with_kv_weights(grouped, 6, lambda w: repeat_rows(w, 2, group=3))
    confirm(
        "a GQA layer is an MHA layer with repeated rows",
        torch.allclose(grouped(x, rotate, mask), repeated(x, rotate, mask), atol=1e-6),
    )

# %% [markdown]
# The other direction loses something. {cite:t}`ainslie2023` turn a trained MHA model
# into a GQA model by averaging the weights of each group,
#
# $$
# \bar W_k = \frac{1}{G} \sum_{n:\, g(n) = k} W_n ,
# $$ (eq-heads-pool)
#
# and then train on, for 5 % of the original compute in their experiments. The mean is
# the one shared projection closest to all in its group, in the sum of squared
# distances.


# %%
# Check eq-heads-pool.
def pool_rows(weight, num_heads, num_kv_heads):
    heads = weight.unflatten(0, (num_kv_heads, num_heads // num_kv_heads, -1))
    return heads.mean(dim=1).flatten(0, 1)


heads = torch.randn(6, 8, 24, dtype=torch.float64)  # W_n, (N, H, D)
pooled = pool_rows(heads.flatten(0, 1), 6, 2).unflatten(0, (2, 8))
by_hand = torch.stack(
    [(heads[3 * k] + heads[3 * k + 1] + heads[3 * k + 2]) / 3 for k in (0, 1)]
)
confirm("pooling is the mean over each group", torch.allclose(pooled, by_hand))
keys = torch.einsum("btd,nhd->bnth", x, heads)
confirm(
    "its keys are the mean of the group's keys",
    torch.allclose(x @ pooled[1].T, keys[:, 3:].mean(dim=1)),
)
other = torch.randn(8, 24, dtype=torch.float64)
around_mean = (heads[:3] - pooled[0]).square().sum()
detour = 3 * (pooled[0] - other).square().sum()
confirm(
    "any other choice is farther, by G times its squared distance to the mean",
    torch.allclose((heads[:3] - other).square().sum(), around_mean + detour),
)

# %% [markdown]
# How much does pooling change a layer before any training? Take the MHA layer with
# repeated rows, whose heads are equal within a group. Add to each head noise of its
# own, *spread* times as large as the weights, and pool six heads to two.


# %%
def pooling_error(spread):
    own = torch.Generator().manual_seed(6)
    layer = with_kv_weights(
        repeated,
        6,
        lambda w: (
            w + spread * w.std() * torch.randn(w.shape, generator=own, dtype=w.dtype)
        ),
    )
    after = with_kv_weights(layer, 2, lambda w: pool_rows(w, 6, 2))
    exact = layer(x, rotate, mask)
    return ((after(x, rotate, mask) - exact).norm() / exact.norm()).item()


with torch.no_grad():
    errors = {spread: pooling_error(spread) for spread in (0, 0.01, 0.1, 1)}
confirm("pooling equal heads changes nothing", errors.pop(0) < 1e-6)
for spread, error in errors.items():
    print(f"spread {spread:4}: the layer's output is off by {error:.0%}")

# %% [markdown]
# Pooling undoes repeating exactly. Heads that differ come out changed, the more so the
# more they differ: hence the further training.
#
# ## The ladder's last rung
#
# The layer in transformers, with the same weights: batch of two, different positions in
# each row, six heads on two, and heads of width 8 in a model of width 24, so that
# $N H = 48$ is not $D$.

# %%
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

config = LlamaConfig(
    hidden_size=24,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    attn_implementation="eager",
)
original = LlamaAttention(config, layer_idx=0).double()
original.load_state_dict(
    {k.replace("out_proj", "o_proj"): v for k, v in grouped.state_dict().items()}
)
tables = [torch.cat((table, table), dim=-1)[:, 0] for table in (cos, sin)]
blocked = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
with torch.no_grad():
    theirs, _ = original(x, position_embeddings=tables, attention_mask=blocked)
    confirm(
        "transformers' LlamaAttention is our Attention, six heads on two",
        torch.allclose(theirs, grouped(x, rotate, mask), atol=1e-6),
    )

# %% [markdown]
# :::{admonition} Paper and code
# :class: paper-code
# The paper counts *groups*: its GQA-8 has eight KV heads, GQA-1 is multi-query. In
# ChatGLM2 `multi_query_group_num = 2` means the same, two KV heads. Transformers'
# `num_key_value_groups` is the opposite number, the query heads *per* KV head, and so
# is `group` in our code. Whoever reads 3 below as GQA-3 builds another model. One more
# name to distrust: ChatGLM2's authors speak of multi-query attention, and with two KV
# heads it is GQA.
# :::

# %%
confirm(
    "for 6 heads on 2, GQA-2 in the paper, num_key_value_groups is 3",
    original.num_key_value_groups == 3 and config.num_key_value_heads == 2,
)

# %% [markdown]
# ## Exercises
#
# Write your function in a cell of your own and give it to `check`. A question takes its
# name and a letter: `check("what_gqa_speeds_up", "a")`.

# %%
from annotated_src.exercises import check  # noqa: F401 - for your cells
from annotated_src.exercises.heads import chapter as exercises

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("repeat_kv")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("repeat_kv")

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("tokens_that_fit")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("tokens_that_fit")

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("what_gqa_speeds_up")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("what_gqa_speeds_up")

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("attend_rows")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("attend_rows")

# %% [markdown]
# ## What to remember
#
# - $K$ KV heads serve $N$ query heads in groups of $G = N/K$ neighbours; query head $n$
#   reads KV head $\lfloor n/G \rfloor$: 0 0 1 1, not 0 1 0 1. MHA and MQA are the ends
#   of one family.
# - The cache takes $2LKHSBb$ bytes. The number of query heads is not in it.
# - A stride of 0 repeats for free; merging it with another axis copies.
# - Repeating saves room, not traffic, which is $2 + 1/G$ times that of MHA. Folding the
#   group into rows divides traffic by $G$.
# - Decoding does $2G/b$ operations per byte: in half precision, $G$.
# - Repeated weights turn GQA into MHA exactly; mean-pooling goes back, and is exact for
#   equal heads.
#
# ## Where to read on
#
# - transformers, `models/llama/modeling_llama.py`: `repeat_kv`, `LlamaAttention`,
#   `eager_attention_forward`; `integrations/sdpa_attention.py`:
#   `sdpa_attention_forward`, which chooses between `enable_gqa`, `pack_gqa` and
#   `repeat_kv`.
# - ChatGLM2-6B, `modeling_chatglm.py`: `SelfAttention`, where `multi_query_group_num`
#   sets the number of KV heads. ChatGLM-6B, same file name: `SelfAttention`, 32 on 32.
# - {cite:t}`shazeer2019` for the argument from bytes, {cite:t}`ainslie2023` for groups
#   and pooling, {cite:t}`pope2022` for serving.
