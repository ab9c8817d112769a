"""Where the merges of a byte-pair encoder come from."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

from annotated_src.byte_alphabet import to_visible
from annotated_src.byte_pair import WORDS, cut_pieces


def learn_merges(
    texts: Iterable[str], count: int, patterns: Sequence[str] = (WORDS,)
) -> list[tuple[str, str]]:
    """Join the most frequent pair of neighbours, count times over.

    Of two that are equally frequent, the one with the older parts.

    Source: Sennrich et al. 2016, algorithm 1; tokenizers `BpeTrainer`.
    """
    pieces = Counter(
        to_visible(p) for text in texts for p in cut_pieces(text, patterns)
    )
    words = {piece: list(piece) for piece in pieces}
    age = {char: i for i, char in enumerate(sorted(set("".join(words))))}
    merges = []
    for _ in range(count):
        pairs = Counter()
        for piece, tokens in words.items():
            for pair in pairwise(tokens):
                pairs[pair] += pieces[piece]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], age[pair[0]], age[pair[1]]))
        merges.append(best)
        age.setdefault("".join(best), len(age))
        words = {piece: join_pair(tokens, best) for piece, tokens in words.items()}
    return merges


def join_pair(tokens: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """Join a pair wherever it stands, from left to right."""
    joined, i = [], 0
    while i < len(tokens):
        width = 2 if tuple(tokens[i : i + 2]) == pair else 1
        joined.append("".join(tokens[i : i + width]))
        i += width
    return joined
