"""Exercises on text and ids: merges, special tokens, half characters, safe cuts."""

import codecs
import math
import re
from itertools import pairwise

from annotated_src.checks.chapter import Chapter
from annotated_src.checks.exercise import Choice

chapter = Chapter("text/03_tokens", "Text to ids")


@chapter.implement(
    title="merges in the order of learning",
    minutes=12,
    difficulty="moderate",
    section="Encoding goes by rank",
    text="""
Write `merge_by_rank`, without looking it up: the heart of byte-pair encoding. `tokens`
are the letters of one word. `ranks` is a table of the pairs that may be joined, in any
order; the pair that was learnt first has the lowest rank, 0.
""",
    hints=(
        "Of all neighbours that may be joined *now*, which comes first? Join it, and "
        "look again, for there may be new neighbours.",
        "The lowest rank, and of equal ones the leftmost. What ends the loop?",
    ),
    proves="Words are cut as training cut them: by rank, in any place, again and "
    "again, and only with pairs that are in the table.",
    why="All occurrences at once, or one sweep through the table from rank 0 on, give "
    "the same on every table that was really learnt, because a pair is learnt after "
    "its parts. The chapter shows a table where they part.",
)
def merge_by_rank(tokens, ranks):
    """List the tokens when all is joined that may be; `ranks[a, b]` is an int."""
    tokens = list(tokens)
    while True:
        pairs = enumerate(pairwise(tokens))
        found = [(ranks[pair], i) for i, pair in pairs if pair in ranks]
        if not found:
            return tokens
        _, i = min(found)
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]


def ranked(*pairs):
    """Write a table: each pair is two texts with a space between, in order of rank."""
    return {tuple(pair.split()): rank for rank, pair in enumerate(pairs)}


def trained(text, count):
    """Learn merges from a text, the textbook's way: count pairs, join the best."""
    words, ranks = [list(word) for word in text.split()], {}
    for rank in range(count):
        pairs = [pair for word in words for pair in pairwise(word)]
        best = max(sorted(set(pairs)), key=pairs.count)
        ranks[best] = rank
        words = [merge_by_rank.solution(word, {best: 0}) for word in words]
    return ranks


@merge_by_rank.cases
def _(draw):
    yield list("hum"), ranked("u m", "h u")
    yield list("aaa"), ranked("a a")
    yield list("abc"), ranked("a b", "b c", "a bc")
    yield list("hums"), {}
    yield list("humhum"), ranked("h u", "hu m")
    letters = ["aaabbc "[i] for i in draw.integers(0, 7, 300).tolist()]
    ranks = trained("".join(letters), 14)
    shuffled = {pair: ranks[pair] for pair in sorted(ranks)}
    for table in (ranks, ranks, shuffled, shuffled):
        yield ["abc"[i] for i in draw.integers(0, 3, 24).tolist()], table
    yield list("hum"), {("h", "u"): 1, ("u", "m"): 0}


@merge_by_rank.also("loops")
def _(tokens, ranks):
    tokens = tokens[:]
    while True:
        best, place = math.inf, -1
        for i in range(len(tokens) - 1):
            rank = ranks.get((tokens[i], tokens[i + 1]), math.inf)
            if rank < best:
                best, place = rank, i
        if place < 0:
            return tokens
        right = tokens.pop(place + 1)
        tokens[place] += right


@merge_by_rank.also("every occurrence of the best pair at once")
def _(tokens, ranks):
    while found := [pair for pair in pairwise(tokens) if pair in ranks]:
        best, joined = min(found, key=lambda pair: ranks[pair]), []
        for token in tokens:
            if joined and (joined[-1], token) == best:
                joined[-1] += token
            else:
                joined.append(token)
        tokens = joined
    return tokens


@merge_by_rank.also("one sweep through the table")
def _(tokens, ranks):
    for left, right in sorted(ranks, key=lambda pair: ranks[pair]):
        joined = []
        for token in tokens:
            if joined and joined[-1] == left and token == right:
                joined[-1] = left + right
            else:
                joined.append(token)
        tokens = joined
    return tokens


@merge_by_rank.mistake(
    "the leftmost pair",
    because="we read from the left, and the first pair that may be joined is there to "
    "be joined; but the other one was learnt first",
)
def _(tokens, ranks):
    tokens = list(tokens)
    while True:
        found = [i for i, pair in enumerate(pairwise(tokens)) if pair in ranks]
        if not found:
            return tokens
        i = found[0]
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]


@merge_by_rank.mistake(
    "one occurrence of each pair",
    because="a merge reads like a rule that is applied once; it holds wherever the "
    "pair stands",
    section="Learning the merges",
)
def _(tokens, ranks):
    tokens = list(tokens)
    for pair in sorted(ranks, key=lambda pair: ranks[pair]):
        if pair in (pairs := list(pairwise(tokens))):
            i = pairs.index(pair)
            tokens[i : i + 2] = ["".join(pair)]
    return tokens


@merge_by_rank.mistake(
    "a token joined on both sides",
    because="in a a a the pair a a stands twice; but the middle one is gone when the "
    "first two are joined",
    section="Learning the merges",
)
def _(tokens, ranks):
    while found := [pair for pair in pairwise(tokens) if pair in ranks]:
        best, joined, used = min(found, key=lambda pair: ranks[pair]), [], False
        for i, token in enumerate(tokens):
            if i + 1 < len(tokens) and (token, tokens[i + 1]) == best:
                joined.append(token + tokens[i + 1])
                used = True
            else:
                if not used:
                    joined.append(token)
                used = False
        tokens = joined
    return tokens


@merge_by_rank.mistake(
    "ranks of texts instead of pairs",
    because="the vocabulary is a list of texts; but ab + c is another merge than a + "
    "bc, and only one of them was learnt",
)
def _(tokens, ranks):
    tokens, known = list(tokens), {"".join(pair): rank for pair, rank in ranks.items()}
    while True:
        whole = [a + b for a, b in pairwise(tokens)]
        found = [(known[text], i) for i, text in enumerate(whole) if text in known]
        if not found:
            return tokens
        _, i = min(found)
        tokens[i : i + 2] = [whole[i]]


@merge_by_rank.mistake(
    "the longest match",
    because="the longest entry that fits looks like the best use of a vocabulary, and "
    "WordPiece does so; byte-pair encoding repeats its training",
)
def _(tokens, ranks):
    rest, found = "".join(tokens), []
    known = {"".join(pair) for pair in ranks}
    while rest:
        sizes = (n for n in range(len(rest), 1, -1) if rest[:n] in known)
        size = next(sizes, 1)
        found.append(rest[:size])
        rest = rest[size:]
    return found


@merge_by_rank.mistake(
    "the highest rank first",
    because="a high rank sounds like a strong pair; the number is the place in a list "
    "whose best comes first",
)
def _(tokens, ranks):
    tokens = list(tokens)
    while True:
        pairs = enumerate(pairwise(tokens))
        found = [(-ranks[pair], i) for i, pair in pairs if pair in ranks]
        if not found:
            return tokens
        _, i = min(found)
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]


@merge_by_rank.mistake(
    "rank 0 taken for none",
    because="`ranks.get(pair)` is `None` for a pair that is not there, and `if` takes "
    "0 for nothing as well; so the best pair of all is never joined",
)
def _(tokens, ranks):
    tokens = list(tokens)
    while True:
        pairs = enumerate(pairwise(tokens))
        found = [(ranks[pair], i) for i, pair in pairs if ranks.get(pair)]
        if not found:
            return tokens
        _, i = min(found)
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]


@merge_by_rank.mistake(
    "in the order of the dictionary",
    because="the file lists merges by rank, and a dictionary keeps the order in which "
    "it was filled; whoever sorts it by name still has the right ranks",
)
def _(tokens, ranks):
    for left, right in ranks:
        tokens = merge_by_rank.solution(tokens, {(left, right): 0})
    return tokens


@merge_by_rank.mistake(
    "the rightmost of equals",
    because="among equal ranks any will do, it seems; in a a a it decides where the "
    "single one is left",
)
def _(tokens, ranks):
    tokens = list(tokens)
    while True:
        pairs = enumerate(pairwise(tokens))
        found = [(ranks[pair], -i) for i, pair in pairs if pair in ranks]
        if not found:
            return tokens
        i = -min(found)[1]
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]


@chapter.implement(
    title="a text from a stranger",
    minutes=12,
    difficulty="moderate",
    section="Special tokens, and who may write them",
    text="""
A prompt comes in parts, each with a word on who wrote it: `(text, trusted)`. In a
trusted part (the template's) each text of the table `special` becomes its one id. In
any other part nothing is special. All else becomes bytes: the ids are the bytes of
UTF-8. (Real encoders would go on to merge these; and no special text begins another.)
""",
    hints=(
        "Each part is encoded by itself. What a stranger writes must come back when "
        "the ids are decoded, every character of it.",
        "`re.split` with a group in its pattern keeps what it splits at. `re.escape` "
        "takes the meaning out of `|`.",
    ),
    proves="The template's special tokens are single ids, a stranger's never are, not "
    "even with the help of a neighbour, and no byte of anybody's text is lost.",
)
def encode_parts(parts, special):
    """List the ids of all parts, in order; `special` is a dict from text to id."""
    ids = []
    anywhere = "|".join(map(re.escape, special))
    for text, trusted in parts:
        for chunk in re.split(f"({anywhere})", text) if trusted else [text]:
            if trusted and chunk in special:
                ids.append(special[chunk])
            else:
                ids.extend(chunk.encode())
    return ids


CHAT = {"<|start|>": 256, "<|end|>": 257}


@encode_parts.cases
def _(draw):
    yield [("Hi", False), ("<|end|>", True)], CHAT
    yield [("<|end|>", False), ("<|end|>", True)], CHAT
    yield [("<|end", False), ("|>", True)], CHAT
    yield [("é🦙", True), ("é🦙", False)], CHAT
    yield [("<|e<|end|>nd|>", False), ("\n<|start|>", True)], CHAT
    yield [("<|e", True), ("nd|>", True)], CHAT
    words = ["<|start|>", "<|end|>", "\n", "user", "<|en", "d|>", "嗯 ", "|", "a.b"]
    for _ in range(3):
        texts = [
            "".join(words[i] for i in draw.integers(0, len(words), 9).tolist())
            for _ in range(6)
        ]
        yield [(text, i % 2 == 0) for i, text in enumerate(texts)], CHAT


@encode_parts.also("a loop over places")
def _(parts, special):
    ids = []
    for text, trusted in parts:
        place = 0
        while place < len(text):
            here = [s for s in special if trusted and text.startswith(s, place)]
            if here:
                ids.append(special[here[0]])
                place += len(here[0])
            else:
                ids.extend(text[place].encode("utf-8"))
                place += 1
    return ids


@encode_parts.also("partition, again and again")
def _(parts, special):
    def cut(text, left):
        if not left:
            return list(text.encode())
        before, found, after = text.partition(left[0])
        ids = cut(before, left[1:])
        return [*ids, special[found], *cut(after, left)] if found else ids

    return [
        i
        for text, trusted in parts
        for i in cut(text, list(special) if trusted else [])
    ]


def special_everywhere(text, special):
    """List the ids of a text in which special tokens count, whoever wrote it."""
    ids = []
    for chunk in re.split(f"({'|'.join(map(re.escape, special))})", text):
        ids += [special[chunk]] if chunk in special else chunk.encode()
    return ids


@encode_parts.mistake(
    "special in everybody's text",
    because="an encoder finds them by default, and one's own tests hold no stranger",
)
def _(parts, special):
    return [i for text, _ in parts for i in special_everywhere(text, special)]


@encode_parts.mistake(
    "rendered first, then encoded",
    because="a template makes one text, and one text is encoded in one call; who wrote "
    "what is then forgotten",
    section="A conversation is one text",
)
def _(parts, special):
    return special_everywhere("".join(text for text, _ in parts), special)


@encode_parts.mistake(
    "special in nobody's text",
    because="switched off is safe; but then the model never sees where a turn ends",
    section="What an answer is worth",
)
def _(parts, special):
    return list("".join(text for text, _ in parts).encode())


@encode_parts.mistake(
    "deleted, then trusted",
    because="what is deleted can do no harm; but what is left may close up into the "
    "very thing, and the user's text is no longer the user's",
)
def _(parts, special):
    ids = []
    for text, trusted in parts:
        left = text
        for name in special if not trusted else ():
            left = left.replace(name, "")
        ids += special_everywhere(left, special)
    return ids


@encode_parts.mistake(
    "a space slipped in",
    because="`< |end|>` is no special token and reads nearly the same; it is not what "
    "was written, and a question about the token gets a wrong answer",
)
def _(parts, special):
    ids = []
    for text, trusted in parts:
        shown = text if trusted else text.replace("<|", "< |")
        ids += special_everywhere(shown, special)
    return ids


@encode_parts.mistake(
    "code points for bytes",
    because="for plain English `ord` gives the same numbers",
    section="Characters and bytes",
)
def _(parts, special):
    ids = []
    for text, trusted in parts:
        for chunk in re.split(f"({'|'.join(map(re.escape, special))})", text):
            if trusted and chunk in special:
                ids.append(special[chunk])
            else:
                ids += map(ord, chunk)
    return ids


@chapter.implement(
    title="whole characters, as they come",
    minutes=10,
    difficulty="moderate",
    section="Half a character",
    text="""
An answer arrives as tokens, and a token is some bytes: `pieces`. After each one, show
the characters that are whole by now and have not been shown. The answer may have been
cut off inside a character: show what is left at the end, decoded with
`errors="replace"`, which puts � for it. No other bytes are broken.
""",
    hints=(
        "A token can end one character and begin another. The first can be shown at "
        "once.",
        "`codecs.getincrementaldecoder` keeps the bytes of a character that is not yet "
        "whole. By hand: of the bytes held, the longest beginning that decodes.",
    ),
    proves="Every character is shown as soon as its last byte is there, once, and "
    "never in halves; half a character at the end is not kept secret.",
    why="It is better than the chapter's `stream_text` where a token ends one "
    "character and begins the next: it shows the first at once. And it decodes no "
    "byte twice. But it works for vocabularies of bytes only.",
)
def stream_characters(pieces):
    """List the texts to show: one a piece ("" for nothing), and one at the end."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    shown = [decoder.decode(piece) for piece in pieces]
    return [*shown, decoder.decode(b"", final=True)]


@stream_characters.cases
def _(draw):
    llama, hm = "🦙".encode(), "嗯".encode()
    yield ([b"a", hm[:1], hm[1:]],)
    yield ([hm[:2], hm[2:] + hm[:1], hm[1:]],)
    yield ([b"!", llama[:2]],)
    text = "A 🦙 hums: 嗯! é, ñ, and 🦙🦙. ".encode() * 2
    for _ in range(3):
        cuts = sorted({0, len(text), *draw.integers(0, len(text), 20).tolist()})
        yield ([text[a:b] for a, b in pairwise(cuts)],)
    yield ([bytes([byte]) for byte in text],)


def whole(held):
    """Split bytes into the whole characters that they begin with, and the rest."""
    for cut in range(len(held), -1, -1):
        try:
            return held[:cut].decode(), held[cut:]
        except UnicodeDecodeError:
            continue
    return "", held


@stream_characters.also("bytes held by hand")
def _(pieces):
    shown, held = [], b""
    for piece in pieces:
        text, held = whole(held + piece)
        shown.append(text)
    return [*shown, held.decode(errors="replace")]


@stream_characters.also("lengths from the first bytes")
def _(pieces):
    shown, held = [], b""
    for piece in pieces:
        held += piece
        text = ""
        while held:
            first = held[0]
            size = 1 + (first >= 0xC0) + (first >= 0xE0) + (first >= 0xF0)
            if len(held) < size:
                break
            text += held[:size].decode()
            held = held[size:]
        shown.append(text)
    return [*shown, held.decode(errors="replace")]


@stream_characters.mistake(
    "each token by itself",
    because="a token looks like a piece of text; for English it nearly always is",
)
def _(pieces):
    return [*(piece.decode(errors="replace") for piece in pieces), ""]


@stream_characters.mistake(
    "broken bytes ignored",
    because="`errors='ignore'` makes the � go away; the character goes with it",
)
def _(pieces):
    return [*(piece.decode(errors="ignore") for piece in pieces), ""]


@stream_characters.mistake(
    "all decoded again, the new part shown",
    because="the whole text is right each time; but a � that was shown is not taken "
    "back when it becomes a character",
)
def _(pieces):
    shown, held, before = [], b"", 0
    for piece in pieces:
        held += piece
        text = held.decode(errors="replace")
        shown.append(text[before:])
        before = len(text)
    return [*shown, ""]


@stream_characters.mistake(
    "held back until all is whole",
    because="a text that ends in � is not finished, so nothing of it is shown; but the "
    "characters before the last one are",
)
def _(pieces):
    shown, held = [], b""
    for piece in pieces:
        held += piece
        text = held.decode(errors="replace")
        done = not text.endswith("�")
        shown.append(text if done else "")
        held = b"" if done else held
    return [*shown, held.decode(errors="replace")]


@stream_characters.mistake(
    "the end forgotten",
    because="a finished answer ends in whole characters; one that was cut off by "
    "`max_new_tokens` need not",
)
def _(pieces):
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return [*(decoder.decode(piece) for piece in pieces), ""]


@stream_characters.mistake(
    "a byte is a character",
    because="latin-1 never fails, and agrees on every letter of English",
    section="Characters and bytes",
)
def _(pieces):
    return [*(piece.decode("latin-1") for piece in pieces), ""]


@stream_characters.mistake(
    "silence left out",
    because="a stream only speaks when it has something to say; here each piece gets "
    "its answer, if it is an empty one",
)
def _(pieces):
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    shown = [decoder.decode(piece) for piece in pieces]
    return [text for text in [*shown, decoder.decode(b"", final=True)] if text]


chapter.explain(
    "two_perplexities",
    title="nine against twelve",
    minutes=5,
    difficulty="moderate",
    section="What an answer is worth",
    text=r"""
The *perplexity* of a text is $e^{-\ell}$, where $\ell$ is the mean log-probability of
its tokens. On one text model A has a perplexity of 9, model B of 12. A's tokenizer cuts
the text into 1300 tokens, B's into 1000. Which model expects the text better?
""",
    hints=(
        "Perplexity is per token, and the two do not have the same tokens. What do "
        "they have in common?",
        "The text. How many nats of surprise is the whole of it, to each of them?",
    ),
    choices={
        "a": Choice(
            "A: 9 is less than 12.",
            "Per token. But A makes 1300 guesses where B makes 1000. Spread the same "
            "surprise over more tokens, and the perplexity is lower.",
        ),
        "b": Choice(
            "B: the whole text is less of a surprise to it.",
            "$1300 \\ln 9 = 2856$ nats for A, $1000 \\ln 12 = 2485$ for B. B makes "
            "fewer, harder guesses, and its figure looks worse.",
        ),
        "c": Choice(
            "Nobody can tell: their tokens are not the same.",
            "True of perplexities per token. But both give a probability to the same "
            "text, and these can be compared.",
        ),
        "d": Choice(
            "A: more tokens say more about the text.",
            "More tokens are more guesses for the same text, and their surprises add "
            "up.",
        ),
    },
    right="b",
    why="Divide the surprise by the bytes of the text (and by $\\ln 2$) for *bits per "
    "byte*, which depends on no tokenizer's way to cut.",
)


@chapter.debug(
    title="a long book, in blocks",
    minutes=10,
    difficulty="moderate",
    section="Pieces: digits, and what a space costs",
    text="""
To encode a long book faster, a colleague cuts it into blocks, encodes each, and joins
the ids. Decoding gives the book back, and yet its perplexity rises. Mend the cuts: a
block has `size` characters or more, and ends at the first place where a space stands
before a letter, of any alphabet (`isalpha`). No piece is cut there.
""",
    hints=(
        "No merge crosses the end of a piece. To which piece does the space belong?",
        "The space goes with the word behind it: cut in front of it.",
    ),
    proves="Every block ends where a piece ends, as soon as it may, and no character "
    "of the book is lost.",
    why="Decoding gives the text back for *any* ids whose bytes add up, so it proves "
    "nothing about encoding. A block that ends inside a word leaves tokens side by "
    "side that training would have joined.",
)
def cut_blocks(text, size):
    """List the blocks of a text, all but the last of `size` characters or more."""
    blocks, start = [], 0
    for i in range(len(text) - 1):
        if i - start >= size and text[i] == " " and text[i + 1].isalpha():
            blocks.append(text[start:i])
            start = i
    return [*blocks, text[start:]]


@cut_blocks.broken(
    "a cut at any character",
    because="the blocks put together are the text, so nothing seems lost",
)
def _(text, size):
    return [text[i : i + size] for i in range(0, len(text), size)]


@cut_blocks.cases
def _(draw):
    yield "a llama hums", 3
    yield "so it is", 2
    yield "it  is  8 o'clock \n in a", 2
    yield "to\tbe or\nnot to", 2
    yield "un été à La Paz", 2
    words = ["the", "llama", " hums,", "\n", "in", "2024", " ", "unbelievably", "a"]
    for size in (1, 10, 24):
        chosen = draw.integers(0, len(words), 40).tolist()
        yield " ".join(words[i] for i in chosen) + " end ", size


@cut_blocks.also("a regular expression")
def _(text, size):
    blocks, start, place = [], 0, re.compile(r" (?=[^\W\d_])")
    while found := place.search(text, start + size):
        blocks.append(text[start : found.start()])
        start = found.start()
    return [*blocks, text[start:]]


@cut_blocks.also("character by character")
def _(text, size):
    blocks = [""]
    for here, following in zip(text, text[1:] + "\n", strict=True):
        if len(blocks[-1]) >= size and here == " " and following.isalpha():
            blocks.append("")
        blocks[-1] += here
    return blocks


@cut_blocks.mistake(
    "behind the space",
    because="in writing a word ends with its space; to this tokenizer it begins with "
    "it",
)
def _(text, size):
    blocks, start = [], 0
    for i in range(len(text) - 1):
        if i + 1 - start >= size and text[i] == " " and text[i + 1].isalpha():
            blocks.append(text[start : i + 1])
            start = i + 1
    return [*blocks, text[start:]]


@cut_blocks.mistake(
    "split and join",
    because="`split()` finds the words; that there were two spaces, or a new line, it "
    "does not tell",
)
def _(text, size):
    blocks = [""]
    for word in text.split():
        if len(blocks[-1]) >= size:
            blocks.append("")
        blocks[-1] += f" {word}" if blocks != [""] else word
    return blocks


@cut_blocks.mistake(
    "in front of any space",
    because="one space belongs to the word behind it; of several only the last does, "
    "and the others are a piece together",
)
def _(text, size):
    blocks, start = [], 0
    for i in range(len(text) - 1):
        if i - start >= size and text[i] == " ":
            blocks.append(text[start:i])
            start = i
    return [*blocks, text[start:]]


@cut_blocks.mistake(
    "at any white space",
    because="a new line parts two words as a space does; but only a space goes with "
    "the word behind it",
)
def _(text, size):
    blocks, start = [], 0
    for i in range(len(text) - 1):
        if i - start >= size and text[i].isspace() and text[i + 1].isalpha():
            blocks.append(text[start:i])
            start = i
    return [*blocks, text[start:]]


@cut_blocks.mistake(
    "the letters of English only",
    because="`[a-zA-Z]` holds every letter of an English book; “été” begins with none "
    "of them",
)
def _(text, size):
    blocks, start, place = [], 0, re.compile(r" (?=[a-zA-Z])")
    while found := place.search(text, start + size):
        blocks.append(text[start : found.start()])
        start = found.start()
    return [*blocks, text[start:]]


@cut_blocks.mistake(
    "the last block lost",
    because="the loop makes a block at each cut, and no cut comes after the last block",
)
def _(text, size):
    blocks, start = [], 0
    for i in range(len(text) - 1):
        if i - start >= size and text[i] == " " and text[i + 1].isalpha():
            blocks.append(text[start:i])
            start = i
    return blocks


@cut_blocks.mistake(
    "the size as a maximum",
    because="a block of at most so many characters sounds the same; then a long word "
    "leaves no place to cut",
)
def _(text, size):
    blocks, start, place = [], 0, 0
    for i in range(len(text) - 1):
        if text[i] == " " and text[i + 1].isalpha():
            if i - start > size and place > start:
                blocks.append(text[start:place])
                start = place
            place = i
    return [*blocks, text[start:]]


@cut_blocks.mistake(
    "one character too late",
    because="“longer than `size`” sounds like “`size` or more”",
)
def _(text, size):
    blocks, start = [], 0
    for i in range(len(text) - 1):
        if i - start > size and text[i] == " " and text[i + 1].isalpha():
            blocks.append(text[start:i])
            start = i
    return [*blocks, text[start:]]
