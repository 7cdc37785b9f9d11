"""`python -m epsa_fused.predict RUN IMAGE...`: what a trained network sees in images."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from ._commands import while_read
from .trained import load_trained


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the likeliest classes of each image.

    Returns the exit code. 0: done. 2: the run or an image cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="python -m epsa_fused.predict",
        description="Names the likeliest classes of images, by a network that was trained here.",
    )
    parser.add_argument(
        "run", help="the folder of a training (--out), or its best.pt or best.safetensors"
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="an image file")
    parser.add_argument("--top", type=int, default=5, help="how many classes [5]")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each image")
    options = parser.parse_args(arguments)
    if options.top < 1:
        parser.error(f"--top: expected at least 1, got {options.top}")
    try:
        trained = load_trained(options.run)
        for path in options.images:
            (classes,) = trained.predict([path], options.top)
            if options.json:
                rows = [{"class": name, "probability": share} for name, share in classes]
                print(json.dumps({"image": path, "classes": rows}), flush=True)
            else:
                shown = ", ".join(f"{name} {share:.1%}" for name, share in classes)
                print(f"{path}: {shown}", flush=True)
    except ValueError as error:  # InputError is one
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(while_read(main))
