"""The pages around the chapters say what the chapters say, and lead to their places."""

import json
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import annotated_src

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book/_ext"))

import boxes  # noqa: E402
import chapter_table  # noqa: E402
import linked_map  # noqa: E402
import model_map  # noqa: E402
from anchors import claim_label  # noqa: E402
from chapters import Chapter, chapters, claims, leans_on, parts  # noqa: E402

CHAPTERS = {chapter.label: chapter for chapter in chapters()}
CLAIMS = {
    claim_label(chapter.label, claim): chapter
    for chapter in chapters()
    for claim in claims(chapter.source)
}
SVG = linked_map.SVG


def page(name):
    return (ROOT / f"book/{name}.md").read_text("utf-8")


def test_chapters_are_those_of_the_notebooks_in_order():
    scripts = {path.with_suffix("") for path in (ROOT / "notebooks").glob("*/*.py")}
    assert {ROOT / chapter.page for chapter in chapters()} == scripts
    assert [chapter.number for chapter in chapters()] == [*range(1, len(scripts) + 1)]
    with pytest.raises(ValueError, match="notebooks/x has nothing like"):
        _ = Chapter(1, "notebooks/x", "# %% [markdown]\n# text").label


def test_a_path_takes_the_sum_of_its_chapters():
    paths = page("how_to_read").split("\n## ")[1:5]
    for path in paths:
        steps = "\n".join(re.findall(r"^(?:\d\. |   ).*$", path, re.M))
        labels = set(re.findall(r"\{ref\}`ch-([\w-]+)`", steps))
        minutes = sum(CHAPTERS[label].minutes for label in labels)
        said = re.search(r"Together: \*\*(.+)\.\*\*", path)[1]
        assert said == chapter_table.hours(minutes), path[:40]


def test_the_table_of_chapters_has_each_with_what_it_leans_on():
    for part, found in parts().items():
        table = chapter_table.table(part, found)
        total = sum(chapter.minutes for chapter in found)
        assert f"| {total} | |" in table
        for chapter in found:
            (row,) = re.findall(rf"^\| {chapter.number} \|.*$", table, re.M)
            assert f"{{ref}}`ch-{chapter.label}` | {chapter.minutes} |" in row
    leaning = {c.label: {o.label for o in leans_on(c)} for c in chapters()}
    assert leaning["attention"] == {"rope"}
    for chapter in chapters():
        assert all(CHAPTERS[o].number < chapter.number for o in leaning[chapter.label])


def test_every_part_of_a_map_is_lit_by_a_chapter():
    for name, drawing in model_map.MAPS.items():
        lit = model_map.lit_on(name)
        for part in linked_map.words_of(drawing):
            assert any(part in parts for parts in lit.values()), (name, part)
    homes = model_map.lit_on("ModelMap")
    assert linked_map.home("rope", homes) == CHAPTERS["rope"]
    assert linked_map.home("head", homes).label in ("reading", "llama")
    with pytest.raises(ValueError, match="begins with no map"):
        model_map.lights(Chapter(1, "notebooks/x", "ModelMap = 1"))


@pytest.mark.parametrize("name", model_map.MAPS)
def test_every_box_of_a_map_is_a_link_to_a_chapter_that_lights_it(name):
    lit = model_map.lit_on(name)
    pages = {chapter.page: parts for chapter, parts in lit.items()}
    svg = linked_map.draw(model_map.MAPS[name], "it", lit, lambda c: c.page)
    links = svg.findall(f"{{{SVG}}}a")
    boxes_drawn = linked_map.boxes_of(model_map.MAPS[name])
    assert len(links) == len(boxes_drawn)
    for link, (part, words) in zip(links, boxes_drawn, strict=True):
        assert part == link.get("data-parts")
        assert part in pages[link.get("href")]
        box, text = link
        assert text.text == words
        assert link.get("aria-label").startswith(words)
        middle = float(box.get("x")) + float(box.get("width")) / 2
        assert abs(float(text.get("x")) - middle) < 0.2, "the words are in the box"


@pytest.mark.parametrize("name", model_map.MAPS)
def test_words_on_a_map_are_as_large_as_the_text(name):
    svg = linked_map.draw(model_map.MAPS[name], "it", model_map.lit_on(name), str)
    scale = float(svg.get("width")) / float(svg.get("viewBox").split()[2])
    sizes = [float(t.get("font-size")) for t in svg.iter(f"{{{SVG}}}text")]
    assert min(sizes) * scale >= 15.9
    left, _, width, _ = map(float, svg.get("viewBox").split())
    for text in svg.iter(f"{{{SVG}}}text"):
        if text.get("text-anchor") == "middle":
            half = len(text.text) * float(text.get("font-size")) * 0.28
            x = float(text.get("x"))
            assert left <= x - half < x + half <= left + width, text.text
    assert "currentColor" in {t.get("fill") for t in svg.iter(f"{{{SVG}}}text")}


@pytest.mark.parametrize("name", model_map.MAPS)
def test_the_table_of_a_map_says_what_each_chapter_lights(name):
    table = model_map.table(name)
    for chapter, lit in model_map.lit_on(name).items():
        (row,) = re.findall(rf"^\| {chapter.number} \|.*$", table, re.M)
        words = linked_map.words_of(model_map.MAPS[name])
        named = row.endswith("| everything |") or all(words[p] in row for p in lit)
        assert named, row


def test_a_map_that_changed_its_words_is_not_linked_wrongly():
    class Renamed(model_map.ModelMap):
        def _repr_html_(self):
            return super()._repr_html_().replace("KV cache", "memory")

    with pytest.raises(ValueError, match="no box says 'KV cache'"):
        linked_map.draw(Renamed, "it", model_map.lit_on("ModelMap"), str)


def test_the_collection_has_every_box():
    for chapter in chapters():
        notebook = json.loads((ROOT / f"{chapter.page}.ipynb").read_text("utf-8"))
        held = 0
        for cell, after in pairwise(notebook["cells"]):
            if ":class: paper-code" in (source := "".join(cell["source"])):
                held += source.count(":class: paper-code")
                assert claims("".join(after["source"])), "shown by the cell below"
        assert held, f"{chapter.page} has no box"
        text = boxes.collect(chapter, "paper-code")
        assert text.count(":class: paper-code") == held, chapter.page
        for number in range(1, held + 1):
            assert f"<box-{chapter.label}-{number}>" in text
        assert "$$ (eq-" not in text, "a label has one home"
    assert "{collected-boxes} paper-code" in page("paper_and_code")


ROWS = re.findall(r"^\| ([A-Z]\d+) \| (.*) \|$", page("errata"), re.M)


@pytest.mark.parametrize(("number", "row"), ROWS, ids=[number for number, _ in ROWS])
def test_an_erratum_leads_to_the_cell_that_shows_it(number, row):
    words, target = re.search(r"\{ref\}`([^<]+) <([\w-]+)>`$", row).groups()
    assert words == f"chapter\xa0{CLAIMS[target].number}"


def test_the_errata_of_the_chapter_are_all_listed():
    chapter = set(re.findall(r"^\| ([A-Z]\d+) \|", CHAPTERS["errata"].text, re.M))
    assert len(chapter) == 23
    assert chapter < {number for number, _ in ROWS}
    cited = re.findall(r"<(claim-[\w-]+)>", page("errata"))
    assert len(cited) == len(ROWS)


def test_the_built_pages_have_the_places_that_are_linked(site):
    text = (site / "errata.html").read_text("utf-8")
    links = re.findall(r'href="(notebooks/[\w/]+\.html)#(claim-[\w-]+)"', text)
    assert len(links) == len(ROWS)
    text = (site / "paper_and_code.html").read_text("utf-8")
    back = re.findall(r'href="(notebooks/[\w/]+\.html)#(box-[\w-]+)"', text)
    assert len(back) == text.count('class="paper-code admonition')
    for chapter, place in {*links, *back}:
        assert f'id="{place}"' in (site / chapter).read_text("utf-8"), place


def test_the_built_map_and_index_lead_into_the_book(site):
    text = (site / "model_map.html").read_text("utf-8")
    svgs = re.findall(r"<svg.*?</svg>", text.split("<article")[1], re.S)
    linked = {a for svg in svgs for a in re.findall(r'<a [^>]*href="([^"]+)"', svg)}
    assert linked
    assert linked <= {f"{chapter.page}.html" for chapter in chapters()}
    for file in ("model_map.js", "model_map.css"):
        assert f"_static/{file}" in text
        assert f"_static/{file}" not in (site / "errata.html").read_text("utf-8")
    index = (site / "genindex.html").read_text("utf-8")
    assert 'href="glossary.html#term-KV-cache"' in index


def test_claims_are_read_from_calls_and_gaps_left_out():
    code = 'confirm(f"{n}: holds", x)\nconfirm("a\\n b", y)\nprint("no")\n'
    assert claims(code) == [": holds", "a b"]


def test_the_notation_explains_every_letter_of_the_legend():
    legend = (annotated_src.__doc__ or "").split("Shape letters")[1]
    letters = re.findall(r"(?:^|\s{2,})([A-Z])  \w", legend)
    assert len(letters) == 9
    text = page("notation")
    for letter in letters:
        assert re.search(rf"^\| {letter} \|", text, re.M), letter
    masks = text.split("## Masks")[1].split("## ")[0]
    faces = ("True = may look", "True = hidden", "0 = may look")
    assert all(f"| {face}" in masks for face in faces)


def test_the_notation_leads_to_chapters_that_use_the_symbol():
    table = page("notation").split("## Letters in formulas")[1].split("## Masks")[0]
    rows = re.findall(r"^\| (\$.*?) \| (.*)$", table, re.M)
    assert len(rows) > 20
    for symbols, rest in rows:
        names = re.findall(r"\\(?:mathcal|hat)\{?\s?\w|\\[A-Za-z]+|[A-Za-z]", symbols)
        for label in re.findall(r"\{ref\}`ch-([\w-]+)`", rest):
            maths = " ".join(re.findall(r"\$[^$]+\$", CHAPTERS[label].text))
            assert any(name in maths for name in names), (symbols, label)
