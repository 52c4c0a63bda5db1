"""A study that is open: it runs, and is asked for its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import optuna
import torch
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial

from compress_search.exceptions import StudyError, TaskError
from compress_search.export import ExportFiles, export_candidate
from compress_search.latency import COMPRESSED, ORIGINAL, RUNTIMES, LatencyTable, measure_latency
from compress_search.leases import lease_files
from compress_search.profile import profile_model
from compress_search.progress import Progress
from compress_search.recipe import FineTune, Recipe
from compress_search.reports.layers import LayerRow, layer_table
from compress_search.reports.page import ReportFiles, write_report
from compress_search.results import Candidate, ParetoFront
from compress_search.search.candidates import candidate_of
from compress_search.search.claims import claiming
from compress_search.search.finalists import (
    choose_origins,
    finalist_recipe,
    find_finalist,
    queue_finalists,
)
from compress_search.search.history import RECIPE, current_trials, pending_finalists
from compress_search.search.identity import Identity
from compress_search.search.objective import run_trial
from compress_search.search.sampler import SAMPLERS, ReproducibleSampler
from compress_search.search.space import enqueue_anchors, trials_in_reach
from compress_search.search.status import StudyStatus, status_of
from compress_search.search.trial_history import TrialHistory, trial_history
from compress_search.search.worker import run_trials
from compress_search.stages import StageRunner
from compress_search.stopping import StopSwitch
from compress_search.task import Task
from compress_search.training.trainer import CHECKPOINT_SECONDS
from compress_search.workspace import Workspace, write_json_atomically

_WANTED, _TESTS = "n_trials", "test_scores"
_FINALIST_EPOCHS = 30


@dataclass(frozen=True)
class TestScore:
    """What ``Task.evaluate`` said on the test data, which the search never saw.

    Attributes:
        original: Of the original model.
        candidate: Of the candidate.
    """

    original: float
    candidate: float


class CompressionStudy:
    """A search for a smaller model; :func:`create_study` and :func:`load_study` make it.

    Attributes:
        name: Of the study.
        workspace: Where its stages and reports lie.
        storage: Its database.
        settings: How it searches.
        reference: The original model's numbers.
        optuna_study: What Optuna knows of it, for everything that Optuna can do with a study.
        task: The user's side; ``None`` if the study was loaded without it.
        task_name: The task's name.
        device: Where models run.
    """

    def __init__(
        self,
        optuna_study: optuna.Study,
        *,
        storage: RDBStorage,
        workspace: Workspace,
        identity: Identity,
        task: Task | None,
        device: torch.device,
    ) -> None:
        self.name = optuna_study.study_name
        self.workspace = workspace
        self.storage = storage
        self.settings = identity.settings
        self.reference = identity.reference
        self.optuna_study = optuna_study
        self.task = task
        self.task_name: str = identity.task["name"]
        self.device = device
        optuna_study.sampler = ReproducibleSampler(SAMPLERS[self.settings.sampler], self.settings.seed)

    @property
    def folder(self) -> Path:
        """The folder of the study's reports and exports."""
        return self.workspace.study_folder(self.name)

    def optimize(
        self,
        n_trials: int,
        *,
        timeout: float | None = None,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        progress: Progress | None = None,
    ) -> None:
        """Search until the study has ``n_trials`` finished trials; resumes whatever was interrupted.

        Args:
            n_trials: The study's total. A study that has as many does nothing, and a grid ends with its
                last point.
            timeout: No trial is begun after so many seconds.
            checkpoint_seconds: A fine-tuning leaves a checkpoint so often, and after each epoch; what a
                process that is killed had done since then is done again.
            progress: Where to show it; bars on a terminal by default.

        Raises:
            StudyError: The study was loaded without its task, the first trials all failed alike, or the
                database failed.
            KeyboardInterrupt: Ctrl-C or SIGTERM. A fine-tuning finishes its step and leaves a checkpoint
                first; a second signal ends it at once, which loses what it did since the last checkpoint.
        """
        if n_trials < 1:
            raise StudyError(f"n_trials is {n_trials!r}; it is the study's total and must be 1 or more.")
        self._needed_task("optimize")
        n_trials = trials_in_reach(self.settings, n_trials)
        self.optuna_study.set_user_attr(_WANTED, n_trials)
        with claiming(self.optuna_study):
            # Two processes that begin at the same time would both find that none is queued.
            enqueue_anchors(self.optuna_study, self.settings)
        self._run(n_trials, timeout=timeout, checkpoint_seconds=checkpoint_seconds, progress=progress)

    def finalize(
        self,
        top_k: int = 3,
        epochs: int | None = None,
        *,
        settings: FineTune | None = None,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        progress: Progress | None = None,
    ) -> tuple[Candidate, ...]:
        """Train the best candidates on for longer, each as a further trial of the study.

        These finalists take part in everything that a study is asked for, but they are not counted in its
        total of trials, and the sampler does not see them. One that is there already is not trained again.
        Nobody's accuracy falls: fine-tuning keeps the best weights, those that it began with included.

        Args:
            top_k: How many: the feasible candidates on the front first, then the others, from the most
                accurate down. Finalists themselves are not trained on.
            epochs: Number of epochs; by default those of ``settings``, or 30 without it.
            settings: How to train; ``None`` is as each candidate was trained last.
            checkpoint_seconds: See :meth:`optimize`.
            progress: Where to show it; bars on a terminal by default.

        Returns:
            The finalists, in the order of the candidates that they come from. One whose training failed is
            among them, with its reason; calling again tries it again.

        Raises:
            StudyError: No candidate is feasible, a number is not one of these, the study was loaded without
                its task, or the database failed.
            KeyboardInterrupt: Ctrl-C or SIGTERM. The same call goes on, and so does :meth:`optimize`.
        """
        if top_k < 1:
            raise StudyError(f"top_k is {top_k!r}; it is the number of finalists and must be 1 or more.")
        if epochs is None:
            epochs = _FINALIST_EPOCHS if settings is None else settings.epochs
        if epochs < 1:
            raise StudyError(f"epochs is {epochs!r}; finalists are trained, so it must be 1 or more.")
        self._needed_task("finalize")
        origins = choose_origins(self.candidates(), top_k)
        if not origins:
            self.best()  # It says what is in the way, and what to do.
        trials = self.optuna_study.get_trials(deepcopy=False)
        recipes = {
            origin.number: finalist_recipe(
                Recipe.from_dict(trials[origin.number].user_attrs[RECIPE]),
                epochs=epochs,
                settings=settings,
                otherwise=self.settings.final_fine_tune or self.settings.fine_tune,
            )
            for origin in origins
        }
        queue_finalists(self.optuna_study, recipes)
        if pending_finalists(self.optuna_study.get_trials(deepcopy=False)):
            self._run(0, checkpoint_seconds=checkpoint_seconds, progress=progress)
        trials = self.optuna_study.get_trials(deepcopy=False)
        finalists = (find_finalist(trials, number, recipe) for number, recipe in recipes.items())
        return tuple(self._candidate(trial) for trial in finalists if trial is not None)

    def candidates(self) -> tuple[Candidate, ...]:
        """Return what the trials ended as, by number; without those that were interrupted and run again."""
        return tuple(map(self._candidate, current_trials(self.optuna_study.get_trials(deepcopy=False))))

    def front(self) -> ParetoFront:
        """Return the study's answer so far."""
        return ParetoFront(self.candidates(), self.reference, self.settings.target, self.settings.tolerance)

    def best(self, *, max_drop: float | None = None) -> Candidate:
        """Pick the model to ship; see :meth:`compress_search.results.ParetoFront.choose`."""
        return self.front().choose(max_drop=max_drop)

    def status(self) -> StudyStatus:
        """Tell how far the study is."""
        front = self.front()
        return status_of(
            self.optuna_study.get_trials(deepcopy=False),
            name=self.name,
            target=self.settings.target,
            reference=self.reference,
            wanted=self.optuna_study.user_attrs.get(_WANTED),
            best=front.choose() if len(front) else None,
            leases=lease_files(self.workspace.stages),
        )

    def trial_history(self, number: int) -> TrialHistory:
        """Tell what became of one trial, and why.

        Args:
            number: Of the trial, as in the tables and the dashboard.

        Raises:
            StudyError: There is no such trial; the message says which there are.
        """
        trials = self.optuna_study.get_trials(deepcopy=False)
        return trial_history(trials, number, study=self.name, stages=self.workspace.stages)

    def test(self, candidate: Candidate) -> TestScore:
        """Evaluate a candidate and the original on the test data, once; later calls read what was stored.

        Raises:
            StudyError: The candidate did not complete, or the task is not known.
            TaskError: The task has no test data.
        """
        if (stored := self._stored_test(candidate)) is not None:
            return stored
        task = self._needed_task("test")
        if task.test is None:
            raise TaskError(f"The task {task.name!r} has no test data. Give it a loader: Task(test=...).")
        scores = dict(self.optuna_study.user_attrs.get(_TESTS, {}))
        original = task.build_model().to(self.device)
        if "original" not in scores:
            scores["original"] = task.score(original, task.test)
        scores[str(candidate.number)] = task.score(candidate.load_model(original), task.test)
        self.optuna_study.set_user_attr(_TESTS, scores)
        return TestScore(scores["original"], scores[str(candidate.number)])

    def report(self, chosen: Candidate | None = None) -> ReportFiles:
        """Write the report, the plots and the table of all candidates into :attr:`folder`.

        Args:
            chosen: The model to ship; by default the most accurate feasible one, if there is one.
        """
        front = self.front()
        if chosen is None and len(front):
            chosen = front.choose()
        test = None if chosen is None else self._stored_test(chosen)
        exported = None if chosen is None else self._export_folder(chosen)
        return write_report(
            self.folder,
            title=self.name,
            front=front,
            chosen=chosen,
            test=None if test is None else (test.original, test.candidate),
            layers=() if chosen is None else self._layers_of(chosen),
            settings={"task": self.task_name, **self.settings.to_dict()},
            export_folder=exported if exported is not None and exported.is_dir() else None,
        )

    def export(self, candidate: Candidate, folder: Path | None = None) -> ExportFiles:
        """Write a candidate as files to ship; see :func:`compress_search.export.export_candidate`.

        Args:
            candidate: A complete candidate.
            folder: Where to; ``export/trial-N`` in :attr:`folder` by default.
        """
        example = None if self.task is None else self.task.example_input
        return export_candidate(candidate, folder or self._export_folder(candidate), example_input=example)

    def benchmark_latency(
        self,
        candidate: Candidate,
        *,
        batches: Sequence[int] = (1, 32),
        runtimes: Sequence[str] = tuple(RUNTIMES),
        threads: int | None = None,
        seconds: float = 2.0,
    ) -> LatencyTable:
        """Measure how long a candidate and the original take on this machine, and keep that beside the study.

        It is kept in ``latency/trial-N.json`` in :attr:`folder`; measuring again replaces it.

        Args:
            candidate: A complete candidate.
            batches: How many examples a call has.
            runtimes: See :func:`compress_search.latency.measure_latency`, also for the others.
            threads: Of the CPU.
            seconds: How long each model is measured in each case.

        Raises:
            StudyError: The candidate did not complete, or the task is not known.
            ConfigError: A number or a runtime is not one of these.
        """
        task = self._needed_task("benchmark_latency")
        original = task.build_model().to(self.device)
        table = measure_latency(
            {ORIGINAL: original, COMPRESSED: candidate.load_model(original)},
            task.example_input,
            batches=batches,
            runtimes=runtimes,
            device=self.device,
            threads=threads,
            seconds=seconds,
            mac_ratio=candidate.mac_ratio,
        )
        write_json_atomically(self.latency_file(candidate), table.to_dict())
        return table

    def latency_file(self, candidate: Candidate) -> Path:
        """Where :meth:`benchmark_latency` keeps what it measured of a candidate."""
        return self.folder / "latency" / f"trial-{candidate.number}.json"

    def _run(
        self,
        n_trials: int,
        *,
        timeout: float | None = None,
        checkpoint_seconds: float,
        progress: Progress | None,
    ) -> None:
        if not checkpoint_seconds > 0:
            raise StudyError(f"checkpoint_seconds is {checkpoint_seconds!r}; it must be positive.")
        assert self.task is not None
        progress, stop = progress or Progress(), StopSwitch()
        runner = StageRunner(
            self.task,
            self.workspace.prepare(),
            seed=self.settings.seed,
            device=self.device,
            progress=progress,
            checkpoint_seconds=checkpoint_seconds,
            stop=stop,
        )
        objective = partial(run_trial, settings=self.settings, runner=runner, reference=self.reference)
        run_trials(
            self.optuna_study, objective, n_trials=n_trials, timeout=timeout, progress=progress, stop=stop
        )

    def _candidate(self, trial: FrozenTrial) -> Candidate:
        return candidate_of(trial, self.workspace, None if self.task is None else self.task.build_model)

    def _stored_test(self, candidate: Candidate) -> TestScore | None:
        scores = self.optuna_study.user_attrs.get(_TESTS, {})
        number = str(candidate.number)
        return TestScore(scores["original"], scores[number]) if number in scores else None

    def _layers_of(self, candidate: Candidate) -> tuple[LayerRow, ...]:
        if self.task is None:
            return ()
        original, example = self.task.build_model(), self.task.example_input
        compressed = candidate.load_model(original)
        return layer_table(
            candidate.plan, profile_model(original, example), profile_model(compressed, example)
        )

    def _export_folder(self, candidate: Candidate) -> Path:
        return self.folder / "export" / f"trial-{candidate.number}"

    def _needed_task(self, what: str) -> Task:
        if self.task is None:
            raise StudyError(
                f"The study {self.name!r} was opened without its task, which {what} needs: "
                f'load_study("{self.name}", task).'
            )
        return self.task
