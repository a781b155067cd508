"""The planner's numbers: each measured here, fitted on a few published rows, or published. README.md lists the rows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Roofline:
    """How a training step uses a GPU. Time = 6 FLOP x MACs / (peak x efficiency) + activations x bytes / bandwidth."""

    efficiency: float
    """Share of the peak that convolutions reach."""
    bytes_per_activation: float
    """Memory traffic of a whole step (batch norm, ReLU, additions, both passes) per number a convolution puts out."""


# Two unknowns from two rows each: ResNet-50 and ResNet-152 on one V100 (Lambda): 1276 and 518 images/s in fp16, 432 and
# 167 in fp32. In both precisions the traffic comes out as 14 reads or writes of each activation. fp32's efficiency is
# near 1 because cuDNN's Winograd kernels do fewer multiplications than are counted.
HALF = Roofline(efficiency=0.4537, bytes_per_activation=28.43)
FP32 = Roofline(efficiency=0.9521, bytes_per_activation=54.54)

BACKWARD_SHARE = 2 / 3
"""Of a step's GPU time: two matrix products for each one of the forward pass."""

HOST_S_PER_LAYER = 123e-6
"""CPU seconds to start one layer's part of a step (autocast, forward, backward, SGD). Measured on a CPU, whose own tiny
kernels are in it: bench/results. NVIDIA's ResNet-50 at batch 1: 75 us a layer for the forward pass alone (12.8 ms)."""

NET_EFFICIENCY = 0.8
"""Share of a network's line rate that an all-reduce reaches: the usual figure of nccl-tests, not fitted."""
HOP_S = 15e-6
"""Latency of one message between nodes, and 3 us within one."""
LOCAL_HOP_S = 3e-6
CONTENTION = 0.3
"""Seconds by which a second of all-reduce between nodes slows the backward pass that hides it."""
JITTER = 0.019
"""Standard deviation of a worker's step time as a share of it; the step waits for the slowest. Fitted on DLPerf's
rows for 4 and 8 V100, CONTENTION on those for 16."""

BUCKET_BYTES = 25 * 2**20
"""DDP's buckets; the first is 1 MiB."""
FIRST_BUCKET_BYTES = 2**20
LOADER_SHARPNESS = 8.0
"""How suddenly the loader becomes the limit: rate = (net^-p + loader^-p)^(-1/p). Fitted on two rows."""

IMAGES_PER_CORE = {"native": {128: 1393, 160: 1397, 224: 1210}, "ffcv": {128: 767, 160: 748, 224: 700}}
"""Training images that one core decodes and crops in a second, by decoder and crop, px: bench/results/loader_cpu2."""
BYTES_PER_IMAGE = 110e3
"""A stored ImageNet training JPEG, same place."""

RESTART_S = 24.0
"""From a lost node to the first new step: 22 to 26 s in eight runs of three nodes (cut link, raylet killed, node
killed), without the reading of a checkpoint and with small nets. Hundreds of workers take longer: --restart-s."""
SNAPSHOT_BYTES_S = 10e9
"""GPU to host over PCIe 4, pinned: what a checkpoint holds the loop up for. Not measured: no GPU here."""
WRITE_BYTES_S = 86e6
"""torch.save, fsync and digest of a checkpoint, in the background; one virtual machine's disk: bench/results."""

NODE_MTBF_H = 6300.0
"""Hours between unexpected failures of one 8-GPU node: Llama 3's training saw 419 in 54 days on 16,384 H100
(Grattafiori et al. 2024, section 3.3.4): one in 50,700 GPU hours."""
