"""SNIP: its score as an independent reference has it."""

import copy
import itertools

import pytest
import torch
from helpers import cnn, loader, mlp, same
from scored import double, largest, mean_loss, pruned, size_of, weights_of

from lightning_sparse import SNIP
from lightning_sparse.rules.budgets import budget


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("net", [mlp, cnn])
def test_snip_keeps_the_connections_to_whose_switch_the_loss_is_most_sensitive(net, batches):
    module = double(net)
    reference, W = copy.deepcopy(module), weights_of(module)
    switches = {name: torch.ones_like(w, requires_grad=True) for name, w in W.items()}
    drawn = list(itertools.islice(loader(dtype=torch.float64), batches))
    loss = mean_loss(reference, {name: switches[name] * w for name, w in W.items()}, drawn)
    scores = dict(zip(W, [dc.abs() for dc in torch.autograd.grad(loss, list(switches.values()))], strict=True))
    masks = pruned(SNIP(0.8, batches=batches), module, loader(dtype=torch.float64))
    assert same(masks, largest(scores, budget(0.8, size_of(module))))
