"""train() on a Dataset or DataLoader of one's own."""

import functools
import os
import signal

import numpy as np
import pytest
import torch
from support.training import (
    CLASSES,
    STEPS,
    assert_same_run,
    images,
    losses,
    losses_of,
    saved,
    settings,
    trained,
)
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    default_collate,
)

import epsa_fused
from epsa_fused.train import Config, InputError, train
from epsa_fused.train.data import open_data
from epsa_fused.train.interrupts import SIGNALS
from epsa_fused.train.own_data import own_data
from epsa_fused.train.passes import held_out_of, passes_of
from epsa_fused.train.processes import Processes
from epsa_fused.train.training import Training


class Own(Dataset):
    """The images of the built-in folder, prepared here; with `noise` drawn for each sample."""

    classes = CLASSES

    def __init__(self, part: str, noise: float = 0.0) -> None:
        data = open_data(images(), 8)
        self.source = data.train if part == "train" else data.held_out
        self.mean, self.std = (np.array(v, np.float32) for v in (data.mean, data.std))
        self.noise = noise

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels = (self.source.image(index, None).astype(np.float32) - self.mean) / self.std
        if self.noise:  # from each of the global generators
            pixels = pixels + self.noise * (np.random.rand() + torch.rand(()).item())
        return torch.from_numpy(pixels).permute(2, 0, 1), int(self.source.labels[index])


def own(out, **given) -> Config:
    """Settings that name no data."""
    return Config(**{**vars(settings(out, **given)), "data": "nothing that exists"})


def loaders(noise: float = 0.0, **given) -> tuple[DataLoader, DataLoader]:
    training = DataLoader(Own("train", noise), **({"batch_size": 16, "shuffle": True} | given))
    return training, DataLoader(Own("val"), batch_size=7)


def cut_off_after(monkeypatch, steps: int, *args) -> None:
    one_step = Training._one_step

    def until(self, *given):
        if self.steps_done == steps:
            raise KeyboardInterrupt
        return one_step(self, *given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Training, "_one_step", until)
        train(*args)


# ---- Datasets ----


def test_a_dataset_is_evaluated_as_the_built_in_data(tmp_path):
    train(settings(tmp_path))
    built_in = train(settings(tmp_path, evaluate=True)).accuracy
    torch.save(saved(tmp_path, "best.pt")["state_dict"], tmp_path / "weights.pt")
    config = own(tmp_path / "out", evaluate=True, weights=str(tmp_path / "weights.pt"))
    for validation in (Own("val"), DataLoader(Own("val"), batch_size=5, shuffle=True)):
        found = train(config, validation=validation).accuracy
        assert found.loss == pytest.approx(built_in.loss, rel=1e-6)
        assert (found.top1, found.top5) == (built_in.top1, built_in.top5)


def test_a_dataset_goes_on_bitwise_with_any_number_of_workers(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    data = Own("train", noise=0.3), Own("val")
    given = {"dropout": 0.3, "ema": 0.9}
    uncut, cut = tmp_path / "uncut", tmp_path / "cut"
    result = train(own(uncut, **given), *data)
    assert result.steps == 2 * STEPS and losses_of(uncut)[-1] < losses_of(uncut)[0]
    cut_off_after(monkeypatch, 5, own(cut, **given, workers=1), *data)
    assert saved(cut)["steps_done"] == 4
    torch.rand(3), np.random.rand(3)
    train(own(cut, **given, resume="yes"), *data)
    assert_same_run(uncut, cut)


def test_random_numbers_of_samples_are_their_own(tmp_path):
    """Of the seed, the epoch and the image; dropout's go on as if there were none."""
    data = own_data(Own("train", noise=1.0), Own("val"), None)
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    keys = [(5, 1, 3), (5, 1, 20), (5, 2, 3), (6, 1, 3)]
    first, again = data.train.__getitems__(keys), data.train.__getitems__(keys[::-1])
    assert torch.equal(first.images, again.images.flip(0))
    assert len(torch.unique(first.images[[0, 2, 3]], dim=0)) == 3
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.random.get_state()[1].tolist() == state[1]


def test_the_network_can_be_loaded_and_its_preprocessing_cannot(tmp_path):
    train(own(tmp_path, epochs=1), Own("train"), Own("val"))
    found = epsa_fused.load_trained(tmp_path)
    assert found.classes == list(CLASSES) and found.shape == (8, 8, 3) and found.mean == ()
    assert found.model(torch.zeros(1, 3, 8, 8)).shape == (1, 3)
    with pytest.raises(InputError, match="got one on images that its user prepared"):
        found.predict([np.zeros((8, 8, 3), np.uint8)])
    with pytest.raises(InputError, match=r"as the user prepared them.* now .*normalised here"):
        train(settings(tmp_path, evaluate=True))
    accuracy = train(own(tmp_path, evaluate=True), validation=Own("val")).accuracy
    assert accuracy.top1 == found.top1


def test_what_a_resumed_run_is_compared_by(tmp_path):
    train(own(tmp_path, epochs=1), Own("train"), Own("val"))
    given = {"epochs": 2, "resume": "yes"}
    for data, classes, words in (
        (
            (Subset(Own("train"), range(95)), Own("val")),
            CLASSES,
            "training: a Dataset of 96 im.*95",
        ),
        ((loaders()[0], Own("val")), None, "training: a Dataset of 96 .* now a DataLoader of 96"),
        (
            (Own("train"), Own("val")),
            ("a", "b", "c"),
            r"classes: \['ant', .* now \['a', 'b', 'c'\]",
        ),
    ):
        with pytest.raises(InputError, match=f"is of another training: .*{words}"):
            train(own(tmp_path, **given), *data, classes=classes)


# ---- DataLoaders ----


@pytest.mark.parametrize(
    "given",
    (
        pytest.param({"num_workers": 1, "generator": torch.Generator()}, id="a worker"),
        pytest.param({"accumulate": 2, "batch_size": 8}, id="micro-batches"),
    ),
)
def test_a_dataloader_goes_on_bitwise(tmp_path, monkeypatch, given):
    torch.set_num_threads(1)
    settings = {"dropout": 0.3, "accumulate": given.get("accumulate", 1)}
    options = {name: value for name, value in given.items() if name != "accumulate"}
    data = loaders(noise=0.3, **options)
    uncut, cut = tmp_path / "uncut", tmp_path / "cut"
    assert train(own(uncut, **settings), *data).steps == 2 * STEPS
    cut_off_after(monkeypatch, STEPS + 5, own(cut, **settings), *data)
    assert (saved(cut)["epoch"], saved(cut)["step"]) == (1, 2)
    torch.rand(3), np.random.rand(3)
    train(own(cut, **settings, resume="yes"), *data)
    rows = [[line[:4] for line in losses(out)] for out in (uncut, cut)]
    assert rows[0] == rows[1] and torch.equal(trained(uncut), trained(cut))
    assert len({loss for *_, loss in rows[0]}) == 2 * STEPS


def test_an_epoch_has_whole_batches_only(tmp_path):
    """A smaller last one would count as much as the others."""
    training = DataLoader(Subset(Own("train"), range(90)), batch_size=16)
    assert train(own(tmp_path, epochs=1), training, Own("val"), classes=CLASSES).steps == 5


def in_process(rank: int, monkeypatch) -> Processes:
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    return Processes("cpu")


def test_two_processes_share_a_dataset(monkeypatch):
    """As the built-in data: a step's micro-batches do not depend on the number of processes."""
    data = own_data(Own("train"), Own("val"), None)
    config = Config(batch=16, accumulate=1, workers=0)
    shares = [passes_of(data, config, in_process(rank, monkeypatch)) for rank in (0, 1)]
    two = [[batch.labels.tolist() for batch in share.epoch(3, 0)] for share in shares]
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    alone = passes_of(data, Config(batch=16, accumulate=2, workers=0), Processes("cpu"))
    one = [batch.labels.tolist() for batch in alone.epoch(3, 0)]
    assert [two[0], two[1]] == [one[::2], one[1::2]]


def test_two_processes_share_a_dataloader_by_its_sampler(monkeypatch):
    config = Config(batch=16, workers=0)
    labels = []
    for rank in (0, 1):
        samplers = [
            DistributedSampler(Own(part), 2, rank, shuffle=part == "train")
            for part in ("train", "val")
        ]
        training = DataLoader(Own("train"), batch_size=8, sampler=samplers[0])
        validation = DataLoader(Own("val"), batch_size=8, sampler=samplers[1])
        data, processes = own_data(training, validation, None), in_process(rank, monkeypatch)
        passes, held_out = passes_of(data, config, processes), held_out_of(data, config, processes)
        assert (passes.steps, held_out.longest) == (STEPS, 2)
        labels.append([batch.labels for batch in held_out])
        first, again, resumed, other = (
            [batch.images for batch in passes.epoch(*at)] for at in ((1, 0), (1, 0), (1, 4), (2, 0))
        )
        assert len(first) == STEPS and torch.equal(torch.cat(first), torch.cat(again))
        assert torch.equal(torch.cat(resumed), torch.cat(first[4:]))
        assert not torch.equal(torch.cat(first), torch.cat(other))
    every = torch.cat([label for share in labels for label in share])
    assert every.sort().values.tolist() == Own("val").source.labels.tolist()


class Interrupted(Own):
    """Whoever reads a sample gets the signals that a terminal and a scheduler send."""

    def __getitem__(self, index: int):
        if torch.utils.data.get_worker_info() is not None:
            for number in SIGNALS:
                os.kill(os.getpid(), number)
        return super().__getitem__(index)


def test_loading_processes_leave_signals_to_the_training():
    training = DataLoader(Interrupted("train"), batch_size=16, num_workers=1)
    data, processes = own_data(training, Own("val"), None), Processes("cpu")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    passes = passes_of(data, Config(batch=16), processes)
    assert len([batch for batch in passes.epoch(0, 0) if not batch.failed]) == STEPS
    passes.close()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


# ---- what is refused ----


def test_dataloaders_whose_share_is_not_known(monkeypatch):
    processes = in_process(0, monkeypatch)
    config = Config(batch=16, workers=0)

    def of(part, **given):
        return DataLoader(Own(part), **({"batch_size": 8} | given))

    wrong = DistributedSampler(Own("train"), 4, 1)
    for training, words in (
        (of("train"), "under torchrun, got SequentialSampler: every process would have the same"),
        (of("train", sampler=wrong), "got num_replicas=4, rank=1"),
    ):
        with pytest.raises(InputError, match=rf"training: expected a DataLoader with .*{words}"):
            passes_of(own_data(training, Own("val"), None), config, processes)
    twice = Subset(Own("val"), range(23))
    validation = DataLoader(twice, batch_size=8, sampler=DistributedSampler(twice, 2, 0))
    with pytest.raises(
        InputError, match=r"validation: .* every image once, got one with 24 for 23"
    ):
        held_out_of(own_data(None, validation, CLASSES), config, processes)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(Own("train"))


class Changed(Own):
    """One sample is another one."""

    def __init__(self, part: str, at: int, sample) -> None:
        super().__init__(part)
        self.at, self.sample = at, sample

    def __getitem__(self, index: int):
        return self.sample if index == self.at else super().__getitem__(index)


IMAGE = torch.zeros(3, 8, 8)
TRAIN, VAL = functools.partial(Own, "train"), functools.partial(Own, "val")


def bare(dataset) -> object:
    """Without the attribute classes."""
    return lambda: Subset(dataset(), range(20))


class Lengthless:
    def __init__(self, places):
        self.places = places

    def __iter__(self):
        return iter(self.places)


class Overstated(Lengthless):
    def __len__(self):
        return 96


class Unreadable(Own):
    def __getitem__(self, index):
        raise OSError("no disk")


def no_image(samples):
    images, labels = default_collate(samples)
    return (images, labels) if len(labels) == 1 else (images[:0], labels[:0])


def changed(part: str, at: int, image: torch.Tensor, label: object = 0) -> Changed:
    return Changed(part, at, (image, label))


@pytest.mark.parametrize(
    ("words", "training", "validation"),
    (
        ("validation: expected a Dataset or DataLoader, as training is", TRAIN, lambda: None),
        ("training: expected a Dataset or DataLoader, got None", lambda: None, VAL),
        ("training: expected a Dataset with a length .*, got Endless", Endless, VAL),
        ("training: .* a length .*, got Endless", lambda: DataLoader(Endless()), VAL),
        ("validation: expected a Dataset with a length", TRAIN, lambda: Subset(VAL(), [])),
        ("classes: expected at least 2 .* None", bare(TRAIN), bare(VAL)),
        (r"validation\[0\]: expected \(image, label", TRAIN, lambda: Changed("val", 0, IMAGE)),
        ("floats, got torch.uint8", TRAIN, lambda: changed("val", 0, IMAGE.byte())),
        ("an integer label, got float", TRAIN, lambda: changed("val", 0, IMAGE, 0.5)),
        (r"validation\[3\]: .* 0 to 2, got 3", TRAIN, lambda: changed("val", 3, IMAGE, 3)),
        (r"training\[7\]: .* 0 to 2, got -1", lambda: changed("train", 7, IMAGE, -1), VAL),
        (r"\[3, 8, 8\] .* got \[3, 7, 8\]", lambda: changed("train", 7, IMAGE[:, 1:]), VAL),
        ("with batch_size=16, .* got batch_size=8", lambda: loaders(batch_size=8)[0], VAL),
        ("a batch_size, got one", lambda: loaders(batch_size=None, shuffle=False)[0], VAL),
        (
            "training: expected a DataLoader of at least 16 images for a step, got 15",
            lambda: DataLoader(TRAIN(), 16, sampler=RandomSampler(TRAIN(), num_samples=15)),
            VAL,
        ),
        (
            "without persistent_workers",
            lambda: loaders(num_workers=1, persistent_workers=True)[0],
            VAL,
        ),
        ("image once, .* drop_last", TRAIN, lambda: DataLoader(VAL(), 5, drop_last=True)),
        (
            "image once, .* a sampler that draws 3, 3 of them different, of 24",
            TRAIN,
            lambda: DataLoader(VAL(), 5, sampler=SubsetRandomSampler(range(3))),
        ),
        (
            "image once, .* a sampler that draws 24, .* of them different, of 24",
            TRAIN,
            lambda: DataLoader(VAL(), 5, sampler=RandomSampler(VAL(), replacement=True)),
        ),
        (
            r"num_replicas=1, rank=0\), got num_replicas=4, rank=1",
            lambda: DataLoader(TRAIN(), 16, sampler=DistributedSampler(TRAIN(), 4, 1)),
            VAL,
        ),
        (
            r"validation: .*num_replicas=1, rank=0\), got num_replicas=4",
            TRAIN,
            lambda: DataLoader(VAL(), 16, sampler=DistributedSampler(VAL(), 4, 1)),
        ),
        (
            "training: .* whose sampler has a length, got Lengthless",
            lambda: DataLoader(TRAIN(), 16, sampler=Lengthless(range(96))),
            VAL,
        ),
        (
            "training: expected 6 batches in an epoch, .* got 2",
            lambda: DataLoader(TRAIN(), 16, sampler=Overstated(range(20))),
            VAL,
        ),
        ("at least one image, got none", TRAIN, lambda: DataLoader(VAL(), 8, collate_fn=no_image)),
        (r"training\[\d+\]: cannot be read: no disk", lambda: Unreadable("train"), VAL),
        (
            "a batch of validation: expected a label from 0 to 2, got 3",
            TRAIN,
            lambda: DataLoader(changed("val", 3, IMAGE, 3), 8),
        ),
        (".image, label., got int", TRAIN, lambda: DataLoader(VAL(), 8, collate_fn=len)),
    ),
)
def test_what_it_refuses(tmp_path, training, validation, words):
    with pytest.raises(InputError, match=words):
        train(own(tmp_path, epochs=1), training(), validation())


def named(part: str, classes: object) -> Own:
    data = Own(part)
    data.classes = classes
    return data


@pytest.mark.parametrize(
    ("training", "validation", "given"),
    (
        (["a", "b", "c"], ["a", "c", "b"], None),
        (["a", "b", "c"], ["a", "b"], None),
        (["a", "b", "c"], ["a", "b", "c"], ["c", "b", "a"]),
        (["a", "b", "c"], ["a", "b", "c"], ["x", "y"]),
        (None, ["a", "b", "c"], ["b", "a", "c"]),
    ),
)
def test_classes_that_contradict_are_refused(training, validation, given):
    with pytest.raises(InputError, match=r"classes: expected the same names in one order, got \["):
        own_data(named("train", training), named("val", validation), given)


def test_the_caller_may_rename_classes():
    parts = (named(part, ["n1", "n2", "n3"]) for part in ("train", "val"))
    data = own_data(*parts, list("xyz"))
    assert data.classes == ["x", "y", "z"]


def test_strings_and_numbers_of_numpy_can_be_read_back(tmp_path):
    config = own(tmp_path, epochs=1, lr=np.float64(0.05), model=np.str_("small_epsanet"))
    classes = list(np.array(["x", "y", "z"]))
    train(config, Own("train"), Own("val"), classes=classes)
    assert epsa_fused.load_trained(tmp_path).classes == ["x", "y", "z"]
    config = own(tmp_path, epochs=1, lr=0.05, resume="yes")
    train(config, Own("train"), Own("val"), classes=["x", "y", "z"])


def test_a_loader_that_keeps_its_workers_goes_on_afterwards(tmp_path):
    loader = DataLoader(Own("val"), 8, num_workers=1, persistent_workers=True)
    train(own(tmp_path, epochs=1), Own("train"), loader)
    assert sum(len(labels) for _, labels in loader) == 24


def test_noise_of_an_evaluation_is_the_same_every_time(tmp_path):
    """Also that of a DataLoader."""
    train(own(tmp_path, epochs=1), Own("train"), Own("val"))
    losses = {
        train(own(tmp_path, evaluate=True), validation=DataLoader(Own("val", 1.0), 8)).accuracy.loss
        for _ in range(2)
    }
    assert len(losses) == 1


def test_batches_may_be_prepared_by_the_loader(tmp_path):
    """The dataset itself has other images."""

    def halved(samples):
        images, labels = default_collate(samples)
        return images[:, :, ::2, ::2], labels

    parts = [DataLoader(Own(p), 16, collate_fn=halved) for p in ("train", "val")]
    train(own(tmp_path, epochs=1), *parts)
    assert epsa_fused.load_trained(tmp_path).shape == (4, 4, 3)
