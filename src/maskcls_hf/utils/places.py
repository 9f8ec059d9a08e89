"""Places of data and models that can be told to be wrong without looking into them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def require_folder(path: Path, kind: str, available: Iterable[str] | None = None) -> None:
    """Raise `FileNotFoundError`, as [`no_folder`], for what is no folder.

    Args:
        path: where it should be.
        kind: what it is, for the message.
        available: names of folders that there are.
    """
    if not path.is_dir():
        raise no_folder(path, kind, available)


def no_folder(path: Path, kind: str, available: Iterable[str] | None = None) -> FileNotFoundError:
    """The error for a folder that is not there.

    Args:
        path: where it should be.
        kind: what it is, for the message.
        available: names of folders that there are, which the message lists. None: it lists none.
    """
    hint = f" There are: {', '.join(sorted(available)) or 'none'}." if available is not None else ""
    return FileNotFoundError(f"No {kind} folder {path}.{hint}")


def require_model_place(name: str | os.PathLike[str]) -> None:
    """ValueError for what is neither a folder nor a possible name on the Hub."""
    text = os.fspath(name)
    if os.path.isdir(text):
        return
    if os.path.exists(text):
        raise ValueError(f"{text} is a file: give the folder of a saved model, or a name on the Hub.")
    from huggingface_hub.utils import HFValidationError, validate_repo_id  # 0.1 s, which help need not wait for

    try:
        validate_repo_id(text)
        is_path = not isinstance(name, str) or text.startswith((".", "~")) or os.path.isabs(text)
    except HFValidationError:
        is_path = True
    if is_path:
        raise ValueError(
            f"{text} is neither the folder of a saved model nor a model on the Hub (there is no such folder)."
        )
