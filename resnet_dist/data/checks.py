"""Checks of a run's data: classes, how pictures were converted, no overlap of training and validation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.beton.class_names import difference
from data_prep.beton.contents import find_overlap, read_contents
from data_prep.beton.digest import parse_digest
from data_prep.beton.manifest import Manifest
from data_prep.pixels import PictureSettings
from data_prep.shown import few
from resnet_dist.config.loading import recipe_from_tree
from resnet_dist.config.recipe import FROM_DATA, Recipe
from resnet_dist.errors import UserError

NO_CLASS_NAMES = "keeps no class names (an earlier version wrote it), so they are not compared with the data's"
"""Classes named in a message."""


def data_digest(train: Manifest, val: Manifest) -> str:
    """The data's part of a run's identity."""
    return f"train={short(train.digest)} val={short(val.digest)}"


def short(digest: str) -> str:
    """The hex digits of `kind:hex` that identify the data in a run: 16 for betons of earlier versions."""
    return parse_digest(digest).short


def require_classes(recipe: Recipe, manifest: Manifest, beton: Path | str) -> None:
    num_classes = len(manifest.class_names)
    if num_classes != recipe.model.num_classes:
        raise UserError(
            f"{beton}: holds {num_classes} classes, the recipe's model has model.num_classes = "
            f"{recipe.model.num_classes}; set model.num_classes, or give data with that many classes"
        )


def with_statistics(recipe: Recipe, train: Manifest, beton: Path | str) -> Recipe:
    """The recipe with the training data's numbers, to 0.001 grey levels, for `data.mean` and `data.std` of `from_data`.

    UserError if its manifest does not have them.
    """
    names = [name for name in ("mean", "std") if getattr(recipe.data, name) == FROM_DATA]
    if not names:
        return recipe
    if not train.statistics:
        raise UserError(
            f"{beton}: its manifest has no mean and deviation for data.{' and data.'.join(names)}: from_data; add them "
            f"with `data-prep statistics {beton}`"
        )
    found = {f"data.{name}": [round(level, 3) for level in train.statistics[name]] for name in names}
    try:
        return recipe_from_tree(recipe.model_dump(mode="json"), found)
    except ValueError as error:
        raise UserError(f"{beton}: its mean and deviation are not usable: {error}; set numbers in the recipe") from None


def require_same_classes(train: Manifest, val: Manifest, folder: str) -> None:
    """UserError naming the first label that differs and the classes that one of the two lacks."""
    differ = difference(train.class_names, val.class_names, "train.beton", "val.beton")
    if differ is None:
        return
    lacks = [
        f"{beton} has no {few(repr(name) for name in names if name not in set(others))}; "
        for beton, names, others in (
            ("val.beton", train.class_names, val.class_names),
            ("train.beton", val.class_names, train.class_names),
        )
        if set(names) - set(others)
    ]
    raise UserError(
        f"{folder}: a label does not mean the same class in both betons: {''.join(lacks)}{differ}; convert "
        f"val.beton again with --classes {folder}/train.beton"
    )


def require_classes_of(
    model: str, class_names: tuple[str, ...] | None, manifest: Manifest, beton: Path, way_out: str
) -> str | None:
    """UserError if the data's classes are not the model's, in its order; a warning if the model knows none (None)."""
    if class_names is None:
        return f"{model}: {NO_CLASS_NAMES}"
    differ = difference(class_names, manifest.class_names, model, str(beton))
    if differ is not None:
        raise UserError(f"{beton}: does not have the model's classes: {differ}; {way_out}")
    return None


def picture_settings(manifest: Manifest) -> dict[str, Any]:
    """How its pictures were converted to pixels, which has to be done to any other picture shown to the model too.

    `exif` and `background` as `data_prep.pixels.PictureSettings` has them, and `max_side`. For a beton that was merged
    from betons with different settings, the defaults where they differ. UserError for values that conversion does not
    know.
    """
    conversions = _conversions(manifest.settings)
    found = {**PictureSettings().as_dict(), "max_side": None}
    for key in found:
        values = [settings.get(key, found[key]) for settings in conversions]
        if values and all(value == values[0] for value in values):
            found[key] = values[0]
    if known_pictures(found) is None:
        raise UserError(f"a manifest's settings {found} are not ones that data-prep writes; make the beton again")
    return found


def known_pictures(values: Any) -> dict[str, Any] | None:
    """`values`, if they are what `picture_settings` returns."""
    if not isinstance(values, Mapping) or "exif" not in values:
        return None
    side = values.get("max_side")
    try:
        PictureSettings.from_dict(values)
    except (ValueError, TypeError):
        return None
    return dict(values) if side is None or (type(side) is int and side > 0) else None


def mixed_pictures(manifest: Manifest, beton: str) -> str | None:
    """A warning if the beton was merged from betons whose pictures were converted differently."""
    for key, default in {"exif": "ignore", "background": None}.items():
        values = [settings.get(key, default) for settings in _conversions(manifest.settings)]
        if any(value != values[0] for value in values):
            return f"{beton}: was merged from betons with different settings of --{key}; convert them alike"
    return None


def other_pictures(first: Mapping[str, Any], second: Mapping[str, Any], in_first: str, in_second: str) -> str | None:
    """A warning if EXIF orientations or transparent pixels were treated differently; both as `picture_settings`."""
    for key in ("exif", "background"):
        if first.get(key) != second.get(key):
            return (
                f"{in_first} was converted with --{key} {first.get(key)}, {in_second} with {second.get(key)}: the "
                "model sees other pixels than it was trained on; convert both alike"
            )
    return None


def _conversions(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The settings of every conversion that a beton's samples went through: a merged one has its inputs'."""
    inputs = settings.get("inputs")
    if not isinstance(inputs, list):
        return [settings]
    return [leaf for part in inputs if isinstance(part, dict) for leaf in _conversions(part)]


def empty_classes(manifest: Manifest, beton: str) -> str | None:
    """A warning that names the classes without images; None if every class has some."""
    empty = [name for name, count in zip(manifest.class_names, manifest.class_counts, strict=True) if not count]
    return f"{beton}: has no images of {few(map(repr, empty))}" if empty else None


WARNED_RATIO = 10
"""`lopsided` warns if a class has more than this many times the images of another. ImageNet: 1,300 to 732."""


def lopsided(recipe: Recipe, train: Manifest, beton: str) -> str | None:
    """A warning if the training set is lopsided and the recipe does nothing about it."""
    if recipe.data.sampling is not None or recipe.train.loss.class_weights is not None:
        return None
    counts = sorted((n, name) for n, name in zip(train.class_counts, train.class_names, strict=True) if n)
    (least, rare), (most, frequent) = counts[0], counts[-1]
    if most <= WARNED_RATIO * least:
        return None
    return (
        f"{beton}: is lopsided: {most:,} images of {frequent!r}, {least:,} of {rare!r}; consider "
        "data.sampling.kind=balanced or train.loss.class_weights=balanced, and judge by val/balanced_top1"
    )


def with_class_weights(recipe: Recipe, train: Manifest) -> Recipe:
    """The recipe with numbers for `train.loss.class_weights: balanced`: n / (C * n_c) to six digits, of n images in C
    classes, n_c in class c. Classes without images are not counted, and have weight 1, which nothing uses."""
    loss, counts = recipe.train.loss, train.class_counts
    if loss.class_weights != "balanced":
        return recipe
    mean_count = train.num_samples / sum(n > 0 for n in counts)
    weights = tuple(float(f"{mean_count / n:.6g}") if n else 1.0 for n in counts)
    loss = loss.model_copy(update={"class_weights": weights})
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"loss": loss})})


MAX_SHARE = 0.01
"""Largest share of the validation samples that may also be in the training data. Real data sets have some doubles."""
_WAY_OUT = "split the data again, or set data.allow_overlap=true if this is intended"


def check_overlap(train: Manifest, val: Manifest, train_source: str, val_source: str, *, allow: bool) -> str | None:
    """A warning about samples that both have, found by the digests of their files, so only equal files count.

    UserError if there are too many, unless the recipe allows it.
    """
    if train.digest == val.digest:
        return _warn_or_refuse(f"{train_source} and {val_source} are the same data (digest {val.digest})", allow)
    contents = [read_contents(source, manifest) for source, manifest in ((train_source, train), (val_source, val))]
    if contents[0] is None or contents[1] is None:
        lacking = train_source if contents[0] is None else val_source
        return (
            f"whether {train_source} and {val_source} share images was not checked: {lacking} was made without "
            "<name>.samples.bin, which tells them apart; convert it again to know"
        )
    found = find_overlap(contents[1], contents[0])
    if found is None:
        return None
    here, there = found.first
    what = (
        f"{found.num_shared:,} of {found.num_samples:,} samples of {val_source} ({found.share:.2%}) are in "
        f"{train_source} too (first: sample {here} is its sample {there})"
    )
    if found.share <= MAX_SHARE:
        return what
    return _warn_or_refuse(f"{what}; at most {MAX_SHARE:.0%} may be", allow)


def _warn_or_refuse(what: str, allow: bool) -> str:
    if not allow:
        raise UserError(f"{what}: accuracy there says nothing about new images; {_WAY_OUT}")
    return f"{what}; data.allow_overlap is set: accuracy there says nothing about new images"


def training_data_note(data: Manifest, beton: Path, trained_on: str) -> str | None:
    """A warning if a model is evaluated on the data it was trained on. `trained_on`: its identity's `data_digest`."""
    if f"train={short(data.digest)}" not in trained_on.split():
        return None
    return f"{beton}: the model was trained on it: accuracy there says nothing about new images"
