"""pytest: errors, flags and progress in the terminal."""
import subprocess
import sys

import pytest

import mac
from support import console
from support.test_common import HERE


def test_what_a_user_can_mend_is_one_line_and_a_bug_stays_one(capsys):
    @console.command
    def fails(error):
        raise error

    for error, line in ((console.MacError("two\n  lines"), "two lines"), (FileNotFoundError(
            2, "No such file", "x.npz"), "cannot use x.npz: No such file"),
                        (RuntimeError("CUDA out of memory"), "CUDA out of memory")):
        assert fails(error) == 2 and capsys.readouterr().err == f"error: {line}\n"
    for bug in (RuntimeError("shapes"), ZeroDivisionError()):
        with pytest.raises(type(bug)):
            fails(bug)


PROGRAM = r"""
import sys
from support import console
sys.exit(console.command(lambda argv: console.say("\xb1") or 7)())"""


@pytest.mark.parametrize("redirection", ["", ">&-", "2>&-", ">/dev/full", "|true"])
def test_a_closed_output_changes_no_status(redirection):
    command = f'LC_ALL=C PYTHONUTF8=0 "$0" -c "$1" {redirection}\necho "${{PIPESTATUS[0]}}"'
    result = subprocess.run(["bash", "-c", command, sys.executable, PROGRAM], text=True,
                            capture_output=True, cwd=HERE)
    assert result.stdout.splitlines()[-1] == "7" and not result.stderr


def test_flags_are_made_of_the_settings_and_their_comments(capsys):
    given = "--batch_size=4 --no-decay --value-goals 0 1 1 -1 --policy gaussian --save-dir a_b"
    assert mac.parse(given.split())[0] == {
        "batch_size": 4, "decay": False, "value_goals": (0, 1, 1, -1), "policy": "gaussian",
        "save_dir": "a_b"}
    with pytest.raises(console.MacError, match=r"--batch 3 \(--help lists the flags\)"):
        mac.parse(["--batch", "3"])
    with pytest.raises(SystemExit):
        mac.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "or (model, not in the paper) Eq. 11's target itself, without a network (def" in text
