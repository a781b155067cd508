"""The papers' numbers: every line's command is valid, and measurements are on the right line."""

from __future__ import annotations

from pathlib import Path

import pytest

from resnet_dist.config.loading import flatten, load_recipe, model_of_name
from resnet_dist.studies.paper import PublishedRow, PublishedTable, as_markdown, counted, lines_of, load_published
from resnet_dist.tracking.experiment import RunRow

RECIPES = Path(__file__).parents[3] / "resnet_dist" / "recipes"
PUBLISHED = load_published(Path(__file__).parents[3] / "resnet_dist" / "studies" / "paper.yaml")
TABLE = PublishedTable(
    title="table",
    recipe="cifar10_resnet20",
    metrics=("top1_error",),
    rows=(PublishedRow(what="ResNet-56", net="resnet56", paper=(6.97,)), PublishedRow(what="NIN", paper=(8.81,))),
)


def run(metrics: dict[str, float], *sets: str, status: str = "FINISHED", **params: str) -> RunRow:
    recipe = load_recipe(RECIPES / "cifar10_resnet20.yaml", ["model.name=resnet56", *sets])
    tags = {"mlflow.user": "ada", "hardware": "1 node, 2 CPUs, 0 GPUs"}
    if params:
        tags["kind"] = "evaluation"
    return RunRow("r", "abcdef0123456789", "e", status, 1, 2.0, metrics, flatten(recipe) | params, tags)


def measured(runs: list[RunRow], table: PublishedTable = TABLE) -> str:
    return lines_of(table, runs)[0].measured


@pytest.mark.parametrize("table", PUBLISHED.tables, ids=lambda table: table.title[:12])
def test_every_command_names_a_recipe_and_overrides_that_are_valid(table: PublishedTable) -> None:
    for row in table.rows:
        if row.net is None:
            continue
        if table.recipe is None:
            model_of_name(row.net, row.sets)
        else:
            sets = [f"model.name={row.net}", *table.sets, *row.sets]
            load_recipe(RECIPES / f"{table.recipe}.yaml", sets)


def test_all_tables_of_both_papers_are_there() -> None:
    lines = [line for table in PUBLISHED.tables for row in table.rows for line in row.paper if line is not None]
    assert len(lines) > 110
    titles = " ".join(table.title for table in PUBLISHED.tables)
    for name in [*(f"P table {k}" for k in range(1, 7)), *(f"P2 table {k}" for k in range(1, 6))]:
        assert name in titles


def test_a_run_of_the_recipe_is_shown_with_who_and_where() -> None:
    assert measured([run({"val/top1_error": 7.123})]) == "**7.12** (ada, 1 node, 2 CPUs, 0 GPUs, run abcdef01)"


def test_differences_of_a_run_are_listed_and_the_nearest_run_is_shown() -> None:
    shorter = run({"val/top1_error": 9.0}, "train.total_epochs=20", "train.precision=bf16", "seed=3")
    text = measured([shorter])
    assert text.startswith("**9.00** (")
    assert "train.total_epochs=20 instead of 164, train.precision=bf16 instead of fp32" in text
    assert "seed" not in text
    assert measured([shorter, run({"val/top1_error": 7.0})]).startswith("**7.00** (")


@pytest.mark.parametrize(
    "other",
    [
        run({"val/top1_error": 7.0}, "model.name=resnet20"),
        run({"val/top1_error": 7.0}, "model.shortcut=B"),
        run({"val/top1_error": 7.0}, "data.dataset=cifar100"),
        run({"val/top1_error": 7.0}, status="RUNNING"),
        run({"val/top1_error": 7.0}, protocol="10-crop"),
        run({"val/top5_error": 7.0}),
    ],
    ids=["net", "option", "data", "unfinished", "protocol", "metric"],
)
def test_other_runs_are_not_taken_for_it(other: RunRow) -> None:
    assert measured([other]) == ""


def test_a_protocols_line_takes_evaluations_under_that_protocol_and_size_only() -> None:
    row = PublishedRow(what="x", net="resnet56", paper=(5.0,), evaluate=("--size=40", "--resize=40"))
    table = TABLE.model_copy(update={"protocol": "10-crop", "rows": (row,)})
    at_40, at_32 = (
        run({"val/top1_error": 5.5}, protocol="10-crop", size=size, resize=size, data="/data/cifar10/val.beton")
        for size in ("[40]", "[32]")
    )
    assert measured([at_40], table).startswith("**5.50** (")
    assert measured([at_32], table) == measured([run({"val/top1_error": 5.5})], table) == ""
    assert "--protocol 10-crop --size=40 --resize=40" in lines_of(table, [])[0].command


def test_an_evaluation_of_other_views_or_other_images_is_not_taken_for_the_recipes() -> None:
    def evaluated(**params: str) -> str:
        asked = {"protocol": "1-crop", "size": "[32]", "resize": "[32]", "data": "/data/cifar10/val.beton"} | params
        return measured([run({"val/top1_error": 5.5}, **asked)])

    assert evaluated().startswith("**5.50** (")
    assert evaluated(size="[40]") == evaluated(resize="[40]") == ""
    assert evaluated(data="/data/cifar10/train.beton") == evaluated(data="/data/cifar10_2560/val.beton") == ""
    table = TABLE.model_copy(update={"protocol": "multi-scale"})
    for scales, is_taken in (("[224]", False), ("[224, 256, 384, 480, 640]", True)):
        row = run({"val/top1_error": 5.5}, protocol="multi-scale", data="/d/cifar10/val.beton", scales=scales)
        assert (measured([row], table) != "") == is_taken


def test_counts_are_made_from_the_net() -> None:
    row = PublishedRow(what="ResNet-20", net="resnet20", paper=(0.27,))
    assert counted(row, "parameters") == 269_722
    table = PublishedTable(title="P", metrics=("parameters",), scale=1e6, rows=(row,))
    (line,) = lines_of(table, [])
    assert (line.paper, line.measured, line.command) == ("0.27", "0.26972", "`resnet-dist show resnet20`")


def test_others_work_has_neither_command_nor_measurement() -> None:
    line = lines_of(TABLE, [run({"val/top1_error": 7.0})])[1]
    assert (line.paper, line.expected, line.measured, line.command) == ("8.81", "", "", "")
    assert "| NIN | top1 error | 8.81 |  |  |  |" in as_markdown(
        PUBLISHED.model_copy(update={"tables": (TABLE,)}), lines_of(TABLE, [])
    )
