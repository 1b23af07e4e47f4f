"""The method itself; imports torch only."""

from .calibrate import CalibratedLayer, CalibrationReport, calibrate
from .checkpoint import CheckpointError, fuse_checkpoint, read_checkpoint
from .closed_form import closed_form
from .convert import ConversionReport, apply_denoiserep
from .fuse import FusionError, fuse_model, fuse_state_dict
from .gather import collect_moments
from .layers import DenoiseConv2d, DenoiseLayer, DenoiseLinear, Denoiser
from .moments import Moments
from .probe import evaluating
from .schedule import NoiseSchedule, ReverseStep
from .table import format_table
from .transport import transport
from .verify import Verification, verify_fusion

__all__ = [
    'CalibratedLayer',
    'CalibrationReport',
    'CheckpointError',
    'ConversionReport',
    'DenoiseConv2d',
    'DenoiseLayer',
    'DenoiseLinear',
    'Denoiser',
    'FusionError',
    'Moments',
    'NoiseSchedule',
    'ReverseStep',
    'Verification',
    'apply_denoiserep',
    'calibrate',
    'closed_form',
    'collect_moments',
    'evaluating',
    'format_table',
    'fuse_checkpoint',
    'fuse_model',
    'fuse_state_dict',
    'read_checkpoint',
    'transport',
    'verify_fusion',
]
