"""`python -m loadtests.bench_gpu`: one bare session against the service, on CPU and on CUDA, by size of the batch.

    python -m loadtests.bench_gpu                        # CPU, and CUDA where there is one
    python -m loadtests.bench_gpu --quick                # a size of 1, 16 and 64, once
    python -m loadtests.bench_gpu --cpu --only small --json gpu.json

Duty: for three networks and batches of 1 to 1,024: a session in a bare loop (plain; with bound buffers; with CUDA
graphs) and Surefoot's `/v1/act/batch` on the same device, in turns; print a table, and what it ran on. It imports
nothing of the service.
Strategy: bare loop and server take turns on one core. States are sent as raw numbers, so that no JSON of images is
measured; the driver is wrk where it is installed, else `closed_loop.py`, which is said.
Promise: without CUDA it says so in a line and measures the CPU. Exit code 0, or 2 when something could not be measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess  # nvidia-smi is a program
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from loadtests import bodies, closed_loop, measuring, wrk
from loadtests.bare_session import WAYS, Bare, Device, NoCudaError, asker, open_session, version
from loadtests.cases import SUREFOOT
from loadtests.networks import NETWORKS, Network, model, states
from loadtests.options import add_place, read
from loadtests.report import number, table, with_spread
from loadtests.results import Row
from loadtests.servers import Running, running
from loadtests.workplace import Workplace, say, workplace

SIZES = tuple(2**i for i in range(11))
FULL = {"repetitions": 5, "seconds": 2.0}
QUICK = {"repetitions": 1, "seconds": 0.3}
QUICK_SIZES = (1, 16, 64)
CONNECTIONS = 4
BODY_BYTES = 64 * 2**20  # 1,024 images take 29 MB
SERVICE = "service"
# Between a session on the CPU and one on a GPU, without TF32.
TOLERANCE = 1e-2


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m loadtests.bench_gpu", description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--quick", action="store_true", help="three sizes, once: is everything in order?")
    made.add_argument("--cpu", action="store_true", help="leave CUDA out")
    made.add_argument("--only", action="append", default=[], choices=list(NETWORKS), help="a network")
    made.add_argument("--size", action="append", default=[], type=int, metavar="ROWS", help="default 1, 2, 4 … 1,024")
    made.add_argument("--repetitions", type=int, help=f"default {FULL['repetitions']}, quick {QUICK['repetitions']}")
    made.add_argument("--seconds", type=float, help=f"of each; default {FULL['seconds']:g}, quick {QUICK['seconds']:g}")
    add_place(made)
    return made


def main(arguments: Sequence[str]) -> int:
    """Run. Gives the exit code."""
    options = read(parser(), arguments, FULL, QUICK)
    options.size = options.size or list(QUICK_SIZES if options.quick else SIZES)
    devices = _devices(options)
    rows: dict[str, Row] = {}
    failures: list[str] = []
    with workplace(options.store, options.folder) as place:
        about = place.about | gpu() | {"onnxruntime": version(), "driver": "wrk" if shutil.which("wrk") else "asyncio"}
        for device in devices:
            for network in [NETWORKS[name] for name in options.only or NETWORKS]:
                try:
                    _measure(device, network, options, place, rows)
                except (RuntimeError, OSError) as error:
                    failures.append(f"{device}/{network.name}: {error}")
                    say(f"{device}/{network.name} could not be measured to its end: {error}")
    say("\n" + "\n".join(f"{name}: {value}" for name, value in about.items()))
    say(tables(devices, options.only or list(NETWORKS), options.size, rows))
    if options.json:
        written = [{"name": row.name, "repetitions": [dict(each) for each in row.samples]} for row in rows.values()]
        options.json.write_text(json.dumps({"machine": about, "rows": written, "failures": failures}, indent=1) + "\n")
    return 2 if failures else 0


def _devices(options: argparse.Namespace) -> list[Device]:
    if options.cpu:
        return ["cpu"]
    try:
        open_session(model(NETWORKS["small"]), "cuda")
    except NoCudaError as error:
        say(f"CUDA is left out: {error}")
        return ["cpu"]
    return ["cpu", "cuda"]


def gpu() -> dict[str, str]:
    """The GPU and its driver, as nvidia-smi names them; nothing where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"gpu": "none"}
    asked = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)  # noqa: S603  our own command
    return {"gpu": done.stdout.strip() or "none"}


def _measure(
    device: Device, network: Network, options: argparse.Namespace, place: Workplace, rows: dict[str, Row]
) -> None:
    """All sizes of one network on one device, the bare ways and the service in turns."""
    spec = replace(SUREFOOT, network=network.name, rules=0, device=device, max_body_bytes=BODY_BYTES)
    with running(spec, place.folder / f"{device}-{network.name}", place.cores) as server:
        for size in options.size:
            given = states(network, size)
            bare: dict[str, Bare] = {way: Bare(asker(model(network), device, way, given), size) for way in WAYS[device]}
            _agree(network, bare, given)
            for turn in range(options.repetitions):
                for way in (*bare, SERVICE) if turn % 2 == 0 else (SERVICE, *reversed(list(bare))):
                    if way == SERVICE:
                        per_s = _served(server, network, size, options.seconds, place.folder)
                    else:
                        per_s = _on(place.cores.server, bare[way], options.seconds)
                    named = name(device, network.name, way, size)
                    rows.setdefault(named, Row(named, "")).samples.append({"per_s": per_s})
            say(f"  {device}/{network.name}/{size}")


def name(device: str, network: str, way: str, size: int) -> str:
    return f"{device}-{network}/{way}/{size}"


def _on(core: int, bare: Bare, seconds: float) -> float:
    """Run a bare loop on the server's core, while nobody asks the server."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        bare.warm()
        return bare.measure(seconds)
    finally:
        os.sched_setaffinity(0, before)


def _agree(network: Network, bare: Mapping[str, Bare], given: Any) -> None:
    """See to it that all ways give the CPU's answers. Raises RuntimeError."""
    expected = asker(model(network), "cpu", "plain", given)()
    for way, each in bare.items():
        if not np.allclose(each.warm(), expected, rtol=TOLERANCE, atol=TOLERANCE):
            raise RuntimeError(f"{network.name}, {way}: other answers than on the CPU")


def _served(server: Running, network: Network, size: int, seconds: float, folder: Path) -> float:
    """Decisions a second by batches of this size."""
    asked = bodies.raw_batches(network, size)
    measuring.check(server, asked)
    if shutil.which("wrk"):
        script = wrk.write_script(folder, asked.path, asked.headers, asked.bodies)
        found = wrk.run(wrk.command(server.port, script, CONNECTIONS, seconds))
        if found.refused or found.failed:
            raise RuntimeError(f"{found.refused} requests were refused, {found.failed} failed, of {found.requests}")
        return found.per_s * size
    requests, calls = asked.requests() * CONNECTIONS, 0
    began_s = time.perf_counter()
    while (lasted_s := time.perf_counter() - began_s) < seconds or not calls:
        answers = closed_loop.ask(server.port, requests, CONNECTIONS)
        calls += sum(answer.status == 200 for answer in answers)
    return calls * size / max(lasted_s, 1e-9)


def tables(devices: Sequence[Device], networks: Sequence[str], sizes: Sequence[int], rows: Mapping[str, Row]) -> str:
    """For each device and network a line for each size: rows a second, and the service's share of the best bare way."""
    parts = []
    for device in devices:
        for network in networks:
            ways = [*WAYS[device], SERVICE]
            lines: list[Sequence[str]] = [["batch", *(f"{way}, rows/s" for way in ways), "service of the best", ""]]
            for size in sizes:
                found = {way: rows[named] for way in ways if (named := name(device, network, way, size)) in rows}
                if SERVICE in found:
                    lines.append([f"{size:,}", *(with_spread(found[way], "per_s") for way in ways), _share(found), ""])
            if len(lines) > 1:
                parts.append(f"\n{network} on {device}\n\n{table(lines)}")
    return "\n".join(parts)


def _share(found: Mapping[str, Row]) -> str:
    """The service over the fastest bare way, repetition by repetition."""
    ratios = [found[SERVICE].ratio(row) for way, row in found.items() if way != SERVICE]
    return number(min(ratio for ratio in ratios if ratio is not None))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
