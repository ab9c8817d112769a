"""Print the book's single page to a PDF, with a Chromium that is already installed."""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright
from pypdf import PdfReader, PdfWriter

SCRIPT = Path(__file__).with_name("_print") / "print.js"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTH = 643  # CSS pixels between the margins of an A4 page in print.css
MINUTES = 10 * 60_000.0  # the longest that one step may take, in milliseconds
MISSING = (
    "A PDF needs Chromium or Chrome to print it, and none was found. Install one "
    "(Debian and Ubuntu: `apt install chromium`), or name it in the environment "
    "variable CHROMIUM."
)


def say(words: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {words}\n")
    sys.stdout.flush()


def find_chromium() -> str | None:
    """Return the browser to print with, if there is one."""
    names = [name for name in (os.environ.get("CHROMIUM"), *NAMES) if name]
    return next(filter(None, map(shutil.which, names)), None)


def arrange(page: Page, source: Path, only: str) -> None:
    """Open the page and make a book of it; a link that leads nowhere is an error."""
    page.emulate_media(media="print", color_scheme="light")
    page.goto(source.resolve().as_uri(), timeout=MINUTES)
    page.add_script_tag(path=SCRIPT)
    if dead := page.evaluate("only => makeBook(only)", only):
        raise SystemExit("links that lead nowhere:\n" + "\n".join(sorted(set(dead))))
    page.evaluate("document.fonts.ready.then(() => fit())")


def print_page(page: Page, path: Path, *, final: bool) -> None:
    """Print; without tags and outline it takes half the time."""
    page.pdf(
        path=path, prefer_css_page_size=True, print_background=True,
        tagged=final, outline=final,
    )  # fmt: skip


def find_pages(path: Path) -> dict[str, int]:
    """Return on which page each target of a link stands, counted from 1."""
    reader = PdfReader(path)
    return {
        name.lstrip("/"): (reader.get_destination_page_number(place) or 0) + 1
        for name, place in reader.named_destinations.items()
    }


def number_contents(page: Page, numbers: dict[str, int]) -> None:
    """Write the numbers of pages into the list of contents."""
    missing: list[str] = page.evaluate("numbers => numberContents(numbers)", numbers)
    if missing:
        raise SystemExit(f"no page known for {missing[:5]}")


def finish(path: Path, out: Path, about: dict[str, str]) -> int:
    """Add who wrote it, and that the outline opens with it; return the pages."""
    writer = PdfWriter(path, incremental=True)
    writer.add_metadata({f"/{key}": text for key, text in about.items()})
    writer.page_mode = "/UseOutlines"
    writer.write(out)
    return len(writer.pages)


def make_pdf(browser_path: str, source: Path, out: Path, only: str) -> None:
    """Print twice: only a printed book knows the pages for its list of contents."""
    draft = out.with_suffix(".draft.pdf")
    out.parent.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": WIDTH, "height": 900})
        page.set_default_timeout(MINUTES)
        say("opening the book's page")
        arrange(page, source, only)
        say("printing once, to learn the numbers of the pages")
        print_page(page, draft, final=False)
        number_contents(page, find_pages(draft))
        say("printing with the contents")
        print_page(page, draft, final=True)
        about = page.evaluate("aboutBook()")
        browser.close()
    say("writing the file")
    pages = finish(draft, out, about)
    draft.unlink()
    say(f"{out}: {pages} pages, {out.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    """Print `source`, an HTML file, to `out`; without them, only look for a browser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--only", default="", help="print pages with this in the name")
    given = parser.parse_args()
    if not (browser := find_chromium()):
        raise SystemExit(MISSING)
    if given.source and given.out:
        make_pdf(browser, given.source, given.out, given.only)


if __name__ == "__main__":
    main()
