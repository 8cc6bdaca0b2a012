"""pytest: errors, flags and progress in the terminal."""
import dataclasses
import re
import subprocess
import sys
from typing import Literal

import pytest

import mac
from support import console
from support.console import MacError
from support.test_common import HERE


@pytest.mark.parametrize("error, status, line", [
    (MacError("two\n  lines"), 2, "error: two lines"), (MacError("lost", 3), 3, "error: lost"),
    (FileNotFoundError(2, "No such file", "x.npz"), 2, "error: cannot use x.npz: No such file"),
    (MemoryError("80 GB"), 2, "error: 80 GB"), (KeyboardInterrupt(), 130, "stopped"),
    (RuntimeError("CUDA out of memory"), 2, "error: CUDA out of memory"),
    (RuntimeError("shapes"), None, ""), (ZeroDivisionError(), None, "")])
def test_what_a_user_can_mend_is_one_line_and_a_status_and_a_bug_stays_one(
        error, status, line, capsys):
    @console.command
    def fails(argv):
        raise error

    if status:
        assert fails([]) == status and capsys.readouterr().err == line + "\n"
    else:
        with pytest.raises(type(error)):
            fails([])


PROGRAM = r"""
import sys
from support import console
@console.command
def main(argv):
    console.say("\xb1")
    if argv:
        raise console.MacError("not \xb1", int(argv[0]))
sys.exit(main())"""


@pytest.mark.parametrize("redirection", ["", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "|true"])
def test_a_closed_output_changes_no_status(redirection):
    for asked in ("", "7 "):
        command = (f'LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 "$0" -c "$1" {asked}{redirection}'
                   '\necho "status ${PIPESTATUS[0]}"')
        result = subprocess.run(["bash", "-c", command, sys.executable, PROGRAM], text=True,
                                capture_output=True, cwd=HERE)
        assert result.stdout.endswith(f"status {asked.strip() or 0}\n"), result.stderr
        assert result.stderr == "error: not ?\n" * (bool(asked) and "2>" not in redirection)
        assert result.stdout.startswith("?\n") == (redirection in ("", "2>&-"))


@dataclasses.dataclass
class Base:
    some_size: int = 3  # how large it is
    fast: bool = True  # quick
    kind: Literal["a", "b"] = "a"  # which one, in a text
                                   # of two lines
    odds: tuple = (1.0, 2.0)  # of two


@dataclasses.dataclass
class More(Base):
    name: str = ""  # one field more


def test_flags_are_made_of_a_dataclass_its_comments_and_those_it_inherits(capsys):
    parser = console.Parser("x", allow_abbrev=False)
    console.add_flags(parser, More)
    given = ["--some_size=4", "--no-fast", "--odds", "3", "-1", "--kind", "b", "--name"]
    assert vars(parser.parse_args([*given, "a_b"])) == {
        "some_size": 4, "fast": False, "odds": (3, -1), "kind": "b", "name": "a_b"}
    assert vars(parser.parse_args(["--name=a_b"])) == {"name": "a_b"}
    for wrong in (["--kind", "c"], ["--odds", "1"], ["--some", "3"], ["--some_size", "x"], given):
        with pytest.raises(MacError, match=r"\(--help lists the flags\)"):
            parser.parse_args(wrong)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for comment in ("how large it is (default: 3)", "quick (default: on)", "one field more",
                    "which one, in a text of two lines (default: a)"):
        assert comment in text
    with pytest.raises(SystemExit):
        mac.parse(["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(mac.Config):
        assert re.search(rf"^  {console.flag(field.name)}[ ,][^$]", text, re.MULTILINE), field.name


def test_without_a_terminal_progress_is_plain_lines(capsys):
    assert list(console.Progress([5, 6, 7], desc="work", interval=0)) == [5, 6, 7]
    out, err = capsys.readouterr()
    assert re.findall(r"^work.*(\d/3).*$", out, re.MULTILINE) == ["1/3", "2/3", "3/3"]
    assert not err and "\r" not in out and out.count("\n") == 3
    list(console.Progress(range(9), interval=60))
    assert capsys.readouterr() == ("", "")


def test_a_missing_home_or_package_is_one_line():
    with pytest.raises(MacError, match="no home folder for ~nobody-here/x: set --data"):
        console.home("~nobody-here/x", "--data")
    with pytest.raises(MacError, match="--plot needs no_such_package: pip install no_such_package"):
        console.optional("no_such_package", "--plot")
