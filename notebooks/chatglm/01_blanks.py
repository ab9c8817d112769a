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
# (ch-blanks)=
# # Blank infilling and two positions
#
# :::{admonition} In this chapter
# :class: at-a-glance
# **40 minutes · easy, with one new idea.** Afterwards you can turn any text into a
# training example of ChatGLM-6B, give every token its two positions by hand, say why
# one number would not do, and tell which blank the model fills when there are several.
# :::

# %% tags=["remove-input"]
from annotated_src.figures.model_map import ChatGLMMap

ChatGLMMap("positions")

# %% [markdown]
# :::{admonition} Predict before you run
# :class: predict
# You ask ChatGLM-6B something in 100 tokens, and it answers in 500. In Llama, the last
# token of the answer would stand at about position 600. ChatGLM-6B also numbers each
# token by its *place in the text*. Which place does the last token of the answer get:
# about 600, 500 or 100?
# :::

# %%
import json
from functools import partial

import torch

from annotated_src.blank_infilling import draw_example, mask_rest, mask_span, pad_right
from annotated_src.figures import blanks as figures
from annotated_src.golden import GOLDEN, golden, golden_config, golden_model
from annotated_src.loss import IGNORE, next_token_loss
from annotated_src.positions import (
    BlankIds,
    blank_positions,
    context_lengths,
    mask_positions,
    prompt_positions,
)
from annotated_src.show import confirm, show

# %% [markdown]
# ## Learning to fill a blank
#
# Llama learns to continue. It sees what comes before a word and never what comes after.
# GLM {cite:p}`du2022`, the family that ChatGLM-6B belongs to, learns to **fill a
# blank**. Take a text and cut a few words out, the *span*:
#
# > she opened **the door** and left
#
# In their place stands a single token, `[MASK]`. What remains is the *context*, and the
# model may read it in both directions, so that "and left" can help. Behind the context
# comes the *answer*, word by word: `<sop>`, start of piece, opens it, and `<eop>`, end
# of piece, closes it.
#
# > she opened `[MASK]` and left `<sop>` **the door** `<eop>`
#
# So a text with a hole in the middle has become a text to be continued at its end,
# which a decoder can do. Each token gets two numbers: its **place**, and its **step**
# in the answer. And the answer, from `<sop>` on, gets *labels*: the loss asks for them.
# As plain loops:


# %%
def blank_loops(words, start, end):
    """Rows of token, place, step and label; nothing is asked where the label is None."""
    rows = []
    context = [*words[:start], "[MASK]", *words[end:]]
    for place, word in enumerate(context):
        rows.append((word, place, 0, None))
    for i, word in enumerate(["<sop>", *words[start:end], "<eop>"]):
        rows.append((word, start, 1 + i, word))  # all of them where [MASK] stands
    return rows


words = ["she", "opened", "the", "door", "and", "left"]
rows = blank_loops(words, 2, 4)
print("token     place  step   label   the logits here are asked for")
for t, (word, place, step, label) in enumerate(rows):
    asked_for = rows[t + 1][3] if t + 1 < len(rows) else None
    line = f"{word:10}{place:5}{step:6}   {label or '·':8}{asked_for or '·'}"
    print(line)

# %% [markdown]
# Read the table from the right. The logits at a token are scores for the *next* one
# ({ref}`ch-reading`), so the last column is the label column moved up by one: at `<sop>`
# the model must say "the", at "door" it must say `<eop>`, or it would never stop. The
# labels themselves are not shifted. They are the ids of the tokens, and the loss shifts
# them.
#
# Now look at the places. All of the answer, four tokens, stands at place 2.
#
# The package does the same with ids. Ours are four special ones and a number for each
# word:

# %%
SPECIAL = ["<sop>", "[gMASK]", "[MASK]", "<eop>"]
VOCABULARY = SPECIAL + words
ids, eop = BlankIds(sop=0, gmask=1, mask=2), 3
text = [VOCABULARY.index(word) for word in words]


def in_words(token_ids):
    return [VOCABULARY[i] if i != IGNORE else None for i in token_ids.tolist()]


def package_rows(example):
    places, steps = prompt_positions(example.tokens[None], ids, rows=2)[0].tolist()
    tokens, labels = in_words(example.tokens), in_words(example.labels)
    return list(zip(tokens, places, steps, labels, strict=True))


spans = [(start, end) for end in range(1, 7) for start in range(end)]
confirm(
    f"the loops are the package, for all {len(spans)} spans of the sentence",
    all(
        blank_loops(words, start, end)
        == package_rows(mask_span(text, start, end, ids, eop))
        for start, end in spans
    ),
)

# %%
show(mask_span)

# %% [markdown]
# How long is an example? A text of $n$ tokens with a span of $\ell$ cut out leaves a
# context of $c = n - \ell + 1$, since `[MASK]` takes the span's place. The answer is the
# span and two more. Their sum,
#
# $$
# T = \underbrace{(n - \ell + 1)}_{\text{context}}
#   + \underbrace{(\ell + 2)}_{\text{answer}} = n + 3 ,
# $$ (eq-blanks-length)
#
# does not depend on $\ell$: blanks of any size make batches of one size.

# %%
# Check eq-blanks-length.
lengths = []
for start, end in spans:
    tokens = mask_span(text, start, end, ids, eop).tokens
    lengths.append((context_lengths(tokens[None], ids.sop).item(), len(tokens)))
n = len(text)
confirm(
    "c = n - l + 1 and T = n + 3, for every span",
    lengths == [(n - (end - start) + 1, n + 3) for start, end in spans],
)

# %% [markdown]
# ## Or the rest of the text
#
# A blank may also be at the end: keep a beginning, and ask for all that follows. That
# is what you do when you chat. The token for it is `[gMASK]`. The difference is not in
# the mechanism but in what the model was taught to put there: something short for
# `[MASK]`, something long for `[gMASK]` {cite:p}`zeng2022`.

# %%
for word, place, step, label in package_rows(mask_rest(text, 3, ids, eop)):
    print(f"{word:10}{place:5}{step:6}   {label or '·'}")

# %% mystnb={"image": {"alt": "Two columns of two staircases each. Left, she opened [MASK] and left, then the answer: the place climbs from 0 to 4 and falls back to 2, where it stays for the four tokens of the answer; the step is 0 five times, then climbs 1, 2, 3, 4. Right, she opened the [gMASK], then the answer: the place climbs from 0 to 3 and stays at 3; the step is 0 four times, then climbs 1 to 5."}, "figure": {"name": "fig-blanks-ids", "caption": "Two clocks for one sentence; the answer is shaded. While one of them runs, the other stands still."}} tags=["hide-input"]
figures.draw_ids(figures.ids_data())

# %% [markdown]
# With $c$ tokens of context and the mask token at index $m$, token $t$ has the numbers
#
# $$
# \text{place}_t = \begin{cases} t & t < c \\ m & t \ge c \end{cases}
# \qquad
# \text{step}_t = \max(0,\; t - c + 1) .
# $$ (eq-blanks-ids)
#
# There is no case for `[gMASK]`. Its answer stands at the end anyway, and places could
# simply have counted on. They do not: one rule for both, and the place stands still
# ({numref}`fig-blanks-ids`).

# %%
# Check eq-blanks-ids.
index = torch.arange(9)
for example in (mask_span(text, 2, 4, ids, eop), mask_rest(text, 3, ids, eop)):
    tokens = example.tokens
    c = tokens.tolist().index(ids.sop)
    m = next(t for t, token in enumerate(tokens) if token in (ids.mask, ids.gmask))
    place, step = torch.where(index < c, index, m), (index - c + 1).clamp(min=0)
    confirm(
        f"c = {c}, m = {m}: place and step as in the formula",
        torch.equal(
            torch.stack((place, step))[None], prompt_positions(tokens[None], ids, 2)
        ),
    )

chat = torch.tensor([[4] * 100 + [ids.gmask, ids.sop] + [5] * 499 + [eop]])
place, step = prompt_positions(chat, ids, rows=2)[0]
print("the last of 602 tokens: place", place[-1].item(), "and step", step[-1].item())
confirm(
    "no clock of this chat ever shows more than 501",
    max(place.max(), step.max()) == 501,
)

# %% [markdown]
# That answers the prediction: 100, the index of `[gMASK]`. Every token of the answer has
# this place. What tells them apart is the step.
#
# ## Why two numbers
#
# She opened *it*, *the door*, *a very old box*: they all fit. Whoever fills the blank
# must not know beforehand how long it is, because you will not know either when you
# ask. That is harder than it sounds. Here are four ways to number tokens with *one*
# number, written down for the words alone. The context has `rest` words and `[MASK]` at
# index `start`.


# %%
def original(rest, start, length):  # every word keeps the place that it had
    behind = [start + length + i for i in range(rest - start)]
    answer = [start + j for j in range(length)]
    return [*range(start), start, *behind], answer


def counting_on(rest, start, length):  # Llama's way: the answer is behind the context
    return list(range(rest + 1)), [rest + 1 + j for j in range(length)]


def at_the_mask(rest, start, length):  # the answer is where [MASK] is
    return list(range(rest + 1)), [start] * length


def from_the_mask(rest, start, length):  # it begins there and counts
    return list(range(rest + 1)), [start + j for j in range(length)]


def two_numbers(rest, start, length):  # place and step; <sop> has step 1
    return [(i, 0) for i in range(rest + 1)], [(start, 2 + j) for j in range(length)]


# %% [markdown]
# And this is what one should ask of such a scheme. Tried on all contexts of up to 6
# words, with answers of up to 6:


# %%
def blind(scheme):
    """A longer answer changes no number that was there before."""
    pairs = [(scheme(*at, n), scheme(*at, n + 1)) for at in BLANKS for n in range(1, 6)]
    return all(a[0] == b[0] and a[1] == b[1][:-1] for a, b in pairs)


def placed(scheme):
    """Blanks at different places give their answers different numbers."""
    answers = [scheme(*at, 1)[1][0] for at in BLANKS if at[0] == 6]
    return len(set(answers)) == len(answers)


def ordered(scheme):
    """No two words of an answer have the same number."""
    answers = [scheme(*at, 6)[1] for at in BLANKS]
    return all(len(set(answer)) == 6 for answer in answers)


def apart(scheme):
    """No word of the answer has the number of a word of the context."""
    for rest, start in BLANKS:
        context, answer = scheme(rest, start, 6)
        others = context[:start] + context[start + 1 :]  # without [MASK]
        if set(answer) & set(others):
            return False
    return True


BLANKS = [(rest, start) for rest in range(7) for start in range(rest + 1)]
schemes = (original, counting_on, at_the_mask, from_the_mask, two_numbers)
demands = (blind, placed, ordered, apart)
print(f"{'':14}" + "".join(f"{d.__name__:>9}" for d in demands))
verdicts = [[demand(scheme) for demand in demands] for scheme in schemes]
for scheme, verdict in zip(schemes, verdicts, strict=True):
    marks = "".join(f"{'yes' if good else 'NO':>9}" for good in verdict)
    print(f"{scheme.__name__:14}{marks}")
confirm(
    "each way of one number fails one demand, and each another one",
    verdicts[:4] == (~torch.eye(4, dtype=torch.bool)).tolist(),
)
confirm("two numbers meet all four", all(verdicts[4]))

# %% [markdown]
# With the original places, the context itself is torn apart, and one subtraction reads
# off how many words are missing, before the first is written. With two numbers the
# context lies still, and the answer rises out of its blank like a tower
# ({numref}`fig-blanks-leak`).

# %% mystnb={"image": {"alt": "The blank in 'she opened ... and left' filled by it, by the door, and by a very old box. Above, with original places, 'and left' stands at 3 and 4, then at 4 and 5, then at 6 and 7. Below, the words she, opened, [MASK], and, left stand at 0 to 4 in all three pictures; on [MASK] at place 2 stands a tower of bricks, from <sop> through the words of the answer to <eop>: 3, 4 and 6 bricks high."}, "figure": {"name": "fig-blanks-leak", "caption": "Three answers to one blank. Above, the words keep their original places, and the context says how long the answer will be. Below, place across and step upwards: the ground is the same three times."}} tags=["hide-input"]
figures.draw_leak(figures.leak_data())

# %% [markdown]
# Could one number do, of a more cunning kind? Take place + 1000 step. It meets all four
# demands, but it is two numbers in one coat. And it spoils what RoPE wants of a number,
# that near means near: two neighbours in an answer would be 1000 apart.

# %%
told = [
    original(rest, start, n)[0][-1] - rest + 1 == n
    for rest, start in BLANKS
    if start < rest
    for n in range(1, 7)
]
confirm("original places: one subtraction tells the length", all(told))

the_same = []
for rest, start in BLANKS:
    context, answer = two_numbers(rest, start, 6)
    c, m = torch.tensor([rest + 1]), torch.tensor([start])
    pairs = blank_positions(c, m, rest + 8)[0].T.tolist()
    the_same.append(pairs == [list(pair) for pair in (*context, (start, 1), *answer)])
confirm("two_numbers is the package's rule", all(the_same))


def packed(rest, start, length):
    return tuple(
        [place + 1000 * step for place, step in numbers]
        for numbers in two_numbers(rest, start, length)
    )


confirm(
    "place + 1000 step meets all four as well",
    all(demand(packed) for demand in demands),
)

# %% [markdown]
# Does a model notice? Here is one: the original's architecture with small random
# weights, the model that the golden tensors of this part come from. It gets one context
# with two answers, of 1 and of 4 words, and we compare the logits at `<sop>`, where the
# first word is chosen.

# %%
model, settings = golden_model(), golden_config()
G = model.config.blank_ids  # its special ids
G_EOP, G_PAD = settings["eos_token_id"], settings["pad_token_id"]
close = partial(torch.allclose, rtol=0, atol=1e-4)  # meta.json's tolerance

answers = ([50], [60, 61, 62, 63])
examples = [
    mask_span([10, 11, *answer, 12, 13], 2, 2 + len(answer), G, G_EOP)
    for answer in answers
]
at_sop = 5  # five tokens of context before it
first_word = [model(e.tokens[None])[0, at_sop] for e in examples]
confirm("place and step: the same logits for both lengths", close(*first_word))

leaky = []
for example, answer in zip(examples, answers, strict=True):
    positions = prompt_positions(example.tokens[None], G, rows=2).clone()
    context, places = original(4, 2, len(answer))
    positions[0, 0] = torch.tensor([*context, 2, *places, places[-1] + 1])
    leaky.append(model(example.tokens[None], positions=positions)[0, at_sop])
difference = (leaky[0] - leaky[1]).abs().max()
confirm("original places: these logits depend on the length", difference > 0.01)

# %% [markdown]
# What does a model *do* with two numbers? It turns one half of each head by the place
# and the other half by the step, as {ref}`ch-rope` does with one number. That is
# {ref}`ch-rope-2d`.
#
# ## The annotated source
#
# Three questions to the ids: where does the answer begin, which blank does it fill,
# and what follows for each token?

# %%
show(context_lengths, mask_positions, blank_positions, prompt_positions)

# %% [markdown]
# ## Where the answer begins
#
# The context ends before the first `<sop>`, and $c$ is simply its index. So a second
# `<sop>` is a word like any other, and padding on the left counts.

# %%
ids_of = golden("ids")
twice = ids_of["double_bos/input_ids"]
print("tokens", twice[0].tolist(), "with <sop>", G.sop)
print("steps ", prompt_positions(twice, G, rows=2)[0, 1].tolist())
confirm(
    "a second <sop> is a word like any other",
    prompt_positions(twice, G, 2)[0, 1, -1] == 5,
)

padded, both = (
    ids_of[f"batch_leftpad/{x}"] for x in ("input_ids", "tokenizer_position_ids")
)
print("\nids      ", padded[1].tolist(), "with padding", G_PAD)
print("model    ", prompt_positions(padded, G, rows=2)[1, 0].tolist())
print("tokenizer", both[1, 0].tolist())
confirm("padding on the left counts: c = 8", context_lengths(padded, G.sop)[1] == 8)

for wrong, what in (([[7, G.mask, 8]], "no <sop>"), ([[7, 8, G.sop]], "no blank")):
    try:
        prompt_positions(torch.tensor(wrong), G, rows=2)
    except ValueError as error:
        print(f"{what}: {error}")

# %% [markdown]
# The model counts padding as text: the four pads move everything four places to the
# right. The tokenizer knows better. It gives pads place 0 and starts counting behind
# them, and the model takes the tokenizer's positions if it gets them. Whether the
# difference does any harm, {ref}`ch-prefix-mask` measures.
#
# ## Which blank?
#
# One sentence may have several mask tokens. ChatGLM-6B fills one blank, the first of
# the preferred kind. Which kind is preferred depends on whom you ask.

# %%
names = {G.mask: "[MASK]", G.gmask: "[gMASK]"}
as_original = []
print("mask tokens, at index    model fills  tokenizer")
for case in ("double_mask", "both_tokens", "gmask_before_mask"):
    tokens = ids_of[f"{case}/input_ids"]
    found = [f"{names[i]} {t}" for t, i in enumerate(tokens[0].tolist()) if i in names]
    by_model = mask_positions(tokens, G.gmask, G.mask)
    by_tokenizer = mask_positions(tokens, G.mask, G.gmask)
    print(f"{', '.join(found):25}{by_model.item():6}{by_tokenizer.item():13}")
    as_original += [
        torch.equal(by_model, ids_of[f"{case}/mask_positions"]),
        by_tokenizer == ids_of[f"{case}/tokenizer_position_ids"][0, 0, -1],
    ]
confirm("all as in the original", all(as_original))

# %% [markdown]
# The model (`ChatGLMModel.forward`) looks for `[gMASK]` first, the tokenizer
# (`ChatGLMTokenizer._pad`) for `[MASK]`. This is no rare case. The tokenizer ends
# *every* prompt with `[gMASK] <sop>`, also one in which you wrote `[MASK]`:

# %%
# What the original tokenizer made of "Fill in: [MASK] is the capital.", with a small
# vocabulary.
RECORD = json.loads((GOLDEN / "tokenizer.json").read_text("utf-8"))
T = BlankIds(*(RECORD["ids"][name] for name in ("<sop>", "[gMASK]", "[MASK]")))
asked = torch.tensor([RECORD["batch"]["input_ids"][2]])
padding = (asked == RECORD["ids"]["<pad>"]).sum().item()
asked = asked[:, padding:]
print(RECORD["batch"]["texts"][2])
print(
    "ids       ",
    asked[0].tolist(),
    "\n[MASK] is",
    T.mask,
    "and [gMASK] <sop>",
    T[1::-1],
)
theirs = torch.tensor(RECORD["batch"]["position_ids"][2])[:, padding:]
chosen = mask_positions(asked, T.mask, T.gmask)
by_tokenizer = blank_positions(context_lengths(asked, T.sop), chosen, asked.shape[1])
by_model = prompt_positions(asked, T, rows=2)
confirm("the tokenizer's positions", torch.equal(by_tokenizer[0], theirs))
print("<sop> at place", by_tokenizer[0, 0, -1].item(), "says the tokenizer,", end=" ")
print(by_model[0, 0, -1].item(), "says the model")

asked = torch.tensor([[10, 11, G.mask, 12, 13, G.gmask, G.sop]])  # now for our model
chosen = mask_positions(asked, G.mask, G.gmask)
by_tokenizer = blank_positions(context_lengths(asked, G.sop), chosen, asked.shape[1])
logits = [model(asked)[0, -1], model(asked, positions=by_tokenizer)[0, -1]]
difference = (logits[0] - logits[1]).abs().max()
confirm("the logits of its first word are others", difference > 0.01)

# %% [markdown]
# So with the tokenizer's positions the answer stands in your blank. With the very same
# ids and no positions, it stands at the end of the text. Nothing warns you.
#
# ## Drawing blanks
#
# Which spans should be cut? {cite:t}`du2022` draw short spans with lengths from a
# Poisson distribution of mean 3, until 15% of the text is out; for longer answers, whole
# sentences, or one span of 50 to 100% of the text. The package tosses a coin between
# one short blank and the rest of the text.

# %%
generator = torch.Generator().manual_seed(0)
long_text = list(range(100, 140))
drawn = [draw_example(long_text, ids, eop, generator) for _ in range(2000)]
is_rest = torch.tensor([ids.gmask in e.tokens for e in drawn])
length = torch.tensor([(e.labels != IGNORE).sum() - 2 for e in drawn]).double()
confirm("about half have [gMASK]", 0.45 < is_rest.double().mean() < 0.55)
confirm("these ask for half of the text or more", length[is_rest].min() >= 20)
# Poisson of mean 3, given that it is not 0: the mean is 3 / (1 - e^-3) = 3.16
confirm("the others for about 3 tokens", 2.95 < length[~is_rest].mean() < 3.35)
confirm("all examples have 43 tokens", {len(e.tokens) for e in drawn} == {43})

# %% [markdown]
# ## What is asked: the loss
#
# Labels are the ids themselves from `<sop>` on, and $-100$ (`IGNORE`) in the context.
# The loss shifts them and takes the mean surprise at those that count:
#
# $$
# L = -\frac{1}{|A|} \sum_{t \in A} \log p(y_{t+1} \mid x_0 \dots x_t),
# \qquad A = \{\, t : y_{t+1} \ne -100 \,\} .
# $$ (eq-blanks-loss)
#
# A span of $\ell$ tokens has $|A| = \ell + 2$: one of them is asked of the last context
# token, which must say `<sop>`.

# %%
# Check eq-blanks-loss.
outputs = golden("model_fp32")
for case in ("gmask_train", "mask_train"):
    labels = ids_of[f"{case}/labels"]
    logits = outputs[f"{case}/logits"].double()
    log_p = logits[0].log_softmax(dim=-1)
    asked_at = [t for t in range(labels.shape[1] - 1) if labels[0, t + 1] != IGNORE]
    formula = -sum(log_p[t, labels[0, t + 1]] for t in asked_at) / len(asked_at)
    span = labels.shape[1] - asked_at[0] - 3
    confirm(
        f"{case}: a span of {span} has {span + 2} questions", len(asked_at) == span + 2
    )
    loss = next_token_loss(logits, labels)
    confirm("the formula is next_token_loss", torch.allclose(formula, loss, atol=1e-6))
    confirm(
        "and what the original computed", close(loss.float(), outputs[f"{case}/loss"])
    )

# %% [markdown]
# ## One token at a time
#
# When it writes, the model feeds one token per step ({ref}`ch-cache`), and its ids no
# longer tell it where it is. With $s$ tokens in all, the newest included, its numbers
# are
#
# $$
# (m,\; s - c) ,
# $$ (eq-blanks-step)
#
# which is {eq}`eq-blanks-ids` for $t = s - 1$. The original reads $m$ and $c$ off the ids
# again. If it was given positions, as the tokenizer does, it takes the last column
# instead and adds one to its step: the same pair.

# %%
# Check eq-blanks-step.
for kind, prompt_length in (("gmask", 7), ("mask", 9)):
    tokens, case = ids_of[f"{kind}_train/input_ids"], f"incremental_{kind}"
    c = context_lengths(tokens, G.sop).item()
    m = mask_positions(tokens, G.gmask, G.mask).item()
    sizes_so_far = range(prompt_length + 1, tokens.shape[1] + 1)
    steps = torch.tensor([[m, s - c] for s in sizes_so_far]).T[None]
    print(f"[{'g' * (kind == 'gmask')}MASK]", steps[0].tolist())
    confirm(
        "as prepare_inputs_for_generation has them",
        torch.equal(steps, outputs[f"{case}/step_position_ids"]),
    )
    confirm(
        "as the forward pass has them",
        torch.equal(steps, prompt_positions(tokens, G, rows=2)[..., prompt_length:]),
    )

    cache = model.new_cache(1, tokens.shape[1])
    logits = [model(tokens[:, :prompt_length], cache)[:, -1]]
    logits += [
        model(tokens[:, t, None], cache)[:, -1]
        for t in range(prompt_length, tokens.shape[1])
    ]
    confirm(
        "decoding with our cache gives the original's logits",
        close(torch.stack(logits, dim=1), outputs[f"{case}/step_logits"]),
    )

traced = golden("generation")
last = traced["greedy_batch_tokenizer/position_ids"][..., -1:]
confirm(
    "given positions: the last column, with i added to its step",
    all(
        torch.equal(
            traced[f"trace/step{i}/position_ids"], last + torch.tensor([[0], [i]])
        )
        for i in (1, 2, 3)
    ),
)

# %% [markdown]
# ## One row
#
# The original has a switch, `position_encoding_2d=False`, that leaves the steps out.
# It then treats the two kinds differently: the place stands still for `[MASK]` and
# counts on for `[gMASK]`. These are `at_the_mask` and `counting_on` from above, each
# with its fault. (Its single step has a fault of its own: {ref}`ch-errata`.)

# %%
for case in ("mask_train", "gmask_train"):
    tokens = ids_of[f"{case}/input_ids"]
    print(f"{case:12}", prompt_positions(tokens, G, rows=1)[0, 0].tolist())
confirm(
    "here the two kinds differ",
    prompt_positions(ids_of["mask_train/input_ids"], G, rows=1)[0, 0, -1] == 3
    and prompt_positions(ids_of["gmask_train/input_ids"], G, rows=1)[0, 0, -1] == 11,
)

# %% [markdown]
# ## The ladder of equality
#
# All cases of the golden ids: with padding left and right, with both mask tokens, with
# two of one, with two `<sop>`, with `<sop>` in front of everything. First the plain
# loops for a row of ids, then the package, then the original.


# %%
def loops_for_ids(row, sop, gmask, mask):
    c = row.index(sop)
    kind = gmask if gmask in row else mask
    m = row.index(kind)
    places = [t if t < c else m for t in range(len(row))]
    steps = [0 if t < c else t - c + 1 for t in range(len(row))]
    line = [t if t < c or kind == gmask else m for t in range(len(row))]
    return m, kind == gmask, [places, steps], line


checked = []
for name, tokens in ids_of.items():
    case, _, what = name.partition("/")
    if what != "input_ids":
        continue
    expected = [
        ids_of[f"{case}/{x}"]
        for x in (
            "mask_positions",
            "use_gmasks",
            "get_position_ids_2d",
            "get_position_ids_1d",
        )
    ]
    loops = [loops_for_ids(row, *G) for row in tokens.tolist()]
    package = (
        mask_positions(tokens, G.gmask, G.mask),
        (tokens == G.gmask).any(dim=-1),
        prompt_positions(tokens, G, rows=2),
        prompt_positions(tokens, G, rows=1)[:, 0],
    )
    for column, ours, theirs in zip(
        zip(*loops, strict=True), package, expected, strict=True
    ):
        looped = torch.tensor(column)
        checked.append(torch.equal(looped, theirs) and torch.equal(ours, theirs))
confirm("12 cases, 4 tensors each: loops = package = original", checked == [True] * 48)

# %% [markdown]
# The tokenizer's positions, with its own preference, and without counting padding:

# %%
checked = []
for name, theirs in ids_of.items():
    case, _, what = name.partition("/")
    if what != "tokenizer_position_ids":
        continue
    tokens = ids_of[f"{case}/input_ids"]
    padding = (tokens == G_PAD).sum(dim=-1, keepdim=True)
    c, m = context_lengths(tokens, G.sop), mask_positions(tokens, G.mask, G.gmask)
    positions = blank_positions(c, m, tokens.shape[1])
    positions[:, 0] = (positions[:, 0] - padding).clamp(min=0)
    checked.append(torch.equal(positions, theirs))
confirm("11 cases of the tokenizer's positions", checked == [True] * 11)

# %% [markdown]
# The training examples: put a text together again, cut it again, compare ids, labels and
# loss.

# %%
text_ids = [117, 132, 81, 147, 191, 125, 50, 200, 106]
tokens, labels = mask_rest(text_ids, 5, G, G_EOP)
confirm(
    "mask_rest makes the original's tokens",
    torch.equal(tokens, ids_of["gmask_train/input_ids"][0]),
)
confirm("and its labels", torch.equal(labels, ids_of["gmask_train/labels"][0]))
tokens, labels = mask_span(
    [136, 73, 39, 113, 72, 209, 134, 58, 15, 154], 3, 6, G, G_EOP
)
confirm(
    "so does mask_span",
    torch.equal(tokens, ids_of["mask_train/input_ids"][0])
    and torch.equal(labels, ids_of["mask_train/labels"][0]),
)
batch = ids_of["batch_rightpad/input_ids"]
loss = next_token_loss(model(batch), ids_of["batch_rightpad/labels"])
confirm(
    "the loss of a padded batch, through the model",
    close(loss, outputs["batch_rightpad/loss"]),
)

# %% [markdown]
# :::{admonition} Paper and code
# :class: paper-code
# **Several blanks.** The paper cuts several spans and puts the answers behind the
# context in shuffled order, each with a start token of its own and at the place of its
# own `[MASK]`. Steps begin again at 1 for each {cite:p}`du2022`. ChatGLM-6B's code knows
# one answer: places come from one mask token, steps count through.
#
# **Two numbers, used otherwise.** The paper learns a vector for each place and for each
# step and adds both to the embedding. ChatGLM-6B adds nothing; it turns
# ({ref}`ch-rope-2d`).
#
# **One question more.** In the paper nobody is asked for the start token. The recipe
# that came with ChatGLM-6B (`ptuning/main.py`) keeps `<sop>` among the labels. The
# prompt brings `<sop>` along, so what is learned there is never used; it is part of the
# mean all the same.
# :::


# %%
def paper_ids(num_words, spans, order):
    """Places and steps of several blanks; spans in the order of the text."""
    starts, taken = [], 0
    for start, end in spans:  # where each [MASK] stands in the context
        starts.append(start - taken)
        taken += end - start - 1
    places = list(range(num_words - taken))
    steps = [0] * len(places)
    for i in order:
        start, end = spans[i]
        places += [starts[i]] * (end - start + 1)  # with its start token
        steps += range(1, end - start + 2)
    return places, steps


# The paper's figure 2, where places count from 1: six words, the third cut out, and the
# last two; these come first.
places, steps = paper_ids(6, [(2, 3), (4, 6)], order=[1, 0])
print("places", places, "\nsteps ", steps)
confirm("two answers, each at its own blank", places[5:] == [4, 4, 4, 2, 2])
two_blanks = torch.tensor([[4, 5, ids.mask, 7, ids.mask, ids.sop, 8, 9, ids.sop, 6]])
by_code = prompt_positions(two_blanks, ids, rows=2)[0].tolist()
print("ChatGLM-6B, the same tokens:\nplaces", by_code[0], "\nsteps ", by_code[1])
confirm("all at the first blank", by_code[0][5:] == [2] * 5)
agree = []
for start, end in spans:
    tokens = mask_span(text, start, end, ids, eop).tokens[
        :-1
    ]  # the paper feeds no <eop>
    one = prompt_positions(tokens[None], ids, rows=2)[0]
    agree.append(one.tolist() == [*paper_ids(6, [(start, end)], order=[0])])
confirm("with one blank they agree, for every span", all(agree))

labels = ids_of["gmask_train/labels"].clone()
with_sop = next_token_loss(outputs["gmask_train/logits"], labels)
labels[labels == G.sop] = IGNORE
without = next_token_loss(outputs["gmask_train/logits"], labels)
confirm(
    "the question for <sop> is part of the loss", (with_sop - without).abs() > 0.001
)

# %% [markdown]
# :::{admonition} Break it
# :class: break-it
# Decode as Llama does: while the answer grows, let the place count on, $c, c + 1, \dots$,
# with the right steps. What will you see?
# :::

# %%
tokens = ids_of["mask_train/input_ids"]
prompt_length, right = 9, outputs["incremental_mask/step_logits"]
cache = model.new_cache(1, tokens.shape[1])
wrong = [model(tokens[:, :prompt_length], cache)[:, -1]]
for t in range(prompt_length, tokens.shape[1]):
    counted = torch.tensor([[[t], [t - 7]]])  # place t; c = 8, so the step is t - 7
    wrong.append(model(tokens[:, t, None], cache, positions=counted)[:, -1])
wrong = torch.stack(wrong, dim=1)
good = [close(wrong[:, i], right[:, i]) for i in range(5)]
print("logits right, step by step:", good)
confirm("only the first are right", good == [True, False, False, False, False])
same_word = wrong.argmax(dim=-1) == right.argmax(dim=-1)
print("same best word:            ", same_word[0].tolist())

# %% [markdown]
# The first word is right, because the prompt had its numbers from the forward pass.
# Then the answer leaves its blank and stands behind the text. Nothing crashes, and now
# and then the best word is right by luck. Test decoding on logits and on more than one
# step, against the forward pass on the whole sequence.
#
# ## Exercises
#
# Write your function in a cell of your own and give it to `check`. A question takes
# its name and a letter: `check("why_steps_count_from_one", "a")`.

# %%
from annotated_src.exercises import check  # noqa: F401 - for your cells
from annotated_src.exercises.blanks import chapter as exercises

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("restore_text")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("restore_text")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
solved_restore = exercises["restore_text"].solution
made = [mask_span(text, start, end, ids, eop) for start, end in spans]
made += [mask_rest(text, start, ids, eop) for start in range(6)]
confirm(
    f"the sentence comes back from all {len(made)} examples",
    all(solved_restore(in_words(example.tokens)) == words for example in made),
)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("two_positions")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("two_positions")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
solved_positions = exercises["two_positions"].solution
checked = [
    torch.equal(solved_positions(ids_of[f"{case}/input_ids"], *G), theirs)
    for case, _, what in (name.partition("/") for name in ids_of)
    if what == "get_position_ids_2d"
    for theirs in [ids_of[f"{case}/{what}"]]
]
confirm(f"the original's, in {len(checked)} golden cases", all(checked))

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("read_off_positions")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("read_off_positions")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
solved_read = exercises["read_off_positions"].solution
found = [
    solved_read(row) == (c.item(), m.item())
    for name, tokens in ids_of.items()
    if name.endswith("/input_ids")
    for row, c, m in zip(
        prompt_positions(tokens, G, rows=2),
        context_lengths(tokens, G.sop),
        mask_positions(tokens, G.gmask, G.mask),
        strict=True,
    )
]
confirm(f"{len(found)} golden rows read off", all(found))

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("why_steps_count_from_one")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("why_steps_count_from_one")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
positions = prompt_positions(mask_span(text, 2, 4, ids, eop).tokens[None], ids, 2)[0]
from_zero = torch.stack((positions[0], (positions[1] - 1).clamp(min=0)))
confirm(
    "counted from 1, all pairs differ",
    len(set(zip(*positions.tolist(), strict=True))) == 9,
)
pairs = list(zip(*from_zero.tolist(), strict=True))
confirm("counted from 0, <sop> is where [MASK] is", pairs[5] == pairs[2] == (2, 0))

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("example_labels")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("example_labels")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
solved_example, given = (
    exercises["example_labels"].solution,
    exercises["example_labels"].given,
)
inputs = [(e.tokens.tolist(), ids.sop, [ids.mask, ids.gmask]) for e in made]
confirm(
    "right for every blank",
    all(
        solved_example(*x) == e.labels.tolist()
        for x, e in zip(inputs, made, strict=True)
    ),
)
wrong = torch.tensor(given(*inputs[0]))
try:
    pad_right([made[0]._replace(labels=wrong)], pad_id=9)
except ValueError as error:
    print("the colleague's batch:", error)

# %% [markdown]
# ## What to remember
#
# - A blank inside a text becomes a text to continue: context with a mask token,
#   `<sop>`, answer, `<eop>`. Chat is the blank at the end.
# - Row 0 is the place: it counts through the context and then stands at the mask token,
#   for `[gMASK]` too. Row 1 is the step: 0 in the context, 1 at `<sop>`, and on.
# - Two numbers let an answer be blind to its length, at its place, in order, and apart
#   from the context. Each simple way with one number fails one of these.
# - The first `<sop>` ends the context, padding included. The model prefers `[gMASK]`,
#   the tokenizer `[MASK]`; every prompt of the tokenizer has a `[gMASK]`.
# - Labels are not shifted, and `<sop>` is one of them.
#
# ## Where to read on
#
# - ChatGLM-6B, `modeling_chatglm.py`: `get_position_ids`, with `use_gmasks` for one row
#   only; `ChatGLMModel.forward`, where the mask token is chosen;
#   `prepare_inputs_for_generation` for the single step. The earliest revisions, with
#   `[MASK]` at id 150000, let the place count on for `[gMASK]` and preferred `[MASK]`;
#   texts about ChatGLM-6B that contradict this chapter may have read those.
# - `tokenization_chatglm.py`: `build_inputs_with_special_tokens`, `_pad`.
# - `ptuning/main.py`: `preprocess_function_train`, the labels.
# - {cite:t}`du2022`, section 2, for the objective and the positions;
#   {cite:t}`raffel2020` for another way to fill blanks, with many sentinel tokens.
# - Next: {ref}`ch-prefix-mask`, what each token sees.
