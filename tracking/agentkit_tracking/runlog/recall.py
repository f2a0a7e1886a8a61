"""An erasure recalls what was read of the log before it: whoever is about to give that away reads it anew.

A small file counts erasures. Who gives something away holds it, shared, from the look at the count until it is given; an erasure
holds it alone while it counts up. So nothing read before is given after.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agentkit_tracking.runlog.database import LogBusy, held

_PATIENCE_S = 120.0  # longer than a target that hangs is waited for


class Recalled(Exception):
    """Something was erased since the log was read."""


def count(folder: Path) -> int:
    """How many erasures there were, of the log in `folder`; to be asked before reading."""
    try:
        return int((folder / "recalls").read_bytes() or 0)
    except FileNotFoundError:
        return 0


@contextmanager
def giving(folder: Path, known: int) -> Iterator[None]:
    """While this is open, what was read at the count `known` may be given away.

    Raises:
        Recalled: it may not; read it again.
    """
    with held(folder / "recalls", alone=False, patience=_PATIENCE_S):
        if count(folder) != known:
            raise Recalled
        yield


def recall(folder: Path) -> None:
    """Take back what was read; to be called when it is no longer there to be read, and before copies are looked for.

    Raises:
        LogBusy: somebody has been giving things away all the time.
    """
    path = folder / "recalls"
    try:
        with held(path, alone=True, patience=_PATIENCE_S):
            path.write_bytes(b"%d" % (count(folder) + 1))
    except LogBusy as e:
        raise LogBusy(f"something of the log has been sent elsewhere for {_PATIENCE_S:g} s; erase again") from e
