"""Those who run on the device's table: the exported code in torch, and the files."""

import time
from collections import Counter

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from annotated_src.quiet import quietly
from tests.bench import contenders
from tests.bench.edge_exports import CACHE, PREFILL


class Eager:
    """What is exported, run by torch as it stands: fixed shapes, functional cache."""

    name, weight_bytes = "exported code, in torch", 4
    cache_moves = 3  # read by attention; a new one is made: read and written

    def __init__(self, model, cache=CACHE, prefill=PREFILL):
        from annotated_src.edge_model import make_entries

        entries = make_entries(model, prefill, cache)
        (self.reader, _), (self.writer, sample) = entries["prefill"], entries["decode"]
        self.empty = sample["kv"]

    def prefill(self, tokens):
        """As a file does it: the cache first, then the last token once more."""
        tokens, positions = tokens.int(), torch.arange(tokens.shape[1]).int()
        kv = self.reader(tokens, positions, self.empty)["kv"]
        return self.writer(tokens[:, -1:], positions[-1:], kv)["logits"]

    def ready(self, batch_size, context, steps):
        self.kv = {name: torch.randn(kv.shape) for name, kv in self.empty.items()}
        self.context = context

    def decode(self, tokens, steps):
        start, step, kv = time.perf_counter(), tokens[:, -1:].int(), self.kv
        for i in range(steps):
            position = torch.tensor([self.context + i], dtype=torch.int32)
            out = self.writer(step, position, kv)
            step, kv = out["logits"].argmax(-1).int(), out["kv"]
        return 1e3 * (time.perf_counter() - start) / steps


class CountOperators(TorchDispatchMode):
    """How many operators torch dispatches, those that only look at memory left out."""

    VIEWS = frozenset(
        (
            "_reshape_alias",
            "_unsafe_view",
            "alias",
            "detach",
            "expand",
            "permute",
            "select",
            "slice",
            "split",
            "t",
            "transpose",
            "unbind",
            "unsqueeze",
            "view",
        )
    )

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in self.VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def dispatched(runner, context):
    """Operators of one decode step."""
    runner.ready(1, context, 1)
    with CountOperators() as counter:
        runner.decode(contenders.prompt(1, context, 64), 1)
    return counter.counts.total()


class Tflite:
    """A file, run by the book's own runner: the cache goes in and out as arrays."""

    cache_moves = 7  # read by attention; copied in, to a new one, and out

    def __init__(self, name, path, threads, weight_bytes):
        from annotated_src.edge import EdgeRunner

        self.name, self.weight_bytes = name, weight_bytes
        self.runner = EdgeRunner(path, threads)

    def prefill(self, tokens):
        """All that is needed for the first scores: the prompt's last token, too."""
        return self.runner.read(tokens[0].tolist())

    def ready(self, batch_size, context, steps):
        self.runner.reset()
        draw = np.random.default_rng(0).standard_normal
        self.kv = {
            name: draw(kv.shape, np.float32) for name, kv in self.runner.kv.items()
        }
        self.context = context

    def decode(self, tokens, steps):
        self.runner.kv, self.runner.length = dict(self.kv), self.context
        start, step = time.perf_counter(), int(tokens[0, -1])
        for _ in range(steps):
            step = int(self.runner.step(step).argmax())
        return 1e3 * (time.perf_counter() - start) / steps


class Handed:
    """A file, its cache handed over: one buffer is a step's input and its output."""

    cache_moves = 1

    def __init__(self, name, path, threads, weight_bytes):
        from ai_edge_litert.compiled_model import CompiledModel
        from ai_edge_litert.cpu_options import CpuOptions
        from ai_edge_litert.options import Options

        self.name, self.weight_bytes = name, weight_bytes
        options = Options(cpu_options=CpuOptions(num_threads=threads))
        with quietly():
            self.model = CompiledModel.from_file(str(path), options=options)
        entry = self.model.get_signature_list()["decode"]
        details = self.model.get_output_tensor_details("decode")
        self.vocab_size = details["logits"]["shape"][-1]
        new_input = self.model.create_input_buffer_by_name
        self.inputs = {name: new_input("decode", name) for name in entry["inputs"]}
        self.shapes = {name: details[name]["shape"] for name in entry["outputs"]}
        del self.shapes["logits"]
        self.logits = self.model.create_output_buffer_by_name("decode", "logits")
        self.outputs = {name: self.inputs[name] for name in self.shapes}
        self.outputs["logits"] = self.logits

    def ready(self, batch_size, context, steps):
        draw = np.random.default_rng(0).standard_normal
        self.context = context
        with quietly():  # the first write begins with a speech
            for name, shape in self.shapes.items():
                self.inputs[name].write(draw(shape, np.float32))

    def step(self, token, position):
        self.inputs["tokens"].write(np.array([[token]], np.int32))
        self.inputs["input_pos"].write(np.array([position], np.int32))
        self.model.run_by_name("decode", self.inputs, self.outputs)
        return np.asarray(self.logits.read(self.vocab_size, np.float32))

    def decode(self, tokens, steps):
        start, step = time.perf_counter(), int(tokens[0, -1])
        for i in range(steps):
            step = int(self.step(step, self.context + i).argmax())
        return 1e3 * (time.perf_counter() - start) / steps
