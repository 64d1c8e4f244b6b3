"""From CUDA source to a cubin, through NVRTC and a cache on disk.  Knows nothing of MoE.

Conventions for a ``.cu`` file in ``kernels/``:

- A file includes nothing but ``.cuh`` files of its folder, by name.
- Kernels are ``extern "C" __global__``, and **every parameter is 8 bytes**: a pointer or a ``long long``.
- Macros specialise a kernel.  A file with several kernels compiles one of them, selected by a macro.
- Cluster sizes are part of the code (``__cluster_dims__``).

:mod:`moealign.backend.cache` describes the cache.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from ..cache import cache_folder, key_of, read, write

__all__ = ["Defines", "architectures", "build", "compiler_version", "cubin", "source"]

Defines = tuple[tuple[str, int], ...]
"""Macros of one specialisation: (name, value)."""

_STANDARD = "c++17"
_KERNELS = Path(__file__).parent / "kernels"
_INCLUDE = re.compile(r'^#include "([a-z_]+\.cuh)"$', re.MULTILINE)


@functools.cache
def compiler_version() -> str:
    """NVRTC's version.  Raises RuntimeError if it cannot be loaded."""
    from cuda.bindings import nvrtc

    code, major, minor = nvrtc.nvrtcVersion()
    if int(code):
        raise RuntimeError(f"NVRTC: expected its version, got {code}")
    return f"{major}.{minor}"


@functools.cache
def architectures() -> tuple[str, ...]:
    """The architectures that NVRTC compiles for, as ("sm_75", ...).  Raises RuntimeError if NVRTC fails."""
    from cuda.bindings import nvrtc

    code, numbers = nvrtc.nvrtcGetSupportedArchs()
    if int(code):
        raise RuntimeError(f"NVRTC: expected the architectures that it knows, got {code}")
    return tuple(f"sm_{number}" for number in numbers)


@functools.cache
def source(name: str, folder: Path = _KERNELS) -> str:
    """The text of file `name` in `folder`, with every ``#include`` replaced by the text of that file."""
    text = (folder / name).read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda include: source(include[1], folder), text)


def build(source_text: str, name: str, defines: Defines, arch: str) -> bytes:
    """The cubin of kernel `name` for `arch` ("sm_90").  Needs neither a GPU nor a driver; raises NVRTC's errors."""
    from cuda.core import Program, ProgramOptions

    macros: list[str | tuple[str, str]] = [(key, str(value)) for key, value in defines]
    options = ProgramOptions(name=name, arch=arch, std=_STANDARD, define_macro=macros or None)
    code = Program(source_text, "c++", options).compile("cubin").code
    assert isinstance(code, bytes)
    return code


def cache_key(source_text: str, name: str, defines: Defines, arch: str, version: str) -> str:
    """The name of one cubin in the cache: it changes with everything that the code depends on."""
    return key_of(source_text, name, *(f"{key}={value}" for key, value in defines), arch, version, _STANDARD)


def cubin(source_text: str, name: str, defines: Defines, arch: str) -> bytes:
    """:func:`build` through the cache on disk."""
    folder = cache_folder()
    if folder is None:
        return build(source_text, name, defines, arch)
    key = cache_key(source_text, name, defines, arch, compiler_version())
    path = folder / f"{key}.cubin"
    code = read(path, key)
    if code is None:
        code = build(source_text, name, defines, arch)
        write(path, key, code)
    return code
