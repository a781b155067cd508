"""The only import of ffcv, because the import has a side effect: it sets torch's intra-op threads to 1.

That would change the sums of CPU kernels, hence results. The number of before is put back.
"""

from __future__ import annotations

import torch

_intra_op_threads = torch.get_num_threads()
from ffcv.libffcv import ctypes_imdecode, ctypes_resize, lib  # noqa: E402
from ffcv.loader import Loader  # noqa: E402
from ffcv.loader import loader as loader_module  # noqa: E402
from ffcv.loader.epoch_iterator import EpochIterator  # noqa: E402
from ffcv.memory_managers.base import MemoryContext, MemoryManager  # noqa: E402
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.pipeline.compiler import Compiler  # noqa: E402
from ffcv.pipeline.operation import Operation  # noqa: E402
from ffcv.pipeline.pipeline_spec import PipelineSpec  # noqa: E402
from ffcv.pipeline.state import State  # noqa: E402
from ffcv.traversal_order.base import TraversalOrder  # noqa: E402

torch.set_num_threads(_intra_op_threads)

__all__ = [
    "AllocationQuery",
    "Compiler",
    "EpochIterator",
    "Loader",
    "MemoryContext",
    "MemoryManager",
    "Operation",
    "PipelineSpec",
    "State",
    "TraversalOrder",
    "ctypes_imdecode",
    "ctypes_resize",
    "lib",
    "loader_module",
]
