"""Notebooks and modules as source: loading them and collecting their files."""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
import inspect
import json
import linecache
import os
import re
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import dspy

from agentkit.errors import SourceError
from agentkit.systems import Adopted, System, adopt
from agentkit_tracking.home import project_root

DEFAULT_NAME = "system"
OURS = frozenset({"agentkit", "agentkit_tracking", "agentkit_pipelines"})
_modules_lock = threading.RLock()  # one source at a time has its imports in place
_LIBRARIES = tuple(sysconfig.get_path(kind) + os.sep for kind in ("stdlib", "platstdlib", "purelib", "platlib"))


@dataclass(frozen=True)
class Entry:
    """Where a system is defined: object `name` of `file`, below the project root `root`."""

    file: Path
    name: str
    root: Path

    @property
    def relative(self) -> str:
        """The file's path below the root, with forward slashes."""
        return self.file.relative_to(self.root).as_posix()

    def __str__(self) -> str:
        return f"{self.relative}:{self.name}"


def parse_entry(target: str | Path, root: Path | None = None) -> Entry:
    """`FILE[:NAME]` as an entry; NAME defaults to `system`.

    Raises:
        SourceError: no such file, or not Python and not a notebook.
    """
    text, name = str(target), DEFAULT_NAME
    if (found := re.fullmatch(r"(.+\.(?:py|ipynb)):([A-Za-z_]\w*)", text)) is not None:
        text, name = found[1], found[2]
    file = Path(text).resolve()
    if not file.is_file():
        raise SourceError(f"there is no file {text}; give FILE.py[:NAME], e.g. notebooks/support_triage.py")
    if file.suffix not in (".py", ".ipynb"):
        raise SourceError(f"{text} is neither a Python file nor a Jupyter notebook")
    return Entry(file, name, root or project_root(file.parent))


def load_entry(entry: Entry) -> System:
    """Execute the source and build its system: a `System`, a `dspy.Module` or callable, or a function making one.

    Raises:
        SourceError: the source fails to run or defines no such object; names file and line.
    """
    module = execute(entry)
    if not hasattr(module, entry.name):
        near = difflib.get_close_matches(entry.name, dir(module), n=1)
        hint = f"; did you mean {entry.file.name}:{near[0]}?" if near else ""
        raise SourceError(
            f"{entry.relative} defines no {entry.name!r} at top level{hint} (a system, a dspy.Module, a callable, or "
            "a function without parameters annotated to return one; in marimo an @app.function)"
        )
    with _running(entry):
        program = _program(getattr(module, entry.name), entry)
    return adopt_from(program, entry)


def adopt_from(program: Any, entry: Entry) -> System:
    """`agentkit.adopt`, with a name after the entry for a program that has none of its own."""
    system = adopt(program)
    if (
        isinstance(system, Adopted)
        and system is not program
        and getattr(program, "__name__", DEFAULT_NAME) == DEFAULT_NAME
    ):
        # `Predict`, `ChainOfThought` or `system` would say nothing.
        system.name = re.sub(r"\W", "_", entry.file.stem if entry.name == DEFAULT_NAME else entry.name)
    return system


def prepared(system: System, entry: Entry, name: str) -> System:
    """`system` after the source's function `name` has tuned it.

    Raises:
        SourceError: there is no such function, it fails, or it returns no system of the same make.
    """
    function = getattr(execute(entry), name, None)
    if not callable(function):
        raise SourceError(f"{entry.relative} defines no function {name!r} to prepare the system with")
    with _running(entry):
        made = function(system)
    if not isinstance(made, System) or made.spec() != system.spec():
        raise SourceError(f"{entry.relative}: {name} must return the system it was given, tuned; got {made!r:.80}")
    return made


def _program(found: Any, entry: Entry) -> Any:
    if inspect.isclass(found) and issubclass(found, dspy.Module):
        return found()
    if inspect.isfunction(found) and (entry.name == DEFAULT_NAME or _makes_program(found)):
        # A parameterless `system` is a factory; anything with parameters is the program itself.
        return found() if not inspect.signature(found).parameters else found
    return found


def _makes_program(function: Callable[..., Any]) -> bool:
    annotation = inspect.get_annotations(function, eval_str=False).get("return")
    return annotation is not None and any(word in str(annotation) for word in ("System", "Module"))


def execute(entry: Entry) -> ModuleType:
    """Run a source as a module of its own.

    Raises:
        SourceError: it fails; names file and line.
    """
    name = "agentkit_source_" + hashlib.sha256(str(entry.file).encode()).hexdigest()[:12] + "_" + entry.file.stem
    module = ModuleType(name)
    module.__file__ = str(entry.file)
    sys.modules[name] = module  # dataclasses and pydantic look their module up here
    text = source_text(entry.file)
    with _running(entry):
        # For inspect and tracebacks, which would take a notebook's JSON for its code.
        linecache.cache[str(entry.file)] = (len(text), None, text.splitlines(keepends=True), str(entry.file))
        code = compile(text, str(entry.file), "exec", dont_inherit=True)  # this file's __future__ is not the author's
        exec(code, module.__dict__)  # noqa: S102  (running the author's source is the point)
    return module


@contextmanager
def _running(entry: Entry) -> Iterator[None]:
    """The source's own imports; what it raises becomes a SourceError that says where."""
    with _own_imports(entry):
        try:
            yield
        except (Exception, SystemExit) as e:
            place = _place(e, entry)
            raise SourceError(f"{place} cannot be run: {type(e).__name__}: {e}") from e


def _place(error: BaseException, entry: Entry) -> str:
    """The innermost line of the project that an error came from."""
    lines = [(f.f_code.co_filename, line) for f, line in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        lines.append((error.filename, error.lineno or 1))
    for name, line in reversed(lines):
        if (file := Path(name)).is_relative_to(entry.root) and not is_installed(file):
            path = file.relative_to(entry.root).as_posix()
            return f"{path}:{line}" if file.suffix == ".py" else f"{path}, line {line} of its agent cells,"
    return entry.relative


@contextmanager
def _own_imports(entry: Entry) -> Iterator[None]:
    """Let the source import its neighbours, and forget them afterwards: two releases may each have their own.

    The same goes for modules of that name that the process has imported from elsewhere, such as the draft that a
    release was made from. No bytecode is written or found beside a release, where it would be unchecked code.
    """
    folders = [str(entry.file.parent), str(entry.root)]
    with _modules_lock:
        before = {n: sys.modules.pop(n) for n, m in sys.modules.copy().items() if _is_own(m, entry)}
        writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        sys.path[:0] = folders
        importlib.invalidate_caches()
        try:
            yield
        finally:
            sys.dont_write_bytecode = writes
            for folder in folders:
                sys.path.remove(folder)
            for n in [n for n, m in sys.modules.copy().items() if _is_own(m, entry)]:
                del sys.modules[n]
            sys.modules.update(before)


def _is_own(module: Any, entry: Entry) -> bool:
    """Whether the source's own files hold the module, or one of its name."""
    if not isinstance(module, ModuleType):
        return False
    name = module.__name__.split(".")[0]
    # A folder without __init__.py is a module without a file.
    file = module.__dict__.get("__file__") or next(iter(module.__dict__.get("__path__", ())), None)
    if file is None or name in OURS or name == "__main__" or name.startswith("agentkit_source_") or is_installed(file):
        return False
    if Path(file).is_relative_to(entry.root):
        return True
    return any((f / f"{name}.py").is_file() or (f / name).is_dir() for f in (entry.file.parent, entry.root))


def is_installed(file: str | Path) -> bool:
    """Whether a file belongs to Python or an installed distribution rather than to a project."""
    return "site-packages" in (text := str(file)) or text.startswith(_LIBRARIES)


def source_text(file: Path) -> str:
    """The Python text of a source: a `.py` file as it is, of a Jupyter notebook the cells tagged `agent`."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise SourceError(f"{file} cannot be read as UTF-8 text: {e}") from e
    if file.suffix == ".py":
        return text
    return "\n\n".join("".join(cell["source"]) for cell in _agent_cells(file, text))


def released_content(file: Path) -> bytes:
    """What a release keeps of a source: all of it; of a Jupyter notebook the cells tagged `agent`, without outputs.

    To run or to explore a notebook makes no other release of it, and what its cells have shown stays where it is.
    """
    if file.suffix != ".ipynb":
        return file.read_bytes()
    cells = [
        {
            "cell_type": "code",
            "execution_count": None,
            "metadata": {"tags": ["agent"]},
            "outputs": [],
            "source": "".join(cell["source"]).splitlines(keepends=True),
        }
        for cell in _agent_cells(file, file.read_text(encoding="utf-8-sig"))
    ]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    return (json.dumps(notebook, indent=1, ensure_ascii=False) + "\n").encode()


def _agent_cells(file: Path, text: str) -> list[dict[str, Any]]:
    try:
        cells = json.loads(text)["cells"]
    except (ValueError, KeyError, TypeError) as e:
        raise SourceError(f"{file} is not a Jupyter notebook: {e}") from e
    tagged = [c for c in cells if c["cell_type"] == "code" and "agent" in c.get("metadata", {}).get("tags", [])]
    if not tagged:
        raise SourceError(f"{file} has no cell tagged `agent`; tag the cells that define the system")
    return tagged


def collect_files(entry: Entry, extra: tuple[Path, ...]) -> dict[str, Path]:
    """All files of a release by path below the root: entry, modules it imports from the project, declared files.

    Raises:
        SourceError: a declared file is missing or lies outside the project root, or a module of the project is
            imported inside a function.
    """
    found = {entry.relative: entry.file}
    todo = [entry.file]
    while todo:
        for file in _imported_files(todo.pop(), entry):
            if (path := file.relative_to(entry.root).as_posix()) not in found:
                found[path] = file
                todo.append(file)
    for given in extra:
        file = (given if given.is_absolute() else entry.root / given).resolve()
        if not file.is_file() or not file.is_relative_to(entry.root):
            raise SourceError(f"release file {given} must be a file below {entry.root}")
        found[file.relative_to(entry.root).as_posix()] = file
    return dict(sorted(found.items()))


def _imported_files(file: Path, entry: Entry) -> Iterator[Path]:
    for node, is_late in _imports(ast.parse(source_text(file), str(file))):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        else:
            base = "." * node.level + (node.module or "")
            names = [base, *(f"{base}.{a.name}" if node.module else f"{base}{a.name}" for a in node.names)]
        for name in names:
            found = list(_module_files(name, file.parent, entry))
            if found and is_late:
                # By then the release's modules are put away, and whatever has that name would be taken.
                raise SourceError(
                    f"{file.relative_to(entry.root).as_posix()}:{node.lineno} imports {name} inside a function; import "
                    "modules of the project at top level, so that a release runs its own"
                )
            yield from found


def _imports(node: ast.AST, is_late: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Import statements, and whether they run only when a function is called. A marimo cell never is, in a release."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, is_late
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            if not any(_is_cell(d) for d in child.decorator_list):
                yield from _imports(child, True)
        else:
            yield from _imports(child, is_late)


def _is_cell(decorator: ast.expr) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return isinstance(called, ast.Attribute) and called.attr == "cell"


def _module_files(name: str, folder: Path, entry: Entry) -> Iterator[Path]:
    level = len(name) - len(name.lstrip("."))
    if name.lstrip(".").split(".")[0] in OURS:
        return
    bases = [folder.parents[level - 2] if level > 1 else folder] if level else [entry.file.parent, entry.root]
    parts = [p for p in name.lstrip(".").split(".") if p]
    for base in bases:
        at = base.joinpath(*parts)
        if not at.is_relative_to(entry.root) or is_installed(at):
            continue
        candidates = [at.with_suffix(".py")] if parts else []
        candidates += [base.joinpath(*parts[:i], "__init__.py") for i in range(1, len(parts) + 1)]
        yield from (c for c in candidates if c.is_file())
