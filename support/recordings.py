"""Recordings: files with a row per action are checked and cut into episodes."""
import hashlib

import numpy as np

from support.console import MacError, say
from support.data import Trajectories
from support.files import check, read_arrays

TERMINALS, TIMEOUTS = ("terminals", "terminations"), ("timeouts", "truncations")
KEYS = ("observations", "actions", "rewards", "next_observations", *TERMINALS, *TIMEOUTS)
SUFFIXES = ".npz", ".hdf5", ".h5"


def read_folder(path, sizes, low, high):
    """A file of one's own, or those of a folder. A tenth of the episodes, at least one, is
    validation, the same ones each time. -> a pair of Trajectories. Raises MacError."""
    files, episodes = [path], {}
    if path.is_dir():
        inside = [*path.iterdir(), *(path / "data").glob("*")]  # Minari has a folder data/
        files = sorted(file for file in inside if file.suffix.lower() in SUFFIXES
                       and file.is_file() and not file.name.startswith("."))
    for file in files:
        if file.suffix.lower() not in SUFFIXES:
            raise MacError(f"{file}: data files end in {SUFFIXES}")
        read = read_episodes(file, one_table(file, read_arrays(file, KEYS)), *sizes, low, high)
        sizes, before = (read[0][0].shape[1], read[0][1].shape[1]), len(episodes)
        for episode in read:  # a copy could be in both training and validation
            key = hashlib.sha256(b"".join(map(np.ascontiguousarray, episode[:3]))).digest()
            episodes.setdefault(key, episode)
        if (copies := before + len(read) - len(episodes)):
            say(f"WARNING: {file}: {copies} copies of episodes are left out")
    if len(episodes) < 2:
        raise MacError(f"{path}: {len(episodes)} episodes in {len(files)} files ({SUFFIXES}, not "
                       ".arrow); there must be at least two, one of them for validation")
    episodes, order = list(episodes.values()), np.random.default_rng(0).permutation(len(episodes))
    validation, training = np.split(order, [max(1, len(order) // 10)])
    return [join([episodes[i] for i in sorted(part)]) for part in (training, validation)]


def one_table(path, groups):
    """All `groups` (an episode each, or a whole file) as one, with a row per action."""
    tables = list(groups.values())
    for group, arrays in groups.items():
        for key in KEYS[:3]:
            if key not in arrays:
                raise MacError(f"{path}: has no array '{group}{key}'")
        states, rows = arrays["observations"], len(np.atleast_1d(arrays["actions"]))
        if states.shape[:1] == (rows + 1,):  # Minari's have the final observation
            arrays.update(observations=states[:-1], next_observations=states[1:])
            if not any(np.any(arrays[key]) for key in KEYS[4:] if key in arrays):
                arrays["timeouts"] = np.arange(rows) == rows - 1
    try:
        return {key: np.concatenate([table[key] for table in tables]) if tables[1:] else array
                for key, array in tables[0].items()}
    except (KeyError, ValueError) as error:
        raise MacError(f"{path}: the episodes differ in their arrays ({error})") from error


def read_episodes(path, arrays, observation_size, action_size, low=-1, high=1):
    """The episodes in a table with a row per action. One ends where the task ended (`terminals`) or
    the recording stopped (`timeouts`), and with the table. Its final state is in
    `next_observations`. Without that, the last row stands for it and loses its action; but where
    the task ended the last observation is repeated. Sizes may be None; actions are rescaled from
    the box `low`, `high` (A,) to [-1, 1]. -> list of (states (L, O), actions (L, A), rewards (L,),
    terminated); the last action and reward have no use. Raises MacError."""
    low, high, count = np.float32(low), np.float32(high), len(np.atleast_1d(arrays["actions"]))
    terminated, stopped = (np.any([np.zeros(count), *(check(path, key, arrays[key], (count,))
                                                      for key in keys if key in arrays)], axis=0)
                           for keys in (TERMINALS, TIMEOUTS))
    if not (terminated | stopped).any():
        raise MacError(f"{path}: no episode ends in it; set 'terminals' where the task ended, "
                       "'timeouts' where the recording stopped")
    if (both := terminated & stopped).any():  # stable-baselines3's dones include time limits
        say(f"WARNING: {path}: {both.sum()} rows set 'terminals' and 'timeouts': time limits")
        terminated &= ~stopped
    states = check(path, "observations", arrays["observations"], (count, observation_size))
    rewards = check(path, "rewards", arrays["rewards"], (count,))
    ends = np.unique([*np.flatnonzero(terminated | stopped), count - 1])
    begins, known = np.append(0, ends[:-1] + 1), np.full(len(ends), "next_observations" in arrays)
    if known[0]:
        final = check(path, "next_observations", arrays["next_observations"], states.shape)
        follows = (final[:-1] == states[1:]).all(1)  # (count - 1,) whether the next row does
        lost = ~follows & ~(terminated | stopped)[:-1]
        if lost.any():
            text = (f"{path}: in {lost.sum()} rows, the first {lost.argmax()}, next_observations "
                    "differs from the next row: are ends missing, or rows not sorted by episode?")
            if lost.sum() > count / 2:
                raise MacError(text)
            say(f"WARNING: {text}")
        resets = np.flatnonzero(follows[ends[:-1]])
        if len(resets):  # one of the rows on both sides leads to a reset
            say(f"WARNING: {path}: {len(resets)} episodes, the first at row {ends[resets[0]]}, end "
                "where the next begins: a vector environment recorded resets; 2 rows each left out")
            known[resets] = False
            begins[resets + 1] += 1
    elif terminated.any():
        say(f"WARNING: {path} has no next_observations: the last observation is repeated as the "
            f"final state of {terminated.sum()} episodes that terminated")
    actions = np.array(arrays["actions"])
    if actions.dtype.kind == "f":
        actions[ends[~known & ~terminated[ends]]] = 0  # not used, whatever they are
    slack = 0.05 * (high - low)
    actions = check(path, "actions", actions, (count, action_size), low - slack, high + slack)
    actions = (actions - (low + high) / 2) / ((high - low) / 2)
    episodes = []
    for begin, end, is_known in zip(begins, ends + 1, known):
        more = final[end - 1:end] if is_known else states[end - 1:end - 1 + terminated[end - 1]]
        pad = (0, len(more))
        if begin < end:
            episodes.append((np.concatenate([states[begin:end], more]),
                             np.pad(actions[begin:end], (pad, (0, 0))),
                             np.pad(rewards[begin:end], pad), terminated[end - 1]))
    return episodes


def join(episodes):
    """Trajectories of what `read_episodes` returns."""
    states, actions, rewards, terminated = zip(*episodes)
    ends = np.cumsum([len(array) for array in states]) - 1
    return Trajectories(np.concatenate(states), np.concatenate(actions), ends,
                        np.concatenate(rewards), np.array(terminated))
