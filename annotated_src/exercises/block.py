"""Exercises on ChatGLM's block: norms on the stream, alpha, and the fused matrix."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.exercise import Choice

chapter = Chapter("chatglm/05_block", "The block")


@chapter.implement(
    title="a stack of sublayers",
    minutes=10,
    difficulty="moderate",
    section="The block as plain loops",
    text="""
Write ChatGLM's stack, without looking it up. A branch is a matrix: $f(n) = W n$. Before
each there is a LayerNorm with a gain and a bias, and $\\epsilon = 10^{-5}$. `alpha` is
that of ChatGLM-6B, however many sublayers there are.
""",
    hints=(
        "Two things are made of the normed vector. And of the vector that came in?",
        r"$x \leftarrow \alpha\, n + f(n)$ with $n = \operatorname{LN}(x)$ and "
        r"$\alpha = \sqrt{2 \cdot 28}$.",
    ),
    proves="The norm stands on the stream, before the fork; alpha multiplies what is "
    "normed and is the same at every depth; and the norm is a LayerNorm.",
    why="The vector that came in is read once, by the norm, and never again. With a "
    "normed input a test of one sublayer cannot see whether `alpha` multiplies $x$ or "
    "$n$: a fresh norm of a normed vector is that vector.",
)
def deep_norm_stack(x, gains, biases, matrices):
    """Stream (T, D), gains and biases (K, D), matrices (K, D, D) -> (T, D)."""
    alpha = math.sqrt(2 * 28)
    for gain, bias, matrix in zip(gains, biases, matrices, strict=True):
        n = F.layer_norm(x, x.shape[-1:], gain, bias, eps=1e-5)
        x = alpha * n + n @ matrix.T
    return x


@deep_norm_stack.cases
def _(draw):
    backwards = torch.tensor([[[0.0, 1], [1, 0]]])
    for x in (torch.tensor([[1.0, 3]]), torch.tensor([[0.001, 0.003]])):
        yield x, torch.ones(1, 2), torch.zeros(1, 2), backwards
    for tokens, depth, width, size in ((2, 2, 3, 4.0), (3, 6, 5, 0.01), (4, 3, 8, 9.0)):
        x = size * (draw.normal(tokens, width) + 1)
        gains = draw.uniform(depth, width, low=0.5, high=2.0)
        biases = draw.normal(depth, width)
        yield x, gains, biases, draw.normal(depth, width, width)


deep_norm_stack.equivalent(
    "n = F.layer_norm(x, x.shape[+1:], gain, bias, eps=1e-5)",
    because="of two axes, 1 and -1 are the same",
)
deep_norm_stack.equivalent(
    "for gain, bias, matrix in zip(gains, biases, matrices, strict=False):",
    because="there are as many gains as biases and matrices",
)


@deep_norm_stack.also("loops")
def _(x, gains, biases, matrices):
    stream = x.tolist()
    for gain, bias, matrix in zip(
        gains.tolist(), biases.tolist(), matrices.tolist(), strict=True
    ):
        for t, vector in enumerate(stream):
            mean = sum(vector) / len(vector)
            spread = sum((v - mean) ** 2 for v in vector) / len(vector)
            unit = [(v - mean) / math.sqrt(spread + 1e-5) for v in vector]
            n = [g * u + b for g, u, b in zip(gain, unit, bias, strict=True)]
            branch = [sum(w * v for w, v in zip(row, n, strict=True)) for row in matrix]
            stream[t] = [56**0.5 * a + b for a, b in zip(n, branch, strict=True)]
    return torch.tensor(stream)


@deep_norm_stack.also("torch.nn")
def _(x, gains, biases, matrices):
    width = x.shape[-1]
    for k in range(len(gains)):
        norm, branch = nn.LayerNorm(width), nn.Linear(width, width, bias=False)
        norm.load_state_dict({"weight": gains[k], "bias": biases[k]})
        branch.load_state_dict({"weight": matrices[k]})
        with torch.no_grad():
            n = norm(x)
            x = n * math.sqrt(56) + branch(n)
    return x


@deep_norm_stack.also("alpha in the matrix")
def _(x, gains, biases, matrices):
    for gain, bias, matrix in zip(gains, biases, matrices, strict=True):
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        n = centred * (variance + 1e-5).rsqrt() * gain + bias
        x = torch.einsum("ij,tj->ti", matrix + 56**0.5 * torch.eye(len(gain)), n)
    return x


def layer_norm(x, gain, bias):
    """Norm as ChatGLM does."""
    return F.layer_norm(x, x.shape[-1:], gain, bias, eps=1e-5)


def wrong_stack(step, alpha=lambda depth: math.sqrt(56)):
    """Make a stack of steps(x, norm, branch, alpha)."""

    def stack(x, gains, biases, matrices):
        for gain, bias, matrix in zip(gains, biases, matrices, strict=True):

            def norm(x, gain=gain, bias=bias):
                return layer_norm(x, gain, bias)

            def branch(n, matrix=matrix):
                return n @ matrix.T

            x = step(x, norm, branch, alpha(len(gains)))
        return x

    return stack


def right_step(x, norm, branch, alpha):
    """Take a sublayer's step as ChatGLM does."""
    return alpha * norm(x) + branch(norm(x))


deep_norm_stack.mistake(
    "alpha on what came in",
    because="a residual connection adds the input of the *sublayer*. Here it adds the "
    "normed vector; else the stream grows 7.5 times with each sublayer",
    section="One swap away from Llama",
)(wrong_stack(lambda x, norm, branch, alpha: alpha * x + branch(norm(x))))
deep_norm_stack.mistake(
    "Llama's sublayer",
    because="the norm comes first in both files, so both look pre-norm",
    section="One swap away from Llama",
)(wrong_stack(lambda x, norm, branch, alpha: x + branch(norm(x))))
deep_norm_stack.mistake(
    "the norm behind the sum",
    because="ChatGLM is said to be post-norm, and DeepNorm is written so. It is the "
    "same program, cut one norm later; a stack of it begins elsewhere",
    section="One swap away from Llama",
)(wrong_stack(lambda x, norm, branch, alpha: norm(alpha * x + branch(x))))
deep_norm_stack.mistake(
    "alpha on the branch",
    because="what is new seems to be what is scaled. Alpha says how loud the *past* is",
    section="What alpha keeps",
)(wrong_stack(lambda x, norm, branch, alpha: norm(x) + alpha * branch(norm(x))))
deep_norm_stack.mistake(
    "no alpha",
    because="a residual is a plain sum, and nothing breaks without it",
    section="What alpha keeps",
)(wrong_stack(right_step, lambda depth: 1.0))
deep_norm_stack.mistake(
    "alpha from the depth at hand",
    because="the formula is the root of 2N. The original computes it from a 28 that is "
    "always there, whatever the depth",
    section="The ladder of equality",
)(wrong_stack(right_step, math.sqrt))
deep_norm_stack.mistake(
    "the paper's alpha",
    because="DeepNorm's paper has the fourth root for a decoder. ChatGLM-6B takes "
    "GLM-130B's, which is the square root",
    section="The ladder of equality",
)(wrong_stack(right_step, lambda depth: 56**0.25))
deep_norm_stack.mistake(
    "the branch reads the stream",
    because="the norm seems to belong to the residual, as alpha does",
    section="One swap away from Llama",
)(wrong_stack(lambda x, norm, branch, alpha: alpha * norm(x) + branch(x)))


@deep_norm_stack.mistake(
    "RMSNorm",
    because="Llama's norm takes no mean off and has no bias; ChatGLM's does and has",
)
def _(x, gains, biases, matrices):
    for gain, bias, matrix in zip(gains, biases, matrices, strict=True):
        n = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * gain + bias
        x = math.sqrt(56) * n + n @ matrix.T
    return x


@deep_norm_stack.mistake(
    "one feature fewer in the variance",
    because="`var` divides by D - 1 unless told otherwise; a norm divides by D",
)
def _(x, gains, biases, matrices):
    for gain, bias, matrix in zip(gains, biases, matrices, strict=True):
        unit = (x - x.mean(-1, keepdim=True)) * (x.var(-1, keepdim=True) + 1e-5).rsqrt()
        n = unit * gain + bias
        x = math.sqrt(56) * n + n @ matrix.T
    return x


@deep_norm_stack.mistake(
    "epsilon outside the root",
    because="it is there so that nothing is divided by zero, and either place does "
    "that. Where a vector is short they are not alike",
)
def _(x, gains, biases, matrices):
    for gain, bias, matrix in zip(gains, biases, matrices, strict=True):
        spread = x.std(-1, keepdim=True, correction=0)
        n = (x - x.mean(-1, keepdim=True)) / (spread + 1e-5) * gain + bias
        x = math.sqrt(56) * n + n @ matrix.T
    return x


@deep_norm_stack.mistake(
    "the matrix the other way round",
    because="$W n$ is written for one vector, a column. Tokens are rows, and for rows "
    "it is the transpose that stands on the right",
    section="One swap away from Llama",
)
def _(x, gains, biases, matrices):
    for gain, bias, matrix in zip(gains, biases, matrices, strict=True):
        n = layer_norm(x, gain, bias)
        x = math.sqrt(56) * n + n @ matrix
    return x


def run_plainly(weights, *_):
    """Run a block with these weights and with alpha 1 on five tokens: (1, 5, D)."""
    from annotated_src.models.chatglm import ChatGLMBlock, ChatGLMConfig
    from annotated_src.positions import BlankIds

    width = weights["attention_norm.weight"].shape[-1]
    config = ChatGLMConfig(
        vocab_size=4,
        num_layers=1,
        embed_dim=width,
        num_heads=1 if width % 2 else 2,
        ffn_dim=len(weights["ffn.up_proj.bias"]),
        max_seq_len=8,
        norm_eps=1e-5,
        blank_ids=BlankIds(sop=1, gmask=2, mask=3),
    )
    block = ChatGLMBlock(config, layer=1).requires_grad_(False)
    block.load_state_dict(weights)
    x = torch.randn(1, 5, width, generator=torch.Generator().manual_seed(0))
    n = block.attention_norm(x)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    x = n + block.attention(n, nn.Identity(), mask)
    n = block.ffn_norm(x)
    return n + block.ffn(n)


@chapter.implement(
    title="get rid of alpha",
    minutes=12,
    difficulty="hard",
    section="What alpha keeps",
    text="""
Change the weights of a block so that, run with $\\alpha = 1$, it computes the same.
Its weights and biases are named `attention_norm`, `attention.qkv_proj`,
`attention.out_proj`, `ffn_norm`, `ffn.up_proj` and `ffn.down_proj`, each with `.weight`
and `.bias`. The check runs a block with your weights and shows what comes out.
""",
    hints=(
        "Which two numbers of a LayerNorm could say $\\alpha\\, n$ instead of $n$? And "
        "who reads $n$, and wants it as it was?",
        "Gain and bias times alpha. The first matrix of each branch divides by alpha "
        "again, its bias does not.",
    ),
    proves="The block's output is the same, for several sizes and alphas.",
    atol=1e-4,
    rtol=1e-3,
    observe=run_plainly,
    why="Let the norm say $\\alpha\\, n$, and let the first matrix of each branch "
    "divide by $\\alpha$ again. So alpha adds nothing to what the model can compute. "
    "It decides where training starts and how far a step goes, and a checkpoint must "
    "be run with the alpha of its training.",
)
def without_alpha(weights, alpha):
    """Weights by name, and the alpha they were trained with -> weights for alpha 1."""
    folded = dict(weights)
    for norm in ("attention_norm", "ffn_norm"):
        for kind in ("weight", "bias"):
            folded[f"{norm}.{kind}"] = weights[f"{norm}.{kind}"] * alpha
    for first in ("attention.qkv_proj", "ffn.up_proj"):
        folded[f"{first}.weight"] = weights[f"{first}.weight"] / alpha
    return folded


@without_alpha.cases
def _(draw):
    for width, ffn, alpha in ((3, 2, 2.0), (4, 3, 56**0.5), (6, 10, 10.0)):
        shapes = {
            "attention_norm": (width,),
            "attention.qkv_proj": (3 * width, width),
            "attention.out_proj": (width, width),
            "ffn_norm": (width,),
            "ffn.up_proj": (ffn, width),
            "ffn.down_proj": (width, ffn),
        }
        weights = {}
        for name, shape in shapes.items():
            weights[f"{name}.weight"] = draw.normal(*shape)
            weights[f"{name}.bias"] = draw.normal(shape[0])
        for norm in ("attention_norm", "ffn_norm"):
            weights[f"{norm}.weight"] = draw.uniform(width, low=0.5, high=2.0)
        yield weights, alpha


def scaled(weights, factors):
    """Multiply tensors, found by their names, by numbers."""
    return {name: factors.get(name, 1.0) * value for name, value in weights.items()}


NORMS = ("attention_norm", "ffn_norm")
FIRST = ("attention.qkv_proj", "ffn.up_proj")
LAST = ("attention.out_proj", "ffn.down_proj")
BOTH = ("weight", "bias")


def factors_of(modules, kinds, factor):
    """Name tensors, each with a factor."""
    return {f"{module}.{kind}": factor for module in modules for kind in kinds}


@without_alpha.also("a table of factors")
def _(weights, alpha):
    norms = factors_of(NORMS, BOTH, alpha)
    return scaled(weights, norms | factors_of(FIRST, ["weight"], 1 / alpha))


@without_alpha.also("a quieter branch, whose scale the second norm forgets")
def _(weights, alpha):
    new = {name: value.clone() for name, value in weights.items()}
    new["attention.out_proj.weight"] /= alpha
    new["attention.out_proj.bias"] /= alpha
    new["ffn_norm.weight"] *= alpha
    new["ffn_norm.bias"] *= alpha
    new["ffn.up_proj.weight"] /= alpha
    return new


def wrong_fold(*parts):
    """Make a fold of (modules, kinds, power of alpha)."""

    def fold(weights, alpha):
        factors = {}
        for modules, kinds, power in parts:
            factors |= factors_of(modules, kinds, alpha**power)
        return scaled(weights, factors)

    return fold


without_alpha.mistake(
    "the gain without the bias",
    because="a gain is what scales. But the norm says gain times unit plus bias, and "
    "all of it was multiplied",
)(wrong_fold((NORMS, ["weight"], 1), (FIRST, ["weight"], -1)))
without_alpha.mistake(
    "the branch hears it louder",
    because="what is added is right then. The branch reads the same vector, and has "
    "not asked for alpha",
    section="One swap away from Llama",
)(wrong_fold((NORMS, BOTH, 1)))
without_alpha.mistake(
    "the first matrix's bias divided, too",
    because="a Linear is divided as a whole. But only the weight meets what was "
    "multiplied",
    section="The GLU that has no gate",
)(wrong_fold((NORMS, BOTH, 1), (FIRST, BOTH, -1)))
without_alpha.mistake(
    "the last matrix divided for the first",
    because="in a chain of matrices a factor may stand anywhere. A softmax and a GELU "
    "stand between these",
    section="The GLU that has no gate",
)(wrong_fold((NORMS, BOTH, 1), (LAST, ["weight"], -1)))
without_alpha.mistake(
    "both branches quieter",
    because="the next norm forgets the scale, so a whole model would not notice. What "
    "this block hands on is alpha times too short",
    section="What the block forgets",
)(wrong_fold((LAST, BOTH, -1)))
without_alpha.mistake(
    "attention's half alone",
    because="a block is taken for one sublayer, and it has two",
)(wrong_fold((NORMS[:1], BOTH, 1), (FIRST[:1], ["weight"], -1)))
without_alpha.mistake(
    "divided for multiplied",
    because="alpha is taken out, so something is divided. It goes from the sum *into* "
    "the norm",
)(wrong_fold((NORMS, BOTH, -1), (FIRST, ["weight"], 1)))


chapter.explain(
    "alpha_and_depth",
    title="one alpha for every depth",
    minutes=8,
    difficulty="moderate",
    section="What alpha keeps",
    text="""
With unit branches, $\\alpha = \\sqrt{2N}$ leaves $1/e$ of the embedding after $N$
blocks. The file has $\\sqrt{56}$ whatever the depth. What does that leave in a model of
3 blocks, and in one of 280?
""",
    hints=(
        "Each sublayer keeps the same share. How many sublayers are there?",
        r"$(1 + 1/\alpha^2)^{-2N}$, with $\alpha^2 = 56$ and $2N = 6$, then 560.",
    ),
    choices={
        "a": Choice(
            "1/e in both: that is what this alpha is made for.",
            "It is made for 56 sublayers. The share of one sublayer is fixed, "
            "$56/57$, and it is the number of sublayers that changes.",
        ),
        "b": Choice(
            "Next to nothing of it in 3 blocks, 90% in 280.",
            "The other way round: each further sublayer multiplies the embedding's "
            "share by $56/57$ once more.",
        ),
        "c": Choice(
            "90% in 3 blocks, one part in 20,000 in 280.",
            "$(1 + 1/56)^{-6}$ is 90%: a small model that mostly repeats its "
            "embedding. $(1 + 1/56)^{-560}$ is one part in 20,000.",
        ),
        "d": Choice(
            "Nearly all in both: 7.5 is far louder than a branch.",
            "Squared lengths are what add up: a sublayer takes one part in 57. That is "
            "little, once. 560 times it is nearly everything.",
        ),
    },
    right="c",
    why=r"""
The logarithm of the share is $-2N \ln(1 + \alpha^{-2})$, about $-2N/\alpha^2$ when
$\alpha$ is large. For $\alpha = (2N)^{1/4}$ that is $-\sqrt{2N}$: the share goes to
zero, though far more slowly than the $2^{-2N}$ of $\alpha = 1$. For $\alpha = 2N$ it is
$-1/(2N)$: all of the embedding is left, and the branches hardly count. Only $\alpha^2$
proportional to $N$ keeps a share that is neither.
""",
)


@chapter.debug(
    title="three big pieces",
    minutes=8,
    difficulty="moderate",
    section="One matrix, head by head",
    text="""
ChatGLM's fused features are cut into queries, keys and values. Everything loads, every
shape fits, a test with one head passes, and the model talks nonsense. Mend it.
""",
    hints=(
        "In which order do the rows of the fused matrix lie? Try two heads of width "
        "2, and the numbers 0 to 11.",
        "Head by head: queries, keys and values of head 0, then those of head 1. Which "
        "axis comes out of the features first?",
    ),
    proves="Each head gets its own queries, keys and values, and each token keeps its "
    "features, for several numbers of heads.",
    why="The features lie head by head, so the axis of heads is cut first and the "
    "three roles inside it. With one head both cuts are the same.",
)
def split_fused(fused, num_heads):
    """(B, T, 3 * N * H) of one matrix -> queries, keys, values, each (B, N, T, H)."""
    cut = fused.unflatten(-1, (num_heads, 3, -1))
    roles = cut.unbind(dim=-2)
    return [role.transpose(1, 2) for role in roles]


@split_fused.broken(
    "three big pieces",
    because="`nn.MultiheadAttention` stores all queries, then all keys, then all "
    "values, and so do many fused checkpoints",
)
def _(fused, num_heads):
    cut = fused.unflatten(-1, (3, num_heads, -1))
    roles = cut.unbind(dim=-3)
    return [role.transpose(1, 2) for role in roles]


@split_fused.mistake(
    "a view for a transpose",
    because="the shape wanted is (B, N, T, ...), and a view makes any shape. It does "
    "not move numbers: tokens end up in pieces",
)
def _(fused, num_heads):
    batch, tokens, _ = fused.shape
    return list(fused.reshape(batch, num_heads, tokens, -1).chunk(3, dim=-1))


@split_fused.mistake(
    "every third feature",
    because="three roles, so every third number. They lie in runs, one after the other",
)
def _(fused, num_heads):
    cut = fused.unflatten(-1, (num_heads, -1, 3))
    return [role.transpose(1, 2) for role in cut.unbind(dim=-1)]


@split_fused.mistake(
    "heads behind the tokens",
    because="the original's heads stand there, and many libraries' do. Here they come "
    "before the tokens",
)
def _(fused, num_heads):
    return list(fused.unflatten(-1, (num_heads, 3, -1)).unbind(dim=-2))


@split_fused.mistake(
    "number and width of heads swapped",
    because="both are small whole numbers whose product is D, and where they are equal "
    "nothing shows",
)
def _(fused, num_heads):
    cut = fused.unflatten(-1, (-1, 3, num_heads))
    return [role.transpose(1, 2) for role in cut.unbind(dim=-2)]


@split_fused.mistake(
    "tokens before the batch",
    because="the original's tensors are sequence first: (T, B, features)",
    section="The ladder of equality",
)
def _(fused, num_heads):
    cut = fused.unflatten(-1, (num_heads, 3, -1))
    return [role.permute(1, 2, 0, 3) for role in cut.unbind(dim=-2)]


@split_fused.mistake(
    "queries and keys swapped",
    because="a score is symmetric in the two, until a causal mask and positions say "
    "who looks at whom",
)
def _(fused, num_heads):
    cut = fused.unflatten(-1, (num_heads, 3, -1)).transpose(1, 2)
    return [cut[..., role, :] for role in (1, 0, 2)]


@split_fused.cases
def _(draw):
    yield torch.arange(12.0).view(1, 1, 12), 2
    yield torch.arange(24.0).view(1, 2, 12), 2
    yield torch.arange(24.0).view(1, 1, 24), 2
    for batch, tokens, heads, width in ((2, 3, 4, 2), (3, 2, 1, 6), (2, 2, 3, 3)):
        yield draw.normal(batch, tokens, 3 * heads * width), heads


@split_fused.also("heads first, then thirds")
def _(fused, num_heads):
    by_head = fused.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    return by_head.chunk(3, dim=-1)


@split_fused.also("slices")
def _(fused, num_heads):
    width = fused.shape[-1] // (3 * num_heads)
    roles = []
    for role in range(3):
        starts = [(3 * head + role) * width for head in range(num_heads)]
        heads = [fused[..., start : start + width] for start in starts]
        roles.append(torch.stack(heads, dim=1))
    return roles
