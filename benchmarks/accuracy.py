"""What small networks learn: PSA against SE, fused against reference PSA, and by which start.

    python benchmarks/accuracy.py                          scikit-learn's digits, 5 seeds
    python benchmarks/accuracy.py --data cifar-10-batches-py
    python benchmarks/accuracy.py --epochs 1 --seeds 1     a quick look
    python benchmarks/accuracy.py --start                  does a start from another network help?

epsa_fused.train trains every network from the seeds 0, 1, ... with its recipe for the data. The
accuracy is that of the last epoch, not of the best. The trained PSA networks are also evaluated by
the other implementation, and the two that started from one seed are compared image by image. The
same command continues an interrupted run. It writes a CSV with one row per training, with the
commit and the date of its end.

With --start a PSA network learns the digits 5 to 9 from 20 images each. It starts at random, or by
load_backbone from an SE network that learned the digits 0 to 4, without that one's classifier. The
accuracy is that on all other images of 5 to 9.
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
from torch.utils.data import TensorDataset

import epsa_fused
from epsa_fused.models import MODELS
from epsa_fused.train import Config, InputError, Result, train
from epsa_fused.train.data import Data, Source, kind_of_data, open_data
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

STARTS = ("random", "another network")
SHOTS = 20  # images of each class
SHOWN = (3, 10, 30)  # epochs of which a row has the accuracy


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits", help="'digits', or CIFAR-10's folder")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each network [5]")
    parser.add_argument("--epochs", type=int, help="of each [those of the recipe]")
    parser.add_argument("--runs", default="build/accuracy", help="folder of checkpoints and logs")
    parser.add_argument("--out", default="benchmarks/results", help="folder of the CSV")
    parser.add_argument("--name", help="of the CSV [accuracy-DATA, or start-DATA]")
    parser.add_argument("--start", action="store_true", help="compare two starts, on digits")
    options = parser.parse_args(arguments)
    if options.start and options.data != "digits":
        parser.error(f"--start: expected --data digits, got {options.data}")
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
    x = prepared(torch.from_numpy(images), data)
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


def run_starts(options: argparse.Namespace) -> list[dict] | None:
    """One row per training from each start; None after an interrupt."""
    data = open_data("digits", 0)
    folder = Path(options.runs, "start")
    given = {} if options.epochs is None else {"epochs": options.epochs}
    given |= {"channels_last": True, "resume": "auto", "batch": 25}
    low, high = range(5), range(5, 10)

    parts = [of_classes(source, data, low) for source in (data.train, data.held_out)]
    out = folder / "another-network"
    config = Config.of("digits", model="small_senet", out=str(out), **given)
    if train(config, *parts, classes=list(map(str, low))).interrupted:
        return None
    weights = torch.load(out / CHECKPOINT, weights_only=True)["state_dict"]
    backbone = out / "backbone.pt"
    torch.save({n: t for n, t in weights.items() if not n.startswith("fc.")}, backbone)

    few, others = few_of_each(of_classes(data.train, data, high))
    held_out = of_classes(data.held_out, data, high)
    others = TensorDataset(*map(torch.cat, zip(others.tensors, held_out.tensors, strict=True)))
    rows = []
    for seed in range(options.seeds):
        for start in STARTS:
            print(f"\n{start}, seed {seed}", flush=True)
            config = Config.of(
                "digits",
                seed=seed,
                out=str(folder / f"{start.replace(' ', '-')}-start-{seed}"),
                weights=str(backbone) if start == STARTS[1] else "",
                **given,
            )
            if train(config, few, others, classes=list(map(str, high))).interrupted:
                return None
            row = {"start": start, "seed": seed, "images": len(few), "tested": len(others)}
            with (config.folder / "epochs.csv").open(newline="") as file:
                top1 = [float(epoch["top1"]) for epoch in csv.DictReader(file)]
            row |= {f"epoch_{n}": top1[min(n, len(top1)) - 1] for n in SHOWN}
            rows.append(row | provenance())
    return rows


def of_classes(source: Source, data: Data, classes: range) -> TensorDataset:
    """The images of these classes, as the network takes them, with labels from 0."""
    chosen = [i for i, label in enumerate(source.labels) if label in classes]
    images = torch.from_numpy(np.stack([source.image(i, None) for i in chosen]))
    labels = torch.tensor([int(source.labels[i]) - classes[0] for i in chosen])
    return TensorDataset(prepared(images, data), labels)


def few_of_each(dataset: TensorDataset) -> tuple[TensorDataset, TensorDataset]:
    """The first SHOTS images of each class, and the others."""
    images, labels = dataset.tensors
    before = torch.stack([(labels == k).cumsum(0) for k in labels.unique()], 1)
    few = before.gather(1, labels[:, None]).squeeze(1) <= SHOTS
    return TensorDataset(images[few], labels[few]), TensorDataset(images[~few], labels[~few])


def prepared(images: Tensor, data: Data) -> Tensor:
    """Images [N, H, W, C] as the network takes them."""
    shape = (1, -1, 1, 1)
    x = images.permute(0, 3, 1, 2).float()
    return (x - torch.tensor(data.mean).view(shape)) / torch.tensor(data.std).view(shape)


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
    return {"row": row | provenance(), "answers": own.argmax(1).tolist()}


def provenance() -> dict:
    return {
        "device": device_name("cpu"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "epsa_fused": epsa_fused.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


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


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.2f} ± {100 * deviation:.2f}"


def summarize_starts(rows: list[dict]) -> None:
    """Print the table of the docs."""
    print("\n| start | " + " | ".join(f"after {n} epochs" for n in SHOWN) + " |")
    print("|---" * (1 + len(SHOWN)) + "|")
    for start in STARTS:
        own = [row for row in rows if row["start"] == start]
        cells = [spread([row[f"epoch_{n}"] for row in own]) for n in SHOWN]
        print(f"| {start} | " + " | ".join(cells) + " |")
    for n in SHOWN:
        by_start = [[r[f"epoch_{n}"] for r in rows if r["start"] == start] for start in STARTS]
        ahead = sum(b > a for a, b in zip(*by_start, strict=True))
        print(f"after {n}: {STARTS[1]} ahead from {ahead} of {len(by_start[0])} seeds")


def summarize(rows: list[dict]) -> None:
    """Print the table of the docs."""

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
        rows = run_starts(options) if options.start else run(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if rows is None:
        print("run the same command again to continue")
        return 130
    kind = "start" if options.start else "accuracy"
    name = options.name or f"{kind}-{Path(options.data).name}"
    write(Path(options.out, f"{name}.csv"), rows)
    (summarize_starts if options.start else summarize)(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
