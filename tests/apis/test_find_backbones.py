"""Tests of finding backbones, in configs and in models."""

import copy

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmdenoiserep.apis.backbones import (
    backbone_configs,
    check_input,
    convert_backbones,
    find_backbones,
    predicting_backbone,
)
from mmdenoiserep.core import InputError
from tiny_models import RESNET, VIT, detector, semi, wrapped

DENOISED = wrapped(RESNET)
LOSS = {'type': 'PixelReconstructionLoss', 'criterion': 'L2'}


def build(scope, config):
    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(copy.deepcopy(config))


@pytest.mark.parametrize(
    'model, paths',
    [
        ({'type': 'ImageClassifier', 'backbone': RESNET}, ['backbone']),
        ({'type': 'SoftTeacher', 'detector': detector(RESNET)}, ['detector.backbone']),
        ({'type': 'LAD', 'backbone': RESNET, 'teacher_backbone': RESNET, 'neck': {}}, ['backbone', 'teacher_backbone']),
        ({'type': 'SegTTAModel', 'module': {'type': 'EncoderDecoder', 'backbone': DENOISED}}, ['module.backbone']),
        ({'type': 'CLIP', 'visual': DENOISED, 'text': RESNET}, ['visual']),
        (
            {'type': 'Ensemble', 'models': [detector(RESNET), detector(RESNET)]},
            ['models.0.backbone', 'models.1.backbone'],
        ),
        ({'type': 'X', 'backbone': {'type': 'LoRAModel', 'module': {'type': 'Y', 'backbone': RESNET}}}, ['backbone']),
    ],
    ids=['classifier', 'soft teacher', 'LAD', 'TTA', 'CLIP', 'list', 'LoRA'],
)
def test_configs(model, paths):
    model = ConfigDict(model)
    found = backbone_configs(model)
    assert list(found) == paths
    for path, backbone in found.items():
        value = model
        for key in path.split('.'):
            value = value[int(key)] if isinstance(value, list | tuple) else value[key]
        assert value is backbone


def test_a_lazy_config():
    cfg = Config.fromfile('configs/lazy/mask_rcnn_r50_fpn_1x_coco_denoiserep.py')
    assert list(backbone_configs(cfg._cfg_dict['model'])) == ['backbone']


@pytest.mark.parametrize('predict_on', ['student', 'teacher', None])
def test_semi_supervised_detector(predict_on):
    """semi_test_cfg names the backbone that predicts, by default the teacher's."""
    model = build('mmdet', {**semi(DENOISED), 'semi_test_cfg': {'predict_on': predict_on} if predict_on else {}})
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


NECK = {'type': 'MoCoV2Neck', 'in_channels': 32, 'hid_channels': 4, 'out_channels': 4}
PREDICTOR = {'type': 'LinearNeck', 'in_channels': 4, 'out_channels': 4, 'gap_dim': 0}
METHODS = {
    'MoCo': {'head': {'type': 'ContrastiveHead', 'loss': {'type': 'CrossEntropyLoss'}}, 'queue_len': 8},
    'BYOL': {'head': {'type': 'LatentPredictHead', 'loss': LOSS, 'predictor': PREDICTOR}},
}


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('backbone', [RESNET, DENOISED])
def test_an_average_of_the_backbone_does_not_predict(method, backbone):
    """Self-supervised models keep a momentum copy of their denoised backbone, which has a guard as well."""
    model = build('mmpretrain', {'type': method, 'backbone': backbone, 'neck': NECK, **METHODS[method]})
    assert len(find_backbones(model)) == (2 if backbone is DENOISED else 1)
    assert predicting_backbone(model) == 'backbone'


def test_a_denoised_backbone_of_any_name():
    model = nn.Module()
    model.visual = build('mmdet', DENOISED)
    assert list(find_backbones(model)) == ['visual']
    assert list(find_backbones(model.visual)) == ['']


@pytest.mark.parametrize('backbone', [RESNET, DENOISED])
def test_a_backbone_in_a_list(backbone):
    encoder = [backbone, {'type': 'GlobalAveragePooling'}]
    model = build('mmpretrain', {'type': 'ImageToImageRetriever', 'image_encoder': encoder, 'prototype': ''})
    assert predicting_backbone(model) == 'image_encoder.0'
    assert type(model.get_submodule('image_encoder.0')).__name__ == 'ResNet'


def test_none_and_several_are_refused_by_name():
    with pytest.raises(InputError, match='no backbone'):
        backbone_configs(ConfigDict(type='TimmClassifier', model_name='resnet18', head={'backbone': None}))
    with pytest.raises(InputError, match='Sequential'):
        find_backbones(nn.Sequential(nn.Linear(2, 2)))
    model = nn.Module()
    model.text_backbone = model.vision_backbone = None
    model.text_backbone, model.vision_backbone = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(InputError, match=r'text_backbone, vision_backbone'):
        predicting_backbone(model)


class Way(nn.Module):
    """A model of the user, with its own way to the backbone."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.backbone = nn.Conv2d(3, 2, 1)

    def extract_feat(self, inputs):
        return self.way(self.backbone, inputs)


def in_place(backbone, x):
    return backbone(x.mul_(2))


@pytest.mark.parametrize(
    'way',
    [
        lambda backbone, x: [backbone(part) for part in x.chunk(2, 1)],
        lambda backbone, x: backbone(x[:, :3] / 255),
        lambda backbone, x: backbone(nn.functional.interpolate(x, scale_factor=0.5)[:, :3]),
        lambda backbone, x: backbone(input=x[:, 3:]),
        in_place,
    ],
    ids=['two images', 'normalised', 'half', 'by keyword', 'in place'],
)
def test_a_backbone_that_gets_something_else_than_the_images(way):
    with pytest.raises(InputError, match='Way.* hands its backbone'):
        check_input(Way(way), 'backbone', torch.randn(1, 3 if way is in_place else 6, 8, 8))


@pytest.mark.parametrize(
    'way',
    [
        lambda backbone, x: backbone(x),
        lambda backbone, x: backbone(input=x),
        lambda backbone, x: backbone(x).mul_(2) + backbone(x.mul_(2)),
        lambda backbone, x: [],
    ],
    ids=['as they are', 'by keyword', 'and others', 'not at all'],
)
def test_a_backbone_that_gets_the_images(way):
    model, images = Way(way), torch.randn(1, 3, 8, 8)
    before = images.clone()
    check_input(model, 'backbone', images)
    assert torch.equal(images, before) and model.training and not model.backbone._forward_pre_hooks


def test_ways_that_cannot_be_followed_are_left_alone():
    model, images = Way(None), torch.randn(1, 3, 8, 8)
    with pytest.raises(TypeError):
        check_input(model, 'backbone', images)  # a slip of the user
    model.extract_feat = lambda images, texts: 1 / 0
    check_input(model, 'backbone', images)
    check_input(nn.ModuleDict(dict(backbone=nn.Identity())), 'backbone', images)


MAE = dict(
    backbone=dict(type='MAEViT', arch=VIT['arch'], img_size=32, patch_size=16),
    neck=dict(type='SimMIMLinearDecoder', in_channels=8, encoder_stride=32),
    head=dict(type='MAEPretrainHead', loss=LOSS),
)


@pytest.mark.parametrize(
    ('scope', 'model'),
    [
        ('mmpretrain', dict(type='ImageClassifier', backbone=RESNET)),
        ('mmpretrain', dict(type='MAE', **MAE)),
        ('mmdet', detector(RESNET)),
        ('mmdet', {**semi(RESNET), 'type': 'SoftTeacher'}),
    ],
    ids=['classifier', 'MAE', 'detector', 'soft teacher'],
)
def test_models_of_the_libraries_hand_the_images_on(scope, model):
    model = build(scope, model)
    check_input(model, predicting_backbone(model), torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    ('cfg', 'options', 'words'),
    [
        (
            Config(dict(model=detector(RESNET))),
            dict(targets='mlpx'),
            "^the config in memory with targets='mlpx' does not",
        ),
        (
            Config(dict(model=detector(RESNET))),
            dict(rank=4, foo=1),
            '^the config in memory with rank=4, foo=1 does not',
        ),
        ('config.py', {}, 'cfg must be a Config'),
    ],
)
def test_options_that_do_not_work(cfg, options, words):
    with DefaultScope.overwrite_default_scope('mmdet'), pytest.raises(InputError, match=words):
        convert_backbones(cfg, options)
