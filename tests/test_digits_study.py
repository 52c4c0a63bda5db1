"""The digits study: its split, its network, its baseline, and its configuration."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from compress_search import load_study
from compress_search.checkpoint import save_weights
from compress_search.config import StudyConfig
from compress_search.exceptions import ModelError
from compress_search.fingerprint import model_fingerprint
from compress_search.profile import profile_model

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def digits():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("digits_study", ROOT / "studies" / "digits.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def baseline(digits, tmp_path_factory):
    """The weights, trained once for all tests."""
    path = tmp_path_factory.mktemp("baselines") / "deep" / "digits.safetensors"
    digits.make_task(str(path))
    return str(path)


@pytest.fixture
def task(digits, baseline):
    return digits.make_task(baseline)


def test_the_three_parts_share_no_image_and_each_digit_is_as_frequent_in_each(digits):
    parts = digits.split_digits()
    assert [len(part) for part in parts] == [600, 600, 597]
    # Each part's images at its row of the whole; the data have no image twice.
    rows = {tuple(image.flatten().tolist()) for part in parts for image, _ in part}
    assert len(rows) == 1797
    for part in parts:
        counts = part.tensors[1].bincount(minlength=10)
        assert counts.min() >= 57
        assert counts.max() <= 62


def test_the_split_is_fixed(digits):
    for first, again in zip(digits.split_digits(), digits.split_digits(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first.tensors, again.tensors, strict=True))


def test_loaders_yield_every_image_once(digits):
    train, _, _ = digits.split_digits()
    drawn = torch.cat([images for images, _ in digits.batches(train, batch=32, shuffle=True)])
    assert len(list(digits.batches(train, batch=32))) == 19
    assert torch.equal(drawn.flatten(1).unique(dim=0), train.tensors[0].flatten(1).unique(dim=0))


def test_the_network_has_what_a_first_study_must_have(digits):
    convolutions = [m for m in digits.residual_network().modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) >= 6
    assert any(layer.stride == (2, 2) and layer.kernel_size == (3, 3) for layer in convolutions)
    assert any(layer.kernel_size == (1, 1) for layer in convolutions)
    assert profile_model(digits.residual_network(), torch.zeros(1, 1, 8, 8)).uncounted == ()


def test_the_baseline_is_good_but_not_perfect(task):
    task.check(task.build_model(), torch.device("cpu"))
    assert 0.97 <= task.score(task.build_model()) < 1
    assert task.score(task.build_model(), task.test) >= 0.97


def test_the_baseline_is_trained_once_and_says_so(digits, baseline, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="compress_search")
    first, again = digits.make_task(baseline), digits.make_task(baseline)
    assert model_fingerprint(first.build_model()) == model_fingerprint(again.build_model())
    assert caplog.messages == []

    retrained = digits.make_task(str(tmp_path / "digits.safetensors"))
    assert caplog.messages[0].startswith("Training the digits network, once; its weights are kept in")
    assert model_fingerprint(retrained.build_model()) == model_fingerprint(first.build_model())


def test_a_baseline_of_another_network_is_refused(digits, tmp_path):
    path = tmp_path / "digits.safetensors"
    save_weights(nn.Linear(2, 2), path)
    with pytest.raises(ModelError, match=r"digits\.safetensors' do not fit Sequential"):
        digits.make_task(str(path))


def test_the_configuration_is_the_study_that_the_readme_promises():
    path = ROOT / "configs" / "digits.yaml"
    assert path.read_text().splitlines()[0] == "# compress-search run configs/digits.yaml"
    config = StudyConfig.load(path)
    assert config.task == f"{ROOT / 'studies' / 'digits.py'}:make_task"
    assert config.n_trials >= 12
    assert config.search.target == 0.5


def test_the_front_is_that_of_the_same_network():
    path = ROOT / "configs" / "digits_front.yaml"
    assert path.read_text().splitlines()[0] == "# compress-search run configs/digits_front.yaml"
    config, other = StudyConfig.load(path), StudyConfig.load(ROOT / "configs" / "digits.yaml")
    assert config.task == other.task
    assert config.search.target == (0.05, 0.5)
    assert config.stop_when.mac_ratio > config.search.target[0]


def test_the_configurations_task_is_the_scripts(baseline):
    path = ROOT / "configs" / "digits.yaml"
    config = StudyConfig.load(path, [f"task_args.baseline={baseline}"])
    task = config.load_task()
    assert task.name == "digits"
    assert profile_model(task.build_model(), task.example_input).macs == 828_736


@pytest.mark.slow
def test_the_script_runs_and_its_answer_can_be_recomputed(task, tmp_path):
    script = [sys.executable, str(ROOT / "studies" / "digits.py")]
    done = subprocess.run(script, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=600)
    assert "mac_ratio" in done.stdout
    assert (tmp_path / "runs" / "digits-script" / "report.html").is_file()

    study = load_study("digits-script", task, workspace=tmp_path / "runs")
    assert len(study.candidates()) == 12
    original = profile_model(task.build_model(), task.example_input)
    for candidate in study.front():
        model = candidate.load_model()
        assert task.score(model) == candidate.accuracy
        assert profile_model(model, task.example_input).mac_ratio(original) == candidate.mac_ratio
