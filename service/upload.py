"""A pushed bundle's files out of a request's body: a tar, or multipart/form-data with one part for each file.

Duty: read a body under a cap, and take it apart. It does not look into the files: the gate does.
Strategy: the body is collected as it comes, so that one over the cap is refused before it is all here; each piece must
come within the time that a whole small body has. The parts of a form are cut out of it by hand: file names are compared
with a short list, and nothing else of a part's head is believed.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator

from policies.archive import MAX_TAR_BYTES, MEMBER_CAPS, read_tar_files
from policies.errors import BodyTooLarge, BodyTooSlow, BundleError, InvalidField, UnsupportedMedia

TAR = frozenset({"application/x-tar", "application/tar", "application/gzip", "application/octet-stream"})
_BOUNDARY = re.compile(r';\s*boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))', re.IGNORECASE)
_NAME = re.compile(rb'[;\s](filename|name)="([^"\r\n]{1,255})"', re.IGNORECASE)


async def read_upload(content_type: str, pieces: AsyncIterator[bytes], piece_s: float) -> dict[str, bytes]:
    """Read the files of a bundle by name. Raises UnsupportedMedia, BodyTooLarge, BodyTooSlow or BundleError."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        found = _BOUNDARY.search(content_type)
        if found is None:
            raise UnsupportedMedia("multipart/form-data needs a boundary", "Content-Type")
        body = await _collect(pieces, piece_s)
        return await asyncio.to_thread(parts_of, body, (found[1] or found[2]).encode())
    if kind not in TAR:
        detail = f"send the bundle as application/x-tar or multipart/form-data, not as {kind or 'nothing'}"
        raise UnsupportedMedia(detail, "Content-Type")
    return await asyncio.to_thread(read_tar_files, await _collect(pieces, piece_s))


def parts_of(body: bytes, boundary: bytes) -> dict[str, bytes]:
    """Give the parts of a form by their file names, else by their names. Raises BundleError."""
    delimiter = b"\r\n--" + boundary
    _, *parts = (b"\r\n" + body).split(delimiter)
    if not parts or not parts[-1].startswith(b"--"):
        raise BundleError("the form is cut off: its last boundary is missing", "body", "files")
    files: dict[str, bytes] = {}
    for part in parts[:-1]:
        head, separator, content = part.partition(b"\r\n\r\n")
        named = {kind.lower(): name.decode(errors="replace") for kind, name in _NAME.findall(head)}
        name = named.get(b"filename") or named.get(b"name") or ""
        name = name.replace("\\", "/").rpartition("/")[2]
        if not separator or name not in MEMBER_CAPS or name in files:
            known = ", ".join(sorted(MEMBER_CAPS))
            raise BundleError(f"the form has a part {name!r}, twice or unknown; parts are {known}", name, "files")
        files[name] = content
    return files


async def read_text(pieces: AsyncIterator[bytes], cap: int, piece_s: float) -> str:
    """Read a document in UTF-8. Raises InvalidField, BodyTooLarge or BodyTooSlow."""
    try:
        return (await _collect(pieces, piece_s, cap)).decode()
    except UnicodeDecodeError as error:
        raise InvalidField(f"the document is not UTF-8: {error.reason} at byte {error.start}", "body") from None


async def _collect(pieces: AsyncIterator[bytes], piece_s: float, cap: int = MAX_TAR_BYTES) -> bytes:
    found, size = [], 0
    try:
        while True:
            async with asyncio.timeout(piece_s):
                piece = await anext(pieces)
            found.append(piece)
            size += len(piece)
            if size > cap:
                raise BodyTooLarge(f"the upload is larger than the limit of {cap} bytes")
    except StopAsyncIteration:
        return b"".join(found)
    except TimeoutError:
        raise BodyTooSlow(f"nothing of the body arrived for {piece_s} s") from None
