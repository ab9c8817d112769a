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
# (ch-prefix-mask)=
# # Prefix-LM masks
#
# :::{admonition} In this chapter
# :class: at-a-glance
# **50 minutes · moderate.** Afterwards you can write ChatGLM's mask from its ids, prove
# what can flow through any number of layers and what cannot, say what reading both ways
# costs, and tell from a symptom which face of a mask went wrong.
# :::

# %% tags=["remove-input"]
from annotated_src.figures.model_map import ChatGLMMap

ChatGLMMap("mask")

# %% [markdown]
# :::{admonition} Predict before you run
# :class: predict
# ChatGLM-6B has read a text of 1000 words (take a word as one token) and cached a key
# for each, in each of its 28 layers. You add one word at the end of the text, just
# before `[gMASK] <sop>`. How many of the 28,000 cached keys are still right: all of
# them, 1000 or none?
# :::

# %%
import math
from functools import partial

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_mask, or_masks

from annotated_src.answer_cache import AnswerCache
from annotated_src.attention import attend
from annotated_src.attention_by_layer import attend_by_layer
from annotated_src.chatglm_text import chat_prompt
from annotated_src.figures import prefix_mask as figures
from annotated_src.golden import golden, golden_config, golden_model
from annotated_src.loss import next_token_loss
from annotated_src.masks import (
    additive_to_visible,
    causal_mask,
    hide_padding,
    prefix_mask,
    visible_to_additive,
    visible_to_masked,
)
from annotated_src.models.chatglm import ChatGLM, ChatGLMConfig
from annotated_src.positions import BlankIds, context_lengths, prompt_positions
from annotated_src.show import confirm, show

_ = torch.manual_seed(0)
close = partial(torch.allclose, rtol=0, atol=1e-4)

# %% [markdown]
# ## Read both ways, write one way
#
# A row of ChatGLM's input has two parts ({ref}`ch-blanks`). The *context* is the text
# with its blank, up to and not including `<sop>`. It is all there from the start, so
# every token may look at all of it. The *answer* begins with `<sop>` and comes into
# being word by word, so a token of it may look back only. Everybody sees the context,
# nobody in the context sees the answer. A model masked like this is called a *prefix
# LM*; the context is the prefix. (The prefix of {ref}`ch-prefix-tuning` is another
# thing.)
#
# As loops:


# %%
def prefix_mask_loops(context, num_tokens):
    """A row is a token that looks, a column a token that is looked at."""
    mask = []
    for t in range(num_tokens):
        row = []
        for s in range(num_tokens):
            in_context = s < context
            not_ahead = s <= t
            row.append(in_context or not_ahead)
        mask.append(row)
    return mask


words = ["The", "cat", "[MASK]", "<sop>", "sat", "down"]
context = words.index("<sop>")
for word, row in zip(words, prefix_mask_loops(context, len(words)), strict=True):
    print(f"{word:>6}  {' '.join('■' if sees else '·' for sees in row)}")

# %% [markdown]
# With $c$ for the length of the context, and 1 for *may look*:
#
# $$
# A_{ts} = \begin{cases} 1 & \text{if } s < c \text{ or } s \le t \\
# 0 & \text{otherwise} \end{cases}
# \qquad t, s = 0, \dots, T - 1.
# $$ (eq-prefix-mask)
#
# The causal mask of {ref}`ch-attention` is one end of a scale, $c = 0$. The other is
# $c = T$, where all see all, as in BERT. The context slides between them.

# %%
# Check eq-prefix-mask.
T = 7
index = torch.arange(T)
contexts = torch.arange(T + 1)  # one row of the batch for each length
formula = (index < contexts[:, None, None]) | (index <= index[:, None])
loops = torch.tensor([prefix_mask_loops(c, T) for c in range(T + 1)])
confirm("loops = formula, for every context", torch.equal(loops, formula))
package = prefix_mask(contexts, T)
confirm("formula = package", torch.equal(formula, package[:, 0]))
limits = prefix_mask(torch.tensor([0, 1, T]), T)
confirm("context 0 is causal", torch.equal(limits[:1], causal_mask(T)))
confirm(
    "so is context 1: everybody sees token 0 anyway",
    torch.equal(limits[1], limits[0]),
)
confirm("context T sees everything", limits[2].all())

# %% [markdown]
# How many pairs may look? The $c$ columns of the context are full: $cT$ pairs. What
# remains of the answer is a triangle with side $T - c$:
#
# $$
# \sum_{t,s} A_{ts} = cT + \frac{(T-c)(T-c+1)}{2}
# = \frac{T(T+1)}{2} + \frac{c(c-1)}{2}.
# $$ (eq-prefix-pairs)
#
# On the right you see what a prefix LM adds to a causal one: the $c(c-1)/2$ pairs of
# the context that look *ahead*, and nothing else.

# %%
# Check eq-prefix-pairs.
for T in (1, 6, 9):
    c = torch.arange(T + 1, dtype=torch.float64)
    counted = prefix_mask(c.long(), T).double().sum(dim=(1, 2, 3))
    by_parts = c * T + (T - c) * (T - c + 1) / 2
    by_extra = T * (T + 1) / 2 + c * (c - 1) / 2
    confirm(
        f"T = {T}: both formulas count the pairs, for every context",
        torch.equal(counted, by_parts) and torch.equal(counted, by_extra),
    )

# %% [markdown]
# :::{admonition} A figure that moves: where the context ends
# :class: moving prefix-mask
# *She opened the door and left*, cut into context and answer: nine tokens, wherever the
# border is. With 5 tokens of context, 55 of 81 pairs may look, and 10 of them look ahead,
# all inside the context. With 1 token the mask is causal: 45 pairs, none of them ahead.
# Below the table stand the two numbers of {ref}`ch-blanks`. At `[MASK]` with 5 tokens of
# context the answer is at place 2, steps 1 to 4.
#
# **Try** dragging the border through the table. Which numbers stand still, and where?
# :::
#
# ## Small enough to see
#
# Let one head like all keys equally. Then a token's output is the plain mean of the
# values it sees. Six tokens hand over 3, 6, 9, 12, 15 and 18:

# %%
even = torch.zeros(1, 1, 6, 1)
handed_over = torch.tensor([3.0, 6, 9, 12, 15, 18])[None, None, :, None]
means = {}
print(f"{'':11}" + "".join(f"{word:>7}" for word in words))
for name, c in (("causal", 0), ("prefix LM", context), ("full", 6)):
    mask = prefix_mask(torch.tensor([c]), 6)
    means[name] = attend_by_layer(even, even, handed_over, mask, layer=1)[0, 0, :, 0]
    print(f"{name:11}" + "".join(f"{mean:7.1f}" for mean in means[name].tolist()))
confirm(
    "the context agrees on one mean, 6",
    close(means["prefix LM"][:3], torch.full((3,), 6.0)),
)
confirm(
    "an answer gets exactly what it gets under the causal mask",
    torch.equal(means["prefix LM"][3:], means["causal"][3:]),
)

# %% [markdown]
# Look at the last three columns. `<sop>` and what follows it see the same tokens under
# both masks, so in *one* layer the answer cannot tell a prefix LM from a causal model.
# It is the context that is different, and only from the second layer on does the answer
# look at tokens that have read what came after them.

# %%
tokens = torch.tensor([[5, 6, 2, 0, 7, 8]])  # two words [MASK] <sop> two words
vocabulary = ["<sop>", "[gMASK]", "[MASK]", "<eop>", *"abcde"]
for depth in (1, 2):
    small = figures.small_chatglm(vocabulary, depth)
    two_way, one_way = small(tokens), small(tokens, mask=causal_mask(6))
    same = torch.isclose(two_way, one_way, rtol=0, atol=1e-5).all(dim=-1)[0]
    print(f"{depth} layer{'s' if depth > 1 else ' '}: same logits", same.tolist())
    confirm(
        f"the answer {'has not' if depth == 1 else 'has'} noticed",
        same.tolist() == [False, False] + [depth == 1] * 4,
    )

# %% [markdown]
# (Token 2, `[MASK]`, goes with the answer: nothing of the context is ahead of it.)
#
# ## The annotated source
#
# The ids decide, row by row: the context ends where the first `<sop>` stands.

# %%
show(prefix_mask, context_lengths)

# %% [markdown]
# ## What can flow
#
# A mask speaks about one layer. A model has 28 of them, and information can change
# trains: from the answer to somebody who sees it, and from there on. The context is
# read both ways. So might a token learn about its future by a detour through the
# context?
#
# A block lets token $t$ read the tokens $s$ with $A_{ts} = 1$, itself among them. Through
# $L$ blocks a chain of $L$ looks must lead from $t$ to $s$. The matrix power counts
# such chains, so
#
# $$
# \frac{\partial\, \text{logits}_t}{\partial\, \text{embedding}_s} \ne 0
# \quad\text{only if}\quad (A^L)_{ts} > 0 .
# $$ (eq-prefix-flow)
#
# You can differentiate a whole ChatGLM. The one below has random weights, which make a
# derivative nonzero wherever a chain leads. The prefix mask is compared with a window,
# where each token sees itself and the two before it.

# %%
# Check eq-prefix-flow.
words = figures.BLANK.split()
vocabulary = [*words, "[gMASK]"]
tokens = torch.tensor([[vocabulary.index(word) for word in words]])
T, context = len(words), words.index("<sop>")
window = causal_mask(T).triu(-2)
prefix = prefix_mask(torch.tensor([context]), T)
reach = {}
for name, mask in (("window", window), ("prefix", prefix)):
    A = mask[0, 0].double()
    for depth in (1, 2, 3):
        small = figures.small_chatglm(vocabulary, depth)
        flows = figures.flow_sizes(small, tokens, mask) > 0
        chains = torch.linalg.matrix_power(A, depth) > 0
        confirm(
            f"{name}, {depth} deep: derivatives are nonzero exactly where a chain leads",
            torch.equal(flows, chains),
        )
        reach[name, depth] = flows.sum(dim=1).tolist()
print("tokens that each word depends on")
for (name, depth), counts in reach.items():
    print(f"  {name}, {depth} deep:", *counts)

# %% [markdown]
# Under the window the reach grows with depth. Under the prefix mask it does not move.
# No detour finds anything new, because the mask is *closed*:
#
# $$
# A_{ts} = 1 \text{ and } A_{sr} = 1 \quad\Longrightarrow\quad A_{tr} = 1 .
# $$ (eq-prefix-closed)
#
# The proof has two cases. If $r < c$, all see $r$, and so does $t$. If not, $s$ sees
# $r$ only because $r \le s$; then $s$ is no context token either, so $t$ sees $s$ only
# because $s \le t$; together $r \le t$. In words: whoever sees $s$ already sees all
# that $s$ sees. A chain of any length can then be cut down to one look, and *one
# layer's mask is the whole model's*.


# %%
# Check eq-prefix-closed.
def closed(mask):
    A = mask.double()
    two_looks = A @ A > 0
    return not (two_looks & ~mask).any()


every = [prefix_mask(torch.tensor([c]), T) for T in range(1, 9) for c in range(T + 1)]
confirm("prefix masks of up to 8 tokens are closed", all(map(closed, every)))
confirm("the window is not", not closed(window))

# %% mystnb={"image": {"alt": "Three rows of two 9 by 9 tables, labelled with the words The cat [MASK] the mat <sop> sat on <eop>: who looks, against looked at. Left the mask, right the derivatives through 3 layers. Causal: both are a filled lower triangle. Prefix LM with context 5: the first five columns, the context, are filled from top to bottom, with a triangle at the lower right for <sop> sat on <eop>. Full: everything is filled. Inside the mask's outline no derivative is missing, outside it all are white, exactly zero. The diagonals are darkest."}, "figure": {"name": "fig-prefix-flow", "caption": "Left, what the mask allows; light blue because it is context, dark blue because it is not ahead. Right, what flows through a ChatGLM of three layers with random weights: how strongly each token's logits depend on each token's embedding. The outlines are the masks'."}} tags=["hide-input"]
flow = figures.flow_data()
figures.draw_flow(flow)

# %%
for context, mask, size in zip(flow.contexts, flow.masks, flow.sizes, strict=True):
    confirm(
        f"context {context}: three layers, and the flow is the mask, cell by cell",
        torch.equal(size > 0, mask),
    )
    confirm(
        "and each token depends on itself most",
        torch.equal(size.argmax(dim=1), torch.arange(9)),
    )

# %% [markdown]
# Compare the right pictures of {numref}`fig-prefix-flow` with the left ones: not a cell
# too many after three layers, and not one too few. Zero means zero here, since a hidden
# score of $-10000$ leaves a weight that is exactly 0 ({ref}`ch-half-precision`). The
# dark diagonal is the residual, which ChatGLM multiplies by $\sqrt{56}$ in each block
# ({ref}`ch-block`).
#
# ## The gift and the price are one fact
#
# Why read the context both ways? Put a question *behind* a document. A causal model has
# finished reading the document before it meets the question: whatever you ask, the
# document's vectors are the same. A prefix LM reads the document in the light of the
# question. And that is why it must read it again for the next one.
#
# To see it, take the small model whose tensors the original code computed; its weights
# are random too, but ours and the original's are the same numbers.

# %%
model = golden_model()
config, ids = model.config, model.config.blank_ids
GMASK, SOP, PAD = ids.gmask, ids.sop, golden_config()["pad_token_id"]


def keys_of(tokens, mask=None):
    """What the cache holds of one prompt: (layers, heads, T, H)."""
    cache = model.new_cache(*tokens.shape)
    model(tokens, cache, mask=mask)
    return torch.stack([layer.keys[0] for layer in cache])


def kept(first, second, causal):
    """For each layer: how many words of the document have the same keys in both?"""
    masks = [causal_mask(p.shape[1]) if causal else None for p in (first, second)]
    pair = [keys_of(p, m) for p, m in zip((first, second), masks, strict=True)]
    same = torch.isclose(*(k[:, :, : len(document)] for k in pair), rtol=0, atol=1e-4)
    return same.all(dim=-1).all(dim=1).sum(dim=1).tolist()


def prompt(*text):
    return torch.tensor([[*text, GMASK, SOP]])


document = [17, 42, 99, 23, 61, 8]
questions = [prompt(*document, 70, 71), prompt(*document, 150, 151)]
print("of the document's 6 words, how many have the same keys for both questions?")
print("causal,    layers 1 to 3:", kept(*questions, causal=True))
print("prefix LM, layers 1 to 3:", kept(*questions, causal=False))
confirm(
    "a causal model has not noticed which question it is",
    kept(*questions, causal=True) == [6, 6, 6],
)
confirm(
    "a prefix LM has, in every word, from the second layer on",
    kept(*questions, causal=False) == [6, 0, 0],
)

# %% [markdown]
# Only the first layer's keys stay, because they are made from a word and its place
# before anybody has looked at anybody. The same happens when the context gets longer:

# %% mystnb={"image": {"alt": "Two tables of 4 layers by 5 cached words: who, sat, on, the, mat. Causal: all 20 cells are light blue and say same. Prefix LM: the bottom row, layer 1, says same; the 15 cells of layers 2 to 4 are orange and say moved."}, "figure": {"name": "fig-prefix-extension", "caption": "A model of four layers with random weights has read five words; then a sixth is added to the context. Which of the cached keys are still right?"}} tags=["hide-input"]
extension = figures.extension_data()
figures.draw_extension(extension)

# %%
one_more = [prompt(*document), prompt(*document, 200)]
confirm("one word more: a causal cache is right", kept(*one_more, True) == [6, 6, 6])
confirm("a prefix LM keeps the first layer", kept(*one_more, False) == [6, 0, 0])

# %% [markdown]
# That answers the prediction: 1000 of 28,000, the first layer's, one key in 28
# ({numref}`fig-prefix-extension`). A causal model would have kept all. This is why a
# prompt must come in one call here, and why ChatGLM-6B reads a chat's whole history
# again in each round. What can be cached is the context as it is, and the answer.
#
# The second price is paid in training. A token of the context has seen its successor,
# so asking it for the next word asks for a copy. What is left to ask for is the
# answer, from `<sop>` on: fewer words to learn from per text than a causal model has.

# %%
golden_ids = golden("ids")
tokens, labels = (golden_ids[f"gmask_train/{x}"] for x in ("input_ids", "labels"))
context, T = int(context_lengths(tokens, SOP)), tokens.shape[1]
sees_next = prefix_mask(torch.tensor([context]), T)[0, 0].diagonal(1)
print("sees the next token:", sees_next.int().tolist())
asked = labels[0, 1:] != -100
print("is asked for it:    ", asked.int().tolist())
confirm("asked are exactly those who cannot see it", torch.equal(asked, ~sees_next))

# %% [markdown]
# ## Three faces of one mask
#
# This book's masks say True where a token may look. The original ChatGLM-6B says True
# where it may *not*. Others add a number to the scores. All mean the same weights, and
# the additive face is the logarithm of ours, with $\log 0 = -\infty$:
#
# $$
# \operatorname{softmax}(S + \log A)_{ts}
# = \frac{A_{ts}\, e^{S_{ts}}}{\sum_r A_{tr}\, e^{S_{tr}}},
# \qquad A^{\text{original}} = 1 - A .
# $$ (eq-prefix-faces)

# %%
# Check eq-prefix-faces.
A = prefix_mask(torch.tensor([3]), 6)[0, 0].double()
S = torch.randn(6, 6, dtype=torch.float64)
weights = (S + A.log()).softmax(dim=-1)
formula = A * S.exp() / (A * S.exp()).sum(dim=-1, keepdim=True)
confirm("adding the logarithm hides", torch.allclose(weights, formula))
visible = A.bool()
confirm(
    "visible_to_additive is the logarithm",
    torch.equal(visible_to_additive(visible), A.log().float()),
)
confirm(
    "visible_to_masked is one minus it",
    torch.equal(visible_to_masked(visible).double(), 1 - A),
)

# %%
show(visible_to_masked, visible_to_additive, additive_to_visible)

# %%
for fill in (-torch.inf, -10_000.0, torch.finfo(torch.float32).min):
    there_and_back = additive_to_visible(visible_to_additive(visible, fill))
    confirm(f"{fill:.3g}: there and back", torch.equal(there_and_back, visible))

# %% [markdown]
# Mixing faces raises no error. Move what token 5, a late one, hands over. Token 0 must
# not notice.


# %%
q, k, v = torch.randn(3, 1, 1, 6, 8)
moved = v.clone()
moved[:, :, 5] += 1


def token_0_notices(mask):
    before, after = (
        F.scaled_dot_product_attention(q, k, x, attn_mask=mask)[0, 0, 0]
        for x in (v, moved)
    )
    return not torch.allclose(before, after)


confirm("True = visible: it does not", not token_0_notices(visible))
confirm(
    "0 and minus infinity, added: it does not", not token_0_notices(A.log().float())
)
confirm("1 = visible, 0 = hidden, added: it does", token_0_notices(A.float()))
confirm("True = hidden: it does", token_0_notices(~visible))
by_hand = (1 - A) * -torch.inf  # zero times infinity
confirm(
    "(1 - A) times minus infinity: NaN where visible", by_hand[visible].isnan().all()
)

# %% [markdown]
# ## Padding on the left
#
# For generation, short rows are padded on the left, so that all end in the same column.
# The original has two ways to do this, and they disagree. Its *tokenizer* hides the
# padding and counts from the first word. Its *model*, given ids only, looks for `<sop>`
# and knows nothing of padding: the padding lies before `<sop>`, so it is context, seen
# by all, and counted as positions.

# %%
show(hide_padding)

# %%
tokens = golden_ids["batch_leftpad/input_ids"]
is_token = tokens != PAD
print(tokens[1].tolist(), " ([gMASK] is 241, <sop> 244, padding 3)")
contexts, T = context_lengths(tokens, SOP), tokens.shape[1]
from_ids = prefix_mask(contexts, T)
hidden = hide_padding(from_ids, is_token)
print("by the model" + " " * 10 + "by the tokenizer")
for left, right in zip(from_ids[1, 0], hidden[1, 0], strict=True):
    lines = (
        " ".join("·■"[sees] for sees in row.int().tolist()) for row in (left, right)
    )
    print("     ".join(lines))
confirm(
    "by the model: the original's get_masks",
    torch.equal(~from_ids, golden_ids["batch_leftpad/get_masks"]),
)
confirm(
    "by the tokenizer: the original's _pad",
    torch.equal(~hidden, golden_ids["batch_leftpad/tokenizer_attention_mask"]),
)

# %% [markdown]
# What should a padded row give? What it gives alone. Both ways go through the original
# below, and through ours. Then we mix them: which of the two differences does the harm,
# that padding is *seen* or that it is *counted*? Decide before you look.

# %%
alone = [model(row[real][None])[0] for row, real in zip(tokens, is_token, strict=True)]


def as_alone(logits):
    return [close(logits[i, is_token[i]], alone[i]) for i in range(len(alone))]


reference = golden("model_fp32")
by_tokenizer = reference["batch_leftpad_tokenizer/logits"]
by_model = reference["batch_leftpad_model/logits"]
print("4 and 3 tokens of padding in rows 1 and 2; same logits as alone?")
print("  the original, tokenizer's way:", as_alone(by_tokenizer))
print("  the original, model's way:    ", as_alone(by_model))

counted = prompt_positions(tokens, ids, rows=2)
not_counted = golden_ids["batch_leftpad/tokenizer_position_ids"]
result = {}
for seen, mask in (("seen", from_ids), ("hidden", hidden)):
    for name, positions in (("counted", counted), ("not counted", not_counted)):
        logits = model(tokens, positions=positions, mask=mask)
        result[seen, name] = logits
        print(f"  padding {seen}, {name}:".ljust(32), as_alone(logits))
ours_is_theirs = close(result["hidden", "not counted"], by_tokenizer) and close(
    result["seen", "counted"], by_model
)
confirm("ours is the original, both ways", ours_is_theirs)
confirm(
    "hidden padding is harmless, counted or not",
    all(
        as_alone(result["hidden", "counted"])
        + as_alone(result["hidden", "not counted"])
    ),
)
confirm(
    "padding that is seen moves some logits by more than 2",
    all(
        (result["seen", "counted"][i, is_token[i]] - alone[i]).abs().max() > 2
        for i in (1, 2)
    ),
)

# %% [markdown]
# It is the mask. Counting padding shifts every place of the row by the same number, the
# blank's included, and rotary scores depend on differences only ({ref}`ch-rope-2d`).
# That the tokenizer counts from the first word keeps the numbers small; that it hides
# the padding saves the answer.
#
# A padding row of the hidden mask sees nothing at all. Its output is the mean of
# everything, because the fill is finite, and nobody reads it:

# %%
q, k, v = torch.randn(3, 3, 2, T, 4)
finite = attend_by_layer(q, k, v, hidden, layer=1)
mean = v.mean(dim=2, keepdim=True).expand_as(v)
is_padding = ~is_token[:, None, :, None].expand_as(v)
confirm(
    "a padding row gets the mean of all", close(finite[is_padding], mean[is_padding])
)
infinite = attend(q, k, v, hidden)
confirm(
    "with minus infinity it would be NaN, and there only",
    torch.equal(infinite.isnan(), is_padding),
)

# %% [markdown]
# ## Padding on the right
#
# Training pads on the right. The padding then lies behind the answer, nobody looks
# ahead, and the mask needs no change at all. The labels leave it out of the loss.

# %%
tokens, labels = (golden_ids[f"batch_rightpad/{x}"] for x in ("input_ids", "labels"))
logits = model(tokens)
confirm("ours is the original", close(logits, reference["batch_rightpad/logits"]))
is_token = tokens != PAD
alone = [model(row[real][None])[0] for row, real in zip(tokens, is_token, strict=True)]
print("same logits as alone:", as_alone(logits))
confirm("all of them", all(as_alone(logits)))
confirm("no label is padding", (labels[~is_token] == -100).all())

# %% [markdown]
# ## Each row has its own context, and the first `<sop>` ends it
#
# Rows of a batch share nothing, the length of the context included. One shortcut, a
# single number for the whole batch, taken from its first row, passes every test with
# rows of one length. With mixed rows it shows a short row its own answer:

# %%
tokens = golden_ids["batch_mixed/input_ids"]
contexts, T = context_lengths(tokens, SOP), tokens.shape[1]
print("contexts", contexts.tolist())
own, shared = prefix_mask(contexts, T), prefix_mask(contexts[:1].expand(3), T)
changed = tokens.clone()
changed[2, 5] = 77  # the first word of row 2's answer; <sop>, at 4, must predict it
for name, mask in (("its own", own), ("row 0's", shared)):
    pair = [model(x, mask=mask)[2, 4] for x in (tokens, changed)]
    knows = "cannot" if name == "its own" else "can"
    confirm(
        f"with {name} context, <sop> of row 2 {knows} see the word it must predict",
        close(*pair) == (name == "its own"),
    )

# %% [markdown]
# A second `<sop>` in a row is one more token of the answer ({ref}`ch-blanks`): the context
# still ends at the first.

# %%
confirm(
    "two <sop>, at 4 and 6: the original's mask has a context of 4",
    torch.equal(~golden_ids["double_bos/get_masks"], prefix_mask(torch.tensor([4]), 9)),
)

# %% [markdown]
# So a conversation is *not* a row with an `<sop>` per turn. The original's `chat` writes
# the past rounds out as plain text, all of it context, and one `[gMASK] <sop>` follows.

# %%
text = chat_prompt("And Spain?", [("What is the capital of France?", "Paris.")])
print(text)
confirm(
    "the history brings no special token", "<sop>" not in text and "MASK" not in text
)
single, built = golden_ids["build_inputs/single_in"], golden_ids["build_inputs/single"]
confirm(
    "the original then appends [gMASK] and <sop>, once",
    built.tolist() == [*single.tolist(), GMASK, SOP],
)

# %% [markdown]
# ## A mask that grows
#
# In generation each new token extends the answer. It sees what the token before it saw,
# and itself; nobody before sees it. With $a_T$ for the last row of the mask so far:
#
# $$
# A^{(T+1)} = \begin{pmatrix} A^{(T)} & 0 \\ a_T & 1 \end{pmatrix}.
# $$ (eq-prefix-growth)
#
# Nothing here asks where the context ends. It need not: the last row knows, padding
# included. {py:class}`annotated_src.answer_cache.AnswerCache` keeps that row and nothing
# else of the mask.


# %%
# Check eq-prefix-growth.
def grow(mask):
    wider = F.pad(mask, (0, 1), value=False)  # nobody before sees the new token
    newest = wider[:, :, -1:].clone()
    newest[..., -1] = True  # it sees itself
    return torch.cat((wider, newest), dim=2)


T = 9
start = prefix_mask(torch.tensor([0, 3, T]), T)
A = grow(start)[1, 0].double()
blocks = torch.zeros(T + 1, T + 1, dtype=torch.float64)
blocks[:T, :T], blocks[T, :T], blocks[T, T] = start[1, 0], start[1, 0, -1], 1
confirm("grow is the block matrix", torch.equal(A, blocks))
grown = start
for _ in range(4):
    grown = grow(grown)
confirm(
    "grown by four = made at once, four longer",
    torch.equal(grown, prefix_mask(torch.tensor([0, 3, T]), T + 4)),
)

# %%
show(AnswerCache._mask)

# %% [markdown]
# ## The ladder of equality
#
# The loops were equal to the formula and to `prefix_mask` above. The next rung is
# PyTorch, which builds masks from predicates: causal *or* in the context.

# %%
tokens = golden_ids["batch_mixed/input_ids"]
contexts, T = context_lengths(tokens, SOP), tokens.shape[1]


def not_ahead(row, head, t, s):
    return s <= t


def in_context(row, head, t, s):
    return s < contexts[row]


either = or_masks(not_ahead, in_context)
by_torch = create_mask(either, B=3, H=1, Q_LEN=T, KV_LEN=T, device="cpu")
confirm("torch's flex_attention makes our mask", torch.equal(own, by_torch))
q, k, v = torch.randn(3, 3, 2, T, 4)
fused = F.scaled_dot_product_attention(q, k, v, attn_mask=own)
for layer in (1, 28):
    by_layer = attend_by_layer(q, k, v, own, layer)
    confirm(
        f"attend_by_layer, layer {layer} = torch's fused attention",
        torch.allclose(by_layer, fused, atol=1e-5),
    )

# %% [markdown]
# Then the original: every mask it made of ids, every mask its tokenizer made, and the
# masks of a generation with left padding, step by step.

# %%
equal = {"get_masks": [], "tokenizer_attention_mask": []}
for name, masked in golden_ids.items():
    case, _, what = name.partition("/")
    if what in equal:
        tokens = golden_ids[f"{case}/input_ids"]
        mask = prefix_mask(context_lengths(tokens, SOP), tokens.shape[1])
        if what != "get_masks":
            mask = hide_padding(mask, tokens != PAD)
        equal[what].append(torch.equal(visible_to_masked(mask), masked))
for what, cases in equal.items():
    confirm(
        f"{what}: {len(cases)} cases, entry by entry", len(cases) > 9 and all(cases)
    )

# %%
steps = golden("generation")
sequences = steps["greedy_batch_tokenizer/sequences"]
positions = steps["greedy_batch_tokenizer/position_ids"]
grown = ~steps["greedy_batch_tokenizer/attention_mask"]
T = grown.shape[-1]
cache = model.new_cache(*sequences.shape)
_ = model(sequences[:, :T], cache, positions=positions, mask=grown)
for i in range(1, 5):
    _ = model(sequences[:, T + i - 1, None], cache)
    grown = grow(grown)
    confirm(
        f"step {i}: the cache saw the last row of the grown mask",
        torch.equal(cache.visible, grown[:, 0, -1]),
    )
    if i < 4:
        expected = ~steps[f"trace/step{i}/attention_mask"]
        confirm("  and so did the original", torch.equal(grown[:, :, -1:], expected))
final = ~steps["trace/final/attention_mask"]
confirm("the whole mask after four steps is the original's", torch.equal(grown, final))

# %% [markdown]
# And what the original did with its mask: the attention weights of each of its layers
# are zero where it hides, and only there.

# %%
visible = ~golden_ids["gmask_train/get_masks"][0]
for layer in range(3):
    weights = reference[f"gmask_train/attentions.{layer}"]  # (N, T, T)
    confirm(
        f"the original's layer {layer + 1}: positive exactly where visible",
        torch.equal(weights > 0, visible.expand_as(weights)),
    )
confirm(
    "ours, from the ids alone, gives its logits",
    close(model(golden_ids["gmask_train/input_ids"]), reference["gmask_train/logits"]),
)

# %% [markdown]
# :::{admonition} Paper and code
# :class: paper-code
# {cite:t}`dong2019` write masks as numbers to add, $0$ and $-\infty$, and read a source
# both ways before writing a target: this chapter's mask. {cite:t}`du2022` (section 2.1)
# take it over for blanks, part A the text and part B what fills them.
#
# The code of ChatGLM-6B differs in the face and at the edges. `get_masks` builds a table
# of ones where visible, then flips it to True = hidden; `attention_fn` fills with a
# number, $-10000$, not with $-\infty$. What the code calls the length of the context is
# the *index* of the first `<sop>`, so padding on the left is part of it. And a row
# without `<sop>` is refused, where the paper's formula would not mind.
# :::

# %%
tokens = golden_ids["batch_leftpad/input_ids"]
is_token = tokens != PAD
contexts = context_lengths(tokens, SOP)
words_before = (is_token & (torch.arange(9) < contexts[:, None])).sum(dim=1)
print("contexts as the code counts", contexts.tolist())
print("without the padding        ", words_before.tolist())
confirm("they differ by the padding", (contexts - words_before).tolist() == [0, 4, 3])
fully_masked = golden("components_fp32")["attention_fn/mask"][:, 0].all(dim=-1)
weights = golden("components_fp32")["attention_fn/layer0_mask/probs"]
weights = weights.unflatten(0, (2, 4)).transpose(1, 2)[fully_masked]  # (rows, N, S)
confirm(
    "the original: a row that sees nothing has even weights, not NaN",
    weights.numel() > 0 and close(weights, torch.full_like(weights, 1 / 6)),
)
try:
    model(torch.tensor([[5, 6, GMASK, 7]]))
except ValueError as error:
    print("ValueError:", error)

# %% [markdown]
# :::{admonition} Break it
# :class: break-it
# Hand the original's face, True = hidden, to a model that expects ours. It runs, and it
# *trains*. The task below cannot be learnt: five letters drawn at random, one of eight
# each. Nobody can do better than a loss of $\log 8 = 2.08$. Watch.
# :::

# %%
LETTERS = 8
ids_of_letters = BlankIds(sop=LETTERS, gmask=LETTERS + 1, mask=LETTERS + 2)
letter_config = ChatGLMConfig(
    vocab_size=LETTERS + 3,
    num_layers=2,
    embed_dim=32,
    num_heads=2,
    ffn_dim=64,
    max_seq_len=16,
    norm_eps=1e-5,
    blank_ids=ids_of_letters,
)
generator = torch.Generator().manual_seed(0)


def random_rows(count):
    """Two letters, [gMASK] <sop>, five more letters."""
    letters = torch.randint(0, LETTERS, (count, 7), generator=generator)
    special = torch.tensor([[LETTERS + 1, LETTERS]]).expand(count, 2)
    return torch.cat((letters[:, :2], special, letters[:, 2:]), dim=1)


def wrong_mask(tokens):
    return ~prefix_mask(context_lengths(tokens, LETTERS), tokens.shape[1])


torch.manual_seed(0)
broken = ChatGLM(letter_config)
optimizer = torch.optim.Adam(broken.parameters(), lr=3e-3)
losses = []
for _ in range(240):
    tokens = random_rows(32)
    labels = tokens.clone()
    labels[:, :4] = -100  # ask for the five letters only
    loss = next_token_loss(broken(tokens, mask=wrong_mask(tokens)), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
confirm("it begins above log 8", losses[0] > math.log(8))
confirm("and ends below a quarter of it", max(losses[-10:]) < math.log(8) / 4)

# %% [markdown]
# Too good to be true: each token has looked at the letter that it is asked for. Cut the
# future off, as generation does, and ask again:

# %%
tokens = random_rows(200)
honest = []
with torch.no_grad():
    for end in range(4, 9):
        past = tokens[:, :end]
        last = broken(past, mask=wrong_mask(past))[:, -1]
        honest.append(F.cross_entropy(last, tokens[:, end]))
confirm(
    "without the future: worse than guessing, at every letter",
    min(honest) > 2 * math.log(8),
)

# %% [markdown]
# Its loss is more than twice that of a model that knows nothing: it is sure, and wrong.
# That is the symptom of every leak, a loss below what the data allows and then nonsense
# in generation. The flow shows where it comes from.

# %%
words = figures.BLANK.split()
vocabulary = [*words, "[gMASK]"]
tokens = torch.tensor([[vocabulary.index(word) for word in words]])
wrong = ~prefix_mask(torch.tensor([words.index("<sop>")]), 9)
flows = {}
for depth in (1, 2):
    small = figures.small_chatglm(vocabulary, depth)
    flows[depth] = figures.flow_sizes(small, tokens, wrong) > 0
print("wrong face, one layer")
for word, row in zip(words, flows[1].int().tolist(), strict=True):
    print(f"{word:>7}  {' '.join('·■'[x] for x in row)}")
itself = torch.eye(9, dtype=torch.bool)
confirm(
    "the answer ahead, and by the residual oneself",
    torch.equal(flows[1][:-1], (wrong[0, 0] | itself)[:-1]),
)
confirm("the last token, left with nothing to see, averages all", flows[1][-1].all())
confirm("and through it, two layers deep, all see all", flows[2].all())

# %% [markdown]
# ## Exercises
#
# Write your function in a cell of your own and give it to `check`. A question takes its
# name and a letter: `check("context_off_by_one", "a")`.

# %%
from annotated_src.exercises import check  # noqa: F401 - for your cells
from annotated_src.exercises.prefix_mask import chapter as exercises

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("prefix_mask_of_ids")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("prefix_mask_of_ids")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
# Rows for columns: why one layer is not enough to test a mask.
in_context = torch.arange(9) < words.index("<sop>")
suspect = causal_mask(9) | in_context[:, None]
print(suspect[0, 0].int())  # the context sees all
c = words.index("<sop>")
confirm(
    "the answer's rows are right, so one layer shows no leak into the answer",
    torch.equal(suspect[:, :, c:], prefix_mask(torch.tensor([c]), 9)[:, :, c:]),
)
confirm("but the mask is not closed", not closed(suspect[0, 0]))
ahead = causal_mask(9)[0, 0].logical_not()[c:]
for depth in (1, 2):
    small = figures.small_chatglm(vocabulary, depth)
    leaks = (figures.flow_sizes(small, tokens, suspect)[c:] > 0)[ahead]
    share = "all" if depth == 2 else "nothing"
    confirm(
        f"{depth} deep: the answer sees {share} of its future",
        leaks.all() if depth == 2 else not leaks.any(),
    )
# The context has read the answer, and the answer reads the context. Testing
# closed(mask) finds it without any model.

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("turns_mask")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("turns_mask")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
turns_mask = exercises["turns_mask"].solution
confirm(
    "one turn is the prefix mask",
    torch.equal(turns_mask([(4, 3)]), prefix_mask(torch.tensor([4]), 7)[0, 0]),
)
two = turns_mask([(4, 3), (3, 2)])
print(two.int())
confirm("it is closed", closed(two))
confirm(
    "the first turn sees nothing of the second, so its cache stays right",
    torch.equal(two[:7, :7], turns_mask([(4, 3)])) and not two[:7, 7:].any(),
)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("context_off_by_one")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("context_off_by_one")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
tokens = golden_ids["gmask_train/input_ids"]
c, T = int(context_lengths(tokens, SOP)), tokens.shape[1]
changed = tokens.clone()
changed[0, c + 1] = 77  # another first word of the answer
right = model(tokens)
for extra in (0, 1, 2):
    mask = prefix_mask(torch.tensor([c + extra]), T)
    pair = [model(x, mask=mask)[0, c] for x in (tokens, changed)]
    knows = "can" if extra == 2 else "cannot"
    confirm(
        f"context + {extra}: <sop> {knows} see the word that it must predict",
        close(*pair) == (extra < 2),
    )
one_more = prefix_mask(torch.tensor([c + 1]), T)
confirm("context + 1 is closed", closed(one_more[0, 0]))
confirm(
    "and another model all the same", not close(model(tokens, mask=one_more), right)
)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("to_visible")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("to_visible")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
faces = {
    "ours": hidden,
    "the original's": visible_to_masked(hidden),
    "a number to add": visible_to_additive(hidden, -10_000.0),
}
for name, face in faces.items():
    found = exercises["to_visible"].solution(face)
    confirm(f"recognised: {name}", torch.equal(found, hidden))
confirm("the upper left corner would not do: padding", not hidden[1, 0, 0, 0])

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("grow_mask")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("grow_mask")

# %% [markdown]
# ## What to remember
#
# - A prefix-LM mask is the causal mask with the columns of the context filled. Causal
#   and full are its ends.
# - The mask is closed: whoever sees $s$ sees all that $s$ sees. Therefore the whole
#   model's flow is one layer's mask. Test that of any mask you invent: if it is not
#   closed, one layer tells you nothing about two.
# - The context is read in the light of all of it. For that price its cache is good for
#   this context only; a causal cache can be extended.
# - Hide padding on the left; whether it is counted makes no difference to a rotary
#   model, in float32. On the right it is hidden already.
# - A loss below what the data allows is a leak. Look at the face of the mask first.
#
# ## Where to read on
#
# - ChatGLM-6B, `modeling_chatglm.py`: `get_masks`, with the flip at its end; in
#   `ChatGLMForConditionalGeneration`, `_update_model_kwargs_for_generation` grows the
#   mask, `prepare_inputs_for_generation` cuts its last row. `tokenization_chatglm.py`:
#   `_pad`.
# - ChatGLM2-6B, `modeling_chatglm.py`: `get_masks` there is causal; the family has
#   given up the prefix.
# - {cite:t}`dong2019`, figure 1, for the three masks side by side; {cite:t}`raffel2020`,
#   section 3.2, for how causal, prefix and encoder-decoder models do side by side.
# - Next: {ref}`ch-rope-2d`, the two numbers that every token gets.
