"""Remove the bones from an X-ray that is an array in memory, and save what the model made of it.

python examples/suppress_array.py examples/phantom10000001_cxr.png arrays
"""

import sys
from pathlib import Path

import cv2
import numpy as np

import bsdiff_rt


def main() -> None:
    """Read a picture, run the demo model, and write the soft-tissue image and the bone image."""
    if len(sys.argv) != 3:
        sys.exit("Give an X-ray and a folder for the results.")
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    cxr = cv2.imread(str(source), cv2.IMREAD_UNCHANGED)  # [H, W], uint8 or uint16, air dark
    with bsdiff_rt.open_model("demo") as model:
        result = model.suppress(cxr)
    folder.mkdir(exist_ok=True)
    for name, picture in {"soft_tissue": result.soft_tissue, "bone": result.bone}.items():
        cv2.imwrite(str(folder / f"{name}.png"), np.rint(picture * 255).astype(np.uint8))
    for warning in result.warnings:
        print(warning)


if __name__ == "__main__":
    main()
