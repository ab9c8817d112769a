"""The kill matrix: which inputs catch which mistake; a page of the book."""

import os
import re
from pathlib import Path

from mutants import survivors

from annotated_src.checks.diagnosis import finding, judge
from annotated_src.checks.exercise import Question
from annotated_src.checks.running import run
from annotated_src.exercises import chapters

PAGE = Path(__file__).resolve().parents[2] / "book" / "kill_matrix.md"
WRITE = "WRITE_KILLS" in os.environ
END = "<!-- end -->"


def caught_by(task, function):
    """Mark each input, the smallest first: × where it shows the mistake."""
    pairs = zip(task.inputs(), task.expected(), strict=True)
    outcomes = [
        (case, right, run(function, case, twice=False)) for case, right in pairs
    ]
    return "".join("×" if finding(task, *each) else "·" for each in outcomes)


def named(task, function):
    """Say which mistake the checks see in a function; nothing if it is right."""
    outcomes = [run(function, case) for case in task.inputs()]
    answer = judge(task, task.inputs(), outcomes)
    return None if answer else answer.mistake


def section(chapter):
    """Write a chapter's part of the page, from runs of everything in it."""
    lines = [f"## {chapter.title}", ""]
    for task in chapter:
        if isinstance(task, Question):
            continue
        count, alive = survivors(task)
        lines += [f"`{task.name}`", "", "```text"]
        names = [mistake.name for mistake in task.mistakes]
        width = max(map(len, names))
        for mistake in task.mistakes:
            assert named(task, mistake.function) == mistake.name, mistake.name
            lines.append(f"{mistake.name:{width}}  {caught_by(task, mistake.function)}")
        for style, function in task.others.items():
            assert named(task, function) is None, style
        lines += ["```", ""]
        killed = count - len(alive)
        lines.append(
            f"{len(names)} mistakes named, {1 + len(task.others)} right solutions "
            f"accepted, {killed} of {count} mutants killed."
        )
        reasons = {e.line: e.because for e in task.equivalents}
        lines += [
            f"- `{line}`: {reasons.get(line, '?')}." for line in sorted(set(alive))
        ]
        lines.append("")
    return "\n".join(lines)


def stored_section(chapter):
    """Read a chapter's part from the page."""
    text = PAGE.read_text("utf-8")
    start = text.find(f"## {chapter.title}\n")
    stops = [i for i in (text.find("\n## ", start + 1), text.find(END)) if i > 0]
    return text[start : min(stops)].strip()


def totals(text):
    """Add up exercises, mistakes, right solutions, mutants killed, mutants."""
    found = re.findall(
        r"^(\d+) mistakes named, (\d+) right .* accepted, (\d+) of (\d+) mutants",
        text,
        re.M,
    )
    return len(found), *(sum(map(int, column)) for column in zip(*found, strict=True))


HEAD = """\
# Kill matrix

A check is worth what it catches. Each exercise that wants a function comes with wrong
solutions, one for each misconception that we know of. The tests run all of them: each
must fail, and the answer must call it by its own name. Right solutions in other styles
must pass. Then a tool changes the solutions themselves, one operator, number, axis or
function at a time: such a mutant must fail too, or stand here as equivalent, with the
reason.

{totals}

The tests write this page. A column is an input, the smallest first: `×` where it shows
the mistake, `·` where it lets it pass. `check` shows the first `×`.

"""


def write():
    """Write the page from runs of everything."""
    sections = "\n".join(map(section, chapters()))
    exercises, mistakes, right, killed, mutants = totals(sections)
    words = (
        f"{exercises} exercises, {mistakes} mistakes, {right} right solutions, "
        f"{killed} of {mutants} mutants killed, the others equivalent."
    )
    PAGE.write_text(HEAD.format(totals=words) + sections + END + "\n", "utf-8")


if __name__ == "__main__":
    write()
