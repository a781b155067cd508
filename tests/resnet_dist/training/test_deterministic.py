"""`reduction: exact` on a GPU: every operation of a step has a deterministic kernel. On fake CUDA tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import small_run as small
import torch
from fake_cuda import Operations, fake_cuda, on_fake_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from resnet_dist.config.recipe import EmaConfig
from resnet_dist.errors import Fault
from resnet_dist.models.registry import window_means
from resnet_dist.training.model import (
    Precision,
    build_optimizer,
    name_nondeterministic_operation,
    set_backends,
)
from resnet_dist.training.reduce import ExactReduction
from resnet_dist.training.state import MovingAverage, TrainState
from resnet_dist.training.step import TrainStep, update_weights

# The operations that torch.use_deterministic_algorithms of torch 2.14 names as without a deterministic CUDA kernel, by
# their names in ATen. max_pool2d_with_indices_backward is not one: its kernels gather, and in the machine code of the
# wheel (cu130, sm_90) none has an atomic addition; those of adaptive_avg_pool2d's backward pass have.
NOT_DETERMINISTIC = {
    "_adaptive_avg_pool2d_backward",
    "_adaptive_avg_pool3d_backward",
    "_ctc_loss_backward",
    "_embedding_bag",
    "_histc",
    "adaptive_max_pool2d_backward",
    "avg_pool3d_backward",
    "bincount",
    "fractional_max_pool2d_backward",
    "fractional_max_pool3d_backward",
    "grid_sampler_2d_backward",
    "grid_sampler_3d_backward",
    "histc",
    "index_reduce",
    "kthvalue",
    "max_unpool2d",
    "max_unpool3d",
    "median",
    "nll_loss2d_forward",
    "put_",
    "reflection_pad1d_backward",
    "reflection_pad2d_backward",
    "reflection_pad3d_backward",
    "scatter_reduce",
    "upsample_bicubic2d_backward",
    "upsample_bilinear2d_backward",
    "upsample_linear1d_backward",
    "upsample_trilinear3d_backward",
}
NETS: dict[str, tuple[dict[str, Any], int]] = {
    "plain18": ({"name": "plain18"}, 64),
    "bottlenecks, everything optional": (
        {
            "name": "resnet50",
            "stem": "deep",
            "pooled_projection": True,
            "se_ratio": 0.25,
            "blur_pool": True,
            "drop_path": 0.1,
            "dropout": 0.1,
        },
        65,  # odd, so the average pool of the projection has an incomplete last window
    ),
    "deep stem with a stride": ({"name": "resnet18", "stem": "deep_strided"}, 64),
    "pre-activation": ({"name": "resnet18", "activation_order": "pre"}, 64),
    "option A": ({"name": "resnet8", "shortcut": "A"}, 32),
    "gates": ({"name": "resnet8", "gate": "exclusive", "shortcut_dropout": 0.1}, 32),
    "vgg16": ({"name": "vgg16"}, 64),
    "googlenet": ({"name": "googlenet"}, 64),
}


@pytest.fixture(autouse=True)
def backends_as_before() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    torch.backends.cudnn.benchmark = False


def operations_of_a_step(
    net: str,
    precision: str = "bf16",
    *,
    optim: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    update: bool = False,
) -> set[str]:
    """The names of what a step of one micro-batch launches; `update`: the update of the weights too."""
    model, size = NETS[net]
    data = {"train": {"kind": "random_resized_crop", "size": size}, "mixing": {"mixup_alpha": 0.2, "cutmix_alpha": 1.0}}
    train = {"ema": {"decay": 0.9}, "micro_batch_size": 2, "global_batch_size": 2, **(train or {})}
    recipe = small.recipe(
        precision, "exact", model={"num_classes": 10, **model}, data=data, optim=optim or {}, train=train
    )
    set_backends(recipe.train)
    with fake_cuda() as device:
        classifier = on_fake_cuda(recipe).train()
        average = MovingAverage(classifier.net, EmaConfig(decay=0.9), steps_per_epoch=1)
        scaler = Precision(recipe.train.precision).scaler(device)
        state = TrainState(
            classifier.net, build_optimizer(classifier.net, recipe.optim), average=average, scaler=scaler, step=10
        )
        step = TrainStep(recipe, state, classifier, ExactReduction(classifier, 0, 1, num_micro_batches=1), device)
        batch = step.rehearsal_batch(1, size)
        with Operations() as operations:
            step.forward_backward(batch)
            step.reduction.finish()
            if update:
                update_weights(state, 0.1, clip_grad_norm=1.0, measure_norm=True)
                average.update(num_steps=10)
    assert not operations.syncs
    return set(operations.launches)


@pytest.mark.parametrize("net", NETS)
def test_no_net_has_an_operation_without_a_deterministic_kernel(net: str) -> None:
    used = operations_of_a_step(net)
    assert "convolution_backward" in used
    assert not used & NOT_DETERMINISTIC


@pytest.mark.parametrize(
    "optim", [{}, {"name": "lamb", "lr": 0.01}, {"freeze": ["stem", "layer2"], "lr_factors": {"head": 10}}]
)
def test_nor_has_an_optimizer(optim: dict[str, Any]) -> None:
    assert not operations_of_a_step("option A", "fp32", optim=optim, update=True) & NOT_DETERMINISTIC


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("loss", [{"kind": "bce", "target_threshold": 0.2}, {"kind": "cross_entropy"}])
def test_nor_has_a_weighted_loss(precision: str, loss: dict[str, Any]) -> None:
    train = {"loss": {**loss, "class_weights": [0.5, 2.0] * 5}, "label_smoothing": 0.1}
    assert not operations_of_a_step("option A", precision, train=train) & NOT_DETERMINISTIC


def test_without_exact_vgg_would_have_one() -> None:
    model, size = NETS["vgg16"]
    recipe = small.recipe(model={"num_classes": 10, **model})
    set_backends(recipe.train)
    with fake_cuda(), Operations() as operations:
        on_fake_cuda(recipe)(torch.zeros((2, size, size, 3), dtype=torch.uint8)).sum().backward()
    assert set(operations.launches) & NOT_DETERMINISTIC == {"_adaptive_avg_pool2d_backward"}


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 8), st.booleans(), st.integers(0, 99))
def test_means_of_windows_are_adaptive_average_pooling(
    height: int, width: int, side: int, channels_last: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    image = torch.randn((2, 3, height, width), dtype=torch.float64).contiguous(memory_format=layout)
    torchs, ours = image.clone().requires_grad_(), image.clone().requires_grad_()
    expected, got = functional.adaptive_avg_pool2d(torchs, side), window_means(ours, side)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)
    weights = torch.randn_like(expected)
    expected.backward(weights)
    got.backward(weights)
    assert torchs.grad is not None
    torch.testing.assert_close(ours.grad, torchs.grad, rtol=0, atol=1e-13)
    if (height, width) == (side, side):  # VGG at 224 px
        assert torch.equal(got, expected)
        assert torch.equal(ours.grad, torchs.grad)  # type: ignore[arg-type]


def test_an_operation_without_a_deterministic_kernel_is_named() -> None:
    named = pytest.raises(Fault, match=r"no deterministic kernel for reflection_pad1d_backward_out_cuda on this device")
    with named, name_nondeterministic_operation():
        raise RuntimeError(
            "reflection_pad1d_backward_out_cuda does not have a deterministic implementation, but you set "
            "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation"
        )


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="out of memory"), name_nondeterministic_operation():
        raise RuntimeError("CUDA error: out of memory")
