"""What ties a callback to one fit is neither copied nor pickled."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_sparse import DST, RigL
from lightning_sparse.trainer.fit import Fit
from lightning_sparse.trainer.ownership import Ownership

COPIES = {"copied": copy.deepcopy, "pickled": lambda x: pickle.loads(pickle.dumps(x))}


@pytest.fixture(params=COPIES)
def copied(request):
    return COPIES[request.param]


def test_a_copy_of_a_fit_is_a_fresh_one(copied):
    fit = Fit(trainer=lambda: None, backwards=3, warned={"a warning"})
    assert copied(fit).trainer is None
    assert (copied(fit).backwards, copied(fit).warned) == (0, set())
    assert fit.backwards == 3


def test_a_copy_of_ownership_knows_no_optimizer(copied):
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters())
    ownership = Ownership([optimizer])
    assert ownership.knows(optimizer)
    assert not copied(ownership).knows(optimizer)


@pytest.mark.parametrize("build", [lambda: RigL(0.5), lambda: DST(sparsity=0.5)])
def test_the_parts_of_a_copy_are_its_own(copied, build):
    callback = build()
    callback._update_hooks.awake = False
    callback._update_hooks._prepared.add(1)
    callback.log = lambda: None  # as the Trainer does
    twin = copied(callback)
    assert twin._update_hooks.method is twin
    assert twin._update_hooks.awake
    assert not twin._update_hooks.unseen
    assert not hasattr(twin, "log")
    assert twin._fit is not callback._fit
    for part in ("store", "_projection", "_foreign_writes", "_trained"):
        assert not hasattr(twin, part) or getattr(twin, part).method is twin
