"""The safety side of a policy: from the documents that say it to what the pipeline reads.

Duty: `safety.yaml` and `exploration.yaml`, of a directory or of the control state, are held against the policy that
they are for. It knows no Redis and no HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from policies.bundle import PolicyBundle
from policies.errors import ConfigError, InvalidField, SafetyError, SurefootError
from policies.store import EXPLORATION, ROLLOUT, SAFETY, StoredPolicy
from safety.document import RuleSet, bind, read_rules
from safety.exploration import Exploration, parse_exploration
from service.rolling import returns_of
from service.rollout_plan_file import read_plan
from service.ruling import Ruling
from service.standing import Document
from shadow.rollout_plan import RolloutPlan


def fitting_rules(source: str, bundles: Sequence[PolicyBundle]) -> RuleSet:
    """Read rules and hold them against every version of a policy that is loaded.

    Raises SafetyError naming line, column and field; InvalidField where a rule does not fit.
    """
    ruleset = read_rules(source.encode())
    for bundle in bundles:
        bind(
            ruleset,
            bundle.action,
            bundle.observation,
            bundle.fallback,
            policy=bundle.policy,
            sample_states=bundle.golden_states,
        )
        Ruling.fitting(ruleset, bundle).bind(bundle, is_baseline=False)
    return ruleset


def document_of(seed: StoredPolicy) -> Document:
    """How a directory deploys a policy, at generation 1. Raises ConfigError naming file and field."""
    return Document(1, seed.deployment, 0, "directory", _safety(seed), _exploration(seed), rollout=_rollout(seed))


def _rollout(seed: StoredPolicy) -> RolloutPlan | None:
    raw, where = seed.documents.get(ROLLOUT), f"{seed.name}/{ROLLOUT}"
    if raw is None:
        return None
    try:
        plan = read_plan(raw, where)
        returns_of(plan, seed.deployment)
    except SafetyError as error:
        raise ConfigError(error.detail, error.field) from None
    except InvalidField as error:
        raise ConfigError(f"{where}: {error.detail}", error.field) from None
    return plan


def _safety(seed: StoredPolicy) -> str:
    raw = seed.documents.get(SAFETY, b"")
    if not raw:
        return ""
    try:
        source = raw.decode()
        fitting_rules(source, list(seed.bundles.values()))
    except (UnicodeDecodeError, SurefootError) as error:
        field = error.field if isinstance(error, SurefootError) else None
        raise ConfigError(f"{seed.name}/{SAFETY}: {error}", field or SAFETY) from None
    return source


def _exploration(seed: StoredPolicy) -> Exploration | None:
    raw = seed.documents.get(EXPLORATION)
    if raw is None:
        return None
    where = f"{seed.name}/{EXPLORATION}"
    try:
        return parse_exploration(yaml.safe_load(raw))
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {error}", where) from None
    except InvalidField as error:
        raise ConfigError(f"{where}: {error.detail}", error.field) from None
