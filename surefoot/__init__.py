"""Surefoot for applications and trainers: ask for actions, post rewards, read transitions.

`Client` and `AsyncClient` speak HTTP to the service; `transitions` reads a policy's stream in Redis as numpy
batches, `corrections` what has to be changed in them.
Everything a user of the package needs is named in `__all__`; what is not may change.
The package is loaded at the first use of one of these names (PEP 562): the service reads its Redis URL with one small
module of it, and a start should not wait for HTTP clients and numpy for that.
"""

import importlib
import sys
import types
import typing

if typing.TYPE_CHECKING:
    from surefoot.answers import BatchDecisions, Decision, PointDistribution, RewardReceipt
    from surefoot.async_client import AsyncClient
    from surefoot.batch import Batch
    from surefoot.client import Client
    from surefoot.corrections import Correction, Corrections, corrections
    from surefoot.errors import (
        ApiError,
        BodyTooLarge,
        DecisionExpired,
        FieldProblem,
        Gap,
        InvalidField,
        KeyInUse,
        KeyReused,
        MissingField,
        NoSafeAction,
        NotFinite,
        Refused,
        RewardConflict,
        SurefootError,
        Unauthorized,
        Unavailable,
        UnknownAction,
        UnknownDecision,
        UnknownField,
        UnknownPolicy,
        Unreachable,
        Unreadable,
    )
    from surefoot.estimate import Estimate, behind_masks, estimate, evaluate
    from surefoot.points import log_prob
    from surefoot.streams import AsyncTransitions, Transitions, transitions, transitions_async

__all__ = [
    "ApiError",
    "AsyncClient",
    "AsyncTransitions",
    "Batch",
    "BatchDecisions",
    "BodyTooLarge",
    "Client",
    "Correction",
    "Corrections",
    "Decision",
    "DecisionExpired",
    "Estimate",
    "FieldProblem",
    "Gap",
    "InvalidField",
    "KeyInUse",
    "KeyReused",
    "MissingField",
    "NoSafeAction",
    "NotFinite",
    "PointDistribution",
    "Refused",
    "RewardConflict",
    "RewardReceipt",
    "SurefootError",
    "Transitions",
    "Unauthorized",
    "Unavailable",
    "UnknownAction",
    "UnknownDecision",
    "UnknownField",
    "UnknownPolicy",
    "Unreachable",
    "Unreadable",
    "behind_masks",
    "corrections",
    "estimate",
    "evaluate",
    "log_prob",
    "transitions",
    "transitions_async",
]

# Where these names come from.
_HOMES = ("errors", "answers", "async_client", "batch", "client", "corrections", "estimate", "points", "streams")


class _Package(types.ModuleType):
    """This package. A module of it that is imported does not take the place of the function of the same name."""

    def __setattr__(self, name: str, value: typing.Any) -> None:
        if not (isinstance(value, types.ModuleType) and name in __all__):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package

if not typing.TYPE_CHECKING:  # a checker knows every name; with this it would believe in all others, too

    def __getattr__(name: str) -> typing.Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        for home in _HOMES:
            found = vars(importlib.import_module(f"{__name__}.{home}"))
            globals().update({each: found[each] for each in __all__ if each in found})
        return globals()[name]
