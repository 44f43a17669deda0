"""Algorithms of d3rlpy, trained here and exported: runs only where d3rlpy is installed, which pins an older Gymnasium.

What they answered when this was last done lies in `exports/` and is tested everywhere.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from policies.bundle import read_bundle
from policies.engine import Engine
from policies.errors import BundleError
from policies.export import Options, bundle_files, export_d3rlpy
from policies.export_torch import library
from policies.types import Box

STATES = (np.random.default_rng(5).standard_normal((1000, 3)) * [1, 5, 0.1] + [0, 10, 0]).astype(np.float32)


def test_a_library_that_is_absent_is_named() -> None:
    with pytest.raises(BundleError, match="no_such_library is not installed"):
        library("no_such_library")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["SAC", "TD3PlusBC", "CQL", "IQL", "AWAC", "DQN", "DoubleDQN", "DiscreteCQL", "DiscreteSAC"]
)
def test_the_bundle_answers_as_predict(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("d3rlpy", reason="d3rlpy is not installed")
        from tests.policies.exports.make_d3rlpy import train

        algo = train(name)
        algo.save(str(tmp_path / "model.d3"))
        for files in (
            export_d3rlpy(algo, Options(policy="toy")),
            bundle_files(tmp_path / "model.d3", Options(policy="toy")),
        ):
            bundle = read_bundle(files)
            outputs = Engine(bundle).run(STATES)
            wanted = algo.predict(STATES)
            if isinstance(bundle.action, Box):
                np.testing.assert_allclose(outputs, wanted, rtol=1e-4, atol=1e-5)
            else:
                assert outputs.argmax(axis=1).tolist() == wanted.tolist()
