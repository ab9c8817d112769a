"""Exercises on a checkpoint's bytes: find a row, read a number, write a file."""

import json
import math
import struct

import torch

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.exercise import Choice

chapter = Chapter("text/01_checkpoint", "What a checkpoint is")


@chapter.implement(
    title="one row of a matrix",
    minutes=10,
    difficulty="moderate",
    section="A file small enough to see every byte",
    text="""
A prompt of five tokens needs five rows of the embedding. `raw` is a whole safetensors
file. Give one row of the matrix of a name, in the kind of number that the file says:
`F32`, `F16` or `BF16`. Write it without looking up `read_tensor`; `torch.frombuffer`
makes a tensor of bytes, and wants a `bytearray`.
""",
    hints=(
        "Eight bytes, a header, numbers. What do the offsets in the header count from?",
        "A row has as many numbers as the matrix has columns, and a number as many "
        "bytes as its kind says: `dtype.itemsize`. All rows before it lie in front.",
    ),
    proves="The row is found by its name, in every kind of number, wherever its tensor "
    "lies in the file and whatever its shape.",
    why="The byte is $8 + n + o + w \\, i \\, C$: length, header, offset, and $i$ "
    "rows of $C$ numbers of $w$ bytes. (The library's `get_slice` is made for it.)",
    atol=0.0,
)
def read_row(raw, name, row):
    """Bytes of a file, a name, a number from 0 -> (columns,), in the file's dtype."""
    start = 8 + int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8:start])[name]
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    dtype, columns = kinds[entry["dtype"]], entry["shape"][1]
    width = columns * dtype.itemsize
    place = start + entry["data_offsets"][0] + row * width
    return torch.frombuffer(bytearray(raw[place : place + width]), dtype=dtype)


@read_row.cases
def _(draw):
    file = write_safetensors.solution
    yield file({"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}), "a", 1
    yield file({"a": draw.normal(3, 2), "b": draw.normal(2, 5)}), "b", 0
    down, up, norm = (f"model.layers.0.mlp.{x}.weight" for x in ("down", "up", "norm"))
    mixed = {
        up: draw.normal(6, 4),
        norm: draw.normal(3, 5).half(),
        down: draw.normal(7, 3),
    }
    for name, row in ((up, 5), (norm, 2), (down, 3)):
        yield file(mixed), name, row
    brain = {"a": draw.normal(2, 3), "b": draw.normal(4, 3).bfloat16()}
    yield file(brain), "b", 3


read_row.equivalent(
    'start = 8 + int.from_bytes(raw[: 7], "little")',
    because="the eighth byte of the length is 0 in every file that fits on a disk",
)


@read_row.also("struct, and no buffer of torch")
def _(raw, name, row):
    (length,) = struct.unpack("<Q", raw[:8])
    entry = json.loads(raw[8 : 8 + length].decode())[name]
    first, stop = entry["data_offsets"]
    rows, columns = entry["shape"]
    width = (stop - first) // rows  # of a row, in bytes
    begin = 8 + length + first + row * width
    data = raw[begin : begin + width]
    if entry["dtype"] == "BF16":  # the upper half of a float32
        data = b"".join(b"\0\0" + data[i : i + 2] for i in range(0, width, 2))
    code, dtype = {
        "F32": ("f", torch.float32),
        "F16": ("e", torch.float16),
        "BF16": ("f", torch.bfloat16),
    }[entry["dtype"]]
    return torch.tensor(struct.unpack(f"<{columns}{code}", data)).to(dtype)


@read_row.also("the whole matrix, then the row")
def _(raw, name, row):
    raw = bytearray(raw)
    start = 8 + sum(byte * 256**i for i, byte in enumerate(raw[:8]))
    entry = json.loads(raw[8:start])[name]
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    first, stop = entry["data_offsets"]
    part = raw[start + first : start + stop]
    flat = torch.frombuffer(part, dtype=kinds[entry["dtype"]])
    return flat.reshape(entry["shape"])[row].clone()


def row_by(
    length=lambda raw: int.from_bytes(raw[:8], "little"),
    kind=lambda entry: entry["dtype"],
    begin=lambda n: 8 + n,
    before=lambda row, rows, columns, width: row * columns * width,
    step=lambda rows: 1,
    wanted=lambda header, name: name,
):
    """Make a reader with one thing changed: what comes before a row, for instance."""
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

    def read(raw, name, row):
        n = length(raw)
        header = json.loads(raw[8 : 8 + n])
        entry = header[wanted(header, name)]
        dtype, (rows, columns) = kinds[kind(entry)], entry["shape"]
        place = begin(n) + entry["data_offsets"][0]
        place += before(row, rows, columns, dtype.itemsize)
        count = (columns - 1) * step(rows) + 1
        found = torch.frombuffer(bytearray(raw), dtype=dtype, count=count, offset=place)
        return found[:: step(rows)]

    return read


read_row.mistake(
    "offsets from the file's first byte",
    because="an offset in a file usually counts from its beginning; these count from "
    "the end of the header, so that the header's own length does not move them",
)(row_by(begin=lambda n: 0))
read_row.mistake(
    "offsets from behind the length",
    because="the eight bytes are remembered and the header is not; what is read is "
    "JSON, taken for numbers",
)(row_by(begin=lambda n: 8))
read_row.mistake(
    "the length read big end first",
    because="we write numbers so, and networks send them so; the length is then "
    "larger than any disk, and numbers are read as JSON",
)(row_by(length=lambda raw: int.from_bytes(raw[:8], "big")))
read_row.mistake(
    "the length read as text",
    because="the header is text, so its length might be; it is a binary number",
)(row_by(length=lambda raw: int(raw[:8])))
read_row.mistake(
    "one byte for the length",
    because="the seven bytes behind the first are 0 in a tiny file; a header of 256 "
    "bytes needs the second",
)(row_by(length=lambda raw: raw[0]))
read_row.mistake(
    "always float32",
    because="most small files are, and reading them works; of 16-bit numbers two then "
    "make one",
    section="From bits to a number",
)(row_by(kind=lambda entry: "F32"))
read_row.mistake(
    "float16 for bfloat16",
    because="both have 16 bits, and numpy knows only the one; they cut them "
    "differently",
    section="From bits to a number",
)(row_by(kind=lambda entry: entry["dtype"].removeprefix("B")))
read_row.mistake(
    "rows times rows",
    because="either number of the shape looks like the one to multiply by, and in a "
    "square matrix both are right",
    section="The real file",
)(row_by(before=lambda row, rows, columns, width: row * rows * width))
read_row.mistake(
    "numbers for bytes",
    because="an index counts numbers, as in a tensor; a place in a file counts bytes",
    section="The real file",
)(row_by(before=lambda row, rows, columns, width: row * columns))
read_row.mistake(
    "column after column",
    because="Fortran and some libraries of linear algebra store matrices so; here the "
    "numbers of a row are neighbours",
    section="The real file",
)(row_by(before=lambda row, rows, columns, width: row * width, step=lambda rows: rows))
read_row.mistake(
    "the header's first tensor",
    because="a file tried out has one tensor; the library sorts what it writes, wider "
    "kinds first and then by name",
    section="The real file",
)(row_by(wanted=lambda header, name: next(iter(header))))


@chapter.implement(
    title="the other direction",
    minutes=15,
    difficulty="hard",
    section="A file small enough to see every byte",
    text="""
Write `write_safetensors`: the bytes of a safetensors file, equal to those that the
library writes. Eight bytes of length; then JSON with `dtype` (`F32`, `F16`, `BF16`),
`shape` and `data_offsets` for each name, in this order and without any spaces between;
then as many spaces as it takes, maybe none, for the numbers to begin at a multiple of
8; then the numbers, row after row. Tensors stand in the order of their kinds, `F32`,
`BF16`, `F16`, and those of one kind in the order of their names, as strings.
(`x.flatten().view(torch.uint8).numpy().tobytes()` gives a tensor's bytes.)
""",
    hints=(
        "Sort the names first: the offsets follow from the order. Keep what you have "
        "of the numbers, and its length is the next offset.",
        '`json.dumps(header, separators=(",", ":"))` leaves out spaces. The '
        "padding is part of the header, so the length counts it.",
    ),
    proves="The file is the library's to the byte, for all three kinds, several "
    "shapes, a transposed matrix, and a header that needs no padding.",
    why="“Wider kinds first” leaves one thing open: of the two kinds of 16 bits the "
    "library puts bfloat16 first.",
)
def write_safetensors(tensors):
    """Write tensors, a dictionary by name, into bytes."""
    kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    order = list(kinds)
    header, numbers = {}, b""
    for name in sorted(tensors, key=lambda n: (order.index(tensors[n].dtype), n)):
        x = tensors[name]
        data = x.flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": kinds[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [len(numbers), len(numbers) + len(data)],
        }
        numbers += data
    words = json.dumps(header, separators=(",", ":")).encode()
    words += b" " * (-len(words) % 8)
    return struct.pack("<Q", len(words)) + words + numbers


@write_safetensors.cases
def _(draw):
    yield ({"a": torch.tensor([1.0])},)
    yield ({"b": draw.normal(2), "a": draw.normal(1)},)
    yield ({"a": draw.normal(3).half(), "bb": draw.normal(2, 2)},)
    yield ({"turned": draw.normal(2, 3).T},)
    yield ({"abc": draw.normal(1)},)  # a header that ends where it should
    yield ({"h.10": draw.normal(2), "h.9": draw.normal(2), "h.8": draw.normal(1)},)
    yield ({"a": draw.normal(2).half(), "b": draw.normal(1).bfloat16()},)
    yield (
        {
            "one": draw.normal(3, 5),
            "half": draw.normal(7).bfloat16(),
            "Two": draw.normal(2, 1, 2),
        },
    )


def file_of(
    key=lambda name, x: (-x.itemsize, x.dtype == torch.float16, name),
    data=lambda x: x.flatten().view(torch.uint8).numpy().tobytes(),
    unit=lambda x: 1,
    padding=b" ",
    spaces=lambda n: -n % 8,
    length=lambda words, padded: len(padded),
    code="<Q",
    separators=(",", ":"),
):
    """Make a writer with another order, numbers, offsets, padding or length."""
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

    def write(tensors):
        header, numbers, at = {}, b"", 0
        order = sorted(tensors, key=lambda n: key(n, tensors[n])) if key else tensors
        for name in order:
            x = tensors[name]
            stop = at + len(data(x)) // unit(x)
            header[name] = {
                "dtype": kinds[x.dtype],
                "shape": list(x.shape),
                "data_offsets": [at, stop],
            }
            numbers, at = numbers + data(x), stop
        words = json.dumps(header, separators=separators).encode()
        padded = words + padding * spaces(len(words))
        return struct.pack(code, length(words, padded)) + padded + numbers

    return write


@write_safetensors.also("two passes: places, then bytes")
def _(tensors):
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    names = [n for kind in kinds for n in sorted(tensors) if tensors[n].dtype == kind]
    entries, at = [], 0
    for name in names:
        x = tensors[name]
        kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
        shape = ",".join(map(str, x.shape))
        stop = at + x.nbytes
        entries.append(
            f'"{name}":{{"dtype":"{kind[str(x.dtype)[6:]]}","shape":[{shape}],'
            f'"data_offsets":[{at},{stop}]}}'
        )
        at = stop
    text = "{" + ",".join(entries) + "}"
    while len(text) % 8:
        text += " "
    out = bytearray(len(text).to_bytes(8, "little") + text.encode())
    for name in names:
        bits = torch.int32 if tensors[name].itemsize == 4 else torch.int16
        for number in tensors[name].contiguous().view(bits).flatten().tolist():
            out += number.to_bytes(bits.itemsize, "little", signed=True)
    return bytes(out)


@write_safetensors.also("the library")
def _(tensors):
    from safetensors.torch import save

    return save({name: x.contiguous() for name, x in tensors.items()})


write_safetensors.mistake(
    "by name alone",
    because="the names of a real file stand in alphabetical order; it has one kind of "
    "number, and wider kinds would come first",
    section="The real file",
)(file_of(key=lambda name, x: name))
write_safetensors.mistake(
    "by width, then by name",
    because="wider kinds do come first; but bfloat16 and float16 are equally wide, and "
    "still two kinds",
    section="The real file",
)(file_of(key=lambda name, x: (-x.itemsize, name)))
write_safetensors.mistake(
    "layers as one counts them",
    because="9 comes before 10; but names are strings, and “1” comes before “9”",
    section="The real file",
)(
    file_of(
        key=lambda name, x: (
            -x.itemsize,
            x.dtype == torch.float16,
            [int(part) if part.isdigit() else part for part in name.split(".")],
        )
    )
)
write_safetensors.mistake(
    "as the dictionary has them",
    because="dictionaries keep their order, and readers go by name; such a file is "
    "sound, but not the library's",
    section="The real file",
)(file_of(key=None))
write_safetensors.mistake(
    "no padding",
    because="the length says where the header ends, so none seems needed; with it "
    "numbers begin at a multiple of eight",
)(file_of(padding=b""))
write_safetensors.mistake(
    "eight spaces where none are needed",
    because="`8 - n % 8` is the distance to the next multiple, and 8 where `n` is one "
    "already; `-n % 8` is then 0",
)(file_of(spaces=lambda n: 8 - n % 8))
write_safetensors.mistake(
    "padded with zero bytes",
    because="binary files are padded with zeros; this is text, and a zero byte is no "
    "JSON",
)(file_of(padding=b"\0"))
write_safetensors.mistake(
    "the length without the padding",
    because="the JSON ends before the spaces; but a reader takes what follows the "
    "length for numbers",
)(file_of(length=lambda words, padded: len(words)))
write_safetensors.mistake(
    "big end first",
    because="`struct` writes `>` as readily as `<`, and we write numbers that way",
)(file_of(code=">Q"))
write_safetensors.mistake(
    "offsets in numbers",
    because="a tensor's places count numbers; `data_offsets` count bytes",
    section="The real file",
)(file_of(unit=lambda x: x.itemsize))
write_safetensors.mistake(
    "as it lies in memory",
    because="a transposed matrix shares its memory with the original, which lies "
    "there row by row; the file wants the rows of the transposed one",
    section="The real file",
)(file_of(data=lambda x: bytes(x.untyped_storage())))
write_safetensors.mistake(
    "JSON with spaces",
    because="`json.dumps` puts one after each comma and colon unless told otherwise; "
    "every reader takes it, but a checksum tells it from the library's",
)(file_of(separators=None))


chapter.explain(
    "half_the_space",
    title="half the space",
    minutes=6,
    difficulty="moderate",
    section="From bits to a number",
    text=r"""
To save a float32 model in half the space, one colleague drops the two lower bytes of
each number, another calls `.half()`, a third `.bfloat16()`. The weights are of size
0.02; one of them is $10^{-9}$. Which of the three makes the weights smaller on average,
and which loses the small one?
""",
    hints=(
        "What is the upper half of a float32? Does dropping the rest round up or down?",
        "For which exponents has float16 no normal numbers left? And bfloat16?",
    ),
    choices={
        "a": Choice(
            "`.bfloat16()` makes them smaller, since it keeps the fewest digits; "
            "nobody loses the small one.",
            "Few digits make errors large, but `.bfloat16()` rounds to the nearest "
            "number, up as often as down. And float16 does lose it.",
        ),
        "b": Choice(
            "`.half()` does both: what it cannot hold becomes smaller, or 0.",
            "It makes 0 of $10^{-9}$, yes. But at 0.02 it rounds to the nearest, "
            "either way, and eight times as finely as bfloat16.",
        ),
        "c": Choice(
            "Dropping bytes makes them smaller; `.half()` loses the small one.",
            "Dropping bytes leaves a bfloat16 that is cut, not rounded: a weight's "
            "size never grows. float16 has three more bits of fraction than bfloat16 "
            "and three fewer of exponent, so $10^{-9}$ is 0 to it.",
        ),
        "d": Choice(
            "None makes them smaller, and the two that keep 16 bits of a float32 lose "
            "the small one.",
            "Both bfloat16s, cut or rounded, have float32's exponent: they keep "
            "$10^{-9}$. And to cut is to go towards zero, each time.",
        ),
    },
    right="c",
    why="Cut, a weight shrinks by up to $2^{-7}$ of itself, and all together by a "
    "little over a quarter of a percent. Rounded, the errors are up to $2^{-8}$, "
    "either way. And $10^6$, which both bfloat16s keep, is infinity in float16.",
)


@chapter.debug(
    title="from bits to a number",
    minutes=10,
    difficulty="moderate",
    section="From bits to a number",
    text="""
`pattern` holds the bits of a number as an int: a sign, then `k` bits of exponent, then
`m` of fraction, as in the chapter. This function reads nearly all weights of a model as
it should, but those that are 0 come out as something else. Mend it, for every pattern.
""",
    hints=(
        "What are the bits of zero? What does the formula make of them?",
        "Where the exponent's bits are all 0 there is no one in front of the "
        "fraction. And the power is that of exponent 1, so that no gap is left.",
    ),
    proves="Every kind of pattern is read: normal numbers, the small ones at the "
    "lower end, zero, infinity and NaN, with any `k` and `m`.",
    why="With a one always in front there would be no zero. At $E = 0$ the numbers "
    r"are $2^{1-\beta} M / 2^m$: they go on at the step of $E = 1$, down to 0.",
    atol=0.0,
    rtol=0.0,
)
def bits_to_number(pattern, k, m):
    """Three ints -> the number that the pattern stands for."""
    sign, rest = divmod(pattern, 2 ** (k + m))
    exponent, fraction = divmod(rest, 2**m)
    bias = 2 ** (k - 1) - 1
    if exponent == 2**k - 1:
        return (-1) ** sign * math.inf if fraction == 0 else math.nan
    if exponent == 0:
        return (-1) ** sign * 2.0 ** (1 - bias) * fraction / 2**m
    return (-1) ** sign * 2.0 ** (exponent - bias) * (1 + fraction / 2**m)


@bits_to_number.broken(
    "a one in front, always",
    because="the formula for weights of ordinary size has it, and nearly all weights "
    "are of ordinary size",
)
def _(pattern, k, m):
    sign, rest = divmod(pattern, 2 ** (k + m))
    exponent, fraction = divmod(rest, 2**m)
    bias = 2 ** (k - 1) - 1
    if exponent == 2**k - 1:
        return (-1) ** sign * math.inf if fraction == 0 else math.nan
    return (-1) ** sign * 2.0 ** (exponent - bias) * (1 + fraction / 2**m)


@bits_to_number.cases
def _(draw):
    for pattern in (0b0_000_00, 0b0_000_01, 0b1_000_11, 0b0_011_00, 0b1_100_10):
        yield pattern, 3, 2
    for pattern in (0b0_111_00, 0b1_111_00, 0b0_111_01):
        yield pattern, 3, 2
    for pattern in (0x3DCCCCCD, 0xC0200000, 0x00000001, 0x807FFFFF, 0x7F800000):
        yield pattern, 8, 23
    for k, m in ((8, 7), (5, 10)):
        for sign in (0, 1):
            exponent = draw.integer(1, 2**k - 1)
            fraction = draw.integer(1, 2**m)
            yield (sign << (k + m)) + (exponent << m) + fraction, k, m
        yield draw.integer(1, 2**m), k, m


bits_to_number.equivalent(
    "return (- 2) ** sign * math.inf if fraction == 0 else math.nan",
    because="twice infinity is infinity",
)


@bits_to_number.also("letters")
def _(pattern, k, m):
    bits = f"{pattern:0{1 + k + m}b}"
    sign = -1.0 if bits[0] == "1" else 1.0
    exponent, fraction = bits[1 : 1 + k], bits[1 + k :]
    if "0" not in exponent:
        return math.nan if "1" in fraction else sign * math.inf
    normal = "1" in exponent
    power = (int(exponent, 2) if normal else 1) - (2 ** (k - 1) - 1)
    value = float(normal)
    for place, bit in enumerate(fraction, start=1):
        value += int(bit) / 2**place
    return sign * value * 2.0**power


@bits_to_number.also("shifts and ldexp")
def _(pattern, k, m):
    exponent, fraction = pattern >> m & (1 << k) - 1, pattern & (1 << m) - 1
    if exponent == (1 << k) - 1:
        value = math.nan if fraction else math.inf
    else:
        whole = fraction + (1 << m if exponent else 0)
        value = math.ldexp(whole, max(exponent, 1) - (1 << k - 1) + 1 - m)
    return -value if pattern >> k + m else value


def wrong_bits(
    bias=lambda k: 2 ** (k - 1) - 1,
    steps=lambda m: 2**m,
    lowest=1,
    infinity=True,
    special=True,
):
    """Make a reader with another bias, step, lowest power, or upper end."""

    def read(pattern, k, m):
        sign, rest = divmod(pattern, 2 ** (k + m))
        exponent, fraction = divmod(rest, 2**m)
        if special and exponent == 2**k - 1:
            if fraction == 0 and infinity:
                return (-1) ** sign * math.inf
            return math.nan
        power = 2.0 ** ((exponent or lowest) - bias(k))
        return (-1) ** sign * power * ((exponent > 0) + fraction / steps(m))

    return read


bits_to_number.mistake(
    "one step too low at the lower end",
    because="the exponent's bits say 0, so the power seems to be 0 - bias; but that "
    "leaves a gap below the smallest normal number",
)(wrong_bits(lowest=0))
bits_to_number.mistake(
    "half of the range as the bias",
    because="the middle of 2^k values is 2^(k-1), as in a signed integer; here it is "
    "one less",
)(wrong_bits(bias=lambda k: 2 ** (k - 1)))
bits_to_number.mistake(
    "the fraction by its largest value",
    because="a fraction of all ones looks like 1; then the next number would come "
    "twice",
)(wrong_bits(steps=lambda m: 2**m - 1))
bits_to_number.mistake(
    "no infinity and no NaN",
    because="weights have none, and some kinds of 8 bits and fewer do without them",
)(wrong_bits(special=False))
bits_to_number.mistake(
    "NaN for infinity",
    because="all ones in the exponent are known to mean that something went wrong; the "
    "fraction says what",
)(wrong_bits(infinity=False))


@bits_to_number.mistake(
    "the exponent as a signed integer",
    because="an exponent may be negative, and two's complement is how integers are; "
    "this one is shifted instead",
)
def _(pattern, k, m):
    sign, rest = divmod(pattern, 2 ** (k + m))
    exponent, fraction = divmod(rest, 2**m)
    if exponent >= 2 ** (k - 1):
        exponent -= 2**k
    return (-1) ** sign * 2.0**exponent * (1 + fraction / 2**m)


@bits_to_number.mistake(
    "the sign as a signed integer's",
    because="a negative integer counts back from the end; here the sign is one bit, "
    "and the rest is read as if it were not there",
)
def _(pattern, k, m):
    right = wrong_bits()
    if pattern >= 2 ** (k + m):
        return -right(2 ** (1 + k + m) - pattern, k, m)
    return right(pattern, k, m)
