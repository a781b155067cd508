"""What workers send each other of a gradient under `reduction: fast`: torch's communication hooks of DDP."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

Compression = Literal["none", "bf16", "fp16", "powersgd"]
"""powersgd is no hook of DDP's: `powersgd.py`."""
_FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16}
_HOOKS = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}


def compress(ddp: DistributedDataParallel, compression: Compression) -> None:
    """Each worker's part of the gradient is rounded, divided by the number of workers, and summed in that format."""
    if compression != "none":
        ddp.register_comm_hook(None, _HOOKS[compression])


def round_gradients(parameters: Iterable[nn.Parameter], compression: Compression) -> None:
    """What is left of `compress` where there is one worker: nothing is sent, but it trains as the others would."""
    for parameter in parameters if compression != "none" else ():
        if parameter.grad is not None:
            parameter.grad.copy_(parameter.grad.to(_FORMATS[compression]))
