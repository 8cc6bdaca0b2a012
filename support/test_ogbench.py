"""pytest: OGBench's ids, goals, files and downloads, and the data that are collected here."""
import http.server
import io
import re
import subprocess
import sys
import threading

import numpy as np
import pytest

import mac
from support import ogbench
from support.console import MacError
from support.data import data_files
from support.episodes import import_simulators
from support.test_common import NET, SINGLE, failing
from support.worlds import find_world

PLAIN = "cube-single-play-v0"


@pytest.mark.parametrize("dataset", [
    "cube-double-play", "scene-play", "puzzle-3x3-play", "pointmaze-medium-navigate",
    "antmaze-medium-navigate", "humanoidmaze-medium-navigate", "antsoccer-arena-navigate"])
def test_goals_are_columns_of_the_observation(dataset):
    from ogbench.relabel_utils import add_oracle_reps
    plain, oracle = (find_world(f"{dataset}{kind}-v0") for kind in ("", "-oraclerep"))
    observation, goal = plain.reset(plain.env, 4, seed=3)
    _, oracle_goal = oracle.reset(oracle.env, 4, seed=3)
    assert plain.columns == oracle.columns
    assert np.allclose(goal[plain.columns], oracle_goal, atol=1e-5)
    base = plain.env.unwrapped
    data = {"qpos": (base.data if hasattr(base, "data") else base._data).qpos[None].copy()}
    if plain.family in ("scene", "puzzle"):
        data["button_states"] = base._cur_button_states[None].copy()
    add_oracle_reps(dataset, plain.env, data)
    assert np.allclose(observation[plain.columns], data["oracle_reps"][0], atol=1e-5)
    whole = find_world(f"{dataset}-v0", "observation")
    assert whole.columns == list(range(whole.sizes[0])) and whole.tasks == [1, 2, 3, 4, 5]
    assert np.array_equal(plain.reset(plain.env, 4, seed=3)[0], observation)


def test_ids_are_those_of_ogbenchs_datasets(monkeypatch):
    _, gymnasium = import_simulators()
    for env_id in ("cube-octuple-play-v0", "puzzle-4x6-noisy-oraclerep-v0", "scene-play-v0",
                   "antmaze-teleport-explore-v0", "humanoidmaze-giant-stitch-singletask-task5-v0"):
        world = find_world(env_id)
        assert re.sub("-(play|noisy|explore|stitch)", "", world.dataset) in gymnasium.registry
        assert world.scripted == ("-play-" in env_id)
    world = find_world("cube-single-play-singletask-task3-v0")
    assert world.tasks == [3] and world.columns == []
    for env_id in ("cube-duble-play-v0", "zzz", "cube-single-play-singletask-task6-v0"):
        with pytest.raises(MacError, match=f"--env {env_id}"):
            print(find_world(env_id).sizes)
    with pytest.raises(MacError, match="--goal observation"):
        find_world("cube-single-play-oraclerep-v0", "observation")
    monkeypatch.setenv("MUJOCO_GL", "foo")
    program = [sys.executable, "-c", "import sys, mac; sys.exit(mac.main())", "--env", SINGLE]
    process = subprocess.run(program, capture_output=True, text=True)
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert process.stderr.startswith("error: OGBench does not start with MUJOCO_GL=foo")


def test_collected_data_do_not_depend_on_processes(tmp_path, monkeypatch):
    ogbench.collect(tmp_path / "x.npz", "cube-single-v0", 1)  # an episode of each split
    with np.load(tmp_path / "x-000.npz") as file, np.load(tmp_path / "x-000-val.npz") as other:
        data = dict(file)
        assert not np.array_equal(data["observations"], other["observations"])
    assert data["observations"].shape == (1001, 28) and np.abs(data["actions"]).max() <= 1
    assert data["terminals"].sum() == data["terminals"][-1] == 1
    monkeypatch.setattr(ogbench.oracle_env("cube-single-v0", 0.1)[0], "_max_episode_steps", 200)
    again = ogbench.collect_episode("cube-single-v0", 0.1, (0, 1, 0))  # its beginning
    assert sorted(data) == sorted(again) == ["actions", "observations", "qpos", "qvel", "terminals"]
    assert all(np.array_equal(data[key][:199], again[key][:199])
               and data[key].dtype == again[key].dtype for key in data)


def test_a_collection_is_in_shards_and_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    seeds, fails, given, path = [], [25], [], tmp_path / "data.npz"

    def collect(function, jobs, *_):
        seeds.append(jobs)
        given.append(function.args)
        for _, split, i in jobs:
            if i in fails:
                fails.remove(i)
                raise KeyboardInterrupt
            yield {"x": np.full(2, split * 100 + i)}

    monkeypatch.setattr(ogbench, "in_processes", collect)
    monkeypatch.setattr(ogbench, "SHARD", 20)
    with pytest.raises(KeyboardInterrupt):
        ogbench.collect(path, "any", 45)
    (first,), _ = data_files(path)
    mine = first.read_bytes() + b"mine"
    first.write_bytes(mine)
    for _ in range(2):  # the second time there is nothing to do
        ogbench.collect(path, "any", 45)
    shards = [[(0, 0, i) for i in range(a // 10, max(b // 10, a // 10 + 1))]
              + [(0, 1, i) for i in range(a, b)] for a, b in ((0, 20), (20, 40), (40, 45))]
    assert seeds == [sum(shards, []), shards[1][2:] + shards[2]] and first.read_bytes() == mine
    x, y = ([np.load(file)["x"] for file in files] for files in data_files(path))
    assert np.concatenate(x).tolist() == np.repeat(100 + np.arange(45), 2).tolist()
    assert np.concatenate(y).tolist() == np.repeat(np.arange(5), 2).tolist() and len(y) == 3
    for noise, suffix in ((0.1, ""), (0.3, "-noise0.3"), (0.30000001, "-noise0.30000001")):
        config = mac.Config(env=SINGLE, dataset_dir=str(tmp_path), collect=5, collect_noise=noise)
        name, source = find_world(SINGLE).find(config)
        assert name == f"{PLAIN[:-3]}-v0-collected5{suffix}.npz" and "5 episodes of" in source
        assert given[-1] == ("cube-single-v0", noise)


# ------------------------------------------------------------------------------ files

def arrays(seed=0):
    rng, widths = np.random.default_rng(seed), {"observations": 28, "actions": 5, "qpos": 21}
    data = {key: rng.uniform(-1, 1, (40, width)).astype("f") for key, width in widths.items()}
    return {**data, "terminals": np.arange(40) % 20 == 19}


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`; says the full length and sends only the first `cut` bytes."""

    def do_GET(self):
        data = self.files.get(self.path.rsplit("/", 1)[1])
        self.send_response(200 if data else 404)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        self.wfile.write((data or b"")[:self.cut])


@pytest.mark.parametrize("cut, count", [(None, 2), (5000, 2), (None, 1), (None, 0)])
def test_download_whole_cut_short_or_gone(cut, count, tmp_path, monkeypatch, capsys):
    import ogbench.utils
    names, buffer, collected = [f"{PLAIN}.npz", f"{PLAIN}-val.npz"], io.BytesIO(), []
    np.savez_compressed(buffer, **arrays())
    Server.files, Server.cut = {name: buffer.getvalue() for name in names[:count]}, cut
    monkeypatch.setattr("support.ogbench.collect", lambda path, *_: collected.append(path.name))
    whole, config = cut is None and count == 2, mac.Config(dataset_dir=str(tmp_path / "data"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(ogbench.utils, "DATASET_URL", f"http://127.0.0.1:{server.server_port}")
        name, _ = find_world(SINGLE).find(config)
        with pytest.raises(MacError, match="download of antmaze-large-navigate-v0 .*; put "):
            find_world("antmaze-large-navigate-v0").find(config)  # nobody can collect these
        server.shutdown()
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == sorted(names) * whole
    assert name == (names[0] if whole else f"{PLAIN}-collected1000.npz")
    assert collected == [name] * (not whole)
    assert (f"the download of {PLAIN} failed" in capsys.readouterr().out) != whole


@pytest.mark.parametrize("name", ["", "-val", "-000"])
def test_half_a_dataset_is_refused_and_not_replaced(name, tmp_path, capsys):
    mine = tmp_path / f"{PLAIN}{name}.npz"
    mine.write_bytes(b"mine")
    wanted = f"{PLAIN}{name}".replace("-val", "")
    command = ["--env", SINGLE, "--eval-interval", "0", "--save-dir", str(tmp_path / "run")]
    assert f"put {wanted}.npz and {wanted}-val.npz into {tmp_path}" in failing(
        capsys, *command, "--dataset-dir", str(tmp_path))
    assert mine.read_bytes() == b"mine" and [p.name for p in tmp_path.iterdir()] == [mine.name]


@pytest.mark.parametrize("change, message", [
    ({"terminals": None}, "has no array 'terminals'"), ({"qpos": None}, "has no array 'qpos'"),
    ({"observations": np.zeros((40, 27))}, "numbers, (40, 28)"),
    ({"terminals": np.arange(40) // 20 == np.arange(40) / 20}, [0, 20, 39]),  # the file ends
    ({"terminals": None, "dones": arrays()["terminals"] * 255.0}, [19, 39]),
    ({"terminals": np.arange(40) == 19, "timeouts": np.arange(40)[:, None] == 39}, [19, 39])])
def test_files_are_read_as_ogbench_means_them_or_refused(change, message, tmp_path):
    data = {key: array for key, array in {**arrays(), **change}.items() if array is not None}
    np.savez(tmp_path / "x.npz", **data, info=np.array([{}], object))  # which nobody reads
    if isinstance(message, str):
        with pytest.raises(MacError, match=f"^{tmp_path / 'x.npz'}.*{re.escape(message)}"):
            find_world(SINGLE).read(tmp_path / "x.npz")
    else:
        result = find_world(SINGLE).read(tmp_path / "x.npz")
        assert result.ends.tolist() == message and not result.terminated.any()
        assert np.array_equal(result.observations, data["observations"])
        kept = np.isin(np.arange(40), message, invert=True)  # the last action of each is not used
        assert np.array_equal(result.actions[kept], data["actions"][kept])


def test_a_run_on_shards_is_a_run_on_one_file_with_rewards_of_its_task(tmp_path):
    from ogbench.relabel_utils import relabel_dataset
    cube, parts, rewards, one = find_world(SINGLE), [], [], tmp_path / "one"
    for i in range(2):
        parts.append(arrays(i))
        cube.env.reset()  # some of the rewards are those of a success
        parts[i]["qpos"][i::7, 14:17] = cube.env.unwrapped._data.mocap_pos[0]
        relabel_dataset(SINGLE, cube.env, told := dict(parts[i]))
        rewards.extend(told["rewards"])
    one.mkdir()
    for suffix in ("", "-val"):
        for i, part in enumerate(parts):
            np.savez(tmp_path / f"{PLAIN}-00{i}{suffix}.npz", **part)
        np.savez(one / f"{PLAIN}{suffix}.npz", **{
            key: np.concatenate([part[key] for part in parts]) for key in parts[0]})
    config, plain = mac.Config(dataset_dir=str(tmp_path)), find_world(PLAIN)
    for part in cube.data(cube.find(config)[0], config):
        assert np.array_equal(part.rewards, rewards) and len(set(rewards)) == 2
    assert not plain.data(plain.find(config)[0], config)[0].rewards.any()
    states = []
    for name, folder in (("run1", tmp_path), ("run2", one)):
        assert mac.main(["--env", SINGLE, *NET, "--steps", "3", "--window", "30", "--save-dir", str(
            tmp_path / name), "--eval-interval", "0", "--dataset-dir", str(folder)]) == 0
        states.append(mac.load(tmp_path / name).state_dict())
    assert all(np.array_equal(value, states[1][key]) for key, value in states[0].items())
