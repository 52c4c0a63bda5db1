"""The sensitivity of the output, against exact Jacobians and against what errors really do."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from compress_search.divergence import divergence_of
from compress_search.methods import output_sensitivity
from compress_search.methods.output_sensitivity import output_sensitivities


def _network(*, flat: bool) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 6, 3, groups=2), nn.ReLU(inplace=True), nn.Conv2d(6, 5, 2), nn.Tanh()]
    network = nn.Sequential(*layers, *([nn.Flatten(), nn.Linear(20, 3)] if flat else [nn.Conv2d(5, 3, 1)]))
    with torch.no_grad():
        network[-1].weight *= 3
    return network.eval()


def _images(number: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(number, 2, 5, 5, generator=generator).split(100))


def _exact(network: nn.Sequential, layer: int, images: torch.Tensor) -> torch.Tensor:
    """The diagonal blocks of the Gauss-Newton matrix, summed over positions, from the whole Jacobian."""
    rest, total = network[layer + 1 :], 0.0
    inner = network[: layer + 1](images).detach()
    scale = network(images).detach().square().sum()
    for one in inner:
        outputs = rest(one[None].clone()).detach().flatten()
        jacobian = torch.autograd.functional.jacobian(lambda x: rest(x[None].clone()).flatten(), one)
        jacobian = jacobian.reshape(len(outputs), len(one), -1).permute(2, 0, 1)
        if network[-1].weight.ndim == 2:
            share = outputs.softmax(0)
            curvature = (torch.diag(share) - torch.outer(share, share)) / (2 * len(images))
        else:
            curvature = torch.eye(len(outputs)) / scale
        total = total + (jacobian.mT @ curvature @ jacobian).sum(dim=0)
    return total.double()


@pytest.mark.parametrize("flat", [True, False], ids=["logits", "an image"])
def test_it_is_the_gauss_newton_matrix_of_each_position(flat, monkeypatch):
    monkeypatch.setattr(output_sensitivity, "_EXAMPLES", 10**6)
    network, images = _network(flat=flat), _images(200)
    found = output_sensitivities(network, ["0", "2"], images * 40)
    for name, moments in found.items():
        exact = _exact(network, int(name), torch.cat(images))
        width = moments.shape[-1]
        for group, moment in enumerate(moments):
            own = slice(group * width, (group + 1) * width)
            assert float((moment - exact[own, own]).norm() / exact[own, own].norm()) < 0.03
    assert found["0"].shape == (2, 3, 3)
    assert found["2"].shape == (1, 5, 5)


@pytest.mark.parametrize("flat", [True, False], ids=["logits", "an image"])
def test_it_foretells_the_divergence_that_independent_errors_cause(flat, monkeypatch):
    monkeypatch.setattr(output_sensitivity, "_EXAMPLES", 10**6)
    network, images = _network(flat=flat), _images(2000)
    sensitivity = output_sensitivities(network, ["2"], images)["2"][0]
    mixing = 0.02 * torch.randn(5, 5, generator=torch.Generator().manual_seed(2))
    foretold = float((mixing @ mixing.T * sensitivity).sum())
    noise = torch.Generator().manual_seed(3)

    def disturb(module, inputs, output):
        return output + torch.einsum("cd,ndhw->nchw", mixing, torch.randn(output.shape, generator=noise))

    wanted = network(torch.cat(images)).detach()
    hook = network[2].register_forward_hook(disturb)
    found = divergence_of(network(torch.cat(images)).detach(), wanted).mean
    hook.remove()
    assert foretold == pytest.approx(found, rel=0.05)


def test_what_the_output_does_not_hear_does_not_matter():
    network = _network(flat=True)
    with torch.no_grad():
        network[2].weight[:, 4] = 0.0
    sensitivity = output_sensitivities(network, ["0"], _images(100))["0"]
    assert not sensitivity[1, 1].any() and not sensitivity[1, :, 1].any()
    assert sensitivity[0].diagonal().min() > 0


def test_the_same_seed_gives_the_same_and_the_model_is_left_as_it_was(monkeypatch):
    network, images = _network(flat=True).train(), _images(50)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    once, twice = (output_sensitivities(network, ["0", "2"], images, seed=7) for _ in range(2))
    assert all(torch.equal(once[name], twice[name]) for name in once)
    monkeypatch.setattr(output_sensitivity, "_GRAPH_ELEMENTS", 1)
    alone = output_sensitivities(network, ["0", "2"], images, seed=7)
    for name in once:
        torch.testing.assert_close(alone[name], once[name], rtol=1e-4, atol=1e-9)
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not network[0]._forward_hooks


def test_no_more_examples_are_looked_at_than_say_something(monkeypatch):
    monkeypatch.setattr(output_sensitivity, "_EXAMPLES", 130)
    network, images = _network(flat=True), _images(300)
    some = output_sensitivities(network, ["2"], images)
    monkeypatch.setattr(output_sensitivity, "_EXAMPLES", 10**6)
    first = torch.cat(images)[:130]
    torch.testing.assert_close(some, output_sensitivities(network, ["2"], list(first.split(100))))


class _WithoutGradients(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.layer(inputs)


def test_a_model_without_gradients_has_no_sensitivities_and_says_so(caplog):
    with caplog.at_level(logging.WARNING, logger="compress_search"):
        assert output_sensitivities(_WithoutGradients(), ["layer"], [torch.randn(5, 4)]) == {}
    assert "no gradients" in caplog.text


def test_half_precision_has_none():
    assert output_sensitivities(_network(flat=True).bfloat16(), ["0"], [torch.randn(5, 2, 5, 5)]) == {}
