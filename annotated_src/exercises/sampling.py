"""Exercises on choosing the next token: cuts, penalties, and the draw."""

import functools
import math

import torch

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.exercise import Choice

chapter = Chapter("text/05_sampling", "Choosing the next token")


def ties_in_order(found, logits, temperature, p):
    """Let the first of equal scores have what any of them has: equals are free."""
    if not isinstance(found, torch.Tensor) or found.shape != logits.shape:
        return found
    fall = functools.partial(torch.argsort, dim=-1, descending=True, stable=True)
    by_share = fall(found)
    by_score = fall(logits.gather(1, by_share))
    kept = found.gather(1, by_share).gather(1, by_score)
    return torch.zeros_like(found).scatter(1, fall(logits), kept)


@chapter.implement(
    title="top-p, with a temperature",
    minutes=15,
    difficulty="hard",
    section="Three cuts",
    text="""
Write `top_p_shares`, without looking it up. Of each row keep the most likely tokens, as
few as have a probability of `p` or more together; the others get 0, and those that stay
are scaled to sum to 1. The temperature acts first. (Which of several equal tokens stays
does not matter.)
""",
    hints=(
        "Sort, sum up, cut, and put back. At which token has the sum reached `p`, and "
        "does that token stay?",
        "A token goes if the tokens *before* it have `p` already. To put back what was "
        "sorted: `scatter`, with the ids that the sort gives.",
    ),
    proves="Each row keeps the fewest tokens that reach p, at least one, also where "
    "the sum hits p exactly; in their places, with their ratios, after the "
    "temperature.",
    atol=1e-6,
    observe=ties_in_order,
)
def top_p_shares(logits, temperature, p):
    """(B, V) scores, a number, 0 < p <= 1 -> (B, V) probabilities, rows sum to 1."""
    shares = (logits / temperature).softmax(dim=1)
    best_first, ids = shares.sort(dim=1, descending=True)
    before = best_first.cumsum(dim=1) - best_first
    kept = best_first.where(before < p, 0.0)
    kept = kept / kept.sum(dim=1, keepdim=True)
    return kept.scatter(1, ids, kept)


SHARES = (0.36, 0.24, 0.16, 0.12, 0.08, 0.04)  # sums 0.36 0.60 0.76 0.88 0.96


def shuffled(draw, temperature, sharp=1.0):
    """Make scores that have SHARES at a temperature, in some order, shifted."""
    order = torch.tensor(draw.permutation(len(SHARES)))
    return sharp * temperature * torch.tensor(SHARES).log()[order] + draw.normal(1)


@top_p_shares.cases
def _(draw):
    small = torch.tensor([0.2, 0.5, 0.3])
    yield small.log()[None], 1.0, 0.6
    yield torch.zeros(1, 4), 1.0, 0.5
    yield 2 * small.log()[None], 2.0, 0.6
    yield torch.stack([2 * small.log(), 2 * small.flip(0).log() + 3]), 2.0, 0.9
    yield torch.stack([5 * small.log(), small.log() - 1]), 1.0, 0.7
    for temperature, p in ((1.0, 0.7), (0.5, 0.9), (2.0, 0.5), (1.5, 0.3)):
        rows = [shuffled(draw, temperature) for _ in range(4)]
        yield (
            torch.stack([*rows, shuffled(draw, temperature, sharp=6.0)]),
            temperature,
            p,
        )


@top_p_shares.also("loops")
def _(logits, temperature, p):
    rows = []
    for scores in logits.tolist():
        best = max(scores)
        weights = [math.exp((z - best) / temperature) for z in scores]
        whole, total, row = sum(weights), 0.0, [0.0] * len(scores)
        for i in sorted(range(len(scores)), key=lambda i: -weights[i]):
            if total >= p:
                break
            row[i] = weights[i]
            total += weights[i] / whole
        rows.append([w / sum(row) for w in row])
    return torch.tensor(rows)


@top_p_shares.also("the tail from the other end, as transformers has it")
def _(logits, temperature, p):
    logits = logits / temperature
    rising, ids = logits.sort(dim=-1)
    out = rising.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    out[:, -1] = False
    return logits.masked_fill(out.scatter(1, ids, out), -torch.inf).softmax(dim=-1)


@top_p_shares.also("each row's smallest share that stays")
def _(logits, temperature, p):
    shares = torch.softmax(logits / temperature, dim=1)
    best_first = shares.sort(dim=1, descending=True).values
    count = (best_first.cumsum(1) < p).sum(dim=1, keepdim=True)
    ids = shares.topk(shares.shape[1]).indices
    places = ids.argsort(dim=1)  # the place of each token, best first
    kept = torch.where(places <= count, shares, 0.0)
    return torch.nn.functional.normalize(kept, p=1.0, dim=1)


@top_p_shares.mistake(
    "the crossing token dropped",
    because="“at most p” sounds like the same border from the other side; where the "
    "best token alone has more than p, nothing is left",
    section="Broken scores",
)
def _(logits, temperature, p):
    logits = logits / temperature
    best_first, ids = logits.sort(dim=-1, descending=True)
    out = best_first.softmax(dim=-1).cumsum(dim=-1) > p
    return logits.masked_fill(out.scatter(1, ids, out), -torch.inf).softmax(dim=-1)


@top_p_shares.mistake(
    "one more where the sum is p exactly",
    because="`<=` and `<` differ only where a sum hits the border, and that seems "
    "never to happen; equal scores do it every time",
)
def _(logits, temperature, p):
    logits = logits / temperature
    best_first, ids = logits.sort(dim=-1, descending=True)
    shares = best_first.softmax(dim=-1)
    out = shares.cumsum(dim=-1) - shares > p
    return logits.masked_fill(out.scatter(1, ids, out), -torch.inf).softmax(dim=-1)


@top_p_shares.mistake(
    "the sorted order not put back",
    because="the mask has the right shape and the right number of tokens; but it "
    "speaks of places in a ranking, and is laid over ids",
)
def _(logits, temperature, p):
    logits = logits / temperature
    shares = logits.sort(dim=-1, descending=True).values.softmax(dim=-1)
    out = shares.cumsum(dim=-1) - shares >= p
    return logits.masked_fill(out, -torch.inf).softmax(dim=-1)


@top_p_shares.mistake(
    "gather for scatter",
    because="`gather` brought the scores into order, so it should bring them back; it "
    "would need the inverse of the ids",
)
def _(logits, temperature, p):
    logits = logits / temperature
    best_first, ids = logits.sort(dim=-1, descending=True)
    shares = best_first.softmax(dim=-1)
    out = shares.cumsum(dim=-1) - shares >= p
    return logits.masked_fill(out.gather(1, ids), -torch.inf).softmax(dim=-1)


@top_p_shares.mistake(
    "the sum of scores",
    because="the filter comes before the softmax in every diagram; inside it needs "
    "one of its own, for p is a sum of probabilities",
)
def _(logits, temperature, p):
    logits = logits / temperature
    best_first, ids = logits.sort(dim=-1, descending=True)
    out = best_first.cumsum(dim=-1) - best_first >= p
    out[:, 0] = False
    return logits.masked_fill(out.scatter(1, ids, out), -torch.inf).softmax(dim=-1)


@top_p_shares.mistake(
    "the temperature last",
    because="temperature changes no rank, so its place seems free; it changes sums",
    section="The order",
)
def _(logits, temperature, p):
    best_first, ids = logits.sort(dim=-1, descending=True)
    shares = best_first.softmax(dim=-1)
    out = shares.cumsum(dim=-1) - shares >= p
    kept = logits.masked_fill(out.scatter(1, ids, out), -torch.inf)
    return (kept / temperature).softmax(dim=-1)


@top_p_shares.mistake(
    "temperature on probabilities",
    because="dividing by t evens out scores; dividing probabilities by t and "
    "normalising gives them back",
    section="Temperature",
)
def _(logits, temperature, p):
    shares = logits.softmax(dim=-1) / temperature
    shares = shares / shares.sum(dim=-1, keepdim=True)
    best_first, ids = shares.sort(dim=-1, descending=True)
    before = best_first.cumsum(dim=-1) - best_first
    kept = best_first.where(before < p, 0.0)
    return kept.scatter(1, ids, kept / kept.sum(dim=-1, keepdim=True))


@top_p_shares.mistake(
    "the first row's number for all",
    because="`topk` wants one number; but top-p is there because each row needs "
    "another",
)
def _(logits, temperature, p):
    logits = logits / temperature
    shares, ids = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    count = int((shares[0].cumsum(dim=-1) - shares[0] < p).sum())
    kept = shares.clone()
    kept[:, count:] = 0
    return kept.scatter(1, ids, kept / kept.sum(dim=-1, keepdim=True))


@top_p_shares.mistake(
    "one strip for the whole batch",
    because="`softmax` and `sort` over everything look right while the batch has one "
    "row",
)
def _(logits, temperature, p):
    logits = logits / temperature
    flat = logits.flatten()
    best_first, ids = flat.softmax(0).sort(descending=True)
    out = best_first.cumsum(0) - best_first >= p
    kept = flat.masked_fill(out.scatter(0, ids, out), -torch.inf)
    return kept.view_as(logits).softmax(dim=-1)


@top_p_shares.mistake(
    "0 for minus infinity",
    because="0 is nothing, among probabilities; among scores it is a score, often a "
    "good one",
)
def _(logits, temperature, p):
    logits = logits / temperature
    best_first, ids = logits.sort(dim=-1, descending=True)
    shares = best_first.softmax(dim=-1)
    out = shares.cumsum(dim=-1) - shares >= p
    return logits.masked_fill(out.scatter(1, ids, out), 0.0).softmax(dim=-1)


@top_p_shares.mistake(
    "not stretched",
    because="the kept have their probabilities already; but a dart that lands where "
    "nothing is left hits nothing",
)
def _(logits, temperature, p):
    shares = (logits / temperature).softmax(dim=-1)
    best_first, ids = shares.sort(dim=-1, descending=True)
    before = best_first.cumsum(dim=-1) - best_first
    kept = best_first.where(before < p, 0.0)
    return kept.scatter(1, ids, kept)


@top_p_shares.mistake(
    "the worst first",
    because="`sort` rises by default, and the sum still reaches p",
)
def _(logits, temperature, p):
    shares = (logits / temperature).softmax(dim=-1)
    rising, ids = shares.sort(dim=-1)
    before = rising.cumsum(dim=-1) - rising
    kept = rising.where(before < p, 0.0)
    return kept.scatter(1, ids, kept / kept.sum(dim=-1, keepdim=True))


@chapter.implement(
    title="the repetition penalty",
    minutes=8,
    difficulty="moderate",
    section="The repetition penalty",
    text="""
Write `repetition_penalty`, without looking it up. With a penalty above 1, each token
that a row has in `tokens` becomes less likely; how often it came does not matter.
""",
    hints=(
        "What does dividing by 1.3 do to a score of -2?",
        "Scores below 0 are multiplied, the others divided. Then choose, for each "
        "place, between the old score and the new.",
    ),
    proves="Scores go down whatever their sign, once for each token that came, in its "
    "own row, and all others stay.",
)
def repetition_penalty(logits, tokens, penalty):
    """(B, V) scores, (B, S) ids, a number -> (B, V) scores."""
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
    has_come = torch.zeros_like(logits, dtype=torch.bool).scatter(1, tokens, True)
    return torch.where(has_come, penalised, logits)


@repetition_penalty.cases
def _(draw):
    yield torch.tensor([[3.0, 1.0, -2.0]]), torch.tensor([[2, 0]]), 2.0
    yield torch.tensor([[1.0, 2.0], [3.0, -4.0]]), torch.tensor([[0], [1]]), 2.0
    yield torch.tensor([[4.0, 2.0, -1.0, 0.0]]), torch.tensor([[0, 2, 3, 0]]), 2.0
    yield 5 * draw.normal(3, 9), draw.integers(0, 9, 3, 6), 1.3
    yield 5 * draw.normal(2, 7) - 9, draw.integers(0, 7, 2, 5), 1.1
    yield 5 * draw.normal(2, 7), draw.integers(0, 7, 2, 5), 0.8


repetition_penalty.equivalent(
    "penalised = torch.where(logits <= 0, logits * penalty, logits / penalty)",
    because="0 stays 0, multiplied or divided",
)


@repetition_penalty.also("loops")
def _(logits, tokens, penalty):
    rows = logits.tolist()
    for row, ids in zip(rows, tokens.tolist(), strict=True):
        for i in set(ids):
            row[i] = row[i] / penalty if row[i] > 0 else row[i] * penalty
    return torch.tensor(rows)


@repetition_penalty.also("gather and scatter, as transformers has it")
def _(logits, tokens, penalty):
    score = logits.gather(1, tokens)
    score = torch.where(score < 0, score * penalty, score / penalty)
    return logits.scatter(1, tokens, score)


@repetition_penalty.also("powers")
def _(logits, tokens, penalty):
    vocabulary = torch.arange(logits.shape[-1])
    has_come = (tokens[:, :, None] == vocabulary).any(dim=1)
    return logits * penalty ** (-logits.sign() * has_come)


@repetition_penalty.mistake(
    "divided, whatever the sign",
    because="the paper's formula divides; a negative score that is divided goes *up*",
    section="The ladder of equality",
)
def _(logits, tokens, penalty):
    return logits.scatter(1, tokens, logits.gather(1, tokens) / penalty)


@repetition_penalty.mistake(
    "the two signs exchanged",
    because="multiplying makes larger and dividing smaller; below 0 it is the other "
    "way round, and so it is easy to turn both",
)
def _(logits, tokens, penalty):
    score = logits.gather(1, tokens)
    score = torch.where(score < 0, score / penalty, score * penalty)
    return logits.scatter(1, tokens, score)


@repetition_penalty.mistake(
    "once for each time",
    because="a loop over the tokens so far does it, and more repetition seems to "
    "deserve more; that is the frequency penalty",
)
def _(logits, tokens, penalty):
    logits = logits.clone()
    for row, ids in zip(logits, tokens.tolist(), strict=True):
        for i in ids:
            row[i] = row[i] * penalty if row[i] < 0 else row[i] / penalty
    return logits


@repetition_penalty.mistake(
    "the last token only",
    because="a loop says the same word again and again; but most loops are sentences",
    section="Always the best?",
)
def _(logits, tokens, penalty):
    last = tokens[:, -1:]
    score = logits.gather(1, last)
    score = torch.where(score < 0, score * penalty, score / penalty)
    return logits.scatter(1, last, score)


@repetition_penalty.mistake(
    "every row's tokens for every row",
    because="`logits[:, tokens]` takes all ids that come anywhere, in all rows; with "
    "one row there is no difference",
)
def _(logits, tokens, penalty):
    ids = tokens.flatten().expand(len(logits), -1)
    score = logits.gather(1, ids)
    score = torch.where(score < 0, score * penalty, score / penalty)
    return logits.scatter(1, ids, score)


@repetition_penalty.mistake(
    "subtracted",
    because="other penalties subtract (presence, frequency), and do not ask for a "
    "sign; this one scales",
)
def _(logits, tokens, penalty):
    return logits.scatter(1, tokens, logits.gather(1, tokens) - penalty)


@repetition_penalty.mistake(
    "of log-probabilities",
    because="these are never above 0, and a constant would not matter any more. It "
    "would be the better rule; but it is another one",
)
def _(logits, tokens, penalty):
    logits = logits.log_softmax(dim=-1)
    return logits.scatter(1, tokens, logits.gather(1, tokens) * penalty)


@chapter.implement(
    title="a penalty that counts",
    minutes=8,
    difficulty="moderate",
    section="The repetition penalty",
    text=r"""
A *frequency penalty* subtracts $\alpha$ from a token's score for each time that the row
has it in `tokens`. Write it.
""",
    hints=(
        "You need a table (B, V) of how often each token came in each row.",
        "What does `times[rows, tokens] += 1` do with an id that stands there twice? "
        "`scatter_add` was made for this.",
    ),
    proves="Each time counts, in its own row, and a token that never came keeps its "
    "score.",
    why="A constant added to all scores changes nothing of what it does: it "
    "subtracts, and asks for no sign.",
)
def frequency_penalty(logits, tokens, alpha):
    """(B, V) scores, (B, S) ids, a number -> (B, V) scores."""
    ones = torch.ones(tokens.shape)
    times = torch.zeros_like(logits).scatter_add(1, tokens, ones)
    return logits - alpha * times


@frequency_penalty.cases
def _(draw):
    yield torch.tensor([[4.0, 2.0, -1.0]]), torch.tensor([[2, 0, 2]]), 0.5
    yield torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0, 0], [1, 0]]), 2.0
    yield torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1, 0, 1]]), 1.0
    yield 3 * draw.normal(3, 6), draw.integers(0, 6, 3, 9), 0.7
    yield 3 * draw.normal(2, 9), draw.integers(0, 9, 2, 4), 1.5


@frequency_penalty.also("loops")
def _(logits, tokens, alpha):
    logits = logits.clone()
    for b in range(tokens.shape[0]):
        for s in range(tokens.shape[1]):
            logits[b, tokens[b, s]] -= alpha
    return logits


@frequency_penalty.also("one-hot vectors")
def _(logits, tokens, alpha):
    one_hot = torch.nn.functional.one_hot(tokens, logits.shape[1])
    return logits - alpha * one_hot.sum(dim=1)


@frequency_penalty.also("bincount, row by row")
def _(logits, tokens, alpha):
    size = logits.shape[1]
    return logits - alpha * torch.stack([t.bincount(minlength=size) for t in tokens])


def wrong_frequency(count, change):
    """Make a penalty from another count of (B, V) tokens and another use of it."""

    def penalty(logits, tokens, alpha):
        one_hot = torch.nn.functional.one_hot(tokens, logits.shape[1])
        return change(logits, alpha, count(one_hot).to(logits.dtype))

    return penalty


@frequency_penalty.mistake(
    "once, however often",
    because="`times[rows, tokens] += 1` looks as if it counted. It reads all, adds, "
    "and writes all: an id that stands there twice gets 1",
)
def _(logits, tokens, alpha):
    times = torch.zeros_like(logits)
    times[torch.arange(len(tokens))[:, None], tokens] += 1
    return logits - alpha * times


@frequency_penalty.mistake(
    "a table as long as the largest id",
    because="`one_hot` and `bincount` guess its length from the ids they see, and a "
    "long text may hold the last one; most do not",
)
def _(logits, tokens, alpha):
    return logits - alpha * torch.nn.functional.one_hot(tokens).sum(dim=1)


frequency_penalty.mistake(
    "a reward",
    because="the sign is easy to lose between `alpha` and a penalty that is negative",
)(wrong_frequency(lambda o: o.sum(1), lambda z, a, n: z + a * n))
frequency_penalty.mistake(
    "a share instead of a count",
    because="a frequency is a share, in statistics; then a long text is punished no "
    "more than a short one",
)(wrong_frequency(lambda o: o.double().mean(1), lambda z, a, n: z - a * n))
frequency_penalty.mistake(
    "the whole batch counted together",
    because="`bincount` takes one list of ids, and a batch of one row is one list",
)(
    wrong_frequency(
        lambda o: o.sum((0, 1), keepdim=True)[0].expand(len(o), -1),
        lambda z, a, n: z - a * n,
    )
)
frequency_penalty.mistake(
    "scaled instead of subtracted",
    because="the repetition penalty scales; this one comes from another family",
)(wrong_frequency(lambda o: o.sum(1), lambda z, a, n: z / (1 + a) ** n))
frequency_penalty.mistake(
    "from the second time on",
    because="the first time is no repetition; but the rule counts each time",
)(wrong_frequency(lambda o: (o.sum(1) - 1).clamp(min=0), lambda z, a, n: z - a * n))


@chapter.implement(
    title="several different tokens in one draw",
    minutes=8,
    difficulty="moderate",
    section="The draw, as torch does it",
    text="""
Beam search that samples wants several *different* tokens in one draw. The race makes it
easy: do not stop at the winner. `times` are the random times $E_i$; token $i$ arrives
at $E_i / p_i$. Return the first `n` to arrive.
""",
    hints=(
        "When does a token with probability 0 arrive?",
        "Divide; then the smallest `n`, in the order in which they arrive.",
    ),
    proves="Likely tokens arrive sooner, nobody arrives twice, and a token without "
    "probability comes last.",
    why="With `times` drawn by `exponential_`, these are the tokens that "
    "`torch.multinomial` draws without replacement for the same seed.",
)
def draw_without_return(shares, times, n):
    """(B, V) probabilities, (B, V) times, a number -> (B, n) ids, first come first."""
    return (times / shares).argsort(dim=1)[:, :n]


@draw_without_return.cases
def _(draw):
    yield torch.tensor([[0.2, 0.5, 0.3]]), torch.tensor([[0.4, 1.5, 0.3]]), 2
    yield torch.tensor([[0.0, 0.6, 0.4]]), torch.tensor([[1e-9, 1.8, 0.8]]), 2
    for batch, size, n in ((3, 5, 4), (2, 9, 3), (4, 6, 1)):
        shares = draw.normal(batch, size).softmax(dim=-1)
        yield shares, -draw.uniform(batch, size, low=0.01).log(), n


@draw_without_return.also("best first, of the inverse")
def _(shares, times, n):
    return (shares / times).topk(n, dim=-1).indices


@draw_without_return.also("noisy scores (Gumbel)")
def _(shares, times, n):
    return (shares.log() - times.log()).topk(n, dim=-1).indices


@draw_without_return.also("a loop over arrivals")
def _(shares, times, n):
    rows = []
    for p, e in zip(shares.tolist(), times.tolist(), strict=True):
        running = {i for i in range(len(p)) if p[i] > 0}
        row = []
        while len(row) < n:
            row.append(min(running, key=lambda i: e[i] / p[i]))
            running.remove(row[-1])
        rows.append(row)
    return torch.tensor(rows)


def wrong_race(order):
    """Make a draw that takes the n largest of something else."""

    def draw(shares, times, n):
        return order(shares, times).topk(n, dim=-1).indices

    return draw


draw_without_return.mistake(
    "the last to arrive",
    because="`topk` gives the largest, and large sounds likely; here a large time is "
    "late",
)(wrong_race(lambda p, e: e / p))
draw_without_return.mistake(
    "multiplied by the share",
    because="likely tokens should get a bonus; a time that is multiplied by much is a "
    "late one",
)(wrong_race(lambda p, e: -e * p))
draw_without_return.mistake(
    "a little added to the divisor",
    because="dividing by 0 looks forbidden; in a tensor it gives infinity, and that "
    "is when a token without probability arrives",
)(wrong_race(lambda p, e: -e / (p + 1e-8)))
draw_without_return.mistake(
    "plus for minus in the logarithm",
    because="noise is added to scores, in words; the noise is $-\\ln E$",
)(wrong_race(lambda p, e: p.log() + e.log()))
draw_without_return.mistake(
    "the likeliest",
    because="the first to arrive are probably the likeliest; but then no seed changes "
    "anything, as in beam search that does not sample",
)(wrong_race(lambda p, e: p))
draw_without_return.mistake(
    "an even race",
    because="the times are random already; without the shares every token is as likely "
    "as any other",
)(wrong_race(lambda p, e: -e))


@draw_without_return.mistake(
    "the winner, again and again",
    because="`n` draws are `n` times one draw; but these are with replacement, and the "
    "same times give the same winner",
)
def _(shares, times, n):
    return (times / shares).argmin(dim=-1, keepdim=True).expand(-1, n)


@draw_without_return.mistake(
    "in the order of ids",
    because="a set has no order, and sorted it looks tidy; but the first to arrive is "
    "the draw of one",
)
def _(shares, times, n):
    return (shares / times).topk(n, dim=-1).indices.sort(dim=-1).values


chapter.explain(
    "ten_seeds",
    title="ten seeds, one text",
    minutes=5,
    difficulty="easy",
    section="Three cuts",
    text="""
A friend sets `temperature=0.7, top_k=1` and wonders why ten seeds give ten times the
same text. Another sets `top_p=0.01` and gets that text, too, though not on every model.
Why?
""",
    hints=(
        "How many tokens are left to draw from?",
        "And how many does it take to have 1 %, if the model is sure? If it is not?",
    ),
    choices={
        "a": Choice(
            "Both leave one token to draw from: top-k 1 always, top-p 0.01 if the "
            "best has 1 % or more.",
            "With $k = 1$ only the best token stays, and its renormalised probability "
            "is 1 at any temperature: that is greedy (but for exact ties, which top-k "
            "keeps). Top-p 0.01 keeps the fewest tokens that have 1 % between them. "
            "Where the best has less, two or more stay, and the seed matters again.",
        ),
        "b": Choice(
            "Temperature 0.7 is too cold; at 1.5 the texts would differ.",
            "Temperature changes no rank. One token is left at any temperature, and "
            "one token that is left has probability 1.",
        ),
        "c": Choice(
            "The temperature comes before the cut; after it, the texts would differ.",
            "The order changes what a cut by sums keeps. Top-k keeps the same either "
            "way, and no temperature spreads what one token has.",
        ),
        "d": Choice(
            "The seed was set, but the draw comes from another generator.",
            "That happens, too. But here no draw could change anything: with one token "
            "left, every dart hits it.",
        ),
    },
    right="a",
)


@chapter.debug(
    title="a fast min-p",
    minutes=10,
    difficulty="moderate",
    section="Three cuts",
    text="""
A min-p without the softmax, “to save time”. It seems to work. Then the same scores, all
smaller by 10, keep other tokens, or none. Put it right, still without a softmax: keep
what is at least `m` times as likely as the best, $0 < m \\le 1$.
""",
    hints=(
        "A share of the best *probability*: what is that, in scores?",
        "$p_i \\ge m\\, p_{(1)}$. Take logarithms of both sides.",
    ),
    proves="What stays is at least m times as likely as the row's best, whatever "
    "constant the scores have; with m = 1 the best stays.",
    why="$p_i \\ge m\\, p_{(1)}$ is $z_i \\ge z_{(1)} + \\ln m$: the sum in the "
    "softmax cancels. A share of a score means nothing, for scores have no zero.",
)
def fast_min_p(logits, m):
    """(B, V) scores, a number -> (B, V) scores, -inf at what goes."""
    border = logits.amax(dim=1, keepdim=True) + math.log(m)
    return logits.masked_fill(logits < border, -torch.inf)


@fast_min_p.broken(
    "a share of the best score",
    because="min-p is a share of the best, and scores stand for probabilities; with "
    "scores of about 10 it even looks right",
    section="The repetition penalty",
)
def _(logits, m):
    border = m * logits.amax(dim=1, keepdim=True)
    return logits.masked_fill(logits < border, -torch.inf)


@fast_min_p.cases
def _(draw):
    yield torch.tensor([[-1.0, -2.0, -4.0]]), 0.1
    yield torch.tensor([[2.0, 1.0, 2.0]]), 1.0
    yield torch.tensor([[9.0, 5.0, 8.5], [0.5, -5.0, 0.0]]), 0.3
    yield torch.tensor([[120.0, 100.0, 119.5]]), 0.3
    # steps of 1/4, so that no score is near a border
    for m, shift in ((0.05, 0.0), (0.4, -130.0), (0.15, 7.0)):
        yield draw.integers(-16, 17, 4, 30) / 4 + shift, m


@fast_min_p.mistake(
    "exp of the scores as they are",
    because="the probabilities are $e^z$ but for a factor, and it cancels; in float32, "
    "though, $e^{100}$ is infinite and $e^{-110}$ is 0, and the ratio is lost",
    section="A strip and a dart",
)
def _(logits, m):
    shares = logits.exp()
    best = shares.amax(dim=1, keepdim=True)
    return logits.masked_fill(shares < m * best, -torch.inf)


@fast_min_p.also("a row at a time")
def _(logits, m):
    rows = []
    for scores in logits.tolist():
        best = max(scores)
        rows.append([z if math.exp(z - best) >= m else -math.inf for z in scores])
    return torch.tensor(rows)


@fast_min_p.also("with the softmax")
def _(logits, m):
    shares = logits.softmax(dim=-1)
    best = shares.max(dim=-1, keepdim=True).values
    return torch.where(shares >= m * best, logits, -torch.inf)


def wrong_min_p(border, goes=torch.lt):
    """Make a cut at another border."""

    def cut(logits, m):
        return logits.masked_fill(goes(logits, border(logits, m)), -torch.inf)

    return cut


fast_min_p.mistake(
    "minus the logarithm",
    because="a border is below the best, so something is subtracted; but $\\ln m$ is "
    "negative already",
)(wrong_min_p(lambda z, m: z.amax(-1, keepdim=True) - math.log(m)))
fast_min_p.mistake(
    "one best for the whole batch",
    because="`max()` without `dim` is right for one row",
)(wrong_min_p(lambda z, m: z.max() + math.log(m)))
fast_min_p.mistake(
    "what equals the border goes",
    because="“less than m times” and “at most m times” are taken for the same; with m "
    "= 1 the best itself goes",
)(wrong_min_p(lambda z, m: z.amax(-1, keepdim=True) + math.log(m), torch.le))
fast_min_p.mistake(
    "a logarithm to base 2",
    because="bits are what one thinks in; scores are natural logarithms, for the "
    "softmax uses $e$",
    section="A strip and a dart",
)(wrong_min_p(lambda z, m: z.amax(-1, keepdim=True) + math.log2(m)))
fast_min_p.mistake(
    "m subtracted from the score",
    because="a little below the best is what is meant; how much below is the "
    "logarithm's business",
)(wrong_min_p(lambda z, m: z.amax(-1, keepdim=True) - m))
fast_min_p.mistake(
    "at least 1 - m of the best",
    because="top-p's code compares with `1 - p`, and the two look alike; there it is "
    "the tail's sum, here a share of the best",
)(
    wrong_min_p(
        lambda z, m: z.amax(-1, keepdim=True) + (math.log1p(-m) if m < 1 else -math.inf)
    )
)
