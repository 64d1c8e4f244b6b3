"""Compiled kernels on disk, for every backend that compiles: the folder and its entries.

An entry is a SHA-256 of its key and code, then the code.  The hash detects damage: such an entry is compiled again.
Permissions protect against other users: the folder is used only if its owner alone can write it.  Nothing here raises
for a folder or a file: a process without a cache compiles its own kernels, after one warning.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import struct
import tempfile
from pathlib import Path

__all__ = ["cache_folder", "key_of", "read", "write"]

_log = logging.getLogger("moealign")


def _folder(fallback: str | None = None) -> Path:
    folder = os.environ.get("MOEALIGN_CACHE_DIR")
    if folder:
        return Path(folder)
    return Path(fallback or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moealign"


@functools.cache
def _warn(reason: str) -> None:
    _log.warning("kernels are compiled in every process: %s; set MOEALIGN_CACHE_DIR to a folder of yours", reason)


@functools.cache
def _checked(folder: Path) -> Path | None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat()
        if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
            raise PermissionError(f"{folder} belongs to another user or can be written by others")
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} cannot be read and written")
    except (OSError, RuntimeError) as error:
        _warn(str(error))
        return None
    return folder


def cache_folder(fallback: str | None = None) -> Path | None:
    """MOEALIGN_CACHE_DIR, else fallback/moealign, else XDG_CACHE_HOME/moealign, else ~/.cache/moealign, as an absolute
    path; None, after one warning, if that is not safe to use."""
    try:
        folder = Path(os.path.abspath(_folder(fallback)))
    except (OSError, RuntimeError) as error:  # no home folder, or no current one
        _warn(str(error))
        return None
    return _checked(folder)


def key_of(*ingredients: str | bytes) -> str:
    """The key of an entry: it changes with every ingredient."""
    digest = hashlib.sha256()
    for each in ingredients:
        encoded = each if isinstance(each, bytes) else each.encode()
        digest.update(struct.pack("<q", len(encoded)) + encoded)
    return digest.hexdigest()


def read(path: Path, key: str) -> bytes | None:
    """The code at `path`; None if there is none, or not one that :func:`write` wrote for `key`."""
    try:
        entry = path.read_bytes()
    except OSError:
        return None
    code = entry[32:]
    if not code or hashlib.sha256(key.encode() + code).digest() != entry[:32]:
        _log.warning("%s is damaged: compiling again", path)
        return None
    return code


def write(path: Path, key: str, code: bytes) -> None:
    """Write an entry atomically: a reader never sees half of one, and concurrent writers write the same."""
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(key.encode() + code).digest() + code)
        os.replace(temporary, path)
    except OSError as error:
        _warn(f"{path.parent} was not written: {error.strerror or error}")
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)  # exists only if it was not renamed
