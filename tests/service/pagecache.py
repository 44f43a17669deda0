"""What of a file is not on disk yet, as the kernel tells (cachestat(2), Linux 6.5 and later)."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_CACHESTAT = 451  # the same number on every architecture


class _Range(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_uint64), ("length", ctypes.c_uint64)]


class _Pages(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("cache", "dirty", "writeback", "evicted", "recently_evicted")]


def unwritten_pages(path: Path) -> int | None:
    """Count pages of a file that a power loss would take; None: this kernel does not tell."""
    libc, pages = ctypes.CDLL(None, use_errno=True), _Pages()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if libc.syscall(_CACHESTAT, descriptor, ctypes.byref(_Range(0, 0)), ctypes.byref(pages), 0) == 0:
            return int(pages.dirty + pages.writeback)
        if ctypes.get_errno() in (errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP):
            return None
        raise OSError(ctypes.get_errno(), "cachestat")
    finally:
        os.close(descriptor)
