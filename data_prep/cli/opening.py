"""The source that a command line means."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from data_prep.errors import UserError
from data_prep.sources import SOURCES, SourceOptions, open_source
from data_prep.sources.base import Source
from data_prep.sources.labels import GIVEN, with_classes
from data_prep.sources.splits import SplitRequest


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
        from data_prep.convert.class_lists import read_class_list

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
