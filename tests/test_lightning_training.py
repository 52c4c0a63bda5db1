"""The example of a training function of the user's own: by Lightning, killed and resumed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from compress_search.progress import Progress
from compress_search.recipe import FineTune
from compress_search.stopping import StopSwitch
from compress_search.training.trainer import Trainer
from compress_search.workspace import Workspace

STUDIES = Path(__file__).parents[1] / "studies"

pytest.importorskip("lightning", reason="Lightning is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def train(tiny_task, tiny_net, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(STUDIES))
    from lightning_training import train_with_lightning

    # Lightning takes a list of batches for a list of loaders.
    loader = DataLoader(tiny_task().train.dataset, batch_size=16)

    def run(workspace, *, training=train_with_lightning, stop=None, device="cpu"):
        task = tiny_task(train=loader, training=training)
        trainer = Trainer(task, Workspace(tmp_path / workspace), Progress(), 60.0, stop or StopSwitch())
        model, original = tiny_net().to(device), tiny_net(seed=1).to(device)
        settings = FineTune(epochs=4, lr=5e-3)
        trained = trainer.train(model, original, settings, "0123456789abcdef", "fedcba")
        return model, trained, task

    yield run
    sys.modules.pop("lightning_training", None)


def test_it_learns(train, tiny_net):
    model, trained, task = train("whole")
    assert trained.accuracy == task.score(model) > task.score(tiny_net())
    assert len(trained.learning_curve) == 1 + 4
    assert trained.learning_curve[0] == task.score(tiny_net())
    assert trained.learning_curve[-1] == trained.accuracy


def test_stopped_at_the_end_of_an_epoch_it_goes_on_there(train, stop_at):
    whole, undisturbed, _ = train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("stopped", stop=stop_at(7))
    model, resumed, _ = train("stopped")
    assert resumed.learning_curve == pytest.approx(undisturbed.learning_curve)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)


def test_on_a_gpu_it_trains_there_and_leaves_the_model_there(train, tmp_path, monkeypatch, gpus):
    """Lightning does not know of pretended GPUs; it moves every model to the CPU when it has trained it."""
    import lightning

    class OnTheCpuInTheEnd:
        def __init__(self, *, accelerator, devices, **_):
            asked.append((accelerator, devices))

        def fit(self, student, *_, **__):
            student.cpu()

    asked = []
    monkeypatch.setattr(lightning, "Trainer", OnTheCpuInTheEnd)
    model, *_ = train("gpu", device="cuda:1")
    assert asked == [("gpu", [1])]
    assert {str(parameter.device) for parameter in model.parameters()} == {"cuda:1"}
