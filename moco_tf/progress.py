"""Progress bars by tqdm, on a terminal and in a notebook; elsewhere lines in the log show the progress instead.

`log_to_screen` writes above bars (see `Screen`), so that a line does not break a bar.
"""

import logging
import sys
import time


def bar(total, unit, what="", over=None, done=0):
    """Returns a bar of `total` things to do, such as images, for `with` and `update(n)`. It leaves nothing behind.

    what: a word before the bar. over: an iterable; the bar then iterates over it. done: how many are done already.
    """
    from tqdm.auto import tqdm

    # tqdm's own test recognises only terminals, and a notebook's output is not a terminal.
    silent = not (in_notebook() or sys.stdout.isatty())
    where = {"file": sys.stdout, "leave": False, "disable": silent, "dynamic_ncols": True}
    return tqdm(over, total=total, initial=done, unit=f" {unit}", desc=what or None, **where)


class Minutes:
    """Says when a minute has passed, for a line of progress where there is no bar."""

    def __init__(self):
        self.said = time.monotonic()

    def passed(self):
        """Whether more than a minute has passed since the start, or since this was true."""
        now = time.monotonic()
        if now - self.said <= 60:
            return False
        self.said = now
        return True


def duration(seconds):
    """Seconds in words: 45 s, 12 min, 3 h 20 min, 2 days 4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} days {minutes % 1440 // 60} h"


def in_notebook():
    """Whether this process is a notebook's kernel."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


class Screen(logging.StreamHandler):
    """Writes messages to stdout, above a bar if there is one."""

    def __init__(self):
        logging.Handler.__init__(self)

    @property
    def stream(self):
        """The current stdout: notebooks and tests replace it."""
        return sys.stdout

    def emit(self, record):
        tqdm = sys.modules.get("tqdm")  # it is not loaded until something makes a bar
        if tqdm is None or not getattr(tqdm.tqdm, "_instances", None):
            return super().emit(record)
        try:
            tqdm.tqdm.write(self.format(record), file=self.stream)
        except Exception:  # as the logging module does
            self.handleError(record)

    def handleError(self, record):
        """Ignores a screen that cannot be written to, such as a file on a full disk: the work goes on."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
