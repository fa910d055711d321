"""A fit that is killed again and again gives what it gives undisturbed; `make faults` does it a thousand times."""

import subprocess
import sys
from pathlib import Path


def test_kills():
    """In a process of its own: the harness forks, and no thread of an earlier test may wait in what it forks."""
    command = [sys.executable, "-m", "tests.faults.harness", "--kills", "12", "--threads", "1"]
    folder = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].startswith("12 ends in ")
    assert done.stdout.splitlines()[-1].endswith("nothing lost, every result the same")
