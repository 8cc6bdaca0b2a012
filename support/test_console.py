"""pytest: errors and closed outputs in the terminal."""
import contextlib
import subprocess
import sys
from unittest import mock

import pytest

from support import console
from support.test_common import HERE


@pytest.mark.parametrize("error, line", [
    (console.MacError("two\n  lines"), "two lines"), (MemoryError("80 GB"), "80 GB"),
    (FileNotFoundError(2, "No such file", "x"), "cannot use x: No such file"),
    (RuntimeError("CUDA out of memory"), "CUDA out of memory"), (RuntimeError("shapes"), None)])
def test_what_a_user_can_mend_is_one_line_and_a_bug_stays_one(error, line, capsys):
    program = console.command(mock.Mock(side_effect=error))
    with pytest.raises(RuntimeError) if line is None else contextlib.nullcontext():
        assert program([]) == 2 and capsys.readouterr().err == f"error: {line}\n"


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
