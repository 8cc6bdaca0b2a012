"""pytest: errors, flags and progress in the terminal."""
import re
import subprocess
import sys

import pytest

import mac
from support import console
from support.test_common import HERE


@console.command
def fails(error):
    raise error


@pytest.mark.parametrize("error, status, line", [
    (console.MacError("two\n  lines", 3), 3, "error: two lines"),
    (FileNotFoundError(2, "No such file", "x.npz"), 2, "error: cannot use x.npz: No such file"),
    (RuntimeError("CUDA out of memory"), 2, "error: CUDA out of memory")])
def test_what_a_user_can_mend_is_one_line_and_a_bug_stays_one(error, status, line, capsys):
    assert fails(error) == status and capsys.readouterr().err == line + "\n"
    for bug in (RuntimeError("shapes"), ZeroDivisionError()):
        with pytest.raises(type(bug)):
            fails(bug)


PROGRAM = r"""
import sys
from support import console
@console.command
def main(argv):
    console.say("\xb1")
    raise console.MacError("not \xb1", 7)
sys.exit(main())"""


@pytest.mark.parametrize("redirection", ["", ">&-", "2>&-", ">/dev/full", "|true"])
def test_a_closed_output_changes_no_status(redirection):
    command = (f'LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 "$0" -c "$1" {redirection}'
               '\necho "status ${PIPESTATUS[0]}"')
    result = subprocess.run(["bash", "-c", command, sys.executable, PROGRAM], text=True,
                            capture_output=True, cwd=HERE)
    assert result.stdout == "?\n" * (redirection in ("", "2>&-")) + "status 7\n", result.stderr
    assert result.stderr == "error: not ?\n" * (redirection != "2>&-")


def test_flags_are_made_of_the_settings_and_their_comments(capsys):
    given = "--batch_size=4 --no-decay --value-goals 0 1 1 -1 --policy gaussian --save-dir a_b"
    assert mac.parse(given.split())[0] == {
        "batch_size": 4, "decay": False, "value_goals": (0, 1, 1, -1), "policy": "gaussian",
        "save_dir": "a_b"}
    for wrong in ("--critic x", "--value-goals 1", "--batch 3", "--batch_size x", "--save-dir"):
        with pytest.raises(console.MacError, match=r"\(--help lists the flags\)"):
            mac.parse(wrong.split())
    with pytest.raises(SystemExit):
        mac.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "or (model, not in the paper) Eq. 11's target itself, without a network (def" in text


def test_without_a_terminal_progress_is_plain_lines(capsys):
    assert list(console.Progress([5, 6, 7], desc="work", interval=0)) == [5, 6, 7]
    out, err = capsys.readouterr()
    assert re.findall(r"^work.*(\d/3).*$", out, re.MULTILINE) == ["1/3", "2/3", "3/3"]
    assert not err and "\r" not in out and out.count("\n") == 3
