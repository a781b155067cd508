"""The model against published figures. A constant was fitted on the `fitted` rows; all others are held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from resnet_dist.models.summary import summarise
from resnet_dist.planner.hardware import JITTER, KERNEL_S, LAUNCH_S, SMALL_KERNEL_S, Links, Speed, gpu_of_name
from resnet_dist.planner.step import (
    Kernels,
    exchange,
    expected_maximum,
    produced,
    roofline_s,
    throttled,
    train_kernels,
)


@dataclass(frozen=True)
class Single:
    """Speed of one GPU, or of one of eight."""

    net: str
    gpu: str
    half: bool
    speed: Speed
    source: str


@dataclass(frozen=True)
class Pair:
    """ResNet-50 and ResNet-152 on one GPU, from one source: the first is given, the second predicted."""

    gpu: str
    half: bool
    resnet50: Speed
    resnet152: Speed
    source: str
    fitted: str = ""


@dataclass(frozen=True)
class Batches:
    """One GPU and net with batches of several sizes: the largest is given, the others predicted."""

    what: str
    kernels: Kernels
    largest: Speed
    others: tuple[Speed, ...]
    source: str
    launches: int = 0
    """By the host, one by one; 0 if another engine starts the kernels, or a CUDA graph."""
    fitted: Mapping[int, str] = field(default_factory=dict)
    """By batch."""


@dataclass(frozen=True)
class Scaling:
    """Images/s of W GPUs over W times those of `base` GPUs, both from one source."""

    net: str
    hardware: str
    half: bool
    batch_per_gpu: int
    base_images_s: float
    images_s: float
    gpus: int
    local_gb_s: float
    source: str
    base_gpus: int = 1
    gpus_per_node: int = 8
    net_gbit_s: float = 0.0
    gradient_bytes: int = 4
    overlapped: bool = True
    synthetic: bool = False
    node_loader_images_s: float | None = None
    host_bus: bool = False
    fitted: str = ""

    @property
    def efficiency(self) -> float:
        return self.images_s / self.gpus / (self.base_images_s / self.base_gpus)


LAMBDA = "Lambda, lambda-tensorflow-benchmark, tf-train-throughput"
NVIDIA = "NVIDIA DeepLearningExamples, ConvNets, ResNet-50"
HOROVOD = "Horovod, docs/benchmarks; one P100 from TensorFlow's benchmarks 2017"
DLPERF = "OneFlow DLPerf, NVIDIA's PyTorch ResNet-50"
TIMM = "timm, results/benchmark-train-amp-nhwc"
TF2017 = "TensorFlow benchmarks 2017"
DDP_BENCH = "W. Paik, pytorch-ddp-bench"
TORCHBENCH = "pytorch/benchmark, pull request 706, January 2022"
SERVER_GEAR = "server-gear.com, tf_cnn_benchmarks"
MXNET = "NVIDIA DeepLearningExamples, MxNet, RN50v1.5"
PAIRS = (
    Pair("v100", True, Speed(1276, 384), Speed(518, 192), LAMBDA, "HALF"),
    Pair("v100", False, Speed(432, 192), Speed(167, 96), LAMBDA, "FP32"),
    Pair("a100-40", True, Speed(2075, 448), Speed(886, 200), LAMBDA),
    Pair("a6000", True, Speed(1404, 512), Speed(592, 256), LAMBDA),
    Pair("a6000", False, Speed(554, 256), Speed(235, 128), LAMBDA),
    Pair("rtx3090", True, Speed(1218, 512), Speed(501, 192), TIMM),
    Pair("rtx8000", True, Speed(1023, 512), Speed(431, 256), LAMBDA),
    Pair("rtx8000", False, Speed(371, 256), Speed(150, 128), LAMBDA),
    Pair("rtx2080ti", True, Speed(770, 128), Speed(297, 64), LAMBDA),
    Pair("rtx2080ti", False, Speed(321, 64), Speed(122, 32), LAMBDA),
    Pair("p100", False, Speed(219, 64), Speed(91.8, 64), TF2017),
)

SINGLES = (
    Single("resnet50", "v100", True, Speed(1200, 256), NVIDIA),
    Single("resnet50", "v100", False, Speed(367, 128), NVIDIA),
    Single("resnet152", "v100", True, Speed(503, 128), DDP_BENCH),
    Single("resnet50", "a100-40", True, Speed(2075, 448), LAMBDA),
    Single("resnet50", "a100", True, Speed(2470, 256), NVIDIA),
    Single("resnet50", "a100", True, Speed(3255, 408), "MLPerf 2.0, 8 GPUs in 28.7 min, 35 epochs"),
    Single("resnet152", "a100", True, Speed(1190, 512), DDP_BENCH),
    Single("resnet50", "h100", True, Speed(6938, 408), "MLPerf 3.0, 8 GPUs in 13.466 min, 35 epochs"),
    Single("resnet50", "a6000", True, Speed(1404, 512), LAMBDA),
    Single("resnet50", "rtx3090", True, Speed(1218, 512), TIMM),
    Single("resnet50", "rtx8000", True, Speed(1023, 512), LAMBDA),
    Single("resnet50", "rtx2080ti", True, Speed(770, 128), LAMBDA),
)

# Kernels over activations, as `train_kernels` counts them, and small ones. A forward pass alone is `Summary.kernels`.
_RESNET50, _RESNET152 = Kernels(402, 196), Kernels(1184, 502)
_RESNET50_HALF_FORWARD = Kernels(174, 54)
# PyTorch's benchmark in 2022: counters of batch norms, zeroed gradients, and an Adam of 8 kernels for each tensor.
_TORCHBENCH = Kernels(402, 173 + 53 + 161 + 8 * 161)

BATCHES = (
    Batches("resnet50, v100, fp32, CUDA graph", _TORCHBENCH, Speed(341.6, 64),
            (Speed(322.2, 32), Speed(285.8, 16), Speed(227.7, 8)), TORCHBENCH, fitted={8: "KERNEL_S"}),
    Batches("resnet50, v100, fp32, eager", _TORCHBENCH, Speed(342.1, 64),
            (Speed(322.9, 32), Speed(286.9, 16), Speed(228.4, 8), Speed(128.1, 4), Speed(64.6, 2), Speed(33.7, 1)),
            TORCHBENCH, launches=sum(_TORCHBENCH), fitted={1: "LAUNCH_S", 2: "LAUNCH_S"}),
    Batches("resnet50, rtx3090, half", _RESNET50, Speed(1205, 512),
            (Speed(1182, 256), Speed(1127, 128), Speed(1027, 64)), SERVER_GEAR, fitted={64: "KERNEL_S"}),
    Batches("resnet50, rtx4090, half", _RESNET50, Speed(1776, 256),
            (Speed(1749, 128), Speed(1688, 64)), SERVER_GEAR, fitted={64: "KERNEL_S"}),
    Batches("resnet50 forward, v100, half", _RESNET50_HALF_FORWARD, Speed(3382, 256),
            (Speed(3249, 128), Speed(2984, 64)), NVIDIA, fitted={64: "KERNEL_S"}),
    Batches("resnet50 forward, t4, half", _RESNET50_HALF_FORWARD, Speed(1198, 256),
            (Speed(1190, 128), Speed(1165, 64), Speed(1128, 32)), NVIDIA, fitted={32: "KERNEL_S"}),
    Batches("resnet50 forward, a100, half", _RESNET50_HALF_FORWARD, Speed(3704, 16),
            (Speed(2522, 8),), MXNET, fitted={8: "KERNEL_S"}),
    Batches("resnet50, p100, fp32", _RESNET50, Speed(219, 64), (Speed(195, 32),), TF2017),
    Batches("resnet152, p100, fp32", _RESNET152, Speed(91.8, 64), (Speed(82.7, 32),), TF2017),
    Batches("resnet50, k80, fp32", _RESNET50, Speed(51.9, 64), (Speed(49.5, 32),), TF2017),
)  # fmt: skip


def _lambda(hardware: str, half: bool, local_gb_s: float, rows: dict[str, tuple[int, dict[int, int]]]) -> list[Scaling]:
    """TensorFlow's `replicated` mode: synthetic images, gradients in the step's precision, summed after the backward
    pass. The link's speed is fitted on ResNet-50 with 8 GPUs in half precision."""
    return [
        Scaling(
            net,
            hardware,
            half,
            batch,
            rates[1],
            rate,
            gpus,
            local_gb_s,
            LAMBDA,
            gradient_bytes=2 if half else 4,
            overlapped=False,
            synthetic=True,
            host_bus=hardware.startswith("RTX 3090"),
            fitted="link" if net == "resnet50" and gpus == 8 and half else "",
        )
        for net, (batch, rates) in rows.items()
        for gpus, rate in rates.items()
        if gpus > 1
    ]


SCALINGS = (
    *_lambda(
        "A100 PCIe",
        True,
        11.1,
        {
            "resnet50": (448, {1: 2075, 2: 4083, 4: 8153, 8: 15997}),
            "resnet152": (200, {1: 886, 2: 1743, 4: 3388, 8: 6485}),
        },
    ),
    *_lambda("A100 PCIe", False, 11.1, {"resnet152": (112, {1: 390, 2: 739, 4: 1427, 8: 2715})}),
    *_lambda(
        "A100 SXM, XLA", True, 18.7, {"resnet50": (448, {1: 1888, 8: 14815}), "resnet152": (224, {1: 878, 8: 6698})}
    ),
    *_lambda(
        "RTX A6000",
        True,
        15.5,
        {"resnet50": (512, {1: 1404, 8: 11057}), "resnet152": (256, {1: 592, 2: 1182, 4: 2330, 8: 4564})},
    ),
    *_lambda(
        "RTX 3090, no NVLink",
        True,
        6.6,
        {
            "resnet50": (96, {1: 1020, 2: 1761, 4: 2783, 8: 3784}),
            "resnet152": (64, {1: 468, 2: 741, 4: 980, 8: 1231}),
        },
    ),
    *_lambda("RTX 3090, no NVLink", False, 6.6, {"resnet152": (48, {1: 212, 2: 310, 4: 413, 8: 517})}),
    *_lambda(
        "RTX 2080 Ti", True, 4.8, {"resnet50": (128, {1: 770, 8: 5540}), "resnet152": (64, {1: 297, 4: 972, 8: 1891})}
    ),
    *_lambda("RTX 2080 Ti", False, 4.8, {"resnet152": (32, {1: 122, 4: 369, 8: 713})}),
    Scaling("resnet50", "V100", False, 128, 367.29, 1449.48, 4, 130, DLPERF, net_gbit_s=100, fitted="JITTER"),
    Scaling("resnet50", "V100", False, 128, 367.29, 2887.65, 8, 130, DLPERF, net_gbit_s=100, fitted="JITTER"),
    Scaling("resnet50", "V100", False, 128, 367.29, 5716.79, 16, 130, DLPERF, net_gbit_s=100, fitted="CONTENTION"),
    Scaling("resnet50", "V100", False, 128, 367.29, 10917.09, 32, 130, DLPERF, net_gbit_s=100),
    Scaling("resnet50", "V100", True, 256, 802.9, 3137.44, 4, 130, DLPERF, net_gbit_s=100, fitted="JITTER"),
    Scaling("resnet50", "V100", True, 256, 802.9, 6154.66, 8, 130, DLPERF, net_gbit_s=100, fitted="JITTER"),
    Scaling("resnet50", "V100", True, 256, 802.9, 11991.94, 16, 130, DLPERF, net_gbit_s=100, fitted="CONTENTION"),
    Scaling("resnet50", "V100", True, 256, 802.9, 22551.16, 32, 130, DLPERF, net_gbit_s=100),
    Scaling("resnet50", "DGX-1, V100 16 GB", False, 128, 367, 2855, 8, 130, NVIDIA, node_loader_images_s=8800),
    Scaling("resnet50", "DGX-1, V100 16 GB", True, 256, 1200, 8322, 8, 130, NVIDIA, node_loader_images_s=8800,
            fitted="loader"),
    Scaling("resnet50", "DGX-1, V100 32 GB", False, 128, 356, 2766, 8, 130, NVIDIA, node_loader_images_s=8800),
    Scaling("resnet50", "DGX-1, V100 32 GB", True, 256, 1156, 8056, 8, 130, NVIDIA, node_loader_images_s=8800),
    Scaling("resnet50", "DGX A100, TF32", False, 256, 938, 7248, 8, 235, NVIDIA, node_loader_images_s=17300),
    Scaling("resnet50", "DGX A100", True, 256, 2470, 16621, 8, 235, NVIDIA, node_loader_images_s=17300,
            fitted="loader"),
    Scaling("resnet50", "P100, 50 GbE", False, 32, 139 * 8, 0.9 * 139 * 256, 256, 20, "Goyal et al. 2017, section 4",
            base_gpus=8, net_gbit_s=50),
    Scaling("resnet101", "P100, 25 GbE", False, 64, 131, 0.9 * 131 * 512, 512, 10, HOROVOD,
            gpus_per_node=4, net_gbit_s=25, synthetic=True),
    Scaling("vgg16", "P100, 25 GbE", False, 64, 154, 0.68 * 154 * 512, 512, 10, HOROVOD,
            gpus_per_node=4, net_gbit_s=25, synthetic=True),
    Scaling("vgg16", "P100, 25 GbE", False, 64, 154, 0.79 * 154 * 128, 128, 10, HOROVOD,
            gpus_per_node=4, net_gbit_s=25, synthetic=True),
)  # fmt: skip


# ---- `resnet-dist bench plan`: predicted against published, as Markdown ----------------------------------------------


@dataclass(frozen=True)
class Row:
    what: str
    predicted: float
    published: float
    fitted: str
    source: str

    @property
    def error(self) -> float:
        """The error relative to the published figure."""
        return self.predicted / self.published - 1


def pair_rows() -> list[Row]:
    rows = []
    resnet50, resnet152 = summarise("resnet50"), summarise("resnet152")
    for p in PAIRS:
        gpu = gpu_of_name(p.gpu)
        ratio = roofline_s(resnet152, gpu, half=p.half) / roofline_s(resnet50, gpu, half=p.half)
        image_s = 1 / p.resnet50.images_s - train_kernels(resnet50, half=p.half).seconds() / p.resnet50.batch
        launch_s = ratio * image_s * p.resnet152.batch + train_kernels(resnet152, half=p.half).seconds()
        predicted = p.resnet152.batch / launch_s
        rows.append(Row(f"{p.gpu}, {_precision(p.half)}", predicted, p.resnet152.images_s, p.fitted, p.source))
    return rows


def single_rows() -> list[Row]:
    rows = []
    for s in SINGLES:
        net = summarise(s.net)
        image_s = roofline_s(net, gpu_of_name(s.gpu), half=s.half)
        launch_s = image_s * s.speed.batch + train_kernels(net, half=s.half).seconds()
        what = f"{s.net}, {s.gpu}, {_precision(s.half)}"
        rows.append(Row(what, s.speed.batch / launch_s, s.speed.images_s, "", s.source))
    return rows


def batch_rows(kernel_s: float = KERNEL_S, launch_s: float = LAUNCH_S) -> list[Row]:
    rows = []
    for b in BATCHES:
        fixed_s = b.kernels.main * kernel_s + b.kernels.small * SMALL_KERNEL_S
        image_s = 1 / b.largest.images_s - fixed_s / b.largest.batch
        for other in b.others:
            step_s = max(other.batch * image_s + fixed_s, b.launches * launch_s)
            what = f"{b.what}: {other.batch} images"
            fitted = b.fitted.get(other.batch, "")
            rows.append(Row(what, other.batch / step_s, other.images_s, fitted, b.source))
    return rows


def scaling_rows() -> list[Row]:
    return [
        Row(
            f"{s.net}, {s.base_gpus} -> {s.gpus} x {s.hardware}, {_precision(s.half)}",
            100 * predicted_efficiency(s),
            100 * s.efficiency,
            s.fitted,
            s.source,
        )
        for s in SCALINGS
    ]


def predicted_efficiency(s: Scaling, jitter: float = JITTER) -> float:
    """Predicted from the published rate of the base."""

    def rate(gpus: int) -> float:
        micro_s = s.batch_per_gpu / (s.base_images_s / s.base_gpus)
        links = Links(s.local_gb_s * 1e9, max(s.net_gbit_s, 1e-9) * 1e9 / 8, s.gpus_per_node, s.host_bus)
        exchanged = exchange(
            produced(summarise(s.net), micro_s, s.gradient_bytes), gpus, links, overlapped=s.overlapped
        )
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
    """The tables, with fitted rows marked, and the mean errors of the held-out rows."""
    lines: list[str] = []
    everything: list[Row] = []
    for title, unit, rows in (
        ("Scaling efficiency", "%", scaling_rows()),
        ("ResNet-152 on one GPU, from ResNet-50 on the same", "images/s", pair_rows()),
        ("One GPU with fewer images, from its speed with most", "images/s", batch_rows()),
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
            _summary(f"{len(held_out)} held-out rows", held_out),
            "",
        ]
    return "\n".join([*lines, _summary(f"{len(everything)} held-out rows of all tables", everything), ""])


def _summary(what: str, rows: Sequence[Row]) -> str:
    largest = max(rows, key=lambda row: abs(row.error))
    return f"Mean error of the {what}: **{mean_error(rows):.1%}**, largest {largest.error:+.1%} ({largest.what})."


def _precision(half: bool) -> str:
    return "half" if half else "fp32"
