"""YAML files and overrides (`--set a.b=c`) into recipes, profiles and search spaces.

All mistakes of a file are reported at once, in one line.
"""

from __future__ import annotations

import copy
import difflib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from resnet_dist.config.profile import Profile
from resnet_dist.config.recipe import ModelConfig, Recipe
from resnet_dist.config.space import COORDINATES, Space
from resnet_dist.config.yaml_text import MAX_TEXT_BYTES, parse_value, parse_yaml
from resnet_dist.errors import UserError

S = TypeVar("S", bound=BaseModel)
_MAX_MISTAKES_SHOWN = 20
_MAX_QUOTED = 120
"""Characters of a file's own text within a message."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe; `overrides` are `a.b=c` strings (a leading `recipe.` is allowed). Raises UserError."""
    return _load(Recipe, Path(path), [o.removeprefix("recipe.") for o in overrides])


def load_profile(path: str | Path, overrides: Sequence[str] = ()) -> Profile:
    """Reads a profile; `overrides` are `a.b=c` strings (a leading `profile.` is allowed). Raises UserError."""
    return _load(Profile, Path(path), [o.removeprefix("profile.") for o in overrides])


def bare_profile(overrides: Sequence[str], **keys: Any) -> Profile:
    """A profile without a file: `keys`, and no places for data and runs. Raises UserError."""
    tree = {"data_root": ".", "storage": ".", "tracking_uri": "sqlite:///mlflow.db"} | keys
    for override in overrides:
        _apply(tree, override.removeprefix("profile."))
    return _validated(Profile, "--profile-set", tree)


def model_of_name(name: str, overrides: Sequence[str] = ()) -> ModelConfig:
    """A recipe's model section without a recipe; `overrides` are `model.key=value`. Raises UserError."""
    tree: dict[str, Any] = {"model": {"name": name, "num_classes": 1}}
    for override in overrides:
        _apply(tree, override.removeprefix("recipe."))
    if others := sorted(tree.keys() - {"model"}):
        raise UserError(f"--set {others[0]}...: without a recipe only model.* can be set")
    return _validated(ModelConfig, f"--set (of net {name})", tree["model"])


def load_space(path: Path, overrides: Sequence[str] = ()) -> Space:
    """Reads a search space and checks the recipe keys that it names against the recipe's schema. Raises UserError."""
    return space_from_tree(str(path), read_tree(path), overrides)


def space_from_tree(where: str, given: Mapping[str, Any], overrides: Sequence[str] = ()) -> Space:
    """Like `load_space`, from plain data. `where` (the file) begins the message of a UserError."""
    tree = dict(given)
    for override in overrides:
        _apply(tree, override)
    return _validated(Space, where, tree, _unknown_keys(tree))


def _unknown_keys(tree: Mapping[str, Any]) -> list[str]:
    """Mistakes in the names of recipe keys in a space's plain data, which may have others."""
    proxy, parameters = tree.get("proxy"), tree.get("space")
    named = [("proxy.", str(key)) for key in proxy] if isinstance(proxy, dict) else []
    for key, parameter in parameters.items() if isinstance(parameters, dict) else ():
        named.append(("space.", str(key)))
        if isinstance(parameter, dict) and parameter.get("kind") == "derived":
            named.append((f"space.{key}.of: ", str(parameter.get("of"))))
    reasons = [(place, unknown_recipe_key(key)) for place, key in named if key not in COORDINATES]
    return [f"{place}{reason}" for place, reason in reasons if reason]


def recipe_from_tree(tree: Mapping[str, Any], overrides: Mapping[str, Any]) -> Recipe:
    """The recipe `tree` with the keys of `overrides` (dotted paths) replaced.

    Raises ValueError with every mistake in one line.
    """
    copied = copy.deepcopy(dict(tree))
    for path, value in overrides.items():
        _set(copied, path.split("."), value)
    try:
        return Recipe.model_validate(copied)
    except ValidationError as error:
        raise ValueError(_enumerate(_described(Recipe, error))) from None


def unknown_recipe_key(path: str) -> str | None:
    """The mistake in `path` as the name of a recipe key, or None. A key of any kind of schedule is allowed."""
    sections: tuple[type[BaseModel], ...] = (Recipe,)
    for depth, key in enumerate(keys := path.split(".")):
        valid = sorted({name for section in sections for name in section.model_fields})
        fields = [section.model_fields[key] for section in sections if key in section.model_fields]
        if not fields:
            where = ".".join(keys[:depth]) or "the top"
            near = difflib.get_close_matches(key, valid, n=1)
            hint = f"did you mean {'.'.join([*keys[:depth], near[0]])}? " if near else ""
            return f"{path}: not a key of a recipe; {hint}valid keys at {where}: {', '.join(valid) or 'none'}"
        if any(get_origin(field.annotation) is dict for field in fields):
            return None  # what follows is a name that the user chose, such as that of a stage
        sections = tuple(model for field in fields for model in _models_of(field.annotation))
    return None


def load_as(schema: type[S], path: Path) -> S:
    """Reads a YAML file of another kind. Raises UserError."""
    return _load(schema, path, ())


def recipe_from_yaml(text: str, where: str) -> Recipe:
    """A resolved recipe as `to_yaml` wrote it. Raises UserError, which begins with `where`."""
    try:
        tree = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    return recipe_of(tree, where)


def recipe_of(tree: Any, where: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from plain data, a checkpoint's for example; `overrides` as `load_recipe` takes them. Raises UserError,
    which begins with `where`."""
    if overrides:
        tree = copy.deepcopy(tree)
    for override in overrides:
        _apply(tree, override.removeprefix("recipe."))
    return _validated(Recipe, where, tree)


def read_model_name(path: Path) -> str:
    """The net of a recipe of any version of the schema. Raises UserError."""
    model = read_tree(path).get("model")
    name = model.get("name") if isinstance(model, dict) else None
    if not isinstance(name, str):
        raise UserError(f"{path}: model.name is missing")
    return name


def to_yaml(model: BaseModel) -> str:
    """The resolved model, every default filled in, as YAML that loads to an equal model."""
    return tree_to_yaml(model.model_dump(mode="json"))


def tree_to_yaml(tree: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(tree), sort_keys=False, default_flow_style=None, width=100)


def flatten(model: BaseModel) -> dict[str, str]:
    """`{"optim.lr": "0.1", ...}`: the leaves of a model under dotted paths, for a table of parameters."""

    def walk(prefix: str, value: Any) -> dict[str, str]:
        if isinstance(value, dict):
            return {k: v for key, item in value.items() for k, v in walk(f"{prefix}{key}.", item).items()}
        return {prefix[:-1]: str(value)}

    return walk("", model.model_dump(mode="json"))


def _load(schema: type[S], path: Path, overrides: Sequence[str]) -> S:
    tree = read_tree(path)
    for override in overrides:
        _apply(tree, override)
    return _validated(schema, path, tree)


def _validated(schema: type[S], where: Path | str, tree: Any, more_mistakes: Sequence[str] = ()) -> S:
    """`more_mistakes`: found by other means in the same tree; reported with the schema's."""
    mistakes = list(more_mistakes)
    try:
        model = schema.model_validate(tree)
    except ValidationError as error:
        _require_kind(schema, where, tree)
        mistakes = _described(schema, error) + mistakes
    except RecursionError:
        mistakes = ["is nested too deeply"]
    if mistakes:
        raise UserError(f"{where}: {_enumerate(mistakes)}")
    return model


def _require_kind(schema: type[BaseModel], where: Path | str, tree: Any) -> None:
    """UserError if the file is of another kind, by its top-level keys: one sentence instead of a list of all keys."""
    kinds: dict[str, type[BaseModel]] = {"recipe": Recipe, "profile": Profile, "search space": Space}
    keys = {str(key) for key in tree} if isinstance(tree, Mapping) else set()
    known = {kind: len(keys & set(model.model_fields)) for kind, model in kinds.items()}
    expected = next((kind for kind, model in kinds.items() if model is schema), None)
    likely = max(known, key=lambda kind: known[kind])
    if expected is not None and known[likely] > 2 * known[expected]:
        raise UserError(f"{where}: this is a {likely}, but a {expected} is expected")


def read_tree(path: Path) -> dict[str, Any]:
    """A YAML file, a mapping of sections, as plain data. Raises UserError."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TEXT_BYTES + 1)
        tree = parse_yaml(content.decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a text file (expected YAML in UTF-8)") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {type(tree).__name__}")
    if odd := [key for key in tree if not isinstance(key, str)]:
        raise UserError(f"{path}: the key {_quoted(odd[0])} is not a name; quote it or give it another")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"--set {_cut(override)}: expected key.path=value, for example optim.lr=0.05")
    try:
        _set(tree, keys, parse_value(text))
    except ValueError as error:
        raise UserError(f"--set {_cut(override)}: {error}") from None


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_QUOTED else f"{text[:_MAX_QUOTED]}..."


def _set(tree: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    node = tree
    for depth, key in enumerate(keys[:-1]):
        if node.get(key) is None:  # absent, or a section that is off
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise ValueError(f"{'.'.join(keys[: depth + 1])} is a value, not a section")
    node[keys[-1]] = value


# ---- mistakes in words -----------------------------------------------------------------------------------------------


def _enumerate(mistakes: Sequence[str]) -> str:
    if len(mistakes) == 1:
        return mistakes[0]
    shown = "; ".join(f"({i}) {m}" for i, m in enumerate(mistakes[:_MAX_MISTAKES_SHOWN], 1))
    more = len(mistakes) - _MAX_MISTAKES_SHOWN
    return f"{len(mistakes)} mistakes: {shown}" + (f"; and {more} more" if more > 0 else "")


def _quoted(value: Any) -> str:
    """`repr`, shortened: the value may be a text of any length or a list of lists."""
    short = Repr()
    short.maxlevel, short.maxlist, short.maxdict, short.maxtuple = 2, 4, 4, 4
    short.maxstring = short.maxother = short.maxlong = 80
    return _cut(short.repr(value))


def _described(schema: type[BaseModel], error: ValidationError) -> list[str]:
    """Describes each mistake; the valid keys of a section are listed once."""
    mistakes: list[str] = []
    listed: set[str] = set()
    for detail in error.errors():
        mistake, hint, valid = _describe(schema, detail).partition("valid keys here: ")
        mistakes.append(f"{mistake}{hint}{valid}" if valid not in listed else mistake.rstrip("; "))
        listed |= {valid} if valid else set()
    return mistakes


def _describe(schema: type[BaseModel], detail: ErrorDetails) -> str:
    section, path = _locate(schema, detail["loc"])
    where = ".".join(map(_cut, path)) or "the file"
    if detail["type"] == "extra_forbidden":
        valid = sorted(section.model_fields) if section else []
        near = difflib.get_close_matches(path[-1], valid, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"{where}: unknown key; {hint}valid keys here: {', '.join(valid)}"
    if detail["type"] == "missing":
        return f"{where}: is missing"
    if detail["type"] == "union_tag_not_found":
        given = detail["input"] if isinstance(detail["input"], dict) else {}
        nested = next((key for key, value in given.items() if isinstance(value, dict)), None)
        hint = f"; keys of keys are written with a dot: {path[-1]}.{nested}" if nested else ""
        return f"{where}: kind is missing{hint}"
    message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    if detail["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where}: {message}, got {_quoted(detail['input'])}"


def _locate(schema: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[type[BaseModel] | None, list[str]]:
    """The section that holds the last element of `loc`, and `loc` without the tags of discriminated unions."""
    section: type[BaseModel] | None = schema
    holder = section
    path: list[str] = []
    options: tuple[type[BaseModel], ...] = ()
    in_mapping = False
    for element in loc:
        if len(options) > 1 and not in_mapping:
            section = next((o for o in options if _kind(o) == element), None)
            options = ()
            continue
        path.append(str(element))
        if in_mapping:  # a key that the user chose; its value is one of `options`
            in_mapping = False
            continue
        holder = section
        field = section.model_fields.get(str(element)) if section else None
        options = _models_of(field.annotation) if field else ()
        in_mapping = field is not None and get_origin(field.annotation) is dict
        section = options[0] if len(options) == 1 else None
    return holder, path


def _kind(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    return get_args(field.annotation)[0] if field else None


def _models_of(annotation: Any) -> tuple[type[BaseModel], ...]:
    if get_origin(annotation) is Annotated:
        return _models_of(get_args(annotation)[0])
    if get_origin(annotation) is dict:
        return _models_of(get_args(annotation)[1])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(model for arg in get_args(annotation) for model in _models_of(arg))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return (annotation,)
    return ()
