"""What recipes' heads and the documents say of speed and time on GPUs is what `resnet-dist plan` says."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from resnet_dist.config.loading import load_recipe
from resnet_dist.planner.hardware import NODE_MTBF_H, parse_net
from resnet_dist.planner.plan import Faults, Hardware, Plan, lines, make_plan
from resnet_dist.planner.workload import workload_of

ROOT = Path(__file__).parents[3]
DOCUMENT = (ROOT / "docs/recipes.md").read_text()
PLANNERS_PAGE = " ".join((ROOT / "resnet_dist/planner/README.md").read_text().split())
IMAGENET = sorted((ROOT / "resnet_dist/recipes").glob("resnet*.yaml"))


@cache
def plan(path: Path, gpu: str, *sets: str) -> Plan:
    """As `resnet-dist plan RECIPE --gpu GPU --gpus 8` makes it."""
    hardware = Hardware(gpu=gpu, gpus=8, gpus_per_node=8, net_bytes_s=parse_net("100Gbps"), cpus_per_gpu=12)
    return make_plan(workload_of(load_recipe(path, list(sets))), hardware, Faults(mtbf_h=NODE_MTBF_H, replicas=2))


def hours(of: Plan) -> str:
    """Two digits: a third is not known."""
    return (
        f"{of.ideal_h:.0f}"
        if of.ideal_h >= 9.95
        else f"{of.ideal_h:.1f}"
        if of.ideal_h >= 0.995
        else f"{of.ideal_h:.2f}"
    )


def stated(path: Path, gpu: str) -> str:
    found = plan(path, gpu)
    return f"8 {gpu.upper()}: {hours(found)} h at {float(f'{found.step.images_per_s:.2g}'):,.0f} images/s"


@pytest.mark.parametrize("path", IMAGENET, ids=lambda path: path.stem)
def test_a_head_says_what_plan_says(path: Path) -> None:
    line = f"# Time       {stated(path, 'a100')}; {stated(path, 'h100')} (resnet-dist plan; not run on a GPU)"
    assert line in path.read_text().splitlines(), f"write this into the head:\n{line}"


def test_the_document_says_what_plan_says() -> None:
    rows = {
        line.split("`")[1]: [cell.strip() for cell in line.split("|")]
        for line in DOCUMENT.splitlines()
        if line.startswith("| [`resnet")
    }
    assert rows.keys() == {path.stem for path in IMAGENET}
    assert {name: cells[7] for name, cells in rows.items()} == {
        path.stem: f"{hours(plan(path, 'a100'))}, {hours(plan(path, 'h100'))}" for path in IMAGENET
    }


def test_the_documents_say_how_uncertain_the_hours_are() -> None:
    text = "\n".join(lines(plan(ROOT / "resnet_dist/recipes/resnet152_90ep.yaml", "h100")))
    hours, speeds = re.search(r"uncertain +(.* to .*) h, (.* to .*) images/s", text).groups()  # type: ignore[union-attr]
    assert f"8 H100 anything from {hours} hours" in DOCUMENT
    assert f"8 H100, with 32 images in a launch, that is {speeds} images/s, {hours} hours" in PLANNERS_PAGE


def test_the_first_try_takes_the_minutes_that_the_document_says() -> None:
    first = ROOT / "resnet_dist/recipes/resnet152_ffcv.yaml"
    minutes = round(60 * plan(first, "a100", "train.total_epochs=16").ideal_h)
    assert re.search(r"`--set train.total_epochs=16`, (\d+) minutes on 8\s+A100", DOCUMENT)[1] == str(minutes)  # type: ignore[index]
