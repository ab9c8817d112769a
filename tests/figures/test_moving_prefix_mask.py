import pytest

from annotated_src.figures.moving.prefix_mask import WORDS, prefix_mask_data

STATES = [(kind, c) for kind in ("[MASK]", "[gMASK]") for c in range(1, 7)]


@pytest.fixture(scope="module")
def data():
    return prefix_mask_data()


@pytest.mark.parametrize(("kind", "context"), STATES)
def test_words_mask_places_and_steps_follow_the_rules(data, kind, context):
    state = data[kind][context - 1]
    words = state["words"]
    assert len(words) == len(WORDS) + 3
    assert words.index("<sop>") == context
    blank = words.index(kind)
    sees = [[s < context or s <= t for s in range(9)] for t in range(9)]
    assert state["mask"] == ["".join("01"[see] for see in row) for row in sees]
    assert state["places"] == [*range(context)] + [blank] * (9 - context)
    assert state["steps"] == [0] * context + [*range(1, 10 - context)]


@pytest.mark.parametrize(("kind", "context"), STATES)
def test_the_answer_fills_the_blank(data, kind, context):
    words = data[kind][context - 1]["words"]
    assert words[-1] == "<eop>"
    blank = words.index(kind)
    filled = words[:blank] + words[context + 1 : -1] + words[blank + 1 : context]
    assert filled == list(WORDS)
