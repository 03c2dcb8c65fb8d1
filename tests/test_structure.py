"""The layout's rules (docs/architecture.md), held against the source text."""

import ast
import importlib
import subprocess
import sys
import types
from pathlib import Path

from benchmarks import cost

PACKAGE = Path(__file__).parent.parent / "moco_tf"
FILES = sorted(PACKAGE.rglob("*.py"))

# What `python -m` runs: a folder's own command, and files that call their `main`.
MAINS = [path for path in FILES if path.name == "__main__.py" or '\nif __name__ == "__main__":' in path.read_text()]

# From the ground up: a file imports only from floors below its own. A folder is one floor, the flags of methods apart;
# the mains stand above all.
FLOORS = [
    {"registration", "progress", "files"},
    {"command"},
    {"startup"},
    {"recorded"},
    {"methods.flags"},
    {"config"},
    {"schedules", "replicas", "optimizers"},
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
    room, *rest = module.split(".")[1:]
    name = "methods.flags" if room == "methods" and rest == ["flags"] else room
    (number,) = [i for i, names in enumerate(FLOORS) if name in names]
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


OTHER_SYSTEMS = """
import builtins, importlib, os, pkgutil, types

# What macOS or Windows lack. Other packages have their own ways around it, and see all that is there.
modules = {"fcntl", "resource", "pwd", "grp", "termios", "posix", "syslog"}
names = {"sysconf", "sched_getaffinity", "O_NOFOLLOW", "O_CLOEXEC", "fork", "getuid", "geteuid", "chown", "fchmod"}
names |= {"statvfs", "uname", "killpg", "mkfifo", "getloadavg", "posix_fadvise", "pread", "register_at_fork"}
elsewhere = types.ModuleType("os")
elsewhere.__dict__.update({name: value for name, value in vars(os).items() if name not in names})
take = builtins.__import__

def import_there(name, globals=None, locals=None, fromlist=(), level=0):
    if (globals or {}).get("__name__", "").startswith("moco_tf") and not level:
        if name.split(".")[0] in modules:
            raise ModuleNotFoundError(f"{globals['__name__']} imports {name}")
        if name == "os":
            return elsewhere
    return take(name, globals, locals, fromlist, level)

builtins.__import__ = import_there
for code in ("import fcntl", "import os; os.sysconf", "from os import O_NOFOLLOW"):
    try:
        exec(code, {"__name__": "moco_tf.of_linux"})
    except (ImportError, AttributeError):
        continue
    raise SystemExit(f"it would not be noticed: {code}")
from moco_tf import startup
startup.load_tensorflow()
import moco_tf
count = 0
for module in pkgutil.walk_packages(moco_tf.__path__, "moco_tf."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("moco_tf"):  # else a package that is not installed here
            raise
    count += 1
assert startup.memory() == float("inf")
print(count)
"""


def test_every_module_is_imported_where_linuxs_own_parts_of_python_are_missing():
    done = subprocess.run(
        [sys.executable, "-c", OTHER_SYSTEMS], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= len(FILES) - 1  # a package is its __init__.py


def test_every_public_name_resolves():
    import moco_tf

    for name in moco_tf.__all__:
        assert getattr(moco_tf, name) is not None


def test_keras_files_are_loaded_in_safe_mode():
    loads = [
        (path.name, node)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("load_model")
    ]
    assert loads
    for name, call in loads:
        assert "safe_mode=True" in ast.unparse(call), name


def test_every_name_of_the_package_that_a_benchmark_uses_exists():
    for path in sorted((PACKAGE.parent / "benchmarks").glob("*.py")):
        tree, modules = ast.parse(path.read_text()), {"moco_tf": importlib.import_module("moco_tf")}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("moco_tf", "export"):
                for alias in node.names:
                    modules[alias.asname or alias.name] = _found(node.module, alias.name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = modules.get(node.value.id)
                if isinstance(owner, types.ModuleType):
                    _found(owner.__name__, node.attr)


def _found(module, name):
    owner = importlib.import_module(module)
    return getattr(owner, name) if hasattr(owner, name) else importlib.import_module(f"{module}.{name}")


def test_the_flag_of_cost_can_name_each_of_its_axes():
    assert not any("," in axis for axis in cost.AXES)  # which separates them
