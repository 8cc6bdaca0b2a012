"""pytest: recordings of one's own are the episodes that were recorded, however they are written."""
import re
from unittest import mock

import numpy as np
import pytest

from support import recordings
from support.console import MacError

# Actions of each episode and how it ended; the file ends before the last one does.
OWN = [(5, "terminals"), (1, "terminals"), (4, "timeouts"), (1, "timeouts"), (3, "terminals"),
       (6, None)]
LOW, HIGH = np.float32([-1, 0]), np.float32([3, 10])  # of actions


def own_data(episodes=OWN):
    """Episodes as (states, actions, rewards, how it ended), and D4RL's flat arrays of them."""
    rng, result, rows = np.random.default_rng(0), [], []
    for length, how in episodes:
        states = rng.normal(size=(length + 1, 3)).astype(np.float32)
        actions = rng.uniform(LOW, HIGH, (length, 2)).astype(np.float32)
        rewards, last = rng.normal(size=length).astype(np.float32), np.arange(length) == length - 1
        result.append((states, actions, rewards, how))
        rows.append((states[:-1], actions, rewards, states[1:], last & (how == "terminals"),
                     last & (how == "timeouts")))
    keys = (*recordings.KEYS[:4], "terminals", "timeouts")
    return result, dict(zip(keys, map(np.concatenate, zip(*rows))))


def save(path, arrays):
    if path.suffix == ".npz":
        return np.savez(path, **arrays, note="mine")
    with pytest.importorskip("h5py").File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array


def write_d4rl(folder, episodes, flat):  # with columns of (N, 1), groups, both flags set
    flat["terminals"] |= flat["timeouts"]
    columns = {key: flat[key][:, None] for key in ("rewards", "terminals", "timeouts")}
    save(folder / "x.hdf5", {**flat, **columns, "infos/qpos": flat["actions"]})


def write_minari(folder, episodes, flat):  # with links to files beside it; 10 follows 9, not 1
    (folder / "data").mkdir()
    links = {}
    for i, (states, actions, rewards, how) in enumerate(episodes, 5):
        last, name = np.arange(len(actions)) == len(actions) - 1, f"additional_data_{i}.hdf5"
        arrays = {"observations": states, "actions": actions, "rewards": rewards,
                  "terminations": last & (how == "terminals"),
                  "truncations": last & (how == "timeouts")}
        save(folder / "data" / name, {f"episode_{i}/{key}": arrays[key] for key in arrays})
        links[f"episode_{i}"] = pytest.importorskip("h5py").ExternalLink(name, f"/episode_{i}")
    save(folder / "data" / "main_data.hdf5", links)


def write_folder(folder, episodes, flat):  # two episodes and half one, a copy, what is not data
    for name, part in (("b", slice(10, None)), ("a", slice(10)), ("a copy", slice(10))):
        save(folder / f"{name}.npz", {key: array[part] for key, array in flat.items()})
    (folder / "dangling.npz").symlink_to("gone.npz")


def read(path):
    """The episodes of both splits, sorted by their first states."""
    with mock.patch.object(recordings, "join", list):
        training, validation = recordings.read_folder(path, (None, None), LOW, HIGH)
    assert len(validation) == max(1, (len(training) + len(validation)) // 10)
    return sorted([*training, *validation], key=lambda episode: episode[0].tolist())


def assert_recorded(episodes, expected):
    expected = sorted(expected, key=lambda episode: episode[0].tolist())
    for (states, actions, rewards, ended), (s, a, r, how) in zip(episodes, expected, strict=True):
        assert np.array_equal(states, s) and np.array_equal(rewards[:-1], r)
        assert len(states) == len(actions) == len(rewards) and ended == (how == "terminals")
        assert np.allclose(LOW + (actions[:-1] + 1) / 2 * (HIGH - LOW), a, atol=1e-5)


@pytest.mark.parametrize("write, said", [
    (write_d4rl, ["2 rows set"]), (write_minari, ["6 copies"]), (write_folder, ["3 copies"])])
def test_files_hold_the_same_episodes_however_written(write, said, tmp_path, capsys):
    episodes, flat = own_data()
    write(tmp_path, episodes, flat)
    assert_recorded(read(tmp_path), episodes)
    assert re.findall(r"\d+ copies|\d rows set", capsys.readouterr().out) == said
    pair, again = (recordings.read_folder(tmp_path, (3, 2), LOW, HIGH) for _ in range(2))
    assert all(np.array_equal(a, b) for i in (0, 1) for a, b in zip(pair[i][:5], again[i]))


def without_final(s, a, r, how, begin=0):
    """What is known of an episode without its final state: where the task ended the last row is
    repeated; elsewhere it only shows where the action before it led."""
    if how == "terminals":
        return np.r_[s[begin:-1], s[-2:-1]], a[begin:], r[begin:], how
    return s[begin:-1], a[begin:-1], r[begin:-1], how


def test_without_next_observations_terminations_are_kept(tmp_path):
    episodes, flat = own_data()
    flat["actions"][[9, 10, 19]] = [[np.nan], [-99], [np.inf]]  # of ends that are no terminations
    del flat["next_observations"]
    save(tmp_path / "x.npz", flat)
    assert_recorded(read(tmp_path), [without_final(*episode) for episode in episodes])


@pytest.mark.parametrize("next_step", [False, True])
def test_recorded_resets_of_a_vector_environment_are_no_transitions(next_step, tmp_path):
    episodes, flat = own_data([(5, "terminals"), (4, "timeouts"), (3, "terminals"), (6, None)])
    ends, after = np.array([4, 8, 11]), np.array([5, 9, 12])
    resets, final = flat["observations"][after], flat["next_observations"][ends]
    if next_step:  # a row more after each end, whose action is ignored and which leads to the reset
        flat = {key: np.insert(array, after, array[ends], 0) for key, array in flat.items()}
        for key, value in (("observations", final), ("next_observations", resets),
                           ("terminals", False), ("timeouts", False)):
            flat[key][after + np.arange(3)] = value
    else:  # next_observations at an end is the next episode's first state: its row is left out, too
        flat["next_observations"][ends] = resets
    save(tmp_path / "x.npz", flat)
    begin, (*_, (s, a, r, how)) = 1 - next_step, episodes
    assert_recorded(read(tmp_path), [
        without_final(*episodes[0]), *(without_final(*one, begin) for one in episodes[1:3]),
        (s[begin:], a[begin:], r[begin:], how)])


@pytest.mark.parametrize("change, message", [
    (lambda d: d.pop("rewards"), "has no array 'rewards'"),
    (lambda d: [d.pop("terminals"), d.pop("timeouts")], "no episode ends in it"),
    (lambda d: d["actions"].__setitem__((7, 1), 11.5), r"actions\[7, 1\] is 11.5 .* -0.5 and 10.5"),
    (lambda d: d.update({key: array[np.arange(20).reshape(2, 10).T.flatten()]  # two environments
                         for key, array in d.items()}), "in 14 rows, the first 0, next_observ")])
def test_bad_recordings_are_named(change, message, tmp_path):
    path, (_, flat) = tmp_path / "x.npz", own_data()
    change(flat)
    save(path, flat)
    with pytest.raises(MacError, match=f"^{path}.*{message}"):
        read(path)


def test_files_that_are_no_flat_arrays_are_named(tmp_path):
    h5py = pytest.importorskip("h5py")
    (tmp_path / "x.pkl").write_bytes(b"")
    (tmp_path / "bad.h5").write_bytes(b"no HDF5")
    with h5py.File(tmp_path / "dict.h5", "w") as file:
        file["episode_0/observations/state"] = np.zeros((4, 3))
    for name, message in (("x.pkl", "data files end in"), ("bad.h5", "cannot read .*signature"),
                          ("dict.h5", "episode_0/observations is a group, as of a Dict space")):
        with pytest.raises(MacError, match=message):
            read(tmp_path / name)
    with mock.patch.object(h5py, "File", side_effect=OSError("unable to lock file, errno = 11")):
        with pytest.raises(MacError, match="may still write it, or set HDF5_USE_FILE_LOCKING"):
            read(tmp_path / "bad.h5")
