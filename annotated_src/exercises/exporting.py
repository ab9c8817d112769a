"""Exercises on models of fixed shapes: places of a cache, and calls that fill it."""

from dataclasses import replace

import torch
from torch import Tensor

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.exercise import Choice
from annotated_src.edge_model import make_entries
from annotated_src.models.llama import Llama, tiny_config

chapter = Chapter("device/04_exporting", "Exporting: two entries, one file")


@chapter.implement(
    title="a cache that is not changed",
    minutes=10,
    difficulty="easy",
    section="A cache that is handed around",
    text="""
Write new keys (or values) into a cache of $S$ places, without looking it up: token $t$
goes to place `positions[t]`, all other places keep what they hold. The cache that is
given stays as it is, a new one comes back. Positions are all different; here they need
not be neighbours, nor come in order.
""",
    hints=(
        "What has the same shape as the result, and is right wherever no token goes?",
        "Places are counted along axis 2, from 0. An index may be a tensor of places, "
        "on the left of `=` too.",
    ),
    proves="Each token lands in its own place, in every row of the batch and every "
    "head; nothing else changes, whatever junk it is, and the cache given stays as it "
    "was.",
    why="In a file `index_copy` becomes a scatter, and so does a tensor as an index; "
    "`where` chooses for all S places to write one token. The exported model writes "
    "neighbours only, so that one slice will do: `write_tokens` takes the first place.",
)
def write_at(stored, new, positions):
    """(B, K, S, H), (B, K, T, H), (T,) -> (B, K, S, H) with the new ones in it."""
    return stored.index_copy(2, positions, new)


@write_at.cases
def _(draw):
    stored = torch.full((1, 1, 4, 2), 99.0)
    new = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    yield stored, new, torch.tensor([2, 0])
    for batch, heads, places, tokens in ((2, 1, 3, 1), (2, 3, 8, 3), (2, 1, 7, 7)):
        stored = 10 + draw.normal(batch, heads, places, 4)
        new = draw.normal(batch, heads, tokens, 4)
        yield stored, new, torch.tensor(draw.permutation(places)[:tokens])
    stored, new = (draw.normal(1, 2, tokens, 3).half() for tokens in (9, 4))
    yield stored, new, torch.arange(3, 7)


@write_at.also("place by place")
def _(stored, new, positions):
    tokens = {place: token for token, place in enumerate(positions.tolist())}
    places = [
        new[:, :, tokens[s]] if s in tokens else stored[:, :, s]
        for s in range(stored.shape[2])
    ]
    return torch.stack(places, dim=2)


@write_at.also("where, without an index")
def _(stored, new, positions):
    here = positions[:, None] == torch.arange(stored.shape[2])  # (T, S)
    token = here.int().argmax(dim=0)
    return torch.where(here.any(dim=0)[:, None], new.index_select(2, token), stored)


@write_at.also("a copy, and a tensor as its index")
def _(stored, new, positions):
    written = stored.clone()
    written[:, :, positions] = new
    return written


@write_at.mistake(
    "in place",
    because="the cache of the earlier chapters is an object that grows. A compiled "
    "program is a function: whoever handed the cache in may still need it",
)
def _(stored, new, positions):
    stored[:, :, positions] = new
    return stored


@write_at.mistake(
    "put at the end",
    because="a cache in Python grows by `cat`. This one has all its places from the "
    "start, and its shape never changes",
)
def _(stored, new, positions):
    return torch.cat((stored, new), dim=2)


@write_at.mistake(
    "from place 0 on",
    because="in a first prefill the positions are 0, 1, 2 and so on, and it is right",
    section="Two calls, of two shapes",
)
def _(stored, new, positions):
    written = stored.clone()
    written[:, :, : new.shape[2]] = new
    return written


@write_at.mistake(
    "from the first position on",
    because="the exported model may do so: its positions count up by one. Nobody "
    "promised that here",
)
def _(stored, new, positions):
    written = stored.clone()
    first = int(positions[0])
    written[:, :, first : first + new.shape[2]] = new
    return written


@write_at.mistake(
    "in the order of the places",
    because="a mask of places says where tokens go. It cannot say which token goes "
    "where: they fill it from the left",
)
def _(stored, new, positions):
    written = stored.clone()
    taken = torch.zeros(stored.shape[2], dtype=torch.bool)
    taken[positions] = True
    written[:, :, taken] = new
    return written


@write_at.mistake(
    "added to what was there",
    because="in a cache of zeros adding is writing, and tests begin with zeros. Later "
    "there is junk in the place, and it has to go",
    section="Why junk is harmless",
)
def _(stored, new, positions):
    return stored.index_add(2, positions, new)


@write_at.mistake(
    "zeros all around",
    because="a new tensor is made with `zeros_like`, and the first call cannot tell: "
    "the cache was zeros anyway",
)
def _(stored, new, positions):
    written = torch.zeros_like(stored)
    written[:, :, positions] = new
    return written


@write_at.mistake(
    "places counted from 1",
    because="the first token is the first place. In Python that is 0, and -1 is no "
    "error: it is the last place",
)
def _(stored, new, positions):
    written = stored.clone()
    written[:, :, positions - 1] = new
    return written


@write_at.mistake(
    "the first text only",
    because="an export has a batch of one, and `[0]` is quickly written",
)
def _(stored, new, positions):
    written = stored.clone()
    written[:1, :, positions] = new[:1]
    return written


def plain_lists(result, *inputs):
    """Make lists of ranges and tensors: they hold the same numbers."""
    if isinstance(result, list | tuple):
        return [plain_lists(item) for item in result]
    return list(map(int, result)) if isinstance(result, range | Tensor) else result


@chapter.implement(
    title="a prompt longer than prefill",
    minutes=15,
    difficulty="moderate",
    section="Two calls, of two shapes",
    text="""
Prefill reads `size` tokens in a call; the prompt has more, or fewer. Nothing forbids a
second call: positions are an argument. List the calls that put *all* of the prompt into
the cache, each a pair: `size` tokens, and their positions. The last call is filled up
with tokens 0, which have positions too. If a call, its filling included, would write
beyond the `room` places of the cache, return None.
""",
    hints=(
        "Where does the second call begin? Which positions does its filling have?",
        "`range(0, len(prompt), size)` has the first position of each call. How many "
        "places do all calls write together?",
    ),
    proves="The calls hold the prompt in order, at positions that go on counting, with "
    "the filling behind it; and no call writes where there is no place.",
    why="The filling needs room as well. With 64 places all is well; with 60 a prompt "
    "of 50 would write up to place 63. Torch refuses that. On a device, positions that "
    "somebody clips at the end of the cache move the slice back until it fits, over "
    "the tokens before it, in silence: the next chapter shows it.",
    observe=plain_lists,
)
def prefill_calls(prompt, size, room):
    """List of n ids, two numbers -> list of (list, list), or None: no room."""
    calls = []
    for start in range(0, len(prompt), size):
        chunk = prompt[start : start + size]
        filling = [0] * (size - len(chunk))
        calls.append((chunk + filling, list(range(start, start + size))))
    return calls if len(calls) * size <= room else None


@prefill_calls.cases
def _(draw):
    yield [7, 8, 9], 2, 5
    yield [7, 8, 9], 2, 4
    for count, size, room in (
        (1, 4, 4),
        (8, 4, 9),
        (8, 4, 8),
        (9, 4, 11),
        (10, 4, 13),
        (30, 16, 64),
        (50, 16, 60),
        (50, 16, 64),
    ):
        yield draw.integers(1, 90, count).tolist(), size, room


@prefill_calls.also("padded first, then cut")
def _(prompt, size, room):
    padded = list(prompt)
    while len(padded) % size:
        padded.append(0)
    if len(padded) > room:
        return None
    places = range(len(padded))
    return [
        (padded[i : i + size], [*places[i : i + size]])
        for i in range(0, len(padded), size)
    ]


@prefill_calls.also("tensors, a call a row")
def _(prompt, size, room):
    count = -(-len(prompt) // size)
    if count * size > room:
        return None
    ids = torch.zeros(count * size, dtype=torch.int64)
    ids[: len(prompt)] = torch.tensor(prompt)
    places = torch.arange(count * size).view(count, size)
    return [*zip(ids.view(count, size).tolist(), places.tolist(), strict=True)]


def wrong_calls(
    starts=lambda n, size: range(0, n, size),
    pad=lambda chunk, filling: chunk + filling,
    places=lambda start, size, n, room: range(start, start + size),
    refuse=lambda n, used, room: used > room,
):
    """Make a prefill_calls with one thing changed."""

    def calls(prompt, size, room):
        found = []
        for start in starts(len(prompt), size):
            chunk = prompt[start : start + size]
            ids = pad(chunk, [0] * (size - len(chunk)))
            found.append((ids, list(places(start, size, len(prompt), room))))
        return None if refuse(len(prompt), len(found) * size, room) else found

    return calls


prefill_calls.mistake(
    "each call begins at 0",
    because="`arange(size)` was right for the first call. The second then overwrites "
    "it",
)(wrong_calls(places=lambda start, size, n, room: range(size)))
prefill_calls.mistake(
    "filled up in front",
    because="batches of prompts are padded on the left, so that all end together. Here "
    "the filling would take the places of the text",
)(wrong_calls(pad=lambda chunk, filling: filling + chunk))
prefill_calls.mistake(
    "the rest is dropped",
    because="`len(prompt) // size` counts the calls that are full",
)(wrong_calls(starts=lambda n, size: range(0, n // size * size, size)))
prefill_calls.mistake(
    "one call too many",
    because="`len(prompt) // size + 1` makes room for a rest, also when there is none",
)(wrong_calls(starts=lambda n, size: range(0, (n // size + 1) * size, size)))
prefill_calls.mistake(
    "room for the text only",
    because="the filling is junk, and junk seems to need no place. Prefill writes all "
    "of its tokens, though",
    section="Why junk is harmless",
)(wrong_calls(refuse=lambda n, used, room: n > room))
prefill_calls.mistake(
    "the last place is kept free",
    because="a full cache sounds like one too full. A call may write the last place",
)(wrong_calls(refuse=lambda n, used, room: used >= room))
prefill_calls.mistake(
    "positions clipped at the end",
    because="`min` keeps every number in range, and no error comes up. Two tokens then "
    "share the last place, and one of them is lost",
)(
    wrong_calls(
        places=lambda start, size, n, room: (
            min(s, room - 1) for s in range(start, start + size)
        ),
        refuse=lambda n, used, room: False,
    )
)
prefill_calls.mistake(
    "the filling stays at the last token",
    because="in a padded batch the pads' positions do not matter. Here a position is a "
    "place, and the filling would overwrite the last token",
)(
    wrong_calls(
        places=lambda start, size, n, room: (
            min(s, n - 1) for s in range(start, start + size)
        )
    )
)


prefill_calls.mistake(
    "the filling at place 0",
    because="libraries give padding the position 0, or 1, since nobody looks at it. "
    "Here it would overwrite the first token",
)(
    wrong_calls(
        places=lambda start, size, n, room: (
            s if s < n else 0 for s in range(start, start + size)
        )
    )
)


@prefill_calls.mistake(
    "the last token left for decode",
    because="the runner does so, to get its scores. Here the whole prompt is asked for",
)
def _(prompt, size, room):
    return prefill_calls.solution(prompt[:-1], size, room)


chapter.explain(
    "scores_of_all_tokens",
    title="if prefill gave scores",
    minutes=5,
    difficulty="moderate",
    section="Into one file",
    text="""
The runner gives the last token of the prompt to decode. Suppose prefill returned the
scores of all its tokens instead, for SmolLM2 with $P = 64$ and 49,152 scores a token in
float32. What would the call compute and bring back in addition, and what would it save?
""",
    hints=(
        "What did the compiler leave out of prefill, because no result needs it?",
        "Count the products with weights of both entries again. How many scores does "
        "the next token need?",
    ),
    choices={
        "a": Choice(
            "Nothing in addition: the scores are computed anyway, and thrown away. It "
            "saves one decode call.",
            "They are not computed: the wrapper does not call the head, and the "
            "compiler keeps what the results need. The last layer of prefill has 2 "
            "products left of 7.",
        ),
        "b": Choice(
            "The head for 64 tokens and the rest of the last layer, and 12.6 MB of "
            "scores, of which one row is wanted. It saves one decode call.",
            "The last layer's queries, attention and feed-forward network come back to "
            "life, the head is a product for 64 tokens, and 64 times 49,152 times 4 "
            "bytes are copied out. One reading of the weights is saved in each prompt. "
            "To pick the one row inside the program would need its number as a third "
            "input; that is a fair design too.",
        ),
        "c": Choice(
            "The head for 64 tokens, one product more, and 12.6 MB of scores, of which "
            "one row is wanted. It saves one decode call.",
            "One product more in the *graph* that we wrote. But the scores need the "
            "last layer's output, so all that the compiler had left out of that layer "
            "comes back as well.",
        ),
        "d": Choice(
            "The head for 64 tokens and the rest of the last layer, and 12.6 MB of "
            "scores, all of them wanted. It saves 64 decode calls.",
            "The right cost, the wrong gain. Already now the prompt is read by one "
            "prefill and one decode: that one call is all there is to save.",
        ),
    },
    right="b",
)


@chapter.debug(
    title="positions that are all 0",
    minutes=15,
    difficulty="hard",
    section="Two calls, of two shapes",
    text="""
Somebody's runner reads a prompt by the two entries of the exported model: all but the
last token by a prefill of 8, the last one by decode. "The mask sorts out the positions
later." With a prompt of two tokens the scores are right. Mend it; prompts have 2 to 8
tokens.
""",
    hints=(
        "`input_pos` says more than the first place of the write. What else is made of "
        "it?",
        "It picks the rows of the tables of angles, and `places <= input_pos` is the "
        "mask. What does a token see at position 0, and how far are its keys turned?",
    ),
    proves="For prompts of 2 to 8 tokens and caches of several sizes, the two calls "
    "give the scores of the full pass.",
    atol=1e-4,
    why="The write takes the *first* position, and that was right: each token landed "
    "in its own place. But all keys were turned by the angle of position 0, which is "
    "none, and each token saw place 0 alone. So in layer 0 the values are right, the "
    "keys are but for the turn, and what leaves layer 0 is wrong, and with it all of "
    "layer 1.",
)
def read_prompt(model, prompt, room):
    """(Llama, n ids, places of the cache) -> scores after the last token, (V,)."""
    entries = make_entries(model, prefill=8, cache=room)
    (prefill, sample), (decode, _) = entries["prefill"], entries["decode"]
    padded = torch.zeros(1, 8, dtype=torch.int32)
    padded[0, : len(prompt) - 1] = prompt[:-1]
    positions = torch.arange(8, dtype=torch.int32)
    kv = prefill(tokens=padded, input_pos=positions, kv=sample["kv"])["kv"]
    last = torch.tensor([len(prompt) - 1], dtype=torch.int32)
    out = decode(tokens=prompt[None, -1:].int(), input_pos=last, kv=kv)
    return out["logits"][0, 0]


@read_prompt.broken(
    "all positions 0",
    because="the first place of the write is right, and it is all that one sees in the "
    "cache. Angles and mask are made of the positions, too",
)
def _(model, prompt, room):
    entries = make_entries(model, prefill=8, cache=room)
    (prefill, sample), (decode, _) = entries["prefill"], entries["decode"]
    padded = torch.zeros(1, 8, dtype=torch.int32)
    padded[0, : len(prompt) - 1] = prompt[:-1]
    positions = torch.zeros(8, dtype=torch.int32)
    kv = prefill(tokens=padded, input_pos=positions, kv=sample["kv"])["kv"]
    last = torch.tensor([len(prompt) - 1], dtype=torch.int32)
    out = decode(tokens=prompt[None, -1:].int(), input_pos=last, kv=kv)
    return out["logits"][0, 0]


def wrong_runner(
    body=lambda prompt: prompt[:-1],
    at=lambda count: count - 1,
    front=False,
    junk=0.0,
    keep=False,
):
    """Make a read_prompt with one thing changed."""

    def read(model, prompt, room):
        entries = make_entries(model, prefill=8, cache=room)
        (prefill, sample), (decode, _) = entries["prefill"], entries["decode"]
        ids = body(prompt)
        padded = torch.zeros(1, 8, dtype=torch.int32)
        place = slice(8 - len(ids), 8) if front else slice(0, len(ids))
        padded[0, place] = ids
        positions = torch.arange(8, dtype=torch.int32)
        empty = {name: torch.full_like(x, junk) for name, x in sample["kv"].items()}
        kv = prefill(tokens=padded, input_pos=positions, kv=empty)["kv"]
        last = torch.tensor([at(len(prompt))], dtype=torch.int32)
        kv = empty if keep else kv
        out = decode(tokens=prompt[None, -1:].int(), input_pos=last, kv=kv)
        return out["logits"][0, 0]

    return read


read_prompt.mistake(
    "decode where the filling ends",
    because="prefill has just read 8 tokens, as its shape says. The text ends earlier, "
    "and the places between hold junk that the last token now sees",
)(wrong_runner(at=lambda count: 7))
read_prompt.mistake(
    "decode one place too far",
    because="a text of n tokens goes on at place n. But its last token has place n - "
    "1, and is not read yet",
)(wrong_runner(at=lambda count: count))
read_prompt.mistake(
    "the last token twice",
    because="prefill may as well read all of the prompt. Then decode reads the last "
    "token once more, behind itself",
)(wrong_runner(body=lambda prompt: prompt, at=lambda count: count))
read_prompt.mistake(
    "the cache from before",
    because="the cache of the earlier chapters changes when it is used. A function "
    "gives back a new one, and whoever drops it has an empty cache",
    section="A cache that is handed around",
)(wrong_runner(keep=True))
read_prompt.mistake(
    "filled up in front",
    because="batches are padded on the left, and then the text ends where prefill "
    "does. Here the filling takes places 0, 1, 2, which the mask shows",
)(wrong_runner(front=True))
read_prompt.mistake(
    "empty places marked by infinity",
    because="a hidden score is -inf, so -inf seems a fine mark for what is not there. "
    "In the values it is multiplied by 0, and that is NaN",
    section="Why junk is harmless",
)(wrong_runner(junk=-torch.inf))


def telling_llama(draw):
    """Make a Llama of two small layers in which every token and position matters."""
    config = replace(tiny_config(), num_heads=4, num_kv_heads=2, head_dim=8)
    with torch.random.fork_rng(devices=[]):
        model = Llama(config).eval()
    for weight in model.parameters():
        weight.requires_grad_(False)
        if weight.ndim == 1:
            weight.copy_(draw.uniform(*weight.shape, low=0.5, high=1.5))
        else:
            weight.copy_(1.5 * draw.normal(*weight.shape) / weight.shape[-1] ** 0.5)
    return model


@read_prompt.cases
def _(draw):
    model = telling_llama(draw)
    for count, room in ((2, 12), (3, 9), (5, 16), (8, 10)):
        yield model, draw.integers(1, model.config.vocab_size, count), room


@read_prompt.also("the last token in both calls, at its own place")
def _(model, prompt, room):
    return wrong_runner(body=lambda prompt: prompt)(model, prompt, room)


@read_prompt.also("decode alone, token by token")
def _(model, prompt, room):
    decode, sample = make_entries(model, prefill=8, cache=room)["decode"]
    out = {"kv": sample["kv"]}
    for i, token in enumerate(prompt):
        place = torch.tensor([i], dtype=torch.int32)
        out = decode(tokens=token.view(1, 1).int(), input_pos=place, kv=out["kv"])
    return out["logits"][0, 0]


@read_prompt.also("the full pass, without a cache")
def _(model, prompt, room):
    return model(prompt[None])[0, -1]


for size in (9, 7):
    read_prompt.equivalent(
        f"entries = make_entries(model, prefill= {size}, cache=room)",
        because="in torch an entry takes any number of tokens; the call has 8",
    )
read_prompt.equivalent(
    "padded[ -1, : len(prompt) - 1] = prompt[:-1]", because="there is one row"
)
read_prompt.equivalent('return out["logits"][ -1, 0]', because="there is one row")
read_prompt.equivalent('return out["logits"][0, -1]', because="there is one token")
read_prompt.equivalent(
    "padded = torch.ones(1, 8, dtype=torch.int32)",
    because="any filling will do: its keys are hidden, and overwritten in time",
)
