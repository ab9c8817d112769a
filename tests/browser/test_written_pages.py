"""Every other page: nothing to stumble over, for eye, ear or hand."""

import pytest
from visiting import ASPECTS, pages_of, visit_all


@pytest.fixture(scope="module")
def wrong(site, browser):
    pages = pages_of(site)
    assert len(pages) > 15
    return visit_all(site, browser, pages)


@pytest.mark.parametrize("aspect", ASPECTS)
def test_nothing_is_wrong_with_a_page(wrong, aspect):
    assert not wrong[aspect]
