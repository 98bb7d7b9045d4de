"""The exceptions that a user is meant to see, and what of another one to show."""


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


def gist(error: Exception) -> str:
    """First line of the message that is no heading, without its final period, 200 characters at most; or the type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.endswith(":")), type(error).__name__).rstrip(".")[:200]


def named_gist(error: Exception) -> str:
    """The gist with the error's type, for a message that was not written for users."""
    return f"{type(error).__name__}: {gist(error)}"
