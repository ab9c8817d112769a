import dataclasses
import json

import pytest
import torch
import transformers

from annotated_src.checkpoint import load_model
from annotated_src.kv_cache import cached_length
from annotated_src.models import llama
from annotated_src.models.llama import TINYLLAMA_1_1B, Llama, LlamaConfig
from annotated_src.rotary import Llama3Scaling

LENGTHS = [4, 9, 6]  # of the rows of a padded batch
NUM_TOKENS = max(LENGTHS)
HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture
def tokens():
    return torch.randint(0, 97, (3, NUM_TOKENS))


@pytest.fixture
def is_token():
    """True at the last 4, 9 and 6 tokens: padding is on the left."""
    places = torch.arange(NUM_TOKENS)
    return places >= NUM_TOKENS - torch.tensor(LENGTHS)[:, None]


@pytest.fixture
def small(make_checkpoint):
    return make_checkpoint()


def test_logits_equal_transformers(checkpoint, tokens):
    found, expected = checkpoint.model(tokens), checkpoint.reference(tokens).logits
    assert expected.std() > 0.5  # so that 1e-4 means something
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_every_layer_equals_transformers(checkpoint, tokens):
    model, seen = checkpoint.model, []
    layers = [model.embedding, *model.blocks[:-1], model.norm]
    hooks = [x.register_forward_hook(lambda *a: seen.append(a[2])) for x in layers]
    model(tokens)
    for hook in hooks:
        hook.remove()
    theirs = checkpoint.reference(tokens, output_hidden_states=True).hidden_states
    for ours, expected in zip(seen, theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("chunks", [[9], [1] * 9, [5, 1, 3], [1, 8]])
def test_cached_equals_uncached(checkpoint, tokens, chunks):
    cache = checkpoint.model.new_cache(3, NUM_TOKENS)
    parts = [checkpoint.model(part, cache) for part in tokens.split(chunks, dim=1)]
    assert [layer.length for layer in cache] == [NUM_TOKENS] * 3
    torch.testing.assert_close(
        torch.cat(parts, dim=1), checkpoint.model(tokens), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("num_cached", [0, 4])
def test_the_last_logits_alone(checkpoint, tokens, num_cached):
    model = checkpoint.model
    caches = [model.new_cache(3, NUM_TOKENS) for _ in range(2)]
    if num_cached:
        for cache in caches:
            model(tokens[:, :num_cached], cache)
    whole = model(tokens[:, num_cached:], caches[0])
    last = model(tokens[:, num_cached:], caches[1], last_logits_only=True)
    assert last.shape == (3, 1, 97)
    torch.testing.assert_close(last, whole[:, -1:], rtol=0, atol=1e-5)
    theirs = checkpoint.reference(tokens, logits_to_keep=1).logits
    torch.testing.assert_close(last, theirs, rtol=0, atol=1e-4)
    assert cached_length(caches[1]) == NUM_TOKENS


def test_a_padded_row_equals_the_row_alone(checkpoint, tokens, is_token):
    found = checkpoint.model(tokens, is_token=is_token)
    assert found.isfinite().all()
    for row, logits, real in zip(tokens, found, is_token, strict=True):
        alone = checkpoint.model(row[real][None])[0]
        torch.testing.assert_close(logits[real], alone, rtol=0, atol=1e-4)


def test_padding_takes_no_position(small, tokens, is_token, monkeypatch):
    """Scores depend on distance only, so the logits would not tell."""
    seen, real = [], llama.rope_tables

    def spy(positions, *others):
        seen.append(positions)
        return real(positions, *others)

    monkeypatch.setattr(llama, "rope_tables", spy)
    cache = small.model.new_cache(3, NUM_TOKENS)
    small.model(tokens[:, :8], cache, is_token[:, :8])
    small.model(tokens[:, 8:], cache, is_token)
    for row, real_tokens, length in zip(
        torch.cat(seen, dim=1), is_token, LENGTHS, strict=True
    ):
        assert row[real_tokens].tolist() == list(range(length))


def test_a_padded_batch_equals_transformers(checkpoint, tokens, is_token):
    found = checkpoint.model(tokens, is_token=is_token)
    expected = checkpoint.reference(tokens, attention_mask=is_token.long()).logits
    torch.testing.assert_close(found[is_token], expected[is_token], rtol=0, atol=1e-4)


@pytest.mark.parametrize("chunks", [[1] * 9, [6, 1, 2]])
def test_a_padded_batch_with_a_cache(checkpoint, tokens, is_token, chunks):
    cache, parts = checkpoint.model.new_cache(3, NUM_TOKENS), []
    for part in tokens.split(chunks, dim=1):
        so_far = is_token[:, : cached_length(cache) + part.shape[1]]
        parts.append(checkpoint.model(part, cache, so_far))
    whole = checkpoint.model(tokens, is_token=is_token)
    found = torch.cat(parts, dim=1)
    torch.testing.assert_close(found[is_token], whole[is_token], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_runs_and_stays_half(make_checkpoint, tokens, dtype):
    _, reference, model = make_checkpoint(dtype=dtype)
    assert {weight.dtype for weight in model.state_dict().values()} == {dtype}
    cache = model.new_cache(3, NUM_TOKENS)
    assert cache[0].keys.dtype == dtype
    logits = model(tokens, cache)
    assert logits.dtype == dtype
    exact = make_checkpoint().model(tokens)
    error, theirs = logits - exact, reference(tokens).logits - exact
    assert error.norm() < 1.3 * theirs.norm()  # no worse than transformers


@pytest.mark.parametrize("dtype", HALVES)
def test_the_dtype_asked_for_wins_over_the_stored_one(make_checkpoint, dtype):
    wide, narrow = make_checkpoint(), make_checkpoint(dtype=dtype)
    narrowed = load_model(wide.path, dtype).state_dict()
    widened = load_model(narrow.path).state_dict()
    for name, weight in wide.model.state_dict().items():
        assert torch.equal(narrowed[name], weight.to(dtype))
        assert widened[name].dtype == torch.float32


@pytest.mark.parametrize("bad", [-1, 97])
def test_an_id_outside_the_vocabulary(small, bad):
    cache = small.model.new_cache(1, 8)
    with pytest.raises(ValueError, match=rf"must be 0 to 96, got ids from .*{bad}"):
        small.model(torch.tensor([[3, bad]]), cache)
    assert cached_length(cache) == 0


@pytest.mark.parametrize("shape", [(), (5,), (1, 2, 3)])
@pytest.mark.usefixtures("unchecked")
def test_tokens_must_be_rows(small, shape):
    with pytest.raises(ValueError, match=r"tokens must be \(B, T\), got shape"):
        small.model(torch.zeros(shape, dtype=torch.long))


def test_a_full_cache_stays_as_it_was(small, tokens):
    cache = small.model.new_cache(3, 7)
    small.model(tokens[:, :6], cache)
    before = [(c.keys.clone(), c.values.clone()) for c in cache]
    with pytest.raises(ValueError, match="it holds 7 tokens, 6 are in use and 3 more"):
        small.model(tokens[:, 6:], cache)
    for layer, (keys, values) in zip(cache, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
        assert layer.length == 6
    small.model(tokens[:, 6:7], cache)  # the last place is still free


def test_a_cache_of_another_batch_size(small, tokens):
    message = r"head_dim\) = \(2, 2, 10\), got \(3, 2, 10\)"
    with pytest.raises(ValueError, match=message):
        small.model(tokens, small.model.new_cache(2, 9))


@pytest.mark.parametrize("shape", [(3, 1), (3, 3), (3, 5), (2, 4)])
@pytest.mark.usefixtures("unchecked")
def test_is_token_must_cover_cache_and_call(small, tokens, shape):
    cache = small.model.new_cache(3, 9)
    small.model(tokens[:, :3], cache)
    with pytest.raises(ValueError, match=rf"is_token .*\({shape[0]}, {shape[1]}\)"):
        small.model(tokens[:, 3:4], cache, torch.ones(shape, dtype=torch.bool))
    assert cached_length(cache) == 3


def test_heads_that_do_not_divide(small):
    sizes = dataclasses.replace(small.model.config, num_kv_heads=4)
    with pytest.raises(ValueError, match=r"\(4\) must divide num_heads \(6\)"):
        Llama(sizes)


CONFIG = {
    "vocab_size": 97,
    "num_hidden_layers": 3,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "rms_norm_eps": 0.01,
    "rope_theta": 500.0,
}
SIZES = LlamaConfig(97, 3, 48, 6, 2, 10, 80, 64, 0.01, 500.0, tied_head=False)

LLAMA3_4 = {  # as transformers 4 writes it
    "rope_type": "llama3",
    "factor": 8,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALING = Llama3Scaling(8.0, 1.0, 4.0, 8192)


def without(*keys):
    return {key: value for key, value in CONFIG.items() if key not in keys}


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (CONFIG, {}),
        (CONFIG | {"tie_word_embeddings": True}, {"tied_head": True}),
        (without("head_dim"), {"head_dim": 8}),
        (CONFIG | {"head_dim": None}, {"head_dim": 8}),
        (without("num_key_value_heads"), {"num_kv_heads": 6}),
        (without("rope_theta"), {"rope_base": 10_000.0}),
        (CONFIG | {"rope_scaling": None, "hidden_act": "silu"}, {}),
        (
            without("rope_theta")
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}},
            {"rope_base": 700.0},
        ),
        (CONFIG | {"attention_bias": True}, {"attention_bias": True}),
        (CONFIG | {"mlp_bias": True}, {"mlp_bias": True}),
        (CONFIG | {"rope_scaling": LLAMA3_4}, {"rope_scaling": SCALING}),
        (
            without("rope_theta")
            | {"rope_parameters": LLAMA3_4 | {"rope_theta": 500.0}},
            {"rope_scaling": SCALING},
        ),
    ],
)
def test_config_of_transformers_4_and_5(config, changes):
    assert LlamaConfig.from_hf(config) == dataclasses.replace(SIZES, **changes)


def test_config_that_transformers_wrote(small):
    config = json.loads((small.path / "config.json").read_text("utf-8"))
    assert LlamaConfig.from_hf(config) == SIZES


@pytest.mark.parametrize(
    ("asked", "key", "value"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope", "linear"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "config.json has no", "factor"),
        ({"rope_scaling": LLAMA3_4 | {"factor": -1.0}}, "rope scaling", "-1.0"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope", "yarn"),
        ({"hidden_act": "gelu"}, "hidden_act", "gelu"),
        ({"head_dim": None, "hidden_size": 50}, "6 heads do not divide", "width 50"),
        ({"head_dim": 9}, "head_dim must be even", "9"),
        ({"head_dim": None, "hidden_size": 54}, "head_dim must be even", "9"),
    ],
)
def test_a_config_that_asks_for_what_llama_does_not_do(asked, key, value):
    with pytest.raises(ValueError, match=value):
        Llama(LlamaConfig.from_hf(CONFIG | asked))
    with pytest.raises(ValueError, match=key):
        Llama(LlamaConfig.from_hf(CONFIG | asked))


@pytest.mark.parametrize(
    "key",
    sorted(CONFIG.keys() - {"num_key_value_heads", "head_dim", "rope_theta"}),
)
def test_a_config_without_a_size(key):
    with pytest.raises(ValueError, match=f"config.json has no '{key}'"):
        LlamaConfig.from_hf(without(key))


def test_tinyllama_is_a_llama_of_published_size():
    keys = {
        "vocab_size": 32000,
        "num_hidden_layers": 22,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 5632,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    assert LlamaConfig.from_hf(keys | {"rope_theta": 10000.0}) == TINYLLAMA_1_1B
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**keys))
        ours = Llama(TINYLLAMA_1_1B)
    counts = [sum(w.numel() for w in model.parameters()) for model in (ours, theirs)]
    assert counts == [1_100_048_384] * 2


def test_the_tiny_model_runs():
    config = llama.tiny_config()
    assert config.num_heads * config.head_dim != config.embed_dim
    assert Llama(config)(torch.arange(6)[None]).shape == (1, 6, 96)


@pytest.mark.parametrize("kept", [0, 1])
def test_a_cache_for_every_block(small, kept):
    cache = small.model.new_cache(1, 8)[:kept]
    with pytest.raises(ValueError, match=rf"{kept} caches for 3 blocks"):
        small.model(torch.tensor([[1, 2]]), cache)
    assert all(layer.length == 0 for layer in cache)
