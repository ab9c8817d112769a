"""The functional model: the same scores, whatever is in the unused cache."""

import copy

import pytest
import torch
from torch import nn

from annotated_src.attention import attend_fused
from annotated_src.checkpoint import lay_by_columns, load_model
from annotated_src.edge_model import (
    EdgeModel,
    export_programs,
    make_entries,
    write_tokens,
)
from annotated_src.fast import speed_up
from annotated_src.models import gemma, llama, phi
from annotated_src.quantize import quantize_
from annotated_src.small_chatglm import SMALL_CHATGLM

KINDS = {
    "llama": (llama, llama.Llama),
    "gemma": (gemma, gemma.Gemma),
    "phi": (phi, phi.Phi),
}
PREFILL, CACHE = 12, 40


@pytest.fixture(params=KINDS)
def model(request):
    module, kind = KINDS[request.param]
    return large(kind(module.tiny_config()))


def large(model):
    """Draw weights large enough that mistakes show."""
    for name, weight in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            nn.init.uniform_(weight, 0.5, 1.5)
            weight.data -= int(isinstance(model, gemma.Gemma))  # gain 1 + weight
        else:
            nn.init.normal_(weight, std=0.25)
    return model.eval().requires_grad_(False)


def junk(entries, number):
    kv = entries["decode"][1]["kv"]
    return {name: torch.full_like(part, number) for name, part in kv.items()}


def run(entries, tokens, prompt_len, kv):
    """Prefill, padded with token 1, then the rest one by one: (T - prompt_len, V)."""
    padded = torch.ones(1, PREFILL, dtype=torch.int32)
    padded[0, :prompt_len] = tokens[:prompt_len]
    positions = torch.arange(CACHE, dtype=torch.int32)
    out = entries["prefill"](tokens=padded, input_pos=positions[:PREFILL], kv=kv)
    assert set(out) == {"kv"}
    scores = []
    for i in range(prompt_len, len(tokens)):
        token, at = tokens[None, i : i + 1].int(), positions[i : i + 1]
        out = entries["decode"](tokens=token, input_pos=at, kv=out["kv"])
        scores.append(out["logits"][0, 0])
    return torch.stack(scores)


def modules(entries):
    return {name: entry for name, (entry, _) in entries.items()}


@pytest.mark.parametrize("prompt_len", [1, 7, PREFILL])
@pytest.mark.parametrize("number", [0.0, 1e4, -1e4])
def test_steps_equal_the_model_whatever_the_unused_cache_holds(
    model, prompt_len, number
):
    tokens = torch.randint(0, 96, (CACHE,))
    entries = make_entries(model, PREFILL, CACHE)
    ours = run(modules(entries), tokens, prompt_len, junk(entries, number))
    torch.testing.assert_close(
        ours, model(tokens[None])[0, prompt_len:], atol=1e-5, rtol=1e-5
    )


def test_junk_changes_nothing_at_all_unless_it_is_not_finite(model):
    tokens = torch.randint(0, 96, (20,))
    entries = make_entries(model, PREFILL, CACHE)
    clean = run(modules(entries), tokens, 7, junk(entries, 0.0))
    assert torch.equal(clean, run(modules(entries), tokens, 7, junk(entries, 1e4)))
    # 0 times infinity is NaN: a cache must begin with numbers.
    for number in (torch.inf, torch.nan):
        spoiled = run(modules(entries), tokens, 7, junk(entries, number))
        assert spoiled.isnan().all()


def test_it_equals_the_model_with_its_own_cache(model):
    tokens = torch.randint(0, 96, (20,))
    entries = make_entries(model, PREFILL, CACHE)
    ours = run(modules(entries), tokens, 7, junk(entries, 0.0))
    cache = model.new_cache(1, CACHE)
    model(tokens[None, :7], cache)
    theirs = [model(tokens[None, i : i + 1], cache)[0, 0] for i in range(7, 20)]
    torch.testing.assert_close(ours, torch.stack(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_torch_export_gives_the_same_and_no_step_depends_on_data(model):
    tokens = torch.randint(0, 96, (20,))
    entries = make_entries(model, PREFILL, CACHE)
    programs = export_programs(model, PREFILL, CACHE)
    graphs = {name: program.module() for name, program in programs.items()}
    zeros = junk(entries, 0.0)
    traced = run(graphs, tokens, 7, zeros)
    assert torch.equal(traced, run(modules(entries), tokens, 7, zeros))
    for program in programs.values():
        assert not program.range_constraints  # no size is a symbol
        called = [str(node.target) for node in program.graph.nodes]
        assert not [name for name in called if "scalar" in name or "sym_" in name]
        writes = called.count("annotated_src.write_tokens.default")
        assert writes == 2 * model.config.num_layers


def test_the_model_given_stays_as_it_is_and_shares_its_weights(model):
    before = copy.deepcopy(model.state_dict())
    model.train().requires_grad_(True)
    edge = EdgeModel(model, CACHE)
    assert model.training
    assert not edge.training
    assert not any(part.training for part in edge.modules())
    mine = {weight.data_ptr() for weight in model.parameters()}
    assert {weight.data_ptr() for weight in edge.parameters()} == mine
    assert all(weight.requires_grad for weight in model.parameters())
    assert all(block.attention.attend is attend_fused for block in model.blocks)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_both_entries_share_weights_that_lay_by_columns():
    model = large(llama.Llama(llama.tiny_config()))
    lay_by_columns(model)
    entries = modules(make_entries(model, PREFILL, CACHE))
    pointers = [
        [weight.data_ptr() for weight in entry.parameters()]
        for entry in entries.values()
    ]
    assert pointers[0] == pointers[1]
    assert all(weight.is_contiguous() for weight in entries["decode"].parameters())
    assert not model.blocks[0].ffn.up_proj.weight.is_contiguous()


def test_a_model_without_exporter_is_refused():
    fast = speed_up(large(llama.Llama(llama.tiny_config())))
    for other in (load_model(SMALL_CHATGLM), fast, nn.Linear(2, 2)):
        name = type(other).__name__
        with pytest.raises(ValueError, match=f"no exporter for {name}: .* Llama, Gemm"):
            EdgeModel(other, 8)


def test_only_float32_on_the_cpu(model):
    with pytest.raises(
        ValueError, match=r"embedding\.weight is torch\.bfloat16 on cpu"
    ):
        EdgeModel(copy.deepcopy(model).bfloat16(), 8)
    with pytest.raises(ValueError, match=r"embedding\.weight is .* on meta"):
        EdgeModel(copy.deepcopy(model).to("meta"), 8)


@pytest.mark.parametrize("library", [False, True])
def test_a_quantized_model_is_refused(model, library):
    """Its integers would be float32 again in the file, and nothing would say so."""
    if library:
        import torchao.quantization as ao

        ao.quantize_(model, ao.Int8WeightOnlyConfig(set_inductor_config=False))
    else:
        quantize_(model, "int8-weight-only")
    with pytest.raises(ValueError, match="an export is made of float32 on the CPU"):
        EdgeModel(model, 8)


@pytest.mark.parametrize("length", [0, -1, 129])
def test_a_cache_has_room_and_the_model_knows_its_positions(model, length):
    with pytest.raises(ValueError, match=f"cache must be 1 to 128 .* got {length}"):
        EdgeModel(model, length)


@pytest.mark.parametrize("prefill", [0, -3, 41])
def test_prefill_fits_the_cache(model, prefill):
    with pytest.raises(ValueError, match=f"prefill must be 1 to 40 .* got {prefill}"):
        make_entries(model, prefill, CACHE)


@pytest.mark.parametrize(("start", "tokens"), [(-1, 1), (5, 1), (3, 3), (0, 6)])
def test_tokens_that_do_not_fit_are_not_written(start, tokens):
    stored = torch.zeros(1, 2, 5, 3)
    with pytest.raises(ValueError, match=f"tokens {start} to {start + tokens - 1} in"):
        write_tokens(stored, torch.ones(1, 2, tokens, 3), torch.tensor(start))
    assert not stored.any()


def test_write_tokens_makes_a_new_cache():
    stored, new = torch.zeros(1, 2, 5, 3), torch.randn(1, 2, 2, 3)
    for start in range(4):
        written = write_tokens(stored, new, torch.tensor(start))
        positions = torch.arange(start, start + 2)
        assert torch.equal(written, stored.index_copy(2, positions, new))
        assert not stored.any()
    torch.library.opcheck(write_tokens, (stored, new, torch.tensor(1)))
