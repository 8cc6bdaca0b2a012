"""Film the next 100 steps of an agent: left as the simulator has them, right as its model imagined
them, drawn as the logged states that are nearest to the imagined ones (OGBench's tasks only).

    python examples/imagine.py exp/<run> out.gif
"""
import os
import pathlib
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # where mac.py is
import mac
from support import console, worlds
from support.data import data_files


def film(agent, world, folder, steps=100, seed=0):
    """-> images (height, 2 width, 3) of every third step"""
    n, env = agent.config.chunk, world.env
    state, goal = world.reset(env, world.tasks[0], seed)
    rollout = agent.imagine(*agent.prepare(state, goal), torch.Generator().manual_seed(seed),
                            max(1, steps // n), agent.config.eval_candidates)
    simulated = []
    for action in rollout.chunks.view(-1, agent.sizes[1]).numpy():
        simulated.append(env.render())
        env.step(action)
    with np.load(data_files(folder / agent.facts["data"])[0][0]) as file:  # one shard will do
        states = torch.as_tensor(file["observations"], dtype=torch.float32)
        logged = [file[name] for name in ("qpos", "button_states") if name in file]
    world.reset(env, world.tasks[0], seed)  # else the colours of a success would stay
    nearest = torch.cdist(rollout.observations[:-1, 0], agent.normalizer(states)).argmin(1)
    frames = []
    for t in range(0, len(simulated), 3):
        qpos, *buttons = (array[nearest[t // n]] for array in logged)
        env.unwrapped.set_state(qpos, np.zeros(env.unwrapped.model.nv), *buttons)
        frames.append(np.concatenate([simulated[t], env.render()], 1))
    return frames


@console.command
@torch.no_grad()
def main(argv):
    parser = console.Parser(description="Film what the model imagines.")
    parser.add_argument("run", help="run folder")
    parser.add_argument("out", help="film to write, .gif")
    args = parser.parse_args(argv)
    os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" else "glfw")
    agent = mac.load(args.run)
    if agent.config.data or not args.out.endswith(".gif"):
        raise mac.MacError("films are .gif files of OGBench's tasks")
    world = worlds.find_world(agent.config.env, agent.config.goal)
    world.pixels = 400
    frames = film(agent, world, console.home(agent.config.dataset_dir, "--dataset-dir"))
    import imageio.v3  # comes with ogbench
    imageio.v3.imwrite(args.out, frames, duration=50, loop=0)
    console.say(f"wrote {args.out}")


if __name__ == "__main__":
    sys.exit(main())
