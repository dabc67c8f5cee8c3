"""Entry of the command line: standard streams and signals first, then the imports."""

from __future__ import annotations

import os
import sys

from tokenrec.errors import EXIT_INPUT
from tokenrec.runtime import early_stop, std_streams


def main() -> int:
    """Run the verb of `sys.argv`; return the exit code."""
    std_streams.protect()
    trains = sys.argv[1:2] == ["train"]
    if trains:
        early_stop.start()
    # Imported late: a signal to stop must find its handler, however slow the disk is.
    from tokenrec.cli import library_log
    from tokenrec.cli.main import main as run

    library_log.shorten()
    code = run()
    # The result of a training is its folder, and that of other verbs what they print.
    lost = None if trains else std_streams.lost_output()
    if lost is not None and code == 0:
        print(
            f"tokenrec: standard output: {os.strerror(lost)}; the output is "
            "incomplete; make room where it goes and run the command again",
            file=sys.stderr,
        )
        return EXIT_INPUT
    return code
