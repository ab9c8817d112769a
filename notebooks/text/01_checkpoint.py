# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# (ch-checkpoint)=
# # What a checkpoint is
#
# :::{admonition} In this chapter
# :class: at-a-glance
# **45 minutes · easy.** Afterwards you can open a model's file with nothing but Python,
# say where each of its bytes belongs, read one weight without reading the rest, follow
# a name through shards, explain why an older kind of file can run code, and tell which
# damage a reader notices and which it cannot.
# :::

# %% tags=["remove-input"]
from annotated_src.figures.station_map import StationMap

StationMap("files")

# %% [markdown]
# :::{admonition} Predict before you run
# :class: predict
# The weights of SmolLM2-135M lie in one file of 538 MB: 4.3 billion bits. Asked to go on
# after "The capital of France is", the model writes "Paris".
#
# - How much of the file must you read to list all 272 tensors with their shapes?
# - Somewhere on the way to your disk, *one* of the bits is flipped. In how many of the 4.3
#   billion places does the library that opens the file notice?
# - Can one flipped bit make the model write, fluently, something else?
#
# Write three answers down.
# :::

# %%
import hashlib
import json
import math
import mmap
import pickletools
import struct
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory

import numpy as np
import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from annotated_src.checkpoint import load_model
from annotated_src.figures import checkpoint as figures
from annotated_src.generate import generate
from annotated_src.shards import read_json, read_tensors
from annotated_src.show import confirm, show
from annotated_src.weights import WeightsError, smollm2, verify

transformers.utils.logging.disable_progress_bar()
_ = torch.set_grad_enabled(False)
temporary = TemporaryDirectory()
scratch = Path(temporary.name)  # for the files that this chapter makes

# %% [markdown]
# ## A folder
#
# What one downloads under the name of a model is a folder. Here is the one that the whole
# book uses.

# %%
ROLES = {
    "config.json": "the sizes, and which class of model they are for",
    "model.safetensors": "the weights: names, shapes, numbers",
    "tokenizer.json": "text to ids and back: the vocabulary and the rules",
    "tokenizer_config.json": "which tokens are special",
    "chat_template.jinja": "how a conversation becomes one text",
}
folder = smollm2()
for name, role in ROLES.items():
    print(f"{name:22} {role}")
confirm("all five are there", all((folder / name).is_file() for name in ROLES))
sizes = {name: (folder / name).stat().st_size for name in ROLES}
share = sizes["model.safetensors"] / sum(sizes.values())
confirm("99 % of the bytes are weights", round(share, 2) == 0.99)

# %% [markdown]
# Everything but the weights is text, and can be read in an editor. `config.json` says
# what to build; the weights' file says nothing of layers, heads or rotations.

# %%
config = read_json(folder / "config.json")
for key in ("architectures", "hidden_size", "num_hidden_layers", "tie_word_embeddings"):
    print(f"{key}: {config[key]}")

# %% [markdown]
# Other folders hold more: `generation_config.json` (how to sample by default),
# `special_tokens_map.json` (older tokenizers), `model.safetensors.index.json` (further
# down). {ref}`ch-from-pretrained` follows `config.json`; {ref}`ch-tokens` follows the
# tokenizer. This chapter stays with the weights.
#
# ## A file small enough to see every byte
#
# Two tensors: `a` with four numbers in float32, and `b` with the first three of them
# again, in bfloat16. The safetensors library makes a file of them.

# %%
a = torch.tensor([[1.0, -2.5], [0.1, 3.0]])
b = a.flatten()[:3].bfloat16()
raw = bytearray(safetensors.torch.save({"a": a, "b": b}))
len(raw)

# %% mystnb={"image": {"alt": "A table of 150 bytes, 16 to a row. The first eight, 78 and seven zeros, are the length. The next 120 are the header: each cell shows its two hexadecimal digits and the character they stand for, and the rows read as JSON that describes a, F32, shape 2 by 2, offsets 0 to 16, and b, BF16, shape 3, offsets 16 to 22, followed by seven spaces. Then one full row for a: 00 00 80 3f is 1, 00 00 20 c0 is minus 2.5, cd cc cc 3d is 0.1, 00 00 40 40 is 3. The last six bytes are b: 80 3f is 1, 20 c0 is minus 2.5, cd 3d is 0.1001."}, "figure": {"name": "fig-checkpoint-dump", "caption": "All 150 bytes. The two hexadecimal digits of a byte stand above what it means; at the left, the number of the row's first byte."}} tags=["hide-input"]
dump = figures.dump_data(bytes(raw))
figures.draw_dump(dump)

# %% [markdown]
# Three parts. Eight bytes say how long the header is. The header says, for each name, what
# kind of number, which shape, and from which byte to which. The rest is numbers, and
# nothing but numbers. The first part is an integer, smallest byte first ("little-endian"):
#
# $$
# n = \sum_{i=0}^{7} 256^{i} \, \mathrm{byte}_i .
# $$ (eq-checkpoint-length)
#
# `78` in hexadecimal is $7 \cdot 16 + 8 = 120$.

# %%
# Check eq-checkpoint-length.
summed = sum(256**i * byte for i, byte in enumerate(raw[:8]))
print("the header has", summed, "bytes")
confirm("as Python reads it", summed == int.from_bytes(raw[:8], "little"))
long = sum(256**i * byte for i, byte in enumerate(bytes([1, 2, 3, 0, 0, 0, 0, 0])))
confirm("and 01 02 03 would be 197121", long == 1 + 512 + 3 * 65536 == 197_121)

# %% [markdown]
# So the reader of the header is one line:


# %%
def read_header(raw):
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


for name, entry in read_header(raw).items():
    print(name, entry)

# %% [markdown]
# The seven spaces at the header's end are padding: with them the numbers begin at a
# multiple of eight, where a processor can use them as they lie. And a tensor is a few lines
# more. `torch.frombuffer` computes nothing; it declares that the bytes at a place *are* a
# tensor.

# %%
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_tensor(raw, name):
    entry = read_header(raw)[name]
    begin = 8 + int.from_bytes(raw[:8], "little")
    first, stop = entry["data_offsets"]
    dtype = DTYPES[entry["dtype"]]
    count = (stop - first) // dtype.itemsize
    flat = torch.frombuffer(raw, dtype=dtype, count=count, offset=begin + first)
    return flat.reshape(entry["shape"])


for name in "ab":
    print(name, read_tensor(raw, name).tolist())


def same_bits(x, y):
    """Equal shapes, kinds and bits; unlike ==, it tells -0 from 0, and NaN equals itself."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    bits = {2: torch.int16, 4: torch.int32}[x.dtype.itemsize]
    return torch.equal(x.view(bits), y.view(bits))


confirm("a as it was saved, bit for bit", same_bits(read_tensor(raw, "a"), a))
confirm("b as it was saved, bit for bit", same_bits(read_tensor(raw, "b"), b))

# %% [markdown]
# ## From bits to a number
#
# One step is left that `torch.frombuffer` did for us: how do `cd cc cc 3d` say 0.1? Read
# the bytes from the last to the first, write them as bits, and cut: one bit for the sign
# $s$, then $k$ bits for the exponent $E$, then $m$ bits for the fraction $M$ (both read as
# whole numbers). With $\beta = 2^{k-1} - 1$,
#
# $$
# v = (-1)^s \cdot
# \begin{cases}
# 2^{E-\beta} \left(1 + M / 2^{m}\right) & 0 < E < 2^k - 1, \\
# 2^{1-\beta} \, M / 2^{m} & E = 0.
# \end{cases}
# $$ (eq-checkpoint-float)
#
# $E = 2^k - 1$ is kept for $\pm\infty$ (with $M = 0$) and NaN. Checkpoints use three such
# kinds. They differ in nothing but $k$ and $m$:
#
# | | bytes | exponent bits, $k$ | fraction bits, $m$ |
# |---|---|---|---|
# | float32 (`F32`) | 4 | 8 | 23 |
# | bfloat16 (`BF16`) | 2 | 8 | 7 |
# | float16 (`F16`) | 2 | 5 | 10 |


# %%
def number_of(pattern, k, m):
    """The number that a bit pattern stands for; pattern is a whole number."""
    sign, rest = divmod(pattern, 2 ** (k + m))
    exponent, fraction = divmod(rest, 2**m)
    bias = 2 ** (k - 1) - 1
    if exponent == 2**k - 1:
        return float("nan") if fraction else (-1) ** sign * float("inf")
    if exponent == 0:
        return (-1) ** sign * 2.0 ** (1 - bias) * fraction / 2**m
    return (-1) ** sign * 2.0 ** (exponent - bias) * (1 + fraction / 2**m)


for place, k, m in ((136, 8, 23), (148, 8, 7)):  # 0.1 in a, and in b
    pattern = int.from_bytes(raw[place : place + (1 + k + m) // 8], "little")
    bits = f"{pattern:0{1 + k + m}b}"
    print(f"sign {bits[0]}  exponent {bits[1 : 1 + k]}  fraction {bits[1 + k :]}")
    print("is", number_of(pattern, k, m))

# %%
# Check eq-checkpoint-float.
torch.manual_seed(1)
every = torch.arange(2**16).to(torch.uint16)  # all patterns of two bytes
some = torch.randint(2**32, (5000,)).to(torch.uint32)
for dtype, patterns, k, m in (
    (torch.float16, every, 5, 10),
    (torch.bfloat16, every, 8, 7),
    (torch.float32, some, 8, 23),
):
    theirs = patterns.view(dtype).double()
    mine = torch.tensor(
        [number_of(p, k, m) for p in patterns.tolist()], dtype=torch.float64
    )
    confirm(
        f"{len(patterns):5} patterns of {dtype} decoded as torch does",
        torch.equal(mine.isnan(), theirs.isnan())
        and torch.equal(mine.nan_to_num(), theirs.nan_to_num()),
    )

# %% [markdown]
# float32 and bfloat16 have the same exponent, so a bfloat16 number is the upper half of
# a float32: look at 1 and −2.5 in the last two rows of {numref}`fig-checkpoint-dump`. 0.1 is
# rounded, `3dcccccd` to `3dcd`, and comes out as 0.1001. What float16 makes of large numbers
# is the story of {ref}`ch-half-precision`.

# %%
cut = a.view(torch.bfloat16)[:, 1::2]  # little-endian: the upper half is last
confirm(
    "1, -2.5 and 3 lose nothing when cut in half",
    torch.equal(cut.float()[a != 0.1], a[a != 0.1]),
)
confirm("0.1 does", cut[1, 0] != a[1, 0] and b[2] != a[1, 0])

# %% [markdown]
# ## The real file
#
# Nothing changes with size. Let $\mathcal T$ be the set of tensors, tensor $\tau$ with
# shape $(d_1, d_2, \dots)$ of numbers that take $w_\tau$ bytes each. The tensors stand one
# behind the other without a hole, so
#
# $$
# \text{bytes of the file} = 8 + n + \sum_{\tau \in \mathcal T} w_\tau \prod_i d_{\tau,i} .
# $$ (eq-checkpoint-size)
#
# Rows are stored one after the other, so element $(i, j)$ of a matrix with $C$ columns,
# whose bytes begin at offset $o_\tau$, is found at byte
#
# $$
# 8 + n + o_\tau + w_\tau \, (i \, C + j) .
# $$ (eq-checkpoint-place)
#
# We do not read the file, we *map* it: the operating system shows it to us as if it were
# in memory, and fetches a page of it when somebody looks there.

# %%
path = folder / "model.safetensors"
with path.open("rb") as file:
    # ACCESS_COPY: we may write into our view of it, and the file will not change.
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
header = read_header(mapped)
note = header.pop("__metadata__")
length = int.from_bytes(mapped[:8], "little")
print(f"{len(mapped):,} bytes, {length:,} of them header, {len(header)} tensors")
print(f"the one entry that is no tensor: {note}")

# %%
# Check eq-checkpoint-size and eq-checkpoint-place.
widths = {kind: dtype.itemsize for kind, dtype in DTYPES.items()}


def size_by_shapes(length, header):
    entries = header.values()
    numbers = sum(widths[e["dtype"]] * math.prod(e["shape"]) for e in entries)
    return 8 + length + numbers


confirm("the tiny file", len(raw) == size_by_shapes(summed, read_header(raw)))
confirm("the real one", len(mapped) == size_by_shapes(length, header))
confirm("which is 4 P and a header", len(mapped) == 8 + length + 4 * 134_515_008)
confirm("both begin their numbers at a multiple of 8", summed % 8 == length % 8 == 0)

embedding = "model.embed_tokens.weight"
first, _ = header[embedding]["data_offsets"]
place = 8 + length + first + 4 * (3575 * 576 + 11)
(weight,) = struct.unpack("<f", mapped[place : place + 4])
print(f"element (3575, 11) of the embedding is at byte {place:,}: {weight:.4f}")
with safe_open(path, framework="pt") as shard:
    confirm("as the library says", shard.get_tensor(embedding)[3575, 11] == weight)
    confirm(
        "and so with all 272 tensors, bit for bit",
        len(header) == 272
        and set(shard.keys()) == set(header)
        and all(
            same_bits(read_tensor(mapped, name), shard.get_tensor(name))
            for name in header
        ),
    )

# %% [markdown]
# The first sum is also $4 P$ with the parameter count $P$ of {eq}`eq-llama-count`: a file in float32
# has four bytes a parameter, and a header.
#
# The picture below is drawn from the header alone. It shows the file as a page, read from
# left to right and top to bottom; a row is as long as a layer.

# %% mystnb={"image": {"alt": "A page of 38 rows. The top eight rows are one blue block, the embedding, 21 percent of the file. Below, 30 equal rows, one a layer: three wide green pieces, down, gate and up, then four amber ones, k narrow, o, q, and v narrow, with thin black lines, the norms, between green and amber and at the end. The layers stand in the order 0, 1, 10, 11 and so on to 19, then 2, 20 to 29, then 3 to 9; the names of 10, 2, 20 and 3, where the count jumps, are bold."}, "figure": {"name": "fig-checkpoint-map", "caption": "Where the bytes of SmolLM2 are. The norms are the black lines: 2304 bytes each, and drawn wider than they are. Look at the order of the layers."}} tags=["hide-input"]
where = figures.map_data(header)
figures.draw_map(where)

# %%
blocks = [
    name.split(".")[2] for name in where.names if name.endswith("mlp.down_proj.weight")
]
print(*blocks[:14], "...")
confirm("the names are in alphabetical order", blocks == sorted(blocks))
confirm("so layer 9 is the last one", blocks[-1] == "9")
confirm(
    "no holes: each tensor begins where the one before ends",
    where.starts[0] == 0 and torch.equal(where.starts[1:], where.stops[:-1]),
)
first, stop = header[embedding]["data_offsets"]
print(f"embedding: {(stop - first) / len(mapped):.1%} of the file")
confirm("there is no head: it is tied", "lm_head.weight" not in header)
pairs = (("z", a), ("y", b), ("x", a), ("w", b.half()))
small = {name: tensor.clone() for name, tensor in pairs}
order = read_header(safetensors.torch.save(small))
confirm(
    "the library sorts by kind, F32, BF16, F16, and then by name",
    list(order) == ["x", "z", "y", "w"],
)

# %% [markdown]
# The library sorts when it writes: wider kinds first, and of the two with 16 bits
# bfloat16; those of one kind by name, and "10" comes before "2". To a reader it makes no
# difference: it goes by name. But who reads a file "in order" and counts layers gets
# layer 10 for the third.
#
# Now the first prediction. To list the tensors you need $8 + n$ bytes. To have one of
# them you need those and its own:


# %%
def read_one(path, name):
    """Read one tensor, and count the bytes that left the file."""
    with path.open("rb", buffering=0) as file:
        start = file.read(8)
        text = file.read(int.from_bytes(start, "little"))
        first, stop = json.loads(text)[name]["data_offsets"]
        file.seek(8 + len(text) + first)
        numbers = file.read(stop - first)
    return np.frombuffer(numbers, "<f4"), len(start) + len(text) + len(numbers)


last_norm, touched = read_one(path, "model.norm.weight")
print(f"the list: {(8 + length) / len(mapped):.4%} of the file")
print(f"the list and the last norm: {touched:,} bytes")
confirm(
    "the norm is right",
    np.array_equal(last_norm, read_tensor(mapped, "model.norm.weight")),
)

# %% [markdown]
# The list is 0.006 % of the file. Whoever only wants to know what is in a checkpoint, of
# whatever size, needs its first bytes. A mapping gives you the same without being asked,
# page by page. What that means for memory is for {ref}`ch-from-pretrained`; here is how
# the package goes through the files of a folder:

# %%
show(read_tensors)

# %% [markdown]
# ## Shards, and the index
#
# A file of 140 GB is awkward to send, so large checkpoints are cut into *shards*. Each is a
# whole safetensors file with a header of its own; no tensor is cut. A small JSON file, the
# index, says for each name which file to open. transformers writes one when the weights
# exceed a limit; let it be 20 KB for a random Llama.

# %%
torch.manual_seed(2)
original = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
        vocab_size=101,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=36,
        max_position_embeddings=64,
    )
).eval()
sharded = scratch / "sharded"
original.save_pretrained(sharded, max_shard_size="20KB")
print(*(file.name for file in sorted(sharded.glob("model*"))), sep="\n")

index = read_json(sharded / "model.safetensors.index.json")
shards = {
    file: bytearray((sharded / file).read_bytes())
    for file in sorted(set(index["weight_map"].values()))
}
name = "model.layers.1.mlp.up_proj.weight"
holder = index["weight_map"][name]
number = read_tensor(shards[holder], name)[0, 0]
print(f"{name}\n  is in {holder}\n  {read_header(shards[holder])[name]}")
print(f"  and begins with {number:.4f}")
confirm("it does", original.state_dict()[name][0, 0] == number)

# %% [markdown]
# Mind `total_size` in the index: it counts numbers only. The files are larger, each by its
# own $8 + n$.

# %%
print(index["metadata"])
heads = sum(8 + int.from_bytes(content[:8], "little") for content in shards.values())
confirm(
    "the files together = total_size + their headers",
    sum(map(len, shards.values())) == index["metadata"]["total_size"] + heads,
)
held = [
    (name, file)
    for file, content in shards.items()
    for name in read_header(content).keys() - {"__metadata__"}
]
confirm(
    "each name is in the file that the index says, and in no other",
    sorted(held) == sorted(index["weight_map"].items()),
)

# %% [markdown]
# ## The ladder of equality
#
# By hand = the library = the package = what transformers has in the model that it loads,
# tensor for tensor and bit for bit, across the shards.

# %%
rungs = {
    "by hand": {name: read_tensor(shards[file], name) for name, file in held},
    "library": {
        name: tensor
        for content in shards.values()
        for name, tensor in safetensors.torch.load(bytes(content)).items()
    },
    "package": dict(read_tensors(sharded)),
}
loaded = transformers.AutoModelForCausalLM.from_pretrained(sharded).state_dict()
for rung, tensors in rungs.items():
    confirm(
        f"{rung} = transformers",
        tensors.keys() == loaded.keys()
        and all(same_bits(tensors[name], loaded[name]) for name in loaded),
    )
confirm(
    "= what was saved",
    all(same_bits(loaded[n], t) for n, t in original.state_dict().items()),
)

# %% [markdown]
# ## The old way: a zip with a pickle
#
# Before safetensors there was `pytorch_model.bin`, and there are many around. It is what
# `torch.save` writes: a zip archive. The numbers lie in it as raw as in safetensors. But
# in the place of the JSON header is a *pickle*.

# %%
old = scratch / "old"
old.mkdir()
torch.save({"a": a}, old / "pytorch_model.bin")


def part_of(path, name):
    with zipfile.ZipFile(path) as archive:
        return archive.read(f"{path.stem}/{name}")


def imports(path):
    program = pickletools.genops(part_of(path, "data.pkl"))
    return [argument for op, argument, _ in program if op.name == "GLOBAL"]


confirm(
    "the numbers are the same sixteen bytes as in the picture",
    part_of(old / "pytorch_model.bin", "data/0") == raw[128:144],
)
print(*imports(old / "pytorch_model.bin"), sep="\n")

# %% [markdown]
# A pickle is no description but a program: import this, call it with that. The three names
# above are what `torch.save` wants to have called. Nothing keeps others from standing
# there. This object asks to be unpickled by calling `exec`:


# %%
class Hostile:
    def __reduce__(self):
        return exec, ("import __main__; __main__.visited = True",)


torch.save({"a": Hostile()}, old / "hostile.bin")
print(*imports(old / "hostile.bin"))
visited = False
torch.load(old / "hostile.bin", weights_only=False)
confirm("reading it has run code, here in this notebook", visited)

# %% [markdown]
# It could have been your files, or your keys. So: never `pickle.load` what others made.
# `torch.load` with `weights_only=True` (its default since version 2.6) runs the program on
# a small machine of its own that knows only a list of harmless names, and stops at any
# other. The package does not offer anything else.


# %%
COMPLAINTS = (ValueError, KeyError, TypeError, RuntimeError)
COMPLAINTS += (SafetensorError, UnpicklingError)


def attempt(read, given):
    """What was read, or None if the reader has complained."""
    try:
        return read(given)
    except COMPLAINTS:
        return None


def tensors_in(folder):
    return {name: tensor.clone() for name, tensor in read_tensors(folder)}


visited = False
found = attempt(torch.load, old / "hostile.bin")
confirm("torch.load refuses it, and nothing ran", found is None and not visited)
confirm("the package reads the good one", same_bits(tensors_in(old)["a"], a))
(old / "hostile.bin").replace(old / "pytorch_model.bin")
found = attempt(tensors_in, old)
confirm("and refuses the hostile one, and nothing ran", found is None and not visited)

# %% [markdown]
# :::{admonition} One more: GGUF
# :class: note
# llama.cpp's format has the same plan in binary: counts, pairs of key and value, a table of
# tensors, numbers. The pairs hold *everything*, sizes, tokenizer and chat template, so that
# one file is the whole model; and the numbers may be quantised in blocks. SmolLM2 came to
# us this way: {py:mod}`annotated_src.gguf` reads the file, and
# {py:mod}`annotated_src.gguf_to_hf` makes the folder of it.
# :::
#
# :::{admonition} Docs and code
# :class: paper-code
# The README of safetensors promises for its files: no holes and no overlaps between
# tensors, and no key of the header twice; of the second it adds that not every parser
# keeps to it. Does the library itself? It keeps the first promise, and not the second: of
# two entries with one name, the last wins. Two programs that read such a file may then see
# two different models.
# :::
#
# Here are three readers, ours from above among them, and files whose headers lie: those
# of which the README speaks, one that promises more bytes than follow, and one with a length
# beyond all measure.


# %%
def by_hand(content):
    content = bytearray(content)
    return {name: read_tensor(content, name) for name in read_header(content)}


def by_library(content):
    return safetensors.torch.load(bytes(content))


def by_package(content):
    (tiny_folder / "model.safetensors").write_bytes(content)
    return tensors_in(tiny_folder)


tiny_folder = scratch / "tiny"
tiny_folder.mkdir()
READERS = {"by hand": by_hand, "library": by_library, "package": by_package}


def pack(header, numbers, length=None):
    """A safetensors file of a header in words, true or not."""
    return struct.pack("<Q", length or len(header)) + header.encode() + numbers


def entry(name, first, stop, shape):
    return f'"{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{first},{stop}]}}'


four = a.numpy().tobytes()
good = pack(f"{{{entry('x', 0, 8, [2])},{entry('y', 8, 16, [2])}}}", four)
lies = {
    "good": good,
    "overlap": pack(f"{{{entry('x', 0, 12, [3])},{entry('y', 8, 16, [2])}}}", four),
    "hole": pack(f"{{{entry('x', 0, 4, [1])},{entry('y', 8, 16, [2])}}}", four),
    "name twice": pack(f"{{{entry('x', 0, 8, [2])},{entry('x', 0, 16, [4])}}}", four),
    "too short": good[:-4],
    "length 2^60": pack("{}", four, 2**60),
}
refused = {}
for lie, content in lies.items():
    refused[lie] = [name for name in READERS if attempt(READERS[name], content) is None]
    print(f"{lie:11}  refused: {', '.join(refused[lie]) or '-'}")
for name in ("library", "package"):
    passes = [lie for lie in lies if name not in refused[lie]]
    confirm(
        f"the {name} keeps the first promise only", passes == ["good", "name twice"]
    )
last = attempt(by_library, lies["name twice"])
confirm("of two with one name, the last wins", same_bits(last["x"], a.flatten()))

# %% [markdown]
# :::{admonition} Break it
# :class: break-it
# Flip, one at a time, *every bit* of the tiny file.
# :::


# %%
def flip(content, i, bit):
    spoilt = bytearray(content)
    spoilt[i] ^= 1 << bit
    return spoilt


PARTS = {"length": range(8), "header": range(8, 128), "numbers": range(128, 150)}
passed = {}  # by part and reader: what was read although a bit was wrong
for part, places in PARTS.items():
    spoilt = [flip(raw, i, bit) for i in places for bit in range(8)]
    for name, read in READERS.items():
        found = [attempt(read, content) for content in spoilt]
        passed[part, name] = [tensors for tensors in found if tensors is not None]
    counts = "  ".join(f"{name} {len(passed[part, name]):3}" for name in READERS)
    print(f"{part:8} {len(spoilt):3} bits, unnoticed: {counts}")
confirm(
    "what the library overlooks in the header has changed a name",
    all(set(tensors) != {"a", "b"} for tensors in passed["header", "library"]),
)
believed = [t for t in passed["header", "by hand"] if set(t) == {"a", "b"}]
confirm("by hand, two more pass, with the names unchanged", len(believed) == 2)

# %% [markdown]
# The header protects itself. A flipped bit there is noticed, or else it has renamed a
# tensor, and a strict loader asks for each name ({ref}`ch-llama`). Our few lines do nearly
# as well by accident; only twice do they believe a false end in `data_offsets`. In the
# numbers *nobody* notices anything: every pattern is a number, if a strange one. And the
# numbers are 99.99 % of the real file. That is the second prediction: of 4.3 billion flips,
# the library can notice a quarter of a million at most.

# %%
bits = 8 * len(mapped)
share = 1 - (8 + length) / len(mapped)
print(f"{bits:,} bits, {share:.2%} of them in numbers; outside: {8 * (8 + length):,}")
confirm("a quarter of a million at most", 8 * (8 + length) <= 250_000)

# %% [markdown]
# And what does a flip do? By {eq}`eq-checkpoint-float` the bit at place $i$ of the
# fraction changes a number by $2^{i-m}$ of its power of two. The bit at place $j$ of the
# exponent is worth $2^j$ in $E$. While neither $E$ is an extreme one,
#
# $$
# v' = v \cdot 2^{\pm 2^{j}},
# \qquad \text{up where the bit was 0, down where it was 1.}
# $$ (eq-checkpoint-flip)
#
# The highest bit of the exponent is worth a factor of $2^{128}$. It is 1 in numbers from 2
# upwards, which among weights are rare. In all others it is 0, and its flip goes up.

# %%
# Check eq-checkpoint-flip.
pattern = int.from_bytes(mapped[place : place + 4], "little")
value = number_of(pattern, 8, 23)
exponent, exact = (pattern >> 23) % 256, []
for j in range(8):
    power = -(2**j) if exponent >> j & 1 else 2**j
    flipped = number_of(pattern ^ 1 << (23 + j), 8, 23)
    exact.append(flipped == value * 2.0**power)
    print(f"bit {23 + j}, is {exponent >> j & 1}: {value:.3f} becomes {flipped:.3g}")
confirm("all eight as the formula says, exactly", all(exact))
large = sum(int((read_tensor(mapped, name).abs() >= 2).sum()) for name in header)
print(f"weights from 2 upwards, or from -2 downwards: {large} of 134.5 million")

# %% [markdown]
# That weight was not taken at random. Row 3575 of the embedding is the word "capital", and
# the model reads it in our question. Flip bit 25, in our copy of the map only, hand the
# tensor to the model, and ask again.

# %%
model = load_model(folder)
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
prompt = torch.tensor([tokenizer.encode("The capital of France is").ids])
confirm("the second token is row 3575", prompt[0, 1] == 3575)


def answer(model):
    return tokenizer.decode(generate(model, prompt, max_new_tokens=6)[0].tolist())


right = answer(model)
mapped[place + 3] ^= 1 << 1  # bit 25 is bit 1 of the fourth byte
model.embedding.weight.copy_(read_tensor(mapped, embedding))
wrong = answer(model)
mapped[place + 3] ^= 1 << 1
model.embedding.weight.copy_(read_tensor(mapped, embedding))
print(repr(right))
print(repr(wrong))
confirm("the question is the same, the answer is not", right != wrong)
largest = model.embedding.weight.abs().max()
confirm("and the embedding holds larger ones than 1.83", largest > 1.83)
confirm("flipped back, all is well", answer(model) == right)

# %% [markdown]
# The third prediction. One bit of 4.3 billion, no error, no NaN, no strange weight (the
# embedding has larger ones), and a fluent sentence that is wrong. Here are all 32 bits of this
# weight:

# %% mystnb={"image": {"alt": "Thirty-two bars on a logarithmic scale, one for each bit of a weight, from the sign at the left to the last bit of the fraction at the right. The fraction's bars fall like a staircase, each half as high as the one before, from 0.19 down to a floor below 0.0001, where last digits differ. The exponent's bars are near 0.7, except two: the highest exponent bit moves a logit by 8 times 10 to the 37 and the answer is not Paris; bit 25 moves one by 10 and the answer is 1000. Those two, the only orange bars, are the exponent bits that were 0. A dashed line marks 2.5, by which Paris leads."}, "figure": {"name": "fig-checkpoint-flips", "caption": "Element (3575, 11) of SmolLM2's embedding, −0.114, with one bit flipped at a time: how far the logits of the next token move. The digits below are the weight's 32 bits."}} tags=["hide-input"]
flips = figures.flip_data(model, prompt, "embedding.weight", (3575, 11))
figures.draw_flips(flips, {25: "bit 25: “1000.”", 30: "bit 30: not “Paris”"})

# %%
paris = prompt.new_tensor(tokenizer.encode(" Paris").ids)
others = (flips.answers != paris).nonzero().flatten().tolist()
print("another answer with bits", others)
confirm("both are exponent bits that were 0", not flips.is_set[others].any())
steps = flips.change[17:23] / flips.change[16:22]
confirm(
    "the upper bits of the fraction: each moves twice as much as the next",
    (steps - 2).abs().max() < 0.1,
)
confirm(
    "all other changes stay below the lead",
    flips.change.sort().values[:30].max() < flips.lead,
)

torch.manual_seed(3)
matrices = [weight for weight in model.parameters() if weight.ndim == 2]
lost = []
for _ in range(40):
    bits = matrices[torch.randint(len(matrices), ())].detach().view(torch.int32)
    i, bit = torch.randint(bits.numel(), ()), int(torch.randint(32, ()))
    at = divmod(int(i), bits.shape[1])  # row and column
    mask = (1 << bit) - (bit == 31) * 2**32  # in int32 the highest bit counts negative
    bits[at] ^= mask
    if model(prompt)[0, -1].argmax() != paris:
        lost.append(bit)
    bits[at] ^= mask
print(f"40 random bits of random matrices: {40 - len(lost)} times still Paris")
confirm("else it was the highest bit of the exponent", set(lost) == {30})

# %% [markdown]
# Most flips do nothing that one would see, which makes the others worse. Since no reader can
# know, somebody else must: a *checksum* of the whole file, published beside it. SHA-256
# comes out entirely different for one different bit. The package checks one when it
# fetches SmolLM2 ({py:func}`annotated_src.weights.verify`).

# %%
published = hashlib.sha256(raw).hexdigest()
copy = scratch / "copy"
copy.write_bytes(raw)
verify(copy, published)
copy.write_bytes(flip(raw, 139, 1))
try:
    verify(copy, published)
    noticed = False
except WeightsError:
    noticed = True
confirm("one bit in a number: the checksum notices", noticed)

# %% [markdown]
# ## Exercises
#
# Write your function in a cell of your own and give it to `check`. A question takes its
# name and a letter: `check("half_the_space", "a")`.

# %%
from annotated_src.exercises import check  # noqa: F401 - for your cells
from annotated_src.exercises.checkpoint import chapter as exercises

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("read_row")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("read_row")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
read_row = exercises["read_row"].solution
five = torch.stack([read_row(mapped, embedding, i) for i in prompt[0].tolist()])
confirm("five rows of 49152", same_bits(five, model.embedding.weight[prompt[0]]))

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("write_safetensors")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("write_safetensors")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
write_safetensors = exercises["write_safetensors"].solution
confirm("the tiny file, byte for byte", write_safetensors({"b": b, "a": a}) == raw)
mixed = {
    "one": torch.rand(3, 5),
    "half": torch.rand(7).half(),
    "rough": torch.rand(3).bfloat16(),
    "Two": torch.rand(2, 1, 2),
}
confirm("and another", write_safetensors(mixed) == safetensors.torch.save(mixed))

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("half_the_space")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("half_the_space")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
torch.manual_seed(4)
weights = torch.randn(100_000) * 0.02
dropped = (weights.view(torch.int32) & ~0xFFFF).view(torch.float32)


def shrinks(x):
    return (1 - x.double().abs().sum() / weights.double().abs().sum()).item()


def errors(x):
    return (x.double() / weights.double() - 1).abs()


confirm("dropping: smaller by over 0.25 %", 2.5e-3 < shrinks(dropped) < 3e-3)
confirm("rounding: not", abs(shrinks(weights.bfloat16())) < 1e-4)
confirm("cut: within 2^-7", errors(dropped).max() < 2**-7)
confirm("rounded: within 2^-8", errors(weights.bfloat16()).max() <= 2**-8)
usual = weights.abs() > 1e-3
confirm("float16: 8 times finer", errors(weights.half())[usual].max() <= 2**-11)
confirm("    and no smaller", abs(shrinks(weights.half())) < 1e-4)
ends = torch.tensor([1e-9, 1e6])
print("float16 makes", ends.half().tolist(), "of 1e-9 and 1e6")
confirm("bfloat16 keeps both", ((ends.bfloat16() - ends) / ends).abs().max() < 2**-8)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("bits_to_number")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("bits_to_number")

# %% [markdown]
# One more, without a function. A colleague's reader gives tensors of the right shapes, and
# the model writes rubbish. The embedding, float32, begins with the six numbers that the
# next cell prints. They are not weights. What are they, and which mistake is it?

# %%
flat = np.frombuffer(mapped, "<f4", count=6, offset=8)
print(*(f"{number:.4g}" for number in flat))

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
# Look at them as bytes. The reader added the offsets to 8, not to 8 + n, and what it takes
# for weights is JSON. No shape shows it, and only the first 7592 values of the first
# tensor are text; all others are weights, from the wrong place.
print(flat.tobytes().decode())
confirm("shifted by 7592 numbers", length == 4 * 7592)
temporary.cleanup()

# %% [markdown]
# ## What to remember
#
# - A checkpoint is a folder: JSON says what to build and how to treat text, one or more
#   binary files hold the weights, by name.
# - A safetensors file is 8 bytes of length, a JSON header, and numbers without holes. Its
#   reader is one line, and a tensor is a few more.
# - Offsets count from the end of the header; layers stand in the order of their names.
# - Shards are whole files. The index maps names to files, and `total_size` counts numbers only.
# - A `.bin` is a zip with a program in it. Run it on a machine that knows only weights, or
#   not at all.
# - Format checks protect the header. Only a checksum protects the numbers.
#
# **Where to read on.** safetensors: `safetensors/src/tensor.rs`, `Metadata::validate`
# (what makes it refuse), and the format section of its README. transformers:
# `modeling_utils.py`, `load_state_dict` (the two kinds of file) and
# `PreTrainedModel.save_pretrained` (the shards); `utils/hub.py`,
# `get_checkpoint_shard_files` (the index). PyTorch: `torch/_weights_only_unpickler.py`
# (the small machine, with its list). ggml: `docs/gguf.md`. Next,
# {ref}`ch-from-pretrained` makes a model of these bytes.
