"""From per-pixel to mask classification: what does it gain to convert a trained per-pixel model, and to train on?

Trains per-pixel models of transformers from scratch on your data, converts each, compares the maps before and after,
and fine-tunes both for as many steps: the per-pixel model with its own loss, the converted one with that of mask
classification, all else equal. All are scored on the test split; a table with 95 % intervals, a plot and all numbers
come out. Stopped at any point it goes on where it was.

    python examples/convert_per_pixel.py --recipe camvid --data camvid --test-split test --out runs/convert-camvid

Data, augmentation, optimizer, schedule and the sizes of the transformer decoder are the recipe's, and the backbone of
UperNet; its network is not used otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForSemanticSegmentation,
    PreTrainedModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from transformers.utils.logging import disable_progress_bar

from maskcls_hf import MaskClsImageProcessor
from maskcls_hf.convert import from_per_pixel
from maskcls_hf.data.sample import void_id_of
from maskcls_hf.hub.saved_model import count_parameters
from maskcls_hf.models.configuration_maskcls import as_backbone_config
from maskcls_hf.models.modeling_maskcls import image_sizes
from maskcls_hf.models.post_processing import per_pixel_map
from maskcls_hf.training import (
    Recipe,
    build_image_processor,
    build_trainer,
    list_checkpoints,
    prepare,
    training_arguments,
)
from maskcls_hf.utils.writing import write_json
from studies import (
    Method,
    Scores,
    Study,
    begin,
    class_map_of,
    difference_table,
    facts_of_run,
    measure,
    report,
    score_table,
    scores_of,
    study_parser,
    without_intervals,
)

PER_PIXEL, MASKS = "model.kind=per_pixel", "model.kind=mask_classification"
METHODS = (
    Method("", "per_pixel", (PER_PIXEL,)),
    Method("trained on", "per_pixel_on", (PER_PIXEL,)),
    Method("converted", "converted", (MASKS,)),
    Method("converted, trained on with fixed matching", "fixed_on", (MASKS,)),
    Method("converted, trained on with bipartite matching", "bipartite_on", (MASKS,)),
)
# What the table answers: does more training help, what does conversion change, which way is better to train on?
DIFFERENCES = (
    ("per_pixel", "per_pixel_on"),
    ("per_pixel", "converted"),
    ("per_pixel_on", "fixed_on"),
    ("per_pixel_on", "bipartite_on"),
)
Key = tuple[str, str]  # architecture and method, as their folders are named
UNCHANGED = "unchanged.json"  # beside a converted model
OF_DECODER = ("hidden_size", "num_attention_heads", "decoder_layers", "decoder_ffn_dim", "dropout")


def parse(argv: list[str] | None) -> Study:
    parser = study_parser(__doc__, METHODS)
    names = list(ARCHITECTURES)
    parser.add_argument("--architecture", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--fine-tune-steps", type=int, help="of the second training (half of the first)")
    parser.add_argument("--fine-tune-rate", type=float, help="its learning rate (0.3 times that of the first)")
    return begin(parser, METHODS, argv)


# -- per-pixel models of transformers ----------------------------------------------------------------------------


def segformer(recipe: Recipe, id2label: dict[int, str]) -> PreTrainedModel:
    """SegFormer-B0: its sizes are the defaults of the configuration."""
    void_id = void_id_of(len(id2label))
    return SegformerForSemanticSegmentation(SegformerConfig(**classes(id2label), semantic_loss_ignore_index=void_id))


def upernet(recipe: Recipe, id2label: dict[int, str]) -> PreTrainedModel:
    """UperNet over the recipe's backbone."""
    config = UperNetConfig(
        backbone_config=as_backbone_config(recipe.model.config.get("backbone_config")),
        hidden_size=96,
        use_auxiliary_head=False,
        loss_ignore_index=void_id_of(len(id2label)),
        **classes(id2label),
    )
    return UperNetForSemanticSegmentation(config)


def classes(id2label: dict[int, str]) -> dict[str, Any]:
    return {"id2label": id2label, "label2id": {name: label for label, name in id2label.items()}}


ARCHITECTURES = {"upernet": ("UperNet", upernet), "segformer": ("SegFormer-B0", segformer)}


class PixelsAndLabels:
    """Collator for per-pixel models of transformers, whose `forward` takes nothing else."""

    def __init__(self, collator: Any):
        self.collator = collator

    def __call__(self, samples: Any) -> dict[str, Tensor]:
        batch = self.collator(samples)
        return {name: batch[name] for name in ("pixel_values", "labels")}


def per_pixel_map_of(folder: Path) -> Callable[[Tensor], Tensor]:
    """Of a saved per-pixel model of transformers: the class with the greatest score, resized to the image."""
    model = AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=False).eval()
    image_processor = MaskClsImageProcessor.from_pretrained(folder)

    @torch.no_grad()
    def class_map(image: Tensor) -> Tensor:
        inputs = image_processor(image, return_tensors="pt")
        pixels = inputs["pixel_values"]
        height, width = image_sizes(pixels, inputs["pixel_mask"])["valid_sizes"][0].tolist()
        sizes = {"padded_size": pixels.shape[-2:], "valid_size": (height, width), "target_size": image.shape[-2:]}
        return per_pixel_map(model(pixels).logits[0], **sizes)

    return class_map


# -- the models of one architecture ------------------------------------------------------------------------------


def train_all(study: Study, architecture: str) -> dict[str, Path]:
    """Folders of the models of all wanted methods, and of the per-pixel model that they come from."""
    _, build = ARCHITECTURES[architecture]
    folder = study.arguments.out / architecture
    first = folder / "per_pixel"
    recipe = study.load_recipe(PER_PIXEL)
    train(recipe, study, first, lambda: build(recipe, study.data.id2label))
    decoder = {name: value for name, value in recipe.model.config.items() if name in OF_DECODER}
    start: dict[str, Callable[[], PreTrainedModel]] = {
        "per_pixel_on": lambda: AutoModelForSemanticSegmentation.from_pretrained(first, trust_remote_code=False),
        "fixed_on": lambda: from_per_pixel(first, matching="fixed", **decoder),
        "bipartite_on": lambda: from_per_pixel(first, matching="bipartite", **decoder),
    }
    folders = {"per_pixel": first}
    for method in study.methods:
        folders[method.folder] = folder / method.folder
        if method.folder in start:
            train(fine_tuning(study, method), study, folder / method.folder, start[method.folder])
        elif method.folder == "converted":
            start["fixed_on"]().save_pretrained(folder / "converted")
            processor = build_image_processor(study.recipe, pretrained=False, **study.data.processor_fields())
            processor.save_pretrained(folder / "converted")
    return folders


def fine_tuning(study: Study, method: Method) -> Recipe:
    steps = second_steps(study)
    rate = study.arguments.fine_tune_rate or 0.3 * study.recipe.optimizer.learning_rate
    return study.load_recipe(*method.changes, f"schedule.max_steps={steps}", f"optimizer.learning_rate={rate}")


def second_steps(study: Study) -> int:
    return study.arguments.fine_tune_steps or max(1, (study.recipe.schedule.max_steps or 0) // 2)


def train(recipe: Recipe, study: Study, folder: Path, network: Callable[[], PreTrainedModel]) -> None:
    """Train a network by the recipe, or go on with it, and save it in the folder."""
    if (folder / "model.safetensors").is_file():
        return
    recipe.evaluation.every_steps = None  # the scores are those of the test split, at the end
    torch.manual_seed(recipe.training.seed)
    run = prepare(recipe, study.arguments.data, model=network())
    if recipe.model.kind == "per_pixel":
        run.train_collator = PixelsAndLabels(run.train_collator)
    print(f"{folder}: training. {run.describe()}", flush=True)
    trainer = build_trainer(run, training_arguments(run, folder))
    trainer.train(resume_from_checkpoint=bool(list_checkpoints(folder)))
    trainer.save_model()
    trainer.save_state()


# -- scores ------------------------------------------------------------------------------------------------------


def measure_all(study: Study, folders: dict[str, Path]) -> dict[str, Scores]:
    """Scores by method."""
    scores = {}
    for name, folder in folders.items():
        file, unchanged = folder / f"test-{study.data.split}.npz", folder / UNCHANGED
        class_map = per_pixel_map_of(folder) if name.startswith("per_pixel") else class_map_of(folder)
        if name == "converted" and not unchanged.is_file():
            file.unlink(missing_ok=True)
            class_map = Compared(per_pixel_map_of(folders["per_pixel"]), class_map)
        scores[name] = scores_of([measure(file, study.data, class_map)], study.data)
        if isinstance(class_map, Compared):
            write_json(unchanged, {"pixels": class_map.equal / class_map.pixels})
    return scores


class Compared:
    """The class maps of one model, and how many of their pixels have the class that another model gives them."""

    def __init__(self, other: Callable[[Tensor], Tensor], class_map: Callable[[Tensor], Tensor]):
        self.other, self.class_map = other, class_map
        self.equal = self.pixels = 0

    def __call__(self, image: Tensor) -> Tensor:
        found = self.class_map(image)
        self.equal += int((found == self.other(image)).sum())
        self.pixels += found.numel()
        return found


def table(study: Study, found: dict[Key, Scores], unchanged: dict[str, float]) -> Iterator[str]:
    """Markdown: scores, differences, and how many pixels the conversion leaves as they were."""
    first, second = study.recipe.schedule.max_steps, second_steps(study)
    columns = {
        "million parameters": [f"{count_parameters(study.arguments.out / Path(*key)) / 1e6:.2f}" for key in found],
        "steps": [f"{first} + {second}" if key[1].endswith("_on") else str(first) for key in found],
    }
    pairs = [((a, before), (a, after)) for a in study.arguments.architecture for before, after in DIFFERENCES]
    results = {title(key): scores for key, scores in found.items()}
    yield from score_table(results, columns)
    yield ""
    yield from difference_table(results, [(title(a), title(b)) for a, b in pairs if a in found and b in found])
    for architecture, share in unchanged.items():
        name = title((architecture, ""))
        yield f"\n{name}: {100 * share:.5f} % of the test pixels have the same class before and after the conversion."


def title(key: Key) -> str:
    architecture, folder = key
    names = [method.name for method in METHODS if method.folder == folder]
    return ", ".join(filter(None, [ARCHITECTURES[architecture][0], *names]))


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    study = parse(argv)
    disable_progress_bar()  # of loading and saving
    found: dict[Key, Scores] = {}
    unchanged: dict[str, float] = {}
    for architecture in study.arguments.architecture:
        folders = train_all(study, architecture)
        found |= {(architecture, name): scores for name, scores in measure_all(study, folders).items()}
        if "converted" in folders:
            unchanged[architecture] = json.loads((folders["converted"] / UNCHANGED).read_text())["pixels"]
    stem = study.arguments.out / "conversion"
    results = {title(key): scores for key, scores in found.items()}
    report(stem, table(study, found, unchanged), {"": results}, f"{study.title}, then {second_steps(study)}")
    missing = [
        "/".join(key) for key in product(ARCHITECTURES, [method.folder for method in METHODS]) if key not in found
    ]
    summary = {"/".join(key): without_intervals(scores) for key, scores in found.items()}
    facts = facts_of_run("convert_per_pixel.py", argv, study)
    record = {**facts, "unchanged_pixels": unchanged, "scores": summary, "missing": missing}
    write_json(stem.with_suffix(".json"), record)
    return summary


if __name__ == "__main__":
    main()
