"""Re-identification of people and vehicles on mmpretrain's classes; importing it registers all names.

custom_imports = dict(imports=['mmdenoiserep.tasks.reid'], allow_failed_imports=False)
"""

from .head import BNNeckReIDHead, batch_hard_triplet_loss
from .sampler import PKSampler
from .vit import ReIDVisionTransformer

__all__ = ['BNNeckReIDHead', 'PKSampler', 'ReIDVisionTransformer', 'batch_hard_triplet_loss']
