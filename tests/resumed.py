"""Runs that are stopped and resumed: test_resume.py calls ``run_all`` in one fresh process for each of the two.

In the first, every case is trained and stopped early; in the second, it is continued from what the first left behind,
and trained without interruption, too.
"""

import os
import signal
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from helpers import HOOKED, PLAINLY, REPRESENTATIVES, ROUNDS, SETTINGS, Lit, data, loader, state, trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim.lr_scheduler import StepLR

BATCHES, EPOCHS = 12, 3
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=1e-2),
}
MORE = {
    "DFBST-late": lambda: SETTINGS["DFBST"](penalty_from_epoch=1),
    "DST-weight": lambda: SETTINGS["DST"](granularity="weight"),
    "AutoSparse-B": lambda: SETTINGS["AutoSparse"](backward_density=0.4, decay="exponential", alpha_zero_epoch=2),
    **ROUNDS,
}
METHODS = {**SETTINGS, **MORE}


def cases(method):
    """Return for each run its optimizer, how it is stopped, and batches a step.

    Interruptions within an epoch are all alike to a method: some stand for all.
    """
    found = [("SGD", "epoch", 1), ("AdamW", "middle", 2)]
    if method in (*REPRESENTATIVES, *HOOKED):
        found += [("SGD", stop, 1) for stop in ("data", "step", "sigterm")]
    return found


def name(optimizer, stop, accumulate):
    return f"{optimizer}-{stop}-{accumulate}"


class Batches:
    """Batches in an order drawn anew for each epoch; their place can be saved."""

    def __init__(self, fails_at=None):
        self.x, self.y = data(BATCHES * 8)
        self.epoch, self.position, self.fails_at = 0, 0, fails_at
        self.sampler = self  # for Lightning, which calls its set_epoch

    def __len__(self):
        return BATCHES

    def __iter__(self):
        self.position %= BATCHES
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(self.epoch)).view(BATCHES, -1)
        while self.position < BATCHES:
            if self.fails_at == (self.epoch, self.position):
                raise OSError("the disk")
            rows = order[self.position]
            self.position += 1
            yield self.x[rows], self.y[rows]

    def set_epoch(self, epoch):
        self.epoch = epoch

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Stops(Lit):
    """Takes its batches by epoch and number where ``by_index``; stops in the middle of epoch 1 if told to."""

    def __init__(self, optimizer, stop=None, by_index=False):
        super().__init__(optimizer=OPTIMIZERS[optimizer], scheduler=lambda o: StepLR(o, 1, 0.7))
        self.stop, self.by_index = stop, by_index

    def training_step(self, batch, batch_idx):
        if self.by_index:
            x, y = data(8, seed=100 * self.current_epoch + batch_idx)
            batch = x, y
        if self.current_epoch == 1 and batch_idx == 5:
            if self.stop == "step":
                raise ValueError("on purpose")
            if self.stop == "sigterm":
                os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(batch, batch_idx)


class StopsAfter(pl.Callback):
    """Stop after epoch 0, or a step after the checkpoint in the middle of epoch 1."""

    def __init__(self, stop, accumulate):
        self.stop, self.steps = stop, BATCHES // accumulate + 4

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = self.stop == "epoch"

    def on_train_batch_end(self, trainer, *args):
        if self.stop == "middle" and trainer.global_step == self.steps:
            raise KeyError("enough")


def run(mode, folder, method, optimizer, stop, accumulate):
    path = folder / name(optimizer, stop, accumulate)
    by_index = stop == "step"
    if mode == "whole":  # one for all stops
        path = folder / name(optimizer, by_index, accumulate)
        if Path(f"{path}.whole.pt").exists():
            return
    torch.manual_seed({"whole": 1, "stopped": 1, "resumed": 2}[mode])  # what the resumed run starts with is no matter
    callback = METHODS[method]()
    module = Stops(optimizer, stop if mode == "stopped" else None, by_index)
    callbacks = [callback]
    fails_at = None
    if mode == "stopped":
        fails_at = (1, 5) if stop == "data" else None
        callbacks.append(StopsAfter(stop, accumulate))
        if stop == "epoch":
            callbacks.append(ModelCheckpoint(folder, path.name))
        elif stop == "middle":
            every = BATCHES // accumulate + 3
            callbacks.append(ModelCheckpoint(folder, path.name, every_n_train_steps=every))
        else:
            callbacks.append(OnExceptionCheckpoint(folder, path.name))
    keep = mode == "stopped"
    fit = trainer(callbacks, max_epochs=EPOCHS, accumulate_grad_batches=accumulate, enable_checkpointing=keep)
    more = {"ckpt_path": f"{path}.ckpt", **PLAINLY} if mode == "resumed" else {}
    error = {"middle": KeyError, "data": OSError, "step": ValueError, "sigterm": SIGTERMException}.get(stop)
    try:
        fit.fit(module, loader(8 * BATCHES) if by_index else Batches(fails_at), **more)
    except (KeyError, OSError, ValueError, SIGTERMException) as raised:
        if mode != "stopped" or type(raised) is not error:
            raise
    else:
        assert mode != "stopped" or error is None, f"{path.name} was not stopped"
    if mode == "stopped":
        return
    result = {
        "parameters": module.state_dict(),
        "masks": callback.masks,
        "state": state(callback),
        "optimizer": fit.optimizers[0].state_dict(),
        "steps": fit.global_step,
        "sparsity": callback.sparsity,
    }
    torch.save(result, f"{path}.{mode}.pt")


def run_all(modes, folder, method):
    warnings.simplefilter("ignore")
    for case in cases(method):
        for mode in modes:
            run(mode, folder, method, *case)
