"""YAML text to dicts, lists and scalars, bounded in bytes, depth and values. Each error is a one-line ValueError."""

from __future__ import annotations

import unicodedata
from collections.abc import Hashable
from typing import Any

import yaml

MAX_TEXT_BYTES = 1 << 20
MAX_DEPTH = 32
"""Levels of nested mappings and lists."""
MAX_NODES = 100_000
"""Values, with aliases expanded: a few hundred bytes of aliases can mean any number of them."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """safe_load, but a key written twice is an error: PyYAML silently keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is a list or mapping", key_node.start_mark)
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} occurs twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_plain_number(self, node: yaml.ScalarNode) -> int | float:
        """Rejects 010 and 1:30, which YAML 1.1 silently reads as 8 and 90."""
        digits = node.value.lstrip("+-")
        if ":" in digits or (len(digits) > 1 and digits[0] == "0" and digits[1] in "0123456789_"):
            raise yaml.constructor.ConstructorError(
                None, None, f"the number {node.value!r} could be read in two ways; write it plainly", node.start_mark
            )
        is_int = node.tag == "tag:yaml.org,2002:int"
        value: int | float = self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)
        return value


for _tag in ("int", "float"):
    _UniqueKeyLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _UniqueKeyLoader.construct_plain_number)


def parse_yaml(text: str) -> Any:
    """The document in `text` as dicts, lists and scalars; None if it is empty.

    Raises ValueError: not YAML, too large, too deep, keys twice, a value that its tag does not allow, control
    characters.
    """
    if len(text) > MAX_TEXT_BYTES:
        raise ValueError(f"is larger than {MAX_TEXT_BYTES >> 20} MiB")
    try:
        loader = _UniqueKeyLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _require_bounded(node)
            tree = loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())[:300]}") from None
    except RecursionError:
        raise ValueError(f"not valid YAML here: nested more than {MAX_DEPTH} levels deep") from None
    except (ValueError, TypeError, OverflowError, AttributeError, KeyError, IndexError) as error:
        # PyYAML's constructors pass on what int(), date() and others raise: 2026-13-99, !!int x, 5,000 digits.
        raise ValueError(f"not valid YAML here: {' '.join(str(error).split())[:300]}") from None
    require_printable(tree)
    return tree


def parse_value(text: str) -> Any:
    """The value in `key=value`. Typed as YAML would: `3`, `1.5`, `null`, `[1, 2]`, `{kind: step}`, `"quoted"`.

    Any other text is itself, even where YAML sees syntax: `/x/runs #2`, `a: b`, `*`.
    Raises ValueError as `parse_yaml`.
    """
    text = text.strip()
    if text[:1] in ("[", "{", '"', "'"):
        return parse_yaml(text)
    try:
        scalars = [event for event in yaml.parse(text, yaml.SafeLoader) if isinstance(event, yaml.NodeEvent)]
    except (yaml.YAMLError, ValueError):
        scalars = []
    match scalars:
        case []:
            value: Any = text or None
        case [yaml.ScalarEvent(value=plain, anchor=None, tag=None)] if plain == text:
            value = parse_yaml(text)
        case _:
            value = text
    require_printable(value)
    return value


def require_printable(tree: Any) -> None:
    """ValueError if a text in `tree` contains control characters: no configuration needs them."""
    if isinstance(tree, str):
        if odd := next((c for c in tree if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"), None):
            raise ValueError(f"{tree[:40]!r} contains the control character {odd!r}")
    elif isinstance(tree, dict):
        for key, value in tree.items():
            require_printable(key)
            require_printable(value)
    elif isinstance(tree, list):
        for value in tree:
            require_printable(value)


def _require_bounded(root: yaml.Node) -> None:
    sizes: dict[int, int] = {}
    within: set[int] = set()

    def size(node: yaml.Node, depth: int) -> int:
        known = sizes.get(id(node))
        if known is not None:
            return known
        if id(node) in within:
            raise yaml.YAMLError("an alias refers to its own parent")
        if depth > MAX_DEPTH:
            raise RecursionError
        within.add(id(node))
        total = 1
        if isinstance(node, yaml.CollectionNode):
            for item in node.value:
                total += sum(size(part, depth + 1) for part in (item if isinstance(item, tuple) else (item,)))
                if total > MAX_NODES:
                    raise yaml.YAMLError(f"more than {MAX_NODES:,} values, aliases expanded")
        within.remove(id(node))
        sizes[id(node)] = total
        return total

    size(root, 0)
