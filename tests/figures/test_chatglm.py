"""The numbers behind the pictures of ChatGLM as a whole."""

from itertools import product

import pytest
import torch
from matplotlib.patches import Rectangle

from annotated_src.checkpoint import load_model
from annotated_src.figures.chatglm import (
    PARTS,
    SIX_B,
    bytes_data,
    context_of,
    draw_bytes,
    draw_fills,
    fills_data,
    likely_answers,
    part_of,
)
from annotated_src.models.chatglm import ChatGLM, ChatGLMConfig
from annotated_src.positions import BlankIds
from annotated_src.small_chatglm import SMALL_CHATGLM
from annotated_src.tokenizer import load_tokenizer

SMALL = ChatGLMConfig(
    vocab_size=6,
    num_layers=2,
    embed_dim=8,
    num_heads=2,
    ffn_dim=10,
    max_seq_len=32,
    norm_eps=1e-5,
    blank_ids=BlankIds(sop=1, gmask=2, mask=3),
)
CONTEXT, EOP = [4, 5, 3, 4], 0


@pytest.fixture
def model():
    model = ChatGLM(SMALL).requires_grad_(False)
    for weight in model.parameters():
        weight.normal_(std=0.7)
    return model


@pytest.fixture(scope="module")
def shipped():
    return load_model(SMALL_CHATGLM), load_tokenizer(SMALL_CHATGLM)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("embedding.weight", 0),
        ("lm_head.weight", 0),
        ("blocks.0.attention.qkv_proj.weight_scale", 1),
        ("blocks.0.ffn.up_proj.bias", 2),
        ("blocks.0.attention_norm.bias", 3),
        ("blocks.0.ffn_norm.weight", 3),
        ("norm.weight", 3),
    ],
)
def test_a_norm_beside_attention_is_a_norm(name, part):
    assert part_of(name) == PARTS[part]


def test_bytes_are_those_of_each_matrix_bias_and_scale():
    data = bytes_data(SMALL)
    d, f, v, layers = 8, 10, 6, 2
    rows = {"attention": 4 * d, "feed-forward": d + f}
    matrix = {"attention": 4 * d * d, "feed-forward": 2 * d * f}
    for bits, found in zip(data.bits, data.bytes.tolist(), strict=True):
        scales = 0 if bits == 16 else 2
        assert found == [
            2 * v * d,
            *(
                layers * (matrix[part] * bits // 8 + (2 + scales) * rows[part])
                for part in rows
            ),
            2 * (2 * layers + 1) * 2 * d,
        ]


def test_the_6b_model_has_the_size_it_is_known_for():
    data = bytes_data(SIX_B)
    assert data.totals[0] == 2 * 6_173_286_400
    assert data.bits == (16, 8, 4)
    assert (data.bytes[:, 0] == data.bytes[0, 0]).all()  # the embedding stays
    assert 1.8 < data.totals[0] / data.totals[1] < 1.9
    assert 3.1 < data.totals[0] / data.totals[2] < 3.2


def test_squares_have_areas_in_proportion_to_bytes():
    data = bytes_data(SIX_B)
    (ax,) = draw_bytes(data).axes
    boxes = [box for box in ax.patches if isinstance(box, Rectangle)]
    areas = torch.tensor([box.get_width() * box.get_height() for box in boxes])
    wanted = data.bytes.flatten() / 1e9
    assert torch.allclose(areas, wanted.float(), rtol=1e-4)


def test_all_likely_answers_are_found_and_no_others(model):
    least, found = 0.004, {}
    for length in range(4):
        for ids in product([i for i in range(6) if i != EOP], repeat=length):
            answer = [*ids, EOP]
            cache, chance = model.new_cache(1, 32), 1.0
            step = torch.tensor([[*CONTEXT, 1]])
            for i in answer:
                chance *= float(model(step, cache)[0, -1].softmax(-1)[i])
                step = torch.tensor([[i]])
            if chance >= least:
                found[ids] = chance
    assert len(found) > 5
    answers = likely_answers(model, CONTEXT, EOP, least)
    short = {a.ids: a.probability for a in answers if len(a.ids) < 4}
    assert short.keys() == found.keys()
    for ids, chance in found.items():
        assert short[ids] == pytest.approx(chance, rel=1e-3)
    chances = [a.probability for a in answers]
    assert chances == sorted(chances, reverse=True)
    assert min(chances) >= least


def test_the_search_ends_where_the_model_s_room_does(model):
    with torch.no_grad():  # a model that never ends an answer, and says 5 for sure
        model.embedding.weight.zero_()
        model.embedding.weight[5] = 9.0
        model.norm.bias.fill_(1.0)
    assert likely_answers(model, CONTEXT, EOP, 0.5) == []


def test_punctuation_behind_a_blank_stands_as_in_a_text(shipped):
    _, tokenizer = shipped
    for blank, filled in (
        ("the son of [MASK]; and he went", "the son of David; and he went"),
        ("the [MASK] of David", "the son of David"),
        ("the son of [MASK]", "the son of David"),
    ):
        context = context_of(tokenizer, blank)
        whole = tokenizer.encode_text(filled)
        at = context.index(tokenizer.mask_id)
        rest = len(context) - at - 1
        assert context[:at] == whole[:at]
        assert context[at + 1 :] == whole[len(whole) - rest :]


@pytest.mark.parametrize("blank", ["no blank", "[MASK] and [MASK]"])
def test_a_sentence_has_one_blank(shipped, blank):
    with pytest.raises(ValueError, match=r"one \[MASK\], not [02]"):
        context_of(shipped[1], blank)


def test_bars_are_the_likeliest_answers(shipped):
    model, tokenizer = shipped
    blanks = ("And the king said unto his [MASK], Go, and see.",)
    data = fills_data(model, tokenizer, blanks, count=3, least=0.005)
    (row,) = data.answers
    assert len(row) == 3
    assert all(text.strip() for text, _ in row)
    (ax,) = draw_fills(data).axes
    widths = [bar.get_width() for bar in ax.patches if isinstance(bar, Rectangle)]
    assert widths == [probability for _, probability in row]
    assert [label.get_text() for label in ax.get_yticklabels()] == [t for t, _ in row]
