"""Record episodes of a simulator, here by a clumsy controller, as data for mac.py.

    python examples/record.py  # 300 episodes of Reacher-v5 -> reacher.npz
    python mac.py --env Reacher-v5 --data reacher.npz --small
    python eval.py exp/Reacher-v5-seed0 --execute 1 --episodes 50
"""
import pathlib
import sys

import gymnasium
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # where support/ is
from support import console


def controller(s, rng):
    """Torques of a force that draws the fingertip to the target, damped and noisy."""
    a = np.arctan2(s[2], s[0])
    b = a + np.arctan2(s[3], s[1])
    jacobian = np.array([[-0.10 * np.sin(a) - 0.11 * np.sin(b), -0.11 * np.sin(b)],
                         [0.10 * np.cos(a) + 0.11 * np.cos(b), 0.11 * np.cos(b)]])
    return np.clip(-8 * jacobian.T @ s[8:10] - 0.03 * s[6:8] + rng.normal(0, 0.3, 2), -1, 1)


@console.command
def main(argv):
    parser = console.Parser(description="Record episodes of Reacher-v5.")
    parser.add_argument("file", nargs="?", type=pathlib.Path, default="reacher.npz",
                        help="a new file (default: reacher.npz)")
    parser.add_argument("--episodes", type=int, default=300, help="default: 300")
    args = parser.parse_args(argv)
    if args.file.suffix != ".npz" or args.file.exists() or args.episodes < 2:
        raise console.MacError(f"{args.file} must be a new .npz file, of two episodes or more")
    names = "observations", "actions", "rewards", "terminals", "timeouts", "next_observations"
    env, rng, rows = gymnasium.make("Reacher-v5"), np.random.default_rng(0), []
    for episode in range(args.episodes):
        (observation, _), done = env.reset(seed=episode), False
        while not done:
            action = controller(observation, rng)
            following, reward, terminated, truncated, _ = env.step(action)
            rows.append((observation, action, reward, terminated, truncated, following))  # names
            observation, done = following, terminated or truncated
    np.savez(args.file, **{name: np.array(column) for name, column in zip(names, zip(*rows))})
    console.say(f"wrote {args.file}: {args.episodes} episodes")


if __name__ == "__main__":
    sys.exit(main())
