import json

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from annotated_src.checkpoint import load_model
from annotated_src.gguf import GGUFError
from annotated_src.gguf_to_hf import FILES, GGUF_NAMES, convert_gguf
from annotated_src.models.llama import HF_NAMES

Kind = gguf.GGMLQuantizationType
VARIANTS = [(Kind.F32, True), (Kind.F32, False), (Kind.Q4_1, True), (Kind.Q8_0, False)]


def quiet(line):
    pass


@pytest.mark.parametrize(("kind", "tied"), VARIANTS)
def test_logits_equal_those_before_the_detour(make_gguf, tmp_path, kind, tied):
    path, reference, _ = make_gguf(kind, tied)
    convert_gguf(path, tmp_path / "out", quiet)
    tokens = torch.randint(0, reference.config.vocab_size, (2, 20))
    expected = reference(tokens).logits
    assert expected.std() > 0.5
    found = load_model(tmp_path / "out")(tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(theirs(tokens).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("kind", "tied"), VARIANTS)
def test_weights_are_equal_to_the_bit(make_gguf, tmp_path, kind, tied):
    path, reference, _ = make_gguf(kind, tied)
    convert_gguf(path, tmp_path / "out", quiet)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, weight in reference.state_dict().items():
        assert torch.equal(theirs[name], weight)


def test_it_writes_these_files_and_the_sizes(make_gguf, tmp_path):
    path, reference, _ = make_gguf()
    convert_gguf(path, tmp_path / "out", quiet)
    assert {p.name for p in (tmp_path / "out").iterdir()} == set(FILES)
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    wanted = reference.config.to_dict()
    wanted["rope_theta"] = wanted["rope_parameters"]["rope_theta"]
    for key in config.keys() - {"architectures", "torch_dtype", "pad_token_id"}:
        assert config[key] == wanted[key]
    assert config["rms_norm_eps"] == 0.01  # not 0.009999999776482582
    names = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text("utf-8"))
    assert names["bos_token"] == "<|im_start|>"
    assert names["eos_token"] == names["pad_token"] == "<|im_end|>"
    assert names["unk_token"] == "<|endoftext|>"


def test_it_reports_progress(make_gguf, tmp_path):
    lines = []
    convert_gguf(make_gguf().path, tmp_path / "out", lines.append)
    assert lines == ["  20 of 20 tensors"]


def test_every_name_here_has_one_there():
    weights = {name for name in HF_NAMES if name.endswith(".weight")}
    assert GGUF_NAMES.keys() == weights  # a Llama in GGUF has no biases


def rewritten(source, target, **changes):
    """Copy the header's strings and tensors, with bytes of equal length exchanged."""
    content = source.read_bytes()
    for old, new in changes.items():
        assert content.count(old.encode()) >= 1
        content = content.replace(old.encode(), new.encode())
    target.write_bytes(content)
    return target


def test_a_tensor_without_a_name_here(make_gguf, tmp_path):
    path = rewritten(make_gguf().path, tmp_path / "x.gguf", attn_output="attn_outrun")
    message = r"no name here for the GGUF tensor blk\.0\.attn_outrun\.weight"
    with pytest.raises(GGUFError, match=message):
        convert_gguf(path, tmp_path / "out", quiet)


def test_another_architecture(make_gguf, tmp_path):
    path = rewritten(make_gguf().path, tmp_path / "x.gguf", llama="gemma")
    message = r"x\.gguf: architecture 'gemma', expected 'llama'"
    with pytest.raises(GGUFError, match=message):
        convert_gguf(path, tmp_path / "out", quiet)
    assert not (tmp_path / "out").exists()


def test_metadata_that_lacks_a_key(make_gguf, tmp_path):
    path = rewritten(make_gguf().path, tmp_path / "x.gguf", freq_base="freq_bass")
    with pytest.raises(GGUFError, match=r"llama\.rope\.freq_base"):
        convert_gguf(path, tmp_path / "out", quiet)
