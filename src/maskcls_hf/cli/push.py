"""`maskcls push`: a saved model to the Hub, with a model card."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..utils.plain_text import printable
from ..utils.tasks import Task
from .console import check_new_folder, choose_device, complain, console, ends_in_a_line, progress_bar

if TYPE_CHECKING:
    import torch

    from ..hub.card_options import CardOptions, Picture
    from ..hub.saved_model import SavedModel

FolderArgument = Annotated[Path, typer.Argument(help="Folder of a saved model, such as OUT of `maskcls train`.")]
RepoArgument = Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Where it goes on the Hub; made if need be.")]
DryRunOption = Annotated[
    Path | None,
    typer.Option("--dry-run", metavar="DIR", help="Write to this empty folder what would be uploaded; no network."),
]
PrivateOption = Annotated[bool | None, typer.Option("--private/--public", help="Of a repository that is made.")]
LicenseOption = Annotated[
    str | None, typer.Option("--license", help="Of the weights, as the Hub names it: apache-2.0, cc-by-nc-4.0, ...")
]
DatasetOption = Annotated[
    str | None, typer.Option(help="Name of the training data, for people or as the Hub names it (owner/name).")
]
TermsOption = Annotated[str | None, typer.Option(help="Terms under which the data may be used.")]
DescriptionOption = Annotated[str | None, typer.Option(help="Origin and size of the data, a sentence or two.")]
ResultsOption = Annotated[
    list[Path] | None,
    typer.Option(help="Scores: a JSON of `maskcls evaluate`; may be repeated. Default: eval_results.json in FOLDER."),
]
RecipeOption = Annotated[Path | None, typer.Option(help="Recipe of the training. Default: recipe.yaml in FOLDER.")]
PicturesOption = Annotated[
    Path | None, typer.Option(help="Folder of examples for the card; file names become captions.")
]
FailuresOption = Annotated[
    Path | None, typer.Option(metavar="DATA", help="Draw the images of this data set that the model does worst on.")
]
SplitOption = Annotated[str | None, typer.Option(help="Part of DATA. Default: the recipe's, or val.")]
NumberOption = Annotated[int, typer.Option(min=1, help="How many of them.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Look at the first so many images of DATA.")]
MapsOnlyOption = Annotated[
    bool,
    typer.Option("--maps-only", help="Of the failures draw maps and errors, not the photographs: see their terms."),
]
SpeedOption = Annotated[bool, typer.Option("--speed", help="Measure and state the speed on this machine.")]
LimitationsOption = Annotated[str | None, typer.Option(help="What else to say about limitations.")]
NewCardOption = Annotated[
    bool, typer.Option("--new-card", help="Replace a README.md in FOLDER that was written by hand.")
]
WithoutWeightsOption = Annotated[
    bool,
    typer.Option("--without-weights", help="With --dry-run: only card, pictures and recipe, if data forbids more."),
]
DeviceOption = Annotated[str, typer.Option(help="For --failures and --speed: cpu, cuda, ... or auto.")]


def push(
    folder: FolderArgument,
    repo_id: RepoArgument,
    dry_run: DryRunOption = None,
    private: PrivateOption = None,
    license: LicenseOption = None,
    dataset: DatasetOption = None,
    data_terms: TermsOption = None,
    data_description: DescriptionOption = None,
    results: ResultsOption = None,
    recipe: RecipeOption = None,
    pictures: PicturesOption = None,
    failures: FailuresOption = None,
    split: SplitOption = None,
    number: NumberOption = 4,
    limit: LimitOption = None,
    maps_only: MapsOnlyOption = False,
    speed: SpeedOption = False,
    limitations: LimitationsOption = None,
    new_card: NewCardOption = False,
    without_weights: WithoutWeightsOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Publish a model on the Hub: weights, image processor, the code that they need, and a model card.

    The card says what FOLDER knows (classes, recipe, scores, curves of the training) and what the options add; nothing
    is made up. Checkpoints and states of the optimizer stay here. A README.md that was written by hand is kept.

    Example: `maskcls push runs/camvid me/camvid-maskformer --license cc-by-nc-4.0 --dataset CamVid --dry-run look`
    """
    from ..hub.card_options import card_options

    with ends_in_a_line(f"nothing was {'written' if dry_run else 'published'}", RuntimeError):
        saved, keeps_card = opened(folder, repo_id, new_card)
        if without_weights and dry_run is None:
            raise ValueError("--without-weights is for a card in a folder: add --dry-run DIR.")
        if dataset is None and (data_terms or data_description):
            raise ValueError("--data-terms and --data-description are of which data? Add --dataset NAME.")
        card = card_options(
            license=license, dataset=dataset, data_terms=data_terms, data_description=data_description,
            limitations=limitations, results=results or None, recipe=recipe, without_weights=without_weights,
        )  # fmt: skip
        _check_inputs(saved, card, keeps_card, dry_run, failures)
        place = choose_device(device)
        _warn(card, keeps_card, folder)
        with tempfile.TemporaryDirectory() as drawn:
            if not keeps_card:
                cases = dict(root=failures, split=split, number=number, limit=limit, maps_only=maps_only)
                card = _with_pictures(saved, card, pictures, cases, speed, place, Path(drawn))
            where = _publish(folder, repo_id, card, dry_run, private=private, new_card=new_card)
    console.print(f"{'Written to' if dry_run else 'Uploaded:'} {printable(where)}", soft_wrap=True)


def opened(folder: Path, repo_id: str, new_card: bool) -> tuple[SavedModel, bool]:
    """The model, and whether its card is kept, before anything takes time.

    Args:
        folder: of the saved model.
        repo_id: OWNER/NAME on the Hub.
        new_card: replace a card that was written by hand.

    Raises:
        OSError: no saved model there.
        ValueError: no possible name on the Hub, or a model that cannot be read.
    """
    from ..hub.push import check_repo_id, handwritten_card
    from ..hub.saved_model import SavedModel

    check_repo_id(repo_id)
    return SavedModel(folder), not new_card and handwritten_card(folder) is not None


def _check_inputs(
    saved: SavedModel, card: CardOptions, keeps_card: bool, dry_run: Path | None, failures: Path | None
) -> None:
    """What can be wrong is said before the model is loaded."""
    from ..hub.model_card import read_scores, recipe_of
    from ..hub.push import check_empty, check_token

    if dry_run is not None:
        check_new_folder(dry_run)
        check_empty(dry_run)
    else:
        check_token()
    if not keeps_card:
        recipe_of(saved, card)
        read_scores(saved, card)
    if failures is not None and not failures.is_dir():
        raise FileNotFoundError(f"There is no folder {failures} with images for --failures.")


def _warn(card: CardOptions, keeps_card: bool, folder: Path) -> None:
    if keeps_card:
        complain(
            f"{folder / 'README.md'} was written by hand and is kept: options for the card have no effect (--new-card)."
        )
        return
    if card.license is None and not card.without_weights:
        complain("No license: nobody may use the weights without one (--license).")
    if card.data is None:
        complain("The training data has no name (--dataset, --data-terms).")
    elif card.data.terms is None:
        complain("The card will say that the terms of the data are not stated (--data-terms).")


def _captioned(folder: Path) -> list[Picture]:
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder} with pictures.")
    from ..hub.card_options import Picture
    from .segment import find_images

    return [Picture(path, path.stem.replace("_", " ").replace("-", " ")) for path in find_images([folder])]


def _with_pictures(
    saved: SavedModel,
    card: CardOptions,
    pictures: Path | None,
    failures: dict[str, Any],
    speed: bool,
    device: torch.device,
    out: Path,
) -> CardOptions:
    """With all that is drawn, into `out`, or measured; `failures`: where and how to look for them."""
    from ..hub.speed import measure_speed
    from ..inference import Predictor

    if pictures is not None:
        card = replace(card, pictures=_captioned(pictures))
    if failures["root"] is not None:
        card = replace(card, failures=_draw_failures(saved, card, device, out, **failures))
    if speed:
        predictor = Predictor.from_pretrained(saved.folder, device)
        card = replace(card, speed=measure_speed(predictor.model, predictor.image_processor))
    return card


def _publish(
    folder: Path, repo_id: str, card: CardOptions, dry_run: Path | None, *, private: bool | None, new_card: bool
) -> str:
    """Where it went."""
    from ..hub.push import push, stage

    if dry_run is None:
        return push(folder, repo_id, card, private=private, new_card=new_card).commit_url
    return f"{dry_run}: {', '.join(stage(folder, dry_run, repo_id, card, new_card=new_card))}"


def _draw_failures(
    saved: SavedModel,
    card: CardOptions,
    device: torch.device,
    out: Path,
    *,
    root: Path,
    split: str | None,
    number: int,
    limit: int | None,
    maps_only: bool,
) -> list[Picture]:
    """Pictures of the worst images, scored as the recipe evaluates them."""
    from ..data import open_dataset
    from ..hub.failure_cases import failure_cases, save_failure_cases
    from ..hub.model_card import recipe_of
    from ..inference import Predictor

    known = recipe_of(saved, card)
    section, evaluation = ({} if known is None else known.get(name) for name in ("data", "evaluation"))
    split = section.get("eval_split", "val") if split is None else split
    dataset = open_dataset(root, split or None, section.get("layout"), **section.get("options", {}))
    tasks = evaluation.get("tasks") or [dataset.kind]
    tried: tuple[Task, ...] = ("panoptic", "instance", "semantic")
    task = next(name for name in tried if name in tasks)
    if not saved.finds_segments or not dataset.has_instances:
        task = "semantic"
    options = {}
    if task != "semantic":
        options = {
            "threshold": evaluation.get("threshold"),
            "overlap_mask_area_threshold": evaluation.get("overlap_threshold"),
        }
    predictor = Predictor.from_pretrained(saved.folder, device)
    with progress_bar("Looking for failures") as progress:
        bar = progress.add_task("", total=min(limit or len(dataset), len(dataset)))
        cases = failure_cases(
            predictor, dataset, number, task, crop=evaluation.get("crop"), limit=limit, maps_only=maps_only,
            on_image=lambda: progress.advance(bar), **options,
        )  # fmt: skip
    return save_failure_cases(cases, out)
