"""Bars where someone looks, lines where not, and durations in words."""

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
import textwrap
import types

import pytest

from moco_tf import callbacks, command, progress


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5900, "98 min"), (12_000, "3 h 20 min"), (200_000, "2 days 7 h")],
)
def test_durations_in_words(seconds, words):
    assert progress.duration(seconds) == words


def test_without_a_terminal_there_is_no_bar(capsys):
    with progress.bar(10, "images", "Checking") as bar:
        bar.update(3)
        assert bar.disable
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_a_line_stands_above_the_bar_and_the_bar_goes():
    code = """
        import time
        from moco_tf import command, progress
        log = command.log_to_screen()
        with progress.bar(4, "images", "Checking") as bar:
            for number in range(4):
                time.sleep(0.15)
                bar.update()
                if number == 1:
                    log.info("a line")
    """
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # rows, columns
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=its, stderr=its)
    os.close(its)
    text = b""
    try:
        while part := os.read(ours, 65536):
            text += part
    except OSError:  # as a terminal says that its other end is closed
        pass
    assert process.wait() == 0
    text = text.decode()
    assert "Checking" in text and "images" in text and "\ra line\r\n" in text.replace("\x1b[A", "")
    assert text.rstrip("\r").endswith((" ", "\r", "]")) and "\n" not in text.partition("a line\r\n")[2]


def test_after_the_first_steps_a_run_says_how_long_it_takes(monkeypatch):
    said = []
    monkeypatch.setattr(callbacks, "log", types.SimpleNamespace(info=said.append))
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: clock.now)
    shown = callbacks.Progress(types.SimpleNamespace(epochs=10, batch_size=8), total=1000, steps_per_epoch=100)
    shown._model = types.SimpleNamespace(METRICS={}, steps_done=0)
    shown.params = {"steps": 100}
    shown.on_epoch_begin(0)
    for batch in range(40):
        clock.now += 30 if batch == 0 else 2.0  # the first one traces
        shown._model.steps_done += 1
        shown.on_train_batch_end(batch, {"loss": 1.0})
    assert [line for line in said if "A step takes" in line] == [
        "- A step takes 2 s: an epoch about 3 min, what is left of the run about 33 min, evaluation apart."
    ]
    logs = {}
    shown.on_epoch_end(0, logs)
    assert logs["images_per_second"] == 4


def test_lines_go_to_the_screen_as_they_are_whatever_stdout_is_by_then(capsys, monkeypatch):
    log = command.log_to_screen()
    log.info("a line")
    assert capsys.readouterr().out == "a line\n"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    log.info("another")
    assert sys.stdout.getvalue() == "another\n"
