"""From a model's entries to one .tflite file, and to fewer bits: litert does it."""

import functools
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from annotated_src.edge_model import write_tokens
from annotated_src.quiet import quietly
from annotated_src.tflite_file import layer_name, stored_bytes

PARTS = (
    "litert_torch",
    "litert_torch.backend.lowerings",
    "litert_converter.mlir.ir",
    "litert_converter.mlir.dialects.stablehlo",
    "ai_edge_quantizer",
)
NEEDED = (
    "an export needs the edge extra, on Linux (x86_64) or macOS (arm64): "
    "pip install '.[edge]'"
)
Entries = Mapping[str, tuple[nn.Module, Mapping[str, Any]]]

# What the weights of each scheme are in the file, and how the quantizer is told.
STORED = {
    "int8": "INT8",
    "int8-weight-only": "INT8",
    "int4": "INT4",
    "fp16": "FLOAT16",
}
_FP16 = {
    "algorithm_key": "float_casting",
    "op_config": {
        "weight_tensor_config": {"num_bits": 16, "dtype": "FLOAT"},
        "compute_precision": "FLOAT",
        "explicit_dequantize": True,
    },
}


def check_scheme(scheme: str | None, match: str) -> None:
    """Make sure that a scheme is known and that match is a regular expression.

    Raises:
        ValueError: it is not.
    """
    if scheme is not None and scheme not in STORED:
        known = ", ".join(STORED)
        raise ValueError(f"quantize must be one of {known}, or None, got {scheme!r}")
    try:
        re.compile(match)
    except re.error as error:
        raise ValueError(f"match {match!r} is no regular expression: {error}") from None


@functools.cache
def load_litert() -> Any:
    """Import litert_torch, and teach it `write_tokens`.

    Raises:
        ImportError: the edge extra is not installed.

    Source: litert_torch `generative/custom_ops/dynamic_update_slice.py`.
    """
    try:
        with quietly():
            litert_torch, lowerings, ir, stablehlo, _ = map(import_module, PARTS)
    except ImportError as error:
        raise ImportError(f"{NEEDED} ({error})") from error

    def lower(context: Any, stored: Any, new: Any, start: Any) -> Any:
        number = ir.IntegerAttr.get(start.type.element_type, 0)
        zero = stablehlo.constant(ir.DenseElementsAttr.get_splat(start.type, number))
        return stablehlo.dynamic_update_slice(stored, new, [zero, zero, start, zero])

    litert_torch.config.show_progress = False  # in notebooks it goes past `quietly`
    lowerings.lower(write_tokens._opoverload)(lower)
    return litert_torch


def convert(entries: Entries, path: Path) -> None:
    """Write entries, each a module with sample arguments, to one file.

    Tensors that they share are in it once.
    """
    litert_torch = load_litert()
    with quietly():
        converter = litert_torch.Converter()
        for name, (entry, sample) in entries.items():
            converter.signature(name, entry, sample_kwargs=dict(sample))
        converter.convert().export(str(path))


def quantize_file(source: Path, target: Path, scheme: str, match: str = ".*") -> None:
    """Write the file again with fewer bits for the weights, as scheme says.

    Only operators whose name in the file fits match, and norms and tables never. Where
    it fails, target is as it was.

    Raises:
        ValueError: the scheme is unknown; source is no whole .tflite file; or no weight
            changed: nothing fits match, they are integers already, or no layer has the
            sizes that the scheme needs.
    """
    check_scheme(scheme, match)
    load_litert()
    kind = STORED[scheme]
    before = stored_bytes(source)[kind]
    from ai_edge_quantizer import quantizer

    rules = [{**rule, "regex": match} for rule in _rules(scheme)]
    try:
        with quietly():
            result = quantizer.Quantizer(str(source), rules).quantize()
    except ValueError as error:
        raise ValueError(f"no {scheme} of this model: {error}") from error
    part = target.with_name(f"{target.name}.part")
    try:
        part.write_bytes(result.quantized_model or b"")
        if stored_bytes(part)[kind] <= before:
            raise ValueError(
                f"{scheme} changed no weight: none of a name like {match!r}; names are "
                f"like {layer_name(source)!r}"
            )
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _rules(scheme: str) -> list[dict[str, Any]]:
    from ai_edge_quantizer import recipe

    if scheme == "fp16":
        return [{"operation": "*", **_FP16}]
    rules: dict[str, Any] = {
        "int8": recipe.dynamic_wi8_afp32,
        "int8-weight-only": recipe.weight_only_wi8_afp32,
        "int4": recipe.dynamic_wi4b32_afp32,
    }
    return rules[scheme]()
