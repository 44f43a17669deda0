"""A newcomer's way: train with Stable-Baselines3, export as its documentation says, check and push the plain file, act.

What is served must be `predict(deterministic=True)`, on 1,000 states, in the units of the environment.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.conftest import Server, new_server

sb3 = pytest.importorskip("stable_baselines3", reason="Stable-Baselines3 is not installed")
torch = pytest.importorskip("torch", reason="torch is not installed")

TOKEN = "a-token-for-this-test"
STATES = 1000
FAST = {"learning_rate": 1e-3, "learning_starts": 100, "target_update_interval": 200}  # so that both actions are taken
# algorithm, environment, options, timesteps, range of states, and what the plain file does not say
Case = tuple[str, str, dict[str, Any], int, list[float], list[str]]
POLE, PENDULUM = [2.4, 2.0, 0.2, 2.0], [1.0, 1.0, 8.0]
CASES: dict[str, Case] = {
    "dqn": ("DQN", "CartPole-v1", FAST, 1000, POLE, ["--actions", "left,right", "--fallback", "left"]),
    "ppo": ("PPO", "CartPole-v1", {}, 2048, POLE, ["--actions", "left,right", "--fallback", "left"]),
    "sac": ("SAC", "Pendulum-v1", {}, 200, PENDULUM, ["--low", "-2", "--high", "2", "--fallback", "0"]),
}


class OnnxableSB3Policy(torch.nn.Module):  # type: ignore[misc, name-defined]
    """The module of Stable-Baselines3's page on exporting models."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observation: Any) -> Any:
        return self.policy(observation, deterministic=True)


def export_by_the_recipe(model: Any, path: Path) -> None:
    """Export as the page says; `dynamo=False` because torch's newer exporter fails on these distributions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example = torch.randn(1, *model.observation_space.shape)
        options: dict[str, Any] = {"opset_version": 17, "input_names": ["input"], "dynamo": False}
        torch.onnx.export(OnnxableSB3Policy(model.policy), example, path, **options)


@pytest.fixture(scope="module", params=CASES)
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A trained model and its plain file; the file's name becomes the policy's."""
    algorithm, environment, options, steps, *_ = CASES[request.param]
    torch.set_num_threads(1)  # the networks are too small for threads, which only wait for each other
    model = getattr(sb3, algorithm)("MlpPolicy", environment, seed=0, device="cpu", **options).learn(steps)
    file = tmp_path_factory.mktemp("plain") / f"{request.param}.onnx"
    export_by_the_recipe(model, file)
    return model, file


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = new_server(tmp_path_factory.mktemp("sb3"), admin_token=TOKEN)
    server.start()
    yield server
    assert server.stop() == 0, server.log


def surefoot(*arguments: str) -> str:
    command = [sys.executable, "-m", "service.cli", "policy", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def served_actions(server: Server, policy: str, states: Any) -> list[Any]:
    """Ask in batches of 250."""
    actions: list[Any] = []
    for start in range(0, len(states), 250):
        body = {"policy": policy, "states": states[start : start + 250].tolist(), "explore": False}
        answer = httpx.post(f"{server.url}/v1/act/batch", json=body, timeout=30)
        assert answer.status_code == 200, answer.text
        columns = answer.json()
        assert set(columns["version"]) == {"v1"}
        assert not any(columns["fallback"])
        actions += columns["action"]
    return actions


def assert_served_as_predict(server: Server, model: Any, name: str) -> None:
    scale = CASES[name][4]
    states = (np.random.default_rng(0).uniform(-1, 1, (STATES, len(scale))) * scale).astype(np.float32)
    wanted = model.predict(states, deterministic=True)[0]
    actions = np.array(served_actions(server, name, states))
    if CASES[name][0] == "SAC":
        assert np.ptp(wanted) > 0.1
        np.testing.assert_allclose(actions, wanted, atol=1e-4)
    else:
        assert set(wanted.tolist()) == {0, 1}
        assert actions.tolist() == wanted.tolist()


def test_a_plain_file_is_checked_pushed_and_served_as_predict(plain: tuple[Any, Path], live: Server) -> None:
    model, file = plain
    said = CASES[file.stem][5]
    surefoot("check", str(file), *said)
    surefoot("push", str(file), *said, "--url", live.url, "--token", TOKEN)
    assert_served_as_predict(live, model, file.stem)


def test_a_plain_file_is_exported_and_served_from_a_folder(plain: tuple[Any, Path], tmp_path: Path) -> None:
    model, file = plain
    out = tmp_path / "policies"
    assert surefoot("export", str(file), *CASES[file.stem][5], "--out", str(out)).strip() == str(out / file.stem / "v1")
    server = new_server(tmp_path, policies=str(out))
    server.start()
    try:
        assert_served_as_predict(server, model, file.stem)
    finally:
        assert server.stop() == 0, server.log
