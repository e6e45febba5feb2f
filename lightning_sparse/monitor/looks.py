"""Looks at the masks of a run: densities, exploration and churn of the connections, pictures."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.accounting.flops import Average
from lightning_sparse.accounting.masks import Explored, bits_of_part, churn, saved_bits
from lightning_sparse.compat.lightning import LightningModule, rank_zero_warn
from lightning_sparse.compat.shards import is_sharded, joined, layout, local
from lightning_sparse.monitor.collapse import CollapseAlarm
from lightning_sparse.monitor.layer import Layer, layers_of, picture
from lightning_sparse.rules.parts import Together, Whole, together
from lightning_sparse.trainer.callback import SparseCallback

__all__ = ["Looks"]


class Looks:
    """What the masks were at the latest look, and how they have changed.

    Args:
        collapse_below: see ``SparsityMonitor``.

    Attributes:
        methods: those whose masks are looked at.
        layers: the selected weights.
        held: what is here of each of them, and its shape, by name; after the fit, too.
        step: of the latest look.
        batches: since then.
        density: share of active weights, by name.
        gradient_density: share of gradients that the methods use.
        pictures: of the masks, see ``layer.picture``.
        moves: how often connections have moved, as far as the methods tell.
    """

    def __init__(self, collapse_below: float | None) -> None:
        self.methods: list[SparseCallback] = []
        self.layers: list[Layer] = []
        self.held: dict[str, tuple[Whole, tuple[int, ...]]] = {}
        self.step = 0
        self.batches = 0
        self.density: dict[str, float] = {}
        self.gradient_density: dict[str, float] = {}
        self.pictures: dict[str, Any] = {}
        self._alarm = CollapseAlarm(collapse_below)
        self._versions: list[tuple[SparseCallback, dict[str, int]]] = []  # of methods that tell
        self._bits: dict[str, Tensor] = {}
        self._epoch_bits: dict[str, Tensor] = {}  # at the end of the epoch before
        self._updates = Average()  # churn of each move of connections, of the epoch
        self.moves = 0
        self._explored = Explored()

    # ------------------------------------------------------------------ looks

    def begin(self, module: LightningModule) -> None:
        """Find the weights to look at."""
        self._find_layers(module)
        self._keep_fitting()

    @torch.no_grad()
    def look(self, module: LightningModule, step: int, moved: Sequence[SparseCallback], draw: bool = False) -> None:
        """See what the masks are now; ``draw`` them, too."""
        self.step, self.batches = step, 0
        gradients: dict[str, float] = {}
        for method in self.methods:
            gradients |= method.layer_gradient_density
        if not gradients.keys() <= self.gradient_density.keys():  # at first, and when weights join the training
            self._find_layers(module)
        before, self._bits = self._bits, {}
        self.gradient_density = gradients
        self._versions = [(method, versions) for method in self.methods if (versions := method.mask_versions)]
        self._see_layers(draw)
        changed = [layer.name for layer in self.layers if layer.method in moved and layer.name in before]
        if changed:
            self.moves += 1
            self._updates.add(self._churn(changed, before))

    def _find_layers(self, module: LightningModule) -> None:
        self.layers = layers_of(module, self.methods)
        self.held = {layer.name: (layer.part, layer.shape) for layer in self.layers}

    def due(self, every_n_batches: int) -> bool:
        """Tell whether masks that may change at any step have not been looked at for so many batches."""
        return self.batches >= every_n_batches and len(self._versions) < len(self.methods)

    def moved(self) -> list[SparseCallback]:
        """Return the methods that have moved connections since the last look, as far as they tell."""
        return [
            method
            for method, before in self._versions
            if any(version != before.get(name) for name, version in method.mask_versions.items())
        ]

    def begin_epoch(self) -> None:
        """Compare with the masks of now from here on."""
        self._epoch_bits, self._updates = self._bits, Average()

    def start_epochs(self) -> None:
        """Compare with the masks of the first look, unless a checkpoint has those of an epoch."""
        if not self._epoch_bits:
            self._epoch_bits = self._bits

    def _see_layers(self, draw: bool) -> None:
        """Take up all masks."""
        active: dict[str, int] = {}
        for layer in self.layers:
            if layer.method is None and layer.name in self.pictures:
                continue  # dense, and drawn
            mask = layer.mask()
            if layer.method is not None:
                active[layer.name] = int(torch.count_nonzero(mask))
                self._bits[layer.name] = self._explored.add(layer.name, mask)
            if draw:
                self.pictures[layer.name] = picture(layer, mask)
        counts = dict(zip(active, self._parts(active).total(*active.values()), strict=True))
        for layer in self.layers:
            if layer.name in counts:
                self.density[layer.name] = counts[layer.name] / layer.size
                self._alarm.check(layer, counts[layer.name], self.step)

    def _parts(self, names: Collection[str]) -> Together:
        """Return what answers for the weights ``names``."""
        return together([layer for layer in self.layers if layer.name in names])

    # ------------------------------------------------------------------ what they tell

    @property
    def churn(self) -> float | None:
        """Change since the end of the epoch before; None in a dense run."""
        known = [name for name in self._bits if name in self._epoch_bits]
        return self._churn(known, self._epoch_bits) if self.methods else None

    def _churn(self, names: Sequence[str], before: Mapping[str, Tensor]) -> float:
        return churn(_among(names, before), _among(names, self._bits), self._parts(names))

    @property
    def updates(self) -> int | None:
        """How often connections have moved; None where they may at any step, and in a dense run."""
        return self.moves if self._versions and len(self._versions) == len(self.methods) else None

    @property
    def churn_per_update(self) -> float | None:
        """Mean change by a move of connections in this epoch; None without any."""
        return self._updates.mean if self._updates.count else None

    @property
    def exploration(self) -> float | None:
        """Share of connections that have been active at any time; None in a dense run."""
        names = [layer.name for layer in self.layers]
        return self._explored.rate(names, self._parts(names)) if self.methods else None

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "updates": vars(self._updates).copy(),
            "moves": self.moves,
            "explored": {
                "bits": self._saved(self._explored.bits),
                "sizes": {
                    name: math.prod(self.held[name][1]) if name in self.held else size
                    for name, size in self._explored.sizes.items()
                },
            },
            "epoch_bits": self._saved(self._epoch_bits),
            "look": {
                "step": self.step,
                "density": dict(self.density),
                "gradient_density": dict(self.gradient_density),
            },
        }

    def _saved(self, bits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what a checkpoint has of bits."""
        return {name: saved_bits(x, *self.held[name]) if name in self.held else x for name, x in bits.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up what a checkpoint has kept."""
        self._updates = Average(**state_dict["updates"])
        self.moves = state_dict.get("moves", 0)  # earlier versions did not count them
        self._explored.load_state_dict(state_dict["explored"])
        self._epoch_bits = dict(state_dict["epoch_bits"])
        look = state_dict["look"]
        self.step, self.density = look["step"], dict(look["density"])
        self.gradient_density = dict(look["gradient_density"])

    @staticmethod
    def divided_state(module: LightningModule) -> dict[str, Any]:
        """Return a state whose masks are divided as the module's weights are."""
        divided = {name: weight for name, weight in module.named_parameters() if is_sharded(weight)}
        masks = {name: joined(torch.zeros_like(local(x), dtype=torch.bool), layout(x)) for name, x in divided.items()}
        return {"explored": {"bits": masks}, "epoch_bits": masks}

    def release(self) -> None:
        """Let go of the methods."""
        self.methods, self.layers, self._versions = [], [], []

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without what ties the looks to a fit."""
        return {**self.__dict__, "methods": [], "layers": [], "_versions": []}

    def _keep_fitting(self) -> None:
        """Forget what a checkpoint has of weights that are others now, or that train dense."""
        sizes = {layer.name: layer.size for layer in self.layers if layer.method is not None}
        fits = {name for name, size in self._explored.sizes.items() if sizes.get(name) == size}
        if dense := sorted(self.density.keys() - sizes.keys()):
            rank_zero_warn(
                f"In the run of the checkpoint {', '.join(dense)} trained sparse. No method holds them now: they train "
                "dense from here on. Give the Trainer the callback of that run to keep them sparse."
            )
        self.density = _known(fits, self.density)
        self.gradient_density = _known(fits, self.gradient_density)
        self._explored.keep(fits)
        self._explored.bits = self._here(self._explored.bits)
        self._explored.sizes = {name: self.held[name][0].length(n) for name, n in self._explored.sizes.items()}
        self._epoch_bits = self._here(_known(fits, self._epoch_bits))

    def _here(self, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the bits of what is here from what a checkpoint has."""
        return {name: bits_of_part(bits, *self.held[name]) for name, bits in saved.items()}


def _among(names: Iterable[str], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: values[name] for name in names}


def _known(names: set[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of ``values`` that are among ``names``."""
    return {name: value for name, value in values.items() if name in names}
