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
# (ch-authoring)=
# # Authoring: one trunk, four models
#
# :::{admonition} In this chapter
# :class: at-a-glance
# **45 minutes · moderate.** Afterwards you can read a decoder that you have never seen
# as a list of decisions, write it from parts that you have, say what each decision is
# for, prove that you got it right, and say before you build it what it will weigh.
# :::

# %% tags=["remove-input"]
from annotated_src.figures.device_map import DeviceMap

DeviceMap("authoring")

# %% [markdown]
# :::{admonition} Predict before you run
# :class: predict
# - `Llama` and its block are 53 lines of code, without docstrings and comments. How many
#   must you write anew to have Gemma? Phi-2? ChatGLM?
# - One of Gemma's two sizes is called 7B. How many parameters has it?
# - Gemma differs from Llama in three computations. The most used implementation had a
#   mistake in each when it was released. How can a test miss all three?
#
# Write three answers down.
# :::

# %%
import copy
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import transformers

from annotated_src.activations import gelu_exact, gelu_tanh, silu
from annotated_src.checkpoint import assign_strictly, load_model, names_by_layer, rename
from annotated_src.embedding import ScaledEmbedding, TokenEmbedding
from annotated_src.figures import authoring as figures
from annotated_src.figures.authoring import SourceDiff
from annotated_src.figures.chatglm import SIX_B
from annotated_src.generate import generate
from annotated_src.masks import causal_mask
from annotated_src.models import chatglm, gemma, llama, phi
from annotated_src.norms import GemmaRMSNorm, LayerNorm, RMSNorm
from annotated_src.rotary import rope_frequencies
from annotated_src.shards import read_json, read_tensors
from annotated_src.show import confirm, show
from annotated_src.small_chatglm import SMALL_CHATGLM
from annotated_src.tokenizer import load_tokenizer

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
_ = torch.set_grad_enabled(False)  # nothing is trained here

# %% [markdown]
# *Authoring* is the first step on the way to a device: to write a model down anew, in
# code that you own, before its weights come ({ref}`ch-mapping`), before they are made
# small ({ref}`ch-quantizing`), and before the whole is made a file ({ref}`ch-exporting`)
# that runs without torch ({ref}`ch-device`). Why not take the original's code? Because an
# exporter must follow every line of it, and a line that you cannot read is a line that
# you cannot mend.
#
# ## One loop, three recipes
#
# Decoders are more alike than their papers sound. Here is one for a single text, without
# batch or cache, in plain loops. Whatever tells Llama, Gemma and Phi-2 apart has been
# pulled out into a `Recipe` of four decisions. The rest it can see from the weights:
# whether there is a gate, a bias, a head of its own.


# %%
class Recipe(NamedTuple):
    scale: Any  # what the embedding is multiplied by, from the sizes
    norm: Any  # (x, weight, bias, eps)
    bend: Any  # the activation
    wire: Any  # how attention and feed-forward join the stream


def turn(x, position, rotary_dim, base):
    """Turn pairs (i, i + R) of the first features; the others pass."""
    out, half = x.clone(), rotary_dim // 2
    for i in range(half):
        angle = position * base ** (-i / half)
        a, b = x[i], x[i + half]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = a * math.sin(angle) + b * math.cos(angle)
    return out


def decoder(ids, w, c, recipe):
    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(x, name):
        weight, bias = w[f"{name}.weight"], w.get(f"{name}.bias")
        return recipe.norm(x, weight, bias, c.norm_eps)

    def attention(y, at):
        rotary_dim = getattr(c, "rotary_dim", c.head_dim)
        q, k, v = (
            linear(y, f"{at}.attention.{x}_proj").unflatten(-1, (-1, c.head_dim))
            for x in "qkv"
        )  # (T, N, H), (T, K, H), (T, K, H)
        out = torch.zeros_like(q)
        for n in range(c.num_heads):
            kv = n * c.num_kv_heads // c.num_heads  # the head that n shares
            for t in range(len(y)):
                query = turn(q[t, n], t, rotary_dim, c.rope_base)
                keys = [
                    turn(k[s, kv], s, rotary_dim, c.rope_base) for s in range(t + 1)
                ]
                scores = torch.stack([query @ key for key in keys]) / c.head_dim**0.5
                out[t, n] = scores.softmax(0) @ v[: t + 1, kv]
        return linear(out.flatten(1), f"{at}.attention.out_proj")

    def ffn(y, at):
        up = linear(y, f"{at}.ffn.up_proj")
        if f"{at}.ffn.gate_proj.weight" in w:
            up = recipe.bend(linear(y, f"{at}.ffn.gate_proj")) * up
        else:
            up = recipe.bend(up)
        return linear(up, f"{at}.ffn.down_proj")

    x = recipe.scale(c) * w["embedding.weight"][ids]
    for layer in range(c.num_layers):
        x = recipe.wire(x, f"blocks.{layer}", norm, attention, ffn)
    head = "lm_head" if "lm_head.weight" in w else "embedding"
    return linear(norm(x, "norm"), head)


# %% [markdown]
# And the decisions, each a line or two.


# %%
def rms(x, weight, bias, eps):
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rms_one_more(x, weight, bias, eps):
    return rms(x, 1 + weight, bias, eps)


def layer(x, weight, bias, eps):
    return rms(x - x.mean(-1, keepdim=True), weight, bias, eps) + bias


def in_turn(x, at, norm, attention, ffn):
    x = x + attention(norm(x, f"{at}.attention_norm"), at)
    return x + ffn(norm(x, f"{at}.ffn_norm"), at)


def side_by_side(x, at, norm, attention, ffn):
    y = norm(x, f"{at}.norm")
    return x + attention(y, at) + ffn(y, at)


RECIPES = {
    llama: Recipe(lambda c: 1, rms, silu, in_turn),
    gemma: Recipe(lambda c: c.embed_dim**0.5, rms_one_more, gelu_tanh, in_turn),
    phi: Recipe(lambda c: 1, layer, gelu_tanh, side_by_side),
}


def scatter(model):
    """Weights large enough that a mistake shows, gains and biases of their own."""
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            weight.normal_(std=1.5 * weight.shape[-1] ** -0.5)
        elif "norm" in name and name.endswith("weight"):
            weight.uniform_(0.5, 1.5)
        else:
            weight.normal_(std=0.5)
    return model


torch.manual_seed(1)
kinds = {llama: llama.Llama, gemma: gemma.Gemma, phi: phi.Phi}
small = {m: scatter(kind(m.tiny_config()).double()) for m, kind in kinds.items()}
ids = torch.randint(96, (7,))
for module, model in small.items():
    name = type(model).__name__
    looped = decoder(ids, model.state_dict(), model.config, RECIPES[module])
    same = torch.allclose(looped, model(ids[None])[0], atol=1e-5)
    confirm(f"loops with the recipe of {name} = the package's {name}", same)

# %% [markdown]
# (The bound is for the package's norms and angles, which are float32 even in a float64
# model.) So why does the package not have one model with a recipe? Many libraries do: a
# configuration names the norm, the activation, the wiring, and a block branches on it.
# That is good for a library. But to know what *one* model does, you then have to run all
# the `if`s in your head. This book shares the leaves (norms, attention, feed-forward) and
# writes each trunk out. What two models have in common must then be *seen*, and a diff
# shows it.
#
# {numref}`fig-authoring-blocks` draws the blocks. `in_turn` and `side_by_side` are the
# wirings of its first three rows. ChatGLM has a third: its norms stand in the stream
# itself, which is then multiplied by $\alpha$ ({ref}`ch-block`).

# %% mystnb={"image": {"alt": "Four rows, one a model, each a thick line from embed on the left to the head on the right, with branches above it. Llama: RMSNorm and attention on a branch, then RMSNorm and SwiGLU on a second. Gemma: the same wiring, but lit in orange are embed times root D, every norm (1 + w), GEGLU, and embed again as the head. Phi-2: a single branch, LayerNorm, that splits into attention with 40 percent turned and GELU without gate, side by side. ChatGLM-6B: the norms stand on the line itself, attention and GELU branch off behind them, and the line is multiplied by alpha."}, "figure": {"name": "fig-authoring-blocks", "caption": "Four decoders, one block of each. Lit: what is not as in Llama. The thick line is the residual stream."}} tags=["hide-input"]
figures.draw_blocks()

# %% [markdown]
# ## The reasons
#
# ### Gemma: a scale and a gain
#
# In Gemma the head *is* the embedding table $E$: one matrix, two jobs, and they want
# different sizes of it. As a head, it meets a vector $n$ of root mean square 1. If the
# entries of $E$ have variance $1/D$, the logits have variance 1. But then a row of $E$,
# taken as the vector of a token, has entries of size $1/\sqrt D$. Hence the factor:
#
# $$
# x^{(0)} = \sqrt D \, E_{\mathrm{id}}, \qquad
# \mathrm{logits} = E\, n, \qquad
# \operatorname{Var} E = \tfrac1D \;\Rightarrow\;
# \operatorname{Var} x^{(0)} = \operatorname{Var}\,\mathrm{logits} = 1.
# $$ (eq-authoring-scale)
#
# The factor is the embedding's alone: the head gets the table as it is.

# %%
# Check eq-authoring-scale.
torch.manual_seed(3)
scaled = ScaledEmbedding(4096, 1024).double()
scaled.weight.normal_(std=1024**-0.5)
everything = scaled(torch.arange(4096)[None])[0]
n = torch.randn(1024, dtype=torch.float64)
n /= n.square().mean().sqrt()
confirm("the vectors have variance 1", abs(everything.var() - 1) < 0.01)
confirm("the logits, too", abs((scaled.weight @ n).var() - 1) < 0.1)

# %% [markdown]
# The second change is the norm's gain. Gemma stores $w$ and multiplies by $1 + w$:
#
# $$
# \operatorname{norm}(x) = (1 + w) \odot \frac{x}{\sqrt{\overline{x^2} + \varepsilon}}.
# $$ (eq-authoring-gain)
#
# As a function it is Llama's with another table. The difference is where weight decay
# pulls: zero is now "leave the vector alone", and not "silence it". On numbers that you
# can follow: $(3, 4)$ has root mean square $\sqrt{12.5} = 3.54$.

# %%
# Check eq-authoring-gain.
x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
norm = GemmaRMSNorm(2, eps=0.0).double()
print("w = 0:     ", [round(v, 3) for v in norm(x)[0].tolist()])
norm.weight.copy_(torch.tensor([0.5, -1.0]))
print("w = .5, -1:", [round(v, 3) for v in norm(x)[0].tolist()])
unit = x / x.square().mean().sqrt()
confirm(
    "(1 + w) times the unit vector", torch.allclose(norm(x), unit * (1 + norm.weight))
)

# %% [markdown]
# ### Phi-2: side by side, and heads that turn in part
#
# In Phi-2, as in GPT-J before it {cite:p}`wang2021gptj`, attention and feed-forward read
# the *same* vector $y$, so neither waits for the other: $W_q$, $W_k$, $W_v$ and
# $W_\uparrow$ could be one product, and so could $W_o$ and $W_\downarrow$.
#
# Of the 80 features of a head only the first 32 turn ({ref}`ch-rope`), with
# frequencies made for a head of 32. The other 48 add to a score what depends on content
# alone: a head may look for *what* without asking *where*.
#
# ## The diffs
#
# Now the sources. {py:class}`annotated_src.figures.authoring.SourceDiff` takes two
# classes from the files that run, leaves docstrings and comments out, and calls every
# model `Model`, so that only what must change remains. **Llama to Gemma**, the block and
# the model:

# %%
gemma_block = SourceDiff(llama.LlamaBlock, gemma.GemmaBlock)
gemma_block

# %%
gemma_model = SourceDiff(llama.Llama, gemma.Gemma)
gemma_model

# %% [markdown]
# Line by line:
#
# | line | why |
# |---|---|
# | `GemmaRMSNorm` | {eq}`eq-authoring-gain`; and multiplied before the cast to half precision, not after it |
# | `bias=False` | no decision any more: no Gemma has biases |
# | `gelu_tanh` | the gate bends by GELU, in its tanh form ({ref}`ch-activations`) |
# | `ScaledEmbedding` | {eq}`eq-authoring-scale` |
# | no `lm_head` | every Gemma is tied: the table is the head |
# | no `scale_frequencies` | no Gemma 1 stretches its RoPE |
#
# Two more differences are *sizes*, and cost no line: a head of 256 features, so that
# $N H \ne D$ in Gemma 7B, and a single key/value head in Gemma 2B ({ref}`ch-heads`).
# TinyLlama differs from Llama in nothing else: it is sizes alone.
#
# **Llama to Phi-2:**

# %%
phi_block = SourceDiff(llama.LlamaBlock, phi.PhiBlock)
phi_block

# %%
phi_model = SourceDiff(llama.Llama, phi.Phi)
phi_model

# %% [markdown]
# `LayerNorm` with gain and bias ({ref}`ch-norms`); biases in every product, the head's
# too; no gate; one norm for two branches, which are added to each other first, as the
# original rounds them; and `rotary_dim` in the place of `head_dim`.
#
# **Llama to ChatGLM**, the block:

# %%
glm_block = SourceDiff(llama.LlamaBlock, chatglm.ChatGLMBlock)
glm_block

# %% [markdown]
# `FusedAttention` holds the three projections in one matrix and divides its scores by the
# layer's number ({ref}`ch-half-precision`); `ALPHA` weighs what the norm lets through,
# not the stream ({ref}`ch-block`). The block is as near as Phi's. The model is not, since
# a ChatGLM decides what it sees from the ids: where the blank stands, what is context,
# what is answer. Open it if you like; {ref}`ch-chatglm` takes it apart.

# %% tags=["hide-output"]
glm_model = SourceDiff(llama.Llama, chatglm.ChatGLM)
glm_model

# %%
pairs = {
    "Gemma": (gemma_block, gemma_model),
    "Phi-2": (phi_block, phi_model),
    "ChatGLM": (glm_block, glm_model),
}
total = gemma_block.total + gemma_model.total
new = {name: block.added + model.added for name, (block, model) in pairs.items()}
for name, (block, model) in pairs.items():
    print(f"{name:8} {new[name]:3} new, {block.removed + model.removed:3} gone")
confirm("Llama has 53 lines", total == 53)
confirm("Gemma and Phi-2 take 8 new ones each", new["Gemma"] == new["Phi-2"] == 8)
confirm("ChatGLM is another model", new["ChatGLM"] > 40)

# %% [markdown]
# That is the first answer.
#
# ## Every line, switched back
#
# Is each of these lines needed? Let transformers make a Gemma with random weights, load
# it here, and switch one line at a time back to Llama's.


# %%
def original(kind, **more):
    """A random model of transformers, and ours with its weights."""
    sizes = {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 128,
        "pad_token_id": None,
    }
    config = getattr(transformers, f"{kind}Config")(**sizes | more)
    torch.manual_seed(4)
    theirs = scatter(getattr(transformers, f"{kind}ForCausalLM")(config).eval())
    with TemporaryDirectory() as folder:
        theirs.save_pretrained(folder, max_shard_size="40KB")
        return theirs, load_model(folder)


def swap(model, old, new):
    """Let every part of class old compute as new does, with the weights that it has."""
    for part in model.modules():
        if type(part) is old:
            part.__class__ = new


def swap_bend(model, bend):
    for block in model.blocks:
        block.ffn.activation = bend


def switch_back(ours, expected, tokens, changes):
    """Print how far each change takes the logits, and how many best ids stay."""
    apart = {}
    for name, change in {"nothing": lambda model: None, **changes}.items():
        model = copy.deepcopy(ours)
        change(model)
        found = model(tokens)
        apart[name] = (found - expected).abs().max() / expected.std()
        kept = (found.argmax(-1) == expected.argmax(-1)).double().mean()
        size = f"{apart[name]:7.1g}" if apart[name] > 1e-5 else "< 1e-05"
        print(f"{name:32} {size}  best ids kept {kept:4.0%}")
    confirm("with nothing changed, it is the original", apart["nothing"] < 1e-5)
    confirm("every change shows", min(list(apart.values())[1:]) > 1e-4)
    return apart


tokens = torch.randint(96, (4, 24))
theirs, ours = original("Gemma")
back = switch_back(
    ours,
    theirs(tokens).logits,
    tokens,
    {
        "the embedding not scaled": lambda m: swap(m, ScaledEmbedding, TokenEmbedding),
        "gain w instead of 1 + w": lambda m: swap(m, GemmaRMSNorm, RMSNorm),
        "SiLU in the gate": lambda m: swap_bend(m, silu),
        "GELU by erf instead of tanh": lambda m: swap_bend(m, gelu_exact),
    },
)
confirm("the erf by far the least", back["GELU by erf instead of tanh"] < 0.02)

# %% [markdown]
# (The first column is the largest difference of a logit, in standard deviations of the
# logits.) Now Phi. Its lines cannot all be undone, since there is no gate to be
# found in its weights; a bias is switched off by zeros.


# %%
class InTurn(phi.PhiBlock):
    """Llama's wiring, with Phi's one norm at both places."""

    def forward(self, x, rotate, mask, cache=None):
        x = x + self.attention(self.norm(x), rotate, mask, cache)
        return x + self.ffn(self.norm(x))


def drop_biases(model, where):
    for name, weight in model.named_parameters():
        if where in name and name.endswith("bias"):
            weight.zero_()


def turn_everything(model):
    c = model.config
    model.frequencies = lambda: rope_frequencies(c.head_dim, c.rope_base)


rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4}
theirs, ours = original("Phi", rope_parameters=rope)
_ = switch_back(
    ours,
    theirs(tokens).logits,
    tokens,
    {
        "attention, then feed-forward": lambda m: swap(m, phi.PhiBlock, InTurn),
        "RMSNorm": lambda m: swap(m, LayerNorm, RMSNorm),
        "no biases in attention": lambda m: drop_biases(m, "attention"),
        "no biases in the feed-forward": lambda m: drop_biases(m, "ffn"),
        "no bias at the head": lambda m: drop_biases(m, "lm_head"),
        "SiLU": lambda m: swap_bend(m, silu),
        "the whole head turns": turn_everything,
    },
)
print(f"{ours.config.rotary_dim} of {ours.config.head_dim} features turn: 4.8, cut off")
confirm("in Phi-2 32 of 80", (phi.PHI_2.rotary_dim, phi.PHI_2.head_dim) == (32, 80))

# %% [markdown]
# And ChatGLM: here the little trained one that comes with the book, and that gives the
# original's numbers ({ref}`ch-chatglm`). Its best ids say something, since it has learnt.


# %%
class PreNorm(chatglm.ChatGLMBlock):
    """Llama's wiring: the parts have the same names, so its forward fits."""

    forward = llama.LlamaBlock.forward


def see_causally(model):
    own = model.forward
    model.forward = lambda ids: own(ids, mask=causal_mask(ids.shape[1]))


trained = load_model(SMALL_CHATGLM)
verse = "In the beginning God created the heaven and the earth."
encoded = load_tokenizer(SMALL_CHATGLM).encode(verse)
_ = switch_back(
    trained,
    trained(encoded),
    encoded,
    {
        "Llama's residual": lambda m: swap(m, chatglm.ChatGLMBlock, PreNorm),
        "RMSNorm": lambda m: swap(m, LayerNorm, RMSNorm),
        "SiLU": lambda m: swap_bend(m, silu),
        "causal everywhere": see_causally,
    },
)

# %% [markdown]
# ## The annotated source
#
# What is left of a new model is short enough to be read at once. Gemma's two new leaves:

# %%
show(GemmaRMSNorm, ScaledEmbedding)

# %% [markdown]
# And its sizes. {py:func}`annotated_src.models.gemma.tiny_config` has every decision of
# the real one, and room for none of its weights.

# %%
show(gemma.GemmaConfig, gemma.tiny_config)

# %% [markdown]
# Google's library for devices, litert-torch (once AI Edge Torch), which this part
# answers to, asks a model's author for four things: a function that gives the
# configuration, the blocks, a forward pass that looks rotations and masks up in tables,
# and a small program that *defines and runs* the model before any weight is there. Here the first is a constant, and the tables are made per call, from
# {py:meth}`annotated_src.models.gemma.Gemma.frequencies` and
# {py:func}`annotated_src.placement.place_causally`, because rows of a batch may stand at
# different positions. (An exporter, with a single row, makes the rotations a table again:
# {ref}`ch-exporting`.) The fourth:

# %%
torch.manual_seed(5)
for module, kind in kinds.items():
    model = kind(module.tiny_config()).eval()
    written = generate(model, ids[None], max_new_tokens=5)
    print(kind.__name__, tuple(ids[None].shape), "->", tuple(model(ids[None]).shape))
    confirm("   it runs, and writes 5 tokens", written.shape == (1, 12))

# %% [markdown]
# ## What it will weigh
#
# On torch's *meta* device a tensor has a shape and no numbers. So you can build the
# real ones, too, and count.

# %%
real = {
    "TinyLlama 1.1B": (llama.Llama, llama.TINYLLAMA_1_1B),
    "Gemma 2B": (gemma.Gemma, gemma.GEMMA_2B),
    "Gemma 7B": (gemma.Gemma, gemma.GEMMA_7B),
    "Phi-2": (phi.Phi, phi.PHI_2),
    "ChatGLM-6B": (chatglm.ChatGLM, SIX_B),
}
sizes = figures.size_data(real)
for name, total in zip(sizes.names, sizes.totals.tolist(), strict=True):
    print(f"{name:15} {total:13,}")
published = [1_100_048_384, 2_506_172_416, 8_537_680_896, 2_779_683_840]
confirm("as published, to the last one", sizes.totals[:4].tolist() == published)

# %% mystnb={"image": {"alt": "Two groups of five bars. Above, parameters in billions, each bar cut into embedding, attention and feed-forward: TinyLlama 1.10, Gemma 2B 2.51, Gemma 7B 8.54, of which feed-forward is by far the most, Phi-2 2.78, ChatGLM-6B 6.17. Below, kilobytes of keys and values of one token: TinyLlama 23, Gemma 2B 18, Gemma 7B 459, Phi-2 328, ChatGLM-6B 459."}, "figure": {"name": "fig-authoring-sizes", "caption": "Where the numbers of five models are, and what one token leaves in their caches. Gemma 2B and Phi-2 weigh about the same; their caches do not."}} tags=["hide-input"]
figures.draw_sizes(sizes)

# %%
table = dict(zip(sizes.names, sizes.counts.tolist(), strict=True))
for name in ("Gemma 2B", "Gemma 7B", "Phi-2"):
    shares = [count / sum(table[name]) for count in table[name][:3]]
    print(f"{name:9} embedding {shares[0]:.0%}, attention {shares[1]:.0%}, ", end="")
    print(f"feed-forward {shares[2]:.0%}")
wide = all(c.ffn_dim == 8 * c.embed_dim for c in (gemma.GEMMA_2B, gemma.GEMMA_7B))
confirm("Gemma's feed-forward networks are 8 D wide", wide)

# %% [markdown]
# The second answer: Gemma 7B has 8.54 billion parameters ({numref}`fig-authoring-sizes`).
# Three quarters of them are in feed-forward networks that are eight times as wide as the
# stream. Leave the embedding out and round down, and you have its name.
#
# On a device the lower half of the figure counts as much. A token leaves $2LKH$ numbers
# behind ({eq}`eq-heads-cache`), and Gemma 2B has one key/value head where Phi-2 has 32.

# %%
tiny, wide = sizes.cached[1].item(), sizes.cached[3].item()
print(f"Gemma 2B: {tiny:,} numbers a token, Phi-2: {wide:,}")
confirm("18 times as many, in a model of about the same size", round(wide / tiny) == 18)

# %% [markdown]
# ## The ladder of equality
#
# Loops with a recipe = the package, above, in float64. The package = transformers, with
# every line in its place. What is left is time: a cache may not change anything, and
# greedy texts must be the same ids.

# %%
for kind, more in (("Llama", {}), ("Gemma", {}), ("Phi", {"rope_parameters": rope})):
    theirs, ours = original(kind, **more)
    logits, cache = theirs(tokens).logits, ours.new_cache(4, 24)
    confirm(f"{kind}: logits within 1e-4", (ours(tokens) - logits).abs().max() < 1e-4)
    parts = [ours(part, cache) for part in tokens.split([9, 1, 14], dim=1)]
    confirm("   in three calls", (torch.cat(parts, 1) - logits).abs().max() < 1e-4)
    text = theirs.generate(
        tokens[:, :6],
        attention_mask=torch.ones(4, 6, dtype=torch.long),
        do_sample=False,
        max_new_tokens=20,
        eos_token_id=None,
        pad_token_id=0,
    )
    mine = generate(ours, tokens[:, :6], max_new_tokens=20)
    confirm("   and 4 x 20 greedy ids", torch.equal(mine, text))

# %% [markdown]
# The tests hold this for more of them: many query heads to a key, heads that turn in
# whole, left padding, gradients, beam search. The figures are on the page
# {doc}`/equality_llama`.
#
# :::{admonition} Paper and code
# :class: paper-code
# The report on Gemma {cite:p}`gemma2024` gives the feed-forward networks a width of 32768
# (2B) and 49152 (7B), and the vocabulary 256128 entries. Whoever builds that finds no
# weights that fit. The code's width is half: the report counts the gate's rows and the
# other's together. The published table has 128 rows less. And *without* the embedding,
# the report's counts hold to the last digit.
# :::

# %%
report = {"Gemma 2B": (32_768, 1_981_884_416), "Gemma 7B": (49_152, 7_751_248_896)}
embedded = {"Gemma 2B": 524_550_144, "Gemma 7B": 786_825_216}
for name, (width, others) in report.items():
    c, counts = real[name][1], table[name]
    confirm(f"{name}: the report's width is twice ours", width == 2 * c.ffn_dim)
    confirm(f"{name}: {others:,} beside the embedding", sum(counts[1:]) == others)
    rows = embedded[name] // c.embed_dim
    confirm(f"{name}: its table has {rows - c.vocab_size} rows more", rows == 256_128)

# %% [markdown]
# :::{admonition} Break it
# :class: break-it
# Now the third question. Soon after its release, three mistakes were found in
# transformers' Gemma: GELU by the error function, because `config.json` said `gelu`; a
# gain that met a vector already cast to half precision; and a factor $\sqrt D$ with
# other digits than the original's, which is rounded to half precision. A float32 test
# sees the first, if it looks at the third or fourth digit. The others it *cannot* see.
# :::


# %%
class CastBefore(GemmaRMSNorm):
    """Cast, then multiply: Llama's order."""

    def forward(self, x):
        unit = torch.nn.functional.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return unit.type_as(x) * (1 + self.weight)


class FullFactor(TokenEmbedding):
    """A factor that keeps all its digits."""

    def forward(self, input):
        return super().forward(input) * self.embedding_dim**0.5


def off(model, slip):
    """How far a slip takes the logits, in their own size."""
    slipped = copy.deepcopy(model)
    slip(slipped)
    return (slipped(tokens) - model(tokens)).float().norm() / exact.norm()


theirs, ours = original("Gemma")
half = copy.deepcopy(ours).bfloat16()
exact = ours(tokens)
rounding = (half(tokens) - exact).norm() / exact.norm()
slips = {
    "GELU by erf": lambda m: swap_bend(m, gelu_exact),
    "gain after the cast": lambda m: swap(m, GemmaRMSNorm, CastBefore),
    "factor not rounded": lambda m: swap(m, ScaledEmbedding, FullFactor),
}
for name, slip in slips.items():
    seen = "sees" if off(ours, slip) > 1e-5 else "cannot see"
    print(f"{name}: float32 {seen} it")
    there = 1e-5 < off(half, slip) < 3 * rounding
    confirm("   in bfloat16 it is there, of the size of rounding", there)
root = torch.tensor(3072**0.5)
print(f"Gemma 7B: the root of 3072 is {root:.2f}, in bfloat16 {root.bfloat16():.2f}")

# %% [markdown]
# In bfloat16 all three hide in the rounding: no text looks wrong. Two lessons. Compare in
# the dtype that you will ship, and leaf by leaf, where equality can be *exact*: the tests
# ask {py:class}`annotated_src.norms.GemmaRMSNorm` for transformers' very bits. And where
# `config.json` says one thing and the code that trained the weights another, believe the
# code.
#
# ## A decoder that you have never seen
#
# Open its `config.json` and its block's `forward`, and write eight answers down. They
# are the rows in which the four models differ.
#
# | | Llama | Gemma | Phi-2 | ChatGLM-6B |
# |---|---|---|---|---|
# | embedding | plain | times $\sqrt D$ | plain | plain |
# | norm | RMS | RMS, $1 + w$ | Layer | Layer |
# | wiring | in turn | in turn | side by side | behind the norm, $\alpha$ |
# | key/value heads | $K \mid N$ | 1 or $N$ | $N$ | $N$ |
# | what turns | the head | the head | 40 % of it | two halves, two positions |
# | feed-forward | SwiGLU | GEGLU | GELU | GELU |
# | biases | none | none | all | all but the head |
# | head | own or tied | tied | own | tied |
#
# Then choose the nearest model, copy its file, and change those lines.

# %% [markdown]
# ## Exercises
#
# Write your function in a cell of your own and give it to `check`. A question takes its
# name and a letter: `check("forgotten_factor", "a")`.

# %%
from annotated_src.exercises import check  # noqa: F401 - for your cells
from annotated_src.exercises.authoring import chapter as exercises

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("gemma_norm")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("gemma_norm")

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("scaled_embedding")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("scaled_embedding")

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("count_gemma")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("count_gemma")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
from dataclasses import astuple

for name, kind in (("Gemma 2B", gemma.GEMMA_2B), ("Gemma 7B", gemma.GEMMA_7B)):
    counted = exercises["count_gemma"].solution(*astuple(kind)[:7])
    confirm(f"{name}: {counted:,}, as built", counted == sum(table[name]))

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("forgotten_factor")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("forgotten_factor")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
theirs, ours = original("Gemma")
loud, block = ours.embedding(tokens), ours.blocks[0]
quiet = loud / 48**0.5
confirm(
    "the first norm gives the same to 1e-4",
    torch.allclose(block.attention_norm(loud), block.attention_norm(quiet), atol=1e-4),
)
outputs = [block(x, lambda y: y, causal_mask(24)) for x in (loud, quiet)]
alike = torch.nn.functional.cosine_similarity(*outputs, dim=-1)
confirm("what leaves the block points elsewhere", alike.max() < 0.99)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("four_gigabytes")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("four_gigabytes")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
weights, held = sizes.totals * 0.5 / 1e9, 8192 * sizes.cached * 2 / 1e9
for name, a, b in zip(sizes.names, weights.tolist(), held.tolist(), strict=True):
    verdict = "fits" if a + b < 4 else "too much"
    print(f"{name:15} {a:.1f} GB of weights, {b:.1f} GB of cache: {verdict}")
fits = weights + held < 4
confirm("TinyLlama and Gemma 2B fit", fits.tolist() == [True, True] + 3 * [False])
confirm("Phi-2 and ChatGLM-6B fail by the cache", (weights[[3, 4]] < 4).all())
confirm("which weighs more than the weights", (held > weights)[[3, 4]].all())

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("turn_part")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("turn_part")


# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
def wrong_frequencies(config):
    everything = rope_frequencies(config.head_dim, config.rope_base)
    return everything[: config.rotary_dim // 2]


theirs, ours = original("Phi", rope_parameters=rope)
expected = theirs(tokens).logits
for mistaken in (True, False):
    frequencies = wrong_frequencies(ours.config) if mistaken else ours.frequencies()
    model = copy.deepcopy(ours)
    model.frequencies = lambda found=frequencies: found
    for count in (1, 24):
        apart = (model(tokens[:, :count]) - expected[:, :count]).abs().max()
        right = (apart < 1e-4).item()
        print("cut off:" if mistaken else "mended: ", f"{count:2} tokens", right)
        confirm("   as expected", right != (mistaken and count == 24))

# %% [markdown]
# **And one without `check` (20 minutes): author a decoder.** StableLM is not in this book.
# Its `config.json` and its code say: Llama's wiring, names and SwiGLU; `LayerNorm` with
# biases (`layer_norm_eps`); a quarter of each head turns; no other biases; a head of its
# own. Write it, load `stable` below, and meet its logits: they say whether you are right.

# %%
torch.manual_seed(6)
stable = transformers.StableLmForCausalLM(
    transformers.StableLmConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_parameters=rope | {"partial_rotary_factor": 0.25},
    )
)
stable = scatter(stable.eval())
c = stable.config
print(c.hidden_size // c.num_attention_heads, "features a head, eps", c.layer_norm_eps)


# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
class StableLM(llama.Llama):  # in the package it would be a file of its own
    def __init__(self, config):
        super().__init__(config)
        for part in (self, *self.blocks):
            for name, _ in list(part.named_children()):
                if "norm" in name:
                    setattr(part, name, LayerNorm(config.embed_dim, config.norm_eps))

    def frequencies(self):
        c = self.config
        return rope_frequencies(c.head_dim // 4, c.rope_base)


sized = llama.LlamaConfig(96, 3, 48, 6, 2, 8, 80, 128, c.layer_norm_eps, 1e4)
mine = StableLM(sized).eval()
with TemporaryDirectory() as folder:
    stable.save_pretrained(folder)
    named = rename(read_tensors(Path(folder)), names_by_layer(mine, llama.HF_NAMES))
    assign_strictly(mine, named, torch.float32)
    kind = read_json(Path(folder) / "config.json")["model_type"]
apart = (mine(tokens) - stable(tokens).logits).abs().max()
confirm(f"a {kind} in a dozen lines, within 1e-4 of the original", apart < 1e-4)

# %% [markdown]
# ## What to remember
#
# - A decoder is a trunk and about eight decisions. Gemma is eight new lines of Llama's
#   53, and so is Phi-2.
# - Sizes are no lines: grouped heads, a head wider than $D / N$.
# - Each line can be switched back and measured. What makes no difference in your test is
#   not tested.
# - A test in float32 cannot see mistakes of rounding. Compare in the dtype that you ship.
# - Build on the meta device before you download: parameters by part, and $2LKH$ numbers
#   of cache a token.
#
# ## Where to read on
#
# Gemma: {cite:t}`gemma2024`; transformers `modeling_gemma.py`, `GemmaRMSNorm`,
# `GemmaTextScaledWordEmbedding`; the three mistakes: its pull request 29402. Phi-2:
# {cite:t}`javaheripi2023`; transformers `modeling_phi.py`, `PhiDecoderLayer`. TinyLlama,
# all sizes and no line: {cite:t}`zhang2024tinyllama`. The other way, one block and a
# configuration: litert-torch, `generative/layers/model_config.py`,
# `TransformerBlockConfig`, and `generative/examples/tiny_llama/tiny_llama.py`. Next,
# {ref}`ch-mapping` gives such models the weights that somebody else has trained.
