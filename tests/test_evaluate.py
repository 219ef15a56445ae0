"""Distances against their closed forms, the held-out loss against its own, and the classifier's files."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import tiny
import torch
from oracles import normals
from tiny import one_thread  # noqa: F401

from diffkern import evaluate, ops
from diffkern.data import Dataset
from diffkern.evaluate import (
    Classifier,
    accuracy,
    eps_loss,
    features,
    frechet_distance,
    held_out_loss,
    labels_of,
    load_classifier,
    save_classifier,
    train_classifier,
)
from diffkern.io.files import floating, write
from diffkern.model import Model, save
from diffkern.prediction import PREDICTIONS, head, target
from diffkern.process import EDM, Process, RectifiedFlow
from diffkern.sampling import sample
from diffkern.schedule import Schedule
from diffkern.training.objectives import levels_at, levels_of
from diffkern.unet import UNet


def with_moments(mean: torch.Tensor, covariance: torch.Tensor, n: int = 200) -> torch.Tensor:
    """Features whose sample mean and covariance are exactly these."""
    x = normals(n, len(mean))
    x = x - x.mean(0)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov().reshape(len(mean), -1)), x.T, upper=False)
    return (torch.linalg.cholesky(covariance) @ x).T + mean


def covariance(d: int, seed: int) -> torch.Tensor:
    x = normals(d, d, seed)
    return x @ x.T / d + 0.1 * torch.eye(d, dtype=torch.float64)


# --- the Frechet distance ---


def test_the_distance_of_commuting_gaussians_is_the_closed_form():
    """|m_a - m_b|^2 + sum (sqrt(l_a) - sqrt(l_b))^2 where the covariances are diagonal."""
    m_a, m_b = normals(2, 5, seed=1)
    l_a, l_b = normals(2, 5, seed=2).square() + 0.1
    expected = (m_a - m_b).square().sum() + (l_a.sqrt() - l_b.sqrt()).square().sum()
    actual = frechet_distance(with_moments(m_a, l_a.diag()), with_moments(m_b, l_b.diag()))
    assert actual == pytest.approx(expected.item(), rel=1e-10)


def test_the_distance_of_any_gaussians_is_that_with_scipy_s_square_root():
    a, b = covariance(6, 1), covariance(6, 2)
    m_a, m_b = normals(2, 6, seed=3)
    root = scipy.linalg.sqrtm((a @ b).numpy())
    expected = (m_a - m_b).square().sum().item() + (a + b).trace().item() - 2 * root.trace().real
    assert frechet_distance(with_moments(m_a, a), with_moments(m_b, b)) == pytest.approx(expected, rel=1e-9)


def test_the_distance_is_zero_to_itself_and_symmetric():
    a, b = normals(100, 8, 1), 2 * normals(60, 8, 2) + 1
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)


def test_singular_covariances_are_no_trouble():
    """On a line inside 8 dimensions the distance is that on the line: (m_a - m_b)^2 + (s_a - s_b)^2."""
    direction = torch.full((8,), 8**-0.5, dtype=torch.float64)
    line = with_moments(torch.zeros(1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))
    a, b = 2 * line * direction, (line + 3) * direction
    assert frechet_distance(a, b) == pytest.approx(3**2 + (2 - 1) ** 2, rel=1e-7)
    assert frechet_distance(a * 0, b) == pytest.approx(3**2 + 1, rel=1e-7)


def test_one_feature_is_enough():
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [10.0]])
    assert frechet_distance(a, b) == pytest.approx(9**2 + 2)


# --- the held-out loss ---


class Zero(UNet):
    """Predicts eps = 0: its loss is the mean of eps^2."""

    def forward(self, x_t, t, labels=None):
        return torch.zeros_like(x_t)


def test_the_loss_of_predicting_zero_is_one():
    model = Model(Zero(**tiny.NETWORK), tiny.SCHEDULE, "eps", (1, 8, 8))
    n = 500
    losses = eps_loss(model, tiny.dataset(n, classes=None), n=n, buckets=4)
    assert losses == pytest.approx([1] * 4, abs=5 * math.sqrt(2 / (n * 64)))  # five standard errors


def test_the_loss_of_the_exact_denoiser_is_the_closed_form():
    """Data N(0, s^2) a pixel: E (eps - E[eps|x_t])^2 = ab s^2 / (ab s^2 + 1 - ab), with s the data's own."""
    data = tiny.dataset(500, classes=None)
    s2 = data.x_0(slice(None)).double().square().mean().item()
    ab = tiny.SCHEDULE.alpha_bar

    class Exact(Zero):
        def forward(self, x_t, t, labels=None):
            k = ((1 - ab).sqrt() / (ab * s2 + 1 - ab))[t].float()
            return k[:, None, None, None] * x_t

    losses = eps_loss(Model(Exact(**tiny.NETWORK), tiny.SCHEDULE, "eps", (1, 8, 8)), data, n=500, buckets=20)
    assert losses == pytest.approx((ab * s2 / (ab * s2 + 1 - ab)).tolist(), rel=0.05)


class Still(Process):
    """The same noise at all times: what is true of it is true of every t."""

    own, sigma_data = True, 0.7

    def alpha(self, t):
        return 0.6 + 0 * t

    def sigma(self, t):
        return 0.9 + 0 * t

    def c_in(self, point):
        return 0.5


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_of_any_prediction_on_any_process_is_the_closed_form(prediction):
    """The error of an output 0 is that of its target, y_x x_0 + y_e eps; x0_hat is p_x x_t."""
    n, shape = 400, (1, 8, 8)
    data, T = tiny.dataset(n), 4
    s2 = data.x_0(slice(None)).double().square().mean().item()
    processes = [Schedule.cosine(T)] + [Still()] * (prediction != "mu")
    for process in processes:
        model = Model(lambda x, t, labels: 0 * x, process, prediction, shape)
        found = held_out_loss(model, data, n=n, buckets=T)
        at = levels_of(process) if process.discrete else levels_at(process, np.full(T, 0.5))
        constants = dict(sigma_data=at.sigma_data, posterior=(at.c1, at.c2))
        y_x, y_e = target(prediction, at.alpha, at.sigma, **constants)
        p_x, _ = head(prediction, at.alpha, at.sigma, **constants)
        x0 = (1 - p_x * at.alpha) ** 2 * s2 + (p_x * at.sigma) ** 2
        expected = {"eps": x0 * at.snr, "x0": x0, prediction: y_x**2 * s2 + y_e**2}
        assert found.losses.keys() == expected.keys() and found.n == n
        for name, values in expected.items():
            assert found.losses[name] == pytest.approx(values.tolist(), rel=0.04), (process, name)


@pytest.mark.parametrize("process", [EDM(), RectifiedFlow()], ids=repr)
def test_parts_of_real_times_are_those_of_the_process_s_grid(process):
    """The network is told a t within each part, and c_in x_t."""
    told = []

    def network(x, t, labels):
        told.append(t)
        return 0 * x

    model = Model(network, process, process.prediction, (1, 8, 8))
    parts = held_out_loss(model, tiny.dataset(200, classes=None), n=200, buckets=5, batch_size=200).parts
    assert [low for low, _ in parts][1:] == [high for _, high in parts][:-1]
    assert (parts[0][0], parts[-1][1]) == (process.t_min, process.t_max)
    for (low, high), t in zip(parts, told, strict=True):
        low, high = (float(process.c_noise(np.float64(end))) if end else 0.0 for end in (low, high))
        assert low <= t.min() < low + 0.1 * (high - low) and high - 0.1 * (high - low) < t.max() <= high


def test_labels_are_matched_by_the_names_of_classes():
    model, data = tiny.model(), tiny.dataset(6)
    same, turned = labels_of(data, model), replace(data, classes=("class 1", "class 2", "class 0"))
    assert torch.equal(same, data.labels)
    assert labels_of(turned, model).tolist() == [1, 2, 0, 1, 2, 0]
    assert labels_of(replace(data, classes=("class 2", "b", "c")), model).tolist() == [2, -1, -1, 2, -1, -1]
    assert torch.equal(labels_of(replace(data, classes=("a", "b", "c")), model), data.labels)
    assert labels_of(tiny.dataset(classes=None), model) is None and labels_of(data, tiny.model(classes=None)) is None
    with pytest.raises(ValueError, match="data: expected classes of a network without a null class, got 'b'"):
        labels_of(replace(data, classes=("class 2", "b", "c")), tiny.model(null_class=False))


def test_the_loss_does_not_depend_on_the_batch_size():
    model, data = tiny.model(), tiny.dataset(30)
    losses = eps_loss(model, data, buckets=3, batch_size=30)
    assert eps_loss(model, data, buckets=3, batch_size=7) == pytest.approx(losses, rel=1e-5)
    assert eps_loss(model, data, buckets=3, seed=1) != pytest.approx(losses, rel=1e-5)


def test_buckets_part_the_time_steps(monkeypatch):
    seen = []
    noise_loss = ops.noise_loss
    monkeypatch.setattr(ops, "noise_loss", lambda out, seeds, t: (seen.append(t), noise_loss(out, seeds, t))[1])
    eps_loss(tiny.model(), tiny.dataset(200), n=200, buckets=3, batch_size=200)
    assert [sorted(set(t.tolist())) for t in seen] == [list(range(6)), list(range(6, 13)), list(range(13, 20))]


# --- the classifier ---


def squares(n: int) -> Dataset:
    """Two classes that differ in where the light is."""
    pixels = torch.zeros(n, 1, 32, 32, dtype=torch.uint8)
    labels = torch.arange(n) % 2
    pixels[labels == 0, :, 4:14, 4:14] = 200
    pixels[labels == 1, :, 18:28, 18:28] = 200
    return Dataset(pixels, labels, ("low", "high"))


def test_a_classifier_learns_and_knows_its_accuracy():
    data = squares(128)
    net = train_classifier(data, epochs=4, batch_size=16, progress=False)
    assert accuracy(net, data.images, data.labels) == 1
    assert accuracy(net, data.images, 1 - data.labels) == 0
    assert features(net, data.images).shape == (128, 64)


def test_a_classifier_trains_for_five_steps():
    """The rise of the learning rate, a fifth of them, is one step."""
    net = train_classifier(squares(2), epochs=5, batch_size=2, progress=False)
    assert all(parameter.isfinite().all() for parameter in net.parameters())


def test_training_a_classifier_leaves_torch_s_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    train_classifier(squares(4), epochs=1, progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_saved_classifier_has_the_same_features(tmp_path):
    torch.manual_seed(0)
    net = Classifier().eval()
    net.convs[1].running_mean.normal_()
    save_classifier(net, tmp_path / "c.safetensors", 0.875)
    loaded, stated = load_classifier(tmp_path / "c.safetensors")
    assert stated == 0.875
    images = squares(4).images
    torch.testing.assert_close(features(loaded, images), features(net, images), rtol=0, atol=1e-2)  # float16 weights


def test_a_saved_classifier_of_other_sizes_is_loaded_with_them(tmp_path):
    net = Classifier(channels=3, classes=26).eval()
    save_classifier(net, tmp_path / "c.safetensors", 0.5)
    loaded, _ = load_classifier(tmp_path / "c.safetensors")
    assert loaded(torch.zeros(2, 3, 32, 32)).shape == (2, 26)


def test_loading_a_classifier_leaves_torch_s_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    net, _ = load_classifier()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(tensor == 0 for key, tensor in net.state_dict().items() if key.endswith("num_batches_tracked"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(classifier=True), "expected a classifier, got"),
        (dict(classifier="1"), "expected a classifier, got"),
        (dict(accuracy=None), "accuracy: expected a share, got None"),
        (dict(accuracy="x"), "accuracy: expected a share, got 'x'"),
        (dict(accuracy=10**400), "int too large"),
        (dict(accuracy=float("nan")), "accuracy: expected a share, got nan"),
        (dict(dtype=torch.int8), "expected a type like torch.float32, got torch.int8"),
        (dict(classes=0), r"classes: expected an int in 1\.\.65536, got 0"),
        (dict(classes=10**30), r"classes: expected an int in 1\.\.65536, got 10+$"),
        (dict(channels=True), r"channels: expected an int in 1\.\.65536, got True"),
        (dict(channels=3), r"expected shape \(32, 3, 5, 5\), got \(32, 1, 5, 5\)"),
        (dict(widths=2), r"expected shape \(32, 1, 5, 5\), got \(2, 1, 5, 5\)"),
    ],
)
def test_a_classifier_s_file_that_is_none_says_why(tmp_path, changes, message):
    path = tmp_path / "c.safetensors"
    net = Classifier(width=changes.pop("widths", 32))
    dtype = changes.pop("dtype", torch.float16)
    write(
        path,
        {"classifier": 1, "accuracy": 0.5, **changes},
        {k: v.to(dtype) for k, v in floating(net.state_dict()).items()},
    )
    with pytest.raises(ValueError, match=f"^{path}: .*{message}"):
        load_classifier(path)


def test_the_shipped_classifier_states_at_least_92_percent():
    net, stated = load_classifier()
    assert stated >= 0.92
    assert features(net, squares(2).images).isfinite().all()


# --- samplers over network calls ---


def test_a_sampler_takes_the_most_steps_that_fit_in_the_calls():
    model = tiny.model(classes=None)
    for name, steps in (("ddim", (1, 5, 20)), ("heun", (1, 3, 10)), ("rk4", (1, 2, 5))):
        assert tuple(evaluate.steps_within(model, name, calls) for calls in (1, 5, 20)) == steps


def test_distances_fall_to_the_ode_s_limit_and_a_sampler_with_noise_has_none():
    """The exact network of data N(0, 1) in every dimension: the ODE leaves x_T as it is."""
    data, flat = tiny.SCHEDULE, (1, 2, 2)
    network = lambda x, t, labels: data.one_minus_alpha_bar[t].sqrt().float()[:, None, None, None] * x  # noqa: E731
    model = Model(network, data, "eps", flat)
    runs = [("ddim", 3), ("ddim", 20), ("unipc", 20), ("ddpm", 20)]
    few, many, better, none = evaluate.distances_to_limit(model, runs, n=8, progress=False)
    x_T = ops.noise(torch.arange(8), flat, step=0, stream=0)
    exact = (sample(model, 8, sampler="ddim", steps=3, clip=False, progress=False) - x_T).square().mean().sqrt()
    assert few == pytest.approx(exact.item(), rel=0.1)
    assert none is None and better < many < few


def load_a_model(folder):
    save(tiny.model(), folder / "m.safetensors")
    load_classifier(folder / "m.safetensors")


FEATURES = torch.zeros(4, 3)
BAD = {
    "one row": (lambda f: frechet_distance(FEATURES[:1], FEATURES), r"a: expected features \[at least 2, 3\], got"),
    "one dimension": (lambda f: frechet_distance(FEATURES, FEATURES[0]), r"b: expected features .*, got \(3,\)"),
    "widths": (lambda f: frechet_distance(FEATURES, FEATURES[:, :2]), r"b: expected features .*, got \(4, 2\)"),
    "buckets": (lambda f: eps_loss(tiny.model(), tiny.dataset(), buckets=21), "buckets: expected 1..20, got 21"),
    "shape": (lambda f: eps_loss(tiny.model(), squares(2)), r"data: expected images of shape \(1, 8, 8\), got"),
    "classifier data": (lambda f: train_classifier(tiny.dataset()), "data: expected labelled 32x32 images, got"),
    "no classifier": (load_a_model, "m.safetensors: expected a classifier, got format, name"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_say_what_was_expected(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path)
