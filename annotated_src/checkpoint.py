"""Make a model of a checkpoint: rename its tensors, check every one, put them in."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from annotated_src.architectures import build_without_weights, find_architecture
from annotated_src.config_json import read_config
from annotated_src.saving import save_checkpoint as save_checkpoint
from annotated_src.shards import CheckpointError, Progress, read_tensors
from annotated_src.tensor_names import Mismatch, names_by_layer, rename, split_fused

# What a stored weight may be. Integers are no weights, nor are 8-bit floats without
# the scales that belong to them.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class TensorMismatch(CheckpointError):  # noqa: N818 - what happened
    """The checkpoint has not exactly the model's tensors: says which, all at once.

    Missing and mismatched ones have the model's names, unexpected ones the file's.
    """

    def __init__(
        self, missing: list[str], unexpected: list[str], mismatched: list[Mismatch]
    ) -> None:
        self.missing, self.unexpected = missing, unexpected
        self.mismatched = mismatched
        problems = [f"missing: {name}" for name in missing]
        problems += [f"unexpected: {name}" for name in unexpected]
        problems += [
            f"{what} of {name}: checkpoint {stored}, model {wanted}"
            for name, what, stored, wanted in mismatched
        ]
        super().__init__("checkpoint and model differ\n  " + "\n  ".join(problems))


def load_model(
    path: Path | str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Any:
    """Build the model that a directory describes, with its weights, ready to run.

    Its memory: the model in dtype, and while it is read, at most one tensor beside it
    (a fused one and its parts), or one shard if that is a .bin file. After each shard,
    progress(done, total) is called.

    Raises:
        FileNotFoundError: no config.json, or no weights.
        CheckpointError: an unknown model type, a config that lacks a key, has an
            impossible value or asks for what the model does not do, or a damaged file.
        TensorMismatch: tensors that are missing, unexpected, of another shape, or not
            floats (all of them are named).
        ValueError: dtype is not one for weights, or there is no such device.
    """
    _check_target(dtype, device)
    directory = Path(path)
    config = read_config(directory)
    architecture = find_architecture(config, directory)
    model = build_without_weights(architecture, config, directory)
    names = names_by_layer(model, architecture.names)
    stored = (
        (name, tensor)
        for name, tensor in read_tensors(directory, progress=progress)
        if name in names or not name.endswith(architecture.ignored)
    )
    renamed, refused = rename(stored, names), {}
    if architecture.fused:
        renamed = split_fused(renamed, model, architecture.fused, refused)
    assign_strictly(model, renamed, dtype, device, copy=False, refused=refused)
    if dtype == torch.float32:
        lay_by_columns(model)
    return model.eval()


def _check_target(dtype: torch.dtype, device: torch.device | str) -> None:
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be one of {FLOATS}, got {dtype}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r}: {error}") from error


def assign_strictly(
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    copy: bool = True,
    refused: Mapping[str, Mismatch] | None = None,
) -> None:
    """Put the tensors into the model, all or none.

    Each is cast as it comes, and let go. The model gets the results at the end. Without
    copy, a tensor that needs no cast becomes the model's own: for those that nobody
    else holds, as `read_tensors` yields them. refused is what `split_fused` kept back.

    Raises:
        TensorMismatch: a tensor is missing, unexpected, of another shape or no weight.
    """
    wanted, buffers = model.state_dict(), dict(model.named_buffers())
    placed: dict[str, Tensor] = {}
    unexpected, mismatched = [], []
    for name, tensor in tensors:
        if name not in wanted:
            unexpected.append(name)
        elif difference := _difference(name, tensor, wanted[name]):
            mismatched.append(difference)
        else:
            # The buffers are those of quantised weights: they keep their dtype.
            kind = wanted[name].dtype if name in buffers else dtype
            placed[name] = tensor.detach().to(
                device, kind, copy=copy, memory_format=torch.contiguous_format
            )
        del tensor  # before the next is read
    found = {*placed, *(difference.name for difference in mismatched), *(refused or ())}
    mismatched += dict.fromkeys((refused or {}).values())  # each once
    missing = [name for name in wanted if name not in found]
    if missing or unexpected or mismatched:
        raise TensorMismatch(missing, unexpected, mismatched)
    model.load_state_dict(placed, assign=True)


def lay_by_columns(model: nn.Module) -> None:
    """Store the matrices of linear layers column by column; values and shapes stay.

    A processor multiplies a single token in float32 with such a matrix about 1.5 times
    as fast; many tokens, as fast as before.
    """
    for part in model.modules():
        if isinstance(part, nn.Linear):
            part.weight.data = part.weight.data.t().contiguous().t()


def _difference(name: str, stored: Tensor, wanted: Tensor) -> Mismatch | None:
    if stored.shape != wanted.shape:
        return Mismatch(name, "shape", tuple(stored.shape), tuple(wanted.shape))
    fitting = FLOATS if wanted.is_floating_point() else (wanted.dtype,)
    if stored.dtype not in fitting:
        return Mismatch(name, "dtype", stored.dtype, wanted.dtype)
    return None
