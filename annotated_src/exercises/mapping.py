"""Exercises on other people's names, and on the order of rows."""

import itertools

import torch

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.exercise import Choice

chapter = Chapter("device/02_mapping", "Mapping: other people's names")


@chapter.implement(
    title="one matrix for three",
    minutes=15,
    difficulty="moderate",
    section="One matrix for three",
    text="""
Write `split_qkv`, without looking it up. A fused matrix has `head_dim` rows for each
head. With 4 heads of queries, 2 of keys and 2 of values, they lie so:

| `layout` | heads |
|---|---|
| `"plain"` | q0 q1 q2 q3 k0 k1 v0 v1 |
| `"per group"` | q0 q1 k0 v0 q2 q3 k1 v1 |

`"per head"` is per group with one query to a group.
""",
    hints=(
        "Plain: three slices, but of which sizes? Not of equal ones, where keys are "
        "few.",
        "Per group: name the dimensions of the pile, outermost first (group, member, "
        "row of a head), and cut along the second.",
    ),
    proves="Every row of a fused matrix finds its head, in three layouts, with and "
    "without shared keys.",
    why="A bias has no second axis, and the same code splits it. The layouts are "
    "orders of the same rows, so whoever has to serve code for one with a matrix in "
    "another splits it and joins it anew.",
)
def split_qkv(fused, num_heads, num_kv_heads, head_dim, layout):
    """(rows, D) -> queries (N * H, D), keys and values (K * H, D), head by head."""
    many, few = num_heads * head_dim, num_kv_heads * head_dim
    if layout == "plain":
        return fused.split((many, few, few))
    groups = fused.unflatten(0, (num_kv_heads, -1, head_dim))
    queries, keys, values = groups[:, :-2], groups[:, -2], groups[:, -1]
    return queries.flatten(0, 2), keys.flatten(0, 1), values.flatten(0, 1)


@split_qkv.cases
def _(draw):
    yield torch.arange(8.0)[:, None], 4, 2, 1, "plain"
    yield torch.arange(8.0)[:, None], 4, 2, 1, "per group"
    yield torch.arange(12.0)[:, None], 2, 2, 2, "per head"
    for num_heads, num_kv_heads, layout in (
        (6, 2, "plain"),
        (6, 2, "per group"),
        (3, 3, "per head"),
        (3, 3, "plain"),
    ):
        rows = (num_heads + 2 * num_kv_heads) * 4
        yield draw.normal(rows, 3), num_heads, num_kv_heads, 4, layout


@split_qkv.also("row by row")
def _(fused, num_heads, num_kv_heads, head_dim, layout):
    group = num_heads // num_kv_heads
    heads = [("q", n) for n in range(num_heads)]
    heads += [(kind, g) for kind in "kv" for g in range(num_kv_heads)]
    if layout != "plain":
        heads = []
        for g in range(num_kv_heads):
            heads += [("q", g * group + i) for i in range(group)]
            heads += [("k", g), ("v", g)]
    parts = {"q": [], "k": [], "v": []}
    for (kind, _), rows in zip(heads, fused.split(head_dim), strict=True):
        parts[kind].append(rows)
    return tuple(torch.cat(rows) for rows in parts.values())


@split_qkv.also("indices")
def _(fused, num_heads, num_kv_heads, head_dim, layout):
    group, n, g = (
        num_heads // num_kv_heads,
        *map(torch.arange, (num_heads, num_kv_heads)),
    )
    queries, keys, values = n, num_heads + g, num_heads + num_kv_heads + g
    if layout != "plain":
        queries = n // group * (group + 2) + n % group
        keys = g * (group + 2) + group
        values = keys + 1
    heads = fused.unflatten(0, (-1, head_dim))
    return tuple(heads[i].flatten(0, 1) for i in (queries, keys, values))


@split_qkv.also("the package")
def _(fused, num_heads, num_kv_heads, head_dim, layout):
    from annotated_src.fused_qkv import split_qkv as ours

    return ours(fused, num_heads, num_kv_heads, head_dim, layout)


def plain_parts(fused, num_heads, num_kv_heads, head_dim):
    """Cut all queries, all keys, all values."""
    few = num_kv_heads * head_dim
    return fused.split((num_heads * head_dim, few, few))


def group_parts(groups):
    """Cut (K, G + 2, H, D) along its second axis."""
    parts = groups[:, :-2], groups[:, -2:-1], groups[:, -1:]
    return tuple(part.flatten(0, 2) for part in parts)


@split_qkv.mistake(
    "every layout is plain",
    because="the shape fits, and so does the number of rows; no loader can tell",
    section="What strict cannot catch",
)
def _(fused, num_heads, num_kv_heads, head_dim, layout):
    return plain_parts(fused, num_heads, num_kv_heads, head_dim)


@split_qkv.mistake(
    "every layout is per group",
    because="code written for one model meets another; the shape fits again",
    section="What strict cannot catch",
)
def _(fused, num_heads, num_kv_heads, head_dim, layout):
    return group_parts(fused.unflatten(0, (num_kv_heads, -1, head_dim)))


@split_qkv.mistake(
    "three equal parts",
    because="`chunk(3)` is right as long as every query has a key of its own",
)
def _(fused, num_heads, num_kv_heads, head_dim, layout):
    if layout == "plain":
        return fused.chunk(3)
    return group_parts(fused.unflatten(0, (num_kv_heads, -1, head_dim)))


@split_qkv.mistake(
    "values before keys",
    because="both have the same shape, so nothing complains; the order is that of the "
    "name, queries, keys, values",
)
def _(fused, num_heads, num_kv_heads, head_dim, layout):
    if layout == "plain":
        queries, keys, values = plain_parts(fused, num_heads, num_kv_heads, head_dim)
    else:
        groups = fused.unflatten(0, (num_kv_heads, -1, head_dim))
        queries, keys, values = group_parts(groups)
    return queries, values, keys


@split_qkv.mistake(
    "keys first in a group",
    because="key, value, query is an order as good as any; the files have the queries "
    "first",
)
def _(fused, num_heads, num_kv_heads, head_dim, layout):
    if layout == "plain":
        return plain_parts(fused, num_heads, num_kv_heads, head_dim)
    groups = fused.unflatten(0, (num_kv_heads, -1, head_dim))
    return group_parts(groups.roll(-2, dims=1))


@split_qkv.mistake(
    "members outside, groups inside",
    because="`unflatten` wants the outermost first; here that is the group, and "
    "reading q, k, v in a row sounds like the other order",
)
def _(fused, num_heads, num_kv_heads, head_dim, layout):
    if layout == "plain":
        return plain_parts(fused, num_heads, num_kv_heads, head_dim)
    members = fused.unflatten(0, (-1, num_kv_heads, head_dim))
    return group_parts(members.transpose(0, 1))


@split_qkv.mistake(
    "queries in turn from each group",
    because="with the member's axis in front, a flatten takes the first query of every "
    "group, then the second; attention wants them group by group",
)
def _(fused, num_heads, num_kv_heads, head_dim, layout):
    if layout == "plain":
        return plain_parts(fused, num_heads, num_kv_heads, head_dim)
    groups = fused.unflatten(0, (num_kv_heads, -1, head_dim))
    _, keys, values = group_parts(groups)
    return groups[:, :-2].transpose(0, 1).flatten(0, 2), keys, values


@split_qkv.mistake(
    "rows dealt out like cards",
    because="a head's three rows seem to lie side by side; what lies side by side are "
    "whole heads, of `head_dim` rows each",
)
def _(fused, num_heads, num_kv_heads, head_dim, layout):
    if layout == "plain":
        return plain_parts(fused, num_heads, num_kv_heads, head_dim)
    groups = fused.unflatten(0, (num_kv_heads, head_dim, -1))
    return group_parts(groups.transpose(1, 2))


@chapter.implement(
    title="no word on the layout",
    minutes=15,
    difficulty="hard",
    section="One matrix for three",
    text="""
You find a fused matrix, and no word on its layout. But you can run the original's
attention once and record its *keys*, before they turn. Which of the three layouts
explain them: one, more, none? Numbers that were made on another machine agree to about
four digits.
""",
    hints=(
        "Multiply by the whole matrix: you have the vectors of all heads. Which of "
        "them are the keys, in each layout?",
        "The equations of the chapter say where head $g$ of the keys stands. Per head "
        "exists only where there are as many keys as queries, and then it is per "
        "group.",
    ),
    proves="It names every layout that gives all of these keys and no other, where two "
    "agree or none does, and asks for four digits, no more and not much less.",
    observe=lambda found, *inputs: sorted(found),
)
def find_layouts(fused, hidden, keys, num_heads):
    """(rows, D), (B, T, D), keys (B, K, T, H), N -> the layouts, a list of names."""
    few, head_dim = keys.shape[1], keys.shape[-1]
    made = (hidden @ fused.T).unflatten(-1, (-1, head_dim)).transpose(1, 2)
    group, g = num_heads // few, torch.arange(few)
    places = {"plain": num_heads + g, "per group": g * (group + 2) + group}
    if group == 1:
        places["per head"] = places["per group"]
    return [
        name
        for name, place in places.items()
        if torch.allclose(made[:, place], keys, atol=1e-4)
    ]


@find_layouts.cases
def _(draw):
    for num_heads, few, head_dim, places, noise, other in (
        (2, 1, 1, [2], 1e-6, 0),
        (2, 2, 1, [1, 4], 1e-6, 0),
        (2, 2, 1, [2, 3], 3e-5, 0),
        (4, 2, 1, [2, 6], 1e-6, 0),
        (4, 2, 3, [4, 5], 3e-5, 0),
        (4, 2, 3, [6, 7], 3e-5, 0),
        (4, 2, 3, [2, 5], 1e-6, 0),
        (3, 3, 2, [1, 4, 7], 1e-6, 0),
        (4, 2, 3, [4, 5], 1e-6, 0.005),
        (4, 2, 3, [2, 6], 1e-6, 1),
    ):
        # Small numbers, which a generous tolerance would take for equal.
        fused = 0.1 * draw.normal((num_heads + 2 * few) * head_dim, 2 * num_heads)
        hidden = draw.normal(1 if head_dim == 1 else 2, 3, 2 * num_heads)
        made = (hidden @ fused.T).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        keys = made[:, places] * (1 + noise)
        keys[-1, -1, -1, -1] += other  # the last number only
        yield fused, hidden, keys, num_heads


@find_layouts.also("split, then compare")
def _(fused, hidden, keys, num_heads):
    from annotated_src.fused_qkv import LAYOUTS
    from annotated_src.fused_qkv import split_qkv as split

    found, few, head_dim = [], keys.shape[1], keys.shape[-1]
    for layout in LAYOUTS:
        if layout == "per head" and num_heads != few:
            continue
        _, weight, _ = split(fused, num_heads, few, head_dim, layout)
        made = (hidden @ weight.T).unflatten(-1, (few, head_dim)).transpose(1, 2)
        if (made - keys).abs().max() < 1e-4:
            found.append(layout)
    return found


@find_layouts.also("head by head")
def _(fused, hidden, keys, num_heads):
    few, head_dim = keys.shape[1], keys.shape[-1]
    group, found = num_heads // few, set()
    rules = {
        "plain": lambda g: num_heads + g,
        "per group": lambda g: g * (group + 2) + group,
        "per head": lambda g: 3 * g + 1 if group == 1 else None,
    }
    for name, place in rules.items():
        fits = True
        for g in range(few):
            if (first := place(g)) is None:
                fits = False
                break
            rows = fused[first * head_dim : (first + 1) * head_dim]
            fits &= bool(((hidden @ rows.T - keys[:, g]).abs() < 1e-4).all())
        if fits:
            found.add(name)
    return sorted(found)


def wrong_layouts(
    keys_at=lambda g, heads, few, group: {
        "plain": heads + g,
        "per group": g * (group + 2) + group,
    },
    alike=lambda made, keys: torch.allclose(made, keys, atol=1e-4),
    per_head=lambda group: group == 1,
    most=3,
):
    """Make a find_layouts with one thing changed."""

    def find(fused, hidden, keys, num_heads):
        few, head_dim = keys.shape[1], keys.shape[-1]
        made = (hidden @ fused.T).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        group = num_heads // few
        places = keys_at(torch.arange(few), num_heads, few, group)
        if per_head(group):
            places["per head"] = places["per group"]
        fits = (n for n, at in places.items() if alike(made[:, at], keys))
        return list(itertools.islice(fits, most))

    return find


find_layouts.mistake(
    "the first that fits",
    because="a matrix has one layout; but with one key for each query two names mean "
    "the same rows, and with a single key plain and per group do",
)(wrong_layouts(most=1))
find_layouts.mistake(
    "per head with shared keys",
    because="each group has a key and a value, like a head; the name is for models "
    "where each query has its own",
)(wrong_layouts(per_head=lambda group: True))
find_layouts.mistake(
    "equal to the last digit",
    because="the weights are the same; but sums in another order, on another machine, "
    "round otherwise",
    section="The ladder of equality",
)(wrong_layouts(alike=torch.equal))
find_layouts.mistake(
    "`allclose` as it comes",
    because="it is there for numbers that differ in their last digits; but it asks for "
    "five digits, and near 0 for more, unless you give it `atol`",
    section="The ladder of equality",
)(wrong_layouts(alike=torch.allclose))
find_layouts.mistake(
    "a tolerance for any numbers",
    because="one that has worked elsewhere is taken along; but these numbers are about "
    "0.3, and 0.05 is a lot of that",
    section="What strict cannot catch",
)(wrong_layouts(alike=lambda made, keys: torch.allclose(made, keys, atol=0.05)))
find_layouts.mistake(
    "the first token decides",
    because="a layout that is right for one token is right for all; but these keys may "
    "come from another matrix altogether",
    section="What strict cannot catch",
)(
    wrong_layouts(
        alike=lambda made, keys: torch.allclose(made[:, :, 0], keys[:, :, 0], atol=1e-4)
    )
)
find_layouts.mistake(
    "the shape decides",
    because="it decides so much elsewhere; here every layout has it",
    section="What strict cannot catch",
)(wrong_layouts(alike=lambda made, keys: made.shape == keys.shape))
find_layouts.mistake(
    "the first head decides",
    because="one head is enough to see a mistake, most of the time; a wrong place may "
    "begin with the right head",
)(
    wrong_layouts(
        alike=lambda made, keys: torch.allclose(made[:, :1], keys[:, :1], atol=1e-4)
    )
)
find_layouts.mistake(
    "values taken for keys",
    because="the last heads of a group are its key and its value, and counting from "
    "the end is off by one",
)(
    wrong_layouts(
        keys_at=lambda g, heads, few, group: {
            "plain": heads + few + g,
            "per group": g * (group + 2) + group + 1,
        }
    )
)
find_layouts.mistake(
    "a group has three members",
    because="per head a query, a key and a value take turns; a group has G queries",
)(
    wrong_layouts(
        keys_at=lambda g, heads, few, group: {
            "plain": heads + g,
            "per group": 3 * g + 1,
        }
    )
)


chapter.explain(
    "values_too",
    title="rows of the values, moved as well",
    minutes=5,
    difficulty="hard",
    section="Meta's rows and Hugging Face's",
    text="""
`turn_meta_rows` leaves `v_proj` alone. Suppose somebody applies $P$ to the rows of
every head of $W_v$, too. What else could be changed, so that the model stays the same?
""",
    hints=(
        "Follow one feature of a value: it is weighed, summed over tokens, and then? "
        "Which matrix reads it?",
        "A matrix reads by its columns, and writes by its rows.",
    ),
    choices={
        "a": Choice(
            "Nothing need be: values are never turned, so their order is free.",
            "Free it is, but somebody reads it. Feature 3 of a head's value meets "
            "column 3 of that head in `out_proj`, and now another feature comes there.",
        ),
        "b": Choice(
            "The rows of `out_proj`, in the same way.",
            "Its rows are what it *writes*, features of the stream. It reads the "
            "values by its columns.",
        ),
        "c": Choice(
            "The rows of `q_proj` and `k_proj` once more.",
            "These decide who looks at whom. What is then passed on is made of values "
            "alone, and it would still lie in another order.",
        ),
        "d": Choice(
            "The columns of `out_proj`, head by head, in the same way.",
            "The features of a value go, weighed and summed, into `out_proj`. Permute "
            "its columns like the rows of $W_v$, and each feature meets its own again.",
        ),
    },
    right="d",
    why="Queries and keys have such a freedom, too, as long as nothing turns: any "
    "permutation (indeed any rotation) of a head's features, the same for both, leaves "
    "the scores as they are. RoPE breaks it: which feature stands where decides its "
    "partner and its frequency.",
)


chapter.explain(
    "no_table",
    title="a mapping without a table",
    minutes=10,
    difficulty="moderate",
    section="A table and a loop",
    text="""
A colleague needs no table: "for each of our tensors, take the next one of theirs that
has the same shape and is not used yet". With the `state_dict` of a transformers Llama
of 12 layers it gives the right model. With the file that this same model saved, it
loads as smoothly, and the logits are wrong. Why?
""",
    hints=(
        "In which order do tensors stand in a `state_dict`, and in which in a "
        "safetensors file?",
        "Sort the names `layers.2` and `layers.10` as text.",
    ),
    choices={
        "a": Choice(
            "The file has the tied head only once.",
            "This model's head is its own. And a missing tensor would have stopped the "
            "search, loudly.",
        ),
        "b": Choice(
            "The file is sorted by name.",
            "A `state_dict` has the order in which the modules were made, and both "
            "authors happened to make them alike. In the file layer 10 comes before "
            "layer 2, so from layer 2 on each layer is another one. Within a layer "
            "`o_proj` comes before `q_proj`, and the head before the embedding: equal "
            "shapes, swapped.",
        ),
        "c": Choice(
            "Saving rounds the weights to half precision.",
            "The file has the dtype that the model had, bit for bit. And rounding "
            "would not make the logits wrong, only inexact.",
        ),
        "d": Choice(
            "The rows of queries and keys are in Meta's order in the file.",
            "transformers saves what it computes with, halves that turn. Meta's order "
            "is in Meta's files, and in GGUF.",
        ),
    },
    right="b",
    why="Two orders that agree by chance are not a mapping. In all "
    r"$10 \cdot 9 + 2 \cdot 2 + 2 = 96$ of 111 tensors go astray: nine in each of ten "
    "layers, `q_proj` and `o_proj` in the first two, embedding and head.",
)


@chapter.debug(
    title="Meta's rows, with fewer keys",
    minutes=15,
    difficulty="moderate",
    section="Meta's rows and Hugging Face's",
    text="""
This converter moves Meta's rows to Hugging Face's order: in each head, neighbours
become halves, 0 1 2 3 4 5 to 0 2 4 1 3 5. It was written for a Llama whose queries all
have keys of their own, and there it is right. With shared keys it is wrong, and no
shape tells. Mend it.
""",
    hints=(
        "Into how many heads does it cut the rows of `k`?",
        "What would a head of the keys have, cut into `num_heads` pieces?",
    ),
    proves="Each head of queries and keys has its own rows moved, as many heads as "
    "there are, and the values stay as they are.",
    why="Cut into too many pieces, each piece is a part of a head, and its pairs are "
    "others. If only one pair is left to a piece, nothing moves at all.",
)
def move_meta_rows(q, k, v, num_heads, num_kv_heads):
    """Weights (N * H, D), (K * H, D) twice, in Meta's order -> the three in ours."""

    def to_halves(weight, heads):
        pairs = weight.unflatten(0, (heads, -1, 2))  # (heads, H / 2, 2, D)
        return pairs.transpose(1, 2).flatten(0, 2)

    return to_halves(q, num_heads), to_halves(k, num_kv_heads), v


@move_meta_rows.broken(
    "as many key heads as query heads",
    because="the function was written when all Llamas were so, and `num_heads` is at "
    "hand",
)
def _(q, k, v, num_heads, num_kv_heads):
    def to_halves(weight, heads):
        pairs = weight.unflatten(0, (heads, -1, 2))  # (heads, H / 2, 2, D)
        return pairs.transpose(1, 2).flatten(0, 2)

    return to_halves(q, num_heads), to_halves(k, num_heads), v


@move_meta_rows.cases
def _(draw):
    q, k = torch.arange(8.0)[:, None], torch.arange(4.0)[:, None]
    yield q, k, -k, 2, 1
    for num_heads, few, head_dim in ((2, 2, 6), (4, 2, 8), (2, 1, 12)):
        q, k, v = (draw.normal(n * head_dim, 3) for n in (num_heads, few, few))
        yield q, k, v, num_heads, few
    square = [draw.normal(12, 12) for _ in "qkv"]
    yield *square, 2, 2


@move_meta_rows.also("row by row")
def _(q, k, v, num_heads, num_kv_heads):
    moved = []
    for weight, heads in ((q, num_heads), (k, num_kv_heads)):
        size, rows = len(weight) // heads, []
        for start in range(0, len(weight), size):
            rows += weight[start : start + size : 2]
            rows += weight[start + 1 : start + size : 2]
        moved.append(torch.stack(rows))
    return *moved, v


@move_meta_rows.also("the package")
def _(q, k, v, num_heads, num_kv_heads):
    from annotated_src.rotary import rows_to_half_split

    return rows_to_half_split(q, num_heads), rows_to_half_split(k, num_kv_heads), v


def halves(weight, heads):
    """Move the rows of each head: neighbours become halves."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


@move_meta_rows.mistake(
    "the keys forgotten",
    because="what turns is explained with queries; a score needs both in one order",
)
def _(q, k, v, num_heads, num_kv_heads):
    return halves(q, num_heads), k, v


@move_meta_rows.mistake(
    "the values moved as well",
    because="three matrices, one loop; values never turn, and `out_proj` expects them "
    "where they were",
)
def _(q, k, v, num_heads, num_kv_heads):
    return halves(q, num_heads), halves(k, num_kv_heads), halves(v, num_kv_heads)


@move_meta_rows.mistake(
    "the other direction",
    because="the two permutations look alike, and for heads of 4 they are the same",
)
def _(q, k, v, num_heads, num_kv_heads):
    pairs = ((q, num_heads), (k, num_kv_heads))
    moved = [
        w.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        for w, heads in pairs
    ]
    return *moved, v


@move_meta_rows.mistake(
    "the whole matrix as one head",
    because="even rows first, then odd ones: on paper there is one head; here each "
    "head must stay together",
)
def _(q, k, v, num_heads, num_kv_heads):
    return halves(q, 1), halves(k, 1), v


@move_meta_rows.mistake(
    "columns for rows",
    because="on paper $x W$ has its outputs in the columns; torch stores a linear "
    "layer with outputs in the rows",
)
def _(q, k, v, num_heads, num_kv_heads):
    return halves(q.T, num_heads).T, halves(k.T, num_kv_heads).T, v


@move_meta_rows.mistake(
    "the width of a head for their number",
    because="functions of this kind are found with either as their argument, and "
    "`unflatten` takes both",
)
def _(q, k, v, num_heads, num_kv_heads):
    head_dim = len(q) // num_heads
    return halves(q, head_dim), halves(k, head_dim), v
