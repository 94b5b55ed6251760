"""NAS-LoRA itself: the layer, its injection into a model, its files and its merging."""
