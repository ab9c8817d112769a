"""Teach a Llama a text: first weights, batches, the learning rate, and the loop."""

import math
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from jaxtyping import Int
from torch import Tensor, nn

from annotated_src.loss import next_token_loss
from annotated_src.models.llama import Llama

# The layers whose output is added to the residual stream, twice a block.
INTO_STREAM = ("out_proj", "down_proj")


def init_weights(model: Llama, generator: torch.Generator, std: float = 0.02) -> None:
    """Draw first weights, so small that at first every token is about as likely.

    Each of the L blocks adds two outputs to the stream, so those layers start smaller
    by sqrt(2 L): the sum keeps the size of one. Gains are 1 and biases 0.

    Source: Radford et al. 2019, section 2.3; transformers `GPT2PreTrainedModel`.
    """
    smaller = std / math.sqrt(2 * model.config.num_layers)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            into_stream = name.endswith(INTO_STREAM)
            scale = smaller if into_stream else std
            nn.init.normal_(module.weight, std=scale, generator=generator)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def batches(
    ids: Int[Tensor, "length"],
    batch_size: int,
    window: int,
    generator: torch.Generator,
) -> Iterator[Int[Tensor, "B T"]]:
    """Cut windows out of a text, each from a random place; without end.

    The labels of a window are its own tokens: `next_token_loss` shifts them.

    Raises:
        ValueError: batch_size is below 1, a window has no next token, or is longer
            than the text.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    if not 2 <= window <= len(ids):
        raise ValueError(
            f"window must be 2 to {len(ids)} tokens, the whole text; got {window}"
        )
    return _batches(ids, batch_size, window, generator)


def _batches(
    ids: Tensor, batch_size: int, window: int, generator: torch.Generator
) -> Iterator[Tensor]:
    offsets = torch.arange(window)
    while True:
        last = len(ids) - window
        starts = torch.randint(last + 1, (batch_size, 1), generator=generator)
        yield ids[starts + offsets]


def learning_rate(
    step: int, *, steps: int, peak: float, warmup: int, floor: float = 0.1
) -> float:
    """Rise to the peak in warmup steps, then fall along a cosine to floor times it.

    Raises:
        ValueError: step is not 0 to steps - 1, warmup is not 0 to steps, or peak is
            not above 0.

    Source: Loshchilov & Hutter 2017, eq. 5; transformers
    `get_cosine_schedule_with_warmup`.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step must be 0 to {steps - 1}, got {step}")
    if not 0 <= warmup <= steps or peak <= 0:
        raise ValueError(
            f"warmup must be 0 to {steps} steps and peak above 0, "
            f"got {warmup} and {peak}"
        )
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)  # 0 at first, 1 at the end
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2)


def adamw(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """Let matrices shrink a little at each step; leave gains and biases alone.

    A gain belongs near 1, and a bias wherever it is needed: 0 is no home for either.

    Source: Loshchilov & Hutter 2019, algorithm 2; Brown et al. 2020, appendix B.
    """
    weights = list(model.parameters())
    matrices = [weight for weight in weights if weight.ndim > 1]
    vectors = [weight for weight in weights if weight.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))


def train_step(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    tokens: Int[Tensor, "B T"],
    max_norm: float = 1.0,
) -> float:
    """Move every weight a little against its gradient; return the loss before.

    Gradients that are together longer than max_norm are shortened to it.
    """
    optimizer.zero_grad()
    with torch.enable_grad():
        loss = next_token_loss(model(tokens), tokens)
        loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return loss.item()


def train(
    model: Llama,
    batches: Iterable[Int[Tensor, "B T"]],
    *,
    steps: int,
    peak: float,
    warmup: int,
    weight_decay: float = 0.1,
) -> Iterator[float]:
    """Learn from one batch a step, until steps or batches end; yield its loss.

    Raises:
        ValueError: what `learning_rate` refuses.
    """
    rates = [
        learning_rate(step, steps=steps, peak=peak, warmup=warmup)
        for step in range(steps)
    ]
    optimizer = adamw(model, weight_decay)
    # Not strict: the batches may go on for ever.
    for rate, tokens in zip(rates, islice(batches, steps), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate
        yield train_step(model, optimizer, tokens)
