"""The method itself; imports torch only."""

from .calibration.calibrate import CalibratedLayer, CalibrationReport, calibrate
from .files.checkpoint import CheckpointError, fuse_checkpoint, read_checkpoint
from .calibration.closed_form import closed_form
from .method.convert import ConversionReport, apply_denoiserep
from .method.denoiser import DEFAULT_RANK, Denoiser
from .calibration.domain import explicit_maps
from .utils.errors import InputError
from .fusing.fuse import FusionError, fuse_model, fuse_state_dict
from .calibration.collect import collect_moments
from .method.layers import DenoiseConv2d, DenoiseLayer, DenoiseLinear
from .method.losses import DenoiseLosses, denoise_losses
from .calibration.moments import CalibrationError, Moments
from .files.moments_file import fingerprint, load_moments, save_moments
from .method.probe import evaluating
from .calibration.safety import safe_fit
from .method.schedule import NoiseSchedule, ReverseStep
from .utils.table import format_table
from .calibration.match import transport
from .fusing.verify import Verification, verify_fusion

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
