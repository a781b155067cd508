"""The file of the next, finer space, ready to be run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from data_prep.beton.files import write_text_atomically
from resnet_dist.config.loading import recipe_from_tree, tree_to_yaml
from resnet_dist.config.space import COORDINATES, Space
from resnet_dist.errors import UserError
from resnet_dist.tune.ledger import read_ledger
from resnet_dist.tune.narrow import narrowed
from resnet_dist.tune.ranking import rank
from resnet_dist.tune.state import replay


def next_space_text(sweep_dir: Path, keep: float, output: Path) -> tuple[str, list[str]]:
    """(YAML, what was done in words). Raises UserError as `narrowed` does.

    The base recipe is written beside `output` only by reference: the sweep's own copy, so that it cannot change.
    """
    state = replay(read_ledger(sweep_dir))
    if state.began is None:
        raise UserError(f"{sweep_dir}: no sweep was begun here")
    space = Space.model_validate(state.began.space)
    ranking = rank(space, state)
    began = state.began

    def is_allowed(key: str, value: float) -> bool:
        if key in COORDINATES:
            return value > 0
        try:
            recipe_from_tree(began.base, {**space.proxy, key: value})
        except ValueError:
            return False
        return True

    parameters, words = narrowed(space, ranking, keep, is_allowed)
    base = sweep_dir / "base_recipe.yaml"
    if not base.exists():
        write_text_atomically(base, tree_to_yaml(state.began.base))
    folder = output.resolve().parent
    tree: dict[str, Any] = {
        **space.model_dump(mode="json", exclude={"space", "first_points", "warm_start"}),
        "base": os.path.relpath(base.resolve(), folder),
        "space": parameters,
        "warm_start": [os.path.relpath(sweep_dir.resolve(), folder)],
    }
    best = ranking.best
    head = [
        f"Narrowed from the sweep {state.began.name} ({state.began.sweep_hash}) around {best.score:.4g}."
        if best
        else ""
    ]
    head += words
    return "".join(f"# {line}\n" for line in head) + "\n" + tree_to_yaml(tree), words
