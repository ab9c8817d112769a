"""The numbers behind the pictures of tokens."""

import pytest

from annotated_src.byte_alphabet import to_visible, visible_bytes
from annotated_src.byte_pair import BytePairEncoder
from annotated_src.figures.tokens import (
    ARTICLE_1,
    draw_scripts,
    draw_wall,
    script_data,
    token_text,
    wall_data,
)
from annotated_src.learn_merges import learn_merges

TEXT = "hum hums, 🦙 hugs é aaa aaaa"


@pytest.fixture(scope="module")
def encoder():
    merges = learn_merges([TEXT], 12)
    tokens = [*visible_bytes().values(), *map("".join, merges)]
    return BytePairEncoder({t: i for i, t in enumerate(tokens)}, merges, {"<s>": 999})


def test_what_is_on_top_are_the_tokens(encoder):
    wall = wall_data(encoder, TEXT)
    top = sorted((brick for brick in wall if brick.final), key=lambda b: b.start)
    assert [encoder.vocabulary[brick.token] for brick in top] == encoder.encode(TEXT)
    assert [brick.start for brick in top[1:]] == [brick.stop for brick in top[:-1]]
    assert all(brick.roof == brick.level + 1 for brick in top)


def test_the_lowest_row_is_the_bytes(encoder):
    bytes_below = [brick for brick in wall_data(encoder, TEXT) if brick.level == 0]
    assert "".join(brick.token for brick in bytes_below) == to_visible(TEXT)
    assert [brick.start for brick in bytes_below] == list(range(len(TEXT.encode())))
    assert all(brick.merge == 0 for brick in bytes_below)


def test_each_brick_lies_on_the_two_that_it_joins(encoder):
    wall = wall_data(encoder, TEXT)
    made = [brick for brick in wall if brick.merge]
    assert len(made) > 6
    assert max(brick.level for brick in made) > 1
    for brick in made:
        parts = [
            below
            for below in wall
            if below.roof == brick.level
            and not below.final
            and brick.start <= below.start
            and below.stop <= brick.stop
        ]
        left, right = sorted(parts, key=lambda part: part.start)
        assert left.token + right.token == brick.token
        assert (left.start, right.stop) == (brick.start, brick.stop)
        assert left.stop == right.start
        assert brick.level == 1 + max(left.level, right.level)
        assert encoder.ranks[left.token, right.token] == brick.merge - 1


def test_no_byte_may_be_missing():
    with pytest.raises(ValueError, match="lacks a byte of 'ab'"):
        wall_data(BytePairEncoder({"a": 0}, [], {}), "ab")


@pytest.mark.parametrize(
    ("token", "shown"),
    [("Ġhum", "·hum"), ("Ã©", "é"), ("ðŁ", "F0 9F"), ("ĠðŁ", "·F0 9F"), ("Ļ", "99")],
)
def test_tokens_are_written_to_be_read(token, shown):
    assert token_text(token) == shown


def test_a_wall_is_drawn_brick_by_brick(encoder):
    walls = [wall_data(encoder, text) for text in ("hum hums", "🦙")]
    axes = draw_wall(walls, last_merge=12).axes
    for ax, wall in zip(axes, walls, strict=False):
        assert len(ax.patches) == len(wall)
        shown = [token_text(brick.token).replace(" ", "") for brick in wall]
        assert [t.get_text() for t in ax.texts] == shown
        rims = [patch.get_linewidth() > 0 for patch in ax.patches]
        assert rims == [brick.final for brick in wall]


def test_scripts_are_counted(encoder):
    costs = script_data(encoder)
    assert {cost.language for cost in costs} == set(ARTICLE_1)
    for cost in costs:
        text = ARTICLE_1[cost.language]
        assert cost.characters == len(text)
        assert cost.num_bytes == len(text.encode())
        assert cost.tokens == len(encoder.encode(text))
    assert [c.tokens for c in costs] == sorted(c.tokens for c in costs)


def test_a_bar_for_each_language(encoder):
    costs = script_data(encoder, {"a": "hum", "b": "你好 hum"})
    (ax,) = draw_scripts(costs).axes
    times = costs[1].tokens / costs[0].tokens
    assert ax.texts[-1].get_text() == f"{times:.0f} times as many\ntokens as a"
    assert [patch.get_width() for patch in ax.patches] == [c.tokens for c in costs]
    characters, in_bytes = (line.get_xdata() for line in ax.lines)
    assert list(characters) == [3, 6]
    assert list(in_bytes) == [3, 10]


def test_the_real_vocabulary(smollm2_dir):
    encoder = BytePairEncoder.from_file(smollm2_dir / "tokenizer.json")
    tokens = {cost.language: cost.tokens for cost in script_data(encoder)}
    assert list(tokens) == list(ARTICLE_1)
    assert (tokens["English"], tokens["Chinese"], tokens["Hindi"]) == (13, 29, 92)
    wall = wall_data(encoder, " into a bytearray in 2024 🦙")
    top = sorted((b for b in wall if b.final), key=lambda brick: brick.start)
    shown = ["·into", "·a", "·by", "tear", "ray", "·in", "·", *"2024", "·F0 9F"]
    assert [token_text(brick.token) for brick in top] == [*shown, "A6", "99"]
