"""What ChatGLM-6B does to text, before SentencePiece cuts it and after it joins it."""

import re
from collections.abc import Mapping, Sequence
from itertools import cycle

LONGEST_RUN = 80
# Whitespace that SentencePiece would fold is written as a mark, which is one piece.
MARKS = {"<n>": "\n", "<|tab|>": "\t"} | {
    f"<|blank_{n}|>": " " * n for n in range(2, LONGEST_RUN + 1)
}
# English is cleaned up: each of these loses its spaces, one kind after the other.
SPACED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
# Where a text ends like the beginning of one of these, or of a mark, more may come.
UNSETTLED = re.compile(r"(?:[ '][ 'nvr]*)?(?:<[|a-z0-9_]{0,10})?\Z")
FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
CHINESE = "[\u4e00-\u9fff]"


def mark_whitespace(text: str) -> str:
    """Write newlines, tabs and runs of 2 to 80 spaces as marks.

    A run of more is several, the longest first; a single space stays.

    Source: ChatGLM-6B `SPTokenizer._preprocess`.
    """
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    runs = f" {{2,{LONGEST_RUN}}}"
    return re.sub(runs, lambda run: f"<|blank_{len(run[0])}|>", text)


def clean_up(text: str) -> str:
    """Read the marks back as whitespace, and take spaces before punctuation out.

    Source: ChatGLM-6B `SPTokenizer.postprocess`; transformers `clean_up_tokenization`.
    """
    for mark, whitespace in MARKS.items():
        text = text.replace(mark, whitespace)
    for spaced in SPACED:
        text = text.replace(spaced, spaced.strip())
    return text


def settled(text: str) -> str:
    """Leave out an end that `clean_up` may still change, once more text follows."""
    return UNSETTLED.sub("", text)


def chat_prompt(query: str, history: Sequence[tuple[str, str]]) -> str:
    """Write a conversation out: past questions with their answers, then the question.

    A first question stands alone.

    Source: ChatGLM-6B `ChatGLMForConditionalGeneration.chat`.
    """
    if not history:
        return query
    rounds = [*history, (query, "")]
    lines = [f"[Round {i}]\n问：{q}\n答：{a}" for i, (q, a) in enumerate(rounds)]
    return "\n".join(lines)


def split_rounds(
    messages: Sequence[Mapping[str, str]],
) -> tuple[str, list[tuple[str, str]]]:
    """Tell the last question of a conversation from the rounds before it.

    Raises:
        ValueError: the roles are not user, assistant, user, ..., user, or a message has
            no content.
    """
    roles = [message.get("role") for message in messages]
    turns = [turn for turn, _ in zip(cycle(["user", "assistant"]), roles)]
    if roles != turns or len(roles) % 2 == 0:
        raise ValueError(
            f"roles are {roles}, expected user and assistant by turns, "
            "the user first and last"
        )
    for i, message in enumerate(messages):
        if "content" not in message:
            raise ValueError(f"message {i} has no content: {dict(message)}")
    texts = [message["content"] for message in messages]
    return texts[-1], list(zip(texts[:-1:2], texts[1::2], strict=True))


def clean_response(text: str) -> str:
    """Tidy an answer for show, and fill in the year that its training texts left blank.

    Punctuation beside a Chinese character becomes full-width.

    Source: ChatGLM-6B `ChatGLMForConditionalGeneration.process_response`.
    """
    text = text.strip().replace("[[训练时间]]", "2023年")  # "[[time of training]]"
    for half, full in FULL_WIDTH.items():
        mark = re.escape(half)
        text = re.sub(f"(?<={CHINESE}){mark}|{mark}(?={CHINESE})", full, text)
    return text
