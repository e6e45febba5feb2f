"""What benchmarks train: networks, methods, and a step of one with the other."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_sparse import (
    DFBST,
    DSR,
    DST,
    GGR,
    ITOP,
    MEST,
    SET,
    SNFS,
    STR,
    AutoSparse,
    DeepR,
    GraNet,
    MemoryEfficientDST,
    RigL,
)
from lightning_sparse.families.thresholds import Thresholded
from lightning_sparse.layers.selection import select_parameters
from lightning_sparse.trainer.callback import SparseCallback
from lightning_sparse.zoo.models import VGG16, LeNet300, MobileNetV2, ResNet18

__all__ = [
    "METHODS",
    "NETWORKS",
    "NEVER",
    "PRECISIONS",
    "Decoder",
    "attach",
    "bare_step",
    "batch_for",
    "on_meta",
    "precision_of",
]

#: an interval between updates that no benchmark comes to: connections move when it says so
NEVER = 10**12

PRECISIONS = ("32-true", "bf16-mixed")

METHODS: dict[str, Callable[..., SparseCallback]] = {
    "dst": lambda: DST(alpha=5e-4),
    "dfbst": lambda: DFBST(alpha=5e-4, beta=0.01),
    "autosparse": lambda: AutoSparse(alpha=0.75, init_threshold=-5.0),
    "str": lambda: STR(init_threshold=-5.0),
    "dst-target": lambda: DST(sparsity=0.9),
    "dfbst-target": lambda: DFBST(sparsity=0.9),
    "autosparse-target": lambda: AutoSparse(sparsity=0.9),
    "str-target": lambda: STR(sparsity=0.9),
    "deepr": partial(DeepR, sparsity=0.9),
}
for _method in (SET, RigL, SNFS, DSR, ITOP, MEST, GGR, MemoryEfficientDST, GraNet):
    METHODS[_method.__name__.lower()] = partial(_method, sparsity=0.9, update_every=NEVER)


def linear4096() -> nn.Module:
    """One layer of 4096 x 4096."""
    return nn.Sequential(nn.Linear(4096, 4096))


def mlp4096() -> nn.Module:
    """Three layers of 4096 x 4096."""
    return nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4096))


def mlp(width: int) -> nn.Module:
    """Five layers of ``width`` x ``width``."""
    layers = [layer for _ in range(5) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def small() -> nn.Module:
    """Two convolutions and a linear layer."""
    convolutions = nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class _Block(nn.Module):
    """Attention among places and an MLP, both normalised before and added to their input.

    Args:
        width: of each place, a multiple of ``heads``.
        heads: of the attention.
        causal: no place sees those behind it.
    """

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(batch, places, width)``."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        y: Tensor = x + self.mlp(self.norms[1](x))
        return y


class VisionTransformer(nn.Module):
    """A small ViT: 64 patches of 4 x 4, six blocks of width 192 with three heads, ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 192, 4, 4)
        self.blocks = nn.Sequential(*(_Block(192, 3) for _ in range(6)))
        self.head = nn.Linear(192, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images."""
        y: Tensor = self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))
        return y


class Embedding(nn.Module):
    """Sums of an embedding of tokens and one of their places."""

    def __init__(self, vocabulary: int, context: int, width: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(batch, places, width)``."""
        y: Tensor = self.tokens(x) + self.places(torch.arange(x.shape[1], device=x.device))
        return y


class Decoder(nn.Module):
    """A decoder as GPT-2's smallest one: twelve causal blocks of width 768 with 12 heads, 16,384 tokens."""

    VOCABULARY, CONTEXT, WIDTH = 16_384, 32, 768

    def __init__(self) -> None:
        super().__init__()
        self.embedding = Embedding(self.VOCABULARY, self.CONTEXT, self.WIDTH)
        self.blocks = nn.Sequential(*(_Block(self.WIDTH, 12, causal=True) for _ in range(12)))
        self.head = nn.Sequential(nn.LayerNorm(self.WIDTH), nn.Linear(self.WIDTH, self.VOCABULARY, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the tokens that follow."""
        y: Tensor = self.head(self.blocks(self.embedding(x)))
        return y


#: by name: how the network is built, and the shape of one input
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lenet300": (LeNet300, (1, 28, 28)),
    "small": (small, (3, 8, 8)),
    "vgg16": (VGG16, (3, 32, 32)),
    "linear4096": (linear4096, (4096,)),
    "mlp4096": (mlp4096, (4096,)),
    "resnet18": (ResNet18, (3, 32, 32)),
    "mlp8m": (partial(mlp, 1280), (1280,)),
    "mlp83m": (partial(mlp, 4096), (4096,)),
    "mlp300m": (partial(mlp, 7744), (7744,)),
    "mobilenet": (MobileNetV2, (3, 32, 32)),
    "vit": (VisionTransformer, (3, 32, 32)),
}


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Return a network whose linear layers and convolutions have no values yet."""
    with torch.device("meta"):
        module = build()
    for name, child in list(module.named_children()):
        if isinstance(child, Metric):
            delattr(module, name)  # it cannot leave the meta device
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d | nn.LayerNorm):
            layer.to_empty(device="cpu").reset_parameters()
    return module


def batch_for(network: str, size: int, device: str = "cpu") -> list[Tensor]:
    """Return random inputs and labels of ten classes."""
    return [torch.randn(size, *NETWORKS[network][1], device=device), torch.randint(10, (size,), device=device)]


def attach(callback: SparseCallback, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make the weights that the callback would choose by itself sparse, without a Trainer but for its plan.

    A target is met halfway: its plan is in the middle of the training.
    """
    strategy = SimpleNamespace(reduce=lambda x, reduce_op: x)
    callback._fit.trainer = cast(
        Any,
        SimpleNamespace(estimated_stepping_batches=NEVER, precision_plugin=None, strategy=strategy, global_rank=0),
    )
    callback.attach([choice for choice in select_parameters(module) if choice.reason is None], [optimizer], False)
    if isinstance(callback, Thresholded) and callback._target:
        callback._target.skip(NEVER // 2)


def precision_of(precision: str, device: torch.device | str) -> torch.autocast:
    """Return the context of a forward pass in one of ``PRECISIONS``."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16-mixed")


def bare_step(
    module: nn.Module,
    batch: list[Tensor],
    method: SparseCallback | None = None,
    model: nn.Module | None = None,
    precision: str = "32-true",
) -> Callable[[], None]:
    """Return a function that takes a step of training without a Trainer, by SGD with momentum and weight decay.

    Args:
        module: what is trained.
        batch: inputs and labels.
        method: attached to the module; default: none.
        model: what computes the module's outputs, such as its compiled form; default: the module.
        precision: one of ``PRECISIONS``: under bf16-mixed the forward pass runs under autocast.
    """
    compute = module if model is None else model
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    if method is not None:
        attach(method, module, optimizer)

    def step() -> None:
        optimizer.zero_grad()
        with precision_of(precision, batch[0].device):
            loss: Tensor = nn.functional.cross_entropy(compute(batch[0]), batch[1])
        loss.backward()  # type: ignore[no-untyped-call]
        if method is None:
            optimizer.step()
            return
        method.before_step(optimizer, 1.0, 1.0)
        method.before_update(optimizer)
        optimizer.step()
        method.after_update(optimizer)

    return step
