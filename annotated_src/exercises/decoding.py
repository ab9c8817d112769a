"""Exercises on prefill and decode: padding, rows that end, what a step costs."""

import torch

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.exercise import Choice
from annotated_src.models.llama import Llama, LlamaConfig

chapter = Chapter("text/04_decoding", "Prefill and decode")


def at_tokens(found, is_token, num_tokens):
    """Look at positions where there are tokens; padding may have any that exists."""
    here = is_token[:, -num_tokens:]
    if not isinstance(found, torch.Tensor) or found.shape != here.shape:
        return found
    return found.where(here, found.clamp(max=0))


@chapter.implement(
    title="where a padded row begins to count",
    minutes=8,
    difficulty="moderate",
    section="Rows that begin in different places",
    text="""
Write `positions_of`, without looking it up. Rows of a batch are padded on the left;
`is_token` (True: a token, False: padding) covers all columns so far, those in the cache
too. The call is given the last `num_tokens` columns. Which position has each token of
the call? A row must count as it would alone, from 0. Padding gets any number that is
not below 0; nobody looks at it.
""",
    hints=(
        "What is the position of a token, in terms of the tokens before it?",
        "Count the tokens up to each column. The first token of a row has 0. And which "
        "columns of it all belong to this call?",
    ),
    proves="Each row counts from 0 at its own first token, in the prefill and with "
    "tokens in the cache, and padding has numbers that a table of positions has, too.",
    observe=at_tokens,
)
def positions_of(is_token, num_tokens):
    """(B, S) bool -> (B, num_tokens) int64, the positions of the last columns."""
    return (is_token.cumsum(dim=1) - 1).clamp(min=0)[:, -num_tokens:]


def padded_left(lengths, width):
    """(B) lengths -> (B, width), True at the last `length` columns of each row."""
    return torch.arange(width) >= width - torch.tensor(lengths)[:, None]


@positions_of.cases
def _(draw):
    yield padded_left([2, 3], 3), 3
    yield padded_left([2, 4], 4), 1
    for width, num_tokens in ((9, 9), (9, 4), (12, 1)):
        lengths = [width - 1, *(draw.integer(1, width) for _ in range(3)), 1]
        yield padded_left(lengths, width), num_tokens


@positions_of.also("loops")
def _(is_token, num_tokens):
    rows = []
    for row in is_token.tolist():
        count, positions = 0, []
        for is_here in row:
            positions.append(count)
            count += is_here
        rows.append(positions[-num_tokens:])
    return torch.tensor(rows)


@positions_of.also("columns, less the padding")
def _(is_token, num_tokens):
    width = is_token.shape[1]
    padding = (~is_token).sum(dim=1, keepdim=True)
    return (torch.arange(width) - padding).clamp(min=0)[:, width - num_tokens :]


@positions_of.also("as transformers writes it")
def _(is_token, num_tokens):
    positions = is_token.long().cumsum(-1) - 1
    positions.masked_fill_(~is_token, 1)
    return positions[:, -num_tokens:]


@positions_of.mistake(
    "columns for positions",
    because="without padding they are the same, and RoPE forgives it: it only sees "
    "differences. A model with a vector for each position does not",
)
def _(is_token, num_tokens):
    return torch.arange(is_token.shape[1])[-num_tokens:].expand(len(is_token), -1)


@positions_of.mistake(
    "counted from 1",
    because="`cumsum` of the tokens is the number of tokens *with* this one",
)
def _(is_token, num_tokens):
    return is_token.cumsum(dim=-1)[:, -num_tokens:]


@positions_of.mistake(
    "the first row's padding for all",
    because="with one prompt, or prompts of one length, all rows are like the first",
)
def _(is_token, num_tokens):
    padding = (~is_token[0]).sum()
    positions = (torch.arange(is_token.shape[1]) - padding).clamp(min=0)
    return positions[-num_tokens:].expand(len(is_token), -1)


@positions_of.mistake(
    "the cache forgotten",
    because="the call's own columns are all that the model is given; in the prefill "
    "they are all there are",
    section="The loop in ten lines",
)
def _(is_token, num_tokens):
    return (is_token[:, -num_tokens:].cumsum(dim=-1) - 1).clamp(min=0)


@positions_of.mistake(
    "-1 for padding",
    because="nobody looks at padding; but a table of vectors is asked for number -1 "
    "all the same, and says its last one, or raises",
)
def _(is_token, num_tokens):
    return (is_token.cumsum(dim=-1) - 1)[:, -num_tokens:]


@positions_of.mistake(
    "the first columns for the last",
    because="in the prefill the call's columns are all columns",
    section="The annotated source",
)
def _(is_token, num_tokens):
    return (is_token.cumsum(dim=-1) - 1).clamp(min=0)[:, :num_tokens]


@positions_of.mistake(
    "padding counted instead of tokens",
    because="many libraries mark padding with True (`key_padding_mask`); here True is "
    "a token",
)
def _(is_token, num_tokens):
    return ((~is_token).cumsum(dim=-1) - 1).clamp(min=0)[:, -num_tokens:]


@chapter.implement(
    title="each row ends for itself",
    minutes=10,
    difficulty="moderate",
    section="Rows that end in different places",
    text="""
`drawn` are the ids that each row would draw, step after step, if nothing ended. Each
row has stop ids of its own: `stop_ids[b]`, a list, maybe an empty one. Make the batch
that `generate` returns: a row that has drawn a stop id repeats it, and the batch ends
with the step in which the last row ends, or with the last step.
""",
    hints=(
        "The stop id itself belongs to the text. What fills the row after it?",
        "How many columns are there? As many as the longest row needs.",
    ),
    proves="Every row ends at its first stop id and repeats it, none ends for a "
    "neighbour, and no step is made when all have ended.",
)
def end_rows(drawn, stop_ids):
    """(B, n) int64 and B lists of ids -> (B, at most n) int64."""
    rows = []
    for ids, stops in zip(drawn.tolist(), stop_ids, strict=True):
        found = (i for i, token in enumerate(ids) if token in stops)
        rows.append(ids[: next(found, len(ids)) + 1])
    longest = max(map(len, rows))
    return torch.tensor([row + row[-1:] * (longest - len(row)) for row in rows])


@end_rows.cases
def _(draw):
    yield torch.tensor([[3, 2, 5, 1], [4, 5, 2, 6]]), [[2], [2]]
    yield torch.tensor([[3, 2, 5], [7, 5, 2]]), [[2], [7]]
    yield torch.tensor([[3, 2, 5], [2, 5, 7]]), [[], [5, 7]]
    yield torch.tensor([[3, 2, 7, 5], [4, 5, 6, 8]]), [[5, 2], [9]]
    for batch, steps in ((4, 8), (3, 12), (5, 5)):
        stops = [[draw.integer(1, 5), 6 + i] for i in range(batch)]
        yield draw.integers(0, 14, batch, steps), stops
    yield draw.integers(0, 9, 3, 6), [[9], [], [10]]


end_rows.equivalent(
    "for ids, stops in zip(drawn.tolist(), stop_ids, strict=False):",
    because="there are as many lists as rows",
)


@end_rows.also("column by column, as generate does it")
def _(drawn, stop_ids):
    columns, ended = [], [False] * len(drawn)
    for column in drawn.T.tolist():
        if columns:
            last = zip(ended, columns[-1], column, strict=True)
            column = [old if over else new for over, old, new in last]
        columns.append(column)
        ended = [i in stops for i, stops in zip(column, stop_ids, strict=True)]
        if all(ended):
            break
    return torch.tensor(columns).T


@end_rows.also("vectorised")
def _(drawn, stop_ids):
    pairs = zip(drawn, stop_ids, strict=True)
    stops = torch.stack([torch.isin(row, torch.tensor(s).long()) for row, s in pairs])
    steps = drawn.shape[1]
    ends = torch.where(stops.any(dim=1), stops.int().argmax(dim=1), steps - 1)
    places = torch.arange(steps).minimum(ends[:, None])
    return drawn.gather(1, places)[:, : int(ends.max()) + 1]


def ends_of(drawn, stop_ids):
    """Find the step in which each row draws a stop id; the number of steps for none."""
    return [
        next((i for i, token in enumerate(ids) if token in stops), len(ids))
        for ids, stops in zip(drawn.tolist(), stop_ids, strict=True)
    ]


def filled(drawn, ends, width, fill=None):
    """Repeat each row's id at its end up to the width, or another fill."""
    rows = []
    for ids, end in zip(drawn.tolist(), ends, strict=True):
        row = ids[: end + 1]
        rows.append((row + [row[-1] if fill is None else fill] * width)[:width])
    return torch.tensor(rows)


@end_rows.mistake(
    "the first row to end ends the batch",
    because="with one row the first stop id is the end, and `break` stands in the loop",
)
def _(drawn, stop_ids):
    ends = ends_of(drawn, stop_ids)
    return filled(drawn, ends, min(min(ends) + 1, drawn.shape[1]))


@end_rows.mistake(
    "an ended row goes on",
    because="the others need more steps, and the model computes a next id for every "
    "row",
)
def _(drawn, stop_ids):
    return drawn[:, : max(ends_of(drawn, stop_ids)) + 1]


@end_rows.mistake(
    "the first row's stop ids for all",
    because="one list of stop ids is the usual case; here each row has its own",
)
def _(drawn, stop_ids):
    ends = ends_of(drawn, [stop_ids[0]] * len(drawn))
    return filled(drawn, ends, min(max(ends) + 1, drawn.shape[1]))


@end_rows.mistake(
    "filled with 0",
    because="transformers fills with `pad_token_id`, and that is 0 in many a model; "
    "here the stop id is repeated",
    section="What transformers' `generate` does",
)
def _(drawn, stop_ids):
    ends = ends_of(drawn, stop_ids)
    return filled(drawn, ends, min(max(ends) + 1, drawn.shape[1]), fill=0)


@end_rows.mistake(
    "only the first of its stop ids",
    because="most models have one; in a chat the end of a turn and the end of a text "
    "may both stop",
)
def _(drawn, stop_ids):
    ends = ends_of(drawn, [stops[:1] for stops in stop_ids])
    return filled(drawn, ends, min(max(ends) + 1, drawn.shape[1]))


@end_rows.mistake(
    "filled with the list's first stop id",
    because="`stop_ids[b][0]` is at hand, and with one stop id it is the one; but the "
    "row repeats what it said",
)
def _(drawn, stop_ids):
    ends = ends_of(drawn, stop_ids)
    found = filled(drawn, ends, min(max(ends) + 1, drawn.shape[1]))
    for row, end, stops in zip(found, ends, stop_ids, strict=True):
        row[end + 1 :] = stops[0] if stops else 0
    return found


@end_rows.mistake(
    "one column short",
    because="the text is what comes before the stop id; but the ids hold it, and the "
    "next turn of a chat needs it",
)
def _(drawn, stop_ids):
    ends = ends_of(drawn, stop_ids)
    return filled(drawn, ends, max(ends))


@end_rows.mistake(
    "all steps, whatever ends",
    because="`max_new_tokens` were asked for; it is the most, not the number",
)
def _(drawn, stop_ids):
    return filled(drawn, ends_of(drawn, stop_ids), drawn.shape[1])


@end_rows.mistake(
    "the step before a stop repeated",
    because="an ended row repeats its last id, and the check comes before the new id "
    "is in; so the stop id is never written",
)
def _(drawn, stop_ids):
    ends = ends_of(drawn, stop_ids)
    before = [max(end - 1, 0) for end in ends]
    return filled(drawn, before, min(max(ends) + 1, drawn.shape[1]))


@chapter.implement(
    title="how long one step takes",
    minutes=12,
    difficulty="moderate",
    section="Arithmetic intensity",
    text=r"""
One decode step: `num_rows` rows, one new token each, and each looks at `num_keys` keys
(its own among them). `sizes` says of a model how many `weights` it has in matrices
($P$), how many numbers it keeps for a token in the cache (`kept`, $M$), how many
operations attention needs for a key (`attention`, $A$), and how many bytes a number has
(`width`, $b$). A machine does `rate` operations and reads `bandwidth` bytes a second,
both at the same time. No step can be faster than how many seconds?
""",
    hints=(
        "Count operations, count bytes, and turn both into seconds. Which of them must "
        "wait for the other?",
        "A weight comes once for all rows and does two operations for each. A key "
        "comes for one row.",
    ),
    proves="The bound is right where memory decides and where arithmetic does, for one "
    "row and for many.",
    rtol=1e-9,
    atol=0.0,
)
def step_seconds(num_rows, num_keys, sizes, rate, bandwidth):
    """Give the seconds, a float."""
    operations = num_rows * (2 * sizes["weights"] + sizes["attention"] * num_keys)
    numbers = sizes["weights"] + num_rows * sizes["kept"] * num_keys
    return max(operations / rate, sizes["width"] * numbers / bandwidth)


TOY = {"weights": 10, "kept": 4, "attention": 8, "width": 2}
SMOLLM2 = {"weights": 134_479_872, "kept": 11_520, "attention": 69_120, "width": 4}


@step_seconds.cases
def _(draw):
    yield 1, 2, TOY, 10.0, 10.0
    yield 3, 2, TOY, 4.0, 10.0
    yield 3, 2, TOY, 100.0, 10.0
    for num_rows, num_keys in ((1, 1024), (100, 128), (100, 1024)):
        for rate in (1e11, 1e10):
            yield num_rows, num_keys + draw.integer(0, 100), SMOLLM2, rate, 1e10


@step_seconds.also("row by row")
def _(num_rows, num_keys, sizes, rate, bandwidth):
    work, traffic = 0.0, sizes["width"] * sizes["weights"]
    for _ in range(num_rows):
        work += 2 * sizes["weights"] + num_keys * sizes["attention"]
        traffic += sizes["width"] * num_keys * sizes["kept"]
    return max(work / rate, traffic / bandwidth)


@step_seconds.also("the roofline: intensity against balance")
def _(num_rows, num_keys, sizes, rate, bandwidth):
    work = num_rows * (2 * sizes["weights"] + sizes["attention"] * num_keys)
    traffic = sizes["weights"] + num_rows * sizes["kept"] * num_keys
    traffic *= sizes["width"]
    intensity, balance = work / traffic, rate / bandwidth
    return work / (rate if intensity >= balance else intensity * bandwidth)


def wrong_seconds(of=max, twice=2, fetch_each=False, caches=None, rows=None, keys=None):
    """Make a bound with other counts of weights, caches, rows or keys."""

    def seconds(num_rows, num_keys, sizes, rate, bandwidth):
        all_rows = num_rows if rows is None else rows
        work = all_rows * (twice * sizes["weights"] + sizes["attention"] * num_keys)
        fetched = num_rows if fetch_each else 1
        held = num_rows if caches is None else caches
        read = num_keys if keys is None else keys
        numbers = fetched * sizes["weights"] + held * sizes["kept"] * read
        return of(work / rate, sizes["width"] * numbers / bandwidth)

    return seconds


step_seconds.mistake(
    "one after the other",
    because="first the numbers come, then they are multiplied; of one number that is "
    "true, but the next ones come meanwhile",
)(wrong_seconds(of=lambda a, b: a + b))
step_seconds.mistake(
    "the faster of the two",
    because="the machine can do so much; it also has to wait for what it does it with",
)(wrong_seconds(of=min))
step_seconds.mistake(
    "the weights fetched for each row",
    because="each row goes through all layers; but they go together, and a weight that "
    "has come serves all",
    section="Bytes",
)(wrong_seconds(fetch_each=True))
step_seconds.mistake(
    "one cache for all rows",
    because="the batch shares everything else; but each row has a past of its own",
    section="Bytes",
)(wrong_seconds(caches=1))
step_seconds.mistake(
    "one operation for a weight",
    because="one number is multiplied; then it is added, too",
    section="Operations",
)(wrong_seconds(twice=1))
step_seconds.mistake(
    "the work of one row",
    because="the rows run side by side; but the machine's rate is for all of them",
    section="Operations",
)(wrong_seconds(rows=1))
step_seconds.mistake(
    "only the new token in the cache",
    because="one key is written; all of them are read",
    section="Bytes",
)(wrong_seconds(keys=1))


@chapter.implement(
    title="a long prompt in chunks",
    minutes=8,
    difficulty="easy",
    section="The loop in ten lines",
    text="""
A prompt of 8000 tokens makes scores of 8000 × 8000 in every head. Read it `size` tokens
at a time instead, the last time what is left (transformers: `prefill_chunk_size`).
Return the scores after the last token of each chunk, in a row; sampling needs the last
of them. `model.new_cache(batch_size, max_seq_len)` makes a cache, `model(tokens, cache,
last_logits_only=True)` gives (B, 1, V).
""",
    hints=(
        "A call takes in any number of tokens. What makes the second chunk see the "
        "first?",
        "One cache, made before the loop. And what if `size` does not divide the "
        "length?",
    ),
    proves="The prompt is read in chunks of that size, each of which sees all before "
    "it: for a size that divides the length, one that does not, and one larger than "
    "the prompt.",
    why="It is less work, too. At once the mask throws away nearly half of the scores "
    "that were computed; chunks never compute most of these.",
    atol=1e-8,
    rtol=1e-6,
)
def prefill_in_chunks(model, tokens, size):
    """(B, T) ids, read by a model -> (B, chunks, V), the scores after each chunk."""
    cache = model.new_cache(*tokens.shape)
    chunks = tokens.split(size, dim=1)
    found = [model(chunk, cache, last_logits_only=True) for chunk in chunks]
    return torch.cat(found, dim=1)


def small_llama(draw):
    """Make a Llama with random weights, in float64."""
    sizes = LlamaConfig(
        vocab_size=5,
        num_layers=1,
        embed_dim=4,
        num_heads=2,
        num_kv_heads=1,
        head_dim=2,
        ffn_dim=3,
        max_seq_len=40,
        norm_eps=1e-5,
        rope_base=100.0,
        tied_head=True,
    )
    model = Llama(sizes).double().requires_grad_(False)
    for weight in model.parameters():
        weight.copy_(0.5 + draw.normal(*weight.shape))
    return model


@prefill_in_chunks.cases
def _(draw):
    model = small_llama(draw)
    yield model, torch.tensor([[0, 1, 2]]), 2
    yield model, draw.integers(0, 5, 3, 4), 2
    yield model, draw.integers(0, 5, 2, 5), 2
    yield model, draw.integers(0, 5, 2, 4), 9


@prefill_in_chunks.also("places counted")
def _(model, tokens, size):
    num_rows, length = tokens.shape
    cache, start, found = model.new_cache(num_rows, length), 0, []
    while start < length:
        found.append(model(tokens[:, start : start + size], cache)[:, -1])
        start += size
    return torch.stack(found, dim=1)


@prefill_in_chunks.also("the first chunk alone")
def _(model, tokens, size):
    cache = model.new_cache(tokens.shape[0], tokens.shape[1] + 1)
    logits = model(tokens[:, :size], cache, last_logits_only=True)
    for start in range(size, tokens.shape[1], size):
        chunk = tokens[:, start : start + size]
        logits = torch.cat([logits, model(chunk, cache, last_logits_only=True)], dim=1)
    return logits


def wrong_chunks(chunks_of, room=lambda tokens: tokens.shape[1], last_only=True):
    """Make a prefill of other chunks of the tokens, in one cache with some room."""

    def read(model, tokens, size):
        cache = model.new_cache(tokens.shape[0], room(tokens))
        chunks = chunks_of(tokens, size)
        found = [model(x, cache, last_logits_only=last_only) for x in chunks]
        return torch.cat(found, dim=1)

    return read


@prefill_in_chunks.mistake(
    "a cache for each chunk",
    because="a call needs a cache, so it is made where the call is; then each chunk "
    "is a text of its own",
)
def _(model, tokens, size):
    found = []
    for chunk in tokens.split(size, dim=1):
        cache = model.new_cache(*chunk.shape)
        found.append(model(chunk, cache, last_logits_only=True))
    return torch.cat(found, dim=1)


prefill_in_chunks.mistake(
    "the last chunk forgotten",
    because="`length // size` chunks is what one would draw; what is left over is no "
    "full chunk",
)(
    wrong_chunks(
        lambda tokens, size: [
            tokens[:, i * size : (i + 1) * size]
            for i in range(max(tokens.shape[1] // size, 1))
        ]
    )
)
prefill_in_chunks.mistake(
    "as many chunks as `size` says",
    because="`chunk` sounds like the method for it; it wants the number of chunks, and "
    "`split` their size",
)(wrong_chunks(lambda tokens, size: tokens.chunk(size, dim=1)))
prefill_in_chunks.mistake(
    "one by one after the first chunk",
    because="that is how decode goes on, when the next token is not known; here all of "
    "them are",
)(
    wrong_chunks(
        lambda tokens, size: (
            [tokens[:, :size], *tokens[:, size:].split(1, dim=1)]
            if tokens.shape[1] > size
            else [tokens]
        )
    )
)
prefill_in_chunks.mistake(
    "everything at once",
    because="the scores after the prompt are the same; but so are the 8000 × 8000 that "
    "were to be saved",
)(wrong_chunks(lambda tokens, size: [tokens]))
prefill_in_chunks.mistake(
    "a token read twice",
    because="the last token of a chunk predicts the first of the next, so it seems to "
    "belong to both; the cache has it already",
)(
    wrong_chunks(
        lambda tokens, size: [
            tokens[:, max(start - 1, 0) : start + size]
            for start in range(0, tokens.shape[1], size)
        ],
        room=lambda tokens: 2 * tokens.shape[1],
    )
)
prefill_in_chunks.mistake(
    "everything so far, again",
    because="the loop without a cache passes the whole text each time; with one, it is "
    "read a second time",
)(
    wrong_chunks(
        lambda tokens, size: [
            tokens[:, : start + size] for start in range(0, tokens.shape[1], size)
        ],
        room=lambda tokens: tokens.shape[1] ** 2,
    )
)
prefill_in_chunks.mistake(
    "scores after every token",
    because="that is what a call gives unless it is told otherwise; for training one "
    "wants them all",
    section="Whose logits you want",
)(wrong_chunks(lambda tokens, size: tokens.split(size, dim=1), last_only=False))


chapter.explain(
    "kept_for_the_next_turn",
    title="the cache after an answer",
    minutes=5,
    difficulty="moderate",
    section="The loop in ten lines",
    text="""
You keep the cache after an answer, for the user's next question. `generate` wrote $n$
tokens after a prompt of $p$. How many are in the cache, and what does the next prefill
begin with?
""",
    hints=(
        "In the calls of the counting model: which token was said, and never read?",
        "A token enters the cache when it passes through the layers, not when it is "
        "drawn.",
    ),
    choices={
        "a": Choice(
            "`p + n`; it begins with the new turn.",
            "Count the calls: $n$ of them, the first with $p$ tokens and the others "
            "with one. That is $p + n - 1$.",
        ),
        "b": Choice(
            "`p`; it begins with the answer.",
            "The cache grows with every decode step: each reads the token before it.",
        ),
        "c": Choice(
            "`p + n - 1`; it begins with the new turn.",
            "The number is right. But then the last token of the answer is never read, "
            "and in a chat that is the one that says that the turn is over.",
        ),
        "d": Choice(
            "`p + n - 1`; it begins with the answer's last token.",
            "The last one was drawn, not read. It comes first, and then the tokens of "
            "the new turn.",
        ),
    },
    right="d",
    why="And a row that had ended earlier than others of its batch? It has repeats of "
    "its stop id in its cache, which no text would have. Rewinding does not help, for "
    "`length` is one number for all rows; hide them with `is_token`, or read the row "
    "again.",
)


@chapter.debug(
    title="a mask that was guessed",
    minutes=8,
    difficulty="easy",
    section="Rows that begin in different places",
    text="""
A colleague fills up a batch on the left, and makes the mask by looking for the
padding's id. With plain texts it works. With chats, in which the end of a turn has the
id of padding, it does not. Mend it.
""",
    hints=(
        "Can one tell from the id whether a token is padding?",
        "The lengths of the rows tell what no id can.",
    ),
    proves="Rows of any lengths end together, and the mask shows each of their own "
    "tokens, whatever its id.",
    why="The guess would have hidden the ends of the turns: of the system message, "
    "and of the question. No guess is a substitute for the mask of whoever made the "
    "padding.",
)
def pad_left(rows, pad_id):
    """B lists of ids -> (B, T) int64 tokens and (B, T) bool, True at tokens."""
    longest = max(map(len, rows))
    tokens = [[pad_id] * (longest - len(row)) + row for row in rows]
    is_token = [[i >= longest - len(row) for i in range(longest)] for row in rows]
    return torch.tensor(tokens), torch.tensor(is_token)


@pad_left.broken(
    "padding told by its id",
    because="padding has an id of its own in the vocabulary; in many models it is the "
    "id of the end, and that one stands in texts",
)
def _(rows, pad_id):
    longest = max(map(len, rows))
    tokens = torch.tensor([[pad_id] * (longest - len(row)) + row for row in rows])
    return tokens, tokens != pad_id


@pad_left.cases
def _(draw):
    yield [[5, 2], [2, 6, 2]], 2
    yield [[7, 2, 8], [9]], 2
    yield [[1, 3], [4, 5]], 2
    for pad_id in (0, 2):
        lengths = [4, *(draw.integer(1, 8) for _ in range(3)), 9, 1]
        yield [draw.integers(0, 4, n).tolist() for n in lengths], pad_id


@pad_left.also("tensors")
def _(rows, pad_id):
    lengths = torch.tensor([[len(row)] for row in rows])
    longest = int(lengths.max())
    is_token = torch.arange(longest) >= longest - lengths
    tokens = torch.full(is_token.shape, pad_id)
    tokens[is_token] = torch.tensor([i for row in rows for i in row])
    return tokens, is_token


@pad_left.also("pad_sequence, backwards")
def _(rows, pad_id):
    def padded(lists, value):
        turned = [torch.tensor(row).flip(0) for row in lists]
        pad = torch.nn.utils.rnn.pad_sequence
        return pad(turned, batch_first=True, padding_value=value).flip(1)

    return padded(rows, pad_id), padded([[1] * len(row) for row in rows], 0).bool()


@pad_left.mistake(
    "padded on the right",
    because="training pads there, and with a causal mask nobody sees it; but then the "
    "last column is not everybody's last token",
    section="Why not on the right?",
)
def _(rows, pad_id):
    longest = max(map(len, rows))
    tokens = [row + [pad_id] * (longest - len(row)) for row in rows]
    is_token = [[i < len(row) for i in range(longest)] for row in rows]
    return torch.tensor(tokens), torch.tensor(is_token)


@pad_left.mistake(
    "the leading padding's id",
    because="padding stands in front, so what comes first and looks like it must be "
    "it; but a text may begin with that id, too",
)
def _(rows, pad_id):
    longest = max(map(len, rows))
    tokens = torch.tensor([[pad_id] * (longest - len(row)) + row for row in rows])
    return tokens, (tokens != pad_id).cumsum(dim=1) > 0


@pad_left.mistake(
    "the other polarity",
    because="`key_padding_mask` in torch is True at padding; here True is a token",
)
def _(rows, pad_id):
    longest = max(map(len, rows))
    tokens = [[pad_id] * (longest - len(row)) + row for row in rows]
    is_padding = [[i < longest - len(row) for i in range(longest)] for row in rows]
    return torch.tensor(tokens), torch.tensor(is_padding)


@pad_left.mistake(
    "cut to the shortest row",
    because="a rectangle can be had by cutting, too; then the batch lacks what the "
    "longer prompts say",
)
def _(rows, pad_id):
    shortest = min(map(len, rows))
    tokens = torch.tensor([row[-shortest:] for row in rows])
    return tokens, torch.ones_like(tokens, dtype=torch.bool)


@pad_left.mistake(
    "numbers for truth values",
    because="transformers' `attention_mask` is made of 1 and 0. As an index such a "
    "mask picks rows 1 and 0, and `~` of 1 is -2",
    section="What transformers' `generate` does",
)
def _(rows, pad_id):
    longest = max(map(len, rows))
    tokens = [[pad_id] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(tokens), torch.tensor(mask)


@pad_left.mistake(
    "the first row's length for all",
    because="the padding is computed once, outside the loop",
)
def _(rows, pad_id):
    longest = max(map(len, rows))
    padding = longest - len(rows[0])
    tokens = [([pad_id] * longest + row)[-longest:] for row in rows]
    is_token = [[i >= padding for i in range(longest)] for _ in rows]
    return torch.tensor(tokens), torch.tensor(is_token)
