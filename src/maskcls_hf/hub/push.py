"""Publishing a model: the files that belong to it, checked, with a model card; to the Hub or to a local folder."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..inference.loading import load_image_processor, load_model
from ..utils.writing import write_text, written
from .card_options import CardOptions
from .model_card import CARD, GENERATED, read_scores, write_model_card
from .saved_model import SavedModel

PICTURES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".svg", ".webp")
PICTURE_LINK = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")


class NotLoggedIn(OSError):
    """There is no token for the Hub."""


def push(
    folder: str | Path,
    repo_id: str,
    card: CardOptions | None = None,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
    new_card: bool = False,
) -> CommitInfo:
    """Upload a saved model to the Hub, with its card; see [`stage`] for what is uploaded.

    Args:
        folder: of the saved model.
        revision: branch of the repository. None: its main one.
        commit_message: in the repository.
        repo_id: `owner/name`; made if need be.
        card: what the card says beside what the folder knows.
        private: of a repository that is made.
        token: None: the one of this machine.
        new_card: write the card anew where the folder has one that was not generated.

    Returns:
        the commit.

    Raises:
        FileNotFoundError, ValueError: as [`stage`].
        NotLoggedIn: no token.
        OSError: the Hub refuses, or cannot be reached.
    """
    check_repo_id(repo_id)
    check_token(token)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="maskcls-push-") as staged:
        stage(folder, staged, repo_id, card, new_card=new_card)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(repo_id=repo_id, folder_path=staged, commit_message=commit_message, revision=revision)


def stage(
    folder: str | Path, out: str | Path, repo_id: str, card: CardOptions | None = None, *, new_card: bool = False
) -> list[str]:
    """Copy into `out` exactly what [`push`] uploads: configuration, weights, image processor, the code that they need
    where this package is not installed, card, its pictures, and the recipe.

    Model and image processor are loaded and saved anew, so that what is published loads. Of the folder the model in
    it counts, not its checkpoints. A card that was not generated is kept, with the pictures that it shows.

    Args:
        folder: of the saved model.
        out: empty, or not there yet.
        repo_id: `owner/name`, which the card names.
        card: what the card says beside what the folder knows.
        new_card: write the card anew where the folder has one that was not generated.

    Returns:
        names of the files. With `card.without_weights` these are the card, its pictures and the recipe alone.

    Raises:
        FileNotFoundError: there is no model, no weights, no image processor, or a picture of the card is missing.
        FileExistsError: `out` has files.
        ValueError: weights are missing or NaN, scores are NaN, a name is not allowed on the Hub.
    """
    check_repo_id(repo_id)
    saved, folder, out = SavedModel(folder), Path(folder), Path(out)
    check_empty(out)
    kept_card = None if new_card else handwritten_card(folder)
    options = replace(card or CardOptions(), repo_id=repo_id)
    if kept_card is None:
        read_scores(saved, options)  # what is wrong with them is found before the weights are read
    with _removed_if_it_fails(out):
        model = load_model(folder)
        if not options.without_weights:
            image_processor = load_image_processor(folder)
            with written("The model", out):
                model.save_pretrained(out)
                image_processor.save_pretrained(out)
        if (recipe := options.recipe or saved.recipe_path()) is not None:
            with written("recipe.yaml", out):
                shutil.copyfile(recipe, out / "recipe.yaml")
        if kept_card is None:
            write_model_card(folder, options, out)
        else:
            _copy_card(kept_card, folder, out)
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


def check_token(token: str | None = None) -> None:
    """Raise `NotLoggedIn` where neither a token is given nor the machine has one."""
    if token is None and get_token() is None:
        raise NotLoggedIn(
            "You are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN to a token that may write."
        )


def check_empty(out: Path) -> None:
    """Raise `FileExistsError` for what is there and is no empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not an empty folder.")


def check_repo_id(repo_id: str) -> None:
    """Raise `ValueError` for what cannot be the name of a repository with its owner."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} cannot be the name of a repository: {error}") from error
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} lacks the owner: OWNER/NAME.")


def handwritten_card(folder: Path) -> str | None:
    """The text of a card that was not generated; None: there is none."""
    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else GENERATED
    return None if GENERATED in text else text


def _copy_card(text: str, folder: Path, out: Path) -> None:
    """A card, and the pictures that it shows.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: one is no picture, or a link to a file elsewhere: nothing but pictures of the folder is published.
    """
    write_text(out / CARD, text)
    for name in local_pictures(text):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / CARD} shows {name}, which is not in {folder}.")
        if Path(name).suffix.lower() not in PICTURES or not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{folder / CARD} shows {name}, which is no picture inside {folder}.")
        with written(name, out):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, out / name)


def local_pictures(text: str) -> Iterable[str]:
    """Relative paths of the pictures in Markdown."""
    names = dict.fromkeys(PICTURE_LINK.findall(text))
    return [
        name for name in names if "://" not in name and not Path(name).is_absolute() and ".." not in Path(name).parts
    ]


@contextmanager
def _removed_if_it_fails(out: Path) -> Iterator[None]:
    """Leave no half of a model in `out`."""
    existed = out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        if existed:
            out.mkdir()
        raise
