"""The `surefoot shadow` commands: let a version watch, or no more; show what shadows have come to.

Duty: call one function for each command and print. Thin: it knows no figure and no network.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Shadows: versions that only watch.")

Url = Annotated[str | None, typer.Option("--url", help="The service; without it, as the settings here say.")]
Token = Annotated[str | None, typer.Option("--token", help="Its admin token; without it, SUREFOOT_ADMIN_TOKEN.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the service's answer, for machines.")]
Version = Annotated[str | None, typer.Argument(help="One shadow, with all its figures.")]


@app.command("watch")
def watch(policy: str, version: str, url: Url = None, token: Token = None) -> None:
    """Let a version watch: it is shown decisions, and makes none. One that has tripped tries again."""
    from service.rollout_calls import watch_shadow

    _tell(watch_shadow(policy, version, True, url, token))


@app.command("unwatch")
def unwatch(policy: str, version: str, url: Url = None, token: Token = None) -> None:
    """Let a version watch no more."""
    from service.rollout_calls import watch_shadow

    _tell(watch_shadow(policy, version, False, url, token))


@app.command("show")
def show(policy: str, version: Version = None, as_json: AsJson = False, url: Url = None, token: Token = None) -> None:
    """Print what the shadows of the replica that answers have come to."""
    from service.rollout_calls import shadows
    from service.shadow_text import shadow_text, shadows_text

    answer = shadows(policy, url, token)
    if version is not None:
        answer["here"] = [each for each in answer.get("here", []) if each.get("version") == version]
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
        return
    if version is None:
        typer.echo(shadows_text(answer))
        return
    if not answer["here"]:
        from policies.errors import UnknownVersion

        raise UnknownVersion(f"{version!r} does not watch {policy}: `surefoot shadow watch {policy} {version}`")
    typer.echo(shadow_text(answer["here"][0]))


def _tell(view: dict[str, Any]) -> None:
    names = ", ".join(view.get("shadows", [])) or "no version"
    typer.echo(f"{view.get('policy')}: {names} watching; generation {view.get('generation')}")
