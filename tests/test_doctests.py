"""The examples in docstrings give what they say."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import maskcls_hf

PACKAGE = Path(maskcls_hf.__file__).parent
FILES = [file.relative_to(PACKAGE.parent) for file in sorted(PACKAGE.rglob("*.py")) if ">>> " in file.read_text()]
# Examples of `evaluate.load`, which tests/test_evaluate_modules.py runs.
MODULES = [".".join(file.with_suffix("").parts) for file in FILES if "modules" not in file.parts]


@pytest.mark.parametrize("name", [name.removesuffix(".__init__") for name in MODULES])
def test_examples(name):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, tried = doctest.testmod(import_module(name), optionflags=flags)
    assert failed == 0 and tried > 0
