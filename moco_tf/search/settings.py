"""What the commands of search have in common: how they run, and what they refuse.

Imports nothing heavy, so that a wrong flag is answered at once.
"""

import logging
from pathlib import Path

from moco_tf import command
from moco_tf.command import ConfigError
from moco_tf.files import printable
from moco_tf.startup import load_tensorflow

log = logging.getLogger("moco_tf")


def run(program, doc, kind, function, arguments):
    """Runs a command of search, `function(settings)`; returns the process's exit status."""
    command.log_to_screen()

    def work(words):
        settings = command.parse(kind, program, words)
        try:
            import faiss  # noqa: F401
        except ImportError:
            raise ConfigError("search needs faiss: pip install 'moco_tf[search]'") from None
        load_tensorflow()  # takes seconds: wrong flags have been answered by now
        from moco_tf.data.errors import ERRORS, reason

        try:
            function(settings)
        except ERRORS as error:  # an image that changed after it was checked, or too little memory
            log.error(f"Stopped: {reason(error)}. The same command goes on where it stopped.")
            return 1
        return 0

    return command.run(program, doc, work, arguments)


def require_folder(path, name):
    """Refuses a flag that is to name a folder to write to, or to make, and does not."""
    if not path:
        raise ConfigError(f"--{name}=DIR names the folder to write to")
    if Path(path).exists() and not Path(path).is_dir():
        raise ConfigError(f"--{name} names a folder; {printable(path)} is none")


def require_index(path):
    """Refuses an --index that is not given."""
    if not path:
        raise ConfigError("--index=DIR names an index, as moco_tf.search.build writes it")
