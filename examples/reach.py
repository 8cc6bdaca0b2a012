"""How far the value function sees: what the networks say of held-out states some steps before a
goal that the trajectory did reach or, where a reward fixes the task, before its reward rises.

    python examples/reach.py exp/<run> --plot

"ideal" is the value of what was logged. "agreement" is the correlation of Q with its target, over
16 proposals for a state. If V where tasks begin is that of "never", Q cannot rank proposals.
"""
import pathlib
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # where mac.py is
import mac
from eval import picture
from support import console, worlds


@torch.no_grad()
def reach(agent, dataset, distance, count=5000):
    """Over up to `count` random states `distance` steps before: -> means of V, of Q of the logged
    chunk, of its modelled success or reward, of the agreement (or nan); None without such states"""
    generator, goals = torch.Generator().manual_seed(0), len(agent.columns) > 0
    start = torch.randint(len(dataset.observations), (count,), generator=generator)
    if not goals:
        rises = 1 + (dataset.rewards[1:] > dataset.rewards[:-1]).nonzero()[:, 0]
        rises = rises[~torch.isin(rises - 1, dataset.ends)]
        pick = torch.randint(max(1, len(rises)), (count * (len(rises) > 0),), generator=generator)
        start = rises[pick] - distance
    last = dataset.ends[torch.searchsorted(dataset.ends, start)]
    start = start[(start >= 0) & (start + max(distance + 1, agent.config.chunk) <= last)]
    if not len(start):
        return None
    goal = dataset.observations[start + distance][:, agent.columns]
    batch = agent.normalize(dataset.batch(start, generator)._replace(value_goal=goal))
    state, chunk, goal = batch.observation, batch.chunk, batch.value_goal
    reward, mask = agent.outcome.predict(state, chunk, goal)
    chunks, q = agent.proposals(state[:500], goal[:500], 16, generator)
    taught = agent.model_q(state[:500, None], chunks, goal[:500, None])  # the target of Q
    agreement = torch.cosine_similarity(q - q.mean(1, True), taught - taught.mean(1, True))
    values = (agent.value(state, goal), agent.q(state, chunk, goal), 1 - mask if goals else reward,
              agreement[taught.amin(1) < taught.amax(1)])
    return [value.mean().item() for value in values]


def ideal(config, distance):
    """V of a path that meets its goal in `distance` steps: -1 for each chunk before that one."""
    n = config.chunk
    return -(1 - config.discount ** (distance // n * n)) / (1 - config.discount ** n)


@console.command
@torch.no_grad()
def main(argv):
    parser = console.Parser(description="How far the value function sees.")
    parser.add_argument("run", type=pathlib.Path, help="run folder")
    parser.add_argument("--plot", nargs="?", const="reach.png", metavar="OUT", help="draw it, too")
    args = parser.parse_args(argv)
    agent = mac.load(args.run)
    config = agent.config
    world = worlds.find_world(config.env, config.goal, config.data)
    _, validation = world.data(agent.facts["data"], config)
    dataset, goals = mac.ChunkDataset(validation, world.columns, config), world.goal_conditioned
    names = ["steps", "V", "Q", "success" if goals else "reward", "agreement"] + ["ideal"] * goals
    rows = [[distance, *means] + [ideal(config, distance)] * goals
            for distance in (0, 10, 20, 30, 50, 70, 100, 150, 200, 300, 400)
            if (means := reach(agent, dataset, distance))]
    if not rows:
        raise mac.MacError("no validation state comes before a goal (or a rise of the reward)")
    console.say("".join(f"{name:>10}" for name in names))
    for row in rows:
        console.say("".join(f"{number:10.4g}" for number in row))
    lines = {"never": -1 / (1 - agent.chunk_discount)} if goals else {}
    for task in world.tasks:  # V where it begins
        begins = [[np.array(x) for x in world.reset(world.env, task, seed)] for seed in range(10)]
        value = agent.value(*agent.prepare(*map(np.stack, zip(*begins))))
        lines[f"task{task} begins"] = value.mean().item()
    console.say("V: " + ", ".join(f"{name} {value:.2f}" for name, value in lines.items()))
    if args.plot:
        steps, *columns = zip(*rows)
        with picture(args.plot) as panels:
            for name, column in zip(names[1:], columns):
                panels[int(name in names[3:5])].plot(steps, column, ".-", label=name)
            for color, (name, value) in enumerate(lines.items(), 3):
                panels[0].axhline(value, color=f"C{color}", linestyle=":", label=name)
            for panel in panels:
                panel.set(xlabel="environment steps before")


if __name__ == "__main__":
    sys.exit(main())
