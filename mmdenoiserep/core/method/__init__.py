"""The method: the noise schedule, the denoiser of a layer with its loss, the target layers, the conversion."""
