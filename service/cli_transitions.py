"""The `surefoot transitions` commands: print, export and describe what trainers read.

Duty: read options, call one function of `surefoot` for each command, print. Thin: it knows no stream and no format.
Promise: nothing but an export with a group consumes anything; what went wrong is one line on stderr and exit code 1.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # the process that supervises workers imports this file, and not numpy
    from surefoot.export import Report

app = typer.Typer(no_args_is_help=True, help="What trainers read.")

Url = Annotated[str | None, typer.Option("--redis-url", help="The Redis; without it, as the settings here say.")]
From = Annotated[str | None, typer.Option("--from", help="Stream id, or time at which they were joined; inclusive.")]
Until = Annotated[str | None, typer.Option("--until", help="Likewise; without it, up to the end of now.")]


@app.command("tail")
def tail(
    policy: str,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more.")] = False,
    count: Annotated[bool, typer.Option(help="Print only how many there are.")] = False,
    limit: Annotated[int | None, typer.Option(help="Stop after so many.")] = None,
    redis_url: Url = None,
) -> None:
    """Print transitions as JSON lines, oldest first."""
    from surefoot.streams import tail as read

    number = 0
    with _told():
        for transition in read(policy, _redis(redis_url), follow=follow, limit=limit):
            number += 1
            if not count:
                typer.echo(json.dumps(transition))
    if count:
        typer.echo(number)


@app.command("export")
def export(
    policy: str,
    to: Annotated[str, typer.Option("--to", help="parquet | minari | dsjson")],
    out: Annotated[Path, typer.Option("--out", help="parquet, minari: a directory; dsjson: a file.")],
    from_: From = None,
    until: Until = None,
    group: Annotated[str | None, typer.Option("--group", help="parquet: read as a consumer of this group.")] = None,
    consumer: Annotated[str | None, typer.Option("--consumer", help="Its name, the same after a restart.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Most rows in memory and in a file.")] = 5_000,
    append: Annotated[bool, typer.Option("--append", help="Add to what is there; nothing is written twice.")] = False,
    wait: Annotated[float, typer.Option("--wait", min=0.0, help="Seconds to wait for more, or for Redis.")] = 0.0,
    redis_url: Url = None,
) -> None:
    """Write transitions to files that other tools read. Prints a report as JSON."""
    from surefoot.export import export_transitions

    given: dict[str, Any] = {"from_": from_, "until": until, "group": group, "consumer": consumer, "append": append}
    with _told():
        url = _redis(redis_url)
        report = export_transitions(
            policy,
            to,  # type: ignore[arg-type]  # checked there
            out,
            redis_url=url,
            batch_size=batch_size,
            wait_s=wait,
            **given,
        )
    typer.echo(json.dumps(report.plain(), indent=2))
    _warn(report)


@app.command("stats")
def stats(
    policy: str,
    from_: From = None,
    until: Until = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it, for machines.")] = False,
    redis_url: Url = None,
) -> None:
    """Describe transitions: counts, rewards, delays, propensities, episodes, streams and groups."""
    from surefoot.stats import transitions_stats

    with _told():
        found = transitions_stats(policy, redis_url=_redis(redis_url), from_=from_, until=until)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for line in lines(found):
        typer.echo(line)


def lines(found: dict[str, Any], path: str = "") -> Iterator[str]:
    """Lay out figures for people: one line for each group of plain values."""
    plain = {name: value for name, value in found.items() if not isinstance(value, dict | list)}
    if plain:
        title = f"{path}:" if path else ""
        yield f"{title:26s} {'  '.join(f'{name} {_shown(value)}' for name, value in plain.items())}"
    for name, value in found.items():
        where = f"{path}.{name}" if path else name
        if isinstance(value, dict):
            yield from lines(value, where)
        elif isinstance(value, list):
            for each in value:
                yield from lines(each, where) if isinstance(each, dict) else (f"{where + ':':26s} {each}",)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _warn(report: Report) -> None:
    for gap in report.gaps:
        typer.echo(f"surefoot: {gap}", err=True)


def _redis(given: str | None) -> str:
    """The Redis that is named, else that of the settings."""
    if given is not None:
        return given
    from service.replay import redis_url_of
    from service.settings import load_settings

    return redis_url_of(load_settings())


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turn what `surefoot` raises into one line and exit code 1."""
    from surefoot.errors import SurefootError
    from surefoot.rows import ExportError

    try:
        yield
    except (SurefootError, ExportError, ImportError, OSError) as error:
        typer.echo(f"surefoot: {error}", err=True)
        raise typer.Exit(1) from None
