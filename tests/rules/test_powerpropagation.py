import pytest
import torch

from lightning_sparse.rules.powerpropagation import power_, root, times_derivative_


@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
def test_the_root_is_the_inverse_and_the_derivative_is_autograds(power):
    v = torch.tensor([-2.0, -0.5, 0.25, 3.0], dtype=torch.float64, requires_grad=True)
    W = v * v.abs() ** (power - 1)
    (expected,) = torch.autograd.grad(W.sum(), v)
    torch.testing.assert_close(power_(v.detach().clone(), power), W.detach())
    torch.testing.assert_close(root(W.detach(), power), v.detach())
    torch.testing.assert_close(times_derivative_(torch.ones_like(v), v.detach(), power), expected)
