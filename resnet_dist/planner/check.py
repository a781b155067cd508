"""Predicted against published, as Markdown: `resnet-dist bench plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from resnet_dist.planner.compute import roofline_s
from resnet_dist.planner.constants import JITTER
from resnet_dist.planner.gpus import gpu_of_name
from resnet_dist.planner.jitter import expected_maximum
from resnet_dist.planner.loading import throttled
from resnet_dist.planner.network import Links
from resnet_dist.planner.overlap import exchange
from resnet_dist.planner.published import PAIRS, SCALINGS, SINGLES, Pair, Scaling, Single
from resnet_dist.planner.step import produced
from resnet_dist.planner.workload import net_of


@dataclass(frozen=True)
class Row:
    what: str
    predicted: float
    published: float
    fitted: str
    source: str

    @property
    def error(self) -> float:
        """Relative to the published figure."""
        return self.predicted / self.published - 1


def pair_rows(pairs: Sequence[Pair] = PAIRS) -> list[Row]:
    rows = []
    for p in pairs:
        gpu = gpu_of_name(p.gpu)
        ratio = roofline_s(net_of("resnet50"), gpu, half=p.half) / roofline_s(net_of("resnet152"), gpu, half=p.half)
        rows.append(Row(f"{p.gpu}, {_precision(p.half)}", p.resnet50 * ratio, p.resnet152, p.fitted, p.source))
    return rows


def single_rows(singles: Sequence[Single] = SINGLES) -> list[Row]:
    return [
        Row(
            f"{s.net}, {s.gpu}, {_precision(s.half)}",
            1 / roofline_s(net_of(s.net), gpu_of_name(s.gpu), half=s.half),
            s.images_s,
            "",
            s.source,
        )
        for s in singles
    ]


def scaling_rows(scalings: Sequence[Scaling] = SCALINGS) -> list[Row]:
    return [
        Row(
            f"{s.net}, {s.base_gpus} -> {s.gpus} x {s.hardware}, {_precision(s.half)}",
            100 * predicted_efficiency(s),
            100 * s.efficiency,
            s.fitted,
            s.source,
        )
        for s in scalings
    ]


def predicted_efficiency(s: Scaling, jitter: float = JITTER) -> float:
    """The published rate of the base is taken as given; what more GPUs make of it is predicted."""

    def rate(gpus: int) -> float:
        micro_s = s.batch_per_gpu / (s.base_images_s / s.base_gpus)
        links = Links(s.local_gb_s * 1e9, max(s.net_gbit_s, 1e-9) * 1e9 / 8, s.gpus_per_node, s.host_bus)
        exchanged = exchange(produced(net_of(s.net), micro_s, s.gradient_bytes), gpus, links, overlapped=s.overlapped)
        late = 0.0 if s.synthetic else micro_s * jitter * expected_maximum(gpus)
        free = s.batch_per_gpu / (micro_s + exchanged.exposed_s + late)
        if s.node_loader_images_s is None:
            return free
        return throttled(free, s.node_loader_images_s / min(gpus, s.gpus_per_node))

    return rate(s.gpus) / rate(s.base_gpus)


def mean_error(rows: Sequence[Row]) -> float:
    """Mean of the absolute relative errors."""
    return sum(abs(row.error) for row in rows) / len(rows)


def report() -> str:
    """The tables, rows that gave a constant marked, and the mean errors of those that did not."""
    lines: list[str] = []
    everything: list[Row] = []
    for title, unit, rows in (
        ("Scaling efficiency", "%", scaling_rows()),
        ("ResNet-152 on one GPU, from ResNet-50 on the same", "images/s", pair_rows()),
        ("One GPU from its data sheet alone", "images/s", single_rows()),
    ):
        digits = 1 if unit == "%" else 0
        held_out = [row for row in rows if not row.fitted]
        everything += held_out
        lines += [
            f"### {title}",
            "",
            f"| | predicted, {unit} | published | error | fitted | source |",
            "|---|---|---|---|---|---|",
            *(
                f"| {r.what} | {r.predicted:.{digits}f} | {r.published:.{digits}f} | {r.error:+.1%} | {r.fitted} "
                f"| {r.source} |"
                for r in rows
            ),
            "",
            _summary(f"{len(held_out)} rows that fitted nothing", held_out),
            "",
        ]
    return "\n".join([*lines, _summary(f"{len(everything)} rows of all tables that fitted nothing", everything), ""])


def _summary(what: str, rows: Sequence[Row]) -> str:
    largest = max(rows, key=lambda row: abs(row.error))
    return f"Mean error of the {what}: **{mean_error(rows):.1%}**, largest {largest.error:+.1%} ({largest.what})."


def _precision(half: bool) -> str:
    return "half" if half else "fp32"
