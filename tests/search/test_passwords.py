"""A server that asks for a password: what is refused, and where the password stands afterwards."""

from __future__ import annotations

import logging
import socket

import pytest

from compress_search.exceptions import StudyError
from compress_search.recipe import FineTune
from compress_search.search.database_url import PASSWORD_VARIABLE, hand_on_password
from compress_search.search.storage import open_storage
from compress_search.search.study import create_study, load_study
from compress_search.workspace import Workspace

SECRET = "open%sesame"
IN_URL = "open%25sesame"


@pytest.fixture(scope="session")
def guarded(postgresql):
    """Return a user's URL of a database with or without a password in it.

    It lasts as long as the server, which keeps the user.
    """
    postgresql.add_user("guest", SECRET)
    owned, foreign = postgresql.new_database(), postgresql.new_database()
    postgresql.execute(f"ALTER DATABASE {owned.split('/')[3].split('?')[0]} OWNER TO guest")

    def url(password=None, *, own=True):
        user = "guest" if password is None else f"guest:{password}"
        return (owned if own else foreign).replace("postgres@", f"{user}@")

    return url


@pytest.mark.parametrize("password", ["wrong%25word", None])
def test_a_wrong_password_or_none_is_refused_without_showing_it(guarded, tmp_path, password):
    with pytest.raises(StudyError, match=f"cannot be used(.|\n)*{PASSWORD_VARIABLE}") as caught:
        open_storage(guarded(password), Workspace(tmp_path))
    assert "wrong" not in str(caught.value)


def test_a_user_who_may_create_no_tables_is_told_so(guarded, tmp_path):
    with pytest.raises(StudyError, match="permission denied"):
        open_storage(guarded(IN_URL, own=False), Workspace(tmp_path))


def test_a_server_that_is_not_there_is_named_at_once(tmp_path):
    with pytest.raises(StudyError, match="guest@/db.* cannot be used"):
        open_storage(f"postgresql+psycopg://guest@/db?host={tmp_path}", Workspace(tmp_path))


@pytest.mark.parametrize("driver", ["postgresql+psycopg", "mysql+pymysql", "mariadb+pymysql"])
def test_a_host_that_does_not_answer_is_named_with_the_remedy(tmp_path, driver):
    pytest.importorskip(driver.partition("+")[2])
    with socket.socket() as taken:
        # Nobody listens there.
        taken.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(
            StudyError, match=f"guest:[*]{{3}}@{host}/db cannot be used(.|\n)*can be reached"
        ) as caught:
            open_storage(f"{driver}://guest:{IN_URL}@{host}/db", Workspace(tmp_path))
    assert "sesame" not in str(caught.value)


def test_a_password_is_in_no_file_of_the_study_and_comes_from_the_environment(
    guarded, tiny_task, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    options = {"target": 0.5, "samples": 16, "fine_tune": FineTune(epochs=1), "tolerance": 0.2}
    study = create_study("guarded", tiny_task(), workspace=tmp_path, storage=guarded(IN_URL), **options)
    study.optimize(1)
    study.report()
    study.storage.engine.dispose()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    for told in (caplog.text.encode(), *(path.read_bytes() for path in files)):
        assert SECRET.encode() not in told
        assert IN_URL.encode() not in told
    # What `--workers` does for its workers.
    monkeypatch.setenv(PASSWORD_VARIABLE, "")
    hand_on_password(guarded(IN_URL))
    again = load_study("guarded", workspace=tmp_path, storage=guarded())
    assert [one.state for one in again.candidates()].count("complete") == 1
    again.storage.engine.dispose()
