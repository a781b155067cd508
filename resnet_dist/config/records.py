"""Our own records: a dataclass as JSON, in a file that others may have damaged."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from data_prep.strict_json import parse

T = TypeVar("T")
MAX_RECORD_BYTES = 16 << 20


def read_record(kind: type[T], text: bytes | str) -> T:
    """A `kind` from its JSON. ValueError, with a short reason, if a field is missing or has another type.

    NaN is allowed: a measurement may be NaN. Fields of later versions are ignored.
    """
    parse(text, max_bytes=MAX_RECORD_BYTES, allow_nan=True)  # nesting, too many digits, keys that occur twice
    try:
        record: T = _adapter(kind).validate_json(text, strict=True)  # type: ignore[arg-type]  # classes are hashable
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None
    return record


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
