"""The strictness that every section of a recipe or profile shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen; rejects unknown keys; takes `"1e-3"` for a float (PyYAML reads it as a string)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def without_recorded_defaults(tree: Any, recorded: Mapping[str, Any], path: str = "") -> Any:
    """A dumped model without the keys that are at their recorded default: what is hashed.

    `recorded`: keys that were added to a schema after its models were first hashed, under dotted paths (elements of a
    list are `[]`), each with the value at which a model means what it meant before the key existed. So a new version
    resumes the runs of an older one. A recorded value never changes, even if the schema's default does.

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
