"""Studies that compare whole trainings on digits: `study degradation` and `study shortcuts`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.shown import markdown_table
from resnet_dist.config.profile import Profile
from resnet_dist.models import summarise
from resnet_dist.studies.curves import TRAIN, VAL, curve_of, draw_depths, draw_errors
from resnet_dist.studies.study import open_study
from resnet_dist.tracking.spool import History

# ---- `study degradation`: deeper plain nets train worse, deeper ResNets do not (He et al. 2015, 4.1) -----------------

DEPTHS = (8, 20, 32, 44, 56)
SEEDS = (0, 1)
LR, CONTROL_LR = 0.1, 0.01
KINDS = ("plain", "resnet")
_DEGRADATION = (
    "Plain and residual nets of growing depth on real handwritten digits: the degradation that residual learning "
    "removes (He et al. 2015, figures 1, 4 and 6). The trainings are the runs below this one; the table and the "
    "figures are in the folder `report` of its artifacts."
)


@dataclass(frozen=True)
class Training:
    kind: str
    depth: int
    lr: float
    seed: int

    @property
    def net(self) -> str:
        return f"{self.kind}{self.depth}"


def plan_trainings(depths: Sequence[int], seeds: Sequence[int]) -> list[Training]:
    """All trainings, cheap ones first. The control, at a tenth of the learning rate, has the first seed only."""
    runs = [(LR, seed) for seed in seeds] + [(CONTROL_LR, seeds[0])]
    return [Training(kind, depth, lr, seed) for lr, seed in runs for depth in sorted(depths) for kind in KINDS]


def degradation(profile: Profile, depths: Sequence[int] = DEPTHS, seeds: Sequence[int] = SEEDS) -> Path:
    """Runs the missing trainings and returns the report's path. Raises UserError, Fault."""
    histories: dict[Training, History] = {}
    with open_study(profile, "degradation", _DEGRADATION) as study:
        for training in plan_trainings(depths, seeds):
            histories[training] = study.train(training.net, lr=training.lr, seed=training.seed).history
        for lr, seed in dict.fromkeys((training.lr, training.seed) for training in histories):
            curves = [
                curve_of(history, training.net, training.net)
                for training, history in histories.items()
                if (training.lr, training.seed) == (lr, seed)
            ]
            name = f"lr{lr:g}-seed{seed}"
            draw_errors(curves, study.report_folder / f"errors-{name}.png", max_error=100.0)
            draw_depths([curve for curve in curves if curve.is_plain], study.report_folder / f"plain-{name}.png")
        for training, history in histories.items():
            if training.lr == LR and training.seed == seeds[0]:
                study.tracker.metrics({f"{training.kind}/train_error": last(history, TRAIN)}, training.depth)
        return study.publish(degradation_report(histories))


def degradation_report(histories: Mapping[Training, History]) -> str:
    """The report in Markdown: tables of errors, and whether each claim holds. Pure."""
    seeds = sorted({training.seed for training in histories if training.lr == LR})
    depths = sorted({training.depth for training in histories})
    parts = [
        "# Degradation on handwritten digits",
        "",
        "Written by `study degradation`. Plain and residual CIFAR nets of He et al. 2015 on scikit-learn's "
        "digits at 8 px (1,442 training, 355 validation images), 308 steps of 128 images, learning rate divided by "
        "ten after half and three quarters. Training error: mean over the last epoch, as the net saw it; validation "
        "error: after the last step.",
        "",
        f"## Learning rate {LR:g}, seeds {', '.join(map(str, seeds))}",
        "",
        _table(histories, depths, LR, seeds),
        "",
        f"## Control: learning rate {CONTROL_LR:g}, seed {seeds[0]}",
        "",
        _table(histories, depths, CONTROL_LR, seeds[:1]),
        "",
        "## What it shows",
        "",
        *(f"- {line}" for line in findings(histories, depths, seeds)),
        "",
    ]
    return "\n".join(parts)


def findings(histories: Mapping[Training, History], depths: Sequence[int], seeds: Sequence[int]) -> list[str]:
    """Each claim with its numbers, and whether it holds."""
    deepest = depths[-1]
    shallow = next((depth for depth in depths[:-1] if depth >= 20), depths[0])

    def train(kind: str, depth: int, seed: int, lr: float = LR) -> float:
        return last(histories[Training(kind, depth, lr, seed)], TRAIN)

    def compared(claim: str, pairs: list[tuple[str, float, str, float]]) -> str:
        holds = "holds" if all(a > b for _, a, _, b in pairs) else "does not hold"
        return f"{claim}: {holds} ({'; '.join(f'{x} {a:.1f} %, {y} {b:.1f} %' for x, a, y, b in pairs)})"

    plain, residual, shallower = f"plain-{deepest}", f"ResNet-{deepest}", f"plain-{shallow}"
    return [
        compared(
            f"{plain} has a higher training error than {shallower}, every seed",
            [(plain, train("plain", deepest, s), shallower, train("plain", shallow, s)) for s in seeds],
        ),
        compared(
            f"{residual}, with the same parameters as {plain}, has a lower training error, every seed",
            [(plain, train("plain", deepest, s), residual, train("resnet", deepest, s)) for s in seeds],
        ),
        compared(
            "the same at a tenth of the learning rate: the rate is not the cause",
            [
                (
                    plain,
                    train("plain", deepest, seeds[0], CONTROL_LR),
                    residual,
                    train("resnet", deepest, seeds[0], CONTROL_LR),
                )
            ],
        ),
        "That depth *helps* ResNets on new images does not show here: digits are too easy, all nets are right on "
        "nearly every validation image.",
    ]


def last(history: History, key: str) -> float:
    """The newest value; NaN if there is none."""
    points = history.points.get(key)
    return points[-1][1] if points else float("nan")


def _table(histories: Mapping[Training, History], depths: Sequence[int], lr: float, seeds: Sequence[int]) -> str:
    def cell(kind: str, depth: int, key: str, digits: int) -> str:
        return " / ".join(f"{last(histories[Training(kind, depth, lr, seed)], key):.{digits}f}" for seed in seeds)

    columns = ((TRAIN, 1), ("train/loss", 4), (VAL, 1))
    header = ["layers"]
    for title in ("training error %", "training loss", "validation error %"):
        header += [f"plain: {title}", f"ResNet: {title}"]
    rows = [
        [str(depth), *(cell(kind, depth, key, digits) for key, digits in columns for kind in KINDS)] for depth in depths
    ]
    return markdown_table(header, rows)


# ---- `study shortcuts`: cost and benefit of options A, B and C (He et al. 2015, table 3) -----------------------------

OPTIONS = ("A", "B", "C")
COUNTED = ("resnet20", "resnet56", "resnet34", "resnet18")
_NET = "resnet20"
_SHORTCUTS = "Shortcut options A (zero-padding), B (projection where dimensions grow), C (all projections)."


def shortcuts(profile: Profile, seeds: Sequence[int] = SEEDS) -> Path:
    """Trains what is missing and returns the report's path. Raises UserError, Fault."""
    histories: dict[tuple[str, int], History] = {}
    with open_study(profile, "shortcuts", _SHORTCUTS) as study:
        for seed in seeds:
            for option in OPTIONS:
                name, overrides = f"{_NET}-{option}-seed{seed}", [f"model.shortcut={option}"]
                histories[option, seed] = study.train(_NET, lr=0.1, seed=seed, overrides=overrides, name=name).history
        curves = [curve_of(histories[option, seeds[0]], f"option {option}", _NET) for option in OPTIONS]
        draw_errors(curves, study.report_folder / "shortcuts.png", max_error=30.0)
        return study.publish(shortcut_report(histories, seeds))


def shortcut_report(histories: Mapping[tuple[str, int], History], seeds: Sequence[int]) -> str:
    """The report in Markdown, with parameters and multiply-adds counted on the nets."""
    counts = [
        [net, option, f"{summary.parameters:,}", f"{summary.macs / 1e6:,.1f}"]
        for net in COUNTED
        for option in OPTIONS
        for summary in [summarise(net, shortcut=option)]
    ]
    errors = [
        [option, *(_both(histories, option, seeds, key) for key in (TRAIN, "train/loss", VAL))] for option in OPTIONS
    ]
    return (
        "# Shortcut options\n\nWritten by `study shortcuts`.\n\n"
        f"{markdown_table(['net', 'option', 'parameters', 'multiply-adds, 10^6'], counts)}\n\n"
        f"ResNet-20 on digits at 8 px, 308 steps, seeds {', '.join(map(str, seeds))}, as `study degradation`:\n\n"
        f"{markdown_table(['option', 'training error %', 'training loss', 'validation error %'], errors)}\n\n"
        "The paper's differences on ImageNet (25.03, 24.52, 24.19 %) are 0.3 to 0.5 points. One of 355 validation "
        "digits is 0.28 points and seeds differ by more: these errors say nothing about which option is better.\n"
    )


def _both(histories: Mapping[tuple[str, int], History], option: str, seeds: Sequence[int], key: str) -> str:
    digits = 4 if key.endswith("loss") else 1
    return " / ".join(f"{histories[option, seed].points[key][-1][1]:.{digits}f}" for seed in seeds)
