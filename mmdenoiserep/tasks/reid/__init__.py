"""Re-identification of people and vehicles on mmpretrain's classes.

Importing it registers all names: ``custom_imports = dict(imports=['mmdenoiserep.tasks.reid'])``.
"""

from .check_hook import ReIDCheckHook
from .datasets import CUHK03, MSMT17, DukeMTMCReID, Market1501, VehicleID
from .head import BNNeckReIDHead, batch_hard_triplet_loss
from .metric import ReIDMetric
from .ranking import Ranking, rank_matches
from .sampler import PKSampler
from .vit import ReIDVisionTransformer

__all__ = [
    'CUHK03',
    'MSMT17',
    'BNNeckReIDHead',
    'DukeMTMCReID',
    'Market1501',
    'PKSampler',
    'Ranking',
    'ReIDCheckHook',
    'ReIDMetric',
    'ReIDVisionTransformer',
    'VehicleID',
    'batch_hard_triplet_loss',
    'rank_matches',
]
