"""The one exception that is meant for the user's eyes."""


class BeelineError(Exception):
    """Something the user can mend. The message says what was found, what was expected and the fix; commands print it
    alone, without a traceback, and exit with status 1."""
