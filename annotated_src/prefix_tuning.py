"""P-tuning v2: teach a frozen model a task by training what stands in its cache."""

from jaxtyping import Float
from torch import Tensor, nn


class PrefixEncoder(nn.Module):
    """Keys and values of tokens that never existed: trained, not computed from text.

    They stand in every layer's cache before the first token. Keys are not rotated, and
    the tokens' positions do not move. With projection, a small network makes them
    all from one vector a prefix token; it eases training and can be folded away after.

    Raises:
        ValueError: prefix_len is not positive.

    Source: Liu et al. 2021 (P-tuning v2), section 3; ChatGLM-6B `PrefixEncoder`,
    `ChatGLMModel.get_prompt`.
    """

    def __init__(
        self,
        prefix_len: int,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        projection: bool,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if prefix_len < 1:
            raise ValueError(f"prefix_len must be positive, got {prefix_len}")
        self.sizes = (num_layers, 2, num_heads, head_dim)
        width = num_heads * head_dim
        all_layers = num_layers * 2 * width  # a key and a value for each
        self.embedding = nn.Embedding(prefix_len, width if projection else all_layers)
        self.trans = nn.Identity()
        if projection:
            self.trans = nn.Sequential(
                nn.Linear(width, width), nn.Tanh(), nn.Linear(width, all_layers)
            )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, batch_size: int
    ) -> list[tuple[Float[Tensor, "B N P H"], Float[Tensor, "B N P H"]]]:
        """Make the prefix of every layer, the same for each row but for dropout."""
        prefix = self.trans(self.embedding.weight)  # (P, L * 2 * N * H)
        prefix = prefix.unflatten(-1, self.sizes)  # (P, L, 2, N, H)
        prefix = self.dropout(prefix.expand(batch_size, *prefix.shape))
        by_layer = prefix.permute(2, 3, 0, 4, 1, 5)  # (L, 2, B, N, P, H)
        return [(keys, values) for keys, values in by_layer]
