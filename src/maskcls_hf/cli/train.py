"""`maskcls train`: a recipe and a data set in; a model, its scores and its log out."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..utils.plain_text import cell
from .console import DataOption, console, ends_in_a_line, fail


def _print_recipes(wanted: bool) -> None:
    if wanted:
        with ends_in_a_line():
            from ..training import list_recipes

        table = Table("recipe", "what it trains", box=None)
        for name, headline in list_recipes().items():
            table.add_row(cell(name), cell(headline))
        console.print(table)
        raise typer.Exit


def train(
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="Name of a recipe (see --list), or path of a YAML file.")
    ],
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for model, scores, log and checkpoints.")],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a value of the recipe; may be repeated."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Fine-tune this saved model; its classes become those of the data.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last whole checkpoint in OUT.")] = False,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches of a step: less memory, same results.")] = 1,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write the log to OUT/runs too.")] = False,
    show_recipes: Annotated[
        bool, typer.Option("--list", callback=_print_recipes, is_eager=True, help="Show the recipes and exit.")
    ] = False,
) -> None:
    """Train a model by a recipe, evaluate it and save it.

    OUT then holds the model with its image processor, `recipe.yaml` with all values, `eval_results.json`, and
    `trainer_state.json` with losses and scores over the steps. On several GPUs: `accelerate launch -m
    maskcls_command train ...`.

    Data without a validation split is split by itself (`data.val_share`), and OUT/split.json names the images that are
    held out.

    Ctrl-C, SIGTERM or SIGHUP ends the step and writes a checkpoint (exit code 130, 143 or 129); a second one ends at
    once.

    Example: `maskcls train --recipe camvid --data camvid --out runs/camvid --set schedule.max_steps=2000`, or
    `--recipe finetune --model runs/camvid --data my_data --out runs/mine`
    """
    from ..training import TRAINING_ERRORS, TrainingStopped, load_recipe
    from ..training import train as train_recipe
    from ..training.stopping import end

    try:
        scores = train_recipe(
            load_recipe(recipe, changes or ()),
            data,
            out,
            model=model,
            resume=resume,
            accumulate=accumulate,
            tensorboard=tensorboard,
        )
    except TRAINING_ERRORS as error:
        fail(error)
    except TrainingStopped as stopped:
        end(stopped)
    table = Table("score", "", box=None)
    for name, value in scores.items():
        if name.startswith("eval_"):
            table.add_row(cell(name.removeprefix("eval_")), f"{value:.4g}")
    console.print(table)
