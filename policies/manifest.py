"""`policy.yaml` as it is written, and the specs that it declares. Pure.

Duty: bytes become a `Manifest`, or a BundleError that names the field; a manifest becomes an observation spec, an
action spec and a fallback. It knows nothing of networks: whether the file fits is asked in `bundle.py`.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec
import yaml
from msgspec import Meta, Struct

from policies.errors import BundleError, UnknownAction
from policies.types import ActionSpec, Box, Choices, Feature, HeadKind, ObservationSpec, TransformKind

MANIFEST, MODEL, GOLDEN = "policy.yaml", "model.onnx", "golden.json"

Label = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
Named = Annotated[str, Meta(min_length=1, max_length=256)]
Positive = Annotated[float, Meta(gt=0)]
Choice = int | str

# Some 20,000 features with their bounds and quantiles.
MAX_VALUES = 1 << 18
MAX_CHOICES = 65_536  # of all factors together
MANY = (list, tuple, set)  # what YAML can make besides mappings
REFERENCE = "docs/bundles.md says what may stand there"

# Heads that answer with numbers in a box; the others score choices, but `action`, which can be either.
CONTINUOUS_HEADS = frozenset({"gaussian", "squashed_gaussian"})
SCORES = frozenset({"q_values", "logits", "probabilities"})
SCORED, POINTS = "q_values, logits, probabilities or action", "action, gaussian or squashed_gaussian"


class FeatureManifest(Struct, forbid_unknown_fields=True, frozen=True):
    name: Named
    low: float | None = None
    high: float | None = None
    quantiles: dict[str, float] = {}


class ObservationManifest(Struct, forbid_unknown_fields=True, frozen=True):
    shape: list[int]
    dtype: Literal["float32", "float64"] = "float32"
    features: list[FeatureManifest] = []


class DiscreteManifest(Struct, forbid_unknown_fields=True, frozen=True, tag_field="kind", tag="discrete"):
    n: Annotated[int, Meta(ge=1, le=65_536)]
    names: list[str] = []


class FactorManifest(Struct, forbid_unknown_fields=True, frozen=True):
    name: Named
    names: list[str] = []


class MultiDiscreteManifest(Struct, forbid_unknown_fields=True, frozen=True, tag_field="kind", tag="multi_discrete"):
    nvec: Annotated[list[Annotated[int, Meta(ge=1, le=65_536)]], Meta(min_length=1, max_length=1_024)]
    factors: list[FactorManifest] = []


class ContinuousManifest(Struct, forbid_unknown_fields=True, frozen=True, tag_field="kind", tag="continuous"):
    """`low` and `high` hold one number for each coordinate; null where there is no bound."""

    low: list[float | None]
    high: list[float | None]
    names: list[str] = []


ActionManifest = DiscreteManifest | MultiDiscreteManifest | ContinuousManifest


class ModelManifest(Struct, forbid_unknown_fields=True, frozen=True):
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    input: str
    output: str
    log_std: str | None = None  # gaussian heads; without it `output` holds means and then log deviations
    mask: str | None = None  # an input that is told which choices the caller allows
    file: Literal["model.onnx"] = "model.onnx"


class StateManifest(Struct, forbid_unknown_fields=True, frozen=True):
    """One tensor that a recurrent network hands itself from step to step. `shape` is without the batch axis."""

    input: str
    output: str
    shape: Annotated[list[Annotated[int, Meta(ge=1)]], Meta(max_length=8)]
    batch_axis: Annotated[int, Meta(ge=0, le=8)] = 0


class RecurrentManifest(Struct, forbid_unknown_fields=True, frozen=True):
    states: Annotated[list[StateManifest], Meta(min_length=1, max_length=64)]


class ExplorationManifest(Struct, forbid_unknown_fields=True, frozen=True):
    epsilon: Annotated[float, Meta(ge=0, le=1)] = 0.0
    sigma: Positive | list[Positive] | None = None  # of the exploring Gaussian, in units of the executed action


class Manifest(Struct, forbid_unknown_fields=True, frozen=True):
    """`policy.yaml`, as it is written."""

    schema: Literal[1]
    policy: Label
    version: Label
    observation: ObservationManifest
    action: ActionManifest
    head: HeadKind
    model: ModelManifest
    fallback: Choice | float | list[Choice | float]
    description: str = ""
    temperature: Positive | None = None
    action_transform: TransformKind = "none"
    recurrent: RecurrentManifest | None = None
    exploration: ExplorationManifest = ExplorationManifest()
    latency_budget_ms: Positive = 20.0
    training: dict[str, object] = {}


class _Loader(yaml.SafeLoader):
    """YAML without merge keys (`<<`): a few lines of them, each merging the last ten times, stand for gigabytes."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge nothing, so that `<<` is a key that no constructor knows."""


def _check_extent(document: object) -> None:
    """Refuse what a few aliases stand for when written out, also without end, and text that no answer can carry."""
    waiting, extent = [document], 0
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            value.encode()  # a lone surrogate is a ValueError
            continue
        inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, MANY) else ()
        extent += len(inner)
        if extent > MAX_VALUES:
            detail = f"{MANIFEST} has more than {MAX_VALUES} values, its aliases written out; write it without aliases"
            raise BundleError(detail, MANIFEST)
        waiting += inner


def read_manifest(raw: bytes) -> Manifest:
    """Decode `policy.yaml`. Raises BundleError naming the field."""
    try:
        document = yaml.load(raw, _Loader)  # noqa: S506 - a SafeLoader
        _check_extent(document)
        return msgspec.convert(document, Manifest)
    except yaml.YAMLError as error:
        raise BundleError(f"{MANIFEST} is not YAML: {error}; mend it at that place", MANIFEST) from None
    except (RecursionError, ValueError, OverflowError) as error:  # msgspec.ValidationError is a ValueError
        message, _, path = str(error).partition(" - at `$")
        raise BundleError(f"{message}; {REFERENCE}", path.strip(".`") or MANIFEST) from None


def observation_spec(manifest: Manifest) -> ObservationSpec:
    declared = manifest.observation
    for index, feature in enumerate(declared.features):
        _check_feature(feature, f"observation.features[{index}]")
    features = tuple(Feature(f.name, f.low, f.high, f.quantiles) for f in declared.features)
    return ObservationSpec(tuple(declared.shape), declared.dtype, features)


def _check_feature(feature: FeatureManifest, field: str) -> None:
    known = [bound for bound in (feature.low, feature.high) if bound is not None]
    if not all(map(math.isfinite, (*known, *feature.quantiles.values()))):
        raise BundleError(f"{feature.name!r} has bounds or quantiles that are not finite; leave such out", field)
    if known != sorted(known):
        raise BundleError(f"{feature.name!r} has low above high; exchange them", field)


def action_spec(manifest: Manifest) -> ActionSpec:
    declared = manifest.action
    if isinstance(declared, DiscreteManifest):
        return Choices((_names(declared.n, declared.names, "action.names"),))
    if isinstance(declared, ContinuousManifest):
        low = tuple(-math.inf if bound is None else bound for bound in declared.low)
        high = tuple(math.inf if bound is None else bound for bound in declared.high)
        return Box(low, high, tuple(declared.names))
    if sum(declared.nvec) > MAX_CHOICES:  # before a name is made for each
        detail = f"nvec has {sum(declared.nvec)} choices in all, the most is {MAX_CHOICES}; use fewer, smaller factors"
        raise BundleError(detail, "action.nvec")
    factors = declared.factors or [FactorManifest(f"factor_{f}") for f in range(len(declared.nvec))]
    if len(factors) != len(declared.nvec):
        detail = f"nvec has {len(declared.nvec)} factors, {len(factors)} are named; name each of them, or none"
        raise BundleError(detail, "action.factors")
    names = [
        _names(n, factor.names, f"action.factors[{f}].names")
        for f, (n, factor) in enumerate(zip(declared.nvec, factors, strict=True))
    ]
    return Choices(tuple(names), tuple(factor.name for factor in factors))


def _names(n: int, declared: list[str], field: str) -> tuple[str, ...]:
    names = tuple(declared) or tuple(str(index) for index in range(n))
    if len(names) != n:
        raise BundleError(f"there are {n} choices, but {len(names)} names; name each of them, or none", field)
    return names


def fallback_action(declared: object, action: ActionSpec) -> tuple[float, ...] | None:
    """Read the declared fallback. `none` declares that there is none, unless an action has that name."""
    named = isinstance(action, Choices) and not action.factors and "none" in action.index_of[0]
    if declared == "none" and not named:
        return None
    try:
        found = action.parse(declared, "fallback")
    except UnknownAction as error:
        raise BundleError(f"{error.detail}; or declare `fallback: none`", error.field) from None
    if not action.validate(found):
        raise BundleError("the fallback lies outside low and high; name a point between them", "fallback")
    return found


def sigma_of(manifest: Manifest, action: ActionSpec) -> tuple[float, ...] | None:
    """Read the exploring Gaussian's deviation, one number for each coordinate. None where nothing declares it."""
    declared, epsilon = manifest.exploration.sigma, manifest.exploration.epsilon
    if isinstance(action, Choices):
        if declared is not None:
            detail = "sigma is for continuous actions, and choices explore uniformly; leave it out"
            raise BundleError(detail, "exploration.sigma")
        return None
    if declared is None:
        if epsilon > 0:
            detail = (
                "a continuous action is explored around itself, and nothing says how far; give the deviation, in units "
                "of the action, or epsilon 0"
            )
            raise BundleError(detail, "exploration.sigma")
        return None
    sigma = tuple(declared) if isinstance(declared, list) else (declared,) * action.size
    if len(sigma) != action.size or not all(map(math.isfinite, sigma)):
        detail = f"sigma has {len(sigma)} numbers, or one that is not finite; give one, or {action.size}, all finite"
        raise BundleError(detail, "exploration.sigma")
    return sigma


def check_head(manifest: Manifest, action: ActionSpec) -> None:
    """Hold head, transform and temperature against the action space. Raises BundleError."""
    head = manifest.head
    if manifest.temperature is not None and head not in ("q_values", "logits"):
        detail = f"temperature is for heads q_values and logits, not {head}; leave it out, or declare the right head"
        raise BundleError(detail, "temperature")
    if manifest.action_transform != "none" and head not in ("action", "gaussian"):
        detail = f"action_transform is for heads action and gaussian, not {head}; leave it out"
        raise BundleError(detail, "action_transform")
    if manifest.model.log_std is not None and head not in CONTINUOUS_HEADS:
        detail = f"log_std is for heads gaussian and squashed_gaussian, not {head}; leave it out"
        raise BundleError(detail, "model.log_std")
    if isinstance(action, Box):
        _check_points(manifest, action)
    elif head in CONTINUOUS_HEADS:
        detail = f"head {head} needs a continuous action, this is {action.kind}; declare head {SCORED}, or a box"
        raise BundleError(detail, "head")
    elif manifest.action_transform != "none":
        raise BundleError("action_transform is for continuous actions; leave it out", "action_transform")


def _check_points(manifest: Manifest, action: Box) -> None:
    if manifest.head in SCORES:
        detail = f"head {manifest.head} scores choices, but the action is continuous; declare head {POINTS}"
        raise BundleError(detail, "head")
    if manifest.model.mask is not None:
        detail = "a mask is over choices, but the action is continuous; export without that input, and leave it out"
        raise BundleError(detail, "model.mask")
    if not action.bounded and (manifest.head == "squashed_gaussian" or manifest.action_transform == "unscale"):
        detail = "[-1, 1] cannot be scaled to a coordinate without bounds; give finite low and high"
        raise BundleError(detail, "action.low")
