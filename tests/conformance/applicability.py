"""Tests of transformers that don't apply to a class, each with its reason.

They still run and have to fail: one that passes, or skips itself, is a failure, so that the lists stay honest.
"""

from __future__ import annotations

import contextlib
import unittest
from collections.abc import Callable
from fnmatch import fnmatch
from typing import ClassVar
from unittest import mock

MARK = "does not apply: "


class ListsWhatDoesNotApply:
    """For test classes: `does_not_apply` maps the name of a test, or a pattern of names, to the reason."""

    does_not_apply: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if not issubclass(cls, unittest.TestCase):
            return
        for pattern, reason in cls.does_not_apply.items():
            names = [name for name in dir(cls) if fnmatch(name, pattern)]
            if not names:
                raise AttributeError(f"{cls.__name__}.does_not_apply: no test is called {pattern!r}")
            for name in names:
                setattr(cls, name, expected_to_fail(getattr(cls, name), reason))


def expected_to_fail(test: Callable[..., None], reason: str) -> Callable[..., None]:
    def run(self: unittest.TestCase) -> None:
        try:
            with mock.patch.object(self, "subTest", contextlib.nullcontext):
                test(self)
        except unittest.SkipTest as skip:
            self.fail(f"skips itself ({skip}): take it off `does_not_apply`")
        except Exception:
            self.skipTest(MARK + reason)
        self.fail("passes: take it off `does_not_apply`")

    return run
