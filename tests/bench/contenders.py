"""Those who run: each loads the model, prefills, and decodes."""

import gc
import threading
import time
from pathlib import Path

import torch

from annotated_src.quiet import quietly
from tests.bench.report import PARAMETERS

VOCAB = 49152  # of SmolLM2; for a smaller model, pass ids below its own


def prompt(batch_size, num_tokens, vocab_size=VOCAB):
    """Ids without a meaning, the same in every run and in every contender."""
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randint(vocab_size // 2, (batch_size, num_tokens), generator=generator)


class Plain:
    """The readable path: load_model, and the model as it is."""

    name, weight_bytes = "plain", 4

    def __init__(self, directory):
        from annotated_src.checkpoint import load_model

        self.model = load_model(directory)

    def first_logits(self, tokens):
        return self.model(tokens, last_logits_only=True)

    def prefill(self, tokens):
        cache = self.model.new_cache(*tokens.shape)
        return self.model(tokens, cache, last_logits_only=True)

    def ready(self, batch_size, context, steps):
        """Fill the cache with numbers at random: the time does not depend on them."""
        self.cache = self.model.new_cache(batch_size, context + steps)
        for layer in self.cache:
            layer.keys.normal_()
            layer.values.normal_()
        self.context = context

    def decode(self, tokens, steps):
        """Greedy, from the last token on; returns milliseconds a step."""
        for layer in self.cache:
            layer.length = self.context
        start, step = time.perf_counter(), tokens[:, -1:]
        for _ in range(steps):
            step = self.model(step, self.cache, last_logits_only=True).argmax(-1)
        return 1e3 * (time.perf_counter() - start) / steps


class Fast(Plain):
    """The documented fast path: int8 weights, fewer steps."""

    name, weight_bytes = "fast", 1

    def __init__(self, directory):
        from annotated_src.fast import speed_up

        super().__init__(directory)
        self.model = speed_up(self.model)
        gc.collect()


class Transformers:
    """The peer: its default attention, and its default, growing cache."""

    name, weight_bytes = "transformers", 4
    cache_moves = 3  # read by attention; it grows, so it is made anew

    def __init__(self, directory):
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        load = AutoModelForCausalLM.from_pretrained
        self.model = load(directory, dtype=torch.float32).eval()

    def first_logits(self, tokens):
        return self.model(tokens, use_cache=False, logits_to_keep=1).logits

    def prefill(self, tokens):
        return self.model(tokens, use_cache=True, logits_to_keep=1).logits

    def ready(self, batch_size, context, steps):
        from transformers import DynamicCache

        c, self.cache = self.model.config, DynamicCache()
        shape = (batch_size, c.num_key_value_heads, context, c.head_dim)
        for layer in range(c.num_hidden_layers):
            self.cache.update(torch.randn(shape), torch.randn(shape), layer)

    def decode(self, tokens, steps):
        start, step = time.perf_counter(), tokens[:, -1:]
        for _ in range(steps):
            logits = self.model(step, past_key_values=self.cache, use_cache=True).logits
            step = logits.argmax(-1)
        seconds = time.perf_counter() - start
        self.cache.crop(-steps)
        return 1e3 * seconds / steps


class LlamaCpp:
    """llama.cpp, by its server: the times are those that it reports itself."""

    def __init__(self, path, threads=1, slots=4, context=1104):
        import xllamacpp

        self.name = "llama.cpp " + Path(path).stem.rsplit(".")[-1]
        self.weight_bytes = Path(path).stat().st_size / PARAMETERS
        params = xllamacpp.CommonParams()
        params.model.path, params.warmup = str(path), False
        params.verbosity = -1
        params.n_parallel, params.n_ctx = slots, slots * context
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.fit_params = False
        with quietly():
            self.server = xllamacpp.Server(params)

    def ask(self, tokens, new, slot=0, **options):
        request = {"prompt": tokens.tolist(), "n_predict": new, "id_slot": slot}
        request |= {"temperature": 0, "ignore_eos": True, "cache_prompt": True}
        reply = self.server.handle_completions(request | options)
        if "timings" not in reply:
            raise RuntimeError(f"llama.cpp: {reply}")
        return reply["timings"]

    def first_logits(self, tokens):
        self.ask(tokens[0], 1)

    def prefill(self, tokens):
        self.together(tokens, 1, cache_prompt=False)

    def ready(self, batch_size, context, steps):
        self.together(prompt(batch_size, context), 1)  # it keeps what it has read

    def decode(self, tokens, steps):
        timings = self.together(tokens, steps)
        return max(t["predicted_per_token_ms"] for t in timings)

    def together(self, tokens, new, **options):
        """Send every row at once, each to its slot: they share the steps."""
        timings = [None] * len(tokens)

        def one(row):
            timings[row] = self.ask(tokens[row], new, row, **options)

        rows = [threading.Thread(target=one, args=(r,)) for r in range(len(tokens))]
        for row in rows:
            row.start()
        for row in rows:
            row.join()
        if None in timings:
            raise RuntimeError("llama.cpp left a row without an answer")
        return timings
