"""Where the norm stands in a block, and what that does to a deep stack."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from annotated_src.attention import Rotate
from annotated_src.feed_forward import FeedForward
from annotated_src.figures.style import BLUE, GREY, INK, ORANGE, BookFigure, panels
from annotated_src.masks import causal_mask
from annotated_src.models.llama import LlamaBlock, LlamaConfig
from annotated_src.norms import RMSNorm
from annotated_src.rotary import apply_rotary, rope_frequencies, rope_tables

Arrangement = Callable[[LlamaBlock, Tensor, Rotate, Tensor], Tensor]


def pre_norm(block: LlamaBlock, x: Tensor, rotate: Rotate, mask: Tensor) -> Tensor:
    """Norm what each branch reads; leave the stream alone. Llama."""
    return block(x, rotate, mask)


def post_norm(block: LlamaBlock, x: Tensor, rotate: Rotate, mask: Tensor) -> Tensor:
    """Norm the stream itself after each addition. Vaswani et al. 2017, section 3.1."""
    x = block.attention_norm(x + block.attention(x, rotate, mask))
    return block.ffn_norm(x + block.ffn(x))


def no_norm(block: LlamaBlock, x: Tensor, rotate: Rotate, mask: Tensor) -> Tensor:
    """Add the branches and hope."""
    x = x + block.attention(x, rotate, mask)
    return x + block.ffn(x)


def random_blocks(num_layers: int, gated: bool = True) -> list[LlamaBlock]:
    """Make blocks whose matrices keep the scale of their input: variance 1/fan-in.

    Without gated, the feed-forward network is that of 2017, with its ReLU.
    """
    config = LlamaConfig(
        vocab_size=128,
        num_layers=num_layers,
        embed_dim=64,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        ffn_dim=172,
        max_seq_len=32,
        norm_eps=1e-5,
        rope_base=10_000.0,
        tied_head=False,
    )
    blocks = [LlamaBlock(config) for _ in range(num_layers)]
    for block in blocks:
        if not gated:
            ffn = FeedForward(64, 256, torch.relu)
            nn.init.zeros_(ffn.up_proj.bias)
            nn.init.zeros_(ffn.down_proj.bias)
            block.add_module("ffn", ffn)
        for weight in block.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return blocks


class Pass(NamedTuple):
    """One forward and backward pass through a random stack."""

    stream: Tensor  # (L + 1,) RMS of the stream before each block, and at the end
    gradients: Tensor  # (L,) norm of the gradient of each block's down_proj
    loss: float  # cross-entropy against random targets
    loss_without_final_norm: float


def measure(
    arrange: Arrangement, num_layers: int = 32, gated: bool = True, seed: int = 0
) -> Pass:
    """Send random tokens through random blocks, and a random loss back."""
    torch.manual_seed(seed)
    blocks = random_blocks(num_layers, gated)
    x = torch.randn(4, 32, 64)  # (B, T, D)
    head, targets = torch.randn(128, 64) / 8, torch.randint(128, (4 * 32,))
    tables = rope_tables(
        torch.arange(32)[None], rope_frequencies(16, 10_000.0), x.dtype
    )
    rotate = partial(apply_rotary, cos=tables[0], sin=tables[1])
    mask = causal_mask(32)
    stream = [x]
    for block in blocks:
        stream.append(arrange(block, stream[-1], rotate, mask))
    raw = F.cross_entropy((stream[-1] @ head.T).flatten(0, 1), targets)
    normed = RMSNorm(64, eps=1e-5)(stream[-1])  # changes nothing after post-norm
    loss = F.cross_entropy((normed @ head.T).flatten(0, 1), targets)
    weights = [block.ffn.down_proj.weight for block in blocks]
    gradients = torch.autograd.grad(loss, weights)
    return Pass(
        torch.stack([each.detach().double().square().mean().sqrt() for each in stream]),
        torch.stack([gradient.norm() for gradient in gradients]),
        loss.item(),
        raw.item(),
    )


class DepthData(NamedTuple):
    """The stream's RMS and the gradients by depth; geometric means over seeds."""

    stream_none: Tensor  # (L + 1,), infinite or NaN once it has overflowed
    stream_pre: Tensor
    stream_post: Tensor
    gradients_pre: Tensor  # (L,)
    gradients_post: Tensor
    gradients_post_relu: Tensor


def geometric_mean(values: Sequence[Tensor]) -> Tensor:
    """Average in the logarithm, over the first dimension."""
    return torch.stack(list(values)).log().mean(dim=0).exp()


def depth_data(num_layers: int = 32, num_seeds: int = 4) -> DepthData:
    """Measure three arrangements of the same random blocks."""
    seeds = range(num_seeds)
    none = measure(no_norm, num_layers)
    pre = [measure(pre_norm, num_layers, seed=seed) for seed in seeds]
    post = [measure(post_norm, num_layers, seed=seed) for seed in seeds]
    relu = [measure(post_norm, num_layers, gated=False, seed=seed) for seed in seeds]
    return DepthData(
        none.stream,
        geometric_mean([each.stream for each in pre]),
        geometric_mean([each.stream for each in post]),
        geometric_mean([each.gradients for each in pre]),
        geometric_mean([each.gradients for each in post]),
        geometric_mean([each.gradients for each in relu]),
    )


def draw_depth(data: DepthData) -> BookFigure:
    """Draw the stream's size on the way up, and the gradient on the way down."""
    figure, (left, right) = panels(1, 2, height=3.7)
    depth = data.gradients_pre.numel()
    alive = data.stream_none.isfinite()
    left.plot(data.stream_none[alive], color=GREY, marker="o", ms=4)
    left.plot(data.stream_pre, color=BLUE)
    left.plot(data.stream_post, color=ORANGE)
    left.set_yscale("log")
    left.set_ylim(0.4, 500)
    left.text(4.6, 150, "no norm:\noverflows", color=INK, va="center")
    left.text(
        depth, data.stream_pre[-1].item() * 1.3, "pre-norm", color=BLUE, ha="right"
    )
    left.text(depth, 0.85, "post-norm", color=ORANGE, ha="right", va="top")
    left.set_title("RMS of the stream")
    left.set_xlabel("blocks passed")
    blocks = range(1, depth + 1)
    right.plot(blocks, data.gradients_post, color=ORANGE)
    right.plot(blocks, data.gradients_post_relu, color=ORANGE, ls=":")
    right.plot(blocks, data.gradients_pre, color=BLUE)
    right.set_yscale("log")
    right.text(11.5, 15, "post-norm, Llama's block", color=ORANGE)
    words = "post-norm,\nReLU of 2017"
    right.text(27, 0.47, words, color=ORANGE, ha="right", va="center")
    right.text(3, 0.17, "pre-norm", color=BLUE)
    right.set_title("gradient of down_proj")
    right.set_xlabel("block")
    for ax in (left, right):
        ax.minorticks_off()
    return figure
