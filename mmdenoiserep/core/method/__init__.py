"""The method: the schedule, the denoiser of a layer and its loss, which layers get one, and the conversion."""
