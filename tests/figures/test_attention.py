"""What the figures of the chapter on attention show."""

import pytest
import torch

from annotated_src.figures import attention as figures
from annotated_src.figures.style import BookFigure


@pytest.fixture(scope="module")
def rhyme():
    return figures.rhyme_data()


@pytest.fixture(scope="module")
def scale():
    return figures.scale_data()


@pytest.fixture(scope="module")
def flow():
    return figures.flow_data()


def test_the_first_head_looks_one_back(rhyme):
    expected = torch.diag(torch.ones(len(rhyme.words) - 1), -1).double()
    expected[0, 0] = 1
    torch.testing.assert_close(rhyme.before, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("text", [figures.RHYME, "<s> a b a b c a b a", "<s> x x x y"])
def test_the_guess_is_the_share_of_what_followed(text):
    data = figures.rhyme_data(text)
    for t, word in enumerate(data.words):
        followers = [s for s in range(1, t + 1) if data.words[s - 1] == word] or [0]
        expected = torch.zeros_like(data.found[t])
        expected[followers] = 1 / len(followers)
        torch.testing.assert_close(data.found[t], expected, atol=1e-4, rtol=0)
        shares = torch.zeros_like(data.guesses[t])
        shares.index_add_(0, data.ids, expected)
        torch.testing.assert_close(data.guesses[t], shares, atol=1e-4, rtol=0)


def test_the_arcs_are_those_that_the_alt_text_counts(rhyme):
    came_true = failed = 0
    for t in range(len(rhyme.words) - 1):
        for s in rhyme.found[t, 1:].gt(0.1).nonzero()[:, 0].add(1).tolist():
            came_true += rhyme.words[s] == rhyme.words[t + 1]
            failed += rhyme.words[s] != rhyme.words[t + 1]
    assert (came_true, failed) == (6, 4)
    assert rhyme.words[rhyme.found[-1].argmax()] == "This"


def test_only_the_division_keeps_the_softmax_awake(scale):
    divided, bare = scale.looked_at["divided"], scale.looked_at["bare"]
    assert divided[0] == bare[0]
    assert min(divided[2:]) > 20
    assert max(divided[2:]) < 21
    assert bare == sorted(bare, reverse=True)
    assert bare[-1] < 1.2
    assert scale.largest["bare"][3] == pytest.approx(0.83, abs=0.01)
    assert scale.slope["bare"][-1] < 1e-4
    assert all(0.1 < slope < 0.14 for slope in scale.slope["divided"][1:])


def test_no_token_hears_from_the_future(flow):
    for size in flow.sizes:
        assert (size.triu(1) == 0).all()
        assert (size.diagonal() > 0).all()
    assert all((size.tril() > 0).sum() == 12 * 13 // 2 for size in flow.sizes[:2])


def test_the_window_widens_with_depth(flow):
    for size, reach in zip(flow.sizes[2:], (3, 5), strict=True):
        band = torch.ones(12, 12).tril().triu(1 - reach).bool()
        assert torch.equal(size > 0, band)


def test_the_figures_draw(rhyme, scale, flow):
    for figure in (
        figures.draw_rhyme(rhyme),
        figures.draw_scale(scale),
        figures.draw_flow(flow),
    ):
        assert isinstance(figure, BookFigure)
        assert figure._repr_png_().startswith(b"\x89PNG")
