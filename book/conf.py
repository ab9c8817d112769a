"""Sphinx configuration. Notebooks are committed executed; building never runs code."""

import sys
from pathlib import Path

BOOK = Path(__file__).resolve().parent
sys.path.insert(0, str(BOOK / "_ext"))

# Sphinx reads below one folder. A link brings the notebooks into it; on Windows a
# junction does, which needs no rights.
if not (link := BOOK / "notebooks").exists():
    if sys.platform == "win32":
        import _winapi

        _winapi.CreateJunction(str(BOOK.parent / "notebooks"), str(link))
    else:
        link.symlink_to("../notebooks", target_is_directory=True)

project = "Decoders, Taken Apart"
author = "The authors"
copyright = "2026, the authors. Code: Apache-2.0. Text: CC BY 4.0"
version = release = "0.1.0"
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_multitoc_numbering",  # chapters count on from part to part
    "sphinxcontrib.bibtex",
    "sphinx-mathjax-offline",
    "accessible",
    "notebook_links",
]
exclude_patterns = ["_build", "**/*.py", "**/.ipynb_checkpoints"]

nb_execution_mode = "off"  # nbval proves the outputs; the book only shows them
nb_merge_streams = True
nb_render_markdown_format = "myst"  # outputs may be tables
myst_enable_extensions = [
    "dollarmath",
    "amsmath",
    "colon_fence",
    "deflist",
    "attrs_inline",
]
myst_heading_anchors = 3

numfig = True
math_eqref_format = "({number})"
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"
autodoc_typehints_format = "short"
default_role = "code"
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "sphinx_book_theme"
html_title = project
html_favicon = "_static/favicon.svg"
html_logo = "_static/logo.svg"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_context = {"default_mode": "auto"}
html_copy_source = True
html_show_sourcelink = True
html_theme_options = {
    "use_download_button": True,
    "use_fullscreen_button": False,
    "show_toc_level": 2,
    "home_page_in_toc": False,
    "navbar_persistent": [],
}
