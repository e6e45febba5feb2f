"""ONNX computes the same or is refused; the 2:4 pattern."""

import pytest
import torch
from helpers import prune, two_of_four
from torch import nn

from lightning_sparse.export import (
    compact,
    fits_2_4,
    to_csr,
    to_onnx,
    to_semi_structured,
)

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

# ---------------------------------------------------------------------- ONNX


def test_onnx_takes_any_batch_size_and_computes_the_same(tmp_path):
    net = prune(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    )
    x = torch.randn(1, 3, 6, 6)
    small, _ = compact(net, x)
    to_onnx(small, tmp_path / "net.onnx", x)
    session = pytest.importorskip("onnxruntime").InferenceSession(tmp_path / "net.onnx")
    batch = torch.randn(7, 3, 6, 6)
    (found,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
    assert torch.allclose(torch.from_numpy(found), net(batch), atol=1e-5)
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]


def test_sparse_weights_take_no_room_for_zeros_and_onnxruntime_computes_the_same(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Flatten(1, 2), nn.Linear(4, 70), nn.Linear(70, 3), nn.ReLU())
    with torch.no_grad():
        net[0].weight *= torch.rand_like(net[0].weight) > 0.9
        net[3].weight.zero_()
    x = torch.randn(2, 3, 6, 6)
    sizes = {}
    for sparse in (False, True):
        to_onnx(net, tmp_path / "net.onnx", x, sparse_weights=sparse)  # compares the outputs
        sizes[sparse] = (tmp_path / "net.onnx").stat().st_size
    graph = pytest.importorskip("onnx").load(tmp_path / "net.onnx").graph
    assert len(graph.sparse_initializer) == 2
    assert {tuple(weight.dims) for weight in graph.sparse_initializer} == {(40, 3, 3, 3), (4, 70)}
    saved = sum(layer.weight.nbytes - 12 * int(layer.weight.count_nonzero()) for layer in (net[0], net[3]))
    assert sizes[False] - sizes[True] == pytest.approx(saved, abs=300)


class Unfaithful:
    """A session that gives something else than the module."""

    def get_inputs(self):
        return [type("Slot", (), {"name": "x"})]

    def run(self, names, given):
        return [2 * next(iter(given.values()))]


def test_onnx_that_computes_something_else_is_refused_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_sparse.export.onnx.onnx_session", lambda path: Unfaithful())
    with pytest.raises(RuntimeError, match=r"net.onnx in onnxruntime differs from the module by"):
        to_onnx(nn.Sequential(nn.ReLU()), tmp_path / "net.onnx", torch.ones(2, 3))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- 2:4


def test_the_pattern_is_at_most_two_nonzeros_in_every_four_neighbours():
    weight = two_of_four(32, 64)
    assert fits_2_4(weight)
    assert fits_2_4(torch.zeros(3, 8))
    weight[5, 8:12] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert not fits_2_4(weight)
    assert not fits_2_4(torch.tensor([[0.0, 1, 1, 1, 1, 0, 0, 0]])), "groups of four do not overlap"
    assert not fits_2_4(torch.zeros(3, 6)), "six is not a multiple of four"


def test_semi_structured_refuses_other_patterns_and_sizes():
    with pytest.raises(ValueError, match="None of the 1 Linear layers has the 2:4 pattern"):
        to_semi_structured(nn.Sequential(nn.Linear(64, 32)))
    small = nn.Linear(8, 4)
    small.weight.data = two_of_four(4, 8)
    with pytest.raises(ValueError, match="out a multiple of 32, in of 64"):
        to_semi_structured(small)


def test_semi_structured_refuses_to_work_without_cuda(monkeypatch):
    linear = nn.Linear(64, 32)
    linear.weight.data = two_of_four(32, 64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        to_semi_structured(linear)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match=r"weight is torch.float32 on cpu. Call module.cuda\(\).half\(\)"):
        to_semi_structured(nn.Sequential(linear))


class Variadic(nn.Module):
    """A forward that names no argument of its own."""

    def __init__(self, follow=True):
        super().__init__()
        self.linear, self.follow = nn.Linear(4, 3), follow

    def forward(self, *args, **kwargs):
        return self.linear(args[0]) if self.follow else self.linear(args[0] * kwargs.get("scale", 1.0))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, *args):
        return self.linear(args[0]) if float(args[0].sum()) > 0 else args[0][:, :3]


def test_a_forward_with_any_arguments_is_exported_if_it_can_be_followed(tmp_path):
    pytest.importorskip("onnxruntime")
    module, x = Variadic(), torch.randn(2, 4)
    small, _ = compact(module, x)
    assert torch.allclose(small(x), module(x), atol=1e-6)
    to_onnx(module, tmp_path / "net.onnx", x)


def test_a_forward_with_any_arguments_that_cannot_be_followed_is_refused_with_the_remedy(tmp_path):
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"(?s)torch\.fx cannot trace Variadic: .*take \*args or \*\*kwargs.* name"):
        compact(Variadic(follow=False), x)
    pytest.importorskip("onnxruntime")
    with pytest.raises(ValueError, match=r"(?s)torch\.export cannot trace Branching: .*take \*args.* name"):
        to_onnx(Branching(), tmp_path / "net.onnx", x)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"torch\.export cannot trace Sequential: .*"):
        to_onnx(to_csr(nn.Sequential(nn.Linear(4, 3)), min_sparsity=0.0), tmp_path / "net.onnx", x)


@pytest.mark.parametrize("tolerance", [float("nan"), -1.0, float("inf"), "1e-4"])
def test_a_tolerance_that_compares_nothing_is_refused(tolerance, tmp_path):
    for export in (
        lambda: to_onnx(nn.Linear(4, 3), tmp_path / "net.onnx", torch.randn(2, 4), tolerance=tolerance),
        lambda: compact(nn.Linear(4, 3), torch.randn(2, 4), tolerance=tolerance),
    ):
        with pytest.raises(ValueError, match=r"tolerance must be a finite number of at least 0, got .* Leave it out"):
            export()
