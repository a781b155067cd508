"""The kernel that a recipe's decoder means."""

from __future__ import annotations

from typing import Any

from resnet_dist.data.kernels import Decoder, Kernel


def open_kernel(decoder: Decoder, num_threads: int, max_image_bytes: int) -> Kernel:
    """`max_image_bytes`: of the largest image, decoded. UserError if the native kernel was not built."""
    kernel: Any  # imported here: numba and ffcv take seconds, and the native kernel may be missing
    if decoder == "native":
        from resnet_dist.data.native_kernel import NativeKernel

        kernel = NativeKernel(num_threads)
    else:
        from resnet_dist.data.ffcv_kernel import FfcvKernel

        kernel = FfcvKernel(num_threads, max_image_bytes)
    return kernel
