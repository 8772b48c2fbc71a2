"""Mutants of the library's mathematics: `python tests/mutants.py` makes them, runs the fast tests on each and lists the survivors.

cosmic-ray finds the places and makes the replacements (arithmetic, comparisons, numbers, booleans, decorators, loops); `Rename` and
`Transpose` below add those of this field: teacher for fake, alpha for sigma, sum for mean, a stop-gradient dropped, arguments exchanged.
Before the first of them every test runs on the code as it is, to see which functions it enters and how long it takes: a mutant is
put to the tests that enter the function it is in, the quickest first. It is killed when one fails or when the code no longer imports.
One that uses far more processor time than those tests need, or takes the process down, is named in the listing: a busy machine does
neither. A survivor must be in HARMLESS with the reason why no test could tell it from the original; one that is not there makes this
exit with 1, and so does a reason whose mutant is killed or is none.

    python tests/mutants.py                   all modules, two at a time
    python tests/mutants.py importance -j 1   one module
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import pkgutil
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import parso
import pytest
from cosmic_ray.ast import Visitor, get_ast
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "fewstep"

MODULES = ("transforms", "importance", "losses", "student", "levels", "rewards.distribution", "weights")
FAST = (
    "test_pure.py", "test_transforms.py", "test_importance.py", "test_policy.py", "test_student.py", "test_distribution.py",
    "test_weights.py", "test_denoiser.py", "test_rewards.py", "test_tilt.py",
)  # fmt: skip

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
    line: int  # counted from 1
    old: str  # the line as it is
    new: str  # the line as it becomes
    source: str


class Occurrences(Visitor):
    """How often an operator applies outside of declarations, or the source with its n-th application."""

    def __init__(self, operator: Operator, occurrence: int = -1):
        self.operator, self.occurrence, self.count = operator, occurrence, 0

    def visit(self, node):
        for index, _ in enumerate(self.operator.mutation_positions(node)):
            if in_declaration(node):
                return node
            if self.count == self.occurrence:
                node = self.operator.mutate(node, index)
            self.count += 1
        return node


def path_of(module: str) -> Path:
    return PACKAGE / (module.replace(".", "/") + ".py")


def changed(source: str, mutated: str) -> tuple[int, str, str]:
    """(the first line's number, the lines as they were, as they are); for lines that are gone, what they stood before."""
    before, after = source.splitlines(), mutated.splitlines()
    start = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after)))
    end = next((i for i, (a, b) in enumerate(zip(before[::-1], after[::-1], strict=False)) if a != b), 0)
    end = min(end, len(before) - start, len(after) - start)
    old, new = (" ".join(line.strip() for line in lines[start : len(lines) - end]) for lines in (before, after))
    return start + 1, old, new or f"(nothing) {after[start].strip()}"


def mutants_of(module: str) -> Iterator[Mutant]:
    """Every mutant of a module whose source differs from it and from the mutants before."""
    source = path_of(module).read_text()
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
            line, old, new = changed(source, mutated)
            if "raise " in old or 'f"' in old:  # the words of an error
                continue
            yield Mutant(module, line, old, new, mutated)


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

        return importlib.util.spec_from_loader(name, Loader(name, str(path_of(name.removeprefix("fewstep.")))))


class Seen(NamedTuple):
    """What a test does on the code as it is."""

    seconds: float
    entered: dict[str, list[int]]  # file of the package -> the first lines of the functions that ran


class Watch:
    """Notes which functions of the package each test enters. Those that run while it is imported or while a fixture that tests share
    is made are entered by every test."""

    def __init__(self):
        self.always: dict[str, set[int]] = {}
        self.now, self.seen = self.always, {}
        sys.settrace(self.enter)

    def enter(self, frame, event, argument):
        code = frame.f_code
        if code.co_filename.startswith(str(PACKAGE)):
            self.now.setdefault(code.co_filename, set()).add(code.co_firstlineno)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        before, self.now = self.now, self.now if fixturedef.scope == "function" else self.always
        try:
            return (yield)
        finally:
            self.now = before

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.now, began = {}, time.process_time()
        try:
            return (yield)
        finally:
            self.seen[item.nodeid] = time.process_time() - began, self.now
            self.now = self.always

    def result(self) -> dict[str, Seen]:
        def entered(own):
            return {file: sorted(own.get(file, set()) | self.always.get(file, set())) for file in {*own, *self.always}}

        return {name: Seen(seconds, entered(own)) for name, (seconds, own) in self.seen.items()}


class Chosen:
    """Runs these tests alone, in this order."""

    def __init__(self, names: list[str]):
        self.names = names

    def pytest_collection_modifyitems(self, items):
        by_name = {item.nodeid: item for item in items}
        items[:] = [by_name[name] for name in self.names if name in by_name]  # one that is not collected is an error of its own


def function_at(module: str, line: int) -> range:
    """The lines of the outermost function around a line, or of the whole module where there is none."""
    tree = ast.parse(path_of(module).read_text())
    bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef))]
    for node in itertools.chain(*bodies):
        if isinstance(node, ast.FunctionDef):
            lines = range(min(part.lineno for part in (node, *node.decorator_list)), node.end_lineno + 1)
            if line in lines:
                return lines
    return range(len(path_of(module).read_text().splitlines()) + 1)


def tests_for(mutant: Mutant, seen: dict[str, Seen]) -> list[str]:
    """The tests that enter the function that a mutant is in, the quickest first."""
    lines, file = function_at(mutant.module, mutant.line), str(path_of(mutant.module))
    found = [name for name, test in seen.items() if any(first in lines for first in test.entered.get(file, ()))]
    return sorted(found, key=lambda name: seen[name].seconds)


def run_tests(files: list[str], plugin) -> int:
    """pytest's exit code for these test files, in a process of its own."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    os.chdir(TESTS.parent)
    sys.path.insert(0, str(TESTS.parent))
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # pytest-timeout among them, whose limit is of the clock
    options = ["-x", "-o", "addopts=", "--assert=plain", "-p", "no:cacheprovider"]  # nobody reads why a test fails
    return int(pytest.main([*options, *files], plugins=[plugin]))


def watch(file: str) -> None:
    """In a process of its own: write what each fast test does on the code as it is, exit with 0 when all of them pass."""
    plugin = Watch()
    code = run_tests([str(TESTS / name) for name in FAST], plugin)
    sys.settrace(None)
    Path(file).write_text(json.dumps(plugin.result()))
    os._exit(code)


def judge(mutant: Mutant, names: list[str], limit: float) -> None:
    """In a process of its own: exit with 0 when these tests pass on the mutant; after `limit` seconds of a processor SIGXCPU ends it."""
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), resource.RLIM_INFINITY))
    sys.meta_path.insert(0, Replaced(mutant.module, mutant.source))
    os._exit(run_tests(list(dict.fromkeys(name.partition("::")[0] for name in names)), Chosen(names)))


def observed(context) -> dict[str, Seen] | None:
    """Test -> what it does on the code as it is; None when one fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "seen.json"
        process = context.Process(target=watch, args=(str(file),))
        process.start()
        process.join()
        return {name: Seen(*value) for name, value in json.loads(file.read_text()).items()} if process.exitcode == 0 else None


ENDS = {0: "survived", 1: "killed", 2: "killed", -signal.SIGXCPU: "time limit"}  # by exit code; pytest's 2: it does not import


def ends(mutants: list[Mutant], seen: dict[str, Seen], jobs: int, context) -> Iterator[tuple[Mutant, str]]:
    """(mutant, how it ended) as they end: "killed", "time limit", "crashed" or "survived"."""
    waiting, running = list(reversed(mutants)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            names = tests_for(mutant, seen)
            if not names:
                yield mutant, "survived"
                continue
            limit = 30 + 5 * sum(seen[name].seconds for name in names)
            process = context.Process(target=judge, args=(mutant, names, limit))
            process.start()
            running[process] = mutant
        for process, mutant in list(running.items()):
            if process.exitcode is not None:
                del running[process]
                yield mutant, ENDS.get(process.exitcode, "crashed")
        time.sleep(0.02)


# (module, the line as the mutant has it) -> why no test can tell it from the original
ONE_DIMENSION = "the tensor has one dimension: -1 is 0"
SAME_SIZE = "both have the same shape, type and device, and only those are asked"
OVERWRITTEN = "set before it is read"
AT_EQUALITY = "differs only where two computed numbers are exactly equal, and both answers are right there"
HARMLESS: dict[tuple[str, str], str] = {
    ("losses", "if log_prob.ndim != 2 or log_prob.shape != old_log_prob.shape or advantage.shape != old_log_prob.shape[:1]:"):
        "the shapes are equal by the condition before",
    ("losses", "if old_log_prob.ndim != 2 or log_prob.shape != old_log_prob.shape or advantage.shape != log_prob.shape[:1]:"):
        "the shapes are equal by the condition after",
    ("losses", "if old_log_prob.shape[1] == 0:"): SAME_SIZE,
    ("losses", "a = advantage[known].detach()[:, None].to(old_log_prob)"): SAME_SIZE,
    ("losses", "bound = torch.where(a >= 0, 1 + clip, 1 - clip)"): "an advantage of 0 multiplies either bound away",
    ("losses", "return ~torch.where(advantage >= 0, ratio > 1 + clip, ratio < 1 - clip)"): "an advantage of 0 has no force: which bound holds it back is arbitrary",
    ("losses", "return ~torch.where(advantage > 0, ratio >= 1 + clip, ratio < 1 - clip)"): AT_EQUALITY,
    ("losses", "return ~torch.where(advantage > 0, ratio > 1 + clip, ratio <= 1 - clip)"): AT_EQUALITY,
    ("losses", "ratio = torch.where(inside, log_ratio, torch.ones_like(log_ratio)).exp()"): "any finite number will do where it is not chosen",
    ("losses", "ratio = log_ratio.clone().exp()"): "only compared: no gradient passes a comparison",
    ("losses", "log_ratio = (log_prob - old_log_prob).clone()[known]"): "the result is a float: no gradient passes",
    ("losses", "return 0 * log_prob.mean()"): "0 either way, and so is its gradient",
    **{
        ("importance", line): "bisected to the last bit either way"
        for line in (
            "low, high = (middle, high) if expected_sample_size(middle**2 * move) > min_ess else (low, middle)",
            "for _ in range( 61):", "for _ in range( 59):", "return 1 + high",
        )
    },
    ("student", "dimensions = x0[ -1].numel()"): "every row has as many elements",
    ("student", "t = self.t(k + 1, len(noise), x0.device)"): SAME_SIZE,
    ("student", "t = self.t(k + 1, len(x0), noise.device)"): SAME_SIZE,
    ("transforms", "count = torch.zeros_like(largest).index_add_( -1, index, rows).clamp(min=1)"): ONE_DIMENSION,
    ("transforms", "count.index_add_( -1, index, valid.to(score))"): ONE_DIMENSION,
    ("transforms", "largest = torch.zeros(groups, dtype=flat.dtype, device=flat.device).scatter_reduce_( -1, index, flat.abs().amax(1), \"amax\")"):
        ONE_DIMENSION,
    ("transforms", "largest = torch.zeros(groups, dtype=score.dtype, device=score.device).scatter_reduce( -1, index[valid], score[valid].abs(), \"amax\")"): ONE_DIMENSION,
    ("transforms", "scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 2)"): "another power of two, which rounds nothing",
    ("transforms", "mean = total.index_add_( -1, index, above) / count"): ONE_DIMENSION,
    ("transforms", "square = torch.zeros_like(largest).index_add_( -1, index, relative.pow(2).mean(1))"): ONE_DIMENSION,
    ("transforms", "wide = (square.index_add_( -1, index, centred**2) / count).sqrt() + eps / scale"): ONE_DIMENSION,
    ("transforms", "count.clamp_(min= 0)"): "a group without a valid score gives NaN to all its members anyway",
    ("transforms", "count.clamp_(min= 2)"): "a group with one valid score gives 0 whatever it is divided by",
    ("transforms", "groups = int(index.max()) + 2"): "one group more, empty and never read",
    ("transforms", "rows = torch.ones_like(flat[:, -1]) if valid is None else valid.to(flat)"): "every column is as long",
    ("levels", "start = torch.cumsum(count, -1) - count"): ONE_DIMENSION,
    ("levels", "\"uniform\": Density( lambda u: u,lambda t: t, torch.ones_like),"): "both are the identity",
    ("rewards.distribution", "grid = torch.linspace(*t_range, 4096, dtype=torch.float64)"): "the integral's error is 1e-7 either way",
    ("rewards.distribution", "grid = torch.linspace(*t_range, 4098, dtype=torch.float64)"): "the integral's error is 1e-7 either way",
    ("rewards.distribution", "noise = torch.randn_like(old.x0)"): SAME_SIZE,
    ("rewards.distribution", "t = self.noise_levels(torch.ones_like(new.group), \"stratified\")"): "one group under another name",
    ("rewards.distribution", "t = self.noise_levels(torch.zeros_like(old.group), \"stratified\")"): SAME_SIZE,
    ("rewards.distribution", "return scale_direction(difference, magnitude, torch.ones_like(group), leave_one_out=self.leave_one_out)"):
        "one group under another name",
    ("rewards.distribution", "t = self.noise_levels(torch.ones_like(sample.group), \"stratified\")[torch.randperm(len(sample.group))]"):
        "one group under another name",
    ("rewards.distribution", "(nothing) def lag(self, new: Sample, old: Sample, *, kl: bool = False) -> Lag:"):
        "what comes back are floats: without no_grad it only costs memory",
    ("rewards.distribution", "(nothing) def known(self, sample: Sample, xt: Tensor, t: Tensor, noise: Tensor, *, teacher: Tensor | None) -> tuple[float, float | None]:"):
        "what comes back are floats: without no_grad it only costs memory",
    ("rewards.distribution", "loss = float(denoising( target(sample.x0, noise, alpha, sigma, kind),prediction))"):
        "the squared error is symmetric, and no gradient is taken",
    ("weights", "return min( math.log(cap),log_weight + eta * min(max(1 - kl / budget, -1.0), 1.0))"): "min is symmetric",
    ("weights", "return min(log_weight + eta * min( 1.0,max(1 - kl / budget, -1.0)), math.log(cap))"): "min is symmetric",
    ("weights", "return min(log_weight + eta * min(max( -1.0,1 - kl / budget), 1.0), math.log(cap))"): "max is symmetric",
    ("weights", "return max( 1 / (count + 1),1 - decay)"): "max is symmetric",
    ("weights", "log_weight: float = field(default= 1.0, init=False)"): OVERWRITTEN,
    ("weights", "log_weight: float = field(default= -1.0, init=False)"): OVERWRITTEN,
    ("weights", "integral: float = field(default= 1.0, init=False)  # the log weight without its lead: the sum of the errors"): OVERWRITTEN,
    ("weights", "integral: float = field(default= -1.0, init=False)  # the log weight without its lead: the sum of the errors"): OVERWRITTEN,
    ("weights", "if not self.told and self.log_weight <= least:"): AT_EQUALITY,
    ("weights", "integral = max( least,dual_step(self.integral, kl, self.b, eta=self.eta, cap=self.cap))"): "max is symmetric",
    ("weights", "if self.outgrown.observe(kl <= OUTGROWN * self.b / self.budget):"): AT_EQUALITY,
    ("weights", "if following <= self.log_weight or known_lag <= self.lag_limit * self.b:"): "nothing changes when the two are equal",
    ("weights", "if following < self.log_weight or known_lag < self.lag_limit * self.b:"): AT_EQUALITY,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", choices=[[], *MODULES], metavar="MODULE", help=f"of {', '.join(MODULES)}")
    parser.add_argument("-j", "--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    options = parser.parse_args()
    modules = options.modules or list(MODULES)
    mutants = [mutant for module in modules for mutant in mutants_of(module)]
    unknown = {key for key in HARMLESS if key[0] in modules} - {(mutant.module, mutant.new) for mutant in mutants}
    for module, new in sorted(unknown):
        print(f"explained but no mutant: {module}: {new}")
    if options.list:
        for mutant in mutants:
            print(f"{mutant.module}:{mutant.line}\n  - {mutant.old}\n  + {mutant.new}")
        print(len(mutants), "mutants")
        return int(bool(unknown))
    mutants.sort(key=lambda mutant: (mutant.module, mutant.new) in HARMLESS)  # what is not known yet first

    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    import hypothesis  # noqa: F401
    import torch

    for found in pkgutil.walk_packages([str(PACKAGE)], "fewstep."):  # whatever the package imports is then imported once, here
        if found.name != "fewstep.__main__":
            importlib.import_module(found.name)
    for name in [name for name in sys.modules if name == "fewstep" or name.startswith("fewstep.")]:
        del sys.modules[name]
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what all share: pytest collects garbage at its end, and no process is to go through torch for that
    context = multiprocessing.get_context("fork")  # with torch, diffusers and pytest imported already
    seen = observed(context)
    if seen is None:
        print("the fast tests fail on the code as it is: run `pytest` first")
        return 2
    seconds = sum(test.seconds for test in seen.values())
    print(f"{len(mutants)} mutants; {len(seen)} fast tests take {seconds:.0f} s on the code as it is", flush=True)

    ended = {module: Counter() for module in modules}
    alive, odd = [], []
    for count, (mutant, how) in enumerate(ends(mutants, seen, options.jobs, context), 1):
        ended[mutant.module][how] += 1
        if how == "survived":
            alive.append(mutant)
        elif how != "killed":
            odd.append((mutant, how))
        if how != "killed":
            print(f"{count}/{len(mutants)} {how}: {mutant.module}:{mutant.line}: {mutant.new}", file=sys.stderr, flush=True)
        elif count % 20 == 0:
            print(f"{count}/{len(mutants)}", file=sys.stderr, flush=True)
    for module, counts in ended.items():
        print(f"{module}: " + ", ".join(f"{value} {how}" for how, value in sorted(counts.items())))
    for mutant, how in odd:
        print(f"\n{mutant.module}:{mutant.line}\n  - {mutant.old}\n  + {mutant.new}\n  {how}")
    unexplained = 0
    for mutant in sorted(alive):
        reason = HARMLESS.get((mutant.module, mutant.new))
        unexplained += reason is None
        print(f"\n{mutant.module}:{mutant.line}\n  - {mutant.old}\n  + {mutant.new}\n  {reason or 'NOT EXPLAINED'}")
    stale = {key for key in HARMLESS if key[0] in modules} - {(mutant.module, mutant.new) for mutant in alive}
    for module, new in sorted(stale):
        print(f"\nexplained but not alive: {module}: {new}")
    print(f"\n{len(alive)} of {len(mutants)} survive, {unexplained} of them without a reason; {len(stale)} reasons without a survivor")
    return int(unexplained > 0 or bool(stale))


if __name__ == "__main__":
    sys.exit(main())
