"""A governed agent call beside other frameworks, in turn (A B C D A B …); see `contenders.py` for what is compared."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from contenders import CONTENDERS

# An environment of their own, with their newest versions: theirs and ours would hold each other's dependencies back.
PEERS = Path(sys.prefix) / "peers" / "bin" / "python"
HERE = Path(__file__).parent
ROUNDS, CALLS = 25, 40


class Contender:
    """A process that makes calls when it is told to."""

    def __init__(self, name: str) -> None:
        self.name, self.problem = name, "not installed"
        python = sys.executable if name == "agentkit" else PEERS
        command = [str(python), str(HERE / "contenders.py"), name]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        try:
            self.process = subprocess.Popen(command, text=True, **pipes)
            self.version = self.process.stdout.readline().strip()
            if not self.version and self.process.wait():
                self.problem = f"crashed; see {' '.join(command)}"
        except OSError:  # no environment
            self.version = ""

    def seconds(self) -> float:
        """One call, as the mean of a few."""
        self.process.stdin.write(f"{CALLS}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline()) / CALLS

    def end(self) -> None:
        self.process.communicate()


def measure(note: Callable[[str, str, str, str], None]) -> None:
    """One row for each peer; one that is not installed is shown as that."""
    contenders = [Contender(name) for name in CONTENDERS]
    present = [c for c in contenders if c.version]
    if contenders[0] not in present:
        raise RuntimeError(contenders[0].problem)
    times = [[c.seconds() for c in present] for _ in range(ROUNDS + 1)][1:]
    for c in present:
        c.end()
    ours = statistics.median(t[0] for t in times)
    what = "a governed agent call"
    for peer in contenders[1:]:
        if not peer.version:
            note(what, f"{ours * 1e3:.2f} ms", f"{peer.name}: {peer.problem}", "")
            continue
        i = present.index(peer)
        theirs, ratio = statistics.median(t[i] for t in times), statistics.median(t[0] / t[i] for t in times)
        note(what, f"{ours * 1e3:.2f} ms", f"{peer.name} {peer.version} {theirs * 1e3:.2f} ms", f"{ratio:.2f}×")
