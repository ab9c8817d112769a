"""The page of one source symbol, as Markdown."""

from collections.abc import Iterable, Iterator

from symbols_data import Project, Symbol, page_name
from symbols_scan import Book, Chapter

# Whose symbols a table of equality calls by their names.
PAGES_OF = {"equality": "chatglm", "equality_llama": "transformers"}


def write_head(project: Project, symbol: Symbol) -> Iterator[str]:
    """Write what the source is: title, index entry, place, and what it does there."""
    # Out of all tables of contents: some two hundred more entries in the sidebar of
    # every page nearly double the time that the book takes to build.
    yield "---\norphan: true\n---\n"
    yield f"({page_name('symbol-' + project.slug, symbol.name)})=\n# `{symbol.name}`\n"
    yield f"```{{index}} single: {symbol.name}; {project.title}\n```\n"
    owner, _, last = symbol.name.rpartition(".")
    if owner:
        yield f"```{{index}} single: {last}; of {owner}\n```\n"
    where = f"[{project.title}](index.md), `{symbol.path}`"
    yield f"{where}. {symbol.version}\n" if symbol.version else f"{where}\n"
    yield f"{symbol.does.strip()}\n"


def write_body(project: Project, symbol: Symbol, book: Book) -> Iterator[str]:
    """Write where the book has it, as a list of terms and their descriptions."""
    yield from term("Derived in", link(derived(book, symbol.derived)))
    ours = ", ".join(f"{{py:obj}}`~{name}`" for name in symbol.ours)
    yield from term("Ours", [ours] if ours else [])
    yield from term("Instead", [symbol.instead] if symbol.instead else [])
    yield from term("Shown in", link(shown(book, symbol.ours)))
    yield from term("Differs", [symbol.differs] if symbol.differs else [])
    yield from term("Errata", [errata(book, number) for number in symbol.errata])
    yield from term("Compared", compared(book, project, symbol))
    yield from term("Tested by", tested(symbol.tested))
    yield from term("Exercises", exercises(book, symbol.exercises))
    others = [f"[`{at.partition(':')[2]}`]({page_name(at)}.md)" for at in symbol.see]
    yield from term("See also", [", ".join(others)] if others else [])


def term(name: str, lines: Iterable[str]) -> Iterator[str]:
    """Write one entry of a definition list; none at all, where there is nothing."""
    for start, line in enumerate(dict.fromkeys(lines)):
        text = " ".join(line.split())
        yield f": {text}" if start else f"**{name}**\n: {text}"
    yield ""


def derived(book: Book, targets: Iterable[str]) -> Iterator[tuple[Chapter, str]]:
    """Find chapters and headings of targets such as `ch-heads#One family`."""
    for target in targets:
        label, _, heading = target.partition("#")
        yield book.chapters[label], heading


def shown(book: Book, ours: Iterable[str]) -> Iterator[tuple[Chapter, str]]:
    """Find the sections whose cells show this code, its class, or a method of it."""
    for name in ours:
        for found, chapter, heading in book.shown:
            if f"{name}.".startswith(f"{found}.") or found.startswith(f"{name}."):
                yield chapter, heading


def link(found: Iterable[tuple[Chapter, str]]) -> Iterator[str]:
    """Link to sections, a line for each chapter: its title, then the headings."""
    grouped: dict[str, dict[str, None]] = {}
    for chapter, heading in found:
        headings = grouped.setdefault(f"{{ref}}`{chapter.label}`", {})
        if heading:
            at = f"../{chapter.page}.ipynb#{chapter.slugs[heading]}"
            headings[f"[{heading}]({at})"] = None
    for title, headings in grouped.items():
        yield ": ".join(filter(None, (title, "; ".join(headings))))


def errata(book: Book, number: str) -> str:
    """Quote the row of the errata table."""
    says, does = book.errata[number]
    return f"{number} of {{ref}}`ch-errata`: it says *{says}*; it is: {does}"


def compared(book: Book, project: Project, symbol: Symbol) -> Iterator[str]:
    """Say which tables of equality have the symbol, and how much they compare."""
    names = {symbol.name, symbol.name.rpartition(".")[2]}
    counts: dict[str, dict[str, int]] = {}
    for row in book.equality:
        by_name = PAGES_OF[row.page] == project.slug and names & row.originals
        if by_name or row.originals.intersection(symbol.compared):
            sections = counts.setdefault(f"{{doc}}`/{row.page}`", {})
            sections[row.section] = sections.get(row.section, 0) + row.count
    for page, sections in counts.items():
        said = [f"{name} ({n})" if n else name for name, n in sections.items()]
        yield f"{page}: {'; '.join(said)}"


def tested(ids: Iterable[str]) -> Iterator[str]:
    """Name the tests, file by file."""
    files: dict[str, list[str]] = {}
    for name in ids:
        path, _, function = name.partition("::")
        files.setdefault(path, []).append(f"`{function}`")
    for path, functions in files.items():
        yield f"`{path}`: {', '.join(functions)}"


def exercises(book: Book, names: Iterable[str]) -> Iterator[str]:
    """Name exercises, and link to the end of the chapter that has them."""
    for name in names:
        for place in link([(book.exercises[name], "Exercises")]):
            yield f"`{name}`: {place}"
