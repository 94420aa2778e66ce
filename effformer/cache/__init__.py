"""Feature caching: samplers that do not compute all blocks at every evaluation, with the same weights.

Example:
    >>> import torch
    >>> from effformer import build_model
    >>> from effformer.cache import cached
    >>> from effformer.flow import adapt, sample
    >>> field = cached(adapt(build_model("sit-nano").eval()), "reuse")
    >>> drawn = sample(field, torch.randn(1, 4, 32, 32), steps=10, y=torch.tensor([3]))
    >>> field.computed
    (1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0)
"""

from __future__ import annotations

from .adaptive import EasyCache as EasyCache
from .adaptive import FirstBlocks as FirstBlocks
from .adaptive import MagCache as MagCache
from .adaptive import TeaCache as TeaCache
from .calibrate import calibrate as calibrate
from .compare import CacheReport as CacheReport
from .compare import Contender as Contender
from .compare import compare as compare
from .graphs import GivenChange as GivenChange
from .graphs import ToldChange as ToldChange
from .policies import Evaluation as Evaluation
from .policies import Forecast as Forecast
from .policies import Mask as Mask
from .policies import NewtonForecast as NewtonForecast
from .policies import Policy as Policy
from .policies import Pyramid as Pyramid
from .policies import Reuse as Reuse
from .predict import Newton as Newton
from .predict import Predictor as Predictor
from .predict import Taylor as Taylor
from .velocity import Cached as Cached
from .velocity import Summary as Summary
from .velocity import cached as cached
