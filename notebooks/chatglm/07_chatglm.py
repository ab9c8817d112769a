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
# (ch-chatglm)=
# # ChatGLM assembled
#
# :::{admonition} In this chapter
# :class: at-a-glance
# **60 minutes · moderate.** Afterwards you can write ChatGLM from its parts, load a
# checkpoint as it was published, prove number by number that your model is the original,
# fill blanks with a trained one, and say what the 6B model costs in bytes.
# :::

# %% tags=["remove-input"]
from annotated_src.figures.model_map import ChatGLMMap

ChatGLMMap("everything")

# %% [markdown]
# :::{admonition} Predict before you run
# :class: predict
# - The files of ChatGLM-6B hold 6,707,929,088 weights, the model has 6,173,286,400
#   parameters. Where are the other 535 million?
# - With the weights of its blocks in 4 bits rather than 16, by what factor does it shrink?
# - Make one of two mistakes in a trained model: Llama's positions, or Llama's causal
#   mask. Which hurts more when it fills a blank inside a text, and which when it
#   continues one?
# :::

# %%
import json
import math
import random
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from safetensors.torch import save_file

from annotated_src.attention_by_layer import restore_scores
from annotated_src.blank_infilling import mask_rest, mask_span, pad_right
from annotated_src.chatglm_quantize import quantize_linears
from annotated_src.chatglm_text import chat_prompt, split_rounds
from annotated_src.checkpoint import load_model, names_by_layer
from annotated_src.figures import chatglm as figures
from annotated_src.figures.chatglm import SIX_B
from annotated_src.generate import generate
from annotated_src.golden import GOLDEN, golden
from annotated_src.loss import IGNORE, next_token_loss
from annotated_src.masks import causal_mask, prefix_mask, visible_to_masked
from annotated_src.models.chatglm import (
    ALPHA,
    HF_NAMES,
    ChatGLM,
    ChatGLMConfig,
)
from annotated_src.models.llama import Llama, LlamaConfig
from annotated_src.positions import BlankIds, context_lengths, prompt_positions
from annotated_src.quantize import weight_bytes
from annotated_src.sampler import chatglm_sampler
from annotated_src.shards import shard_paths
from annotated_src.show import confirm, show
from annotated_src.small_chatglm import SMALL_CHATGLM, held_out
from annotated_src.tokenizer import load_tokenizer
from annotated_src.train_small_chatglm import init_weights
from annotated_src.training_text import passages

# %% [markdown]
# ## The whole model as loops
#
# Each part has had its chapter. Before we look at how the package joins them, here is a
# complete ChatGLM that uses nothing of the package: a dictionary of weights, one row of
# ids, one token and one head at a time. Three helpers first.


# %%
def layer_norm(x, gain, bias, eps):
    centred = x - x.mean()
    return gain * centred / (centred.square().mean() + eps).sqrt() + bias


def gelu(x):  # by its tanh
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def turn(x, place, step):
    """The first half of a head turns by the place, the second by the step."""
    quarter, out = len(x) // 4, x.clone()
    for half, number in enumerate((place, step)):
        for i in range(quarter):
            rounded = torch.tensor(10_000 ** (-i / quarter)).half().item()
            a, b = 2 * quarter * half + i, 2 * quarter * half + quarter + i
            cos, sin = math.cos(number * rounded), math.sin(number * rounded)
            out[a], out[b] = x[a] * cos - x[b] * sin, x[a] * sin + x[b] * cos
    return out


# %% [markdown]
# And the model itself. `w` holds the weights by name, `c` the sizes; `stream` is a list
# of vectors, one a token.


# %%
def chatglm_by_loops(ids, w, c):
    answer = ids.index(c.blank_ids.sop)  # where it begins
    blank = ids.index(
        c.blank_ids.gmask if c.blank_ids.gmask in ids else c.blank_ids.mask
    )
    where = [(t, 0) if t < answer else (blank, t - answer + 1) for t in range(len(ids))]

    def linear(name, x):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def norm(name, x):
        return layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], c.norm_eps)

    stream = [w["embedding.weight"][i] for i in ids]
    for layer in range(c.num_layers):
        at = f"blocks.{layer}"
        stream = [norm(f"{at}.attention_norm", x) for x in stream]
        heads = []  # for each token, for each head: query, key, value
        for x, (place, step) in zip(stream, where, strict=True):
            fused = linear(f"{at}.attention.qkv_proj", x)
            by_head = [h.chunk(3) for h in fused.chunk(c.num_heads)]
            heads.append(
                [(turn(q, place, step), turn(k, place, step), v) for q, k, v in by_head]
            )
        for t, x in enumerate(stream):
            seen = [s for s in range(len(ids)) if s < answer or s <= t]
            mixed = []
            for n in range(c.num_heads):
                query = heads[t][n][0]
                scores = [query @ heads[s][n][1] / c.head_dim**0.5 for s in seen]
                shares = torch.stack(scores).softmax(0)
                mixed.append(
                    sum(p * heads[s][n][2] for p, s in zip(shares, seen, strict=True))
                )
            attended = linear(f"{at}.attention.out_proj", torch.cat(mixed))
            x = norm(f"{at}.ffn_norm", math.sqrt(56) * x + attended)
            wide = gelu(linear(f"{at}.ffn.up_proj", x))
            stream[t] = math.sqrt(56) * x + linear(f"{at}.ffn.down_proj", wide)
    head = w["embedding.weight" if c.tied_head else "lm_head.weight"]
    return torch.stack([head @ norm("norm", x) for x in stream])


# %% [markdown]
# Only two lines know where the answer begins, those of `where` and of `seen`. All else
# could be a Llama with other parts. The scores are not divided by the
# number of the layer, because in float64 that changes nothing ({ref}`ch-half-precision`).


# %%
small_sizes = ChatGLMConfig(
    vocab_size=40,
    num_layers=3,
    embed_dim=24,
    num_heads=3,
    ffn_dim=28,
    max_seq_len=32,
    norm_eps=1e-3,
    blank_ids=BlankIds(sop=1, gmask=2, mask=3),
    tied_head=False,
)
torch.manual_seed(7)
toy = ChatGLM(small_sizes).double().requires_grad_(False)
for weight in toy.parameters():
    weight += 0.2 * torch.randn_like(weight)  # no gain is one, no bias is zero
rows = [[9, 3, 12, 13, 1, 20, 21, 22], [9, 10, 11, 2, 1, 20, 21, 22]]  # a blank, a rest

by_loops = torch.stack(
    [chatglm_by_loops(row, toy.state_dict(), toy.config) for row in rows]
)
logits = toy(torch.tensor(rows))
print("ids", (2, 8), "to scores", tuple(logits.shape))
confirm(
    "loops over layers, tokens and heads = the package's ChatGLM",
    torch.allclose(by_loops, logits, atol=1e-5),
)

# %% [markdown]
# ## Ends and blocks
#
# In three lines, with $n = \operatorname{LN}(x)$ for what leaves a norm, and $X$ for the
# vectors of all tokens. The embedding opens,
#
# $$
# x^{(0)}_t = E_{\mathrm{id}_t} ,
# $$ (eq-chatglm-embed)
#
# every block replaces the stream twice ({ref}`ch-block`), with positions $p$ and mask $M$
# that are the same in all blocks,
#
# $$
# h^{(l)} = \alpha\, n^{(l)} + \operatorname{attn}^{(l)}\bigl(n^{(l)}; p, M\bigr),
# \qquad
# x^{(l+1)} = \alpha\, m^{(l)} + \operatorname{ffn}^{(l)}\bigl(m^{(l)}\bigr),
# $$ (eq-chatglm-block)
#
# where $n^{(l)} = \operatorname{LN}(x^{(l)})$, $m^{(l)} = \operatorname{LN}(h^{(l)})$, and
# the head closes:
#
# $$
# \mathrm{logits}_t = E\, \operatorname{LN}\bigl(x^{(L)}_t\bigr) .
# $$ (eq-chatglm-head)
#
# (The toy has a head $W$ of its own, as the golden model below.) To check them, record
# what leaves every part.


# %%
# Check eq-chatglm-embed, eq-chatglm-block and eq-chatglm-head.
def record(model, tokens, **given):
    """What leaves each part of the model, by its name."""
    seen, hooks = {}, []
    for name, part in model.named_modules():
        keep = partial(lambda name, _part, _inputs, out: seen.update({name: out}), name)
        hooks.append(part.register_forward_hook(keep))
    model(tokens, **given)
    for hook in hooks:
        hook.remove()
    return seen


seen = record(toy, torch.tensor(rows))
x = seen["embedding"]
confirm(
    "row t is row id_t of E", torch.equal(x, toy.embedding.weight[torch.tensor(rows)])
)
for layer, block in enumerate(toy.blocks):
    n = block.attention_norm(x)
    h = ALPHA * n + seen[f"blocks.{layer}.attention"]
    m = block.ffn_norm(h)
    x = ALPHA * m + seen[f"blocks.{layer}.ffn"]
    confirm(f"block {layer} replaces twice", torch.allclose(x, seen[f"blocks.{layer}"]))
confirm(
    "the logits are W LN(x)", torch.allclose(logits, toy.norm(x) @ toy.lm_head.weight.T)
)

# %% [markdown]
# ## The annotated source
#
# {py:class}`annotated_src.models.chatglm.ChatGLM` asks once where the tokens stand and
# what they see, makes one rotation of it, and hands both to every block. The cache is
# asked rather than the ids because a token of the answer, fed alone, has no `<sop>` in
# front of it that could be counted from ({ref}`ch-blanks`).

# %%
show(ChatGLM)

# %% [markdown]
# ## Names
#
# A checkpoint knows its tensors by the original's names. Here is one block of the table
# that translates them. `post_attention_layernorm` is the norm in front of the
# feed-forward network, `dense` projects out, and `4h` is four times the width.

# %%
for ours, theirs in HF_NAMES.items():
    if ours.startswith("blocks.") and ours.endswith(".weight"):
        print(f"{ours.removesuffix('.weight'):31}{theirs.removesuffix('.weight')}")

# %% [markdown]
# ## Counting the parameters
#
# With $V = 5$, $D = 4$, one head, $F = 16$ and one block, every tensor can be counted
# with a finger:

# %%
tiny = ChatGLMConfig(5, 1, 4, 1, 16, 8, 1e-5, BlankIds(1, 2, 3))
for name, weight in ChatGLM(tiny).named_parameters():
    print(f"{name:34} {tuple(weight.shape)!s:8} {weight.numel():3}")

# %% [markdown]
# Every matrix of a block has a bias, and every norm too. So a block has
# $4 D^2 + 4 D$ for attention, $2 D F + F + D$ for the feed-forward network and $4 D$ for
# two norms. With $F = 4 D$, and a head that is the embedding,
#
# $$
# P = V D + L \,(12 D^2 + 13 D) + 2 D .
# $$ (eq-chatglm-count)
#
# On torch's *meta* device a tensor has a shape and no numbers, so the 6B model can be
# built here, and counted.

# %%
# Check eq-chatglm-count.
with torch.device("meta"):
    six_b = ChatGLM(SIX_B)
built = {name: w.numel() for name, w in six_b.named_parameters()}
V, D, L = SIX_B.vocab_size, SIX_B.embed_dim, SIX_B.num_layers
confirm(
    "the formula counts what is built",
    sum(built.values()) == V * D + L * (12 * D**2 + 13 * D) + 2 * D,
)
confirm("ChatGLM-6B: 6,173,286,400", sum(built.values()) == 6_173_286_400)
confirm(
    "once more V D: what its files hold", sum(built.values()) + V * D == 6_707_929_088
)
print(f"V D is {V * D:,}")

# %% [markdown]
# So the first answer: the files hold the head, too, although it is the embedding. It was
# saved as a tensor of its own.
#
# ## Loading, as it was published
#
# ChatGLM-6B came as `pytorch_model-0000x-of-00008.bin`, pickles of tensors, with an
# index. Others save in safetensors. `load_model` reads both. Let us write the golden model
# (the original's code with small random weights, {ref}`ch-half-precision`) in both ways,
# each in two pieces. Two details are as in the published files: `rotary_emb.inv_freq` is
# stored for every layer, and there is a `lm_head.weight`.

# %%
META = json.loads((GOLDEN / "meta.json").read_text("utf-8"))
weights = golden("weights")
print(len(weights), "tensors, of which not a weight:")
print(next(name for name in weights if name.endswith("inv_freq")), "and two like it")


def publish(folder, tensors, kind, **config):
    """Write a directory as the original's, in two shards, with an index."""
    stem, save = {
        "safetensors": ("model", save_file),
        "bin": ("pytorch_model", torch.save),
    }[kind]
    names, weight_map = sorted(tensors), {}
    for i in range(2):
        part = {name: tensors[name] for name in names[i::2]}
        shard = f"{stem}-{i + 1:05}-of-00002.{kind}"
        save(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / f"{stem}.{kind}.index.json").write_text(index, "utf-8")
    entries = META["config"] | {"model_type": "chatglm"} | config
    (folder / "config.json").write_text(json.dumps(entries), "utf-8")


temporary = TemporaryDirectory()


def new_folder(name):
    folder = Path(temporary.name) / name
    folder.mkdir()
    return folder


models = {}
for kind in ("safetensors", "bin"):
    folder = new_folder(kind)
    publish(folder, weights, kind)
    print(*(path.name for path in shard_paths(folder)))
    models[kind] = load_model(folder)
same = [
    torch.equal(a, b)
    for a, b in zip(*(m.state_dict().values() for m in models.values()), strict=True)
]
confirm(f"both ways give the same {len(same)} tensors", all(same))
model = models["safetensors"]
stored = {names_by_layer(model, HF_NAMES).get(name) for name in weights}
confirm(
    "nothing of the files is left but inv_freq",
    stored - set(model.state_dict()) == {None},
)

# %% [markdown]
# Loading is strict ({ref}`ch-llama`): what is missing, too much or of another shape is an
# error. Two kinds of names are exceptions, and both on purpose.
#
# **`inv_freq`** is computed, whatever the file says. The original ignores it as well. The
# proof: store nonsense there.
#
# **`lm_head.weight`** is left out where the head is the embedding. Is it? `config.json`
# may say so, as `tie_word_embeddings`. Where it is silent, transformers ties the two and
# throws the second copy away. `load_model` looks first: if both tensors are stored and
# equal, or only one is there, they are one.

# %%
nonsense = {
    name: torch.full_like(w, 9.0) if name.endswith("inv_freq") else w
    for name, w in weights.items()
}
publish(new_folder("nonsense"), nonsense, "bin")
prompt = golden("ids")["gmask_train/input_ids"]
spoilt = load_model(Path(temporary.name) / "nonsense")
with torch.no_grad():
    confirm("inv_freq = 9: the same logits", torch.equal(spoilt(prompt), model(prompt)))

embedding = weights["transformer.word_embeddings.weight"]
heads = {
    "a head of its own": weights,
    "twice the same": weights | {"lm_head.weight": embedding.clone()},
}
heads["only one"] = {n: w for n, w in weights.items() if n != "lm_head.weight"}
for name, tensors in heads.items():
    folder = new_folder(name)
    publish(folder, tensors, "safetensors")
    loaded = load_model(folder)
    count = sum(w.numel() for w in loaded.parameters())
    print(f"{name:18} tied: {loaded.config.tied_head!s:6} {count:,} parameters")
with torch.no_grad():
    tied = loaded(prompt)
confirm(
    "tied, it computes what the original does when tied",
    torch.allclose(tied, golden("model_fp32")["tied/logits"], atol=1e-4),
)

# %% [markdown]
# ## The ladder of equality
#
# Loops = package was the first rung. The last is the original: not equal logits alone,
# but all that can be seen on the way, in float32 and in float16, and what training and
# generation need. For attention maps we listen at the softmax. The tolerances are those
# of `meta.json`: 0.0001 in float32; 0.06 in float16, where hidden states are near 50.


# %%
def listen(model, tokens):
    """Logits, hidden states, attention maps and cache, in the original's layout."""
    maps = []

    def keep(scores, mask, layer):
        restored = restore_scores(scores, mask, layer)
        maps.append(restored.softmax(-1).flatten(0, 1))  # (B * N, T, S)
        return restored

    cache = model.new_cache(*tokens.shape)
    with patch("annotated_src.attention_by_layer.restore_scores", keep):
        seen = record(model, tokens, cache=cache)
    places = ["embedding", *(f"blocks.{i}" for i in range(len(maps) - 1)), "norm"]
    found = {"logits": seen[""]}
    for i, place in enumerate(places):
        found[f"hidden_states.{i}"] = seen[place].transpose(0, 1)
    for i, (probabilities, layer) in enumerate(zip(maps, cache, strict=True)):
        found[f"attentions.{i}"] = probabilities
        found[f"past.{i}.key"] = layer.keys.permute(2, 0, 1, 3)
        found[f"past.{i}.value"] = layer.values.permute(2, 0, 1, 3)
    return found


half = load_model(Path(temporary.name) / "bin", torch.float16)
numbers = golden("ids")
for ours, file, bound in ((model, "model_fp32", 1e-4), (half, "model_fp16", 0.06)):
    theirs = golden(file)
    with torch.no_grad():
        found = listen(ours, prompt)
        far = ours(prompt, positions=golden("model_fp32")["far_positions/position_ids"])
    close = partial(torch.allclose, rtol=0, atol=bound)
    wanted = {what: theirs[f"gmask_train/{what}"] for what in found}
    kinds = sorted({what.split(".")[0] for what in wanted})
    for kind in kinds:
        pairs = [(found[w], wanted[w]) for w in found if w.startswith(kind)]
        same = all(close(a.float(), b.float()) for a, b in pairs)
        confirm(f"{file[-4:]}: {kind}, all {len(pairs)}", same)
    confirm(
        f"{file[-4:]}: positions up to 2000",
        close(far.float(), theirs["far_positions/logits"].float()),
    )

# %% [markdown]
# Losses and gradients of a training batch, padded on the right:

# %%
original = golden("model_fp32")
loss = next_token_loss(
    model(numbers["batch_rightpad/input_ids"]), numbers["batch_rightpad/labels"]
)
loss.backward()
gradients = {
    theirs: model.get_parameter(ours).grad
    for theirs, ours in names_by_layer(model, HF_NAMES).items()
}
norms = torch.stack([gradients[name].norm() for name in META["grad_norm_order"]])
confirm("the loss", torch.allclose(loss, original["batch_rightpad/loss"], atol=1e-4))
confirm(
    f"the length of all {len(norms)} gradients",
    torch.allclose(norms, original["batch_rightpad/grad_norms"], rtol=1e-3, atol=1e-5),
)
stored = [name for name in original if "/grad/" in name]
confirm(
    f"{len(stored)} of them number by number",
    all(
        torch.allclose(gradients[n.split("/")[2]], original[n], rtol=1e-3, atol=1e-5)
        for n in stored
    ),
)

# %% [markdown]
# And generation: ten tokens after a `[gMASK]`, after a `[MASK]`, three prompts of
# different lengths in one batch, and one that ends by itself. The batch comes with the
# positions and the mask of the original's tokenizer ({ref}`ch-prefix-mask`); its mask
# says True where it hides.

# %%
_ = torch.set_grad_enabled(False)  # nothing is trained from here on
written = golden("generation")
close = partial(torch.allclose, rtol=0, atol=1e-4)
for case in ("greedy_gmask", "greedy_mask", "eos_stop", "greedy_batch_tokenizer"):
    start, given = written[f"{case}/input_ids"], {}
    if case == "greedy_batch_tokenizer":
        given = {
            "positions": written[f"{case}/position_ids"],
            "mask": visible_to_masked(written[f"{case}/attention_mask"]),
        }
    wanted = written[f"{case}/sequences"]
    stop = [META["config"]["eos_token_id"]]
    ids = generate(model, start, max_new_tokens=10, stop_ids=stop, **given)
    confirm(
        f"{case}: {wanted.shape[1] - start.shape[1]} tokens", torch.equal(ids, wanted)
    )
    cache = model.new_cache(len(start), wanted.shape[1])
    steps = [model(start, cache, **given)[:, -1]]
    for t in range(start.shape[1], wanted.shape[1] - 1):
        steps.append(model(wanted[:, t, None], cache)[:, -1])
    confirm(
        "and every score on the way",
        close(torch.stack(steps, 1), written[f"{case}/scores"]),
    )

# %% [markdown]
# So *is this ChatGLM-6B?* has an answer: it computes what the original's code computes.
# The weights were small and random, and code does not know that. What follows needs a
# model that has learnt something.
#
# ## A small one that has learnt
#
# Nobody can ship the 6B model with a book. So the book has trained a small one: the same
# architecture, the same file formats, the objective of {ref}`ch-blanks`, on the King
# James Bible, in a quarter of an hour or so on one core. The script is short enough to read,
# {py:mod}`annotated_src.train_small_chatglm`. One chapter in fifty was held out.

# %%
small, tokenizer = load_model(SMALL_CHATGLM), load_tokenizer(SMALL_CHATGLM)
c = small.config
print(f"{c.num_layers} blocks, width {c.embed_dim}, vocabulary {c.vocab_size}")
print(f"{sum(w.numel() for w in small.parameters()):,} parameters")
chapters = held_out()
print(len(chapters), "chapters held out; one begins:")
print(" ", chapters[0][0])

# %% [markdown]
# How well does it fill blanks that it has not seen? For each passage of the held-out
# chapters we ask twice: for three pieces somewhere inside, at `[MASK]`, and for the
# second half, at `[gMASK]`. The *surprise* of an answer is the negative logarithm of the
# probability that the model gives it; over $K$ answers $a_k$, each of $T_k$ pieces with
# its `<eop>`, that is
#
# $$
# S = \frac{\sum_k \sum_{t=1}^{T_k} -\ln p\,(a_{k,t} \mid \text{context}_k, a_{k,1}, \dots, a_{k,t-1})}
# {\sum_k T_k}
# $$ (eq-chatglm-surprise)
#
# nats a piece. (`<sop>` comes with the prompt, so we do not ask for it here.) For
# comparison, take a model that knows how frequent each piece is in these chapters, and
# how often an answer ends, and nothing else: a *unigram* model.


# %%
def ask(texts, seed=0):
    """Two examples of each text: a blank of three pieces, and the second half."""
    draw, found = random.Random(seed), {"[MASK]": [], "[gMASK]": []}
    for text in texts:
        start = draw.randrange(len(text) - 3)
        ids, eop = c.blank_ids, tokenizer.eos_id
        found["[MASK]"].append(mask_span(text, start, start + 3, ids, eop))
        found["[gMASK]"].append(mask_rest(text, len(text) // 2, ids, eop))
    return found


def batches(examples, size=16):
    """Examples of similar lengths, padded; nothing is asked at <sop>."""
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    for i in range(0, len(ordered), size):
        tokens, labels = pad_right(ordered[i : i + size], tokenizer.pad_id)
        yield tokens, labels.masked_fill(labels == c.blank_ids.sop, IGNORE)


def surprise(model, examples, given=lambda tokens: {}):
    """Nats a piece; given makes other positions or another mask."""
    total, pieces = 0.0, 0
    for tokens, labels in batches(examples):
        count = int((labels != IGNORE).sum())
        total += float(next_token_loss(model(tokens, **given(tokens)), labels)) * count
        pieces += count
    return total / pieces


# %%
texts = [
    tokenizer.encode_text(text)[:128]
    for chapter in chapters
    for text in list(passages(chapter, random.Random(0)))[:4]
]
examples = ask([text for text in texts if len(text) > 8])
losses = {kind: surprise(small, asked) for kind, asked in examples.items()}

# %% [markdown]
# And the comparison:

# %%
words = [
    i for chapter in chapters for verse in chapter for i in tokenizer.encode_text(verse)
]
frequency = torch.bincount(torch.tensor(words), minlength=c.vocab_size) / len(words)


def unigram(examples):
    """Surprise of whoever knows how frequent pieces and ends are, and nothing else."""
    labels = torch.cat([labels.flatten() for _, labels in batches(examples)])
    labels = labels[labels != IGNORE]
    ends = (labels == tokenizer.eos_id).float().mean()
    chances = frequency * (1 - ends)
    chances[tokenizer.eos_id] = ends
    return -float(chances[labels].log().mean())


# Check eq-chatglm-surprise, on one example, from scratch.
one = examples["[MASK]"][5]
first = one.tokens.tolist().index(c.blank_ids.sop) + 1
chances = small(one.tokens[None])[0].log_softmax(-1)
nats = [-chances[t - 1, one.tokens[t]] for t in range(first, len(one.tokens))]
confirm(
    "S = the mean of -ln p over the answer's pieces and <eop>",
    math.isclose(sum(nats) / len(nats), surprise(small, [one]), abs_tol=1e-5),
)
for kind, asked in examples.items():
    print(f"{kind:8} {losses[kind]:.1f} nats a piece, unigram {unigram(asked):.1f}")
    confirm("better by more than a nat", losses[kind] < unigram(asked) - 1)

# %% [markdown]
# ## What it puts in a blank
#
# A blank asks for a whole answer, of any length, so its candidates are not the next
# pieces but all sequences that end with `<eop>`. Their number has no end, yet the likely
# ones can be found *exactly*: an answer is never likelier than its own beginning, so a
# beginning that falls below 1 % can be dropped with everything that starts with it.

# %%
show(figures.likely_answers)

# %%
BLANKS = (
    "In the beginning God created the heaven and the [MASK].",
    "And the LORD spake unto [MASK], saying,",
    "And the king said unto his [MASK], Go, and see.",
)
fills = figures.fills_data(small, tokenizer, BLANKS)

# %% mystnb={"image": {"alt": "Bars for three blanks. In the beginning God created the heaven and the blank: earth 4 percent, LORD 1. And the LORD spake unto blank, saying: Moses far ahead with 36 percent, then them, Moses, saying, me and him, 4 percent and less. And the king said unto his blank, Go, and see: servants 7 percent, then brethren, disciples, father and fathers, 5 to 4 percent."}, "figure": {"name": "fig-chatglm-fills", "caption": "The likeliest answers for three blanks, with the probability of the whole answer. Answers below 1 % are left out."}} tags=["hide-input"]
figures.draw_fills(fills)

# %%
first = [answers[0][0] for answers in fills.answers]
print("first in place:", *first)
confirm("earth, Moses, servants", first == ["earth", "Moses", "servants"])
ahead = [answers[0][1] / answers[1][1] for answers in fills.answers]
confirm("each at least a quarter ahead of the next", min(ahead) > 1.25)

# %% [markdown]
# In {numref}`fig-chatglm-fills` nearly every answer is a word that could stand there: the
# model has learnt what kind of word is missing. It has not learnt its text by heart. The
# first sentence opens the book it was trained on, and the right word gets 4 %.
#
# And a continuation, at `[gMASK]`, first always the likeliest piece, then drawn as
# ChatGLM-6B draws in conversation: temperature 0.95, of the best 50 the fewest that share
# 0.7 between them ({py:func}`annotated_src.sampler.chatglm_sampler`).

# %%
prompt = tokenizer.encode("And it came to pass")
length = prompt.shape[1]
print("the prompt:", [tokenizer.processor.id_to_piece(i) for i in prompt[0].tolist()])
limits = {"max_new_tokens": 40, "stop_ids": [tokenizer.eos_id]}
print("\ngreedy: ", tokenizer.decode(generate(small, prompt, **limits)[0, length:]))
for seed in range(3):
    sampler = chatglm_sampler(torch.Generator().manual_seed(seed))
    drawn = generate(small, prompt, sampler=sampler, **limits)
    print(f"\ndrawn {seed}:", tokenizer.decode(drawn[0, length:]))

# %% [markdown]
# Always the likeliest piece runs in a circle; drawing gets out of it. This is the book's
# language, and hardly a thought. But every part does its work, and you can look into all
# of them.
#
# A conversation is a text to be continued, too. The question comes first, alone if it is
# the first, else after the rounds before it, with 问 for *question* and 答 for *answer*:

# %%
messages = [
    {"role": "user", "content": "Who built the ark?"},
    {"role": "assistant", "content": "Noah."},
    {"role": "user", "content": "Of what wood?"},
]
print(chat_prompt(*split_rounds(messages)))
ids = tokenizer.chat(messages[:1])[0].tolist()
pieces = [tokenizer.processor.id_to_piece(i) for i in ids]
print("\nthe first question alone:", *pieces)
confirm("it ends so", pieces[-2:] == ["[gMASK]", "<sop>"])

# %% [markdown]
# :::{admonition} Paper and code
# :class: paper-code
# GLM-130B asks for short things at `[MASK]` and for long ones at `[gMASK]`
# {cite:p}`zeng2022`.
# The published ChatGLM-6B can be asked at `[gMASK]` only, as long as one goes through its
# tokenizer: that appends a `[gMASK]` to every text, even to one that has a `[MASK]`, and
# of two mask tokens the model answers at `[gMASK]` ({ref}`ch-blanks`). The blank stays
# empty, and you get a continuation. To fill it, put `<sop>` behind the text yourself.
# :::

# %%
text = "And the king said unto his [MASK], Go, and see."
by_tokenizer = tokenizer.encode(text)
by_hand = torch.tensor([[*figures.context_of(tokenizer, text), tokenizer.sop_id]])
for name, ids in (("tokenizer", by_tokenizer), ("by hand", by_hand)):
    place, step = prompt_positions(ids, c.blank_ids, rows=2)[0, :, -1].tolist()
    piece = tokenizer.processor.id_to_piece(int(ids[0, place]))
    print(f"{name:10} the answer stands at {place}, at a {piece}")
confirm(
    "both masks are in the tokenizer's prompt",
    {c.blank_ids.mask, c.blank_ids.gmask} < set(by_tokenizer[0].tolist()),
)

# %% [markdown]
# :::{admonition} Break it
# :class: break-it
# Give the trained model Llama's causal mask. Or Llama's positions: every token its index,
# and no step; and each of these two mistakes alone. Nothing crashes, no shape is wrong.
# How much does the surprise rise, at each kind of blank?
# :::


# %%
def count_on(tokens):  # the place of Llama: an index that never stands still
    positions = prompt_positions(tokens, c.blank_ids, rows=2).clone()
    positions[:, 0] = torch.arange(tokens.shape[1])
    return {"positions": positions}


def no_steps(tokens):
    positions = prompt_positions(tokens, c.blank_ids, rows=2).clone()
    positions[:, 1] = 0
    return {"positions": positions}


def llama_positions(tokens):
    positions = torch.zeros(len(tokens), 2, tokens.shape[1], dtype=torch.long)
    positions[:, 0] = torch.arange(tokens.shape[1])
    return {"positions": positions}


def llama_mask(tokens):
    mask = causal_mask(tokens.shape[1])
    return {"mask": mask.expand(len(tokens), -1, -1, -1)}


breaks = {
    "causal mask": llama_mask,
    "the place counts on": count_on,
    "no steps": no_steps,
    "Llama's positions": llama_positions,
}
rise = {}
for name, given in breaks.items():
    for kind, asked in examples.items():
        rise[name, kind] = surprise(small, asked, given) - losses[kind]
    shown = {kind: round(rise[name, kind], 1) + 0.0 for kind in examples}
    print(f"{name:20}", *(f"{kind} {more} more  " for kind, more in shown.items()))

# %% [markdown]
# So to the third question: positions hurt, and a blank inside the text most. When the
# place counts on, it no longer says where in the text the answer belongs.
#
# At `[gMASK]` the two mistakes together are better than one of them. Without steps all
# pieces of the answer stand at the same spot, and their order is lost. A place that
# counts on brings it back, and at the end of a text it is hardly wrong.
#
# The causal mask moves the surprise by less than 0.05, at either blank: it hides
# nothing from the answer, only the context from itself (an exercise below), and this
# model's answers do not live on what the context sees ahead. An error that no loss
# shows is the worst kind. The original's numbers, on the ladder above, find it:

# %%
confirm(
    "the causal mask hardly matters",
    max(abs(rise["causal mask", k]) for k in examples) < 0.05,
)
hurt = model(
    numbers["gmask_train/input_ids"], **llama_mask(numbers["gmask_train/input_ids"])
)
confirm(
    "on the ladder it fails",
    not close(hurt, original["gmask_train/logits"]),
)
confirm(
    "[MASK]: the place is worth more than a nat",
    rise["the place counts on", "[MASK]"] > 1,
)
confirm(
    "at [gMASK] it is worth less than 0.2", rise["the place counts on", "[gMASK]"] < 0.2
)
confirm(
    "both mistakes are better there than no steps alone",
    rise["Llama's positions", "[gMASK]"] < rise["no steps", "[gMASK]"] - 0.2,
)

# %% [markdown]
# ### Louder than alpha
#
# One thing must be said about $\alpha = \sqrt{56}$ in a model of 4 blocks. It makes the
# past of the stream 7.5 times as loud as a normed vector, and the branches must be heard
# beside it ({ref}`ch-block`). Measure how loud each of them is: the root mean square of
# what it puts out, by that of $\alpha$ times what it was given. First with the weights
# that training began with, then with those that it ended with.


# %%
def loudness(model, tokens):
    seen = record(model, tokens)
    found = {}
    for branch, norm in (("attention", "attention_norm"), ("ffn", "ffn_norm")):
        for i in range(c.num_layers):
            out, given = (seen[f"blocks.{i}.{name}"] for name in (branch, norm))
            ratio = out.square().mean() / given.square().mean()
            found[branch, i] = float(ratio.sqrt()) / ALPHA
    return found


beginner = ChatGLM(c)
init_weights(beginner, torch.Generator().manual_seed(0))
tokens = next(batches(examples["[gMASK]"]))[0]
for name, tested in (("before", beginner), ("after", small)):
    ratios = loudness(tested, tokens)
    print(f"{name:7} {min(ratios.values()):.2f} to {max(ratios.values()):.2f}")
    if name == "before":
        confirm("none is heard: below 0.15", max(ratios.values()) < 0.15)
    else:
        confirm("all are: above 0.15", min(ratios.values()) > 0.15)
        confirm(
            "the loudest, a feed-forward network, is as loud as the past",
            max(ratios, key=lambda at: ratios[at])[0] == "ffn"
            and max(ratios.values()) > 0.9,
        )

# %% [markdown]
# This training made up for it: the branches grew until they were heard, $\alpha$ or not
# ({ref}`ch-block`, in its exercises, says why they can).
#
# ## The 6B model by numbers
#
# {numref}`fig-chatglm-bytes` shows where the 12.35 GB of ChatGLM-6B in float16 are. Its
# quantisation rounds the matrices of the blocks to 8 or 4 bits, with one scale in float16 a row
# ({py:mod}`annotated_src.chatglm_quantize`), and leaves the embedding alone. With $b$
# bits, in bytes,
#
# $$
# B(b) = 2 V D + L \Bigl( 12 D^2 \,\frac{b}{8} + 2 \cdot 13 D
# + [b < 16] \cdot 2 \cdot 9 D \Bigr) + 4 D ,
# $$ (eq-chatglm-bytes)
#
# since the four matrices of a block have $3D + D + 4D + D = 9 D$ rows.

# %%
# Check eq-chatglm-bytes.
sizes = figures.bytes_data()
for bits, total in zip(sizes.bits, sizes.totals, strict=True):
    per_block = 12 * D**2 * bits // 8 + 2 * 13 * D + (2 * 9 * D if bits < 16 else 0)
    print(
        f"{bits:2} bits: {total:14,} bytes, {sizes.totals[0] / total:.2f} times smaller"
    )
    confirm("as the formula says", total == 2 * V * D + L * per_block + 4 * D)

# %% mystnb={"image": {"alt": "Three squares, one for each width of the weights, their areas the bytes. float16, 12.35 GB: feed-forward 7.52, attention 3.76, embedding 1.07. int8, 6.71 GB: 3.76, 1.88 and the same 1.07. int4, 3.89 GB: 1.88, 0.94 and again 1.07; the embedding, a thin strip at the bottom of the first square, is more than a quarter of the last."}, "figure": {"name": "fig-chatglm-bytes", "caption": "ChatGLM-6B in memory, in GB: areas are bytes. The embedding is not quantised, so it takes a larger share each time. The norms are there too, too thin to see."}} tags=["hide-input"]
figures.draw_bytes(sizes)

# %%
embedding_share = (sizes.bytes[:, 0] / sizes.bytes.sum(-1)).tolist()
print("the embedding's share:", *(f"{share:.0%}" for share in embedding_share))
confirm(
    "4 bits: 3.2 times smaller, not 4",
    round(sizes.totals[0] / sizes.totals[2], 1) == 3.2,
)

# %% [markdown]
# That answers the second question. What the embedding costs, the formula's first term,
# does not shrink.
#
# To this comes the cache: for each token two vectors, key and value, in every block and
# for every head. With $K$ key/value heads of width $H$ and two bytes a number,
#
# $$
# C = 2 \cdot L \cdot K H \cdot 2 \text{ bytes a token} .
# $$ (eq-chatglm-cache)

# %%
# Check eq-chatglm-cache.
with torch.device("meta"):
    others = {
        "ChatGLM-6B": (ChatGLM(SIX_B), SIX_B.num_heads),
        "Llama-7B": (
            Llama(
                LlamaConfig(
                    32_000, 32, 4096, 32, 32, 128, 11_008, 2048, 1e-6, 1e4, False
                )
            ),
            32,
        ),
        "SmolLM2-135M": (
            Llama(LlamaConfig(49_152, 30, 576, 9, 3, 64, 1536, 8192, 1e-5, 1e5, True)),
            3,
        ),
    }
    for name, (big, kv_heads) in others.items():
        cache = big.half().new_cache(1, 1)
        bytes_a_token = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache)
        config = big.config
        C = 2 * config.num_layers * kv_heads * config.head_dim * 2
        confirm(f"{name}: {C:,} bytes a token", bytes_a_token == C)
        share = 2048 * C / weight_bytes(big)
        print(f"    2048 tokens: {2048 * C / 1e6:.0f} MB, {share:.0%} of the weights")

# %% [markdown]
# ChatGLM-6B and Llama-7B keep every head's keys and values; SmolLM2 shares them between
# three heads ({ref}`ch-heads`). So does ChatGLM2, with 2 heads of them.
#
# ### What rounding costs
#
# The small model can tell. It is rounded as the large one would be, and asked the same
# questions:

# %%
plain = weight_bytes(small.half()) / 1e6
print(f"16 bits: {plain:.2f} MB")
for bits in (8, 4):
    rounded = quantize_linears(load_model(SMALL_CHATGLM), bits)
    change = {k: surprise(rounded, asked) - losses[k] for k, asked in examples.items()}
    megabytes = weight_bytes(rounded.half()) / 1e6
    print(f"{bits:2} bits: {megabytes:.2f} MB")
    confirm(
        "the surprise moves by less than 0.03", max(map(abs, change.values())) < 0.03
    )
_ = small.float()

# %% [markdown]
# ## Exercises
#
# Write your function in a cell of your own and give it to `check`. A question takes its
# name and a letter: `check("what_causal_hides", "a")`.

# %%
from annotated_src.exercises import check  # noqa: F401 - for your cells
from annotated_src.exercises.chatglm import chapter as exercises

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("answer_chances")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("answer_chances")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
# With it, words can be ranked for a blank, in one forward pass over one padded batch.
answer_chances = exercises["answer_chances"].solution


def rank(blank, words):
    context = figures.context_of(tokenizer, blank)
    at = context.index(tokenizer.mask_id)
    whole = [
        mask_span([*context[:at], *answer, *context[at + 1 :]], at, at + len(answer), c.blank_ids, tokenizer.eos_id)
        for answer in map(tokenizer.encode_text, words)
    ]  # fmt: skip
    tokens, labels = pad_right(whole, tokenizer.pad_id)
    labels = labels.masked_fill(labels == tokenizer.sop_id, IGNORE)
    chances = answer_chances(small(tokens), labels).tolist()
    return sorted(zip(words, chances, strict=True), key=lambda pair: -pair[1])


blank = BLANKS[2]
wanted = {tokenizer.decode(a.ids): a.probability for a in figures.likely_answers(
    small, figures.context_of(tokenizer, blank), tokenizer.eos_id, 0.01)}  # fmt: skip
ranked = rank(blank, list(wanted))
confirm(
    "the same probabilities, in the same order, as the search for likely answers",
    [word for word, _ in ranked] == list(wanted)
    and all(math.isclose(p, wanted[word], rel_tol=1e-3) for word, p in ranked),
)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("first_difference")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("first_difference")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
# A colleague has "corrected" one constant, for a model of 4 blocks, and now the surprise
# is up. Which one? Two records of the same text tell.
first_difference = exercises["first_difference"].solution
tokens = mask_rest(texts[0], 20, c.blank_ids, tokenizer.eos_id).tokens[None]
right = record(small, tokens)
with patch("annotated_src.models.chatglm.ALPHA", math.sqrt(2 * c.num_layers)):
    wrong = record(small, tokens)
    corrected = {k: surprise(small, asked) - losses[k] for k, asked in examples.items()}
parts = list(right)
first = first_difference(right, wrong, atol=1e-5)
print("agree:  ", *parts[: parts.index(first)])
confirm(
    "attention agrees, the norm behind it does not",
    first == "blocks.0.ffn_norm"
    and parts[parts.index(first) - 1] == "blocks.0.attention",
)
# Between the two there is one line, x * ALPHA + attention. Alpha is the square root of
# 56 in the original, whatever the depth, and a model must be run with the alpha that it
# was trained with.
print(
    "the surprise rose by", *(f"{kind} {rise:.1f}" for kind, rise in corrected.items())
)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("what_causal_hides")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("what_causal_hides")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
row = examples["[MASK]"][0].tokens[None]
contexts = context_lengths(row, c.blank_ids.sop)
hidden = prefix_mask(contexts, row.shape[1]) & ~causal_mask(row.shape[1])
confirm("from <sop> on, nothing is hidden", not hidden[..., int(contexts) :, :].any())
confirm(
    "in the context, all that is behind", hidden.sum() == contexts * (contexts - 1) / 2
)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("chatglm_bytes")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("chatglm_bytes")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
# Your graphics card has 13 GB, or 6: how many tokens of cache fit beside the 6B model's
# weights? It was made for 2048.
chatglm_bytes = exercises["chatglm_bytes"].solution
shape = SIX_B.vocab_size, SIX_B.embed_dim, SIX_B.num_layers
for bits, total in zip(sizes.bits, sizes.totals, strict=True):
    confirm(f"{bits:2} bits: what was built", chatglm_bytes(*shape, bits) == total)


def room(memory, bits):
    left = memory - chatglm_bytes(*shape, bits)
    return max(0, left) // (4 * SIX_B.num_layers * SIX_B.embed_dim)


for memory in (13e9, 6e9):
    print(
        f"{memory / 1e9:.0f} GB:",
        *(f"{bits} bits {room(memory, bits):.0f} " for bits in (16, 8, 4)),
    )
confirm("13 GB, 16 bits: not a full conversation", 0 < room(13e9, 16) < 2048)
confirm(
    "6 GB: in 4 bits only, and then all of it",
    room(6e9, 8) == 0 and room(6e9, 4) > 2048,
)
# On 13 GB 4 bits bring nothing that 8 bits do not: those leave room for 2048 already.
# Activations need room as well, so that these are upper bounds.
temporary.cleanup()

# %% [markdown]
# ## What to remember
#
# - ChatGLM is an embedding, $L$ blocks that replace the stream twice, a norm, a head.
#   Positions and mask are made once, of the ids, and go on from the cache.
# - $P = VD + L (12 D^2 + 13 D) + 2 D$: 6,173,286,400 with the head tied. The files hold
#   the head again, and `inv_freq`; both are left out on purpose, all else is strict.
# - Equal to the original's code means: logits, hidden states, attention maps, caches, losses,
#   gradients, every step of decoding, in float32 and in float16.
# - Through its tokenizer, ChatGLM-6B always answers at `[gMASK]`. To fill a `[MASK]`, put
#   `<sop>` behind the text yourself.
# - Wrong positions or a causal mask raise no error. A loss shows the positions; it need
#   not show the mask. Compare with the original's numbers.
# - 12.35 GB in float16; 4 bits make it 3.2 times smaller, since the embedding stays. A
#   token in the cache costs 458,752 bytes.
#
# ## Where to read on
#
# - ChatGLM-6B, `modeling_chatglm.py`: `ChatGLMModel.forward`, which finds mask and
#   positions, and `ChatGLMForConditionalGeneration`: `forward` for the head and the loss,
#   `prepare_inputs_for_generation`, `chat`, `stream_generate`.
# - Its `config.json` and `pytorch_model.bin.index.json`, for the names.
# - `quantization.py`: `QuantizedLinear`, `quantize`.
# - {cite:t}`du2022` for the objective, {cite:t}`zeng2022` for the 130B model that
#   ChatGLM-6B takes after; {cite:t}`dettmers2022` on rounding to 8 bits.
# - Here: {py:mod}`annotated_src.train_small_chatglm`, to train your own; next,
#   {ref}`ch-errata`.
