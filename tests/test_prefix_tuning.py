import pytest
import torch

from annotated_src.loss import next_token_loss
from annotated_src.models.chatglm import ChatGLM, ChatGLMConfig
from annotated_src.positions import BlankIds, prompt_positions
from annotated_src.prefix_tuning import PrefixEncoder
from annotated_src.rotary_2d import rotation

IDS = BlankIds(sop=3, gmask=4, mask=5)
TOKENS = torch.tensor([[8, 9, 4, 3, 10, 11], [8, 5, 7, 3, 11, 12]])
LABELS = torch.tensor([[-100, -100, -100, 3, 10, 11], [-100, -100, -100, 3, 11, 12]])


@pytest.fixture(params=[False, True], ids=["table", "projection"])
def model(request):
    sizes = {"vocab_size": 16, "num_layers": 2, "embed_dim": 24, "num_heads": 2}
    config = ChatGLMConfig(
        **sizes,
        ffn_dim=40,
        max_seq_len=20,
        norm_eps=1e-5,
        blank_ids=IDS,
        prefix_len=3,
        prefix_projection=request.param,
    )
    return ChatGLM(config)


def test_a_step_of_training_moves_the_prefix_and_nothing_else(model):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    losses = []
    for _ in range(8):
        loss = next_token_loss(model(TOKENS), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, weight in model.state_dict().items():
        is_prefix = name.startswith("prefix_encoder.")
        assert torch.equal(weight, before[name]) != is_prefix, name


def test_the_cache_begins_with_the_prefix(model):
    model.eval()
    cache = model.new_cache(2, 6)
    for layer, (keys, values) in zip(cache, model.prefix_encoder(2), strict=True):
        assert layer.length == 3
        assert torch.equal(layer.keys[:, :, :3], keys)
        assert torch.equal(layer.values[:, :, :3], values)
    first = model(TOKENS[:, :4], cache)
    rest = model(TOKENS[:, 4:], cache)
    assert torch.allclose(torch.cat((first, rest), 1), model(TOKENS), atol=1e-5)
    assert cache.num_tokens == 6


def test_a_prefix_is_seen_by_all_and_moves_no_position(model):
    model.eval()
    block = model.blocks[0]
    seen = []
    block.attention.register_forward_pre_hook(lambda _m, args: seen.append(args))
    model(TOKENS)
    _, rotate, mask, cache = seen[0]
    x, positions = torch.randn(2, 2, 6, 12), prompt_positions(TOKENS, IDS, rows=2)
    assert torch.equal(rotate(x), rotation(positions, 12, x.dtype)(x))
    assert mask.shape == (2, 1, 6, 9)
    assert mask[..., :3].all()
    assert cache.length == 9


def test_dropout_is_only_for_training(model):
    keys = [model.train().prefix_encoder(4)[0][0] for _ in range(2)]
    assert not torch.equal(*keys)
    assert not torch.equal(keys[0][0], keys[0][1])  # each row draws its own
    keys = [model.eval().prefix_encoder(4)[0][0] for _ in range(2)]
    assert torch.equal(*keys)


def test_sizes():
    assert PrefixEncoder(128, 28, 32, 128, False).embedding.weight.shape == (
        128,
        28 * 2 * 4096,
    )
    with pytest.raises(ValueError, match="prefix_len must be positive, got 0"):
        PrefixEncoder(0, 1, 1, 4, False)
