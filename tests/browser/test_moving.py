"""Figures that move: keyboard, live sentence and drawing, in a real browser."""

import math
import re

import pytest

from annotated_src.figures.moving import FIGURES

PAGES = {
    "rope-pair": "notebooks/llama/04_rope.html",
    "gqa-groups": "notebooks/llama/06_heads.html",
    "kv-cache": "notebooks/llama/07_cache.html",
    "prefix-mask": "notebooks/chatglm/02_prefix_mask.html",
    "half-angle": "notebooks/chatglm/03_rope_2d.html",
    "residual-alpha": "notebooks/chatglm/05_block.html",
    "top-p": "notebooks/text/05_sampling.html",
    "int8-grid": "notebooks/device/03_quantizing.html",
}
CONTROLS = "input:enabled, button"


@pytest.fixture
def figure(open_page):
    """Open the page of a figure; return the figure, once it is drawn."""

    def find(name, **look):
        page = open_page(PAGES[name], **look)
        found = page.locator(f"moving-{name}")
        found.locator("output").wait_for()
        return found

    return find


def said(figure):
    return figure.locator("output").inner_text()


def slide(figure, label, value):
    """Move a slider by keys: to an end, then step by step."""
    slider = figure.get_by_role("slider", name=label, exact=True)
    low, high = (int(slider.get_attribute(end)) for end in ("min", "max"))
    near = value - low <= high - value
    slider.press("Home" if near else "End")
    for _ in range(value - low if near else high - value):
        slider.press("ArrowRight" if near else "ArrowLeft")


def choose(figure, text):
    figure.get_by_role("radio", name=text, exact=True).press("Space")


def minus(text):
    return text.replace("-", "\u2212")


@pytest.mark.parametrize("name", FIGURES)
def test_tab_reaches_every_control(figure, name):
    shown = figure(name)
    shown.page.evaluate(
        """name => {
            const before = document.createElement("button");
            document.querySelector(`moving-${name}`).before(before);
            before.focus();
        }""",
        name,
    )
    wanted = shown.locator(CONTROLS).evaluate_all(
        """all => [...new Set(all.map(
            x => x.type === "radio" ? x.name : x.outerHTML
        ))]"""
    )
    reached = []
    for _ in wanted:
        shown.page.keyboard.press("Tab")
        reached.append(
            shown.page.evaluate(
                """() => {
                    const x = document.activeElement;
                    return x.type === "radio" ? x.name : x.outerHTML;
                }"""
            )
        )
    assert reached == wanted


@pytest.mark.parametrize("name", FIGURES)
def test_sliders_answer_to_arrows_home_and_end(figure, name):
    shown = figure(name)
    for slider in shown.get_by_role("slider").all():
        for key, end in (("Home", "min"), ("End", "max")):
            slider.press(key)
            assert float(slider.input_value()) == float(slider.get_attribute(end))
        last, value = said(shown), slider.get_attribute("aria-valuetext")
        slider.press("ArrowLeft")
        assert slider.get_attribute("aria-valuetext") != value
        slider.press("Home")
        assert said(shown) != last


@pytest.mark.parametrize("name", FIGURES)
def test_choices_and_toggles_change_the_sentence(figure, name):
    shown = figure(name)
    for control in shown.locator("[type=radio], [type=checkbox]").all():
        if control.is_checked():
            continue
        before = said(shown)
        control.press("Space")
        assert control.is_checked()
        assert said(shown) != before


WORD_SIZES = """x => [...x.querySelectorAll("svg text, label, legend, output")].map(
    t => {
        const { a, b } = t.getScreenCTM?.() ?? { a: 1, b: 0 };
        return parseFloat(getComputedStyle(t).fontSize) * Math.hypot(a, b);
    }
)"""


OUTSIDE = """x => {
    const { left, right } = x.stage.getBoundingClientRect();
    return [...x.querySelectorAll("svg text")].filter(t => {
        const box = t.getBoundingClientRect();
        return box.left < left - 6 || box.right > right + 6;
    }).map(t => t.textContent);
}"""


@pytest.mark.parametrize("name", FIGURES)
def test_at_every_width_it_fits_and_its_words_are_large(figure, name):
    shown = figure(name)
    for width in (1280, 390, 320):
        shown.page.set_viewport_size({"width": width, "height": 800})
        shown.page.wait_for_function(
            "x => x.drawnWidth === Math.max(280, Math.floor(x.stage.clientWidth))",
            arg=shown.element_handle(),
        )
        assert shown.evaluate("x => x.scrollWidth <= x.clientWidth")
        assert min(shown.evaluate(WORD_SIZES)) > 15.5
        assert shown.evaluate(OUTSIDE) == []
    for control in shown.locator("button, input, label:has(input)").all():
        box = control.bounding_box()
        least = 20 if control.evaluate("x => x.matches('label input')") else 24
        assert min(box["width"], box["height"]) >= least
    for svg in shown.locator("svg").all():
        assert svg.get_attribute("role") == "img"
        assert len(svg.get_attribute("aria-label")) > 40
    assert shown.locator("output").get_attribute("aria-live") == "polite"


def test_rope_pair_keeps_its_product_when_both_move(figure):
    data = FIGURES["rope-pair"]()
    shown = figure("rope-pair")
    table = data["products"][1]
    words = minus(f"the product {table[8][4]:.2f}, the same at all 21 places")
    assert said(shown).startswith("Query at 8, key at 4:")
    assert words in said(shown)
    slide(shown, "move both", 20)
    assert said(shown).startswith("Query at 24, key at 20:")
    assert words in said(shown)
    slide(shown, "query\u2019s position m", 12)
    assert minus(f"the product {table[12][20]:.2f}") in said(shown)
    choose(shown, "198.7 tokens")
    assert minus(f"product {data['products'][3][12][20]:.2f}") in said(shown)
    assert "the same at all 17 places where m \u2212 n is \u22128" in said(shown)


def test_half_angle_tells_error_and_turn(figure):
    data = FIGURES["half-angle"]()
    shown = figure("half-angle")
    error = data["errors"]["float16"]["2"][2040] / 10
    assert f"model in float16: off by {error:.0f}°" in said(shown)
    choose(shown, "pair 1: 43° a token")
    box = shown.locator("svg rect").bounding_box()
    spot = box["x"] + box["width"] * 1403 / 2048, box["y"] + 5
    shown.page.mouse.click(*spot)
    here = re.match(r"Position (\d+),", said(shown))
    assert abs(int(here[1]) - 1403) < 5
    slider = shown.get_by_role("slider")
    for _ in range(1403 - int(here[1])):
        slider.press("ArrowRight")
    for _ in range(int(here[1]) - 1403):
        slider.press("ArrowLeft")
    assert "Position 1403, pair 1" in said(shown)
    assert said(shown).endswith("the hand should turn 43° and turns 0°.")
    choose(shown, "float32")
    slider.press("End")
    assert f"off by {2047 * data['slopes']['1']:.0f}°" in said(shown)
    slider.press("Home")
    assert "right to half a degree" in said(shown)


def test_residual_alpha_gives_shares_and_sizes(figure):
    data = FIGURES["residual-alpha"]()
    shown = figure("residual-alpha")
    assert said(shown).startswith("α = 1: less than 1% of the last vector is the input")
    assert f"{sum(data['chatglm'][0]['shares'][-4:]):.0%} comes from the" in said(shown)
    shown.get_by_role("button").press("Enter")
    root = data["chatglm"][data["root"]]
    assert said(shown).startswith(f"α = 7.48 = √56: {root['shares'][0]:.0%} of the")
    assert said(shown).endswith("behind the blocks is 7.5.")
    choose(shown, "Llama\u2019s, without α")
    llama = data["llama"]
    assert said(shown).startswith(f"Pre-norm: {llama['shares'][0]:.0%} of the last")
    ends = f"{llama['stream'][1]:.1f} to {llama['stream'][-1]:.1f}."
    assert said(shown).endswith(ends)
    assert shown.get_by_role("slider").is_disabled()


def test_prefix_mask_counts_pairs_and_numbers(figure):
    data = FIGURES["prefix-mask"]()
    shown = figure("prefix-mask")
    assert "5 tokens of context: 55 of 81 pairs may look, 10 of them" in said(shown)
    assert said(shown).endswith("stands at place 2, steps 1 to 4.")
    slide(shown, "tokens of context", 1)
    assert "45 of 81 pairs may look, none of them looks ahead" in said(shown)
    choose(shown, "[gMASK]")
    slide(shown, "tokens of context", 4)
    assert said(shown).endswith("stands at place 3, steps 1 to 5.")
    words = shown.locator("svg text").all_text_contents()
    for word in data["[gMASK]"][3]["words"]:
        assert words.count(word) >= 2  # beside its row, above its column


def test_prefix_mask_follows_a_dragging_finger(figure):
    shown = figure("prefix-mask", width=390)
    shown.scroll_into_view_if_needed()
    grid = shown.locator("svg rect").first.bounding_box()
    cell, middle = grid["width"] / 9, grid["y"] + grid["height"] / 2
    mouse = shown.page.mouse
    mouse.move(grid["x"] + 5 * cell, middle)
    mouse.down()
    for border, words in ((3, "3 tokens"), (2, "2 tokens"), (8, "6 tokens")):
        mouse.move(grid["x"] + border * cell, middle, steps=4)
        assert said(shown).startswith(f"[MASK], {words} of context")
    mouse.up()
    assert shown.get_by_role("slider").input_value() == "6"


def test_the_controls_stay_where_they_are_while_a_slider_moves(figure):
    shown = figure("prefix-mask", width=390)
    slider = shown.get_by_role("slider")
    slider.press("Home")
    top = slider.evaluate("x => x.getBoundingClientRect().top + scrollY")
    for _ in range(5):
        slider.press("ArrowRight")
        now = slider.evaluate("x => x.getBoundingClientRect().top + scrollY")
        assert math.isclose(now, top, abs_tol=1)


def test_without_scripts_the_words_remain(figure, browser, site):
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto((site / PAGES["rope-pair"]).as_uri())
        assert page.locator("figure.moving").inner_text().count("21 places") == 1
