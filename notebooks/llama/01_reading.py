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
# (ch-reading)=
# # Reading a decoder
#
# :::{admonition} In this chapter
# :class: at-a-glance
# **30 minutes · gentle.** Afterwards you can say what goes into a decoder and what comes
# out, name its parts and their shapes, score a sentence, make the model write, and say
# why its words can depend on the past only.
# :::

# %% tags=["remove-input"]
from annotated_src.figures.model_map import ModelMap

ModelMap("everything")

# %% [markdown]
# Type *The capital of France is*, and a language model goes on: *Paris*. What is computed
# in between is no secret. It is a few hundred lines of Python, and by the end of this
# book you will have read them all. This first chapter walks once around the machine.
#
# The machine is a **decoder**, and a decoder is a function. A text is cut into
# **tokens**: words and pieces of words. All the tokens that a model knows are its
# **vocabulary**, and a token's number in that list is its **id**. Ids go in at the top of
# the map; at the bottom, after every token, comes one score for each entry of the
# vocabulary: how well it would fit *next*. Everything a language model does is this
# function, called again and again. (What the boxes do is told below, under *The parts*.)
#
# :::{admonition} Predict before you run
# :class: predict
# A model with a vocabulary of 49152 reads "The capital of France is", which is five
# tokens.
#
# - How many scores come out?
# - You change *France* to *Japan*. After which of the five words do the scores change?
#
# Write both answers down.
# :::
#
# **How to use this book.**
#
# - *Reading?* Stay on this page: what stands under a cell was printed by that cell, and a
#   line with a tick ✓ is a claim that the machine has checked. `make book` renders these
#   pages into `.build/html`; open `index.html` there, from disk, without a network.
# - *Tinkering?* In the project's folder, `make lab` installs what is needed and opens the
#   chapters in JupyterLab. Pick one, change a number, run it, see which tick fails. The
#   first run fetches the model (93 MB); a laptop without a graphics card will do.
# - *In class?* Each chapter ends in exercises with times; solutions stay shut until you
#   open them.
#
# You should have met Python, a little PyTorch, and vectors and matrices. The rest is
# explained where it comes up.

# %%
import math
from unittest.mock import patch

import torch
import transformers
from torch.nn import functional as F

import annotated_src
from annotated_src import attention
from annotated_src.checkpoint import load_model
from annotated_src.figures import reading as figures
from annotated_src.generate import generate
from annotated_src.models.llama import Llama, LlamaConfig
from annotated_src.sampling import greedy
from annotated_src.show import confirm, show
from annotated_src.tokenizer import TextTokenizer
from annotated_src.weights import smollm2

transformers.utils.logging.disable_progress_bar()
_ = torch.set_grad_enabled(False)  # nothing is trained here

# %% [markdown]
# ## Ids in, scores out
#
# The model of this book is real: SmolLM2-135M-Instruct {cite:p}`allal2025`, 135 million
# trained numbers, built like Meta's Llama models and small enough for a laptop. Loading
# it and its **tokenizer**, which turns text into ids and back, takes two lines;
# {ref}`ch-llama` opens up the first of them.

# %%
model = load_model(smollm2())
tokenizer = TextTokenizer.from_pretrained(smollm2())

text = "The capital of France is"
ids = tokenizer.encode(text)
for token in ids[0].tolist():
    print(f"{token:6}  {tokenizer.decode([token])!r}")
confirm("ids and text say the same", tokenizer.decode(ids[0]) == text)

# %% [markdown]
# On the left the id, on the right its piece of text. A piece that is frequent enough has
# an id of its own; the space belongs to the word after it. Rare words are cut into several
# pieces, rare characters into their bytes, and the way back gives the same text:

# %%
for sample in ("llama", "Llamas hum", "camelopardalis", "¿Qué? 你好 🦙"):
    there = tokenizer.encode(sample)
    pieces = [tokenizer.decode([token]) for token in there[0].tolist()]
    confirm(
        f"{sample}: {len(pieces)} tokens, and back",
        tokenizer.decode(there[0]) == sample,
    )

# %% [markdown]
# Now the function itself. One row of ids goes in. Out comes, for each token, a row of
# scores, called **logits**: any real numbers, larger for words that fit better. (From here
# on we say *word* where *token* would be exact.)

# %%
logits = model(ids)
print("ids", tuple(ids.shape), "to logits", tuple(logits.shape))
confirm("five times 49152 scores", logits.numel() == 5 * 49152 == 245_760)

# %% [markdown]
# Scores become probabilities by the *softmax*: exponentials make them positive, and a
# division makes them sum to one. Let $z_{tv}$ be the logit of word $v$ after token $t$,
# and $x_1, \dots, x_t$ the tokens read so far. Then
#
# $$
# p(v \mid x_1, \dots, x_t) = \frac{e^{z_{tv}}}{\sum_u e^{z_{tu}}}.
# $$ (eq-reading-softmax)
#
# By hand, for a vocabulary of three words, with every number visible:

# %%
# Check eq-reading-softmax.
three = torch.tensor([math.log(4), 0.0, math.log(3)], dtype=torch.float64)
print(
    "exp  ",
    [round(z, 3) for z in three.exp().tolist()],
    "sum",
    round(three.exp().sum().item(), 3),
)
print("share", [round(p, 3) for p in (three.exp() / three.exp().sum()).tolist()])
confirm(
    "torch's softmax says 4/8, 1/8, 3/8",
    torch.allclose(three.softmax(0), three.new_tensor([0.5, 0.125, 0.375])),
)
confirm(
    "a number added to all logits changes nothing",
    torch.allclose((three + 7).softmax(0), three.softmax(0)),
)
row = logits[0, -1].double()
confirm(
    "real logits: the formula is torch's softmax",
    torch.allclose(row.exp() / row.exp().sum(), row.softmax(0)),
)

# %% mystnb={"image": {"alt": "Five panels, one for each word of The capital of France is. Each shows the five likeliest next tokens as bars. After capital, of has 71 percent; after of, the leads with 11 percent and France has 9; after France, is has 64; after is, Paris has 77 percent and London 1. The word that really came is amber. After The, the likeliest is a hyphen with 42 percent, and capital is not among the five."}, "figure": {"name": "fig-reading-guesses", "caption": "One call, five guesses: the likeliest words after each token of *The capital of France is Paris*. Amber is the word that came. A raised dot is a space, the bent arrow a line end."}} tags=["hide-input"]
guesses = figures.guesses_data(model, tokenizer, text + " Paris")
figures.draw_guesses(guesses)

# %%
best = guesses.probabilities[-1]
confirm("the best guess after 'is' is Paris", guesses.guesses[-1][0] == "·Paris")
confirm("with a probability of about three quarters", 0.74 < best[0] < 0.80)
confirm("ten times that of any other word", best[0] > 10 * best[1])

# %% [markdown]
# {numref}`fig-reading-guesses` is the whole idea. Nobody asked a question, and nobody
# gave the model a list of capitals. It has seen much text, and *Paris* is how such text
# goes on.
#
# ## The parts
#
# What happens between ids and logits? Follow the map at the top downwards. Its shapes are
# written in nine letters, the same in every file of the package `annotated_src`, which
# holds all the code of this book. Here is its table of contents:

# %%
show(annotated_src)

# %% [markdown]
# Do not learn this table by heart; it says which chapter answers which question.
#
# | Part | What it is for | Chapter |
# |---|---|---|
# | embedding | Gives each id a vector of $D$ numbers: row *id* of a table. | {ref}`ch-llama` |
# | RMSNorm | Brings a vector to a known size before a part reads it. | {ref}`ch-norms` |
# | q, k, v; scores, softmax | The only place where tokens meet. Each asks with a query, earlier ones answer with keys, and their values are averaged. | {ref}`ch-attention` |
# | rotate | Turns queries and keys by position, so that attention knows how far apart two tokens are. | {ref}`ch-rope` |
# | fewer k, v than q | Several query heads share one key and value head, which saves memory. | {ref}`ch-heads` |
# | KV cache | Keeps keys and values of tokens already read, so that nothing is computed twice. | {ref}`ch-cache` |
# | gate, silu, up, down | The feed-forward network: each token on its own, wide in the middle. Most parameters sit here. | {ref}`ch-activations` |
# | the thick line and + | The residual stream: each part adds to the vector, none replaces it. | {ref}`ch-llama` |
# | head | Compares the vector with each of the $V$ words: the logits. | {ref}`ch-llama` |
#
# What is inside the dashed frame is called a **block**, or a layer. It happens $L = 30$
# times, each time with other weights (the trained numbers). Do the real tensors have the shapes of
# the map? We read two texts of five tokens at once, a *batch*, and listen at the first
# block with hooks: functions that torch calls with what leaves a module.

# %%
c = model.config
sizes = {
    "B": 2,
    "T": 5,
    "S": 5,
    "N": c.num_heads,
    "K": c.num_kv_heads,
    "H": c.head_dim,
    "D": c.embed_dim,
    "F": c.ffn_dim,
    "V": c.vocab_size,
}
expected = {  # what the map says; names with a dot are modules of the model
    "embedding": "B T D",
    "blocks.0.attention_norm": "B T D",
    "queries": "B N T H",
    "keys": "B K S H",
    "values": "B K S H",
    "attended": "B N T H",
    "blocks.0.attention.out_proj": "B T D",
    "blocks.0.ffn_norm": "B T D",
    "blocks.0.ffn.gate_proj": "B T F",
    "blocks.0.ffn.down_proj": "B T D",
    "blocks.0": "B T D",
    "norm": "B T D",
    "logits": "B T V",
}
two = torch.cat([ids, tokenizer.encode("The capital of Japan is")])
shapes, attend = {}, attention.attend


def listen(name):
    def hook(_module, _inputs, out):
        shapes[name] = tuple(out.shape)

    return hook


def attend_and_tell(queries, keys, values, mask):
    out = attend(queries, keys, values, mask)
    shapes.update(
        queries=tuple(queries.shape),
        keys=tuple(keys.shape),
        values=tuple(values.shape),
        attended=tuple(out.shape),
    )
    return out


# Hooks hear modules. Inside attention we listen by a patch: a function that stands in.
modules = dict(model.named_modules())
hooks = [modules[n].register_forward_hook(listen(n)) for n in expected if n in modules]
with patch.object(attention.Attention, "attend", staticmethod(attend_and_tell)):
    shapes["logits"] = tuple(model(two).shape)
for hook in hooks:
    hook.remove()

print(*(f"{letter} = {size}" for letter, size in sizes.items()), sep=", ")
for name, letters in expected.items():
    print(f"{name:28} {letters:8} {shapes[name]}")
mapped = {
    name: tuple(sizes[letter] for letter in letters.split())
    for name, letters in expected.items()
}
confirm("every shape is what its letters say", shapes == mapped)

# %% [markdown]
# Nine query heads, but three key and value heads. And width $D$ everywhere between the
# parts: that is what lets them be stacked.
#
# ## Only the past
#
# The second question: which scores can a word change? Swap one word at a time, and watch
# how far each guess moves: 0 % if it stays the same, 100 % if all its probability goes to
# other words.

# %% mystnb={"image": {"alt": "A square of five rows, swaps of one word each, and five columns, the guesses after each word. All cells left of the diagonal are 0. On and right of it they are blue: swapping France for Japan moves 9 percent of the guess after that word and 90 percent of the guess after is, which becomes Tokyo. Swapping is for lies makes it in."}, "figure": {"name": "fig-reading-notice", "caption": "Who notices? Each row swaps one word; each number is the share of the probability that moves to other words. Left of the swap nothing moves, not by one bit."}} tags=["hide-input"]
swaps = ["A", " animal", " in", " Japan", " lies"]
notice = figures.notice_data(model, tokenizer, text, swaps)
figures.draw_notice(notice)

# %%
changed = ids.clone()
changed[0, -1] = tokenizer.encode(swaps[-1])[0, 0]
confirm(
    "another last word: the four rows before are equal, bit for bit",
    torch.equal(model(changed)[0, :4], logits[0, :4]),
)
confirm("and the last is not", not torch.equal(model(changed)[0, 4], logits[0, 4]))
confirm(
    "below the diagonal every number is exactly zero",
    (notice.moved.tril(-1) == 0).all(),
)
confirm("France to Japan moves Paris to Tokyo", notice.says[3] == "·Tokyo")

# %% [markdown]
# So the answer is: after *France*, a little, and after *is*, very much. This is
# **causality**: row $t$ of the logits is a function of $x_1, \dots, x_t$ and of
# nothing later. Attention's mask makes it so ({ref}`ch-attention`). It is why one call
# can make five honest guesses: no guess has seen its answer.
#
# ## What a text is worth
#
# How probable does the model find a whole text? Given its first token, take the
# probability of the second, times that of the third given the first two, and so on:
#
# $$
# p(x_2, \dots, x_T \mid x_1) = \prod_{t=2}^{T} p(x_t \mid x_1, \dots, x_{t-1}).
# $$ (eq-reading-chain)
#
# That is the chain rule of probability, not an approximation. Because of causality one
# call gives all the factors. The check is a complete one: a tiny decoder with random
# weights and a vocabulary of five words, and *all* $5^3 = 125$ ways to go on from word 2.
# If no guess has peeked at its answer, the 125 products sum to one.

# %%
# Check eq-reading-chain.
torch.manual_seed(1)
tiny = Llama(
    LlamaConfig(5, 2, 12, 4, 2, 6, 10, 16, 1e-5, 1e4, tied_head=False)  # V = 5
).double()
ways = torch.cartesian_prod(torch.tensor([2]), *[torch.arange(5)] * 3)  # (125, 4)


def log_probabilities(model, tokens):
    """Of each token but the first, given those before it: one call. (B, T - 1)"""
    guesses = model(tokens[:, :-1]).log_softmax(-1)
    return guesses.gather(-1, tokens[:, 1:, None])[..., 0]


worth = log_probabilities(tiny, ways).sum(-1).exp()
print(len(worth), "texts, the likeliest of probability", f"{worth.max():.2g}")
confirm(
    "together they have probability 1", torch.allclose(worth.sum(), worth.new_tensor(1))
)
starts = worth.unflatten(0, (5, 25)).sum(-1)
direct = tiny(ways[:1, :1])[0, 0].softmax(-1)
confirm(
    "the 25 texts with one second word sum to that word's probability",
    torch.allclose(starts, direct),
)

# %% [markdown]
# A product of many small numbers soon is too small for a computer, so we add logarithms
# instead. Now the ladder that every chapter climbs, with the same number on each rung:
# plain loops, the package, torch's own function (*cross entropy*, the quantity that
# training lowers, is minus this sum), and the original: `LlamaForCausalLM` of Hugging
# Face's library transformers, with the same weights.


# %%
def score_by_loops(tokens):
    total = 0.0
    for t in range(1, tokens.shape[1]):
        scores = model(tokens[:, :t])[0, -1].tolist()  # a call for every prefix
        chosen = scores[tokens[0, t]]
        total += chosen - math.log(sum(math.exp(score) for score in scores))
    return total


def score(text):
    return log_probabilities(model, tokenizer.encode(text)).sum().item()


whole = tokenizer.encode(text + " Paris")
looped, at_once = score_by_loops(whole), score(text + " Paris")
nn = -F.cross_entropy(model(whole)[0, :-1], whole[0, 1:], reduction="sum").item()
original = transformers.LlamaForCausalLM.from_pretrained(smollm2())
theirs = -original(whole, labels=whole).loss.item() * (whole.shape[1] - 1)
print(f"log-probability {at_once:.1f}")
confirm("prefix by prefix = one call", abs(looped - at_once) < 1e-3)
confirm("one call = minus torch's cross entropy", abs(nn - at_once) < 1e-3)
confirm("one call = transformers, same weights", abs(theirs - at_once) < 1e-3)

# %% [markdown]
# So texts can be compared. Call this sum the score of a *text*, not to be mixed up with a
# word's logit. The higher it is (the nearer to 0), the likelier the text:

# %%
for ending in (" Paris", " London", " banana"):
    print(f"{text}{ending:8} {score(text + ending):4.0f}")

# %% [markdown]
# :::{admonition} Break it
# :class: break-it
# The classic mistake: an index off by one. Row $t$ is the guess for token $t + 1$. Read
# it as the guess for token $t$, which the model has just seen, and nothing crashes.
# :::


# %%
def wrong_score(text):
    tokens = tokenizer.encode(text)
    guesses = model(tokens).log_softmax(-1)
    return guesses.gather(-1, tokens[..., None]).sum().item()


sentence = text + " Paris"
per_token = score(sentence) / 5, wrong_score(sentence) / 6
print("log-probability per token: right {:.1f}, wrong {:.1f}".format(*per_token))
confirm("hardly better than chance", per_token[1] < math.log(1 / 49152) + 2)
shuffled = tokenizer.decode(whole[0, [0, 4, 2, 5, 1, 3]])
print(f"the right score of {shuffled!r}: {score(shuffled):.1f}")

# %% [markdown]
# The symptom: a model that seems to know nothing, since a word hardly ever follows
# itself. A right score tells order from disorder: shuffled, the sentence is worth
# about $e^{19}$ times less.
#
# ## Writing
#
# To write, take the best guess, append it, and call again. Four lines:

# %%
written = ids
for _ in range(5):
    best = model(written)[:, -1].argmax(dim=-1)
    written = torch.cat([written, best[:, None]], dim=1)
print(repr(tokenizer.decode(written[0])))

# %% [markdown]
# Only the last row is used; the rows before it guess words that are already there. The
# package's {py:func}`annotated_src.generate.generate` writes the same words without
# computing anything twice ({ref}`ch-cache`), and leaves the choice to a *sampler*. Here
# the sampler is *greedy*: it always takes the best word.

# %%
show(generate, greedy)

# %%
mine = generate(model, ids, max_new_tokens=5)
everything = torch.ones_like(ids)
yours = original.generate(
    ids, attention_mask=everything, max_new_tokens=5, do_sample=False, pad_token_id=2
)
confirm("four lines = generate", torch.equal(mine, written))
confirm("generate = transformers' generate", torch.equal(mine, yours))


def lead(tokens, start):
    """By how much the best logit leads the second, where that is least."""
    best = model(tokens)[0, start - 1 : -1].topk(2).values
    return (best[:, 0] - best[:, 1]).min()


confirm("and no step was a near tie", lead(written, ids.shape[1]) > 0.1)
del original

# %% [markdown]
# The last line is a matter of honesty: where two words are all but equally good, the last
# digit of a sum may decide, and another computer may write another word.
#
# ## Asking
#
# So how does a thing that goes on with text answer questions? By going on with the text
# of a conversation. *Instruct* in a model's name says that it was trained further on
# such texts. They are written in a fixed form, the **chat template**, with special tokens
# at the start and the end of each turn:

# %%
question = "How many days are there in a week?"
chat = tokenizer.chat([{"role": "user", "content": question}])
print(tokenizer.tokenizer.decode(chat[0].tolist(), skip_special_tokens=False))

# %% [markdown]
# The text ends where the assistant's turn begins. What follows such text is an answer,
# and after an answer follows the token that ends a turn, which tells us to stop.

# %%
answer = generate(model, chat, max_new_tokens=30, stop_ids=[tokenizer.eos_id])
print(tokenizer.decode(answer[0, chat.shape[1] :]))
confirm(
    "it stopped by itself",
    answer[0, -1] == tokenizer.eos_id and answer.shape[1] < chat.shape[1] + 30,
)
confirm("no step was a near tie", lead(answer, chat.shape[1]) > 0.1)

# %% [markdown]
# "Approximately": it is a small model. Forget the template, and its answer is silence:

# %%
bare = tokenizer.encode(question)
wrong_answer = generate(model, bare, max_new_tokens=30, stop_ids=[tokenizer.eos_id])
print(repr(tokenizer.decode(wrong_answer[0, bare.shape[1] :])))
confirm(
    "the first word drawn ends the turn",
    wrong_answer[0, bare.shape[1]] == tokenizer.eos_id,
)
confirm("clearly so", lead(wrong_answer, bare.shape[1]) > 0.5)

# %% [markdown]
# Nothing is broken. The question stands there like a user's turn that is complete, and
# the best guess is the token that ends a turn.
#
# :::{admonition} Paper and code
# :class: paper-code
# The *decoder* of the Transformer paper {cite:p}`vaswani2017` has three parts a block:
# self-attention, attention to an encoder, feed-forward. What is called a decoder today
# has no encoder, and no part for one. And that paper's decoder reads its text shifted by
# one place, so that the first word is guessed, too. Here nothing stands in front of the
# text: $x_1$ is given, and {eq}`eq-reading-chain` starts at 2.
# :::

# %%
print(*(name for name, _ in model.blocks[0].named_children()), sep=", ")
confirm(
    "one attention, one feed-forward",
    [name for name, _ in model.blocks[0].named_children()]
    == ["attention_norm", "attention", "ffn_norm", "ffn"],
)
confirm(
    "nothing is put in front of a text, not even a special token",
    tokenizer.tokenizer.decode(ids[0, :1].tolist(), skip_special_tokens=False) == "The",
)

# %% [markdown]
# ## Exercises
#
# From here on each chapter ends with exercises, and they answer back. Write your
# function in a cell of your own and give it to `check`; a question takes its name and a
# letter: `check("rows_of_logits", "a")`. Here somebody tries an exercise of
# {ref}`ch-heads` and meets a mistake that is well known:

# %%
from annotated_src.exercises import check
from annotated_src.exercises.reading import chapter as exercises


def my_repeat_kv(x, times):
    return x.repeat(1, times, 1, 1)


check(my_repeat_kv)

# %% [markdown]
# You see the smallest input that shows the mistake, what was expected, and what came
# instead; then, if many have believed the same before you, why, and where to read again.
# Below each exercise wait two hints, one inside the other, and the solution. `progress()`
# shows what you have solved: `from annotated_src.exercises import progress`. What each
# exercise catches is proven on the page {doc}`/kill_matrix`.

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("surprises")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("surprises")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
tokens = tokenizer.encode(text + " banana")
bits = exercises["surprises"].solution(model(tokens), tokens)[0]
words = [tokenizer.decode([token]) for token in tokens[0, 1:].tolist()]
for word, surprise in zip(words, bits.tolist(), strict=True):
    print(f"{word:10} {surprise:3.0f} bits")
total = -score(text + " banana") / math.log(2)
confirm("the bits add up", abs(bits.sum() - total) < 1e-2)
confirm("banana surprises most", words[bits.argmax()] == " banana")

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("score_endings")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("score_endings")


# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
def choose(prompt, endings):
    """Let the model take a multiple choice test, all endings in one batch."""
    texts = [tokenizer.encode(prompt + ending)[0] for ending in endings]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    prompt_length = tokenizer.encode(prompt).shape[1]
    lengths = [len(ids) for ids in texts]
    scores = exercises["score_endings"].solution(
        model(ids), ids, prompt_length, lengths
    )
    return endings[scores.argmax()]


confirm(
    "the opposite of hot is cold",
    choose("The opposite of hot is", [" banana", " warm", " cold"]) == " cold",
)
confirm(
    "the capital of France is Paris",
    choose(text, [" banana", " London", " Paris"]) == " Paris",
)
factors = torch.full((60,), 0.1)
confirm(
    "sixty factors of a tenth are zero in float32, their logarithms add up",
    factors.prod() == 0 and abs(factors.log().sum() - 60 * math.log(0.1)) < 1e-3,
)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("rows_of_logits")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("rows_of_logits")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
taken = 8192 * c.vocab_size * 4
held = sum(weight.nbytes for weight in model.parameters())
print(f"{taken / 1e9:.1f} GB, {taken / held:.0f} times the model")
last = model(ids, last_logits_only=True)
confirm("one row can be had alone", last.shape[1] == 1)
confirm("it is the same", torch.allclose(last, model(ids)[:, -1:], atol=1e-3))
alone = model(ids[:, -1:])
confirm("the last token alone gives another", not torch.allclose(alone, last, atol=1))

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("write_greedily")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("write_greedily")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
prompts = ("The capital of France is", "The opposite of hot is", "The end")
first_rows = [model(tokenizer.encode(prompt))[0, 0] for prompt in prompts]
print(*(repr(tokenizer.decode([row.argmax().item()])) for row in first_rows))
confirm(
    "same first token, same first row",
    all(torch.allclose(first_rows[0], row, atol=1e-3) for row in first_rows),
)
last_row = model(tokenizer.encode(prompts[1]))[:, -1]
confirm("the last row says cold", tokenizer.decode(last_row.argmax(-1)) == " cold")

# %% [markdown]
# ## What to remember
#
# - Ids $(B, T)$ in, logits $(B, T, V)$ out: one guess of the next word after every token.
# - Row $t$ depends on the tokens up to $t$. That is causality, and it is exact.
# - The guesses multiply to the probability of the text; one call gives all factors.
# - Writing is a loop: guess, append, again. Answering is writing in a chat's form.
#
# ## Where to read on
#
# - The parts, one chapter each, from the smallest: {ref}`ch-activations`.
# - `annotated_src/__init__.py`: the order in which to read the package.
# - transformers, `models/llama/modeling_llama.py`: `LlamaForCausalLM.forward`;
#   `generation/utils.py`: `GenerationMixin._sample` is the loop that writes.
# - {cite:t}`vaswani2017` for the first decoder, {cite:t}`touvron2023` for Llama.
