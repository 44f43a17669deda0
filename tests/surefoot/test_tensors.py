"""Batches as torch tensors: the same numbers in the same memory, for every kind of action."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from surefoot import Batch
from surefoot.entries import Row
from tests.surefoot.stream_entries import MULTI, POINT, n_step_fields, raw
from tests.surefoot.test_entries import batch_of

KINDS: dict[str, dict[str, Any]] = {"discrete": {"record": {}}, "multi_discrete": MULTI, "continuous": POINT}


@pytest.mark.parametrize("kind", KINDS)
def test_every_column_of_numbers_is_there_in_the_same_memory(kind: str) -> None:
    batch = batch_of(KINDS[kind], KINDS[kind])
    tensors = batch.tensors()
    columns = {each.name: getattr(batch, each.name) for each in fields(batch)}
    numeric = {n: c for n, c in columns.items() if isinstance(c, np.ndarray) and c.dtype != np.object_}
    assert set(tensors) == set(numeric)
    for name, column in numeric.items():
        assert tensors[name].shape == column.shape
        np.testing.assert_array_equal(tensors[name].numpy(), column)
        if column.size:
            assert tensors[name].data_ptr() == column.ctypes.data
    assert tensors["states"].dtype == torch.float32
    assert tensors["rewards"].dtype == torch.float64
    assert tensors["actions"].dtype == (torch.float64 if kind == "continuous" else torch.int64)
    assert tensors["masks"].dtype == tensors["next_masks"].dtype == tensors["bootstrap"].dtype == torch.bool
    assert tensors["n_steps"].dtype == torch.int64


def test_masks_select_and_indices_gather() -> None:
    tensors = batch_of({"record": {}}, {"record": {}}).tensors()
    values = torch.tensor([[1.0, 5.0], [2.0, 7.0]])
    assert values.masked_fill(~tensors["next_masks"], -torch.inf).max(1).values.tolist() == [1.0, 2.0]
    assert values.gather(1, tensors["actions"][:, None]).squeeze(1).tolist() == [1.0, 2.0]


def test_steps_of_n_come_padded() -> None:
    rows = [Row.read(b"1-%d" % n, raw(n_step_fields(n, k=k))) for n, k in ((0, 3), (4, 1))]
    tensors = Batch.of("p", rows, lambda batch: None).tensors()
    assert tensors["rewards"].shape == (2, 3)
    assert tensors["rewards"].isnan().tolist() == [[False] * 3, [False, True, True]]


def test_a_device_is_where_they_go() -> None:
    tensors = batch_of({"record": {}}).tensors(device="meta")
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_they_are_the_same_numbers(kind: str) -> None:
    batch = batch_of(KINDS[kind], KINDS[kind])
    on_cpu, on_gpu = batch.tensors(), batch.tensors("cuda")
    for name, tensor in on_gpu.items():
        assert tensor.is_cuda
        assert tensor.dtype == on_cpu[name].dtype
        np.testing.assert_array_equal(tensor.cpu().numpy(), on_cpu[name].numpy())


@pytest.mark.parametrize("dtype", ["|u1", "<u2", "<i8", "<f2", ">f4", "|b1"])
def test_observations_of_other_dtypes(dtype: str) -> None:
    state = np.array([0, 1, 1, 0], dtype).tobytes()
    batch = batch_of({"s": state, "n": state, "record": {"dtype": dtype}})
    np.testing.assert_array_equal(batch.tensors()["states"].numpy(), batch.states)


def test_a_dtype_that_torch_has_not_is_named() -> None:
    state = np.arange(4, dtype="<f16").tobytes()
    batch = batch_of({"s": state, "n": state, "record": {"dtype": "<f16"}})
    with pytest.raises(TypeError, match="states, float128"):
        batch.tensors()


WITHOUT_TORCH = """
import sys
from tests.surefoot.test_entries import batch_of
assert "torch" not in sys.modules
sys.modules["torch"] = None  # as Python does for a package that is not installed
try:
    batch_of({"record": {}}).tensors()
except ImportError as error:
    assert "pip install torch" in str(error)
else:
    raise SystemExit("no error")
"""


def test_without_torch_it_says_what_to_install_and_nothing_else_needs_it() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH], check=True)
