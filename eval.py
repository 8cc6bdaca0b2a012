"""Play the trained agent of a run folder, which is all it needs: table, JSON, film, learning curve.

    python eval.py exp/<run>                        # success, return and length per task
    python eval.py exp/<run> --candidates 1         # the cloned behaviour, without Q
    python eval.py exp/<run> --video out.gif        # watch an episode of each task
    python eval.py exp/<run> --plot                 # learning curve, from the CSV files alone
"""
import contextlib
import csv
import io
import itertools
import json
import os
import pathlib
import runpy
import sys

import numpy as np
import torch

import mac
from support import console, devices, episodes, files
from support.console import MacError, say
from support.worlds import find_world

# Returns that D4RL calls 0 and 100.
D4RL_RETURNS = {"HalfCheetah": (-280.178953, 12135.0), "Hopper": (-20.272305, 3234.3),
                "Walker2d": (1.629008, 4592.3)}


def evaluate(run, args):
    """Play episodes of a run's agent and print the table. -> what --json writes"""
    agent = mac.load(run, devices.set_up_device(args.device))
    config, world = agent.config, find_world(agent.config.env, agent.config.goal, agent.config.data)
    world.pixels = 400 if args.video else world.pixels
    if not world.tasks:
        raise MacError(f"{run}: there is no simulator to play in")
    if world.box != agent.facts["box"]:
        raise MacError(f"{run} was trained on actions in {agent.facts['box']}, the simulator here "
                       f"takes {world.box}: evaluate with the one that the data are of")
    execute = min(args.execute or config.execute, config.chunk)
    candidates = args.candidates or config.eval_candidates
    count = args.episodes or (1 if args.video else config.eval_episodes)
    frames = {task: [] for task in world.tasks}
    if args.video:  # an error now rather than later
        world.reset(world.env, world.tasks[0], args.seed)
        render(world.env)

    def record(episode):  # a third of the frames, about as fast as it happened
        if args.video and episode.number == 0 and (episode.length % 3 == 1 or episode.done):
            frames[episode.task].append(render(episode.env))

    results = episodes.play(world, agent, count, args.seed, execute, candidates, record)
    table = episodes.summarize(results)
    say(f"{run}: {config.env}, step {agent.step}, trained on {agent.facts['source']}")
    say(f"{config.policy} policy, best of {candidates}, {execute} of the {config.chunk} actions of "
        f"each chunk executed, seed {args.seed}, on {agent.device.type}")
    say(f"{'':8}{'success':>9}{'±':>7}{'episodes':>10}{'return':>10}{'±':>9}{'length':>9}")
    for name, row in table.items():
        success = ("-", "-") if row["success"] is None else (
            f"{row['success']:.1%}", f"{row['stderr']:.1%}")
        say(f"{name:8}{success[0]:>9}{success[1]:>7}{row.pop('episodes'):10}{row['return']:10.1f}"
            f"{row['return_stderr']:9.2g}{row['length']:9.1f}")
    overall, simulator = table["overall"], config.env.split("-")[0]
    if simulator in D4RL_RETURNS:
        low, high = D4RL_RETURNS[simulator]
        overall["d4rl_score"] = 100 * (overall["return"] - low) / (high - low)
        error = 100 * overall["return_stderr"] / (high - low)
        say(f"D4RL's normalised score: {overall['d4rl_score']:.1f} ± {error:.1f} (D4RL has -v2)")
    if args.video:
        import imageio.v3  # comes with ogbench
        images = np.stack(sum(frames.values(), []))
        film = imageio.v3.imwrite("<bytes>", images, extension=".gif", duration=50, loop=0)
        files.write(args.video, film)
        say(f"wrote {args.video} ({len(images)} frames)")
    return {"env": config.env, "policy": config.policy, "step": agent.step, "seed": args.seed,
            "episodes": count, "execute": execute, "candidates": candidates,
            "overall": table.pop("overall"), "tasks": table}


# ------------------------------------------------------------------------------------ pictures

def render(env):
    """An image (height, width, 3) of an environment. Raises MacError, which says what to set."""
    try:
        image = np.asarray(env.render())
    except Exception as error:  # mujoco raises many kinds where there is no renderer
        raise MacError(f"cannot render with MUJOCO_GL={os.environ.get('MUJOCO_GL')} ({error}): "
                       "install EGL (libegl1) and set MUJOCO_GL=egl before the program starts"
                       ) from error
    if image.dtype != np.uint8 or image.ndim != 3:
        raise MacError(f"cannot film: render() of this simulator gives {image.dtype} of shape "
                       f"{image.shape}, where an image of uint8 (height, width, 3) is needed")
    return image


@contextlib.contextmanager
def picture(path, width=9, height=3.2, panels=2):
    """Give panels to draw on, side by side; then write them to `path`, .png. Raises MacError."""
    console.optional("matplotlib", "a picture")
    from matplotlib.figure import Figure
    figure, buffer = Figure((width, height), layout="tight"), io.BytesIO()
    yield figure.subplots(1, panels)
    for panel in figure.axes:
        panel.legend(fontsize=7)
    figure.savefig(buffer, dpi=120, format="png")
    files.write(path, buffer.getbuffer())
    say(f"wrote {path}")


def plot_curves(success, losses, run_folders):
    """Draw success (eval.csv) and losses (train.csv) over gradient steps. Raises MacError."""
    for run, style in zip(run_folders, itertools.cycle(("-", "--", ":", "-."))):
        with table(run / "train.csv") as rows:
            names = [name for name in rows[0] if name != "step" and "_" not in name]
            for color, name in enumerate(names):
                kept = [row for row in rows if row.get(name)]  # blank in the warmup
                losses.plot(*[[float(row[key]) for row in kept] for key in ("step", name)], style,
                            color=f"C{color}", label=name * (run is run_folders[0]))
        with table(run / "eval.csv") as rows:  # not there if nothing was evaluated
            rows = [row for row in rows if row["task"] == "overall"]
            known = all(row["success"] for row in rows)  # one's own simulators may not tell
            keys = ("success", "stderr") if known else ("return", "return_stderr")
            steps, mean, error = (np.array([float(row[key]) for row in rows])
                                  for key in ("step", *keys))
        success.plot(steps, mean, style, marker="o", label=run.name)
        success.fill_between(steps, mean - error, mean + error, alpha=0.2)
        success.set(xlabel="gradient steps", ylabel=keys[0])
    losses.set(xlabel="gradient steps", ylabel="loss", yscale="log")


@contextlib.contextmanager
def table(path):
    """Give the rows of a .csv file, none if there is no file. If what then reads them fails, the
    table is at fault. Raises MacError."""
    try:
        text = path.read_text(errors="replace") if path.exists() else ""
        yield list(csv.DictReader(text.splitlines()))
    except MacError:
        raise
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise MacError(f"nothing to plot: {path} is missing or damaged ({error!r})") from error


# -------------------------------------------------------------------------------- command line

def parse(argv):
    parser = console.Parser("eval.py", allow_abbrev=False, description="Evaluate runs of mac.py.")
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", type=pathlib.Path, help="run folder")
    add("--episodes", type=int, help="per task (default: the run's setting; 1 with --video)")
    add("--execute", type=int, help="actions of each chunk executed (default: the run's)")
    add("--candidates", type=int, help="N; 1 is the cloned behaviour (default: the run's)")
    add("--seed", type=int, default=0, help="of episodes (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the agent runs")
    add("--video", metavar="OUT.gif", help="film the first episode of each task")
    add("--json", metavar="OUT.json", help="write the numbers of one run")
    add("--plot", nargs="?", const="", metavar="OUT.png", help="instead of playing, draw the "
        "learning curve (default: into the first run folder)")
    add("--with", dest="program", metavar="FILE", help="first import this file, which defines the "
        "run's policy or world (examples/ablations.py)")
    args = parser.parse_args(argv)
    for name, low in (("episodes", 1), ("execute", 1), ("candidates", 1), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and not low <= value < 2 ** 32:
            raise MacError(f"{console.flag(name)}: {value} is not at least {low}")
    if (args.json or args.video) and (args.plot is not None or len(args.runs) > 1):
        raise MacError("--json and --video are of the played episodes of a single run")
    for name, ending in ((args.json, ""), (args.video, ".gif"), (args.plot, ".png")):
        if name and not name.endswith(ending):  # an error now rather than after the work
            raise MacError(f"cannot write {name}: the name must end in {ending}")
        if name and (not os.access(pathlib.Path(name).absolute().parent, os.W_OK)
                     or os.path.exists(name) and not os.path.isfile(name)):  # as /dev/null
            raise MacError(f"cannot write {name}: name a file in a folder that is there and yours")
    return args


@console.command
@torch.no_grad()
def main(argv):
    args = parse(argv)
    if args.video:  # before mujoco is imported
        os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" else "glfw")
    if args.program:
        runpy.run_path(args.program)
    if args.plot is not None:
        with picture(args.plot or args.runs[0] / "curve.png") as panels:
            return plot_curves(*panels, args.runs)
    for run in args.runs:
        report = evaluate(run, args)
    if args.json:
        files.write(args.json, (json.dumps(report, indent=2) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
