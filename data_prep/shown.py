"""Words of messages: names made safe to show, since files, members, columns and classes have any; lists and counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MAX_CHARACTERS = 300
"""Shown of one name: that of an archive's member may be a megabyte long."""
NUM_LISTED = 3
"""Names that `few` lists unless told otherwise."""


def shown(name: object, max_characters: int | None = MAX_CHARACTERS) -> str:
    """The name on one line of plain characters, for a terminal, a log or a table; applied twice it is the same.

    Unprintable characters are escaped as Python does (`\\t`, `\\n`, `\\x1b`, `\\u202e`, `\\udc80`): a tab would break
    a table, an escape sequence would reach the terminal, a byte that is not UTF-8 would end the command. Longer names
    are cut in the middle.
    """
    text = str(name)
    if max_characters is not None and len(text) > max_characters:
        half = (max_characters - 3) // 2
        text = f"{text[:half]}...{text[-half:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(message: object, max_characters: int | None = None) -> str:
    """An exception, or any text, without line breaks; the exception's type if its text is empty. Cut at the end."""
    text = " ".join(str(message).split()) or type(message).__name__
    return text if max_characters is None or len(text) <= max_characters else f"{text[:max_characters]}..."


def few(names: Iterable[str], separator: str = ", ", most: int = NUM_LISTED) -> str:
    """The first `most` names, safe to show, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most:,} more" if len(listed) > most else ""
    return separator.join(map(shown, listed[:most])) + more


def joined(items: Iterable[str]) -> str:
    """All of them, of which there is one at least.

    >>> joined(["trials", "seeds", "budget"]), joined(["trials"])
    ('trials, seeds and budget', 'trials')
    """
    *head, last = items
    return f"{', '.join(head)} and {last}" if head else last


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """One line for each row; `|` in cells is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def count_of(count: int, one: str, many: str | None = None) -> str:
    """A number and its noun; `many`: the plural, if it is not `one` with an s.

    >>> count_of(1, "file"), count_of(1200, "class", "classes")
    ('1 file', '1,200 classes')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"
