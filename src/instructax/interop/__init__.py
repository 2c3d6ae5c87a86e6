"""Weights of the outside world, in and out; nothing else of the house knows these formats."""
