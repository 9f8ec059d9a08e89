"""Which keys the sections of a recipe have, and values of the right type."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from transformers import PreTrainedConfig

from ..configuration_maskcls import MaskClsConfig
from ..configuration_perpixel import PerPixelConfig
from ..data.transforms import TrainTransform
from ..image_processing_maskcls import MaskClsImageProcessorKwargs

CONFIGS: dict[str, type[PreTrainedConfig]] = {"mask_classification": MaskClsConfig, "per_pixel": PerPixelConfig}
NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a text", dict: "keys and values"}
OF_THE_DATA = ("id2label", "void_id")  # arguments of TrainTransform that no recipe gives


def keys_of_section(section: str, model_kind: str) -> list[str]:
    """Keys that `model`, `image_processor` and `augmentation` take from the code that reads them; () for others."""
    if section == "model":
        config = CONFIGS.get(model_kind, MaskClsConfig)
        return [f.name for f in dataclasses.fields(config) if f.name not in PreTrainedConfig.__dataclass_fields__]
    if section == "image_processor":
        return sorted(get_type_hints(MaskClsImageProcessorKwargs))
    if section == "augmentation":
        return [name for name in inspect.signature(TrainTransform).parameters if name not in OF_THE_DATA]
    return []


def require_known(key: Any, known: Collection[str], where: str, owner: str) -> None:
    """ValueError, with the nearest known key, for one that `owner` does not have."""
    if key not in known:
        close = difflib.get_close_matches(str(key), known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"{where}: unknown key {owner}.{key}{hint}; {owner} has {', '.join(sorted(known))}.")


def as_type(value: Any, hint: Any, where: str, owner: str) -> Any:
    """`value` as `hint` wants it: integers are numbers, `1e-4` (a text in YAML) too, lists become tuples.

    Args:
        hint: Any, a class, `Literal`, a dataclass (the value stays a dict), a list or tuple of these, or one or None.
        where: file, for messages.
        owner: section and key, for messages.

    Raises:
        ValueError: it is of another type.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any or (value is None and type(None) in arguments):
        return value
    if type(None) in arguments:
        return as_type(value, arguments[0], where, owner)
    if origin is Literal and isinstance(value, str) and value in arguments:
        return value
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        hints = [arguments[0]] * len(value) if origin is list else arguments
        if len(hints) == len(value):
            items = enumerate(zip(value, hints, strict=True))
            return origin(as_type(item, hint, where, f"{owner}[{i}]") for i, (item, hint) in items)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return _checked_fields(value, hint, where, owner)
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    plain = origin or hint
    if plain in (int, bool, str, dict) and isinstance(value, plain) and (plain is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{where}: {owner} is {value!r}, must be {_name(hint)}.")


def _checked_fields(value: Mapping[str, Any], hint: Any, where: str, owner: str) -> dict[str, Any]:
    hints = get_type_hints(hint)
    for key in value:
        require_known(key, hints, where, owner)
    return {key: as_type(inner, hints[key], where, f"{owner}.{key}") for key, inner in value.items()}


def _name(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is list:
        return f"a list, each {_name(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}, each {_name(arguments[0])}"
    return NAMES.get(origin or hint, "keys and values")
