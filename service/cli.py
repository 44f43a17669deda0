"""The `surefoot` command. Thin: every subcommand reads settings, calls one function, prints."""

from __future__ import annotations

import sys

if sys.argv[1:2] == ["serve"] and "--help" not in sys.argv:  # the other commands draw with what a start can do without
    from policies import lean

    lean.begin()

import asyncio
import json
import os
from typing import Annotated

import structlog
import typer

from policies.errors import SurefootError
from service.cli_access import audit, tokens
from service.cli_policy import app as policies
from service.cli_rollout import app as rollouts
from service.cli_safety import app as safety
from service.cli_shadow import app as shadows
from service.cli_streams import add_to as add_streams
from service.cli_transitions import app as transitions
from service.settings import PREFIX, Settings, load_settings

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Serve reinforcement-learning policies.")
config = typer.Typer(no_args_is_help=True, help="Settings.")
app.add_typer(config, name="config")
app.add_typer(audit, name="audit")
app.add_typer(policies, name="policy")
app.add_typer(rollouts, name="rollout")
app.add_typer(safety, name="safety")
app.add_typer(shadows, name="shadow")
app.add_typer(tokens, name="token")
app.add_typer(transitions, name="transitions")
add_streams(transitions)


def main() -> None:
    """Run the command; errors of the tree become one line and exit code 1. What is logged goes to stderr."""
    structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))
    try:
        app()
    except SurefootError as error:
        print(f"surefoot: {error.detail}", file=sys.stderr)
        sys.exit(1)


@app.command()
def serve(
    workers: Annotated[int | None, typer.Option(help="Processes that serve, instead of SUREFOOT_WORKERS.")] = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C. Everything is set by SUREFOOT_ variables (`surefoot config show`)."""
    from policies import lean
    from service.logs import configure_logs
    from service.supervisor import serve as supervise

    lean.end()
    if workers is not None:
        os.environ[f"{PREFIX}WORKERS"] = str(workers)  # workers read it, too
    settings = load_settings()
    configure_logs(settings.log_level)
    raise typer.Exit(supervise(settings))


@config.command("show")
def show() -> None:
    """Print every setting with its value and meaning; secrets are masked."""
    settings = load_settings()
    for name, field in Settings.model_fields.items():
        print(f"{PREFIX}{name.upper()}={getattr(settings, name)}  # {field.description}")


@app.command()
def replay(decision_id: str) -> None:
    """Draw a recorded decision again, from its record in Redis and the signing keys; exit code 1 if it differs."""
    from service.replay import replay_decision

    outcome = asyncio.run(replay_decision(decision_id, load_settings()))
    print(json.dumps(outcome, indent=2))
    raise typer.Exit(0 if outcome["same"] else 1)


if __name__ == "__main__":
    main()
