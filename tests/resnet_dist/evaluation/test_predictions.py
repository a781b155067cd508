"""Tables of predictions agree with the evaluation and the net; the sheet of the worst has the highest losses."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torch import nn

from resnet_dist.config.loading import load_recipe
from resnet_dist.data.decoder import eval_images
from resnet_dist.data.loader import BetonLoader
from resnet_dist.errors import UserError
from resnet_dist.evaluation import evaluate as evaluation
from resnet_dist.evaluation import predictions
from resnet_dist.evaluation.predictions import PredictionFile, PredictionOutputs, part_path, row_type, write_predictions
from resnet_dist.training.model import build_classifier
from resnet_dist.weights.source import TrainedModel

RECIPE = Path(__file__).parents[3] / "resnet_dist" / "recipes" / "digits_resnet20.yaml"
SETS = [
    "model.name=resnet8",
    "model.num_classes=3",
    "eval.batch_size=2",
    "data.eval={kind: center_crop, size: 32, resize: 36}",
]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> TrainedModel:
    recipe = load_recipe(RECIPE, SETS)
    torch.manual_seed(0)
    classifier = build_classifier(recipe).eval()
    for parameter in classifier.net.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    trained = TrainedModel("test", recipe, classifier, None, notes=("test: assumed",))
    monkeypatch.setattr(evaluation, "load_model", lambda *_, **__: trained)
    return trained


@torch.inference_mode()
def logits_of(model: TrainedModel, beton: Path) -> torch.Tensor:
    loader = BetonLoader(beton, eval_images(model.recipe), batch_size=2)
    return torch.cat([model.classifier(batch.images) for batch in loader.epoch(0, np.arange(7))])


@pytest.mark.parametrize("few", [20, 2], ids=["all classes", "the top"])
def test_each_sample_has_its_prediction(
    model: TrainedModel, pictures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    monkeypatch.setattr(predictions, "FEW_CLASSES", few)
    monkeypatch.setattr(predictions, "NUM_TOP", 2)
    table, sheet = tmp_path / "a.parquet", tmp_path / "worst.png"
    found = evaluation.evaluate("test", pictures.beton, outputs=PredictionOutputs(table, worst=sheet))
    assert "test: assumed" in found.warnings
    rows = parquet.read_table(table).to_pylist()
    logits = logits_of(model, pictures.beton)
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    assert [row["index"] for row in rows] == list(range(7))
    assert [row["path"] for row in rows] == [str(path.relative_to(path.parents[1])) for path in pictures.files]
    assert [row["class"] for row in rows] == list("aaabbcc")
    assert [row["loss"] for row in rows] == expected.double().tolist()
    assert [row["prediction"] for row in rows] == logits.argmax(dim=1).tolist()
    assert 100 * np.mean([row["correct"] for row in rows]) == pytest.approx(found.metrics()["val/top1"])
    probabilities = logits.softmax(dim=1)
    if few == 20:
        assert [[row["p_a"], row["p_b"], row["p_c"]] for row in rows] == probabilities.tolist()
    else:
        assert [row["top1_class"] for row in rows] == [row["predicted_class"] for row in rows]
        assert [row["top2_probability"] for row in rows] == probabilities.median(dim=1).values.tolist()
    with Image.open(sheet) as drawn:
        assert drawn.width > 3 * 160


def test_a_csv_has_the_same_and_all_probabilities_on_request(
    model: TrainedModel, pictures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "FEW_CLASSES", 2)
    evaluation.evaluate("test", pictures.beton, outputs=PredictionOutputs(tmp_path / "a.csv", all_probabilities=True))
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    probabilities = logits_of(model, pictures.beton).softmax(dim=1)
    np.testing.assert_array_equal([np.float32(row["p_c"]) for row in rows], probabilities[:, 2].numpy())


def test_the_worst_are_those_of_the_highest_losses(
    model: TrainedModel, pictures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(predictions, "draw_sheet", lambda path, tiles, title: drawn.extend(tiles))
    monkeypatch.setattr(predictions, "NUM_WORST", 3)
    evaluation.evaluate("test", pictures.beton, outputs=PredictionOutputs(worst=tmp_path / "a.png"))
    losses = torch.nn.functional.cross_entropy(
        logits_of(model, pictures.beton), torch.tensor([0, 0, 0, 1, 1, 2, 2]), reduction="none"
    )
    worst = losses.argsort(descending=True)[:3].tolist()
    assert [tile.lines[2][0] for tile in drawn] == [f"sample {k}, loss {losses[k]:.2f}" for k in worst]
    assert [tile.lines[0][0] for tile in drawn] == ["aaabbcc"[k] for k in worst]


def test_a_sample_that_is_not_finite_has_no_prediction(tmp_path: Path) -> None:
    row = row_type(3, keeps_all=True)
    with (tmp_path / "a").open("wb") as file:
        PredictionFile(file, row)(torch.tensor([[0.0, torch.nan, 1.0], [0.0, 2.0, 1.0]]), torch.tensor([2, 1]))
    broken, good = np.fromfile(tmp_path / "a", row)
    assert np.isnan(broken["loss"])
    assert np.isnan(broken["probabilities"]).all()
    assert broken["top"].tolist() == [-1, -1, -1]
    assert good["top"].tolist() == [1, 2, 0]


def test_the_table_does_not_depend_on_who_evaluated_which_samples(
    pictures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "_ROWS", 2)
    rows = np.zeros(7, row_type(3, keeps_all=True))
    rows["loss"] = np.arange(7)
    images = eval_images(load_recipe(RECIPE, SETS))
    written = []
    for shares in ([7], [3, 4], [2, 2, 3, 0]):
        ends = np.cumsum(shares)
        for rank, part in enumerate(np.split(rows, ends[:-1])):
            part_path(tmp_path, rank).write_bytes(part.tobytes())
        outputs = PredictionOutputs(tmp_path / "a.parquet")
        assert write_predictions(outputs, tmp_path, len(shares), pictures.beton, 3, images, num_threads=1) is None
        written.append((tmp_path / "a.parquet").read_bytes())
    assert written[0] == written[1] == written[2]
    assert parquet.read_table(tmp_path / "a.parquet")["loss"].to_pylist() == rows["loss"].tolist()


def test_wrong_names_and_options_are_refused_before_anything_is_evaluated() -> None:
    with pytest.raises(UserError, match=r"--predictions a.txt: expected a name that ends in .parquet or .csv"):
        PredictionOutputs(Path("a.txt"))
    with pytest.raises(UserError, match=r"--worst a.jpg: expected a name that ends in .png"):
        PredictionOutputs(worst=Path("a.jpg"))
    with pytest.raises(UserError, match="--all-probabilities: are for the table"):
        PredictionOutputs(all_probabilities=True, worst=Path("a.png"))
