"""Exercises on misreadings: lost commas, padding, NaN, and inputs that tell."""

import itertools
import re

import torch

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.exercise import Choice

chapter = Chapter("chatglm/08_errata", "Errata")


@chapter.implement(
    title="commas put back",
    minutes=10,
    difficulty="moderate",
    section="The blog",
    text="""
Give B1's fragments their commas back. A run of digits right behind `transpose(`,
`permute(` or `zeros(`, or behind a list's bracket in it as in `permute([`, comes apart
into digits, with a comma and a space between two: `x.permute(2013)` becomes
`x.permute(2, 0, 1, 3)`. Leave all other digits alone, those of `view(10)` and of the
name `x10` among them.
""",
    hints=(
        "Find the place first: one of three names, then a bracket or two. Only then "
        "look at digits.",
        "`re.sub` takes a function: it gets what was found and returns what shall "
        'stand there. And `", ".join("2013")` does the rest.',
    ),
    proves="Runs behind the three names come apart, in every call of a line, and "
    "nothing else moves.",
    why="`01` must stay text: as a number it is 1. That is also why Python refuses it.",
)
def restore_commas(fragment):
    """Give back a line of code with its commas."""
    return re.sub(
        r"((?:transpose|permute|zeros)\(\[?)(\d+)",
        lambda found: found[1] + ", ".join(found[2]),
        fragment,
    )


@restore_commas.cases
def _(draw):
    axes = "".join(map(str, draw.permutation(4)))
    for fragment in (
        "x.transpose(01)",
        "x.view(10)",
        "torch.zeros(11)",
        "x.permute([21034])",
        "torch.zeros(3, 10)",
        "mask = zeros(12)",
        "torch.zeros(23, dtype=x.dtype)",
        "x.split(16).transpose(12)",
        f"x10.permute({axes}).reshape(64)",
        "x.transpose(12).transpose(01)",
    ):
        yield (fragment,)


@restore_commas.also("loops")
def _(fragment):
    names = [n + "(" for n in ("transpose", "permute", "zeros")]
    names += ["permute(["]
    out, after_name, after_digit = "", False, False
    for letter in fragment:
        if letter.isdigit() and after_digit:
            out += ", "
        after_name = any(out.endswith(name) for name in names)
        out += letter
        after_digit = letter.isdigit() and (after_name or after_digit)
    return out


@restore_commas.also("one pattern that looks behind")
def _(fragment):
    places = [rf"(?<={n}\()" for n in ("transpose", "permute", "zeros")]
    places += [rf"(?<={n}\(\[)" for n in ("transpose", "permute", "zeros")]
    return re.sub(
        rf"(?:{'|'.join(places)})\d+", lambda found: ", ".join(found[0]), fragment
    )


@restore_commas.mistake(
    "every run of digits",
    because="a number of two digits looks like two axes; a size and a name have such "
    "digits by right",
)
def _(fragment):
    return re.sub(r"\d{2,}", lambda found: ", ".join(found[0]), fragment)


@restore_commas.mistake(
    "behind any bracket",
    because="the bracket is what all broken calls have in common, and `view(10)` has "
    "one as well",
)
def _(fragment):
    return re.sub(r"(?<=[(\[])\d+", lambda found: ", ".join(found[0]), fragment)


@restore_commas.mistake(
    "the digits read as a number",
    because="digits look like a number, and `int` takes them; 01 is then 1, and a 0 in "
    "front is an axis lost",
)
def _(fragment):
    return re.sub(
        r"((?:transpose|permute|zeros)\(\[?)(\d+)",
        lambda found: found[1] + ", ".join(str(int(found[2]))),
        fragment,
    )


@restore_commas.mistake(
    "a comma between pairs",
    because="`(\\d)(\\d)` stands for two neighbours; but matches do not overlap, so "
    "every other comma is missed",
)
def _(fragment):
    return re.sub(
        r"((?:transpose|permute|zeros)\(\[?)(\d+)",
        lambda found: found[1] + re.sub(r"(\d)(\d)", r"\1, \2", found[2]),
        fragment,
    )


@restore_commas.mistake(
    "the first call only",
    because="`search` and `match` find one place, and most lines have one",
)
def _(fragment):
    return re.sub(
        r"((?:transpose|permute|zeros)\(\[?)(\d+)",
        lambda found: found[1] + ", ".join(found[2]),
        fragment,
        count=1,
    )


@restore_commas.mistake(
    "up to the closing bracket",
    because="in the five fragments it closes right behind the digits. A call may go on",
)
def _(fragment):
    return re.sub(
        r"((?:transpose|permute|zeros)\(\[?)(\d+)(?=\]?\))",
        lambda found: found[1] + ", ".join(found[2]),
        fragment,
    )


@restore_commas.mistake(
    "the list forgotten",
    because="four of the five fragments have their digits right behind the round "
    "bracket",
)
def _(fragment):
    return re.sub(
        r"((?:transpose|permute|zeros)\()(\d+)",
        lambda found: found[1] + ", ".join(found[2]),
        fragment,
    )


@restore_commas.mistake(
    "zeros forgotten",
    because="it is the one that runs; the others complain",
)
def _(fragment):
    return re.sub(
        r"((?:transpose|permute)\(\[?)(\d+)",
        lambda found: found[1] + ", ".join(found[2]),
        fragment,
    )


chapter.explain(
    "where_nan_spreads",
    title="how far NaN gets",
    minutes=8,
    difficulty="moderate",
    section="ChatGLM-6B's own source",
    text=r"""
In C3, a fill of $-\infty$ makes NaN of rows of padding. The real tokens give padding a
weight of exactly 0. Does a model of three layers spoil a real token, and if so, which
layer is the first that does?
""",
    hints=(
        "In layer 1 all vectors are numbers. Whose *outputs* are not, after it?",
        r"In layer 2 padding's values are NaN. A real token's output is a sum over all "
        "columns. What is 0 times NaN?",
    ),
    choices={
        "a": Choice(
            "None: a weight of exactly 0 lets nothing through.",
            "A weighted sum multiplies and adds, and 0 times NaN is NaN. A weight of 0 "
            "keeps out any number, and NaN is none.",
        ),
        "b": Choice(
            "Layer 1: a row with a hidden column has a −∞ in it, and that makes NaN.",
            r"$e^{-\infty} = 0$ is a sound number. Only a row that sees *nothing* is "
            "spoilt, as 0 divided by 0; a real token sees itself.",
        ),
        "c": Choice(
            "None of the layers: NaN stays in its own row up to the head, since norms "
            "and feed-forward networks work row by row.",
            "They do. But attention mixes rows, and sums over all columns, also over "
            "those that it gives a weight of 0.",
        ),
        "d": Choice(
            "Layer 2.",
            "After layer 1 only the outputs of padding are NaN. In layer 2 its values "
            "are, and every row that sums over them is, with weight 0 too.",
        ),
    },
    right="d",
    why=r"A mask that keeps $-\infty$ and cures it: let each padding token see "
    "itself. Its outputs are then numbers, which nobody looks at.",
)


chapter.explain(
    "what_padding_changes",
    title="alone, and in a batch",
    minutes=8,
    difficulty="hard",
    section="ChatGLM-6B's own source",
    text="""
A colleague pads prompts on the left, and gives the model the ids and nothing else. A
short question gets other logits in a batch than alone. "Its positions are off by the
padding", she says, and passes those that the tokenizer makes. The logits still differ
by more than 1. What is to blame, in float32?
""",
    hints=(
        "Read C6 again. Two things are made from the ids where nobody gives them.",
        "By how much does padding move each place of a row, the mask token's included? "
        "What does a score see of two places?",
    ),
    choices={
        "a": Choice(
            "The mask, and it alone: with the tokenizer's mask her first positions "
            "would have done.",
            "Read off the ids, the mask lets everybody see the padding. The places "
            "were never to blame: padding moves all places of a row by the same "
            "number, the mask token's too, and a score sees differences of places "
            "only.",
        ),
        "b": Choice(
            "The mask as well as the positions: each does its part.",
            "The mask yes. But with the tokenizer's mask the logits agree to 0.0001 "
            "with *either* positions: all places of a row moved by the same number, "
            "and a score sees only their differences.",
        ),
        "c": Choice(
            "The steps, the second row of positions: padding counts there too.",
            "Steps are 0 up to `<sop>`, with padding and without, and count from "
            "there. Hers and the model's are the same.",
        ),
        "d": Choice(
            "The other rows: in a batch the questions get into each other.",
            "No row ever sees another row. What gets into hers is her own row's "
            "padding.",
        ),
    },
    right="a",
)


@chapter.debug(
    title="one memory for all rows",
    minutes=10,
    difficulty="moderate",
    section="ChatGLM-6B's own source",
    text="""
The places of a batch (C11): each token of the context stands at its index; from `<sop>`
on, all stand at the row's mask token, which is `[gMASK]` if the row has one, else
`[MASK]`. Somebody loops over the rows so that each gets its own. One row alone is
right, a batch is not. Mend it.
""",
    hints=(
        "Print `places` after each turn of the loop. Which rows change?",
        "How much memory do all rows of `places` take together? `places.stride()` "
        "tells.",
    ),
    proves="Each row of a batch has its own start and its own mask token, and its "
    "places stand still from `<sop>` on.",
    why="`expand` makes rows with a stride of 0: one memory for all. To read from it "
    "costs nothing; what is written to one row is written to all.",
)
def places_of_batch(tokens, sop, gmask, mask):
    """(B, T) of ids, the ids of three special tokens -> (B, T) of places."""
    places = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)
    for row, ids in enumerate(tokens.tolist()):
        blank = ids.index(gmask if gmask in ids else mask)
        places[row, ids.index(sop) :] = blank
    return places


@places_of_batch.broken(
    "rows that share their memory",
    because="`expand` gives the right shape and costs nothing, as long as nobody "
    "writes; each row's places are written over the rows before",
)
def _(tokens, sop, gmask, mask):
    places = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    for row, ids in enumerate(tokens.tolist()):
        blank = ids.index(gmask if gmask in ids else mask)
        places[row, ids.index(sop) :] = blank
    return places


@places_of_batch.cases
def _(draw):
    sop, gmask, mask = 1, 2, 3
    yield torch.tensor([[7, 2, 1, 8], [7, 8, 3, 1]]), sop, gmask, mask
    yield torch.tensor([[7, 3, 8, 2, 1, 9, 9]]), sop, gmask, mask
    rows = []
    for blank, at, start in ((gmask, 5, 6), (mask, 2, 5), (mask, 4, 8), (gmask, 0, 3)):
        row = draw.integers(10, 99, 10).tolist()
        row[at], row[start] = blank, sop
        rows.append(row)
    rows[1][4], rows[0][1] = gmask, mask  # both: [gMASK] is where the answer belongs
    yield torch.tensor(rows), sop, gmask, mask


@places_of_batch.also("without a loop")
def _(tokens, sop, gmask, mask):
    index = torch.arange(tokens.shape[1])
    far = tokens.shape[1]

    def first(wanted):
        return torch.where(wanted, index, far).amin(dim=1, keepdim=True)

    has_gmask = (tokens == gmask).any(dim=1, keepdim=True)
    blank = torch.where(has_gmask, first(tokens == gmask), first(tokens == mask))
    return torch.where(index < first(tokens == sop), index, blank)


@places_of_batch.also("row by row, then stacked")
def _(tokens, sop, gmask, mask):
    rows = []
    for ids in tokens.tolist():
        start = ids.index(sop)
        blank = ids.index(gmask) if gmask in ids else ids.index(mask)
        rows.append([*range(start), *[blank] * (len(ids) - start)])
    return torch.tensor(rows)


def wrong_places(choose, begin=0, count=lambda blank, start, n: [blank] * n):
    """Make places with another mask token, beginning, or way of counting on."""

    def places(tokens, sop, gmask, mask):
        rows = []
        for ids in tokens.tolist():
            start = ids.index(sop) + begin
            blank = choose(ids, gmask, mask)
            n = len(ids) - start
            rows.append([*range(start), *count(ids.index(blank), start, n)])
        return torch.tensor(rows)

    return places


def right_blank(ids, gmask, mask):
    """Give the mask token that a row answers at."""
    return gmask if gmask in ids else mask


@places_of_batch.mistake(
    "row 0 for all rows",
    because="rows of a batch are alike while one tries it out; the first revision read "
    "start and mask token off the first row",
)
def _(tokens, sop, gmask, mask):
    first = tokens[0].tolist()
    places = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)
    places[:, first.index(sop) :] = first.index(right_blank(first, gmask, mask))
    return places


@places_of_batch.mistake(
    "a pattern that is written to",
    because="each row is copied, so no two share their memory. But what is copied for "
    "the next row has the last one's places in it",
)
def _(tokens, sop, gmask, mask):
    rows, pattern = [], torch.arange(tokens.shape[1])
    for ids in tokens.tolist():
        pattern[ids.index(sop) :] = ids.index(right_blank(ids, gmask, mask))
        rows.append(pattern.clone())
    return torch.stack(rows)


places_of_batch.mistake(
    "the place counts on",
    because="in nearly every model each token stands one further than the last; the "
    "early revisions did so at `[gMASK]`",
)(wrong_places(right_blank, count=lambda blank, start, n: range(start, start + n)))
places_of_batch.mistake(
    "on from the blank",
    because="the answer's pieces fill the blank one after the other; that they do is "
    "told by the steps, the other row of positions",
)(wrong_places(right_blank, count=lambda blank, start, n: range(blank, blank + n)))
places_of_batch.mistake(
    "[MASK] before [gMASK]",
    because="the tokenizer does so where a row has both, and so did early revisions of "
    "the model",
)(wrong_places(lambda ids, gmask, mask: mask if mask in ids else gmask))
places_of_batch.mistake(
    "from the token after `<sop>`",
    because="`<sop>` comes with the prompt; but it belongs to the answer, its first "
    "token",
)(wrong_places(right_blank, begin=1))
places_of_batch.mistake(
    "places that begin with 1",
    because="the paper counts from 1, the code from 0",
)(
    lambda tokens, sop, gmask, mask: (
        wrong_places(right_blank)(tokens, sop, gmask, mask) + 1
    )
)


@chapter.implement(
    title="inputs that tell",
    minutes=12,
    difficulty="hard",
    section="False alarms",
    text="""
`tells[i, j]` says whether test input `j` tells misreading `i` from the truth. Which
sets of inputs are the smallest that tell every misreading that can be told at all?
Return all of them, in any order; each set is a tuple of columns.
""",
    hints=(
        "Is it safe to take the best input first, and then the best for what is left? "
        "Try it on paper: of six misreadings one input tells three, another one the "
        "other three, and a third input four.",
        "Try all sets of one input, then all of two, and stop at the first size that "
        "has some. A set tells a misreading if *any* of its inputs does.",
    ),
    proves="The sets tell all that can be told, none is larger than need be, and none "
    "is missing.",
    why="For the chapter's table to 0.0001 it takes three inputs: both kinds of "
    "padding, and a row with both mask tokens. To 0.001 exact frequencies pass on "
    "every short input, and the far positions are needed as the fourth.",
    observe=lambda sets, tells: sorted(tuple(sorted(map(int, s))) for s in sets),
)
def smallest_sets(tells):
    """(misreadings, inputs) of truth values -> a list of tuples."""
    goal = tells.any(dim=1)
    columns = range(tells.shape[1])
    for more in columns:
        sets = itertools.combinations(columns, more + 1)
        found = [s for s in sets if torch.equal(tells[:, list(s)].any(dim=1), goal)]
        if found:
            return found
    return []


@smallest_sets.cases
def _(draw):
    yield (torch.eye(2).bool(),)
    yield (torch.tensor([[True, True], [False, False]]),)
    yield (torch.tensor([[True, True, False], [True, False, True]]),)
    yield (torch.eye(5).bool(),)
    # the third input tells most, and is in no smallest set
    rows = ["100", "101", "101", "011", "011", "010", "000"]
    yield (torch.tensor([[digit == "1" for digit in row] for row in rows]),)
    # the two that tell most tell the same
    rows = ["1100", "1100", "1100", "0010", "0001", "0011"]
    yield (torch.tensor([[digit == "1" for digit in row] for row in rows]),)
    yield (draw.uniform(9, 5) < 0.4,)
    yield (draw.uniform(6, 6) < 0.3,)


@smallest_sets.also("sets of Python")
def _(tells):
    told = [
        {i for i, row in enumerate(tells.tolist()) if row[j]}
        for j in range(tells.shape[1])
    ]
    goal, size = set().union(*told), 1
    while True:
        found = [
            s
            for s in itertools.combinations(range(len(told)), size)
            if set().union(*(told[j] for j in s)) == goal
        ]
        if found:
            return found
        size += 1


@smallest_sets.also("bits of a number")
def _(tells):
    rows, inputs = tells.shape
    bits = [sum(int(tells[i, j]) << i for i in range(rows)) for j in range(inputs)]
    goal, best = 0, {}
    for word in bits:
        goal |= word
    for chosen in range(1, 1 << inputs):
        members = tuple(j for j in range(inputs) if chosen >> j & 1)
        union = 0
        for j in members:
            union |= bits[j]
        if union == goal:
            best.setdefault(len(members), []).append(members)
    return best[min(best)]


def search(tells, reached, sizes=None):
    """Try sets from the smallest on, with another idea of when one is enough."""
    columns = range(tells.shape[1])
    for size in sizes or range(1, tells.shape[1] + 1):
        sets = itertools.combinations(columns, size)
        if found := [s for s in sets if reached(tells[:, list(s)])]:
            return found
    return []


@smallest_sets.mistake(
    "the best one first",
    because="to take what tells most, and then what tells most of the rest, is quick "
    "and often right; the input that tells most need not be in the smallest set",
)
def _(tells):
    left, chosen = tells.clone(), []
    while left.any():
        chosen.append(int(left.sum(0).argmax()))
        left = left & ~tells[:, chosen[-1], None]
    return [tuple(chosen)]


@smallest_sets.mistake(
    "what nobody can tell wanted too",
    because='"every misreading" reads as every row; one row of the table is white '
    "in all columns, and no set of inputs ever changes that",
)
def _(tells):
    return search(tells, lambda part: bool(part.any(1).all()))


@smallest_sets.mistake(
    "told by every input of the set",
    because="`all` and `any` both read as words of a condition; a test suite fails if "
    "*one* of its tests does",
)
def _(tells):
    return search(tells, lambda part: torch.equal(part.all(1), tells.any(1)))


@smallest_sets.mistake(
    "one of several",
    because="a search that returns where it finds gives the first; others may be "
    "cheaper to run",
)
def _(tells):
    return search(tells, lambda part: torch.equal(part.any(1), tells.any(1)))[:1]


@smallest_sets.mistake(
    "sets of every size",
    because="the search goes on after the first size that has some; larger sets tell "
    "all, too",
)
def _(tells):
    goal, columns = tells.any(1), range(tells.shape[1])
    return [
        s
        for size in range(1, len(columns) + 1)
        for s in itertools.combinations(columns, size)
        if torch.equal(tells[:, list(s)].any(1), goal)
    ]


@smallest_sets.mistake(
    "all inputs never tried",
    because="a range ends before its end; that all inputs are needed is rare",
)
def _(tells):
    goal = tells.any(1)
    sizes = range(1, tells.shape[1])
    return search(tells, lambda part: torch.equal(part.any(1), goal), sizes)


@smallest_sets.mistake(
    "counts added up",
    because="numbers told are easy to add; what two inputs both tell is then counted "
    "twice",
)
def _(tells):
    return search(tells, lambda part: int(part.sum()) >= int(tells.any(1).sum()))


@smallest_sets.mistake(
    "rows and columns swapped",
    because="the table has two axes, and the figure shows misreadings as rows; these "
    "are sets of misreadings that every input tells one of",
)
def _(tells):
    return search(tells.T, lambda part: torch.equal(part.any(1), tells.any(0)))
