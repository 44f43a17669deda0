"""EDGE: how Stable-Baselines3 reads observations, inside the graph. Needs stable-baselines3 and torch.

Duty: what a client sends becomes what the policy takes: VecNormalize's statistics, colours moved to the front, indices
of Discrete and MultiDiscrete spaces, which travel as floats. SB3's own preprocessing (division by 255, one-hot) is in
the policy already.
Promise: the same numbers as SB3's, normalised in float64 as there; an index that does not exist makes the answer NaN,
a fault of that row, and never another index's answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from policies.errors import BundleError
from policies.export_torch import Answer, library

# Beyond this a bound is no bound: float32's largest number stands for none in older environments.
UNBOUNDED = 1e30


@dataclass(frozen=True)
class Encoding:
    """One observation as it is served. sizes: of the indices of Discrete and MultiDiscrete spaces; empty for others."""

    shape: tuple[int, ...]
    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    sizes: tuple[int, ...]
    scalar: bool  # Discrete: SB3 takes [B], not [B, 1]
    image: bool
    channels_last: bool
    normalise: Any | None
    description: str

    @property
    def bounds(self) -> tuple[Sequence[float | None], Sequence[float | None]]:
        """low and high of each element, None where there is none."""
        if len(self.shape) != 1:
            return (), ()
        sides = [[float(f"{v:.9g}") if abs(v) < UNBOUNDED else None for v in side] for side in (self.low, self.high)]
        return sides[0], sides[1]

    def example(self) -> Any:
        return library("torch").zeros(2, *self.shape)

    def sample(self, count: int) -> npt.NDArray[np.float32]:
        """Draw states [count, *shape]: uniform between bounds, else as VecNormalize has seen them, else normal."""
        rng = np.random.default_rng(0)
        if self.sizes:
            return np.stack([rng.integers(0, n, count) for n in self.sizes], axis=1).astype(np.float32)
        mean, std = (0.0, 1.0) if self.normalise is None else self._statistics()
        near = (np.abs(self.low) < UNBOUNDED) & (np.abs(self.high) < UNBOUNDED)
        low, high = np.where(near, self.low, 0.0), np.where(near, self.high, 1.0)
        uniform = rng.uniform(size=(count, *self.shape)) * (high - low) + low
        states = np.where(near, uniform, rng.standard_normal((count, *self.shape)) * std + mean)
        return np.asarray(np.clip(states, self.low, self.high), dtype=np.float32)

    def before(self, answer: Answer) -> Answer:
        """Put this encoding before what a policy answers."""
        torch = library("torch")

        def encoded(states: Any) -> Any:
            if self.sizes:
                return self._indexed(states, answer)
            if self.normalise is not None:
                mean, std = (torch.from_numpy(np.asarray(each, np.float64)) for each in self._statistics())
                mean, std = mean.to(states.device), std.to(states.device)
                clip = float(self.normalise.clip_obs)
                states = ((states.double() - mean) / std).clamp(-clip, clip).float()
            if self.channels_last:
                states = states.permute(0, 3, 1, 2)
            return answer(states)

        return encoded

    def _statistics(self) -> tuple[Any, Any]:
        assert self.normalise is not None
        rms = self.normalise.obs_rms
        mean, std = rms.mean, np.sqrt(rms.var + self.normalise.epsilon)
        return (np.moveaxis(mean, 0, -1), np.moveaxis(std, 0, -1)) if self.channels_last else (mean, std)

    def _indexed(self, states: Any, answer: Answer) -> Any:
        torch = library("torch")
        ends = torch.tensor(self.sizes, dtype=torch.float32, device=states.device)
        known = ((states >= 0) & (states < ends) & (states == states.floor())).all(dim=1, keepdim=True)
        safe = torch.where(known, states, torch.zeros_like(states)).long()
        given = answer(safe[:, 0] if self.scalar else safe)
        nan = torch.tensor(math.nan, device=states.device)
        if isinstance(given, tuple):
            return tuple(torch.where(known, part, nan) for part in given)
        return torch.where(known, given, nan)


def observe(space: Any, normalise: Any | None, channels: str | None) -> Encoding:
    """Say how observations of a space are served. Raises BundleError for those that are not, and for an image whose
    channels nobody has placed.
    """
    kind = type(space).__name__
    if kind in ("Discrete", "MultiDiscrete"):
        return _indices(space, kind)
    if kind not in ("Box", "MultiBinary"):
        detail = f"{kind} observations are not served; flatten them into one Box (gymnasium's FlattenObservation)"
        raise BundleError(detail, "observation", "profile")
    shape = tuple(space.shape)
    low = np.zeros(shape) if kind == "MultiBinary" else space.low.astype(np.float64)
    high = np.ones(shape) if kind == "MultiBinary" else space.high.astype(np.float64)
    from stable_baselines3.common.preprocessing import is_image_space

    image = kind == "Box" and is_image_space(space)
    if normalise is not None and np.shape(normalise.obs_rms.mean) != shape:
        detail = (
            f"VecNormalize has statistics of shape {list(np.shape(normalise.obs_rms.mean))}, the policy {list(shape)}"
        )
        raise BundleError(detail, "vec_normalize", "profile")
    last = image and _channels_last(channels, shape)
    if last:
        low, high = np.moveaxis(low, 0, -1), np.moveaxis(high, 0, -1)
        shape = (*shape[1:], shape[0])
    return Encoding(
        shape=shape,
        low=low,
        high=high,
        sizes=(),
        scalar=False,
        image=image,
        channels_last=last,
        normalise=normalise,
        description=_described(kind, shape, image, last),
    )


def _indices(space: Any, kind: str) -> Encoding:
    sizes = (int(space.n),) if kind == "Discrete" else tuple(int(n) for n in space.nvec.flat)
    low, high = np.zeros(len(sizes)), np.array(sizes, dtype=np.float64) - 1
    described = "the index of the state" if kind == "Discrete" else f"{len(sizes)} indices"
    return Encoding((len(sizes),), low, high, sizes, kind == "Discrete", False, False, None, described)


def _channels_last(channels: str | None, shape: tuple[int, ...]) -> bool:
    if channels is None:
        detail = (
            f"the policy takes images as [channels, height, width] {list(shape)}, which SB3 makes of an environment's; "
            "say what clients will send: --channels last ([height, width, channels]) or --channels first"
        )
        raise BundleError(detail, "channels", "profile")
    return channels == "last"


def _described(kind: str, shape: tuple[int, ...], image: bool, last: bool) -> str:
    if not image:
        return f"{kind} {list(shape)}, as the environment gives it"
    axes = "[height, width, channels]" if last else "[channels, height, width]"
    return f"image {axes} {list(shape)}, numbers from 0 to 255; they are divided by 255 in the graph"
