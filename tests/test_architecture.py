"""Which package may import which. Uses the ast, so imports inside functions count too."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("data_prep", "resnet_dist")

# A third-party library, and the packages or modules that alone may import it.
FENCES = {
    "ray": (
        "data_prep.runtime",
        "data_prep.converter",
        "data_prep.bench",
        "resnet_dist.launch",
        "resnet_dist.jobs.client",
        "resnet_dist.doctor.cluster",
        "resnet_dist.bench.control",
        "resnet_dist.sweeps.ray_tune",
        "resnet_dist.sweeps.trial",
    ),
    "mlflow": ("resnet_dist.tracking",),
    "ffcv": (
        "resnet_dist.data",
        "data_prep.bench",  # in benches: the peer to beat
        "resnet_dist.fuzz.ffcv_pixels",
        "resnet_dist.bench",
    ),
    "numba": ("resnet_dist.data", "resnet_dist.bench.peers"),  # in the bench: to seed the peer's draws
    "yaml": ("resnet_dist.config",),
    "pydantic": ("resnet_dist.config",),
    "pyarrow": ("data_prep.sources", "data_prep.beton.table", "resnet_dist.launch.ray_group"),
    "fsspec": (
        "data_prep.sources",
        "data_prep.beton.files",
        "data_prep.converter.object_output",
        "resnet_dist.storage.objects",
    ),
    "botocore": ("resnet_dist.storage.objects",),
    "aiohttp": ("data_prep.sources.files.remote", "resnet_dist.storage.objects"),
    "sklearn": ("data_prep.sources",),
    "scipy": (
        "data_prep.sources",
        "resnet_dist.sweeps.analysis.compare",
        "resnet_dist.sweeps.points",
        "resnet_dist.sweeps.racing",
    ),
    "optuna": ("resnet_dist.sweeps.analysis.figures", "resnet_dist.sweeps.searcher"),
    "jinja2": ("resnet_dist.sweeps.analysis.page",),
    "typer": ("data_prep.cli", "data_prep.runtime.exit_codes", "resnet_dist.cli"),
    "torchvision": (
        "resnet_dist.bench",  # a peer too
        "resnet_dist.models.registry",
        "resnet_dist.weights.libraries",
        "resnet_dist.weights.published",
    ),
    "timm": ("resnet_dist.training.model", "resnet_dist.weights.libraries", "resnet_dist.weights.published"),
    "huggingface_hub": ("resnet_dist.weights.published",),
    "safetensors": ("resnet_dist.weights",),
    "torch": (
        "resnet_dist.data",
        "resnet_dist.models",
        "resnet_dist.training",
        "resnet_dist.evaluation",
        "resnet_dist.weights",
        "resnet_dist.studies",
        "resnet_dist.tracking.models",
        "resnet_dist.tracking.registry",
        "resnet_dist.tracking.served_classifier",
        "resnet_dist.launch",
        "resnet_dist.doctor.cluster",
        "resnet_dist.gpus.device",
        "resnet_dist.bench",
    ),
    "matplotlib": (
        "resnet_dist.studies.curves",
        "resnet_dist.tracking.plots",
        "resnet_dist.sweeps.analysis.figures",
    ),
    "onnxruntime": ("resnet_dist.weights.export",),
    "onnxscript": ("resnet_dist.weights.export",),
    "psutil": ("resnet_dist.tracking.system_metrics",),
    "pynvml": ("resnet_dist.gpus.nvml",),
}

# A part of the house, and the parts whose modules it may import besides its own.
WALLS = {
    "data_prep.errors": (),
    "data_prep.runtime": ("data_prep.errors",),
    "data_prep.native": ("data_prep.errors",),
    "data_prep.pixels": (),
    "data_prep.jpeg": ("data_prep.errors", "data_prep.native", "data_prep.pixels"),
    "data_prep.beton": ("data_prep.errors", "data_prep.jpeg", "data_prep.pixels"),
    "data_prep.sources": (
        "data_prep.errors",
        "data_prep.native",
        "data_prep.beton.class_names",
        "data_prep.beton.files",
    ),
    "data_prep.sources.files": ("data_prep.errors", "data_prep.native", "data_prep.beton.files"),
    "data_prep.converter": (
        "data_prep.errors",
        "data_prep.native",
        "data_prep.jpeg",
        "data_prep.pixels",
        "data_prep.beton",
        "data_prep.sources",
        "data_prep.runtime",
    ),
    "data_prep.bench": (
        "data_prep.errors",
        "data_prep.runtime",
        "data_prep.pixels",
        "data_prep.beton",
        "data_prep.sources",
        "data_prep.converter",
    ),
    "resnet_dist.fuzz": (  # holds all decoders against each other
        "data_prep.errors",
        "data_prep.sources",
        "data_prep.pixels",
        "data_prep.jpeg",
        "data_prep.beton",
        "data_prep.converter",
        "data_prep.cli",
        "resnet_dist.data",
    ),
    "resnet_dist.errors": ("data_prep.errors",),
    "resnet_dist.code_version": (),
    "resnet_dist.gpus": ("resnet_dist.errors",),
    "resnet_dist.config": ("resnet_dist.errors",),
    "resnet_dist.models": ("resnet_dist.errors",),
    "resnet_dist.data": (
        "resnet_dist.errors",
        "resnet_dist.config",
        "data_prep.beton",
        "data_prep.native",
        "data_prep.pixels",
    ),
    "resnet_dist.weights": (
        "resnet_dist.errors",
        "resnet_dist.config",
        "resnet_dist.models",
        "resnet_dist.data",
        "resnet_dist.storage",
        "resnet_dist.tracking",
        "resnet_dist.training",
        "data_prep.beton",
        "data_prep.pixels",
    ),
    "resnet_dist.storage": ("resnet_dist.errors", "data_prep.beton.files"),
    "resnet_dist.tracking": (
        "resnet_dist.errors",
        "resnet_dist.gpus",
        "resnet_dist.storage",
        "data_prep.pixels",
        "data_prep.beton.files",
        "data_prep.beton.manifest",
        "data_prep.beton.class_names",
    ),
    "resnet_dist.training": (
        "resnet_dist.errors",
        "resnet_dist.gpus",
        "resnet_dist.config",
        "resnet_dist.models",
        "resnet_dist.data",
        "resnet_dist.storage",
        "resnet_dist.tracking.tracker",
        "data_prep.beton",
    ),
    "resnet_dist.launch": (
        "resnet_dist.errors",
        "resnet_dist.gpus",
        "resnet_dist.code_version",
        "resnet_dist.config",
        "resnet_dist.data",
        "resnet_dist.models",
        "resnet_dist.storage",
        "resnet_dist.training",
        "resnet_dist.tracking",
        "resnet_dist.weights",
        "data_prep.runtime",
        "data_prep.beton",
        "data_prep.pixels",
    ),
    "resnet_dist.jobs": (
        "resnet_dist.errors",
        "resnet_dist.config",
        "resnet_dist.code_version",
        "resnet_dist.launch.ray_internals",
        "data_prep.runtime.environment",
    ),
    "resnet_dist.doctor": (
        "resnet_dist.errors",
        "resnet_dist.gpus",
        "resnet_dist.config.profile",
        "resnet_dist.storage",
        "resnet_dist.tracking.connection",
        "resnet_dist.training.checkpoint",
        "resnet_dist.training.checkpoint_manager",
        "resnet_dist.launch.cluster",
        "resnet_dist.planner.hardware",
        "resnet_dist.code_version",
        "resnet_dist.launch.publish",
        "data_prep.beton.files",
        "data_prep.runtime.ray_errors",
    ),
    "resnet_dist.sweeps": (
        "resnet_dist.errors",
        "resnet_dist.code_version",
        "resnet_dist.config",
        "resnet_dist.storage",
        "resnet_dist.training",
        "resnet_dist.tracking",
        "resnet_dist.launch",
        "data_prep.runtime.ray_errors",
        "data_prep.runtime.stop",
        "data_prep.beton",
    ),
    "resnet_dist.sweeps.analysis": (
        "resnet_dist.errors",
        "resnet_dist.config",
        "resnet_dist.tracking.plots",
        "resnet_dist.sweeps.ledger",
        "resnet_dist.sweeps.points",
        "resnet_dist.sweeps.racing",
        "resnet_dist.sweeps.scheduler",
        "resnet_dist.sweeps.sweep",
        "data_prep.beton.files",
    ),
    # The decisions of a sweep need no analysis, no Ray and no storage of trials.
    **{
        f"resnet_dist.sweeps.{module}": (
            "resnet_dist.errors",
            "resnet_dist.config",
            "resnet_dist.storage.base",
            "resnet_dist.sweeps.ledger",
            "resnet_dist.sweeps.points",
            "resnet_dist.sweeps.racing",
            "resnet_dist.sweeps.scheduler",
            "resnet_dist.sweeps.sweep",
            "data_prep.beton.files",
        )
        for module in ("forecast", "ledger", "points", "racing", "scheduler", "searcher", "sweep")
    },
    "resnet_dist.evaluation": (
        "resnet_dist.errors",
        "resnet_dist.gpus",
        "resnet_dist.config",
        "resnet_dist.models",
        "resnet_dist.data",
        "resnet_dist.training",
        "resnet_dist.tracking",
        "resnet_dist.weights",
        "data_prep.beton",
        "data_prep.jpeg",
        "data_prep.pixels",
    ),
    "resnet_dist.studies": (
        "resnet_dist.evaluation.protocols",
        "resnet_dist.errors",
        "resnet_dist.config",
        "resnet_dist.models",
        "resnet_dist.data",
        "resnet_dist.training",
        "resnet_dist.tracking",
        "resnet_dist.launch.cluster",
        "resnet_dist.launch.execute",
        "resnet_dist.launch.preflight",
        "resnet_dist.launch.run",
        "resnet_dist.code_version",
        "resnet_dist.weights.source",
        "data_prep.beton",
    ),
    "resnet_dist.planner": (
        "resnet_dist.errors",
        "resnet_dist.config",
        "resnet_dist.models",
        "resnet_dist.training.launches",  # how training merges micro-batches
        "resnet_dist.training.reduce",  # the size of its buckets
    ),
    "resnet_dist.bench": (
        "resnet_dist.errors",
        "resnet_dist.gpus",
        "resnet_dist.config",
        "resnet_dist.data",
        "resnet_dist.tracking",
        "resnet_dist.models",
        "resnet_dist.storage",
        "resnet_dist.training",
        "resnet_dist.evaluation",
        "resnet_dist.planner.step",
        "resnet_dist.weights",
        "resnet_dist.sweeps.ledger",
        "resnet_dist.sweeps.racing",
        "resnet_dist.launch.control",
        "data_prep.beton",
        "data_prep.native",
        "data_prep.runtime.ray_connection",
    ),
}


@cache
def modules() -> dict[str, Path]:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


@cache
def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}  # which may be a module too
    return found


EVERYWHERE = ("data_prep.redaction", "data_prep.shown", "data_prep.strict_json")
"""Import nothing of the project and may be imported by all."""


def within(module: str, parts: tuple[str, ...]) -> bool:
    return any(module == part or module.startswith(part + ".") for part in parts)


def test_the_packages_were_found() -> None:
    assert len(modules()) > 40


@pytest.mark.parametrize("library", sorted(FENCES))
def test_a_library_is_imported_only_behind_its_fence(library: str) -> None:
    trespassers = [
        name
        for name, path in modules().items()
        if any(within(i, (library,)) for i in imports(path)) and not within(name, FENCES[library])
    ]
    assert trespassers == []


@pytest.mark.parametrize("part", sorted(WALLS))
def test_a_package_imports_only_packages_to_its_left(part: str) -> None:
    wrong = [
        f"{name} imports {i}"
        for name, path in modules().items()
        if within(name, (part,))
        for i in imports(path)
        if within(i, PACKAGES) and not within(i, (part, *WALLS[part], *EVERYWHERE))
    ]
    assert wrong == []


def test_formats_of_images_know_no_data_set() -> None:
    sources, data_sets = ("data_prep.sources",), ("data_prep.sources.datasets",)
    formats = {name: path for name, path in modules().items() if within(name, sources) and not within(name, data_sets)}
    assert [name for name, path in formats.items() if any(within(i, data_sets) for i in imports(path))] == []


def test_data_preparation_needs_no_training() -> None:
    wrong = [
        n
        for n, path in modules().items()
        if within(n, ("data_prep",)) and any(within(i, ("resnet_dist",)) for i in imports(path))
    ]
    assert wrong == []


def test_no_import_runs_in_a_circle() -> None:
    names = modules()
    arrows = {
        name: {i for i in imports(path) if i in names and i != name and i != name.partition(".")[0]}
        for name, path in names.items()
    }
    while leaves := [name for name, needed in arrows.items() if not needed]:
        for leaf in leaves:
            del arrows[leaf]
        arrows = {name: needed.difference(leaves) for name, needed in arrows.items()}
    assert sorted(arrows) == [], "these import each other, or import some that do"


def test_code_in_a_model_needs_no_other_module() -> None:
    found = {name.partition(".")[0] for name in imports(ROOT / "data_prep" / "pixels.py")}
    assert found - set(sys.stdlib_module_names) == {"numpy", "PIL"}


def test_every_module_is_in_a_package_or_is_an_entry_point() -> None:
    entry_points = ("data_prep.cli", "resnet_dist.cli", "data_prep.__main__", "resnet_dist.__main__")
    homeless = [n for n in modules() if not within(n, (*WALLS, *EVERYWHERE, *entry_points)) and n not in PACKAGES]
    assert homeless == []


@pytest.mark.parametrize(
    "module", ["resnet_dist.config.loading", "resnet_dist.cli", "data_prep.beton.reader", "data_prep.cli"]
)
def test_light_modules_pull_in_neither_torch_nor_ray(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'ray', 'mlflow', 'ffcv', 'numba'}} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert out.stdout.strip() == "[]"


def test_deployment_and_spaces_hold_no_python() -> None:
    assert [p for folder in ("cluster", "tune_spaces") for p in (ROOT / folder).rglob("*.py")] == []


def test_there_is_no_catch_all_module() -> None:
    assert [n for n in modules() if n.rpartition(".")[2] in {"utils", "helpers", "common", "misc"}] == []
