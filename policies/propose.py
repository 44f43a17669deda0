"""A recognised network and what its owner says of it, to a manifest. Pure.

Duty: complete a `Profile` by what only the caller knows, and write `policy.yaml` as a mapping. It reads no graph.
Strategy: what the caller says outranks nothing that the file says: a contradiction is refused. What neither says is
asked for by the name of the option that would say it.
Promise: every field of the manifest was told by the file, by its convention or by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from policies.manifest import CONTINUOUS_HEADS, SCORES
from policies.profiles import Profile, refuse
from policies.types import ActionKind, HeadKind, TransformKind

# Observations wider than this get no feature names: they are no list of named measurements any more.
MOST_FEATURES = 256


@dataclass(frozen=True, slots=True)
class Support:
    """What an observation's elements may be, and were in training. None: unknown or unbounded."""

    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    quantiles: Sequence[Mapping[str, float]] = ()


@dataclass(frozen=True, slots=True)
class Said:
    """What the owner of a network says of its actions and observations.

    actions: names of the choices, or of the coordinates of a continuous action. factors: names by factor. nvec: how
    many choices each factor has. low, high: one number, or one for each coordinate; None inside is unbounded.
    """

    head: HeadKind | None = None
    actions: Sequence[str] = ()
    factors: Mapping[str, Sequence[str]] = field(default_factory=dict)
    nvec: Sequence[int] = ()
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    no_bounds: bool = False
    transform: TransformKind | None = None
    features: Sequence[str] = ()
    shape: tuple[int, ...] = ()

    @property
    def continuous(self) -> bool:
        return bool(self.low or self.high or self.no_bounds or self.head in CONTINUOUS_HEADS or self.transform)

    @property
    def choices(self) -> bool:
        return bool(self.nvec or self.factors or self.head in SCORES)


@dataclass(frozen=True, slots=True)
class Settled:
    """A profile of which nothing is open any more."""

    profile: Profile
    head: HeadKind
    shape: tuple[int, ...]
    action: dict[str, Any]
    transform: TransformKind

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many choices each factor has; none for a continuous action."""
        kind = self.action["kind"]
        if kind == "continuous":
            return ()
        return (self.action["n"],) if kind == "discrete" else tuple(self.action["nvec"])


def settle(profile: Profile, said: Said) -> Settled:
    """Complete a profile by what the caller says. Raises BundleError where that contradicts the file or is missing."""
    if said.continuous and said.choices:
        raise refuse("bounds and transforms are for continuous actions, --nvec and scores for choices", "action.kind")
    shape = _shape(profile, said)
    kind = _kind(profile, said)
    if kind == "continuous":
        head, size = _continuous_head(profile, said)
        low, high = _bounds(said, size)
        action: dict[str, Any] = {"kind": "continuous", "low": low, "high": high}
        if said.actions:
            action["names"] = _counted(said.actions, size)
        return Settled(profile, head, shape, action, _transform(profile, said, head, low, high))
    return Settled(profile, _choice_head(profile, said), shape, _choices(profile, said), "none")


def propose(
    settled: Settled,
    *,
    policy: str,
    version: str,
    sha256: str,
    fallback: object = "none",
    exploration: Mapping[str, Any] | None = None,
    support: Support | None = None,
    features: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the manifest of a settled profile, as `policy.yaml` holds it. `extra`: further top-level fields."""
    profile = settled.profile
    observation: dict[str, Any] = {"shape": list(settled.shape), "dtype": profile.dtype}
    described = _features(settled.shape, features, support or Support())
    if described:
        observation["features"] = described
    model: dict[str, Any] = {"file": "model.onnx", "sha256": sha256, "input": profile.input, "output": profile.output}
    model |= {"log_std": profile.log_std} if profile.log_std else {}
    model |= {"mask": profile.mask} if profile.mask else {}
    manifest: dict[str, Any] = {"schema": 1, "policy": policy, "version": version}
    manifest |= {"observation": observation, "action": settled.action, "head": settled.head, "model": model}
    if settled.transform != "none":
        manifest["action_transform"] = settled.transform
    if profile.memory:
        states = [
            {"input": each.input, "output": each.output, "shape": list(each.shape), "batch_axis": each.batch_axis}
            for each in profile.memory
        ]
        manifest["recurrent"] = {"states": states}
    manifest |= {"exploration": dict(exploration or {"epsilon": 0.0}), "fallback": fallback}
    return manifest | dict(extra or {})


def _kind(profile: Profile, said: Said) -> ActionKind:
    kind = profile.meaning.kind
    if kind is not None and (said.continuous or said.choices) and (kind == "continuous") != said.continuous:
        raise refuse(f"the network's actions are {kind}, which the options contradict", "action.kind")
    if (
        kind is None
        and not said.continuous
        and not said.choices
        and not (said.actions and profile.convention == "rllib")
    ):
        detail = (
            f"the file does not say what its output {profile.output!r} means; for choices add --head q_values, "
            "--head logits or --head probabilities, for a continuous action --low and --high, or --no-bounds"
        )
        raise refuse(detail, "head")
    return kind or ("continuous" if said.continuous else "discrete")


def _shape(profile: Profile, said: Said) -> tuple[int, ...]:
    if profile.shape is None:
        if not said.shape:
            raise refuse(
                "the file does not say the sizes of an observation; add --shape, e.g. --shape 4", "observation.shape"
            )
        return said.shape
    if said.shape and said.shape != profile.shape:
        detail = f"the network observes {list(profile.shape)}, --shape says {list(said.shape)}"
        raise refuse(detail, "observation.shape")
    return profile.shape


def _features(shape: tuple[int, ...], names: Sequence[str], support: Support) -> list[dict[str, Any]]:
    """Describe the elements of a vector. Unnamed ones are x0, x1, … so that all versions of a policy agree."""
    if len(shape) != 1 or (not names and shape[0] > MOST_FEATURES):
        return [{"name": name} for name in names]
    described = []
    for index, name in enumerate(names or [f"x{index}" for index in range(shape[0])]):
        feature: dict[str, Any] = {"name": name}
        for field_name, values in (("low", support.low), ("high", support.high), ("quantiles", support.quantiles)):
            if index < len(values) and values[index] is not None:
                feature[field_name] = values[index]
        described.append(feature)
    return described


def _continuous_head(profile: Profile, said: Said) -> tuple[HeadKind, int]:
    """Say how the output tells a continuous action, and how many coordinates that has."""
    bounds = max(len(said.low), len(said.high))
    width = profile.width or (bounds if bounds > 1 else None)
    if width is None:
        detail = "the file does not say how many numbers an action has; give a bound for each: --low=-1,-1 --high=1,1"
        raise refuse(detail, "action.low")
    head = said.head or profile.meaning.head
    if profile.log_std is not None:
        if head not in CONTINUOUS_HEADS:
            detail = "the network answers with means and log deviations; add --head gaussian, or squashed_gaussian if "
            raise refuse(detail + "its action is the tanh of what is drawn", "head")
        return head, width
    head = head or _head_by_width(width, bounds)
    if head not in CONTINUOUS_HEADS:
        return head, width
    if width % 2:
        raise refuse(f"means and log deviations are an even number, the network answers {width}", "head")
    return head, width // 2


def _head_by_width(width: int, bounds: int) -> HeadKind:
    """Tell by the number of bounds whether an output holds an action, or means and then log deviations."""
    if bounds > 1 and width in (bounds, 2 * bounds):
        return "action" if bounds == width else "gaussian"
    detail = f"the file does not say whether its {width} numbers are an action or means and log deviations; "
    raise refuse(detail + "add --head action or --head gaussian", "head")


def _bounds(said: Said, size: int) -> tuple[list[float | None], list[float | None]]:
    if not said.no_bounds and not (said.low and said.high):
        detail = "the file does not say the bounds of its action; add --low and --high (a number, or one for each "
        raise refuse(detail + f"of {size} coordinates), or --no-bounds", "action.low")
    if said.no_bounds and (said.low or said.high):
        raise refuse("--no-bounds contradicts --low and --high", "action.low")
    sides = []
    for name, given in (("low", said.low), ("high", said.high)):
        values = list(given) or [None]
        if len(values) not in (1, size):
            raise refuse(f"the action has {size} coordinates, --{name} has {len(values)} numbers", f"action.{name}")
        finite = [float(value) if value is not None and math.isfinite(value) else None for value in values]
        sides.append(finite * (size if len(finite) == 1 else 1))
    return sides[0], sides[1]


def _transform(
    profile: Profile, said: Said, head: HeadKind, low: Sequence[float | None], high: Sequence[float | None]
) -> TransformKind:
    """Say whether [-1, 1] is to be scaled to the bounds. A squashed Gaussian always is, so it says nothing."""
    if head == "squashed_gaussian":
        return "none"
    unit = set(low) == {-1.0} and set(high) == {1.0}
    if said.transform is not None:
        return "none" if unit else said.transform
    unbounded = None in (*low, *high)
    if profile.meaning.normalised and not unbounded:
        return "unscale"
    if unit or not profile.meaning.tanh or (unbounded and not profile.meaning.normalised):
        return "none"
    detail = (
        "the network answers in [-1, 1] and the bounds differ; add --transform unscale if its answer is to be scaled "
    )
    raise refuse(detail + "to the bounds, --transform none if it is the action itself", "action_transform")


def _choice_head(profile: Profile, said: Said) -> HeadKind:
    found = profile.meaning.head
    if found is None:
        if said.head is None and profile.convention != "rllib":  # RLlib answers with logits
            detail = "add --head q_values (the largest wins), --head logits or --head probabilities (drawn from)"
            raise refuse(f"the file does not say what its scores are; {detail}", "head")
        return said.head or "logits"
    if said.head is not None and (said.head == "action") != (found == "action"):
        raise refuse(f"the network answers as head {found}, not {said.head}", "head")
    return said.head or found


def _choices(profile: Profile, said: Said) -> dict[str, Any]:
    """Say how many choices there are and what they are called."""
    sizes = _sizes(profile, said)
    if len(sizes) == 1 and not said.factors:
        action: dict[str, Any] = {"kind": "discrete", "n": sizes[0]}
        if said.actions:
            action["names"] = _counted(said.actions, sizes[0])
        return action
    action = {"kind": "multi_discrete", "nvec": list(sizes)}
    if said.factors:
        if len(said.factors) != len(sizes):
            raise refuse(f"the network has {len(sizes)} factors, {len(said.factors)} were named", "action.factors")
        named = zip(said.factors.items(), sizes, strict=True)
        action["factors"] = [{"name": name, "names": _counted(names, n)} for (name, names), n in named]
    return action


def _sizes(profile: Profile, said: Said) -> tuple[int, ...]:
    """Settle the number of choices of each factor between the file and the caller."""
    found = profile.meaning.sizes
    told = tuple(said.nvec) or tuple(len(names) for names in said.factors.values())
    told = told or ((len(said.actions),) if said.actions and len(found) == 1 else ())
    if profile.meaning.head != "action" and len(told) > 1 and found == (sum(told),):
        return told  # scores of all factors side by side
    if told and (len(told) != len(found) or any(n not in (None, m) for n, m in zip(found, told, strict=True))):
        raise refuse(f"the network has {_listed(found)} actions, {_listed(told)} were named", "action.n")
    sizes = tuple(n for n in told or found if n is not None)
    if len(sizes) != len(found):
        detail = "the file does not say how many actions there are; name them (--actions left,right or --actions 2)"
        if len(found) > 1:
            detail = f"the file does not say how many choices each of its {len(found)} factors has; add --nvec 3,2"
        raise refuse(detail, "action.n")
    return sizes


def _listed(sizes: Sequence[int | None]) -> str:
    return ", ".join("?" if n is None else str(n) for n in sizes)


def _counted(names: Sequence[str], n: int) -> list[str]:
    if len(names) != n:
        raise refuse(f"there are {n} actions or coordinates, {len(names)} names: {', '.join(names)}", "action.names")
    return list(names)
