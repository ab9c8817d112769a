import re
from dataclasses import dataclass

import pytest

from annotated_src.hf_sizes import (
    expect,
    head_sizes,
    plain_rope_base,
    read_sizes,
    rope_section,
    rotary_dim,
    weights_and_biases,
)


@dataclass
class Sizes:
    width: int
    eps: float
    tied: bool = False


KEYS = {"width": "hidden_size", "eps": "rms_norm_eps", "tied": "tie"}


def test_sizes_are_read_by_their_keys():
    config = {"hidden_size": 4, "rms_norm_eps": 1, "tie": True, "more": None}
    found = read_sizes(Sizes, config, KEYS)
    assert found == {"width": 4, "eps": 1.0, "tied": True}
    assert type(found["eps"]) is float  # JSON may say 1


def test_only_what_has_a_default_may_be_absent():
    assert "tied" not in read_sizes(Sizes, {"hidden_size": 4, "rms_norm_eps": 1}, KEYS)
    with pytest.raises(ValueError, match=r"config\.json has no 'rms_norm_eps'"):
        read_sizes(Sizes, {"hidden_size": 4}, KEYS)


@pytest.mark.parametrize("size", [0, -4, 4.0, "4", None, True])
def test_a_size_is_a_whole_number_above_0(size):
    message = re.escape(f"hidden_size must be an int above 0, got {size!r}")
    with pytest.raises(ValueError, match=message):
        read_sizes(Sizes, {"hidden_size": size, "rms_norm_eps": 1}, KEYS)
    with pytest.raises(ValueError, match=message):
        head_sizes(HEADS | {"hidden_size": size})


HEADS = {"num_attention_heads": 4, "hidden_size": 32}


@pytest.mark.parametrize(
    ("more", "kv_heads", "head_dim"),
    [
        ({}, 4, 8),
        ({"num_key_value_heads": None, "head_dim": None}, 4, 8),
        ({"num_key_value_heads": 1, "head_dim": 10}, 1, 10),
    ],
)
def test_heads_may_be_implied(more, kv_heads, head_dim):
    found = head_sizes(HEADS | more)
    assert found == {"num_heads": 4, "num_kv_heads": kv_heads, "head_dim": head_dim}


@pytest.mark.parametrize("key", HEADS)
def test_heads_and_width_must_be_there(key):
    with pytest.raises(ValueError, match=f"config.json has no '{key}'"):
        head_sizes({k: v for k, v in HEADS.items() if k != key})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads must be an int above 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be an int above 0"),
        ({"head_dim": "8"}, "head_dim must be an int above 0, got '8'"),
        ({"hidden_size": 30}, "4 heads do not divide width 30"),
        ({"hidden_size": 36}, "head_dim must be even, for RoPE, got 9"),
        ({"head_dim": 7}, "head_dim must be even, for RoPE, got 7"),
    ],
)
def test_heads_that_cannot_be(more, message):
    with pytest.raises(ValueError, match=message):
        head_sizes(HEADS | more)


@pytest.mark.parametrize(
    ("config", "base"),
    [
        ({}, 10_000.0),
        ({"rope_theta": 500}, 500.0),
        ({"rope_theta": 500, "rope_scaling": None}, 500.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 700}}, 700.0),
        ({"rope_theta": 500, "rope_parameters": {"rope_theta": 700}}, 700.0),
        ({"rope_theta": 500, "rope_scaling": {"type": "default"}}, 500.0),
    ],
)
def test_the_base_of_rope(config, base):
    found = plain_rope_base(config)
    assert (found, type(found)) == (base, float)


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_rope_of_another_kind(key):
    with pytest.raises(ValueError, match="rope type is 'yarn', known is 'default'"):
        plain_rope_base({"rope_scaling": {key: "yarn"}})


def test_the_section_wins_over_what_stands_above():
    config = {"partial_rotary_factor": 0.5, "rope_theta": 3.0}
    assert rope_section(config) == config
    section = {"partial_rotary_factor": 0.25, "rope_type": "default"}
    found = rope_section(config | {"rope_parameters": section})
    assert found == section | {"rope_theta": 3.0}


@pytest.mark.parametrize(
    ("part", "turning"), [(0.4, 4), (0.7, 8), (1.0, 12), (1, 12), (None, 6)]
)
def test_a_share_of_a_head_is_rounded_down(part, turning):
    config = {} if part is None else {"partial_rotary_factor": part}
    assert rotary_dim(config, 12, default=0.5) == turning


@pytest.mark.parametrize(
    ("part", "turning"), [(0.1, 1), (0.3, 3), (0.01, 0), (1.2, 14)]
)
def test_a_share_that_cannot_turn(part, turning):
    message = f"factor {part} turns {turning} features of a head of 12"
    with pytest.raises(ValueError, match=message):
        rotary_dim({"partial_rotary_factor": part}, 12, default=0.5)


def test_what_is_absent_is_as_expected():
    expect({}, "Gemma", "act", "gelu")
    expect({"act": "gelu"}, "Gemma", "act", "gelu")
    expect({"act": "old"}, "Gemma", "act", "gelu", "old")
    with pytest.raises(ValueError, match=r"act is 'new', Gemma has 'gelu'"):
        expect({"act": "new"}, "Gemma", "act", "gelu", "old")


def test_every_module_may_have_a_weight_and_a_bias():
    assert weights_and_biases({"a.{}": "b.{}.c"}) == {
        "a.{}.weight": "b.{}.c.weight",
        "a.{}.bias": "b.{}.c.bias",
    }
