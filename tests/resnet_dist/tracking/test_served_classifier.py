"""Pictures in, class names and probabilities out: in this process, and over HTTP from `mlflow models serve`."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from PIL import Image
from sklearn.datasets import load_digits

from resnet_dist.config.recipe_data import CenterCrop
from resnet_dist.data.crops import crop
from resnet_dist.tracking.mlflow_run import open_run
from resnet_dist.tracking.models import log_classifier
from resnet_dist.tracking.served_classifier import center_crop

SIZE, RESIZE = 8, 10
CLASSES = ("dark", "bright", "loud")


class GreyLevels(torch.nn.Module):
    """Logits known by heart: of the image's mean grey level, and of its brightest one."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean = images.float().mean((1, 2, 3)) / 64.0
        return torch.stack([2.0 - mean, mean - 2.0, images.float().amax((1, 2, 3)) / 256.0], dim=1)


@pytest.fixture
def logged(sqlite_uri: str, tmp_path: Path) -> Path:
    handle = open_run(sqlite_uri, "exp", "r", tmp_path / "run", {}, {})
    log_classifier(
        handle,
        GreyLevels(),
        name="model",
        input_example=np.zeros((2, SIZE, SIZE, 3), dtype=np.uint8),
        resize=RESIZE,
        class_names=CLASSES,
        pictures={},
        metadata={},
        step=1,
    )
    (folder,) = (path.parent for path in tmp_path.rglob("MLmodel"))
    return folder


def digit(number: int) -> np.ndarray:
    """A real handwritten digit, 24 x 40 px, so that something has to be cropped and resized."""
    grey = (load_digits().images[number] * 15.9).astype(np.uint8)
    return np.array(Image.fromarray(grey).convert("RGB").resize((40, 24)))


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return file.getvalue()


def expected(picture: np.ndarray) -> np.ndarray:
    cropped = center_crop(Image.fromarray(picture), SIZE, RESIZE)
    with torch.no_grad():
        return GreyLevels()(torch.from_numpy(cropped[None])).double().softmax(1)[0].numpy()


def test_every_way_to_give_pictures_gives_the_same_answer(logged: Path) -> None:
    served = mlflow.pyfunc.load_model(str(logged))
    pictures = [digit(0), digit(7)]
    files = [png(picture) for picture in pictures]
    texts = [base64.b64encode(file).decode() for file in files]
    given_as = {
        "bytes": {"image": files},
        "frame of bytes": pd.DataFrame({"image": files}),
        "base64": {"image": texts},
        "frame of base64": pd.DataFrame({"image": texts}),
        "data URL": {"image": [f"data:image/png;base64,{text}" for text in texts]},
        "arrays": {"image": pictures},
        "one array": {"image": np.stack(pictures)},
        "mixed": pd.DataFrame({"image": [files[0], pictures[1]]}),
    }
    for name, value in given_as.items():
        answers = served.predict(value)
        assert list(answers.columns) == ["class", "probability", "probabilities"], name
        for answer, picture in zip(answers.to_dict("records"), pictures, strict=True):
            wanted = expected(picture)
            assert list(answer["probabilities"]) == list(CLASSES)
            np.testing.assert_allclose(list(answer["probabilities"].values()), wanted, atol=1e-6, err_msg=name)
            assert answer["class"] == CLASSES[int(wanted.argmax())]
            assert answer["probability"] == max(answer["probabilities"].values())
    assert len(served.predict({"image": [files[0]] * 130})) == 130  # more than one forward pass
    assert [c["name"] for c in served.metadata.get_input_schema().to_dict()] == ["image"]
    assert [c["name"] for c in served.metadata.get_output_schema().to_dict()] == list(answers.columns)


@pytest.mark.parametrize(
    "value", [b"no picture", "%%%", np.zeros((4, 4), np.uint8), np.full((4, 4, 3), 300), np.zeros((4, 4, 3))]
)
def test_what_is_no_picture_is_named(logged: Path, value: object) -> None:
    served = mlflow.pyfunc.load_model(str(logged))
    with pytest.raises(MlflowException, match="row 1: not a picture"):
        served.predict(pd.DataFrame({"image": [png(digit(0)), value]}))


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 16), st.integers(0, 8))
def test_the_crop_is_that_of_the_evaluation(height: int, width: int, size: int, more: int) -> None:
    """Cut out, resized and shown as the loader's geometry says, with Pillow's pixels, which are the loader's."""
    rows, columns = np.mgrid[:height, :width]
    picture = Image.fromarray(np.stack([rows * 3, columns * 3, rows * columns % 256], axis=2).astype(np.uint8))
    transform = CenterCrop(kind="center_crop", size=size, resize=size + more)
    views, flips = crop(transform, np.array([height]), np.array([width]), np.zeros((1, 0)))
    box_top, box_left, box_height, box_width, resized_height, resized_width, top, left = (int(n) for n in views[0])
    box = picture.crop((box_left, box_top, box_left + box_width, box_top + box_height))
    resized = box.resize((resized_width, resized_height), Image.Resampling.BILINEAR)
    wanted = np.asarray(resized)[top : top + size, left : left + size]
    assert not flips.any()
    np.testing.assert_array_equal(center_crop(picture, size, size + more), wanted)


def test_real_pictures_over_http(logged: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", str(logged), "--env-manager", "local"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # mlflow starts uvicorn by its name
    log = logged.parent / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
            cwd=logged.parent,  # not the checkout: the model must not find this project's code
            env={**environment, "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline_s = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=2)
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline_s, log.read_text()
                time.sleep(0.2)
        pictures = [digit(number) for number in (0, 1, 8)]
        texts = [base64.b64encode(png(picture)).decode() for picture in pictures]
        bodies = [
            {"inputs": {"image": texts}},
            {"dataframe_split": {"columns": ["image"], "data": [[text] for text in texts]}},
            {"dataframe_records": [{"image": picture.tolist()} for picture in pictures]},
        ]
        for body in bodies:
            answers = post(port, body)["predictions"]
            for answer, picture in zip(answers, pictures, strict=True):
                wanted = expected(picture)
                np.testing.assert_allclose([answer["probabilities"][name] for name in CLASSES], wanted, atol=1e-6)
                assert answer["class"] == CLASSES[int(wanted.argmax())]
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(port, {"inputs": {"image": ["bm8gcGljdHVyZQ=="]}})
        assert refused.value.code == 400
        assert "row 0: not a picture" in refused.value.read().decode()
        example = json.loads((logged / "serving_input_example.json").read_text())
        assert len(post(port, example)["predictions"]) == 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def post(port: int, body: object) -> dict:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
