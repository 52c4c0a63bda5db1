"""Everything stays on the device that was chosen, seen on GPUs that are pretended."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress_search import Compress, compress
from compress_search.memory_layout import can_train_channels_last
from compress_search.methods.coupling import find_coupling
from compress_search.progress import Progress
from compress_search.recipe import FineTune, Recipe
from compress_search.search.study import create_study, load_study
from compress_search.stages import StageRunner
from compress_search.training import teacher_outputs
from compress_search.training.checkpoints import CheckpointFolder
from compress_search.training.fine_tuning import fine_tune
from compress_search.training.precision import dtype_of
from compress_search.training.teacher_outputs import EpochOutputs
from compress_search.workspace import Workspace


def devices_of(model):
    return {str(tensor.device) for tensor in model.state_dict().values()}


def test_tensors_of_two_devices_are_not_mixed(gpus):
    """What the other tests lean on."""
    here, there = torch.ones(3), torch.ones(3, device="cuda:1")
    assert (2 * there.double()).sum().device == torch.device("cuda:1") == torch.zeros_like(there).device
    assert (there[torch.tensor([0, 2])] + torch.tensor(1.0)).cpu().numpy().tolist() == [2.0, 2.0]
    for mixing in (
        lambda: here + there,
        lambda: torch.cat([here, there]),
        lambda: there + here.to("cuda:0"),
        lambda: here[there > 0],
        lambda: here.add_(there),
        lambda: nn.Linear(3, 2)(there),
        lambda: torch.rand(3, device="cuda", generator=torch.Generator()),
    ):
        with pytest.raises(RuntimeError, match="is given"):
            mixing()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()


@pytest.mark.parametrize("method", ["spatial_svd", "weight_svd", "channel_pruning"])
def test_compressing_stays_on_the_models_device(method, tiny_net, gpus):
    model = tiny_net().eval().to("cuda:1")
    batches = [torch.randn(8, 1, 6, 6) for _ in range(4)]
    example = batches[0][:1].to("cuda:1")
    for given in (batches, []):
        smaller = compress(model, example, given, Compress(method=method, mac_ratio=0.6)).model
        assert devices_of(smaller) == {"cuda:1"} == {str(smaller(example).device)}


def test_a_trial_stays_on_the_device(tiny_task, tmp_path, gpus):
    tuning = FineTune(epochs=1, ema=0.9, distillation=0.5, label_smoothing=0.1, gradient_clip=1.0)
    task = tiny_task(loss=nn.CrossEntropyLoss(weight=torch.ones(3)))
    stage = Compress(method="spatial_svd", mac_ratio=0.7, samples=16, selection="uniform")
    for _ in range(2):
        runner = StageRunner(
            task, Workspace(tmp_path).prepare(), seed=0, device=torch.device("cuda:1"), progress=Progress()
        )
        results = runner.run(Recipe((stage, tuning)))
    assert [result.reused for result in results] == [True, True]
    assert devices_of(runner._stored_model(results[-1])) == {"cuda:1"}


def test_a_model_on_a_gpu_may_have_its_data_on_the_cpu(tiny_task, tiny_net, tmp_path, gpus):
    task = tiny_task(model=tiny_net().to("cuda:0"))
    arguments = {"workspace": tmp_path, "device": "cuda:1"}
    study = create_study("gpu", task, target=0.6, samples=16, fine_tune=FineTune(epochs=0), **arguments)
    study.optimize(1, progress=Progress())
    assert study.layers_dataframe(0)["macs_before"].gt(0).all()
    # What the network costs is measured anew where it is another one.
    other = tiny_task(model=tiny_net(seed=1).to("cuda:0"))
    load_study("gpu", other, accept_changed=True, **arguments)


def test_a_model_may_draw_from_a_gpu_that_has_another_number_of_neighbours(
    tiny_task, tiny_net, tmp_path, stop_at, pretended_gpus
):
    """A worker sees one GPU of several; who goes on with its trial may see all."""

    class Drawing(nn.Module):
        def forward(self, inputs):
            if self.training:
                drawn.append(torch.cuda.get_rng_state(inputs.device))
                torch.cuda.set_rng_state(drawn[-1] + 1, inputs.device)
            return inputs

    def train(*, gpus, folder=None, stop=None):
        settings = FineTune(epochs=2, distillation=0.0)
        checkpoints = None if folder is None else CheckpointFolder(folder, seconds=1e-9)
        with pretended_gpus(gpus):
            model = nn.Sequential(Drawing(), tiny_net()).to("cuda")
            more = {"progress": Progress(), "checkpoints": checkpoints, "stop": stop}
            fine_tune(model, None, tiny_task(), settings, seed=1, **more)

    drawn: list[torch.Tensor] = []
    train(gpus=1)
    undisturbed, drawn = drawn, []
    with pytest.raises(KeyboardInterrupt):
        train(gpus=4, folder=tmp_path, stop=stop_at(5))
    assert 4 < len(drawn) < 8
    train(gpus=1, folder=tmp_path)
    assert [state.tolist() for state in drawn] == [state.tolist() for state in undisturbed]


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_automatic_precision_is_what_the_gpu_itself_computes_in(capability, chosen, monkeypatch):
    """PyTorch emulates bfloat16 on older ones, and says that it is supported."""
    asked = torch.device("cuda:1")
    answers = {asked: capability, torch.device("cuda:0"): (6, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: answers[device])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert dtype_of("auto", asked) == chosen


def test_what_a_teacher_says_does_not_pile_up_on_the_gpu(tmp_path, gpus, monkeypatch):
    batches = [torch.randn(4, 3) for _ in range(5)]
    monkeypatch.setattr(teacher_outputs, "_ON_GPU_BYTES", 2 * batches[0].nbytes)

    def epoch(teacher):
        return EpochOutputs(teacher, tmp_path / "epoch", batches=len(batches), largest=2**20)

    asking = epoch(lambda batch: 2 * batch)
    for number, batch in enumerate(batches):
        asking.of(number, batch, [batch.to("cuda:1")])
        # Not each is fetched, which the GPU would have to wait for.
        waiting = [output for _, output in asking._asked if output.device.type == "cuda"]
        assert len(waiting) == (number + 1) % 3
    asking.keep()
    reading = epoch(None)
    for number, batch in enumerate(batches):
        (said,) = reading.of(number, batch, [batch.to("cuda:1")])
        assert said.device == torch.device("cuda:1")
        assert torch.equal(said.cpu(), 2 * batch)


def precision_of_products():
    """In which format GPUs convolve and multiply matrices."""
    return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision


@pytest.mark.parametrize("matrices", ["highest", "high"])
def test_models_are_compared_with_all_bits(tiny_net, matrices):
    """A GPU would round the factors of some shapes, but not of others."""
    model = tiny_net().eval()
    model[1].register_forward_hook(lambda *_: seen.append(precision_of_products()))
    torch.set_float32_matmul_precision(matrices)
    try:
        before = precision_of_products()
        for compare in (
            lambda: find_coupling(model, torch.randn(1, 1, 6, 6)),
            lambda: can_train_channels_last(model, torch.randn(1, 1, 6, 6)),
        ):
            seen = []
            compare()
            assert ("ieee", "ieee") in seen
            assert precision_of_products() == before
        assert torch.get_float32_matmul_precision() == matrices
    finally:
        torch.set_float32_matmul_precision("highest")
