"""Folding trained adapters into the frozen weights, with the error measured."""
