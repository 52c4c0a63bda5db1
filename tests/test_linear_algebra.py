"""Cholesky factors of matrices that are positive definite, singular or slightly indefinite; eigenvectors."""

from __future__ import annotations

import pytest
import torch

from compress_search.linear_algebra import mean_energy, ridge_cholesky, top_eigenvectors


def test_the_factor_is_that_of_the_matrix_with_its_ridge():
    rows = torch.randn(2, 50, 4, dtype=torch.float64)
    gram, pull = rows.transpose(1, 2) @ rows, torch.full((2, 4), 0.5, dtype=torch.float64)
    factor = ridge_cholesky(gram, pull)
    torch.testing.assert_close(factor @ factor.transpose(1, 2), gram + torch.diag_embed(pull))


@pytest.mark.parametrize("rounding", [0.0, -1e-6])
def test_singular_and_slightly_indefinite_matrices_have_one_too(rounding):
    column = torch.ones(5, 1, dtype=torch.float64)
    gram = column @ column.T
    gram[0, 0] += rounding
    factor = ridge_cholesky(gram, torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(factor @ factor.T, gram, rtol=1e-4, atol=1e-4)


def test_a_matrix_that_is_not_finite_is_refused():
    with pytest.raises(AssertionError, match="never end"):
        ridge_cholesky(torch.full((2, 2), float("nan")), torch.zeros(2))


def test_mean_energy_is_the_mean_of_each_diagonal():
    gram = torch.diag_embed(torch.tensor([[1.0, 3.0], [5.0, 7.0]]))
    assert torch.equal(mean_energy(gram), torch.tensor([[2.0, 2.0], [6.0, 6.0]]))


@pytest.mark.parametrize("large", [1, 1024])
@pytest.mark.parametrize("number", [1, 4, 5, 9])
def test_the_largest_eigenvectors_come_first(number, large, monkeypatch):
    monkeypatch.setattr("compress_search.linear_algebra._LARGE", large)
    matrix = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    matrix = matrix + matrix.mT
    before = matrix.clone()
    values, vectors = top_eigenvectors(matrix, number)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(matrix).flip(-1)[..., :number])
    torch.testing.assert_close(matrix @ vectors, vectors * values[..., None, :])
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(number).double().expand(2, 3, -1, -1))
    assert torch.equal(matrix, before)
