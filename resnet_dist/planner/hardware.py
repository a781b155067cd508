"""The planner's numbers (measured here, fitted on a few published rows, or published), GPUs and networks."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from typing import NamedTuple

from resnet_dist.errors import UserError


@dataclass(frozen=True)
class Roofline:
    """How a training step uses a GPU, apart from its kernels' fixed times.

    Seconds per image = 6 FLOP x MACs / (peak x efficiency) + activations x bytes / bandwidth.
    """

    efficiency: float
    """Share of the peak that convolutions reach."""
    bytes_per_activation: float
    """Memory traffic of a whole step (batch norm, ReLU, additions, both passes) per output number of a convolution."""


# Two unknowns from two rows of each precision: ResNet-50 and ResNet-152 on one V100 (Lambda): 1276 and 518 images/s in
# fp16, 432 and 167 in fp32, less the fixed times of their kernels. In both precisions the traffic comes out as 16 to 17
# reads or writes of each activation. fp32's efficiency is above 1 because cuDNN's Winograd kernels do fewer
# multiplications than are counted.
HALF = Roofline(efficiency=0.5509, bytes_per_activation=33.35)
FP32 = Roofline(efficiency=1.0473, bytes_per_activation=64.14)

KERNEL_S = 14e-6
"""GPU time of a kernel over activations beyond what grows with the number of images: its start, its end, and that a
small one does not fill the GPU. Fitted on one row of each of six measurements on five GPUs (`published.BATCHES`); each
alone would give another value: `KERNEL_S_RANGE`."""
KERNEL_S_RANGE = (5e-6, 27e-6)
SMALL_KERNEL_S = 1.3e-6
"""GPU time of a kernel that has almost nothing to do, in a CUDA graph: 1.1 to 1.3 us (pytorch issue 161104)."""
LAUNCH_S = 14.6e-6
"""The host's time to start a kernel from Python, backward pass included. Fitted on PyTorch's own benchmark: ResNet-50
with 1 and 2 images takes 30 ms for 2,075 kernels without a graph. An old host takes 45 us a kernel (SAM 2, issue 768,
Xeon E5-2630 v4); the one here 12, its own arithmetic included (bench/results/host_cpu2)."""

LOSS_KERNELS = 35
"""Kernels of a launch outside of the net: normalising the images, loss, metrics."""
KERNELS_PER_RANDOM_LAYER = 24
"""A drop-path's or dropout's in training, both passes: most of them hash its keys."""
GRAPH_LAUNCHES = 6
"""Launches by the host for one CUDA graph: copies of its inputs, the graph itself, a copy of its output."""
UPDATE_LAUNCHES = {"sgd": 60, "lamb": 200}
"""Launches by the host in a step besides the forward and backward passes: optimizer, all-reduces, running statistics,
metrics. Estimated."""

BYTES_PER_ACTIVATION_KEPT = {"bf16": 5.5, "fp16": 5.5, "tf32": 11.0, "fp32": 11.0, "fp64": 22.0}
"""GPU memory per output number of a convolution: ResNet-152's published largest batches (V100 192, A100-40 224)."""

BACKWARD_SHARE = 2 / 3
"""The share of a step's GPU time: two matrix products for each one of the forward pass."""

NET_EFFICIENCY = 0.8
"""Share of a network's line rate that an all-reduce reaches: the usual figure of nccl-tests, not fitted."""
HOP_S = 15e-6
"""Latency of one message between nodes; within a node it is 3 us."""
LOCAL_HOP_S = 3e-6
CONTENTION = 0.3
"""Seconds by which a second of all-reduce between nodes slows the backward pass that hides it."""
JITTER = 0.019
"""Standard deviation of a worker's step time as a share of it; the step waits for the slowest. Fitted on DLPerf's
rows for 4 and 8 V100, CONTENTION on those for 16."""

LOADER_SHARPNESS = 8.0
"""Sharpness of the change from net to loader as the limit: rate = (net^-p + loader^-p)^(-1/p). Fitted to two rows."""

IMAGES_PER_CORE = {"native": {128: 1148, 160: 1149, 224: 1001}, "ffcv": {224: 593}}
"""Training images that one core decodes and crops in a second, by decoder and crop, px:
bench/results/loader_cpu2, whose tables a test compares with these numbers. The README files leave them to
`resnet-dist plan`."""
BYTES_PER_IMAGE = 110e3
"""Bytes of a stored ImageNet training JPEG, from the same place."""

RESTART_S = 24.0
"""From a lost node to the first new step: 22 to 26 s in eight runs of three nodes (cut link, raylet killed, node
killed), without reading a checkpoint and with small nets. Hundreds of workers take longer: --restart-s."""
SNAPSHOT_BYTES_S = 10e9
"""GPU to host over PCIe 4, pinned: how long a checkpoint pauses the loop. Not measured: no GPU here."""
WRITE_BYTES_S = 86e6
"""torch.save, fsync and digest of a checkpoint, in the background; one virtual machine's disk: bench/results."""

NODE_MTBF_H = 6300.0
"""Hours between unexpected failures of one 8-GPU node: Llama 3's training saw 419 in 54 days on 16,384 H100
(Grattafiori et al. 2024, section 3.3.4): one in 50,700 GPU hours."""


# ---- GPUs ------------------------------------------------------------------------------------------------------------
# From their data sheets. Peaks are dense. In half precision they are those of tensor cores with sums in fp32 (for which
# GeForce cards halve their rate); fp32 is without TF32, as `train.precision: fp32` runs. Speeds are images/s of one GPU
# alone at 224 px.


class Speed(NamedTuple):
    images_s: float
    batch: int


@dataclass(frozen=True)
class Gpu:
    memory_gb: int
    bandwidth_gb_s: float
    half_tflops: float
    fp32_tflops: float
    resnet50_half: Speed | None = None
    """Published, of PyTorch in mixed precision; None: estimated from the data sheet."""
    resnet50_fp32: Speed | None = None
    local_gb_s: float = 10.0
    """Bus bandwidth of an all-reduce within a node, GB/s per GPU (as nccl-tests define it); 10 is PCIe 4."""
    host_bus: bool = False
    """Peers reach each other through the host's memory only: `local_gb_s` is for all GPUs of a node together."""
    source: str = ""
    kernel_s: float = KERNEL_S


GPUS = {  # v100 and p100 for published figures: the locked PyTorch has no code for them (sm_75 and newer)
    "v100": Gpu(
        *(32, 900, 125, 15.7, Speed(1200, 256), Speed(367, 128), 130),
        source="NVIDIA DeepLearningExamples, ConvNets, ResNet-50, DGX-1 16 GB",
    ),
    "a100": Gpu(
        *(80, 2039, 312, 19.5, Speed(2470, 256), None, 235),
        source="NVIDIA DeepLearningExamples, ConvNets, ResNet-50, DGX A100",
    ),
    "a100-40": Gpu(40, 1555, 312, 19.5, None, None, 235),
    "h100": Gpu(80, 3350, 989, 67, None, None, 360),
    "h100-pcie": Gpu(80, 2000, 756, 51, None, None, 25),
    "h200": Gpu(141, 4800, 989, 67, None, None, 360),
    "b200": Gpu(180, 8000, 2250, 75, None, None, 700),
    "l4": Gpu(24, 300, 121, 30.3),
    "l40s": Gpu(48, 864, 362, 91.6, None, None, 20),
    "a10": Gpu(24, 600, 125, 31.2),
    "a6000": Gpu(48, 768, 155, 38.7),
    "rtx3090": Gpu(24, 936, 71, 35.6, Speed(1218, 512), None, 6.6, True, "timm benchmark results, AMP, channels last"),
    "rtx4090": Gpu(24, 1008, 165, 82.6, None, None, 6.6, True),
    "rtx8000": Gpu(48, 672, 130, 16.3),
    "rtx2080ti": Gpu(11, 616, 54, 13.4, None, None, 5),
    "p100": Gpu(16, 732, 21.2, 10.6, None, Speed(219, 64), 20, source="TensorFlow benchmarks 2017, DGX-1"),
    "t4": Gpu(16, 320, 65, 8.1, None, None, 5),
}


def gpu_of_name(name: str) -> Gpu:
    """Raises UserError for a name that is not in the table."""
    if gpu := GPUS.get(name.lower()):
        return gpu
    near = difflib.get_close_matches(name.lower(), GPUS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"--gpu {name}: unknown; {hint}known: {', '.join(sorted(GPUS))}")


# ---- networks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Links:
    local_bytes_s: float
    """Bus bandwidth of an all-reduce within a node, bytes/s per GPU, as measured (not a line rate)."""
    net_bytes_s: float
    """Line rate between nodes, bytes/s per node, all its adapters together."""
    gpus_per_node: int
    local_shared: bool = False
    """GeForce cards without NVLink: all of a node's traffic goes through the host's memory, `local_bytes_s` in all."""


@dataclass(frozen=True)
class AllReduce:
    local_s: float
    net_s: float
    """Between nodes; 0 on one node."""

    @property
    def seconds(self) -> float:
        return self.local_s + self.net_s


def all_reduce(num_bytes: float, workers: int, links: Links) -> AllReduce:
    """The cost of `num_bytes` per worker: within each node, then between nodes; ring or tree, whichever is faster."""
    local = min(workers, links.gpus_per_node)
    nodes = math.ceil(workers / links.gpus_per_node)
    return AllReduce(
        _one_level(num_bytes, local, links.local_bytes_s / (local if links.local_shared else 1), LOCAL_HOP_S),
        _one_level(num_bytes, nodes, links.net_bytes_s * NET_EFFICIENCY, HOP_S),
    )


def _one_level(num_bytes: float, n: int, bytes_s: float, hop_s: float) -> float:
    if n == 1:
        return 0.0
    ring = 2 * (n - 1) / n * num_bytes / bytes_s + 2 * (n - 1) * hop_s
    tree = 2 * num_bytes / bytes_s + 2 * math.ceil(math.log2(n)) * hop_s
    return min(ring, tree)


def parse_net(text: str) -> float:
    """`400Gbps`, or `8x400Gbps` for eight adapters a node -> bytes/s per node. Raises UserError."""
    match = re.fullmatch(r"(?:(\d+)x)?(\d+(?:\.\d+)?)\s*([GgMm])(?:bps|b/s|bit/s)", text.strip())
    if not match or float(match.group(2)) == 0 or match.group(1) == "0":
        raise UserError(f"--net {text}: expected the network of one node like 100Gbps or 8x400Gbps (bits)")
    count, rate, unit = match.groups()
    return int(count or 1) * float(rate) * {"g": 1e9, "m": 1e6}[unit.lower()] / 8
