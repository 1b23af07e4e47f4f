"""The libraries' inferencers take a fused file alone: it has the vanilla config, the class names and the palette."""

from pathlib import Path

import numpy as np
import torch
from mmdet.apis import DetInferencer
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.apis import ImageClassificationInferencer
from mmseg.apis import MMSegInferencer

import mmdenoiserep  # noqa: F401
from helpers import randomise
from mmdenoiserep import fuse_checkpoint
from mmdenoiserep.core import DenoiseLayer

CLASSES = ('cat', 'dog', 'hen')
PALETTE = np.array([[1, 2, 3], [40, 50, 60], [200, 100, 0]], dtype=np.uint8)
BACKBONE = dict(type='ResNet', depth=18, base_channels=4, norm_eval=False)


def dataset(kind, size, pack):
    steps = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=size), pack]
    return dict(dataset=dict(type=kind, pipeline=steps))


PACK = dict(type='PackDetInputs', meta_keys=('img_path', 'ori_shape', 'img_shape', 'scale_factor'))
DETECTION = dict(
    default_scope='mmdet',
    model=dict(
        type='FCOS',
        data_preprocessor=dict(type='DetDataPreprocessor', mean=[120] * 3, std=[60] * 3),
        backbone=dict(BACKBONE, out_indices=(1, 2)),
        neck=dict(type='FPN', in_channels=[8, 16], out_channels=4, num_outs=5),
        bbox_head=dict(type='FCOSHead', num_classes=3, in_channels=4, feat_channels=4, stacked_convs=1, norm_cfg=None),
        test_cfg=dict(nms_pre=100, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=10),
    ),
    test_dataloader=dataset('BaseDetDataset', (64, 64), PACK),  # one with a palette of its own would come first
    visualizer=dict(type='DetLocalVisualizer', name='fused'),
)
HEAD = dict(type='FCNHead', in_channels=32, in_index=3, channels=4, num_convs=1, num_classes=3)
SEGMENTATION = dict(
    default_scope='mmseg',
    model=dict(
        type='EncoderDecoder',
        data_preprocessor=dict(type='SegDataPreProcessor', mean=[120] * 3, std=[60] * 3),
        backbone=BACKBONE,
        decode_head=dict(HEAD, norm_cfg=dict(type='BN')),
        test_cfg=dict(mode='whole'),
    ),
    test_dataloader=dataset('BaseSegDataset', (64, 64), dict(type='PackSegInputs')),
    visualizer=dict(type='SegLocalVisualizer', name='fused'),
)
CLASSIFICATION = dict(
    default_scope='mmpretrain',
    model=dict(
        type='ImageClassifier',
        backbone=dict(type='ResNet', depth=18, stem_channels=4, base_channels=4),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=3, in_channels=32),
    ),
    data_preprocessor=dict(mean=[120] * 3, std=[60] * 3, num_classes=3),
    test_dataloader=dataset('CustomDataset', 64, dict(type='PackInputs')),
)


def fuse(settings, folder):
    """Writes a training checkpoint as a runner does, with random denoisers, and fuses it; returns model and file."""
    wrapped = dict(type='DenoiseRepBackbone', backbone=settings['model']['backbone'], image_size=64)
    cfg = Config(dict(settings, model=dict(settings['model'], backbone=wrapped)))
    cfg.custom_imports = dict(imports=['mmdenoiserep'], allow_failed_imports=False)
    cfg.custom_hooks = [dict(type='DenoiseLossHook')]
    init_default_scope(cfg.default_scope)
    if 'data_preprocessor' in cfg:
        model = randomise(MODELS.build(dict(cfg.model, data_preprocessor=cfg.data_preprocessor))).eval()
    else:
        model = randomise(MODELS.build(cfg.model)).eval()
    meta = dict(cfg=cfg.pretty_text, dataset_meta=dict(classes=CLASSES, palette=PALETTE, odd=torch.eye(2).to_sparse()))
    torch.save(dict(meta=meta, state_dict=model.state_dict()), folder / 'epoch_1.pth')
    fuse_checkpoint(folder / 'epoch_1.pth', folder / 'fused.pth')
    return model, str(folder / 'fused.pth')


def check(inferencer, model):
    """Asserts that the model of an inferencer is vanilla and computes what the denoised one does."""
    assert not any(isinstance(module, DenoiseLayer) for module in inferencer.model.modules())
    meta = getattr(inferencer.model, 'dataset_meta', None) or inferencer.model._dataset_meta
    assert meta['classes'] == CLASSES
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours, fused = model.backbone(images)[-1], inferencer.model.backbone(images)[-1]
    assert (ours - fused).abs().max() <= 1e-4 * ours.abs().max()


def test_detection(tmp_path):
    model, fused = fuse(DETECTION, tmp_path)
    inferencer = DetInferencer(weights=fused, device='cpu', show_progress=False)
    check(inferencer, model)
    assert inferencer.model.dataset_meta['palette'] == PALETTE.tolist()
    result = inferencer(np.zeros((64, 64, 3), np.uint8), no_save_vis=True)
    assert len(result['predictions'][0]['labels']) == 10


def test_segmentation(tmp_path):
    model, fused = fuse(SEGMENTATION, tmp_path)
    inferencer = MMSegInferencer(None, weights=fused, device='cpu')
    check(inferencer, model)
    assert inferencer.model.dataset_meta['palette'] == PALETTE.tolist()
    result = inferencer(np.zeros((64, 64, 3), np.uint8), return_datasamples=True)
    assert result.pred_sem_seg.data.shape == (1, 64, 64)


def test_classification(tmp_path):
    model, fused = fuse(CLASSIFICATION, tmp_path)
    text = torch.load(fused, weights_only=True)['meta']['cfg']
    Path(tmp_path / 'vanilla.py').write_text(text)
    inferencer = ImageClassificationInferencer(str(tmp_path / 'vanilla.py'), pretrained=fused, device='cpu')
    check(inferencer, model)
    assert inferencer(np.zeros((64, 64, 3), np.uint8))[0]['pred_class'] in CLASSES
