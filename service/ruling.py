"""The rules of a policy, bound to each version that they are held against.

Duty: from a `safety.yaml` to what `judge.py` asks: a filter before the draw and a last look after it. Versions of one
policy share their spaces, but what training has seen of a feature is each version's own, so each has its own binding.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from policies.bundle import PolicyBundle
from safety.document import RuleSet
from safety.evaluate import Filter
from safety.limits import LimitSet, bind
from safety.recheck import Recheck
from safety.rules import Confidence, Instead, Rule, Support


@dataclass(frozen=True, slots=True)
class Bound:
    """The rules as they hold for one version."""

    rules: tuple[Rule, ...]
    filter: Filter
    recheck: Recheck

    @classmethod
    def of(cls, rules: tuple[Rule, ...], bundle: PolicyBundle) -> Bound:
        """Bind. Raises SafetyError naming the rule's field."""
        spaces = bundle.action, bundle.observation
        return cls(rules, Filter(rules, *spaces), Recheck(rules, *spaces))


@dataclass(slots=True)
class Ruling:
    """A policy's rules in force. Bind every version before it is asked about: it compiles expressions."""

    ruleset: RuleSet
    limits: LimitSet = field(default_factory=LimitSet)
    _bound: dict[tuple[str, bool], Bound] = field(default_factory=dict)

    @classmethod
    def fitting(cls, ruleset: RuleSet, champion: PolicyBundle) -> Ruling:
        """Bind what does not depend on a version. Raises SafetyError, or InvalidField."""
        return cls(ruleset, bind(ruleset.rules.rules, champion.action))

    @property
    def counts(self) -> bool:
        """Whether some rule is about what was executed before."""
        return bool(self.limits.all) or self.limits.remembers is not None

    @property
    def on_empty(self) -> Instead:
        return self.ruleset.rules.on_empty

    def bind(self, bundle: PolicyBundle, is_baseline: bool) -> Bound:
        """Bind the rules to a version, once. Where the version is the baseline nobody else is the baseline: rules that
        would hand rows to it leave them.
        """
        at = bundle.digest, is_baseline
        found = self._bound.get(at)
        if found is None:
            rules = tuple(rule for rule in self.ruleset.rules.rules if not (is_baseline and _hands_over(rule)))
            found = self._bound[at] = Bound.of(rules, bundle)
        return found


def _hands_over(rule: Rule) -> bool:
    return isinstance(rule, Support | Confidence) and rule.then == "baseline"
