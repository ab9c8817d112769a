"""Exercises on heads that share keys and values."""

import math

import torch

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.exercise import Choice
from annotated_src.masks import causal_mask

chapter = Chapter("llama/06_heads", "Sharing heads")


@chapter.implement(
    title="a key head for every query head",
    minutes=5,
    difficulty="easy",
    section="0 0 1 1, and what it costs",
    text="""
Write `repeat_kv`, without looking it up: heads `0 1` become `0 0 1 1` for `times=2`.
""",
    hints=(
        "Two functions of torch repeat. One gives `0 1 0 1`, the other `0 0 1 1`.",
        "Query head $n$ reads KV head $\\lfloor n/G \\rfloor$: neighbours share. Which "
        "axis holds the heads?",
    ),
    proves="Query head n finds the keys of KV head n // G in its own place, and all "
    "batches, tokens and features stay where they were.",
)
def repeat_kv(x, times):
    """(B, K, S, H) -> (B, K * times, S, H) of x's dtype: each head times in a row."""
    return x.repeat_interleave(times, dim=1)


@repeat_kv.cases
def _(draw):
    yield draw.normal(1, 2, 1, 1), 2
    yield draw.normal(2, 3, 2, 2), 3
    yield draw.normal(2, 2, 3, 4), 1
    yield draw.normal(2, 1, 3, 4).half(), 4


@repeat_kv.also("a loop over heads")
def _(x, times):
    heads = [x[:, n // times] for n in range(x.shape[1] * times)]
    return torch.stack(heads, dim=1)


@repeat_kv.also("expand, then flatten")
def _(x, times):
    return x[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)


@repeat_kv.also("indexing")
def _(x, times):
    return x[:, torch.arange(x.shape[1] * times) // times]


@repeat_kv.mistake(
    "repeat for repeat_interleave",
    because="`repeat` sounds right, and its shape is. It lays whole copies of the "
    "heads one after the other: 0 1 0 1",
)
def _(x, times):
    return x.repeat(1, times, 1, 1)


@repeat_kv.mistake(
    "one more copy",
    because="`times` is read as the copies to add to the head that is there",
)
def _(x, times):
    return x.repeat_interleave(times + 1, dim=1)


@repeat_kv.mistake(
    "tokens for heads",
    because="in many projects heads stand in axis 2, before the transpose; here they "
    "stand in axis 1",
)
def _(x, times):
    return x.repeat_interleave(times, dim=2)


@repeat_kv.mistake(
    "times as the number of query heads",
    because="the caller knows N and K, and functions of this kind are found with "
    "either N or G as their argument; here it is G",
)
def _(x, times):
    return x.repeat_interleave(max(times // x.shape[1], 1), dim=1)


@repeat_kv.mistake(
    "zeros are float32 unless told",
    because="`torch.zeros` makes a place for the result, and every test is in float32; "
    "a cache in half precision comes back twice as large",
)
def _(x, times):
    repeated = torch.zeros(x.shape[0], x.shape[1] * times, *x.shape[2:])
    for n in range(x.shape[1] * times):
        repeated[:, n] = x[:, n // times]
    return repeated


@repeat_kv.mistake(
    "heads in the batch",
    because="without `dim`, or with dim 0, copies go to the batch and the shape still "
    "multiplies",
)
def _(x, times):
    return x.repeat_interleave(times, dim=0)


@chapter.implement(
    title="how long a text fits",
    minutes=5,
    difficulty="easy",
    section="How big is the cache?",
    text="""
How many tokens of one text does a cache of `num_bytes` hold? Every number in it takes
two bytes.
""",
    hints=(
        "What does one token add to one layer, and how many layers are there?",
        "Keys *and* values; a head of the cache is a KV head, not a query head.",
    ),
    proves="A cache of so many tokens fits, and one more does not.",
)
def tokens_that_fit(num_bytes, num_layers, num_heads, num_kv_heads, head_dim):
    """Count the tokens, an int."""
    return num_bytes // (2 * num_layers * num_kv_heads * head_dim * 2)


@tokens_that_fit.cases
def _(draw):
    for num_layers, num_heads, num_kv_heads, head_dim in (
        (1, 1, 1, 1),
        (3, 6, 2, 5),
        (22, 32, 4, 64),
        (30, 9, 3, 64),
    ):
        token = 4 * num_layers * num_kv_heads * head_dim
        for spare in (0, token - 1):
            num_bytes = token * draw.integer(5, 99) + spare
            yield num_bytes, num_layers, num_heads, num_kv_heads, head_dim


@tokens_that_fit.also("token by token")
def _(num_bytes, num_layers, num_heads, num_kv_heads, head_dim):
    count, token = 0, sum(2 * 2 * num_kv_heads * head_dim for _ in range(num_layers))
    while (count + 1) * token <= num_bytes:
        count += 1
    return count


@tokens_that_fit.also("rounding down")
def _(num_bytes, num_layers, num_heads, num_kv_heads, head_dim):
    return math.floor(num_bytes / (4 * num_layers * num_kv_heads * head_dim))


def wrong_count(factor, of=lambda heads, kv_heads: kv_heads, whole=math.floor):
    """Make a count of tokens with other bytes a number, heads, or rounding."""

    def count(num_bytes, num_layers, num_heads, num_kv_heads, head_dim):
        token = factor * num_layers * of(num_heads, num_kv_heads) * head_dim
        return whole(num_bytes / token)

    return count


tokens_that_fit.mistake(
    "query heads in the cache",
    because="attention has `num_heads` heads; only the keys and values are kept, and "
    "these have fewer",
)(wrong_count(4, of=lambda heads, kv_heads: heads))
tokens_that_fit.mistake(
    "keys without values",
    because="it is called a key cache as often as a KV cache",
)(wrong_count(2))
tokens_that_fit.mistake(
    "float32 in the cache",
    because="torch's default is four bytes a number; the task says two",
)(wrong_count(8))
tokens_that_fit.mistake(
    "rounded up",
    because="a last token that fits in part looks like a token; it does not fit",
)(wrong_count(4, whole=math.ceil))
tokens_that_fit.mistake(
    "not rounded",
    because="`/` divides; it also makes a fraction, and a fraction of a token does not "
    "fit",
)(wrong_count(4, whole=float))
tokens_that_fit.mistake(
    "queries in the cache",
    because="attention has three projections; the queries are used once and forgotten",
)(wrong_count(6))


chapter.explain(
    "what_gqa_speeds_up",
    title="reading or writing",
    minutes=5,
    difficulty="moderate",
    section="Why it writes faster",
    text="""
A server reads a prompt of 2,000 tokens in one call, then writes 100 tokens. Which of
the two do shared heads speed up more, and does a larger batch make up for their
absence?
""",
    hints=(
        "For each byte of the cache that is read: how many operations use it?",
        "In the prompt's call 2,000 queries share one reading of the keys. How many "
        "share it when one token is written? And does a second text share the first "
        "one's cache?",
    ),
    choices={
        "a": Choice(
            "Reading: it has twenty times the tokens.",
            "It has more work, but its 2,000 queries share one reading of each key: "
            "memory does not hold it up, and it has nothing to win.",
        ),
        "b": Choice(
            "Writing; a batch of many texts would do just as well.",
            "Writing, yes. But a batch shares the *weights*. Each text brings a cache "
            "of its own: bytes and operations both grow, and their ratio stays.",
        ),
        "c": Choice(
            "Writing; a larger batch does not help.",
            "With one token $T = 1$, and only the group $G$ shares a reading of the "
            "keys. Each further text brings its own cache: operations and bytes both "
            "grow with $B$, and the ratio stays $2G/b$.",
        ),
        "d": Choice(
            "Both alike: the cache is smaller by the same factor.",
            "The cache is, but the time is not: where 2,000 queries share a reading, "
            "reading was not what took the time.",
        ),
    },
    right="c",
)


@chapter.debug(
    title="the mask of folded heads",
    minutes=10,
    difficulty="moderate",
    section="The way that copies nothing",
    text="""
Queries of a group are folded into rows, so that no key is repeated: row $g T + t$ is
token $t$ of the group's head $g$. Somebody masks these rows directly. Decoding is
right, the prefill is wrong. Mend it.
""",
    hints=(
        "With one new token, one row of the mask serves all. With three, in which "
        "order do the folded rows come?",
        "All tokens of the group's first head, then all of its second: "
        "t0 t1 t2 t0 t1 t2.",
    ),
    proves="Each folded row sees what its token may see, for every number of heads a "
    "group, with and without tokens in the cache.",
    why="The folded rows are all tokens of the group's first head, then all of its "
    "second. So the mask's rows must come as t0 t1 t2, t0 t1 t2.",
)
def attend_rows(queries, keys, values, mask):
    """(B, N, T, H), (B, K, S, H) twice, (1, 1, T, S) True: visible -> (B, N, T, H)."""
    group = queries.shape[1] // keys.shape[1]
    rows = queries.unflatten(1, (-1, group)).flatten(2, 3)  # (B, K, G * T, H)
    scores = rows @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
    visible = mask.repeat(1, 1, group, 1)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    mixed = weights @ values
    return mixed.unflatten(2, (group, -1)).flatten(1, 2)


def wrong_rows(repeat, fill=-torch.inf, width=None, softmax=-1, apart=(2, 1)):
    """Make an attend_rows with one thing changed."""

    def attend(queries, keys, values, mask):
        group = queries.shape[1] // keys.shape[1]
        rows = queries.unflatten(1, (-1, group)).flatten(2, 3)
        scale = math.sqrt(width(queries) if width else queries.shape[-1])
        scores = rows @ keys.transpose(-2, -1) / scale
        visible = repeat(mask, group)
        weights = scores.masked_fill(~visible, fill).softmax(dim=softmax)
        mixed = weights @ values
        return mixed.unflatten(2, (group, -1)).flatten(1, 2)

    return attend


@attend_rows.broken(
    "0 0 1 1 where 0 1 0 1 is due",
    because="heads wanted `repeat_interleave`, and the rows of a mask look like heads",
)
def _(queries, keys, values, mask):
    group = queries.shape[1] // keys.shape[1]
    rows = queries.unflatten(1, (-1, group)).flatten(2, 3)  # (B, K, G * T, H)
    scores = rows @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
    visible = mask.repeat_interleave(group, dim=2)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    mixed = weights @ values
    return mixed.unflatten(2, (group, -1)).flatten(1, 2)


def tiled(mask, group):
    """Repeat a mask as the folded rows come: (1, 1, T, S) -> (1, 1, G * T, S)."""
    return mask.repeat(1, 1, group, 1)


attend_rows.mistake(
    "no mask at all",
    because="with one new token nothing is hidden, and the test was a decode step",
)(wrong_rows(lambda mask, group: torch.ones_like(tiled(mask, group))))
attend_rows.mistake(
    "a causal mask made anew",
    because="the triangle is known, so it can be drawn where it is needed. A mask may "
    "hide more than the future: padding, or what lies behind a window",
)(
    wrong_rows(
        lambda mask, group: tiled(
            torch.ones_like(mask).tril(mask.shape[-1] - mask.shape[-2]), group
        )
    )
)
attend_rows.mistake(
    "the other polarity",
    because="some libraries mark with True what is hidden; here True is visible",
)(wrong_rows(lambda mask, group: ~tiled(mask, group)))
attend_rows.mistake(
    "a fill that is too small",
    because="-20 seems far away from scores of about 1; with scores of 30 it is not",
    section="The ladder's last rung",
)(wrong_rows(tiled, fill=-20.0))
attend_rows.mistake(
    "scaled by the number of tokens",
    because="the rows are now G * T tokens, and the last axis of the scores is S",
)(wrong_rows(tiled, width=lambda q: q.shape[2]))
attend_rows.mistake(
    "softmax over the rows",
    because="after the fold the second last axis has all queries of a group in it",
)(wrong_rows(tiled, softmax=-2))


@attend_rows.cases
def _(draw):
    for batch, heads, kv_heads, new, cached, width in (
        (1, 2, 1, 2, 0, 2),
        (1, 2, 1, 1, 3, 2),
        (2, 6, 2, 3, 2, 4),
        (2, 4, 4, 3, 0, 4),
    ):
        keys, values = (draw.normal(batch, kv_heads, new + cached, width) for _ in "kv")
        queries = 20 * draw.normal(batch, heads, new, width)
        yield queries, keys, values, causal_mask(new, cached)
    keys, values = (draw.normal(1, 1, 3, 2) for _ in "kv")
    mask = causal_mask(2, 1)
    mask[..., 0] = False  # a pad, or behind a window
    yield draw.normal(1, 2, 2, 2), keys, values, mask


attend_rows.equivalent(
    "scores = rows @ keys.transpose(+2, -1) / math.sqrt(queries.shape[-1])",
    because="of four axes, 2 and -2 are the same",
)
attend_rows.equivalent(
    "group = queries.shape[1] // values.shape[1]",
    because="there are as many value heads as key heads",
)


@attend_rows.also("the mask in its own axis")
def _(queries, keys, values, mask):
    grouped = queries.unflatten(1, (keys.shape[1], -1))
    scores = torch.einsum("bkgth,bksh->bkgts", grouped, keys) / queries.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask[:, :, None], -torch.inf).softmax(-1)
    return torch.einsum("bkgts,bksh->bkgth", weights, values).flatten(1, 2)


@attend_rows.also("torch.nn.functional")
def _(queries, keys, values, mask):
    return torch.nn.functional.scaled_dot_product_attention(
        queries, keys, values, mask, enable_gqa=True
    )
