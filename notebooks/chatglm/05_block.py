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
# (ch-block)=
# # The block
#
# :::{admonition} In this chapter
# :class: at-a-glance
# **45 minutes · moderate.** Afterwards you can write ChatGLM's block, say why its file
# looks like pre-norm and computes post-norm, derive what its factor
# $\alpha = \sqrt{56}$ keeps over 28 layers, and cut its fused query-key-value matrix in
# the right places.
# :::

# %% tags=["remove-input"]
from annotated_src.figures.model_map import ChatGLMMap

ChatGLMMap("norms", "attention", "residual", "ffn")

# %% [markdown]
# :::{admonition} Predict before you run
# :class: predict
# Llama and ChatGLM-6B both open every block with a norm, and both norm once more before
# the head. Between blocks 14 and 15 of 28 you multiply the stream by 1000. What happens
# to the logits of each?
# :::

# %%
import math
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from annotated_src.activations import gelu_tanh
from annotated_src.attention import Attention
from annotated_src.attention_by_layer import FusedAttention
from annotated_src.feed_forward import FeedForward
from annotated_src.figures import block as figures
from annotated_src.figures.block import CHATGLM, POST_NORM, PRE_NORM, follow
from annotated_src.golden import golden, golden_model
from annotated_src.models.chatglm import (
    ALPHA,
    ChatGLM,
    ChatGLMBlock,
    ChatGLMConfig,
)
from annotated_src.models.llama import Llama, LlamaConfig
from annotated_src.positions import BlankIds
from annotated_src.rotary_2d import rotation
from annotated_src.show import confirm, show

F64 = torch.float64
_ = torch.manual_seed(0)

# %% [markdown]
# ## The block as plain loops
#
# A block takes one vector per token and returns one vector per token. ChatGLM's does
# six things: norm, attend, add; norm, feed forward, add. Attention and the feed-forward
# network have had their loops ({ref}`ch-attention`, {ref}`ch-activations`). Here is what
# stands around them, on lists of numbers.


# %%
def norm_loop(x, gain, bias, eps=1e-5):
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    unit = [(v - mean) / math.sqrt(variance + eps) for v in x]
    return [g * u + b for g, u, b in zip(gain, unit, bias, strict=True)]


def block_loop(tokens, halves, alpha):
    """halves: gain and bias of a norm, and its branch; first attention, then the FFN."""
    for gain, bias, branch in halves:
        normed = [norm_loop(x, gain, bias) for x in tokens]
        tokens = [
            [alpha * n + b for n, b in zip(*pair, strict=True)]
            for pair in zip(normed, branch(normed), strict=True)
        ]
    return tokens


# %% [markdown]
# Look at what is enlarged by $\alpha$ and added: `normed`, not `tokens`. The vector that
# came in is read once, by the norm, and never again.
#
# Two rows of a batch, three heads, random gains and biases, and a mask that lets the
# first three tokens see each other ({ref}`ch-prefix-mask`): the package agrees.

# %%
config = ChatGLMConfig(
    vocab_size=50,
    num_layers=28,
    embed_dim=24,
    num_heads=3,
    ffn_dim=40,
    max_seq_len=16,
    norm_eps=1e-5,
    blank_ids=BlankIds(sop=1, gmask=2, mask=3),
)
block = ChatGLMBlock(config, layer=5).requires_grad_(False)
for weight in block.parameters():
    weight += 0.3 * torch.randn_like(weight)  # no gain is 1, no bias is 0
mask = torch.ones(5, 5).tril().bool()
mask[:3, :3] = True
x = 4 * torch.randn(2, 5, 24)  # (B, T, D)


def on_lists(branch, **given):
    return lambda vectors: branch(torch.tensor([vectors]), **given)[0].tolist()


positions_off = {"rotate": nn.Identity(), "mask": mask[None, None]}
halves = [
    (*(w.tolist() for w in norm.parameters()), branch)
    for norm, branch in (
        (block.attention_norm, on_lists(block.attention, **positions_off)),
        (block.ffn_norm, on_lists(block.ffn)),
    )
]
by_loops = torch.tensor([block_loop(row, halves, ALPHA) for row in x.tolist()])
by_package = block(x, **positions_off)
confirm("ChatGLMBlock = loops", torch.allclose(by_package, by_loops, atol=1e-4))

# %% [markdown]
# ## One swap away from Llama
#
# Call attention and the feed-forward network of all layers, in order, the *branches*
# $f_0, f_1, \dots$, and the norm in front of $f_k$ its norm $\operatorname{LN}_k$. With
# $x_k$ for the stream, ChatGLM's file says
#
# $$
# n_k = \operatorname{LN}_k(x_k), \qquad
# x_{k+1} = \alpha\, n_k + f_k(n_k) .
# $$ (eq-block-step)
#
# Llama's says $x_{k+1} = x_k + f_k(\operatorname{Norm}_k(x_k))$ ({ref}`ch-norms`). Put
# as four steps, in the order of computation:
#
# | model | first | second | third | fourth |
# |---|---|---|---|---|
# | Llama | **fork** | **norm** | branch | add |
# | ChatGLM-6B | **norm** | **fork** | branch | add |
#
# *Fork* is where the stream parts into what the branch reads and what is added to it
# later. But for $\alpha$, the whole difference is whether the norm stands before or
# behind the fork.

# %% mystnb={"image": {"alt": "Three wiring diagrams from top to bottom, two sublayers each. Left, Llama, pre-norm: a thick vertical line, the stream, runs unbroken past both sublayers; each branch leaves it, passes a norm and then attention or FFN, and is added back. Middle, ChatGLM-6B as in its file: the norms sit on the thick line itself, before each fork, and the stretch from the fork to the plus says times alpha. A dashed frame holds norm, attention, plus, norm, FFN, plus; one more norm follows below. Right, the same diagram box for box, with the dashed frame one norm lower: it holds attention, plus, norm, FFN, plus, norm, which is post-norm."}, "figure": {"name": "fig-block-wiring", "caption": "The stream is the thick line, a dashed frame is one block. Llama's norms stand beside the stream, ChatGLM's on it. The middle and the right picture show the same computation; only the frame has moved."}} tags=["hide-input"]
figures.draw_wiring()

# %% [markdown]
# In {numref}`fig-block-wiring`, go down the middle picture and start counting blocks one
# box later. Now each block is branch, add, norm. That is post-norm, the order of 2017.
# In symbols: follow $n_k$ instead of $x_k$. From {eq}`eq-block-step`,
#
# $$
# n_{k+1} = \operatorname{LN}_{k+1}\bigl(\alpha\, n_k + f_k(n_k)\bigr),
# \qquad n_0 = \operatorname{LN}_0(x_0),
# $$ (eq-block-shift)
#
# and this is {cite:t}`wang2022`'s *DeepNorm*, letter for letter. The first
# `input_layernorm` norms the embedding, `final_layernorm` belongs to the last branch,
# and of the $2N + 1$ norms of $N$ blocks none is left over. A box in {ref}`ch-norms` has
# said so already; here is the proof.
#
# The figure draws its columns from three lists of steps, and the same lists can be run:

# %%
show(figures.Wiring, follow)
print(PRE_NORM, CHATGLM, POST_NORM, sep="\n")

# %%
# Check eq-block-step and eq-block-shift.
D, N, alpha = 12, 28, math.sqrt(56)
gains, shifts = torch.randn(2, 2 * N + 1, D, dtype=F64)
matrices = torch.randn(2 * N, D, D, dtype=F64) / math.sqrt(D)
norms = [
    lambda x, g=g, b=b: F.layer_norm(x, (D,), g, b)
    for g, b in zip(gains, shifts, strict=True)
]
branches = [lambda x, W=W: torch.tanh(x @ W.T) for W in matrices]
x = torch.randn(7, D, dtype=F64)

by_hand, n = x, norms[0](x)
for k in range(2 * N):
    normed = norms[k](by_hand)
    by_hand = alpha * normed + branches[k](normed)
    n = norms[k + 1](alpha * n + branches[k](n))
pre_order = list(zip(norms[:-1], branches, strict=True))  # a branch, the norm before it
post_order = list(zip(norms[1:], branches, strict=True))  # a branch, the norm behind it
as_filed = follow(CHATGLM, x, pre_order, alpha)[-1]
as_post = follow(POST_NORM, norms[0](x), post_order, alpha)[-1]
confirm("the wiring is its equation", torch.equal(as_filed, by_hand))
confirm("so is the other", torch.equal(as_post, n))
confirm("ChatGLM, normed at the end = post-norm", torch.equal(norms[-1](as_filed), n))
as_llama = norms[-1](follow(PRE_NORM, x, pre_order, alpha)[-1])
confirm("pre-norm is something else", not torch.allclose(as_llama, n, atol=0.1))

# %% [markdown]
# Equal to the last bit: not one operation has changed places. So "ChatGLM is pre-norm,
# its norms come first" and "ChatGLM is post-norm, it has DeepNorm" describe one
# program.
#
# ## Four numbers by hand
#
# Take the vector of {ref}`ch-norms`, $x = (1, 3, 3, 9)$: mean 4, standard deviation 3.
# Let $\alpha = 2$ and let the branch just reverse the order of its features.

# %%
x = torch.tensor([1.0, 3.0, 3.0, 9.0], dtype=F64)


def unit(x):
    return F.layer_norm(x, x.shape[-1:], eps=0.0)


def numbers(x):
    return "  ".join(f"{v:7.2f}" for v in x.tolist())


backwards = [(unit, lambda n: n.flip(-1))]
for scale in (1, 10):
    print(f"x             {numbers(scale * x)}")
    print(f"n = LN(x)     {numbers(unit(scale * x))}")
    chatglm = follow(CHATGLM, scale * x, backwards, alpha=2)[-1]
    llama = follow(PRE_NORM, scale * x, backwards, alpha=1)[-1]
    print(f"2 n + f(n)    {numbers(chatglm)}    ChatGLM")
    print(f"  x + f(n)    {numbers(llama)}    pre-norm\n")

# %% [markdown]
# With $x$ ten times as large, pre-norm's branch is a tenth as loud: 1.67 on top of 10
# instead of 1. ChatGLM returns the same four numbers, whatever the size of what came in.
#
# ## The source

# %%
show(ChatGLMBlock)

# %% [markdown]
# Our names, the original's, and what to beware of:
#
# | here | `modeling_chatglm.py` | beware |
# |---|---|---|
# | `attention_norm` | `input_layernorm` | |
# | `attention.qkv_proj` | `attention.query_key_value` | rows lie head by head |
# | `attention.out_proj` | `attention.dense` | |
# | `ffn_norm` | `post_attention_layernorm` | the norm before the MLP |
# | `ffn.up_proj` | `mlp.dense_h_to_4h` | its class is `GLU`: no gate |
# | `ffn.down_proj` | `mlp.dense_4h_to_h` | |
#
# ## What the block forgets
#
# A norm forgets scale ({ref}`ch-norms`). Llama's norms stand beside the stream, so the
# stream itself remembers. ChatGLM's stand on it. For the block $B$, and any $c > 0$, up
# to $\epsilon$,
#
# $$
# B(c\,x) = B(x), \qquad\text{hence}\qquad
# x^\top\, \frac{\partial \ell}{\partial x} = 0 \quad\text{for any loss } \ell :
# $$ (eq-block-scale)
#
# a gradient that arrives at a block's input cannot ask it to become longer or shorter.
# In Llama it can: its stream is normed only once, at the end, and until then a longer
# $x$ counts for more beside the branches to come.

# %%
# Check eq-block-scale.
wirings = {"ChatGLM": (CHATGLM, alpha), "pre-norm": (PRE_NORM, 1.0)}
target, along = torch.randn(7, D, dtype=F64), {}
for name, (wiring, factor) in wirings.items():
    x = torch.randn(7, D, dtype=F64, requires_grad=True)
    two = pre_order[:2]  # one block: two sublayers
    out, longer = (norms[-1](follow(wiring, c * x, two, factor)[-1]) for c in (1, 9))
    print(f"{name:9} same for x and 9 x: {torch.allclose(out, longer, atol=1e-3)}")
    (gradient,) = torch.autograd.grad((out - target).square().sum(), x)
    along[name] = F.cosine_similarity(gradient, x, dim=-1).abs()
confirm(
    "ChatGLM: the gradient is at right angles to x", (along["ChatGLM"] < 1e-4).all()
)
confirm("pre-norm: it is not", along["pre-norm"].max() > 0.05)

# %% [markdown]
# And now to the prediction, with whole models of 28 blocks and random weights.


# %%
def louder(module, inputs, output):
    return 1000 * output


def logits_when_louder(model, tokens):
    plain = model(tokens)
    hook = model.blocks[13].register_forward_hook(louder)
    loud = model(tokens)
    hook.remove()
    return plain, loud


llama = Llama(
    LlamaConfig(
        vocab_size=50,
        num_layers=28,
        embed_dim=24,
        num_heads=3,
        num_kv_heads=3,
        head_dim=8,
        ffn_dim=40,
        max_seq_len=16,
        norm_eps=1e-5,
        rope_base=10_000.0,
        tied_head=False,
    )
).requires_grad_(False)
chatglm = ChatGLM(config).requires_grad_(False)
tokens = torch.tensor([[7, 9, 2, 1, 5, 6]])  # text, [gMASK], <sop>, answer

plain, loud = logits_when_louder(chatglm, tokens)
confirm("ChatGLM: nothing happens", torch.allclose(plain, loud, atol=1e-4))
plain, loud = logits_when_louder(llama, tokens)
confirm("Llama: the logits change", (plain - loud).norm() > 0.3 * plain.norm())
del llama.blocks[14:]
confirm(
    "as if blocks 15 to 28 were not there",
    torch.allclose(llama(tokens), loud, atol=0.01),
)

# %% [markdown]
# Llama's upper half still speaks, but next to a stream a thousand times louder nobody
# hears it. ChatGLM's next norm turns the volume back.
#
# There is a price. Nothing gets past a norm on the stream unchanged, so no part of the
# embedding reaches the head by simply being passed on. How much does reach it? That is
# for $\alpha$ to say.
#
# ## What alpha keeps
#
# Guess first: each of 56 sublayers adds a vector at right angles to all before it, and as
# long as the normed vector that it was given. How much of the last vector's squared
# length is still the embedding's: a third, a fiftieth, or nothing? Once with
# $\alpha = \sqrt{56}$, once with $\alpha = 1$.
#
# Let what branch $k$ adds have mean 0 and mean square $s_k^2$, at right angles to all
# before it. Take gains 1, biases 0, $\epsilon = 0$. Then $n_k$ has mean square 1, the
# sum has mean square $\alpha^2 + s_k^2$, and the norm divides by its root:
#
# $$
# n_{k+1} = \frac{\alpha\, n_k + f_k}{\sqrt{\alpha^2 + s_k^2}} .
# $$ (eq-block-mix)
#
# Each sublayer multiplies everything older by $\alpha / \sqrt{\alpha^2 + s_k^2}$. After
# $2N$ of them, this share of the squared length is the embedding's:
#
# $$
# \frac{\lVert n_0 \text{'s part} \rVert^2}{\lVert n_{2N} \rVert^2}
# = \prod_{k=0}^{2N-1} \frac{\alpha^2}{\alpha^2 + s_k^2}
# = \Bigl(1 + \frac{1}{\alpha^2}\Bigr)^{-2N} \quad\text{for all } s_k = 1 .
# $$ (eq-block-keep)
#
# Now put $\alpha^2 = 2N$ in. The share is $(1 + \frac{1}{2N})^{-2N}$: close to
# $1/e \approx 0.368$ at *every* depth. In pre-norm, where all $2N + 1$ parts are added as they are,
# it is $1/(2N+1)$.

# %%
# Check eq-block-mix and eq-block-keep.
D, N = 128, 28
columns = torch.cat((torch.ones(D, 1), torch.randn(D, 57)), dim=1).double()
frame = torch.linalg.qr(columns).Q[:, 1:].T * math.sqrt(D)  # mean 0, mean square 1
embedding, added = frame[0], frame[1:]  # 57 vectors at right angles to each other
stack = [(unit, lambda n, f=f: f) for f in added]


def share_of_embedding(last):
    return F.cosine_similarity(last, embedding, dim=0).square()


mixed = follow(CHATGLM, embedding, stack[:1], alpha=3.0)[-1]
confirm(
    "one step", torch.allclose(unit(mixed), (3 * embedding + added[0]) / math.sqrt(10))
)
for words, alpha in (("1", 1.0), ("(2N)^(1/4)", 56**0.25), ("(2N)^(1/2)", 56**0.5)):
    share = share_of_embedding(follow(CHATGLM, embedding, stack, alpha)[-1])
    print(f"alpha = {words:11} share of the embedding {share:8.2g}")
    formula = (1 + alpha**-2) ** -56
    confirm("is the formula", math.isclose(share, formula, rel_tol=1e-5))
uneven = torch.rand(56, dtype=F64) * 3
louder_stack = [(unit, lambda n, f=f: f) for f in uneven[:, None] * added]
share = share_of_embedding(follow(CHATGLM, embedding, louder_stack, math.sqrt(56))[-1])
formula = (56 / (56 + uneven.square())).prod()
confirm("branches of any size: the product", math.isclose(share, formula, rel_tol=1e-5))
share = share_of_embedding(follow(PRE_NORM, embedding, stack, 1.0)[-1])
print(f"pre-norm            share of the embedding {share:8.2g}")
confirm("is 1/57", math.isclose(share, 1 / 57, rel_tol=1e-5))
shares = [(1 + 1 / (2 * depth)) ** (-2 * depth) for depth in (3, 28, 500)]
print("alpha = (2N)^(1/2), N = 3, 28, 500:", *(f"{share:.3f}" for share in shares))
confirm("within 0.03 of 1/e", all(0 < s - math.exp(-1) < 0.03 for s in shares))

# %% [markdown]
# So it is a third, more exactly 0.37; with $\alpha = 1$ nothing, $10^{-17}$. $\alpha$
# sets a half-life. It says how loud the past is beside the newest sublayer, and with
# $\sqrt{2N}$ memory lasts about as long as the model is deep.
#
# Real branches are neither at right angles nor of RMS 1. Here are 28 of the
# package's own blocks, attention and all, with random weights, in four wirings. Once a
# vector has passed, each norm has divided it by a known number. So the last vector splits
# exactly into what each sublayer added.

# %% mystnb={"image": {"alt": "Two line charts for the same 28 random blocks wired in four ways. Left, RMS of the stream against blocks passed: pre-norm rises steadily from 1 to 5.7; with alpha = 1 it stays near 1.2, with alpha = (2N) to the power 1/4 at 2.8, with alpha = root of 2N at 7.5. Right, share of the last vector that is there already against sublayers passed, from 0 to 56: with alpha = root of 2N it starts at 0.77 and climbs evenly to 1; pre-norm climbs from 0.03 along nearly a straight line; (2N) to the power 1/4 starts at 0.06 and curves upward; alpha = 1 lies at zero until sublayer 45 and then shoots up."}, "figure": {"name": "fig-block-depth", "caption": "The same random blocks, wired in four ways; means over three seeds. Left, the stream behind each block, before the next norm. Right, where the last vector comes from: the curve at 0 is the embedding's share, its rise at k is what sublayer k added."}} tags=["hide-input"]
depth = figures.depth_data()
figures.draw_depth(depth)

# %%
pre, bare, fourth, root = range(4)  # rows: pre-norm, alpha 1, (2N)^(1/4), (2N)^(1/2)
stream, there = depth.stream, depth.there
confirm(
    "alpha = √56: RMS 7.5 behind every block",
    ((stream[root, 1:] - 7.5).abs() < 0.1).all(),
)
confirm("pre-norm: more than 5 at the end", stream[pre, -1] > 5)
confirm(
    "the embedding's share: over 70% with √56, below 5% in pre-norm",
    there[root, 0] > 0.7 and there[pre, 0] < 0.05,
)
confirm("and below 0.001% with 1", there[bare, 0].abs() < 1e-5)
confirm("with 1, the last 4 sublayers make over 80%", there[bare, -5] < 0.2)
added = there[root].diff()
confirm("with √56 no sublayer adds more than 2%", added.max() < 0.02)

# %% [markdown]
# The left panel of {numref}`fig-block-depth` also shows what leaves the last block:
# vectors of RMS 7.5, which is $\alpha$, and a little more. `final_layernorm` brings
# them to 1. Pre-norm needs its last norm because the stream has *grown*; here it is
# simply the norm of the last sublayer.
#
# Of the embedding 77% are left, not 37%, since fresh branches are smaller than 1. With
# their measured lengths {eq}`eq-block-keep` predicts it:

# %%
torch.manual_seed(0)
sublayers = figures.sublayers_of(figures.random_blocks(28))
n, sizes = torch.randn(2, 32, 64), []
with torch.no_grad():
    for norm, branch in sublayers:
        n = norm(n)
        sizes.append(branch(n).square().mean().item())
        n = math.sqrt(56) * n + branch(n)
predicted = math.prod(56 / (56 + size) for size in sizes)
confirm("every branch is smaller than 1", max(sizes) < 1)
confirm(
    "the product of the shares is 77%, within 3%",
    abs(predicted - there[root, 0]) < 0.03,
)

# %% [markdown]
# :::{admonition} A figure that moves: what alpha keeps
# :class: moving residual-alpha
# One stack of 28 random blocks, wired again and again. Bars show the stream's size behind
# each block, and whose the last vector is. With $\alpha = 1$ less than 1% of it is the
# input's, and 95% comes from the last 4 blocks. With $\alpha = \sqrt{56}$ it is 78% and
# 4%, and behind every block the size is 7.5. With $\alpha = 14$ the input has 93%, and
# the blocks hardly count.
#
# **Try** to leave the input about half. Then Llama's wiring: who makes its last vector?
# :::
#
# ### What it is for
#
# {ref}`ch-norms` looked at the gradients of post-norm. {cite:t}`wang2022` look at what
# they do. Let every weight take one step of 0.001 against its gradient, as Adam's first
# step does. How far do the last vectors move?

# %% mystnb={"image": {"alt": "A line chart, both axes logarithmic: relative change of the last vectors by one step, against 2 to 28 blocks in the stack. alpha = 1 rises from 15% at 2 blocks to over 100% at 8 and stays there; pre-norm and (2N) to the power 1/4 start at 13% and 9% and reach 100% at 16; (2N) to the power 1/2 rises slowly from 6% to 25%."}, "figure": {"name": "fig-block-steps", "caption": "Stacks of 2 to 28 blocks, wired as in the last figure: how far one equal step of all weights moves the last vectors, relative to their length."}} tags=["hide-input"]
figures.draw_steps(depth)

# %%
changes = dict(zip(depth.depths, depth.changes.T, strict=True))
confirm("8 blocks, one step: with 1 over 80% change", changes[8][bare] > 0.8)
confirm("with √(2N) below 20%", changes[8][root] < 0.2)
confirm("28 blocks: every other wiring over 80%", (changes[28][:3] > 0.8).all())
confirm("√(2N) still below 35%", changes[28][root] < 0.35)

# %% [markdown]
# Small moves of all layers add up: in {numref}`fig-block-steps` the output of a deep
# stack is not recognisable after one step, but for $\alpha = \sqrt{2N}$. The paper
# chooses $\alpha$ so that the change stays bounded at any depth. (Its own is
# $(2N)^{1/4}$, and goes with smaller initial weights, which our stacks do not have.) All
# these numbers are those of random weights. The trained model's would need the trained
# model.
#
# ## The GLU that has no gate
#
# The second branch is a class named `GLU`, for *gated linear unit*. What it computes is
#
# $$
# \operatorname{ffn}(n) = W_2\, \operatorname{gelu}(W_1 n + b_1) + b_2 ,
# $$ (eq-block-ffn)
#
# with the tanh form of GELU {cite:p}`hendrycks2016` ({ref}`ch-activations`). Nothing is
# multiplied by anything: the network of 2017 with another bend. The file does define a
# gate, `GEGLU` {cite:p}`shazeer2020`, and never uses it.

# %%
show(FeedForward)

# %%
# Check eq-block-ffn.
stored = golden("weights")  # a small model of 3 layers, in the original's names
mlp = {
    name.partition(".mlp.")[2]: tensor.double()
    for name, tensor in stored.items()
    if ".layers.1.mlp." in name
}
print({name: tuple(tensor.shape) for name, tensor in mlp.items()})
tensors = golden("components_fp32")
n = tensors["block/input_layernorm"].double()
inner = n @ mlp["dense_h_to_4h.weight"].T + mlp["dense_h_to_4h.bias"]
formula = gelu_tanh(inner) @ mlp["dense_4h_to_h.weight"].T + mlp["dense_4h_to_h.bias"]
original = tensors["block/mlp_of_layernorm"].double()
confirm(
    "the original's GLU is the formula", torch.allclose(formula, original, atol=5e-5)
)
rows, columns = len(mlp["dense_h_to_4h.weight"]), mlp["dense_4h_to_h.weight"].shape[1]
confirm(
    "no row is left over for a gate, which would take as many again", rows == columns
)
linears = [part for part in block.modules() if isinstance(part, nn.Linear)]
confirm("every Linear of a block has a bias", all(x.bias is not None for x in linears))

# %% [markdown]
# ## One matrix, head by head
#
# Queries, keys and values come out of one matrix, $3D$ rows tall. With heads $H$ wide,
# head $i$ takes from the product $u = W n + b$, counted from 0,
#
# $$
# q_i = u_{3Hi \,:\, 3Hi + H}, \qquad
# k_i = u_{3Hi + H \,:\, 3Hi + 2H}, \qquad
# v_i = u_{3Hi + 2H \,:\, 3Hi + 3H} .
# $$ (eq-block-fused)
#
# It is *not* all queries, then all keys, then all values. Let the product be its own row
# numbers, for two heads of width 2:

# %%
# Check eq-block-fused.
small = FusedAttention(embed_dim=4, num_heads=2, layer=1)
u = torch.arange(12.0).view(1, 1, 12)
for role, rows in zip("qkv", small.split_heads(u), strict=True):
    print(
        role, *(f"head {i}: rows {r[0].int().tolist()}" for i, r in enumerate(rows[0]))
    )
H = 2
for part, rows in enumerate(small.split_heads(u)):
    wanted = [[3 * H * i + H * part + j for j in range(H)] for i in range(2)]
    confirm(f"{'qkv'[part]} as in the equation", rows[0, :, 0].tolist() == wanted)

# %% [markdown]
# The original cuts by `view` to `(heads, 3 * head_dim)` and a split in three. `partition`,
# in `split_tensor_along_last_dim` and other names, is Megatron's word for the heads that
# one GPU holds. Here one partition holds them all.
#
# ## The ladder of equality
#
# Loops are the package's block, above. Next, `torch.nn`: its attention, norm and GELU,
# with the rows of the fused matrix sorted by role.

# %%
x = 4 * torch.randn(2, 5, 24)
theirs = nn.MultiheadAttention(embed_dim=24, num_heads=3, batch_first=True)
fused = block.attention.qkv_proj
order = torch.arange(72).view(3, 3, 8).transpose(0, 1).flatten()  # (role, head, row)
theirs.load_state_dict(
    {
        "in_proj_weight": fused.weight[order],
        "in_proj_bias": fused.bias[order],
        "out_proj.weight": block.attention.out_proj.weight,
        "out_proj.bias": block.attention.out_proj.bias,
    }
)


def torch_norm(part, x):
    return F.layer_norm(x, (24,), part.weight, part.bias, eps=1e-5)


n = torch_norm(block.attention_norm, x)
h = ALPHA * n + theirs(n, n, n, attn_mask=~mask, need_weights=False)[0]  # True = hidden
n = torch_norm(block.ffn_norm, h)
wide = F.gelu(block.ffn.up_proj(n), approximate="tanh")
by_torch = ALPHA * n + block.ffn.down_proj(wide)
by_package = block(x, **positions_off)
confirm("ChatGLMBlock = torch.nn", torch.allclose(by_package, by_torch, atol=1e-4))

# %% [markdown]
# Then the original. Its code ran on a small model with random weights, and what its
# second block did was kept, step by step, in float32 and in float16. (The scores and
# weights inside attention had their turn in {ref}`ch-half-precision`.)


# %%
def steps_of(block, x, rotate, mask):
    """What happens up to the output, in the original's names and layouts."""
    n = block.attention_norm(x)
    q, k, v = block.attention.split_heads(block.attention.qkv_proj(n))
    heads = {"q": rotate(q), "k": rotate(k), "v": v}
    tokens = {
        "input_layernorm": n,
        "attention_out": block.attention(n, rotate, mask),
        "mlp_of_layernorm": block.ffn(n),
        "output": block(x, rotate, mask),
    }
    return {
        **{name: head.permute(2, 0, 1, 3) for name, head in heads.items()},
        **{name: x.transpose(0, 1) for name, x in tokens.items()},  # sequence first
    }


for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 4e-3)):
    name = str(dtype).removeprefix("torch.")
    kept = golden(name.replace("float", "components_fp"))
    x = kept["block/hidden_in"].transpose(0, 1)
    see = ~kept["block/attention_mask"]
    rotate = rotation(kept["block/position_ids"], 16, dtype)
    found = steps_of(golden_model(dtype).blocks[1], x, rotate, see)
    errors = []
    for step, tensor in found.items():
        original = kept[f"block/{step}"].double()
        errors.append((tensor - original).abs().max() / original.abs().max())
    print(f"{name}: {', '.join(found)}")
    confirm(
        f"all within {tolerance:g} of their largest number", max(errors) < tolerance
    )

# %% [markdown]
# Neighbours in float16 are up to 0.001 of themselves apart, so 0.004 is a few
# roundings. At last the whole model, its blocks cut one norm later: as a post-norm
# model it gives the original's logits.

# %%
model, kept = golden_model(torch.float32), golden("model_fp32")
ids = golden("ids")
tokens = ids["batch_mixed/input_ids"]
rotate = rotation(ids["batch_mixed/get_position_ids_2d"], 16, torch.float32)
see = ~ids["batch_mixed/get_masks"]

n = model.blocks[0].attention_norm(model.embedding(tokens))
following = [*(block.attention_norm for block in model.blocks[1:]), model.norm]
for block_l, next_norm in zip(model.blocks, following, strict=True):
    n = block_l.ffn_norm(ALPHA * n + block_l.attention(n, rotate, see))
    n = next_norm(ALPHA * n + block_l.ffn(n))
post_norm_logits = model.lm_head(n)
confirm("to the last bit the package's", torch.equal(post_norm_logits, model(tokens)))
error = (post_norm_logits - kept["batch_mixed/logits"]).abs().max()
confirm("and within 1e-4 the original's", error < 1e-4)

# %% [markdown]
# :::{admonition} Paper and code
# :class: paper-code
# **Alpha.** For a decoder of $N$ layers, {cite:t}`wang2022` give
# $\alpha = (2N)^{1/4}$, with some initial weights shrunk by $\beta = (8N)^{-1/4}$.
# {cite:t}`zeng2022` take $\alpha = (2N)^{1/2}$ for GLM-130B, and shrink by
# $(2N)^{-1/2}$. ChatGLM-6B has GLM-130B's $\alpha$. The shrinking leaves no trace in its
# file, which initialises nothing: `skip_init` makes each `Linear` and leaves its memory
# as it is, and `_init_weights` returns at once.
#
# **Depth.** `GLMBlock` computes `alpha` from an argument `num_layers` that is 28 unless
# given, and `ChatGLMModel` does not give it. A model of 3 layers gets $\sqrt{56}$ too.
# The real model has 28 and never notices.
#
# **Hidden states.** With `output_hidden_states` the original returns what enters each
# block: the embedding, then outputs of blocks, of RMS around 8. The last entry is
# normed: it is what leaves `final_layernorm`. What leaves the last block is not there.
# :::

# %%
for layers in (28, 70):  # ChatGLM-6B, GLM-130B
    a = (2 * layers) ** 0.25, (2 * layers) ** 0.5
    print(f"N = {layers}: DeepNorm {a[0]:.2f}, GLM-130B's {a[1]:.2f}")

states = [kept[f"gmask_train/hidden_states.{i}"] for i in range(4)]
print("RMS of the hidden states:", *(f"{s.square().mean().sqrt():.1f}" for s in states))
scores = model.lm_head(states[3].transpose(0, 1))
confirm(
    "the head reads the last entry as it is",
    torch.allclose(scores, kept["gmask_train/logits"], atol=1e-4),
)

kept = golden("components_fp32")
x, original = (kept[f"block/{n}"].transpose(0, 1) for n in ("hidden_in", "output"))
see, second = ~kept["block/attention_mask"], model.blocks[1]
rotate = rotation(kept["block/position_ids"], 16, torch.float32)
halves = [
    (second.attention_norm, lambda n: second.attention(n, rotate, see)),
    (second.ffn_norm, second.ffn),
]


def off(output):
    return ((output - original).norm() / original.norm()).item()


for words, alpha in (("2 * 28", math.sqrt(56)), ("2 * 3", math.sqrt(6)), ("1", 1.0)):
    error = off(follow(CHATGLM, x, halves, alpha)[-1])
    print(f"a model of 3 layers, alpha the root of {words:6}: off by {error:.0%}")

# %% [markdown]
# :::{admonition} Break it
# :class: break-it
# Cut the fused matrix into three big pieces: all queries, all keys, all values, as
# `nn.MultiheadAttention` stores them. What will you notice?
# :::


# %%
class ThreeBigPieces(FusedAttention):
    def split_heads(self, fused):
        by_role = fused.chunk(3, dim=-1)
        return tuple(
            piece.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for piece in by_role
        )


def with_heads(kind, num_heads):
    layer = kind(64, num_heads, layer=2).requires_grad_(False)
    layer.load_state_dict(second.attention.state_dict())
    return layer


n = second.attention_norm(x)
right, wrong = (
    with_heads(kind, 4)(n, rotate, see) for kind in (FusedAttention, ThreeBigPieces)
)
confirm("nothing is missing, every shape fits", wrong.shape == right.shape)
sizes = wrong.square().mean() / right.square().mean()
confirm("the output has a plausible size: within a factor of 2", 0.5 < sizes < 2)
halves[0] = (second.attention_norm, lambda n: wrong)
error = off(follow(CHATGLM, x, halves, ALPHA)[-1])
print(f"the block's output is off by {error:.0%}")
one_head = [
    with_heads(kind, 1)(n, nn.Identity(), see)
    for kind in (FusedAttention, ThreeBigPieces)
]
confirm("with a single head the two cuts are one", torch.equal(*one_head))

# %% [markdown]
# You notice nothing, unless you compare with the original: it loads, it runs, its
# numbers look like numbers. A test with one head passes. Test a cut with several heads,
# against numbers from elsewhere.
#
# ## Exercises
#
# Write your function in a cell of your own and give it to `check`. A question takes its
# name and a letter: `check("alpha_and_depth", "a")`.

# %%
from annotated_src.exercises import check  # noqa: F401 - for your cells
from annotated_src.exercises.block import chapter as exercises

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("deep_norm_stack")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("deep_norm_stack")


# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
# Alpha on what came in, in float16: a test of one sublayer, on normed input, passes.
def alpha_on_input(sublayers, x, alpha):
    for norm, branch in sublayers:
        x = x * alpha + branch(norm(x))
    return x


matrices = (torch.randn(56, 64, 64) / 8).half()
port = [(lambda x: F.layer_norm(x, (64,)), lambda n, W=W: n @ W) for W in matrices]
normed = F.layer_norm(torch.randn(8, 64).half(), (64,))
wanted = follow(CHATGLM, normed, port[:1], ALPHA)[-1]
found = alpha_on_input(port[:1], normed, ALPHA)
confirm("the test passes", torch.allclose(found, wanted, atol=0.05))
confirm("the stack gives NaN", alpha_on_input(port, normed, ALPHA).isnan().any())
stacks = [alpha_on_input(port[:k], normed, ALPHA) for k in range(5)]
growth = [b.float().norm() / a.float().norm() for a, b in pairwise(stacks)]
confirm("7 to 8 times with every sublayer", 7 < min(growth) < max(growth) < 8)
right_way = follow(CHATGLM, normed, port, ALPHA)[-1]
confirm("as it should be, all are finite", right_way.isfinite().all())
size = right_way.float().square().mean().sqrt()
confirm("and of RMS near 7.5", abs(size - 7.5) < 0.2)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("without_alpha")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("without_alpha")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
new = exercises["without_alpha"].solution(second.state_dict(), ALPHA)
plain = ChatGLMBlock(model.config, layer=2).requires_grad_(False)
plain.load_state_dict(new)
halves = [
    (plain.attention_norm, lambda n: plain.attention(n, rotate, see)),
    (plain.ffn_norm, plain.ffn),
]
plain_sum = follow(CHATGLM, x, halves, 1.0)[-1]
confirm(
    "no alpha, the original's output", torch.allclose(plain_sum, original, atol=5e-5)
)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("alpha_and_depth")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("alpha_and_depth")


# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
def share_left(alpha_squared, num_sublayers):
    return (1 + 1 / alpha_squared) ** -num_sublayers


print("sublayers   (2N)^(1/4)  (2N)^(1/2)          2N")
for many in (6, 56, 560):
    shares = (share_left(many**power, many) for power in (0.5, 1, 2))
    print(f"{many:9}", *(f"{share:11.2g}" for share in shares))
confirm("√56 and 6 sublayers: 90%", round(share_left(56, 6), 2) == 0.90)
confirm("√56 and 560: one in 20,000", round(1 / share_left(56, 560), -3) == 20_000)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("split_fused")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("split_fused")


# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
# The same cut on the rows of the weights: now part one's attention can load them.
def unfuse(attention):
    state = attention.state_dict()
    unfused = {name: state[name] for name in ("out_proj.weight", "out_proj.bias")}
    for kind in ("weight", "bias"):
        rows = state[f"qkv_proj.{kind}"].unflatten(0, (attention.num_heads, 3, -1))
        for part, role in enumerate("qkv"):
            unfused[f"{role}_proj.{kind}"] = rows[:, part].flatten(0, 1)
    return unfused


from_part_one = Attention(64, num_heads=4, num_kv_heads=4, head_dim=16, bias=True)
from_part_one.load_state_dict(unfuse(second.attention))
with torch.no_grad():
    unfused = from_part_one(n, rotate, see)
confirm(
    "part one's attention, ChatGLM's weights", torch.allclose(unfused, right, atol=5e-5)
)
mine = exercises["split_fused"].solution(second.attention.qkv_proj(n), 4)
package = second.attention.split_heads(second.attention.qkv_proj(n))
confirm("the cut is the package's", all(map(torch.equal, mine, package)))

# %% [markdown]
# ## What to remember
#
# - ChatGLM's norms stand on the stream, before the fork: $x \leftarrow \alpha\, n + f(n)$
#   with $n = \operatorname{LN}(x)$. Cut one norm later, it is post-norm: DeepNorm.
# - The scale of a block's input is forgotten, and no gradient asks for it.
# - $\alpha$ is how loud the past is. $\sqrt{2N}$ leaves $1/e$ of the embedding after $2N$
#   unit branches, at every depth. It is $\sqrt{56}$ in this file whatever the depth.
# - $\alpha$ can be folded into the weights. It shapes training, not what can be
#   computed: what it tames is the step.
# - `GLU` has no gate, `post_attention_layernorm` is the norm before the MLP, all matrices
#   but the head have biases, and the fused rows lie head by head.
#
# ## Where to read on
#
# - ChatGLM-6B, `modeling_chatglm.py`: `GLMBlock.forward`, and its constructor for
#   `num_layers=28`; `ChatGLMModel.get_layer`, which does not pass it; `GLU`; `GEGLU`;
#   `SelfAttention.forward` for the split of `query_key_value`.
# - {cite:t}`wang2022`: DeepNorm, and the bound on the model update.
# - {cite:t}`zeng2022`, section 2.1: why GLM-130B is post-norm, and its $\alpha$.
# - {cite:t}`ding2021`: Sandwich-LN, a norm at either end of each branch, another cure.
# - {cite:t}`xiong2020`: gradients of pre-norm and post-norm at the start.
# - Here: {ref}`ch-norms` for the norm itself, {ref}`ch-half-precision` for the scores
#   inside attention, {ref}`ch-chatglm` for the whole model.
