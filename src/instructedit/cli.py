"""The command line: Lightning's fit, validate, test and predict, and the project's own commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import instructedit
from instructedit.commands import commands, run_command
from instructedit.errors import UserError, one_line, unknown

LIGHTNING = ("fit", "validate", "test", "predict")
DEBUG = "INSTRUCTEDIT_DEBUG"
#: How to resume each command after Ctrl-C.
_RESUMING = {
    "fit": "; to go on, give the same command with --ckpt_path and the run's last.ckpt",
    "experiment": "; the same command goes on with the rows that are left",
    "cache": "; the same command goes on where it stopped",
    "pretrain": "; the same command goes on from its last checkpoint",
}


def usage() -> str:
    """Returns the text that ``instructedit --help`` prints."""
    lines = [
        "usage: instructedit COMMAND [options]      (instructedit COMMAND --help explains every option; --version)",
        "",
        "Train, apply, measure and compare knowledge editors of language models.",
        "",
        "by config (--scale tiny --editor instructedit, or each file by --config; then single options):",
        "  fit          train an editor",
        "  validate     score an editor on validation records",
        "  test         score an editor on test records: tables, figures, MLflow",
        "  predict      the model's words before and after each edit",
        "",
        "others:",
    ]
    lines += [f"  {name:<12} {(module.__doc__ or '').splitlines()[0]}" for name, module in commands().items()]
    lines += ["", f"Errors are one line; set {DEBUG}=1 for the traceback."]
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 2 for a `UserError`, 130 for Ctrl-C."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0 if args else 2
    if args[0] == "--version":
        print(f"instructedit {instructedit.__version__}")
        return 0
    try:
        if args[0] in LIGHTNING:
            from instructedit.lightning_cli import run

            run(args)
            return 0
        if args[0] in commands():
            run_command(args[0], args[1:])
            return 0
        raise unknown("command", args[0], [*LIGHTNING, *commands()])
    except UserError as error:
        return _say(error)
    except KeyboardInterrupt:
        print(f"instructedit: interrupted{_RESUMING.get(args[0], '')}", file=sys.stderr)
        return 130


def _say(error: UserError) -> int:
    if os.environ.get(DEBUG):
        raise error
    print(f"instructedit: error: {one_line(error)}", file=sys.stderr)
    return 2


def run() -> Any:
    """Runs the command line and exits with its status; the entry point of the console script."""
    sys.exit(main())


if __name__ == "__main__":
    run()
