"""What travels over HTTP: request and response structs of the hot routes, and their codec. Pure.

Duty: shapes and types of the JSON; semantics live in `act.py` and `rewards.py`. Unknown fields are refused.
Strategy: msgspec decodes straight into structs; its one-line complaints are translated here into the error tree,
with the field named as a path. `state` is kept raw until the policy, and with it the observation's shape, is known.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Raw, Struct

from policies.errors import BadJson, InvalidField, MissingField, NotFinite, RequestError, UnknownField
from policies.types import PropensityKind, WireAction

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Step = Annotated[int, Meta(ge=0, le=2**53)]
Choice = int | str
Action = Choice | list[Choice | float]  # an index or name; one for each factor; the coordinates of a point
ABSENT = (b"", b"null")  # a raw field that was left out, or is null

INTERNAL = "internal_error"  # why nothing is known of a decision whose pipeline failed
UNRECORDED = "not_recorded"  # why an explored action was not answered: what is explored is recorded
Context = dict[str, Any]


class AllowedBox(Struct, forbid_unknown_fields=True, frozen=True):
    """What a caller allows of a box; null and what is left out: no bound."""

    low: list[float | None] | None = None
    high: list[float | None] | None = None


# Choices; for several factors one list for each, null: all of it; for points a box.
Allowed = list[Choice | list[Choice] | None] | AllowedBox


class ActFields(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What a question for one action says beside its state."""

    policy: Name | None = None
    key: Name | None = None
    episode: Name | None = None
    step: Step | None = None
    context: Context | None = None
    allowed_actions: Allowed | None = None
    previous_action: Action | None = None  # the key's last executed action, for rules on steps
    explore: bool = True
    include: tuple[Literal["values", "distribution"], ...] = ()


class ActRequest(ActFields, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Ask for one action."""

    state: Raw


class ActBatchFields(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What a question for several actions says beside its states. Columns have one element per state."""

    policy: Name | None = None
    keys: list[Name | None] | None = None
    episodes: list[Name | None] | None = None
    steps: list[Step | None] | None = None
    contexts: list[Context | None] | None = None
    allowed_actions: list[Allowed | None] | None = None
    previous_actions: list[Action | None] | None = None
    explore: bool = True


class ActBatchRequest(ActBatchFields, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Ask for an action for each of several states of one policy."""

    states: list[Raw]


class Exploration(Struct, frozen=True):
    epsilon: float  # in force for this row
    left: int | None = None  # explored decisions left in the window; null: no budget is declared


class Safety(Struct, frozen=True):
    overridden: bool  # the mask changed what the version would have done
    proposed: int | str | list[str | int | float]  # what it would have done
    rules: tuple[str, ...]  # which rules changed it
    stand_in: str | None = None  # why the baseline decided in place of the assigned version


class PointDistribution(Struct, frozen=True):
    """What a point was drawn from: (1 - ε) · T(N(mean, std²)) + ε · N(centre, σ²), both projected onto the box."""

    mean: list[float]  # of the raw action, before squash and projection
    std: list[float]
    low: list[float | None]
    high: list[float | None]
    epsilon: float
    sigma: list[float] | None


class ActResponse(Struct, frozen=True, omit_defaults=True):
    """One decision. Fields with null are sent, optional extras only when asked for."""

    decision_id: str
    policy: str
    assigned_version: str
    version: str
    role: str
    generation: int
    action: WireAction
    action_name: str | list[str] | None
    propensity: float | None
    propensity_reason: str | None
    explored: bool
    exploration: Exploration
    safety: Safety
    fallback: str | None
    logged: bool
    switched: bool = False
    state_reset: bool = False  # a recurrent version's memory did not fit the step, and was started anew
    propensity_kind: PropensityKind = "mass"  # otherwise `propensity` is null, and `log_propensity` the number
    log_propensity: float | None = None  # continuous actions only
    values: list[float] | None = None
    distribution: list[float | list[float]] | PointDistribution | None = None
    idempotency: Literal["local"] | None = None


class ActBatchResponse(Struct, frozen=True):
    """Columns in the order of `states`; a row that could not be decided stands in `errors` and is null elsewhere."""

    policy: str
    decision_id: list[str | None]
    assigned_version: list[str | None]
    version: list[str | None]
    role: list[str | None]
    generation: int
    action: list[WireAction | None]
    action_name: list[str | list[str] | None]
    propensity: list[float | None]
    propensity_reason: list[str | None]
    explored: list[bool | None]
    epsilon: list[float | None]
    overridden: list[bool | None]
    fallback: list[str | None]
    logged: list[bool | None]
    propensity_kind: list[PropensityKind | None]
    log_propensity: list[float | None]
    state_reset: list[bool | None]
    errors: list[Problem]


class RewardRequest(Struct, forbid_unknown_fields=True, frozen=True):
    """Reward one decision, or by `episode` (and `policy`, where several are loaded) a whole episode.

    `reward` may be left out where the policy's expression makes it of `metrics`.
    """

    decision_id: Annotated[str, Meta(max_length=256)] | None = None
    reward: float | None = None
    episode: Name | None = None
    policy: Name | None = None
    reward_id: Name | None = None
    final: bool = False
    next_state: Raw = msgspec.field(default_factory=Raw)
    terminated: bool = False
    truncated: bool = False
    executed: bool = True
    executed_action: Action | None = None
    metrics: dict[str, float] | None = None


class RewardBatchRequest(Struct, forbid_unknown_fields=True, frozen=True):
    rewards: list[RewardRequest]


Verdict = Literal["joined", "early", "late", "correction", "quarantined", "conflict", "accepted"]


class RewardResponse(Struct, frozen=True):
    """A reward that is durable, and what the join made of it.

    `joined`: it is the decision's reward, or a part of it. `early`: it waits for the decision's record, or for the end
    of its episode. `late`: kept on the late stream. `correction`: in time, but the default had left. `quarantined`:
    outside the policy's range. `accepted`: the join has not answered yet. `conflict`, in a batch only: another stands.
    """

    decision_id: str | None
    reward_id: str | None
    status: Verdict
    duplicate: bool = False
    episode: str | None = None
    reward: float | None = None  # as it was recorded


class RewardBatchResponse(Struct, frozen=True):
    results: list[RewardResponse]


class FieldError(Struct, frozen=True, omit_defaults=True):
    field: str
    detail: str
    line: int | None = None  # of a file that was sent, from 1
    column: int | None = None


class Problem(Struct, frozen=True, omit_defaults=True):
    """RFC 9457 problem details with a stable `code`, and `errors` naming each field."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    instance: str | None = None
    errors: list[FieldError] = []
    decision_id: str | None = None
    row: int | None = None
    check: str | None = None  # which check refused a bundle


_encoder = msgspec.json.Encoder()
_packer = msgspec.msgpack.Encoder()
_act = msgspec.json.Decoder(ActRequest)
_act_fields = msgspec.json.Decoder(ActFields)
_act_batch = msgspec.json.Decoder(ActBatchRequest)
_act_batch_fields = msgspec.json.Decoder(ActBatchFields)
_reward = msgspec.json.Decoder(RewardRequest)
_reward_batch = msgspec.json.Decoder(RewardBatchRequest)

T = TypeVar("T")
One = TypeVar("One", bound=ActFields)
Many = TypeVar("Many", bound=ActBatchFields)

_PATH = re.compile(r" - at (?:`key` in )?`\$(?P<path>[^`]*)`$")
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<name>[^`]*)`")
_MISSING = re.compile(r"^Object missing required field `(?P<name>[^`]*)`")


def complaint(error: msgspec.ValidationError, root: str = "") -> RequestError:
    """Translate msgspec's one-line complaint into the error tree, the field named as a path below `root`."""
    text = str(error)
    found = _PATH.search(text)
    path = root + (found["path"] if found else "")
    message = text[: found.start()] if found else text
    for pattern, kind in ((_UNKNOWN, UnknownField), (_MISSING, MissingField)):
        if named := pattern.match(message):
            return kind(message, f"{path}.{named['name']}".lstrip("."))
    return InvalidField(message, path.lstrip(".") or None)


def _decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise complaint(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _explain(body, error) from None


def _explain(body: bytes, error: Exception) -> RequestError:
    """Say why a body is not JSON; Python and JavaScript both write NaN and Infinity, so those are named."""
    if isinstance(error, RecursionError):
        return BadJson("the body is nested too deeply")
    try:
        lenient = json.loads(body)
    except (ValueError, RecursionError):
        return BadJson(str(error))
    field = next(_not_finite(lenient, ""), None)
    return NotFinite("NaN and Infinity are not accepted", field) if field else BadJson(str(error))


def _not_finite(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield path.lstrip(".")
    elif isinstance(value, dict):
        for name, element in value.items():
            yield from _not_finite(element, f"{path}.{name}")
    elif isinstance(value, list):
        for index, element in enumerate(value):
            yield from _not_finite(element, f"{path}[{index}]")


def _recordable(request: One) -> One:
    """Refuse a context that no record can hold: JSON's integers have no end, msgpack's have 64 bits."""
    if request.context is not None:
        _check_numbers(request.context, "context")
    return request


def _all_recordable(request: Many) -> Many:
    for index, context in enumerate(request.contexts or ()):
        if context is not None:
            _check_numbers(context, f"contexts[{index}]")
    return request


def _check_numbers(context: Context, field: str) -> None:
    try:
        _packer.encode(context)
    except OverflowError:
        raise InvalidField("an integer in it is below -2^63 or above 2^64 - 1: send it as a text", field) from None


def decode(body: bytes, kind: type[T]) -> T:
    """Decode a body that comes seldom. Raises what the hot routes' decoders raise, naming the field."""
    return _decode(msgspec.json.Decoder(kind), body)


def decode_act(body: bytes) -> ActRequest:
    return _recordable(_decode(_act, body))


def decode_act_fields(body: bytes) -> ActFields:
    return _recordable(_decode(_act_fields, body))


def decode_act_batch(body: bytes) -> ActBatchRequest:
    return _all_recordable(_decode(_act_batch, body))


def decode_act_batch_fields(body: bytes) -> ActBatchFields:
    return _all_recordable(_decode(_act_batch_fields, body))


def decode_reward(body: bytes) -> RewardRequest:
    return _decode(_reward, body)


def decode_reward_batch(body: bytes) -> RewardBatchRequest:
    return _decode(_reward_batch, body)


def encode(answer: Struct) -> bytes:
    return _encoder.encode(answer)
