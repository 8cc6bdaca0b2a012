"""pytest: data sets are laid down flat once, whole, and told from one another."""
import concurrent.futures
import types
from unittest import mock

import numpy as np
import pytest

from support import data
from support.data import Trajectories

PARTS = ((25, 12, 31), (14,), (40, 13))  # states of each shard's trajectories


def shard(i, split=0):
    rng, rows = np.random.default_rng((i, split)), sum(PARTS[i])
    return Trajectories(*(rng.normal(size=(rows, width)).astype(np.float32) for width in (3, 2)),
                        np.cumsum(PARTS[i]) - 1, rng.normal(size=rows).astype(np.float32),
                        np.zeros(len(PARTS[i]), bool))


def read(path):
    with np.load(path) as file:
        return Trajectories(*(file[name] for name in file))


def together(*parts):
    """What the shards are as a single file."""
    joined = [np.concatenate(arrays) for arrays in zip(*(part[:5] for part in parts))]
    joined[2] = np.cumsum([n for part in parts for n in np.diff(part.ends, prepend=-1)]) - 1
    return Trajectories(*joined, np.stack([joined[0].min(0), joined[0].max(0)]))


WHOLE = together(*map(shard, range(3))), together(shard(0, 1), shard(2, 1))


@pytest.fixture
def folder(tmp_path):
    """A folder with the shards, the second without validation."""
    for split, suffix, indices in ((0, "", (0, 1, 2)), (1, "-val", (0, 2))):
        for i in indices:
            np.savez(tmp_path / f"x-{i:03}{suffix}.npz", *shard(i, split)[:5])
    return tmp_path


def flat(folder, name="goals", read=read, cache_dir=""):
    config = types.SimpleNamespace(cache_dir=str(cache_dir))
    return data.flat_data(folder / "x.npz", name, read, config)


def same(some, others):
    return all(np.array_equal(a, b) and a.dtype == b.dtype
               for pair in zip(some, others, strict=True) for a, b in zip(*pair))


def test_ragged_shards_are_one_data_set_that_is_read_once(folder, tmp_path_factory):
    one, cache = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("cache")
    for part, suffix in zip(WHOLE, ("", "-val")):
        np.savez(one / f"x{suffix}.npz", *part[:5])
    for place in (folder, one):  # each has a folder in the cache
        assert same(flat(place, cache_dir=cache), WHOLE)
        assert same(flat(place, read=None, cache_dir=cache), WHOLE)
    once = mock.Mock(wraps=read)  # for another id's rewards; of three at once two wait
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: flat(folder, "other", once), range(3)))
    assert all(same(result, WHOLE) for result in results) and once.call_count == 5


def test_an_interrupted_laying_down_leaves_nothing_and_starts_over(folder):
    stopped = mock.Mock(wraps=read, side_effect=[mock.DEFAULT, KeyboardInterrupt] * 2)
    with pytest.raises(KeyboardInterrupt):
        flat(folder, read=stopped)
    assert not list(folder.rglob("observations"))
    with mock.patch.object(data.shutil, "rmtree"), pytest.raises(KeyboardInterrupt):
        flat(folder, read=stopped)  # as if killed: nothing tidies up
    assert same(flat(folder), WHOLE) and len(list(folder.rglob("observations"))) == 2


def test_changed_and_fewer_shards_are_laid_down_anew(folder):
    before, first = flat(folder)[0], shard(0)
    changed = first._replace(actions=first.actions / 2)
    np.savez(folder / "x-000.npz", *changed[:5])
    assert same(flat(folder)[:1], [together(changed, shard(1), shard(2))])
    (folder / "x-002.npz").unlink()
    assert same(flat(folder)[:1], [together(changed, shard(1))])
    assert same([before], WHOLE[:1])  # what another run has mapped stays
    assert len(list(folder.rglob("observations"))) == 2  # and takes no disk after it


@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "index.json"])
def test_what_was_damaged_later_is_laid_down_again(name, folder):
    flat(folder)
    for damage in (lambda whole: b"", lambda whole: whole[:-8], lambda whole: bytes(len(whole))):
        for path in folder.rglob(name):
            damaged = damage(path.read_bytes())
            path.unlink()
            path.write_bytes(damaged)
        assert same(flat(folder), WHOLE) and same(flat(folder, read=None), WHOLE)


def test_shards_are_in_the_order_of_their_numbers(tmp_path):
    names = ["x-000", "x-002", "x-999", "x-1000"]
    for name in (*names, "x-collected5-000", "xy-001", *(f"{name}-val" for name in names)):
        (tmp_path / f"{name}.npz").touch()
    assert [[file.stem for file in files] for files in data.data_files(tmp_path / "x.npz")] == [
        names, [f"{name}-val" for name in names]]
    (tmp_path / "x.npz").touch()  # a whole file comes before shards
    assert data.data_files(tmp_path / "x.npz")[0] == [tmp_path / "x.npz"]
