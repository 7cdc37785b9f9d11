"""timm's training script with EPSANet among its models:

    python examples/timm_train.py train.py --data-dir imagenet --model epsanet50 --amp

timm's package has no train.py. Take that of your timm's version from its repository,
https://github.com/huggingface/pytorch-image-models. Scripts like it, such as validate.py, work too.
"""

import runpy
import sys
from pathlib import Path

import epsa_fused

if len(sys.argv) < 2:
    sys.exit("usage: timm_train.py SCRIPT [the script's arguments]")
epsa_fused.register_timm()
sys.argv = sys.argv[1:]
sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as if the script had been started
runpy.run_path(sys.argv[0], run_name="__main__")
