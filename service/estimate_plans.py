"""What is to be estimated of each policy that is served: its plan, its versions, its rewards. Pure.

Duty: from what a worker knows of a policy to the question that `estimating.py` answers. A policy without a plan, or
without the content of its champion at hand, has none.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from policies.errors import InvalidField
from service.estimate_tallies import Watched
from service.rolling import returns_of
from service.standing import PolicyState
from shadow.rollout import RolloutPlan


def plans(states: Iterable[PolicyState]) -> dict[str, Watched | None]:
    """The questions of all policies that are served."""
    return {state.name: watched(state, _plan(state)) for state in states if state.served is not None}


def watched(state: PolicyState, plan: RolloutPlan | None) -> Watched | None:
    """The question of one policy; None: nothing is to be estimated."""
    document, champion = state.document, state.champion
    if document is None or champion is None or plan is None:
        return None
    deployed = document.deployment
    digests = {label: state.digest(label) for label in deployed.versions}
    deciding = {deployed.champion, *(each.version for each in deployed.challengers)}
    return Watched(
        plan=plan,
        champion=deployed.champion,
        live={label: digest for label, digest in digests.items() if digest and label in deciding},
        shadows={label: digest for label, digest in digests.items() if digest and label in deployed.shadows},
        reward=deployed.reward,
        route_by=deployed.route_by,
        observation=champion.observation,
        action=champion.action,
    )


def _plan(state: PolicyState) -> RolloutPlan | None:
    """The plan that values its units: of the rollout under way, or for the next one; None: it does not say how."""
    document = state.document
    if document is None:
        return None
    standing = document.standing
    if standing is not None and standing.under_way:
        return replace(standing.plan, return_range=standing.returns)
    if document.rollout is None:
        return None
    try:
        return replace(document.rollout, return_range=returns_of(document.rollout, document.deployment))
    except InvalidField:
        return None
