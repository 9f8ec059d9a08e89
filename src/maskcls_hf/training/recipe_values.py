"""Which keys the sections of a recipe have, and values of the right type."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers import PreTrainedConfig
from transformers.utils import logging

from ..data.transforms import TrainTransform
from ..models.configuration_maskcls import MaskClsConfig, PerPixelConfig
from ..models.image_processing_maskcls import MaskClsImageProcessorKwargs

logger = logging.get_logger(__name__)

CONFIGS: dict[str, type[PreTrainedConfig]] = {"mask_classification": MaskClsConfig, "per_pixel": PerPixelConfig}
NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a text", dict: "keys and values"}
# What no recipe gives, as the data or the training loop does, or nothing uses it.
OF_OTHERS = {
    "augmentation": ("id2label", "void_id", "return"),
    "image_processor": (
        "crop_size", "data_format", "device", "disable_grouping", "do_center_crop", "do_reduce_labels", "ignore_index",
        "image_seq_length", "input_data_format", "label_format", "label_ids_to_fuse", "label_offset", "num_labels",
        "return_tensors", "void_id",
    ),
}  # fmt: skip

RENAMED = {"augmentation": {"colour": "color"}}  # keys of recipes of before -> what they are called now


def with_new_names(section: str, values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A section with its keys of before under their names of now, with a warning."""
    for old, new in RENAMED.get(section, {}).items():
        if old in values and new in values:
            raise ValueError(f"{where}: {section}.{old} is the old name of {section}.{new}: give one of the two.")
        if old in values:
            logger.warning(f"{where}: {section}.{old} is called {section}.{new} now; the old name is still read.")
            values = {new if key == old else key: value for key, value in values.items()}
    return values


def hints_of_section(section: str, model_kind: str) -> dict[str, Any]:
    """Keys that `model`, `image_processor` and `augmentation` take from the code that reads them, and the types of
    their values; {} for others."""
    if section == "model":
        config = CONFIGS.get(model_kind, MaskClsConfig)
        own = (f for f in dataclasses.fields(config) if f.name not in PreTrainedConfig.__dataclass_fields__)
        hints = {f.name: f.type for f in own}
        return hints | {"backbone_config": dict | None, "num_queries": int | Literal["num_labels"]}
    if section not in OF_OTHERS:
        return {}
    hints = get_type_hints(MaskClsImageProcessorKwargs if section == "image_processor" else TrainTransform.__init__)
    return {name: hint for name, hint in sorted(hints.items()) if name not in OF_OTHERS[section]}


def require_known(key: Any, known: Collection[str], where: str, owner: str) -> None:
    """ValueError, with the nearest known key, for one that `owner` does not have."""
    if key not in known:
        close = difflib.get_close_matches(str(key), known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"{where}: unknown key {owner}.{key}{hint}; {owner} has {', '.join(sorted(known))}.")


def as_type(value: Any, hint: Any, where: str, owner: str) -> Any:
    """`value` as `hint` wants it: integers are numbers, lists become tuples. All numbers are finite.

    Args:
        hint: Any, a class, `Literal`, a dataclass (the value stays a dict), a list, tuple or mapping of these, or one
            of several.
        where: file, for messages.
        owner: section and key, for messages.

    Raises:
        ValueError: it is of another type.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    _require_finite(value, where, owner)
    if hint is Any or (hint is dict and isinstance(value, Mapping)):
        return value
    if value is None and type(None) in arguments:
        return None
    if origin in (Union, UnionType):
        choices = [argument for argument in arguments if argument is not type(None)]
        if len(choices) == 1:
            return as_type(value, choices[0], where, owner)
        for choice in choices:
            try:
                return as_type(value, choice, where, owner)
            except ValueError:
                pass
    if origin is Literal and isinstance(value, str) and value in arguments:
        return value
    if origin in (list, tuple, Sequence) and isinstance(value, (list, tuple)):
        fixed = origin is tuple and arguments[-1] is not Ellipsis
        hints = arguments if fixed else [arguments[0]] * len(value)
        if len(hints) == len(value):
            items = enumerate(zip(value, hints, strict=True))
            made = [as_type(item, hint, where, f"{owner}[{i}]") for i, (item, hint) in items]
            return tuple(made) if origin is tuple else made
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {
            as_type(key, arguments[0], where, f"a key of {owner}"): None
            if inner is None
            else as_type(inner, arguments[1], where, f"{owner}.{key}")
            for key, inner in value.items()
        }
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return _checked_fields(value, hint, where, owner)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and is_number and abs(value) <= sys.float_info.max:  # integers can be larger
        return float(value)
    if hint is int and is_number and isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{where}: {owner} is {_shown(value)}, must be below 2^63.")
    if hint in (int, bool, str) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{where}: {owner} is {_shown(value)}, must be {_name(hint)}.")


def _require_finite(value: Any, where: str, owner: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _require_finite(inner, where, f"{owner}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            _require_finite(inner, where, f"{owner}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: {owner} is {value}, must be a finite number.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _checked_fields(value: Mapping[str, Any], hint: Any, where: str, owner: str) -> dict[str, Any]:
    hints = get_type_hints(hint)
    for key in value:
        require_known(key, hints, where, owner)
    return {key: as_type(inner, hints[key], where, f"{owner}.{key}") for key, inner in value.items()}


def _name(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in (Union, UnionType):
        names = dict.fromkeys(_name(argument) for argument in arguments if argument is not type(None))
        return " or ".join(name for name in names if name != NAMES[int] or NAMES[float] not in names)
    if origin in (list, Sequence) or Ellipsis in arguments:
        return f"a list, each {_name(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}, each {_name(arguments[0])}"
    return NAMES.get(origin or hint, "keys and values")
