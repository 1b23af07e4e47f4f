"""The diffusion schedule: how much noise each step adds, and what one reverse step does about it."""

from typing import NamedTuple

import torch


class ReverseStep(NamedTuple):
    """The four numbers of one timestep t that the method uses, as Python floats.

    Attributes:
        signal: ``sqrt(abar_t)``, the weight of the feature in the noised feature.
        noise: ``sqrt(1 - abar_t)``, the weight of the noise in it.
        c1: ``beta_t / (sqrt(alpha_t) sqrt(1 - abar_t))``, the weight of the predicted noise in the reverse step.
        c3_minus_1: ``1 / sqrt(alpha_t) - 1``, what the reverse step scales the feature by, less one.
    """

    signal: float
    noise: float
    c1: float
    c3_minus_1: float


class NoiseSchedule:
    """A linear noise schedule (DenoiseRep, arXiv 2406.08773; the default values are the official ones).

        ``alpha_t = 1 - beta_t``,   ``abar_t = alpha_0 alpha_1 ... alpha_t``
        noised feature:  ``x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps``
        reverse step:    ``x' = c3 x - c1 eps_hat(x)``

    The arrays are indexed by the timestep t directly. No layer has t = 0, so the timesteps of layers are
    1 ... num_timesteps - 1; alpha_0 is a factor of every abar all the same. All is computed in float64: in float32,
    ``1 - abar`` and ``c3 - 1`` lose three digits.

    Args:
        beta_start: beta at index 0, in (0, 1).
        beta_end: beta at the last index, in [beta_start, 1).
        num_timesteps: Length of the arrays, at least 2.

    Attributes:
        betas: float64, shape (num_timesteps,).
        alphas: float64, shape (num_timesteps,).
        alphas_cumprod: float64, shape (num_timesteps,), ``abar``.

    Raises:
        ValueError: A value is outside its range.
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
        log_alphas = torch.log1p(-self.betas[: timestep + 1])
        one_minus_abar = -torch.expm1(log_alphas.sum()).item()
        c3_minus_1 = torch.expm1(-0.5 * log_alphas[timestep]).item()
        c1 = self.betas[timestep].item() * (1 + c3_minus_1) / one_minus_abar**0.5
        return ReverseStep((1 - one_minus_abar) ** 0.5, one_minus_abar**0.5, c1, c3_minus_1)
