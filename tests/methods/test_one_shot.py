"""OneShot: what it keeps, against references of its scores, and a training that is as it would have been without it."""

import pytest
import torch
from helpers import Lit, Recurrent, cnn, data, fit, loader, mlp, same, seeded, trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import FixedMask, OneShot, RandomPruning
from lightning_sparse.rules.budgets import apportion, budget
from lightning_sparse.rules.even import evenly


def still(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def pruned(callback, net=mlp, **kwargs):
    """The masks, and the module, which a step has not changed."""
    module = seeded(lambda: Lit(net(), optimizer=still))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(callback, module, **{"max_steps": 1, "max_epochs": -1, **kwargs})
    for name, mask in callback.masks.items():
        assert torch.equal(module.get_parameter(name), before[name] * mask), "weights keep their values"
    return callback.masks, before


@pytest.mark.parametrize(
    ("scope", "start"),
    [("global", {"initial": "global_magnitude"}), ("layer", {"initial": "magnitude", "distribution": "uniform"})],
)
def test_the_way_round_for_divided_weights_keeps_the_same_ones(scope, start):
    method = OneShot(0.8, scope=scope)
    assert ", ".join(f"{name}={value!r}" for name, value in start.items()) in method.needs_whole_weights
    (found, _), (expected, _) = pruned(RandomPruning(0.8, **start)), pruned(method)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())


# ---------------------------------------------------------------------- Wanda


def by_hand(scores, counts):
    """The largest scores of each row, one row after the other."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for row, chosen, n in zip(scores.flatten(1), mask.view(len(mask), -1), counts, strict=True):
        chosen[row.argsort(descending=True)[:n]] = True
    return mask


def per_row(k, rows):
    extra = evenly(rows, k % rows).tolist()
    return [k // rows + (row in extra) for row in range(rows)]


def with_dropout():
    return nn.Sequential(*cnn()[:-1], nn.Dropout(0.5), cnn()[-1])


def test_wanda_weighs_each_weight_with_the_norm_of_its_input_within_each_output():
    masks, weights = pruned(OneShot(0.6, criterion="wanda", calibration_batches=3), with_dropout)
    net = seeded(with_dropout).eval()  # neither batch norm nor dropout
    x = torch.cat([x for (x, _), _ in zip(loader(), range(3), strict=False)])
    with torch.no_grad():
        inputs = [net[:end](x) for end in (1, 4, 9)]  # of the convolutions and of the linear layer
    first = nn.functional.pad(inputs[0], (1, 1)).unfold(2, 3, 1).square().sum((0, 2))  # (channels, kernel)
    second = nn.functional.unfold(inputs[1], 2, padding=1).square().sum((0, 2)).view(6, 2, 2)
    norms = {
        "net.1.weight": first.sqrt().repeat_interleave(3, 0).unsqueeze(1),  # of two groups with three outputs each
        "net.4.weight": second.sqrt(),
        "net.9.weight": inputs[2].square().sum(0).sqrt(),
    }
    sizes = [weights[name].numel() for name in norms]
    for (name, X), k in zip(norms.items(), apportion(budget(0.6, sum(sizes)), sizes, sizes), strict=True):
        expected = by_hand(weights[name].abs() * X, per_row(k, len(weights[name])))
        assert torch.equal(masks[name], expected), name
    assert sum(int(mask.sum()) for mask in masks.values()) == budget(0.6, sum(sizes))


def test_wanda_by_hand():
    net = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 4))
    net[0].weight.data = torch.tensor([[3.0, 1.0, 2.0], [1.0, 5.0, 2.0]])
    x = torch.tensor([[1.0, 4.0, 0.0], [0.0, 3.0, 1.0]])  # norms 1, 5 and 1: scores 3, 5, 2 and 1, 25, 2
    module = Lit(net, optimizer=still)
    callback = OneShot(1 / 3, criterion="wanda", include=["net.0.weight"])
    fit(callback, module, DataLoader(TensorDataset(x, torch.zeros(2).long()), 1), max_epochs=1)
    assert callback.masks["net.0.weight"].int().tolist() == [[1, 1, 0], [0, 1, 1]]


@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_the_training_is_the_one_that_it_would_be_with_the_same_mask(criterion, tmp_path):
    def train(callback):
        module = seeded(lambda: Lit(with_dropout()))
        torch.manual_seed(5)
        fit(callback, module, DataLoader(TensorDataset(*data(80)), 8, shuffle=True), max_epochs=2)
        return module.state_dict()

    first = OneShot(0.7, criterion=criterion)
    state = train(first)
    save_file(first.masks, tmp_path / "masks.safetensors")
    assert same(state, train(FixedMask(initial=tmp_path / "masks.safetensors")))


def test_weights_whose_inputs_are_not_seen_are_told_of_and_scored_by_magnitude():
    callback = OneShot(0.5, criterion="wanda")
    with pytest.warns(
        UserWarning, match=r"scores some weights by \|W\| alone: .* net\.lstm\.weight_ih_l0, .* 1 others"
    ):
        masks, weights = pruned(callback, Recurrent)
    for name, mask in masks.items():
        if "lstm" in name:
            n = mask.numel() // 2
            assert torch.equal(mask, by_hand(weights[name].abs(), per_row(n, len(mask)))), name


def test_a_training_with_few_batches_calibrates_on_these():
    pruned(OneShot(0.5, criterion="wanda"), limit_train_batches=1)
    with pytest.raises(MisconfigurationException, match=r"31 batches were asked for .* has only 30"):
        pruned(OneShot(0.5, criterion="wanda", calibration_batches=31))


def test_wanda_sees_the_network_under_manual_optimization():
    class Manual(Lit):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    masks = []
    for kind in (Lit, Manual):
        callback = OneShot(0.5, criterion="wanda")
        fit(callback, seeded(kind), max_epochs=1)
        masks.append(callback.masks)
    assert same(*masks)


# ---------------------------------------------------------------------- magnitude, and who competes


@pytest.mark.parametrize(("scope", "initial"), [(None, "global_magnitude"), ("layer", "magnitude")])
def test_magnitude_keeps_the_largest_of_all_or_of_each_layer(scope, initial):
    masks, _ = pruned(OneShot(0.8, scope=scope))
    assert same(masks, pruned(FixedMask(0.8, initial=initial, distribution="uniform"))[0])


@pytest.mark.parametrize("scope", ["global", "layer", "output"])
def test_the_budget_is_exact_whoever_competes(scope):
    callback = OneShot(0.83, criterion="wanda", scope=scope, min_layer_density=0.1)
    masks, _ = pruned(callback, cnn)
    assert sum(int(mask.sum()) for mask in masks.values()) == budget(0.83, 594)
    if scope == "output":
        for mask in masks.values():
            rows = mask.flatten(1).sum(1)
            assert int(rows.max() - rows.min()) <= 1


def test_the_distribution_gives_layers_their_shares():
    masks, _ = pruned(OneShot(0.8, criterion="wanda", distribution={"net.4.weight": 0.5}))
    assert int(masks["net.4.weight"].sum()) == 20
    assert sum(int(mask.sum()) for mask in masks.values()) == 78


# ---------------------------------------------------------------------- errors


def test_a_step_that_needs_gradients_is_refused_with_what_to_do():
    class Penalised(Lit):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss + torch.autograd.grad(loss, self.net[0].weight, create_graph=True)[0].square().sum()

    with pytest.raises(
        MisconfigurationException, match=r"without gradients, which failed .* use criterion='magnitude'"
    ):
        trainer(OneShot(0.5, criterion="wanda")).fit(seeded(Penalised), loader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "gradient"}, r"criterion must be one of \['magnitude', 'wanda'\], got 'gradient'"),
        ({"scope": "row"}, r"scope must be one of \['global', 'layer', 'output'\], got 'row'"),
        ({"calibration_batches": 2}, r"calibration_batches is for criterion='wanda', got 2.*Leave it out"),
        ({"criterion": "wanda", "calibration_batches": 0}, r"calibration_batches must be an integer of at least 1"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OneShot(0.5, **options)
