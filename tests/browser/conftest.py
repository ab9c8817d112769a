"""The book in a real browser: Chromium, driven by Playwright."""

import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from visiting import Watch

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def chromium():
    """Find a browser, or skip; CI sets REQUIRE_BROWSER, so that none goes missing."""
    found = (
        shutil.which(name) for name in (os.environ.get("CHROMIUM"), *NAMES) if name
    )
    if executable := next(filter(None, found), None):
        return executable
    said = f"no browser: none of {', '.join(NAMES)} is installed, nor named by CHROMIUM"
    if os.environ.get("REQUIRE_BROWSER"):
        pytest.fail(said)
    pytest.skip(said)


@pytest.fixture(scope="module")
def browser():
    """A browser for one file of tests: while it runs, so does a loop of asyncio."""
    executable = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture
def open_page(site, browser):
    """Open a page of the book as a reader who has never been there.

    At the end there has been no error, and no request to anywhere else.
    """
    watches = []

    def open_one(path, width=1280, height=900, dark=False):
        page = browser.new_page(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce",
        )
        watches.append(Watch(page))
        page.goto(address(site, path))
        return page

    yield open_one
    for watch in watches:
        watch.page.close()
    assert not [line for watch in watches for line in watch.problems]


def address(site, path):
    """The address of a page of the book; a question or an anchor may follow it."""
    name, mark, rest = path.partition("?" if "?" in path else "#")
    return (site / name).as_uri() + mark + rest
