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
from mlflow.models import Model
from mlflow.pyfunc import PyFuncModel
from PIL import Image
from sklearn.datasets import load_digits

from data_prep.pixels import PictureSettings
from resnet_dist.config.recipe import CenterCrop
from resnet_dist.data.crops import crop
from resnet_dist.tracking import served_classifier
from resnet_dist.tracking.mlflow_run import open_run
from resnet_dist.tracking.models import log_classifier, make_servable, write_model
from resnet_dist.tracking.served_classifier import RequestLimits, ServedClassifier, ServingProtocol, center_crop

pytestmark = pytest.mark.system

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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a logged model, without a server to log to."""
    return saved(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def served(model: Path) -> PyFuncModel:
    return mlflow.pyfunc.load_model(str(model))


def saved(folder: Path) -> Path:
    example = np.zeros((2, SIZE, SIZE, 3), dtype=np.uint8)
    write_model(GreyLevels(), folder, example, {})
    make_servable(folder, example[0], ServingProtocol(CLASSES, SIZE, RESIZE))
    return folder


def digit(number: int) -> np.ndarray:
    """A real handwritten digit, 24 x 40 px, so that something has to be cropped and resized."""
    grey = (load_digits().images[number] * 15.9).astype(np.uint8)
    return np.array(Image.fromarray(grey).convert("RGB").resize((40, 24)))


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return file.getvalue()


def bomb() -> bytes:
    """A file of 50 KB that would be decoded to 1.2 GB."""
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    return file.getvalue()


PNG = png(digit(0))


def expected(picture: np.ndarray) -> np.ndarray:
    cropped = center_crop(Image.fromarray(picture), SIZE, RESIZE)
    with torch.no_grad():
        return GreyLevels()(torch.from_numpy(cropped[None])).double().softmax(1)[0].numpy()


def test_every_way_to_give_pictures_gives_the_same_predictions(logged: Path) -> None:
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
    ("value", "why"),
    [
        (b"no picture", "no picture of a format that is read"),
        (b"", "is empty"),
        ("", "is empty"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (png(digit(0))[:100], "damaged"),
        (png(np.zeros((1, 66_000, 3), np.uint8)), "is 66000 x 1 px"),
        (bomb(), "is 20000 x 20000 px, more than 36,000,000"),
        (png(np.zeros((2, 3_000, 3), np.uint8)), "more than 1,000 times the other"),
        ("%%%", "not base64"),
        ("a picture!", "not base64"),
        ("iVBORw0KGgo", "not base64"),  # its padding is missing
        ("data:image/png,iVBORw0KGgo=", "a data URL without base64"),
        (None, "NoneType"),
        (7, "int"),
        (float("nan"), "float"),
        ({"b64": "aGk="}, "dict"),
        ([], r"shape \[0\]"),
        (np.zeros((4, 4), np.uint8), r"shape \[4, 4\]"),
        (np.zeros((4, 4, 4), np.uint8), r"shape \[4, 4, 4\]"),
        (np.zeros((0, 0, 3), np.uint8), "0 x 0 px"),
        (np.zeros((1, 70_000, 3), np.uint8), "70000 x 1 px"),
        (np.full((4, 4, 3), 300), "levels from 300 to 300"),
        (np.full((4, 4, 3), -1), "levels from -1 to -1"),
        (np.zeros((4, 4, 3)), "levels of type float64"),
        (np.full((4, 4, 3), np.nan), "levels of type float64"),
        (np.zeros((4, 4, 3), bool), "levels of type bool"),
        ([[[1, 2, 3], [1, 2]]], "lists of unequal lengths"),
        ([[["1", "2", "3"]]], "levels of type"),
        ([[[10**30, 2, 3]]], "levels of type object"),
    ],
)
def test_what_is_not_a_picture_is_named_in_one_line(served: PyFuncModel, value: object, why: str) -> None:
    with pytest.raises(MlflowException, match=f"row 1 .*{why}") as refused:
        served.predict(pd.DataFrame({"image": [png(digit(0)), value]}))
    answer = json.loads(refused.value.serialize_as_json())
    assert refused.value.get_http_status_code() == 400
    assert "stack_trace" not in answer
    assert "\n" not in answer["message"]
    assert "/" not in answer["message"].replace("https://", "")
    assert len(answer["message"]) < 300


def nested(depth: int) -> list:
    value: list = [1]
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        ({"image": []}, "there is no picture"),
        ({"img": ["aGk="]}, "there is no column 'image'"),
        ({}, "there is no column 'image'"),
        ([], "there is no column 'image'"),
        ("aGk=", "there is no column 'image'"),
        ({"image": [PNG] * 257}, "257 pictures in one request, more than 256"),
        ({"image": [PNG] * 10_000}, "10,000 pictures in one request"),
        ({"image": [nested(900)]}, "not a picture|nested too deeply"),
    ],
)
def test_a_request_that_asks_too_much_or_nothing_is_refused(served: PyFuncModel, request_: object, why: str) -> None:
    with pytest.raises(MlflowException, match=why) as refused:
        served.predict(request_)
    assert refused.value.get_http_status_code() == 400
    assert "\n" not in refused.value.message


@pytest.mark.parametrize(
    ("pictures", "why"),
    [
        ([PNG, PNG + bytes(1 << 20)], "more than 1 MiB in all"),
        ([PNG, "A" * (2 << 20)], "more than 1 MiB in all"),
        ([png(np.zeros((100, 100, 3), np.uint8))] * 3, "more than 20,000 px in all"),
        ([np.zeros((100, 201, 3), np.uint8)], "more than 20,000 px in all"),
    ],
)
def test_bytes_and_pixels_of_a_request_are_counted_before_any_is_decoded(pictures: list[object], why: str) -> None:
    limits = RequestLimits(pictures=9, bytes=1 << 20, pixels=20_000)
    served = ServedClassifier(GreyLevels(), ServingProtocol(CLASSES, SIZE, RESIZE, limits=limits))
    with pytest.raises(MlflowException, match=why):
        served.predict({"image": pictures})
    assert len(served.predict({"image": [PNG]})) == 1


class Breaks(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((1, 2))[:, :2] / (images.float().mean() - 255.0)  # NaN for white


@pytest.mark.parametrize("error", [MemoryError("bad_alloc"), RecursionError("deep"), RuntimeError("/srv/x.py: no")])
def test_an_error_inside_is_a_line_without_paths(error: Exception) -> None:
    class Raises(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise error

    with pytest.raises(MlflowException) as refused:
        ServedClassifier(Raises(), ServingProtocol(CLASSES, SIZE, RESIZE)).predict({"image": [png(digit(0))]})
    assert refused.value.get_http_status_code() == 400
    assert "/srv" not in refused.value.serialize_as_json()
    assert "stack_trace" not in refused.value.serialize_as_json()


def test_a_prediction_that_is_nan_is_refused() -> None:
    served = ServedClassifier(Breaks(), ServingProtocol(("a", "b"), SIZE, RESIZE))
    white = np.full((9, 9, 3), 255, np.uint8)
    with pytest.raises(MlflowException, match="row 0: the net gives NaN or infinity"):
        served.predict({"image": [white]})


def test_classes_of_the_same_name_are_distinguished() -> None:
    served = ServedClassifier(GreyLevels(), ServingProtocol(("crane", "dog", "crane"), SIZE, RESIZE))
    (probabilities,) = served.predict({"image": [digit(0)]})["probabilities"]
    assert list(probabilities) == ["crane (class 0)", "dog", "crane (class 2)"]


def test_base64_may_have_newlines_and_nested_lists_be_one_row(served: PyFuncModel) -> None:
    picture = digit(3)
    text = base64.encodebytes(png(picture)).decode()
    assert "\n" in text.strip()
    for one in (text, f"data:image/png;base64,{text}", picture.tolist()):
        for request_ in ({"image": [one]}, pd.DataFrame({"image": [[one]]}), pd.DataFrame({"image": [one]})):
            (answer,) = served.predict(request_).to_dict("records")
            np.testing.assert_allclose(list(answer["probabilities"].values()), expected(picture), atol=1e-6)


def test_models_of_several_versions_live_in_one_process(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that was logged when its module had the same name in all models."""
    monkeypatch.delitem(sys.modules, "served_classifier", raising=False)  # another test may have loaded such a model
    other = tmp_path / "other.py"
    source = Path(str(served_classifier.__file__)).read_text()
    other.write_text(source.replace('"class": [self._names[k]', '"class": ["v2 " + self._names[k]'))
    monkeypatch.setattr(served_classifier, "__file__", str(other))
    newer, older = saved(tmp_path / "newer"), saved(tmp_path / "older")
    (older / "code" / "served_classifier.py").write_text(
        "class Served:\n"
        "    def predict(self, model_input, params=None):\n        return ['old'] * len(model_input)\n\n\n"
        "def _load_pyfunc(path, model_config=None):\n    return Served()\n"
    )
    description = Model.load(str(older))
    description.flavors["python_function"]["loader_module"] = "served_classifier"
    description.save(str(older / "MLmodel"))
    models = [mlflow.pyfunc.load_model(str(folder)) for folder in (model, newer, older, model)]
    one = {"image": [png(digit(0))]}
    name = CLASSES[int(expected(digit(0)).argmax())]
    assert [list(models[k].predict(one)["class"]) for k in (0, 1, 3)] == [
        [name],
        [f"v2 {name}"],
        [name],
    ]
    assert models[2].predict(one) == ["old"]


def test_the_protocol_survives_its_file() -> None:
    protocol = ServingProtocol(
        ("é", "b"), 224, 256, PictureSettings("apply", (1, 2, 3)), max_side=500, limits=RequestLimits(1, 2, 3)
    )
    assert ServingProtocol.from_json(protocol.to_json()) == protocol
    assert json.loads(protocol.to_json())["pictures"] == {"exif": "apply", "background": [1, 2, 3], "max_side": 500}


def test_a_strip_is_cropped_before_it_is_resized() -> None:
    """All of it would take 268 gigapixels."""
    picture = Image.fromarray(np.arange(3_000, dtype=np.uint32).astype(np.uint8).reshape(1_000, 1, 3))
    shown = center_crop(picture, 64, 16_384)
    assert shown.shape == (64, 64, 3)
    assert shown.std() > 0.5


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 16), st.integers(0, 8))
def test_the_crop_is_that_of_the_evaluation(height: int, width: int, size: int, more: int) -> None:
    """Cut out, resized and shown as the loader's geometry says, with Pillow's pixels, which are the loader's."""
    rows, columns = np.mgrid[:height, :width]
    picture = Image.fromarray(np.stack([rows * 3, columns * 3, rows * columns % 256], axis=2).astype(np.uint8))
    transform = CenterCrop(kind="center_crop", size=size, resize=size + more)
    (view,) = crop(transform, np.array([height]), np.array([width]), np.zeros((1, 0))).tolist()
    box_top, box_left, box_height, box_width, resized_height, resized_width, top, left, mirrored = view
    box = picture.crop((box_left, box_top, box_left + box_width, box_top + box_height))
    resized = box.resize((resized_width, resized_height), Image.Resampling.BILINEAR)
    wanted = np.asarray(resized)[top : top + size, left : left + size]
    assert not mirrored
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
        noise = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (500, 600, 3), dtype=np.uint8)).save(noise, "JPEG")
        assert len(noise.getvalue()) > 96 << 10
        assert len(post(port, {"inputs": {"image": [base64.b64encode(noise.getvalue()).decode()]}})["predictions"]) == 1
        for inputs, why in (
            ({"image": ["bm8gcGljdHVyZQ=="]}, "row 0 is no picture of a format that is read: JPEG, PNG"),
            ({"image": texts[:1] * 10_000}, "10,000 pictures in one request, more than 256"),
            ({"picture": texts}, "there is no column 'image'"),
        ):
            with pytest.raises(urllib.error.HTTPError) as refused:
                post(port, {"inputs": inputs})
            answer = json.loads(refused.value.read())
            assert refused.value.code == 400
            assert answer["message"].startswith(why)
            assert "\n" not in answer["message"]
            assert "stack_trace" not in answer
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
