"""Untrusted YAML: read, or refused in one line; never a traceback, a hang, or unbounded memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from resnet_dist.config.loading import load_profile, load_recipe, load_space, recipe_of
from resnet_dist.config.yaml_text import parse_value, parse_yaml
from resnet_dist.errors import UserError

ROOT = Path(__file__).parents[3]
RECIPE = (ROOT / "resnet_dist/recipes/digits_resnet20.yaml").read_text()
PROFILE = (ROOT / "cluster/profiles/laptop.yaml").read_text()
SPACE = (ROOT / "tune_spaces/lr_wd_grid.yaml").read_text()
LOADERS: dict[str, Callable[[Path], object]] = {RECIPE: load_recipe, PROFILE: load_profile, SPACE: load_space}


def alias_bomb(levels: int) -> str:
    return "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, levels))


def merge_bomb(levels: int) -> str:
    return "a0: &a0 {k: v}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, levels))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 2026-13-99", "month must be in 1..12"),
        ("seed: !!int xyz", "invalid literal"),
        (f"seed: {'1' * 5000}", "4300 digits"),
        ("a: " + "[" * 2000 + "]" * 2000, "levels deep"),
        ("a: " + "{b: " * 40 + "1" + "}" * 40, "levels deep"),
        ("? [a]\n: 1", "a key is a list or mapping"),
        (alias_bomb(60), "more than 100,000 values"),
        (merge_bomb(60), "more than 100,000 values"),
        ("a: &a [*a]", "an alias refers to its own parent"),
        ("a: 1\na: 2", "'a' occurs twice"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: !!binary é", "not valid YAML"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("--- 1\n--- 2", "expected a single document"),
        ('a: "\\x1b[31m"', "control character"),
        ('"\\0": 1', "control character"),
        ("a: \x07", "not valid YAML"),
        ("x" * (1 << 20) + "x", "larger than 1 MiB"),
    ],
)
def test_an_unreadable_file_is_reported_in_a_short_line(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_yaml(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1.5", 1.5),
        ("null", None),
        ("", None),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ("{kind: step}", {"kind": "step"}),
        ("'3'", "3"),
        ('"a b"', "a b"),
        ("/x/runs #2", "/x/runs #2"),
        ("#2", "#2"),
        ("a: b", "a: b"),
        ("C:\\runs", "C:\\runs"),
        ("*", "*"),
        ("!!int 3", "!!int 3"),
        ("&a 3", "&a 3"),
        ("- 3", "- 3"),
        ("%2F", "%2F"),
        ("sqlite:///a b.db", "sqlite:///a b.db"),
        ("@x", "@x"),
        ("|", "|"),
    ],
)
def test_a_value_on_the_command_line_is_what_was_typed(text: str, value: object) -> None:
    assert parse_value(text) == value


@given(st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=20))
def test_any_value_is_itself_or_refused(text: str) -> None:
    with suppress(ValueError):
        value = parse_value(text)
        assert not isinstance(value, str) or value == text.strip() or text.strip()[0] in "\"'"


def readable(path: Path, load: Callable[[Path], object]) -> None:
    message = ""
    try:
        load(path)
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 12_000


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates()
TREES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
@example(data=None)
def test_any_change_of_a_file_is_read_or_refused_in_one_line(tmp_path: Path, data: Any) -> None:
    """A key of a good recipe, profile or space gets any value whatever, or some of its characters change."""
    path = tmp_path / "file.yaml"
    if data is None:
        path.write_bytes(b"\xff\xfe\x00")
        readable(path, load_recipe)
        return
    text = data.draw(st.sampled_from(list(LOADERS)))
    if data.draw(st.booleans()):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(start + 30, len(text))))
        path.write_text(text[:start] + data.draw(st.text(max_size=5)) + text[end:], errors="surrogatepass")
    else:
        tree = yaml.safe_load(text)
        node = tree
        while True:
            key = data.draw(st.sampled_from(sorted(node)))
            if not isinstance(node[key], dict) or data.draw(st.booleans()):
                break
            node = node[key]
        node[key] = data.draw(TREES)
        path.write_text(yaml.safe_dump(tree, allow_unicode=True), errors="surrogatepass")
    readable(path, LOADERS[text])


@pytest.mark.parametrize("tree", [None, 3, [], {}, {"seed": [[]]}, {"model": {"name": None}}, {"data": {"train": 1}}])
def test_a_checkpoint_with_another_thing_than_a_recipe_is_refused(tree: object) -> None:
    with pytest.raises(UserError, match=r"^runs/r/epoch=1: "):
        recipe_of(tree, "runs/r/epoch=1")


def test_quoted_text_is_shortened(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE + alias_bomb(12).replace("a11", "optim") + f"x{'y' * 5000}: 1\n" + f"seeds: {'z' * 5000}\n")
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert len(str(caught.value)) < 4000


def test_a_file_of_another_kind_is_named_as_such() -> None:
    recipe, profile = ROOT / "resnet_dist/recipes/digits_resnet20.yaml", ROOT / "cluster/profiles/laptop.yaml"
    space = ROOT / "tune_spaces/lr_wd_grid.yaml"
    for path, load, message in (
        (recipe, load_profile, "this is a recipe, but a profile is expected"),
        (profile, load_recipe, "this is a profile, but a recipe is expected"),
        (space, load_recipe, "this is a search space, but a recipe is expected"),
        (recipe, load_space, "this is a recipe, but a search space is expected"),
    ):
        with pytest.raises(UserError) as caught:
            load(path)
        assert str(caught.value) == f"{path}: {message}"


def test_valid_keys_are_listed_once(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    with pytest.raises(UserError) as caught:
        load_recipe(path, ["optim.a=1", "optim.b=1", "optim.lrr=1"])
    assert str(caught.value).count("clip_grad_norm") == 1
    assert "did you mean lr?" in str(caught.value)
