"""The `surefoot rollout` commands: show and watch a rollout, plan it, move it.

Duty: call one function for each command and print. Thin: it knows no statistics and no network.
Promise: a move is one call. Exit code 0 when it is done, else 1, with one line that says why.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from policies.errors import ConfigError, SafetyError

if TYPE_CHECKING:  # the process that supervises workers imports this file
    from service.rollout_calls import Move

app = typer.Typer(no_args_is_help=True, help="Rollouts: from shadow to canary to champion, or straight back.")

Url = Annotated[str | None, typer.Option("--url", help="The service; without it, as the settings here say.")]
Token = Annotated[str | None, typer.Option("--token", help="Its admin token; without it, SUREFOOT_ADMIN_TOKEN.")]
Reason = Annotated[str, typer.Option("--reason", help="Why, for the audit log and whoever looks next.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the service's answer, for machines.")]
Generation = Annotated[int | None, typer.Option("--generation", help="Only if the policy is still at this generation.")]
Every = Annotated[float, typer.Option("--every", min=0.1, help="Seconds between two frames.")]
Once = Annotated[bool, typer.Option("--once", help="One frame, and no more.")]
PlanFile = Annotated[Path | None, typer.Argument(metavar="[FILE.yaml]", help="The plan to send; without it: print it.")]
Share = Annotated[float, typer.Argument(min=0.0, max=1.0, help="The version's share of units, 0 to 1.")]

# Moves that need nothing said but the policy, and those that need a version.
MOVES: dict[Move, str] = {
    "advance": "Take the next step: out of the shadow, or to the canary's next weight.",
    "promote": "Make the rollout's version the champion.",
    "rollback": "Straight back: quarantine the rollout's version, a champion too. One call, which reads nothing first.",
    "withdraw": "End the rollout without blame: its version is as it was before.",
    "pause": "Let nothing move by itself; a guard still rolls back.",
    "resume": "Let it move by itself again.",
}
MOVES_OF_VERSIONS: dict[Move, str] = {
    "quarantine": "Let a version decide nothing until it is released.",
    "release": "Say that a quarantined version is mended: it may be rolled out again.",
}


@app.command("show")
def show(policy: str, as_json: AsJson = False, url: Url = None, token: Token = None) -> None:
    """Print where a policy's rollout stands, what is known, and its plan."""
    from service.rollout_calls import rollout

    seen = rollout(policy, url, token)
    if as_json:
        typer.echo(json.dumps(seen.answer, indent=2))
        return
    from service.rollout_text import frame
    from service.rollout_watch import Screen

    screen = Screen(over=False)
    screen.draw(frame(seen.view, seen.at_ms, screen.width, planned=True))


@app.command("watch")
def watch(policy: str, every: Every = 1.0, once: Once = False, url: Url = None, token: Token = None) -> None:
    """Show a rollout live, until Ctrl-C. In a pipe, frames follow one another as plain text."""
    from service.rollout_calls import WATCHING, rollout
    from service.rollout_watch import Screen, Watch

    view = Watch(lambda: rollout(policy, url, token, timeout=WATCHING), Screen(over=not once))
    if once:
        view.run_once()
    else:
        view.run(lambda: time.sleep(every))


@app.command("plan")
def plan(
    policy: str,
    file: PlanFile = None,
    generation: Generation = None,
    as_json: AsJson = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Print the plan as YAML that can be edited and sent back; with a file, check it and send it."""
    from safety.marks import line_of
    from service.rollout_calls import plan as send
    from service.rollout_calls import rollout
    from service.rollout_plan_file import plan_text, read_plan

    if file is None:
        seen = rollout(policy, url, token)
        view = seen.view
        typer.echo(plan_text(policy, seen.answer["plan"] if view.plan else None, view.generation), nl=False)
        return
    import msgspec

    try:
        wanted = msgspec.to_builtins(read_plan(_read(file), str(file)))
    except SafetyError as error:
        for fault in error.errors:
            typer.echo(line_of(str(file), fault), err=True)
        raise typer.Exit(1) from None
    _tell(send(policy, wanted, _etag(generation), url, token), as_json)


@app.command("weight")
def weight(
    policy: str,
    share: Share,
    reason: Reason = "",
    generation: Generation = None,
    as_json: AsJson = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Set the share of units that the rollout's version decides."""
    _move(policy, "weight", {"weight": share}, reason, generation, as_json, url, token)


def _add_move(what: Move, meaning: str) -> None:
    @app.command(what, help=meaning)
    def command(
        policy: str,
        reason: Reason = "",
        generation: Generation = None,
        as_json: AsJson = False,
        url: Url = None,
        token: Token = None,
    ) -> None:
        _move(policy, what, {}, reason, generation, as_json, url, token)


def _add_move_of_version(what: Move, meaning: str) -> None:
    @app.command(what, help=meaning)
    def command(
        policy: str,
        version: str,
        reason: Reason = "",
        generation: Generation = None,
        as_json: AsJson = False,
        url: Url = None,
        token: Token = None,
    ) -> None:
        _move(policy, what, {"version": version}, reason, generation, as_json, url, token)


_add_move_of_version("begin", "Begin a version's rollout: as a shadow first, or as the plan says.")
for _what, _meaning in MOVES.items():
    _add_move(_what, _meaning)
for _what, _meaning in MOVES_OF_VERSIONS.items():
    _add_move_of_version(_what, _meaning)


def _move(
    policy: str,
    what: Move,
    said: dict[str, Any],
    reason: str,
    generation: int | None,
    as_json: bool,
    url: str | None,
    token: str | None,
) -> None:
    from service.rollout_calls import move

    body = said | ({"reason": reason} if reason else {})
    _tell(move(policy, what, body, _etag(generation), url, token), as_json, said.get("version"))


def _tell(answer: Any, as_json: bool, version: str | None = None) -> None:
    """Print what a change has come to."""
    from service.rollout_calls import view_of
    from service.rollout_text import summary

    typer.echo(json.dumps(answer, indent=2) if as_json else summary(view_of(answer), version))


def _etag(generation: int | None) -> str | None:
    return None if generation is None else f'"{generation}"'


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; give the path of a plan") from None
