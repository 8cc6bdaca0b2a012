"""Export how an agent acts as a program that needs none of these files (torch.export).

    python examples/export.py exp/<run> acting.pt2
    >>> program = torch.export.load("acting.pt2").module()
    >>> program(observation, goal, torch.randn(32, D))  # (n, A), the best of N = 32

Observation (O,) and goal (G,) are raw; D = n A. Tensors may be float32 or float64.
"""
import pathlib
import runpy
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # where mac.py is
import mac
from support import console


class Acting(torch.nn.Module):
    """What Agent.act does, with the noise z (N, D) as an argument."""

    def __init__(self, agent):
        super().__init__()
        self.agent = agent.requires_grad_(False)

    def forward(self, observation, goal, z):
        # Copied, as `.float()` would be left out of a program that is traced with float32.
        observation, goal, z = (torch.zeros_like(x, dtype=torch.float32).copy_(x)
                                for x in (observation, goal, z))
        agent = self.agent
        observation, goal = agent.normalizer(observation), agent.normalizer(goal, agent.columns)
        chunks = agent.policy.decode(observation, goal, z)
        best = agent.q(observation, chunks, goal).argmax(0, keepdim=True)
        return chunks.index_select(0, best).view(agent.config.chunk, -1)


@console.command
def main(argv):
    parser = console.Parser(description="Export how an agent acts.")
    parser.add_argument("run", help="run folder")
    parser.add_argument("out", nargs="?", default="acting.pt2", help="default: acting.pt2")
    parser.add_argument("--with", dest="program", help="file that defines the run's policy")
    args = parser.parse_args(argv)
    if args.program:
        runpy.run_path(args.program)
    agent = mac.load(args.run)
    given = *map(torch.zeros, (agent.sizes[0], len(agent.columns), (2, agent.policy.chunk_size))),
    sizes = None, None, {0: torch.export.Dim("N")}
    torch.export.save(torch.export.export(Acting(agent), given, dynamic_shapes=sizes), args.out)
    console.say(f"wrote {args.out}")


if __name__ == "__main__":
    sys.exit(main())
