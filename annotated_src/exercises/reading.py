"""Exercises on a decoder as a function: ids in, scores out."""

import math

import torch

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.exercise import Choice

chapter = Chapter("llama/01_reading", "Reading a decoder")


@chapter.implement(
    title="surprise, in bits",
    minutes=10,
    difficulty="easy",
    section="What a text is worth",
    text=r"""
A word of probability $p$ carries $-\log_2 p$ bits of *surprise*: a word that was sure
to come carries none, and each bit halves the probability. Write `surprises`. A model
has read the texts `tokens` and has given the scores `logits`. How many bits did each
token carry? Scores may be in the hundreds, and still no surprise is infinite.
""",
    hints=(
        "Nothing has guessed the first token. Which row of the logits has guessed the "
        "second one?",
        "Leave out the last row and the first token: then they lie side by side. "
        "From each row you need one number, and `gather` picks it. Natural "
        "logarithms become bits by one division.",
    ),
    proves="Each token is looked up in the guess that was made before it was read, in "
    "bits, and scores of several hundred do no harm.",
)
def surprises(logits, tokens):
    """(B, T, V) scores, (B, T) ids -> (B, T - 1), bits of all tokens but the first."""
    guesses = logits[:, :-1].log_softmax(dim=-1)
    chosen = guesses.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return -chosen / math.log(2)


@surprises.cases
def _(draw):
    eighths = torch.tensor([[[1.0, 2.0, 5.0], [4.0, 2.0, 2.0]]])
    yield eighths.log(), torch.tensor([[2, 0]])  # an eighth: 3 bits
    far = torch.tensor([[[0.0, 300.0], [300.0, 298.0], [0.0, 0.0]]])
    yield far, torch.tensor([[0, 0, 1]])  # 2 to the -433 is no float32
    yield 3 * draw.normal(1, 5, 4), draw.integers(0, 4, 1, 5)
    yield 3 * draw.normal(3, 4, 9), draw.integers(0, 9, 3, 4)
    yield 300 * draw.normal(2, 5, 6), draw.integers(0, 6, 2, 5)


@surprises.also("loops")
def _(logits, tokens):
    rows = []
    for text, ids in zip(logits.tolist(), tokens.tolist(), strict=True):
        bits = []
        for scores, token in zip(text, ids[1:], strict=False):
            top = max(scores)
            total = sum(math.exp(score - top) for score in scores)
            bits.append((math.log(total) + top - scores[token]) / math.log(2))
        rows.append(bits)
    return torch.tensor(rows)


@surprises.also("cross entropy")
def _(logits, tokens):
    rows = logits[:, :-1].transpose(1, 2)  # (B, V, T - 1), as cross_entropy has it
    loss = torch.nn.functional.cross_entropy(rows, tokens[:, 1:], reduction="none")
    return loss / math.log(2)


@surprises.also("a mask of one")
def _(logits, tokens):
    ones = torch.nn.functional.one_hot(tokens[:, 1:], logits.shape[-1])
    picked = (logits[:, :-1] * ones).sum(-1)
    return (logits[:, :-1].logsumexp(-1) - picked) * math.log2(math.e)


def bits_of(guesses, tokens):
    """Look tokens up in guesses of the same length: (B, T, V), (B, T) -> (B, T)."""
    return -guesses.gather(-1, tokens[..., None]).squeeze(-1) / math.log(2)


@surprises.mistake(
    "row t for token t",
    because="row and token have the same index; but row t was made after token t was "
    "read, and is the guess for the next one",
)
def _(logits, tokens):
    return bits_of(logits.log_softmax(dim=-1), tokens)[:, 1:]


@surprises.mistake(
    "nats for bits",
    because="`log` is the natural logarithm, and losses are given in its unit; a bit "
    "is a logarithm to base 2",
)
def _(logits, tokens):
    return bits_of(logits[:, :-1].log_softmax(dim=-1), tokens[:, 1:]) * math.log(2)


@surprises.mistake(
    "softmax over the tokens",
    because="the softmax of a sequence sounds like one along the sequence; the words "
    "that compete for a place stand in the last axis",
    section="Ids in, scores out",
)
def _(logits, tokens):
    return bits_of(logits[:, :-1].log_softmax(dim=1), tokens[:, 1:])


@surprises.mistake(
    "the sign forgotten",
    because="log-probabilities are what one adds up; they are negative, and a surprise "
    "is not",
)
def _(logits, tokens):
    return -bits_of(logits[:, :-1].log_softmax(dim=-1), tokens[:, 1:])


@surprises.mistake(
    "softmax twice",
    because="probabilities look like a safe input to anything; but `log_softmax` and "
    "`cross_entropy` want scores, and make the probabilities themselves",
    section="Ids in, scores out",
)
def _(logits, tokens):
    guesses = logits[:, :-1].softmax(dim=-1).log_softmax(dim=-1)
    return bits_of(guesses, tokens[:, 1:])


@surprises.mistake(
    "scores for log-probabilities",
    because="a logit is often called an unnormalised log-probability; what is "
    "missing is the same for all words of a row, but not the same for all rows",
    section="Ids in, scores out",
)
def _(logits, tokens):
    return bits_of(logits[:, :-1], tokens[:, 1:])


@surprises.mistake(
    "exponentials that overflow",
    because="the formula of the softmax is right as it stands, on paper; in float32 "
    "exp(89) is infinite, and infinity over infinity is not a number",
    section="Ids in, scores out",
)
def _(logits, tokens):
    grown = logits[:, :-1].exp()
    return bits_of((grown / grown.sum(-1, keepdim=True)).log(), tokens[:, 1:])


@surprises.mistake(
    "the logarithm of zero",
    because="softmax gives probabilities, and a surprise is the logarithm of one; but "
    "below 1e-46 a probability is zero in float32. `log_softmax` never makes it",
)
def _(logits, tokens):
    return bits_of(logits[:, :-1].softmax(dim=-1).log(), tokens[:, 1:])


@surprises.mistake(
    "a number for every row",
    because="T rows came out, so T numbers seem due. The last row guesses a token that "
    "nobody has written yet",
)
def _(logits, tokens):
    return bits_of(logits.log_softmax(dim=-1), tokens.roll(-1, dims=1))


@chapter.implement(
    title="multiple choice",
    minutes=15,
    difficulty="moderate",
    section="What a text is worth",
    text="""
Tests with several choices are marked by score: the model reads the question once with
each ending, and the ending that it finds most probable is its answer. Write
`score_endings`. All texts begin with the same `prompt_length` tokens; text e is
`lengths[e]` tokens long in all, and what follows in its row is padding.
""",
    hints=(
        "First the log-probability of every token but the first. Which of them "
        "belong to the ending?",
        "Entry 0 is about token 1. So compare places from 1 to T - 1 with "
        "`prompt_length`, and with each row's own length; then sum what is left.",
    ),
    proves="The log-probability of each ending is complete: it begins with the "
    "ending's first token, ends with its last, and leaves out prompt and padding.",
    why="The ending with the largest sum is the choice. Adding logarithms instead of "
    "multiplying probabilities is no matter of taste: sixty factors are too small for "
    "float32.",
)
def score_endings(logits, ids, prompt_length, lengths):
    """(E, T, V), (E, T), an int, E ints -> (E,) log-probabilities of the endings."""
    guesses = logits[:, :-1].log_softmax(dim=-1)
    chosen = guesses.gather(-1, ids[:, 1:, None]).squeeze(-1)  # (E, T - 1)
    places = torch.arange(1, ids.shape[1])  # of the tokens that are guessed
    counts = (places >= prompt_length) & (places < torch.tensor(lengths)[:, None])
    return (chosen * counts).sum(dim=-1)


@score_endings.cases
def _(draw):
    for texts, tokens, words, prompt_length, lengths in (
        (2, 4, 2, 2, [4, 3]),
        (3, 6, 5, 3, [5, 4, 6]),
        (2, 70, 3, 1, [66, 70]),
    ):
        ids = draw.integers(0, words, texts, tokens)
        ids[:, :prompt_length] = ids[0, :prompt_length]
        for row, length in zip(ids, lengths, strict=True):
            row[length:] = 0
        yield 4 * draw.normal(texts, tokens, words), ids, prompt_length, lengths


score_endings.equivalent(
    "return (chosen * counts).sum(dim=+1)",
    because="of two axes, 1 and -1 are the same",
)


@score_endings.also("a loop over texts and tokens")
def _(logits, ids, prompt_length, lengths):
    totals = []
    for scores, text, length in zip(logits, ids, lengths, strict=True):
        total = torch.zeros(())
        for t in range(prompt_length, length):
            total = total + scores[t - 1].log_softmax(-1)[text[t]]
        totals.append(total)
    return torch.stack(totals)


@score_endings.also("cross entropy, pads ignored")
def _(logits, ids, prompt_length, lengths):
    totals = []
    for scores, text, length in zip(logits, ids, lengths, strict=True):
        ending = slice(prompt_length, length)
        before = slice(prompt_length - 1, length - 1)
        loss = torch.nn.functional.cross_entropy(
            scores[before], text[ending], reduction="sum"
        )
        totals.append(-loss)
    return torch.stack(totals)


def chosen_of(logits, ids):
    """Give the log-probability of each token but the first: (E, T - 1)."""
    guesses = logits[:, :-1].log_softmax(dim=-1)
    return guesses.gather(-1, ids[:, 1:, None]).squeeze(-1)


def ending_of(ids, prompt_length, lengths):
    """Say which tokens but the first belong to the endings: (E, T - 1)."""
    places = torch.arange(1, ids.shape[1])
    return (places >= prompt_length) & (places < torch.tensor(lengths)[:, None])


@score_endings.mistake(
    "row t for token t",
    because="row and token have the same index; but row t is the guess for token t + 1",
)
def _(logits, ids, prompt_length, lengths):
    chosen = logits.log_softmax(dim=-1).gather(-1, ids[..., None]).squeeze(-1)
    return (chosen[:, 1:] * ending_of(ids, prompt_length, lengths)).sum(dim=-1)


@score_endings.mistake(
    "padding counted",
    because="every row of a batch is as long as the longest, and the model gives "
    "scores for pads too",
)
def _(logits, ids, prompt_length, lengths):
    longest = [ids.shape[1]] * len(lengths)
    return (chosen_of(logits, ids) * ending_of(ids, prompt_length, longest)).sum(-1)


@score_endings.mistake(
    "the first row's length for the whole batch",
    because="the function was tried with one text, or with endings of the same length",
)
def _(logits, ids, prompt_length, lengths):
    first = [lengths[0]] * len(lengths)
    return (chosen_of(logits, ids) * ending_of(ids, prompt_length, first)).sum(-1)


@score_endings.mistake(
    "the ending's first token lost",
    because="the tokens of the ending are `[:, prompt_length:]`, but in the shifted "
    "log-probabilities they begin one place earlier",
)
def _(logits, ids, prompt_length, lengths):
    late = prompt_length + 1
    return (chosen_of(logits, ids) * ending_of(ids, late, lengths)).sum(-1)


@score_endings.mistake(
    "mean for sum",
    because="losses are means, and benchmarks also report scores per token. The "
    "probability of a text is a product, so its logarithm is a sum",
)
def _(logits, ids, prompt_length, lengths):
    counts = ending_of(ids, prompt_length, lengths)
    return (chosen_of(logits, ids) * counts).sum(-1) / counts.sum(-1)


@score_endings.mistake(
    "the prompt too",
    because="it adds the same to every text and changes no choice; still it is not "
    "part of the ending",
)
def _(logits, ids, prompt_length, lengths):
    return (chosen_of(logits, ids) * ending_of(ids, 0, lengths)).sum(-1)


@score_endings.mistake(
    "a product that is too small",
    because="the chain rule is a product, and the logarithm of a product is right on "
    "paper; in float32 a long text's product is zero",
)
def _(logits, ids, prompt_length, lengths):
    counts = ending_of(ids, prompt_length, lengths)
    return (chosen_of(logits, ids) * counts).exp().prod(-1).log()


chapter.explain(
    "rows_of_logits",
    title="who needs all those rows?",
    minutes=5,
    difficulty="easy",
    section="Only the past",
    text="""
SmolLM2 can read 8192 tokens at once. The logits of such a text have 8192 rows of 49152
scores: in float32 that is 1.6 GB, three times the model. You want the next word, and
nothing else. What may be left out?
""",
    hints=(
        "Which row is the guess for the word that comes next? Does it read other rows "
        "of the *logits*?",
        "Rows meet in attention, inside the blocks. The head at the end works on each "
        "row alone.",
    ),
    choices={
        "a": Choice(
            "Nothing: the last guess is built from the guesses before it.",
            "It is built from the *tokens* before it, through attention. No row of the "
            "logits is read by another: the head works on each row alone.",
        ),
        "b": Choice(
            "All rows but the last, in the head. The blocks still need every token.",
            "The head compares the last vector with all words, and 8191 rows are never "
            "made. The other tokens must still pass through the blocks, as their keys "
            "and values are read by the last one. Whoever scores a text, or trains, "
            "needs all the rows: $T$ tokens in one call are $T - 1$ lessons.",
        ),
        "c": Choice(
            "All tokens but the last, everywhere: only its row is used.",
            "Then the model would read one word, and guess what follows that word. The "
            "last row depends on all tokens, by the keys and values in every block.",
        ),
        "d": Choice(
            "All rows but the last, in the head; in training as well, where the last "
            "word is the lesson.",
            "For writing, yes. In training *every* row has a right answer, the token "
            "that came next: one call gives $T - 1$ lessons, not one.",
        ),
    },
    right="b",
)


@chapter.debug(
    title="always a hyphen",
    minutes=5,
    difficulty="easy",
    section="Writing",
    text="""
A colleague complains: "Whatever I ask, your model says a hyphen." Here is their loop,
with the smallest decoder there is: `table[ids]` are the logits of a text, a row for
each token. It should take the best word, append it and call again, up to
`max_new_tokens` times, and stop after `stop_id` has been written. Mend it.
""",
    hints=(
        "After which token of the text is this guess made?",
        "All their prompts begin with the same word, *The*. Which row has seen the "
        "whole text?",
    ),
    proves="Each new word is the best guess after the whole text so far, the stop word "
    "ends the text and stays in it, and a stop word in the prompt does not.",
    why="Row 0 is the guess after the *first* token. It has seen *The* and nothing "
    "else (causality), whatever comes later. The guess for what comes next is the "
    "last row.",
)
def write_greedily(table, ids, stop_id, max_new_tokens):
    """(V, V) logits by token, a list of ids, two ints -> the list of all ids."""
    written = list(ids)
    for _ in range(max_new_tokens):
        logits = table[written]  # (T, V)
        best = int(logits[-1].argmax())
        written.append(best)
        if best == stop_id:
            break
    return written


@write_greedily.broken(
    "the guess after the first word",
    because="index 0 was meant for the first text of the batch, as in `logits[0]` of a "
    "model that takes several; here the first axis holds the tokens",
    section="Only the past",
)
def _(table, ids, stop_id, max_new_tokens):
    written = list(ids)
    for _ in range(max_new_tokens):
        logits = table[written]  # (T, V)
        best = int(logits[0].argmax())
        written.append(best)
        if best == stop_id:
            break
    return written


@write_greedily.cases
def _(draw):
    for words, stop, most in (
        ((0, 1), 3, 2),
        ((0, 2), 3, 9),
        ((3, 1, 0), 3, 9),
        ((1, 4), 2, 3),
    ):
        order = draw.permutation(5)  # each word has one that follows it, in a circle
        table = draw.integers(0, 4, 5, 5).float()
        for word, after in zip(order, order[1:] + order[:1], strict=True):
            table[word, after] = 9
        prompt = [order[word] for word in words]
        yield table, prompt, order[stop], most
    yield torch.eye(2), [1], 0, 0


@write_greedily.also("the last word is enough")
def _(table, ids, stop_id, max_new_tokens):
    following = table.argmax(dim=-1).tolist()
    new = []
    while len(new) < max_new_tokens and stop_id not in new:
        new.append(following[([*ids, *new])[-1]])
    return ids + new


@write_greedily.also("tensors, as in the chapter")
def _(table, ids, stop_id, max_new_tokens):
    written = torch.tensor([ids])
    for _ in range(max_new_tokens):
        best = table[written][:, -1].argmax(dim=-1)
        written = torch.cat([written, best[:, None]], dim=1)
        if best == stop_id:
            break
    return written[0].tolist()


@write_greedily.mistake(
    "the prompt read again and again",
    because="the model is called on the same name every time; only a longer text gets "
    "another guess",
)
def _(table, ids, stop_id, max_new_tokens):
    written = list(ids)
    for _ in range(max_new_tokens):
        best = int(table[ids][-1].argmax())
        written.append(best)
        if best == stop_id:
            break
    return written


@write_greedily.mistake(
    "the stop word left out",
    because="a reader should not see it. But it is part of what was written, and the "
    "next turn of a chat needs it; the tokenizer drops it from the text",
    section="Asking",
)
def _(table, ids, stop_id, max_new_tokens):
    written = list(ids)
    for _ in range(max_new_tokens):
        best = int(table[written][-1].argmax())
        if best == stop_id:
            break
        written.append(best)
    return written


@write_greedily.mistake(
    "a stop word in the prompt ends it",
    because="`stop_id in written` is a short test; a chat's earlier turns end with the "
    "same token",
    section="Asking",
)
def _(table, ids, stop_id, max_new_tokens):
    written = list(ids)
    for _ in range(max_new_tokens):
        written.append(int(table[written][-1].argmax()))
        if stop_id in written:
            break
    return written


@write_greedily.mistake(
    "the limit counts the prompt",
    because="libraries have both limits, `max_length` for all tokens and "
    "`max_new_tokens` for those that are written",
)
def _(table, ids, stop_id, max_new_tokens):
    written = list(ids)
    while len(written) < max_new_tokens:
        best = int(table[written][-1].argmax())
        written.append(best)
        if best == stop_id:
            break
    return written


@write_greedily.mistake(
    "only what is new",
    because="an answer is what one wants to see; the task, like `generate`, gives back "
    "the whole text",
)
def _(table, ids, stop_id, max_new_tokens):
    new = []
    for _ in range(max_new_tokens):
        best = int(table[[*ids, *new]][-1].argmax())
        new.append(best)
        if best == stop_id:
            break
    return new


@write_greedily.mistake(
    "one word too many",
    because="the first new word is taken to belong to the reading of the prompt, and "
    "only the others to be counted",
)
def _(table, ids, stop_id, max_new_tokens):
    written = list(ids)
    for _ in range(max_new_tokens + 1):
        best = int(table[written][-1].argmax())
        written.append(best)
        if best == stop_id:
            break
    return written
