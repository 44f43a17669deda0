"""A rollout's plan as a file that people edit: YAML out, YAML in. Pure.

Duty: write a plan so that it can be sent back as it is; read one, and say of each fault where it stands. What a plan
means stands in `shadow/rollout_plan.py`.
Strategy: each guard is converted by itself, because a complaint about a map's value does not say which one it is.
Promise: what `plan_text` writes `read_plan` reads as the same plan.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec
import yaml

from policies.errors import SafetyFault
from safety.marks import Complaint, Path, path_of, read_yaml, refused
from shadow.rollout_plan import MEASURES, GuardPlan, RolloutPlan

UNKNOWN = re.compile(r"Object contains unknown field `(.*)`")


def plan_text(policy: str, plan: Mapping[str, Any] | None, generation: int) -> str:
    """Write a plan, or where there is none that of the defaults, with a head that says what to do with it."""
    which = "The plan" if plan is not None else "No plan is set; these are the defaults"
    values = dict(plan) if plan is not None else msgspec.to_builtins(RolloutPlan())
    head = [
        f"# {which}: rollouts of {policy}, generation {generation}. Edit it, and send it back:",
        f"#   surefoot rollout plan {policy} FILE --generation {generation}",
    ]
    return "\n".join(head) + "\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None)


def read_plan(raw: bytes, where: str) -> RolloutPlan:
    """Read a plan. Raises SafetyError with file, line, column and field."""
    if not any(line.partition(b"#")[0].strip(b" \t\r-") for line in raw.splitlines()):
        raise refused(where, [SafetyFault("", "the file holds no plan", 1, 1)])
    document = read_yaml(raw, where)
    complaints = list(_wrong(document.value))
    if complaints:
        raise document.refusal(complaints)
    return msgspec.convert(document.value, RolloutPlan)


def _wrong(value: object) -> list[Complaint]:
    """What is wrong with a plan: of each guard the first thing, or of the rest."""
    if isinstance(value, dict) and isinstance(guards := value.get("guards"), dict):
        found = [_guard_complaint(name, guard) for name, guard in guards.items()]
        value = value | {"guards": {}}
    else:
        found = []
    return [each for each in [*found, _complaint(value, RolloutPlan, ())] if each is not None]


def _guard_complaint(name: str, guard: object) -> Complaint | None:
    if name not in MEASURES:
        return Complaint(("guards", name), f"there is no such guard: give one of {', '.join(MEASURES)}", key=True)
    return _complaint(guard, GuardPlan, ("guards", name))


def _complaint(value: object, kind: type[RolloutPlan | GuardPlan], path: Path) -> Complaint | None:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        detail, _, inner = str(error).partition(" - at `$")
        at = (*path, *path_of(inner.strip("`")))
        unknown = UNKNOWN.match(detail)
        return Complaint((*at, unknown[1]), detail, key=True) if unknown else Complaint(at, detail)
    return None
