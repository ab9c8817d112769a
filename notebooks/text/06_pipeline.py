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
# (ch-pipeline)=
# # The pipeline
#
# :::{admonition} In this chapter
# :class: at-a-glance
# **50 minutes · easy.** Afterwards you can say which function runs when a prompt becomes
# an answer, here and in transformers, hold a conversation from Python and from the
# command line, count what each turn sends again, save most of it with a prompt cache,
# name the reason why the saving fails at times, and score texts.
# :::

# %% tags=["remove-input"]
from annotated_src.figures.station_map import StationMap

StationMap("everything")

# %% [markdown]
# :::{admonition} Predict before you run
# :class: predict
# You ask SmolLM2 "What is the capital of Japan?", and it says "The capital of Japan is
# Tokyo."
#
# - Between the call and the answer, how many *different* functions of this book's package
#   run, and how many lines of code are they? How many in transformers?
# - Somebody forgets the chat template and sends the bare question. What does the model
#   say?
# - In a conversation of three short questions, what share of the tokens that the model
#   reads had it read before?
#
# Write three answers down.
# :::

# %%
import io
import itertools
import math
import warnings
from contextlib import redirect_stdout
from unittest.mock import patch

import torch
import transformers

from annotated_src import command_line
from annotated_src.figures import calls
from annotated_src.figures import pipeline as figures
from annotated_src.generate import generate
from annotated_src.models.llama import Llama, LlamaConfig
from annotated_src.pipeline import TextGeneration, read_stop_ids
from annotated_src.sampler import Sample
from annotated_src.sampling import greedy
from annotated_src.scoring import perplexity, token_log_probs
from annotated_src.show import confirm, show
from annotated_src.small_chatglm import SMALL_CHATGLM
from annotated_src.weights import smollm2

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
_ = torch.set_grad_enabled(False)  # nothing is trained here

# %% [markdown]
# ## The whole road as one plain loop
#
# Every station has had its chapter: {ref}`ch-from-pretrained`, {ref}`ch-tokens`,
# {ref}`ch-decoding`, {ref}`ch-sampling`. A pipeline is a model and a tokenizer. Load
# them, take them out, and walk past all stations once with these two and nothing else.
# The conversation is written out by hand, in the form that SmolLM2 was trained on; there
# is no cache, no batch.

# %%
directory = smollm2()
pipe = TextGeneration.from_pretrained(directory)
model, tokenizer = pipe.model, pipe.tokenizer


def answer_by_loop(question, most=20):
    text = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
        "trained by Hugging Face<|im_end|>\n"
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(text)  # text to ids
    asked = ids.shape[1]
    for _ in range(most):
        best = model(ids)[:, -1:].argmax(dim=-1)  # score, choose
        if best == tokenizer.eos_id:
            break
        ids = torch.cat([ids, best], dim=1)  # one more
    return tokenizer.decode(ids[0, asked:])  # ids to text


question = "What is the capital of Japan?"
by_loop = answer_by_loop(question)
print(by_loop)

# %% [markdown]
# That is a pipeline: **preprocess** (the text and its ids), **forward** (the loop),
# **postprocess** (the decoding). What is missing is what people ask for next: a cache,
# several prompts at once, the checkpoint's own template and stop ids, words that appear
# as they come. {py:class}`annotated_src.pipeline.TextGeneration` has these, and the
# same three steps:
#
# $$
# \text{answer} = \operatorname{post}\bigl(\operatorname{forward}
# \bigl(\operatorname{pre}(\text{prompt})\bigr)\bigr).
# $$ (eq-pipeline-steps)

# %%
chat = [{"role": "user", "content": question}]
called = pipe(chat)
print(called)

# %% [markdown]
# ## Three steps, by hand
#
# **Preprocess.** A list of messages goes in; ids come out, with a mark for each that is a
# token and not padding. Give it two prompts, so that there is padding to see.

# %%
show(TextGeneration.preprocess, TextGeneration.encode)

# %%
other = [{"role": "user", "content": "Name the four seasons."}]
batch = pipe.preprocess([chat, other])
for name, value in batch._asdict().items():
    print(f"{name:8}", tuple(value.shape), value[:, :4].int().tolist(), "...")

raw = tokenizer.tokenizer  # of the tokenizers library: it can show special tokens
print(raw.decode(batch.tokens[0].tolist(), skip_special_tokens=False))

# %% [markdown]
# The system message was not ours: this template adds it, where there is none. The second
# row is two tokens shorter, so it begins with padding ({ref}`ch-decoding` says why on the
# left).
#
# **Forward.** Move the batch to where the weights are, let `generate` do its work, keep
# what is new, and bring it back to the CPU.

# %%
show(TextGeneration.forward, TextGeneration._on_device)

# %%
ids = pipe.forward(batch, max_new_tokens=10)
print(ids.tolist())

# %% [markdown]
# The first answer has eight ids, the last of them the stop id, 2. Then it waits for its
# neighbour, repeating the stop id.
#
# **Postprocess.** Cut each row at its stop id, and decode the rest.

# %%
show(TextGeneration.postprocess)

# %%
# Check eq-pipeline-steps.
answers = pipe.postprocess(ids)
print(answers)
confirm("the three steps = the call", called == answers[0])
confirm("the loop = the pipeline", by_loop == answers[0])

# %% [markdown]
# Which ids stop? `generation_config.json` says, where the directory has one; it may name
# several. Without it, the tokenizer's end token does.

# %%
show(read_stop_ids)

# %%
print("stop ids", pipe.stop_ids, [raw.id_to_token(i) for i in pipe.stop_ids])

# %% [markdown]
# A model of another kind needs nothing new. ChatGLM's `pad` returns positions and a mask
# in place of `is_token` ({ref}`ch-prefix-mask`); `forward` hands on whatever the batch
# holds, by name.

# %%
chatglm = TextGeneration.from_pretrained(SMALL_CHATGLM)
verse = "And the king said unto"
print(list(chatglm.preprocess([verse])._asdict()))
words = chatglm(verse, max_new_tokens=12)
print(words)
confirm("it answers", len(words) > 10)

# %% [markdown]
# ## The call graph, recorded
#
# Nobody has to draw from memory which function calls which. Python tells a *profiler*
# of every call and return (`sys.setprofile`). Ours keeps a stack of the functions of
# one package, and counts each way to reach one.

# %%
show(calls.record)

# %% [markdown]
# Run it on our pipeline, and on that of transformers: the same directory, the same
# question, greedily.

# %%
theirs = transformers.pipeline("text-generation", model=str(directory), device="cpu")


def their_answer(prompt, most=200, **options):
    options = {"do_sample": False, "return_full_text": False} | options
    found = theirs(prompt, max_new_tokens=most, **options)
    return found[0]["generated_text"]


their_answer(chat, 1)  # once before, so that nothing is loaded on the way
our_road = calls.record("annotated_src", lambda: pipe(chat))
their_road = calls.record("transformers", lambda: their_answer(chat))
confirm("the same answer", our_road.answer == their_road.answer == answers[0])

# %% [markdown]
# In the graph, each box is a function of ours that ran, below the one that called it, and
# in brown the symbol of transformers that it stands for. The numbers at the right edge of
# the boxes say how often each was called; the bars, how many lines of code it has
# (without docstrings, comments and blank lines). Read it from top to bottom: it is the
# sentence "prompt becomes answer".

# %% mystnb={"image": {"alt": "A tree of some 20 boxes, from TextGeneration.__call__ down. Under it stand preprocess with encode, chat, render_chat and pad; forward with _on_device and generate; postprocess with stream_text and decode. In generate, _decode makes a cache once and calls Llama.forward and greedy 8 times each. Beside each box two bars compare lines of code: ours are 2 to 28, those of transformers up to 254, for generate."}, "figure": {"name": "fig-pipeline-tree", "caption": "From prompt to answer, recorded while it ran. Blue: ours; brown: what it stands for in transformers. *Not here*: not in this call, but once before, or under other settings. *No function of its own*: a few lines inside a larger one. What `render_chat` and `greedy` call is left out."}} tags=["hide-input"]
ends = ["render_chat", "greedy", "Llama.new_cache", "Llama.forward"]
figures.draw_tree(figures.tree_data(our_road, their_road, leaves=ends))

# %% [markdown]
# Eight ids, eight calls of the model: one prefill and seven steps. One of these calls is
# part one of this book:

# %% mystnb={"image": {"alt": "The tree under Llama.forward, called 8 times: embedding, positions, mask, rotation tables, then LlamaBlock.forward 240 times with RMSNorm, Attention and GatedFeedForward inside, and a last RMSNorm 8 times. LlamaDecoderLayer, LlamaAttention, LlamaMLP, DynamicLayer.update and sdpa_attention_forward of transformers were called 240 times as well."}, "figure": {"name": "fig-pipeline-model", "caption": "Inside the model: 8 calls of 30 blocks are 240, on both sides. Theirs counts all norms in one (488 is 480 and 8), turns queries and keys in one call where ours makes two, and computes the frequencies of the rotation when the model is made."}} tags=["hide-input"]
ends = ["padded_causal_mask", "GatedFeedForward.forward"]
figures.draw_tree(figures.tree_data(our_road, their_road, "Llama.forward", ends))

# %% [markdown]
# Do not take the brown words on trust. Each symbol is looked up in the installed
# transformers, and the parts of the model must have run equally often.

# %%
for name in (
    "TextGeneration.preprocess",
    "render_chat",
    "_decode",
    "LlamaBlock.forward",
):
    module, _, symbol = figures.TWINS[name].partition(":")
    print(f"{name:26} {module.removeprefix('transformers.')}: {symbol}")

found = {s: calls.code_of(s) for s in figures.TWINS.values() if s}
confirm("every symbol exists", all(c.co_name in s for s, c in found.items()))
pairs = {
    "Llama.forward": "LlamaModel.forward",
    "LlamaBlock.forward": "LlamaDecoderLayer.forward",
    "RMSNorm.forward": "LlamaRMSNorm.forward",
    "Attention.forward": "LlamaAttention.forward",
    "rotate_half": "rotate_half",
    "LayerCache.append": "DynamicLayer.update",
    "GatedFeedForward.forward": "LlamaMLP.forward",
}
confirm(
    "the parts of the model ran equally often",
    all(our_road.calls(a) == their_road.calls(b) for a, b in pairs.items()),
)
confirm("blocks: 30 for each of 8 ids", our_road.calls("LlamaBlock.forward") == 240)

# %% [markdown]
# Now the first question at the top. Count every function on the road once, and its lines
# of code: the same ruler for both.

# %% mystnb={"image": {"alt": "Source code seen from afar, each line a short bar, 100 lines to a column. Ours fills fewer than five columns, all blue. That of transformers, at the same scale, fills over forty columns in four bands: about two fifths of it orange, in functions that ours stand for, the rest grey."}, "figure": {"name": "fig-pipeline-map", "caption": "Every line of code on the road, at one scale. Orange: functions that ours stand for. Grey: functions without a twin here, such as configuration, deprecations and options that this call does not use."}} tags=["hide-input"]
twins = list(found.values())
map_data = calls.map_data(our_road, their_road, twins)
calls.draw_map(map_data)

# %%
ours, others = our_road.functions(), their_road.functions()
lines, their_lines = calls.count_lines(ours), calls.count_lines(others)
confirm("ours: 40 to 60 functions", 40 < len(ours) < 60)
confirm("transformers: a hundred more", len(others) > len(ours) + 100)
confirm("ours: 350 to 500 lines", 350 < lines < 500)
confirm("transformers: 7 to 14 times as many", 7 < their_lines / lines < 14)
orange = sum(row[2] for row in map_data.theirs) / len(map_data.theirs)
confirm("a third to a half of theirs has a twin here", 0.33 < orange < 0.5)
longest = max(len(calls.code_lines(code)) for code in ours)
confirm("no function of ours has more than 40 lines", longest <= 40)
door = found["transformers.generation.utils:GenerationMixin.generate"]
confirm("their `generate` has more than 200", len(calls.code_lines(door)) > 200)

# %% [markdown]
# The first answer, then: some 45 functions and between four and five hundred lines; in
# transformers, ten times the lines. Do not read {numref}`fig-pipeline-map` as a score.
# The grey pays for what ours does not do: other architectures, beams, assistants, caches
# of many kinds, and arguments of years ago that somebody's program still passes. The
# point is another. When you open `generate` and meet its hundreds of lines, look for
# what our twenty do. It is in there.
#
# ## The same road in transformers
#
# The name of a task picks the class. It is a dictionary.

# %%
from transformers.pipelines import check_task

task, entry, _ = check_task("text-generation")
print(task, "->", entry["impl"].rpartition(".")[2])
print("loads with", entry["pt"][0].__name__)
confirm("the object is of that class", type(theirs).__name__ in entry["impl"])

# %% [markdown]
# Its `__call__` tells a conversation from a text (`is_valid_message`), sorts your keyword
# arguments into three heaps, one for each step (`_sanitize_parameters`), and then, for a
# single prompt, `run_single`: three lines, our three steps. `forward` is a frame around
# `_forward`: device, no gradients, tensors to the device, tensors back
# (`_ensure_tensor_on_device`); `_forward` calls `model.generate`. Here is the way down
# to the first of the eight calls of the model, the prefill, as it was recorded. Open the
# source at any line of it:

# %%
way = next(path for path in their_road.counts if path[-1] == "LlamaModel.forward")
print(*[name for name in way if "<locals>" not in name], sep="\n")  # no decorators
confirm(
    "`_sample` is the loop, also when nothing is sampled",
    "GenerationMixin._sample" in way,
)

# %% [markdown]
# Two small differences in how they spare memory. transformers switches gradients off
# (`no_grad`); ours uses `inference_mode`, which also forgets what autograd would need to
# notice changes in place. And a *list* of prompts goes through transformers' pipeline one
# by one, unless you ask for a `batch_size`; ours pads them into one batch.

# %%
modes = []


def spying(logits, tokens):
    modes.append(torch.is_inference_mode_enabled())
    return greedy(logits, tokens)


pipe(chat, max_new_tokens=2, sampler=spying)
confirm("ours: inference mode", modes == [True, True])
confirm("theirs: no_grad", theirs.get_inference_context() is torch.no_grad)
confirm("theirs: no batch, where none is asked for", theirs._batch_size is None)

# %% [markdown]
# ## The ladder of equality
#
# Loop = three steps = call, above. Next, the padded row of the batch against
# transformers, which gets that prompt alone; then a text that is no conversation, with a
# repetition penalty.

# %%
found = theirs(other, do_sample=False, max_new_tokens=10, return_tensors=True)
new = found[0]["generated_token_ids"][-10:]
confirm("the same ten ids, padded in a batch or alone", new == ids[1].tolist())

colours = "The three primary colours are red,"
penalised = Sample(repetition_penalty=1.3, top_k=1)  # of one, the best is drawn
words = pipe(colours, max_new_tokens=4, sampler=penalised)
print("penalised:", words)
confirm(
    "with a repetition penalty, too",
    words == their_answer(colours, 4, repetition_penalty=1.3),
)

# %% [markdown]
# What is drawn cannot be equal, but the probabilities that it is drawn from can: here
# with all the options of a typical call of `pipeline`.

# %%
spice = {"repetition_penalty": 1.1, "temperature": 0.7, "top_k": 40, "top_p": 0.95}
one = batch.tokens[:1]
processed = theirs.model.generate(
    one,
    attention_mask=torch.ones_like(one),
    do_sample=True,
    max_new_tokens=1,
    output_scores=True,
    return_dict_in_generate=True,
    **spice,
).scores[0]
probabilities = Sample(**spice).probabilities(model(one)[:, -1], one)
confirm(
    "the same probabilities, 0 for the same tokens",
    torch.allclose(processed.softmax(dim=-1), probabilities, atol=1e-4)
    and torch.equal(processed == -torch.inf, probabilities == 0),
)

# %% [markdown]
# :::{admonition} Docs and code
# :class: paper-code
# A page about the pipeline may print `pipe(prompt)[0]["generated_text"]` and show an
# answer. Three things in that line are easy to miss. The prompt comes back in front of
# the answer, unless `return_full_text=False`. Without a word about it, the pipeline
# *draws*: its class has defaults of its own (`do_sample=True`, temperature 0.7, 256 new
# tokens). And `model.generate`, which it calls, has others: greedy, 20 new tokens. So
# the same model gives two answers, by the door through which you come in.
# :::

# %%
full = theirs(colours, do_sample=False, max_new_tokens=3)
print(full[0]["generated_text"])

settings = []


def spy(self, ids, **named):  # in place of the loop: it only looks at the settings
    settings.append(named["generation_config"])
    return ids


with patch.object(type(theirs.model), "_sample", spy), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # generate advises to say max_new_tokens
    theirs(chat)
    theirs.model.generate(batch.tokens[:1])
by_pipeline, by_generate = settings
room = [by.max_length - batch.tokens.shape[1] for by in settings]
print("pipeline: sample", by_pipeline.do_sample, by_pipeline.temperature, room[0])
print("generate: sample", by_generate.do_sample, room[1])
confirm("256 new tokens by the one door, 20 by the other", room == [256, 20])

# %% [markdown]
# ## A conversation sends everything again
#
# A model has no memory between calls. What you said is remembered because you *send it
# again*: the messages grow by one answer and one question each turn, and the template
# writes the whole out. Let turn $k$ bring $u_k$ new tokens (the question, and the marks
# around it) and an answer of $a_k$ tokens, the stop id among them. Then its prompt has
#
# $$
# p_k = p_{k-1} + a_{k-1} + u_k, \qquad p_1 = u_1,
# $$ (eq-pipeline-turn)
#
# tokens, and $n$ turns read
#
# $$
# R = \sum_{k=1}^{n} p_k
# = \sum_{k=1}^{n} (n - k + 1)\, u_k + \sum_{k=1}^{n-1} (n - k)\, a_k :
# $$ (eq-pipeline-read)
#
# the first words are read $n$ times. Here are three turns.

# %% mystnb={"image": {"alt": "Three bars, one for each turn. The first is 37 new tokens and an answer of 8. The second begins with 45 tokens read before, then 14 new, answer 8. The third: 67 read before, 13 new, answer 8. The part read before is most of the later bars."}, "figure": {"name": "fig-pipeline-chat", "caption": "What each turn sends, in tokens. All that was read or written before is read again."}} tags=["hide-input"]
said = [
    "What is the capital of Japan?",
    "And of France?",
    "Thank you!",
]
turns = figures.chat_data(pipe, said, max_new_tokens=20)
figures.draw_chat(turns)

# %%
# Check eq-pipeline-turn and eq-pipeline-read.
for turn in turns:
    print(f"> {turn.said}\n{turn.answer}")
n = len(turns)
new = [turn.prompt - turn.shared for turn in turns]
answered = [turn.new for turn in turns]
confirm(
    "each prompt is the last one, its answer, and what is new",
    all(
        b.prompt == a.prompt + a.new + u
        for (a, b), u in zip(itertools.pairwise(turns), new[1:], strict=True)
    ),
)
read = sum(turn.prompt for turn in turns)
by_formula = sum((n - k) * new[k] + (n - k - 1) * answered[k] for k in range(n))
confirm(f"{read} tokens read in three turns, as the sum says", read == by_formula)
again = sum(turn.shared for turn in turns)
print(f"{again / read:.0%} of them had been read, or written, before")

# %% [markdown]
# That answers the third question. *And of France?* means something only because the turn
# before was sent along. (To a thank-you this small model has no better reply than Paris.)
# With turns of equal length $R$ grows with the square of their number.
#
# ## A prompt cache
#
# But the keys and values of those tokens had been computed. By {eq}`eq-cache-chunk` they
# are still right, as long as the text before them is the same. So keep the cache when an
# answer ends, compare the new prompt with the ids that the cache has seen, rewind to
# where they part ({ref}`ch-cache`), and prefill the rest.


# %%
class Memory:
    """A cache that outlives an answer, and the ids that it has seen."""

    def __init__(self, room):
        self.cache, self.seen = model.new_cache(1, room), []
        self.read = []  # tokens of each prefill

    def answer(self, prompt, most=20):
        kept = min(figures.common_prefix(self.seen, prompt), len(prompt) - 1)
        for layer in self.cache:
            layer.length = kept
        step, ids = prompt[kept:], list(prompt)
        self.read.append(len(step))
        for _ in range(most):
            scores = model(torch.tensor([step]), self.cache, last_logits_only=True)
            step = [int(scores.argmax())]
            ids += step
            if step[0] in pipe.stop_ids:
                break
        self.seen = ids[:-1]  # the last was chosen, but never read
        return ids[len(prompt) :]


memory, messages, replies = Memory(room=200), [], []
for words in said:
    messages.append({"role": "user", "content": words})
    reply = memory.answer(pipe.encode(messages)[0].tolist())
    replies.append(*pipe.postprocess(torch.tensor([reply])))
    messages.append({"role": "assistant", "content": replies[-1]})

print("tokens in each prefill:", memory.read, "instead of", [t.prompt for t in turns])
confirm("the same three answers", replies == [turn.answer for turn in turns])
confirm(
    "each turn reads what is new, and the stop id, which nobody had read",
    memory.read == [new[0], *(u + 1 for u in new[1:])],
)
print(f"{read} tokens become {sum(memory.read)}")

# %% [markdown]
# So a prompt cache turns the square into a sum. It rests on one condition, which looks
# too plain to check: *the ids of the next turn begin with the ids of this one.* Here it
# held. Here it does not:

# %%
talk = [{"role": "user", "content": "What is a llama?"}]
prompt = pipe.encode(talk)
out = generate(model, prompt, max_new_tokens=24, stop_ids=pipe.stop_ids)
(reply,) = pipe.postprocess(out[:, prompt.shape[1] :])
talk += [
    {"role": "assistant", "content": reply},
    {"role": "user", "content": "Are you sure?"},
]
following = pipe.encode(talk)[0].tolist()
same = figures.common_prefix(out[0].tolist(), following)
print(reply)
print("written  :", *map(raw.id_to_token, out[0, same - 2 : same + 2].tolist()))
print("sent back:", *map(raw.id_to_token, following[same - 2 : same + 1]))
confirm("the common beginning ends in the midst of the answer", prompt.shape[1] < same)
confirm("some tokens before its end", same < out.shape[1])
confirm(
    "the words are the same, the ids are not",
    tokenizer.decode(out[0, same:-1]) == tokenizer.decode(following[same : same + 1]),
)

# %% [markdown]
# The model wrote `al` and `us`, two tokens; the tokenizer, given the same letters, prefers
# `alus`, one ({ref}`ch-tokens`: encoding goes by rank). Decoding and encoding again does
# not give back the ids, when the model has spelt a word in its own way, as it may with
# rare ones. So a cache must compare ids and never assume; or the program keeps the ids
# of the answer and sends those.
#
# ## Words as they come
#
# `stream` yields the answer in pieces. It holds text back while a character is
# incomplete ({ref}`ch-tokens`), so the pieces always join to what the call returns.
# transformers does it with a *streamer*, an object to which `generate` hands each id,
# and which shows whole words only.

# %%
pieces = list(pipe.stream(chat))
print(pieces)
confirm("joined = the call", "".join(pieces) == answers[0])


class Collecting(transformers.TextStreamer):
    def on_finalized_text(self, text, stream_end=False):
        collected.append(text)


collected = []
streamer = Collecting(theirs.tokenizer, skip_prompt=True, skip_special_tokens=True)
streamer.put(batch.tokens[0])  # what `generate` does: first the prompt,
for token in ids[0, :8]:
    streamer.put(token[None])  # then each id as it comes,
streamer.end()  # and a word when all is said
print(collected)
confirm("theirs joined = ours joined", "".join(collected) == "".join(pieces))

# %% [markdown]
# Theirs lags a word behind: it cannot know that a word is over until the next begins.
#
# ## From the command line
#
# `python -m annotated_src.generate` is a stream that is written to the terminal:
#
# ```
# python -m annotated_src.generate "Tell me a story." --temperature 0.7 --seed 3
# ```
#
# With `--chat` it asks for line after line and keeps the messages, as above. A line on
# the input is a turn; `/clear` forgets. Here is the function that it runs, with two lines
# on its input.

# %%
options = command_line.make_parser().parse_args(["--chat"])
typed = io.StringIO("\n".join(said[:2]))
with patch("sys.stdin", typed), redirect_stdout(io.StringIO()) as screen:
    command_line.chat(pipe, options, greedy)
print(screen.getvalue())
confirm("the same two answers", screen.getvalue().splitlines() == replies[:2])

# %% [markdown]
# ## Scoring
#
# The pipeline runs a second way: not "what comes next?" but "how well did you expect
# what came?". For a text $x_1 \dots x_T$ the model gives a probability to each token after
# the first, and the **perplexity** is the inverse of their geometric mean:
#
# $$
# \operatorname{ppl}(x) = \exp\Bigl(-\frac{1}{T - 1}
# \sum_{t=2}^{T} \log p(x_t \mid x_1, \dots, x_{t-1})\Bigr).
# $$ (eq-pipeline-perplexity)
#
# It is e to the loss of training, so transformers must agree. A perplexity of 10 means:
# on average as unsure as between ten tokens that are equally likely.

# %%
show(token_log_probs)

# %%
# Check eq-pipeline-perplexity.
torch.manual_seed(6)
tiny = Llama(
    LlamaConfig(31, 2, 12, 6, 2, 4, 20, 64, 1e-5, 10_000.0, tied_head=True)
).double()
row = torch.randint(31, (1, 9))
product = 1.0
for t in range(1, 9):
    probabilities = tiny(row[:, :t])[0, -1].softmax(dim=-1)
    product *= probabilities[row[0, t]].item()
confirm(
    "float64: the inverse of the geometric mean = the package",
    math.isclose(product ** (-1 / 8), perplexity(tiny, row), rel_tol=1e-5),
)

for text in (
    "Once upon a time, there was a little girl who lived in a village near the forest.",
    "forest the near village a in lived who girl little a was there, time a upon Once.",
):
    row = tokenizer.encode(text)
    value = perplexity(model, row)
    loss = theirs.model(row, labels=row).loss.item()
    print(f"{float(f'{value:.2g}'):6,.0f}  {text}")
    confirm(
        "e to transformers' loss", math.isclose(math.exp(loss), value, rel_tol=1e-3)
    )

# %% [markdown]
# The same words, in order and in disorder: hundreds of times the perplexity.
#
# For an answer you sum the log-probabilities of its tokens only, given the prompt
# ({eq}`eq-tokens-answer`). So you can ask the model to *choose* instead of to write:

# %%
prompt = pipe.encode(chat)
options = {}
for city in ("Tokyo", "Osaka", "Paris"):
    answer = pipe.tokenizer.encode(f"The capital of Japan is {city}.")
    scores = token_log_probs(model, torch.cat([prompt, answer], dim=1))
    options[city] = scores[0, prompt.shape[1] - 1 :].sum().item()
    print(f"{city}: log-probability {options[city]:5.1f}")
confirm(
    "in this order", sorted(options, key=options.get, reverse=True) == list(options)
)
gap = options["Osaka"] - options["Paris"]
confirm("Paris: a hundred times less likely than Osaka", gap > math.log(100))

# %% [markdown]
# :::{admonition} Break it
# :class: break-it
# Three classics. One: the template is forgotten. Two: the stop id is forgotten. Three:
# the prompts are padded on the right.
# :::

# %%
bare = pipe(question, max_new_tokens=10)
print("without the template it says:", repr(bare))
scores = model(tokenizer.encode(question))[0, -1].log_softmax(dim=-1)
ends = tokenizer.eos_id
print(f"the first token ends the answer, with probability {scores[ends].exp():.2f}")
confirm("nothing at all", bare == "")
confirm("transformers says as much", their_answer(question, 10) == bare)
confirm("the end is the most likely token", scores.argmax() == ends)

# %% [markdown]
# The second answer: it says *nothing*. It was trained on conversations, and where a
# question mark ends a text with no mark of who spoke, the likeliest next thing is that
# the message is over. Nothing is broken, no error, an empty string. ({ref}`ch-tokens`
# measures what each part of the template is worth.)

# %%
never = TextGeneration(model, tokenizer, stop_ids=[tokenizer.vocab_size])
goes_on = never.forward(pipe.preprocess([chat]), max_new_tokens=24)[0].tolist()
goes_on = raw.decode(goes_on, skip_special_tokens=False)
print(goes_on)
confirm("it ends its answer", "Tokyo.<|im_end|>" in goes_on)
confirm("and then speaks for you", "<|im_start|>user\nI'm" in goes_on)

# %% [markdown]
# The model never stops; *we* stop. It goes on with the likeliest conversation, and that has
# a user who says something. A front end that shows no special tokens shows this as one
# answer that drifts off.

# %%
count = int((~batch.is_token[1]).sum())
flipped, mark = batch.tokens[1:].roll(-count), batch.is_token[1:].roll(-count)
try:
    generate(model, flipped, max_new_tokens=4, is_token=mark)
except ValueError as error:
    print(error)
lost = generate(model, flipped, max_new_tokens=4)[:, flipped.shape[1] :]
print("not told:", repr(raw.decode(lost[0].tolist(), skip_special_tokens=False)))
confirm("it goes on elsewhere", lost.tolist() != ids[1:, :4].tolist())
confirm(
    "and padding cannot be told by its id: this text has some of the same",
    (batch.tokens[0] == tokenizer.pad_id).any() and batch.is_token[0].all(),
)

# %% [markdown]
# `generate` refuses, because it is told. Not told (no `is_token`), it goes on from the
# last column, which is no word at all: behind the ends of two messages it writes the
# name of a role, not an answer. Here the padding's id is that of `<|im_end|>`, which each
# message ends with: whoever derives the mask from the ids hides the ends of messages.
# `pad` derives it from the lengths.

# %% [markdown]
# ## Exercises
#
# Write your function in a cell of your own and give it to `check`. A question takes its
# name and a letter: `check("cut_the_prompt", "a")`.

# %%
from annotated_src.exercises import check  # noqa: F401 - for your cells
from annotated_src.exercises.pipeline import chapter as exercises

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("answer_scores")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("answer_scores")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
# The cities of the section on scoring, in one call of the model.
cities = [f"The capital of Japan is {city}." for city in options]
answers = [tokenizer.encode(city) for city in cities]
lengths = [answer.shape[1] for answer in answers]
rows = tokenizer.pad([torch.cat([prompt, answer], dim=1) for answer in answers])
logits = model(rows.tokens, is_token=rows.is_token)
sums = exercises["answer_scores"].solution(logits, rows.tokens, lengths).tolist()
confirm("Tokyo", sums.index(max(sums)) == 0)
confirm(
    "the sums = those one by one",
    all(
        math.isclose(a, b, abs_tol=1e-3)
        for a, b in zip(sums, options.values(), strict=True)
    ),
)
confirm("the lengths differ, so there was padding", len(set(lengths)) > 1)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("still_to_read")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("still_to_read")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
# The three prompts of the conversation above, with the ids that the cache had seen.
seen, reads = [], []
for k in range(3):
    ids_of_turn = pipe.encode(messages[: 2 * k + 1])[0].tolist()
    reads.append(len(exercises["still_to_read"].solution(seen, ids_of_turn)))
    written = tokenizer.encode(replies[k])[0].tolist()  # but not the stop id
    seen = ids_of_turn + written
confirm("what the memory read in each turn", reads == memory.read)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("cut_the_prompt")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("cut_the_prompt")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
text = raw.decode(batch.tokens[0].tolist(), skip_special_tokens=False)
decoded = tokenizer.decode(batch.tokens[0])
print(len(text), "characters were encoded,", len(decoded), "come back")
both = tokenizer.decode(torch.cat([batch.tokens[0], ids[0]]))
confirm("the answer is there", both.endswith(called))
confirm("the marks have more characters", len(text) - len(decoded) > len(called))
confirm("so nothing is left of it", both[len(text) :] == "")

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("drop_the_oldest")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("drop_the_oldest")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
before = pipe.encode(messages[:3])[0].tolist()  # two questions
grown = pipe.encode(messages[:5])[0].tolist()
trimmed = pipe.encode(messages[2:5])[0].tolist()
kept = [figures.common_prefix(before, prompt) for prompt in (grown, trimmed)]
print(f"of {len(before)} tokens, grown keeps {kept[0]}, trimmed {kept[1]}")
system = pipe.encode([{"role": "user", "content": ""}])
confirm("no more than the system message and the next role", kept[1] < system.shape[1])

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("seed_in_a_batch")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("seed_in_a_batch")


# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
def drawn(prompts):
    sampler = Sample(generator=torch.Generator().manual_seed(5))
    return chatglm(prompts, max_new_tokens=8, sampler=sampler)


together = drawn([verse, "The earth was"])
confirm("the same batch, the same answers", drawn([verse, "The earth was"]) == together)
confirm("alone, another", drawn([verse])[0] != together[0])

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("until_stop")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("until_stop")

# %% [markdown]
# ## What to remember
#
# - Preprocess, forward, postprocess: text to ids, ids to more ids, new ids to text. In
#   transformers, `Pipeline.run_single`.
# - A record of what ran is better than a diagram from memory. Ours: some 45 functions, a
#   few hundred lines. transformers has a twin for most of them, and a hundred more.
# - The template is part of the prompt: without it this model says nothing.
# - The model never stops by itself. Stop ids, or the limit, end an answer.
# - A conversation sends everything again. A prompt cache reads each token once, as long
#   as the *ids* begin alike; words are not enough.
# - `pipeline` draws by default, `generate` does not.
# - Perplexity is e to the mean loss.
#
# ## Where to read on
#
# transformers: `pipelines/__init__.py`, `pipeline` and `SUPPORTED_TASKS`;
# `pipelines/base.py`, `Pipeline.__call__`, `run_single`, `forward`,
# `_ensure_tensor_on_device`, `get_inference_context`; `pipelines/text_generation.py`,
# `TextGenerationPipeline` with its `_default_generation_config`; `generation/utils.py`,
# `GenerationMixin.generate` and `_sample`; `generation/streamers.py`, `TextStreamer` and
# `TextIteratorStreamer`; `generation/configuration_utils.py`, `GenerationConfig`. Ours:
# {py:class}`annotated_src.pipeline.TextGeneration`,
# {py:func}`annotated_src.command_line.main`, {py:func}`annotated_src.scoring.perplexity`.
# Next, {ref}`ch-training` goes to where weights come from.
