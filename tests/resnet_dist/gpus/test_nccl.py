"""NCCL's log -> one line. The lines have the form of logs in public issues of NVIDIA/nccl, nccl-tests and aws-ofi-nccl,
with other hosts and addresses; those of 2.30 that of NCCL's source.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from resnet_dist.gpus.nccl import describe, log_settings, parse_log, read_log, remove_log, warnings_in

SOCKETS_2_4 = """\
NCCL version 2.4.7+cuda9.2
node-a:45384:45384 [0] NCCL INFO NET/Socket : Using [0]ens3:10.0.0.1<0>
node-a:45384:45384 [0] NCCL INFO NET/Plugin : No plugin found (libnccl-net.so).
node-a:45384:45384 [0] NCCL INFO NET/IB : No device found.
node-a:45384:45501 [0] NCCL INFO Ring 00 : 7 -> 0 [receive] via NET/Socket/0
node-a:45384:45501 [0] NCCL INFO Ring 00 : 0[0] -> 1[1] via direct shared memory
"""

EFA_2_4 = """\
node-a:8716:9558 [2] NCCL INFO Ring 00 : 26[2] -> 30[6] via P2P/IPC
node-a:8716:9558 [2] NCCL INFO Ring 00 : 7 -> 8 [send] via NET/AWS Libfabric/0
"""

INFINIBAND_2_5 = """\
 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/RoCE ; OOB br0:10.0.0.1<0>
 [0] NCCL INFO NCCL version 2.5.7+cuda10.0
 [0] NCCL INFO Channel 00/02 :    0   1   2   3   4   5   6   7   8   9  10  11  12  13  14  15
 [0] NCCL INFO Ring 00 : 15[41000] -> 0[1b000] [receive] via NET/IB/0/GDRDMA
 [0] NCCL INFO Ring 00 : 0[1b000] -> 1[1c000] via P2P/IPC
"""

SOCKETS_2_18 = """\
NCCL version 2.18.5+cuda12.0
node-a:919:1150 [0] NCCL INFO Bootstrap : Using eth0:10.0.0.1<0>
node-a:919:1150 [0] NCCL INFO NET/Plugin : No plugin found, using internal implementation
node-a:919:1150 [0] NCCL INFO NET/IB : No device found.
node-a:919:1150 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.1<0> [1]eth1:10.0.1.1<0>
node-a:919:1150 [0] NCCL INFO Using network Socket
node-a:919:1150 [0] NCCL INFO Channel 01/0 : 8[0] -> 15[7] via P2P/IPC/read
node-a:919:1150 [0] NCCL INFO Channel 03/0 : 15[7] -> 6[6] [send] via NET/Socket/3
"""

SHARP_2_22 = """\
NCCL version 2.22.3+cuda12.6
node-a:49355:49414 [1] NCCL INFO P2P plugin IBext_v8
node-a:49355:49414 [1] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB/SHARP [1]mlx5_1:1/IB/SHARP [RO]; OOB ibp25s0:10.0.0.1<0>
node-a:49355:49414 [1] NCCL INFO Using network IBext_v8
node-a:49355:49414 [1] NCCL INFO Channel 00/0 : 15[7] -> 0[0] [receive] via NET/IBext_v8/0/GDRDMA/Shared
node-a:49355:49414 [1] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read
"""

EFA_2_23 = """\
NCCL version 2.23.4+cuda12.6
node-a:6831:6840 [0] NCCL INFO NET/OFI Selected Provider is efa (found 16 nics)
node-a:6831:6840 [0] NCCL INFO NET/OFI Support for DMA-BUF registrations: false
node-a:6831:6840 [0] NCCL INFO Using network Libfabric
node-a:6831:6840 [0] NCCL INFO Channel 00/0 : 15[7] -> 0[0] [receive] via NET/Libfabric/0/GDRDMA
"""

INFINIBAND_2_30 = """\
NCCL version 2.30.7+cuda13.3
node-a:984:990 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB eth0:10.0.0.1<0>
node-a:984:990 [0] NCCL INFO Initialized NET plugin IB
node-a:984:990 [0] NCCL INFO Assigned NET plugin IB to comm
node-a:984:990 [0] NCCL INFO Using network IB
node-a:984:990 [0] NCCL INFO Channel 00/0 : 15[7] -> 0[0] [receive] via NET/IB/0/GDRDMA(PCI)
node-a:984:990 [0] NCCL INFO Channel 00/0 : 0[0] -> 8[0] [send] via NET/IB/1(0)/GDRDMA
node-a:984:990 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM
node-a:984:990 [0] NCCL INFO Channel 01 : 0[0] -> 2[2] via SHM/direct
"""

TCP = "; RDMA is several times as fast, and cluster/README.md says what each cloud needs for it"


@pytest.mark.parametrize(
    ("log", "is_tcp", "line"),
    [
        (
            SOCKETS_2_4,
            True,
            "NCCL 2.4.7 uses SHM within a node (through the host's memory: the GPUs have no direct path), "
            f"TCP sockets (ens3) between nodes{TCP}",
        ),
        (EFA_2_4, False, "NCCL uses P2P within a node, AWS Libfabric between nodes"),
        (INFINIBAND_2_5, False, "NCCL 2.5.7 uses P2P within a node, IB (mlx5_0) with GPUDirect RDMA between nodes"),
        (SOCKETS_2_18, True, f"NCCL 2.18.5 uses P2P within a node, TCP sockets (eth0, eth1) between nodes{TCP}"),
        (
            SHARP_2_22,
            False,
            "NCCL 2.22.3 uses P2P within a node, IBext_v8 (mlx5_0, mlx5_1) with GPUDirect RDMA between nodes",
        ),
        (EFA_2_23, False, "NCCL 2.23.4 uses Libfabric (16 efa) with GPUDirect RDMA between nodes"),
        (
            INFINIBAND_2_30,
            False,
            "NCCL 2.30.7 uses P2P and SHM within a node (through the host's memory: the GPUs have no direct path), "
            "IB (mlx5_0, mlx5_1) with GPUDirect RDMA between nodes",
        ),
    ],
)
def test_the_log_says_which_transports_were_chosen(log: str, is_tcp: bool, line: str) -> None:
    found = parse_log(log)
    assert found.is_tcp == is_tcp
    assert describe(found, between_nodes=True) == line


def test_on_one_node_the_network_does_not_matter() -> None:
    assert describe(parse_log(SOCKETS_2_18), between_nodes=False) == "NCCL 2.18.5 uses P2P within a node"


@pytest.mark.parametrize(
    ("lines", "is_tcp"),
    [
        ("a:1:1 [0] NCCL INFO Using network FastSocket", True),
        ("a:1:1 [0] NCCL INFO Using network GPUDirectTCPX_v7", False),
        ("a:1:1 [0] NCCL INFO Using network gIB", False),
        (
            "a:1:1 [0] NCCL INFO NET/OFI Selected Provider is tcp (found 1 nics)\n"
            "a:1:1 [0] NCCL INFO Using network AWS Libfabric",
            True,
        ),
    ],
)
def test_a_plugin_may_still_be_tcp(lines: str, is_tcp: bool) -> None:
    assert parse_log(lines).is_tcp == is_tcp


@pytest.mark.parametrize("log", ["", "no line of NCCL's", "a:1:1 [0] NCCL INFO Using net"])
def test_a_log_that_says_nothing_gives_no_line(log: str) -> None:
    assert describe(parse_log(log), between_nodes=True) == ""


def test_warnings_are_found_once_each() -> None:
    warning = "node-a:1:2 [0] net_ib.cc:1295 NCCL WARN NET/IB : Got completion from peer with error 12"
    assert warnings_in(f"{warning}\n{SOCKETS_2_18}{warning}\n") == ["NET/IB : Got completion from peer with error 12"]


def test_the_log_is_a_file_of_the_process_unless_the_user_decided_otherwise() -> None:
    settings = log_settings({"HOME": "/root", "NCCL_SOCKET_IFNAME": "eth0"})
    file = Path(settings["NCCL_DEBUG_FILE"])
    assert read_log(settings) == ""  # NCCL has not started
    file.write_text(SOCKETS_2_18)
    assert read_log(settings) == SOCKETS_2_18
    remove_log(settings)
    assert not file.parent.exists()
    remove_log({"NCCL_DEBUG_FILE": __file__})
    assert log_settings({"NCCL_DEBUG": "WARN"}) == {}
    assert read_log({"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": str(file.with_name("theirs.log"))}) == ""
    assert read_log({"NCCL_DEBUG_FILE": __file__}) == ""
