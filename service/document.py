"""A policy's control document: everything that operators and the service itself decide at run time, in one value. Pure.

Duty: its fields. Who changes it, and how it reaches all replicas, are `changes.py`'s and `control.py`'s.
"""

from __future__ import annotations

from msgspec import Struct

from policies.deployment import Deployment
from safety.exploration import Exploration
from safety.halt import KillSwitch
from shadow.rollout import Stage, Standing
from shadow.rollout_plan import RolloutPlan


class Mark(Struct, frozen=True):
    """What is remembered of a version that decides nothing: retired, withdrawn, or quarantined and why.

    digest: of its content, where that matters.
    """

    stage: Stage
    reason: str
    since_ms: int
    digest: str = ""


class Document(Struct, frozen=True):
    """A policy's control state: how it is deployed, what is safe, what may be explored; since when, by whom.

    Invariant: generation grows by one with each change, of whichever part.
    """

    generation: int
    deployment: Deployment
    changed_at_ms: int
    changed_by: str
    safety: str = ""  # `safety.yaml` as it was sent; empty: no rules
    exploration: Exploration | None = None  # None: each version's own ε, without a budget
    halts: tuple[KillSwitch, ...] = ()  # kill switches that are on
    tripped: tuple[str, ...] = ()  # versions whose breaker an operator has to re-arm
    safety_owner: str = ""  # whose rules they are: only this owner, or an admin, replaces them; empty: anybody's
    rollout: RolloutPlan | None = None  # how the next version is rolled out; None: as the defaults are
    standing: Standing | None = None  # the rollout under way, or the last one
    marks: dict[str, Mark] = {}  # versions that were replaced or found bad
    margin_spent: float = 0.0  # what promotions may have cost of the return, since one was shown to be better

    @property
    def returns_to(self) -> str | None:
        """The version that decides again when the champion is rolled back; None: there is no way back."""
        standing = self.standing
        if standing is None or standing.stage is not Stage.CHAMPION or self.deployment.champion != standing.version:
            return None
        mark = self.marks.get(standing.champion)
        return None if mark is not None and mark.stage is Stage.QUARANTINED else standing.champion
