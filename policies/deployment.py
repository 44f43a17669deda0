"""How a policy is deployed: which version decides, which is tried, which only watch, how rewards are joined. Pure.

`deployment.yaml` stands beside a policy's bundles and gives the state that the service starts from.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Annotated, Literal

import msgspec
import yaml
from msgspec import Meta, Struct

from policies.bundle import Label
from policies.errors import ConfigError
from policies.types import Role

DEPLOYMENT = "deployment.yaml"
# Each has a thread and a queue of its own in every worker.
MOST_SHADOWS = 4
RouteBy = Literal["key", "episode", "decision"]


class Challenger(Struct, forbid_unknown_fields=True, frozen=True):
    version: Label
    weight: Annotated[float, Meta(ge=0, le=1)]


class RewardPolicy(Struct, forbid_unknown_fields=True, frozen=True):
    """How rewards meet decisions (docs/join.md).

    `first`: the first accepted reward closes the decision; all others: what the rewards of the window come to.
    """

    window_s: Annotated[float, Meta(gt=0, le=30 * 86_400)] = 60.0
    default: float = 0.0
    aggregation: Literal["first", "sum", "last", "max", "min", "mean"] = "first"
    range: tuple[float | None, float | None] = (None, None)  # a reward outside is quarantined; null: no bound
    expression: str | None = None  # CEL over `reward` and `metrics`, gives the reward
    n_step: Annotated[int, Meta(ge=1, le=64)] = 1  # above 1: records of so many steps besides

    def __post_init__(self) -> None:
        low, high = self.range
        if low is not None and high is not None and low > high:
            raise ValueError("reward.range: low is above high")
        if not self.within(self.default):
            raise ValueError("reward.default is outside reward.range")

    def within(self, reward: float) -> bool:
        """Whether a reward is finite and in range."""
        low, high = self.range
        return math.isfinite(reward) and (low is None or reward >= low) and (high is None or reward <= high)


class Deployment(Struct, forbid_unknown_fields=True, frozen=True):
    """`deployment.yaml`, as it is written."""

    schema: Literal[1]
    policy: Label
    champion: Label
    baseline: Label | None = None
    challengers: Annotated[list[Challenger], Meta(max_length=1)] = []
    shadows: Annotated[list[Label], Meta(max_length=MOST_SHADOWS)] = []  # versions that watch, and never answer
    route_by: RouteBy | None = None
    reward: RewardPolicy = RewardPolicy()

    def __post_init__(self) -> None:
        for i, label in enumerate(self.shadows):
            if label in self.deciding or label in self.shadows[:i]:
                raise ValueError(f"shadows[{i}]: {label} is named already; a shadow has no other role")

    @property
    def versions(self) -> set[str]:
        """Labels that the deployment names."""
        return set(self.by_role)

    @property
    def deciding(self) -> dict[str, str]:
        """Labels of versions that may answer, and the field that names each; the champion first."""
        named = {challenger.version: f"challengers[{i}].version" for i, challenger in enumerate(self.challengers)}
        if self.baseline is not None:
            named[self.baseline] = "baseline"
        return {self.champion: "champion"} | {label: at for label, at in named.items() if label != self.champion}

    @property
    def by_role(self) -> dict[str, str]:
        """Labels that the deployment names, and the field that names each: those that may answer come first."""
        return self.deciding | {label: f"shadows[{i}]" for i, label in enumerate(self.shadows)}

    def role_of(self, label: str) -> Role | None:
        """Say what a version does; None: nothing, it only stands ready."""
        if label == self.champion:
            return "champion"
        if label in {challenger.version for challenger in self.challengers}:
            return "challenger"
        if label == self.baseline:
            return "baseline"
        return "shadow" if label in self.shadows else None


def read_deployment(raw: bytes, where: str) -> Deployment:
    """Decode `deployment.yaml`. Raises ConfigError naming file and field."""
    try:
        return msgspec.convert(yaml.safe_load(raw), Deployment)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {error}", where) from None
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        raise ConfigError(f"{where}: {message}", path.strip(".`") or None) from None


def default_deployment(policy: str, versions: Collection[str]) -> Deployment:
    """Deploy a policy that has one version and no `deployment.yaml`. Raises ConfigError when there is a choice."""
    if len(versions) != 1:
        raise ConfigError(f"{policy} has {len(versions)} versions: say in {DEPLOYMENT} which is champion", "champion")
    return Deployment(schema=1, policy=policy, champion=next(iter(versions)))
