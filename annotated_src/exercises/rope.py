"""Exercises on rotary position embedding."""

import math

import torch

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.exercise import Choice

chapter = Chapter("llama/04_rope", "RoPE, derived")


@chapter.implement(
    title="turning queries",
    minutes=15,
    difficulty="moderate",
    section="The annotated source",
    text=r"""
Write `apply_rope`, without looking it up, in the half-split layout of Hugging Face's
Llama: of a head's $d$ features, feature $i$ and feature $i + d/2$ form a pair, which
turns by $m\theta_i$ at position $m$, with $\theta_i = \text{base}^{-2i/d}$. Each text
of the batch has positions of its own. The result has the dtype of `x`.
""",
    hints=(
        "First the angles: positions times frequencies, with an axis of size 1 for the "
        "heads. In which dtype?",
        r"$(a, b)$ turned by $\alpha$ is $(a\cos\alpha - b\sin\alpha,\; b\cos\alpha "
        r"+ a\sin\alpha)$. Here $a$ is the first half of the features, and $b$ the "
        r"second.",
    ),
    proves="Every pair of every token turns by its own position times its own "
    "frequency, forwards, for any positions and base, and half precision has exact "
    "angles.",
    atol=5e-3,
    rtol=5e-3,
)
def apply_rope(x, positions, base):
    """(B, N, T, H), positions (B, T), a float -> (B, N, T, H), turned."""
    pairs = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(pairs).float() / pairs)
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, H / 2)
    cos, sin = angles.cos(), angles.sin()
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.type_as(x)


@apply_rope.cases
def _(draw):
    one = torch.tensor([[[[1.0, 0.0, 0.0, 1.0]]]])
    yield one, torch.tensor([[2]]), 100.0
    yield draw.normal(1, 2, 2, 4), torch.tensor([[5, 1]]), 16.0
    positions = draw.integers(0, 60, 2, 5)
    positions[:, 0] = torch.tensor([3, 41])
    yield draw.normal(2, 3, 5, 6), positions, 500.0
    x = draw.uniform(2, 2, 3, 8, low=-1.0).half()
    yield x, 1500 + draw.integers(0, 1500, 2, 3), 10_000.0


apply_rope.equivalent(
    "pairs = x.shape[-1] / 2",
    because="arange counts to 3.0 as it counts to 3",
)


@apply_rope.also("complex numbers")
def _(x, positions, base):
    pairs = x.shape[-1] // 2
    angles = positions[:, None, :, None] / base ** (torch.arange(pairs) / pairs)
    numbers = torch.complex(*x.float().split(pairs, dim=-1))
    turned = numbers * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


@apply_rope.also("loops")
def _(x, positions, base):
    out, pairs = torch.empty_like(x), x.shape[-1] // 2
    for b, row in enumerate(positions.tolist()):
        for t, position in enumerate(row):
            for i in range(pairs):
                angle = position * base ** (-i / pairs)
                cos, sin = math.cos(angle), math.sin(angle)
                first, second = x[b, :, t, i], x[b, :, t, i + pairs]
                out[b, :, t, i] = cos * first - sin * second
                out[b, :, t, i + pairs] = sin * first + cos * second
    return out


@apply_rope.also("rotate_half, tables cast at the end")
def _(x, positions, base):
    frequencies = 1.0 / base ** (torch.arange(0, x.shape[-1], 2).float() / x.shape[-1])
    angles = torch.einsum("bt,r->btr", positions.float(), frequencies).repeat(1, 1, 2)
    cos, sin = angles.cos().to(x.dtype)[:, None], angles.sin().to(x.dtype)[:, None]
    first, second = x.tensor_split(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@apply_rope.also("the package's functions")
def _(x, positions, base):
    from annotated_src.rotary import apply_rotary, rope_frequencies, rope_tables

    tables = rope_tables(positions, rope_frequencies(x.shape[-1], base), x.dtype)
    return apply_rotary(x, *tables)


def angles_of(x, positions, base):
    """Give the angle of each pair of each token: (B, 1, T, H / 2)."""
    pairs = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(pairs).float() / pairs)
    return positions[:, None, :, None].float() * frequencies


def turned_by(x, angles):
    """Turn half-split pairs by angles, in float32."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.type_as(x)


@apply_rope.mistake(
    "interleaved pairs",
    because="the paper and Meta's code pair neighbours; Hugging Face has permuted the "
    "weights, and pairs the halves",
    section="Which features form a pair?",
)
def _(x, positions, base):
    angles = angles_of(x, positions, base)
    cos, sin = angles.cos(), angles.sin()
    even, odd = x.float()[..., 0::2], x.float()[..., 1::2]
    pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return pairs.flatten(-2).type_as(x)


@apply_rope.mistake(
    "the paper's tables with rotate_half",
    because="both are right, each in its own layout. Put together they are no turn "
    "at all: lengths change",
    section="The ladder of equality",
)
def _(x, positions, base):
    angles = angles_of(x, positions, base).repeat_interleave(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    half = torch.cat((-second, first), dim=-1)
    return (x.float() * angles.cos() + half * angles.sin()).type_as(x)


@apply_rope.mistake(
    "turned backwards",
    because="the minus sign has two places to stand, and all scores within one "
    "program stay functions of distance; a trained model wants the other distance",
    section="The same with matrices",
)
def _(x, positions, base):
    return turned_by(x, -angles_of(x, positions, base))


@apply_rope.mistake(
    "base fixed at 10,000",
    because="it is the paper's number, and in many a file it is not an argument; newer "
    "models have 100,000, 500,000 and more",
    section="Many frequencies",
)
def _(x, positions, base):
    return turned_by(x, angles_of(x, positions, 10_000.0))


@apply_rope.mistake(
    "positions from arange",
    because="the first token stands at 0 as long as there is no cache, no padding "
    "and no packing",
    section="Which numbers may be positions?",
)
def _(x, positions, base):
    line = torch.arange(x.shape[2]).expand_as(positions)
    return turned_by(x, angles_of(x, line, base))


@apply_rope.mistake(
    "the first text's positions for all",
    because="tables are made once and look alike for every row; with left padding or "
    "packed texts rows differ",
    section="Which numbers may be positions?",
)
def _(x, positions, base):
    return turned_by(x, angles_of(x, positions[:1], base))


@apply_rope.mistake(
    "counted from 1",
    because="the paper numbers tokens from 1. It changes no score, as the difference "
    "stays, but here the positions are given",
    section="The ladder of equality",
)
def _(x, positions, base):
    return turned_by(x, angles_of(x, positions + 1, base))


@apply_rope.mistake(
    "angles in half precision",
    because="a model in half precision is one where everything is; an angle of 2000 "
    "needs more digits than float16 has",
    section="Angles need float32",
)
def _(x, positions, base):
    pairs = x.shape[-1] // 2
    frequencies = (base ** (-torch.arange(pairs).float() / pairs)).to(x.dtype)
    return turned_by(x, (positions[:, None, :, None].to(x.dtype) * frequencies).float())


@apply_rope.mistake(
    "float32 comes back",
    because="the tables are float32, and a product takes the wider type without a "
    "word; the next product, with values in half precision, refuses it",
    section="Angles need float32",
)
def _(x, positions, base):
    return turned_by(x.float(), angles_of(x, positions, base))


@apply_rope.mistake(
    "the two in the exponent forgotten",
    because="pair i has exponent 2i/d, and i is counted over pairs: one writes i/d",
    section="The same with matrices",
)
def _(x, positions, base):
    # base^(-i/d)
    return turned_by(x, angles_of(x, positions, math.sqrt(base)))


@apply_rope.mistake(
    "faster and faster",
    because="the exponent's minus is easily lost. The first pair does not show it, its "
    "frequency is 1 either way",
    section="Many frequencies",
)
def _(x, positions, base):
    # base^(+2i/d)
    return turned_by(x, angles_of(x, positions, 1 / base))


@apply_rope.mistake(
    "tables laid along the heads",
    because="in many projects the axes are (B, T, N, H), and the new axis for the "
    "heads goes after the tokens; where N equals T nothing complains",
    section="The annotated source",
)
def _(x, positions, base):
    return turned_by(x, angles_of(x, positions, base).transpose(1, 2))


@chapter.implement(
    title="the way back to interleaved rows",
    minutes=8,
    difficulty="moderate",
    section="Which features form a pair?",
    text="""
Write `rows_to_interleaved`, the way back from half-split to interleaved rows: what
`rows_to_half_split` did to a query or key projection, it undoes, head by head.
""",
    hints=(
        "Of a head's rows 0 1 2 3 4 5, which one comes second in the interleaved "
        "order?",
        "It is 0 3 1 4 2 5. Cut the rows into heads, and each head into its halves; "
        "then swap two axes.",
    ),
    proves="In each head, row i of the first half is followed by row i of the "
    "second, and the columns stay.",
)
def rows_to_interleaved(weight, num_heads):
    """(rows, D), an int -> (rows, D), in another order."""
    halves = weight.unflatten(0, (num_heads, 2, -1))  # (heads, 2, H / 2, D)
    return halves.transpose(1, 2).flatten(0, 2)


@rows_to_interleaved.cases
def _(draw):
    yield torch.arange(6.0)[:, None], 1
    yield torch.arange(8.0)[:, None] + torch.tensor([0.0, 0.5]), 2
    yield draw.normal(24, 12), 3
    yield draw.normal(48, 24), 6


@rows_to_interleaved.also("loops")
def _(weight, num_heads):
    width = weight.shape[0] // num_heads
    rows = []
    for head in range(num_heads):
        for i in range(width // 2):
            rows += [weight[head * width + i], weight[head * width + width // 2 + i]]
    return torch.stack(rows)


@rows_to_interleaved.also("an order of rows")
def _(weight, num_heads):
    rows = torch.arange(len(weight)).reshape(num_heads, 2, -1).mT
    return weight[rows.reshape(-1)]


@rows_to_interleaved.also("the package's function of features")
def _(weight, num_heads):
    from annotated_src.rotary import half_split_to_interleaved

    heads = weight.unflatten(0, (num_heads, -1)).mT
    return half_split_to_interleaved(heads).mT.flatten(0, 1)


@rows_to_interleaved.mistake(
    "the way there",
    because="with four features a head both ways are the same: 0 2 1 3. With six "
    "they are not",
)
def _(weight, num_heads):
    pairs = weight.unflatten(0, (num_heads, -1, 2))
    return pairs.transpose(1, 2).flatten(0, 2)


@rows_to_interleaved.mistake(
    "all heads as one",
    because="a matrix has one list of rows, and `num_heads` seems to be needed for "
    "nothing; then the pairs are made across heads",
)
def _(weight, num_heads):
    return weight.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


@rows_to_interleaved.mistake(
    "a reshape for a transposition",
    because="cutting into pairs looks like putting into pairs; a view moves no row",
)
def _(weight, num_heads):
    return weight.unflatten(0, (num_heads, -1, 2)).flatten(0, 2)


@rows_to_interleaved.mistake(
    "turned for reordered",
    because="`rotate_half` is the best-known function of the half-split layout; it "
    "turns by 90 degrees, and is no change of order",
)
def _(weight, num_heads):
    first, second = weight.unflatten(0, (num_heads, 2, -1)).unbind(1)
    return torch.stack((-second, first), dim=2).flatten(0, 2)


@rows_to_interleaved.mistake(
    "columns for rows",
    because="features stand in columns of x; in a weight, which is stored (out, in), "
    "the features that it makes are rows",
)
def _(weight, num_heads):
    halves = weight.unflatten(1, (num_heads, 2, -1))
    return halves.transpose(2, 3).flatten(1, 3)


@rows_to_interleaved.mistake(
    "the number of heads as their width",
    because="both are small whole numbers whose product is the number of rows, and "
    "`head_dim` is what the reordering is about",
)
def _(weight, num_heads):
    halves = weight.unflatten(0, (-1, 2, max(num_heads // 2, 1)))
    return halves.transpose(1, 2).flatten(0, 2)


@rows_to_interleaved.mistake(
    "the second half first",
    because="as a set the pairs are right; but within a pair the order is the "
    "direction of the turn",
)
def _(weight, num_heads):
    halves = weight.unflatten(0, (num_heads, 2, -1)).flip(1)
    return halves.transpose(1, 2).flatten(0, 2)


@chapter.implement(
    title="a score without turning",
    minutes=10,
    difficulty="hard",
    section="One demand",
    text="""
Write `score_at`: the dot product that a query and a key of interleaved pairs have after
turning, for a query that stands `distance` tokens after the key. Turn neither: sum the
waves.
""",
    hints=(
        "A pair is a complex number, and its score a wave over distance. What are the "
        "wave's height and its phase at distance 0?",
        r"For each pair $|q||k|\cos(s\,\theta + \arg q - \arg k)$. "
        r"`torch.view_as_complex` makes complex numbers of an axis of size 2, `abs` "
        r"and `angle` take them apart.",
    ),
    proves="The sum of the waves is the score of the turned vectors, at any "
    "distance, to either side.",
    atol=2e-3,
    rtol=1e-3,
)
def score_at(q, k, distance, frequencies):
    """(H,), (H,), an int, (H / 2,) radians per position -> a tensor of shape ()."""
    products = (
        torch.view_as_complex(q.unflatten(-1, (-1, 2)))
        * torch.view_as_complex(k.unflatten(-1, (-1, 2))).conj()
    )
    return (products.abs() * (distance * frequencies + products.angle()).cos()).sum()


@score_at.cases
def _(draw):
    yield (
        torch.tensor([0.0, 1.0, 2.0, 0.0]),
        torch.tensor([1.0, 0.0, 2.0, 0.0]),
        1,
        torch.tensor([0.5, 0.25]) * math.pi,
    )
    for width, distance in ((4, 0), (6, 7), (6, -3), (10, 90)):
        exponents = torch.arange(0, width, 2) / width
        yield draw.normal(width), draw.normal(width), distance, 200.0**-exponents


for changed in (
    "torch.view_as_complex(q.unflatten(- 0, (-1, 2)))",
    "* torch.view_as_complex(k.unflatten(- 0, (-1, 2))).conj()",
):
    score_at.equivalent(changed, because="a vector has one axis: 0 and -1 are the same")


@score_at.also("turn the query")
def _(q, k, distance, frequencies):
    cos, sin = (distance * frequencies).cos(), (distance * frequencies).sin()
    even, odd = q[0::2], q[1::2]
    return (even * cos - odd * sin) @ k[0::2] + (odd * cos + even * sin) @ k[1::2]


@score_at.also("a loop over pairs")
def _(q, k, distance, frequencies):
    total = 0.0
    for i, theta in enumerate(frequencies.tolist()):
        (a, b), (c, d) = q[2 * i : 2 * i + 2].tolist(), k[2 * i : 2 * i + 2].tolist()
        phase = distance * theta + math.atan2(b, a) - math.atan2(d, c)
        total += math.hypot(a, b) * math.hypot(c, d) * math.cos(phase)
    return torch.tensor(total)


@score_at.also("the package's functions, far away")
def _(q, k, distance, frequencies):
    from annotated_src.rotary import apply_rotary_interleaved, rope_tables

    at = torch.tensor([[100 + distance, 100]])
    both = torch.stack((q, k))[None, None]
    turned = apply_rotary_interleaved(both, *rope_tables(at, frequencies, q.dtype))
    return turned[0, 0, 0] @ turned[0, 0, 1]


def pairs_of(x):
    """Read interleaved pairs as complex numbers: (H,) -> (H / 2,)."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def waves(products, angles):
    """Add up waves of a height and phase each, at given angles."""
    return (products.abs() * (angles + products.angle()).cos()).sum()


@score_at.mistake(
    "the distance the wrong way",
    because="in the equation of the matrices the difference has the other sign: "
    "there the turn acts on the key",
    section="The same with matrices",
)
def _(q, k, distance, frequencies):
    return waves(pairs_of(q) * pairs_of(k).conj(), -distance * frequencies)


@score_at.mistake(
    "the conjugate forgotten",
    because="a product of complex numbers looks like a dot product; without the "
    "conjugate angles add up, and the positions of both would, too",
)
def _(q, k, distance, frequencies):
    return waves(pairs_of(q) * pairs_of(k), distance * frequencies)


@score_at.mistake(
    "half-split pairs",
    because="Hugging Face's Llama pairs the halves; these are neighbours",
    section="Which features form a pair?",
)
def _(q, k, distance, frequencies):
    query, key = (torch.complex(*x.chunk(2)) for x in (q, k))
    return waves(query * key.conj(), distance * frequencies)


@score_at.mistake(
    "waves that all start at their crest",
    because="with equal contents they do, and pictures of RoPE show just that; each "
    "pair's content sets its own phase",
    section="Scores fade with distance, on the whole",
)
def _(q, k, distance, frequencies):
    dots = (q * k).unflatten(-1, (-1, 2)).sum(-1)
    return (dots * (distance * frequencies).cos()).sum()


@score_at.mistake(
    "one height for all",
    because="a score is length times length times cosine, one has learned; that "
    "holds pair by pair, and the lengths differ",
)
def _(q, k, distance, frequencies):
    products = pairs_of(q) * pairs_of(k).conj()
    cosines = (distance * frequencies + products.angle()).cos()
    return q.norm() * k.norm() * cosines.mean()


@score_at.mistake(
    "the imaginary part",
    because="sine and cosine are both in the turned pair; the dot product is the "
    "real part alone",
)
def _(q, k, distance, frequencies):
    products = pairs_of(q) * pairs_of(k).conj()
    return (products.abs() * (distance * frequencies + products.angle()).sin()).sum()


@score_at.mistake(
    "divided by the root of H",
    because="attention's scores are; the task asks for the dot product",
    section="Without positions, attention is a bag",
)
def _(q, k, distance, frequencies):
    score = waves(pairs_of(q) * pairs_of(k).conj(), distance * frequencies)
    return score / math.sqrt(q.shape[-1])


chapter.explain(
    "powers_of_one_matrix",
    title="blocks of two",
    minutes=10,
    difficulty="hard",
    section="The same with matrices",
    text=r"""
Let $f(x, m) = A_m x$ with any $d \times d$ matrices, $A_0 = I$; no pairs, nothing
complex. Ask only that a score depends on distance: $A_m^\top A_n$ is a function of $n -
m$. What does that leave, and what do RoPE's blocks of two give away?
""",
    hints=(
        "Put $m = n$. Which matrices have $A^\\top A = I$?",
        "Put $n = m + 1$: the product is the same matrix for every $m$. Solve for "
        "$A_{m+1}$. And what does an orthogonal matrix look like in the right basis?",
    ),
    choices={
        "a": Choice(
            "Stretches are left, too, as long as they grow evenly: `A_m = g^m R^m`.",
            r"Then $A_m^\top A_n$ has the factor $g^{m+n}$, which is no function of "
            r"the distance. Put $m = n$: lengths cannot change.",
        ),
        "b": Choice(
            "Any family of turns, one for each position. RoPE chooses a simple one.",
            r"Not any: $A_m^\top A_{m+1}$ is the same matrix at every $m$, so each "
            r"step is the same turn, and $A_m$ is a power of it.",
        ),
        "c": Choice(
            "Powers of one orthogonal matrix. Blocks of two give nothing away.",
            r"With $m = n$ each $A_m$ is orthogonal; with $n = m + 1$ each step is "
            r"the same, so $A_m = A_1^m$. In a suitable basis $A_1$ is made of turns "
            r"of two features, and $\pm 1$.",
        ),
        "d": Choice(
            "Powers of one orthogonal matrix. Blocks of three or more could do more.",
            "The first half is right. But every orthogonal matrix falls apart into "
            "turns of two features, and $\\pm 1$, in a suitable basis: a turn of "
            "three has an axis, which stays where it is.",
        ),
    },
    right="c",
    why=r"""
The proof: $A_m^\top A_m = A_0^\top A_0 = I$, so each $A_m$ is orthogonal. Then
$A_m^\top A_{m+1} = A_0^\top A_1 = A_1$, so $A_{m+1} = A_m A_1$ and $A_m = A_1^m$.
Changing the basis of queries and keys alike changes no score, and $W_q$ and $W_k$ can
absorb it, as they absorb the permutation between the layouts. What is left to choose is
the frequencies, and those $\pm 1$, which know nothing of distance, or only whether it
is even.
""",
)


@chapter.debug(
    title="right for one token",
    minutes=8,
    difficulty="moderate",
    section="Which features form a pair?",
    text="""
A colleague converts the attention of an interleaved checkpoint to half-split by the
function below. With six query heads and three key heads it runs, norms are right, the
first token is right, and later ones are wrong. Weights are named as in
`{"q_proj.weight": ..., "k_proj.bias": ...}`; those of `v_proj` and `out_proj` are among
them. Mend it.
""",
    hints=(
        "With as many key heads as query heads the function is right. What does it "
        "do to 24 rows of keys in three heads of 8?",
        "Cut in six, each piece has 4 rows: half a head.",
    ),
    proves="Rows and biases of queries and of keys are reordered head by head, each "
    "by its own number of heads, and everything else stays.",
    why="Keys have their own number of heads: 24 rows are 3 heads of 8, not 6 of 4. "
    "The first token sees only itself, at distance 0, where every order of pairs "
    "agrees.",
)
def convert_heads(weights, num_heads, num_kv_heads):
    """{name: tensor}, two ints -> {name: tensor}, same names and shapes."""
    counts = {"q_proj": num_heads, "k_proj": num_kv_heads}
    converted = dict(weights)
    for name, weight in weights.items():
        if count := counts.get(name.partition(".")[0]):
            pairs = weight.unflatten(0, (count, -1, 2))  # (heads, H / 2, 2, ...)
            converted[name] = pairs.transpose(1, 2).flatten(0, 2)
    return converted


@convert_heads.broken(
    "as many key heads as query heads",
    because="in the first Llama there were as many, and the key projection has the "
    "same name and form; with fewer heads the cut still comes out even",
)
def _(weights, num_heads, num_kv_heads):
    counts = {"q_proj": num_heads, "k_proj": num_heads}
    converted = dict(weights)
    for name, weight in weights.items():
        if count := counts.get(name.partition(".")[0]):
            pairs = weight.unflatten(0, (count, -1, 2))  # (heads, H / 2, 2, ...)
            converted[name] = pairs.transpose(1, 2).flatten(0, 2)
    return converted


@convert_heads.cases
def _(draw):
    rows = torch.arange(12.0)
    yield (
        {"q_proj.bias": rows, "k_proj.bias": 20 + rows, "v_proj.bias": 40 + rows},
        2,
        1,
    )
    for num_heads, num_kv_heads, width in ((6, 3, 8), (2, 2, 6)):
        weights = {}
        for name, heads in (
            ("q_proj", num_heads),
            ("k_proj", num_kv_heads),
            ("v_proj", num_kv_heads),
        ):
            weights[f"{name}.weight"] = draw.normal(heads * width, 24)
            weights[f"{name}.bias"] = draw.normal(heads * width)
        weights["out_proj.weight"] = draw.normal(24, num_heads * width)
        yield weights, num_heads, num_kv_heads


@convert_heads.also("loops")
def _(weights, num_heads, num_kv_heads):
    converted = {}
    for name, weight in weights.items():
        rows, kind = list(range(len(weight))), name.split(".")[0]
        if kind in ("q_proj", "k_proj"):
            count = num_heads if kind == "q_proj" else num_kv_heads
            width = len(weight) // count
            heads = [rows[i : i + width] for i in range(0, len(rows), width)]
            rows = [row for head in heads for row in head[0::2] + head[1::2]]
        converted[name] = weight[rows]
    return converted


@convert_heads.also("the package's function")
def _(weights, num_heads, num_kv_heads):
    from annotated_src.rotary import rows_to_half_split

    def convert(name, weight):
        if not name.startswith(("q_proj.", "k_proj.")):
            return weight
        count = num_heads if name.startswith("q") else num_kv_heads
        table = weight if weight.ndim == 2 else weight[:, None]
        return rows_to_half_split(table, count).reshape(weight.shape)

    return {name: convert(name, weight) for name, weight in weights.items()}


def wrong_conversion(kinds=("q_proj", "k_proj"), biases=True, cut=None):
    """Make a conversion of other projections, or with another cut of a head."""

    def convert(weights, num_heads, num_kv_heads):
        converted = dict(weights)
        for name, weight in weights.items():
            kind, _, part = name.partition(".")
            if kind in kinds and (biases or part == "weight"):
                count = num_heads if kind == "q_proj" else num_kv_heads
                pieces = weight.unflatten(0, cut(count) if cut else (count, -1, 2))
                converted[name] = pieces.transpose(1, 2).flatten(0, 2)
        return converted

    return convert


convert_heads.mistake(
    "values too",
    because="queries, keys and values are named in one breath; values are never "
    "turned, and `out_proj` expects them as they were",
)(wrong_conversion(kinds=("q_proj", "k_proj", "v_proj")))
convert_heads.mistake(
    "queries only",
    because="one reordering seems enough to match the code; but scores stay the same "
    "only if keys are reordered likewise",
)(wrong_conversion(kinds=("q_proj",)))
convert_heads.mistake(
    "biases left behind",
    because="Llama has none, so no test on it misses them; other models have, and a "
    "bias is turned with its row",
)(wrong_conversion(biases=False))
convert_heads.mistake(
    "the way back",
    because="it is a permutation either way, lengths stay, and with four features a "
    "head it even is the same",
)(wrong_conversion(cut=lambda count: (count, 2, -1)))
convert_heads.mistake(
    "all heads as one",
    because="the reordering is drawn for one head, and a matrix shows no border "
    "between heads",
)(wrong_conversion(cut=lambda count: (1, -1, 2)))
