"""The bench of large groups, with small ones."""

from __future__ import annotations

import pytest

from resnet_dist.bench.scale import KINDS, bench_scale

pytestmark = pytest.mark.system


def test_each_kind_of_connection_has_a_row_a_size_and_what_follows_for_a_thousand_workers() -> None:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in bench_scale([6, 3]).splitlines()]
    head, _, *rows = lines
    assert [row[:2] for row in rows] == [[kind, size] for kind in KINDS for size in ("3", "6", "1,000 (slope)")]
    files = {(row[0], row[1]): row[head.index("open files a worker")] for row in rows}
    mesh = [int(files["all at the start", size].replace(",", "")) for size in ("3", "6", "1,000 (slope)")]
    assert mesh[1] - mesh[0] == 3
    assert mesh[2] - mesh[1] == 1000 - 6
