"""EDGE: what libraries load at a start and this program never uses. Standard library only: it comes first.

Duty: `begin` before the first import of a library, `end` behind the last. It knows nothing of who starts.
Strategy: a library that can do without an optional package is told that it is not there. Collections of garbage would
look at all that was loaded so far again and again, to find nothing: none is made meanwhile, and what was loaded is
never looked at again, by this process or one forked from it.
Promise: after `end` everything can be imported; what was imported before works as if the optional packages had not
been installed. It counts for the whole process, so only one that is the service's own calls it.
"""

from __future__ import annotations

import gc
import sys
from types import ModuleType

# A worker's imports take 0.67 s of a core with all that is done here, and 0.92 s without.
# Optional for who imports them: structlog draws tracebacks with the first, redis measures itself with the second,
# FastAPI checks e-mail addresses with the third.
ABSENT = ("rich", "opentelemetry.sdk.metrics", "email_validator")
# The CEL library imports its own command line, and with that an editor and colours for terminals.
EMPTY = ("cel.cli",)


def begin() -> None:
    """Make these modules absent, and look for no garbage."""
    gc.disable()
    for name in ABSENT:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # how Python notes that there is no such module
    for name in EMPTY:
        sys.modules.setdefault(name, ModuleType(name))


def end() -> None:
    """Take everything back but what was saved."""
    for name in ABSENT:
        if name in sys.modules and sys.modules[name] is None:
            del sys.modules[name]
    for name in EMPTY:
        if name in sys.modules and not hasattr(sys.modules[name], "__file__"):
            del sys.modules[name]
    gc.freeze()
    gc.enable()
