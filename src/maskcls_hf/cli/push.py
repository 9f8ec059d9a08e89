"""`maskcls push`: a saved model to the Hub, with a model card."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..data import open_dataset
from ..hub.failure_cases import failure_cases, save_failure_cases
from ..hub.model_card import CardOptions, Picture, TrainingData, read_scores, recipe_of
from ..hub.push import check_empty, check_repo_id, check_token, handwritten_card, stage
from ..hub.push import push as push_folder
from ..hub.saved_model import SavedModel, read_recipe
from ..hub.speed import measure_speed
from ..inference import Predictor
from ..utils.plain_text import printable
from .console import check_new_folder, choose_device, complain, console, fail, progress_bar, stop
from .segment import find_images


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved model, such as OUT of `maskcls train`.")],
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Where it goes on the Hub; made if need be.")],
    dry_run: Annotated[
        Path | None,
        typer.Option("--dry-run", metavar="DIR", help="Write to this empty folder what would be uploaded; no network."),
    ] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a repository that is made.")] = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="Of the weights, as the Hub names it: apache-2.0, cc-by-nc-4.0, ...")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Name of the training data, for people or as the Hub names it (owner/name).")
    ] = None,
    data_terms: Annotated[str | None, typer.Option(help="Terms under which the data may be used.")] = None,
    data_description: Annotated[
        str | None, typer.Option(help="Origin and size of the data, a sentence or two.")
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            help="Scores: a JSON of `maskcls evaluate`; may be repeated. Default: eval_results.json in FOLDER."
        ),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="Recipe of the training. Default: recipe.yaml in FOLDER.")] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder of examples for the card; file names become captions.")
    ] = None,
    failures: Annotated[
        Path | None, typer.Option(metavar="DATA", help="Draw the images of this data set that the model does worst on.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Part of DATA. Default: the recipe's, or val.")] = None,
    number: Annotated[int, typer.Option(min=1, help="How many of them.")] = 4,
    limit: Annotated[int | None, typer.Option(min=1, help="Look at the first so many images of DATA.")] = None,
    maps_only: Annotated[
        bool,
        typer.Option("--maps-only", help="Of the failures draw maps and errors, not the photographs: see their terms."),
    ] = False,
    speed: Annotated[bool, typer.Option("--speed", help="Measure and state the speed on this machine.")] = False,
    limitations: Annotated[str | None, typer.Option(help="What else to say about limitations.")] = None,
    new_card: Annotated[
        bool, typer.Option("--new-card", help="Replace a README.md in FOLDER that was written by hand.")
    ] = False,
    without_weights: Annotated[
        bool,
        typer.Option("--without-weights", help="With --dry-run: only card, pictures and recipe, if data forbids more."),
    ] = False,
    device: Annotated[str, typer.Option(help="For --failures and --speed: cpu, cuda, ... or auto.")] = "auto",
) -> None:
    """Publish a model on the Hub: weights, image processor, the code that they need, and a model card.

    The card says what FOLDER knows (classes, recipe, scores, curves of the training) and what the options add; nothing
    is made up. Checkpoints and states of the optimiser stay here. A README.md that was written by hand is kept.

    Example: `maskcls push runs/camvid me/camvid-maskformer --license cc-by-nc-4.0 --dataset CamVid --dry-run look`
    """
    try:
        check_repo_id(repo_id)
        saved = SavedModel(folder)  # before anything takes time
        data = None
        if dataset is not None:
            data = TrainingData(dataset, data_terms, data_description)
        elif data_terms or data_description:
            raise ValueError("--data-terms and --data-description are of which data? Add --dataset NAME.")
        if without_weights and dry_run is None:
            raise ValueError("--without-weights is for a card in a folder: add --dry-run DIR.")
        card = CardOptions(
            license=licence,
            data=data,
            results=results or None,
            recipe=recipe,
            limitations=limitations,
            without_weights=without_weights,
        )
        keeps_card = not new_card and handwritten_card(folder) is not None
        check_inputs(saved, card, keeps_card, dry_run, failures)
        place = choose_device(device)
        warn(card, keeps_card, folder)
        with tempfile.TemporaryDirectory() as drawn:
            if not keeps_card:
                if pictures is not None:
                    card = replace(card, pictures=captioned(pictures))
                if failures is not None:
                    worst = draw_failures(folder, recipe, failures, split, number, limit, maps_only, place, Path(drawn))
                    card = replace(card, failures=worst)
                if speed:
                    predictor = Predictor.from_pretrained(folder, place)
                    card = replace(card, speed=measure_speed(predictor.model, predictor.image_processor))
            if dry_run is not None:
                files = stage(folder, dry_run, repo_id, card, new_card=new_card)
                where = f"{dry_run}: {', '.join(files)}"
            else:
                where = push_folder(folder, repo_id, card, private=private, new_card=new_card).commit_url
    except KeyboardInterrupt as error:
        stop(error, f"nothing was {'written' if dry_run else 'published'}")
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        fail(error)
    console.print(f"{'Written to' if dry_run else 'Uploaded:'} {printable(where)}", soft_wrap=True)


def check_inputs(
    saved: SavedModel, card: CardOptions, keeps_card: bool, dry_run: Path | None, failures: Path | None
) -> None:
    """What can be wrong is said before the model is loaded."""
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


def warn(card: CardOptions, keeps_card: bool, folder: Path) -> None:
    if keeps_card:
        complain(
            f"{folder / 'README.md'} was written by hand and is kept: options for the card have no effect (--new-card)."
        )
        return
    if card.license is None and not card.without_weights:
        complain("No licence: nobody may use the weights without one (--license).")
    if card.data is None:
        complain("The training data has no name (--dataset, --data-terms).")
    elif card.data.terms is None:
        complain("The card will say that the terms of the data are not stated (--data-terms).")


def captioned(folder: Path) -> list[Picture]:
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder} with pictures.")
    return [Picture(path, path.stem.replace("_", " ").replace("-", " ")) for path in find_images([folder])]


def draw_failures(
    folder: Path,
    recipe: Path | None,
    root: Path,
    split: str | None,
    number: int,
    limit: int | None,
    maps_only: bool,
    device: torch.device,
    out: Path,
) -> list[Picture]:
    """Pictures of the worst images, scored as the recipe evaluates them."""
    saved = SavedModel(folder)
    known = saved.recipe() if recipe is None else read_recipe(recipe)
    section, evaluation = ({} if known is None else known.get(name) for name in ("data", "evaluation"))
    split = section.get("eval_split", "val") if split is None else split
    dataset = open_dataset(root, split or None, section.get("layout"), **section.get("options", {}))
    tasks = evaluation.get("tasks") or [dataset.kind]
    task = next(name for name in ("panoptic", "instance", "semantic") if name in tasks)
    if not saved.finds_segments or not dataset.has_instances:
        task = "semantic"
    options = {}
    if task != "semantic":
        options = {
            "threshold": evaluation.get("threshold", 0.8),
            "overlap_mask_area_threshold": evaluation.get("overlap_threshold", 0.8),
        }
    predictor = Predictor.from_pretrained(folder, device)
    images = min(limit or len(dataset), len(dataset))
    with progress_bar("Looking for failures") as progress:
        bar = progress.add_task("", total=images)
        cases = failure_cases(
            predictor,
            dataset,
            number,
            task,  # type: ignore[arg-type]
            crop=evaluation.get("crop"),
            limit=limit,
            maps_only=maps_only,
            on_image=lambda: progress.advance(bar),
            **options,
        )
    return save_failure_cases(cases, out)
