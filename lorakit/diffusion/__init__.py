"""Live models: schedules, the parts of a base, adapters in them, the denoiser, inversion, metrics.

May import ground, weights and pictures. A new sampler of latents, a feature, a way to edit belongs here.
"""
