"""What is written of each decision that a shadow has scored: fields, codec. Pure.

Duty: rows of a comparison as `Score`s, and their bytes. docs/shadows.md names every field.
Strategy: msgpack with field names, defaults left out: readers take what they know, as with recorded decisions.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np

from policies.types import ActionSpec, PropensityKind, WireAction
from shadow.compare import Compared
from shadow.shown import ChoiceRows, Rows

SCHEMA_VERSION = 1
# Wider distributions are left out: 65,536 choices would take half a megabyte for each decision.
MOST_NUMBERS = 1_024


class Score(msgspec.Struct, frozen=True, omit_defaults=True):
    """One decision as a shadow would have made it."""

    decision_id: str
    version: str  # the shadow
    digest: str  # its content
    decided: str  # the version that decided
    share: float  # the probability with which the row was kept for scoring
    propensity: float | None  # of the executed action, as logged; null: unknown, or a density
    log_propensity: float | None
    kind: PropensityKind  # what `log_probability` is the log of
    log_probability: float | None  # of the executed action under the shadow, no exploration; null: zero, or no ratio
    probability: float | None  # the same where it is one; 0.0 where there is no mass; null: a density, or no ratio
    target: bytes  # float64: over choices by factor; in a box the raw action's means and deviations; empty: too wide
    proposed: WireAction  # what it would have done
    unmasked: WireAction  # what it would have done without rules and callers' limits
    agrees: bool = False
    overridden: bool = False  # rules forbid `unmasked`
    fallback: bool = False  # it would have answered with its fallback
    fault: str = ""  # why its network has no usable answer
    divergence: float = 0.0
    kl: float | None = None  # null: infinite, or not a choice
    w2: float | None = None
    value: float | None = None  # what it says the executed action is worth
    expected: float | None = None  # what it says its own distribution is worth
    difference: float | None = None  # `value` less what the deciding version says
    latency_us: float = 0.0  # the row's part of its call
    v: int = SCHEMA_VERSION


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Score).decode


def encode_score(score: Score) -> bytes:
    return _encode(score)


def decode_score(raw: bytes) -> Score:
    """Read what `encode_score` wrote. Raises msgspec.DecodeError."""
    return _decode(raw)


def scores(
    rows: Rows, compared: Compared, version: str, digest: str, action: ActionSpec, faults: list[str], latency_us: float
) -> list[Score]:
    """Write a comparison row by row. faults: why each row's network has no usable answer, "" where it has one."""
    propensity, log_propensity = _logged(rows)
    wide = compared.target.shape[1] > MOST_NUMBERS
    shares, masses = rows.share.tolist(), _probability(compared)
    columns_ = {name: getattr(compared, name).tolist() for name in _NUMBERS}
    proposed, unmasked = compared.proposed.tolist(), compared.unmasked.tolist()
    return [
        Score(
            decision_id=rows.ids[i],
            version=version,
            digest=digest,
            decided=rows.version,
            share=shares[i],
            propensity=_known(propensity[i]),
            log_propensity=_known(log_propensity[i]),
            kind=compared.kinds[i],
            log_probability=_known(columns_["log_probability"][i]),
            probability=_known(masses[i]),
            target=b"" if wide else compared.target[i].tobytes(),
            proposed=action.wire(proposed[i]),
            unmasked=action.wire(unmasked[i]),
            agrees=columns_["agrees"][i],
            overridden=columns_["overridden"][i],
            fallback=columns_["fallen"][i],
            fault=faults[i],
            divergence=columns_["divergence"][i],
            kl=_known(columns_["kl"][i]),
            w2=_known(columns_["w2"][i]),
            value=_known(columns_["value"][i]),
            expected=_known(columns_["expected"][i]),
            difference=_known(columns_["difference"][i]),
            latency_us=latency_us,
        )
        for i in range(len(rows))
    ]


_NUMBERS = (
    "log_probability", "agrees", "overridden", "fallen", "divergence", "kl", "w2", "value", "expected", "difference",
)  # fmt: skip


def _logged(rows: Rows) -> tuple[list[float], list[float]]:
    logged = rows.logged
    if isinstance(logged, ChoiceRows):
        with np.errstate(divide="ignore"):
            return logged.propensity.tolist(), np.log(logged.propensity).tolist()
    return [math.nan] * len(rows), logged.log_propensity.tolist()


def _probability(compared: Compared) -> list[float]:
    """exp(log_probability) where that is a probability; 0 where there is no mass, whatever the measure."""
    log_p = compared.log_probability
    mass = np.array([kind == "mass" for kind in compared.kinds])
    with np.errstate(under="ignore", over="ignore"):
        found: list[float] = np.where(mass | np.isneginf(log_p), np.exp(log_p), np.nan).tolist()
    return found


def _known(number: float) -> float | None:
    """A number that every reader can take, or None."""
    return number if math.isfinite(number) else None
