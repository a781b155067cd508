"""What a model has on it: its step as a tag, and what its pages say, in Markdown. Pure."""

from __future__ import annotations

STEP_TAG = "resnet_dist.step"
"""Of a logged model: the step whose weights it has."""


def model_note(model_uri: str, run_name: str, step: int) -> str:
    """Description of a logged model (`models:/m-...`)."""
    return (
        f"The weights of the run *{run_name}* after step {step}, with the preparation of pictures and the names of the "
        "classes. It takes pictures as they come, and needs nothing of the project that trained it:\n\n"
        f"    mlflow models serve --model-uri {model_uri} --env-manager local --port 5001\n"
        """    printf '{"inputs": {"image": ["%s"]}}' "$(base64 < PICTURE)" \\\n"""
        "      | curl -H 'Content-Type: application/json' localhost:5001/invocations -d @-\n"
    )


def version_note(top1: float, data_digest: str, run_name: str) -> str:
    """Description of a version of a registered model. `top1`: percent."""
    return f"{top1:.2f} % top-1 on the validation data {data_digest}; from the run {run_name}."


def registered_note(name: str, candidate: str, champion: str) -> str:
    """Description of a registered model; the last two are aliases."""
    return (
        f"Each version comes from one finished run. `{candidate}` is the newest one, `{champion}` the best on its "
        "validation data:\n\n"
        f"    mlflow models serve --model-uri models:/{name}@{champion} --env-manager local --port 5001\n"
    )
