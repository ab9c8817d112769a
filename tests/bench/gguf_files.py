"""The two files for llama.cpp: the one that the weights came in, and it in float32."""

import shutil
from pathlib import Path

import gguf

SKIPPED = ("GGUF.", "general.architecture", "general.file_type", "general.quant")


def gguf_files(folder):
    """Return {name: path}, fetching and writing what is not there yet."""
    from annotated_src.weights import SHA256, download, verify

    folder = Path(folder)
    small, full = folder / "SmolLM2.Q4_1.gguf", folder / "SmolLM2.F32.gguf"
    folder.mkdir(parents=True, exist_ok=True)
    if not small.exists():
        scratch = folder / "download"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        path = download(scratch)
        verify(path, SHA256)
        path.rename(small)
        shutil.rmtree(scratch)
    if not full.exists():
        half_written = full.with_suffix(".part")
        to_float32(small, half_written)
        half_written.rename(full)
    return {"F32": full, "Q4_1": small}


def to_float32(source, target):
    """Write a GGUF file again, every weight in full and the metadata as it was."""
    reader = gguf.GGUFReader(source)
    kind = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, kind)
    for name, field in reader.fields.items():
        if not name.startswith(SKIPPED):
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, weight.astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
