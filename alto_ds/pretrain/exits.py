"""With which exit statuses does a run end? ``launch/README.md`` says what scripts do with them."""

from __future__ import annotations

from enum import IntEnum


class ExitStatus(IntEnum):
    """Exit status of every rank of a run.

    Where a number is not a shell's own convention, it is that of ``sysexits.h``. Python itself
    ends with 1 after an error that nobody foresaw, such as a lost rank.
    """

    FINISHED = 0
    REFUSED = 2  # as argparse's: settings, text or folder must change first
    NOT_FINITE = 65  # EX_DATAERR: the same command would most likely fail again
    REQUEUE = 75  # EX_TEMPFAIL: saved; the same command goes on
    INTERRUPTED = 130  # 128 + SIGINT: saved, and a user wanted it to end
