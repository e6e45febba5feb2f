#!/usr/bin/env bash
# Finding: sparse sums of bfloat16 stop growing at 256 on a CPU, in torch and in JAX: also the gradient of an embedding.
#
# Packages:  torch 2.14.1, jax 0.10.2, CPU.
# Guessed:   a sum of bfloat16 is accumulated in float32 and rounded once, as dense products and sums do in both.
# Found:     where indices say what is added, each addition is rounded to bfloat16. 256 + 1 is 256, so the sum stays
#            there: the gradient of a token that occurs 4096 times in a batch is 256 instead of 4096 (float16: 2048).
#            The same in torch for a COO matrix times a dense one, coalesce and index_add, and in JAX for BCOO and BCSR
#            products and segment_sum. torch's scatter_add, embedding_bag and sparse.mm with reduce="sum" accumulate in
#            float32. So which of two operators for the same sum is called decides what it is.
# Output seen (4096 ones added up):
#   torch dense product     4096
#   torch embedding_bag     4096
#   torch CSR, reduce="sum" 4096
#   torch scatter_add       4096
#   torch embedding grad     256
#   torch COO product        256
#   torch coalesce           256
#   torch index_add          256
#   jax dense product       4096
#   jax BCOO product         256
#   jax BCSR product         256
#   jax segment_sum          256
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 jax==0.10.2 jaxlib==0.10.2 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import warnings
from importlib.metadata import version

warnings.simplefilter("ignore")
import jax
import jax.numpy as jnp
import torch
from jax.experimental.sparse import BCOO, BCSR
from torch import nn

print(*(f"{name} {version(name)}" for name in ("torch", "jax")), "python", sys.version.split()[0])
N = 4096
row, column = torch.ones(1, N, dtype=torch.bfloat16), torch.ones(N, 1, dtype=torch.bfloat16)
zeros = torch.zeros(N, dtype=torch.long)
jax_row, jax_column = jnp.ones((1, N), jnp.bfloat16), jnp.ones((N, 1), jnp.bfloat16)


def embedding_gradient():
    embedding = nn.Embedding(2, 1, dtype=torch.bfloat16)
    embedding(zeros).sum().backward()
    return embedding.weight.grad[0]


sums = {
    "torch dense product": lambda: row @ column,
    "torch embedding_bag": lambda: nn.functional.embedding_bag(zeros[None], column, mode="sum"),
    'torch CSR, reduce="sum"': lambda: torch.sparse.mm(row.to_sparse_csr(), column, "sum"),
    "torch scatter_add": lambda: torch.zeros(1, dtype=torch.bfloat16).scatter_add(0, zeros, row[0]),
    "torch embedding grad": embedding_gradient,
    "torch COO product": lambda: row.to_sparse() @ column,
    "torch coalesce": lambda: torch.sparse_coo_tensor(zeros[None], row[0], (1,)).coalesce().values(),
    "torch index_add": lambda: torch.zeros(1, dtype=torch.bfloat16).index_add(0, zeros, row[0]),
    "jax dense product": lambda: jax_row @ jax_column,
    "jax BCOO product": lambda: BCOO.fromdense(jax_row) @ jax_column,
    "jax BCSR product": lambda: BCSR.fromdense(jax_row) @ jax_column,
    "jax segment_sum": lambda: jax.ops.segment_sum(jax_row[0], jnp.zeros(N, jnp.int32), 1),
}
found = []
for name, add_up in sums.items():
    found.append(int(add_up().item()))
    print(f"{name:23s} {found[-1]:4d}")
sys.exit("the behaviour has changed" if found != [N] * 4 + [256] * 4 + [N] + [256] * 3 else None)
PYTHON
