import pytest
import torch

from annotated_src.figures.blanks import (
    ANSWERS,
    SENTENCE,
    draw_ids,
    draw_leak,
    ids_data,
    leak_data,
)


def test_the_ids_of_a_blank_inside_and_of_one_at_the_end():
    inside, at_end = ids_data()
    context, answer = "she opened [MASK] and left", "<sop> the door <eop>"
    assert " ".join(inside.words) == f"{context} {answer}"
    assert inside.places.tolist() == [0, 1, 2, 3, 4, 2, 2, 2, 2]
    assert inside.steps.tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 4]
    context, answer = "she opened the [gMASK]", "<sop> door and left <eop>"
    assert " ".join(at_end.words) == f"{context} {answer}"
    assert at_end.places.tolist() == [0, 1, 2, 3, 3, 3, 3, 3, 3]
    assert at_end.steps.tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5]
    assert [row.context for row in (inside, at_end)] == [5, 4]


def test_original_places_put_the_sentence_together_again():
    for row, answer in zip(leak_data().original, ANSWERS, strict=True):
        whole = [row.words[t] for t in row.places.argsort()]
        assert whole == [*SENTENCE[:2], *answer, *SENTENCE[-2:]]
        assert row.words[row.context :] == list(answer)
        assert not row.steps.any()


def test_only_original_places_move_the_context_as_the_answer_grows():
    data = leak_data()
    torn = [row.places[: row.context].tolist() for row in data.original]
    assert torn == [[0, 1, 3, 4], [0, 1, 4, 5], [0, 1, 6, 7]]
    for row, answer in zip(data.blank, ANSWERS, strict=True):
        assert row.context == 5
        assert row.places.tolist() == [0, 1, 2, 3, 4] + [2] * (len(answer) + 2)
        climb = list(range(1, len(answer) + 3))
        assert row.steps[row.context :].tolist() == climb
        assert not row.steps[: row.context].any()


def texts_at(ax):
    return [(text.get_text(), *text.get_position()) for text in ax.texts]


def test_words_are_drawn_at_their_place_and_step_with_the_places_below():
    data = leak_data()
    row = data.blank[1]
    drawn = texts_at(draw_leak(data).axes[4])
    points = torch.stack((row.places, row.steps), dim=1).tolist()
    for word, (place, step) in zip(row.words, points, strict=True):
        assert (word, place, step) in drawn
    below = [(word, x) for word, x, y in drawn if y < 0]
    assert below == [(str(place), place) for place in range(5)]


@pytest.mark.parametrize("column", [0, 1])
def test_every_token_has_its_two_numbers_drawn(column):
    data = ids_data()
    axes = draw_ids(data).axes
    for ax, numbers in (
        (axes[column], data[column].places),
        (axes[column + 2], data[column].steps),
    ):
        assert [text.get_text() for text in ax.texts] == [
            str(number) for number in numbers.tolist()
        ]


def test_figures_draw():
    for figure in (draw_ids(ids_data()), draw_leak(leak_data())):
        assert figure._repr_png_().startswith(b"\x89PNG")
