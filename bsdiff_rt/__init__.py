"""bsdiff-rt: diffusion-based bone suppression of chest X-rays, at engine speed."""

__version__ = "0.1.0"
