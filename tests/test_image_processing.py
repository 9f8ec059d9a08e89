"""The image processor: images of every kind, annotations to targets, outputs to maps, and its saved options."""

from __future__ import annotations

import base64
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from transformers import MaskFormerImageProcessor
from transformers.image_utils import SizeDict
from transformers.models.maskformer.modeling_maskformer import MaskFormerForInstanceSegmentationOutput
from transformers.pipelines.image_segmentation import ImageSegmentationPipeline

from conftest import SHARED, needs_shared
from maskcls_hf.models import image_processing_maskcls
from maskcls_hf.models.image_processing_maskcls import MaskClsImageProcessor
from maskcls_hf.models.image_reading import image_to_tensor, with_fourth_byte
from maskcls_hf.models.post_processing import panoptic_segments, per_pixel_map, semantic_map
from maskcls_hf.models.resampling import resize_nearest, resized_size

VOID = 255
ORIENTATION = 0x0112  # EXIF tag
ROTATED = 6  # stored turned by 90 degrees: height and width swap when shown


def rgb(height: int = 40, width: int = 60, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def blank(height: int, width: int) -> Image.Image:
    return Image.new("RGB", (width, height))


@pytest.fixture
def as_is() -> MaskClsImageProcessor:
    """Neither resizes nor normalizes: pixels come out on the 0..255 scale, with the padding of 32."""
    return MaskClsImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)


def pixels(processor: MaskClsImageProcessor, image: Any, **kwargs: Any) -> torch.Tensor:
    """The image part of `pixel_values` of one image, (C, H, W)."""
    batch = processor(image, return_tensors="pt", **kwargs)
    height, width = batch["original_sizes"][0].tolist()
    return batch["pixel_values"][0, :, :height, :width]


# --- geometry -------------------------------------------------------------------------------------------------------


def test_batch_of_sizes_is_padded_at_the_bottom_right():
    processor = MaskClsImageProcessor(size={"shortest_edge": 40, "longest_edge": 70})
    images = [rgb(40, 60), rgb(80, 50), rgb(20, 200)]
    batch = processor(images, return_tensors="pt")
    sizes = [(40, 60), (64, 40), (7, 70)]  # aspect ratios kept; the last is held by the longest edge
    assert batch["pixel_values"].shape == (3, 3, 64, 96) and batch["pixel_values"].dtype == torch.float32
    assert batch["original_sizes"].tolist() == [[40, 60], [80, 50], [20, 200]]
    for values, mask, (height, width) in zip(batch["pixel_values"], batch["pixel_mask"], sizes, strict=True):
        assert mask.dtype == torch.int64 and int(mask.sum()) == height * width and mask[:height, :width].all()
        assert values[:, mask == 0].eq(0).all()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"shortest_edge": 30}, (30, 60)),
        ({"longest_edge": 50}, (25, 50)),
        ({"shortest_edge": 30, "longest_edge": 40}, (20, 40)),
        ({"height": 33, "width": 35}, (33, 35)),
        ({"max_height": 30, "max_width": 30}, (15, 30)),
        (30, (30, 60)),
        ((33, 35), (33, 35)),
    ],
)
def test_every_form_of_size(size, expected):
    batch = MaskClsImageProcessor(size=size, size_divisor=None)(rgb(100, 200), return_tensors="pt")
    assert tuple(batch["pixel_values"].shape[-2:]) == expected


def test_size_by_area_is_refused():
    with pytest.raises(ValueError, match="shortest_edge and / or longest_edge"):
        MaskClsImageProcessor(size={"min_pixels": 10, "max_pixels": 20})(rgb())


def test_a_very_long_image_keeps_one_pixel_of_height():
    batch = MaskClsImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})(rgb(2, 400), return_tensors="pt")
    assert batch["pixel_mask"].sum() == 64


def test_pad_size_and_its_error():
    processor = MaskClsImageProcessor(do_resize=False, pad_size={"height": 50, "width": 70})
    assert processor(rgb(), return_tensors="pt")["pixel_values"].shape == (1, 3, 50, 70)
    with pytest.raises(ValueError, match="image 1 is 51 x 60 after resizing, larger than pad_size 50 x 70"):
        processor([rgb(), rgb(51, 60)])
    with pytest.raises(ValueError, match="pad_size needs height and width"):
        processor(rgb(), pad_size={"shortest_edge": 50})


def test_without_padding_images_keep_their_sizes():
    batch = MaskClsImageProcessor(do_resize=False, do_pad=False)(
        [rgb(40, 60), rgb(30, 20)], [np.zeros((40, 60)), np.zeros((30, 20))]
    )
    assert [tuple(values.shape) for values in batch["pixel_values"]] == [(3, 40, 60), (3, 30, 20)]
    assert [tuple(masks.shape) for masks in batch["mask_labels"]] == [(1, 40, 60), (1, 30, 20)]


@pytest.mark.parametrize("do_normalize", [True, False])
@pytest.mark.parametrize("size", [{"shortest_edge": 64, "longest_edge": 96}, {"height": 64, "width": 32}])
def test_pixels_equal_transformers_maskformer(size, do_normalize):
    """Where its size_divisor has nothing to distort (both sides come out as multiples of 32)."""
    images = [rgb(100, 150), rgb(80, 120, seed=1)]
    labels = [image[..., 0] % 5 for image in images]
    kwargs = {"size": size, "do_normalize": do_normalize}
    ours = MaskClsImageProcessor(**kwargs)(images, labels, return_tensors="pt")
    theirs = MaskFormerImageProcessor(**kwargs, ignore_index=VOID)(images, labels, return_tensors="pt")
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], rtol=0, atol=0)
    assert torch.equal(ours["pixel_mask"], theirs["pixel_mask"])
    for name in ("mask_labels", "class_labels"):
        for mine, other in zip(ours[name], theirs[name], strict=True):
            assert torch.equal(mine, other.to(mine.dtype))


def test_nearest_resizing_equals_torchs_nearest_exact():
    labels = torch.arange(7 * 11).reshape(1, 1, 7, 11)
    for size in [(14, 22), (3, 5), (7, 30), (1, 1)]:
        expected = torch.nn.functional.interpolate(labels.double(), size=size, mode="nearest-exact")
        assert torch.equal(resize_nearest(labels, size), expected.long())


def test_nearest_resizing_is_exact_for_large_ids():
    labels = torch.tensor([[2**40 + 1, 2**24 + 1]])
    assert resize_nearest(labels, (1, 4)).tolist() == [[2**40 + 1] * 2 + [2**24 + 1] * 2]


@settings(deadline=None, max_examples=25)
@given(st.integers(4, 50), st.integers(4, 50), st.integers(8, 60), st.integers(0, 3))
def test_image_and_labels_stay_together(height, width, shortest_edge, band):
    """A picture of a bright rectangle, and its label: the same place after resizing, to half a pixel of blur."""
    top, left = (height * band) // 8, (width * band) // 8
    labels = np.zeros((height, width), dtype=np.uint8)
    labels[top : height // 2 + 1, left : width // 2 + 1] = 1
    processor = MaskClsImageProcessor(
        size={"shortest_edge": shortest_edge, "longest_edge": 90}, do_rescale=False, do_normalize=False
    )
    image = Image.fromarray(labels * 255)
    batch = processor(image, labels, label_format="semantic", return_tensors="pt")
    new_height, new_width = resized_size((height, width), SizeDict(shortest_edge=shortest_edge, longest_edge=90))
    assert batch["pixel_mask"][0, :new_height, :new_width].all()
    assert int(batch["pixel_mask"].sum()) == new_height * new_width
    shown = batch["pixel_values"][0, 0, :new_height, :new_width]
    labeled = batch["labels"][0, :new_height, :new_width]
    sure = (shown < 1) | (shown > 254)
    if shortest_edge >= max(height, width):  # enlarged: far from the border a pixel has one source
        assert torch.equal((shown > 254)[sure], (labeled == 1)[sure])
    else:
        assert ((shown > 127.5) == (labeled == 1)).float().mean() > 0.7


# --- kinds and modes of images --------------------------------------------------------------------------------------


def test_kinds_of_input_agree(as_is, tmp_path):
    array = rgb()
    Image.fromarray(array).save(tmp_path / "image.png")
    same = [
        Image.fromarray(array),
        array,
        array.transpose(2, 0, 1),
        torch.from_numpy(array),
        torch.from_numpy(array).permute(2, 0, 1),
        array[::-1][::-1],
        array.astype(np.int64),
        array.astype(np.float64),
        array.astype(">u2") * np.array(257, dtype=">u2"),
        str(tmp_path / "image.png"),
        tmp_path / "image.png",
    ]
    expected = torch.from_numpy(array).permute(2, 0, 1).float()
    batch = as_is(same, return_tensors="pt")
    for values in batch["pixel_values"]:
        assert torch.equal(values[:, :40, :60], expected)
    for nested in ([same[:2], same[2:4]], np.stack([array] * 4), torch.from_numpy(np.stack([array] * 4))):
        assert as_is(nested, return_tensors="pt")["pixel_values"].shape == (4, 3, 64, 64)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LAB"])
def test_opaque_modes_equal_pillows_conversion(as_is, mode):
    image = Image.fromarray(rgb()).convert(mode)
    expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()
    assert torch.equal(pixels(as_is, image), expected)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA"])
def test_transparency_is_laid_over_white(as_is, mode):
    image = Image.fromarray(rgb()).convert("L" if mode == "LA" else "P" if mode == "PA" else "RGB").convert(mode)
    alpha = np.full((40, 60), 255, dtype=np.uint8)
    alpha[:10], alpha[10:20] = 0, 51
    image.putalpha(Image.fromarray(alpha))
    opaque = np.array(image.convert("RGBA"))[..., :3].transpose(2, 0, 1).astype(float)
    shown = pixels(as_is, image).numpy()
    assert np.array_equal(shown[:, 20:], opaque[:, 20:])
    assert (shown[:, :10] == 255).all()
    assert np.abs(shown[:, 10:20] - (0.2 * opaque[:, 10:20] + 0.8 * 255)).max() <= 0.5 + 1e-4


def test_transparent_palette_entry_and_rgba_arrays(as_is):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.info["transparency"] = 1
    assert (pixels(as_is, image) == 255).all()
    rgba = np.zeros((8, 9, 4), dtype=np.uint8)
    for array in (rgba, rgba.transpose(2, 0, 1), torch.from_numpy(rgba)):
        assert (pixels(as_is, array) == 255).all()
    assert (pixels(as_is, rgba.astype(np.float32)) == 1).all()  # floats of 0..1


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_files_are_scaled_not_clipped(as_is, tmp_path, suffix):
    values = np.linspace(0, 65535, 40 * 60).reshape(40, 60).astype(np.uint16)
    path = tmp_path / f"image{suffix}"
    Image.fromarray(values).save(path)
    expected = torch.from_numpy(values.astype(np.float32) / 257).expand(3, -1, -1)
    for image in (path, Image.open(path), values, values[..., None], torch.from_numpy(values)):
        torch.testing.assert_close(pixels(as_is, image), expected)
    colors = np.stack([values] * 3, axis=-1)
    torch.testing.assert_close(pixels(as_is, colors), expected)


def test_32_bit_gray_images(as_is):
    """Mode I holds 16-bit files (by Pillow's version) or converted 8-bit images."""
    gray = rgb()[..., 0]
    expected = torch.from_numpy(gray).expand(3, -1, -1).float()
    assert torch.equal(pixels(as_is, Image.fromarray(gray).convert("I")), expected)
    deep = Image.fromarray(gray.astype(np.int32) * 257)
    assert deep.mode == "I"
    assert torch.equal(pixels(as_is, deep), expected)
    with pytest.raises(ValueError, match=r"image 0: an image of mode 'I' holds values from 0 to 70000"):
        as_is(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)))


def test_bool_and_gray_arrays(as_is):
    mask = rgb()[..., 0] > 127
    for image in (mask, torch.from_numpy(mask), Image.fromarray(mask)):
        assert torch.equal(pixels(as_is, image), torch.from_numpy(mask).expand(3, -1, -1) * 255.0)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_exif_rotation(as_is, tmp_path, suffix):
    image = Image.fromarray(rgb())
    exif = image.getexif()
    exif[ORIENTATION] = ROTATED
    image.save(tmp_path / f"image{suffix}", exif=exif, **({"quality": 100} if suffix == ".jpg" else {}))
    labels = Image.fromarray(rgb()[..., 0] // 64)
    labels.save(tmp_path / "labels.png", exif=exif)
    upright = np.rot90(np.array(labels), -1)
    for source in (tmp_path / f"image{suffix}", Image.open(tmp_path / f"image{suffix}")):
        for label_map in (tmp_path / "labels.png", Image.open(tmp_path / "labels.png"), upright):
            batch = as_is(source, label_map, label_format="semantic", return_tensors="pt")
            assert batch["original_sizes"].tolist() == [[60, 40]]
            assert np.array_equal(batch["labels"][0, :60, :40].numpy(), upright)
    if suffix != ".jpg":
        expected = torch.from_numpy(np.rot90(rgb(), -1).copy()).permute(2, 0, 1).float()
        assert torch.equal(pixels(as_is, tmp_path / f"image{suffix}"), expected)
    with pytest.raises(ValueError, match="40 x 60 but the image is 60 x 40 .*EXIF"):
        as_is(tmp_path / f"image{suffix}", np.array(labels))


def test_image_in_a_data_url(as_is, tmp_path):
    Image.fromarray(rgb()).save(tmp_path / "image.png")
    data = base64.b64encode((tmp_path / "image.png").read_bytes()).decode()
    expected = torch.from_numpy(rgb()).permute(2, 0, 1).float()
    assert torch.equal(pixels(as_is, f"data:image/png;base64,{data}"), expected)


def test_the_input_is_not_changed():
    image = torch.from_numpy(rgb()).permute(2, 0, 1).float()
    before = image.clone()
    MaskClsImageProcessor(do_resize=False)(image)
    assert torch.equal(image, before)


def test_images_that_are_scaled_already_are_pointed_out(monkeypatch):
    messages: list[str] = []
    monkeypatch.setattr(image_processing_maskcls.logger, "warning_once", messages.append)
    processor = MaskClsImageProcessor()
    processor(rgb().astype(np.float32))
    processor(rgb().astype(np.float32) / 255, do_rescale=False)
    assert messages == []
    processor(rgb().astype(np.float32) / 255)
    assert len(messages) == 1 and "do_rescale=False" in messages[0]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((5, 6, 7), dtype=np.uint8), r"image 1: no axis of shape \(5, 6, 7\) holds 1, 3 or 4 channels"),
        (np.zeros((4, 5), dtype=np.int32) + 300, "image 1: an image of torch.int32 holds values from 300 to 300"),
        (np.zeros((0, 5, 3), dtype=np.uint8), "image 1: the image is empty"),
        (np.zeros(5), "image 1: an image has 2 or 3 dimensions"),
        (None, "image 1 is a NoneType; expected a PIL image, array, tensor or path"),
        (3.5, "image 1 is a float"),
        (np.array(3.5), r"image 1: an image has 2 or 3 dimensions, got shape \(\)"),
        (np.zeros((4, 5), dtype=complex), "image 1: an array of complex128 holds no real numbers"),
        (torch.zeros(3, 4, 5, dtype=torch.complex64), "image 1: an image of torch.complex64 holds no real numbers"),
        (np.array([["a", "b"]]), "image 1: an array of <U1 holds no real numbers"),
        (np.array([[None]]), "image 1: an array of object holds no real numbers"),
        (np.full((4, 5), 300, dtype=np.uint32), "image 1: an image of torch.int64 holds values from 300 to 300"),
        (np.full((4, 5), 2**64 - 1, dtype=np.uint64), "image 1: an array of uint64 holds 18446744073709551615"),
        (
            np.array([[0, np.nan, -np.inf]], dtype=np.float32),
            "image 1: the image holds NaN or infinity at 2 of 3 values",
        ),
        (torch.full((3, 4, 5), torch.inf, dtype=torch.float16), "image 1: .* at 60 of 60 values"),
        (np.full((4, 5), 1e300), "image 1: .* at 20 of 20 values"),
        (Image.new("RGB", (0, 5)), "image 1: the image is empty"),
        (np.ma.masked_equal(np.eye(4), 0), "image 1: some values of the array are masked"),
    ],
)
def test_what_is_no_image(image, message):
    with pytest.raises((ValueError, TypeError), match=message):
        MaskClsImageProcessor()([rgb(), image])


@pytest.mark.parametrize("dtype", [bool, np.uint32, np.uint64, np.int8, np.int64, ">u4", np.longdouble])
def test_arrays_of_every_type_are_read(as_is, dtype):
    image = rgb() % 2
    expected = image * 255 if dtype is bool else image
    assert np.array_equal(pixels(as_is, image.astype(dtype)).numpy(), expected.transpose(2, 0, 1))
    if dtype not in (bool, ">u4", np.longdouble):
        tensor = torch.from_numpy(image).to(getattr(torch, np.dtype(dtype).name))
        assert np.array_equal(pixels(as_is, tensor).numpy(), expected.transpose(2, 0, 1))


def test_files_that_cannot_be_read_are_named(tmp_path):
    good, cut = tmp_path / "good.jpg", tmp_path / "cut.jpg"
    Image.fromarray(rgb(64, 64)).save(good)
    cut.write_bytes(good.read_bytes()[:900])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    processor = MaskClsImageProcessor()
    for path in (cut, str(cut), tmp_path / "text.png", str(tmp_path / "empty.png")):
        name = str(path).rsplit("/", maxsplit=1)[-1]
        with pytest.raises(ValueError, match=f"{name} cannot be read as an image: "):
            processor([good, path])
        with pytest.raises(ValueError, match=f"{name} cannot be read as an image: "):
            processor([good, good], segmentation_maps=[np.zeros((64, 64)), path])
    for source in ("nowhere.png", "data:image/png;base64,AAAA"):
        with pytest.raises(ValueError, match=f"{source} cannot be read as an image"):
            processor([str(good), source])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        processor([good, tmp_path / "nowhere.png"])


def test_no_image_at_all():
    with pytest.raises(ValueError, match="no image given"):
        MaskClsImageProcessor()([])


def test_channels_and_mean_must_fit():
    with pytest.raises(ValueError, match="image 0 has 4 channels but image_mean has 3 values"):
        MaskClsImageProcessor(do_convert_rgb=False)(np.zeros((8, 9, 4), dtype=np.uint8))
    four = {"image_mean": [0.0] * 4, "image_std": [1.0] * 4, "do_convert_rgb": False}
    assert MaskClsImageProcessor(**four)(np.zeros((8, 9, 4), dtype=np.uint8))["pixel_values"][0].shape[0] == 4


# --- annotations ----------------------------------------------------------------------------------------------------


def targets(
    maps: Any, *args: Any, size: tuple[int, int] | None = None, **kwargs: Any
) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """(mask_labels, class_labels, void_mask) of one image that is neither resized nor padded."""
    shape = size or np.asarray(maps).shape
    processor = MaskClsImageProcessor(do_resize=False, size_divisor=None, **kwargs)
    batch = processor(blank(*shape), maps, *args, return_tensors="pt")
    masks, classes, void = batch["mask_labels"][0], batch["class_labels"][0], batch["void_mask"][0]
    assert masks.dtype == torch.bool and void.dtype == torch.bool and classes.dtype == torch.int64
    assert masks.shape == (len(classes), *shape) and void.shape == shape
    return masks, classes.tolist(), void


def test_semantic_map():
    labels = np.array([[0, 2, 2], [255, 7, 0]])
    masks, classes, void = targets(labels)
    assert classes == [0, 2, 7]
    for mask, class_id in zip(masks, classes, strict=True):
        assert np.array_equal(mask, labels == class_id)
    assert np.array_equal(void, labels == 255)


@pytest.mark.parametrize("options", [{"label_offset": 1}, {"do_reduce_labels": True, "ignore_index": 255}])
def test_void_survives_the_offset(options):
    """ADE20K's files: classes from 1, 0 and 255 unlabeled."""
    masks, classes, void = targets(np.array([[0, 1, 150, 255]]), num_labels=150, **options)
    assert classes == [0, 149]
    assert void.tolist() == [[True, False, False, True]]
    assert masks.tolist() == [[[False, True, False, False]], [[False, False, True, False]]]


def test_values_below_the_offset_are_void():
    masks, classes, void = targets(np.array([[-1, 0, 1, 2]]), label_offset=1)
    assert classes == [0, 1] and void.tolist() == [[True, True, False, False]]


def test_no_void_id():
    masks, classes, void = targets(np.array([[254, 255]], dtype=np.uint8), void_id=None)
    assert classes == [254, 255] and not void.any()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.float32, ">u2"])
def test_label_dtypes(dtype):
    labels = np.array([[0, 1], [5, 5]]).astype(dtype)
    assert targets(labels)[1] == [0, 1, 5]
    if np.dtype(dtype).isnative:
        assert targets(torch.from_numpy(labels))[1] == [0, 1, 5]


def test_bool_map_and_single_channel_maps():
    labels = np.array([[True, False, True]] * 2)
    assert targets(labels)[1] == [0, 1]
    assert targets(labels[..., None], size=(2, 3))[1] == [0, 1]
    assert targets(labels[None], size=(2, 3))[1] == [0, 1]


@pytest.mark.parametrize("mode", ["L", "P", "I", "I;16", "1"])
def test_pil_label_maps_give_their_values(mode):
    values = np.arange(6, dtype=np.uint8).reshape(2, 3) % (2 if mode == "1" else 6)
    if mode == "P":
        labels = Image.fromarray(values, mode="L").convert("P")
        labels.putpalette([200, 10, 10, 90, 80, 70] * 3)  # two indices of one color stay two
        labels.putdata(values.flatten().tolist())
    elif mode == "I;16":
        labels = Image.fromarray(values.astype(np.uint16))
    else:
        labels = Image.fromarray(values * (255 if mode == "1" else 1)).convert(mode)
    assert labels.mode == mode
    assert targets(labels, size=(2, 3))[1] == np.unique(values).tolist()


def test_label_map_from_a_palette_file(tmp_path):
    labels = Image.fromarray(np.array([[0, 1, 255]], dtype=np.uint8), mode="L").convert("P")
    labels.putpalette(list(range(255, -1, -1)) * 3)
    labels.putdata([0, 1, 255])
    labels.save(tmp_path / "labels.png")
    masks, classes, void = targets(tmp_path / "labels.png", size=(1, 3))
    assert classes == [0, 1] and void.tolist() == [[False, False, True]]


def test_instance_map_with_shared_and_own_dicts():
    labels = np.array([[1, 1, 2], [3, 255, 2]])
    masks, classes, void = targets(labels, {1: 4, 2: 4, 3: 0})
    assert classes == [4, 4, 0] and [int(mask.sum()) for mask in masks] == [2, 2, 1]
    assert void.tolist() == [[False] * 3, [False, True, False]]
    processor = MaskClsImageProcessor(do_resize=False)
    image = blank(2, 3)
    batch = processor([image, image], [labels, labels], [{1: 4, 2: 4, 3: 0}, {1: 0, 2: 1, 3: 2}])
    assert [classes.tolist() for classes in batch["class_labels"]] == [[4, 4, 0], [0, 1, 2]]


def test_instances_mapped_to_void_or_to_no_segment():
    """Void pixels leave the loss; pixels of no segment stay in it as negatives."""
    masks, classes, void = targets(np.array([[0, 1, 2, 3]]), {0: None, 1: 5, 2: VOID, 3: 0})
    assert classes == [5, 0] and void.tolist() == [[False, False, True, False]]
    labels = MaskClsImageProcessor(do_resize=False, size_divisor=None, label_format="semantic")(
        blank(1, 4), np.array([[0, 1, 2, 3]]), {0: None, 1: 5, 2: VOID, 3: 0}
    )["labels"][0]
    assert labels.tolist() == [[VOID, 5, VOID, 0]]


def test_more_instances_than_the_void_id():
    labels = np.arange(300).reshape(10, 30).astype(np.uint16)
    every = {i: i % 3 for i in range(300)}
    assert targets(labels, every)[1] == list(every.values())  # named in the dict: an instance like any other
    assert targets(labels, every, void_id=None)[1] == list(every.values())
    unnamed = {i: c for i, c in every.items() if i != VOID}
    masks, classes, void = targets(labels, unnamed)
    assert len(classes) == 299 and int(void.sum()) == 1
    with pytest.raises(ValueError, match=r"image 0: instance ids \[255\] of the map are missing"):
        targets(labels, unnamed, void_id=None)


def test_label_offset_applies_to_the_classes_of_instances():
    """As with transformers' do_reduce_labels: instance 0 without a class is the unlabeled part."""
    masks, classes, void = targets(np.array([[0, 1, 2]]), {1: 1, 2: 0}, label_offset=1)
    assert classes == [0] and void.tolist() == [[True, False, True]]


def test_coco_panoptic_ids_are_exact():
    ids = np.array([[2**24 - 1, 2**24 - 2], [7, 7]])
    masks, classes, _ = targets(ids, {2**24 - 1: 1, 2**24 - 2: 2, 7: 3})
    assert classes == [3, 2, 1] and masks[1].tolist() == [[False, True], [False, False]]


def test_overlapping_stack():
    stack = np.zeros((3, 4, 5), dtype=bool)
    stack[0, :3], stack[1, 1:], stack[2, :, 0] = True, True, True
    expected = torch.from_numpy(stack)
    for masks_in in (
        stack,
        list(stack),
        stack.astype(np.uint8) * 255,
        torch.from_numpy(stack),
        [Image.fromarray(m) for m in stack],
    ):
        processor = MaskClsImageProcessor(do_resize=False, size_divisor=None)
        batch = processor(blank(4, 5), masks_in, class_labels=[2, 0, 2], return_tensors="pt")
        assert torch.equal(batch["mask_labels"][0], expected)
        assert batch["class_labels"][0].tolist() == [2, 0, 2] and not batch["void_mask"].any()


def test_stacks_of_a_batch_with_an_empty_image():
    processor = MaskClsImageProcessor(size={"shortest_edge": 32}, num_labels=3)
    images = [rgb(40, 60), rgb(50, 40)]
    full = np.ones((2, 40, 60), dtype=bool)
    for empty in ([], np.zeros((0, 50, 40))):
        batch = processor(images, [full, empty], class_labels=[[1, 2], []], return_tensors="pt")
        assert [tuple(masks.shape) for masks in batch["mask_labels"]] == [(2, 64, 64), (0, 64, 64)]
        assert batch["mask_labels"][0].sum() == 2 * 32 * 48 and batch["class_labels"][1].shape == (0,)
    alone = processor(images[0], [], class_labels=[], return_tensors="pt")
    assert alone["mask_labels"][0].shape == (0, 32, 64)


def test_void_mask_in_a_stack_yields_to_segments():
    stack = np.array([[[1, 1, 0]], [[0, 1, 1]], [[0, 0, 0]]], dtype=bool)
    batch = MaskClsImageProcessor(do_resize=False, size_divisor=None)(
        blank(1, 3), stack, class_labels=np.array([0, VOID, 4]), return_tensors="pt"
    )
    assert batch["class_labels"][0].tolist() == [0]  # the third mask has no pixel
    assert batch["void_mask"].tolist() == [[[False, False, True]]]


def test_an_image_without_segments():
    masks, classes, void = targets(np.full((4, 5), VOID, dtype=np.uint8))
    assert classes == [] and void.all()


@settings(deadline=None, max_examples=40)
@given(
    hnp.arrays(
        np.int64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.sampled_from([0, 1, 2, 3, 9, VOID])
    ),
    st.sampled_from([None, VOID, 9]),
    st.integers(0, 2),
    st.sampled_from([None, 8, 24]),
)
def test_masks_and_void_partition_the_image(labels, void_id, offset, shortest_edge):
    processor = MaskClsImageProcessor(
        size={"shortest_edge": shortest_edge or 1},
        do_resize=shortest_edge is not None,
        void_id=void_id,
        label_offset=offset,
    )
    batch = processor(blank(*labels.shape), labels, return_tensors="pt")
    masks, classes = batch["mask_labels"][0], batch["class_labels"][0]
    covered = masks.sum(0) + batch["void_mask"][0].long()
    assert torch.equal(covered, batch["pixel_mask"][0])  # each image pixel once, padding never
    assert len(set(classes.tolist())) == len(classes) and masks.flatten(1).any(1).all()
    if shortest_edge is None:
        height, width = labels.shape
        for mask, class_id in zip(masks, classes.tolist(), strict=True):
            assert np.array_equal(mask[:height, :width], labels == class_id + offset)
        void = (labels < offset) if void_id is None else (labels < offset) | (labels == void_id)
        assert np.array_equal(batch["void_mask"][0, :height, :width], void)


@settings(deadline=None, max_examples=25)
@given(hnp.arrays(np.bool_, st.tuples(st.integers(0, 4), st.integers(1, 8), st.integers(1, 8))))
def test_stacks_keep_every_mask_with_pixels(stack):
    kept = [i for i, mask in enumerate(stack) if mask.any()]
    batch = MaskClsImageProcessor(do_resize=False, size_divisor=None)(
        blank(*stack.shape[1:]), [stack], class_labels=[list(range(len(stack)))]
    )
    assert batch["class_labels"][0].tolist() == kept
    assert np.array_equal(batch["mask_labels"][0], stack[kept])


@settings(deadline=None, max_examples=25)
@given(hnp.arrays(np.int64, (6, 9), elements=st.sampled_from([0, 1, 2, 7, VOID])), st.booleans())
def test_a_map_of_places_holds_the_same_segments(labels, instances):
    mapping = {0: None, 1: 2, 2: 2, 7: 0} if instances else None
    processor = MaskClsImageProcessor(size={"shortest_edge": 12}, size_divisor=8)
    stacks, maps = (
        processor(blank(6, 9), labels, mapping, label_format=form, return_tensors="pt")
        for form in ("segments", "segment_map")
    )
    (places,) = maps["mask_labels"]
    assert places.dtype == torch.int32 and places.shape == stacks["mask_labels"][0].shape[1:]
    assert torch.equal(places == torch.arange(len(stacks["class_labels"][0])).view(-1, 1, 1), stacks["mask_labels"][0])
    for name in ("class_labels", "void_mask"):
        assert all(torch.equal(a, b) for a, b in zip(stacks[name], maps[name], strict=True))


def test_a_stack_becomes_a_map_of_places_unless_masks_overlap():
    processor = MaskClsImageProcessor(do_resize=False, size_divisor=None, label_format="segment_map")
    apart = np.array([[[1, 0, 0]], [[0, 0, 0]], [[0, 0, 1]]], dtype=bool)
    batch = processor(blank(1, 3), apart, class_labels=[4, 1, 2], return_tensors="pt")
    assert batch["mask_labels"][0].tolist() == [[0, -1, 1]] and batch["class_labels"][0].tolist() == [4, 2]
    over = np.array([[[1, 1, 0]], [[0, 1, 1]]], dtype=bool)
    batch = processor(blank(1, 3), over, class_labels=[4, 1], return_tensors="pt")
    assert torch.equal(batch["mask_labels"][0], torch.from_numpy(over))


def test_semantic_format():
    processor = MaskClsImageProcessor(do_resize=False, label_format="semantic", label_offset=1, num_labels=3)
    labels = np.array([[0, 1, 2], [3, 255, 1]], dtype=np.uint8)
    batch = processor([blank(2, 3)] * 2, [labels, labels], return_tensors="pt")
    assert batch["labels"].shape == (2, 32, 32) and batch["labels"].dtype == torch.int64
    assert batch["labels"][0, :2, :3].tolist() == [[VOID, 0, 1], [2, VOID, 0]]
    assert (batch["labels"][batch["pixel_mask"] == 0] == VOID).all() and "mask_labels" not in batch


def test_semantic_format_of_stacks():
    processor = MaskClsImageProcessor(do_resize=False, size_divisor=None, label_format="semantic")
    image, stack = blank(1, 3), np.array([[[1, 1, 0]], [[0, 1, 0]]], dtype=bool)
    assert processor(image, stack, class_labels=[4, 4])["labels"][0].tolist() == [[4, 4, VOID]]
    with pytest.raises(ValueError, match="image 0: segments of different classes overlap"):
        processor(image, stack, class_labels=[4, 5])


@pytest.mark.parametrize(
    "options", [{"void_id": None}, {"void_id": 0, "label_offset": 1}, {"void_id": 1, "num_labels": 3}]
)
def test_semantic_format_needs_a_void_id_that_is_no_class(options):
    with pytest.raises(ValueError, match="no class id after label_offset"):
        processor = MaskClsImageProcessor(label_format="semantic", **options)
        processor(blank(1, 3), np.array([[0, 1, 2]]))


# --- errors of annotations ------------------------------------------------------------------------------------------


def second_map(labels: Any, *args: Any, **kwargs: Any) -> None:
    """The labels as those of the second image of a batch of two."""
    image = blank(2, 3)
    good = np.zeros((2, 3), dtype=np.uint8)
    MaskClsImageProcessor(**kwargs)([image, image], [good, labels], *args)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (np.array([[1, 2, 3]] * 2), {"num_labels": 3}, r"label ids \[3\] .*counted from 1: set label_offset=1"),
        (
            np.array([[0, 1, 255]] * 2),
            {"num_labels": 3, "void_id": 254},
            r"\[255\].*255 marks unlabeled .*void_id=255",
        ),
        (
            np.array([[0, 30, 70]] * 2),
            {"num_labels": 3},
            r"\[30, 70\] are outside the 3 classes.*from 0 to 2.*instance_id_to",
        ),
        (np.array([[0, 30, 70]] * 2), {"num_labels": 3}, r"palette or color image"),
        (np.zeros((2, 3, 3), dtype=np.uint8), {}, r"array of shape \(2, 3, 3\).*R \+ 256 \* G \+ 65536 \* B"),
        (Image.new("RGB", (3, 2)), {}, "image of mode 'RGB'.*COCO panoptic PNG"),
        (Image.new("RGBA", (3, 2)), {}, "image of mode 'RGBA'"),
        (np.zeros((3, 2), dtype=np.uint8), {}, r"map is 3 x 2 but the image is 2 x 3 \(height x width\).*swapped"),
        (np.zeros((5, 4), dtype=np.uint8), {}, r"map is 5 x 4 but the image is 2 x 3"),
        (np.full((2, 3), 0.5), {}, "labels must be integers, got torch.float64"),
        ("nowhere.png", {}, "segmentation map 'nowhere.png' is not a file"),
        (None, {}, "there is no segmentation map"),
        (np.zeros((2, 3), dtype=complex), {}, "an array of complex128 holds no real numbers"),
        (torch.zeros(2, 3, dtype=torch.complex64), {}, "labels must be integers, got torch.complex64"),
        (np.array([[None] * 3] * 2), {}, "an array of object holds no real numbers"),
        (np.ma.masked_equal(np.eye(2, 3, dtype=int), 0), {}, "some values of the array are masked"),
        (np.full((2, 3), np.nan), {}, "labels must be integers, got torch.float64 with fractions or NaN"),
        (np.full((2, 3), 2**63, dtype=np.uint64), {}, "an array of uint64 holds 9223372036854775808"),
    ],
)
def test_errors_name_the_image_and_the_cause(labels, options, message):
    with pytest.raises(ValueError, match="image 1.*" + message):
        second_map(labels, **options)


def test_instance_ids_without_a_class():
    labels = np.arange(6).reshape(2, 3)
    with pytest.raises(
        ValueError, match=r"image 1: instance ids \[3, 4, 5\] .*missing from instance_id_to_semantic_id"
    ):
        second_map(labels, {0: 0, 1: 1, 2: 0})
    with pytest.raises(ValueError, match="keys are strings; they must be integers"):
        second_map(labels, {"0": 0})
    with pytest.raises(ValueError, match=r"image 1: label ids \[9\] are outside the 2 classes"):
        second_map(labels, dict.fromkeys(range(5), 0) | {5: 9}, num_labels=2)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({0: 1.5}, r"instance_id_to_semantic_id\[0\]=1.5 must be an integer or None"),
        ({0: np.float64("nan")}, r"instance_id_to_semantic_id\[0\]=nan must be an integer or None"),
        ({0: "sky"}, r"instance_id_to_semantic_id\[0\]='sky' must be an integer or None"),
        ([0, 1], "must be a dict, got a list"),
    ],
)
def test_classes_of_instances_that_are_none(classes, message):
    with pytest.raises(ValueError, match=f"image 1: .*{message}"):
        second_map(np.zeros((2, 3), dtype=int), [{0: 0}, classes])


@pytest.mark.parametrize(
    "keys", [lambda ids: [int(i) for i in ids], np.array, lambda ids: torch.unique(torch.tensor(ids))]
)
@pytest.mark.parametrize("value", [2, 2.0, np.uint8(2), np.float32(2), torch.tensor(2)])
def test_classes_of_instances_in_every_form(keys, value):
    labels = np.array([[0, 7, 9]])
    batch = MaskClsImageProcessor(do_resize=False)(blank(1, 3), labels, {i: value for i in keys([0, 7, 9])})
    assert batch["class_labels"][0].tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "labels", [[1, 0], (1.0, 0.0), np.array([1, 0], np.uint64), torch.tensor([1.0, 0.0]), [torch.tensor(1), np.int8(0)]]
)
def test_class_labels_in_every_form(labels):
    stack = np.array([[[True, False]], [[False, True]]])
    batch = MaskClsImageProcessor(do_resize=False)(blank(1, 2), stack, class_labels=labels)
    assert batch["class_labels"][0].tolist() == [1, 0] and batch["class_labels"][0].dtype == torch.int64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"segmentation_maps": [np.zeros((2, 3))]}, "2 images but 1 segmentation maps"),
        (
            {"segmentation_maps": [np.zeros((2, 3))] * 2, "instance_id_to_semantic_id": [{0: 0}]},
            "2 images but 1 instance",
        ),
        ({"segmentation_maps": [np.zeros((1, 2, 3))] * 2, "class_labels": [[0]]}, "2 images but 1 class_labels"),
        (
            {"segmentation_maps": [np.zeros((2, 2, 3))] * 2, "class_labels": [[0, 1], [0]]},
            "image 1: 2 masks but 1 class",
        ),
        ({"segmentation_maps": [np.zeros((2, 3))] * 2, "class_labels": [[0], [0]]}, r"stack of masks \(M, H, W\)"),
        (
            {"segmentation_maps": [np.ones((1, 2, 3)), np.arange(6).reshape(1, 2, 3)], "class_labels": [[0], [0]]},
            "image 1: a mask has one nonzero",
        ),
        (
            {"segmentation_maps": [[np.ones((2, 3)), np.ones((3, 2))]] * 2, "class_labels": [[0, 0]] * 2},
            "different sizes",
        ),
        ({"segmentation_maps": [np.ones((1, 2, 3))] * 2, "class_labels": [[0], [0.5]]}, "image 1: labels must be int"),
        ({"segmentation_maps": [np.ones((1, 2, 3))] * 2, "class_labels": [[0], ["a"]]}, "image 1: an array of <U1"),
        ({"segmentation_maps": [np.ones((1, 2, 3))] * 2, "class_labels": [[0], [None]]}, "image 1: an array of object"),
        ({"segmentation_maps": [np.ones((1, 2, 3))] * 2, "class_labels": 1}, "class_labels must be a list"),
        (
            {"segmentation_maps": [np.ones((1, 2, 3)), np.ones((2, 3, 1))], "class_labels": [[0], [0]]},
            r"image 1: .*masks come first in a stack, \(M, H, W\)",
        ),
        ({"class_labels": [[0], [0]]}, "give segmentation_maps"),
        ({"instance_id_to_semantic_id": {0: 0}}, "give segmentation_maps"),
    ],
)
def test_annotations_that_do_not_fit_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        MaskClsImageProcessor()([blank(2, 3)] * 2, **arguments)


# --- kinds of output ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("return_tensors", "kind"), [(None, torch.Tensor), ("pt", torch.Tensor), ("np", np.ndarray)])
def test_return_tensors(return_tensors, kind):
    labels = rgb()[..., 0] % 3
    batch = MaskClsImageProcessor(do_resize=False)([rgb()] * 2, [labels, labels], return_tensors=return_tensors)
    for name in ("pixel_values", "pixel_mask", "original_sizes", "void_mask"):
        if return_tensors is None:
            assert isinstance(batch[name], list)
        assert isinstance(batch[name] if return_tensors else batch[name][0], kind), name
    for name in ("mask_labels", "class_labels"):
        assert isinstance(batch[name], list) and isinstance(batch[name][0], kind), name


def test_half_precision_leaves_labels_alone():
    batch = MaskClsImageProcessor(do_resize=False)(rgb(), rgb()[..., 0] % 3, return_tensors="pt").to(torch.bfloat16)
    assert batch["pixel_values"].dtype == torch.bfloat16
    assert batch["mask_labels"][0].dtype == torch.bool and batch["pixel_mask"].dtype == torch.int64


# --- options --------------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    options = {
        "size": {"shortest_edge": 40, "longest_edge": 80},
        "size_divisor": 16,
        "pad_size": {"height": 96, "width": 96},
        "void_id": 0,
        "label_offset": 1,
        "num_labels": 7,
        "label_format": "semantic",
        "label_ids_to_fuse": [1, 5],
        "image_mean": (0.1, 0.2, 0.3),
        "do_convert_rgb": False,
    }
    processor = MaskClsImageProcessor(**options)
    processor.save_pretrained(tmp_path)
    loaded = MaskClsImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    for name, value in options.items():
        assert getattr(loaded, name) == value, name
    overridden = MaskClsImageProcessor.from_pretrained(tmp_path, void_id=9, do_reduce_labels=False)
    assert (overridden.void_id, overridden.label_offset) == (9, 0)


def test_no_void_and_no_divisor_survive_saving(tmp_path):
    MaskClsImageProcessor(void_id=None, size_divisor=None, label_ids_to_fuse={3, 1}).save_pretrained(tmp_path)
    loaded = MaskClsImageProcessor.from_pretrained(tmp_path)
    assert loaded.void_id is None and loaded.size_divisor is None and loaded.label_ids_to_fuse == [1, 3]


def test_aliases_are_saved_under_their_own_names():
    processor = MaskClsImageProcessor(ignore_index=7, do_reduce_labels=True)
    saved = processor.to_dict()
    assert (saved["void_id"], saved["label_offset"]) == (7, 1)
    assert "ignore_index" not in saved and "do_reduce_labels" not in saved


def test_aliases_read_back_as_they_were_set(tmp_path):
    made = MaskClsImageProcessor(do_reduce_labels=True, ignore_index=0)
    made.save_pretrained(tmp_path)
    changed = MaskClsImageProcessor()
    changed.ignore_index, changed.do_reduce_labels = 0, True
    for processor in (made, MaskClsImageProcessor.from_pretrained(tmp_path), changed):
        assert (processor.ignore_index, processor.do_reduce_labels) == (0, True)
        assert (processor.void_id, processor.label_offset) == (0, 1)
    assert (MaskClsImageProcessor().ignore_index, MaskClsImageProcessor().do_reduce_labels) == (255, False)
    assert MaskClsImageProcessor.from_pretrained(tmp_path, ignore_index=7).void_id == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ignore_index": 0, "void_id": 255}, "ignore_index=0 is another name of void_id"),
        ({"do_reduce_labels": True, "label_offset": 0}, "do_reduce_labels=True is another name of label_offset=1"),
    ],
)
def test_an_option_has_one_value(options, message):
    with pytest.raises(ValueError, match=message):
        MaskClsImageProcessor(**options)
    with pytest.raises(ValueError, match=message):
        MaskClsImageProcessor()(rgb(), **options)


def test_numbers_of_numpy_are_saved_and_count_as_pythons(tmp_path):
    options = {
        "void_id": np.uint8(254), "label_offset": np.int64(1), "num_labels": np.int64(9), "size_divisor": np.int32(8),
        "size": {"height": np.int64(16), "width": np.int64(24)}, "image_mean": np.zeros(3), "image_std": np.ones(3),
        "rescale_factor": np.float32(0.5), "label_ids_to_fuse": np.array([3, 1]),
    }  # fmt: skip
    processor = MaskClsImageProcessor(**options)
    processor.save_pretrained(tmp_path)
    assert MaskClsImageProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()
    here = MaskClsImageProcessor()(rgb(), np.full((40, 60), 254), **options, return_tensors="pt")
    there = processor(rgb(), np.full((40, 60), 254), return_tensors="pt")
    assert torch.equal(here["pixel_values"], there["pixel_values"]) and here["void_mask"].all()


def test_unknown_options_are_pointed_out(tmp_path, caplog):
    MaskClsImageProcessor(do_rezise=False, foo=1)
    assert "no 'do_rezise': did you mean 'do_resize'?" in caplog.text and "no 'foo', it has no effect" in caplog.text
    MaskClsImageProcessor().save_pretrained(tmp_path)
    MaskClsImageProcessor.from_pretrained(tmp_path, voidid=3)
    assert "no 'voidid': did you mean 'void_id'?" in caplog.text
    with pytest.raises(TypeError, match="no 'void_ids': did you mean 'void_id'"):
        MaskClsImageProcessor()(rgb(), void_ids=3)
    caplog.clear()
    MaskClsImageProcessor.from_pretrained(tmp_path, trust_remote_code=True, dtype=torch.float32, revision="main")
    MaskFormerImageProcessor().save_pretrained(tmp_path)
    MaskClsImageProcessor.from_pretrained(tmp_path)
    assert not caplog.text


def test_loads_the_config_of_transformers_maskformer(tmp_path):
    MaskFormerImageProcessor(ignore_index=255, do_reduce_labels=True, num_labels=150).save_pretrained(tmp_path)
    ours = MaskClsImageProcessor.from_pretrained(tmp_path)
    assert (ours.void_id, ours.label_offset, ours.num_labels, ours.size_divisor) == (255, 1, 150, 32)
    assert ours.size == {"shortest_edge": 800, "longest_edge": 1333}
    oldest = MaskClsImageProcessor(size=640, max_size=2560, reduce_labels=True, size_divisibility=64, ignore_index=255)
    assert oldest.size == {"shortest_edge": 640, "longest_edge": 2560}
    assert (oldest.label_offset, oldest.size_divisor) == (1, 64)


def test_options_of_one_call():
    processor = MaskClsImageProcessor(do_resize=False)
    labels = np.full((40, 60), 3, dtype=np.uint8)
    batch = processor(rgb(), labels, void_id=3, size_divisor=7, return_tensors="pt")
    assert batch["pixel_values"].shape[-2:] == (42, 63) and batch["void_mask"].sum() == 40 * 60
    assert processor.void_id == 255 and processor.size_divisor == 32
    assert processor(rgb(), labels, ignore_index=3)["class_labels"][0].shape == (0,)
    assert processor(rgb(), labels, do_reduce_labels=True)["class_labels"][0].tolist() == [2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_format": "panoptic"}, "label_format must be one of"),
        ({"size_divisor": -1}, "size_divisor must be positive"),
        ({"do_center_crop": True, "crop_size": 10}, "do_center_crop is not supported"),
        ({"num_labels": 0}, "num_labels=0 must be at least 1"),
        ({"image_std": [0.2, 0.0, 0.2]}, "image_std=.* must be above 0"),
        ({"image_mean": [0.2, np.nan, 0.2]}, "image_mean=.* must be a number"),
        ({"resample": 99}, "resample=99 must be one of 0, "),
        ({"rescale_factor": 0.0}, "rescale_factor=0.0 must be above 0"),
        ({"size": {"shortest_edge": -5}}, "size\\['shortest_edge'\\]=-5 must be at least 1"),
        ({"pad_size": {"height": 0, "width": 5}}, "pad_size.*=.* must be at least 1"),
        ({"data_format": "channels_last"}, "data_format='channels_last': pixel_values are"),
        ({"label_ids_to_fuse": [1, -1]}, r"label_ids_to_fuse must be a list of class ids, got \[1, -1\]"),
        ({"label_ids_to_fuse": [3], "num_labels": 3}, r"label_ids_to_fuse=\[3\] must be class ids below num_labels=3"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        MaskClsImageProcessor(**options)
    with pytest.raises(ValueError, match=message):
        MaskClsImageProcessor()(rgb(), **options)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *((name, "255", "must be an integer") for name in ("void_id", "label_offset", "num_labels", "size_divisor")),
        ("image_mean", "a", "must be a number"),
        ("size", {"shortest_edge": 64.5}, "must be an integer"),
        ("label_ids_to_fuse", ["sky"], "must be a list of class ids"),
        ("label_ids_to_fuse", 3, "must be a list of class ids"),
        ("do_resize", "no", "must be True or False"),
    ],
)
def test_options_of_a_wrong_type(name, value, message):
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        MaskClsImageProcessor(**{name: value})


@pytest.mark.parametrize(("value", "said"), [(60000.0, True), (-1.0, True), (255.0, False), (0.0, False)])
def test_floats_outside_of_the_scale_are_pointed_out(monkeypatch, value, said):
    messages = []
    monkeypatch.setattr(image_processing_maskcls.logger, "warning_once", messages.append)
    image = np.full((8, 8, 3), value, dtype=np.float32)
    MaskClsImageProcessor()([rgb(), image])
    MaskClsImageProcessor()([rgb(), image], rescale_factor=1 / 60000)
    MaskClsImageProcessor()([rgb(), image], do_rescale=False)
    assert len(messages) == said and all("image 1 holds floating-point values from" in text for text in messages)


# --- outputs to maps ------------------------------------------------------------------------------------------------

SIZES = {
    "padded_sizes": torch.tensor([[32, 64], [32, 64]]),
    "valid_sizes": torch.tensor([[30, 60], [32, 40]]),
    "original_sizes": torch.tensor([[15, 30], [64, 80]]),
}
WITH_SIZES = [(15, 30), (64, 80)]


def mask_outputs(**sizes: torch.Tensor) -> MaskFormerForInstanceSegmentationOutput:
    """Two images, three queries, two classes. Queries 0 and 1 are the left and the right half, classes 1 and 0;
    query 2 is a copy of 0 that is no object."""
    masks = torch.full((2, 3, 8, 16), -8.0)
    masks[:, 0, :, :6] = masks[:, 1, :, 6:] = masks[:, 2, :, :6] = 8.0
    classes = torch.tensor([[-4.0, 4.0, -4.0], [4.0, -4.0, -4.0], [-4.0, -4.0, 4.0]]).expand(2, 3, 3)
    outputs = MaskFormerForInstanceSegmentationOutput(class_queries_logits=classes, masks_queries_logits=masks)
    for name, values in sizes.items():
        setattr(outputs, name, values)
    return outputs


def one_image(outputs: Any, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    return outputs.class_queries_logits[i], outputs.masks_queries_logits[i]


def frame(i: int, target: tuple[int, int]) -> dict[str, Any]:
    return {"padded_size": (32, 64), "valid_size": tuple(SIZES["valid_sizes"][i].tolist()), "target_size": target}


def test_semantic_maps_have_the_original_sizes():
    outputs = mask_outputs(**SIZES)
    maps = MaskClsImageProcessor().post_process_semantic_segmentation(outputs)
    for i, size in enumerate(WITH_SIZES):
        assert torch.equal(maps[i], semantic_map(*one_image(outputs, i), **frame(i, size)))
        assert maps[i].shape == size and set(maps[i].flatten().tolist()) == {0, 1}
    assert maps[0][:, 0].eq(1).all() and maps[0][:, -1].eq(0).all()


def test_target_sizes_come_first_and_may_be_a_tensor():
    outputs = mask_outputs(**SIZES)
    processor = MaskClsImageProcessor()
    for target_sizes in ([(9, 8), (7, 6)], torch.tensor([[9, 8], [7, 6]]), np.array([[9, 8], [7, 6]])):
        maps = processor.post_process_semantic_segmentation(outputs, target_sizes=target_sizes)
        assert [tuple(m.shape) for m in maps] == [(9, 8), (7, 6)]


def test_without_original_sizes_maps_have_the_valid_sizes():
    outputs = mask_outputs(**{name: SIZES[name] for name in ("padded_sizes", "valid_sizes")})
    maps = MaskClsImageProcessor().post_process_semantic_segmentation(outputs)
    assert [tuple(m.shape) for m in maps] == [(30, 60), (32, 40)]


def test_outputs_of_transformers_models_carry_no_sizes():
    maps = MaskClsImageProcessor().post_process_semantic_segmentation(mask_outputs())
    assert [tuple(m.shape) for m in maps] == [(8, 16), (8, 16)]
    maps = MaskClsImageProcessor().post_process_semantic_segmentation(mask_outputs(), target_sizes=[(16, 32)] * 2)
    assert [tuple(m.shape) for m in maps] == [(16, 32), (16, 32)]


def test_semantic_scores():
    outputs = mask_outputs(**SIZES)
    records = MaskClsImageProcessor().post_process_semantic_segmentation(outputs, return_segmentation_scores=True)
    for record, size in zip(records, WITH_SIZES, strict=True):
        assert record.segmentation_scores.shape == (2, *size)
        assert torch.equal(record.segmentation_scores.argmax(0), record.segmentation)


def test_semantic_maps_of_a_per_pixel_model():
    outputs = SimpleNamespace(logits=torch.randn(2, 4, 8, 16), **SIZES)
    processor = MaskClsImageProcessor()
    maps = processor.post_process_semantic_segmentation(outputs)
    for i, size in enumerate(WITH_SIZES):
        assert torch.equal(maps[i], per_pixel_map(outputs.logits[i], **frame(i, size)))
    with pytest.raises(ValueError, match="have no class_queries_logits and masks_queries_logits.*'semantic'"):
        processor.post_process_instance_segmentation(outputs)
    with pytest.raises(ValueError, match="have no class_queries_logits"):
        processor.post_process_semantic_segmentation(SimpleNamespace())


def test_panoptic_maps_of_a_per_pixel_model_are_its_classes():
    outputs = SimpleNamespace(logits=torch.randn(2, 4, 8, 16), **SIZES)
    processor = MaskClsImageProcessor()
    maps = processor.post_process_semantic_segmentation(outputs)
    for classes, found in zip(maps, processor.post_process_panoptic_segmentation(outputs, threshold=0.9), strict=True):
        segments = found["segments_info"]
        assert [segment["id"] for segment in segments] == list(range(1, len(segments) + 1))
        drawn = torch.full_like(classes, -1)
        for segment in segments:
            inside = found["segmentation"] == segment["id"]
            drawn[inside] = segment["label_id"]
            assert segment["area"] == inside.sum() and segment["was_fused"] and segment["score"] is None
        assert torch.equal(drawn, classes) and found["segmentation"].dtype == torch.int32


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_target_sizes_of_the_wrong_number(task):
    method = getattr(MaskClsImageProcessor(), f"post_process_{task}_segmentation")
    with pytest.raises(ValueError, match="3 target_sizes for 2 images"):
        method(mask_outputs(), target_sizes=[(4, 4)] * 3)
    with pytest.raises(ValueError, match="0 target_sizes for 2 images"):
        method(mask_outputs(), target_sizes=[])


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
@pytest.mark.parametrize("sizes", [(4, 4), [(4.5, 4)] * 2, [None] * 2, [(4, 4, 3)] * 2])
def test_target_sizes_that_are_no_sizes(task, sizes):
    method = getattr(MaskClsImageProcessor(), f"post_process_{task}_segmentation")
    with pytest.raises(ValueError, match=r"target_sizes must be \(height, width\) for each image, integers"):
        method(mask_outputs(), target_sizes=sizes)


def test_numbers_of_numpy_in_post_processing():
    sizes = np.array(WITH_SIZES)
    processor = MaskClsImageProcessor()
    options = {"threshold": np.float32(0.5), "label_ids_to_fuse": np.array([1, 0]), "target_sizes": sizes}
    found = processor.post_process_panoptic_segmentation(mask_outputs(**SIZES), **options)
    assert [record["was_fused"] for record in found[0]["segments_info"]] == [True, True]
    assert [tuple(record["segmentation"].shape) for record in found] == WITH_SIZES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_ids_to_fuse": [2]}, r"the model has classes 0 to 1, not \[2\]"),
        ({"label_ids_to_fuse": ["sky"]}, "must be a list of class ids"),
        ({"threshold": 1.5}, r"threshold must lie in \[0, 1\], got 1.5"),
        ({"mask_threshold": "0.5"}, r"mask_threshold must lie in \[0, 1\], got '0.5'"),
    ],
)
def test_options_of_post_processing_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        MaskClsImageProcessor().post_process_panoptic_segmentation(mask_outputs(), **options)


def test_panoptic_segments():
    outputs = mask_outputs(**SIZES)
    results = MaskClsImageProcessor().post_process_panoptic_segmentation(outputs)
    for i, size in enumerate(WITH_SIZES):
        segmentation, segments_info = panoptic_segments(*one_image(outputs, i), **frame(i, size))
        assert torch.equal(results[i]["segmentation"], segmentation) and results[i]["segments_info"] == segments_info
        assert [info["label_id"] for info in segments_info] == [1, 0]


def test_what_lies_on_a_threshold():
    """A class probability must be above its threshold; a mask's own area counts pixels on the mask threshold, a mask of
    an instance does not."""
    masks = torch.tensor([0.0, -1.0]).repeat_interleave(32).expand(1, 1, 64, 64)  # half of it on 0.5
    outputs = SimpleNamespace(class_queries_logits=torch.tensor([[[200.0, 0.0]]]), masks_queries_logits=masks)
    panoptic = MaskClsImageProcessor().post_process_panoptic_segmentation
    assert panoptic(outputs, 1.0)[0]["segments_info"] == []
    info = dict(id=1, label_id=0, was_fused=False, score=1.0, area=64 * 64)
    assert panoptic(outputs, 0.99)[0]["segments_info"] == [info]
    assert panoptic(outputs, 0.99, 0.51)[0]["segments_info"] == []  # no pixel of its own
    instance = MaskClsImageProcessor().post_process_instance_segmentation
    assert instance(outputs, 0.1)[0]["segments_info"] == []
    found = instance(outputs, 0.1, 0.49)[0]["segments_info"]
    assert [info["area"] for info in found] == [64 * 32] and found[0]["score"] == pytest.approx(0.5)
    outputs.masks_queries_logits = masks + 1  # the other half of it on 0.5
    assert [info["area"] for info in instance(outputs, 0.1)[0]["segments_info"]] == [64 * 32]


def test_classes_to_fuse_come_from_the_saved_options(tmp_path):
    MaskClsImageProcessor(label_ids_to_fuse=[1]).save_pretrained(tmp_path)
    processor = MaskClsImageProcessor.from_pretrained(tmp_path)

    def fused(**kwargs: Any) -> list[bool]:
        result = processor.post_process_panoptic_segmentation(mask_outputs(), **kwargs)[0]
        return [info["was_fused"] for info in result["segments_info"]]

    assert fused() == [True, False]
    assert fused(label_ids_to_fuse={0, 1}) == [True, True]
    assert fused(label_ids_to_fuse=set()) == [False, False]


def test_instances_in_every_form():
    outputs = mask_outputs(**SIZES)
    outputs.masks_queries_logits[:, 1, :, 3:6] = 4.0  # overlaps query 0, with a lower score
    processor = MaskClsImageProcessor()
    maps = processor.post_process_instance_segmentation(outputs)
    binary = processor.post_process_instance_segmentation(outputs, return_binary_maps=True)
    coded = processor.post_process_instance_segmentation(outputs, return_coco_annotation=True)
    for i, size in enumerate(WITH_SIZES):
        infos = maps[i]["segments_info"]
        assert infos == binary[i]["segments_info"] == coded[i]["segments_info"]
        assert [info["id"] for info in infos] == [0, 1] and infos[0]["score"] >= infos[1]["score"]
        masks = binary[i]["segmentation"]
        assert masks.dtype == torch.bool and masks.shape == (2, *size) and (masks[0] & masks[1]).any()
        assert [info["area"] for info in infos] == masks.sum((1, 2)).tolist()
        segmentation = maps[i]["segmentation"]
        assert segmentation.shape == size and torch.equal(segmentation == 0, masks[0])  # the best is on top
        assert torch.equal(segmentation == 1, masks[1] & ~masks[0])
        assert torch.equal(segmentation == -1, ~masks.any(0))
        for rle, mask in zip(coded[i]["segmentation"], masks, strict=True):
            assert np.array_equal(pycocotools.mask.decode(rle), mask.numpy())


def test_no_instance_and_no_segment():
    outputs = mask_outputs(**SIZES)
    outputs.class_queries_logits = torch.tensor([-9.0, -9.0, 9.0]).expand(2, 3, 3)
    processor = MaskClsImageProcessor()
    result = processor.post_process_instance_segmentation(outputs)[0]
    assert result["segments_info"] == [] and torch.equal(result["segmentation"], torch.full((15, 30), -1).int())
    binary = processor.post_process_instance_segmentation(outputs, return_binary_maps=True)
    assert [tuple(result["segmentation"].shape) for result in binary] == [(0, 15, 30), (0, 64, 80)]
    assert processor.post_process_instance_segmentation(outputs, return_coco_annotation=True)[0]["segmentation"] == []
    result = processor.post_process_panoptic_segmentation(outputs)[0]
    assert result["segments_info"] == [] and torch.equal(result["segmentation"], torch.zeros(15, 30).int())


def test_one_form_of_instances_at_a_time():
    with pytest.raises(ValueError, match="exclude each other"):
        MaskClsImageProcessor().post_process_instance_segmentation(
            mask_outputs(), return_coco_annotation=True, return_binary_maps=True
        )


@pytest.mark.parametrize("found", [True, False])
@pytest.mark.parametrize("subtask", [None, "panoptic", "instance", "semantic"])
def test_what_the_pipeline_makes_of_the_results(subtask, found):
    outputs = mask_outputs(**SIZES)
    if not found:
        outputs.class_queries_logits = torch.tensor([-9.0, -9.1, 9.0]).expand(2, 3, 3)
    outputs["target_size"] = WITH_SIZES
    config = SimpleNamespace(id2label={0: "right", 1: "left"})
    pipeline = SimpleNamespace(image_processor=MaskClsImageProcessor(), model=SimpleNamespace(config=config))
    segments = ImageSegmentationPipeline.postprocess(pipeline, outputs, subtask=subtask)
    if not found:
        assert [segment["label"] for segment in segments] == (["right"] if subtask == "semantic" else [])
        return
    masks = {segment["label"]: np.array(segment["mask"]) for segment in segments}
    assert set(masks) == {"left", "right"} and all(mask.shape == (15, 30) for mask in masks.values())
    assert (masks["left"][:, 0] == 255).all() and (masks["left"][:, -1] == 0).all()
    assert np.array_equal(masks["left"], 255 - masks["right"])


# --- real data ------------------------------------------------------------------------------------------------------


@needs_shared
def test_coco_panoptic_annotations():
    """Ids decoded as the error for RGB maps says; the areas are those of COCO's own json."""
    folder = SHARED / "data" / "coco_panoptic_sample"
    panoptic = json.loads((folder / "panoptic_examples.json").read_text())
    index = {category["id"]: i for i, category in enumerate(panoptic["categories"])}
    annotation = panoptic["annotations"][0]
    colors = Image.open(folder / "panoptic_examples" / annotation["file_name"])
    image = folder / "input_images" / annotation["file_name"].replace(".png", ".jpg")
    processor = MaskClsImageProcessor(do_resize=False, void_id=None, num_labels=len(index))
    with pytest.raises(ValueError, match="R . 256 . G"):
        processor(image, colors)
    ids = np.array(colors).astype(np.int64) @ [1, 256, 65536]
    segments = {segment["id"]: segment for segment in annotation["segments_info"]}
    classes = {i: index[segment["category_id"]] for i, segment in segments.items()} | {0: None}
    batch = processor(image, ids, classes, return_tensors="pt")
    found = sorted(segments)
    assert batch["mask_labels"][0].sum((1, 2)).tolist() == [segments[i]["area"] for i in found]
    assert batch["class_labels"][0].tolist() == [classes[i] for i in found]
    assert not batch["void_mask"].any()
    declared = processor(image, ids, classes | {0: 254}, void_id=254, return_tensors="pt")
    assert int(declared["void_mask"].sum()) == int((ids == 0).sum())


@needs_shared
def test_nuclei_as_map_and_as_overlapping_masks():
    folder = SHARED / "data" / "dsb2018_nuclei" / "val"
    coco = json.loads((folder / "instances.json").read_text())
    record = coco["images"][0]
    annotations = [a for a in coco["annotations"] if a["image_id"] == record["id"]]
    image, map_file = folder / "images" / record["file_name"], (folder / "instances" / record["file_name"])
    nuclei = {i + 1: 0 for i in range(len(annotations))} | {0: 1}
    processor = MaskClsImageProcessor(size={"shortest_edge": 128}, num_labels=2)
    from_map = processor(image, map_file.with_suffix(".png"), nuclei, return_tensors="pt")
    stack = np.stack([pycocotools.mask.decode(a["segmentation"]) for a in annotations])
    from_stack = processor(image, stack, class_labels=[0] * len(stack), return_tensors="pt")
    assert from_map["class_labels"][0].tolist() == [1] + [0] * len(annotations)
    assert torch.equal(from_map["mask_labels"][0][1:], from_stack["mask_labels"][0])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_autocontrast_stretches_each_channel_of_dim_images(dtype, tmp_path):
    scale = 257 if dtype == np.uint16 else 1
    dim = (np.arange(32 * 32).reshape(32, 32) % 20 * scale).astype(dtype)
    options = dict(do_autocontrast=True, do_normalize=False, do_resize=False)
    processor = MaskClsImageProcessor(**options)
    stretched = processor(dim, return_tensors="pt")["pixel_values"]
    assert stretched.min() == 0 and stretched.max() > 0.99
    assert (
        MaskClsImageProcessor(**{**options, "do_autocontrast": False})(dim, return_tensors="pt")["pixel_values"].max()
        < 0.1
    )
    processor.save_pretrained(tmp_path)
    assert MaskClsImageProcessor.from_pretrained(tmp_path).do_autocontrast


@pytest.mark.parametrize("size", [(40, 60), (1, 1), (3000, 2000)])
def test_an_rgb_image_is_read_where_it_lies(size):
    """Its memory in Pillow has a fourth byte a pixel; large images lie in many pieces and are copied."""
    array = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    pixels = image_to_tensor(Image.fromarray(array))
    assert torch.equal(pixels, torch.from_numpy(array).permute(2, 0, 1))
    whole = with_fourth_byte(pixels)
    assert torch.equal(whole[:3], pixels) and (len(whole) == 4 or size != (40, 60))
    others = [torch.from_numpy(array).permute(2, 0, 1), pixels.float(), pixels[:2]]
    assert all(with_fourth_byte(other) is other for other in others)
    edge = torch.zeros(7, dtype=torch.uint8).as_strided((3, 1, 2), (1, 8, 4))  # the last fourth byte is not there
    assert with_fourth_byte(edge) is edge


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": {"shortest_edge": 0}}, r"size\['shortest_edge'\]=0 must be at least 1"),
        ({"size": {"height": 32, "width": -1}}, r"size\['width'\]=-1 must be at least 1"),
        ({"pad_size": {"height": 0, "width": 8}}, r"pad_size\['height'\]=0 must be at least 1"),
        ({"image_std": [1.0, 0.0, 1.0]}, "image_std=0.0 must be above 0"),
        ({"image_std": -1.0}, "image_std=-1.0 must be above 0"),
        ({"image_std": [1.0, float("nan"), 1.0]}, "image_std=nan must be above 0 and finite"),
        ({"image_mean": float("inf")}, "image_mean=inf must be a number and finite"),
        ({"rescale_factor": 0.0}, "rescale_factor=0.0 must be above 0"),
        ({"rescale_factor": float("nan")}, "rescale_factor=nan must be above 0"),
        ({"resample": 99}, "resample=99 must be one of 0, "),
    ],
)
def test_options_that_make_no_image(options, message):
    with pytest.raises(ValueError, match=message):
        MaskClsImageProcessor(**options)
    with pytest.raises(ValueError, match=message):
        MaskClsImageProcessor()(torch.zeros(3, 8, 8, dtype=torch.uint8), **options)


def test_images_are_normalized_whatever_transformers_does_in_place(monkeypatch):
    """That of transformers 5.17 gives a new tensor, and left the values at 0..255."""
    monkeypatch.setattr(
        MaskClsImageProcessor, "normalize", lambda self, image, mean, std, **kwargs: (image - 0) / 1, raising=True
    )
    image = torch.full((3, 8, 8), 51, dtype=torch.uint8)
    processor = MaskClsImageProcessor(do_resize=False, size_divisor=1, image_mean=[0.1, 0.2, 0.3], image_std=[0.5] * 3)
    found = processor(image, return_tensors="pt")["pixel_values"][0, :, 0, 0]
    torch.testing.assert_close(found, torch.tensor([0.2, 0.0, -0.2]), rtol=0, atol=1e-6)
