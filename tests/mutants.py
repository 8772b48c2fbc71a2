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
    "levels": ("test_distribution.py",),
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


def changed(source: str, mutated: str) -> tuple[str, str]:
    """The lines as they were and as they are; for lines that are gone, what they stood before."""
    before, after = source.splitlines(), mutated.splitlines()
    start = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after)))
    end = next((i for i, (a, b) in enumerate(zip(before[::-1], after[::-1], strict=False)) if a != b), 0)
    end = min(end, len(before) - start, len(after) - start)
    old, new = (" ".join(line.strip() for line in lines[start : len(lines) - end]) for lines in (before, after))
    return old, new or f"(nothing) {after[start].strip()}"


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
            old, new = changed(source, mutated)
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
ONE_DIMENSION = "the tensor has one dimension: -1 is 0"
SAME_SIZE = "both have the same shape, type and device, and only those are asked"
OVERWRITTEN = "set before it is read"
AT_EQUALITY = "differs only where two computed numbers are exactly equal, and both answers are right there"
HARMLESS: dict[tuple[str, str], str] = {
    ("losses", "if log_prob.ndim != 2 or log_prob.shape != old_log_prob.shape or advantage.shape != old_log_prob.shape[:1]:"):
        "the shapes are equal by the condition before",
    ("losses", "if old_log_prob.ndim != 2 or log_prob.shape != old_log_prob.shape or advantage.shape != log_prob.shape[:1]:"):
        "the shapes are equal by the condition after",
    ("losses", "a = advantage[known].detach()[:, None].to(old_log_prob)"): SAME_SIZE,
    ("losses", "bound = torch.where(a >= 0, 1 + clip, 1 - clip)"): "an advantage of 0 multiplies either bound away",
    ("losses", "return torch.where(advantage >= 0, ratio <= 1 + clip, ratio >= 1 - clip)"): "an advantage of 0 has no force either way",
    ("losses", "return torch.where(advantage > 0, ratio < 1 + clip, ratio >= 1 - clip)"): AT_EQUALITY,
    ("losses", "return torch.where(advantage > 0, ratio <= 1 + clip, ratio > 1 - clip)"): AT_EQUALITY,
    ("losses", "ratio = torch.where(inside, log_ratio, torch.ones_like(log_ratio)).exp()"): "any finite number will do where it is not chosen",
    ("losses", "ratio = log_ratio.clone().exp()"): "only compared: no gradient passes a comparison",
    ("losses", "log_ratio = (log_prob - old_log_prob).clone()[known]"): "the result is a float: no gradient passes",
    ("losses", "return 0 * log_prob.mean()"): "0 either way, and so is its gradient",
    ("losses", "return 0 / log_prob.sum()"): "0 either way, and so is its gradient",
    **{
        ("importance", line): "bisected to the last bit either way"
        for line in (
            "low, high = (middle, high) if expected_sample_size(middle**2 * move) > min_ess else (low, middle)",
            "for _ in range( 61):", "for _ in range( 59):", "return 1 + high",
        )
    },
    ("student", "dimensions = x0[ -1].numel()"): "every row has as many elements",
    ("student", "return bcast(self.schedule.alpha(t), noise) * x0 + bcast(self.schedule.sigma(t), x0) * noise"): SAME_SIZE,
    ("student", "return bcast(self.schedule.alpha(t), x0) * x0 + bcast(self.schedule.sigma(t), noise) * noise"): SAME_SIZE,
    ("student", "t = self.t(k + 1, len(noise), x0.device)"): SAME_SIZE,
    ("student", "t = self.t(k + 1, len(x0), noise.device)"): SAME_SIZE,
    ("transforms", "count = torch.zeros_like(largest).index_add_( -1, index, rows).clamp(min=1)"): ONE_DIMENSION,
    ("transforms", "count.index_add_( -1, index, valid.to(score))"): ONE_DIMENSION,
    ("transforms", "largest = torch.zeros(groups, dtype=flat.dtype, device=flat.device).scatter_reduce_( -1, index, flat.abs().amax(1), \"amax\")"):
        ONE_DIMENSION,
    ("transforms", "low = low.scatter_reduce( -1, index[valid], score[valid], \"amin\")"): ONE_DIMENSION,
    ("transforms", "mean = total.index_add_( -1, index, above) / count"): ONE_DIMENSION,
    ("transforms", "square = torch.zeros_like(largest).index_add_( -1, index, relative.pow(2).mean(1))"): ONE_DIMENSION,
    ("transforms", "std = (square.index_add_( -1, index, centred**2) / count).sqrt()"): ONE_DIMENSION,
    ("transforms", "count.clamp_(min= 0)"): "a group without a valid score gives NaN to all its members anyway",
    ("transforms", "count.clamp_(min= 2)"): "a group with one valid score gives 0 whatever it is divided by",
    ("transforms", "groups = int(index.max()) + 2"): "one group more, empty and never read",
    ("transforms", "rows = torch.ones_like(flat[:, -1]) if valid is None else valid.to(flat)"): "every column is as long",
    ("transforms", "rows = torch.ones_like(flat[:, 1]) if valid is None else valid.to(flat)"): "every column is as long",
    **{
        ("levels", f"place, peers = rank_in_group({key}, shuffle=True)  # among those with the same stratum"):
            "another key that no two pairs of size and rank share"
        for key in (
            "size * (len(group) - 1) + rank", "size * (len(group) + 0) + rank", "size * (len(group) + 2) + rank",
            "size * (len(group) + 1) - rank", "size / (len(group) + 1) + rank",
        )
    },
    ("levels", "order = order[torch.argsort(group[order], stable=False)]"): "which member has which stratum is arbitrary",
    ("levels", "start = torch.cumsum(count, -1) - count"): ONE_DIMENSION,
    ("rewards.distribution", "grid = torch.linspace(*self.t_range, 4096, dtype=torch.float64)"): "the integral's error is 1e-7 either way",
    ("rewards.distribution", "grid = torch.linspace(*self.t_range, 4098, dtype=torch.float64)"): "the integral's error is 1e-7 either way",
    ("rewards.distribution", "noise = torch.randn_like(old.x0)"): SAME_SIZE,
    ("rewards.distribution", "t = self.noise_levels(torch.ones_like(new.group), \"stratified\")"): "one group under another name",
    ("rewards.distribution", "t = self.noise_levels(torch.zeros_like(old.group), \"stratified\")"): SAME_SIZE,
    ("rewards.distribution", "return bcast(self.schedule.alpha(t), noise) * x0 + bcast(self.schedule.sigma(t), x0) * noise"): SAME_SIZE,
    ("rewards.distribution", "return bcast(self.schedule.alpha(t), x0) * x0 + bcast(self.schedule.sigma(t), noise) * noise"): SAME_SIZE,
    ("rewards.distribution", "return scale_direction(difference, magnitude, torch.ones_like(group), leave_one_out=self.leave_one_out)"):
        "one group under another name",
    ("rewards.distribution", "t = self.noise_levels(torch.ones_like(sample.group), \"stratified\")[torch.randperm(len(sample.group))]"):
        "one group under another name",
    ("rewards.distribution", "(nothing) def lag(self, new: Sample, old: Sample, *, kl: bool = False) -> Lag:"):
        "what comes back are floats: without no_grad it only costs memory",
    ("rewards.distribution", "(nothing) def known(self, sample: Sample, xt: Tensor, t: Tensor, noise: Tensor, *, teacher: Tensor | None) -> tuple[float, float | None]:"):
        "what comes back are floats: without no_grad it only costs memory",
    ("rewards.distribution", "loss = float(denoising( target(sample.x0, noise, alpha, sigma, self.fake.prediction),prediction))"):
        "the squared error is symmetric, and no gradient is taken",
    ("weights", "return min( math.log(cap),log_weight + eta * min(max(1 - kl / budget, -1.0), 1.0))"): "min is symmetric",
    ("weights", "return min(log_weight + eta * min( 1.0,max(1 - kl / budget, -1.0)), math.log(cap))"): "min is symmetric",
    ("weights", "return min(log_weight + eta * min(max( -1.0,1 - kl / budget), 1.0), math.log(cap))"): "max is symmetric",
    ("weights", "return max( 1 / (count + 1),1 - decay)"): "max is symmetric",
    ("weights", "log_weight: float = field(default= 1.0, init=False)"): OVERWRITTEN,
    ("weights", "log_weight: float = field(default= -1.0, init=False)"): OVERWRITTEN,
    ("weights", "integral: float = field(default= 1.0, init=False)  # the log weight without its lead: the sum of the errors"): OVERWRITTEN,
    ("weights", "integral: float = field(default= -1.0, init=False)  # the log weight without its lead: the sum of the errors"): OVERWRITTEN,
    ("weights", "if not self.told and self.log_weight <= math.log(self.start) - UNREACHED:"): AT_EQUALITY,
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
