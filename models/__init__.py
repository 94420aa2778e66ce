"""Backbones assembled from registered parts; one family per file. Importing this package registers
their presets.
"""

if not __name__.startswith("effformer."):
    raise ImportError(
        "import effformer.models, not models: a second copy of every class would be loaded"
    )

from .base import Model, Preset
from .bert import Bert
from .dit import DiT
from .ditdh import DiTDH
from .dydit import DyDiT
from .factformer import FactFormer, IFactFormer
from .flowformer import FlowformerGPT
from .flowformer_series import FlowformerSeries
from .flowformer_vision import FlowformerVision
from .flowsep import FlowSep
from .flux import Flux
from .gencompositor import GenCompositor
from .lightningdit import LightningDiT
from .lmu_sequence import LMUSequence
from .lmuformer import LMUFormer, SpikingLMUFormer
from .macaron import MacaronNet
from .macaron_bert import MacaronBert
from .mmdit import MMDiT
from .predformer import PredFormer
from .rectok import RecTok
from .relactrl import RelaCtrl
from .sana import SANA
from .sit import SiT
from .starflow import STARFlow
from .tarflow import TarFlow
from .timm import vit_config_from_timm
from .triflow import TriFlow
from .triposg import TripoSG
from .triposg_vae import TripoSGVAE
from .twostream import JointDiT
from .vit import ViT
from .wan import Wan

__all__ = [
    "SANA",
    "Bert",
    "DiT",
    "DiTDH",
    "DyDiT",
    "FactFormer",
    "FlowSep",
    "FlowformerGPT",
    "FlowformerSeries",
    "FlowformerVision",
    "Flux",
    "GenCompositor",
    "IFactFormer",
    "JointDiT",
    "LMUFormer",
    "LMUSequence",
    "LightningDiT",
    "MMDiT",
    "MacaronBert",
    "MacaronNet",
    "Model",
    "PredFormer",
    "Preset",
    "RecTok",
    "RelaCtrl",
    "STARFlow",
    "SiT",
    "SpikingLMUFormer",
    "TarFlow",
    "TriFlow",
    "TripoSG",
    "TripoSGVAE",
    "ViT",
    "Wan",
    "vit_config_from_timm",
]
