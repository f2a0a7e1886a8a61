"""A real PostgreSQL cluster on loopback, for the tests of what SQLite cannot show."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import not_here
from servers import free_port


def binaries() -> Path | None:
    """Debian's folder of PostgreSQL's programs, the newest; None where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name))
    return next((p for p in reversed(found) if (p / "initdb").is_file()), None)


@contextmanager
def postgresql() -> Iterator[str]:
    """Start a cluster in a folder of its own, yield the address of an empty database, stop and remove it.

    PostgreSQL refuses to run as root; a root test runs it as the user `postgres`.
    """
    programs = binaries()
    if programs is None:
        not_here("needs Debian's package postgresql: no initdb below /usr/lib/postgresql")
    as_user: list[str] = []
    folder = Path(tempfile.mkdtemp(prefix="agentkit-postgres-"))
    if os.geteuid() == 0:
        if shutil.which("runuser") is None:
            not_here("needs runuser, to run PostgreSQL as another user than root")
        as_user = ["runuser", "-u", "postgres", "--"]
        shutil.chown(folder, "postgres")
    port = free_port()

    def run(program: str, *arguments: str) -> None:
        done = subprocess.run(
            [*as_user, str(programs / program), *arguments],
            cwd=folder, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, f"{program}: {done.stdout}\n{done.stderr}"

    data = str(folder / "data")
    try:
        run("initdb", "-D", data, "-U", "agentkit", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C.UTF-8")
        options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder} -c fsync=off"
        run("pg_ctl", "-D", data, "-l", str(folder / "log"), "-w", "-o", options, "start")
        try:
            yield f"postgresql+psycopg2://agentkit@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def new_database(cluster: str) -> str:
    """Another empty database in the cluster; its address, as PostgreSQL's own programs take it."""
    import psycopg

    name = f"d{uuid.uuid4().hex}"
    with psycopg.connect(cluster.replace("+psycopg2", ""), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{cluster.replace('+psycopg2', '').rpartition('/')[0]}/{name}"


def on_disk(address: str) -> list[Path]:
    """The files of a database's tables, with all that was deleted of them and not written over."""
    import psycopg

    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute("CHECKPOINT")
        query = "SELECT current_setting('data_directory'), oid FROM pg_database WHERE datname = current_database()"
        folder, oid = connection.execute(query).fetchall()[0]
    return [path for path in Path(folder, "base", str(oid)).iterdir() if path.is_file()]
