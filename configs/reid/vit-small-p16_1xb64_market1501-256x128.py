"""ViT-S/16 on Market-1501, 256 x 128 pixels: the start of *_baseline-ft.py and *_denoiserep.py.

The recipe is TransReID-SSL's: identity loss, triplet loss with soft margin, the feature before the neck at test time.
TransReID-SSL gives mAP 91.2 and rank-1 95.8 for it (a reproduction of its authors).
Untested at full size: no result is claimed.
"""

_base_ = [
    '../_base_/models/vit-small-p16_reid.py',
    '../_base_/datasets/market1501_256x128.py',
    '../_base_/schedules/reid_sgd_120e.py',
    '../_base_/reid_runtime.py',
]
