"""Data sets: locating, decoding, caching, sampling and batching of images and masks."""
