"""docs/propensity.md, recomputed: every number on the page is what the deciding functions give."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import pytest

import safety
from policies import continuous
from policies.continuous import Transform
from policies.draw import Drawn, draw
from policies.explore import behave, masked_mass, softmax_weights
from policies.heads import target
from policies.types import Floats

PAGE = (Path(safety.__file__).parent.parent / "docs" / "propensity.md").read_text()
NAMES = ["down_2", "down_1", "hold", "up_1", "up_2"]
MASK = np.array([[False, False, True, True, False]])
HOLD = np.array([NAMES.index("hold")])
DIGITS = 5.1e-5  # half of the last digit shown


def table(*heading: str) -> list[list[str]]:
    """The cells of the page's table with this heading."""
    start = "| " + " | ".join(heading) + " |\n|" + "---|" * len(heading) + "\n"
    (rest,) = PAGE.split(start)[1:]
    body = re.match(r"(\|.*\|\n)+", rest)
    assert body
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in body[0].splitlines()]


def numbers(cells: list[list[str]], column: int) -> list[float]:
    return [float(row[column]) for row in cells]


Q = np.array([numbers(table("action", "q"), 1)])


def column(values: Floats) -> object:
    return pytest.approx(values[0].tolist(), abs=DIGITS)


@pytest.mark.parametrize(
    ("name", "third", "temperature", "by_value"),
    [("greedy", "U(M)", None, None), ("softmax", "U(M)", 0.5, None), ("exploring", "X", None, 1.0)],
)
def test_the_distributions_over_choices(
    name: str, third: str, temperature: float | None, by_value: float | None
) -> None:
    cells = table(name, "π", "π_M", third, "b")
    assert [row[0] for row in cells] == NAMES
    wanted = target(Q, "q_values", temperature)
    weights = None if by_value is None else softmax_weights(wanted, MASK, np.array([by_value]))
    behaviour = behave(wanted, MASK, np.array([0.05]), HOLD, weights)
    for at, values in enumerate((wanted.distribution, behaviour.own, behaviour.exploring, behaviour.probabilities), 1):
        assert numbers(cells, at) == column(values)


def drawn(
    epsilon: float, *, q: Floats = Q, mask: npt.NDArray[np.bool_] = MASK, temperature: float | None = None
) -> Drawn:
    behaviour = behave(target(q, "q_values", temperature), mask, np.array([epsilon]), HOLD)
    return draw(behaviour, np.array([[0.5, 0.5]]))


def test_the_example_of_the_first_section() -> None:
    for u in (0.5, 0.01):  # its own part, and the exploring one, which draws up_1 above a half
        found = draw(behave(target(Q, "q_values"), MASK, np.array([0.05]), HOLD), np.array([[u, 0.7]]))
        assert (NAMES[found.actions[0, 0]], found.propensity[0]) == ("up_1", pytest.approx(0.975))
        assert found.explored[0] == (u < 0.05)
    assert masked_mass(target(Q, "q_values"), MASK)[0] == 1.0
    (shown,) = re.findall(r"114\.120, so `masked_mass` is 1 - 43\.987 / 114\.120 = (\S+)\.$", PAGE, re.MULTILINE)
    assert masked_mass(target(Q, "q_values", 0.5), MASK)[0] == pytest.approx(float(shown), abs=DIGITS)


def test_zero_strength_and_the_fallback() -> None:
    cells = table("case", "ε in force", "drawn", "propensity", "fallback")
    cases = [
        drawn(0.0),
        drawn(0.0, temperature=0.5),
        drawn(0.05, mask=np.zeros((1, 5), np.bool_)),
        drawn(0.05, q=Q * np.nan),
    ]
    for row, found in zip(cells, cases, strict=True):
        assert (float(row[1]), row[2]) == (0.0, NAMES[found.actions[0, 0]])
        assert found.propensity[0] == pytest.approx(float(row[3]), abs=DIGITS)
        assert not found.explored[0]
        assert (row[4] == "yes") == (row[2] == "hold")


def test_several_factors() -> None:
    cells = table("where, size", "b", "product of the marginals")
    named = {"near": 0, "far": 1, "small": 0, "large": 1}
    scores = target(np.array([[1.0, 0.0, 0.0, 1.0]]), "q_values", nvec=(2, 2))
    behaviour = behave(scores, np.ones((1, 4), np.bool_), np.array([0.05]), np.zeros((1, 2), np.int64))
    for row in cells:
        where, size = (named[word] for word in row[0].split(", "))
        u = [[0.01, 0.25 + 0.5 * where, 0.25 + 0.5 * size]]  # the exploring part draws any pair
        found = draw(behaviour, np.array(u))
        assert found.actions[0].tolist() == [where, size]
        assert found.propensity[0] == pytest.approx(float(row[1]), abs=1e-9)
        marginals = behaviour.probabilities[0, where] * behaviour.probabilities[0, 2 + size]
        assert marginals == pytest.approx(float(row[2]), abs=1e-9)


LOW, HIGH, MEAN, STD, SIGMA = 0.2, 0.95, 0.9, 0.1, 0.2


def point(at: list[float], *, epsilon: float = 0.1, std: float = STD) -> tuple[float, str, list[float]]:
    """log b, its kind and the point, of the draw by the exploring part that gives `at`."""
    size = len(at)
    behaviour = continuous.behave(
        continuous.Gaussian(np.full((1, size), MEAN), np.full((1, size), std), np.array([False])),
        Transform("none", np.zeros(size), np.ones(size)),
        (np.full((1, size), LOW), np.full((1, size), HIGH)),
        np.array([epsilon]),
        np.full(size, SIGMA),
        np.zeros((1, size)),
    )
    beyond = [value + (value == HIGH) for value in at]
    u = [normal_cdf((value - MEAN) / SIGMA) for value in beyond]
    found = continuous.draw(behaviour, np.array([[0.0 if epsilon else 0.5, *u]]))
    return float(found.log_propensity[0]), found.kinds[0], found.actions[0].tolist()


def normal_cdf(z: float) -> float:
    return min(NormalDist().cdf(z), 1.0 - 1e-12)


def test_points() -> None:
    cells = table("a", "own part", "exploring part", "b(a)", "log b(a)", "kind")
    assert len(cells) == 3
    for row in cells:
        at = [float(value) for value in row[0].split(", ")]
        log_b, kind, action = point(at)
        assert action == pytest.approx(at)
        assert kind == row[5]
        assert float(row[4]) == pytest.approx(log_b, abs=DIGITS)
        assert float(row[3]) == pytest.approx(np.exp(log_b), abs=DIGITS)
        own, exploring = point_of_part(at, 1e-12), point_of_part(at, 1.0)
        assert [float(row[1]), float(row[2])] == pytest.approx([own, exploring], abs=DIGITS)


def point_of_part(at: list[float], epsilon: float) -> float:
    return float(np.exp(point(at, epsilon=epsilon)[0]))


def test_ends_and_what_lies_between_add_up_to_one() -> None:
    shown = {row[0]: float(row[1]) for row in table("where", "b")}
    low, high = (float(np.exp(point([end])[0])) for end in (LOW - 1.0, HIGH))
    inside = np.linspace(LOW, HIGH, 2_002)[1:-1]
    between = float(np.mean([np.exp(point([a])[0]) for a in inside])) * (HIGH - LOW)
    assert low + between + high == pytest.approx(1.0, abs=1e-3)
    assert shown == {
        "low end": pytest.approx(low, abs=DIGITS),
        "between": pytest.approx(1.0 - low - high, abs=DIGITS),
        "high end": pytest.approx(high, abs=DIGITS),
    }


def test_a_deterministic_head() -> None:
    for value, b, kind in table("a", "b(a)", "kind"):
        log_b, found, _ = point([float(value)], std=0.0)
        assert kind == found
        assert float(b) == pytest.approx(np.exp(log_b), abs=DIGITS)
    log_b, found, action = point([0.9], epsilon=0.0, std=0.0)
    assert (log_b, found, action) == (0.0, "mass", [MEAN])
