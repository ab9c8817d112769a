import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from annotated_src.figures.moving import FIGURES

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "book" / "_static" / "moving"
BOX = (
    r":::+\{admonition\} A figure that moves:[^\n]+\n"
    r":class: moving ([\w-]+)\n(.*?)\n:::"
)


@pytest.fixture(scope="module")
def texts():
    """The text of each figure's box, from the notebooks that the book renders."""
    found = {}
    for path in (ROOT / "notebooks").glob("*/*.ipynb"):
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown" and ":class: moving" in source:
                for name, text in re.findall(BOX, source, re.S):
                    assert name not in found
                    found[name] = " ".join(text.replace("$", "").split())
    return found


@pytest.fixture(scope="module")
def numbers():
    return {name: make() for name, make in FIGURES.items()}


def test_every_figure_is_in_one_chapter_and_has_its_script(texts):
    assert set(texts) == set(FIGURES)
    for name in FIGURES:
        script = (SCRIPTS / f"{name}.js").read_text("utf-8")
        assert f'defineMoving("{name}"' in script or f"defineMoving('{name}'" in script


def test_numbers_are_plain_and_small(numbers):
    for data in numbers.values():
        text = json.dumps(data, separators=(",", ":"), allow_nan=False)
        assert json.loads(text) == data
        assert len(text) < 40_000


def test_scripts_ask_nothing_of_a_server():
    for script in SCRIPTS.iterdir():
        text = script.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"fetch\(|https?://|\bimport\b|XMLHttpRequest", text)


def test_rope_pair_in_words(texts, numbers):
    data, text = numbers["rope-pair"], texts["rope-pair"]
    table = data["products"][1]
    count = len(table)
    assert f"a text of {count} tokens" in text
    assert f"turns once in {data['wavelengths'][1]} tokens" in text
    assert f"Query at 8, key at 4: the product is {table[8][4]:.2f}." in text
    assert f"at 12 it is {table[12][4]:.2f}." in text
    places = [table[n + 4][n] for n in range(count - 4)]
    assert len(set(places)) == 1
    assert f"{places[0]:.2f} at all {len(places)} places where m - n = 4" in text
    assert f"the slowest pair, once in {data['wavelengths'][-1]} tokens" in text


def test_half_angle_in_words(texts, numbers):
    data, text = numbers["half-angle"], texts["half-angle"]
    errors = data["errors"]["float16"]
    assert f"pair 2 is off by {errors['2'][2040] / 10:.0f}° at position 2040" in text
    step = data["degrees"]["1"]
    assert f"each token should turn it by {step:.0f}°" in text
    turns = [
        round(step + (errors["1"][p] - errors["1"][p - 1]) / 10)
        for p in range(1400, 1408)
    ]
    assert sorted(turns) == [0] * 2 + [57] * 6
    assert "six turn it by 57°, two not at all" in text
    one, two = (2047 * data["slopes"][pair] for pair in ("1", "2"))
    assert (
        f"to {one:.0f}° for pair 1 and {two:.0f}° for pair 2 at position 2047" in text
    )


def test_residual_alpha_in_words(texts, numbers):
    data, text = numbers["residual-alpha"], texts["residual-alpha"]
    one, root = data["chatglm"][0]["shares"], data["chatglm"][data["root"]]["shares"]
    assert data["alphas"][0] == 1
    assert one[0] < 0.01
    assert "With \\alpha = 1 less than 1% of it is the input's" in text
    assert f"and {sum(one[-4:]):.0%} comes from the last 4 blocks" in text
    assert f"it is {root[0]:.0%} and {sum(root[-4:]):.0%}," in text
    sizes = {f"{size:.1f}" for size in data["chatglm"][data["root"]]["stream"][1:]}
    assert sizes == {"7.5"}
    assert "behind every block the size is 7.5" in text
    assert data["alphas"][-1] == 14
    share = data["chatglm"][-1]["shares"][0]
    assert f"With \\alpha = 14 the input has {share:.0%}" in text
    halves = [measured["shares"][0] for measured in data["chatglm"]]
    assert any(0.35 < half < 0.65 for half in halves)  # one can leave about half


def test_prefix_mask_in_words(texts, numbers):
    text = texts["prefix-mask"]
    states = numbers["prefix-mask"]["[MASK]"]
    pairs = [sum(row.count("1") for row in state["mask"]) for state in states]
    ahead = [
        sum(row[t + 1 :].count("1") for t, row in enumerate(state["mask"]))
        for state in states
    ]
    five = f"{pairs[4]} of 81 pairs may look, and {ahead[4]} of them look ahead"
    assert f"With 5 tokens of context, {five}" in text
    assert ahead[0] == 0
    assert f"With 1 token the mask is causal: {pairs[0]} pairs, none" in text
    places, steps = states[4]["places"], states[4]["steps"]
    last = f"at place {places[-1]}, steps {steps[5]} to {steps[-1]}"
    assert f"At `[MASK]` with 5 tokens of context the answer is {last}" in text


PAGE = """# A page

:::{admonition} A figure that moves: both ways
:class: moving prefix-mask
The *same* in words.
:::
"""
CONF = f"""
import sys
sys.path.insert(0, {str(ROOT / "book" / "_ext")!r})
extensions = ["myst_parser", "moving"]
myst_enable_extensions = ["colon_fence"]
"""


@pytest.fixture(scope="module")
def small_book(tmp_path_factory):
    """Build a page with a figure, one without and one with a wrong name, two ways."""
    source = tmp_path_factory.mktemp("source")
    (source / "conf.py").write_text(CONF, "utf-8")
    (source / "index.md").write_text(PAGE, "utf-8")
    (source / "plain.md").write_text("---\norphan: true\n---\n# Plain\n", "utf-8")
    wrong = "---\norphan: true\n---\n" + PAGE.replace("prefix-mask", "prefix-task")
    (source / "wrong.md").write_text(wrong, "utf-8")
    said = {}
    for builder in ("html", "text"):
        command = [sys.executable, "-m", "sphinx", "-q", "-b", builder]
        folders = [source, source / "_build" / builder]
        built = subprocess.run(
            [*command, "-d", source / "_build" / "doctrees", *folders],
            capture_output=True,
            text=True,
            check=True,
        )
        said[builder] = built.stderr
    return source / "_build", said


def test_a_web_page_has_figure_numbers_and_text(small_book):
    folder, _ = small_book
    page = (folder / "html" / "index.html").read_text("utf-8")
    found = re.search(
        r'<figure class="moving prefix-mask" id="moving-prefix-mask">\s*'
        r"<figcaption>A figure that moves: both ways</figcaption>\s*"
        r'<moving-prefix-mask><script type="application/json">(.*?)</script>'
        r"</moving-prefix-mask>\s*<p>The <em>same</em> in words.</p>\s*</figure>",
        page,
        re.S,
    )
    assert json.loads(found[1]) == FIGURES["prefix-mask"]()
    assert "<sop>" not in found[1]  # nothing inside looks like a tag
    for name in ("moving.css", "moving.js", "prefix-mask.js"):
        assert page.count(f"moving/{name}") == 1
    assert "rope-pair.js" not in page


def test_other_pages_load_nothing_for_it(small_book):
    folder, _ = small_book
    assert "moving/" not in (folder / "html" / "plain.html").read_text("utf-8")


def test_a_wrong_name_is_told_with_the_right_ones(small_book):
    folder, said = small_book
    assert "wrong.md:6: WARNING: a moving figure needs one name" in said["html"]
    assert "prefix-task" in said["html"]
    assert "prefix-mask" in said["html"]
    assert "The <em>same</em>" in (folder / "html" / "wrong.html").read_text("utf-8")


def test_other_forms_keep_the_words(small_book):
    folder, said = small_book
    text = (folder / "text" / "index.txt").read_text("utf-8")
    assert "A figure that moves: both ways" in text
    assert "The *same* in words." in text
    assert said["text"] == ""
