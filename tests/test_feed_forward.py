import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from annotated_src.activations import gelu_exact, silu
from annotated_src.feed_forward import FeedForward, GatedFeedForward


def test_feed_forward_equals_torch():
    ours = FeedForward(6, 10, gelu_exact)
    theirs = nn.Sequential(ours.up_proj, nn.GELU(), ours.down_proj)
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours.up_proj.bias is not None
    assert ours.down_proj.bias is not None


def test_gated_feed_forward_equals_transformers():
    config = LlamaConfig(
        hidden_size=6, intermediate_size=10, num_attention_heads=1, hidden_act="silu"
    )
    ours, theirs = GatedFeedForward(6, 10, silu), LlamaMLP(config)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(ours(x), theirs(x))


def test_only_the_gate_is_bent():
    layer = GatedFeedForward(1, 1, lambda x: x.clamp(min=0))
    layer.load_state_dict(
        {
            "gate_proj.weight": torch.tensor([[2.0]]),
            "up_proj.weight": torch.tensor([[-3.0]]),
            "down_proj.weight": torch.tensor([[5.0]]),
        }
    )
    x = torch.tensor([[[1.0], [-1.0]]])
    assert layer(x).flatten().tolist() == [2 * -3 * 5, 0]
