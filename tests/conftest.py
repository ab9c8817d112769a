"""Shared by all tests: random checkpoints, a small GGUF file, the real model."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ANNOTATED_SRC_PROGRESS"] = str(
    Path(__file__).resolve().parents[1] / ".build" / "progress.json"
)
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import gguf
import hypothesis
import jaxtyping
import pytest
import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)
from transformers.utils import logging

# From here on every signature of the package is checked when it is called.
jaxtyping.install_import_hook("annotated_src", "beartype.beartype")
# The same examples in every run; a busy machine may be as slow as it likes.
hypothesis.settings.register_profile(
    "here",
    derandomize=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("here")
torch.set_num_threads(1)
logging.disable_progress_bar()

ROOT = Path(__file__).resolve().parents[1]
KV_HEADS = {"multi-head": 6, "grouped": 2, "multi-query": 1}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 500.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 5.0,
    # Of the 5 pairs of a head, one keeps its frequency, one is blended, 3 slow down.
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMAS = {
    f"{kind}-{head}": {"num_kv_heads": kv_heads, "tied": head == "tied"}
    for kind, kv_heads in KV_HEADS.items()
    for head in ("tied", "untied")
} | {
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3": {"num_kv_heads": 1, "tied": True, "rope": "llama3"},
    "llama3-biases": {"num_kv_heads": 6, "attention_bias": True, "rope": "llama3"},
}
# Gemma: heads wider than the model. Phi: some or all features of a head turn.
OTHERS = {f"gemma-{kind}": {"num_kv_heads": n} for kind, n in KV_HEADS.items()} | {
    "phi-half": {"num_kv_heads": 6, "head_dim": None},  # 8 = 48 / 6, and 4 turn
    "phi-truncated": {"num_kv_heads": 6, "part": 0.4},  # 4.8 of 12 features are 4
    "phi-grouped": {"num_kv_heads": 2, "part": 0.7},  # 8.4, too
    "phi-multi-query": {"num_kv_heads": 1, "part": 1.0},
}
F32 = gguf.GGMLQuantizationType.F32
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Checkpoint(NamedTuple):
    path: Path
    reference: Any  # as transformers has it
    model: Any  # as load_model reads it


class SmallGGUF(NamedTuple):
    path: Path
    reference: LlamaForCausalLM
    tokenizer: Tokenizer


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def unchecked():
    """Switch the check of signatures off, to meet the errors that a user meets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory):
    """A random sharded Llama, made by transformers; asked for again, the same one.

    No size is a default, hardly two are equal, and no gain is one.
    """
    from annotated_src.checkpoint import load_model

    @functools.cache
    def make(
        num_kv_heads=2,
        tied=False,
        dtype=torch.float32,
        attention_bias=False,
        mlp_bias=False,
        rope="default",
        context=64,
    ):
        reference = random_llama(
            vocab_size=97,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=num_kv_heads,
            head_dim=10,  # not 48 / 6
            max_position_embeddings=context,
            rms_norm_eps=1e-2,
            rope_parameters=dict(LLAMA3_ROPE if rope == "llama3" else PLAIN_ROPE),
            tie_word_embeddings=tied,
            attention_bias=attention_bias,
            mlp_bias=mlp_bias,
        ).to(dtype)
        path = tmp_path_factory.mktemp("checkpoint")
        reference.save_pretrained(path, max_shard_size="40KB")
        assert len(list(path.glob("*.safetensors"))) > 2
        return Checkpoint(path, reference, load_model(path, dtype))

    return make


@pytest.fixture(scope="session")
def llamas():
    """What `make_checkpoint` is asked for, by name."""
    return LLAMAS


@pytest.fixture(scope="session", params=LLAMAS)
def llama_name(request):
    return request.param


@pytest.fixture(scope="session")
def checkpoint(llama_name, make_checkpoint):
    return make_checkpoint(**LLAMAS[llama_name])


@pytest.fixture(scope="session")
def make_decoder(tmp_path_factory, make_checkpoint):
    """A random sharded Gemma or Phi, made by transformers, or a Llama, by its name.

    No size is a default, hardly two are equal, no gain is one and no bias zero.
    """
    from annotated_src.checkpoint import load_model

    @functools.cache
    def make(name, dtype=torch.float32, context=64, vocab_size=97):
        if name in LLAMAS:
            return make_checkpoint(**LLAMAS[name], dtype=dtype, context=context)
        sizes = {"max_position_embeddings": context, "vocab_size": vocab_size}
        reference = random_decoder(name.split("-")[0], sizes, **OTHERS[name])
        path = tmp_path_factory.mktemp("decoder")
        reference.to(dtype).save_pretrained(path, max_shard_size="40KB")
        assert len(list(path.glob("*.safetensors"))) > 2
        return Checkpoint(path, reference, load_model(path, dtype))

    return make


@pytest.fixture(scope="session")
def others():
    """The names of Gemmas and Phis that `make_decoder` knows."""
    return tuple(OTHERS)


@pytest.fixture(scope="session", params=OTHERS)
def decoder_name(request):
    return request.param


@pytest.fixture(scope="session")
def decoder(decoder_name, make_decoder):
    return make_decoder(decoder_name)


@pytest.fixture(scope="session")
def make_gguf(tmp_path_factory):
    """A random Llama in a GGUF file, as llama.cpp writes it, tokenizer included.

    The reference in transformers has the weights as the quantization left them.
    """

    @functools.cache
    def make(quantization=F32, tied=True):
        tokenizer = small_tokenizer()
        reference = random_llama(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            rms_norm_eps=1e-2,
            rope_parameters=PLAIN_ROPE,
            tie_word_embeddings=tied,
        )
        path = tmp_path_factory.mktemp("gguf") / "small.gguf"
        write_gguf(path, reference, tokenizer, quantization)
        return SmallGGUF(path, reference, tokenizer)

    return make


@pytest.fixture(scope="session")
def smollm2_dir():
    """The real model; CI sets REQUIRE_WEIGHTS, so that its tests cannot go missing."""
    from annotated_src.weights import WeightsError, smollm2

    try:
        return smollm2(fetch=False)
    except WeightsError as error:
        if os.environ.get("REQUIRE_WEIGHTS"):
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The rendered book, built once for all tests and workers; a warning fails it.

    BUILT_BOOK names a folder that has just been built in the same way.
    """
    if built := os.environ.get("BUILT_BOOK"):
        return Path(built).resolve()
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the workers' folders lie in one
    said, pages = folder / "book.said", folder / "book"
    with FileLock(folder / "book.lock"):
        if not said.exists():  # no second worker builds what failed
            command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"]
            built = subprocess.run(
                [*command, "-d", folder / "doctrees", ROOT / "book", pages],
                capture_output=True,
                text=True,
                check=False,
            )
            wrong = built.returncode and (built.stderr or "the build failed")
            said.write_text(wrong or "", "utf-8")
    assert not said.read_text("utf-8"), said.read_text("utf-8")
    return pages


@pytest.fixture(scope="session")
def converter():
    """Where litert_torch is: what makes files for devices, and not for every machine.

    CI sets REQUIRE_EDGE, so that its tests cannot go missing.
    """
    found = importlib.util.find_spec("litert_torch")
    if found is None:
        said = "litert_torch is not installed: pip install '.[edge]'"
        if os.environ.get("REQUIRE_EDGE"):
            pytest.fail(said)
        pytest.skip(said)
    return found


def random_llama(**sizes):
    """A Llama of transformers, its weights large, so that mistakes show."""
    # A test draws the same numbers, whoever came first.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = LlamaForCausalLM(LlamaConfig(initializer_range=0.2, **sizes)).eval()
        scatter(model)
    return model


def random_decoder(kind, sizes, num_kv_heads, head_dim=12, part=None):
    """A Gemma or Phi of transformers, its weights large, so that mistakes show."""
    sizes = {
        **sizes,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": num_kv_heads,
        "initializer_range": 0.2,
        "rope_parameters": dict(PLAIN_ROPE),
        "pad_token_id": None,  # its embedding would be zero
    }
    if head_dim is not None:
        sizes["head_dim"] = head_dim  # not 48 / 6
    if part is not None:
        sizes["rope_parameters"]["partial_rotary_factor"] = part
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if kind == "gemma":
            model = GemmaForCausalLM(GemmaConfig(**sizes, rms_norm_eps=1e-2)).eval()
        else:
            model = PhiForCausalLM(PhiConfig(**sizes, layer_norm_eps=1e-2)).eval()
        scatter(model, gain=0 if kind == "gemma" else 1)  # Gemma's are less one
    return model


def scatter(model, gain=1):
    """Let no gain be one, and no bias zero, as transformers makes them."""
    for name, weight in model.state_dict().items():
        if "bias" in name:
            weight.normal_(std=0.5)
        elif "norm" in name:
            weight.uniform_(gain - 0.5, gain + 0.5)


def small_tokenizer():
    """Byte-level BPE: three special tokens, 256 bytes, 60 merges, digits alone."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL) + 256 + 60,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([topics["for"], topics["while"]], trainer)
    return tokenizer


def write_gguf(path, reference, tokenizer, quantization):
    c, writer = reference.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    add_tokenizer(writer, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
    for name, weight in reference.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        kind = quantization if weight.ndim == 2 else F32
        packed = gguf.quants.quantize(weight.numpy(), kind)
        weight.copy_(torch.from_numpy(gguf.quants.dequantize(packed, kind)))
        if (layer := name.split(".")[-2]) in heads:
            # llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute
            by_head = packed.reshape(heads[layer], 2, -1, packed.shape[-1])
            packed = by_head.swapaxes(1, 2).reshape(packed.shape)
        target = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(target, packed.copy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer, tokenizer):
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([control if t in SPECIAL else normal for t in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
