"""The database does what it is told, and its answer is lost: nothing is done twice, and nothing is lost."""

from __future__ import annotations

import io
import itertools
import sqlite3
import threading

import optuna
import pytest
import sqlalchemy
from optuna.trial import Trial, TrialState, create_trial
from rich.console import Console

from compress_search.progress import Progress
from compress_search.results import Reference
from compress_search.search.claims import claiming
from compress_search.search.history import current_trials
from compress_search.search.identity import Identity, load_identity
from compress_search.search.recovery import DIED, interrupt
from compress_search.search.settings import SearchSettings
from compress_search.search.space import enqueue_anchors
from compress_search.search.storage import backend_of
from compress_search.search.study import _create
from compress_search.search.worker import _next_step, run_trials
from compress_search.stopping import StopSwitch
from compress_search.worker_process import Worker

every_database = pytest.mark.parametrize(
    "database", ["sqlite", "postgresql", pytest.param("mariadb", marks=pytest.mark.slow)], indirect=True
)


def fault_of(database):
    """What the driver says of a connection that broke."""
    if database == "sqlite":
        fault = sqlite3.OperationalError("disk I/O error")
        fault.sqlite_errorcode = sqlite3.SQLITE_IOERR
        return fault
    if database == "postgresql":
        return pytest.importorskip("psycopg").OperationalError("server closed the connection unexpectedly")
    return pytest.importorskip("pymysql").err.OperationalError(2013, "Lost connection during query")


@pytest.fixture
def losing(monkeypatch, database):
    """Lose the answers of a study's commits that write something: the first one, the third one, and so on."""
    # Nobody waits for a database that answers at once.
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    def lose(study):
        engine, lost, wrote, numbers = backend_of(study).engine, [], threading.local(), itertools.count()
        commit = engine.dialect.do_commit

        def look(connection, cursor, statement, parameters, context, many):
            if statement.lstrip().startswith(("INSERT", "UPDATE", "DELETE")):
                wrote.anything = True

        def commit_and_fall_silent(connection):
            commit(connection)
            if getattr(wrote, "anything", False):
                wrote.anything = False
                if next(numbers) % 2 == 0:
                    lost.append(1)
                    raise fault_of(database)

        sqlalchemy.event.listen(engine, "before_cursor_execute", look)
        monkeypatch.setattr(engine.dialect, "do_commit", commit_and_fall_silent)
        return lost

    return lose


def waiting(study, **given):
    study.add_trial(create_trial(state=TrialState.WAITING, **given))
    return study.get_trials(deepcopy=False)[-1]


def claimed(study):
    trial = waiting(study)
    with claiming(study) as claims:
        assert claims.take(trial._trial_id)
    return Trial(study, trial._trial_id)


def add(study):
    waiting(study, user_attrs={"mark": "mine"})
    return lambda: [trial.user_attrs for trial in study.trials][1:] == [{"mark": "mine"}]


def enqueue(study):
    study.enqueue_trial({"x": 0.25})
    return lambda: [t.system_attrs.get("fixed_params") for t in study.trials] == [None, {"x": 0.25}]


def suggest(study):
    trial = Trial(study, study.trials[0]._trial_id)
    value = trial.suggest_float("x", 0, 1)
    return lambda: study.trials[0].params == {"x": value}


def say(study):
    trial = Trial(study, study.trials[0]._trial_id)
    trial.set_user_attr("said", [1, 2])
    trial.set_user_attr("said", [3])
    # At the latest, it is there before the trial's end is.
    study.tell(trial, (0.9, 0.5))
    return lambda: study.trials[0].user_attrs["said"] == [3] and len(study.trials) == 1


def constrain(study):
    trial = Trial(study, study.trials[0]._trial_id)
    trial.set_constraint("mac_ratio", -0.5)
    return lambda: study.trials[0].constraints == {"mac_ratio": -0.5}


def tell(study):
    study.tell(0, (0.9, 0.5))
    return lambda: [(t.state.name, t.values) for t in study.trials] == [("COMPLETE", [0.9, 0.5])]


def fail(study):
    interrupt(study, study.trials[0], DIED, "its process ended")
    first, retry = study.trials
    told = (first.state.name, first.user_attrs["interrupted"], retry.state.name, retry.user_attrs["retry_of"])
    return lambda: told == ("FAIL", "died", "WAITING", 0) and len(study.trials) == 2


def claim(study):
    step = _next_step(study, 2, lambda trials: False)
    assert step.trial == study.trials[1]._trial_id
    worker = Worker.this_process().to_dict()
    return lambda: [t.user_attrs["worker"] for t in study.trials] == [worker] * 2 and not step.is_over


def create(study):
    identity = Identity(
        {"name": "none"}, SearchSettings(target=0.5), Reference(0.9, 1000, 100), {"torch": "1"}
    )
    made = _create(backend_of(study), "other", identity)
    assert load_identity(made) == identity and made.metric_names == ["accuracy", "mac_ratio"]
    return lambda: sorted(optuna.get_all_study_names(study._storage)) == ["other", "study"]


def remember(study):
    study.set_user_attr("n_trials", 7)
    return lambda: study.user_attrs == {"n_trials": 7}


@every_database
@pytest.mark.parametrize(
    "write",
    [add, enqueue, suggest, say, constrain, tell, fail, claim, create, remember],
    ids=lambda w: w.__name__,
)
def test_a_write_whose_answer_is_lost_is_done_once(new_study, losing, monkeypatch, write):
    study = new_study()
    claimed(study)
    with monkeypatch.context() as patch:
        lost = losing(study)
        is_done = write(study)
        assert lost
        patch.undo()
    assert is_done()


def test_a_search_that_loses_every_other_answer_is_the_undisturbed_one(
    new_study, objective, runner, make_settings, losing
):
    def search(name, *, lose):
        study = new_study(name)
        lost = losing(study) if lose else []
        enqueue_anchors(study, make_settings())
        progress = Progress(Console(file=io.StringIO()))
        run_trials(study, objective(type(runner)()), n_trials=6, progress=progress, stop=StopSwitch())
        return study.trials, len(lost)

    (disturbed, losses), (undisturbed, _) = search("disturbed", lose=True), search("other", lose=False)
    assert losses > 30
    assert len(disturbed) == len(undisturbed) == 6 == len(current_trials(disturbed))
    for trial, other in zip(disturbed, undisturbed, strict=True):
        assert (trial.state, trial.params, trial.values) == (other.state, other.params, other.values)
        assert trial.user_attrs == other.user_attrs and trial.constraints == other.constraints
