"""What a reader does: search, go on, change the colours, use the keyboard alone."""

import re
from urllib.parse import unquote, urlsplit

import pytest
from looking import THEME
from visiting import PHONE, WIDE, file_of

CHAPTER = "notebooks/llama/04_rope.html"
SYMBOL = "apply_rotary_pos_emb_index"
# What has the focus: its name, where it is, and the look that says so.
FOCUSED = """() => {
  for (const moving of document.getAnimations())
    if (moving instanceof CSSTransition) moving.finish();
  const has = document.activeElement, style = getComputedStyle(has);
  const outline = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0;
  return {
    name: (has.getAttribute("aria-label") || has.textContent).trim().slice(0, 60),
    html: has.outerHTML.slice(0, 160),
    part: has.closest("article, .bd-sidebar-primary, .bd-sidebar-secondary,"
      + " .bd-header-article, .skip-link, footer, header, body").className,
    article: has.closest("article") !== null, scrolls: has.matches("pre, div"),
    shown: outline || style.boxShadow !== "none" && !/^rgba\\(0, 0, 0, 0\\)/.test(
      style.boxShadow),
    inside: has.getBoundingClientRect().bottom > 0
      && has.getBoundingClientRect().top < innerHeight,
  };
}"""
TIMES = """() => {
  const [entry] = performance.getEntriesByType("navigation");
  return [entry.domInteractive, entry.loadEventEnd];
}"""


def results(page):
    """The addresses that a search has found, once it has come to its end."""
    ended = re.compile("Search finished|did not match")
    page.locator("#search-results").get_by_text(ended).wait_for()
    links = page.locator("#search-results li a")
    return links.evaluate_all("links => links.map(link => link.getAttribute('href'))")


@pytest.mark.parametrize("word", ["rotary", "repeat_kv", "perplexity", SYMBOL])
def test_search_finds_words_and_symbols(open_page, word):
    found = results(page := open_page(f"search.html?q={word}"))
    assert len(found) > 3
    page.locator("#search-results li a").first.click()
    page.wait_for_url(lambda url: "search.html" not in url)
    assert word.lower() in page.locator("article").inner_text().lower()


def test_a_symbol_s_own_page_comes_first(open_page):
    found = results(open_page(f"search.html?q={SYMBOL}"))
    assert re.fullmatch(rf"symbols/\w+-{SYMBOL}\.html(#.*)?", found[0])
    first = results(open_page("search.html?q=repeat_kv"))[:3]
    assert any(re.match(r"symbols/\w+-repeat_kv\.html", path) for path in first)


def test_what_is_nowhere_is_not_found(open_page):
    assert not results(open_page("search.html?q=xylophonist"))


def test_the_search_button_asks_for_a_word(open_page):
    page = open_page(CHAPTER)
    page.get_by_role("button", name="Search").first.press("Enter")
    page.keyboard.type("perplexity")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"search\.html\?q=perplexity"))
    assert "glossary.html#term-perplexity" in results(page)


def colours(page):
    """The chosen mode, the colours that are shown, and the ground of the page."""
    return page.evaluate(
        """() => [document.documentElement.dataset.mode,
        document.documentElement.dataset.theme,
        getComputedStyle(document.body).backgroundColor]"""
    )


def choose(page, name, by_key):
    """Choose colours from the menu: with the mouse, or with keys alone."""
    opener = page.get_by_role("button", name="Color mode")
    item = page.get_by_role("button", name=name, exact=True)
    if not by_key:
        opener.click()
        item.click()
        return
    opener.press("Enter")
    for _ in range(5):
        page.keyboard.press("Tab")
        if item.evaluate("item => item === document.activeElement"):
            break
    page.keyboard.press("Enter")


@pytest.mark.parametrize("by_key", [False, True])
def test_colours_change_and_stay_on_the_next_page(open_page, by_key):
    page = open_page(CHAPTER)
    mode, theme, light = colours(page)
    assert (mode, theme) == ("auto", "light")
    choose(page, "Dark", by_key)
    assert colours(page)[:2] == ["dark", "dark"]
    dark = colours(page)[2]
    assert dark != light
    with page.expect_navigation():
        page.locator(".prev-next-area a.right-next").click()
    assert colours(page) == ["dark", "dark", dark]
    choose(page, "Light", by_key)
    assert colours(page) == ["light", "light", light]
    choose(page, "System Settings", by_key)
    assert colours(page) == ["auto", "light", light]
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(THEME, arg="dark")
    assert colours(page) == ["auto", "dark", dark]


def test_next_leads_through_all_chapters_in_their_order(site, open_page):
    page = open_page("index.html")
    nav = page.locator(".bd-sidebar-primary nav a[href*='notebooks/']")
    links = nav.evaluate_all("links => links.map(link => link.href)")
    order = [unquote(urlsplit(link).path) for link in links]
    assert len(order) == len(set(order)) == len(list(site.glob("notebooks/*/*.html")))
    page.goto(links[0], wait_until="domcontentloaded")
    passed, came_from = [], page.url
    while file_of(page.url).is_relative_to(site / "notebooks"):
        passed.append(urlsplit(page.url).path)
        if len(passed) > 1:
            back = page.locator(".prev-next-area a.left-prev")
            assert back.evaluate("link => link.href") == came_from
        came_from = page.url
        following = page.locator(".prev-next-area a.right-next")
        link = following.evaluate("link => link.href")
        page.goto(link, wait_until="domcontentloaded")
    assert [unquote(path) for path in passed] == order


def test_the_first_tab_skips_to_the_content(open_page):
    page = open_page(CHAPTER)
    page.keyboard.press("Tab")
    first = page.evaluate(FOCUSED)
    assert first["name"] == "Skip to main content"
    assert first["inside"]
    assert first["shown"]
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    after = page.evaluate(FOCUSED)
    assert "sidebar-primary" not in after["part"]
    assert "skip-link" not in after["part"]


def walk(page, limit=600):
    """Press Tab from the top to the end; what had the focus, one after the other."""
    seen = []
    for _ in range(limit):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            return seen
        seen.append(page.evaluate(FOCUSED))
        if len(seen) > 1 and seen[-1] == seen[0]:
            return seen[:-1]
    raise AssertionError(f"no end after {limit} times Tab: {seen[-1]}")


@pytest.mark.parametrize("dark", [False, True])
def test_tab_reaches_everything_and_one_sees_where(open_page, dark):
    page = open_page(CHAPTER, dark=dark)
    seen = walk(page)
    names = [step["name"] for step in seen]
    assert names.index("Skip to main content") == 0
    assert "Search" in names[:5]
    chapter = next(i for i, name in enumerate(names) if "RoPE, derived" in name)
    article = next(i for i, step in enumerate(seen) if step["article"])
    assert chapter < article
    assert any(step["scrolls"] and step["article"] for step in seen)
    assert not [step["html"] for step in seen if not step["shown"]]
    assert not [step["html"] for step in seen if not step["inside"]]


def test_tab_reaches_every_control_of_the_figure_that_moves(open_page):
    page = open_page(CHAPTER)
    wanted = page.locator("figure.moving :is(input, button):enabled")
    assert wanted.count() > 0
    wanted.first.focus()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    assert wanted.first.evaluate("it => it === document.activeElement")
    assert page.evaluate(FOCUSED)["shown"]


def test_what_is_closed_opens_by_key(open_page):
    page = open_page(CHAPTER)
    closed = page.locator("article details:not([open])")
    assert (count := closed.count()) > 3
    for summary in page.locator("article details:not([open]) > summary").all()[:4]:
        if summary.is_visible():
            summary.press("Enter")
    assert closed.count() < count


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_the_first_page_is_there_in_two_seconds(open_page, size):
    page = open_page("index.html", **size)
    best = [5000.0, 5000.0]
    for _ in range(3):
        page.reload()
        best = [min(pair) for pair in zip(best, page.evaluate(TIMES), strict=True)]
    assert 0 < best[0] <= best[1] < 2000


def test_a_phone_opens_the_contents_by_a_button(open_page):
    page = open_page(CHAPTER, **PHONE)
    contents = page.locator(".bd-sidebar-primary nav a").first
    assert not contents.is_visible()
    page.locator("button.primary-toggle:visible").first.press("Enter")
    contents.wait_for()
    assert page.evaluate(
        "document.activeElement.closest('.bd-sidebar-primary, dialog')"
    )
    page.keyboard.press("Escape")
    contents.wait_for(state="hidden")
