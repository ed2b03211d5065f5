"""Training of the denoiser and the enhancer, and the data they learn from."""

from bsdiff_rt.errors import check_packages

check_packages("train", "accelerate", "monai", "psutil", "scipy", "tensorboard")
