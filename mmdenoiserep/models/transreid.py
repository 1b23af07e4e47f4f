"""Converts the weights of TransReID-SSL and TransReID to the names of mmpretrain's ViT."""

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

RENAMED = (
    (r'patch_embed\.proj\.(weight|bias)', r'patch_embed.projection.\1'),
    (r'blocks\.(\d+)\.norm([12])\.(weight|bias)', r'layers.\1.ln\2.\3'),
    (r'blocks\.(\d+)\.attn\.(qkv|proj)\.(weight|bias)', r'layers.\1.attn.\2.\3'),
    (r'blocks\.(\d+)\.mlp\.fc1\.(weight|bias)', r'layers.\1.ffn.layers.0.0.\2'),
    (r'blocks\.(\d+)\.mlp\.fc2\.(weight|bias)', r'layers.\1.ffn.layers.1.\2'),
    (r'norm\.(weight|bias)', r'ln1.\1'),
    (r'(cls_token|pos_embed)', r'\1'),
)
"""Names in the released ViT, and in mmpretrain's VisionTransformer."""

HEAD = (
    (r'bottleneck\.(weight|bias|running_mean|running_var|num_batches_tracked)', r'head.bnneck.\1'),
    (r'classifier\.weight', r'head.classifier.weight'),
)
"""Names in the head of a released re-identification model, and in BNNeckReIDHead."""

UNUSED = re.compile(r'(.*\.)?head\..*|fc\..*')
"""Names that are dropped: DINO's projection head and ImageNet's classifier."""


def convert_transreid(checkpoint: Mapping[str, Any]) -> 'OrderedDict[str, Tensor]':
    """Returns the state dict of an mmpretrain classifier with a ViT backbone: ``backbone.*``, and ``head.*`` if given.

    A pretrained checkpoint (DINO on LUPerson) has its weights under ``teacher``, and the ViT under ``backbone.``. A
    trained re-identification model has the ViT under ``base.``, and the head in ``bottleneck`` and ``classifier``.

    Args:
        checkpoint: Content of the released file.

    Raises:
        ValueError: The checkpoint has no ViT, or has parts of another architecture, such as the convolutional stem of
            the ICS variants.
    """
    state = next((checkpoint[key] for key in ('teacher', 'state_dict', 'model') if key in checkpoint), checkpoint)
    converted: OrderedDict[str, Tensor] = OrderedDict()
    if not isinstance(state, Mapping):
        raise ValueError('it holds no state dict')
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            continue
        bare = re.sub(r'^(module\.)?(backbone\.|base\.)?', '', name)
        if new := _rename(bare, RENAMED):
            converted[f'backbone.{new}'] = value
        elif new := _rename(bare, HEAD):
            converted[new] = value
        elif not UNUSED.fullmatch(bare):
            raise ValueError(
                f'{name} is no part of a plain ViT; convolutional stems (ICS), SIE and JPM are not supported'
            )
    if not {'backbone.cls_token', 'backbone.pos_embed', 'backbone.patch_embed.projection.weight'} <= converted.keys():
        raise ValueError('it holds no ViT: cls_token, pos_embed or patch_embed.proj.weight is missing')
    return converted


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str | None:
    for old, new in rules:
        if match := re.fullmatch(old, name):
            return match.expand(new)
    return None
