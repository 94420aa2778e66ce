"""Training: data, loop, averaged weights, and a classifier that judges samples.

Example:
    >>> from effformer.train import load_data
    >>> load_data("digits")["x"].shape
    torch.Size([1797, 1, 8, 8])
"""

from .checkpoint import load_checkpoint, read_checkpoint, read_metrics, read_run
from .classifier import Classifier, accuracy, confusion, train_classifier
from .datasets import Dataset, load_data
from .ema import EMA
from .loop import DivergenceError, Evaluation, TrainConfig, TrainResult, train
from .objectives import Augmented, Batch, Classification, Generation, Objective
from .run import load_run
from .validation import Validation

__all__ = [
    "EMA", "Augmented", "Batch", "Classification", "Classifier", "Dataset", "DivergenceError",
    "Evaluation", "Generation", "Objective", "TrainConfig", "TrainResult", "Validation", "accuracy",
    "confusion", "load_checkpoint", "load_data", "load_run", "read_checkpoint", "read_metrics", "read_run", "train",
    "train_classifier",
]  # fmt: skip
