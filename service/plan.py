"""What one decision is made of and made with: rows, loaded versions, the plan in force. Frozen values, no behaviour.

A `Plan` is everything that routing and inference read. A pipeline takes hold of one plan before inference and keeps it
to the end, so one decision is made wholly by one version and one generation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from policies.bundle import PolicyBundle
from policies.draw import Drawn
from policies.errors import SurefootError
from policies.explore import Behaviour
from policies.route import Assignment, Routes
from policies.types import ActionSpec, Choices, ObservationSpec, Target, columns
from safety.halt import KillSwitch
from safety.types import FallbackReason
from service.allowed import Columns, Ends
from service.decision import Shared
from service.wire import ActResponse

if TYPE_CHECKING:
    # Continuous actions need scipy, which is loaded with the first version that has them.
    from policies.continuous import DrawnPoints, Gaussian, PointBehaviour
    from policies.engine import Engine
    from service.allowance import Allowance
    from service.judge import Judged
    from service.limits import Limits
    from service.metrics import VersionMetrics
    from service.ruling import Ruling

Outcome = ActResponse | SurefootError  # what a row is answered with


@dataclass(slots=True)
class Row:
    """One state to decide on, checked against the policy's spec."""

    state: list[object] | npt.NDArray[np.generic]  # in the spec's order and shape
    key: str | None = None
    episode: str | None = None
    step: int | None = None
    context: dict[str, object] | None = None
    allowed: Columns | Ends | None = None
    previous: tuple[float, ...] | None = None  # the key's last executed action, where the caller says it
    explore: bool = True
    include: tuple[str, ...] = ()
    traceparent: str | None = None
    arrived_s: float = 0.0  # monotonic


@dataclass(frozen=True, slots=True)
class LoadedVersion:
    """A version that can be asked. scale: the mean range of its values over its golden states, what prices go by."""

    bundle: PolicyBundle
    engine: Engine
    metrics: VersionMetrics
    scale: float | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", value_range(self.bundle))


def value_range(bundle: PolicyBundle) -> float | None:
    """The mean, over golden states and factors, of the largest value less the smallest; None where heads have none."""
    if bundle.head != "q_values" or not isinstance(bundle.action, Choices):
        return None
    outputs = bundle.golden_outputs
    return float(np.mean([np.ptp(outputs[:, part], axis=1).mean() for part in columns(bundle.action.nvec)]))


@dataclass(frozen=True, slots=True)
class Plan:
    """The control state of one policy, as decisions read it."""

    policy: str
    digest: bytes  # four bytes that stand for the policy in ids
    generation: int
    routes: Routes
    versions: Mapping[str, LoadedVersion]
    window_ms: int  # the reward window
    observation: ObservationSpec
    action: ActionSpec
    baseline: str | None = None
    barred: frozenset[str] = frozenset()  # versions that no episode stays on
    alone: bool = False  # the champion decides what any other version would, also in episodes that began on it
    # What records of this plan have in common, encoded, by what tells them apart: filled as decisions are recorded.
    records: dict[tuple[object, ...], Shared] = field(default_factory=dict, compare=False, repr=False)
    recurrent: bool = field(init=False)  # a version that decides remembers episodes, so rows must name theirs

    def __post_init__(self) -> None:
        deciding = (self.routes.champion, self.routes.challenger)
        loaded = [version for label, version in self.versions.items() if label in deciding]
        recurrent = any(version.bundle.interface.recurrent for version in loaded)
        object.__setattr__(self, "recurrent", recurrent)

    def keeps(self, label: str) -> bool:
        """Whether an episode stays on a version that it began on."""
        ousted = self.alone and label != self.routes.champion
        return label in self.versions and label not in self.barred and not ousted


@dataclass(frozen=True, slots=True)
class Safeguards:
    """The safety side of a policy's control state. Read after inference, so that a halt thrown meanwhile wins."""

    halts: frozenset[KillSwitch] = frozenset()
    tripped: frozenset[str] = frozenset()  # versions whose breaker stays open until an operator re-arms it
    ruling: Ruling | None = None  # None: there are no rules but the callers' own
    limits: Limits | None = None  # None: no rule is about what was executed before
    allowance: Allowance | None = None  # None: no exploration is declared, each version has its own ε


@dataclass(slots=True)
class Group:
    """Rows of a batch that one version decides, in the order in which the pipeline fills its fields."""

    plan: Plan
    version: LoadedVersion
    index: list[int]  # where each row stands in the batch
    rows: list[Row]
    ids: list[str]
    assignments: list[Assignment]
    switched: list[bool]
    states: npt.NDArray[np.floating]  # [B, *shape]
    state_reset: list[bool]  # a recurrent version started anew where the caller was in the middle
    outputs: npt.NDArray[np.floating] | None = None  # [B, width], None: the network failed
    failure: FallbackReason | None = None  # how
    infer_s: float = 0.0
    stand_in: list[str | None] | None = (
        None  # why the baseline answers in place of the assigned version; None: it does not
    )

    @property
    def masks(self) -> list[Columns | None]:
        """What the callers allow of choices, row by row."""
        return [cast("Columns | None", row.allowed) for row in self.rows]

    @property
    def boxes(self) -> list[Ends | None]:
        """What the callers allow of a box, row by row."""
        return [cast("Ends | None", row.allowed) for row in self.rows]

    def some(self, rows: Sequence[int]) -> Group:
        """The same for some of the rows."""
        return Group(
            self.plan,
            self.version,
            [self.index[i] for i in rows],
            [self.rows[i] for i in rows],
            [self.ids[i] for i in rows],
            [self.assignments[i] for i in rows],
            [self.switched[i] for i in rows],
            self.states[rows],
            [self.state_reset[i] for i in rows],
            None if self.outputs is None else self.outputs[rows],
            self.failure,
            self.infer_s,
            None if self.stand_in is None else [self.stand_in[i] for i in rows],
        )


@dataclass(frozen=True, slots=True)
class Settled:
    """A group after the draw: everything that is recorded and answered. Arrays have a leading axis B."""

    group: Group
    judged: Judged
    target: Target | Gaussian
    behaviour: Behaviour | PointBehaviour
    drawn: Drawn | DrawnPoints
    proposed: npt.NDArray[np.generic]  # [B, F] or [B, D]
    masked_mass: npt.NDArray[np.float64]
    actions: npt.NDArray[np.generic]  # [B, F] or [B, D]: drawn, or the fallback where the check did not pass
    passed: npt.NDArray[np.bool_]  # the independent check
    paid: npt.NDArray[np.float64]  # what each row would cost of the regret budget, zero where nobody asks
    windows: str  # the budget's windows that explored rows are charged to
    left: int | None  # explored decisions that this worker's lease still holds; None: nothing counts them
    exploring: npt.NDArray[np.float64] | None = None  # choices: weights of the exploring part, None: uniform
    frozen: npt.NDArray[np.bool_] | None = None  # choices: rows whose own part is the mode
