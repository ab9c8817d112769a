"""Annotated source in folders: nothing to stumble over, for eye, ear or hand."""

import pytest
from visiting import ASPECTS, pages_of, visit_all


@pytest.fixture(scope="module")
def wrong(site, browser):
    pages = [page for page in pages_of(site, "source/") if page.count("/") > 1]
    assert len(pages) > 90
    return visit_all(site, browser, pages)


@pytest.mark.parametrize("aspect", ASPECTS)
def test_nothing_is_wrong_with_a_page_of_a_folder(wrong, aspect):
    assert not wrong[aspect]
