"""Exercises on the road from a prompt to its answer."""

import itertools
import math

import torch

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.exercise import Choice

chapter = Chapter("text/06_pipeline", "The pipeline")


@chapter.implement(
    title="score several answers in one call",
    minutes=15,
    difficulty="moderate",
    section="Scoring",
    text="""
A question with three possible answers: three rows, padded on the left, so that all end
together. The model has read them in one call. Sum the log-probability of each answer's
own tokens, given all that stands before them. `lengths` says how many tokens each
answer has. Work in float32, whatever the logits are.
""",
    hints=(
        "Softmax over the vocabulary, then the logarithm; pick one number at each "
        "place. Which place says what the model expected *at* token $t$?",
        "The scores at $t - 1$ answer for token $t$. So an answer's first token is "
        "scored by what the model said after the prompt's last one. Count from the "
        "end.",
    ),
    proves="Every token of an answer counts, each scored before it was read, and "
    "nothing of the prompt or the padding does, in float32.",
    why="The rows end together, so the last $n$ places of the shifted scores are the "
    "answer's, however much padding stands in front. A sum prefers short answers: each "
    "token costs something. Where the lengths differ much, people divide by them, or "
    "by the number of bytes; that is another question to the model.",
)
def answer_scores(logits, tokens, lengths):
    """(B, T, V), ids (B, T), a list of B lengths -> (B,) sums, float32."""
    shares = logits[:, :-1].float().log_softmax(dim=-1)
    each = shares.gather(-1, tokens[:, 1:, None])[..., 0]  # (B, T - 1)
    pairs = zip(each, lengths, strict=True)
    return torch.stack([row[-length:].sum() for row, length in pairs])


answer_scores.equivalent(
    "pairs = zip(each, lengths, strict=False)",
    because="there are as many lengths as rows",
)
answer_scores.equivalent(
    "each = shares.gather(-1, tokens[:, 1:, None])[..., -1] # (B, T - 1)",
    because="the last axis has one entry, which is the first and the last",
)


@answer_scores.cases
def _(draw):
    yield 2.0 * draw.integers(-2, 3, 1, 3, 2), torch.tensor([[0, 1, 1]]), [1]
    yield draw.normal(1, 4, 3), draw.integers(0, 3, 1, 4), [2]
    yield 3 * draw.normal(3, 7, 5), draw.integers(0, 5, 3, 7), [4, 1, 2]
    logits = 9 * draw.normal(2, 9, 6, dtype=torch.bfloat16)
    yield logits, draw.integers(0, 6, 2, 9), [3, 6]


@answer_scores.also("plain loops")
def _(logits, tokens, lengths):
    sums = []
    for scores, row, length in zip(
        logits.tolist(), tokens.tolist(), lengths, strict=True
    ):
        total = 0.0
        for t in range(len(row) - length, len(row)):
            whole = math.log(sum(math.exp(score) for score in scores[t - 1]))
            total += scores[t - 1][row[t]] - whole
        sums.append(total)
    return torch.tensor(sums)


@answer_scores.also("cross_entropy and a mask")
def _(logits, tokens, lengths):
    scores, wanted = logits[:, :-1].float().transpose(1, 2), tokens[:, 1:]
    surprise = torch.nn.functional.cross_entropy(scores, wanted, reduction="none")
    from_end = torch.arange(wanted.shape[1], 0, -1)
    return -(surprise * (from_end <= torch.tensor(lengths)[:, None])).sum(dim=1)


def wrong_scores(
    shares=lambda x: x.float().log_softmax(dim=-1),
    pick=lambda each, length, lengths: each[-length:].sum(),
):
    """Make an answer_scores with other shares, or another part of a row."""

    def score(logits, tokens, lengths):
        each = shares(logits)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0].float()
        pairs = zip(each, lengths, strict=True)
        return torch.stack([pick(row, length, lengths) for row, length in pairs])

    return score


@answer_scores.mistake(
    "no shift",
    because="scores and tokens have the same length, and belong together at first "
    "sight; but the scores at a token are about the next one",
)
def _(logits, tokens, lengths):
    shares = logits.float().log_softmax(dim=-1)
    each = shares.gather(-1, tokens[..., None])[..., 0]
    return torch.stack([row[-n:].sum() for row, n in zip(each, lengths, strict=True)])


answer_scores.mistake(
    "the prompt counts as well",
    because="the perplexity of a text sums over all of it; here the prompt is given",
)(wrong_scores(pick=lambda each, length, lengths: each.sum()))
answer_scores.mistake(
    "an answer's first token is lost",
    because="scores seem to begin with the answer's first token; that token was chosen "
    "from the scores at the prompt's last one",
)(wrong_scores(pick=lambda each, length, lengths: each[len(each) - length + 1 :].sum()))
answer_scores.mistake(
    "one length for the whole batch",
    because="with one row, or answers of one length, the first row's is right",
)(wrong_scores(pick=lambda each, length, lengths: each[-lengths[0] :].sum()))
answer_scores.mistake(
    "a mean for a sum",
    because="a loss is a mean; the probability of an answer is a product over its "
    "tokens, and the logarithm of a product is a sum",
)(wrong_scores(pick=lambda each, length, lengths: each[-length:].mean()))
answer_scores.mistake(
    "logits for log-probabilities",
    because="the best token is the same for both; but without softmax each place has a "
    "zero of its own, and sums cannot be compared",
)(wrong_scores(shares=lambda x: x.float()))
answer_scores.mistake(
    "softmax over the tokens",
    because="axis 1 is often the one with the classes; here it is the text",
)(wrong_scores(shares=lambda x: x.float().log_softmax(dim=1)))
answer_scores.mistake(
    "softmax in half precision",
    because="the logits came so; in bfloat16 a log-probability has two or three digits",
)(wrong_scores(shares=lambda x: x.log_softmax(dim=-1)))


@chapter.implement(
    title="what a prompt cache has yet to read",
    minutes=10,
    difficulty="easy",
    section="A prompt cache",
    text="""
A cache holds keys and values for the ids `seen`. Here comes a prompt. Which of its ids
must the model still read? What the two begin with alike is kept, whatever follows it in
the cache. But the model must read something, or it gives no scores.
""",
    hints=(
        "Go from the front, in step, and stop at the first pair that differs. What if "
        "the cache has more than the prompt?",
        "If the prompt is in the cache to its end, its last id must be read again: its "
        "scores were not kept.",
    ),
    proves="What is read begins where prompt and cache first part, goes to the "
    "prompt's end, and is never empty.",
)
def still_to_read(seen, prompt):
    """Two lists of ids -> the part of the prompt that must be read, a list."""
    kept = 0
    while kept < min(len(seen), len(prompt) - 1) and seen[kept] == prompt[kept]:
        kept += 1
    return prompt[kept:]


@still_to_read.cases
def _(draw):
    a, b, c, d, e, f = (10 + i for i in draw.permutation(6))
    yield [a, b], [a, b]
    yield [a], [a, b, c]
    yield [a, b, c], [a, d, c]
    yield [a, b, c, d], [a, b, c]
    yield [], [a, b]
    yield [a, b, c, d, e], [a, b, f, d, e, b]
    yield [a], [b]


@still_to_read.also("takewhile")
def _(seen, prompt):
    alike = itertools.takewhile(
        lambda pair: pair[0] == pair[1], zip(seen, prompt, strict=False)
    )
    return prompt[min(len(list(alike)), len(prompt) - 1) :]


@still_to_read.also("a tensor")
def _(seen, prompt):
    both = min(len(seen), len(prompt) - 1)
    alike = torch.tensor(seen[:both]) == torch.tensor(prompt[:both])
    return prompt[int(alike.int().cumprod(dim=0).sum()) :]


@still_to_read.mistake(
    "assumed, not compared",
    because="a conversation only grows, so its beginning should be what was there; but "
    "a model may spell a word with other ids than the tokenizer does",
)
def _(seen, prompt):
    return prompt[len(seen) :] or prompt[-1:]


@still_to_read.mistake(
    "nothing left to read",
    because="it is all in the cache; yet the cache has keys and values, and no scores",
)
def _(seen, prompt):
    kept = 0
    while kept < min(len(seen), len(prompt)) and seen[kept] == prompt[kept]:
        kept += 1
    return prompt[kept:]


@still_to_read.mistake(
    "all or nothing",
    because="a cache looks right or wrong as a whole; up to the first difference it is "
    "right",
)
def _(seen, prompt):
    whole = prompt[: len(seen)] == seen and len(seen) < len(prompt)
    return prompt[len(seen) :] if whole else prompt


@still_to_read.mistake(
    "matches after the first difference",
    because="the same id stands at the same place; its keys were made from another "
    "text, so they are other keys",
)
def _(seen, prompt):
    kept = sum(a == b for a, b in zip(seen, prompt, strict=False))
    return prompt[min(kept, len(prompt) - 1) :]


@still_to_read.mistake(
    "known ids left out",
    because="a cache sounds like a dictionary from ids to keys; but keys depend on the "
    "place and on all that stands before",
)
def _(seen, prompt):
    return [token for token in prompt if token not in seen] or prompt[-1:]


@still_to_read.mistake(
    "the id where they part is skipped",
    because="it is natural to go on *after* the place that was looked at last",
)
def _(seen, prompt):
    kept = 0
    while kept < min(len(seen), len(prompt) - 1) and seen[kept] == prompt[kept]:
        kept += 1
    return prompt[min(kept + 1, len(prompt) - 1) :]


chapter.explain(
    "cut_the_prompt",
    title="ids or characters",
    minutes=5,
    difficulty="easy",
    section="Three steps, by hand",
    text="""
`postprocess` decodes the new ids only. A colleague decodes prompt and answer together,
and cuts off the first `len(prompt)` characters, where `prompt` is the text that the
chat template made. What is left of an answer in a conversation?
""",
    hints=(
        "Is what decoding gives for the prompt's ids as long as the text that was "
        "encoded?",
        "What does `decode` do with `<|im_start|>`?",
    ),
    choices={
        "a": Choice(
            "The whole of it: decoding undoes encoding.",
            "For the plain words it does. But the template's marks are special tokens, "
            "and decoding leaves those out.",
        ),
        "b": Choice(
            "The whole of it, behind some words of the prompt.",
            "That would need a prompt that grows on its way through the ids. It "
            "shrinks: its special tokens do not come back.",
        ),
        "c": Choice(
            "Its end, or nothing.",
            "Decoding leaves special tokens out, so the decoded prompt is shorter than "
            "the text that was encoded, and the cut eats into the answer. Here the "
            "marks have more characters than the answer, and nothing is left.",
        ),
        "d": Choice(
            "The whole of it in a conversation; with a bare text it would go wrong.",
            "The other way round: a bare text has no marks to lose. (It may still come "
            "back changed, where a tokenizer normalises or lacks something.)",
        ),
    },
    right="c",
    why="The ids know where the prompt ends; characters do not. transformers' pipeline "
    "cuts ids, too, and puts the prompt's *text* in front when asked for the full "
    "text.",
)


chapter.explain(
    "drop_the_oldest",
    title="a conversation cut short",
    minutes=5,
    difficulty="moderate",
    section="A prompt cache",
    text="""
To stay inside the context, a colleague drops the two oldest messages each turn. The
prompts stay short, but the prompt cache now saves almost nothing. What should change?
""",
    hints=(
        "Write down the first ids of two prompts that follow each other: where do they "
        "part?",
        "From the second layer on, what were the keys of a token computed from?",
    ),
    choices={
        "a": Choice(
            "Drop many messages, seldom: between two cuts the beginning stays the "
            "same.",
            "After a cut the old prompt and the new one part right behind the system "
            "message, and all the rest must be read again. With seldom cuts that is "
            "paid seldom.",
        ),
        "b": Choice(
            "Cut the dropped messages out of the cache, too; the rest stays right.",
            "That gives other numbers. From the second layer on, the keys and values "
            "of later tokens were computed from rows that *had seen* the dropped "
            "messages, and their positions would have a gap. It is done at times, as "
            "an approximation.",
        ),
        "c": Choice(
            "Nothing: a shorter prompt costs less than any cache saves.",
            "Count: it reads the whole window again at every turn, where a cache reads "
            "the new message only.",
        ),
        "d": Choice(
            "Compare words, not ids: then the cache finds the messages that stayed.",
            "They are there, but at other places and behind another text. A cache is "
            "right up to the first difference, and not after it.",
        ),
    },
    right="a",
)


chapter.explain(
    "seed_in_a_batch",
    title="the same seed, another answer",
    minutes=5,
    difficulty="moderate",
    section="The ladder of equality",
    text="""
"I seed the generator, and `pipe(a, sampler=...)` repeats itself. But `pipe([a, b],
sampler=...)` gives another answer to `a`, with the same seed. Your padding is broken!"
Is it?
""",
    hints=(
        "Is the *greedy* answer to `a` the same, alone and in the batch?",
        "One generator is a list of numbers. Who takes the second one?",
    ),
    choices={
        "a": Choice(
            "Yes: padding shifts the positions of the shorter row.",
            "It would, if positions counted padding. They do not, and the greedy ids "
            "in a padded batch are those of the prompt alone: the chapter checks it "
            "against transformers.",
        ),
        "b": Choice(
            "Yes: rows of a batch see each other through attention.",
            "They never do. Attention mixes tokens of one row, and the batch is only a "
            "way to compute several at once.",
        ),
        "c": Choice(
            "No: rounding differs between batches, so no seed can repeat an answer.",
            "Rounding can tip a near tie, but the same batch with the same seed "
            "repeats itself here. What differs is who gets which random number.",
        ),
        "d": Choice(
            "No: one generator draws for all rows in turn.",
            "The probabilities of the row are the same, alone or padded. But with a "
            "second row, the number that would have been drawn for `a`'s second token "
            "goes to `b`. Same distribution, other draw.",
        ),
    },
    right="d",
    why="To repeat an answer, repeat the whole batch; or give each row a generator of "
    "its own.",
)


@chapter.debug(
    title="where an answer ends",
    minutes=10,
    difficulty="easy",
    section="Three steps, by hand",
    text="""
Cut each row before its first stop id, of which there may be several. Somebody tests it
with one stop id, and it works. With a model that has two, answers run on. Mend it.
""",
    hints=(
        "What does it do with the second stop id?",
        "Which of several stop ids ends a row: the one that is listed first, or the "
        "one that comes first in the row?",
    ),
    proves="Each row ends before the first of its stop ids, whichever that is, and a "
    "row without one stays whole.",
)
def until_stop(ids, stop_ids):
    """Ids (B, T) and a list of those that stop -> a list of ids for each row."""
    kept = []
    for row in ids.tolist():
        ends = [i for i, token in enumerate(row) if token in stop_ids]
        kept.append(row[: ends[0]] if ends else row)
    return kept


@until_stop.broken(
    "one stop id of several",
    because="a tokenizer has one end token; `generation_config.json` may name more",
)
def _(ids, stop_ids):
    kept = []
    for row in ids.tolist():
        end = row.index(stop_ids[0]) if stop_ids[0] in row else len(row)
        kept.append(row[:end])
    return kept


@until_stop.cases
def _(draw):
    a, b, c, d, end, stop = (10 + i for i in draw.permutation(6))
    yield torch.tensor([[a, end]]), [end]
    yield torch.tensor([[a, b]]), [end]
    yield torch.tensor([[a, stop, b, end]]), [end, stop]
    yield torch.tensor([[a, end, end], [b, c, end]]), [end]
    rows = [[a, b, c, d, a], [end, a, b, stop, c], [d, d, stop, b, a]]
    yield torch.tensor(rows), [end, stop]
    yield torch.tensor([[a, d, b], [b, stop, a]]), [end, stop, d]


@until_stop.also("takewhile")
def _(ids, stop_ids):
    rows = ids.tolist()
    return [list(itertools.takewhile(lambda i: i not in stop_ids, r)) for r in rows]


@until_stop.also("a mask")
def _(ids, stop_ids):
    stopped = torch.isin(ids, torch.tensor(stop_ids)).cumsum(dim=1) > 0
    return [row[~s].tolist() for row, s in zip(ids, stopped, strict=True)]


@until_stop.mistake(
    "the stop id that is listed first",
    because="a loop over the stop ids is natural, and ends at the first that it finds",
)
def _(ids, stop_ids):
    kept = []
    for row in ids.tolist():
        found = next((stop for stop in stop_ids if stop in row), None)
        kept.append(row if found is None else row[: row.index(found)])
    return kept


@until_stop.mistake(
    "the stop id is kept",
    because="the model wrote it, and when text is made special tokens vanish anyway; "
    "but not all stop ids are special tokens",
)
def _(ids, stop_ids):
    kept = []
    for row in ids.tolist():
        ends = [i for i, token in enumerate(row) if token in stop_ids]
        kept.append(row[: ends[0] + 1] if ends else row)
    return kept


@until_stop.mistake(
    "stop ids taken out, the rest kept",
    because="`generate` fills finished rows with the stop id, so that nothing else "
    "follows; what another program generates may go on",
)
def _(ids, stop_ids):
    return [[token for token in row if token not in stop_ids] for row in ids.tolist()]


@until_stop.mistake(
    "the first row's end for all",
    because="a batch is one tensor, and one slice cuts all of it",
)
def _(ids, stop_ids):
    ends = [i for i, token in enumerate(ids[0].tolist()) if token in stop_ids]
    return (ids[:, : ends[0]] if ends else ids).tolist()


@until_stop.mistake(
    "the last stop id of a row",
    because="the end of a text is looked for from its end; the row goes on repeating "
    "it",
)
def _(ids, stop_ids):
    kept = []
    for row in ids.tolist():
        ends = [i for i, token in enumerate(row) if token in stop_ids]
        kept.append(row[: ends[-1]] if ends else row)
    return kept


@until_stop.mistake(
    "-1 where none is found",
    because="functions that search give -1 for nothing, and a slice takes it for the "
    "last place",
)
def _(ids, stop_ids):
    kept = []
    for row in ids.tolist():
        ends = [i for i, token in enumerate(row) if token in stop_ids]
        kept.append(row[: (ends or [-1])[0]])
    return kept
