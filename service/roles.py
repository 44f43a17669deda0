"""Who may do what: roles and their permissions, routes and the permission that each needs. Tables. Pure.

Duty: two tables and the questions asked of them. It knows no token and no HTTP.
Promise: a route that stands in no table is the admin's alone; a test holds the tables against the OpenAPI document.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, get_args

Role = Literal["viewer", "client", "trainer", "operator", "admin"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)

Permission = Literal[
    "act",  # ask for actions
    "reward",  # reward decisions
    "decisions",  # read one decision: its state, its action and why
    "metrics",
    "read",  # read how policies are deployed, explored, kept safe
    "push",  # add versions
    "rehearse",  # try rules on recent decisions; changes nothing
    "operate",  # deploy, halt, explore, re-arm, delete versions
    "rules",  # replace a policy's rules; those of another owner only as admin
    "audit",  # read the audit log
    "tokens",  # make, list and revoke tokens
]
_READS: Final[frozenset[Permission]] = frozenset({"decisions", "metrics", "read"})
_CALLS: Final[frozenset[Permission]] = frozenset({"act", "reward", "decisions", "metrics"})
GRANTS: Final[Mapping[Role, frozenset[Permission]]] = {
    "viewer": _READS | {"audit"},
    "client": _CALLS,
    "trainer": _READS | {"push"},
    "operator": _READS | _CALLS | {"push", "rehearse", "operate", "rules", "audit"},
    "admin": frozenset(get_args(Permission)),
}

_POLICY: Final = "/admin/policies/{policy}"
# (method, path) -> permission. /act and /reward stand for /v1/act and /v1/reward, too.
ROUTES: Final[Mapping[tuple[str, str], Permission]] = {
    ("POST", "/v1/act"): "act",
    ("POST", "/v1/act/batch"): "act",
    ("POST", "/v1/reward"): "reward",
    ("POST", "/v1/reward/batch"): "reward",
    ("GET", "/v1/decisions/{decision_id}"): "decisions",
    ("GET", "/metrics"): "metrics",
    ("GET", "/admin/policies"): "read",
    ("GET", _POLICY): "read",
    ("GET", f"{_POLICY}/deployment"): "read",
    ("PUT", f"{_POLICY}/deployment"): "operate",
    ("GET", f"{_POLICY}/halts"): "read",
    ("PUT", f"{_POLICY}/halts"): "operate",
    ("GET", f"{_POLICY}/exploration"): "read",
    ("PUT", f"{_POLICY}/exploration"): "operate",
    ("GET", f"{_POLICY}/calibration"): "read",
    ("DELETE", f"{_POLICY}/calibration"): "operate",
    ("GET", f"{_POLICY}/estimates"): "read",
    ("GET", f"{_POLICY}/shadows"): "read",
    ("PUT", f"{_POLICY}/shadows/{{label}}"): "operate",
    ("DELETE", f"{_POLICY}/shadows/{{label}}"): "operate",
    ("GET", f"{_POLICY}/rollout"): "read",
    ("PUT", f"{_POLICY}/rollout"): "operate",
    ("POST", f"{_POLICY}/rollout/{{move}}"): "operate",
    ("GET", f"{_POLICY}/safety"): "read",
    ("PUT", f"{_POLICY}/safety"): "rules",
    ("POST", f"{_POLICY}/safety/test"): "rehearse",
    ("GET", f"{_POLICY}/versions"): "read",
    ("POST", f"{_POLICY}/versions"): "push",
    ("GET", f"{_POLICY}/versions/{{label}}"): "read",
    ("DELETE", f"{_POLICY}/versions/{{label}}"): "operate",
    ("POST", f"{_POLICY}/versions/{{label}}/rearm"): "operate",
    ("GET", "/admin/audit"): "audit",
    ("GET", "/admin/tokens"): "tokens",
    ("POST", "/admin/tokens"): "tokens",
    ("DELETE", "/admin/tokens/{token}"): "tokens",
}
# Open to everybody: probes, and what says how to call.
OPEN: Final = frozenset({("GET", "/health/live"), ("GET", "/health/ready")})
# With no client token on loopback, or where the operator says so, these need no token at all.
OPENABLE: Final[frozenset[Permission]] = _CALLS
# Changes, and the name that each has in the audit log.
ACTIONS: Final[Mapping[tuple[str, str], str]] = {
    ("PUT", f"{_POLICY}/deployment"): "deploy",
    ("PUT", f"{_POLICY}/halts"): "halt",
    ("PUT", f"{_POLICY}/exploration"): "explore",
    ("DELETE", f"{_POLICY}/calibration"): "recalibrate",
    ("PUT", f"{_POLICY}/shadows/{{label}}"): "watch",
    ("DELETE", f"{_POLICY}/shadows/{{label}}"): "unwatch",
    ("PUT", f"{_POLICY}/rollout"): "plan_rollout",
    ("POST", f"{_POLICY}/rollout/{{move}}"): "rollout",
    ("PUT", f"{_POLICY}/safety"): "rule",
    ("POST", f"{_POLICY}/versions"): "push",
    ("DELETE", f"{_POLICY}/versions/{{label}}"): "delete_version",
    ("POST", f"{_POLICY}/versions/{{label}}/rearm"): "rearm",
    ("POST", "/admin/tokens"): "create_token",
    ("DELETE", "/admin/tokens/{token}"): "revoke_token",
}


def needed(method: str, path: str) -> Permission | None:
    """Give the permission that a route needs; None: it stands in no table, and only an admin may call it."""
    return ROUTES.get((method, path))


def grants(role: Role, permission: Permission | None) -> bool:
    """Say whether a role has a permission."""
    return role == "admin" or (permission is not None and permission in GRANTS[role])


def action_of(method: str, path: str) -> str | None:
    """Name a route's change as the audit log does; None: it changes nothing. One in no table is named by its path."""
    if method in ("GET", "HEAD") or ROUTES.get((method, path)) == "rehearse":
        return None
    return ACTIONS.get((method, path)) or f"{method} {path}"
