"""wrk, as a library: closed-loop throughput over kept connections.

Duty: find the program, write its script, run it, read what it says. wrk waits for each answer before it asks again on a
connection, so its latencies leave out the waiting of an overloaded server; use `open_loop.py` for those.
Strategy: whole requests are made before the first is sent; the script hands them out in turns and prints one line that
a machine reads.
"""

from __future__ import annotations

import json
import shutil
import subprocess  # wrk is a program
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MISSING = (
    "wrk is not installed, and throughput is measured with it. Install it with `apt-get install wrk` (Debian, Ubuntu), "
    "`dnf install wrk` (Fedora) or `brew install wrk` (macOS)."
)
MARK = "RESULT "
SCRIPT = """local sizes, requests, at = {%(sizes)s}, {}, 0
local file = io.open("%(bodies)s", "rb")
local bytes = file:read("*a")
file:close()
%(headers)s
function init(arguments)
  local first = 1
  for i, size in ipairs(sizes) do
    requests[i] = wrk.format("POST", "%(path)s", nil, bytes:sub(first, first + size - 1))
    first = first + size
  end
end
function request()
  at = at %% #requests + 1
  return requests[at]
end
function done(summary, latency, _)
  local e = summary.errors
  io.write(string.format('RESULT {"requests": %%d, "duration_us": %%d, "refused": %%d, "failed": %%d, ' ..
    '"p50_us": %%d, "p99_us": %%d, "p999_us": %%d}\\n', summary.requests, summary.duration, e.status,
    e.connect + e.read + e.write + e.timeout, latency:percentile(50), latency:percentile(99), latency:percentile(99.9)))
end
"""


class WrkMissingError(Exception):
    """wrk is not installed. Install it, as the text says."""


@dataclass(frozen=True, slots=True)
class Throughput:
    """What wrk counted. refused: answers of 400 and above; failed: broken connections and timeouts."""

    requests: int
    duration_us: int
    refused: int
    failed: int
    p50_us: int
    p99_us: int
    p999_us: int

    @property
    def per_s(self) -> float:
        return (self.requests - self.refused) / self.duration_us * 1e6


def find() -> str:
    """Give wrk's path. Raises WrkMissingError."""
    found = shutil.which("wrk")
    if found is None:
        raise WrkMissingError(MISSING)
    return found


def write_script(folder: Path, path: str, headers: Mapping[str, str], bodies: Sequence[bytes]) -> Path:
    """Write the script and the bodies that it hands out."""
    (folder / "bodies").write_bytes(b"".join(bodies))
    script = folder / "wrk.lua"
    lines = [f"wrk.headers[{json.dumps(name)}] = {json.dumps(value)}" for name, value in headers.items()]
    sizes = ", ".join(str(len(body)) for body in bodies)
    script.write_text(SCRIPT % {"sizes": sizes, "bodies": folder / "bodies", "headers": "\n".join(lines), "path": path})
    return script


def command(port: int, script: Path, connections: int, seconds: float) -> list[str]:
    """Give the command that drives a server; wrk knows whole seconds."""
    lasting = f"{max(1, round(seconds))}s"
    url = f"http://127.0.0.1:{port}"
    return [find(), "--threads", "1", "--connections", str(connections), "--duration", lasting, "-s", str(script), url]


def run(command: Sequence[str]) -> Throughput:
    """Run wrk to its end. Raises RuntimeError with what it said, when it says nothing that can be read."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  our own command
    return read(done.stdout, done.stderr)


def read(output: str, complaint: str = "") -> Throughput:
    """Find the script's line in what wrk printed."""
    for line in output.splitlines():
        if line.startswith(MARK):
            return Throughput(**json.loads(line.removeprefix(MARK)))
    raise RuntimeError(f"wrk gave no figures: {complaint or output}")
