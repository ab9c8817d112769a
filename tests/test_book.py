"""The rendered book: no warning, no broken link, nothing asked of the network."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from annotated_src.models.llama import LlamaConfig

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "notebooks").glob("*/*.py"))


class Page(HTMLParser):
    """What a page loads, where it links, which ids it has, and its images."""

    def __init__(self, path):
        super().__init__()
        self.path, self.loads, self.links, self.ids, self.images = (
            path,
            [],
            [],
            set(),
            [],
        )
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids.add(given.get("id"))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") in ("stylesheet", "preload", "icon"):
            self.loads.append(given["href"])
        elif "src" in given:
            self.loads.append(given["src"])
        if tag == "img":
            self.images.append(given)


@pytest.fixture(scope="module")
def pages(site):
    found = [Page(path) for path in sorted(site.rglob("*.html"))]
    return {page.path: page for page in found if "_static" not in page.path.parts}


def test_every_chapter_is_a_page_and_can_be_downloaded(site):
    for script in CHAPTERS:
        name = script.relative_to(ROOT).with_suffix("")
        page = (site / name.with_suffix(".html")).read_text("utf-8")
        assert f"{name.name}.ipynb" in page
        assert (site / "_sources" / name.with_suffix(".ipynb")).exists()


def test_every_chapter_offers_its_notebook(site):
    for script in CHAPTERS:
        name = script.relative_to(ROOT / "notebooks").with_suffix("").as_posix()
        path = site / "notebooks" / f"{name}.html"
        (line,) = re.findall(r'<p class="run-it">.*?</p>', path.read_text("utf-8"))
        file, lab = re.findall(r'href="([^"]+)"', line)
        offered = (path.parent / file).resolve()
        assert offered.read_bytes() == script.with_suffix(".ipynb").read_bytes()
        assert lab == f"http://localhost:8888/lab/tree/{name}.ipynb"


def test_shown_source_leads_to_its_lines_and_back(site):
    for script in CHAPTERS:
        page = site / script.relative_to(ROOT).with_suffix(".html")
        text = page.read_text("utf-8")
        links = re.findall(r'<p class="source-place"><a [^>]*href="([^"]+)"', text)
        assert links or "show(" not in script.read_text("utf-8"), page
        for link in links:
            path, _, line = link.partition("#")
            source = (page.parent / path).read_text("utf-8")
            if line:  # else it is a whole module
                assert f'id="{line}"' in source
                assert f"{script.stem}.html#" in source


def test_a_reference_to_a_function_leads_to_its_line(site):
    text = (site / "notebooks/llama/04_rope.html").read_text("utf-8")
    (line,) = set(re.findall(r'href="\.\./\.\./source/attention\.html#(L\d+)"', text))
    source = (site / "source/attention.html").read_text("utf-8")
    shown = source[source.index(f'id="{line}"') :].partition("</span>\n")[0]
    assert re.sub("<[^>]+>", "", shown).endswith("def attend(")


def test_no_table_is_left_as_text(pages):
    """A paragraph that begins with a bar was to be a row."""
    for path in pages:
        assert "<p>|" not in path.read_text("utf-8"), path.name


def test_nothing_is_loaded_from_outside(site, pages):
    for page in pages.values():
        for address in page.loads:
            assert not urlsplit(address).netloc, f"{page.path.name} loads {address}"
            if not address.startswith("data:"):
                target = page.path.parent / unquote(urlsplit(address).path)
                assert target.exists(), f"{page.path.name}: no {address}"
    for sheet in site.rglob("*.css"):
        text = sheet.read_text("utf-8", errors="replace")
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", text), sheet


def test_every_link_inside_the_book_leads_somewhere(pages):
    for page in pages.values():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or (link.startswith("#") and len(link) < 2):
                continue
            target = page.path
            if parts.path:
                target = (page.path.parent / unquote(parts.path)).resolve()
                assert target.exists(), f"{page.path.name}: {link}"
            if parts.fragment and target in pages:
                known = pages[target].ids
                assert unquote(parts.fragment) in known, f"{page.path.name}: {link}"


def test_every_image_has_alt_text(pages):
    for page in pages.values():
        for image in page.images:
            assert "alt" in image, f"{page.path.name}: {image}"


def test_search_knows_prose_and_symbols(site):
    index = (site / "searchindex.js").read_text("utf-8")
    for word in ("rotat", "repeat_kv", "apply_rotari"):
        assert word in index


def test_the_package_s_pages_list_every_module_once():
    pages = (ROOT / "book/api").glob("*.md")
    text = "".join(page.read_text("utf-8") for page in pages)
    found = re.findall(r"automodule:: (\S+)", text)
    listed = set(found)
    assert len(found) == len(listed)
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "annotated_src").rglob("*.py")
        if path.name != "__init__.py" and not {"figures", "exercises"} & set(path.parts)
    }
    assert listed == modules | {"annotated_src.exercises"}


def test_the_readme_lists_every_chapter_by_its_title():
    readme = (ROOT / "README.md").read_text("utf-8")
    for script in CHAPTERS:
        title = re.search(r"^# # (.*)$", script.read_text("utf-8"), re.M)[1]
        link = script.relative_to(ROOT).with_suffix(".ipynb").as_posix()
        assert f"[{title}]({link})" in readme


def test_the_cover_is_the_figure_of_the_last_chapter():
    chapter = json.loads((ROOT / "notebooks/llama/08_llama.ipynb").read_text("utf-8"))
    (cell,) = (
        cell
        for cell in chapter["cells"]
        if cell["metadata"].get("mystnb", {}).get("figure", {}).get("name")
        == "fig-llama-lens"
    )
    drawn = base64.b64decode(cell["outputs"][0]["data"]["image/png"])
    assert (ROOT / "book/_static/cover.png").read_bytes() == drawn


def test_the_notation_table_has_the_real_model_s_sizes(smollm2_dir):
    config = LlamaConfig.from_hf(json.loads((smollm2_dir / "config.json").read_text()))
    text = (ROOT / "book/notation.md").read_text("utf-8")
    rows = re.findall(r"\| `(\w+)`[^|]*\| (\d+) \|$", text, re.M)
    assert len(rows) == 8
    for name, size in rows:
        assert getattr(config, name) == int(size)
