"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """A mistake in what the user gave: main.py prints its one sentence and exits with 2, without a traceback."""
