"""What a user did that cannot be done, told apart from a defect of ours."""


class UsageError(ValueError):
    """Bad input: its message is all that a user needs to see, on one line."""


def first_line(error: BaseException) -> str:
    """Kind and first line of an error of somebody else's library."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]
