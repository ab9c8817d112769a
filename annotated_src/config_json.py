"""config.json: its values are checked before anything is built from them."""

from pathlib import Path
from typing import Any, NamedTuple

from annotated_src.shards import CheckpointError, read_json

WIDEST = 10**6  # beyond any model; products of three such sizes still fit 64 bits
DEEPEST = 1000  # layers are built one by one, even without memory
LONGEST = 10**9


class _Range(NamedTuple):
    """Whole numbers from least to most, and null if it may stand for a default."""

    least: int
    most: int
    null: bool = False

    def holds(self, value: object) -> bool:
        if value is None:
            return self.null
        # A bool is an int to Python: True would be a size of 1.
        return type(value) is int and self.least <= value <= self.most

    def __str__(self) -> str:
        return f"a whole number from {self.least} to {self.most}"


WHOLE = {
    "vocab_size": _Range(1, WIDEST),
    "hidden_size": _Range(1, WIDEST),
    "intermediate_size": _Range(1, WIDEST),
    "inner_hidden_size": _Range(1, WIDEST, null=True),
    "num_attention_heads": _Range(1, WIDEST),
    "num_key_value_heads": _Range(1, WIDEST, null=True),
    "head_dim": _Range(1, WIDEST, null=True),
    "num_hidden_layers": _Range(1, DEEPEST),
    "num_layers": _Range(1, DEEPEST),
    "max_position_embeddings": _Range(1, LONGEST),
    "original_max_position_embeddings": _Range(1, LONGEST, null=True),
    "max_sequence_length": _Range(1, LONGEST),
    "pre_seq_len": _Range(0, WIDEST, null=True),
    "quantization_bit": _Range(0, 8, null=True),
    "gmask_token_id": _Range(0, WIDEST, null=True),
    "mask_token_id": _Range(0, WIDEST, null=True),
    # The words of the first Phi-2.
    "n_embd": _Range(1, WIDEST),
    "n_inner": _Range(1, WIDEST, null=True),
    "n_head": _Range(1, WIDEST),
    "n_head_kv": _Range(1, WIDEST, null=True),
    "n_layer": _Range(1, DEEPEST),
    "n_positions": _Range(1, LONGEST),
    "rotary_dim": _Range(2, WIDEST),
}
NUMBERS = (
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "layernorm_epsilon",
    "partial_rotary_factor",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
)
FLAGS = (
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "position_encoding_2d",
    "qk_layernorm",
    "prefix_projection",
)
SECTIONS = ("rope_parameters", "rope_scaling")


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json and check the values that a model would be built from.

    Which keys there must be is for the model to say; the others are not looked at.

    Raises:
        FileNotFoundError: no config.json.
        CheckpointError: not a JSON object, or a size that is not a whole number, is
            below 1 or beyond any model, an epsilon or base that is not finite and
            above 0, or a switch that is neither true nor false.
    """
    path = directory / "config.json"
    config = read_json(path)
    for section in SECTIONS:
        if not isinstance(config.get(section), dict | None):
            raise _wrong(path, section, config[section], "an object")
    for part in (config, *(config.get(section) or {} for section in SECTIONS)):
        for key, value in part.items():
            if key in WHOLE and not WHOLE[key].holds(value):
                raise _wrong(path, key, value, str(WHOLE[key]))
            if key in NUMBERS and not _is_number(value):
                raise _wrong(path, key, value, "a number above 0")
            if key in FLAGS and not isinstance(value, bool):
                raise _wrong(path, key, value, "true or false")
    return config


def _wrong(path: Path, key: str, value: object, wanted: str) -> CheckpointError:
    return CheckpointError(f"{path}: {key} is {f'{value!r:.60}'}, not {wanted}")


def _is_number(value: object) -> bool:
    # The upper bound refuses infinity, and whole numbers that no float can hold; a
    # comparison with NaN is false.
    return type(value) in (int, float) and 0 < value <= 1e30  # type: ignore[operator]
