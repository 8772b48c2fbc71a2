"""Mutants of the library's mathematics: `python tests/mutants.py` makes them, runs the fast tests on each and lists the survivors.

cosmic-ray finds the places and makes the replacements (arithmetic, comparisons, numbers, booleans, decorators, loops); `Rename` and
`Transpose` below add those of this field: teacher for fake, alpha for sigma, sum for mean, a stop-gradient dropped, arguments exchanged.
A mutant is killed when a test fails, when the code no longer imports or when it runs into the time limit. A survivor must be in
HARMLESS with the reason why no test could tell it from the original; one that is not there makes this exit with 1.

    python tests/mutants.py                   all modules, two at a time
    python tests/mutants.py importance -j 1   one module
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import multiprocessing
import os
import pkgutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import parso
from cosmic_ray.ast import Visitor, get_ast
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "fewstep"

# module -> the test files that are about it, asked first; then the others, in this order
MODULES = {
    "transforms": ("test_transforms.py", "test_distribution.py"),
    "importance": ("test_importance.py",),
    "losses": ("test_policy.py", "test_distribution.py"),
    "student": ("test_student.py", "test_policy.py"),
    "rewards.distribution": ("test_distribution.py", "test_tilt.py"),
    "weights": ("test_weights.py", "test_tilt.py"),
}
FAST = (
    "test_pure.py", "test_transforms.py", "test_importance.py", "test_policy.py", "test_student.py", "test_distribution.py",
    "test_weights.py", "test_denoiser.py", "test_rewards.py", "test_tilt.py",
)  # fmt: skip
TIME_LIMIT = 240  # seconds; the fast tests take about a fifth of it

BINARY = ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "Pow_Mul", "FloorDiv_Mul", "Mod_Mul", "BitAnd_BitOr", "BitOr_BitAnd")
COMPARISON = (
    "Eq_NotEq",
    "NotEq_Eq",
    "Lt_LtE",
    "Lt_GtE",
    "LtE_Lt",
    "LtE_Gt",
    "Gt_GtE",
    "Gt_LtE",
    "GtE_Gt",
    "GtE_Lt",
    "Is_IsNot",
    "IsNot_Is",
)
STOCK = (
    *(f"ReplaceBinaryOperator_{name}" for name in BINARY), *(f"ReplaceComparisonOperator_{name}" for name in COMPARISON),
    "ReplaceUnaryOperator_Delete_USub", "ReplaceUnaryOperator_Delete_Invert", "ReplaceUnaryOperator_Delete_Not",
    "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd", "NumberReplacer", "RemoveDecorator",
    "ZeroIterationForLoop",
)  # fmt: skip
SWAPPED = (
    ("teacher", "fake"), ("guided", "conditional"), ("alpha", "sigma"), ("mean", "sum"), ("amin", "amax"), ("min", "max"), ("new", "old"),
    ("x0_new", "x0_old"), ("states", "x0"), ("low", "high"), ("ones_like", "zeros_like"), ("x0", "noise"), ("log_prob", "old_log_prob"),
)  # fmt: skip
RENAMED = (
    *SWAPPED,
    *((b, a) for a, b in SWAPPED),
    ("detach", "clone"),
    ("clamp", "add"),
    ("sqrt", "abs"),
    ("abs", "square"),
    ("exp", "log"),
)


def in_declaration(node) -> bool:
    """Whether a node is part of an annotation, a parameter's name, or an import: no computation to get wrong."""
    while node.parent is not None:
        above = node.parent
        if (
            above.type in ("tfpdef", "annassign")
            and node is not above.children[0]
            and "=" not in [c.get_code().strip() for c in above.children]
        ):
            return True
        if above.type == "param":
            return node is not above.default
        if above.type == "funcdef" and node is above.annotation:
            return True
        if above.type in ("import_from", "import_name", "parameters"):
            return True
        node = above
    return False


class Rename(Operator):
    """One name for another, wherever it is used."""

    def __init__(self, old: str, new: str):
        self.old, self.new = old, new

    def mutation_positions(self, node):
        if isinstance(node, parso.python.tree.Name) and node.value == self.old and not in_declaration(node) and not node.is_definition():
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        node.value = self.new
        return node

    @classmethod
    def examples(cls):
        return ()


class Transpose(Operator):
    """f(a, b) becomes f(b, a), for each pair of neighbouring positional arguments."""

    @staticmethod
    def pairs(node) -> list[tuple[int, int]]:
        if node.type != "arglist":
            return []
        plain = [i for i, child in enumerate(node.children) if child.type not in ("argument", "operator")]
        return [(i, j) for i, j in itertools.pairwise(plain) if node.children[i].get_code().strip() != node.children[j].get_code().strip()]

    def mutation_positions(self, node):
        for _ in self.pairs(node):
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        i, j = self.pairs(node)[index]
        node.children[i], node.children[j] = node.children[j], node.children[i]
        return node

    @classmethod
    def examples(cls):
        return ()


class Mutant(NamedTuple):
    module: str
    old: str  # the line as it is
    new: str  # the line as it becomes
    source: str


class Occurrences(Visitor):
    """How often an operator applies outside of declarations, or the source with its n-th application."""

    def __init__(self, operator: Operator, occurrence: int = -1):
        self.operator, self.occurrence, self.count = operator, occurrence, 0

    def visit(self, node):
        if in_declaration(node):
            return node
        for index, _ in enumerate(self.operator.mutation_positions(node)):
            if self.count == self.occurrence:
                node = self.operator.mutate(node, index)
            self.count += 1
        return node


def mutants_of(module: str) -> Iterator[Mutant]:
    """Every mutant of a module whose source differs from it and from the mutants before."""
    source = (PACKAGE / (module.replace(".", "/") + ".py")).read_text()
    operators = [get_operator(f"core/{name}")() for name in STOCK] + [Rename(*pair) for pair in RENAMED] + [Transpose()]
    seen = {source}
    for operator in operators:
        counter = Occurrences(operator)
        counter.walk(get_ast(source))
        for occurrence in range(counter.count):
            mutated = Occurrences(operator, occurrence).walk(get_ast(source)).get_code()
            if mutated in seen:
                continue
            seen.add(mutated)
            lines = [line for line in difflib.ndiff(source.splitlines(), mutated.splitlines()) if line[:2] in ("- ", "+ ")]
            old, new = (" ".join(line[2:].strip() for line in lines if line[0] == sign) for sign in "-+")
            if "raise " in old or 'f"' in old:  # the words of an error
                continue
            yield Mutant(module, old, new, mutated)


class Replaced(importlib.abc.MetaPathFinder):
    """Gives one module of the package a source of its own."""

    def __init__(self, module: str, source: str):
        self.name, self.source = f"fewstep.{module}", source

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        source = self.source

        class Loader(importlib.machinery.SourceFileLoader):
            def get_code(self, fullname):
                return compile(source, self.path, "exec")

        return importlib.util.spec_from_loader(name, Loader(name, str(PACKAGE / (name.removeprefix("fewstep.").replace(".", "/") + ".py"))))


def tests_for(module: str) -> list[str]:
    first = MODULES[module]
    return [str(TESTS / name) for name in (*first, *(name for name in FAST if name not in first))]


def judge(module: str, source: str) -> None:
    """In a process of its own: exit with 0 when every fast test passes on this source."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    os.chdir(TESTS.parent)
    sys.path.insert(0, str(TESTS.parent))
    sys.meta_path.insert(0, Replaced(module, source))
    import pytest

    code = pytest.main(["-x", "-n0", "-p", "no:cacheprovider", "-p", "no:randomly", *tests_for(module)])
    os._exit(int(code))


def survivors(mutants: list[Mutant], jobs: int) -> Iterator[tuple[Mutant, str]]:
    """(mutant, how it ended) as they end: "killed", "time limit" or "survived"."""
    context = multiprocessing.get_context("fork")  # with torch, diffusers and pytest imported already
    waiting, running = list(reversed(mutants)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            process = context.Process(target=judge, args=(mutant.module, mutant.source))
            process.start()
            running[process] = (mutant, time.monotonic())
        for process, (mutant, began) in list(running.items()):
            if process.exitcode is not None:
                del running[process]
                yield mutant, "survived" if process.exitcode == 0 else "killed"
            elif time.monotonic() - began > TIME_LIMIT:
                process.kill()
                process.join()
                del running[process]
                yield mutant, "time limit"
        time.sleep(0.02)


# (module, the line as the mutant has it) -> why no test can tell it from the original
HARMLESS: dict[tuple[str, str], str] = {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", choices=[[], *MODULES], metavar="MODULE", help=f"of {', '.join(MODULES)}")
    parser.add_argument("-j", "--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    options = parser.parse_args()
    modules = options.modules or list(MODULES)
    mutants = [mutant for module in modules for mutant in mutants_of(module)]
    if options.list:
        for mutant in mutants:
            print(f"{mutant.module}\n  - {mutant.old}\n  + {mutant.new}")
        print(len(mutants), "mutants")
        return 0

    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch

    for found in pkgutil.walk_packages([str(PACKAGE)], "fewstep."):  # whatever the package imports is then imported once, here
        if found.name != "fewstep.__main__":
            importlib.import_module(found.name)
    for name in [name for name in sys.modules if name == "fewstep" or name.startswith("fewstep.")]:
        del sys.modules[name]
    torch.set_num_threads(1)
    untouched = [Mutant(module, "", "", (PACKAGE / (module.replace(".", "/") + ".py")).read_text()) for module in modules[:1]]
    began = time.monotonic()
    if [how for _, how in survivors(untouched, 1)] != ["survived"]:
        print("the fast tests fail on the code as it is: run `pytest` first")
        return 2
    print(f"{len(mutants)} mutants; the fast tests take {time.monotonic() - began:.0f} s on the code as it is", flush=True)

    ended: dict[str, dict[str, int]] = {module: {"killed": 0, "time limit": 0, "survived": 0} for module in modules}
    alive = []
    for count, (mutant, how) in enumerate(survivors(mutants, options.jobs), 1):
        ended[mutant.module][how] += 1
        if how == "survived":
            alive.append(mutant)
            print(f"{count}/{len(mutants)} alive: {mutant.module}: {mutant.new}", file=sys.stderr, flush=True)
        elif count % 20 == 0:
            print(f"{count}/{len(mutants)}", file=sys.stderr, flush=True)
    for module, counts in ended.items():
        print(f"{module}: " + ", ".join(f"{value} {how}" for how, value in counts.items()))
    unexplained = 0
    for mutant in sorted(alive):
        reason = HARMLESS.get((mutant.module, mutant.new))
        unexplained += reason is None
        print(f"\n{mutant.module}\n  - {mutant.old}\n  + {mutant.new}\n  {reason or 'NOT EXPLAINED'}")
    stale = {key for key in HARMLESS if key[0] in modules} - {(mutant.module, mutant.new) for mutant in alive}
    for module, new in sorted(stale):
        print(f"\nexplained but not alive any more: {module}: {new}")
    print(f"\n{len(alive)} of {len(mutants)} survive, {unexplained} of them without a reason")
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main())
