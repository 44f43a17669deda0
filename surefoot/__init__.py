"""Surefoot for applications and trainers: ask for actions, post rewards, read transitions.

`Client` and `AsyncClient` speak HTTP to the service; `transitions` reads a policy's stream in Redis as numpy
batches, `corrections` what has to be changed in them.
Everything a user of the package needs is named in `__all__`; what is not may change.
"""

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
