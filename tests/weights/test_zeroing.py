"""Weights that are zeroed together are those that are zeroed one by one, to the last bit."""

import copy

import pytest
import torch
from torch import nn

from lightning_sparse.rules import select
from lightning_sparse.weights import zeroing
from lightning_sparse.weights.masked import MaskedWeight
from lightning_sparse.weights.zeroing import Zeroing


def weights(dtypes=(torch.float32, torch.bfloat16, torch.float64)):
    generator = torch.Generator().manual_seed(0)
    found = []
    for dtype in dtypes:
        for shape, layout in {
            (5, 7): torch.contiguous_format,
            (4, 3, 3, 2): torch.channels_last,
            (0, 3): torch.contiguous_format,
            (9,): torch.contiguous_format,
        }.items():
            values = torch.randn(shape, generator=generator).to(dtype, memory_format=layout)
            parameter = nn.Parameter(values)
            parameter.grad = torch.randn(shape, generator=generator).to(dtype, memory_format=layout)
            mask = (torch.rand(shape, generator=generator) < 0.4).to(memory_format=layout)
            found.append(MaskedWeight(f"{dtype} {shape}", mask, parameter))
    return found


def spoilt(found):
    """Values that no product with 0 would make 0."""
    for weight in found:
        for x in (weight.W, weight.dP):
            flat = x.view(-1) if x.is_contiguous() else x.permute(0, 2, 3, 1).reshape(-1)
            flat[::3] = float("nan")
            flat[1::3] = -float("inf")
    return found


@pytest.mark.parametrize("kernels", ["torch", "fused"])
@pytest.mark.parametrize("chunk", [16, select.CHUNK])
def test_all_are_zeroed_as_each_is_by_itself(chunk, kernels, monkeypatch):
    monkeypatch.setenv("LIGHTNING_SPARSE_KERNELS", kernels)
    monkeypatch.setattr(zeroing, "CHUNK", chunk)
    together = spoilt(weights())
    alone = spoilt(weights())
    them = Zeroing()
    for _ in range(2):  # laid out, and found again
        them.keep_zero_gradients(together)
        them.keep_zeros(together)
        for weight in alone:
            weight.keep_zero_gradients()
            weight.keep_zeros()
        for ours, theirs in zip(together, alone, strict=True):
            assert torch.equal(ours.W.isnan(), theirs.W.isnan())
            assert torch.equal(ours.W.nan_to_num(), theirs.W.nan_to_num())
            assert torch.equal(ours.dP.nan_to_num(), theirs.dP.nan_to_num())
            assert not ours.W[~ours.mask].any()
            assert not ours.dP[~ours.mask].any()


def test_masks_that_move_parameters_that_move_and_gradients_that_are_missing_are_noticed():
    found, them = weights([torch.float32]), Zeroing()
    them.keep_zeros(found)
    found[0].mask = ~found[0].mask
    found[1].parameter.data = found[1].W.clone().fill_(2)
    for weight in found:
        weight.W.fill_(1)
    them.keep_zeros(found)
    assert all(torch.equal(weight.W, weight.mask.float()) for weight in found)
    some = found[:1]
    for _ in range(3):
        them.keep_zero_gradients(some)
        them.keep_zeros(found)
    assert not some[0].dP[~some[0].mask].any()
    assert found[1].dP[~found[1].mask].any()


def test_a_gradient_of_another_dtype_keeps_its_dtype():
    found = weights([torch.float32])
    found[0].parameter.grad = None
    other = torch.full((5, 7), 1e-300, dtype=torch.float64)  # 0 in float32
    found[0].parameter = type("Parameter", (), {"data": found[0].W, "grad": other, "data_ptr": found[0].W.data_ptr})()
    Zeroing().keep_zero_gradients(found)
    assert torch.equal(other != 0, found[0].mask)


def test_copies_come_without_weights():
    them = Zeroing()
    them.keep_zeros(weights())
    assert them._laid
    assert not copy.deepcopy(them)._laid
