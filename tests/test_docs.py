"""The documentation is whole: all commands, all flags, all pages; links lead to files. Sphinx itself: .ci/run."""

import re
import runpy
from importlib import import_module
from pathlib import Path

import pytest
from test_structure import MAINS, PACKAGE

from moco_tf import config, torch_weights
from moco_tf.command import HelpAsked

REPOSITORY = Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"
PAGES = [*REPOSITORY.glob("*.md"), *DOCS.glob("*.md"), *DOCS.glob("results/*.md")]


@pytest.fixture(scope="module")
def reference():
    """The names of docs/make_reference.py."""
    return runpy.run_path(str(DOCS / "make_reference.py"))


@pytest.fixture(scope="module")
def sections(reference):
    """{heading: text} of the commands' pages; training's flags lie under its groups' headings."""
    texts = [text for name, text in reference["pages"]().items() if name.endswith(".md")]
    parts = [part for text in texts for part in re.split(r"^## ", text, flags=re.M)[1:]]
    return {part.partition("\n")[0]: part for part in parts}


def flags_of_help(text):
    return set(re.findall(r"^  --(?:\[no\])?(\w+):", text, re.M))


def flags_of(section):
    return set(re.findall(r"^`--(?:\[no\])?(\w+)` ", section, re.M))


def test_the_reference_has_every_command(reference, sections):
    modules = {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in MAINS}
    modules = {name.removesuffix(".__main__") for name in modules} - {"data.make_embedded"}
    assert modules == {heading.split()[2].removeprefix("moco_tf.") for heading in sections if "python -m" in heading}
    export = import_module("moco_tf.serving.export")
    assert {f"python -m moco_tf.serving.export {word}" for word in export.WORDS} <= set(sections)


def test_the_reference_has_every_flag_of_every_command(reference, sections, capsys):
    names = [name for _, names in reference["COMMANDS"].values() for name in names]
    assert len(names) > 15
    for name in names:
        module, *word = name.split()
        assert import_module(f"moco_tf.{module}").main([*word, "--help"]) == 0
        shown = flags_of_help(capsys.readouterr().out)
        if name == "torch_weights":  # it takes flags of training, too: the section says so
            shown -= {field.name for field in torch_weights._settings_of_runs()} | {"flagfile", "undefok"}
        assert flags_of(sections[f"python -m moco_tf.{name}"]) == shown != set(), name


@pytest.mark.parametrize("kind", ["method", "pretext"])
def test_the_reference_has_every_flag_of_training(sections, kind):
    own = [name.partition("=")[2] for name in sections if name.startswith(f"--{kind}=")]
    assert len(own) >= 4
    for name in own:
        with pytest.raises(HelpAsked) as help:
            config.parse([f"--{kind}={name}", "--help"])
        for part in re.split(r"\n\n(?=\S)", str(help.value).strip()):
            title = part.partition(":\n")[0]
            assert flags_of(sections[title]) == flags_of_help(part), (name, title)


def test_every_page_is_in_the_contents_once(reference):
    contents = runpy.run_path(str(DOCS / "conf.py"))["CONTENTS"]
    pages = [*PAGES, *(DOCS / "reference" / name for name in reference["pages"]())]
    names = {page.relative_to(REPOSITORY).with_suffix("").as_posix() for page in pages} - {"README"}
    assert sorted(" ".join(contents.values()).split()) == sorted(names)


def test_links_lead_to_files():
    links = [
        (page, target.partition("#")[0])
        for page in PAGES
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.S))
        if not target.startswith(("http", "#"))
    ]
    assert len(links) > 80
    assert not [(page.name, target) for page, target in links if not (page.parent / target).is_file()]
