"""mmpretrain's ViT for images of people, which are not square."""

import math
from typing import Any

from mmengine.registry import MODELS
from mmpretrain.models import VisionTransformer
from mmpretrain.models.utils import resize_pos_embed
from torch import Tensor


@MODELS.register_module()
class ReIDVisionTransformer(VisionTransformer):
    """mmpretrain's VisionTransformer that also loads position embeddings of grids that are not square.

    Takes the arguments of ``VisionTransformer``; ``img_size=(256, 128)`` is (height, width). If the checkpoint has
    another number of tokens, the embeddings are resized with ``interpolate_mode`` from the grid of
    :func:`source_grid`.
    """

    def _prepare_pos_embed(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Resizes the position embeddings of a checkpoint, in place, if their number differs."""
        name = f'{prefix}pos_embed'
        grid = self.patch_embed.init_out_size
        tokens = state_dict[name].shape[1] - self.num_extra_tokens if name in state_dict else math.prod(grid)
        if self.with_cls_token and tokens != math.prod(grid):
            source = source_grid(tokens, grid)
            state_dict[name] = resize_pos_embed(
                state_dict[name], source, grid, self.interpolate_mode, self.num_extra_tokens
            )
        super()._prepare_pos_embed(state_dict, prefix, *args, **kwargs)


def source_grid(tokens: int, target: tuple[int, int]) -> tuple[int, int]:
    """Returns the (height, width) of the grid of pretrained position embeddings.

    This is a square if the number of tokens is one (ImageNet), otherwise the grid with the aspect ratio nearest to the
    target's (pretraining on images of people, such as 16 x 8).

    Args:
        tokens: Number of position embeddings without the class token.
        target: Grid of the model, (height, width).

    Raises:
        ValueError: No grid of this number of tokens has an aspect ratio within a factor of two of the target's.
    """
    side = math.isqrt(tokens)
    if side * side == tokens:
        return side, side
    grids = [(height, tokens // height) for height in range(1, tokens + 1) if tokens % height == 0]
    ratio = target[0] / target[1]
    distance, grid = min((abs(math.log(height / width / ratio)), (height, width)) for height, width in grids)
    if distance > math.log(2):
        raise ValueError(
            f'the checkpoint has {tokens} position encodings, which form neither a square nor a grid like '
            f'{target[0]} x {target[1]}; set img_size to the size that it was trained with'
        )
    return grid
