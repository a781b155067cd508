"""Builds the native decode kernel; all else of the package stands in pyproject.toml.

Optional: where the compiler or libjpeg-turbo's header is missing, the package installs without it, and recipes that ask
for it (`data.decoder: native`) are refused with a hint.
"""

import platform
from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("resnet_dist/data/native")
# No contraction: where the compiler may fuse a multiplication and an addition, weights of the resize would differ
# between CPUs. SSE4.1 is 17 years old; newer instructions are chosen when the kernel is loaded (cpu.h).
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=off", *(["-msse4.1"] if platform.machine() == "x86_64" else [])]

setup(
    ext_modules=[
        Extension(
            "_resnet_dist_decode",
            sources=[str(path) for path in sorted(NATIVE.glob("*.c"))],
            depends=[str(path) for path in sorted(NATIVE.glob("*.h"))],
            libraries=["jpeg", "m", "dl"],
            extra_compile_args=FLAGS,
            optional=True,
        )
    ]
)
