"""How a model is run well, as its image processor keeps it: `inference_defaults`, all of whose keys are optional.

    {"task": "instance", "tile": 128, "overlap": 0.25, "enlarge": 2.0,
     "semantic": {"score_threshold": 0.5}, "panoptic": {"threshold": 0.5}, "instance": {"mask_threshold": 0.4}}

What the dict of a task holds are options of `post_process_<task>_segmentation`. An option that a caller gives counts
most, then what the model has saved, then what belongs to the rule of the maps (`BY_RULE`), then `BUILT_IN`. The rule is
an option too, "exact", "transformers" or "paper"; where nobody says, it is the image processor's `compatibility`.
"""

from collections.abc import Mapping
from typing import Any

from .options import plain, require_range, similar

# Options of the post-processing of each task. None: it depends on the number of classes.
BUILT_IN: dict[str, dict[str, Any]] = {
    "semantic": {"score_threshold": None},
    "panoptic": {
        "threshold": 0.5, "mask_threshold": 0.5, "overlap_mask_area_threshold": 0.8,
        "max_hole_share": 0.05, "min_fragment_share": 0.05,
    },
    "instance": {
        "threshold": 0.5, "mask_threshold": 0.5,
        "max_mask_iou": 0.8, "max_hole_share": 0.05, "min_fragment_share": 0.05,
    },
}  # fmt: skip
# What the paper's code has not; scores that are compared with it are made so.
NO_CLEAN_UP: dict[str, dict[str, Any]] = {
    "semantic": {},
    "panoptic": {"max_hole_share": 0.0, "min_fragment_share": 0.0},
    "instance": {"max_mask_iou": 1.0, "max_hole_share": 0.0, "min_fragment_share": 0.0},
}
# Options that other rules have in the place of those of BUILT_IN.
BY_RULE: dict[str, dict[str, dict[str, Any]]] = {
    "exact": {task: {} for task in BUILT_IN},
    "transformers": NO_CLEAN_UP | {"semantic": {"score_threshold": 0.0}},
    "paper": {
        "semantic": {"score_threshold": 0.0},
        "panoptic": NO_CLEAN_UP["panoptic"] | {"threshold": 0.8},
        "instance": NO_CLEAN_UP["instance"] | {"threshold": 0.0},
    },
}
# Image processors of the paper's code, of transformers and of this package before it had `inference_defaults`.
WITHOUT_DEFAULTS: dict[str, Any] = {"panoptic": {"threshold": 0.8}}
# That of transformers' EoMT makes maps at the size of the network's input, by the rules of the paper's code.
OF_EOMT: dict[str, Any] = {task: {"rule": "paper"} for task in BUILT_IN}
OF_EOMT["instance"]["threshold"] = 0.8
# "[0, inf)" and its kin: see `require_range`. A tile or an enlargement of 0 is none.
RANGES = {"tile": "[16, inf)", "overlap": "[0, 0.5]", "enlarge": "(0, inf)"}


def checked_inference_defaults(given: Any, name: str = "inference_defaults") -> dict[str, Any]:
    """`inference_defaults` as plain values, without the keys that say nothing (None).

    Raises:
        ValueError: an unknown key, or a value outside its range.

    Examples:
        >>> checked_inference_defaults({"tile": 128, "semantic": {"score_threshold": None}})
        {'tile': 128, 'semantic': {}}
    """
    defaults = plain(given)
    if not isinstance(defaults, Mapping):
        raise ValueError(f"{name} must be a dict, got {given!r}.")
    checked: dict[str, Any] = {}
    for key, value in defaults.items():
        where = f"{name}[{key!r}]"
        _require_known(key, ("task", *RANGES, *BUILT_IN), name)
        if value is None:
            continue
        if key in RANGES:
            if value != 0 or isinstance(value, bool) or key == "overlap":
                require_range(where, value, RANGES[key], integer=key == "tile")
            checked[key] = value
        elif key == "task":
            if value not in BUILT_IN:
                raise ValueError(f"{where}={value!r} must be one of {', '.join(BUILT_IN)}.")
            checked[key] = value
        else:
            checked[key] = _checked_options(value, key, where)
    return checked


def _checked_options(options: Any, task: str, where: str) -> dict[str, Any]:
    if not isinstance(options, Mapping):
        raise ValueError(f"{where} must be a dict of options of post_process_{task}_segmentation, got {options!r}.")
    for name, value in options.items():
        _require_known(name, (*BUILT_IN[task], "rule"), where)
        if name == "rule" and value is not None:
            require_rule(value)
        elif value is not None:
            require_range(f"{where}[{name!r}]", value, "[0, 1]")
    return {name: value for name, value in options.items() if value is not None}


def require_rule(rule: Any) -> None:
    """Raise `ValueError` for a rule that is none of `BY_RULE`."""
    if rule not in BY_RULE:
        raise ValueError(f"rule={rule!r} must be one of {', '.join(BY_RULE)}.")


def _require_known(name: Any, known: Any, where: str) -> None:
    if name not in known:
        meant = similar(str(name), list(known))
        hint = f": did you mean {meant!r}?" if meant else "."
        raise ValueError(f"{where} has no key {name!r}, only {', '.join(known)}{hint}")


def merged_defaults(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Several `inference_defaults` as one: what a later one says counts more, in the options of a task one by one.

    Examples:
        >>> merged_defaults({"tile": 128, "panoptic": {"threshold": 0.8}}, {"panoptic": {"mask_threshold": 0.4}})
        {'tile': 128, 'panoptic': {'threshold': 0.8, 'mask_threshold': 0.4}}
    """
    merged: dict[str, Any] = {}
    for defaults in layers:
        for key, value in defaults.items():
            if key in BUILT_IN and isinstance(value, Mapping):
                value = {**merged.get(key, {}), **{name: item for name, item in value.items() if item is not None}}
                value = value or None
            if value is not None:
                merged[key] = value
    return merged


def defaults_of(image_processor: Any) -> dict[str, Any]:
    """What an image processor has saved, and the rules of its `compatibility`; nothing where it is of another kind."""
    rule = getattr(image_processor, "compatibility", "exact")
    rules = {} if rule == "exact" else {task: {"rule": rule} for task in BUILT_IN}
    return merged_defaults(rules, getattr(image_processor, "inference_defaults", None) or {})


def knows_only_stuff(image_processor: Any) -> bool:
    """Whether no class of the model has instances, as after training on maps of classes."""
    stuff = getattr(image_processor, "label_ids_to_fuse", None) or ()
    return len(set(stuff)) == getattr(image_processor, "num_labels", None)


def saved_task(image_processor: Any) -> Any:
    """The task that is done where nobody says: the saved one, or panoptic; none that finds instances of stuff alone."""
    task = defaults_of(image_processor).get("task", "panoptic")
    return "panoptic" if task == "instance" and knows_only_stuff(image_processor) else task


def task_options(
    defaults: Mapping[str, Any], task: str, given: Mapping[str, Any], built_in: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """All options of a task's post-processing: those `given` (not None), else saved, else of the rule, else built in.

    Args:
        defaults: `inference_defaults`, of [`defaults_of`].
        task: "semantic", "panoptic" or "instance".
        given: by the caller; None where nothing was.
        built_in: in the place of those of `BUILT_IN`.

    Raises:
        ValueError: an unknown rule.

    Examples:
        >>> task_options({}, "panoptic", {"threshold": None}, {})["threshold"]
        0.5
    """
    saved = {name: value for name, value in (defaults.get(task) or {}).items() if value is not None}
    said = {name: value for name, value in given.items() if value is not None}
    chosen = {**saved, **said}
    require_rule(chosen.get("rule", "exact"))
    return {**BUILT_IN[task], **(built_in or {}), **BY_RULE[chosen.get("rule", "exact")][task], **chosen}
