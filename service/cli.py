"""The `surefoot` command. Thin: every subcommand reads settings, calls one function, prints."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from policies.errors import SurefootError
from service.settings import PREFIX, Settings, load_settings

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Serve reinforcement-learning policies.")
config = typer.Typer(no_args_is_help=True, help="Settings.")
policy = typer.Typer(no_args_is_help=True, help="Policies and bundles.")
transitions = typer.Typer(no_args_is_help=True, help="What trainers read.")
app.add_typer(config, name="config")
app.add_typer(policy, name="policy")
app.add_typer(transitions, name="transitions")


def main() -> None:
    """Run the command; errors of the tree become one line and exit code 1."""
    try:
        app()
    except SurefootError as error:
        print(f"surefoot: {error.detail}", file=sys.stderr)
        sys.exit(1)


@app.command()
def serve() -> None:
    """Serve until SIGTERM or Ctrl-C. Everything is set by SUREFOOT_ variables (`surefoot config show`)."""
    from service.logs import configure_logs
    from service.supervisor import serve as supervise

    settings = load_settings()
    configure_logs(settings.log_level)
    raise typer.Exit(supervise(settings))


@config.command("show")
def show() -> None:
    """Print every setting with its value and meaning; secrets are masked."""
    settings = load_settings()
    for name, field in Settings.model_fields.items():
        print(f"{PREFIX}{name.upper()}={getattr(settings, name)}  # {field.description}")


@policy.command("list")
def list_policies() -> None:
    """List the policies that a start would load."""
    from policies.store import BUNDLED, read_directory

    for stored in read_directory(load_settings().policies or BUNDLED):
        for label, bundle in sorted(stored.bundles.items()):
            mark = {stored.deployment.champion: "champion", stored.deployment.baseline: "baseline"}.get(label, "")
            print(f"{stored.name}/{label}\t{mark}\t{bundle.head}\t{bundle.digest[:12]}\t{bundle.manifest.description}")


@policy.command("check")
def check(path: Path) -> None:
    """Check a bundle's folder: every check that a load makes, golden vectors and latency included."""
    from policies.engine import Engine
    from policies.store import read_folder

    bundle = read_folder(path.absolute())
    engine = Engine(bundle)
    print(f"ok: {bundle.policy}/{bundle.version} {bundle.digest[:12]} on {engine.device}")


@policy.command("inspect")
def inspect(path: Path) -> None:
    """Say which convention a plain .onnx file follows, and the manifest that an export would write."""
    from policies.export import inspect_file

    print(inspect_file(path))


@policy.command("export")
def export(
    source: Path,
    policy: Annotated[str, typer.Option("--policy")],
    version: Annotated[str, typer.Option("--version")],
    out: Annotated[Path, typer.Option(help="Folder of policies: the bundle goes to OUT/POLICY/VERSION.")],
    kind: Annotated[str, typer.Option(help="auto | sb3 | qtable | onnx")] = "auto",
    actions: Annotated[str, typer.Option(help="Names, or their number: left,right or 2.")] = "",
    features: Annotated[str, typer.Option(help="Names, in order.")] = "",
    fallback: str = "none",
    epsilon: float = 0.0,
    without_normalisation: Annotated[
        bool, typer.Option("--without-normalisation", help="SB3: no VecNormalize.")
    ] = False,
) -> None:
    """Make a trained policy a bundle. A .zip of SB3 runs code when it is read: export only files of your own."""
    from policies.export import Options, export_file

    options = Options(policy, version, out, actions, features, fallback, epsilon, without_normalisation)
    print(export_file(source, options, kind))


@app.command()
def replay(decision_id: str) -> None:
    """Draw a recorded decision again, from its record in Redis and the signing keys; exit code 1 if it differs."""
    from service.replay import replay_decision

    outcome = asyncio.run(replay_decision(decision_id, load_settings()))
    print(json.dumps(outcome, indent=2))
    raise typer.Exit(0 if outcome["same"] else 1)


@transitions.command("tail")
def tail(
    policy: str,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more.")] = False,
    count: Annotated[bool, typer.Option(help="Print only how many there are.")] = False,
    limit: Annotated[int | None, typer.Option(help="Stop after so many.")] = None,
) -> None:
    """Print transitions as JSON lines, oldest first."""
    from service.replay import redis_url_of
    from surefoot.streams import tail as read

    number = 0
    for transition in read(policy, redis_url_of(load_settings()), follow=follow, limit=limit):
        number += 1
        if not count:
            print(json.dumps(transition))
    if count:
        print(number)


if __name__ == "__main__":
    main()
