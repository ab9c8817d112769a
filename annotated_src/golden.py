"""What the original ChatGLM-6B code computed, and the small model that it ran."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from annotated_src.checkpoint import assign_strictly, names_by_layer, rename
from annotated_src.models.chatglm import HF_NAMES, ChatGLM, ChatGLMConfig

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "chatglm6b"


def golden(name: str) -> dict[str, Tensor]:
    """Read the tensors of one file; their layout is the original's, sequence first.

    meta.json beside them says what each is, and how closely another computation can be
    expected to agree.

    Raises:
        ValueError: no such file.
    """
    path = GOLDEN / f"{name}.safetensors"
    if not path.exists():
        names = sorted(p.stem for p in GOLDEN.glob("*.safetensors"))
        raise ValueError(f"no golden file {name!r}, there are {', '.join(names)}")
    return load_file(path)


def golden_config() -> dict[str, Any]:
    """Read the config.json of the small model, with the original's keys."""
    meta = json.loads((GOLDEN / "meta.json").read_text("utf-8"))
    return {**meta["config"], "tie_word_embeddings": False}


def golden_model(dtype: torch.dtype = torch.float32, **config: object) -> ChatGLM:
    """Build our model with the weights of the small one, ready to run, not to train.

    config replaces entries of `golden_config`. Its 3 layers are random, but for their
    names and shapes the tensors could be those of a checkpoint.
    """
    model = ChatGLM(ChatGLMConfig.from_hf(golden_config() | config))
    names = names_by_layer(model, HF_NAMES)
    stored = ((n, x) for n, x in golden("weights").items() if n in names)
    assign_strictly(model, rename(stored, names), dtype)
    return model.eval().requires_grad_(False)
