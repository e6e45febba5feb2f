"""Zeros stay exact when a sparse network is quantised by torchao, after the training and during it."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sparse import DST, RigL
from lightning_sparse.compat.lightning import LightningModule, Trainer

quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
pt2e = pytest.importorskip("torchao.quantization.pt2e")
quantize_pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
qat = pytest.importorskip("torchao.quantization.qat")
X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


class Classifier(LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.5)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))


def trained(net, method):
    """Train it for some steps, and return the zeros of its weights."""
    loader = DataLoader(TensorDataset(X, torch.arange(32) % 3), batch_size=8)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    module = Classifier(net)
    Trainer(max_epochs=2, accelerator="cpu", callbacks=method, enable_model_summary=False, **quiet).fit(
        module, loader, loader
    )
    zeros = {name: weight == 0 for name, weight in net.named_parameters() if weight.ndim == 2}
    assert 0.2 < torch.cat([mask.flatten() for mask in zeros.values()]).float().mean() < 0.95
    return zeros


def kept(zeros, weights):
    """Tell whether each zero is one of the quantised weights."""
    return not any(weight[mask].any() for mask, weight in zip(zeros.values(), weights, strict=True))


def test_zeros_stay_through_the_training_of_a_graph_that_is_prepared_for_int8():
    graph = torch.export.export(mlp(), (X,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    config = x86.get_default_x86_inductor_quantization_config(is_qat=True)
    net = quantize_pt2e.prepare_qat_pt2e(graph, x86.X86InductorQuantizer().set_global(config))
    pt2e.allow_exported_model_train_eval(net)
    with pytest.raises(Exception, match=r"Module: only on request \(include\)"):
        trained(net, RigL(0.8))
    zeros = trained(net, RigL(0.8, update_every=2, include=["net.0.weight", "net.2.weight"]))
    expected = net(X).detach()
    int8 = quantize_pt2e.convert_pt2e(copy.deepcopy(net))
    weights = [buffer for buffer in int8.buffers() if buffer.dtype == torch.int8]
    assert kept(zeros, sorted(weights, key=len, reverse=True))
    assert (int8(X) - expected).norm() < 0.1 * expected.norm()


def test_zeros_stay_through_the_training_of_layers_that_round_their_weights():
    base = quantization.IntxWeightOnlyConfig(torch.int8, quantization.PerAxis(0))
    net = mlp()
    quantization.quantize_(net, qat.QATConfig(base, step="prepare"))
    assert isinstance(net[0], qat.FakeQuantizedLinear)
    zeros = trained(net, DST(alpha=0.02))
    quantization.quantize_(net, qat.QATConfig(base, step="convert"))
    assert kept(zeros, [net[0].weight.dequantize(), net[2].weight.dequantize()])


def test_zeros_stay_when_a_trained_network_is_quantised():
    net = mlp()
    zeros = trained(net, RigL(0.8, update_every=2))
    expected = net(X).detach()
    quantization.quantize_(net, quantization.Int8DynamicActivationInt8WeightConfig())
    assert kept(zeros, [net[0].weight.dequantize(), net[2].weight.dequantize()])
    assert 0 < (net(X) - expected).norm() < 0.05 * expected.norm()
