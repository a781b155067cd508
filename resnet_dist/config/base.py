"""The strictness that every section of a recipe or profile shares."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen; rejects unknown keys; takes `"1e-3"` for a float (PyYAML reads it as a string)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
