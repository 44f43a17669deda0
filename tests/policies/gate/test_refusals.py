"""Nothing hostile or broken is loaded: each fixture is refused by its own check, with a way to mend it."""

from __future__ import annotations

import threading
from pathlib import Path

import httpx
import pytest

from policies.bundle import read_bundle
from policies.confine import Limits
from policies.engine import Engine
from policies.errors import BundleError
from policies.trial import try_bundle
from tests.conftest import new_server
from tests.policies.gate import hostile
from tests.policies.gate.cases import CASES, Case, admit, around, on_disk, packed, plain
from tests.policies.networks import identity_files


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_fixture_is_refused_by_its_own_check(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    path = case.make(folder)
    with pytest.raises(BundleError) as caught:
        admit(path, case.limits)
    assert caught.value.check == case.check, caught.value.detail
    assert case.mend in caught.value.detail
    assert len(caught.value.detail) > 20
    assert caught.value.field or path.is_file(), "a refusal names the file or the manifest's field"


@pytest.mark.parametrize("form", ["folder", "tar", "tar.gz"])
def test_a_good_bundle_passes(form: str, tmp_path: Path) -> None:
    files = identity_files()
    path = on_disk(files)(tmp_path)
    if form != "folder":
        path = tmp_path / form
        path.write_bytes(packed(*plain(), mode="w:gz" if form == "tar.gz" else "w"))
    assert admit(path).digest == read_bundle(files).digest


def test_bytes_that_claim_the_runtimes_own_format_are_read_as_what_was_checked() -> None:
    """ONNX Runtime takes its own format by four bytes at the front; the gate has looked at a protobuf."""
    bundle = try_bundle(around(hostile.runtimes_own_format(identity_files()["model.onnx"])))
    assert Engine(bundle).run(bundle.golden_states).tolist() == bundle.golden_outputs.tolist()


def test_a_server_answers_while_every_fixture_is_tried(tmp_path: Path) -> None:
    paths = []
    for case in CASES:
        folder = tmp_path / case.name
        folder.mkdir()
        paths.append((case, case.make(folder)))
    server = new_server(tmp_path / "server")
    server.start()
    verdicts: list[str] = []
    quick = Limits(cpu_s=1, wall_s=30.0)

    def push() -> None:
        for case, path in paths:
            try:
                admit(path, quick if case.check == "cpu_time" else case.limits)
            except BundleError as error:
                verdicts.append(error.check)

    pushing = threading.Thread(target=push)
    statuses: list[int] = []
    try:
        with httpx.Client(base_url=server.url, timeout=10.0) as client:
            pushing.start()
            pause = threading.Event()
            while pushing.is_alive():
                answer = client.post("/v1/act", json={"policy": "cartpole", "state": [0.0, 0.1, 0.02, -0.1]})
                statuses.append(answer.status_code)
                pause.wait(0.01)  # a hundred a second, not as many as possible
    finally:
        pushing.join()
        code = server.stop()
    assert code == 0, server.log
    assert verdicts == [case.check for case in CASES]
    assert len(statuses) > len(CASES), "it waits for none of them"
    assert set(statuses) == {200}
