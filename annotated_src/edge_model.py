"""A decoder as a device wants it: fixed shapes, and the cache goes in and comes out.

A compiler for devices takes no Python objects that change. So the cache is an argument
and a result here, of one size from the first call to the last. What it holds beyond the
tokens seen is hidden by the mask, and overwritten in time.
"""

import copy
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from annotated_src.attention import Attention, attend_folded
from annotated_src.kv_cache import LayerCache
from annotated_src.models.gemma import Gemma
from annotated_src.models.llama import Llama
from annotated_src.models.phi import Phi
from annotated_src.rotary import apply_rotary, rope_tables

EXPORTABLE = (Llama, Gemma, Phi)
KV = dict[str, Tensor]


@torch.library.custom_op("annotated_src::write_tokens", mutates_args=())
def write_tokens(stored: Tensor, new: Tensor, start: Tensor) -> Tensor:
    """Return stored (B, K, S, H) with new (B, K, T, H) from token start on.

    To a compiler it is one step, which `convert` names: a slice that is overwritten.
    With `index_copy` it would be a scatter, which looks every token up.

    Raises:
        ValueError: the tokens do not fit. In a file they are moved back until they do.

    Source: XLA DynamicUpdateSlice; litert_torch `dynamic_update_slice`.
    """
    first = int(start)
    end = first + new.shape[2]
    if first < 0 or end > stored.shape[2]:
        room = stored.shape[2]
        raise ValueError(f"tokens {first} to {end - 1} in a cache of {room} tokens")
    written = stored.clone()
    written[:, :, first:end] = new
    return written


@write_tokens.register_fake
def _(stored: Tensor, new: Tensor, start: Tensor) -> Tensor:
    return torch.empty_like(stored)


class FunctionalCache(LayerCache):
    """`LayerCache` that changes nothing: `append` makes new keys and values."""

    def __init__(self, keys: Tensor, values: Tensor, start: Tensor) -> None:
        self.keys, self.values, self.start = keys, values, start

    def append(
        self, keys: Float[Tensor, "B K T H"], values: Float[Tensor, "B K T H"]
    ) -> tuple[Float[Tensor, "B K S H"], Float[Tensor, "B K S H"]]:
        """Write new tokens; return all S places, those not yet in use as well."""
        self.keys = write_tokens(self.keys, keys, self.start)
        self.values = write_tokens(self.values, values, self.start)
        return self.keys, self.values


class EdgeModel(nn.Module):
    """A Llama, Gemma or Phi that is a function of tokens, positions and cache.

    It shares the weights of the model given, which stays as it is. Those that do not
    lie row by row are copied: litert mistakes them for each other.

    Raises:
        ValueError: another model, weights that are not float32 on the CPU, or a cache
            of less than one token or more than the model's max_seq_len.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, model: nn.Module, cache_len: int, logits: bool = True) -> None:
        super().__init__()
        check_exportable(model)
        config: Any = model.config
        if not 1 <= cache_len <= config.max_seq_len:
            raise ValueError(
                f"cache must be 1 to {config.max_seq_len} tokens, the model's "
                f"max_seq_len, got {cache_len}"
            )
        rows = {id(weight): _by_rows(weight) for weight in model.parameters()}
        self.model: Any = copy.deepcopy(model, rows)
        for part in self.model.modules():
            if isinstance(part, Attention):
                part.attend = attend_folded
        self.cache_len, self.logits = cache_len, logits
        positions = torch.arange(cache_len)[None]
        cos, sin = rope_tables(positions, self.model.frequencies(), torch.float32)
        self.register_buffer("cos", cos, persistent=False)  # (1, 1, S, R)
        self.register_buffer("sin", sin, persistent=False)
        self.eval()

    def forward(
        self, tokens: Int[Tensor, "1 T"], input_pos: Int[Tensor, "T"], kv: KV
    ) -> dict[str, Any]:
        """Return "kv", the cache with these tokens in it, and "logits" if asked for.

        input_pos counts up by one. Places of the cache from there on may hold any
        finite numbers: 0 times infinity would not be 0.
        """
        cos = self.cos.index_select(2, input_pos)  # (1, 1, T, R)
        rotate = partial(apply_rotary, cos=cos, sin=self.sin.index_select(2, input_pos))
        # Made here: a table of S x S would be in the file, 64 MB for Gemma's 8192.
        places = torch.arange(self.cache_len, dtype=input_pos.dtype)
        mask = (places <= input_pos[:, None])[None, None]  # (1, 1, T, S)
        x = self.model.embedding(tokens)
        written: KV = {}
        for i, block in enumerate(self.model.blocks):
            cache = FunctionalCache(kv[f"k_{i}"], kv[f"v_{i}"], input_pos[0])
            x = block(x, rotate, mask, cache)
            written[f"k_{i}"], written[f"v_{i}"] = cache.keys, cache.values
        if not self.logits:
            return {"kv": written}
        return {"logits": self.model.score(self.model.norm(x)), "kv": written}

    def sample_inputs(self, num_tokens: int) -> dict[str, Any]:
        """Make the arguments of a call: an empty cache, token 0 in every place."""
        c = self.model.config
        shape = (1, c.num_kv_heads, self.cache_len, c.head_dim)
        names = [f"{part}_{i}" for i in range(c.num_layers) for part in "kv"]
        return {
            "tokens": torch.zeros(1, num_tokens, dtype=torch.int32),
            "input_pos": torch.arange(num_tokens, dtype=torch.int32),
            "kv": {name: torch.zeros(shape) for name in names},
        }


def _by_rows(weight: nn.Parameter) -> nn.Parameter:
    stored = weight.detach().contiguous()  # itself, if it is already
    return nn.Parameter(stored, requires_grad=False)


def check_exportable(model: nn.Module) -> None:
    """Make sure that there is an `EdgeModel` of it.

    A quantized model would be traced too, and its integers come out as float32 again.

    Raises:
        ValueError: it is no Llama, Gemma or Phi of plain float32 on the CPU.
    """
    if type(model) not in EXPORTABLE:
        known = ", ".join(kind.__name__ for kind in EXPORTABLE)
        raise ValueError(
            f"no exporter for {type(model).__name__}: there is one for {known}"
        )
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        kind = type(weight.detach()).__name__  # torchao's say that they are float32
        plain = kind == "Tensor" and weight.dtype == torch.float32
        if weight.device.type != "cpu" or not plain:
            raise ValueError(
                f"an export is made of float32 on the CPU, {name} is {weight.dtype} "
                f"on {weight.device} ({kind})"
            )


def make_entries(
    model: nn.Module, prefill: int, cache: int
) -> dict[str, tuple[EdgeModel, dict[str, Any]]]:
    """Make what a device calls, each with sample arguments: "prefill" and "decode".

    prefill reads prefill tokens at once, and gives back the cache alone: without
    logits, the head and the last layer's attention need not be computed at all. decode
    reads one token, and gives its logits too.

    Raises:
        ValueError: no such `EdgeModel`, or prefill is below 1 or above cache.
    """
    if not 1 <= prefill <= cache:
        raise ValueError(
            f"prefill must be 1 to {cache} tokens, the length of the cache, "
            f"got {prefill}"
        )
    writer = EdgeModel(model, cache)
    reader = EdgeModel(writer.model, cache, logits=False)  # the same weights
    return {
        "prefill": (reader, reader.sample_inputs(prefill)),
        "decode": (writer, writer.sample_inputs(1)),
    }


def export_programs(
    model: nn.Module, prefill: int, cache: int
) -> dict[str, torch.export.ExportedProgram]:
    """Trace both entries of `make_entries` to graphs, by `torch.export`."""
    entries = make_entries(model, prefill, cache)
    return {
        name: torch.export.export(entry, (), sample)
        for name, (entry, sample) in entries.items()
    }
