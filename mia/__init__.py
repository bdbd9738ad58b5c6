"""Membership inference on diffusion models, evaluated honestly."""

__version__ = "0.1.0"
