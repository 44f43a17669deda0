# Invariant: whatever the bytes are, read_bundle and read_tar_files give their value or raise BundleError, nothing else.
"""The gate's fuzz target, for hypothesis (test_gate.py) and, by hand, for atheris:

    pip install atheris && python -m tests.fuzz.fuzz_gate -rss_limit_mb=1024 -max_total_time=600 CORPUS

`-rss_limit_mb` is the invariant's other half: bounded memory. An input is a tar, or the three files of a bundle, each
behind its length; the manifest is made to fit the network, or no mutated network would come past its digest.
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Mapping
from hashlib import sha256
from importlib import import_module

from policies.archive import read_tar_files
from policies.bundle import FILES, PolicyBundle, read_bundle
from policies.errors import BundleError

LENGTHS = struct.Struct("<III")
SHA256 = re.compile(rb"\b[0-9a-f]{64}\b")


def one_input(data: bytes) -> None:
    """Hold the invariant on one input."""
    if data[:1] == b"T":
        hold_tar(data[1:])
    else:
        hold_files(unpacked(data[1:]))


def hold_files(files: Mapping[str, bytes]) -> PolicyBundle | None:
    """Hold the invariant on the files of a bundle. Gives the bundle, None when it was refused."""
    try:
        bundle = read_bundle(files)
    except BundleError as error:
        _check_explained(error)
        return None
    assert isinstance(bundle, PolicyBundle)
    return bundle


def _check_explained(error: BundleError) -> None:
    assert error.detail
    assert error.check


def hold_tar(data: bytes) -> dict[str, bytes] | None:
    """Hold the invariant on the bytes of an archive, and on the bundle inside. Gives its files, None when refused."""
    try:
        files = read_tar_files(data)
    except BundleError as error:
        _check_explained(error)
        return None
    hold_files(files)
    return files


def refitted(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Write the network's own digest into the manifest."""
    digest = sha256(files["model.onnx"]).hexdigest().encode()
    return dict(files) | {"policy.yaml": SHA256.sub(digest, files["policy.yaml"])}


def packed(files: Mapping[str, bytes]) -> bytes:
    """Write the files as an input of this target: a seed for a corpus."""
    return b"F" + LENGTHS.pack(*(len(files[name]) for name in FILES)) + b"".join(files[name] for name in FILES)


def unpacked(data: bytes) -> dict[str, bytes]:
    sizes = LENGTHS.unpack(data[: LENGTHS.size].ljust(LENGTHS.size, b"\0"))
    files, at = {}, LENGTHS.size
    for name, size in zip(FILES, sizes, strict=True):
        files[name] = data[at : at + size]
        at += size
    return refitted(files)


def main() -> None:
    """Run atheris until it finds something or is stopped."""
    atheris = import_module("atheris")  # installed by hand, for this alone
    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
