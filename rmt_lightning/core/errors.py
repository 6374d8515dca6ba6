"""The one exception that is meant for the person at the keyboard."""


class UserError(ValueError):
    """Something the user asked for cannot be done.

    The message is one line: what is wrong, what is allowed, what to do. The front doors print it
    without a traceback and leave with exit code 2.
    """

    def __init__(self, message: str) -> None:
        # One that comes out of a loader worker is made anew there, of the whole traceback.
        super().__init__(message.rstrip().rpartition(f"{__name__}.UserError: ")[2])
