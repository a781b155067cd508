"""The output of `kubectl kustomize FOLDER`, for the few features that cluster/ uses; others are an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

Tree = dict[str, Any]
KNOWN = {"apiVersion", "kind", "namespace", "resources", "configMapGenerator", "generatorOptions", "patches"}


def copied(tree: Tree) -> Tree:
    """Without shared parts, which YAML's aliases make: a patch is for one of them."""
    unshared: Tree = json.loads(json.dumps(tree))
    return unshared


def render(folder: Path) -> list[Tree]:
    tree: Tree = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert tree.keys() <= KNOWN, tree.keys() - KNOWN
    found: list[Tree] = []
    for name in tree["resources"]:
        path = folder / name
        found += render(path.resolve()) if path.is_dir() else list(map(copied, yaml.safe_load_all(path.read_text())))
    for generator in tree.get("configMapGenerator", []):
        assert tree["generatorOptions"] == {"disableNameSuffixHash": True}
        made = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": generator["name"], "namespace": tree["namespace"]},
            "data": {name: (folder / name).read_text() for name in generator["files"]},
        }
        old = [t for t in found if (t["kind"], t["metadata"]["name"]) == ("ConfigMap", generator["name"])]
        assert len(old) == (generator.get("behavior") == "replace"), generator
        found = [t for t in found if t not in old] + [made]
    for patch in tree.get("patches", []):
        target = patch["target"]
        hit = [t for t in found if (t["kind"], t["metadata"]["name"]) == (target["kind"], target["name"])]
        assert hit, f"no {target}"
        for tree_ in hit:
            for operation in yaml.safe_load(patch["patch"]):
                apply(tree_, **operation)
    return found


def apply(tree: Any, op: str, path: str, value: Any) -> None:
    """One operation of RFC 6902; `replace` needs something to replace."""
    *way, last = [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")[1:]]
    for part in way:
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    if isinstance(tree, list):
        assert (op, last) == ("add", "-"), path
        tree.append(value)
        return
    assert op == "add" or (op == "replace" and last in tree), path
    tree[last] = value
