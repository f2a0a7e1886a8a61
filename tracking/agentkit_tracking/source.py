"""Notebooks and modules as source: loading them, collecting their files, and comparing live objects with the disk."""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import dspy

from agentkit.errors import SourceError
from agentkit.systems import Adopted, System, adopt
from agentkit.tools import Tool
from agentkit_tracking.home import project_root

DEFAULT_NAME = "system"
_OURS = {"agentkit", "agentkit_tracking", "agentkit_pipelines"}


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
        SourceError: the source fails to run or defines no such object.
    """
    module = _execute(entry)
    if not hasattr(module, entry.name):
        near = difflib.get_close_matches(entry.name, dir(module), n=1)
        hint = f"; did you mean {entry.file.name}:{near[0]}?" if near else ""
        raise SourceError(
            f"{entry.relative} defines no {entry.name!r} at top level{hint} (a system, a dspy.Module, a callable, or "
            "a function without parameters annotated to return one; in marimo an @app.function)"
        )
    found = getattr(module, entry.name)
    system = _built(found, entry)
    if isinstance(system, Adopted) and system is not found and not inspect.isfunction(system.program):
        # Nobody named it; `Predict` or `ChainOfThought` would say nothing.
        system.name = re.sub(r"\W", "_", entry.file.stem if entry.name == DEFAULT_NAME else entry.name)
    return system


def prepared(system: System, entry: Entry, name: str) -> System:
    """`system` after the source's function `name` has tuned it.

    Raises:
        SourceError: there is no such function, it fails, or it returns no system of the same make.
    """
    function = getattr(_execute(entry), name, None)
    if not callable(function):
        raise SourceError(f"{entry.relative} defines no function {name!r} to prepare the system with")
    try:
        made = function(system)
    except Exception as e:
        raise SourceError(f"{entry.relative}: {name} failed: {type(e).__name__}: {e}") from e
    if not isinstance(made, System) or made.spec() != system.spec():
        raise SourceError(f"{entry.relative}: {name} must return the system it was given, tuned; it returned {made!r:.80}")
    return made


def _built(found: Any, entry: Entry) -> System:
    if isinstance(found, System | dspy.Module):
        return adopt(found)
    if inspect.isclass(found) and issubclass(found, dspy.Module):
        return adopt(found())
    if inspect.isfunction(found) and (entry.name == DEFAULT_NAME or _makes_program(found)):
        # A parameterless `system` is a factory; anything with parameters is the program itself.
        made = found() if not inspect.signature(found).parameters else found
        return adopt(made)
    return adopt(found)


def _makes_program(function: Callable[..., Any]) -> bool:
    annotation = inspect.get_annotations(function, eval_str=False).get("return")
    return annotation is not None and any(word in str(annotation) for word in ("System", "Module"))


def _execute(entry: Entry) -> ModuleType:
    name = "agentkit_source_" + hashlib.sha256(str(entry.file).encode()).hexdigest()[:12] + "_" + entry.file.stem
    module = ModuleType(name)
    module.__file__ = str(entry.file)
    sys.modules[name] = module  # dataclasses and pydantic look their module up here
    with _own_imports(entry):
        try:
            code = compile(source_text(entry.file), str(entry.file), "exec")
            exec(code, module.__dict__)  # noqa: S102  (running the author's source is the point)
        except Exception as e:
            line = next((f.lineno for f in reversed(inspect.getinnerframes(e.__traceback__)) if f.filename == str(entry.file)), None)  # type: ignore[arg-type]
            place = f"{entry.relative}:{line}" if line else entry.relative
            raise SourceError(f"{place} cannot be run: {type(e).__name__}: {e}") from e
    return module


@contextmanager
def _own_imports(entry: Entry) -> Iterator[None]:
    """Let the source import its neighbours, and forget them afterwards: two releases may each have their own."""
    folders = [str(entry.file.parent), str(entry.root)]
    before = {n: sys.modules.pop(n) for n, m in list(sys.modules.items()) if _below(m, entry.root)}
    sys.path[:0] = folders
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for folder in folders:
            sys.path.remove(folder)
        for n in [n for n, m in sys.modules.items() if _below(m, entry.root)]:
            del sys.modules[n]
        sys.modules.update(before)


def _below(module: Any, root: Path) -> bool:
    file = getattr(module, "__file__", None)
    name = getattr(module, "__name__", "")
    if not file or name.split(".")[0] in _OURS or name == "__main__" or name.startswith("agentkit_source_"):
        return False
    return not _installed(Path(file)) and Path(file).is_relative_to(root)


def _installed(file: Path) -> bool:
    return "site-packages" in file.parts or file.is_relative_to(sys.prefix) or file.is_relative_to(sys.base_prefix)


def source_text(file: Path) -> str:
    """The Python text of a source: a `.py` file as it is, of a Jupyter notebook the cells tagged `agent`."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        return text
    try:
        cells = json.loads(text)["cells"]
    except (ValueError, KeyError, TypeError) as e:
        raise SourceError(f"{file} is not a Jupyter notebook: {e}") from e
    tagged = [c for c in cells if c["cell_type"] == "code" and "agent" in c.get("metadata", {}).get("tags", [])]
    if not tagged:
        raise SourceError(f"{file} has no cell tagged `agent`; tag the cells that define the system")
    return "\n\n".join("".join(c["source"]) for c in tagged)


def collect_files(entry: Entry, extra: tuple[Path, ...]) -> dict[str, Path]:
    """All files of a release by path below the root: entry, modules it imports from the project, declared files.

    Raises:
        SourceError: a declared file is missing or lies outside the project root.
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
    for node in ast.walk(ast.parse(source_text(file), str(file))):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names = [base, *(f"{base}.{a.name}" if node.module else f"{base}{a.name}" for a in node.names)]
        else:
            continue
        for name in names:
            yield from _module_files(name, file.parent, entry)


def _module_files(name: str, folder: Path, entry: Entry) -> Iterator[Path]:
    level = len(name) - len(name.lstrip("."))
    if name.lstrip(".").split(".")[0] in _OURS:
        return
    bases = [folder.parents[level - 2] if level > 1 else folder] if level else [entry.file.parent, entry.root]
    parts = [p for p in name.lstrip(".").split(".") if p]
    for base in bases:
        at = base.joinpath(*parts)
        if not at.is_relative_to(entry.root) or _installed(at):
            continue
        candidates = [at.with_suffix(".py")] if parts else []
        candidates += [base.joinpath(*parts[:i], "__init__.py") for i in range(1, len(parts) + 1)]
        yield from (c for c in candidates if c.is_file())


# ---- live objects against the disk


def differences(live: System, entry: Entry) -> list[str]:
    """Where a live system differs from what its source on disk would build; prompts and weights are state, not source.

    Returns:
        Unified diffs and lines of the form `name: live … , on disk …`; empty when nothing differs.
    """
    fresh = load_entry(entry)
    found = list(_diff_json("system", fresh.spec(), live.spec()))
    ours, theirs = _parts(live), _parts(fresh)
    for name in sorted(ours.keys() | theirs.keys()):
        a, b = theirs.get(name), ours.get(name)
        if a is None or b is None:
            found.append(f"{name}: only {'in the live system' if a is None else 'on disk'}")
        elif _fingerprint(a) != _fingerprint(b):
            found.append(_diff_source(name, a, b))
    return found


def _parts(system: System) -> dict[str, Any]:
    """The functions a system's behaviour is made of, by a readable name."""
    parts: dict[str, Any] = {}
    classes = {f"agent {name}": type(agent) for name, agent in system.agents.items()}
    if isinstance(system, Adopted):
        program = system.program
        if isinstance(program, dspy.Module):
            classes["program"] = type(program)
        else:
            parts["program"] = program
    for label, cls in classes.items():
        for owner in cls.__mro__:
            if owner.__module__.split(".")[0] in (_OURS | {"dspy", "builtins"}):
                continue
            for name, value in vars(owner).items():
                if inspect.isfunction(value):
                    parts.setdefault(f"{label}.{name}", value)
        for tool in getattr(cls, "tools", ()):
            if isinstance(tool, Tool):
                parts[f"tool {tool.name}"] = tool.function
    for metric in (system.success, *system.metrics):
        if inspect.isfunction(metric):
            parts[f"metric {metric.__name__}"] = metric
    return parts


def _fingerprint(function: Any, seen: frozenset[int] = frozenset()) -> Any:
    """What a function does: code, constants, defaults, closure, and the plain globals and helpers it names."""
    function = inspect.unwrap(function)
    if id(function) in seen:
        return "recursive"
    if not inspect.isfunction(function):
        return repr(type(function))
    seen |= {id(function)}
    cells = [_value(c.cell_contents, seen) for c in function.__closure__ or ()]
    names = {n: _value(function.__globals__[n], seen) for n in _names(function.__code__) if n in function.__globals__}
    return _code(function.__code__), _value(function.__defaults__, seen), cells, names


def _value(value: Any, seen: frozenset[int]) -> Any:
    if isinstance(value, Tool):
        return _fingerprint(value.function, seen)
    if inspect.isfunction(value):
        return _fingerprint(value, seen) if value.__module__.split(".")[0] not in _OURS else value.__qualname__
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, tuple | list | frozenset):
        return [_value(v, seen) for v in (sorted(value, key=repr) if isinstance(value, frozenset) else value)]
    if isinstance(value, dict):
        return {str(k): _value(v, seen) for k, v in value.items()}
    return type(value).__qualname__


def _code(code: CodeType) -> Any:
    constants = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return code.co_code, constants, code.co_names, code.co_varnames


def _names(code: CodeType) -> set[str]:
    return set(code.co_names).union(*(_names(c) for c in code.co_consts if isinstance(c, CodeType)))


def _diff_source(name: str, disk: Any, live: Any) -> str:
    def text(function: Any) -> list[str]:
        try:
            return inspect.getsource(inspect.unwrap(function)).splitlines()
        except (OSError, TypeError):
            return []

    a, b = text(disk), text(live)
    lines = list(difflib.unified_diff(a, b, f"{name} (on disk)", f"{name} (live)", lineterm="", n=1))
    # inspect reads the file again, so an edited file shows its new text for the old live function, too.
    return "\n".join(lines) if lines else f"{name}: the live code or a value it uses is not what the file now says"


def _diff_json(name: str, disk: Any, live: Any) -> Iterator[str]:
    if isinstance(disk, dict) and isinstance(live, dict):
        for key in sorted(disk.keys() | live.keys()):
            yield from _diff_json(f"{name}.{key}", disk.get(key), live.get(key))
    elif disk != live:
        yield f"{name}: live {live!r}, on disk {disk!r}"
