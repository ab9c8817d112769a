"""Exercises on blanks: restore a text, number its tokens, ask for the answer."""

import torch

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.exercise import Choice

chapter = Chapter("chatglm/01_blanks", "Blank infilling and two positions")


@chapter.implement(
    title="put the answer back",
    minutes=8,
    difficulty="easy",
    section="Which blank?",
    text="""
An example as a list of words, special tokens among them. Put the answer back into its
blank, and return the words of the text. The answer opens at the first `<sop>`; a second
one is a word like any other. It ends before `<eop>`, behind which there may be padding.
If there are several blanks, it is the one that the *model* fills; the others stay.
""",
    hints=(
        "Three cuts: where does the context end, where does the answer end, and where "
        "in the context is the blank?",
        "The model looks for `[gMASK]` first, and takes the first of its kind.",
    ),
    proves="The answer stands in the blank that the model fills, all of it and nothing "
    "else, for short blanks, long ones and empty answers.",
)
def restore_text(tokens):
    """[words, special tokens among them] -> [words of the text]."""
    context = tokens[: tokens.index("<sop>")]
    answer = tokens[len(context) + 1 : tokens.index("<eop>")]
    blank = context.index("[gMASK]" if "[gMASK]" in context else "[MASK]")
    return context[:blank] + answer + context[blank + 1 :]


@restore_text.cases
def _(draw):
    for line in (
        "a [MASK] d <sop> b c <eop>",
        "a b [gMASK] <sop> c d <eop>",
        "[MASK] b <sop> a <eop> <pad> <pad>",
        "a [MASK] c [MASK] e <sop> b <eop>",
        "a [MASK] c [gMASK] <sop> d e <eop>",
        "[gMASK] a [MASK] c <sop> b <eop> <pad>",
        "a [MASK] d <sop> b <sop> c <eop>",
        "a b [MASK] c <sop> <eop> <pad>",
    ):
        yield (line.split(),)
    words = [f"w{i}" for i in draw.permutation(9)]
    start = draw.integer(1, 4)
    context = [*words[:start], "[MASK]", *words[start + 3 :], "[MASK]"]
    yield ([*context, "<sop>", *words[start : start + 3], "<eop>", "<pad>"],)


@restore_text.also("a loop over the tokens")
def _(tokens):
    context, answer, part = [], [], "context"
    for token in tokens:
        if part == "context" and token == "<sop>":
            part = "answer"
        elif part == "answer" and token == "<eop>":
            break
        else:
            (context if part == "context" else answer).append(token)
    kinds = [i for i, token in enumerate(context) if token == "[gMASK]"]
    kinds += [i for i, token in enumerate(context) if token == "[MASK]"]
    context[kinds[0] : kinds[0] + 1] = answer
    return context


@restore_text.also("strings cut in parts")
def _(tokens):
    context, _, rest = " ".join(tokens).partition("<sop>")
    answer, _, _ = rest.partition("<eop>")
    kind = "[gMASK]" if "[gMASK]" in context else "[MASK]"
    return context.replace(kind, answer, 1).split()


def wrong_restore(kinds=("[gMASK]", "[MASK]"), opens=None, ends=None, which=0):
    """Make a restore_text with another blank, another beginning or another end."""

    def restore(tokens):
        start = opens(tokens) if opens else tokens.index("<sop>")
        context = tokens[:start]
        end = ends(tokens) if ends else tokens.index("<eop>")
        kind = next((kind for kind in kinds if kind in context), "")
        wanted = [kind] if kind else ["[MASK]", "[gMASK]"]
        blank = [i for i, token in enumerate(context) if token in wanted][which]
        return context[:blank] + tokens[start + 1 : end] + context[blank + 1 :]

    return restore


restore_text.mistake(
    "the tokenizer's blank",
    because="both prefer one kind of blank: the tokenizer `[MASK]`, the model "
    "`[gMASK]`",
)(wrong_restore(kinds=("[MASK]", "[gMASK]")))
restore_text.mistake(
    "the first blank of any kind",
    because="with one kind of blank the first one counts; between two kinds the model "
    "has a preference",
)(wrong_restore(kinds=()))
restore_text.mistake(
    "the last blank",
    because="it stands nearest to the answer, and `[gMASK]` is always last in what the "
    "tokenizer makes",
)(wrong_restore(which=-1))
restore_text.mistake(
    "the last <sop>",
    because="the start of the answer is looked for from its end; but whatever comes "
    "after the first `<sop>` is answer",
    section="Where the answer begins",
)(wrong_restore(opens=lambda tokens: len(tokens) - 1 - tokens[::-1].index("<sop>")))
restore_text.mistake(
    "<eop> kept",
    because="it is one of the labels, so it looks like a part of the answer. It says "
    "that the answer is over",
    section="Learning to fill a blank",
)(wrong_restore(ends=lambda tokens: tokens.index("<eop>") + 1))
restore_text.mistake(
    "all but the last token",
    because="the last token of one example is `<eop>`. In a batch the shorter ones go "
    "on with padding",
    section="Learning to fill a blank",
)(wrong_restore(ends=lambda tokens: len(tokens) - 1))


@restore_text.mistake(
    "the answer at the end",
    because="that is where it stands, and in a chat it stays there; a blank may be "
    "anywhere",
    section="Learning to fill a blank",
)
def _(tokens):
    start = tokens.index("<sop>")
    kind = "[gMASK]" if "[gMASK]" in tokens[:start] else "[MASK]"
    rest = tokens[:start]
    rest.remove(kind)
    return rest + tokens[start + 1 : tokens.index("<eop>")]


@restore_text.mistake(
    "every blank filled",
    because="`replace` fills all it finds. One answer belongs to one blank",
)
def _(tokens):
    start = tokens.index("<sop>")
    answer = tokens[start + 1 : tokens.index("<eop>")]
    text = []
    for token in tokens[:start]:
        text += answer if token in ("[MASK]", "[gMASK]") else [token]
    return text


@chapter.implement(
    title="two numbers for every token",
    minutes=15,
    difficulty="moderate",
    section="Or the rest of the text",
    text="""
Give each token of a batch its place and its step, without looking it up. Each row has
one `<sop>` or more and one blank or more, and its own lengths. Padding on the left
counts as text, as the model has it, and `[gMASK]` goes before `[MASK]`.
""",
    hints=(
        "Two numbers a row decide everything: the index of the first `<sop>`, and "
        "that of the blank. Keep both as (B, 1), so that they meet an index of (T).",
        "Place: the index in the context, then the blank's. Step: 0 in the context, "
        "then 1 at `<sop>`, and on.",
    ),
    proves="Every row has the places and steps of its own context and blank, whichever "
    "kind of blank, with padding, and with a second `<sop>`.",
)
def two_positions(tokens, sop, gmask, mask):
    """Ids (B, T), three special ids -> (B, 2, T): places, and steps."""
    contexts = (tokens == sop).int().argmax(dim=1, keepdim=True)  # of equals, the first
    wanted = torch.where((tokens == gmask).any(dim=1), gmask, mask)
    blanks = (tokens == wanted[:, None]).int().argmax(dim=1, keepdim=True)
    index = torch.arange(tokens.shape[1])
    places = torch.where(index < contexts, index, blanks)
    steps = (index - contexts + 1).clamp(min=0)
    return torch.stack((places, steps), dim=1)


@two_positions.cases
def _(draw):
    sop, gmask, mask, eop, pad = range(1, 6)
    yield torch.tensor([[9, mask, 8, sop, 7]]), sop, gmask, mask
    yield (
        torch.tensor([[9, mask, 8, 7, sop, 6], [9, 8, gmask, sop, 7, 6]]),
        *(sop, gmask, mask),
    )
    sop, gmask, mask, eop, pad = draw.permutation(9)[:5]
    words = (10 + draw.integers(0, 90, 9)).tolist()
    rows = [
        [*words[:2], mask, *words[2:5], sop, words[5], sop, words[6], eop],
        [pad, pad, pad, words[0], gmask, sop, *words[1:5], eop],
        [mask, *words[:5], mask, words[5], sop, words[6], eop],
        [words[0], mask, *words[1:6], gmask, sop, words[6], eop],
        [gmask, sop, *words[:8], eop],
    ]
    yield torch.tensor(rows), sop, gmask, mask
    yield torch.tensor(rows[::-1]), sop, gmask, mask


@two_positions.also("loops over rows and tokens")
def _(tokens, sop, gmask, mask):
    rows = []
    for row in tokens.tolist():
        context = row.index(sop)
        blank = row.index(gmask if gmask in row else mask)
        places = [t if t < context else blank for t in range(len(row))]
        steps = [max(0, t - context + 1) for t in range(len(row))]
        rows.append([places, steps])
    return torch.tensor(rows)


@two_positions.also("running sums")
def _(tokens, sop, gmask, mask):
    in_answer = (tokens == sop).cumsum(dim=1) > 0
    steps = in_answer.cumsum(dim=1)
    index = torch.arange(tokens.shape[1]).expand_as(tokens)
    far = tokens.shape[1]
    first = [torch.where(tokens == i, index, far).amin(dim=1) for i in (gmask, mask)]
    blanks = torch.where(first[0] < far, first[0], first[1])
    return torch.stack((torch.where(in_answer, blanks[:, None], index), steps), dim=1)


def wrong_positions(number=None, context=None, blank=None):
    """Make a two_positions with another rule for (place, step), context or blank."""

    def positions(tokens, sop, gmask, mask):
        rows = tokens.tolist()
        pairs = []
        for i in range(len(rows)):
            row = rows[0] if context == "first row" else rows[i]
            c = row.index(sop)
            if context == "last":
                c = len(row) - 1 - row[::-1].index(sop)
            row = rows[0] if blank == "first row" else rows[i]
            kinds = [mask, gmask] if blank == "tokenizer" else [gmask, mask]
            m = row.index(kinds[0] if kinds[0] in row else kinds[1])
            rule = number or (lambda t, c, m: (t, 0) if t < c else (m, t - c + 1))
            pairs.append([rule(t, c, m) for t in range(len(row))])
        return torch.tensor(pairs).transpose(1, 2).contiguous()

    return positions


two_positions.mistake(
    "the first row's context for all",
    because="one prompt at a time is how one tries it, and in a batch of examples of "
    "one length nothing shows",
    section="Where the answer begins",
)(wrong_positions(context="first row"))
two_positions.mistake(
    "the first row's blank for all",
    because="the lengths were taken row by row, and the blank seems to be part of them",
    section="Which blank?",
)(wrong_positions(blank="first row"))
two_positions.mistake(
    "steps from 0",
    because="programmers count from 0. Then `<sop>` has the numbers of the blank "
    "itself",
    section="Why two numbers",
)(wrong_positions(lambda t, c, m: (t, 0) if t < c else (m, t - c)))
two_positions.mistake(
    "places count on",
    because="that is Llama's way: the answer stands behind the text. Here it stands in "
    "its blank",
)(wrong_positions(lambda t, c, m: (t, max(0, t - c + 1))))
two_positions.mistake(
    "places count from the blank",
    because="the words that were cut out had places of their own, beginning there. "
    "Used so, they collide with those of the words behind the blank",
    section="Why two numbers",
)(wrong_positions(lambda t, c, m: (t, 0) if t < c else (m + t - c, t - c + 1)))
two_positions.mistake(
    "<sop> in the context",
    because="the prompt brings `<sop>` along, so it looks like a part of the "
    "question; the answer begins with it",
    section="Where the answer begins",
)(wrong_positions(lambda t, c, m: (t, 0) if t <= c else (m, t - c)))
two_positions.mistake(
    "the last <sop>",
    because="the newest start sounds like the one that counts; but after the first "
    "`<sop>` everything is answer",
    section="Where the answer begins",
)(wrong_positions(context="last"))
two_positions.mistake(
    "[MASK] before [gMASK]",
    because="the original's tokenizer prefers it so; its model, which decides when it "
    "gets no positions, prefers `[gMASK]`",
    section="Which blank?",
)(wrong_positions(blank="tokenizer"))


@two_positions.mistake(
    "[gMASK]'s place counts on",
    because="early revisions did so, and the original does so still where it has no "
    "steps. With two numbers one rule holds for both kinds of blank",
    section="One row",
)
def _(tokens, sop, gmask, mask):
    positions = wrong_positions()(tokens, sop, gmask, mask)
    counted = torch.arange(tokens.shape[1])
    has_gmask = (tokens == gmask).any(dim=1, keepdim=True)
    positions[:, 0] = torch.where(has_gmask, counted, positions[:, 0])
    return positions


@chapter.implement(
    title="read it off the numbers",
    minutes=6,
    difficulty="easy",
    section="Or the rest of the text",
    text="""
Someone hands you the two rows of positions of one prompt, and no ids. How long is the
context, and at which index does the mask token stand?
""",
    hints=(
        "Which tokens have step 0?",
        "All tokens of the answer share one place. Whose is it?",
    ),
    proves="Context and blank are found, with the blank first, inside or last.",
)
def read_off_positions(positions):
    """(2, T): places, and steps -> (context length, index of the mask token), ints."""
    places, steps = positions.tolist()
    return steps.count(0), places[-1]


@read_off_positions.cases
def _(draw):
    sizes = [(3, 1, 2), (2, 0, 1), (4, 3, 1), (3, 2, 4), (1, 0, 5)]
    context = draw.integer(5, 9)
    sizes.append((context, draw.integer(1, context - 2), draw.integer(2, 9)))
    for context, blank, answer in sizes:
        places = [*range(context), *[blank] * answer]
        yield (torch.tensor([places, [0] * context + [*range(1, answer + 1)]]),)


@read_off_positions.also("from the first token of the answer")
def _(positions):
    context = int((positions[1] > 0).int().argmax())
    return context, positions[0, context]


@read_off_positions.also("from the largest numbers")
def _(positions):
    context = positions.shape[1] - positions[1].max().item()
    return context, positions[0, context].item()


@read_off_positions.also("a loop")
def _(positions):
    for index, (place, step) in enumerate(positions.T.tolist()):
        if step:
            return index, place


@read_off_positions.mistake(
    "the last token of the context",
    because="`[gMASK]` ends the context, so that the mask stands right before the "
    "answer; `[MASK]` may stand anywhere",
)
def _(positions):
    context = (positions[1] == 0).sum().item()
    return context, context - 1


@read_off_positions.mistake(
    "the index of the answer",
    because="the answer fills the blank, so where it begins looks like where the blank "
    "is. It stands behind the context, and only its place is the blank's",
)
def _(positions):
    context = (positions[1] == 0).sum().item()
    return context, context


@read_off_positions.mistake(
    "<sop> counted to the context",
    because="step 1 looks like the first step after `<sop>`; it is that of `<sop>`",
    section="Where the answer begins",
)
def _(positions):
    return (positions[1] <= 1).sum().item(), positions[0, -1].item()


@read_off_positions.mistake(
    "the last index for the length",
    because="the largest place of the context is its length minus one, when places "
    "count from 0",
)
def _(positions):
    return positions[0].max().item(), positions[0, -1].item()


@read_off_positions.mistake(
    "rows exchanged",
    because="some texts name the step first; row 0 is the place",
)
def _(positions):
    return (positions[0] == 0).sum().item(), positions[1, -1].item()


chapter.explain(
    "why_steps_count_from_one",
    title="steps from 1",
    minutes=5,
    difficulty="easy",
    section="Why two numbers",
    text="""
Steps of the answer count from 1, while places count from 0. Why not steps from 0, as a
programmer would?
""",
    hints=(
        "Write down both numbers of every token of `she opened [MASK] and left <sop> "
        "the door <eop>`, with steps from 0.",
        "Do two tokens then have the same pair?",
    ),
    choices={
        "a": Choice(
            "Step 0 is kept for padding.",
            "Padding has no number of its own. The model counts it as text, with step "
            "0 like every token of the context.",
        ),
        "b": Choice(
            "It is the paper's convention, and either would do.",
            "Were it for the paper, places would count from 1 too: there they do. "
            "Where places begin is free; where steps begin is not.",
        ),
        "c": Choice(
            "`<sop>` would get the pair of the mask token.",
            "That is (m, 0). The rotation could not tell the two apart; only their "
            "vectors could. Step 0 means “in the context”, and no token of an answer "
            "has it.",
        ),
        "d": Choice(
            "`<sop>` would get the pair of the first token of the text.",
            "That is (0, 0). The place of `<sop>` is the blank's, m: only a blank at "
            "the very beginning has place 0.",
        ),
    },
    right="c",
)


@chapter.debug(
    title="what the loss asks for",
    minutes=8,
    difficulty="moderate",
    section="What is asked: the loss",
    text="""
A colleague makes labels like this, -100 where nothing is asked, and has trained on
`[gMASK]` for weeks. Now they try `[MASK]`, and the batch cannot be made. Find the
assumption, and repair it. (`blanks` holds the ids of the two mask tokens.)
""",
    hints=(
        "Count the labels of `she opened [MASK] and left <sop> the door <eop>`.",
        "Which token stands at `blank + 1`, for `[gMASK]` and for `[MASK]`?",
    ),
    proves="There are as many labels as tokens, nothing of the context is asked, and "
    "all of the answer is, for blanks at any place.",
    why="It takes the mask token to be the last of the context, so that `blank + 1` "
    "is `<sop>`. `[gMASK]` is; `[MASK]` is not, and what stands behind it is counted "
    "twice. (In the original's recipe a line of the same form works for both, because "
    "what it calls `mask_position` is the last index of the context.)",
)
def example_labels(tokens, sop, blanks):
    """[ids], an id, [ids] -> [labels], as many as tokens."""
    context = tokens.index(sop)
    return [-100] * context + tokens[context:]


@example_labels.broken(
    "the mask token taken for the end of the context",
    because="in a chat it is: `[gMASK]` stands right before `<sop>`",
)
def _(tokens, sop, blanks):
    context = tokens.index(sop)
    blank = next(t for t, token in enumerate(tokens) if token in blanks)
    return [-100] * context + tokens[blank + 1 :]


@example_labels.mistake(
    "the rest of the context asked",
    because="now the number of labels is right, and the batch can be made. But the "
    "words behind the blank are part of the question",
)
def _(tokens, sop, blanks):
    blank = next(t for t, token in enumerate(tokens) if token in blanks)
    return [-100] * (blank + 1) + tokens[blank + 1 :]


@example_labels.mistake(
    "shifted already",
    because="the logits at a token score the next one, so labels must be shifted; the "
    "loss does it, and twice is once too often",
)
def _(tokens, sop, blanks):
    context = tokens.index(sop)
    return [-100] * (context - 1) + tokens[context:] + [-100]


@example_labels.mistake(
    "<sop> not asked",
    because="the prompt brings `<sop>` along, and in the paper nobody asks for it; the "
    "original's recipe keeps it among the labels",
    section="Learning to fill a blank",
)
def _(tokens, sop, blanks):
    context = tokens.index(sop) + 1
    return [-100] * context + tokens[context:]


@example_labels.mistake(
    "<eop> not asked",
    because="it is no word of the answer. But a model that is never asked for it never "
    "stops",
    section="Learning to fill a blank",
)
def _(tokens, sop, blanks):
    context = tokens.index(sop)
    return [-100] * context + tokens[context:-1] + [-100]


@example_labels.mistake(
    "everything asked",
    because="Llama is asked for every token. Here the context is read, not learned",
    section="Learning to fill a blank",
)
def _(tokens, sop, blanks):
    return list(tokens)


@example_labels.mistake(
    "0 where nothing is asked",
    because="0 sounds like nothing. It is an id like any other, and the loss would ask "
    "for it",
)
def _(tokens, sop, blanks):
    context = tokens.index(sop)
    return [0] * context + tokens[context:]


@example_labels.cases
def _(draw):
    sop, gmask, mask, eop = 1, 2, 3, 4
    yield [9, mask, 8, sop, 7, eop], sop, [gmask, mask]
    yield [9, 8, gmask, sop, 7, 6, eop], sop, [gmask, mask]
    sop, gmask, mask, eop = draw.permutation(9)[:4]
    words = (10 + draw.integers(0, 90, 7)).tolist()
    yield [mask, *words[:4], sop, *words[4:], eop], sop, [gmask, mask]
    yield [*words[:4], gmask, sop, words[4], sop, words[5], eop], sop, [gmask, mask]
    yield [gmask, sop, *words, eop], sop, [gmask, mask]


@example_labels.also("a loop that remembers whether it saw <sop>")
def _(tokens, sop, blanks):
    labels, asked = [], False
    for token in tokens:
        asked = asked or token == sop
        labels.append(token if asked else -100)
    return labels
