"""A PostgreSQL server of the tests."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError, ProgrammingError
from sqlalchemy.pool import NullPool

PASSWORD_USER = "keeper"
"""The user whose password the server asks for; the others have none."""

PASSWORD = "hunter2-horse-battery"


def postgres_command(name: str) -> str:
    """One of PostgreSQL's programs."""
    found = [
        shutil.which(name),
        *map(str, sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))),
    ]
    paths = [path for path in found if path]
    if not paths:
        pytest.fail("these tests need PostgreSQL's server: apt-get install postgresql")
    return paths[-1]


def as_server_user() -> list[str]:
    """What stands before a command of PostgreSQL's: it refuses to run as root."""
    if os.getuid() != 0:
        return []
    # Not every shell of root has its folder in PATH.
    runuser = shutil.which("runuser") or "/usr/sbin/runuser"
    return [runuser, "-u", "postgres", "--"]


def server_folder() -> Path:
    """Make a folder that belongs to the server's user."""
    place = Path(tempfile.mkdtemp(prefix="postgres-", dir="/tmp"))
    if os.getuid() == 0:
        shutil.chown(place, "postgres")
    return place


class Server:
    """A PostgreSQL server of the tests' own; it refuses to run as root, so then it runs as its own
    user."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._as_user = as_server_user()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"postgresql+psycopg2://tester@127.0.0.1:{self.port}/postgres"
        self._data = str(place / "data")
        self._run("initdb", "-D", self._data, "-U", "tester", "-A", "trust")
        rules = place / "data" / "pg_hba.conf"
        rule = f"host all {PASSWORD_USER} 127.0.0.1/32 scram-sha-256\n"
        rules.write_text(rule + rules.read_text())

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._as_user, postgres_command(program), *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd=self._place)

    def start(self) -> None:
        """Start it, and wait till it answers."""
        at = ["-p", str(self.port), "-h", "127.0.0.1", "-k", str(self._place)]
        serve = [*self._as_user, postgres_command("postgres"), "-D", self._data, *at]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(serve, cwd=self._place, **quiet)
        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(OperationalError):
                create_engine(self.address, poolclass=NullPool).connect().close()
                return
            assert time.monotonic() < end, "PostgreSQL does not start"
            # After a kill it refuses to start until the last of its old processes has ended.
            if self._process.poll() is not None:
                self._process = subprocess.Popen(serve, cwd=self._place, **quiet)
            time.sleep(0.1)

    def stop(self) -> None:
        """Stop it as a crash does."""
        self._run("pg_ctl", "-D", self._data, "-m", "immediate", "stop")
        self._process.wait(30)

    def kill(self) -> None:
        """Kill its main process; the others notice that, and end by themselves."""
        main, *_ = (Path(self._data) / "postmaster.pid").read_text().split()
        os.kill(int(main), signal.SIGKILL)
        self._process.wait(30)

    def execute(self, statement: str) -> None:
        """Execute a statement of SQL."""
        with create_engine(self.address, poolclass=NullPool).begin() as connection:
            connection.execute(text(statement))

    def add_password_user(self) -> str:
        """Add the user whose password the server asks for; return the address without it."""
        with contextlib.suppress(ProgrammingError):
            self.execute(
                f"create role {PASSWORD_USER} login superuser password '{PASSWORD}'"
            )
        return f"postgresql://{PASSWORD_USER}@127.0.0.1:{self.port}/postgres"

    def silence(self) -> None:
        """Make all heartbeats an hour older, as if that time had passed."""
        self.execute(
            "update trial_heartbeats set heartbeat = heartbeat - interval '1 hour'"
        )

    def cut_connections(self) -> int:
        """End all connections but this one; returns their number."""
        cut = "select count(pg_terminate_backend(pid)) from pg_stat_activity"
        others = "backend_type = 'client backend' and pid <> pg_backend_pid()"
        with create_engine(self.address, poolclass=NullPool).connect() as connection:
            return int(connection.execute(text(f"{cut} where {others}")).scalar_one())


@contextlib.contextmanager
def running_server() -> Iterator[Server]:
    """Start a server, and stop it when the block ends."""
    place = server_folder()
    server = Server(place)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(place)


def with_address(database: str) -> str:
    """What a command's process runs first: the address comes from its environment."""
    return f"import os; os.environ['STUDY_DATABASE'] = {database!r}"
