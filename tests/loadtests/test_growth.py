"""Growth: its figures as arithmetic, its plots as files, its sizes as the service itself counts them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from loadtests import bodies, closed_loop, filling, plots, processes
from loadtests.cases import EMPTY
from loadtests.growth_cases import SERIES, Series, chosen
from loadtests.growth_figures import FLAT, Growth, findings, growth_table, slope
from loadtests.networks import SMALL
from loadtests.processes import Cores
from loadtests.report import verdicts_table
from loadtests.results import Row
from loadtests.servers import running

ROOT = Path(__file__).parents[2]
CORES = Cores.among(os.sched_getaffinity(0))
BY_KIND = {each.kind: each for each in SERIES}
MACHINE = {"processor": "A processor", "cores": 2, "python": "3.11", "began": "2026-01-01T00:00:00Z"}


def grown(kind: str, points: dict[int, list[dict[str, float]]]) -> Growth:
    series = next(each for each in SERIES if each.kind == kind)
    rows = {series.name(size): Row(series.name(size), "", list(samples)) for size, samples in points.items()}
    return Growth.of(series, sorted(points), rows)


def cpu(*figures: float) -> list[dict[str, float]]:
    return [{"cpu_us": each} for each in figures]


def test_a_point_is_held_against_the_smallest_of_its_repetition() -> None:
    """The machine is ten times as slow in the second repetition, and meets both."""
    growth = grown("versions", {1: cpu(100, 1000, 100), 100: cpu(105, 1050, 130)})
    assert growth.relative("cpu_us") == {1: 1.0, 100: 1.05}
    assert growth.more("cpu_us") == {1: 0.0, 100: 30.0}
    assert growth.repetitions("cpu_us")[3:] == [(100, 1.05), (100, 1.05), (100, 1.3)]


@pytest.mark.parametrize(("large", "flat"), [(100 * FLAT, True), (100 * FLAT + 0.1, False)])
def test_flat_is_what_stays_within_a_tenth(large: float, flat: bool) -> None:
    (found,) = findings(grown("versions", {1: cpu(100), 10: cpu(500), 100: cpu(large)}))
    assert found.reached is flat, "the largest point decides"


@pytest.mark.parametrize(("times", "reached"), [(1.99, True), (2.01, False)])
def test_valkeys_part_may_grow_as_the_logarithm(times: float, reached: bool) -> None:
    def sample(store: float) -> list[dict[str, float]]:
        return [{"cpu_us": 100.0, "store_cpu_us": store, "reward_us": 30.0, "reward_store_us": store}]

    found = findings(grown("pending", {10**3: sample(10.0), 10**6: sample(10.0 * times)}))
    assert [each.reached for each in found] == [True, reached, reached]
    assert "1,000,000 pending decisions against 1,000" in found[1].what


@pytest.mark.parametrize(("price", "reached"), [(5.0, True), (5.1, False)])
def test_a_rules_price_is_the_slope(price: float, reached: bool) -> None:
    each, bend = findings(grown("rules", {n: cpu(100 + price * n) for n in (0, 5, 10, 20, 35, 50)}))
    assert each.found == pytest.approx(price)
    assert each.reached is reached
    assert bend.found == pytest.approx(1.0)
    assert bend.reached is True


def test_rules_that_cost_the_more_the_more_there_are_are_not_linear() -> None:
    each, bend = findings(grown("rules", {n: cpu(100 + 0.05 * n * n) for n in (0, 5, 10, 20, 35, 50)}))
    assert each.reached is True
    assert bend.reached is False


def test_one_point_alone_says_nothing() -> None:
    assert [each.reached for each in findings(grown("rules", {20: cpu(100)}))] == [None]
    assert [each.reached for each in findings(grown("versions", {1: cpu(100)}))] == [None]
    with pytest.raises(ValueError, match="two data points"):
        slope([(1.0, 1.0)])


def test_tables_name_units_times_and_what_speaks_against_a_point() -> None:
    growth = grown("keys", {100: cpu(80, 120), 1000: [{"cpu_us": 100.0, "fell back": 3.0, "elsewhere": 0.5}] * 2})
    shown = growth_table(growth)
    assert "service, a decision, µs" in shown
    assert "100 ±20%" in shown
    assert "6 fell back; BUSY: others took 0.5 cores" in shown
    assert "FAIL" in verdicts_table("growth", findings(grown("versions", {1: cpu(100), 100: cpu(200)})))


def test_series_and_sizes_are_chosen() -> None:
    assert [each.kind for each, _ in chosen([])] == ["versions", "rules", "pending", "keys"]
    assert chosen(["pending"], largest=10**4) == [(BY_KIND["pending"], [10**3, 10**4])]
    assert max(chosen([])[2][1]) == 10**6
    assert all(sizes == list(each.quick) for each, sizes in chosen([], quick=True))
    with pytest.raises(ValueError, match="rule is no series; there are versions, rules"):
        chosen(["rule"])


@pytest.mark.parametrize("kind", BY_KIND)
def test_a_plot_names_axes_units_machine_and_command_and_fits_any_page(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("pygal", exc_type=ImportError)
    sample = {"cpu_us": 100.0, "store_cpu_us": 30.0}
    growth = grown(kind, {size: [sample, sample] for size in BY_KIND[kind].sizes})  # type: ignore[index]
    below = plots.caption({"machine": MACHINE, "command": "python -m loadtests.growth"})
    path = plots.draw(growth, below, tmp_path)
    first = path.read_bytes()
    root = ElementTree.fromstring(first)
    text = " ".join("".join(each.itertext()) for each in root.iter() if each.tag.endswith("text"))
    for wanted in (growth.series.axis, "A processor, 2 cores", "python -m loadtests.growth", "service, a decision"):
        assert wanted in text
    assert "µs" in text if kind == "rules" else "times that at" in text
    assert "background-color: transparent" in first.decode()
    assert not [each for each in root.iter() if each.tag.endswith("script")], "no script runs in a page's picture"
    assert plots.draw(growth, below, tmp_path).read_bytes() == first


def test_an_answer_for_every_request_in_order(tmp_path: Path) -> None:
    requests = bodies.acts(SMALL).requests()
    with running(EMPTY, tmp_path / "server", CORES) as server:
        assert closed_loop.ask(server.port, requests, 4) == [closed_loop.Answer(200, b"{}")] * len(requests)
    with pytest.raises(RuntimeError, match="without an answer"):
        closed_loop.ask(server.port, requests, 4)


def test_sizes_are_real_versions_decisions_and_keys(tmp_path: Path) -> None:
    """Counted by the service itself, and by Valkey."""
    said: list[str] = []
    versions, pending, keys = (BY_KIND[kind] for kind in ("versions", "pending", "keys"))
    with running(versions.spec(2), tmp_path / "versions", CORES) as server:
        filling.fill(server, versions, 2, tmp_path / "pushed", said.append)
        assert server.gauge("surefoot_loaded_versions") == 2
        filling.fill(server, pending, 700, tmp_path, said.append)
        assert server.gauge("surefoot_pending_decisions") == 700
    with running(keys.spec(40), tmp_path / "keys", CORES) as server:
        filling.fill(server, keys, 40, tmp_path, said.append)
        assert tracked(tmp_path / "keys") == 40


def test_keys_that_no_limit_has_counted_do_not_pass_for_tracked(tmp_path: Path) -> None:
    """Valkey is stopped: all are denied, and fall back."""
    keys = BY_KIND["keys"]
    with running(keys.spec(20), tmp_path / "keys", CORES) as server:
        (store,) = [pid for pid in processes.tree(server.process.pid) if processes.is_store(pid)]
        os.kill(store, signal.SIGSTOP)
        try:
            with pytest.raises(RuntimeError, match="20 of 20 keys are denied again and again"):
                filling.fill(server, keys, 20, tmp_path, lambda _: None)
        finally:
            os.kill(store, signal.SIGCONT)


def tracked(folder: Path) -> int:
    """How many keys' pasts stand in the Valkey of a server with this folder."""
    from redis import Redis

    from service.valkey import socket_url

    with Redis.from_url(socket_url(folder / "data"), decode_responses=True) as store:
        return sum(1 for _ in store.scan_iter(match="*:lim:k:*", count=1000))


def growth_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loadtests.growth", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


def test_the_command_measures_tells_writes_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("pygal", exc_type=ImportError)
    written, drawn = tmp_path / "growth.json", tmp_path / "plots"
    drawn.mkdir()
    short = ["--quick", "--decisions", "64", "--only", "pending", "--largest", "1000", f"--folder={tmp_path}"]
    done = growth_command(*short, f"--json={written}", f"--plots={drawn}")
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(written.read_text())
    (point,) = document["rows"]
    (sample,) = point["repetitions"]
    assert (point["name"], sample["fell back"]) == ("pending/1000/c16", 0)
    for figure in ("cpu_us", "store_cpu_us", "reward_us", "reward_store_us", "peak_mb"):
        assert sample[figure] > 0
    assert str(tmp_path) not in document["command"], "no path of this machine gets into a page"
    assert [path.name for path in drawn.iterdir()] == ["growth-pending.svg"]
    again = growth_command("--from", str(written))
    assert again.stdout.split("\n\n", 1)[0].strip().startswith("pending: decisions that wait")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["growth.json", "plots"]


def test_an_unknown_series_is_told() -> None:
    done = growth_command("--only", "rule")
    assert done.returncode == 2
    assert "there are versions, rules, pending, keys" in done.stderr


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
def test_series_of_wrk_are_measured_too() -> None:
    done = growth_command("--quick", "--only", "rules", "--largest", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not measured" in done.stdout, "one point says nothing"


def test_every_series_is_complete() -> None:
    for each in SERIES:
        assert isinstance(each, Series)
        assert set(each.quick) <= {*each.sizes, 3}
        assert list(each.sizes) == sorted(set(each.sizes))


def test_the_page_tells_every_series_and_its_plot() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    for each in SERIES:
        assert f"growth-{each.kind}.svg" in page
        assert f"\n| {each.axis} |" in page
