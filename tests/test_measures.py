"""Measures of samples against brute force, closed forms, scipy and torch-fidelity; where their images come from."""

import math
import sys
from collections import Counter
from types import ModuleType

import numpy as np
import pytest
import scipy.stats
import tiny
import torch
from oracles import normals
from tiny import one_thread  # noqa: F401

from diffkern.data import Dataset
from diffkern.evaluate import (
    HELD_OUT,
    Classifier,
    Drawn,
    Moments,
    Pictures,
    copying,
    detector,
    evaluate,
    feature_network,
    features,
    frechet_distance,
    in_proportion,
    inception_score,
    neighbours,
    precision_recall,
    protocol,
    sources,
)
from diffkern.images import from_pixels, to_uint8
from diffkern.model import Model
from diffkern.samplers import SAMPLERS
from diffkern.sampling import sample
from diffkern.schedule import Schedule


@pytest.fixture(scope="module")
def fidelity():
    try:
        return pytest.importorskip("torch_fidelity")
    except RuntimeError as error:  # of a torchvision for another torch
        pytest.skip(str(error))


# --- features to numbers ---


def test_moments_of_parts_are_those_of_the_whole_far_from_zero():
    x = normals(50, 4) + 1e6
    moments = Moments()
    for part in x.split([1, 20, 29]):
        moments.update(part)
    np.testing.assert_allclose(moments.mean, x.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(moments.covariance, np.cov((x - 1e6).numpy().T), rtol=1e-7)
    other = normals(30, 4, 1)
    assert frechet_distance(moments, Moments.of(other)) == pytest.approx(frechet_distance(x, other), rel=1e-10)


def by_pairs(real: np.ndarray, drawn: np.ndarray, k: int, k_density: int) -> tuple[float, ...]:
    """Every pair by itself, in exact differences."""

    def distance(a, b):
        return math.dist(a, b)

    def radius(points, i, k):
        return sorted(distance(points[i], p) for p in points)[k]

    def inside(x, points, k):
        return [distance(x, points[i]) <= radius(points, i, k) for i in range(len(points))]

    precision = np.mean([any(inside(y, real, k)) for y in drawn])
    recall = np.mean([any(inside(x, drawn, k)) for x in real])
    counts = np.array([inside(y, real, k_density) for y in drawn])
    return precision, recall, counts.sum() / (k_density * len(drawn)), counts.any(0).mean()


@pytest.mark.parametrize("batch_size", [5, 1000])
def test_neighbours_are_those_of_every_pair(batch_size):
    real, drawn = normals(17, 3) + 100, 0.7 * normals(13, 3, 1) + 100.3
    drawn[:3] = real[4:7]  # copies
    found = neighbours(real, drawn, k=2, k_density=3, batch_size=batch_size)
    expected = by_pairs(real.numpy(), drawn.numpy(), 2, 3)
    assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(expected, rel=1e-12)
    assert 0 < found.recall < 1 and 0 < found.coverage < 1  # the case tells them apart


def test_points_that_are_equal_are_in_each_other_s_balls_of_radius_0():
    """By a product of matrices their distance is rounding."""
    x = torch.full((6, 50), 1 / 3, dtype=torch.float64)
    x[5] += 1e3
    assert precision_recall(x[:5], x[:5], k=3) == (1, 1)
    assert neighbours(x, x[:5] + 0, k=1, k_density=3).precision == 1


def test_copying_is_the_statistic_of_mann_and_whitney():
    real, drawn, held_out = normals(40, 3), normals(11, 3, 1), 1.5 * normals(9, 3, 2)
    drawn[:2] = held_out[:2]  # ties
    ours, theirs = (torch.cdist(x, real).min(1).values.numpy() for x in (drawn, held_out))
    expected = scipy.stats.mannwhitneyu(theirs, ours).statistic / (9 * 11)
    assert copying(real, drawn, held_out, batch_size=4) == pytest.approx(expected, rel=1e-12)
    assert copying(real, real[:5], held_out) == 1


def test_the_inception_score_is_its_formula():
    logits = 3 * normals(20, 4)
    logits[:, 3] = -1e9  # a class that is never seen: its terms are 0
    p = torch.softmax(logits, 1).numpy()[:, :3]
    parts = [p[:6], p[6:13], p[13:]]
    scores = [np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in parts]
    assert inception_score(logits, 3) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)
    sure = 1e4 * torch.eye(5).repeat(4, 1)
    assert inception_score(sure, 2) == pytest.approx((5, 0), abs=1e-6)
    assert inception_score(torch.zeros(4, 5), 2) == pytest.approx((1, 0))


def test_the_detector_finds_what_there_is_to_find():
    """Normal features whose means are 1 apart: the best accuracy is Phi(1/2)."""
    n = 2000
    real, same, other = normals(n, 5), normals(n, 5, 1), normals(n, 5, 2)
    other[:, 0] += 1
    found = detector(real, other)
    assert found.low < scipy.stats.norm.cdf(0.5) < found.high
    right = round(found.accuracy * n)
    expected = scipy.stats.binomtest(right, n).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-4)
    chance = detector(real, same)
    assert chance.low < 0.5 < chance.high
    assert detector(real, real + 100).accuracy == 1
    assert detector(torch.zeros(9, 2), torch.zeros(9, 2)).accuracy == 0.5


def test_torch_fidelity_has_the_same_distance_and_score(fidelity):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    a, b = normals(80, 6), 1.3 * normals(90, 6, 1) + 0.2
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, (a, b)), verbose=False)
    assert frechet_distance(a, b) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)
    theirs = isc_features_to_metric(a, splits=4, shuffle=False)
    assert inception_score(a, 4) == pytest.approx(tuple(theirs.values()), rel=1e-9)
    assert precision_recall(a, b) == pytest.approx(calculate_precision_recall_full(b, a), rel=1e-6)


# --- what images are compared by ---


def gradients(n: int, size: int = 8, channels: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator)


class Means(torch.nn.Module):
    """Means of the rows as features, of the columns as logits."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.mean((1, 3)), x.mean((1, 2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, which prefers torch.export
def test_a_file_of_torchscript_and_a_callable_are_feature_networks(tmp_path):
    path, images = tmp_path / "means.pt", gradients(5)
    torch.jit.script(Means()).save(path)
    of_file, of_callable = feature_network(path), feature_network(lambda x: x.mean((1, 3)))
    expected = from_pixels(images).mean((1, 3))
    torch.testing.assert_close(of_file(images)[0], expected)
    assert of_file(images)[1].shape == (5, 8) and len(of_file.digest) == 64
    torch.testing.assert_close(of_callable(images)[0], expected)
    assert of_callable(images)[1] is None and of_callable.digest is None


@pytest.mark.slow
def test_a_file_of_torch_export_is_a_feature_network(tmp_path):
    batch = torch.export.Dim("batch")
    program = torch.export.export(Means().eval(), (torch.zeros(2, 1, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "means.pt2")
    images = gradients(5)
    torch.testing.assert_close(feature_network(tmp_path / "means.pt2")(images)[0], from_pixels(images).mean((1, 3)))


def test_the_classifier_s_features_are_what_its_last_layer_reads():
    net, images = Classifier().eval(), gradients(4, 32)
    found, logits = feature_network(net)(images)
    torch.testing.assert_close(found.double(), features(net, images))
    torch.testing.assert_close(logits, net(from_pixels(images)))


def fake_fidelity(monkeypatch):
    """A module of torch-fidelity's name, whose network returns sums of the bytes that it gets."""

    class Extractor(torch.nn.Module):
        def __init__(self, name, layers, feature_extractor_weights_path):
            super().__init__()
            self.scale = torch.load(feature_extractor_weights_path)["scale"]
            assert layers == ["2048", "logits_unbiased"]

        def forward(self, x):
            assert x.dtype == torch.uint8 and x.shape[1] == 3
            return x.double().sum((2, 3)) * self.scale, x.double().sum((1, 3))

    package, module = ModuleType("torch_fidelity"), ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Extractor
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_inception_gets_the_very_bytes_and_grey_three_times(tmp_path, monkeypatch):
    fake_fidelity(monkeypatch)
    torch.save({"scale": torch.tensor(2.0)}, tmp_path / "w.pth")
    images = gradients(3)
    found, logits = feature_network(f"inception:{tmp_path}/w.pth")(images)
    sums = images.double().sum((1, 2, 3))[:, None].expand(3, 3)
    torch.testing.assert_close(found.double(), 2 * sums)
    torch.testing.assert_close(logits.double(), 3 * images.double().sum((1, 3)))


@pytest.mark.slow
def test_inception_is_torch_fidelity_s(fidelity, tmp_path, monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    torch.manual_seed(0)
    with monkeypatch.context() as m:
        m.setattr(theirs, "load_state_dict_from_url", lambda *arguments, **options: {})
        m.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        net = theirs.FeatureExtractorInceptionV3("random", ["2048", "logits_unbiased"])
    torch.save(net.state_dict(), tmp_path / "w.pth")
    images = gradients(2, 32)
    for got, want in zip(
        feature_network(f"inception:{tmp_path}/w.pth")(images), net(images.expand(-1, 3, -1, -1)), strict=True
    ):
        torch.testing.assert_close(got, want)


# --- where images come from ---


def test_each_beginning_of_the_order_has_the_classes_as_frequent_as_in_all():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    order = in_proportion(labels, 100)
    assert sorted(order.tolist()) == list(range(100)) and order[:60].tolist() != sorted(order[:60].tolist())
    for n in (10, 37, 80):
        counts = labels[order[:n]].bincount(minlength=3).double()
        assert (counts - n * torch.tensor([0.6, 0.3, 0.1])).abs().max() <= 1
    assert torch.arange(3).repeat(4)[in_proportion(torch.arange(3).repeat(4), 12)].tolist() == [0, 1, 2] * 4


def test_samples_are_those_of_sample_with_classes_as_frequent_as_in_the_data(monkeypatch):
    monkeypatch.setattr(sources, "BLOCK", 4)
    model = tiny.model(classes=3)
    data = tiny.dataset(9)  # 3 of each class
    drawn = Drawn(model, 7, sampler="ddim", steps=2, like=data, batch_size=2)
    images = torch.cat([block for block, _ in drawn.blocks()])
    options = dict(sampler="ddim", steps=2, batch_size=2, progress=False)
    x = sample(model, 7, labels=[0, 1, 2, 0, 1, 2, 0], **options)
    assert torch.equal(images, torch.from_numpy(to_uint8(x)).permute(0, 3, 1, 2))
    counts = []
    assert torch.equal(torch.cat([block for block, _ in drawn.blocks(4, counts.append)]), images[4:])
    assert counts == [1, 1, 0, 1]  # of 2 + 1 images, after each of 2 steps


def test_samples_are_those_of_any_sampler_with_its_options():
    def mine(m, grid, *, eta=0.0):
        return SAMPLERS["ddim"].function(m, grid, eta=eta)

    drawn, named = (Drawn(tiny.model(), 4, sampler=sampler, steps=2, eta=1.0) for sampler in (mine, "ddim"))
    assert (drawn.name, drawn.description["options"]) == ("mine", {"eta": "1.0"})
    assert torch.equal(*(next(source.blocks())[0] for source in (drawn, named)))
    assert named.identity != Drawn(tiny.model(), 4, sampler="ddim", steps=2).identity
    with pytest.raises(TypeError, match="cache: expected a model that can be told .* unknown sampler"):
        _ = drawn.identity


def rows_of(sources, data, network, **options):
    return list(evaluate(sources, data, network, progress=False, **options))


def test_a_row_for_the_floor_and_for_each_set_of_samples():
    torch.manual_seed(0)
    model = tiny.model(classes=2)
    model.shape = (1, 32, 32)
    pixels = gradients(40, 32)
    data = Dataset(pixels[:24], torch.arange(24) % 2, ("a", "b"))
    held_out = Dataset(pixels[24:], torch.arange(16) % 2, ("a", "b"))
    net = Classifier(classes=2).eval()
    drawn = [Drawn(model, 10, sampler=name, steps=2, like=data) for name in ("ddpm", "ddim")]
    network = feature_network(net)
    floor, *rows = rows_of([*drawn, Pictures(data, 20, "copies")], data, network, held_out=held_out)
    assert [(row.name, row.steps, row.n) for row in (floor, *rows)] == [
        (HELD_OUT, None, 10), ("ddpm", 2, 10), ("ddim", 2, 10), ("copies", None, 20),
    ]  # fmt: skip
    order = in_proportion(held_out.labels, 16)[:10]
    expected = frechet_distance(features(net, held_out.images[order]), features(net, data.images))
    assert floor.values["distance"] == pytest.approx(expected, rel=1e-4)
    numbers = {"distance", "precision", "recall", "density", "coverage", "score", "score_std", "detector"}
    numbers |= {"detector_low", "detector_high", "agreement"}
    assert floor.values.keys() == numbers and floor.seconds is None
    assert all(row.values.keys() == numbers | {"copying"} for row in rows)
    assert rows[0].seconds > 0 and rows[2].values["copying"] == rows[2].values["precision"] == 1
    told = protocol(data, network, held_out)
    assert told["features"]["sha256"] == network.digest and told["held_out"]["images"] == 16


def test_what_cannot_be_had_is_left_out():
    """No logits, no held-out images, no labels; too few images for neighbours."""
    data = Dataset(gradients(12))
    (row,) = rows_of(Pictures(data, 3), data, feature_network(lambda x: x.mean((1, 3))))
    assert row.values.keys() == {"distance"} and row.dimensions == 8


def test_an_interrupted_call_goes_on_where_its_cache_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK", 4)
    data, pictures = Dataset(gradients(10)), Dataset(gradients(9, seed=1))
    seen, left = Counter(), [4]

    class Counting(Means):
        def forward(self, x):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            seen["images"] += len(x)
            return super().forward(x)

    network = feature_network(Counting())
    with pytest.raises(KeyboardInterrupt):  # within the pictures: 10 + 4 images are done
        rows_of(Pictures(pictures), data, network, cache=tmp_path)
    left[0] = 99
    (resumed,) = rows_of(Pictures(pictures), data, network, cache=tmp_path)
    assert seen["images"] == 10 + 9
    (fewer,) = rows_of(Pictures(pictures, 6), data, network, cache=tmp_path)
    assert seen["images"] == 10 + 9  # the first of them
    for n, row in ((9, resumed), (6, fewer)):
        (fresh,) = rows_of(Pictures(pictures, n), data, network)
        assert row.values == pytest.approx(fresh.values, rel=1e-12)


BAD = {
    "no output": (lambda: feature_network(lambda x: (x, x, x))(gradients(2)), "features: expected .*, got 3 outputs"),
    "no vectors": (lambda: feature_network(lambda x: x)(gradients(2)), r"features: expected floats \[2, D\], got"),
    "not finite": (
        lambda: feature_network(lambda x: x.mean((1, 3)) / 0)(gradients(2)),
        "features: expected finite numbers, got NaN or infinity",
    ),
    "measure": (
        lambda: evaluate((), tiny.dataset(), feature_network(Means()), measures=["fid"]),
        "measures: expected some of distance, neighbours, .*, got 'fid'",
    ),
    "size": (
        lambda: evaluate(Pictures(Dataset(gradients(4))), Dataset(gradients(4, 32)), feature_network(Means())),
        r"sources: expected images of shape \(1, 32, 32\), got \(1, 8, 8\)",
    ),
    "network's size": (
        lambda: evaluate((), tiny.dataset(), feature_network(Classifier())),
        r"data: expected images of the feature network's shape \(1, 32, 32\), got \(1, 8, 8\)",
    ),
    "held-out size": (
        lambda: evaluate((), tiny.dataset(), feature_network(Means()), held_out=Dataset(gradients(4, 32))),
        r"held_out: expected images of shape \(1, 8, 8\), got \(1, 32, 32\)",
    ),
    "one image": (lambda: Pictures(tiny.dataset(), 1), "n: expected an int >= 2, got 1"),
    "pictures": (lambda: Pictures(tiny.dataset(), 11), "n: expected at most 10, got 11"),
    "steps": (lambda: Drawn(tiny.model(), 4, sampler="ddpm", steps=21), "steps: expected 1 to 20, .* got 21"),
    "sampler": (lambda: Drawn(tiny.model(), 4, sampler="plms", steps=2), "sampler: expected one of .*, got 'plms'"),
    "guidance": (
        lambda: Drawn(tiny.model(classes=None), 4, sampler="ddim", steps=2, guidance=2),
        "guidance: expected 1 without labels, got 2",
    ),
    "no null class": (
        lambda: Drawn(tiny.model(null_class=False), 4, sampler="ddim", steps=2, guidance=2),
        "guidance: expected 1 with a network without a null class, got 2",
    ),
    "from noise alone": (
        lambda: Drawn(
            Model(tiny.model().network, Schedule(torch.tensor([0.1, 1.0])), "eps", (1, 8, 8)),
            4,
            sampler="ddim",
            steps=2,
        ),
        "prediction: expected 'v', 'x0' or 'flow' where alpha",
    ),
    "splits": (lambda: inception_score(torch.zeros(3, 2), 4), r"logits: expected \[at least 4, K\], got \(3, 2\)"),
    "detector": (lambda: detector(torch.zeros(3, 2), torch.zeros(9, 2)), r"real: expected features \[at least 4, 2\]"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_file_that_is_no_feature_network_says_so(tmp_path):
    (tmp_path / "f.pt").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"f\.pt: expected a file of TorchScript or torch.export, got"):
        feature_network(tmp_path / "f.pt")
    with pytest.raises(TypeError, match="cache: expected a feature network with weights, by which to tell it"):
        rows_of(Pictures(tiny.dataset()), tiny.dataset(), feature_network(lambda x: x), cache=tmp_path)
