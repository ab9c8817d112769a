import inspect
import textwrap
from pathlib import Path

import jaxtyping
import pytest
import torch

from annotated_src import attention, masks
from annotated_src import show as module
from annotated_src.models.llama import LlamaConfig
from annotated_src.show import confirm, show

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def shown(monkeypatch):
    pages = []
    monkeypatch.setattr(module, "display", lambda page: pages.append(page.data))
    return pages


@pytest.mark.parametrize(
    ("item", "path", "opening"),
    [
        (attention.attend, "attention.py", "def attend("),
        (attention.Attention, "attention.py", "class Attention("),
        (attention.Attention.forward, "attention.py", "def forward("),
        (LlamaConfig, "models/llama.py", "@dataclass(frozen=True)\nclass LlamaConfig:"),
        (masks, "masks.py", '"""Which tokens may'),
    ],
)
def test_it_shows_the_file_and_the_source_on_disk(shown, item, path, opening):
    show(item)
    (page,) = shown
    where, code = page.split("\n\n```python\n")
    assert where == f"`annotated_src/{path}`"
    code = code.removesuffix("\n```")
    assert code.startswith(opening)
    on_disk = (ROOT / "annotated_src" / path).read_text("utf-8")
    indented = textwrap.indent(code, "    ")
    assert f"{code}\n" in on_disk or f"{indented}\n" in on_disk
    assert code == textwrap.dedent(inspect.getsource(inspect.unwrap(item))).rstrip()


def test_it_shows_all_it_is_given(shown):
    show(attention.attend, attention.repeat_kv)
    assert [("def attend(" in p, "def repeat_kv(" in p) for p in shown] == [
        (True, False),
        (False, True),
    ]


def test_without_source(shown):
    with pytest.raises(TypeError):
        show(torch.matmul)
    assert shown == []


@pytest.mark.parametrize("holds", [True, torch.tensor(True), torch.tensor([[True]])])
def test_confirm_prints_the_claim(capsys, holds):
    confirm("rows sum to one", holds)
    assert capsys.readouterr().out == "✓ rows sum to one\n"


@pytest.mark.parametrize("holds", [False, torch.tensor(False)])
def test_confirm_stops_the_notebook(capsys, holds):
    with pytest.raises(AssertionError, match="does not hold: rows sum to one"):
        confirm("rows sum to one", holds)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "holds", [torch.tensor(0.3), torch.tensor([True, True]), "no", [False], bool, 1]
)
@pytest.mark.usefixtures("unchecked")
def test_only_a_bool_answers_a_claim(holds):
    with pytest.raises(TypeError, match="a claim is true or false"):
        confirm("water is wet", holds)


def test_the_check_of_signatures_is_on():
    with pytest.raises(jaxtyping.TypeCheckError):
        masks.causal_mask("three")
