"""SynFlow: the paper's algorithm, no values of the data, and no layer lost."""

import copy
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from helpers import Lit, cnn, data, fit, mlp, same, seeded
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from scored import Attends, deep, largest, pruned, size_of, tokens
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import SNIP, GraSP, SynFlow
from lightning_sparse.compat.compiled import copied
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
            return self(batch[0], batch[1], batch[2])

    class Constant(Lit):
        def forward(self, x):
            return {"x": x}

    match = r"could not call Unnamed.forward with inputs of shapes \[\(1, 12\)\].*Unnamed.training_step with.*set exa"
    with pytest.raises(MisconfigurationException, match=match):
        fit(SynFlow(0.9), seeded(Unnamed))
    with pytest.raises(MisconfigurationException, match="found no output of forward that depends on the weights"):
        fit(SynFlow(0.9), seeded(Constant))
    with pytest.raises(MisconfigurationException, match=r"it cannot score \['embedding.weight'\]. Leave them"):
        fit(SynFlow(0.9, include=["*"]), seeded(Attends), tokens())
    x, y = data()
    with pytest.raises(MisconfigurationException, match="ones enter after the embeddings: there are none"):
        fit(SynFlow(0.9), seeded(Lit), DataLoader(TensorDataset(x.long(), y), batch_size=8))


# ---------------------------------------------------------------------- batches and modules of any form


@dataclass
class Sample:
    x: torch.Tensor
    y: torch.Tensor


class Pair(NamedTuple):
    y: torch.Tensor
    x: torch.Tensor


class Graph:
    """As those of PyTorch Geometric: tensors are in a store within, not among the attributes."""

    def __init__(self, x, y):
        self._store = {"y": y, "x": x}

    x, y = (property(lambda self, name=name: self._store[name]) for name in "xy")

    def to(self, device):
        return self


FORMS = {
    "dict": lambda x, y: {"y": y, "x": x},
    "dataclass": Sample,
    "namedtuple": lambda x, y: Pair(y, x),
    "list": lambda x, y: [y, {"x": [x]}],
    "graph": Graph,
}
READS = {"dict": lambda b: (b["x"], b["y"]), "list": lambda b: (b[1]["x"][0], b[0])}


class Collates:
    def __init__(self, form):
        self.form = form

    def __call__(self, samples):
        x, y = (torch.stack(part) for part in zip(*samples, strict=True))
        return FORMS[self.form](x, y)


def batches(form):
    return DataLoader(TensorDataset(*data()), batch_size=8, collate_fn=Collates(form))


class Foreign(Lit):
    """A training step that reads its own form of batch, and calls the network as ``how`` says."""

    def __init__(self, form, how):
        super().__init__()
        self.read, self.how, self.criterion = READS.get(form, lambda b: (b.x, b.y)), how, nn.CrossEntropyLoss()
        self.automatic_optimization = how != "manual"

    def forward(self, x, scale, *, shift):
        return self.net(x) * scale + shift

    def training_step(self, batch, batch_idx):
        x, y = self.read(batch)
        if self.how == "forward":
            out = self(x, 1.0, shift=0.0)
        elif self.how == "in parts":
            out = self.net[2:](self.net[:2](x).relu())
        else:
            out = self.net(x)
        loss = self.criterion(out, y)
        if self.how == "manual":
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss


@pytest.mark.parametrize(
    ("form", "how"),
    [*((form, "forward") for form in FORMS), ("dict", "in parts"), ("list", "net"), ("graph", "manual")],
)
def test_synflow_scores_modules_whatever_their_batches_and_calls_are(form, how):
    module = seeded(lambda: Foreign(form, how))
    assert same(pruned(SynFlow(0.8, rounds=5), module, batches(form)), pruned(SynFlow(0.8, rounds=5), seeded(Lit)))


def test_a_wrong_example_input_is_passed_over():
    class Wrong(Lit):
        def __init__(self):
            super().__init__()
            self.example_input_array = torch.ones(2, 5)

    assert same(pruned(SynFlow(0.8, rounds=5), seeded(Wrong)), pruned(SynFlow(0.8, rounds=5), seeded(Lit)))


@pytest.mark.filterwarnings("ignore")
def test_quantization_aware_training_gets_a_remedy_that_fits():
    net = nn.Sequential(torch.ao.quantization.QuantStub(), mlp(), torch.ao.quantization.DeQuantStub())
    net.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    module = seeded(lambda: Lit(torch.ao.quantization.prepare_qat(net.train())))
    with pytest.raises(MisconfigurationException, match=r"Under quantization-aware training, use SNIP\."):
        fit(SynFlow(0.8), copy.deepcopy(module))
    assert sum(int(mask.sum()) for mask in pruned(SNIP(0.8), module).values()) == budget(0.8, 392)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", [SNIP, GraSP, SynFlow])
def test_a_module_under_weight_norm_is_scored_and_keeps_a_connection_a_row(method):
    module = seeded(Lit)
    nn.utils.weight_norm(module.net[2])
    module(torch.ones(1, 12))  # it keeps a result
    for sparsity in (0.5, 0.95):
        masks = pruned(method(sparsity), copied(module, module))
        assert masks["net.2.weight_v"].any(1).all()
        assert sum(int(mask.sum()) for mask in masks.values()) == budget(sparsity, 392)
