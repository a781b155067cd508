"""Untrusted names are shown in terminals and tables as plain characters."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.shown import MAX_CHARACTERS, shown


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cat/img 1.jpg", "cat/img 1.jpg"),
        ("a\tb\nc\rd", r"a\tb\nc\rd"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("caf\udce9", r"caf\udce9"),
        ("x\u202egpj.exe\u2028\x9b", r"x\u202egpj.exe\u2028\x9b"),
        ("größe 猫 ёж", "größe 猫 ёж"),
        (None, "None"),
    ],
)
def test_names(name: object, expected: str) -> None:
    assert shown(name) == expected


@given(st.text(max_size=400))
@settings(max_examples=60)
def test_any_name_becomes_one_short_printable_line(name: str) -> None:
    text = shown(name)
    assert text.isprintable()
    text.encode("utf-8")
    assert len(text) <= 10 * MAX_CHARACTERS
    assert shown(text, None) == text
    assert shown(name, None).count("...") >= name.count("...")
