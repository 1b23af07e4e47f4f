"""Weights of the TransReID-SSL and TransReID releases under the names of mmpretrain's ViT."""

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
"""Names inside the released ViT, and what mmpretrain's VisionTransformer calls them."""

HEAD = (
    (r'bottleneck\.(weight|bias|running_mean|running_var|num_batches_tracked)', r'head.bnneck.\1'),
    (r'classifier\.weight', r'head.classifier.weight'),
)
"""Names beside the ViT in a trained re-identification model, and what BNNeckReIDHead calls them."""

UNUSED = re.compile(r'(.*\.)?head\..*|fc\..*')
"""DINO's projection head and ImageNet's classifier."""


def convert_transreid(checkpoint: Mapping[str, Any]) -> 'OrderedDict[str, Tensor]':
    """Returns the state dict of an mmpretrain classifier with a ViT backbone: ``backbone.*`` and, if there, ``head.*``.

    A pretrained file (DINO on LUPerson) has its weights under ``teacher``, with ``backbone.`` before the names of the
    ViT; a trained re-identification model has ``base.`` there, and ``bottleneck`` and ``classifier`` beside it.

    Args:
        checkpoint: Content of the released file.

    Raises:
        ValueError: A name belongs to another architecture, such as the convolutional stem of the ICS variants, or there
            is no ViT.
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
