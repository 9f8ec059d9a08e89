"""What a package says of itself: its version, and that it has types."""

from importlib.resources import files
from pathlib import Path

from setuptools.config.pyprojecttoml import read_configuration

import maskcls_hf

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def test_the_version_stands_in_one_place():
    project = read_configuration(PYPROJECT)["project"]
    assert "version" in project["dynamic"]
    assert project["version"] == maskcls_hf.__version__


def test_type_checkers_are_told_that_there_are_types():
    assert files("maskcls_hf").joinpath("py.typed").is_file()
    data = read_configuration(PYPROJECT, expand=False)["tool"]["setuptools"]["package-data"]
    assert "py.typed" in data["maskcls_hf"]
