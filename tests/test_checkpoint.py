"""Checkpoints survive crashes, and a resumed run is the run that was never stopped."""

import copy
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from pyrogen.distributions import Generator
from pyrogen.objectives import CriticLoss, GeneratorLoss, ZeroCentred
from pyrogen.training import AdversarialTrainer, Batches, Trainer, checkpoint, load, save

STEPS = 60


class Net(nn.Module):
    """Draws (dropout), has buffers (batch norm), and can be told to crash."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1)
        )
        self.calls, self.crash, self.pause = 0, None, 0.0

    def forward(self, x):
        if self.training:
            self.calls += 1
            time.sleep(self.pause)
            if self.calls == self.crash:
                raise RuntimeError("crash")
        return (self.net(x) - x.sum(1, keepdim=True)).square().mean()


def data():
    return torch.randn(70, 2, generator=torch.Generator().manual_seed(5))


def stream():
    while True:
        yield torch.randn(8, 2)


def loader(**options):
    return DataLoader(TensorDataset(data()), batch_size=8, **options)


FEEDS = {
    "batches": lambda: Batches(
        data(), batch_size=8, transform=lambda x: x + 0.1 * torch.rand_like(x)
    ),
    "loader": lambda: loader(shuffle=True),
    "own generator": lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(3)),
    "own sampler": lambda: loader(
        sampler=RandomSampler(data(), generator=torch.Generator().manual_seed(3))
    ),
    "own batch sampler": lambda: DataLoader(
        TensorDataset(data()),
        batch_sampler=BatchSampler(
            RandomSampler(data(), generator=torch.Generator().manual_seed(3)), 8, False
        ),
    ),
    "list": lambda: list(data().split(8)),
    "stream": stream,
}


def build(feed, *, seed=1, pause=0.0, crash=None):
    """Everything that is made anew in a new process."""
    torch.manual_seed(seed)
    net = Net()
    net.crash, net.pause = crash, pause
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    schedule = lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    trainer = Trainer(net, optimizer, schedule=schedule, average=0.9, clip=1.0)
    x = data()
    return trainer, FEEDS[feed](), lambda: net(x + 0.3 * torch.randn_like(x))


def fit(trainer, batches, validation, **options):
    options = {"steps": STEPS, "every": 7, "progress": False} | options
    return trainer.fit(batches, validation=validation, **options)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def outcome(trainer, history):
    """All that a run leaves, down to the next random number."""
    return {
        "used": copy.deepcopy(trainer.objective.state_dict()),
        "state": trainer.state_dict(),
        "losses": history.losses,
        "validation": history.validation,
        "validation_steps": history.validation_steps,
        "stopped": history.stopped,
        "random": torch.rand(3),
    }


def uninterrupted(feed, **options):
    trainer, *rest = build(feed)
    return outcome(trainer, fit(trainer, *rest, **options))


# Exact resumption


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("crashes", [(10,), (1, 7, 8, 30), (57,)], ids=str)
def test_a_resumed_run_is_the_uninterrupted_run(feed, crashes, tmp_path):
    path = tmp_path / "run.pt"
    for i, crash in enumerate(crashes):
        trainer, *rest = build(feed, seed=20 + i if path.exists() else 1, crash=crash)
        with pytest.raises(RuntimeError, match="crash"):
            fit(trainer, *rest, checkpoint=path)
    # A new process has other weights and another seed; the file has the last word.
    trainer, *rest = build(feed, seed=99 if path.exists() else 1)
    history = fit(trainer, *rest, checkpoint=path)
    assert equal(outcome(trainer, history), uninterrupted(feed))


@pytest.mark.parametrize("feed", ["batches", "loader"])
def test_one_pass_is_resumed_too(feed, tmp_path):
    path = tmp_path / "run.pt"
    trainer, *rest = build(feed, crash=6)
    with pytest.raises(RuntimeError, match="crash"):
        fit(trainer, *rest, checkpoint=path, steps=None, every=2)
    trainer, *rest = build(feed, seed=9)
    history = fit(trainer, *rest, checkpoint=path, steps=None, every=2)
    assert len(history.losses) == 9
    assert equal(outcome(trainer, history), uninterrupted(feed, steps=None, every=2))


def test_writing_checkpoints_changes_nothing(tmp_path):
    trainer, *rest = build("loader")
    history = fit(trainer, *rest, checkpoint=tmp_path / "run.pt")
    assert equal(outcome(trainer, history), uninterrupted("loader"))


def test_a_finished_run_returns_at_once_with_the_weights_to_use(tmp_path):
    path = tmp_path / "run.pt"
    trainer, *rest = build("batches")
    first = outcome(trainer, fit(trainer, *rest, checkpoint=path))
    written = path.stat().st_mtime_ns
    trainer, *rest = build("batches", seed=2, crash=1)
    history = fit(trainer, *rest, checkpoint=path)
    assert equal(outcome(trainer, history), first)
    assert path.stat().st_mtime_ns == written
    # and the trainer goes on from the weights of training
    trainer.continue_training()
    assert equal(trainer.state_dict(), first["state"])


def test_a_finished_run_can_be_extended(tmp_path):
    path = tmp_path / "run.pt"
    trainer, *rest = build("loader")
    fit(trainer, *rest, checkpoint=path, steps=42)  # a multiple of every, like the longer run's
    trainer, *rest = build("loader", seed=2)
    history = fit(trainer, *rest, checkpoint=path)
    assert equal(outcome(trainer, history), uninterrupted("loader"))


def test_an_early_stop_is_final(tmp_path):
    path = tmp_path / "run.pt"

    def run(seed, crash=None):
        trainer, batches, _ = build("batches", seed=seed, crash=crash)
        history = fit(
            trainer,
            batches,
            lambda: abs(trainer.steps - 14) / 10,
            checkpoint=path,
            patience=3,
            steps=1000,
        )
        return outcome(trainer, history)

    first = run(1)
    assert first["stopped"] == "patience"
    assert len(first["losses"]) == 14 + 3 * 7
    assert equal(run(2, crash=1), first)


def test_patience_is_counted_across_a_crash(tmp_path):
    path = tmp_path / "run.pt"

    def run(seed, crash, file):
        trainer, batches, _ = build("batches", seed=seed, crash=crash)
        validation = lambda: abs(trainer.steps - 14) / 10  # noqa: E731
        history = fit(trainer, batches, validation, checkpoint=file, patience=3, steps=1000)
        return outcome(trainer, history)

    with pytest.raises(RuntimeError, match="crash"):
        run(1, 30, path)
    assert equal(run(2, None, path), run(1, None, None))


def test_an_adversarial_run_is_resumed_exactly(tmp_path):
    def run(seed, path, crash=None):
        torch.manual_seed(seed)
        generator = Generator(nn.Linear(2, 2), 2, (2,))
        critic = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))

        def part(objective, module):
            optimizer = torch.optim.Adam(module.parameters(), 0.01, betas=(0.0, 0.99))
            schedule = lr_scheduler.CosineAnnealingLR(optimizer, 40)
            average = 0.9 if module is generator else None
            return Trainer(objective, optimizer, schedule=schedule, average=average)

        trainer = AdversarialTrainer(
            part(GeneratorLoss(generator, critic), generator),
            part(CriticLoss(generator, critic, penalty=ZeroCentred()), critic),
            critic_steps=2,
        )
        calls = iter(range(1000))

        def transform(x):
            if next(calls) == crash:
                raise RuntimeError("crash")
            return x

        batches = Batches(data(), batch_size=8, transform=transform)
        history = trainer.fit(batches, steps=40, every=9, checkpoint=path, progress=False)
        return trainer.state_dict(), generator.state_dict(), history.losses, torch.rand(3)

    path = tmp_path / "run.pt"
    with pytest.raises(RuntimeError, match="crash"):
        run(1, path, crash=25)
    assert equal(run(2, path), run(1, None))
    with pytest.raises(ValueError, match="was written by AdversarialTrainer, not by Trainer"):
        fit(*build("batches"), checkpoint=path)


SCHEDULES = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.02, total_steps=30),
    "steps": lambda o: lr_scheduler.MultiStepLR(o, [5, 15]),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, total_iters=10), lr_scheduler.CosineAnnealingLR(o, 20)],
        milestones=[10],
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")  # torch's own
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_resumed(name, tmp_path):
    def run(seed, path, steps):
        torch.manual_seed(seed)
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
        trainer = Trainer(net, optimizer, schedule=SCHEDULES[name](optimizer))
        trainer.fit(list(data().split(8)), steps=steps, checkpoint=path, progress=False)
        return net.state_dict(), optimizer.param_groups[0]["lr"]

    path = tmp_path / "run.pt"
    run(1, path, 13)
    assert equal(run(2, path, 25), run(1, None, 25))


# Kills


def _child(feed, folder, pause):
    trainer, *rest = build(feed, pause=pause)
    history = fit(trainer, *rest, checkpoint=folder / "run.pt")
    torch.save(outcome(trainer, history), folder / "outcome.pt")
    os._exit(0)


def _die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def _die_in_the_middle_of_writing(state, file):
    file.write(b"PK half a checkpoint")
    file.flush()
    _die()


def _die_when(stage, count):
    """Let the process die at the ``count``-th write of a checkpoint."""
    usual = {"write": torch.save, "replace": os.replace}[stage]
    last = {"write": _die_in_the_middle_of_writing, "replace": _die}[stage]
    calls = iter(range(1, 1000))

    def count_down(*args):
        return (last if next(calls) == count else usual)(*args)

    if stage == "write":
        checkpoint.torch.save = count_down
    else:
        checkpoint.os.replace = count_down


# Sums are rounded differently by another number of threads.
THREADS = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
ENDS = {
    "batches": [("write", 1), ("write", 3), ("replace", 2), "time", "time", None],
    "loader": [("write", 2), "time", None],
}


def _kill_often(feed, folder):
    """Run ``fit`` in forks of this process, each killed at its own moment, until it is done."""
    moments = random.Random(0)
    path = folder / "run.pt"
    for end in ENDS[feed]:
        pid = os.fork()
        if pid == 0:
            if isinstance(end, tuple):
                _die_when(*end)
            _child(feed, folder, 0.005 if end == "time" else 0.0)
        if end == "time":
            before = path.stat().st_mtime_ns
            patience = time.monotonic() + 20
            while path.stat().st_mtime_ns == before and time.monotonic() < patience:
                time.sleep(0.001)  # until there is progress, if there is any left to make
            time.sleep(moments.uniform(0.0, 0.05))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed if isinstance(end, tuple) else killed or status == 0, (end, status)
        assert path.exists() == (end != ("write", 1))
        assert not path.exists() or load(path)["state"]["steps"] in {*range(0, STEPS, 7), STEPS}


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_killed_runs_end_as_if_nothing_had_happened(tmp_path):
    for feed in ENDS:
        (tmp_path / feed).mkdir()
    root = Path(__file__).parents[1]
    # A process of its own: torch cannot take gradients in a fork of one that has done so.
    subprocess.run(
        [sys.executable, __file__, str(tmp_path), *ENDS],
        check=True,
        env=os.environ | {"PYTHONPATH": str(root)} | THREADS,
    )
    for feed in ENDS:
        end = torch.load(tmp_path / feed / "outcome.pt", weights_only=True)
        assert equal(end, uninterrupted(feed))
        assert {p.name for p in (tmp_path / feed).iterdir()} == {"run.pt", "outcome.pt"}


# Divergence


def test_a_checkpoint_never_holds_nan(tmp_path):
    path = tmp_path / "run.pt"

    class Breaks(Net):
        def forward(self, x):
            loss = super().forward(x)
            return loss * float("nan") if self.calls == 12 else loss

    net = Breaks()
    trainer = Trainer(net, torch.optim.SGD(net.parameters(), 0.01))
    with pytest.raises(
        FloatingPointError, match=r"Breaks is nan at step 12\..*last good .*run.pt"
    ):
        trainer.fit(stream(), steps=100, every=5, checkpoint=path, progress=False)
    assert load(path)["record"]["step"] == 10
    assert all(v.isfinite().all() for v in load(path)["state"]["objective"].values())


def test_weights_that_broke_in_the_last_step_are_not_written(tmp_path):
    path = tmp_path / "run.pt"

    class Hidden(Net):  # the loss of step 10 is finite, its gradient is not
        def forward(self, x):
            loss = super().forward(x)
            return loss + (loss - loss.detach()).sqrt() if self.calls == 10 else loss

    net = Hidden()
    trainer = Trainer(net, torch.optim.SGD(net.parameters(), 0.01))
    with pytest.raises(FloatingPointError, match="not finite by step 10"):
        trainer.fit(stream(), steps=100, every=5, checkpoint=path, progress=False)
    assert load(path)["record"]["step"] == 5


# Files


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    save({"x": 1}, path)

    def full(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(OSError, match="disk full"):
        save({"x": 2}, path)
    monkeypatch.undo()
    assert load(path) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_the_file_reaches_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        usual = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, usual=usual, name=name: (done.append(name), usual(*a))[1]
        )
    save({"x": 1}, tmp_path / "run.pt")
    assert done[:2] == ["fsync", "replace"]


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*none.pt"):
        load(tmp_path / "none.pt")
    path = tmp_path / "run.pt"
    save({"x": torch.ones(1000)}, path)
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a readable checkpoint"):
            load(path)
    path.write_text("hello")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        fit(*build("list"), checkpoint=path)


def test_files_of_other_make_are_refused(tmp_path):
    path = tmp_path / "run.pt"
    torch.save({"x": 1}, path)
    with pytest.raises(ValueError, match="something else than a checkpoint"):
        load(path)
    torch.save({"format": 99, "state": {}}, path)
    with pytest.raises(ValueError, match="format 99, this version reads 1"):
        load(path)


class Evil:
    def __reduce__(self):
        return (warnings.warn, ("code was run",))


def test_loading_runs_no_code(tmp_path):
    path = tmp_path / "run.pt"
    torch.save({"format": 1, "state": Evil()}, path)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load(path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    fit(*build("list"), checkpoint=path)
    other = nn.Linear(2, 1)
    trainer = Trainer(other, torch.optim.SGD(other.parameters(), 0.1))
    with pytest.raises(ValueError, match=r"run.pt' does not fit this trainer"):
        trainer.fit([torch.ones(1, 2)], checkpoint=path, progress=False)
    net = Net()
    trainer = Trainer(net, torch.optim.SGD(net.parameters(), 0.1), average=0.9)
    with pytest.raises(ValueError, match="with schedule, this one is without"):
        trainer.fit([torch.ones(1, 2)], checkpoint=path, progress=False)


def test_a_checkpoint_of_other_batches_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    fit(*build("list"), checkpoint=path, steps=5)
    trainer, _, validation = build("list")
    with pytest.raises(ValueError, match="another kind of batches than Batches"):
        fit(trainer, FEEDS["batches"](), validation, checkpoint=path)
    trainer, _, validation = build("list")
    with pytest.raises(
        ValueError, match="batches end after 2, the checkpoint was written after 5"
    ):
        fit(trainer, list(data().split(8))[:2], validation, checkpoint=path)


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    path = tmp_path / "run.pt"
    save({"lr": 0.1}, path)
    with pytest.raises(TypeError, match=r"state\['lr'\] is a numpy.float64. Convert it"):
        save({"lr": np.float64(0.1)}, path)
    assert load(path) == {"lr": 0.1}


if __name__ == "__main__":
    import torch._dynamo  # what the first step of an optimizer imports, once for all forks

    for name in sys.argv[2:]:
        _kill_often(name, Path(sys.argv[1]) / name)
