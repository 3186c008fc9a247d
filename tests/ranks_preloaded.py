"""What the process behind tests/ranks.py has loaded before it forks."""

import sklearn.datasets
import zarr

import pipeline.backbone.train
import pipeline.dump

__all__ = ["pipeline", "sklearn", "zarr"]
