"""What a user did that cannot be done, told apart from a defect of ours."""


class UsageError(ValueError):
    """Bad input: its message is all that a user needs to see, on one line."""


class Unsuitable(ValueError):
    """Choices that are each valid and do not go together: an error in a single job, pruned from a grid.

    Attributes:
        rule: What forbids the combination, in words that are the same for every cell it concerns.
    """

    def __init__(self, rule: str, detail: str = "") -> None:
        super().__init__(f"{rule}; {detail}" if detail else rule)
        self.rule = rule


def first_line(error: BaseException) -> str:
    """Kind and first line of an error of somebody else's library."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]
