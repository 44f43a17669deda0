"""The safety side of a policy: from the documents that say it to what the pipeline reads.

Duty: `safety.yaml` and `exploration.yaml`, of a directory or of the control state, are held against the policy that
they are for. It knows no Redis and no HTTP.
"""

from __future__ import annotations

import yaml

from policies.errors import ConfigError, InvalidField
from policies.store import EXPLORATION, SAFETY, StoredPolicy
from safety.exploration import Exploration, parse_exploration
from service.standing import Document


def document_of(seed: StoredPolicy) -> Document:
    """How a directory deploys a policy, at generation 1. Raises ConfigError naming file and field."""
    safety = seed.documents.get(SAFETY, b"").decode()
    return Document(1, seed.deployment, 0, "directory", safety, _exploration(seed))


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
