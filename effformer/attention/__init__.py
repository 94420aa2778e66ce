"""Token mixers and attention cores: importing this package registers them."""

from __future__ import annotations

from .axes import Axes, Lines
from .base import Core, CoreConfig, Mixer, Streaming, View
from .differential import Differential
from .efficient import Efficient
from .factorized import FactorizedChained, FactorizedParallel
from .flow import Flow
from .heads import Heads, HeadsConfig, Opened
from .linear import Linear, Sana
from .linformer import Linformer
from .lmu import LMU
from .longformer import Longformer
from .meeting import Meeting
from .multihead import Attention
from .nystrom import Nystrom
from .outputs import Input, OutputGate
from .performer import Performer
from .projections import AdaptiveProjections
from .reformer import Reformer
from .relative import Relative
from .softmax import Softmax
from .spiking_lmu import SpikingLMU
from .tdsm import TDSM
from .topk import TopK

__all__ = [
    "LMU",
    "TDSM",
    "AdaptiveProjections",
    "Attention",
    "Axes",
    "Core",
    "CoreConfig",
    "Differential",
    "Efficient",
    "FactorizedChained",
    "FactorizedParallel",
    "Flow",
    "Heads",
    "HeadsConfig",
    "Input",
    "Linear",
    "Lines",
    "Linformer",
    "Longformer",
    "Meeting",
    "Mixer",
    "Nystrom",
    "Opened",
    "OutputGate",
    "Performer",
    "Reformer",
    "Relative",
    "Sana",
    "Softmax",
    "SpikingLMU",
    "Streaming",
    "TopK",
    "View",
]
