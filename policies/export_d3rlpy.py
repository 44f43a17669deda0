"""EDGE: d3rlpy algorithms to bundles. Needs d3rlpy and torch.

Duty: what d3rlpy's own `save_policy` leaves out: values instead of the best index, and an open batch axis; its scalers
go into the graph as there.
Strategy: the modules are asked as `predict` asks them. `save_policy(…onnx)` itself fails since torch 2.9: it hands a
scripted function to an exporter that takes modules only.
Promise: the bundle's best action is `predict`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from policies.errors import BundleError
from policies.export_bundle import GOLDEN_STATES, Files, Known, Options, assemble
from policies.export_torch import Answer, library, to_onnx, verify
from policies.propose import Support
from policies.types import HeadKind


def export_d3rlpy(algo: Any, options: Options) -> Files:
    """Make a trained d3rlpy algorithm, or the path of what its `save` wrote (.d3), a bundle.

    Values are exported for DQN, DoubleDQN, NFQ and DiscreteCQL; logits for DiscreteSAC and DiscreteBC, which are drawn
    from unless `options.deterministic`; the greedy action for SAC, TD3, TD3+BC, CQL, IQL, AWAC, DDPG, BC and their kin.
    Bounds are those of the action scaler, or [-1, 1], unless given. Reading a .d3 runs code that it holds: export only
    files of your own.

    Gives the three files by name. Raises BundleError.
    """
    d3rlpy = library("d3rlpy")
    if isinstance(algo, str | Path):
        algo = d3rlpy.load_learnable(str(algo), device="cpu")
    impl = getattr(algo, "impl", None)
    if impl is None:
        raise BundleError("the algorithm has no network yet: train it, or build it with a dataset", "source", "profile")
    shape = impl.observation_shape
    if not all(isinstance(size, int) for size in shape):
        raise BundleError("observations of several parts are not served", "observation.shape", "profile")
    torch = library("torch")
    head, policy = _policy(impl, options.deterministic)
    answer = _scaled(algo, policy)
    example = torch.zeros(2, *shape, device=impl.device)
    impl.modules.set_eval()
    proto = to_onnx(answer, example, head, list(impl.modules.get_torch_modules().values()))
    files = assemble(proto, options, _known(algo, impl, head, options))
    verify(files, lambda rows: answer(rows.to(impl.device)))
    return files


def _policy(impl: Any, deterministic: bool) -> tuple[HeadKind, Answer]:
    """Say what the algorithm's networks answer with, for scaled observations."""
    if impl.modules.__class__.__name__ == "DQNModules":
        return "q_values", lambda states: impl._q_func_forwarder.compute_expected_q(states)
    categorical: Any = getattr(impl.modules, "policy", None) or getattr(impl.modules, "imitator", None)
    if type(categorical).__name__ == "CategoricalPolicy":
        return "q_values" if deterministic else "logits", lambda states: categorical(states).logits
    if type(impl).__name__.startswith("Discrete"):
        raise BundleError(
            f"{type(impl).__name__} is not exported: its best action is no network's", "source", "profile"
        )
    return "action", impl.inner_predict_best_action


def _scaled(algo: Any, policy: Answer) -> Answer:
    observations, actions = algo.config.observation_scaler, algo.config.action_scaler

    def answer(states: Any) -> Any:
        given = policy(observations.transform(states) if observations else states)
        return actions.reverse_transform(given) if actions else given

    return answer


def _known(algo: Any, impl: Any, head: HeadKind, options: Options) -> Known:
    d3rlpy = library("d3rlpy")
    said: dict[str, Any] = {"head": head}
    if head == "action":
        said["transform"] = "none"
        if not (options.low or options.high or options.no_bounds):
            said |= _range(algo.config.action_scaler, int(impl.action_size))
    else:
        said["nvec"] = (int(impl.action_size),)
    training: dict[str, Any] = {
        "algorithm": type(algo).__name__,
        "exported_from": f"d3rlpy {d3rlpy.__version__}",
        "gamma": float(algo.gamma),
    }
    if algo.grad_step:  # a loaded algorithm has forgotten it
        training["gradient_steps"] = int(algo.grad_step)
    scaler = algo.config.observation_scaler
    return Known(said, _support(scaler), _seen(scaler, impl.observation_shape), training)


def _range(scaler: Any, size: int) -> dict[str, Any]:
    """Say what a policy that ends in a tanh can answer with: the scaler's range, or [-1, 1] without one."""
    low, high = getattr(scaler, "minimum", None), getattr(scaler, "maximum", None)
    if low is None or high is None:
        return {"low": (-1.0,) * size, "high": (1.0,) * size}
    return {side: tuple(float(v) for v in np.ravel(values)) for side, values in (("low", low), ("high", high))}


def _support(scaler: Any) -> Support:
    """Take low and high of the training's observations from a min-max scaler, which was fitted to them."""
    low, high = getattr(scaler, "minimum", None), getattr(scaler, "maximum", None)
    if low is None or high is None or np.ndim(low) != 1:
        return Support()
    return Support(low=[float(v) for v in low], high=[float(v) for v in high])


def _seen(scaler: Any, shape: tuple[int, ...]) -> np.ndarray[Any, Any] | None:
    """Draw states as the observation scaler has seen them, if it keeps statistics."""
    rng = np.random.default_rng(0)
    mean, std = getattr(scaler, "mean", None), getattr(scaler, "std", None)
    if mean is not None and std is not None:
        return np.asarray(rng.standard_normal((GOLDEN_STATES, *shape)) * std + mean)
    low, high = getattr(scaler, "minimum", None), getattr(scaler, "maximum", None)
    if low is not None and high is not None:
        return np.asarray(rng.uniform(low, high, (GOLDEN_STATES, *shape)))
    return None
