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
# (ch-training)=
# # Training a small one
#
# :::{admonition} In this chapter
# :class: at-a-glance
# **60 minutes · moderate.** Afterwards you can say on paper where a loss begins, write
# the loop that makes it fall and know what each line is for, read a loss curve, tell
# three mistakes by their loss, and save a checkpoint that transformers loads. The
# run itself takes about a minute.
# :::

# %% tags=["remove-input"]
from annotated_src.figures.station_map import StationMap

StationMap("training")

# %% [markdown]
# :::{admonition} Predict before you run
# :class: predict
# A Llama with a million parameters and 1024 tokens is about to learn from the help
# texts of Python, in 500 steps.
#
# - Before the first step, how many bits does each token cost it?
# - After 25 steps the loss has fallen by a sixth. What has it learnt: words, which token
#   follows which, or something simpler?
# - You change one line, and a smaller model reaches a loss below 1 in 150 steps, where
#   ours ends near 3. What do you think?
#
# Write three answers down.
# :::

# %%
import copy
import json
import math
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F

from annotated_src.checkpoint import names_by_layer
from annotated_src.figures import training as figures
from annotated_src.figures.training import held_out_loss
from annotated_src.generate import generate
from annotated_src.loss import next_token_loss
from annotated_src.models.llama import HF_NAMES, Llama, LlamaConfig
from annotated_src.pipeline import TextGeneration
from annotated_src.sampler import Sample
from annotated_src.saving import save_checkpoint
from annotated_src.scoring import token_log_probs
from annotated_src.show import confirm, show
from annotated_src.tokenizer import TextTokenizer
from annotated_src.training import (
    _batches,
    adamw,
    batches,
    init_weights,
    learning_rate,
    train,
    train_step,
)

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# ## Learning with every number visible
#
# Take three letters, and a text of eight: `abacabab`. The smallest language model is a
# table $Z$: row = the letter before, column = a score for each letter that may follow.
# Softmax makes shares of a row. Training shows the model each pair of neighbours and
# moves the scores: the letter that came goes up, the others go down, each by its own
# share. Plain Python, no library:

# %%
text, letters = "abacabab", "abc"
pairs = [(letters.index(a), letters.index(b)) for a, b in pairwise(text)]
table = [[0.0] * 3 for _ in letters]


def shares_of(row):
    total = sum(math.exp(score) for score in row)
    return [math.exp(score) / total for score in row]


def loss_and_gradient(table):
    loss, gradient = 0.0, [[0.0] * 3 for _ in table]
    for before, after in pairs:
        shares = shares_of(table[before])
        loss -= math.log(shares[after]) / len(pairs)
        for v in range(3):
            gradient[before][v] += (shares[v] - (v == after)) / len(pairs)
    return loss, gradient


curve = []
for step in range(2000):
    loss, gradient = loss_and_gradient(table)
    if step == 0:
        print("gradient at row a:", [round(g, 3) for g in gradient[0]])
    curve.append(loss)
    for before in range(3):
        for v in range(3):
            table[before][v] -= 2.0 * gradient[before][v]

print("loss at first", round(curve[0], 3), "and at last", round(curve[-1], 2))
print("after a:", [round(share, 2) for share in shares_of(table[0])])
confirm("it begins at ln 3", math.isclose(curve[0], math.log(3)))
confirm("and never rises", all(b <= a for a, b in pairwise(curve)))

# %% [markdown]
# After `a` came `b` three times and `c` once, and that is what the table ends up
# saying. Everything below is this loop. A Llama only has a better row: scores that
# depend on the *whole* text before, and not on one letter. What was done here has
# three equations.
#
# ## The loss, and its gradient
#
# Let $z_{tv}$ be the score that the model gives, after reading $x_0 \dots x_t$, to
# token $v$ as the next, and $p_{tv}$ its share after softmax. The loss is the mean
# surprise at what came, in *nats*, the unit of natural logarithms (1.44 bits):
#
# $$
# \mathcal{L} = -\frac{1}{T-1} \sum_{t=0}^{T-2} \ln p_{t,\,x_{t+1}},
# \qquad p_{tv} = \frac{e^{z_{tv}}}{\sum_u e^{z_{tu}}}.
# $$ (eq-training-loss)
#
# Since $\ln p_{ty} = z_{ty} - \ln \sum_u e^{z_{tu}}$, its derivative is what the plain
# loop added up: the share, less one where the token came.
#
# $$
# \frac{\partial \mathcal{L}}{\partial z_{tv}} =
# \frac{p_{tv} - [\,v = x_{t+1}\,]}{T-1}.
# $$ (eq-training-gradient)
#
# (The bracket is 1 if true, else 0.) Suppose that a model can give only one row $p_v$,
# the same at every place. Its scores rest where it expects what comes, on average: at
# the frequencies $f_v$ of the tokens that come. What is left of the loss is their
# **entropy**:
#
# $$
# \sum_t \frac{\partial \mathcal{L}}{\partial z_{tv}} = 0 \iff p_v = f_v,
# \qquad \mathcal{L} = H(f) = -\sum_v f_v \ln f_v.
# $$ (eq-training-frequencies)
#
# Remember that number: our Llama will pass it.

# %%
# Check eq-training-loss, eq-training-gradient, eq-training-frequencies.
tokens = torch.randint(7, (1, 9), generator=seeded())
scores = torch.randn(1, 9, 7, dtype=torch.float64, generator=seeded(1))
scores.requires_grad_()
by_hand = 0.0
for t in range(8):
    shares = shares_of(scores[0, t].tolist())
    by_hand -= math.log(shares[tokens[0, t + 1]]) / 8
loss = F.cross_entropy(scores[0, :-1], tokens[0, 1:])
confirm("the sum by hand = torch's", math.isclose(by_hand, loss.item()))
ours = next_token_loss(scores, tokens).item()  # in float32; it shifts by itself
confirm("and next_token_loss", math.isclose(by_hand, ours, rel_tol=1e-6))
(slope,) = torch.autograd.grad(loss, scores)
expected = (scores.softmax(-1)[0, :-1] - F.one_hot(tokens[0, 1:], 7)) / 8
confirm("the gradient is the formula", torch.allclose(slope[0, :-1], expected))
confirm("the last place asks for nothing", not slope[0, -1].any())

following = torch.tensor([b for _, b in pairs])
often = torch.bincount(following).double() / len(following)
same_row = often.log().requires_grad_()  # softmax of it gives the frequencies
loss = F.cross_entropy(same_row.expand(7, 3), following)
(slope,) = torch.autograd.grad(loss, same_row)
confirm("one row for all places rests at the frequencies", slope.abs().max() < 1e-15)
entropy = -(often * often.log()).sum()
confirm("where the loss is their entropy", torch.allclose(loss, entropy))
others = torch.randn(1000, 3, dtype=torch.float64, generator=seeded(2))
paid = -(others.log_softmax(-1) * often).sum(-1)
confirm("and 1000 other rows all cost more", (paid > entropy).all())

# %% [markdown]
# ## One pass, many lessons
#
# A window of $T$ tokens holds $T - 1$ lessons: after each token, which comes next?
# Generation needs a pass for each token and a {ref}`cache <ch-cache>`. Training
# does not: the text is known, and the causal mask keeps each row honest, so that a
# single pass without a cache answers all $T - 1$ questions. Honest means: no gradient
# of the loss at $t$ comes from tokens after $t$.

# %%
config = LlamaConfig(
    vocab_size=1024,
    num_layers=4,
    embed_dim=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    ffn_dim=352,
    max_seq_len=256,
    norm_eps=1e-5,
    rope_base=10_000.0,
    tied_head=False,
)
STD = 0.05
model = Llama(config)
init_weights(model, seeded(), STD)
print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters")

seen = []
hook = model.embedding.register_forward_hook(lambda _m, _i, out: seen.append(out))
window = torch.randint(1024, (1, 12), generator=seeded())
at_five = model(window)[0, 5].log_softmax(-1)[window[0, 6]]
hook.remove()
(slope,) = torch.autograd.grad(at_five, seen[0])
confirm("the lesson at 5 reaches every token up to 5", slope[0, :6].any(-1).all())
confirm("and none after", not slope[0, 6:].any())

# %% [markdown]
# ## Where it begins
#
# First weights are drawn at random, normal with a small spread $\sigma$. Not zero:
# then every gradient is zero too, and nothing ever moves. Not large: then the model
# begins with strong opinions, all wrong.

# %%
show(init_weights)

# %% [markdown]
# (The smaller spread of `out_proj` and `down_proj` keeps the residual stream of
# {ref}`ch-norms` from growing with depth {cite:p}`radford2019`.)
#
# How good are the opinions of a model that knows nothing? The last norm
# gives a vector $n$ of length $\sqrt D$. Row $v$ of the head is $D$ draws of
# spread $\sigma$, so the score $z_v = w_v \cdot n$ is normal too, with variance
# $\sigma^2 \lVert n \rVert^2 = \sigma^2 D$. The mean of $e^{z}$ is then
# $e^{\sigma^2 D / 2}$, and with many tokens the sum in the softmax comes close to $V$
# times it. What comes next knows nothing of the weights, so its score is 0 on average:
#
# $$
# \mathcal{L}_0 \approx \ln V + \tfrac{1}{2} \sigma^2 D.
# $$ (eq-training-start)

# %%
# Check eq-training-start.
untrained = copy.deepcopy(model).double()
random_ids = torch.randint(1024, (16, 64), generator=seeded(4))
for std in (0.02, 0.05, 0.1):
    init_weights(untrained, seeded(5), std)
    with torch.no_grad():
        found = next_token_loss(untrained(random_ids), random_ids).item()
    expected = math.log(1024) + std**2 * 128 / 2
    print(f"spread {std:.2f}: ln V + {expected - math.log(1024):.3f}")
    confirm("    which is where it begins", abs(found - expected) < 0.05)
confirm("ln 1024 nats are 10 bits", math.isclose(math.log(1024) / math.log(2), 10))

init_weights(untrained, seeded(5), 0.0)
next_token_loss(untrained(random_ids), random_ids).backward()
moves = [weight.grad.any() for weight in untrained.parameters()]
confirm("from zeros no weight has a gradient", not any(moves))

# %% [markdown]
# The first answer: 10 bits a token, and a little more. A loss that begins elsewhere is
# the cheapest alarm there is: something is wrong before anything was trained. (Why 0.05
# for us? GPT-2 is 768 wide and takes 0.02: about the same $\sigma^2 D$.)
#
# ## The step
#
# The plain loop moved each score by its gradient times a constant. In a Llama one
# constant does not fit all: gradients in one matrix are dozens of times those in
# another. Adam {cite:p}`kingma2015` keeps, for each weight $w$, a running mean $m$ of its
# gradients $g$ and a running mean $u$ of their squares, and divides the first by the root
# of the second. In step $k = 1, 2, \dots$, with rate $\eta_k$:
#
# $$
# \begin{aligned}
# m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
# u \leftarrow \beta_2 u + (1 - \beta_2) g^2, \\
# w &\leftarrow w - \eta_k \lambda w - \eta_k\,
# \frac{m / (1 - \beta_1^k)}{\sqrt{u / (1 - \beta_2^k)} + \epsilon}.
# \end{aligned}
# $$ (eq-training-adam)
#
# The two divisors make up for means that began at 0. The term with $\lambda$ is
# *weight decay*: each weight shrinks a little, unless gradients hold against it
# {cite:p}`loshchilov2019`. In the first step $m / (1 - \beta_1) = g$ and
# $u / (1 - \beta_2) = g^2$, so, but for $\epsilon$ and the decay, **every weight with a
# gradient moves by exactly $\eta$**, however small that gradient was.

# %%
# Check eq-training-adam.
b1, b2, eps, decay = 0.9, 0.95, 1e-8, 0.1
w = torch.randn(3, 4, dtype=torch.float64, generator=seeded())
layer = torch.nn.Linear(4, 3, bias=False, dtype=torch.float64)
layer.weight.data.copy_(w)
optimizer = adamw(layer, decay)
m, u, same, steps = torch.zeros_like(w), torch.zeros_like(w), [], []
for k in range(1, 6):
    rate = 0.01 * k
    g = torch.randn(3, 4, dtype=torch.float64, generator=seeded(k)) * 10.0 ** (k - 4)
    m, u = b1 * m + (1 - b1) * g, b2 * u + (1 - b2) * g**2
    steps.append((m / (1 - b1**k)) / ((u / (1 - b2**k)).sqrt() + eps))
    w = w - rate * decay * w - rate * steps[-1]
    layer.weight.grad, optimizer.param_groups[0]["lr"] = g, rate
    optimizer.step()
    same.append(torch.allclose(layer.weight, w, rtol=1e-12, atol=1e-12))
confirm("five steps by hand = torch's AdamW", all(same))
confirm("the first is one rate for each", (steps[0].abs() - 1).abs().max() < 1e-2)

next_token_loss(model(random_ids), random_ids).backward()
strong = model.blocks[0].attention.out_proj.weight.grad.std()
weak = model.blocks[-1].attention.q_proj.weight.grad.std()
confirm("one matrix has over 40 times the gradients of another", strong > 40 * weak)

# %% [markdown]
# That is why the rate needs a **warm-up**. In the first steps a million weights move,
# all at full speed, on the word of one batch. So $\eta$ rises from nearly nothing
# over $K_0$ steps, and then, as the model comes to rest, falls along a cosine
# {cite:p}`loshchilov2017`, from $\eta_{\max}$ to a tenth of it in the last of $K$ steps:
#
# $$
# \eta_k = \eta_{\max} \cdot
# \begin{cases}
# k / K_0 & k \le K_0, \\
# 0.1 + 0.45 \Bigl(1 + \cos \pi \dfrac{k - 1 - K_0}{K - 1 - K_0}\Bigr) & k > K_0.
# \end{cases}
# $$ (eq-training-rate)

# %%
# Check eq-training-rate.
K, K0, PEAK = 500, 30, 3e-3
rates = [learning_rate(i, steps=K, peak=PEAK, warmup=K0) for i in range(K)]
formula = [k / K0 for k in range(1, K0 + 1)]
formula += [
    0.1 + 0.45 * (1 + math.cos(math.pi * (k - 1 - K0) / (K - 1 - K0)))
    for k in range(K0 + 1, K + 1)
]
same = [math.isclose(a, PEAK * b) for a, b in zip(rates, formula, strict=True)]
confirm("the schedule is the formula", all(same))
for k in (1, 15, 30, 265, 500):
    print(f"step {k:3}: {rates[k - 1]:.4f}")

# %% [markdown]
# ## The annotated source
#
# Four short functions of {py:mod}`annotated_src.training` are the whole loop. Windows
# from random places; AdamW that leaves gains and biases alone (an exercise asks why); one
# step; many.

# %%
show(_batches, adamw, train_step, train)

# %% [markdown]
# `clip_grad_norm_` is the seat belt: if all gradients, taken as one long vector, are
# longer than 1, they are shortened to 1. One strange batch cannot throw the running
# means off.
#
# ## The text, and a trap
#
# Every Python carries the text of its own help pages: `pydoc_data.topics`, more than
# 400,000 characters of English. Some pages are put aside, not to be trained on,
# to see whether what is learnt is English or just these pages. Here is the obvious way,
# every tenth page, and a question that is seldom asked.

# %%
names = sorted(topics)
aside = names[5::10]


def share_found(pages, aside, width=60):
    """Cut what is put aside into strips: how many are in the other pages, too?"""
    flat = {name: " ".join(page.split()) for name, page in pages.items()}
    others = "\n".join(flat[name] for name in flat if name not in aside)
    starts = [
        (flat[n], i) for n in aside for i in range(0, len(flat[n]) - width, width)
    ]
    return sum(page[i : i + width] in others for page, i in starts) / len(starts)


confirm("over 400,000 characters", sum(map(len, topics.values())) > 400_000)
confirm("more than half is in the training text", share_found(topics, aside) > 0.5)

# %% [markdown]
# Small pages are chapters of large ones. A held-out loss on them would measure memory
# and call it understanding. So each paragraph may stay only once, in the smallest page
# that has it.

# %%
pages, known = {}, set()
for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
    kept = []
    for paragraph in topics[name].split("\n\n"):
        words = " ".join(paragraph.split())
        if words and words not in known:
            known.add(words)
            kept.append(paragraph.strip("\n"))
    if kept:
        pages[name] = "\n\n".join(kept)

names = sorted(pages)
aside = names[5::10]
confirm("now less than a twentieth is", share_found(pages, aside) < 0.05)

# %% [markdown]
# Then the ids: 1024 tokens of byte-level BPE ({ref}`ch-tokens`), learnt on the training
# pages alone. Pages are joined by a token that says that a text has ended.

# %%
END = "<|endoftext|>"
bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bpe.decoder = decoders.ByteLevel()
bpe.train_from_iterator(
    [pages[name] for name in names if name not in aside],
    trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ),
)
tokenizer = TextTokenizer(bpe, None, END)
END_ID = torch.tensor([tokenizer.eos_id])


def ids_of(chosen):
    return torch.cat(
        [torch.cat([tokenizer.encode(pages[n])[0], END_ID]) for n in chosen]
    )


train_ids = ids_of([name for name in names if name not in aside])
held_out_ids = ids_of(aside)
T, B = 96, 8
windows = held_out_ids[: len(held_out_ids) // T * T].view(-1, T)
windows = windows[:: len(windows) // 24][:24]
confirm("over 100,000 tokens to train on", len(train_ids) > 100_000)
confirm("over 5,000 put aside", len(held_out_ids) > 5_000)
confirm("the vocabulary has 1024 tokens", tokenizer.vocab_size == 1024)

# %% [markdown]
# What would the loss be of a model that only counts? Three yardsticks, measured on the
# held-out windows that our model will read, too: no knowledge at all, how frequent each
# token is ({eq}`eq-training-frequencies`), and which token follows which (the table of
# the first section, counted instead of trained).

# %%
show(figures.baselines)

# %%
counted = figures.baselines(train_ids, windows, 1024)
confirm("frequencies save over half a nat", counted.uniform - counted.unigram > 0.5)
confirm("pairs save over a nat more", counted.unigram - counted.bigram > 1)

# %% [markdown]
# ## The run
#
# 500 steps of 8 windows of 96 tokens. On the way, at some steps, read held-out text, and
# keep copies of the model for later.

# %%
MARKS = (10, 15, 20, 25, 30, 40, 50, 70, 100, 140, 200, 280, 380, 500)
init_weights(model, seeded(), STD)
stages = {0: copy.deepcopy(model)}
held_out = {0: held_out_loss(model, windows)}
losses = []
stream = batches(train_ids, B, T, seeded(1))
for loss in train(model, stream, steps=K, peak=PEAK, warmup=K0):
    losses.append(loss)
    if len(losses) in MARKS:
        held_out[len(losses)] = held_out_loss(model, windows)
    if len(losses) in (25, 100):
        stages[len(losses)] = copy.deepcopy(model)
stages[K] = model

# %% mystnb={"image": {"alt": "Loss in nats a token against training steps from 1 to 500, steps on a logarithmic axis. Three dashed lines: knows nothing at 6.9, knows frequencies near 6, knows pairs near 4.3. The training loss and the held-out loss begin just above the first line, reach the second after about 25 steps, bend there, and fall together through the third; at the end the training loss is clearly lower than the held-out one."}, "figure": {"name": "fig-training-loss", "caption": "The run. Orange: the loss of each batch, blue: held-out pages. The dashed lines are what counting alone achieves. On the right the same in bits a byte."}} tags=["hide-input"]
num_bytes = len(tokenizer.decode(windows.flatten()).encode())
bytes_per_token = num_bytes / windows.numel()
figures.draw_loss(figures.loss_data(losses, held_out, counted, bytes_per_token))

# %% [markdown]
# Two stretches, and a knee on the second line. The curve falls to what the frequencies
# give, and only then turns to context. Why in this order? By {eq}`eq-training-gradient`
# every place in every window pulls frequent tokens up: all gradients agree on it. What
# depends on context, each place pulls another way, and the layers below do not yet
# tell contexts apart.

# %%
confirm("it begins where it should", abs(losses[0] - math.log(1024) - 0.16) < 0.1)
confirm("after 25 steps: frequencies", abs(held_out[25] - counted.unigram) < 0.3)
confirm("at the end: better than pairs", held_out[K] < counted.bigram - 0.25)
confirm("the training loss ends near 3", abs(sum(losses[-20:]) / 20 - 3) < 0.5)


def dependence(model):
    """Nats by which the expectations at the places differ from their common mean."""
    with torch.no_grad():
        expected = model(windows).softmax(-1).flatten(0, 1)
    mean = expected.mean(0)
    return (expected * (expected / mean).log()).sum(-1).mean().item()


by_stage = {step: dependence(stage) for step, stage in stages.items()}
confirm("after 25 steps it expects nearly the same everywhere", by_stage[25] < 0.4)
confirm("at the end it does not, by far", by_stage[K] > 1.5)

# %% [markdown]
# The second answer: something simpler, how frequent each token is. Now watch it read.
# Below, the same lines of a held-out page at four stages; the ground of each character
# says how surprising its token was.

# %% mystnb={"image": {"alt": "The same lines of a held-out page four times, as read after 0, 25, 100 and 500 steps; the ground of each character is the surprise at its token, from white, expected, to dark orange, 10 bits or more. After 0 steps everything is dark orange. After 25 steps single frequent tokens such as spaces and commas are lighter. After 100 steps ends of words have paled. After 500 steps short words, line ends and many ends of words are pale, and dark orange is left mostly on rarer words."}, "figure": {"name": "fig-training-reading", "caption": "One held-out page, read by the model after 0, 25, 100 and 500 steps. The sign ↵ is the end of a line."}} tags=["hide-input"]
page = max(aside, key=lambda name: len(pages[name]))
start = pages[page].find(". ", len(pages[page]) // 2) + 2
passage = torch.cat([END_ID, tokenizer.encode(pages[page][start:])[0]])[None, :200]
figures.draw_readings(
    {
        f"after {step} steps": figures.reading_data(stage, tokenizer, passage)
        for step, stage in stages.items()
    }
)

# %% [markdown]
# Words pale from their ends: once a word has begun, the rest is less of a surprise, on
# average.

# %%
heads = [tokenizer.decode([i])[:1] for i in range(1024)]
begins = torch.tensor([head == " " for head in heads])[windows[:, 1:]]
goes_on = torch.tensor([head.islower() for head in heads])[windows[:, 1:]]
saved = {}
for step in (0, K):
    surprises = -token_log_probs(stages[step], windows)
    saved[step] = (surprises[begins].mean() - surprises[goes_on].mean()).item()
confirm("before training: no difference", abs(saved[0]) < 0.2)
confirm("at the end later pieces of words cost less", saved[K] > 0.3)

# %% [markdown]
# And this is how it writes, from nothing but the token that ends a text:

# %% mystnb={"image": {"alt": "Three texts written by the model. After 0 steps: random pieces of words and signs, all dark orange. After 100 steps: pieces that look like English, with quotation marks and line ends, in mixed colours. After 500 steps: words and phrases of a Python manual, mostly real words without much sense, mostly pale, with orange where words begin."}, "figure": {"name": "fig-training-samples", "caption": "What the model writes (temperature 0.8), and how surprising each token that it drew was to itself."}} tags=["hide-input"]
written = {}
for step in (0, 100, K):
    draw = Sample(temperature=0.8, generator=seeded(11))
    ids = generate(stages[step], END_ID[None], max_new_tokens=150, sampler=draw)
    written[f"after {step} steps"] = figures.reading_data(stages[step], tokenizer, ids)
figures.draw_readings(written)

# %% [markdown]
# Tokens are a poor unit to compare models by: with a larger vocabulary there are fewer
# of them and each costs more. Count bytes, then, which no tokenizer changes. With $n$
# tokens and $b$ bytes,
#
# $$
# \text{bits per byte} = \frac{n}{b} \cdot \frac{\mathcal{L}}{\ln 2}.
# $$ (eq-training-bits)
#
# A packer that trusts the model could write each byte, of 8 bits, in so many.

# %%
# Check eq-training-bits.
surprises = -token_log_probs(model, passage)[0].double()
num_bytes = len(tokenizer.decode(passage[0]).encode())
bits = -surprises.neg().exp().log2().sum() / num_bytes  # added up, for each byte
formula = len(surprises) / num_bytes * surprises.mean() / math.log(2)
confirm("bits, added up, over bytes = the formula", torch.allclose(bits, formula))
per_byte = held_out[K] / (bytes_per_token * math.log(2))
confirm("at the end: between 1.5 and 2.1 bits a byte", 1.5 < per_byte < 2.1)

# %% [markdown]
# ## What it knows by heart
#
# The gap in {numref}`fig-training-loss` is between pages that it has seen, each token
# about three times, and others. It opens as training goes on: part of what is learnt
# late is *these pages*.

# %%
seen_windows = train_ids[: len(train_ids) // T * T].view(-1, T)
seen_windows = seen_windows[:: len(seen_windows) // 24][:24]
gaps = {
    step: held_out[step] - held_out_loss(stages[step], seen_windows)
    for step in (100, K)
}
confirm("every token was seen about three times", 2.5 < K * B * T / len(train_ids) < 4)
confirm("the gap at the end is over 0.3 nats", gaps[K] > 0.3)
confirm("and has grown since step 100", gaps[K] > gaps[100] + 0.1)

# %% [markdown]
# ## The checkpoint, and the ladder of equality
#
# {py:func}`annotated_src.saving.save_checkpoint` is {ref}`ch-checkpoint` in the other
# direction: names, shards, index and config as transformers writes them. With the
# tokenizer's two files beside them the folder is complete, and {ref}`ch-from-pretrained`
# to {ref}`ch-pipeline` apply to it.

# %%
temporary = TemporaryDirectory()
folder = Path(temporary.name)
save_checkpoint(model, folder, max_shard_bytes=2_000_000, eos_id=tokenizer.eos_id)
bpe.save(str(folder / "tokenizer.json"))
about = {"eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}
(folder / "tokenizer_config.json").write_text(json.dumps(about))
for path in sorted(folder.iterdir()):
    print(path.name)

# %%
theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
    folder, attn_implementation="eager", output_loading_info=True
)
their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
confirm("transformers finds nothing missing or strange", not any(report.values()))
sentence = "The exception is raised by the"
ids = tokenizer.encode(sentence)
confirm("same ids", their_tokenizer(sentence)["input_ids"] == ids[0].tolist())
with torch.no_grad():
    logits, their_logits = model(windows), theirs(windows).logits
confirm("same logits", torch.allclose(logits, their_logits, atol=1e-3))
greedy = generate(model, ids, max_new_tokens=64, stop_ids=[tokenizer.eos_id])
their_greedy = theirs.generate(
    ids,
    attention_mask=torch.ones_like(ids),
    max_new_tokens=64,
    do_sample=False,
    pad_token_id=tokenizer.eos_id,
)
confirm("same greedy text", torch.equal(greedy, their_greedy))
answer = TextGeneration.from_pretrained(folder)(sentence, max_new_tokens=64)
same = sentence + answer == tokenizer.decode(greedy[0])
confirm("and our pipeline reads the folder, too", same)
temporary.cleanup()

# %% [markdown]
# Training has a ladder too: the sum by hand = torch's loss, Adam by hand = torch's AdamW
# (both above), and now loss and gradients = those of `LlamaForCausalLM`, which computes
# its own loss.

# %%
ours = copy.deepcopy(model)
batch = next(batches(train_ids, B, T, seeded(9)))
loss = next_token_loss(ours(batch), batch)
their_loss = theirs(input_ids=batch, labels=batch).loss
loss.backward()
their_loss.backward()
confirm("same loss", torch.allclose(loss, their_loss, rtol=1e-5))
same = []
for their_name, name in names_by_layer(ours, HF_NAMES).items():
    a, b = ours.get_parameter(name).grad, theirs.get_parameter(their_name).grad
    same.append(torch.allclose(a, b, rtol=1e-2, atol=1e-5))
confirm(f"same gradients in all {len(same)} tensors", all(same))

# %% [markdown]
# :::{admonition} Docs and code
# :class: paper-code
# Who shifts? In the loop at the top of this chapter the caller paired each letter with
# the next. In transformers the *model* does it: `labels` are the input itself, and
# `ForCausalLMLoss` shifts them. Shift them yourself as well, as many a loop does, and
# nothing fails; you train a model to predict the token *after* the next one. A second
# surprise waits in the config: a `LlamaConfig` that is not told otherwise ends
# texts at id 2, whatever id 2 is in your vocabulary. So `save_checkpoint` always writes
# `eos_token_id`, if only to say that there is none.
# :::

# %%
with torch.no_grad():
    right = theirs(input_ids=windows, labels=windows).loss
    twice = theirs(input_ids=windows[:, :-1], labels=windows[:, 1:]).loss
    scores = theirs(windows[:, :-2]).logits
two_ahead = F.cross_entropy(scores.flatten(0, 1), windows[:, 2:].flatten())
confirm("shifted twice = the loss two tokens ahead", torch.allclose(twice, two_ahead))
confirm("which is far higher", twice > right + 1)
untold = transformers.LlamaConfig().eos_token_id
confirm("an untold config ends texts at id 2", untold == 2)
confirm("which is a piece of text here", tokenizer.decode([2]) != "")
confirm("ours says what it means", theirs.config.eos_token_id == tokenizer.eos_id)

# %% [markdown]
# :::{admonition} Break it
# :class: break-it
# Three classics, on a smaller model that learns in seconds. **No shift**: each place is
# asked for its own token. **No causal mask**: each place may look at the answer. **The
# rate ten times too high.** The first two reach losses far below that of the honest run.
# The third hardly gets beyond the frequencies.
# :::


# %%
def small_run(steps, rate, layers=2, window=64, rows=8, warmup=10):
    net = Llama(LlamaConfig(1024, layers, 64, 4, 2, 16, 176, 256, 1e-5, 1e4, False))
    init_weights(net, seeded(7), STD)
    stream = batches(train_ids, rows, window, seeded(7))
    curve = list(train(net, stream, steps=steps, peak=rate, warmup=warmup))
    return net, sum(curve[-10:]) / 10, sum(curve[:10]) / 10


def wrong_loss(logits, labels):  # no shift
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def wrong_mask(num_tokens, num_cached=0, device=None):  # everything is visible
    shape = (1, 1, num_tokens, num_cached + num_tokens)
    return torch.ones(shape, dtype=torch.bool, device=device)


_, fair, _ = small_run(120, 4e-3, layers=4)
with patch("annotated_src.training.next_token_loss", wrong_loss):
    parrot, unshifted, _ = small_run(150, 4e-3)
with patch("annotated_src.placement.causal_mask", wrong_mask):
    peeper, unmasked, _ = small_run(200, 1e-2, window=24, rows=16)
_, too_fast, _ = small_run(120, 4e-2, layers=4)

confirm("done right: better than frequencies, far from 0", 4 < fair < counted.unigram)
confirm("no shift: below 1", unshifted < 1)
confirm("no mask: below 1, too", unmasked < 1)
confirm(
    "ten times the rate: hardly beyond frequencies", too_fast > max(5.4, fair + 0.3)
)

# %% [markdown]
# The third answer: be alarmed. What the two have learnt shows as soon as they must write,
# where there is no answer to look at. The first repeats what it has just read. The
# second is at a loss without its future.

# %%
echo = generate(parrot, tokenizer.encode("exception"), max_new_tokens=20)[0]
confirm("without the shift: one token, again and again", (echo[-20:] == echo[-1]).all())
ln_v = math.log(1024)
asked = held_out_loss(parrot, windows), held_out_loss(peeper, windows[:, :24])
confirm("asked for the next token, both do worse than a blind guess", min(asked) > ln_v)

# %% [markdown]
# And a milder one: no warm-up. The first steps are larger, so the loss falls faster at
# first, and is behind later.

# %%
_, warm, warm_start = small_run(60, 4e-3, layers=4, warmup=20)
_, cold, cold_start = small_run(60, 4e-3, layers=4, warmup=0)
confirm("without: ahead in the first ten steps", cold_start < warm_start - 0.1)
confirm("and behind after sixty", cold > warm + 0.03)

# %% [markdown]
# ## Exercises
#
# Write your function in a cell of your own and give it to `check`. A question takes its
# name and a letter: `check("gains_without_decay", "a")`.

# %%
from annotated_src.exercises import check  # noqa: F401 - for your cells
from annotated_src.exercises.training import chapter as exercises

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("next_token_loss")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("next_token_loss")

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("learning_rate")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("learning_rate")

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("adamw_step")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("adamw_step")

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("first_guess_of_a_tied_head")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("first_guess_of_a_tied_head")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
from dataclasses import replace

tied = Llama(replace(config, tied_head=True))
init_weights(tied, seeded(), 0.02)
with torch.no_grad():
    scores = tied(random_ids)
own = scores.gather(-1, random_ids[..., None])
likeliest = (scores.argmax(-1) == random_ids).float().mean()
confirm("the likeliest is the one just read", likeliest > 0.98)
confirm("its score is about 2", 1.5 < own.mean() < 2.56)
confirm("the others' spread is about 0.2", 0.15 < scores.std() < 0.35)
forever = generate(tied, random_ids[:1, :5], max_new_tokens=20)[0, 4:]
confirm("and it says it for ever", (forever == forever[0]).all())

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("gains_without_decay")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("gains_without_decay")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
scaled = copy.deepcopy(model)
with torch.no_grad():
    for block in scaled.blocks:
        block.ffn_norm.weight *= 2
        block.ffn.gate_proj.weight /= 2
        block.ffn.up_proj.weight /= 2
    confirm("the same model", torch.equal(scaled(windows), model(windows)))

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("gradient_in_parts")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("gradient_in_parts")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
# With windows of one length the colleague was right: two halves = the whole.
whole, halves = copy.deepcopy(model), copy.deepcopy(model)
whole.zero_grad(), halves.zero_grad()
next_token_loss(whole(batch), batch).backward()
for half in batch.chunk(2):
    (next_token_loss(halves(half), half) / 2).backward()
same = [
    torch.allclose(a.grad, b.grad, atol=1e-5)
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True)
]
confirm("two halves = the whole", all(same))

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("too_good_to_be_true")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("too_good_to_be_true")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
everything = train_ids
train_ids = everything[1000:1400]  # a page or two
parrot, by_heart, _ = small_run(200, 6e-3)
train_ids = everything
confirm("training loss under 0.5", by_heart < 0.5)
elsewhere = held_out_loss(parrot, windows)
confirm("on held-out text: worse than a blind guess", elsewhere > ln_v)

# %% [markdown]
# ## What to remember
#
# - The loss is the mean surprise at the next token; its gradient at the scores is
#   what was expected less what came.
# - It begins near $\ln V$. The model learns first how frequent tokens are, and only then
#   what follows what.
# - One pass without a cache gives $T - 1$ lessons, because the causal mask lets no
#   answer through.
# - Adam makes steps of about one size for every weight. Warm-up keeps the first ones
#   short, decay is for matrices, clipping for accidents.
# - A loss that is too good is a bug: no shift, no mask, or held-out text that is not
#   held out. Look at samples.
# - In transformers labels are the inputs; the model shifts.
#
# ## Where to read on
#
# In transformers: `loss/loss_utils.py` (`ForCausalLMLoss`: the shift;
# `fixed_cross_entropy`), `trainer.py` (`Trainer._inner_training_loop` and `training_step` are the loop,
# `get_decay_parameter_names` spares biases and norms), `optimization.py`
# (`get_cosine_schedule_with_warmup`), `modeling_utils.py` (`PreTrainedModel._init_weights`, `save_pretrained`).
# In this book: {py:mod}`annotated_src.training`, {py:mod}`annotated_src.saving`; and
# {py:mod}`annotated_src.train_small_chatglm`, which trains the ChatGLM of part two on blanks
# with the same loop. Then give `save_checkpoint` a folder that stays, and start again at
# {ref}`ch-checkpoint` with a model of your own.
