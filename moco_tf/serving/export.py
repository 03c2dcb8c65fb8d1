"""Exports a run for a server, or asks the server: a word before the flags chooses the command.

  python -m moco_tf.serving.export encoder --run_dir=RUN --output=DIR                   # the run's encoder
  python -m moco_tf.serving.export classifier --run_dir=RUN --probe=PROBE --output=DIR  # with a probe's classifier
  python -m moco_tf.serving.export client --images=PATH --output=FILE.npz               # images to vectors

Without a word, the command is encoder. --help after a word lists its flags. docs/serving.md describes the output.
"""

import sys
from importlib import import_module

from moco_tf import command
from moco_tf.command import ConfigError

WORDS = ("encoder", "classifier", "client")


def main(arguments):
    """Runs the command; returns the process's exit status."""
    if arguments and not arguments[0].startswith("-"):
        word, *rest = arguments
    elif command.asks_for_help(arguments):
        print(__doc__)
        return 0
    else:
        word, rest = "encoder", arguments
    if word not in WORDS:
        return command.run("moco_tf.serving.export", __doc__, _refuse, word)
    return import_module(f"moco_tf.serving.export_{word}").main(rest)


def _refuse(word):
    raise ConfigError(f"the word before the flags is one of {', '.join(WORDS)}; got {word!r}: see --help")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
