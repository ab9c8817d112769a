"""Four figures that move, driven by keyboard: each says what its numbers say."""

import re

import pytest

from annotated_src.figures.moving import FIGURES

PAGES = {
    "gqa-groups": "notebooks/llama/06_heads.html",
    "kv-cache": "notebooks/llama/07_cache.html",
    "top-p": "notebooks/text/05_sampling.html",
    "int8-grid": "notebooks/device/03_quantizing.html",
}


@pytest.fixture
def figure(open_page):
    """Open the page of a figure, at the size of a phone; return the figure."""

    def find(name):
        page = open_page(PAGES[name], width=390)
        found = page.locator(f"moving-{name}")
        found.locator("output").wait_for()
        return found

    return find


def said(figure):
    return figure.locator("output").inner_text().replace("\u00a0", " ")


def choose(figure, legend, text):
    group = figure.get_by_role("group", name=legend)
    group.get_by_role("radio", name=text, exact=True).press("Space")


def test_gqa_groups_names_readers_and_bytes(figure):
    data, shown = FIGURES["gqa-groups"](), figure("gqa-groups")
    choose(shown, "KV heads for 8 query heads", "4")
    choose(shown, "Cache of", "TinyLlama-1.1B")
    model = data["models"]["TinyLlama-1.1B"]
    kib = model["token_bytes"][1] // 1024
    size = f"{model['kv_heads'][1]} KV heads a layer, {kib} KiB"
    assert "8 on 4: 0 1 read 0, 2 3 read 1, 4 5 read 2, 6 7 read 3." in said(shown)
    assert size in said(shown)
    shown.get_by_role("checkbox").press("Space")
    assert "0 4 read 0, 1 5 read 1" in said(shown)
    assert "2 of 8 query heads read the right one" in said(shown)
    choose(shown, "KV heads for 8 query heads", "1")
    assert "the mistake does not show" in said(shown)
    assert "as it was built" in said(shown)


def test_gqa_groups_wires_end_below_their_readers(figure):
    shown = figure("gqa-groups")
    shown.page.emulate_media(reduced_motion="reduce")
    choose(shown, "KV heads for 8 query heads", "2")
    choose(shown, "KV heads for 8 query heads", "4")
    wires = shown.locator("svg > line").evaluate_all(
        "lines => lines.map(l => [l.x1.baseVal.value, l.x2.baseVal.value])"
    )
    starts, ends = zip(*wires, strict=True)
    for n in range(0, 8, 2):
        middle = (starts[n] + starts[n + 1]) / 2
        assert ends[n] == ends[n + 1] == pytest.approx(middle, abs=0.01)


def test_kv_cache_adds_up_the_steps(figure):
    data, shown = FIGURES["kv-cache"](), figure("kv-cache")
    slider = shown.get_by_role("slider")
    slider.press("Home")
    assert said(shown).startswith("Step 1: without a cache 4 tokens")
    assert "So far 4 against 4 tokens" in said(shown)
    slider.press("End")
    sums = [sum(data[way]["computed"]) for way in ("without", "with_cache")]
    million = [
        f"{sum(data[way]['operations']) / 1e6:.2f}" for way in ("without", "with_cache")
    ]
    assert f"So far {sums[0]} against {sums[1]} tokens" in said(shown)
    assert f"{million[0]} against {million[1]} million operations" in said(shown)
    held = data["with_cache"]["computed"][-1] + data["with_cache"]["read"][-1]
    assert f"holds {held} tokens, {held * data['token_bytes']:,} bytes" in said(shown)
    visible = shown.locator("svg g[visibility=visible]").count()
    assert visible == 2 * len(data["words"]) + 4  # both texts, and the key


def test_top_p_counts_what_stays(figure):
    data, shown = FIGURES["top-p"](), figure("top-p")
    p, warmth = (
        shown.get_by_role("slider", name=name, exact=True)
        for name in ("p", "temperature")
    )
    p.press("ArrowLeft")
    p.press("ArrowLeft")
    assert "p = 0.70: 1 token stays, of 49,152; it had 70.3 %" in said(shown)
    warmth.press("End")
    cut = data["cuts"].index(0.7)
    kept = data["prompts"][0]["temperatures"][-1]["kept"][cut]
    assert f"Temperature 2, p = 0.70: {kept:,} tokens stay" in said(shown)
    p.press("End")
    assert f"{data['vocab_size']:,} tokens stay, of {data['vocab_size']:,}" in said(
        shown
    )
    assert shown.locator("svg").get_by_text("cut", exact=True).count() == 0


def test_top_p_follows_a_finger_on_the_strip(figure):
    shown = figure("top-p")
    strip = shown.locator("svg > g").first
    strip.scroll_into_view_if_needed()
    box = shown.locator("svg").bounding_box()
    mouse = shown.page.mouse
    mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 55)
    mouse.down()
    mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 55)
    mouse.up()
    assert re.search(r"p = 0\.50: 1 token stays", said(shown))


def test_int8_grid_says_what_becomes_zero(figure):
    data, shown = FIGURES["int8-grid"](), figure("int8-grid")
    shown.get_by_role("slider").press("End")
    for bits in ("4", "8"):
        choose(shown, "Bits a weight", bits)
        for sharing, name in (("row", "each row"), ("group", "each 32 weights")):
            choose(shown, "One scale for", name)
            grid = data["grids"][bits][sharing][-1]
            group, _, others = (zeros for _, zeros, _ in grid["places"])
            words = f"{bits} bits, one scale for {name}, the largest weight 17.59"
            assert words in said(shown)
            assert f"of its group {group:.0%} become 0".replace("%", " %") in said(
                shown
            )
            digits = 1 if others < 0.1 else 0
            last = f"of the other rows {others:.{digits}%}".replace("%", " %")
            assert last in said(shown)


@pytest.mark.parametrize("name", PAGES)
def test_the_page_stays_still_while_a_slider_moves(figure, name):
    shown = figure(name)
    before = shown.bounding_box()["height"]
    for slider in shown.get_by_role("slider").all():
        for key in ("Home", "ArrowRight", "End"):
            slider.press(key)
            assert shown.bounding_box()["height"] == pytest.approx(before, abs=1)
    for radio in shown.get_by_role("radio").all():
        radio.press("Space")
        assert shown.bounding_box()["height"] == pytest.approx(before, abs=1)
