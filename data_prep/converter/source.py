"""Lists of classes: of a file that the user names, and of the betons beside the output: labels must mean the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from data_prep.beton.class_names import difference
from data_prep.beton.manifest import Manifest
from data_prep.converter.output import BETON, MANIFEST, open_output
from data_prep.errors import UserError
from data_prep.sources import SOURCES, SourceOptions, open_source
from data_prep.sources.base import Source
from data_prep.sources.files.find import place_of
from data_prep.sources.files.table import read_text
from data_prep.sources.label_file import read_class_names
from data_prep.sources.labels import GIVEN
from data_prep.sources.listed import with_classes
from data_prep.sources.splits import SPLIT_WORDS, SplitRequest, splits_in

SIBLINGS = ("train", "training", "val", "validation", "test")


def read_class_list(location: str) -> tuple[str, ...]:
    """Class names by label: of a text file with one a line, or of a beton or its manifest.

    UserError when there is no such file, or it lists no classes or one twice.
    """
    if location.endswith(BETON):
        location = location.removesuffix(BETON) + MANIFEST
    place = place_of(location)
    if location.endswith(".json"):
        return Manifest.from_json(read_text(place), place.shown).class_names
    return read_class_names(place)


def compare_with_siblings(class_names: Sequence[str], output: str) -> list[str]:
    """UserError when the training set beside the output has other classes, or the same in another order: a training
    could not use both. A note for each other split that has.

    `output`: the beton's path or URL. `data/val.beton` has the siblings `data/train.beton`, `data/test.beton`, ...
    """
    notes = []
    for sibling in sibling_betons(output):
        manifest = _manifest(sibling)
        words = None if manifest is None else difference(manifest.class_names, class_names, sibling, output)
        if words is None:
            continue
        if splits_in(_stem(sibling)) == {"train"}:
            raise UserError(
                f"{output}: would have other classes than the training set beside it: {words}; say --classes {sibling} "
                "to take its classes, or give the output another folder"
            )
        notes.append(f"{words}; convert {sibling} again, with --classes {output}")
    return notes


def sibling_betons(output: str) -> list[str]:
    """Betons beside the output that differ in the split of their names; none where the name says no split."""
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
    except UserError:  # of another version, or damaged: for whoever reads that beton to tell
        return None


# The source that a command line means.


@dataclass(frozen=True)
class Asked:
    source: str
    location: str | None
    split: SplitRequest
    options: SourceOptions
    classes: str | None = None
    """`--classes`: a file that lists them, or a beton whose classes they are."""

    def open(self) -> Source:
        """UserError when it cannot be found or understood, or holds other classes than listed."""
        self._require_said()
        if self.classes is None:
            return open_source(self.source, self.location, self.split, self.options)

        if self.options.class_order is not None:
            raise UserError("--class-order and --classes: both say the order of the classes; leave one out")
        class_names = read_class_list(self.classes)
        ordered = self.source in SOURCES and "class_order" in SOURCES[self.source].takes
        options = replace(self.options, class_order=GIVEN) if ordered else self.options
        opened = open_source(self.source, self.location, self.split, options)
        return with_classes(opened, class_names, self.classes)

    def _require_said(self) -> None:
        """UserError for an option that is given and empty: `--input "$DIR"` would mean the current folder."""
        said = {"input": self.location, "classes": self.classes, **asdict(self.options)}
        if self.split.explicit:
            said["split"] = self.split.name
        for name, value in said.items():
            if isinstance(value, str) and not value.strip():
                option = f"--{name.replace('_', '-')}"
                raise UserError(
                    f"{option}: is empty; leave it out, or give a value (a shell variable that is not set?)"
                )
