"""Runs cases, each in a process of its own, and keeps what came of them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from image_data.cifar10 import load_cifar10
from image_data.images import Images
from image_data.in_memory import normalised, whole_batches
from safetensors.torch import load_file, save_file
from torch import nn
from train_baseline import trained, weights_of

from benchmarks.cases import Case, Effort, Request, Result, read_result
from benchmarks.environment import python_of, version_of
from benchmarks.judge import Batches, RebuildError, measured, rebuilt
from benchmarks.networks import PEER_NETWORKS, Add
from compress_search.checkpoint import file_checksum
from compress_search.workspace import write_bytes_atomically

STUDIES = Path(__file__).parents[1]
EVALUATION_IMAGES = 500
CALIBRATION_IMAGES = 5_000
IMAGES = "images.safetensors"


@dataclass(frozen=True)
class Laboratory:
    """One folder of cases, run under equal conditions.

    Attributes:
        folder: Where everything of them lies.
        threads: How many threads each process may use.
    """

    folder: Path
    threads: int

    def request(self, case: Case, rivals: Sequence[Result]) -> Request | None:
        """What a case's process is to be told; ``None`` while its rival has no result to be held against."""
        budget = None
        if case.rival is not None:
            budget = next((result.macs for result in rivals if result.case == case.rival), None)
            if budget is None:
                return None
        checksum = file_checksum(self.weights(case.network))
        return Request(case, checksum, self.threads, budget, version_of(case.tool))

    def stored(self, case: Case, rivals: Sequence[Result]) -> Result | None:
        """The result of a case that was run under these conditions."""
        request = self.request(case, rivals)
        return None if request is None else read_result(self.home(case), request)

    def run(self, request: Request) -> Result:
        """Run a case and keep what comes of it, faults included."""
        case, home = request.case, self.home(request.case)
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        (home / "request.json").write_text(request.to_json())
        error = self._compress(request)
        accuracy, macs = self._original(case.network)
        result = Result(case.name, None, None, accuracy, macs, None, error)
        if error is None:
            try:
                result = self._judged(result, case)
            except RebuildError as fault:
                result = dataclasses.replace(result, error=str(fault))
        write_bytes_atomically(home / "result.json", result.to_json().encode())
        return result

    def weights(self, network: str) -> Path:
        """The file of a network's weights; it is trained if there is none."""
        weights = weights_of(network).absolute()
        if not weights.exists():
            trained(network, self.data[0])
        return weights

    def compressed(self, case: Case) -> nn.Module:
        """Build the network that came of a case.

        Raises:
            RebuildError: It is not what the tool had.
        """
        return rebuilt(case.network, self.home(case), load_file(self._images())["inputs"])

    def home(self, case: Case) -> Path:
        """The folder of a case."""
        return self.folder.absolute() / case.network / case.name

    def _compress(self, request: Request) -> str | None:
        """Run the tool; return the last line of its fault, if there was one."""
        case, home = request.case, self.home(request.case)
        python = python_of(case.tool, self.folder / "environments")
        command = [python, "-m", f"benchmarks.{case.tool}_peer", self.weights(case.network), self._images()]
        pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        variables = dict.fromkeys(pools, str(request.threads)) | {
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONPATH": str(STUDIES),
        }
        with (home / "log.txt").open("w") as log:
            done = subprocess.run(
                [str(word) for word in command], cwd=home, env=os.environ | variables, stdout=log, stderr=log
            )
        if done.returncode == 0:
            return None
        lines = (home / "log.txt").read_text().strip().splitlines()
        return lines[-1] if lines else f"It ended with status {done.returncode} and said nothing."

    def _judged(self, result: Result, case: Case) -> Result:
        accuracy, macs = measured(self.compressed(case), self.test)
        effort = Effort(**json.loads((self.home(case) / "effort.json").read_text()))
        return dataclasses.replace(result, accuracy=accuracy, macs=macs, effort=effort)

    def _original(self, network: str) -> tuple[float, int]:
        model = PEER_NETWORKS[network](Add)
        model.load_state_dict(load_file(self.weights(network)))
        return measured(model, self.test)

    def _images(self) -> Path:
        """What the tools may look at, as a file."""
        path = self.folder.absolute() / IMAGES
        if not path.exists():
            train = self.data[0]
            tensors = {
                "calibration": normalised(train.pixels[:CALIBRATION_IMAGES]),
                "inputs": normalised(train.pixels[-EVALUATION_IMAGES:]),
                "labels": train.labels[-EVALUATION_IMAGES:].long(),
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        return path

    @cached_property
    def test(self) -> Batches:
        """All test images."""
        return whole_batches(self.data[1])

    @cached_property
    def data(self) -> tuple[Images, Images]:
        """The training and the test images."""
        return load_cifar10()
