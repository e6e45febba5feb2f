"""Time of the products of a sparse layer on a GPU beside dense ones: ``python docs/gpu_products.py``.

Weight 4096 x 4096; medians in ms, of the kernels alone (``triton.testing.do_bench``).
"""

from functools import partial

import torch
from triton.testing import do_bench

time = partial(do_bench, warmup=20, rep=60, return_mode="median")

for n in (128, 2048):
    X, G, W = (torch.randn(4096, width, device="cuda") for width in (n, n, 4096))
    dense = {"float32": time(partial(torch.mm, W, X)), "bfloat16": time(partial(torch.mm, W.bfloat16(), X.bfloat16()))}
    torch.backends.cuda.matmul.allow_tf32 = True
    dense["TF32"] = time(partial(torch.mm, W, X))
    torch.backends.cuda.matmul.allow_tf32 = False
    print(f"batch {n}, one dense product: {dense}")
    for sparsity in (0.9, 0.98):
        S = (W * (torch.rand(4096, 4096, device="cuda") > sparsity)).to_sparse_csr()
        index = S.crow_indices().int(), S.col_indices().int()
        S = torch.sparse_csr_tensor(*index, S.values(), S.shape)
        out = torch.sparse_csr_tensor(*index, torch.zeros_like(S.values()), S.shape)
        product = time(partial(torch.mm, S, X))
        gradient = time(partial(torch.sparse.sampled_addmm, out, G, X.t(), beta=0.0, out=out))
        print(f"  sparsity {sparsity}: product {product:.4f}, gradient of the nonzeros {gradient:.4f}")
