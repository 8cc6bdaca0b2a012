"""pytest: data sets are laid down flat once, whole, and told from one another."""
import concurrent.futures
import itertools
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
    """A folder with the shards, the second without validation, and what is not of them."""
    for suffix, i in itertools.product(("", "-val"), range(3)):
        if (suffix, i) != ("-val", 1):
            np.savez(tmp_path / f"x-{999 * i:03}{suffix}.npz", *shard(i, len(suffix) // 4)[:5])
    (tmp_path / "x-collected5-000.npz").touch()
    return tmp_path


def flat(folder, name="goals", read=read, cache_dir=""):
    return data.flat_data(folder / "x.npz", name, read, types.SimpleNamespace(cache_dir=cache_dir))


def same(some, others):
    return all(np.array_equal(a, b) and a.dtype == b.dtype
               for pair in zip(some, others, strict=True) for a, b in zip(*pair))


def test_ragged_shards_are_one_data_set_that_is_read_once(folder, tmp_path_factory):
    one, cache = tmp_path_factory.mktemp("one"), str(tmp_path_factory.mktemp("cache"))
    for part, suffix in zip(WHOLE, ("", "-val")):
        np.savez(one / f"x{suffix}.npz", *part[:5])
    for place, how in itertools.product((folder, one), (read, None)):  # None: it is not read again
        assert same(flat(place, read=how, cache_dir=cache), WHOLE)  # each has a folder there
    once = mock.Mock(wraps=read)  # for another id's rewards; of three at once two wait
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: flat(folder, "other", once), range(3)))
    assert all(same(result, WHOLE) for result in results) and once.call_count == 5


def test_what_was_interrupted_damaged_or_changed_is_laid_down_anew(folder):
    stopped = mock.Mock(wraps=read, side_effect=[mock.DEFAULT, KeyboardInterrupt])
    with mock.patch.object(data.shutil, "rmtree"), pytest.raises(KeyboardInterrupt):
        flat(folder, read=stopped)  # as if killed: nothing tidies up
    for name in ("observations", "actions", "rewards", "index.json"):
        for damage in (lambda data: b"", lambda data: data[:-8], lambda data: bytes(len(data))):
            for path in folder.rglob(name):
                damaged = damage(path.read_bytes())
                path.unlink()
                path.write_bytes(damaged)
            assert same(flat(folder), WHOLE) and same(flat(folder, read=None), WHOLE)
    before, changed = flat(folder)[0], shard(0, 1)
    np.savez(folder / "x-000.npz", *changed[:5])
    assert same(flat(folder)[:1], [together(changed, shard(1), shard(2))])
    (folder / "x-1998.npz").unlink()
    assert same(flat(folder)[:1], [together(changed, shard(1))])
    assert same([before], WHOLE[:1])  # what another run has mapped stays
    assert len(list(folder.rglob("observations"))) == 2  # and takes no disk after it
