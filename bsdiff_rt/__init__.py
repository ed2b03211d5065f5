"""bsdiff-rt: diffusion-based bone suppression of chest X-rays, at engine speed."""

import os

__version__ = "0.1.0"

# ONNX Runtime's packages from 1.29 on send Microsoft what they run, and where, with an identifier kept in the user's
# cache (its docs/Privacy.md). Nothing leaves a hospital by default; who sets the variable decides.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
