"""The site carries the style rules that its pages use, and no others."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "book/_ext"))

from lean import ORIGINAL, lean

SHEET = """
:root { --a: 1 }
p, .used:hover { color: red }
.used.unused, .unused > p { color: blue }
.used:not(.unused) { color: green }
[data-x=".unused"] .used { color: grey }
@media (max-width: 9px) { .unused { top: 0 } .used { top: 1px } }
@media print { .unused { top: 0 } }
@font-face { font-family: "Font Awesome 6 Free"; src: url(fa.woff2) }
@font-face { font-family: "KaTeX"; src: url(katex.woff2) }
.fa-solid, .used::before { content: "." }
"""


@pytest.mark.parametrize(
    ("text", "stays"),
    [
        (":root", True),
        ("p,.used:hover", True),
        (".used.unused", False),
        (".unused > p", False),
        (".used:not(.unused)", True),
        ('[data-x=".unused"] .used', True),
        ("@media (max-width: 9px)", True),
        ("top: 1px", True),
        ("top: 0", False),
        ("@media print", False),
        ("fa.woff2", False),
        ("katex.woff2", True),
        (".fa-solid", False),
        (".used::before", True),
    ],
)
def test_a_rule_stays_if_a_page_could_use_it(text, stays):
    assert (text in lean(SHEET, {"used", "fa-solid"})) is stays


def test_the_site_has_the_rules_of_its_pages_and_nothing_to_develop_with(site):
    sheet = (site / "_static/styles/pydata-sphinx-theme.css").read_text("utf-8")
    assert ".bd-sidebar-primary" in sheet
    assert ".placeholder-wave" not in sheet
    assert len(sheet) < len(ORIGINAL.read_text("utf-8")) / 2
    assert not list(site.rglob("*.map"))
    assert not list(site.rglob("fontawesome.js"))
