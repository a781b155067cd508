"""One source becomes train.beton and val.beton: no image is in both, and none changes sides later."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.beton.manifest import load_manifest
from data_prep.beton.paths import read_paths
from data_prep.converter.context import ThisProcess
from data_prep.converter.convert import ConvertReport
from data_prep.converter.split import SplitRule, convert_splits, draw_val
from data_prep.converter.verify import verify
from data_prep.errors import Fault, Interrupted, UserError
from data_prep.runtime.stop import StopFlag
from data_prep.sources import SourceOptions

ALONE = np.arange(100_000)
"""No two files are equal."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 images of `cat`, 20 of `dog`, 2 of `emu`, 1 of `owl`, all of one size in bytes and none equal to another."""
    root = tmp_path_factory.mktemp("split") / "tree"
    for label, (name, count) in enumerate({"cat": 20, "dog": 20, "emu": 2, "owl": 1}.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8), (label, number, 99)).save(root / name / f"{number:02d}.bmp")
    return root


def divided(tree: Path, folder: Path, **rule: object) -> dict[str, ConvertReport]:
    return convert_splits("image-folder", folder, SplitRule(**rule), input=str(tree))  # type: ignore[arg-type]


def sides(folder: Path) -> dict[str, str]:
    """Path -> its split, by the betons in a folder."""
    found: dict[str, str] = {}
    for beton in sorted(folder.glob("*.beton")):
        for path in read_paths(str(beton), load_manifest(beton)) or ():
            assert found.setdefault(path, beton.stem) == beton.stem
    return found


def labels(*counts: int) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)


# --- the draw ---------------------------------------------------------------------------------------------------------


def test_about_the_share_of_each_class_is_drawn() -> None:
    keys = [f"{number}.jpg" for number in range(30_000)]
    is_val = draw_val(keys, labels(10_000, 20_000), ALONE[:30_000], 0.2, 0)
    assert abs(is_val[:10_000].mean() - 0.2) < 0.015
    assert abs(is_val[10_000:].mean() - 0.2) < 0.015
    other = draw_val(keys, labels(10_000, 20_000), ALONE[:30_000], 0.2, 1)
    assert abs((is_val & other).mean() - 0.04) < 0.01
    more = draw_val(keys, labels(10_000, 20_000), ALONE[:30_000], 0.3, 0)
    assert (is_val <= more).all()


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_class_has_images_on_both_sides_and_a_single_one_trains(share: float) -> None:
    keys = [f"{number}" for number in range(60)]
    classes = labels(1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 5, 8, 20)
    is_val = draw_val(keys, classes, ALONE[:60], share, 7)
    num_val, total = np.bincount(classes[is_val], minlength=13), np.bincount(classes)
    assert num_val[:2].tolist() == [0, 0]
    assert (num_val[2:] >= 1).all()
    assert (num_val[2:] < total[2:]).all()


def test_images_that_are_added_move_no_other() -> None:
    keys = [f"{number}.jpg" for number in range(4_000)]
    classes = np.arange(4_000) % 4
    before = draw_val(keys[:200], classes[:200], ALONE[:200], 0.2, 0)
    for count in (300, 1_000, 4_000):
        after = draw_val(keys[:count], classes[:count], ALONE[:count], 0.2, 0)
        assert (after[:200] == before).all()
    few = [draw_val(keys[:count], np.zeros(count, int), ALONE[:count], 0.05, 0) for count in range(2, 60)]
    for old, new in pairwise(few):  # a class too small for its share: only to train, one at a time
        assert (new[: len(old)] != old).sum() <= 1
        assert not (new[: len(old)] > old)[2:].any()


def test_copies_count_as_one_image() -> None:
    keys = [f"{number}" for number in range(1_000)]
    first = np.where(ALONE[:1_000] % 10 == 9, ALONE[:1_000] - 9, ALONE[:1_000])
    is_val = draw_val(keys, np.zeros(1_000, int), first, 0.5, 0)
    alone = draw_val(keys, np.zeros(1_000, int), ALONE[:1_000], 0.5, 0)
    assert (is_val == is_val[first]).all()
    assert (is_val <= alone).all()
    assert draw_val(["a", "b"], np.zeros(2, int), np.zeros(2, int), 0.5, 0).tolist() == [False, False]


# --- both betons ------------------------------------------------------------------------------------------------------


def test_a_folder_becomes_two_betons_and_the_command_resumes(tree: Path, tmp_path: Path) -> None:
    made = divided(tree, tmp_path / "out", val_share=0.3)
    found = sides(tmp_path / "out")
    assert len(found) == 43
    assert list(made) == ["train", "val"]
    train, val = (made[name].manifest for name in made)
    assert train.class_names == val.class_names == ("cat", "dog", "emu", "owl")
    assert (train.class_counts[2:], val.class_counts[2:]) == ((1, 1), (1, 0))
    assert made["train"].notes == (
        f"{tree}: 43 images: train {train.num_samples} ({train.num_samples / 43:.1%}), "
        f"val {val.num_samples} ({val.num_samples / 43:.1%})",
        "1 class without images in val: owl",
    )
    expected = {"of": "all", "val_share": 0.3, "seed": 0, "copies": 0}
    assert val.source["selected"] == {"split": {**expected, "split": "val"}}
    assert (train.source["split"], val.source["split"]) == ("train", "val")
    again = divided(tree, tmp_path / "out", val_share=0.3)
    assert all(report.already_done for report in again.values())
    for name in ("train", "val"):
        (tmp_path / f"out/{name}.beton").unlink()
        (tmp_path / f"out/{name}.manifest.json").unlink()
        assert divided(tree, tmp_path / "out", val_share=0.3)[name].manifest == made[name].manifest
        report = verify(tmp_path / f"out/{name}.beton", source="image-folder", input=str(tree))
        assert (report.ok, report.num_decoded) == (True, made[name].manifest.num_samples)
    with pytest.raises(UserError, match=r"train.beton: exists and was made from another source or with other settings"):
        divided(tree, tmp_path / "out", val_share=0.3, seed=1)


@pytest.mark.parametrize("num_items", [0, 1, 2, 3, 4])
def test_a_stopped_division_resumes_with_the_same_result(tree: Path, tmp_path: Path, num_items: int) -> None:
    class StopAfter(ThisProcess):
        done = 0

        def run(self, task: Any, job: Any, items: Any) -> Any:
            for report in super().run(task, job, items):
                if StopAfter.done == num_items:
                    raise Interrupted(15)
                StopAfter.done += 1
                yield report

    expected = {name: report.manifest for name, report in divided(tree, tmp_path / "whole", val_share=0.3).items()}
    with pytest.raises(Interrupted):
        convert_splits("image-folder", tmp_path / "out", SplitRule(0.3), input=str(tree), workers=StopAfter(StopFlag()))
    again = divided(tree, tmp_path / "out", val_share=0.3)
    assert {name: report.manifest for name, report in again.items()} == expected
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == []


def test_a_source_that_changes_meanwhile_gives_no_beton(tree: Path, tmp_path: Path) -> None:
    class AddImage(ThisProcess):
        def run(self, task: Any, job: Any, items: Any) -> Any:
            shutil.copy(tree / "cat/00.bmp", tmp_path / "tree/cat/new.bmp")
            return super().run(task, job, items)

    shutil.copytree(tree, tmp_path / "tree")
    with pytest.raises(Fault, match="changed while it was being converted; no beton was written"):
        convert_splits(
            "image-folder", tmp_path / "out", SplitRule(0.3), input=str(tmp_path / "tree"), workers=AddImage(StopFlag())
        )
    assert list((tmp_path / "out").glob("*.beton")) == []


def test_copies_are_on_one_side_with_both_named(tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree, tmp_path / "tree")
    divided(tmp_path / "tree", tmp_path / "before", val_share=0.5)
    before = sides(tmp_path / "before")
    for number in range(20):
        shutil.copy(tmp_path / f"tree/cat/{number:02d}.bmp", tmp_path / f"tree/dog/copy-{number:02d}.bmp")
    made = divided(tmp_path / "tree", tmp_path / "after", val_share=0.5)
    after = sides(tmp_path / "after")
    assert all(after[f"cat/{n:02d}.bmp"] == after[f"dog/copy-{n:02d}.bmp"] for n in range(20))
    assert {(before[path], after[path]) for path in before if before[path] != after[path]} == {("val", "train")}
    assert "20 files equal to others, all on the side of these: dog/copy-00.bmp is cat/00.bmp" in made["train"].notes
    assert [report.warnings for report in made.values()] == [(), ()]


def test_a_table_divides_and_tells_what_is_on_both_sides(tree: Path, tmp_path: Path) -> None:
    names = sorted(str(path.relative_to(tree)) for path in tree.rglob("*.bmp"))
    splits = ["Test" if number % 5 == 4 else "valid" if number % 5 == 3 else "train" for number in range(len(names))]
    table = tmp_path / "splits.csv"
    rows = [f"{name},x,{split}" for name, split in zip(names, splits, strict=True)]
    table.write_text("\r\n".join(["path,who,split", *rows]))
    shutil.copytree(tree, tmp_path / "tree")
    shutil.copy(tmp_path / "tree" / names[3], tmp_path / "tree" / names[0])  # val -> train
    made = divided(tmp_path / "tree", tmp_path / "out", table=str(table))
    assert sides(tmp_path / "out") == {
        name: {"Test": "test", "valid": "val"}.get(split, "train") for name, split in zip(names, splits, strict=True)
    }
    (warning,) = made["val"].warnings
    assert warning.startswith(
        "1 of 8 samples of val.beton are in train.beton beside it too "
        f"(first: sample 0 ({names[3]}) is its sample 0 ({names[0]})): "
    )
    assert verify(tmp_path / "out/test.beton", source="image-folder", input=str(tmp_path / "tree")).ok


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        (["cat/00.bmp,train"], "names no split for 42 of 43 images, first cat/01.bmp; add lines for them"),
        (["file,split", "cat/00.bmp,train", "cat/00.bmp,val"], "cat/00.bmp is in two splits, train and val"),
        (["file,split", "cat/00.bmp,fold3"], "the columns file, split; none of them names the split"),
        (["a,split,phase", "cat/00.bmp,val,val"], "split, phase all name the split"),
        (["*", "gone.bmp,train"], "names 44 images, of which 1 do not exist: gone.bmp"),
        (["*", "cat/00.bmp"], r"line 44 should be <file>,<train, val or test>: it has no split"),
    ],
)
def test_tables_that_do_not_divide_the_images_are_refused(
    tree: Path, tmp_path: Path, lines: list[str], message: str
) -> None:
    table = tmp_path / "splits.csv"
    images = [f"{path.relative_to(tree)},train" for path in tree.rglob("*.bmp")]
    table.write_text("\n".join("\n".join(images) if line == "*" else line for line in lines))
    with pytest.raises(UserError, match=message):
        divided(tree, tmp_path / "out", table=str(table))


def test_the_columns_of_labels_and_splits_of_one_table_are_understood(tree: Path, tmp_path: Path) -> None:
    """Without a rule a source's own splits become the two betons."""
    names = sorted(str(path.relative_to(tree)) for path in tree.rglob("*.bmp"))
    rows = [f"{name},{name[:3]},{'val' if number % 3 else 'train'}" for number, name in enumerate(names)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,label,split", *rows]))
    options = SourceOptions(labels=str(tmp_path / "labels.csv"))
    convert_splits("image-folder", tmp_path / "out", input=str(tree), options=options)
    assert sides(tmp_path / "out") == {name: "val" if n % 3 else "train" for n, name in enumerate(names)}
    with pytest.raises(UserError, match="holds the splits train, val; say which with --split"):
        convert_splits("image-folder", tmp_path / "two", SplitRule(0.2), input=str(tree), options=options)


def test_any_source_is_divided(tmp_path: Path) -> None:
    made = convert_splits("digits", tmp_path / "digits", SplitRule(0.1), split="train")
    assert sum(report.manifest.num_samples for report in made.values()) == 1442
    assert made["val"].manifest.source["selected"]["split"]["of"] == "train"
    assert verify(tmp_path / "digits/val.beton", source="digits", decode=20).ok
    convert_splits("digits", tmp_path / "own")
    assert load_manifest(tmp_path / "own/val.beton").num_samples == 355
    with pytest.raises(UserError, match="no image would be in val: there are 2, too few"):
        convert_splits("synthetic", tmp_path / "few", SplitRule(0.1), input="n=2,classes=2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--val-share", "0.2", "--output", "a/train.beton"], "give a folder for both, such as a/"),
        (["--val-share", "1", "--output", "a"], "--val-share 1: expected a share between 0 and 1, such as 0.2"),
        (["--val-share", "nan", "--output", "a"], "--val-share nan: expected a share between 0 and 1"),
        (["--val-share", "0.2", "--split-from", "b", "--output", "a"], "give only one of them"),
        (["--split-seed", "2", "--output", "a"], "--split-seed draws the images of --val-share; add that"),
        (["--val-share", "0.2", "--split-seed", "-1", "--output", "a"], "--split-seed -1: expected 0"),
        (["--split", "train", "--output", "a/"], "--split names one split: give --output FILE.beton"),
        (["--output", "a"], "expected a name that ends in .beton, or a folder, a/, for train.beton and val.beton"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    data_prep: Callable[..., object], arguments: list[str], message: str
) -> None:
    result = data_prep("convert", "--source", "digits", "--workers", "0", *arguments)
    assert (result.returncode, message in result.stderr) == (2, True), result.stderr
