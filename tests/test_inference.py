"""`Predictor`: tiles, scales and mirror images; what it gives, and what memory it takes."""

import copy
import inspect
import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ResNetConfig

from checkpoints import CLASSES, STUFF, image_processor, maskcls_model, picture, save_maskcls, save_perpixel
from conftest import SHARED, needs_shared
from maskcls_hf import MaskClsForUniversalSegmentation, MaskClsImageProcessor
from maskcls_hf.hub.speed import measure_speed
from maskcls_hf.inference import PAPER_SCALES, MaskRuns, Predictor, evaluate, faster
from maskcls_hf.inference.eval_mode import in_eval_mode
from maskcls_hf.inference.predictor import options_of
from maskcls_hf.inference.stitching import InstanceStitch, PanopticStitch, SemanticBlend, common_pixels
from maskcls_hf.inference.test_time_augmentation import scaled_size
from maskcls_hf.inference.tiling import Tile, TileAxis, TileGrid
from tiny import maskcls_config

NUCLEI = "model_cards/maskcls-nuclei-tiny"
OPTIONS = {
    "semantic": {},
    "panoptic": {"threshold": 0.5, "overlap_mask_area_threshold": 0.0},
    "instance": {"threshold": 0.5},
}


@pytest.fixture(scope="module")
def model():
    return maskcls_model()


def predictor(model, **options) -> Predictor:
    return Predictor(model, image_processor(), **options)


@torch.no_grad()
def plain(model, image, task: str, **kwargs):
    """What model and image processor give without a `Predictor`."""
    outputs = model(**image_processor()(image, return_tensors="pt"))
    return getattr(image_processor(), f"post_process_{task}_segmentation")(outputs, **OPTIONS[task], **kwargs)[0]


def assert_same(found: dict, expected, task: str) -> None:
    if task == "semantic":
        torch.testing.assert_close(found["segmentation"], expected, rtol=0, atol=0)
        areas = {info["label_id"]: info["area"] for info in found["segments_info"]}
        assert areas == dict(zip(*(v.tolist() for v in torch.unique(expected, return_counts=True)), strict=True))
    else:
        torch.testing.assert_close(found["segmentation"], expected["segmentation"], rtol=0, atol=0)
        assert found["segments_info"] == expected["segments_info"]
        assert len(found["segments_info"]) > 1


class TestWholeImages:
    @pytest.mark.parametrize("task", OPTIONS)
    @pytest.mark.parametrize("tile", [None, 80, 512])
    def test_one_tile_gives_exactly_the_plain_result(self, model, task, tile):
        found = predictor(model, tile=tile)(picture(48, 80), task, **OPTIONS[task])
        assert_same(found, plain(model, picture(48, 80), task), task)

    def test_whole_masks_of_instances(self, model):
        found = predictor(model)(picture(), "instance", threshold=0.5)
        expected = plain(model, picture(), "instance", return_binary_maps=True)["segmentation"].numpy()
        for runs, mask in zip(found["masks"], expected, strict=True):
            np.testing.assert_array_equal(runs.dense(), mask)

    def test_images_of_every_kind(self, model, tmp_path):
        picture().save(tmp_path / "image.png")
        array = np.asarray(picture())
        images = [picture(), array, torch.from_numpy(array.copy()).permute(2, 0, 1), tmp_path / "image.png"]
        predict = predictor(model, tile=48)
        maps = [predict(image, "semantic")["segmentation"] for image in images]
        assert all(torch.equal(maps[0], other) for other in maps)
        assert len(predict(images, "semantic")) == 4

    def test_a_batch_of_mixed_sizes_comes_back_in_order(self, model):
        images = [picture(48, 80), picture(96, 64), picture(64, 64)]
        results = predictor(model, batch_size=3, tile=80)(images, "panoptic")
        assert [tuple(result["segmentation"].shape) for result in results] == [(48, 80), (96, 64), (64, 64)]

    def test_several_tasks_share_their_forward_passes(self, model):
        calls = []
        handle = model.register_forward_hook(lambda *_: calls.append(1))
        found = predictor(model, tile=48).predict(picture(48, 80), OPTIONS)[0]
        handle.remove()
        assert len(calls) == 2  # tiles
        for task, result in found.items():
            alone = predictor(model, tile=48)(picture(48, 80), task, **OPTIONS[task])
            assert torch.equal(result["segmentation"], alone["segmentation"])

    def test_enlarge_replaces_the_resizing_of_the_image_processor(self, model):
        seen = []
        handle = model.register_forward_hook(lambda _, inputs, outputs: seen.append(outputs.valid_sizes.tolist()))
        predictor(model, enlarge=2.0)(picture(48, 80), "semantic")
        predictor(model, enlarge=0.5, batch_size=2)([picture(48, 80), picture(64, 32)], "semantic")
        handle.remove()
        assert seen == [[[96, 160]], [[24, 40]], [[32, 16]]]

    def test_loading_by_name(self, tmp_path):
        predict = Predictor.from_pretrained(save_maskcls(tmp_path / "m"), tile=64)
        assert predict.id2label == CLASSES and predict.finds_segments
        with pytest.raises(ValueError, match="neither the folder of a saved model"):
            Predictor.from_pretrained(tmp_path)

    def test_what_cannot_be_done_is_an_error(self, model, tmp_path):
        with pytest.raises(ValueError, match="tile must be at least 16"):
            predictor(model, tile=8)
        with pytest.raises(ValueError, match="overlap"):
            predictor(model, tile=64, overlap=0.6)
        with pytest.raises(ValueError, match="positive"):
            predictor(model, scales=[0.0])
        for tile, overlap in ((math.nan, 0.25), (64, math.nan)):
            with pytest.raises(ValueError, match=r"tile"):
                predictor(model, tile=tile, overlap=overlap)
        with pytest.raises(ValueError, match="scales and flip"):
            predictor(model, flip=True)(picture(), "panoptic")
        with pytest.raises(ValueError, match="panoramic"):
            predictor(model)(picture(), "panoramic")
        with pytest.raises(ValueError, match="knows no segments"):
            Predictor.from_pretrained(save_perpixel(tmp_path))(picture(), "panoptic")

    @pytest.mark.parametrize("name", ["threshold", "mask_threshold", "overlap_mask_area_threshold"])
    @pytest.mark.parametrize("value", [-0.1, 1.5, math.nan, math.inf, "0.5"])
    def test_thresholds_are_checked_before_the_model_runs(self, model, monkeypatch, name, value):
        monkeypatch.setattr(model, "forward", None)
        with pytest.raises(ValueError, match=f"{name}=.* must be"):
            predictor(model)(picture(), "panoptic", **{name: value})

    @pytest.mark.parametrize("options", [{"crop": 0}, {"crop": -1}, {"limit": 0}, {"limit": 2.5}])
    def test_options_of_an_evaluation(self, model, options):
        data = SimpleNamespace(id2label=model.config.id2label)
        with pytest.raises(ValueError, match=rf"{next(iter(options))}=.* must be"):
            evaluate(predictor(model), data, evaluator=None, **options)


@torch.no_grad()
def outputs_of_eval(model) -> torch.Tensor:
    return copy.deepcopy(model).eval()(**image_processor()(picture(), return_tensors="pt")).masks_queries_logits


class TestTheModelIsLeftAsItIs:
    USES = {
        "whole": lambda model: predictor(model)(picture(), "instance"),
        "several tasks": lambda model: predictor(model, batch_size=2).predict([picture()] * 2, OPTIONS),
        "tiles": lambda model: predictor(model, tile=40)(picture(), "panoptic"),
        "scales": lambda model: predictor(model, scales=(0.5, 1.0), flip=True)(picture(), "semantic"),
        "speed": lambda model: measure_speed(model, image_processor(), (48, 64), repeats=1),
    }

    @pytest.mark.parametrize("use", USES)
    @pytest.mark.parametrize("trained", ["all", "a part", "nothing"])
    def test_mode_weights_and_buffers(self, use, trained):
        model = maskcls_model().train(trained == "all")
        if trained == "a part":
            model.model.backbone.train()
        modes = [module.training for module in model.modules()]
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.USES[use](model)
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())

    @pytest.mark.parametrize("task", OPTIONS)
    def test_predicts_as_in_evaluation_mode(self, task):
        model = maskcls_model()
        predict, expected = predictor(model), predictor(model)(picture(), task, **OPTIONS[task])
        model.train()
        found = predict(picture(), task, **OPTIONS[task])
        assert torch.equal(found["segmentation"], expected["segmentation"])
        assert found["segments_info"] == expected["segments_info"]

    def test_later_weights_and_buffers_count(self):
        model = maskcls_model().train()
        predict = predictor(model)
        first = predict(torch.zeros(3, 48, 64), "instance", threshold=0.0)["segmentation"]
        with torch.no_grad():
            model(torch.randn(2, 3, 64, 64))  # moves the statistics of batch norms
            model.model.transformer_decoder.queries_embedder.weight += 1
        copied = in_eval_mode(model)
        assert copied is not model and not any(module.training for module in copied.modules())
        ours, theirs = (dict(m.named_parameters()) | dict(m.named_buffers()) for m in (model, copied))
        assert ours.keys() == theirs.keys() and all(theirs[name] is tensor for name, tensor in ours.items())
        with torch.no_grad():
            found = copied(**image_processor()(picture(), return_tensors="pt")).masks_queries_logits
        assert torch.equal(found, outputs_of_eval(model))
        assert not torch.equal(predict(torch.zeros(3, 48, 64), "instance", threshold=0.0)["segmentation"], first)
        assert in_eval_mode(model.eval()) is model

    def test_while_another_thread_trains(self):
        model = maskcls_model()
        expected = predictor(model)(picture(), "instance", threshold=0.0)["segmentation"]
        model.train()
        results: list = []

        def predict() -> None:
            results.extend(predictor(model)(picture(), "instance", threshold=0.0)["segmentation"] for _ in range(5))

        threads = [threading.Thread(target=predict) for _ in range(2)]
        for thread in threads:
            thread.start()
        modes = []
        while any(thread.is_alive() for thread in threads):
            modes.append(all(module.training for module in model.modules()))
        assert all(modes) and len(results) == 10
        assert all(torch.equal(result, expected) for result in results)


class TestOptions:
    @pytest.mark.parametrize(
        ("task", "options", "message"),
        [
            ("semantic", {"return_segmentation_scores": True}, "return_segmentation_scores is not for a Predictor"),
            ("instance", {"return_coco_annotation": True}, r"return_coco_annotation is not .*rle\(\)"),
            ("instance", {"return_binary_maps": True}, r"return_binary_maps is not .*dense\(\)"),
            ("instance", {"overlap_mask_area_threshold": 0.5}, "overlap_mask_area_threshold is not for instances"),
            ("panoptic", {"target_sizes": [(9, 9)]}, "target_sizes is not .*size of their image"),
            ("panoptic", {"treshold": 0.5}, "no 'treshold': did you mean 'threshold'?"),
            ("semantic", {"threshold": 0.5}, "post_process_semantic_segmentation has no 'threshold'"),
            ("panoptic", {"threshold": 2}, "threshold=2 must be from 0 to 1"),
        ],
    )
    @pytest.mark.parametrize("inference", [{}, {"tile": 40}])
    def test_what_does_not_work_is_refused_by_name(self, model, task, options, message, inference):
        with pytest.raises((ValueError, TypeError), match=message):
            predictor(model, **inference)(picture(), task, **options)

    def test_every_other_option_works(self, model):
        for task in OPTIONS:
            options = inspect.signature(getattr(MaskClsImageProcessor, f"post_process_{task}_segmentation")).parameters
            given = {name: option.default for name, option in options.items() if name in options_of(task)}
            if task == "instance":
                del given["overlap_mask_area_threshold"]
            predictor(model)(picture(), task, **given)

    @pytest.mark.parametrize(
        ("name", "value"), [("tile", 40.5), ("tile", "40"), ("batch_size", 0), ("batch_size", 1.5)]
    )
    def test_numbers_of_pixels_and_images_are_integers(self, model, name, value):
        with pytest.raises(ValueError, match=f"{name}=.* must be a positive integer"):
            predictor(model, **{name: value})

    def test_numbers_of_numpy(self, model):
        assert_same(predictor(model, tile=np.int64(128), batch_size=np.int8(2))(picture(), "semantic"),
                    plain(model, picture(), "semantic"), "semantic")  # fmt: skip

    def test_errors_name_the_image(self, model, tmp_path):
        (tmp_path / "cut.png").write_bytes(b"no image")
        for image, named in (
            (np.full((4, 5), np.nan), "image 1: "),
            (tmp_path / "cut.png", "cut.png"),
            (None, "image 1 "),
        ):
            with pytest.raises((ValueError, TypeError), match=named):
                predictor(model)([picture(), image], "semantic")


class TestDevicesDtypesAndCompiling:
    """On a CPU; the rest is in test_gpu_predictor.py."""

    @pytest.fixture
    def warnings_of(self, monkeypatch):
        messages: list[str] = []
        monkeypatch.setattr(faster.logger, "warning", messages.append)
        return messages

    def test_the_model_moves_to_the_device(self):
        model = maskcls_model()
        predict = Predictor(model, image_processor(), device="meta")
        assert predict.model is model and model.device.type == "meta"
        assert predictor(maskcls_model()).model.device.type == "cpu"

    def test_bfloat16(self, model):
        predict = predictor(model, dtype="bfloat16")
        found, expected = (p(picture(), "semantic")["segmentation"] for p in (predict, predictor(model)))
        assert (found == expected).float().mean() > 0.95
        inputs = image_processor()(picture(), return_tensors="pt")
        assert predict.outputs(inputs).masks_queries_logits.dtype == torch.bfloat16
        assert predict.model is model and model.dtype == torch.float32

    @pytest.mark.parametrize("instructions", [True, False])
    def test_a_processor_without_bfloat16_is_warned_about(self, model, instructions, monkeypatch, warnings_of):
        monkeypatch.setattr(faster, "has_bfloat16", lambda: instructions)
        predictor(model, dtype="bfloat16")
        assert ["AMX or AVX512-BF16" in message for message in warnings_of] == [] if instructions else [True]

    def test_dtypes_that_there_are_not(self, model):
        with pytest.raises(ValueError, match="dtype='half' must be one of auto, float32, bfloat16, float16"):
            predictor(model, dtype="half")
        with pytest.raises(ValueError, match='"float16" is for GPUs.*"bfloat16"'):
            predictor(model, dtype="float16")

    def test_float32_of_a_model_in_half_precision_is_a_copy(self, model):
        half = copy.deepcopy(model).bfloat16()
        predict = predictor(half, dtype="float32")
        assert half.dtype == torch.bfloat16
        outputs = predict.outputs(image_processor()(picture(), return_tensors="pt"))
        assert outputs.masks_queries_logits.dtype == torch.float32
        as_it_is = predictor(half).outputs(image_processor()(picture(), return_tensors="pt"))
        assert as_it_is.masks_queries_logits.dtype == torch.bfloat16

    @pytest.fixture
    def quickly_compiled(self, monkeypatch):
        compile_ = torch.compile
        monkeypatch.setattr(torch, "compile", lambda network: compile_(network, backend="eager"))

    def test_a_compiled_network_gives_the_same_for_all_sizes(self, quickly_compiled):
        model = maskcls_model().train()
        predict = predictor(model, compile=True, batch_size=2)
        images = [picture(48, 80), picture(64, 64), picture(100, 60), picture(48, 80)]
        found = predict(images, "panoptic", **OPTIONS["panoptic"])
        expected = predictor(model)(images, "panoptic", **OPTIONS["panoptic"])
        for one, other in zip(found, expected, strict=True):
            assert (one["segmentation"] == other["segmentation"]).float().mean() > 0.999
        assert predict.network.compiled is not None and model.training
        with torch.no_grad():
            model.model.transformer_decoder.queries_embedder.weight += 1
        later, expected = (p(picture(), "semantic")["segmentation"] for p in (predict, predictor(model)))
        assert (later == expected).float().mean() > 0.999

    def test_where_compiling_fails_the_model_predicts_as_it_is(self, model, monkeypatch, warnings_of):
        def broken(graph, inputs):
            raise RuntimeError("no compiler here")

        compile_ = torch.compile
        monkeypatch.setattr(torch, "compile", lambda network: compile_(network, backend=broken))
        predict = predictor(model, compile=True)
        for _ in range(2):
            found = predict(picture(), "semantic")["segmentation"]
            assert torch.equal(found, predictor(model)(picture(), "semantic")["segmentation"])
        assert len(warnings_of) == 1 and "cannot be compiled" in warnings_of[0] and "no compiler" in warnings_of[0]

    def test_errors_of_a_compiled_network_stay_errors(self, model, quickly_compiled):
        predict = predictor(model, compile=True)
        with pytest.raises(ValueError, match="pixel_values must be"):
            predict.network(pixel_values=torch.zeros(3, 4))

    def test_options_are_checked_before_anything_is_loaded(self, tmp_path):
        for options, error in (({"tile": 3}, ValueError), ({"dtype": "x"}, ValueError), ({"tiles": 64}, TypeError)):
            with pytest.raises(error, match=next(iter(options))):
                Predictor.from_pretrained(tmp_path / "none", **options)

    def test_a_mask_is_given_where_something_is_padded(self, model):
        given = []
        handle = model.register_forward_pre_hook(
            lambda _, __, options: given.append("pixel_mask" in options), with_kwargs=True
        )
        predictor(model, batch_size=2)([picture(64, 64), picture(48, 80), picture(64, 64)], "semantic")
        predictor(model)(picture(40, 60), "semantic")
        handle.remove()
        assert given == [False, True, False]  # 48 x 80 becomes 64 x 107, 40 x 60 becomes 64 x 96


@pytest.mark.parametrize("channels", [3, 5])
@pytest.mark.parametrize("inference", [{}, {"tile": 40}, {"scales": (0.5, 1.0)}])
def test_input_data_format_is_that_of_the_users_images(channels, inference):
    torch.manual_seed(0)
    backbone = ResNetConfig(
        num_channels=channels, embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1],
        layer_type="basic", out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    model = MaskClsForUniversalSegmentation(maskcls_config(backbone_config=backbone)).eval()
    options = {"size": {"shortest_edge": 64}, "image_mean": [0.5] * channels, "image_std": [0.2] * channels}
    image = np.random.default_rng(0).integers(0, 256, (50, 60, channels), dtype=np.uint8)
    maps = []
    for form, axes in (("channels_last", (0, 1, 2)), ("channels_first", (2, 0, 1))):
        processor = MaskClsImageProcessor(input_data_format=form, do_convert_rgb=channels == 3, **options)
        predict = Predictor(model, processor, **inference)
        maps.append(predict(image.transpose(axes), "semantic")["segmentation"])
        tensor = torch.from_numpy(image).permute(2, 0, 1)
        of_tensor = predict.predict(tensor, {"semantic": {}}, input_data_format="channels_first")
        assert torch.equal(of_tensor[0]["semantic"]["segmentation"], maps[0])
        if channels == 3:
            measure_speed(model, processor, (48, 64), repeats=1)
            assert torch.equal(predict(Image.fromarray(image), "semantic")["segmentation"], maps[0])
    assert maps[0].shape == (50, 60) and torch.equal(*maps)


@pytest.fixture(params=["float64", "meta"])
def defaults(request):
    """Switches torch's default dtype or device to another one, and back again in the end."""

    def switch(on: bool = True) -> None:
        if request.param == "meta":
            torch.set_default_device("meta" if on else None)
        else:
            torch.set_default_dtype(torch.float64 if on else torch.float32)

    yield switch
    switch(on=False)


@pytest.mark.parametrize("task", OPTIONS)
@pytest.mark.parametrize("inference", [{}, {"tile": 40}, {"enlarge": 1.5}, {"scales": (0.5, 1.0), "flip": True}])
def test_defaults_of_torch_change_nothing(model, task, inference, defaults):
    if "scales" in inference and task != "semantic":
        pytest.skip("averages class scores")
    predict = predictor(model, **inference)
    expected = predict(picture(), task, **OPTIONS[task])
    defaults()
    found = predict(picture(), task, **OPTIONS[task])
    assert found["segmentation"].device.type == "cpu" and found["segmentation"].dtype == expected["segmentation"].dtype
    agree = (found["segmentation"] == expected["segmentation"]).float().mean(dtype=torch.float32)
    assert agree > 0.999  # sums of sines in float64 differ in the last bit
    assert [info["label_id"] for info in found["segments_info"]] == [i["label_id"] for i in expected["segments_info"]]


@pytest.mark.parametrize("label_format", ["segments", "segment_map"])
def test_defaults_of_torch_do_not_change_the_loss(model, label_format, defaults):
    labels = np.zeros((48, 80), dtype=np.uint8)
    labels[10:20, 30:60] = 3
    labels[30:] = 255
    expected: dict = {}
    for on in (False, True):
        defaults(on)
        batch = image_processor()(picture(), labels, label_format=label_format, return_tensors="pt")
        terms = model(**batch).loss_dict
        expected = expected or terms
        assert all(term.dtype == torch.float32 and abs(term - expected[name]) < 1e-4 for name, term in terms.items())


class TestAxes:
    @pytest.mark.parametrize("length", [100, 101, 150, 151, 175, 176, 199, 260, 1000])
    @pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
    def test_tiles_cover_the_axis_and_weights_sum_to_one(self, length, overlap):
        axis = TileAxis(length, 100, overlap)
        assert axis.starts[0] == 0 and axis.starts[-1] + axis.size == length
        cells = [axis.cell(i) for i in range(len(axis))]
        assert [x for cell in cells for x in range(length)[cell]] == list(range(length))
        for i in range(len(axis)):
            window, reach, cell = axis.window(i), axis.reach(i), axis.cell(i)
            assert window.start <= reach.start <= cell.start < cell.stop <= reach.stop <= window.stop
        for i in range(1, len(axis)):
            assert axis.shared(i).stop - axis.shared(i).start >= 100 * overlap
        assert all(end <= first for (_, end), (first, _) in zip(axis.ramps, axis.ramps[1:], strict=False))

    def test_bands_visit_every_tile_once_and_repeat_the_column_before(self):
        visits = list(TileGrid((150, 400), 100, 0.25).visits(columns_at_once=2))
        seen = [(tile.row, tile.column) for tile in visits if not tile.lead_in]
        assert sorted(seen) == [(row, column) for row in range(2) for column in range(5)]
        assert [tile for tile in visits if tile.lead_in] == [Tile(r, c, True) for c in (1, 3) for r in range(2)]


class TestMaskRuns:
    def test_against_pycocotools(self):
        generator = np.random.default_rng(0)
        masks = generator.random((20, 13, 9)) < np.linspace(0, 1, 20)[:, None, None]
        for runs, mask in zip(MaskRuns.of_masks(torch.from_numpy(masks)), masks, strict=True):
            expected = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            assert runs.rle()["counts"].encode() == expected["counts"]
            assert runs.area == coco_mask.area(expected) and runs.box == coco_mask.toBbox(expected).tolist()
            np.testing.assert_array_equal(runs.dense(), mask)

    def test_part_of_an_image(self):
        mask = np.random.default_rng(0).random((1, 5, 4)) < 0.5
        whole = np.zeros((11, 12), dtype=bool)
        whole[3:8, 6:10] = mask[0]
        np.testing.assert_array_equal(MaskRuns.of_masks(mask, (11, 12), top=3, left=6)[0].dense(), whole)

    def test_union_is_that_of_the_pixels(self):
        masks = np.random.default_rng(0).random((30, 6, 7)) < 0.4
        for first, second, third in zip(masks[::3], masks[1::3], masks[2::3], strict=True):
            parts = [MaskRuns.of_masks(mask[None])[0] for mask in (first, second, third)]
            union = MaskRuns.union(parts)
            np.testing.assert_array_equal(union.dense(), first | second | third)
            np.testing.assert_array_equal(union.starts, MaskRuns.of_masks((first | second | third)[None])[0].starts)


def discs(size: tuple[int, int], number: int, radius: int, seed: int = 0) -> np.ndarray:
    """Map of ids (H, W) of discs without overlap."""
    generator, ids = np.random.default_rng(seed), np.zeros(size, dtype=np.int32)
    y, x = np.mgrid[: size[0], : size[1]]
    while ids.max() < number:
        center = [generator.integers(length) for length in size]
        disc = (y - center[0]) ** 2 + (x - center[1]) ** 2 <= radius**2
        if not ids[(y - center[0]) ** 2 + (x - center[1]) ** 2 <= (radius + 2) ** 2].any():
            ids[disc] = ids.max() + 1
    return ids


def discs_grown(masks: np.ndarray) -> np.ndarray:
    return np.stack([ndimage.binary_dilation(mask, iterations=2) for mask in masks])


def as_found(ids: np.ndarray, labels: dict[int, int], stuff=()) -> dict:
    """What a perfect model finds in a tile, with ids 1, 2, ... of its own."""
    present = np.unique(ids)[np.unique(ids) > 0]
    local = np.searchsorted(present, ids) + 1
    local[ids == 0] = 0
    records = [
        dict(id=i, label_id=labels[int(n)], was_fused=labels[int(n)] in stuff, score=0.9, area=int((ids == n).sum()))
        for i, n in enumerate(present, start=1)
    ]
    return {"segmentation": torch.from_numpy(local.astype(np.int32)), "segments_info": records}


def stitched(kind, masks: list[list[np.ndarray]], scores=(0.9, 0.9)) -> tuple[list[np.ndarray], list[dict]]:
    """Of things of one class in two tiles of 32 pixels, side by side: masks of the image, and records."""
    grid = TileGrid((32, 56), 32, 0.25)
    stitch = kind(grid)
    for column, (of_tile, score) in enumerate(zip(masks, scores, strict=True)):
        infos = [
            dict(id=n, label_id=3, was_fused=False, score=score, area=int(mask.sum()))
            for n, mask in enumerate(of_tile, start=1)
        ]
        if kind is PanopticStitch:
            found = sum((n * mask for n, mask in enumerate(of_tile, start=1)), np.zeros((32, 32))).astype(np.int32)
        else:
            found = np.array(of_tile).reshape(-1, 32, 32).astype(bool)
        stitch.add(Tile(0, column), {"segmentation": torch.from_numpy(found), "segments_info": infos})
    result = stitch.result()
    infos = result["segments_info"]
    if kind is InstanceStitch:
        return [mask.dense() for mask in result["segmentation"]], infos
    return [result["segmentation"].numpy() == info["id"] for info in infos], infos


class TestStitching:
    """Tiles cut from a known answer give that answer back."""

    @pytest.mark.parametrize("overlap", [0.25, 0.4, 0.5])
    @pytest.mark.parametrize("columns_at_once", [None, 2])
    def test_panoptic_segments_are_put_together_again(self, overlap, columns_at_once):
        ids = discs((150, 210), 30, 9)
        labels = {n: 2 + n % 2 for n in range(1, 31)}
        ids[ids == 0] = 31  # stuff
        labels[31] = 0
        grid = TileGrid(ids.shape, 64, overlap)
        stitch = PanopticStitch(grid)
        for tile in grid.visits(columns_at_once):
            stitch.add(tile, as_found(grid.crop(torch.from_numpy(ids), tile).numpy(), labels, stuff=[0]))
        result = stitch.result()
        assert len(result["segments_info"]) == 31
        for info in result["segments_info"]:
            mask = result["segmentation"].numpy() == info["id"]
            (number,) = np.unique(ids[mask])
            np.testing.assert_array_equal(mask, ids == number)
            assert info["label_id"] == labels[number] and info["area"] == mask.sum()
            assert info["score"] == pytest.approx(0.9)

    def test_instances_are_put_together_again(self):
        ids = discs((150, 210), 30, 9)
        masks = np.stack([ids == n for n in range(1, 31)])
        masks = np.concatenate([masks, discs_grown(masks[:3])])  # some overlap
        grid = TileGrid(ids.shape, 64, 0.25)
        stitch = InstanceStitch(grid)
        for tile in grid.visits():
            local = grid.crop(torch.from_numpy(masks), tile)
            local = local[local.flatten(1).any(1)]
            common = dict(label_id=0, was_fused=False, score=0.9)
            records = [common | dict(id=i, area=int(mask.sum())) for i, mask in enumerate(local)]
            stitch.add(tile, {"segmentation": local, "segments_info": records})
        result = stitch.result()
        found = np.stack([mask.dense() for mask in result["segmentation"]])
        assert sorted(map(np.ndarray.tobytes, found)) == sorted(map(np.ndarray.tobytes, masks))
        assert [info["area"] for info in result["segments_info"]] == found.sum((1, 2)).tolist()

    def test_classes_must_agree(self):
        ids = np.ones((32, 56), dtype=np.int32)
        grid = TileGrid(ids.shape, 32, 0.25)
        for labels, number in (((3, 3), 1), ((3, 4), 2)):
            stitch = PanopticStitch(grid)
            for tile, label in zip(grid.visits(), labels, strict=True):
                stitch.add(tile, as_found(grid.crop(torch.from_numpy(ids), tile).numpy(), {1: label}))
            assert len(stitch.result()["segments_info"]) == number

    def test_scores_are_means_over_pixels_and_highest_where_fused(self):
        grid = TileGrid((32, 56), 32, 0.25)
        for fused, expected in ((False, 0.75), (True, 0.9)):
            stitch = PanopticStitch(grid)
            for tile, score in zip(grid.visits(), (0.9, 0.6), strict=True):
                found = as_found(np.ones((32, 32), dtype=np.int32), {1: 0}, stuff=[0] if fused else [])
                found["segments_info"][0]["score"] = score
                stitch.add(tile, found)
            (info,) = stitch.result()["segments_info"]
            assert info["score"] == pytest.approx(expected) and info["area"] == 32 * 56

    @pytest.mark.parametrize("kind", [PanopticStitch, InstanceStitch])
    def test_a_thing_that_one_tile_alone_finds_is_whole_where_the_tile_sees_all_of_it(self, kind):
        """Both tiles see columns 24 to 31, the seam is at column 28."""
        for columns, expected in (
            (slice(22, 31), slice(22, 31)),  # whole, beyond the seam
            (slice(27, 31), slice(27, 31)),
            (slice(22, 32), slice(22, 28)),  # the tile ends before it may: up to the seam
            (slice(27, 32), None),  # nothing but an end
        ):
            mask = np.zeros((32, 32), dtype=bool)
            mask[4:12, columns] = True
            found, infos = stitched(kind, [[mask], []])
            if expected is None:
                assert found == infos == []
                continue
            whole = np.zeros((32, 56), dtype=bool)
            whole[4:12, expected] = True
            np.testing.assert_array_equal(found, [whole])
            assert infos[0]["area"] == whole.sum() and infos[0]["score"] == pytest.approx(0.9)

    @pytest.mark.parametrize("kind", [PanopticStitch, InstanceStitch])
    def test_what_tiles_above_each_other_find_is_whole_where_those_beside_find_nothing(self, kind):
        """Four tiles of 32 pixels, seams at row and column 28: the two on the left see all of it, joined; it reaches
        over the other seam too."""
        whole = np.zeros((56, 56), dtype=bool)
        whole[25:31, 24:31] = True
        grid = TileGrid(whole.shape, 32, 0.25)
        stitch = kind(grid)
        for tile in grid.visits():
            local = grid.crop(torch.from_numpy(whole), tile).numpy() & (tile.column == 0)
            if kind is PanopticStitch:
                stitch.add(tile, as_found(local.astype(np.int32), {1: 0} if local.any() else {}))
            else:
                local = torch.from_numpy(local[None][: int(local.any())])
                infos = [dict(id=0, label_id=0, was_fused=False, score=0.9, area=int(m.sum())) for m in local]
                stitch.add(tile, {"segmentation": local, "segments_info": infos})
        result = stitch.result()
        (info,) = result["segments_info"]
        found = result["segmentation"].numpy() > 0 if kind is PanopticStitch else result["segmentation"][0].dense()
        np.testing.assert_array_equal(found, whole)
        assert info["area"] == whole.sum()

    @pytest.mark.parametrize("kind", [PanopticStitch, InstanceStitch])
    def test_no_thing_is_there_twice(self, kind):
        """Seen by two tiles with an IoU of 0.5 in what both see, too little to be joined."""
        left, right = np.zeros((2, 32, 32), dtype=bool)
        left[4:12, 22:29], right[4:12, 0:6] = True, True  # columns 22 to 28, and 24 to 29: cut off at the left
        left[4:12, 25:27] = False
        for scores in ((0.9, 0.6), (0.6, 0.9)):
            found, infos = stitched(kind, [[left], [right]], scores)
            assert len(found) == len(infos) == 1 and infos[0]["score"] == pytest.approx(scores[0])
            np.testing.assert_array_equal(found[0][:, :32], left)
        left[4:12, 26], right[4:12, 0] = True, False  # both whole: the better stays
        for scores, better in (((0.9, 0.6), 0), ((0.6, 0.9), 1)):
            found, infos = stitched(kind, [[left], [right]], scores)
            assert len(found) == 1 and infos[0]["score"] == pytest.approx(0.9)
            expected = np.zeros((32, 56), dtype=bool)
            expected[:, 24 * better : 24 * better + 32] = (left, right)[better]
            np.testing.assert_array_equal(found[0], expected)

    def test_a_whole_thing_takes_pixels_from_stuff_and_from_no_other_thing(self):
        left, right = np.zeros((2, 32, 32), dtype=np.int32)
        left[4:12, 22:31] = 1
        right[:] = 1  # stuff
        right[4:6, 5:9] = 2  # a thing in the way, columns 29 to 32
        grid = TileGrid((32, 56), 32, 0.25)
        stitch = PanopticStitch(grid)
        stitch.add(Tile(0, 0), as_found(left, {1: 3}))
        stitch.add(Tile(0, 1), as_found(right, {1: 0, 2: 3}, stuff=[0]))
        result = stitch.result()
        segmentation, infos = result["segmentation"].numpy(), result["segments_info"]
        assert [info["label_id"] for info in infos] == [3, 0, 3]
        assert [info["area"] for info in infos] == [int((segmentation == n).sum()) for n in (1, 2, 3)]
        assert (segmentation[4:6, 28] == 1).all() and (segmentation[4:6, 29:33] == 3).all()
        assert (segmentation[6:12, 22:31] == 1).all() and (segmentation[6:12, 31:] == 2).all()

    def test_common_pixels_of_runs(self):
        rng = np.random.default_rng(0)
        masks = rng.random((6, 13, 17)) > rng.random((6, 1, 1))
        runs = MaskRuns.of_masks(masks)
        for one, of_one in zip(runs, masks, strict=True):
            assert [common_pixels(one, other) for other in runs] == (masks & of_one).sum((1, 2)).tolist()

    @pytest.mark.parametrize("columns_at_once", [None, 1, 2])
    @pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
    def test_blended_scores_are_the_weighted_mean_of_the_tiles(self, overlap, columns_at_once):
        """Against a sum over the whole image."""
        grid = TileGrid((70, 130), 32, overlap)
        scores = {(r, c): torch.rand(3, 32, 32) for r in range(len(grid.rows)) for c in range(len(grid.columns))}
        total, weights = torch.zeros(3, 70, 130), torch.zeros(70, 130)
        for (row, column), found in scores.items():
            y, x = (weight_of(axis, index) for axis, index in ((grid.rows, row), (grid.columns, column)))
            window = (grid.rows.window(row), grid.columns.window(column))
            total[:, window[0], window[1]] += found * y[:, None] * x
            weights[window] += y[:, None] * x
        torch.testing.assert_close(weights, torch.ones(70, 130))
        blend = SemanticBlend(grid)
        for tile in grid.visits(columns_at_once):
            blend.add(tile, scores[tile.row, tile.column].clone())
        best = total.sort(0).values
        clear = best[-1] - best[-2] > 1e-5
        assert clear.float().mean() > 0.99
        assert torch.equal(blend.result()[clear], total.argmax(0)[clear])


def weight_of(axis: TileAxis, index: int) -> torch.Tensor:
    """Weights (size,) of a tile: 1 inside, linear in the ramps, 0 outside."""
    places = torch.arange(axis.size) + axis.starts[index] + 0.5
    weight = torch.ones(axis.size)
    if index > 0:
        first, end = axis.ramps[index - 1]
        weight *= ((places - first) / max(end - first, 1e-9)).clamp(0, 1)
    if index < len(axis.ramps):
        first, end = axis.ramps[index]
        weight *= ((end - places) / max(end - first, 1e-9)).clamp(0, 1)
    return weight


class TestTestTimeAugmentation:
    def test_one_scale_without_flip_is_the_plain_result(self, model):
        found = predictor(model, scales=[1.0], flip=False)(picture(), "semantic")
        assert_same(found, plain(model, picture(), "semantic"), "semantic")

    @torch.no_grad()
    def test_equals_a_mean_written_by_hand(self, model):
        image = torch.from_numpy(np.asarray(picture()).copy()).permute(2, 0, 1)
        total = torch.zeros(5, 48, 80)
        for shortest, longest in ((32, 192), (64, 192), (96, 192)):
            for flipped in (False, True):
                processor = MaskClsImageProcessor(size={"shortest_edge": shortest, "longest_edge": longest})
                inputs = processor(image.flip(2) if flipped else image, return_tensors="pt")
                record = processor.post_process_semantic_segmentation(model(**inputs), return_segmentation_scores=True)[
                    0
                ]
                scores = record["segmentation_scores"]
                total += scores.flip(2) if flipped else scores
        found = predictor(model, scales=[0.5, 1.0, 1.5], flip=True)(picture(), "semantic")["segmentation"]
        assert torch.equal(found, (total / 6).argmax(0))
        assert not torch.equal(found, plain(model, picture(), "semantic"))

    def test_the_map_of_a_mirror_image_is_the_mirror_image_of_the_map(self, model):
        predict = predictor(model, scales=[0.75, 1.0], flip=True)
        array = np.asarray(picture())
        found, mirrored = (predict(image, "semantic")["segmentation"] for image in (array, array[:, ::-1].copy()))
        assert (found == mirrored.flip(1)).float().mean() > 0.999
        symmetric = np.concatenate([array, array[:, ::-1]], axis=1)
        found = predict(symmetric, "semantic")["segmentation"]
        assert (found == found.flip(1)).float().mean() > 0.999

    def test_sizes_are_those_of_the_papers_configs(self):
        """TEST.AUG of its ADE20K and COCO-Stuff configs."""
        for shortest, longest, sizes, max_size in (
            (512, 2048, [256, 384, 512, 640, 768, 896], 3584),
            (640, 2560, [320, 480, 640, 800, 960, 1120], 4480),
        ):
            size = MaskClsImageProcessor(size={"shortest_edge": shortest, "longest_edge": longest}).size
            found = [scaled_size(size, None, scale, max(PAPER_SCALES)) for scale in PAPER_SCALES]
            assert found == [{"shortest_edge": edge, "longest_edge": max_size} for edge in sizes]

    def test_images_that_are_not_resized_scale_by_their_own_size(self, model):
        seen = []
        handle = model.register_forward_hook(lambda _, inputs, outputs: seen.append(outputs.valid_sizes.tolist()))
        Predictor(model, MaskClsImageProcessor(do_resize=False), scales=[0.5, 1.0])(picture(48, 80), "semantic")
        handle.remove()
        assert seen == [[[24, 40]], [[48, 80]]]

    def test_in_tiles(self, model):
        found = predictor(model, tile=48, scales=[1.0, 1.5], flip=True)(picture(48, 80), "semantic")
        assert found["segmentation"].shape == (48, 80)

    def test_per_pixel_models_too(self, tmp_path):
        predict = Predictor.from_pretrained(save_perpixel(tmp_path), tile=48, scales=[1.0, 1.5], flip=True)
        assert predict(picture(48, 80), "semantic")["segmentation"].shape == (48, 80)


class LiveBytes(TorchDispatchMode):
    """Highest sum of the storages of tensors that were made inside and are alive."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.total = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                known = self.storages.get(storage._cdata, (None, 0))
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.total += storage.nbytes() - known[1]
        if self.total > self.peak:
            self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
            self.total = sum(size for _, size in self.storages.values())
            self.peak = max(self.peak, self.total)
        return result


@pytest.mark.parametrize("task", OPTIONS)
def test_memory_besides_image_and_map_is_flat_in_the_size_of_the_image(model, task, monkeypatch):
    """Images of 3, 7 and 13 columns of tiles; the map of classes has 8 bytes a pixel, the others have 4."""
    monkeypatch.setattr("maskcls_hf.inference.predictor.BLEND_MEMORY", 1)  # two columns of tiles in a band
    predict = Predictor(model, MaskClsImageProcessor(do_resize=False, label_ids_to_fuse=STUFF), tile=64)
    bytes_a_pixel = (8 if task == "semantic" else 4) + 3
    working = {}
    for width in (160, 320, 640):
        image = np.tile(np.asarray(picture(96, 160)), (1, width // 160, 1))
        with LiveBytes() as live:
            found = predict(image, task, **OPTIONS[task])
        assert found["segmentation"].shape == (96, width)
        working[width] = live.peak - bytes_a_pixel * 96 * width
    assert working[160] > 350_000
    assert working[640] < 1.01 * working[320] < 1.12 * working[160], working


@needs_shared
class TestNuclei:
    """The demo model on whole microscope images."""

    def predict(self, image, **options):
        predict = Predictor.from_pretrained(NUCLEI, batch_size=4, **options)
        found = predict(image, threshold=0.5, overlap_mask_area_threshold=0.5)
        nuclei = [info["id"] for info in found["segments_info"] if info["label_id"] == 1]
        return predict, np.stack([found["segmentation"].numpy() == i for i in nuclei])

    def test_more_nuclei_are_found_than_the_model_has_queries(self):
        """Four validation images side by side."""
        folder = SHARED / "data" / "dsb2018_nuclei" / "val"
        paths = [path for path in sorted((folder / "instances").iterdir()) if Image.open(path).size == (256, 256)]
        maps = sorted(
            ((np.asarray(Image.open(path)).astype(int), path.stem) for path in paths), key=lambda m: m[0].max()
        )
        image, true = np.zeros((512, 512, 3), dtype=np.uint8), []
        for place, (ids, name) in enumerate(maps[-4:]):
            window = (slice(place // 2 * 256, place // 2 * 256 + 256), slice(place % 2 * 256, place % 2 * 256 + 256))
            image[window] = np.asarray(Image.open(folder / "images" / f"{name}.jpg"))
            for number in np.unique(ids)[1:]:
                true.append(np.zeros((512, 512), dtype=bool))
                true[-1][window] = ids == number
        true = np.stack(true)
        predict, tiled = self.predict(image, tile=128)
        _, untiled = self.predict(image, tile=0)
        queries = predict.model.config.num_queries
        assert hits(tiled, true) > queries > 3 * hits(untiled, true), (hits(tiled, true), hits(untiled, true))
        assert hits(tiled, true) > 0.5 * len(true)


def hits(found: np.ndarray, true: np.ndarray) -> int:
    """True instances that one of IoU above 0.5 was found for."""
    found, true = (masks.reshape(len(masks), -1).astype(np.float32) for masks in (found, true))
    common = found @ true.T
    matches = common > 0.5 * (found.sum(1)[:, None] + true.sum(1) - common)
    return int(matches[linear_sum_assignment(matches, maximize=True)].sum())


def test_classes_of_stuff_are_fused_over_the_image(model):
    found = predictor(model, tile=48)(picture(96, 160), "panoptic", **OPTIONS["panoptic"])
    stuff = [info["label_id"] for info in found["segments_info"] if info["label_id"] in STUFF]
    assert stuff and len(stuff) == len(set(stuff))
    ids, areas = torch.unique(found["segmentation"], return_counts=True)
    assert {i: a for i, a in zip(ids.tolist(), areas.tolist(), strict=True) if i} == {
        info["id"]: info["area"] for info in found["segments_info"]
    }
