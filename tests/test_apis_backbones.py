"""Tests of finding backbones, in configs and in models."""

import copy

import pytest
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmdenoiserep.apis.backbones import backbone_configs, find_backbones, predicting_backbone
from mmdenoiserep.core import InputError

RESNET = {'type': 'ResNet', 'depth': 18, 'base_channels': 4, 'stem_channels': 4, 'norm_eval': True}
DENOISED = {'type': 'DenoiseRepBackbone', 'backbone': RESNET, 'image_size': 32, 'rank': 2}


def build(scope, config):
    """Build a model in the scope of a library."""
    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(copy.deepcopy(config))


def detector(**options):
    """The smallest detector with a ResNet."""
    head = {'type': 'RetinaHead', 'num_classes': 2, 'in_channels': 8, 'feat_channels': 8, 'stacked_convs': 1}
    neck = {'type': 'FPN', 'in_channels': [4, 8, 16, 32], 'out_channels': 8, 'num_outs': 5}
    return ConfigDict(type='RetinaNet', backbone=RESNET, neck=neck, bbox_head=head, **options)


@pytest.mark.parametrize(
    'model, paths',
    [
        ({'type': 'ImageClassifier', 'backbone': RESNET}, ['backbone']),
        ({'type': 'SoftTeacher', 'detector': detector()}, ['detector.backbone']),
        ({'type': 'LAD', 'backbone': RESNET, 'teacher_backbone': RESNET, 'neck': {}}, ['backbone', 'teacher_backbone']),
        ({'type': 'SegTTAModel', 'module': {'type': 'EncoderDecoder', 'backbone': DENOISED}}, ['module.backbone']),
        ({'type': 'CLIP', 'visual': DENOISED, 'text': RESNET}, ['visual']),
        ({'type': 'Ensemble', 'models': [detector(), detector()]}, ['models.0.backbone', 'models.1.backbone']),
        ({'type': 'X', 'backbone': {'type': 'LoRAModel', 'module': {'type': 'Y', 'backbone': RESNET}}}, ['backbone']),
    ],
    ids=['classifier', 'soft teacher', 'LAD', 'TTA', 'CLIP', 'list', 'LoRA'],
)
def test_configs(model, paths):
    """Wherever a backbone stands in a config, it is found, as the object of the config."""
    model = ConfigDict(model)
    found = backbone_configs(model)
    assert list(found) == paths
    for path, backbone in found.items():
        value = model
        for key in path.split('.'):
            value = value[int(key)] if isinstance(value, list | tuple) else value[key]
        assert value is backbone


def test_a_lazy_config():
    """Lazy objects are compared by name and not built."""
    cfg = Config.fromfile('configs/lazy/mask_rcnn_r50_fpn_1x_coco_denoiserep.py')
    assert list(backbone_configs(cfg._cfg_dict['model'])) == ['backbone']


def test_semi_supervised_detector():
    """Soft teacher has two backbones; semi_test_cfg names the one that predicts, by default the teacher."""
    config = detector()
    config.backbone = DENOISED
    for predict_on in ('student', 'teacher', None):
        test = {'predict_on': predict_on} if predict_on else {}
        model = build(
            'mmdet', {'type': 'SemiBaseDetector', 'detector': config, 'semi_train_cfg': {}, 'semi_test_cfg': test}
        )
        assert list(find_backbones(model)) == ['student.backbone', 'teacher.backbone']
        name = predicting_backbone(model)
        assert name == f'{predict_on or "teacher"}.backbone'
        assert model.get_submodule(name) is find_backbones(model)[name]


def test_one_backbone_under_two_names():
    """A module that stands in two places is one backbone (MoCo holds its backbone in a Sequential too)."""
    model = nn.Module()
    model.backbone = nn.Linear(2, 2)
    model.encoder = nn.Sequential(model.backbone)
    assert list(find_backbones(model)) == ['backbone']
    assert predicting_backbone(model) == 'backbone'


@pytest.mark.parametrize('method', ['MoCo', 'BYOL'])
@pytest.mark.parametrize('backbone', [RESNET, DENOISED])
def test_an_average_of_the_backbone_does_not_predict(method, backbone):
    """Self-supervised models keep a momentum copy of their denoised backbone, which has a guard as well."""
    neck = {'type': 'MoCoV2Neck', 'in_channels': 32, 'hid_channels': 4, 'out_channels': 4}
    predictor = {'type': 'LinearNeck', 'in_channels': 4, 'out_channels': 4, 'gap_dim': 0}
    head, options = {'type': 'LatentPredictHead', 'loss': {'type': 'PixelReconstructionLoss', 'criterion': 'L2'}}, {}
    if method == 'MoCo':
        head, options = {'type': 'ContrastiveHead', 'loss': {'type': 'CrossEntropyLoss'}}, {'queue_len': 8}
    else:
        head['predictor'] = predictor
    model = build('mmpretrain', {'type': method, 'backbone': backbone, 'neck': neck, 'head': head, **options})
    assert len(find_backbones(model)) == (2 if backbone is DENOISED else 1)
    assert predicting_backbone(model) == 'backbone'


def test_a_denoised_backbone_of_any_name():
    """What DenoiseRepBackbone built is a backbone, whatever its name; so is the model itself."""
    model = nn.Module()
    model.visual = build('mmdet', DENOISED)
    assert list(find_backbones(model)) == ['visual']
    assert list(find_backbones(model.visual)) == ['']


@pytest.mark.parametrize('backbone', [RESNET, DENOISED])
def test_a_backbone_in_a_list(backbone):
    """The backbone of mmpretrain's retriever has no name of its own: with denoisers or without, it is found."""
    encoder = [backbone, {'type': 'GlobalAveragePooling'}]
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build({'type': 'ImageToImageRetriever', 'image_encoder': encoder, 'prototype': ''})
    assert predicting_backbone(model) == 'image_encoder.0'
    assert type(model.get_submodule('image_encoder.0')).__name__ == 'ResNet'


def test_none_and_several_are_refused_by_name():
    """No backbone, or several of which nothing says which is used."""
    with pytest.raises(InputError, match='no backbone'):
        backbone_configs(ConfigDict(type='TimmClassifier', model_name='resnet18', head={'backbone': None}))
    with pytest.raises(InputError, match='Sequential'):
        find_backbones(nn.Sequential(nn.Linear(2, 2)))
    model = nn.Module()
    model.text_backbone = model.vision_backbone = None
    model.text_backbone, model.vision_backbone = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(InputError, match=r'text_backbone, vision_backbone'):
        predicting_backbone(model)
