"""A model's sizes and tensors, in the words of Hugging Face's files."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

Config = Mapping[str, Any]
# Our names of sizes, and config.json's, where all models agree. How heads are counted
# is in `head_sizes`.
SIZE_KEYS = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "embed_dim": "hidden_size",
    "ffn_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
}
# Sizes to look at and to test with: hardly two are equal, and query heads share keys.
TINY_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "num_layers": 2,
    "embed_dim": 48,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 10,  # not 48 / 4
    "ffn_dim": 80,
    "max_seq_len": 128,
}


def read_sizes(kind: Any, config: Config, keys: Mapping[str, str]) -> dict[str, Any]:
    """Look up fields of a dataclass, each by its key; one with a default may be absent.

    keys maps the names of fields to keys. What is a float in kind becomes one.

    Raises:
        ValueError: a key is missing, or has no size for a value.
    """
    types = {field.name: field.type for field in fields(kind)}
    found = {ours: config[key] for ours, key in keys.items() if key in config}
    for ours, key in keys.items():
        if ours not in found and not hasattr(kind, ours):  # it has no default
            raise ValueError(f"config.json has no {key!r}")
        if types[ours] is int and ours in found:
            _check_size(key, found[ours])
    return {k: float(v) if types[k] is float else v for k, v in found.items()}


def head_sizes(config: Config) -> dict[str, Any]:
    """Read num_heads, num_kv_heads and head_dim, the last two of which may be implied.

    Raises:
        ValueError: a key is missing, or has no size for a value, or the heads do not
            divide the width.
    """
    missing = [k for k in ("num_attention_heads", "hidden_size") if k not in config]
    if missing:
        raise ValueError(f"config.json has no {missing[0]!r}")
    num_heads, width = config["num_attention_heads"], config["hidden_size"]
    _check_size("num_attention_heads", num_heads)
    _check_size("hidden_size", width)
    for key in ("num_key_value_heads", "head_dim"):
        if config.get(key) is not None:  # null is as good as absent
            _check_size(key, config[key])
    if (head_dim := config.get("head_dim")) is None:
        head_dim, rest = divmod(width, num_heads)
        if rest:
            raise ValueError(f"{num_heads} heads do not divide width {width}")
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, for RoPE, got {head_dim}")
    if (num_kv_heads := config.get("num_key_value_heads")) is None:
        num_kv_heads = num_heads
    return {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}


def _check_size(key: str, size: Any) -> None:
    if type(size) is not int or size < 1:
        raise ValueError(f"config.json: {key} must be an int above 0, got {size!r}")


def rope_section(config: Config) -> dict[str, Any]:
    """Gather what is said of RoPE: transformers 5 has a section for it, 4 does not."""
    section = config.get("rope_parameters") or config.get("rope_scaling") or {}
    above = ("rope_theta", "partial_rotary_factor")
    return {key: config[key] for key in above if key in config} | dict(section)


def plain_rope_base(config: Config) -> float:
    """Read the base of a RoPE that is not stretched.

    Raises:
        ValueError: RoPE is of another kind.
    """
    rope = rope_section(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope type is {kind!r}, known is 'default'")
    return float(rope.get("rope_theta", 1e4))


def rotary_dim(config: Config, head_dim: int, default: float) -> int:
    """Count the features of a head that turn, of which config gives the share.

    Raises:
        ValueError: it is not an even number of features that a head has.
    """
    part = rope_section(config).get("partial_rotary_factor", default)
    turning = int(head_dim * part)  # down, as transformers does
    if turning not in range(2, head_dim + 1, 2):
        raise ValueError(
            f"partial_rotary_factor {part} turns {turning} features of a head of "
            f"{head_dim}; it must be an even number, at least 2"
        )
    return turning


def expect(config: Config, model: str, key: str, *known: Any) -> None:
    """Make sure that config asks for what the model does: absent, or one of known.

    Raises:
        ValueError: it asks for something else.
    """
    if (asked := config.get(key, known[0])) not in known:
        raise ValueError(f"config.json: {key} is {asked!r}, {model} has {known[0]!r}")


def weights_and_biases(modules: Mapping[str, str]) -> dict[str, str]:
    """Name the tensors that a module may have, from the names of the modules."""
    return {
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for kind in ("weight", "bias")
        for ours, theirs in modules.items()
    }
