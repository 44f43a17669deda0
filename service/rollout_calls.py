"""EDGE: the admin API's rollouts and shadows as a command line calls them. By httpx, through `push.call`.

Duty: one function for each command; the answer's JSON, or a Refusal in the service's own words. It draws nothing.
Strategy: a move is one call, and reads nothing first: whoever rolls back in an emergency waits for one answer. Who
wants to be sure that nothing has changed since they looked names the generation.
"""

from __future__ import annotations

from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from time import time_ns
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

import httpx

from service.push import Refusal, call
from service.rollout_view import View, read_view

Move = Literal[
    "begin", "advance", "promote", "rollback", "withdraw", "pause", "resume", "weight", "quarantine", "release"
]
# A view that is asked for each second: what takes longer counts as away, and is asked again.
WATCHING = httpx.Timeout(10.0, connect=3.0)


class Seen(NamedTuple):
    """An answer: its JSON, its ETag, and when the service gave it, by its own clock."""

    answer: Any
    etag: str
    at_ms: int

    @property
    def view(self) -> View:
        """The answer as the terminal shows it. Raises Refusal where it is something else."""
        return view_of(self.answer)


def rollout(policy: str, url: str | None = None, token: str | None = None, **options: Any) -> Seen:
    """Ask where a policy's rollout stands. options: of httpx. Raises Refusal."""
    response = call("GET", _path(policy, "rollout"), url, token, **options)
    return Seen(_json(response), response.headers.get("etag", ""), _at_ms(response))


def plan(
    policy: str, wanted: Mapping[str, Any], etag: str | None = None, url: str | None = None, token: str | None = None
) -> Any:
    """Replace a policy's plan. etag: of the state that it is for; without one, that of now. Gives the rollout's JSON.

    Raises Refusal, also when somebody else changed the policy meanwhile.
    """
    path = _path(policy, "rollout")
    match = {"If-Match": etag or call("GET", path, url, token).headers.get("etag", "")}
    return _json(call("PUT", path, url, token, json=dict(wanted), headers=match))


def move(
    policy: str,
    what: Move,
    said: Mapping[str, Any],
    etag: str | None = None,
    url: str | None = None,
    token: str | None = None,
) -> Any:
    """Make a move. said: what it needs, and the reason. etag: it is made on this state or not at all.

    Gives the rollout's JSON. Raises Refusal, also for a move that the rollout's table does not have.
    """
    headers = {"If-Match": etag} if etag else {}
    return _json(call("POST", _path(policy, "rollout", what), url, token, json=dict(said), headers=headers))


def shadows(policy: str, url: str | None = None, token: str | None = None) -> dict[str, Any]:
    """Ask what a replica's shadows have come to. Raises Refusal."""
    found: dict[str, Any] = _json(call("GET", _path(policy, "shadows"), url, token))
    return found


def watch_shadow(
    policy: str, version: str, watches: bool, url: str | None = None, token: str | None = None
) -> dict[str, Any]:
    """Let a version watch, or no more. Gives the policy's new view. Raises Refusal."""
    method = "PUT" if watches else "DELETE"
    found: dict[str, Any] = _json(call(method, _path(policy, "shadows", version), url, token))
    return found


def view_of(answer: Any) -> View:
    """Read an answer's JSON as a rollout. Raises Refusal."""
    try:
        return read_view(answer)
    except ValueError as error:
        raise Refusal(f"the service answered something that is no rollout: {error}") from None


def _path(policy: str, *rest: str) -> str:
    return "/".join(["/admin/policies", *(quote(each, safe="") for each in (policy, *rest))])


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        raise Refusal(f"{response.url} answered no JSON, and not like a Surefoot service") from None


def _at_ms(response: httpx.Response) -> int:
    """The service's time, by the second; this machine's where it does not tell."""
    try:
        return int(parsedate_to_datetime(response.headers["date"]).timestamp() * 1000)
    except (KeyError, ValueError):
        return time_ns() // 1_000_000
