"""A real `mlflow server` on loopback, for the tests of what it refuses."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

START_S = 180.0  # four workers import mlflow at once; 30 s on two idle cores


@contextmanager
def marimo_page(notebook: Path, log: Path, **environment: str) -> Iterator[str]:
    """Serve a marimo notebook on loopback as an app, yield its address, stop it at the end; what it prints goes to `log`."""
    url = f"http://127.0.0.1:{free_port()}"
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "marimo", "run", str(notebook), "--headless", "--no-token"]
    with open(log, "w") as file:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", url.rpartition(":")[2]],
            stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment}, start_new_session=True,
        )  # fmt: skip
        try:
            yield url
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(20)


@contextmanager
def mlflow_server(
    home: Path, *extra_arguments: str, workers: int | None = None, prefix: str = "", **environment: str
) -> Iterator[str]:
    """Start `mlflow server` in `home`, yield its address, stop it and its workers at the end.

    Args:
        home: its working directory; the default store is `home/mlflow.db`, artifacts go to `home/artifacts`, what it
            prints to `home/server.log`.
        extra_arguments: of `mlflow server`; one that names a store or an artifact root replaces the default.
        workers: default: MLflow's own (4).
        prefix: `--static-prefix`; it is part of the address.
        environment: set over the present one.

    Raises:
        ServerDied: it ended before it answered; carries what it printed.
    """
    home.mkdir(parents=True, exist_ok=True)
    with start(home, *extra_arguments, workers=workers, prefix=prefix, **environment) as (process, url):
        wait_until_healthy(process, url, home / "server.log")
        yield url


class ServerDied(RuntimeError):
    """The server ended instead of answering."""


@contextmanager
def start(
    home: Path, *extra_arguments: str, workers: int | None = None, prefix: str = "", **environment: str
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """As `mlflow_server`, without waiting: for a server that is expected to refuse to start."""
    port = free_port()
    arguments = ["--host", "127.0.0.1", "--port", str(port), *extra_arguments]
    if not any(a.startswith("--backend-store-uri") for a in extra_arguments):
        arguments += ["--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}"]
    if not any(a.startswith(("--artifacts-destination", "--default-artifact-root")) for a in extra_arguments):
        arguments += ["--artifacts-destination", str(home / "artifacts")]
    if workers is not None:
        arguments += ["--workers", str(workers)]
    if prefix:
        arguments += ["--static-prefix", prefix]
    inherited = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    settings = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it deadlocks offline
        **environment,
    }
    with open(home / "server.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *arguments],
            cwd=home,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**inherited, **settings},
            start_new_session=True,  # its own process group: workers and job runners go with it
        )
        try:
            yield process, f"http://127.0.0.1:{port}{prefix}"
        finally:
            stop(process)


def wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path, seconds: float = START_S) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    ended = f"ended with {process.returncode}" if process.poll() is not None else f"no answer within {seconds:.0f} s"
    raise ServerDied(f"mlflow server: {ended}\n{log.read_text(errors='replace')[-5000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server's whole process group, by force after ten seconds."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with suppress(ProcessLookupError):  # workers that outlived their parent
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
