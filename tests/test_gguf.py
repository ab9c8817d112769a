import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from annotated_src.gguf import GGUFError, read_gguf

KNOWN = [Kind.F32, Kind.F16, Kind.Q4_1, Kind.Q8_0]
METADATA = {
    "bool": (True, gguf.GGUFValueType.BOOL),
    "no": (False, gguf.GGUFValueType.BOOL),
    "uint8": (200, gguf.GGUFValueType.UINT8),
    "int8": (-100, gguf.GGUFValueType.INT8),
    "uint16": (60_000, gguf.GGUFValueType.UINT16),
    "int16": (-30_000, gguf.GGUFValueType.INT16),
    "uint32": (4_000_000_000, gguf.GGUFValueType.UINT32),
    "int32": (-2_000_000_000, gguf.GGUFValueType.INT32),
    "uint64": (2**63 + 1, gguf.GGUFValueType.UINT64),
    "int64": (-(2**63), gguf.GGUFValueType.INT64),
    "float32": (0.1, gguf.GGUFValueType.FLOAT32),
    "float64": (0.1, gguf.GGUFValueType.FLOAT64),
    "string": ("a llama 🦙 in 你好", gguf.GGUFValueType.STRING),
    "empty": ("", gguf.GGUFValueType.STRING),
    "ints": ([3, 1, 2], gguf.GGUFValueType.ARRAY),
    "floats": ([0.5, -0.25, 0.0], gguf.GGUFValueType.ARRAY),
    "words": (["one", "", "three🦙"], gguf.GGUFValueType.ARRAY),
    "flags": ([True, False, True], gguf.GGUFValueType.ARRAY),
    "nested": ([[1, 2], [3], [4, 5, 6]], gguf.GGUFValueType.ARRAY),
}


def write(path, tensors, metadata=(), alignment=None):
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    for key in metadata:
        writer.add_key_value(key, *METADATA[key])
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def numbers(*shape):
    rng = np.random.default_rng(0)
    return (rng.standard_normal(shape) * 3).astype(np.float32)


def some_tensors():
    """Every kind, and sizes that are no multiple of the alignment; the last one is."""
    odd = {"gain": (numbers(5), Kind.F32), "halves": (numbers(3, 7), Kind.F16)}
    packed = {kind.name: (numbers(3, 2, 64), kind) for kind in KNOWN}
    return odd | packed | {"last": (numbers(8), Kind.F32)}


@pytest.fixture
def small(tmp_path):
    """Metadata, then two tensors whose bytes end with the file."""
    tensors = {"a": (numbers(2, 32), Kind.Q4_1), "b": (numbers(8), Kind.F32)}
    path = write(tmp_path / "x.gguf", tensors, ["bool", "string", "nested", "words"])
    return path, path.read_bytes()


def header(*, magic=b"GGUF", version=3, num_tensors=0, num_pairs=0):
    return magic + struct.pack("<IQQ", version, num_tensors, num_pairs)


def text(value):
    return struct.pack("<Q", len(value)) + value


def descriptor(kind, *shape, offset=0):
    """Of one tensor named t; shape as the file has it, shortest stride first."""
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(b"t") + dims + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize("alignment", [None, 8, 64, 256])
@pytest.mark.parametrize("num_pairs", [0, 3, 9, len(METADATA)])
def test_tensors_equal_the_gguf_package(tmp_path, alignment, num_pairs):
    """Metadata of several lengths, so that the tensors begin at many places."""
    pairs = list(METADATA)[:num_pairs]
    path = write(tmp_path / "x.gguf", some_tensors(), pairs, alignment)
    found, reader = read_gguf(path), gguf.GGUFReader(path)
    assert list(found.tensors) == [t.name for t in reader.tensors]
    for theirs in reader.tensors:
        ours = found.tensors[theirs.name]
        expected = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
        assert ours.block.name == theirs.tensor_type.name
        assert ours.shape == tuple(theirs.shape[::-1])
        assert ours.dequantise().dtype == np.float32
        np.testing.assert_array_equal(
            ours.dequantise(), expected.reshape(ours.shape), strict=True
        )


@pytest.mark.parametrize("kind", KNOWN)
def test_any_bytes_are_unpacked_as_the_gguf_package_does(tmp_path, kind):
    """Scales that are negative, subnormal, infinite: bytes, not weights."""
    path = write(tmp_path / "x.gguf", {"t": (numbers(64, 64), kind)})
    raw = np.random.default_rng(1).bytes(path.stat().st_size)
    start = gguf.GGUFReader(path).tensors[0].data_offset
    path.write_bytes(path.read_bytes()[:start] + raw[start:])
    packed = gguf.GGUFReader(path).tensors[0].data
    with np.errstate(all="ignore"):
        found = read_gguf(path).tensors["t"].dequantise()
        np.testing.assert_array_equal(found, gguf.quants.dequantize(packed, kind))


def test_metadata_equals_the_gguf_package_and_what_was_written(tmp_path):
    path = write(tmp_path / "x.gguf", {}, METADATA)
    found, reader = read_gguf(path).metadata, gguf.GGUFReader(path)
    assert found["general.architecture"] == "llama"
    for key, (value, _) in METADATA.items():
        expected = np.float32(value) if key == "float32" else value
        assert found[key] == expected
        assert type(found[key]) is type(value)
        if key != "nested":  # contents() of the gguf package flattens it
            assert found[key] == reader.get_field(key).contents()


def test_tensors_are_mapped_not_copied(small):
    tensor = read_gguf(small[0]).tensors["a"]
    assert not tensor.blocks.flags.owndata
    assert tensor.blocks.nbytes == 2 * 20


def test_a_tensor_without_rows(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(header(num_tensors=1) + descriptor(0, 4, 0) + bytes(64))
    assert read_gguf(path).tensors["t"].dequantise().shape == (0, 4)


def test_truncated_at_every_byte(small):
    path, whole = small
    read_gguf(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(GGUFError, match=r"truncated|starts with"):
            read_gguf(path)


def test_the_error_counts_the_bytes(small):
    path, whole = small
    path.write_bytes(whole[:-1])
    message = f"tensor b needs 32 bytes at byte {len(whole) - 32}, the file has"
    with pytest.raises(GGUFError, match=f"{message} {len(whole) - 1}"):
        read_gguf(path)


@pytest.mark.parametrize("value", [0, 1, 8, 9, 127, 255])
def test_any_byte_changed_is_read_or_refused(small, value):
    path, whole = small
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
        try:
            found = read_gguf(path)
        except GGUFError:
            continue
        with np.errstate(all="ignore"):
            for tensor in found.tensors.values():
                tensor.dequantise()


DEEP = struct.pack("<IQ", 9, 1) * 20_000
BAD = {
    "empty": (b"", "starts with b'', expected b'GGUF'"),
    "magic": (header(magic=b"GGML"), "starts with b'GGML', expected b'GGUF'"),
    "version 1": (header(version=1), "version 1, expected one of"),
    "version 4": (header(version=4), "version 4, expected one of"),
    "big-endian": (header(version=0x03000000), "version 50331648, expected"),
    "many tensors": (header(num_tensors=2**63), "truncated: a number needs"),
    "many pairs": (header(num_pairs=2**63), "truncated: a number needs"),
    "long string": (
        header(num_pairs=1) + struct.pack("<Q", 2**63) + b"key",
        f"truncated: a string needs {2**63} bytes",
    ),
    "long array": (
        header(num_pairs=1) + text(b"k") + struct.pack("<IIQ", 9, 7, 2**62),
        f"truncated: an array needs {2**62} bytes",
    ),
    "deep array": (
        header(num_pairs=1) + text(b"k") + struct.pack("<I", 9) + DEEP,
        "nest",
    ),
    "not UTF-8": (header(num_pairs=1) + text(b"\xff"), "utf-8"),
    "value type": (
        header(num_pairs=1) + text(b"k") + struct.pack("<I", 13),
        "unknown value type 13",
    ),
    "Q4_K": (
        header(num_tensors=1) + descriptor(Kind.Q4_K, 256) + bytes(256),
        r"t: unknown quantization type 12, known are 0 \(F32\), .*8 \(Q8_0\)",
    ),
    "rows": (
        header(num_tensors=1) + descriptor(Kind.Q8_0, 48, 2) + bytes(256),
        "rows of 48 numbers do not divide into Q8_0 blocks of 32",
    ),
    "no dimension": (
        header(num_tensors=1) + descriptor(Kind.Q4_1) + bytes(256),
        "t: .*Q4_1 blocks of 32",
    ),
    "huge": (
        header(num_tensors=1) + descriptor(Kind.F32, 2**63, 2**63) + bytes(64),
        f"tensor t needs {2**128} bytes",
    ),
    "far": (
        header(num_tensors=1) + descriptor(Kind.F32, 2, offset=2**63) + bytes(64),
        "tensor t needs 8 bytes at byte",
    ),
    "alignment": (
        header(num_pairs=1)
        + text(b"general.alignment")
        + struct.pack("<II", gguf.GGUFValueType.UINT32, 0),
        "alignment is 0, expected 1 or more",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, name):
    content, message = BAD[name]
    path = Path(tmp_path / "x.gguf")
    path.write_bytes(content)
    with pytest.raises(GGUFError, match=message):
        read_gguf(path)
