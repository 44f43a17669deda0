"""What torch exports answers as torch does: modules, TorchScript, programs; recurrent networks as rsl_rl has them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policies.bundle import PolicyBundle, read_bundle
from policies.engine import Engine
from policies.errors import BundleError
from policies.export import Options, bundle_files, export_torch
from policies.export_torch import verify

torch = pytest.importorskip("torch", reason="torch is not installed")
STATES = np.random.default_rng(3).standard_normal((200, 4)).astype(np.float32)


class Policy(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Two heads on a body that differs between training and use."""

    def __init__(self, answer: str = "scores") -> None:
        super().__init__()
        self.answer = answer
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Tanh())
        self.one, self.two = torch.nn.Linear(8, 3), torch.nn.Linear(8, 3)

    def forward(self, states: Any) -> Any:
        hidden = self.body(states)
        if self.answer == "pair":
            return self.one(hidden), self.two(hidden).clamp(-5, 2)
        if self.answer == "index":
            return self.one(hidden).argmax(dim=1)
        if self.answer == "together":
            return torch.cat([self.one(hidden), self.two(hidden)], dim=1)
        return self.one(hidden)


def answered(module: Any, states: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    module.eval()
    with torch.no_grad():
        given = module(torch.from_numpy(states))
    return np.asarray(torch.cat(given, dim=1) if isinstance(given, tuple) else given)


def loaded(files: dict[str, bytes]) -> tuple[PolicyBundle, Engine]:
    bundle = read_bundle(files)
    return bundle, Engine(bundle)


@pytest.mark.parametrize(
    ("answer", "options"),
    [
        ("scores", {"head": "q_values", "actions": ("a", "b", "c")}),
        ("scores", {"head": "logits"}),
        ("scores", {"head": "logits", "nvec": (1, 2)}),
        ("scores", {"head": "action", "low": (0, 0, 0), "high": (1, 1, 1)}),
        ("pair", {"head": "gaussian", "no_bounds": True}),
        ("pair", {"head": "squashed_gaussian", "low": (0,), "high": (1,)}),
        ("together", {"head": "gaussian", "low": (-1,), "high": (1,)}),
    ],
)
def test_a_module_answers_as_its_bundle_for_any_batch(answer: str, options: dict[str, Any]) -> None:
    module = Policy(answer)
    module.train()
    bundle, engine = loaded(export_torch(module, STATES[:20], Options(policy="toy", **options)))
    assert module.training
    assert (bundle.manifest.head, bundle.interface.one_by_one) == (options["head"], False)
    assert str(bundle.manifest.training["exported_from"]).startswith("torch ")
    for rows in (STATES[:1], STATES):
        np.testing.assert_allclose(engine.run(rows), answered(module, rows), rtol=1e-4, atol=1e-5)


def test_an_index_is_exported_as_such_and_doubles_stay_doubles() -> None:
    module = Policy("index")
    _, engine = loaded(export_torch(module, torch.zeros(1, 4), Options(policy="toy", head="action")))
    assert engine.run(STATES).argmax(axis=1).tolist() == answered(module, STATES).tolist()
    double = Policy().double()
    states = STATES.astype(np.float64)
    bundle, engine = loaded(export_torch(double, states, Options(policy="toy", head="q_values")))
    assert bundle.observation.dtype == "float64"
    np.testing.assert_allclose(engine.run(states), answered(double, states), rtol=1e-9)


def test_what_a_module_does_not_say_is_asked_for() -> None:
    for answer, said in (("scores", "--head q_values"), ("pair", "--head gaussian")):
        with pytest.raises(BundleError, match=said):
            export_torch(Policy(answer), STATES, Options(policy="toy", no_bounds=answer == "pair"))
    with pytest.raises(BundleError, match="more than means"):
        export_torch(lambda_module(lambda states: (states, states, states)), STATES, Options(policy="toy"))


def lambda_module(function: Any) -> Any:
    class Lambda(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, states: Any) -> Any:
            return function(states)

    return Lambda()


def test_a_network_that_onnx_cannot_express_is_refused_and_one_that_differs_is_found_out() -> None:
    with pytest.raises(BundleError, match="torch cannot export this network"):
        export_torch(lambda_module(lambda x: torch.linalg.svd(x @ x.T)[1][:, None] + x), STATES, Options(policy="toy"))
    module = Policy()
    files = export_torch(module, STATES, Options(policy="toy", head="q_values"))
    with pytest.raises(BundleError, match=r"the ONNX file answers .* the network itself"):
        verify(files, lambda states: module(states) + 0.01)
    branches = lambda_module(lambda x: x if float(x.sum()) <= 0 else -x)  # a trace keeps one branch
    with pytest.raises(BundleError, match="the network itself"):
        export_torch(branches, STATES, Options(policy="toy", head="q_values"))


def test_files_of_torch_become_bundles(tmp_path: Path) -> None:
    module = Policy().eval()
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    example = (torch.zeros(2, 4),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(module, example[0]).save(tmp_path / "script.pt")
        torch.export.save(torch.export.export(module, example, dynamic_shapes=dynamic), tmp_path / "open.pt2")
        torch.export.save(torch.export.export(module, (torch.zeros(1, 4),)), tmp_path / "one.pt2")
        torch.export.save(torch.export.export(module, (torch.zeros(5, 4),)), tmp_path / "five.pt2")
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    options = Options(policy="toy", head="q_values", shape=(4,))
    for name in ("script.pt", "open.pt2", "one.pt2"):
        bundle, engine = loaded(bundle_files(tmp_path / name, options))
        assert bundle.interface.one_by_one == (name == "one.pt2")
        np.testing.assert_allclose(engine.run(STATES), answered(module, STATES), rtol=1e-4, atol=1e-5)
    for name, said in (("five.pt2", "one size only"), ("weights.pt", "weights without a network")):
        with pytest.raises(BundleError, match=said):
            bundle_files(tmp_path / name, options)
    with pytest.raises(BundleError, match="--shape 4"):
        bundle_files(tmp_path / "script.pt", Options(policy="toy", head="q_values"))


def test_a_recurrent_network_as_rsl_rl_writes_it_keeps_its_memory(tmp_path: Path) -> None:
    class Exported(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.actor = torch.nn.LSTM(4, 6, num_layers=2), torch.nn.Linear(6, 2)

        def forward(self, obs: Any, h_in: Any, c_in: Any) -> Any:
            seen, (h, c) = self.rnn(obs.unsqueeze(0), (h_in, c_in))
            return self.actor(seen.squeeze(0)), h, c

    module, memory = Exported().eval(), torch.zeros(2, 1, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (torch.zeros(1, 4), memory, memory), tmp_path / "policy.onnx", opset_version=17, dynamo=False,
            input_names=["obs", "h_in", "c_in"], output_names=["actions", "h_out", "c_out"],
        )  # fmt: skip
    bundle, engine = loaded(bundle_files(tmp_path / "policy.onnx", Options(policy="walker", no_bounds=True)))
    assert [(each.shape, each.batch_axis) for each in bundle.interface.recurrent] == [((2, 6), 1)] * 2
    remembered, hidden = engine.first_memory(3), (torch.zeros(2, 3, 6), torch.zeros(2, 3, 6))
    for step in range(5):
        rows = STATES[3 * step : 3 * step + 3]
        outputs, remembered = engine.step(rows, None, remembered)
        with torch.no_grad():
            actions, *hidden = module(torch.from_numpy(rows), *hidden)
        np.testing.assert_allclose(outputs, actions, rtol=1e-4, atol=1e-5)
