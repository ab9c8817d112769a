"""What `python -m annotated_src.generate` does: answer a prompt, or hold a chat."""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from annotated_src.fast import speed_up
from annotated_src.pipeline import TextGeneration
from annotated_src.sampler import Sample, Sampler
from annotated_src.sampling import greedy
from annotated_src.weights import WeightsError, smollm2

SAMPLING = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
DTYPES = ("float32", "float16", "bfloat16")
ERRORS = (WeightsError, OSError, ValueError, RuntimeError)


def make_parser() -> argparse.ArgumentParser:
    """Describe the arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m annotated_src.generate",
        usage="%(prog)s [options] [PATH] PROMPT, or --chat [options] [PATH]",
        description="Answer a prompt, word by word, with the model in the directory "
        "PATH (SmolLM2-135M-Instruct, if not said). Without any option of sampling, "
        "the best token is taken each time.",
    )
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--chat", action="store_true", help="hold a conversation")
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt, without chat template"
    )
    parser.add_argument("--system", help="what the model is told before all else")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--repetition-penalty", type=float)
    parser.add_argument("--seed", type=int, help="to draw the same again")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--fast", action="store_true", help="8-bit weights: faster, a little coarser"
    )
    return parser


def main() -> None:
    """Run the command; an error is one line, and exit status 1.

    A reader that leaves, as `| head -1` does, and Ctrl-C end it without a word.
    """
    parser = make_parser()
    options = parser.parse_intermixed_args()  # [PATH] and PROMPT may stand apart
    said = options.arguments + [""] * options.chat  # a chat has no prompt yet
    *path, prompt = said or parser.error("expected a PROMPT, or --chat")
    if len(path) > 1:
        parser.error(f"expected [PATH] PROMPT, or --chat [PATH], got {said}")
    try:
        sampler = make_sampler(options)
        directory = Path(path[0]) if path else smollm2()
        dtype = getattr(torch, options.dtype)
        answer = TextGeneration.from_pretrained(directory, dtype, options.device)
        if options.fast:
            answer.model = speed_up(answer.model)
        if options.chat:
            chat(answer, options, sampler)
        else:
            asked = prompt if options.raw else _conversation(options.system, prompt)
            show(answer.stream(asked, **_limits(options, sampler)))
    except KeyboardInterrupt:
        parser.exit(130, "\n")
    except BrokenPipeError:
        # Python flushes once more as it ends; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.exit(1)
    except ERRORS as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


def make_sampler(options: argparse.Namespace) -> Sampler:
    """Choose greedily, or as the options of sampling say.

    Raises:
        ValueError: a value that its filter refuses.
    """
    named = {name: getattr(options, name) for name in SAMPLING}
    given = {name: value for name, value in named.items() if value is not None}
    if not given and options.seed is None:
        return greedy
    generator = torch.Generator(options.device)
    if options.seed is not None:
        generator.manual_seed(options.seed)
    else:
        generator.seed()
    return Sample(**given, generator=generator)


def chat(answer: TextGeneration, options: argparse.Namespace, sampler: Sampler) -> None:
    """Ask for a line, answer it, and remember both, until the input ends.

    /clear forgets the conversation. A line that no longer fits is not remembered.
    """
    messages = history = _conversation(options.system)
    while line := _ask():
        if line == "/clear":
            messages = history
            continue
        asked = [*messages, {"role": "user", "content": line}]
        try:
            said = show(answer.stream(asked, **_limits(options, sampler)))
        except ValueError as error:
            sys.stderr.write(f"{error}\n/clear starts afresh\n")
            continue
        messages = [*asked, {"role": "assistant", "content": said}]


def show(pieces: Iterator[str]) -> str:
    """Write each piece as it comes; return the whole."""
    said = ""
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
        said += piece
    sys.stdout.write("\n")
    return said


def _ask() -> str:
    """Read the next line that is not blank; "" at the end of the input."""
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line or line.strip():
            return line.strip()


def _conversation(system: str | None, *said: str) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *({"role": "user", "content": text} for text in said)]


def _limits(options: argparse.Namespace, sampler: Sampler) -> dict[str, Any]:
    return {"max_new_tokens": options.max_new_tokens, "sampler": sampler}
