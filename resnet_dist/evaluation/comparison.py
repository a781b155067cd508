"""Measured accuracy beside the published one: whether a preparation of ImageNet and its evaluation are right, and what
usually is the cause if they are not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.beton.manifest import Manifest
from resnet_dist.config.recipe import CenterCrop, Recipe
from resnet_dist.errors import UserError
from resnet_dist.weights.published import Published

TOLERANCE = 0.05
"""Points of accuracy: 25 of 50,000 images. Other kernels and number formats move a handful across a border."""
NUM_VAL = 50_000
_WNID = re.compile(r"n\d{8}")
_FIRST_WNID, _LAST_WNID = "n01440764", "n15075141"
_SAME_WORDS = 0.9
"""Share of the class names in words that agree with the published ones if the order is the same: spelling differs."""
Verdict = Literal["right", "differs", "not comparable"]


@dataclass(frozen=True)
class Comparison:
    top1: float
    top5: float
    """Published, percent."""
    difference_top1: float
    difference_top5: float
    """Measured less published, points."""
    verdict: Verdict
    reasons: tuple[str, ...]
    """Why it is not comparable, or what may be the cause of the difference."""

    def sentence(self) -> str:
        how = {
            "right": "data and evaluation are right",
            "differs": f"more than {TOLERANCE} points apart: {'; '.join(self.reasons)}",
            "not comparable": f"not comparable: {'; '.join(self.reasons)}",
        }
        return (
            f"published top-1 {self.top1:.2f} %  top-5 {self.top5:.2f} %; measured {self.difference_top1:+.2f} and "
            f"{self.difference_top5:+.2f}: {how[self.verdict]}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON; numbers to four digits."""
        numbers = ("top1", "top5", "difference_top1", "difference_top5")
        return {
            **{key: round(getattr(self, key), 4) for key in numbers},
            "verdict": self.verdict,
            "reasons": list(self.reasons),
        }


def compare(
    known: Published, recipe: Recipe, protocol: str, crop: CenterCrop, manifest: Manifest, metrics: Mapping[str, float]
) -> Comparison | None:
    """None if no accuracy was published. `crop`: of the protocol; `metrics`: `val/top1` and `val/top5` in percent."""
    if known.top1 is None or known.top5 is None:
        return None
    top1, top5 = metrics["val/top1"] - known.top1, metrics["val/top5"] - known.top5
    agrees = max(abs(top1), abs(top5)) <= TOLERANCE + 1e-9
    changed = _other_evaluation(known, recipe, protocol, crop)
    causes = changed + _of_the_data(manifest)
    if changed or manifest.num_samples != NUM_VAL:
        verdict: Verdict = "not comparable"
        if manifest.num_samples != NUM_VAL:
            error = 2 * 100 * math.sqrt(known.top1 / 100 * (1 - known.top1 / 100) / manifest.num_samples)
            causes.insert(
                0,
                f"{manifest.num_samples:,} images instead of {NUM_VAL:,}, whose choice alone moves top-1 by up to "
                f"{error:.2f} points (19 times of 20)",
            )
    elif agrees:
        verdict, causes = "right", []
    else:
        verdict = "differs"
        causes = causes or [
            "usual causes are the order of the classes, pictures that were resized or encoded again before the "
            "conversion, and another set of images"
        ]
        if metrics["val/top1"] < 1:
            causes.insert(0, "it is at chance, so the classes are probably in another order")
    return Comparison(known.top1, known.top5, top1, top5, verdict, tuple(causes))


def _other_evaluation(known: Published, recipe: Recipe, protocol: str, crop: CenterCrop) -> list[str]:
    """How the evaluation differs from the published one."""
    found = []
    if protocol != "1-crop":
        found.append(f"the published accuracy is of one central crop, not of {protocol}")
    if (crop.size, crop.resize) != (known.size, known.resize):
        found.append(f"published with size {known.size} of {known.resize} px, not {crop.size} of {crop.resize}")
    if crop.interpolation != known.interpolation:
        found.append(f"published with {known.interpolation} interpolation, not {crop.interpolation}")
    if (recipe.data.mean, recipe.data.std) != (known.mean, known.std):
        found.append("published with another mean and deviation (data.mean, data.std)")
    if recipe.data.decoder != "native":
        found.append(f"the pixels are of the decoder {recipe.data.decoder}, which are not quite Pillow's")
    return found


def _of_the_data(manifest: Manifest) -> list[str]:
    """What the conversion did to the pictures that moves accuracy."""
    settings, found = manifest.settings, []
    if settings.get("max_side"):
        found.append(f"pictures were shrunk to {settings['max_side']} px (--max-side)")
    if again := manifest.num_samples - manifest.num_untouched - manifest.mode_counts.get("raw", 0):
        found.append(f"{again:,} images were encoded again as JPEG, quality {settings.get('quality')}")
    if settings.get("exif") == "apply":
        found.append("pictures were rotated by EXIF, which the published evaluation does not do")
    if settings.get("inputs"):
        found.append("it was merged from other betons")
    if manifest.quarantined:
        found.append(f"{len(manifest.quarantined):,} damaged images were left out")
    if manifest.num_samples == NUM_VAL and set(manifest.class_counts) != {NUM_VAL // manifest.num_classes}:
        found.append(
            f"classes have {min(manifest.class_counts)} to {max(manifest.class_counts)} images instead of 50 each"
        )
    return found


def require_imagenet_order(manifest: Manifest, beton: Path, known: Published) -> str | None:
    """UserError if the class names show another order than ImageNet's, that of the sorted wnids; a warning if they show
    nothing."""
    names = manifest.class_names
    remedy = "convert it again with the classes in that order (--classes FILE), or add --ignore-class-names"
    if all(_WNID.fullmatch(name) for name in names):
        if list(names) != sorted(names):
            label = next(k for k, name in enumerate(sorted(names)) if names[k] != name)
            raise UserError(
                f"{beton}: label {label} is {names[label]}, in ImageNet's order (wnids sorted as text) it is "
                f"{sorted(names)[label]}; {remedy}"
            )
        if (names[0], names[-1]) != (_FIRST_WNID, _LAST_WNID):
            raise UserError(
                f"{beton}: its first and last classes are {names[0]} and {names[-1]}, ImageNet's are {_FIRST_WNID} and "
                f"{_LAST_WNID}: other classes than the weights'; {remedy}"
            )
        return None
    if known.class_names is not None and len(known.class_names) == len(names):
        same = [_words(one) == _words(other) for one, other in zip(names, known.class_names, strict=True)]
        if sum(same) >= _SAME_WORDS * len(names):
            return None
        if len({_words(name) for name in names} & {_words(name) for name in known.class_names}) > len(names) // 2:
            label = same.index(False)
            raise UserError(
                f"{beton}: label {label} is {names[label]!r}, the weights' is {known.class_names[label]!r}; {remedy}"
            )
    return f"{beton}: its class names ({names[0]!r}, ...) do not show whether they are in ImageNet's order"


def _words(name: str) -> str:
    """The first synonym."""
    return name.split(",")[0].strip().lower().replace("_", " ")
