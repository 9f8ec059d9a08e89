"""What is timed: each stage does the same work with transformers' MaskFormer and with this package, on the same weights
and inputs. The first contender is transformers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from examples import (
    GRID,
    PADDED,
    VALID,
    blobs,
    facade_outputs,
    noisy_predictions,
    outputs,
    photo,
    predictions,
    unsure_predictions,
)
from measuring import Contenders
from transformers import (
    DetrConfig,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessor,
    PreTrainedConfig,
    ResNetConfig,
    SwinConfig,
    pipeline,
)

from maskcls_hf import MaskClsForUniversalSegmentation, MaskClsImageProcessor
from maskcls_hf.inference import Predictor
from maskcls_hf.models.inference_defaults import NO_CLEAN_UP
from maskcls_hf.models.transformer_decoders import SegmentLogits

STAGES = ["stage1", "stage2", "stage3", "stage4"]
BACKBONES: dict[str, Callable[[], PreTrainedConfig]] = {
    "R50": lambda: ResNetConfig(out_features=STAGES),
    "Swin-T": lambda: SwinConfig(out_features=STAGES),
}
HD, UHD = (1080, 1920), (2160, 3840)
QUERIES, KEPT = 100, 40
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Stage:
    """Something to time, and how far ahead of transformers it is meant to be."""

    name: str
    contenders: Contenders
    ratio: float | None = None  # of times, at least
    memory_ratio: float | None = 1  # of peak memory, at least
    note: str = ""
    ratio_on_gpu: float | None = None
    memory_ratio_on_gpu: float | None = 1
    device: str = DEVICE  # whose memory is measured
    apart: Callable[[str], int | None] | None = None  # peak memory of a contender, in a process of its own

    @property
    def wanted(self) -> tuple[float | None, float | None]:
        """The ratios of times and of peak memory, on the machine that this is."""
        if DEVICE == "cuda":
            return self.ratio_on_gpu, self.memory_ratio_on_gpu
        return self.ratio, self.memory_ratio


def processors() -> tuple[MaskFormerImageProcessor, MaskClsImageProcessor]:
    size = {"shortest_edge": 512, "longest_edge": 2048}
    ours = MaskClsImageProcessor(size=size, label_ids_to_fuse=[], inference_defaults=NO_CLEAN_UP)  # the same work
    return MaskFormerImageProcessor(size=size), ours


def maps(task: str, pair: tuple[torch.Tensor, torch.Tensor], size: tuple[int, int], **options: Any) -> Contenders:
    """Post-processing of one image."""
    return maps_of_outputs(task, outputs(tuple(logits.to(DEVICE) for logits in pair), PADDED, VALID), size, **options)


def maps_of_outputs(task: str, results: Any, size: tuple[int, int], **options: Any) -> Contenders:
    theirs, ours = processors()
    name = f"post_process_{task}_segmentation"
    return {
        "transformers": lambda: getattr(theirs, name)(results, target_sizes=[size], **options),
        "maskcls_hf": lambda: getattr(ours, name)(results, target_sizes=[size], **options),
    }


def map_stages() -> Iterator[Stage]:
    rng = np.random.default_rng(0)
    semantic, panoptic = (predictions(GRID, QUERIES, labels, KEPT, rng) for labels in (150, 133))
    fuse = {"label_ids_to_fuse": set(range(80, 133))}
    yield Stage("semantic map, 150 classes, 1080p", maps("semantic", semantic, HD), 8, ratio_on_gpu=3)
    yield Stage("semantic map, 150 classes, 4K", maps("semantic", semantic, UHD), 10, 10, ratio_on_gpu=3)
    yield Stage("panoptic map, 133 classes, 1080p", maps("panoptic", panoptic, HD, **fuse), 6, ratio_on_gpu=6)
    yield Stage("panoptic map, 133 classes, 4K", maps("panoptic", panoptic, UHD, **fuse), 10, 10, ratio_on_gpu=6)
    yield Stage("instance segments, 1080p", maps("instance", panoptic, HD), 5, ratio_on_gpu=6)
    yield Stage("instance segments, 4K", maps("instance", panoptic, UHD), None, 10, ratio_on_gpu=6)
    noise = unsure_predictions(GRID, QUERIES, 150, rng)
    untrained = "noise, as of an untrained network"
    yield Stage("semantic map, 1080p, worst case", maps("semantic", noise, HD), 1, note=untrained, ratio_on_gpu=1.5)
    calls = maps("panoptic", noise, HD, threshold=0.0, **fuse)
    yield Stage("panoptic map, 1080p, worst case", calls, 1, note=untrained, ratio_on_gpu=2)


def real_map_stages() -> Iterator[Stage]:
    """Of networks that are less sure than the inputs of `map_stages`."""
    size, padded = (1080, 1440), (512, 704)
    pair = noisy_predictions((128, 176), QUERIES, 150, KEPT, np.random.default_rng(0))
    noisy = outputs(tuple(logits.to(DEVICE) for logits in pair), padded, (512, 683))
    facades = facade_outputs(HD)
    for task, options in (("semantic", {}), ("panoptic", {"label_ids_to_fuse": set()}), ("instance", {})):
        yield Stage(
            f"{task}, smooth masks with noise, 150 classes, 1080 x 1440",
            maps_of_outputs(task, noisy, size, **options),
            5,
        )
        if facades is not None:
            yield Stage(
                f"{task}, outputs of a network trained on facades, 1080p",
                maps_of_outputs(task, facades, HD, **options),
                5,
            )


def models(backbone: PreTrainedConfig, labels: int, **options: Any) -> tuple[Any, Any]:
    """transformers' model with random weights, and ours with the same."""
    torch.manual_seed(0)
    decoder = DetrConfig(num_queries=QUERIES)
    config = MaskFormerConfig(backbone_config=backbone, decoder_config=decoder, num_labels=labels, **options)
    theirs = MaskFormerForInstanceSegmentation(config)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = MaskClsForUniversalSegmentation.from_pretrained(folder)
    return theirs.to(DEVICE), ours.to(DEVICE)


@contextmanager
def exact() -> Iterator[None]:
    """Inside, a GPU's products are made in float32, not in TF32; nothing changes on a CPU."""
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


IMAGE = (1, 3, 512, 704)


@torch.inference_mode()
def mask_logits(model: Any, image: torch.Tensor) -> torch.Tensor:
    return model(pixel_values=image).masks_queries_logits


def forward_stages() -> Iterator[Stage]:
    for name, backbone in BACKBONES.items():
        theirs, ours = (model.eval() for model in models(backbone(), 150))
        image = torch.randn(IMAGE, device=DEVICE)
        with exact():
            difference = (mask_logits(theirs, image) - mask_logits(ours, image)).abs().max().item()
        assert difference < 1e-3, f"the networks differ by {difference:.1e}"
        calls = {"transformers": partial(mask_logits, theirs, image), "maskcls_hf": partial(mask_logits, ours, image)}
        yield Stage(f"forward, {name}, 512 x 704", calls, 1.1, ratio_on_gpu=1.2)


def compiled_stages() -> Iterator[Stage]:
    """On a GPU: on a CPU compiling takes minutes."""
    for name, backbone in BACKBONES.items() if DEVICE == "cuda" else ():
        theirs, ours = (model.eval() for model in models(backbone(), 150))
        image = torch.randn(IMAGE, device=DEVICE)
        network = Predictor(ours, processors()[1], compile=True).network
        difference = (mask_logits(theirs, image) - mask_logits(network, image)).abs().max().item()
        assert difference < 0.1, f"the compiled network differs by {difference:.1e}"
        assert network.compiled is not None, "it could not be compiled"
        calls = {
            "transformers": partial(mask_logits, theirs, image),
            "maskcls_hf": partial(mask_logits, network, image),
        }
        note = "transformers' as it is, ours by Predictor(compile=True)"
        yield Stage(f"forward, {name}, 512 x 704, compiled", calls, note=note, ratio_on_gpu=2)


def end_to_end_stages() -> Iterator[Stage]:
    """A photo in, a panoptic map out. The weights are random, so that what the network finds is exchanged for what a
    trained one would find: 40 segments."""
    rng = np.random.default_rng(0)
    image = photo(HD, blobs(HD, KEPT, rng), rng)
    class_logits, mask_logits = (logits[None].to(DEVICE) for logits in predictions(GRID, QUERIES, 133, KEPT, rng))

    def answer_as_if_trained(model: Any, inputs: Any, found: Any) -> None:
        found.class_queries_logits, found.masks_queries_logits = class_logits, mask_logits

    theirs, ours = (model.eval() for model in models(BACKBONES["R50"](), 133))
    for model in (theirs, ours):
        model.register_forward_hook(answer_as_if_trained)
    segmenters = [
        pipeline("image-segmentation", model=model, image_processor=processor, device=DEVICE, subtask="panoptic")
        for model, processor in zip((theirs, ours), processors(), strict=True)
    ]
    predictor = Predictor(ours, processors()[1])
    calls = {
        "transformers": lambda: segmenters[0](image, threshold=0.5),
        "maskcls_hf": lambda: predictor(image, "panoptic", threshold=0.5),
    }
    note = "transformers' pipeline beside our Predictor"
    yield Stage("photo to panoptic map, R50, 1080p", calls, 2, note=note, ratio_on_gpu=15)
    calls = calls | {"maskcls_hf": lambda: segmenters[1](image, threshold=0.5)}
    note = "the pipeline with each model"
    yield Stage("photo to panoptic masks, R50, 1080p, in pipeline", calls, 1, note=note, ratio_on_gpu=1)


def annotation(size: tuple[int, int], segments: int, labels: int, rng: np.random.Generator) -> tuple[Any, Any]:
    """Masks (M, H, W) bool and classes (M,)."""
    places = torch.from_numpy(blobs(size, segments, rng))
    masks = places == torch.arange(segments)[:, None, None]
    return masks.to(DEVICE), torch.from_numpy(rng.integers(0, labels, segments)).to(DEVICE)


def criterion_stages() -> Iterator[Stage]:
    """Six layers, two images of 16 segments at 512 x 512."""
    rng = np.random.default_rng(0)
    options = dict(use_auxiliary_loss=True)
    theirs, ours = models(ResNetConfig(out_features=STAGES, depths=[1, 1, 1, 1]), 150, **options)
    annotations = [annotation((512, 512), 16, 150, rng) for _ in range(2)]
    masks, labels = ([pair[part] for pair in annotations] for part in (0, 1))
    float_masks = [mask.float() for mask in masks]
    layers = []
    for _ in range(6):
        pairs = [predictions((128, 128), QUERIES, 150, 16, rng) for _ in range(2)]
        layers.append([torch.stack(logits).to(DEVICE).requires_grad_() for logits in zip(*pairs, strict=True)])

    def transformers_loss() -> None:
        inner = [{"class_queries_logits": c, "masks_queries_logits": m} for c, m in layers[:-1]]
        classes, logits = layers[-1]
        terms = theirs.get_loss_dict(logits, classes, float_masks, labels, inner)
        theirs.get_loss(terms).backward()

    def our_loss() -> None:
        ours.criterion.total(ours.criterion([SegmentLogits(*layer) for layer in layers], masks, labels)).backward()

    calls = {"transformers": transformers_loss, "maskcls_hf": our_loss}
    yield Stage("criterion, forward and backward, 6 layers", calls, 4, 3, ratio_on_gpu=5)


def training_stages() -> Iterator[Stage]:
    rng = np.random.default_rng(0)
    batch = 2 if DEVICE == "cpu" else 16
    annotations = [annotation((512, 512), 16, 150, rng) for _ in range(batch)]
    masks, labels = ([pair[part] for pair in annotations] for part in (0, 1))
    images = torch.randn(batch, 3, 512, 512, device=DEVICE)
    pair = models(BACKBONES["R50"](), 150, use_auxiliary_loss=True)
    float_masks = [mask.float() for mask in masks]

    def step(model: Any, optimizer: torch.optim.Optimizer, masks: list[torch.Tensor]) -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE != "cpu"):
            # transformers' losses of the inner layers need its hidden states in the output
            loss = model(images, masks, labels, output_hidden_states=True).loss
        loss.backward()
        optimizer.step()

    calls = {}
    for name, model, targets in zip(("transformers", "maskcls_hf"), pair, (float_masks, masks), strict=True):
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        calls[name] = lambda m=model, o=optimizer, t=targets: step(m, o, t)
    where = "" if DEVICE == "cpu" else ", bf16"
    name = f"training step, R50, {batch} x 512 x 512{where}"
    yield Stage(name, calls, 1.5, ratio_on_gpu=2.5, memory_ratio_on_gpu=1 / 0.45)


def preprocessing_stages() -> Iterator[Stage]:
    """Of a PIL image and map: on the CPU, and where there is a GPU also resized and normalized there by both."""
    rng = np.random.default_rng(0)
    for name, shape in (("683 x 512", (512, 683)), ("1080p", HD)):
        places = blobs(shape, 16, rng)
        image = photo(shape, places, rng)
        semantic = rng.permutation(150)[:16][places].astype(np.uint8)
        theirs, ours = processors()
        for device in dict.fromkeys(["cpu", DEVICE]):
            options = {} if device == "cpu" else {"device": device}
            calls = [
                partial(processor, image, semantic, return_tensors="pt", **options) for processor in (theirs, ours)
            ]
            if options:  # on a GPU theirs looks for the map by the shape of the image, and finds none
                calls[0] = partial(calls[0], disable_grouping=True)
            contenders = dict(zip(("transformers", "maskcls_hf"), calls, strict=True))
            where = "" if device == "cpu" else ", on the GPU"
            stage = f"preprocessing, image and segmentation map, {name}{where}"
            yield Stage(stage, contenders, 3, ratio_on_gpu=3, device=device)


GROUPS: dict[str, Callable[[], Iterator[Stage]]] = {
    "maps": map_stages,
    "real maps": real_map_stages,
    "forward": forward_stages,
    "end to end": end_to_end_stages,
    "criterion": criterion_stages,
    "training": training_stages,
    "preprocessing": preprocessing_stages,
    "compiled": compiled_stages,
}
