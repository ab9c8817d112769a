# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# (ch-errata)=
# # Errata
#
# :::{admonition} In this chapter
# :class: at-a-glance
# **35 minutes · moderate.** Afterwards you know where the texts about these two models,
# and the comments in the code itself, lead astray; you can show it with a few lines; and
# you can choose test inputs that catch a misreading.
# :::

# %% tags=["remove-input"]
from annotated_src.figures.model_map import ChatGLMMap

ChatGLMMap("everything")

# %% [markdown]
# :::{admonition} Predict before you run
# :class: predict
# Fifteen readers port ChatGLM-6B. Each misreads *one* thing, a different one each, and has
# all else right. Each compares logits with the original's, on a text of 12 tokens, to
# 0.0001. How many of the fifteen ports pass?
# :::

# %%
import inspect
import json
import math

import torch
from transformers.models.llama import modeling_llama

from annotated_src.attention import Attention
from annotated_src.attention_by_layer import restore_scores, scores_by_layer
from annotated_src.checkpoint import names_by_layer
from annotated_src.figures import errata as figures
from annotated_src.golden import GOLDEN, golden, golden_config, golden_model
from annotated_src.loss import next_token_loss
from annotated_src.masks import causal_mask, visible_to_masked
from annotated_src.models.chatglm import ALPHA, HF_NAMES, ChatGLM, ChatGLMConfig
from annotated_src.positions import BlankIds, context_lengths
from annotated_src.rotary import (
    apply_rotary,
    rope_frequencies,
    rope_tables,
    rotate_half,
)
from annotated_src.rotary_2d import half_frequencies
from annotated_src.sampling import guard_invalid
from annotated_src.show import confirm, show

torch.manual_seed(0)
F64 = torch.float64

# %% [markdown]
# ## The list
#
# Two texts set this book going: a Chinese reading of ChatGLM-6B's source, *the blog*
# below, and an annotated Llama, *the Llama chapter*. Most of what they say is right, and
# whoever writes down what code does deserves thanks. The rest is here, together with
# what ChatGLM-6B's own source says of itself and does not do. The original is
# `modeling_chatglm.py` of April 2023; where an earlier revision is meant, it says so.
# What the texts leave *out*, formulas above all, is no error, and in the other chapters.
#
# Each entry has a number. Its witness is a cell below that prints the number: it shows
# what is true, and stops the notebook if it is not.
#
# ### B: the blog
#
# | | Where | It says | It is |
# |---|---|---|---|
# | B1 | sections 4, 8 | `transpose(01)`, `permute(2013)`, `zeros(11` | commas lost in a copy; one of them runs |
# | B2 | 6, 8 | a block is given `empty_init` | a block of an earlier revision, which does not take it |
# | B3 | 3.2 | `emb` is `[seq_len, 2 * dim]` | `dim` wide: half as many frequencies, twice |
# | B4 | 4.2 | to control the scale of scores, they are divided by the root of the hidden size, and by the layer's number | by the root of the head's width; the number is multiplied back |
# | B5 | 7 | `context_lengths` are the lengths without padding | padding counts |
# | B6 | 8 | the prompt part has no back-propagation | it is the only part that is trained |
# | B7 | 8 | an element of the cache has all layers in its shape | an element is one layer: keys and values |
#
# ### C: ChatGLM-6B's own source
#
# | | Where | It says | It does |
# |---|---|---|---|
# | C1 | `GLU`, `GEGLU` | a gated unit | no gate; `GEGLU` is never used |
# | C2 | `GLMBlock` | $\alpha$ from `num_layers` | $\sqrt{56}$ at every depth |
# | C3 | `attention_fn` | fills with −10000 | with −10000 times the layer's number |
# | C4 | `RotaryEmbedding` | `inv_freq`, a buffer of the model | rounded to float16 for good; never loaded |
# | C5 | model, tokenizer | where the mask token is | they disagree when there are two |
# | C6 | `get_masks` | which tokens are hidden | padding is not, and counts as positions |
# | C7 | single step, one row | the position of the next token | stands still for `[gMASK]`, where the prompt's counts on |
# | C8 | `stream_generate` | yields tokens as they come | never the last one |
# | C9 | `InvalidScoreLogitsProcessor` | repairs broken scores | replaces the sound rows too |
# | C10 | P-tuning | freezes the model | not an untied head |
# | C11 | early revisions | masks and positions of a batch | those of its first row; and `[gMASK]`'s place counts on |
#
# ### L: the Llama chapter
#
# | | Where | It says | It is |
# |---|---|---|---|
# | L1 | 10.2, 10.6, 10.7 | calls of the rotary class and of the model | a TypeError each: both have lost parameters |
# | L2 | 10.3, 10.5 | a cache, and attention weights on request | neither leaves the layer |
# | L3 | 10.6 | a mask of T + 1 columns | one too many, always hidden, then cut off |
# | L4 | 10.2, 10.3 | frequencies from 0 to 1/10000; `rope_theta` is read | from 1 down to a little above 1/10000; `rope_theta` is never used |
# | L5 | 10.2 | the order of frequencies differs from the paper's | so does the pairing of features |
#
# What does it cost to believe one? We take the small model whose outputs the original
# computed, and run it with a belief in place of the truth. Here is ChatGLM's whole forward
# pass once more, with six parts that one can be mistaken about:

# %%
show(figures.Belief, figures.logits_if)

# %%
model, META = golden_model(), json.loads((GOLDEN / "meta.json").read_text("utf-8"))
fp32, components, ids = golden("model_fp32"), golden("components_fp32"), golden("ids")
truth = [figures.gap(figures.Belief(), name) for name in figures.CASES.values()]
confirm("the default beliefs give the original's logits, 7 inputs", max(truth) < 1e-4)
short = figures.case("gmask_train")
ours = figures.logits_if(figures.Belief(), short, model)
confirm("and are ChatGLM.forward", (ours - model(short.tokens)).abs().max() < 1e-4)


def cost(belief, name="gmask_train"):
    """How far off the logits are."""
    return figures.gap(figures.BELIEFS[belief], name)


def outcome(call, *args, **kwargs):
    """What Python says to a call: the kind of error, or that it runs."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        return type(error).__name__
    return "runs"


def takes(parameters):
    """A signature that takes these names and no others."""
    kind = inspect.Parameter.KEYWORD_ONLY
    names = parameters.split()
    return inspect.Signature([inspect.Parameter(n, kind, default=None) for n in names])


# %% [markdown]
# ## The blog
#
# **B1. Lost commas.** On its way to a reader the code lost the commas between digits, and
# the colon of many a `def` moved to a line of its own. Most of it fails at once. The one
# to fear is the last: it runs.

# %%
x3, x4, x5 = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, 5), torch.zeros(1, 2, 6, 4, 5)
fates = {}
for fragment, tensor in (
    ("x.transpose(01)", x3),
    ("x.transpose(12)", x3),
    ("x.permute(2013)", x4),
    ("x.permute([21034])", x5),
    ("torch.zeros(11)", x3),
):
    fates[fragment] = outcome(
        lambda f, x: eval(f, {"x": x, "torch": torch}), fragment, tensor
    )
    print(f"{fragment:20} {fates[fragment]}")
confirm(
    "B1: 01 is no number in Python, 12 is one dimension of the two that are needed",
    list(fates.values())
    == ["SyntaxError", "TypeError", "RuntimeError", "RuntimeError", "runs"],
)
parted = outcome(compile, "def forward(x)\n: return x", "blog", "exec")
confirm("B1: nor may a colon leave its line", parted == "SyntaxError")
stray = torch.zeros(11).bool()
confirm("B1: zeros(11) is a row of eleven, not one cell", stray.shape != (1, 1))
confirm("    but it hides nothing, and then the fill is skipped", not stray.any())

# %% [markdown]
# **B2. Two revisions.** The blog's `ChatGLMModel` is younger than its `GLMBlock`. It
# passes on an argument that the block does not know, so the code cannot run as printed.
# Below are the two lists of names; they also show what the call *lacks*, which is C2.

# %%
block_takes = takes(
    "hidden_size num_attention_heads layernorm_epsilon layer_id inner_hidden_size "
    "hidden_size_per_attention_head layernorm use_bias params_dtype num_layers "
    "position_encoding_2d"
)
model_passes = takes(
    "hidden_size num_attention_heads layernorm_epsilon layer_id inner_hidden_size "
    "hidden_size_per_attention_head layernorm use_bias params_dtype "
    "position_encoding_2d empty_init"
).parameters
confirm(
    "B2: Python refuses the call",
    outcome(block_takes.bind, **dict.fromkeys(model_passes)) == "TypeError",
)
extra = set(model_passes) - set(block_takes.parameters)
confirm("    because of empty_init alone", extra == {"empty_init"})
confirm("C2: num_layers is never passed", "num_layers" not in model_passes)

# %% [markdown]
# **B3. The width of a table.** `RotaryEmbedding` is built for a width of `dim`, and
# `arange(0, dim, 2)` makes `dim / 2` frequencies. Writing them twice gives `dim`, not `2 *
# dim`. (Another comment there tells how frequencies are made, in float32 for bfloat16, over
# a line that numbers positions. The cast comes later, and too late: {ref}`ch-rope-2d`.)

# %%
dim = 8
table = components["rotary/cos"][:, 0]  # the original's, for dim = 8
confirm("B3: dim / 2 frequencies", half_frequencies(dim).shape == (dim // 2,))
confirm("B3: a table as wide as dim", table.shape == (64, dim))
confirm("    the same half twice", torch.equal(*table.chunk(2, dim=-1)))

# %% [markdown]
# **B4. The divisor.** The variable is called `hidden_size`, but the function has unpacked
# it from the shape of the keys: it is the width $d$ of *one head*. And dividing by the
# layer's number $\ell$ does not control the scale of what the softmax sees, because the
# scores are multiplied by it again. What reaches the softmax, visible or hidden, is
#
# $$
# \ell\cdot\operatorname{fill}\Bigl(\frac{q\cdot k}{\sqrt{d}\,\ell}\Bigr) =
# \begin{cases} q\cdot k\,/\sqrt{d} & \text{visible} \\ -10^4\,\ell & \text{hidden} \end{cases}
# $$ (eq-errata-scores)
#
# The detour keeps float16 in range ({ref}`ch-half-precision`); the scale stays.

# %%
# Check eq-errata-scores.
q, k = torch.randn(2, 1, 4, 6, 16, dtype=F64)
visible = causal_mask(6)
for layer in (1, 2, 28):
    seen = restore_scores(scores_by_layer(q, k, layer), visible, layer)
    plain = (q @ k.mT) / math.sqrt(16)
    expected = plain.masked_fill(~visible, -10_000.0 * layer)
    confirm(
        f"B4, C3: layer {layer:2}", torch.allclose(seen.double(), expected, atol=1e-5)
    )
heads_width = components["attention_fn/k"].shape[-1]
raw = components["attention_fn/layer0_nomask/raw_scores"]  # (B N, T, S)
their_q, their_k = (
    components[f"attention_fn/{n}"].flatten(1, 2).transpose(0, 1) for n in "qk"
)
for width, holds in ((heads_width, True), (META["config"]["hidden_size"], False)):
    by_width = their_q @ their_k.mT / math.sqrt(width)
    confirm(
        f"B4: the original divides by the root of {width}: {holds}",
        torch.allclose(by_width, raw, atol=5e-5) == holds,
    )
confirm("B4: to believe the first costs over 3", cost("B4 √ of the hidden size") > 3)
confirm("B4: to believe the second, too", cost("B4 layer not undone") > 3)

# %% [markdown]
# **B5. What a context length counts.** It is the index of the first `<sop>` in the row,
# padding and all. In this batch rows 1 and 2 are padded, so theirs are too long.

# %%
padded = ids["batch_leftpad/input_ids"]
sop, pads = model.config.blank_ids.sop, (padded == figures.PAD).sum(dim=-1)
counted = context_lengths(padded, sop)
print("pads           ", *pads.tolist())
print("context lengths", *counted.tolist())
print("without pads   ", *(counted - pads).tolist())
blank_steps = ids["batch_leftpad/get_position_ids_2d"][:, 1]  # the original's
confirm(
    "B5: the original's steps are 0 so far, and no further",
    torch.equal((blank_steps == 0).sum(-1), counted),
)
belief = cost("B5 pads do not count", "batch_leftpad_model")
confirm("B5: to believe it costs more than 5", belief > 5)

# %% [markdown]
# **B6. What is trained.** The blog has it the wrong way round. P-tuning freezes the model
# and trains the prefix ({ref}`ch-prefix-tuning`): back-propagation runs through all of the
# model in order to get there. We load the original's prefix and compare gradients.

# %%
tuned = ChatGLM(ChatGLMConfig.from_hf(golden_config() | {"pre_seq_len": 5})).eval()
stem, names = "proj_False/weights/", names_by_layer(tuned, HF_NAMES)
prefix = {n.removeprefix(stem): w for n, w in golden("prefix").items() if stem in n}
stored = golden("weights") | prefix
tuned.load_state_dict({names[n]: w.float() for n, w in stored.items() if n in names})
labels = ids["gmask_train/labels"]
next_token_loss(tuned(short.tokens), labels).backward()
moved = {n for n, p in tuned.named_parameters() if p.grad is not None}
confirm(
    "B6: the prefix is given a gradient, and only it",
    moved == {"prefix_encoder.embedding.weight"},
)
start = "proj_False/grad/transformer."
grad = tuned.prefix_encoder.embedding.weight.grad
theirs = golden("prefix")[f"{start}prefix_encoder.embedding.weight"]
confirm(
    "B6: the original's gradient", torch.allclose(grad, theirs, rtol=1e-3, atol=1e-5)
)
confirm("    no number of the prefix goes without", (theirs != 0).all())

# %% [markdown]
# **B7. The cache.** Its elements are layers. Each is a pair, keys and values, and has no
# axis for layers.

# %%
past = [n for n in fp32 if n.startswith("gmask_train/past.")]
print(
    *(f"{n.removeprefix('gmask_train/')} {tuple(fp32[n].shape)}" for n in past),
    sep="\n",
)
confirm("B7: a pair for each layer", len(past) == 2 * META["config"]["num_layers"])
confirm(
    "    (seq, batch, heads, width)", all(fp32[n].shape == (12, 1, 4, 16) for n in past)
)

# %% [markdown]
# ## ChatGLM-6B's own source
#
# **C1. A GLU without a gate.** A gated linear unit multiplies two projections
# ({ref}`ch-activations`). This one has a single projection in, a GELU, and one out
# ({ref}`ch-block`). `GEGLU` would gate, with the *exact* GELU; nobody calls it. The
# checkpoint has no matrix for a gate, as a count of the 6B model shows.

# %%
six_billion = ChatGLMConfig(
    vocab_size=130528,
    num_layers=28,
    embed_dim=4096,
    num_heads=32,
    ffn_dim=16384,
    max_seq_len=2048,
    norm_eps=1e-5,
    blank_ids=BlankIds(sop=130004, gmask=130001, mask=130000),
)
with torch.device("meta"):  # shapes only
    count = sum(p.numel() for p in ChatGLM(six_billion).parameters())
gate = 28 * (4096 * 16384 + 16384)
print(f"parameters {count:,}, with gates {count + gate:,}")
confirm(
    "C1: 6.17 billion without a gate; with one it would be an 8B",
    round(count / 1e9, 2) == 6.17 and round((count + gate) / 1e9, 2) == 8.05,
)
x = components["block/input_layernorm"].transpose(0, 1)
wanted = components["block/mlp_of_layernorm"].transpose(0, 1)
ungated = model.blocks[1].ffn(x)
confirm(
    "C1: without a gate, the original's", torch.allclose(ungated, wanted, atol=5e-5)
)
confirm("C1: to gate costs more than 5", cost("C1 a gate in GLU") > 5)
erf = cost("C1 GELU by erf")
confirm("C1: the exact GELU costs between 0.001 and 0.01", 1e-3 < erf < 1e-2)

# %% [markdown]
# **C2. A factor that does not know the depth.** $\alpha = \sqrt{2L}$, with $L$ from
# `num_layers`, whose default is 28 and which nobody passes (B2). The small model has 3
# layers; the original scales its residuals by $\sqrt{56}$ all the same. Whoever shrinks
# a model for a test meets this first.

# %%
block, at = model.blocks[1], components
attended = at["block/input_layernorm"] * ALPHA + at["block/attention_out"]
normed = block.ffn_norm(attended)
ours = normed * math.sqrt(56) + block.ffn(normed)
confirm(
    "C2: the root of 56 in a model of 3 layers",
    torch.allclose(ours, at["block/output"], atol=5e-4),
)
confirm("C2: to believe the depth costs more than 10", cost("C2 α = √(2 × depth)") > 10)

# %% [markdown]
# **C3. The fill.** By {eq}`eq-errata-scores` hidden scores are −280000 in layer 28. The
# factor changes nothing: beside a visible score of ordinary size, −10000 already gets a
# weight of exactly 0. *Finite* is what matters. A row of padding sees nothing, and comes
# out as an average; with −∞ it is NaN, and NaN spreads, even to rows that see none of it.

# %%
scores = torch.tensor([[2.0, -1.0, 0.5]])
hide = torch.tensor([[False, False, True]])
both = [scores.masked_fill(hide, fill).softmax(-1) for fill in (-1e4, -28e4)]
confirm("C3: the factor makes no difference", torch.equal(*both))
never = [cost("C3 fill not × layer", name) for name in figures.CASES.values()]
confirm("    on none of 7 inputs", max(never) < 1e-4)
theirs = components["attention_fn/layer27_mask/softmax_in"]
confirm("C3: the original's, in layer 28", theirs.min() == -280_000)
poisoned = figures.BELIEFS["C3 fill of −∞"]
given = figures.case("batch_leftpad_tokenizer")
broken = figures.logits_if(poisoned, given, model).isnan().any(dim=-1)  # (B, T)
for row, bad in zip(given.tokens.tolist(), broken.tolist(), strict=True):
    print("".join("pad " if t == figures.PAD else "  . " for t in row), end=" →  ")
    print("".join("NaN " if b else "  . " for b in bad))
spoilt = broken & (given.tokens != figures.PAD)
confirm(
    "C3: −∞ spoils tokens that are no padding",
    spoilt[1:, -1].all() and not broken[0].any(),
)

# %% [markdown]
# **C4. Frequencies rounded for good.** The constructor rounds them to float16; making the
# model float32 later does not bring the digits back, and `_load_from_state_dict` is
# empty, so that those in the checkpoint are never read ({ref}`ch-rope-2d`). A port that
# keeps the buffers in float16 while the rest is float32 rounds the angles as well.

# %%
place, frequencies = torch.arange(2048), half_frequencies(64)
exact = place[:, None] * 10_000.0 ** (-torch.arange(32, dtype=F64) / 32)
worst = {}
for dtype in (torch.float32, torch.float16):
    angles = place.to(dtype)[:, None] * frequencies.to(dtype)
    worst[dtype] = (angles.double() - exact)[2040].abs().max().item()
    print(f"position 2040, buffers in {dtype!s:14} off by {worst[dtype]:.2f} rad")
confirm("C4: 0.32 and 0.82", [round(w, 2) for w in worst.values()] == [0.32, 0.82])
confirm(
    "C4: float32 holds float16's digits",
    components["rotary/inv_freq"].dtype == torch.float32,
)
rounded = components["rotary/inv_freq"]
confirm("    and no more", torch.equal(rounded, half_frequencies(8).float()))
near, far = (cost("C4 exact frequencies", n) for n in ("gmask_train", "far_positions"))
print(f"exact frequencies: off by {near:.1g} near, {far:.1g} far")
confirm("C4: to be exact costs a hundred times more when far", far > 100 * near)

# %% [markdown]
# **C5. Which mask token?** With `[MASK]` and `[gMASK]` in one row, the model answers at
# `[gMASK]` and the tokenizer, when it pads, at `[MASK]`. Whoever makes the positions
# decides ({ref}`ch-blanks`).

# %%
by_model = ids["both_tokens/get_position_ids_2d"][0, 0]
by_tokenizer = ids["both_tokens/tokenizer_position_ids"][0, 0]
row = ids["both_tokens/input_ids"][0]
_, gmask_id, mask_id = model.config.blank_ids
confirm("C5: the model answers at [gMASK]", row[by_model[-1]] == gmask_id)
confirm("C5: the tokenizer at [MASK]", row[by_tokenizer[-1]] == mask_id)
confirm(
    "C5: to mix them up costs more than 4",
    cost("C5 MASK before gMASK", "both_tokens") > 4,
)

# %% [markdown]
# **C6. Padding that is read.** `get_masks` knows nothing of padding: everybody sees it,
# and positions count it. Only the tokenizer hides it. A padded row that comes with the
# tokenizer's mask and positions gives what it gives alone; the same ids by themselves do
# not.

# %%
masked = ids["batch_leftpad/get_masks"]  # True hides
confirm("C6: no pad is hidden", not masked[1, 0, :, : pads[1]].any())
confirm(
    "C6: the tokenizer hides all",
    ids["batch_leftpad/tokenizer_attention_mask"][1, 0, :, : pads[1]].all(),
)
alone = model(padded[1:2, pads[1] :])[0, -1]
for name, same in (("batch_leftpad_tokenizer", True), ("batch_leftpad_model", False)):
    last = fp32[f"{name}/logits"][1, -1]
    confirm(
        f"C6: {name}: as alone: {same}", torch.allclose(last, alone, atol=1e-4) == same
    )
confirm(
    "C6: to believe that pads are hidden",
    cost("C6 model hides pads", "batch_leftpad_model") > 5,
)

# %% [markdown]
# **C7. One row of positions, one token at a time.** Without 2D positions, an answer at
# `[gMASK]` counts on, if the text is read at once. But with a cache, and unless positions
# are given, `prepare_inputs_for_generation` puts every new token at the mask. So in this
# mode the original disagrees with itself. That we have from its source; what it costs, we
# measure. We decode both ways, and compare with what it made of the whole text.

# %%
one_row = golden_model(position_encoding_2d=False)
text, at_once = ids["gmask_train/input_ids"], fp32["pos1d/gmask_train/logits"]
prompt, mask_at = (
    int(context_lengths(text, sop)) + 1,
    int(ids["gmask_train/mask_positions"]),
)


def decode(position_of):
    cache = one_row.new_cache(1, 12)
    steps = [one_row(text[:, :prompt], cache)]
    for t in range(prompt, 12):
        at = torch.tensor([[[position_of(t)]]])  # (B, rows, T)
        steps.append(one_row(text[:, t : t + 1], cache, positions=at))
    return (torch.cat(steps, dim=1) - at_once).abs().amax(dim=-1)[0]


counts_on, stands_still = decode(lambda t: t), decode(lambda t: mask_at)
confirm("C7: counting on, all tokens agree", counts_on.max() < 1e-4)
confirm("C7: standing still, the prompt agrees", stands_still[:prompt].max() < 1e-4)
confirm(
    "    and every later token is off by more than 1", stands_still[prompt:].min() > 1
)

# %% [markdown]
# **C8. The last token of a stream.** The loop in `stream_generate` stops *before* it
# yields. If the last token is `<eop>`, nothing is lost. At the limit of length, a token
# of the answer is.

# %%
streams = golden("generation")
for name, whole in (("stream_gmask", "greedy_gmask"), ("stream_eos", "eos_stop")):
    sequence, prompt_len = (
        streams[f"{whole}/sequences"],
        streams[f"{whole}/input_ids"].shape[1],
    )
    last, yields = streams[f"{name}/last_yield"], streams[f"{name}/n_yields"].item()
    new = sequence.shape[1] - prompt_len
    print(f"{name}: {new} new tokens, {yields} yields, lost: {sequence[0, -1]}")
    confirm(
        "C8: all but one", torch.equal(last, sequence[:, :-1]) and yields == new - 1
    )
eop = META["config"]["eos_token_id"]
confirm(
    "C8: the second lost <eop>, the first did not",
    sequence[0, -1] == eop != streams["greedy_gmask/sequences"][0, -1],
)

# %% [markdown]
# **C9. One bad row, all rows.** A single NaN or infinity, and every row of the batch is
# sure of token 5.

# %%
scores, replaced = streams["processors/scores_nan"], streams["processors/invalid_score"]
confirm("C9: rows 0 and 2 were sound", scores[[0, 2]].isfinite().all())
confirm("C9: the original replaced them too", (replaced.argmax(dim=-1) == 5).all())
confirm("    ours does the same", torch.equal(guard_invalid(scores), replaced))

# %% [markdown]
# **C10. A head that escapes.** `ChatGLMModel` freezes its own parameters, and the head is
# outside of it. `from_pretrained` ties the head to the frozen embedding, which freezes it
# too. A head of its own would be trained. Ours freezes either.

# %%
confirm(
    "C10: trainable in the original, prefix aside",
    META["requires_grad_with_prefix"] == ["lm_head.weight"],
)
trainable = {n.split(".")[0] for n, p in tuned.named_parameters() if p.requires_grad}
confirm("C10: here, the prefix and nothing else", trainable == {"prefix_encoder"})

# %% [markdown]
# **C11. Early revisions**, in which `[MASK]` was id 150000, preferred `[MASK]`, and let the
# place of an answer at `[gMASK]` count on. The first of them took mask and positions from
# row 0 of a batch, for all rows. A later one meant to give each row its own places, but
# wrote them into one row that had been *expanded*: all rows are the same memory. The
# original of this book has mended it all. Copies of the old files are still about.

# %%
for belief, name in (
    ("C11 row 0 for all rows", "batch_mixed"),
    ("C11 place counts on", "gmask_train"),
):
    confirm(f"{belief}: costs more than 5", cost(belief, name) > 5)
places = torch.arange(6).expand(2, 6)
places[0, 4:] = 1  # row 0 answers at place 1
print("row 1 gets", places[1].tolist())
confirm("C11: what row 0 is told, row 1 hears", torch.equal(places[0], places[1]))
held = ids["gmask_train/get_position_ids_2d"][0, 0]
confirm("C11: today the place stands still", (held[prompt - 1 :] == mask_at).all())

# %% [markdown]
# ## The Llama chapter
#
# **L1. Simplified classes, calls as they were.** The chapter shortens the library's code, by
# its own account. Its rotary class has lost the parameter `config`, but is still given
# one. Its `LlamaModel` has lost half of what the head's `forward` hands it, eight
# arguments; and `position_ids`, which the rotary class indexes, is not among them. In the
# library as installed here, the class does take a `config`, and nothing else.

# %%
printed = takes("dim max_position_embeddings base device")
confirm("L1: as printed", outcome(printed.bind, config=None) == "TypeError")
installed = inspect.signature(modeling_llama.LlamaRotaryEmbedding)
confirm("L1: as installed", list(installed.parameters) == ["config"])
model_takes = takes(
    "input_ids attention_mask position_ids output_attentions cache_position"
)
passed = takes(
    "input_ids attention_mask inputs_embeds use_cache output_attentions "
    "output_hidden_states return_dict cache_position"
).parameters
confirm(
    "L1: the model's call, too",
    outcome(model_takes.bind, **dict.fromkeys(passed)) == "TypeError",
)
print("not taken:", *sorted(set(passed) - set(model_takes.parameters)))
print("not given:", *sorted(set(model_takes.parameters) - set(passed)))

# %% [markdown]
# **L2. Nothing is kept.** Attention returns `past_key_value` as it came. No key is added
# to it; the model never passes one in; and the layer drops what comes out, attention
# weights included. Fed a token at a time, such a model has no past. Its softmax is over
# one score, and the token's own value is all it gets ({ref}`ch-cache`).

# %%
source = inspect.getsource(modeling_llama.LlamaAttention.forward)
confirm("L2: the library updates its cache", "past_key_values.update(" in source)
attention = Attention(32, num_heads=4, num_kv_heads=2, head_dim=8, bias=False)
x = torch.randn(1, 5, 32)
cos, sin = rope_tables(torch.arange(5)[None], rope_frequencies(8, 10_000.0), x.dtype)
with torch.no_grad():
    whole = attention(x, lambda h: apply_rotary(h, cos, sin), causal_mask(5))
    last = attention(
        x[:, 4:],
        lambda h: apply_rotary(h, cos[..., 4:, :], sin[..., 4:, :]),
        causal_mask(1),
    )
    own = attention.out_proj(
        attention.v_proj(x[:, 4:])
        .unflatten(-1, (2, 8))
        .repeat_interleave(2, dim=2)
        .flatten(2)
    )
confirm("L2: alone, a token gets its own value", torch.allclose(last, own, atol=1e-6))
confirm(
    "    which is not what it gets in its text",
    not torch.allclose(last, whole[:, 4:], atol=1e-2),
)

# %% [markdown]
# **L3. One column too many.** `target_length` is one more than there are keys. The last
# column belongs to a token after the end, is hidden from all, and `attention_mask[:, :,
# :, : keys]` cuts it off. So it is harmless. Without the cut, shapes would not fit.

# %%
T = 6
wide = torch.arange(T + 1) <= torch.arange(T)[:, None]  # True is visible
confirm("L3: hidden from every token", not wide[:, T].any())
confirm("L3: cut to T, the causal mask", torch.equal(wide[:, :T], causal_mask(T)[0, 0]))
confirm(
    "L3: uncut, it does not fit",
    outcome(torch.add, torch.zeros(T, T), wide) == "RuntimeError",
)

# %% [markdown]
# **L4, L5. Frequencies.** They begin with $10000^0 = 1$, not with 0: a pair that does not
# turn would tell no position. They end above 1/10000, since the last exponent is
# $(d - 2)/d$. The attention layer reads `rope_theta`, which never reaches the rotary class
# with its `base=10000`; Llama 3's is 500000.
#
# The chapter's comment quotes the paper's order of cosines rightly. That the order of
# frequencies differs is half the story ({ref}`ch-rope`). In the paper neighbours form a
# pair, in this code features half a head apart. Take the order from one and the pairs
# from the other, and it is no rotation.

# %%
theta = 10_000.0 ** (-torch.arange(64, dtype=F64) / 64)
confirm(
    "L4: the first is 1, the last above 1/10000",
    theta[0] == 1 and 1e-4 < theta[-1] < 1.2e-4,
)
pair_32 = {base: 1000 * base ** (-32 / 64) for base in (10_000, 500_000)}
print(
    "L4: pair 32 of 64, position 1000, in radians:",
    {b: round(a, 2) for b, a in pair_32.items()},
)
u = torch.randn(1, 1, 5, 8, dtype=F64)
cos, sin = rope_tables(torch.arange(5)[None], rope_frequencies(8, 10_000.0), F64)
orders = {
    "cosines and pairs of the code": [torch.cat((t, t), dim=-1) for t in (cos, sin)],
    "cosines of the paper, pairs of the code": [
        t.repeat_interleave(2, dim=-1) for t in (cos, sin)
    ],
}
kept = {}
for name, (c, s) in orders.items():
    turned = u * c + rotate_half(u) * s
    kept[name] = torch.allclose(turned.norm(dim=-1), u.norm(dim=-1))
    print(f"{name}: lengths kept: {kept[name]}")
confirm("L5: order and pairing go together", list(kept.values()) == [True, False])
confirm("L5: to mix them costs more than 5", cost("L5 paper's cosines") > 5)

# %% [markdown]
# ## False alarms
#
# Some lines look wrong and are right. It would be unfair to leave them out.
#
# :::{admonition} Document and code
# :class: paper-code
# **`hidden_states[:, -num_logits_to_keep:, :]` with 0**, in the Llama chapter. Minus zero
# is zero, and the slice keeps every token, as its docstring says.
#
# **"A different permutation"**, in the original's rotary embedding. A comment there says
# that the code differs from the paper by a permutation and gets the same result. It
# does: {eq}`eq-rope-permute`.
#
# **`if not (attention_mask == 0).all()`**, in the original. Zero means *visible* there.
# The fill is skipped when nothing is to be hidden, so that B1's stray row is never used.
#
# **`(attention_mask < 0.5).bool()`** flips the polarity, on purpose: ones below the
# diagonal become False, and True hides. This book's masks are the other way round.
# :::

# %%
states = torch.randn(1, 4, 8)
confirm("minus zero keeps all", torch.equal(states[:, -0:, :], states))
lower = torch.ones(5, 5).tril()
confirm("the flip", torch.equal(lower < 0.5, visible_to_masked(causal_mask(5))[0, 0]))
scores = torch.randn(2, 3)
confirm(
    "a fill with nothing to hide",
    torch.equal(scores.masked_fill(torch.zeros(1, 1).bool(), -1e4), scores),
)

# %% [markdown]
# :::{admonition} Break it
# :class: break-it
# Now for the prediction. Fifteen ports, each with one of these beliefs; seven inputs for
# which the original's logits are known. White means that the comparison passes.
# :::

# %% mystnb={"image": {"alt": "A table of 15 misreadings by 7 test inputs, each cell the largest error of a logit. The first five rows, such as alpha from the depth or a gate in GLU, are dark in all columns, errors from 3 to 15. The next three, GELU by erf, exact frequencies and angles in float16, are pale, errors from 0.0004 to 0.004, but 0.1 and 0.2 for the two of angles at far positions. Below, most cells are white: place counts on shows in four columns, MASK before gMASK in two, row 0 for all rows in two, pads do not count and model hides pads only in the column of pads read from ids, fill of minus infinity only as NaN in the column of pads with a given mask. The last row, fill not times layer, is all white."}, "figure": {"name": "fig-errata-costs", "caption": "The largest error of a logit, for each misreading and each input; logits themselves reach 14. A dot: within 0.0001 of the original, so that the test passes."}} tags=["hide-input"]
figures.draw_costs(figures.costs_data())

# %%
costs = figures.costs_data()
told = {name: costs.told[:, column] for column, name in enumerate(costs.cases)}
print("of 15 misreadings, each input tells:")
for name, tells in told.items():
    print(f"    {name:18}{tells.sum().item():3}")
passes = [
    b for b, tells in zip(costs.beliefs, told["[gMASK]"], strict=True) if not tells
]
confirm("the 12-token prompt lets six pass", len(passes) == 6)
silent = [b for b, row in zip(costs.beliefs, costs.told, strict=True) if not row.any()]
confirm("one of them passes everywhere", silent == ["C3 fill not × layer"])
largest = max(
    figures.case(name).logits.abs().max().item() for name in figures.CASES.values()
)
print(f"largest logit: {largest:.0f}")

# %% [markdown]
# Six pass. In {numref}`fig-errata-costs`, the upper rows are what anybody's first test
# finds. The pale band needs a strict one: to 0.001, exact frequencies pass, except at far
# positions. The scattered cells at the bottom need *that* input: a batch whose rows
# differ, both mask tokens, padding without a mask, padding with one. The last row is a
# misreading without consequence: −10000 or −280000, none of these logits can tell.
#
# ## Exercises
#
# Write your function in a cell of your own and give it to `check`. A question takes its
# name and a letter: `check("where_nan_spreads", "a")`.

# %%
from annotated_src.exercises import check  # noqa: F401 - for your cells
from annotated_src.exercises.errata import chapter as exercises

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("restore_commas")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("restore_commas")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
restore_commas = exercises["restore_commas"].solution
for fragment, tensor, shape in (
    ("x.transpose(01)", x3, (3, 2, 4)),
    ("x.transpose(12)", x3, (2, 4, 3)),
    ("x.permute(2013)", x4, (4, 2, 3, 5)),
    ("x.permute([21034])", x5, (6, 2, 1, 4, 5)),
    ("torch.zeros(11)", x3, (1, 1)),
):
    mended = restore_commas(fragment)
    found = eval(mended, {"x": tensor, "torch": torch}).shape
    confirm(mended, found == shape)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("where_nan_spreads")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("where_nan_spreads")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
confirm("0 × NaN", (torch.tensor(0.0) * torch.nan).isnan())
real = given.tokens != figures.PAD
after = {}
for depth in (1, 2, 3):
    shallow = ChatGLM(ChatGLMConfig.from_hf(golden_config() | {"num_layers": depth}))
    fitting = {n: w for n, w in model.state_dict().items() if n in shallow.state_dict()}
    shallow.load_state_dict(fitting)
    with torch.no_grad():
        after[depth] = figures.logits_if(poisoned, given, shallow).isnan().any(-1)
confirm("layer 1: padding only", torch.equal(after[1], ~real))
confirm("layer 2: real tokens", (after[2] & real).any())
itself = torch.eye(9, dtype=torch.bool)
# As padded_causal_mask does for Llama:
cured = figures.logits_if(poisoned, given._replace(mask=given.mask | itself), model)
gap = (cured - given.logits)[real].abs().max()
confirm("padding that sees itself: real tokens as the original's", gap < 1e-4)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("what_padding_changes")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("what_padding_changes")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
her_places = ids["batch_leftpad/tokenizer_position_ids"]
hers = model(padded, positions=her_places)[1, -1]
confirm("with her positions: off by more than 1", (hers - alone).abs().max() > 1)
hides = ~ids["batch_leftpad/tokenizer_attention_mask"]
by_mask = model(padded, mask=hides)[1, -1]
confirm("the mask alone is a cure", (by_mask - alone).abs().max() < 1e-4)
by_both = model(padded, positions=her_places, mask=hides)[1, -1]
confirm("with her positions too", (by_both - alone).abs().max() < 1e-4)
moved_by = ids["batch_leftpad/get_position_ids_2d"][1] - her_places[1]
confirm("her places are the others less 4", (moved_by[0, pads[1] :] == 4).all())
confirm("    and the steps are the same", (moved_by[1] == 0).all())

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("places_of_batch")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("places_of_batch")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
places_of_batch = exercises["places_of_batch"].solution
for name in ("batch_mixed", "batch_leftpad", "both_tokens"):
    found = places_of_batch(ids[f"{name}/input_ids"], *model.config.blank_ids)
    theirs = ids[f"{name}/get_position_ids_2d"][:, 0]
    confirm(f"{name}: the places of the original", torch.equal(found, theirs))

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("smallest_sets")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("smallest_sets")


# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
def by_name(tolerance):
    sets = exercises["smallest_sets"].solution(~(costs.gaps <= tolerance))
    return [[costs.cases[column] for column in s] for s in sets]


for tolerance in (1e-4, 1e-3):
    print(f"to {tolerance}:", *by_name(tolerance), sep="\n    ")
# Both kinds of padding, and a row with both mask tokens. To 0.001, exact frequencies
# pass on every short input, and only far positions tell.
fine, coarse = by_name(1e-4), by_name(1e-3)
confirm("three inputs, then four", (len(fine[0]), len(coarse[0])) == (3, 4))
confirm("far positions are needed", all("far positions" in s for s in coarse))

# %% [markdown]
# ## What to remember
#
# - A comment is a claim. A name is a claim, too: `GLU`, `hidden_size`,
#   `context_lengths`, `emb`.
# - Code in a text may be of two revisions. Lists of parameters and arguments show it
#   without running anything.
# - The kind mistake stops with an error. `zeros(11)` runs; exact frequencies run, and are
#   off by 0.0008.
# - The short prompt that everybody tests let six of fifteen misreadings pass. Test a
#   batch of unlike rows, both mask tokens, both kinds of padding, and far positions.
# - Not every difference in code is a difference in value.
#
# ## Where to read on
#
# - ChatGLM-6B, `modeling_chatglm.py`: you can now read it from top to bottom. C1 to C11
#   name the symbols where it pays to slow down.
# - transformers, `models/llama/modeling_llama.py`: `LlamaRotaryEmbedding`,
#   `LlamaAttention.forward` and `LlamaModel.forward`, for what L1 to L3 left out.
# - {cite:t}`su2021`, equation 34, for the paper's order of cosines; {cite:t}`liu2021`,
#   for what P-tuning trains; {cite:t}`shazeer2020`, for units that do have a gate.
# - Here: the other chapters of this part, and `tests/test_golden.py`, which compares
#   every tensor that the original computed with ours.
