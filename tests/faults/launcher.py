"""`surefoot serve`, with `failing_worker.py` in place of its worker, restarted without a pause."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from service import crew, supervisor
from service.cli import main

LAUNCH = (sys.executable, "-m", "tests.faults.launcher", "serve")
WORKER = "service.worker"


class Popen(subprocess.Popen[bytes]):
    def __init__(self, command: list[str], **options: Any) -> None:
        super().__init__(["tests.faults.failing_worker" if each == WORKER else each for each in command], **options)


if __name__ == "__main__":
    assert supervisor.RESTART_PAUSE_S > 0
    supervisor.RESTART_PAUSE_S = 0.05  # type: ignore[misc,unused-ignore]
    assert crew.STEADY_S > 0
    crew.STEADY_S = 0  # type: ignore[misc,unused-ignore]
    subprocess.Popen = Popen  # type: ignore[assignment,misc]
    main()
