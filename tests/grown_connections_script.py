"""Measure how far connections move after they have been grown, beside old ones, and what the loss does meanwhile.

``grown_connections_script.py`` prints a row for each optimizer and method: the median ``|dW|`` of new connections over
that of connections as old as the training, in their 1st, 2nd, 3rd, 5th, 10th and 30th update (the median over all
moves), and how much the loss on other data rises above that before the move. ``--only 'RigL AdamW*' 'SET SGD'`` takes
some rows, ``--width`` another network, ``--storage sparse`` the other store, ``--start`` another beginning of what a
grown connection keeps: ``layer`` the mean of its layer, ``zero``, or ``age`` (Adam alone) a count of updates for each
connection, with its own bias correction and a warm-up of ``--warm-up`` updates. It uses only public names but for
``--start``, so it runs with old revisions.
"""

import argparse
import logging
import statistics
import warnings
from collections import defaultdict
from fnmatch import fnmatch

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import SET, GraNet, RigL

STEPS = (1, 2, 3, 5, 10, 30)
METHODS = {"RigL": RigL, "SET": SET, "GraNet": lambda storage, **options: GraNet(**options)}
OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, 1e-3),
    "Adam fused": lambda p: torch.optim.Adam(p, 1e-3, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-3),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, 1e-3, foreach=True),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, 1e-3, amsgrad=True),
    "NAdam": lambda p: torch.optim.NAdam(p, 1e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, 2e-3),
    "Adamax": lambda p: torch.optim.Adamax(p, 4e-3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3),
    "RMSprop centered": lambda p: torch.optim.RMSprop(p, 1e-4, centered=True, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "Adadelta": lambda p: torch.optim.Adadelta(p, 1.0),
    "SGD": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
    "SGD plain": lambda p: torch.optim.SGD(p, 1e-2),
}


class Aged(torch.optim.Adam):
    """Adam that counts the updates of each connection; it takes one of which both moments are 0 for new."""

    warm_up = 1

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            (beta1, beta2), eps = group["betas"], group["eps"]
            for p in filter(lambda p: p.grad is not None, group["params"]):
                state = self.state[p]
                if not state:
                    state.update({key: torch.zeros_like(p) for key in ("age", "exp_avg", "exp_avg_sq")})
                age, m, v = state["age"], state["exp_avg"], state["exp_avg_sq"]
                age.masked_fill_((m == 0) & (v == 0), 0).add_(1)
                m.lerp_(p.grad, 1 - beta1)
                v.lerp_(p.grad.square(), 1 - beta2)
                rate = group["lr"] * (age / self.warm_up).clamp(max=1)
                p -= rate * (m / (1 - beta1**age)) / ((v / (1 - beta2**age)).sqrt() + eps)
        return loss


class Classifier(pl.LightningModule):
    def __init__(self, optimizer, width):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
        self.optimizer = optimizer

    def loss(self, x, y):
        return nn.functional.cross_entropy(self.net(x), y)

    def training_step(self, batch, batch_idx):
        return self.loss(*batch)

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class Watch(pl.Callback):
    """Note ``|dW|`` of new and old connections of the first layer, and the loss, some updates after each move."""

    def __init__(self, method, held_out):
        self.method, self.held_out = method, held_out
        self.updates, self.before, self.ever_grown = None, 0.0, False
        self.ratios, self.rises = defaultdict(list), defaultdict(list)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.W, self.mask = self.weight(pl_module), self.method.masks["net.0.weight"].clone()
        if batch_idx % self.method.update_every == 0:  # connections are to move
            self.before = self.held_out_loss(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        mask = self.method.masks["net.0.weight"]
        if (mask & ~self.mask).any():
            self.grown, self.updates = mask & ~self.mask, 0
            self.ever_grown = self.ever_grown | self.grown
        if self.updates is None or self.skipped(trainer):
            return
        self.updates += 1
        new, old = mask & self.grown, mask & ~self.ever_grown
        if self.updates in STEPS and new.sum() > 50:
            moved = (self.weight(pl_module) - self.W).abs()
            self.ratios[self.updates].append(float(moved[new].median() / moved[old].median()))
            self.rises[self.updates].append(self.held_out_loss(pl_module) - self.before)

    def skipped(self, trainer):
        """RigL's step that moves connections updates no weight, and no bias either."""
        return all(p.grad is None for p in trainer.lightning_module.parameters())

    def medians(self):
        return [statistics.median(self.ratios[step]) for step in STEPS]

    @torch.no_grad()
    def held_out_loss(self, pl_module):
        return float(pl_module.loss(*self.held_out))

    def weight(self, pl_module):
        layer = pl_module.net[0]
        dense = layer.dense_weight() if hasattr(layer, "dense_weight") else layer.weight
        return dense.detach().clone()


def begin_otherwise(start):
    """Let grown connections start with the mean of their layer, or with nothing."""
    from lightning_sparse.weights import masked, sparse

    def of_layer(sums, others, rows, otherwise, layer=None):
        return (sums.sum() / others.sum()).expand(len(rows))

    for module in (masked, sparse):
        if start == "layer":
            module.mean_of_others = of_layer
        else:
            module.SCALES = frozenset()


def measure(callback, optimizer, width=256, steps=900, seed=0):
    """Train a network of this width, of which a teacher tells the classes, and return what has been noted."""
    pl.seed_everything(seed, verbose=False)
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(width, 10, generator=generator)
    x = torch.randn(64 * steps + 1024, width, generator=generator)
    y = (x @ teacher + 3 * torch.randn(len(x), 10, generator=generator)).argmax(1)
    watch = Watch(callback, (x[-1024:], y[-1024:]))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet["enable_model_summary"] = False
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback, watch], **quiet)
    batches = TensorDataset(x[:-1024].view(steps, 64, width), y[:-1024].view(steps, 64))
    trainer.fit(Classifier(optimizer, width), DataLoader(batches, batch_size=None))
    return watch


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=["*"])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--storage", default="masked")
    parser.add_argument("--start", choices=("row", "layer", "zero", "age"), default="row")
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if arguments.start != "row":
        begin_otherwise(arguments.start)
    if arguments.start == "age":
        Aged.warm_up = arguments.warm_up
        OPTIMIZERS["Adam"] = lambda p: Aged(p, 1e-3)
    print("median |dW| of new over old, and rise of the loss, at updates", *STEPS)
    for method in METHODS:
        for name, optimizer in OPTIMIZERS.items():
            if any(fnmatch(f"{method} {name}", pattern) for pattern in arguments.only):
                callback = METHODS[method](sparsity=0.9, update_every=100, storage=arguments.storage)
                watch = measure(callback, optimizer, arguments.width, seed=arguments.seed)
                ratios = " / ".join(f"{ratio:.2f}" for ratio in watch.medians())
                rises = " / ".join(f"{statistics.mean(watch.rises[step]):+.3f}" for step in STEPS)
                print(f"{method:4s} {name:16s} {ratios}   {rises}", flush=True)


if __name__ == "__main__":
    main()
