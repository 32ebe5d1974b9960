"""What all processes of a run decide together between two updates: to go on, to save, to stop."""
import math
import os
import signal
import time
from typing import Callable, Optional

from ..errors import NonFiniteLoss, Stopped, TooManyDamagedImages
from ..machine.agreement import Agreement
from ..machine.processes import complain


def name_replaced(damaged):
    """Names, on standard error, the (path, class, reason) of files in whose places other pictures have come."""
    for path, label, reason in damaged:
        complain("Damaged image, another one takes its place: {} (class {}; {})".format(path, label, reason))


class Signals:
    """Takes SIGTERM and SIGINT as a wish to save and stop, SIGUSR1 as a wish to save, while it is entered.

    A second SIGTERM or SIGINT ends the process at once, unless it follows so soon that it is the first one passed on by
    a launcher. A signal that the process was started to ignore, as a shell's background jobs ignore SIGINT, stays
    ignored.
    """

    PASSED_ON_WITHIN = 3.0  # seconds

    def __init__(self):
        self.stop = False
        self.save = False
        self._since = 0.0
        self._before = {}
        self._process = os.getpid()

    def _on_stop(self, number, frame):
        if os.getpid() != self._process:  # a loader's worker, which Ctrl-C reaches too, and which this process ends
            return
        if not self.stop:
            self.stop, self._since = True, time.monotonic()
            os.write(2, b"Stopping: the state is saved after this batch; the same signal again, in a few seconds, "
                     b"stops at once\n")
        elif time.monotonic() - self._since > self.PASSED_ON_WITHIN:
            os._exit(128 + number)

    def _on_save(self, number, frame):
        self.save = True

    def __enter__(self):
        for number, handler in ((signal.SIGTERM, self._on_stop), (signal.SIGINT, self._on_stop),
                                (signal.SIGUSR1, self._on_save)):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Control:
    """Decides for every process alike. The loop calls `before_update` with the loss, before it touches the weights, and
    reads `save` and `stop` after the update.

    save_every_steps, save_every_minutes: None for never. max_damaged: that many damaged files may turn up in the run.
    skip_nonfinite: that many updates in a row may be left out because the loss is not finite.
    """

    def __init__(self, agreement: Agreement, signals: Signals, save_every_steps: Optional[int] = None,
                 save_every_minutes: Optional[float] = None, max_damaged: int = 50, skip_nonfinite: int = 0):
        self._agreement = agreement
        self._signals = signals
        self._save_every_steps = save_every_steps
        self._save_every_seconds = save_every_minutes and 60 * save_every_minutes
        self._max_damaged = max_damaged
        self._skip_nonfinite = skip_nonfinite
        self._last_save = time.time()
        self._updates = 0
        self._known = set()  # indices of damaged files, of all processes
        self.nonfinite_in_a_row = 0
        self.save = self.stop = False

    @property
    def damaged(self):
        """How many damaged files all processes have met."""
        return len(self._known)

    def state_dict(self) -> dict:
        """What a resumed run goes on counting from."""
        return {"damaged": sorted(self._known), "nonfinite_in_a_row": self.nonfinite_in_a_row}

    def load_state_dict(self, state: dict):
        """Takes what state_dict() gave."""
        self._known = {int(index) for index in state["damaged"]}
        self.nonfinite_in_a_row = int(state["nonfinite_in_a_row"])

    def watch_evaluation(self, batches: int) -> Callable:
        """What is to be called with the number of every batch of an evaluation, of which this process has so many
        `batches`: it raises Stopped, on every process, where a signal asks one of them to stop."""
        common = int(min(self._agreement.gather(batches)))

        def before_batch(number):
            if number < common and self._agreement.total(int(self._signals.stop))[0]:
                raise Stopped
        return before_batch

    def before_update(self, loss: float, damaged=()) -> bool:
        """Whether the update is to be made. damaged: (index, path, class, reason) of the files met since the last one.

        Raises NonFiniteLoss or TooManyDamagedImages, on every process.
        """
        new = {index: rest for index, *rest in damaged if index not in self._known}
        name_replaced(new.values())
        due = self._save_every_seconds is not None and time.time() - self._last_save >= self._save_every_seconds
        nonfinite, stop, save, more = self._agreement.total(
            int(not math.isfinite(loss)), int(self._signals.stop), int(self._signals.save or due), len(new))
        self._updates += 1
        self._signals.save = False
        self.stop = stop > 0
        self.save = save > 0 or self.stop or (
            self._save_every_steps is not None and self._updates % self._save_every_steps == 0)
        if self.save:
            self._last_save = time.time()
        if more:
            self._known |= self._agreement.union(new)
        if self.damaged > self._max_damaged:
            raise TooManyDamagedImages("{} picture files cannot be decoded and --max-bad-images allows {}; they are "
                "named above".format(self.damaged, self._max_damaged))
        if not nonfinite:
            self.nonfinite_in_a_row = 0
            return True
        self.nonfinite_in_a_row += 1
        if self.nonfinite_in_a_row > self._skip_nonfinite:
            raise NonFiniteLoss("the loss is {}".format(loss) if not math.isfinite(loss)
                                else "the loss of another process is not finite")
        return False
