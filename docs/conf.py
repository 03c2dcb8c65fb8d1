"""The documentation as a site, by Sphinx: pip install -e ".[docs]" && sphinx-build -W -c docs . build/site

Its source is the whole repository: the site has the same folders, and one link is right in both.
"""

import inspect
import shutil
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "docs")]

project = html_title = "moco_tf"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
include_patterns = ["*.md", "docs/**.md", "docs/reference/*.rst"]
exclude_patterns = [".*", "build", "runs"]  # they may hold many files
root_doc = "README"
html_theme = "furo"
html_copy_source = False
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
highlight_language = "text"
smartquotes = False  # a flag's two hyphens are no dash
default_role = "code"  # docstrings write `code` with one backtick
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
napoleon_use_rtype = False

CONTENTS = {
    "How to": """
        docs/tutorial
        docs/data
        docs/training
        docs/pretext
        docs/methods
        docs/evaluation
        docs/search
        docs/transfer
        docs/serving
        docs/torch_weights
        docs/scaling
    """,
    "Results": """
        docs/performance
        docs/results/embedded_reference
        docs/results/frontier
        docs/results/small_runs
        docs/results/evaluation
        docs/results/search
        docs/results/pretext
        docs/results/transfer
        docs/results/cifar10
        docs/results/moco_v3
        docs/results/ablations
        docs/results/ablations_longer
        docs/results/shuffle_bn
    """,
    "Reference": """
        docs/reference/train
        docs/reference/evaluate
        docs/reference/search
        docs/reference/transfer
        docs/reference/serving
        docs/reference/other
        docs/reference/moco_tf
        docs/reference/encoders
        docs/reference/augment
        docs/reference/methods
    """,
    "Project": """
        docs/architecture
        docs/reliability
        CONTRIBUTING
        CHANGELOG
        SECURITY
    """,
}


def contents(app, name, source):
    """Ends the home page with the contents, which a theme shows beside all pages."""
    if name == root_doc:
        for caption, pages in CONTENTS.items():
            lines = ["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *pages.split(), "```", ""]
            source[0] += "\n".join(lines)


def formulas(app, what, name, value, options, lines):
    """Blocks that a docstring indents stay as they are; a line of colons says so to Sphinx."""
    for i in range(len(lines) - 1, 1, -1):
        text = lines[i - 2]
        if lines[i].startswith("    ") and not lines[i - 1] and text and not text.startswith((" ", ":", "..")):
            lines[i:i] = ["::", ""]


def signature(app, what, name, value, options, arguments, returned):
    """Keras' classes have a `__new__` of any arguments; those of `__init__` are what users give."""
    if what == "class" and arguments == "(*args, **kwargs)":
        _, *parameters = inspect.signature(value.__init__).parameters.values()
        return str(inspect.Signature(parameters)), returned


def skip(app, what, name, value, skipped, options):
    """Fields of named tuples have no docstring of their own."""
    return True if str(value.__doc__).startswith("Alias for field") else None


def begin_at_home(app, error):
    """The home page under the name that servers look for."""
    if not error and app.builder.name == "html":
        shutil.copy(f"{app.outdir}/README.html", f"{app.outdir}/index.html")


def setup(app):
    import make_reference

    make_reference.write(REPOSITORY / "docs/reference")
    app.connect("source-read", contents)
    app.connect("autodoc-process-docstring", formulas, priority=900)  # after napoleon
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-skip-member", skip)
    app.connect("build-finished", begin_at_home)
