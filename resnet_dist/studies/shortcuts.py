"""`study shortcuts`: what options A, B and C cost and bring (He et al. 2015, section 4.1 and table 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from resnet_dist.config.profile import Profile
from resnet_dist.models import summarise
from resnet_dist.studies.curves import TRAIN, VAL, curve_of
from resnet_dist.studies.plots import draw_errors
from resnet_dist.studies.record import open_study
from resnet_dist.studies.tables import markdown_table
from resnet_dist.tracking.spool import History

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
                trained = study.train(
                    _NET,
                    lr=0.1,
                    seed=seed,
                    overrides=[f"model.shortcut={option}"],
                    name=f"{_NET}-{option}-seed{seed}",
                )
                histories[option, seed] = trained.history
        curves = [curve_of(histories[option, seeds[0]], f"option {option}", _NET) for option in OPTIONS]
        draw_errors(curves, study.report_folder / "shortcuts.png", max_error=30.0)
        return study.publish(shortcut_report(histories, seeds))


def shortcut_report(histories: Mapping[tuple[str, int], History], seeds: Sequence[int]) -> str:
    """Markdown; counts are made here."""
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
