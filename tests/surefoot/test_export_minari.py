"""Minari datasets made of a real stream, read back with Minari."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import gymnasium
import minari
import numpy as np
import pytest
import redis

from surefoot.export import ExportError, Report, export_transitions
from tests.surefoot.stream_entries import MULTI, POINT, add, changed, state
from tests.surefoot.valkey import Valkey

END: dict[str, Any] = {"x": "terminated", "b": 0, "n": b"", "nm": b"", "ni": "", "tf": 1}
LIMIT: dict[str, Any] = {"x": "truncated", "ni": "", "tf": 2}
LOST: dict[str, Any] = {"x": "lost", "b": 0, "n": b"", "nm": b"", "ni": ""}


def export(valkey: Valkey, policy: str, out: Path, **options: Any) -> Report:
    return export_transitions(policy, "minari", out / "toy-v0", redis_url=valkey.url, **options)


def episodes(out: Path) -> list[Any]:
    return list(minari.MinariDataset(out / "toy-v0" / "data").iterate_episodes())


def steps(episode: Any) -> list[int]:
    return list(episode.infos["step"].tolist())


def test_an_episode_has_one_observation_more_than_actions(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path
) -> None:
    add(store, policy, [2], a=1, **END)  # transitions are born in any order
    add(store, policy, [0, 1], record={"propensity": 0.75, "explored": True})
    report = export(valkey, policy, tmp_path)
    assert (report.read, report.written, report.episodes, report.cuts, report.left_out) == (3, 3, 1, {}, {})
    (episode,) = episodes(tmp_path)
    np.testing.assert_array_equal(episode.observations[:3], np.arange(4, dtype="<f4") + np.arange(3)[:, None])
    np.testing.assert_array_equal(episode.observations[3], episode.observations[2])  # nobody told of another
    assert (episode.observations.dtype, episode.observations.shape) == (np.float32, (4, 4))
    assert episode.actions.tolist() == [0, 0, 1]
    assert episode.rewards.tolist() == [0.0, 1.0, 2.0]
    assert episode.terminations.tolist() == [False, False, True]
    assert episode.truncations.tolist() == [False] * 3
    assert episode.infos["propensity"].tolist() == [0.75, 0.75, 0.99]
    assert episode.infos["explored"].tolist() == [True, True, False]
    assert episode.infos["version"].tolist() == [b"v2"] * 3
    assert episode.infos["decision_id"].tolist() == [f"{n:060x}".encode() for n in range(3)]


def test_the_dataset_is_found_by_its_name(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store, policy, [0])
    add(store, policy, [1], **LIMIT)
    export(valkey, policy, tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    dataset = minari.load_dataset("toy-v0")
    assert (dataset.total_episodes, dataset.total_steps) == (1, 2)
    assert "toy-v0" in minari.list_local_datasets()
    assert dataset.action_space == gymnasium.spaces.Discrete(2)
    assert dataset.observation_space == gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32)
    (episode,) = dataset.iterate_episodes()
    assert episode.truncations.tolist() == [False, True]
    np.testing.assert_array_equal(episode.observations[2], np.frombuffer(state(2), "<f4"))
    assert [each.name for each in tmp_path.iterdir()] == ["toy-v0"]
    assert [each.name for each in (tmp_path / "toy-v0").iterdir()] == ["data"]


def test_a_relative_path_will_do(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store, policy, [0])
    monkeypatch.chdir(tmp_path)
    export(valkey, policy, Path("."))
    assert len(episodes(tmp_path)) == 1


def test_a_hole_cuts_an_episode_and_nothing_bridges_it(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path
) -> None:
    add(store, policy, [0, 1, 3, 4])
    report = export(valkey, policy, tmp_path)
    assert [steps(each) for each in episodes(tmp_path)] == [[0, 1], [3, 4]]
    assert report.cuts == {"hole": 1, "open": 1}
    first, second = episodes(tmp_path)
    assert first.truncations.tolist() == second.truncations.tolist() == [False, True]
    np.testing.assert_array_equal(first.observations[2], np.frombuffer(state(2), "<f4"))


def test_what_cannot_be_a_step_is_left_out_and_cuts(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path
) -> None:
    add(store, policy, [0])
    add(store, policy, [1], **{**LOST, "j": "void", "r": ""})
    add(store, policy, [2])
    add(store, policy, [3], j="quarantined", r="")
    add(store, policy, [4, 5])
    add(store, policy, [6], **LOST)
    report = export(valkey, policy, tmp_path)
    assert [steps(each) for each in episodes(tmp_path)] == [[0], [2], [4, 5]]
    assert report.left_out == {"void": 1, "quarantined": 1, "lost": 1}
    assert report.cuts == {"void": 1, "quarantined": 1, "lost": 1}
    assert (report.read, report.written, report.episodes) == (7, 4, 3)
    assert report.read == report.written + sum(report.left_out.values())


def test_another_version_and_another_next_state_cut_an_episode(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path
) -> None:
    add(store, policy, [0, 1])
    add(store, policy, [2], record={"switched": True, "version": "v1"})
    add(store, policy, [3], n=state(40), ni="", o="reward")  # what the caller saw is not what it asked for next
    add(store, policy, [4], **END)
    report = export(valkey, policy, tmp_path)
    assert [steps(each) for each in episodes(tmp_path)] == [[0, 1], [2, 3], [4]]
    assert report.cuts == {"switched": 1, "next_state": 1}
    np.testing.assert_array_equal(episodes(tmp_path)[1].observations[-1], np.frombuffer(state(40), "<f4"))


def test_a_step_taken_twice_does_not_part_the_others(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path
) -> None:
    add(store, policy, [0])
    add(store, policy, [9], st=1, s=state(1), q=99, **LOST)
    add(store, policy, [1])
    add(store, policy, [2], **END)
    report = export(valkey, policy, tmp_path)
    assert [steps(each) for each in episodes(tmp_path)] == [[0, 1, 2]]
    assert (report.left_out, report.cuts) == ({"lost": 1}, {})


def test_episodes_that_interleave_are_told_apart_and_come_in_the_order_they_began(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path
) -> None:
    for n in range(3):
        for place, name in enumerate("zay"):
            last = END if n == 2 else {}
            add(
                store,
                policy,
                [n],
                ep=name,
                i=f"{name}{n}",
                t=100 * n + place,
                p=name,
                **{"ni": f"{name}{n + 1}", **last},
            )
    export(valkey, policy, tmp_path)
    assert [each.infos["episode"].tolist() for each in episodes(tmp_path)] == [[b"z"] * 3, [b"a"] * 3, [b"y"] * 3]


def test_without_steps_time_orders(valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path) -> None:
    add(store, policy, [2], st=-1, o="", **LIMIT)
    add(store, policy, [1, 0], st=-1, o="time")
    export(valkey, policy, tmp_path)
    (episode,) = episodes(tmp_path)
    assert episode.rewards.tolist() == [0.0, 1.0, 2.0]


def test_decisions_without_an_episode_are_episodes_of_one_step(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path
) -> None:
    add(store, policy, range(3), ep="", st=-1, x="single", b=0, n=b"", nm=b"", ni="", o="")
    report = export(valkey, policy, tmp_path)
    found = episodes(tmp_path)
    assert [(each.terminations.tolist(), len(each.observations)) for each in found] == [([True], 2)] * 3
    assert report.cuts == {}


def test_states_that_are_stored_once_are_found_at_the_successor(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path
) -> None:
    add(store, policy, [0, 1, 2], n=b"")
    report = export(valkey, policy, tmp_path)
    (episode,) = episodes(tmp_path)
    assert (steps(episode), report.left_out) == ([0, 1], {"no_next_state": 1})
    np.testing.assert_array_equal(episode.observations, np.arange(4, dtype="<f4") + np.arange(3)[:, None])


@pytest.mark.parametrize(
    ("kind", "space", "action"),
    [
        (MULTI, gymnasium.spaces.MultiDiscrete([3, 2]), [2, 0]),
        (
            POINT,
            gymnasium.spaces.Box(np.array([-1.0, -np.inf]), np.array([1.0, np.inf]), dtype=np.float64),
            [0.5, -0.25],
        ),
    ],
)
def test_the_action_space_is_that_of_the_entries(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path, kind: Any, space: Any, action: list[float]
) -> None:
    add(store, policy, [0], **kind)
    add(store, policy, [1], **changed(kind, **END))
    export(valkey, policy, tmp_path)
    dataset = minari.MinariDataset(tmp_path / "toy-v0" / "data")
    (episode,) = dataset.iterate_episodes()
    assert dataset.action_space == space
    assert episode.actions.tolist() == [action, action]
    assert np.isnan(episode.infos["propensity"]).tolist() == [kind is POINT] * 2


def test_images_are_kept_exactly(valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path) -> None:
    frames = np.random.default_rng(3).integers(0, 256, (2, 40, 40), np.uint8)
    image = {"dtype": "|u1", "shape": (40, 40)}
    add(store, policy, [0], s=frames[0].tobytes(), n=frames[1].tobytes(), record=image)
    export(valkey, policy, tmp_path)
    (episode,) = episodes(tmp_path)
    np.testing.assert_array_equal(episode.observations, frames)


def test_the_commonest_observation_makes_the_dataset(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path
) -> None:
    add(store, policy, [0], ep="old", s=state(1, 2), n=state(2, 2), record={"shape": (2,)})
    add(store, policy, range(1, 4))
    report = export(valkey, policy, tmp_path)
    assert report.left_out == Counter(other_spec=1)
    assert [steps(each) for each in episodes(tmp_path)] == [[1, 2, 3]]


def test_a_long_stretch_is_cut_where_memory_ends(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surefoot.export_episodes._STRETCH_BYTES", 3 * 16)
    add(store, policy, range(7), n=b"")
    report = export(valkey, policy, tmp_path)
    assert [steps(each) for each in episodes(tmp_path)] == [[0, 1, 2], [3, 4, 5]]
    assert (report.cuts, report.left_out) == ({"long": 2}, {"no_next_state": 1})


def test_what_cannot_be_is_refused_and_leaves_nothing(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path
) -> None:
    add(store, policy, [0])
    with pytest.raises(ExportError, match="cannot be added to"):
        export(valkey, policy, tmp_path, append=True)
    with pytest.raises(ExportError, match="cartpole-v0"):
        export_transitions(policy, "minari", tmp_path / "toy", redis_url=valkey.url)
    with pytest.raises(ExportError, match="no transition to make"):
        export(valkey, policy, tmp_path, from_="2100-01-01")
    assert list(tmp_path.iterdir()) == []
    export(valkey, policy, tmp_path)
    with pytest.raises(ExportError, match="there already"):
        export(valkey, policy, tmp_path)
