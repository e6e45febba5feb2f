"""Layers with sparse weights, the choice of weights in a module, and hooks that listen to layers."""
