"""FixedMask: every zero of a sparse network stays, and no other comes."""

import pytest
import torch
from averaging import EMAWeightAveraging
from helpers import PLAINLY, Lit, StopsAfter, fit, loader, mlp, prune, same, seeded, state, trainer

from lightning_sparse import FixedMask

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=1e-1, amsgrad=True),
}


def module(optimizer="AdamW", weights=0.5):
    return Lit(prune(seeded(mlp), weights=weights).train(), optimizer=OPTIMIZERS[optimizer])


def zeros(network):
    return {name: p == 0 for name, p in network.named_parameters() if p.ndim > 1}


@pytest.mark.parametrize("storage", ["masked", "sparse"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_zero_is_revived_and_no_weight_is_lost(optimizer, storage):
    network = module(optimizer)
    before, biases = zeros(network), network.net[0].bias.detach().clone()
    callback = FixedMask(storage=storage)
    fit(callback, network)
    assert same(zeros(network), before)
    assert all(torch.equal(callback.masks[name], ~there) for name, there in before.items())
    assert not torch.equal(network.net[0].bias, biases), "it has been trained"


@pytest.mark.parametrize("storage", ["masked", "sparse"])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_run_is_resumed_bit_for_bit_in_a_module_without_zeros(optimizer, storage, tmp_path):
    two, one = seeded(lambda: Lit(optimizer=OPTIMIZERS[optimizer]), 5), module(optimizer)
    whole, stopped, resumed = (FixedMask(storage=storage) for _ in range(3))
    fit(whole, one, deterministic=True)  # so that the same backend multiplies
    run = trainer([stopped, StopsAfter(0)], deterministic=True)
    run.fit(module(optimizer), loader())
    run.save_checkpoint(tmp_path / "one.ckpt")
    run = trainer(resumed, deterministic=True)
    run.fit(two, loader(), ckpt_path=tmp_path / "one.ckpt", **PLAINLY)
    assert same(one.state_dict(), two.state_dict())
    assert same(whole.masks, resumed.masks)
    assert same(state(whole), state(resumed))


def test_an_average_over_time_keeps_the_zeros():
    network = module()
    before = zeros(network)
    fit([FixedMask(), EMAWeightAveraging(decay=0.9)], network)
    assert same(zeros(network), before)


@pytest.mark.parametrize("storage", ["masked", "sparse"])
def test_a_network_that_was_pruned_further_begins_anew_with_its_zeros(storage):
    callback, network = FixedMask(storage=storage), module(weights=0.2)
    fit(callback, network, max_epochs=1)
    first = zeros(network)
    fit(callback, network, max_epochs=1)
    assert same(zeros(network), first), "goes on"
    with torch.no_grad():
        network.net[2].weight[:, :8] = 0
    second = zeros(network)
    assert not same(first, second)
    with pytest.warns(UserWarning, match="starts afresh"):
        fit(callback, network, max_epochs=1)
    assert same(zeros(network), second)


def test_a_random_mask_of_an_earlier_fit_stays():
    callback, network = FixedMask(0.8, initial="random"), seeded(Lit)
    fit(callback, network, max_epochs=1)
    first = callback.masks
    with torch.no_grad():
        network.net[2].weight[:, :8] = 0
    fit(callback, network, max_epochs=1)
    assert same(first, callback.masks)
