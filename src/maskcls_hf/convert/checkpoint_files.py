"""Reading checkpoints of the paper's code without running code from them."""

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PLAIN_CONTAINERS = {("collections", "OrderedDict"): OrderedDict}
# What numpy names in the pickle of an array; the modules are `numpy.core` before numpy 2 and `numpy._core` since.
ARRAY_PARTS = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("multiarray", "_reconstruct"): np.empty(0).__reduce_ex__(2)[0],
    ("numeric", "_frombuffer"): np.empty(1).__reduce_ex__(5)[0],
}


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Parameters of a `.pkl` (numpy arrays) or torch checkpoint (`.pth`, `.bin`, `.ckpt`), by their names in the file.

    Raises:
        `FileNotFoundError`: no such file.
        `ValueError`: the file holds more than arrays and plain containers, or no parameters.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file.")
    try:
        if path.suffix == ".pkl":
            with path.open("rb") as file:
                content = _ArrayUnpickler(file, path).load()
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, LookupError, TypeError, MemoryError) as error:
        raise ValueError(f"{path}: broken, or more than tensors and plain containers. {error}") from error
    return as_tensors(content, str(path))


def as_tensors(content: Any, where: str) -> dict[str, Tensor]:
    """The state dict in `content`: itself, or what it holds under "model", or as Lightning under "state_dict"."""
    for name in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f'{where}: expected names with arrays, or {{"model": names with arrays}}.')
    tensors = {}
    for name, value in content.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            value = torch.from_numpy(np.require(value, requirements=["C", "W"]))
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{where}: {name!r} holds {type(value).__name__}, not an array of numbers.")
        tensors[name] = value
    return tensors


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and plain containers; refuses to look up anything else."""

    def __init__(self, file: Any, path: Path):
        super().__init__(file, encoding="latin1")  # arrays pickled by Python 2
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in PLAIN_CONTAINERS:
            return PLAIN_CONTAINERS[module, name]
        if (module, name) == ("_codecs", "encode"):
            return _latin1_bytes
        package, _, last = module.rpartition(".")
        if (package or last) in ("numpy", "numpy.core", "numpy._core") and (last, name) in ARRAY_PARTS:
            return ARRAY_PARTS[last, name]
        raise ValueError(
            f"{self.path}: refused to unpickle {module}.{name}; only numpy arrays and plain containers are allowed, "
            "because anything else could run code. Do not load this file unless you know where it comes from."
        )


def _latin1_bytes(text: str, encoding: str) -> bytes:
    """How pickle protocols 0 to 2 write bytes; only this encoding occurs."""
    if encoding != "latin1":
        raise ValueError(f"a pickle of arrays has no text encoded as {encoding!r}.")
    return text.encode(encoding)
