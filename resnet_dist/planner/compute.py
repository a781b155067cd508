"""How long a GPU takes for a micro-batch by itself."""

from __future__ import annotations

from functools import cache

from resnet_dist.planner.constants import FP32, HALF, HOST_S_PER_LAYER, Roofline
from resnet_dist.planner.gpus import GPUS, Gpu
from resnet_dist.planner.workload import Net, net_of


def roofline_s(net: Net, gpu: Gpu, *, half: bool) -> float:
    """Seconds of training per image from the data sheet alone."""
    roofline, tflops = (HALF, gpu.half_tflops) if half else (FP32, gpu.fp32_tflops)
    return roofline_time(net, roofline, tflops=tflops, gb_s=gpu.bandwidth_gb_s)


def roofline_time(net: Net, roofline: Roofline, *, tflops: float, gb_s: float) -> float:
    arithmetic = 6 * net.macs / (tflops * 1e12 * roofline.efficiency)
    traffic = net.activations * roofline.bytes_per_activation / (gb_s * 1e9)
    return arithmetic + traffic


def image_s(net: Net, gpu: Gpu, *, half: bool) -> float:
    """Seconds of training per image: the data sheet's, scaled so that ResNet-50 comes out as published for the GPU.

    For a GPU without a published figure, as published for the A100 (fp32: the V100): what PyTorch leaves of the sheet.
    """
    known = gpu
    if (gpu.resnet50_half if half else gpu.resnet50_fp32) is None:
        known = GPUS["a100" if half else "v100"]
    published = known.resnet50_half if half else known.resnet50_fp32
    assert published is not None
    return roofline_s(net, gpu, half=half) / (published * roofline_s(_resnet50(), known, half=half))


@cache
def _resnet50() -> Net:
    return net_of("resnet50")


def host_s(net: Net) -> float:
    """The host's time to start one micro-batch's layers: the GPU is never faster than that."""
    return net.layers * HOST_S_PER_LAYER
