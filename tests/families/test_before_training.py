"""Methods that prune before training: exact budgets, scored once, in modules of all kinds."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from helpers import Lit, cnn, data, fit, loader, mlp, same, saved, seeded, trainer
from scored import LOSS, METHODS, Attends, pruned, size_of, tokens
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import SNIP, GraSP, RandomPruning, SynFlow
from lightning_sparse.rules.budgets import budget


class Recurrent(Lit):
    def __init__(self):
        super().__init__(nn.ModuleDict({"rnn": nn.LSTM(3, 8, 2, batch_first=True), "head": nn.Linear(8, 4)}))

    def forward(self, x):
        return self.net["head"](self.net["rnn"](x.view(len(x), 4, 3))[0][:, -1])


MODULES = {"mlp": lambda: Lit(mlp()), "cnn": lambda: Lit(cnn()), "lstm": Recurrent}

# ---------------------------------------------------------------------- budget


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("method", METHODS)
def test_the_budget_is_met_exactly(method, kind):
    for sparsity in (0.5, 0.9, 0.95, 0.99):
        module = seeded(MODULES[kind])
        masks = pruned(METHODS[method](sparsity), module)
        assert sum(int(mask.sum()) for mask in masks.values()) == budget(sparsity, size_of(module))


@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_random_pruning_is_static_and_follows_its_distribution(distribution):
    callback = RandomPruning(0.75, distribution=distribution)
    masks = pruned(callback, seeded(Lit), max_steps=-1)
    assert [int(mask.sum()) for mask in masks.values()] == {"erk": [40, 38, 20], "uniform": [48, 40, 10]}[distribution]
    assert same(masks, pruned(RandomPruning(0.75, distribution=distribution), seeded(Lit)))
    assert not same(masks, pruned(RandomPruning(0.75, distribution=distribution, seed=5), seeded(Lit)))


@pytest.mark.parametrize("method", METHODS)
def test_no_layer_falls_below_its_least_density(method):
    masks = pruned(METHODS[method](0.9, min_layer_density=0.07), seeded(Lit))
    assert sum(int(mask.sum()) for mask in masks.values()) == budget(0.9, 392)
    assert all(mask.float().mean() >= 0.07 for mask in masks.values())
    with pytest.raises(ValueError, match=r"min_layer_density=0.5 alone takes 196 weights, the budget is 39"):
        fit(METHODS[method](0.9, min_layer_density=0.5))


@pytest.mark.parametrize("method", METHODS)
def test_scores_of_0_everywhere_keep_all_layers_and_units_evenly(method):
    class Flat(Lit):
        def forward(self, x):
            return super().forward(x) * 0

    with pytest.warns(UserWarning, match=r"within net\.0\.weight, net\.2\.weight, net\.4\.weight all scores are equal"):
        masks = pruned(METHODS[method](0.9), seeded(Flat)).values()
    counts = [int(mask.sum()) for mask in masks]
    assert sum(counts) == 39
    assert all(abs(n - 39 / 392 * mask.numel()) <= 1 for n, mask in zip(counts, masks, strict=True)), "in proportion"
    for mask in masks:
        for units in (mask.sum(0), mask.sum(1)):
            assert units.max() - units.min() <= 1


# ---------------------------------------------------------------------- when


@pytest.mark.parametrize("method", METHODS)
def test_the_network_is_dense_in_the_sanity_check_and_sparse_from_the_start_of_training(method):
    class Densities(pl.Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            known.append(callback.density)

        def on_train_start(self, trainer, pl_module):
            known.append(callback.density)

    known, callback = [], METHODS[method](0.8)
    trainer([callback, Densities()], max_steps=1, num_sanity_val_steps=1).fit(seeded(Lit), loader(), loader())
    assert known == [1.0, budget(0.8, 392) / 392]


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_and_a_second_fit_keep_their_masks(method, tmp_path, monkeypatch):
    callback = METHODS[method](0.8)
    module, run = fit(callback, max_epochs=1)
    masks = copy.deepcopy(callback.masks)
    saved(run, tmp_path / "last.ckpt")
    again = METHODS[method](0.8)
    for candidate in (callback, again):
        monkeypatch.setattr(candidate, "scores", None)
    fit(callback, module, max_epochs=1)
    assert same(callback.masks, masks)
    trainer(again, max_epochs=2).fit(seeded(Lit), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert same(again.masks, masks)


@pytest.mark.parametrize("method", METHODS)
def test_a_fit_of_other_weights_is_scored_afresh(method):
    callback = METHODS[method](0.8)
    fit(callback, max_epochs=1)
    with pytest.warns(UserWarning, match="starts afresh"):
        fit(callback, seeded(Lit, 1), max_epochs=1)
    assert same(callback.masks, pruned(METHODS[method](0.8), seeded(Lit, 1)))


def test_a_fit_that_ended_before_its_first_step_is_scored_by_the_next():
    callback = SNIP(0.8)
    module, _ = fit(callback, max_steps=0)
    assert callback.density == 1
    fit(callback, module, max_epochs=1)
    assert callback.density == budget(0.8, 392) / 392


# ---------------------------------------------------------------------- modules


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("method", METHODS)
def test_other_precisions_work(method, precision):
    callback = METHODS[method](0.8)
    fit(callback, precision=precision, max_epochs=1)
    assert callback.density == budget(0.8, 392) / 392


def test_the_datamodules_hooks_prepare_the_batches():
    class Scales(pl.LightningDataModule):
        def train_dataloader(self):
            return loader()

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch[0] * torch.tensor([5.0] + [0.1] * 11), batch[1]

    class ByModule(Lit):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] * torch.tensor([5.0] + [0.1] * 11), batch[1]

    hooked, by_module = SNIP(0.8), SNIP(0.8)
    trainer(hooked, max_steps=1).fit(seeded(Lit), datamodule=Scales())
    trainer(by_module, max_steps=1).fit(seeded(ByModule), loader())
    x, y = data()
    scaled = DataLoader(TensorDataset(x * torch.tensor([5.0] + [0.1] * 11), y), batch_size=8)
    expected = pruned(SNIP(0.8), seeded(Lit), scaled)
    assert same(hooked.masks, expected)
    assert same(by_module.masks, expected)
    assert not same(expected, pruned(SNIP(0.8), seeded(Lit)))


@pytest.mark.parametrize("method", METHODS)
def test_attention_and_tokens_work(method):
    masks = pruned(METHODS[method](0.8), seeded(Attends), tokens())
    assert set(masks) > {"attention.self_attn.in_proj_weight", "head.weight"}
    assert sum(map(torch.count_nonzero, masks.values())) == budget(0.8, sum(m.numel() for m in masks.values()))
    assert masks["attention.self_attn.in_proj_weight"].any()


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_the_output_does_not_use_go_first(method):
    class Spare(Lit):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(8, 8)

    masks = pruned(METHODS[method](0.6), seeded(Spare))
    assert not masks["spare.weight"].any()


@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_module_is_scored_as_an_eager_one(method):
    module = torch.compile(seeded(Lit), backend="eager")
    assert same(pruned(METHODS[method](0.8), module), pruned(METHODS[method](0.8), seeded(Lit)))


@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_submodule_is_scored_as_an_eager_one(method):
    module = seeded(Lit)
    module.net = torch.compile(module.net, backend="eager")
    masks = pruned(METHODS[method](0.8), module)
    assert all(map(torch.equal, masks.values(), pruned(METHODS[method](0.8), seeded(Lit)).values()))


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SNIP(0.9, batches=0), "batches must be an integer of at least 1, got 0"),
        (lambda: GraSP(0.9, batches=1.5), r"batches must be an integer of at least 1, got 1\.5"),
        (lambda: GraSP(0.9, temperature=0), "temperature must be a finite number above 0, got 0"),
        (lambda: GraSP(0.9, temperature=-1), "temperature must be a finite number above 0, got -1"),
        (lambda: SynFlow(0.9, rounds=0), "rounds must be an integer of at least 1, got 0"),
        (lambda: SynFlow(1.0), r"sparsity must be below 1, got 1\.0"),
        (lambda: RandomPruning(0.9, distribution="er2"), "distribution must be one of"),
    ],
)
def test_arguments_are_checked(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("method", METHODS)
def test_a_distribution_is_not_offered_where_all_layers_compete(method):
    with pytest.raises(TypeError, match="unexpected keyword argument 'distribution'"):
        METHODS[method](0.9, distribution="erk")


class Broken(Lit):
    def forward(self, x):
        return super().forward(x) * float("nan")


@pytest.mark.parametrize("method", METHODS)
def test_scores_that_are_not_finite_are_refused(method):
    with pytest.raises(Exception, match=rf"{method}.* got scores of net\.0\.weight that are NaN or infinite"):
        fit(METHODS[method](0.9), seeded(Broken))


class Silent(Lit):
    def training_step(self, batch, batch_idx):
        return None


class Iterated(Lit):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return super().training_step(batch, 0)


class Keeps(Lit):
    def __init__(self):
        super().__init__()
        self.last = [self.net[0].weight * 2]


class Begins(Lit):
    def on_train_epoch_start(self):
        self.factor = 1.0

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.factor


@pytest.mark.parametrize("method", LOSS)
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Silent, "training_step must return a loss that depends on the weights"),
        (Iterated, "argument dataloader_iter"),
        (Begins, r"Begins\.training_step for batch 0 on a copy.* AttributeError: .*not in hooks that .* use SynFlow"),
        (Keeps, r"Keeps cannot be copied.*x\.detach\(\) can be copied"),
    ],
)
def test_modules_without_a_loss_to_ask_for_are_refused(method, kind, message):
    with pytest.raises(Exception, match=f"(?s){message}"):
        fit(LOSS[method](0.9), seeded(kind))


@pytest.mark.parametrize("method", METHODS)
def test_a_module_may_keep_a_result_as_an_attribute(method):
    class KeepsOne(Lit):
        def __init__(self):
            super().__init__()
            self.last = self.net[0].weight * 2

    assert same(pruned(METHODS[method](0.9), seeded(KeepsOne)), pruned(METHODS[method](0.9), seeded(Lit)))


def test_more_batches_than_there_are_are_refused():
    with pytest.raises(Exception, match=r"31 batches were asked for .* has only 30\. Lower their number"):
        fit(SNIP(0.9, batches=31))


def test_a_loader_that_can_be_read_but_once_is_refused():
    class Once:
        def __init__(self):
            self.batches = iter(batch for batch in loader())

        def __iter__(self):
            return self.batches

    with pytest.raises(Exception, match="Once cannot be copied, and drawing from itself would use up batches"):
        fit(SNIP(0.9), seeded(Lit), Once())


@pytest.mark.parametrize("method", LOSS)
def test_manual_optimization_is_refused_with_a_way_out(method):
    class Manual(Lit):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(Exception, match=f"{method}.* needs the loss .* Manual optimizes manually.*SynFlow or RandomPr"):
        fit(LOSS[method](0.9), seeded(Manual))
