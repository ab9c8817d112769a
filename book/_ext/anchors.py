"""Places to link to: a cell by what it confirms, a box by its number in the chapter.

`{ref}` finds the cell of `confirm("B3: dim / 2 frequencies", …)` in the chapter
`ch-errata` as `claim-errata-b3-dim-2-frequencies`, and the chapter's first box about
papers and code as `box-errata-1`.
"""

from chapters import chapters, claims
from docutils import nodes
from sphinx.application import Sphinx

BOX = "paper-code"


def claim_label(chapter: str, claim: str) -> str:
    """Name the label of the cell that confirms a claim."""
    return nodes.make_id(f"claim-{chapter}-{claim}")


def mark_places(app: Sphinx, tree: nodes.document) -> None:
    """Give a chapter's cells and boxes their labels."""
    page = app.env.docname
    labels = {chapter.page: chapter.label for chapter in chapters()}
    if page in labels:
        _mark_cells(app, tree, page, labels[page])
        _mark_boxes(app, tree, page, labels[page])


def _mark_cells(app: Sphinx, tree: nodes.document, page: str, chapter: str) -> None:
    domain, known = app.env.domains.standard_domain, set[str]()
    for cell in tree.findall(nodes.container):
        if cell.get("nb_element") != "cell_code":
            continue
        code = next(iter(cell.findall(nodes.literal_block)), None)
        source = code.astext() if code is not None else ""
        names = [claim_label(chapter, c) for c in _claims_of(source)]
        fresh = [name for name in dict.fromkeys(names) if name not in known]
        if fresh:
            cell["ids"].append(fresh[0])
        for name in fresh:
            domain.note_hyperlink_target(name, page, fresh[0])
        known.update(fresh)


def _claims_of(source: str) -> list[str]:
    try:
        return claims(source)
    except SyntaxError:  # a cell that shows what fails, or output that looks like code
        return []


def _mark_boxes(app: Sphinx, tree: nodes.document, page: str, chapter: str) -> None:
    boxes = (n for n in tree.findall(nodes.admonition) if BOX in n["classes"])
    for number, box in enumerate(boxes, 1):
        name = f"box-{chapter}-{number}"
        box["ids"].append(name)
        app.env.domains.standard_domain.note_hyperlink_target(name, page, name)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register it."""
    app.connect("doctree-read", mark_places)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
