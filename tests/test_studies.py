"""The shipped studies: their configurations and presets, and the ImageNet ones on a tree of a few images."""

from __future__ import annotations

import importlib
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest

from compress_search.cli import main
from compress_search.config import StudyConfig
from compress_search.exceptions import TaskError

pytest.importorskip("torchvision", reason="the studies need compress-search[studies]")

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
CIFAR10 = ["cifar10_resnet20", "cifar10_resnet56", "cifar10_vgg16"]
IMAGENET = ["imagenet_resnet18", "imagenet_resnet50", "imagenet_mobilenet_v2"]


@pytest.fixture(autouse=True)
def _studies(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "studies")


@pytest.fixture
def tree(tmp_path):
    """Three classes of a few images in ImageNet's layout."""
    image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for split, images in (("train", 12), ("val", 2)):
        for label in ("cat", "dog", "owl"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for number in range(images):
                pixels = generator.integers(256, size=(40, 48, 3), dtype=np.uint8)
                image.fromarray(pixels).save(folder / f"{number}.jpg")
    return tmp_path / "images"


@pytest.fixture
def imagenet():
    return importlib.import_module("imagenet_task")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_launched_by_its_first_line(path):
    assert path.read_text().splitlines()[0] == f"# compress-search run configs/{path.name}"
    # Two configurations of the same task share its script.
    script = "digits" if path.stem.startswith("digits") else path.stem
    assert StudyConfig.load(path).task == f"{ROOT / 'studies' / script}.py:make_task"


@pytest.mark.parametrize("name", [*CIFAR10, *IMAGENET])
def test_presets_have_a_name_of_their_own_and_are_in_order(name):
    smoke, hour, full = (
        StudyConfig.load(ROOT / "configs" / f"{name}.yaml", preset=preset)
        for preset in ("smoke", "hour", "full")
    )
    assert len({config.name for config in (smoke, hour, full)}) == 3
    assert smoke.n_trials < hour.n_trials < full.n_trials
    assert smoke.task_args["images"] < hour.task_args["images"]
    assert full.task_args["images"] is None
    epochs = [c.search.fine_tune.epochs + c.search.final_fine_tune.epochs for c in (smoke, hour, full)]
    assert epochs == sorted(epochs)


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_studies_train_as_long_as_the_guidebook(name):
    search = StudyConfig.load(ROOT / "configs" / f"{name}.yaml", preset="full").search
    assert (search.fine_tune.epochs, search.final_fine_tune.epochs) == (15, 30)


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_studies_run_on_a_tree_of_images(name, tree, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IMAGENET", str(tree))
    settings = {
        "task_args.weights": "null",
        "task_args.image_size": 32,
        "task_args.held_out": 4,
        "task_args.batch": 8,
        "selection": "uniform",
        "samples": 4,
        "device": "cpu",
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    config = str(ROOT / "configs" / f"{name}.yaml")
    assert main(["run", config, "--preset", "smoke", *words]) == 0
    shown = capsys.readouterr().out
    assert "Chosen: trial 0" in shown
    assert (tmp_path / "runs" / f"{name.replace('_', '-')}-smoke" / "report.html").exists()


def test_held_out_images_are_neither_trained_on_nor_compressed_with(tree, imagenet):
    task = imagenet.imagenet_task(
        "resnet18", folder=tree, weights=None, held_out=6, batch=10, workers=0, image_size=32
    )
    train, calibration, validation = (
        set(loader.dataset.indices) for loader in (task.train, task.calibration, task.validation)
    )
    assert train == calibration
    assert len(train) == 30
    assert train | validation == set(range(36))
    assert len(task.test.dataset) == 6
    assert next(iter(task.train))[0].shape == (10, 3, 32, 32)
    assert task.build_model()(task.example_input).shape == (1, 3)


def test_a_tree_that_is_not_there_is_answered_with_the_remedy(tmp_path, imagenet):
    with pytest.raises(imagenet.DataError, match=r"train/<class>/<image>.*image-net\.org.*IMAGENET=FOLDER"):
        imagenet.imagenet_task("resnet18", folder=tmp_path)


def test_weights_of_imagenet_are_refused_for_other_classes(tree, imagenet):
    with pytest.raises(imagenet.DataError, match=r"3 classes.*IMAGENET1K_V1.*1000"):
        imagenet.imagenet_task("resnet18", folder=tree, held_out=4, batch=4, image_size=32)


def test_too_few_images_are_told(tree, imagenet):
    with pytest.raises(imagenet.DataError, match=r"36 images: too few to hold out 30"):
        imagenet.imagenet_task("resnet18", folder=tree, held_out=30, batch=10, weights=None)


def test_weights_that_cannot_be_downloaded(imagenet, monkeypatch):
    def unreachable(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(imagenet.models, "get_model", unreachable)
    with pytest.raises(TaskError, match=r"no route to host.*Fetch https://.*resnet18.*\.pth.*checkpoints"):
        imagenet.pretrained("resnet18", "IMAGENET1K_V1", 1_000)
    with pytest.raises(TaskError, match=r"no weights 'BEST'; it has IMAGENET1K_V1"):
        imagenet.pretrained("resnet18", "BEST", 1_000)


def test_an_unknown_preset_is_answered_with_those_there_are(capsys):
    assert main(["run", str(ROOT / "configs/cifar10_resnet20.yaml"), "--preset", "smok"]) == 2
    assert "no preset 'smok'. The file has: smoke, hour, full." in capsys.readouterr().err


def test_copied_study_comes_with_what_it_imports(tmp_path, capsys):
    assert main(["configs", "cp", "cifar10_resnet20", str(tmp_path)]) == 0
    copied = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.py")}
    assert copied >= {
        "studies/cifar10_resnet20.py",
        "studies/cifar10_task.py",
        "studies/train_baseline.py",
        "studies/image_data/__init__.py",
        "studies/image_data/cifar10.py",
        "studies/image_data/fetching.py",
    }
    assert "studies/digits.py" not in copied
