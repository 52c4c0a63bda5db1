"""Passes that wait in the middle give what uninterrupted passes give, and leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from compress_search.activations import activation_bytes, pieces_within_memory
from compress_search.pausing import PausablePass, passes_keep_apart, pausing_after, pausing_before


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()


def test_a_pass_waits_before_a_layer_and_goes_on_with_its_new_weights():
    net, seen = _net(), []
    net.register_forward_hook(lambda module, inputs, output: seen.append(output))
    batches = [torch.randn(2, 3), torch.randn(5, 3)]
    with torch.no_grad():
        expected = [net[:2](batch) for batch in batches]
        passes = [PausablePass(net, batch) for batch in batches]
        with pausing_before(net[2]):
            given = [one.resume() for one in passes]
        assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
        assert not seen
        net[2].weight.fill_(1.0)
        assert [one.resume() for one in passes] == [None, None]
        assert all(torch.equal(a, net[2](b)) for a, b in zip(seen, expected, strict=True))


def test_a_pass_waits_after_a_layer_with_its_output():
    net, batch = _net(), torch.randn(2, 3)
    one = PausablePass(net, batch)
    with torch.no_grad(), pausing_after(net[0]):
        assert torch.equal(one.resume(), net[0](batch))
    one.drop()


def test_a_layer_run_outside_of_any_pass_does_not_wait():
    net, batch = _net(), torch.randn(2, 3)
    with torch.no_grad(), pausing_before(net[0]):
        assert torch.equal(net(batch), _net()(batch))


def test_what_a_model_raises_surfaces_as_it_is():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        PausablePass(_net(), torch.randn(2, 7)).resume()


@pytest.mark.parametrize("dropped", [False, True])
def test_a_pass_that_is_given_up_lets_go_of_its_activations(dropped):
    net, outputs = _net(), []
    net[0].register_forward_hook(
        lambda module, inputs, output: outputs.append(StorageWeakRef(output.untyped_storage()))
    )
    one = PausablePass(net, torch.randn(2, 3))
    with torch.no_grad(), pausing_after(net[0]):
        one.resume()
    assert [output.expired() for output in outputs] == [False]
    if dropped:
        one.drop()
    else:
        del one
    assert [output.expired() for output in outputs] == [True]


class _Block(nn.Module):
    """Runs its layers within a block that sets a state of the thread."""

    def __init__(self, block):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.block = block

    def forward(self, x):
        with self.block():
            return self.second(self.first(x))


@pytest.mark.parametrize(
    "block", [torch.enable_grad, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["gradients", "autocast"]
)
def test_the_state_of_the_thread_is_each_passes_own(block):
    net = _Block(block).eval()
    batches = [torch.randn(2, 3), torch.randn(2, 3)]
    with torch.no_grad():
        passes = [PausablePass(net, batch) for batch in batches]
        with pausing_before(net.second):
            for one in passes:
                one.resume()
                assert not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        for one in passes:
            assert one.resume() is None
            assert not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        assert passes_keep_apart(net, [net.first, net.second], batches)
    assert torch.is_grad_enabled()


def test_a_model_with_an_inference_mode_of_its_own_does_not_keep_apart():
    net = _Block(torch.inference_mode).eval()
    with torch.no_grad():
        assert not passes_keep_apart(net, [net.second], [torch.randn(2, 3), torch.randn(2, 3)])
    assert not torch.is_inference_mode_enabled()


class Remembering(nn.Module):
    """Leaves activations in itself, as U-Nets on hooks of their encoders do."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        self.kept = self.first(x)
        return self.second(torch.relu(self.kept)) + self.kept


def test_a_model_that_leaves_activations_in_itself_does_not_keep_apart():
    net = nn.Sequential(Remembering(), nn.Linear(3, 2)).eval()
    layers, examples = [net[0].first, net[0].second, net[1]], [torch.randn(1, 3), torch.randn(1, 3)]
    with torch.no_grad():
        assert not passes_keep_apart(net, layers, examples)
        assert passes_keep_apart(net, layers, examples[:1])
        assert passes_keep_apart(_net(), list(_net())[:0], examples)


def test_bytes_of_activations_are_those_still_needed():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 1), nn.Conv2d(4, 1, 1)).eval()
    example = torch.randn(1, 1, 10, 10)
    found = activation_bytes(net, ["0", "2", "3"], example)
    # 400 bytes a channel; the input is held throughout.
    assert found.before == {"0": 400, "2": 400 + 800, "3": 400 + 1600}
    assert found.after["2"] == 400 + 800 + 1600
    assert found.peak == 400 + 800 + 1600


def test_batches_are_cut_to_what_memory_allows(monkeypatch):
    monkeypatch.setattr("compress_search.activations._PASS_BYTES", 3000)
    batches = [torch.arange(7.0), torch.arange(2.0)]
    pieces = pieces_within_memory(batches, 1000)
    assert [[len(piece) for piece in batch] for batch in pieces] == [[3, 3, 1], [2]]
    assert all(torch.equal(torch.cat(cut), batch) for cut, batch in zip(pieces, batches, strict=True))
    assert [len(batch) for batch in pieces_within_memory(batches, 10**9)] == [7, 2]
