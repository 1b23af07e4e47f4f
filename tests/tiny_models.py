"""Configs of the smallest models of the libraries, with denoisers and without."""

RESNET = {'type': 'ResNet', 'depth': 18, 'base_channels': 4, 'stem_channels': 4, 'norm_eval': True}
VIT = {
    'type': 'VisionTransformer',
    'img_size': 16,
    'patch_size': 8,
    'out_type': 'cls_token',
    'arch': {'embed_dims': 8, 'num_layers': 1, 'num_heads': 2, 'feedforward_channels': 8},
}
LORA = {'type': 'LoRAModel', 'module': VIT, 'alpha': 1, 'rank': 2, 'targets': [{'type': 'qkv'}]}


def wrapped(backbone, **options):
    return {'type': 'DenoiseRepBackbone', 'backbone': backbone, 'rank': 2, 'image_size': 32, **options}


def classifier(backbone):
    """A classifier with a backbone that returns vectors of 8."""
    head = {'type': 'LinearClsHead', 'num_classes': 2, 'in_channels': 8, 'topk': (1,)}
    return {'type': 'ImageClassifier', 'backbone': backbone, 'head': head}


def detector(backbone):
    """The smallest detector with a ResNet."""
    head = {'type': 'RetinaHead', 'num_classes': 2, 'in_channels': 8, 'feat_channels': 8, 'stacked_convs': 1}
    neck = {'type': 'FPN', 'in_channels': [4, 8, 16, 32], 'out_channels': 8, 'num_outs': 5}
    return {'type': 'RetinaNet', 'backbone': backbone, 'neck': neck, 'bbox_head': head}


def semi(backbone):
    return {'type': 'SemiBaseDetector', 'detector': detector(backbone), 'semi_train_cfg': {}, 'semi_test_cfg': {}}
