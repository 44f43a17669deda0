"""What a good network does besides passing the gate: promises, each a sentence and a function that checks a version.

Duty: findings on a version whose `Engine` stands; run in the trial's child, because they ask the network about states
that nobody has tried yet. They never decide whether a bundle loads.
Strategy: each probe gives a verdict and what to do about it; the states are drawn from a fixed seed, between the bounds
that training has seen. `PROBES` is the order in which they run and are shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from policies.engine import DYNAMIC_BATCH, Engine
from policies.graph import operators_of, parse_model
from policies.heads import SUM_TOLERANCE
from policies.manifest import CONTINUOUS_HEADS
from policies.probe_states import seen_of, untried
from policies.types import Box, Choices, columns

Verdict = Literal["passed", "warned"]
Finding = tuple[Verdict, str] | None  # None: the promise does not concern this bundle

PASSED: Finding = ("passed", "")
# Fewer say little: two actions agree by chance on four states once in sixteen times.
FEW_GOLDEN = 8
STEPS = 50
# A hundredth is what float16 loses; more is another network.
LOOSE = 0.01
# A median this close to its budget is over it on a busier machine.
CLOSE = 0.5
# exp(20) is a deviation of 5·10⁸: no policy means that. Stable-Baselines3 clips at 2.
LARGEST_LOG_STD = 20.0


@dataclass(frozen=True, slots=True)
class Probe:
    """One promise. hold: gives the verdict on a version and what to do, or None where it does not apply."""

    promise: str
    hold: Callable[[Engine], Finding]


def _warned(detail: str) -> Finding:
    return "warned", detail


def takes_batches(engine: Engine) -> Finding:
    interface = engine.bundle.interface
    if not interface.one_by_one:
        return PASSED
    return _warned(DYNAMIC_BATCH.format(input=interface.input, output=interface.output))


def declares_support(engine: Engine) -> Finding:
    features = engine.bundle.observation.features
    bare = [feature.name for feature in features if seen_of(feature) is None]
    if features and not bare:
        return PASSED
    which = f"of {', '.join(bare[:8])}" if bare else "of any feature"
    return _warned(
        f"the manifest does not say what training has seen {which}, so no rule can tell when a state lies outside it; "
        "give low and high, or quantiles p01 and p99, under observation.features"
    )


def bounds_are_in_order(engine: Engine) -> Finding:
    if not engine.bundle.observation.features:
        return None
    for feature in engine.bundle.observation.features:
        numbers = [feature.low, *(feature.quantiles[name] for name in sorted(feature.quantiles)), feature.high]
        known = [number for number in numbers if number is not None]
        if known != sorted(known):
            return _warned(f"feature {feature.name!r} has bounds or quantiles out of order: write them anew, from data")
    return PASSED


def declares_a_fallback(engine: Engine) -> Finding:
    if engine.bundle.fallback is not None:
        return PASSED
    return _warned(
        "the manifest says `fallback: none`, so a call gets 409 no_safe_action whenever the network fails or no action "
        "is allowed; name an action that is always safe"
    )


def has_enough_golden_states(engine: Engine) -> Finding:
    states = engine.bundle.golden_states
    distinct = len(np.unique(states.reshape(len(states), -1), axis=0))
    if distinct >= FEW_GOLDEN:
        return PASSED
    return _warned(
        f"golden.json holds {distinct} different states of {len(states)}; record {FEW_GOLDEN} or more, as training "
        "visited them"
    )


def golden_states_differ_in_action(engine: Engine) -> Finding:
    bundle = engine.bundle
    outputs = bundle.golden_outputs
    if isinstance(bundle.action, Choices):
        chosen = np.stack([outputs[:, part].argmax(axis=1) for part in columns(bundle.action.nvec)], axis=1)
    else:
        chosen = np.round(outputs[:, : bundle.action.size], 6)
    if isinstance(bundle.action, Choices) and bundle.action.size == len(bundle.action.nvec):
        return None  # there is one action only
    if len(np.unique(chosen, axis=0)) > 1:
        return PASSED
    return _warned(
        "every golden state is answered with the same action, so a network that always gives it would pass as well; "
        "add states that call for another"
    )


def golden_states_lie_in_bounds(engine: Engine) -> Finding:
    bundle = engine.bundle
    if not bundle.observation.features:
        return None
    for column, feature in enumerate(bundle.observation.features):
        seen = bundle.golden_states[:, column]
        low = -math.inf if feature.low is None else feature.low
        high = math.inf if feature.high is None else feature.high
        slack = 1e-4 * max(1.0, *(abs(bound) for bound in (low, high) if math.isfinite(bound)), 1.0)
        if seen.min() < low - slack or seen.max() > high + slack:
            return _warned(
                f"golden states go from {seen.min():g} to {seen.max():g} in {feature.name!r}, outside low and high; "
                "one of both is in other units: correct the manifest, or record the states anew"
            )
    return PASSED


def holds_golden_states_tightly(engine: Engine) -> Finding:
    bundle = engine.bundle
    spread = float(np.ptp(bundle.golden_outputs)) if bundle.golden_outputs.size > 1 else 0.0
    if bundle.golden_rtol <= LOOSE and bundle.golden_atol <= max(LOOSE, LOOSE * spread):
        return PASSED
    return _warned(
        f"golden.json allows rtol {bundle.golden_rtol:g} and atol {bundle.golden_atol:g}, so a network that differs "
        "much would pass as well; 1e-4 and 1e-5 are enough for float32"
    )


def leaves_room_in_its_latency_budget(engine: Engine) -> Finding:
    took, budget = engine.predicted_s(1) * 1000, engine.bundle.latency_budget_ms
    if took <= CLOSE * budget:
        return PASSED
    return _warned(
        f"one state takes {took:.2f} ms here, of a budget of {budget:g} ms; raise latency_budget_ms, or export a "
        "smaller network, before a busier machine refuses it"
    )


def is_deterministic(engine: Engine) -> Finding:
    states = engine.bundle.golden_states
    if np.array_equal(engine.run(states), engine.run(states)):
        return PASSED
    return _warned(
        "two calls with the same states give different outputs: the network draws at random inside, so propensities "
        "are wrong and a replay differs; export the head before its draw"
    )


def answers_rows_alone_as_in_a_batch(engine: Engine) -> Finding:
    bundle = engine.bundle
    states = bundle.golden_states[:32]
    whole = engine.run(states)
    alone = np.concatenate([engine.run(states[row : row + 1]) for row in range(len(states))])
    close = np.isclose(whole, alone, rtol=bundle.golden_rtol, atol=bundle.golden_atol).all(axis=1)
    if close.all():
        return PASSED
    return _warned(
        f"golden state {int(np.flatnonzero(~close)[0])} is answered differently alone and in a batch: something in the "
        "network mixes rows (batch normalisation in training mode, a mean over the batch); export it in eval mode"
    )


def ends_whatever_the_state(engine: Engine) -> Finding:
    if "Loop" not in operators_of(parse_model(engine.bundle.model)):
        return PASSED
    return _warned(
        "the network has a Loop, whose length may depend on the state: a trial shows only the states that it tries; "
        "export it unrolled, or as Scan"
    )


def stays_finite(engine: Engine) -> Finding:
    bundle = engine.bundle
    for what, states in untried(bundle):
        try:
            outputs = engine.run(states)
        except RuntimeError as error:
            return _warned(f"the network fails {what}: {str(error)[:200]}; such calls get the fallback")
        bad = np.flatnonzero(~np.isfinite(outputs).all(axis=1))
        if len(bad):
            state = np.array2string(states[bad[0]].reshape(-1)[:8], separator=", ", threshold=8)
            return _warned(
                f"the network answers {len(bad)} of {len(states)} states {what} with NaN or infinity, first at {state}"
                "; such calls get the fallback; look for log(0), 0/0, overflow, or an index out of range"
            )
    return PASSED


def remembers_finitely(engine: Engine) -> Finding:
    if not engine.bundle.interface.recurrent:
        return None
    states = engine.bundle.golden_states
    memory = None
    for step in range(STEPS):
        outputs, memory = engine.step(states[step % len(states)][None], None, memory)
        if not (np.isfinite(outputs).all() and np.isfinite(memory).all()):
            return _warned(
                f"the network's memory or answer is not finite after {step + 1} steps of golden states; check how the "
                "state inputs and outputs are paired under recurrent.states"
            )
    return PASSED


def heeds_its_mask(engine: Engine) -> Finding:
    bundle = engine.bundle
    if bundle.interface.mask is None or not isinstance(bundle.action, Choices):
        return None
    mask = np.zeros((1, bundle.action.size), dtype=np.bool_)
    mask[:, list(bundle.action.starts)] = True
    outputs = engine.run(bundle.golden_states[:1], mask)
    if np.isfinite(outputs).all():
        return PASSED
    return _warned(
        "with all but one choice masked the network answers with NaN or infinity; add a large negative number (-1e9) "
        "to masked logits, not -inf"
    )


def gives_distributions(engine: Engine) -> Finding:
    bundle = engine.bundle
    if bundle.head != "probabilities" or not isinstance(bundle.action, Choices):
        return None
    for what, states in untried(bundle):
        outputs = engine.run(states).astype(np.float64)
        for part in columns(bundle.action.nvec):
            off = float(np.abs(outputs[:, part].sum(axis=1) - 1.0).max())
            if outputs[:, part].min() < 0 or off > SUM_TOLERANCE or math.isnan(off):
                return _warned(
                    f"{what} the outputs are no probabilities (a row's sum is off by {off:.3g}); end the network "
                    "with a softmax over each factor, or declare head: logits"
                )
    return PASSED


def keeps_deviations_usable(engine: Engine) -> Finding:
    bundle = engine.bundle
    if bundle.head not in CONTINUOUS_HEADS or not isinstance(bundle.action, Box):
        return None
    for what, states in untried(bundle):
        largest = float(np.abs(engine.run(states)[:, bundle.action.size :]).max())
        if not largest <= LARGEST_LOG_STD:
            return _warned(
                f"{what} log_std reaches {largest:.3g}; it is the logarithm of the deviation, so check that the "
                "network does not give the deviation itself, and clip it as in training"
            )
    return PASSED


PROBES = (
    Probe("It answers a batch in one call", takes_batches),
    Probe("It says what training has seen of every feature", declares_support),
    Probe("Its bounds and quantiles are in order", bounds_are_in_order),
    Probe("It declares a fallback", declares_a_fallback),
    Probe("Its golden states are many and different", has_enough_golden_states),
    Probe("Its golden states call for different actions", golden_states_differ_in_action),
    Probe("Its golden states lie within its bounds", golden_states_lie_in_bounds),
    Probe("Its golden vectors are held tightly", holds_golden_states_tightly),
    Probe("It leaves room in its latency budget", leaves_room_in_its_latency_budget),
    Probe("It answers the same twice", is_deterministic),
    Probe("It answers a state alone as in a batch", answers_rows_alone_as_in_a_batch),
    Probe("It ends, whatever the state", ends_whatever_the_state),
    Probe("It answers corners and random states with finite numbers", stays_finite),
    Probe("Its memory stays finite over an episode", remembers_finitely),
    Probe("It takes a mask of one choice", heeds_its_mask),
    Probe("Its probabilities sum to one", gives_distributions),
    Probe("Its deviations are usable", keeps_deviations_usable),
)
