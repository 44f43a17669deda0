"""A deployment file says who decides; what is wrong in it is named, with the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from policies.deployment import default_deployment, read_deployment
from policies.errors import BundleError, ConfigError
from policies.store import read_directory, read_policy
from tests.policies.networks import identity_files

GOOD = b"{schema: 1, policy: toy, champion: v1, baseline: v0, challengers: [{version: v2, weight: 0.1}]}"


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_it_names_its_versions() -> None:
    deployment = read_deployment(GOOD, "here")
    assert deployment.versions == {"v0", "v1", "v2"}
    assert deployment.reward.window_s == 60.0
    assert default_deployment("toy", ["v1"]).versions == {"v1"}


def test_shadows_are_live_but_may_not_answer() -> None:
    deployment = read_deployment(GOOD[:-1] + b", shadows: [v3, v4]}", "here")
    assert list(deployment.deciding) == ["v1", "v2", "v0"]
    assert deployment.by_role["v4"] == "shadows[1]"
    roles = [deployment.role_of(label) for label in ("v0", "v1", "v2", "v3", "v5")]
    assert roles == ["baseline", "champion", "challenger", "shadow", None]
    for label in (b"v0", b"v1", b"v2"):
        with pytest.raises(ConfigError, match="has no other role"):
            read_deployment(GOOD[:-1] + b", shadows: [" + label + b"]}", "here")
    with pytest.raises(ConfigError, match=r"shadows\[1\]"):
        read_deployment(GOOD[:-1] + b", shadows: [v3, v3]}", "here")
    with pytest.raises(ConfigError):
        read_deployment(GOOD[:-1] + b", shadows: [a, b, c, d, e]}", "here")


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (b"{schema: 1, policy: toy, champion: v1, reward: {window_s: 0}}", "reward.window_s"),
        (b"{schema: 1, policy: toy, champion: v1, reward: {aggregation: median}}", "reward.aggregation"),
        (b"{schema: 1, policy: toy, champion: v1, reward: {range: [1, -1]}}", "reward"),
        (b"{schema: 1, policy: toy, champion: v1, reward: {range: [null, -1]}}", "reward"),
        (b"{schema: 1, policy: toy, champion: v1, reward: {range: [0.5, null]}}", "reward"),
        (b"{schema: 1, policy: toy, champion: v1, reward: {n_step: 65}}", "reward.n_step"),
        (b"{schema: 1, policy: toy, champion: v1, challengers: [{version: a, weight: 2}]}", "challengers[0].weight"),
        (b"{schema: 1, policy: toy}", None),
        (b"{: - [", "here"),
    ],
)
def test_what_is_wrong_is_named(raw: bytes, field: str | None) -> None:
    with pytest.raises(ConfigError, match="here") as caught:
        read_deployment(raw, "here")
    assert caught.value.field == field


def test_one_version_needs_no_deployment_file_and_two_do(tmp_path: Path) -> None:
    write(tmp_path / "toy" / "v1", identity_files())
    assert read_directory(tmp_path)[0].deployment.champion == "v1"
    write(tmp_path / "toy" / "v2", identity_files(version="v2"))
    with pytest.raises(ConfigError, match="which is champion"):
        read_directory(tmp_path)


def test_a_directory_without_policies_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError) as caught:
            read_directory(path)
        assert caught.value.field == "SUREFOOT_POLICIES"


def test_folders_are_named_like_what_they_hold(tmp_path: Path) -> None:
    write(tmp_path / "toy" / "v9", identity_files())
    with pytest.raises(BundleError, match="toy/v1"):
        read_directory(tmp_path)


def test_a_deployment_must_fit_its_folder(tmp_path: Path) -> None:
    write(tmp_path / "toy" / "v1", identity_files())
    file = tmp_path / "toy" / "deployment.yaml"
    file.write_bytes(b"{schema: 1, policy: other, champion: v1}")
    with pytest.raises(ConfigError, match="other"):
        read_policy(tmp_path / "toy")
    file.write_bytes(GOOD)
    with pytest.raises(ConfigError, match="no bundle 'v0'"):
        read_policy(tmp_path / "toy")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"observation": {"shape": [2], "features": [{"name": "x"}, {"name": "y"}]}}, "observation"),
        ({"action": {"kind": "discrete", "n": 2, "names": ["x", "y"]}, "fallback": "x"}, "action"),
    ],
)
def test_versions_of_one_policy_answer_the_same_callers(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    write(tmp_path / "toy" / "v1", identity_files())
    write(tmp_path / "toy" / "v2", identity_files(version="v2", **change))
    (tmp_path / "toy" / "deployment.yaml").write_bytes(b"{schema: 1, policy: toy, champion: v1}")
    with pytest.raises(ConfigError) as caught:
        read_policy(tmp_path / "toy")
    assert caught.value.field == field


def test_a_bundle_that_is_refused_names_its_folder(tmp_path: Path) -> None:
    write(tmp_path / "toy" / "v1", identity_files(head="magic"))
    with pytest.raises(BundleError, match="v1") as caught:
        read_directory(tmp_path)
    assert caught.value.field == "head"
