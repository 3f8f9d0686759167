"""What a user can act on, with the exit code that a script ends with.

0 done, 1 a bug of ours (traceback), 2 usage, config or data, 3 training diverged, 4 input or output,
130 and 143 stopped by SIGINT and SIGTERM and resumable.
"""


class UserError(Exception):
    """A fault that its message explains: file, line or key, and the remedy. Shown without a traceback."""

    exit_code = 2


class DivergedError(UserError):
    """The loss, a gradient or a weight is not finite."""

    exit_code = 3


class OutputError(UserError):
    """A file cannot be read or written: disk full, read-only, missing parent."""

    exit_code = 4


class StoppedError(UserError):
    """A signal stopped the run after it published a checkpoint.

    Args:
        message: says how to resume.
        signum: the signal's number; the exit code is 128 + signum.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum
