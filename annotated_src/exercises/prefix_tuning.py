"""Exercises on prefixes: the gate, the fold, the columns that are open to all."""

import math

import torch
from torch import nn
from torch.nn import functional

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.exercise import Choice
from annotated_src.masks import prefix_mask

chapter = Chapter("chatglm/06_prefix_tuning", "P-tuning v2")


@chapter.implement(
    title="the network thrown away",
    minutes=10,
    difficulty="easy",
    section="What it costs",
    text=r"""
Training with the projection is over. Fold it: make the table of a prefix *without*
projection that gives the same keys and values, so that the network can be thrown away.

You get the encoder's weights by name: `embedding.weight` $(P, D)$; `trans.0.weight`
$(D, D)$ and `trans.0.bias`; `trans.2.weight` $(2LD, D)$ and `trans.2.bias`. Between the
two layers stands a tanh, and in training a dropout of 0.1 follows the second.
""",
    hints=(
        "Which of these steps still depend on something once training is over?",
        "None: each row of the embedding goes through layer, tanh and layer once, and "
        "what comes out is stored. `nn.Linear` keeps a row for each *output*.",
    ),
    proves="The table holds what the projection would have computed, row by row.",
    why="The projection sees nothing but its own embedding, so its output never "
    "changes once training is over. Dropout is no part of the table.",
)
def fold_prefix(weights):
    """Give the table, (P, 2 * L * D), from a dictionary of the encoder's weights."""
    hidden = weights["embedding.weight"] @ weights["trans.0.weight"].mT
    hidden = torch.tanh(hidden + weights["trans.0.bias"])
    return hidden @ weights["trans.2.weight"].mT + weights["trans.2.bias"]


@fold_prefix.cases
def _(draw):
    for tokens, width, layers in ((1, 2, 1), (3, 4, 2), (5, 6, 3)):
        out = 2 * layers * width
        sizes = {
            "embedding.weight": (tokens, width),
            "trans.0.weight": (width, width),
            "trans.0.bias": (width,),
            "trans.2.weight": (out, width),
            "trans.2.bias": (out,),
        }
        yield ({name: draw.normal(*size) for name, size in sizes.items()},)


@fold_prefix.also("a loop over prefix tokens")
def _(weights):
    rows = []
    for row in weights["embedding.weight"]:
        hidden = (weights["trans.0.weight"] @ row + weights["trans.0.bias"]).tanh()
        rows.append(weights["trans.2.weight"] @ hidden + weights["trans.2.bias"])
    return torch.stack(rows)


@fold_prefix.also("torch.nn")
@torch.no_grad()
def _(weights):
    width, out = weights["embedding.weight"].shape[1], len(weights["trans.2.bias"])
    network = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out))
    network.load_state_dict(
        {
            name.removeprefix("trans."): w
            for name, w in weights.items()
            if name.startswith("trans.")
        }
    )
    return network(weights["embedding.weight"])


@fold_prefix.also("the package's encoder")
@torch.no_grad()
def _(weights):
    from annotated_src.prefix_tuning import PrefixEncoder

    count, width = weights["embedding.weight"].shape
    layers = len(weights["trans.2.bias"]) // (2 * width)
    encoder = PrefixEncoder(count, layers, 1, width, projection=True).eval()
    encoder.load_state_dict(weights)
    pairs = torch.stack(
        [torch.stack(pair) for pair in encoder(1)]
    )  # (L, 2, 1, 1, P, D)
    return pairs[:, :, 0, 0].permute(2, 0, 1, 3).flatten(1)


def wrong_fold(between=torch.tanh, first=functional.linear, biases=1.0, after=None):
    """Make a fold with another bend, product, biases, or something at the end."""

    def fold(weights):
        hidden = first(weights["embedding.weight"], weights["trans.0.weight"])
        hidden = between(hidden + biases * weights["trans.0.bias"])
        table = hidden @ weights["trans.2.weight"].mT + biases * weights["trans.2.bias"]
        return after(table) if after else table

    return fold


fold_prefix.mistake(
    "two matrices made one",
    because="folding two layers usually means to multiply their matrices; that is "
    "right where nothing bends between them",
)(wrong_fold(between=lambda x: x))
fold_prefix.mistake(
    "the matrix the other way round",
    because="the first matrix is square and fits both ways; `nn.Linear` keeps a row "
    "for each output, so it multiplies by the transpose",
)(wrong_fold(first=torch.matmul))
fold_prefix.mistake(
    "GELU for tanh",
    because="the model's own feed-forward network has a GELU between two layers, and "
    "even computes it with a tanh",
)(wrong_fold(between=functional.gelu))
fold_prefix.mistake(
    "tanh after the last layer too",
    because="a prefix seems to want bounded numbers; keys and values may be of any "
    "size",
)(wrong_fold(after=torch.tanh))
fold_prefix.mistake(
    "no biases",
    because="many projections in such models have none; these two do",
)(wrong_fold(biases=0.0))
fold_prefix.mistake(
    "dropout's share taken off",
    because="in the paper that introduced dropout one scales down when training is "
    "over; torch scales up while it trains, and leaves the rest alone",
    section="The ladder of equality",
)(wrong_fold(after=lambda table: 0.9 * table))


chapter.explain(
    "a_zero_prefix",
    title="a prefix of nothing",
    minutes=8,
    difficulty="moderate",
    section="A gate",
    text="""
A prefix of one token has a key of zeros and a value of zeros. What does it do to a head
that sees it? Write down the head's output first.
""",
    hints=(
        "The key is zero: what is its score? And the exponential of that?",
        r"$o = \lambda\, o_P + (1 - \lambda)\, o_T$ with $o_P = 0$. When is $\lambda$ "
        "near 0, when near 1?",
    ),
    choices={
        "a": Choice(
            "Nothing: it scores 0, and adds 0.",
            "It adds 0 above the fraction line, but $e^0 = 1$ below it. A score of 0 "
            r"is not the absence of a score; that would be $-\infty$.",
        ),
        "b": Choice(
            "It matters where some token scores high: it takes that token's weight "
            "away.",
            r"There it matters least. $\lambda = 1 / (1 + \sum_s e^{x_s})$ is near 0 "
            "as soon as one score is large.",
        ),
        "c": Choice(
            "It makes the output smaller, most of all where every token scores far "
            "below zero.",
            r"$o = (1 - \lambda)\, o_T$ with $\lambda = 1 / (1 + \sum_s e^{x_s})$. If "
            "some token scores high, nothing happens. If *all* score far below zero, "
            r"$\lambda$ is near 1 and the head hands over almost nothing.",
        ),
        "d": Choice(
            "It makes the head prefer tokens that score above zero to those below.",
            r"All tokens shrink by the same factor $1 - \lambda$, so their ratios "
            "stay. In one layer no prefix can make a head prefer another token.",
        ),
    },
    right="c",
    why="Without it, softmax weights always come to 1, even where no token deserves "
    "any. This prefix gives a head what the softmax denies it: to say *nothing of "
    "interest here*.",
)


@chapter.implement(
    title="how far the gate is open",
    minutes=6,
    difficulty="moderate",
    section="A gate",
    text=r"""
Write `prefix_gate`: the mass $\lambda$ of the prefix, from the scores of its columns
and those of the tokens. It must be right for scores near 1000, too; in float32 $e^{89}$
is infinite already. A token that is hidden has a score of $-\infty$.
""",
    hints=(
        "A softmax may take the same number off all its scores. Off which of these?",
        r"$\lambda = \sigma(\log\sum_P e^{x_i} - \log\sum_T e^{x_s})$, and torch has a "
        "function for the logarithm of a sum of exponentials.",
    ),
    proves="The gate is the prefix's share of the softmax, for scores of any size and "
    "any number of columns.",
    why="Each `logsumexp` takes off its own maximum and puts it back; the sigmoid sees "
    "the difference only.",
    atol=2e-4,  # near 1000 the numbers of float32 are 0.00006 apart
)
def prefix_gate(prefix_scores, token_scores):
    """(..., P), (..., S) -> (...), each between 0 and 1."""
    ahead = prefix_scores.logsumexp(dim=-1) - token_scores.logsumexp(dim=-1)
    return torch.sigmoid(ahead)


@prefix_gate.cases
def _(draw):
    yield torch.tensor([0.0, 2.0]), torch.tensor([0.0, 1.0, 0.0])
    yield torch.tensor([1000.0, 999.0]), torch.tensor([1001.0, 998.0, 1000.0])
    yield draw.normal(4) - 1000, draw.normal(3) - 1000
    yield 2 * draw.normal(2, 3, 5), 2 * draw.normal(2, 3, 7)
    loud, quiet = torch.tensor([1000.0, 0, 0]), torch.tensor([0.0, 1, 0])
    yield loud, quiet
    yield quiet, loud
    rows = torch.tensor([[1000.0, 999], [-1000, -999]])
    yield rows, rows.flip(1) + 1
    hidden = 2 * draw.normal(3, 4)
    hidden[:, 2:] = -torch.inf
    yield 2 * draw.normal(3, 4), hidden


@prefix_gate.also("one softmax over both")
def _(prefix_scores, token_scores):
    both = torch.cat((prefix_scores, token_scores), dim=-1).softmax(dim=-1)
    return both[..., : prefix_scores.shape[-1]].sum(dim=-1)


@prefix_gate.also("loops")
def _(prefix_scores, token_scores):
    gates = []
    rows = zip(
        prefix_scores.flatten(0, -2) if prefix_scores.ndim > 1 else [prefix_scores],
        token_scores.flatten(0, -2) if token_scores.ndim > 1 else [token_scores],
        strict=True,
    )
    for before, after in rows:
        top = max(*before.tolist(), *after.tolist())
        ours = sum(math.exp(x - top) for x in before.tolist())
        others = sum(math.exp(x - top) for x in after.tolist())
        gates.append(ours / (ours + others))
    return torch.tensor(gates).reshape(prefix_scores.shape[:-1])


@prefix_gate.also("logaddexp")
def _(prefix_scores, token_scores):
    ours, others = (x.logsumexp(-1) for x in (prefix_scores, token_scores))
    return (ours - torch.logaddexp(ours, others)).exp()


@prefix_gate.mistake(
    "the fraction as it is written",
    because="on paper it is right; in float32 the exponentials of such scores are "
    "infinite or zero, and their quotient is NaN",
)
def _(prefix_scores, token_scores):
    ours, others = (x.exp().sum(-1) for x in (prefix_scores, token_scores))
    return ours / (ours + others)


@prefix_gate.mistake(
    "each group by its own maximum",
    because="a softmax may take off its maximum; but here two sums are compared, and "
    "each has lost another factor",
)
def _(prefix_scores, token_scores):
    ours, others = (
        (x - x.amax(-1, keepdim=True)).exp().sum(-1)
        for x in (prefix_scores, token_scores)
    )
    return ours / (ours + others)


@prefix_gate.mistake(
    "the tokens' maximum for both",
    because="a softmax may take the same number off all its scores, on paper any; only "
    "the largest of *all* keeps every exponential finite",
)
def _(prefix_scores, token_scores):
    top = token_scores.amax(-1, keepdim=True)
    ours, others = ((x - top).exp().sum(-1) for x in (prefix_scores, token_scores))
    return ours / (ours + others)


@prefix_gate.mistake(
    "one maximum for all rows",
    because="it is the same number for all scores, so it cancels; but a row far below "
    "the loudest one has only zeros left",
)
def _(prefix_scores, token_scores):
    top = max(prefix_scores.max(), token_scores.max())
    ours, others = ((x - top).exp().sum(-1) for x in (prefix_scores, token_scores))
    return ours / (ours + others)


@prefix_gate.mistake(
    "the tokens' share",
    because="the sigmoid of the difference the other way round is a share too: "
    "1 - lambda, which the tokens keep",
)
def _(prefix_scores, token_scores):
    return torch.sigmoid(token_scores.logsumexp(-1) - prefix_scores.logsumexp(-1))


@prefix_gate.mistake(
    "the best against the best",
    because="a softmax is pictured as picking the largest score; many small ones "
    "weigh as much as one that is larger",
)
def _(prefix_scores, token_scores):
    return torch.sigmoid(prefix_scores.amax(-1) - token_scores.amax(-1))


@prefix_gate.mistake(
    "means for sums",
    because="groups of different sizes look as if they had to be made equal; in a "
    "softmax every column counts, so a longer prefix weighs more",
)
def _(prefix_scores, token_scores):
    ours, others = (
        x.logsumexp(-1) - math.log(x.shape[-1]) for x in (prefix_scores, token_scores)
    )
    return torch.sigmoid(ours - others)


@prefix_gate.mistake(
    "the logarithm cancelled with the exponential",
    because="log and exp undo each other, but not with a sum between them",
)
def _(prefix_scores, token_scores):
    return torch.sigmoid(prefix_scores.sum(-1) - token_scores.sum(-1))


@chapter.debug(
    title="which columns are open",
    minutes=10,
    difficulty="moderate",
    section="The annotated source",
    text="""
Attention with a prefix that all rows of the batch share. `mask` is for the tokens, True
where one is visible; the prefix is to be visible to every token. As long as the mask
hides nothing, all is right. Then one text got an answer, and it goes wrong. Mend it.
""",
    hints=(
        "Look at one row of `visible`, for two prefix columns and three tokens. Which "
        "columns of the keys do its entries belong to?",
        "`pad` takes the pair (before, behind) for the last axis. Where does the "
        "prefix stand among the keys?",
    ),
    proves="Each token sees the whole prefix and of the tokens those of its own mask, "
    "in every row of the batch.",
    why="What stands first among the keys stands first in the mask's columns. No shape "
    "shows the mistake: there are as many columns on either side.",
)
def attend_behind_prefix(queries, keys, values, mask, prefix_keys, prefix_values):
    """(B, N, T, H) thrice, (B, 1, T, T), (N, P, H) twice -> (B, N, T, H)."""
    batch, length = len(queries), prefix_keys.shape[1]
    keys = torch.cat((prefix_keys.expand(batch, -1, -1, -1), keys), dim=2)
    values = torch.cat((prefix_values.expand(batch, -1, -1, -1), values), dim=2)
    scores = queries @ keys.mT / math.sqrt(queries.shape[-1])  # (B, N, T, P + T)
    visible = functional.pad(mask, (length, 0), value=True)
    return scores.masked_fill(~visible, -torch.inf).softmax(dim=-1) @ values


@attend_behind_prefix.broken(
    "the open columns behind the tokens",
    because="what is new is appended, and the shape is the same on either side; `pad` "
    "takes (before, behind), and the prefix stands before",
)
def _(queries, keys, values, mask, prefix_keys, prefix_values):
    batch, length = len(queries), prefix_keys.shape[1]
    keys = torch.cat((prefix_keys.expand(batch, -1, -1, -1), keys), dim=2)
    values = torch.cat((prefix_values.expand(batch, -1, -1, -1), values), dim=2)
    scores = queries @ keys.mT / math.sqrt(queries.shape[-1])  # (B, N, T, P + T)
    visible = functional.pad(mask, (0, length), value=True)
    return scores.masked_fill(~visible, -torch.inf).softmax(dim=-1) @ values


@attend_behind_prefix.cases
def _(draw):
    for batch, heads, tokens, length, width in (
        (1, 1, 2, 1, 1),
        (2, 1, 2, 1, 1),
        (1, 2, 3, 2, 4),
        (2, 2, 5, 3, 4),
    ):
        q, k, v = 2 * draw.normal(3, batch, heads, tokens, width)
        prefix_keys, prefix_values = 2 * draw.normal(2, heads, length, width)
        # context lengths 2, 3, … or, of two tokens, 1 and 2
        contexts = torch.arange(batch) + min(tokens - 1, 2)
        mask = prefix_mask(contexts, tokens)
        yield q, k, v, mask, prefix_keys, prefix_values
    q, k, v = draw.normal(3, 2, 2, 3, 4)
    open_mask = torch.ones(2, 1, 3, 3, dtype=torch.bool)
    yield q, k, v, open_mask, *draw.normal(2, 2, 2, 4)


@attend_behind_prefix.also("the gate")
def _(queries, keys, values, mask, prefix_keys, prefix_values):
    width = math.sqrt(queries.shape[-1])
    before = queries @ prefix_keys.mT / width
    after = (queries @ keys.mT / width).masked_fill(~mask, -torch.inf)
    ahead = before.logsumexp(-1, keepdim=True) - after.logsumexp(-1, keepdim=True)
    gate = torch.sigmoid(ahead)
    alone = after.softmax(-1) @ values
    return gate * (before.softmax(-1) @ prefix_values) + (1 - gate) * alone


@attend_behind_prefix.also("loops")
def _(queries, keys, values, mask, prefix_keys, prefix_values):
    out = torch.zeros_like(queries)
    for b, n, t in torch.cartesian_prod(*map(torch.arange, queries.shape[:3])).tolist():
        seen = mask[b, 0, t]
        k = torch.cat((prefix_keys[n], keys[b, n][seen]))
        v = torch.cat((prefix_values[n], values[b, n][seen]))
        weights = (k @ queries[b, n, t] / queries.shape[-1] ** 0.5).softmax(0)
        out[b, n, t] = weights @ v
    return out


@attend_behind_prefix.also("torch.nn.functional")
def _(queries, keys, values, mask, prefix_keys, prefix_values):
    batch, tokens = len(queries), queries.shape[2]
    keys = torch.cat((prefix_keys[None].repeat(batch, 1, 1, 1), keys), dim=2)
    values = torch.cat((prefix_values[None].repeat(batch, 1, 1, 1), values), dim=2)
    opened = torch.ones(batch, 1, tokens, prefix_keys.shape[1], dtype=torch.bool)
    mask = torch.cat((opened, mask), dim=-1)
    return functional.scaled_dot_product_attention(queries, keys, values, mask)


def wrong_columns(columns, order=(0, 1)):
    """Make an attention with other columns open, or values in another order."""

    def attend(queries, keys, values, mask, prefix_keys, prefix_values):
        batch = len(queries)
        keys = torch.cat((prefix_keys.expand(batch, -1, -1, -1), keys), dim=2)
        parts = (prefix_values.expand(batch, -1, -1, -1), values)
        values = torch.cat([parts[i] for i in order], dim=2)
        scores = queries @ keys.mT / math.sqrt(queries.shape[-1])
        visible = columns(mask, prefix_keys.shape[1])
        return scores.masked_fill(~visible, -torch.inf).softmax(dim=-1) @ values

    return attend


def opened(mask, length):
    """Put columns that are open to all before those of a mask."""
    return functional.pad(mask, (length, 0), value=True)


attend_behind_prefix.mistake(
    "a prefix that nobody sees",
    because="in the original's masks a False is visible; here it is hidden, and the "
    "model answers as if it had no prefix",
)(wrong_columns(lambda mask, length: functional.pad(mask, (length, 0), value=False)))
attend_behind_prefix.mistake(
    "a triangle over everything",
    because="`tril` of a table with T rows and P + T columns looks causal; it begins "
    "in the corner, so that the first token sees one column of the prefix and not "
    "itself",
)(wrong_columns(lambda mask, length: torch.ones_like(opened(mask, length)).tril()))
attend_behind_prefix.mistake(
    "a causal mask in place of the given one",
    because="a decoder is causal; but in ChatGLM the context sees all of itself",
)(
    wrong_columns(
        lambda mask, length: torch.ones_like(opened(mask, length)).tril(length)
    )
)
attend_behind_prefix.mistake(
    "the first row's mask for all",
    because="the prefix is one for all rows, so its mask seems to be, too; but each "
    "text has its own context",
)(wrong_columns(lambda mask, length: opened(mask[:1], length)))
attend_behind_prefix.mistake(
    "no mask at all",
    because="with one new token nothing is hidden, and the test was a decode step",
)(wrong_columns(lambda mask, length: torch.ones_like(opened(mask, length))))
attend_behind_prefix.mistake(
    "keys before, values behind",
    because="the two lines are written at different times, and no shape tells",
    section="Where does a prefix stand?",
)(wrong_columns(opened, order=(1, 0)))


@attend_behind_prefix.mistake(
    "a softmax for each",
    because="the prefix is thought of as something added to what the frozen head "
    "gives; the two share one softmax, and what the prefix gets the tokens lose",
    section="A gate",
)
def _(queries, keys, values, mask, prefix_keys, prefix_values):
    width = math.sqrt(queries.shape[-1])
    before = (queries @ prefix_keys.mT / width).softmax(dim=-1) @ prefix_values
    scores = (queries @ keys.mT / width).masked_fill(~mask, -torch.inf)
    return before + scores.softmax(dim=-1) @ values
