"""Run a bundle without bsdiff_rt: onnxruntime, numpy and the steps of the sampler `ddim`.

Use it as a start for another language or runtime. docs/bundle.md explains the inputs and the formulas.
This is stage 1 of a bundle with the schedule `cosine`, on the whole picture. `bsdiff-rt infer` also hides borders and
burned-in text, averages with the mirrored X-ray, runs stage 2 if the bundle has it on, and adds fine detail.

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
    denoiser = onnxruntime.InferenceSession(bundle / "denoiser.onnx", providers=["CPUExecutionProvider"])
    schedule = json.loads((bundle / "manifest.json").read_text())["schedule"]
    total, start, end = (schedule[key] for key in ("train_steps", "beta_start", "beta_end"))
    beta = start + (end - start) * np.sin(np.linspace(0, np.pi / 2, total)) ** 2
    alpha_bar = np.append(np.cumprod(1 - beta), 1.0)  # the last one is for the clean picture
    alphas, sigmas = np.sqrt(alpha_bar, dtype=np.float32), np.sqrt(1 - alpha_bar, dtype=np.float32)
    for t, s in pairwise(np.rint(np.linspace(total, 0, steps + 1)).astype(int) - 1):
        (out,) = denoiser.run(None, {"x_t": x_t, "cxr": cxr, "t": np.array([t], np.float32)})
        x0 = {"x0": out, "v": alphas[t] * x_t - sigmas[t] * out, "eps": (x_t - sigmas[t] * out) / alphas[t]}
        x0 = np.clip(x0[schedule["objective"]], -1, 1)
        x_t = alphas[s] * x0 + sigmas[s] / sigmas[t] * (x_t - alphas[t] * x0)
    return x_t


def main() -> None:
    """Read a picture, run the model at its own matrix, and write the soft-tissue image."""
    bundle, source, target = map(Path, sys.argv[1:])
    manifest = json.loads((bundle / "manifest.json").read_text())
    size = manifest["preprocessing"]["size"]
    pixels = cv2.imread(str(source), cv2.IMREAD_UNCHANGED)  # grey, square, air dark
    levels = pixels.astype(np.float32) / np.iinfo(pixels.dtype).max
    cxr = cv2.resize(levels, (size, size), interpolation=cv2.INTER_AREA)[None, None] * 2 - 1
    noise = np.random.default_rng(0).standard_normal(cxr.shape, dtype=np.float32)
    soft_tissue = suppress(bundle, cxr, noise, manifest["sampler"]["steps"])[0, 0]
    cv2.imwrite(str(target), np.rint((soft_tissue + 1) * 127.5).clip(0, 255).astype(np.uint8))


if __name__ == "__main__":
    main()
