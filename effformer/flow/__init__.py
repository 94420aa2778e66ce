"""Rectified flow: conventions, paths, losses, samplers, guidance; and normalizing flows: densities and
inversion.

Time runs from noise (t = 0) to data (t = 1) and a velocity is ``v(x, t, **cond) = dx/dt``. Networks
that count otherwise come in through `adapt`.

Example:
    >>> import torch
    >>> from effformer.flow import sample
    >>> sample(lambda x, t: torch.ones_like(x), torch.zeros(2, 1), steps=4).x.flatten()
    tensor([1., 1.])
"""

from __future__ import annotations

from . import reference as reference
from .contraction import Contraction as Contraction
from .contraction import contractions as contractions
from .contraction import inversion_plan as inversion_plan
from .conventions import CONVENTIONS as CONVENTIONS
from .conventions import FlowConvention as FlowConvention
from .conventions import Trained as Trained
from .conventions import Velocity as Velocity
from .conventions import VelocityField as VelocityField
from .conventions import adapt as adapt
from .conventions import flip as flip
from .conventions import get_convention as get_convention
from .conventions import trained_of as trained_of
from .diffusion import Diffusion as Diffusion
from .diffusion import DiffusionLoss as DiffusionLoss
from .diffusion import PosteriorMean as PosteriorMean
from .diffusion import space_timesteps as space_timesteps
from .guidance import Guidance as Guidance
from .guidance import Guided as Guided
from .guidance import Weak as Weak
from .guidance import forward_with_cfg as forward_with_cfg
from .guidance import guided as guided
from .inversion import Away as Away
from .inversion import Inversion as Inversion
from .inversion import Inverted as Inverted
from .inversion import invert as invert
from .likelihood import Likelihood as Likelihood
from .likelihood import LikelihoodOutput as LikelihoodOutput
from .likelihood import bits_per_dim as bits_per_dim
from .likelihood import denoised as denoised
from .likelihood import log_likelihood as log_likelihood
from .losses import Distillation as Distillation
from .losses import FlowMatching as FlowMatching
from .losses import LossOutput as LossOutput
from .losses import PseudoHuber as PseudoHuber
from .losses import cosine_distance as cosine_distance
from .losses import loss_weight as loss_weight
from .metrics import frechet_distance as frechet_distance
from .metrics import straightness as straightness
from .multistep import DPMSolver2M as DPMSolver2M
from .multistep import UniPC as UniPC
from .paths import DDPM as DDPM
from .paths import GVP as GVP
from .paths import VP as VP
from .paths import Linear as Linear
from .paths import Path as Path
from .paths import get_path as get_path
from .paths import time_interval as time_interval
from .samplers import SampleResult as SampleResult
from .samplers import sample as sample
from .sde import diffusion_coefficient as diffusion_coefficient
from .times import CosMap as CosMap
from .times import Fixed as Fixed
from .times import KStep as KStep
from .times import LogitNormal as LogitNormal
from .times import Mode as Mode
from .times import Shifted as Shifted
from .times import Stratified as Stratified
from .times import TimeGrid as TimeGrid
from .times import TimeLaw as TimeLaw
from .times import Uniform as Uniform
from .times import UShaped as UShaped
from .times import get_time_law as get_time_law
from .times import shift_of_length as shift_of_length
