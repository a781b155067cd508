"""What the libraries below PyTorch may choose on their own, taken from them: their choices would change results."""

from __future__ import annotations

import os

import torch

from resnet_dist.config.recipe_train import TrainConfig


def set_backends(train: TrainConfig) -> None:
    """Sets this process up for a recipe; call it before anything runs on a GPU.

    - Sums on a CPU depend on the number of threads: the recipe's `cpu_threads`.
    - TF32 rounds products to 10 bits; PyTorch lets cuDNN's convolutions use it by default: only `precision: tf32`
      asks for it, fp32 means fp32.
    - `exact`: kernels whose sums have a fixed order, and no timing of kernels to choose one by. PyTorch has none for a
      few operations on CUDA (the backward pass of max pooling): it warns and names them. Not run on a GPU.
    """
    torch.set_num_threads(train.cpu_threads)
    torch.backends.cudnn.allow_tf32 = train.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = train.precision == "tf32"
    exact = train.reduction == "exact"
    if exact:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when its handle is made
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = exact
    torch.use_deterministic_algorithms(exact, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a pass over memory
