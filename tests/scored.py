"""Methods that prune before training, and what independent references of their scores share."""

import itertools

import lightning.pytorch as pl
import torch
from helpers import Lit, data, fit, mlp, same, seeded
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import SNIP, GraSP, SynFlow
from lightning_sparse.rules.budgets import apportion
from lightning_sparse.rules.ties import spread

METHODS = {
    "SNIP": lambda sparsity, **kw: SNIP(sparsity, **{"batches": 3, **kw}),
    "GraSP": lambda sparsity, **kw: GraSP(sparsity, **{"batches": 2, **kw}),
    "SynFlow": lambda sparsity, **kw: SynFlow(sparsity, **{"rounds": 20, **kw}),
}
LOSS = {name: METHODS[name] for name in ("SNIP", "GraSP")}


class Started(pl.Callback):
    """What a first training batch finds."""

    def __init__(self, callback):
        self.callback = callback

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            self.masks = {name: mask.clone() for name, mask in self.callback.masks.items()}
            self.weights = {name: p.detach().clone() for name, p in pl_module.named_parameters()}


def pruned(callback, module, train=None, **kwargs):
    """The masks at the first training batch, which the weights fit."""
    started = Started(callback)
    fit([callback, started], module, train, **{"max_steps": 1, **kwargs})
    assert same(started.masks, callback.masks), "they stay"
    for name, mask in started.masks.items():
        assert torch.equal(started.weights[name] != 0, mask)
    return started.masks


def largest(scores, k):
    """The k largest, by sorting; of those that equal the last, each weight's share, the first in the order of ties."""
    last = sorted((value for s in scores.values() for value in s.flatten().tolist()), reverse=True)[k - 1]
    equal = [int((s == last).sum()) for s in scores.values()]
    shares = apportion(k - sum(int((s > last).sum()) for s in scores.values()), equal, equal)
    kept = {}
    for (name, s), share in zip(scores.items(), shares, strict=True):
        ties = (s == last).flatten().nonzero().squeeze(1)
        kept[name] = (s > last).flatten()
        kept[name][ties[spread(ties, s.shape).argsort()[:share]]] = True
        kept[name] = kept[name].view(s.shape)
    return kept


def weights_of(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.ndim > 1}


def size_of(module):
    return sum(W.numel() for W in weights_of(module).values())


def mean_loss(module, weights, batches, temperature=1.0):
    """The loss as a function of the weights."""
    losses = []
    for x, y in batches:
        losses.append(nn.functional.cross_entropy(functional_call(module, weights, (x,)) / temperature, y))
    return sum(losses) / len(losses)


def double(net=mlp):
    return seeded(lambda: Lit(net(torch.float64)))


def deep(bias=False):
    widths = [12, 40, 30, 20, 10, 5, 4]
    return nn.Sequential(*(part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b, bias), nn.ReLU())))


class Attends(Lit):
    """Tokens through an embedding and a layer of attention."""

    def __init__(self):
        super().__init__(nn.Module())
        self.embedding = nn.Embedding(20, 8)
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.head = nn.Linear(8, 4)
        self.register_buffer("causal", torch.full((12, 12), float("-inf")).triu(1))

    def forward(self, x):
        return self.head(self.attention(self.embedding(x), self.causal).mean(1))


def tokens():
    x, y = data()
    return DataLoader(TensorDataset((x * 4).long().clamp(-9, 9) + 9, y), batch_size=8)
