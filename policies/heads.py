"""Network outputs to target distributions over choices. Pure, vectorised over the batch.

Duty: the heads of discrete and multi-discrete actions; numbers in a box are `continuous.py`'s. A row of N columns holds
the factors side by side; factors are independent.
Invariant: each factor of a row of the result is a distribution (or values, for a greedy head), or the row is faulty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from policies.types import Bools, Floats, HeadKind, Target, columns

# How far the sum of a `probabilities` head may be from one: float32 softmax over 65,536 actions stays within.
SUM_TOLERANCE = 1e-3


def target(
    outputs: npt.NDArray[np.floating],
    head: HeadKind,
    temperature: float | None = None,
    nvec: Sequence[int] | None = None,
) -> Target:
    """Read the network's `outputs` [B, N] as the distribution that the head declares, factor by factor.

    q_values: greedy; with `temperature` T > 0, softmax(q / T).
    logits: softmax(logits / T), T = 1 unless given.
    probabilities: as they are, renormalised in float64.
    action: rows that `index_rows` made, one-hot: all mass on that action. Any other row is faulty.
    nvec: the factors' sizes, with sum N; one factor of N choices unless given.
    """
    sizes = (outputs.shape[1],) if nvec is None else tuple(nvec)
    values = outputs.astype(np.float64)
    faulty: Bools = np.zeros(len(values), dtype=np.bool_)
    finite = np.isfinite(values)
    if not finite.all():
        faulty = np.asarray(~finite.all(axis=1))
        values[faulty] = 0.0
    if head == "q_values" and temperature is None:
        return Target(values, greedy=True, faulty=faulty, nvec=sizes)
    if head in ("q_values", "logits"):
        return _softened(values / (1.0 if temperature is None else temperature), faulty, sizes)
    return _given(values, faulty, sizes, _no_distribution if head == "probabilities" else _no_one_hot)


def _softened(logits: Floats, faulty: Bools, nvec: tuple[int, ...]) -> Target:
    scores = np.empty(logits.shape)
    for part in columns(nvec):
        scores[:, part] = softmax(logits[:, part])
    scores[faulty] = 0.0
    return Target(scores, greedy=False, faulty=faulty, nvec=nvec, logits=logits)


def _given(values: Floats, faulty: Bools, nvec: tuple[int, ...], wrong: Callable[[Floats], Bools]) -> Target:
    """Distributions that the network names itself; a row with a factor that is none is faulty."""
    parts = columns(nvec)
    for part in parts:
        faulty = faulty | wrong(values[:, part])
    values[faulty] = 0.0
    for part in parts:
        values[:, part] /= np.where(faulty, 1.0, values[:, part].sum(axis=1))[:, None]
    return Target(values, greedy=False, faulty=faulty, nvec=nvec)


def index_rows(indices: npt.NDArray[np.generic], nvec: Sequence[int]) -> npt.NDArray[np.float32]:
    """Turn the output of a network that answers with action indices into rows like every other head's, [B, N].

    indices: [B] or [B, F], integers of any width or floats. Each factor of a row is one-hot, or NaN where the number is
    not an index of it: out of range, fractional, not finite.
    """
    numbers = indices.reshape(len(indices), len(nvec)).astype(np.float64)
    rows = np.zeros((len(numbers), sum(nvec)), dtype=np.float32)
    for number, n, part in zip(numbers.T, nvec, columns(nvec), strict=True):
        known = (number == np.floor(number)) & (number >= 0) & (number < n)  # False for NaN and infinity
        rows[~known, part] = np.nan
        (at,) = np.nonzero(known)
        rows[at, part.start + number[at].astype(np.int64)] = 1.0
    return rows


def _no_one_hot(values: Floats) -> Bools:
    """A network that names one action names no second-best: where that is masked, no mass is left."""
    return np.asarray(~(((values == 0.0) | (values == 1.0)).all(axis=1) & (values.sum(axis=1) == 1.0)))


def _no_distribution(values: Floats) -> Bools:
    return np.asarray(np.any(values < 0, axis=1) | (np.abs(values.sum(axis=1) - 1.0) > SUM_TOLERANCE))


def softmax(logits: Floats) -> Floats:
    """exp(l) / Σ exp(l) along the rows, float64 [B, n]; the largest must be finite in each row."""
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float64)
