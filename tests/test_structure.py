"""The layout's rules (docs/architecture.md), held against the source text."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "moco_tf"
FILES = sorted(PACKAGE.rglob("*.py"))

# What `python -m` runs: a folder's own command, and files that call their `main`.
MAINS = [path for path in FILES if path.name == "__main__.py" or '\nif __name__ == "__main__":' in path.read_text()]

# From the ground up: a file imports only from floors below its own. A folder is one floor; the mains stand above all.
FLOORS = [
    {"registration", "progress", "files"},
    {"command"},
    {"config"},
    {"schedules", "replicas", "optimizers", "startup"},
    {"encoders", "data", "run_folder", "advice"},
    {"methods"},
    {"pretext"},
    {"checkpoint", "frozen"},
    {"build"},
    {"pytorch", "serving"},
    {"evaluate", "start_from"},
    {"callbacks", "transfer", "search"},
]


def _floor(module):
    if module in map(_module, MAINS):
        return len(FLOORS)
    (number,) = [i for i, names in enumerate(FLOORS) if module.split(".")[1] in names]
    return number


def _imports(path):
    """The moco_tf modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "moco_tf":
            yield from (
                [f"moco_tf.{alias.name}" for alias in node.names] if node.module == "moco_tf" else [node.module]
            )
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("moco_tf."))


def _module(path):
    return ".".join(("moco_tf", *path.relative_to(PACKAGE).with_suffix("").parts))


def test_imports_point_downwards_only():
    upwards = [
        (_module(path), imported)
        for path in FILES
        if path != PACKAGE / "__init__.py"
        for imported in _imports(path)
        if imported.split(".")[1] != _module(path).split(".")[1] and _floor(imported) >= _floor(_module(path))
    ]
    assert not upwards


def test_nothing_imports_the_tests_the_benchmarks_or_a_main_but_a_main_beside_it():
    outside = {"tests", "benchmarks", "export"}
    for path in FILES:
        beside = path.parent if path in MAINS else None  # evaluate.compare calls two of the others
        mains = {_module(main) for main in MAINS if main.parent != beside}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
            else:
                continue
            assert not names & mains and not {name.split(".")[0] for name in names} & outside, path


def test_transfer_alone_imports_keras_cv():
    heavy = {"keras_cv": {"transfer"}, "keras_hub": {"transfer"}, "pycocotools": {"transfer"}}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                rooms = heavy.get(name.split(".")[0])
                assert rooms is None or path.parent.name in rooms, path


def test_no_library_code_reads_the_global_flags():
    for path in FILES:
        if path.name == "make_embedded.py":
            continue  # a script
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        assert "FLAGS" not in names | attributes, path


def test_files_are_written_and_get_their_names_in_one_place():
    by_hand = {"rename", "fsync", "savez", "write_text", "write_bytes", "write_file"}
    for path in FILES:
        if path.name in ("files.py", "checkpoint.py"):  # a checkpoint's folder takes no old one's place
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                call = ast.unparse(node)
                assert call.startswith("files.") or (node.attr not in by_hand and call != "os.replace"), (path, call)


def test_importing_the_package_and_its_flags_does_not_load_tensorflow():
    code = "import sys, moco_tf, moco_tf.config; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_resolves():
    import moco_tf

    for name in moco_tf.__all__:
        assert getattr(moco_tf, name) is not None
