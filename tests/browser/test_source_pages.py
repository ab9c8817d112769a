"""Annotated source outside of folders: nothing to stumble over, for eye or hand."""

import pytest
from visiting import ASPECTS, pages_of, visit_all


@pytest.fixture(scope="module")
def wrong(site, browser):
    pages = [page for page in pages_of(site, "source/") if page.count("/") == 1]
    assert len(pages) > 50
    return visit_all(site, browser, pages)


@pytest.mark.parametrize("aspect", ASPECTS)
def test_nothing_is_wrong_with_a_page_of_source(wrong, aspect):
    assert not wrong[aspect]
