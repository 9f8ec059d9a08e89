"""Runs transformers' common tests on our classes; `make conformance` fetches them and calls pytest here."""

from __future__ import annotations

import os
import re
import sys
from collections import defaultdict

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test here needs the Hub

import pytest
import torch
from applicability import MARK
from fetch_transformers_tests import CACHE
from transformers import set_seed

OUTCOMES = ("passed", "skipped", "does not apply", "failed")

sys.path.insert(0, str(CACHE))
torch.set_num_threads(1)
results: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)  # class -> test -> outcome, reason


def pytest_configure(config: pytest.Config) -> None:
    if not CACHE.exists():
        raise pytest.UsageError(f"{CACHE} is missing: run  python tests/conformance/fetch_transformers_tests.py")


def pytest_runtest_setup() -> None:
    set_seed(0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.passed:
        return
    _, class_name, test = report.nodeid.split("::")
    tests = results[class_name]
    if report.failed:  # the test or one of its sub-tests
        tests[test] = ("failed", "")
    elif isinstance(report, pytest.SubtestReport) or test in tests:
        return
    elif report.passed:
        tests[test] = ("passed", "")
    else:
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        outcome = "does not apply" if reason.startswith(MARK) else "skipped"
        tests[test] = (outcome, reason.removeprefix(MARK))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    write = terminalreporter.write_line
    terminalreporter.section("conformance with transformers: its own MaskFormer, then our classes")
    classes = sorted(results, key=lambda name: (not name.startswith("MaskFormer"), name))
    width = max(map(len, classes), default=0)
    write(" " * width + "".join(f"{outcome:>16}" for outcome in OUTCOMES))
    for name in classes:
        counts = [sum(found == outcome for found, _ in results[name].values()) for outcome in OUTCOMES]
        write(f"{name:{width}}" + "".join(f"{count:>16}" for count in counts))
    for outcome, title in (
        ("does not apply", "Do not apply"),
        ("skipped", "Skipped by transformers' tests themselves"),
    ):
        write(f"\n{title}:")
        for (test, reason), where in sorted(grouped(outcome).items()):
            everywhere = where == {name for name in results if test in map(base_name, results[name])}
            write(f"  {test}: {reason}" + ("" if everywhere else f" [{', '.join(sorted(where))}]"))


def grouped(outcome: str) -> dict[tuple[str, str], set[str]]:
    """(test, reason) -> classes."""
    groups: dict[tuple[str, str], set[str]] = defaultdict(set)
    for class_name, tests in results.items():
        for test, (found, reason) in tests.items():
            if found == outcome:
                groups[base_name(test), reason.replace("\n", " ")].add(class_name)
    return groups


def base_name(test: str) -> str:
    """The variants of a parameterised test, name_0_.., name_1_.., count as one."""
    return re.sub(r"(?<!flash_attn)_\d+(_.*)?$", "", test)
