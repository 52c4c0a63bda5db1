"""A study that is open: it runs, and is asked for its answer."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import optuna
import pandas as pd
import torch
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial
from torch import nn

from compress_search.exceptions import PlanError, StudyError, TaskError, WorkspaceError
from compress_search.export import ExportFiles, export_candidate
from compress_search.fingerprint import content_hash, data_fingerprint, model_fingerprint, seeded
from compress_search.function_identity import function_identity
from compress_search.latency import COMPRESSED, ORIGINAL, RUNTIMES, LatencyTable, measure_latency
from compress_search.leases import lease_files
from compress_search.profile import profile_model
from compress_search.progress import Progress
from compress_search.recipe import FineTune, Recipe
from compress_search.reports.figures import StudyFigure, study_figures
from compress_search.reports.frames import layers_frame, sensitivity_frame, trials_frame
from compress_search.reports.layers import LayerRow, layer_table
from compress_search.reports.page import Details, ReportFiles, write_report
from compress_search.reports.sensitivity import LOSSES, StageSensitivity
from compress_search.results import Candidate, ParetoFront
from compress_search.search.candidates import candidate_of
from compress_search.search.changes import Change
from compress_search.search.claims import claiming
from compress_search.search.dashboard_access import PORT
from compress_search.search.finalists import (
    choose_origins,
    finalist_recipe,
    find_finalist,
    queue_finalists,
)
from compress_search.search.history import RECIPE, current_trials, pending_finalists
from compress_search.search.identity import Asked, Identity, agree, current_versions, load_identity
from compress_search.search.objective import run_trial
from compress_search.search.sampler import make_sampler
from compress_search.search.space import enqueue_anchors, trials_in_reach
from compress_search.search.status import StudyStatus, status_of
from compress_search.search.stop_when import StopWhen
from compress_search.search.trial_history import TrialHistory, trial_history
from compress_search.search.worker import run_trials
from compress_search.stages import StageRunner
from compress_search.stopping import StopSwitch
from compress_search.task import Task
from compress_search.training.trainer import CHECKPOINT_SECONDS
from compress_search.workspace import Workspace, write_json_atomically

logger = logging.getLogger("compress_search")

_WANTED, _STOP_WHEN, _TESTS = "n_trials", "stop_when", "test_scores"
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
        accept_changed: bool,
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
        self._accept_changed = accept_changed
        single = not isinstance(self.settings.target, tuple)
        optuna_study.sampler = make_sampler(self.settings.sampler, self.settings.seed, by_accuracy=single)

    @property
    def folder(self) -> Path:
        """The folder of the study's reports and exports."""
        return self.workspace.study_folder(self.name)

    def optimize(
        self,
        n_trials: int,
        *,
        timeout: float | None = None,
        stop_when: StopWhen | None = None,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        progress: Progress | None = None,
    ) -> None:
        """Search until the study has ``n_trials`` finished trials; resumes whatever was interrupted.

        Args:
            n_trials: The study's total. A study that has as many does nothing, and a grid ends with its
                last point.
            timeout: No trial is begun after so many seconds.
            stop_when: No trial is begun once a candidate is as good as this. A study that has one does
                nothing.
            checkpoint_seconds: A fine-tuning leaves a checkpoint so often, and after each epoch; what a
                process that is killed had done since then is done again.
            progress: Where to show it; bars on a terminal by default.

        Raises:
            ConfigError: No feasible candidate can be what ``stop_when`` asks for.
            StudyMismatchError: The workspace or the versions of packages are others than before, and that
                was not accepted when the study was opened.
            StudyError: The study was loaded without its task, the first trials all failed alike, or the
                database failed.
            KeyboardInterrupt: Ctrl-C or SIGTERM. A fine-tuning finishes its step and leaves a checkpoint
                first; a second signal ends it at once, which loses what it did since the last checkpoint.
        """
        total: object = n_trials
        if not isinstance(total, int) or isinstance(total, bool) or total < 1:
            raise StudyError(
                f"n_trials is {n_trials!r}; it is the study's total and must be a whole number, 1 or more."
            )
        self._needed_task("optimize")
        self._agree_to_work()
        n_trials = trials_in_reach(self.settings, n_trials)
        until: object = stop_when
        if not isinstance(until, StopWhen | None):
            raise StudyError(f"stop_when is {until!r}; it must be a StopWhen: StopWhen(max_drop=0.01).")
        if stop_when is not None:
            stop_when.check(self.settings)
        self.optuna_study.set_user_attr(_WANTED, n_trials)
        self.optuna_study.set_user_attr(_STOP_WHEN, None if stop_when is None else asdict(stop_when))
        with claiming(self.optuna_study):
            # Two processes that begin at the same time would both find that none is queued.
            enqueue_anchors(self.optuna_study, self.settings)
        self._run(
            n_trials,
            timeout=timeout,
            stop_when=stop_when,
            checkpoint_seconds=checkpoint_seconds,
            progress=progress,
        )

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
        Nobody's accuracy falls by more than its standard error: else fine-tuning keeps what it began with.

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
            StudyMismatchError: See :meth:`optimize`.
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
        self._agree_to_work()
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

    def candidate(self, number: int) -> Candidate:
        """Return what one trial ended as.

        Args:
            number: Of the trial, as in the tables and the dashboard.

        Raises:
            StudyError: There is none that counts; the message says which are complete.
        """
        candidates = {candidate.number: candidate for candidate in self.candidates()}
        if number in candidates:
            return candidates[number]
        complete = [str(number) for number, c in candidates.items() if c.state == "complete"]
        raise StudyError(
            f"The study {self.name!r} has no trial {number!r}. "
            f"Its complete trials: {', '.join(complete) or 'none'}."
        )

    def front(self) -> ParetoFront:
        """Return the study's answer so far."""
        return ParetoFront(self.candidates(), self.reference, self.settings.target, self.settings.tolerance)

    def best(self, *, max_drop: float | None = None) -> Candidate:
        """Pick the model to ship; see :meth:`compress_search.results.ParetoFront.choose`."""
        return self.front().choose(max_drop=max_drop)

    def status(self) -> StudyStatus:
        """Tell how far the study is."""
        stop_when = self.optuna_study.user_attrs.get(_STOP_WHEN)
        return status_of(
            self.optuna_study.get_trials(deepcopy=False),
            name=self.name,
            front=self.front(),
            wanted=self.optuna_study.user_attrs.get(_WANTED),
            stop_when=None if stop_when is None else StopWhen(**stop_when),
            leases=lease_files(self.workspace.stages),
            changes=self._changes(),
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

        Other test data, another original model or another ``evaluate`` than before are measured anew.

        Raises:
            StudyError: The candidate did not complete, or the task is not known.
            TaskError: The task has no test data.
        """
        if (stored := self._stored_test(candidate)) is not None:
            return stored
        task = self._needed_task("test")
        if task.test is None:
            raise TaskError(f"The task {task.name!r} has no test data. Give it a loader: Task(test=...).")
        assert self._test_key is not None
        tests = self._stored_tests()
        # Taken out, so that what is measured now comes last.
        scores = tests.pop(self._test_key, {})
        original = task.build_model().to(self.device)
        if "original" not in scores:
            scores["original"] = self._test_score(original, task)
        scores[str(candidate.number)] = self._test_score(candidate.load_model(original), task)
        self.optuna_study.set_user_attr(_TESTS, {**tests, self._test_key: scores})
        return TestScore(scores["original"], scores[str(candidate.number)])

    def _test_score(self, model: nn.Module, task: Task) -> float:
        assert task.test is not None
        # One seed for all, as in the search: where a loader shuffles and drops the rest, or draws a part of
        # the data, the same examples judge the original and every candidate.
        with seeded(self.settings.seed, task.test):
            return task.score(model, task.test)

    def figures(self, chosen: Candidate | None = None) -> tuple[StudyFigure, ...]:
        """Return the figures of the study, as its report shows them; ``draw()`` of each draws it.

        Args:
            chosen: The candidate to mark; by default the most accurate feasible one, if there is one.
        """
        front = self.front()
        chosen = chosen or front.most_accurate
        known = Details() if chosen is None else self._details_of(chosen)
        return study_figures(front, chosen=chosen, layers=known.layers, sensitivities=known.sensitivities)

    def report(self, chosen: Candidate | None = None, *, refresh: float | None = None) -> ReportFiles:
        """Write the report, the plots and all tables into :attr:`folder`.

        Args:
            chosen: The model to ship; by default the most accurate feasible one, if there is one.
            refresh: Make a page that reads itself again after so many seconds, while the study runs.
        """
        front = self.front()
        chosen = chosen or front.most_accurate
        return write_report(
            self.folder,
            title=self.name,
            front=front,
            chosen=chosen,
            details=None if chosen is None else self._details_of(chosen),
            settings={"task": self.task_name, **self.settings.to_dict(), **self._provenance()},
            refresh=refresh,
        )

    def trials_dataframe(self) -> pd.DataFrame:
        """Return one row a trial; see :func:`compress_search.reports.frames.trials_frame` for the columns.

        Accuracies and drops are as ``Task.evaluate`` gives them, ratios in (0, 1], times in seconds. What a
        trial does not have is missing.
        """
        return trials_frame(self.front())

    def layers_dataframe(self, trial: Candidate | int) -> pd.DataFrame:
        """Return one row a layer of the original model, and what became of it in a trial.

        Args:
            trial: A complete one, or its number.

        Returns:
            See :func:`compress_search.reports.frames.layers_frame` for the columns. MACs are for one example.

        Raises:
            StudyError: There is no such trial, it did not complete, or the study was loaded without its task.
            PlanError: Its plan is gone or damaged.
            WorkspaceError: Its weights are.
        """
        return layers_frame(self._layers_of(self._candidate_of(trial), self._needed_task("layers_dataframe")))

    def sensitivity_dataframe(self, trial: Candidate | int | None = None) -> pd.DataFrame:
        """Return the stored tables by which a trial's sizes were chosen, one row a cell; measure nothing.

        Args:
            trial: A trial, or its number; by default the most accurate feasible one.

        Returns:
            See :func:`compress_search.reports.frames.sensitivity_frame` for the columns. Losses are in nats
            per example, or drops of the score.

        Raises:
            StudyError: There is no such trial, or the study was loaded without its task.
            PlanError: A stage of it is gone or damaged.
            WorkspaceError: Its weights are.
        """
        candidate = self.best() if trial is None else self._candidate_of(trial)
        return sensitivity_frame(
            self._sensitivities_of(candidate, self._needed_task("sensitivity_dataframe"))
        )

    def export(self, candidate: Candidate, folder: Path | None = None) -> ExportFiles:
        """Write a candidate as files to ship; see :func:`compress_search.export.export_candidate`.

        Args:
            candidate: A complete candidate.
            folder: Where to; ``export/trial-N`` in :attr:`folder` by default.
        """
        example = None if self.task is None else self.task.example_input
        return export_candidate(candidate, folder or self._export_folder(candidate), example_input=example)

    def serve_dashboard(self, *, port: int = PORT, read_only: bool = False) -> None:
        """Serve the Optuna dashboard of the study to this machine, until Ctrl-C.

        It follows a study that is running, in another process: this call blocks. With its task, the tables
        of layers have their MACs.

        Args:
            port: A free port of 127.0.0.1; 0 takes any.
            read_only: Refuse everything but reading. Otherwise whoever reaches the port can change and
                delete studies.

        Raises:
            StudyError: The port is taken, or not allowed.
        """
        # It takes most of a second, and changes how Optuna's dashboard reads: not in every worker.
        from compress_search.search.dashboard import DashboardServer

        task = self.task
        load_task = None if task is None else lambda: task
        with DashboardServer(
            self.storage,
            self.name,
            workspace=self.workspace,
            port=port,
            read_only=read_only,
            load_task=load_task,
        ) as server:
            server.serve_until_interrupted()

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

        It is kept in ``latency/trial-N.json`` in :attr:`folder`, where :meth:`report` finds it; measuring
        again replaces it.

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

    def _agree_to_work(self) -> None:
        """Refuse to add anything in another workspace or with other versions than before."""
        asked = Asked(versions=current_versions(), workspace=self.workspace)
        agree(self.optuna_study, asked, accept=self._accept_changed)

    def _run(
        self,
        n_trials: int,
        *,
        timeout: float | None = None,
        stop_when: StopWhen | None = None,
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
            self.optuna_study,
            objective,
            n_trials=n_trials,
            timeout=timeout,
            is_enough=None if stop_when is None else self._is_enough(stop_when),
            progress=progress,
            stop=stop,
        )

    def _is_enough(self, stop_when: StopWhen) -> Callable[[Sequence[FrozenTrial]], bool]:
        """Make the question whether a study's trials are enough; it says why, once."""
        said: set[int] = set()

        def is_enough(trials: Sequence[FrozenTrial]) -> bool:
            met = stop_when.met_by(map(self._candidate, current_trials(trials)))
            if met is not None and not said:
                said.add(met.number)
                logger.info("%s", stop_when.outlook([met]))
            return met is not None

        return is_enough

    def _candidate(self, trial: FrozenTrial) -> Candidate:
        return candidate_of(trial, self.workspace, None if self.task is None else self.task.build_model)

    def _changes(self) -> tuple[Change, ...]:
        # Another process may have accepted more since this one opened the study.
        return load_identity(self.optuna_study).changes

    def _provenance(self) -> dict[str, str]:
        """What has changed since the study was made, by field, for the report."""
        said: dict[str, list[str]] = {}
        for change in self._changes():
            said.setdefault(f"changed: {change.field}", []).append(change.course)
        return {name: "; ".join(courses) for name, courses in said.items()}

    @cached_property
    def _test_key(self) -> str | None:
        """Hash of all that scores of tests depend on beside the candidate; ``None`` if that is not known."""
        if self.task is None or self.task.test is None:
            return None
        test, evaluate = data_fingerprint(self.task.test), function_identity(self.task.evaluate)
        return content_hash([test, model_fingerprint(self.task.build_model()), evaluate])

    def _stored_tests(self) -> dict[str, dict[str, float]]:
        """The scores of each key, the last that were measured at the end."""
        stored = self.optuna_study.user_attrs.get(_TESTS, {})
        # Earlier versions kept scores without a key: what those were measured on is not known.
        return {key: dict(scores) for key, scores in stored.items() if isinstance(scores, dict)}

    def _stored_test(self, candidate: Candidate) -> TestScore | None:
        stored, number = self._stored_tests(), str(candidate.number)
        last = next(reversed(stored), None)
        scores = stored.get(self._test_key or last or "", {})
        return TestScore(scores["original"], scores[number]) if number in scores else None

    def _stored_latency(self, candidate: Candidate) -> LatencyTable | None:
        file = self.latency_file(candidate)
        if not file.is_file():
            return None
        try:
            return LatencyTable.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            logger.warning(
                "The latency of trial %d cannot be read from %s: %r", candidate.number, file, error
            )
            return None

    def _candidate_of(self, trial: Candidate | int) -> Candidate:
        return self.candidate(trial if isinstance(trial, int) else trial.number)

    def _details_of(self, candidate: Candidate) -> Details:
        """Gather what is known of a candidate; where its files are gone or damaged, say so instead."""
        test, exported = self._stored_test(candidate), self._export_folder(candidate)
        known = Details(
            test=None if test is None else (test.original, test.candidate),
            latency=self._stored_latency(candidate),
            export_folder=exported if exported.is_dir() else None,
        )
        try:
            candidate.plan  # noqa: B018
            candidate.weights  # noqa: B018
            if self.task is None:
                return known
            layers = self._layers_of(candidate, self.task)
        except (PlanError, WorkspaceError) as error:
            return replace(known, fault=str(error))
        known = replace(known, layers=layers)
        try:
            return replace(known, sensitivities=self._sensitivities_of(candidate, self.task))
        except (PlanError, WorkspaceError) as error:
            # The model is whole; it is a stage on the way to it that is not.
            logger.warning("The sensitivity of trial %d is not known: %s", candidate.number, error)
            return known

    def _layers_of(self, candidate: Candidate, task: Task) -> tuple[LayerRow, ...]:
        original, example = task.build_with_example()
        compressed = candidate.load_model(original)
        return layer_table(
            candidate.plan, profile_model(original, example), profile_model(compressed, example)
        )

    def _sensitivities_of(self, candidate: Candidate, task: Task) -> tuple[StageSensitivity, ...]:
        recipe = self.optuna_study.get_trials(deepcopy=False)[candidate.number].user_attrs.get(RECIPE, [])
        tables = StageRunner(
            task, self.workspace, seed=self.settings.seed, device=self.device, progress=Progress()
        ).stored_tables(Recipe.from_dict(recipe), candidate.stages)
        return tuple(
            StageSensitivity(stage.method, LOSSES[stage.sensitivity], table) for stage, table in tables
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
