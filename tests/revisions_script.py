"""Show that two revisions train alike, bit for bit: run it with one on ``PYTHONPATH``, then with the other.

``revisions_script.py train A.pt`` trains every case and writes what it ends with to ``A.pt``, and a checkpoint of each
after its first epoch into ``A_checkpoints``. ``compare A.pt B.pt`` names the first tensor in which a case differs.
``resume A_checkpoints A.pt`` continues the checkpoints, which another revision may have written, and compares the ends.
``--only PATTERN`` takes some of the cases, such as ``--only 'RigL*-sparse-*'``. The exit status is 1 if anything
differs, fails or is missing. It uses only names that ``import lightning_sparse`` has, so it runs with old revisions.
"""

import argparse
import logging
import os
import sys
import time
import warnings
from fnmatch import fnmatch
from pathlib import Path

os.environ.setdefault("LIGHTNING_SPARSE_KERNELS", "torch")  # numba to compare the compiled loops

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import lightning_sparse as ls

EPOCHS = 3
BUDGET = {"sparsity": 0.8, "update_every": 4}
TOP_KAST = {"backward_sparsity": 0.5, "alpha": 0.9, "decay": "linear", "sparsity": 0.8, "update_every": 3}

#: name: method and its arguments, under which tiny networks get sparse, or connections move, within 30 steps
MASKED = {
    "SET": (ls.SET, BUDGET),
    "SET-epochs": (ls.SET, {"sparsity": 0.8, "update_every": None}),
    "RigL": (ls.RigL, BUDGET),
    "RigL-epochs": (ls.RigL, {"sparsity": 0.8, "update_every": None}),
    "GGR": (ls.GGR, {**BUDGET, "drop_fraction": 0.3, "stop_at": 0.9}),
    "SNFS": (ls.SNFS, BUDGET),
    "DSR": (ls.DSR, {**BUDGET, "init_threshold": 0.05}),
    "ITOP": (ls.ITOP, BUDGET),
    "ITOP-random": (ls.ITOP, {**BUDGET, "growth": "random"}),
    "MEST": (ls.MEST, {**BUDGET, "stop_at": 0.9}),
    "MEST-soft": (ls.MEST, {**BUDGET, "stop_at": 0.9, "soft_bound": True}),
    "DeepR": (ls.DeepR, {"sparsity": 0.8, "l1": 1e-3, "temperature": 1e-6}),
    "DeepR-global": (ls.DeepR, {"sparsity": 0.8, "l1": 1e-3, "temperature": 1e-6, "scope": "global"}),
    "MemoryEfficientDST-random": (ls.MemoryEfficientDST, {**BUDGET, "stop_at": 0.9, "heuristic": "random"}),
    "MemoryEfficientDST-grabo": (ls.MemoryEfficientDST, {**BUDGET, "stop_at": 0.9, "heuristic": "grabo"}),
    "MemoryEfficientDST-synflow": (ls.MemoryEfficientDST, {**BUDGET, "stop_at": 0.9, "heuristic": "synflow"}),
    "GraNet": (ls.GraNet, {**BUDGET, "end_at": 0.8}),
    "RandomPruning": (ls.RandomPruning, {"sparsity": 0.8}),
    "RandomPruning-uniform": (ls.RandomPruning, {"sparsity": 0.8, "distribution": "uniform", "seed": 5}),
    "SNIP": (ls.SNIP, {"sparsity": 0.8, "batches": 2}),
    "GraSP": (ls.GraSP, {"sparsity": 0.8}),
    "SynFlow": (ls.SynFlow, {"sparsity": 0.8, "rounds": 10}),
    "GMP": (ls.GMP, {"sparsity": 0.8, "update_every": 3, "scope": "global"}),
    "GMP-layer": (ls.GMP, {"sparsity": 0.8, "update_every": 3, "scope": "layer", "begin_at": 0.2}),
    "LotteryTicket": (ls.LotteryTicket, {"sparsity": 0.8, "rounds": 2}),
}
LATENT = {
    "TopKAST": (ls.TopKAST, TOP_KAST),
    "TopKAST-global": (ls.TopKAST, {**TOP_KAST, "scope": "global", "decay": "none", "update_every": 1}),
    "SWAT": (ls.SWAT, {"sparsity": 0.8, "activation_sparsity": 0.6, "update_every": 3}),
    "SWAT-global": (ls.SWAT, {"sparsity": 0.8, "scope": "global"}),
    "OptG": (ls.OptG, {"sparsity": 0.8, "update_every": 3}),
    "DST": (ls.DST, {"alpha": 5e-3}),
    "DST-layer": (ls.DST, {"alpha": 5e-3, "granularity": "layer"}),
    "DST-weight": (ls.DST, {"alpha": 5e-3, "granularity": "weight"}),
    "DFBST": (ls.DFBST, {"alpha": 5e-3, "beta": 0.5}),
    "DFBST-late": (ls.DFBST, {"alpha": 5e-3, "beta": 0.5, "penalty_from_epoch": 1, "granularity": "layer"}),
    "AutoSparse": (ls.AutoSparse, {"alpha": 0.6, "init_threshold": -2.5}),
    "AutoSparse-backward": (ls.AutoSparse, {"alpha": 0.6, "init_threshold": -2.5, "backward_density": 0.4}),
    "STR": (ls.STR, {"init_threshold": -2.5}),
    "STR-neuron": (ls.STR, {"init_threshold": -2.5, "granularity": "neuron"}),
}
#: those that also train with storage="sparse"
STORED = ["SET*", "RandomPruning*", "RigL*", "GGR", "ITOP*", "MEST*", "DSR", "MemoryEfficientDST*"]

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=1e-2),
}
#: batches an epoch, and settings of the Trainer: the CNN ends an epoch with half a window of accumulation
NETS = {
    "mlp": (10, {}),
    "cnn": (19, {"accumulate_grad_batches": 2}),
    "lstm": (10, {"gradient_clip_val": 1.0}),
}


def cases():
    """Return method, arguments, network and optimizer by the case's name."""
    found = {}
    for name, (method, options) in {**MASKED, **LATENT}.items():
        kinds = {"masked": options}
        if any(fnmatch(name, pattern) for pattern in STORED):
            kinds["sparse"] = {**options, "storage": "sparse"}
        if name == "RigL":
            kinds["sparse-nonzeros"] = {**options, "storage": "sparse", "plain_checkpoints": False}
        for kind, arguments in kinds.items():
            for net in NETS if kind == "masked" else ("mlp", "cnn"):  # an LSTM is refused
                for optimizer in OPTIMIZERS:
                    found[f"{name}-{kind}-{net}-{optimizer}"] = method, arguments, net, optimizer
    return found


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 8, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.lstm(x.view(len(x), 3, 4))[0][:, -1])


def network(name):
    if name == "mlp":
        return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 4))
    if name == "lstm":
        return Recurrent()
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 4)),
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


class Classifier(pl.LightningModule):
    def __init__(self, net, optimizer):
        super().__init__()
        self.net, self.optimizer = network(net), optimizer

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        optimizer = OPTIMIZERS[self.optimizer](self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": StepLR(optimizer, 1, 0.7)}


class SavesFirst(pl.Callback):
    """A checkpoint after the first epoch, and the masks there."""

    def __init__(self, path, method):
        self.path, self.method, self.masks = path, method, {}

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)
            self.masks = {name: mask.clone() for name, mask in self.method.masks.items()}


def batches(count):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(8 * count, 12, generator=generator)
    y = (x[:, :3].sum(1) > 0).long() + 2 * (x[:, 3:6].sum(1) > 0).long()
    return DataLoader(TensorDataset(x, y), batch_size=8)


def run(case, saves=None, resumes=None):
    """Train a case, from its start or from a checkpoint; return what it ends with, by kind and path."""
    method, arguments, net, optimizer = case
    count, options = NETS[net]
    pl.seed_everything(1 if resumes is None else 2, verbose=False)  # what a resumed run starts with is no matter
    callback, module = method(**arguments), Classifier(net, optimizer)
    first = SavesFirst(saves, callback)
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[callback, *([first] if saves else [])],
        max_epochs=EPOCHS,
        deterministic=True,  # storage="sparse" then takes the first backend, not the quickest
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    more = {} if resumes is None else {"ckpt_path": resumes, "weights_only": True}
    trainer.fit(module, batches(count), **more)
    ends = {
        "parameters": module.state_dict(),
        "masks": callback.masks,
        "thresholds": getattr(callback, "thresholds", {}),
        "latents": getattr(callback, "latents", {}),
        "callback": callback.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "steps": trainer.global_step,
    }
    masks = callback.masks
    density = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    moved = any(not torch.equal(mask, masks[name]) for name, mask in first.masks.items())
    return {"ends": dict(leaves(ends)), "density": density, "moved": moved}


def leaves(value, path=""):
    """Yield tensors, copied, and plain values by path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}/{index}")
    else:
        yield path, value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


def same(a, b):
    """Equality to the last bit: nan is nan, and -0 is not 0."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and a == b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def differences(before, after):
    """Return where two ends differ; a revision may add to the callback's state, and drop plain values from it."""
    found = []
    for path in [*before, *(path for path in after if path not in before)]:
        free = path.startswith("/callback/")
        if path not in after:
            if not free or isinstance(before[path], torch.Tensor):
                found.append(f"{path} is missing")
        elif path not in before:
            if not free:
                found.append(f"{path} is new")
        elif not same(before[path], after[path]):
            found.append(path)
    return found


def told(found):
    """Say in a few words where two ends differ."""
    return f"{found[0]}{f' and {len(found) - 1} more' if len(found) > 1 else ''}"


def cause(error):
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def train(chosen, file):
    folder = file.with_name(f"{file.stem}_checkpoints")
    folder.mkdir(parents=True, exist_ok=True)
    results, failed, start = {}, 0, time.perf_counter()
    for number, (name, case) in enumerate(chosen.items(), 1):
        try:
            results[name] = run(case, saves=folder / f"{name}.ckpt")
            result = f"density {results[name]['density']:.2f}{', moves' if results[name]['moved'] else ''}"
        except Exception as error:
            failed += 1
            results[name] = {"error": cause(error)}
            result = f"FAILED {cause(error)}"
        print(f"{number}/{len(chosen)} {time.perf_counter() - start:.0f} s {name}: {result}", flush=True)
    torch.save(results, file)
    moved = sum(result.get("moved", False) for result in results.values())
    print(f"{len(chosen)} cases, {failed} failed; masks change after the first epoch in {moved}")
    return failed


def compare(pattern, file, other):
    before, after = (torch.load(path, weights_only=True) for path in (file, other))
    names = [name for name in [*before, *(name for name in after if name not in before)] if fnmatch(name, pattern)]
    equal = 0
    for name in names:
        a, b = before.get(name, {"error": "missing"}), after.get(name, {"error": "missing"})
        if "error" in a or "error" in b:
            print(f"{name}: {a.get('error', 'trained')} | {b.get('error', 'trained')}")
        elif found := differences(a["ends"], b["ends"]):
            print(f"{name}: {told(found)}")
        else:
            equal += 1
    print(f"{len(names)} cases, {equal} equal")
    return len(names) - equal


def resume(chosen, folder, file):
    whole, equal = torch.load(file, weights_only=True), 0
    for number, (name, case) in enumerate(chosen.items(), 1):
        try:
            found = differences(whole[name]["ends"], run(case, resumes=folder / f"{name}.ckpt")["ends"])
            result = f"differs in {told(found)}" if found else "equal"
        except Exception as error:
            result = f"FAILED {cause(error)}"
        equal += result == "equal"
        print(f"{number}/{len(chosen)} {name}: {result}", flush=True)
    print(f"{len(chosen)} cases, {equal} equal")
    return len(chosen) - equal


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, paths in {"train": ["file"], "compare": ["file", "other"], "resume": ["folder", "file"]}.items():
        sub = commands.add_parser(command)
        for path in paths:
            sub.add_argument(path, type=Path)
        sub.add_argument("--only", default="*", metavar="PATTERN", help="glob pattern on the cases' names")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel("ERROR")
    if args.command == "compare":
        return compare(args.only, args.file, args.other)
    chosen = {name: case for name, case in cases().items() if fnmatch(name, args.only)}
    print(f"lightning_sparse of {Path(ls.__file__).parent.parent}, {len(chosen)} cases")
    return train(chosen, args.file) if args.command == "train" else resume(chosen, args.folder, args.file)


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
