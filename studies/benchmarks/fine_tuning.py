"""What fine-tuning makes of networks that AIMET, Torch-Pruning and compress_search have compressed.

Launch it with ``python studies/benchmarks/fine_tuning.py``. The networks are those of
:mod:`benchmarks.ratio_selection`, all with the MACs that AIMET left of the guidebook's 0.75 x 0.66; what is
not there yet is compressed first. Each is trained on by the same code, for as many epochs, from the same
seeds, once on the labels alone and once taught by the original network too: what a tool's compression is
worth and what distillation is worth can be told apart. The thousand images that the network's own training
held out choose the epoch that is kept; the 10,000 test images are looked at afterwards.

People who compress by hand fine-tune between the two halves as well. AIMET's process keeps no network from
between its halves, so none is fine-tuned there, neither AIMET's nor ours.

The script can be stopped at any time: a fine-tuning whose result is there is not run again, and one that is
killed is begun anew. The table goes to ``runs/benchmarks``, as Markdown and as CSV.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from cifar10_networks import EXAMPLE
from image_data.images import Images
from image_data.in_memory import AugmentedBatches, whole_batches
from train_baseline import VALIDATION_IMAGES, trained

import compress_search
from benchmarks import ratio_selection
from benchmarks.cases import Case, Result
from benchmarks.environment import source_hash
from benchmarks.fine_tuning_table import Rows, as_csv, as_markdown
from benchmarks.ratio_selection import FOLDER, NETWORK
from benchmarks.running import Laboratory
from benchmarks.tunings import Tuned, Tuning, keep, stored
from compress_search import FineTune, Task
from compress_search.checkpoint import file_checksum
from compress_search.fingerprint import content_hash
from compress_search.progress import Progress
from compress_search.task import accuracy
from compress_search.training.fine_tuning import fine_tune
from compress_search.training.teacher_outputs import TeacherOutputs

RIVAL = "aimet-both-5000"
CASES = tuple(
    case
    for case in ratio_selection.CASES
    if RIVAL in (case.name, case.rival) or (case.steps == ratio_selection.BOTH and case.rival is None)
)
"""Those with AIMET's MACs, and ours that was asked for the same ratios as AIMET."""

USUAL = (RIVAL, f"ours-beside-{RIVAL}", f"torch-pruning-magnitude-batchnorm-beside-{RIVAL}")
"""The cases that are tuned by default. Of Torch-Pruning's the one that is best before fine-tuning."""


@dataclass(frozen=True)
class Bench:
    """The conditions that all fine-tunings have in common.

    Attributes:
        laboratory: Where the compressed networks are.
        settings: How to train; once so, and once without distillation.
        images: Number of training images at most.
        progress: Where to show it.
    """

    laboratory: Laboratory
    settings: FineTune
    images: int
    progress: Progress

    @property
    def folder(self) -> Path:
        """Where the results are kept."""
        return self.laboratory.folder / "fine_tuning"

    def tuning(self, case: Case, seed: int, *, distilled: bool) -> Tuning:
        """What is asked of a case, with the original network as teacher or with labels alone."""
        return Tuning(
            case=case.name,
            model_hash=file_checksum(self.laboratory.home(case) / "model.safetensors"),
            weights_hash=file_checksum(self.laboratory.weights(case.network)),
            settings=self.settings if distilled else replace(self.settings, distillation=0.0),
            images=self.images,
            threads=self.laboratory.threads,
            seed=seed,
            version=source_hash(Path(compress_search.__file__).parent / "training"),
        )

    def run(self, case: Case, result: Result, tuning: Tuning) -> Tuned:
        """Fine-tune the network of a case and judge it."""
        assert result.accuracy is not None and result.mac_ratio is not None
        train, _ = self.laboratory.data
        network = self.laboratory.compressed(case)
        teacher = trained(case.network, train)
        task = task_of(network, train, self.images)
        # All networks that are tuned from one seed see the same batches.
        lesson = content_hash([tuning.weights_hash, tuning.images, tuning.seed])
        start, cpu_start = time.perf_counter(), time.process_time()
        trained_on = fine_tune(
            network,
            teacher,
            task,
            tuning.settings,
            seed=tuning.seed,
            teacher_outputs=TeacherOutputs(self.folder / "teacher", lesson),
            progress=self.progress,
        )
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        return Tuned(
            mac_ratio=result.mac_ratio,
            original=result.original_accuracy,
            before=result.accuracy,
            after=accuracy(network, self.laboratory.test),
            validation=trained_on.accuracy,
            seconds=seconds,
            cpu_seconds=cpu_seconds,
        )


def task_of(network: nn.Module, train: Images, images: int) -> Task:
    """The task of training a network on: the images that it was trained on, and those held out of that."""
    last = len(train.labels) - VALIDATION_IMAGES
    seen, held_out = slice(min(images, last)), slice(last, None)
    return Task(
        name=NETWORK,
        model=network,
        example_input=EXAMPLE,
        train=AugmentedBatches(Images(train.pixels[seen], train.labels[seen])),
        validation=whole_batches(Images(train.pixels[held_out], train.labels[held_out])),
    )


def run(
    bench: Bench, cases: Sequence[Case], results: Mapping[str, Result], seeds: Sequence[int], *, table: bool
) -> Rows:
    """Run what is not there yet; return what there is.

    Seed after seed and teacher after teacher, so that whenever it is stopped, as many cases as can be have
    been run alike.

    Args:
        bench: The conditions.
        cases: What to tune.
        results: Of the compression, by name of case.
        seeds: To repeat it from.
        table: Run none.
    """
    usable = [case for case in cases if case.name in results and results[case.name].error is None]
    asked = [
        (case, bench.tuning(case, seed, distilled=distilled))
        for seed in seeds
        for distilled in (True, False)
        for case in usable
    ]
    rows = [(tuning, found) for _, tuning in asked if (found := stored(tuning, bench.folder)) is not None]
    if table:
        return rows
    done = [tuning for tuning, _ in rows]
    with bench.progress.bar("fine-tunings", len(asked), done=len(rows)) as advance:
        for case, tuning in asked:
            if tuning in done:
                continue
            tuned = bench.run(case, results[case.name], tuning)
            keep(tuning, tuned, bench.folder)
            rows.append((tuning, tuned))
            taught = "distilled" if tuning.distilled else "labels"
            advance(f"{case.name}, {taught}, seed {tuning.seed}: {tuned.before:.4f} to {tuned.after:.4f}")
    return rows


def add_conditions(parser: argparse.ArgumentParser) -> None:
    """Add the options that say under which conditions is trained, and where the results are."""
    parser.add_argument("--epochs", type=int, default=3, help="of every fine-tuning (default 3)")
    parser.add_argument("--lr", type=float, default=FineTune().lr, help=f"default {FineTune().lr:g}")
    parser.add_argument("--images", type=int, default=49_000, help="training images (default all, 49000)")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--table", action="store_true", help="run none, print what there is")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"default {FOLDER}")


def bench_of(given: argparse.Namespace) -> Bench:
    """Prepare process and folder, and make the bench, as the options of :func:`add_conditions` say."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(given.threads)
    given.folder.mkdir(parents=True, exist_ok=True)
    laboratory = Laboratory(given.folder, given.threads)
    return Bench(laboratory, settings_of(given.epochs, given.lr), given.images, Progress())


def settings_of(epochs: int, lr: float) -> FineTune:
    """How to train on this processor: as the network was trained. The judge calculates in float32."""
    quick = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")
    return FineTune(epochs=epochs, lr=lr, precision="bfloat16" if quick else "float32")


def main() -> None:
    """Compress and fine-tune what is not there; print the table and write it."""
    parser = argparse.ArgumentParser(description="Fine-tuning of networks that several tools compressed.")
    add_conditions(parser)
    parser.add_argument("--seeds", type=int, default=2, help="so many of each (default 2)")
    parser.add_argument("--only", help=f"the cases to tune, a pattern (default {', '.join(USUAL)})")
    given = parser.parse_args()
    usual = [case for case in CASES if case.name in USUAL]
    chosen = ratio_selection.asked(parser, CASES, given.only) if given.only else usual
    bench = bench_of(given)
    results: dict[str, Result] = {}
    for name in dict.fromkeys([RIVAL, *(case.name for case in chosen)]):
        results |= ratio_selection.run(
            bench.laboratory, only=name, again=False, table=given.table, long=False
        )
    rows = run(bench, chosen, results, range(given.seeds), table=given.table)
    text = as_markdown(rows, f"{NETWORK} on CIFAR-10, {given.epochs} epochs of fine-tuning, lr {given.lr:g}.")
    (given.folder / "fine_tuning.md").write_text(text)
    (given.folder / "fine_tuning.csv").write_text(as_csv(rows))
    print(text)


if __name__ == "__main__":
    main()
