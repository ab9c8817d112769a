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
# (ch-device)=
# # On the device
#
# :::{admonition} In this chapter
# :class: at-a-glance
# **45 minutes · moderate.** Afterwards you can run an exported model with nothing but
# numpy and an interpreter, grade its int8 version honestly, say which bytes move for
# each token and which of them need not, and find the mistake that a test with the
# wrong prompt hides.
# :::

# %% tags=["remove-input"]
from annotated_src.figures.device_map import DeviceMap

DeviceMap("running")

# %% [markdown]
# :::{admonition} Predict before you run
# :class: predict
# SmolLM2-135M, exported with int8 weights and room for 2048 tokens, writes one token.
# Memory is the bottleneck, so bytes are time. Which of these moves the most of them?
#
# - The weights: 135 million, one byte each.
# - Attention, as it reads the keys and values of the context.
# - Something that no line of the model asks for.
#
# And: a Llama of 109,000 weights has learnt a text of 856 characters by heart. Its
# weights are rounded to 8 bits. How many characters does it get wrong? Write both down.
# :::

# %%
import codecs
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter

from annotated_src.edge import EdgeRunner, edge_generate
from annotated_src.edge_model import make_entries
from annotated_src.export import export_tflite
from annotated_src.figures import on_device as figures
from annotated_src.figures.cache import SMOLLM2
from annotated_src.generate import generate
from annotated_src.grading import grade
from annotated_src.models.llama import Llama, LlamaConfig
from annotated_src.quiet import quietly
from annotated_src.sampler import Sample
from annotated_src.show import confirm, show
from annotated_src.tflite_file import operators, stored_bytes
from annotated_src.training import batches, init_weights, train

# %% [markdown]
# ## Something worth shipping
#
# A device needs a model with something to say. Ours learns a text that every Python
# carries, that of `import this`, by the loop of {ref}`ch-training`. A byte is a token,
# so the tokenizer is `str.encode`, and id 0 ends the text. Two layers, four query heads
# on two key/value heads; a few seconds. The text is laid out twice, so that windows run
# across its end.

# %%
with redirect_stdout(StringIO()):
    import this
zen = codecs.decode(this.s, "rot13")
ids = torch.tensor([*zen.encode(), 0])

config = LlamaConfig(
    vocab_size=128,
    num_layers=2,
    embed_dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_dim=176,
    max_seq_len=256,
    norm_eps=1e-5,
    rope_base=10_000.0,
    tied_head=False,
)
model, generator = Llama(config), torch.Generator().manual_seed(0)
init_weights(model, generator, 0.08)
windows = batches(ids.repeat(2), 4, 256, generator)
losses = list(train(model, windows, steps=300, peak=5e-3, warmup=20))
model.requires_grad_(False)
confirm("856 characters", len(zen) == 856)
confirm(
    "109,000 weights", round(sum(w.numel() for w in model.parameters()), -3) == 109e3
)
confirm("it begins at the loss of knowing nothing", abs(losses[0] - np.log(128)) < 0.5)
confirm("and ends below a tenth of a nat", losses[-1] < 0.1)

# %% [markdown]
# {ref}`ch-exporting` turns it into files: room for 16 tokens of prompt, 256 in all.

# %%
temporary = TemporaryDirectory()
files = {}
for scheme in (None, "int8"):
    files[scheme or "float32"] = path = Path(temporary.name) / f"zen-{scheme}.tflite"
    export_tflite(model, path, prefill=16, cache=256, quantize=scheme)

# %% [markdown]
# ## Prefill and decode by hand
#
# From here on there is no torch, only arrays. A file has two entries. Each says what it
# takes:

# %%
with quietly():
    interpreter = Interpreter(model_path=str(files["float32"]), num_threads=1)
    interpreter.allocate_tensors()
prefill, decode = map(interpreter.get_signature_runner, ("prefill", "decode"))
for entry in (prefill, decode):
    for name, item in sorted(entry.get_input_details().items()):
        print(f"{name:10}", item["dtype"].__name__, item["shape"].tolist())
    print("    returns", *sorted(entry.get_output_details()))

# %% [markdown]
# Tokens, their positions, and four tensors of cache: two layers, keys and values. Back
# come the same four, and, from `decode`, logits. Prefill's shape says 16 tokens, ours
# are 12. So fill up with zeros; and since prefill gives no logits, leave the last token
# for `decode`:

# %%
prompt = b"Beautiful is"
kv = {
    name: np.zeros(item["shape"], item["dtype"])
    for name, item in decode.get_input_details().items()
    if name.startswith("kv_")
}
padded = np.zeros((1, 16), np.int32)
padded[0, : len(prompt) - 1] = list(prompt[:-1])
kv = prefill(tokens=padded, input_pos=np.arange(16, dtype=np.int32), **kv)
in_use = kv["kv_k_0"][0, 0].any(axis=-1)

text, by_hand = list(prompt), []
for position in range(len(prompt) - 1, 239):
    token = np.array([[text[position]]], np.int32)
    kv = decode(tokens=token, input_pos=np.array([position], np.int32), **kv)
    by_hand.append(kv.pop("logits")[0, 0])
    text.append(int(by_hand[-1].argmax()))
print(bytes(text).decode())

# %% [markdown]
# That is the whole of inference. Five places of the cache held junk when the loop began:
# keys of the zeros that filled the prompt up. The mask hides what lies beyond
# `input_pos`, and token after token overwrites it.

# %%
start = zen.index("Beautiful is")
confirm("16 places in use after 11 tokens", in_use[:16].all() and not in_use[16:].any())
confirm("228 characters, all right", bytes(text).decode() == zen[start : start + 240])

# %% [markdown]
# ## The annotated source
#
# {py:class}`annotated_src.edge.EdgeRunner` is that loop with a memory and good manners.
# It keeps the cache, counts the tokens, and refuses what does not fit.

# %%
show(EdgeRunner.prefill, EdgeRunner.step, EdgeRunner.read, edge_generate)

# %%
for tokens, count in ((list(b"Explicit is better"), 8), (list(prompt), 250), ([], 8)):
    try:
        edge_generate(files["int8"], tokens, count)
    except ValueError as error:
        print(error)

# %% [markdown]
# ## Without torch
#
# Does it need torch somewhere deep down? In the process below any `import torch` fails,
# and so do the converter, jax and transformers. Text becomes ids by `bytes`; with a
# real model's vocabulary, the package `tokenizers` does that, and needs no torch either.

# %%
program = """
import sys

big = ("torch", "jax", "litert_torch", "transformers", "tensorflow", "jaxtyping")
sys.modules |= dict.fromkeys(big)  # importing one now raises ImportError

from annotated_src.edge import edge_generate

prompt = b"Namespaces are"
new = edge_generate(sys.argv[1], list(prompt), max_new_tokens=100, stop_ids=[0])
print((prompt + bytes(new[:-1])).decode())
print("stopped by itself:", new[-1] == 0)
print("loaded:", *sorted({"numpy", "ai_edge_litert", "tokenizers"} & {*sys.modules}))
print("torch is there:", sys.modules["torch"] is not None)
"""
command = [sys.executable, "-c", program, str(files["int8"])]
answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
print(answer)
confirm("the last line of the text", zen.splitlines()[-1] == answer.splitlines()[0])

# %% [markdown]
# From a shell the same is `python -m annotated_src.edge zen.tflite --tokens 78,97,109`.
# What such a process weighs, and how fast it is there, stands in {doc}`/speed_device`.
#
# ## The ladder of equality
#
# Torch's `generate` = the functional model = the loop by hand = the runner, in float32:
# the same ids, and every logit of 228 steps within 1e-4.

# %%
found = generate(model, torch.tensor([list(prompt)]), max_new_tokens=228)
confirm("generate = the loop by hand", found[0].tolist() == text)
(_, _), (functional, sample) = make_entries(model, prefill=16, cache=256).values()
state, stepped = sample["kv"], []
for position, token in enumerate(text[:-1]):
    place = torch.tensor([position], dtype=torch.int32)
    out = functional(torch.tensor([[token]], dtype=torch.int32), place, state)
    state, _ = out["kv"], stepped.append(out["logits"][0, 0])
expected = model(torch.tensor([text[:-1]]))[0]
confirm(
    "the model = its functional form, step by step",
    torch.allclose(torch.stack(stepped), expected, atol=1e-4),
)
runner = EdgeRunner(files["float32"])
on_device = runner.logits(text[:-1], prompt_len=len(prompt))
confirm("by hand = the runner, bit for bit", np.array_equal(by_hand, on_device))
last = expected[len(prompt) - 1 :].numpy()
confirm("torch = the runner", np.allclose(last, on_device, atol=1e-4))
confirm("its ids, too", edge_generate(files["float32"], list(prompt), 228) == text[12:])

# %% [markdown]
# ## Grading int8
#
# The int8 file knows the text as well. Is it as good, then?

# %%
confirm(
    "the same 228 characters",
    edge_generate(files["int8"], list(prompt), 228) == text[12:],
)

small = EdgeRunner(files["int8"])


def grades(tokens, prompt_len=12):
    reference = model(torch.tensor([tokens]))[:, prompt_len - 1 :]
    found = torch.from_numpy(small.logits(tokens, prompt_len))[None]
    return grade(reference, found)


known = grades(text)
unknown = grades(text[::-1])
confirm("on its text: the best byte is the same everywhere", known.agreement == 1)
confirm("with a divergence below 0.001 nats", known.mean_kl < 1e-3)
confirm("backwards: not everywhere", 0.9 < unknown.agreement < 1)
confirm("and 10 times the divergence", unknown.mean_kl > 10 * known.mean_kl)

# %% [markdown]
# None wrong: the second answer. But a text known by heart is an easy exam: on each byte
# the best one leads by far, and rounding never changes the winner. On text that it does
# not know (here its own, backwards) near-ties fall the other way. So grade a quantised
# model teacher-forced, with agreement *and* divergence ({ref}`ch-quantizing`), on text
# like that which it will meet. The real model's grades, on a page of Python's manual,
# are in {doc}`/speed_device`.
#
# Why can the winner only change where two are close? If no logit is off by more than
# $\epsilon$, the gap between any two moves by at most $2\epsilon$. Where the best leads
# by a margin $m$,
#
# $$
# m > 2 \max_v |\hat{z}_v - z_v|
# \quad\Longrightarrow\quad \arg\max_v \hat{z}_v = \arg\max_v z_v.
# $$ (eq-device-margin)

# %%
# Check eq-device-margin.
backwards = text[::-1]
exact = model.double()(torch.tensor([backwards]))[0].numpy()
model.float()
rounded = small.logits(backwards).astype(np.float64)
first, second = np.sort(exact, axis=-1)[:, :-3:-1].T
off = np.abs(rounded - exact).max(axis=-1)
safe = first - second > 2 * off
same = rounded.argmax(-1) == exact.argmax(-1)
confirm("a margin above twice the error keeps the winner", same[safe].all())
confirm("some places have none", not safe.all())
confirm("and every winner that changed is one of them", not safe[~same].any())

# %% [markdown]
# ## What is in the files
#
# In units of the float32 weights:

# %%
weights = sum(w.nbytes for w in model.parameters())
for name, path in files.items():
    kinds = stored_bytes(path)
    graphs = path.stat().st_size - kinds.total()
    parts = [kinds["FLOAT32"] / weights, kinds["INT8"] / weights, graphs / weights]
    print("{:8} float32 {:.2f}, int8 {:.2f}, graphs {:.1f}".format(name, *parts))
matrices = sum(w.numel() for w in model.parameters() if w.ndim == 2)
confirm("each matrix is in int8, the embedding too", kinds["INT8"] == matrices)
tables = sum(table.nbytes for table in (functional.cos, functional.sin))
gains = sum(w.nbytes for w in model.parameters() if w.ndim == 1)
spare = kinds["FLOAT32"] - tables - gains
confirm("float32 is left for gains and tables of angles", 0 <= spare < 1000)
confirm("weights that both entries use are there once", kinds["INT8"] < weights / 3.9)
confirm("the graphs are over a third of the int8 file", 2 * graphs > kinds.total())

# %% [markdown]
# What remains of a file describes the graphs, twice, and holds a scale for each row of a
# matrix. In a model this small that is much; SmolLM2's int8 file is a few parts in a
# hundred larger than its weights ({doc}`/speed_device`).
#
# ## Which bytes move
#
# Decoding reads each weight once and does two operations with it: memory is the limit,
# not arithmetic ({ref}`ch-decoding`). So count bytes. Let the matrices have $W$ weights
# of $w$ bytes and $M$ rows, with a scale of 4 bytes each if $w = 1$. The cache has $L$
# layers, $K$ heads of width $H$ and room for $S$ tokens, keys and values in 4 bytes. A
# step of the runner moves
#
# $$
# b = \underbrace{w W + 4 M\,[\,w = 1\,]}_{\text{weights}}
#   + \underbrace{c}_{\text{attention}}
#   + \underbrace{3 \cdot 2 c}_{\text{copies}},
# \qquad c = 4 \cdot 2 L K H S.
# $$ (eq-device-bytes)
#
# Shapes are fixed: attention reads all $S$ places, also when the text is short. And the
# cache is an argument and a result. So it is copied three times: from numpy into the
# interpreter; there into a new one, with one more token in it; and that one out to
# numpy. A copy reads its bytes and writes them: $2 c$.

# %%
# Check eq-device-bytes.
c = sum(array.nbytes for array in runner.kv.values())
confirm("the runner's cache is 4 · 2 L K H S bytes", c == 4 * 2 * 2 * 2 * 16 * 256)
multiply = [w for w in model.parameters() if w.ndim == 2][1:]  # the embedding does not
for w in (4, 1):
    rows = sum(len(matrix) for matrix in multiply) if w == 1 else 0
    by_formula = w * sum(matrix.numel() for matrix in multiply) + 4 * rows + 7 * c
    counted = figures.step_bytes(config, cache_len=256, width=w)
    confirm(f"the formula with w = {w}", by_formula == counted.total)

token, place = np.array([text[239:]], np.int32), np.array([239], np.int32)
after = decode(tokens=token, input_pos=place, **kv)
index = decode.get_input_details()["kv_k_0"]["index"]
inside = interpreter.get_tensor(index, subgraph_index=1)  # decode's
confirm("what went in is there, as it was", np.array_equal(inside, kv["kv_k_0"]))
confirm("so the new one is beside it", not np.array_equal(inside, after["kv_k_0"]))
changed = sum((kv[name] != after[name]).any(axis=-1).sum() for name in kv)
confirm("all that, to change one place a head", changed == len(kv) * 2)

# %% [markdown]
# Here is SmolLM2 by this formula. Each bar has one saving more than the one above it.

# %% mystnb={"image": {"alt": "Two panels of four horizontal bars: megabytes moved for each token that SmolLM2 writes, made up of weights, cache read by attention, and copies of the cache. With a cache of 256 places: 839 without any saving, 620 with grouped query heads, 218 with int8 weights as well, 147 without copies; weights are most of every bar. With 2,048 places: 2,573, 1,199, 796 and 230; in the third bar the copies, in amber, are two thirds, four times as long as the weights."}, "figure": {"name": "fig-device-bytes", "caption": "Bytes that move for one token of SmolLM2-135M. From top to bottom: a key/value head for each query head, in float32; nine query heads on three; int8 weights; and a cache that is written in place."}} tags=["hide-input"]
figures.draw_budgets([figures.budget_data(SMOLLM2, places) for places in (256, 2048)])

# %%
at = figures.step_bytes(SMOLLM2, cache_len=2048, width=1)
print(f"weights {at.weights / 1e6:.0f} MB, read {at.attended / 1e6:.0f},", end=" ")
print(f"copied {at.copied / 1e6:.0f}")
confirm("the copies are two thirds", at.copied > 2 * (at.weights + at.attended))
short = figures.step_bytes(SMOLLM2, cache_len=256, width=1)
confirm("at 256 places the weights are the most", short.weights > short.copied)
full = figures.step_bytes(SMOLLM2, cache_len=2048)
confirm("int8: a quarter of the weights, yet ...", full.weights > 3.9 * at.weights)
confirm("... two thirds of the step", 0.6 < at.total / full.total < 0.7)
tiny = figures.step_bytes(config, cache_len=256, width=1)
confirm("our small model copies 7 times its weights", tiny.copied > 7 * tiny.weights)

# %% [markdown]
# The answer to the first question: something that nobody asked for. int8 took three
# quarters off the weights, and so made room for what was there all the time.
#
# ## Hand it over
#
# The interpreter's other Python door, `CompiledModel`, takes *buffers*: memory of its
# own, to which you hold a handle. Then nothing needs to pass through numpy but a token
# in and logits out. And the copy in the middle? The operator that writes a cache fills
# the new one from the old one first, unless both are the same memory. So let them be:
# for each tensor of the cache, the output's buffer is the input's.

# %%
with quietly():
    from ai_edge_litert.compiled_model import CompiledModel

    compiled = CompiledModel.from_file(str(files["int8"]))
    names = compiled.get_signature_list()["decode"]
    new_input = compiled.create_input_buffer_by_name
    inputs = {name: new_input("decode", name) for name in names["inputs"]}
    outputs = {name: inputs[name] for name in kv}
    outputs["logits"] = compiled.create_output_buffer_by_name("decode", "logits")
    for name, array in kv.items():
        inputs[name].write(np.zeros_like(array))


def step_in_place(token, position):
    inputs["tokens"].write(np.array([[token]], np.int32))
    inputs["input_pos"].write(np.array([position], np.int32))
    compiled.run_by_name("decode", inputs, outputs)
    return np.array(outputs["logits"].read(128, np.float32))


handed = np.stack([step_in_place(t, i) for i, t in enumerate(text[:-1])])
confirm(
    "bit for bit the runner's logits", np.array_equal(handed, small.logits(text[:-1]))
)

# %% [markdown]
# Nothing is lost, and the amber parts of {numref}`fig-device-bytes` are gone: what the
# functional model promised never to do, the runtime now does behind its back.
# It may, because nobody reads the old cache afterwards. The book's runner stays with
# arrays: you can print them, keep an old one, and compare. For speed, hand over.
#
# ## What each idea brings
#
# The bytes are {eq}`eq-device-bytes` for SmolLM2 with 2048 places. Two ideas of
# {ref}`ch-exporting` are of another kind: query heads folded into rows, so that no key is
# written out once for each head, and a cache that is written as one slice. They change
# operators. What each comes to in milliseconds, measured beside torch and transformers,
# is in {doc}`/speed_device`, and how to measure it yourself.

# %%
unshared = figures.budget_data(SMOLLM2, 2048).rows["no saving"]
no_copies = figures.step_bytes(SMOLLM2, 2048, 1, copies=0)
for idea, before, after in (
    ("heads share keys (GQA)", unshared, full),
    ("int8", full, at),
    ("handing the cache over", at, no_copies),
):
    print(f"{idea:24}{before.total / 1e6:6.0f} -> {after.total / 1e6:4.0f} MB")
counts = {path: operators(path)["decode"] for path in files.values()}
kinds = counts[files["float32"]]
confirm("writing a cache is one operator", kinds.count("DYNAMIC_UPDATE_SLICE") == 4)
confirm("no key is repeated: nothing is broadcast", "BROADCAST_TO" not in kinds)

# %% [markdown]
# :::{admonition} Paper and code
# :class: paper-code
# {cite:t}`pope2022` reckon with two loads from memory for each decoded token: all
# weights, and the keys and values *of the context so far*. Fixed shapes change the
# second: it is the room reserved, from the first token on. And a runtime can add a
# third. So, at the tenth token, a file for 2048 places is slower than one for 256, and
# {doc}`/speed_device` has both: ask for no more room than you need.
# :::

# %%
runner.reset()
moved = []
for token in text[:40]:
    went_in = sum(array.nbytes for array in runner.kv.values())
    runner.step(token)
    moved.append((went_in, sum(array.nbytes for array in runner.kv.values())))
confirm("the first step and the fortieth move the same", len(set(moved)) == 1)
context = figures.cache_bytes(config, 40)
confirm("6 times the context's keys and values", moved[-1][0] > 6 * context)
confirm("a cache for 2048 is 8 times one for 256", at.attended == 8 * short.attended)

# %% [markdown]
# ## The real one
#
# From a folder with weights to a file, and a peek at what it says:
#
# ```shell
# python -m annotated_src.export $(python -m annotated_src.weights) smollm2.tflite \
#     --quantize int8 --prefill 64 --cache 256
# python -m annotated_src.edge smollm2.tflite --tokens 504,3575,282,4649,314
# ```
#
# It takes a minute or two and a few GB of memory, once. The ids are *The capital of
# France is*, and the next two that come back are *Paris* and a full stop. The sizes of the files, what the
# conversion took, milliseconds, and the grades of both files are on the page
# {doc}`/speed_device`; `python -m tests.bench --edge` measures them again on yours.
# (These float32 weights were unpacked from a file of four bits, as {ref}`ch-quantizing`
# has seen: what int8 loses comes on top of that.)
#
# :::{admonition} Break it
# :class: break-it
# Two mistakes in the loop. One: after the prefill, the last token of the prompt is read
# at the last place of the *padded* prompt, 15, instead of at its own. Two: the cache
# that comes out is dropped, and the next step gets the one from before. How many
# characters are right?
# :::


# %%
def wrong_place(tokens, count, room=16):
    """Decode where prefill's tensor ends, not where the prompt does."""
    runner.reset()
    runner.prefill(tokens[:-1])
    runner.length = room - 1
    new = [int(runner.step(tokens[-1]).argmax())]
    while len(new) < count:
        new.append(int(runner.step(new[-1]).argmax()))
    return new


def wrong_memory(tokens, count):
    """Drop what a step has written."""
    scores, new = runner.read(tokens), []
    kept = runner.kv
    for _ in range(count):
        new.append(int(scores.argmax()))
        runner.kv = dict(kept)
        scores = runner.step(new[-1])
    return new


def right_ones(new, expected):
    wrong = [a != b for a, b in zip(new, expected, strict=True)]
    return wrong.index(True) if any(wrong) else len(new)


broken = wrong_memory(list(prompt), 60)
confirm(
    "dropped: it goes wrong within 10 characters", right_ones(broken, text[12:72]) < 10
)
broken = wrong_place(list(prompt), 60)
confirm("misplaced: a wrong character, too", right_ones(broken, text[12:72]) < 60)
whole = text[:16]  # a prompt as long as the prefill
confirm("but right with a prompt of 16", wrong_place(whole, 60) == text[16:76])

# %% [markdown]
# The second mistake gives text that has forgotten itself: each step sees the prompt and
# one token. The first is nastier. It lets junk in between, and passes every test whose
# prompt is as long as the prefill. Test with a shorter one, and with a prompt of one
# token.
#
# ## Exercises
#
# Write your function in a cell of your own and give it to `check`. A question takes its
# name and a letter: `check("room_to_be_safe", "a")`.

# %%
from annotated_src.exercises import check  # noqa: F401 - for your cells
from annotated_src.exercises.on_device import chapter as exercises

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("top_shares")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("top_shares")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
logits = runner.read(list(b"Special "))
by_numpy = exercises["top_shares"].solution(logits, 0.8, 5)
reference = Sample(temperature=0.8, top_k=5).probabilities(
    torch.from_numpy(logits)[None], torch.tensor([list(b"Special ")])
)
confirm("torch's shares", np.allclose(by_numpy, reference[0].numpy(), atol=1e-6))
drawn = np.random.default_rng(0).choice(128, size=4, p=by_numpy / by_numpy.sum())
confirm("drawn from the best five", {*drawn} <= {*np.argsort(logits)[-5:]})

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("winners_safe")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("winners_safe")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
strange = list(b"xyz")
both = [edge_generate(path, strange, 200) for path in files.values()]
parted = right_ones(*both)
confirm("after `xyz` they part", parted < 200)
story = strange + both[0][: parted + 1]
ours, theirs = (r.logits(story, 3).astype(np.float64) for r in (runner, small))
held = exercises["winners_safe"].solution(ours, theirs)
confirm("there the winner was not safe", not held[parted])
errors = np.abs(theirs - ours).max(axis=-1)
usual = np.abs(small.logits(text, 12) - runner.logits(text, 12)).max(axis=-1)
confirm("its error is one as everywhere", errors[parted] < usual.max())
best, second = np.sort(ours[parted])[:-3:-1]
confirm("but the two best were nearly even", best - second < errors[parted] / 2)
# No bug, a near-tie. Both texts are nonsense, for the prompt is. From the first other
# token on the two read different texts, and comparing them says nothing.

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("bytes_of_step")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("bytes_of_step")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
sizes = SMOLLM2.num_layers, SMOLLM2.num_kv_heads, SMOLLM2.head_dim
matrices = figures.product_weights(SMOLLM2), figures.matrix_rows(SMOLLM2)
for width in (1, 4):
    moved = exercises["bytes_of_step"].solution(*matrices, width, *sizes, 2048, 40)
    counted = figures.step_bytes(SMOLLM2, cache_len=2048, width=width).total
    confirm(f"the bar of the figure, width {width}", moved == counted)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("room_to_be_safe")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("room_to_be_safe")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
large = figures.step_bytes(SMOLLM2, cache_len=8192, width=1)
print(f"{large.attended / 1e6:.0f} MB, read four times and written three")
confirm("2.6 GB", round(7 * large.attended / 1e9, 1) == 2.6)
confirm("about 13 times the bytes", round(large.total / short.total) == 13)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("first_calls")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("first_calls")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
calls = exercises["first_calls"].solution(list(prompt), 16)
empty = {name: np.zeros_like(array) for name, array in kv.items()}
read = prefill(**calls["prefill"], **empty)
first = decode(**calls["decode"], **read)["logits"][0, 0]
confirm("the runner's logits, bit for bit", np.array_equal(first, by_hand[0]))
refused = False
try:
    prefill(**{k: v.astype(np.int64) for k, v in calls["prefill"].items()}, **empty)
except ValueError:
    refused = True
confirm("the interpreter refuses int64", refused)


# And prompts longer than 16? Whole calls first, and what is left one by one, since a
# last call that is filled up needs room for its filling.
def read_long(runner, tokens):
    runner.reset()
    size, body = runner.prefill_len, tokens[:-1]
    while len(body) - runner.length >= size:
        chunk = np.array([body[runner.length : runner.length + size]], np.int32)
        places = np.arange(runner.length, runner.length + size, dtype=np.int32)
        runner.kv = prefill(tokens=chunk, input_pos=places, **runner.kv)
        runner.length += size
    for token in body[runner.length :]:
        runner.step(token)
    return runner.step(tokens[-1])


expected = runner.logits(text[:50])[-1]
confirm("50 tokens", np.allclose(read_long(runner, text[:50]), expected, atol=1e-4))

# Without room: the table of angles has 256 rows, so asking for a 257th is an error. Clip
# the places, and nobody complains: a slice that does not fit is moved until it does, and
# overwrites what stood there.
chunk, places = np.ones((1, 16), np.int32), np.arange(250, 266, dtype=np.int32)
try:
    prefill(tokens=chunk, input_pos=places, **empty)
except RuntimeError:
    print("places 250 to 265 are refused")
clipped = np.minimum(places, 255)
out = prefill(tokens=chunk, input_pos=clipped, **empty)
written = np.flatnonzero(out["kv_k_0"][0, 0].any(axis=-1))
print("clipped at 255, written are", written[0], "to", written[-1])
confirm("ten places too early", written[0] == 240)

# %% [markdown]
# ## What to remember
#
# - Inference is a loop around two calls, with arrays in and out. The runner needs numpy
#   and an interpreter; torch stays at home.
# - Prefill is as long as the file says. Fill the prompt up, read its last token with
#   `decode`, at *its* place; the mask hides the junk, and tokens overwrite it.
# - Test with a prompt shorter than the prefill.
# - Grade int8 teacher-forced: agreement and divergence, on text that it does not know by
#   heart.
# - Bytes are time. Weights are read once; a functional cache is read once and copied
#   three times, all of its room, at each token. After int8 that can be the most.
# - Export no more room than you need. Where speed counts, let one buffer be the cache
#   that goes in and the one that comes out.
#
# **Where to read on.** ai-edge-litert: `interpreter.py`, `SignatureRunner.__call__`
# (`SetTensor` and `GetTensor` are two of the copies); `compiled_model.py`,
# `CompiledModel.run_by_name`; `tensor_buffer.py`, `TensorBuffer`. LiteRT:
# `tflite/kernels/dynamic_update_slice.cc` (the third, and when it is left out).
# litert-torch:
# `generative/custom_ops/dynamic_update_slice.py`, `generative/layers/kv_cache.py`,
# `KVCacheEntry`. transformers: `cache_utils.py`, `StaticLayer` (fixed shapes in torch).
# Those who serve many at once reserve no room at all until it is used:
# {cite:t}`kwon2023`.
#
# You have taken four decoders apart, and put one of them on a device. The next one that
# you meet is a few lines of difference.

# %% tags=["remove-cell"]
temporary.cleanup()
