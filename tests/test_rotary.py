import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.models.llama.modeling_llama import rotate_half as hf_rotate_half

from annotated_src.rotary import (
    Llama3Scaling,
    apply_rotary,
    apply_rotary_interleaved,
    half_split_to_interleaved,
    interleaved_to_half_split,
    rope_frequencies,
    rope_tables,
    rotate_half,
    rows_to_half_split,
    scale_frequencies,
)

POSITIONS = torch.tensor([[3, 0, 17, 2040], [5, 5, 1, 100_003]])  # never arange
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def reference(head_dim, base):
    return LlamaRotaryEmbedding(
        LlamaConfig(
            head_dim=head_dim,
            rope_parameters={"rope_type": "default", "rope_theta": base},
        )
    )


def tables(rotary_dim, base=500.0, dtype=torch.float32, positions=POSITIONS):
    return rope_tables(positions, rope_frequencies(rotary_dim, base), dtype)


def exact_tables(rotary_dim, positions):
    return rope_tables(
        positions, rope_frequencies(rotary_dim, 500.0).double(), torch.float64
    )


@pytest.mark.parametrize("base", [500.0, 10_000.0, 100_000.0])
@pytest.mark.parametrize("rotary_dim", [2, 10, 64])
def test_frequencies_equal_transformers(rotary_dim, base):
    found = rope_frequencies(rotary_dim, base)
    assert torch.equal(found, reference(rotary_dim, base).inv_freq)
    assert found[0] == 1


@pytest.mark.parametrize("rotary_dim", [-2, 0, 5])
def test_odd_or_empty_width(rotary_dim):
    with pytest.raises(ValueError, match=f"even and positive, got {rotary_dim}$"):
        rope_frequencies(rotary_dim, 10_000.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tables_equal_transformers(dtype):
    cos, sin = tables(10, dtype=dtype)
    hf_cos, hf_sin = reference(10, 500.0)(torch.empty(1, dtype=dtype), POSITIONS)
    assert cos.dtype == sin.dtype == dtype
    assert torch.equal(torch.cat((cos, cos), -1)[:, 0], hf_cos)
    assert torch.equal(torch.cat((sin, sin), -1)[:, 0], hf_sin)


def test_rotate_half_equals_transformers():
    x = torch.randn(2, 3, 4, 10)
    assert torch.equal(rotate_half(x), hf_rotate_half(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_rotary_equals_transformers(dtype):
    queries, keys = torch.randn(2, 6, 4, 10), torch.randn(2, 3, 4, 10)
    queries, keys = queries.to(dtype), keys.to(dtype)
    cos, sin = tables(10, dtype=dtype)
    hf_tables = reference(10, 500.0)(queries, POSITIONS)
    hf_queries, hf_keys = apply_rotary_pos_emb(queries, keys, *hf_tables)
    assert torch.equal(apply_rotary(queries, cos, sin), hf_queries)
    assert torch.equal(apply_rotary(keys, cos, sin), hf_keys)


def test_interleaved_multiplies_complex_numbers():
    x = torch.randn(2, 3, 4, 10, dtype=torch.float64)
    cos, sin = exact_tables(10, POSITIONS)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
    torch.testing.assert_close(apply_rotary_interleaved(x, cos, sin), turned)


@pytest.mark.parametrize("rotary_dim", [10, 6])
def test_interleaved_is_half_split_with_features_reordered(rotary_dim):
    x = torch.randn(2, 3, 4, 10)
    cos, sin = tables(rotary_dim)
    turning, passing = x[..., :rotary_dim], x[..., rotary_dim:]
    split = torch.cat((interleaved_to_half_split(turning), passing), -1)
    split = apply_rotary(split, cos, sin)
    back = half_split_to_interleaved(split[..., :rotary_dim])
    expected = torch.cat((back, split[..., rotary_dim:]), -1)
    torch.testing.assert_close(apply_rotary_interleaved(x, cos, sin), expected)


def test_the_two_orders_by_number():
    assert interleaved_to_half_split(torch.arange(6.0)).tolist() == [0, 2, 4, 1, 3, 5]
    x = torch.randn(3, 10)
    assert torch.equal(half_split_to_interleaved(interleaved_to_half_split(x)), x)


def test_reordered_rows_give_the_scores_of_meta():
    embed_dim, num_heads, head_dim = 7, 3, 10
    x = torch.randn(2, 4, embed_dim, dtype=torch.float64)
    w_q, w_k = torch.randn(2, num_heads * head_dim, embed_dim, dtype=torch.float64)
    cos, sin = exact_tables(head_dim, POSITIONS)

    def scores(apply, *weights):
        queries, keys = (
            (x @ weight.T).unflatten(-1, (num_heads, head_dim)).transpose(1, 2)
            for weight in weights
        )
        return apply(queries, cos, sin) @ apply(keys, cos, sin).transpose(-2, -1)

    reordered = (rows_to_half_split(w, num_heads) for w in (w_q, w_k))
    torch.testing.assert_close(
        scores(apply_rotary, *reordered), scores(apply_rotary_interleaved, w_q, w_k)
    )


@pytest.mark.parametrize("apply", [apply_rotary, apply_rotary_interleaved])
def test_features_beyond_the_tables_pass(apply):
    x = torch.randn(2, 3, 4, 10)
    found = apply(x, *tables(4))
    assert torch.equal(found[..., 4:], x[..., 4:])
    assert torch.equal(found[..., :4], apply(x[..., :4], *tables(4)))
    assert not torch.isclose(found[1, :, 3, :4], x[1, :, 3, :4]).any()


@pytest.mark.parametrize("apply", [apply_rotary, apply_rotary_interleaved])
def test_tables_wider_than_a_head(apply):
    with pytest.raises(ValueError, match="tables turn 12 features, a head has 10"):
        apply(torch.randn(2, 3, 4, 10), *tables(12))


@pytest.mark.parametrize("apply", [apply_rotary, apply_rotary_interleaved])
def test_scores_depend_on_distance_only(apply):
    query, key = torch.randn(2, 1, 1, 1, 10, dtype=torch.float64)

    def score(query_at, key_at):
        at = [exact_tables(10, torch.tensor([[p]])) for p in (query_at, key_at)]
        return (apply(query, *at[0]) * apply(key, *at[1])).sum()

    torch.testing.assert_close(score(9, 2), score(100_007, 100_000))
    assert not torch.isclose(score(9, 2), score(2, 9))  # distance has a sign
    torch.testing.assert_close(score(4, 4), (query * key).sum())


@pytest.mark.parametrize("head_dim", [64, 128, 10])
@pytest.mark.parametrize("base", [500_000.0, 10_000.0])
@pytest.mark.parametrize(
    "scaling",
    [
        Llama3Scaling(8.0, 1.0, 4.0, 8192),  # Llama 3.1
        Llama3Scaling(32.0, 1.0, 4.0, 8192),  # Llama 3.2
        Llama3Scaling(3.0, 0.5, 7.0, 100),
    ],
)
def test_scaled_frequencies_equal_transformers(head_dim, base, scaling):
    parameters = {
        "rope_type": "llama3",
        "rope_theta": base,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_seq_len,
    }
    assert Llama3Scaling.from_hf(parameters) == scaling
    sizes = {"head_dim": head_dim, "max_position_embeddings": 131_072}
    config = LlamaConfig(rope_parameters=parameters, **sizes)
    theirs = LlamaRotaryEmbedding(config).inv_freq
    ours = scale_frequencies(rope_frequencies(head_dim, base), scaling)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert torch.equal(ours[0], theirs[0])  # the fast ones keep theirs exactly


def test_fast_pairs_keep_their_frequency_and_slow_ones_slow_down():
    """Within 100 tokens these turn 40, 8, 4, 2, 1 and 0.3 times."""
    frequencies = torch.tensor([40, 8, 4, 2, 1, 0.3]) * 2 * torch.pi / 100
    scaled = scale_frequencies(frequencies, Llama3Scaling(10.0, 1.0, 4.0, 100))
    # A third of the way from 1 turn to 4: a third kept, two thirds ten times slower.
    expected = torch.tensor([1, 1, 1, 1 / 3 + 2 / 30, 0.1, 0.1])
    torch.testing.assert_close(scaled / frequencies, expected)


@pytest.mark.parametrize(
    "bad",
    [(8.0, 4.0, 4.0, 10), (0.0, 1.0, 4.0, 10), (8.0, 0.0, 4.0, 10), (8.0, 1.0, 4.0, 0)],
)
def test_a_scaling_that_cannot_be(bad):
    with pytest.raises(ValueError, match=r"rope scaling needs .*factor=[08]\.0"):
        Llama3Scaling(*bad)


@pytest.mark.parametrize("kind", ["linear", "yarn", None, 3])
def test_another_kind_of_scaling(kind):
    with pytest.raises(ValueError, match=f"rope type is {kind!r}, known are 'default'"):
        Llama3Scaling.from_hf({"rope_type": kind, "factor": 2.0})


def test_plain_rope_needs_no_scaling():
    assert Llama3Scaling.from_hf({}) is None
    assert Llama3Scaling.from_hf({"type": "default"}) is None
    frequencies = rope_frequencies(8, 500.0)
    assert torch.equal(scale_frequencies(frequencies, None), frequencies)
