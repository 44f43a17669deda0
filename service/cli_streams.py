"""The `surefoot transitions groups` and `drop-group` commands: who reads a policy's streams, and ending who does not.

Duty: ask once, print. Thin: what a group keeps is said by `trimming.py`. The service never removes a group; this does,
on an operator's word.
Promise: nothing is removed without `--yes`; exit code 1 when nothing was, and the reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from service.settings import load_settings

if TYPE_CHECKING:  # the process that supervises workers imports this file, and no client of Redis
    from service.redis_streams import RedisStreams
    from service.trimming import GroupView, StreamView

T = TypeVar("T")

AsJson = Annotated[bool, typer.Option("--json", help="Print all that is known, for machines.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do it. Without, only say what it would do.")]
Stream = Annotated[str, typer.Option("--stream", help="The stream the group reads.")]


def groups(policy: str, as_json: AsJson = False) -> None:
    """List who reads a policy's streams: lag, pending, since when idle, and what is kept for each."""
    from service.trimming import survey

    views = _ask(lambda streams: survey(streams, policy))
    if as_json:
        typer.echo(json.dumps([_plain(view) for view in views], indent=2))
        return
    for view in views:
        typer.echo(f"{view.name}: {view.entries} entries, {_size(view.bytes)}, oldest {_span(view.oldest_s)}")
        for group in sorted(view.groups, key=view.needed_by, reverse=True):
            typer.echo(f"  {group.name}: {_standing(view, group)}")
        if view.reason == "no_group":
            typer.echo(f"  no {'other ' if view.groups else ''}group: entries go by age and size")
    if not views:
        typer.echo(f"{policy} has no streams", err=True)


def drop_group(policy: str, group: str, stream: Stream = "transitions", yes: Yes = False) -> None:
    """Remove a group. What it has not read or acknowledged is lost to it, and may be trimmed."""
    from service.trimming import drop_group as drop
    from service.trimming import survey

    views = [view for view in _ask(lambda streams: survey(streams, policy)) if view.name == stream]
    found = [(view, each) for view in views for each in view.groups if each.name == group]
    if not found:
        typer.echo(f"{policy} has no group {group} on {stream}", err=True)
        raise typer.Exit(1)
    ((view, standing),) = found
    typer.echo(f"{group}: {_standing(view, standing)}")
    if not yes:
        typer.echo("nothing was removed: say --yes", err=True)
        raise typer.Exit(1)
    if not _ask(lambda streams: drop(streams, policy, stream, group)):
        typer.echo(f"{group} was gone already", err=True)
        raise typer.Exit(1)
    typer.echo("removed")


def add_to(app: typer.Typer) -> None:
    """Give `surefoot transitions` these commands."""
    app.command("groups")(groups)
    app.command("drop-group")(drop_group)


def _ask(question: Callable[[RedisStreams], Awaitable[T]]) -> T:
    """Ask the Redis of this deployment. Raises StoreAway."""
    from service.redis_streams import RedisStreams, connect
    from service.replay import redis_url_of

    async def asked() -> T:
        async with contextlib.aclosing(RedisStreams(connect(redis_url_of(load_settings())))) as streams:
            return await question(streams)

    return asyncio.run(asked())


def _plain(view: StreamView) -> dict[str, object]:
    told = asdict(view)
    told["groups"] = [asdict(group) | {"needed": view.needed_by(group)} for group in view.groups]
    for name in ("trimmed", "more"):
        del told[name]
    return told


def _standing(view: StreamView, group: GroupView) -> str:
    lag = "unknown" if group.lag is None else str(group.lag)
    needed = view.needed_by(group)
    size = None if view.bytes is None or not view.entries else view.bytes * needed // view.entries
    consumers = f"{group.consumers} consumer{'s' * (group.consumers != 1)}"
    return (
        f"lag {lag}, pending {group.pending}, idle {_span(group.idle_ms / 1000)}, {consumers}, "
        f"keeps about {needed} entries ({_size(size)})"
    )


def _size(size: int | None) -> str:
    if size is None:
        return "unknown bytes"
    return f"{size} B" if size < 1 << 10 else f"{size / 2**10:.1f} KiB" if size < 1 << 20 else f"{size / 2**20:.1f} MiB"


def _span(seconds: float) -> str:
    for unit, name in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"
