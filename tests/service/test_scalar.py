"""Reward expressions: what is refused when one is set, and what a caller is told of metrics that do not fit."""

from __future__ import annotations

import pytest

from policies.errors import InvalidField, MissingField, NotFinite
from service.scalar import FIELD, Scalar


@pytest.mark.parametrize(
    ("source", "reward", "metrics", "value"),
    [
        ("metrics.revenue - 0.1 * metrics.latency_ms", None, {"revenue": 5.0, "latency_ms": 20.0}, 3.0),
        ("reward", 2.5, None, 2.5),
        ("reward * 2.0", 2.5, {}, 5.0),
        ("metrics.ok > 0.5 ? 1 : 0", None, {"ok": 1.0}, 1.0),
        ("has(metrics.bonus) ? metrics.bonus : 0.0", None, {"other": 1.0}, 0.0),
        ("has(metrics.bonus) ? metrics.bonus : 0.0", None, {"bonus": 4.0}, 4.0),
        ('metrics["a name"] + 1.0', None, {"a name": 1.0}, 2.0),
        ("reward == null ? metrics.a : reward", None, {"a": 7.0}, 7.0),
    ],
)
def test_an_expression_makes_one_number(
    source: str, reward: float | None, metrics: dict[str, float] | None, value: float
) -> None:
    assert Scalar.read(source).value(reward, metrics) == value


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("metrics.a +", "not CEL"),
        ("metrics.a + 1", "write 1.0"),
        ("metrics.a > 1.0", "not a number"),
        ("'text'", "not a number"),
        ("revenue * 2.0", "no 'revenue'"),
        ("metrics.a > 9.0 ? revenue : 1.0", "no 'revenue'"),
        ("pow(metrics.a, 2.0)", "no function 'pow'"),
        ("[1.0].map(a, [2.0].map(b, b))[0][0]", "macro within a macro"),
        ("1.0 " + "+ 1.0" * 2_000, "at most"),
        ("metrics.a @ 1.0", "@"),
    ],
)
def test_what_could_never_give_a_number_is_refused_when_it_is_set(source: str, words: str) -> None:
    with pytest.raises(InvalidField, match=words) as caught:
        Scalar.read(source)
    assert caught.value.field == FIELD


def test_what_fails_for_some_numbers_only_is_taken() -> None:
    assert Scalar.read("[1.0][int(metrics.at)]").value(None, {"at": 0.0}) == 1.0, (
        "it fails for 1.6, at which it is tried"
    )
    scalar = Scalar.read("[1.0, 2.0][int(metrics.at)]")
    assert scalar.value(None, {"at": 0.0}) == 1.0
    with pytest.raises(InvalidField, match="fails") as caught:
        scalar.value(None, {"at": 5.0})
    assert caught.value.field == "metrics"


def test_a_missing_metric_is_named() -> None:
    with pytest.raises(MissingField, match="'b'") as caught:
        Scalar.read("metrics.a + metrics.b").value(1.0, {"a": 1.0})
    assert caught.value.field == "metrics.b"


def test_a_missing_reward_is_named() -> None:
    with pytest.raises(MissingField) as caught:
        Scalar.read("reward + 1.0").value(None, {"a": 1.0})
    assert caught.value.field == "reward"


def test_infinities_are_refused() -> None:
    with pytest.raises(NotFinite) as caught:
        Scalar.read("metrics.a / metrics.b").value(None, {"a": 1.0, "b": 0.0})
    assert caught.value.field == "metrics"


def test_other_kinds_of_result_are_refused() -> None:
    with pytest.raises(InvalidField, match="no number"):
        Scalar.read("metrics.a > 1.9 ? dyn(true) : dyn(1.0)").value(None, {"a": 2.0})


def test_numbers_that_cannot_be_shown_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.scalar.view_of", lambda variables: None)
    with pytest.raises(InvalidField, match="cannot be shown"):
        Scalar("reward", (), True, None).value(1.0, {})  # type: ignore[arg-type]
