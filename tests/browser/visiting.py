"""Visit pages one after the other, and note all that a reader would stumble over."""

import functools
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from looking import (
    AXE,
    DRAWN,
    IMAGES,
    LOOK,
    MARK,
    OPEN,
    RUN_AXE,
    SIDEWAYS,
    TAKE,
    THIN,
    UNREACHED,
)

WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 800}
# In this order only two of five steps change the width, which takes longest.
MODES = {
    "light, wide": ("light", WIDE),
    "dark, wide": ("dark", WIDE),
    "dark, phone": ("dark", PHONE),
    "light, phone": ("light", PHONE),
}
COLOURS = ["color-contrast", "link-in-text-block"]
HERE = ("file:", "data:", "blob:", "about:", "http://127.0.0.1")
PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")
LARGE = ("notebooks/", "source/", "symbols/")


class Watch:
    """Note every error of a page, and every request that leaves the book."""

    def __init__(self, page):
        self.page, self.problems, self.asked = page, [], set()
        page.on("console", self.said)
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("request", self.asks)
        page.on("requestfailed", self.failed)

    def said(self, message):
        if message.type in ("error", "warning"):
            self.problems.append(f"console: {message.text}")

    def failed(self, request):
        if request.failure != "net::ERR_ABORTED":  # the page has been left
            self.problems.append(f"failed: {request.url}")

    def asks(self, request):
        self.asked.add(request.url)
        if not request.url.startswith(HERE):
            self.problems.append(f"request: {request.url}")

    def taken(self):
        """What has been noted so far; from here on it is another page."""
        noted = self.problems, self.asked
        self.problems, self.asked = [], set()
        return noted


def pages_of(site, folder=None):
    """The pages in one of the large folders of the book, or those in none of them."""
    found = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    if folder:
        return [path for path in found if path.startswith(folder)]
    return [path for path in found if not path.startswith((*LARGE, "_static/"))]


def file_of(address):
    """The file that an address means; None if it lies elsewhere."""
    parts = urlsplit(address)
    return Path(url2pathname(parts.path)) if parts.scheme == "file" else None


@functools.cache
def anchors(path):
    """The ids in a file, as it lies there."""
    return set(re.findall(r"""\bid=["']([^"']+)["']""", path.read_text("utf-8")))


def broken(links):
    """The links that lead nowhere, or to no such place in a page."""
    for written, link in links:
        path, anchor = file_of(link), unquote(urlsplit(link).fragment)
        if path is None:
            continue
        if not path.is_file():
            yield f"{written}: no such file"
        elif anchor and path.suffix == ".html" and anchor not in anchors(path):
            yield f"{written}: no such place"


def kilobytes(addresses):
    """What is loaded for a page, less pictures, by file."""
    files = {file_of(address) for address in addresses} - {None}
    sizes = {f.name: f.stat().st_size / 1000 for f in files if f.exists()}
    return {name: n for name, n in sizes.items() if not name.endswith(PICTURES)}


def too_heavy(addresses, limit=1000):
    """Say what a page is made of, largest first, if that is over a megabyte."""
    sizes = sorted(kilobytes(addresses).items(), key=lambda pair: -pair[1])
    if (total := sum(size for _, size in sizes)) < limit:
        return []
    return [f"{total:.0f} kB: " + ", ".join(f"{n} {s:.0f}" for n, s in sizes[:5])]


def unseen(images):
    """Pictures that do not load, or that say nothing to those who cannot see them."""
    for image in images:
        if not image["loaded"]:
            yield f"does not load: {image['source']}"
        if not (image["alt"] or "").strip() and not image["decorates"]:
            yield f"no alt text: {image['source']}"


class Visitor:
    """Look at pages in four ways: wide and narrow, in the light and in the dark.

    axe holds all its rules against every page, in the light and wide. Contrast depends
    on how a text looks, not on what it says: in each of the four ways every look, that
    is two colours, a size and a weight, is measured where it first comes up. In the
    dark that is all that can change. A page with a look that is new on a phone is held
    against all rules there; boxes that scroll are looked for on every page.
    """

    def __init__(self, browser):
        self.page = browser.new_page(reduced_motion="reduce", color_scheme="light")
        self.watch = Watch(self.page)
        self.known = {mode: set() for mode in MODES}

    def see(self, scheme, size):
        """Take other colours and another width."""
        self.page.evaluate(TAKE, scheme)
        if size != self.page.viewport_size:
            self.page.set_viewport_size(size)
            self.page.evaluate(DRAWN)

    def visit(self, url):
        """Note what is wrong with a page, by kind. All that opens is open."""
        self.page.set_viewport_size(WIDE)
        self.page.goto(url)
        self.page.evaluate(OPEN)
        seen = self.page.evaluate(LOOK)
        found = {
            "links": list(broken(seen["links"])),
            "formulas": seen["formulas"],
            "pictures": list(unseen(self.page.evaluate(IMAGES))),
        }
        self.page.evaluate(THIN)
        self.page.evaluate(AXE)
        for mode, (scheme, size) in MODES.items():
            self.see(scheme, size)
            new = self.page.evaluate(MARK, list(self.known[mode]))
            self.known[mode].update(new)
            needed = new or mode == "light, wide"
            rules = COLOURS if scheme == "dark" else None
            found[mode] = self.page.evaluate(RUN_AXE, rules) if needed else []
        found["sideways"] = self.page.evaluate(SIDEWAYS)
        found["unreached"] = self.page.evaluate(UNREACHED)
        found["errors and requests"], asked = self.watch.taken()
        found["weight"] = too_heavy(asked)
        return found


ASPECTS = (
    *("links", "formulas", "pictures", "errors and requests", "weight"),
    *(*MODES, "sideways", "unreached"),
)


def visit_all(site, browser, pages):
    """Visit pages; return what is wrong, by kind, then by page."""
    visitor = Visitor(browser)
    found = {path: visitor.visit((site / path).as_uri()) for path in pages}
    visitor.page.close()
    return {
        kind: {path: found[path][kind] for path in pages if found[path][kind]}
        for kind in ASPECTS
    }
