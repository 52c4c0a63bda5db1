"""The distillation loss against its formula and its limit."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from compress_search.training.distillation import are_logits, distillation_loss

LABELS = torch.tensor([0, 2, 1, 1])


def loss_of(outputs, taught, targets, *, temperature):
    logits = are_logits(outputs, targets, None)
    return distillation_loss(outputs, taught, logits=logits, temperature=temperature)


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.5, 1, 4])
def test_it_is_the_divergence_of_the_softened_distributions(temperature):
    student, teacher = logits(4, 3), logits(4, 3, seed=1)
    p, q = (functional.softmax(x / temperature, dim=1) for x in (teacher, student))
    expected = temperature**2 * (p * (p / q).log()).sum(dim=1).mean()
    loss = loss_of(student, teacher, LABELS, temperature=temperature)
    torch.testing.assert_close(loss, expected)


def test_hot_distributions_match_logits():
    # Hinton et al. (2015), section 2.1: for zero-mean logits the gradient tends to (z - v) / classes.
    student, teacher = (x - x.mean(dim=1, keepdim=True) for x in (logits(4, 3), logits(4, 3, seed=1)))
    loss = loss_of(student, teacher, LABELS, temperature=1e4)
    expected = (student - teacher).square().sum(dim=1).mean() / (2 * 3)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("targets", [LABELS, LABELS.double()])
def test_equal_outputs_cost_nothing(targets):
    outputs = logits(4, 3)
    assert loss_of(outputs, outputs.clone(), targets, temperature=3).abs() < 1e-12


def test_every_position_of_a_map_of_logits_counts_alike():
    student, teacher = logits(2, 3, 4, 5), logits(2, 3, 4, 5, seed=1)
    flat = [x.permute(0, 2, 3, 1).reshape(-1, 3) for x in (student, teacher)]
    of_map = loss_of(student, teacher, torch.zeros(2, 4, 5, dtype=torch.long), temperature=3)
    of_rows = loss_of(*flat, torch.zeros(40, dtype=torch.long), temperature=3)
    torch.testing.assert_close(of_map, of_rows)


@pytest.mark.parametrize(
    ("shape", "targets"),
    [
        ((4, 3), torch.zeros(4, 3, dtype=torch.float64)),
        ((4, 3), torch.zeros(4, 3, dtype=torch.long)),
        ((4, 1), torch.zeros(4, 1, dtype=torch.float64)),
        ((4,), torch.zeros(4, dtype=torch.long)),
        ((4, 3), torch.zeros(4, dtype=torch.float64)),
    ],
)
def test_outputs_that_are_no_logits_are_compared_as_they_are(shape, targets):
    student, teacher = logits(*shape), logits(*shape, seed=1)
    loss = loss_of(student, teacher, targets, temperature=3)
    torch.testing.assert_close(loss, (student - teacher).square().mean())
