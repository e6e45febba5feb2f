"""From a sparse network to what gains by it: fewer neurons, CSR, 2:4, ONNX, OpenVINO, small files, a table of them."""

from lightning_sparse.export.compaction import CompactReport, LayerReport, compact
from lightning_sparse.export.csr import CSRConv2d, CSRLinear, to_csr
from lightning_sparse.export.files import load_sparse, save_sparse
from lightning_sparse.export.measure import Benchmark, Measurement, benchmark
from lightning_sparse.export.onnx import to_onnx
from lightning_sparse.export.openvino import OpenVINOLayer, OpenVINOModel, to_openvino
from lightning_sparse.export.semi_structured import fits_2_4, to_semi_structured

__all__ = [
    "Benchmark",
    "CSRConv2d",
    "CSRLinear",
    "CompactReport",
    "LayerReport",
    "Measurement",
    "OpenVINOLayer",
    "OpenVINOModel",
    "benchmark",
    "compact",
    "fits_2_4",
    "load_sparse",
    "save_sparse",
    "to_csr",
    "to_onnx",
    "to_openvino",
    "to_semi_structured",
]
