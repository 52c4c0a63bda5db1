from __future__ import annotations

import sqlite3
import sys

import pytest
import sqlalchemy

from compress_search.exceptions import StudyError
from compress_search.search.heartbeats import Heartbeat
from compress_search.search.stage_uses import remember_database
from compress_search.search.storage import open_storage
from compress_search.workspace import Workspace


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path)


def test_sqlite_is_set_up_to_lose_nothing(workspace):
    storage = open_storage(None, workspace)
    with storage.engine.connect() as connection:
        pragmas = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "busy_timeout")
        ]
    assert pragmas == ["wal", 1, 30_000]
    assert storage.heartbeat == Heartbeat()
    assert Heartbeat().seconds * 3 <= Heartbeat().grace_seconds
    storage.engine.dispose()


def test_a_transaction_has_the_write_lock_from_its_beginning(workspace):
    storage = open_storage(None, workspace)
    other = sqlite3.connect(workspace.database, timeout=0, isolation_level=None)
    with storage.engine.begin() as connection:
        connection.exec_driver_sql("SELECT 1")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
    other.execute("BEGIN IMMEDIATE")
    other.execute("ROLLBACK")
    other.close()
    storage.engine.dispose()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("journal.log", "has no heartbeat"),
        ("study.journal", "has no heartbeat"),
        ("journal:///study.log", "has no heartbeat"),
        ("redis://localhost", "has no heartbeat"),
        ("grpc://localhost:13000", "has no heartbeat"),
        ("sqlite://", "gone when the process ends"),
        ("sqlite:///:memory:", "gone when the process ends"),
        ("study.db", "not the URL of a database"),
        ("sqlite:////no/such/folder/study.db", "unable to open database file"),
    ],
)
def test_what_cannot_keep_a_resumable_study_is_refused_with_the_reason(workspace, url, said):
    with pytest.raises(StudyError, match=said):
        open_storage(url, workspace)


@pytest.mark.parametrize(
    "url",
    [
        "nosuch://me:secret@host/db",
        "mysql+nosuch://me:secret@host/db",
        "mysql+nosuch://me@host/db?passwd=secret",
        "postgresql+nosuch://me@host/db?password=secret",
        "postgresql://me:secret@host:port/db",
        "me:secret@",
    ],
)
def test_errors_do_not_show_passwords(workspace, url):
    with pytest.raises(StudyError) as caught:
        open_storage(url, workspace)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "module", "remedy"),
    [
        (
            "postgresql+psycopg://me@host/db",
            "psycopg",
            r"Install it: pip install 'compress-search\[postgresql\]'\.",
        ),
        ("mysql+pymysql://me@host/db", "pymysql", r"Install it: pip install 'compress-search\[mysql\]'\."),
        ("mysql+mysqldb://me@host/db", "MySQLdb", r"or write mysql\+pymysql:// and install pymysql: pip"),
        ("nosuch://me@host/db", "nosuch", "Use SQLite"),
    ],
)
def test_a_driver_that_is_missing_is_named_with_what_installs_it(workspace, monkeypatch, url, module, remedy):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(StudyError, match=remedy):
        open_storage(url, workspace)


def test_what_a_server_says_is_told_without_the_password(workspace, monkeypatch):
    # As if the driver had repeated the whole address in its error.
    def refuse(url, **arguments):
        assert arguments["engine_kwargs"]["pool_pre_ping"]
        url = url.render_as_string(hide_password=False)
        assert url == "postgresql+psycopg://me:secret@host/db?password=hidden"
        driver_error = ConnectionError(f"no route to {url}")
        raise sqlalchemy.exc.OperationalError("", {}, driver_error)

    monkeypatch.setattr("compress_search.search.storage.PatientStorage", refuse)
    with pytest.raises(StudyError, match="cannot be used: no route to postgresql") as caught:
        open_storage("postgresql+psycopg://me:secret@host/db?password=hidden", workspace)
    assert "secret" not in str(caught.value) and "hidden" not in str(caught.value)
    assert str(caught.value).count("***") == 4


def test_the_folder_of_a_study_does_not_note_passwords(workspace):
    workspace.prepare()
    remember_database(workspace, "digits", "postgresql+psycopg://me:secret@host/db?password=hidden")
    noted = (workspace.study_folder("digits") / "database.json").read_text()
    assert '"postgresql+psycopg://me@host/db"' in noted
    assert "secret" not in noted and "hidden" not in noted


def test_optunas_own_journal_object_is_refused(workspace):
    class JournalStorage:
        pass

    with pytest.raises(StudyError, match="has no heartbeat"):
        open_storage(JournalStorage(), workspace)


def test_a_file_that_is_no_database_is_named(workspace):
    workspace.database.write_text("not a database " * 100)
    with pytest.raises(StudyError, match="file is not a database"):
        open_storage(None, workspace)


def test_looking_at_a_database_does_not_create_it(workspace):
    with pytest.raises(StudyError, match="There is no database"):
        open_storage(None, workspace, must_exist=True)
    assert not workspace.database.exists()


def test_tables_of_another_optuna_are_refused_with_the_remedy(workspace):
    storage = open_storage(None, workspace)
    with storage.engine.begin() as connection:
        connection.execute(sqlalchemy.text("UPDATE alembic_version SET version_num = 'v3.0.0.a'"))
    storage.engine.dispose()
    with pytest.raises(StudyError, match="optuna storage upgrade"):
        open_storage(None, workspace)
