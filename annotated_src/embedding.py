"""From token ids to vectors: one row of a table per id."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class TokenEmbedding(nn.Embedding):
    """`nn.Embedding`, with an error that names the ids when one is not in the table."""

    def __init__(self, vocab_size: int, embed_dim: int) -> None:
        super().__init__(vocab_size, embed_dim)

    def forward(self, input: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Look the ids up.

        Raises:
            ValueError: input is not (B, T), or an id is outside 0 .. V-1.
        """
        if input.ndim != 2:
            raise ValueError(f"tokens must be (B, T), got shape {tuple(input.shape)}")
        # A value read back from a tensor cannot be traced, so compilers skip the check.
        if input.numel() and not torch.compiler.is_compiling():
            low, high = (int(end) for end in input.aminmax())
            if low < 0 or high >= self.num_embeddings:
                raise ValueError(
                    f"token ids must be 0 to {self.num_embeddings - 1}, "
                    f"got ids from {low} to {high}"
                )
        return super().forward(input)


class ScaledEmbedding(TokenEmbedding):
    """`TokenEmbedding`, its vectors times the root of their width, as in Gemma.

    The factor is rounded to the weights' dtype first: the root of 3072 is 55.43, and in
    bfloat16 55.5.

    Source: transformers `GemmaTextScaledWordEmbedding`;
    Vaswani et al. 2017, section 3.4.
    """

    def forward(self, input: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        vectors = super().forward(input)
        return vectors * vectors.new_tensor(self.embedding_dim**0.5)
