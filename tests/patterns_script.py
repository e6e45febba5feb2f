"""Print how accurate networks of one sparsity are with each pattern, and with the methods that train N:M alone."""

import logging
import warnings

import torch
from starts_script import shown

from lightning_sparse import SRSTE, SSTE, RandomPruning, RigL

PATTERNS = ("unstructured", "1:4", "block:4x4", "row")
HEAD = {"exclude": ["fc3.weight"]}  # its rows are the classes


def main():
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print(f"dense {shown(list)}\n\n| method | {' | '.join(PATTERNS)} |\n|---|---|---|---|---|")
    for method in (RandomPruning, RigL):
        cells = [
            shown(
                lambda method=method, pattern=pattern: [method(0.75, distribution="uniform", pattern=pattern, **HEAD)]
            )
            for pattern in PATTERNS
        ]
        print(f"| {method.__name__} | {' | '.join(cells)} |", flush=True)
    for method in (SRSTE, SSTE):
        print(f"| {method.__name__} | | {shown(lambda method=method: [method('1:4', **HEAD)])} | | |", flush=True)


if __name__ == "__main__":
    main()
