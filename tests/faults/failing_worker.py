"""The service's worker, which kills itself at one exact point, or finds its disk failing. For `launcher.py`.

Duty: wrap functions of the service from outside, so that the product holds no test code. A name that is not there any
more raises at once: a point that is never reached would prove nothing.
Strategy: FAULT_PLAN names a folder. `plan.json` in it lists points; each worker dies at the next one that has no mark
yet, and leaves the mark right before its death. While `broken` is in the folder, the spool answers with an I/O error.

    {"point": "Spool.write", "when": "before" | "after", "nth": 3}
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import os
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service import adoption, lanes, ledger, redis_streams, shipper, spool, spool_file, worker, writer

FUNCTIONS: dict[str, Any] = {
    "Writer._commit": writer.Writer,
    "Spool.write": spool.Spool,
    "Spool.start_new_file": spool.Spool,
    "Spool.finish_file": spool.Spool,
    "Spool.expire": spool.Spool,
    "Spool._delete": spool.Spool,
    "Spool.reopen": spool.Spool,
    "SpoolFile.create": spool_file.SpoolFile,
    "SpoolFile.write": spool_file.SpoolFile,
    "SpoolFile.reopen": spool_file.SpoolFile,
    "SpoolFile.delete": spool_file.SpoolFile,
    "Ledger._committed": ledger.Ledger,
    "Lane.commit": lanes.Lane,
    "Lane.ack": lanes.Lane,
    "RedisStreams.ship": redis_streams.RedisStreams,
    "Adoption.look_around": adoption.Adoption,
}
STATEMENTS = ("BEGIN", "INSERT", "COMMIT")  # of the spool's transaction
LINGER_S = 0.02  # less than the shipper waits, which would ship what is not on disk
UNLINKS = ("unlink .db", "unlink .db-wal")  # in the middle of a file's deletion


def main(arguments: list[str]) -> int:
    folder = Path(os.environ["FAULT_PLAN"])
    _hasten()
    plan = json.loads((folder / "plan.json").read_text()) if (folder / "plan.json").exists() else []
    number = len(list(folder.glob("mark-*")))
    if number < len(plan):
        _arm(plan[number], lambda: _die(folder / f"mark-{number}"))
    _fail_while(folder / "broken")
    return worker.main(arguments)


def _hasten() -> None:
    """Small spool files, soon deleted, so that all of a file's life happens within seconds."""
    if os.environ.get("FAULT_HASTE"):
        defaults = ledger.Ledger.__init__.__kwdefaults__
        assert defaults is not None
        assert {"rotate_bytes", "keep_s"} <= defaults.keys()
        defaults.update(rotate_bytes=60_000, keep_s=0.0)
        assert shipper.TIDY_S > 0
        shipper.TIDY_S = 0.2  # type: ignore[misc,unused-ignore]


def _die(mark: Path) -> None:
    if threading.current_thread() is not threading.main_thread():
        threading.Event().wait(LINGER_S)  # the event loop goes on: an answer that is given too early gets out
    mark.touch()
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(point: dict[str, Any], die: Callable[[], None]) -> None:
    calls = itertools.count(1)

    def hit() -> None:
        if next(calls) == point["nth"]:
            die()

    name, before = point["point"], point["when"] == "before"
    if name in STATEMENTS:
        _arm_statement(name, before, hit)
    elif name in UNLINKS:
        _arm_unlink(name.removeprefix("unlink "), before, hit)
    else:
        _arm_function(FUNCTIONS[name], name.partition(".")[2], before, hit)


def _arm_function(owner: Any, name: str, before: bool, hit: Callable[[], None]) -> None:
    found = inspect.getattr_static(owner, name)
    inner = found.__func__ if isinstance(found, classmethod) else found

    @functools.wraps(inner)
    def wrapped(*args: Any, **options: Any) -> Any:
        if before:
            hit()
        result = inner(*args, **options)
        if not before:
            hit()
        return result

    @functools.wraps(inner)
    async def awaited(*args: Any, **options: Any) -> Any:
        if before:
            hit()
        result = await inner(*args, **options)
        if not before:
            hit()
        return result

    instead: Any = awaited if inspect.iscoroutinefunction(inner) else wrapped
    setattr(owner, name, classmethod(instead) if isinstance(found, classmethod) else instead)


def _arm_statement(name: str, before: bool, hit: Callable[[], None]) -> None:
    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            return self._do(sql, super().execute, *values)

        def executemany(self, sql: str, *values: Any) -> sqlite3.Cursor:
            return self._do(sql, super().executemany, *values)

        def _do(self, sql: str, call: Callable[..., sqlite3.Cursor], *values: Any) -> sqlite3.Cursor:
            here = sql.startswith(name)
            if here and before:
                hit()
            result = call(sql, *values)
            if here and not before:
                hit()
            return result

    real = sqlite3.connect
    sqlite3.connect = functools.partial(real, factory=Connection)  # type: ignore[assignment]


def _arm_unlink(suffix: str, before: bool, hit: Callable[[], None]) -> None:
    real = Path.unlink

    def unlink(self: Path, missing_ok: bool = False) -> None:
        here = self.name.endswith(suffix)
        if here and before:
            hit()
        real(self, missing_ok=missing_ok)
        if here and not before:
            hit()

    Path.unlink = unlink  # type: ignore[method-assign]


def _fail_while(flag: Path) -> None:
    for name in ("write", "create"):
        found = inspect.getattr_static(spool_file.SpoolFile, name)
        inner = found.__func__ if isinstance(found, classmethod) else found
        instead = _failing(inner, flag)
        setattr(spool_file.SpoolFile, name, classmethod(instead) if isinstance(found, classmethod) else instead)


def _failing(inner: Callable[..., Any], flag: Path) -> Any:
    @functools.wraps(inner)
    def failing(*args: Any, **options: Any) -> Any:
        if flag.exists():
            raise sqlite3.OperationalError("disk I/O error")
        return inner(*args, **options)

    return failing


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)
