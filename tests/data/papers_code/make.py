"""Selects the cases of this folder from the complete ones: `python tests/data/papers_code/make.py COMPLETE`.

COMPLETE is a folder with `cases/*.npz`, `cases/optimizer.json` and `keys/*.json`, as README.md describes them.
"""

import gzip
import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
# Of the forward pass: what float64 gives and the maps; its float32 outputs and features take 2 MB more.
FORWARD = ("image_", "network_input_size")
FORWARD_LEFT_OUT = ("_res2", "_res3", "_res4", "_res5", "_mask_features")


def selected(case: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Matching and losses: everything. Maps: class scores at every 5th row and 7th column, all else whole."""
    if case.startswith("model_"):
        return {k: v for k, v in arrays.items() if k.startswith(FORWARD) and not k.endswith(FORWARD_LEFT_OUT)}
    if not case.startswith("postprocess_"):
        return arrays
    sampled = {}
    for key, array in arrays.items():
        if key.startswith("sem_seg_") and array.ndim == 3:
            sampled[f"{key}_every_5_7"] = array[:, ::5, ::7]
        else:
            sampled[key] = array
    return sampled


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """As numpy.savez_compressed, but the same bytes each time."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for name, array in sorted(arrays.items()):
            content = io.BytesIO()
            np.save(content, array)
            file.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue(), zipfile.ZIP_DEFLATED, 9)


def write_json(path: Path, content: dict) -> None:
    path.write_bytes(gzip.compress(json.dumps(content, sort_keys=True).encode(), 9, mtime=0))


def main(complete: Path, folder: Path = HERE) -> None:
    (folder / "cases").mkdir(parents=True, exist_ok=True)
    names = [path.stem for path in sorted((complete / "cases").glob("*.npz"))]
    for name in names:
        if name.startswith("model_") and name != "model_r50":
            continue
        with np.load(complete / "cases" / f"{name}.npz") as arrays:
            write_arrays(folder / "cases" / f"{name}.npz", selected(name, dict(arrays)))
    keys = {path.stem: json.loads(path.read_text()) for path in sorted((complete / "keys").glob("*.json"))}
    write_json(folder / "keys.json.gz", keys)
    write_json(folder / "optimizer.json.gz", json.loads((complete / "cases" / "optimizer.json").read_text()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
