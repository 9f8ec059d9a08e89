"""Writes tests/data/formats: a small set in the form of each annotation tool, with what must be read from it.

    python tests/make_format_samples.py          (GeoTIFF and shapefiles need the extra "geo")

Shapes lie on whole pixels where a format has them at edges, so that masks must be equal pixel by pixel.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

FOLDER = Path(__file__).parent / "data" / "formats"
HEIGHT, WIDTH = 30, 40
CASES: dict[str, Callable[[Path], dict[str, Any]]] = {}


def case(function: Callable[[Path], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
    CASES[function.__name__] = function
    return function


def box(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[max(top, 0) : bottom, max(left, 0) : right] = True
    return mask


def corners(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def oval(x: float, y: float, x_radius: float, y_radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return ((columns - x) / x_radius) ** 2 + ((rows - y) / y_radius) ** 2 <= 1


ONE, TWO, RING = box(3, 4, 15, 14), box(20, 10, 34, 26), box(2, 16, 16, 28) & ~box(6, 20, 12, 24)


def thing(name: str, mask: np.ndarray, **more: Any) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"class": name, "rle": {"size": rle["size"], "counts": rle["counts"].decode()}, "exact": True, **more}


def picture(path: Path, mode: str = "RGB", seed: int = 0, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.add.outer(np.arange(HEIGHT) * 4, np.arange(WIDTH) * 3) + 5 * seed
    image = Image.fromarray(ramp.astype(np.uint8)).convert(mode)
    if options.get("exif"):
        image = image.transpose(Image.Transpose.ROTATE_90)
    image.save(path, **options)


def save(mask: np.ndarray, path: Path | io.BytesIO, palette: list[int] | None = None) -> None:
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask if mask.dtype == bool else mask.astype(np.uint8))
    if palette:
        image = image.convert("P")
        image.frombytes(mask.astype(np.uint8).tobytes())
        image.putpalette(palette)
    image.save(path, "PNG")


def png(mask: np.ndarray) -> bytes:
    file = io.BytesIO()
    save(mask, file)
    return file.getvalue()


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def row(label: int, *points: list[float]) -> str:
    return " ".join([str(label), *(f"{x / WIDTH:.6f} {y / HEIGHT:.6f}" for x, y in points)])


# one ring with a bridge to its hole
KEYHOLE = [*corners(2, 16, 16, 28), [2, 16], [6, 20], [6, 24], [12, 24], [12, 20], [6, 20], [2, 16]]


@case
def yolo_rows(data: Path) -> dict[str, Any]:
    picture(data / "images/train/a.png")
    picture(data / "images/train/b.png", seed=1)
    picture(data / "images/val/c.png", seed=2)
    write(data / "data.yaml", "path: .\ntrain: images/train\nval: images/val\nnames:\n  0: cell\n  3: pad\n")
    joined = [*corners(3, 4, 15, 14), [3, 4], [20, 10], *corners(20, 10, 34, 26)[1:], [20, 10], [3, 4]]
    rows = [row(0, *joined), row(3, *KEYHOLE), row(3, *KEYHOLE), "0 0.5 0.1 0.2 0.133333"]
    write(data / "labels/train/a.txt", "\n".join(rows))
    write(data / "labels/val/c.txt", "")
    box_only = thing("cell", box(16, 1, 24, 5), box_only=True)
    return {"train/a.png": [thing("cell", ONE | TWO), thing("pad", RING), box_only], "train/b.png": [], "val/c.png": []}


@case
def yolo_roboflow(data: Path) -> dict[str, Any]:
    write(data / "data.yaml", "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['bolt', 'nut']\n")
    picture(data / "train/images/x_jpg.rf.0a1b.png")
    picture(data / "valid/images/y_jpg.rf.2c3d.png", seed=1)
    write(data / "train/labels/x_jpg.rf.0a1b.txt", row(1, *corners(3, 4, 15, 14)))
    write(data / "valid/labels/y_jpg.rf.2c3d.txt", "")
    return {"train/x_jpg.rf.0a1b.png": [thing("nut", ONE)], "valid/y_jpg.rf.2c3d.png": []}


@case
def yolo_cvat(data: Path) -> dict[str, Any]:
    write(data / "data.yaml", "names:\n  0: cell\npath: .\ntrain: train.txt\n")
    write(data / "train.txt", "data/images/train/a.png\ndata/images/train/b.png\n")
    picture(data / "images/train/a.png")
    picture(data / "images/train/b.png", seed=1)
    write(data / "labels/train/a.txt", row(0, *corners(30, 20, 42, 33)))
    return {"a.png": [thing("cell", box(30, 20, 40, 30))], "b.png": []}


@case
def yolo_predictions(data: Path) -> dict[str, Any]:
    write(data / "data.yaml", "path: .\ntrain: images\nval: images\nnames: [cell, chip]\n")
    picture(data / "images/a.png")
    rows = [f"{row(0, *corners(3, 4, 15, 14))} 0.9", f"{row(1, *corners(20, 10, 34, 26))} 0.5 7"]
    write(data / "labels/a.txt", "\n".join(rows))
    return {"a.png": [thing("cell", ONE), thing("chip", TWO)]}


def labelme(shapes: list[tuple], image: str, **more: Any) -> dict[str, Any]:
    keys = ("label", "points", "shape_type", "group_id", "mask")
    records = [dict(zip(keys, (*shape, *(None,) * 5), strict=False)) for shape in shapes]
    return {"version": "5.8.1", "flags": {}, "shapes": records, "imagePath": image, "imageData": None} | more


@case
def labelme_shapes(data: Path) -> dict[str, Any]:
    picture(data / "images/a.png")
    mask = base64.b64encode(png(box(0, 0, 5, 6)[:6, :5].astype(np.uint8))).decode()
    shapes = [
        ("cell", [[15, 14], [3, 4]], "rectangle"),
        ("chip", [[27, 18], [27, 10]], "circle"),
        ("stain", [[1.2, 20.4], [5, 25]], "mask", None, mask),
        ("scratch", [[1, 1], [9, 9]], "line"),
    ]
    write(data / "labels/a.json", labelme(shapes, "..\\images\\a.png"))
    file = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT), "gray").save(file, "PNG")
    hidden = base64.b64encode(file.getvalue()).decode()
    write(data / "labels/b.json", labelme([("cell", corners(20, 10, 34, 26))], "C:\\x\\b.png", imageData=hidden))
    things = [thing("cell", ONE), thing("chip", oval(27, 18, 8, 8), exact=False), thing("stain", box(1, 20, 6, 26))]
    return {"a.png": things, "b.png": [thing("cell", TWO)]}


@case
def labelme_groups(data: Path) -> dict[str, Any]:
    picture(data / "a.png")
    write(data / "labels.txt", "__ignore__\n_background_\ncell\n")
    shapes = [
        ("cell", corners(3, 4, 15, 14), "polygon", 1),
        ("cell", corners(2, 16, 16, 28), "polygon", None),
        ("_background_", corners(6, 20, 12, 24), "polygon", None),
        ("cell", corners(20, 10, 34, 26), "polygon", 1),
        ("__ignore__", corners(36, 0, 40, 10), "polygon", None),
    ]
    write(data / "a.json", labelme(shapes, "a.png"))
    return {"a.png": {"objects": [thing("cell", ONE | TWO), thing("cell", RING)], "ignore_area": 40}}


@case
def labelme_exif_and_old(data: Path) -> dict[str, Any]:
    exif = Image.Exif()
    exif[274] = 6
    picture(data / "turned.jpg", exif=exif)
    shape = {"label": "part", "points": corners(-3, 4, 15, 14)}
    size = {"imageHeight": HEIGHT, "imageWidth": WIDTH}
    write(data / "turned.json", {"shapes": [shape], "imagePath": "turned.jpg", "imageData": None} | size)
    picture(data / "old.png", seed=1)
    write(data / "old.json", {"shapes": [shape], "lineColor": [0, 255, 0, 128], "imagePath": "old.png"})
    return {name: [thing("part", box(0, 4, 15, 14))] for name in ("turned.jpg", "old.png")}


def cvat(images: str, *names: str) -> str:
    labels = "".join(f"<label><name>{name}</name></label>" for name in names)
    meta = f"<meta><task><labels>{labels}</labels></task></meta>"
    return f"<annotations><version>1.1</version>{meta}{images}</annotations>\n"


@case
def cvat_masks(data: Path) -> dict[str, Any]:
    picture(data / "images/lot 1/a.png")
    picture(data / "images/lot 1/b.png", seed=1)
    window = RING[16:28, 2:16].ravel()
    changes = np.flatnonzero(np.diff(np.r_[False, window])).tolist()
    counts = np.diff([0, *changes, window.size]).tolist()
    size = f'width="{WIDTH}" height="{HEIGHT}"'
    mask = f'<mask label="pore" rle="{", ".join(map(str, counts))}" left="2" top="16" width="14" height="12"/>'
    images = f'<image id="0" name="lot 1/a.png" {size}>{mask}</image><image id="1" name="lot 1/b.png" {size}/>'
    write(data / "annotations.xml", cvat(images, "pore"))
    return {"lot 1/a.png": [thing("pore", RING)], "lot 1/b.png": []}


@case
def cvat_shapes(data: Path) -> dict[str, Any]:
    picture(data / "images/a.png")
    shapes = """
      <polygon label="cell" points="3,4;15,4;15,14;3,14" z_order="0" group_id="1"/>
      <box label="cell" xtl="20" ytl="10" xbr="34" ybr="26" rotation="0" z_order="0" group_id="1"/>
      <box label="chip" xtl="30" ytl="3" xbr="38" ybr="5" rotation="90" z_order="0"/>
      <ellipse label="cell" cx="9" cy="22" rx="6" ry="4" z_order="1"/>
      <polyline label="cell" points="1,1;5,5"/><tag label="cell"/>"""
    write(
        data / "annotations.xml", cvat(f'<image name="a.png" width="40" height="30">{shapes}</image>', "cell", "chip")
    )
    oval_thing = thing("cell", oval(9, 22, 6, 4), exact=False)
    return {"a.png": [thing("cell", ONE | TWO), thing("chip", box(33, 0, 35, 8)), oval_thing]}


@case
def cvat_video(data: Path) -> dict[str, Any]:
    for frame in range(3):
        picture(data / f"images/frame_00000{frame}.png", seed=frame)
    shape = '<box frame="{}" outside="{}" xtl="{}" ytl="4" xbr="{}" ybr="14" z_order="0"/>'
    shapes = "".join(shape.format(f, int(f == 2), 3 + f, 15 + f) for f in range(3))
    write(data / "annotations.xml", cvat(f'<track id="0" label="cell">{shapes}</track>', "cell"))
    names = [f"frame_00000{frame}.png" for frame in range(3)]
    return {names[0]: [thing("cell", ONE)], names[1]: [thing("cell", box(4, 4, 16, 14))], names[2]: []}


@case
def cvat_segmentation_masks(data: Path) -> dict[str, Any]:
    write(data / "labelmap.txt", "# label:color_rgb:parts:actions\nanode:250,50,83::\nbackground:0,0,0::\n")
    write(data / "ImageSets/Segmentation/default.txt", "a\nb\n")
    colors, objects = np.zeros((2, HEIGHT, WIDTH, 3), dtype=np.uint8)
    colors[ONE | TWO], objects[ONE], objects[TWO] = (250, 50, 83), (128, 0, 0), (0, 128, 0)
    save(colors, data / "SegmentationClass/a.png")
    save(objects, data / "SegmentationObject/a.png")
    picture(data / "JPEGImages/a.png")
    picture(data / "JPEGImages/b.png", seed=1)
    return {"a.png": [thing("anode", ONE), thing("anode", TWO)], "b.png": []}


def studio(name: str, results: list[dict[str, Any]] | None, **more: Any) -> dict[str, Any]:
    sizes = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0}
    found = [sizes | {"id": f"r{i}", "to_name": "image"} | result for i, result in enumerate(results or [])]
    annotations = [] if results is None else [{"id": 1, "result": found, "was_cancelled": False, **more}]
    return {"annotations": annotations, "predictions": [], "data": {"image": f"/data/upload/1/{name}"}}


def per_cent(points: list[list[float]]) -> list[list[float]]:
    return [[100 * x / WIDTH, 100 * y / HEIGHT] for x, y in points]


@case
def label_studio_polygons(data: Path) -> dict[str, Any]:
    for place, name in enumerate(("a.png", "12345678-b.png", "c d.png", "e.png")):
        picture(data / "images" / name, seed=place)
    polygon = {"type": "polygonlabels", "value": {"points": per_cent(corners(3, 4, 15, 14)), "polygonlabels": ["cell"]}}
    turned = {"x": 85, "y": 100 / 3, "width": 40, "height": 35, "rotation": 90, "rectanglelabels": ["chip"]}
    first = studio("0a1b2c3d-a.png", [polygon, {"type": "rectanglelabels", "value": turned}])
    second = studio("12345678-b.png", [polygon], ground_truth=True, updated_at="2024-01-01")
    second["annotations"] += [
        {"result": [], "updated_at": "2025-01-01"},
        {"result": [], "was_cancelled": True, "ground_truth": True},
    ]
    parts = [
        {"id": "x", "type": "polygon", "value": {"points": per_cent(corners(20, 10, 34, 26))}},
        {"id": "x", "type": "labels", "value": {"labels": ["chip", "cell"]}},
        {"id": "y", "type": "choices", "value": {"choices": ["good"]}},
        {"type": "relation", "from_id": "x", "to_id": "y"},
    ]
    third = studio("", parts)
    third["data"]["image"] = "/data/local-files/?d=images/c%20d.png"
    write(data / "project.json", [first, second, third, studio("e.png", None)])
    return {
        "a.png": [thing("cell", ONE), thing("chip", box(23, 10, 34, 26), exact=False)],
        "12345678-b.png": [thing("cell", ONE)],
        "c d.png": [thing("chip", TWO)],
        "e.png": {"objects": [], "labelled": False},
    }


def brush(mask: np.ndarray) -> list[int]:
    """Label Studio's bit stream, with each run in 16 bits."""
    values = np.repeat(mask.ravel() * 255, 4)
    starts = np.flatnonzero(np.diff(np.r_[-1, values]))
    lengths = np.diff(np.r_[starts, values.size])
    bits = f"{values.size:032b}{7:05b}" + "".join(f"{size:04b}" for size in (3, 7, 11, 15))
    bits += "".join(f"111{length - 1:016b}{values[start]:08b}" for start, length in zip(starts, lengths, strict=True))
    bits += "0" * (-len(bits) % 8)
    return [int(bits[place : place + 8], 2) for place in range(0, len(bits), 8)]


@case
def label_studio_brush(data: Path) -> dict[str, Any]:
    picture(data / "images/a.png")
    transparent = np.zeros((HEIGHT, WIDTH, 4), dtype=np.uint8)
    transparent[TWO, 3] = 255
    url = f"data:image/png;base64,{base64.b64encode(png(transparent)).decode()}"
    results = [
        {"type": "brushlabels", "value": {"format": "rle", "rle": brush(RING), "brushlabels": ["pore"]}},
        {"type": "bitmasklabels", "value": {"imageDataURL": url, "bitmasklabels": ["stain"]}},
    ]
    write(data / "project.json", [studio("a.png", results)])
    return {"a.png": [thing("pore", RING), thing("stain", TWO)]}


@case
def voc_palette(data: Path) -> dict[str, Any]:
    classes, objects = np.zeros((2, HEIGHT, WIDTH), dtype=np.uint8)
    border = box(2, 3, 35, 27) & ~box(3, 4, 34, 26)
    one, two, three = ONE, TWO, box(15, 4, 20, 14)
    for value, label, mask in ((1, 15, one), (2, 7, two), (3, 15, three), (255, 255, border)):
        objects[mask], classes[mask] = value, label
    palette = [(i * 37) % 256 for i in range(768)]
    save(classes, data / "SegmentationClass/a.png", palette)
    save(objects, data / "SegmentationObject/a.png", palette)
    for place, name in enumerate("ab"):
        picture(data / f"JPEGImages/{name}.jpg", seed=place)
    write(data / "ImageSets/Segmentation/train.txt", "a\n")
    things = [thing("person", one), thing("car", two), thing("person", three)]
    return {"a.jpg": {"objects": things, "ignore_area": int(border.sum())}, "b.jpg": {"objects": [], "labelled": False}}


@case
def color_table(data: Path) -> dict[str, Any]:
    write(data / "class_dict.csv", "name,r,g,b\nvein,255,0,0\nbackground,0,0,0\nlymph,0,0,255\n")
    colors = np.zeros((HEIGHT, WIDTH, 4), dtype=np.uint8)
    colors[ONE], colors[TWO], colors[box(0, 0, 2, 2)] = (255, 0, 0, 9), (0, 0, 255, 0), (128, 0, 128, 255)
    picture(data / "images/a.png")
    save(colors, data / "masks/a.png")
    rest = ~(ONE | TWO | box(0, 0, 2, 2))
    things = [thing("vein", ONE), thing("background", rest), thing("lymph", TWO)]
    return {"a.png": {"objects": things, "ignore_area": 4}}


@case
def class_masks(data: Path) -> dict[str, Any]:
    for place, name in enumerate(("s_1", "s_10")):
        picture(data / f"images/{name}.png", seed=place)
    save(ONE * 255, data / "masks/s_1_class_cell.png")
    save(ONE | TWO, data / "masks/s_1_class_cell_wall.png")
    save(TWO * 1, data / "masks/s_10_class_cell.png")
    return {"s_1.png": [thing("cell", ONE), thing("cell_wall", ONE | TWO)], "s_10.png": [thing("cell", TWO)]}


@case
def object_masks(data: Path) -> dict[str, Any]:
    folder, other = data / "stage1_train/0f", box(10, 6, 24, 20)
    picture(folder / "images/0f.png", "RGBA")
    for name, mask in (("a", ONE * 255), ("b", other * 1), ("c", TWO), ("d", TWO * 0)):
        save(mask, folder / f"masks/{name}.png")
    return {"0f.png": [thing("nucleus", mask) for mask in (ONE, other, TWO)]}


def coco(categories: list[dict], images: list[dict], annotations: list[dict]) -> dict[str, Any]:
    return {"info": {}, "licenses": [], "categories": categories, "images": images, "annotations": annotations}


@case
def coco_roboflow(data: Path) -> dict[str, Any]:
    group = {"id": 0, "name": "bolts-nuts", "supercategory": "none"}
    categories = [group, {"id": 1, "name": "bolt", "supercategory": "bolts-nuts"}]
    for place, (split, name) in enumerate((("train", "x_png.rf.0a.png"), ("valid", "y_png.rf.1b.png"))):
        picture(data / split / name, seed=place)
        record = {"id": 0, "image_id": 0, "category_id": 1, "bbox": [3, 4, 12, 10], "area": 120, "iscrowd": 0}
        record["segmentation"] = [] if place else [np.ravel(corners(3, 4, 15, 14)).tolist()]
        image = {"id": 0, "file_name": name, "height": HEIGHT, "width": WIDTH}
        write(data / split / "_annotations.coco.json", coco(categories, [image], [record]))
    return {"train/x_png.rf.0a.png": [thing("bolt", ONE)], "valid/y_png.rf.1b.png": [thing("bolt", ONE, box_only=True)]}


@case
def coco_cvat(data: Path) -> dict[str, Any]:
    picture(data / "images/default/a.png")
    runs = np.diff(np.r_[0, np.flatnonzero(np.diff(np.r_[0, RING.ravel("F")])), RING.size]).tolist()
    attributes = {"occluded": False, "rotation": 0.0}
    common = {"image_id": 5, "category_id": 1, "attributes": attributes}
    rle = {"counts": runs, "size": [HEIGHT, WIDTH]}
    records = [
        {"id": 1, "segmentation": rle, "iscrowd": 1, "area": int(RING.sum()), "bbox": [2, 16, 14, 12]},
        {"id": 2, "segmentation": [], "iscrowd": 0, "area": 224, "bbox": [20, 10, 14, 16]},
        {"id": 3, "segmentation": [3, 4, 15, 4, 15, 14, 3, 14], "area": 120, "bbox": [3, 4, 12, 10]},
    ]
    image = {"id": 5, "file_name": "a.png"}
    content = coco([{"id": 1, "name": "pore", "supercategory": ""}], [image], [common | record for record in records])
    write(data / "annotations/instances_default.json", content)
    return {"a.png": [thing("pore", RING), thing("pore", TWO, box_only=True), thing("pore", ONE)]}


@case
def coco_label_studio(data: Path) -> dict[str, Any]:
    picture(data / "images/0a1b2c3d-a.png")
    image = {"id": 0, "file_name": "images\\0a1b2c3d-a.png", "height": HEIGHT, "width": WIDTH}
    polygon = [np.ravel(corners(3, 4, 15, 14)).tolist()]
    record = {"id": 0, "image_id": 0, "category_id": 0, "segmentation": polygon, "iscrowd": 0, "area": 120}
    write(data / "result.json", coco([{"id": 0, "name": "cell"}, {"id": 1, "name": "chip"}], [image], [record]))
    return {"0a1b2c3d-a.png": [thing("cell", ONE)]}


@case
def supervisely(data: Path) -> dict[str, Any]:
    write(data / "meta.json", {"classes": [{"title": "pore"}, {"title": "pad"}], "tags": []})
    picture(data / "ds0/img/a.png")
    packed = base64.b64encode(zlib.compress(png(RING[16:28, 2:16]))).decode()
    polygon = {"exterior": corners(3, 4, 14, 13), "interior": [corners(6, 6, 8, 8)]}
    objects = [
        {"classTitle": "pore", "geometryType": "bitmap", "bitmap": {"data": packed, "origin": [2, 16]}},
        {"classTitle": "pad", "geometryType": "polygon", "points": polygon},
        {"classTitle": "pad", "geometryType": "rectangle", "points": {"exterior": [[33, 25], [20, 10]]}},
    ]
    size = {"height": HEIGHT, "width": WIDTH}
    write(data / "ds0/ann/a.png.json", {"size": size, "objects": objects, "tags": []})
    holed = ONE & ~box(6, 6, 9, 9)
    return {"a.png": [thing("pore", RING), thing("pad", holed), thing("pad", TWO)]}


def geotiff(path: Path) -> Callable[[list[list[float]]], list[list[float]]]:
    """A raster of half a meter a pixel, and how pixels become coordinates."""
    import rasterio
    from rasterio.transform import from_origin

    path.parent.mkdir(parents=True, exist_ok=True)
    form = dict(
        driver="GTiff", height=HEIGHT, width=WIDTH, count=3, dtype="uint8", crs="EPSG:32633", compress="deflate"
    )
    with rasterio.open(path, "w", transform=from_origin(512000, 5310000, 0.5, 0.5), **form) as file:
        file.write(np.broadcast_to(np.arange(WIDTH, dtype=np.uint8) * 5, (3, HEIGHT, WIDTH)))
    return lambda points: [[512000 + x / 2, 5310000 - y / 2] for x, y in [*points, points[0]]]


@case
def geojson(data: Path) -> dict[str, Any]:
    ground = geotiff(data / "scene.tif")
    polygons = [("field", [corners(2, 16, 16, 28), corners(6, 20, 12, 24)]), ("road", [corners(20, 10, 34, 26)])]
    polygons.append(("road", [corners(900, 900, 910, 910)]))
    features = [
        {"type": "Feature", "properties": {"class": name}, "geometry": {"type": "Polygon", "coordinates": rings}}
        for name, rings in ((name, [ground(ring) for ring in rings]) for name, rings in polygons)
    ]
    features.append({"type": "Feature", "properties": {"class": "road"}, "geometry": None})
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32633"}}
    write(data / "fields.geojson", {"type": "FeatureCollection", "crs": crs, "features": features})
    return {"scene.tif": [thing("field", RING), thing("road", TWO)]}


@case
def shapefile(data: Path) -> dict[str, Any]:
    import shapely
    from pyogrio.raw import write as write_vectors

    ground = geotiff(data / "scene.tif")
    shapes = [
        shapely.MultiPolygon([[ground(corners(3, 4, 15, 14)), []], [ground(corners(20, 10, 34, 26)), []]]),
        shapely.Polygon(ground(corners(2, 16, 16, 28)), [ground(corners(6, 20, 12, 24))]),
    ]
    names = np.array(["Stra\u00dfe", "Feld"], dtype=object)
    form = dict(geometry_type="MultiPolygon", crs="EPSG:32633", driver="ESRI Shapefile", encoding="UTF-8")
    write_vectors(data / "fields.shp", shapely.to_wkb(shapes), [names], ["class_name"], **form)
    return {"scene.tif": [thing("Stra\u00dfe", ONE | TWO), thing("Feld", RING)]}


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    for name, make in CASES.items():
        (FOLDER / name / "data").mkdir(parents=True)
        images = make(FOLDER / name / "data")
        expected = {key: found if isinstance(found, dict) else {"objects": found} for key, found in images.items()}
        write(FOLDER / name / "expected.json", {"images": expected})


if __name__ == "__main__":
    main()
