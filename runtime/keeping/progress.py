"""Progress of a loop: a bar on a terminal, a plain line now and then in a log."""
import sys
import time
from datetime import timedelta

from tqdm import tqdm

from ..printing import say

LINE_EVERY = 50  # iterations between two plain lines


class Progress:
    """Iterates over `iterable` of `total` items and shows `header`, the latest `note(...)`, images/s and time left.

    Only where `enabled` (rank 0). `images` counts the images that this process has been told of.
    """

    def __init__(self, iterable, total, header, enabled=True):
        self.iterable = iterable
        self.total = total
        self.header = header
        self.enabled = enabled
        self.bar = enabled and sys.stderr.isatty()
        self.images = 0
        self.start = time.time()
        self.clock = (self.start, 0)  # time and image count from which speed is measured
        self.values = {}
        self.waited = 0.0  # seconds that the loop has waited for `iterable`, since the clock was restarted

    def note(self, images, **values):
        """Counts `images` more (over all processes) and takes numbers to show, by name."""
        self.images += images
        self.values = values

    def restart_clock(self):
        """Speed is measured from here on."""
        self.clock = (time.time(), self.images)
        self.waited = 0.0

    @property
    def waiting_share(self):
        """Share of the time that the loop has waited for its next item."""
        return self.waited / max(time.time() - self.clock[0], 1e-9)

    @property
    def seconds(self):
        return time.time() - self.start

    @property
    def images_per_second(self):
        start, images = self.clock
        return (self.images - images) / max(time.time() - start, 1e-9)

    def _text(self):
        shown = ["{}: {:.4g}".format(name, value) for name, value in self.values.items()]
        return "  ".join(shown + ["images/s: {:.1f}".format(self.images_per_second)])

    def __iter__(self):
        self.start = time.time()
        self.clock = (self.start, 0)
        bar = tqdm(total=self.total, desc=self.header, file=sys.stderr, leave=False) if self.bar else None
        iterator, i = iter(self.iterable), 0
        while True:
            asked = time.time()
            try:
                item = next(iterator)
            except StopIteration:
                break
            self.waited += time.time() - asked
            i += 1
            yield item
            if bar is not None:
                bar.set_postfix_str(self._text(), refresh=False)
                bar.update()
            elif self.enabled and (i % LINE_EVERY == 0 or i == self.total):
                left = timedelta(seconds=int(self.seconds / i * (self.total - i)))
                say("{}  [{}/{}]  eta: {}  {}".format(self.header, i, self.total, left, self._text()))
        if bar is not None:
            bar.close()
