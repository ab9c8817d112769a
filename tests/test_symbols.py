"""Pages of source symbols: every link leads somewhere, every name is real."""

import ast
import functools
import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))

import symbols  # noqa: E402 - found by the line above
from symbols_data import page_name, read_projects  # noqa: E402
from symbols_page import compared, write_body  # noqa: E402
from symbols_scan import scan_book  # noqa: E402

PROJECTS = read_projects(ROOT / "book" / "symbols")
BOOK = scan_book(ROOT)
PAGES = {f"{p.slug}:{s.name}": s for p in PROJECTS for s in p.symbols}
LAST = {s.name.rpartition(".")[2] for s in PAGES.values()}
NAMED = {part for s in PAGES.values() for part in (s.name, *s.name.split("."))}
EACH = pytest.mark.parametrize("symbol", PAGES.values(), ids=PAGES)

# What the four texts that this book begins with define, call or import by name.
IN_THE_TEXTS = """
gelu_impl gelu RotaryEmbedding attention_fn SelfAttention GEGLU GLU GLMBlock
attention_mask_func split_tensor_along_last_dim apply_rotary_pos_emb_index
ChatGLMPreTrainedModel get_masks get_position_ids ChatGLMModel get_layer
get_prompt PrefixEncoder LlamaRMSNorm LlamaRotaryEmbedding rotate_half
apply_rotary_pos_emb repeat_kv LlamaAttention LlamaMLP LlamaDecoderLayer
LlamaModel _update_causal_mask LlamaForCausalLM
_prepare_4d_causal_attention_mask_with_cache_position LlamaPreTrainedModel
LlamaConfig AutoConfig.from_pretrained PreTrainedModel.from_pretrained
cached_file load_state_dict get_checkpoint_shard_files _load_pretrained_model
_find_mismatched_keys _load_state_dict_into_meta_model
_load_state_dict_into_model set_module_tensor_to_device pipeline check_task
TextGenerationPipeline Pipeline.__call__ run_single _ensure_tensor_on_device
TextGenerationPipeline.preprocess Pipeline.forward
TextGenerationPipeline._forward TextGenerationPipeline.postprocess
get_inference_context GenerationMixin.generate _sample
_expand_inputs_for_generation _has_unfinished_sequences
prepare_inputs_for_generation TinyLlama ModelConfig TransformerBlock build_norm
build_rope_cache build_causal_mask_cache ModelLoader ModelLoader.TensorNames
get_model_config build_model convert convert_tiny_llama_to_tflite signature
full_linear_int8_dynamic_recipe full_int8_dynamic_recipe
"""

# In modeling_llama.py, without a page.
OTHER_HEADS = {
    "LlamaForSequenceClassification": "another head: it writes nothing",
    "LlamaForTokenClassification": "the same",
    "LlamaForQuestionAnswering": "the same",
}

# What our docstrings and chapters name as a source, and no page is about.
NOT_OF_THESE_PROJECTS = {
    "torch": """F.scaled_dot_product_attention F.kl_div nn.LayerNorm
        _weight_int8pack_mm _int_mm Module.load_state_dict
        torch.nn.functional.scaled_dot_product_attention custom_op
        is_causal enable_gqa prepare_pt2e""",
    "torchao": """quantize_ choose_qparams_affine quantize_affine Int8WeightOnlyConfig
        IntxWeightOnlyConfig Int8DynamicActivationInt8WeightConfig""",
    "other models, for their layout or their first weights": """GPT2PreTrainedModel
        GPTNeoXAttention.forward FalconAttention._split_heads
        multi_query_group_num""",
    "other projects": """CoreAttention FusedScaleMaskSoftmax norm_factor
        standard_attention MultiHeadAttention.qkv_attention LlamaModel.permute
        bytes_to_unicode BPE::merge_word BpeTrainer Word::merge_all Metadata::validate
        LLAMA_VOCAB_PRE_TYPE_SMOLLM SetTensor GetTensor TensorBuffer""",
    "parts of a symbol that has a page": """num_layers=28 layer_past past_seen_tokens
        query_key_layer_scaling_coeff attention_probs scale_mask_softmax inv_freq
        query_key_value use_gmasks prefix_attention_mask prefill_chunk_size pack_gqa
        SUPPORTED_TASKS _default_generation_config position_encoding_2d=False
        GenerationConfig.eos_token_id training_step __init__ _load_from_state_dict
        prefix_encoder""",
    "this book": "attention_norm ffn_norm scores_split save_checkpoint",
    "transformers 4.27, whose search by beams 5 has rewritten": """BeamSearchScorer
        GenerationMixin.beam_search""",
    "a base class of a symbol that has a page": "PreTrainedTokenizer GenerationMixin",
    "what a page mentions": "clean_up_tokenization initialization.no_init_weights",
}
WITHOUT = {name for names in NOT_OF_THESE_PROJECTS.values() for name in names.split()}


@functools.cache
def definitions(path):
    """All functions, classes and assigned names of a file, as dotted names."""
    found = set()

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + child.name)
                walk(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.Assign) and isinstance(
                child.targets[0], ast.Name
            ):
                found.add(prefix + child.targets[0].id)

    walk(ast.parse(path.read_text("utf-8")), "")
    return found


def installed(path):
    """Where a path is that begins with a package, whether or not it is a file."""
    spec = importlib.util.find_spec(path.split("/")[0])
    if spec is None:
        return None
    return Path(spec.submodule_search_locations[0]).parent / path


def test_a_symbol_has_one_page():
    assert len(PAGES) == sum(len(p.symbols) for p in PROJECTS) > 150
    assert len({page_name(key) for key in PAGES}) == len(PAGES)


@EACH
def test_a_page_teaches_something(symbol):
    assert len(symbol.does.split()) >= 10
    assert symbol.derived
    assert symbol.tested
    assert bool(symbol.ours) != bool(symbol.instead)  # ours, or why there is none


@EACH
def test_what_a_page_names_is_there(symbol):
    for target in symbol.derived:
        label, _, heading = target.partition("#")
        assert not heading or heading in BOOK.chapters[label].slugs, target
    assert set(symbol.exercises) <= set(BOOK.exercises)
    assert set(symbol.errata) <= set(BOOK.errata)
    assert set(symbol.see) <= set(PAGES)
    for name in symbol.tested:
        path, _, function = name.partition("::")
        assert function in definitions(ROOT / path), name


@EACH
def test_ours_is_in_the_package(symbol):
    for name in symbol.ours:
        parts = name.split(".")
        there = [n for n in range(len(parts), 0, -1) if is_module(parts[:n])]
        found = importlib.import_module(".".join(parts[: there[0]]))
        for part in parts[there[0] :]:
            found = getattr(found, part)


def is_module(parts):
    path = ROOT.joinpath(*parts)
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


INSTALLED = [
    symbol
    for project in PROJECTS
    for symbol in project.symbols
    if project.installed and (symbol.gone or installed(symbol.path))
]


def test_transformers_is_looked_into():
    assert sum(s.path.startswith("transformers/") for s in INSTALLED) > 90


@pytest.mark.parametrize("symbol", INSTALLED, ids=lambda symbol: symbol.name)
def test_the_source_has_the_symbol_where_the_page_says(symbol):
    path = installed(symbol.path)
    is_there = bool(path and path.exists()) and symbol.name in definitions(path)
    assert is_there != symbol.gone
    assert bool(symbol.version) == symbol.gone  # what is gone says since when


def test_every_symbol_of_modeling_llama_has_a_page_or_a_reason():
    path = "transformers/models/llama/modeling_llama.py"
    top = {name for name in definitions(installed(path)) if "." not in name}
    classes = {name for name in top if not name.startswith("_") and name != "logger"}
    pages = {s.name for s in PAGES.values() if s.path == path}
    assert classes - pages == set(OTHER_HEADS)


@pytest.mark.parametrize("name", IN_THE_TEXTS.split())
def test_every_symbol_of_the_four_texts_has_a_page(name):
    assert name in NAMED


def test_every_symbol_in_the_tables_of_equality_has_a_page():
    others = {name for symbol in PAGES.values() for name in symbol.compared}
    rows = [row for row in BOOK.equality if row.originals]
    assert len(rows) > 50
    for row in rows:
        known = row.originals & (NAMED | others)
        assert known or row.originals == {"LayerNorm"}, row  # that one is torch's


def sources():
    """Every symbol that a docstring of the package, or the end of a chapter, names."""
    for path in (ROOT / "annotated_src").glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if "classroom" not in path.parts:
                    yield from quoted(text.partition("\nSource:")[2])
    for path in (ROOT / "notebooks").glob("*/*.py"):
        text = path.read_text("utf-8").partition("Where to read on")[2]
        yield from quoted(re.sub(r"\{\S+?\}`[^`]*`", "", text.replace("\n#", " ")))


def quoted(text):
    for name in re.findall(r"`([^`]+)`", text.partition("# %%")[0]):
        file = re.search(r"[/ \[(]|\.(py|cc|rs|md|json|cpp|h|model)$", name)
        if not file and ("_" in name or re.search(r"[a-z][A-Z]|::|^[A-Z]{3}", name)):
            yield name.removeprefix("self.")


@pytest.mark.parametrize("name", sorted(set(sources())))
def test_a_symbol_that_the_book_names_has_a_page_or_a_reason(name):
    owner, _, last = name.partition(".")
    known = {name, owner, last} - {"forward", "__init__", "__call__"}
    assert known & NAMED or name in WITHOUT


def test_no_reason_is_given_without_need():
    assert {name.removeprefix("self.") for name in WITHOUT} <= set(sources())


def test_a_page_says_where_the_book_has_it(tmp_path):
    project = next(p for p in PROJECTS if p.slug == "llama")
    text = "\n".join(write_body(project, PAGES["llama:repeat_kv"], BOOK))
    at = "../notebooks/llama/06_heads.ipynb"
    assert f"{{ref}}`ch-heads`: [One family]({at}#one-family)" in text
    shown = text.partition("**Shown in**")[2].partition("**")[0]
    assert f"({at}#one-family)" in shown
    assert "{py:obj}`~annotated_src.attention.repeat_kv`" in text
    assert "`tests/test_attention.py`: `test_heads_are_repeated_side_by_side`" in text
    assert f"`repeat_kv`: {{ref}}`ch-heads`: [Exercises]({at}#exercises)" in text


def test_a_page_counts_what_is_compared():
    project = next(p for p in PROJECTS if p.slug == "chatglm")
    symbol = PAGES["chatglm:ChatGLMPreTrainedModel.get_masks"]
    assert "Masks, positions and labels, from ids (12)" in "\n".join(
        compared(BOOK, project, symbol)
    )
    other = PAGES["llama:rotate_half"]  # ChatGLM has one too; that is not this one
    llama = next(p for p in PROJECTS if p.slug == "llama")
    assert not list(compared(BOOK, llama, other))


def test_pages_are_written_once_and_old_ones_go(tmp_path, monkeypatch):
    for path in (ROOT / "book" / "symbols").glob("*.toml"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(symbols, "FOLDER", tmp_path)
    (tmp_path / "old.md").write_text("gone")
    symbols.write_pages(None)
    pages = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.md")}
    assert set(pages) == {f"{page_name(key)}.md" for key in PAGES} | {"index.md"}
    symbols.write_pages(None)
    again = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.md")}
    assert again == pages


def test_neighbours_are_those_of_the_source():
    order = list(symbols.name_pages(PROJECTS).values())
    at = order.index("rotate_half")
    assert order[at - 1 : at + 2] == [
        "RotaryEmbedding",
        "rotate_half",
        "apply_rotary_pos_emb_index",
    ]


# What pages say of somebody else's code, and no chapter shows.


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=97, **sizes, **heads)
    return LlamaForCausalLM(config).eval()


def test_half_rounds_the_frequencies_of_llama(llama, tmp_path):
    exact = llama.model.rotary_emb.inv_freq.clone()
    llama.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert torch.equal(loaded.model.rotary_emb.inv_freq, exact)
    halved = LlamaForCausalLM.from_pretrained(tmp_path).half().model.rotary_emb
    assert not torch.equal(halved.inv_freq.float(), exact)


def test_an_argument_that_nobody_knows_is_no_error(llama):
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        plain, odd = llama(tokens), llama(tokens, atention_mask=tokens * 0)
    assert torch.equal(plain.logits, odd.logits)


def test_an_unknown_key_of_a_config_is_kept_and_ignored():
    assert LlamaConfig(hiden_size=7).hiden_size == 7


def test_two_names_for_the_tanh_gelu_and_two_for_silu():
    x = torch.linspace(-4, 4, 99)
    assert torch.equal(ACT2FN["silu"](x), ACT2FN["swish"](x))
    assert torch.allclose(ACT2FN["gelu_new"](x), ACT2FN["gelu_pytorch_tanh"](x))
    assert not torch.allclose(ACT2FN["gelu"](x), ACT2FN["gelu_new"](x))


def test_defaults_of_generation():
    defaults = GenerationConfig._get_default_generation_params()
    assert (defaults["top_k"], defaults["max_length"]) == (50, 20)
    assert not defaults["do_sample"]
