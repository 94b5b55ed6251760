"""Adapters and merged models in files, several on one model, and models inside wrappers."""
