"""Run a bundle without bsdiff_rt: onnxruntime, numpy and the steps of the sampler `ddim`.

Use it as a start for another language or runtime. docs/bundle.md explains the inputs and the formulas.
The model sees the whole picture here, at its own matrix. `bsdiff-rt infer` also hides borders and burned-in text,
averages with the mirrored X-ray, and adds fine detail.

    python examples/own_runtime.py bsdiff_rt/bundles/demo examples/phantom10000001_cxr.png out.png
"""

import json
import sys
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import onnxruntime


def suppress(bundle: Path, cxr: np.ndarray, x_t: np.ndarray, steps: int) -> np.ndarray:
    """Return the soft-tissue image, [1, 1, S, S] in [-1, 1], of an X-ray of that shape and range; x_t is noise."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    total, start, end = (manifest["schedule"][key] for key in ("train_steps", "beta_start", "beta_end"))
    beta = start + (end - start) * (1 - np.cos(np.pi * np.arange(total) / (total - 1))) / 2  # schedule "cosine"
    alpha_bar = np.append(np.cumprod(1 - beta), 1.0)  # the last one belongs to the clean picture
    timesteps = [*(np.rint(total * np.arange(steps, 0, -1) / steps).astype(int) - 1), total]
    denoiser = onnxruntime.InferenceSession(bundle / "denoiser.onnx", providers=["CPUExecutionProvider"])
    for now, then in pairwise(timesteps):
        (out,) = denoiser.run(None, {"x_t": x_t, "cxr": cxr, "t": np.array([now], np.float32)})
        alpha, sigma = np.sqrt(alpha_bar[now]), np.sqrt(1 - alpha_bar[now])
        x0 = {"x0": out, "v": alpha * x_t - sigma * out, "eps": (x_t - sigma * out) / alpha}
        x0 = np.clip(x0[manifest["schedule"]["objective"]], -1, 1)
        eps = (x_t - alpha * x0) / sigma
        x_t = (np.sqrt(alpha_bar[then]) * x0 + np.sqrt(1 - alpha_bar[then]) * eps).astype(np.float32)
    if manifest["enhance"]:
        enhancer = onnxruntime.InferenceSession(bundle / "enhancer.onnx", providers=["CPUExecutionProvider"])
        (x_t,) = enhancer.run(None, {"x": x_t})
    return x_t


def main() -> None:
    """Read a picture, run the model at its own matrix, and write the soft-tissue image."""
    bundle, source, target = map(Path, sys.argv[1:])
    manifest = json.loads((bundle / "manifest.json").read_text())
    size, steps = manifest["preprocessing"]["size"], manifest["sampler"]["steps"]
    pixels = cv2.imread(str(source), cv2.IMREAD_UNCHANGED)  # grey, square, air dark
    levels = pixels.astype(np.float32) / np.iinfo(pixels.dtype).max
    cxr = cv2.resize(levels, (size, size), interpolation=cv2.INTER_AREA)[None, None] * 2 - 1
    noise = np.random.default_rng(0).standard_normal(cxr.shape, dtype=np.float32)
    soft_tissue = suppress(bundle, cxr, noise, steps)[0, 0]
    cv2.imwrite(str(target), np.rint((soft_tissue + 1) * 127.5).clip(0, 255).astype(np.uint8))


if __name__ == "__main__":
    main()
