"""The list of files of a checkpoint, with their sizes and SHA-256, that it is verified by wherever it is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
CONFIG_FILES = re.compile(r"(config|generation_config|adapter_config)\.json")
PROCESSOR_FILES = re.compile(r"(pre)?processor_config\.json")
MODEL_FILES = re.compile(
    rf"{CONFIG_FILES.pattern}|(model|pytorch_model|adapter_model)[^/]*\.(safetensors|bin)(\.index\.json)?"
)
# Of what lies in a checkpoint, a resume may load these.
LOADED_FILES = re.compile(
    rf"{PROCESSOR_FILES.pattern}|{CONFIG_FILES.pattern}|trainer_state\.json|"
    r".*\.(safetensors|bin|pt|pth|pkl|distcp|index\.json)|(.*/)?\.metadata"
)


class DamagedCheckpoint(OSError):
    """Files of a checkpoint are not those that its manifest lists."""


def sha256(path: Path) -> str:
    """The digest of a file in hexadecimal digits, read block by block."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """File -> bytes and SHA-256.

    Raises:
        FileNotFoundError: there is none.
        ValueError, OSError: what is wrong with it.
    """
    path = folder / MANIFEST
    if path.exists() and not path.is_file():  # a pipe would keep us waiting
        raise ValueError("it is not a file")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError('it must hold {"files": {NAME: {"bytes": ..., "sha256": ...}}}')
    return {_checked_name(name): _checked_entry(name, entry) for name, entry in files.items()}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"{key!r} stands twice")
        content[key] = value
    return content


def _checked_name(name: str) -> str:
    parts = name.split("/")
    if "\\" in name or ":" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{name!r} is no file of the checkpoint")
    return name


def _checked_entry(name: str, entry: Any) -> tuple[int, str]:
    size, digest = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    if type(size) is not int or size < 0:
        raise ValueError(f"{name!r} has no number of bytes")
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"{name!r} has no SHA-256")
    return size, digest


def verify(folder: Path, contents: bool = True, only: re.Pattern[str] | None = None) -> str | None:
    """What is wrong with a checkpoint, None if it is whole.

    Args:
        folder: of the checkpoint.
        contents: False: files are not read, only measured.
        only: of the files these; None: all that are listed, and all that would be loaded though they are not.
    """
    try:
        files = _read_manifest(folder)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, OSError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    try:
        for name, (size, digest) in files.items():
            if only is not None and not only.fullmatch(name):
                continue
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if contents and sha256(path) != digest:
                return f"the bytes of {name} have changed since it was written"
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if name not in files and (only or LOADED_FILES).fullmatch(name) and path.is_file():
                return f"{name} is not in {MANIFEST}, but would be loaded"
    except (OSError, ValueError) as error:
        return f"it cannot be read ({error})"
    return None


def require_whole(
    path: str | os.PathLike[str] | None, only: re.Pattern[str] = MODEL_FILES, subfolder: str = ""
) -> None:
    """Before files of the folder `path` are loaded: they are those of its manifest, if it has one.

    Names on the Hub, and folders without a manifest, pass.

    Args:
        path: a folder, or a name on the Hub. None: nothing is loaded.
        only: the names of files that are looked at.
        subfolder: of `path`.

    Raises:
        DamagedCheckpoint: names the file.
    """
    if path is None or not os.path.lexists(Path(path, subfolder, MANIFEST)):
        return
    folder = Path(path, subfolder)
    problem = verify(folder, only=only)
    if problem is not None:
        raise DamagedCheckpoint(
            f"The checkpoint {folder} is damaged: {problem}. Use another one of this training; if the files were "
            f"changed on purpose, delete {MANIFEST}."
        )
