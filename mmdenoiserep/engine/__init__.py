"""What plugs the method into mmengine's runners."""

from .backbone import DenoiseRepBackbone
from .fusion_hook import DenoiseFusionHook
from .loss_hook import DenoiseLossHook
from .vis_hook import DenoiseVisHook

__all__ = ['DenoiseFusionHook', 'DenoiseLossHook', 'DenoiseRepBackbone', 'DenoiseVisHook']
