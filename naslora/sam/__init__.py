"""SAM for semantic segmentation: encoders, checkpoints, model, losses and export."""
