"""What an ONNX file that some library exported is: which convention it follows and what it therefore means. Pure.

Duty: read a graph that nobody wrote a manifest for and say what is certain of it. It runs nothing and opens nothing;
what only the caller can know (bounds, names, logits or values) is left `None`, and `settle.py` asks for it by the name
of the option.
Strategy: names and positions of inputs and outputs decide, and the operators behind an output where names do not: an
index behind an ArgMax tells its number of actions, a Tanh at the end is a continuous action in [-1, 1].
Promise: nothing is guessed. A network that cannot be served is a BundleError that says why.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import onnx

from policies.errors import BundleError
from policies.graph import FLOAT_TYPES, INDEX_TYPES
from policies.reading import Reading, Tensor
from policies.types import ActionKind, HeadKind

Convention = Literal["sb3_actor_critic", "sb3", "d3rlpy", "rllib", "rsl_rl", "ml_agents", "torch"]

DTYPES: Mapping[int, Literal["float32", "float64"]] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.DOUBLE: "float64",
}
INTEGERS = INDEX_TYPES - FLOAT_TYPES
# An actor that ends so answers with a continuous action: SB3's and d3rlpy's SAC, TD3, DDPG.
BOUNDED = frozenset({"Tanh", "Clip", "Min", "Max"})
MASKS = frozenset({"action_mask", "action_masks", "mask"})
LOG_STD = re.compile(r"log_?(std|sigma|scale)", re.IGNORECASE)
ML_AGENTS = frozenset({"continuous_actions", "discrete_actions"})

GREEDY = "greedy: the file holds the action's index alone, no second-best"
STOCHASTIC = "stochastic: actions are drawn from the network's distribution"
CERTAIN = "deterministic: the file holds the action alone; exploration adds noise to it only where it is asked for"


@dataclass(frozen=True, slots=True)
class Memory:
    """A tensor that the network hands itself from step to step. shape: without the batch axis."""

    input: str
    output: str
    shape: tuple[int, ...]
    batch_axis: int


@dataclass(frozen=True, slots=True)
class Meaning:
    """What an output means. `None`: only the caller can know.

    sizes: how many choices each factor has, None where the file does not say; a continuous action's number of
    coordinates. normalised: the convention leaves [-1, 1] to be scaled to the bounds by whoever runs the network.
    """

    kind: ActionKind | None
    head: HeadKind | None
    sizes: tuple[int | None, ...]
    note: str
    tanh: bool = False
    normalised: bool = False


@dataclass(frozen=True, slots=True)
class Profile:
    """What a graph says of itself. `shape`: of one observation, None where the file does not say."""

    convention: Convention
    input: str
    output: str
    meaning: Meaning
    width: int | None
    shape: tuple[int, ...] | None
    dtype: Literal["float32", "float64"]
    log_std: str | None
    mask: str | None
    memory: tuple[Memory, ...]
    one_by_one: bool
    unbatched: bool  # it takes one observation, without a batch axis
    lone: bool  # its answer is one number for each state, [batch] instead of [batch, 1]

    @property
    def outputs(self) -> tuple[str, ...]:
        """Every output that is served."""
        return (self.output, *((self.log_std,) if self.log_std else ()), *(each.output for each in self.memory))

    @property
    def inputs(self) -> tuple[str, ...]:
        """Every input that is given."""
        return (self.input, *((self.mask,) if self.mask else ()), *(each.input for each in self.memory))


def recognise(proto: onnx.ModelProto) -> Profile:
    """Say which convention a network follows. Raises BundleError, naming what is not served."""
    reading = Reading(proto)
    if not reading.inputs or not reading.outputs:
        raise refuse("the network has no input or no output")
    convention = _convention(reading)
    head, log_std = _heads(reading, convention)
    read = _read_inputs(reading, [head, *([log_std] if log_std else [])])
    memory_inputs = {each.name: twin for each in read if (twin := _twin(reading, each)) is not None}
    mask = next((each.name for each in read if each.name in MASKS), None)
    observations = [each for each in read if each.name not in memory_inputs and each.name != mask]
    observation = _only(observations, memory_inputs)
    unbatched = _unbatched(observation, head)
    if unbatched:
        head = replace(head, dims=(1, *(head.dims or ())))
    memory = tuple(_memory(each, memory_inputs[each.name]) for each in read if each.name in memory_inputs)
    if unbatched and (memory or mask or log_std):
        raise refuse("a network without a batch axis must have one input and one output", "observation.shape")
    meaning = _meaning(reading, convention, head)
    if log_std is not None:
        meaning = Meaning("continuous", None, (head.width,), STOCHASTIC)
    served = [observation, head, *([log_std] if log_std else [])]
    return Profile(
        convention=convention,
        input=observation.name,
        output=head.name,
        meaning=meaning,
        width=head.width,
        shape=_shape(observation, unbatched),
        dtype=DTYPES[observation.elem],
        log_std=log_std.name if log_std else None,
        mask=mask,
        memory=memory,
        one_by_one=unbatched or any((each.dims or ())[:1] == (1,) for each in served),
        unbatched=unbatched,
        lone=meaning.kind in ("continuous", None) and len(head.dims or (1, 1)) == 1 and log_std is None,
    )


def refuse(detail: str, field: str = "model.onnx") -> BundleError:
    return BundleError(detail, field, "profile")


def _convention(reading: Reading) -> Convention:
    names, answers = {each.name for each in reading.inputs}, {each.name for each in reading.outputs}
    if {"return_to_go", "timestep"} & names:
        raise refuse("a decision transformer reads a window of its episode, which is not kept here", "model.input")
    if "version_number" in answers or ML_AGENTS & answers:
        return "ml_agents"
    if {"obs", "state_ins"} <= names and "output" in answers:
        return "rllib"
    if "obs" in names and "actions" in answers:
        return "rsl_rl"
    if "input_0" in names and answers == {"output_0"}:
        return "d3rlpy"
    if names != {"input"}:
        return "torch"
    if len(reading.outputs) == 3 and _has_part(reading, "action_net"):
        return "sb3_actor_critic"
    return (
        "sb3" if len(reading.outputs) == 1 and (_has_part(reading, "q_net") or _has_part(reading, "actor")) else "torch"
    )


def _has_part(reading: Reading, part: str) -> bool:
    """Whether weights belong to a module of that name: many call their input `input`, few hold an `action_net`."""
    return any(part in name.split(".") for name in reading.weights)


def _heads(reading: Reading, convention: Convention) -> tuple[Tensor, Tensor | None]:
    """Find the output that says the action, and the one that says its log deviation, if there is one."""
    if convention == "ml_agents":
        return _ml_agents(reading), None
    named = {"rllib": "output", "rsl_rl": "actions"}.get(convention)
    if named is not None:
        return next(each for each in reading.outputs if each.name == named), None
    if convention == "sb3_actor_critic":
        return reading.outputs[0], None  # by position: actions, values, log_prob
    memories = {twin.name for each in reading.inputs if (twin := _twin(reading, each)) is not None}
    answers = [each for each in reading.outputs if each.name not in memories]
    if len(answers) == 2 and LOG_STD.search(answers[1].name):
        return answers[0], answers[1]
    if len(answers) != 1:
        listed = ", ".join(each.name for each in answers)
        raise refuse(f"the network has several outputs ({listed}) and follows no known convention", "model.output")
    return answers[0], None


def _ml_agents(reading: Reading) -> Tensor:
    """Find the one deterministic output. ML-Agents' other one is drawn inside the graph, with no probability told."""
    kinds = sorted(ML_AGENTS & {each.name for each in reading.outputs})
    found = [each for each in reading.outputs if each.name in {f"deterministic_{kind}" for kind in kinds}]
    if len(kinds) != 1:
        raise refuse("ML-Agents: discrete and continuous actions in one policy are not served", "model.output")
    if not found:
        detail = f"ML-Agents: the file draws its actions itself; export again with an output deterministic_{kinds[0]}"
        raise refuse(detail, "model.output")
    return found[0]


def _read_inputs(reading: Reading, heads: Sequence[Tensor]) -> list[Tensor]:
    """Find the inputs that an answer depends on, those included that only a memory's next value reads."""
    needed, _ = reading.behind(each.name for each in heads)
    read = [each for each in reading.inputs if each.name in needed]
    twins = [twin.name for each in read if (twin := _twin(reading, each)) is not None]
    needed, _ = reading.behind([*(each.name for each in heads), *twins])
    return [each for each in reading.inputs if each.name in needed]


def _twin(reading: Reading, tensor: Tensor) -> Tensor | None:
    """Find the output in which a memory comes back: h_out for h_in, state_outs for state_ins."""
    name = re.sub(r"(^|_)in(s?)(?=_|$)", r"\1out\2", tensor.name)
    if name == tensor.name:
        return None
    return next((each for each in reading.outputs if each.name == name), None)


def _only(observations: Sequence[Tensor], memory: Mapping[str, Tensor]) -> Tensor:
    if len(observations) != 1:
        listed = ", ".join(each.name for each in observations) or "none"
        detail = f"a network must read exactly one observation; this one reads {listed}"
        hidden = [each.name for each in observations if re.search(r"state|recurrent|hidden|^[hc](_|\d|$)", each.name)]
        if hidden and not memory:
            detail += f"; a memory needs an output of its own: h_out for an input h_in (here {hidden[0]})"
        raise refuse(detail, "model.input")
    if observations[0].elem not in FLOAT_TYPES:
        detail = "the observation must be float32 or float64: export a network that takes floats and casts them inside"
        raise refuse(detail, "observation.dtype")
    return observations[0]


def _unbatched(observation: Tensor, head: Tensor) -> bool:
    """Whether the network takes one observation without a batch axis: [features] to [actions] or to one number."""
    dims = observation.dims
    return dims is not None and len(dims) == 1 and dims[0] is not None and len(head.dims or ()) <= 1


def _shape(observation: Tensor, unbatched: bool) -> tuple[int, ...] | None:
    dims = observation.dims or ()
    sizes = dims if unbatched else dims[1:]
    known = tuple(size for size in sizes if size is not None)
    return known if known and len(known) == len(sizes) else None


def _memory(taken: Tensor, given: Tensor) -> Memory:
    """Say which axis of a memory is the batch: the open one; else torch's, [layers, batch, hidden]; else the first."""
    dims = taken.dims or ()
    open_axes = [axis for axis, size in enumerate(dims) if size is None]
    if len(open_axes) > 1 or not dims:
        raise refuse(f"the sizes of {taken.name} are not fixed; export with fixed sizes but for the batch", "recurrent")
    axis = open_axes[0] if open_axes else (1 if len(dims) == 3 and dims[1] == 1 else 0)
    shape = tuple(size for at, size in enumerate(dims) if at != axis and size is not None)
    return Memory(taken.name, given.name, shape, axis)


def _meaning(reading: Reading, convention: Convention, head: Tensor) -> Meaning:
    """Say what an output means, and what the caller ought to know."""
    if head.dims is not None and len(head.dims) > 2:
        raise refuse(f"the output has {len(head.dims)} axes, not [batch, actions]", "model.output")
    if head.elem not in INDEX_TYPES:
        raise refuse("the output is neither a number nor an index", "model.output")
    last = reading.last_operator(head.name)
    if head.elem in INTEGERS or last == "ArgMax":
        return _index(reading, head)
    if last == "Round":
        detail = "MultiBinary actions come rounded from this network; export the .zip of Stable-Baselines3 instead"
        raise refuse(detail, "model.output")
    if convention == "ml_agents" and head.name == "deterministic_discrete_actions":
        return replace(_index(reading, head), sizes=(None,) * (head.width or 1))
    if convention in ("d3rlpy", "sb3_actor_critic", "rsl_rl", "ml_agents"):
        return Meaning("continuous", "action", (head.width,), CERTAIN)
    return _scores(convention, head, last)


def _index(reading: Reading, head: Tensor) -> Meaning:
    sizes = reading.choices(head.name)
    factors = head.width or 1
    if len(sizes) != factors:
        sizes = (None,) * factors
    return Meaning("discrete" if factors == 1 else "multi_discrete", "action", sizes, GREEDY)


def _scores(convention: Convention, head: Tensor, last: str) -> Meaning:
    """Read floats by their name and by the operator that made them."""
    name, sizes = head.name.lower(), (head.width,)
    if last == "Softmax" or "prob" in name:
        return Meaning("discrete", "probabilities", sizes, STOCHASTIC)
    if last == "LogSoftmax" or "logit" in name:
        return Meaning("discrete", "logits", sizes, STOCHASTIC)
    if re.match(r"q(_|\d|$|val)", name):
        return Meaning("discrete", "q_values", sizes, "greedy: the largest value wins")
    if last in BOUNDED or re.match(r"(deterministic_)?action|mu$|mean", name):
        sb3 = convention == "sb3" and last == "Tanh"  # SB3's documentation: unscale what SAC, TD3 and DDPG answer
        return Meaning("continuous", "action", sizes, CERTAIN, tanh=last == "Tanh", normalised=sb3)
    return Meaning(None, None, sizes, "the file does not say what its numbers mean")
