"""Re-identification of people and vehicles, based on mmpretrain.

A config registers all classes by ``custom_imports = dict(imports=['mmdenoiserep.tasks.reid'])``.
"""

from ..datasets.pk_sampler import PKSampler
from ..datasets.reid_datasets import CUHK03, MSMT17, DukeMTMCReID, Market1501, VehicleID
from ..evaluation.reid_metric import ReIDMetric
from ..evaluation.reid_ranking import Ranking, rank_matches
from ..models.reid_head import BNNeckReIDHead, batch_hard_triplet_loss
from ..models.reid_vit import ReIDVisionTransformer
from .reid_check_hook import ReIDCheckHook

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
