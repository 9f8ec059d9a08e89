"""Publishing a model: the files that belong to it, checked, with a model card; to the Hub or to a local folder."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import PreTrainedModel
from transformers.utils import logging

from ..image_processing_maskcls import MaskClsImageProcessor
from ..inference.predictor import MODELS
from .model_card import CARD, GENERATED, CardOptions, read_scores, write_model_card
from .saved_model import SavedModel

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
    if token is None and get_token() is None:
        raise NotLoggedIn(
            "You are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN to a token that may write."
        )
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

    Returns:
        names of the files. With `card.without_weights` these are the card, its pictures and the recipe alone.

    Raises:
        FileNotFoundError: there is no model, no weights, no image processor, or a picture of the card is missing.
        FileExistsError: `out` has files.
        ValueError: weights are missing or NaN, scores are NaN, a name is not allowed on the Hub.
    """
    check_repo_id(repo_id)
    saved, folder, out = SavedModel(folder), Path(folder), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not an empty folder.")
    kept_card = None if new_card else handwritten_card(folder)
    options = replace(card or CardOptions(), repo_id=repo_id)
    if kept_card is None:
        read_scores(saved, options)  # what is wrong with them is found before the weights are read
    with removed_if_it_fails(out):
        model = load_checked(saved)
        if not options.without_weights:
            model.save_pretrained(out)
            MaskClsImageProcessor.from_pretrained(folder).save_pretrained(out)
        if (recipe := options.recipe or saved.recipe_path()) is not None:
            shutil.copyfile(recipe, out / "recipe.yaml")
        if kept_card is None:
            write_model_card(folder, options, out)
        else:
            copy_card(kept_card, folder, out)
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


def check_repo_id(repo_id: str) -> None:
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


def copy_card(text: str, folder: Path, out: Path) -> None:
    """A card, and the pictures that it shows."""
    (out / CARD).write_text(text, encoding="utf-8")
    for name in local_pictures(text):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / CARD} shows {name}, which is not in {folder}.")
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, out / name)


def local_pictures(text: str) -> Iterable[str]:
    """Relative paths of the pictures in Markdown."""
    names = dict.fromkeys(PICTURE_LINK.findall(text))
    return [
        name for name in names if "://" not in name and not Path(name).is_absolute() and ".." not in Path(name).parts
    ]


def load_checked(saved: SavedModel) -> PreTrainedModel:
    """The model, with all of its weights, which are finite."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model_class: Any = MODELS[str(saved.model_type)]
        model, report = model_class.from_pretrained(saved.folder, output_loading_info=True)
    except RuntimeError as error:
        raise ValueError(f"The weights in {saved.folder} do not fit its config.json: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
    for problem, names in (("lack", report["missing_keys"]), ("have unknown", report["unexpected_keys"])):
        if names:
            raise ValueError(
                f"The weights in {saved.folder} {problem} {len(names)} entries, such as {sorted(names)[0]}."
            )
    for name, values in model.state_dict().items():
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise ValueError(f"The weights in {saved.folder} are broken: {name} holds NaN or infinite values.")
    return model


@contextmanager
def removed_if_it_fails(out: Path) -> Iterator[None]:
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
