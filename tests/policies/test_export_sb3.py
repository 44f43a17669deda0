"""What Stable-Baselines3 trains answers, as a bundle, what its own `predict` and its own distributions say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policies.bundle import PolicyBundle, read_bundle
from policies.continuous import Transform, behave, draw, gaussian
from policies.engine import Engine
from policies.errors import BundleError
from policies.export import Options, bundle_files, export_sb3
from policies.heads import target
from policies.types import Box, Choices, Floats

sb3 = pytest.importorskip("stable_baselines3", reason="Stable-Baselines3 is not installed")
gymnasium = pytest.importorskip("gymnasium", reason="Gymnasium is not installed")
torch = pytest.importorskip("torch", reason="torch is not installed")
torch.set_num_threads(1)  # the networks are too small for threads, which only wait for each other

SPACES = gymnasium.spaces
SMALL = {"net_arch": [16]}
WIDE = SPACES.Box(np.array([-50, 0, -np.inf], np.float32), np.array([50, 1000, np.inf], np.float32))
ACTIONS = SPACES.Box(np.array([-2, 0], np.float32), np.array([2, 5], np.float32))


class Random(gymnasium.Env):  # type: ignore[misc, name-defined]
    """Observations that are drawn anew at each step, of whatever space."""

    def __init__(self, action_space: Any, observation_space: Any = WIDE) -> None:
        self.action_space, self.observation_space = action_space, observation_space
        observation_space.seed(0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        return self.observation_space.sample(), float(np.random.default_rng(0).normal()), False, False, {}


def trained(algorithm: str, env: Any, steps: int = 64, policy: str = "MlpPolicy", **options: Any) -> Any:
    made = {"learning_starts": 10, "buffer_size": 200} if algorithm in ("DQN", "SAC", "TD3", "DDPG") else {}
    made |= {"n_steps": 32, **({"batch_size": 32} if algorithm == "PPO" else {})} if not made else {}
    network = {"policy_kwargs": dict(SMALL)} if policy == "MlpPolicy" and "policy_kwargs" not in options else {}
    model = getattr(sb3, algorithm)(policy, env, device="cpu", seed=0, **made, **network, **options)
    return model.learn(steps)


def sampled(space: Any, count: int = 1000) -> np.ndarray[Any, Any]:
    space.seed(1)
    return np.stack([np.asarray(space.sample(), dtype=np.float32).reshape(space.shape or (1,)) for _ in range(count)])


def loaded(files: dict[str, bytes]) -> tuple[PolicyBundle, Engine]:
    bundle = read_bundle(files)
    return bundle, Engine(bundle)


def best(bundle: PolicyBundle, outputs: Any) -> np.ndarray[Any, Any]:
    """The action without chance, as SB3 shapes it."""
    if isinstance(bundle.action, Choices):
        scores = target(outputs, bundle.manifest.head, None, bundle.action.nvec).scores
        ends = np.cumsum(bundle.action.nvec)
        chosen = [scores[:, end - n : end].argmax(axis=1) for n, end in zip(bundle.action.nvec, ends, strict=True)]
        return np.stack(chosen, axis=1) if bundle.action.factors else chosen[0]
    return np.asarray(behaviour(bundle, outputs).centre)


def behaviour(bundle: PolicyBundle, outputs: Any) -> Any:
    assert isinstance(bundle.action, Box)
    rows = len(outputs)
    low, high = (np.tile(side, (rows, 1)) for side in bundle.action.bounds)
    transform = Transform.of(bundle.manifest.head, bundle.manifest.action_transform, bundle.action)
    wanted = gaussian(outputs, bundle.manifest.head)
    return behave(wanted, transform, (low, high), np.zeros(rows), None, np.zeros_like(low))


def uniforms(rows: int, size: int) -> Floats:
    return np.random.default_rng(2).uniform(size=(rows, 1 + size))


CASES: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "dqn": ("DQN", SPACES.Discrete(3), {}, "q_values"),
    "ppo": ("PPO", SPACES.Discrete(3), {}, "logits"),
    "a2c": ("A2C", SPACES.Discrete(3), {}, "logits"),
    "ppo_multi_discrete": ("PPO", SPACES.MultiDiscrete([3, 2]), {}, "logits"),
    "ppo_multi_binary": ("PPO", SPACES.MultiBinary(3), {}, "logits"),
    "ppo_box": ("PPO", ACTIONS, {}, "gaussian"),
    "a2c_box": ("A2C", ACTIONS, {}, "gaussian"),
    "ppo_gsde": ("PPO", ACTIONS, {"use_sde": True}, "gaussian"),
    "ppo_squashed": ("PPO", ACTIONS, {"use_sde": True, "policy_kwargs": {**SMALL, "squash_output": True}},
                     "squashed_gaussian"),
    "sac": ("SAC", ACTIONS, {}, "squashed_gaussian"),
    "sac_gsde": ("SAC", ACTIONS, {"use_sde": True}, "squashed_gaussian"),
    "td3": ("TD3", ACTIONS, {}, "action"),
    "ddpg": ("DDPG", ACTIONS, {}, "action"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_best_action_is_predict_with_and_without_vec_normalize(case: str, tmp_path: Path) -> None:
    algorithm, actions, options, head = CASES[case]
    env = sb3.common.vec_env.DummyVecEnv([lambda: Random(actions)])
    plain = trained(algorithm, Random(actions), **options)
    normalised = trained(algorithm, sb3.common.vec_env.VecNormalize(env, clip_obs=3.0), **options)
    normalised.get_vec_normalize_env().save(tmp_path / "vecnormalize.pkl")
    states = sampled(WIDE)
    for model, given in ((plain, states), (normalised, normalised.get_vec_normalize_env().normalize_obs(states))):
        wanted = model.predict(given, deterministic=True)[0]
        bundle, engine = loaded(export_sb3(model, Options(policy="toy")))
        assert (bundle.manifest.head, bundle.interface.one_by_one) == (head, False)
        served = best(bundle, engine.run(states))
        if isinstance(bundle.action, Choices):
            assert served.tolist() == wanted.tolist()
        else:
            np.testing.assert_allclose(served, wanted, rtol=1e-4, atol=1e-4)
        training = bundle.manifest.training
        assert (training["algorithm"], training["timesteps"]) == (algorithm, model.num_timesteps)
        model.save(tmp_path / "model.zip")
        said: dict[str, Any] = {"without_normalisation": True}
        if model is normalised:
            said = {"vec_normalize": tmp_path / "vecnormalize.pkl"}
        again = bundle_files(tmp_path / "model.zip", Options(policy="toy", **said))
        assert read_bundle(again).manifest.training["algorithm"] == algorithm
        assert again["model.onnx"] == engine.bundle.model


@pytest.mark.parametrize("case", ["ppo", "a2c", "ppo_multi_discrete", "ppo_multi_binary"])
def test_probabilities_of_choices_are_sb3s_own(case: str) -> None:
    algorithm, actions, options, _ = CASES[case]
    model = trained(algorithm, Random(actions), **options)
    bundle, engine = loaded(export_sb3(model, Options(policy="toy")))
    assert isinstance(bundle.action, Choices)
    states = sampled(WIDE)
    scores = target(engine.run(states), "logits", None, bundle.action.nvec).scores
    taken = np.stack([np.asarray(actions.sample()).reshape(-1) for _ in states])
    columns = np.cumsum([0, *bundle.action.nvec[:-1]]) + taken
    ours = np.log(np.take_along_axis(scores, columns, axis=1)).sum(axis=1)
    with torch.no_grad():
        own = model.policy.get_distribution(torch.from_numpy(states))
        given = torch.from_numpy(taken if bundle.action.factors else taken[:, 0]).float()
        np.testing.assert_allclose(ours, own.log_prob(given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["ppo_box", "a2c_box", "ppo_gsde", "sac", "sac_gsde"])
def test_log_probabilities_of_drawn_numbers_are_sb3s_own(case: str) -> None:
    algorithm, actions, options, head = CASES[case]
    model = trained(algorithm, Random(actions), **options)
    bundle, engine = loaded(export_sb3(model, Options(policy="toy")))
    states = sampled(WIDE) / 200  # near zero, where a tanh has not saturated
    drawn = draw(behaviour(bundle, engine.run(states)), uniforms(len(states), 2))
    raw = torch.from_numpy(drawn.raw.astype(np.float32))
    with torch.no_grad():
        if head == "gaussian":
            own = model.policy.get_distribution(torch.from_numpy(states)).log_prob(raw)
            np.testing.assert_allclose(drawn.raw_log_prob, own, rtol=1e-3, atol=1e-3)
            return
        mean, log_std, latent = model.policy.actor.get_action_dist_params(torch.from_numpy(states))
        distribution = model.policy.actor.action_dist.proba_distribution(mean, log_std, **latent)
        assert distribution.__class__.__name__.startswith(("Squashed", "StateDependent"))
        own = np.asarray(distribution.distribution.log_prob(raw).sum(dim=1))
    np.testing.assert_allclose(drawn.raw_log_prob, own, rtol=1e-3, atol=1e-3)
    # SB3 adds 1e-6 within its logarithm, and measures in [-1, 1]: half of each side's length.
    squashed = own - np.log(1.0 - np.tanh(drawn.raw) ** 2 + 1e-6).sum(axis=1) - np.log([2.0, 2.5]).sum()
    inside = (np.abs(drawn.raw) < 3).all(axis=1)
    assert inside.sum() > 100
    np.testing.assert_allclose(drawn.log_propensity[inside], squashed[inside], rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(("case", "deterministic"), [("ppo", "q_values"), ("ppo_box", "action"), ("sac", "action")])
def test_a_stochastic_policy_can_be_served_by_its_mode(case: str, deterministic: str) -> None:
    algorithm, actions, options, _ = CASES[case]
    model = trained(algorithm, Random(actions), **options)
    bundle, engine = loaded(export_sb3(model, Options(policy="toy", deterministic=True)))
    assert bundle.manifest.head == deterministic
    states = sampled(WIDE)
    wanted = model.predict(states, deterministic=True)[0]
    np.testing.assert_allclose(best(bundle, engine.run(states)), wanted, rtol=1e-4, atol=1e-4)


def test_what_sb3_knows_of_the_observations_stands_in_the_manifest() -> None:
    model = trained("DQN", Random(SPACES.Discrete(2)), steps=150)
    features = read_bundle(export_sb3(model, Options(policy="toy", features=("a", "b", "c")))).observation.features
    assert [(each.name, each.low, each.high) for each in features] == [
        ("a", -50, 50),
        ("b", 0, 1000),
        ("c", None, None),
    ]
    seen = model.replay_buffer.observations[: model.replay_buffer.size(), 0]
    assert features[1].quantiles["p50"] == pytest.approx(np.median(seen[:, 1]), rel=1e-4)


@pytest.mark.parametrize("channels", ["first", "last"])
def test_images_are_served_as_clients_have_them(channels: str, tmp_path: Path) -> None:
    shape = (36, 40, 3) if channels == "last" else (3, 36, 40)
    space = SPACES.Box(0, 255, shape, np.uint8)
    model = trained("A2C", Random(SPACES.Discrete(2), space), steps=8, policy="CnnPolicy")
    states = sampled(space, 30)
    wanted = model.predict(states.astype(np.uint8), deterministic=True)[0]
    bundle, engine = loaded(export_sb3(model, Options(policy="toy")))
    assert bundle.observation.shape == shape
    assert "divided by 255 in the graph" in str(bundle.manifest.training["observation"])
    assert best(bundle, engine.run(states)).tolist() == wanted.tolist()
    model.save(tmp_path / "model.zip")
    with pytest.raises(BundleError, match="--channels last"):
        export_sb3(tmp_path / "model.zip", Options(policy="toy", without_normalisation=True))
    said = Options(policy="toy", without_normalisation=True, channels=channels)  # type: ignore[arg-type]
    assert export_sb3(tmp_path / "model.zip", said)["model.onnx"] == bundle.model


@pytest.mark.parametrize("algorithm", ["DQN", "PPO"])
@pytest.mark.parametrize("space", [SPACES.Discrete(5), SPACES.MultiDiscrete([5, 3])])
def test_indices_are_served_as_numbers_and_unknown_ones_are_faults(algorithm: str, space: Any) -> None:
    model = trained(algorithm, Random(SPACES.Discrete(2), space))
    bundle, engine = loaded(export_sb3(model, Options(policy="toy")))
    states = sampled(space, 50)
    given = states[:, 0].astype(int) if space.shape == () else states.astype(int)
    assert best(bundle, engine.run(states)).tolist() == model.predict(given, deterministic=True)[0].tolist()
    for wrong in (-1.0, 0.5, 5.0, np.inf):
        assert target(engine.run(np.full_like(states[:1], wrong)), bundle.manifest.head).faulty.tolist() == [True]


def test_what_is_not_exported_is_named(tmp_path: Path) -> None:
    model = trained("DQN", Random(SPACES.Discrete(2)))
    model.save(tmp_path / "model.zip")
    said: dict[str, Any] = {"policy": "toy"}
    for options, match in (
        (Options(**said), "--vec-normalize vecnormalize.pkl"),
        (Options(**said, vec_normalize="x", without_normalisation=True), "contradicts"),
        (Options(**said, vec_normalize=tmp_path / "absent.pkl"), "absent.pkl"),
        (Options(**said, vec_normalize=object()), "object is no VecNormalize"),
        (Options(**said, without_normalisation=True, nvec=(3,)), "has 2 actions, 3 were named"),
        (Options(**said, without_normalisation=True, head="logits"), "says head q_values, not logits"),
    ):
        with pytest.raises(BundleError, match=match):
            export_sb3(tmp_path / "model.zip", options)
    (tmp_path / "other.zip").write_bytes(b"")
    with pytest.raises(BundleError, match="no file of Stable-Baselines3"):
        export_sb3(tmp_path / "other.zip", Options(policy="toy"))
    mixed = SPACES.Dict({"a": WIDE, "b": WIDE})
    crowd = trained("PPO", Random(SPACES.Discrete(2), mixed), policy="MultiInputPolicy")
    with pytest.raises(BundleError, match="Dict observations are not served"):
        export_sb3(crowd, Options(policy="toy"))
    other = sb3.common.vec_env.DummyVecEnv([lambda: Random(SPACES.Discrete(2), SPACES.Box(-1, 1, (2,)))])
    with pytest.raises(BundleError, match="statistics of shape"):
        export_sb3(model, Options(policy="toy", vec_normalize=sb3.common.vec_env.VecNormalize(other)))
    sac = trained("SAC", Random(ACTIONS))
    with pytest.raises(BundleError, match=r"says low \(-2.0, 0.0\)"):
        export_sb3(sac, Options(policy="toy", low=(-1.0, -1.0)))
