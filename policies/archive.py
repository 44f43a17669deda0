"""EDGE: a folder or a tar as strangers send it becomes a bundle's files, by name. Nothing is unpacked to disk.

Duty: read the plain files that a bundle has, and refuse every other thing that can stand under a name: links, devices,
paths that lead elsewhere. It does not look into the files.
Strategy: a folder is read through descriptors that do not follow links. A tar is read by the few rules of POSIX that
such a tar needs, each unknown thing being refused: general libraries unpack formats in which a few bytes stand for
terabytes, or an offset leads back to its own header.
Promise: whatever the bytes are, files or a BundleError, in time and memory that the caps bound.
"""

from __future__ import annotations

import errno
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from policies.bundle import CAPS, FILES
from policies.errors import BundleError

SIGNATURE = "model.sig"  # beside the three files, where bundles are signed; no part of the bundle's digest
# A sigstore bundle with its certificates has some 10 KB.
MEMBER_CAPS = {**CAPS, SIGNATURE: 1 << 20}
BLOCK = 512
# Folders, files and extended headers. A bundle's tar has 9 at most.
MAX_HEADERS = 32
MAX_PAX_BYTES = 64 << 10
MAX_TAR_BYTES = sum(MEMBER_CAPS.values()) + MAX_HEADERS * (MAX_PAX_BYTES + 2 * BLOCK)
REMEDY = f"pack it with: tar -cf bundle.tar -C FOLDER {' '.join(FILES)}"
KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
    b"L": "a long name",
    b"K": "a long link",
}


def read_folder_files(folder: Path, hardlinks: bool = False) -> dict[str, bytes]:
    """Read a bundle's files from a folder; what else lies there is not looked at. Raises BundleError.

    hardlinks: allow files with several names, as package installers make them; for folders of the program's own.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        detail = f"{folder} is not a folder that can be read ({error.strerror}); give the folder of one bundle"
        raise BundleError(detail, None, "files") from None
    try:
        found = {name: _read_file(handle, name, hardlinks) for name in MEMBER_CAPS}
    finally:
        os.close(handle)
    return {name: content for name, content in found.items() if content is not None}


def _read_file(folder: int, name: str, hardlinks: bool) -> bytes | None:
    try:
        # Without O_NONBLOCK, opening a pipe would wait for its other end.
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise _link(name, "a symbolic link") from None
        detail = f"{name} cannot be read: {error.strerror}; make it a plain file that the service may read"
        raise BundleError(detail, name, "files") from None
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise _link(name, "no plain file")
        if status.st_nlink > 1 and not hardlinks:
            raise _link(name, "a hard link")
        if status.st_size > MEMBER_CAPS[name]:
            raise _too_large(name)
        return _capped(file.read(MEMBER_CAPS[name] + 1), name)


def _link(name: str, what: str) -> BundleError:
    return BundleError(f"{name} is {what}; put a plain copy of the file in its place", name, "links")


def _capped(content: bytes, name: str) -> bytes:
    if len(content) > MEMBER_CAPS[name]:
        raise _too_large(name)
    return content


def _too_large(name: str) -> BundleError:
    return BundleError(f"{name} has more than {MEMBER_CAPS[name]} bytes; export a smaller file", name, "size")


def read_tar_files(data: bytes) -> dict[str, bytes]:
    """Read a bundle's files from a tar, plain or gzip. Raises BundleError."""
    if data[:2] == b"\x1f\x8b":
        data = _gunzip(data)
    files: dict[str, bytes] = {}
    folders = set()
    for header, content in _members(data):
        folder, name = _place(header)
        if header.kind == b"5":
            continue
        if header.kind not in (b"0", b"\0"):
            check = "links" if header.kind in (b"1", b"2") else "archive"
            what = KINDS.get(header.kind, "no plain file")
            raise BundleError(f"the archive's {header.name!r} is {what}; {REMEDY}", name, check)
        if name not in MEMBER_CAPS:
            raise BundleError(f"the archive holds {header.name!r}, which no bundle has; {REMEDY}", name, "archive")
        folders.add(folder)
        if name in files or len(folders) > 1:
            raise BundleError(f"the archive holds more than one {name}; {REMEDY}", name, "archive")
        files[name] = _capped(content, name)
    return files


@dataclass(frozen=True, slots=True)
class _Header:
    name: str
    size: int
    kind: bytes


def _gunzip(data: bytes) -> bytes:
    inflate = zlib.decompressobj(wbits=31)
    try:
        plain = inflate.decompress(data, MAX_TAR_BYTES)
    except zlib.error as error:
        raise BundleError(f"the archive cannot be decompressed ({error}); {REMEDY}", None, "archive") from None
    if not inflate.eof:
        if len(plain) < MAX_TAR_BYTES:
            raise BundleError(f"the archive is cut short; send it again, or {REMEDY}", None, "archive")
        detail = f"the archive has more than {MAX_TAR_BYTES} bytes when decompressed; export a smaller bundle"
        raise BundleError(detail, None, "size")
    return plain


def _members(data: bytes) -> Iterator[tuple[_Header, bytes]]:
    """Walk through the tar. Extended headers give their path to the member behind them, and are not members."""
    at, path = 0, None
    for _ in range(MAX_HEADERS):
        block = data[at : at + BLOCK]
        if not block:  # a whole archive ends with blocks of zeros
            raise BundleError("the archive is cut short; send it again", None, "archive")
        if not block.strip(b"\0"):
            return
        header = _header(block)
        at += BLOCK
        content = data[at : at + header.size]
        if len(content) < header.size:
            raise BundleError(f"the archive is cut short in {header.name!r}; send it again", None, "archive")
        at += -(-header.size // BLOCK) * BLOCK
        if header.kind in (b"x", b"g"):
            path = _pax_path(content, header) or path
            continue
        yield (header if path is None else _Header(path, header.size, header.kind)), content
        path = None
    raise BundleError(f"the archive has more than {MAX_HEADERS} members; {REMEDY}", None, "archive")


def _header(block: bytes) -> _Header:
    try:
        told = int(block[148:156].strip(b" \0"), 8)
        size = int(block[124:136].strip(b" \0") or b"0", 8)
        name, prefix = (raw.split(b"\0")[0].decode() for raw in (block[:100], block[345:500]))
    except ValueError:
        raise BundleError(f"this is no tar, nor one in gzip; {REMEDY}", None, "archive") from None
    if len(block) < BLOCK or told != sum(block[:148]) + 8 * ord(" ") + sum(block[156:]) or size < 0:
        raise BundleError(f"this is no tar, or it is damaged; send it again, or {REMEDY}", None, "archive")
    return _Header(f"{prefix}/{name}" if prefix and block[257:263] == b"ustar\0" else name, size, block[156:157])


def _pax_path(content: bytes, header: _Header) -> str | None:
    """Read an extended header: `length key=value` in each line. Times and owners do not matter; sizes must not be."""
    odd = BundleError(f"the archive's extended header cannot be used; {REMEDY}", None, "archive")
    if header.size > MAX_PAX_BYTES:
        raise odd
    path, at = None, 0
    try:
        while at < len(content):
            length = int(content[at : content.index(b" ", at)])
            record = content[at : at + length]
            key, _, value = record.partition(b" ")[2].partition(b"=")
            if length <= 0 or not record.endswith(b"\n") or key == b"size" or key.startswith(b"GNU.sparse"):
                raise odd
            if key == b"path":
                path = value[:-1].decode()
            at += length
    except ValueError:
        raise odd from None
    return path


def _place(header: _Header) -> tuple[str, str]:
    """Split a member's path into folder and name. Raises BundleError where it leads out of the bundle."""
    path = header.name
    parts = [part for part in path.split("/") if part not in ("", ".")]
    deep = 1 if header.kind == b"5" else 2
    if path.startswith("/") or ".." in parts or "\\" in path or "\0" in path or len(parts) > deep:
        raise BundleError(f"the archive's path {path!r} leads out of a bundle's folder; {REMEDY}", None, "archive")
    return "/".join(parts[:-1]), parts[-1] if parts else ""
