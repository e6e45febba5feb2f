"""Methods that prune before training: scores as independent references have them, and no trace in the run."""

import copy
import itertools
import random

import lightning.pytorch as pl
import numpy
import pytest
import torch
from helpers import Lit, cnn, data, fit, loader, mlp, same, saved, seeded, trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_sparse import SNIP, GraSP, RandomPruning, SynFlow
from lightning_sparse.families.before_training import budgets
from lightning_sparse.rules.budgets import budget
from lightning_sparse.zoo.data import ResumableLoader, ResumableSampler

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
    """The positions of the k largest, the earlier first among equals, by sorting."""
    flat = [(-s, i) for i, s in enumerate(torch.cat([s.flatten() for s in scores.values()]).tolist())]
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[[i for _, i in sorted(flat)[:k]]] = True
    parts = kept.split([s.numel() for s in scores.values()])
    return {name: part.view(s.shape) for (name, s), part in zip(scores.items(), parts, strict=True)}


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


# ---------------------------------------------------------------------- scores


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


def flow(module, W, batches, temperature):
    """The squared norm of the gradient."""
    loss = mean_loss(module, W, batches, temperature)
    return sum(dP.square().sum() for dP in torch.autograd.grad(loss, list(W.values()), create_graph=True))


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize(("temperature", "batches"), [(1.0, 1), (200.0, 2)])
def test_grasp_keeps_what_its_whole_hessian_says(absolute, temperature, batches):
    net = nn.Sequential(nn.Linear(12, 3), nn.Tanh(), nn.Linear(3, 4)).double()
    torch.manual_seed(3)
    module = Lit(net)
    W, drawn = weights_of(module), list(itertools.islice(loader(dtype=torch.float64), batches))
    flat, shapes = torch.cat([w.flatten() for w in W.values()]), [w.shape for w in W.values()]

    def loss(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        return mean_loss(module, dict(zip(W, map(torch.Tensor.view, parts, shapes), strict=True)), drawn, temperature)

    H, g = torch.autograd.functional.hessian(loss, flat), torch.autograd.functional.jacobian(loss, flat)
    S = -flat * torch.tensor([sum(H[q, p] * g[p] for p in range(len(g))) for q in range(len(g))])
    kept = S.abs() if absolute else -S
    parts = kept.split([shape.numel() for shape in shapes])
    expected = largest(dict(zip(W, map(torch.Tensor.view, parts, shapes), strict=True)), budget(0.7, len(flat)))
    callback = GraSP(0.7, batches=batches, absolute=absolute, temperature=temperature)
    assert same(pruned(callback, module, loader(dtype=torch.float64)), expected)


def test_grasp_drops_the_weights_whose_shrinking_raises_the_gradients_norm_most():
    """The sign, by finite differences: S is half the change of the flow per share that is taken off a weight."""
    module = double()
    W, drawn = weights_of(module), list(itertools.islice(loader(dtype=torch.float64), 1))
    masks = pruned(GraSP(0.1, temperature=1.0), copy.deepcopy(module), loader(dtype=torch.float64))
    W = {name: w.requires_grad_() for name, w in W.items()}
    before, changes = flow(module, W, drawn, 1.0), {}
    for name, w in W.items():
        changes[name] = torch.zeros_like(w)
        for q in range(w.numel()):
            with torch.no_grad():
                value = w.view(-1)[q].item()
                w.view(-1)[q] *= 1 - 1e-6
            changes[name].view(-1)[q] = (flow(module, W, drawn, 1.0) - before).item()
            with torch.no_grad():
                w.view(-1)[q] = value
    kept = torch.cat([changes[name][mask] for name, mask in masks.items()])
    dropped = torch.cat([changes[name][~mask] for name, mask in masks.items()])
    assert dropped.min() > 0
    assert kept.max() <= dropped.min() + 1e-12


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


def deep(bias=False):
    widths = [12, 40, 30, 20, 10, 5, 4]
    return nn.Sequential(*(part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b, bias), nn.ReLU())))


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


# ---------------------------------------------------------------------- budget


class Recurrent(Lit):
    def __init__(self):
        super().__init__(nn.ModuleDict({"rnn": nn.LSTM(3, 8, 2, batch_first=True), "head": nn.Linear(8, 4)}))

    def forward(self, x):
        return self.net["head"](self.net["rnn"](x.view(len(x), 4, 3))[0][:, -1])


MODULES = {"mlp": lambda: Lit(mlp()), "cnn": lambda: Lit(cnn()), "lstm": Recurrent}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("method", METHODS)
def test_the_budget_is_met_exactly(method, kind):
    for sparsity in (0.5, 0.9, 0.95, 0.99):
        module = seeded(MODULES[kind])
        masks = pruned(METHODS[method](sparsity), module)
        assert sum(int(mask.sum()) for mask in masks.values()) == budget(sparsity, size_of(module))


@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_random_pruning_is_static_and_follows_its_distribution(distribution):
    callback = RandomPruning(0.75, distribution)
    masks = pruned(callback, seeded(Lit), max_steps=-1)
    assert [int(mask.sum()) for mask in masks.values()] == {"erk": [40, 38, 20], "uniform": [48, 40, 10]}[distribution]
    assert same(masks, pruned(RandomPruning(0.75, distribution), seeded(Lit)))
    assert not same(masks, pruned(RandomPruning(0.75, distribution, seed=5), seeded(Lit)))


@pytest.mark.parametrize("method", METHODS)
def test_no_layer_falls_below_its_least_density(method):
    masks = pruned(METHODS[method](0.9, min_layer_density=0.07), seeded(Lit))
    assert sum(int(mask.sum()) for mask in masks.values()) == budget(0.9, 392)
    assert all(mask.float().mean() >= 0.07 for mask in masks.values())
    with pytest.raises(ValueError, match=r"min_layer_density=0.5 alone takes 196 weights, the budget is 39"):
        fit(METHODS[method](0.9, min_layer_density=0.5))


@pytest.mark.parametrize("method", METHODS)
def test_scores_of_0_everywhere_keep_the_earliest(method):
    class Flat(Lit):
        def forward(self, x):
            return super().forward(x) * 0

    masks = pruned(METHODS[method](0.9), seeded(Flat))
    assert masks["net.0.weight"].flatten().int().tolist() == [1] * 39 + [0] * 153
    assert not masks["net.2.weight"].any()


# ---------------------------------------------------------------------- no trace


class Traced(Lit):
    """A module with everything that could carry a trace; what it saw is in ``seen``."""

    def __init__(self):
        super().__init__(nn.Sequential(cnn(), nn.Dropout(0.1)))
        self.accuracy = MulticlassAccuracy(4)
        self.seen = []

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.transfers = getattr(self, "transfers", 0) + 1
        return batch

    def training_step(self, batch, batch_idx):
        parts = list(batch.values()) if isinstance(batch, dict) else batch
        parts = [batch] if isinstance(parts[0], torch.Tensor) else parts
        loss = 0
        for x, y in parts:
            draws = torch.rand(()), random.random(), numpy.random.rand()
            self.seen.append((batch_idx, x.clone(), *draws, self.transfers))
            x.mul_(1 + 0.01 * draws[0])
            out = self(x)
            self.accuracy(out, y)
            loss = loss + nn.functional.cross_entropy(out, y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict({"loss": loss}, prog_bar=True)
        self.logger.log_metrics({"direct": float(loss.detach())}, step=self.global_step)
        self.logger.experiment.log_metrics({"deep": float(loss.detach())}, step=self.global_step)
        return {"loss": loss}


class Augmented(Dataset):
    """Random generators of its own, also within a transform."""

    def __init__(self):
        self.x, self.y = data()
        self.random = random.Random(1)
        self.transform = [type("Noise", (), {})()]
        self.transform[0].numpy, self.transform[0].old = numpy.random.default_rng(2), numpy.random.RandomState(3)
        self.generator = torch.Generator().manual_seed(4)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        noise = self.transform[0].numpy.normal() + self.transform[0].old.normal() + self.random.random()
        return self.x[index] + noise + torch.rand(1, generator=self.generator), self.y[index]


class Stream(IterableDataset):
    """Goes on where it was."""

    def __init__(self):
        self.x, self.y = data()
        self.place = 0

    def __iter__(self):
        for _ in range(96):
            self.place = (self.place + 1) % 240
            yield self.x[self.place], self.y[self.place]


class Batches:
    """Whole batches, which a training step may write to."""

    def __init__(self):
        self.batches = list(loader())
        self.passes = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.passes += 1
        return iter(self.batches[self.passes :] + self.batches[: self.passes])


class Counting(torch.utils.data.Sampler):
    """An order of its own that changes with every pass."""

    def __init__(self):
        self.passes, self.random = 0, random.Random(0)

    def __len__(self):
        return 240

    def __iter__(self):
        self.passes += 1
        yield from self.random.sample(range(240), 240)


def dataset():
    return TensorDataset(*data())


def shuffled(**kwargs):
    return DataLoader(dataset(), batch_size=24, shuffle=True, **kwargs)


def resumable():
    return ResumableLoader(dataset(), 24, sampler=ResumableSampler(dataset(), 1, 0, shuffle=True, seed=3))


LOADERS = {
    "in order": loader,
    "shuffled": shuffled,
    "generator": lambda: shuffled(generator=torch.Generator().manual_seed(5)),
    "sampler": lambda: DataLoader(dataset(), batch_size=24, sampler=Counting()),
    "resumable": resumable,
    "augmented": lambda: DataLoader(Augmented(), batch_size=24, shuffle=True),
    "stream": lambda: DataLoader(Stream(), batch_size=24),
    "no DataLoader": Batches,
    "list": lambda: [shuffled(), loader()],
    "dict": lambda: {"a": shuffled(), "b": DataLoader(dataset(), batch_size=60, shuffle=True)},
    "combined": lambda: CombinedLoader({"a": shuffled(), "b": loader()}, "min_size"),
    "workers": lambda: shuffled(num_workers=2),
    "persistent": lambda: DataLoader(
        Augmented(), 24, shuffle=True, num_workers=1, persistent_workers=True, generator=torch.Generator()
    ),
    "stream, worker": lambda: DataLoader(Stream(), batch_size=24, num_workers=1),
}


def traces(callbacks, train, folder, **kwargs):
    """Everything a run leaves behind."""
    torch.manual_seed(1), random.seed(1), numpy.random.seed(1)
    module = Traced()
    logger = CSVLogger(folder)
    run = trainer(callbacks, logger=logger, log_every_n_steps=1, **kwargs)
    run.fit(module, train(), loader())
    logged = [{k: v for k, v in row.items() if "sparsity" not in k} for row in logger.experiment.metrics]
    own = {k: float(v) for k, v in run.callback_metrics.items() if "sparsity" not in k}
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    optimizer = run.optimizers[0].state_dict()["state"]
    modes = [part.training for part in module.modules()], [p.requires_grad for p in module.parameters()]
    return module.state_dict(), module.seen, logged, own, states, optimizer, modes


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("kind", LOADERS)
def test_scores_leave_no_trace_in_the_run(kind, tmp_path):
    """With sparsity 0 the run is, to the last bit, that of the dense network."""
    plain = traces([], LOADERS[kind], tmp_path / "plain")
    assert len(plain[1]) > 4
    for method in METHODS if kind == "shuffled" else ["GraSP"]:
        scored = traces([METHODS[method](0.0)], LOADERS[kind], tmp_path / method)
        for one, other in zip(plain, scored, strict=True):
            assert equal(one, other), method


def test_an_unsized_loader_whose_batches_are_fetched_ahead_leaves_no_trace(tmp_path):
    settings = {"limit_train_batches": 3}
    plain = traces([], LOADERS["stream"], tmp_path / "a", **settings)
    assert equal(plain, traces([SNIP(0.0, batches=4)], LOADERS["stream"], tmp_path / "b", **settings))


def test_the_comparison_of_runs_sees_a_single_draw(tmp_path):
    class Draws(pl.Callback):
        def on_train_start(self, *args):
            torch.rand(1)

    one, other = (traces(c, shuffled, tmp_path / str(len(c))) for c in ([], [Draws()]))
    assert not equal(one[1], other[1])


def test_the_module_of_the_run_is_not_touched():
    class Watches(Lit):
        def training_step(self, batch, batch_idx):
            self.steps = getattr(self, "steps", 0) + 1
            return super().training_step(batch, batch_idx)

    class Checks(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            assert getattr(pl_module, "steps", 0) == batch_idx
            assert all(p.grad is None for p in pl_module.parameters()) or batch_idx
            assert pl_module.trainer is trainer

    module, _ = fit(
        [SNIP(0.5, batches=4), Checks()],
        seeded(Watches),
        max_epochs=1,
    )
    assert module.steps == 30


def test_dropout_is_the_same_in_both_passes_of_grasp(monkeypatch):
    """So g and H are those of one function."""
    from lightning_sparse.trainer.probe import Probe

    known, losses = [], Probe.losses

    def noted(self, count):
        known.append([])
        for loss in losses(self, count):
            known[-1].append(loss.item())
            yield loss

    monkeypatch.setattr(Probe, "losses", noted)
    pruned(GraSP(0.5, batches=3), seeded(lambda: Lit(nn.Sequential(mlp(), nn.Dropout(0.5)))))
    assert len(known) == 2
    assert known[0] == known[1]
    assert len(set(known[0])) == 3


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


def test_grasp_finds_logits_by_name():
    class Inner(Lit):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    assert same(pruned(GraSP(0.8, logits="net"), seeded(Inner)), pruned(GraSP(0.8), seeded(Lit)))
    with pytest.raises(Exception, match=r"training_step never calls the module's forward.*logits='net.head'"):
        fit(GraSP(0.8), seeded(Inner))
    with pytest.raises(Exception, match=r"logits='head' names no submodule of Inner.*'net.4'"):
        fit(GraSP(0.8, logits="head"), seeded(Inner))


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
        (lambda: RandomPruning(0.9, "er2"), "distribution must be one of"),
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
    with pytest.raises(Exception, match=rf"{method} got scores of net\.0\.weight that are NaN or infinite"):
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
        self.last = self.net[0].weight * 2


@pytest.mark.parametrize("method", LOSS)
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Silent, "training_step must return a loss that depends on the weights"),
        (Iterated, "argument dataloader_iter"),
        (Keeps, r"Keeps cannot be copied.*x\.detach\(\) can be copied"),
    ],
)
def test_modules_without_a_loss_to_ask_for_are_refused(method, kind, message):
    with pytest.raises(Exception, match=f"(?s){message}"):
        fit(LOSS[method](0.9), seeded(kind))


def test_more_batches_than_there_are_are_refused():
    with pytest.raises(Exception, match=r"31 batches were asked for .* has only 30\. Lower batches"):
        fit(SNIP(0.9, batches=31))


def test_a_loader_that_can_be_read_but_once_is_refused():
    class Once:
        def __init__(self):
            self.batches = iter(batch for batch in loader())

        def __iter__(self):
            return self.batches

    with pytest.raises(Exception, match="Once cannot be copied, and drawing from itself would use up batches"):
        fit(SNIP(0.9), seeded(Lit), Once())


def test_outputs_that_are_no_tensors_cannot_be_tempered():
    class Pair(Lit):
        def forward(self, x):
            return super().forward(x), x

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0])[0], batch[1])

    with pytest.raises(Exception, match=r"are of type tuple, no tensor\. Name the submodule"):
        fit(GraSP(0.9), seeded(Pair))
    assert same(pruned(GraSP(0.8, logits="net"), seeded(Pair)), pruned(GraSP(0.8), seeded(Lit)))


def test_operations_without_a_second_derivative_are_refused():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

    class Once(Lit):
        def forward(self, x):
            return Square.apply(super().forward(x))

    with pytest.raises(Exception, match="GraSP needs second derivatives, which an operation of the module does not"):
        fit(GraSP(0.9), seeded(Once))


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
    with pytest.raises(Exception, match="SynFlow found no output of forward that depends on the weights"):
        fit(SynFlow(0.9), seeded(Constant))
    with pytest.raises(Exception, match=r"it cannot score \['embedding.weight'\]. Leave them dense with exclude"):
        fit(SynFlow(0.9, include=["*"]), seeded(Attends), tokens())
    x, y = data()
    with pytest.raises(Exception, match="ones enter after the embeddings: there are none"):
        fit(SynFlow(0.9), seeded(Lit), DataLoader(TensorDataset(x.long(), y), batch_size=8))


@pytest.mark.parametrize("method", LOSS)
def test_manual_optimization_is_refused_with_a_way_out(method):
    class Manual(Lit):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(Exception, match=f"{method} needs the loss .* Manual optimizes manually.*SynFlow or RandomPr"):
        fit(LOSS[method](0.9), seeded(Manual))
