"""Make data/moving/top_p.json anew: what top-p keeps of SmolLM2's next tokens.

python -m annotated_src.figures.moving.top_p_table
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from annotated_src.checkpoint import load_model
from annotated_src.figures.moving.top_p import SAVED
from annotated_src.sampling import temperature, top_p
from annotated_src.tokenizer import TextTokenizer
from annotated_src.weights import smollm2

PROMPTS = ("The capital of Japan is", "The llama opened the door and saw a")
TEMPERATURES = (0.5, 0.7, 1.0, 1.3, 1.6, 2.0)
CUTS = tuple(n / 20 for n in range(1, 21))
NUM_WORDS = 8


@torch.no_grad()
def measure(directory: Path) -> dict[str, Any]:
    """Run the model after each prompt, and cut at each temperature and p.

    `shares` are those of the best words. `kept` and `mass` go by p: how many tokens
    stay, and what they had together.
    """
    model, tokenizer = load_model(directory), TextTokenizer.from_pretrained(directory)
    prompts = []
    for prompt in PROMPTS:
        logits = model(tokenizer.encode(prompt), last_logits_only=True)[:, 0]
        best = logits[0].topk(NUM_WORDS).indices.tolist()
        prompts.append(
            {
                "text": prompt,
                "words": [tokenizer.decode([i]).strip() for i in best],
                "temperatures": [_cuts(temperature(logits, t)) for t in TEMPERATURES],
            }
        )
    return {
        "vocab_size": model.config.vocab_size,
        "temperatures": list(TEMPERATURES),
        "cuts": list(CUTS),
        "prompts": prompts,
    }


def _cuts(logits: Tensor) -> dict[str, list[float]]:
    shares = logits[0].double().softmax(-1)
    stays = [top_p(logits, p)[0].isfinite() for p in CUTS]
    best = shares.topk(NUM_WORDS).values
    return {
        "shares": [round(share, 5) for share in best.tolist()],
        "kept": [int(stay.sum()) for stay in stays],
        "mass": [round(shares[stay].sum().item(), 5) for stay in stays],
    }


if __name__ == "__main__":
    SAVED.write_text(json.dumps(measure(smollm2()), ensure_ascii=False) + "\n", "utf-8")
