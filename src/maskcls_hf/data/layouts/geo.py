"""GeoTIFF with vectors: GeoJSON, shapefiles and GeoPackages, whose polygons lie on the map."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.image_reading import image_to_tensor
from ...models.run_lengths import MaskRuns
from ..checks import ReportFault, refuse
from ..dataset import check_size
from ..files import some
from ..sample import Segments
from .drawing import Size, draw_array
from .shapes import Annotated, Background, Shape, ShapeDataset, Skipped, natural, split_folder

RASTERS, VECTORS = (".tif", ".tiff"), (".geojson", ".shp", ".gpkg")
COLUMNS = ("class", "class_name", "label", "category", "type", "name")
NEEDED = "GeoTIFF with vectors needs rasterio, pyogrio and shapely: pip install maskcls-hf[geo]"


class GeoVectors(ShapeDataset):
    """Georeferenced images with polygons in map coordinates.

    Layout: NAME.tif with NAME.geojson (.shp, .gpkg), or one file of vectors for all images of a folder. A pixel is
    inside where its center is. Vectors are brought to the image's reference system; later ones lie on top. Vectors
    outside of all images, without a class, and lines and points are skipped.

    Args:
        root: folder of the data.
        split: a folder in it; None: there are none.
        column: of the classes in the vectors; None: the first that is called class, class_name, label, ...
        bands: that are red, green and blue, from 1.
        background: see [`ShapeDataset`].
        cache: see [`ShapeDataset`].
        report: see [`ShapeDataset`].

    Raises:
        ImportError: the libraries are not installed.
        ValueError: no vector meets an image, a file has no reference system, or no column of classes.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = None,
        *,
        column: str | None = None,
        bands: tuple[int, ...] | None = None,
        background: Background = "negatives",
        cache: bool = False,
        report: ReportFault = refuse,
    ):
        self.root, self.split, self.bands = Path(root), split, bands
        try:
            import rasterio
        except ImportError as error:
            raise ImportError(NEEDED) from error
        skipped = Skipped(self.root, report)
        folder = split_folder(self.root, split) or self.root / str(split)
        rasters, vectors = _files(folder, RASTERS), _files(folder, VECTORS)
        features: dict[Path, tuple[Any, list[tuple[str, Any, str]]]] = {}
        for path in vectors:
            try:
                features[path] = _features(path, column, skipped)
            except (OSError, RuntimeError, ValueError) as error:
                report("bad_record", str(error), path, ValueError(f"{path}: {error}"))
        names = dict(enumerate(sorted({name for _, found in features.values() for name, _, _ in found})))
        labels = {name: label for label, name in names.items()}
        images, met = [], set()
        for raster in rasters:
            own = [path for path in features if path.stem == raster.stem] or [
                path for path in features if path.stem not in {other.stem for other in rasters}
            ]
            with rasterio.open(raster) as source:
                frame = (source.crs, source.transform, (source.height, source.width))
            shapes = []
            for path in own:
                crs, found = features[path]
                for name, geometry, what in found:
                    local = _on_map(geometry, crs, frame[0], raster, path)
                    if _meets(local, frame[1], frame[2]):
                        met.add((path, what))
                        shapes.append(Shape(labels[name], partial(draw_geometry, local, tuple(frame[1])), what))
            where = f"{some([str(path) for path in own])}, {raster.name}"
            images.append(Annotated(raster.stem, raster, where, shapes, frame[2]))
        for path, (_, found) in features.items():
            for _, _, what in found:
                if (path, what) not in met:
                    skipped("a vector outside of all images", what, path)
            if found and not any(key == path for key, _ in met):
                message = "no vector meets an image: look at the reference systems of both"
                report("bad_record", message, path, ValueError(f"{path}: {message}."))
        skipped.warn()
        super().__init__(self.root, images, names, background, cache, report)

    @classmethod
    def places(cls, root: Path, split: str | None) -> list[Path]:
        """The usual name of the vectors of an image."""
        return [root / (split or "") / "NAME.geojson"]

    @classmethod
    def find(cls, root: Path, split: str | None, options: Mapping[str, Any]) -> bool:
        """Whether a folder holds both rasters and vectors."""
        folder = split_folder(root, split)
        return folder is not None and bool(_files(folder, RASTERS)) and bool(_files(folder, VECTORS))

    def _read(self, index: int) -> tuple[Tensor, Segments]:
        import rasterio

        with rasterio.open(self.image_path(index)) as source:
            bands = self.bands or ((1, 2, 3) if source.count >= 3 else (1,))
            image = image_to_tensor(torch.from_numpy(source.read(list(bands))), input_data_format="channels_first")
        size = (image.shape[-2], image.shape[-1])
        segments = self.read(index, size)
        check_size(segments.size, size, self.annotation(index), str(self.image_path(index)))
        return image, segments


def draw_geometry(geometry: Mapping[str, Any], transform: tuple[float, ...], size: Size) -> MaskRuns:
    """A GeoJSON geometry in the image's map coordinates: pixels whose center is inside."""
    from affine import Affine
    from rasterio.features import rasterize

    mask = rasterize([(geometry, 1)], out_shape=size, transform=Affine(*transform[:6]), fill=0, dtype="uint8")
    return draw_array(mask.astype(bool), 0, 0, size)


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    found = [path for path in folder.iterdir() if path.suffix.lower() in suffixes] if folder.is_dir() else []
    return sorted(found, key=lambda path: natural(path.name))


def _features(path: Path, column: str | None, skipped: Skipped) -> tuple[Any, list[tuple[str, Any, str]]]:
    """Reference system and (class, geometry, name) of the polygons of a file."""
    try:
        import shapely
        from pyogrio.raw import read
    except ImportError as error:
        raise ImportError(NEEDED) from error
    meta, _, geometries, fields = read(path)
    columns = {str(name): values for name, values in zip(meta["fields"], fields, strict=True)}
    short = None if column is None else column[:10] if path.suffix.lower() == ".shp" else column
    key = short or next((name for name in COLUMNS if name in columns), None)
    if key not in columns:
        known = ", ".join(columns) or "none"
        raise ValueError(f"no column {column or 'of classes'}; the columns are {known}. Choose by the option column")
    if meta["crs"] is None:
        raise ValueError("it has no reference system (a .prj is missing?)")
    found = []
    for place, (encoded, name) in enumerate(zip(geometries, columns[key], strict=True)):
        what = f"feature {place}"
        geometry = None if encoded is None else shapely.from_wkb(encoded)
        if geometry is None or geometry.is_empty or geometry.geom_type not in ("Polygon", "MultiPolygon"):
            kind = "no geometry" if geometry is None or geometry.is_empty else f"a {geometry.geom_type} has no area"
            skipped(kind, what, path)
        elif name is None or name != name or not str(name).strip():
            skipped("a vector without a class", what, path)
        else:
            found.append((str(name), shapely.geometry.mapping(shapely.force_2d(geometry)), what))
    return meta["crs"], found


def _on_map(geometry: Any, crs: Any, target: Any, raster: Path, path: Path) -> Any:
    """A geometry in the reference system of an image."""
    from rasterio.crs import CRS
    from rasterio.warp import transform_geom

    if target is None:
        raise ValueError(f"{raster} has no reference system, so that {path} cannot be laid over it.")
    source = CRS.from_user_input(crs)
    return geometry if source == target else transform_geom(source, target, geometry)


def _meets(geometry: Any, transform: Any, size: Size) -> bool:
    from rasterio.features import bounds
    from rasterio.transform import array_bounds

    left, bottom, right, top = bounds(geometry)
    own_left, own_bottom, own_right, own_top = array_bounds(*size, transform)
    return bool(left < own_right and right > own_left and bottom < own_top and top > own_bottom)
