"""ViT-S/16 on CUHK-03, 256 x 128 pixels: the start of *_baseline-ft.py and *_denoiserep.py.

The recipe is TransReID-SSL's: identity loss, triplet loss with soft margin, the feature before the neck at test time.
Untested at full size: no result is claimed.
The boxes are the labeled ones; which ones the official numbers are for, its code leaves open.
"""

_base_ = [
    '../_base_/models/vit-small-p16_reid.py',
    '../_base_/datasets/cuhk03_256x128.py',
    '../_base_/schedules/reid_sgd_120e.py',
    '../_base_/reid_runtime.py',
]

model = dict(head=dict(num_classes=767))
