"""With storage="sparse", foreign code finds in layers and parameters what it finds in dense ones."""

import pytest
import torch
from helpers import Lit, fit, seeded
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_sparse import RandomPruning, RigL


def by_kind_and_name(module):
    """MinGPT's groups: by the type of the layer and the end of the name, each parameter in just one of them."""
    decay, no_decay = set(), set()
    for prefix, part in module.named_modules():
        for local, _ in part.named_parameters(recurse=False):
            name = f"{prefix}.{local}" if prefix else local
            if local.endswith("bias"):
                no_decay.add(name)
            elif local.endswith("weight") and isinstance(part, (nn.Linear, nn.Conv2d)):
                decay.add(name)
    parameters = dict(module.named_parameters())
    assert not parameters.keys() - (decay | no_decay), "every parameter is in a group"
    return [parameters[name] for name in sorted(decay)], [parameters[name] for name in sorted(no_decay)]


def by_dim(module):
    parameters = [*module.parameters()]
    return [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]


def by_ndim(module):
    parameters = [*module.parameters()]
    return [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]


def by_shape(module):
    parameters = [*module.parameters()]
    return [p for p in parameters if len(p.shape) > 1], [p for p in parameters if len(p.size()) == 1]


@pytest.mark.parametrize("groups", [by_kind_and_name, by_dim, by_ndim, by_shape])
@pytest.mark.parametrize("set_on_the_instance", [False, True])
def test_weights_decay_as_with_masks(groups, set_on_the_instance):
    class Decays(Lit):
        def configure_optimizers(self):
            decay, no_decay = groups(self)
            return torch.optim.AdamW(
                [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}]
            )

    trained = []
    for storage in ("masked", "sparse"):
        module = seeded(Decays)
        if set_on_the_instance:  # as LightningCLI does
            module.configure_optimizers = own = module.configure_optimizers
        _, run = fit(RandomPruning(0.8, storage=storage), module, max_epochs=1)
        trained.append((module, [len(group["params"]) for group in run.optimizers[0].param_groups]))
        if set_on_the_instance:
            assert module.configure_optimizers is own
        else:
            assert "configure_optimizers" not in vars(module)
    (masked, dense_groups), (sparse, groups_found) = trained
    assert groups_found == dense_groups == [3, 3]
    assert all(torch.allclose(x, sparse.state_dict()[name], atol=1e-5) for name, x in masked.state_dict().items())
    assert all(type(p) is nn.Parameter for p in sparse.parameters())


class Reads(Lit):
    def forward(self, x):
        return nn.functional.linear(x, self.net[0].weight)[:, :4]


def test_code_that_reads_the_dense_weight_is_told_what_to_do():
    with pytest.raises(
        RuntimeError, match=r"net\.0\.weight has no elements for 'linear'.*exclude=\['net\.0\.weight'\]"
    ):
        fit(RandomPruning(0.5, storage="sparse"), Reads())
    fit(RandomPruning(0.5, storage="sparse", exclude=["net.0.weight"]), Reads(), max_epochs=1)


class Muon(torch.optim.SGD):
    """Stands for one that multiplies matrices."""


def test_an_optimizer_of_matrices_is_refused():
    module = Lit(optimizer=lambda p: Muon(p, lr=0.1))
    with pytest.raises(
        MisconfigurationException, match=r"Muon trains matrices, but .* holds net\.0\.weight, .* vectors"
    ):
        fit(RandomPruning(0.5, storage="sparse"), module)


class Scales(Lit):
    """scVI's decoder: what is no linear layer is called otherwise."""

    def forward(self, x):
        for layer in self.net:
            x = 2 * layer(x.to(layer.weight.dtype)) if isinstance(layer, nn.Linear) else layer(x)
        return x


def test_code_that_asks_for_linear_layers_trains_as_with_masks():
    dense, _ = fit(RigL(0.8, update_every=7), seeded(Scales), max_epochs=1)
    sparse, _ = fit(RigL(0.8, update_every=7, storage="sparse"), seeded(Scales), max_epochs=1)
    assert all(torch.allclose(x, sparse.state_dict()[name], atol=1e-4) for name, x in dense.state_dict().items())
