"""``python -m lightning_sparse`` is ``lightning-sparse``."""

from lightning_sparse.cli import main

if __name__ == "__main__":
    main()
