"""Training of the denoiser and the enhancer, and the data they learn from."""
