"""ImageNet as Kaggle's imagenet-object-localization-challenge unpacks it.

`--input` is the folder with `ILSVRC/Data/CLS-LOC/{train,val,test}`, `LOC_synset_mapping.txt` (the classes: wnid and
words, one per line) and `LOC_val_solution.csv` (the classes of the images in `val`, which has no class folders).
"""

from __future__ import annotations

from itertools import islice
from typing import Self

from data_prep.errors import UserError
from data_prep.shown import shown
from data_prep.sources.base import NO_OPTIONS, SourceOptions
from data_prep.sources.file_source import is_image_name
from data_prep.sources.files.find import storage_path
from data_prep.sources.files.paths import StoragePath
from data_prep.sources.files.table import read_lines, read_table
from data_prep.sources.image_folder import ClassFolders, FolderFiles, list_classes
from data_prep.sources.imagenet import WNID
from data_prep.sources.splits import SplitRequest, choose_split

IMAGES = "ILSVRC/Data/CLS-LOC"
SYNSETS = "LOC_synset_mapping.txt"
VAL_SOLUTION = "LOC_val_solution.csv"


class Kaggle(FolderFiles):
    @classmethod
    def open(cls, location: str, split: SplitRequest, options: SourceOptions = NO_OPTIONS) -> Self:
        given = storage_path(location)
        images = given.child(IMAGES)
        if images.kind() != "folder":
            raise UserError(f"--input {given.shown}: holds no {IMAGES}; expected the unpacked Kaggle download")
        available = [name for name in images.subfolders() if name in ("train", "val", "test")]
        if not available:
            raise UserError(f"{images.shown}: holds neither train nor val")
        name = choose_split(available, split, given.shown)
        if name == "test":
            raise UserError(
                f"{given.shown}: the labels of the test images were never published; choose another --split"
            )
        class_names = _read_synsets(given.child(SYNSETS))
        root = images.child(name)
        if name == "train":
            found = _list_train(root, class_names)
        else:
            found = _list_val(root, class_names, given.child(VAL_SOLUTION))
        return cls("kaggle", root, name, found.in_order(class_names))


def _list_train(root: StoragePath, class_names: tuple[str, ...]) -> ClassFolders:
    folders = set(root.subfolders())
    if folders != set(class_names):
        odd = min(folders ^ set(class_names))
        where = "is not in" if odd in folders else "has no folder but is in"
        raise UserError(f"{root.shown}: {shown(odd)} {where} {SYNSETS}; the download is incomplete, or was changed")
    found = list_classes(root, class_names)
    found.require_no_empty(root, "the download is incomplete")
    return found


def _list_val(root: StoragePath, class_names: tuple[str, ...], solution: StoragePath) -> ClassFolders:
    """By class and then by name, the order of a validation set with class folders."""
    listed, hidden = root.files(deep=False)
    found = ClassFolders({name: [] for name in class_names}, [], hidden)
    wnids = _read_solution(solution)
    for file in sorted(listed):
        if not is_image_name(file.name):
            found.left_out.append(file.name)
            continue
        wnid = wnids.pop(file.name.rpartition(".")[0], None)
        if wnid is None:
            raise UserError(f"{root.child(file.name).shown}: {solution.shown} has no line for it")
        if wnid not in found.images:
            raise UserError(f"{solution.shown}: {file.name} has the class {wnid}, which {SYNSETS} does not name")
        found.images[wnid].append(file)
    if wnids:
        raise UserError(
            f"{root.shown}: {len(wnids):,} images that {solution.name} names are missing, first {shown(min(wnids))}; "
            "the download is incomplete"
        )
    return found


def _read_synsets(path: StoragePath) -> tuple[str, ...]:
    """The wnids in label order, which is ascending in the published file."""
    wnids = [cells[0].split()[0] for _, cells in read_lines(path)]
    bad = next((wnid for wnid in wnids if not WNID.fullmatch(wnid)), None)
    if bad is not None or not wnids:
        raise UserError(f"{path.shown}: expected lines of a wnid and words, found {shown(bad or 'none')}")
    if wnids != sorted(set(wnids)):
        raise UserError(f"{path.shown}: the wnids should ascend, each once: label 0 is the first of them")
    return tuple(wnids)


def _read_solution(path: StoragePath) -> dict[str, str]:
    """Image name without suffix -> wnid, of lines `<ImageId>,<wnid> <box> [<wnid> <box> ...]`."""
    wnids: dict[str, str] = {}
    for line, cells in islice(read_table(path), 1, None):
        words = cells[1].split() if len(cells) > 1 else []
        if not words or not WNID.fullmatch(words[0]):
            raise UserError(f"{path.shown}: line {line} should be <image>,<wnid> <box>")
        name = cells[0]
        if wnids.setdefault(name, words[0]) != words[0]:
            raise UserError(f"{path.shown}: {shown(name)} has two classes, {wnids[name]} and {words[0]}")
    return wnids
