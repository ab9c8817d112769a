"""A second build, in which one page has changed, finds what the first one found."""

import json
import subprocess
import sys
from pathlib import Path

EXTENSIONS = Path(__file__).resolve().parents[1] / "book/_ext"
CONF = f"import sys\nsys.path.insert(0, {str(EXTENSIONS)!r})\n"
INDEX = "Words\n=====\n\n.. glossary::\n\n   perplexity\n     How lost one is.\n"


def build(book):
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", book]
    subprocess.run([*command, book / "html"], check=True)
    text = (book / "html/searchindex.js").read_text("utf-8")
    return json.loads(text[text.index("{") : text.rindex("}") + 1])["indexentries"]


def test_entries_of_pages_that_are_not_built_again_stay(tmp_path):
    (tmp_path / "conf.py").write_text(CONF + "extensions = ['search_entries']\n")
    (tmp_path / "index.rst").write_text(INDEX + "\n.. toctree::\n\n   other\n")
    other = tmp_path / "other.rst"
    other.write_text("Other\n=====\n\n.. index:: llama\n\nA llama.\n")
    first = build(tmp_path)
    assert set(first) == {"perplexity", "llama"}
    other.write_text("Other\n=====\n\n.. index:: alpaca\n\nAn alpaca, for a change.\n")
    second = build(tmp_path)
    assert set(second) == {"perplexity", "alpaca"}
    assert second["perplexity"] == first["perplexity"]
