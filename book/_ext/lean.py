"""Leave out of the site what no page of it uses.

That is most of the theme's style rules, what is there for its developers, and pages of
an earlier build whose source is gone.
"""

import re
from pathlib import Path

import pydata_sphinx_theme
import tinycss2
from sphinx.application import Sphinx

SHEET = "styles/pydata-sphinx-theme.css"
ORIGINAL = Path(pydata_sphinx_theme.__file__).parent / (
    f"theme/pydata_sphinx_theme/static/{SHEET}"
)
CLASS = re.compile(r"\.(-?[A-Za-z_][\w-]*)")
# Icons that the theme takes from a font; book.css draws those that are used.
ICON_FONT = re.compile(r"font[- ]?awesome|\.fa[srb]?\b|\.fa-", re.I)


def used_names(site: Path) -> set[str]:
    """Collect the classes of all pages, and all words of the scripts."""
    names: set[str] = set()
    for page in site.rglob("*.html"):
        for classes in re.findall(r'class="([^"]*)"', page.read_text("utf-8")):
            names.update(classes.split())
    for script in site.rglob("_static/**/*.js"):
        names.update(re.findall(r"[\w-]+", script.read_text("utf-8")))
    return names


def lean(css: str, names: set[str]) -> str:
    """Drop the rules for classes that are not among the names, and the icon font."""
    rules = tinycss2.parse_stylesheet(css, skip_comments=True, skip_whitespace=True)
    return "".join(filter(None, (_kept(rule, names) for rule in rules)))


def _kept(rule: tinycss2.ast.Node, names: set[str]) -> str:
    head = tinycss2.serialize(getattr(rule, "prelude", []))
    if rule.type == "qualified-rule":
        wanted = [one for one in _selectors(head) if _applies(one, names)]
        body = tinycss2.serialize(rule.content)
        return f"{','.join(wanted)}{{{body}}}" if wanted else ""
    if rule.type == "at-rule" and rule.at_keyword in ("media", "supports"):
        inner = lean(tinycss2.serialize(rule.content), names)
        return f"@{rule.at_keyword}{head}{{{inner}}}" if inner else ""
    text = rule.serialize()
    return "" if "@font-face" in text and ICON_FONT.search(text) else text


def _selectors(head: str) -> list[str]:
    """Split a list of selectors at its commas, not at those in brackets."""
    return [part.strip() for part in re.split(r",(?![^(\[]*[)\]])", head)]


def _applies(selector: str, names: set[str]) -> bool:
    if ICON_FONT.search(selector):
        return False
    asked = re.sub(r":(not|is|where|has)\(.*?\)|\[.*?\]", "", selector)
    return set(CLASS.findall(asked)) <= names


def remove_old_pages(app: Sphinx) -> None:
    """Remove the pages that nothing has made in this build or could have."""
    made = {*app.env.found_docs, "genindex", "py-modindex", "search"}
    for path in Path(app.outdir).rglob("*.html"):
        name = path.relative_to(app.outdir).with_suffix("").as_posix()
        if name not in made and not name.startswith("_static/"):
            path.unlink()


def thin_out(app: Sphinx, failure: Exception | None) -> None:
    """Write the theme's sheet again, and take away what is for its developers."""
    if failure is None and app.builder.name == "html":
        remove_old_pages(app)
        static = Path(app.outdir) / "_static"
        sheet = lean(ORIGINAL.read_text("utf-8"), used_names(Path(app.outdir)))
        (static / SHEET).write_text(sheet, "utf-8")
        for left in (*static.rglob("*.map"), static / "scripts/fontawesome.js"):
            left.unlink(missing_ok=True)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register it for the end of a build."""
    app.connect("build-finished", thin_out)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
