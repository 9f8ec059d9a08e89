"""What `make wheel` builds: a wheel with all of the package, which runs without the repository, and the same from the
source distribution."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "model_cards" / "maskcls-nuclei-tiny"


def run(*command: object, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and source distribution of a copy of the tree, and in `direct/` a wheel without the
    detour over the source distribution. In this environment: nothing is downloaded."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", tree / "src", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--outdir", folder / "dist", tree)
    run(*build, "--wheel", "--outdir", folder / "dist" / "direct", tree)
    return folder / "dist"


@pytest.fixture(scope="module")
def installed(built) -> Path:
    (wheel,) = built.glob("*.whl")
    target = built / "installed"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile")
    run(*pip, "--target", target, wheel)
    return target


def environment(installed: Path) -> dict[str, str]:
    """Nothing of the repository can be imported but what the wheel has brought."""
    return os.environ | {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}


def digests(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as file:
        return {name: hashlib.sha256(file.read(name)).hexdigest() for name in file.namelist()}


def test_the_wheel_has_every_file_of_the_package(built):
    (wheel,) = built.glob("*.whl")
    source = [path for path in (ROOT / "src").rglob("*") if path.is_file()]
    ours = {
        path.relative_to(ROOT / "src").as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in source
        if path.suffix != ".pyc" and ".egg-info" not in str(path)
    }
    packed = {name: digest for name, digest in digests(wheel).items() if ".dist-info/" not in name}
    assert packed == ours


def test_the_source_distribution_makes_the_same_wheel(built):
    (wheel,), (direct,) = built.glob("*.whl"), (built / "direct").glob("*.whl")
    assert len(list(built.glob("*.tar.gz"))) == 1
    assert wheel.name == direct.name
    assert digests(wheel) == digests(direct)


def test_the_command_says_what_it_can(installed, tmp_path):
    said = run(installed / "bin" / "maskcls", "--help", cwd=tmp_path, env=environment(installed))
    assert all(command in said for command in ("segment", "evaluate", "train", "push"))


def test_the_demo_runs(installed, tmp_path):
    """Its main job: the image of the repository, segmented with its checkpoint."""
    script = (
        "import sys, runpy, pathlib, maskcls_hf\n"
        "assert pathlib.Path(sys.argv[1]) in pathlib.Path(maskcls_hf.__file__).parents, maskcls_hf.__file__\n"
        "demo = runpy.run_path(sys.argv[2])\n"
        "demo['main'](pathlib.Path(sys.argv[3]), pathlib.Path(sys.argv[4]))\n"
    )
    paths = (installed, ROOT / "examples" / "demo.py", CHECKPOINT, tmp_path / "demo")
    said = run(sys.executable, "-c", script, *paths, cwd=tmp_path, env=environment(installed))
    assert "nucleus 86" in said
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {"overlay.png", "map.png", "segments.json"}
