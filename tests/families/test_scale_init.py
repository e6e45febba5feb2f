"""How a fit begins: weights of a network made anew are scaled to the connections that are left."""

import copy
import logging

import pytest
import torch
from helpers import MASKED, TOP_K, Lit, cnn, fit, seeded
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lightning_sparse import GMP, SET, TopKAST
from lightning_sparse.layers.sparse import make_sparse_
from lightning_sparse.weights.masked import MaskedWeight
from lightning_sparse.weights.sparse import SparseWeight


def still(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


SPARSE_FROM_THE_START = sorted(MASKED.keys() - {"GMP", "FixedMask", "OneShot"})


@pytest.mark.parametrize("net", [None, cnn], ids=["mlp", "cnn"])
@pytest.mark.parametrize("method", SPARSE_FROM_THE_START)
def test_each_neuron_is_scaled_to_its_actual_fan_in(method, net):
    callback = MASKED[method](**({"initial_sparsity": 0.8} if method == "GraNet" else {}))
    module = seeded(lambda: Lit(None if net is None else net(), optimizer=still))
    before = copy.deepcopy(module.state_dict())
    fit(callback, module, limit_train_batches=1, max_epochs=1)
    for name, mask in callback.masks.items():
        W, active = module.get_parameter(name).detach(), mask.flatten(1).sum(1)
        for row in range(len(W)):
            factor = (mask[row].numel() / max(1, int(active[row]))) ** 0.5
            # DeepR decays and shakes by the learning rate, which is 0
            assert torch.allclose(W[row], before[name][row] * mask[row] * factor, rtol=1e-5), name


@pytest.mark.parametrize("method", [*SPARSE_FROM_THE_START, "TopKAST", "SWAT"])
def test_unscaled_starts_keep_the_values(method):
    callback = {**MASKED, **TOP_K}[method](scale_init=False)
    module = seeded(lambda: Lit(optimizer=still))
    before = copy.deepcopy(module.state_dict())
    fit(callback, module, limit_train_batches=1, max_epochs=1)
    for name, mask in callback.masks.items():
        assert torch.equal(module.get_parameter(name), before[name] * mask)


@pytest.mark.parametrize("power", [1, 2.5])
def test_a_layer_of_top_weights_is_scaled_as_a_whole(power):
    callback = TopKAST(0.8, 0.5, power=power, l2=0)
    module = seeded(lambda: Lit(optimizer=still))
    before = copy.deepcopy(module.state_dict())
    fit(callback, module, limit_train_batches=1, max_epochs=1)
    for name, mask in callback.masks.items():
        factor = (mask.numel() / int(mask.sum())) ** 0.5
        largest = before[name].abs().flatten().topk(int(mask.sum())).values.min()
        assert torch.equal(mask, before[name].abs() >= largest)
        assert torch.allclose(module.get_parameter(name), before[name] * mask * factor, rtol=1e-5)


def test_a_method_that_begins_dense_scales_nothing():
    callback = GMP(0.8)
    module = seeded(lambda: Lit(optimizer=still))
    before = copy.deepcopy(module.state_dict())
    fit(callback, module, max_epochs=-1, max_steps=0)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_masked_and_sparse_storage_start_alike():
    modules = []
    for storage in ("masked", "sparse"):
        callback = SET(0.8, storage=storage)
        module = seeded(lambda: Lit(optimizer=still))
        fit(callback, module, limit_train_batches=1, max_epochs=1)
        modules.append(module.state_dict())
    masked, sparse = modules
    assert masked.keys() == sparse.keys()
    assert all(torch.allclose(value, sparse[name], rtol=1e-6) for name, value in masked.items())


@pytest.mark.parametrize("method", ["SNIP", "SynFlow", "TopKAST", "SWAT"])
def test_weights_that_look_trained_are_not_scaled_and_the_log_says_so(method, caplog):
    callback = {**MASKED, **TOP_K}[method]()
    module = seeded(lambda: Lit(nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 4)), optimizer=still))
    with torch.no_grad():
        module.net[0].weight[:, ::3] = 0  # as pruning leaves them
        module.net[0].weight[::2, 1::3] = 0
    before = copy.deepcopy(module.state_dict())
    with caplog.at_level(logging.INFO):
        fit(callback, module, limit_train_batches=1, max_epochs=1)
    mask = callback.masks["net.0.weight"]
    assert torch.equal(module.net[0].weight, before["net.0.weight"] * mask)
    assert not torch.equal(module.net[2].weight, before["net.2.weight"] * callback.masks["net.2.weight"])
    assert "does not scale net.0.weight to the connections left: they look trained" in caplog.text


def test_weights_that_are_kept_are_not_scaled_and_the_log_says_so(caplog):
    callback = SET(0.8, initial="magnitude")
    module = seeded(lambda: Lit(optimizer=still))
    before = copy.deepcopy(module.state_dict())
    with caplog.at_level(logging.INFO):
        fit(callback, module, limit_train_batches=1, max_epochs=1)
    for name, mask in callback.masks.items():
        assert torch.equal(module.get_parameter(name), before[name] * mask)
    assert "keeps the weights that are there, so it does not scale them" in caplog.text


def most_memory(run):
    """Return the most bytes that are held at a time of what ``run`` allocates, operators' own copies included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        held += event.nbytes() if event.name() == "[memory]" else 0
        most = max(most, held)
    return most


@torch.no_grad()
def test_a_start_is_scaled_without_copies_of_the_weight_in_double_precision():
    layer = nn.Linear(2048, 2048)
    masked = MaskedWeight("weight", torch.rand(layer.weight.shape) < 0.5, layer.weight)
    sparse = SparseWeight("weight", layer.weight.shape, make_sparse_(nn.Linear(2048, 2048), masked.active_indices))
    for weight, values in ((masked, layer.weight), (sparse, sparse.values)):
        before = values.clone()
        assert most_memory(weight.scale_to_fan_in_) < values.nbytes
        assert not torch.equal(values, before)
