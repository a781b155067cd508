from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient

from resnet_dist.tracking import registry
from resnet_dist.tracking.mlflow_run import open_run
from resnet_dist.tracking.models import log_classifier
from resnet_dist.tracking.registry import Score, becomes_champion, digest_of, load_weights, register

pytestmark = pytest.mark.system

CLASSES = ("dark", "bright")


class MeanGrey(torch.nn.Module):
    """Two classes: dark and bright."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        bright = images.float().mean((1, 2, 3)) - 128.0
        return torch.stack([-bright, bright], dim=1)


def log(handle, step=1, class_names=CLASSES):
    example = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    shape = {"input_example": example, "resize": 8, "class_names": class_names, "pictures": {}}
    return log_classifier(handle, MeanGrey(), name="m", **shape, metadata={}, step=step)


def aliases(uri: str) -> dict[str, str]:
    return {name: str(v) for name, v in MlflowClient(uri).get_registered_model("digits-net").aliases.items()}


@pytest.mark.parametrize(
    ("new", "champion", "wins"),
    [
        (Score("a", 1.0), None, True),
        (Score("a", 90.1), Score("a", 90.0), True),
        (Score("a", 90.0), Score("a", 90.0), False),
        (Score("a", 89.9), Score("a", 90.0), False),
        (Score("b", 99.9), Score("a", 10.0), False),  # other data: nothing can be said
        (Score("a", float("nan")), Score("a", 10.0), False),
        (Score("a", 99.9, by="balanced_top1"), Score("a", 10.0), False),  # by another metric
        (Score("a", 0.3, by="loss"), Score("a", 0.4, by="loss"), True),
    ],
)
def test_a_champion_falls_only_to_a_better_one_on_the_same_data(new, champion, wins):
    assert becomes_champion(new, champion) is wins


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 100)), min_size=1))
def test_the_champion_is_the_best_on_the_first_ones_data(scores):
    champion = None
    for score in (Score(*pair) for pair in scores):
        champion = score if becomes_champion(score, champion) else champion
    same = [top1 for digest, top1 in scores if digest == scores[0][0]]
    assert champion == Score(scores[0][0], max(same))


def test_versions_aliases_and_repeats(sqlite_uri, tmp_path):
    uris = []
    for number, (digest, top1) in enumerate([("a", 50.0), ("a", 40.0), ("a", 60.0), ("b", 99.0)]):
        handle = open_run(sqlite_uri, "exp", f"r{number}", tmp_path / str(number), {}, {})
        uris.append(log(handle))
        done = register(handle, "digits-net", uris[-1], Score(digest, top1), {"recipe_hash": "x"}, CLASSES)
        assert (done.version, done.is_champion) == (str(number + 1), number in (0, 2))
        again = register(handle, "digits-net", uris[-1], Score(digest, top1), {"recipe_hash": "x"}, CLASSES)
        assert again == done
        assert aliases(sqlite_uri)["candidate"] == str(number + 1)
    assert aliases(sqlite_uri) == {"candidate": "4", "champion": "3"}
    assert len(MlflowClient(sqlite_uri).search_model_versions("name = 'digits-net'")) == 4
    version = MlflowClient(sqlite_uri).get_model_version_by_alias("digits-net", "champion")
    assert version.tags == {
        "recipe_hash": "x",
        "model_id": uris[2].removeprefix("models:/"),
        "evaluated_on": "a",
        "val_top1": "60.0",
        "classes": digest_of(CLASSES),
    }
    assert version.description == "60.00 % top-1 on the validation data a; from the run r2."
    assert "models:/digits-net@champion" in MlflowClient(sqlite_uri).get_registered_model("digits-net").description


def test_a_champion_set_by_hand_stays(sqlite_uri, tmp_path):
    handle = open_run(sqlite_uri, "exp", "r", tmp_path / "r", {}, {})
    client = MlflowClient(sqlite_uri)
    client.create_registered_model("digits-net")
    client.create_model_version("digits-net", str(tmp_path), run_id=handle.run_id)
    client.set_registered_model_alias("digits-net", "champion", "1")
    assert not register(handle, "digits-net", log(handle), Score("a", 99.0), {}, CLASSES).is_champion
    assert aliases(sqlite_uri) == {"candidate": "2", "champion": "1"}


@pytest.mark.parametrize("interrupted", [50.0, 60.0])
def test_of_two_runs_that_end_together_the_better_is_champion(sqlite_uri, tmp_path, monkeypatch, interrupted):
    """The second run registers itself between the first one's look at the champion and its setting of the alias."""
    both = []
    for number, top1 in enumerate([interrupted, 110.0 - interrupted]):
        handle = open_run(sqlite_uri, "exp", f"r{number}", tmp_path / str(number), {}, {})
        both.append((handle, "digits-net", log(handle), Score("a", top1), {}, CLASSES))
    real_set, second = MlflowClient.set_registered_model_alias, []

    def slow_set(self, name, alias, version):
        if alias == "champion" and not second:
            second.append(None)
            second[0] = register(*both[1])
        real_set(self, name, alias, version)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", slow_set)
    first = register(*both[0])
    champion = MlflowClient(sqlite_uri).get_model_version_by_alias("digits-net", "champion")
    assert champion.tags["val_top1"] == "60.0"
    assert first.is_champion is (interrupted == 60.0)


def test_a_champion_that_a_person_preferred_stays_against_older_ones(sqlite_uri, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_RIVALRY_MS", -1)  # the older ones are older than that
    for number, top1 in enumerate([70.0, 40.0, 30.0]):
        handle = open_run(sqlite_uri, "exp", f"r{number}", tmp_path / str(number), {}, {})
        register(handle, "digits-net", log(handle), Score("a", top1), {}, CLASSES)
        if number == 1:
            MlflowClient(sqlite_uri).set_registered_model_alias("digits-net", "champion", "2")
    assert aliases(sqlite_uri)["champion"] == "2"


def test_through_a_real_server(server, tmp_path):
    handle = open_run(server.uri, "exp", "r", tmp_path / "r", {}, {})
    uri = log(handle)
    assert log(handle) == uri
    assert load_weights(uri, tracking_uri=server.uri)[1]["class_names"] == list(CLASSES)
    first = register(handle, "digits-net", uri, Score("a", 50.0), {}, CLASSES)
    assert register(handle, "digits-net", uri, Score("a", 50.0), {}, CLASSES) == first
    assert (first.version, first.is_champion) == ("1", True)
    assert aliases(server.uri) == {"candidate": "1", "champion": "1"}


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_champion_of_other_classes_stays_with_the_reason(sqlite_uri, tmp_path, forgotten):
    """Also one that was registered before versions had a tag for their classes: its files name them."""
    done = []
    for number, names in enumerate([CLASSES, CLASSES[::-1], CLASSES]):
        handle = open_run(sqlite_uri, "exp", f"r{number}", tmp_path / str(number), {}, {})
        score = Score("a", 50.0 + number)
        done.append(register(handle, "digits-net", log(handle, class_names=names), score, {}, names))
        if forgotten and number == 0:
            MlflowClient(sqlite_uri).delete_model_version_tag("digits-net", "1", "classes")
    assert [registration.is_champion for registration in done] == [True, False, True]
    assert (done[0].other_classes, done[2].other_classes) == (None, None)
    assert str(done[1].other_classes).startswith("class 0 is 'dark' in the champion (version 1), 'bright' in this")
