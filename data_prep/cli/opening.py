"""The source that a command line means."""

from __future__ import annotations

from dataclasses import dataclass, replace

from data_prep.errors import UserError
from data_prep.sources import SOURCES, SourceOptions, open_source
from data_prep.sources.base import Source
from data_prep.sources.class_order import GIVEN
from data_prep.sources.fixed_classes import with_classes
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
