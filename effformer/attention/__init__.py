"""Token mixers and attention cores: importing this package registers them."""

from __future__ import annotations

from .agent import Agent
from .axes import Axes, Lines
from .base import Core, CoreConfig, Mixer, Streaming, View
from .delta import KDA, Delta, GatedDelta
from .differential import Differential
from .efficient import Efficient
from .factorized import FactorizedChained, FactorizedParallel
from .flow import Flow
from .focused import Focused
from .gla import GLA, SimpleGLA
from .heads import Heads, HeadsConfig, Opened
from .linear import Linear, Sana
from .linformer import Linformer
from .lmu import LMU
from .longformer import Longformer
from .meeting import Meeting
from .mlla import MLLA
from .multihead import Attention
from .nystrom import Nystrom
from .outputs import Input, OutputGate
from .performer import Performer
from .polaformer import PolaFormer
from .projections import AdaptiveProjections
from .rala import RALA
from .reformer import Reformer
from .relative import Relative
from .retention import Lightning, Retention
from .softmax import Softmax
from .spiking_lmu import SpikingLMU
from .ssd import SSD
from .tdsm import TDSM
from .topk import TopK

__all__ = [
    "GLA",
    "KDA",
    "LMU",
    "MLLA",
    "RALA",
    "SSD",
    "TDSM",
    "AdaptiveProjections",
    "Agent",
    "Attention",
    "Axes",
    "Core",
    "CoreConfig",
    "Delta",
    "Differential",
    "Efficient",
    "FactorizedChained",
    "FactorizedParallel",
    "Flow",
    "Focused",
    "GatedDelta",
    "Heads",
    "HeadsConfig",
    "Input",
    "Lightning",
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
    "PolaFormer",
    "Reformer",
    "Relative",
    "Retention",
    "Sana",
    "SimpleGLA",
    "Softmax",
    "SpikingLMU",
    "Streaming",
    "TopK",
    "View",
]
