"""A stage runner that computes in no time, and studies on a database of their own, of any kind."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from optuna.study import create_study

from compress_search.exceptions import RatioError
from compress_search.fingerprint import content_hash
from compress_search.recipe import Compress, FineTune, stage_to_dict
from compress_search.results import Reference, StageResult
from compress_search.search.identity import DIRECTIONS
from compress_search.search.objective import run_trial
from compress_search.search.sampler import make_sampler
from compress_search.search.settings import SearchSettings
from compress_search.search.storage import open_storage, quiet_optuna
from compress_search.workspace import Workspace

_spec = importlib.util.spec_from_file_location("servers", Path(__file__).with_name("servers.py"))
_servers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_servers)

REFERENCE = Reference(accuracy=0.9, macs=1_000_000, params=1000)


class FakeRunner:
    """Stages with numbers of closed form, reused by key as the real runner does.

    A compressing stage keeps 0.1 % less than it is asked to, in accuracy it costs ``(1 - ratio) ** 2``
    of which fine-tuning gives back three quarters.
    """

    def __init__(self, *, lowest=0.0):
        self.lowest = lowest
        self.store = {}
        self.before_stage = lambda stage: None
        self.epochs = 0

    def achieved_ratio(self, stages):
        return self._macs(stages) / REFERENCE.macs

    def run(self, recipe, *, after_stage=None, after_epoch=None):
        results = []
        key, accuracy = "original", REFERENCE.accuracy
        for position, stage in enumerate(recipe.stages):
            key = content_hash([key, stage_to_dict(stage)])
            reused = key in self.store
            if not reused:
                if self.epochs and after_epoch is not None:
                    after_epoch([0.5] * (self.epochs + 1))
                self.before_stage(stage)
                lost = (1 - stage.mac_ratio) ** 2 if isinstance(stage, Compress) else 0.75 * (accuracy - 0.9)
                macs = self._macs(recipe.stages[: position + 1])
                curve = ()
                if isinstance(stage, FineTune):
                    curve = tuple(accuracy - lost * done / stage.epochs for done in range(stage.epochs + 1))
                    for done in range(1, stage.epochs + 1):
                        if after_epoch is not None:
                            after_epoch(curve[: done + 1])
                self.store[key] = (accuracy - lost, macs, curve)
            accuracy, macs, curve = self.store[key]
            results.append(
                StageResult(
                    key=key,
                    name=stage.name,
                    accuracy=accuracy,
                    macs=macs,
                    params=macs // 1000,
                    mac_ratio=macs / REFERENCE.macs,
                    seconds=2.0,
                    reused=reused,
                    learning_curve=curve,
                )
            )
            if after_stage is not None:
                after_stage(stage, results[-1])
        return tuple(results)

    def _macs(self, stages):
        macs = REFERENCE.macs
        for stage in stages:
            if isinstance(stage, Compress):
                if stage.mac_ratio < self.lowest:
                    raise RatioError(f"A mac_ratio of {stage.mac_ratio:.4f} cannot be reached.")
                macs = int(macs * stage.mac_ratio * 0.999)
        return macs


@pytest.fixture
def runner():
    return FakeRunner()


@pytest.fixture
def make_settings():
    def make(**changes):
        return SearchSettings(**{"target": 0.5, "fine_tune": FineTune(epochs=1)} | changes)

    return make


def sampler_of(settings):
    single = not isinstance(settings.target, tuple)
    return make_sampler(settings.sampler, settings.seed, by_accuracy=single)


@pytest.fixture(scope="session")
def postgresql():
    """A PostgreSQL server."""
    server = _servers.PostgreSQL()
    yield server
    server.close()


@pytest.fixture(scope="session")
def mariadb():
    """A MariaDB server."""
    server = _servers.MariaDB()
    yield server
    server.close()


@pytest.fixture
def database(request):
    """The kind of database; SQLite where a test does not ask for others (``indirect``)."""
    return getattr(request, "param", "sqlite")


@pytest.fixture
def database_url(request, database, tmp_path):
    """Return the URL of a database by a name of the test's own; the same name is the same database."""
    urls = {}

    def url(name="study"):
        if database == "sqlite":
            return f"sqlite:///{tmp_path / name}.db"
        if name not in urls:
            urls[name] = request.getfixturevalue(database).new_database()
        return urls[name]

    return url


@pytest.fixture
def new_study(tmp_path, make_settings, database_url):
    """Make an empty study on a database of its own, or open it."""
    storages = []

    def make(name="study", settings=None, **options):
        settings = settings or make_settings()
        storage = open_storage(database_url(name), Workspace(tmp_path), **options)
        storages.append(storage)
        with quiet_optuna():
            return create_study(
                study_name=name,
                storage=storage,
                directions=DIRECTIONS,
                load_if_exists=True,
                sampler=sampler_of(settings),
            )

    yield make
    for storage in storages:
        storage.engine.dispose()


@pytest.fixture
def study_in_memory(make_settings):
    """Make a study without a database, for what does not depend on one."""

    def make(settings=None):
        settings = settings or make_settings()
        with quiet_optuna():
            return create_study(directions=DIRECTIONS, sampler=sampler_of(settings))

    return make


@pytest.fixture
def objective(make_settings):
    """Make the objective of a runner."""

    def make(runner, settings=None, reference=REFERENCE):
        settings = settings or make_settings()
        return lambda trial: run_trial(trial, settings=settings, runner=runner, reference=reference)

    return make
