"""The visitor finds what is wrong: a page with one mistake of each kind."""

import pytest
from visiting import ASPECTS, MODES, Visitor, visit_all

PAGE = """<!doctype html><html lang="en" data-theme="light"><head><title>A page</title>
<meta name="viewport" content="width=device-width">
<style>
  body {{ background: white; color: black }}
  [data-theme=dark] body {{ background: black; color: white }}
  {style}
</style>
<script>
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const follow = () => {{
    document.documentElement.dataset.theme = dark.matches ? "dark" : "light";
  }};
  dark.addEventListener("change", follow);
  follow();
</script></head><body><main><h1 id="top">A page</h1>{body}</main></body></html>"""
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
MISTAKES = {
    "links": "<p><a href='#nowhere'>x</a> <a href='gone.html'>y</a></p>",
    "formulas": r"<p>The angle \(m\theta\).</p>",
    "pictures": f"<img src='{PIXEL}'>",
    "errors and requests": "<script>fetch('http://book.invalid/font')</script>",
    "weight": "<script>/*" + "x" * 1_000_000 + "*/</script>",
    "light, wide": "<p class='pale'>pale</p>",
    "dark, wide": "<p class='deep'>deep</p>",
    "dark, phone": "<p class='small deep'>deep</p>",
    "light, phone": "<p class='small pale'>pale</p>",
    "sideways": "<div style='width: 500px'>wide</div>",
    "unreached": "<div style='overflow: auto'><p style='width: 2000px'>wide</p></div>",
}
STYLE = """.pale { color: #ccc } .deep { color: #222 }
[data-theme=light] .deep, [data-theme=dark] .pale { color: inherit }
@media (min-width: 600px) { .small { display: none } }"""


@pytest.fixture(scope="module")
def wrong(tmp_path_factory, browser):
    """What is found on a page for each mistake, and on one without any."""
    folder = tmp_path_factory.mktemp("mistakes")
    found = {}
    for kind, body in {"none": "<p>Fine.</p>", **MISTAKES}.items():
        (folder / "page.html").write_text(PAGE.format(style=STYLE, body=body), "utf-8")
        found[kind] = visit_all(folder, browser, ["page.html"])
    return found


def test_a_page_that_is_right_passes(wrong):
    assert not [kind for kind in ASPECTS if wrong["none"][kind]]


@pytest.mark.parametrize("kind", ASPECTS)
def test_a_mistake_is_found(wrong, kind):
    assert wrong[kind][kind]


def test_a_mistake_of_the_dark_is_none_in_the_light(wrong):
    assert [mode for mode in MODES if wrong["dark, wide"][mode]] == [
        "dark, wide",
        "dark, phone",
    ]
    assert [mode for mode in MODES if wrong["light, phone"][mode]] == ["light, phone"]


def test_a_look_that_is_known_is_measured_again_only_where_it_may_change(
    tmp_path, browser
):
    """The second page has the same bad look: it is found where it first came up."""
    page = tmp_path / "page.html"
    page.write_text(PAGE.format(style=STYLE, body=MISTAKES["dark, wide"]), "utf-8")
    visitor = Visitor(browser)
    first, second = (visitor.visit(page.as_uri()) for _ in range(2))
    visitor.page.close()
    assert first["dark, wide"]
    assert not second["dark, wide"]
