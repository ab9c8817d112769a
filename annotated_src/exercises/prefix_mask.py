"""Exercises on the mask of a model that reads both ways and writes one way."""

import torch
from torch.nn import functional as F

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.exercise import Choice

chapter = Chapter("chatglm/02_prefix_mask", "Prefix-LM masks")


@chapter.implement(
    title="the mask of a batch",
    minutes=10,
    difficulty="moderate",
    section="Read both ways, write one way",
    text="""
Write ChatGLM's mask from its ids, without looking it up. All tokens of a row see the
row's context, which ends before its first `<sop>`; from there on a token sees only what
is not ahead of it. True is *visible*.
""",
    hints=(
        "Two reasons to be visible, either will do: the token looked at is in the "
        "context, or it is not ahead.",
        r"$A_{ts} = 1$ if $s < c$ or $s \le t$. Let $s$ vary along the last axis, $t$ "
        "along the one before, and $c$ along the batch.",
    ),
    proves="Every row of the batch has the mask of its own context, in the face and "
    "shape that this book's attention takes.",
    why="The context's part of the mask depends on the row of the batch and on the "
    "token *looked at*, so its axes are (B, 1, 1, T). The causal part is the same "
    "for all rows.",
)
def prefix_mask_of_ids(tokens, sop):
    """Ids (B, T), at least one sop in each row -> (B, 1, T, T), who sees whom."""
    context = (tokens == sop).int().argmax(dim=1)  # of equals, the first
    s = torch.arange(tokens.shape[1])
    in_context = s < context[:, None]  # (B, T)
    not_ahead = s <= s[:, None]  # (T, T)
    return not_ahead | in_context[:, None, None]


@prefix_mask_of_ids.cases
def _(draw):
    yield torch.tensor([[5, 6, 0, 7]]), 0
    yield torch.tensor([[5, 6, 0, 7], [5, 0, 6, 7]]), 0
    yield torch.tensor([[7, 8, 3, 9, 3, 3]]), 3  # a second and a third one
    yield torch.tensor([[4, 7, 8, 9, 6], [7, 8, 9, 6, 4]]), 4  # at either end
    tokens, sop = draw.integers(10, 90, 3, 9), draw.integer(90, 99)
    for row, context in zip(tokens, draw.permutation(6), strict=False):
        row[2 + context] = sop
    yield tokens, sop


@prefix_mask_of_ids.also("loops")
def _(tokens, sop):
    rows = []
    for ids in tokens.tolist():
        c = ids.index(sop)
        marks = [[s < c or s <= t for s in range(len(ids))] for t in range(len(ids))]
        rows.append([marks])
    return torch.tensor(rows)


@prefix_mask_of_ids.also("a block and a triangle")
def _(tokens, sop):
    batch, length = tokens.shape
    mask = torch.ones(length, length).tril().bool().repeat(batch, 1, 1, 1)
    for row, ids in zip(mask, tokens.tolist(), strict=True):
        context = ids.index(sop)
        row[:, :context, :context] = True
    return mask


@prefix_mask_of_ids.also("counting <sop>")
def _(tokens, sop):
    in_context = (tokens == sop).cumsum(dim=1) == 0
    length = tokens.shape[1]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    return ~(hidden & ~in_context[:, None, None, :])


def wrong_mask(
    context=lambda tokens, sop: (tokens == sop).int().argmax(dim=1),
    face=lambda visible: visible,
    put=lambda in_context: in_context[:, None, None, :],
    diagonal=0,
):
    """Make a mask with one thing changed: context, face, axes or the triangle."""

    def mask(tokens, sop):
        length = tokens.shape[1]
        in_context = torch.arange(length) < context(tokens, sop)[:, None]
        causal = torch.ones(length, length, dtype=torch.bool).tril(diagonal)
        return face(causal | put(in_context))

    return mask


def first_sop(tokens, sop):
    """Find the first <sop> of each row: (B, T) -> (B)."""
    return (tokens == sop).int().argmax(dim=1)


prefix_mask_of_ids.mistake(
    "the first row's context for all",
    because="the original's code finds one length a row, and a test with one row, or "
    "with rows of one length, cannot tell",
    section="Each row has its own context, and the first `<sop>` ends it",
)(wrong_mask(lambda tokens, sop: first_sop(tokens, sop)[:1].expand(len(tokens))))
prefix_mask_of_ids.mistake(
    "<sop> in the context",
    because="the index of <sop> looks like the number of tokens up to it. It is the "
    "number *before* it: <sop> opens the answer",
)(wrong_mask(lambda tokens, sop: first_sop(tokens, sop) + 1))
prefix_mask_of_ids.mistake(
    "the last <sop>",
    because="a search from the right finds the answer that is being written; but a "
    "second <sop> is one more token of the answer",
    section="Each row has its own context, and the first `<sop>` ends it",
)(
    wrong_mask(
        lambda tokens, sop: (
            tokens.shape[1] - 1 - (tokens.flip(1) == sop).int().argmax(dim=1)
        )
    )
)
prefix_mask_of_ids.mistake(
    "the other polarity",
    because="the original's `get_masks` says True where a token may *not* look",
    section="Three faces of one mask",
)(wrong_mask(face=torch.logical_not))
prefix_mask_of_ids.mistake(
    "a number to add",
    because="many libraries hand masks around as 0 and minus infinity",
    section="Three faces of one mask",
)(wrong_mask(face=lambda visible: visible.float().log()))
prefix_mask_of_ids.mistake(
    "causal only",
    because="every decoder that one has met before is causal, and the answers' rows of "
    "both masks are equal",
    section="Small enough to see",
)(wrong_mask(lambda tokens, sop: torch.zeros(len(tokens), dtype=torch.long)))
prefix_mask_of_ids.mistake(
    "rows for columns",
    because="the context reads both ways, so its rows are filled. But filled rows see "
    "the answer, and the answer sees them",
    section="What can flow",
)(wrong_mask(put=lambda in_context: in_context[:, None, :, None]))
prefix_mask_of_ids.mistake(
    "nobody in the answer sees itself",
    because="a token must not see what it has to predict. It predicts the *next* one",
)(wrong_mask(diagonal=-1))
prefix_mask_of_ids.mistake(
    "no axis for the heads",
    because="one mask serves all heads. Without the axis the batch lines up with the "
    "heads instead, and for one row nobody notices",
    section="The annotated source",
)(wrong_mask(face=lambda visible: visible[:, 0]))


@chapter.implement(
    title="several turns in one row",
    minutes=12,
    difficulty="hard",
    section="What can flow",
    text="""
Several turns in one row, each a question and an answer, and each question is to be read
both ways. A token sees all before it, itself, and the rest of its own question. Write
the mask; `turns` are pairs of lengths (question, answer).
""",
    hints=(
        "Give each token a number, so that one comparison of two numbers decides.",
        "Tokens of a question share a number, tokens of an answer do not, and numbers "
        "never fall.",
    ),
    proves="Every question is read both ways, every answer one way, and no turn sees "
    "anything of a later one.",
    why="Each token gets a number, and the tokens of a question share theirs. Then "
    "*may look* is $\\le$. That is why the mask is closed: $a \\le b$ and $b \\le c$ "
    "give $a \\le c$.",
)
def turns_mask(turns):
    """Pairs of lengths, T in all -> (T, T), True where a token may look."""
    numbers = []
    for question, answer in turns:
        start = len(numbers)
        numbers += [start] * question
        numbers += range(start + question, start + question + answer)
    number = torch.tensor(numbers)
    return number <= number[:, None]


@turns_mask.cases
def _(draw):
    yield ([(2, 2)],)
    yield ([(2, 1), (2, 1)],)
    yield ([(3, 2), (1, 3), (4, 2)],)
    yield ([(2, 3), (3, 0)],)  # the second answer is still to come
    yield ([(draw.integer(2, 5), draw.integer(2, 5)) for _ in range(3)],)


@turns_mask.also("loops over tokens")
def _(turns):
    owner = []  # for each token: its turn, and whether it asks
    for turn, (question, answer) in enumerate(turns):
        owner += [(turn, True)] * question + [(turn, False)] * answer
    size = len(owner)
    mask = torch.zeros(size, size, dtype=torch.bool)
    for t in range(size):
        for s in range(size):
            mask[t, s] = s <= t or (owner[s] == owner[t] and owner[s][1])
    return mask


@turns_mask.also("a triangle and squares")
def _(turns):
    size = sum(question + answer for question, answer in turns)
    mask, start = torch.ones(size, size).tril().bool(), 0
    for question, answer in turns:
        mask[start : start + question, start : start + question] = True
        start += question + answer
    return mask


def is_question(turns):
    """Mark the tokens of questions: (T)."""
    marks = []
    for question, answer in turns:
        marks += [True] * question + [False] * answer
    return torch.tensor(marks)


def turn_of(turns):
    """Give each token the number of its turn: (T)."""
    lengths = torch.tensor([sum(turn) for turn in turns])
    return torch.arange(len(turns)).repeat_interleave(lengths)


def triangle(turns):
    """Make the causal mask of all turns: (T, T)."""
    size = sum(map(sum, turns))
    return torch.ones(size, size, dtype=torch.bool).tril()


@turns_mask.mistake(
    "every question is seen by all",
    because="the context is seen by all when there is one. A second question would be "
    "seen by the answer before it, which it may contain",
)
def _(turns):
    return triangle(turns) | is_question(turns)


@turns_mask.mistake(
    "the first question alone",
    because="a prefix-LM mask has one context; the other questions are then read one "
    "way",
    section="Each row has its own context, and the first `<sop>` ends it",
)
def _(turns):
    return triangle(turns) | (torch.arange(len(turn_of(turns))) < turns[0][0])


@turns_mask.mistake(
    "answers read both ways, too",
    because="question and answer make one turn, and a square for each turn is simple",
)
def _(turns):
    turn = turn_of(turns)
    return triangle(turns) | (turn == turn[:, None])


@turns_mask.mistake(
    "each turn on its own",
    because="several texts packed into one row must not see each other. Turns of one "
    "conversation must",
)
def _(turns):
    turn, asks = turn_of(turns), is_question(turns)
    alike = turn == turn[:, None]
    return alike & (triangle(turns) | (asks & asks[:, None]))


@turns_mask.mistake(
    "all the past as one context",
    because="that is what the original's chat does: it reads the whole history again, "
    "both ways, answers and all",
    section="Each row has its own context, and the first `<sop>` ends it",
)
def _(turns):
    size = len(turn_of(turns))
    return triangle(turns) | (torch.arange(size) < size - turns[-1][1])


@turns_mask.mistake(
    "causal",
    because="with a causal mask a conversation simply goes on; no question is read "
    "both ways",
    section="Read both ways, write one way",
)
def _(turns):
    return triangle(turns)


@turns_mask.mistake(
    "the other way round",
    because="`number[:, None]` makes rows, and it is easy to take the row for the one "
    "looked at",
    section="Read both ways, write one way",
)
def _(turns):
    turn, asks = turn_of(turns), is_question(turns)
    mask = triangle(turns) | (asks & asks[:, None] & (turn == turn[:, None]))
    return mask.T


chapter.explain(
    "context_off_by_one",
    title="off by one, off by two",
    minutes=6,
    difficulty="moderate",
    section="Each row has its own context, and the first `<sop>` ends it",
    text="""
The context has $c$ tokens, and `<sop>` comes next. A colleague makes the mask with a
context of $c + 1$, another one with $c + 2$. Both train a model with it. Who trains a
model that cheats, one that sees a word of the answer before it has to predict it?
""",
    hints=(
        "Which token has to predict the first word of the answer, and which tokens "
        "does each mask show it in addition?",
        "`<sop>` has to. With $c + 1$ the context ends with `<sop>` itself, with "
        "$c + 2$ with the token behind it.",
    ),
    choices={
        "a": Choice(
            "Both. Every token too many in the context is a leak.",
            "A leak needs a word that somebody has to predict. With $c + 1$ the others "
            "see `<sop>` in addition, and `<sop>` has seen nothing of the answer. (The "
            "last token of the context, which has to say `<sop>`, is now shown it. But "
            "that is the same token in every text, and no word of the answer.)",
        ),
        "b": Choice(
            "The second. The first gets the same logits as with `c`.",
            "The second, yes. But with $c + 1$ the context's tokens look at one token "
            "more, and all later layers read what they made of it: the same weights "
            "give other logits.",
        ),
        "c": Choice(
            "Neither. A context is not asked for its next word.",
            "Labels do not follow the mask. `<sop>` is asked for the first word of the "
            "answer whatever the context is, and with $c + 2$ it sees that word.",
        ),
        "d": Choice(
            "The second. The first trains another model, and an honest one.",
            "With $c + 1$ all see `<sop>`, which sees nothing of the answer, and the "
            "mask is still closed: no word leaks. (At most the label `<sop>` is given "
            "away, the same in every text.) It is another model all the same. "
            "With $c + 2$ `<sop>` sees the word that it must predict, and the loss on "
            "that word measures copying.",
        ),
    },
    right="d",
)


@chapter.implement(
    title="a mask of unknown face",
    minutes=8,
    difficulty="moderate",
    section="Three faces of one mask",
    text="""
A mask comes from somewhere: True for visible, True for hidden, or numbers to add to the
scores. Return True for visible, whichever it is. One entry tells the faces apart. Rows
may be padded on the left: padding sees nothing, not even itself, and nobody sees it.
""",
    hints=(
        "Which token sees itself under every mask, padding or not?",
        "The last one. And what does a visible score get added?",
    ),
    proves="All three faces are recognised: causal, prefix and full masks, with and "
    "without padding, and hidden by minus infinity or by a finite number.",
    why="Padding stands on the left, so the last token is a token in every row, and it "
    "sees itself under any mask. The upper left corner would not do: it may be "
    "padding. And a visible score gets 0 added, whatever a hidden one gets.",
)
def to_visible(mask):
    """Mask (B, 1, T, T), bool or float -> the same mask, True where visible."""
    if mask.dtype != torch.bool:
        return mask == 0
    return mask if mask[0, 0, -1, -1] else ~mask


def visible_masks(draw):
    """Yield masks (B, 1, T, T), True where visible."""
    for length, contexts, padding in (
        (2, [0], [0]),
        (2, [0], [1]),
        (3, [3], [0]),  # nothing is hidden
        (4, [4, 2], [0, 3]),  # the first row sees all
        (5, [1, 5, 5], [2, 0, 0]),
        (7, [draw.integer(3, 7) for _ in range(3)], [0, 4, 5]),
    ):
        context, pads = (torch.tensor(x)[:, None, None] for x in (contexts, padding))
        s = torch.arange(length)
        real = s >= pads
        mask = (s < context) | (s <= s[:, None])
        yield (mask & real & real.mT)[:, None]


@to_visible.cases
def _(draw):
    for mask in visible_masks(draw):
        yield (mask,)
        yield (~mask,)
        yield (torch.zeros(mask.shape).masked_fill(~mask, -torch.inf),)
        lowest = -float(draw.integer(10_000, 20_000))
        yield (torch.zeros(mask.shape).masked_fill(~mask, lowest),)


to_visible.equivalent(
    "return mask if mask[ -1, 0, -1, -1] else ~mask",
    because="the last token sees itself in every row of the batch",
)
to_visible.equivalent(
    "return mask if mask[0, -1, -1, -1] else ~mask",
    because="there is one mask for all heads",
)


@to_visible.also("the last token's row")
def _(mask):
    if mask.is_floating_point():
        return ~mask.bool()
    seen_by_last = mask[..., -1, -1]
    return mask == seen_by_last[..., None, None]


@to_visible.also("loops")
def _(mask):
    last = mask[0, 0, -1, -1].item()
    rows = [[[x == last for x in row] for row in m[0]] for m in mask.tolist()]
    return torch.tensor(rows)[:, None]


def wrong_face(truth, number=lambda mask: mask == 0):
    """Make a function that tells the face of a truth value and of numbers."""

    def to_visible(mask):
        if mask.dtype != torch.bool:
            return number(mask)
        return mask if truth(mask) else ~mask

    return to_visible


def last_sees_itself(mask):
    """Say whether the last token is marked True for itself."""
    return mask[0, 0, -1, -1]


to_visible.mistake(
    "the first token for the last",
    because="the first token sees itself under any mask, unless it is padding, which "
    "stands right there",
    section="Padding on the left",
)(wrong_face(lambda mask: mask[0, 0, 0, 0]))
to_visible.mistake(
    "the future's corner",
    because="under a causal mask the first token never sees the last. Under a prefix "
    "mask it does, if both are context",
    section="Read both ways, write one way",
)(wrong_face(lambda mask: not mask[0, 0, 0, -1]))
to_visible.mistake(
    "the majority is visible",
    because="a causal mask is more than half visible. With padding it is not",
    section="Padding on the left",
)(wrong_face(lambda mask: mask.float().mean() > 0.5))
to_visible.mistake(
    "True is taken for visible",
    because="it is in this book and in torch's fused attention. In the original, and "
    "in torch's `nn.MultiheadAttention`, True hides",
)(wrong_face(lambda mask: True))
to_visible.mistake(
    "only minus infinity hides",
    because="minus infinity is the usual number to add. ChatGLM has -10000, and others "
    "the lowest number of a type",
)(wrong_face(last_sees_itself, lambda mask: mask != -torch.inf))
to_visible.mistake(
    "the lowest number hides",
    because="whatever hides is the lowest number of its mask. In a mask that hides "
    "nothing the lowest number is 0",
)(wrong_face(last_sees_itself, lambda mask: mask != mask.min()))
to_visible.mistake(
    "numbers taken for truth",
    because="`mask.bool()` makes True of everything but 0, and 0 is the one number "
    "that hides nothing",
)(wrong_face(last_sees_itself, torch.Tensor.bool))


@chapter.debug(
    title="the mask that grows",
    minutes=8,
    difficulty="moderate",
    section="A mask that grows",
    text="""
With each new token of the answer the mask gets a column and a row. Nobody before sees
the new token; it sees what the token before it saw, and itself. With a cache, which
needs the last row only, all answers are right. Without one they are not. Mend it.
""",
    hints=(
        "Compare the *last but one* row of what it returns with what it should be.",
        "Is `newest` a tensor of its own?",
    ),
    proves="The grown mask is the old one, with a column that nobody before sees and "
    "a row that sees what the last token saw, and itself; padding stays hidden.",
    why="Without `.clone()` the newest row is a view: writing to it writes to the row "
    "of the token before, which then sees the newest, its future.",
)
def grow_mask(mask):
    """(B, 1, T, S), True: visible -> (B, 1, T + 1, S + 1)."""
    grown = F.pad(mask, (0, 1, 0, 1), value=False)
    newest = grown[:, :, -2].clone()
    newest[..., -1] = True
    grown[:, :, -1] = newest
    return grown


@grow_mask.broken(
    "a view for a copy",
    because="slicing looks like copying, and in Python's lists it is. In torch a slice "
    "is a window on the same numbers",
)
def _(mask):
    grown = F.pad(mask, (0, 1, 0, 1), value=False)
    newest = grown[:, :, -2]
    newest[..., -1] = True
    grown[:, :, -1] = newest
    return grown


def wrong_growth(column=False, row=lambda wider: wider[:, :, -1:].clone(), itself=True):
    """Make a growth with another column, row or last entry."""

    def grow(mask):
        wider = F.pad(mask, (0, 1), value=column)
        newest = row(wider)
        newest[..., -1] = itself
        return torch.cat((wider, newest), dim=2)

    return grow


grow_mask.mistake(
    "a row of ones",
    because="everything stands before the newest token. So does the padding, which "
    "must stay hidden",
)(wrong_growth(row=lambda wider: torch.ones_like(wider[:, :, -1:])))
grow_mask.mistake(
    "a column that all see",
    because="the mask is padded with the value that the new token gets for itself",
    section="What can flow",
)(wrong_growth(column=True))
grow_mask.mistake(
    "the new token does not see itself",
    because="the row of the token before it ends where that token ends",
)(wrong_growth(itself=False))
grow_mask.mistake(
    "the original's polarity",
    because="`_update_model_kwargs_for_generation` appends ones and sets the corner to "
    "False. There True hides",
    section="Three faces of one mask",
)(wrong_growth(column=True, itself=False))
grow_mask.mistake(
    "the first token's row",
    because="all tokens see the context, so any row will do. But only the last one has "
    "seen the whole answer, and the first may be padding",
)(wrong_growth(row=lambda wider: wider[:, :, :1].clone()))


@grow_mask.mistake(
    "the new row alone",
    because="with a cache only the last row is needed. Without one the whole mask is",
)
def _(mask):
    newest = F.pad(mask, (0, 1), value=False)[:, :, -1:]
    newest[..., -1] = True
    return newest


@grow_mask.cases
def _(draw):
    s = torch.arange(4)
    yield ((s[:2] <= s[:2, None])[None, None],)
    yield (((s < 2) | (s <= s[:, None]))[None, None],)
    for batch, length in ((1, 3), (3, 5), (2, 8)):
        masks = []
        for _ in range(batch):
            context, pads = draw.integer(2, length), draw.integer(1, 3)
            s = torch.arange(length)
            mask = ((s < context) | (s <= s[:, None])) & (s >= pads)
            masks.append((mask & (s >= pads)[:, None])[None])
        yield (torch.stack(masks),)
    # Two rows of six, as with a cache, and a window: the last token sees the least.
    s = torch.arange(6)
    yield (((s <= s[4:, None]) & (s > s[4:, None] - 4) & (s != 2))[None, None],)


@grow_mask.also("blocks")
def _(mask):
    batch, heads, rows, columns = mask.shape
    grown = torch.zeros(batch, heads, rows + 1, columns + 1, dtype=torch.bool)
    grown[:, :, :-1, :-1] = mask
    grown[:, :, -1, :-1] = mask[:, :, -1]
    grown[:, :, -1, -1] = True
    return grown


@grow_mask.also("lists")
def _(mask):
    grown = []
    for rows in mask[:, 0].tolist():
        old = [[*row, False] for row in rows]
        grown.append([[*old, [*rows[-1], True]]])
    return torch.tensor(grown)
