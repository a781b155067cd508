"""`resnet-dist plan` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from resnet_dist.cli import app
from resnet_dist.errors import UserError

ROOT = Path(__file__).parents[3]
RECIPE = str(ROOT / "resnet_dist/recipes/resnet152_90ep.yaml")


def plan(*words: str) -> dict:
    done = CliRunner().invoke(app, ["plan", RECIPE, "--json", "--replicas", "4", *words], catch_exceptions=False)
    assert done.exit_code == 0
    return json.loads(done.output)


def test_eight_a100_as_text_and_as_json() -> None:
    words = ["--gpu", "a100", "--gpus", "8", "--price", "2", "--set", "train.global_batch_size=1024",
             "--set", "train.micro_batch_size=128"]  # fmt: skip
    found = plan(*words)
    # Lambda: 886 to 905 images/s on one A100 of 40 GB; the one of 80 GB has 1.3 times its memory bandwidth.
    assert 8 * 800 < found["images_per_s"] < 8 * 1100
    assert found["bottleneck"] == "the a100 GPUs themselves"
    assert found["launches_per_step"] == found["micro_batches_per_launch"] == 1
    assert found["money"] == pytest.approx(2 * found["gpu_hours"])
    text = CliRunner().invoke(app, ["plan", RECIPE, "--replicas", "4", *words]).output
    for word in ("images/s", "bottleneck", "cores a GPU", "checkpoint", "goodput", "money"):
        assert word in text


def test_the_text_says_how_micro_batches_are_launched_and_what_is_assumed() -> None:
    words = ["--gpu", "h100", "--gpus", "2"]
    text = CliRunner().invoke(app, ["plan", RECIPE, "--replicas", "4", *words]).output
    assert "1 per worker and step, of 4 micro-batches (128 images): " in text
    assert "CUDA graphs; micro-batches merged where that is faster; no torch.compile" in text
    assert "not run on a GPU" in text
    assert "one CUDA graph, which gains nothing" in text
    assert "one GPU's 1,565 (which merges 8 micro-batches)" in text
    assert "Gb/s a node" not in text
    assert "a network of 100 Gb/s a node" in plan("--gpu", "h100", "--gpus", "8", "--gpus-per-node", "4")["assumes"]


def test_launches_of_two_sizes_are_counted_as_the_larger() -> None:
    words = ["--gpu", "h100", "--gpus", "1", "--set", "train.global_batch_size=160"]
    words += ["--profile-set", "micro_batches_per_launch=2"]
    found = plan(*words)
    assert (found["launches_per_step"], found["micro_batches_per_launch"]) == (3, 2)
    text = CliRunner().invoke(app, ["plan", RECIPE, "--replicas", "4", *words]).output
    assert "3 per worker and step, each of 1 or 2 micro-batches (up to 64 images): " in text


def test_a_profile_says_how_micro_batches_are_launched() -> None:
    profile = ["--on", str(ROOT / "cluster/profiles/node8.yaml"), "--gpu", "h100", "--gpus", "2"]
    merged = plan(*profile, "--profile-set", "micro_batches_per_launch=2")
    assert (merged["launches_per_step"], merged["micro_batches_per_launch"]) == (2, 2)
    assert "at most 2 micro-batches merged (micro_batches_per_launch: 2)" in merged["assumes"]
    one_by_one = plan(*profile, "--profile-set", "micro_batches_per_launch=1")
    assert "micro-batches not merged (micro_batches_per_launch: 1)" in one_by_one["assumes"]
    assert "a larger micro_batches_per_launch" in one_by_one["bottleneck"]
    assert plan("--gpu", "h100", "--gpus", "2", "--profile-set", "micro_batches_per_launch=1")["launches_per_step"] == 4
    eager = plan(*profile, "--profile-set", "cuda_graphs=false")
    assert "no CUDA graphs (cuda_graphs: false)" in eager["assumes"]
    low_rank = plan(*profile, "--set", "train.gradient_compression=powersgd")
    assert "no CUDA graphs (gradient_compression: powersgd)" in low_rank["assumes"]
    assert eager["images_per_s"] <= plan(*profile)["images_per_s"]


def test_a_part_of_a_node_costs_as_much_of_its_hours() -> None:
    one, two = (plan("--gpu", "a100", "--gpus", str(n), "--price", "3", "--mtbf-h", "1e9") for n in (1, 2))
    assert one["gpu_hours"] == pytest.approx(one["hours"], rel=0.01)
    assert two["gpu_hours"] == pytest.approx(2 * two["hours"], rel=0.01)
    assert one["money"] == pytest.approx(3 * one["gpu_hours"])


def test_the_first_start_does_not_count_as_a_lost_node() -> None:
    digits = str(ROOT / "resnet_dist/recipes/digits_resnet20.yaml")
    words = ["plan", digits, "--json", "--replicas", "4", "--gpu", "a100", "--gpus", "1"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert "lost nodes" not in json.loads(done.output)["bottleneck"]


def test_the_bottleneck_is_named() -> None:
    large = ["--set", "train.global_batch_size=32768", "--set", "train.micro_batch_size=128"]
    assert "fewer GPUs with more micro-batches each" in plan("--gpu", "h100", "--gpus", "8")["bottleneck"]
    assert plan("--gpu", "h100", "--gpus", "1")["bottleneck"] == "the h100 GPUs themselves"
    assert "uneven shares: 4 GPUs, which are as fast" in plan("--gpu", "h100", "--gpus", "5")["bottleneck"]
    assert "loader" in plan("--gpu", "h100", "--gpus", "8", "--cpus-per-gpu", "1", *large)["bottleneck"]
    assert "network" in plan("--gpu", "h100", "--gpus", "256", "--net", "1Gbps", *large)["bottleneck"]
    assert "uneven" in plan("--gpu", "a100", "--gpus", "200", *large)["bottleneck"]
    assert (
        "lost nodes"
        in plan("--gpu", "a100", "--gpus", "256", "--mtbf-h", "60", "--repair-h", "0.5", *large)["bottleneck"]
    )


def test_a_profile_gives_workers_cpus_and_checkpoints() -> None:
    profile = str(ROOT / "cluster/profiles/spot.yaml")
    found = plan(
        "--gpu", "a100", "--on", profile, "--preemptions-per-day", "2", "--set", "train.global_batch_size=2048"
    )
    assert found["checkpoint_every_s"] == 180
    assert found["preemptions"] > 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--gpu", "a100", "--gpus", "1024"], "--set train.global_batch_size=32768"),
        (["--gpu", "a1000", "--gpus", "8"], "did you mean"),
        (["--gpu", "a100"], "--gpus: is missing"),
        (["--gpu", "a100", "--gpus", "8", "--net", "fast"], "--net fast"),
        (["--gpu", "a100", "--gpus", "8", "--profile-set", "nonsense=3"], "--profile-set: nonsense: unknown key"),
        (["--gpu", "a100", "--gpus", "8", "--disk", "5"], "--disk 5"),
        (["--gpu", "a100", "--gpus", "4", "--min-gpus", "8"], "--min-gpus 8"),
        (["--gpu", "l4", "--gpus", "1", "--set", "train.micro_batch_size=256"], "GB"),
        (["--gpu", "a100", "--gpus", "8", "--set", "data.dataset=mine"], "--images"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line.replace("(", r"\(")) as error:
        CliRunner().invoke(app, ["plan", RECIPE, *words], catch_exceptions=False)
    assert "\n" not in str(error.value)
