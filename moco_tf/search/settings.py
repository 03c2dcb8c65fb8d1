"""Code that the commands of search share: how they run, and what they refuse.

The module imports nothing heavy, so a wrong flag is rejected at once.
"""

from pathlib import Path

from moco_tf import command
from moco_tf.command import ConfigError
from moco_tf.files import printable
from moco_tf.startup import load_tensorflow


def run(program, doc, kind, function, arguments):
    """Runs a command of search, `function(settings)`; returns the process's exit status."""
    command.log_to_screen()

    def work(words):
        settings = command.parse(kind, program, words)
        try:
            import faiss  # noqa: F401
        except ImportError:
            raise ConfigError("search needs faiss: pip install 'moco_tf[search]'") from None
        load_tensorflow()  # takes seconds; the flags are already checked
        from moco_tf.data import errors

        with errors.in_a_line(" The same command goes on where it stopped."):
            function(settings)
        return 0

    return command.run(program, doc, work, arguments)


def require_folder(path, name):
    """Refuses a flag that does not name a folder to make or to write to."""
    if not path:
        raise ConfigError(f"--{name}=DIR names the folder to write to")
    if Path(path).exists() and not Path(path).is_dir():
        raise ConfigError(f"--{name} names a folder; {printable(path)} is none")


def require_index(path):
    """Refuses a missing --index."""
    if not path:
        raise ConfigError("--index=DIR names an index, as moco_tf.search.build writes it")
