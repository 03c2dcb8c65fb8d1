"""Flags that a run folder records, and what of them may change when the run resumes. Imports nothing heavy."""

from moco_tf import command
from moco_tf.command import ConfigError

# `about`, the kind of a flag, decides whether a run may resume with another value of the flag (see `differences`).
MATHEMATICS = "mathematics"  # changes the numbers: must be equal
FREE = "free"  # lengths, intervals, hardware, places: may differ


def flag(default, help, choices=None, about=MATHEMATICS, path=False):
    """A field of a run's settings, or of `Options`, that is a flag."""
    return command.flag(default, help, choices, path, about=about)


class Recorded:
    """Settings that a run folder records; a run resumes only with settings of the same mathematics."""

    FOLDER = "run_dir"  # the flag that names the folder

    def flag_lines(self):
        """The text of a flag file that repeats this run elsewhere: all flags except its folder and --resume.

        Write it with errors="surrogateescape", so that paths keep their bytes.
        """
        lines = []
        for field in command.fields(type(self)):
            value = getattr(self, field.name)
            if field.name in (self.FOLDER, "resume"):
                continue
            if isinstance(value, bool):
                lines.append(f"--{'' if value else 'no'}{field.name}")
            else:
                lines.append(f"--{field.name}={','.join(map(str, value)) if isinstance(value, tuple) else value}")
        return "\n".join(lines) + "\n"

    def require_lines(self):
        """Raises `ConfigError` if a value, such as a path, would not survive in a line of a flag file."""
        for field in command.fields(type(self)):
            value = getattr(self, field.name)
            if isinstance(value, str) and ("\n" in value or "\r" in value or value != value.strip()):
                raise ConfigError(
                    f"--{field.name} has no line break and neither begins nor ends with a blank, since it is kept in "
                    f"a line of a flag file; got {value!r}: give the file or folder another name"
                )

    def differences(self, other):
        """Names of the flags in which the mathematics of two settings differ."""
        return [
            field.name
            for field in command.fields(type(self))
            if field.metadata["about"] == MATHEMATICS
            and hasattr(other, field.name)  # otherwise they also differ in method or task
            and getattr(self, field.name) != getattr(other, field.name)
        ]
