"""What sparsity saves: operations, bytes, time; how masks look and change. Pure accounting."""
