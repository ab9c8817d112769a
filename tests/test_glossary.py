"""The glossary: every term is one that the chapters use, and leads to one of them."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book/_ext"))

from chapters import chapters  # noqa: E402

GLOSSARY = (ROOT / "book/glossary.md").read_text("utf-8")
CHAPTERS = {chapter.label: chapter for chapter in chapters()}


def plain(text):
    """Text on one line, without the signs that make words bold or code."""
    return " ".join(re.sub(r"[*`]", "", text).lower().split())


def uses(text, term):
    """Whether a text has a term, also in its plural."""
    return re.search(rf"(?<!\w){re.escape(term.lower())}(e?s)?(?!\w)", text)


def entries():
    """The terms of each entry, and what it says."""
    body = re.search(r"^```\{glossary\}\n(.*)^```$", GLOSSARY, re.M | re.S)[1]
    for entry in body.strip("\n").split("\n\n"):
        lines = entry.split("\n")
        terms = [line for line in lines if not line.startswith("  ")]
        yield terms, " ".join(line.strip() for line in lines[len(terms) :])


ENTRIES = list(entries())
TEXTS = {label: plain(chapter.text) for label, chapter in CHAPTERS.items()}


def test_no_term_comes_twice():
    terms = [term for names, _ in ENTRIES for term in names]
    assert len(terms) == len(set(terms)) >= 80


def test_entries_are_sorted_word_by_word():
    firsts = [re.sub(r"\W+|_", " ", names[0].lower()).strip() for names, _ in ENTRIES]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize(("terms", "words"), ENTRIES, ids=lambda e: str(e[0]))
def test_an_entry_is_used_and_leads_to_a_chapter_that_uses_it(terms, words):
    for term in terms:
        assert any(uses(text, term) for text in TEXTS.values()), term
    links = re.findall(r"\{ref\}`ch-([\w-]+)`", words)
    assert links
    assert any(uses(TEXTS[links[-1]], term) for term in terms)
    assert 1 <= len(re.findall(r"[.?](?=\s|$)", words)) <= 4
    assert len(words) < 330, "a glossary defines; the chapter explains"


def test_what_counts_as_used():
    assert uses("two masks", "mask")
    assert not uses("masked", "mask")
