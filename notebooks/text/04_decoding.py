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
# (ch-decoding)=
# # Prefill and decode
#
# :::{admonition} In this chapter
# :class: at-a-glance
# **50 minutes · moderate.** Afterwards you can write the loop that turns a model into a
# text, say what each of its calls computes and reads, let rows of different lengths
# share a batch without a trace, stop each row where it should stop, and find all of it
# in transformers' `generate`.
# :::

# %% tags=["remove-input"]
from annotated_src.figures.station_map import StationMap

StationMap("prefill", "decode")

# %% [markdown]
# :::{admonition} Predict before you run
# :class: predict
# SmolLM2-135M reads a prompt of 512 tokens and writes an answer of 64.
#
# - Of all the multiplications and additions, what share goes into the prompt?
# - Of all the bytes that must be fetched from memory, what share is for the prompt?
# - Beside it in the batch stands a shorter prompt, filled up to 512 with padding. On
#   which side, and does it matter?
#
# Write the two percentages down.
# :::

# %%
from contextlib import ExitStack
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
import transformers

from annotated_src.checkpoint import load_model
from annotated_src.figures import decoding as figures
from annotated_src.figures.cache import SMOLLM2, product_weights
from annotated_src.generate import _decode, _stop_table, generate, generate_stream
from annotated_src.masks import padded_causal_mask
from annotated_src.models.llama import Llama, LlamaConfig
from annotated_src.positions import padded_positions
from annotated_src.sampler import Sample
from annotated_src.show import confirm, show
from annotated_src.tokenizer import TextTokenizer
from annotated_src.weights import smollm2

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
_ = torch.set_grad_enabled(False)  # nothing is trained here

# %% [markdown]
# ## The loop in ten lines
#
# A model gives scores for one more token. A text is what you get by asking again and
# again. Here is the loop twice: first it reads the whole text at every step; then it
# keeps a cache, and reads only what is new.


# %%
def write_by_rereading(model, tokens, num_new):
    for _ in range(num_new):
        best = model(tokens, last_logits_only=True)[:, -1].argmax(dim=-1)
        tokens = torch.cat([tokens, best[:, None]], dim=1)
    return tokens


def write(model, tokens, num_new):
    cache = model.new_cache(len(tokens), tokens.shape[1] + num_new)
    step = tokens  # prefill: the whole prompt
    for _ in range(num_new):
        logits = model(step, cache, last_logits_only=True)[:, -1]
        step = logits.argmax(dim=-1)[:, None]  # decode: what came last
        tokens = torch.cat([tokens, step], dim=1)
    return tokens


directory = smollm2()
real, tokenizer = load_model(directory), TextTokenizer.from_pretrained(directory)
sun = tokenizer.encode("The sun")
written = write(real, sun, 20)
print(tokenizer.decode(written[0]))
confirm(
    "re-reading at every step: the same first 8 ids",
    torch.equal(write_by_rereading(real, sun, 8), written[:, :10]),
)
best = real(written)[:, 1:-1].argmax(dim=-1)  # after two tokens of prompt
confirm("one pass over all: each is the best next", torch.equal(best, written[:, 2:]))

# %% [markdown]
# (The single pass is re-reading, all steps at once: a row does not know what comes
# after it.) Why the cache may be kept is {ref}`ch-cache`. This chapter is about the
# loop around it: what its two kinds of call cost, rows that begin and end in different
# places, and who may look while it runs.
#
# A model small enough to see every number: after $n$ it always says $n + 1$, and after
# 9 it says 0. It has no weights; it writes down what it is asked.


# %%
class CountingModel:
    """After n comes n + 1, and after 9 comes 0."""

    config = LlamaConfig(10, 0, 0, 0, 0, 0, 0, 12, 0.0, 0.0, True)  # 12: its context

    def __init__(self):
        self.calls = []

    def new_cache(self, batch_size, max_seq_len):
        self.room = (batch_size, max_seq_len)

    def __call__(self, tokens, cache, last_logits_only, **given):
        self.calls.append(tokens.tolist())
        following = (tokens[:, -1:] + 1) % 10
        return torch.nn.functional.one_hot(following, 10).float()  # (B, 1, 10)


counting = CountingModel()
text = generate(counting, torch.tensor([[3, 4, 5], [8, 8, 8]]), max_new_tokens=4)
for number, call in enumerate(counting.calls, 1):
    print("call", number, "prefill" if number == 1 else "decode ", call)
print("text  ", text.tolist())
print("room for", counting.room[1], "tokens in each of", counting.room[0], "rows")

# %% [markdown]
# Four new tokens took four calls. The first took in three tokens a row, each later one
# a single token, and the last token of all (7, and 2) was said but never read. With a
# prompt of $p$ tokens and $n$ new ones, $p + n - 1$ tokens pass through the layers.
#
# Prefill and decode are not two functions. They are one, called with $T = p$ and with
# $T = 1$.
#
# ## Operations
#
# {ref}`ch-cache` has counted whole texts. Here we count single calls, and with two
# things more: $B$ rows, and a head that is asked about $h$ tokens of a row only. Let
# $P_b$ be the number of weights in the blocks' matrices, and $VD$ that of the head.
# Attention costs $A = 4LNH$ operations for each pair of a token and a key, in all
# layers together. A call on $T$ tokens with $c$ in the cache costs
#
# $$
# \Phi(B, T, c, h) = B \bigl( T\,(2 P_b + A\,(c + T)) + 2 h V D \bigr),
# $$ (eq-decoding-call)
#
# and an answer is the sum over its calls.
#
# By hand, for $V = 5$, one block, $D = 4$, $N = 2$, $K = 1$, $H = 2$, $F = 3$: the
# matrices of attention hold 48 numbers and those of the feed-forward network 36, so
# $P_b = 84$; $VD = 20$; $A = 16$. Three tokens at once: $3\,(168 + 16 \cdot 3) + 40 =
# 688$.
#
# Beside the toy and the real model we want a small random one: made by transformers,
# written to a folder, and read by our loader, so that both can be asked.

# %%
torch.manual_seed(8)
theirs = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=36,
        max_position_embeddings=96,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
    )
)
theirs = theirs.double().eval()
for name, weight in theirs.named_parameters():
    if "norm" in name:
        weight.uniform_(0.5, 1.5)
with TemporaryDirectory() as folder:
    theirs.save_pretrained(folder)
    model = load_model(folder, torch.float64)
tokens = torch.randint(97, (2, 12))

# %%
# Check eq-decoding-call.
toy = Llama(LlamaConfig(5, 1, 4, 2, 1, 2, 3, 8, 1e-5, 10_000.0, tied_head=True))


def counted(run, *args, **named):
    return figures.counted_flops(lambda: run(*args, **named))


def next_call(B, T, c):
    """The next T tokens of each of B rows, and a cache that holds c."""
    ids, cache = torch.ones(B, c + T).long(), model.new_cache(B, c + T)
    if c:
        model(ids[:, :c], cache)
    return ids[:, c:], cache


found = counted(toy, torch.tensor([[0, 1, 2]]), last_logits_only=True)
confirm("the toy: 688 by the counter, too", found == 688)
for B, T, c in ((1, 1, 20), (2, 12, 0), (3, 4, 9)):
    for h in sorted({1, T}):
        found = counted(model, *next_call(B, T, c), last_logits_only=h == 1)
        confirm(
            f"B = {B}, T = {T:2}, c = {c:2}, h = {h:2}: {found:9,} = formula",
            found == figures.call_flops(model.config, T, c, B, num_logits=h),
        )
found = counted(generate, real, sun, max_new_tokens=2)
confirm(
    f"SmolLM2, an answer of 2 tokens: {found:,} = formula",
    found == figures.answer_data(SMOLLM2, sun.shape[1], num_new=2).flops.sum(),
)

# %% [markdown]
# The counter is PyTorch's own. It watches the matrix products that really run (the
# fused attention is spelled out for it), and the numbers are equal, not close. So let
# the formula speak for lengths that would take too long to run. How much work is the
# *next* token, when the text already has so many?

# %% mystnb={"image": {"alt": "Two panels. Above, operations for the next token against tokens in the text, both axes logarithmic. Without a cache the curve climbs from 0.27 billion to 6.5 trillion; with a cache it is flat for the first few hundred tokens and then bends up a little. At 1,000 tokens an arrow spans 833 times. Below, the flat curve on plain axes: a constant floor of blocks and head, 269 million, and a wedge of attention that grows with the text. A dashed line marks 3,892 keys, where attention is more than half."}, "figure": {"name": "fig-decoding-token", "caption": "The work for one more token. Below: what it consists of when there is a cache. The floor is the weights, each used once; the wedge is the look back."}} tags=["hide-input"]
costs = figures.token_cost_data(SMOLLM2)
figures.draw_token_cost(costs)

# %%
ratio = costs.without[999] / costs.with_cache[999]
confirm("at 1,000 tokens: 833 times", round(ratio.item()) == 833)
confirm(
    "up to 3,891 keys the weights are at least half",
    (costs.attention <= costs.blocks + costs.head).sum() == 3891,
)

# %% [markdown]
# ## Whose logits you want
#
# To train, you want the scores after every token: $h = T$. To write, only those after
# the last. The head is one matrix of $V \times D$, but it is large, and a prefill would
# ask it $p$ times for one answer.

# %%
V_D = SMOLLM2.vocab_size * SMOLLM2.embed_dim
whole = figures.call_flops(SMOLLM2, 512, num_logits=512)
print(f"512 rows of scores: {2 * 512 * V_D / whole:.1%} of the prefill's operations,")
print(f"and {512 * SMOLLM2.vocab_size * 4 / 1e6:.0f} MB in float32")

# %% [markdown]
# (The larger the model, the smaller the share: {ref}`ch-llama` has the table.) In
# transformers `last_logits_only` is `logits_to_keep`, in its earlier versions
# `num_logits_to_keep`, and `generate` sets it to 1 on its own; you will see it do so
# below.
#
# ## Bytes
#
# Before a number can be multiplied it has to come from memory. One call needs every
# weight once, however many tokens it takes in, and the cache of all its rows. With $M =
# 2LKH$ numbers kept for a token, $P = P_b + VD$, and $b$ bytes to a number, it must
# read
#
# $$
# \Psi(B, T, c) = b \,\bigl( P + B M\,(c + T) \bigr)
# $$ (eq-decoding-bytes)
#
# bytes. (At least: what does not fit into the processor's own memory is fetched more
# often.) The check, {py:class}`annotated_src.figures.decoding.BytesRead`, watches every
# matrix product and every copy, and notes which bytes of the weights and the cache it
# is given.

# %%
# Check eq-decoding-bytes.
for B, T, c in ((1, 1, 20), (2, 12, 0), (3, 4, 9)):
    ids, cache = next_call(B, T, c)
    with figures.BytesRead(model, cache) as watched:
        model(ids, cache, last_logits_only=True)
    confirm(
        f"B = {B}, T = {T:2}, c = {c:2}: {watched.total:,} bytes = formula",
        watched.total == figures.call_bytes(model.config, T, c, B, width=8),
    )
cache = real.new_cache(1, 8)
real(sun, cache)
with figures.BytesRead(real, cache) as watched:
    real(sun[:, :1], cache)
print(f"one decode step of SmolLM2 reads {watched.total / 1e6:.0f} MB")
confirm("as the formula says", watched.total == figures.call_bytes(SMOLLM2, 1, 2))

# %% [markdown]
# Now put the two counts of one answer side by side: the prompt of 512 tokens from the
# top of this page, and 64 calls.

# %% mystnb={"image": {"alt": "Two bar charts over the 64 calls of one answer. Above, billions of operations: the first bar, the prefill, reaches 127 and is 87 percent of the work; the other 63 bars, 0.3 each, are too small to see. Below, megabytes read: all 64 bars are equally tall, about 562, and the prefill is one of them, 1.6 percent."}, "figure": {"name": "fig-decoding-answer", "caption": "One answer of SmolLM2-135M in float32, counted twice. Above, what is computed; below, what has to be fetched for it."}} tags=["hide-input"]
answer = figures.answer_data(SMOLLM2, num_prompt=512, num_new=64)
figures.draw_answer(answer)

# %%
work = answer.flops[0] / answer.flops.sum()
traffic = answer.bytes_read[0] / answer.bytes_read.sum()
print(f"the prompt takes {work:.0%} of the operations, {traffic:.1%} of the bytes")
confirm(
    "all calls read the same amount, to 1 %",
    answer.bytes_read.max() < 1.01 * answer.bytes_read.min(),
)

# %% [markdown]
# There are the first two answers: 87 % and 1.6 %. Nearly all of the arithmetic is the
# prompt; nearly all of the traffic is the answer. So the two halves of one loop wait
# for different things {cite:p}`shazeer2019,pope2022`. Prefill waits for arithmetic.
# Decode waits for memory, on nearly any machine: its 63 calls fetch the whole model 63
# times to use each weight once.
#
# ## Arithmetic intensity
#
# The number that decides is the ratio, operations for each byte:
#
# $$
# I(B, T, c) = \frac{\Phi(B, T, c, 1)}{\Psi(B, T, c)}.
# $$ (eq-decoding-intensity)
#
# A weight of a block comes as $b$ bytes and does two operations for each of $B T$
# tokens. So for one row without a long past $I$ is close to $2/b$ in decode, one half
# in float32, and grows with $T$ in prefill. What about a larger $B$? Then a weight
# that has come serves many rows; but each row brings a cache of its own, which serves
# only that row. For $B \to \infty$ and $S = c + 1$ tokens a row, decode comes to
#
# $$
# I_\infty(S) = \frac{2P + A S}{b M S}
# = \frac{2}{b} \Bigl( \frac{P}{M S} + \frac{N}{K} \Bigr).
# $$ (eq-decoding-rows)
#
# ($A / 2M$ is $N/K$: each key is compared with the queries of its group, and with no
# others.)

# %%
# Check eq-decoding-intensity and eq-decoding-rows.
P = product_weights(SMOLLM2)
M = 2 * SMOLLM2.num_layers * SMOLLM2.num_kv_heads * SMOLLM2.head_dim


def intensity(B, T, c):
    return figures.call_flops(SMOLLM2, T, c, B) / figures.call_bytes(SMOLLM2, T, c, B)


for B, T, c in ((1, 1, 0), (1, 1, 1023), (1, 512, 0), (8, 1, 1023), (64, 1, 1023)):
    print(f"B = {B:2}, T = {T:3}, c = {c:4}: {intensity(B, T, c):5.1f} for each byte")
confirm("one row decodes at nearly 2 / b", abs(intensity(1, 1, 0) - 2 / 4) < 0.001)
ceilings = {S: 2 / 4 * (P / (M * S) + 9 / 3) for S in (128, 1024, 8192)}
for S, ceiling in ceilings.items():
    near = intensity(10**12, 1, S - 1)
    confirm(
        f"a trillion rows of {S} tokens come near {ceiling:.1f}, from below",
        0 < ceiling - near < 1e-3 * ceiling,
    )

# %% mystnb={"image": {"alt": "Operations for each byte read against the tokens that one call takes in, 1 to 4,096, both axes logarithmic. All curves begin between 0.5 and 1. Prefill climbs steadily to 2,800. Decode with many rows climbs with it at first and then bends to a ceiling: 46 for rows of 128 tokens, 7 for 1,024, 2 for 8,192."}, "figure": {"name": "fig-decoding-intensity", "caption": "The more tokens share a call, the more is done with each byte. But rows that decode together share the weights only, never their caches."}} tags=["hide-input"]
climb = figures.intensity_data(SMOLLM2, contexts=(128, 1024, 8192))
figures.draw_intensity(climb)

# %%
confirm("prefill of 512 does over 200 operations a byte", climb.prefill[9] > 200)
limits = torch.tensor(list(ceilings.values()))[:, None]
confirm("no number of rows exceeds its ceiling", (climb.decode < limits).all())

# %% [markdown]
# A processor too has such a number, its *balance*: the operations that it can do in the
# time in which one byte arrives. Calls below the balance wait for memory, calls above
# it for arithmetic; drawn over the intensity, the bound on speed is a slope and then a
# roof, hence *roofline*. An exercise does it for a machine of your choice. (It is what
# quantised weights are for in decode: the same operations, on fewer bytes.)
#
# ## The annotated source
#
# Now the loop as the package has it.

# %%
show(_decode)

# %% [markdown]
# Against the ten lines there are five additions: a *sampler* that chooses the token
# ({ref}`ch-sampling`), rows that have *ended*, *padding*, a `yield` in the middle, and
# `inference_mode`, for nothing is trained here.
# {py:func}`annotated_src.generate.generate` collects what it yields.
#
# The cache is made once, for the prompt and all that may be written, and filled in
# place; attention gets a view of the tokens that are there.
#
# ## Rows that begin in different places
#
# Three prompts, of 2, 3 and 6 tokens, in one batch. A batch is a rectangle, so
# something has to fill the corners.
# {py:meth}`annotated_src.tokenizer.TextTokenizer.pad` fills them on the left:

# %%
texts = ["The sun", "Water boils at", "Once upon a time there was"]
rows = [tokenizer.encode(text) for text in texts]
batch = tokenizer.pad(rows)
for ids, real_ones in zip(batch.tokens, batch.is_token, strict=True):
    words = [tokenizer.tokenizer.id_to_token(i).replace("Ġ", "·") for i in ids.tolist()]
    print("".join(f"{w if r else '':8}" for w, r in zip(words, real_ones, strict=True)))
print("positions", *padded_positions(batch.is_token).tolist(), sep="\n")

# %%
show(TextTokenizer.pad, padded_positions)

# %% [markdown]
# On the left, so that all rows *end* together. The next token of each row then goes
# into the same column, the logits of the last column are everybody's last, and one
# `length` serves the whole cache.
#
# A row with $g$ places of padding must not know that it has neighbours. So its tokens
# count from 0 where they begin, and nobody looks at the padding: for $t \ge g$,
#
# $$
# \operatorname{position}(t) = t - g, \qquad
# \operatorname{visible}(t, j) = \bigl[\, g \le j \le t \,\bigr].
# $$ (eq-decoding-padded)
#
# With $x^g$ for the row $x$ behind $g$ places of padding, whatever stands in them, the
# rows of logits are then those of the row alone:
#
# $$
# F(x^g)_{g + i} = F(x)_i .
# $$ (eq-decoding-alone)
#
# The proof is short. By {eq}`eq-decoding-padded` token $g + i$ is turned as token $i$
# would be alone, and it sees the same keys and values; the embedding, the norms and the
# feed-forward network treat every token by itself. In decode nothing changes, for the
# padding stays where it is, at the front of the cache.

# %%
# Check eq-decoding-padded and eq-decoding-alone.
lengths = torch.tensor([5, 11, 8])
is_token = torch.arange(11) >= 11 - lengths[:, None]
padded = torch.randint(97, (3, 11))  # the padding is anything at all
t, j, g = torch.arange(11)[:, None], torch.arange(11), (11 - lengths)[:, None, None]
visible = padded_causal_mask(is_token, 11)[:, 0]  # for padding itself, it is no matter
confirm("visible", torch.equal(visible & (t >= g), (g <= j) & (j <= t)))
positions = padded_positions(is_token)
confirm("position", torch.equal(positions, (j - g[:, 0]).clamp(min=0)))


def close(a, b):
    return torch.allclose(a, b, atol=1e-5, rtol=1e-5)


together = model(padded, is_token=is_token)
for row, mine, ids in zip(together, is_token, padded, strict=True):
    alone = model(ids[mine][None])[0]
    confirm(f"{len(alone):2} tokens: logits as they are alone", close(row[mine], alone))


def rows_alone(net, tokens, is_token, **options):
    """The new ids of each row, generated by itself."""
    pairs = zip(tokens, is_token, strict=True)
    found = [generate(net, ids[mine][None], **options)[0] for ids, mine in pairs]
    return torch.stack([ids[-options["max_new_tokens"] :] for ids in found])


new = generate(model, padded, is_token=is_token, max_new_tokens=40)[:, 11:]
alone = rows_alone(model, padded, is_token, max_new_tokens=40)
confirm("40 greedy ids: each row as it is alone", torch.equal(new, alone))

# %% [markdown]
# Is all of this needed? Not here. RoPE turns a query and a key by their positions, and
# their product depends on the *difference* only ({ref}`ch-rope`). Take the columns
# themselves as positions, and every row is merely shifted:


# %%
def columns_as_positions(is_token):
    return torch.arange(is_token.shape[1]).expand(is_token.shape)


with patch("annotated_src.placement.padded_positions", columns_as_positions):
    shifted = model(padded, is_token=is_token)
same = close(shifted[is_token], together[is_token])
confirm("columns for positions: the same logits", same)
error = (model(padded) - together)[:, -1].abs().amax(dim=-1)
print("padding visible: error of the last logits", *(f"{e:.1f}" for e in error))
confirm("right where there is no padding", (error < 1e-5).tolist() == [0, 1, 0])

# %% [markdown]
# So in a Llama the mask does the work. The positions matter to a model with a learnt
# vector for each, and to whoever compares ours with the original.
#
# ### Why not on the right?
#
# Training pads on the right: with a causal mask nobody sees what comes later, and one
# pass needs no more. Try it in generation. The prompt of two tokens now ends in
# padding, and so the last column of its row is no word at all.

# %%
original = transformers.AutoModelForCausalLM.from_pretrained(directory)


def new_ids_of_original(net, tokens, is_token=None, **options):
    """What transformers' greedy `generate` adds to each row."""
    given = torch.ones_like(tokens) if is_token is None else is_token.long()
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    text = net.generate(tokens, attention_mask=given, **options)
    return text[:, tokens.shape[1] :]


is_right = batch.is_token.flip(1)
right = torch.full_like(batch.tokens, tokenizer.pad_id)
right[is_right] = torch.cat(rows, dim=1)[0]
with patch("transformers.generation.utils.logger.warning") as warned:
    on_right = new_ids_of_original(original, right, is_right, max_new_tokens=8)
confirm("it warns", "right-padding was detected" in warned.call_args.args[0])
on_left = generate(real, **batch._asdict(), max_new_tokens=8)[:, 6:]
for text, wrong_ids, right_ids in zip(texts, on_right, on_left, strict=True):
    print(f"{text}\n   padded left:  {tokenizer.decode(right_ids)!r}")
    print(f"   padded right: {tokenizer.decode(wrong_ids)!r}")
confirm("the longest row has no padding: the same", (on_right == on_left)[2].all())
confirm("the other two say something else", (on_right != on_left)[:2].any(dim=1).all())
alone = rows_alone(real, *batch, max_new_tokens=8)
confirm("padded left: what each says alone", torch.equal(on_left, alone))

# %% [markdown]
# transformers logs a warning and goes on. Its mask was right; only, the logits after a
# padding token are nobody's. One *could* gather each row's last true column, and write
# into a cache with gaps. To pad on the left is simpler. So the third answer is: on the
# left, and it matters. Ours refuses the rest:

# %%
try:
    generate(real, right, is_token=is_right, max_new_tokens=8)
except ValueError as error:
    print(error)

# %% [markdown]
# ### Padding and the sampler
#
# The model does not see the padding. But the sampler is given the *ids* so far, and a
# repetition penalty ({ref}`ch-sampling`) makes ids that have come less likely. Padding
# is often the end token, and must not count. So `_decode` shows the sampler a row's own
# last token in place of its padding: a token that has come anyway.
#
# :::{admonition} Docs and code
# :class: paper-code
# transformers' `RepetitionPenaltyLogitsProcessor` is given `input_ids` and no mask; by
# itself it counts padding as seen. Its documentation offers a `prompt_ignore_length`,
# without a word of padding. In 5.23 `generate` makes it from the `attention_mask`
# (`_get_logits_processor`, `padding_lengths`), and then a padded row is as it is alone.
# Below, padding is the very id that the first row would write next; then, as in real
# life, the end token, and a row that counts it finds it hard to stop.
# :::


# %%
def penalised(logits, tokens):
    filtered = Sample(repetition_penalty=2.0).probabilities(logits, tokens)
    return filtered.argmax(dim=-1)


options = {"max_new_tokens": 8, "sampler": penalised}
alone = rows_alone(model, padded, is_token, **options)
filled = padded.where(is_token, alone[0, 0])
ours = generate(model, filled, is_token=is_token, **options)[:, 11:]
confirm("ours: each row as it is alone", torch.equal(ours, alone))
options = {"max_new_tokens": 8, "repetition_penalty": 2.0}
found = new_ids_of_original(theirs, filled, is_token, **options)
confirm("theirs, given the mask: the same", torch.equal(found, alone))

said = tokenizer.encode("Hello, how are you? I'm here to help you. Goodbye!")
scores, end = real(said, last_logits_only=True)[:, 0], tokenizer.eos_id
with_pads = torch.cat([said.new_full((1, 3), tokenizer.pad_id), said], dim=1)
expected = Sample(repetition_penalty=1.3).probabilities(scores, said)[0, end]
for ignored in (3, None):
    penalty = transformers.RepetitionPenaltyLogitsProcessor(1.3, ignored)
    share = penalty(with_pads, scores).softmax(dim=-1)[0, end]
    print(f"leading tokens to ignore: {ignored}. The end's probability: {share:.3f}")
    if ignored:
        confirm("as it is alone", torch.isclose(share, expected))

# %% [markdown]
# ## Rows that end in different places
#
# A row ends when it draws one of its stop ids. The others go on, and the batch stays a
# rectangle: a row that has ended repeats its stop id until the last one is there.
# {py:func}`annotated_src.generate.generate` takes ids for all rows, or some for each.

# %%
prompts = torch.tensor([[0], [4], [6]])
for stops in ([2, 7], [[2], [9], [7, 8]], ()):
    print(generate(CountingModel(), prompts, max_new_tokens=5, stop_ids=stops).tolist())
print(_stop_table([[2], [9], [7, 8]], prompts).tolist())
print(generate(CountingModel(), torch.tensor([[2]]), max_new_tokens=2, stop_ids=[2]))

# %% [markdown]
# - First line: after 2, or 7. The batch ends with its last row.
# - Second: each row has its own. The table below is how; $-1$ is no token.
# - Third: no stop ids, so `max_new_tokens` ends it.
# - Last: a stop id in the *prompt* stops nothing. Chat prompts are full of them.
#
# An ended row is still computed, and nobody reads it. (Servers give its place to the
# next request: *continuous batching*. A static rectangle is what this book, and
# transformers' `generate`, do.)
#
# ### And the end of the context
#
# The last limit is the model's own: `max_seq_len`, the longest text that it was made
# for. We count before we begin: prompt and `max_new_tokens` must fit.

# %%
for ids, most in ((tokens, 85), (tokens[:, :0], 5)):
    try:
        generate(model, ids, max_new_tokens=most)
    except ValueError as error:
        print(error)
beyond = new_ids_of_original(theirs, tokens, max_new_tokens=90)
print("transformers made", 12 + beyond.shape[1], "tokens with a model for 96")

# %% [markdown]
# RoPE has an angle for any position, so nothing fails there; the model is merely in
# places that it has never been trained on.
#
# ## Columns as they come
#
# Nobody wants to watch an empty screen until the last token is there. `_decode` is a
# generator: at each `yield` it hands out one column, (B), and *sleeps*. The next call
# of the model happens when you ask for the next column.

# %%
calls = []
hook = model.register_forward_hook(lambda *_: calls.append(1))
columns = generate_stream(model, tokens, max_new_tokens=20)
confirm("made, and not begun", not calls)
three = [next(columns) for _ in range(3)]
print("three columns of shape", tuple(three[0].shape), "after", len(calls), "calls")
hook.remove()
confirm("17 steps were never computed", len(calls) == 3)
expected = generate(model, tokens, max_new_tokens=3)[:, 12:]
confirm("they are generate's", torch.equal(torch.stack(three, dim=1), expected))

# %% [markdown]
# From ids to text is another step: a column may be half a character. That is
# {py:func}`annotated_src.tokenizer.stream_text`, in {ref}`ch-tokens`.
#
# ## What transformers' `generate` does
#
# `GenerationMixin.generate` is long, for it serves every model and every way to search.
# Under it is the same loop, in `_sample`. Do not believe it; watch it. We wrap the
# methods that matter, and write three tokens.

# %%
from transformers.generation import GenerationMixin, StoppingCriteriaList


def announced(owner, name):
    method = getattr(owner, name)

    def wrapper(self, *args, **named):
        print(name.replace("__call__", "stopping criteria"))
        return method(self, *args, **named)

    return patch.object(owner, name, wrapper)


def tell_shapes(_module, _args, named, out):
    ids, logits = tuple(named["input_ids"].shape), tuple(out.logits.shape)
    cached, kept = out.past_key_values.get_seq_length(), named["logits_to_keep"]
    print(f"    forward: ids {ids}, logits {logits}, cached {cached}, keep {kept}")


names = """_prepare_attention_mask_for_generation _prepare_position_ids_for_generation
    _prepare_generated_length _prepare_cache_for_generation _sample _prefill
    prepare_inputs_for_generation _update_model_kwargs_for_generation"""
hook = theirs.register_forward_hook(tell_shapes, with_kwargs=True)
with ExitStack() as watching:
    for name in names.split():
        watching.enter_context(announced(GenerationMixin, name))
    watching.enter_context(announced(StoppingCriteriaList, "__call__"))
    found = theirs.generate(tokens, do_sample=False, max_new_tokens=3, pad_token_id=0)
hook.remove()
ours = generate(model, tokens, max_new_tokens=3)
confirm("and the ids are ours", torch.equal(found, ours))

# %% [markdown]
# Twelve tokens, then one, then one; logits of one token each time; the last token is
# not read. You can now read `_sample` as our `_decode`:
#
# | In `_decode` and `generate_stream` | In transformers' `GenerationMixin` |
# | --- | --- |
# | `is_token`, given by `pad` | `_prepare_attention_mask_for_generation`: the `attention_mask` |
# | `padded_positions`, inside the model | `_prepare_position_ids_for_generation` |
# | `prompt + max_new_tokens > limit` | `_prepare_generated_length`, `_validate_generated_length` |
# | `model.new_cache` | `_prepare_cache_for_generation`: a `DynamicCache` |
# | the first `model(step, …)` | `_prefill` |
# | `step = last[:, None]` | `prepare_inputs_for_generation`, `next_sequence_length=1` |
# | `last_logits_only=True` | `logits_to_keep = 1` |
# | `F.pad(is_token, …)` | `_update_model_kwargs_for_generation` |
# | `sampler(logits, tokens)` | `LogitsProcessorList`, then argmax or multinomial |
# | `torch.where(ended, last, …)` | `unfinished_sequences`: the others get `pad_token_id` |
# | `(last[:, None] == stops).any(dim=1)` | `EosTokenCriteria`, in a `StoppingCriteriaList` |
# | `range(max_new_tokens)` | `MaxLengthCriteria` |
# | `yield last` | `streamer.put` |
#
# One difference to know: a row that has ended is filled with `pad_token_id`, where ours
# repeats its stop id.
#
# ## The ladder of equality
#
# Re-reading loop = loop with a cache = `generate` = transformers' `generate`: 64 greedy
# ids on the random model, and 20 on the real one, whose re-reading the first cell of
# this chapter has done. Then a padded batch, and rows that stop.

# %%
written_small = write(model, tokens, 64)
reread = write_by_rereading(model, tokens, 64)
confirm("random: re-reading = with a cache", torch.equal(reread, written_small))
for name, ours, reference, ids, text in (
    ("random", model, theirs, tokens, written_small),
    ("SmolLM2", real, original, sun, written),
):
    length = {"max_new_tokens": text.shape[1] - ids.shape[1]}
    found = generate(ours, ids, **length)
    confirm(f"{name}: with a cache = generate", torch.equal(found, text))
    found = new_ids_of_original(reference, ids, **length)
    confirm(
        f"{name}: generate = transformers", torch.equal(found, text[:, ids.shape[1] :])
    )
left = new_ids_of_original(original, *batch, max_new_tokens=8)
confirm("SmolLM2: three padded rows = transformers", torch.equal(left, on_left))

stop = int(written_small[1, 18])  # the second row draws it, seventh or before
stopped = generate(model, tokens, max_new_tokens=30, stop_ids=[stop])[:, 12:]
options = {"eos_token_id": stop, "pad_token_id": stop}
found = new_ids_of_original(theirs, tokens, max_new_tokens=30, **options)
confirm("a row that stops = transformers, padding so", torch.equal(stopped, found))
confirm("and it has stopped", (stopped[1, 7:] == stop).all())

# %% [markdown]
# :::{admonition} Break it
# :class: break-it
# Two mistakes in the loop. One: positions stand still after the prompt. Two: after the
# prefill the mask shows a token only itself, as if there were no cache. Which of the
# new ids are still right?
# :::


# %%
def wrong_standing_still(is_token):
    last = lengths[:, None] - 1  # of each row's prompt
    return padded_positions(is_token).minimum(last)


def wrong_forgetful(is_token, num_tokens):
    mask = padded_causal_mask(is_token, num_tokens)
    mask[..., : is_token.shape[1] - num_tokens] = False
    return mask


for name, replacement in (
    ("padded_positions", wrong_standing_still),
    ("padded_causal_mask", wrong_forgetful),
):
    with patch(f"annotated_src.placement.{name}", replacement):
        broken = generate(model, padded, is_token=is_token, max_new_tokens=40)[:, 11:]
    right_ones = (broken == new).int().cumprod(dim=1).sum(dim=1)
    print(f"{name:19} right before the first wrong id: {right_ones.tolist()} of 40")
    confirm("in every row the first, in none all", (right_ones % 40 > 0).all())

# %% [markdown]
# The first id is right in both: it comes from the prefill, where there is nothing to get
# wrong yet. A test that writes one token passes twice. Write several, for rows of
# several lengths, and compare each with itself alone.
#
# ## Exercises
#
# Write your function in a cell of your own and give it to `check`. A question takes its
# name and a letter: `check("kept_for_the_next_turn", "a")`.

# %%
from annotated_src.exercises import check  # noqa: F401 - for your cells
from annotated_src.exercises.decoding import chapter as exercises

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("positions_of")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("positions_of")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
positions_of = exercises["positions_of"].solution
confirm(
    "the package's", torch.equal(positions_of(is_token, 11), padded_positions(is_token))
)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("end_rows")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("end_rows")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
drawn = generate(CountingModel(), prompts, max_new_tokens=5)
for stops in ([[2], [9], [7, 8]], [[], [7], [7]]):
    ended = generate(CountingModel(), prompts, max_new_tokens=5, stop_ids=stops)
    mine = exercises["end_rows"].solution(drawn[:, 1:], stops)
    confirm(f"`generate` with {stops}: the same", torch.equal(mine, ended[:, 1:]))

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("step_seconds")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("step_seconds")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
# A machine with 10 operations a byte, and SmolLM2 in float32.
machine = 1e11, 1e10
attention = 4 * SMOLLM2.num_layers * SMOLLM2.num_heads * SMOLLM2.head_dim
sizes = {"weights": P, "kept": M, "attention": attention, "width": 4}
step = exercises["step_seconds"].solution(1, 1024, sizes, *machine)
print(f"one row of 1024 tokens: at most {1 / step:.1f} tokens a second")


def seconds(call, rate, bandwidth):
    """The same bound for any call (T, c, B), and what sets it."""
    arithmetic = figures.call_flops(SMOLLM2, *call) / rate
    memory = figures.call_bytes(SMOLLM2, *call) / bandwidth
    return max((arithmetic, "arithmetic"), (memory, "memory"))


confirm("for one token the same", seconds((1, 1023, 1), *machine) == (step, "memory"))
read, bound = seconds((512, 0, 1), *machine)
print(f"prefill of 512: {read:.2f} seconds, bound by {bound}")
bounds = [seconds((1, 127, n), *machine)[1] for n in range(1, 100)]
print("rows of 128 tokens: bound by arithmetic from", bounds.index("arithmetic") + 1)
confirm("rows of 1024: never, the ceiling is below the balance", ceilings[1024] < 10)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("prefill_in_chunks")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("prefill_in_chunks")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
prefill_in_chunks = exercises["prefill_in_chunks"].solution
prompt = torch.randint(97, (1, 60))
expected = model(prompt, last_logits_only=True)
found = prefill_in_chunks(model, prompt, 7)
confirm("the last are those of the prompt at once", close(found[:, -1:], expected))
at_once = counted(model, prompt, last_logits_only=True)
confirm("less work", counted(prefill_in_chunks, model, prompt, 7) < at_once)
pairs = sum(len(c) * (c[-1] + 1) for c in torch.arange(60).split(7))
print(f"pairs of a token and a key: {pairs} in chunks, {60**2} at once")

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("kept_for_the_next_turn")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("kept_for_the_next_turn")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
cache = model.new_cache(1, 20)
with patch.object(model, "new_cache", lambda *_: cache):
    generate(model, tokens[:1], max_new_tokens=5)
confirm("12 tokens of prompt and 5 new ones: 16 in the cache", cache[0].length == 16)

# %% tags=["remove-input"] jupyter={"source_hidden": true}
exercises.show("pad_left")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Solution"} tags=["hide-cell", "solution", "answer"]
exercises.solution("pad_left")

# %% jupyter={"source_hidden": true} mystnb={"code_prompt_show": "More on it", "code_prompt_hide": "More on it"} tags=["hide-cell", "solution"]
chats = [
    tokenizer.chat([{"role": "user", "content": text}])
    for text in ("What is the capital of Japan?", "Hello!")
]
batch = tokenizer.pad(chats)
mine = exercises["pad_left"].solution(
    [chat[0].tolist() for chat in chats], tokenizer.pad_id
)
confirm("the package's batch", all(map(torch.equal, mine, batch)))
guessed = batch.tokens != tokenizer.pad_id
hidden = batch.is_token & ~guessed
print("tokens that a guess hides in each row:", hidden.sum(dim=1).tolist())
mine, guess = (
    real(batch.tokens, is_token=mask, last_logits_only=True)
    for mask in (batch.is_token, guessed)
)
confirm("other logits, without a word", (mine - guess).abs().max() > 1)
try:
    generate(real, batch.tokens, is_token=guessed, max_new_tokens=1)
except ValueError as error:
    print(str(error).split(", got")[0])

# %% [markdown]
# ## What to remember
#
# - Prefill and decode are one function, called with $T = p$ and with $T = 1$. $n$ new
#   tokens take $n$ calls, and the last one is never read.
# - The prompt is most of the work, the answer most of the traffic: prefill is bound by
#   arithmetic, decode by memory.
# - Rows in a batch share the weights, not their caches. So batching helps decode until
#   the caches outweigh the weights.
# - Ask the head about the last token only.
# - Pad on the left, hide the padding from the model *and* from the sampler; then each
#   row is as it is alone. Test exactly that.
# - Rows stop for themselves; the batch stops with the last.
#
# **Where to read on.** transformers: `generation/utils.py`, `GenerationMixin._sample`
# (the loop), `_prefill` (and `prefill_chunk_size`), `prepare_inputs_for_generation`,
# `_update_model_kwargs_for_generation`; `generation/stopping_criteria.py`,
# `EosTokenCriteria` and `StopStringCriteria` (stops at a text, which may lie across
# tokens); `cache_utils.py`, `StaticLayer.update`; `generation/streamers.py`,
# `BaseStreamer`. What it takes to serve many at once on fast hardware:
# {cite:t}`pope2022`. Next, {ref}`ch-sampling` opens the line that this chapter has left
# closed: `sampler(logits, tokens)`.
