"""Why a policy is not served here: not yet, or nobody has ever heard of it. Pure.

Duty: the error of a request that names a policy, or a decision of one, that this worker does not serve. It reads what
the worker knows and changes nothing.
Promise: 404, after which no caller asks again, is said only of what is deployed nowhere as far as Redis has told. What
is deployed and not loaded yet is 503, and so is everything as long as Redis has not told at all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from policies.errors import NotReady, SurefootError, UnknownDecision, UnknownPolicy
from service.ids import policy_digest
from service.standing import PolicyState


class Absence:
    """states: what is known of each policy, which changes while it is read. informed: whether Redis has told once."""

    def __init__(self, states: Mapping[str, PolicyState], informed: Callable[[], bool]) -> None:
        self._states = states
        self._informed = informed

    def waiting(self) -> list[str]:
        """Name the policies that are deployed and not served here yet."""
        return sorted(state.name for state in self._states.values() if state.deployed and state.served is None)

    def only(self, served: Collection[str]) -> str | None:
        """Give the policy of a request that names none: the one there is, served or not. None: it has to name one."""
        names = {*served, *self.waiting()}
        return names.pop() if len(names) == 1 else None

    def of_policy(self, name: str) -> SurefootError:
        """Tell why a policy is not served here: NotReady or UnknownPolicy."""
        state = self._states.get(name)
        if state is not None and state.deployed:
            return NotReady(f"the policy {name!r} is deployed, but not loaded here yet", "policy")
        if not self._informed():
            return NotReady("Redis has not told yet which policies are deployed", "policy")
        return UnknownPolicy(f"there is no policy {name!r}", "policy")

    def of_decision(self, digest: bytes) -> SurefootError:
        """Tell why the policy of a genuine decision id is not served here: NotReady or UnknownDecision."""
        if not self._informed() or any(policy_digest(name) == digest for name in self.waiting()):
            return NotReady("the policy of this decision is not loaded here yet", "decision_id")
        return UnknownDecision("this decision belongs to a policy that is not loaded here", "decision_id")
