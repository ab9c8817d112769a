"""ChatGLM-6B: every tensor that the original computed is computed again, and compared.

A group of checks covers one golden file. It yields (tensor, ours, symbol, function):
the golden name, our value in the golden layout, whose work it is in the original, and
whose here. A tensor that no group yields must be listed as an input, or a test fails.
`make equality` writes the table of the book, book/equality.md.
"""

import functools
import json
import math
import os
import re
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor
from torch.nn import functional as F

from annotated_src import attention_by_layer as by_layer
from annotated_src import chatglm_text
from annotated_src import golden as package_golden
from annotated_src.activations import gelu_tanh
from annotated_src.beam_search import beam_search
from annotated_src.blank_infilling import mask_rest, mask_span, pad_right
from annotated_src.chatglm_quantize import (
    QuantizedLinear,
    dequantize_rows,
    quantize_rows,
)
from annotated_src.chatglm_tokenizer import ChatGLMTokenizer
from annotated_src.checkpoint import load_model, names_by_layer
from annotated_src.generate import generate, generate_stream
from annotated_src.kv_cache import LayerCache
from annotated_src.loss import next_token_loss
from annotated_src.masks import prefix_mask, visible_to_masked
from annotated_src.models.chatglm import HF_NAMES
from annotated_src.positions import (
    BlankIds,
    answer_advance,
    context_lengths,
    mask_positions,
    prompt_positions,
)
from annotated_src.rotary import rotate_half
from annotated_src.rotary_2d import (
    apply_rotary_2d,
    half_frequencies,
    rope_table,
    rotation,
    table_rows,
)
from annotated_src.sampler import chatglm_sampler
from annotated_src.sampling import guard_invalid, temperature, top_k, top_p

ROOT = Path(__file__).resolve().parents[1]
FOLDER = package_golden.GOLDEN
PAGE = ROOT / "book" / "equality.md"
META = json.loads((FOLDER / "meta.json").read_text("utf-8"))
C = META["config"]
IDS = BlankIds(C["bos_token_id"], C["gmask_token_id"], C["mask_token_id"])
MINUS = "\N{MINUS SIGN}"
EXCLUDED = -1e30  # how the golden file writes -inf
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


golden = functools.cache(package_golden.golden)


@pytest.fixture(scope="module")
def make_model(tmp_path_factory):
    """The golden model, read by load_model from a directory like the original's."""

    @functools.cache
    def make(dtype=torch.float32, **config):
        folder = tmp_path_factory.mktemp("chatglm")
        entries = {"model_type": "chatglm", "tie_word_embeddings": False, **C, **config}
        (folder / "config.json").write_text(json.dumps(entries), "utf-8")
        prefix = {}
        if "pre_seq_len" in config:
            start = f"proj_{config['prefix_projection']}/weights/"
            prefix = {
                name.removeprefix(start): tensor
                for name, tensor in golden("prefix").items()
                if name.startswith(start)
            }
        save_file(golden("weights") | prefix, folder / "model.safetensors")
        return load_model(folder, dtype)

    return make


@pytest.fixture(scope="module")
def compute(make_model):
    """Run a group of checks once."""

    @functools.cache
    def run(file):
        with by_layer_recorded() as recorded, torch.no_grad():
            return list(GROUPS[file].checks(make_model, recorded))

    return run


class by_layer_recorded:
    """Keep what the attention of every layer computes on its way."""

    def __enter__(self):
        self.kept, self.functions = defaultdict(list), {}
        for name in ("scores_by_layer", "restore_scores", "attend_by_layer"):
            self.functions[name] = function = getattr(by_layer, name)

            @functools.wraps(function)
            def keep(*args, name=name, function=function):
                self.kept[name].append(function(*args))
                return self.kept[name][-1]

            setattr(by_layer, name, keep)
        return self.kept

    def __exit__(self, *_):
        for name, function in self.functions.items():
            setattr(by_layer, name, function)


def run_recorded(recorded, *args, **kwargs):
    recorded.clear()
    model, *rest = args
    return model(*rest, **kwargs)


def ours(sequence_first):
    """(T, B, N, H) to (B, N, T, H)."""
    return sequence_first.permute(1, 2, 0, 3)


def theirs(heads_first):
    """(B, N, T, H) to (T, B, N, H)."""
    return heads_first.permute(2, 0, 1, 3)


def with_repeat(table):
    """Theirs holds every cosine twice, and an axis for the batch."""
    return torch.cat((table, table), dim=-1)[:, None]


# Components ---------------------------------------------------------------------------


def check_components(kind, make_model, recorded):
    g, dtype = golden(f"components_{kind}"), DTYPES[kind]
    yield "gelu/y", gelu_tanh(g["gelu/x"]), "gelu_impl", gelu_tanh
    yield "rotate_half/y", rotate_half(g["rotate_half/x"]), "rotate_half", rotate_half
    yield from check_rotary(g, dtype)
    yield from check_attention(g)
    yield from check_block(g, make_model(dtype), recorded)


def check_rotary(g, dtype):
    symbol = "RotaryEmbedding"
    frequencies = half_frequencies(8)
    yield "rotary/inv_freq", frequencies.to(dtype), symbol, half_frequencies
    for dim, suffix in ((8, ""), (64, "_dim64"), (128, "_dim128")):
        tables = rope_table(2048, half_frequencies(dim).to(dtype))
        rows = g["rotary/rows"] if suffix else range(64)
        for name, table in zip(("cos", "sin"), tables, strict=True):
            yield f"rotary/{name}{suffix}", with_repeat(table[rows]), symbol, rope_table
    position = g["apply_rotary/position_id"].T
    tables = rope_table(int(position.max()) + 1, frequencies.to(dtype))
    for name, table in zip(("cos", "sin"), tables, strict=True):
        yield f"apply_rotary/{name}", with_repeat(table), symbol, rope_table
    turn = tuple(table_rows(table, position) for table in tables)
    for x in "qk":
        turned = theirs(apply_rotary_2d(ours(g[f"apply_rotary/{x}"]), [turn]))
        yield (
            f"apply_rotary/{x}_out",
            turned,
            "apply_rotary_pos_emb_index",
            apply_rotary_2d,
        )


def check_attention(g):
    q, k, v = (ours(g[f"attention_fn/{x}"]) for x in "qkv")
    width = q.shape[-1]
    masked = g["attention_fn/mask"]
    for case, layer, is_masked in (
        ("layer0_mask", 1, True),
        ("layer0_nomask", 1, False),
        ("layer27_mask", 28, True),
        ("layer2_noscale", 3, True),
        ("layer2_past", 3, True),
    ):
        keys, values, hidden = k, v, masked & is_masked
        if case == "layer2_past":
            cache = LayerCache(2, 4, 9, width, q.dtype)
            cache.append(*(ours(g[f"attention_fn/past_{x}"]) for x in "kv"))
            keys, values = cache.append(k, v)
            hidden = F.pad(hidden, (3, 0))
            for x, found in (("k", keys), ("v", values)):
                name = f"attention_fn/{case}/present_{x}"
                yield name, theirs(found), "attention_fn", LayerCache.append
        visible = ~hidden
        scores = by_layer.scores_by_layer(q, keys, layer)
        context = by_layer.attend_by_layer(q, keys, values, visible, layer)
        if case == "layer2_noscale":  # ours always divides, so multiply first: by 16,
            # which half can do without rounding
            scores = by_layer.scores_by_layer(q * math.sqrt(width) * 4, keys, 4)
            raised = q * (math.sqrt(width) * layer)
            context = by_layer.attend_by_layer(raised, keys, values, visible, layer)
        restored = by_layer.restore_scores(scores, visible, layer)
        weights = restored.softmax(dim=-1).to(q.dtype)
        for name, value, function in (
            ("raw_scores", scores.flatten(0, 1), by_layer.scores_by_layer),
            ("softmax_in", restored, by_layer.restore_scores),
            ("probs", weights.flatten(0, 1), by_layer.restore_scores),
            ("context", theirs(context).flatten(2), by_layer.attend_by_layer),
        ):
            yield f"attention_fn/{case}/{name}", value, "attention_fn", function


def check_block(g, model, recorded):
    block = model.blocks[1]
    # As in the model: of a transposed view, linear rounds twice in half.
    x = g["block/hidden_in"].transpose(0, 1).contiguous()
    rotate = rotation(g["block/position_ids"], 16, x.dtype)
    visible = ~g["block/attention_mask"]
    normed = block.attention_norm(x)
    split = block.attention.split_heads
    q, k, v = split(block.attention.qkv_proj(normed))
    output = run_recorded(recorded, block, x, rotate, visible)
    (scores,), (restored,) = recorded["scores_by_layer"], recorded["restore_scores"]
    (context,) = recorded["attend_by_layer"]
    attention_out = block.attention(normed, rotate, visible)
    for name, value, symbol, function in (
        ("q", theirs(rotate(q)), "SelfAttention", rotation),
        ("k", theirs(rotate(k)), "SelfAttention", rotation),
        ("v", theirs(v), "SelfAttention", split),
        ("raw_scores", scores.flatten(0, 1), "attention_fn", by_layer.scores_by_layer),
        ("softmax_in", restored, "attention_fn", by_layer.restore_scores),
        (
            "probs",
            restored.softmax(dim=-1).to(x.dtype).flatten(0, 1),
            "attention_fn",
            by_layer.restore_scores,
        ),
        (
            "context",
            theirs(context).flatten(2),
            "attention_fn",
            by_layer.attend_by_layer,
        ),
        (
            "input_layernorm",
            normed.transpose(0, 1),
            "LayerNorm",
            type(block.attention_norm),
        ),
        (
            "attention_out",
            attention_out.transpose(0, 1),
            "SelfAttention",
            type(block.attention),
        ),
        (
            "mlp_of_layernorm",
            block.ffn(normed).transpose(0, 1),
            "GLU",
            type(block.ffn),
        ),
        ("output", output.transpose(0, 1), "GLMBlock", type(block)),
    ):
        yield f"block/{name}", value, symbol, function


# The ids ------------------------------------------------------------------------------


def check_ids(make_model, recorded):
    g = golden("ids")
    for name, tokens in g.items():
        case, _, what = name.partition("/")
        if what != "input_ids":
            continue
        contexts, num_tokens = context_lengths(tokens, IDS.sop), tokens.shape[1]
        masked = visible_to_masked(prefix_mask(contexts, num_tokens))
        forward = "ChatGLMModel.forward"
        where = mask_positions(tokens, IDS.gmask, IDS.mask)
        # With one row of positions, an answer at [gMASK] counts on.
        use_gmask = answer_advance(tokens, IDS, rows=1)[:, 0].bool()
        yield f"{case}/get_masks", masked, "get_masks", prefix_mask
        yield f"{case}/mask_positions", where, forward, mask_positions
        yield f"{case}/use_gmasks", use_gmask, forward, answer_advance
        for rows in (2, 1):
            found = prompt_positions(tokens, IDS, rows)
            found = found if rows == 2 else found[:, 0]
            name = f"{case}/get_position_ids_{rows}d"
            yield name, found, "get_position_ids", prompt_positions
    yield from check_tokenizer_padding(g)
    yield from check_examples(g)


def check_tokenizer_padding(g):
    special = SimpleNamespace(
        pad_id=C["pad_token_id"],
        sop_id=IDS.sop,
        mask_id=IDS.mask,
        gmask_id=IDS.gmask,
    )
    for name, wanted in g.items():
        case, _, what = name.partition("/")
        if what != "tokenizer_attention_mask":
            continue
        rows = [row[row != special.pad_id][None] for row in g[f"{case}/input_ids"]]
        batch = ChatGLMTokenizer.pad(special, rows)
        assert torch.equal(batch.tokens, g[f"{case}/input_ids"])
        assert wanted.shape == batch.mask.shape
        symbol, function = "ChatGLMTokenizer._pad", ChatGLMTokenizer.pad
        yield name, visible_to_masked(batch.mask), symbol, function
        positions = f"{case}/tokenizer_position_ids"
        yield positions, batch.positions, symbol, function


def check_examples(g):
    eop = C["eos_token_id"]
    source = "ptuning main.py"
    for case, function in (
        ("gmask_train", mask_rest),
        ("mask_train", mask_span),
        ("batch_rightpad", mask_rest),
    ):
        examples = []
        for row in g[f"{case}/input_ids"].tolist():
            end = row.index(IDS.sop)
            context, answer = row[:end], row[end + 1 : row.index(eop)]
            if function is mask_rest:
                text, start = context[:-1] + answer, len(context) - 1
                examples.append(mask_rest(text, start, IDS, eop))
            else:
                start = context.index(IDS.mask)
                text = context[:start] + answer + context[start + 1 :]
                examples.append(mask_span(text, start, start + len(answer), IDS, eop))
        tokens, labels = pad_right(examples, C["pad_token_id"])
        assert torch.equal(tokens, g[f"{case}/input_ids"])
        yield f"{case}/labels", labels, source, function
    words = {n: g[f"build_inputs/{n}"].tolist() for n in ("single_in", "pair_b")}
    whole = [*words["single_in"], *words["pair_b"]]
    pair = mask_rest(whole, len(words["single_in"]), IDS, eop).tokens
    symbol = "build_inputs_with_special_tokens"
    yield "build_inputs/pair", pair, symbol, mask_rest
    yield "build_inputs/single", pair[: len(words["single_in"]) + 2], symbol, mask_rest


# The model ----------------------------------------------------------------------------


def check_model(kind, make_model, recorded):
    g, ids, dtype = golden(f"model_{kind}"), golden("ids"), DTYPES[kind]
    model, forward = make_model(dtype), "ChatGLMForConditionalGeneration.forward"
    for name in g:
        case, _, what = name.partition("/")
        if what == "logits" and f"{case}/input_ids" in ids:
            yield name, model(ids[f"{case}/input_ids"]), forward, type(model)
        if what == "loss":
            logits = model(ids[f"{case}/input_ids"])
            loss = next_token_loss(logits, ids[f"{case}/labels"])
            yield name, loss, forward, next_token_loss
    far = golden("model_fp32")["far_positions/position_ids"]
    logits = model(ids["gmask_train/input_ids"], positions=far)
    yield "far_positions/logits", logits, "RotaryEmbedding", rotation
    yield from check_inside(model, ids["gmask_train/input_ids"], recorded)
    yield from check_left_padding(model, g, "batch_leftpad_tokenizer")


def check_inside(model, tokens, recorded):
    hidden = [model.embedding(tokens)]
    hooks = [
        module.register_forward_hook(lambda _m, _x, y: hidden.append(y))
        for module in (*model.blocks[:-1], model.norm)
    ]
    cache = model.new_cache(*tokens.shape)
    run_recorded(recorded, model, tokens, cache)
    for hook in hooks:
        hook.remove()
    for i, x in enumerate(hidden):
        name = f"gmask_train/hidden_states.{i}"
        yield name, x.transpose(0, 1), "ChatGLMModel.forward", type(model)
    for i, scores in enumerate(recorded["restore_scores"]):
        weights = scores.softmax(dim=-1).to(hidden[0].dtype).flatten(0, 1)
        name = f"gmask_train/attentions.{i}"
        yield name, weights, "attention_fn", by_layer.restore_scores
    yield from check_cache(cache, "gmask_train/past", range(len(cache)))


def check_cache(cache, name, layers, kinds=("keys", "values")):
    for i in layers:
        for kind in kinds:
            found = getattr(cache[i], kind)[:, :, : cache[i].length]
            where = f"{name}.{i}.{kind.removesuffix('s')}"
            yield where, theirs(found), "SelfAttention", type(cache)


def check_left_padding(model, g, name):
    """The prompt with masks and positions of the tokenizer, then forced tokens."""
    ids = golden("ids")
    tokens, masked, positions = (
        ids[f"batch_leftpad/{x}"]
        for x in ("input_ids", "tokenizer_attention_mask", "tokenizer_position_ids")
    )
    forced = golden("model_fp32")["forced_tokens"]
    cache = model.new_cache(3, tokens.shape[1] + forced.shape[1])
    logits = model(tokens, cache, positions=positions, mask=~masked)
    symbol = "prepare_inputs_for_generation"
    yield f"{name}/logits", logits, "ChatGLMTokenizer._pad", type(model)
    last = [logits[:, -1]]
    for token in forced.T:
        last.append(model(token[:, None], cache)[:, -1])
    where = (
        name.replace("batch_leftpad_tokenizer", "") if "proj" in name else name + "/"
    )
    yield f"{where}forced_step_logits", torch.stack(last, dim=1), symbol, type(cache)


def check_model_fp32(make_model, recorded):
    yield from check_model("fp32", make_model, recorded)
    g, ids = golden("model_fp32"), golden("ids")
    model = make_model()
    forward = "ChatGLMForConditionalGeneration.forward"
    tokens = ids["batch_leftpad/input_ids"]
    yield "batch_leftpad_model/logits", model(tokens), "get_masks", prefix_mask
    one_row = make_model(position_encoding_2d=False)
    for case in ("batch_mixed", "gmask_train", "mask_train"):
        logits = one_row(ids[f"{case}/input_ids"])
        yield f"pos1d/{case}/logits", logits, "get_position_ids", prompt_positions
    tied = make_model(tie_word_embeddings=True)(ids["gmask_train/input_ids"])
    yield "tied/logits", tied, "tie_weights", load_model
    for case, prompt, layers in (("gmask", 7, (0, 2)), ("mask", 9, (0, 2))):
        tokens = ids[f"{case}_train/input_ids"]
        cache = model.new_cache(*tokens.shape)
        logits = [model(tokens[:, :prompt], cache)[:, -1]]
        positions = []
        for i in range(prompt, tokens.shape[1]):
            logits.append(model(tokens[:, i : i + 1], cache)[:, -1])
            positions.append(cache.positions)
        symbol, name = "prepare_inputs_for_generation", f"incremental_{case}"
        yield f"{name}/step_logits", torch.stack(logits, dim=1), symbol, type(cache)
        steps = torch.stack(positions, dim=-1)
        yield f"{name}/step_position_ids", steps, symbol, type(cache)
        yield from check_cache(cache, f"{name}/final_past", layers)
    yield from check_gradients(model, g, forward)


def check_gradients(model, g, symbol):
    tokens, labels = (
        golden("ids")[f"batch_rightpad/{x}"] for x in ("input_ids", "labels")
    )
    with torch.enable_grad():
        loss = next_token_loss(model(tokens), labels)
        parameters = dict(model.named_parameters())
        gradients = torch.autograd.grad(loss, list(parameters.values()))
    found = dict(zip(parameters, gradients, strict=True))
    names = names_by_layer(model, HF_NAMES)
    for name in g:
        if name.startswith("batch_rightpad/grad/"):
            ours_name = names[name.removeprefix("batch_rightpad/grad/")]
            yield name, found[ours_name], symbol, next_token_loss
    norms = [found[names[name]].norm() for name in META["grad_norm_order"]]
    yield "batch_rightpad/grad_norms", torch.stack(norms), symbol, next_token_loss


# P-tuning -----------------------------------------------------------------------------


def check_prefix(make_model, recorded):
    g, ids = golden("prefix"), golden("ids")
    for projection in (False, True):
        name = f"proj_{projection}"
        model = make_model(
            pre_seq_len=META["pre_seq_len"], prefix_projection=projection
        )
        prefix = model.prefix_encoder(2)
        stacked = torch.stack([torch.stack(pair) for pair in prefix])
        # (layers, 2, B, N, P, H) to (layers, 2, P, B, N, H)
        prompt = stacked.permute(0, 1, 4, 2, 3, 5)
        yield f"{name}/get_prompt", prompt, "get_prompt", type(model.prefix_encoder)
        tokens, labels = (ids[f"gmask_train/{x}"] for x in ("input_ids", "labels"))
        with torch.enable_grad():
            cache = model.new_cache(*tokens.shape)
            logits = model(tokens, cache)
            loss = next_token_loss(logits, labels)
            loss.backward()
        forward = "ChatGLMForConditionalGeneration.forward"
        yield f"{name}/gmask_train/logits", logits, forward, type(model)
        yield f"{name}/gmask_train/loss", loss, forward, next_token_loss
        yield from check_cache(cache, f"{name}/gmask_train/past", [0], ["keys"])
        for ours_name, weight in model.named_parameters():
            assert (weight.grad is not None) == ours_name.startswith("prefix_encoder")
            if weight.grad is not None:
                where = f"{name}/grad/transformer.{ours_name}"
                yield where, weight.grad, "PrefixEncoder", type(model.prefix_encoder)
        yield from check_left_padding(model, g, f"{name}/batch_leftpad_tokenizer")
        prompt = g[f"{name}/greedy_input_ids"]
        found = generate(model, prompt, max_new_tokens=8)
        yield f"{name}/greedy_ids", found, "generate", generate
        scores = step_scores(model, g[f"{name}/greedy_ids"], prompt.shape[1])
        yield f"{name}/greedy_scores", scores, "generate", type(model)


def step_scores(model, sequences, num_prompt, **given):
    """Scores of each new token, the tokens before it as the original chose them."""
    cache = model.new_cache(*sequences.shape)
    scores = [model(sequences[:, :num_prompt], cache, **given)[:, -1]]
    for i in range(num_prompt, sequences.shape[1] - 1):
        scores.append(model(sequences[:, i : i + 1], cache)[:, -1])
    return torch.stack(scores, dim=1)


# Generation ---------------------------------------------------------------------------


def check_generation(make_model, recorded):
    g, model = golden("generation"), make_model()
    eos = C["eos_token_id"]
    half = make_model(torch.float16)
    for case, of in (
        ("greedy_gmask", model),
        ("greedy_gmask_fp16", half),
        ("greedy_mask", model),
        ("greedy_batch_tokenizer", model),
        ("eos_stop", model),
        ("eos_batch", model),
    ):
        prompt = g[f"{case.removesuffix('_fp16')}/input_ids"]
        given = {}
        if f"{case}/attention_mask" in g:
            given["mask"] = ~g[f"{case}/attention_mask"]
            given["positions"] = g[f"{case}/position_ids"]
        wanted = g[f"{case}/sequences"]
        num_new = wanted.shape[1] - prompt.shape[1]
        found = generate(of, prompt, max_new_tokens=num_new, stop_ids=[eos], **given)
        # A row that has ended repeats its stop id here, and is padded there.
        after_end = (found == eos).cumsum(dim=1) > 1
        found = found.masked_fill(after_end, C["pad_token_id"])
        yield f"{case}/sequences", found, "generate", generate
        scores = step_scores(of, wanted, prompt.shape[1], **given)
        yield f"{case}/scores", scores, "generate", type(of)
    prompt = g["greedy_gmask/input_ids"]
    found = beam_search(model, prompt, num_beams=3, max_new_tokens=8, stop_ids=[eos])
    yield "beam3_gmask/sequences", found, "generate, _reorder_cache", beam_search
    yield from check_streams(g, model)
    yield from check_processors(g)
    yield from check_trace(g, model)


def check_streams(g, model):
    """The original's stream ends a token early: its last one is never yielded."""
    for case, prompt in (("eos", "eos_stop"), ("gmask", "greedy_gmask")):
        prompt = g[f"{prompt}/input_ids"]
        sequence, stop_ids = prompt, [C["eos_token_id"]]
        yields = 0
        steps = list(
            generate_stream(model, prompt, max_new_tokens=10, stop_ids=stop_ids)
        )
        for step in steps[:-1]:
            sequence, yields = torch.cat((sequence, step[:, None]), dim=1), yields + 1
        yield f"stream_{case}/last_yield", sequence, "stream_generate", generate_stream
        count = torch.tensor(yields)
        yield f"stream_{case}/n_yields", count, "stream_generate", generate_stream


def check_processors(g):
    broken, scores = g["processors/scores_nan"], g["processors/scores"]
    symbol = "InvalidScoreLogitsProcessor"
    yield "processors/invalid_score", guard_invalid(broken), symbol, guard_invalid
    for name, function, value in (
        ("temperature", temperature, 0.95),
        ("top_k", top_k, 50),
        ("top_p", top_p, 0.7),
    ):
        scores = function(scores, value)
        shown = scores.masked_fill(scores == -torch.inf, EXCLUDED)
        yield f"processors/{name}", shown, "chat", function
    found = chatglm_sampler().probabilities(g["processors/scores"])
    yield "processors/probs", found, "chat", chatglm_sampler


def check_trace(g, model):
    """Masks and positions as they grow, four tokens long."""
    case, symbol = "greedy_batch_tokenizer", "_update_model_kwargs_for_generation"
    masked, positions = g[f"{case}/attention_mask"], g[f"{case}/position_ids"]
    tokens = g[f"{case}/sequences"]
    prompt = masked.shape[-1]
    cache = model.new_cache(3, prompt + 4)
    model(tokens[:, :prompt], cache, positions=positions, mask=~masked)
    for i in range(1, 5):
        token = tokens[:, prompt + i - 1, None]
        model(token, cache)
        step_mask = ~cache.visible[:, None, None]
        step_positions = cache.positions[..., None]
        if i < 4:
            where = f"trace/step{i}"
            yield f"{where}/attention_mask", step_mask, symbol, type(cache)
            yield f"{where}/position_ids", step_positions, symbol, type(cache)
        masked = torch.cat((F.pad(masked, (0, 1), value=True), step_mask), dim=2)
        positions = torch.cat((positions, step_positions), dim=2)
    yield "trace/final/attention_mask", masked, symbol, type(cache)
    yield "trace/final/position_ids", positions, symbol, type(cache)


# Quantisation -------------------------------------------------------------------------


def check_quantization(make_model, recorded):
    g = golden("quantization")
    for bits in (8, 4):
        name = f"int{bits}"
        storage, scale = quantize_rows(g["weight"], bits)
        symbol = "QuantizedLinear"
        yield f"{name}/weight", storage, symbol, quantize_rows
        yield f"{name}/weight_scale", scale, symbol, quantize_rows
        full = dequantize_rows(storage, scale, bits, torch.float32)
        symbol = "extract_weight_to_float"
        yield f"{name}/dequantized_fp32", full, symbol, dequantize_rows
        rows, cols = g["weight"].shape
        layer = QuantizedLinear(cols, rows, bits)
        layer.weight, layer.weight_scale = storage, scale
        layer.bias = torch.nn.Parameter(g["bias"].float())
        y = layer(g[f"{name}/x"].float())
        yield f"{name}/y_fp32", y, "W8A16Linear", QuantizedLinear


# The tokenizer's record ---------------------------------------------------------------


def tokenizer_pairs():
    """(symbol, here, ours, theirs) of each case; test_chatglm_tokenizer.py has more."""
    record = json.loads((FOLDER / "tokenizer.json").read_text("utf-8"))
    processor = SentencePieceProcessor(str(FOLDER / "toy_ice_text.model"))
    t = ChatGLMTokenizer(processor, record["tokenizer_config_of_6b"])
    symbol = "ChatGLMTokenizer"
    for case in record["cases"]:
        text, ids = case["text"], case["ids_no_special"]
        yield "_tokenize", t.pieces, t.pieces(text), case["tokens"]
        yield symbol, t.encode, t.encode(text)[0].tolist(), case["ids"]
        yield f"{symbol}.decode", t.decode, t.decode(ids), case["decode"]
        shown = t.decode(ids, skip_special=True)
        yield f"{symbol}.decode", t.decode, shown, case["decode_skip_special"]
    for text, marked in record["preprocess"]:
        function = chatglm_text.mark_whitespace
        yield "_preprocess", function, function(text), marked
    batch = record["batch"]
    padded = t.pad([t.encode(text) for text in batch["texts"]])
    for part, key in (
        (padded.tokens, "input_ids"),
        (padded.positions, "position_ids"),
        (visible_to_masked(padded.mask).int(), "attention_mask"),
    ):
        yield f"{symbol}._pad", t.pad, part.tolist(), batch[key]
    history = []
    for turn in record["chat"]:
        prompt = chatglm_text.chat_prompt(turn["query"], history)
        yield "chat", chatglm_text.chat_prompt, prompt, turn["prompt"]
        history = [tuple(pair) for pair in turn["history"]]
    function = chatglm_text.clean_response
    for answer, cleaned in record["process_response"]:
        yield "process_response", function, function(answer), cleaned


def test_the_tokenizer_s_record():
    for symbol, _, found, wanted in tokenizer_pairs():
        assert found == wanted, symbol


def tokenizer_rows():
    counts = Counter((symbol, where(here)) for symbol, here, *_ in tokenizer_pairs())
    for (symbol, here), count in counts.items():
        yield f"| `{symbol}` | {here} | 0 | exact | {count} |\n"


# The tests ----------------------------------------------------------------------------


class Group(NamedTuple):
    """The checks of one golden file."""

    checks: Any
    inputs: str  # a pattern of the names of what the original was given
    atol: float


COMPONENT_INPUTS = (
    r"gelu/x|rotate_half/x|rotary/rows|apply_rotary/(position_id|q|k)"
    r"|attention_fn/(q|k|v|past_k|past_v|mask)"
    r"|block/(hidden_in|position_ids|attention_mask)"
)
# The absolute tolerances are those of meta.json.
GROUPS = {
    "components_fp32": Group(
        functools.partial(check_components, "fp32"), COMPONENT_INPUTS, 5e-5
    ),
    "components_fp16": Group(
        functools.partial(check_components, "fp16"), COMPONENT_INPUTS, 1e-2
    ),
    "ids": Group(check_ids, r".*/(input_ids|single_in|pair_b)", 0.0),
    "model_fp32": Group(
        check_model_fp32, r"far_positions/position_ids|forced_tokens", 1e-4
    ),
    "model_fp16": Group(functools.partial(check_model, "fp16"), r"-", 6e-2),
    "prefix": Group(check_prefix, r".*/(weights/.*|greedy_input_ids)", 1e-4),
    "generation": Group(
        check_generation,
        r"(greedy|eos).*/(input_ids|attention_mask|position_ids)"
        r"|processors/(scores|scores_nan)",
        1e-4,
    ),
    "quantization": Group(check_quantization, r"int./x|weight|bias", 5e-5),
}
# In half too, these must be equal to the bit, as meta.json says; and what is stored.
EXACT = r"components_fp16: (gelu|rotary|rotate_half|apply_rotary)/.*|.*/weight_scale"
HALF_SCORES = r"generation: .*_fp16/scores"  # of a whole model in half


def tolerance(file, name):
    """Absolute and relative."""
    if re.fullmatch(EXACT, f"{file}: {name}") or re.fullmatch(EXACT, name):
        return 0.0, 0.0
    if "/grad" in name:
        return 1e-5, 1e-3
    half = re.fullmatch(HALF_SCORES, f"{file}: {name}")
    return GROUPS["model_fp16" if half else file].atol, 0.0


NAMES = {file: sorted(golden(file)) for file in GROUPS}
OUTPUTS = [
    (file, name)
    for file, names in NAMES.items()
    for name in names
    if not re.fullmatch(GROUPS[file].inputs, name)
]


@pytest.mark.parametrize(("file", "name"), OUTPUTS, ids=[":".join(o) for o in OUTPUTS])
def test_ours_equals_the_original(compute, file, name):
    (check,) = [check for check in compute(file) if check[0] == name]
    wanted, found = golden(file)[name], check[1].detach()
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    atol, rtol = tolerance(file, name)
    if not wanted.dtype.is_floating_point:
        atol = rtol = 0.0
    torch.testing.assert_close(found, wanted, atol=atol, rtol=rtol)


def test_the_book_s_golden_model_is_the_loaded_one(make_model):
    tokens = golden("ids")["gmask_train/input_ids"]
    for dtype in DTYPES.values():
        found = package_golden.golden_model(dtype)
        assert torch.equal(found(tokens), make_model(dtype)(tokens))
        assert not any(weight.requires_grad for weight in found.parameters())
    one_row = package_golden.golden_model(position_encoding_2d=False)
    assert one_row.config.position_rows == 1


def test_a_golden_file_that_is_not_there():
    with pytest.raises(
        ValueError, match=r"no golden file 'words', there are components"
    ):
        package_golden.golden("words")


@pytest.mark.parametrize("file", GROUPS)
def test_nothing_is_computed_that_is_not_compared(compute, file):
    computed = [check[0] for check in compute(file)]
    assert sorted(computed) == sorted(name for f, name in OUTPUTS if f == file)


def test_every_golden_file_has_its_checks():
    files = {path.stem for path in FOLDER.glob("*.safetensors")}
    assert files == {*GROUPS, "weights"}


def test_the_book_has_the_table(compute):
    """Its figures are those of the machine that wrote it; its rows are checked here."""
    page = equality_page({file: compute(file) for file in GROUPS})
    if os.environ.get("WRITE_EQUALITY"):
        PAGE.write_text(page, "utf-8")
    figures = re.compile(rf"\| (0|\d\.\de{MINUS}\d+) \|")
    written = PAGE.read_text("utf-8")
    assert figures.sub("", written) == figures.sub("", page)
    for row in written.splitlines():
        if match := re.search(rf"\| (\S+) \| (\de{MINUS}\d+) \|", row):
            seen, allowed = (float(n.replace(MINUS, "-")) for n in match.groups())
            assert seen <= allowed, row


TOP = """# Equality with the original

The tests run our ChatGLM on the inputs that the original's code was run on, and compare every tensor that it computed:
{count} of them, on a seeded model of 3 layers. The original is THUDM/chatglm-6b's `modeling_chatglm.py` (revision a8ede82) with
torch 2.13 and transformers 4.27.1, on a CPU. This page is written by `tests/test_golden.py`. A test for each tensor fails beyond the
difference allowed; the largest one seen when the page was written stands beside it.

Integers and masks must be equal; so must, in half precision, the activation, the rotary tables and what they turn.
"""
NOTES = """
## What cannot be compared as it stands

| original | why | what the test does |
|---|---|---|
| `attention_fn` with `scaling_attention_score=False` (`layer2_noscale`) | ours always divides; nothing in the model asks for less | multiplies the queries first by what they are divided by |
| `generate`, rows of a batch that ended | the original pads them, ours repeats the stop id | puts the padding there, then compares |
| `stream_generate` | the original never yields its last token, ours does | leaves our last token out, then compares |
| single steps with one row of positions (`position_encoding_2d=False`) and [gMASK] | the original stands still where its own forward pass counts on; no published model uses it | no golden tensor; ours counts on, and a test holds that cached equals uncached |
| a head that is not tied, under P-tuning | the original leaves it trainable by accident (`from_pretrained` ties it); ours freezes all but the prefix | compares the gradients of the prefix |
| rows of weights whose scale is near zero in half | the original wraps around or divides by zero, ours clamps or keeps zeros | {ref}`ch-chatglm` speaks of it |
"""
HEADER = """
## {title}

`{file}.safetensors`

| original | here | seen | allowed | tensors compared |
|---|---|---|---|---|
"""


def equality_page(checks):
    parts = [TOP.format(count=len(OUTPUTS))]
    for file, computed in checks.items():
        parts.append(HEADER.format(title=TITLES[file], file=file))
        rows = defaultdict(list)
        for name, value, symbol, function in computed:
            allowed = "exact"
            if value.dtype.is_floating_point and any(tolerance(file, name)):
                atol, rtol = tolerance(file, name)
                allowed = figure(atol, 0)
                if rtol:
                    allowed += f", relative {figure(rtol, 0)}"
            rows[symbol, where(function), allowed].append((name, value))
        for (symbol, here, allowed), group in rows.items():
            differences = [difference(file, name, value) for name, value in group]
            largest = figure(max(differences), 1)
            names = short([name for name, _ in group])
            cells = f"| `{symbol}` | {here} | {largest} | {allowed} | {names} |\n"
            parts.append(cells)
    return "".join([*parts, TOKENIZER, *tokenizer_rows(), NOTES])


TOKENIZER = """
## The tokenizer, over a small SentencePiece model

`tokenizer.json`

| original | here | seen | allowed | cases compared |
|---|---|---|---|---|
"""
TITLES = {
    "components_fp32": "The parts, in float32",
    "components_fp16": "The parts, in float16",
    "ids": "Masks, positions and labels, from ids",
    "model_fp32": "The whole model, in float32",
    "model_fp16": "The whole model, in float16",
    "prefix": "P-tuning v2, without and with projection",
    "generation": "Generation, and what grows with it",
    "quantization": "Weights in 8 and 4 bits",
}


def where(function):
    """A link to where the package's page says what it does."""
    module, name = function.__module__, function.__qualname__
    return f"{{py:obj}}`{name} <{module}.{name}>`"


def figure(number, digits):
    """Write 0.00005 as 5e−5; a line does not break at a minus, but at a hyphen."""
    written = f"{number:.{digits}e}" if number else "0"
    return written.replace("e-0", "e-").replace("-", MINUS)


def difference(file, name, value):
    return float((value.detach().double() - golden(file)[name].double()).abs().max())


def short(names):
    """Names with the same end are one: `*/logits` (3)."""
    ends = defaultdict(list)
    for name in names:
        ends[name.rpartition("/")[2]].append(name)
    return ", ".join(
        f"`{group[0]}`" if len(group) == 1 else f"`*/{end}` ({len(group)})"
        for end, group in ends.items()
    )
