"""Environment variables in a profile: plain settings only, neither secrets nor arithmetic."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from data_prep.redaction import holds_secret, is_secret_name

_CHANGES_RESULTS = {"NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG"}


def _numbers_as_text(value: Any) -> Any:
    """YAML reads `OMP_NUM_THREADS: 1` as a number; a bool (`yes`, `on`) stays one, and is refused."""
    if not isinstance(value, dict):
        return value
    for key, given in value.items():  # first of all: what is wrong with a value is told with the value
        if is_secret_name(str(key)) or holds_secret(str(given)):
            raise ValueError(f"{key} is a secret; give it to the nodes' own environment, not to a file that is logged")
    return {k: str(v) if isinstance(v, int | float) and not isinstance(v, bool) else v for k, v in value.items()}


def _plain_settings(env: dict[str, str]) -> dict[str, str]:
    for key in env:
        if key in _CHANGES_RESULTS:
            raise ValueError(f"{key} changes the arithmetic; precision is the recipe's: train.precision")
    return env


Environment = Annotated[dict[str, str], BeforeValidator(_numbers_as_text), AfterValidator(_plain_settings)]
