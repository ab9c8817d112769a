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
# (ch-mapping)=
# # Mapping: other people's names
#
# :::{admonition} In this chapter
# :class: at-a-glance
# **40 minutes · moderate.** Afterwards you can map a checkpoint that you have never seen
# onto a model that you wrote, take a fused matrix apart in the right order, say why
# Llama's rows were shuffled on their way to Hugging Face, and tell the mistakes that a
# strict loader reports from those that it cannot see.
# :::

# %% tags=["remove-input"]
from annotated_src.figures.device_map import DeviceMap

DeviceMap("mapping")

# %% [markdown]
# :::{admonition} Predict before you run
# :class: predict
# SmolLM2 goes on after "The capital of France is" with "Paris". Now somebody maps its
# weights with a mistake. Every name is found, every shape fits, no loader complains.
#
# 1. In *one* of the 30 layers, rows of queries, keys and values are mixed up.
# 2. In *every* layer, the rows of queries and keys lie in the order that Meta uses,
#    and nobody reordered them.
# 3. In *every* layer, `gate_proj` and `up_proj` are swapped.
#
# Which of the three models can still write "Paris"?
# :::

# %%
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
import transformers
from IPython.display import Markdown
from safetensors.torch import save_file
from torch.func import functional_call
from transformers.models.falcon.modeling_falcon import FalconAttention
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention
from transformers.models.phi3.modeling_phi3 import Phi3Attention

from annotated_src.checkpoint import assign_strictly, load_model, save_checkpoint
from annotated_src.figures import mapping as figures
from annotated_src.fused_qkv import join_qkv, split_qkv
from annotated_src.hf_config import write_llama, write_phi
from annotated_src.hf_sizes import weights_and_biases
from annotated_src.models import phi
from annotated_src.models.llama import HF_NAMES, Llama, tiny_config
from annotated_src.originals import META_LLAMA_NAMES, PHI_MSFT_NAMES, turn_meta_rows
from annotated_src.rotary import (
    apply_rotary,
    apply_rotary_interleaved,
    interleaved_to_half_split,
    rope_frequencies,
    rope_tables,
    rows_to_half_split,
)
from annotated_src.shards import CheckpointError, read_tensors, write_json
from annotated_src.show import confirm, show
from annotated_src.tensor_names import names_by_layer, rename, split_fused
from annotated_src.tokenizer import TextTokenizer
from annotated_src.weights import smollm2

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
_ = torch.set_grad_enabled(False)
temporary = TemporaryDirectory()
scratch = Path(temporary.name)  # for the files that this chapter makes
F64 = torch.float64

# %% [markdown]
# ## A table and a loop
#
# You have written a model from parts, as in {ref}`ch-authoring`. Somebody else has
# trained one that computes the same, and stored its tensors under other names. What
# you need is a table. Here are the first names of a small random Llama of transformers,
# and of ours.

# %%
torch.manual_seed(1)
config = transformers.LlamaConfig(**write_llama(tiny_config()))
theirs = transformers.LlamaForCausalLM(config).eval()
ours = Llama(tiny_config()).eval()
for a, b in list(zip(theirs.state_dict(), ours.state_dict(), strict=True))[:4]:
    print(f"{a:42}{b}")
print(len(theirs.state_dict()), "and", len(ours.state_dict()), "tensors")

# %% [markdown]
# The order is not the same: transformers lists attention before its norm. Nothing may
# depend on order. A name with `{}` in the place of the layer's number stands for all
# layers, so the table is short, and this loop maps the whole model:


# %%
def map_names(stored, table, num_layers):
    mapped = {}
    for mine, other in table.items():
        for layer in range(num_layers):
            if other.format(layer) in stored:
                mapped[mine.format(layer)] = stored[other.format(layer)]
    return mapped


mapped = map_names(theirs.state_dict(), HF_NAMES, 2)
ours.load_state_dict(mapped)  # torch is strict by default
tokens = torch.tensor([[5, 1, 9, 22, 3]])
confirm(
    "the same logits as transformers",
    torch.allclose(ours(tokens), theirs(tokens).logits, atol=1e-5),
)

# %% [markdown]
# `HF_NAMES` lists weights *and* biases, since some Llamas have them; the `if` leaves out
# the lines for tensors that this one lacks. However deep a model, its table stays short.
#
# The package does it in two steps, so that a shard can pass through without being kept
# ({ref}`ch-from-pretrained`): write the table out for a given depth, then rename tensor
# by tensor.

# %%
show(weights_and_biases, names_by_layer, rename)

# %% [markdown]
# ## The Rosetta stone
#
# Here is every kind of tensor in the words of those who store it. The cells are not
# typed here: they are the tables that the loaders use, and the tests compare them with
# real models of transformers, with the names in the golden file of ChatGLM-6B, and with
# llama.cpp's own dictionary. `TensorNames` is the table of litert-torch, the library for
# devices that this part answers to: one field for each kind, filled in for each model.

# %% tags=["hide-input"]
Markdown(figures.rosetta_markdown(["TensorNames", "Llama", "Gemma", "Phi"]))

# %% tags=["hide-input"]
Markdown(
    figures.rosetta_markdown(
        ["Phi-2, first files", "ChatGLM-6B", "Llama, Meta's files", "Llama in GGUF"]
    )
)

# %% [markdown]
# Read it by lines.
#
# - **Names lie.** Hugging Face's `post_attention_layernorm` is the norm *before* the
#   feed-forward network; it is named after what it follows. In Gemma 2, which has
#   norms on both sides, the same name is the norm *after* attention.
# - **Names say nothing.** Meta's `w1`, `w2`, `w3` are gate, down, up; not in the order
#   in which they are used. Nothing but the code that uses them can tell you.
# - **Gaps.** Gemma has no head of its own (it is the embedding), Phi no gate and one
#   norm for both halves, ChatGLM-6B no gate either.
# - **Three lines, one tensor.** `Wqkv` and `query_key_value` stand in three lines at
#   once. That is the rest of this chapter's trouble.

# %%
stone = figures.rosetta_data()
confirm(
    "post_attention_layernorm feeds the feed-forward network",
    stone["blocks.{}.ffn_norm"]["Llama"].endswith("post_attention_layernorm"),
)
with torch.device("meta"):
    gemma2 = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(num_hidden_layers=1, pad_token_id=None)
    )
norms = [n.split(".")[-2] for n in gemma2.state_dict() if "layernorm" in n]
confirm(
    "in Gemma 2 another norm does",
    {"post_attention_layernorm", "pre_feedforward_layernorm"} <= set(norms),
)
metas = {line["Llama, Meta's files"]: name for name, line in stone.items()}
for w in ("w1", "w2", "w3"):
    print(w, "is", metas[f"layers.{{}}.feed_forward.{w}"].split(".")[-1])

# %% [markdown]
# ## One matrix for three
#
# Queries, keys and values are made from the same vector, so one product can make all
# three: stack the matrices. The product does not care in which order the rows lie. The
# reader has to. Here is a matrix with twelve rows, one a head, in four models:

# %% mystnb={"image": {"alt": "Four columns of twelve coloured rows. Plain, 4 heads: four blue queries, four orange keys, four green values. Per head: q0 k0 v0, q1 k1 v1 and so on, colours alternating row by row. Plain, 8 heads and 2 keys: eight blue rows, two orange, two green. Per group: q0 to q3, k0, v0, then q4 to q7, k1, v1. A dashed line runs through the middle of all four."}, "figure": {"name": "fig-mapping-rows", "caption": "Twelve rows, four models. Blue are queries, orange keys, green values; in a real model each row stands for the H rows of a head. The dashed line halves the matrix."}} tags=["hide-input"]
figures.draw_rows(figures.rows_data())

# %% [markdown]
# The shape is the same four times: $12 H$ rows. It does not even tell how many heads
# there are. Who stores which:
#
# | layout | models |
# |---|---|
# | plain | Phi-2's first files, Phi-3, Baichuan, ChatGLM2 and 3 |
# | per head | ChatGLM-6B, GPT-NeoX, BLOOM |
# | per group | Falcon 40B and 180B, InternLM2 |
#
# Why not plain for all? To share a layer between two devices, one cuts the matrix by
# rows, at the dashed line. Per head, or per group, each half is complete: its queries
# have their keys and values. Of a plain one, with few keys, a half gets queries only.

# %%
halves = {
    m.title.split("\n")[0]: set(m.kinds[:6].tolist()) for m in figures.rows_data()
}
confirm(
    "half of the last two: queries only, and some of each",
    halves["plain"] == {0} and halves["per group"] == {0, 1, 2},
)

# %% [markdown]
# With $N$ query heads, $K$ key/value heads and $G = N / K$ queries to a group, the first
# row of each head stands at $H$ times
#
# $$
# \text{plain:}\quad q_n \mapsto n, \qquad k_g \mapsto N + g, \qquad v_g \mapsto N + K + g,
# $$ (eq-mapping-plain)
#
# $$
# \text{per group:}\quad q_n \mapsto \Bigl\lfloor \frac{n}{G} \Bigr\rfloor (G + 2) + n \bmod G,
# \qquad k_g \mapsto g (G + 2) + G, \qquad v_g \mapsto g (G + 2) + G + 1.
# $$ (eq-mapping-group)
#
# Per head is per group with $G = 1$. As loops:


# %%
def split_by_loops(fused, N, K, H, layout):
    G = N // K
    plain = layout == "plain"
    parts = {"q": [], "k": [], "v": []}
    for n in range(N):
        first = n if plain else n // G * (G + 2) + n % G
        parts["q"] += [fused[first * H + row] for row in range(H)]
    for g in range(K):
        for name, first in (
            ("k", N + g if plain else g * (G + 2) + G),
            ("v", N + K + g if plain else g * (G + 2) + G + 1),
        ):
            parts[name] += [fused[first * H + row] for row in range(H)]
    return tuple(torch.stack(rows) for rows in parts.values())


# Check eq-mapping-plain and eq-mapping-group.
for layout, N, K in (("plain", 8, 2), ("per group", 8, 2), ("per head", 4, 4)):
    fused = torch.randn(12 * 3, 5, dtype=F64)
    parts = split_qkv(fused, N, K, 3, layout)
    looped = split_by_loops(fused, N, K, 3, layout)
    confirm(
        f"{layout}: loops = package",
        all(torch.equal(a, b) for a, b in zip(looped, parts, strict=True)),
    )
    confirm("and back, bit for bit", torch.equal(join_qkv(*parts, 3, layout), fused))

# %% [markdown]
# ## The annotated source
#
# No loop over rows is needed: name the dimensions of the pile (group, member, row of a
# head) and cut along the second.

# %%
show(split_qkv, join_qkv)

# %% [markdown]
# ## The ladder of equality
#
# That was us against ourselves. The layouts must be right for the models that use them.
# So take three attention layers of transformers with random weights, and compute their
# queries, keys and values the way *they* do: we listen in at the function that attends.
# Falcon has a function of its own that splits.

# %%
N, K, H = 6, 2, 4
hidden = torch.randn(1, 5, N * H)
still = torch.ones(1, 5, H), torch.zeros(1, 5, H)  # cos 1, sin 0: RoPE does not turn
heard = {}


def listen(layer, queries, keys, values, mask, **more):
    heard[type(layer)] = queries, keys, values
    return torch.zeros(1, 5, N, H), None


transformers.AttentionInterface.register("listen", listen)
same = {"hidden_size": N * H, "num_attention_heads": N, "attn_implementation": "listen"}
neox = GPTNeoXAttention(
    transformers.GPTNeoXConfig(**same, attention_bias=False), layer_idx=0
)
neox(hidden, None, position_embeddings=still)
phi3 = Phi3Attention(
    transformers.Phi3Config(**same, num_key_value_heads=K, pad_token_id=None), 0
)
phi3(hidden, still, None)
falcon = FalconAttention(
    transformers.FalconConfig(**same, num_kv_heads=K, new_decoder_architecture=True), 0
)
split = falcon._split_heads(falcon.query_key_value(hidden))
q, k, v = (part.transpose(1, 2) for part in split)
heard[FalconAttention] = q, k[:, ::3], v[:, ::3]  # it repeats them for 3 queries each

cases = {
    "GPT-NeoX": ("per head", neox.query_key_value.weight, heard[GPTNeoXAttention]),
    "Phi-3": ("plain", phi3.qkv_proj.weight, heard[Phi3Attention]),
    "Falcon 40B": ("per group", falcon.query_key_value.weight, heard[FalconAttention]),
}


def heads_of(weight):
    return (hidden @ weight.T).unflatten(-1, (-1, H)).transpose(1, 2)


for name, (layout, fused, theirs_qkv) in cases.items():
    ours_qkv = split_qkv(fused, N, theirs_qkv[1].shape[1], H, layout)
    confirm(
        f"{name} has its rows {layout}",
        all(
            torch.allclose(heads_of(weight), part, atol=1e-6)
            for weight, part in zip(ours_qkv, theirs_qkv, strict=True)
        ),
    )

# %% [markdown]
# ## A real case: the first files of Phi-2
#
# Phi-2 was published with a `model_type` of its own, "phi-msft", names of its own, and
# `Wqkv` with plain rows. Later its files were made anew for the Phi of transformers: other
# names, three matrices. Let us make a small one of the old kind from a random Phi of
# transformers, by hand.

# %%
sizes = write_phi(phi.tiny_config()) | {"num_key_value_heads": 4}
reference = transformers.PhiForCausalLM(
    transformers.PhiConfig(**sizes, initializer_range=0.2)
).eval()
state, old = reference.state_dict(), {}
for name, first in PHI_MSFT_NAMES.items():
    parts = [name.replace("qkv_", f"{x}_") for x in "qkv"] if "qkv" in name else [name]
    for layer in range(2):
        today = [phi.HF_NAMES[part].format(layer) for part in parts]
        if today[0] in state:
            old[first.format(layer)] = torch.cat([state[x] for x in today])

words = {
    "model_type": "phi-msft",
    "architectures": ["PhiForCausalLM"],
    "vocab_size": 96,
    "n_layer": 2,
    "n_embd": 48,
    "n_head": 4,
    "n_inner": 80,
    "n_positions": 128,
    "rotary_dim": 4,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
}
folder = scratch / "first"
folder.mkdir()
write_json(folder / "config.json", words)
save_file(old, folder / "model.safetensors")
print(*sorted(name for name in old if "h.0" in name), sep="\n")

# %% [markdown]
# {py:func}`annotated_src.checkpoint.load_model` finds "phi-msft" in its table of
# architectures, which says: other words in `config.json`, other names, rows plain. One
# more stage stands in the pipeline of {ref}`ch-from-pretrained`, between renaming and
# assigning. It turns one tensor into three and keeps none.

# %%
show(split_fused)

# %%
model = load_model(folder)
confirm(
    "the old files give transformers' logits",
    torch.allclose(model(tokens), reference(tokens).logits, atol=1e-4),
)

# %% [markdown]
# And back. {py:func}`annotated_src.saving.save_checkpoint` writes the names and words
# that transformers reads today, for each of the four models; or, if asked, the old
# form, with the rows joined again. Nothing is rounded on the way.

# %%
save_checkpoint(model, scratch / "today")
again = transformers.AutoModelForCausalLM.from_pretrained(scratch / "today")
confirm("transformers reads it, as a Phi", type(again) is type(reference))
confirm(
    "every tensor bit for bit",
    all(torch.equal(x, again.state_dict()[name]) for name, x in state.items()),
)
save_checkpoint(model, scratch / "old", model_type="phi-msft")
stored = dict(read_tensors(scratch / "old"))
confirm(
    "in the old form: the same names, the same bits",
    stored.keys() == old.keys() and all(torch.equal(stored[x], old[x]) for x in old),
)

# %% [markdown]
# ## Meta's rows and Hugging Face's
#
# For Llama the two sets of files differ in more than names. {ref}`ch-rope` has both
# ways to pair the features of a head: neighbours, $2i$ with $2i + 1$ (the paper, Meta),
# and halves, $i$ with $i + R$ (Hugging Face). A permutation $P$ leads from one to the
# other, and changes no score ({eq}`eq-rope-permute`). Now write queries and keys as what
# they are, $W_q x$ and $W_k y$, for tokens $x$ at $m$ and $y$ at $n$:
#
# $$
# \langle R^{\text{neighbours}}_m W_q x,\; R^{\text{neighbours}}_n W_k y \rangle
# = \langle R^{\text{halves}}_m (P W_q) x,\; R^{\text{halves}}_n (P W_k) y \rangle .
# $$ (eq-mapping-scores)
#
# So whoever rotates halves need not shuffle queries and keys at every step. It is
# enough to shuffle the *rows* of two matrices in each layer, once, when the files are
# converted. Hugging Face did that.

# %%
# Check eq-mapping-scores.
torch.manual_seed(3)
tables = rope_tables(torch.arange(7)[None], rope_frequencies(6, 1e4).double(), F64)


def scores(rotate, weights, x):
    q, k = ((x @ w.T).unflatten(-1, (2, 6)).transpose(1, 2) for w in weights)
    return rotate(q, *tables) @ rotate(k, *tables).mT


x = torch.randn(1, 7, 10, dtype=F64)
meta = torch.randn(2, 12, 10, dtype=F64)  # W_q and W_k: 2 heads of 6 rows each
moved = [rows_to_half_split(w, num_heads=2) for w in meta]
right = scores(apply_rotary_interleaved, meta, x)
confirm("the same scores", torch.allclose(right, scores(apply_rotary, moved, x)))
wrong = scores(apply_rotary, meta, x)
confirm(
    "rows not moved: other scores, but not at distance 0",
    (right - wrong).abs().max() > 1
    and torch.allclose(right.diagonal(0, -2, -1), wrong.diagonal(0, -2, -1)),
)

# %% [markdown]
# The last line is the nasty part. At distance 0 nothing turns, so a forgotten $P$
# changes nothing there; at small distances, little in the slow pairs. Values are never
# turned, so $W_v$ stays as it is. In the package, the step stands where
# {py:func}`annotated_src.tensor_names.split_fused` stood before:

# %%
show(turn_meta_rows)

# %% [markdown]
# :::{admonition} Paper and code
# :class: paper-code
# {cite:t}`su2021` turn neighbours, and so does Meta's `apply_rotary_emb`. The code of
# transformers turns halves (`rotate_half`), and reads as if it contradicted the paper.
# Both are right, because the *weights* differ. So "which pairs does Llama turn?" has no
# answer without naming the files. GGUF files hold Meta's order again: the converter of
# llama.cpp undoes Hugging Face's permutation.
# :::
#
# Below, our small Llama is stored as Meta would, and read by three programs.

# %%
stored = {}
for theirs_name, name in names_by_layer(ours, META_LLAMA_NAMES).items():
    stored[theirs_name] = ours.state_dict()[name]
    if ".wq." in theirs_name or ".wk." in theirs_name:
        stored[theirs_name] = figures.to_meta_rows(stored[theirs_name], head_dim=10)


def read_meta(change=lambda tensors, config: tensors):
    twin = Llama(tiny_config()).eval()
    renamed = rename(stored.items(), names_by_layer(twin, META_LLAMA_NAMES))
    assign_strictly(twin, change(renamed, twin.config), torch.float32)
    return twin(tokens)


wanted = theirs(tokens).logits
with patch("annotated_src.models.llama.apply_rotary", apply_rotary_interleaved):
    as_paper = read_meta()
confirm("Meta's rows, neighbours turn", torch.allclose(as_paper, wanted, atol=1e-5))
confirm(
    "rows moved, halves turn: the same",
    torch.allclose(read_meta(turn_meta_rows), wanted, atol=1e-5),
)
confirm(
    "Meta's rows, halves turn: another model",
    not torch.allclose(read_meta(), wanted, atol=1e-3),
)

# %% [markdown]
# ## What strict catches
#
# A loader that is strict both ways wants every tensor of the model, no other, each in
# its shape, each once. It then loads all or nothing. Four accidents with the old Phi-2
# files, each reported with names:


# %%
def report(tensors):
    save_file(tensors, folder / "model.safetensors")
    try:
        load_model(folder)
    except CheckpointError as error:
        print(*str(error).splitlines()[1:] or [error], sep="\n")
        return True
    return False


fused_name = "transformer.h.1.mixer.Wqkv.weight"
rest = {name: x for name, x in old.items() if name != fused_name}
confirm("missing", report(rest))
confirm("unexpected", report(old | {"transformer.h.2.ln.weight": torch.ones(48)}))
confirm("another shape", report(old | {fused_name: torch.zeros(136, 48)}))
confirm("not its own name", report(old | {"norm.weight": torch.ones(48)}))

# %% [markdown]
# A fused matrix of a wrong shape is named once, as itself, and not as three missing
# parts. The last case: our name, in a file where the original's is due.
#
# ## What strict cannot catch
#
# :::{admonition} Break it
# :class: break-it
# Two tensors of the same shape, swapped. A fused matrix in another layout. Rows that
# should have been moved. Names and shapes are all in order, so no loader can object.
# Only *numbers* can. Below, SmolLM2 with such mistakes, one at a time.
# :::


# %%
smollm = load_model(smollm2())
tokenizer = TextTokenizer.from_pretrained(smollm2())
c, weights = smollm.config, dict(smollm.state_dict())
print(c.num_heads, "query heads,", c.num_kv_heads, "key/value heads")


def parts_of(layer):
    return [f"blocks.{layer}.attention.{x}_proj.weight" for x in "qkv"]


def misread(layers):
    """Fuse queries, keys and values per group, and split them as if it were plain."""
    changed = {}
    for layer in layers:
        names = parts_of(layer)
        fused = join_qkv(*(weights[name] for name in names), c.head_dim, "per group")
        split = split_qkv(fused, c.num_heads, c.num_kv_heads, c.head_dim, "plain")
        changed |= dict(zip(names, split, strict=True))
    return changed


def swap(one, other):
    pairs = {name: name.replace(one, other) for name in weights if one in name}
    pairs |= {b: a for a, b in pairs.items()}
    return {a: weights[b] for a, b in pairs.items()}


mistakes = {
    "none": {},
    "fused, misread in all layers": misread(range(30)),
    "fused, misread in layer 1": misread([1]),
    "fused, misread in layer 29": misread([29]),
    "gate and up swapped": swap("gate_proj", "up_proj"),
    "layers 10 and 11 swapped": swap("blocks.10.", "blocks.11."),
    "Meta's rows, not moved": {
        name: figures.to_meta_rows(weights[name], c.head_dim)
        for layer in range(30)
        for name in parts_of(layer)[:2]
    },
}
confirm(
    "every shape fits, every time",
    all(weights[n].shape == x.shape for m in mistakes.values() for n, x in m.items()),
)

# %% [markdown]
# Three graders. What does the model write after "The capital of France is"? How badly
# does it expect a plain text: minus the mean log probability of the next token, in nats
# ({ref}`ch-training` calls it the loss)? And how far is the worst logit off, rounded to
# fives?

# %%
prompt = tokenizer.encode("The capital of France is")
text = tokenizer.encode(
    "The capital of France is Paris. The capital of Italy is Rome. "
    "The capital of Spain is Madrid."
)


def examine(changed):
    def run(ids, **more):  # the model, with some tensors replaced
        return functional_call(smollm, changed, (ids,), more)

    logits = run(text)
    expected = logits[0, :-1].log_softmax(-1).gather(-1, text[0, 1:, None])
    ids = prompt
    for _ in range(4):
        best = run(ids, last_logits_only=True)[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], dim=1)
    return logits, -expected.mean().item(), tokenizer.decode(ids[0, prompt.shape[1] :])


grades = {name: examine(changed) for name, changed in mistakes.items()}
true_logits = grades["none"][0]
print(f"{'mistake':31}{'loss':>6}{'worst logit':>15}  writes")
for name, (logits, loss, written) in grades.items():
    error = (logits - true_logits).abs().max()
    print(f"{name:31}{loss:6.1f}{5 * round(error.item() / 5):15}  {written!r}")

# %%
loss = {name: graded[1] for name, graded in grades.items()}
written = {name: graded[2] for name, graded in grades.items()}
off = {name: (g[0] - true_logits).abs().max().item() for name, g in grades.items()}
confirm(
    "three broken models write Paris",
    [name for name in mistakes if "Paris" in written[name]][1:]
    == [
        "fused, misread in layer 29",
        "layers 10 and 11 swapped",
        "Meta's rows, not moved",
    ],
)
confirm(
    "two of them hide even from the loss: 0.2 nats",
    all(
        loss[name] - loss["none"] < 0.2
        for name in ("fused, misread in layer 29", "layers 10 and 11 swapped")
    ),
)
confirm(
    "Meta's rows cost more than a nat, and write Paris",
    1 < loss["Meta's rows, not moved"] - loss["none"] < 1.5,
)
confirm("no mistake hides from the logits", min(list(off.values())[1:]) > 1)

# %% [markdown]
# That answers the question at the top: model 2 can, and model 1 can, if the layer is the
# last one; in layer 1 the same mistake ruins everything. With rows in Meta's order each
# token costs a nat more, and the answer is still Paris. Swapped gates fail loudly.
# **Do not judge a mapping by its text.** Run the original once, store a few logits, and
# compare to $10^{-4}$: the golden numbers of {ref}`ch-chatglm` are just that.
#
# What does a misread look like from the inside? Layer 11 has a head whose whole work is
# to look at the token before.

# %% mystnb={"image": {"alt": "Three square maps for the tokens The capital of France is Paris and a full stop. Left, read right: dark cells just below the diagonal, each token looks at the one before. Middle, per group read as plain: the stripe is gone. Right, rows as Meta's: the dark stripe has moved onto the diagonal, most tokens look at themselves."}, "figure": {"name": "fig-mapping-maps", "caption": "Where head 1 of layer 11 looks, each row a token, the darker the more. Same input, same numbers in the matrix; only the order of its rows differs."}} tags=["hide-input"]
short = tokenizer.encode("The capital of France is Paris.")
pieces = [tokenizer.decode([i]).strip() for i in short[0].tolist()]
looks = figures.maps_data(smollm, short, pieces, at=(11, 1))
figures.draw_maps(looks)

# %%
back = {
    name: getattr(looks, name).diagonal(-1).mean().item()
    for name in ("right", "misread", "unturned")
}
print({name: round(share, 2) for name, share in back.items()})
itself = looks.unturned.diagonal()[1:].mean()
confirm("with Meta's rows it looks at itself, mostly", itself > 0.5 > back["unturned"])
confirm("read right, most of the look goes one back", back["right"] > 0.6)
confirm("misread, little of it", back["misread"] < 0.4 and back["unturned"] < 0.4)

# %% [markdown]
# Misread, the "key" of this head is not a key at all: by {eq}`eq-mapping-group`, the
# tenth head's rows of a matrix fused per group are `v1`.

# %%
names = [f"q{n}" for n in range(9)] + ["k0", "k1", "k2", "v0", "v1", "v2"]
numbers = torch.arange(15)
fused = join_qkv(numbers[:9], numbers[9:12], numbers[12:], 1, "per group")
q, k, v = split_qkv(fused, 9, 3, 1, "plain")
for title, rows in (("queries", q), ("keys", k), ("values", v)):
    print(f"{title:8}", *(names[i] for i in rows.tolist()))
confirm("head 1 asks its own query for another head's values", names[k[0]] == "v1")

# %% [markdown]
# ## Exercises
#
# Write your function in a cell of your own and give it to `check`. A question takes its
# name and a letter: `check("values_too", "a")`.

# %%
from annotated_src.exercises import check  # noqa: F401 - for your cells
from annotated_src.exercises.mapping import chapter as exercises

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("split_qkv")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("split_qkv")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
# GPT-NeoX's matrix, made plain: its product falls into three by `chunk`.
_, fused, theirs_qkv = cases["GPT-NeoX"]
parts = exercises["split_qkv"].solution(fused, N, N, H, "per head")
plain = join_qkv(*parts, H, "plain")
confirm(
    "three chunks are GPT-NeoX's queries, keys and values",
    all(
        torch.allclose(heads_of(weight), part, atol=1e-6)
        for weight, part in zip(plain.chunk(3), theirs_qkv, strict=True)
    ),
)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("find_layouts")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("find_layouts")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
# The three layers of the ladder.
find = exercises["find_layouts"].solution
answers = [find(fused, hidden, qkv[1], N) for _, fused, qkv in cases.values()]
print(answers)
confirm(
    "with a key for each query, per group and per head are one",
    answers == [["per group", "per head"], ["plain"], ["per group"]],
)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("values_too")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("values_too")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
state = ours.state_dict()
value, out = (f"blocks.0.attention.{x}_proj.weight" for x in ("v", "out"))
rows = {value: rows_to_half_split(state[value], num_heads=2)}
columns = {out: interleaved_to_half_split(state[out].unflatten(1, (4, 10))).flatten(1)}
one, both = (functional_call(ours, x, (tokens,)) for x in (rows, rows | columns))
confirm("only values moved: another model", not torch.allclose(one, wanted, atol=1e-4))
confirm("out_proj's columns too: the same", torch.allclose(both, wanted, atol=1e-5))

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("no_table")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("no_table")


# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
def pair_by_shape(model, stored):
    left, pairs = dict(stored), {}
    for name, tensor in model.state_dict().items():
        pairs[name] = next(n for n, x in left.items() if x.shape == tensor.shape)
        del left[pairs[name]]
    return pairs


sizes = write_llama(tiny_config()) | {"num_hidden_layers": 12, "head_dim": 12}
deep = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
deep.save_pretrained(scratch / "deep")
mine = load_model(scratch / "deep")
right_pairs = {a: b for b, a in names_by_layer(mine, HF_NAMES).items()}
in_order = pair_by_shape(mine, deep.state_dict())
from_file = pair_by_shape(mine, dict(read_tensors(scratch / "deep")))
for name in ("0.attention.q_proj", "0.ffn.gate_proj", "2.ffn.gate_proj"):
    print(f"{name:20} <- {from_file[f'blocks.{name}.weight']}")
astray = [n for n in right_pairs if from_file[n] != right_pairs[n]]
confirm("in the order of modules, every pair is right", in_order == right_pairs)
confirm("in the order of the file, 96 of 111 are wrong", len(astray) == 96)
early = {n.split(".")[3] for n in astray if n.startswith(("blocks.0.", "blocks.1."))}
confirm("in the first two layers only q and out", early == {"q_proj", "out_proj"})

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("move_meta_rows")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("move_meta_rows")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
# The Meta files of the chapter: 4 query heads of 10 rows share 2 of keys.
name = "blocks.0.attention.{}_proj.weight"
stored_rows = dict(rename(stored.items(), names_by_layer(ours, META_LLAMA_NAMES)))
meta_rows = [stored_rows[name.format(x)] for x in "qkv"]
moved = exercises["move_meta_rows"].solution(*meta_rows, 4, 2)
confirm(
    "moved, they are Hugging Face's rows",
    all(
        torch.equal(m, state[name.format(x)]) for m, x in zip(moved, "qkv", strict=True)
    ),
)

# %% [markdown]
# ## What to remember
#
# - A mapping is a table: a line for each kind of tensor, `{}` for the layer. Write it as
#   data; run it strictly in both directions.
# - Names are labels, not meanings. `post_attention_layernorm` comes before the
#   feed-forward network.
# - A fused matrix has three possible orders and one shape.
# - RoPE's pairs live in the files, not in the model's name: $P$ moves rows once, so that
#   nothing need be moved at each step.
# - Strict loading is necessary and proves little. Compare logits with the original's.
#
# **Where to read on.** transformers 4: `convert_llama_weights_to_hf.py` (`permute`),
# `convert_phi_weights_to_hf.py`, whose first version made Phi's plain rows per head;
# transformers: `modeling_falcon.py`, `FalconAttention._split_heads`, all its branches.
# llama.cpp: `gguf-py/gguf/tensor_mapping.py`, the largest Rosetta stone there is;
# `convert_hf_to_gguf.py`, `LlamaModel.permute`. litert-torch:
# `generative/utilities/loader.py`, `ModelLoader.TensorNames`, and `_fuse_qkv`, which goes
# the other way: three stored matrices into one, per group or plain. Here:
# {py:mod}`annotated_src.tensor_names`, {py:mod}`annotated_src.originals`. The next
# chapter, {ref}`ch-quantizing`, makes the weights small.
