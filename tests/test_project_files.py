"""What stands in several files of the project agrees: versions, commands, names of files."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import maskcls_hf

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = ".github/workflows/checks.yml"
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def text(name: str) -> str:
    return (ROOT / name).read_text()


def lower_bounds() -> dict[str, str]:
    """Package -> its oldest version."""
    return dict(re.findall(r'^\s+"([\w-]+)>=([\d.]+)', text("pyproject.toml"), re.MULTILINE))


def jobs() -> dict[str, dict]:
    return yaml.safe_load(text(WORKFLOW))["jobs"]


def commands() -> list[str]:
    steps = [step for job in jobs().values() for step in job["steps"]]
    return [line for step in steps for line in step.get("run", "").splitlines()]


def test_the_version_is_one():
    version = maskcls_hf.__version__
    assert yaml.safe_load(text("CITATION.cff"))["version"] == version
    headings = re.findall(r"^## \[(.+?)\]", text("CHANGELOG.md"), re.MULTILINE)
    assert headings[:2] == ["Unreleased", version]
    assert all(f"\n[{heading}]: " in text("CHANGELOG.md") for heading in headings)


def test_the_oldest_versions_are_those_of_pyproject():
    bounds = lower_bounds()
    oldest = dict(re.findall(r"^([\w-]+)==([\d.]+)\.\*$", text(".ci/oldest.txt"), re.MULTILINE))
    assert {"torch", "torchvision", "transformers"} == set(oldest)
    assert oldest == {name: bounds[name] for name in oldest}


def test_every_job_ends_and_its_commands_are_there():
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    called = {match for line in commands() for match in re.findall(r"^make ([a-z]+)", line)}
    variants = jobs()["tests"]["strategy"]["matrix"]["include"]
    called |= {variant["target"] for variant in variants}
    assert {"lint", "typecheck", "test", "coverage", "docs", "wheel"} <= called
    assert called <= targets | {"docs"}
    assert all("timeout-minutes" in job for job in jobs().values())
    assert all((ROOT / variant["constraints"]).is_file() for variant in variants)
    assert {variant["python"] for variant in variants} == {"3.10", "3.13"}
    assert {variant["versions"] for variant in variants} == {"oldest", "pinned", "newest"}


def test_the_checks_of_a_change_are_those_of_the_workflow():
    called = re.findall(r"^make ([a-z]+)", text(".ci/run"), re.MULTILINE)
    assert called == ["lint", "typecheck", "coverage"]


def test_hooks_are_the_checks_of_make():
    hooks = [hook for repo in yaml.safe_load(text(".pre-commit-config.yaml"))["repos"] for hook in repo["hooks"]]
    modules = {re.search(r"-m (\w+)", hook["entry"])[1] for hook in hooks}
    assert modules == {"ruff", "mypy"}
    assert all(hook["language"] == "system" and hook["name"] for hook in hooks)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_issue_templates_have_what_github_asks_for(path):
    content = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert set(content) <= {"blank_issues_enabled", "contact_links"}
        return
    assert {"name", "description", "body"} <= set(content)
    ids = [field["id"] for field in content["body"] if field["type"] != "markdown"]
    assert len(ids) == len(set(ids)) > 0
    for field in content["body"]:
        assert field["type"] in ("markdown", "input", "textarea", "dropdown", "checkboxes")
        assert field["attributes"]["label"]
        assert field["type"] not in ("dropdown", "checkboxes") or field["attributes"]["options"]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "tests/data/README.md"])
def test_files_that_pages_name_are_there(page):
    """Links, and paths in `code` that begin in the repository or in the package."""
    content = text(page)
    folder = (ROOT / page).parent
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", content) if "://" not in link]
    assert all((folder / link).exists() for link in links), links
    named = re.findall(
        r"`((?:tests|model_cards|src|models|metrics|data|training|convert|inference)/[\w./*-]*)`", content
    )
    places = (ROOT, ROOT / "src" / "maskcls_hf")
    missing = [name for name in named if not any((place / name).exists() for place in places)]
    assert not missing
    assert links or named


def test_numbers_to_compare_with_stay_small():
    assert sum(path.stat().st_size for path in (ROOT / "tests" / "data").rglob("*") if path.is_file()) < 2e6


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("cffconvert", ["cffconvert", "--validate", "-i", "CITATION.cff"]),
        ("check_jsonschema", ["check_jsonschema", "--builtin-schema", "vendor.github-workflows", WORKFLOW]),
    ],
)
def test_by_the_published_schemas(module, command):
    """The workflow runs both; here where they are installed."""
    if find_spec(module) is None:
        pytest.skip(f"needs {module}")
    entry = "from cffconvert.cli.cli import cli as main" if module == "cffconvert" else f"from {module} import main"
    code = f"import sys; sys.argv = {command!r}; {entry}; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
