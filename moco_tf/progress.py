"""Progress bars, by tqdm: on a terminal and in a notebook; elsewhere there are none, and lines in the log say it.

`log_to_screen` and bars know of each other (`Screen`), so that a line does not break a bar.
"""

import logging
import sys


def bar(total, unit, what="", over=None, done=0):
    """A bar of `total` things to do, such as images; use it in `with` and `update(n)` it. It leaves nothing behind.

    what: a word that stands before it. over: an iterable, which it then is as well. done: how many are done already.
    """
    from tqdm.auto import tqdm

    # tqdm asks only a terminal whether it is one; a notebook's output says that it is none.
    silent = not (in_notebook() or sys.stdout.isatty())
    where = {"file": sys.stdout, "leave": False, "disable": silent, "dynamic_ncols": True}
    return tqdm(over, total=total, initial=done, unit=f" {unit}", desc=what or None, **where)


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
    """Writes messages to stdout, above a bar where there is one."""

    def __init__(self):
        logging.Handler.__init__(self)

    @property
    def stream(self):
        """What stdout is by now: notebooks and tests put another in its place."""
        return sys.stdout

    def emit(self, record):
        tqdm = sys.modules.get("tqdm")  # where nothing has made a bar, nothing loads it
        if tqdm is None or not getattr(tqdm.tqdm, "_instances", None):
            return super().emit(record)
        try:
            tqdm.tqdm.write(self.format(record), file=self.stream)
        except Exception:  # as logging has it
            self.handleError(record)

    def handleError(self, record):
        """Nobody sees a screen that cannot be written to, such as a file on a full disk: the work goes on."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
