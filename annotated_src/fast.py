"""The same Llama, for speed: 8-bit weights, and fewer and larger steps.

With one token at a time, a model spends its time on reading its weights. Here a weight
is a byte and not four, and torch's kernel multiplies the bytes as they are. What can be
one step is one: a product for queries, keys and values, and one for both halves of the
gate. Results differ a little from the model's own: the products round their inputs and
outputs to bfloat16. The page on speed of the book says how much, and how fast it is.
"""

import copy
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from annotated_src.attention import Rotate, attend_fused
from annotated_src.chatglm_quantize import quantize_rows
from annotated_src.kv_cache import LayerCache
from annotated_src.models.llama import Llama, LlamaBlock

FEW = 16  # tokens; with more it is faster to make bfloat16 weights of the integers
int8_product = torch._weight_int8pack_mm  # pyright: ignore[reportPrivateImportUsage]
LANES = 16  # the kernel reads that many columns at a time, past the end if it must


class Int8Linear(nn.Module):
    """Stand in for linear layers that share their input: one product for all of them.

    Each row is integers of 8 bits and a scale, as in `quantize_rows`. Not for training.

    Source: torch `_weight_int8pack_mm`.
    """

    integers: Tensor
    ones: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, *layers: nn.Linear | nn.Embedding) -> None:
        super().__init__()
        weight = torch.cat([layer.weight.detach() for layer in layers])
        integers, scale = quantize_rows(weight, bits=8)
        linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
        biases = [part.bias.detach() for part in linears if part.bias is not None]
        bias = torch.cat(biases) if biases else None  # all have one, or none
        self.register_buffer("integers", integers.contiguous())  # (rows, cols)
        self.register_buffer("ones", torch.ones(len(integers), dtype=torch.bfloat16))
        self.register_buffer("scale", scale.float())
        self.register_buffer("bias", bias)

    def forward(self, x: Float[Tensor, "B T cols"]) -> Float[Tensor, "B T rows"]:
        """Multiply integers with bfloat16; scale the sums, in float32."""
        tokens = x.flatten(0, 1).bfloat16()  # (B * T, cols)
        if len(tokens) > FEW or x.shape[-1] % LANES:
            sums = F.linear(tokens, self.integers.bfloat16())  # -128 to 127: exact
        else:
            # The kernel would round the scales to bfloat16, so it is given ones.
            sums = int8_product(tokens, self.integers, self.ones)
        products = sums * self.scale  # float32
        if self.bias is not None:
            products = products + self.bias
        return products.view(*x.shape[:2], -1)


class FastBlock(nn.Module):
    """`LlamaBlock` with four products instead of seven, and one rotation, not two."""

    def __init__(self, block: LlamaBlock) -> None:
        super().__init__()
        attention, ffn = block.attention, block.ffn
        self.head_dim = attention.head_dim
        self.num_heads = attention.q_proj.out_features // self.head_dim
        self.num_kv_heads = attention.k_proj.out_features // self.head_dim
        self.attention_norm = _frozen(block.attention_norm)
        self.qkv_proj = Int8Linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out_proj = Int8Linear(attention.out_proj)
        self.ffn_norm = _frozen(block.ffn_norm)
        self.gate_up_proj = Int8Linear(ffn.gate_proj, ffn.up_proj)
        self.down_proj = Int8Linear(ffn.down_proj)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rotate: Rotate,
        mask: Bool[Tensor, "#B 1 T S"],
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        heads = self.qkv_proj(self.attention_norm(x))  # (B, T, (N + 2K) * H)
        heads = heads.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        turning, values = heads.tensor_split((-self.num_kv_heads,), dim=1)
        queries, keys = rotate(turning).tensor_split((self.num_heads,), dim=1)
        if cache is not None:
            keys, values = cache.append(keys, values)  # (B, K, S, H)
        heads = attend_fused(queries, keys, values, mask)
        x = x + self.out_proj(heads.transpose(1, 2).flatten(2))
        gate, up = self.gate_up_proj(self.ffn_norm(x)).chunk(2, dim=-1)  # (B, T, F)
        return x + self.down_proj(F.silu(gate) * up)


class FastLlama(Llama):
    """A Llama whose blocks and head are for speed. It is made by `speed_up`."""

    def __init__(self, model: Llama) -> None:
        nn.Module.__init__(self)
        head = model.embedding if model.config.tied_head else model.lm_head
        self.config = model.config
        self.embedding = _frozen(model.embedding)
        self.blocks = nn.ModuleList(
            FastBlock(cast(LlamaBlock, block)) for block in model.blocks
        )
        self.norm = _frozen(model.norm)
        self.head = Int8Linear(head)

    def score(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        return self.head(x)


def speed_up(model: Llama) -> FastLlama:
    """Make the fast model of one in float32 on the CPU, which stays as it is.

    They share the embedding and the gains of the norms; the other weights of a model
    that is no longer needed can be let go.

    Raises:
        ValueError: the model is not a plain Llama, is elsewhere, has another dtype, or
            has weights that are not finite.
    """
    if type(model) is not Llama:
        raise ValueError(f"only a Llama can be sped up, got {type(model).__name__}")
    for name, weight in model.named_parameters():
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            raise ValueError(
                f"the fast path is made of float32 on the CPU, {name} is "
                f"{weight.dtype} on {weight.device}"
            )
    return FastLlama(model).eval()


def _frozen(module: nn.Module) -> nn.Module:
    """Copy a module, but not its weights, which get no gradients in the copy."""
    weights = {id(p): nn.Parameter(p.detach(), False) for p in module.parameters()}
    return copy.deepcopy(module, weights)
