"""How a Redis is named: one URL for a single server, a Sentinel set or a cluster. Pure.

    redis://[user:password@]host[:port][/db]                     one server
    unix://[user:password@]/path/to.sock[?db=0]                  one server of this machine
    redis+sentinel://[user:password@]host[:port],…/service[/db]  the primary that these Sentinels name
    redis+cluster://[user:password@]host[:port],…                the cluster that these nodes belong to
    rediss://…  rediss+sentinel://…  rediss+cluster://…          the same over TLS

Duty: text to values, for the service and for trainers. It knows no connection; timeouts and retries are not an
operator's to set, so whatever else stands behind the question mark is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

Address = tuple[str, int]
Kind = Literal["server", "socket", "sentinel", "cluster"]

SCHEMES: Final[Mapping[str, tuple[Kind, bool]]] = {
    "redis": ("server", False),
    "rediss": ("server", True),
    "unix": ("socket", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
# As redis-py spells them.
TLS: Final = frozenset({"ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"})
LOGIN: Final = frozenset({"username", "password", "client_name"})
SENTINEL: Final = frozenset({"sentinel_username", "sentinel_password"})
PORTS: Final[Mapping[Kind, int]] = {"server": 6379, "socket": 0, "sentinel": 26379, "cluster": 6379}


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """One deployment. `options` and `sentinel_options` are keyword arguments of redis-py's connections."""

    kind: Kind
    tls: bool
    addresses: tuple[Address, ...]  # servers, Sentinels or nodes; empty for a socket
    path: str = ""  # of the socket
    service: str = ""  # the primary's name among Sentinels
    options: Mapping[str, object] = field(default_factory=dict, repr=False)  # holds passwords
    sentinel_options: Mapping[str, object] = field(default_factory=dict, repr=False)


def parse(url: str) -> RedisUrl:
    """Read a URL. Raises ValueError saying what is wrong, without repeating what may be a password."""
    scheme, separator, _ = url.partition("://")
    if not separator or scheme not in SCHEMES:
        raise ValueError(f"a Redis URL begins with one of {', '.join(f'{each}://' for each in SCHEMES)}")
    kind, tls = SCHEMES[scheme]
    parts = urlsplit(url)
    given = _query(parts.query, kind, tls)
    login, _, hosts = parts.netloc.rpartition("@")
    username, _, password = login.partition(":")
    given = {k: unquote(v) for k, v in (("username", username), ("password", password)) if v} | given
    database = str(given.pop("db", ""))
    service = ""
    if kind == "socket":
        if hosts or not parts.path:
            raise ValueError("a unix:// URL names a file: unix:///path/to.sock")
    else:
        service, database = _path(unquote(parts.path).strip("/"), kind, database)
    login_of_sentinels = {name.removeprefix("sentinel_"): given.pop(name) for name in SENTINEL & given.keys()}
    shared = {name: value for name, value in given.items() if name in TLS}
    return RedisUrl(
        kind=kind,
        tls=tls,
        addresses=() if kind == "socket" else _addresses(hosts, PORTS[kind]),
        path=unquote(parts.path) if kind == "socket" else "",
        service=service,
        options=given | ({"db": _database(database, kind)} if database else {}),
        sentinel_options=shared | login_of_sentinels,
    )


def _query(text: str, kind: Kind, tls: bool) -> dict[str, object]:
    known = LOGIN | {"db"} | (TLS if tls else set()) | (SENTINEL if kind == "sentinel" else set())
    found: dict[str, object] = {}
    for name, value in parse_qsl(text, keep_blank_values=True):
        if name not in known:
            raise ValueError(f"a {kind} URL takes no parameter {name!r}; it takes {', '.join(sorted(known))}")
        found[name] = value.lower() in ("1", "true", "yes") if name == "ssl_check_hostname" else value
    return found


def _path(path: str, kind: Kind, database: str) -> tuple[str, str]:
    """Service and database, of which only Sentinels have the former."""
    if kind != "sentinel":
        return "", path or database
    service, _, behind = path.partition("/")
    if not service:
        raise ValueError("a Sentinel URL names the primary: redis+sentinel://host:26379,…/mymaster")
    return service, behind or database


def _database(text: str, kind: Kind) -> int:
    if not text.isascii() or not text.isdigit():
        raise ValueError("the database of a Redis URL is a whole number")
    if kind == "cluster" and int(text):
        raise ValueError("a cluster has database 0 only")
    return int(text)


def _addresses(hosts: str, port: int) -> tuple[Address, ...]:
    found: list[Address] = []
    for each in hosts.split(","):
        one = urlsplit(f"//{each}")
        try:
            found.append((one.hostname or "localhost", one.port or port))
        except ValueError:
            raise ValueError(f"{each!r} is no host and port") from None
    return tuple(found)
