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
# (ch-cache)=
# # The KV cache
#
# :::{admonition} In this chapter
# :class: at-a-glance
# **45 minutes · moderate.** Afterwards you can prove that a cache changes no output,
# write one, count what it saves and what it costs, rewind it, and recognise its two
# classic bugs.
# :::

# %% tags=["remove-input"]
from annotated_src.figures.model_map import ModelMap

ModelMap("cache")

# %% [markdown]
# :::{admonition} Predict before you run
# :class: predict
# A model writes 1000 tokens, one at a time, from a single first token. At every step a
# plain loop runs the whole text so far. Of all the tokens that pass through the layers,
# what share had passed through before? And of a token's query, key and value, which
# does a *later* token need? Write both down.
# :::

# %%
import math
from unittest.mock import patch

import torch

from annotated_src.attention import Attention, attend
from annotated_src.figures import cache as figures
from annotated_src.generate import _decode, generate
from annotated_src.kv_cache import LayerCache, cached_length
from annotated_src.masks import causal_mask
from annotated_src.models.llama import Llama, LlamaConfig
from annotated_src.positions import positions_after
from annotated_src.show import confirm, show

_ = torch.set_grad_enabled(False)

# %% [markdown]
# ## The loop without a cache
#
# A small Llama in float64, with random weights, gains that are not one, and three query
# heads to each key/value head.

# %%
config = LlamaConfig(
    vocab_size=97,
    num_layers=3,
    embed_dim=20,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=36,
    max_seq_len=64,
    norm_eps=1e-5,
    rope_base=10_000.0,
    tied_head=False,
)
torch.manual_seed(7)
model = Llama(config).double()
for weight in model.parameters():
    if weight.ndim == 1:
        weight.uniform_(0.5, 1.5)
    else:
        weight.normal_(std=2 / weight.shape[-1] ** 0.5)

tokens = torch.randint(config.vocab_size, (3, 12))
full = model(tokens)
full.shape

# %% [markdown]
# Run the text, take the best-scored next token, append it, run the text again:


# %%
def generate_by_rerunning(model, tokens, num_new):
    for _ in range(num_new):
        best = model(tokens)[:, -1].argmax(dim=-1)
        tokens = torch.cat([tokens, best[:, None]], dim=1)
    return tokens


rerun = generate_by_rerunning(model, tokens[:, :5], num_new=10)
rerun[0].tolist()

# %% [markdown]
# It is correct, and it needs nothing but the forward pass that training uses. But look
# at what it computes. The picture below watches the key projection of the first layer
# while a text of twelve words grows; the words only label the tokens.

# %% mystnb={"image": {"alt": "Two staircases of words, a text growing by one word in each of eight rows. Above, without a cache, each row is filled: 11 blue cells computed for the first time and 49 orange cells computed again. Below, with a cache, the first row (prefill) has four blue cells, each later row (decode) has one blue cell at its end, 11 in all, and 49 pale cells are read back."}, "figure": {"name": "fig-cache-staircase", "caption": "The tokens whose keys each step computes, measured on the small model. The prompt is four tokens; each step draws one more."}} tags=["hide-input"]
prompt, rest = "Once upon a time", "there was a llama who hums all day"
words = [*prompt.split(), *rest.split()]
staircase = figures.staircase_data(model, words, num_prompt=4)
figures.draw_staircase(staircase)

# %%
confirm("60 token passes without a cache", staircase.without.sum() == 60)
confirm("11 with it, each token once", (staircase.with_cache.sum(0)[:11] == 1).all())
passes = sum(range(1, 1001))
print(f"1000 steps: {passes} passes, {(passes - 1000) / passes:.1%} of them repeats")

# %% [markdown]
# The last word is drawn but never computed: nothing comes after it. And that answers
# the first question at the top: 99.8 %. The rest of this chapter is about the lower
# half of {numref}`fig-cache-staircase`: why it is allowed, what must be kept, and what
# that costs.
#
# ## Why the old rows may be kept
#
# Let $x_i^{(l)}$ be the vector of token $i$ that enters layer $l$. The norms, the
# projections and the feed-forward network treat each token on its own. Only attention
# mixes tokens, and the causal mask gives token $i$ the tokens up to $i$. So each layer
# is a function
#
# $$
# x_i^{(l+1)} = f^{(l)}\bigl(x_0^{(l)}, \dots, x_i^{(l)}\bigr).
# $$ (eq-cache-causal)
#
# *Induction over layers.* $x_i^{(0)}$ is the embedding of token $i$: it knows no other
# token. If $x_0^{(l)}, \dots, x_i^{(l)}$ do not depend on tokens after $i$, then by
# {eq}`eq-cache-causal` neither does $x_i^{(l+1)}$, nor do the key and the value that
# layer $l$ makes from $x_i^{(l)}$. A token that is appended changes no earlier row, in
# no layer.


# %%
# Check eq-cache-causal.
def layer_inputs(model, tokens):
    """What enters each layer, and what leaves the last: one (B, T, D) per item."""
    rows = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args: rows.append(args[0]))
        for block in [*model.blocks, model.norm]
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return rows


other_end = tokens.clone()
other_end[:, -1] = (other_end[:, -1] + 1) % config.vocab_size
long, short = layer_inputs(model, tokens), layer_inputs(model, tokens[:, :-1])
swapped = layer_inputs(model, other_end)
confirm(
    "another last token: every earlier row the same, bit for bit, in every layer",
    all(torch.equal(a[:, :-1], b[:, :-1]) for a, b in zip(long, swapped, strict=True)),
)
confirm(
    "no last token at all: the same to rounding",
    all(torch.allclose(a[:, :-1], b) for a, b in zip(long, short, strict=True)),
)


def wrong_open_mask(num_tokens, num_cached=0, device=None):
    return torch.ones_like(causal_mask(num_tokens, num_cached, device))


with patch("annotated_src.placement.causal_mask", wrong_open_mask):
    both_ways = [layer_inputs(model, ids)[-1] for ids in (tokens, other_end)]
confirm(
    "without the causal mask the earlier rows do change",
    (both_ways[0] - both_ways[1])[:, :-1].abs().max() > 0.1,
)

# %% [markdown]
# As real numbers the rows are equal. As floats they were equal bit for bit while the
# shapes were the same; a call with fewer rows may add the same products in another
# order, and then last digits differ. So the checks below compare to $10^{-5}$ (softmax
# and norms round to float32). It also means that where two next tokens score almost
# alike, a cache may change which one wins.
#
# ## What the next token needs
#
# The newest token $t$ has one query $q_t$ and looks at all keys and values up to
# itself. Let $\tilde q_t = R_t q_t$ and $\tilde k_j = R_j k_j$ be turned by the
# rotations of their positions ({ref}`ch-rope`). Then, in each head,
#
# $$
# o_t = \sum_{j=0}^{t} w_{tj} v_j, \qquad
# (w_{t0}, \dots, w_{tt}) = \operatorname{softmax}_j
# \frac{\tilde q_t \cdot \tilde k_j}{\sqrt H}.
# $$ (eq-cache-newest)
#
# Read it for what must be remembered.
#
# - **Values** $v_j$ of all earlier tokens: yes.
# - **Keys** of all earlier tokens: yes, and *after* rotation. The angle of $R_j$
#   depends on the key's own position $j$ and not on who asks, so a key is turned once
#   and kept turned.
# - **Queries**: no. $q_j$ serves row $j$ only, and row $j$ is done. Nothing later asks
#   with it.
#
# Here it is with every number visible: one head of width 2, no rotation, and a query
# chosen so that the weights are 2 : 1 : 2 (its scores are $\ln 2$, $0$ and $\ln 2$).

# %%
# Check eq-cache-newest.
keys = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.float64)
values = torch.tensor([[5, 0], [0, 5], [10, 10]], dtype=torch.float64)
query = torch.tensor([math.sqrt(2) * math.log(2), 0], dtype=torch.float64)

cache = LayerCache(
    batch_size=1, num_kv_heads=1, max_seq_len=4, head_dim=2, dtype=torch.float64
)
cache.append(keys[None, None, :2], values[None, None, :2])
print("after two tokens ", cache.keys[0, 0].tolist(), "length", cache.length)
all_keys, all_values = cache.append(keys[None, None, 2:], values[None, None, 2:])
print("after the third  ", cache.keys[0, 0].tolist(), "length", cache.length)

scores = all_keys[0, 0] @ query / math.sqrt(2)
weights = scores.exp() / scores.exp().sum()
print("weights", [round(w, 3) for w in weights.tolist()])
out = attend(query[None, None, None], all_keys, all_values, causal_mask(1, 2))
print("output ", [round(o, 3) for o in out[0, 0, 0].tolist()])
confirm(
    "2/5 (5, 0) + 1/5 (0, 5) + 2/5 (10, 10) = (6, 5)",
    torch.allclose(out[0, 0, 0], out.new_tensor([6, 5])),
)

# %% [markdown]
# ## The annotated source
#
# One {py:class}`annotated_src.kv_cache.LayerCache` a layer. It reserves its memory
# once, writes each new token in place, and hands back *views*: slices that share the
# cache's memory, so that nothing is copied.

# %%
show(LayerCache)

# %%
room = LayerCache(2, 2, 8, 4, torch.float64)
new = torch.randn(2, 2, 3, 4, dtype=torch.float64)
view, _ = room.append(new, -new)
again, _ = room.append(new, -new)
confirm(
    "the views lie in the cache's own memory", view.data_ptr() == room.keys.data_ptr()
)
confirm(
    "the second call hands out the same memory, longer",
    again.data_ptr() == view.data_ptr(),
)
room.keys[0, 0, 0, 0] = 42
confirm(
    "a write to the cache shows in every view",
    view[0, 0, 0, 0] == again[0, 0, 0, 0] == 42,
)

# %% [markdown]
# Two things around attention must know how many tokens $c$ are cached. Row $t$ of a
# call is token $c + t$ of the text, so it has position $c + t$, and it sees
#
# $$
# \operatorname{visible}(t, j) = \bigl[\, j \le c + t \,\bigr],
# \qquad 0 \le t < T,\quad 0 \le j < c + T.
# $$ (eq-cache-mask)
#
# (The bracket is true or false.)

# %%
show(causal_mask, positions_after)

# %%
# Check eq-cache-mask.
print(causal_mask(num_tokens=3, num_cached=4).int()[0, 0])
print("positions", positions_after(num_cached=4, num_tokens=3).tolist())
rows, columns = torch.arange(3)[:, None], torch.arange(7)
confirm(
    "the mask is j <= c + t", torch.equal(causal_mask(3, 4)[0, 0], columns <= 4 + rows)
)
confirm(
    "it is the last rows of the full mask",
    torch.equal(causal_mask(3, 4), causal_mask(7)[:, :, 4:]),
)
confirm("a single new token sees everything", causal_mask(1, 4).all())

# %% [markdown]
# ## The proof, and the proof by code
#
# Write $F(x_{0:b})$ ($F$ a function, $b$ a place in the text) for the full pass over tokens $0, \dots, b-1$, and
# $F(x_{a:b} \mid C_a)$ for a call on tokens $a, \dots, b-1$ with a cache of the first
# $a$. Then, whenever $0 \le a < b$,
#
# $$
# F(x_{a:b} \mid C_a) = F(x_{0:b})_{a:b},
# \qquad\text{and the call leaves } C_b \text{ behind.}
# $$ (eq-cache-chunk)
#
# *Induction over layers*, inside one call. Embeddings agree. Suppose the rows that
# enter layer $l$ are those of the full pass. Then so are their queries, keys and
# values, because $c = a$ and position $c + t$ is the true one. $C_a$ holds the keys and
# values of a pass over the first $a$ tokens; by {eq}`eq-cache-causal` the full pass,
# which knows more tokens, has the same. Appending gives all of
# $\tilde k_0, \dots, \tilde k_{b-1}$ in order, which is what $C_b$ holds. By
# {eq}`eq-cache-mask` each row sees the tokens that it sees in the full pass, so
# {eq}`eq-cache-newest` gives the same $o_t$. The rest of the layer treats each token on
# its own, so the rows that enter layer $l + 1$ are again those of the full pass.
#
# *Induction over calls.* $C_0$ is empty and right. Each call finds $C_a$ and leaves
# $C_b$. So **any** way to cut a text into calls gives the logits of one full pass.


# %%
# Check eq-cache-chunk.
def run_in_chunks(model, tokens, sizes):
    cache = model.new_cache(tokens.shape[0], tokens.shape[1])
    chunks = tokens.split(sizes, dim=1)
    return torch.cat([model(chunk, cache) for chunk in chunks], dim=1), cache


def random_sizes(total, most):
    sizes = []
    while sum(sizes) < total:
        sizes.append(min(int(torch.randint(1, most + 1, ())), total - sum(sizes)))
    return sizes


def close(a, b):
    return torch.allclose(a, b, atol=1e-5, rtol=1e-5)


whole, whole_cache = run_in_chunks(model, tokens, [12])
stepwise, step_cache = run_in_chunks(model, tokens, [5] + [1] * 7)
confirm("one call with a cache = no cache", close(whole, full))
confirm("prefill of 5, then one at a time = no cache", close(stepwise, full))
confirm(
    "and both leave the same keys and values behind, in every layer",
    all(
        close(a.keys, b.keys) and close(a.values, b.values)
        for a, b in zip(whole_cache, step_cache, strict=True)
    ),
)
cuts = [random_sizes(12, most=5) for _ in range(20)]
print("such as", *cuts[:3])
confirm(
    "20 random ways to cut the text = no cache",
    all(close(run_in_chunks(model, tokens, sizes)[0], full) for sizes in cuts),
)

# %% [markdown]
# Generation is one of these cuts. The first call takes the whole prompt: **prefill**.
# Each later call takes one token: **decode**. Both are the same line of code,
# `model(step, cache)`; only the length of `step` differs. (The lines about `is_token` are
# for prompts of different lengths; {ref}`ch-decoding` explains them.)

# %%
show(_decode)

# %% [markdown]
# :::{admonition} A figure that moves: one text, written twice
# :class: moving kv-cache
# Twelve words, of which four are the prompt; go through the steps. Without a cache the
# whole text passes through the layers each time: 4 tokens, then 5, and 11 in step 8, of
# which 10 have passed before. That makes 60 in all. With a cache the prefill sends 4 and
# every later step 1, which makes 11; in step 8 the keys and values of 10 are read back. The
# first step is the same for both. In the end it is 2.01 million operations against 0.38.
# :::
#
# ## The ladder of equality
#
# Loop without a cache = {py:func}`annotated_src.generate.generate` = the original: a
# `LlamaForCausalLM` of transformers with its `DynamicCache`, whose weights our loader
# reads. Then the caches themselves, tensor for tensor. (`eager` asks transformers for
# attention spelled out, with its softmax in float32 like ours.)

# %%
from tempfile import TemporaryDirectory

import transformers
from transformers import DynamicCache, LlamaForCausalLM

from annotated_src.checkpoint import load_model

transformers.utils.logging.disable_progress_bar()

confirm(
    "the loop = generate, greedy ids",
    torch.equal(generate(model, tokens[:, :5], max_new_tokens=10), rerun),
)

torch.manual_seed(8)
theirs = LlamaForCausalLM(
    transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=36,
        max_position_embeddings=64,
        initializer_range=0.4,
        attn_implementation="eager",
    )
)
theirs = theirs.double().eval()
for name, weight in theirs.named_parameters():
    if "norm" in name:
        weight.uniform_(0.5, 1.5)
with TemporaryDirectory() as folder:
    theirs.save_pretrained(folder)
    ours = load_model(folder, torch.float64)

past, step, text = DynamicCache(), tokens[:, :5], [tokens[:, :5]]
for _ in range(10):
    step = theirs(step, past_key_values=past).logits[:, -1:].argmax(dim=-1)
    text.append(step)
text = torch.cat(text, dim=1)
confirm(
    "generate = transformers with DynamicCache",
    torch.equal(generate(ours, tokens[:, :5], max_new_tokens=10), text),
)
confirm(
    "the loop = transformers with DynamicCache",
    torch.equal(generate_by_rerunning(ours, tokens[:, :5], 10), text),
)

_, cache = run_in_chunks(ours, text[:, :-1], [5] + [1] * 9)
confirm(
    "both caches hold 14 tokens of 2 heads",
    past.layers[0].keys.shape == cache[0].keys.shape == (3, 2, 14, 8),
)
confirm(
    "our cached keys and values = theirs, in every layer",
    all(
        close(a.keys, b.keys) and close(a.values, b.values)
        for a, b in zip(cache, past.layers, strict=True)
    ),
)

# %% [markdown]
# So transformers too keeps keys after rotation, and before `repeat_kv`: two heads are
# stored, not six.
#
# ## Counting operations
#
# Let $P$ be the number of weights in the matrices that multiply a token (all but the
# embedding; the head counts). Each does one multiplication and one addition per token:
# $2P$ operations. Attention compares a token with $S$ keys ($2H$ operations a key) and
# mixes $S$ values ($2H$ each), in $L$ layers of $N$ heads: $4LNHS$. A call with $T$
# tokens and $c$ cached has $S = c + T$ columns, the masked ones included:
#
# $$
# \Phi(T, c) = T\,\bigl(2P + A\,(c + T)\bigr), \qquad A = 4LNH.
# $$ (eq-cache-call)
#
# Generating $n$ tokens after a prompt of $p$ costs
#
# $$
# \Phi_{\text{without}} = \sum_{s=p}^{p+n-1} \Phi(s, 0)
# = \sum_{s=p}^{p+n-1} \bigl(2P\,s + A\,s^2\bigr),
# $$ (eq-cache-without)
#
# $$
# \begin{aligned}
# \Phi_{\text{with}} &= \Phi(p, 0) + \sum_{s=p+1}^{p+n-1} \Phi(1, s-1) \\
# &= 2P\,(p+n-1) + A\,\Bigl(p^2 + \sum_{s=p+1}^{p+n-1} s\Bigr).
# \end{aligned}
# $$ (eq-cache-with)
#
# In words: without the cache, the matrices' share grows with the square of the length
# and attention's with its cube. With the cache, the first grows in proportion and the
# second with the square. PyTorch can count the matrix products that really run, so the
# formulas need no trust. (Here every token gets its scores. `generate` asks for the last
# token's alone, which spares most of the head's share of $\Phi(p, 0)$:
# {ref}`ch-decoding`.)

# %%
show(figures.product_weights, figures.call_flops)

# %%
# Check eq-cache-call, eq-cache-without, eq-cache-with.
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def counted(run, *args, **named):
    # MATH spells attention out in matrix products, which the counter knows.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(*args, **named)
    return counter.get_total_flops()


def formulas(c, p, n):
    weights = 2 * figures.product_weights(c)
    per_key = 4 * c.num_layers * c.num_heads * c.head_dim
    without = sum(weights * s + per_key * s**2 for s in range(p, p + n))
    squares = p**2 + sum(range(p + 1, p + n))
    return without, weights * (p + n - 1) + per_key * squares


middle = LlamaConfig(1000, 4, 96, 6, 2, 16, 256, 128, 1e-5, 10_000.0, True)
found = {}
for name, net, p, n in (("small", model, 5, 10), ("middle", Llama(middle), 7, 40)):
    prompt, cache = torch.arange(p)[None], net.new_cache(1, p + 3)
    calls = (counted(net, prompt, cache), counted(net, prompt[:, :3], cache))
    by_hand = tuple(figures.call_flops(net.config, *size) for size in ((p, 0), (3, p)))
    loops = (
        counted(generate_by_rerunning, net, prompt, n),
        counted(run_in_chunks, net, torch.arange(p + n - 1)[None], [p] + [1] * (n - 1)),
    )
    found[name] = (calls, by_hand, loops, formulas(net.config, p, n))
for name, (calls, by_hand, loops, sums) in found.items():
    confirm(f"{name}: a prefill and a chunk, counted = formula", calls == by_hand)
    confirm(f"{name}: without a cache, counted = {sums[0]:,}", loops[0] == sums[0])
    confirm(f"{name}: with the cache, counted = {sums[1]:,}", loops[1] == sums[1])

# %% [markdown]
# The counts are equal, not close. So use the formula at SmolLM2's sizes
# {cite:p}`allal2025`, where counting would take a while: $P$ is 134 million, $A$ is
# 69,120, and the prompt is a single token.

# %% mystnb={"image": {"alt": "Operations against tokens in the text, both axes logarithmic, for SmolLM2-135M. The curve without a cache climbs twice as steeply as the curve with one. At 1,000 tokens an arrow spans the gap between them: 519 times. Labels say that twice the text is 4 times the work without a cache and 2 times with it."}, "figure": {"name": "fig-cache-cost", "caption": "What a text costs in multiplications and additions, by the formula that the counter confirmed."}} tags=["hide-input"]
cost = figures.cost_data(figures.SMOLLM2)
figures.draw_cost(cost)

# %%
big = figures.SMOLLM2
P, A = figures.product_weights(big), 4 * big.num_layers * big.num_heads * big.head_dim
print(f"P = {P:,}, A = {A:,}")
without, with_cache = formulas(big, 1, 1000)
confirm(
    "the curves are the formulas",
    (cost.without[999], cost.with_cache[999]) == (without, with_cache),
)
print(f"1000 tokens: {without:.1e} operations without, {with_cache:.1e} with")
print(
    f"that is {without / with_cache:.0f} times; "
    f"attention outweighs the matrices from {2 * P // A + 1:,} keys on"
)

# %% [markdown]
# Operations are not time. A decode step uses each weight for one token of a row, so a
# processor mostly waits for weights to arrive from memory; prefill uses each for the
# whole prompt {cite:p}`shazeer2019,pope2022`. The cache removes the arithmetic and
# leaves that wait.
#
# ## The price: memory
#
# The sum of {ref}`ch-heads` again, where $K$ is made small for its sake: for a batch of
# $B$ and $S$ tokens of room, with $b$ bytes to a number,
#
# $$
# \text{bytes} = 2 \cdot L \cdot B \cdot K \cdot S \cdot H \cdot b.
# $$ (eq-cache-bytes)
#
# The buffer has a second price: room must be reserved before the text is known. The
# alternative grows the tensors by `torch.cat`, as `DynamicCache` does. Each step then
# makes a new tensor and copies all that is old into it. With $m$ bytes to a token, $n$
# steps write
#
# $$
# \text{written}_{\text{cat}} = \sum_{s=1}^{n} m s = m\,\frac{n(n+1)}{2},
# \qquad \text{written}_{\text{in place}} = m\,n.
# $$ (eq-cache-copied)


# %%
# Check eq-cache-bytes, eq-cache-copied.
class GrowingCache:
    """The same interface, by concatenation; counts the bytes that it writes."""

    def __init__(self):
        self.keys = self.values = None
        self.length = self.written = 0

    def append(self, keys, values):
        if self.length:
            keys = torch.cat([self.keys, keys], dim=2)
            values = torch.cat([self.values, values], dim=2)
        self.keys, self.values, self.length = keys, values, keys.shape[2]
        self.written += keys.nbytes + values.nbytes
        return keys, values


growing = [GrowingCache() for _ in model.blocks]
in_place = model.new_cache(3, 12)
grown = torch.cat([model(tokens[:, i : i + 1], growing) for i in range(12)], dim=1)
placed = torch.cat([model(tokens[:, i : i + 1], in_place) for i in range(12)], dim=1)
confirm("growing = in place = no cache", close(grown, placed) and close(grown, full))

reserved = sum(layer.num_bytes for layer in in_place)
confirm("the bytes are 2 L B K S H b", reserved == 2 * 3 * 3 * 2 * 12 * 8 * 8)
per_token = reserved // 12
confirm(
    "growing wrote m n (n + 1) / 2 bytes",
    sum(c.written for c in growing) == per_token * 12 * 13 // 2,
)

moved, past = [], DynamicCache()
for i in range(6):
    before = past.layers[0].keys if i else None
    theirs(tokens[:, i : i + 1], past_key_values=past)
    moved.append(
        before is not None and before.data_ptr() != past.layers[0].keys.data_ptr()
    )
confirm(
    "DynamicCache moves at every step after the first", moved == [False] + [True] * 5
)

real = 2 * big.num_layers * big.num_kv_heads * big.head_dim * 4
print(
    f"SmolLM2, float32: {real:,} bytes a token, "
    f"{real * big.max_seq_len / 2**20:.0f} MiB for {big.max_seq_len:,} tokens"
)
print(
    f"1000 tokens one by one: {real * 1000 / 1e6:.0f} MB written in place, "
    f"{real * 500_500 / 1e9:.0f} GB by cat"
)

# %% [markdown]
# Do not conclude too much. Attention reads the whole cache at every step in any case,
# so copying multiplies the traffic by a constant; our own
# {py:func}`annotated_src.attention.repeat_kv` copies too. What really hurts is that old
# and new tensors exist at the same time, and that addresses and shapes change at each
# step, which compiled code dislikes. `DynamicCache` buys something with it: no need to
# know the length beforehand.
#
# ## Rewind
#
# What lies beyond `length` is never read, and is overwritten by the next append. So to
# forget the end of a text (the user edits the last turn, or a guessed continuation
# proves wrong) you set one integer per layer. Mind the views: one that was handed out
# before still shows the same memory, and so whatever is written there next.


# %%
def rewind(cache, length):
    for layer in cache:
        layer.length = length


cache = model.new_cache(3, 12)
model(tokens[:, :10], cache)
rewind(cache, 6)
edited = tokens.flip(1)[:, :5]
after = model(edited, cache)
fresh = model(torch.cat([tokens[:, :6], edited], dim=1))[:, 6:]
confirm("rewound to 6 and continued = a fresh pass", close(after, fresh))

view, _ = room.append(new[:, :, :2], new[:, :, :2])
kept = view[:, :, -1].clone()
room.length -= 1
room.append(2 * new[:, :, :1], new[:, :, :1])
confirm(
    "a view taken before a rewind sees what overwrites it",
    not torch.equal(view[:, :, -1], kept),
)

# %% [markdown]
# ## Padding, and errors
#
# Rows of different length share a batch by padding on the *left*: then the newest
# tokens stand in one column. `is_token` covers the cache and the call, so it grows by a
# column of True at each step. The model derives from it a mask that hides the padding
# ({py:func}`annotated_src.masks.padded_causal_mask`) and positions that count tokens
# only ({py:func}`annotated_src.positions.padded_positions`).

# %%
lengths = [3, 6, 5]
prompts = [tokens[i, :length] for i, length in enumerate(lengths)]
is_token = torch.arange(6) >= 6 - torch.tensor(lengths)[:, None]
padded = torch.zeros(3, 6, dtype=torch.int64)
padded[is_token] = torch.cat(prompts)
print(is_token.int())

cache, step, batch = model.new_cache(3, 12), padded, []
for _ in range(6):
    step = model(step, cache, is_token)[:, -1:].argmax(dim=-1)
    batch.append(step)
    is_token = torch.cat([is_token, is_token.new_ones(3, 1)], dim=1)
batch = torch.cat(batch, dim=1)
alone = [generate(model, prompt[None], max_new_tokens=6)[0, -6:] for prompt in prompts]
confirm(
    "each row of the padded batch = that row alone",
    torch.equal(batch, torch.stack(alone)),
)
confirm(
    "and so are its keys, behind the padding",
    all(
        close(
            run_in_chunks(model, prompt[None], [n])[1][-1].keys[0],
            cache[-1].keys[row, :, 6 - n : 6],
        )
        for row, (prompt, n) in enumerate(zip(prompts, lengths, strict=True))
    ),
)

# %% [markdown]
# A cache that is full, or made for another batch, refuses, and is left as it was.

# %%
small = model.new_cache(batch_size=3, max_seq_len=8)
model(tokens[:, :7], small)
before = [layer.keys.clone() for layer in small]
for attempt in (tokens[:, 7:10], tokens[:2, 7:8]):
    try:
        model(attempt, small)
    except ValueError as error:
        print(error)
confirm(
    "after both errors nothing has changed, in any layer",
    all(
        layer.length == 7 and torch.equal(layer.keys, keys)
        for layer, keys in zip(small, before, strict=True)
    ),
)
confirm(
    "and there is still room for one", close(model(tokens[:, 7:8], small), full[:, 7:8])
)

# %% [markdown]
# :::{admonition} Paper and code
# :class: paper-code
# An argument named after the cache is not yet a cache. In a simplified Llama that is
# meant for teaching, `LlamaAttention.forward` takes `past_key_value` and returns
# it, but nothing is ever written into it, no layer is ever given one, and the model's
# output does not carry it. In the original the one line between rotation and
# `repeat_kv` does the work: `past_key_values.update(...)`. Without that line the class
# is right only when the whole text is run again at each step. Decode with it, and each
# token sees itself alone, at position 0.
# :::


# %%
def wrong_forward(self, x, rotate, mask, cache=None):
    return right_forward(self, x, rotate, mask)  # accepts a cache, never updates it


right_forward = Attention.forward
lost = model.new_cache(3, 12)
with patch.object(Attention, "forward", wrong_forward):
    first = model(tokens[:, :5], lost)
    second = model(tokens[:, 5:6], lost)
confirm("the prefill is right", close(first, full[:, :5]))
confirm("the cache is still empty", cached_length(lost) == 0 and not lost[0].keys.any())
confirm(
    "the next token was run as a text of its own", close(second, model(tokens[:, 5:6]))
)
confirm("and is wrong", (second - full[:, 5:6]).abs().max() > 1)

# %% [markdown]
# :::{admonition} Break it
# :class: break-it
# The two classics. One: positions restart at 0 in each call. Two: the mask has no
# offset (`tril` with `diagonal=0`), so a new token sees the *first* key and no other.
# All shapes fit, nothing complains, and every test that runs one call passes.
# :::


# %%
def wrong_positions(num_cached, num_tokens, device=None):
    return torch.arange(num_tokens, device=device)[None]


def wrong_mask(num_tokens, num_cached=0, device=None):
    size = (1, 1, num_tokens, num_cached + num_tokens)
    return torch.ones(size, dtype=torch.bool, device=device).tril()


print("largest error of a logit, prefill of 5, then one token at a time")
for name, wrong in (("positions_after", wrong_positions), ("causal_mask", wrong_mask)):
    with patch(f"annotated_src.placement.{name}", wrong):
        broken, _ = run_in_chunks(model, tokens, [5] + [1] * 7)
        ids = generate(model, tokens[:1, :5], max_new_tokens=10)[0, 5:]
    errors = (broken - full).abs().amax(dim=(0, 2))
    print(f"{name:16s}", *(f"{error:.1f}" for error in errors.tolist()))
    print(f"{'':16s} writes", ids.tolist())
    confirm(
        "prefill untouched, every decode step wrong",
        errors[:5].max() < 1e-5 and errors[5:].min() > 1,
    )
print(f"{'right':16s} writes", rerun[0, 5:].tolist())
print(f"the logits' standard deviation is {full.std():.1f}")

# %% [markdown]
# Errors of 6 to 9 among logits that themselves spread by about 2 mean another text. The
# first token is right in both: it comes from the prefill. The test that catches both is
# {eq}`eq-cache-chunk`.
#
# ## Exercises
#
# Write your function in a cell of your own and give it to `check`. A question takes
# its name and a letter: `check("when_a_prompt_sees_itself", "a")`.

# %%
from annotated_src.exercises import check  # noqa: F401 - for your cells
from annotated_src.exercises.cache import chapter as exercises

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("append_tokens")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("append_tokens")

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("reorder_rows")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("reorder_rows")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
solved_reorder = exercises["reorder_rows"].solution
cache = model.new_cache(3, 12)
model(tokens[:, :7], cache)
for layer in cache:
    layer.keys[:], layer.values[:] = solved_reorder(layer.keys, layer.values, [2, 0, 2])
chosen = tokens[[2, 0, 2]]
confirm(
    "every layer reordered in place, then continued = the reordered text",
    close(model(chosen[:, 7:], cache), full[[2, 0, 2], 7:]),
)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("accept_draft")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("accept_draft")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
solved_accept = exercises["accept_draft"].solution
truth = rerun[:1]
draft = truth[0, 6:11].tolist()
draft[2] = (draft[2] + 1) % config.vocab_size
cache = model.new_cache(1, 20)
model(truth[:, :5], cache)
call = torch.tensor([[int(truth[0, 5]), *draft]])  # the newest token, then the draft
best = model(call, cache)[0].argmax(dim=-1).tolist()
accepted, length = solved_accept(best, draft, 5)
rewind(cache, length)
confirm(
    "two guesses accepted, and one id of the model's own",
    accepted == truth[0, 6:9].tolist(),
)
following = model(torch.tensor([accepted[-1:]]), cache)[:, -1].argmax(dim=-1)
confirm("decoding goes on as if nothing had been guessed", following == truth[:, 9])

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("when_a_prompt_sees_itself")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("when_a_prompt_sees_itself")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
from annotated_src.masks import prefix_mask


def logits_of_chat(context, sizes):
    """The logits when the first `context` tokens see each other, cut into calls."""

    def sees_itself(num_tokens, num_cached=0, device=None):
        whole = prefix_mask(torch.tensor([context]), num_cached + num_tokens)
        return whole[:, :, num_cached:]

    with patch("annotated_src.placement.causal_mask", sees_itself):
        return run_in_chunks(model, tokens, sizes)[0]


chat = logits_of_chat(6, [12])
confirm(
    "prompt in one call, then token by token = one call",
    close(logits_of_chat(6, [6] + [1] * 6), chat),
)
in_two = (logits_of_chat(6, [3, 3] + [1] * 6) - chat).abs().amax(dim=(0, 2))
confirm("prompt in two calls: every row is another one", in_two.min() > 0.1)
longer = (logits_of_chat(9, [12]) - chat).abs().amax(dim=(0, 2))
confirm("with a longer prompt the old rows are others, too", longer[:6].min() > 0.1)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("scores_turned_late")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("scores_turned_late")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
from annotated_src.rotary import rope_frequencies

mended, given = (
    exercises["scores_turned_late"].solution,
    exercises["scores_turned_late"].given,
)
raw_queries, raw_keys = torch.randn(2, 1, 1, 9, 8, dtype=torch.float64)
frequencies = rope_frequencies(8, 10_000.0)
inputs = raw_queries[:, :, -1:], raw_keys, frequencies
confirm(
    "one token: the scores without any rotation",
    torch.allclose(given(*inputs), raw_queries[:, :, -1:] @ raw_keys.mT, atol=1e-5),
)
confirm("not the right ones", (given(*inputs) - mended(*inputs)).abs().max() > 0.1)
confirm(
    "the right ones are the last row of the prefill's, which was right before",
    torch.allclose(
        mended(*inputs), given(raw_queries, raw_keys, frequencies)[:, :, -1:]
    ),
)

# %% [markdown]
# ## What to remember
#
# - Causality makes old rows final. Everything else about the cache follows from that.
# - Keep rotated keys and values, before `repeat_kv`. Never queries.
# - A call needs one number from the cache, its length: for positions and for the mask.
# - Any way to cut a text into calls gives the same logits. Test that, with chunks, and
#   most cache bugs die.
# - Without the cache the work grows with the square and the cube of the length; with
#   it, in proportion and with the square. The price is $2LKHb$ bytes a token.
# - To forget, set `length` back.
#
# **Where to read on.** transformers: `cache_utils.py`, `DynamicLayer.update` (grows)
# and `StaticLayer.update` (in place); `modeling_llama.py`, `LlamaAttention.forward`
# (the update) and `LlamaModel.forward` (`past_seen_tokens`, the offset). ChatGLM-6B:
# `modeling_chatglm.py`, `attention_fn`, where `layer_past` is concatenated on dimension
# 0, because its cache is (S, B, heads, head_dim). PyTorch:
# `torch/utils/flop_counter.py`. What the cache means for fast hardware:
# {cite:t}`pope2022`; the idea that shrinks it: {cite:t}`shazeer2019`. Next,
# {ref}`ch-llama` puts the whole model together.
