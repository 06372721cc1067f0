"""Exit statuses of the commands."""

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130
