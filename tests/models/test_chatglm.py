"""Sizes and special ids other than the golden model's; the cache; bad input."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from annotated_src.beam_search import beam_search
from annotated_src.checkpoint import load_model, names_by_layer
from annotated_src.generate import generate
from annotated_src.models.chatglm import HF_NAMES, ChatGLM, ChatGLMConfig
from annotated_src.shards import CheckpointError

# The original's keys. No size is like another, eps is large, the head is 20 wide, and
# the special ids stand among the others.
CONFIG = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "vocab_size": 50,
    "num_layers": 4,
    "hidden_size": 60,
    "num_attention_heads": 3,
    "inner_hidden_size": 70,
    "max_sequence_length": 40,
    "layernorm_epsilon": 0.05,
    "bos_token_id": 17,
    "eos_token_id": 2,
    "mask_token_id": 49,
    "gmask_token_id": 0,
    "pad_token_id": 5,
    "position_encoding_2d": True,
    "use_cache": True,
}
SOP, MASK, GMASK = 17, 49, 0
AT_GMASK = [7, 8, 9, 1, GMASK, SOP, 11, 12, 13]
AT_MASK = [7, MASK, 9, 1, 30, SOP, 11, 12, 13]


def random_model(**config):
    model = ChatGLM(ChatGLMConfig.from_hf(CONFIG | config)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Attention's share is small beside alpha times the residual: raise it, so
            # that a mistake in it shows.
            bound = 2.0 if ".attention." in name else 0.5
            weight.uniform_(-bound, bound)
    return model


@pytest.fixture
def model():
    return random_model()


def original_names(model):
    """Its tensors under the names of the original's checkpoint."""
    weights = model.state_dict()
    names = names_by_layer(model, HF_NAMES)
    stored = {theirs: weights[ours].clone() for theirs, ours in names.items()}
    for layer in range(model.config.num_layers):
        where = f"transformer.layers.{layer}.attention.rotary_emb.inv_freq"
        stored[where] = torch.full((5,), 123.0)  # wrong, and never read
    return stored


def spelled_out(weights, c, row, tied, rows=2):
    """One row of ids to logits, token by token and head by head, in the source's order.

    Written from the description of the original, with nothing of the package.
    """
    num_tokens, width = len(row), c["hidden_size"] // c["num_attention_heads"]
    sop = row.index(c["bos_token_id"])
    at_gmask = c["gmask_token_id"] in row
    blank = row.index(c["gmask_token_id"] if at_gmask else c["mask_token_id"])
    place = [i if i < sop else blank for i in range(num_tokens)]
    step = [max(0, i - sop + 1) for i in range(num_tokens)]
    counts = [place, step]
    if rows == 1:
        counts = [list(range(num_tokens)) if at_gmask else place]
    part = width // rows
    exponents = torch.arange(0, part, 2).float() / part
    frequency = (1 / 10000**exponents).half().float()

    def norm(x, name):
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, c["layernorm_epsilon"])

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def turn(x, t):
        parts = []
        for count, piece in zip(counts, x.split(part), strict=True):
            angle = (count[t] * frequency).repeat(2)
            a, b = piece.chunk(2)
            parts.append(piece * angle.cos() + torch.cat((-b, a)) * angle.sin())
        return torch.cat(parts)

    x = weights["transformer.word_embeddings.weight"][row]
    for layer in range(c["num_layers"]):
        name = f"transformer.layers.{layer}"
        x = norm(x, f"{name}.input_layernorm")
        fused = linear(x, f"{name}.attention.query_key_value")
        heads = []
        for head in range(c["num_attention_heads"]):
            q, k, v = fused[:, head * 3 * width : (head + 1) * 3 * width].split(
                width, 1
            )
            q = torch.stack([turn(q[t], t) for t in range(num_tokens)])
            k = torch.stack([turn(k[t], t) for t in range(num_tokens)])
            mixed = []
            for t in range(num_tokens):
                seen = [s for s in range(num_tokens) if s <= t or s < sop]
                shares = ((k[seen] @ q[t]) / math.sqrt(width)).softmax(0)
                mixed.append(shares @ v[seen])
            heads.append(torch.stack(mixed))
        attended = linear(torch.cat(heads, 1), f"{name}.attention.dense")
        x = norm(x * math.sqrt(56) + attended, f"{name}.post_attention_layernorm")
        wide = F.gelu(linear(x, f"{name}.mlp.dense_h_to_4h"), approximate="tanh")
        x = x * math.sqrt(56) + linear(wide, f"{name}.mlp.dense_4h_to_h")
    head = "transformer.word_embeddings" if tied else "lm_head"
    return norm(x, "transformer.final_layernorm") @ weights[f"{head}.weight"].T


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [2, 1])
def test_other_sizes_equal_the_spelled_out_model(tied, rows):
    c = CONFIG | {"tie_word_embeddings": tied, "position_encoding_2d": rows == 2}
    model = random_model(**c)
    weights, batch = original_names(model), [AT_GMASK, AT_MASK]
    found = model(torch.tensor(batch))
    for row, logits in zip(batch, found, strict=True):
        wanted = spelled_out(weights, c, row, tied, rows)
        assert torch.allclose(logits, wanted, atol=1e-5)
        assert wanted.abs().max() > 1


@pytest.mark.parametrize("rows", [2, 1])
@pytest.mark.parametrize("steps", [[6, 1, 1, 1], [6, 3], [7, 2], [8, 1], [9]])
def test_cached_equals_uncached(steps, rows):
    model = random_model(position_encoding_2d=rows == 2)
    tokens = torch.tensor([AT_GMASK, AT_MASK])
    cache = model.new_cache(2, 9)
    pieces = [model(piece, cache) for piece in tokens.split(steps, dim=1)]
    assert torch.allclose(torch.cat(pieces, dim=1), model(tokens), atol=1e-5)
    assert cache.num_tokens == 9


def test_given_positions_and_masks_take_the_place_of_the_derived(model):
    tokens = torch.tensor([AT_GMASK])
    positions = torch.randint(0, 30, (1, 2, 9))
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    derived = model(tokens)
    assert not torch.allclose(model(tokens, positions=positions), derived, atol=0.02)
    assert not torch.allclose(model(tokens, mask=mask), derived, atol=0.02)
    plain = torch.tensor([[1, 2, 3]])  # no special token, so nothing can be derived
    given = {"positions": positions[..., :3], "mask": mask[..., :3, :3]}
    assert model(plain, **given).isfinite().all()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[7, 8, GMASK, 9]], r"no <sop> \(id 17\) in row 0"),
        ([AT_MASK, [7] * 8 + [SOP]], r"no mask token \(id 0 or 49\) in row 1"),
        ([[7, GMASK, SOP, 50]], "token ids must be 0 to 49, got ids from 0 to 50"),
        ([[-1, GMASK, SOP, 4]], "token ids must be 0 to 49, got ids from -1 to 17"),
    ],
)
def test_prompts_that_cannot_be_read(model, tokens, message):
    with pytest.raises(ValueError, match=message):
        model(torch.tensor(tokens))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"positions": torch.zeros(1, 9).long()}, r"positions must be \(1, 2, 9\)"),
        ({"positions": torch.zeros(1, 2, 8).long()}, r"positions must be \(1, 2, 9\)"),
        ({"positions": torch.full((1, 2, 9), -1)}, "got positions -1 to -1"),
        ({"mask": torch.ones(1, 9, 9).bool()}, r"mask must be \(1, 1, 9, 9\)"),
        ({"mask": torch.ones(1, 1, 9, 8).bool()}, r"got \(1, 1, 9, 8\)"),
        ({"mask": torch.ones(1, 1, 9, 9)}, r"True = visible, got torch\.float32"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_positions_and_masks_that_do_not_fit(model, given, message):
    cache = model.new_cache(1, 9)
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([AT_GMASK]), cache, **given)
    assert cache.num_tokens == cache[0].length == 0


def test_a_full_cache_leaves_the_answer_where_it_was(model):
    tokens = torch.tensor([AT_GMASK])
    cache = model.new_cache(1, 8)
    model(tokens[:, :8], cache)
    with pytest.raises(ValueError, match="cache is full"):
        model(tokens[:, 8:], cache)
    assert cache.num_tokens == 8
    assert cache.positions.tolist() == [[4, 3]]


@pytest.mark.parametrize("key", ["hidden_size", "bos_token_id", "inner_hidden_size"])
def test_a_config_without_a_key(key):
    config = {name: value for name, value in CONFIG.items() if name != key}
    with pytest.raises(ValueError, match=rf"config\.json has no '{key}'"):
        ChatGLMConfig.from_hf(config)


def test_heads_that_do_not_part_into_pairs():
    with pytest.raises(ValueError, match="hidden_size must be a multiple of 12"):
        ChatGLMConfig.from_hf(CONFIG | {"hidden_size": 30})
    config = CONFIG | {"hidden_size": 30, "position_encoding_2d": False}
    assert ChatGLMConfig.from_hf(config).head_dim == 10


def test_defaults_of_the_original():
    config = {name: CONFIG[name] for name in CONFIG if name != "position_encoding_2d"}
    read = ChatGLMConfig.from_hf(config | {"inner_hidden_size": None})
    assert (read.ffn_dim, read.position_rows, read.prefix_len) == (240, 2, 0)
    assert read.tied_head


def test_six_billion_parameters():
    sizes = {
        "vocab_size": 130528,
        "hidden_size": 4096,
        "num_layers": 28,
        "num_attention_heads": 32,
        "inner_hidden_size": 16384,
        "max_sequence_length": 2048,
    }
    with torch.device("meta"):
        model = ChatGLM(ChatGLMConfig.from_hf(CONFIG | sizes))
    assert sum(weight.numel() for weight in model.parameters()) == 6_173_286_400


# Generation ---------------------------------------------------------------------------


def test_greedy_is_the_argmax_without_a_cache(model):
    tokens = torch.tensor([AT_GMASK[:6], AT_MASK[:6]])
    found = generate(model, tokens, max_new_tokens=8)
    for _ in range(8):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(found, tokens)


def test_one_beam_is_greedy(model):
    tokens = torch.tensor([AT_MASK[:6]])
    greedy = generate(model, tokens, max_new_tokens=6)
    found = beam_search(model, tokens, num_beams=1, max_new_tokens=6)
    assert torch.equal(found, greedy)


def test_enough_beams_find_the_best_of_all():
    """A vocabulary of 18, two tokens: every continuation is scored."""
    model = random_model(vocab_size=18, gmask_token_id=1, mask_token_id=2)
    prompt = torch.tensor([[5, 1, SOP]])
    ids = torch.arange(18)
    ends = torch.cartesian_prod(ids, ids)
    everything = torch.cat((prompt.expand(len(ends), -1), ends), dim=1)
    shares = model(everything)[:, 2:-1].log_softmax(dim=-1)
    scores = shares.gather(2, ends[..., None]).sum(dim=(1, 2))
    found = beam_search(model, prompt, num_beams=18, max_new_tokens=2)
    assert found[0, 3:].tolist() == ends[scores.argmax()].tolist()


@pytest.mark.parametrize("wrong", [{"num_beams": 0}, {"max_new_tokens": 0}])
def test_beams_that_cannot_be(model, wrong):
    options = {"num_beams": 2, "max_new_tokens": 2} | wrong
    with pytest.raises(ValueError, match="1 row, 1 beam or more"):
        beam_search(model, torch.tensor([AT_MASK]), **options)
    with pytest.raises(ValueError, match="got 2, 2 and 2"):
        beam_search(model, torch.tensor([AT_MASK] * 2), num_beams=2, max_new_tokens=2)


# Checkpoints --------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path):
    """Write a directory as the original's: config, and weights in one of its forms."""

    def in_form(model, form, dtype=torch.float32, **config):
        tensors = {n: t.to(dtype) for n, t in original_names(model).items()}
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | config), "utf-8")
        if form == "one file":
            save_file(tensors, tmp_path / "model.safetensors")
            return tmp_path
        kind, save = {
            "safetensors": ("model-{:05}-of-{:05}.safetensors", save_file),
            "bin": ("pytorch_model-{:05}-of-{:05}.bin", torch.save),
        }[form]
        names, weight_map = sorted(tensors), {}
        for i in range(3):
            file = kind.format(i + 1, 3)
            weight_map |= dict.fromkeys(names[i::3], file)
            save({name: tensors[name] for name in names[i::3]}, tmp_path / file)
        index = "model.safetensors" if form == "safetensors" else "pytorch_model.bin"
        content = json.dumps({"metadata": {}, "weight_map": weight_map})
        (tmp_path / f"{index}.index.json").write_text(content, "utf-8")
        return tmp_path

    return in_form


@pytest.mark.parametrize("form", ["one file", "safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_forms_of_a_checkpoint_load(write, model, form, dtype):
    folder = write(model, form, dtype)
    found, tokens = load_model(folder, dtype), torch.tensor([AT_GMASK, AT_MASK])
    assert not found.training
    assert {weight.dtype for weight in found.parameters()} == {dtype}
    expected = model.to(dtype)(tokens)
    torch.testing.assert_close(found(tokens), expected, rtol=0, atol=1e-5)


def test_a_model_with_a_prefix_loads(write):
    model = random_model(pre_seq_len=3, prefix_projection=True)
    folder = write(model, "bin", pre_seq_len=3, prefix_projection=True)
    found, tokens = load_model(folder), torch.tensor([AT_GMASK])
    torch.testing.assert_close(found(tokens), model(tokens), rtol=0, atol=1e-5)
    trained = [n for n, weight in found.named_parameters() if weight.requires_grad]
    assert trained
    assert all(name.startswith("prefix_encoder.") for name in trained)


def test_a_quantised_checkpoint_loads(write, model):
    from annotated_src.chatglm_quantize import quantize_linears

    quantised = quantize_linears(random_model(), 4)
    stored = original_names(quantised)
    folder = write(quantised, "one file", quantization_bit=4)
    save_file(stored, folder / "model.safetensors")  # integers, as they are
    found, tokens = load_model(folder), torch.tensor([AT_MASK])
    assert found.blocks[0].ffn.up_proj.weight.dtype == torch.int8
    torch.testing.assert_close(found(tokens), quantised(tokens), rtol=0, atol=1e-5)


def test_the_head_is_tied_unless_the_checkpoint_has_two_matrices(write):
    tokens = torch.tensor([AT_GMASK])
    apart = random_model(tie_word_embeddings=False)
    folder = write(apart, "safetensors")
    assert not load_model(folder).config.tied_head
    torch.testing.assert_close(
        load_model(folder)(tokens), apart(tokens), rtol=0, atol=1e-5
    )
    with torch.no_grad():
        apart.lm_head.weight.copy_(apart.embedding.weight)
    folder = write(apart, "safetensors")
    found = load_model(folder)
    assert found.config.tied_head
    assert not hasattr(found, "lm_head")
    torch.testing.assert_close(found(tokens), apart(tokens), rtol=0, atol=1e-5)


def test_config_json_has_the_last_word_on_the_head(write):
    """As from_pretrained of the original: it ties, whatever is stored."""
    tokens = torch.tensor([AT_GMASK])
    apart = random_model(tie_word_embeddings=False)
    tied = load_model(write(apart, "one file", tie_word_embeddings=True))
    assert tied.config.tied_head
    again = random_model()
    again.load_state_dict(tied.state_dict())
    torch.testing.assert_close(tied(tokens), again(tokens), rtol=0, atol=1e-5)
    assert not torch.allclose(tied(tokens), apart(tokens), atol=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_bit": 3}, "bits must be 4 or 8, got 3"),
        ({"hidden_size": 61}, "hidden_size must be a multiple of 12, is 61"),
        ({"num_layers": 5}, r"missing: blocks\.4\.attention_norm\.weight"),
        ({"num_layers": 3}, r"unexpected: transformer\.layers\.3\."),
        ({"pre_seq_len": 4}, r"missing: prefix_encoder\.embedding\.weight"),
        ({"inner_hidden_size": 64}, r"checkpoint \(70, 60\), model \(64, 60\)"),
        (
            {"quantization_bit": 8},
            r"missing: blocks\.0\.attention\.qkv_proj\.weight_sc",
        ),
        ({"tie_word_embeddings": False}, r"missing: lm_head\.weight"),
    ],
)
def test_a_config_that_does_not_fit_the_weights(write, model, change, message):
    folder = write(model, "safetensors", **change)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_only_the_frequencies_are_ignored(write, model):
    folder = write(model, "one file")
    stored = original_names(model)
    surplus = {"surplus.weight": torch.ones(1)}
    save_file(stored | surplus, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected: surplus\.weight") as caught:
        load_model(folder)
    assert "inv_freq" not in str(caught.value)
