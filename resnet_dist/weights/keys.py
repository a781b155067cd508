"""Which tensor of a file of weights is which of a net's, whatever the names that its author gave them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data_prep.shown import few, shown
from resnet_dist.errors import UserError
from resnet_dist.models.registry import LAYERS_PER_BLOCK, LAYOUTS
from resnet_dist.models.resnet import BasicBlock, ZeroPadShortcut
from resnet_dist.weights.files import is_exported, is_file

_COUNTER = "num_batches_tracked"
_SHORTCUT = re.compile(r"downsample|shortcut|skip|proj|identity", re.IGNORECASE)
_TEXT_AND_NUMBER = re.compile(r"(\D*)(\d*)")
_NUMBERED = re.compile(r"\D*(\d+)\D*")
_SHOWN = 4
"""Names and layouts in a message."""


@dataclass(frozen=True)
class Matched:
    state: dict[str, Tensor]
    """By the net's own names, in its order: all of its tensors, but those of its head where `head_differs`."""
    missing: tuple[str, ...]
    """The net's tensors that the weights do not have: those of its head, or none."""
    unexpected: tuple[str, ...]
    """The weights' tensors that the net has no place for: auxiliary or projection heads, or none."""
    head_differs: bool
    """The weights have no classifier of the net's shape: another number of classes, or none at all."""
    notes: tuple[str, ...] = ()
    """What was assumed and cannot be checked here, each a line that begins with the source."""


class Role(NamedTuple):
    """What a tensor is for, told by the structure: the k-th convolution of a block, the bias of the classifier."""

    block: tuple[int, int] | None
    """(stage, block), both from 0; None: outside of the blocks."""
    branch: str
    """main, shortcut or gate: the layers with biases in a block, which weigh channels."""
    kind: str
    """conv (also a linear layer) or norm."""
    place: int
    """Among those of its block, branch and kind, from 0."""
    part: str
    """weight, bias, running_mean, running_var."""


def match_keys(state: Mapping[str, Tensor], net: nn.Module, source: str) -> Matched:
    """Finds the tensors of `net` in `state`, by name or, where names differ, by structure.

    By structure: numbers in the names say stage and block; within each, convolutions, norms and the layers of a
    shortcut correspond in their order. Every shape is checked. Names as torchvision, timm, this project, akamaster's
    CIFAR nets and many others give them all fit. Counters of batches that `state` lacks are 0.

    Raises UserError, which begins with `source`, unless `state` has every tensor of the net but its head, and no tensor
    of a block that the net does not have; and if the order of layers of equal shapes cannot be told.
    """
    wanted = net.state_dict()
    shapes = {name: tuple(value.shape) for name, value in wanted.items() if not name.endswith(_COUNTER)}
    given = {name: tuple(value.shape) for name, value in state.items() if not name.endswith(_COUNTER)}
    head = head_of(net)
    body = [name for name in shapes if not name.startswith(f"{head}.")]
    theirs = _by_role(given)
    names = {name: theirs[role] for role, name in _by_role(shapes).items() if role in theirs}
    by_name = all(_fits(given.get(name), shapes[name]) for name in body)
    if by_name:
        names |= {name: name for name in shapes if name in given}
    wrong = [name for name in body if not _fits(given.get(names.get(name, "")), shapes[name])]
    unexpected = [name for name in given if name not in set(names.values())]
    extra = [name for name in unexpected if _block(name)]
    if wrong or extra:
        raise UserError(f"{source}: {_mismatch(wrong, extra, names, shapes, given)}{_likely(given)}")
    if not by_name and (pair := _ambiguous(theirs, given)):
        raise UserError(
            f"{source}: its names are in alphabetical order, which does not say whether {shown(pair[0])} or "
            f"{shown(pair[1])} comes first, and their shapes are equal; number them in their order (bn1, bn2), or give "
            "a file that torch.save wrote"
        )
    differs = [name for name in shapes if not _fits(given.get(names.get(name, "")), shapes[name])]
    found = {}
    for name, value in wanted.items():
        if name.endswith(_COUNTER):
            module = name.removesuffix(_COUNTER)
            theirs_name = names[f"{module}running_mean"].removesuffix("running_mean") + _COUNTER
            found[name] = state.get(theirs_name, torch.zeros_like(value))
        elif name not in differs:
            found[name] = state[names[name]].reshape(value.shape)
    missing = tuple(name for name in differs if name not in names)
    reordered = names.get(f"{head}.weight") == "linear.weight" and _pad_at_the_end(found, net, head)
    notes = () if reordered else _padding_note(net, source)
    return Matched(found, missing, tuple(unexpected), bool(differs), notes)


def head_of(net: nn.Module) -> str:
    """The name of the net's classifier: its last linear layer."""
    return [name for name, module in net.named_modules() if isinstance(module, nn.Linear)][-1]


def _padding_note(net: nn.Module, source: str) -> tuple[str, ...]:
    """For files of others: a run of this project, and what `export` wrote, pad as the net does."""
    option_a = any(isinstance(module, ZeroPadShortcut) for module in net.modules())
    if not option_a or not is_file(source) or is_exported(Path(source).expanduser()):
        return ()
    return (
        f"{source}: does not say where its option-A shortcuts add zero channels: assumed behind the others, as in this "
        "project's nets; akamaster's and their copies add them on both sides, which is recognised by a classifier "
        "called linear: compare its accuracy with the published one (resnet-dist evaluate), and if it is far too low, "
        "give the file with linear.weight and linear.bias",
    )


def _pad_at_the_end(state: dict[str, Tensor], net: nn.Module, head: str) -> bool:
    """Reorders channels for shortcuts of option A, in place; does nothing for other nets. Returns whether it did.

    akamaster's nets, and the many that copied them with their classifier's name `linear`, add zero channels on both
    sides of a shortcut, this project's behind it. Either is option A, and one is the other with the channels between
    blocks in another order: the same function.
    """
    order: list[int] | None = None
    for name, block in net.named_modules():
        if not isinstance(block, BasicBlock):
            continue
        first, last, norm = f"{name}.conv1.weight", f"{name}.conv2.weight", f"{name}.bn2"
        if order is not None:
            state[first] = state[first][:, order]
        if isinstance(block.downsample, ZeroPadShortcut):
            before, added = state[first].shape[1], block.downsample.new_channels
            kept = [added // 2 + channel for channel in (range(before) if order is None else order)]
            order = kept + [channel for channel in range(before + added) if channel not in kept]
        if order is not None:
            state[last] = state[last][order]
            for part in ("weight", "bias", "running_mean", "running_var"):
                state[f"{norm}.{part}"] = state[f"{norm}.{part}"][order]
    if order is not None and f"{head}.weight" in state:
        state[f"{head}.weight"] = state[f"{head}.weight"][:, order]
    return order is not None


def _fits(given: tuple[int, ...] | None, wanted: tuple[int, ...]) -> bool:
    """Whether one can be the other, reshaped: a linear layer is a convolution of the whole map, or of one pixel."""
    if given is None or given[:1] != wanted[:1]:
        return False
    return given == wanted or (len(given) != len(wanted) and torch.Size(given).numel() == torch.Size(wanted).numel())


def _block(name: str) -> tuple[int, int, str] | None:
    """Stage and block as numbered in the name, and the rest of the name; None outside of the blocks.

    >>> _block("layer1.0.conv2.weight"), _block("res2.1.shortcut.norm.weight"), _block("conv1.0.weight")
    ((1, 0, 'conv2.weight'), (2, 1, 'shortcut.norm.weight'), None)
    """
    tokens = name.split(".")
    numbered = [(i, int(found[1])) for i, token in enumerate(tokens[:-1]) if (found := _NUMBERED.fullmatch(token))]
    if len(numbered) < 2:
        return None
    (_, stage), (last, block) = numbered[:2]
    rest = tokens[last + 1 :]
    return (stage, block, ".".join(rest)) if len(rest) > 1 else None


def _by_role(shapes: Mapping[str, tuple[int, ...]]) -> dict[Role, str]:
    """Names by what they are for."""
    layers: dict[str, list[str]] = {}
    for name in _ordered(shapes):
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    places = {layer: _block(names[0]) for layer, names in layers.items()}
    stages = sorted({place[0] for place in places.values() if place})
    first_block = {stage: min(place[1] for place in places.values() if place and place[0] == stage) for stage in stages}
    counts: dict[Role, int] = {}
    found: dict[Role, str] = {}
    for layer, names in sorted(layers.items(), key=lambda item: _is_head(item[0], shapes)):
        place = places[layer]
        block = None if place is None else (stages.index(place[0]), place[1] - first_block[place[0]])
        parts = {name.rpartition(".")[2]: name for name in names}
        kind = "conv" if len(shapes[parts.get("weight", names[0])]) > 1 else "norm"
        branch = "main"
        if place is not None:
            branch = (
                "shortcut" if _SHORTCUT.search(place[2]) else "gate" if kind == "conv" and "bias" in parts else branch
            )
        place_of_kind = Role(block, branch, kind, 0, "")
        counts[place_of_kind] = counts.get(place_of_kind, -1) + 1
        for part, name in parts.items():
            found[Role(block, branch, kind, counts[place_of_kind], part)] = name
    return found


def _is_head(layer: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return layer.split(".")[0] == "head" or len(shapes.get(f"{layer}.weight", ())) == 2


def _ordered(names: Iterable[str]) -> list[str]:
    """In the order of definition, which files of safetensors lose: theirs is alphabetical, and 10 comes after 9."""
    given = list(names)
    if given != sorted(given):
        return given
    return sorted(given, key=lambda name: [(int(part or 0), text) for text, part in _TEXT_AND_NUMBER.findall(name)])


def _ambiguous(names: Mapping[Role, str], shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str] | None:
    """Two layers, either of which could be the other: alphabetical, of equal shapes, and not numbered alike."""
    if list(shapes) != sorted(shapes):
        return None
    layers: dict[Role, dict[str, tuple[int, ...]]] = {}
    for role, name in names.items():
        layers.setdefault(role._replace(part=""), {})[role.part] = shapes[name]
    alike: dict[object, list[str]] = {}
    for role, parts in layers.items():
        key = (role._replace(place=0), tuple(sorted(parts.items())))
        alike.setdefault(key, []).append(names[role._replace(part=min(parts))].rpartition(".")[0])
    pairs = (pair for group in alike.values() for pair in combinations(group, 2))
    return next((pair for pair in pairs if not _numbered_alike(*pair)), None)


def _numbered_alike(one: str, other: str) -> bool:
    """Whether a number is the first that differs in the names.

    >>> _numbered_alike("conv1.norm", "conv2.norm"), _numbered_alike("bn1", "bn_out"), _numbered_alike("in.1", "out.0")
    (True, False, False)
    """
    tokens = zip(_TEXT_AND_NUMBER.findall(one), _TEXT_AND_NUMBER.findall(other), strict=False)
    first, second = next((a, b) for a, b in tokens if a != b)
    return first[0] == second[0] and bool(first[1] and second[1])


def _mismatch(
    wrong: list[str],
    extra: list[str],
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    given: Mapping[str, tuple[int, ...]],
) -> str:
    lacking = [name for name in wrong if name not in names]
    for name in wrong:
        if name in names:
            theirs = names[name]
            return f"its {theirs} is {list(given[theirs])}, the net's {name} is {list(shapes[name])}"
    if lacking:
        return f"has no {few(lacking, most=_SHOWN)} of the net"
    return f"has {few(extra, most=_SHOWN)}, for which the net has no place"


def _likely(given: Mapping[str, tuple[int, ...]]) -> str:
    """The nets of the registry with the weights' numbers of blocks and of convolutions in each."""
    blocks: dict[tuple[int, int], int] = {}
    for role in _by_role(given):
        if role.block is not None and (role.branch, role.kind, role.part) == ("main", "conv", "weight"):
            blocks[role.block] = max(blocks.get(role.block, 0), role.place + 1)
    if not blocks:
        return "; these are weights of another net"
    num_blocks = tuple(
        len([block for block in blocks if block[0] == stage]) for stage in range(max(stage for stage, _ in blocks) + 1)
    )
    nets = [
        name
        for name, layout in LAYOUTS.items()
        if layout.num_blocks == num_blocks and LAYERS_PER_BLOCK[layout.block] == blocks[0, 0] and layout.shortcut
    ]
    what = f"{', '.join(map(str, num_blocks))} blocks of {blocks[0, 0]} convolutions"
    return f"; its net has {what}" + (
        f", as {' or '.join(nets[:_SHOWN])}: set model.name and its options" if nets else ""
    )
