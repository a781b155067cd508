"""The model against published figures. A constant was fitted on the `fitted` rows; all others are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from resnet_dist.models.summary import summarise
from resnet_dist.planner.hardware import JITTER, Links, gpu_of_name
from resnet_dist.planner.step import exchange, expected_maximum, produced, roofline_s, throttled


@dataclass(frozen=True)
class Single:
    """Images/s of one GPU, or of one of eight."""

    net: str
    gpu: str
    half: bool
    images_s: float
    source: str


@dataclass(frozen=True)
class Pair:
    """ResNet-50 and ResNet-152 on one GPU, from one source: the first is given, the second predicted."""

    gpu: str
    half: bool
    resnet50: float
    resnet152: float
    source: str
    fitted: str = ""


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
PAIRS = (
    Pair("v100", True, 1276, 518, LAMBDA, "HALF"),
    Pair("v100", False, 432, 167, LAMBDA, "FP32"),
    Pair("a100-40", True, 2075, 886, LAMBDA),
    Pair("a6000", True, 1404, 592, LAMBDA),
    Pair("a6000", False, 554, 235, LAMBDA),
    Pair("rtx3090", True, 1218, 501, TIMM),
    Pair("rtx8000", True, 1023, 431, LAMBDA),
    Pair("rtx8000", False, 371, 150, LAMBDA),
    Pair("rtx2080ti", True, 770, 297, LAMBDA),
    Pair("rtx2080ti", False, 321, 122, LAMBDA),
    Pair("p100", False, 219, 91.8, "TensorFlow benchmarks 2017"),
)

SINGLES = (
    Single("resnet50", "v100", True, 1200, NVIDIA),
    Single("resnet50", "v100", False, 367, NVIDIA),
    Single("resnet50", "a100-40", True, 2075, LAMBDA),
    Single("resnet50", "a100", True, 2470, NVIDIA),
    Single("resnet50", "a100", True, 3255, "MLPerf 2.0, 8 GPUs in 28.7 min, 35 epochs"),
    Single("resnet50", "h100", True, 6938, "MLPerf 3.0, 8 GPUs in 13.466 min, 35 epochs"),
    Single("resnet50", "a6000", True, 1404, LAMBDA),
    Single("resnet50", "rtx3090", True, 1218, TIMM),
    Single("resnet50", "rtx8000", True, 1023, LAMBDA),
    Single("resnet50", "rtx2080ti", True, 770, LAMBDA),
)


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
    for p in PAIRS:
        gpu = gpu_of_name(p.gpu)
        ratio = roofline_s(summarise("resnet50"), gpu, half=p.half) / roofline_s(
            summarise("resnet152"), gpu, half=p.half
        )
        rows.append(Row(f"{p.gpu}, {_precision(p.half)}", p.resnet50 * ratio, p.resnet152, p.fitted, p.source))
    return rows


def single_rows() -> list[Row]:
    return [
        Row(
            f"{s.net}, {s.gpu}, {_precision(s.half)}",
            1 / roofline_s(summarise(s.net), gpu_of_name(s.gpu), half=s.half),
            s.images_s,
            "",
            s.source,
        )
        for s in SINGLES
    ]


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
