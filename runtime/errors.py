"""How a run can end before its end, with the exit code of each way. `command.run` turns them into one sentence.

| exit code | meaning |
|---|---|
| 0 | done, or stopped as asked with the state saved |
| 1 | the run failed: a loss that is not finite, damaged pictures, a file that cannot be written, a lost process |
| 2 | a mistake in what the user gave |
| 130 | interrupted from the keyboard |
"""


class Ending(Exception):
    """What ends a command early. Its text is the sentence that the user reads."""
    exit_code = 1
    on_every_process = False  # every process has something of its own to say


class UserError(Ending):
    """A mistake in what the user gave: flags, files, data."""
    exit_code = 2


class RunFailed(Ending):
    """The flags were right and the run failed."""


class SaveFailed(RunFailed):
    """A file could not be written; those written before are as they were."""


class NonFiniteLoss(RunFailed):
    """Training diverged: the loss of an update is infinite or not a number. The weights are those before it."""
    on_every_process = True


class TooManyDamagedImages(RunFailed):
    """More picture files than the user allows cannot be decoded."""


class DamagedImage(RunFailed):
    """A picture file that cannot be decoded."""

    def __init__(self, path, reason=""):  # a data loader makes it anew from its worker's text alone
        super().__init__("{}: {}".format(path, reason) if reason else path)
        self.path = path
        self.reason = reason


class Stopped(Ending):
    """A signal asked for it, and the state is saved."""
    exit_code = 0

    def __init__(self):
        super().__init__("Stopped as asked; to go on: the same command with --resume auto")
