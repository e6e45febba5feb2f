#!/usr/bin/env bash
# Finding: an exponential average of weights shifts the integer buffers of a module, at some decays and not at others.
#
# Packages:  lightning 2.6.6 (EMAWeightAveraging), torch 2.14.1 (torch.optim.swa_utils), torchvision 0.29.1, CPU.
# Guessed:   what is averaged are floating-point numbers; an index or a count is copied, and the average of equal
#            numbers is that number.
# Found:     with use_buffers=True, which is Lightning's default, integer buffers are averaged, too, and cut to whole
#            numbers: decay * i + (1 - decay) * i is often a little less than i and becomes i - 1. In a Swin
#            Transformer 17 to 33 % of the relative positions then point to the neighbouring bias, so the network that
#            is validated and kept is another one, though nothing was trained (lr 0). Decays 0.99, 0.999 (Lightning's
#            default) and 0.9998 happen to leave all of them; 0.9, 0.9995, 0.9999 and 0.99998 do not. Counts stay at the
#            first value they had: a BatchNorm that saw 4 batches says 1. A boolean buffer, such as a mask, makes
#            the plain average (WeightAveraging as it is) raise at the second update.
# Output seen:
#   decay 0.9        661 of 2401 indices shifted    outputs differ
#   decay 0.99         0 of 2401 indices shifted    outputs are equal
#   decay 0.999        0 of 2401 indices shifted    outputs are equal
#   decay 0.9995     782 of 2401 indices shifted    outputs differ
#   decay 0.9998       0 of 2401 indices shifted    outputs are equal
#   decay 0.9999     417 of 2401 indices shifted    outputs differ
#   decay 0.99998    710 of 2401 indices shifted    outputs differ
#   batches that BatchNorm counted: 1 of 4
#   plain average beside a boolean mask: NotImplementedError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 lightning==2.6.6 torchvision==0.29.1 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import logging
import sys
import warnings
from importlib.metadata import version

warnings.simplefilter("ignore")
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.swin_transformer import SwinTransformer

logging.disable(logging.WARNING)
packages = ("torch", "lightning", "torchvision")
print(*(f"{name} {version(name)}" for name in packages), "python", sys.version.split()[0])


class Module(pl.LightningModule):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def training_step(self, batch, batch_idx):
        return self.network(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def average(network, callback, *shape):
    """Train for 4 steps that change no parameter, and leave the average in the network."""
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, callbacks=[callback], enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )
    trainer.fit(Module(network), DataLoader(TensorDataset(torch.randn(8, *shape)), batch_size=2))


def shifted(decay):
    """Return how many relative positions of a Swin Transformer an average shifts, and whether its outputs change."""
    torch.manual_seed(0)
    swin = SwinTransformer([4, 4], 24, depths=[1, 1], num_heads=[2, 2], window_size=[7, 7], num_classes=4).eval()
    attention = swin.features[1][0].attn
    nn.init.normal_(attention.relative_position_bias_table)
    x, index = torch.randn(2, 3, 56, 56), attention.relative_position_index.clone()
    before = swin(x).detach()
    average(swin.train(), EMAWeightAveraging(decay=decay), 3, 56, 56)
    differs = not torch.allclose(swin.eval()(x), before, atol=1e-6)
    count = (attention.relative_position_index != index).sum().item()
    outputs = "differ" if differs else "are equal"
    print(f"decay {decay:<8} {count:5d} of {index.numel()} indices shifted    outputs {outputs}")
    return count, differs


found = {decay: shifted(decay) for decay in (0.9, 0.99, 0.999, 0.9995, 0.9998, 0.9999, 0.99998)}
norm = nn.BatchNorm1d(4)
average(norm, EMAWeightAveraging(decay=0.99), 4)
print("batches that BatchNorm counted:", norm.num_batches_tracked.item(), "of 4")


class Masked(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
        self.register_buffer("mask", torch.eye(4, dtype=torch.bool))


try:
    average(Masked(), WeightAveraging(), 4)
    raised = None
except NotImplementedError as error:
    raised = type(error).__name__
print("plain average beside a boolean mask:", raised)
kept = {0.99: (0, False), 0.999: (0, False), 0.9998: (0, False)}
moved = {0.9: (661, True), 0.9995: (782, True), 0.9999: (417, True), 0.99998: (710, True)}
changed = found != kept | moved or norm.num_batches_tracked.item() != 1 or raised is None
sys.exit("the behaviour has changed" if changed else None)
PYTHON
