"""The exceptions that are meant for the user's eyes."""


class BeelineError(Exception):
    """Something the user can mend. The message says what was found, what was expected and the fix; commands print it
    alone, without a traceback, and exit with status 1."""


class StorageError(BeelineError):
    """A file or listing that could not be had, retries included: it may pass, so training that is restarted tries again."""


class SettingError(BeelineError):
    """A setting that cannot be. The message begins with its name: of a config's field, as PairsConfig.count, or an option."""
