"""The list of faults keeps up with the code; `python tests/mutations.py` says whether tests catch them."""

import pytest

from mutations import MUTATIONS, ROOT


@pytest.fixture(scope="module")
def source() -> str:
    return "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_has_one_place_in_the_code(name, source):
    assert source.count(MUTATIONS[name].old) == 1
