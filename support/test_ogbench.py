"""pytest: OGBench's ids, goals, files and downloads, and the data that are collected here."""
import re

import numpy as np
import pytest

import mac
from support import ogbench
from support.console import MacError
from support.data import data_files
from support.test_common import SINGLE
from support.worlds import find_world

PLAIN = "cube-single-play-v0"


@pytest.mark.parametrize("dataset", [
    "cube-double-play", "scene-play", "puzzle-3x3-play", "pointmaze-medium-navigate",
    "antmaze-medium-navigate", "humanoidmaze-medium-navigate", "antsoccer-arena-navigate"])
def test_goals_are_columns_of_the_observation(dataset):
    plain, oracle = (find_world(f"{dataset}{kind}-v0") for kind in ("", "-oraclerep"))
    observation, goal = plain.reset(plain.env, 4, seed=3)
    _, asked = oracle.reset(oracle.env, 4, seed=3)
    assert plain.columns == oracle.columns and np.allclose(goal[plain.columns], asked, atol=1e-5)
    whole = find_world(f"{dataset}-v0", "observation")
    assert whole.columns == list(range(len(observation))) and whole.tasks == [1, 2, 3, 4, 5]
    assert np.array_equal(plain.reset(plain.env, 4, seed=3)[0], observation)


def test_ids(monkeypatch):
    monkeypatch.setattr(ogbench, "flat_data", lambda path, name, *_: name)  # of the flat copies
    assert find_world(PLAIN).data("x.npz", mac.Config()) == "goals"
    assert find_world(SINGLE).data("x.npz", mac.Config()) == SINGLE  # rewards are of a task
    world = find_world("cube-single-play-singletask-task3-v0")
    assert world.dataset == PLAIN and world.scripted and world.tasks == [3] and not world.columns
    for env_id in ("cube-duble-play-v0", "zzz", "cube-single-play-singletask-task6-v0"):
        with pytest.raises(MacError, match=f"--env {env_id}"):
            print(find_world(env_id).sizes)


def test_collected_data_do_not_depend_on_processes(tmp_path, monkeypatch):
    ogbench.collect(tmp_path / "x.npz", "cube-single-v0", 1)  # an episode of each split
    data, other = (dict(np.load(tmp_path / f"x-000{suffix}.npz")) for suffix in ("", "-val"))
    assert not np.array_equal(data["observations"], other["observations"])
    assert data["observations"].shape == (1001, 28) and np.abs(data["actions"]).max() <= 1
    assert data["terminals"].sum() == data["terminals"][-1] == 1
    monkeypatch.setattr(ogbench.oracle_env("cube-single-v0", 0.1)[0], "_max_episode_steps", 200)
    again = ogbench.collect_episode("cube-single-v0", 0.1, (0, 1, 0))  # its beginning
    assert sorted(data) == sorted(again) == ["actions", "observations", "qpos", "qvel", "terminals"]
    assert all(np.array_equal(data[key][:199], again[key][:199])
               and data[key].dtype == again[key].dtype for key in data)


def test_a_collection_is_in_shards_and_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    seeds = []

    def collect(function, jobs, *_):
        seeds.append(jobs if function.args == ("cube-single-v0", 0.3) else None)
        for _, split, i in jobs:
            if (i, len(seeds)) == (25, 1):
                raise KeyboardInterrupt
            yield {"x": np.full(1, split * 100 + i)}

    monkeypatch.setattr(ogbench, "in_processes", collect)
    monkeypatch.setattr(ogbench, "SHARD", 20)
    config = mac.Config(env=SINGLE, dataset_dir=str(tmp_path), collect=45, collect_noise=0.3)
    with pytest.raises(KeyboardInterrupt):
        find_world(SINGLE).find(config)
    names = [find_world(SINGLE).find(config)[0] for _ in range(2)]
    assert names == 2 * [f"{PLAIN}-collected45-noise0.3.npz"] and seeds[1:] == [seeds[0][24:]]
    x, y = (np.concatenate([np.load(file)["x"] for file in files])
            for files in data_files(tmp_path / names[0]))
    assert x.tolist() == [*range(100, 145)] and y.tolist() == [*range(5)]
    assert seeds[0] == [(0, number // 100, number % 100) for number in [
        0, 1, *x[:20], 2, 3, *x[20:40], 4, *x[40:]]]


def arrays():
    rng, widths = np.random.default_rng(0), {"observations": 28, "actions": 5, "qpos": 21}
    data = {key: rng.uniform(-1, 1, (40, width)).astype("f") for key, width in widths.items()}
    return {**data, "terminals": np.arange(40) % 20 == 19}


@pytest.mark.parametrize("size, count", [(None, 2), (5000, 2), (None, 1)])
def test_download_whole_cut_short_or_gone(size, count, tmp_path, monkeypatch, capsys):
    import ogbench.utils
    config = mac.Config(dataset_dir=str(tmp_path / "data"))
    names, collected = [f"{PLAIN}-val.npz", f"{PLAIN}.npz"], []
    for name in names[:count]:
        np.savez_compressed(tmp_path / name, **arrays())
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:size])
    monkeypatch.setattr(ogbench.utils, "DATASET_URL", tmp_path.as_uri())
    monkeypatch.setattr("support.ogbench.collect", lambda path, *_: collected.append(path.name))
    name, _ = find_world(SINGLE).find(config)
    with pytest.raises(MacError, match="download of antmaze-large-navigate-v0 .*; put "):
        find_world("antmaze-large-navigate-v0").find(config)  # nobody can collect these
    whole = size is None and count == 2
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == names * whole
    assert [name] == (names[1:] if whole else collected) and bool(collected) != whole
    assert (f"the download of {PLAIN} failed" in capsys.readouterr().out) != whole


@pytest.mark.parametrize("stem, suffix", [(PLAIN, ""), (PLAIN, "-val"), (f"{PLAIN}-000", "")])
def test_half_a_dataset_is_refused_and_not_replaced(stem, suffix, tmp_path):
    (tmp_path / f"{stem}{suffix}.npz").write_bytes(b"mine")
    with pytest.raises(MacError, match=f"put {stem}.npz and {stem}-val.npz into {tmp_path}"):
        find_world(SINGLE).find(mac.Config(dataset_dir=str(tmp_path)))
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"]


@pytest.mark.parametrize("change, message", [
    ({"observations": np.zeros((40, 27))}, "numbers, (40, 28)"),
    ({"terminals": np.arange(40) // 20 == np.arange(40) / 20}, [0, 20, 39]),  # the file ends
    ({"terminals": None, "dones": arrays()["terminals"] * 255.0}, [19, 39]),
    ({"terminals": np.arange(40) == 19, "timeouts": np.arange(40)[:, None] == 39}, [19, 39])])
def test_files_are_read_as_ogbench_means_them_or_refused(change, message, tmp_path):
    from ogbench.relabel_utils import relabel_dataset
    path, cube, data = tmp_path / "x.npz", find_world(SINGLE), arrays() | change
    cube.env.reset()  # some of the rewards are those of a success
    data["qpos"][::7, 14:17] = cube.env.unwrapped._data.mocap_pos[0]
    np.savez(path, **{key: array for key, array in data.items() if array is not None})
    if isinstance(message, str):
        with pytest.raises(MacError, match=f"^{path}.*{re.escape(message)}"):
            cube.read(path)
        return
    result = cube.read(path)
    assert result.ends.tolist() == message and not result.terminated.any()
    assert np.array_equal(result.observations, data["observations"])
    relabel_dataset(SINGLE, cube.env, data)
    kept = np.isin(np.arange(40), message, invert=True)  # the last actions have no use
    assert np.array_equal(result.actions[kept], data["actions"][kept])
    assert np.array_equal(result.rewards[kept], data["rewards"][kept])
    assert len(set(data["rewards"])) == 2 and not find_world(PLAIN).read(path).rewards.any()
