"""What all commands have in common: settings as flags, help, one line for each refusal, and the exit status.

A command's settings are a frozen dataclass whose fields are made by `flag`. Its `__post_init__` refuses values that do
not go together. This module imports nothing heavy, so that a wrong flag is refused at once.
"""

import codecs
import contextlib
import dataclasses
import io
import json
import logging
import math
import os
import signal
import sys
import threading
from pathlib import Path

from absl import flags

from moco_tf import files
from moco_tf.files import printable
from moco_tf.progress import Screen

HELP = ("--help", "-h", "--helpfull", "--helpshort")


class HelpAsked(Exception):
    """--help was given; the message is the help."""


class Stopped(Exception):
    """The command ends with status 1; a line has said why."""


class ConfigError(ValueError):
    """Settings that do not go together. The message is one line: the rule, the value, the way out."""


def run(program, doc, function, arguments):
    """Calls `function(arguments)`, a command's work; returns the process's exit status.

    Args:
      program: the command's name, as `python -m` takes it; a refusal's line begins with it.
      doc: what --help says before it lists the flags.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's stream is of another class
            stream.reconfigure(errors="backslashreplace")  # names may hold bytes that are not text
    try:
        return function(arguments)
    except HelpAsked as help:
        print(f"{doc}\n{help}")
        return 0
    except ConfigError as error:
        print(f"{program}: {printable(error)}", file=sys.stderr)
        return 2
    except Stopped:
        return 1
    except KeyboardInterrupt:  # outside training, which handles it and saves
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not (line := of_the_machine(error)):
            raise
        mended = "mend this and run the command again; files that were already written are complete"
        print(f"{program}: {line}: {mended}", file=sys.stderr)
        return 1


def read_json(path, kind=dict):
    """Returns what is in a JSON file that this package wrote, of this kind.

    Raises:
      ConfigError: the file is missing, damaged or holds something else.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is damaged"
    else:
        if isinstance(value, kind):
            return value
        reason = "it holds something else"
    raise ConfigError(f"{printable(path)} cannot be used, {reason}: bring it back, or remove it and make it anew")


def of_the_machine(error):
    """Returns one line on an error that the machine, its storage or its limits caused; None for any other error."""
    if isinstance(error, OSError):
        return files.fault(error)
    if isinstance(error, MemoryError):
        return "memory has run out"
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return "the machine, or a limit of this process, allows no more threads"
    return None


def shipped(installed, checkout):
    """Returns the path of a folder that is inside an installed package, and at the top of a checkout."""
    package = Path(__file__).parent
    return package / installed if (package / installed).is_dir() else package.parent / checkout


class _OneLine(logging.Formatter):
    """Makes each message one line that does not control the terminal, whatever names are in it."""

    def formatMessage(self, record):
        return printable(super().formatMessage(record))


def log_to_screen():
    """Shows the package's messages, as they are, on stdout; returns the logger."""
    screen = Screen()
    screen.setFormatter(_OneLine("%(message)s"))
    screen.setLevel(logging.INFO)
    log = logging.getLogger("moco_tf")
    log.handlers[:] = [screen]
    log.setLevel(logging.DEBUG)  # train.log has it all
    log.propagate = False
    return log


@contextlib.contextmanager
def log_to_file(path):
    """Also writes what is logged in this context to a file, with more detail than on the screen."""
    handler = _LogFile(path, encoding="utf-8", errors="backslashreplace", delay=True)
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("moco_tf")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        with contextlib.suppress(OSError):  # `handleError` has reported it
            handler.close()


class _LogFile(logging.FileHandler):
    """A log file whose failure stops no work: if it cannot be written, the screen says so once."""

    failed = False

    def _open(self):  # follows no link: the folder may be a stranger's
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT | files.NO_FOLLOW, 0o666)
        return open(descriptor, "a", encoding=self.encoding, errors=self.errors)

    def emit(self, record):
        try:
            super().emit(record)
        except OSError:  # it cannot be opened
            self.handleError(record)

    def handleError(self, record):
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.failed:
            self.failed = True
            reason = error.strerror or error
            logging.getLogger("moco_tf").warning(
                f"{files.printable(self.baseFilename)}: {reason}; it lacks lines that are shown here, and all goes on."
            )


@contextlib.contextmanager
def signals_to(saver):
    """Notes the first Ctrl-C or SIGTERM as `saver.signal`, for work that ends after the current step.

    A second signal ends the process at once. Does nothing outside the main thread, where Python takes no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number, frame):
        saver.signal = signal.Signals(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def flag(default, help, choices=None, path=False, **metadata):
    """A field of a settings dataclass that is a flag. Its type is str, int, float, bool or tuple[int, ...].

    path: whether the value is, or may be, a path. ~ in it is the home folder; no shell expands it after `--name=`.
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "path": path} | metadata)


def require(settings, holds, name, rule):
    """Refuses a setting's value unless the rule, such as "is more than 0", holds."""
    if not holds:
        raise ConfigError(f"--{name} {rule}; got {getattr(settings, name)}")


def fields(kind):
    """The fields of a settings dataclass that are flags."""
    return [field for field in dataclasses.fields(kind) if "help" in field.metadata]


def check_values(settings):
    """Refuses values that are not among their flag's choices, and numbers that are not finite."""
    for field in fields(type(settings)):
        choices, value = field.metadata["choices"], getattr(settings, field.name)
        if choices and value not in choices:
            raise ConfigError(f"--{field.name} is one of {', '.join(choices)}; got {value!r}")
        if isinstance(value, float):
            require(settings, math.isfinite(value), field.name, "is a finite number")


def parse(kind, program, arguments):
    """Command-line arguments (without the program's name) -> settings of the dataclass `kind`.

    Raises:
      HelpAsked: with the help as its text.
      ConfigError: an unknown flag, a value that its flag does not take, or values that do not go together.
    """
    flag_values = flags.FlagValues()
    define(flag_values, fields(kind))
    read_arguments(flag_values, program, arguments, {"Flags": kind})
    return kind(**values(flag_values, kind))


def look_ahead(kind, program, arguments):
    """Returns the values of the flags of `kind`, a dict, from arguments with other flags as well; ignores --help."""
    flag_values = flags.FlagValues()
    define(flag_values, fields(kind))
    try:
        lines, rest = _with_flag_file([argument for argument in arguments if argument not in HELP])
        flag_values([program, *lines, *rest], known_only=True)
    except (ConfigError, flags.Error, ValueError):
        pass  # `read_arguments` says what is wrong
    return values(flag_values, kind)


class _Path(flags.ArgumentParser):
    """Reads a path from a flag."""

    def parse(self, argument):
        return os.path.expanduser(super().parse(argument))


def define(flag_values, fields, any_choice=False):
    """Defines a flag for each field of a settings dataclass on an absl `FlagValues`; only mains call this.

    any_choice: whether flags with choices take other values, too.
    """
    for field in fields:
        name, default, help = field.name, field.default, field.metadata["help"]
        if field.metadata["choices"] and not any_choice:
            flags.DEFINE_enum(name, default, field.metadata["choices"], help, flag_values=flag_values)
        elif field.type == tuple[int, ...]:
            flags.DEFINE_list(name, [str(x) for x in default], help, flag_values=flag_values)
        elif field.metadata["path"]:
            flags.DEFINE(_Path(), name, default, help, flag_values=flag_values, serializer=flags.ArgumentSerializer())
        else:
            define = {
                str: flags.DEFINE_string,
                int: flags.DEFINE_integer,
                float: flags.DEFINE_float,
                bool: flags.DEFINE_boolean,
            }[field.type]
            define(name, default, help, flag_values=flag_values)
        flags.declare_key_flag(name, flag_values=flag_values)


def asks_for_help(arguments):
    """Whether a flag among the arguments asks for help."""
    return any(argument in HELP for argument in arguments)


def read_arguments(flag_values, program, arguments, groups=None):
    """Reads command-line arguments into a `FlagValues`; raises as `parse` does.

    groups: {title: settings dataclass}, the groups in which --help shows the flags; None: one group.
    """
    if asks_for_help(arguments):
        raise HelpAsked(_help(flag_values, groups) if groups else flag_values.get_help())
    lines, rest = _with_flag_file(arguments, says=True)
    try:
        _read(flag_values, program, lines)
    except ConfigError as error:
        raise ConfigError(f"{arguments[0]}: {error}") from None
    _read(flag_values, program, rest)


def _help(flag_values, groups):
    """The flags in titled groups, each with its help and its default."""
    lines = []
    for title, kind in groups.items():
        lines += ["", f"{title}:"]
        for name in (field.name for field in fields(kind)):
            flag = flag_values[name]
            usage = f"--[no]{name}" if flag.boolean else f"--{name}"
            lines.append(flags.text_wrap(f"{usage}: {flag.help}", 100, "    ", "  "))
            lines.append(f"    (default: {flag.default_as_str})")
    return "\n".join(lines)


def _with_flag_file(arguments, says=False):
    """Returns (the lines of the flag file that the first argument names, or no lines; the other arguments).

    says: whether to name a packaged recipe on the screen.
    """
    for place, argument in enumerate(arguments):
        if _is_flag_file(argument):
            if not argument.partition("=")[2]:
                raise ConfigError(f"--flagfile=FILE names the file after an equals sign; got {argument!r}")
            if place:
                raise ConfigError(
                    f"--flagfile comes first: it would override {arguments[0]!r}, which stands before it"
                )
    if not arguments or not _is_flag_file(arguments[0]):
        return [], arguments
    file = arguments[0].partition("=")[2]
    try:
        path = _found(file)
        lines = lines_of(path)
    except ConfigError as error:
        raise ConfigError(f"--flagfile={file}: {error}") from None
    if says and path != os.path.expanduser(file):
        print(f"Recipe: {printable(path)}", flush=True)
    return lines, arguments[1:]


def _is_flag_file(argument):
    return argument.startswith("-") and argument.lstrip("-").partition("=")[0] == "flagfile"


def _found(flag_file):
    """Returns a flag file's path; looks for a missing configs/<name>.flags among the packaged recipes."""
    path = os.path.expanduser(flag_file)
    folder, name = os.path.split(os.path.normpath(path))
    if folder != "configs" or not name.endswith(".flags") or os.path.lexists(path):
        return path
    recipes = shipped("configs", "configs")
    if not (recipes / name).exists():
        known = ", ".join(f"configs/{recipe.name}" for recipe in sorted(recipes.glob("*.flags")))
        raise ConfigError(f"is neither a file here nor a packaged recipe; those are {known}")
    return recipes / name


def _read(flag_values, program, arguments):
    try:
        rest = flag_values([program, *arguments])[1:]
    except (flags.Error, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    if rest:
        raise ConfigError(f"all arguments are flags, --name=value; got {' '.join(rest)!r}")


def lines_of(flag_file):
    """Returns the arguments in a flag file, one per line, without blank lines and lines that begin with # or //.

    The file is UTF-8 or, with a byte order mark, UTF-16. Bytes that are not UTF-8, which paths may hold, are kept.
    """
    try:
        with open(flag_file, "rb") as file:
            content = file.read()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from None
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    # Some editors begin files with a byte order mark.
    encoding, errors = ("utf-16", "strict") if wide else ("utf-8-sig", "surrogateescape")
    try:
        lines = io.TextIOWrapper(io.BytesIO(content), encoding, errors).readlines()
    except UnicodeDecodeError:
        raise ConfigError("begins as UTF-16 and is none: save it as UTF-8") from None
    lines = [line.strip() for line in lines if not line.isspace() and not line.startswith(("#", "//"))]
    for line in lines:
        if _is_flag_file(line):
            raise ConfigError(f"a flag file holds flags and names no other one; got {line!r}")
    return lines


def values(flag_values, kind):
    """Returns the values of the fields of the dataclass `kind` from parsed flags, a dict."""
    settings = {field.name: flag_values[field.name].value for field in fields(kind)}
    for field in fields(kind):
        if field.type == tuple[int, ...]:
            try:
                settings[field.name] = tuple(int(x) for x in settings[field.name])
            except ValueError:
                got = ",".join(settings[field.name])
                raise ConfigError(f"--{field.name} lists whole numbers, as in 120,160; got {got!r}") from None
    return settings
