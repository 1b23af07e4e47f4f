"""mmpretrain's ViT for pictures of people, which are no squares."""

import math
from typing import Any

from mmengine.registry import MODELS
from mmpretrain.models import VisionTransformer
from mmpretrain.models.utils import resize_pos_embed
from torch import Tensor


@MODELS.register_module()
class ReIDVisionTransformer(VisionTransformer):
    """mmpretrain's VisionTransformer that loads position encodings from any grid, where mmpretrain's takes a square.

    Takes the arguments of ``VisionTransformer``; ``img_size=(256, 128)`` is (height, width). When the number of tokens
    in a checkpoint is another one, the encodings are resized with ``interpolate_mode`` from the grid that
    :func:`source_grid` finds.
    """

    def _prepare_pos_embed(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Resizes the encodings of a checkpoint before they are loaded; what has the right size is left alone."""
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
    """Returns the (height, width) of the grid on which position encodings were learned.

    A square where the number of tokens allows it (ImageNet); else the grid whose aspect ratio is nearest to that of the
    target (pretraining on pictures of people, such as 16 x 8).

    Args:
        tokens: Position encodings without that of the class token.
        target: Grid of the model, (height, width).

    Raises:
        ValueError: No grid of so many tokens is within a factor of two of the target's aspect ratio.
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
