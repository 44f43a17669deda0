"""The `surefoot policy` commands: check, inspect, export and push files; list, promote and delete versions.

Duty: call one function for each command and print. Thin: it knows no file format and no network.
Strategy: PATH is a bundle's folder, a tar of one, or a plain file of a training library; the last becomes a bundle by
the same options in every command, so that what `check` accepts `push` accepts too.
Promise: exit code 0 when a check holds or a thing is done, else 1, with one line that says why.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from policies.errors import BundleError
from service.cli_options import described, options_of, read_options
from service.settings import load_settings

app = typer.Typer(no_args_is_help=True, help="Policies and bundles.")

Kind = Annotated[str, typer.Option(help="auto | onnx | sb3 | torch | d3rlpy | qtable")]
Url = Annotated[str | None, typer.Option("--url", help="The service; without it, as the settings here say.")]
Token = Annotated[str | None, typer.Option("--token", help="Its admin token; without it, SUREFOOT_ADMIN_TOKEN.")]


@app.command("list")
def list_policies() -> None:
    """List the policies that a start would load."""
    from policies.store import BUNDLED, read_directory

    for stored in read_directory(load_settings().policies or BUNDLED):
        for label, bundle in sorted(stored.bundles.items()):
            mark = {stored.deployment.champion: "champion", stored.deployment.baseline: "baseline"}.get(label, "")
            head, description = bundle.manifest.head, bundle.manifest.description
            typer.echo(f"{stored.name}/{label}\t{mark}\t{head}\t{bundle.digest[:12]}\t{description}")


@app.command("check")
@described
def check(path: Path, said: dict[str, Any], kind: Kind = "auto") -> None:
    """Check a bundle, or the bundle that a plain file would become: every check of a load, with its verdict."""
    from policies.contract import examine, refused

    try:
        report = examine(files_of(path, said, kind))
    except BundleError as error:
        report = refused(error)
    typer.echo(report.text())
    raise typer.Exit(0 if report.ok else 1)


@app.command("inspect")
@described
def inspect(path: Path, said: dict[str, Any], kind: Kind = "auto") -> None:
    """Say what a bundle or a plain file holds: inputs, outputs, spaces, head, what training has seen."""
    from policies.describe import describe, describe_profile
    from policies.export import read_onnx
    from policies.profiles import recognise

    if not _is_bundle(path) and path.suffix == ".onnx" and path.is_file():
        typer.echo(describe_profile(recognise(read_onnx(path))))
    try:
        typer.echo(describe(files_of(path, said, kind)))
    except BundleError as error:
        typer.echo(f"to make it a bundle: {error.detail}")
        raise typer.Exit(0 if error.check == "profile" else 1) from None


@app.command("export")
@described
def export(
    source: Path,
    out: Annotated[Path, typer.Option(help="Folder of policies: the bundle goes to OUT/POLICY/VERSION.")],
    said: dict[str, Any],
    kind: Kind = "auto",
) -> None:
    """Make a trained policy a bundle. A .zip, .d3 or .pkl runs code when it is read: export only files of your own."""
    from policies.export import export_file

    typer.echo(export_file(source, options_of(source, said), out, kind))


@app.command("push")
@described
def push(path: Path, said: dict[str, Any], url: Url = None, token: Token = None, kind: Kind = "auto") -> None:
    """Send a bundle, or the bundle that a plain file becomes, to a running service, which checks it once more."""
    files = files_of(path, said, kind)
    from service.push import push as send

    _show(send(files, url, token))


@app.command("versions")
def versions(policy: str, url: Url = None, token: Token = None) -> None:
    """List the versions of a policy that a running service holds."""
    from service.push import versions as ask

    _show(ask(policy, url, token))


@app.command("promote")
def promote(policy: str, version: str, url: Url = None, token: Token = None) -> None:
    """Make a version the champion."""
    from service.push import promote as ask

    _show(ask(policy, version, url, token))


@app.command("delete")
def delete(policy: str, version: str, url: Url = None, token: Token = None) -> None:
    """Delete a version that decides nothing."""
    from service.push import delete as ask

    _show(ask(policy, version, url, token))


def _show(answer: object) -> None:
    typer.echo(json.dumps(answer, indent=2))


def files_of(path: Path, said: dict[str, Any], kind: str) -> dict[str, bytes]:
    """Give the three files of a bundle, by name, from wherever PATH leads. Raises BundleError."""
    from policies.export import bundle_files

    if _is_bundle(path):
        if said != read_options():
            detail = f"{path} is a bundle: its manifest says what the options would say of a plain file"
            raise BundleError(detail, "options", "profile")
        return _read_bundle_files(path)
    return bundle_files(path, options_of(path, said), kind)


def _is_bundle(path: Path) -> bool:
    return path.is_dir() or path.name.endswith((".tar", ".tar.gz", ".tgz"))


def _read_bundle_files(path: Path) -> dict[str, bytes]:
    from policies.archive import read_folder_files, read_tar_files

    if path.is_dir():
        return read_folder_files(path)
    try:
        return read_tar_files(path.read_bytes())
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}", "source", "files") from None
