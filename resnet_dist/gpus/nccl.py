"""Which transports NCCL chose, from its own log: RDMA or only TCP between nodes, peer to peer or not within one."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_LOG_FOLDER = "resnet-dist-nccl-"
_CHANNEL = re.compile(r"NCCL INFO (?:Channel|Ring) [\d/]+ : .*?(?:\[(?:send|receive)\] )?via ([^\n]+)")
_NET = re.compile(r"NET/(.+?)/\d+(?:\(\d+\))?(/GDRDMA)?")
_NETWORK = re.compile(r"NCCL INFO Using network ([^\n]+)")
_ADAPTERS = re.compile(r"NCCL INFO NET/(IB|Socket) ?: Using ([^\n;]+)")
_ADAPTER = re.compile(r"\[\d+\]([^\s:]+)")
_PROVIDER = re.compile(r"NCCL INFO NET/OFI Selected [Pp]rovider is ([\w;-]+).*?\(found (\d+) nics\)")
_VERSION = re.compile(r"NCCL version ([\d.]+)")
_WARNING = re.compile(r"NCCL WARN (.+)")


@dataclass(frozen=True)
class Transports:
    """What one process's log says."""

    version: str = ""
    network: str = ""
    """NCCL's name of what it uses between nodes: IB (also RoCE), Socket, Libfabric (EFA), gIB, ...; "" if unknown."""
    adapters: tuple[str, ...] = ()
    """The network's, as far as the log names them."""
    is_tcp: bool = False
    has_gpu_direct: bool = False
    """The adapters read the GPUs' memory themselves."""
    local: tuple[str, ...] = ()
    """Between this process and its neighbours on the same node: P2P, SHM."""


def log_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables with which NCCL writes what it chose to a file of this process's own, away from the run's
    log. Nothing if the user has set how NCCL logs. They must be set before NCCL starts.
    """
    if any(key in environment for key in ("NCCL_DEBUG", "NCCL_DEBUG_FILE", "NCCL_DEBUG_SUBSYS")):
        return {}
    folder = tempfile.mkdtemp(prefix=_LOG_FOLDER)
    # INIT has the channels, NET the adapters. Warnings go to the file too; PyTorch's exceptions repeat the last one.
    return {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET", "NCCL_DEBUG_FILE": f"{folder}/nccl.log"}


def read_log(environment: Mapping[str, str]) -> str:
    """What NCCL has written so far; "" if `log_settings` are not set."""
    file = _own_log(environment)
    try:
        return file.read_text(errors="replace") if file else ""
    except OSError:
        return ""


def remove_log(environment: Mapping[str, str]) -> None:
    """The file of `log_settings`, if there is one. NCCL keeps writing to the deleted file."""
    if file := _own_log(environment):
        shutil.rmtree(file.parent, ignore_errors=True)


def _own_log(environment: Mapping[str, str]) -> Path | None:
    file = Path(environment.get("NCCL_DEBUG_FILE", ""))
    return file if file.parent.name.startswith(_LOG_FOLDER) else None


# --- pure -------------------------------------------------------------------------------------------------------------


def parse_log(text: str) -> Transports:
    """Reads logs of NCCL 2.4 to 2.30 with NCCL_DEBUG=INFO; of several lines of a kind the last one counts."""
    paths = [match[1].strip() for match in _CHANNEL.finditer(text)]
    nets = [match for path in paths if (match := _NET.match(path))]
    networks, providers = _NETWORK.findall(text), _PROVIDER.findall(text)
    network = networks[-1].strip() if networks else nets[-1][1] if nets else ""
    is_tcp = network.endswith("Socket")  # NCCL's own, or Google's FastSocket
    if "Libfabric" in network and providers:
        provider, number = providers[-1]
        adapters: tuple[str, ...] = (f"{number} {provider}",)
        is_tcp = provider in ("tcp", "sockets")
    else:
        lines = [names for kind, names in _ADAPTERS.findall(text) if network.startswith(kind)]
        adapters = tuple(_ADAPTER.findall(lines[-1])) if lines else ()
    return Transports(
        version=next(iter(_VERSION.findall(text)), ""),
        network=network,
        adapters=adapters,
        is_tcp=is_tcp,
        has_gpu_direct=any(match[2] for match in nets),
        local=tuple(dict.fromkeys(_local(path) for path in paths if not path.startswith("NET/"))),
    )


def _local(path: str) -> str:
    """P2P or SHM. Old versions write `direct shared memory`."""
    return "SHM" if "shared memory" in path else path.partition("/")[0]


def describe(found: Transports, *, between_nodes: bool) -> str:
    """One line for the user; "" if the log says nothing."""
    parts = []
    if found.local:
        via_host = " (through the host's memory: the GPUs have no direct path)" if "SHM" in found.local else ""
        parts.append(f"{' and '.join(found.local)} within a node{via_host}")
    if between_nodes and found.network:
        adapters = f" ({', '.join(found.adapters)})" if found.adapters else ""
        direct = " with GPUDirect RDMA" if found.has_gpu_direct else ""
        parts.append(f"{'TCP sockets' if found.is_tcp else found.network}{adapters}{direct} between nodes")
        if found.is_tcp:
            parts[-1] += "; RDMA is several times as fast, and cluster/README.md says what each cloud needs for it"
    return f"NCCL {found.version}".rstrip() + f" uses {', '.join(parts)}" if parts else ""


def warnings_in(text: str) -> list[str]:
    """NCCL's warnings, the newest last, each once."""
    return list(dict.fromkeys(match.strip() for match in _WARNING.findall(text)))
