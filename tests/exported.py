"""Networks that tests export, and what exports are compared by."""

import torch
from torch import nn
from torch.nn import functional

from lightning_sparse.storage import SparseConv2d, SparseLinear

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def same_results(module, small, *inputs, tolerance=1e-5):
    with torch.no_grad():
        expected = module(*inputs)
        return (small(*inputs) - expected).abs().max() <= tolerance * max(1, expected.abs().max())


def sizes(report):
    return {layer.name: layer.after for layer in report.layers}


def untouched(module, before):
    after = module.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


class Model(nn.Module):
    """Layers by name, and a forward given as a function of the module and its input."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, x)


def residual(m, x):
    y = torch.relu(m.a(x))
    return m.head(torch.relu(y + m.c(torch.relu(m.b(y)))))


def directly(m, x):
    return functional.linear(torch.relu(m.a(x)), m.a.weight)


def sparse_mlp(sparsity=0.95):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 4))
    with torch.no_grad():
        net[0].weight *= torch.rand_like(net[0].weight) > sparsity
    return net


def sparse_net():
    """As a fit leaves it with ``storage="sparse"`` if dense weights would be too large."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(SparseConv2d(3, 8, 3, nnz=60, padding=1), nn.ReLU(), SparseConv2d(8, 6, 3, nnz=9, stride=2, groups=2)),
        *(nn.Flatten(), SparseLinear(54, 40, nnz=90), nn.ReLU(), nn.Linear(40, 4)),
    )


def bits(x):
    return x.contiguous().view(torch.uint8) if x.ndim else x.reshape(1).view(torch.uint8)
