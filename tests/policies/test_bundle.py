"""The gate in front of a bundle: each refusal names its check and its field."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from policies.bundle import MAX_MODEL_BYTES, read_bundle
from policies.errors import BundleError
from policies.manifest import read_manifest
from tests.policies.networks import bundle_files, identity_files, index_of_largest, linear

Files = dict[str, bytes]
STATES = [[0.0, 1.0], [2.0, 3.0]]


def with_model(change: Callable[[onnx.ModelProto], None]) -> Files:
    """An identity bundle whose network was changed before it was wrapped."""
    proto = linear([[1, 0], [0, 1]])
    change(proto)
    return bundle_files(proto, STATES, STATES)


def refused(files: Files) -> BundleError:
    with pytest.raises(BundleError) as caught:
        read_bundle(files)
    return caught.value


def test_a_good_bundle_is_read_whole() -> None:
    bundle = read_bundle(identity_files(2, description="identity", temperature=2.0))
    assert (bundle.policy, bundle.version, bundle.head, bundle.epsilon) == ("toy", "v1", "q_values", 0.1)
    assert bundle.observation.names == ("f0", "f1")
    assert bundle.action.names == (("a0", "a1"),)
    assert bundle.fallback == (0,)
    assert bundle.temperature == 2.0
    assert bundle.golden_states.shape == (3, 2)
    assert bundle.golden_states.dtype == np.float32
    assert len(bundle.digest) == 64


def test_the_digest_changes_with_every_file() -> None:
    files = identity_files()
    digest = read_bundle(files).digest
    golden = json.loads(files["golden.json"]) | {"rtol": 0.5}
    assert read_bundle(files | {"golden.json": json.dumps(golden).encode()}).digest != digest
    assert read_bundle(identity_files(description="other")).digest != digest


def test_actions_without_names_are_named_by_their_index() -> None:
    files = identity_files(action={"kind": "discrete", "n": 2}, fallback=1)
    assert read_bundle(files).action.names == (("0", "1"),)


def test_fallback_none_is_no_fallback_unless_an_action_is_called_so() -> None:
    assert read_bundle(identity_files(fallback="none")).fallback is None
    named = {"kind": "discrete", "n": 2, "names": ["some", "none"]}
    assert read_bundle(identity_files(fallback="none", action=named)).fallback == (1,)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"schema": 2}, "schema"),
        ({"colour": "red"}, "policy.yaml"),
        ({"policy": None}, "policy.yaml"),
        ({"version": "a/b"}, "version"),
        ({"head": "magic"}, "head"),
        ({"exploration": {"epsilon": 1.5}}, "exploration.epsilon"),
        ({"action": {"kind": "continuous", "n": 2}}, "action"),
        ({"action": {"kind": "discrete", "n": 0}}, "action.n"),
        ({"action": {"kind": "discrete", "n": 2, "names": ["a", "a"]}}, "action.names"),
        ({"observation": {"shape": [0]}}, "observation.shape"),
        ({"observation": {"shape": [2], "features": [{"name": "x"}]}}, "observation.features"),
        ({"observation": {"shape": [2], "features": [{"name": "x"}, {"name": "x"}]}}, "observation.features"),
        ({"fallback": "up"}, "fallback"),
        ({"fallback": 7}, "fallback"),
        ({"latency_budget_ms": 0}, "latency_budget_ms"),
    ],
)
def test_a_wrong_manifest_is_refused_by_field(change: dict[str, Any], field: str) -> None:
    error = refused(identity_files(**change))
    assert error.check == "manifest"
    assert error.field == field


def test_a_manifest_that_is_no_yaml_is_refused() -> None:
    with pytest.raises(BundleError, match="not YAML"):
        read_manifest(b"{: - [")


@pytest.mark.parametrize("name", ["policy.yaml", "model.onnx", "golden.json"])
def test_every_file_must_be_there(name: str) -> None:
    files = identity_files()
    del files[name]
    error = refused(files)
    assert (error.check, error.field) == ("files", name)


def test_the_network_must_be_the_one_the_manifest_was_written_for() -> None:
    files = identity_files()
    other = linear([[2, 0], [0, 2]]).SerializeToString()
    assert refused(files | {"model.onnx": other}).check == "digest"


def test_the_size_cap_comes_before_everything_else() -> None:
    error = refused(identity_files() | {"model.onnx": bytes(MAX_MODEL_BYTES + 1)})
    assert error.check == "size"


def test_a_file_that_is_not_onnx_is_refused() -> None:
    files = identity_files()
    model, text = files["model.onnx"], files["policy.yaml"].decode()
    for cut in (b"\xff\xff\xff", model[: len(model) // 2]):
        matching = text.replace(sha256(model).hexdigest(), sha256(cut).hexdigest()).encode()
        assert refused(files | {"model.onnx": cut, "policy.yaml": matching}).check == "parse"


def _external(tensor: onnx.TensorProto) -> None:
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"


def _external_initializer(proto: onnx.ModelProto) -> None:
    _external(proto.graph.initializer[0])


def _external_in_a_subgraph(proto: onnx.ModelProto) -> None:
    inner = helper.make_graph([], "inner", [], [], [numpy_helper.from_array(np.zeros(1, np.float32), "z")])
    _external(inner.initializer[0])
    proto.graph.node.append(helper.make_node("If", ["c"], ["y"], then_branch=inner))


def _external_in_a_list_of_subgraphs(proto: onnx.ModelProto) -> None:
    inner = helper.make_graph([], "inner", [], [], [numpy_helper.from_array(np.zeros(1, np.float32), "z")])
    _external(inner.initializer[0])
    proto.graph.node.append(helper.make_node("If", ["c"], ["y"], branches=[inner]))


def _external_in_an_attribute(proto: onnx.ModelProto) -> None:
    value = numpy_helper.from_array(np.zeros(1, np.float32), "z")
    _external(value)
    proto.graph.node.append(helper.make_node("Constant", [], ["k"], value=value))


def _external_in_a_function(proto: onnx.ModelProto) -> None:
    value = numpy_helper.from_array(np.zeros(1, np.float32), "z")
    _external(value)
    node = helper.make_node("Constant", [], ["k"], value=value)
    proto.functions.append(helper.make_function("", "f", [], ["k"], [node], [helper.make_opsetid("", 17)]))


def _external_sparse(proto: onnx.ModelProto) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "v")
    _external(values)
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.zeros(1, np.int64), "i"), [4])
    proto.graph.sparse_initializer.append(sparse)


def _external_in_training(proto: onnx.ModelProto) -> None:
    tensor = proto.training_info.add().algorithm.initializer.add()
    _external(tensor)


@pytest.mark.parametrize(
    "change",
    [
        _external_initializer,
        _external_in_a_subgraph,
        _external_in_a_list_of_subgraphs,
        _external_in_an_attribute,
        _external_in_a_function,
        _external_sparse,
        _external_in_training,
    ],
)
def test_external_data_is_refused_wherever_it_hides(change: Callable[[onnx.ModelProto], None]) -> None:
    assert refused(with_model(change)).check == "external_data"


def _foreign_node(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].domain = "com.evil"


def _foreign_import(proto: onnx.ModelProto) -> None:
    proto.opset_import.append(helper.make_opsetid("com.evil", 1))


def _ep_context(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].op_type = "EPContext"


def _foreign_node_in_a_function(proto: onnx.ModelProto) -> None:
    node = helper.make_node("Evil", [], ["k"], domain="com.evil")
    proto.functions.append(helper.make_function("", "f", [], ["k"], [node], [helper.make_opsetid("", 17)]))


def _old_opset(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 7


def _old_ir(proto: onnx.ModelProto) -> None:
    proto.ir_version = 2


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (_foreign_node, "operators"),
        (_foreign_import, "operators"),
        (_ep_context, "operators"),
        (_foreign_node_in_a_function, "operators"),
        (_old_opset, "opset"),
        (_old_ir, "ir_version"),
    ],
)
def test_only_standard_operators_of_known_versions_pass(change: Callable[[onnx.ModelProto], None], check: str) -> None:
    assert refused(with_model(change)).check == check


@pytest.mark.parametrize(
    ("files", "field", "check"),
    [
        (
            bundle_files(linear([[1, 0], [0, 1]]), STATES, STATES, observation={"shape": [3]}),
            "observation.shape",
            "interface",
        ),
        (
            bundle_files(linear([[1, 0], [0, 1]]), STATES, STATES, action={"kind": "discrete", "n": 3}),
            "action.n",
            "interface",
        ),
        (
            bundle_files(linear([[1, 0], [0, 1]]), STATES, STATES, observation={"shape": [2, 1]}),
            "observation.shape",
            "interface",
        ),
        (
            identity_files(observation={"shape": [2], "dtype": "float64"}),
            "observation.dtype",
            "interface",
        ),
        (bundle_files(linear([[1, 0], [0, 1]], batch=3), STATES, STATES), "observation.shape", "batch"),
    ],
)
def test_shapes_and_types_must_be_those_of_the_manifest(files: Files, field: str, check: str) -> None:
    error = refused(files)
    assert (error.field, error.check) == (field, check)


@pytest.mark.parametrize(("name", "field"), [("input", "model.input"), ("output", "model.output")])
def test_inputs_and_outputs_must_exist(name: str, field: str) -> None:
    files = identity_files()
    text = (
        files["policy.yaml"]
        .decode()
        .replace(f"{name}: {'observation' if name == 'input' else 'q_values'}", f"{name}: x")
    )
    assert refused(files | {"policy.yaml": text.encode()}).field == field


@pytest.mark.parametrize(
    "golden",
    [
        {"states": [], "outputs": []},
        {"states": [[1.0]], "outputs": [[1.0, 2.0]]},
        {"states": [[1.0, 2.0]], "outputs": [[1.0]]},
        {"states": [[1.0, 2.0], [3.0]], "outputs": [[1.0, 2.0], [3.0, 4.0]]},
        {"states": [[1.0, 2.0]], "outputs": [[1.0, 2.0]], "more": 1},
        {"states": [[1e300, 2.0]], "outputs": [[1.0, 2.0]]},
    ],
)
def test_golden_vectors_must_fit_the_specs(golden: dict[str, Any]) -> None:
    with np.errstate(over="ignore"):
        error = refused(identity_files() | {"golden.json": json.dumps(golden).encode()})
    assert error.check == "golden"


def index_files(proto: onnx.ModelProto) -> Files:
    """A bundle with an `action` head around a network of two features."""
    return bundle_files(proto, STATES, [[0.0, 1.0], [0.0, 1.0]], head="action")


@pytest.mark.parametrize("shape", [("batch",), ("batch", 1)])
def test_an_action_head_answers_with_one_index_for_each_state(shape: tuple[int | str, ...]) -> None:
    bundle = read_bundle(index_files(index_of_largest(shape=shape)))
    assert (bundle.head, bundle.interface.one_by_one) == ("action", False)


def test_an_action_head_that_answers_with_a_row_is_refused() -> None:
    proto = index_of_largest(shape=("batch", 1))
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 3
    error = refused(index_files(proto))
    assert (error.check, error.field) == ("interface", "model.output")
