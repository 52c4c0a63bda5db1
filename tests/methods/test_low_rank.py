"""Truncated factorisation, against Eckart and Young and against brute force."""

from __future__ import annotations

import pytest
import torch

from compress_search.methods.low_rank import factorise


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


def test_full_rank_is_exact_even_where_the_data_has_directions_missing():
    matrix, gram = torch.randn(8, 12, dtype=torch.float64), torch.zeros(8, 8, dtype=torch.float64)
    gram[:3, :3] = _gram(3, 50)
    factors = factorise(matrix, gram)
    torch.testing.assert_close(factors.left @ factors.right, matrix, rtol=1e-8, atol=1e-8)


def test_both_factors_share_the_scale():
    factors = factorise(torch.randn(6, 9, dtype=torch.float64))
    torch.testing.assert_close(factors.left.norm(dim=0), factors.right.norm(dim=1))
