"""A .tflite file: open it to run it, or look at its operators and bytes."""

import struct
from collections import Counter
from pathlib import Path
from typing import Any

from annotated_src.quiet import quietly

MARK = b"TFL3"
NEEDED = "a .tflite file needs ai-edge-litert: pip install ai-edge-litert"


def open_tflite(path: Path | str, threads: int = 1) -> Any:
    """Make a file ready to run. The reader checks that all of it is there.

    Raises:
        FileNotFoundError: no such file.
        ImportError: ai-edge-litert is not installed.
        ValueError: it is damaged, or something else; or threads is below 1.

    Source: ai_edge_litert `Interpreter`.
    """
    if threads < 1:
        raise ValueError(f"threads must be 1 or more, got {threads}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with quietly():
            from ai_edge_litert.interpreter import Interpreter

            interpreter = Interpreter(model_path=str(path), num_threads=threads)
            interpreter.allocate_tensors()
    except ImportError as error:
        raise ImportError(f"{NEEDED} ({error})") from error
    except (ValueError, RuntimeError) as error:
        said = str(error).strip()
        raise ValueError(f"{path} is not a whole .tflite file: {said}") from error
    return interpreter


def operators(path: Path | str) -> dict[str, list[str]]:
    """List each entry's operators, in the order in which they run.

    Raises:
        ImportError: ai-edge-litert is not installed.
        ValueError: it is no whole .tflite file.
    """
    model, schema = _read(path)
    names = _names(schema.BuiltinOperator)
    codes = [
        names[max(code.builtinCode, code.deprecatedBuiltinCode)]
        for code in model.operatorCodes
    ]
    return {
        entry.signatureKey.decode(): [
            codes[step.opcodeIndex]
            for step in model.subgraphs[entry.subgraphIndex].operators
        ]
        for entry in model.signatureDefs
    }


def layer_name(path: Path | str) -> str:
    """Give the name of an operator with weights, as an example."""
    model, schema = _read(path)
    for graph in model.subgraphs:
        for step in graph.operators:
            code = model.operatorCodes[step.opcodeIndex]
            if code.builtinCode == schema.BuiltinOperator.FULLY_CONNECTED:
                return graph.tensors[step.outputs[0]].name.decode()
    return ""


def stored_bytes(path: Path | str) -> Counter[str]:
    """Count the bytes of constants by type; those that entries share count once.

    The rest of the file describes the graphs, and holds the scales of int8.

    Raises:
        ImportError: ai-edge-litert is not installed.
        ValueError: it is no whole .tflite file.
    """
    model, schema = _read(path)
    names = _names(schema.TensorType)
    sizes: Counter[str] = Counter()
    seen: set[int] = set()
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            buffer = model.buffers[tensor.buffer]
            # Data is in the flatbuffer, or after it at an offset.
            size = buffer.size if buffer.data is None else len(buffer.data)
            if size and tensor.buffer not in seen:
                seen.add(tensor.buffer)
                sizes[names[tensor.type]] += size
    return sizes


def _read(path: Path | str) -> tuple[Any, Any]:
    try:
        from ai_edge_litert import schema_py_generated as schema
    except ImportError as error:
        raise ImportError(f"{NEEDED} ({error})") from error
    data = Path(path).read_bytes()
    if data[4:8] != MARK:
        raise ValueError(f"{path} is not a whole .tflite file: it lacks the mark TFL3")
    try:
        root = schema.Model.GetRootAs(data, 0)
        return schema.ModelT.InitFromObj(root), schema
    except (struct.error, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a whole .tflite file: {error}") from error


def _names(kind: Any) -> dict[int, str]:
    return {number: name for name, number in vars(kind).items() if name[0] != "_"}
