"""What every family of models does, from its network to its maps and its training: one table, see families.py."""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import SwinConfig, pipeline
from transformers.modeling_layers import GradientCheckpointingLayer

from checkpoints import picture
from distributed import run_in_processes
from families import CLASSES, FAMILIES, STUFF, VARIANTS, Family, converted
from maskcls_hf import MaskClsForUniversalSegmentation
from maskcls_hf.inference import Predictor, evaluate
from maskcls_hf.metrics import Evaluator
from maskcls_hf.models.deformable_attention import reference_points
from maskcls_hf.models.layers import sine_positions
from maskcls_hf.models.losses import MaskClsCriterion
from maskcls_hf.models.matching import Predictions, prepare_targets
from maskcls_hf.models.transformer_decoders import SegmentLogits
from resumable import make_trainer
from samples import sample_of
from tiny import STAGES, maskcls_config, pad_labels, pixel_mask, segments
from without_package import masks_of

TRACED = [*FAMILIES, "maskformer_fpn_encoder", "maskformer_swin", "max_deeplab", "mask2former_swin"]
SLOWLY_TRACED = {*TRACED} - {"maskformer_fpn_encoder", "eomt_dinov3"}


def each(names, slow=()):
    return pytest.mark.parametrize(
        "family", [pytest.param(n, marks=pytest.mark.slow) if n in slow else n for n in names], indirect=True
    )


every_family = each(FAMILIES)
every_network = each([*FAMILIES, *VARIANTS])
traced = each(TRACED, slow=SLOWLY_TRACED)


@pytest.fixture
def family(request) -> Family:
    of_name = (FAMILIES | VARIANTS)[request.param]
    if request.function.__name__ in of_name.exempt:
        pytest.skip(f"{request.param}: {of_name.exempt[request.function.__name__]}")
    return of_name


def test_nothing_is_exempt_from_a_test_that_there_is_not():
    tests = {name for name, _ in inspect.getmembers(inspect.getmodule(every_family)) if name.startswith("test_")}
    tests |= {name for name in globals() if name.startswith("test_")}
    assert all(set(of_name.exempt) <= tests for of_name in (FAMILIES | VARIANTS).values())


def assert_same(found, expected, names, exactly: bool = False) -> None:
    tolerance = {"atol": 0.0, "rtol": 0.0} if exactly else {"atol": 1e-5, "rtol": 1e-4}
    for name in names:
        torch.testing.assert_close(found[name], expected[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


# ---- the network ----


@every_network
def test_every_parameter_learns(family):
    model = family.model().train()
    loss = model(**family.batch()).loss
    loss.backward()
    assert loss.isfinite()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@every_network
def test_eval_returns_only_what_was_asked_for(family):
    output = family.model().eval()(**family.inputs())
    for name in ("loss", "loss_dict", "auxiliary_logits", "hidden_states", "attentions"):
        assert output.get(name) is None


@every_network
def test_save_and_load(family, tmp_path):
    model = family.model().eval()
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same(loaded(**family.inputs()), model(**family.inputs()), family.outputs, exactly=True)


@every_network
def test_tuple_output_starts_with_the_loss(family):
    model, batch, inputs = family.model().eval(), family.batch(), family.inputs()
    torch.manual_seed(0)  # of points
    first = model(**batch, return_dict=False)[0]
    torch.manual_seed(0)
    torch.testing.assert_close(first, model(**batch).loss)
    torch.testing.assert_close(model(**inputs, return_dict=False)[0], model(**inputs)[family.outputs[0]])


@every_network
def test_gradient_checkpointing_changes_nothing(family):
    gradients = []
    for checkpointing in (False, True):
        model = family.model(dropout=0.0).train()
        if checkpointing:
            checkpointed = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
            assert checkpointed
            model.gradient_checkpointing_enable()
            assert all(layer.gradient_checkpointing for layer in checkpointed)
        torch.manual_seed(0)  # of points, and of dropout in networks that have their own
        model(**family.batch()).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@every_network
def test_eager_attention_equals_sdpa(family, tmp_path):
    model, inputs = family.model().eval(), family.inputs()
    assert model.config._attn_implementation == "sdpa"
    expected = model(**inputs)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="sdpa")
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager" and loaded.config._attn_implementation == "sdpa"
    assert_same(model(**inputs), expected, family.outputs)
    assert_same(loaded(**inputs), expected, family.outputs, exactly=True)
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "sdpa"


@every_network
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trains_in_low_precision(family, dtype):
    model = family.model().train()
    with torch.autocast("cpu", dtype=dtype):
        loss = model(**family.batch()).loss
    assert loss.dtype == torch.float32 and loss.isfinite()
    (loss / 64).backward()  # float16 overflows in a Swin otherwise; GradScaler finds such a factor
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@every_network
def test_runs_in_bfloat16(family):
    """With its weights in bfloat16, and under autocast; masks stay where they are in float32."""
    model, inputs = family.model().eval(), family.inputs()
    half = inputs | {"pixel_values": inputs["pixel_values"].bfloat16()}
    with torch.no_grad():
        expected = model(**inputs)
        with torch.autocast("cpu", torch.bfloat16):
            found = [model(**inputs)]
        found.append(model.to(torch.bfloat16)(**half))
    assert all(found[1][name].dtype == torch.bfloat16 for name in family.outputs)
    for output in found:
        assert all(output[name].isfinite().all() for name in family.outputs)
        both = torch.stack([o[family.outputs[-1]].float().flatten() for o in (output, expected)])
        assert torch.corrcoef(both)[0, 1] > 0.98


@every_network
def test_training_lowers_the_loss(family):
    model, batch = family.model(dropout=0.0).train(), family.batch()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(8):
        torch.manual_seed(0)
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all() and losses[-1] < 0.9 * losses[0]


@every_network
@pytest.mark.parametrize("padded", [(64, 128), (128, 160)])
def test_an_image_gives_the_same_alone_and_in_a_batch(family, padded):
    """Beside a larger one. A network that looks at padding: as alone in the size of that batch, whatever is beside."""
    model, size = family.model().eval(), (50, 70)
    alone = padded if family.sees_padding else (64, 96)
    batch = family.batch((3, 2))
    image = torch.randn(3, *size)

    def run(shape, beside: bool):
        values = torch.zeros(1, 3, *shape)
        values[0, :, : size[0], : size[1]] = image
        mask = pixel_mask([size], shape)
        if beside:
            values = torch.cat([values, torch.randn(1, 3, *shape)])
            mask = pixel_mask([size, shape], shape)
        with torch.no_grad():
            return model(values, pixel_mask=mask)

    assert len(batch["pixel_values"]) == 2
    one, other = run(alone, beside=False), run(padded, beside=True)
    for name in family.outputs:
        found, expected = other[name][:1], one[name]
        if found.ndim == 4:  # up to a cell beyond the border
            found, expected = (maps[..., :13, :18] for maps in (found, expected))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@each([name for name in (*FAMILIES, *VARIANTS) if not (FAMILIES | VARIANTS)[name].sees_padding])
@pytest.mark.parametrize("padded", [(64, 128), (128, 160)])
def test_padding_changes_no_loss(family, padded):
    model, size = family.model(**({"loss_points": None} if family.finds_segments else {})).eval(), (50, 70)
    masks, labels = segments([size], [3])
    labels = labels if family.class_labels is None else [torch.tensor(family.class_labels)]
    image = torch.randn(1, 3, *size)

    def run(shape):
        values = F.pad(image, (0, shape[1] - size[1], 0, shape[0] - size[0]))
        if family.finds_segments:
            return model(values, pad_labels(masks, shape), labels, pixel_mask=pixel_mask([size], shape))
        of_pixels = torch.full((1, *shape), 255)
        of_pixels[:, : size[0], : size[1]] = masks[0][0]
        return model(values, of_pixels, pixel_mask=pixel_mask([size], shape))

    one, other = run((64, 96)), run(padded)
    assert_same(other.loss_dict, one.loss_dict, one.loss_dict)
    maps = [F.interpolate(o[family.outputs[min(1, len(family.outputs) - 1)]], size=shape, mode="bilinear")
            for o, shape in ((one, (64, 96)), (other, padded))]  # fmt: skip
    torch.testing.assert_close(*(m[..., : size[0], : size[1]] for m in maps), atol=1e-5, rtol=1e-4)


class TestPlacesStayInFloat32:
    """bfloat16 cannot hold x.5 above 128."""

    def test_reference_points_and_sine_positions(self):
        family, seen = FAMILIES["mask2former"], []
        model = family.model().eval().to(torch.bfloat16)
        image = torch.randn(1, 3, 64, 96)
        layer = model.model.pixel_decoder.layers[0]
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
        with torch.no_grad():
            model(image.bfloat16())
            expected = reference_points([(2, 3), (4, 6), (8, 12)], None, torch.empty(0))
        assert seen[0].dtype == torch.float32
        torch.testing.assert_close(seen[0], expected)
        features = torch.zeros(1, 32, 300, 2)
        half = sine_positions(features.bfloat16(), None)
        torch.testing.assert_close(half, sine_positions(features, None).bfloat16(), rtol=0, atol=0)

    @pytest.mark.parametrize("convert", ["to", "bfloat16", "half"])
    def test_rotary_frequencies(self, convert):
        model = FAMILIES["eomt_dinov3"].model()
        expected = model.model.encoder.vit.rope_embeddings.inv_freq.clone()
        converted_to = {"to": lambda: model.to(torch.bfloat16), "bfloat16": model.bfloat16, "half": model.half}
        assert converted_to[convert]() is model and model.dtype != torch.float32
        assert torch.equal(model.model.encoder.vit.rope_embeddings.inv_freq, expected)

    @pytest.mark.parametrize("name", ["mask2former", "mask2former_swin"])
    def test_the_pixel_decoder_under_autocast(self, name):
        """Of the same feature maps it makes the same, in float32."""
        model = (FAMILIES | VARIANTS)[name].model().eval()
        channels = model.model.backbone.channels
        maps = [torch.randn(1, c, 2**n, 2**n) for c, n in zip(channels, (4, 3, 2, 1), strict=True)]
        with torch.no_grad():
            expected = model.model.pixel_decoder(maps)
            with torch.autocast("cpu", torch.bfloat16):
                found = model.model.pixel_decoder(maps)
        for one, other in zip(found.pyramid, expected.pyramid, strict=True):
            assert one.dtype == torch.float32
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_windows_of_swin_as_large_as_the_map_are_shifted():
    """At 384 pixels with windows of 12 the coarsest map is one window, which the paper's code shifts by 6: cells see
    their quadrant alone. Small images change no window for later ones."""
    backbone = SwinConfig(embed_dim=8, depths=[1, 1, 1, 2], num_heads=[1, 1, 1, 1], window_size=12, out_features=STAGES)
    torch.manual_seed(0)
    model = MaskClsForUniversalSegmentation(maskcls_config(backbone_config=backbone)).eval()
    layers = [m for m in model.modules() if type(m).__name__ == "SwinLayer"]
    cells = {}

    def keep(_, inputs, output):
        cells["in"], cells["out"] = inputs[0], output[0] if isinstance(output, tuple) else output

    layers[-1].register_forward_hook(keep)
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 96))
    assert {layer.window_size for layer in layers} == {12} and layers[-1].shift_size == 6
    model(torch.randn(1, 3, 384, 384))
    assert cells["in"].shape == (1, 144, 64)
    for row, column in ((0, 0), (5, 6), (11, 11), (6, 3)):
        (seen,) = torch.autograd.grad(cells["out"][0, row * 12 + column].sum(), cells["in"], retain_graph=True)
        quadrant = torch.zeros(12, 12, dtype=torch.bool)
        quadrant[row // 6 * 6 : row // 6 * 6 + 6, column // 6 * 6 : column // 6 * 6 + 6] = True
        assert torch.equal(seen[0].abs().sum(-1).view(12, 12) > 0, quadrant)


# ---- traced ----


def as_traced(family: Family, model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    """What a model gives that is compiled or exported."""
    before = model.config.attend_to_padding
    model.config.attend_to_padding |= family.traced_sees_padding
    outputs = model(**inputs)
    model.config.attend_to_padding = before
    return outputs


@traced
def test_compiles_without_graph_breaks(family):
    model, inputs = family.model().eval(), family.inputs()
    torch._dynamo.reset()  # else a limit of compilations may be reached, of all tests together
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        # At first: transformers takes a lock in the first call of some models.
        expected = as_traced(family, model, inputs)
        assert_same(compiled(**inputs), expected, family.outputs)


@traced
def test_exports_with_dynamic_batch_and_size(family):
    """And with the fixed size of the example, in the same program."""
    model, inputs, any_size = family.model().eval(), family.inputs(), torch.export.Dim.DYNAMIC
    dynamic = {0: any_size} if family.one_size else {0: any_size, 2: any_size, 3: any_size}
    shapes = {"pixel_values": dynamic, "pixel_mask": {max(0, dim - 1): size for dim, size in dynamic.items()}}
    if family.one_size:
        other = {name: torch.cat([tensor, tensor[:1]]) for name, tensor in inputs.items()}
    else:
        sizes = [(96, 160), (90, 100), (64, 150)]
        other = {"pixel_values": torch.randn(3, 3, 96, 160), "pixel_mask": pixel_mask(sizes, (96, 160))}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
        for given in (inputs, other):
            assert_same(program.module()(**given), as_traced(family, model, given), family.outputs)


@each(TRACED, slow=SLOWLY_TRACED - {"mask2former"})
def test_exports_one_shape(family):
    model, inputs = family.model().eval(), family.inputs()
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, strict=False)
        assert_same(program.module()(**inputs), as_traced(family, model, inputs), family.outputs)


# ---- maps ----


@cache
def found_in(name: str) -> tuple:
    """A model that finds something in the picture, its image processor, and its outputs."""
    family = FAMILIES[name]
    model, processor = family.sure_model(picture()), family.processor()
    with torch.no_grad():
        return model, processor, model(**processor(picture(), return_tensors="pt"))


@pytest.fixture
def found(request, family) -> SimpleNamespace:
    model, processor, outputs = found_in(request.node.callspec.params["family"])
    return SimpleNamespace(model=model, processor=processor, outputs=outputs)


def maps_of(family: Family, found) -> Iterator[tuple[str, torch.Tensor, list]]:
    """Of each task what the image processor makes of the outputs."""
    for task, options in family.tasks.items():
        result = getattr(found.processor, f"post_process_{task}_segmentation")(found.outputs, **options)[0]
        if task == "semantic":
            yield task, result, []
        else:
            yield task, result["segmentation"], result["segments_info"]


@every_family
@pytest.mark.parametrize("tile", [None, 512])
def test_predictor_gives_what_model_and_image_processor_do(family, found, tile):
    """Whole, and in one tile."""
    predict = Predictor(found.model, found.processor, tile=tile)
    results = predict.predict(picture(), family.tasks)[0]
    for task, pixels, infos in maps_of(family, found):
        assert torch.equal(results[task]["segmentation"], pixels)
        assert len(pixels.unique()) > 1
        if task != "semantic":
            assert results[task]["segments_info"] == infos and len(infos) > 1
        assert torch.equal(predict(picture(), task, **family.tasks[task])["segmentation"], pixels)
    if not family.finds_segments:
        with pytest.raises(ValueError, match="knows no segments"):
            predict(picture(), "panoptic")


@every_family
def test_tiles(family, found):
    """Every pixel has its segment, and every segment its pixels."""
    predict = Predictor(found.model, found.processor, tile=48, overlap=0.25)
    results = predict.predict(picture(96, 120), family.tasks)[0]
    for task, result in results.items():
        pixels, infos = result["segmentation"], result["segments_info"]
        assert pixels.shape == (96, 120) and infos
        key = "label_id" if task == "semantic" else "id"
        areas = {info[key]: info["area"] for info in infos if "area" in info}
        counted = dict(zip(*(v.tolist() for v in pixels.unique(return_counts=True)), strict=True))
        assert all(counted.get(number) == area for number, area in areas.items()) or task == "instance"
        if task != "instance":
            assert set(counted) - {0, -1} <= {info[key] for info in infos}


@every_family
def test_pipeline_of_transformers(family, found):
    pipe = pipeline("image-segmentation", model=found.model, image_processor=found.processor, device="cpu")
    for task, pixels, infos in maps_of(family, found):
        segments = pipe(picture(), subtask=task, **family.tasks[task])
        masks = np.stack([np.asarray(segment["mask"]) > 0 for segment in segments])  # (n, H, W)
        numbers = pixels.unique().tolist() if task == "semantic" else [info["id"] for info in infos]
        labels = numbers if task == "semantic" else [info["label_id"] for info in infos]
        names = [CLASSES[label] for label in labels]
        assert [segment["label"] for segment in segments] == names and len(names) > 1
        if task != "instance":
            np.testing.assert_array_equal(masks, [pixels.numpy() == number for number in numbers])
    if not family.finds_segments:
        with pytest.raises(ValueError, match="subtask='semantic'"):
            pipe(picture(), subtask="instance")


class Data(list):
    id2label = CLASSES


@every_family
def test_evaluation(family, found):
    """Of data that shows just what the model finds: the best scores that there are."""
    predictor = Predictor(found.model, found.processor)
    image = torch.from_numpy(np.array(picture())).permute(2, 0, 1)
    for task, name in zip(family.tasks, ("mean_iou", "pq", "ap"), strict=False):
        score = Evaluator(found.processor, CLASSES, STUFF, tasks=(task,), threshold=0.5, overlap_threshold=0.0)
        result = predictor.predict(image, score.options)[0][task]
        pixels, classes = result["segmentation"], None
        if task != "semantic":
            classes = {info["id"]: info["label_id"] for info in result["segments_info"]}
        if task == "panoptic":
            classes |= {0: None}
        if task == "instance":
            pixels = torch.stack([torch.from_numpy(runs.dense()) for runs in result["masks"]]).bool()
        scores = evaluate(predictor, Data([sample_of(pixels, classes, image=image)]), score)
        assert scores[name] == pytest.approx(1.0), task


# ---- remote code ----


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> SimpleNamespace:
    """What a process without the package makes of the folders of all families."""
    root, tasks = tmp_path_factory.mktemp("remote"), {}
    for name, family in FAMILIES.items():
        model, processor, _ = found_in(name)
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
        tasks[str(root / name)] = list(family.tasks)
    out = root / "out"
    out.mkdir()
    picture().save(out / "picture.png")
    (out / "tasks.json").write_text(json.dumps(tasks))
    env = os.environ | {"HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    script = Path(__file__).with_name("without_package.py")
    run = subprocess.run([sys.executable, script, out], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return SimpleNamespace(root=root, out=out, **json.loads((out / "report.json").read_text()))


def test_all_of_it_ran_without_the_package(elsewhere):
    assert len(elsewhere.modules) == 2 * len(FAMILIES)
    assert all(module.startswith("transformers_modules.") for module in elsewhere.modules.values())
    assert elsewhere.bare == ["MaskClsModel", [1, 12, 32]]


@every_family
def test_a_checkpoint_brings_its_code(request, family, found, elsewhere):
    """Saved by the package, and saved again where it is not installed."""
    name = request.node.callspec.params["family"]
    logits = torch.load(elsewhere.out / f"{name}_logits.pt")
    assert_same(logits, found.outputs, [field for field in family.outputs if "logits" in field])
    pipe = pipeline("image-segmentation", model=str(elsewhere.root / name), device="cpu")
    for task in family.tasks:
        here = masks_of(pipe, picture(), task)
        assert len(here) > 1
        for generation in ("first", "second"):
            np.testing.assert_array_equal(np.load(elsewhere.out / f"{name}_{generation}_{task}.npy"), here)
    first, second = elsewhere.root / name, elsewhere.out / f"{name}_again"
    assert {path.name for path in first.glob("*")} == {path.name for path in second.glob("*")}
    maps = [json.loads((folder / "config.json").read_text())["auto_map"] for folder in (first, second)]
    assert maps[0] == maps[1]


# ---- training ----


@every_family
def test_a_resumed_training_is_the_uninterrupted_one(family, tmp_path):
    """Bit for bit, the optimizer's state and the points of the loss included."""
    processor = family.processor(num_labels=2, do_resize=False, label_ids_to_fuse=None, void_id=255)

    def trained(folder: Path, resume: Any = False) -> dict[str, torch.Tensor]:
        model = family.model(**({} if family.make is converted else {"id2label": {0: "even", 1: "odd"}}))
        options = {"model": model, "processor": processor, "eval_strategy": "no", "save_steps": 2}
        trainer = make_trainer(folder, workers=0, batch=2, steps=4, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict()

    whole = trained(tmp_path / "whole")
    resumed = trained(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())
    losses = [(tmp_path / name / "losses.txt").read_text().splitlines() for name in ("whole", "resumed")]
    assert len(losses[0]) == 4 and losses[1] == losses[0][2:]


NUMBERS = {"different": (3, 0, 5, 0), "none on one": (0, 0, 2, 1), "none at all": (0, 0, 0, 0)}  # segments of 4 images


def rows(batch: dict[str, Any], images: slice) -> dict[str, Any]:
    return {name: values[images] for name, values in batch.items()}


def gradients_of(name: str, case: str, images: slice = slice(None), parallel: bool = False) -> dict[str, torch.Tensor]:
    """Of a step on some of the images. Evaluation mode: nothing is random or couples images, but losses count over
    the processes; losses of whole masks, for points are random."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    model = family.model(**({"loss_points": None} if family.finds_segments else {})).eval()
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if parallel else model
    loss = wrapped(**rows(family.batch(NUMBERS[case]), images)).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return gradients | {"loss": loss.detach()}


def training_in_parallel(name: str, case: str, rank: int) -> float:
    """The sum of all weights after two steps as they are trained, at points."""
    family = FAMILIES[name]
    model = family.model().train()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=1e-3)
    torch.manual_seed(rank)
    for _ in range(2):  # DDP notices in the second step what had no gradient in the first
        optimizer.zero_grad()
        parallel(**rows(family.batch(NUMBERS[case]), slice(2 * rank, 2 * rank + 2))).loss.backward()
        optimizer.step()
    return torch.stack([parameter.detach().double().sum() for parameter in model.parameters()]).sum().item()


def normalizer_of(points: int | None, rank: int) -> float:
    """Of 3 segments on one process and 5 on the other."""
    torch.manual_seed(0)
    config = maskcls_config(num_queries=9, loss_points=points)
    labels = [torch.zeros([3, 5][rank], dtype=torch.int64)]
    targets = prepare_targets([torch.ones(len(labels[0]), 8, 8, dtype=torch.bool)], labels, 5, torch.device("cpu"))
    layer = SegmentLogits(torch.randn(1, 9, 6), torch.randn(1, 9, 8, 8))
    return float(MaskClsCriterion(config).normalizers(Predictions.of_layers([layer]), targets, None).segments)


class Processes:
    """All that the tests need of two processes, in one start of them."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, rank: int) -> dict[str, Any]:
        torch.set_num_threads(1)
        images = slice(2 * rank, 2 * rank + 2)
        cases = [(name, case) for name in FAMILIES for case in NUMBERS]
        torch.save({c: gradients_of(*c, images, parallel=True) for c in cases}, self.folder / f"gradients-{rank}.pt")
        return {
            "trained": {name: training_in_parallel(name, "none on one", rank) for name in FAMILIES},
            "normalizers": [normalizer_of(points, rank) for points in (None, 100)],
        }


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("processes")
    results = run_in_processes(Processes(folder), 2)
    gradients = [torch.load(folder / f"gradients-{rank}.pt") for rank in range(2)]
    return SimpleNamespace(results=results, gradients=gradients)


def test_masks_of_two_processes_are_counted_once(processes):
    """3 and 5 masks: the normalizer is 4 on each, of whole masks and at points."""
    assert [result["normalizers"] for result in processes.results] == [[4.0, 4.0]] * 2


@every_family
@pytest.mark.parametrize("case", NUMBERS)
def test_two_processes_make_the_step_of_one(request, family, case, processes):
    """Whether images have segments or none, on one process or on both."""
    key = (request.node.callspec.params["family"], case)
    whole = gradients_of(*key)
    parts = [of_rank[key] for of_rank in processes.gradients]
    assert parts[0].keys() == whole.keys() and all(value is not None for value in whole.values())
    norm = float(torch.stack([value.square().sum() for value in whole.values()]).sum().sqrt())
    torch.testing.assert_close((parts[0]["loss"] + parts[1]["loss"]) / 2, whole.pop("loss"), rtol=1e-4, atol=1e-6)
    for name, expected in whole.items():
        for of_rank in parts:  # averaged
            torch.testing.assert_close(of_rank[name], expected, rtol=1e-3, atol=1e-5 * norm, msg=name)


@every_family
def test_two_processes_keep_equal_weights(request, family, processes):
    """Also where one of them has no segment to learn from."""
    trained = [result["trained"][request.node.callspec.params["family"]] for result in processes.results]
    assert trained[0] == trained[1] and np.isfinite(trained[0])


@every_family
@pytest.mark.parametrize("numbers", [(3, 2), (3, 0), (0, 0)])
def test_images_without_segments(family, numbers):
    """Of a batch none, one, or all: a finite loss, mask losses of 0 where nothing is, a gradient on every parameter."""
    model = family.model().train()
    output = model(**family.batch(numbers))
    output.loss.backward()
    assert output.loss.isfinite()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    of_masks = [term.item() for name, term in output.loss_dict.items() if "mask" in name or "dice" in name]
    assert bool(of_masks) == family.finds_segments
    assert all((term > 0) == any(numbers) for term in of_masks)
    if not family.finds_segments:
        assert (output.loss > 0) == any(numbers)
