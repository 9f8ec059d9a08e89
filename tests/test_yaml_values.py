"""YAML of settings: numbers, keys that stand twice, aliases, and what reading costs."""

from __future__ import annotations

import math
import time

import pytest

from maskcls_hf.utils.yaml_values import REPEATED_VALUES, dump_yaml, parse_yaml, read_yaml

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
DEEP = "a0: &a0 x\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 100))
MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-1", 0.1), ("2e1", 20), ("1e5", 100000), ("-1E+3", -1000), ("1.5e3", 1500.0), (".5e1", 5.0), ("1.", 1.0),
        ("1_000", 1000), ("1_0.5", 10.5), ("-1", -1), ("+1", 1), ("0x10", 16), ("0b11", 3), ("0", 0),
        ("1e400", math.inf), (".inf", math.inf), ("-.inf", -math.inf), ('"5"', "5"), ("true", True),
        ("no", False), ("~", None),
        ("010", "010"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("1e", "1e"), ("1.5.2", "1.5.2"), ("e1", "e1"),
    ],
)  # fmt: skip
def test_numbers_and_texts(text, value):
    found = parse_yaml(text)
    assert found == value and type(found) is type(value)
    assert parse_yaml(f"key: [{text}]") == {"key": [value]}


def test_nan():
    assert math.isnan(parse_yaml(".nan"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: the key 'a' stands twice, first in line 1"),
        ("{a: 1, a: 1}", "'a' stands twice"),
        ("a: 1\nb: !!bool x", "line 2, column 4: 'x' is no value of its type"),
        ("!!int ''", "'' is no value of its type"),
        ("a: 0x_", "line 1, column 4: '0x_' is no value of its type"),
        ("x: {b: 1, c: [{d: 1, d: 2}]}", "'d' stands twice"),
        ("1: a\n0x1: b", "1 stands twice"),
        ("'a': 1\na: 2", "'a' stands twice"),
        ("a: &a {x: 1, x: 2}\nb: {<<: *a}", "'x' stands twice"),
        ("a: &a {x: 1}\nb: {<<: *a, <<: *a}", "'<<' stands twice"),
        ("&a {x: *a}", r"the alias \*a stands in what it stands for"),
        ("a: &a [1, [*a]]", "stands in what it stands for"),
        ("a: &a {<<: *a}", "stands in what it stands for"),
        ("[" * 100000, "nested deeper than 50"),
        ("{a: " * 200 + "1" + "}" * 200, "nested deeper than 50"),
        (DEEP, "nested deeper than 50"),
        (LAUGHS, f"aliases stand for more than {REPEATED_VALUES} values"),
        (MERGES, f"aliases stand for more than {REPEATED_VALUES} values"),
        ("? [a]\n: 1", "a key must be a text or a number"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a:\n\t- b", "cannot start any token"),
        ("!!python/object/apply:os.system [ls]", "python/object/apply:os.system"),
        ("a: !!python/name:os.system", "python/name"),
        ("!!set {a}", "set"),
        ("a: !!int x", "invalid literal"),
        ("9" * 5000, "4300 digits"),
        ("a: \0", "special characters"),
        ("a: [", "line 1, column 5"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(text, message):
    start = time.process_time()
    with pytest.raises(ValueError, match=message) as error:
        parse_yaml(text)
    assert "\n" not in str(error.value) and time.process_time() - start < 2


def test_aliases_and_merges_that_are_no_trick():
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a\nd: {<<: [*a, {z: 4}]}"
    assert parse_yaml(text) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}} | {
        "d": {"x": 1, "y": 2, "z": 4}
    }


def test_mappings_that_stand_twice_count_as_one_where_it_is_asked_for():
    doubled: list[str] = []
    text = "a: {x: 1, y: 2}\nb: 3\na: {y: 2, z: 4}"
    assert parse_yaml(text, doubled) == {"a": {"x": 1, "y": 2, "z": 4}, "b": 3}
    assert doubled == ["line 3: the key 'a' stands twice, first in line 1"]
    for text in (
        "a: {x: 1}\na: {x: 2}",
        "a: {x: 1}\na: 3",
        "b: {a: {x: 1}, a: {y: 2}}",
        "a: {x: {y: 1}}\na: {x: {y: 2}}",
    ):
        with pytest.raises(ValueError, match="stands twice"):
            parse_yaml(text, [])


@pytest.mark.parametrize(
    "value",
    ["1e3", "010", "1:30", "2024-01-01", "5", ".5", "no", "~", "<<", 1e-5, 20.0, 1e22, 7, True, None, [1, {"a": 2}]],
)  # fmt: skip
def test_values_are_read_as_they_were_written(value):
    shared = [value]
    assert parse_yaml(dump_yaml({"a": shared, "b": shared})) == {"a": shared, "b": shared}
    assert "&" not in dump_yaml({"a": shared, "b": shared})


def test_files(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\n")
    assert read_yaml(path) == {"a": 1}
    path.write_bytes(b"")
    assert read_yaml(path) is None
    path.write_bytes(b"\xff\xfea: 1")
    with pytest.raises(ValueError, match="file.yaml is not valid YAML: 'utf-8' codec"):
        read_yaml(path)
