import torch

from annotated_src.figures.prefix_mask import (
    draw_extension,
    draw_flow,
    extension_data,
    flow_data,
    flow_sizes,
    small_chatglm,
)


def test_masks_are_the_rule_and_its_two_limits():
    data = flow_data()
    assert data.contexts == [0, 5, 9]
    assert data.words[5] == "<sop>"
    for context, mask in zip(data.contexts, data.masks, strict=True):
        for t in range(9):
            for s in range(9):
                assert mask[t, s] == (s <= t or s < context)


def test_derivatives_are_zero_exactly_where_the_mask_hides():
    data = flow_data()
    assert data.num_layers == 3
    for mask, size in zip(data.masks, data.sizes, strict=True):
        assert torch.equal(size > 0, mask)
        assert size[mask].min() > 0.01  # far from rounding


def test_a_derivative_is_the_change_that_a_small_step_makes():
    model = small_chatglm(["<sop>", "[gMASK]", "[MASK]", "word"], num_layers=2)
    tokens = torch.tensor([[3, 1, 0, 3]])
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    sizes = flow_sizes(model, tokens, mask)
    embedded, step = model.embedding(tokens), 1e-3
    # Attention rounds to float32, so the step must not be too small.
    squares = torch.zeros(4, dtype=torch.float64)
    for feature in range(embedded.shape[-1]):
        both = []
        for sign in (1, -1):
            moved = embedded.clone()
            moved[0, 1, feature] += sign * step
            hook = model.embedding.register_forward_hook(lambda *_, x=moved: x)
            both.append(model(tokens, mask=mask)[0])
            hook.remove()
        squares += ((both[0] - both[1]) / (2 * step)).square().sum(dim=-1)
    torch.testing.assert_close(sizes[:, 1], squares.sqrt(), rtol=1e-2, atol=1e-6)


def test_one_more_word_leaves_a_prefix_lm_the_first_layer_only():
    data = extension_data()
    causal, prefix = data.moved["causal"], data.moved["prefix LM"]
    assert causal.shape == prefix.shape == (4, len(data.words))
    assert data.new_word not in data.words
    assert causal.max() < 1e-12
    assert prefix[0].max() < 1e-12
    assert prefix[1:].min() > 1e-4


def test_figures_draw_and_count_the_keys():
    assert draw_flow(flow_data())._repr_png_().startswith(b"\x89PNG")
    figure = draw_extension(extension_data())
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["causal: 20 of 20 keys kept", "prefix LM: 5 of 20 keys kept"]
    assert figure._repr_png_().startswith(b"\x89PNG")
