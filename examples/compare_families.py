"""MaskFormer, Mask2Former and EoMT on your data: same crops, same steps, the last with a small ViT from scratch.

Trains three models with one recipe, scores each on the test split with 95 % intervals and writes a table and all
numbers. Stopped at any point it goes on where it was.

    python examples/compare_families.py --recipe building_facades_maskformer --data building_facades \\
      --test-split test --out runs/families-facades --jobs 2
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maskcls_hf.hub.saved_model import SavedModel
from maskcls_hf.utils.writing import write_json
from studies import Method, Study, add_jobs, begin, facts_of_run, study_parser, train_all

MASK_LOSSES = (  # of Mask2Former, which EoMT took over
    "model.mask_loss=cross_entropy",
    "model.loss_points=4096",
    "model.cross_entropy_weight=2",
    "model.mask_weight=5",
    "model.dice_weight=5",
)
SMALL_VIT = (
    "{model_type: dinov2_with_registers, hidden_size: 192, num_hidden_layers: 12, num_attention_heads: 3, "
    "patch_size: 16, image_size: 192}"
)
METHODS = (
    Method("MaskFormer", "maskformer"),
    Method(
        "Mask2Former",
        "mask2former",
        (
            "model.pixel_decoder=deformable",
            "model.transformer_decoder=masked_attention",
            "model.mask_kernel_size=1",
            "model.encoder_layers=3",
            "model.encoder_ffn_dim=512",
            *MASK_LOSSES,
        ),
    ),
    Method(
        "EoMT, ViT from scratch",
        "eomt",
        (
            "model.architecture=encoder_only",
            "model.backbone_checkpoint=null",
            f"model.backbone_config={SMALL_VIT}",
            "model.query_blocks=3",
            *MASK_LOSSES,
            "training.mask_annealing=true",
        ),
    ),
)
SCORES = {  # what evaluate calls them, and a table
    "panoptic": {"pq": "PQ", "pq_things": "PQ_th", "pq_stuff": "PQ_st"},
    "semantic": {"mean_iou": "mIoU"},
}


def evaluate(study: Study, folder: Path) -> dict[str, Any]:
    """Scores of a model on the test split, by `maskcls evaluate`, kept beside it."""
    arguments, recipe = study.arguments, study.recipe
    file = folder / f"scores-{arguments.test_split}.json"
    if not file.is_file():
        command = [sys.executable, "-m", "maskcls_hf.cli", "evaluate", "--model", str(folder)]
        command += ["--data", str(arguments.data), "--split", arguments.test_split, "--layout", recipe.data.layout]
        command += ["--bootstrap", "1000", "--json", str(file)]
        for task in recipe.evaluation.tasks:
            command += ["--task", task]
        subprocess.run(command, check=True)
    return json.loads(file.read_text())["scores"]


def table(study: Study, scores: dict[str, dict[str, float]], folders: list[Path]) -> Iterator[str]:
    """Markdown, a line a method: parameters, scores in per cent with their intervals."""
    columns = {name: label for task in study.recipe.evaluation.tasks for name, label in SCORES[task].items()}
    yield f"| model | million parameters | {' | '.join(columns.values())} |"
    yield "|---|---:|" + "---|" * len(columns)
    for (method, values), folder in zip(scores.items(), folders, strict=True):
        cells = [f"{(SavedModel(folder).parameters() or 0) / 1e6:.2f}"]
        for name in columns:
            value, low, high = (100 * values[name + end] for end in ("", "_low", "_high"))
            cells.append(f"{value:.1f} ({low:.1f} to {high:.1f})")
        yield f"| {method} | {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = study_parser(__doc__, METHODS)
    add_jobs(parser)
    study = begin(parser, METHODS, argv)
    out = study.arguments.out
    folders = list(train_all({out / method.folder: method for method in study.methods}, study.arguments))
    scores = {m.name: evaluate(study, folder) for m, folder in zip(study.methods, folders, strict=True)}
    text = "\n".join([study.title, "", *table(study, scores, folders)])
    print(text)
    (out / "families.md").write_text(text + "\n")
    write_json(out / "families.json", {**facts_of_run("compare_families.py", argv, study), "scores": scores})
    return scores


if __name__ == "__main__":
    main()
