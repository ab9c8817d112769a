"""Every chapter: nothing to stumble over, for eye, ear or hand."""

from pathlib import Path

import pytest
from visiting import ASPECTS, pages_of, visit_all

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = sorted((ROOT / "notebooks").glob("*/[0-9]*.py"))


@pytest.fixture(scope="module")
def wrong(site, browser):
    return visit_all(site, browser, pages_of(site, "notebooks/"))


def test_there_are_as_many_pages_as_chapters(site):
    assert len(pages_of(site, "notebooks/")) == len(CHAPTERS)


@pytest.mark.parametrize("aspect", ASPECTS)
def test_nothing_is_wrong_with_a_chapter(wrong, aspect):
    assert not wrong[aspect]
