"""Files as images and label maps: what Pillow shows of them, what they hold, and why one cannot be read."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from maskcls_hf import MaskClsImageProcessor
from maskcls_hf.cli.segmenter import read as read_for_segment
from maskcls_hf.data.files import image_size, read_colored_ids, read_image, read_map
from maskcls_hf.data.layouts.label_maps import read_class_map
from maskcls_hf.data.validation.building import read_picture
from maskcls_hf.models.image_reading import MAX_PIXELS


def problems(path: Path) -> list[str]:
    """What each path through the package says of an image: reader, sizes, segment, image processor, validate."""
    said: list[str] = []
    for read in (read_image, image_size, MaskClsImageProcessor()):
        try:
            read(path)
        except ValueError as error:
            said.append(str(error))
    outcome = read_for_segment((0, path))
    if outcome.error is not None:
        said.append(f"{outcome.path}: {outcome.error}")
    read_picture(path, lambda kind, message, file: said.append(f"{file}: {message}"))
    return said


def frames(number: int) -> list[Image.Image]:
    return [Image.fromarray(np.full((20, 30, 3), 40 * i, np.uint8)) for i in range(number)]


def packed_tiff(values: np.ndarray, bits: int, photometric: int) -> bytes:
    """A TIFF of gray (H, W) with a few bits a value, which no writer at hand makes. W bits are whole bytes."""
    rows = np.unpackbits(values[..., None], axis=-1)[..., -bits:].reshape(len(values), -1)
    pixels = np.packbits(rows, axis=1).tobytes()
    height, width = values.shape
    numbers = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height}
    entries = [struct.pack("<HHLHH", tag, 3, 1, number, 0) for tag, number in numbers.items()]
    entries.append(struct.pack("<HHLL", 279, 4, 1, len(pixels)))
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return b"II*\0" + struct.pack("<L", 8 + len(pixels)) + pixels + directory


class TestSeveralPictures:
    @pytest.mark.parametrize("ending", ["gif", "png", "webp", "tif"])
    def test_are_an_error_everywhere(self, tmp_path, ending):
        path = tmp_path / f"a.{ending}"
        if ending == "tif":
            tifffile.imwrite(path, np.zeros((3, 20, 30), np.uint8), photometric="minisblack")
        else:
            first, *others = frames(3)
            first.save(path, save_all=True, append_images=others)
        said = problems(path)
        assert len(said) == 5 and all(str(path) in text and "it has 3 pages (frames)" in text for text in said)
        with pytest.raises(ValueError, match=r"a\..* it has 3 pages"):
            read_map(path)

    @pytest.mark.parametrize("options", [{"imagej": True, "truncate": True}, {"truncate": True}, {"volumetric": True}])
    def test_pages_without_a_directory(self, tmp_path, options):
        path, options = tmp_path / "a.tif", {"photometric": "minisblack", **options}
        tile = {"tile": (16, 16, 16)} if "volumetric" in options else {}
        tifffile.imwrite(path, np.zeros((16, 16, 32), np.uint8), **options, **tile)
        assert all("it has 16 pages" in text for text in problems(path)) and len(problems(path)) == 5
        for page in (np.ones((1, 2), np.uint8), np.ones((2, 1), np.uint8), np.ones((2, 3, 3), np.uint8)):
            tifffile.imwrite(path, page)
            assert not problems(path)
        Image.new("L", (30, 20)).save(path, tiffinfo={270: "ImageJ=1.11a\nimages=5\nslices=5\n"})
        assert not problems(path)  # one page of a stack, saved with its text

    def test_overviews_masks_and_previews_are_none(self, tmp_path):
        with tifffile.TiffWriter(tmp_path / "overviews.tif") as file:
            file.write(np.full((64, 64), 7, np.uint8))
            file.write(np.full((32, 32), 7, np.uint8), subfiletype=1)
            file.write(np.ones((64, 64), bool), photometric=4, subfiletype=4)
        assert read_map(tmp_path / "overviews.tif").tolist() == [[7] * 64] * 64
        first, *others = frames(2)
        first.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=others)
        first.save(tmp_path / "one.gif")
        for name in ("overviews.tif", "phone.jpg", "one.gif"):
            assert problems(tmp_path / name) == []

    def test_a_smaller_copy_first(self, tmp_path):
        with tifffile.TiffWriter(tmp_path / "a.tif") as file:
            file.write(np.full((32, 32), 7, np.uint8), subfiletype=1)
            file.write(np.full((64, 64), 7, np.uint8))
        assert len(problems(tmp_path / "a.tif")) == 5
        assert all("its first page is a smaller copy" in text for text in problems(tmp_path / "a.tif"))

    @pytest.mark.parametrize("is_big", [False, True])
    def test_pages_that_follow_each_other_forever(self, tmp_path, is_big):
        path = tmp_path / "a.tif"
        tifffile.imwrite(path, np.zeros((20, 30), np.uint8), bigtiff=is_big, metadata=None)
        content = bytearray(path.read_bytes())
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            entries, size = len(page.tags), 20 if is_big else 12
            end = page.offset + (8 if is_big else 2) + entries * size
            struct.pack_into("<Q" if is_big else "<L", content, end, page.offset)
        path.write_bytes(content)
        assert problems(path) == []

    def test_bands_that_pillow_leaves_out(self, tmp_path):
        path = tmp_path / "a.tif"
        one_hot = np.zeros((20, 30, 2), np.uint8)
        tifffile.imwrite(path, one_hot, photometric="minisblack", planarconfig="contig", extrasamples=(0,))
        assert len(problems(path)) == 5 and all("2 bands of uint8" in text for text in problems(path))


class TestStoredValues:
    @pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
    @pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "i1", "i2", "i4", "f4"])
    @pytest.mark.parametrize("compression", [None, "deflate"])
    def test_of_a_tiff(self, tmp_path, photometric, dtype, compression):
        """Right, or refused with the cause: never other ids."""
        path, ids = tmp_path / "a.tif", np.random.default_rng(0).integers(0, 100, (9, 16)).astype(dtype)
        ids[0, :2] = {"i": (-3, 2), "u": (np.iinfo(dtype).max if dtype[0] == "u" else 0, 2), "f": (0, 2)}[dtype[0]]
        tifffile.imwrite(path, ids, photometric=photometric, compression=compression)
        if photometric == "miniswhite" and dtype in ("u4", "i1", "i2", "i4"):
            with pytest.raises(ValueError, match=r"it is a TIFF of 1 band of u?int"):
                read_map(path)
        else:
            assert np.array_equal(read_map(path).numpy(), ids)
            assert np.array_equal(read_class_map(path, lambda *found: pytest.fail(str(found)))[0], ids)

    @pytest.mark.parametrize("bits", [1, 2, 4, 8])
    @pytest.mark.parametrize("photometric", [0, 1])
    def test_of_few_bits(self, tmp_path, bits, photometric):
        path, ids = tmp_path / "a.tif", np.random.default_rng(1).integers(0, 2**bits, (9, 16)).astype(np.uint8)
        path.write_bytes(packed_tiff(ids, bits, photometric))
        assert np.array_equal(read_map(path).numpy(), ids)
        with Image.open(path) as image:
            image.load()
            assert np.array_equal(read_map(image, "image 0").numpy(), ids)

    @pytest.mark.parametrize("bits", [2, 4])
    def test_of_a_png_of_few_bits(self, tmp_path, bits):
        path, ids = tmp_path / "a.png", np.random.default_rng(2).integers(0, 2**bits, (9, 16)).astype(np.uint8)
        Image.fromarray(ids * np.uint8(255 // (2**bits - 1))).save(path, bits=bits)
        assert np.array_equal(read_map(path).numpy(), ids)
        assert np.array_equal(read_map(Image.open(path), "image 0").numpy(), ids)

    def test_images_look_as_their_tag_says(self, tmp_path):
        gray = np.arange(0, 160, 10, dtype=np.uint8).reshape(4, 4)
        tifffile.imwrite(tmp_path / "a.tif", gray, photometric="miniswhite")
        assert np.array_equal(read_image(tmp_path / "a.tif")[0].numpy(), 255 - gray)
        tifffile.imwrite(tmp_path / "b.tif", gray.view(np.int8))
        with pytest.raises(ValueError, match=r"b\.tif: an image of torch.int8 holds values from -126 to 120"):
            read_image(tmp_path / "b.tif")

    @pytest.mark.parametrize("planar", ["contig", "separate"])
    def test_planes_of_rgb(self, tmp_path, planar):
        colors = np.random.default_rng(3).integers(0, 256, (3, 20, 30), dtype=np.uint8)
        pixels = colors if planar == "separate" else colors.transpose(1, 2, 0)
        tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", planarconfig=planar)
        assert np.array_equal(read_image(tmp_path / "a.tif").numpy(), colors)

    def test_size_of_a_turned_tiff(self, tmp_path):
        image = frames(1)[0]
        exif = image.getexif()
        exif[0x112] = 6
        for name in ("a.tif", "a.jpg"):
            image.save(tmp_path / name, exif=exif)
            assert image_size(tmp_path / name) == tuple(read_image(tmp_path / name).shape[1:]) == (30, 20)

    def test_lossy_labels_are_refused_whatever_their_name(self, tmp_path):
        Image.new("L", (9, 9)).save(tmp_path / "a.png", "JPEG")
        for source in (
            tmp_path / "a.png",
            Image.open(tmp_path / "a.png"),
            {"bytes": (tmp_path / "a.png").read_bytes()},
        ):
            with pytest.raises(ValueError, match="a.png.* is a JPEG"):
                read_map(source, "a.png")
        assert "JPEG" in str(self.finding(tmp_path / "a.png"))
        Image.new("RGB", (9, 9)).save(tmp_path / "b.png", "JPEG")
        with pytest.raises(ValueError, match=r"b\.png: .* is a JPEG"):
            read_colored_ids(tmp_path / "b.png")

    @staticmethod
    def finding(path: Path) -> tuple[str, ...]:
        found: list[tuple] = []
        assert read_class_map(path, lambda *finding: found.append(finding)) is None
        return found[0]

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "CMYK"])
    def test_more_than_one_channel(self, tmp_path, mode):
        Image.new(mode, (9, 9)).save(tmp_path / "a.tif")
        with pytest.raises(ValueError, match=rf"a\.tif: the segmentation map is an image of mode '{mode}'"):
            read_map(tmp_path / "a.tif")
        assert self.finding(tmp_path / "a.tif")[0] == "color_label"

    @pytest.mark.parametrize("value", [0.5, np.nan, np.inf, 1e30])
    def test_floating_point_that_is_no_id(self, tmp_path, value):
        tifffile.imwrite(tmp_path / "a.tif", np.array([[1, value]], np.float32))
        with pytest.raises(ValueError, match=r"a\.tif: labels must be integers"):
            read_map(tmp_path / "a.tif")


class TestCauses:
    TIFFS = [
        (np.ones((8, 9, 5), np.uint8), dict(photometric="minisblack", planarconfig="contig"), "5 bands of uint8"),
        (np.ones((8, 9)), {}, "1 band of float64"),
        (np.ones((8, 9)), dict(bigtiff=True), "1 band of float64"),
        (np.ones((8, 9)), dict(byteorder=">"), "1 band of float64"),
        (np.ones((8, 9), np.uint64), {}, "1 band of uint64"),
        (np.ones((8, 9), np.complex64), {}, "1 band of complex64"),
        (np.ones((3, 8, 9), np.uint8), dict(photometric="minisblack", planarconfig="separate"), "3 bands of uint8"),
        (np.ones((8, 9, 3), np.float32), dict(photometric="rgb"), "3 bands of float32"),
        (np.ones((8, 9, 13), np.uint16), dict(photometric="minisblack", planarconfig="contig"), "13 bands of uint16"),
    ]

    @pytest.mark.parametrize(("array", "options", "kind"), TIFFS)
    def test_kinds_of_tiff(self, tmp_path, array, options, kind):
        path = tmp_path / "a.tif"
        tifffile.imwrite(path, array, **options)
        said = problems(path)
        assert len(said) == 5 and all(f"{path}" in text and f"it is a TIFF of {kind}" in text for text in said)
        assert all("Save it with 8 or 16 bits" in text for text in said)

    def test_panoptic_maps_of_16_bits(self, tmp_path):
        def chunk(name: bytes, content: bytes) -> bytes:
            return struct.pack(">L", len(content)) + name + content + struct.pack(">L", zlib.crc32(name + content))

        rows = b"".join(b"\0" + np.full((3, 3), 2, ">u2").tobytes() for _ in range(2))
        header = struct.pack(">LLBBBBB", 3, 2, 16, 2, 0, 0, 0)
        chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
        with pytest.raises(ValueError, match=r"a\.png has 16 bits a channel"):
            read_colored_ids(tmp_path / "a.png")

    def test_signed_bytes_below_zero_are_no_image(self, tmp_path):
        tifffile.imwrite(tmp_path / "a.tif", np.full((9, 8), -3, np.int8))
        told: list[str] = []
        assert read_picture(tmp_path / "a.tif", lambda kind, message, file: told.append(message)) is None
        assert "from -3 to -3" in told[0]

    def test_other_files(self, tmp_path):
        whole = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(whole, "PNG")
        text = b"zTXtkey\0\0" + zlib.compress(bytes(70 << 20))
        text = struct.pack(">L", len(text) - 4) + text + struct.pack(">L", zlib.crc32(text))
        contents = {
            "it is empty": b"",
            "it is in no format that Pillow knows": b"hello",
            "it is a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1",
            "it is a web page": b"<!DOCTYPE html>",
            "it is a TIFF that is cut off": b"II*\0" + bytes(9),
            "truncated": whole.getvalue()[:60],
            "MAX_TEXT_CHUNK": whole.getvalue()[:33] + text + whole.getvalue()[33:],
        }
        for number, (message, content) in enumerate(contents.items()):
            path = tmp_path / f"{number}.png"
            path.write_bytes(content)
            said = problems(path)
            assert len(said) >= 4 and all(str(path) in text and message in text for text in said), (message, said)
        (tmp_path / "folder.png").mkdir()
        with pytest.raises(ValueError, match=r"folder\.png cannot be read as an image: it is a folder"):
            read_image(tmp_path / "folder.png")
        with pytest.raises(FileNotFoundError, match=r"absent\.png"):
            read_image(tmp_path / "absent.png")

    def test_memory(self, tmp_path, monkeypatch):
        frames(1)[0].save(tmp_path / "a.png")

        def fail(*args):
            raise MemoryError

        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
        with pytest.raises(ValueError, match=r"a\.png cannot be read as an image: there is not enough memory"):
            read_image(tmp_path / "a.png")
        monkeypatch.undo()
        monkeypatch.setattr("maskcls_hf.data.files.image_to_tensor", fail)
        with pytest.raises(ValueError, match=r"a\.png: MemoryError"):
            read_image(tmp_path / "a.png")

    def test_more_pixels_than_pillow_takes(self, tmp_path, monkeypatch):
        """The variable raises the limit and is named; without it nothing changes."""
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        frames(1)[0].save(tmp_path / "a.png")
        said = problems(tmp_path / "a.png")
        assert len(said) == 5 and all("600 pixels" in text and MAX_PIXELS in text for text in said)
        assert Image.MAX_IMAGE_PIXELS == 100
        monkeypatch.setenv(MAX_PIXELS, "many")
        assert all(f"{MAX_PIXELS}=many is no number" in text for text in problems(tmp_path / "a.png"))
        monkeypatch.setenv(MAX_PIXELS, "600")
        assert problems(tmp_path / "a.png") == []

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, np.finfo(np.float32).min])
    def test_nan_and_infinity(self, tmp_path, value):
        pixels = np.full((8, 9), 100, np.float32)
        pixels[3, 3] = value
        tifffile.imwrite(tmp_path / "a.tif", pixels)
        said = problems(tmp_path / "a.tif")
        assert len(said) == 4 and all("NaN or infinity at 1 of 72 values" in text for text in said)
        for image in (pixels, torch.from_numpy(pixels)):
            with pytest.raises(ValueError, match="image 0: the image holds NaN or infinity"):
                MaskClsImageProcessor()(image)

    def test_arrays_of_no_numbers(self):
        for array in (np.array([["a", "b"]]), np.array([[None]]), np.ones((2, 2), np.complex64)):
            with pytest.raises(ValueError, match="image 0: an array of .* holds no real numbers"):
                MaskClsImageProcessor()(array)
            with pytest.raises(ValueError, match="image 0: an array of .* holds no real numbers"):
                MaskClsImageProcessor()(np.zeros((2, 2, 3), np.uint8), segmentation_maps=[array])
