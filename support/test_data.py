"""pytest: data sets are laid down flat once, whole, and told from one another."""
import concurrent.futures
import errno
import os
import resource
import types
from unittest import mock

import numpy as np
import pytest

from support import data
from support.console import MacError
from support.data import Trajectories
from support.test_common import refuse

PARTS = ((25, 12, 31), (14,), (40, 13))  # states of each shard's trajectories


def shard(i, split=0):
    rng, rows = np.random.default_rng((i, split)), sum(PARTS[i])
    return Trajectories(*(rng.normal(size=(rows, width)).astype(np.float32) for width in (3, 2)),
                        np.cumsum(PARTS[i]) - 1, rng.normal(size=rows).astype(np.float32),
                        np.zeros(len(PARTS[i]), bool))


def save(path, trajectories):
    np.savez(path, **trajectories._replace(limits=0)._asdict())


def read(path):
    with np.load(path) as file:
        return Trajectories(*(file[name] for name in Trajectories._fields[:5]))


def together(*parts):
    """What the shards are as a single file."""
    joined = [np.concatenate(arrays) for arrays in zip(*(part[:5] for part in parts))]
    joined[2] = np.cumsum([n for part in parts for n in np.diff(part.ends, prepend=-1)]) - 1
    return Trajectories(*joined, np.stack([joined[0].min(0), joined[0].max(0)]))


@pytest.fixture
def folders(tmp_path):
    """The same data as shards, the second without validation, and as one file."""
    many, one = tmp_path / "many", tmp_path / "one"
    for folder in (many, one):
        folder.mkdir()
    for split, suffix, indices in ((0, "", (0, 1, 2)), (1, "-val", (0, 2))):
        for i in indices:
            save(many / f"x-{i:03}{suffix}.npz", shard(i, split))
        save(one / f"x{suffix}.npz", together(*(shard(i, split) for i in indices)))
    return many, one


def flat(folder, cache_dir="", window=0, name="goals", read=read):
    config = types.SimpleNamespace(cache_dir=str(cache_dir), window=window)
    return data.flat_data(folder / "x.npz", name, read, config)


def same(some, others):
    return all(np.array_equal(a, b) and a.dtype == b.dtype
               for pair in zip(some, others, strict=True) for a, b in zip(*pair))


def test_ragged_shards_are_one_data_set_that_is_read_once(folders):
    expected = together(*map(shard, range(3))), together(shard(0, 1), shard(2, 1))
    assert same(flat(folders[0]), expected) and same(flat(folders[1]), expected)
    assert same(flat(folders[0], read=None), expected)  # another start reads none of them
    assert isinstance(flat(folders[0])[0].observations, np.memmap)
    once = mock.Mock(wraps=read)  # for another id's rewards; of three at once two wait
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: flat(folders[0], name="other", read=once), range(3)))
    assert all(same(result, expected) for result in results) and once.call_count == 5


def test_an_interrupted_laying_down_leaves_nothing_and_starts_over(folders):
    stopped = {"read": mock.Mock(wraps=read, side_effect=[mock.DEFAULT, KeyboardInterrupt] * 2)}
    with pytest.raises(KeyboardInterrupt):
        flat(folders[0], **stopped)
    assert not list(folders[0].rglob("observations"))
    with mock.patch.object(data.shutil, "rmtree"), pytest.raises(KeyboardInterrupt):
        flat(folders[0], **stopped)  # as if killed: nothing tidies up
    assert same(flat(folders[0]), flat(folders[1]))
    assert len(list(folders[0].rglob("observations"))) == 2


def test_changed_and_fewer_shards_are_laid_down_anew(folders):
    before, first = flat(folders[0])[0], shard(0)
    copy = np.array(before.observations)
    fewer = {name: getattr(first, name)[25:] for name in ("observations", "actions", "rewards")}
    for count, first in ((3, first._replace(actions=first.actions / 2)),
                         (3, first._replace(**fewer, ends=first.ends[1:] - 25,
                                            terminated=first.terminated[1:])), (2, first)):
        if count == 2:
            (folders[0] / "x-002.npz").unlink()
        save(folders[0] / "x-000.npz", first)
        assert same(flat(folders[0])[:1], [together(*[first, shard(1), shard(2)][:count])])
    assert np.array_equal(before.observations, copy)  # what another run has mapped stays
    assert len(list(folders[0].rglob("observations"))) == 2  # and takes no disk after it


@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "index.json"])
@pytest.mark.parametrize("damage", [b"", slice(-8), "zeros"])
def test_what_was_damaged_later_is_laid_down_again(name, damage, folders):
    expected = [Trajectories(*map(np.array, part)) for part in flat(folders[0])]
    for path in folders[0].rglob(name):
        whole = path.read_bytes()
        path.unlink()
        path.write_bytes(bytes(len(whole)) if damage == "zeros" else
                         whole[damage] if isinstance(damage, slice) else damage)
    assert same(flat(folders[0]), expected) and same(flat(folders[0], read=None), expected)


def test_a_full_disk_and_a_folder_without_permission_are_one_line(folders, tmp_path):
    mine = {path: path.read_bytes() for path in folders[0].iterdir()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(MacError, match="cannot .*many/flat.*File too large"):
            flat(folders[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    for module, function, number in ((os, "replace", errno.ENOSPC), (data, "lock", errno.EACCES)):
        with mock.patch.object(module, function, refuse(number)), pytest.raises(
                MacError, match=f"cannot .*many/flat.*{os.strerror(number)}"):
            flat(folders[0])
    assert not list(folders[0].rglob("observations"))
    cache = tmp_path / "cache"
    assert same(flat(folders[0], cache), flat(folders[1], cache))  # each has a folder in it
    assert len(list(cache.rglob("observations"))) == 4
    assert all(path.read_bytes() == whole for path, whole in mine.items())


def test_a_fingerprint_tells_data_sets_apart():
    mine = shard(0)
    changes = {"rewards": 10 * mine.rewards, "actions": -mine.actions, "terminated": mine.ends > 0,
               "ends": mine.ends - [1, 0, 0], "observations": mine.observations + 1}
    prints = {data.fingerprint(mine._replace(**{name: array})) for name, array in changes.items()}
    assert len(prints | {data.fingerprint(mine)}) == 6
    copy = Trajectories(*map(np.array, mine[:5]), limits=np.zeros((2, 3)))
    copy = copy._replace(observations=np.asfortranarray(mine.observations))
    assert data.fingerprint(copy) == data.fingerprint(mine)


def test_shards_are_in_the_order_of_their_numbers(tmp_path):
    names = ["x-000", "x-002", "x-999", "x-1000", "x-10000"]
    for name in (*names, "x-collected5", "x-collected5-000", "xy-001"):
        (tmp_path / f"{name}.npz").touch()
        (tmp_path / f"{name}-val.npz").touch()
    assert [[file.name for file in files] for files in data.data_files(tmp_path / "x.npz")] == [
        [f"{name}{suffix}.npz" for name in names] for suffix in ("", "-val")]
    (tmp_path / "x.npz").touch()  # a whole file comes before shards
    assert data.data_files(tmp_path / "x.npz")[0] == [tmp_path / "x.npz"]
