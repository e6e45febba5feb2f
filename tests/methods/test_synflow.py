"""SynFlow: the paper's algorithm, no values of the data, and no layer lost."""

import copy

import pytest
import torch
from helpers import Lit, cnn, data, fit, mlp, same, seeded
from scored import Attends, deep, largest, pruned, size_of, tokens
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import SynFlow
from lightning_sparse.families.before_training import budgets
from lightning_sparse.rules.budgets import budget

# ---------------------------------------------------------------------- scores


@pytest.mark.parametrize("net", [mlp, cnn])
def test_synflow_equals_the_papers_algorithm(net):
    module = seeded(lambda: Lit(net()))
    R, n, N = copy.deepcopy(module).double().eval(), 10, size_of(module)
    for entry in R.state_dict().values():
        entry.abs_()
    W = {name: p for name, p in R.named_parameters() if p.ndim > 1}
    for r in range(1, n + 1):
        R.zero_grad()
        R(torch.ones(1, 12, dtype=torch.float64)).sum().backward()
        scores = {name: (p * p.grad).abs().detach() for name, p in W.items()}
        kept = largest(scores, round(N * (budget(0.9, N) / N) ** (r / n)) if r < n else budget(0.9, N))
        for name, p in W.items():
            p.data *= kept[name]
    assert same(pruned(SynFlow(0.9, rounds=n), module), kept)


def test_synflow_sees_no_values_of_the_data():
    x, y = data()
    one = pruned(SynFlow(0.9, rounds=5), seeded(Lit))
    two = pruned(SynFlow(0.9, rounds=5), seeded(Lit), DataLoader(TensorDataset(x * 100 - 3, y.flip(0)), batch_size=3))
    assert same(one, two)


def connected(masks):
    """Whether a path leads from an input to an output."""
    reached = torch.ones(1, 12)
    for mask in masks.values():
        reached = reached @ mask.T.float()
    return bool(reached.any())


@pytest.mark.parametrize("left", [7, 12, 24, 47])
def test_synflow_loses_no_layer_where_one_round_does(left):
    """Down to 7 weights in 6 layers."""
    module, sparsity = seeded(lambda: Lit(deep())), 1 - left / 2550
    iterative = pruned(SynFlow(sparsity), copy.deepcopy(module))
    assert sum(int(mask.sum()) for mask in iterative.values()) == left
    assert connected(iterative)
    assert not connected(pruned(SynFlow(sparsity, rounds=1), copy.deepcopy(module)))


def test_without_biases_synflow_loses_no_layer_of_a_network_that_has_some():
    module = seeded(lambda: Lit(deep(bias=True)))
    assert connected(pruned(SynFlow(0.99, biases=False), copy.deepcopy(module)))
    assert not connected(pruned(SynFlow(0.99), copy.deepcopy(module)))


def test_rounds_fall_exponentially_to_exactly_the_budget():
    assert budgets(1000, 10, 4) == [316, 100, 32, 10]
    assert budgets(10, 10, 3) == [10, 10, 10]
    assert budgets(7, 3, 1) == [3]
    steps = budgets(12345, 67, 100)
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] == 67


# ---------------------------------------------------------------------- modules


def test_an_example_input_decides_what_synflow_sends_through():
    class Two(Lit):
        def __init__(self, example):
            super().__init__()
            self.example_input_array = example

        def forward(self, x, scale):
            return super().forward(x) * scale

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0], 1.0), batch[1])

    x = torch.randn(3, 12)
    expected = pruned(SynFlow(0.8, rounds=5), seeded(Lit))
    for example in ((x, x[:, :1]), {"x": x, "scale": 2.0}):
        assert same(pruned(SynFlow(0.8, rounds=5), seeded(lambda e=example: Two(e))), expected)


# ---------------------------------------------------------------------- refusals


def test_synflow_says_what_it_cannot_send_ones_through():
    class Unnamed(Lit):
        def forward(self, x, more):
            return x

        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).sum()

    class Constant(Lit):
        def forward(self, x):
            return {"x": x}

    with pytest.raises(Exception, match=r"could not call Unnamed.forward with inputs of shapes \[\(1, 12\)\].*set exa"):
        fit(SynFlow(0.9), seeded(Unnamed))
    with pytest.raises(Exception, match=r"SynFlow.* found no output of forward that depends on the weights"):
        fit(SynFlow(0.9), seeded(Constant))
    with pytest.raises(Exception, match=r"it cannot score \['embedding.weight'\]. Leave them dense with exclude"):
        fit(SynFlow(0.9, include=["*"]), seeded(Attends), tokens())
    x, y = data()
    with pytest.raises(Exception, match="ones enter after the embeddings: there are none"):
        fit(SynFlow(0.9), seeded(Lit), DataLoader(TensorDataset(x.long(), y), batch_size=8))
