"""The errors of the program, each with the exit code that a command ends with."""

OK, FAILED, USAGE, DATA, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143


class PipelineError(Exception):
    """An error whose message names the cause and the next thing to type; it is shown without a traceback."""

    exit_code = FAILED


class ConfigError(PipelineError):
    """The command line or a configuration is wrong."""

    exit_code = USAGE


class DataError(PipelineError):
    """Images, lists, checkpoints or stores are missing, damaged or do not belong together."""

    exit_code = DATA


class Diverged(PipelineError):
    """A loss became infinite or no number."""


class Terminated(PipelineError):
    """SIGTERM arrived; what was done so far is saved and the same command continues it."""

    exit_code = TERMINATED


class Lost(PipelineError):
    """A fellow process is gone without a word; this one cannot go on without it."""


class Elsewhere(PipelineError):
    """Another rank failed and has said why; this one ends with the same exit code and says nothing."""

    def __init__(self, exit_code: int):
        super().__init__("another rank failed")
        self.exit_code = exit_code
