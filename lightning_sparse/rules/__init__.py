"""Pure functions of tensors and numbers: which, how many, when."""
