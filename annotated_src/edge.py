"""Run an exported model on a device: numpy and ai-edge-litert, no torch.

python -m annotated_src.edge model.tflite --tokens 1,2,3 prints the ids that follow.
"""

import argparse
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from annotated_src.tflite_file import open_tflite

ENTRIES = ("prefill", "decode")
Array = NDArray[Any]


class EdgeRunner:
    """An exported model, opened, and the cache of the text that it is in.

    prefill_len is the most tokens of a prompt, cache_len of prompt and answer together.

    Raises:
        FileNotFoundError: no such file.
        ImportError: ai-edge-litert is missing.
        ValueError: the file is damaged, or not one that `export_tflite` wrote; or
            threads is below 1.
    """

    def __init__(self, path: Path | str, threads: int = 1) -> None:
        interpreter = open_tflite(path, threads)
        entries = interpreter.get_signature_list()
        if {*entries} != {*ENTRIES}:
            raise ValueError(
                f"{path} has entries {sorted(entries)}, expected prefill and decode"
            )
        self._prefill = interpreter.get_signature_runner("prefill")
        self._decode = interpreter.get_signature_runner("decode")
        inputs = self._prefill.get_input_details()
        outputs = self._decode.get_output_details()
        places = {name: item for name, item in inputs.items() if name[:3] == "kv_"}
        takes = {"tokens", "input_pos", *places}
        expected = [takes, {*places}, takes, {"logits", *places}]
        found = [{*entries[e][s]} for e in ENTRIES for s in ("inputs", "outputs")]
        if "kv_k_0" not in places or found != expected:
            raise ValueError(f"{path} does not take tokens, input_pos and a cache kv")
        self._empty = {k: np.zeros(v["shape"], v["dtype"]) for k, v in places.items()}
        self.prefill_len = int(inputs["tokens"]["shape"][1])
        self.cache_len = int(places["kv_k_0"]["shape"][2])
        self.vocab_size = int(outputs["logits"]["shape"][-1])
        self.reset()

    def reset(self) -> None:
        """Forget the text."""
        self.kv: dict[str, Array] = dict(self._empty)
        self.length = 0

    def prefill(self, tokens: Sequence[int]) -> None:
        """Begin a text: put its first tokens into the cache, all in one call.

        The call is as long as the export says. What fills it up is junk to the mask,
        and the next tokens overwrite it.

        Raises:
            ValueError: no tokens, more than prefill_len, or an id that is not in the
                vocabulary.
        """
        ids = self._check_prompt(tokens)
        self.reset()
        padded = np.zeros((1, self.prefill_len), np.int32)
        padded[0, : len(ids)] = ids
        positions = np.arange(self.prefill_len, dtype=np.int32)
        self.kv = self._prefill(tokens=padded, input_pos=positions, **self.kv)
        self.length = len(ids)

    def step(self, token: int) -> Array:
        """Read one more token, and score the one after it: (V,).

        Raises:
            ValueError: the cache is full, or the id is not in the vocabulary.
        """
        ids = self._check([token])
        if self.length >= self.cache_len:
            raise ValueError(f"the cache is full: {self.cache_len} tokens")
        position = np.array([self.length], np.int32)
        out = self._decode(tokens=ids[None], input_pos=position, **self.kv)
        logits = out.pop("logits")
        self.kv, self.length = out, self.length + 1
        return logits[0, 0]

    def read(self, prompt: Sequence[int]) -> Array:
        """Begin with a prompt; score the token after it.

        prefill gives no scores. So the last token goes through `step`.

        Raises:
            ValueError: as `prefill`.
        """
        self._check_prompt(prompt)
        self.reset()
        if len(prompt) > 1:
            self.prefill(prompt[:-1])
        return self.step(prompt[-1])

    def logits(self, tokens: Sequence[int], prompt_len: int = 1) -> Array:
        """Score a given text as `generate` would meet it: (len - prompt_len + 1, V).

        Its first prompt_len tokens are the prompt, whose last token has the first
        scores; the others are read one by one.

        Raises:
            ValueError: prompt_len is below 1 or above the length of the text, or the
                text does not fit.
        """
        if not 1 <= prompt_len <= len(tokens):
            raise ValueError(
                f"prompt_len must be 1 to {len(tokens)}, the tokens, got {prompt_len}"
            )
        first = self.read(tokens[:prompt_len])
        return np.stack([first, *map(self.step, tokens[prompt_len:])])

    def _check_prompt(self, tokens: Sequence[int]) -> Array:
        ids = self._check(tokens)
        if len(ids) > self.prefill_len:
            raise ValueError(
                f"a prompt of {len(ids)} tokens, exported for {self.prefill_len}"
            )
        return ids

    def _check(self, tokens: Sequence[int]) -> Array:
        ids = np.asarray(tokens)
        if not ids.size:
            raise ValueError("an empty prompt: expected one token or more")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            given = f"{ids.dtype} of shape {ids.shape}"
            raise ValueError(f"tokens must be a row of whole numbers, got {given}")
        low, high, last = ids.min(), ids.max(), self.vocab_size - 1
        if low < 0 or high > last:
            raise ValueError(f"ids must be 0 to {last}, got ids from {low} to {high}")
        return ids.astype(np.int32)


def edge_generate(
    path: Path | str,
    tokens: Sequence[int],
    max_new_tokens: int = 32,
    stop_ids: Collection[int] = (),
    threads: int = 1,
) -> list[int]:
    """Continue a text with the best token each time; return the new ids.

    It ends after max_new_tokens, or with an id of stop_ids, which is returned too.

    Raises:
        ValueError: as `EdgeRunner`; max_new_tokens is below 1; or the prompt is empty,
            longer than was exported, or does not fit the cache together with
            max_new_tokens.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    runner = EdgeRunner(path, threads)
    needed = len(tokens) + max_new_tokens - 1  # the last is never read
    if needed > runner.cache_len:
        raise ValueError(
            f"{len(tokens)} tokens and {max_new_tokens} more need a cache of {needed}, "
            f"exported with {runner.cache_len}"
        )
    new = [int(runner.read(tokens).argmax())]
    while len(new) < max_new_tokens and new[-1] not in stop_ids:
        new.append(int(runner.step(new[-1]).argmax()))
    return new


def main() -> None:
    """Print the ids that follow; an error is one line, and exit status 1 or 2."""
    parser = argparse.ArgumentParser(
        prog="python -m annotated_src.edge",
        description="Continue token ids with an exported model, without torch.",
    )
    parser.add_argument("file", type=Path, help="what annotated_src.export wrote")
    parser.add_argument("--tokens", required=True, help="the prompt: 1,2,3")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    try:
        tokens = [int(number) for number in asked.tokens.split(",")]
    except ValueError:
        parser.error(f"--tokens must be like 1,2,3, got {asked.tokens!r}")
    try:
        new = edge_generate(asked.file, tokens, asked.max_new_tokens, (), asked.threads)
    except (ImportError, OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    sys.stdout.write(",".join(map(str, new)) + "\n")


if __name__ == "__main__":
    main()
