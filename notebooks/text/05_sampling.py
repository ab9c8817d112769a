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
# (ch-sampling)=
# # Choosing the next token
#
# :::{admonition} In this chapter
# :class: at-a-glance
# **50 minutes · moderate.** Afterwards you can say what temperature, top-k, top-p, min-p
# and the repetition penalty each do to a distribution, write all five, put them in the
# right order, draw from what is left, and tell which of them to blame for a bad text.
# :::

# %% tags=["remove-input"]
from annotated_src.figures.station_map import StationMap

StationMap("sampling")

# %% [markdown]
# :::{admonition} Predict before you run
# :class: predict
# SmolLM2-135M knows 49,152 tokens.
#
# - After *The capital of Japan is*, four tokens have 80 % of the probability. How many
#   does it take after *The llama opened the door and saw a*?
# - A program takes the most likely token at every step. What does it write after *I like
#   llamas because*?
# - Add 10 to all 49,152 scores. No probability changes. Does a repetition penalty notice?
#
# Write three answers down.
# :::

# %%
import math
from tempfile import TemporaryDirectory

import torch
import transformers
from transformers import GenerationConfig, LlamaForCausalLM
from transformers.generation import logits_process

from annotated_src.checkpoint import load_model
from annotated_src.figures import sampling as figures
from annotated_src.generate import generate
from annotated_src.sampler import Sample
from annotated_src.sampling import (
    greedy,
    min_p,
    repetition_penalty,
    temperature,
    top_k,
    top_p,
)
from annotated_src.show import confirm, show
from annotated_src.tokenizer import TextTokenizer
from annotated_src.weights import smollm2

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
_ = torch.set_grad_enabled(False)

directory = smollm2()
model, tokenizer = load_model(directory), TextTokenizer.from_pretrained(directory)


def scores_after(prompt):
    return model(tokenizer.encode(prompt), last_logits_only=True)[:, 0]


PROMPTS = ("The capital of Japan is", "The llama opened the door and saw a")
sure, unsure = (scores_after(prompt) for prompt in PROMPTS)
sure.shape

# %% [markdown]
# ## A strip and a dart
#
# {ref}`Decoding <ch-decoding>` ends with one row of scores for the next token, the
# *logits* $z_1, \dots, z_V$. This chapter makes one id of them. Scores become
# probabilities $p_i$ by the softmax; we write it with the temperature $t$ that comes
# later, and set $t = 1$ for now:
#
# $$
# p_i = \frac{e^{z_i / t}}{\sum_{j=1}^{V} e^{z_j / t}} .
# $$ (eq-sampling-softmax)
#
# To draw a token with these probabilities, lay them end to end: a strip of length 1,
# cut into $V$ pieces. Throw a dart: a number $u$ between 0 and 1, all equally likely.
# It hits piece $i$ with probability $p_i$, because that is how long the piece is. So
#
# $$
# \mathrm{token}(u) = \min \bigl\{\, i : p_1 + \dots + p_i > u \,\bigr\}.
# $$ (eq-sampling-inverse)
#
# As a loop, with six tokens, to see every number:


# %%
# Check eq-sampling-softmax and eq-sampling-inverse.
def walk(shares, u):
    """Walk along the strip; stop at the piece that holds u."""
    reached = 0.0
    for token, share in enumerate(shares):
        reached += share
        if reached > u:
            return token


six = torch.tensor([0.36, 0.24, 0.16, 0.12, 0.08, 0.04], dtype=torch.float64)
logits = six.log() + 3  # any constant will do
by_hand = logits.exp() / logits.exp().sum()
print("scores       ", *(f"{z:5.2f}" for z in logits.tolist()))
print("probabilities", *(f"{p:5.2f}" for p in by_hand.tolist()))
print("sums         ", *(f"{p:5.2f}" for p in by_hand.cumsum(0).tolist()))
print("darts        ", {u: walk(by_hand.tolist(), u) for u in (0.1, 0.5, 0.7, 0.99)})
confirm("the softmax gives the six back", torch.allclose(by_hand, six))

darts = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000  # evenly spread
hits = torch.tensor([walk(six.tolist(), u) for u in darts.tolist()]).bincount()
confirm(
    "10,000 darts hit 3600, 2400, ... times",
    hits.tolist() == [3600, 2400, 1600, 1200, 800, 400],
)

# %% [markdown]
# And here is the real thing. Two prompts, one with an answer and one without:


# %%
def needed(logits, share):
    """How many of the best tokens it takes to have a share of the probability."""
    best_first = logits[0].double().softmax(-1).sort(descending=True).values
    return int((best_first.cumsum(0) < share).sum()) + 1


for prompt, scores in zip(PROMPTS, (sure, unsure), strict=True):
    shares, ids = scores[0].softmax(-1).topk(5)
    best = [
        f"{tokenizer.decode([i])} {p:.0%}"
        for i, p in zip(ids.tolist(), shares.tolist(), strict=True)
    ]
    print(f"{prompt} ...\n   {needed(scores, 0.8)} tokens have 80 %:", *best)

# %% [markdown]
# The first answer: 234. Even after *Japan is*, three draws out of ten are not *Tokyo*.
#
# ## Always the best?
#
# Then why draw at all? {py:func}`annotated_src.sampling.greedy` takes the best token at
# every step:

# %%
show(greedy)
prompt = tokenizer.encode("I like llamas because")
looping = generate(model, prompt, max_new_tokens=61)
print(tokenizer.decode(looping[0]))

best = model(looping)[0, prompt.shape[1] - 1 : -1].topk(2).values
confirm("no step is a near tie", (best[:, 0] - best[:, 1]).min() > 0.05)

# %% [markdown]
# That is the second answer. Nothing is wrong with the weights or with the code; this is
# what the most likely token, and again the most likely token, adds up to
# {cite:p}`holtzman2020`. Look at the sentence's probability each time that it comes:

# %% mystnb={"image": {"alt": "Six lines over the eight tokens of the sentence I'm not sure what to do, full stop. The dashed one, the first time, runs between 0.16 and 0.47 and is lowest at seven tokens. The later lines climb, most of all at 'm, not, what and to; the sixth time six of the eight tokens are above 0.8, and only the first is near 0.5."}, "figure": {"name": "fig-sampling-loop", "caption": "A loop tightens: what the model gives to each token of the sentence, the first time (dashed) and the five times after. Together they get likelier every time."}} tags=["hide-input"]
sentence = [tokenizer.decode([i]).strip() for i in looping[0, -8:].tolist()]
loop = figures.loop_data(model, looping, sentence, times=6)
figures.draw_loop(loop)

# %%
whole = loop.chances.prod(dim=1)
print("the whole sentence:", *(f"{p:.2g}" for p in whole.tolist()))
confirm("likelier every time", (whole.diff() > 0).all())
confirm("the 6th time 6000 times as likely as the 1st", whole[-1] / whole[0] > 6000)

# %% [markdown]
# A text that has repeated itself is evidence that it will. ({ref}`ch-attention` builds
# a pair of heads that look for what followed a word the last time.) Each round adds
# evidence, and greedy never takes another way.
#
# ## Temperature
#
# In {eq}`eq-sampling-softmax` every score is divided by $t$. Between two tokens only
# the difference counts: $p_i / p_j = e^{(z_i - z_j)/t}$. A small $t$ stretches
# differences, a large one shrinks them. At the two ends,
#
# $$
# \lim_{t \to 0} p_i = \begin{cases} 1/m & z_i \text{ is the best, one of } m \text{ equals} \\
# 0 & \text{otherwise} \end{cases}
# \qquad
# \lim_{t \to \infty} p_i = \frac{1}{V} ,
# $$ (eq-sampling-limits)
#
# since $e^{(z_i - z_{\text{best}})/t}$ goes to 0 on the left for every token but the
# best, and to 1 on the right for all. So greedy is temperature 0, which nobody can
# divide by.
#
# On the way from one end to the other the distribution only ever gets more even.
# Measure that by its entropy $H = -\sum_i p_i \ln p_i$: 0 when one token has all, $\ln
# V$ when all have the same. With $\beta = 1/t$, $\ln p_i = \beta z_i - \ln Z$, where
# $Z$ is the sum in {eq}`eq-sampling-softmax`; so $H = \ln Z - \beta \bar z$ with $\bar
# z = \sum_i p_i z_i$. Now $\frac{d \ln Z}{d\beta} = \bar z$ and $\frac{d \bar
# z}{d\beta} = \operatorname{Var}(z)$, the variance of the scores under $p$. Two terms
# cancel, $\frac{dH}{d\beta} = -\beta \operatorname{Var}(z)$ is left, and as
# $\frac{d\beta}{dt} = -1/t^2$,
#
# $$
# \frac{dH}{dt} = \frac{\operatorname{Var}(z)}{t^3} \;\ge\; 0 .
# $$ (eq-sampling-entropy)


# %%
# Check eq-sampling-limits and eq-sampling-entropy.
def entropy(shares):
    return -torch.special.xlogy(shares, shares).sum().item()


tied = torch.tensor([1.0, 3.0, 3.0, -2.0], dtype=torch.float64)
cold, hot = (tied / 1e-3).softmax(0), (tied / 1e6).softmax(0)
confirm(
    "t -> 0: the best two share",
    torch.allclose(cold, cold.new_tensor([0, 0.5, 0.5, 0])),
)
confirm("t -> infinity: all the same", torch.allclose(hot, torch.full_like(hot, 0.25)))

z = unsure[0].double()
for t in (0.5, 1.0, 2.0):
    shares = (z / t).softmax(0)
    variance = (shares * z**2).sum() - (shares * z).sum() ** 2
    slope = (
        entropy((z / (t + 1e-4)).softmax(0)) - entropy((z / (t - 1e-4)).softmax(0))
    ) / 2e-4
    confirm(
        f"t = {t}: H is {entropy(shares):.2f}, and its slope is the variance over t cubed",
        math.isclose(slope, variance / t**3, rel_tol=1e-6),
    )

# %% [markdown]
# {numref}`fig-sampling-temperature` shows the real strips. The order of the pieces
# never changes. All that changes is how much the front has; the dart stays where it is,
# and the strip moves under it.

# %% mystnb={"image": {"alt": "Six strips of length 1, cut into the tokens' probabilities, for two prompts at temperatures 0.5, 1 and 2. After The capital of Japan is, Tokyo has 99, 70 and 6 percent. After The llama opened the door and saw a, the best, beautiful, has 30, 8 and 1 percent, and at temperature 2 the grey tail of 49,148 small pieces fills nearly the whole strip. A dart at 0.56 hits Tokyo, Tokyo, simply; and young, stray, music."}, "figure": {"name": "fig-sampling-temperature", "caption": "The same scores at three temperatures, and the same dart $u$. Pieces too narrow to see are grey."}} tags=["hide-input"]
temperatures = {
    f"temperature {t:g}": lambda logits, t=t: temperature(logits, t)
    for t in (0.5, 1.0, 2.0)
}
warmed = [
    figures.strip_data(prompt, scores, tokenizer.decode, temperatures)
    for prompt, scores in zip(PROMPTS, (sure, unsure), strict=True)
]
figures.draw_strips(warmed, dart=0.56)

# %%
tokyo = [strip.shares[0].item() for strip in warmed[0].strips]
confirm("Tokyo: 99 %, 70 %, 6 %", [round(100 * p) for p in tokyo] == [99, 70, 6])
confirm(
    "temperature never changes the order",
    all((strip.shares.diff() <= 0).all() for data in warmed for strip in data.strips),
)

# %% [markdown]
# ## Three cuts
#
# The grey tail is the trouble with plain drawing. Each of its tokens is unlikely, but
# there are 49,000 of them, and together they get hit. A *filter* gives them the score
# $-\infty$. The softmax then does the rest: $e^{-\infty} = 0$, and those that are left,
# the set $\mathcal K$, share the whole.
#
# $$
# p'_i = \frac{p_i}{\sum_{j \in \mathcal K} p_j} \quad (i \in \mathcal K),
# \qquad p'_i = 0 \quad \text{otherwise}.
# $$ (eq-sampling-renormalise)
#
# The kept keep their ratios. Three filters differ in what they keep. Let $p_{(1)} \ge
# p_{(2)} \ge \dots$ be the probabilities in order.
#
# $$
# \begin{aligned}
# \mathcal K_{\text{top-}k} &= \bigl\{ i : p_i \ge p_{(k)} \bigr\} \\
# \mathcal K_{\text{top-}p} &= \text{the first } n, \quad
# n = \min\bigl\{ n : p_{(1)} + \dots + p_{(n)} \ge p \bigr\} \\
# \mathcal K_{\text{min-}p} &= \bigl\{ i : p_i \ge m\, p_{(1)} \bigr\}
# \end{aligned}
# $$ (eq-sampling-cuts)
#
# Top-k {cite:p}`fan2018` keeps a *number*, top-p {cite:p}`holtzman2020` a *sum*, min-p
# {cite:p}`nguyen2024` whatever reaches a *share of the best*. As loops, on the six:


# %%
# Check eq-sampling-cuts and eq-sampling-renormalise.
def keep_top_k(shares, k):
    border = sorted(shares, reverse=True)[k - 1]
    return [i for i, share in enumerate(shares) if share >= border]


def keep_top_p(shares, p):
    kept, total = [], 0.0
    for i in sorted(range(len(shares)), key=lambda i: -shares[i]):
        if total >= p:  # enough already, without this one
            break
        kept.append(i)
        total += shares[i]
    return sorted(kept)


def keep_min_p(shares, m):
    return [i for i, share in enumerate(shares) if share >= m * max(shares)]


RULES = {
    "top-k 2": (keep_top_k, top_k, 2),
    "top-p 0.7": (keep_top_p, top_p, 0.7),
    "min-p 0.3": (keep_min_p, min_p, 0.3),
}
for name, (keep, function, value) in RULES.items():
    kept = keep(six.tolist(), value)
    renormalised = torch.zeros_like(six)
    renormalised[kept] = six[kept] / six[kept].sum()
    print(f"{name:9}", *(f"{p:5.3f}" for p in renormalised.tolist()))
    filtered = function(logits[None], value)[0].double().softmax(0)
    confirm(
        "-inf and softmax = divide by what is left",
        torch.allclose(filtered, renormalised),
    )

# %% [markdown]
# The sums were 0.36, 0.60, 0.76, so top-p 0.7 keeps three: the token that *crosses* the
# border stays. The package's functions work on whole batches:

# %%
show(top_k, top_p, min_p)

# %% [markdown]
# (`top_p` sorts the other way round, as transformers does: the worst go as long as they
# sum to no more than $1 - p$.) Now the real two distributions through the three cuts.
# Above each strip, in small, is the strip before, with what goes in orange.

# %% mystnb={"image": {"alt": "Six strips, each with a thin strip above it that shows what was cut and how the rest was stretched. After The capital of Japan is: top-k 10 keeps 10 tokens that had 88 percent, top-p 0.8 keeps 4 with 81, min-p 0.05 keeps 3 with 79. After The llama opened the door and saw a: top-k 10 keeps 10 tokens that had only 36 percent, top-p 0.8 keeps 234 with 80, min-p 0.05 keeps 33 with 51."}, "figure": {"name": "fig-sampling-filters", "caption": "What each filter throws away (orange), and how it stretches what stays to length 1."}} tags=["hide-input"]
filters = {
    "top-k 10": lambda logits: top_k(logits, 10),
    "top-p 0.8": lambda logits: top_p(logits, 0.8),
    "min-p 0.05": lambda logits: min_p(logits, 0.05),
}
cut = [
    figures.strip_data(prompt, scores, tokenizer.decode, filters)
    for prompt, scores in zip(PROMPTS, (sure, unsure), strict=True)
]
figures.draw_strips(cut, ghosts=True)

# %%
counts = [[strip.kept for strip in data.strips] for data in cut]
confirm("sure: 10, 4 and 3 tokens stay", counts[0] == [10, 4, 3])
confirm("unsure: 10, 234 and 33", counts[1] == [10, 234, 33])

# %% [markdown]
# Top-k is the wrong number twice: ten tokens are many after *Japan is*, and after *saw
# a* they take 64 % of the probability away. The two others adapt. Why they do is plain
# when each filter is drawn against the thing that it looks at. Then each is one
# straight line:

# %% mystnb={"image": {"alt": "Three panels with the place of a token on a logarithmic axis, one curve for each prompt. Left, probability: top-k is a vertical line at place 10 for both. Middle, the sum so far: top-p is a horizontal line at 0.8, which the curves cross at places 4 and 234. Right, the share of the best: min-p is a horizontal line at 0.05, which the curves cross after places 3 and 33."}, "figure": {"name": "fig-sampling-cuts", "caption": "Top-k cuts at a place, top-p at a sum, min-p at a ratio."}} tags=["hide-input"]
figures.draw_cuts(cut)

# %% [markdown]
# The figure also shows how top-p and min-p part. Top-p follows the *tail*: a long flat
# one makes the sum rise slowly, so many stay. Min-p looks at the best alone and does
# not care how many others there are. Let the tail grow with temperature, and only one
# of them keeps its head:

# %%
kept = {}
for t in (1.0, 2.0):
    warm = temperature(sure, t)
    cuts = (top_p(warm, 0.8), min_p(warm, 0.05))
    kept[t] = [row.isfinite().sum().item() for row in cuts]
confirm("t = 1: top-p 0.8 keeps 4, min-p 0.05 keeps 3", kept[1.0] == [4, 3])
confirm("t = 2: top-p keeps over 4000", kept[2.0][0] > 4000)
confirm("t = 2: min-p keeps 22", kept[2.0][1] == 22)

# %% [markdown]
# :::{admonition} A figure that moves: where the strip is cut
# :class: moving top-p
# SmolLM2's 49,152 tokens lie end to end, the likeliest first. $p$ is a place on this strip:
# what lies before it stays, and so does the token that it falls on. After *The capital of
# Japan is*, $p = 0.8$ keeps 4 tokens at temperature 1, and 4,322 at temperature 2. After
# *The llama opened the door and saw a* it keeps 234, and 4,755. Drag $p$ to 0.70 at
# temperature 1: *Tokyo*, with 70.3 %, stays alone.
# :::
#
# ## The repetition penalty
#
# Temperature and cuts look at one row of scores. The penalty {cite:p}`keskar2019` also
# looks back. With $\theta > 1$, each token that has come already, in the prompt or
# since, gets
#
# $$
# z'_i = \begin{cases} z_i / \theta & z_i \ge 0 \\ z_i \cdot \theta & z_i < 0 . \end{cases}
# $$ (eq-sampling-penalty)
#
# Both ways the score goes down (but for a score of 0); how often the token has come does
# not matter.

# %%
show(repetition_penalty)


# %%
# Check eq-sampling-penalty.
def penalise(scores, ids, theta):
    new = list(scores)
    for i in ids:  # a token that came twice is set twice, to the same
        new[i] = scores[i] / theta if scores[i] >= 0 else scores[i] * theta
    return new


given, came = [4.0, 2.0, -1.0, 0.0], [0, 2, 3, 0]
print(penalise(given, came, 2.0))
confirm(
    "by hand = the package",
    torch.tensor([penalise(given, came, 2.0)]).equal(
        repetition_penalty(torch.tensor([given]), torch.tensor([came]), 2.0)
    ),
)


def penalised_greedy(theta):
    return lambda logits, tokens: greedy(repetition_penalty(logits, tokens, theta))


mended = generate(model, prompt, max_new_tokens=38, sampler=penalised_greedy(1.3))
print(tokenizer.decode(mended[0]))

# %% [markdown]
# The loop is gone. What did it cost? Two things. First, some texts *should* repeat
# themselves:

# %%
count = tokenizer.encode("1, 2, 3, 4, 5, 6,")
for theta in (1.0, 1.3):
    counted = generate(model, count, max_new_tokens=12, sampler=penalised_greedy(theta))
    print(f"penalty {theta}:", repr(tokenizer.decode(counted[0])))

# %% [markdown]
# The space and the comma have come before, so they are punished like everything else.
#
# Second, {eq}`eq-sampling-penalty` asks whether a score is above zero. But scores have no
# zero. Training sees them through the softmax only, which takes no notice of a constant.
# The penalty does: a score $z > 0$ falls by $z (1 - 1/\theta)$, nothing at 0 and a lot far
# above it.
#
# {numref}`fig-sampling-penalty` shows both costs. Above, the next token should be the
# space once more. Below is the loop, about to say *sure* a second time.

# %% mystnb={"image": {"alt": "Eight strips for two prompts; what has come already is orange and hatched. After 1, 2, 3, 4, 5, 6, comma it is nearly all the space, and has 95 percent without a penalty, 11 with penalty 1.3, 1 if 10 is added to all scores first, 55 if 10 is subtracted. After what to do. I'm not, it is nearly all the word sure, and has 93, 15, 2 and 65 percent."}, "figure": {"name": "fig-sampling-penalty", "caption": "What the penalty leaves to the tokens that have come already (orange; ␣ is a space). It treats the wanted repetition and the unwanted one alike, and depends on a constant that changes no probability."}} tags=["hide-input"]
TEXTS = {"1, 2, 3, 4, 5, 6,": count, "… what to do. I'm not": looping[:, :30]}
punished = []
for prompt, ids in TEXTS.items():
    filters = {"no penalty": lambda logits: logits}
    for shift, said in ((0, ""), (10, ", all scores + 10"), (-10, ", all scores − 10")):
        filters[f"penalty 1.3{said}"] = lambda logits, ids=ids, shift=shift: (
            repetition_penalty(logits + shift, ids, 1.3)
        )
    scores = model(ids, last_logits_only=True)[:, 0]
    punished.append(
        figures.strip_data(prompt, scores, tokenizer.decode, filters, come=ids)
    )
figures.draw_strips(punished)

# %%
left = [[s.shares[data.come].sum() for s in data.strips] for data in punished]
percent = [[round(100 * share.item()) for share in row] for row in left]
confirm("the count: 95, 11, 1, 55 %", percent[0] == [95, 11, 1, 55])
confirm("the loop: 93, 15, 2, 65 %", percent[1] == [93, 15, 2, 65])
moved = (unsure + 10).softmax(-1)
confirm("+ 10 changes no probability", torch.allclose(moved, unsure.softmax(-1)))

# %% [markdown]
# The third answer: yes, it notices. Where a network puts its zero is an accident of
# training, so a penalty that suits one model says little about another.
#
# ## The order
#
# Filters see what the filter before them left. {py:class}`annotated_src.sampler.Sample`
# puts them in the order of transformers:

# %%
show(Sample)

# %% [markdown]
# Does the order matter? A temperature changes no rank, so top-k may come before or
# after. It does change sums and ratios:


# %%
def left_by(*steps):
    scores = sure
    for function, value in steps:
        scores = function(scores, value)
    return (scores > -torch.inf)[0]


heat = (temperature, 2.0)
for function, value in ((top_k, 10), (top_p, 0.8), (min_p, 0.05)):
    cut = (function, value)
    hot_first, cut_first = left_by(heat, cut), left_by(cut, heat)
    same = torch.equal(hot_first, cut_first)
    print(f"{function.__name__}: same tokens either way: {same}")
    confirm("heat first never keeps fewer", hot_first.sum() >= cut_first.sum())

# %% [markdown]
# So in this order a hot temperature lets more of the tail through. And top-p after
# top-k is not top-p alone: it counts its sum among the $k$ that are left, and *Tokyo*'s
# 70 % are 80 % of those.

# %%
confirm("top-p 0.78 alone keeps 3", left_by((top_p, 0.78)).sum() == 3)
confirm("after top-k 10 just one", left_by((top_k, 10), (top_p, 0.78)).sum() == 1)

# %% [markdown]
# ## The draw, as torch does it
#
# {py:class}`annotated_src.sampler.Sample` ends in `torch.multinomial`. Does it throw a
# dart? No. For one draw, it lets all tokens run a race. Each gets a random time $E_i$,
# exponentially distributed with mean 1, and token $i$ arrives at $E_i / p_i$: the
# likelier, the sooner. The first to arrive wins,
#
# $$
# \mathrm{token} = \arg\min_i \frac{E_i}{p_i},
# \qquad
# P(\mathrm{token} = i) = \int_0^\infty p_i e^{-p_i s} \prod_{j \ne i} e^{-p_j s} \, ds = p_i .
# $$ (eq-sampling-race)
#
# (In the integral token $i$ arrives at time $s$, and all others later. The exponents
# add up to $-s$.) No token waits for a sum over those before it.

# %%
# Check eq-sampling-race.
s = torch.linspace(0, 60, 20_001, dtype=torch.float64)
wins = []
for i in range(6):
    others = torch.cat([six[:i], six[i + 1 :]])
    density = six[i] * torch.exp(-six[i] * s) * torch.exp(-others[:, None] * s).prod(0)
    wins.append(torch.trapezoid(density, s))
print("wins with probability", *(f"{area:.2f}" for area in wins))
confirm("the area is the share", torch.allclose(torch.stack(wins), six, atol=1e-5))


def generator(seed):
    return torch.Generator().manual_seed(seed)


shares, same, darts = unsure.softmax(-1), [], []
for seed in range(5):
    drawn = torch.multinomial(shares, 1, generator=generator(seed)).item()
    times = torch.empty_like(shares).exponential_(generator=generator(seed))
    race, noisy = (shares / times).argmax(), (unsure - times.log()).argmax()
    same.append(drawn == race == noisy)
    u = torch.rand((), generator=generator(seed)).item()
    darts.append(drawn == figures.hit(shares[0].double(), u))
confirm("5 seeds: torch.multinomial = the race = the best noisy score", all(same))
confirm("but never the dart", not any(darts))

# %% [markdown]
# (Take logarithms, and the race is $\arg\max_i (z_i + G_i)$ with $G_i = -\ln E_i$:
# greedy on noisy scores. That is the *Gumbel-max trick*.)
#
# Random numbers come from a *generator*, and a generator starts at a seed. With one of
# your own, the same seed gives the same draws, whatever else draws numbers meanwhile.
# But dart and race made different tokens of the same seed. A seed repeats a run of one
# program; it does not tell another program what to draw.
#
# Here 20,000 rows draw from the six. The last line adds up how far the counts are from
# what they should be ($\chi^2$ with 3 degrees of freedom); chance alone takes it above
# 26 once in 100,000 times.

# %%
many = six.log().float().expand(20_000, -1)
first = Sample(min_p=0.3, generator=generator(1))(many)
torch.rand(7)
again = Sample(min_p=0.3, generator=generator(1))(many)
confirm("same seed, same 20,000 draws", torch.equal(first, again))
confirm(
    "only the four that stay are ever drawn", first.unique().tolist() == [0, 1, 2, 3]
)
expected = six[:4] / six[:4].sum() * len(first)
distance = ((first.bincount() - expected) ** 2 / expected).sum()
confirm("as often as they should: chi-squared under 26", distance < 26)

# %% [markdown]
# ## What it reads like
#
# Five settings, one row of a batch each. All rows get the same darts, so what differs
# is the strip. (Our own darts, since they fall alike on every machine, and none so near a
# border that rounding could decide.)


# %%
def same_darts(samplers, seed, gaps):
    """One sampler a row; the same number decides for all rows."""
    darts = generator(seed)

    def choose(logits, tokens):
        u = torch.rand((), generator=darts, dtype=torch.float64).item()
        chosen = []
        for sample, z, ids in zip(samplers, logits, tokens, strict=True):
            shares = sample.probabilities(z[None], ids[None])[0].double()
            shares = shares / shares.sum()
            chosen.append(figures.hit(shares, u))
            gaps.append((shares.cumsum(0) - u).abs().min())
        return torch.tensor(chosen)

    return choose


settings = {
    "temperature 0.3": Sample(temperature=0.3),
    "plain": Sample(),
    "top-p 0.8": Sample(top_p=0.8),
    "temperature 1.5": Sample(temperature=1.5),
    "temperature 1.5, min-p 0.1": Sample(temperature=1.5, min_p=0.1),
}
start = tokenizer.encode(PROMPTS[1]).expand(len(settings), -1)
gaps = []
choose = same_darts(settings.values(), seed=13, gaps=gaps)
texts = generate(model, start, max_new_tokens=14, sampler=choose)
for name, row in zip(settings, texts, strict=True):
    print(f"{name}:\n   {tokenizer.decode(row)!r}")
confirm("no dart lands within 0.00001 of a border", min(gaps) > 1e-5)

# %% [markdown]
# At 1.5 the tail has its say (*swelled-closed terminals*); min-p at the same heat cuts
# it off. Each mistake of this chapter leaves its own mark:
#
# | A text that | Suspect |
# |---|---|
# | goes round in circles | greedy, or a temperature near it |
# | is the same for every seed | top-k 1, or a tiny top-p |
# | falls apart in the middle of a sentence | heat without a cut |
# | drops spaces and commas, will not count | the penalty |
#
# ## The ladder of equality
#
# Loops = package on random rows; package = transformers' processors, bit for bit, on
# the real scores and on rows full of ties.

# %%
torch.manual_seed(0)
rows = torch.randn(300, 12)
for name, (keep, function, value) in RULES.items():
    left = function(rows, value).isfinite()
    by_loop = [keep(row, value) for row in rows.double().softmax(-1).tolist()]
    confirm(
        f"{name}: loops = package",
        [row.nonzero().flatten().tolist() for row in left] == by_loop,
    )

hard = torch.randint(-2, 3, (40, 300)).float()
tokens = torch.randint(300, (40, 50))
PROCESSORS = {
    "RepetitionPenaltyLogitsProcessor": (1.3, None),
    "TemperatureLogitsWarper": (0.7, temperature),
    "TopKLogitsWarper": (40, top_k),
    "TopPLogitsWarper": (0.9, top_p),
    "MinPLogitsWarper": (0.1, min_p),
}
for name, (value, function) in PROCESSORS.items():
    theirs, equal = getattr(logits_process, name)(value), []
    for scores, ids in ((sure, start[:1]), (unsure, start[:1]), (hard, tokens)):
        if function is None:
            ours = repetition_penalty(scores, ids, value)
        else:
            ours = function(scores, value)
        equal.append(torch.equal(ours, theirs(ids, scores.clone())))
    confirm(f"package = {name}", all(equal))

# %% [markdown]
# Then the whole chain, with all five set. `_get_logits_processor` is where transformers
# decides who comes in, and in what order. And at last whole texts: the same model, the
# same seed, the same ids.

# %%
torch.manual_seed(3)
small = LlamaForCausalLM(
    transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=36,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
).eval()
wanted = {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1}
wanted["min_p"] = 0.02
chain = small._get_logits_processor(GenerationConfig(do_sample=True, **wanted), 50)
print(*(type(processor).__name__ for processor in chain), sep="\n")
confirm(
    "the same probabilities, bit for bit",
    torch.equal(
        chain(tokens, hard.clone()).softmax(-1),
        Sample(**wanted).probabilities(hard, tokens),
    ),
)

# %%
with TemporaryDirectory() as folder:
    small.save_pretrained(folder)
    ours = load_model(folder)
begin = tokens[:4, :6]
torch.manual_seed(11)
text = generate(ours, begin, max_new_tokens=30, sampler=Sample(**wanted))
torch.manual_seed(11)
original = small.generate(
    begin,
    attention_mask=torch.ones_like(begin),
    do_sample=True,
    max_new_tokens=30,
    pad_token_id=0,
    **wanted,
)
confirm("the same seed, the same 120 ids as transformers", torch.equal(text, original))

# %% [markdown]
# :::{admonition} Docs and code
# :class: paper-code
# Two things that the names do not tell. **One:** ask transformers to sample and say
# nothing else, and it does not draw from the model's distribution. `top_k` is 50 by
# default. The field of a fresh `GenerationConfig` says `None`; `generate` fills it in.
#
# **Two:** the paper's penalty divides every score by $\theta$, whatever its sign. The
# code multiplies those below zero, and has to: a negative score that is divided goes *up*.
# :::

# %%
out = small.generate(
    begin,
    attention_mask=torch.ones_like(begin),
    do_sample=True,
    max_new_tokens=1,
    pad_token_id=0,
    output_scores=True,
    return_dict_in_generate=True,
)
confirm("a fresh GenerationConfig has top_k None", GenerationConfig().top_k is None)
confirm(
    "and yet 50 of the 300 tokens are left in each row",
    out.scores[0].isfinite().sum(-1).tolist() == [50] * 4,
)


def as_in_the_paper(logits, tokens, penalty):
    return logits.scatter(1, tokens, logits.gather(1, tokens) / penalty)


scores, came = torch.tensor([[-2.0, 1.0]]), torch.tensor([[0]])
before = scores.softmax(-1)[0, 0]
paper = as_in_the_paper(scores, came, 1.3).softmax(-1)[0, 0]
code = repetition_penalty(scores, came, 1.3).softmax(-1)[0, 0]
print(f"a token with score -2 has {before:.3f}; paper {paper:.3f}, code {code:.3f}")
confirm("the paper's formula favours what it should punish", paper > before > code)

# %% [markdown]
# ## Broken scores
#
# NaN spreads through a softmax to every token. `torch.argmax` does not mind: it calls
# NaN the largest. So greedy and the filters refuse a row whose best score is not a
# finite number.
# ChatGLM does the opposite and says token 5: see `guard_invalid` in
# {ref}`ch-half-precision`.

# %%
broken = torch.tensor([[0.5, math.nan, 2.0]])
confirm("the softmax is NaN throughout", broken.softmax(-1).isnan().all())
confirm("argmax points at the NaN", broken.argmax() == 1)
attempts = (
    lambda: greedy(broken),
    lambda: Sample(temperature=0.0),
    lambda: Sample(top_p=80.0),
    lambda: Sample(min_p=-0.1),
    lambda: Sample(repetition_penalty=0.0),
)
for attempt in attempts:
    try:
        attempt()
    except ValueError as error:
        print(error)

# %% [markdown]
# :::{admonition} Break it
# :class: break-it
# Two mistakes that run without complaint, on most days. **One:** top-p drops the token
# that crosses the border, instead of the first one behind it. **Two:** temperature is
# applied to probabilities instead of scores, and the result normalised.
# :::


# %%
def wrong_top_p(logits, p):
    best_first, ids = logits.sort(descending=True, dim=-1)
    too_far = best_first.softmax(-1).cumsum(-1) > p  # the crossing one, too
    return logits.masked_fill(too_far.scatter(1, ids, too_far), -torch.inf)


for name, scores in (("unsure", unsure), ("sure", sure)):
    left = wrong_top_p(scores, 0.7).isfinite().sum().item()
    right = top_p(scores, 0.7).isfinite().sum().item()
    print(f"{name}: top-p 0.7 should keep {right}, and keeps {left}")
confirm("nothing left, so NaN", wrong_top_p(sure, 0.7).softmax(-1).isnan().all())

plain = unsure.double().softmax(-1)
lukewarm = (plain / 0.3) / (plain / 0.3).sum(-1, keepdim=True)
confirm("temperature after the softmax does nothing", torch.allclose(lukewarm, plain))

# %% [markdown]
# The first shows only where the model is sure, and there nothing is left to draw. The
# second never shows at all: you turn the knob, and nothing happens.
#
# ## Exercises
#
# Write your function in a cell of your own and give it to `check`. A question takes its
# name and a letter: `check("ten_seeds", "a")`.

# %%
from annotated_src.exercises import check  # noqa: F401 - for your cells
from annotated_src.exercises.sampling import chapter as exercises

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("top_p_shares")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("top_p_shares")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
top_p_shares = exercises["top_p_shares"].solution
noisy = 3 * torch.randn(40, 300, generator=generator(0))
confirm(
    "as the package's temperature, top-p and softmax",
    torch.allclose(
        top_p_shares(noisy, 0.7, 0.8),
        top_p(temperature(noisy, 0.7), 0.8).softmax(-1),
        atol=1e-6,
    ),
)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("repetition_penalty")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("repetition_penalty")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
mine = exercises["repetition_penalty"].solution(noisy, tokens, 1.3)
confirm("as the package's", torch.equal(mine, repetition_penalty(noisy, tokens, 1.3)))

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("frequency_penalty")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("frequency_penalty")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
frequency_penalty = exercises["frequency_penalty"].solution
confirm(
    "does not see a constant",
    torch.allclose(
        frequency_penalty(noisy + 10, tokens, 0.5).softmax(-1),
        frequency_penalty(noisy, tokens, 0.5).softmax(-1),
        atol=1e-6,
    ),
)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("draw_without_return")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("draw_without_return")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
shares = unsure.softmax(-1)
for seed in range(5):
    times = torch.empty_like(shares).exponential_(generator=generator(seed))
    mine = exercises["draw_without_return"].solution(shares, times, 4)
    theirs = torch.multinomial(shares, 4, generator=generator(seed))
    confirm(f"seed {seed}: the same four", torch.equal(mine, theirs))

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("ten_seeds")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("ten_seeds")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
for t in (0.7, 1.5):
    shares = Sample(temperature=t, top_k=1).probabilities(unsure, start[:1])
    confirm(f"top-k 1 at {t}: one token has all", shares.max() == 1)
cold, hot = (
    Sample(temperature=t, top_p=0.01).probabilities(unsure, start[:1]) for t in (1, 2.0)
)
confirm("top-p 0.01: one token at temperature 1", (cold > 0).sum() == 1)
confirm("two at temperature 2: the best has less than 1 %", (hot > 0).sum() == 2)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("fast_min_p")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("fast_min_p")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
given, mended = exercises["fast_min_p"].given, exercises["fast_min_p"].solution
below = torch.tensor([[-1.0, -2.0, -3.0]])
kept = [given(below + c, 0.1).isfinite().sum().item() for c in (0, 2, 4, 40)]
print("constants 0, 2, 4, 40 added: the given one keeps", kept)
confirm("nothing, where scores are below zero", kept[0] == 0)
confirm("a constant changes what it keeps", len(set(kept)) > 1)
confirm("with ln m: as min_p", torch.equal(mended(noisy, 0.1), min_p(noisy, 0.1)))

# %% [markdown]
# ## What to remember
#
# - A distribution is a strip of length 1. A filter cuts its end off, the softmax stretches
#   the rest, and a dart chooses.
# - Greedy text loops, and each round makes the next likelier.
# - Temperature divides scores. It keeps the order; entropy rises with it, at the rate
#   $\operatorname{Var}(z)/t^3$.
# - Top-k cuts at a place, top-p at a sum, min-p at a share of the best. Only the last two
#   notice whether the model is sure.
# - The repetition penalty depends on where the scores' zero is, and it punishes commas too.
# - The order is part of the setting: penalty, temperature, top-k, top-p, min-p.
#   transformers adds top-k 50 unless told otherwise.
#
# ## Where to read on
#
# In the original: transformers, `src/transformers/generation/logits_process.py`, the
# classes of the ladder above; `generation/utils.py`,
# `GenerationMixin._get_logits_processor` (who comes in, and in what order) and
# `_sample` (softmax, `torch.multinomial`); `generation/configuration_utils.py`,
# `GenerationConfig._get_default_generation_params` (the 50). In PyTorch,
# `aten/src/ATen/native/Distributions.cpp`, `multinomial` (the race). Papers: Holtzman
# et al. {cite:p}`holtzman2020` on loops and on top-p. Next: {ref}`ch-pipeline` puts all
# stations together.
