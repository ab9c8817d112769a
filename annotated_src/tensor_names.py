"""A tensor's name in the files and in the model: one table says both."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from annotated_src.attention import Attention
from annotated_src.fused_qkv import join_qkv, split_qkv
from annotated_src.shards import CheckpointError

FUSED, PARTS = ".qkv_proj.", (".q_proj.", ".k_proj.", ".v_proj.")


class Mismatch(NamedTuple):
    """A tensor that is not what the model has under this name."""

    name: str
    what: str  # "shape" or "dtype"
    checkpoint: Any
    model: Any


def names_by_layer(model: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    """Map each name in the checkpoint to the model's, layer numbers filled in.

    Templates of tensors that the model does not have (a tied head) are left out. A
    fused `qkv_proj` counts as there if the model has its parts.
    """
    num_layers = len(list(model.get_submodule("blocks").children()))
    expanded = {}
    for ours, theirs in names.items():
        for layer in range(num_layers) if "{}" in ours else (0,):
            expanded[theirs.format(layer)] = ours.format(layer)
    state = model.state_dict()
    present = {*state, *(name.replace(PARTS[0], FUSED) for name in state)}
    return {theirs: ours for theirs, ours in expanded.items() if ours in present}


def rename(
    tensors: Iterable[tuple[str, Tensor]], names: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """Give each tensor our name; one that has none keeps its own.

    Raises:
        CheckpointError: two tensors would have the same name, or a tensor has ours in
            the files already, where another is expected.
    """
    seen, expected = set(), {ours: theirs for theirs, ours in names.items()}
    for name, tensor in tensors:
        ours = names.get(name, name)
        if name not in names and name in expected:
            raise CheckpointError(f"{name} should be {expected[name]} in the files")
        if ours in seen:
            raise CheckpointError(f"a second tensor for {ours}: {name}")
        seen.add(ours)
        yield ours, tensor


def split_fused(
    tensors: Iterable[tuple[str, Tensor]],
    model: nn.Module,
    layout: str,
    refused: dict[str, Mismatch],
) -> Iterator[tuple[str, Tensor]]:
    """Replace each `qkv_proj` by its three parts, in memory of their own.

    One of a wrong shape is kept back, and noted in refused under each part's name.

    Raises:
        CheckpointError: two tensors would have the same name.
    """
    wanted, seen = model.state_dict(), set()
    for name, tensor in tensors:
        parts = [name.replace(FUSED, part) for part in PARTS]
        fused = FUSED in name and all(part in wanted for part in parts)
        ours = parts if fused else [name]
        if not seen.isdisjoint(ours):
            raise CheckpointError(f"a second tensor for a part of {name}")
        seen.update(ours)
        if not fused:
            yield name, tensor
        elif difference := _shape_of_parts(name, tensor, [wanted[n] for n in parts]):
            refused |= dict.fromkeys(parts, difference)
        else:
            split = split_qkv(tensor, *_heads(model, name), layout)
            yield from zip(parts, [part.clone() for part in split], strict=True)
            del split
        del tensor  # before the next is read


def join_fused(model: nn.Module, layout: str) -> dict[str, Tensor]:
    """Collect the model's tensors, each three parts joined to one `qkv_proj` again."""
    state = model.state_dict()
    joined: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if PARTS[0] in name:
            queries, keys, values = (state[name.replace(PARTS[0], p)] for p in PARTS)
            fused = join_qkv(queries, keys, values, _heads(model, name)[-1], layout)
            joined[name.replace(PARTS[0], FUSED)] = fused
        elif not any(part in name for part in PARTS):
            joined[name] = tensor
    return joined


def _shape_of_parts(name: str, fused: Tensor, parts: list[Tensor]) -> Mismatch | None:
    wanted = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    if fused.shape != wanted:
        return Mismatch(name, "shape", tuple(fused.shape), wanted)
    return None


def _heads(model: nn.Module, name: str) -> tuple[int, int, int]:
    attention = model.get_submodule(name.rsplit(".", 2)[0])
    if not isinstance(attention, Attention):
        raise ValueError(f"{name} is of {type(attention).__name__}, not of Attention")
    size = attention.head_dim
    queries, keys = attention.q_proj.out_features, attention.k_proj.out_features
    return queries // size, keys // size, size
