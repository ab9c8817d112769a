"""The same on a GPU: bfloat16, and as the fast path one step in a CUDA graph."""

import statistics

import torch
from torch.nn import functional as F

from annotated_src.checkpoint import load_model
from annotated_src.kv_cache import LayerCache
from annotated_src.rotary import apply_rotary, rope_frequencies, rope_tables
from annotated_src.rotary import scale_frequencies as scaled
from tests.bench.contenders import VOCAB, prompt
from tests.bench.report import row


class FixedCache(LayerCache):
    """A cache that always shows all of its room; where it writes is a tensor."""

    def append(self, keys, values):
        self.keys.index_copy_(2, self.position, keys)
        self.values.index_copy_(2, self.position, values)
        return self.keys, self.values


class GraphStep:
    """One greedy step whose shapes never change, so that a graph can replay it.

    A mask hides the room that is not yet filled. Nothing is read back to the CPU.
    """

    def __init__(self, model, cache, last):
        self.model, self.tokens = model, last.clone()  # (B, 1)
        weight, c = model.embedding.weight, model.config
        self.position = torch.tensor([cache[0].length], device=weight.device)
        self.slots = torch.arange(cache[0].keys.shape[2], device=weight.device)
        frequencies = rope_frequencies(c.head_dim, c.rope_base, weight.device)
        self.frequencies = scaled(frequencies, c.rope_scaling)
        self.cache = []
        for layer in cache:
            fixed = FixedCache.__new__(FixedCache)
            fixed.keys, fixed.values, fixed.length = layer.keys, layer.values, 0
            fixed.position = self.position
            self.cache.append(fixed)
        self.graph = None

    def step(self):
        x = F.embedding(self.tokens, self.model.embedding.weight)
        cos, sin = rope_tables(self.position[None], self.frequencies, x.dtype)
        mask = (self.slots <= self.position)[None, None, None]
        for block, cache in zip(self.model.blocks, self.cache, strict=True):
            x = block(x, lambda heads: apply_rotary(heads, cos, sin), mask, cache)
        scores = self.model.score(self.model.norm(x))
        self.tokens.copy_(scores.argmax(-1))
        self.position.add_(1)

    def capture(self):
        """Record the step. Warming up moves on by some tokens, which is then undone."""
        kept = self.tokens.clone(), self.position.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()
        self.tokens.copy_(kept[0])
        self.position.copy_(kept[1])

    def __call__(self):
        self.graph.replay() if self.graph else self.step()
        return self.tokens


def timed(work, repeats):
    """Median milliseconds, by the GPU's own clock."""
    work()
    found = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found)


@torch.inference_mode()
def decode_ours(model, tokens, steps, repeats, graph):
    cache = model.new_cache(tokens.shape[0], tokens.shape[1] + steps + 3)
    model(tokens, cache, last_logits_only=True)
    if graph:
        one = GraphStep(model, cache, tokens[:, -1:])
        one.capture()

        def work():
            one.position.fill_(tokens.shape[1])
            for _ in range(steps):
                one()
    else:

        def work():
            for layer in cache:
                layer.length = tokens.shape[1]
            step = tokens[:, -1:]
            for _ in range(steps):
                step = model(step, cache, last_logits_only=True).argmax(-1)

    return timed(work, repeats) / steps


@torch.inference_mode()
def decode_transformers(model, tokens, steps, repeats):
    cache = model(tokens, use_cache=True, logits_to_keep=1).past_key_values

    def work():
        step = tokens[:, -1:]
        for _ in range(steps):
            logits = model(step, past_key_values=cache, use_cache=True).logits
            step = logits.argmax(-1)
        cache.crop(-steps)

    return timed(work, repeats) / steps


@torch.inference_mode()
def limits():
    numbers = torch.ones(1 << 28, device="cuda")
    target, matrix = torch.empty_like(numbers), torch.ones(8192, 8192, device="cuda")
    copy = timed(lambda: target.copy_(numbers), 5)
    matrix = matrix.bfloat16()
    product = timed(lambda: matrix @ matrix, 5)
    return 2 * numbers.nbytes / copy / 1e6, 8192**3 / product / 1e9


def table(job):
    """The table as Markdown, or a line that there is no GPU."""
    if not torch.cuda.is_available():
        return {"text": "\nNo GPU was at hand, so that table is missing.\n"}
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    theirs = load(job["directory"], dtype=torch.bfloat16).to("cuda").eval()
    ours = load_model(job["directory"], torch.bfloat16, "cuda")
    bandwidth, rate = limits()
    num_bytes = sum(p.nbytes for p in ours.parameters())
    lines = [
        "\n### GPU\n",
        f"{torch.cuda.get_device_name()}, bfloat16, torch {torch.__version__}: copies "
        f"{bandwidth:.0f} GB/s, {rate:.0f} trillion multiply-adds a second. Reading "
        f"the weights once takes {num_bytes / bandwidth / 1e6:.2f} ms.\n",
        row("ms", "transformers", "plain", "plain, CUDA graph"),
        row("---", "---:", "---:", "---:"),
    ]
    steps, repeats = job["steps"], job["repeats"]
    for batch_size in job["batches"]:
        for context in job["contexts"]:
            tokens = prompt(batch_size, context, VOCAB).to("cuda")
            base = decode_transformers(theirs, tokens, steps, repeats)
            found = [
                decode_ours(ours, tokens, steps, repeats, graph=graph)
                for graph in (False, True)
            ]
            cells = (f"{ms:.2f} ({base / ms:.2f}×)" for ms in found)
            name = f"decode, context {context}, batch {batch_size}"
            lines.append(row(name, f"{base:.2f}", *cells))
    with torch.inference_mode():
        for batch_size in job["batches"]:
            tokens = prompt(batch_size, job["prefill"], VOCAB).to("cuda")
            base = timed(lambda t=tokens: theirs(t, logits_to_keep=1), repeats)
            ms = timed(
                lambda t=tokens: ours(
                    t, ours.new_cache(*t.shape), last_logits_only=True
                ),
                repeats,
            )
            name = f"prefill, {job['prefill']} tokens, batch {batch_size}"
            lines.append(row(name, f"{base:.2f}", f"{ms:.2f} ({base / ms:.2f}×)", "–"))
    return {"text": "\n".join(lines) + "\n"}
