"""Solutions with one small thing changed, by Cosmic Ray's operators and one of ours."""

import inspect
import re

import parso
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

from annotated_src.checks.diagnosis import finding
from annotated_src.checks.running import run
from annotated_src.checks.source import source_of

ARITHMETIC = {
    "Add": ("Sub",),
    "Sub": ("Add",),
    "Mul": ("Div", "Add"),
    "Div": ("Mul",),
    "FloorDiv": ("Mul", "Div"),
    "Mod": ("FloorDiv",),
    "Pow": ("Mul",),
    "BitAnd": ("BitOr",),
    "BitOr": ("BitAnd",),
    "RShift": ("LShift",),
    "LShift": ("RShift",),
}
COMPARISONS = {
    "Lt": ("LtE", "Gt"),
    "LtE": ("Lt", "Gt"),
    "Gt": ("GtE", "Lt"),
    "GtE": ("Gt", "Lt"),
    "Eq": ("NotEq",),
    "NotEq": ("Eq",),
}
OPERATORS = (
    [f"ReplaceBinaryOperator_{a}_{b}" for a, bs in ARITHMETIC.items() for b in bs]
    + [
        f"ReplaceComparisonOperator_{a}_{b}"
        for a, bs in COMPARISONS.items()
        for b in bs
    ]
    + ["ReplaceUnaryOperator_USub_UAdd", "ReplaceUnaryOperator_Delete_Invert"]
    + ["ReplaceUnaryOperator_Delete_Not", "AddNot", "ReplaceTrueWithFalse"]
    + ["ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd"]
    + ["ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ZeroIterationForLoop"]
    + ["NumberReplacer"]  # sizes, offsets and axes: each up and down by one
)
# Functions and methods of tensors that people take for each other.
SWAPS = (
    *("repeat_interleave repeat", "sin cos", "sum mean", "max min", "amax amin"),
    *("argmax argmin", "tril triu", "zeros ones", "zeros_like ones_like", "any all"),
    *("floor ceil", "exp log", "stack cat", "softmax log_softmax", "sqrt square"),
    *("rsqrt sqrt", "cumsum cumprod", "keys values", "unflatten view", "append extend"),
    *("rows columns", "startswith endswith", "lstrip rstrip", "round trunc"),
)
SWAPPED = dict(map(str.split, SWAPS))
SWAPPED = {b: a for a, b in SWAPPED.items()} | SWAPPED


class SwapNames(Operator):
    """Take a function of the same family: cos for sin, repeat for repeat_interleave."""

    def mutation_positions(self, node):
        called = node.type == "name" and node.value in SWAPPED
        if called and node.parent.type in ("trailer", "atom_expr", "power"):
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        new = SWAPPED[node.value]
        return parso.python.tree.Name(new, node.start_pos, prefix=node.prefix)

    @classmethod
    def examples(cls):
        return ()


def mutations(source):
    """Yield (what was changed, changed source), each once."""
    seen, nodes = {source}, list(ast_nodes(get_ast(source)))
    operators = [get_operator(f"core/{name}")() for name in OPERATORS]
    for operator in (*operators, SwapNames()):
        # counted first, as each call of mutate_code parses the source again
        places = sum(len(list(operator.mutation_positions(node))) for node in nodes)
        for occurrence in range(places):
            mutant = mutate_code(source, operator, occurrence)
            if mutant not in seen:
                seen.add(mutant)
                yield changed_line(source, mutant), mutant


def changed_line(source, mutant):
    """Give the first line of a mutant that the source does not have there."""
    pairs = zip(source.splitlines(), mutant.splitlines(), strict=False)
    line = next(new for old, new in pairs if old != new)
    return re.sub(r"\s+", " ", line).strip()


def compiled(source, solution):
    """Make a function of a source, which sees what the solution sees."""
    plain = inspect.unwrap(solution)
    names = dict(plain.__globals__)
    exec(compile(source, "<mutant>", "exec"), names)
    return names[plain.__name__]


def survives(task, function):
    """Say whether a function passes on every input."""
    for case, right in zip(task.inputs(), task.expected(), strict=True):
        got = run(function, case, seconds=0.5, twice=False)
        if finding(task, case, right, got):
            return False
    return True


def survivors(task):
    """Return how many mutants the solution of a task has, and those that live."""
    solution = task.solution
    source = source_of(solution, inspect.unwrap(solution).__name__)
    count, alive = 0, []
    for line, mutant in mutations(source):
        count += 1
        try:
            function = compiled(mutant, solution)
        except SyntaxError:
            continue
        if survives(task, function):
            alive.append(line)
    return count, alive
