"""Prompts in, answers out: against generate by hand, and against transformers."""

import contextlib
import json
import shutil

import pytest
import torch
import transformers
from tokenizers import AddedToken

from annotated_src.checkpoint import load_model
from annotated_src.generate import generate
from annotated_src.gguf_to_hf import convert_gguf
from annotated_src.pipeline import TextGeneration, read_stop_ids
from annotated_src.sampler import Sample
from annotated_src.small_chatglm import SMALL_CHATGLM
from annotated_src.tokenizer import TextTokenizer

TEXTS = ["for", "while the list is not empty, do 12 things with it", "in a loop"]
CHATS = [
    [{"role": "user", "content": "for what?"}],
    [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "what is a loop?"},
        {"role": "assistant", "content": "a loop"},
        {"role": "user", "content": "and while?"},
    ],
]


@pytest.fixture(scope="module")
def folder(make_gguf, tmp_path_factory):
    """A random Llama with its tokenizer, as a Hugging Face directory."""
    path = tmp_path_factory.mktemp("hf") / "small"
    convert_gguf(make_gguf().path, path, lambda line: None)
    return path


@pytest.fixture(scope="module")
def answer(folder):
    return TextGeneration.from_pretrained(folder)


@pytest.fixture
def copy(folder, tmp_path):
    """The same directory, to be changed."""
    return shutil.copytree(folder, tmp_path / "copy")


def by_hand(model, tokenizer, tokens, steps, stops=(), **options):
    """The text of what generate adds to one prompt."""
    ids = generate(model, tokens, max_new_tokens=steps, stop_ids=stops, **options)
    new = ids[0, tokens.shape[1] :].tolist()
    ends = [i for i, token in enumerate(new) if token in stops]
    return tokenizer.decode(new[: ends[0]] if ends else new)


def originals(path):
    """The pipeline of transformers on the same directory."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return transformers.pipeline(
        "text-generation", model=model, tokenizer=tokenizer, device="cpu"
    )


def greedily(pipe, prompts, steps, **options):
    """What transformers' pipeline answers, the prompts left out."""
    found = pipe(
        prompts,
        do_sample=False,
        max_new_tokens=steps,
        return_full_text=False,
        **options,
    )
    return [
        (one[0] if isinstance(one, list) else one)["generated_text"] for one in found
    ]


@pytest.mark.parametrize("prompt", TEXTS)
def test_a_text_is_continued_as_generate_does(folder, answer, prompt):
    model, tokenizer = load_model(folder), TextTokenizer.from_pretrained(folder)
    expected = by_hand(model, tokenizer, tokenizer.encode(prompt), 20)
    found = answer(prompt, max_new_tokens=20)
    assert found == expected
    assert len(found) > 5
    assert not found.startswith(prompt)


@pytest.mark.parametrize("messages", CHATS)
def test_a_conversation_is_answered_as_generate_does(folder, answer, messages):
    model, tokenizer = load_model(folder), TextTokenizer.from_pretrained(folder)
    expected = by_hand(model, tokenizer, tokenizer.chat(messages), 20)
    assert answer(messages, max_new_tokens=20) == expected


def test_a_batch_of_several_lengths_is_each_alone(answer):
    prompts = [*TEXTS, *CHATS]
    lengths = {answer.encode(prompt).shape[1] for prompt in prompts}
    assert len(lengths) == len(prompts)
    alone = [answer(prompt, max_new_tokens=24) for prompt in prompts]
    assert answer(prompts, max_new_tokens=24) == alone
    assert answer(prompts[::-1], max_new_tokens=24) == alone[::-1]
    assert len(set(alone)) == len(prompts)


def test_a_batch_under_a_repetition_penalty_is_each_alone(answer):
    """The padding's id is no word of the text: it is not penalised."""
    sampler = Sample(repetition_penalty=3.0, top_k=1)
    alone = [answer(p, max_new_tokens=24, sampler=sampler) for p in TEXTS]
    assert answer(TEXTS, max_new_tokens=24, sampler=sampler) == alone
    assert alone != [answer(p, max_new_tokens=24) for p in TEXTS]


def test_one_prompt_gives_a_text_and_a_list_a_list(answer):
    one = answer(TEXTS[0], max_new_tokens=3)
    assert answer([TEXTS[0]], max_new_tokens=3) == [one]
    assert answer([CHATS[0]], max_new_tokens=3) == [answer(CHATS[0], max_new_tokens=3)]


def test_the_three_steps_are_the_call(answer):
    batch = answer.preprocess([*TEXTS, CHATS[1]])
    assert batch.is_token[:, -1].all()
    ids = answer.forward(batch, max_new_tokens=9)
    assert ids.shape[0] == 4
    expected = answer([*TEXTS, CHATS[1]], max_new_tokens=9)
    assert answer.postprocess(ids) == expected


@pytest.mark.parametrize("prompt", [*TEXTS, CHATS[1]])
def test_the_pieces_of_a_stream_make_the_answer(answer, prompt):
    pieces = list(answer.stream(prompt, max_new_tokens=40))
    assert "".join(pieces) == answer(prompt, max_new_tokens=40)
    assert len(pieces) > 5


def test_a_stream_computes_no_further_than_it_is_read(answer):
    lengths = []
    hook = answer.model.register_forward_pre_hook(
        lambda _model, args: lengths.append(args[0].shape[1])
    )
    with contextlib.closing(answer.stream(TEXTS[1], max_new_tokens=30)) as pieces:
        assert lengths == []
        next(pieces)
    hook.remove()
    assert lengths[0] > 10
    assert lengths[1:] in ([], [1], [1, 1], [1, 1, 1])  # a character has up to 4 ids


def test_the_stop_id_ends_an_answer_and_is_not_shown(folder, answer):
    free = answer.forward(answer.preprocess(TEXTS), max_new_tokens=20)
    stop = int(free[1, 7])
    stopping = TextGeneration(answer.model, answer.tokenizer, [stop])
    ids = stopping.forward(stopping.preprocess(TEXTS), max_new_tokens=20)
    tokenizer, expected = answer.tokenizer, []
    for row in free.tolist():
        end = row.index(stop) if stop in row else len(row)
        expected.append(tokenizer.decode(row[:end]))
    assert stopping.postprocess(ids) == expected
    assert stopping(TEXTS, max_new_tokens=20) == expected
    assert expected[1] != answer(TEXTS[1], max_new_tokens=20)
    assert "".join(stopping.stream(TEXTS[1], max_new_tokens=20)) == expected[1]


def test_any_of_several_stop_ids_of_generation_config_ends_an_answer(copy, answer):
    free = answer.forward(answer.preprocess(TEXTS), max_new_tokens=20)
    stops = [int(free[0, 5]), int(free[1, 9])]
    path = copy / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": stops}), "utf-8")
    stopping = TextGeneration.from_pretrained(copy)
    assert stopping.stop_ids == stops
    expected = [
        by_hand(answer.model, answer.tokenizer, answer.encode(text), 20, stops)
        for text in TEXTS
    ]
    assert stopping(TEXTS, max_new_tokens=20) == expected
    assert expected != answer(TEXTS, max_new_tokens=20)


@pytest.mark.parametrize(
    ("content", "expected"),
    [({"eos_token_id": 7}, [7]), ({"eos_token_id": None}, [2]), ({}, [2])],
)
def test_where_stop_ids_come_from(copy, content, expected):
    assert TextGeneration.from_pretrained(copy).stop_ids == [2]  # <|im_end|>
    (copy / "generation_config.json").write_text(json.dumps(content), "utf-8")
    assert TextGeneration.from_pretrained(copy).stop_ids == expected


@pytest.mark.parametrize("found", ["2", [], [3, "2"], [True], True, 2.0, [[2]], {}])
def test_bad_stop_ids_are_refused(copy, answer, found):
    path = copy / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": found}), "utf-8")
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id is"):
        read_stop_ids(copy, answer.tokenizer)
    with pytest.raises(ValueError, match="not an id or a list of ids"):
        TextGeneration.from_pretrained(copy)


def test_a_tokenizer_larger_than_the_embedding_is_refused(copy):
    size = TextTokenizer.from_pretrained(copy).vocab_size
    path = copy / "tokenizer.json"
    tokenizer = TextTokenizer.from_pretrained(copy).tokenizer
    tokenizer.add_tokens([AddedToken("one more", normalized=False)])
    tokenizer.save(str(path))
    wanted = f"the tokenizer has {size + 1} ids, the model's embedding {size}: they"
    with pytest.raises(ValueError, match=wanted):
        TextGeneration.from_pretrained(copy)


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json and no ice_text"):
        TextGeneration.from_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", "the prompt '' has no tokens"),
        (["for", ""], "the prompt '' has no tokens"),
        ([], "there are no rows to pad"),
        ([[]], "messages are an empty list, expected at least one"),
        ("a" * 250, r"prompt \d+ \+ max_new_tokens 10 must be 0 to 256 tokens"),
        ("a" * 400, r"prompt \d+ \+ max_new_tokens 10 must be 0 to 256 tokens"),
        ([{"role": "user"}], "message 0: content is None, expected a string"),
        ([{"content": "hi"}], "message 0: role is None, expected a string"),
    ],
)
def test_prompts_that_cannot_be_answered(answer, prompts, message):
    with pytest.raises(ValueError, match=message):
        answer(prompts, max_new_tokens=10)


@pytest.mark.parametrize("prompt", ["", "a" * 400])
def test_a_stream_refuses_at_once(answer, prompt):
    with pytest.raises(ValueError, match="prompt"):
        answer.stream(prompt, max_new_tokens=10)


def test_all_the_context_may_be_used_and_not_one_more(answer):
    room = 256 - answer.encode("for").shape[1]
    free = TextGeneration(answer.model, answer.tokenizer, [10**6])  # never said
    ids = free.forward(free.preprocess(["for"]), max_new_tokens=room)
    assert ids.shape == (1, room)
    with pytest.raises(ValueError, match=f"max_new_tokens {room + 1} must be"):
        free("for", max_new_tokens=room + 1)


def test_a_conversation_needs_a_template(copy):
    (copy / "chat_template.jinja").unlink()
    answer = TextGeneration.from_pretrained(copy)
    assert len(answer("for", max_new_tokens=3)) > 0
    with pytest.raises(ValueError, match="this tokenizer has no chat template"):
        answer(CHATS[0], max_new_tokens=3)


def test_draws_are_repeatable(answer):
    def drawn(seed):
        sampler = Sample(generator=torch.Generator().manual_seed(seed))
        return answer(TEXTS[1], max_new_tokens=20, sampler=sampler)

    assert drawn(3) == drawn(3)
    assert len({drawn(seed) for seed in range(5)}) == 5


def test_weights_have_the_dtype_asked_for(folder):
    answer = TextGeneration.from_pretrained(folder, torch.bfloat16)
    assert {w.dtype for w in answer.model.parameters()} == {torch.bfloat16}
    assert isinstance(answer("for", max_new_tokens=3), str)


@pytest.mark.parametrize("prompts", [TEXTS, CHATS], ids=["texts", "conversations"])
def test_answers_equal_transformers(folder, answer, prompts):
    found = answer(prompts, max_new_tokens=40)
    assert found == greedily(originals(folder), prompts, 40)


def test_a_batch_equals_transformers_own_batch(folder, answer):
    found = answer(TEXTS, max_new_tokens=40)
    assert found == greedily(originals(folder), TEXTS, 40, batch_size=3)


@pytest.mark.parametrize("penalty", [0.7, 1.3, 5.0])
def test_repetition_penalty_equals_transformers(folder, answer, penalty):
    sampler = Sample(repetition_penalty=penalty, top_k=1)
    found = answer(TEXTS, max_new_tokens=40, sampler=sampler)
    pipe = originals(folder)
    assert found == greedily(pipe, TEXTS, 40, repetition_penalty=penalty)


def test_several_stop_ids_equal_transformers(copy, answer):
    free = answer.forward(answer.preprocess(TEXTS), max_new_tokens=30)
    stops = [int(free[0, 6]), int(free[1, 12]), int(free[2, 9])]
    config = {"eos_token_id": stops, "pad_token_id": 2}
    (copy / "generation_config.json").write_text(json.dumps(config), "utf-8")
    found = TextGeneration.from_pretrained(copy)(TEXTS, max_new_tokens=30)
    assert found != answer(TEXTS, max_new_tokens=30)
    pipe = originals(copy)
    # transformers shows the stop id, unless it is a special token: here it is none.
    ends = pipe(TEXTS, do_sample=False, max_new_tokens=30, return_tensors=True)
    for text, (record,) in zip(found, ends, strict=True):
        ids = record["generated_token_ids"]
        assert ids[-1] in stops
        assert pipe.tokenizer.decode(ids[:-1]).endswith(text)


def test_a_token_to_begin_with_is_added_as_transformers_does(copy):
    """What tokenizer.json puts in front of a text; a chat template writes its own."""
    path = copy / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    begin = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {
            "<|endoftext|>": {
                "id": "<|endoftext|>",
                "ids": [0],
                "tokens": ["<|endoftext|>"],
            }
        },
    }
    path.write_text(json.dumps(content), "utf-8")
    answer = TextGeneration.from_pretrained(copy)
    assert answer.encode("for")[0, 0] == 0
    assert answer.encode(CHATS[0])[0, 0] == 1
    pipe = originals(copy)
    assert answer(TEXTS, max_new_tokens=30) == greedily(pipe, TEXTS, 30)
    assert answer(CHATS, max_new_tokens=30) == greedily(pipe, CHATS, 30)


@pytest.fixture(scope="module")
def small_chatglm():
    return TextGeneration.from_pretrained(SMALL_CHATGLM)


VERSES = ["And the king said unto", "In the beginning", "the quick [MASK] of the fox"]


@pytest.mark.parametrize("prompt", VERSES)
def test_chatglm_answers_as_generate_does(small_chatglm, prompt):
    model, tokenizer = small_chatglm.model, small_chatglm.tokenizer
    tokens, positions, mask = tokenizer.pad([tokenizer.encode(prompt)])
    stops = [tokenizer.eos_id]
    given = {"positions": positions, "mask": mask}
    expected = by_hand(model, tokenizer, tokens, 30, stops, **given)
    found = small_chatglm(prompt, max_new_tokens=30)
    assert found == expected
    assert len(found) > 3
    assert "".join(small_chatglm.stream(prompt, max_new_tokens=30)) == found


def test_chatglm_s_batch_is_each_alone(small_chatglm):
    chat = [
        {"role": "user", "content": VERSES[0]},
        {"role": "assistant", "content": "him"},
        {"role": "user", "content": VERSES[1]},
    ]
    prompts = [*VERSES, chat]
    alone = [small_chatglm(prompt, max_new_tokens=30) for prompt in prompts]
    assert small_chatglm(prompts, max_new_tokens=30) == alone
    assert small_chatglm.stop_ids == [small_chatglm.tokenizer.eos_id] == [9]


def test_chatglm_refuses_a_system_prompt(small_chatglm):
    with pytest.raises(ValueError, match="expected user and assistant by turns"):
        small_chatglm(CHATS[1], max_new_tokens=3)


QUESTIONS = [
    [{"role": "user", "content": "What is the capital of Japan?"}],
    [{"role": "user", "content": "Name the four seasons."}],
]


def test_smollm2_answers_as_transformers_does(smollm2_dir):
    answer, pipe = TextGeneration.from_pretrained(smollm2_dir), originals(smollm2_dir)
    found = answer(QUESTIONS, max_new_tokens=30)
    assert found[0] == "The capital of Japan is Tokyo."
    assert found == greedily(pipe, QUESTIONS, 30)
    text = "The three primary colours are red,"
    sampler = Sample(repetition_penalty=1.3, top_k=1)
    continued = answer(text, max_new_tokens=30, sampler=sampler)
    assert [continued] == greedily(pipe, text, 30, repetition_penalty=1.3)
