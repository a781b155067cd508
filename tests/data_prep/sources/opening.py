"""Shorthands of the tests of sources: open one, read all of it, expect that it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.sources import SourceOptions, open_source
from data_prep.sources.base import Source
from data_prep.sources.splits import ANY_SPLIT, SplitRequest

TarOf = Callable[[dict[str, bytes]], bytes]
OpenAllWithin = Callable[[int, list[tuple[str, str, dict[str, str]]]], list[str]]


def named(split: str) -> SplitRequest:
    """`--split`; a plain `SplitRequest(split)` is what the name of an output asks for."""
    return SplitRequest(split, explicit=True)


def opened(
    source: str, location: str | Path | None = None, split: SplitRequest = ANY_SPLIT, **options: object
) -> Source:
    texts = {name: str(value) for name, value in options.items()}
    return open_source(source, None if location is None else str(location), split, SourceOptions(**texts))


def refuses(message: str, call: Callable[..., object], *arguments: object, **options: object) -> None:
    """Expects a `UserError` of one printable line that `message` matches."""
    with pytest.raises(UserError, match=message) as refusal:
        call(*arguments, **options)
    assert str(refusal.value).isprintable()


def refused(
    message: str, source: str, location: str | Path | None = None, split: SplitRequest = ANY_SPLIT, **options: object
) -> None:
    refuses(message, opened, source, location, split, **options)


def data_of(source: Source) -> list[bytes]:
    return [source[index].data for index in range(len(source))]


def keys_of(source: Source) -> list[str]:
    return [source.key(index) for index in range(len(source))]
