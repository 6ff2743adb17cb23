"""Steps, loops, averages, validation and what they leave behind."""

import copy
import io
import signal
import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import Distribution, constraints
from torch.utils.data import DataLoader, TensorDataset

from pyrogen.training import AdversarialTrainer, Batches, MovingAverage, Trainer
from pyrogen.training.base import CHECK


class Distance(nn.Module):
    """(theta - x)^2 / 2: a step of SGD moves theta by lr (x - theta)."""

    def __init__(self, theta=0.0):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta))

    def forward(self, x):
        return ((self.theta - x).square() / 2).mean()


class Net(nn.Module):
    """Regression with dropout and batch norm, so that modes and buffers matter."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1)
        )

    def forward(self, x):
        return (self.net(x) - x.sum(1, keepdim=True)).square().mean()


def sgd(module, lr=0.5):
    return torch.optim.SGD(module.parameters(), lr)


ONE = [torch.ones(1)]

# Steps


def test_step_is_a_gradient_step_and_returns_the_loss_before_it():
    distance = Distance(3.0)
    loss = Trainer(distance, sgd(distance)).step(torch.tensor(1.0))
    assert loss.item() == 2.0
    assert not loss.requires_grad
    assert distance.theta.item() == 2.0


def test_clip_shortens_the_gradient():
    distance = Distance(100.0)
    Trainer(distance, sgd(distance, 1.0), clip=2.0).step(torch.tensor(0.0))
    assert distance.theta.item() == pytest.approx(98.0, abs=1e-4)


def test_schedule_moves_at_every_step():
    distance = Distance(1.0)
    optimizer = sgd(distance, 1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    Trainer(distance, optimizer, schedule=schedule).fit([torch.zeros(1)], steps=3, progress=False)
    assert schedule.get_last_lr() == [0.125]


def test_only_what_the_optimizer_holds_moves():
    net = Net()
    before = copy.deepcopy(net.net[0].weight)
    optimizer = torch.optim.SGD(net.net[4].parameters(), 0.1)
    Trainer(net, optimizer).step(torch.randn(8, 2))
    assert torch.equal(net.net[0].weight, before)


def test_it_trains_inside_no_grad_and_leaves_it_on():
    distance = Distance(3.0)
    with torch.no_grad():
        Trainer(distance, sgd(distance)).fit(ONE, steps=2, progress=False)
        assert not torch.is_grad_enabled()
    assert distance.theta.item() == 1.5


# Averages


def test_average_follows_its_formula():
    distance = Distance(4.0)
    trainer = Trainer(distance, sgd(distance), average=MovingAverage(0.5))
    theta, average = 4.0, None
    for t in range(20):
        trainer.step(torch.tensor(0.0))
        theta *= 0.5
        decay = min(0.5, (1 + t) / (10 + t))
        average = theta if average is None else decay * average + (1 - decay) * theta
        assert trainer.average.values["theta"].item() == pytest.approx(average, rel=1e-5)
    assert distance.theta.item() == pytest.approx(theta)


def test_averaged_weights_are_used_after_fit_and_raw_ones_continue():
    def run(parts):
        distance = Distance(4.0)
        trainer = Trainer(distance, sgd(distance, 0.1), average=0.9)
        for steps in parts:
            trainer.fit([torch.zeros(1)], steps=steps, progress=False)
        return distance, trainer

    distance, trainer = run([20, 30])
    whole, other = run([50])
    assert distance.theta.item() == whole.theta.item()
    assert whole.theta.item() == other.average.values["theta"].item()
    assert distance.theta.item() != pytest.approx(4 * 0.9**50)
    trainer.step(torch.zeros(1))  # also a bare step goes on from the raw weights
    assert distance.theta.item() == pytest.approx(4 * 0.9**51, rel=1e-5)


def test_state_after_fit_is_that_of_training():
    distance = Distance(4.0)
    trainer = Trainer(distance, sgd(distance, 0.1), average=0.9)
    trainer.fit([torch.zeros(1)], steps=20, progress=False)
    used = distance.theta.item()
    state = trainer.state_dict()
    assert distance.theta.item() == used
    assert state["objective"]["theta"].item() == pytest.approx(4 * 0.9**20, rel=1e-5)


def test_average_covers_the_buffers_beside_what_moves():
    net = Net()
    net.register_buffer("far", torch.zeros(1))
    frozen = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    net.frozen = frozen
    trainer = Trainer(net, torch.optim.SGD(net.net.parameters(), 0.1), average=0.5)
    trainer.step(torch.randn(8, 2))
    first = net.net[1].running_mean.clone()
    trainer.step(torch.randn(8, 2))
    decay = 2 / 11
    expected = decay * first + (1 - decay) * net.net[1].running_mean
    assert torch.allclose(trainer.average.values["net.1.running_mean"], expected)
    assert trainer.average.values["net.1.num_batches_tracked"].item() == 2
    assert not any(name.startswith("frozen") for name in trainer.weights())


# fit


def test_losses_are_those_of_the_steps():
    distance, twin = Distance(1.0), Distance(1.0)
    batches = [torch.randn(3) for _ in range(7)]
    history = Trainer(distance, sgd(distance)).fit(batches, progress=False)
    trainer = Trainer(twin, sgd(twin))
    assert torch.equal(history.losses, torch.stack([trainer.step(x) for x in batches]))
    assert history.stopped == "end"
    assert history.seconds > 0
    assert torch.equal(distance.theta, twin.theta)


def test_batches_are_read_again_until_the_steps_are_taken():
    seen = []

    class Spy(Distance):
        def forward(self, x):
            seen.append(x.item())
            return super().forward(x)

    spy = Spy()
    history = Trainer(spy, sgd(spy)).fit(
        [torch.tensor(1.0), torch.tensor(2.0)], steps=5, progress=False
    )
    assert seen == [1, 2, 1, 2, 1]
    assert history.stopped == "steps"


def test_one_pass_over_a_loader_and_tuples():
    net = nn.Linear(2, 1)

    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, y):
            return (self.net(x) - y).square().mean()

    loader = DataLoader(TensorDataset(torch.randn(10, 2), torch.randn(10, 1)), batch_size=4)
    history = Trainer(Regression(), sgd(net, 0.1)).fit(loader, progress=False)
    assert len(history.losses) == 3


def test_an_iterator_that_ends_early_is_an_error():
    distance = Distance()
    trainer = Trainer(distance, sgd(distance))
    with pytest.raises(ValueError, match="ended after 3 and are an iterator"):
        trainer.fit((torch.ones(1) for _ in range(3)), steps=5, progress=False)
    assert trainer.steps == 3
    long = (torch.ones(1) for _ in range(9))
    assert len(trainer.fit(long, steps=5, progress=False).losses) == 5
    assert sum(1 for _ in long) == 4  # no batch is read that is not used


@pytest.mark.parametrize("at", [1, 57, 100, 101, 230])
def test_divergence_is_reported_with_its_exact_step(at):
    class Breaks(Distance):
        def forward(self, x):
            return super().forward(x) * (float("nan") if x.item() == at else 1.0)

    breaks = Breaks()
    taken = []
    batches = (taken.append(i) or torch.tensor(float(i)) for i in range(1, 10_000))
    with pytest.raises(FloatingPointError, match=rf"Breaks is nan at step {at}\. Lower the learn"):
        Trainer(breaks, sgd(breaks, 1e-3)).fit(batches, every=1000, progress=False)
    assert len(taken) < at + CHECK


def test_divergence_of_either_player_is_named():
    class Breaks(Distance):
        def forward(self, x):
            return super().forward(x) / torch.zeros(())

    class Holds(Distance):
        pass

    a, b = Holds(), Breaks(3.0)
    trainer = AdversarialTrainer(Trainer(a, sgd(a)), Trainer(b, sgd(b)))
    with pytest.raises(FloatingPointError, match="Breaks is inf at step 1"):
        trainer.fit(ONE, steps=3, progress=False)


def test_weights_are_checked_though_the_loss_is_finite():
    class Hidden(Distance):  # the loss is finite where its gradient is not
        def forward(self, x):
            return self.theta.sqrt() + x.sum() * 0

    hidden = Hidden(0.0)
    with pytest.raises(
        FloatingPointError, match=r"Hidden gave a weight '\w+' that is not finite by step"
    ):
        Trainer(hidden, sgd(hidden)).fit(ONE, steps=1, progress=False)


def test_progress_goes_to_stderr_or_nowhere(capsys):
    distance = Distance()
    trainer = Trainer(distance, sgd(distance))
    trainer.fit(ONE, steps=3, progress=False)
    assert capsys.readouterr() == ("", "")
    trainer.fit(ONE, steps=3)
    out, err = capsys.readouterr()
    assert out == ""
    assert "3/3" in err


# Validation


def test_best_validated_weights_are_kept():
    distance = Distance(0.0)
    trainer = Trainer(distance, sgd(distance, 0.1))
    history = trainer.fit(
        [torch.tensor(1.0)],
        steps=40,
        validation=lambda: (distance.theta - 0.5).square(),
        every=2,
        progress=False,
    )
    path = torch.tensor([1 - 0.9**k for k in range(2, 41, 2)])
    assert history.validation_steps.tolist() == list(range(2, 41, 2))
    assert torch.allclose(history.validation.float(), (path - 0.5).square(), atol=1e-5)
    best = path[(path - 0.5).abs().argmin()]
    assert distance.theta.item() == pytest.approx(best.item(), abs=1e-5)
    trainer.step(torch.tensor(1.0))
    assert distance.theta.item() == pytest.approx(1 - 0.9**41, abs=1e-5)


def test_patience_counts_validations_without_improvement():
    values = iter([5.0, 4.0, 4.0, 6.0, 3.0, 7.0, 7.0, 3.0, 1.0])
    distance = Distance()
    history = Trainer(distance, sgd(distance)).fit(
        ONE, steps=1000, validation=lambda: next(values), every=10, patience=3, progress=False
    )
    assert history.stopped == "patience"
    assert history.validation.tolist() == [5, 4, 4, 6, 3, 7, 7, 3]
    assert len(history.losses) == 80


def test_validation_at_the_end_too_and_only_once():
    distance = Distance()
    trainer = Trainer(distance, sgd(distance))
    for steps, expected in {25: [10, 20, 25], 20: [10, 20]}.items():
        history = trainer.fit(ONE, steps=steps, validation=lambda: 0.0, every=10, progress=False)
        assert history.validation_steps.tolist() == expected
    history = trainer.fit(ONE * 20, validation=lambda: 0.0, every=10, progress=False)
    assert history.validation_steps.tolist() == [10, 20]


def test_validation_sees_averages_in_evaluation_mode_and_changes_nothing():
    x = torch.randn(16, 2)

    def run(validate):
        pyro.set_rng_seed(1)
        net = Net()
        net.net[3].eval()  # a module in another mode
        trainer = Trainer(net, sgd(net, 0.1), average=0.9)
        seen = []

        def validation():
            assert not any(m.training for m in net.modules())
            assert not torch.is_grad_enabled()
            seen.append(torch.equal(net.net[0].weight, trainer.average.values["net.0.weight"]))
            torch.rand(5)
            return net(x)

        trainer.fit(
            Batches(x, batch_size=8),
            steps=30,
            validation=validation if validate else None,
            every=7,
            progress=False,
        )
        assert [m.training for m in net.modules()] == [True] * 5 + [False, True]
        assert all(seen)
        assert len(seen) == (5 if validate else 0)
        trainer.continue_training()
        return net.state_dict()

    plain, validated = run(False), run(True)
    assert all(torch.equal(plain[k], validated[k]) for k in plain)


def test_a_failing_validation_leaves_training_weights_and_modes():
    distance = Distance(4.0)
    trainer = Trainer(distance, sgd(distance, 0.1), average=0.9)

    def fails():
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        trainer.fit([torch.zeros(1)], steps=10, validation=fails, progress=False)
    assert distance.theta.item() == pytest.approx(4 * 0.9**10, rel=1e-5)
    assert distance.training


def test_nan_in_validation_is_an_error():
    distance = Distance()
    with pytest.raises(FloatingPointError, match="validation is nan after step 10"):
        Trainer(distance, sgd(distance)).fit(
            ONE, steps=50, every=10, validation=lambda: float("nan"), progress=False
        )


# Adversarial trainers


class Tug(nn.Module):
    """Two numbers that pull each other: a player moves its own."""

    def __init__(self, pair, own, other):
        super().__init__()
        self.pair = pair
        self.own, self.other = own, other

    def forward(self, x):
        gap = self.pair[self.own] - self.pair[self.other].detach()
        return ((gap + x) ** 2).mean()


def tug():
    pair = nn.ParameterDict({"a": torch.tensor(1.0), "b": torch.tensor(-1.0)})
    return pair, Tug(pair, "a", "b"), Tug(pair, "b", "a")


def test_critic_moves_first_and_critic_steps_times():
    pair, first, second = tug()
    trainer = AdversarialTrainer(
        Trainer(first, torch.optim.SGD([pair["a"]], 0.1)),
        Trainer(second, torch.optim.SGD([pair["b"]], 0.1)),
        critic_steps=3,
    )
    losses = trainer.step(torch.zeros(1))
    a, b = 1.0, -1.0
    for _ in range(3):
        critic = (b - a) ** 2
        b -= 0.2 * (b - a)
    generator = (a - b) ** 2
    a -= 0.2 * (a - b)
    assert pair["a"].item() == pytest.approx(a)
    assert pair["b"].item() == pytest.approx(b)
    assert losses.tolist() == pytest.approx([generator, critic])
    assert (trainer.generator.steps, trainer.critic.steps) == (1, 3)


def test_only_the_averaged_player_is_replaced():
    pair, first, second = tug()
    trainer = AdversarialTrainer(
        Trainer(first, torch.optim.SGD([pair["a"]], 0.1), average=0.9),
        Trainer(second, torch.optim.SGD([pair["b"]], 0.1)),
    )
    trainer.fit([torch.ones(1)], steps=20, progress=False)
    used = {k: p.item() for k, p in pair.items()}
    assert used["a"] == trainer.generator.average.values["pair.a"].item()
    state = trainer.state_dict()
    assert state["generator"]["objective"]["pair.a"].item() != used["a"]
    assert state["critic"]["objective"]["pair.a"].item() != used["a"]
    assert {k: p.item() for k, p in pair.items()} == used
    trainer.continue_training()
    assert pair["a"].item() != used["a"]
    assert pair["b"].item() == used["b"]


# Batches


def test_a_pass_sees_every_datum_once_in_a_fresh_order():
    batches = Batches(torch.arange(10), torch.arange(10) * 2, batch_size=4)
    assert len(batches) == 3
    passes = [list(batches) for _ in range(2)]
    for one in passes:
        assert [len(x) for x, _ in one] == [4, 4, 2]
        assert sorted(torch.cat([x for x, _ in one]).tolist()) == list(range(10))
        assert all(torch.equal(2 * x, y) for x, y in one)
    assert not torch.equal(passes[0][0][0], passes[1][0][0])


def test_drop_last_leaves_out_the_smaller_batch():
    batches = Batches(torch.arange(10), batch_size=4, drop_last=True)
    assert len(batches) == 2
    assert [len(x) for (x,) in batches] == [4, 4]


def test_transform_is_applied_afresh_to_each_batch():
    batches = Batches(torch.zeros(6, 1), batch_size=6, transform=lambda x: x + torch.rand_like(x))
    ((a,),), ((b,),) = list(batches), list(batches)
    assert not torch.equal(a, b)
    pair = Batches(torch.ones(2), batch_size=2, transform=lambda x: (x, -x))
    ((x, y),) = list(pair)
    assert torch.equal(x, -y)


def test_batches_continue_where_their_state_was_taken():
    batches = Batches(torch.arange(10), batch_size=3)
    stream = iter(batches)
    next(stream)
    state = copy.deepcopy(batches.state_dict())
    rest = [x.tolist() for (x,) in stream]
    other = Batches(torch.arange(10), batch_size=3)
    other.load_state_dict(state)
    assert [x.tolist() for (x,) in other] == rest
    assert len(list(other)) == 4  # then passes are whole again


def test_a_broken_off_pass_is_not_continued():
    batches = Batches(torch.arange(10), batch_size=3)
    next(iter(batches))
    assert len(list(batches)) == 4


# Nothing global changes


def test_training_leaves_global_state_alone():
    pyro.param("weight", torch.ones(3))

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.5))  # the same name as in the store

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(self.weight, 1.0), obs=x)

    class Guide(PyroModule):
        def forward(self, x):
            pass

    before = (
        Distribution._validate_args,
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        pyro.settings.get(),
        signal.getsignal(signal.SIGINT),
    )
    model = Model()
    objective = Trace_ELBO()(model, Guide())
    x = 3 + torch.randn(200)
    Trainer(objective, sgd(objective, 1e-3)).fit([x], steps=100, progress=False)
    after = (
        Distribution._validate_args,
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        pyro.settings.get(),
        signal.getsignal(signal.SIGINT),
    )
    assert before == after
    assert list(pyro.get_param_store().keys()) == ["weight"]
    assert torch.equal(pyro.param("weight"), torch.ones(3))
    assert model.weight.item() == pytest.approx(x.mean().item(), abs=1e-3)


@pytest.mark.parametrize("local", [False, True], ids=["store", "local"])
def test_pyro_elbos_are_objectives(local):
    x = 2 + torch.randn(50)

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.scale = PyroParam(torch.tensor(3.0), constraint=constraints.positive)

        def forward(self, x):
            z = pyro.sample("z", dist.Normal(0.0, 10.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(z, self.scale), obs=x)

    with pyro.settings.context(module_local_params=local):
        model = Model()
        guide = AutoNormal(model)
        with pyro.get_param_store().scope():
            guide(x)  # an autoguide makes its parameters at the first call
        objective = Trace_ELBO(num_particles=8, vectorize_particles=True)(model, guide)
        optimizer = torch.optim.Adam(objective.parameters(), 0.05)
        Trainer(objective, optimizer, average=0.9).fit([x], steps=600, progress=False)
        assert len(pyro.get_param_store()) == 0
        assert model.scale.item() == pytest.approx(x.std(correction=0).item(), abs=0.1)
        assert guide.locs.z.item() == pytest.approx(x.mean().item(), abs=0.1)


def test_plain_modules_registered_by_pyro_module_train():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(1, 1)

        def forward(self, x):
            pyro.module("net", self.net)
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(self.net(x * 0), 1.0).to_event(1), obs=x)

    class Guide(nn.Module):
        def forward(self, x):
            pass

    model = Model()
    objective = Trace_ELBO()(model, Guide())
    x = torch.randn(20, 1) + 4
    Trainer(objective, sgd(objective, 0.01)).fit([x], steps=200, progress=False)
    assert model.net.bias.item() == pytest.approx(x.mean().item(), abs=1e-3)
    assert len(pyro.get_param_store()) == 0


# Interruptions


@pytest.fixture
def interruptible():
    """Python's own handler: a shell that starts jobs in the background hands down none."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupt_waits_for_the_end_of_the_step(tmp_path):
    class Interrupted(Distance):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 7:
                signal.raise_signal(signal.SIGINT)
            return super().forward(x)

    def run(kind, **options):
        distance = kind(4.0)
        trainer = Trainer(distance, sgd(distance, 0.1), average=0.9)
        return distance, trainer, [torch.zeros(1)]

    path = tmp_path / "run.pt"
    handler = signal.getsignal(signal.SIGINT)
    distance, trainer, batches = run(Interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(batches, steps=30, checkpoint=path, progress=False)
    assert signal.getsignal(signal.SIGINT) is handler
    assert trainer.steps == 7
    assert distance.theta.item() == trainer.average.values["theta"].item()

    resumed, trainer, batches = run(Distance)
    assert len(trainer.fit(batches, steps=30, checkpoint=path, progress=False).losses) == 30
    whole, trainer, batches = run(Distance)
    trainer.fit(batches, steps=30, progress=False)
    assert resumed.theta.item() == whole.theta.item()


@pytest.mark.usefixtures("interruptible")
def test_second_interrupt_stops_at_once(tmp_path):
    class Stuck(Distance):
        def forward(self, x):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError

    stuck = Stuck()
    with pytest.raises(KeyboardInterrupt):
        Trainer(stuck, sgd(stuck)).fit(
            ONE, steps=3, checkpoint=tmp_path / "run.pt", progress=False
        )
    assert not (tmp_path / "run.pt").exists()


def test_fit_works_in_a_thread_and_keeps_foreign_handlers():
    distance, done = Distance(), []
    trainer = Trainer(distance, sgd(distance))
    thread = threading.Thread(
        target=lambda: done.append(trainer.fit(ONE, steps=3, progress=False))
    )
    thread.start()
    thread.join()
    assert len(done) == 1

    def mine(number, frame):
        raise AssertionError

    usual = signal.signal(signal.SIGINT, mine)
    try:
        trainer.fit(ONE, steps=3, progress=False)
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, usual)


# Doors


def fit(**options):
    distance = Distance()
    return Trainer(distance, sgd(distance)).fit(ONE, progress=False, **options)


def build(objective=None, parameters=None, **options):
    objective = Distance() if objective is None else objective
    return Trainer(
        objective, torch.optim.SGD(parameters or objective.parameters(), 0.1), **options
    )


class Returns(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.theta, self.value = nn.Parameter(torch.ones(2)), value

    def forward(self, x):
        return self.value(self.theta)


class Store(Distance):
    def forward(self, x):
        return super().forward(x) + pyro.param("loose", torch.ones(())).square()


STRANGER = nn.Parameter(torch.ones(()))
OTHER = torch.optim.SGD([STRANGER], 0.1)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: Trainer(lambda x: x, OTHER), TypeError, "objective that is an nn.Module"),
        (lambda: build(parameters=[STRANGER]), ValueError, "no parameter of Distance: nothing"),
        (
            lambda: Trainer(d := Distance(), torch.optim.SGD([d.theta, STRANGER], 0.1)),
            ValueError,
            "holds 1 parameters that Distance does not",
        ),
        (lambda: build(clip=0.0), ValueError, "clip > 0, got 0.0"),
        (lambda: build(average=1.0), ValueError, r"decay in \[0, 1\), got 1.0"),
        (
            lambda: build(schedule=torch.optim.lr_scheduler.ConstantLR(OTHER)),
            ValueError,
            "schedule of another optimizer",
        ),
        (
            lambda: build(schedule=torch.optim.lr_scheduler.ReduceLROnPlateau(OTHER)),
            TypeError,
            "ReduceLROnPlateau needs a metric",
        ),
        (lambda: build(Returns(lambda t: t)).step(0), ValueError, r"shape \(2,\), a scalar"),
        (lambda: build(Returns(lambda t: 1.0)).step(0), TypeError, "Returns returned float"),
        (
            lambda: build(Returns(lambda t: t.detach().sum())).step(0),
            ValueError,
            "does not depend on any parameter",
        ),
        (lambda: build(Store()).step(torch.ones(1)), ValueError, r"pyro.param\('loose'\)"),
        (lambda: fit(steps=0), ValueError, "steps >= 1, got 0"),
        (lambda: fit(every=0), ValueError, "every >= 1, got 0"),
        (lambda: fit(patience=0, validation=lambda: 0.0), ValueError, "patience >= 1"),
        (lambda: fit(patience=2), ValueError, "patience but no validation"),
        (lambda: fit(checkpoint="no/such/folder/x.pt"), FileNotFoundError, "no folder"),
        (lambda: build().fit([], progress=False), ValueError, "batches are empty"),
        (lambda: build().fit([], steps=3, progress=False), ValueError, "batches are empty"),
        (lambda: build().fit(iter([]), progress=False), ValueError, "batches are empty"),
        (lambda: build().fit([{"x": 1}], progress=False), TypeError, "got dict"),
        (lambda: Batches(batch_size=2), ValueError, "at least one tensor"),
        (lambda: Batches([1.0], batch_size=2), TypeError, "expected tensors, got list"),
        (lambda: Batches(torch.ones(()), batch_size=2), ValueError, "got a scalar"),
        (lambda: Batches(torch.ones(3), torch.ones(4), batch_size=2), ValueError, r"\[3, 4\]"),
        (lambda: Batches(torch.ones(3), batch_size=0), ValueError, "batch_size >= 1"),
        (lambda: Batches(torch.ones(0), batch_size=2), ValueError, "at least 1 data, got 0"),
        (
            lambda: Batches(torch.ones(3), batch_size=4, drop_last=True),
            ValueError,
            "at least 4 data, got 3",
        ),
        (
            lambda: Batches(torch.ones(3), batch_size=4).load_state_dict(
                {"order": torch.arange(5), "position": 0}
            ),
            ValueError,
            "holds 3 data, the state is of 5",
        ),
        (lambda: AdversarialTrainer(build(), build(), critic_steps=0), ValueError, "got 0"),
        (
            lambda: AdversarialTrainer(build(d := Distance()), build(d)),
            ValueError,
            "both move 1 parameters",
        ),
    ],
)
def test_bad_input_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_an_optimizer_of_parameters_without_gradient_is_refused():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = Distance(1.0), Distance(1.0)

        def forward(self, x):
            return self.used(x)

    half = Half()
    with pytest.raises(ValueError, match="No parameter of the optimizer has a gradient of Half"):
        Trainer(half, sgd(half.unused)).step(torch.ones(1))


def test_states_need_the_same_parts():
    with pytest.raises(ValueError, match="a trainer without average, this one is with"):
        build(average=0.9).load_state_dict(build().state_dict())
    with pytest.raises(ValueError, match="a trainer with average, this one is without"):
        build().load_state_dict(build(average=0.9).state_dict())


def test_state_dict_round_trip_through_a_file():
    def make():
        pyro.set_rng_seed(0)
        net = Net()
        optimizer = torch.optim.Adam(net.parameters(), 0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        return net, Trainer(net, optimizer, schedule=schedule, average=0.9, clip=1.0)

    x = torch.randn(16, 2)
    a, first = make()
    for _ in range(5):
        first.step(x)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    b, second = make()
    second.load_state_dict(torch.load(file, weights_only=True))
    for trainer in (first, second):
        pyro.set_rng_seed(3)
        for _ in range(5):
            trainer.step(x)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert all(torch.equal(v, second.average.values[k]) for k, v in first.average.values.items())
