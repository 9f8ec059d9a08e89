"""Recipes: a training as a short YAML file, read into typed sections.

A recipe names data layout, model, augmentation, optimiser and schedule; what depends on the machine (paths, processes,
accumulated batches) is given where it is run. Those of the package are in `recipes/`, see [`list_recipes`].
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_type_hints

from ..utils.yaml_values import DEEPEST, parse_yaml, read_yaml
from .recipe_sections import EvaluationSection, ModelSection, MultiScaleSection, Recipe
from .recipe_values import as_type, hints_of_section, require_known, with_new_names

RECIPES = Path(__file__).parent / "recipes"
SECTIONS: dict[str, Any] = {
    name: hint for name, hint in get_type_hints(Recipe).items() if name not in ("name", "doubled")
}


def list_recipes() -> dict[str, str]:
    """Names of the package's recipes, each with the first line of its file."""
    return {path.stem: _headline(path) for path in sorted(RECIPES.glob("*.yaml"))}


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe of the package by its name, or a YAML file by its path.

    A file may name its `base`, another recipe of the package or a file beside it (`NAME.yaml`), and then says only
    what differs: its values replace those of the base key by key, also inside nested values, where null removes the
    base's. Lists replace lists, a backbone of another model type replaces the whole backbone, and the scores under
    `paper` are never inherited.

    Args:
        overrides: `"section.key=value"`, the value in YAML; dots lead into nested values
            (`model.backbone_config.depths=[1,1,1,1]`).

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: no valid YAML, an unknown section or key, one that stands twice (in a file, or in the overrides with
            two values), or a value of a wrong type or out of range; the message names file, key and what is known. A
            section that stands twice and does not contradict itself is read, but no training starts with it.
    """
    path = _find(source)
    doubled: list[str] = []
    sections = _read(path, (), doubled)
    _require_distinct(overrides)
    for override in overrides:
        sections = _overridden(sections, override)
    values = {name: _section(hint, sections[name]) for name, hint in SECTIONS.items() if name in sections}
    try:
        return Recipe(name=path.stem, doubled=tuple(doubled), **values)
    except ValueError as error:
        raise ValueError(f"{' '.join([str(path), *(f'--set {o}' for o in overrides)])}: {error}") from error


def _section(hint: Any, values: dict[str, Any]) -> Any:
    if hint is ModelSection:
        own = {name: values[name] for name in ("kind", "backbone_checkpoint") if name in values}
        return ModelSection(**own, config={name: value for name, value in values.items() if name not in own})
    if hint is EvaluationSection and values.get("multi_scale") is not None:
        return EvaluationSection(**values | {"multi_scale": MultiScaleSection(**values["multi_scale"])})
    return cast(Any, hint)(**values) if dataclasses.is_dataclass(hint) else values


def _find(source: str | Path, beside: Path | None = None) -> Path:
    """The file of a recipe: a path, relative to the file `beside`, or a name beside that file or in the package."""
    folder = Path() if beside is None else beside.parent
    if isinstance(source, Path) or Path(source).suffix in (".yaml", ".yml"):
        if (folder / source).is_file():
            return folder / source
        raise FileNotFoundError(f"No recipe file {folder / source}.")
    here = [] if beside is None else [folder / f"{source}.yaml"]
    for path in (*here, RECIPES / f"{source}.yaml"):
        if path.is_file():
            return path
    names = list(list_recipes())
    close = difflib.get_close_matches(source, names, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise FileNotFoundError(
        f"No recipe {source!r}.{hint} Give the path of a YAML file, or one of: {', '.join(names) or '(none)'}."
    )


def _read(path: Path, below: tuple[Path, ...], doubled: list[str]) -> dict[str, dict[str, Any]]:
    """Checked sections of a file, over those of its bases."""
    if path.resolve() in below:
        raise ValueError(f"{path}: the recipe is its own base ({' -> '.join(p.stem for p in (*below, path))}).")
    twice: list[str] = []
    content = read_yaml(path, twice)
    doubled += [f"{path}, {problem}" for problem in twice]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold sections ({', '.join(SECTIONS)}).")
    given = dict(content)
    base = given.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise ValueError(f"{path}: base must be the name of a recipe, got {base!r}.")
    try:
        inherited = {} if base is None else _read(_find(base, path), (*below, path.resolve()), doubled)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: base: {error}") from error
    inherited.pop("paper", None)
    return _merged(inherited, given, str(path))


def _require_distinct(overrides: Sequence[str]) -> None:
    """The last one would count, and the first be dropped without a word."""
    given: dict[str, str] = {}
    for name, _, text in (override.partition("=") for override in overrides):
        if given.setdefault(name.strip(), text) != text:
            raise ValueError(f"--set {name.strip()} is given twice: {given[name.strip()]} and {text}.")


def _overridden(sections: dict[str, dict[str, Any]], override: str) -> dict[str, dict[str, Any]]:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not 2 <= len(keys) <= DEEPEST or not all(keys):
        raise ValueError(f"--set {override}: must be section.key=value, such as optimizer.learning_rate=1e-4.")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"--set {override}: {text!r} is not a value in YAML: {error}") from error
    section, key, *deeper = keys
    whole = sections.get(section, {}).get(key)
    if deeper and whole is not None and not isinstance(whole, Mapping):
        raise ValueError(f"--set {override}: {section}.{key} is {whole!r}, which has no keys.")
    for name in reversed(deeper):
        value = {name: value}
    return _merged(sections, {section: {key: value}}, f"--set {override}")


def _merged(sections: dict[str, dict[str, Any]], given: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """`given` over `sections`, its keys and types checked; `where` it comes from, for messages."""
    merged = dict(sections)
    for name, values in given.items():
        if name not in SECTIONS:
            raise ValueError(f"{where}: unknown section {name!r}; there are {', '.join(['base', *SECTIONS])}.")
        values = {} if values is None else values
        if not isinstance(values, Mapping):
            raise ValueError(f"{where}: {name} must hold keys and values, got {values!r}.")
        checked = _checked(name, with_new_names(name, values, where), merged, where)
        merged[name] = {
            **merged.get(name, {}),
            **{k: _over(merged.get(name, {}).get(k), v) for k, v in checked.items()},
        }
    return merged


def _over(base: Any, value: Any) -> Any:
    """`value` over `base` where both are mappings; a null inside removes the key."""
    if not isinstance(base, Mapping) or not isinstance(value, Mapping):
        return value
    if value.get("model_type", base.get("model_type")) != base.get("model_type"):
        return value
    merged = {key: _over(base.get(key), inner) for key, inner in value.items() if inner is not None}
    return {key: inner for key, inner in base.items() if key not in value} | merged


def _checked(
    section: str, values: Mapping[str, Any], sections: Mapping[str, dict[str, Any]], where: str
) -> dict[str, Any]:
    hint = SECTIONS[section]
    hints = get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
    kind = str({**sections.get("model", {}), **values}.get("kind", "mask_classification"))
    hints = {name: hint for name, hint in hints.items() if name != "config"} | hints_of_section(section, kind)
    for key in values:
        if hints:
            require_known(key, hints, where, section)
    if section == "paper":
        return dict(values)
    return {key: as_type(value, hints.get(key, Any), where, f"{section}.{key}") for key, value in values.items()}


def _headline(path: Path) -> str:
    with path.open(encoding="utf-8") as lines:
        return next(lines, "").lstrip("# ").strip()


__all__ = ["RECIPES", "Recipe", "list_recipes", "load_recipe"]
