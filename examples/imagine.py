"""100 steps of an agent as the simulator and as its model has them, the same actions in both.

    python examples/imagine.py exp/<run> out.png  # the four coordinates that vary most
    python examples/imagine.py exp/<run> out.gif  # a film (OGBench's tasks only)

The film has the simulator on the left, on the right the logged states nearest to the model's.
"""
import os
import pathlib
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # where mac.py is
import mac
from support import console, files, worlds
from support.data import data_files


def play(world, agent, steps, seed):
    """-> states of the simulator (T+1, O), images of it, the model's normalised states (H+1, O)"""
    state, goal = world.reset(world.env, world.tasks[0], seed)
    states, images = [np.array(state)], []  # copies: simulators may use an array again
    horizon = max(1, steps // agent.config.chunk)
    rollout = agent.imagine(*agent.prepare(state, goal), torch.Generator().manual_seed(seed),
                            horizon, agent.config.eval_candidates)
    for action in rollout.chunks.view(-1, agent.sizes[1]).numpy():
        images.append(world.env.render() if world.pixels else None)
        states.append(np.array(world.env.step(action)[0]))
    return torch.as_tensor(np.float32(states)), images, rollout.observations[:, 0]


def film(world, agent, images, imagined):
    """Every third of `images`, beside that of the logged state nearest to the imagined one."""
    path = console.home(agent.config.dataset_dir, "--dataset-dir") / agent.facts["data"]
    logged = files.read_npz(data_files(path)[0][0], ["observations", "qpos", "button_states"])
    if "qpos" not in logged:
        raise mac.MacError(f"{path} has no array 'qpos' to draw imagined states with")
    states, env, frames = torch.as_tensor(logged.pop("observations")), world.env.unwrapped, []
    nearest = torch.cdist(imagined, agent.normalizer(states)).argmin(1).tolist()
    for t in range(0, len(images), 3):
        qpos, *buttons = (array[nearest[t // agent.config.chunk]] for array in logged.values())
        env.set_state(qpos, np.zeros(env.model.nv), *buttons)
        frames.append(np.concatenate([images[t], env.render()], 1))
    return frames


@console.command
@torch.no_grad()
def main(argv):
    parser = console.Parser(description="What the model imagines.")
    parser.add_argument("run", help="run folder")
    parser.add_argument("out", help="file to write, .png or .gif")
    parser.add_argument("--seed", type=int, default=0, help="of the episode (default: 0)")
    args = parser.parse_args(argv)
    agent = mac.load(args.run)
    world = worlds.find_world(agent.config.env, agent.config.goal, agent.config.data)
    if args.out.endswith(".gif"):
        os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" else "glfw")
        import imageio.v3
        world.pixels = 400
        states, images, imagined = play(world, agent, 100, args.seed)
        world.reset(world.env, world.tasks[0], args.seed)  # the colours of a success would stay
        imageio.v3.imwrite(args.out, film(world, agent, images, imagined), duration=50, loop=0)
    else:
        console.optional("matplotlib", "a picture")
        from matplotlib.figure import Figure
        world.pixels = 0
        states, _, imagined = play(world, agent, 100, args.seed)
        figure, states = Figure((5, 3.2), layout="tight"), agent.normalizer(states)
        panel = figure.subplots()
        spread = states.amax(0) - states.amin(0)
        for i, column in enumerate(spread.argsort(descending=True)[:4].tolist()):
            panel.plot(states[:, column], f"C{i}", label=f"observation[{column}]")
            panel.plot(range(0, len(states), agent.config.chunk), imagined[:, column], f"C{i}o")
        panel.set(xlabel="environment steps", title="simulator -, model o")
        panel.legend(fontsize=7)
        figure.savefig(args.out, format="png", dpi=120)
    console.say(f"wrote {args.out}")


if __name__ == "__main__":
    sys.exit(main())
