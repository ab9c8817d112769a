"""Links from chapters to the lines of the annotated source, and back."""

import textwrap
from pathlib import Path
from typing import Any

from docutils import nodes
from package_files import PACKAGE, ROOT, dotted, names, page, resolve
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform


def link(words: str, docname: str, anchor: str) -> nodes.reference:
    """Refer to a place of the book; `Places` finds its address."""
    return nodes.reference(words, words, internal=True, place=(docname, anchor))


class Places(SphinxPostTransform):
    """Give every link to a line, and from a line, its address.

    In chapters and on pages of symbols, a reference to a function leads to its
    source; elsewhere to its description. Shown source says where it stands.
    """

    default_priority = 5  # before Sphinx resolves the references

    def run(self, **kwargs: Any) -> None:
        if self.env.docname.startswith(("notebooks/", "symbols/")):
            for node in list(self.document.findall(pending_xref)):
                target = _source_of(node.get("reftarget", ""))
                if node.get("refdomain") == "py" and target and self.exists(target[0]):
                    new = nodes.reference("", "", internal=True, place=target)
                    new += node.children
                    node.replace_self(new)
            for block in list(self.document.findall(nodes.literal_block)):
                self.name_lines(block)
        for node in self.document.findall(nodes.reference):
            if place := node.attributes.pop("place", None):
                self.address(node, *place)

    def exists(self, docname: str) -> bool:
        return docname in self.env.found_docs

    def address(self, node: nodes.reference, docname: str, anchor: str) -> None:
        uri = self.app.builder.get_relative_uri(self.env.docname, docname)
        node["refuri"] = f"{uri}#{anchor}" if anchor else uri

    def name_lines(self, block: nodes.literal_block) -> None:
        """Turn the file's name over shown source into a link to its lines."""
        above = block.parent.index(block) - 1
        title = block.parent[above] if above >= 0 else None
        if not isinstance(title, nodes.paragraph):
            return
        path = ROOT / title.astext()
        if not path.is_relative_to(PACKAGE) or path.suffix != ".py":
            return
        first, last = _lines_of(path, block.astext())
        if self.exists(page(path)):
            words = f"{title.astext()}, lines {first} to {last}"
            title.clear()  # a module's first lines are its note: they have no number
            title += link(words, page(path), f"L{first}" if first > 1 else "")
            title["classes"].append("source-place")


def _source_of(wanted: str) -> tuple[str, str] | None:
    if (name := resolve(wanted)) is None:
        return None
    path, first, _ = names()[name]
    inside = name != dotted(path)
    return page(path), (f"L{first}" if inside else "")


def _lines_of(path: Path, code: str) -> tuple[int, int]:
    """Find shown source in its file.

    Raises:
        ValueError: it is not there: the notebook is older than the module.
    """
    lines = path.read_text("utf-8").splitlines()
    for file, first, last in names().values():
        if file == path:
            whole = (first, last) if last > 1 else (1, len(lines))
            text = textwrap.dedent("\n".join(lines[whole[0] - 1 : whole[1]]))
            if text.strip() == code.strip():
                return whole
    raise ValueError(f"{path.name} does not hold the source that a chapter shows")


def source_link(domain: str, info: dict[str, str]) -> str | None:
    """Say where a described object's source is: for `sphinx.ext.linkcode`."""
    found = _source_of(f"{info['module']}.{info['fullname']}")
    return found and f"../{found[0]}.html#{found[1]}"


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the links."""
    app.add_post_transform(Places)
    if not app.tags.has("print"):  # on paper there are no such pages
        app.setup_extension("sphinx.ext.linkcode")
        app.config.linkcode_resolve = source_link
    return {"parallel_read_safe": True, "parallel_write_safe": True}
