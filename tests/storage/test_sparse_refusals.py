"""What sparse layers cannot do is refused by name."""

import pytest
import torch
from helpers import (
    Lit,
    fit,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

import lightning_sparse.storage.sparse as training
from lightning_sparse import DSR, DST, GGR, ITOP, MEST, SET, MemoryEfficientDST, RandomPruning, RigL
from lightning_sparse.storage import to_dense


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(self.b(self.a(x)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.rnn(x.view(-1, 3, 4))[0][:, -1])


@pytest.mark.parametrize(
    ("network", "named", "exclude"),
    [
        (Recurrent, r"net\.rnn\.weight_ih_l0 \(GRU\), net\.rnn\.weight_hh_l0 \(GRU\)", ["*.rnn.*"]),
        (Tied, r"net\.a\.weight \(Linear, tied to net\.b\.weight: a sparse layer cannot share", ["*.a.weight"]),
        (lambda: nn.Sequential(nn.Bilinear(6, 6, 4)), r"net\.0\.weight \(Bilinear\)", None),
    ],
)
def test_layers_that_have_no_sparse_form_are_named(network, named, exclude):
    with pytest.raises(MisconfigurationException, match=f"plain nn.Linear and nn.Conv2d layers only, not .*{named}"):
        fit(RandomPruning(0.5, storage="sparse"), Lit(network()))
    if exclude is not None:
        fit(RandomPruning(0.5, storage="sparse", exclude=exclude), Lit(network()))


def test_weights_that_no_optimizer_owns_are_named():
    module = Lit()
    module.make_optimizer = lambda p: torch.optim.SGD(module.net[0].parameters(), lr=0.1)
    with pytest.raises(MisconfigurationException, match=r"No optimizer owns \['net\.2\.weight', 'net\.4\.weight'\]"):
        fit(RandomPruning(0.5, storage="sparse"), module)


def test_other_methods_refuse_sparse_layers(monkeypatch):
    monkeypatch.setattr(training, "DENSE_LIMIT", 0)
    module, _ = fit(RandomPruning(0.8, storage="sparse"))
    for method in (DST(alpha=1e-3), RigL(0.8), SET(0.8)):
        with pytest.raises(MisconfigurationException, match=r"net\.0\.weight is held by a sparse layer"):
            fit(method, module)
    fit(SET(0.8), to_dense(module))


@pytest.mark.parametrize("method", [SET, RigL, GGR, ITOP, MEST, DSR, MemoryEfficientDST, RandomPruning])
def test_arguments_are_checked(method):
    with pytest.raises(ValueError, match=r"storage must be one of \['block', 'masked', 'sparse'\], got 'dense'"):
        method(0.8, storage="dense")
    with pytest.raises(ValueError, match=r"plain_checkpoints is for storage='sparse', got True with storage='masked'"):
        method(0.8, plain_checkpoints=True)
