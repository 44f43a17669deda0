"""The rules of a `safety.yaml`, as they are written. Pure.

Duty: one frozen struct for each kind; `document.py` reads them, the file named after a kind says what it allows.
A rule knows nothing of a policy's spaces until it is bound to them (`document.bind`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

Mode = Literal["enforce", "monitor"]
Instead = Literal["fallback", "baseline"]  # who answers in place of the version
Per = Literal["key", "policy"]
# Where a count is kept. `shared`: in Redis, for all replicas: a key's own past takes one round trip per batch, a
# policy's is leased in portions and may deny early. `strict`: a round trip per batch for a policy's too. `local`: each
# replica counts alone, so that R replicas may together execute R times the limit.
Scope = Literal["shared", "strict", "local"]

# Python's `$` alone would take a name that ends in a line break.
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}(?!\n)$")]
Choice = int | str  # of one factor
Positive = Annotated[float, Meta(gt=0)]
Seconds = Annotated[float, Meta(gt=0, le=31 * 86_400)]
Actions = Annotated[list[Choice], Meta(min_length=1)]


class Base(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, tag_field="kind"):
    """What all kinds have.

    reason: shown to callers. mode: a rule that monitors is evaluated and counted, and changes nothing.
    on_empty: who answers when this rule is among those that left nothing; None: what the document says.
    except_fallback: the rule may forbid the declared fallback, which is then executed all the same.
    """

    name: Name
    reason: str = ""
    mode: Mode = "enforce"
    on_empty: Instead | None = None
    except_fallback: bool = False


class Forbid(Base, frozen=True, kw_only=True, tag="forbid"):
    """`when` is CEL over `state`, `context` and `action`: where it is true, or fails, the action is forbidden.

    In CEL `state` is a map by feature name (a list where features have no names), `context` the request's map, `action`
    a map {index, name} for choices, {name-of-factor: {index, name}} for several factors. factor: the rule is about this
    factor alone, and `action` is {index, name}. For continuous actions `when` forbids all, and cannot name `action`.
    """

    when: Annotated[str, Meta(min_length=1, max_length=4_096)]
    factor: str | None = None


class Bounds(Base, frozen=True, kw_only=True, tag="bounds"):
    """Continuous actions stay within low and high, null where open. `when` is CEL: it holds where true, or failing."""

    low: list[float | None] | None = None
    high: list[float | None] | None = None
    when: Annotated[str, Meta(min_length=1, max_length=4_096)] | None = None


class MaxStep(Base, frozen=True, kw_only=True, tag="max_step"):
    """The largest change from the key's last executed action.

    limit: one number or one for each coordinate. values: for choices, what each is worth (by name or in order).
    initial: the action that counts as last where there is none; without it such a row falls back.
    """

    limit: Positive | list[Positive]
    values: dict[str, float] | list[float] | None = None
    initial: Choice | float | list[float] | None = None
    factor: str | None = None
    scope: Literal["shared", "local"] = "shared"


class Rate(Base, frozen=True, kw_only=True, tag="rate"):
    """At most `limit` executions of these actions in any `window_s` seconds, for each key or the whole policy."""

    actions: Actions
    limit: Annotated[int, Meta(ge=1, le=1_000_000)]
    window_s: Seconds
    per: Per = "key"
    factor: str | None = None
    scope: Scope = "shared"


class Cooldown(Base, frozen=True, kw_only=True, tag="cooldown"):
    """None of these actions for `seconds` after one of `after` (by default: of themselves) was executed."""

    actions: Actions
    seconds: Seconds
    after: Actions | None = None
    per: Per = "key"
    factor: str | None = None
    scope: Scope = "shared"


class Cost(Base, frozen=True, kw_only=True, tag="cost"):
    """The summed cost of executed actions in `window_s` seconds stays at or below `cap`. Actions not named cost 0."""

    costs: Annotated[dict[str, Annotated[float, Meta(ge=0)]], Meta(min_length=1)]
    cap: Positive
    window_s: Seconds
    per: Per = "key"
    factor: str | None = None
    scope: Scope = "shared"


class Support(Base, frozen=True, kw_only=True, tag="support"):
    """States outside what the version was trained on are not for it.

    by: `range` is low and high of the manifest's features; `quantiles` the manifest's lowest and highest quantile.
    margin: by how much of the width a feature may lie outside. max_outside: how many features may lie outside that.
    max_distance: largest mean distance of the features from their middle, in half widths.
    """

    by: Literal["range", "quantiles"] = "range"
    margin: Annotated[float, Meta(ge=0)] = 0.0
    max_outside: Annotated[int, Meta(ge=0)] = 0
    max_distance: Positive | None = None
    then: Instead = "fallback"


class Confidence(Base, frozen=True, kw_only=True, tag="confidence"):
    """The baseline answers where the version is unsure: its two best values lie closer than `min_gap`, or its
    distribution's entropy is above `max_entropy` nats.
    """

    min_gap: Positive | None = None
    max_entropy: Positive | None = None
    then: Instead = "baseline"


class ExploreOnly(Base, frozen=True, kw_only=True, tag="explore_only"):
    """Exploration draws among these actions only."""

    actions: Actions
    factor: str | None = None


class NeverExplore(Base, frozen=True, kw_only=True, tag="never_explore"):
    """Exploration never draws these actions; the version itself still may."""

    actions: Actions
    factor: str | None = None


Rule = Forbid | Bounds | MaxStep | Rate | Cooldown | Cost | Support | Confidence | ExploreOnly | NeverExplore


class Rules(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """`safety.yaml`, as it is written."""

    schema: Literal[1]
    policy: Name
    on_empty: Instead = "fallback"
    rules: list[Rule] = []
    description: str = ""
