"""EDGE: Stable-Baselines3 models to bundles: DQN, PPO, A2C, SAC, TD3, DDPG. Needs stable-baselines3 and torch.

Duty: read a model or its .zip, find what its policy answers with, fold VecNormalize and the observation's encoding into
the graph, and take bounds, timesteps and states from where SB3 keeps them.
Strategy: the policy's own distribution is exported, not its drawn action, so that the served probabilities are SB3's:
values of a DQN, logits of a categorical, mean and log deviation of a Gaussian. SB3 clips a Gaussian's action to the box
and scales what SAC, TD3 and DDPG answer in [-1, 1]; the manifest says which.
Promise: the bundle's best action is `predict(deterministic=True)`, its probabilities are the policy's own.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from policies.errors import BundleError
from policies.export_bundle import (
    GOLDEN_STATES,
    MOST_GOLDEN_NUMBERS,
    Files,
    Known,
    Options,
    assemble,
    feature_quantiles,
)
from policies.export_torch import Answer, library, to_onnx, verify
from policies.propose import Support
from policies.sb3_observation import Encoding, observe
from policies.types import HeadKind

# A field of the saved `data` that only this algorithm has, asked in this order.
SIGNS = {
    "exploration_rate": "DQN",
    "clip_range": "PPO",
    "gae_lambda": "A2C",
    "target_entropy": "SAC",
    "target_policy_noise": "TD3",
}


@dataclass(frozen=True, slots=True)
class Actor:
    """What a policy answers with. said: facts about its action, as `Said` names them."""

    head: HeadKind
    answer: Answer
    said: dict[str, Any]


def export_sb3(model: Any, options: Options) -> Files:
    """Make a Stable-Baselines3 model, or the path of its .zip, a bundle.

    VecNormalize is folded into the graph: from `options.vec_normalize`, or from the model's own environment. A .zip
    does not say whether it was used, so one of `vec_normalize` and `without_normalisation` must be given for it.
    Reading a .zip or the pickle of a VecNormalize runs code that it holds: export only files of your own.

    Gives the three files by name. Raises BundleError.
    """
    library("stable_baselines3")
    if isinstance(model, str | Path):
        model = _load(Path(model))
    normalise = _normalisation(model, options)
    policy = model.policy
    encoding = observe(policy.observation_space, normalise, _channels(model, options))
    actor = _actor(policy, options.deterministic)
    training = policy.training
    policy.set_training_mode(False)
    try:
        answer = encoding.before(actor.answer)
        proto = to_onnx(answer, encoding.example().to(policy.device), actor.head, [policy])
        files = assemble(proto, options, _known(model, policy, encoding, actor, normalise))
        verify(files, lambda rows: answer(rows.to(policy.device)))
    finally:
        policy.set_training_mode(training)
    return files


def _load(source: Path) -> Any:
    """Load a .zip by the algorithm whose fields it holds. Raises BundleError."""
    import stable_baselines3

    try:
        with zipfile.ZipFile(source) as archive:
            data = json.loads(archive.read("data"))
    except (zipfile.BadZipFile, KeyError, ValueError):
        raise BundleError(f"{source.name} is no file of Stable-Baselines3's save", "source", "profile") from None
    home = str(data.get("policy_class", {}).get("__module__", ""))
    name = next((name for sign, name in SIGNS.items() if sign in data), None)
    if name is None or home.startswith("sb3_contrib"):
        detail = f"{source.name}: only DQN, PPO, A2C, SAC, TD3 and DDPG are exported, this is of {home or 'another'}"
        raise BundleError(detail, "source", "profile")
    if name == "TD3" and (data.get("policy_delay"), data.get("target_noise_clip")) == (1, 0.0):
        name = "DDPG"  # which SB3 makes of TD3 by these two
    small = {"buffer_size": 1} if "buffer_size" in data else {}  # no replay memory is needed to act
    return getattr(stable_baselines3, name).load(source, device="cpu", custom_objects=small)


def _normalisation(model: Any, options: Options) -> Any | None:
    """Find the VecNormalize that the model was trained with. Raises BundleError where only its owner can know."""
    given = options.vec_normalize
    if given is not None and options.without_normalisation:
        raise BundleError("--vec-normalize contradicts --without-normalisation", "vec_normalize", "profile")
    if isinstance(given, str | Path):
        try:
            given = pickle.loads(Path(given).read_bytes())  # noqa: S301 — the owner's own file, as the docstring says
        except (OSError, pickle.UnpicklingError, EOFError) as error:
            raise BundleError(f"{options.vec_normalize}: {error}", "vec_normalize", "profile") from None
    if given is None and model.env is not None:
        given = model.get_vec_normalize_env()
    elif given is None and not options.without_normalisation:
        detail = (
            "the file does not say whether it was trained with VecNormalize; add --vec-normalize vecnormalize.pkl, "
            "or --without-normalisation if it was not"
        )
        raise BundleError(detail, "vec_normalize", "profile")
    if given is not None and not hasattr(given, "norm_obs"):
        raise BundleError(f"{type(given).__name__} is no VecNormalize", "vec_normalize", "profile")
    return given if given is not None and given.norm_obs else None


def _channels(model: Any, options: Options) -> str | None:
    """Say where an image's colours lie in what the environment shows: SB3 moves them to the front by a wrapper."""
    if options.channels is not None or model.env is None:
        return options.channels
    from stable_baselines3.common.vec_env import VecTransposeImage, is_vecenv_wrapped

    return "last" if is_vecenv_wrapped(model.env, VecTransposeImage) else "first"


def _actor(policy: Any, deterministic: bool) -> Actor:
    """Say what a policy answers with. Raises BundleError for spaces and policies that are not exported."""
    if hasattr(policy, "q_net"):
        return Actor("q_values", policy.q_net, {"head": "q_values"})
    if hasattr(policy, "get_distribution"):
        return _on_policy(policy, deterministic)
    if hasattr(policy, "actor"):
        return _off_policy(policy, deterministic)
    raise BundleError(f"policies of the kind {type(policy).__name__} are not exported", "source", "profile")


def _on_policy(policy: Any, deterministic: bool) -> Actor:
    """PPO and A2C: categoricals by their logits, MultiBinary as pairs of choices, Gaussians by mean and deviation."""
    space = policy.action_space
    kind = type(space).__name__
    if kind == "Box":
        head: HeadKind = "squashed_gaussian" if policy.squash_output else "gaussian"

        def gaussian(states: Any) -> Any:
            normal = policy.get_distribution(states).distribution
            return normal.mean, normal.stddev.log()

        return _box(space, head, gaussian, deterministic)
    torch = library("torch")

    def logits(states: Any) -> Any:
        found = policy.get_distribution(states).distribution
        if kind == "MultiBinary":  # the sigmoid of a score is the softmax of (0, score)
            return torch.stack([torch.zeros_like(found.logits), found.logits], dim=-1).flatten(1)
        return torch.cat([factor.logits for factor in found], dim=1) if kind == "MultiDiscrete" else found.logits

    sizes: dict[str, Any] = {"Discrete": lambda: (int(space.n),)}
    sizes["MultiDiscrete"] = lambda: tuple(int(n) for n in space.nvec.flat)
    sizes["MultiBinary"] = lambda: (2,) * int(np.prod(space.shape))
    if kind not in sizes:
        raise BundleError(f"{kind} actions are not served", "action.kind", "profile")
    # With q_values the largest wins: the mode of a categorical.
    head = "q_values" if deterministic else "logits"
    return Actor(head, logits, {"head": head, "nvec": sizes[kind]()})


def _off_policy(policy: Any, deterministic: bool) -> Actor:
    """SAC: a squashed Gaussian. TD3 and DDPG: an action in [-1, 1]."""
    actor, space = policy.actor, policy.action_space
    if not hasattr(actor, "get_action_dist_params"):
        return _box(space, "action", actor, deterministic)

    def gaussian(states: Any) -> Any:
        mean, log_std, latent = actor.get_action_dist_params(states)
        if not actor.use_sde:
            return mean, log_std
        normal = actor.action_dist.proba_distribution(mean, log_std, **latent).distribution
        return normal.mean, normal.stddev.log()

    return _box(space, "squashed_gaussian", gaussian, deterministic)


def _box(space: Any, head: HeadKind, answer: Answer, deterministic: bool) -> Actor:
    """Say how the numbers of a Box are served: its coordinates flat, its bounds as SB3 clips or scales to.

    SB3 trains only where all bounds are finite.
    """
    scaled = head != "gaussian"
    said: dict[str, Any] = {side: tuple(map(float, getattr(space, side).flat)) for side in ("low", "high")}
    if deterministic and head != "action":
        squash = library("torch").tanh if head == "squashed_gaussian" else (lambda mean: mean)
        stochastic = answer
        head, answer = "action", lambda states: squash(stochastic(states)[0])
    if head == "action":
        said["transform"] = "unscale" if scaled else "none"
    return Actor(head, answer, said | {"head": head})


def _known(model: Any, policy: Any, encoding: Encoding, actor: Actor, normalise: Any | None) -> Known:
    """Gather what SB3 knows of a policy beyond its graph."""
    import stable_baselines3

    seen = _replayed(model, encoding)
    support = Support(*encoding.bounds, feature_quantiles(seen) if seen is not None and seen.ndim == 2 else ())
    count = max(2, min(GOLDEN_STATES, MOST_GOLDEN_NUMBERS // max(1, int(np.prod(encoding.shape)))))
    training = {
        "algorithm": type(model).__name__,
        "exported_from": f"stable-baselines3 {stable_baselines3.__version__}",
        "timesteps": int(model.num_timesteps),
        "gamma": float(model.gamma),
        "normalisation": "VecNormalize, in the graph" if normalise is not None else "none",
        "observation": encoding.description,
    }
    if seen is not None:
        training["data"] = f"quantiles over the {len(seen)} states of the replay buffer"
    states = encoding.sample(count) if seen is None else seen[np.linspace(0, len(seen) - 1, count).astype(int)]
    return Known(actor.said, support, states, training)


def _replayed(model: Any, encoding: Encoding) -> np.ndarray[Any, Any] | None:
    """Give the states that a replay buffer holds, as the environment gave them, if there are enough to describe."""
    buffer = getattr(model, "replay_buffer", None)
    if buffer is None or encoding.image or not isinstance(buffer.observations, np.ndarray):
        return None
    filled = buffer.observations[: buffer.size()]
    states = filled.reshape(len(filled) * filled.shape[1], *encoding.shape).astype(np.float32)
    return states if len(states) >= 100 else None
