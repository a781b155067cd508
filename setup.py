"""Builds the native decode kernel and data preparation's C; all else stands in pyproject.toml.

Optional: where the compiler or libjpeg-turbo's header is missing, the package installs without them. Recipes that ask
for the kernel (`data.decoder: native`) are then refused with a hint; data preparation is slower.
"""

import platform
from itertools import chain
from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("resnet_dist/data/native")
DATA_PREP = (Path("data_prep/converter/native"), Path("data_prep/sources/native"))
SHARED = Path("data_prep/native")
# No contraction: where the compiler may fuse a multiplication and an addition, weights of the resize would differ
# between CPUs. SSE4.1 is 17 years old; newer instructions are chosen when the kernel is loaded (cpu.h).
FLAGS = [
    "-O3",
    "-pthread",
    "-std=gnu11",
    "-ffp-contract=off",
    *(["-msse4.1"] if platform.machine() == "x86_64" else []),
]


def files(folder: Path, pattern: str) -> list[str]:
    return [str(path) for path in sorted(folder.glob(pattern))]


setup(
    ext_modules=[
        Extension(
            "_resnet_dist_decode",
            sources=files(NATIVE, "*.c") + files(SHARED, "*.c"),
            depends=files(NATIVE, "*.h") + files(SHARED, "*.h"),
            include_dirs=[str(SHARED)],
            libraries=["jpeg", "m", "dl"],
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            optional=True,
        ),
        Extension(
            "_data_prep_native",
            sources=[*chain(*(files(folder, "*.c") for folder in DATA_PREP)), *files(SHARED, "*.c")],
            depends=[*chain(*(files(folder, "*.h") for folder in DATA_PREP)), *files(SHARED, "*.h")],
            include_dirs=[str(SHARED)],
            libraries=["m"],
            extra_compile_args=FLAGS,
            optional=True,
        ),
    ]
)
