"""What a worker does about GPUs before its process group is made, and what it reports of NCCL afterwards."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from resnet_dist.gpus.nccl import log_settings, remove_log
from resnet_dist.launch.worker import RayContext, prepare_worker, report_transports

TCP = """\
a:1:1 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.1<0>
a:1:1 [0] NCCL INFO Using network Socket
a:1:1 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM
"""


class Control:
    """The control actor's handle."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __getattr__(self, kind: str) -> Any:
        return SimpleNamespace(remote=lambda *values: self.lines.append(": ".join(map(str, [kind, *values]))))


def test_every_rank_warns_and_rank_0_logs() -> None:
    control = Control()
    context = RayContext.__new__(RayContext)  # its constructor needs a worker group
    context.rank, context._setup = 5, cast(Any, SimpleNamespace(control=control))
    context.log("a line")
    context.warn("no CUDA graphs")
    assert control.lines == ["warn_of_rank: 5: no CUDA graphs"]


def test_a_worker_without_gpus_sees_none(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr("ray.train.get_context", lambda: alone)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert prepare_worker(0) == ""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert "NCCL_DEBUG" not in os.environ


@pytest.mark.parametrize(
    ("between_nodes", "line"),
    [(True, "warn: NCCL uses P2P within a node, TCP sockets (eth0) between nodes"), (False, "log: NCCL uses P2P")],
)
def test_tcp_between_nodes_is_a_warning_to_the_driver(between_nodes: bool, line: str) -> None:
    environment, control = log_settings({}), Control()
    Path(environment["NCCL_DEBUG_FILE"]).write_text(TCP)
    report_transports(control, environment, between_nodes=between_nodes)
    remove_log(environment)
    (found,) = control.lines
    assert found.startswith(line)


def test_without_a_log_nothing_is_reported() -> None:
    control = Control()
    report_transports(control, {"NCCL_DEBUG": "WARN"}, between_nodes=True)
    assert control.lines == []
