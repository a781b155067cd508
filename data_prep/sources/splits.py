"""Which split of a source is meant: named by `--split`, implied by the output's name, or not named.

All sources read names by the table here: `splits_in` gives the splits that the words of a name denote (`Training Set`,
`val2017`, `imagenet1k-train-0001`), `is_split_name` tells whether the name says nothing else.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from data_prep.errors import UserError
from data_prep.shown import few, shown

Split = Literal["train", "val", "test"]

SPLIT_WORDS: dict[str, Split] = {
    **dict.fromkeys(("train", "training", "trn", "trng"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "vld", "minival"), "val"),
    **dict.fromkeys(("dev", "development", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing", "tst", "holdout", "heldout"), "test"),
}
"""A word in the name of a folder or file -> its split."""
OTHER_WORDS = frozenset(
    (
        *("set", "data", "dataset", "subset", "split", "partition", "part", "shard", "full", "raw"),
        *("image", "img", "picture", "pic", "photo", "file", "folder", "dir", "directory", "sample", "example"),
        *("class", "label", "jpg", "jpeg", "png"),
    )
)
"""Words that do not change the meaning of a split's name: `Training Set`, `train_images`."""
_BY_LENGTH = sorted({*SPLIT_WORDS, *OTHER_WORDS}, key=len, reverse=True)
_LETTERS = re.compile(r"[^\W\d_]+")
_CAMEL_CASE = re.compile(r"(?<=[a-z])(?=[A-Z])")

WHOLE = "all"
"""The word for everything in `--split`, and in the manifest for a source without splits."""
FOLDERS_ARE = ("classes", "splits")
AS_CLASSES = "--folders-are classes takes each folder as a class, with all images below it"


@dataclass(frozen=True)
class SplitRequest:
    name: str | None = None
    explicit: bool = False
    """False when the name was taken from the output (`train.beton`)."""

    @property
    def is_whole(self) -> bool:
        """`--split all`: everything, explicitly."""
        return self.explicit and self.name is not None and self.name.lower() == WHOLE

    @property
    def asked(self) -> str:
        return f"--split {shown(self.name)}" if self.explicit else f"the output's name ({shown(self.name)})"


ANY_SPLIT = SplitRequest()


def splits_in(name: str) -> frozenset[Split]:
    """The splits that the words of a name mean: none, one, or several, which is ambiguous.

    Words end at a character that is not a letter and before a capital (`trainSet`); compounds of known words are taken
    apart (`testset`, `trainval`); case and plurals do not matter.
    """
    words = [word for token in _tokens(name) for word in _pieces(token) or []]
    return frozenset(SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS)


def is_split_name(name: str) -> bool:
    """Whether the name says one split and nothing else, apart from numbers and words like `set` and `images`."""
    return len(splits_in(name)) == 1 and all(_pieces(token) for token in _tokens(name))


def is_container_name(name: str) -> bool:
    """Whether the name is only `images`, `data` or the like."""
    pieces = [_pieces(token) for token in _tokens(name)]
    return bool(pieces) and all(words is not None and OTHER_WORDS.issuperset(words) for words in pieces)


def requested_split(option: str | None, output: Path) -> SplitRequest:
    """The request made by `--split` and `--output`."""
    if option is not None:
        return SplitRequest(option, explicit=True)
    meant = splits_in(output.stem)
    return SplitRequest(next(iter(meant)) if len(meant) == 1 else None, explicit=False)


def choose_split(available: Sequence[str], request: SplitRequest, where: str) -> str:
    """The source's name of the split that was meant. UserError, naming all of them, when that is ambiguous.

    `available`: the splits of the source, at least one; `where` names the source in errors. Data sets of the Hub
    without a validation split call theirs test, so `val` takes `test` if there is no other.
    """
    listed = shown(", ".join(available))
    if request.name is None:
        if len(available) == 1:
            return available[0]
        raise UserError(f"{where}: holds the splits {listed}; say which with --split")
    asked = request.name
    for exact in ([name for name in available if name == asked], [n for n in available if n.lower() == asked.lower()]):
        if len(exact) == 1:
            return exact[0]
    if request.is_whole and len(available) == 1:
        return available[0]
    if request.is_whole:
        raise UserError(
            f"{where}: holds the splits {listed}, which --split all does not combine; convert each and combine them "
            "with `data-prep merge A.beton B.beton --output ALL.beton`"
        )
    found = _of_meaning(available, request)
    if len(found) == 1:
        return found[0]
    which = f"of which {shown(', '.join(found))} may be" if found else "none of which is"
    raise UserError(
        f"{where}: holds the splits {listed}, {which} what {request.asked} asks for; say which with --split"
    )


def split_of_whole(request: SplitRequest, where: str, names: Collection[str] = ()) -> str:
    """The split to record for a source that is not divided into splits: all of it is taken, or it is refused.

    `names`: of the source's folder or file, and then of those around it, which must say nothing else: `/data/train` is
    train although it has no splits inside. UserError when a split is asked for that neither the source nor its name
    has: otherwise train.beton and val.beton would have the same images.
    """
    if request.name is None or request.is_whole:
        return WHOLE
    meant = splits_in(request.name)
    telling = [name for number, name in enumerate(names) if is_split_name(name) or not number]
    by_name = next(((name, splits) for name in telling if len(splits := splits_in(name)) == 1), None)
    if by_name is not None and (by_name[1] == meant or (meant == {"val"} and by_name[1] == {"test"})):
        return request.name
    what = "is not divided into splits" if by_name is None else f"is {min(by_name[1])}, by the name {shown(by_name[0])}"
    if request.explicit:
        raise UserError(f"--split {shown(request.name)}: {where} {what}; --split all takes all of it")
    if by_name is not None:
        raise UserError(
            f"{where}: {what}, but {request.asked} asks for another split; name the folder or file of that one, or "
            "say --split all to take all of this one"
        )
    raise UserError(
        f"{where}: {what}, but {request.asked} asks for a split: train.beton and val.beton would both have all of it; "
        "say --split all to take all of it, or give the output another name, such as all.beton"
    )


def _of_meaning(available: Sequence[str], request: SplitRequest) -> list[str]:
    name = str(request.name)
    meant = splits_in(name)
    if len(meant) != 1 or not (is_split_name(name) or not request.explicit):
        return []
    found = [other for other in available if splits_in(other) == meant]
    if len(found) > 1:
        found = [other for other in found if is_split_name(other)] or found
    if not found and meant == {"val"} and (not request.explicit or name.lower() == "val"):
        found = [other for other in available if splits_in(other) == {"test"}]
    return found


def _tokens(name: str) -> list[str]:
    """Words in lower case; two that are one word together are joined: `hold-out`."""
    tokens = [word.lower() for run in _LETTERS.findall(name) for word in _CAMEL_CASE.split(run)]
    joined: list[str] = []
    for token in tokens:
        if joined and joined[-1] + token in SPLIT_WORDS:
            joined[-1] += token
        else:
            joined.append(token)
    return joined


def _pieces(token: str) -> list[str] | None:
    """The known words that a token consists of; None when it is another word."""
    pieces: list[str] = []
    rest = token
    while rest:
        word = next((word for word in _BY_LENGTH if rest.startswith(word)), None)
        if word is not None:
            pieces.append(word)
            rest = rest.removeprefix(word)
        elif pieces and rest.startswith(("s", "es")):  # a plural
            rest = rest.removeprefix("e").removeprefix("s")
        else:
            return None
    return pieces


# --- which folders are splits and which are classes -------------------------------------------------------------------


class Folder(NamedTuple):
    name: str
    has_folders: bool


def find_splits(folders: Collection[Folder], where: str) -> list[str]:
    """The folders that are splits; empty: they are classes. UserError when that is ambiguous.

    Splits contain class folders, and there are several of them, or their names say only the split. A folder called
    `train` beside others, without folders inside, is a class.
    """
    named = [folder for folder in folders if splits_in(folder.name)]
    deep = [folder.name for folder in named if folder.has_folders]
    num_kinds = len({split for name in deep for split in splits_in(name)})
    is_most = 2 * len(deep) >= len(folders) and all(map(is_split_name, deep))
    if deep and (num_kinds > 1 or is_most):
        return deep
    if deep:
        raise UserError(
            f"{where}: {few(deep)} may be a split or a class; say --split {shown(deep[0])} to convert what is in "
            f"it; {AS_CLASSES}"
        )
    kinds = {split for folder in named for split in splits_in(folder.name)}
    if named and (len(kinds) > 1 or len(named) == len(folders)):
        raise UserError(
            f"{where}: {few([folder.name for folder in named])}: splits by name, but without class "
            f"folders; expected <split>/<class>/<image>; --labels FILE names the class of each image; {AS_CLASSES}"
        )
    return []


def refuse_nested(names: Collection[str], where: str) -> None:
    """UserError when the folders taken as classes look like a level above the classes.

    `names`: `<class>/.../<file>` of all images. Recognised are one folder around the classes, splits within each class,
    and splits or versions of the same data, which contain the same folders.
    """
    inner: dict[str, set[str]] = {}
    direct: set[str] = set()
    if not all(name.count("/") == 1 for name in names):  # mostly; and there may be a million
        for name in names:
            top, _, rest = name.partition("/")
            folder, slash, _ = rest.partition("/")
            if slash:
                inner.setdefault(top, set()).add(folder)
            else:
                direct.add(top)
    for top, below in inner.items():
        kinds = [split for name in below if is_split_name(name) for split in splits_in(name)]
        if len(set(kinds)) > 1 or (top not in direct and len(kinds) == len(below)):
            raise UserError(
                f"{where}: {shown(top)} holds {few(sorted(below))}: splits below a class are not understood; expected "
                f"<split>/<class>/<image>; if {shown(top)} is no class, say --input {where}/{shown(top)}; {AS_CLASSES}"
            )
    if direct or not inner:
        return
    if len(inner) == 1:
        top, below = next(iter(inner.items()))
        raise UserError(
            f"{where}: holds images in one folder only, {shown(top)}, and there in {few(sorted(below))}: if these "
            f"are the classes, say --input {where}/{shown(top)}; {AS_CLASSES}"
        )
    shared = _shared(inner)
    if shared is not None:  # classes rarely contain folders of the same names, splits and versions do
        tops = sorted(top for top, below in inner.items() if shared in below)
        raise UserError(
            f"{where}: {few(tops)} each hold a folder {shown(shared)}, so they may be splits, or versions of the "
            f"same images; say --split {shown(tops[0])} if these contain the classes; {AS_CLASSES}"
        )


def refuse_container(folders: Collection[str], where: str) -> None:
    """UserError when the only class would be a folder called `images`, or the like."""
    name = next(iter(folders), "")
    if len(folders) == 1 and is_container_name(name):
        raise UserError(
            f"{where}: its only folder is {shown(name)}; expected one folder for each class; --labels FILE names the "
            f"class of each image; {AS_CLASSES}"
        )


def _shared(inner: Mapping[str, set[str]]) -> str | None:
    """A folder that at least half of the classes contain, unless it is the only one, as in `<class>/images/`."""
    counts = Counter(name for below in inner.values() for name in below)
    name = max(sorted(counts), key=lambda name: counts[name])
    return name if len(counts) > 1 and counts[name] > 1 and 2 * counts[name] >= len(inner) else None
