"""The numbers behind the pictures of the whole model."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from annotated_src.checkpoint import load_model
from annotated_src.figures.llama import (
    PARTS,
    VotesData,
    draw_lens,
    draw_parameters,
    draw_votes,
    lens_data,
    parameter_data,
    part_of,
    stream_by_depth,
    votes_data,
)
from annotated_src.figures.reading import token_label
from annotated_src.models.llama import Llama, LlamaConfig
from annotated_src.tokenizer import TextTokenizer


def config(**changed):
    sizes = {
        "vocab_size": 13,
        "num_layers": 3,
        "embed_dim": 10,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        "ffn_dim": 7,
        "max_seq_len": 32,
        "norm_eps": 1e-5,
        "rope_base": 100.0,
        "tied_head": False,
    }
    return LlamaConfig(**(sizes | changed))


def random_llama(**changed):
    torch.manual_seed(0)
    model = Llama(config(**changed))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(std=0.5)
    return model


LETTERS = TextTokenizer(
    Tokenizer(WordLevel({letter: i for i, letter in enumerate(" \n\xa0defghijklm")})),
    chat_template="",
    eos_token="m",
)
"""Token i is the i-th letter."""


def test_each_part_is_counted_once_and_all_are_counted():
    tied, free = config(tied_head=True), config()
    data = parameter_data({"tied": tied, "free": free})
    assert data.counts.sum(-1).tolist() == [
        sum(w.numel() for w in Llama(c).parameters()) for c in (tied, free)
    ]
    embedding, attention, ffn, norms = data.counts[1].tolist()
    assert embedding == 2 * 13 * 10 == 2 * data.counts[0, 0]
    assert attention == 3 * (2 * 10 * 24 + 2 * 10 * 12)
    assert ffn == 3 * 3 * 10 * 7
    assert norms == 7 * 10
    assert torch.allclose(data.shares.sum(-1), torch.ones(2))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("embedding.weight", 0),
        ("lm_head.weight", 0),
        ("blocks.0.attention.q_proj.weight", 1),
        ("blocks.0.ffn.up_proj.weight", 2),
        ("blocks.0.attention_norm.weight", 3),
        ("blocks.0.ffn_norm.weight", 3),
        ("norm.weight", 3),
    ],
)
def test_a_norm_beside_attention_is_a_norm(name, part):
    assert part_of(name) == PARTS[part]


def test_the_stream_begins_at_the_embedding_and_ends_before_the_norm():
    model, tokens = random_llama(), torch.tensor([[3, 5, 7, 9]])
    stream = stream_by_depth(model, tokens)
    assert stream.shape == (4, 4, 10)
    assert torch.equal(stream[0], model.embedding(tokens)[0])
    assert torch.allclose(model.lm_head(model.norm(stream[-1])), model(tokens)[0])
    assert not model.norm._forward_pre_hooks


@pytest.mark.parametrize("tied", [True, False])
def test_the_last_depth_of_the_lens_is_the_model(tied):
    model, tokens = random_llama(tied_head=tied), torch.tensor([[3, 5, 7, 9, 4]])
    data = lens_data(model, LETTERS, tokens, first=2)
    said = model(tokens)[0, 2:].argmax(-1)
    assert data.answers == data.best[-1]
    assert data.answers == tuple(token_label(LETTERS, int(i)) for i in said)
    assert data.inputs == ("h", "j", "e")
    assert data.place.shape == (4, 3)
    assert (data.place[-1] == 1).all()
    assert (data.place >= 1).all()
    assert (data.place <= 13).all()
    assert [
        [word == answer for word, answer in zip(row, data.answers, strict=True)]
        for row in data.best
    ] == (data.place == 1).tolist()
    draw_lens(data)


@pytest.mark.parametrize("tied", [True, False])
def test_votes_add_up_to_the_score(tied, legible):
    model, tokens = random_llama(tied_head=tied), torch.tensor([[3, 5, 7, 9, 4]])
    scores = model(tokens)[0, -1].detach()
    for word in (0, 6, 12):
        data = votes_data(model, LETTERS, tokens, word)
        assert data.attention.shape == data.ffn.shape == (3,)
        assert data.total == pytest.approx(
            float(scores[word] - scores.mean()), abs=1e-4
        )
    draw_votes(data)
    legible.clear()  # such votes are no model's: words may meet bars


def test_a_silenced_part_has_no_vote():
    model, tokens = random_llama(), torch.tensor([[3, 5, 7, 9]])
    with torch.no_grad():
        model.blocks[1].ffn.down_proj.weight.zero_()
        model.blocks[2].attention.out_proj.weight.zero_()
    data = votes_data(model, LETTERS, tokens, 5)
    assert data.ffn[1] == 0 == data.attention[2]
    assert (data.ffn[[0, 2]] != 0).all()
    assert (data.attention[:2] != 0).all()


def test_every_bar_is_drawn():
    data = parameter_data({"small": config(), "smaller": config(num_layers=1)})
    (ax,) = draw_parameters(data).axes
    assert len(ax.patches) == 2 * 3


def labels_on_bars(figure):
    """The words of a picture that cross one of its bars."""
    figure.draw_without_rendering()
    (ax,) = figure.axes
    bars = [bar.get_window_extent() for bar in ax.patches]
    return [
        words.get_text()
        for words in ax.texts
        if any(words.get_window_extent().overlaps(bar) for bar in bars)
    ]


def test_a_label_across_a_bar_is_noticed(legible):
    rising = VotesData("·a", 0.0, torch.linspace(1, 2, 30), torch.full((30,), 3.0))
    assert labels_on_bars(draw_votes(rising)) == ["attention, block 30"]
    legible.clear()


def test_in_the_real_model_tokyo_comes_last_and_from_block_24(smollm2_dir):
    model = load_model(smollm2_dir)
    tokenizer = TextTokenizer.from_pretrained(smollm2_dir)
    question = tokenizer.chat(
        [{"role": "user", "content": "What is the capital of Japan?"}]
    )
    answer = tokenizer.encode("The capital of Japan is Tokyo.")
    tokens = torch.cat([question, answer], dim=1)
    lens = lens_data(model, tokenizer, tokens, first=question.shape[1] - 1)
    tokyo = lens.answers.index("·Tokyo")
    assert lens.answers[-1] == "<|im_end|>"
    assert (lens.place[:30, tokyo] > 1).all()
    assert lens.place[23, tokyo] > 5 * lens.place[24, tokyo]
    votes = votes_data(
        model, tokenizer, tokens[:, : question.shape[1] + 5], int(answer[0, 5])
    )
    assert votes.word == "·Tokyo"
    assert not labels_on_bars(draw_votes(votes))
    assert votes.attention.argmax() == 23
    assert votes.attention[23] > votes.ffn.max()
