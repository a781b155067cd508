"""What a step would launch on a GPU: operations on fake CUDA tensors, which have shapes and layouts but no values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resnet_dist.config.recipe import Recipe
from resnet_dist.models import ImageClassifier
from resnet_dist.training.model import build_classifier

VIEWS = {
    *("view", "_unsafe_view", "as_strided", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze"),
    *("squeeze", "split", "split_with_sizes", "alias", "detach", "unbind", "unfold", "diagonal", "_reshape_alias"),
}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
SYNCS = {"nonzero", "is_nonzero", "equal", "_unique2", "masked_select", "item"}
"""Operations that wait for the device, besides reading a number and copies to the host."""

WITHOUT_FAKES = {"_fused_sgd_", "_amp_update_scale_"}
"""Operations in place that torch cannot do on fake tensors."""


class Operations(TorchDispatchMode):
    """Counts what reaches the device within the context."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        """By name, without views and allocations: each is at least one kernel."""
        self.syncs: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" and args[0].is_cuda:
            self.syncs[name] += 1
            return 0.0
        result = None if name in WITHOUT_FAKES else func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)]
        if func.namespace != "aten" or not any(tensor.is_cuda for tensor in tensors):
            return result  # profiling, questions about a tensor, or work on the host
        if name in SYNCS or (name in ("_to_copy", "to", "copy_") and self._to_host(args, result)):
            self.syncs[name] += 1
        elif name not in VIEWS | ALLOCATIONS:
            self.launches[name] += launches(args)
        return result

    @staticmethod
    def _to_host(args: Any, result: Any) -> bool:
        source = args[1] if len(args) > 1 and isinstance(args[1], torch.Tensor) else args[0]
        return bool(source.device.type == "cuda" and result.device.type == "cpu")


def launches(args: tuple[Any, ...]) -> int:
    """1, for a call on lists of tensors too, unless their strides differ: then torch takes one tensor after the other
    (`check_fast_path_restrictions` in ForeachUtils.h)."""
    lists = [arg for arg in args if isinstance(arg, list) and arg and all(isinstance(t, torch.Tensor) for t in arg)]
    layouts = {
        tuple(tuple(s for s, size in zip(t.stride(), t.shape, strict=True) if size != 1) for t in tensors)
        for tensors in lists
    }
    return 1 if len(layouts) <= 1 else len(lists[0])


@contextmanager
def fake_cuda() -> Iterator[torch.device]:
    """Within the context new tensors are fake; on the yielded device, if none is named."""
    device = torch.device("cuda")
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        device,
        patch.object(torch.Tensor, "backward", backward),
        patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        patch("torch.cuda.is_bf16_supported", lambda *_: True),
        patch("torch.cuda.get_device_properties", lambda _: SimpleNamespace(L2_cache_size=50 << 20)),  # of an H100
        # As on real CUDA tensors, optimizers call functions on lists of tensors.
        patch("torch.optim.optimizer._foreach_supported_types", [FakeTensor]),
        patch("torch.utils._foreach_utils._foreach_supported_types", [FakeTensor]),
    ):
        yield device


def backward(loss: torch.Tensor) -> None:
    """`loss.backward()` in Python, because torch's engine asks the driver for the device's streams."""
    assert loss.grad_fn is not None
    pending: dict[Any, list[torch.Tensor | None]] = {loss.grad_fn: [torch.ones_like(loss)]}
    with torch.no_grad():
        while pending:
            node = max(pending, key=lambda node: node._sequence_nr())  # every user of its output came later
            gradients = pending.pop(node)
            if not node.next_functions:  # a leaf: its parameter's gradient
                parameter, gradient = node.variable, gradients[0]
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
                for hook in (parameter._post_accumulate_grad_hooks or {}).values():
                    hook(parameter)
                continue
            results = getattr(node, "apply", node)(*gradients)
            results = results if isinstance(results, tuple) else (results,)
            # A torch.autograd.Function has results for inputs that are no tensors too, here the last ones.
            for (user, number), result in zip(node.next_functions, results, strict=False):
                if user is not None and result is not None:
                    expected = user._input_metadata[number]
                    result = result.sum_to_size(expected.shape).to(expected.dtype)  # as the engine does
                    waiting = pending.setdefault(user, [None] * (number + 1))
                    waiting.extend([None] * (number + 1 - len(waiting)))
                    other = waiting[number]
                    waiting[number] = result if other is None else other + result


def on_fake_cuda(recipe: Recipe) -> ImageClassifier:
    """The recipe's classifier, its weights laid out as on a GPU. Within `fake_cuda`."""
    with unset_fake_temporarily(), torch.device("meta"):
        classifier = build_classifier(recipe)

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

    for module in classifier.modules():  # not `.to(device)`, which fake tensors do not allow
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(fake(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)
    return classifier
