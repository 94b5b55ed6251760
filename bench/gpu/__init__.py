"""Counts and checks of the GPU code, without a GPU."""
