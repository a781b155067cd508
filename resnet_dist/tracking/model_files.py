"""The files of a logged model: loaded and served by plain mlflow, without our code.

It has two flavours: `mlflow.pytorch.load_model` gives the net (uint8 images -> logits), `mlflow.pyfunc.load_model` and
`mlflow models serve` take pictures as they come and answer with class names (`served_classifier.py`, copied into it
with `data_prep/pixels.py`).
"""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import warnings
from importlib.metadata import version
from inspect import getfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    from resnet_dist.tracking.served_classifier import Protocol

_CODE = "code"
_SERVING_PACKAGES = ("mlflow", "torch", "numpy", "pandas", "pillow")


def write_model(module: torch.nn.Module, folder: Path, input_example: NDArray[np.uint8], facts: dict[str, Any]) -> None:
    """The net alone, exported (`pt2`): what `mlflow.pytorch.load_model` reads. Arguments: `models.log_classifier`."""
    import mlflow.pytorch
    import torch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    module = copy.deepcopy(module).cpu().eval()
    with torch.no_grad():
        logits = module(torch.from_numpy(input_example)).numpy()
    signature = ModelSignature(
        # Unnamed: with a name, pyfunc wraps an array into a dict, which mlflow's PyTorch flavour then refuses.
        inputs=Schema([TensorSpec(input_example.dtype, (-1, *input_example.shape[1:]))]),
        outputs=Schema([TensorSpec(logits.dtype, (-1, *logits.shape[1:]))]),
    )
    # Stated, because mlflow would find them out by loading the model in another process (8 s).
    requirements = [f"{package}=={version(package).partition('+')[0]}" for package in _SERVING_PACKAGES]
    with warnings.catch_warnings():
        # torch says so of every weight in NHWC layout; the values come back whole all the same.
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")
        mlflow.pytorch.save_model(
            module,
            str(folder),
            signature=signature,
            input_example=input_example,
            metadata=facts,
            serialization_format="pt2",
            pip_requirements=requirements,
        )


def make_servable(folder: Path, example: NDArray[np.uint8], protocol: Protocol) -> None:
    """Puts `served_classifier.py` into the exported model, as what its pyfunc flavour loads. `example`: one image."""
    from mlflow.models import Model, ModelSignature
    from mlflow.models.utils import _save_example  # mlflow has no public way to give a saved model another example
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import AnyType, Map
    from PIL import Image

    from resnet_dist.tracking import served_classifier

    loader = copy_code(folder / _CODE)
    (folder / served_classifier.PROTOCOL).write_text(protocol.to_json(), encoding="utf-8")
    model = Model.load(str(folder))
    pyfunc = model.flavors["python_function"]
    del pyfunc["data"], pyfunc["pickle_module_name"], pyfunc["config"]  # the pytorch flavour's; ours: the whole folder
    pyfunc |= {"loader_module": loader, "code": _CODE}
    model.signature = ModelSignature(
        # Any: bytes, base64 or an array; mlflow has no type that is one of these.
        inputs=Schema([ColSpec(AnyType(), served_classifier.COLUMN, required=False)]),
        outputs=Schema(
            [
                ColSpec(DataType.string, "class"),
                ColSpec(DataType.double, "probability"),
                ColSpec(Map(DataType.double), "probabilities"),
            ]
        ),
    )
    png = io.BytesIO()
    Image.fromarray(example).save(png, format="PNG")
    for old in folder.glob("*input_example.json"):
        old.unlink()
    _save_example(model, {served_classifier.COLUMN: [base64.b64encode(png.getvalue()).decode()]}, str(folder))
    model.save(str(folder / "MLmodel"))


def copy_code(folder: Path) -> str:
    """Copies what a served model runs to `folder`, and returns the name of the module to load.

    The package is named by its content: Python keeps modules by their names, and a process may hold models of several
    versions.
    """
    from data_prep.pixels import PictureSettings
    from resnet_dist.tracking.served_classifier import ServedClassifier

    texts = {
        name: Path(getfile(part)).read_text(encoding="utf-8")
        for name, part in (("pixels", PictureSettings), ("served_classifier", ServedClassifier))
    }
    package = f"served_{hashlib.sha256(''.join(texts.values()).encode()).hexdigest()[:16]}"
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").touch()
    for name, text in texts.items():
        ours = text.replace("from data_prep.pixels import", f"from {package}.pixels import")
        (folder / package / f"{name}.py").write_text(ours, encoding="utf-8")
    return f"{package}.served_classifier"
