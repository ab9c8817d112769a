"""Exercises without torch: the runner's first calls, shares, safe winners, bytes."""

import math

import numpy as np

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.exercise import Choice

chapter = Chapter("device/05_on_device", "On the device")


def plain_floats(result, *inputs):
    """Give an array of float64: shares in float32 or float64 are both right."""
    return np.asarray(result, dtype=np.float64)


@chapter.implement(
    title="sampling without torch",
    minutes=10,
    difficulty="moderate",
    section="The annotated source",
    text="""
Greedy is not the only way to choose, and numpy has no `softmax`. Write the shares of
the next token: divide the logits by the temperature, keep the `top_k` largest, and
share 1 out among these; all others get exactly 0. Logits may be in the hundreds, above
0 or below. The array that is given stays as it is: the runner may need it.
""",
    hints=(
        "`np.sort` sorts upwards. Which of its places holds the smallest logit that "
        "stays? And what must a logit be for its share to be 0?",
        "`np.exp(200)` is infinity in float32. Subtracting one number from all logits "
        "changes no share: which one keeps every exponent at 0 or below?",
    ),
    proves="The shares are those of the largest `top_k` logits, sum to 1, and survive "
    "logits in the hundreds, above 0 and below; the logits given stay as they were.",
    observe=plain_floats,
    rtol=1e-3,
    atol=1e-6,
)
def top_shares(logits, temperature, top_k):
    """Array of V logits, two numbers -> array of V shares."""
    scaled = logits / temperature
    scaled[scaled < np.sort(scaled)[-top_k]] = -np.inf
    exponentials = np.exp(scaled - scaled.max())
    return exponentials / exponentials.sum()


@top_shares.cases
def _(draw):
    yield np.array([1.0, 3.0, 0.0, 2.0], np.float32), 0.5, 2
    for size, temperature, top_k, high in (
        (5, 2.0, 5, 0),
        (7, 0.8, 1, 0),
        (12, 1.25, 4, 0),
        (64, 0.8, 9, 3),
        (8, 0.5, 3, 900),
        (9, 0.5, 4, -900),
    ):
        order = np.array(draw.permutation(size), np.float32)
        yield order * np.float32(0.25) + np.float32(high), temperature, top_k


@top_shares.also("token by token, without numpy")
def _(logits, temperature, top_k):
    scores = [float(z) / temperature for z in logits]
    kept = sorted(range(len(scores)), key=lambda i: scores[i])[-top_k:]
    best = max(scores)
    parts = {i: math.exp(scores[i] - best) for i in kept}
    return [parts.get(i, 0.0) / sum(parts.values()) for i in range(len(scores))]


@top_shares.also("argpartition, then only the best")
def _(logits, temperature, top_k):
    best = np.argpartition(logits, len(logits) - top_k)[len(logits) - top_k :]
    scaled = logits[best].astype(np.float64) / temperature
    shares = np.zeros(len(logits))
    shares[best] = np.exp(scaled - np.logaddexp.reduce(scaled))
    return shares


@top_shares.mistake(
    "the smallest are kept",
    because="`np.sort` and `np.argsort` go upwards, and `[:top_k]` sounds like the "
    "first places of a ranking",
)
def _(logits, temperature, top_k):
    scaled = np.full_like(logits, -np.inf)
    kept = np.argsort(logits)[:top_k]
    scaled[kept] = logits[kept] / temperature
    exponentials = np.exp(scaled - scaled.max())
    return exponentials / exponentials.sum()


@top_shares.mistake(
    "the last of the best is cut",
    because="`<=` and `<` look alike, and one logit is equal to the limit: the one "
    "that it was taken from",
)
def _(logits, temperature, top_k):
    scaled = logits / temperature
    scaled[scaled <= np.sort(scaled)[-top_k]] = -np.inf
    with np.errstate(all="ignore"):
        exponentials = np.exp(scaled - scaled.max())
        return exponentials / exponentials.sum()


@top_shares.mistake(
    "one more than the best",
    because="indices are counted from 0, but from the end they are counted from -1: "
    "the k-th from the end is -k, not -k - 1",
)
def _(logits, temperature, top_k):
    scaled = logits / temperature
    limit = np.sort(scaled)[max(len(scaled) - top_k - 1, 0)]
    scaled[scaled < limit] = -np.inf
    exponentials = np.exp(scaled - scaled.max())
    return exponentials / exponentials.sum()


@top_shares.mistake(
    "logits set to 0 for shares of 0",
    because="0 looks like nothing. As a logit it is a score like any other, and e to "
    "the power of 0 is 1",
)
def _(logits, temperature, top_k):
    scaled = logits / temperature
    scaled[scaled < np.sort(scaled)[-top_k]] = 0
    exponentials = np.exp(scaled - scaled.max())
    return exponentials / exponentials.sum()


@top_shares.mistake(
    "a fill that is not low enough",
    because="-100 looks very low, and with small logits it is. Logits may lie below "
    "it, and then what was thrown out comes first",
)
def _(logits, temperature, top_k):
    scaled = logits / temperature
    scaled[scaled < np.sort(scaled)[-top_k]] = -100
    with np.errstate(all="ignore"):
        exponentials = np.exp(scaled - scaled.max())
        return exponentials / exponentials.sum()


@top_shares.mistake(
    "cut after sharing out",
    because="the order seems not to matter, and the best ones are the same. But what "
    "the others had is missing: the shares no longer sum to 1",
)
def _(logits, temperature, top_k):
    scaled = logits / temperature
    exponentials = np.exp(scaled - scaled.max())
    shares = exponentials / exponentials.sum()
    shares[shares < np.sort(shares)[-top_k]] = 0
    return shares


@top_shares.mistake(
    "exponents that overflow",
    because="torch's softmax never complained. It subtracts the largest logit first; "
    "`np.exp` takes what it is given",
)
def _(logits, temperature, top_k):
    scaled = logits / temperature
    scaled[scaled < np.sort(scaled)[-top_k]] = -np.inf
    with np.errstate(all="ignore"):
        exponentials = np.exp(scaled)
        return exponentials / exponentials.sum()


@top_shares.mistake(
    "times the temperature",
    because="a higher temperature sounds like more. It makes the shares more alike, so "
    "the logits must shrink",
)
def _(logits, temperature, top_k):
    scaled = logits * temperature
    scaled[scaled < np.sort(scaled)[-top_k]] = -np.inf
    exponentials = np.exp(scaled - scaled.max())
    return exponentials / exponentials.sum()


@top_shares.mistake(
    "a temperature without effect",
    because="temperature is said to change the probabilities. But divide all of them "
    "by one number, share out anew, and it is as if you had not: it has to meet the "
    "logits",
)
def _(logits, temperature, top_k):
    kept = np.where(logits < np.sort(logits)[-top_k], -np.inf, logits)
    exponentials = np.exp(kept - kept.max()) / temperature
    return exponentials / exponentials.sum()


@top_shares.mistake(
    "the logits themselves changed",
    because="`logits /= temperature` saves a line, and writes into the array of "
    "whoever called",
)
def _(logits, temperature, top_k):
    logits /= temperature
    logits[logits < np.sort(logits)[-top_k]] = -np.inf
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


@chapter.implement(
    title="where rounding cannot change the winner",
    minutes=10,
    difficulty="moderate",
    section="Grading int8",
    text="""
"The int8 file is broken: with the prompt `xyz` both files part after some characters."
Or was it a near-tie? Say for each step of a text whether the winner was *safe*: whether
the best exact logit leads the second best by more than twice the largest error that any
logit of this step has.
""",
    hints=(
        "Two arrays of one number for each step: the lead, and the error. Which axis "
        "goes away in both?",
        "An error has a sign, and either sign can hurt. The worst case is the best "
        "logit falling by it while the second best rises by it.",
    ),
    proves="A step is called safe exactly if its own lead is above twice its own "
    "largest error, whatever happens at other steps.",
    why="A winner that is not safe may well stay. One that is safe must stay, so if "
    "two runs part at a safe step, the fault is in a loop: a token, a place, a cache. "
    "If it was not safe, look at the error too: in a broken file it is large "
    "everywhere, and no winner is safe. The cell below does so for `xyz`.",
)
def winners_safe(exact, rounded):
    """Two arrays (T, V) -> array (T,) of bool."""
    off = np.abs(rounded - exact).max(axis=-1)
    ranked = np.sort(exact, axis=-1)
    return ranked[:, -1] - ranked[:, -2] > 2 * off


# One step each: the second best and the others below the best, and the errors of the
# best, the second best and the others. The largest error is 1.
STEPS = (
    (-1.5, (-4, -5, -6, -7), (0.1, -0.1, -1.0, 0.1, -0.1, 0.1)),
    (-0.5, (-4, -6, -7, -9), (0.1, -0.1, 1.0, 0.1, -0.1, 0.1)),
    (-0.5, (-5, -6, -7, -8), (0.1, 0.1, -1.0, 0.1, -0.1, 0.1)),
    (-1.5, (-4, -5, -6, -9), (-1.0, -0.1, 0.1, 0.1, -0.1, 0.1)),
    (-0.5, (-4, -5, -7, -8), (-1.0, 0.1, 0.1, 0.1, -0.1, 0.1)),
    (-1.5, (-4, -6, -7, -8), (1.0, 1.0, -1.0, 1.0, -1.0, 1.0)),
    (-0.5, (-0.6, -0.9, -1.2, -1.5), (0.1, -0.1, 0.1, 0.1, -1.0, 0.1)),
    (-3.0, (-5, -6, -7, -7.5), (0.5, 1.0, -0.5, -0.5, 0.5, 0.5)),
    (-2.5, (-4, -6, -7, -7.5), (-1.0, 1.0, -0.5, 0.5, 0.5, 0.5)),
    (-1.5, (-4, -6, -7, -8), (-1.0, 1.0, 0.1, 0.1, -0.1, 0.1)),
    (-1.5, (-4, -5, -7, -9), (0.1, 1.0, -0.1, 0.1, -0.1, 0.1)),
)


@winners_safe.cases
def _(draw):
    exact = np.array([[5.0, 4.0, 0.0], [5.0, 3.0, 0.0], [3.0, 9.0, 1.0]])
    off = [[0.25, 0.0, 0.25], [0.0, 0.0, -1.0], [0.0, -2.0, 0.0]]
    yield exact, np.add(exact, off)
    for _time in range(2):
        pairs = []
        for t in draw.permutation(len(STEPS)):
            second, others, errors = STEPS[t]
            column = draw.permutation(6)
            size = 10.0 ** draw.integer(-2, 2)
            logits = size * np.array([0.0, second, *others])[column]
            pairs.append((logits, logits + size * np.array(errors)[column]))
        exact, rounded = map(np.stack, zip(*pairs, strict=True))
        yield exact + 3, rounded + 3


winners_safe.equivalent(
    "off = np.abs(rounded - exact).max(axis=+1)",
    because="of two axes, 1 and -1 are the same",
)
winners_safe.equivalent(
    "ranked = np.sort(exact, axis=+1)", because="of two axes, 1 and -1 are the same"
)


@winners_safe.also("step by step")
def _(exact, rounded):
    found = []
    for z, y in zip(exact.tolist(), rounded.tolist(), strict=True):
        off = max(abs(a - b) for a, b in zip(z, y, strict=True))
        best, second = sorted(z, reverse=True)[:2]
        found.append(best - second > 2 * off)
    return np.array(found)


@winners_safe.also("the best taken out")
def _(exact, rounded):
    at = exact.argmax(axis=1)[:, None]
    others = exact.copy()
    np.put_along_axis(others, at, -np.inf, axis=1)
    lead = np.take_along_axis(exact, at, axis=1)[:, 0] - others.max(axis=1)
    return lead / 2 > np.linalg.norm(rounded - exact, ord=np.inf, axis=1)


def wrong_safety(
    error=lambda off: np.abs(off).max(axis=-1),
    lead=lambda ranked: ranked[:, -1] - ranked[:, -2],
    times=2,
):
    """Make a winners_safe with one thing changed."""

    def safe(exact, rounded):
        return lead(np.sort(exact, axis=-1)) > times * error(rounded - exact)

    return safe


winners_safe.mistake(
    "once the error",
    because="a logit moves by no more than the error. But two of them move, and they "
    "may move towards each other",
)(wrong_safety(times=1))
winners_safe.mistake(
    "the error with its sign",
    because="`max` of the differences is the largest error, if all go up. One that "
    "goes down far is the smallest then",
)(wrong_safety(error=lambda off: off.max(axis=-1)))
winners_safe.mistake(
    "the error on average",
    because="an average is what one reports. A winner falls by what its own logits "
    "did, and one loud error is enough",
)(wrong_safety(error=lambda off: np.abs(off).mean(axis=-1)))
winners_safe.mistake(
    "the largest error of the whole text",
    because="without an axis `max` gives one number, and it is on the safe side. Steps "
    "with small errors of their own are then called unsafe",
)(wrong_safety(error=lambda off: np.abs(off).max()))
winners_safe.mistake(
    "best against worst",
    because="`ranked[:, -1] - ranked[:, 0]` is the whole spread. The danger comes from "
    "the second best",
)(wrong_safety(lead=lambda ranked: ranked[:, -1] - ranked[:, 0]))
winners_safe.mistake(
    "the wrong end of the ranking",
    because="a ranking begins with the best. `np.sort` goes upwards: places 0 and 1 "
    "hold the two worst",
)(wrong_safety(lead=lambda ranked: ranked[:, 1] - ranked[:, 0]))


@winners_safe.mistake(
    "unchanged for safe",
    because="the winner is still the same, so nothing happened. Luck is no margin: "
    "another rounding of the same size might have changed it",
)
def _(exact, rounded):
    return exact.argmax(axis=-1) == rounded.argmax(axis=-1)


@winners_safe.mistake(
    "the winner's own error only",
    because="it is the winner that one worries about. It also loses when another logit "
    "rises above it",
)
def _(exact, rounded):
    at = exact.argmax(axis=-1)[:, None]
    off = np.abs(np.take_along_axis(rounded - exact, at, axis=-1))[:, 0]
    ranked = np.sort(exact, axis=-1)
    return ranked[:, -1] - ranked[:, -2] > 2 * off


@winners_safe.mistake(
    "the errors of the best two only",
    because="they run for the first place, and the others are far behind. One with a "
    "large enough error is not",
)
def _(exact, rounded):
    order = np.argsort(exact, axis=-1)
    errors = np.take_along_axis(np.abs(rounded - exact), order, axis=-1)
    ranked = np.sort(exact, axis=-1)
    return ranked[:, -1] - ranked[:, -2] > 2 * errors[:, -2:].max(axis=-1)


@winners_safe.mistake(
    "sorted, then compared",
    because="the lead wants sorted logits, so one sorts both arrays. Where two tokens "
    "change places, each logit then meets another token's",
)
def _(exact, rounded):
    ranked, other = np.sort(exact, axis=-1), np.sort(rounded, axis=-1)
    off = np.abs(other - ranked).max(axis=-1)
    return ranked[:, -1] - ranked[:, -2] > 2 * off


@chapter.implement(
    title="bytes of a step",
    minutes=10,
    difficulty="moderate",
    section="Which bytes move",
    text="""
Count the bytes that one step of the book's runner moves. Matrices have `weights`
numbers of `width` bytes, and in int8 (`width` 1) a scale of 4 bytes for each of their
`rows`. Keys and values are float32. The cache has room for `places` tokens; `used` of
them hold text.
""",
    hints=(
        "Weights are read once. How often is the cache read, and how often written?",
        "Attention reads all places. Three copies are made at each step, and a copy "
        "reads and writes.",
    ),
    proves="The count is right in float32, in half and in int8, and does not depend on "
    "how much of the cache holds text.",
)
def bytes_of_step(
    weights, rows, width, num_layers, num_kv_heads, head_dim, places, used
):
    """Eight whole numbers -> the bytes, an int."""
    cache = 4 * 2 * num_layers * num_kv_heads * head_dim * places
    scales = 4 * rows if width == 1 else 0
    return width * weights + scales + cache + 3 * 2 * cache


@bytes_of_step.cases
def _(draw):
    yield 10, 5, 1, 1, 1, 1, 3, 1
    yield 10, 5, 4, 1, 1, 1, 3, 2
    for width in (1, 2, 4):
        sizes = (draw.integer(2, 9) for _ in range(4))
        yield draw.integer(1000, 9000), draw.integer(10, 90), width, *sizes, 1
    yield 134_479_872, 204_672, 1, 30, 3, 64, 2048, 40  # SmolLM2


@bytes_of_step.also("copy by copy")
def _(weights, rows, width, num_layers, num_kv_heads, head_dim, places, used):
    moved = weights * width + {1: 4}.get(width, 0) * rows
    for _tensor in ("keys", "values"):
        for _layer in range(num_layers):
            floats = num_kv_heads * places * head_dim
            moved += 4 * floats  # attention
            for _copy in ("in", "the new one", "out"):
                moved += 4 * floats + 4 * floats
    return moved


@bytes_of_step.also("seven times the cache")
def _(weights, rows, width, num_layers, num_kv_heads, head_dim, places, used):
    cache = np.prod([8, num_layers, num_kv_heads, places, head_dim])
    return int(width * weights + (width == 1) * 4 * rows + 7 * cache)


def wrong_bytes(
    numbers=2,
    byte=lambda width: 4,
    filled=False,
    times=7,
    scale=lambda width: width == 1,
):
    """Make a bytes_of_step with one thing changed."""

    def count(weights, rows, width, num_layers, num_kv_heads, head_dim, places, used):
        held = used if filled else places
        cache = byte(width) * numbers * num_layers * num_kv_heads * head_dim * held
        return width * weights + 4 * rows * scale(width) + times * cache

    return count


bytes_of_step.mistake(
    "the places in use only",
    because="attention to 40 tokens needs 40 keys. Shapes are fixed: the program reads "
    "and copies all the room there is, at every step",
)(wrong_bytes(filled=True))
bytes_of_step.mistake(
    "no copies",
    because="no line of the model asks for them, and papers count weights and one "
    "reading of the cache",
)(wrong_bytes(times=1))
bytes_of_step.mistake(
    "copies that are not written",
    because="a copy sounds like one thing. Its bytes move twice, out of one place and "
    "into another",
)(wrong_bytes(times=4))
bytes_of_step.mistake(
    "attention forgotten",
    because="next to six times the cache the one reading that all this is for is "
    "easily lost",
)(wrong_bytes(times=6))
bytes_of_step.mistake(
    "two copies",
    because="one in and one out is what the caller sees. The interpreter makes a "
    "third, to write the new token",
)(wrong_bytes(times=5))
bytes_of_step.mistake(
    "keys without values",
    because="attention looks at keys; it is the values that it brings home",
)(wrong_bytes(numbers=1))
bytes_of_step.mistake(
    "a cache in int8",
    because="the file is called int8. Its weights are; keys and values stay in float32",
)(wrong_bytes(byte=lambda width: width))
bytes_of_step.mistake(
    "no scales",
    because="one byte a weight is the rule of thumb. Each row brings a float along",
)(wrong_bytes(scale=lambda width: 0))
bytes_of_step.mistake(
    "scales in float32 too",
    because="the rows are there in either file. Weights in float32 need no scale",
)(wrong_bytes(scale=lambda width: 1))


chapter.explain(
    "room_to_be_safe",
    title="room to be on the safe side",
    minutes=5,
    difficulty="moderate",
    section="Which bytes move",
    text="""
A colleague exports SmolLM2 in int8 with `--cache 8192`, "to be on the safe side", and
runs chats of 200 tokens with the book's runner. The cache then has 377 MB, the weights
have 135 MB. What does it cost her per token, against a file for 256 places?
""",
    hints=(
        "How many times does a step read or write the cache? Does it matter how much "
        "of it is in use?",
        "The cache for 256 places has 12 MB. Add up both steps: weights once, cache "
        "seven times.",
    ),
    choices={
        "a": Choice(
            "Room, but no time: the places that are not used are not read.",
            "The mask gives them the weight 0, but a program of fixed shapes reads "
            "them first, and copies them three times.",
        ),
        "b": Choice(
            "About 32 times the bytes: the cache is 32 times as large.",
            "The cache's part is. The weights are the same in both, and of the small "
            "file's step they are the larger part.",
        ),
        "c": Choice(
            "About three and a half times the bytes: 377 and 135 MB, against 12 and "
            "135.",
            "377 MB are not moved once. The step reads them for attention and makes "
            "three copies, each read and written: seven times.",
        ),
        "d": Choice(
            "About 13 times the bytes.",
            "Seven times 377 MB are 2.6 GB, and 135 MB of weights; against seven times "
            "12 MB and the same weights. However short the chat is. Export for the "
            "longest chat that you allow, or two files; and hand the cache over.",
        ),
    },
    right="d",
)


def without_filling(result, prompt, prefill_len):
    """Set what fills the prompt up to 0: any filling is right, the mask hides it."""
    tokens = result["prefill"]["tokens"].copy()
    tokens[..., len(prompt) - 1 :] = 0
    return {**result, "prefill": {**result["prefill"], "tokens": tokens}}


@chapter.debug(
    title="right with a prompt of 16",
    minutes=10,
    difficulty="easy",
    section="Prefill and decode by hand",
    text="""
A colleague's runner makes the arrays for its first two calls: prefill reads all tokens
of the prompt but the last, decode reads the last one. Her test passes: its prompt has
16 tokens, and so has prefill. Her users' prompts are shorter, and they complain. Mend
it.
""",
    hints=(
        "Take a prompt of 3 tokens. Which places of the cache hold text after prefill?",
        "What stands between the text and the place where decode writes, and can the "
        "last token see it?",
    ),
    proves="For prompts of two tokens to one more than prefill takes, both calls get "
    "the shapes and types of the file, and each token its own place.",
    observe=without_filling,
    why="The chapter breaks the same way in *Break it*: junk gets in between, and the "
    "text goes wrong after some characters.",
)
def first_calls(prompt, prefill_len):
    """List of n ids, a number -> for "prefill" and "decode": "tokens", "input_pos"."""
    padded = np.zeros((1, prefill_len), np.int32)
    padded[0, : len(prompt) - 1] = prompt[:-1]
    last = np.array([[prompt[-1]]], np.int32)
    place = np.array([len(prompt) - 1], np.int32)
    return {
        "prefill": {
            "tokens": padded,
            "input_pos": np.arange(prefill_len, dtype=np.int32),
        },
        "decode": {"tokens": last, "input_pos": place},
    }


@first_calls.broken(
    "the place where the filling ends",
    because="prefill has written 16 places, so the next one seems to follow them, or "
    "the last of them. With a prompt of 16 tokens it is the right one",
    section="Prefill and decode by hand",
)
def _(prompt, prefill_len):
    padded = np.zeros((1, prefill_len), np.int32)
    padded[0, : len(prompt) - 1] = prompt[:-1]
    last = np.array([[prompt[-1]]], np.int32)
    place = np.array([prefill_len - 1], np.int32)
    return {
        "prefill": {
            "tokens": padded,
            "input_pos": np.arange(prefill_len, dtype=np.int32),
        },
        "decode": {"tokens": last, "input_pos": place},
    }


def wrong_first(
    place=lambda n, size: n - 1,
    front=False,
    kind="int32",
    first=0,
    short=False,
    last=lambda prompt: [[prompt[-1]]],
):
    """Make a first_calls with one thing changed."""

    def calls(prompt, prefill_len):
        padded, n = np.zeros((1, prefill_len), kind), len(prompt) - 1
        padded[0, prefill_len - n if front else 0 :][:n] = prompt[:-1]
        count = n if short else prefill_len
        places = np.arange(first, first + count, dtype=kind)
        at = np.array([place(len(prompt), prefill_len)], kind)
        decode = {"tokens": np.array(last(prompt), kind), "input_pos": at}
        return {"prefill": {"tokens": padded, "input_pos": places}, "decode": decode}

    return calls


first_calls.mistake(
    "one place too far",
    because="a text of n tokens goes on at place n. But its last token stands at n - 1",
)(wrong_first(place=lambda n, size: n))
first_calls.mistake(
    "behind the filling",
    because="prefill has written that many places, and a growing cache would go on "
    "there",
)(wrong_first(place=lambda n, size: size))
first_calls.mistake(
    "filled up in front",
    because="then the text ends where prefill does, and the last place is right at "
    "last. But the text has moved, and the filling is seen",
)(wrong_first(front=True, place=lambda n, size: size))
first_calls.mistake(
    "whole numbers of 64 bits",
    because="it is what numpy makes of Python's integers. The file says int32, and the "
    "interpreter takes nothing else",
)(wrong_first(kind="int64"))
first_calls.mistake(
    "places counted from 1",
    because="papers count positions from 1. The tables of angles and the cache begin "
    "at 0",
)(wrong_first(first=1, place=lambda n, size: n))
first_calls.mistake(
    "places of the text only",
    because="the filling is junk and needs no place. The shape in the file says 16",
)(wrong_first(short=True))
first_calls.mistake(
    "a token without its batch",
    because="one token is one number. The file wants a batch of one row, of one token",
)(wrong_first(last=lambda prompt: [prompt[-1]]))


@first_calls.cases
def _(draw):
    for count, size in ((2, 4), (4, 4), (5, 4), (6, 16), (16, 16), (17, 16)):
        yield draw.integers(1, 128, count).tolist(), size


@first_calls.also("token by token, filled with ones")
def _(prompt, prefill_len):
    tokens, places = [1] * prefill_len, []
    for place in range(prefill_len):
        if place < len(prompt) - 1:
            tokens[place] = prompt[place]
        places.append(place)
    body, text = ([tokens], places), ([prompt[-1:]], [len(prompt) - 1])
    names = ("tokens", "input_pos")
    pair = ([np.array(x, np.int32) for x in call] for call in (body, text))
    both = [dict(zip(names, call, strict=True)) for call in pair]
    return {"prefill": both[0], "decode": both[1]}


@first_calls.also("all of the prompt in prefill, if it fits")
def _(prompt, prefill_len):
    padded = np.pad(prompt, (0, prefill_len))[None, :prefill_len].astype(np.int32)
    places = np.arange(len(prompt) + prefill_len, dtype=np.int32)
    return {
        "prefill": {"tokens": padded, "input_pos": places[:prefill_len]},
        "decode": {
            "tokens": np.array([prompt[-1:]], np.int32),
            "input_pos": places[len(prompt) - 1 :][:1],
        },
    }


first_calls.equivalent(
    "padded[ -1, : len(prompt) - 1] = prompt[:-1]", because="there is one row"
)
first_calls.equivalent(
    "padded = np.ones((1, prefill_len), np.int32)",
    because="any filling will do: the mask hides it",
)
