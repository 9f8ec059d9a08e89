"""YAML as settings are written in it, stricter than `yaml.safe_load` and with the numbers of everyone else.

- A key that stands twice in a mapping is an error. Keys that a merge (`<<`) brings give way to those beside it.
- `1e-4` is a number (PyYAML wants 1.0e-4), and an integer where it is whole (`1e5`). What YAML 1.1 reads in its own
  way is a text: `010` (there 8), `1:30` (there 90), dates.
- Aliases cannot hold themselves, or stand for more than `REPEATED_VALUES` values; nothing is nested deeper than
  `DEEPEST`. So reading costs what the bytes cost.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

REPEATED_VALUES = 10_000
DEEPEST = 50
_TAG = "tag:yaml.org,2002:"
_TYPES = ("null", "bool", "int", "float", "str", "seq", "map")
_DIGITS, _EXPONENT = "[0-9][0-9_]*", "[eE][-+]?[0-9]+"
_NUMBERS = {
    "int": "[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)",
    "float": rf"[-+]?({_DIGITS}\.[0-9_]*|\.{_DIGITS})({_EXPONENT})?|[-+]?{_DIGITS}{_EXPONENT}|"
    r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}


class _Loader(yaml.SafeLoader):
    def __init__(self, stream: str, doubled: list[str] | None):
        super().__init__(stream)
        self._doubled = doubled
        self._depth = self._deepest = self._values = self._repeated = 0
        self._open: set[str] = set()  # anchors whose values are not complete
        self._sizes: dict[str, tuple[int, int]] = {}  # of the others, in values and in levels

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self._open:
                raise _problem(f"the alias *{event.anchor} stands in what it stands for", event)
            values, levels = self._sizes.get(event.anchor, (0, 0))
            self._repeated += values
            self._values += values
            if self._repeated > REPEATED_VALUES:
                raise _problem(f"aliases stand for more than {REPEATED_VALUES} values", event)
            self._reach(self._depth + levels, event)
            return super().compose_node(parent, index)
        self._depth += 1
        above, self._deepest = self._deepest, 0
        self._reach(self._depth, event)
        before, self._values = self._values, self._values + 1
        if event.anchor is not None:
            self._open.add(event.anchor)
        node = super().compose_node(parent, index)
        if event.anchor is not None:
            self._open.discard(event.anchor)
            self._sizes[event.anchor] = self._values - before, self._deepest - self._depth + 1
        self._deepest = max(self._deepest, above)
        self._depth -= 1
        return node

    def _reach(self, depth: int, event: Any) -> None:
        self._deepest = max(self._deepest, depth)
        if depth > DEEPEST:
            raise _problem(f"values are nested deeper than {DEEPEST} levels", event)

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        entries: dict[Any, tuple[Any, Any]] = {}
        for key, value in node.value:
            name = self._name(key)
            if name not in entries:
                entries[name] = key, value
                continue
            problem = f"the key {name!r} stands twice, first in line {entries[name][0].start_mark.line + 1}"
            if self._depth > 1 or self._doubled is None or not self._join(entries[name][1], value):
                raise _problem(problem, key)
            self._doubled.append(f"line {key.start_mark.line + 1}: {problem}")
        node.value = list(entries.values())
        return node

    def _name(self, key: Any) -> Any:
        if not isinstance(key, yaml.ScalarNode):
            raise _problem("a key must be a text or a number", key)
        return key.value if key.tag == _TAG + "merge" else self.construct_object(key)

    def _join(self, first: Any, second: Any) -> bool:
        """Add the entries of one mapping to another; False, and nothing done, where the two contradict each other."""
        if not (isinstance(first, yaml.MappingNode) and isinstance(second, yaml.MappingNode)):
            return False
        there = {self._name(key): value for key, value in first.value}
        new = [(key, value) for key, value in second.value if self._name(key) not in there]
        known = [(there[self._name(key)], value) for key, value in second.value if self._name(key) in there]
        if any((one.tag, str(one.value)) != (other.tag, str(other.value)) for one, other in known):
            return False
        first.value = first.value + new
        return True

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError) as error:  # `!!bool x`, `0x_`
            raise _problem(f"{str(node.value)[:50]!r} is no value of its type ({error})", node) from error

    def construct_yaml_float(self, node: Any) -> int | float:
        value = super().construct_yaml_float(node)
        is_integer = "." not in node.value and value.is_integer()
        return int(value) if is_integer else value


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _problem(what: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=place.start_mark)


for _class in (_Loader, _Dumper):  # the dumper quotes what the loader would not read as a text
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.removeprefix(_TAG) not in (*_NUMBERS, "timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for _name, _pattern in _NUMBERS.items():
        _class.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), list("-+.0123456789"))
_Loader.yaml_constructors = {
    tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag[len(_TAG) :] in _TYPES
}
_Loader.add_constructor(_TAG + "float", _Loader.construct_yaml_float)


def parse_yaml(text: str, doubled: list[str] | None = None) -> Any:
    """The values of one document; None where there is none.

    Args:
        text: of one document.
        doubled: where given, keys of the whole document whose values are mappings may stand twice, if these do not
            contradict each other: they count as one, and what is wrong is added to this list.

    Raises:
        ValueError: no valid YAML; says in one line what is wrong, and where.
    """
    try:
        return _Loader(text, doubled).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise ValueError(place + ", ".join(part for part in (error.context, error.problem) if part)) from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def read_yaml(path: str | Path, doubled: list[str] | None = None) -> Any:
    """The values of a file, as [`parse_yaml`].

    Raises:
        OSError: it cannot be read.
        ValueError: it is no valid YAML; names the file.
    """
    try:
        return parse_yaml(Path(path).read_text(encoding="utf-8-sig"), doubled)
    except ValueError as error:  # also of the encoding
        raise ValueError(f"{path} is not valid YAML: {error}") from error


def dump_yaml(values: Any) -> str:
    """`values` as [`parse_yaml`] reads them, in their order."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False)
    return text
