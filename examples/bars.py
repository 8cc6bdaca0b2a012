"""Bars of a table like assets/results.csv: success of MAC and of cloning here, and in the paper.

    python examples/bars.py assets/results.csv assets/success.png
"""
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # where eval.py is
from eval import picture, table
from support import console


@console.command
def main(argv):
    parser = console.Parser(description="Bars of success.")
    parser.add_argument("table", type=pathlib.Path, help=".csv: task, then NAME and 'NAME ±' twice "
                        "or more, in percent; blank where unknown")
    parser.add_argument("out", help="picture to write, .png")
    args = parser.parse_args(argv)
    with table(args.table) as rows, picture(args.out, 9, 0.6 * len(rows) + 2, 1) as panel:
        names = [name for name in rows[0] if name + " ±" in rows[0]]
        thick = 0.8 / len(names)
        for i, name in enumerate(names):
            bars = [(place + thick * (i + 0.5) - 0.4, float(row[name]),
                     float(row[name + " ±"] or 0)) for place, row in enumerate(rows) if row[name]]
            at, success, error = zip(*bars)
            panel.barh(at, success, thick, xerr=error, label=name)
        panel.set(xlabel="success, percent", xlim=(0, 100), yticks=range(len(rows)),
                  yticklabels=[row["task"] for row in rows],
                  ylim=(len(rows) + 1, -0.5))  # downwards, with room for the legend


if __name__ == "__main__":
    sys.exit(main())
