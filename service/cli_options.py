"""What the owner of a policy says of it on a command line, in one place for every command that reads a plain file.

Duty: text to the values of `policies.export_bundle.Options`. It knows no network: whether what is said fits the file is
asked there.
Strategy: the options stand once, as parameters of `read_options`; `described` gives them to a command.
Promise: a value that cannot be read is a BundleError that names its option.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from policies.errors import BundleError

if TYPE_CHECKING:  # the process that supervises workers imports this file, and neither numpy nor ONNX Runtime
    from numpy.typing import NDArray

    from policies.export_bundle import Options

Text = str | None


def read_options(
    policy: Annotated[Text, typer.Option(help="Name; default: the file's.")] = None,
    version: Annotated[str, typer.Option(help="Label of the version.")] = "v1",
    actions: Annotated[
        str, typer.Option(help="Names: left,right; their number: 2; by factor: 'fan=off,on;heater=off,low,high'.")
    ] = "",
    nvec: Annotated[str, typer.Option(help="Choices of each factor: 3,2.")] = "",
    low: Annotated[
        Text, typer.Option(help="Lowest action: a number, or one for each coordinate; none: unbounded.")
    ] = None,
    high: Annotated[Text, typer.Option(help="Highest action, likewise.")] = None,
    no_bounds: Annotated[bool, typer.Option("--no-bounds", help="The continuous action has no bounds.")] = False,
    transform: Annotated[Text, typer.Option(help="none | unscale: scale [-1, 1] to the bounds.")] = None,
    head: Annotated[
        Text, typer.Option(help="q_values | logits | probabilities | action | gaussian | squashed_gaussian")
    ] = None,
    features: Annotated[str, typer.Option(help="Names of the observation's elements, in order.")] = "",
    shape: Annotated[str, typer.Option(help="Of one observation, where the file does not say: 4 or 3,84,84.")] = "",
    states: Annotated[Path | None, typer.Option(help="A .npy of observations as in training [n, …].")] = None,
    fallback: Annotated[str, typer.Option(help="The safe action: name, index, numbers, or none.")] = "none",
    epsilon: Annotated[float, typer.Option(help="Share of explored decisions.")] = 0.0,
    sigma: Annotated[Text, typer.Option(help="Continuous: deviation of explored actions, one or each.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Draw from softmax(scores / temperature).")] = None,
    latency_budget_ms: Annotated[float | None, typer.Option(help="Most for one state.")] = None,
    description: Annotated[str, typer.Option(help="One line for people.")] = "",
    vec_normalize: Annotated[Path | None, typer.Option(help="SB3: the saved VecNormalize, folded in.")] = None,
    without_normalisation: Annotated[
        bool, typer.Option("--without-normalisation", help="SB3: your word that there was no VecNormalize.")
    ] = False,
    channels: Annotated[Text, typer.Option(help="SB3 images: first | last, as clients send them.")] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="SB3, d3rlpy: the best action instead of drawing.")
    ] = False,
) -> dict[str, Any]:
    """Read what the owner of a policy says of it. Raises BundleError naming the option."""
    from policies.types import HeadKind

    names, factors = _actions(actions)
    return {
        "policy": policy,
        "version": version,
        "actions": names,
        "factors": factors,
        "nvec": _whole(nvec, "--nvec") or (_whole(actions, "--actions") if actions.isdigit() else ()),
        "low": _numbers(low, "--low"),
        "high": _numbers(high, "--high"),
        "no_bounds": no_bounds,
        "transform": _one_of(transform, ("none", "unscale"), "--transform"),
        "head": _one_of(head, get_args(HeadKind), "--head"),
        "features": _split(features),
        "shape": _whole(shape, "--shape"),
        "states": None if states is None else _array(states),
        "fallback": fallback,
        "epsilon": epsilon,
        "sigma": _sigma(sigma),
        "temperature": temperature,
        "latency_budget_ms": latency_budget_ms,
        "description": description,
        "vec_normalize": vec_normalize,
        "without_normalisation": without_normalisation,
        "channels": _one_of(channels, ("first", "last"), "--channels"),
        "deterministic": deterministic,
    }


def described(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, which takes `path` and `said`, all options of `read_options` in place of `said`."""
    own = inspect.signature(command, eval_str=True).parameters
    shared = inspect.signature(read_options, eval_str=True).parameters

    @wraps(command)
    def with_options(**given: Any) -> None:
        said = read_options(**{name: given.pop(name) for name in shared})
        command(**given, said=said)

    parameters = [*(each for name, each in own.items() if name != "said"), *shared.values()]
    ordered = sorted(parameters, key=lambda each: each.default is not inspect.Parameter.empty)
    with_options.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    with_options.__annotations__ = {each.name: each.annotation for each in ordered}
    return with_options


def options_of(path: Path, said: dict[str, Any]) -> Options:
    """Complete what was said by the file's name: `My Policy.onnx` is the policy `My-Policy`."""
    from policies.export_bundle import Options

    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.name.split(".")[0]).strip("-._")[:63]
    return Options(**{**said, "policy": said["policy"] or name or "policy"})


def _actions(text: str) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Read names, or names by factor. A bare number names nothing."""
    if "=" in text:
        parts = [part.partition("=") for part in text.split(";") if part.strip()]
        return (), {name.strip(): _split(names) for name, _, names in parts}
    return ((), {}) if text.isdigit() else (_split(text), {})


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _whole(text: str, option: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in _split(text))
    except ValueError:
        raise BundleError(f"{option} {text!r} is not whole numbers with commas between", option, "profile") from None
    if any(number < 1 for number in numbers):
        raise BundleError(f"{option} {text!r}: every number must be at least 1", option, "profile")
    return numbers


def _numbers(text: Text, option: str) -> tuple[float | None, ...]:
    try:
        parts = _split((text or "").strip("[]"))
        return tuple(None if part.lower() in ("none", "null") else float(part) for part in parts)
    except ValueError:
        raise BundleError(f"{option} {text!r} is not numbers with commas between", option, "profile") from None


def _sigma(text: Text) -> float | list[float] | None:
    values = [value for value in _numbers(text, "--sigma") if value is not None]
    return (values[0] if len(values) == 1 else values) if values else None


def _one_of(text: Text, known: tuple[str, ...], option: str) -> Any:
    if text is not None and text not in known:
        raise BundleError(f"{option} is one of {', '.join(known)}, not {text!r}", option, "profile")
    return text


def _array(path: Path) -> NDArray[Any]:
    import numpy as np

    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise BundleError(f"--states {path}: {error}", "states", "profile") from None
