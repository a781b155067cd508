"""Known facts about ImageNet's labels, and the check of a source against them: proof that no label is shifted.

ILSVRC2012 has 1,000 classes, named by WordNet ids (wnids) that sort as text into the label order everybody uses (Caffe,
torchvision, TensorFlow Datasets, the Hub); the devkit's own ILSVRC2012_ID is another order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.sources.base import digest_of

WNID = re.compile(r"n\d{8}")
VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")
NUM_CLASSES = 1000
LANDMARKS = {0: "n01440764", 65: "n01751748", 999: "n15075141"}
"""Label -> wnid: tench, sea snake, toilet tissue."""
ALL_WNIDS_DIGEST = "xxh3_128:0feb5bbea9fe086d252c19e1df1cfdac"
"""`digest_of` the 1,000 wnids in label order."""
NUM_TRAIN, NUM_VAL, VAL_PER_CLASS = 1_281_167, 50_000, 50
FIRST_VAL_WNID = LANDMARKS[65]
"""Class of ILSVRC2012_val_00000001."""


def are_wnids(names: Sequence[str]) -> bool:
    return bool(names) and all(WNID.fullmatch(name) for name in names)


def label_map(wnids: Sequence[str]) -> dict[str, int]:
    """Class name -> label."""
    return {wnid: label for label, wnid in enumerate(wnids)}


def check_labels(label_of: Mapping[str, int], labels: NDArray[np.int64], names: Iterable[str], where: str) -> list[str]:
    """What was checked, one line each; empty unless these are 1,000 wnids.

    `names`: the file name of each sample, in the order of `labels`. UserError when a known fact is contradicted.
    """
    if len(label_of) != NUM_CLASSES or not are_wnids(list(label_of)):
        return []
    known = [wnid for wnid in LANDMARKS.values() if wnid in label_of]
    if not known:
        return ["1,000 wnids, none of which is known of ILSVRC2012: another set of classes"]
    for label, wnid in LANDMARKS.items():
        if label_of.get(wnid) != label:
            raise UserError(
                f"{where}: of ImageNet's 1,000 classes {wnid} should be label {label}, here it is "
                f"{label_of.get(wnid, 'none')}: a class is missing, renamed or out of order; fix the classes' names"
            )
    checks = [f"label {label} is {wnid}" for label, wnid in LANDMARKS.items()]
    by_label = sorted(label_of, key=lambda wnid: label_of[wnid])
    whole = digest_of(by_label) == ALL_WNIDS_DIGEST
    checks.append("all 1,000 wnids are ILSVRC2012's" if whole else "but not all 1,000 wnids are those of ILSVRC2012")
    numbers = [VAL_NAME.match(name.rpartition("/")[2]) for name in names] if len(labels) <= NUM_VAL else []
    if numbers and all(numbers):
        checks += _check_val(label_of, labels, [int(match[1]) for match in numbers if match], where)
    elif len(labels) == NUM_TRAIN:
        checks.append(f"{NUM_TRAIN:,} training images")
    return checks


def _check_val(label_of: Mapping[str, int], labels: NDArray[np.int64], numbers: list[int], where: str) -> list[str]:
    checks = []
    if 1 in numbers:
        label = int(labels[numbers.index(1)])
        if label != label_of[FIRST_VAL_WNID]:
            raise UserError(
                f"{where}: ILSVRC2012_val_00000001 should be {FIRST_VAL_WNID} (label {label_of[FIRST_VAL_WNID]}), here "
                f"it has label {label}: the labels are in another order; check the devkit, solution or label file"
            )
        checks.append(f"ILSVRC2012_val_00000001 is {FIRST_VAL_WNID}")
    if len(numbers) == NUM_VAL:
        counts = np.bincount(labels, minlength=NUM_CLASSES)
        if (counts != VAL_PER_CLASS).any():
            label = int(np.flatnonzero(counts != VAL_PER_CLASS)[0])
            raise UserError(
                f"{where}: each class should have {VAL_PER_CLASS} of the {NUM_VAL:,} validation images, label {label} "
                f"has {counts[label]}; check the devkit, solution or label file"
            )
        checks.append(f"{VAL_PER_CLASS} validation images in each class")
    return checks
