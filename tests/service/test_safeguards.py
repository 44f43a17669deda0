"""Safety documents beside a policy's bundles: in force from the start, or the start is refused with file and field."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from policies.errors import ConfigError
from policies.store import read_directory
from service.clock import ManualClock
from service.guarding import Guarding
from service.leases import Leases
from service.metrics import Metrics
from service.redis_streams import RedisStreams, connect
from service.safeguards import document_of
from service.standing import SafetySide
from tests.policies.networks import identity_files, linear
from tests.service.admins import serving
from tests.service.pipelines import plan, version

GOOD = "schema: 1\npolicy: toy\nrules:\n- {kind: forbid, name: never, when: 'action.index == 1'}\n"


def directory(root: Path, **documents: str) -> Path:
    folder = root / "policies"
    (folder / "toy" / "v1").mkdir(parents=True)
    for name, content in identity_files().items():
        (folder / "toy" / "v1" / name).write_bytes(content)
    for name, text in documents.items():
        (folder / "toy" / f"{name}.yaml").write_text(text)
    return folder


def test_documents_of_a_directory_are_in_force_from_the_start(tmp_path: Path) -> None:
    folder = directory(tmp_path, safety=GOOD, exploration="epsilon: 0.0\nwhen_frozen: mode\n")
    with serving(tmp_path / "one", policies=str(folder)) as admin:
        answer = admin.act("toy")
        assert (answer["action"], answer["safety"]["rules"]) == (0, ["never"])
        assert admin.http.get("/admin/policies/toy/exploration").json()["when_frozen"] == "mode"
        assert admin.http.get("/admin/policies/toy/safety").text == GOOD


@pytest.mark.parametrize(
    ("documents", "named"),
    [
        ({"safety": GOOD.replace("never", "on")}, "toy/safety.yaml"),
        ({"safety": GOOD.replace("action.index == 1", "action.index == 0")}, "fallback"),
        ({"exploration": "epsilon: 2.0\n"}, "toy/exploration.yaml"),
        ({"exploration": "{: - [\n"}, "not YAML"),
        ({"rollout": "steps: [0.5, 0.1]\n"}, "toy/rollout.yaml"),
        ({"rollout": "objective: episode\n"}, "toy/rollout.yaml: say between which values"),
    ],
)
def test_what_is_wrong_in_them_stops_the_start(tmp_path: Path, documents: dict[str, str], named: str) -> None:
    (seed,) = read_directory(directory(tmp_path, **documents))
    with pytest.raises(ConfigError, match=named):
        document_of(seed)


def test_a_document_that_is_no_text_is_refused(tmp_path: Path) -> None:
    folder = directory(tmp_path)
    (folder / "toy" / "safety.yaml").write_bytes(b"\xff\xfe")
    (seed,) = read_directory(folder)
    with pytest.raises(ConfigError, match=r"safety\.yaml"):
        document_of(seed)


def test_rules_that_cannot_be_bound_are_never_left_out() -> None:
    async def work() -> None:
        streams, clock = RedisStreams(connect("redis://127.0.0.1:1")), ManualClock()
        guarding = Guarding(streams, clock, Leases(streams, clock, lambda: "one"))
        in_force = plan({"v1": version(Metrics(CollectorRegistry()), "v1", linear([[1, 0], [0, 1]]))})
        guarding.follow("toy", SafetySide(safety=GOOD), 1)
        assert (ruling := guarding.fit(in_force).ruling) is not None
        newer = "schema: 2\npolicy: toy\n"  # as a newer service would write it
        shut = guarding.follow("toy", SafetySide(safety=newer), 2)
        assert (shut.halts, shut.ruling) == (frozenset({"fallback_only"}), None)
        again = guarding.follow("toy", SafetySide(halts=frozenset({"freeze_exploration"}), safety=GOOD), 3)
        assert again.halts == {"freeze_exploration"}
        assert again.ruling is not None
        assert again.ruling.ruleset.digest == ruling.ruleset.digest

    asyncio.run(work())
