"""Small modules and data that the tests share."""

import functools
import importlib.metadata
import inspect
import math
import socket
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import registry
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import (
    ACDC,
    CHT,
    DFBST,
    DSR,
    DST,
    GGR,
    GMP,
    ITOP,
    MEST,
    SET,
    SNFS,
    SNIP,
    SRSTE,
    SSTE,
    STR,
    SWAT,
    AutoSparse,
    DeepR,
    FixedMask,
    GraNet,
    GraSP,
    LotteryTicket,
    MemoryEfficientDST,
    OneShot,
    OptG,
    RandomPruning,
    RigL,
    SRigL,
    SynFlow,
    TopKAST,
)
from lightning_sparse.compat.shards import is_sharded
from lightning_sparse.layers.selection import select_parameters

warnings.filterwarnings("ignore", ".*does not have many workers.*")
# Each Trainer reads the metadata of all installed packages for callbacks that it might be given.
registry.entry_points = functools.cache(importlib.metadata.entry_points)

# Given to a Trainer, has it read the checkpoint as plain data; Lightning takes the argument since 2.6.
PLAINLY = {"weights_only": True} if "weights_only" in inspect.signature(pl.Trainer.fit).parameters else {}

# One row a method: hyper-parameters under which a tiny network becomes visibly sparse within some dozen steps.
THRESHOLDS: dict[str, Callable] = {
    "DST": lambda **kw: DST(**{"alpha": 5e-3, **kw}),
    "DFBST": lambda **kw: DFBST(**{"alpha": 5e-3, "beta": 0.5, **kw}),
    "AutoSparse": lambda **kw: AutoSparse(**{"alpha": 0.6, "init_threshold": -2.5, **kw}),
    "STR": lambda **kw: STR(**{"init_threshold": -2.5, **kw}),
}
# Latent weights without thresholds.
TOP_K: dict[str, Callable] = {
    "TopKAST": lambda **kw: TopKAST(
        **{"sparsity": 0.8, "backward_sparsity": 0.5, "alpha": 0.9, "decay": "linear", "update_every": 3, **kw}
    ),
    "SWAT": lambda **kw: SWAT(**{"sparsity": 0.8, "activation_sparsity": 0.6, "update_every": 3, **kw}),
    "OptG": lambda **kw: OptG(**{"sparsity": 0.8, "update_every": 3, **kw}),
}
LATENT: dict[str, Callable] = {**THRESHOLDS, **TOP_K}
# The target is 0.8, and connections move within two epochs of 30 steps.
MASKED: dict[str, Callable] = {
    "SET": lambda **kw: SET(**{"sparsity": 0.8, **kw}),
    "RigL": lambda **kw: RigL(**{"sparsity": 0.8, "update_every": 7, **kw}),
    "SRigL": lambda **kw: SRigL(**{"sparsity": 0.8, "min_salient": 0.95, "update_every": 7, **kw}),
    "GGR": lambda **kw: GGR(**{"sparsity": 0.8, "drop_fraction": 0.3, "update_every": 7, **kw}),
    "SNFS": lambda **kw: SNFS(**{"sparsity": 0.8, "update_every": 7, **kw}),
    "DSR": lambda **kw: DSR(**{"sparsity": 0.8, "init_threshold": 0.05, "update_every": 7, **kw}),
    "ITOP": lambda **kw: ITOP(**{"sparsity": 0.8, "update_every": 10, **kw}),
    "MEST": lambda **kw: MEST(**{"sparsity": 0.8, "update_every": 7, **kw}),
    "DeepR": lambda **kw: DeepR(**{"sparsity": 0.8, "l1": 1e-3, "temperature": 1e-6, **kw}),
    "MemoryEfficientDST": lambda **kw: MemoryEfficientDST(**{"sparsity": 0.8, "update_every": 7, **kw}),
    "CHT": lambda **kw: CHT(**{"sparsity": 0.8, "soft": True, "update_every": 7, **kw}),
    "GraNet": lambda **kw: GraNet(**{"sparsity": 0.8, "update_every": 7, **kw}),
    "RandomPruning": lambda **kw: RandomPruning(**{"sparsity": 0.8, **kw}),
    "FixedMask": lambda **kw: FixedMask(**{"sparsity": 0.8, "initial": "magnitude", **kw}),
    "OneShot": lambda **kw: OneShot(**{"sparsity": 0.8, "criterion": "wanda", **kw}),
    "SNIP": lambda **kw: SNIP(**{"sparsity": 0.8, **kw}),
    "GraSP": lambda **kw: GraSP(**{"sparsity": 0.8, **kw}),
    "SynFlow": lambda **kw: SynFlow(**{"sparsity": 0.8, **kw}),
    "GMP": lambda **kw: GMP(**{"sparsity": 0.8, "update_every": 3, "end_at": 0.5, **kw}),
}
SETTINGS: dict[str, Callable] = {**LATENT, **MASKED}
# Methods that divide the epochs of a fit, here three.
ROUNDS: dict[str, Callable] = {
    "LotteryTicket": lambda **kw: LotteryTicket(**{"sparsity": 0.8, "rounds": 2, **kw}),
    "ACDC": lambda **kw: ACDC(**{"sparsity": 0.8, **kw}),
}
# Methods whose sparsity is that of their pattern, here half of the weights.
N_OF_M: dict[str, Callable] = {"SRSTE": lambda **kw: SRSTE(**kw), "SSTE": lambda **kw: SSTE(**kw)}


class Representatives(NamedTuple):
    """One method for each way through the base classes: what these alone decide is tested with one method a way.

    What a method decides itself is tested with all of ``SETTINGS``: exact zeros, budgets, resume, accumulation, AMP.
    """

    thresholds: str = "DFBST"
    top_k: str = "TopKAST"
    moves: str = "RigL"
    moves_after_each_step: str = "DeepR"
    scores_before_training: str = "SNIP"
    prunes_gradually: str = "GMP"


REPRESENTATIVES = Representatives()
# Methods that act on the modules or their inputs, not on weights alone.
HOOKED = ("SWAT", "MemoryEfficientDST")


def mlp(dtype=torch.float32):
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 4)).to(dtype)


def cnn(dtype=torch.float32):
    return nn.Sequential(
        nn.Unflatten(1, (2, 6)),
        nn.Conv1d(2, 6, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Unflatten(2, (2, 3)),
        nn.Conv2d(6, 8, 2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 4),
    ).to(dtype)


class Residual(nn.Module):
    """ResNet-18's plan, narrow: stem, four stages of basic blocks with 1 x 1 shortcuts, head."""

    def __init__(self):
        super().__init__()
        widths = [4, 4, 6, 8]
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        before, stages = 4, []
        for i, width in enumerate(widths):
            for stride in (1 if i == 0 else 2, 1):
                stages.append(Block(before, width, stride))
                before = width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(before, 4)

    def forward(self, x):
        x = x.view(len(x), 3, 2, 2)
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, before, width, stride):
        super().__init__()
        self.one = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.two = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        same = before == width and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(before, width, 1, stride, bias=False)

    def forward(self, x):
        return torch.relu(self.two(torch.relu(self.norm(self.one(x)))) + self.skip(x))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 8, num_layers=2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.lstm(x.view(len(x), 3, 4))[0][:, -1])


NETS = {"mlp": mlp, "cnn": cnn, "resnet": Residual, "lstm": Recurrent}


def data(count=240, dtype=torch.float32, seed=7):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 12, generator=generator)
    y = (x[:, :3].sum(1) > 0).long() + 2 * (x[:, 3:6].sum(1) > 0).long()
    return x.to(dtype), y


class Lit(pl.LightningModule):
    """A classifier with SGD, momentum, weight decay and a schedule."""

    def __init__(self, net=None, optimizer=None, scheduler=None):
        super().__init__()
        self.net = net if net is not None else mlp()
        self.make_optimizer = optimizer or (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3))
        self.make_scheduler = scheduler

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self(x), y))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}


def loader(count=240, batch_size=8, dtype=torch.float32):
    return DataLoader(TensorDataset(*data(count, dtype)), batch_size=batch_size)


def seeded(build, seed=0):
    torch.manual_seed(seed)
    return build()


def trainer(callbacks, **kwargs):
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    return pl.Trainer(callbacks=callbacks, **{**defaults, **kwargs})


def fit(callback, module=None, train=None, **kwargs):
    """Train a tiny classifier with the callback(s); return the module and its trainer."""
    module = module if module is not None else seeded(Lit)
    run = trainer(callback, **kwargs)
    run.fit(module, train if train is not None else loader())
    return module, run


class Watch(pl.Callback):
    """The counts of all layers after every step."""

    def __init__(self, callback):
        self.callback, self.counts, self.masks = callback, [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        held = self.callback.masks
        assert all(not module.get_parameter(name)[~mask].any() for name, mask in held.items())
        self.masks.append(held)
        self.counts.append([int(mask.sum()) for mask in held.values()])

    @property
    def moves(self):
        return sum(any(not torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(self.masks))


class StopsAfter(pl.Callback):
    """Ends the fit after this epoch, counted from 0."""

    def __init__(self, epoch=0):
        self.epoch = epoch

    def on_train_epoch_end(self, run, module):
        run.should_stop = run.current_epoch == self.epoch


class SavesFirst(pl.Callback):
    """A checkpoint after the first epoch, in the middle of a schedule."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, run, module):
        if run.current_epoch == 0:
            run.save_checkpoint(self.path)


def watched(callback, net=mlp, batches=12, **kwargs):
    watch = Watch(callback)
    module, run = fit([callback, watch], seeded(lambda: Lit(net())), loader(8 * batches), **{"max_epochs": 1, **kwargs})
    return watch, module, run


def state(callback):
    """All tensors of the callback's state, by path."""
    found = {}

    def walk(value, path):
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{path}/{key}")
        elif isinstance(value, torch.Tensor):
            found[path] = value.clone()

    walk(callback.state_dict(), "")
    return found


def same(a, b):
    """Equality to the last bit of nested tensors and values."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def has_fresh(callback):
    """Whether there may be connections that are active, but 0 since they are new."""
    return type(callback).__name__ in (*MASKED, *ROUNDS)


def effective(module, callback):
    """Whether the parameters (of a module or a state dict) are 0 just where the callback's masks say."""
    parameters = module if isinstance(module, dict) else dict(module.named_parameters())
    for name, mask in callback.masks.items():
        nonzero = parameters[name] != 0
        if (nonzero & ~mask).any() or not (has_fresh(callback) or torch.equal(nonzero, mask)):
            return False
    return True


def saved(run, path: Path) -> dict:
    run.save_checkpoint(path)
    return torch.load(path, weights_only=True)


def attached(callback, weights, grids=None):
    """A callback that has taken over ``weights``, matrices by name, active where they are not 0 (or ``grids`` says)."""
    module = nn.ParameterDict({name: nn.Parameter(torch.tensor(W)) for name, W in weights.items()})
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    callback.run_seed = 1
    callback.attach(select_parameters(module, include=["*"]), [optimizer], resumed=False)
    for name, W in weights.items():
        weight = callback._weights[name]
        weight.W.copy_(torch.tensor(W))
        weight.start(torch.tensor((grids or {}).get(name, W)).flatten().nonzero()[:, 0], callback.generator)
        weight.buffers = callback.new_buffers(weight)
    return module, next(iter(callback._groups)), list(callback._weights.values())


def grid(weight):
    return weight.mask.int().tolist()


def fits(counts, expected):
    """Whether counts agree with what is expected of them: chi-square within five standard deviations of its mean."""
    counts, expected = counts.double().flatten(), expected.double().flatten()
    assert not counts[expected == 0].any()
    counts, expected = counts[expected > 0], expected[expected > 0]
    assert expected.min() > 5, "too few draws to judge"
    freedom = len(counts) - 1
    return ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)


class Largest(TorchDispatchMode):
    """Note the size of the largest tensor made, views apart."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        plain = isinstance(result, torch.Tensor) and not result.is_meta and not is_sharded(result)
        if plain and result.layout == torch.strided:  # a sparse one wraps tensors that were made before
            self.size = max(self.size, result.untyped_storage().nbytes() // result.element_size())
        return result


class Scaler(torch.amp.GradScaler):
    """Scales by 1024 on the CPU and counts the steps it skips."""

    def __init__(self, scale=1024.0, interval=10**6):
        super().__init__("cpu", init_scale=scale, growth_interval=interval)
        self.skipped = 0

    def _maybe_opt_step(self, optimizer, optimizer_state, *args, **kwargs):
        self.skipped += bool(sum(v.item() for v in optimizer_state["found_inf_per_device"].values()))
        return super()._maybe_opt_step(optimizer, optimizer_state, *args, **kwargs)


class Unmixed(MixedPrecision):
    """Scaling as under 16-mixed, but no autocast: what remains is exactly comparable."""

    def __init__(self, scaler):
        super().__init__("16-mixed", "cpu", scaler)

    def forward_context(self):
        return torch.autocast("cpu", enabled=False)


def prune(module, outputs=0.4, inputs=0.3, weights=0.3, seed=0):
    """Set some weights, some outputs and some inputs of each layer to 0, and make batch norm do something."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                layer.weight *= torch.rand_like(layer.weight) > weights
                layer.weight[torch.rand(len(layer.weight)) < outputs] = 0
                if layer.weight.shape[1] > 3:
                    layer.weight[:, torch.rand(layer.weight.shape[1]) < inputs] = 0
            if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2)
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.normal_()
    return module.eval()


def two_of_four(out, inputs):
    return (torch.rand(out, inputs // 4, 4).argsort(2) < 2).reshape(out, inputs) * torch.ones(out, inputs)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
