"""Which convention a file follows, told from names, positions and operators alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from policies.errors import BundleError
from policies.profiles import propose, recognise, settle, trim

Value = tuple[str, int, Sequence[int | str]]
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
OBSERVATION: Value = ("observation", FLOAT, ["batch", 4])


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


def scores(name: str = "q_values") -> Value:
    return (name, FLOAT, ["batch", 4])


SB3 = ("input", FLOAT, [1, 4])


@pytest.mark.parametrize(
    ("proto", "convention", "head", "n", "one_by_one"),
    [
        (chain([OBSERVATION], [scores()], "Relu"), "torch", "q_values", 4, False),
        (chain([OBSERVATION], [scores("x")], "Relu"), "torch", "q_values", 4, False),
        (chain([OBSERVATION], [scores("logits")], "Relu"), "torch", "logits", 4, False),
        (chain([OBSERVATION], [scores("p")], "Softmax", "Identity"), "torch", "probabilities", 4, False),
        (chain([OBSERVATION], [scores("p")], "LogSoftmax"), "torch", "logits", 4, False),
        (chain([OBSERVATION], [("a", INT64, ["batch"])], "Relu", "ArgMax"), "torch", "action", 4, False),
        (chain([OBSERVATION], [("a", FLOAT, ["batch"])], "ArgMax", "Cast"), "torch", "action", 4, False),
        (chain([SB3], [("output", INT64, [1])], "ArgMax"), "sb3", "action", 4, True),
        (
            chain([SB3], [("a", INT64, [1]), ("v", FLOAT, [1, 4]), ("l", FLOAT, [1, 4])], "ArgMax"),
            "sb3_actor_critic", "action", 4, True,
        ),
        (chain([("input_0", FLOAT, [1, 4])], [("output_0", INT64, [1])], "ArgMax"), "d3rlpy", "action", 4, True),
        (
            chain(
                [("obs", FLOAT, ["b", 4]), ("state_ins", FLOAT, ["b"])],
                [("output", FLOAT, ["b", 4]), ("state_outs", FLOAT, ["b", 4])],
                "Relu",
            ),
            "rllib", "logits", 4, False,
        ),
    ],
)  # fmt: skip
def test_a_convention_is_recognised(
    proto: onnx.ModelProto, convention: str, head: str, n: int, one_by_one: bool
) -> None:
    profile = recognise(proto)
    assert (profile.convention, profile.head, profile.n, profile.one_by_one) == (convention, head, n, one_by_one)
    assert (profile.shape, profile.dtype) == ((4,), "float32")


@pytest.mark.parametrize(
    ("proto", "said"),
    [
        (chain([OBSERVATION], [scores("a")], "Tanh"), "continuous"),
        (chain([("input_0", FLOAT, [1, 4])], [("output_0", FLOAT, [1, 4])], "Relu"), "continuous"),
        (chain([OBSERVATION], [("a", INT64, ["batch", 3])], "ArgMax"), "multi-discrete"),
        (chain([OBSERVATION], [("q", FLOAT, ["batch", 4, 2])], "Relu"), "3 axes"),
        (chain([OBSERVATION], [("q", FLOAT, ["batch", 1])], "Relu"), "no row of actions"),
        (chain([OBSERVATION], [("q", TensorProto.BOOL, ["batch", 4])], "Relu"), "neither a number nor an index"),
        (chain([OBSERVATION], [scores("a"), scores("b")], "Relu"), "several outputs"),
        (chain([("observation", INT64, ["batch", 4])], [scores()], "Relu"), "float32 or float64"),
        (chain([("observation", FLOAT, ["batch", "any"])], [scores()], "Relu"), r"\[batch, sizes…\]"),
        (
            network(
                [("obs", FLOAT, ["b", 4]), ("state_ins", FLOAT, ["b", 4])],
                [("output", FLOAT, ["b", 4])],
                [helper.make_node("Add", ["obs", "state_ins"], ["output"])],
            ),
            "recurrent",
        ),
        (
            network(
                [("one", FLOAT, ["b", 4]), ("two", FLOAT, ["b", 4])],
                [scores()],
                [helper.make_node("Add", ["one", "two"], ["q_values"])],
            ),
            "exactly one observation",
        ),
        (network([OBSERVATION], [], []), "no input or no output"),
        (chain([OBSERVATION], [("a", FLOAT, ["batch", 1])], "Cast"), "no row of actions"),
    ],
)
def test_what_is_not_served_is_refused_by_name(proto: onnx.ModelProto, said: str) -> None:
    with pytest.raises(BundleError, match=said) as caught:
        recognise(proto)
    assert caught.value.check == "profile"


def test_what_the_file_does_not_say_is_asked_for_and_contradictions_are_refused() -> None:
    bare = recognise(chain([OBSERVATION], [("a", INT64, ["batch"])], "Identity"))
    assert bare.n is None
    with pytest.raises(BundleError, match="how many actions"):
        settle(bare, None, None)
    assert settle(bare, 3, None).n == 3
    values = recognise(chain([OBSERVATION], [scores()], "Relu"))
    assert settle(values, None, "logits").head == "logits"
    with pytest.raises(BundleError, match="4 actions, 3"):
        settle(values, 3, None)
    with pytest.raises(BundleError, match="not action"):
        settle(values, None, "action")


def test_a_proposal_holds_what_was_recognised_and_what_was_said() -> None:
    profile = recognise(chain([OBSERVATION], [scores()], "Relu"))
    manifest = propose(
        profile, policy="p", version="v", sha256="0" * 64, actions=["a", "b", "c", "d"], features=[{"name": "x"}]
    )
    assert manifest["observation"] == {"shape": [4], "dtype": "float32", "features": [{"name": "x"}]}
    assert manifest["action"] == {"kind": "discrete", "n": 4, "names": ["a", "b", "c", "d"]}
    assert (manifest["head"], manifest["model"]["output"]) == ("q_values", "q_values")


def test_trimming_leaves_what_the_output_depends_on() -> None:
    proto = chain(
        [("obs", FLOAT, ["b", 4]), ("state_ins", FLOAT, ["b"])],
        [("output", FLOAT, ["b", 4]), ("state_outs", FLOAT, ["b", 4])],
        "Relu",
    )
    graph = trim(proto, recognise(proto)).graph
    assert [each.name for each in graph.input] == ["obs"]
    assert [each.name for each in graph.output] == ["output"]
    assert [node.op_type for node in graph.node] == ["Relu"]
