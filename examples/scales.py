"""Look at the scales: which kernel size a trained network weighs most, by depth and by image.

python examples/scales.py RUN IMAGE...

RUN is the folder of a training. It writes depth.png of all images, and a picture of each one.
"""

import sys
from pathlib import Path

import torch

from epsa_fused import load_trained, plots, record_attention

KERNELS = ("3x3", "5x5", "7x7", "9x9")

run, *images = sys.argv[1:]
trained = load_trained(run)
with torch.no_grad(), record_attention(trained.model) as scales:
    trained.model(trained.preprocess(images))

plots.depth(scales, KERNELS).figure.savefig("depth.png")
for i, image in enumerate(images):
    axes = plots.image(scales, i, KERNELS)
    axes.set_title(image)
    axes.figure.savefig(f"{Path(image).stem}-scales.png")
