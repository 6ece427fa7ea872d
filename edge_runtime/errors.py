"""The errors that this project raises on purpose.

A class of its own exists only where a caller acts differently on it. The command line prints an AiflowError as one
line; any other exception is a bug and shows its traceback.
"""


class AiflowError(Exception):
    """Something outside is wrong. The message says what was found, what was wanted, what to do."""


class ConfigError(AiflowError, ValueError):
    """The operator must change something before this can work: a setting, a secret, a bundle, the installation.

    `aiflow run`, `serve` and `validate` exit with 78, and systemd does not start them again.
    """


class RestartError(AiflowError):
    """The board has to start again: another bundle is to run, or the start took too long. `aiflow run` exits with 75,
    and systemd starts it.
    """


class StoppedError(AiflowError):
    """The board was told to stop before its start was over. `aiflow run` then ends in order."""
