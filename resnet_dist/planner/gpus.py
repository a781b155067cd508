"""GPUs: what their data sheets say, and how fast ResNet-50 was published to train on one.

Peaks are dense, tensor cores in half precision with sums in fp32 (GeForce cards halve their rate for those sums), and
plain fp32 without TF32, as `train.precision: fp32` runs. Rates are images/s of one GPU alone at 224 px.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from resnet_dist.errors import UserError


@dataclass(frozen=True)
class Gpu:
    memory_gb: int
    bandwidth_gb_s: float
    half_tflops: float
    fp32_tflops: float
    resnet50_half: float | None = None
    """Published images/s of PyTorch in mixed precision; None: reckoned from the data sheet."""
    resnet50_fp32: float | None = None
    local_gb_s: float = 10.0
    """Bus bandwidth of an all-reduce within a node, GB/s per GPU (as nccl-tests reckon it); 10 is PCIe 4."""
    host_bus: bool = False
    """Peers reach each other through the host's memory only: `local_gb_s` is for all GPUs of a node together."""
    source: str = ""


GPUS = {
    "v100": Gpu(
        32, 900, 125, 15.7, 1200, 367, 130, source="NVIDIA DeepLearningExamples, ConvNets, ResNet-50, DGX-1 16 GB"
    ),
    "a100": Gpu(
        80, 2039, 312, 19.5, 2470, None, 235, source="NVIDIA DeepLearningExamples, ConvNets, ResNet-50, DGX A100"
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
    "rtx3090": Gpu(24, 936, 71, 35.6, 1218, None, 6.6, True, "timm benchmark results, AMP, channels last"),
    "rtx4090": Gpu(24, 1008, 165, 82.6, None, None, 6.6, True),
    "rtx8000": Gpu(48, 672, 130, 16.3),
    "rtx2080ti": Gpu(11, 616, 54, 13.4, None, None, 5),
    "p100": Gpu(16, 732, 21.2, 10.6, None, 219, 20, source="TensorFlow benchmarks 2017, DGX-1"),
    "t4": Gpu(16, 320, 65, 8.1, None, None, 5),
}


def gpu_of_name(name: str) -> Gpu:
    """Raises UserError for a name that is not in the table."""
    if gpu := GPUS.get(name.lower()):
        return gpu
    near = difflib.get_close_matches(name.lower(), GPUS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"--gpu {name}: unknown; {hint}known: {', '.join(sorted(GPUS))}")
