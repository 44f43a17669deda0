"""From what a caller measured to the one number that is learnt from: a policy's reward expression. Pure.

Duty: check `reward.expression` of a deployment (CEL over `reward` and `metrics`) when it is set, and evaluate it for
each reward as it is accepted. What was sent is recorded beside it, so an expression may change without its callers.
Strategy: the language, its limits and its library are those of safety rules (`safety/expression.py`); other variables.
Promise: a result is a finite number, or an error that names the metric at fault.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from policies.errors import InvalidField, MissingField, NotFinite, RequestError, SafetyError
from safety.expression import CALLS, METHODS, MOST_CHARACTERS, TYPES, Program, let_through, program, view_of
from safety.tokens import MACROS, Token, functions, macros, tokenize, uses

FIELD = "reward.expression"
VARIABLES = frozenset({"reward", "metrics"})


@dataclass(frozen=True, slots=True)
class Scalar:
    """A compiled expression, and the metrics that it names."""

    source: str
    metrics: tuple[str, ...]
    takes_reward: bool
    _program: Program

    @classmethod
    def read(cls, source: str) -> Scalar:
        """Check and compile. Raises InvalidField."""
        if len(source) > MOST_CHARACTERS:
            raise InvalidField(f"an expression has at most {MOST_CHARACTERS} characters", FIELD)
        try:
            tokens = tokenize(source)
            compiled = program(source)
        except (SafetyError, ValueError) as error:
            raise InvalidField(str(error), FIELD) from None
        fault = _fault(tokens)
        if fault is not None:
            raise InvalidField(fault, FIELD)
        named = {use.path[0] for use in uses(tokens) if use.variable == "metrics" and use.path}
        found = cls(source, tuple(sorted(named)), any(use.variable == "reward" for use in uses(tokens)), compiled)
        found._try()
        return found

    def value(self, reward: float | None, metrics: Mapping[str, float] | None) -> float:
        """Evaluate. Raises MissingField, InvalidField or NotFinite, naming what the caller should send."""
        given = metrics or {}
        try:
            result = self._run(reward, given)
        except BaseException as error:
            let_through(error)
            raise self._complaint(reward, given, error) from None
        if isinstance(result, bool) or not isinstance(result, int | float):
            raise InvalidField(f"the policy's reward expression gives {result!r}, which is no number", "metrics")
        if not math.isfinite(result):
            raise NotFinite("the policy's reward expression gives no finite number for these", "metrics")
        return float(result)

    def _run(self, reward: float | None, metrics: Mapping[str, float]) -> object:
        view = view_of({"reward": reward, "metrics": dict(metrics)})
        if view is None:
            raise ValueError("these metrics cannot be shown to an expression")
        return self._program.execute(view)

    def _complaint(self, reward: float | None, metrics: Mapping[str, float], error: BaseException) -> RequestError:
        missing = [name for name in self.metrics if name not in metrics]
        if missing:
            detail = f"the policy's reward expression needs the metric {missing[0]!r}"
            return MissingField(detail, f"metrics.{missing[0]}")
        if self.takes_reward and reward is None:
            return MissingField("the policy's reward expression needs a reward", "reward")
        return InvalidField(f"the policy's reward expression fails: {error}", "metrics")

    def _try(self) -> None:
        """Refuse what fails whatever the numbers are: mixed types, a result that is no number."""
        numbers = {name: 1.0 + math.modf(0.6180339887 * k)[0] for k, name in enumerate(self.metrics, 1)}
        try:
            result = self._run(1.5, numbers)
        except (TypeError, RuntimeError) as error:
            raise InvalidField(f"{error}; metrics are doubles: write 1.0, not 1", FIELD) from None
        except BaseException as error:
            let_through(error)
            return  # depends on the values
        if isinstance(result, bool) or not isinstance(result, int | float):
            raise InvalidField(f"this is {result!r}, not a number", FIELD)


def _fault(tokens: tuple[Token, ...]) -> str | None:
    bound = {variable for variable, _ in macros(tokens)}
    unknown = sorted({use.variable for use in uses(tokens)} - VARIABLES - TYPES - bound)
    if unknown:
        return f"there is no {unknown[0]!r}; a reward expression reads `reward` and `metrics`"
    if any(within for _, within in macros(tokens)):
        return "a macro within a macro can take very long"
    unknown = sorted(set(functions(tokens)) - CALLS - METHODS - MACROS)
    return f"there is no function {unknown[0]!r}; known: {', '.join(sorted(CALLS | METHODS))}" if unknown else None
