"""The strict YAML reader: scalars of the core schema of YAML 1.2, errors with their lines, and no other exceptions."""

from __future__ import annotations

import json
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cnvzoo.strict_yaml import StrictYamlError, place_of, read_yaml


def write(folder: Path, text: str) -> Path:
    path = folder / "file.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


def value_of(folder: Path, written: str) -> Any:
    return read_yaml(write(folder, f"key: {written}\n")).values["key"]


def refusal(folder: Path, text: str) -> str:
    """The error message for a file with content `text`, without the file's path."""
    path = write(folder, text)
    with pytest.raises(StrictYamlError) as caught:
        read_yaml(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}:")
    return message.removeprefix(f"{path}:").strip()


# --- valid files: expected values are those of YAML 1.2.2, sections 10.2 and 10.3


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("", None), ("~", None), ("null", None), ("Null", None), ("NULL", None),
        ("true", True), ("True", True), ("TRUE", True), ("false", False), ("False", False), ("FALSE", False),
        ("0", 0), ("-0", 0), ("12", 12), ("+12", 12), ("-12", -12), ("0o17", 15), ("0x1F", 31),
        ("9" * 40, int("9" * 40)),
        ("5e-4", 0.0005), ("5E-4", 0.0005), ("+1e3", 1000.0), ("1.", 1.0), (".5", 0.5), ("-0.5", -0.5), ("01.5", 1.5),
        ("12e03", 12000.0), ("-2E+05", -200000.0), (".inf", math.inf), ("-.Inf", -math.inf), ("+.INF", math.inf),
    ],
)  # fmt: skip
def test_scalars_of_the_core_schema(tmp_path: Path, written: str, value: Any) -> None:
    found = value_of(tmp_path, written)
    assert type(found) is type(value)
    assert found == value


def test_not_a_number(tmp_path: Path) -> None:
    assert all(math.isnan(value_of(tmp_path, written)) for written in (".nan", ".NaN", ".NAN"))


@pytest.mark.parametrize(
    "written",
    [
        "1:30", "1:30.5", "yes", "no", "on", "off", "y", "n", "YES", "2026-11-26", "2026-11-26T12:00:00Z", "1_000",
        "0b11", "0o8", "0xG", "+0x1F", "-0o7", "tRUE", "nUll", ".", "+", "-.", "1e", "e5", "1.2.3", ".infinity", "nan",
        "inf", "=", "\u0661\u0662", "\u0661e\u0662", "a b", "a#b",
    ],
)  # fmt: skip
def test_other_scalars_are_text(tmp_path: Path, written: str) -> None:
    assert value_of(tmp_path, written) == written


@pytest.mark.parametrize("written", ["'12'", '"12"', "|\n  12", ">-\n  12"])
def test_a_number_in_quotes_or_a_block_is_text(tmp_path: Path, written: str) -> None:
    assert value_of(tmp_path, written).strip() == "12"


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "\ufeff", "null\n"])
def test_an_empty_file_is_none(tmp_path: Path, text: str) -> None:
    assert read_yaml(write(tmp_path, text)).values is None


def test_every_key_and_item_has_its_line(tmp_path: Path) -> None:
    text = "# a remark\na: 1\nb:\n  c: {d: 2,\n      e: 3}\n  f:\n    - 4\n    - g: 5\n"
    file = read_yaml(path := write(tmp_path, text))
    assert file.values == {"a": 1, "b": {"c": {"d": 2, "e": 3}, "f": [4, {"g": 5}]}}
    lines = {"a": 2, "b": 3, "b.c": 4, "b.c.d": 4, "b.c.e": 5, "b.f": 6, "b.f.0": 7, "b.f.1": 8, "b.f.1.g": 8}
    assert file.where == {tuple(key.split(".")): f"{path}:{line}" for key, line in lines.items()}
    assert place_of(file.where, ("b", "c", "missing"), "elsewhere") == f"{path}:4"
    assert place_of(file.where, ("z",), "elsewhere") == "elsewhere"


# --- invalid files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 010\n", "2: b: 010: a leading zero, octal in YAML 1.1: write 10, or 8 if it is octal"),
        ("a: [1, -007]\n", "1: a.1: -007: a leading zero, octal in YAML 1.1: write -7"),
        ("a: 089\n", "1: a: 089: a leading zero, octal in YAML 1.1: write 89"),
        ("a:\n  b: 1\n  b: 2\n", "3: a.b: repeated key, first at FILE:2: keep one"),
        ("a: {b: 1, b: 1}\n", "1: a.b: repeated key, first at FILE:1: keep one"),
        ("a: 1\n'a': 1\n", "2: a: repeated key, first at FILE:1: keep one"),
        ("a: 1\nb: &x 2\n", "2: b: an anchor (&x): write the value out where it is used"),
        ("a: &x [1]\n", "1: a: an anchor (&x): write the value out where it is used"),
        ("&x a: 1\n", "1: an anchor (&x): write the value out where it is used"),
        ("a: 1\nb: *x\n", "2: b: an alias (*x): write the value out"),
        ("a:\n  <<: {b: 1}\n", "2: a: a merge key (<<): write the keys out"),
        ("a: !!int '5'\n", "1: a: a tag (tag:yaml.org,2002:int): leave it out; the value itself has a type"),
        ("a: ! 5\n", "1: a: a tag (!): leave it out; the value itself has a type"),
        ("a: !mine {}\n", "1: a: a tag (!mine): leave it out; the value itself has a type"),
        ("%YAML 1.1\n---\na: 1\n", "1: a directive (%): remove it; files are read as YAML 1.2"),
        ("%TAG ! !x\n---\na: 1\n", "1: a directive (%): remove it; files are read as YAML 1.2"),
        ("a: 1\n---\nb: 2\n", "2: a second document: put it in another file"),
        ("? [a]\n: 1\n", "1: a list or mapping as a key: keys must be text"),
        ("a:\n  1: b\n", "2: a: '1' as a key: keys must be text on one line"),
        ("true: b\n", "1: 'true' as a key: keys must be text on one line"),
        ("~: b\n", "1: '~' as a key: keys must be text on one line"),
        ('"a\\nb": 1\n', "1: 'a\\nb' as a key: keys must be text on one line"),
        ('a: "\\ud83d"\n', "1: a: half of a surrogate pair: write the character as \\U and 8 digits"),
        (f"a: {'1' * 41}\n", "1: a: a number of 41 characters: write it with at most 40"),
        (f"a: 0x{'1' * 5000}\n", "1: a: a number of 5,002 characters: write it with at most 40"),
        ("a: -1e400\n", "1: a: -1e400: too large for a float: write .inf for infinity"),
        ("a: 1\nb: [1, 2\n", "3: not valid YAML: expected ',' or ']', but got '<stream end>', while parsing a flow "
                             "sequence from line 2 on"),
        ("a: 1\n\tb: 2\n", "2: not valid YAML: found character '\\t' that cannot start any token, while scanning for "
                           "the next token"),
        ("a: 1\nb: c: d\n", "2: not valid YAML: mapping values are not allowed here"),
        ("a: 1\nb: \x07\n", "2: not valid YAML: the character U+0007, which YAML does not allow"),
    ],
)  # fmt: skip
def test_an_error_names_line_key_and_remedy(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, text) == message.replace("FILE", str(tmp_path / "file.yaml"))


def test_an_escape_that_is_not_a_character_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, 'a: "\\UFFFFFFFF"\n').startswith("not valid YAML: ")


def test_bytes_that_are_not_utf_8_are_refused_with_their_line(tmp_path: Path) -> None:
    (path := tmp_path / "file.yaml").write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(StrictYamlError) as caught:
        read_yaml(path)
    assert str(caught.value) == f"{path}:2: not UTF-8 text: save it as UTF-8"


@pytest.mark.parametrize("levels", [15, 16])
def test_16_levels_are_read_and_one_more_is_refused(tmp_path: Path, levels: int) -> None:
    text = f"a: {'[' * levels}{']' * levels}\n"
    if levels == 15:
        read_yaml(write(tmp_path, text))
    else:
        assert refusal(tmp_path, text) == "1: a.0.0.0: nested deeper than 16 levels: make it flat"


def test_aliases_that_would_expand_to_9_to_the_9_values_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    assert refusal(tmp_path, "\n".join(lines)) == "1: a0: an anchor (&a0): write the value out where it is used"


@pytest.mark.parametrize("extra", [0, 1])
def test_64_kib_are_read_and_one_more_byte_is_refused(tmp_path: Path, extra: int) -> None:
    text = f"a: {'x' * (64 * 1024 - 4 + extra)}\n"
    if extra:
        assert refusal(tmp_path, text).startswith("larger than 65,536 bytes")
    else:
        assert len(read_yaml(write(tmp_path, text)).values["a"]) == 64 * 1024 - 4


def test_a_missing_file_raises_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_yaml(tmp_path / "none.yaml")


# --- random files

_quick = settings(
    max_examples=60, deadline=timedelta(seconds=5), suppress_health_check=[HealthCheck.function_scoped_fixture]
)
_characters = st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029\ufeff\ufffe\uffff\x85")
_text = st.text(_characters, max_size=8)
_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text.filter(str.isprintable), inner, max_size=3),
    max_leaves=10,
)


@_quick
@given(value=_json)
def test_json_is_read_as_its_values(tmp_path: Path, value: Any) -> None:
    found = read_yaml(write(tmp_path, json.dumps(value, ensure_ascii=False))).values
    assert found == value
    assert json.dumps(found) == json.dumps(value)  # 1 and 1.0 are equal, and so are 1 and true


@_quick
@given(text=st.text(st.sampled_from("ab01:-?[]{},&*!|>'\"%@#~<.\\Uxe \n\t") | st.characters(), max_size=40))
def test_any_text_is_read_or_refused_with_one_line(tmp_path: Path, text: str) -> None:
    path, message = write(tmp_path, text), ""
    try:
        read_yaml(path)
    except StrictYamlError as error:
        message = str(error)
    assert not message or message.startswith(f"{path}:")
    assert "\n" not in message
