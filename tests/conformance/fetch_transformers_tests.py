"""Puts the common tests of the installed transformers release under .cache/, where conftest.py finds them.

transformers' wheel has no tests; its source distribution has, so that is what pip downloads here, once a version.
Only the Python files of its `tests/` folder are kept, as a package of their own name, and nothing is committed.
The modules which the source distribution leaves out but its tests import get empty stand-ins.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

VERSION = version("transformers")
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "transformers-tests" / VERSION
PACKAGE = "transformers_tests"

STAND_INS = {
    f"{PACKAGE}/__init__.py": "",
    f"{PACKAGE}/exporters/__init__.py": "",
    f"{PACKAGE}/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    f"{PACKAGE}/generation/__init__.py": "",
    f"{PACKAGE}/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    f"{PACKAGE}/utils/__init__.py": "",
    f"{PACKAGE}/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "fetch_hub_objects_for_ci.py": "def url_to_local_path(url):\n    return url\n",
}


def main() -> int:
    if CACHE.exists():
        return 0
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE.parent) as scratch:
        archive = download(Path(scratch))
        if archive is None:
            return 1
        unpacked = Path(scratch) / "unpacked"
        unpack(archive, unpacked)
        unpacked.rename(CACHE)
    return 0


def download(folder: Path) -> Path | None:
    """The source distribution, or None with a message that says what failed."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary", "transformers"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), f"transformers=={VERSION}"]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    archive = next(folder.glob("transformers-*.tar.gz"), None)
    if result.returncode == 0 and archive is not None:
        return archive
    print(f"The source distribution of transformers {VERSION} could not be downloaded:", file=sys.stderr)
    print(result.stderr.strip() or "pip found no .tar.gz file", file=sys.stderr)
    return None


def unpack(archive: Path, folder: Path) -> None:
    """`<name>/tests/**.py` of the archive as `folder/transformers_tests/`, and the stand-ins."""
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if member.isfile() and parts[1:2] == ("tests",) and ".." not in parts and member.name.endswith(".py"):
                target = folder.joinpath(PACKAGE, *parts[2:])
                target.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as source, target.open("wb") as copy:
                    shutil.copyfileobj(source, copy)
    for name, text in STAND_INS.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
