"""Signatures: these very files and this very key, or a refusal. Needs the package model-signing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from policies.errors import BundleError, ConfigError
from policies.signing import sign, verify
from tests.policies.networks import identity_files


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A private key, its public key, and another public key."""
    pytest.importorskip("model_signing")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("keys")
    mine, other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    (folder / "key.pem").write_bytes(
        mine.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    for name, key in (("public.pem", mine), ("other.pem", other)):
        (folder / name).write_bytes(
            key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
    return folder / "key.pem", folder / "public.pem", folder / "other.pem"


def test_what_was_signed_is_verified_by_path_or_by_content(keys: tuple[Path, Path, Path]) -> None:
    private, public, _ = keys
    files = identity_files()
    signature = sign(files, private)
    verify(files, signature, public)
    verify(files | {"model.sig": signature}, sign(files, private.read_bytes()), public.read_bytes())


@pytest.mark.parametrize("name", ["policy.yaml", "model.onnx", "golden.json"])
def test_a_file_that_was_changed_is_refused(name: str, keys: tuple[Path, Path, Path]) -> None:
    private, public, _ = keys
    files = identity_files()
    signature = sign(files, private)
    with pytest.raises(BundleError, match="sign it again") as caught:
        verify(files | {name: files[name] + b"\n"}, signature, public)
    assert (caught.value.check, caught.value.field) == ("signature", "model.sig")


def test_another_key_or_no_signature_is_refused(keys: tuple[Path, Path, Path]) -> None:
    private, public, other = keys
    files = identity_files()
    signature = sign(files, private)
    for given, key in (
        (signature, other),
        (b"", public),
        (b"\xff{}", public),
        (b"{}", public),
        (signature[:99], public),
    ):
        with pytest.raises(BundleError) as caught:
            verify(files, given, key)
        assert caught.value.check == "signature"


def test_a_bundle_without_its_files_is_refused_before_any_key_is_read(keys: tuple[Path, Path, Path]) -> None:
    with pytest.raises(BundleError) as caught:
        verify({}, b"", keys[1])
    assert caught.value.check == "files"


def test_a_key_that_cannot_sign_is_an_error_of_its_owner(keys: tuple[Path, Path, Path]) -> None:
    with pytest.raises(ConfigError, match="prime256v1"):
        sign(identity_files(), keys[1])


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(ConfigError, match=r"surefoot\[signing\]"):
        verify(identity_files(), b"", b"")
