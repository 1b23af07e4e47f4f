"""The noise schedule of the diffusion, and the constants of its reverse steps."""

from typing import NamedTuple

import torch
from torch import Tensor


class ReverseStep(NamedTuple):
    """The constants of one timestep t, or of several.

    Attributes:
        signal: ``sqrt(abar_t)``, the factor of the feature in the noised feature.
        noise: ``sqrt(1 - abar_t)``, the factor of the noise in the noised feature.
        c1: ``beta_t / (sqrt(alpha_t) sqrt(1 - abar_t))``, the factor of the predicted noise in the reverse step.
        c3_minus_1: ``c3 - 1 = 1 / sqrt(alpha_t) - 1``, where c3 is the factor of the feature in the reverse step.
    """

    signal: float | Tensor
    noise: float | Tensor
    c1: float | Tensor
    c3_minus_1: float | Tensor


class NoiseSchedule:
    """A linear noise schedule; the defaults come from the official code of DenoiseRep (arXiv 2406.08773).

        ``alpha_t = 1 - beta_t``,   ``abar_t = alpha_0 alpha_1 ... alpha_t``
        noised feature:  ``x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps``
        reverse step:    ``x' = c3 x - c1 eps_hat(x)``

    The timestep t is the index into the arrays. Layers have the timesteps 1 ... num_timesteps - 1; alpha_0 belongs to
    no layer, but is a factor of every abar. Constants are computed in float64: float32 loses three digits of
    ``1 - abar`` and ``c3 - 1``.

    Args:
        beta_start: beta at index 0, in (0, 1).
        beta_end: beta at the last index, in [beta_start, 1).
        num_timesteps: Length of the arrays, at least 2.

    Attributes:
        betas: float64, shape (num_timesteps,).
        alphas: float64, shape (num_timesteps,).
        alphas_cumprod: float64, shape (num_timesteps,), ``abar``.

    Raises:
        ValueError: An argument is outside its range.
    """

    def __init__(self, beta_start: float = 1e-4, beta_end: float = 2e-3, num_timesteps: int = 1000) -> None:
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f'betas must satisfy 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}')
        if num_timesteps < 2:
            raise ValueError(f'num_timesteps must be at least 2, got {num_timesteps}')
        self.betas = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64, device='cpu')
        self.alphas = 1 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)

    def __len__(self) -> int:
        return len(self.betas)

    def reverse_step(self, timestep: int) -> ReverseStep:
        """Returns the constants of one timestep.

        Args:
            timestep: t, from 1 to ``len(self) - 1``.

        Raises:
            ValueError: The timestep is outside that range.
        """
        if not 1 <= timestep < len(self):
            raise ValueError(f'timestep must be between 1 and {len(self) - 1}, got {timestep}')
        steps = self.__dict__.setdefault('_steps', {})  # computed once; models pickled by version 0.1 have none
        if timestep not in steps:
            steps[timestep] = self._compute_step(timestep)
        return steps[timestep]

    def _compute_step(self, timestep: int) -> ReverseStep:
        log_alphas = torch.log1p(-self.betas[: timestep + 1])
        one_minus_abar = -torch.expm1(log_alphas.sum()).item()
        c3_minus_1 = torch.expm1(-0.5 * log_alphas[timestep]).item()
        c1 = self.betas[timestep].item() * (1 + c3_minus_1) / one_minus_abar**0.5
        return ReverseStep((1 - one_minus_abar) ** 0.5, one_minus_abar**0.5, c1, c3_minus_1)
