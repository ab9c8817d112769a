"""Exercises on the cache: append, reorder, rewind, and turn late."""

import torch

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.exercise import Choice
from annotated_src.positions import positions_after
from annotated_src.rotary import apply_rotary, rope_tables

chapter = Chapter("llama/07_cache", "The KV cache")


@chapter.implement(
    title="append to a cache",
    minutes=8,
    difficulty="easy",
    section="The annotated source",
    text="""
Write the heart of a cache, without looking it up. `buffer` has room for a fixed number
of tokens, axis 2 counts them, and the first `length` are in use. Write the new tokens
behind them, in place. Return all tokens so far, the buffer, and the new length. What
lies behind the tokens in use is rubbish, left by an earlier text. (The check sees what
comes back. That nothing large is copied is up to you.)
""",
    hints=(
        "How many tokens are there afterwards? Write into one slice, and return "
        "another.",
        "With two tokens in use, at places 0 and 1, the next one goes to place 2: the "
        "length is the first free place.",
    ),
    may_change=("buffer",),
    proves="Old tokens stay, new ones follow them without a gap, one or several a "
    "call, until the buffer is full; and nothing comes back that nobody wrote.",
)
def append_tokens(buffer, length, new):
    """(B, K, room, H), int, (B, K, T, H) -> all (B, K, length + T, H), buffer, int."""
    end = length + new.shape[2]
    buffer[:, :, length:end] = new
    return buffer[:, :, :end], buffer, end


@append_tokens.cases
def _(draw):
    for batch, heads, room, width, length, new in (
        (1, 1, 4, 1, 2, 1),
        (2, 2, 5, 3, 0, 3),
        (2, 3, 9, 2, 4, 3),
        (1, 2, 8, 4, 7, 1),
        (3, 2, 6, 3, 3, 3),
    ):
        buffer = draw.normal(batch, heads, room, width)
        yield buffer, length, draw.normal(batch, heads, new, width)


@append_tokens.also("token by token")
def _(buffer, length, new):
    for t in range(new.shape[2]):
        buffer[:, :, length] = new[:, :, t]
        length += 1
    return buffer[:, :, :length], buffer, length


@append_tokens.also("index_copy_")
def _(buffer, length, new):
    places = torch.arange(length, length + new.shape[2])
    buffer.index_copy_(2, places, new)
    return buffer.narrow(2, 0, length + len(places)), buffer, length + len(places)


@append_tokens.also("three pieces, put together")
def _(buffer, length, new):
    end = length + new.shape[2]
    seen = torch.cat((buffer[:, :, :length], new), dim=2)
    return seen, torch.cat((seen, buffer[:, :, end:]), dim=2), end


def wrong_append(
    start=lambda length, new: length, grown=lambda length, new: length + new
):
    """Make an append_tokens with another place to write to, or another new length."""

    def append(buffer, length, new):
        first, count = start(length, new.shape[2]), new.shape[2]
        buffer[:, :, first : first + count] = new
        end = grown(length, count)
        return buffer[:, :, :end], buffer, end

    return append


append_tokens.mistake(
    "written over the beginning",
    because="the first call works: it starts at 0. The offset is missed by every "
    "later one",
)(wrong_append(lambda length, new: 0))
append_tokens.mistake(
    "over the newest token",
    because="the last index of a list is its length minus one, and that place is taken",
)(wrong_append(lambda length, new: max(length - 1, 0)))
append_tokens.mistake(
    "one place left free",
    because="“after the length” sounds like length plus one; counted from 0, the "
    "length itself is the first free place",
)(wrong_append(lambda length, new: length + 1, lambda length, new: length + 1 + new))
append_tokens.mistake(
    "the length of the call",
    because="in the prefill it is right: there the call is all there is",
)(wrong_append(grown=lambda length, new: new))
append_tokens.mistake(
    "one token a call",
    because="while the model writes, each call brings one; the prompt brings many",
)(wrong_append(grown=lambda length, new: length + 1))


@append_tokens.mistake(
    "the whole buffer returned",
    because="the rest of a new buffer is zeros, and zeros look harmless. A key of "
    "zeros has score 0, which takes weight; and after a rewind the rest is an older "
    "text",
    section="Rewind",
)
def _(buffer, length, new):
    end = length + new.shape[2]
    buffer[:, :, length:end] = new
    return buffer, buffer, end


@append_tokens.mistake(
    "only the new tokens returned",
    because="the old ones were handed out before. But attention needs all keys at "
    "every step, and keeps none itself",
    section="What the next token needs",
)
def _(buffer, length, new):
    end = length + new.shape[2]
    buffer[:, :, length:end] = new
    return buffer[:, :, length:end], buffer, end


@append_tokens.mistake(
    "in the axis of the heads",
    because="in many projects tokens stand in axis 1, before the transpose; here axis "
    "1 is the heads",
)
def _(buffer, length, new):
    end = length + new.shape[2]
    buffer[:, length:end] = new
    return buffer[:, :, :end], buffer, end


@append_tokens.mistake(
    "at the far end",
    because="the newest token is the last one, and -T: are the last places; but of the "
    "buffer, not of the text",
)
def _(buffer, length, new):
    end = length + new.shape[2]
    buffer[:, :, -new.shape[2] :] = new
    return buffer[:, :, :end], buffer, end


@chapter.implement(
    title="beams change places",
    minutes=10,
    difficulty="moderate",
    section="The annotated source",
    text="""
Beam search keeps the best rows of a batch, some of them twice. Write `reorder_rows`,
which makes row $i$ what row `rows[i]` was, in the keys and in the values. You may write
in place, or make new tensors.
""",
    hints=(
        "Try `rows = [1, 0]` by hand, one assignment after the other. What is in row 0 "
        "when row 1 is written?",
        "Indexing with a list copies everything it reads, before anything is written.",
    ),
    may_change=("keys", "values"),
    proves="Row i goes on from what row rows[i] held, with rows that repeat, that are "
    "dropped, and that swap.",
    why="An index that is a list copies first. So even `keys[:] = keys[rows]` "
    "overwrites nothing before it is read.",
)
def reorder_rows(keys, values, rows):
    """(B, K, S, H) twice, a list of B row numbers -> both (B, K, S, H), reordered."""
    return keys[rows], values[rows]


@reorder_rows.cases
def _(draw):
    for rows, shape in (
        ([1, 0], (1, 1, 1)),
        ([2, 0, 2], (2, 1, 1)),
        ([1, 2, 3, 0], (2, 3, 2)),
        ([3, 3, 0, 1, 1], (1, 2, 3)),
    ):
        keys, values = (draw.normal(len(rows), *shape) for _ in "kv")
        yield keys, values, rows


@reorder_rows.also("a loop over copies")
def _(keys, values, rows):
    old_keys, old_values = keys.clone(), values.clone()
    for i, row in enumerate(rows):
        keys[i], values[i] = old_keys[row], old_values[row]
    return keys, values


@reorder_rows.also("in place")
def _(keys, values, rows):
    keys[:], values[:] = keys[rows], values[rows]
    return keys, values


@reorder_rows.also("a stack of rows")
def _(keys, values, rows):
    return torch.stack([keys[i] for i in rows]), torch.stack([values[i] for i in rows])


@reorder_rows.mistake(
    "read after it was written",
    because="row by row is what the task says. But a row that was overwritten is not "
    "what it was when its turn to be read comes",
)
def _(keys, values, rows):
    for i, row in enumerate(rows):
        keys[i] = keys[row]
        values[i] = values[row]
    return keys, values


@reorder_rows.mistake(
    "the inverse",
    because="“row 2 goes to 0” and “row 0 comes from 2” sound alike. For two rows that "
    "swap they are the same",
)
def _(keys, values, rows):
    new_keys, new_values = keys.clone(), values.clone()
    for i, row in enumerate(rows):
        new_keys[row], new_values[row] = keys[i], values[i]
    return new_keys, new_values


@reorder_rows.mistake(
    "keys without values",
    because="the scores come from the keys, and look right: but they then weight the "
    "values of another text",
    section="What the next token needs",
)
def _(keys, values, rows):
    return keys[rows], values


@reorder_rows.mistake(
    "rows swapped, not copied",
    because="changing places sounds like a swap. A row that two beams go on from would "
    "have to be in two places",
)
def _(keys, values, rows):
    keys, values = keys.clone(), values.clone()
    for i, row in enumerate(rows):
        keys[[i, row]], values[[i, row]] = keys[[row, i]], values[[row, i]]
    return keys, values


@reorder_rows.mistake(
    "each row once",
    because="a set of rows to keep is what the word “best” suggests; the order and the "
    "repeats are what beam search has found out",
)
def _(keys, values, rows):
    kept = sorted(set(rows))
    return keys[kept], values[kept]


@reorder_rows.mistake(
    "heads for rows",
    because="with a colon too many the index goes to the next axis: here rows of the "
    "batch are axis 0, and heads axis 1",
)
def _(keys, values, rows):
    return keys[:, rows], values[:, rows]


@chapter.implement(
    title="check a draft in one call",
    minutes=12,
    difficulty="moderate",
    section="Rewind",
    text="""
In speculative decoding a cheap model guesses `draft`, a few ids. The large one, with
`length` tokens in its cache, runs `[last, *draft]` in *one* call, where `last` is the
newest token, not yet cached. `best[i]` is the id that it finds most likely after item i
of that call. Return the ids that it would have written alone: the part of the draft
that agrees, and its own next id. And return the length to which the cache must be
rewound: what stays are the tokens that were run *and* belong to the text.
""",
    hints=(
        "`best[0]` is what comes after `last`, so it is to be compared with "
        "`draft[0]`. What is `best[i]` worth when an earlier guess was wrong?",
        "Which ids were run? `last` and the draft. The model's own next id was not: "
        "it is the `last` of the next call.",
    ),
    proves="The ids are those of greedy decoding, and exactly the tokens before the "
    "last of them are cached, whether all, some or none of the draft is right.",
)
def accept_draft(best, draft, length):
    """[n + 1 ids], [n ids], int -> ([ids to keep], int: tokens that stay cached)."""
    agreed = 0
    while agreed < len(draft) and best[agreed] == draft[agreed]:
        agreed += 1
    return best[: agreed + 1], length + 1 + agreed


@accept_draft.cases
def _(draw):
    yield [11, 12], [10], 5
    yield [11, 12, 13], [11, 12], 4
    start = draw.integer(20, 40)
    right = [start, start + 3, start + 3, start + 1, start + 9]
    for draft in (
        [start, start + 3, start + 2, start + 1],  # wrong, then right by chance
        [start + 3, start + 3, start + 1, start + 9],  # moved by one
        [start, start + 1, start + 2, start + 3],
        right[:4],
        [start + 1, start + 3, start + 3, start + 1],
    ):
        yield right[: len(draft) + 1], draft, draw.integer(3, 20)


@accept_draft.also("products of agreements")
def _(best, draft, length):
    same = torch.tensor(best[:-1]) == torch.tensor(draft)
    agreed = int(same.long().cumprod(dim=0).sum())
    return best[: agreed + 1], length + agreed + 1


@accept_draft.also("the first that differs")
def _(best, draft, length):
    pairs = enumerate(zip(best, draft, strict=False))
    agreed = next((i for i, (ours, guess) in pairs if ours != guess), len(draft))
    return [*draft[:agreed], best[agreed]], length + 1 + agreed


def wrong_accept(count=None, keep=None, cached=None):
    """Make an accept_draft with another count, other ids or another length."""

    def accept(best, draft, length):
        agreed = 0
        while agreed < len(draft) and best[agreed] == draft[agreed]:
            agreed += 1
        agreed = count(best, draft, agreed) if count else agreed
        kept = keep(best, draft, agreed) if keep else best[: agreed + 1]
        return kept, cached(length, agreed, draft) if cached else length + 1 + agreed

    return accept


def matches(one, other):
    """Count the places where two lists agree."""
    return sum(x == y for x, y in zip(one, other, strict=False))


accept_draft.mistake(
    "every match counted",
    because="agreement is agreement. But what the model finds behind a wrong guess, it "
    "finds for a text that will not be",
)(wrong_accept(lambda best, draft, agreed: matches(best, draft)))
accept_draft.mistake(
    "compared one place off",
    because="ids and scores of one call are often shifted against each other: but "
    "best[0] *is* the next id already, and stands beside the first guess",
)(wrong_accept(lambda best, draft, agreed: matches(best[1:], draft)))
accept_draft.mistake(
    "all or nothing",
    because="a draft that is wrong somewhere sounds useless; its beginning was right",
)(wrong_accept(lambda best, draft, agreed: agreed if agreed == len(draft) else 0))
accept_draft.mistake(
    "the model's own id lost",
    because="accepting means taking guesses. But the call has also said what comes "
    "after the last good one, and that costs nothing more",
)(wrong_accept(keep=lambda best, draft, agreed: draft[:agreed]))
accept_draft.mistake(
    "the wrong guess kept",
    because="the first guess that differs looks like the end of what was agreed; the "
    "model's own id belongs in its place",
)(wrong_accept(keep=lambda best, draft, agreed: draft[: agreed + 1]))
accept_draft.mistake(
    "the new id counted as cached",
    because="it is part of the text now. But it has not been run, so no layer has its "
    "key",
)(wrong_accept(cached=lambda length, agreed, draft: length + agreed + 2))
accept_draft.mistake(
    "the last token forgotten",
    because="only the draft seems new; `last` was written in the call before, and run "
    "in this one",
)(wrong_accept(cached=lambda length, agreed, draft: length + agreed))
accept_draft.mistake(
    "not rewound",
    because="the cache did what it was told. It now holds the wrong guesses too, and "
    "the next token would look at them",
)(wrong_accept(cached=lambda length, agreed, draft: length + 1 + len(draft)))


chapter.explain(
    "when_a_prompt_sees_itself",
    title="a prompt that sees itself",
    minutes=5,
    difficulty="moderate",
    section="Why the old rows may be kept",
    text="""
In ChatGLM the tokens of the prompt see *each other*, also later ones; only the answer
is causal. What may be done with a cache?
""",
    hints=(
        "Whose rows change when a token is appended to the answer? And when one is "
        "appended to the prompt?",
        "In the first of two chunks, which keys does a row need that are not there "
        "yet?",
    ),
    choices={
        "a": Choice(
            "Nothing: a cache needs a causal mask everywhere.",
            "It needs rows that are final. The prompt does not look at the answer, so "
            "once the prompt is complete no later token changes its rows.",
        ),
        "b": Choice(
            "Everything as in Llama: any way to cut a text into calls gives the same "
            "logits.",
            "The proof of that starts from a causal mask. Cut the prompt in two, and "
            "the rows of the first chunk lack the keys of the second, in every layer.",
        ),
        "c": Choice(
            "The prompt may be cached, and the next turn of the chat may go on from "
            "there.",
            "Cached, yes. But in the next turn prompt and answer are part of a longer "
            "prompt, in which all of them see later tokens: their rows change.",
        ),
        "d": Choice(
            "The prompt may be cached, if it comes in one call; for the next turn it "
            "must be run again.",
            "From the end of the prompt on, later tokens change no row. Inside the "
            "prompt they do: it cannot be cut, and a longer prompt is a new one.",
        ),
    },
    right="d",
    why="The induction over layers needs rows that do not depend on what comes later. "
    "Here it holds from the end of the prompt on, and that is where decoding starts.",
)


@chapter.debug(
    title="keys that are turned late",
    minutes=12,
    difficulty="hard",
    section="What the next token needs",
    text="""
A colleague caches keys *before* rotation and turns what comes back. `queries` are those
of the newest tokens, `keys` those of all tokens, neither turned yet; what is wanted are
the scores. The prefill is right. A chunk of 3 after 6 raises a shape error; one token
at a time raises nothing and is wrong. Mend it. (`apply_rotary` and `rope_tables` are in
`annotated_src.rotary`, `positions_after` is in `annotated_src.positions`.)
""",
    hints=(
        "How many rows do the tables have in a step of one token, and to how many "
        "keys are they applied?",
        "A key turns by its own position, whoever asks. Keys and queries need tables "
        "of their own.",
    ),
    proves="Each query is turned by its own position and each key by its own, in the "
    "prefill, in a chunk after a cache and in a single step, for any frequencies.",
    why="With one row the tables broadcast: every cached key was turned by the newest "
    "token's angle, as was the query. Both turn alike, so the scores were those "
    "without any rotation, and the step had no idea of order. Turning late is right "
    "with the keys' own positions, at the price of turning all of them again at each "
    "step.",
)
def scores_turned_late(queries, keys, frequencies):
    """(B, N, T, H), (B, N, S, H), (H / 2,) -> rotated scores (B, N, T, S), unscaled."""
    num_keys, num_tokens = keys.shape[2], queries.shape[2]
    here = positions_after(num_keys - num_tokens, num_tokens)
    there = positions_after(0, num_keys)
    queries = apply_rotary(queries, *rope_tables(here, frequencies, queries.dtype))
    keys = apply_rotary(keys, *rope_tables(there, frequencies, keys.dtype))
    return queries @ keys.mT


@scores_turned_late.broken(
    "the call's tables for all keys",
    because="the tables are at hand, and a test with one call passes; with one token "
    "they broadcast over all keys in silence",
)
def _(queries, keys, frequencies):
    num_keys, num_tokens = keys.shape[2], queries.shape[2]
    here = positions_after(num_keys - num_tokens, num_tokens)
    tables = rope_tables(here, frequencies, queries.dtype)
    queries, keys = apply_rotary(queries, *tables), apply_rotary(keys, *tables)
    return queries @ keys.mT


def wrong_late(of_queries=None, of_keys=None):
    """Make scores with other positions; each is a function of T and S, or None."""

    def scores(queries, keys, frequencies):
        new, total = queries.shape[2], keys.shape[2]
        here, there = torch.arange(total - new, total), torch.arange(total)
        here = of_queries(new, total) if of_queries else here
        there = of_keys(new, total) if of_keys else there
        turned = [
            apply_rotary(x, *rope_tables(at[None], frequencies, x.dtype))
            for x, at in ((queries, here), (keys, there))
        ]
        return turned[0] @ turned[1].mT

    return scores


scores_turned_late.mistake(
    "queries from 0",
    because="positions restart in a call that knows nothing of the cache",
    section="The annotated source",
)(wrong_late(of_queries=lambda new, total: torch.arange(new)))
scores_turned_late.mistake(
    "one position too far",
    because="the query predicts the token at the next position; but it stands at its "
    "own",
)(wrong_late(of_queries=lambda new, total: torch.arange(total - new, total) + 1))
scores_turned_late.mistake(
    "keys left as they are",
    because="scores depend on the distance alone, so turning one side seems enough. "
    "The distance is what is left when both are turned",
)(wrong_late(of_keys=lambda new, total: torch.zeros(total, dtype=torch.long)))
scores_turned_late.mistake(
    "all keys at the end",
    because="the error in the chunk was about shapes, and one position for all keys "
    "fits",
)(wrong_late(of_keys=lambda new, total: torch.full((total,), total - 1)))
scores_turned_late.mistake(
    "keys counted backwards",
    because="the newest key has distance 0, so numbers that fall towards it look like "
    "distances. Rotation makes distances by itself, out of places",
)(wrong_late(of_keys=lambda new, total: torch.arange(total).flip(0)))
scores_turned_late.mistake(
    "turned once more",
    because="the cache of this book holds turned keys. This one does not: it was to be "
    "turned once, at the key's own position",
)(wrong_late(of_keys=lambda new, total: 2 * torch.arange(total)))


@scores_turned_late.cases
def _(draw):
    frequencies = torch.tensor([1.0, 0.3, 0.05, 0.01])
    for batch, heads, new, cached, pairs in (
        (1, 1, 1, 2, 1),
        (1, 1, 3, 0, 2),
        (2, 2, 3, 6, 4),
        (2, 3, 1, 8, 4),
    ):
        queries = draw.normal(batch, heads, new, 2 * pairs)
        keys = draw.normal(batch, heads, new + cached, 2 * pairs)
        yield queries, keys, frequencies[:pairs] * draw.uniform(1, low=0.7, high=1.3)


@scores_turned_late.also("a loop over keys")
def _(queries, keys, frequencies):
    dtype, cached = queries.dtype, keys.shape[2] - queries.shape[2]
    here = positions_after(cached, queries.shape[2])
    queries = apply_rotary(queries, *rope_tables(here, frequencies, dtype))
    columns = []
    for j in range(keys.shape[2]):
        tables = rope_tables(positions_after(j, 1), frequencies, dtype)
        columns.append(queries @ apply_rotary(keys[:, :, j : j + 1], *tables).mT)
    return torch.cat(columns, dim=-1)


@scores_turned_late.also("the differences of positions, as complex numbers")
def _(queries, keys, frequencies):
    there = torch.arange(keys.shape[2])
    angles = (there[-queries.shape[2] :, None] - there)[..., None] * frequencies
    pairs = [torch.complex(*x.chunk(2, dim=-1)) for x in (queries, keys)]
    turned = pairs[0][:, :, :, None] * torch.polar(torch.ones_like(angles), angles)
    return (turned * pairs[1][:, :, None].conj()).real.sum(dim=-1)
