"""Which convention a file follows, told from names, positions and operators; what only its owner knows is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from policies.errors import BundleError
from policies.profiles import Memory, recognise
from policies.propose import Said, Settled, Support, propose, settle
from policies.rewrite import served

Value = tuple[str, int, Sequence[int | str | None]]
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
OBSERVATION: Value = ("observation", FLOAT, ["batch", 4])
SB3: Value = ("input", FLOAT, [1, 4])


def network(inputs: list[Value], outputs: list[Value], nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info(*each) for each in outputs],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def chain(inputs: list[Value], outputs: list[Value], *operators: str) -> onnx.ModelProto:
    """A network whose first output comes from the first input by these operators, the others by Identity."""
    nodes, name = [], inputs[0][0]
    for index, operator in enumerate(operators):
        following = outputs[0][0] if index == len(operators) - 1 else f"t{index}"
        options: dict[str, Any] = {"axis": 1, "keepdims": 0} if operator == "ArgMax" else {}
        options |= {"to": FLOAT} if operator == "Cast" else {}
        nodes.append(helper.make_node(operator, [name], [following], **options))
        name = following
    nodes += [helper.make_node("Identity", [inputs[0][0]], [each[0]]) for each in outputs[1:]]
    return network(inputs, outputs, nodes)


def recurrent(taken: str, given: str, size: Sequence[int | str]) -> onnx.ModelProto:
    """A network that adds its memory to what it sees."""
    return network(
        [OBSERVATION, (taken, FLOAT, size)],
        [("logits", FLOAT, ["batch", 4]), (given, FLOAT, size)],
        [
            helper.make_node("Add", [OBSERVATION[0], taken], ["sum"]),
            helper.make_node("Relu", ["sum"], ["logits"]),
            helper.make_node("Tanh", [taken], [given]),
        ],
    )


def factors(*names: str) -> onnx.ModelProto:
    """Two indices side by side, as torch writes SB3's MultiDiscrete: each from an ArgMax, or from what is named."""
    sizes = numpy_helper.from_array(np.array([3, 1]), "sizes")
    axis = numpy_helper.from_array(np.array([1]), "axis")
    nodes = [helper.make_node("Split", ["observation", "sizes"], ["a", "b"], axis=1)]
    for part in "ab":
        nodes.append(helper.make_node("ArgMax", [part], [f"{part}_index"], axis=1, keepdims=0))
        nodes.append(helper.make_node("Unsqueeze", [f"{part}_index", "axis"], [f"{part}_column"]))
    nodes.append(helper.make_node("Concat", ["a_column", "b_column"], ["action"], axis=1))
    proto = network([OBSERVATION], [("action", INT64, ["batch", 2])], nodes)
    proto.graph.initializer.extend([sizes, axis])
    return proto


def owned(proto: onnx.ModelProto, weights: str) -> onnx.ModelProto:
    """The network with weights of that name, as the modules of a library leave them."""
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), weights))
    return proto


ACTOR, Q_NET, ACTION_NET = "policy.actor.mu.weight", "policy.q_net.q_net.0.weight", "policy.action_net.weight"


def scores(name: str = "q_values") -> Value:
    return (name, FLOAT, ["batch", 4])


@pytest.mark.parametrize(
    ("proto", "convention", "kind", "head", "sizes", "one_by_one"),
    [
        (chain([OBSERVATION], [scores()], "Relu"), "torch", "discrete", "q_values", (4,), False),
        (chain([OBSERVATION], [scores("x")], "Relu"), "torch", None, None, (4,), False),
        (chain([OBSERVATION], [scores("logits")], "Relu"), "torch", "discrete", "logits", (4,), False),
        (chain([OBSERVATION], [scores("p")], "Softmax", "Identity"), "torch", "discrete", "probabilities", (4,), False),
        (chain([OBSERVATION], [scores("p")], "LogSoftmax"), "torch", "discrete", "logits", (4,), False),
        (chain([OBSERVATION], [scores("a")], "Tanh"), "torch", "continuous", "action", (4,), False),
        (chain([OBSERVATION], [scores("action")], "Relu"), "torch", "continuous", "action", (4,), False),
        (chain([OBSERVATION], [("a", INT64, ["batch"])], "Relu", "ArgMax"), "torch", "discrete", "action", (4,), False),
        (chain([OBSERVATION], [("a", FLOAT, ["b"])], "ArgMax", "Cast"), "torch", "discrete", "action", (4,), False),
        (factors(), "torch", "multi_discrete", "action", (3, 1), False),
        (owned(chain([SB3], [("22", INT64, [1])], "ArgMax"), Q_NET), "sb3", "discrete", "action", (4,), True),
        (owned(chain([SB3], [("55", FLOAT, [1, 4])], "Tanh"), ACTOR), "sb3", "continuous", "action", (4,), True),
        (
            owned(chain([SB3], [("56", INT64, [1]), scores("24"), scores("54")], "ArgMax"), ACTION_NET),
            "sb3_actor_critic", "discrete", "action", (4,), True,
        ),
        (
            owned(chain([SB3], [scores("56"), scores("24"), scores("54")], "Relu"), ACTION_NET),
            "sb3_actor_critic", "continuous", "action", (4,), True,
        ),
        (
            chain([("input_0", FLOAT, [1, 4])], [("output_0", INT64, [1])], "ArgMax"),
            "d3rlpy", "discrete", "action", (4,), True,
        ),
        (
            chain([("input_0", FLOAT, [1, 4])], [("output_0", FLOAT, [1, 4])], "Tanh"),
            "d3rlpy", "continuous", "action", (4,), True,
        ),
        (
            chain(
                [("obs", FLOAT, ["b", 4]), ("state_ins", FLOAT, ["b"])],
                [("output", FLOAT, ["b", 4]), ("state_outs", FLOAT, ["b", 4])],
                "Relu",
            ),
            "rllib", None, None, (4,), False,
        ),
        (
            chain([("obs", FLOAT, [1, 4])], [("actions", FLOAT, [1, 4])], "Relu"),
            "rsl_rl", "continuous", "action", (4,), True,
        ),
        (
            chain(
                [("obs_0", FLOAT, ["batch", 4])],
                [("deterministic_continuous_actions", FLOAT, ["b", 4]), ("continuous_actions", FLOAT, ["b", 4])],
                "Clip",
            ),
            "ml_agents", "continuous", "action", (4,), False,
        ),
    ],
)  # fmt: skip
def test_a_convention_is_recognised(
    proto: onnx.ModelProto, convention: str, kind: str | None, head: str | None, sizes: Any, one_by_one: bool
) -> None:
    profile = recognise(proto)
    assert (profile.convention, profile.one_by_one) == (convention, one_by_one)
    assert (profile.meaning.kind, profile.meaning.head, profile.meaning.sizes) == (kind, head, sizes)
    assert (profile.shape, profile.dtype, profile.unbatched) == ((4,), "float32", False)


@pytest.mark.parametrize(
    ("proto", "said"),
    [
        (chain([OBSERVATION], [("q", FLOAT, ["batch", 4, 2])], "Relu"), "3 axes"),
        (chain([OBSERVATION], [("q", TensorProto.BOOL, ["batch", 4])], "Relu"), "neither a number nor an index"),
        (chain([OBSERVATION], [scores("a"), scores("b")], "Relu"), "several outputs"),
        (chain([SB3], [scores("a"), scores("b"), scores("c")], "Relu"), "several outputs"),
        (chain([OBSERVATION], [scores("a")], "Round"), "MultiBinary"),
        (chain([("observation", INT64, ["batch", 4])], [scores()], "Relu"), "casts them inside"),
        (chain([("return_to_go", FLOAT, [1, 4])], [scores()], "Relu"), "decision transformer"),
        (chain([OBSERVATION], [("discrete_actions", INT64, ["b"]), ("version_number", FLOAT, [1, 4])], "ArgMax"),
         "export again with an output deterministic_discrete_actions"),
        (
            chain([OBSERVATION], [("discrete_actions", INT64, ["b"]), scores("continuous_actions")], "ArgMax"),
            "discrete and continuous actions in one policy",
        ),
        (
            network(
                [("obs", FLOAT, ["b", 4]), ("h0", FLOAT, ["b", 4])],
                [("output", FLOAT, ["b", 4])],
                [helper.make_node("Add", ["obs", "h0"], ["output"])],
            ),
            "h_out for an input h_in",
        ),
        (
            network(
                [("one", FLOAT, ["b", 4]), ("two", FLOAT, ["b", 4])],
                [scores()],
                [helper.make_node("Add", ["one", "two"], ["q_values"])],
            ),
            "exactly one observation; this one reads one, two",
        ),
        (network([OBSERVATION], [], []), "no input or no output"),
        (recurrent("h_in", "h_out", ["a", "b"]), "sizes of h_in are not fixed"),
        (
            network(
                [("observation", FLOAT, [4]), ("action_mask", FLOAT, [4])],
                [("logits", FLOAT, [4])],
                [helper.make_node("Mul", ["observation", "action_mask"], ["logits"])],
            ),
            "without a batch axis",
        ),
    ],
)  # fmt: skip
def test_what_is_not_served_is_refused_by_name(proto: onnx.ModelProto, said: str) -> None:
    with pytest.raises(BundleError, match=said) as caught:
        recognise(proto)
    assert caught.value.check == "profile"


@pytest.mark.parametrize(
    ("taken", "given", "size", "memory"),
    [
        ("h_in", "h_out", [2, 1, 4], Memory("h_in", "h_out", (2, 4), 1)),
        ("state_ins", "state_outs", ["batch", 4], Memory("state_ins", "state_outs", (4,), 0)),
        ("state_in_0", "state_out_0", [1, "batch", 4], Memory("state_in_0", "state_out_0", (1, 4), 1)),
        ("recurrent_in", "recurrent_out", [1, 4], Memory("recurrent_in", "recurrent_out", (4,), 0)),
    ],
)
def test_a_memory_is_paired_with_the_output_it_comes_back_in(
    taken: str, given: str, size: Sequence[int | str], memory: Memory
) -> None:
    proto = recurrent(taken, given, size)
    profile = recognise(proto)
    assert profile.memory == (memory,)
    assert profile.meaning.head == "logits"
    network_served, _ = served(proto, profile)
    assert [each.name for each in network_served.graph.output] == ["logits", given]
    written = propose(settle(profile, Said()), policy="p", version="v", sha256="0" * 64)
    assert written["recurrent"]["states"][0]["batch_axis"] == memory.batch_axis


def test_a_mask_and_a_log_deviation_are_told_by_their_names() -> None:
    masked = network(
        [OBSERVATION, ("action_masks", FLOAT, ["batch", 4])],
        [scores("logits")],
        [helper.make_node("Mul", ["observation", "action_masks"], ["logits"])],
    )
    assert recognise(masked).mask == "action_masks"
    pair = recognise(chain([OBSERVATION], [scores("mu"), scores("log_std")], "Relu"))
    assert (pair.log_std, pair.meaning.kind, pair.meaning.head) == ("log_std", "continuous", None)
    with pytest.raises(BundleError, match="--head gaussian, or squashed_gaussian"):
        settle(pair, Said(no_bounds=True))
    settled = settle(pair, Said(head="squashed_gaussian", low=(-1,), high=(2,)))
    assert (settled.head, settled.action["high"], settled.transform) == ("squashed_gaussian", [2.0] * 4, "none")
    assert propose(settled, policy="p", version="v", sha256="0" * 64)["model"]["log_std"] == "log_std"


INDEX = chain([OBSERVATION], [("a", INT64, ["batch"])], "Identity")
TWO = chain([OBSERVATION], [("a", INT64, ["batch", 2])], "Identity")
VALUES = chain([OBSERVATION], [scores()], "Relu")
UNKNOWN = chain([OBSERVATION], [scores("x")], "Relu")
TANH = chain([OBSERVATION], [scores("x")], "Tanh")
SAC = owned(chain([SB3], [("55", FLOAT, [1, 4])], "Tanh"), ACTOR)
TUTORIAL = chain([SB3], [("output", FLOAT, [1, 4])], "Tanh")  # an input called `input` does not make it SB3's
RLLIB = chain([("obs", FLOAT, ["b", 4]), ("state_ins", FLOAT, ["b"])], [scores("output"), scores("state_outs")], "Relu")
PAIR = chain([OBSERVATION], [scores("mean"), scores("log_std")], "Relu")


@pytest.mark.parametrize(
    ("proto", "said", "asked"),
    [
        (INDEX, Said(), "how many actions there are"),
        (TWO, Said(), "--nvec 3,2"),
        (TWO, Said(nvec=(3,)), "has \\?, \\? actions, 3 were named"),
        (VALUES, Said(nvec=(3,)), "has 4 actions, 3 were named"),
        (VALUES, Said(nvec=(3, 2)), "has 4 actions, 3, 2 were named"),
        (VALUES, Said(head="action"), "answers as head q_values, not action"),
        (VALUES, Said(low=(0,), high=(1,)), "actions are discrete, which the options contradict"),
        (VALUES, Said(head="logits", no_bounds=True), "bounds and transforms are for continuous"),
        (VALUES, Said(factors={"a": ("x", "y"), "b": ("x",)}), "has 4 actions, 2, 1 were named"),
        (VALUES, Said(actions=("a",)), "has 4 actions, 1 were named"),
        (VALUES, Said(shape=(3,)), "--shape says"),
        (UNKNOWN, Said(), "does not say what its output 'x' means"),
        (UNKNOWN, Said(nvec=(4,)), "does not say what its scores are"),
        (UNKNOWN, Said(low=(0,), high=(1,)), "an action or means and log deviations"),
        (UNKNOWN, Said(low=(0, 0, 0), high=(1, 1, 1)), "an action or means and log deviations"),
        (RLLIB, Said(), "does not say what its output 'output' means"),
        (TANH, Said(), "--low and --high"),
        (TANH, Said(low=(0,)), "--low and --high"),
        (TANH, Said(low=(0,), high=(1,), no_bounds=True), "--no-bounds contradicts"),
        (TANH, Said(low=(0, 0), high=(1, 1)), "4 coordinates, --low has 2 numbers"),
        (TANH, Said(low=(0,), high=(1,)), "--transform unscale if"),
        (TANH, Said(low=(0,), high=(1,), actions=("a", "b")), "there are 4 actions or coordinates, 2 names"),
        (TUTORIAL, Said(low=(0,), high=(1,)), "--transform unscale if"),
        (SAC, Said(no_bounds=True), "--transform none if it is the action itself"),
        (SAC, Said(nvec=(4,)), "actions are continuous, which the options contradict"),
        (
            chain([OBSERVATION], [("x", FLOAT, ["b", None])], "Reshape", "Tanh"),
            Said(low=(0,), high=(1,)),
            "a bound for each",
        ),
        (
            chain([OBSERVATION], [("x", FLOAT, ["b", 3])], "Reshape"),
            Said(head="gaussian", no_bounds=True),
            "are an even number",
        ),
        (chain([("observation", FLOAT, ["batch", "any"])], [scores()], "Identity"), Said(), "--shape 4"),
    ],
)
def test_what_the_file_does_not_say_is_asked_for_and_contradictions_are_refused(
    proto: onnx.ModelProto, said: Said, asked: str
) -> None:
    with pytest.raises(BundleError, match=asked) as caught:
        settle(recognise(proto), said)
    assert caught.value.check == "profile"


@pytest.mark.parametrize(
    ("proto", "said", "head", "action", "transform"),
    [
        (INDEX, Said(nvec=(3,)), "action", {"kind": "discrete", "n": 3}, "none"),
        (INDEX, Said(actions=("a", "b")), "action", {"kind": "discrete", "n": 2, "names": ["a", "b"]}, "none"),
        (TWO, Said(nvec=(3, 2)), "action", {"kind": "multi_discrete", "nvec": [3, 2]}, "none"),
        (VALUES, Said(head="logits"), "logits", {"kind": "discrete", "n": 4}, "none"),
        (VALUES, Said(nvec=(3, 1)), "q_values", {"kind": "multi_discrete", "nvec": [3, 1]}, "none"),
        (
            VALUES,
            Said(factors={"fan": ("off", "on"), "heater": ("off", "on")}),
            "q_values",
            {
                "kind": "multi_discrete",
                "nvec": [2, 2],
                "factors": [{"name": "fan", "names": ["off", "on"]}, {"name": "heater", "names": ["off", "on"]}],
            },
            "none",
        ),
        (UNKNOWN, Said(head="q_values"), "q_values", {"kind": "discrete", "n": 4}, "none"),
        (UNKNOWN, Said(head="action", no_bounds=True), "action", {"kind": "continuous", "low": [None] * 4,
                                                                  "high": [None] * 4}, "none"),
        (RLLIB, Said(actions=("a", "b", "c", "d")), "logits", {"kind": "discrete", "n": 4,
                                                               "names": ["a", "b", "c", "d"]}, "none"),
        (RLLIB, Said(nvec=(2, 2)), "logits", {"kind": "multi_discrete", "nvec": [2, 2]}, "none"),
        (RLLIB, Said(low=(-1, 0), high=(1, 5)), "gaussian", {"kind": "continuous", "low": [-1, 0], "high": [1, 5]},
         "none"),
        (RLLIB, Said(low=(0,) * 4, high=(5,) * 4), "action", {"kind": "continuous", "low": [0] * 4, "high": [5] * 4},
         "none"),
        (SAC, Said(low=(-2,), high=(2,)), "action", {"kind": "continuous", "low": [-2] * 4, "high": [2] * 4},
         "unscale"),
        (TANH, Said(low=(-1,), high=(1,)), "action", {"kind": "continuous", "low": [-1] * 4, "high": [1] * 4}, "none"),
        (SAC, Said(low=(-2,), high=(2,), transform="none"), "action", {"kind": "continuous", "low": [-2] * 4,
                                                                       "high": [2] * 4}, "none"),
        (SAC, Said(no_bounds=True, transform="none"), "action", {"kind": "continuous", "low": [None] * 4,
                                                                 "high": [None] * 4}, "none"),
        (TANH, Said(low=(0,), high=(1,), transform="unscale", actions=("a", "b", "c", "d")), "action",
         {"kind": "continuous", "low": [0] * 4, "high": [1] * 4, "names": ["a", "b", "c", "d"]}, "unscale"),
        (TANH, Said(low=(None, 0, 0, 0), high=(1,)), "action", {"kind": "continuous", "low": [None, 0, 0, 0],
                                                                "high": [1] * 4}, "none"),
        (PAIR, Said(head="gaussian", low=(float("-inf"),), high=(1,)), "gaussian",
         {"kind": "continuous", "low": [None] * 4, "high": [1] * 4}, "none"),
    ],
)  # fmt: skip
def test_what_the_owner_says_completes_the_file(
    proto: onnx.ModelProto, said: Said, head: str, action: dict[str, Any], transform: str
) -> None:
    settled = settle(recognise(proto), said)
    assert (settled.head, settled.action, settled.transform) == (head, action, transform)
    assert settled.sizes == tuple(action.get("nvec", [action["n"]] if "n" in action else []))


def proposal(settled: Settled, **changes: Any) -> dict[str, Any]:
    return propose(settled, policy="p", version="v", sha256="0" * 64, **changes)


def test_elements_of_a_vector_are_named_alike_in_every_version() -> None:
    settled = settle(recognise(VALUES), Said())
    assert [each["name"] for each in proposal(settled)["observation"]["features"]] == ["x0", "x1", "x2", "x3"]
    support = Support(low=[0.0, None], high=[1.0], quantiles=[{"p50": 0.5}])
    named = proposal(settled, support=support, features=["a", "b", "c", "d"])["observation"]["features"]
    assert named[:2] == [{"name": "a", "low": 0.0, "high": 1.0, "quantiles": {"p50": 0.5}}, {"name": "b"}]
    wide = chain([("observation", FLOAT, ["batch", 300])], [("q_values", FLOAT, ["batch", 300])], "Relu")
    assert "features" not in proposal(settle(recognise(wide), Said()))["observation"]
    image = chain([("observation", FLOAT, ["batch", 3, 2, 2])], [("q_values", FLOAT, ["batch", 12])], "Flatten")
    assert proposal(settle(recognise(image), Said()))["observation"] == {"shape": [3, 2, 2], "dtype": "float32"}


def test_trimming_leaves_what_the_output_depends_on() -> None:
    profile = recognise(RLLIB)
    graph = served(RLLIB, profile)[0].graph
    assert [each.name for each in graph.input] == ["obs"]
    assert [each.name for each in graph.output] == ["output"]
    assert [node.op_type for node in graph.node] == ["Relu"]


@pytest.mark.parametrize(
    ("given", "output"),
    [(("q_values", FLOAT, [4]), [1, 4]), (("a", INT64, []), [1, 1])],
)
def test_a_network_of_one_observation_gets_a_batch_axis(given: Value, output: list[int]) -> None:
    operators = ["Relu"] if given[1] == FLOAT else []
    node = helper.make_node("ArgMax", ["observation"], [given[0]], axis=0, keepdims=0)
    observed: Value = ("observation", FLOAT, [4])
    proto = chain([observed], [given], *operators) if operators else network([observed], [given], [node])
    profile = recognise(proto)
    assert (profile.unbatched, profile.one_by_one, profile.shape) == (True, True, (4,))
    changed, renamed = served(proto, profile)
    onnx.checker.check_model(changed, full_check=True)
    again = recognise(changed)
    assert (again.unbatched, again.shape, renamed.input) == (False, (4,), "observation.batch")
    assert [dim.dim_value for dim in changed.graph.output[0].type.tensor_type.shape.dim] == output


def test_a_lone_number_for_each_state_becomes_a_column() -> None:
    axes = helper.make_node("ReduceMean", ["observation"], ["action"], axes=[1], keepdims=0)
    proto = network([OBSERVATION], [("action", FLOAT, ["batch"])], [axes])
    profile = recognise(proto)
    assert (profile.lone, profile.width) == (True, 1)
    changed, renamed = served(proto, profile)
    onnx.checker.check_model(changed, full_check=True)
    assert (renamed.output, recognise(changed).lone) == ("action.batch", False)
