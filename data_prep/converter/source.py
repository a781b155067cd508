"""Opens the source that a command or call names; its classes must be those of the other splits of the data set."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace

from data_prep.beton.class_names import difference
from data_prep.beton.files import BETON
from data_prep.beton.manifest import MANIFEST, Manifest
from data_prep.converter.output import Output, open_output
from data_prep.errors import UserError
from data_prep.sources import SOURCES, SourceOptions, open_source
from data_prep.sources.base import Source
from data_prep.sources.file_source import with_classes
from data_prep.sources.files.find import storage_path
from data_prep.sources.files.table import read_text
from data_prep.sources.label_file import read_class_names
from data_prep.sources.labels import GIVEN
from data_prep.sources.splits import SPLIT_WORDS, SplitRequest, splits_in

SIBLINGS = ("train", "training", "val", "validation", "test")


def open_named(
    name: str,
    location: str | None,
    split: SplitRequest,
    options: SourceOptions,
    classes: str | None = None,
    *,
    skip_unlisted: bool = False,
) -> Source:
    """As `open_source`. `classes`: a file that lists the classes, or a beton that has them.

    UserError when the source cannot be found or understood, or has a class that is not listed (unless `skip_unlisted`
    leaves it out).
    """
    given = {"input": location, "classes": classes, **asdict(options)}
    for option, value in (given | {"split": split.name} if split.explicit else given).items():
        if value is not None and not value.strip():  # `--input "$UNSET"` would mean the current folder
            flag = f"--{option.replace('_', '-')}"
            raise UserError(f"{flag}: is empty; leave it out, or give a value (a shell variable that is not set?)")
    if classes is None:
        if skip_unlisted:
            raise UserError("--skip-unlisted leaves out what --classes FILE does not list; add that")
        return open_source(name, location, split, options)
    if options.class_order is not None:
        raise UserError("--class-order and --classes: both give the order of the classes; leave one out")
    class_names = read_class_list(classes)
    takes_order = name in SOURCES and "class_order" in SOURCES[name].takes
    opened = open_source(name, location, split, replace(options, class_order=GIVEN) if takes_order else options)
    return with_classes(opened, class_names, classes, skip_unlisted=skip_unlisted)


def read_class_list(location: str) -> tuple[str, ...]:
    """Class names by label, from a text file (see `read_class_names`), a beton, or its manifest.

    UserError when there is no such file, or it lists no classes, or one twice.
    """
    if location.endswith(BETON):
        location = location.removesuffix(BETON) + MANIFEST
    place = storage_path(location)
    if location.endswith(".json"):
        return Manifest.from_json(read_text(place), place.shown).class_names
    return read_class_names(place)


def class_notes(class_names: Sequence[str], output: Output) -> list[str]:
    """A note for each split beside a new output that has other classes, or the same in another order.

    `data/val.beton` has the siblings `data/train.beton`, `data/test.beton`, ... UserError if one of those is the
    training set: no training could use both.
    """
    notes: list[str] = []
    with suppress(OSError):  # a folder that cannot be read is reported when the conversion writes to it
        if output.num_bytes() is not None:
            return notes
        for sibling in sibling_betons(output.shown):
            manifest = _manifest(sibling)
            words = None if manifest is None else difference(manifest.class_names, class_names, sibling, output.shown)
            if words is None:
                continue
            if splits_in(_stem(sibling)) == {"train"}:
                raise UserError(
                    f"{output.shown}: would have other classes than the training set beside it: {words}; say --classes "
                    f"{sibling} to take its classes, or give the output another folder"
                )
            notes.append(f"{words}; convert {sibling} again, with --classes {output.shown}")
    return notes


def sibling_betons(output: str) -> list[str]:
    """Paths beside the output that differ in the split of their names; none if the output's name has no split."""
    folder, slash, _ = output.rpartition("/")
    stem = _stem(output)
    word = next((match for match in re.finditer(r"[^\W\d_]+", stem) if match[0].lower() in SPLIT_WORDS), None)
    if word is None or len(splits_in(stem)) != 1:
        return []
    names = [stem[: word.start()] + other + stem[word.end() :] for other in SIBLINGS]
    return [f"{folder}{slash}{name}{BETON}" for name in names if name != stem]


def _stem(beton: str) -> str:
    return beton.rpartition("/")[2].removesuffix(BETON)


def _manifest(beton: str) -> Manifest | None:
    text = open_output(beton).read_text(MANIFEST)
    try:
        return None if text is None else Manifest.from_json(text, beton)
    except UserError:  # of another version, or damaged: reported when that beton is read
        return None
