"""Sparse training for PyTorch Lightning: each method is one callback."""

from lightning_sparse.layers.kinds import register_layer
from lightning_sparse.methods.acdc import ACDC
from lightning_sparse.methods.autosparse import AutoSparse
from lightning_sparse.methods.cht import CHT
from lightning_sparse.methods.deepr import DeepR
from lightning_sparse.methods.dfbst import DFBST
from lightning_sparse.methods.dsr import DSR
from lightning_sparse.methods.dst import DST
from lightning_sparse.methods.fixed_mask import FixedMask
from lightning_sparse.methods.ggr import GGR
from lightning_sparse.methods.gmp import GMP
from lightning_sparse.methods.granet import GraNet
from lightning_sparse.methods.grasp import GraSP
from lightning_sparse.methods.itop import ITOP
from lightning_sparse.methods.lottery_ticket import LotteryTicket
from lightning_sparse.methods.memory_efficient_dst import GSE, MemoryEfficientDST
from lightning_sparse.methods.mest import MEST
from lightning_sparse.methods.one_shot import OneShot
from lightning_sparse.methods.optg import OptG
from lightning_sparse.methods.random_pruning import RandomPruning
from lightning_sparse.methods.rigl import RigL
from lightning_sparse.methods.set import SET
from lightning_sparse.methods.snfs import SNFS
from lightning_sparse.methods.snip import SNIP
from lightning_sparse.methods.srigl import SRigL
from lightning_sparse.methods.srste import SRSTE
from lightning_sparse.methods.sste import SSTE
from lightning_sparse.methods.str import STR
from lightning_sparse.methods.swat import SWAT
from lightning_sparse.methods.synflow import SynFlow
from lightning_sparse.methods.topkast import TopKAST
from lightning_sparse.monitor import SparsityMonitor
from lightning_sparse.storage.checkpoint import load_dense
from lightning_sparse.trainer.allreduce import MaskedAllreduce
from lightning_sparse.trainer.callback import SparseCallback
from lightning_sparse.trainer.loop import Attached, attach

__all__ = [
    "ACDC",
    "CHT",
    "DFBST",
    "DSR",
    "DST",
    "GGR",
    "GMP",
    "GSE",
    "ITOP",
    "MEST",
    "SET",
    "SNFS",
    "SNIP",
    "SRSTE",
    "SSTE",
    "STR",
    "SWAT",
    "Attached",
    "AutoSparse",
    "DeepR",
    "FixedMask",
    "GraNet",
    "GraSP",
    "LotteryTicket",
    "MaskedAllreduce",
    "MemoryEfficientDST",
    "OneShot",
    "OptG",
    "RandomPruning",
    "RigL",
    "SRigL",
    "SparseCallback",
    "SparsityMonitor",
    "SynFlow",
    "TopKAST",
    "__version__",
    "attach",
    "load_dense",
    "register_layer",
]

__version__ = "0.2.0"
