"""The base of every error that this project raises on purpose."""


class AiflowError(Exception):
    """Something outside is wrong: a file, a setting, a peer. The message says what was found, what was wanted, what to
    do. The command line prints it as one line; any other exception is a bug and shows its traceback.
    """
