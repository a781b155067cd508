"""`Section`, the strict base of everything that is configured, and what is left out of its hash."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """Frozen; rejects unknown keys; takes `"1e-3"` for a float (PyYAML reads it as a string)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, values: Any) -> Any:
        """Python's True is 1: `total_epochs: yes` would train one epoch."""
        for key, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(key) if isinstance(value, bool) else None
            allowed = set(_plain_types(field.annotation)) if field is not None else {Any}
            if {int, float} & allowed and not {bool, Any} & allowed:
                raise ValueError(f"{key} is a number, got {str(value).lower()}")
        return values


def _plain_types(annotation: Any) -> Iterator[Any]:
    """The types that `annotation` allows, unions and Annotated taken apart."""
    inner = get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        for part in inner if get_origin(annotation) is not Annotated else inner[:1]:
            yield from _plain_types(part)
    elif get_origin(annotation) is Literal:
        yield from map(type, inner)
    else:
        yield annotation


def without_recorded_defaults(tree: Any, recorded: Mapping[str, Any], path: str = "") -> Any:
    """A dumped model without the keys that are at their recorded default: what is hashed.

    `recorded`: keys that were added to a schema after its models were first hashed, as dotted paths (elements of a list
    are `[]`), each with the value at which a model means what it meant before the key existed. So a new version resumes
    the runs of an older one. A recorded value never changes, even if the schema's default does.

    >>> without_recorded_defaults({"data": {"new": False, "old": 1}}, {"data.new": False})
    {'data': {'old': 1}}
    """
    if isinstance(tree, Mapping):
        paths = {key: f"{path}.{key}".removeprefix(".") for key in tree}
        return {
            key: without_recorded_defaults(value, recorded, paths[key])
            for key, value in tree.items()
            if paths[key] not in recorded or value != recorded[paths[key]]
        }
    if isinstance(tree, list | tuple):
        return [without_recorded_defaults(value, recorded, f"{path}[]") for value in tree]
    return tree
