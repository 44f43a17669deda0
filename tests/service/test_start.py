"""What a start loads and starts: nothing that serving does not need, and one process for the trials of all bundles.

A start costs a second of a core, nearly all of it imports; one careless import at the top of a module can double that.
"""

from __future__ import annotations

import re
import threading
from pathlib import Path

import httpx
import pytest

from loadtests.networks import SMALL, contextual, thresholds, write_policy
from service.gate import Gate
from service.runtime import read_seeds
from service.settings import load_settings
from tests.conftest import new_server
from tests.policies.gate.test_trial_template import of_trials

# What is here for training, for tests, for other commands, for other policies or for nobody.
NEVER = {"torch", "scipy", "pandas", "pyarrow", "minari", "gymnasium", "stable_baselines3", "matplotlib", "sympy"}
NEVER |= {"pygments", "prompt_toolkit", "httpx", "psutil", "jsonschema", "cryptography.hazmat", "surefoot.client"}
NEVER |= {"opentelemetry.sdk.resources", "opentelemetry.exporter", "onnx.reference"}
# A module that is looked for in vain is noted, too: of those that are optional, what they would import themselves.
NEVER |= {"rich.console", "email_validator.exceptions", "opentelemetry.sdk.metrics._internal"}
# The parent binds, starts and waits.
NOT_THE_PARENT = {"numpy", "onnx", "onnxruntime", "fastapi", "uvicorn", "cel", "policies.bundle", "service.app"}


def imported(log: str) -> list[str]:
    """What processes with PYTHONPROFILEIMPORTTIME have imported, one behind the other."""
    return re.findall(r"^import time: +\d+ \| +\d+ \| +(\S+)$", log, re.MULTILINE)


def of(names: set[str], modules: list[str]) -> set[str]:
    return {name for name in names for module in modules if module == name or module.startswith(f"{name}.")}


def three_policies(folder: Path) -> Path:
    for name in ("one", "two", "three"):
        write_policy(folder, SMALL, policy=name, rules=thresholds(3) + contextual(1))
    return folder


def test_a_start_imports_what_serving_needs(tmp_path: Path) -> None:
    server = new_server(tmp_path, policies=str(three_policies(tmp_path / "policies")))
    server.settings["PYTHONPROFILEIMPORTTIME"] = "1"
    server.start()
    try:
        state = [0.0] * 8
        answer = httpx.post(f"{server.url}/v1/act", json={"policy": "one", "state": state, "context": {"hour": 10}})
        assert answer.status_code == 200, answer.text
        told = {"decision_id": answer.json()["decision_id"], "reward": 1.0}
        assert httpx.post(f"{server.url}/v1/reward", json=told).status_code == 202
        assert httpx.get(f"{server.url}/metrics").status_code == 200
    finally:
        assert server.stop() == 0, server.log
    parent, worker = re.split("(?=worker_started)", server.log, maxsplit=1)
    assert "service.supervisor" in (of_parent := imported(parent))
    assert "service.runtime" in (of_worker := imported(worker))
    assert not of(NEVER | NOT_THE_PARENT, of_parent)
    assert not of(NEVER, of_worker)


def test_one_process_tries_the_bundles_of_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUREFOOT_POLICIES", str(three_policies(tmp_path / "policies")))
    gate = Gate(tmp_path / "verdicts", None)
    reading = threading.Thread(target=read_seeds, args=(load_settings(), gate))
    reading.start()
    seen = set()
    while reading.is_alive():
        seen |= set(of_trials())
    assert len(seen) == 1
    assert len(list((tmp_path / "verdicts").iterdir())) == 3
