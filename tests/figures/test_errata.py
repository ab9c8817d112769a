import math

import pytest
import torch

from annotated_src.figures import errata
from annotated_src.figures.errata import BELIEFS, CASES, Belief, costs_data
from annotated_src.golden import golden_model

COSTS = costs_data()


def gaps(belief):
    return dict(
        zip(COSTS.cases, COSTS.gaps[COSTS.beliefs.index(belief)].tolist(), strict=True)
    )


def told_by(belief):
    told = COSTS.told[COSTS.beliefs.index(belief)].tolist()
    return {case for case, tells in zip(COSTS.cases, told, strict=True) if tells}


@pytest.mark.parametrize("name", CASES.values())
def test_without_a_misreading_the_logits_are_the_originals(name):
    assert errata.gap(Belief(), name) < 3e-5


@pytest.mark.parametrize("name", CASES.values())
def test_spelled_out_it_is_the_models_forward(name):
    case, model = errata.case(name), golden_model()
    whole = model(case.tokens, positions=case.positions, mask=case.mask)
    torch.testing.assert_close(
        errata.logits_if(Belief(), case, model), whole, rtol=0, atol=3e-5
    )


@pytest.mark.parametrize(
    "belief",
    [
        "C2 α = √(2 × depth)",
        "C1 a gate in GLU",
        "B4 √ of the hidden size",
        "B4 layer not undone",
        "L5 paper's cosines",
    ],
)
def test_some_are_loud_everywhere(belief):
    assert min(gaps(belief).values()) > 3


def test_some_are_faint():
    assert all(1e-3 < gap < 3e-3 for gap in gaps("C1 GELU by erf").values())
    exact, half = gaps("C4 exact frequencies"), gaps("C4 angles in float16")
    assert exact.pop("far positions") == pytest.approx(0.108, abs=0.02)
    assert half.pop("far positions") == pytest.approx(0.21, abs=0.03)
    assert all(3e-4 < gap < 1e-3 for gap in exact.values())
    assert all(1e-3 < gap < 5e-3 for gap in half.values())


def test_some_show_on_one_kind_of_input():
    batch, pads = "mixed batch", "pads, from ids"
    assert told_by("C11 place counts on") == {"[gMASK]", "both masks", batch, pads}
    assert told_by("C5 MASK before gMASK") == {"both masks", batch}
    assert told_by("C11 row 0 for all rows") == {batch, pads}
    assert told_by("B5 pads do not count") == {pads}
    assert told_by("C6 model hides pads") == {pads}
    assert told_by("C3 fill of −∞") == {"pads, given mask"}
    assert math.isnan(gaps("C3 fill of −∞")["pads, given mask"])
    assert told_by("C3 fill not × layer") == set()


def test_the_short_prompt_lets_six_of_fifteen_pass():
    assert COSTS.gaps.shape == (len(BELIEFS), len(CASES)) == (15, 7)
    assert (~COSTS.told[:, COSTS.cases.index("[gMASK]")]).sum() == 6


def test_beliefs_are_about_what_they_say():
    right, case = Belief(), errata.case("batch_leftpad_model")
    ids = golden_model().config.blank_ids
    hidden = BELIEFS["C6 model hides pads"].mask(case.tokens, ids, None)
    assert not hidden[1, 0, :, :4].any()
    assert right.mask(case.tokens, ids, None)[1, 0, :, :4].all()
    alone = BELIEFS["B5 pads do not count"].positions(case.tokens, ids, None)
    assert (alone[1, 1] == 0).sum() == 4  # of the tokens, with 4 pads before them
    assert (right.positions(case.tokens, ids, None)[1, 1] == 0).sum() == 8
    both = errata.case("both_tokens").tokens
    held = BELIEFS["C5 MASK before gMASK"].positions(both, ids, None)
    assert both[0, held[0, 0, -1]] == ids.mask
    counting = BELIEFS["C11 place counts on"].positions(both, ids, None)
    assert torch.equal(counting[0, 0], torch.arange(both.shape[1]))


def test_figure_draws():
    assert errata.draw_costs(COSTS)._repr_png_().startswith(b"\x89PNG")
