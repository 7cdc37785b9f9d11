"""PSA against SE at equal depth, and fused against reference PSA, by training small networks.

    python benchmarks/accuracy.py                          scikit-learn's digits, 5 seeds
    python benchmarks/accuracy.py --data cifar-10-batches-py
    python benchmarks/accuracy.py --epochs 1 --seeds 1     a quick look

epsa_fused.train trains every network from the seeds 0, 1, ... with its recipe for the data. The
accuracy is that of the last epoch, not of the best. The trained PSA networks are also evaluated by
the other implementation, and the two that started from one seed are compared image by image. The
same command continues an interrupted run. It writes a CSV with one row per training, with the
commit and the date of its end.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import epsa_fused
from epsa_fused.models import MODELS
from epsa_fused.train import Config, InputError, Result, train
from epsa_fused.train.data import Data, kind_of_data, open_data
from epsa_fused.train.training import CHECKPOINT

sys.path.insert(0, str(Path(__file__).parent))
from latency import device_name
from provenance import commit

NETWORKS = {
    "SE": {"model": "small_senet"},
    "PSA, reference": {"model": "small_epsanet", "psa": "reference"},
    "PSA, fused": {"model": "small_epsanet", "psa": "fused"},
}
EVALUATED_AT_ONCE = 256
MEASURED = "measured.json"  # beside a training's checkpoint


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits", help="'digits', or CIFAR-10's folder")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each network [5]")
    parser.add_argument("--epochs", type=int, help="of each [those of the recipe]")
    parser.add_argument("--runs", default="build/accuracy", help="folder of checkpoints and logs")
    parser.add_argument("--out", default="benchmarks/results", help="folder of the CSV")
    parser.add_argument("--name", help="of the CSV [accuracy-DATA]")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {options.seeds}")
    return options


def settings(options: argparse.Namespace, network: str, seed: int) -> Config:
    folder = network.lower().replace(", ", "-") + f"-{seed}"
    given = {} if options.epochs is None else {"epochs": options.epochs}
    out = Path(options.runs, Path(options.data).name, folder)
    return Config.of(
        options.data,
        seed=seed,
        out=str(out),
        channels_last=True,
        resume="auto",
        **NETWORKS[network],
        **given,
    )


@torch.no_grad()
def logits(config: Config, data: Data, psa: str) -> Tensor:
    """The logits [images, classes] of the held-out images, by the implementation `psa`."""
    weights = torch.load(config.folder / CHECKPOINT, weights_only=True)["state_dict"]
    network = MODELS[config.model](
        len(data.classes), fused=psa == "fused", in_chans=len(data.mean)
    ).eval()
    network.load_state_dict(weights)
    images = np.stack([data.held_out.image(i, None) for i in range(len(data.held_out.labels))])
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    shape = (1, -1, 1, 1)
    x = (x - torch.tensor(data.mean).view(shape)) / torch.tensor(data.std).view(shape)
    return torch.cat([network(part) for part in x.split(EVALUATED_AT_ONCE)])


def run(options: argparse.Namespace) -> list[dict] | None:
    """One row per training; None after an interrupt."""
    rows = []
    if kind_of_data(options.data) == "folder":
        raise InputError(
            f"--data: expected 'digits' or CIFAR-10's folder with data_batch_1, got {options.data}"
        )
    data = open_data(options.data, 0)
    for seed in range(options.seeds):
        answers = {}
        for network in NETWORKS:
            print(f"\n{network}, seed {seed}", flush=True)
            config = settings(options, network, seed)
            result = train(config)
            if result.interrupted:
                return None
            # A file keeps the measurement: a finished training is not measured again.
            file = config.folder / MEASURED
            if not file.exists():
                row = {"network": network, "seed": seed}
                measured = measure(config, data, row, result)
                partial = file.with_suffix(".partial")
                partial.write_text(json.dumps(measured))
                os.replace(partial, file)
            measured = json.loads(file.read_text())
            answers[config.model, config.psa] = measured["answers"]
            rows.append(measured["row"])
        reference, fused = (answers["small_epsanet", psa] for psa in ("reference", "fused"))
        rows[-1]["same_answers"] = statistics.mean(
            float(a == b) for a, b in zip(reference, fused, strict=True)
        )
    return rows


def measure(config: Config, data: Data, row: dict, result: Result) -> dict:
    """The row of a finished training, and its network's answer to each held-out image."""
    row = row | {"top1": result.accuracy.top1, "loss": result.accuracy.loss}
    row |= {"seconds": round(result.seconds, 1), "images_per_s": images_per_second(config)}
    row |= {"epochs": config.epochs, "parameters": parameters(config, data)}
    own = logits(config, data, config.psa)
    if config.model == "small_epsanet":
        labels = torch.from_numpy(data.held_out.labels)
        others = logits(config, data, "reference" if config.psa == "fused" else "fused")
        row["top1_in_other"] = (others.argmax(1) == labels).double().mean().item()
        row["logits_error"] = ((own - others).abs().max() / own.abs().max()).item()
    row |= {
        "device": device_name("cpu"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "epsa_fused": epsa_fused.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    return {"row": row, "answers": own.argmax(1).tolist()}


def images_per_second(config: Config) -> float:
    """The median of the training's log: a pause of the machine does not change it."""
    with (config.folder / "steps.csv").open(newline="") as file:
        speeds = [float(row["images_per_s"]) for row in csv.DictReader(file)]
    return round(statistics.median(speeds), 1)


def parameters(config: Config, data: Data) -> int:
    network = MODELS[config.model](len(data.classes), in_chans=len(data.mean))
    return sum(parameter.numel() for parameter in network.parameters())


def write(path: Path, rows: list[dict]) -> None:
    # The last row has every column.
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[-1]])
        writer.writeheader()
        writer.writerows(rows)


def summarize(rows: list[dict]) -> None:
    """Print the table of the docs."""

    def spread(values: list[float]) -> str:
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{100 * statistics.mean(values):.2f} ± {100 * deviation:.2f}"

    print(
        "\n| network | parameters | held-out top-1, %: mean ± deviation | worst "
        "| training, images/s | s |\n|---|---|---|---|---|---|"
    )
    for network in NETWORKS:
        own = [row for row in rows if row["network"] == network]
        accuracies = [row["top1"] for row in own]
        speed, seconds = (
            statistics.median(row[name] for row in own) for name in ("images_per_s", "seconds")
        )
        print(
            f"| {network} | {own[0]['parameters']:,} | {spread(accuracies)} "
            f"| {100 * min(accuracies):.2f} | {speed:,.0f} | {seconds:.0f} |"
        )
    psa = [row for row in rows if "PSA" in row["network"]]
    moved = sum(row["top1"] != row["top1_in_other"] for row in psa)
    same = [row["same_answers"] for row in rows if "same_answers" in row]
    print(
        f"\nTrained weights in the other implementation: {moved} of {len(psa)} change their "
        f"accuracy; logits differ by at most {max(row['logits_error'] for row in psa):.0e} of the "
        f"largest.\nFused and reference, trained from one seed: equal answers on {spread(same)} % "
        "of the held-out images."
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        rows = run(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if rows is None:
        print("run the same command again to continue")
        return 130
    name = options.name or f"accuracy-{Path(options.data).name}"
    write(Path(options.out, f"{name}.csv"), rows)
    summarize(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
