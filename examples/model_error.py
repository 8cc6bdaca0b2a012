"""How the dynamics model's error grows with the steps looked ahead (the paper's Figures 2 and 8).

    python examples/model_error.py exp/chunk1 exp/chunk5 --plot
"""
import dataclasses
import pathlib
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # where mac.py is
import mac
from eval import picture
from support import console, worlds


@torch.no_grad()
def model_error(agent, data, steps, count=2000):
    """Mean squared error, in normalised units, where up to `count` pieces of logged trajectories
    are replayed in the model, chunk by chunk. -> list of (steps, error). Raises MacError."""
    n, longest = agent.config.chunk, np.diff(data.ends, prepend=-1).max() - 1
    span = steps // n * n
    if not 0 < span <= longest:
        raise mac.MacError(f"--steps {steps}: from a chunk ({n}) to the longest trajectory "
                           f"({longest}) can be looked ahead")
    # With a single chunk as long as the span, legal starts are those that so many steps follow.
    config = dataclasses.replace(agent.config, chunk=span, terminations=False)
    dataset = mac.ChunkDataset(data, agent.columns.tolist(), config)
    pick = np.linspace(0, dataset.total_starts - 1, min(count, dataset.total_starts)).astype(int)
    start, errors = dataset.start(torch.as_tensor(pick)), [(0, 0.0)]
    batch = agent.normalize(dataset.batch(start, torch.Generator()))
    state = batch.observation
    for k, chunk in enumerate(batch.chunk.split(n * agent.sizes[1], 1), 1):
        state = agent.next_observation(state, chunk)
        truth = agent.normalizer(dataset.observations[start + k * n])
        errors.append((k * n, (state - truth).square().mean().item()))
    return errors


@console.command
def main(argv):
    parser = console.Parser(description="Error of the dynamics model.")
    parser.add_argument("runs", nargs="+", metavar="RUN", type=pathlib.Path, help="run folder")
    parser.add_argument("--steps", type=int, default=100, help="to look ahead (default: 100)")
    parser.add_argument("--plot", nargs="?", const="model_error.png", help="draw it, too")
    args, curves = parser.parse_args(argv), {}
    for run in args.runs:
        agent = mac.load(run)
        world = worlds.find_world(agent.config.env, agent.config.goal, agent.config.data)
        _, validation = world.data(agent.facts["data"], agent.config)
        curve = model_error(agent, validation, args.steps)
        label = f"n = {agent.config.chunk}, {run}"
        curves[label] = curve[1:]
        console.say(label + "".join(f", {steps} steps {error:.4g}" for steps, error in curve[1:]))
    if args.plot:
        with picture(args.plot, 5, panels=1) as panel:
            for label, curve in curves.items():
                panel.plot(*zip(*curve), ".-", label=label)
            panel.set(xlabel="environment steps", ylabel="mean squared error", yscale="log")


if __name__ == "__main__":
    sys.exit(main())
