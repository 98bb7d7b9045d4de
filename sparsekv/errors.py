"""The one exception that a user is meant to see."""


class UserError(Exception):
    """Input that cannot work.

    The message is one line: it names the flag or file, the value given, and what would be right. The command line
    prints it and exits with status 2; nothing is left half-written.
    """


class LostProcessError(Exception):
    """Another process of this job has ended, and this one cannot go on without it.

    The message is one line: it says how to continue. The command line prints it and exits with status 1.
    """


def require(holds: bool, message: str) -> None:
    """Raise UserError with the message unless the condition holds."""
    if not holds:
        raise UserError(message)
