"""Environment variables in a profile: plain settings only, neither secrets nor arithmetic."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

_CHANGES_RESULTS = {"NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG"}


_SECRET = re.compile(r"SECRET|PASSW|TOKEN|CREDENTIAL|(^|_)(API_?)?KEY(_|$)", re.IGNORECASE)


def _numbers_as_text(value: Any) -> Any:
    """YAML reads `OMP_NUM_THREADS: 1` as a number; a bool (`yes`, `on`) stays one, and is refused."""
    if not isinstance(value, dict):
        return value
    return {k: str(v) if isinstance(v, int | float) and not isinstance(v, bool) else v for k, v in value.items()}


def _plain_settings(env: dict[str, str]) -> dict[str, str]:
    for key in env:
        if _SECRET.search(key):
            raise ValueError(f"{key} is a secret; give it to the nodes' own environment, not to a file that is logged")
        if key in _CHANGES_RESULTS:
            raise ValueError(f"{key} changes the arithmetic; precision is the recipe's: train.precision")
    return env


Environment = Annotated[dict[str, str], BeforeValidator(_numbers_as_text), AfterValidator(_plain_settings)]
