"""VMamba as a backbone for mmdet, mmseg and mmpretrain, with the parameter names of the released checkpoints."""

import functools
import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .selective_scan import cross_merge, cross_scan, cuda_kernel, selective_scan

ARCHS: dict[str, dict[str, Any]] = {
    'tiny': dict(dims=(96, 192, 384, 768), depths=(2, 2, 8, 2), ssm_ratio=1.0),
    'small': dict(dims=(96, 192, 384, 768), depths=(2, 2, 15, 2), ssm_ratio=2.0),
    'base': dict(dims=(128, 256, 512, 1024), depths=(2, 2, 15, 2), ssm_ratio=2.0),
}
"""VMamba-T[s1l8], -S[s2l15] and -B[s2l15] of the release."""

DIRECTIONS = 4
STATES = 1
"""N, the number of states of a channel; the released v2 models have one."""

OLD_NAMES = (
    (r'patch_embed\.proj\.', 'patch_embed.0.'),
    (r'patch_embed\.norm\.', 'patch_embed.2.'),
    (r'(layers\.\d+\.blocks\.\d+\.)ln_1\.', r'\1norm.'),
    (r'(layers\.\d+\.blocks\.\d+\.)self_attention\.', r'\1op.'),
    (r'(norm|head)\.', r'classifier.\1.'),
)
"""Prefixes of names in early releases, and in later ones."""


@MODELS.register_module()
class VMamba(BaseModule):
    """VMamba (Liu et al., NeurIPS 2024, arXiv 2401.10166), version 2 of the release.

    A stem of two convolutions (stride 4 in total), and stages of :class:`VSSBlock` with strided convolutions between
    them. Any image size works. Features are (B, H, W, C) inside, so the layers are ``nn.Linear`` and ``nn.LayerNorm``.
    The scan is computed in float32 or more.

    Released checkpoints load unchanged, by ``init_cfg=dict(type='Pretrained', checkpoint=...)`` or
    ``load_state_dict``: the weights are taken from ``model``, early names are translated, and the classifier is dropped
    except for its norm, which becomes the output norm if the last stage is the only output.

    The release trains A_logs and Ds without weight decay (attribute ``_no_weight_decay``). In a config:
    ``paramwise_cfg=dict(custom_keys={'A_logs': dict(decay_mult=0.0), '.Ds': dict(decay_mult=0.0)})``.

    Args:
        arch: ``'tiny'``, ``'small'`` or ``'base'`` (:data:`ARCHS`), or a dict with ``dims`` (channels of each stage),
            ``depths`` (number of blocks of each stage) and ``ssm_ratio`` (channels of the scan over channels of the
            stage). The release also has ``depths=(2, 2, 5, 2), ssm_ratio=2.0`` (tiny) and ``depths=(2, 2, 20, 2),
            ssm_ratio=1.0`` (small and base).
        in_channels: Number of channels of the image.
        drop_path_rate: Drop rate of stochastic depth in the last block; it rises linearly from 0 in the first block.
            The ImageNet recipes use 0.2 (tiny), 0.3 (small), 0.6 (base) and 0.5 (base with ``ssm_ratio=1.0``).
        out_indices: Indices of the stages to return, from 0.
        frozen_stages: -1 freezes nothing, 0 the stem, i the stem and the first i stages.
        with_cp: Whether to use gradient checkpointing, which saves memory.
        init_cfg: Initialisation after the one of the release, such as loading a checkpoint.

    Raises:
        ValueError: ``arch`` is unknown, or a value is outside its range.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = 'tiny',
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        out_indices: Sequence[int] = (3,),
        frozen_stages: int = -1,
        with_cp: bool = False,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        dims, depths, ssm_ratio = _settings(arch)
        stages = len(depths)
        if not out_indices or not set(out_indices) <= set(range(stages)):
            raise ValueError(f'out_indices of VMamba must be stages from 0 to {stages - 1}, got {out_indices}')
        if not -1 <= frozen_stages <= stages:
            raise ValueError(f'frozen_stages of VMamba must be from -1 to {stages}, got {frozen_stages}')
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate of VMamba must be in [0, 1), got {drop_path_rate}')
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp

        # the order of the modules gives the names of the released weights
        self.patch_embed = nn.Sequential(
            nn.Conv2d(in_channels, dims[0] // 2, 3, stride=2, padding=1),
            Permute(0, 2, 3, 1),
            nn.LayerNorm(dims[0] // 2),
            Permute(0, 3, 1, 2),
            nn.GELU(),
            nn.Conv2d(dims[0] // 2, dims[0], 3, stride=2, padding=1),
            Permute(0, 2, 3, 1),
            nn.LayerNorm(dims[0]),
        )
        rates = iter([drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))])
        self.layers = nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            blocks = nn.Sequential(*(VSSBlock(dim, ssm_ratio, next(rates)) for _ in range(depth)))
            downsample = nn.Identity() if i == stages - 1 else _downsample(dim, dims[i + 1])
            self.layers.append(nn.Sequential(OrderedDict(blocks=blocks, downsample=downsample)))
        for i in self.out_indices:
            self.add_module(f'outnorm{i}', nn.LayerNorm(dims[i]))
        self._register_load_state_dict_pre_hook(self._translate_state_dict)
        self._freeze_stages()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Returns the normalised, contiguous feature maps of the stages in ``out_indices``.

        Args:
            x: Images, (B, in_channels, H, W).

        Returns:
            For each stage i a map of shape (B, dims[i], H / 4 / 2^i, W / 4 / 2^i), rounded up.
        """
        if x.is_cuda:
            _log_scan(x.device)
        x = self.patch_embed(x)
        outputs = []
        for i, stage in enumerate(self.layers):
            for block in stage.blocks:  # type: ignore[union-attr]
                x = checkpoint(block, x, use_reentrant=False) if self.with_cp else block(x)
            if i in self.out_indices:
                outputs.append(getattr(self, f'outnorm{i}')(x).permute(0, 3, 1, 2).contiguous())
            x = stage.downsample(x)  # type: ignore[operator]
        return tuple(outputs)

    def init_weights(self) -> None:
        """Initialises Linear layers as the release does, then applies ``init_cfg``; other layers keep their values."""
        if not self.is_init:
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        super().init_weights()

    def train(self, mode: bool = True) -> 'VMamba':
        """Sets the training mode; frozen stages stay in eval mode."""
        super().train(mode)
        self._freeze_stages()
        return self

    def _freeze_stages(self) -> None:
        frozen = [self.patch_embed, *self.layers][: self.frozen_stages + 1]
        frozen += [getattr(self, f'outnorm{i}') for i in self.out_indices if i < self.frozen_stages]
        for module in frozen:
            module.eval().requires_grad_(False)

    def _translate_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Converts a released checkpoint to the names and shapes of this model, in place."""
        if isinstance(released := state.get('model'), Mapping):
            state.clear()
            state.update(released)
        for key in [key for key in state if key.startswith(prefix)]:
            state[prefix + _rename(key.removeprefix(prefix))] = state.pop(key)
        last = len(self.layers) - 1
        for name in ('weight', 'bias'):
            norm = state.get(f'{prefix}classifier.norm.{name}')
            if norm is not None and self.out_indices == (last,):
                state.setdefault(f'{prefix}outnorm{last}.{name}', norm)
        for key in [key for key in state if key.startswith(f'{prefix}classifier.')]:
            del state[key]
        for name, parameter in self.named_parameters():
            value = state.get(prefix + name)
            if value is not None and value.shape == (*parameter.shape, 1, 1):  # a 1x1 convolution in the release
                state[prefix + name] = value.flatten(1)


class VSSBlock(nn.Module):
    """A block of VMamba: ``x = x + op(norm(x))``, then ``x = x + mlp(norm2(x))``.

    Args:
        dim: C, the number of channels.
        ssm_ratio: Channels of the scan over C.
        drop_path: Probability of dropping a branch for an image in training.
    """

    def __init__(self, dim: int, ssm_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.op = SS2D(dim, int(ssm_ratio * dim))
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x: Tensor) -> Tensor:
        """Applies both branches to x, (B, H, W, C); keeps its shape."""
        x = x + self.drop_path(self.op(self.norm(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SS2D(nn.Module):
    """2D selective scan: scans a feature map in four directions and sums the results.

    The parameters are initialised as in Mamba: ``A = -1, ..., -N``, ``D = 1``, and step sizes from 0.001 to 0.1.

    Args:
        dim: C, the number of channels.
        inner: Di, the number of channels of the scan.
    """

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        rank = math.ceil(dim / 16)
        self.splits = rank, STATES, STATES
        self.in_proj = nn.Linear(dim, inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.x_proj_weight = nn.Parameter(_uniform(inner**-0.5, DIRECTIONS, sum(self.splits), inner))
        self.dt_projs_weight = nn.Parameter(_uniform(rank**-0.5, DIRECTIONS, inner, rank))
        low, high = math.log(1e-3), math.log(1e-1)
        step = torch.exp(torch.rand(DIRECTIONS, inner) * (high - low) + low)
        self.dt_projs_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        self.A_logs = nn.Parameter(torch.arange(1.0, STATES + 1).log().repeat(DIRECTIONS * inner, 1))
        self.Ds = nn.Parameter(torch.ones(DIRECTIONS * inner))
        for parameter in (self.A_logs, self.Ds):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Projects x, (B, H, W, C), convolves, scans, normalises and projects back; keeps the shape of x."""
        x = F.silu(self.conv2d(self.in_proj(x).permute(0, 3, 1, 2)))
        height, width = x.shape[2:]
        x = cross_scan(x)
        low_rank, B, C = (self.x_proj_weight @ x).split(self.splits, 2)
        y = selective_scan(
            x.flatten(1, 2),
            (self.dt_projs_weight @ low_rank).flatten(1, 2),
            -torch.exp(self.A_logs),
            B,
            C,
            self.Ds,
            self.dt_projs_bias.flatten(),
        )
        y = cross_merge(y.unflatten(1, (DIRECTIONS, -1)), height, width)
        return self.out_proj(self.out_norm(y.transpose(1, 2).unflatten(1, (height, width))))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, arXiv 1603.09382): sets random images to 0 and scales the others up.

    Args:
        rate: Probability of 0, in [0, 1).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Applies stochastic depth to x, (B, ...), in training; returns x in eval mode."""
        if not self.training or not self.rate:
            return x
        kept = x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(1 - self.rate)
        return x * kept / (1 - self.rate)

    def extra_repr(self) -> str:
        """Shows the rate."""
        return f'{self.rate:.3f}'


class Permute(nn.Module):
    """``x.permute(dims)`` as a module."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        """Returns a view of x."""
        return x.permute(self.dims)


def convert_vmamba(checkpoint: Mapping[str, Any]) -> 'OrderedDict[str, Tensor]':
    """Converts a released ImageNet model to an mmpretrain classifier with this backbone and a ``LinearClsHead``.

    Args:
        checkpoint: Content of the released file, with the weights under ``model``.

    Returns:
        The state dict of the classifier.

    Raises:
        ValueError: The checkpoint is not a VMamba with its classifier.
    """
    state = checkpoint.get('model', checkpoint.get('state_dict', checkpoint))  # safetensors files have state_dict
    if not isinstance(state, Mapping):
        raise ValueError('it holds no state dict')
    named = {_rename(k): value for k, value in state.items() if isinstance(k, str) and isinstance(value, Tensor)}
    stages = [int(match[1]) for name in named if (match := re.match(r'layers\.([0-9]{1,2})\.', name))]
    if not {'patch_embed.0.weight', 'classifier.norm.weight', 'classifier.head.weight'} <= named.keys() or not stages:
        raise ValueError(
            'it holds no VMamba with a classifier (patch_embed, layers, classifier.norm and classifier.head)'
        )
    last = max(stages)
    converted: OrderedDict[str, Tensor] = OrderedDict()
    for name, value in named.items():
        name = name.replace('classifier.norm.', f'backbone.outnorm{last}.').replace('classifier.head.', 'head.fc.')
        converted[name if name.startswith(('backbone.', 'head.')) else f'backbone.{name}'] = value
    return converted


def _settings(arch: str | Mapping[str, Any]) -> tuple[Sequence[int], Sequence[int], float]:
    settings = ARCHS.get(arch) if isinstance(arch, str) else arch
    keys = ('dims', 'depths', 'ssm_ratio')
    if settings is None or set(settings) != set(keys):
        raise ValueError(f'arch of VMamba must be {", ".join(ARCHS)} or a dict with {", ".join(keys)}, got {arch!r}')
    dims, depths, ssm_ratio = (settings[key] for key in keys)
    if len(dims) != len(depths):
        raise ValueError(f'arch of VMamba has {len(dims)} dims but {len(depths)} depths; every stage needs both')
    return dims, depths, ssm_ratio


def _downsample(dim: int, out_dim: int) -> nn.Sequential:
    conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1)
    return nn.Sequential(Permute(0, 3, 1, 2), conv, Permute(0, 2, 3, 1), nn.LayerNorm(out_dim))


def _uniform(bound: float, *shape: int) -> Tensor:
    return torch.empty(shape).uniform_(-bound, bound)


def _rename(name: str) -> str:
    for old, new in OLD_NAMES:
        name = re.sub(f'^{old}', new, name)
    return name


@functools.cache
def _log_scan(device: torch.device) -> None:
    how = (
        'the CUDA kernel of mamba-ssm'
        if cuda_kernel(device)
        else 'PyTorch operations (mamba-ssm with its kernel is faster)'
    )
    print_log(f'VMamba scans with {how}', logger='current')
