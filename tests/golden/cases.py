"""Seeded inputs and what the public interface makes of them, as numbers for tests/test_golden.py.

Nothing here looks at modules, private names or internal contracts, so that the numbers outlive a move of the code.
Without `pixel_mask`, labels are of one size.
"""

import importlib.util
import json
import math
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from maskcls_hf import (
    MaskClsForUniversalSegmentation,
    MaskClsImageProcessor,
    PerPixelForSemanticSegmentation,
)
from maskcls_hf.data import MaskClsCollator, open_dataset
from maskcls_hf.metrics import Evaluator
from maskcls_hf.models.inference_defaults import NO_CLEAN_UP
from tiny import MAX_DEEPLAB, maskcls_config, perpixel_config, pixel_mask

HEIGHT, WIDTH = 64, 96
VALID = [(64, 96), (40, 96), (50, 71)]  # sizes of the images in a batch
CLASSES = {0: "sky", 1: "road", 2: "car", 3: "person", 4: "dog"}


def generator(seed: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(seed if isinstance(seed, int) else zlib.crc32(seed.encode()))


def digest(values: Any) -> dict[str, Any]:
    """A few numbers that change with any value and with any place of a value."""
    values = torch.as_tensor(values)
    result: dict[str, Any] = {"shape": list(values.shape)}
    if values.is_floating_point():
        flat = values.double().flatten()
        waves = torch.cos(torch.arange(len(flat), dtype=torch.float64) * 1.7)
        scale = math.sqrt(max(1, len(flat)))
        return result | {
            "mean": flat.mean().item(),
            "size": flat.abs().mean().item(),
            "waves": (flat @ waves).item() / scale,
        }
    flat = values.long().flatten()
    ids, counts = flat.unique(return_counts=True)
    if len(ids) <= 20:
        result["counts"] = {str(i): n for i, n in zip(ids.tolist(), counts.tolist(), strict=True)}
    return result | {"crc32": zlib.crc32(flat.numpy().tobytes())}


# Losses and their gradients


def seeded(model: nn.Module) -> nn.Module:
    """Weights that depend on their names alone, not on the order in which they are made."""
    with torch.no_grad():
        for name, values in model.state_dict().items():
            if not values.is_floating_point():
                continue
            noise = torch.randn(values.shape, generator=generator(name))
            if values.ndim >= 2:
                gain = 4 if "class_predictor" in name or "queries_embedder" in name else 1.4
                gain = 0.7 if "bbox" in name else gain  # near 0 and 1 boxes would be equal
                values.copy_(noise * gain / math.sqrt(values[0].numel()))
            elif "running_var" in name:
                values.copy_(1 + noise.abs() / 4)
            else:
                values.copy_((1 if name.endswith("weight") else 0) + noise / 4)
    return model.eval()


def blocks(seed: int | str, number: int, size: tuple[int, int]) -> Tensor:
    """Map (H, W) of 0..number-1 and -1, in blocks with ragged borders."""
    coarse = torch.randint(-1, number, (1, 1, 5, 7), generator=generator(seed)).float()
    return F.interpolate(coarse, size=size, mode="nearest")[0, 0].int()


def regions(seed: int | str, number: int, size: tuple[int, int]) -> Tensor:
    """Map (H, W) of 0..number-1 and -1, each in one place: boxes around them differ."""
    points = torch.rand(2, number + 1, 1, 1, generator=generator(seed))
    rows, columns = (torch.arange(length).add(0.5) / length for length in size)
    nearest = ((points[0] - rows[:, None]) ** 2 + (points[1] - columns) ** 2).argmin(0)
    return torch.where(nearest == number, -1, nearest).int()


def stacked(places: Tensor, number: int) -> Tensor:
    return places == torch.arange(number).view(-1, 1, 1)


def labels(form: str, numbers: list[int], distinct: bool) -> dict[str, Any]:
    """Arguments of `forward` for three images; the second one may have no segments."""
    own_sizes = "own sizes" in form
    mask_labels, class_labels = [], []
    for image, (number, valid) in enumerate(zip(numbers, VALID, strict=True)):
        places = regions(f"places {image}", number, valid)
        if not own_sizes:
            places = F.pad(places, (0, WIDTH - valid[1], 0, HEIGHT - valid[0]), value=-1)
        mask_labels.append(places if "map" in form else stacked(places, number))
        choice = generator(f"classes {image}")
        classes = torch.randperm(5, generator=choice) if distinct else torch.randint(5, (number,), generator=choice)
        class_labels.append(classes[:number])
    given: dict[str, Any] = {"mask_labels": mask_labels, "class_labels": class_labels}
    if "padding" in form:
        given["pixel_mask"] = pixel_mask(VALID, (HEIGHT, WIDTH))
    if "void" in form:
        void = blocks("void", 3, (HEIGHT, WIDTH)) == 2
        given["void_mask"] = void.expand(3, -1, -1).clone()
        given["void_mask"][1] = False
    if "counts" in form:
        given["num_items_in_batch"] = 11
    return given


FORMS = (
    "stacks",
    "maps",
    "stacks, padding",
    "maps, padding",
    "stacks, padding, own sizes",
    "maps, padding, own sizes",
    "stacks, padding, void",
    "maps, void",
    "stacks, counts",
)
MODELS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "bipartite": (FORMS, {}),
    "fixed": (FORMS, {"matching": "fixed", "num_queries": 5}),
    "box": (FORMS, {"matching": "box"}),
    "pq": (FORMS, {"matching": "pq"}),
    "Max-DeepLab": (FORMS, MAX_DEEPLAB),
    "bipartite with losses of Max-DeepLab": (
        ("maps, padding, own sizes", "stacks, padding, void"),
        {**MAX_DEEPLAB, "matching": "bipartite", "exclusive_masks": False},
    ),
    "other weights": (
        ("stacks, padding", "maps, padding"),
        {"no_object_weight": 0.4, "mask_weight": 3.0, "dice_weight": 2.0, "cross_entropy_weight": 1.5},
    ),
    "few queries": (("stacks, padding",), {"num_queries": 3}),
    "last layer": (("stacks, padding",), {"deep_supervision": False}),
    "attend to padding": (("stacks, padding", "maps, padding, void"), {"attend_to_padding": True}),
    "encoder": (("stacks, padding",), {"pixel_decoder": "fpn_encoder"}),
    "priors": (("stacks, padding",), {"query_priors": True}),
}


def images() -> Tensor:
    """(3, 3, H, W), 0 in the padding."""
    pixels = torch.randn(3, 3, HEIGHT, WIDTH, generator=generator("images"))
    return pixels * pixel_mask(VALID, (HEIGHT, WIDTH))[:, None]


def gradients(model: nn.Module) -> dict[str, float]:
    """Sum of |gradient| of each part of the model."""
    sums: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        part = ".".join(name.split(".")[:2])
        if parameter.grad is not None:
            sums[part] = sums.get(part, 0.0) + parameter.grad.double().abs().sum().item()
    return sums


def losses() -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, (forms, fields) in MODELS.items():
        model = seeded(MaskClsForUniversalSegmentation(maskcls_config(dropout=0.0, **fields)))
        for form in forms:
            distinct = fields.get("matching") == "fixed"
            numbers = [3, 0, 5 if distinct else 9]
            model.zero_grad()
            outputs = model(images(), **labels(form, numbers, distinct))
            outputs.loss.backward()
            result[f"{name}: {form}"] = {
                "loss": outputs.loss.item(),
                "terms": {term: value.item() for term, value in outputs.loss_dict.items()},
                "gradients": gradients(model),
            }
    model = seeded(MaskClsForUniversalSegmentation(maskcls_config(dropout=0.0)))
    empty = {"mask_labels": [torch.zeros(0, HEIGHT, WIDTH)] * 3, "class_labels": [torch.zeros(0).long()] * 3}
    outputs = model(images(), **empty)
    outputs.loss.backward()
    result["no segments"] = {"loss": outputs.loss.item(), "gradients": gradients(model)}
    return result


def per_pixel() -> dict[str, Any]:
    result = {}
    for decoder in ("fpn", "fpn_encoder"):
        model = seeded(PerPixelForSemanticSegmentation(perpixel_config(dropout=0.0, pixel_decoder=decoder)))
        classes = blocks("semantic", 5, (HEIGHT, WIDTH)).long().expand(3, -1, -1)
        padding = pixel_mask(VALID, (HEIGHT, WIDTH))
        wanted = torch.where((classes < 0) | (padding == 0), 255, classes)
        outputs = model(images(), labels=wanted, pixel_mask=padding)
        outputs.loss.backward()
        result[decoder] = {
            "loss": outputs.loss.item(),
            "logits": digest(outputs.logits.detach()),
            "gradients": gradients(model),
        }
    return result


# Maps


def smooth(seed: str, *shape: int) -> Tensor:
    coarse = torch.randn(1, math.prod(shape[:-2]), 4, 5, generator=generator(seed))
    return F.interpolate(coarse, size=shape[-2:], mode="bicubic", align_corners=False).view(shape)


SEED = 0  # one with which no pixel hangs on rounding: make.py looks


def pairs(jitter: float = 0.0) -> SimpleNamespace:
    """Outputs of a padded batch of two images; `jitter`: what is added to the logits at most."""
    classes = torch.randn(2, 14, 6, generator=generator(f"classes of pairs {SEED}")) * 6
    classes[:, 1::3, 1] += 6  # several of one class of stuff
    masks = smooth(f"masks of pairs {SEED}", 2, 14, 24, 32) * 12 - 11
    for logits in (classes, masks):
        logits += jitter * (2 * torch.rand(logits.shape, generator=generator("jitter")) - 1)
    return SimpleNamespace(
        class_queries_logits=classes,
        masks_queries_logits=masks,
        padded_sizes=torch.tensor([(96, 128), (96, 128)]),
        valid_sizes=torch.tensor([(96, 128), (70, 101)]),
        original_sizes=torch.tensor([(61, 83), (98, 142)]),
    )


def pixels(jitter: float = 0.0) -> SimpleNamespace:
    """Outputs of a per-pixel model, of the same batch."""
    logits = smooth("logits of pixels", 2, 5, 24, 32) * 4
    logits += jitter * (2 * torch.rand(logits.shape, generator=generator("jitter")) - 1)
    sizes = {k: v for k, v in vars(pairs()).items() if k.endswith("sizes")}
    return SimpleNamespace(logits=logits, **sizes)


def one_image(outputs: SimpleNamespace) -> SimpleNamespace:
    """The first image alone, of which no size is known."""
    return SimpleNamespace(**{k: v[:1] for k, v in vars(outputs).items() if not k.endswith("sizes")})


def records(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"segmentation": digest(r["segmentation"]), "segments_info": r["segments_info"]} for r in results]


def semantic_map() -> Callable[..., Tensor]:
    """Of one image: the one thing here that the image processor has no argument for. Its module may move."""
    for module in ("maskcls_hf.models.post_processing", "maskcls_hf.post_processing"):
        if importlib.util.find_spec(module.rpartition(".")[0]) and importlib.util.find_spec(module):
            return importlib.import_module(module).semantic_map
    raise ImportError("post_processing.py is not where it is looked for.")


# How maps were made before image processors could say it.
BEFORE = NO_CLEAN_UP | {"panoptic": NO_CLEAN_UP["panoptic"] | {"threshold": 0.8}}


def maps(jitter: float = 0.0) -> dict[str, Any]:
    processor = MaskClsImageProcessor(label_ids_to_fuse=[0, 1], inference_defaults=BEFORE)
    batch, alone, of_pixels = pairs(jitter), one_image(pairs(jitter)), pixels(jitter)
    result: dict[str, Any] = {}
    for name, outputs, sizes in (
        ("original sizes", batch, None),
        ("one image", alone, None),
        ("one image, larger", alone, [(55, 90)]),
        ("given sizes", batch, [(33, 47), (96, 64)]),
    ):
        semantic = processor.post_process_semantic_segmentation(outputs, sizes)
        scored = processor.post_process_semantic_segmentation(outputs, sizes, return_segmentation_scores=True)
        panoptic, instance = (
            processor.post_process_panoptic_segmentation,
            partial(processor.post_process_instance_segmentation, label_ids_to_fuse=()),
        )
        binary = instance(outputs, 0.02, target_sizes=sizes, return_binary_maps=True)
        coco = instance(outputs, 0.3, target_sizes=sizes, return_coco_annotation=True)
        result[name] = {
            "semantic": [digest(found) for found in semantic],
            "semantic scores": [digest(found.segmentation_scores) for found in scored],
            "panoptic": records(panoptic(outputs, target_sizes=sizes)),
            "panoptic, nothing fused": records(panoptic(outputs, 0.5, 0.4, 0.5, set(), target_sizes=sizes)),
            "panoptic, things fused": records(panoptic(outputs, 0.0, 0.6, 0.0, {2, 3}, target_sizes=sizes)),
            "instance": records(instance(outputs, target_sizes=sizes)),
            "instance, low thresholds": records(instance(outputs, 0.05, 0.3, target_sizes=sizes)),
            "instance, binary": records(binary),
            "instance, coco": [
                [
                    zlib.crc32(rle["counts"]) if isinstance(rle["counts"], bytes) else rle
                    for rle in found["segmentation"]
                ]
                for found in coco
            ],
        }
    result["logits resized"] = [
        digest(semantic_map()(classes, masks, **sizes, resize="logits"))
        for classes, masks in zip(batch.class_queries_logits, batch.masks_queries_logits, strict=True)
        for sizes in (
            {"padded_size": (96, 128), "valid_size": (96, 128), "target_size": (61, 83)},
            {"padded_size": (96, 128), "valid_size": (70, 101), "target_size": (98, 142)},
        )
    ]
    for name, sizes in (("per pixel", None), ("per pixel, given sizes", [(33, 47), (96, 64)])):
        result[name] = {
            "semantic": [digest(found) for found in processor.post_process_semantic_segmentation(of_pixels, sizes)],
            "panoptic": records(processor.post_process_panoptic_segmentation(of_pixels, target_sizes=sizes)),
        }
    return result


# The image processor


def photo(name: str, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8."""
    values = smooth(name, 3, *size).mul(60).add(128).clamp(0, 255)
    return values.permute(1, 2, 0).to(torch.uint8).numpy()


def batch_digest(batch: Any) -> dict[str, Any]:
    return {
        k: [digest(v) for v in values] if isinstance(values, list) else digest(values) for k, values in batch.items()
    }


def processed() -> dict[str, Any]:
    sizes = [(60, 90), (101, 53)]
    photos = [photo(f"photo {i}", size) for i, size in enumerate(sizes)]
    instances = [blocks(f"ids {i}", 6, size).numpy().astype(np.uint8) for i, size in enumerate(sizes)]  # 255: void
    to_class = [{0: None, 1: 2, 2: 2, 3: 1, 4: 3, 5: 5}, {0: 3, 1: 1, 2: None, 3: 0, 4: 4, 5: 1}]
    stacks = [
        np.stack([blocks(f"mask {i} {j}", 2, size).numpy() == 0 for j in range(3)]) for i, size in enumerate(sizes)
    ]
    named = {"segmentation_maps": instances, "instance_id_to_semantic_id": to_class}
    classes = {"segmentation_maps": instances}
    overlapping = {"segmentation_maps": stacks, "class_labels": [[1, 2, 255], [0, 3, 1]]}
    cases: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "shortest edge": ({"size": {"shortest_edge": 48, "longest_edge": 80}}, named),
        "height and width": ({"size": {"height": 64, "width": 40}}, named),
        "at most": ({"size": {"max_height": 50, "max_width": 50}}, named),
        "longest edge": ({"size": {"longest_edge": 57}}, classes),
        "bicubic": ({"size": {"shortest_edge": 75, "longest_edge": 200}, "resample": 3}, classes),
        "no resize": ({"do_resize": False}, named),
        "pad size": ({"do_resize": False, "pad_size": {"height": 128, "width": 160}}, classes),
        "no divisor": ({"size": {"shortest_edge": 48, "longest_edge": 80}, "size_divisor": None}, classes),
        "offset": ({"size": {"shortest_edge": 48, "longest_edge": 80}, "label_offset": 1}, classes),
        "no void": ({"do_resize": False, "void_id": None}, classes),
        "overlap": ({"size": {"shortest_edge": 48, "longest_edge": 80}}, overlapping),
        "contrast, BGR": ({"do_resize": False, "do_autocontrast": True, "do_flip_channel_order": True}, classes),
    }
    result: dict[str, Any] = {}
    for name, (options, annotations) in cases.items():
        processor = MaskClsImageProcessor(**options)
        for label_format in ("segments", "segment_map", "semantic"):
            if label_format == "semantic" and name in ("no void", "overlap"):  # which it refuses
                continue
            batch = processor(photos, **annotations, label_format=label_format, return_tensors="pt")
            found = batch_digest(batch)
            if label_format != "segments":
                found = {key: value for key, value in found.items() if key not in ("pixel_values", "pixel_mask")}
            result[f"{name}: {label_format}"] = found
    return result


# Scores


def write_panoptic(folder: Path) -> list[tuple[Tensor, dict[int, int]]]:
    """A COCO panoptic set of three images with stuff, things, a crowd and void; map of places and classes of each."""
    truths, annotations, files = [], [], []
    (folder / "annotations" / "panoptic_val").mkdir(parents=True)
    (folder / "val").mkdir()
    for image, size in enumerate([(60, 80), (80, 52), (64, 64)]):
        places = blocks(f"truth {image}", 7, size)
        classes = {j: (0, 1, 2, 2, 3, 3, 4)[j] for j in places.unique().tolist() if j >= 0}
        truths.append((places, classes))
        ids = np.where(places < 0, 0, 1000 + 300 * places.numpy())
        colors = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
        Image.fromarray(colors).save(folder / "annotations" / "panoptic_val" / f"{image}.png")
        Image.fromarray(photo(f"photo {image}", size)).save(folder / "val" / f"{image}.jpg")
        segments = [
            {
                "id": 1000 + 300 * j,
                "category_id": label + 1,
                "iscrowd": int(j == 5),
                "area": int((places == j).sum()),
                "bbox": [0, 0, size[1], size[0]],
            }
            for j, label in classes.items()
        ]
        files.append({"id": image, "file_name": f"{image}.jpg", "height": size[0], "width": size[1]})
        annotations.append({"image_id": image, "file_name": f"{image}.png", "segments_info": segments})
    categories = [{"id": label + 1, "name": name, "isthing": int(label > 1)} for label, name in CLASSES.items()]
    content = {"images": files, "annotations": annotations, "categories": categories}
    (folder / "annotations" / "panoptic_val.json").write_text(json.dumps(content))
    return truths


def guesses(truths: list[tuple[Tensor, dict[int, int]]], jitter: float = 0.0) -> list[SimpleNamespace]:
    """Outputs of each image that resemble its truth: moved, noisy, with a few wrong classes."""
    outputs = []
    for image, (places, classes) in enumerate(truths):
        size = (places.shape[0] // 2, places.shape[1] // 2)
        choice = generator(f"guess {image}")
        masks, logits = [], []
        for j, label in [*classes.items(), *list(classes.items())[:2]]:
            shift = torch.randint(-2, 3, (2,), generator=choice).tolist()
            mask = (places == j).float().roll(shift, (0, 1))[None, None]
            masks.append(F.interpolate(mask, size=size, mode="bilinear", antialias=True)[0, 0] * 14 - 7)
            wrong = int(torch.rand((), generator=choice) < 0.2)
            logits.append(5 * F.one_hot(torch.tensor((label + wrong) % 5), 6) + torch.randn(6, generator=choice))
        noise = smooth(f"noise {image}", len(masks), *size) * 2
        masks_logits = torch.stack(masks) + noise
        masks_logits += jitter * (2 * torch.rand(masks_logits.shape, generator=generator("jitter")) - 1)
        outputs.append(
            SimpleNamespace(
                class_queries_logits=torch.stack(logits)[None],
                masks_queries_logits=masks_logits[None],
                padded_sizes=torch.tensor([[96, 96]]),
                valid_sizes=torch.tensor([[96, 90]]),
            )
        )
    return outputs


def scores(jitter: float = 0.0) -> dict[str, Any]:
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        outputs = guesses(write_panoptic(Path(folder)), jitter)
        processor = MaskClsImageProcessor(label_ids_to_fuse=[0, 1], inference_defaults=BEFORE)
        data = open_dataset(folder, "val", layout="coco_panoptic")
        truths = [MaskClsCollator(processor, keep_ground_truth=True)([sample])["ground_truth"] for sample in data]
        for name, options in {
            "all": {"boundary": True},
            "low thresholds": {"threshold": 0.3, "mask_threshold": 0.4, "overlap_threshold": 0.2, "max_detections": 2},
        }.items():
            evaluator = Evaluator(processor, CLASSES, [0, 1], ("semantic", "panoptic", "instance"), **options)
            for of_image, truth in zip(outputs, truths, strict=True):
                evaluator.add(evaluator.measure(of_image, truth))
            result[name] = {"scores": dict(evaluator.compute()), "per class": evaluator.per_class()}
    return result


GROUPS: dict[str, Callable[[], dict[str, Any]]] = {
    "losses": losses,
    "per pixel": per_pixel,
    "maps": maps,
    "image processor": processed,
    "scores": scores,
}
