"""Surefoot for applications and trainers: ask for actions, post rewards, read transitions.

`Client` and `AsyncClient` speak HTTP to the service; `transitions` reads a policy's stream in Redis as numpy batches.
Everything a user of the package needs is named in `__all__`; modules that are not imported here may change.
"""

from surefoot.batch import Batch
from surefoot.errors import Gap, Refused, Unreachable, Unreadable
from surefoot.streams import transitions

__all__ = ["Batch", "Gap", "Refused", "Unreachable", "Unreadable", "transitions"]
