"""The core: denoisers, fusing, calibration and files, on torch and greenlet."""

from .calibration.closed_form import closed_form
from .calibration.collect import collect_moments
from .calibration.domain import fit_domain
from .calibration.maps import explicit_maps
from .calibration.match import Support, transport
from .calibration.moments import CalibrationError, Moments
from .calibration.report import CalibratedLayer, CalibrationReport
from .calibration.solve import solve_denoisers
from .files.checkpoint import read_checkpoint
from .files.fused import FusedCheckpoint, fuse_checkpoint
from .files.moments_file import fingerprint, load_moments, save_moments
from .fusing.fuse import FusionError, fuse_model, fuse_state_dict
from .fusing.verify import Verification, compare_models, verify_fusion
from .method.convert import ConversionReport, apply_denoiserep
from .method.denoiser import DEFAULT_RANK, Denoiser
from .method.layers import DenoiseConv2d, DenoiseLayer, DenoiseLinear
from .method.losses import DenoiseLosses, denoise_losses
from .method.probe import evaluating
from .method.schedule import NoiseSchedule, ReverseStep
from .method.select import select_layers
from .utils.errors import CheckpointError, InputError
from .utils.table import format_table

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
    'FusedCheckpoint',
    'FusionError',
    'InputError',
    'Moments',
    'NoiseSchedule',
    'ReverseStep',
    'Support',
    'Verification',
    'apply_denoiserep',
    'closed_form',
    'collect_moments',
    'denoise_losses',
    'compare_models',
    'evaluating',
    'explicit_maps',
    'fingerprint',
    'fit_domain',
    'format_table',
    'fuse_checkpoint',
    'fuse_model',
    'fuse_state_dict',
    'load_moments',
    'read_checkpoint',
    'save_moments',
    'select_layers',
    'solve_denoisers',
    'transport',
    'verify_fusion',
]
