"""The method itself; imports torch only."""

from .checkpoint import CheckpointError, fuse_checkpoint, read_checkpoint
from .closed_form import closed_form
from .convert import ConversionReport, apply_denoiserep
from .fuse import FusionError, fuse_model, fuse_state_dict
from .layers import DenoiseConv2d, DenoiseLayer, DenoiseLinear, Denoiser
from .probe import evaluating
from .schedule import NoiseSchedule, ReverseStep
from .table import format_table
from .verify import Verification, verify_fusion

__all__ = [
    'CheckpointError',
    'ConversionReport',
    'DenoiseConv2d',
    'DenoiseLayer',
    'DenoiseLinear',
    'Denoiser',
    'FusionError',
    'NoiseSchedule',
    'ReverseStep',
    'Verification',
    'apply_denoiserep',
    'closed_form',
    'evaluating',
    'format_table',
    'fuse_checkpoint',
    'fuse_model',
    'fuse_state_dict',
    'read_checkpoint',
    'verify_fusion',
]
