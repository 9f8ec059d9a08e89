"""Train a segmentation model by a recipe, with transformers' Trainer.

    python examples/train_trainer.py --recipe camvid --data camvid --out runs/camvid
    accelerate launch --num_processes 4 examples/train_trainer.py --recipe ade20k_r50 --data ADEChallengeData2016 ...

--recipe takes the name of a recipe of the package (--list shows them) or the path of a YAML file; --set changes a
value of it. `maskcls train` is the same as a command; train_accelerate.py shows the loop itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from maskcls_hf.training import as_script, list_recipes, load_recipe, train


def parse_arguments(argv: list[str] | None = None, description: str | None = __doc__) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="name of a recipe, or a YAML file")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--out", type=Path, required=True, help="folder for model, scores, log and checkpoints")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change the recipe")
    parser.add_argument("--model", type=Path, help="fine-tune this saved model; its classes become those of the data")
    parser.add_argument("--resume", action="store_true", help="go on from the last whole checkpoint in OUT")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of a step, for less memory (%(default)s)")
    parser.add_argument("--tensorboard", action="store_true", help="write the log to OUT/runs too")
    recipes = "\n".join(f"{name:32} {headline}" for name, headline in list_recipes().items())
    parser.add_argument("--list", action="version", version=recipes, help="show the recipes of the package and exit")
    return parser.parse_args(argv)


@as_script()
def main(argv: list[str] | None = None) -> dict[str, float]:
    options = vars(parse_arguments(argv))
    return train(load_recipe(options.pop("recipe"), options.pop("set")), **options)


if __name__ == "__main__":
    main()
