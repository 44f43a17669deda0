"""The `surefoot token` and `surefoot audit` commands: make, list and revoke tokens; verify and export the audit log.

Duty: call one function for each command and print. Thin: it knows no hash and no network.
Promise: `token create` prints the token alone on standard output, so that it can go straight where it belongs; `audit
verify` exits with 1 and names the first entry that is not what was written.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from policies.errors import InvalidField
from service.audit import Broken, Head, line_of, verify
from service.audit_files import read_lines
from service.settings import load_settings

tokens = typer.Typer(no_args_is_help=True, help="Tokens: who may call a running service, and for what.")
audit = typer.Typer(no_args_is_help=True, help="The audit log: who changed what.")

Url = Annotated[str | None, typer.Option("--url", help="The service; without it, as the settings here say.")]
Token = Annotated[str | None, typer.Option("--token", help="Its admin token; without it, SUREFOOT_ADMIN_TOKEN.")]
Role = Annotated[str, typer.Option("--role", help="viewer, client, trainer, operator or admin.")]
Owner = Annotated[str, typer.Option("--owner", help="The person or team whose token it is.")]
Policies = Annotated[list[str] | None, typer.Option("--policy", help="A policy that it is for; without one: all.")]
Hours = Annotated[float | None, typer.Option("--expires-in", min=0.001, help="Hours until it ends; else never.")]
Note = Annotated[str, typer.Option("--note", help="What it is for, for the list.")]
File = Annotated[Path | None, typer.Option("--file", help="A chain file; without it and --url: of the data directory.")]
AuditUrl = Annotated[str | None, typer.Option("--url", help="A running service, in place of a file.")]
Known = Annotated[str | None, typer.Option("--head", help="NUMBER:HASH noted down before: it must stand in the chain.")]
Source = Annotated[str | None, typer.Option("--source", help="With --url: the copy of `redis` or of this `disk`.")]
Out = Annotated[Path | None, typer.Option("--out", help="A new file; without it: standard output.")]


@tokens.command("create")
def create(
    role: Role,
    owner: Owner,
    policy: Policies = None,
    expires_in: Hours = None,
    note: Note = "",
    url: Url = None,
    token: Token = None,
) -> None:
    """Make a token and print it, once: the service keeps its hash alone."""
    from service.push import create_token

    wanted = {"role": role, "owner": owner, "policies": policy or [], "expires_in_hours": expires_in, "note": note}
    made = create_token(wanted, url, token)
    text = made.pop("token")
    typer.echo(json.dumps(made, indent=2), err=True)
    typer.echo(text)


@tokens.command("list")
def list_tokens(url: Url = None, token: Token = None) -> None:
    """List the tokens that stand, without their texts."""
    from service.push import tokens as ask

    typer.echo(json.dumps(ask(url, token), indent=2))


@tokens.command("revoke")
def revoke(token_id: str, url: Url = None, token: Token = None) -> None:
    """End a token: on every replica within 2 s."""
    from service.push import revoke_token

    typer.echo(json.dumps(revoke_token(token_id, url, token), indent=2))


@audit.command("verify")
def verify_log(
    file: File = None, url: AuditUrl = None, token: Token = None, head: Known = None, source: Source = None
) -> None:
    """Recompute every hash of the audit log; exit code 1 with the first entry that is wrong."""
    known = None if head is None else _head(head)
    try:
        found = verify(_lines(file, url, token, source), known)
    except Broken as broken:
        typer.echo(f"broken at entry {broken.seq}: {broken.reason}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{found.seq} entries, unbroken; head {found.seq}:{found.hash}")


@audit.command("export")
def export(
    file: File = None, url: AuditUrl = None, token: Token = None, out: Out = None, source: Source = None
) -> None:
    """Write the audit log as JSON lines, as `audit verify --file` reads them."""
    lines = _lines(file, url, token, source)
    if out is None:
        for line in lines:
            sys.stdout.buffer.write(line + b"\n")
        return
    with out.open("xb") as target:
        target.writelines(line + b"\n" for line in lines)


def _lines(file: Path | None, url: str | None, token: str | None, source: str | None) -> Iterator[bytes]:
    if url is not None:
        from service.push import audit as ask

        if file is not None:
            raise InvalidField("give --file or --url, not both", "--file")
        return map(line_of, ask(url, token, source=source))
    return read_lines(file or load_settings().data_dir / "audit" / "chain-0.jsonl")


def _head(text: str) -> Head:
    found = re.fullmatch(r"(\d{1,15}):([0-9a-f]{64})", text)
    if found is None:
        raise InvalidField("--head is NUMBER:HASH, as `surefoot audit verify` prints it", "--head")
    return Head(int(found[1]), found[2])
