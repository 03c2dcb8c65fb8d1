"""`python docs/make_reference.py FOLDER`: the reference of all commands and of the Python names.

The commands' pages are made from the dataclasses of their flags, the Python pages name what Sphinx reads. The site's
build calls `write` (docs/conf.py); no generated page is kept in the repository.
"""

import html
import inspect
import re
import sys
import textwrap
from importlib import import_module
from pathlib import Path

import moco_tf
from moco_tf import command, config, torch_weights
from moco_tf import pretext as pretext_tasks

# {page: (title, commands)}; `_training` has those of training.
COMMANDS = {
    "evaluate": (
        "Evaluation",
        [f"evaluate.{name}" for name in ("knn", "linear_probe", "finetune", "compare", "look", "features", "sts")],
    ),
    "search": ("Search", [f"search.{name}" for name in ("build", "query", "duplicates", "odd", "merge")]),
    "transfer": ("Transfer", [f"transfer.{name}" for name in ("detect", "segment", "export")]),
    "serving": ("Serving", [f"serving.export {word}" for word in ("encoder", "classifier", "client")]),
    "other": ("Images of any format, videos, PyTorch's weights", ["data.convert", "data.frames", "torch_weights"]),
}
TYPES = {str: "text", int: "whole number", float: "number", bool: "switch", tuple[int, ...]: "whole numbers"}

# {page: (title, modules whose public names are shown)}
PYTHON = {
    "encoders": ("Encoders", [f"moco_tf.encoders.{name}" for name in ("resnet", "vit", "text", "heads", "pyramid")]),
    "augment": ("Augmentation", ["moco_tf.data.augment"]),
    "methods": (
        "Losses and schedules",
        ["moco_tf.methods.losses", "moco_tf.methods.queue", "moco_tf.methods.ema", "moco_tf.schedules"],
    ),
}


def pages():
    """{file in the folder of the reference: text}."""
    made = {"train.md": _training()}
    for page, (title, names) in COMMANDS.items():
        made[f"{page}.md"] = "\n\n".join([f"# Commands: {title}", *(_command(name) for name in names)])
    directives = []
    for name in sorted(moco_tf.__all__):
        value = getattr(moco_tf, name)
        if inspect.isclass(value):
            directives.append(f".. autoclass:: moco_tf.{name}\n   :members:")
        elif callable(value):  # not a package
            directives.append(f".. autofunction:: moco_tf.{name}")
    made["moco_tf.rst"] = _python("moco_tf", directives, "The names that ``import moco_tf`` gives.")
    for page, (title, modules) in PYTHON.items():
        directives = [f"{name}\n{'-' * len(name)}\n\n.. automodule:: {name}\n   :members:" for name in modules]
        made[f"{page}.rst"] = _python(title, directives)
    return made


def _training():
    """The page of `moco_tf.train` and `moco_tf.data`."""
    shared = config.Task, config.Data, config.Network, config.Optimization, config.Run
    groups = {group.__doc__: group for group in shared}
    groups |= {f"--method={name}": kind for name, kind in config.METHODS.items()}
    for name in config._names(pretext_tasks):
        groups[f"--pretext={name}"] = config.task_module(name).Options
    return "\n\n".join(
        [
            "# Commands: Training and data",
            "`moco_tf.data` takes the flags of `moco_tf.train`. Every run has the flags of the first groups, those of "
            "its method and those of its pretext task. A task with a model of its own takes no method's flags.",
            _head("train", import_module("moco_tf.train").__doc__),
            _head("data", import_module("moco_tf.data.__main__").__doc__),
            *(f"## {title}\n\n{_flags(kind)}" for title, kind in groups.items()),
        ]
    )


def _command(name):
    """The section of a command: what it is for and its flags."""
    module = import_module("moco_tf." + name.replace(" ", "_"))
    parts = [_head(name, module.__doc__), _flags(module.Settings)]
    if module is torch_weights:
        parts.append("The flags of `moco_tf.train` for `--method=moco` and `moco_v3` are taken as well.")
    return "\n\n".join(parts)


def _head(name, doc):
    """The heading and the docstring; its indented lines become blocks of code."""
    parts = [
        f"```\n{textwrap.dedent(part)}\n```" if part.startswith("  ") else _escaped(part)
        for part in re.split(r"\n\n+", doc.strip())
    ]
    return "\n\n".join([f"## python -m moco_tf.{name}", *parts])


def _flags(kind):
    """The flags of a dataclass as a list of definitions."""
    lines = []
    for field in command.fields(kind):
        name = f"--[no]{field.name}" if field.type is bool else f"--{field.name}"
        choices = field.metadata["choices"]
        values = ", ".join(f"`{choice}`" for choice in choices) if choices else TYPES.get(field.type, "text")
        lines.append(f"`{name}` ({values}; default {_default(field.default)})\n:   {_escaped(field.metadata['help'])}")
    return "\n\n".join(lines) or "No flags of its own."


def _default(value):
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    return "none" if value is None or value == "" else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _escaped(text):
    """Text whose characters mean nothing to Markdown and HTML; flags and its own `code` are code."""
    parts = re.split(r"(`[^`]*`|--[a-z]\w*)", " ".join(text.split()))
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"`{part.strip('`')}`"
        else:
            parts[i] = re.sub(r"([*_\[\]])", r"\\\1", html.escape(part, quote=False))
    return "".join(parts)


def _python(name, directives, text=""):
    """A page whose text Sphinx takes from docstrings."""
    title = f"Python: {name}"
    return "\n\n".join([f"{title}\n{'=' * len(title)}", text, *directives]) + "\n"


def write(folder):
    """Writes the pages; a page that is as it was keeps its time, so that Sphinx does not read it again."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        file = Path(folder) / name
        if not file.exists() or file.read_text() != text:
            file.write_text(text)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(sys.argv[1])
