"""Fine-tune EPSANet-50 on a folder of images, from weights of your own or a ResNet-50's.

python examples/fine_tune.py FOLDER WEIGHTS

FOLDER has train/CLASS/*.jpg and val/CLASS/*.jpg. WEIGHTS is a best.pt, or a state_dict of PyTorch
or safetensors. The same command continues an interrupted training.
"""

import sys

from epsa_fused import load_trained
from epsa_fused.train import Config, train


def main(folder: str, weights: str, **changes) -> None:
    settings = {"out": "runs/fine-tuned", "epochs": 30, "batch": 64, "lr": 0.01}
    settings |= {"schedule": "cosine", "resume": "auto"} | changes
    train(Config.of(folder, weights=weights, **settings))

    trained = load_trained(settings["out"])  # of the best epoch
    print(f"{trained.top1:.1%} of the held-out images are named right")
    print(f"next: python -m epsa_fused.predict {settings['out']} IMAGE...")


if __name__ == "__main__":
    main(*sys.argv[1:])
