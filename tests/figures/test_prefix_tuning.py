import pytest
import torch

from annotated_src.figures.prefix_tuning import (
    draw_mass,
    draw_places,
    mass_data,
    place_data,
    prefix_mass,
)
from annotated_src.models.chatglm import ChatGLM, ChatGLMConfig
from annotated_src.positions import BlankIds

TOKENS = torch.tensor([[8, 9, 10, 4, 3]])


def make_model(seed):
    torch.manual_seed(seed)
    config = ChatGLMConfig(
        vocab_size=16,
        num_layers=2,
        embed_dim=24,
        num_heads=3,
        ffn_dim=40,
        max_seq_len=20,
        norm_eps=1e-5,
        blank_ids=BlankIds(sop=3, gmask=4, mask=5),
        prefix_len=6,
    )
    return ChatGLM(config).eval()


def test_a_key_of_the_prefix_scores_as_a_token_at_place_zero():
    data = place_data()
    assert data.tokens.shape == (12, 12)
    torch.testing.assert_close(data.prefix, data.tokens[:, 0], rtol=0, atol=1e-12)


def test_tokens_score_by_distance_and_the_prefix_by_the_place_of_the_query():
    data = place_data()
    for offset in range(-10, 11):
        line = data.tokens.diagonal(offset)
        assert line.max() - line.min() < 1e-9
    assert data.prefix.max() - data.prefix.min() > 1


def test_the_mass_follows_the_keys():
    """Keys of zero score 0; a prefix that outshouts every token takes everything."""
    model = make_model(0)
    mass = prefix_mass(model, TOKENS)
    assert mass.shape == (1, 2, 3, 5)
    assert (mass > 0).all()
    assert (mass < 1).all()
    weight = model.prefix_encoder.embedding.weight
    by_kind = weight.detach().unflatten(-1, model.prefix_encoder.sizes)
    by_kind[:, :, 0] = 0
    with torch.no_grad():
        for block in model.blocks:
            block.attention.qkv_proj.weight.zero_()
            block.attention.qkv_proj.bias.zero_()
        weight.copy_(by_kind.flatten(1))
    # All scores are 0 now, so the mass is the share of the visible columns.
    visible = torch.tensor([4, 4, 4, 4, 5]) + 6
    expected = (6 / visible).expand(1, 2, 3, 5)
    torch.testing.assert_close(prefix_mass(model, TOKENS), expected)


def test_hooks_do_not_stay():
    model = make_model(0)
    prefix_mass(model, TOKENS)
    assert not any(block.attention._forward_pre_hooks for block in model.blocks)


def test_before_and_after_are_what_each_model_gives():
    first, second = make_model(0), make_model(1)
    data = mass_data(first, second, TOKENS, list("abcde"))
    assert data.before.shape == data.after.shape == (2, 3, 5)
    torch.testing.assert_close(data.after, prefix_mass(second, TOKENS)[0])
    assert not torch.allclose(data.before, data.after)


@pytest.mark.parametrize("draw", ["places", "mass"])
def test_figures_draw(draw):
    if draw == "places":
        figure = draw_places(place_data())
    else:
        words = list("abcde")
        figure = draw_mass(mass_data(make_model(0), make_model(1), TOKENS, words))
    assert figure._repr_png_().startswith(b"\x89PNG")
