"""Public packages with modules of their own, trained by five methods: the table of guides/layers.md.

``python docs/packages.py`` trains each package that is installed, in a process of its own, and prints a table: the
share of zeros among the weights that were chosen, and among all parameters with two or more dimensions; or the error
with which a method refuses. ``--package`` and ``--method`` choose. CPU, some minutes.
"""

import argparse
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_sparse as ls

METHODS: dict[str, Callable[[], ls.SparseCallback]] = {
    "DST": lambda: ls.DST(sparsity=0.8, begin_at=0.0, end_at=0.7),
    "RigL": lambda: ls.RigL(0.8, update_every=2),
    "RigL sparse": lambda: ls.RigL(0.8, update_every=2, storage="sparse"),
    "SynFlow": lambda: ls.SynFlow(0.8),
    "GMP": lambda: ls.GMP(0.8, update_every=1, begin_at=0.0, end_at=0.7),
}
STEPS = 12
TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Wrapped(pl.LightningModule):
    """A network with the loss of its own outputs."""

    def __init__(self, net: nn.Module, loss: Callable[[nn.Module, object], torch.Tensor]) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, *args, **kwargs):
        """Return what the network does."""
        return self.net(*args, **kwargs)

    def training_step(self, batch, batch_idx):
        """Return the loss of a batch."""
        return self.loss(self.net, batch)

    def configure_optimizers(self):
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(module: pl.LightningModule, loader: object, callbacks: list[pl.Callback]) -> nn.Module:
    """Train some steps; return the module."""
    pl.Trainer(max_steps=STEPS, max_epochs=100, callbacks=callbacks, **TRAINER).fit(module, loader)
    return module


def images(batch: int = 4, size: int = 32) -> DataLoader:
    """Return random images of four classes."""
    data = [(torch.randn(3, size, size), torch.tensor(i % 4)) for i in range(6 * batch)]
    return DataLoader(data, batch_size=batch)


def classify(net: nn.Module, batch: object) -> torch.Tensor:
    """Return the cross-entropy of images."""
    x, y = batch
    return nn.functional.cross_entropy(net(x), y)


# ---------------------------------------------------------------------- packages


def transformers_gpt2(callbacks):
    """GPT-2, whose Conv1D layers keep their weights as (inputs, outputs)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    tokens = [{"input_ids": torch.randint(64, (16,))} for _ in range(24)]
    step = lambda net, batch: net(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss  # noqa: E731
    return fit(Wrapped(GPT2LMHeadModel(config), step), DataLoader(tokens, batch_size=4), callbacks)


def transformers_bert(callbacks):
    """BERT with a head for four classes."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=4
    )
    rows = [
        {"input_ids": torch.randint(64, (12,)), "attention_mask": torch.ones(12), "labels": torch.tensor(i % 4)}
        for i in range(24)
    ]
    step = lambda net, batch: net(**batch).loss  # noqa: E731
    return fit(Wrapped(BertForSequenceClassification(config), step), DataLoader(rows, batch_size=4), callbacks)


def transformers_t5(callbacks):
    """T5, which casts to the type of ``layer.weight``."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0)
    rows = [{"input_ids": torch.randint(64, (10,)), "labels": torch.randint(64, (6,))} for _ in range(24)]
    step = lambda net, batch: net(**batch).loss  # noqa: E731
    return fit(Wrapped(T5ForConditionalGeneration(config), step), DataLoader(rows, batch_size=4), callbacks)


def timm_vit(callbacks):
    """A small vision transformer."""
    import timm

    net = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=4, depth=2, embed_dim=48, num_heads=3)
    return fit(Wrapped(net, classify), images(), callbacks)


def timm_resnet(callbacks):
    """A small ResNet."""
    import timm

    return fit(Wrapped(timm.create_model("test_resnet.r160_in1k", num_classes=4), classify), images(), callbacks)


def timm_nfnet(callbacks):
    """A normaliser-free ResNet, whose convolutions standardise their weights: they stay dense, with a warning."""
    import timm

    net = timm.create_model("nf_resnet26", num_classes=4, channels=(16, 32, 64, 64), stem_chs=16)
    return fit(Wrapped(net, classify), images(), callbacks)


def torch_geometric_gcn(callbacks):
    """A graph convolution network on random graphs."""
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader as GraphLoader
    from torch_geometric.nn import GCN, global_mean_pool

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gcn, self.head = GCN(8, 32, 2), nn.Linear(32, 4)

        def forward(self, data):
            return self.head(global_mean_pool(self.gcn(data.x, data.edge_index), data.batch))

    graphs = [
        Data(x=torch.randn(6, 8), edge_index=torch.randint(6, (2, 14)), y=torch.tensor([i % 4])) for i in range(24)
    ]
    step = lambda net, data: nn.functional.cross_entropy(net(data), data.y)  # noqa: E731
    return fit(Wrapped(Net(), step), GraphLoader(graphs, batch_size=4), callbacks)


def pytorch_forecasting_tft(callbacks):
    """A temporal fusion transformer, a LightningModule of the package."""
    import pandas as pd
    from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet

    frame = pd.DataFrame({"t": [*range(40)] * 3, "series": [str(i) for i in range(3) for _ in range(40)]})
    frame["y"] = torch.randn(len(frame)).numpy()
    data = TimeSeriesDataSet(
        frame, "t", "y", ["series"], max_encoder_length=8, max_prediction_length=4,
        time_varying_unknown_reals=["y"], time_varying_known_reals=["t"], static_categoricals=["series"],
    )  # fmt: skip
    module = TemporalFusionTransformer.from_dataset(data, hidden_size=16, attention_head_size=2)
    return fit(module, data.to_dataloader(train=True, batch_size=8), callbacks)


def segmentation_models_unet(callbacks):
    """A U-Net with a ResNet encoder."""
    import segmentation_models_pytorch as smp

    net = smp.Unet("resnet18", encoder_weights=None, classes=4, decoder_channels=(32, 16, 16, 8, 8))
    data = [(torch.randn(3, 32, 32), torch.randint(4, (32, 32))) for _ in range(16)]
    return fit(Wrapped(net, classify), DataLoader(data, batch_size=4), callbacks)


def lightly_simclr(callbacks):
    """SimCLR on a small backbone."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), SimCLRProjectionHead(256, 64, 32)
    )
    loss = NTXentLoss()
    step = lambda net, batch: loss(net(batch[0]), net(batch[0] + 0.1 * torch.randn_like(batch[0])))  # noqa: E731
    return fit(Wrapped(net, step), images(), callbacks)


def chemprop_mpnn(callbacks):
    """A message-passing network on molecules, a LightningModule of the package."""
    from chemprop import data, models
    from chemprop import nn as layers

    molecules = ["CCO", "CCN", "CCC", "c1ccccc1", "CC(=O)O", "CCCl"] * 4
    points = [data.MoleculeDatapoint.from_smi(smiles, [float(len(smiles))]) for smiles in molecules]
    loader = data.build_dataloader(data.MoleculeDataset(points), batch_size=4, num_workers=0)
    parts = layers.BondMessagePassing(d_h=32), layers.MeanAggregation(), layers.RegressionFFN(input_dim=32)
    return fit(models.MPNN(*parts), loader, callbacks)


def scvi_scvi(callbacks):
    """A variational autoencoder of single cells, trained by the package's own Trainer."""
    import anndata
    import numpy as np
    from scvi.model import SCVI

    cells = anndata.AnnData(np.random.default_rng(0).poisson(2, (96, 40)).astype("float32"))
    SCVI.setup_anndata(cells)
    model = SCVI(cells, n_hidden=32, n_latent=4)
    model.train(max_epochs=4, batch_size=32, accelerator="cpu", callbacks=callbacks, train_size=1.0, logger=False)
    return model.module


def neuralforecast_nhits(callbacks):
    """NHITS, trained by the package's own Trainer."""
    import pandas as pd
    from neuralforecast import NeuralForecast
    from neuralforecast.models import NHITS

    days = pd.date_range("2024-01-01", periods=60)
    frame = pd.concat([pd.DataFrame({"unique_id": i, "ds": days, "y": torch.randn(60).numpy()}) for i in range(3)])
    model = NHITS(h=4, input_size=8, max_steps=STEPS, mlp_units=[[32, 32]] * 3, callbacks=callbacks, **TRAINER)
    forecast = NeuralForecast(models=[model], freq="D")
    forecast.fit(frame)
    callbacks[:] = forecast.models[0].trainer_kwargs["callbacks"]  # it trains a copy
    return forecast.models[0]


def darts_nbeats(callbacks):
    """N-BEATS, trained by the package's own Trainer."""
    from darts import TimeSeries
    from darts.models import NBEATSModel

    series = TimeSeries.from_values(torch.randn(80).numpy())
    options = {key: value for key, value in TRAINER.items() if key != "enable_model_summary"}
    model = NBEATSModel(
        8, 4, n_epochs=4, num_stacks=2, layer_widths=32, batch_size=16,
        pl_trainer_kwargs={**options, "callbacks": callbacks},
    )  # fmt: skip
    model.fit(series)
    return model.model


PACKAGES = {
    "transformers (GPT-2)": ("transformers", transformers_gpt2),
    "transformers (BERT)": ("transformers", transformers_bert),
    "transformers (T5)": ("transformers", transformers_t5),
    "timm (ViT)": ("timm", timm_vit),
    "timm (ResNet)": ("timm", timm_resnet),
    "timm (NF-ResNet)": ("timm", timm_nfnet),
    "torch_geometric (GCN)": ("torch_geometric", torch_geometric_gcn),
    "pytorch-forecasting (TFT)": ("pytorch_forecasting", pytorch_forecasting_tft),
    "segmentation-models-pytorch (U-Net)": ("segmentation_models_pytorch", segmentation_models_unet),
    "lightly (SimCLR)": ("lightly", lightly_simclr),
    "chemprop (MPNN)": ("chemprop", chemprop_mpnn),
    "scvi-tools (SCVI)": ("scvi", scvi_scvi),
    "neuralforecast (NHITS)": ("neuralforecast", neuralforecast_nhits),
    "darts (N-BEATS)": ("darts", darts_nbeats),
}


def cell(package: str, method: str) -> dict[str, object]:
    """Train one package with one method; return what came out."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    callbacks = [METHODS[method]()]
    try:
        module = PACKAGES[package][1](callbacks)
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    matrices = [p for p in module.parameters() if p.ndim > 1]
    zeros = sum(int((p == 0).sum()) for p in matrices)
    return {"chosen": callbacks[0].sparsity, "matrices": zeros / sum(p.numel() for p in matrices)}


def main() -> None:
    """Train all cells and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", nargs="*", choices=PACKAGES, default=list(PACKAGES))
    parser.add_argument("--method", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        for method in args.method:
            print(json.dumps(cell(args.package[0], method)), flush=True)
        return
    print("|".join(["", "package", "version", *args.method, ""]))
    print("|".join(["", *["---"] * (2 + len(args.method)), ""]))
    errors = []
    for package in args.package:
        name = PACKAGES[package][0]
        if find_spec(name) is None:
            print(f"|{package}|not installed|" + "|" * len(args.method))
            continue
        command = [sys.executable, __file__, "--child", "--package", package, "--method", *args.method]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
        row = []
        for method in args.method:
            result = found.pop(0) if found else {"error": "no result", "message": done.stderr[-300:]}
            if "error" in result:
                errors.append(f"{package}, {method}: {result['error']}: {result['message'][:900]}")
                row.append(result["error"])
            else:
                row.append(f"{result['chosen']:.3f} / {result['matrices']:.3f}")
        try:
            number = version({"scvi": "scvi-tools"}.get(name, name.replace("_", "-")))
        except PackageNotFoundError:
            number = ""
        print("|".join(["", package, number, *row, ""]), flush=True)
    print("", *errors, sep="\n")


if __name__ == "__main__":
    main()
