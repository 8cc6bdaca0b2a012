"""Evaluate runs of mac.py: everything here needs only the run folder (the model error also needs
the dataset).

    python eval.py exp/<run>                                  # success, return, length per task
    python eval.py exp/<run> --candidates 1                   # the cloned behaviour, without Q
    python eval.py exp/<run> --video out.gif                  # watch it (needs EGL or a display)
    python eval.py exp/<run> --plot                           # learning curve, from the CSV files
    python eval.py exp/<run1> exp/<run2> --model-error --plot # Figures 2 and 8 of the paper
"""
import collections
import csv
import itertools
import os
import pathlib
import statistics
import sys

import numpy as np
import torch

import mac

# Success rates of MAC in the paper: tasks 1 to 5 (Tables 12 and 13) and their mean.
PAPER = {
    "cube-single-play-singletask": "100±0 100±0 98±3 98±3 97±7 99±2",
    "cube-double-play-singletask": "82±15 50±12 55±10 28±8 50±9 53±4",
    "scene-play-singletask": "100±0 100±0 95±10 95±6 93±8 97±4",
    "puzzle-3x3-play-singletask": "100±0 0±0 0±0 0±0 0±0 20±0",
    "puzzle-4x4-play-singletask": "98±3 33±27 100±0 85±14 72±40 78±13",
    "humanoidmaze-medium-navigate-oraclerep": "67±12 87±9 7±0 0±0 22±14 36±2",
    "humanoidmaze-giant-navigate-oraclerep": "0±0 0±0 0±0 0±0 0±0 0±0",
    "cube-double-play-oraclerep": "100±0 100±0 100±0 98±3 100±0 100±1",
    "cube-octuple-play-oraclerep": "83±4 20±9 40±21 5±6 3±4 30±6",
    "puzzle-3x3-play-oraclerep": "100±0 100±0 100±0 100±0 100±0 100±0",
    "puzzle-4x5-play-oraclerep": "100±0 100±0 100±0 100±0 93±13 99±3",
}


# What the learning curve shows on its logarithmic axis.
LOSSES = ("flow", "distill", "dynamics", "reward", "success", "value", "critic")


def paper_numbers(env_id, tasks):
    """{task name: the paper's success in percent}; empty where the paper has none."""
    words = [w for w in env_id.split("-")[:-1] if not (w[:4] == "task" and w[4:].isdigit())]
    numbers = PAPER.get("-".join(words), "").split()
    if not numbers:
        return {}
    table = {f"task{task}": numbers[task - 1] for task in tasks}
    table["overall"] = numbers[5] if len(tasks) > 1 else numbers[tasks[0] - 1]
    return table


def evaluate(run, args):
    """Play episodes, print the table. -> the dictionary that --json writes"""
    agent = mac.load(run, mac.set_up_device(args.device or "auto"))
    config = agent.config
    execute = args.execute or config.execute
    if execute > config.chunk:
        raise mac.MacError(f"--execute {execute}: the chunks of {run} have {config.chunk} actions")
    candidates = args.candidates or config.eval_candidates
    episodes = args.episodes or config.eval_episodes
    seed = args.seed or 0
    evaluator = mac.Evaluator(config.env)
    frames = collections.defaultdict(list)

    def record(episode):  # a third of the frames, about as fast as it happened
        if episode.number == 0 and (episode.length % 3 == 1 or episode.done):
            frames[episode.task].append(render(episode.env))

    if args.video:
        evaluator.envs[0].reset()
        render(evaluator.envs[0])  # an error now rather than after the first chunk
    results = evaluator.play(agent, episodes, seed, execute, candidates,
                             record if args.video else lambda episode: None)
    table = mac.summarize(results)
    paper = paper_numbers(config.env, evaluator.tasks) if config.policy == "flow" else {}
    print(f"{run}: {config.env}, step {agent.step}, trained on {agent.data_source}")
    proposals = f"{config.policy} policy" + " without distillation" * config.eval_flow
    print(f"{proposals}, best of {candidates}, {execute} of the {config.chunk} actions of each "
          f"chunk executed, seed {seed}; {latency(agent, candidates):.1f} ms per decision "
          f"for one observation on {agent.normalize_observation.middle.device.type}")
    print(f"{'':8} {'success':>12} {'episodes':>9} {'return':>9} {'length':>7}   paper "
          "(N = 32, 1 action)")
    for name, row in table.items():
        print(f"{name:8} {row['success']:6.1%} ±{row['stderr']:5.1%} {row['episodes']:9} "
              f"{row['return']:9.1f} {row['length']:7.1f}   {paper.get(name, '-')}")
        del row["episodes"]
    if args.video:
        write_video(args.video, [frame for task in sorted(frames) for frame in frames[task]])
    overall = table.pop("overall")
    return {"env": config.env, "policy": config.policy, "step": agent.step, "seed": seed,
            "episodes": episodes, "execute": execute, "candidates": candidates, "tasks": table,
            "overall": overall}


def latency(agent, candidates):
    """Median milliseconds to choose a chunk for a single observation."""
    def act():
        agent.act(np.zeros(agent.sizes[0]), np.zeros(agent.sizes[1]), candidates)

    return 1e3 * statistics.median(mac.timed(act, 20, agent.normalize_observation.middle.device))


# ------------------------------------------------------------------------------ model error


@torch.no_grad()
def model_error(agent, dataset, steps, trajectories=2000):
    """Mean squared error of the dynamics model, in normalised units, along logged trajectories
    of `steps` environment steps whose recorded actions are replayed chunk by chunk.

    Args: dataset: a ChunkDataset; up to `trajectories` evenly spaced starts of it are used.
    Returns: list of (environment steps, error), one per chunk, beginning with (0, 0).
    Raises: mac.MacError if no trajectory is that long.
    """
    n = agent.config.chunk
    index = torch.arange(len(dataset.last), device=dataset.last.device)
    starts = index[index + steps // n * n <= dataset.last]
    if not len(starts) or steps < n:
        raise mac.MacError(f"--model-error-steps {steps}: needs at least one chunk ({n} actions) "
                           "and a trajectory of that length")
    starts = starts[torch.linspace(0, len(starts) - 1, min(trajectories, len(starts))).long()]
    prediction, errors = dataset.observations[starts], [(0, 0.0)]
    for step in range(0, steps // n * n, n):
        chunk = dataset.actions[starts[:, None] + step + dataset.offsets].flatten(1)
        prediction = agent.next_observation(prediction, chunk)
        truth = dataset.observations[starts + step + n]
        errors.append((step + n, (prediction - truth).square().mean().item()))
    return errors


def compare_model_errors(args):
    """Print, write (RUN/model_error.csv) and plot the model error of every run."""
    plt = pyplot() if args.plot is not None else None
    curves = {}
    for run in args.runs:
        agent = mac.load(run)
        config = agent.config
        if args.dataset_dir:
            config.dataset_dir = args.dataset_dir
        path, _ = mac.find_data(config, obtain=False)
        _, validation = mac.load_data(config, path, mac.make_env(config.env))
        dataset = mac.make_dataset(agent, mac.to_tensors(validation, config.env),
                                   torch.device("cpu"))
        curve = model_error(agent, dataset, args.model_error_steps or 100)
        label = f"n = {config.chunk}, {run}" if len(args.runs) > 1 else f"n = {config.chunk}"
        curves[label] = curve
        with mac.atomic_write(pathlib.Path(run) / "model_error.csv") as file:
            file.write("".join(["steps,mse\n"] + [f"{s},{e}\n" for s, e in curve]).encode())
    print("mean squared error of the dynamics model (normalised units, validation split)")
    for label, curve in curves.items():
        shown = [c for c in curve if c[0] and c[0] % 25 == 0] or curve[1:]
        print(f"{label:40}", "  ".join(f"{s} steps: {e:.4g}" for s, e in shown))
    if plt:
        for label, curve in curves.items():
            plt.plot(*zip(*curve[1:]), marker="." if len(curve) < 30 else "", label=label)
        plt.xlabel("environment steps"), plt.ylabel("mean squared error"), plt.yscale("log")
        plt.legend()
        save_plot(plt, args.plot or pathlib.Path(args.runs[0]) / "model_error.png")


# ------------------------------------------------------------------------------ pictures


def render(env):
    try:
        return env.render()
    except Exception as error:  # mujoco raises several kinds where there is no renderer
        raise mac.MacError(f"--video: cannot render here ({error}); install EGL (libegl1), or set "
                           "MUJOCO_GL to a renderer that is installed") from error


def write_video(path, frames):
    import imageio.v3  # comes with ogbench

    with mac.atomic_write(path) as file:
        imageio.v3.imwrite(file, np.stack(frames), extension=".gif", duration=50, loop=0)
    print(f"wrote {path} ({len(frames)} frames)")


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise mac.MacError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_plot(plt, path):
    with mac.atomic_write(path) as file:
        plt.tight_layout()
        plt.savefig(file, dpi=120, format="png")
    print(f"wrote {path}")


def read_csv(path):
    if not path.exists():
        return []
    with open(path, newline="", errors="replace") as file:
        return list(csv.DictReader(file))


def plot_curves(args):
    """Success (eval.csv) and losses (train.csv) over gradient steps."""
    runs = {pathlib.Path(run): read_csv(pathlib.Path(run) / "train.csv") for run in args.runs}
    for run, rows in runs.items():
        if not rows:
            raise mac.MacError(f"{run / 'train.csv'} is not there or has no rows: nothing to plot")
    plt = pyplot()
    figure, (success, losses) = plt.subplots(1, 2, sharex=True, figsize=(9, 3.2))
    for (run, rows), style in zip(runs.items(), itertools.cycle(("-", "--", ":", "-."))):
        for color, name in enumerate(LOSSES):
            kept = [row for row in rows if row.get(name)]  # blank in the warmup
            losses.plot(*[[float(row[key]) for row in kept] for key in ("step", name)], style,
                        color=f"C{color}", label=name if kept and style == "-" else None)
        rows = [row for row in read_csv(run / "eval.csv") if row["task"] == "overall"]
        steps, mean, error = [[float(row[key]) for row in rows]
                              for key in ("step", "success", "stderr")]
        success.plot(steps, mean, style, marker="o", label=run.name)
        success.fill_between(steps, np.subtract(mean, error), np.add(mean, error), alpha=0.2)
    success.set(xlabel="gradient steps", ylabel="success", ylim=(-0.05, 1.05))
    losses.set(xlabel="gradient steps", ylabel="loss", yscale="log")
    for panel in (success, losses):
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=7)
    save_plot(plt, args.plot or pathlib.Path(args.runs[0]) / "curve.png")


def parse(argv):
    parser = mac.Parser("eval.py", description="Evaluate runs of mac.py.")
    positive = mac.number(int, 1)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--episodes", type=positive, help="per task; default the run's setting")
    parser.add_argument("--execute", type=positive, help="actions executed of each chunk; default "
                        "the run's setting")
    parser.add_argument("--candidates", type=positive, help="N; 1 is the cloned behaviour; default "
                        "the run's setting")
    parser.add_argument("--seed", type=mac.number(int, 0), help="of the episodes (default: 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"),
                        help="where to run the networks (default: auto)")
    parser.add_argument("--video", metavar="OUT.gif", help="the first episode of each task")
    parser.add_argument("--json", metavar="OUT.json", help="write the numbers of one run")
    parser.add_argument("--plot", nargs="?", const="", metavar="OUT.png",
                        help="draw the learning curve, or with --model-error the errors; "
                        "default: into the (first) run folder")
    parser.add_argument("--model-error", action="store_true", help="of the dynamics model")
    parser.add_argument("--model-error-steps", type=positive, metavar="STEPS",
                        help="how far to replay (default: 100)")
    parser.add_argument("--dataset-dir", help="for --model-error, if it has moved")
    return parser.parse_args(argv)


def check(args):
    """Refuse, before any work, what would be ignored or could not be written."""
    name = "--model-error" if args.model_error else "--plot" if args.plot is not None else None
    for flag in ("json", "video", "episodes", "execute", "candidates", "seed", "device"):
        if name and getattr(args, flag) is not None:
            raise mac.MacError(f"--{flag} does not go with {name}: run eval.py twice")
    for flag in ("model_error_steps", "dataset_dir"):
        if not args.model_error and getattr(args, flag) is not None:
            raise mac.MacError(f"--{flag.replace('_', '-')} is for --model-error")
    for flag in ("json", "video"):
        if getattr(args, flag) and len(args.runs) > 1:
            raise mac.MacError(f"--{flag} takes a single run")
    if args.video and not args.video.endswith(".gif"):
        raise mac.MacError(f"--video {args.video}: the name must end in .gif")
    for output in filter(None, (args.json, args.video, args.plot)):
        folder = pathlib.Path(output).absolute().parent
        if not os.access(folder, os.W_OK) or pathlib.Path(output).is_dir():
            raise mac.MacError(f"cannot write {output}: name a file in a folder that exists")


def main(argv=None):
    try:
        args = parse(argv)
        check(args)
        if args.model_error:
            compare_model_errors(args)
        elif args.plot is not None:
            try:
                plot_curves(args)
            except (ValueError, KeyError, TypeError) as error:
                raise mac.MacError(f"a CSV file of the run is damaged: {error!r}") from error
        else:
            if args.video and sys.platform == "linux":  # chosen before mujoco is imported
                os.environ.setdefault("MUJOCO_GL", "egl")
            for run in args.runs:
                report = evaluate(run, args)
            if args.json:
                mac.write_json(pathlib.Path(args.json), report)
        return 0
    except mac.MacError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
