"""Training: data, loop, averaged weights, and a classifier that judges samples.

Example:
    >>> from effformer.train import load_data
    >>> load_data("digits")["x"].shape
    torch.Size([1797, 1, 8, 8])
"""

from .checkpoint import load_checkpoint, read_checkpoint, read_metrics
from .classifier import Classifier, accuracy, train_classifier
from .datasets import Dataset, load_data
from .ema import EMA
from .loop import DivergenceError, TrainConfig, TrainResult, train
from .objectives import Batch, Classification, Generation, Objective

__all__ = [
    "EMA", "Batch", "Classification", "Classifier", "Dataset", "DivergenceError", "Generation",
    "Objective", "TrainConfig", "TrainResult", "accuracy", "load_checkpoint", "load_data",
    "read_checkpoint", "read_metrics", "train", "train_classifier",
]  # fmt: skip
