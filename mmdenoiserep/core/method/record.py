"""What is known of a denoised backbone, kept on the backbone itself."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .convert import ConversionReport

KEY = 'denoiserep'
"""The attribute of a backbone that holds its record."""


@dataclass
class DenoiseRepRecord:
    """What is known of a denoised backbone.

    Attributes:
        report: What the conversion did.
        image_shape: Shape of the dummy image of the dry run, (1, C, H, W).
        has_loss: Whether :func:`denoise_losses` computes the loss of its denoisers at present.
    """

    report: ConversionReport
    image_shape: tuple[int, ...]
    has_loss: bool = False


def find_records(module: nn.Module) -> Iterator[tuple[str, nn.Module, DenoiseRepRecord]]:
    """Yields the name, the module and the record of every backbone in a model that has one."""
    for name, part in module.named_modules():
        record = vars(part).get(KEY)
        if isinstance(record, DenoiseRepRecord):
            yield name, part, record
