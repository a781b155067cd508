"""Activation checkpointing, compiled nets and compressed gradients: what they may change, and what they may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import worker_process as small
from torch import nn

from resnet_dist.config.loading import load_profile
from resnet_dist.config.recipe import Recipe, TrainConfig
from resnet_dist.errors import UserError
from resnet_dist.launch.preflight import require_compatible
from resnet_dist.storage.folder import FolderStorage
from resnet_dist.training.checkpoint import Identity
from resnet_dist.training.context import LocalContext, TrainingJob
from resnet_dist.training.feed import Samples
from resnet_dist.training.loop import Trainer
from resnet_dist.training.model import build_classifier, recompute_blocks
from resnet_dist.training.reduce import round_gradients
from resnet_dist.training.schedule import RunPlan


def trained(folder: Path, recipe: Recipe, num_steps: int = 3, **options: Any) -> Trainer:
    plan = RunPlan(
        steps_per_epoch=4,
        total_steps=12,
        last_step=num_steps,
        eval_every_epochs=99,
        save_every_epochs=99,
        save_every_steps=None,
        log_every_steps=num_steps,
    )
    job = TrainingJob(recipe, plan, Identity("r", "d"), folder, folder, loader_threads=1, **options)
    train, val = small.Memory(small.NUM_TRAIN, 4, seed=1), small.Memory(small.NUM_VAL, 10, seed=2)
    context = LocalContext(FolderStorage(folder))
    trainer = Trainer(job, context, small.Points(), Samples(train, small.NUM_TRAIN), Samples(val, small.NUM_VAL))
    trainer.fit()
    return trainer


def test_activation_checkpointing_changes_no_bit(tmp_path: Path) -> None:
    """Drop-path, dropout, running statistics and their moving average included; the average's blocks are its own."""
    recipe = small.recipe("fp32", "fast", **small.PARTS)
    kept = trained(tmp_path / "kept", recipe)
    anew = trained(tmp_path / "anew", recipe, recompute_activations=True)
    assert small.digest(anew.state.state_dict()) == small.digest(kept.state.state_dict())
    assert anew.metrics["val/loss"] == kept.metrics["val/loss"]


def test_activation_checkpointing_is_refused_for_compiled_nets() -> None:
    recipe = small.recipe("fp32", "fast", train={"compile": True})
    laptop = load_profile(Path("cluster/profiles/laptop.yaml"), ["recompute_activations=true"])
    with pytest.raises(UserError, match=r"recompute_activations .* train\.compile exclude each other"):
        require_compatible(recipe, laptop)
    require_compatible(small.recipe("fp32", "fast"), laptop)


def test_activation_checkpointing_keeps_less() -> None:
    """Bytes that autograd holds between the passes."""

    def held(recomputes: bool) -> int:
        model = build_classifier(small.recipe("fp32", "fast")).train()
        if recomputes:
            recompute_blocks(model)
        seen: dict[int, int] = {}
        weights = {p.data_ptr() for p in model.parameters()}

        def pack(x: torch.Tensor) -> torch.Tensor:
            if x.data_ptr() not in weights:
                seen[x.data_ptr()] = x.numel() * x.element_size()
            return x

        images = torch.zeros((16, 8, 8, 3), dtype=torch.uint8)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(images).sum()
        total = sum(seen.values())
        loss.backward()
        return total

    assert held(recomputes=True) < held(recomputes=False) / 3


def test_a_compiled_net_trains_the_same_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dynamo's graphs run as they are, the numbers are those of the net: what it traces is right, with running
    statistics and without, under a drop-path key that changes with every micro-batch."""
    compile_net, graphs = torch.compile, []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_net(model, backend=backend, **options))
    parts = {"model": {"drop_path": 0.1}, "train": {"ema": {"decay": 0.5}}}
    plain = trained(tmp_path / "plain", small.recipe("fp64", "fast", **parts))
    parts["train"] = parts["train"] | {"compile": True}  # type: ignore[dict-item]
    fused = trained(tmp_path / "fused", small.recipe("fp64", "fast", **parts))
    assert len(graphs) == 2
    assert fused.metrics["val/loss"] == pytest.approx(plain.metrics["val/loss"], abs=1e-9)
    for key, value in plain.state.net.state_dict().items():
        torch.testing.assert_close(fused.state.net.state_dict()[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("compression", "digits"), [("bf16", 8), ("fp16", 11)])
def test_one_worker_rounds_as_many_do(compression: Any, digits: int) -> None:
    layer = nn.Linear(5, 3)
    layer.weight.grad = torch.randn(3, 5)
    exact = layer.weight.grad.clone()
    round_gradients(layer.parameters(), compression)
    mantissa, _ = torch.frexp(layer.weight.grad)
    assert torch.equal(mantissa * 2**digits, (mantissa * 2**digits).round())
    torch.testing.assert_close(layer.weight.grad, exact, rtol=2.0**-digits, atol=0)


def test_exact_sends_what_it_computes() -> None:
    train = {"global_batch_size": 8, "micro_batch_size": 4, "total_epochs": 1, "reduction": "exact"}
    with pytest.raises(ValueError, match="gradient_compression: bf16 needs reduction: fast"):
        TrainConfig.model_validate({**train, "gradient_compression": "bf16"})
