"""The small ChatGLM that comes with the book, and a text that it has not seen.

`train_small_chatglm` made both; data/small_chatglm/README.md says of what.
"""

from pathlib import Path

SMALL_CHATGLM = Path(__file__).parent / "data" / "small_chatglm"
"""A directory for `load_model` and `load_tokenizer`, in the original's format."""

HELD_OUT_FILE = "held_out.txt"


def held_out() -> list[list[str]]:
    """Read the chapters that the model was not trained on, verse by verse."""
    text = (SMALL_CHATGLM / HELD_OUT_FILE).read_text("utf-8")
    return [chapter.splitlines() for chapter in text.split("\n\n")]
