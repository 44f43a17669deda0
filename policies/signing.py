"""EDGE: signatures on bundles, by the package `model-signing` (OpenSSF), which the extra `signing` installs.

Duty: sign a bundle's three files with a private key, and check such a signature with the public one. The only importer
of model_signing, and only when it is called: services without a key do not need it.
Strategy: the library signs folders, so the files go to a private one for the time of a call. `model.sig` lies beside
the three files and is no part of the bundle's digest: signing a version does not change what it is.
Promise: `verify` returns only if these very files were signed with the key's counterpart.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from policies.archive import SIGNATURE
from policies.bundle import FILES, check_files
from policies.errors import BundleError, ConfigError


def sign(files: Mapping[str, bytes], private_key: bytes | Path) -> bytes:
    """Sign a bundle's files with a private key, PEM of an elliptic curve. Gives what `model.sig` should hold.

    Raises ConfigError when the key cannot be used or model-signing is not installed.
    """
    config = _library("signing").Config
    with _laid_out(files, private_key) as (folder, key, signature):
        try:
            config().use_elliptic_key_signer(private_key=key).sign(folder, signature)
        except Exception as error:  # the library raises what cryptography and protobuf raise
            detail = f"the bundle cannot be signed: {error}; give the PEM of an elliptic-curve private key (prime256v1)"
            raise ConfigError(detail, "private_key") from None
        return signature.read_bytes()


def verify(files: Mapping[str, bytes], signature: bytes, public_key: bytes | Path) -> None:
    """Check the signature of a bundle's files against a public key, PEM of an elliptic curve.

    Raises BundleError when the files are not what was signed with that key, ConfigError when model-signing is absent.
    """
    config = _library("verifying").Config
    with _laid_out(files, public_key) as (folder, key, place):
        place.write_bytes(signature)
        try:
            config().use_elliptic_key_verifier(public_key=key).verify(folder, place)
        except Exception as error:  # whatever a stranger's signature makes the library raise, it is no good signature
            detail = (
                f"{SIGNATURE} does not fit the bundle and the key ({str(error)[:200]}); sign it again, with the "
                "private key of the public key that the service was given"
            )
            raise BundleError(detail, SIGNATURE, "signature") from None


def _library(part: str) -> Any:
    try:
        from model_signing import signing, verifying
    except ImportError as error:
        detail = f"signatures need the package model-signing ({error}); install surefoot[signing]"
        raise ConfigError(detail, "signing") from None
    return {"signing": signing, "verifying": verifying}[part]


@contextmanager
def _laid_out(files: Mapping[str, bytes], key: bytes | Path) -> Iterator[tuple[Path, Path, Path]]:
    """Lay the files out in a private folder: the folder, the key's file, a place for the signature."""
    check_files(files)
    content = key.read_bytes() if isinstance(key, Path) else key
    with tempfile.TemporaryDirectory(prefix="surefoot-signing-") as private:
        root = Path(private)
        folder = root / "bundle"
        folder.mkdir()
        for name in FILES:
            (folder / name).write_bytes(files[name])
        (root / "key.pem").write_bytes(content)
        yield folder, root / "key.pem", root / SIGNATURE
