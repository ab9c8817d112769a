"""Exercises on attention written out, masks, and one pass over the keys."""

import math

import torch
from torch.nn import functional as F

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.exercise import Choice

chapter = Chapter("llama/05_attention", "Attention and its mask")


@chapter.implement(
    title="attention, written out",
    minutes=10,
    difficulty="moderate",
    section="The mask",
    text=r"""
Write attention from memory: scores, mask, softmax, weighted mean. There are as many
heads of keys as of queries, and True in the mask means *may look*. Values may have
another width than keys: $H$ and $H_v$. Scores may have any size, and each query sees
at least one key.
""",
    hints=(
        "Five steps: product, scale, mask, softmax, product. Whose width is under the "
        "root?",
        "A hidden score must become so low that its power is zero, *before* the "
        "softmax. The weights of one query sum to one over the keys, the last axis.",
    ),
    proves="Each query gets the weighted mean of the values that its row of the mask "
    "lets it see, and of no others, whatever the size of the scores.",
)
def masked_attention(queries, keys, values, mask):
    """(B, N, T, H), (B, N, S, H), (B, N, S, Hv), (B, 1, T, S) -> (B, N, T, Hv)."""
    scores = queries @ keys.mT / math.sqrt(queries.shape[-1])
    scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1) @ values


def some_mask(draw, batch, new, cached):
    """Draw a causal mask that also hides a few old keys: (B, 1, T, S)."""
    causal = torch.ones(new, new + cached, dtype=torch.bool).tril(cached)
    shown = draw.integers(0, 2, batch, 1, 1, new + cached).bool()
    itself = torch.eye(new + cached, dtype=torch.bool)[cached:]
    return causal & shown | itself


@masked_attention.cases
def _(draw):
    queries, values = ((10 * draw.normal(1, 1, n, 2)).round() / 10 for n in (2, 3))
    keys = torch.cat((values[:, :, :2].flip(2), queries[:, :, :1]), dim=2)
    mask = torch.ones(1, 1, 2, 3, dtype=torch.bool).tril(1)
    yield queries, keys, values[..., :1], mask  # what is hidden fits the query well
    for batch, heads, new, cached, width, wide in (
        (2, 3, 4, 0, 5, 2),
        (3, 2, 2, 3, 4, 6),
    ):
        queries = draw.normal(batch, heads, new, width)
        keys = draw.normal(batch, heads, new + cached, width)
        values = draw.normal(batch, heads, new + cached, wide)
        yield queries, keys, values, some_mask(draw, batch, new, cached)
    # Scores of -131072, -131071 and so on: fills that look low enough stand above them.
    keys = torch.tensor(draw.permutation(4))[None, None, :, None] / 256 - 512
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    yield torch.full((1, 1, 4, 1), 256.0), keys, draw.normal(1, 1, 4, 1), mask


@masked_attention.also("loops over queries and keys")
def _(queries, keys, values, mask):
    batch, heads, new, width = queries.shape
    out = torch.zeros(batch, heads, new, values.shape[-1])
    for b in range(batch):
        for n in range(heads):
            for t in range(new):
                seen = [s for s in range(keys.shape[2]) if mask[b, 0, t, s]]
                scores = [
                    (queries[b, n, t] @ keys[b, n, s]).item() / width**0.5 for s in seen
                ]
                powers = [math.exp(score - max(scores)) for score in scores]
                for s, power in zip(seen, powers, strict=True):
                    out[b, n, t] += power / sum(powers) * values[b, n, s]
    return out


@masked_attention.also("einsum, and a mask that is added")
def _(queries, keys, values, mask):
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    scores = torch.einsum("bnth,bnsh->bnts", queries / keys.shape[-1] ** 0.5, keys)
    weights = (scores + added).softmax(-1)
    return torch.einsum("bnts,bnsv->bntv", weights, values)


@masked_attention.also("torch.nn.functional")
def _(queries, keys, values, mask):
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)


@masked_attention.also("powers, masked and divided by their sum")
def _(queries, keys, values, mask):
    scores = queries @ keys.transpose(2, 3) / math.sqrt(keys.shape[3])
    powers = (scores - scores.amax(dim=-1, keepdim=True)).exp() * mask
    return powers @ values / powers.sum(dim=-1, keepdim=True)


def wrong_attention(scale=None, hide=None, axis=-1):
    """Make an attention with one thing changed: scale, mask or axis."""

    def attend(queries, keys, values, mask):
        by = scale(queries, keys, values) if scale else queries.shape[-1] ** 0.5
        scores = queries @ keys.mT / by
        if hide is None:
            scores = scores.masked_fill(~mask, -torch.inf)
        else:
            scores = hide(scores, mask)
        return scores.softmax(dim=axis) @ values

    return attend


masked_attention.mistake(
    "no scale",
    because="softmax makes the weights sum to one anyway, so a common factor seems to "
    "cancel. A common summand would",
    section="Why the square root",
)(wrong_attention(lambda q, k, v: 1.0))
masked_attention.mistake(
    "divided by the width, not by its root",
    because="a dot product is a sum, and a mean divides by the count; what has to be "
    "undone is the spread, which grows with the root",
    section="Why the square root",
)(wrong_attention(lambda q, k, v: q.shape[-1]))
masked_attention.mistake(
    "scaled by the number of keys",
    because="the last axis of the *scores* is the keys, and `scores.shape[-1]` is near "
    "at hand; what is summed up in a score is features",
    section="Why the square root",
)(wrong_attention(lambda q, k, v: k.shape[-2] ** 0.5))
masked_attention.mistake(
    "scaled by the width of the values",
    because="in most models keys and values are equally wide, and any of them will do",
    section="Why the square root",
)(wrong_attention(lambda q, k, v: v.shape[-1] ** 0.5))
masked_attention.mistake(
    "softmax over the queries",
    because="a table has two axes, and both kinds of sums look like weights. It is a "
    "query that shares out its attention, so its row sums to one",
    section="A lookup that is never sure",
)(wrong_attention(axis=-2))
masked_attention.mistake(
    "the other polarity",
    because="`masked_fill(mask, ...)` reads well, and in `nn.MultiheadAttention` True "
    "is hidden; here True is visible",
)(wrong_attention(hide=lambda x, mask: x.masked_fill(mask, -torch.inf)))
masked_attention.mistake(
    "a fill that is too small",
    because="-10000 looks like minus infinity, and ChatGLM-6B fills it in; but nothing "
    "bounds scores from below, and the lowest ones are then those that may be seen",
    section="The ladder of equality",
)(wrong_attention(hide=lambda x, mask: x.masked_fill(~mask, -10_000.0)))
masked_attention.mistake(
    "hidden scores set to zero",
    because="zero sounds like nothing. To a softmax it is a score like any other, and "
    "its power is one",
)(wrong_attention(hide=lambda x, mask: x * mask))


@masked_attention.mistake(
    "mask after the softmax",
    because="hidden weights do become zero. But hidden scores still stand in the "
    "denominator, so rows sum to less than one and the future shows",
    section="The ladder of equality",
)
def _(queries, keys, values, mask):
    scores = queries @ keys.mT / math.sqrt(queries.shape[-1])
    weights = scores.softmax(dim=-1).masked_fill(~mask, 0)
    return weights @ values


@masked_attention.mistake(
    "powers that vanish",
    because="the softmax is powers divided by their sum, and with scores of about 1 "
    "that is all. Powers of scores below -104 are zero in float32, and so is their "
    "sum; the largest score has to be taken off first",
    section="A softmax that does not overflow",
)
def _(queries, keys, values, mask):
    powers = (queries @ keys.mT / math.sqrt(queries.shape[-1])).exp() * mask
    return powers / powers.sum(dim=-1, keepdim=True) @ values


@masked_attention.mistake(
    "no mask at all",
    because="a test with one new token passes: that one may see everything",
)
def _(queries, keys, values, mask):
    scores = queries @ keys.mT / math.sqrt(queries.shape[-1])
    return scores.softmax(dim=-1) @ values


@chapter.implement(
    title="one pass over the keys",
    minutes=15,
    difficulty="hard",
    section="A softmax that does not overflow",
    text=r"""
Attention of one query `(H,)`, keys `(S, H)` and values `(S, Hv)`, that reads each key
*once* and never holds more than one score. This is the seed of FlashAttention. Scores
may be in the thousands, of either sign. All numbers are float64, so the answer is, too.
(The check sees what comes back, not how you read: that part is up to you.)
""",
    hints=(
        "Keep three things: the largest score so far, the sum of powers relative to "
        "it, and the weighted sum of values relative to it.",
        r"When a larger score arrives, both sums were taken relative to the old peak. "
        r"One factor, $e^{\text{old} - \text{new}}$, puts them right.",
    ),
    proves="One pass gives the weighted mean of softmax, with scores that rise, that "
    "fall, and whose powers no float64 holds.",
    why="A softmax does not change when all its scores move by a constant. So each new "
    "peak may move the scores of the past, by one factor on both sums.",
    atol=1e-8,
    rtol=1e-7,
)
def online_attention(query, keys, values):
    """(H,), (S, H), (S, Hv) -> (Hv,): the softmax-weighted mean of the values."""
    peak, total, answer = -torch.inf, 0.0, 0.0
    for key, value in zip(keys, values, strict=True):
        score = (query @ key).item() / math.sqrt(len(query))
        higher = max(peak, score)
        correction, power = math.exp(peak - higher), math.exp(score - higher)
        total = total * correction + power
        answer = answer * correction + power * value
        peak = higher
    return answer / total


for start in ("1.0, 0.0", "-1.0, 0.0", "0.0, 1.0", "0.0, -1.0"):
    online_attention.equivalent(
        f"peak, total, answer = -torch.inf, {start}",
        because="the first correction is zero, whatever it multiplies",
    )
online_attention.equivalent(
    "for key, value in zip(keys, values, strict=False):",
    because="there are as many values as keys",
)


@online_attention.cases
def _(draw):
    double = torch.float64
    yield draw.normal(2, dtype=double), *draw.normal(2, 2, 2, dtype=double)
    yield (
        draw.normal(4, dtype=double),
        draw.normal(6, 4, dtype=double),
        draw.normal(6, 3, dtype=double),
    )
    width = 3
    query = 1 + draw.uniform(width).double()
    for sizes in (
        (2, 1500, 1501),
        (600, 601, 602, 601),
        (-3000, -3001, -3002, -3000),
        (1000, 3, 2),
    ):
        noise = draw.normal(len(sizes), width, dtype=double) / 10
        steps = torch.tensor(sizes, dtype=double)[:, None] * query / (query @ query)
        values = draw.normal(len(sizes), 2, dtype=double)
        yield query, (steps + noise) * math.sqrt(width), values


@online_attention.also("tensors all the way")
def _(query, keys, values):
    peak = torch.tensor(-torch.inf, dtype=query.dtype)
    total, answer = torch.zeros_like(peak), torch.zeros_like(values[0])
    for i in range(len(keys)):
        score = query @ keys[i] / query.shape[0] ** 0.5
        higher = torch.maximum(peak, score)
        correction, power = (peak - higher).exp(), (score - higher).exp()
        total, answer = (
            total * correction + power,
            answer * correction + power * values[i],
        )
        peak = higher
    return answer / total


@online_attention.also("the mean itself, moved towards each value")
def _(query, keys, values):
    logs, mean = (
        torch.tensor(-torch.inf, dtype=query.dtype),
        torch.zeros_like(values[0]),
    )
    for key, value in zip(keys, values, strict=True):
        score = query @ key / len(query) ** 0.5
        logs = torch.logaddexp(logs, score)
        mean = mean + (score - logs).exp() * (value - mean)
    return mean


@online_attention.also("all scores at once")
def _(query, keys, values):
    return (keys @ query / math.sqrt(len(query))).softmax(dim=0) @ values


def wrong_online(fix_total=True, fix_answer=True, divide=True, start=-torch.inf):
    """Make a pass over the keys with a correction, division or start changed."""

    def attend(query, keys, values):
        peak, total, answer = start, 0.0, torch.zeros_like(values[0])
        for key, value in zip(keys, values, strict=True):
            score = (query @ key).item() / math.sqrt(len(query))
            higher = max(peak, score)
            correction, power = math.exp(peak - higher), math.exp(score - higher)
            total = total * (correction if fix_total else 1) + power
            answer = answer * (correction if fix_answer else 1) + power * value
            peak = higher
        return answer / (total if divide else 1)

    return attend


online_attention.mistake(
    "the sum of powers keeps its old peak",
    because="the values are what one looks at; the sum in the denominator was taken "
    "relative to the old peak too",
)(wrong_online(fix_total=False))
online_attention.mistake(
    "the weighted values keep their old peak",
    because="the sum of powers looks like the only thing that depends on the peak",
)(wrong_online(fix_answer=False))
online_attention.mistake(
    "no correction",
    because="each power was right when it was added: but relative to another peak",
)(wrong_online(fix_total=False, fix_answer=False))
online_attention.mistake(
    "never divided",
    because="powers below one look like weights, and the largest is exactly one",
)(wrong_online(divide=False))
online_attention.mistake(
    "the peak starts at zero",
    because="a running maximum of counts starts at zero; scores may all be far below "
    "it, and then every power is zero and so is their sum",
)(wrong_online(start=0.0))


@online_attention.mistake(
    "no peak",
    because="the formula of softmax has no maximum in it, and with small scores it "
    "works",
)
def _(query, keys, values):
    total, answer = 0.0, torch.zeros_like(values[0])
    for key, value in zip(keys, values, strict=True):
        power = (query @ key / math.sqrt(len(query))).exp()
        total, answer = total + power, answer + power * value
    return answer / total


@online_attention.mistake(
    "the first score as the peak",
    because="any constant may be taken off, and the first score is at hand. Only the "
    "largest one keeps every power below one: later scores may be higher by thousands",
)
def _(query, keys, values):
    scale = math.sqrt(len(query))
    first, total, answer = query @ keys[0] / scale, 0.0, torch.zeros_like(values[0])
    for key, value in zip(keys, values, strict=True):
        power = (query @ key / scale - first).exp()
        total, answer = total + power, answer + power * value
    return answer / total


@online_attention.mistake(
    "no scale",
    because="the scale belongs to the scores, and here no table of scores is in sight",
    section="Why the square root",
)
def _(query, keys, values):
    return (keys @ query).softmax(dim=0) @ values


@chapter.implement(
    title="a window on the last tokens",
    minutes=10,
    difficulty="moderate",
    section="The mask",
    text="""
Some models let a token see only the last `window` tokens, itself included. `num_cached`
tokens came in earlier calls, `num_tokens` come now, and all of them are keys. Write the
mask, True where a token may look. For 3 new tokens after 2 and a window of 2, each row
has two ones, the last of them at column 2, 3, 4.
""",
    hints=(
        "Row t is the token at position `num_cached + t`. Write both limits as "
        "comparisons of two positions.",
        "The window of the token at position p begins at p - window + 1: test it with "
        "a window of one.",
    ),
    proves="Each new token sees exactly the last `window` positions up to its own, "
    "with and without a cache, in a window narrower or wider than the text.",
)
def window_mask(num_tokens, num_cached, window):
    """Three numbers -> bool (1, 1, T, S), S = num_cached + num_tokens."""
    here = num_cached + torch.arange(num_tokens)[:, None]
    there = torch.arange(num_cached + num_tokens)
    return ((there <= here) & (there > here - window))[None, None]


@window_mask.cases
def _(draw):
    yield 2, 1, 2
    yield 3, 2, 2
    yield 4, 0, 3
    yield 1, 5, 3
    yield 3, 4, 9
    yield 3, draw.integer(2, 5), 1
    yield draw.integer(3, 6), draw.integer(6, 9), draw.integer(2, 5)


@window_mask.also("two triangles")
def _(num_tokens, num_cached, window):
    everything = torch.ones(num_tokens, num_cached + num_tokens, dtype=torch.bool)
    band = everything.tril(num_cached).triu(num_cached - window + 1)
    return band[None, None]


@window_mask.also("loops over rows and columns")
def _(num_tokens, num_cached, window):
    mask = torch.zeros(1, 1, num_tokens, num_cached + num_tokens, dtype=torch.bool)
    for t in range(num_tokens):
        for s in range(num_cached + num_tokens):
            mask[0, 0, t, s] = 0 <= num_cached + t - s < window
    return mask


@window_mask.also("the bottom of the large one")
def _(num_tokens, num_cached, window):
    there = torch.arange(num_cached + num_tokens)
    back = there[:, None] - there
    return ((back >= 0) & (back < window))[None, None, num_cached:]


def wrong_window(test):
    """Make a mask of another test on (here, there, window, cached)."""

    def mask(num_tokens, num_cached, window):
        num_keys = num_cached + num_tokens
        here = torch.arange(num_cached, num_keys)[:, None]
        visible = test(here, torch.arange(num_keys), window, num_cached)
        return visible[None, None]

    return mask


window_mask.mistake(
    "the window without the token itself",
    because="“the last two tokens” may be read as two tokens before this one; the text "
    "says itself included",
)(wrong_window(lambda t, s, window, c: (s <= t) & (s >= t - window)))
window_mask.mistake(
    "one token short",
    because="a window of w reaches w - 1 tokens back, and taking one off on both sides "
    "of the sum takes it off twice",
)(wrong_window(lambda t, s, window, c: (s <= t) & (s > t - window + 1)))
window_mask.mistake(
    "the cache forgotten",
    because="row t is token t in a call without a cache; with one it is token "
    "`num_cached + t`",
)(wrong_window(lambda t, s, window, c: (s <= t - c) & (s > t - c - window)))
window_mask.mistake(
    "a window to both sides",
    because="pictures of windows are symmetric, with the token in the middle; a "
    "decoder must not see what comes after it",
)(wrong_window(lambda t, s, window, c: (s - t).abs() < window))
window_mask.mistake(
    "no window",
    because="while a text is shorter than its window, the causal mask does as well",
)(wrong_window(lambda t, s, window, c: s <= t))
window_mask.mistake(
    "the other polarity",
    because="in other libraries True marks what is hidden; here it marks what is "
    "visible",
)(wrong_window(lambda t, s, window, c: (s > t) | (s <= t - window)))
window_mask.mistake(
    "itself forgotten",
    because="a prediction must not see its answer. But the answer is the *next* token; "
    "the token itself is known",
)(wrong_window(lambda t, s, window, c: (s < t) & (s > t - window)))


@window_mask.mistake(
    "a square",
    because="keys and queries are equally many in a text without a cache. With one, "
    "the queries are the newest tokens only",
)
def _(num_tokens, num_cached, window):
    there = torch.arange(num_cached + num_tokens)
    back = there[:, None] - there
    return ((back >= 0) & (back < window))[None, None]


chapter.explain(
    "what_a_shuffle_changes",
    title="tokens in another order",
    minutes=5,
    difficulty="moderate",
    section="A lookup that is never sure",
    text="""
Take one layer of causal attention without rotation, and shuffle all tokens but the
last. What happens to the outputs?
""",
    hints=(
        "The output of a token is a sum over the keys that it sees. Does a sum care "
        "for order?",
        "Which tokens does the *second* token see, before and after? And what would a "
        "second layer read?",
    ),
    choices={
        "a": Choice(
            "They are shuffled in the same way, and otherwise as before.",
            "That would be so without a mask. With it, who stands before whom decides "
            "who is seen: after the shuffle the mask hides other tokens from them.",
        ),
        "b": Choice(
            "The last token's output stays; those of the others change, and not only "
            "in order.",
            "The last token sees everybody, and a sum over keys does not care for "
            "order: each key keeps its value. The others see other tokens than before.",
        ),
        "c": Choice(
            "All of them change: the weights depend on where the keys stand.",
            "Without rotation they do not. A weight depends on the query and on the "
            "keys that are seen, and on no position; the last token sees the same "
            "ones.",
        ),
        "d": Choice(
            "The last token's output stays, however many such layers follow.",
            "It stays in the first layer. There the others change, because the mask "
            "hides other tokens from them. In the second layer the last token looks "
            "at them, and changes.",
        ),
    },
    right="b",
    why="Attention alone sees a bag; order comes from the rotation, and a little of it "
    "from the mask, through a second layer.",
)


@chapter.debug(
    title="right in the prefill, wrong with a cache",
    minutes=10,
    difficulty="moderate",
    section="The mask",
    text="""
A colleague decodes with a cache. The queries are the newest tokens, keys and values are
those of *all* tokens. The prompt is read well, then the answer turns to nonsense. Mend
the function for any number of new tokens.
""",
    hints=(
        "Which keys does a single query see? Hand over the identity as values, and "
        "look.",
        "`is_causal` draws its triangle from the *upper left* corner. With a cache it "
        "must end at the lower right one: the last query sees the last key.",
    ),
    proves="Every new token sees the cache, the tokens before it in the call, and "
    "itself: in a prefill, in a step of one token, and in a chunk after a cache.",
    why="Row t is token S - T + t. Aligned at the upper left, a single new token sees "
    "the first key and no other.",
)
def attend_newest(queries, keys, values):
    """(B, N, T, H), (B, N, S, H) twice, S >= T: causal attention -> (B, N, T, H)."""
    num_tokens, num_keys = queries.shape[2], keys.shape[2]
    everything = torch.ones(num_tokens, num_keys, dtype=torch.bool)
    mask = everything.tril(diagonal=num_keys - num_tokens)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)


@attend_newest.broken(
    "aligned at the upper left",
    because="`is_causal` sounds like all that is needed, and in a prefill it is: there "
    "both corners are one",
)
def _(queries, keys, values):
    return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)


def wrong_newest(visible):
    """Make an attend_newest with another mask, from T and S."""

    def attend(queries, keys, values):
        mask = visible(queries.shape[2], keys.shape[2])
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)

    return attend


def triangle(num_tokens, num_keys, diagonal):
    """Make a (T, S) mask, True up to a diagonal."""
    return torch.ones(num_tokens, num_keys, dtype=torch.bool).tril(diagonal)


attend_newest.equivalent(
    "num_tokens, num_keys = queries.shape[2], values.shape[2]",
    because="there are as many values as keys",
)
attend_newest.mistake(
    "no mask at all",
    because="a step of one token may see everything, and steps were what failed; two "
    "new tokens may not",
)(wrong_newest(lambda new, all_: None))
attend_newest.mistake(
    "causal only when several tokens come",
    because="prefill and single steps are then both right. A chunk after a cache, "
    "several new tokens with old ones before them, still starts at the wrong corner",
)(wrong_newest(lambda new, all_: triangle(new, all_, 0) if new > 1 else None))
attend_newest.mistake(
    "one key too many",
    because="the diagonal starts *after* the cache, and one is added to get there; but "
    "diagonal 0 already is one key",
)(wrong_newest(lambda new, all_: triangle(new, all_, all_ - new + 1)))
attend_newest.mistake(
    "itself forgotten",
    because="the last index of the cache is its length minus one. The diagonal is no "
    "index of an old token, it is the place of the new one",
)(wrong_newest(lambda new, all_: triangle(new, all_, all_ - new - 1)))
attend_newest.mistake(
    "the other polarity",
    because="`nn.MultiheadAttention` wants True where it must not look; "
    "`scaled_dot_product_attention` where it may",
)(wrong_newest(lambda new, all_: ~triangle(new, all_, all_ - new)))


@attend_newest.mistake(
    "the newest keys only",
    because="`is_causal` is right for squares, so the keys are cut until there is one; "
    "then the text before it is gone",
)
def _(queries, keys, values):
    new = queries.shape[2]
    keys, values = keys[:, :, -new:], values[:, :, -new:]
    return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)


@attend_newest.cases
def _(draw):
    for batch, heads, new, cached, width in (
        (1, 1, 1, 2, 1),
        (1, 1, 2, 1, 2),
        (2, 2, 3, 0, 4),
        (2, 3, 3, 4, 4),
    ):
        keys, values = (draw.normal(batch, heads, new + cached, width) for _ in "kv")
        yield 3 * draw.normal(batch, heads, new, width), keys, values


@attend_newest.also("query by query")
def _(queries, keys, values):
    cached, rows = keys.shape[2] - queries.shape[2], []
    for t in range(queries.shape[2]):
        seen, row = cached + t + 1, queries[:, :, t : t + 1]
        rows.append(
            F.scaled_dot_product_attention(row, keys[:, :, :seen], values[:, :, :seen])
        )
    return torch.cat(rows, dim=2)


@attend_newest.also("positions compared, written out")
def _(queries, keys, values):
    there = torch.arange(keys.shape[2])
    here = there[-queries.shape[2] :, None]
    scores = queries @ keys.mT / math.sqrt(queries.shape[-1])
    return scores.masked_fill(there > here, -torch.inf).softmax(-1) @ values
