"""The `surefoot` command in this process, for tests: as a shell sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from service.cli import main


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Done]


def running(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Give what runs `surefoot …`, on 80 columns that are no terminal."""
    monkeypatch.setenv("COLUMNS", "80")

    def command(*arguments: object) -> Done:
        monkeypatch.setattr("sys.argv", ["surefoot", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return Done(int(caught.value.code or 0), *capsys.readouterr())

    return command
