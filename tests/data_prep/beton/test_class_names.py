"""Messages that say where two lists of class names differ."""

from __future__ import annotations

import pytest

from data_prep.beton.class_names import difference


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (("a", "b"), ("a", "b"), None),
        (("cat", "dog"), ("cat", "cow"), "class 1 is 'dog' in A, 'cow' in B"),
        (
            ("cat", "dog"),
            ("dog", "cat"),
            "class 0 is 'cat' in A, 'dog' in B; the names are the same, their order is not",
        ),
        (("0", "1", "2"), ("0", "1"), "class 2 is '2' in A (3 classes), missing in B (2 classes)"),
        (("ant", "bee", "cat"), ("ant", "cat"), "class 1 is 'bee' in A (3 classes), 'cat' in B (2 classes)"),
        ((), ("a",), "class 0 is missing in A (0 classes), 'a' in B (1 classes)"),
        (("café",), ("cafe\u0301",), r"class 0 is 'caf\xe9' in A, 'cafe\u0301' in B"),
        (("dog",), ("dog ",), "class 0 is 'dog' in A, 'dog ' in B"),
        (("x\nwarning: y",), ("z",), r"class 0 is 'x\nwarning: y' in A, 'z' in B"),
        (("a" * 500,), ("b",), f"class 0 is '{'a' * 59}…' in A, 'b' in B"),
        (("n" * 500 + "1",), ("n" * 500 + "2",), f"class 0 is …'{'n' * 30}1' in A, …'{'n' * 30}2' in B"),
    ],
)
def test_the_first_label_that_differs_is_named(first: tuple[str], second: tuple[str], words: str | None) -> None:
    assert difference(first, second, "A", "B") == words
