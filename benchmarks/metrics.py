"""Time of the metrics beside panopticapi, torchmetrics, evaluate, pycocotools and hotcoco, in one run on one core:

    python benchmarks/metrics.py --panopticapi FOLDER --mean-iou FOLDER

FOLDER: a copy of github.com/cocodataset/panopticapi, and of `metrics/mean_iou` of github.com/huggingface/evaluate
(default: what `evaluate.load("mean_iou")` finds). What is missing is left out. Each round times every contender once,
in turn; the table has medians over rounds of the processor's time, which other programs on the machine don't add to.
All start from the same arrays in memory, except in the rows "from PNG". Before the times are taken the scores are
compared.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import io
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pycocotools.coco
import torch
from examples import blobs
from measuring import Contenders, medians, processor_name
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval
from scipy import ndimage

from maskcls_hf.data.files import read_colored_ids
from maskcls_hf.metrics import VOID, MaskAP, MeanIoU, PanopticQuality, Segments

# Name, size, segments an image, images; the segments are those of COCO panoptic (mean 11) and of crowded street scenes.
SIZES = [("640 x 480", (480, 640), 12, 8), ("1920 x 1080", (1080, 1920), 40, 2)]
CLASSES = 100


def example(shape: tuple[int, int], number: int, rng: np.random.Generator) -> SimpleNamespace:
    """Truth and prediction of an image: 24-bit ids, 0 = void, and classes; the prediction has other outlines, specks,
    and some wrong classes."""
    true = blobs(shape, number, rng)
    moved = np.roll(true, 3, axis=(0, 1))
    specks = ndimage.gaussian_filter(rng.standard_normal(shape), 2) > 0.35
    found = np.where(specks, rng.permutation(number)[moved], moved)
    result = SimpleNamespace()
    for kind, places in (("true", true), ("found", found)):
        ids = rng.choice(2**24 - 1, number, replace=False) + 1
        if kind == "true":
            ids[0] = 0
            classes = rng.integers(0, CLASSES, number)
        else:
            classes = np.where(rng.random(number) < 0.8, result.true_classes, rng.integers(0, CLASSES, number))
        present = [i for i in np.unique(places).tolist() if ids[i]]
        area = np.bincount(places.ravel(), minlength=number)
        setattr(result, f"{kind}_classes", classes)
        setattr(result, f"{kind}_ids", ids[places])
        setattr(result, f"{kind}_class_map", np.where(ids[places] == 0, 255, classes[places]))
        infos = [
            {"id": int(ids[i]), "category_id": int(classes[i]), "area": int(area[i]), "iscrowd": 0} for i in present
        ]
        setattr(result, f"{kind}_infos", infos)
    return result


def truth_of(ids: torch.Tensor, infos: list[dict[str, Any]]) -> Segments:
    return Segments.from_ids(ids, {info["id"]: info["category_id"] for info in infos} | {0: VOID})


def our_quality(examples: list[SimpleNamespace], read: Callable[[int, str], torch.Tensor]) -> float:
    metric = PanopticQuality({k: str(k) for k in range(CLASSES)})
    for number, one in enumerate(examples):
        infos = [{"id": info["id"], "label_id": info["category_id"]} for info in one.found_infos]
        found = Segments.from_output({"segmentation": read(number, "found"), "segments_info": infos})
        metric.update(found, truth_of(read(number, "true"), one.true_infos))
    return metric.compute()["pq"]


def panopticapi_quality(evaluation: Any, examples: list[SimpleNamespace], folder: Path) -> float:
    categories = {k: {"isthing": 1} for k in range(CLASSES)}
    pairs = [
        (
            {"image_id": number, "file_name": f"{number}.png", "segments_info": one.true_infos},
            {"image_id": number, "file_name": f"{number}.png", "segments_info": one.found_infos},
        )
        for number, one in enumerate(examples)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        stat = evaluation.pq_compute_single_core(0, pairs, str(folder / "true"), str(folder / "found"), categories)
    return stat.pq_average(categories, None)[0]["pq"]


@contextlib.contextmanager
def in_memory(evaluation: Any, examples: list[SimpleNamespace]):
    """Within, panopticapi takes its maps of ids from memory: no file is read, no color converted."""
    arrays = {
        os.path.join(kind, f"{number}.png"): getattr(one, f"{kind}_ids").astype(np.uint32)
        for number, one in enumerate(examples)
        for kind in ("true", "found")
    }
    saved = evaluation.Image, evaluation.rgb2id
    evaluation.Image, evaluation.rgb2id = SimpleNamespace(open=arrays.__getitem__), lambda ids: ids
    yield
    evaluation.Image, evaluation.rgb2id = saved


def write_files(examples: list[SimpleNamespace], folder: Path) -> None:
    for kind in ("true", "found"):
        (folder / kind).mkdir()
        for number, one in enumerate(examples):
            ids = getattr(one, f"{kind}_ids")
            rgb = np.stack([ids >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)
            Image.fromarray(rgb).save(folder / kind / f"{number}.png")


def quality_contenders(evaluation: Any, examples: list[SimpleNamespace], folder: Path) -> list[tuple[str, Contenders]]:
    kinds = ("true", "found")
    ids = [{kind: torch.from_numpy(getattr(one, f"{kind}_ids")).int() for kind in kinds} for one in examples]

    def ours() -> float:
        return our_quality(examples, lambda number, kind: ids[number][kind])

    def from_memory() -> float:
        with in_memory(evaluation, examples):
            return panopticapi_quality(evaluation, examples, Path(""))

    def ours_from_files() -> float:
        return our_quality(examples, lambda number, kind: read_colored_ids(folder / kind / f"{number}.png"))

    groups: list[tuple[str, Contenders]] = []
    if evaluation is not None:
        groups.append(("PQ", {"panopticapi": from_memory, "maskcls_hf": ours}))
        files = {
            "panopticapi": lambda: panopticapi_quality(evaluation, examples, folder),
            "maskcls_hf": ours_from_files,
        }
        groups.append(("PQ from PNG", files))
    with contextlib.suppress(ImportError):
        from torchmetrics.detection import PanopticQuality as TorchmetricsQuality

        maps = [
            torch.from_numpy(np.stack([getattr(one, f"{kind}_class_map"), getattr(one, f"{kind}_ids")], axis=-1))[None]
            for one in examples
            for kind in ("found", "true")
        ]

        def torchmetrics_quality() -> float:
            metric = TorchmetricsQuality(set(range(CLASSES)), set(), allow_unknown_preds_category=True)
            for found, true in zip(maps[::2], maps[1::2], strict=True):
                metric.update(found, true)
            return metric.compute().item()

        groups.append(("PQ", {"torchmetrics": torchmetrics_quality, "maskcls_hf": ours}))
    return groups


def iou_contenders(module: Any, examples: list[SimpleNamespace]) -> list[tuple[str, Contenders]]:
    found, true = ([getattr(one, f"{kind}_class_map") for one in examples] for kind in ("found", "true"))
    found = [np.where(ids == 255, 0, ids) for ids in found]

    def ours() -> float:
        metric = MeanIoU({k: str(k) for k in range(CLASSES)})
        for prediction, target in zip(found, true, strict=True):
            metric.update(prediction, target)
        return metric.compute()["mean_iou"]

    def evaluates() -> float:
        with np.errstate(invalid="ignore"):
            return module.mean_iou(found, true, CLASSES, 255)["mean_iou"]

    return [] if module is None else [("mIoU", {"evaluate": evaluates, "maskcls_hf": ours})]


def precision_contenders(examples: list[SimpleNamespace]) -> list[tuple[str, Contenders]]:
    """Mask AP, from a map of ids as the truth and a binary mask (H, W) of each predicted instance."""
    rng = np.random.default_rng(1)
    for one in examples:
        ids = [info["id"] for info in one.found_infos]
        one.masks = np.stack([one.found_ids == i for i in ids])
        one.labels = [info["category_id"] for info in one.found_infos]
        one.scores = rng.random(len(ids)).tolist()

    def ours() -> float:
        metric = MaskAP({k: str(k) for k in range(CLASSES)})
        for one in examples:
            found = Segments(one.labels, one.masks, scores=torch.tensor(one.scores, dtype=torch.float64))
            metric.update(found, truth_of(torch.from_numpy(one.true_ids).int(), one.true_infos))
        return metric.compute()["ap"]

    def of_coco(module: Any) -> float:
        """With the classes of pycocotools, or those of the same names."""
        encode = coco_mask.encode
        images, annotations, results = [], [], []
        for number, one in enumerate(examples, start=1):
            height, width = one.true_ids.shape
            images.append({"id": number, "height": height, "width": width})
            for info in one.true_infos:
                code = encode(np.asfortranarray(one.true_ids == info["id"], dtype=np.uint8))
                of_truth = {"id": len(annotations) + 1, "area": info["area"], "bbox": [0, 0, width, height]}
                annotations.append(_record(number, info["category_id"], code) | of_truth | {"iscrowd": 0})
            for mask, label, score in zip(one.masks, one.labels, one.scores, strict=True):
                code = encode(np.asfortranarray(mask, dtype=np.uint8))
                results.append(_record(number, label, code) | {"score": score})
        with contextlib.redirect_stdout(io.StringIO()):
            categories = [{"id": k, "name": str(k)} for k in range(CLASSES)]
            content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
            if module is pycocotools.coco:
                truth = module.COCO()
                truth.dataset = content
                truth.createIndex()
                evaluation = COCOeval(truth, truth.loadRes(results), "segm")
            else:
                truth = module.COCO(content)
                evaluation = module.COCOeval(truth, truth.load_res(results), "segm")
            for step in ("evaluate", "accumulate", "summarize"):
                getattr(evaluation, step)()
        return float(evaluation.stats[0])

    groups = [("mask AP", {"pycocotools": lambda: of_coco(pycocotools.coco), "maskcls_hf": ours})]
    with contextlib.suppress(ImportError):
        import hotcoco

        groups.append(("mask AP", {"hotcoco": lambda: of_coco(hotcoco), "maskcls_hf": ours}))
    return groups


def _record(image: int, label: int, code: dict[str, Any]) -> dict[str, Any]:
    code = {"size": [int(n) for n in code["size"]], "counts": code["counts"].decode("ascii")}
    return {"image_id": image, "category_id": int(label), "segmentation": code}


def load_panopticapi(folder: Path | None) -> Any:
    if folder is not None:
        sys.path.append(str(folder))
    try:
        return importlib.import_module("panopticapi.evaluation")
    except ImportError:
        return None


def load_mean_iou(folder: Path | None) -> Any:
    """The module that defines evaluate's `mean_iou`."""
    import evaluate

    try:
        metric = evaluate.load("mean_iou" if folder is None else str(folder))
    except (FileNotFoundError, ConnectionError):
        return None
    return sys.modules[type(metric).__module__]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--panopticapi", type=Path, help="folder of its repository (default: what can be imported)")
    parser.add_argument("--mean-iou", type=Path, help="folder of evaluate's mean_iou.py")
    parser.add_argument("--rounds", type=int, default=9, help="(default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    evaluation, module = load_panopticapi(arguments.panopticapi), load_mean_iou(arguments.mean_iou)
    versions = f"numpy {np.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    how = f"medians of processor time over {arguments.rounds} rounds"
    print(f"{processor_name()}, 1 thread; {versions}; {datetime.date.today()}; {how}\n", flush=True)
    print("| score | image, segments | other | its ms an image | maskcls_hf's ms an image | ratio |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    for name, shape, segments, images in SIZES:
        rng = np.random.default_rng(0)
        examples = [example(shape, segments, rng) for _ in range(images)]
        with tempfile.TemporaryDirectory() as folder:
            write_files(examples, Path(folder))
            groups = quality_contenders(evaluation, examples, Path(folder)) + iou_contenders(module, examples)
            groups += precision_contenders(examples)
            for score, contenders in groups:
                first, second = (call() for call in contenders.values())
                if abs(first - second) > 1e-6:
                    sys.exit(f"{score}: {' and '.join(contenders)} differ: {first} and {second}")
                times = medians(contenders, arguments.rounds, time.process_time)
                other = next(iter(contenders))
                theirs, ours = (1000 * times[key] / images for key in (other, "maskcls_hf"))
                print(
                    f"| {score} | {name}, {segments} | {other} | {theirs:.2f} | {ours:.2f} | {theirs / ours:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
