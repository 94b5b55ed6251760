"""The adapted layer: its configuration, its cell, and how it gets into a model."""
