"""The one exception a user is meant to read."""


class InputError(ValueError):
    """Bad input or usage: the message names the file, line or shapes and what to do. The command line exits with 2."""
