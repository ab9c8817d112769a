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
# (ch-prefix-tuning)=
# # P-tuning v2
#
# :::{admonition} In this chapter
# :class: at-a-glance
# **50 minutes · moderate.** Afterwards you can teach a frozen ChatGLM a task by training
# what stands in its cache, split any attention into what the prefix adds and what was
# there before, say where a prefix stands and what it cannot do, serve two tasks in one
# batch, and count what all this costs for the 6B model.
# :::

# %% tags=["remove-input"]
from annotated_src.figures.model_map import ChatGLMMap

ChatGLMMap("prefix")

# %% [markdown]
# :::{admonition} Predict before you run
# :class: predict
# You P-tune the 6B model with 128 *prefix tokens*. Training is over, the task is
# learned. You now shuffle the 128, and you shuffle them differently in each of the 28
# layers, so that no two layers agree on who is first. What happens to the answers: they
# turn to nonsense, they get a little worse, or something else?
# :::

# %%
import ast
import inspect
import json
import math
import random
import re
from collections import Counter
from dataclasses import replace
from importlib import import_module

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import OneCycleLR

from annotated_src.attention import attend
from annotated_src.blank_infilling import mask_rest
from annotated_src.checkpoint import assign_strictly, names_by_layer, rename
from annotated_src.figures import prefix_tuning as figures
from annotated_src.generate import generate
from annotated_src.golden import GOLDEN, golden, golden_config
from annotated_src.loss import IGNORE, next_token_loss
from annotated_src.masks import prefix_mask
from annotated_src.models.chatglm import HF_NAMES, ChatGLM, ChatGLMConfig
from annotated_src.positions import BlankIds, context_lengths, prompt_positions
from annotated_src.prefix_tuning import PrefixEncoder
from annotated_src.rotary_2d import rotation
from annotated_src.show import confirm, show

_ = torch.manual_seed(0)
F64 = torch.float64

# %% [markdown]
# ## A cache that nobody wrote
#
# When a model has read a text, what it keeps of it is keys and values: one of each per
# token, in every layer ({ref}`ch-cache`). Later tokens look at nothing else. So whoever
# fills the cache decides what the model believes to have read.
#
# P-tuning v2 {cite:p}`liu2021` takes that literally. It puts a few keys and values into
# every layer's cache before the first token, and never asks which text they came from.
# There was none: they are **parameters**, and training finds them. The model itself
# stays as it is. {cite:t}`li2021` had the idea for writing text, as *prefix tuning*;
# P-tuning v2 brought it to understanding text, and ChatGLM-6B ships with it.
#
# In plain loops, one query of one head. The only new thing is where the two lists begin.


# %%
def attend_after_prefix(query, prefix, tokens):
    """Average values over a prefix and the tokens, both lists of (key, value)."""
    together = prefix + tokens
    scores = [
        sum(q * k for q, k in zip(query, key, strict=True)) / math.sqrt(len(query))
        for key, _ in together
    ]
    powers = [math.exp(score) for score in scores]
    weights = [power / sum(powers) for power in powers]
    output = [
        sum(w * value[i] for w, (_, value) in zip(weights, together, strict=True))
        for i in range(len(query))
    ]
    return output, weights


query = [2.0, 0.0]
tokens = [([1.0, 0.0], [1.0, 0.0]), ([0.0, 1.0], [0.0, 1.0]), ([1.0, 2.0], [2.0, 4.0])]
prefix = [([2.0, 0.0], [0.0, -8.0]), ([0.0, 2.0], [3.0, 3.0])]

for name, before in (("without", []), ("with", prefix)):
    output, weights = attend_after_prefix(query, before, tokens)
    print(f"{name:8} weights", " ".join(f"{w:5.2f}" for w in weights))
    print(f"{'':8} output ", " ".join(f"{x:5.2f}" for x in output))

# %% [markdown]
# The first key of the prefix shouts, and its value goes where no token's value points.
# The output follows. Now look at the weights of the three tokens, with the prefix and
# without. They have all become smaller, by the same factor.
#
# ## A gate
#
# Let $x_j$ be the score of column $j$, $P$ the columns of the prefix and $T$ those of
# the tokens. The output is one weighted mean over both,
#
# $$
# o = \sum_{j \in P \cup T} w_j v_j, \qquad
# w_j = \frac{e^{x_j}}{\sum_{i \in P} e^{x_i} + \sum_{s \in T} e^{x_s}} .
# $$ (eq-prefix-attend)
#
# Collect the two groups. Let $\lambda = \sum_{i \in P} w_i$ be the share of the prefix,
# its **mass**. Within a group, dividing by the group's own share gives back a softmax
# over that group alone. So with $o_P$ and $o_T$ the outputs of attention over the prefix
# alone and over the tokens alone,
#
# $$
# o = \lambda\, o_P + (1 - \lambda)\, o_T .
# $$ (eq-prefix-gate)
#
# And the mass is a sigmoid: divide above and below by $\sum_P e^{x_i}$ and find
#
# $$
# \lambda = \frac{\sum_P e^{x_i}}{\sum_P e^{x_i} + \sum_T e^{x_s}}
# = \sigma\Bigl(\log \sum_{i \in P} e^{x_i} - \log \sum_{s \in T} e^{x_s}\Bigr).
# $$ (eq-prefix-lambda)
#
# Read it aloud: *each head mixes in a learned vector, through a gate that its own query
# opens.* The rest, $o_T$, is what the frozen head computes from the same queries, keys
# and values without a prefix. ({cite:t}`he2022` read prefix tuning this way, to set it
# beside other ways of tuning a frozen model.)

# %%
# Check eq-prefix-attend, eq-prefix-gate and eq-prefix-lambda.
q = torch.tensor(query, dtype=F64)[None, None, None]
k_pre, v_pre = torch.tensor(prefix, dtype=F64).unbind(1)
k_tok, v_tok = torch.tensor(tokens, dtype=F64).unbind(1)


def see_all(keys, values):
    """Let the package attend with everything visible."""
    everything = torch.ones(1, 1, 1, len(keys), dtype=torch.bool)
    return attend(q, keys[None, None], values[None, None], everything)[0, 0, 0]


both = see_all(torch.cat((k_pre, k_tok)), torch.cat((v_pre, v_tok)))
output, weights = attend_after_prefix(query, prefix, tokens)
confirm("the loops are attend", torch.allclose(both, torch.tensor(output).double()))

x_pre, x_tok = ((q @ k.mT / math.sqrt(2)).flatten() for k in (k_pre, k_tok))
mass = torch.sigmoid(x_pre.logsumexp(0) - x_tok.logsumexp(0))
print(f"mass of the prefix: {mass:.3f}")
confirm("the mass is the prefix's weights", abs(mass - sum(weights[:2])) < 1e-6)
mixed = mass * see_all(k_pre, v_pre) + (1 - mass) * see_all(k_tok, v_tok)
confirm("the output is the gated mix", torch.allclose(both, mixed))

# %% [markdown]
# What the gate cannot do follows at once. Two tokens share the factor $1 - \lambda$, so
# it drops out of their ratio:
#
# $$
# \frac{w_s}{w_r} = e^{\,x_s - x_r} \quad \text{for tokens } s, r,
# \text{ with any prefix or none.}
# $$ (eq-prefix-ratio)
#
# In one layer **a prefix cannot make a head prefer another token**. It can drown them
# all, or leave them be. But the layer's output is the next layer's input: there the
# tokens' own queries and keys have changed, and with them what they look at.

# %%
# Check eq-prefix-ratio.
_, alone = attend_after_prefix(query, [], tokens)
found = torch.tensor(weights[2:]) / torch.tensor(alone)
confirm("all tokens shrink by one factor", torch.allclose(found, 1 - mass.float()))
ratios = torch.tensor(weights[2:], dtype=F64) / weights[2]
confirm(
    "and their ratios are those of the scores alone",
    torch.allclose(ratios, (x_tok - x_tok[0]).exp()),
)

# %% [markdown]
# ## The annotated source
#
# A table with a row per prefix token. A row holds all of that token's keys and values:
# one of each, for every head of every layer.

# %%
show(PrefixEncoder, ChatGLM.new_cache)

# %% [markdown]
# `new_cache` returns a cache that is not empty. The rest of ChatGLM hardly notices: its
# forward pass opens the columns of the prefix to every token, and that is all. A small
# model to look at, with random weights:

# %%
ids = BlankIds(sop=3, gmask=4, mask=5)
config = ChatGLMConfig(
    vocab_size=60,
    num_layers=3,
    embed_dim=32,
    num_heads=4,
    ffn_dim=64,
    max_seq_len=40,
    norm_eps=1e-5,
    blank_ids=ids,
)
base = ChatGLM(config).eval()


def with_prefix(base, prefix_len, projection=False):
    """Give a model's weights to one that has a new, random prefix besides."""
    sizes = {"prefix_len": prefix_len, "prefix_projection": projection}
    model = ChatGLM(replace(base.config, **sizes))
    fresh = model.prefix_encoder.state_dict(prefix="prefix_encoder.")
    model.load_state_dict(base.state_dict() | fresh)
    return model.eval()


def same(one, other):
    return torch.allclose(one, other, atol=1e-4)


tuned = with_prefix(base, prefix_len=6)
prompt = torch.tensor([[20, 21, 22, 23, ids.gmask, ids.sop]])
empty, filled = base.new_cache(1, 8), tuned.new_cache(1, 8)
print("entries before the first token:", empty[0].length, "and", filled[0].length)
with torch.no_grad():
    plain, steered = base(prompt, empty), tuned(prompt, filled)
print("entries after a prompt of six: ", empty[0].length, "and", filled[0].length)
confirm("the prefix changes the scores", not same(plain, steered))
confirm("but nobody's position", torch.equal(empty.positions, filled.positions))
print("both last tokens stand at", filled.positions[0].tolist())

# %% [markdown]
# The original does the same in `get_prompt`. There `view` cuts a row into $2L$ pieces of
# heads, `permute([2, 1, 0, 3, 4])` puts these pieces first and then the prefix tokens,
# as in all its caches, and `split(2)` hands each layer a key and a value. Its mask for
# these columns is a table of ones, put through `< 0.5`: nothing is masked.
#
# Two details are easy to overlook. The keys of the prefix are **not turned**, though all
# other keys in the cache are. And the tokens **keep their positions**: the first still
# stands at 0. In most libraries what is in the cache pushes the tokens on.
#
# ## Where does a prefix stand?
#
# A token's score depends on distance, in places and in steps ({ref}`ch-rope-2d`). Here
# the query is turned and the key is not. But not to turn is to turn by nothing:
#
# $$
# \langle R_{(m,s)}\, q,\, k \rangle = \langle R_{(m,s)}\, q,\, R_{(0,0)}\, k \rangle .
# $$ (eq-prefix-place)
#
# **Every prefix token stands at place 0, step 0**, on top of the prompt's first token,
# and all of them on top of each other. To a query at place $m$ a prefix key is always
# $m$ away. So it is not the same to all: the score varies with the query's place as that
# of the text's first token does ({numref}`fig-prefix-place`).

# %%
# Check eq-prefix-place.
q, k = torch.randn(2, 1, 1, 1, 8, dtype=F64)


def turned(x, place, step):
    return rotation(torch.tensor([[[place], [step]]]), 8, F64)(x)


for m, s in ((0, 0), (7, 0), (500, 3)):
    score = (turned(q, m, s) * k).sum()
    first = (turned(q, m, s) * turned(k, 0, 0)).sum()
    moved = (turned(q, m + 90, s + 9) * turned(k, 90, 9)).sum()
    confirm(
        f"query at place {m}, step {s}: as a token so far away",
        torch.allclose(score, first) and torch.allclose(score, moved),
    )

# %% mystnb={"image": {"alt": "A heat map of scores. Twelve rows, one for each place of the query. On the left, apart, one column for a key in the prefix; then twelve columns for the same key as a token at places 0 to 11. The token columns form even diagonal stripes. The prefix column changes from row to row, and is the same as the column of place 0; both are outlined in orange. A colour bar gives the scores."}, "figure": {"name": "fig-prefix-place", "caption": "One query vector and one key vector; the brighter, the higher the score. As a token, the key scores by distance: stripes. In the prefix, it scores as a token at place 0 does."}} tags=["hide-input"]
figures.draw_places(figures.place_data())

# %% [markdown]
# That settles the prediction. A token's place is in its keys alone; these all have the
# same one, and a weighted mean does not care for the order of its terms. As long as each
# key keeps its value, a prefix is a *set*.

# %%
P = tuned.config.prefix_len


def shuffled(cache):
    """Shuffle the prefix in every layer by itself, keys and values together."""
    for layer in cache:
        order = torch.randperm(P)
        for kept in (layer.keys, layer.values):
            kept[:, :, :P] = kept[:, :, order]
    return cache


with torch.no_grad():
    confirm(
        "shuffle the prefix, each layer by itself: nothing changes",
        same(tuned(prompt, shuffled(tuned.new_cache(1, 8))), steered),
    )
    moved = prompt[:, [2, 0, 3, 1, 4, 5]]
    confirm("shuffle the words: the scores change", not same(tuned(moved), steered))

# %% [markdown]
# ## Every text is a prefix
#
# How does this compare with a prompt, made of words? Let the model read a text, take
# what is in its cache, and make that a prefix's table. From then on it should behave as
# if the text stood before the prompt. There are two conditions: the text must not have
# looked at the prompt, since the cache was full before the prompt came; and the prompt's
# tokens must stand behind it.


# %%
def as_table(cache, length):
    """Lay out what a cache holds as PrefixEncoder stores it, a row per token."""
    layers = [torch.stack((c.keys, c.values))[:, 0, :, :length] for c in cache]
    return torch.stack(layers).permute(3, 0, 1, 2, 4).flatten(1)  # (P, L * 2 * N * H)


text = torch.tensor([[31, 32, 33, 34]])
length = text.shape[1]
text_at = torch.stack((torch.arange(length), torch.zeros(length).long()))[None]
prompt_at = prompt_positions(prompt, ids, rows=2) + torch.tensor([[length], [0]])

# The text and the prompt in one call; the text sees itself only.
visible = torch.ones(1, 1, 10, 10).bool()
visible[..., :length, length:] = False
visible[..., length:, length:] = prefix_mask(context_lengths(prompt, ids.sop), 6)
both_at = torch.cat((text_at, prompt_at), dim=-1)
with torch.no_grad():
    whole = base(torch.cat((text, prompt), 1), positions=both_at, mask=visible)

    cache = base.new_cache(1, length)
    base(text, cache, positions=text_at, mask=visible[..., :length, :length])
    reader = with_prefix(base, prefix_len=length)
    reader.prefix_encoder.embedding.weight.copy_(as_table(cache, length))
    answer = reader(prompt, positions=prompt_at)
confirm(
    "a prefix made from a text does what the text does", same(answer, whole[:, length:])
)

# %% [markdown]
# So every text is a prefix, but few prefixes are a text. A text of $P$ tokens is a
# choice of $P$ rows of the embedding. Make these rows trainable, and you have *prompt
# tuning* {cite:p}`lester2021` or the first *P-tuning* {cite:p}`liu2021gpt`: $P \cdot D$
# free numbers at the input, from which the frozen layers compute all keys and values.
# P-tuning v2 sets the keys and values directly. That is $2L$ times as many numbers, and
# each layer gets its own.
#
# ## What it costs
#
# $P$ prefix tokens, $L$ layers, width $D$, a key and a value. With *projection*, each
# prefix token is one vector of width $D$, and a small network makes all its keys and
# values out of it:
#
# $$
# n = P \cdot 2LD, \qquad
# n_\text{proj} = PD + (D^2 + D) + (2LD^2 + 2LD) .
# $$ (eq-prefix-count)

# %%
# Check eq-prefix-count.
P, L, D = 128, 28, 4096
with torch.device("meta"):  # shapes without memory
    table = PrefixEncoder(P, L, num_heads=32, head_dim=128, projection=False)
    projected = PrefixEncoder(P, L, num_heads=32, head_dim=128, projection=True)
    six_b = ChatGLM(
        ChatGLMConfig(
            vocab_size=130528,
            num_layers=L,
            embed_dim=D,
            num_heads=32,
            ffn_dim=16384,
            max_seq_len=2048,
            norm_eps=1e-5,
            blank_ids=BlankIds(130004, 130001, 130000),
        )
    )


def count(module):
    return sum(weight.numel() for weight in module.parameters())


formulas = P * 2 * L * D, P * D + (D * D + D) + (2 * L * D * D + 2 * L * D)
confirm("the table", count(table) == formulas[0] == 29_360_128)
confirm("the projection", count(projected) == formulas[1])
names = "the model", "prefix, table", "prefix, projected"
for name, module in zip(names, (six_b, table, projected), strict=True):
    n = count(module)
    share = 100 * n / count(six_b)
    print(
        f"{name:18}{n:14,} numbers {share:6.2f} % {2 * n / 2**20:9,.0f} MiB in float16"
    )
confirm("as numbers at the input, 56 times fewer", count(table) == 56 * P * D)

# %% [markdown]
# A task weighs 56 MiB where a full copy of the model weighs 11,775. Training saves more:
# Adam takes a gradient and keeps two averages for each number that it trains, and here
# it trains one in 210. What it does *not* save is the way back through the layers: the
# gradient must pass them to reach the prefixes below, so their activations are kept.
#
# The projection turns the proportion round: 957 million numbers to make 29 million.
# It is there to ease training. Afterwards its output can be stored, as a table, and the
# network thrown away (the first exercise).
#
# ## Teach it something
#
# Now a real task, small enough to train while you watch: *is this a line of Python, or
# of English?* Python's own library has plenty of both, in statements and docstrings.
# We take ten modules that hardly change from one Python to the next. A line is ten
# words; the 400 most frequent words make up the vocabulary.

# %%
WIDTH = 10
MODULES = (
    *("_pydecimal", "_pyio", "difflib", "email._header_value_parser", "email.message"),
    *("http.cookiejar", "http.server", "optparse", "urllib.request", "xmlrpc.client"),
)
SIMPLE = ast.Assign, ast.AugAssign, ast.Return, ast.Raise, ast.Expr
DOCUMENTED = ast.Module, ast.ClassDef, ast.FunctionDef


def words(text):
    return re.findall(r"\w+|[^\w\s]", text)


def lines_of(source):
    """Find the first ten words of statements, and docstrings in tens of words."""
    code, prose = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED):
            for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                tens = zip(*[iter(words(paragraph))] * WIDTH, strict=False)
                prose.update(tens if ">>>" not in paragraph else ())
        elif isinstance(node, SIMPLE) and not isinstance(
            getattr(node, "value", None), ast.Constant
        ):
            line = tuple(words(ast.unparse(node))[:WIDTH])
            code.update([line] if len(line) == WIDTH else [])
    return code, prose


sources = [inspect.getsource(import_module(name)) for name in MODULES]
found = zip(*map(lines_of, sources), strict=True)
code, prose = (sorted(set().union(*parts)) for parts in found)
for kind, name, line in (
    (code, "Python", "self . dest = self . _short_opts [ 0 ]"),
    (prose, "English", "Raised if an invalid option is seen on the command"),
):
    confirm(f"a line of {name}: {line}", tuple(line.split()) in kind)

chance = random.Random(0)
code, prose = chance.sample(code, 1700), chance.sample(prose, 1700)
frequent = Counter(word for line in code + prose for word in line).most_common(400)
vocabulary = ["<unk>", "[MASK]", "[gMASK]", "<sop>", "<eop>"]
vocabulary += [word for word, _ in frequent]
index = {word: i for i, word in enumerate(vocabulary)}
UNK, MASK, GMASK, SOP, EOP = range(5)

labelled = [(line, True) for line in code] + [(line, False) for line in prose]
chance.shuffle(labelled)
lines = torch.tensor([[index.get(w, UNK) for w in line] for line, _ in labelled])
is_code = torch.tensor([answer for _, answer in labelled])
held_out = 600  # the first lines; the rest is to learn from

# %% [markdown]
# First the base. It learns what ChatGLM learned, to fill blanks ({ref}`ch-blanks`): cut
# a line anywhere, read the front, write the rest. It never hears of the task. One
# concession to the clock: $\alpha = \sqrt{56}$ is made for 28 layers
# ({ref}`ch-block`), and keeps two layers quiet for long. So their output matrices start
# 20 times as large; and the embedding starts small, since it is the head as well.


# %%
def train(model, tokens, labels, steps, learning_rate):
    """Train what is not frozen, on random rows; return the loss of every step."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    schedule = OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    losses = []
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(tokens), (64,))
        logits = model(tokens[rows])  # a fresh cache, so a fresh prefix, every time
        loss = next_token_loss(logits, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return losses


torch.manual_seed(1)
base_ids = BlankIds(SOP, GMASK, MASK)
base = ChatGLM(
    ChatGLMConfig(
        vocab_size=len(vocabulary),
        num_layers=2,
        embed_dim=32,
        num_heads=4,
        ffn_dim=128,
        max_seq_len=32,
        norm_eps=1e-5,
        blank_ids=base_ids,
    )
)
with torch.no_grad():
    base.embedding.weight /= 32**0.5
    for block in base.blocks:
        block.attention.out_proj.weight *= 20
        block.ffn.down_proj.weight *= 20

blanks = [
    mask_rest(line, chance.randrange(1, WIDTH), base_ids, EOP)
    for line in lines[held_out:].tolist()
]
tokens, labels = (torch.stack(part) for part in zip(*blanks, strict=True))
losses = train(base, tokens, labels, steps=200, learning_rate=0.02)
confirm("the base has learned to fill blanks", sum(losses[-20:]) / 20 < 3.5)

# %% [markdown]
# Now the task. A prompt is the whole line, then `[gMASK] <sop>`. The answer shall be one
# word, `=` for Python and `the` for English.


# %%
def ask(lines):
    blank = torch.tensor([GMASK, SOP]).expand(len(lines), -1)
    return torch.cat((lines, blank), dim=1)


@torch.no_grad()
def accuracy(model, answers):
    """Compare the likeliest of all words with the answer, on lines held out."""
    said = model(ask(lines[:held_out]))[:, -1].argmax(dim=-1)
    return (said == answers[:held_out]).float().mean().item()


def teach(model, answers, steps=100):
    """Train on lines with an answer each; only the answer counts."""
    tokens = torch.cat((ask(lines), answers[:, None]), dim=1)[held_out:]
    labels = torch.full_like(tokens, IGNORE)
    labels[:, -1] = tokens[:, -1]
    return train(model, tokens, labels, steps, learning_rate=0.3)


torch.manual_seed(2)
kinds = torch.where(is_code, index["="], index["the"])
tuned = with_prefix(base, prefix_len=8)
untrained = with_prefix(base, prefix_len=8)
untrained.load_state_dict(tuned.state_dict())
before = {name: weight.clone() for name, weight in tuned.state_dict().items()}
confirm("the base does not know the task", accuracy(base, kinds) < 0.2)
confirm("nor does a random prefix", accuracy(tuned, kinds) < 0.3)

losses = teach(tuned, kinds)
confirm("the loss has fallen to less than half", sum(losses[-10:]) < 5 * losses[0])
confirm("now more than 8 of 10 answers are right", accuracy(tuned, kinds) > 0.8)

# %% [markdown]
# These lines were held out, and half of them are code: a guess is right 5 times in 10.
# And what has become of the model?

# %%
changed = {
    name
    for name, weight in tuned.state_dict().items()
    if not torch.equal(weight, before[name])
}
confirm(
    "every weight of the base is what it was, bit by bit; only the prefix has moved",
    changed == {"prefix_encoder.embedding.weight"},
)
print(f"trained: {count(tuned.prefix_encoder):,} numbers of {count(tuned):,}")
tuned(ask(lines[:4]))[:, -1].square().sum().backward()
got_one = {name for name, weight in tuned.named_parameters() if weight.grad is not None}
confirm("only the prefix gets a gradient", got_one == changed)
by_layer = tuned.prefix_encoder.embedding.weight.grad.unflatten(-1, (2, -1))
confirm("in every layer", (by_layer.abs().sum(dim=(0, 2)) > 0).all())

# %% [markdown]
# Why `=` and `the`? Because the base has written them often. `[MASK]` and `[gMASK]` it
# has never written. Take these as the two answers, from the same start and for as many
# steps:

# %%
torch.manual_seed(2)
strange = with_prefix(base, prefix_len=8)
odd_losses = teach(strange, torch.where(is_code, MASK, GMASK))
confirm(
    "with words that the base never writes, the loss ends more than half as high again",
    sum(odd_losses[-10:]) > 1.5 * sum(losses[-10:]),
)

# %% [markdown]
# A prefix steers a frozen model most easily among the things that it is used to saying.
# Choose answers that it knows how to give.
#
# Where does the trained prefix act? The mass of {eq}`eq-prefix-lambda` can be read off
# for every head and word; {numref}`fig-prefix-mass` does so for one line. With all scores
# alike, the 8 columns of the prefix would get about two fifths. Training opens some
# gates and shuts others, and which word opens a gate differs from head to head.

# %% mystnb={"image": {"alt": "Two tables of colours, before and after training. Each has a row for each of the four heads of two layers, and a column for each word of the prompt: self . path = os . path . join ( and then gMASK and sop. A colour bar below goes from blue, no attention for the prefix, to yellow, all of it. Before training most cells are of middling grey. After it, many are bright yellow and some a darker blue, and most rows hold both."}, "figure": {"name": "fig-prefix-mass", "caption": "How much of its attention each word (columns) gives to the prefix, in each head (rows): none is blue, all is yellow. The answer is read off the last column."}} tags=["hide-input"]
sample = words("self.path = os.path.join(")
prompt_words = [*sample, "[gMASK]", "<sop>"]
prompt = torch.tensor([[index.get(word, UNK) for word in prompt_words]])
mass = figures.mass_data(untrained, tuned, prompt, prompt_words)
figures.draw_mass(mass)

# %%
was, now = (figures.prefix_mass(m, ask(lines[:held_out])) for m in (untrained, tuned))
confirm(
    "on all lines held out, the prefix gets more than before", now.mean() > was.mean()
)
turn = (now - was)[..., -1].mean(dim=0)  # of <sop>, (layers, N)
confirm("some gate of <sop> has opened by more than a tenth", turn.max() > 0.1)
confirm("another has shut by more than a twentieth", turn.min() < -0.05)
widest = mass.after.argmax(dim=-1)
confirm("not every head opens most for the same word", len(widest.unique()) > 1)

# %% [markdown]
# ## One base, two tasks, one batch
#
# A second prefix, on the same base: *does the line have an opening bracket?* Answer `.`
# for yes and `,` for no. A prefix is a cache, and each row of a batch has its own. So
# one call can serve both tasks, with one copy of the model in memory.

# %%
torch.manual_seed(3)
brackets = torch.where((lines == index["("]).any(dim=1), index["."], index[","])
other = with_prefix(base, prefix_len=8)
_ = teach(other, brackets, steps=150)
most_frequent = brackets.bincount().max() / len(brackets)
confirm(
    "the second prefix beats the best guess by more than a tenth",
    accuracy(other, brackets) > most_frequent + 0.1,
)

with torch.no_grad():
    cache = tuned.new_cache(2, 12)
    for layer, second in zip(cache, other.new_cache(2, 12), strict=True):
        layer.keys[1], layer.values[1] = second.keys[1], second.values[1]
    mixed = tuned(prompt.expand(2, -1), cache)
    confirm("row 0 is the first task's", same(mixed[:1], tuned(prompt)))
    confirm("row 1 is the second task's", same(mixed[1:], other(prompt)))
    confirm("and they differ", not same(mixed[0], mixed[1]))

# %% [markdown]
# ## The ladder of equality
#
# The loops, `attend` and the gate agreed above. The last rung is the original: a seeded
# model of three layers with a prefix of five, with the projection and without. Its
# prefix, logits, loss, cache and gradients; its steps with a growing cache, on a
# left-padded batch; and the ids that it generates.

# %%
original = golden("prefix")
golden_ids, forced = golden("ids"), golden("model_fp32")["forced_tokens"]


def prefix_model(projection):
    """Build the model that the original's tensors came from, and map its names."""
    sizes = {"pre_seq_len": 5, "prefix_projection": projection}
    model = ChatGLM(ChatGLMConfig.from_hf(golden_config() | sizes)).eval()
    names = names_by_layer(model, HF_NAMES)
    start = f"proj_{projection}/weights/"
    trained = {name.removeprefix(start): x for name, x in original.items()}
    stored = [p for p in (golden("weights") | trained).items() if p[0] in names]
    assign_strictly(model, rename(stored, names), torch.float32)
    return model, {ours: theirs for theirs, ours in names.items()}


def theirs_first(x):
    return x.permute(2, 0, 1, 3)  # (B, N, S, H) to the original's (S, B, N, H)


tokens, labels = (golden_ids[f"gmask_train/{x}"] for x in ("input_ids", "labels"))
padded, hidden, stand = (
    golden_ids[f"batch_leftpad/{x}"]
    for x in ("input_ids", "tokenizer_attention_mask", "tokenizer_position_ids")
)
for projection in (False, True):
    model, theirs = prefix_model(projection)
    wanted = {
        name.removeprefix(f"proj_{projection}/"): tensor
        for name, tensor in original.items()
        if name.startswith(f"proj_{projection}/")
    }
    print("with the projection" if projection else "without projection")
    made = [torch.stack([*map(theirs_first, pair)]) for pair in model.prefix_encoder(2)]
    confirm("get_prompt", same(torch.stack(made), wanted["get_prompt"]))

    cache = model.new_cache(*tokens.shape)
    logits = model(tokens, cache)
    loss = next_token_loss(logits, labels)
    confirm("logits", same(logits, wanted["gmask_train/logits"]))
    confirm("loss", same(loss, wanted["gmask_train/loss"]))
    keys = theirs_first(cache[0].keys)
    confirm("keys in the cache", same(keys, wanted["gmask_train/past.0.key"]))

    loss.backward()
    gradients = {n: w.grad for n, w in model.named_parameters() if w.grad is not None}
    agree = [
        torch.allclose(found, wanted[f"grad/{theirs[name]}"], rtol=1e-3, atol=1e-5)
        for name, found in gradients.items()
    ]
    confirm(f"gradients of all {len(agree)} trained tensors", all(agree))
    confirm("and no others", len(agree) == sum("grad/" in name for name in wanted))

    with torch.no_grad():
        cache = model.new_cache(3, padded.shape[1] + forced.shape[1])
        logits = model(padded, cache, positions=stand, mask=~hidden)
        confirm(
            "logits of a padded batch",
            same(logits, wanted["batch_leftpad_tokenizer/logits"]),
        )
        steps = [logits[:, -1]]
        steps += [model(token[:, None], cache)[:, -1] for token in forced.T]
    confirm("every step", same(torch.stack(steps, 1), wanted["forced_step_logits"]))
    written = generate(model, wanted["greedy_input_ids"], max_new_tokens=8)
    confirm("generated ids\n", torch.equal(written, wanted["greedy_ids"]))

# %% [markdown]
# :::{admonition} Paper and code
# :class: paper-code
# **Only the prefix learns.** Commented copies of `modeling_chatglm.py` say of this part
# that it only encodes, without back-propagation. It is the other way round: the loop
# beside the comment freezes everything *else*, and the prefix encoder, made right after
# it, is the one part that is trained.
#
# **Almost only.** The original freezes inside `ChatGLMModel`, before the class around it
# makes `lm_head`. A head with a matrix of its own thus stays trainable. In the released
# model nobody notices, since `from_pretrained` ties the head to the embedding, which is
# frozen. This package freezes the head in both cases.
#
# **Words, not classes.** The paper puts a new linear classifier on top, and calls
# the projection useful for some tasks only {cite:p}`liu2021` (section 3). ChatGLM-6B
# answers in words from its own head, and the projection is off by default.
# :::

# %%
meta = json.loads((GOLDEN / "meta.json").read_text("utf-8"))
confirm(
    "untied, the original leaves one tensor of the base trainable: the head",
    meta["requires_grad_with_prefix"] == ["lm_head.weight"],
)
frozen = nn.Embedding(6, 4).requires_grad_(False)
head = nn.Linear(4, 6, bias=False)
confirm("a new head can be trained", head.weight.requires_grad)
head.weight = frozen.weight
confirm("tied to a frozen embedding, it cannot", not head.weight.requires_grad)
learning = {n for n, weight in model.named_parameters() if weight.requires_grad}
confirm(
    "here, untied, all that learns is the prefix encoder",
    all(name.startswith("prefix_encoder.") for name in learning),
)
config = ChatGLMConfig.from_hf(golden_config() | {"pre_seq_len": 5})
confirm("the projection is off unless asked for", config.prefix_projection is False)

# %% [markdown]
# :::{admonition} Break it
# :class: break-it
# Two ways to serve a good prefix badly. First let it push the tokens on, as a cache
# does in other models. Then forget `eval()`: in training, a tenth of the prefix is
# dropped at random, anew for every call.
# :::

# %%
model, _ = prefix_model(projection=False)
wanted = original["proj_False/gmask_train/logits"]
at = golden_ids["gmask_train/get_position_ids_2d"]
pushed = at + torch.tensor([[5], [0]])
with torch.no_grad():
    confirm("where they stand, tokens agree", same(model(tokens, positions=at), wanted))
    wrong = model(tokens, positions=pushed)
    confirm("pushed on by five: no error", wrong.shape == wanted.shape)
    confirm("but other logits", (wrong - wanted).abs().max() > 0.01)

    model.train()
    one, two = model(tokens), model(tokens)
    confirm("without eval(), one question has two answers", not same(one, two))
    model.eval()
    confirm("with it, one", torch.equal(model(tokens), model(tokens)))

# %% [markdown]
# The push has changed no distance between tokens. Only the prefix is five further away
# than it was in training, and nothing says so.
#
# ## Exercises
#
# Write your function in a cell of your own and give it to `check`. A question takes its
# name and a letter: `check("a_zero_prefix", "a")`.

# %%
from annotated_src.exercises import check  # noqa: F401 - for your cells
from annotated_src.exercises.prefix_tuning import chapter as exercises

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("fold_prefix")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("fold_prefix")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
# Folding brings an encoder of 3 layers down to its table. Fold it by calling the encoder
# instead, while it is still in training mode, and one draw of dropout is frozen into the
# table: a tenth of it zero, and the rest too large by 1 / 0.9.
fold_prefix = exercises["fold_prefix"].solution
big = PrefixEncoder(64, num_layers=3, num_heads=4, head_dim=8, projection=True)
small = PrefixEncoder(64, num_layers=3, num_heads=4, head_dim=8, projection=False)
with torch.no_grad():
    table = fold_prefix(big.state_dict())
    small.embedding.weight.copy_(table)
    pairs = list(zip(big.eval()(2), small.eval()(2), strict=True))
    in_training = torch.stack([torch.stack(pair) for pair in big.train()(1)])
confirm(
    "the folded prefix is the same, in every layer",
    all(same(x, y) for a, b in pairs for x, y in zip(a, b, strict=True)),
)
print(f"{count(big):,} numbers folded into {count(small):,}")
made = in_training[:, :, 0].permute(3, 0, 1, 2, 4).flatten(1)  # (P, L * 2 * N * H)
zeros = (made == 0).float().mean()
confirm("in training, about a tenth is exactly zero", 0.08 < zeros < 0.12)
confirm("the rest is too large", same(made[made != 0] * 0.9, table[made != 0]))

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("a_zero_prefix")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("a_zero_prefix")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
low = torch.tensor([-9.0, -8.0, -10.0], dtype=F64)
lam = 1 / (1 + low.exp().sum())
with_zero = torch.cat((torch.zeros(1, dtype=F64), low)).softmax(0)[1:]
confirm(
    "the weights shrink by 1 - lambda",
    torch.allclose(with_zero, (1 - lam) * low.softmax(0)),
)
confirm("and together come to less than 0.001", with_zero.sum() < 0.001)
high = torch.tensor([9.0, -8.0, -10.0], dtype=F64)
confirm("one high score, and lambda is near 0", 1 / (1 + high.exp().sum()) < 0.001)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("prefix_gate")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("prefix_gate")

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("attend_behind_prefix")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("attend_behind_prefix")

# %% [markdown]
# ## What to remember
#
# - A prefix is a cache that no text has filled: keys and values in every layer, found by
#   training. The base does not change by a bit.
# - For a head it is a learned vector, mixed in through a gate:
#   $o = \lambda\, o_P + (1 - \lambda)\, o_T$. It cannot make the head prefer another
#   token; the layers above can.
# - Its keys are not turned, so all of it stands at place 0, in no order. Tokens keep
#   their positions.
# - Every text is a prefix. Few prefixes are a text.
# - 128 prefix tokens are 0.48 % of ChatGLM-6B, 56 MiB a task. Rows of one batch may have
#   different ones.
# - Dropout is part of it: `eval()` before you serve, fold or compare.
#
# ## Where to read on
#
# - {cite:t}`liu2021`: section 3 is the method; {cite:t}`li2021`: prefix tuning, where the
#   projection comes from; {cite:t}`he2022`: the gate. Petrov, Torr and Bibi, *When Do
#   Prompting and Prefix-Tuning Work?* (2024): what follows from {eq}`eq-prefix-ratio`.
# - ChatGLM-6B, `modeling_chatglm.py`: `PrefixEncoder`; in `ChatGLMModel`, the end of
#   `__init__` (what is frozen), `get_prompt`, and in `forward` the lines that begin with
#   `if past_key_values is None` and make `prefix_attention_mask`.
# - THUDM/ChatGLM-6B, `ptuning/main.py`: the model is halved, or quantised, and its
#   `prefix_encoder` alone set back to float32.
# - Here: {ref}`ch-prefix-mask`, for another prefix: the context, which is text.
#   {ref}`ch-chatglm` puts the model together.
