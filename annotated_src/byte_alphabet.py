"""Bytes as characters that one can see, the letters of a byte-level vocabulary."""


def visible_bytes() -> dict[int, str]:
    """Give each of the 256 bytes a character that one can see.

    A byte that Latin-1 shows keeps its character. The other 68, among them all spaces
    and controls, get those from 256 on: the space becomes Ġ, the line break Ċ.

    Source: Radford et al. 2019; openai/gpt-2 `bytes_to_unicode`.
    """
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    given = {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return {byte: given.get(byte, chr(byte)) for byte in range(256)}


VISIBLE = visible_bytes()
BYTES = {char: byte for byte, char in VISIBLE.items()}


def to_visible(text: str) -> str:
    """Write the UTF-8 bytes of a text, one visible character each."""
    return "".join(VISIBLE[byte] for byte in text.encode("utf-8"))


def to_bytes(token: str) -> bytes:
    """Turn visible characters into bytes; a token with others stands for itself."""
    if all(char in BYTES for char in token):
        return bytes(BYTES[char] for char in token)
    return token.encode("utf-8")
