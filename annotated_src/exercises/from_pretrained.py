"""Exercises on loading a checkpoint: which files, how much memory, what fits."""

import math

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.exercise import Choice

chapter = Chapter("text/02_from_pretrained", "from_pretrained, slowly")


@chapter.implement(
    title="one layer of a large checkpoint",
    minutes=8,
    difficulty="easy",
    section="Names",
    text="""
Somebody needs a single layer of a checkpoint in many shards, and wants to open no file
in vain. `weight_map` is what `model.safetensors.index.json` holds: the file of each
tensor, by the tensor's name, as in `model.layers.3.mlp.up_proj.weight`. Which files
hold something of a layer?
""",
    hints=(
        "Shards are cut by size, not by layer. Where may the tensors of a layer be?",
        "Which names does the text `layers.1` stand in? Look at a model of 12 layers, "
        "and at one with experts, whose names hold a second number.",
    ),
    proves="Every file with a tensor of that layer is named, once, and no other: for "
    "layers that lie across files, for 1 beside 10 and 11, and for numbered experts.",
)
def files_to_open(weight_map, layer):
    """List the names of the files, each once, in alphabetical order."""
    wanted = f"model.layers.{layer}."
    return sorted({weight_map[name] for name in weight_map if name.startswith(wanted)})


def index_of(names, per_shard):
    """Write the map of a checkpoint with so many tensors to a shard."""
    return {n: f"model-{i // per_shard:02}.safetensors" for i, n in enumerate(names)}


def layer_names(num_layers, *parts):
    """Name some tensors of every layer, and the embedding in front of them."""
    layers = [f"model.layers.{i}.{part}" for i in range(num_layers) for part in parts]
    return ["model.embed_tokens.weight", *layers]


@files_to_open.cases
def _(draw):
    yield index_of([f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1, 10)], 1), 1
    mlp = ("mlp.up_proj.weight", "mlp.gate_proj.weight", "mlp.down_proj.weight")
    yield index_of(layer_names(2, *mlp), 2), 0
    experts = [f"mlp.experts.{i}.up_proj.weight" for i in range(5)]
    yield index_of(layer_names(2, *experts[:2]), 1), 1
    names = [*layer_names(13, *mlp), "model.norm.weight", "lm_head.weight"]
    for layer in (0, 1, draw.integer(2, 12), 12):
        yield index_of(names, 2), layer
    for layer in (0, 3):
        yield index_of(layer_names(4, *experts), draw.integer(2, 5)), layer
    parts = ["model.layers.2.b", "model.layers.1.a", "model.layers.2.a"]
    files = ["model-03.safetensors", "model-02.safetensors", "model-01.safetensors"]
    yield dict(zip(parts, files, strict=True)), 2


@files_to_open.also("a loop")
def _(weight_map, layer):
    found = []
    for name, file in sorted(weight_map.items(), key=lambda item: item[1]):
        if name.startswith(f"model.layers.{layer}.") and file not in found:
            found.append(file)
    return found


@files_to_open.also("the number, read from the name")
def _(weight_map, layer):
    files = set()
    for name in weight_map:
        words = name.split(".")
        if words[:2] == ["model", "layers"] and int(words[2]) == layer:
            files.add(weight_map[name])
    return sorted(files)


@files_to_open.mistake(
    "10 begins with 1",
    because="the name does begin with `model.layers.1`; so does that of layer 10, and "
    "small test models have no layer 10",
)
def _(weight_map, layer):
    prefix = f"model.layers.{layer}"
    return sorted({f for name, f in weight_map.items() if name.startswith(prefix)})


@files_to_open.mistake(
    "any number in the name",
    because="a name holds only one number, until a model has experts",
)
def _(weight_map, layer):
    return sorted({f for name, f in weight_map.items() if f".{layer}." in name})


@files_to_open.mistake(
    "one file a layer",
    because="shards look like chapters of a book; they are cut by size, and the cut "
    "may go through a layer",
    section="Shard by shard",
)
def _(weight_map, layer):
    wanted = f"model.layers.{layer}."
    return sorted(f for name, f in weight_map.items() if name.startswith(wanted))[:1]


@files_to_open.mistake(
    "in the order of the map",
    because="the map usually stands in the order of the files, so a `dict` or a loop "
    "seems to sort; nobody promises it",
    section="Shard by shard",
)
def _(weight_map, layer):
    wanted = f"model.layers.{layer}."
    found = {f: 0 for name, f in weight_map.items() if name.startswith(wanted)}
    return list(found)


@files_to_open.mistake(
    "from the first file to the last",
    because="the tensors of a layer usually lie one behind the other; but the map may "
    "say otherwise, and a file between need hold nothing of it",
    section="Shard by shard",
)
def _(weight_map, layer):
    wanted = f"model.layers.{layer}."
    found = [f for name, f in weight_map.items() if name.startswith(wanted)]
    files = sorted(set(weight_map.values()))
    return [f for f in files if min(found) <= f <= max(found)]


@files_to_open.mistake(
    "a file for each tensor",
    because="the map has a line for each tensor; but a file that is open once gives "
    "all of the layer's tensors in it",
    section="Shard by shard",
)
def _(weight_map, layer):
    wanted = f"model.layers.{layer}."
    return sorted(f for name, f in weight_map.items() if name.startswith(wanted))


@files_to_open.mistake(
    "layers counted from 1",
    because="people say “the first layer”; its number in the file is 0",
)
def _(weight_map, layer):
    wanted = f"model.layers.{layer - 1}."
    return sorted({f for name, f in weight_map.items() if name.startswith(wanted)})


@files_to_open.mistake(
    "all files",
    because="that is how a model is loaded, and reading is lazy anyway; but a pickle "
    "is read whole, and a download is, too",
    section="Shard by shard",
)
def _(weight_map, layer):
    return sorted(set(weight_map.values()))


@chapter.implement(
    title="the worst moment of loading",
    minutes=12,
    difficulty="moderate",
    section="How much at the worst moment",
    text="""
Shards come one after the other. Each is read whole; then its tensors are cast in order,
and each original is let go as soon as its cast is made. `shards` holds, for each shard,
the numbers of weights of its tensors; a weight has `stored` bytes in the file and
`wanted` bytes in the model. How many bytes are in use at the worst moment?

If the two widths are equal nothing is cast: a tensor that was read is the model's.
""",
    hints=(
        "Look at the moment just after a tensor was cast: which results exist, and "
        "which originals?",
        "All results so far, this one included; and the originals of this shard from "
        "this tensor on.",
    ),
    proves="The peak is right to the byte, for few and many shards, for narrower and "
    "wider models, and where nothing is cast.",
)
def peak_while_loading(shards, stored, wanted):
    """Give the number of bytes, an int."""
    if stored == wanted:
        return wanted * sum(map(sum, shards))
    placed, moments = 0, []
    for shard in shards:
        waiting = sum(shard)
        for count in shard:
            placed += count
            moments.append(wanted * placed + stored * waiting)
            waiting -= count
    return max(moments)


@peak_while_loading.cases
def _(draw):
    yield [[3, 1], [2]], 4, 2
    yield [[1, 5, 2], [4]], 2, 2
    for stored, wanted in ((4, 2), (2, 4), (2, 2)):
        shards = [draw.integers(2, 50, n).tolist() for n in (3, 1, 4)]
        yield [*shards, [7, 90, 3]], stored, wanted
        yield [[90, 7], *shards], stored, wanted


@peak_while_loading.also("sums of slices")
def _(shards, stored, wanted):
    peak, before = 0, 0
    for shard in shards:
        for i in range(len(shard)):
            originals = sum(shard[i + (stored == wanted) :])
            results = before + sum(shard[: i + 1])
            peak = max(peak, wanted * results + stored * originals)
        before += sum(shard)
    return peak


@peak_while_loading.also("a ledger of events")
def _(shards, stored, wanted):
    alive, peak = 0, 0
    for shard in shards:
        alive += stored * sum(shard)  # read
        peak = max(peak, alive)
        for count in shard:
            if stored == wanted:
                continue
            alive += wanted * count  # cast
            peak = max(peak, alive)
            alive -= stored * count  # let go
    return peak


def wrong_peak(results, originals, same_again=False):
    """Make a peak from other counts of results and originals at place i of a shard."""

    def peak(shards, stored, wanted):
        if stored == wanted and not same_again:
            return wanted * sum(map(sum, shards))
        most, before = 0, 0
        for shard in shards:
            for i in range(len(shard)):
                made, held = results(before, shard, i), originals(shard, i)
                most = max(most, wanted * made + stored * held)
            before += sum(shard)
        return most

    return peak


peak_while_loading.mistake(
    "the shard kept until its end",
    because="the shard is one file and one dictionary; but a tensor that is popped and "
    "cast is needed by nobody",
    section="Shard by shard",
)(wrong_peak(lambda b, s, i: b + sum(s[: i + 1]), lambda s, i: sum(s)))
peak_while_loading.mistake(
    "a cast in place",
    because="`x = x.half()` reads as if x changed; for a moment both forms exist",
    section="Small enough to see every byte",
)(wrong_peak(lambda b, s, i: b + sum(s[: i + 1]), lambda s, i: sum(s[i + 1 :])))
peak_while_loading.mistake(
    "measured before the cast",
    because="reading is the step that looks expensive; the cast then adds its result "
    "before the original goes",
    section="Small enough to see every byte",
)(wrong_peak(lambda b, s, i: b + sum(s[:i]), lambda s, i: sum(s[i:])))
peak_while_loading.mistake(
    "cast, though nothing is",
    because="the formula for a cast also gives a number for equal widths; `to` then "
    "returns the tensor that it was given",
)(wrong_peak(lambda b, s, i: b + sum(s[: i + 1]), lambda s, i: sum(s[i:]), True))


@peak_while_loading.mistake(
    "everything at once",
    because="that is how the obvious program does it: the file, then the model",
)
def _(shards, stored, wanted):
    return (stored + wanted) * sum(map(sum, shards))


@peak_while_loading.mistake(
    "the bound for the peak",
    because="“one copy and one shard” is easy to keep in mind; it is never exceeded, "
    "and seldom reached",
)
def _(shards, stored, wanted):
    return wanted * sum(map(sum, shards)) + stored * max(map(sum, shards))


@peak_while_loading.mistake(
    "the largest tensor for the largest shard",
    because="a safetensors file can be read tensor by tensor; here each shard is read "
    "whole, as a pickle must be",
    section="Shard by shard",
)
def _(shards, stored, wanted):
    if stored == wanted:
        return wanted * sum(map(sum, shards))
    return wanted * sum(map(sum, shards)) + stored * max(map(max, shards))


chapter.explain(
    "eight_shards",
    title="what cutting a file is worth",
    minutes=5,
    difficulty="moderate",
    section="How much at the worst moment",
    text="""
A checkpoint in float32 becomes a model in float16, shard by shard, with many small
tensors in each shard. The file is cut into eight equal shards. How many copies of the
finished model are in memory at the worst moment?
""",
    hints=(
        "A float32 shard is twice as large as what becomes of it. When does the sum of "
        "both peak?",
        "When the last shard has just been read: how much of the model exists?",
    ),
    choices={
        "a": Choice(
            "1: each original goes as its cast comes.",
            "That would need shards of one tiny tensor each. Here an eighth of the "
            "file waits while the model grows.",
        ),
        "b": Choice(
            "1.25: the whole model and a whole shard.",
            "An eighth of the file is a quarter of the model, and the sum is the "
            "bound. But the two are never there together: while the last shard is "
            "whole, its own eighth of the model does not exist yet.",
        ),
        "c": Choice(
            "2: a float32 file is twice the float16 model.",
            "So it is with *one* shard. The more shards, the less of the file is in "
            "memory at a time.",
        ),
        "d": Choice(
            "1.125, and a little more.",
            "When the last shard has been read, $7/8$ of the model exist, and $1/8$ "
            "of the file, which counts double: $7/8 + 2/8 = 1.125$. From then on each "
            "tensor adds 2 bytes a weight and frees 4. The little more is the one "
            "tensor that exists in both forms.",
        ),
    },
    right="d",
    why="With one shard it would be 2 copies and a little more; with very many tiny "
    "ones, 1. All of it is lost by a loader that is fed `list(read_tensors(folder))`, "
    "“so that the progress bar knows the number of tensors”: then whole file and "
    "whole model meet, 3 copies. The model on the meta device could have told the "
    "number.",
)

chapter.explain(
    "a_gain_of_ones",
    title="nobody will notice",
    minutes=5,
    difficulty="easy",
    section="Strictness, and its report",
    text="""
A norm gain is missing from a checkpoint, and a lenient loader fills it with ones, as a
fresh norm has them. The text that the model writes looks fine. Is that a reason to
relax?
""",
    hints=(
        "Is a gain of ones far away from a trained one? Is it equal to it?",
        "What would you have to look at to see the difference: the best token, or all "
        "of the scores?",
    ),
    choices={
        "a": Choice(
            "Yes: ones are the neutral gain, so the norm still does its work.",
            "Ones are where training began. The layers after it were trained with the "
            "gains that training ended with.",
        ),
        "b": Choice(
            "No: it is another model, and reading its text will not tell you.",
            "A gain of ones is close enough to keep most of the best tokens, and "
            "wrong enough to change the scores at every place. Errors that look like "
            "noise are the ones that strict loading is for.",
        ),
        "c": Choice(
            "Yes: a wrong weight makes noise of the text, and this text is fine.",
            "Some do: rows in another order, or a matrix that lies the other way "
            "round. One vector of 256 numbers that are off by a little does not.",
        ),
        "d": Choice(
            "No: the first token will be right, and all after it wrong.",
            "That is the mark of queries, keys and RoPE. A gain acts on every token, "
            "the first one too, and on each of them only a little.",
        ),
    },
    right="b",
)


@chapter.debug(
    title="a matrix that lies the other way round",
    minutes=8,
    difficulty="easy",
    section="Strictness, and its report",
    text="""
Before anything is loaded, a report compares the shapes that the model wants with those
that are stored. It has let a transposed matrix pass. Mend it.
""",
    hints=(
        "What do 704 × 256 and 256 × 704 have in common?",
        "Same number of weights, other shape: that must be on the third list.",
    ),
    proves="Each name that does not fit is on its list: what the model lacks, what "
    "nobody asked for, and what has another shape, even with as many weights.",
    why="A square matrix fits either way, and no comparison of shapes will ever see "
    "it. For that one compares logits with the original, as the chapter does.",
)
def compare_shapes(wanted, stored):
    """Compare two dicts of shapes: sorted lists of missing, unexpected, mismatched."""
    missing = sorted(wanted.keys() - stored.keys())
    unexpected = sorted(stored.keys() - wanted.keys())
    both = sorted(wanted.keys() & stored.keys())
    return missing, unexpected, [name for name in both if wanted[name] != stored[name]]


@compare_shapes.broken(
    "numbers of weights for shapes",
    because="the bytes then fit, and `copy_` after a `view` does not complain",
)
def _(wanted, stored):
    missing = sorted(wanted.keys() - stored.keys())
    unexpected = sorted(stored.keys() - wanted.keys())
    mismatched = [
        name
        for name in sorted(wanted.keys() & stored.keys())
        if math.prod(wanted[name]) != math.prod(stored[name])
    ]
    return missing, unexpected, mismatched


@compare_shapes.cases
def _(draw):
    yield {"a": (2, 3), "b": (4,)}, {"a": (3, 2), "c": (4,)}
    yield {"up": (6, 2), "norm": (2,), "head": (5, 2)}, {"up": (2, 6), "norm": (3,)}
    yield {"b": (1,), "a": (1,)}, {"a": (1,), "d": (1, 1), "c": (), "b": (1, 1)}
    names = [f"layers.{i}.{part}" for i in range(6) for part in ("up", "down", "norm")]
    shapes = {name: (draw.integer(2, 9), draw.integer(10, 20)) for name in names}
    stored = {names[i]: shapes[names[i]] for i in draw.permutation(len(names))}
    yield shapes, stored
    yield {"a": (2, 4), "b": (3, 2)}, {"a": (2, 5), "b": (4, 2)}
    yield {"a": (2, 6)}, {"a": (3, 4)}
    for i in draw.permutation(len(names))[:6]:
        stored[names[i]] = stored[names[i]][::-1]
    del stored["layers.4.down"]
    yield shapes, stored | {"layers.6.up": (3, 4), "layers.6.norm": (3,)}


@compare_shapes.also("loops")
def _(wanted, stored):
    missing, unexpected, mismatched = [], [], []
    for name, shape in wanted.items():
        if name not in stored:
            missing.append(name)
        elif tuple(stored[name]) != tuple(shape):
            mismatched.append(name)
    for name in stored:
        if name not in wanted:
            unexpected.append(name)
    return sorted(missing), sorted(unexpected), sorted(mismatched)


@compare_shapes.mistake(
    "missing and unexpected exchanged",
    because="seen from the file, the model's extra name is the one too many; the words "
    "are the model's point of view",
)
def _(wanted, stored):
    missing = sorted(stored.keys() - wanted.keys())
    unexpected = sorted(wanted.keys() - stored.keys())
    both = sorted(wanted.keys() & stored.keys())
    return missing, unexpected, [name for name in both if wanted[name] != stored[name]]


@compare_shapes.mistake(
    "names only",
    because="`strict=False` is about names, and shapes seem to follow from them",
)
def _(wanted, stored):
    return (
        sorted(wanted.keys() - stored.keys()),
        sorted(stored.keys() - wanted.keys()),
        [],
    )


@compare_shapes.mistake(
    "by order instead of by name",
    because="both come from the same layers in the same order, as long as nobody sorts "
    "the file and nothing is missing",
    section="Names",
)
def _(wanted, stored):
    missing = sorted(wanted.keys() - stored.keys())
    unexpected = sorted(stored.keys() - wanted.keys())
    pairs = zip(wanted.items(), stored.items(), strict=False)
    mismatched = sorted(a for (a, shape), (_, other) in pairs if shape != other)
    return missing, unexpected, mismatched


@compare_shapes.mistake(
    "a wrong shape is missing",
    because="what does not fit cannot be used; but it is there, and the report should "
    "say what is wrong with it",
)
def _(wanted, stored):
    fits = {name for name in wanted if wanted[name] == stored.get(name)}
    return sorted(wanted.keys() - fits), sorted(stored.keys() - wanted.keys()), []


@compare_shapes.mistake(
    "the first problem only",
    because="an exception ends the loop at the first one; then the next run finds the "
    "next one, an hour later",
)
def _(wanted, stored):
    missing = sorted(wanted.keys() - stored.keys())
    unexpected = sorted(stored.keys() - wanted.keys())
    both = sorted(wanted.keys() & stored.keys())
    mismatched = [name for name in both if wanted[name] != stored[name]]
    return missing[:1], unexpected[:1], mismatched[:1]


@compare_shapes.mistake(
    "numbers of axes for shapes",
    because="`ndim` tells matrices from gains, and that is what people look at first",
)
def _(wanted, stored):
    missing = sorted(wanted.keys() - stored.keys())
    unexpected = sorted(stored.keys() - wanted.keys())
    both = sorted(wanted.keys() & stored.keys())
    return missing, unexpected, [n for n in both if len(wanted[n]) != len(stored[n])]
