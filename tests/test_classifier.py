"""Classifiers of noisy images: their training, their files, and how they guide."""

import re

import pytest
import tiny
import torch
from tiny import one_thread  # noqa: F401

from diffkern import Guidance, Model, Schedule, evaluate, sample
from diffkern.classifier import NoisyClassifier, load_noisy_classifier, save_noisy_classifier
from diffkern.conditions import Condition
from diffkern.data import FASHION_MNIST, Dataset, fashion_mnist
from diffkern.images import to_pixels
from diffkern.io.files import write
from diffkern.networks import HalfUNet
from diffkern.process import EDM
from diffkern.training.classifier import train_noisy_classifier

NAMES = ("class 0", "class 1", "class 2")
TINY = dict(channels=8, channel_mult=(1, 2), attention_levels=(1,), groups=4)


def classifier(**changes) -> NoisyClassifier:
    torch.manual_seed(0)
    network = HalfUNet(1, 3, **TINY).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)  # blocks start at zero, and would hide all the rest
    made = dict(network=network, schedule=tiny.SCHEDULE, shape=(1, 8, 8), classes=NAMES)
    return NoisyClassifier(**made | changes)


def stripes(n: int) -> Dataset:
    """Three classes that differ in where the light is."""
    labels = torch.arange(n) % 3
    pixels = torch.zeros(n, 1, 8, 8, dtype=torch.uint8)
    for i, label in enumerate(labels.tolist()):
        pixels[i, :, 3 * label : 3 * label + 2] = 200 + i % 50
    return Dataset(pixels, labels, NAMES)


# --- the network, its training, its file ---


def test_logits_depend_on_x_t_and_t_and_on_no_other_sample():
    network, x = classifier().network, torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0, 3, 11, 19])
    logits = network(x, t)
    assert logits.shape == (4, 3)
    assert torch.equal(network(x, t, torch.zeros(4, dtype=torch.int64)), logits)
    assert all(torch.allclose(network(x[i : i + 1], t[i : i + 1])[0], logits[i], atol=1e-6) for i in range(4))
    assert not torch.allclose(network(x, t.flip(0)), logits, atol=1e-3)


def test_the_gradient_of_the_logits_is_that_of_differences():
    network, t = classifier().network, torch.tensor([3, 11])
    x, v = (torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network(leaf, t)[:, 1].sum(), leaf)
    slopes = (network(x + 1e-2 * v, t) - network(x - 1e-2 * v, t))[:, 1] / 2e-2
    assert torch.allclose((gradient * v).flatten(1).sum(1), slopes, rtol=1e-2, atol=1e-4)


def test_a_classifier_learns_what_noise_leaves_to_be_seen():
    data = stripes(48)
    trained = train_noisy_classifier(
        data, tiny.SCHEDULE, examples=480, batch_size=24, lr=1e-2, network=TINY, progress=False
    )
    clear, hidden = evaluate.noisy_accuracy(trained, data, (0, 19))
    assert clear == 1 and 1 / 3 < hidden < 0.9


def test_a_trained_classifier_is_a_function_of_the_seed():
    def weights(seed):
        options = dict(examples=50, batch_size=20, seed=seed, network=TINY, progress=False)  # an epoch and 2 images
        trained = train_noisy_classifier(stripes(48), tiny.SCHEDULE, **options)
        return torch.cat([parameter.flatten() for parameter in trained.network.parameters()])

    before = torch.get_rng_state()
    first = weights(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert torch.equal(weights(1), first) and not torch.equal(weights(2), first)


@pytest.mark.parametrize("steps", [1, 9, 10, 11])
def test_a_classifier_trains_for_any_number_of_steps(steps):
    """The rise of the learning rate is a tenth of them: none, one or more."""
    options = dict(examples=steps, batch_size=1, network=TINY, progress=False)
    trained = train_noisy_classifier(stripes(3), tiny.SCHEDULE, **options)
    assert all(parameter.isfinite().all() for parameter in trained.network.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(train=tiny.dataset(classes=None)), "data: expected labelled images, got none with labels"),
        (dict(examples=0), "examples: expected an int >= 1, got 0"),
        (dict(batch_size=0), "batch_size: expected an int >= 1, got 0"),
        (dict(lr=0.0), "lr: expected a number > 0, got 0"),
        (dict(schedule=EDM()), r"schedule: expected one of time steps, got EDM\("),
        (
            dict(network=dict(TINY, attention_levels=(7,))),
            r"attention_levels: expected ints in 0..1, got \(7,\)",
        ),
        (
            dict(train=tiny.dataset(size=6)),
            r"x_t: expected \[N, 1, H, W\] with H and W divisible by 4, got \(10, 1, 6, 6\)",
        ),
    ],
)
def test_training_says_what_it_expected(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        train_noisy_classifier(**dict(train=stripes(3), schedule=tiny.SCHEDULE, examples=10, progress=False) | changes)


def test_a_classifier_of_a_process_without_time_steps_is_refused():
    with pytest.raises(ValueError, match=r"^schedule: expected one of time steps, got EDM\("):
        classifier(schedule=EDM())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiny.dataset(size=16), r"data: expected images of shape \(1, 8, 8\), got \(1, 16, 16\)"),
        (tiny.dataset(classes=4), "data: expected the classes .*'class 2'.*, got .*'class 3'"),
        (tiny.dataset(classes=None), "data: expected the classes .*, got images without labels"),
    ],
)
def test_accuracy_is_measured_on_data_of_the_classifier_alone(data, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        evaluate.noisy_accuracy(classifier(), data, (0,))


def test_a_saved_classifier_is_loaded_as_it_was(tmp_path):
    made = classifier()
    made.network.half().float()  # what the file can hold
    save_noisy_classifier(made, tmp_path / "c.safetensors")
    loaded = load_noisy_classifier(tmp_path / "c.safetensors")
    x, t = torch.ones(2, 1, 8, 8), torch.tensor([3, 17])
    assert torch.equal(loaded(x, t), made(x, t))
    assert (loaded.schedule, loaded.shape, loaded.classes) == (made.schedule, made.shape, made.classes)
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(noisy_classifier=2), "expected a classifier of noisy images, got noisy_classifier, network"),
        (dict(network=None), "network: expected an object, got None"),
        (dict(network={"in_channels": 1, "num_classes": 3, "width": 3}), "unexpected keyword argument 'width'"),
        (
            dict(network={"in_channels": 1, "num_classes": 3, "channels": 10**9}),
            "channels: expected an int in 2..65536",
        ),
        (dict(network={"in_channels": 1, "num_classes": 3, "channel_mult": []}), "channel_mult: expected ints in"),
        (dict(network={"in_channels": 1, "num_classes": 3, "blocks": [1]}), "blocks: expected ints in 1..32"),
        (
            dict(network={"in_channels": 1, "num_classes": 3, "groups": 5}),
            "channels: expected .* divisible by 5 groups",
        ),
        (dict(network={"in_channels": 1, "num_classes": 3}), "expected the tensors of its network"),
        (dict(schedule={"kind": "x"}), "schedule: expected a kind among"),
        (dict(shape=[3, 8, 8]), r"shape: expected the network's 1 channels, got \(3, 8, 8\)"),
        (dict(shape=[1, 8]), r"shape: expected 3 entries, got \[1, 8\]"),
        (dict(classes=["a"]), r"classes: expected 3 entries, got \['a'\]"),
        (dict(classes=[1, 2, 3]), r"classes: expected names, got \(1, 2, 3\)"),
    ],
)
def test_a_file_that_is_no_classifier_says_why(tmp_path, changes, message):
    made, path = classifier(), tmp_path / "c.safetensors"
    described = dict(network=made.network.config, schedule=made.schedule.config(), shape=[1, 8, 8], classes=NAMES)
    write(path, {"noisy_classifier": 1} | described | changes, made.network.state_dict())
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{message}"):
        load_noisy_classifier(path)


# --- guidance ---


def test_a_classifier_s_file_guides_as_its_network_does(tmp_path):
    save_noisy_classifier(classifier(), tmp_path / "c.safetensors")
    loaded = load_noisy_classifier(tmp_path / "c.safetensors")
    options = dict(labels=[0, 1, 2], steps=3, progress=False)
    images = [
        sample(tiny.model(), guidance=Guidance(50, classifier=given), **options)
        for given in (tmp_path / "c.safetensors", str(tmp_path / "c.safetensors"), loaded, loaded.network)
    ]
    assert all(torch.equal(x, images[0]) for x in images[1:])
    assert not torch.equal(sample(tiny.model(), guidance=0.0, **options), images[0])


@pytest.mark.parametrize("interval", [None, (0.5, 1.0)])
def test_the_labels_are_the_classifier_s_and_the_network_has_the_null_class(interval):
    """At every step, guided or not: with weight 0 it is the unconditional model."""
    options = dict(labels=[0, 1, 2], steps=4, progress=False)
    guided = Guidance(0.0, interval, classifier=classifier().network)
    assert torch.equal(sample(tiny.model(), guidance=guided, **options), sample(tiny.model(), guidance=0.0, **options))


def test_a_network_without_a_null_class_has_the_labels_too():
    model, options = tiny.model(null_class=False), dict(labels=[0, 1, 2], steps=3, progress=False)
    guided = sample(model, guidance=Guidance(0.0, classifier=classifier().network), **options)
    assert torch.equal(guided, sample(model, **options))


def test_a_classifier_takes_no_other_condition_away():
    seen = []

    def network(x, t, labels, level):
        seen.append((labels.tolist(), level.flatten().tolist()))
        return 0 * x

    level = Condition("level", (1,), null=torch.zeros(1))
    model = Model(network, tiny.SCHEDULE, "x0", (1, 8, 8), NAMES, conditions=(level,))
    guidance = Guidance(1.0, classifier=classifier().network)
    sample(model, 2, labels=1, guidance=guidance, level=torch.ones(2, 1), steps=1, progress=False)
    assert seen == [([-1, -1], [1, 1])]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(schedule=Schedule.linear(30)),
            r"classifier: expected one with the model's schedule, Schedule.linear\(T=20",
        ),
        (dict(shape=(1, 16, 16)), r"classifier: expected one with the model's shape, \(1, 8, 8\), got \(1, 16, 16\)"),
        (
            dict(classes=("a", "b", "c")),
            r"classifier: expected one with the model's classes, .*, got \('a', 'b', 'c'\)",
        ),
    ],
)
def test_a_classifier_of_another_model_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        sample(tiny.model(), labels=[1], guidance=Guidance(1.0, classifier=classifier(**changes)), progress=False)


# --- the shipped one ---


@pytest.fixture(scope="module")
def clothes() -> Dataset:
    if not FASHION_MNIST.is_dir():
        pytest.skip(f"there is no {FASHION_MNIST}")
    return fashion_mnist(split="test")


def agreement(n: int, steps: int, weight: float) -> float:
    """The share of samples in which the classifier that guides nothing sees the class asked for."""
    labels = torch.arange(n) % 10
    guidance = Guidance(weight, classifier="fashion-mnist-noisy")
    x = sample("fashion-mnist", labels=labels, steps=steps, guidance=guidance, progress=False)
    return evaluate.accuracy(evaluate.load_classifier()[0], to_pixels(x), labels)


def test_the_shipped_classifier_sees_the_class_through_noise(clothes):
    clear, noisy = evaluate.noisy_accuracy(load_noisy_classifier("fashion-mnist-noisy"), clothes, (100, 400), n=200)
    assert clear >= 0.8 and noisy >= 0.65


def test_the_shipped_classifier_guides():
    """Three steps, a sample a class; without it the classes are those of chance."""
    assert agreement(10, 3, 8.0) >= 0.8
    assert agreement(10, 3, 0.0) <= 0.4


@pytest.mark.slow
def test_the_shipped_classifier_holds_what_its_card_says(clothes):
    times, bounds = (0, 200, 400, 600), (0.84, 0.81, 0.69, 0.43)
    shares = evaluate.noisy_accuracy(load_noisy_classifier("fashion-mnist-noisy"), clothes, times)
    assert all(share >= bound for share, bound in zip(shares, bounds, strict=True))
    free, weak, strong = (agreement(100, 10, weight) for weight in (0.0, 1.0, 8.0))
    assert free <= 0.2 and free < weak < strong and strong >= 0.85
