"""Families of methods: when connections move, how many, in which order."""
