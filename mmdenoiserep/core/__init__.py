"""The method itself; imports torch only."""

from .calibrate import CalibratedLayer, CalibrationReport, calibrate
from .checkpoint import CheckpointError, fuse_checkpoint, read_checkpoint
from .closed_form import closed_form
from .convert import ConversionReport, apply_denoiserep
from .denoiser import DEFAULT_RANK, Denoiser
from .domain import explicit_maps
from .errors import InputError
from .fuse import FusionError, fuse_model, fuse_state_dict
from .gather import collect_moments
from .layers import DenoiseConv2d, DenoiseLayer, DenoiseLinear
from .losses import DenoiseLosses, denoise_losses
from .moments import CalibrationError, Moments
from .moments_file import fingerprint, load_moments, save_moments
from .probe import evaluating
from .safety import safe_fit
from .schedule import NoiseSchedule, ReverseStep
from .table import format_table
from .transport import transport
from .verify import Verification, verify_fusion

__all__ = [
    'DEFAULT_RANK',
    'CalibratedLayer',
    'CalibrationError',
    'CalibrationReport',
    'CheckpointError',
    'ConversionReport',
    'DenoiseConv2d',
    'DenoiseLayer',
    'DenoiseLinear',
    'DenoiseLosses',
    'Denoiser',
    'FusionError',
    'InputError',
    'Moments',
    'NoiseSchedule',
    'ReverseStep',
    'Verification',
    'apply_denoiserep',
    'calibrate',
    'closed_form',
    'collect_moments',
    'denoise_losses',
    'evaluating',
    'explicit_maps',
    'fingerprint',
    'format_table',
    'fuse_checkpoint',
    'fuse_model',
    'fuse_state_dict',
    'load_moments',
    'read_checkpoint',
    'safe_fit',
    'save_moments',
    'transport',
    'verify_fusion',
]
