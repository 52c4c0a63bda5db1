"""Truncated factorisation, against Eckart and Young and against brute force."""

from __future__ import annotations

import pytest
import torch

from compress_search.methods.low_rank import _EQUAL_SHARE, _RIDGE, factorise
from compress_search.sampled_rows import SampledRows


def _gram(p: int, rows: int) -> torch.Tensor:
    x = torch.randn(rows, p, dtype=torch.float64) * torch.logspace(0, 2, p, dtype=torch.float64)
    return x.T @ x / rows


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_plain_truncation_error_is_the_tail_of_the_singular_values(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    factors = factorise(matrix)
    singular = torch.linalg.svdvals(matrix)
    for rank in range(1, min(shape) + 1):
        kept = factors.truncated(rank)
        error = (matrix - kept.left @ kept.right).square().sum()
        torch.testing.assert_close(error, singular[rank:].square().sum(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_weighted_truncation_error_is_the_energy_left_out(shape):
    matrix, gram = torch.randn(shape, dtype=torch.float64), _gram(shape[0], 200)
    ridged = gram + 1e-6 * gram.diagonal().mean() * torch.eye(shape[0], dtype=torch.float64)
    factors = factorise(matrix, gram)
    for rank in range(1, min(shape)):
        kept = factors.truncated(rank)
        difference = matrix - kept.left @ kept.right
        error = torch.trace(difference.T @ ridged @ difference)
        torch.testing.assert_close(error, factors.energy[rank:].sum(), rtol=1e-7, atol=1e-9)


def test_weighting_beats_plain_truncation_on_the_data():
    matrix, gram = torch.randn(8, 8, dtype=torch.float64), _gram(8, 200)

    def output_error(factors):
        difference = matrix - factors.left @ factors.right
        return float(torch.trace(difference.T @ gram @ difference))

    for rank in range(1, 8):
        weighted, plain = factorise(matrix, gram).truncated(rank), factorise(matrix).truncated(rank)
        assert output_error(weighted) < output_error(plain)


@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("rows", [4, 12])
@pytest.mark.parametrize("with_gram", [True, False])
def test_truncation_is_the_best_for_inputs_and_outputs_together(rows, taps, with_gram):
    channels = 3
    matrix = torch.randn(rows, channels * taps, dtype=torch.float64)
    gram, sensitivity = _gram(rows, 200), 1e-9 * _gram(channels, 50)
    inputs = torch.eye(rows, dtype=torch.float64)
    if with_gram:
        inputs = gram + _RIDGE * gram.diagonal().mean() * inputs
    outputs = sensitivity / sensitivity.diagonal().mean() + _EQUAL_SHARE * torch.eye(channels)
    outputs = torch.kron(outputs, torch.eye(taps))
    singular = torch.linalg.svdvals(torch.linalg.cholesky(inputs).T @ matrix @ torch.linalg.cholesky(outputs))
    factors = factorise(matrix, gram if with_gram else None, sensitivity)
    for rank in range(1, min(matrix.shape) + 1):
        kept = factors.truncated(rank)
        difference = matrix - kept.left @ kept.right
        error = torch.trace(inputs @ difference @ outputs @ difference.T)
        torch.testing.assert_close(error, singular[rank:].square().sum(), rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(error, factors.energy[rank:].sum(), rtol=1e-7, atol=1e-7)


def test_sensitivity_works_in_each_group_by_itself():
    matrix = torch.randn(2, 5, 6, dtype=torch.float64)
    gram, sensitivity = (torch.stack([_gram(size, 50) for _ in range(2)]) for size in (5, 3))
    together = factorise(matrix, gram, sensitivity)
    for group in range(2):
        alone = factorise(matrix[group], gram[group], sensitivity[group])
        kept, apart = together.truncated(2), alone.truncated(2)
        torch.testing.assert_close((kept.left @ kept.right)[group], apart.left @ apart.right)


def test_outputs_that_nothing_hears_are_given_up_first():
    matrix = torch.diag(torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64))
    sensitivity = torch.diag(torch.tensor([0.0, 1.0, 9.0], dtype=torch.float64))
    kept = factorise(matrix, None, sensitivity).truncated(2)
    torch.testing.assert_close(kept.left @ kept.right, torch.diag(torch.tensor([0.0, 2, 1]).double()))


def test_where_nothing_is_known_to_matter_all_outputs_matter_alike():
    matrix, gram = torch.randn(6, 6, dtype=torch.float64), _gram(6, 100)
    kept, plain = (factorise(matrix, gram, s).truncated(3) for s in (torch.zeros(6, 6).double(), None))
    torch.testing.assert_close(kept.left @ kept.right, plain.left @ plain.right)


def test_full_rank_is_exact_even_where_the_data_has_directions_missing():
    matrix, gram = torch.randn(8, 12, dtype=torch.float64), torch.zeros(8, 8, dtype=torch.float64)
    gram[:3, :3] = _gram(3, 50)
    factors = factorise(matrix, gram)
    torch.testing.assert_close(factors.left @ factors.right, matrix, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
@pytest.mark.parametrize("heard", [0, 3])
def test_inputs_that_a_layer_does_not_hear_give_components_that_are_nothing(shape, heard):
    matrix = torch.randn(*shape, dtype=torch.float64)
    matrix[heard:] = 0.0
    factors = factorise(matrix, 1e-3 * torch.eye(shape[0], dtype=torch.float64))
    torch.testing.assert_close(factors.left @ factors.right, matrix, rtol=1e-8, atol=1e-8)


def test_both_factors_share_the_scale():
    factors = factorise(torch.randn(6, 9, dtype=torch.float64))
    torch.testing.assert_close(factors.left.norm(dim=0), factors.right.norm(dim=1))


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize("large", [2, 1024])
def test_few_components_are_the_first_of_all(shape, large, monkeypatch):
    monkeypatch.setattr("compress_search.linear_algebra._LARGE", large)
    matrix = torch.randn(shape, dtype=torch.float64)
    gram, sensitivity = _gram(shape[0], 50), _gram(shape[1] // 3, 50)
    everything = factorise(matrix, gram, sensitivity)
    some = factorise(matrix, gram, sensitivity, rank=3)
    assert some.rank == 3
    expected = everything.truncated(3)
    torch.testing.assert_close(some.left @ some.right, expected.left @ expected.right)
    torch.testing.assert_close(some.energy, expected.energy)
    for rank in (1, 2, 3):
        assert some.error(rank) == pytest.approx(everything.error(rank), rel=1e-6)
        left_out = everything.energy[rank:].sum() / everything.energy.sum()
        assert everything.error(rank) == pytest.approx(float(left_out), rel=1e-6)


@pytest.mark.parametrize("rows", [4, 40])
def test_rows_do_what_their_gram_matrix_does(rows):
    groups, p, q = 2, 12, 6
    matrix = torch.randn(groups, p, q)
    values = torch.randn(groups, rows, p) * torch.logspace(0, 1, p)
    gram = values.double().mT @ values.double() / rows
    sensitivity = torch.stack([_gram(3, 50) for _ in range(groups)])
    expected = factorise(matrix, gram, sensitivity)
    found = factorise(matrix, SampledRows(values), sensitivity)
    torch.testing.assert_close(found.energy, expected.energy, rtol=1e-6, atol=0)
    for rank in (1, 3, 6):
        kept, wanted = found.truncated(rank), expected.truncated(rank)
        torch.testing.assert_close(kept.left @ kept.right, wanted.left @ wanted.right, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.left @ found.right, matrix.double(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("weighed_by", ["nothing", "gram", "rows"])
def test_a_matrix_in_pieces_is_the_matrix(weighed_by, monkeypatch):
    matrix, values = torch.randn(1, 11, 4), torch.randn(1, 7, 11)
    gram = {"nothing": None, "gram": values.double().mT @ values.double() / 7, "rows": SampledRows(values)}
    whole = factorise(matrix, gram[weighed_by])
    monkeypatch.setattr("compress_search.methods.low_rank._ELEMENTS_AT_A_TIME", 13)
    pieces = factorise(matrix, gram[weighed_by])
    torch.testing.assert_close(pieces.energy, whole.energy)
    kept, wanted = pieces.truncated(2), whole.truncated(2)
    torch.testing.assert_close(kept.left @ kept.right, wanted.left @ wanted.right)
