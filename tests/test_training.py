"""Training: what is drawn, what is averaged, what is saved, and how it ends."""

import json
import math
import os
import signal
import statistics
import threading
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import one_thread  # noqa: F401

import diffkern
from diffkern import ops, training
from diffkern.data import EXAMPLE_STREAM, Dataset, words
from diffkern.model import load, read, save
from diffkern.ops import LOSS_COLUMNS
from diffkern.schedule import Schedule
from diffkern.training import CHECKPOINT, PRESETS, Config, Diverged, Trainer, draw, ema_decay, new_model, runs


def trainer(data=None, **changes) -> Trainer:
    data, config = data or tiny.dataset(), tiny.config(**changes)
    return Trainer(new_model(data, config), data, config)


def take(run: Trainer, steps: int) -> list[float]:
    return [run.step() for _ in range(steps)]


def assert_equal(a: Trainer, b: Trainer) -> None:
    assert (a.steps, a.examples) == (b.steps, b.examples)
    tensors, others = a.tensors(), b.tensors()
    assert tensors.keys() == others.keys()
    for key, tensor in tensors.items():
        assert torch.equal(tensor, others[key]), key


# --- what is trained ---


@pytest.mark.parametrize("prediction", ["x0", "v", "score", "flow"])
def test_the_simple_loss_of_a_prediction_is_the_error_of_its_target(prediction):
    run = trainer(prediction=prediction, label_dropout=0.0)
    x_0, labels, draws, _ = run.batch()
    eps = ops.noise(draws.seeds, x_0.shape[1:], step=draws.t, stream=2)
    alpha, sigma = (column.view(-1, 1, 1, 1) for column in run.task.noising.q_table[draws.t].unbind(1))
    target = dict(x0=x_0, v=alpha * eps - sigma * x_0, score=-eps / sigma, flow=eps - x_0)[prediction]
    with torch.no_grad():
        error = (run.network(alpha * x_0 + sigma * eps, draws.t, labels) - target).square().mean()
        assert run.loss().item() == pytest.approx(error.item(), rel=1e-4)
    before = run.loss().item()
    take(run, 3)
    assert math.isfinite(before) and run.model.prediction == prediction


@pytest.mark.parametrize("objective", ["min_snr", "p2", "likelihood", "hybrid", "vlb"])
def test_every_objective_trains_and_is_resumed_to_the_bit(tmp_path, objective):
    network = {**tiny.NETWORK, "learned_variance": objective in ("hybrid", "vlb")}
    whole, half = (trainer(objective=objective, network=network) for _ in range(2))
    losses = take(whole, 4)
    take(half, 2)
    half.save(tmp_path / CHECKPOINT)
    again = Trainer.resume(tmp_path / CHECKPOINT, tiny.dataset())
    assert again.config.objective == objective and take(again, 2) == losses[2:]
    assert_equal(again, whole)
    with pytest.raises(ValueError, match=f"objective: expected that of .*, {objective}, got simple"):
        Trainer.resume(tmp_path / CHECKPOINT, tiny.dataset(), objective="simple")


# --- what is drawn ---


def test_the_draws_of_an_example_do_not_depend_on_its_batch():
    whole = draw(np.arange(100), 7, 1000, 0.5)
    for size in (1, 7, 33):
        parts = [draw(part, 7, 1000, 0.5) for part in np.split(np.arange(100), range(size, 100, size))]
        for name in ("seeds", "t", "null", "flip"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_t_is_uniform_and_seeds_are_distinct():
    n, T = 200_000, 10
    draws = draw(np.arange(n), 0, T, 0.1)
    counts = torch.bincount(draws.t, minlength=T).double()
    chi_squared = ((counts - n / T).square() / (n / T)).sum().item()
    assert len(counts) == T and chi_squared < 27.9  # 99.9% of chi^2 with 9 degrees of freedom
    assert len(draws.seeds.unique()) == n


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_labels_are_dropped_at_the_rate_asked_for(p):
    n = 100_000
    dropped = draw(np.arange(n), 0, 10, p).null.double().mean().item()
    assert dropped == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))


def test_draws_are_those_of_the_noise_standard():
    w0, w1, w2, w3 = 0x2DCE73E5, 0x1348E23F, 0xFCF8E0EC, 0xA287AADB  # Random123: counter (0, 0, 0, 1), key 0
    assert training.draws.EXAMPLE_STREAM == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.draws, "EXAMPLE_STREAM", 1)
        draws = draw(np.arange(1), 0, 1000, w3 / 2**32 + 1e-9)
        assert draws.seeds.item() == w0 | w1 << 32
        assert draws.t.item() == w2 * 1000 >> 32
        assert draws.null.item() and not draw(np.arange(1), 0, 1000, w3 / 2**32).null.item()


def test_steps_are_drawn_as_the_objective_says():
    run = trainer(batch_size=400, times="logit_normal", times_mean=-1.0, times_std=0.5)
    w = words(np.arange(400), 0, EXAMPLE_STREAM, run.config.seed)[:, 2]
    normal = statistics.NormalDist(-1.0, 0.5)
    T = run.model.schedule.T
    expected = [math.floor(T / (1 + math.exp(-normal.inv_cdf((word + 0.5) / 2**32)))) for word in w.tolist()]
    assert run.batch()[2].t.tolist() == expected


@pytest.mark.parametrize("variance", [None, "fixed_small", "fixed_large"])
def test_the_bounds_weight_has_the_variance_that_the_model_samples_with(variance):
    """beta^2 / (2 var alpha (1 - ab)) (Ho et al. 2020, eq. 12), but of the step to the image."""
    data, config = tiny.dataset(), tiny.config(objective="likelihood")
    run = Trainer(replace(new_model(data, config), variance=variance), data, config)
    s = run.model.schedule
    var = s.betas if variance == "fixed_large" else s.posterior_variance
    expected = s.betas**2 / (2 * var * s.alphas * s.one_minus_alpha_bar)
    weight = run.task.noising.table[:, LOSS_COLUMNS.index("weight")].double()
    torch.testing.assert_close(weight[1:], expected[1:], rtol=2e-6, atol=0)


@pytest.mark.parametrize("variance", [None, "fixed_small"])
def test_a_learned_variance_is_trained_between_the_two_fixed_ones(variance):
    data, config = tiny.dataset(), tiny.config(objective="hybrid", network={**tiny.NETWORK, "learned_variance": True})
    run = Trainer(replace(new_model(data, config), variance=variance), data, config)
    low, high = (
        run.task.noising.table[:, LOSS_COLUMNS.index(name)].double().exp() for name in ("log_var_min", "log_var_max")
    )
    s = run.model.schedule
    torch.testing.assert_close(low[1:], s.posterior_variance[1:], rtol=2e-6, atol=0)
    torch.testing.assert_close(high, s.betas, rtol=2e-6, atol=0)


def test_a_diagonal_variance_is_trained_around_the_forward_step_s():
    data, config = tiny.dataset(), tiny.config(objective="hybrid", network={**tiny.NETWORK, "learned_variance": True})
    run = Trainer(replace(new_model(data, config), variance="diagonal"), data, config)
    columns = run.task.noising.table.double().unbind(1)
    low, high = (columns[LOSS_COLUMNS.index(name)] for name in ("log_var_min", "log_var_max"))
    torch.testing.assert_close(high.exp(), run.model.schedule.betas, rtol=2e-6, atol=0)
    torch.testing.assert_close(high - low, torch.full_like(low, 2), rtol=1e-6, atol=0)


def test_every_epoch_sees_every_image_once_whatever_the_batch():
    seen = {}
    for batch_size in (3, 4, 25):
        run = trainer(batch_size=batch_size)
        index = torch.cat([run.index(part) for part in np.split(np.arange(40), range(batch_size, 40, batch_size))])
        assert all(sorted(epoch) == list(range(10)) for epoch in index.view(4, 10).tolist())
        seen[batch_size] = index.tolist()
    assert seen[3] == seen[4] == seen[25]


def test_a_batch_holds_the_images_labels_and_nulls_that_were_drawn():
    run = trainer(label_dropout=0.5, batch_size=64)
    x_0, labels, draws, _ = run.batch()
    index = run.index(np.arange(64))
    assert torch.equal(x_0, run.dataset.x_0(index))
    assert torch.equal(labels, torch.where(draws.null, -1, run.dataset.labels[index]))
    assert 0 < draws.null.sum() < 64


def test_flip_mirrors_about_half_of_the_images():
    plain, flipped = trainer(batch_size=400), trainer(batch_size=400, flip=True)
    x, y = plain.batch()[0], flipped.batch()[0]
    mirrored = (y == x.flip(-1)).flatten(1).all(1)
    assert (mirrored | (y == x).flatten(1).all(1)).all()
    assert mirrored.double().mean() == pytest.approx(0.5, abs=0.1)


def test_the_loss_is_algorithm_1_written_out():
    run = trainer()
    x_0, labels, draws, _ = run.batch()
    eps = ops.noise(draws.seeds, x_0.shape[1:], step=draws.t, stream=2).double()
    ab = run.model.schedule.alpha_bar[draws.t][:, None, None, None]
    x_t = ab.sqrt() * x_0 + (1 - ab).sqrt() * eps
    expected = (eps - run.network(x_t.float(), draws.t, labels)).square().mean()
    assert run.loss().item() == pytest.approx(expected.item(), rel=1e-5)


# --- a step ---


def test_training_lowers_the_loss():
    losses = take(trainer(lr=3e-3, batch_size=16), 40)
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:10])


def test_the_average_follows_its_recursion():
    """theta_bar_n = sum of (1 - d_k) prod_{j>k} d_j theta_k + prod d_j theta_0, with d_k = min(d, (1+k)/(10+k))."""
    run = trainer(ema=0.3)
    history = [run.network.conv_in.weight.detach().double().clone()]
    for _ in range(5):
        run.step()
        history.append(run.network.conv_in.weight.detach().double().clone())
    decays = [min(0.3, (1 + k) / (10 + k)) for k in range(1, 6)]
    expected = history[0] * math.prod(decays)
    for k, d in enumerate(decays):
        expected += (1 - d) * math.prod(decays[k + 1 :]) * history[k + 1]
    average = run.model.network.conv_in.weight
    torch.testing.assert_close(average.double(), expected, rtol=0, atol=1e-7)
    assert not torch.equal(average, run.network.conv_in.weight) and not average.requires_grad


def test_the_average_s_decay_warms_up_to_its_value():
    decays = [ema_decay(0.999, step) for step in range(1, 20_000)]
    assert decays[0] == 2 / 11 and decays == sorted(decays) and decays[-1] == 0.999


@pytest.mark.parametrize("lr_schedule", ["constant", "cosine"])
def test_the_learning_rate_rises_then_keeps_or_falls(lr_schedule):
    config = Config(steps=100, lr=0.5, warmup=10, lr_schedule=lr_schedule)
    rates = [config.learning_rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.05, rel=1e-12) and np.argmax(rates) == 9
    if lr_schedule == "constant":
        assert set(rates[9:]) == {0.5}
    else:
        assert rates[50] == pytest.approx(0.25, rel=1e-12) and rates[100] == pytest.approx(0, abs=1e-12)


def test_the_gradient_is_clipped_before_adamw_sees_it():
    """AdamW's first moment after one step is (1 - beta_1) times the gradient."""
    run = trainer(grad_clip=1e-3, betas=(0.9, 0.99))
    run.step()
    moments = torch.cat([state["exp_avg"].flatten() for state in run.optimizer.state.values()])
    assert moments.norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_a_step_with_dropout_leaves_torch_s_generator_alone_and_draws_as_if_it_were_seeded():
    run, seeded = (trainer(network={**tiny.NETWORK, "dropout": 0.5}, seed=7) for _ in range(2))
    run.step(), seeded.step()
    torch.manual_seed(7 + 1)
    expected = seeded.loss().item()
    before = torch.get_rng_state()
    assert run.step() == expected
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_draws_from_the_step_and_not_from_a_state():
    def two_steps(disturb: bool) -> list[float]:
        run = trainer(network={**tiny.NETWORK, "dropout": 0.5})
        first = run.step()
        if disturb:
            torch.rand(100)
        return [first, run.step()]

    assert two_steps(False) == two_steps(True)


def test_building_a_model_leaves_torch_s_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    new_model(tiny.dataset(), tiny.config())
    assert torch.equal(torch.get_rng_state(), before)


# --- checkpoints ---


@pytest.mark.parametrize("network", [tiny.NETWORK, {**tiny.NETWORK, "dropout": 0.3}], ids=["plain", "dropout"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, network):
    data = tiny.dataset()
    whole, first = (
        trainer(data, network=network, lr_schedule="cosine"),
        trainer(data, network=network, lr_schedule="cosine"),
    )
    losses = take(whole, 6)
    begun = take(first, 3)
    first.save(tmp_path / CHECKPOINT)
    second = Trainer.resume(tmp_path / CHECKPOINT, data)
    assert second.config == first.config
    assert_equal(second, first)
    assert begun + take(second, 3) == losses
    assert_equal(second, whole)


def test_resuming_keeps_the_layout_of_the_moments(tmp_path):
    """Fused AdamW walks memory: moments in another order than their weights would be mixed up."""
    run = trainer()
    run.save(tmp_path / CHECKPOINT)
    resumed = Trainer.resume(tmp_path / CHECKPOINT, run.dataset)
    strided = [p for p in resumed.network.parameters() if p.ndim == 4 and not p.is_contiguous()]
    assert strided
    for parameter in strided:
        assert resumed.optimizer.state[parameter]["exp_avg"].stride() == parameter.stride()
        assert resumed.optimizer.state[parameter]["exp_avg_sq"].stride() == parameter.stride()


def test_a_checkpoint_loads_as_its_averaged_model(tmp_path):
    run = trainer()
    take(run, 2)
    run.save(tmp_path / CHECKPOINT)
    for key, tensor in load(tmp_path / CHECKPOINT).network.state_dict().items():
        assert torch.equal(tensor, run.model.network.state_dict()[key])


def test_options_may_change_on_resuming_and_the_network_may_not(tmp_path):
    run = trainer()
    run.save(tmp_path / CHECKPOINT)
    resumed = Trainer.resume(tmp_path / CHECKPOINT, run.dataset, lr=1e-3, steps=9, seed=0, network={"channels": 8})
    assert (resumed.config.lr, resumed.config.steps) == (1e-3, 9)
    for name, value in (("network", {"channels": 16}), ("seed", 1), ("schedule", {"T": 30})):
        with pytest.raises(ValueError, match=f"{name}: expected that of .*{CHECKPOINT}"):
            Trainer.resume(tmp_path / CHECKPOINT, run.dataset, **{name: value})


@pytest.mark.parametrize(
    "same", [dict(network={"dropout": 0, "blocks": np.int64(1)}), dict(network={"freq_shift": 1}), dict(schedule={})]
)
def test_a_value_that_the_run_has_is_no_change_even_as_a_default(tmp_path, same):
    run = trainer()
    run.save(tmp_path / CHECKPOINT)
    assert Trainer.resume(tmp_path, run.dataset, **same).config == run.config  # by the run's folder


def test_other_data_than_the_checkpoint_s_are_refused(tmp_path):
    trainer().save(tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match=r"data: expected images of shape \(1, 8, 8\), got \(1, 16, 16\)"):
        Trainer.resume(tmp_path / CHECKPOINT, tiny.dataset(size=16))
    with pytest.raises(ValueError, match="data: expected the classes .*'class 2'.*, got None"):
        Trainer.resume(tmp_path / CHECKPOINT, tiny.dataset(classes=None))


def test_fewer_steps_than_have_been_taken_are_refused(tmp_path):
    run = trainer(steps=3)
    run.run(tmp_path, progress=False)
    with pytest.raises(ValueError, match=f"steps: expected at least the 3 that .*{CHECKPOINT} has taken, got 2"):
        Trainer.resume(tmp_path / CHECKPOINT, run.dataset, steps=2)


def test_other_pictures_than_the_run_has_seen_are_told(tmp_path):
    run = trainer(tiny.dataset(10))
    run.save(tmp_path / CHECKPOINT)
    with pytest.warns(UserWarning, match=f"data: expected the 10 images of the run of .*{CHECKPOINT}, got 9, and not"):
        Trainer.resume(tmp_path / CHECKPOINT, tiny.dataset(9))


@pytest.mark.filterwarnings("error")
def test_a_checkpoint_of_an_earlier_version_resumes(tmp_path):
    """It tells neither the data nor the losses that are not logged yet."""
    run = trainer()
    take(run, 2)
    run.save(tmp_path / CHECKPOINT)
    description, tensors = read(tmp_path / CHECKPOINT)
    del description["training"]["data"], description["training"]["log"]
    save_file(tensors, tmp_path / "old", metadata={"diffkern": json.dumps(description)})
    for path in (tmp_path / "old", tmp_path / CHECKPOINT):  # nor is the run's own data a reason to warn
        assert_equal(Trainer.resume(path, run.dataset), run)


# --- what the caller gives ---


def test_frozen_weights_stay_frozen_in_the_run_and_in_the_one_that_resumes_it(tmp_path):
    data, config = tiny.dataset(), tiny.config()
    model = new_model(data, config, init=tiny.model())  # whose last layer is not zero
    model.network.requires_grad_(False)
    model.network.conv_in.requires_grad_(True)
    before = {key: tensor.clone() for key, tensor in model.network.state_dict().items()}
    run = Trainer(model, data, config)
    take(run, 2)
    run.save(tmp_path / CHECKPOINT)
    resumed = Trainer.resume(tmp_path / CHECKPOINT, data)
    take(run, 1), take(resumed, 1)
    assert_equal(resumed, run)
    for key, tensor in resumed.network.state_dict().items():
        assert torch.equal(tensor, before[key]) != key.startswith("conv_in."), key


def test_a_network_that_is_frozen_throughout_is_trained(tmp_path):
    data, config = tiny.dataset(), tiny.config()
    frozen, plain = new_model(data, config), new_model(data, config)
    frozen.network.requires_grad_(False)
    runs_of_both = [Trainer(model, data, config) for model in (frozen, plain)]
    assert take(runs_of_both[0], 2) == take(runs_of_both[1], 2)
    assert_equal(*runs_of_both)


def test_fine_tuning_begins_with_the_weights_of_its_model_whatever_the_classes():
    init = tiny.model(classes=3)
    config = Config(schedule=tiny.SCHEDULE.config())  # the network is that of init
    same, other, none = (new_model(tiny.dataset(classes=n), config, init=init) for n in (3, 2, None))
    expected = init.network.state_dict()
    for model in (same, other, none):
        for key, tensor in model.network.state_dict().items():
            if model is same or key != "class_embedding.weight":
                assert torch.equal(tensor, expected[key]), key
    embedding = other.network.class_embedding.weight
    assert torch.equal(embedding, expected["class_embedding.weight"][[0, 1, -1]])


A, B, C, NULL, ANEW = 0, 1, 2, 3, None  # rows of the model that is fine-tuned
ROWS = {
    "another order": (("c", "a", "b"), True, [C, A, B, NULL]),
    "some": (("b", "d"), True, [B, ANEW, NULL]),
    "as many others": (("d", "e", "f"), True, [A, B, C, NULL]),
    "as many rows": (("d", "e", "f", "g"), False, [ANEW] * 4),
    "no null class": (("b", "c", "a"), False, [B, C, A]),
}


@pytest.mark.parametrize(("names", "null_class", "rows"), ROWS.values(), ids=ROWS)
def test_a_class_begins_with_the_embedding_of_its_name(names, null_class, rows):
    init = replace(tiny.model(), classes=("a", "b", "c"))
    data = replace(tiny.dataset(classes=len(names)), classes=names)
    config = tiny.config(network={**tiny.NETWORK, "null_class": null_class})
    mine, anew = (new_model(data, config, init=start).network.class_embedding.weight for start in (init, None))
    theirs = init.network.class_embedding.weight
    assert torch.equal(mine, torch.stack([anew[i] if row is None else theirs[row] for i, row in enumerate(rows)]))


def test_an_optimized_model_is_fine_tuned_as_the_one_within_and_not_trained():
    optimized = diffkern.optimize(tiny.model())
    model = new_model(tiny.dataset(), tiny.config(), init=optimized)
    assert torch.equal(model.network.conv_out.weight, tiny.model().network.conv_out.weight)
    with pytest.raises(TypeError, match="^network: expected .* that can be trained, got UNet that was optimized$"):
        Trainer(optimized, tiny.dataset(), tiny.config())


def test_a_network_that_the_model_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="init: tiny: .*expected shape"):
        new_model(tiny.dataset(), tiny.config(network={**tiny.NETWORK, "channels": 16}), init=tiny.model())


@pytest.mark.parametrize(("channels", "groups"), [(8, 8), (12, 4), (64, 32)])
def test_groups_divide_the_channels_unless_they_are_given(channels, groups):
    network = {key: value for key, value in tiny.NETWORK.items() if key != "groups"} | {"channels": channels}
    assert new_model(tiny.dataset(), tiny.config(network=network)).network.config["groups"] == groups


def test_a_checkpoint_of_classes_in_another_order_sees_its_images_under_its_labels(tmp_path):
    """Earlier versions sorted the folders 0 to 11 as text."""
    numbers = Dataset(tiny.dataset(24).images, torch.arange(24) // 2, tuple(map(str, range(12))))
    run = trainer(numbers.in_order_of(sorted(numbers.classes)))
    run.save(tmp_path / CHECKPOINT)
    resumed = Trainer.resume(tmp_path / CHECKPOINT, numbers)
    assert resumed.model.classes == run.dataset.classes != numbers.classes
    for mine, theirs in zip(resumed.batch()[:2], run.batch()[:2], strict=True):
        assert torch.equal(mine, theirs)


def test_a_model_without_its_training_is_no_checkpoint(tmp_path):
    save(tiny.model(), tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match="expected a training checkpoint, got a model"):
        Trainer.resume(tmp_path / CHECKPOINT, tiny.dataset())


# --- a run ---


def test_a_run_writes_checkpoint_log_and_samples_and_continues(tmp_path):
    run = trainer(log_every=2, checkpoint_every=4, sample_every=6)
    assert run.run(tmp_path, progress=False) is None
    assert sorted(os.listdir(tmp_path)) == [".lock", CHECKPOINT, "log.csv", "loss.png", "samples-0000006.png"]
    with Image.open(tmp_path / "samples-0000006.png") as image:
        assert image.size == (10 * 68 + 4, 4 * 82 + 4)
    header, *lines = (tmp_path / "log.csv").read_text().splitlines()
    assert header == "step,loss,lr,images_per_second,validation_loss" and [
        int(line.split(",")[0]) for line in lines
    ] == [2, 4, 6]

    again = Trainer.resume(tmp_path / CHECKPOINT, run.dataset, steps=8)
    assert again.steps == 6
    saved, save = [], again.save
    again.save = lambda path: (saved.append(again.steps), save(path))
    again.run(tmp_path, progress=False)
    assert read(tmp_path / CHECKPOINT)[0]["training"]["steps"] == 8
    assert saved == [8]  # once, though it is also the last step


def test_a_class_whose_name_the_font_cannot_spell_is_a_number_in_a_grid():
    grids = [
        trainer(replace(tiny.dataset(), classes=names)).grid(3, 2) for names in (("日", "月", "c"), ("0", "1", "c"))
    ]
    assert grids[0].tobytes() == grids[1].tobytes()


def test_the_log_holds_the_mean_loss_and_forgets_what_the_checkpoint_does_not_know(tmp_path):
    losses = take(trainer(), 4)
    (tmp_path / "log.csv").write_text("step,loss,lr,images_per_second\n2,1,1,1\n4,1,1,1\n6,1,1,1\n")
    training.Log(tmp_path / "log.csv", 4)
    assert (tmp_path / "log.csv").read_text().splitlines()[1:] == ["2,1,1,1,", "4,1,1,1,"]
    trainer(steps=4, log_every=2).run(tmp_path, progress=False)
    lines = [line.split(",") for line in (tmp_path / "log.csv").read_text().splitlines()[1:]]
    means = [np.mean(losses[:2]), np.mean(losses[2:])]
    assert [float(line[1]) for line in lines] == pytest.approx(means, abs=1e-6)


def test_a_run_shorter_than_a_line_of_the_log_has_one_at_its_end(tmp_path, capsys):
    losses = take(trainer(), 3)
    trainer(steps=3).run(tmp_path)
    (line,) = (tmp_path / "log.csv").read_text().splitlines()[1:]
    assert line.startswith("3,") and float(line.split(",")[1]) == pytest.approx(np.mean(losses), abs=1e-6)
    assert (tmp_path / "loss.png").exists()
    assert f"step 3, loss {np.mean(losses):.4f}" in capsys.readouterr().err


@pytest.fixture(params=[signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def number(request):
    """A signal that this process heeds, whatever started it: nohup has it ignore SIGHUP."""
    before = signal.signal(request.param, signal.default_int_handler)
    yield request.param
    signal.signal(request.param, before)


def test_signals_end_the_run_after_its_step_with_a_checkpoint(tmp_path, number):
    """Launchers send two: one in the step, and one while the checkpoint is being written."""
    run = trainer(steps=10)
    step, tensors = run.step, run.tensors

    def interrupted_step():
        if run.steps == 2:
            os.kill(os.getpid(), number)
        return step()

    def interrupted_tensors():
        os.kill(os.getpid(), number)
        return tensors()

    run.tensors = interrupted_tensors

    run.step = interrupted_step
    handler = signal.getsignal(number)
    assert run.run(tmp_path, progress=False) is number
    assert signal.getsignal(number) is handler
    reference = trainer(steps=10)
    take(reference, 3)
    assert_equal(Trainer.resume(tmp_path / CHECKPOINT, run.dataset), reference)


def test_a_later_ctrl_c_does_not_wait(tmp_path, monkeypatch):
    run = trainer(steps=1000)

    def impatient():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    run.step = impatient
    monkeypatch.setattr(runs, "IMPATIENCE", -1.0)
    with pytest.raises(KeyboardInterrupt):
        run.run(tmp_path, progress=False)
    assert not (tmp_path / CHECKPOINT).exists()


def test_sigusr1_saves_and_the_run_goes_on(tmp_path):
    run, saved = trainer(steps=4, checkpoint_every=100), []
    step, save_ = run.step, run.save

    def signalled_step():
        if run.steps == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step()

    run.step, run.save = signalled_step, lambda path: (saved.append(run.steps), save_(path))
    assert run.run(tmp_path, progress=False) is None
    assert saved == [2, 4]


def test_a_signal_in_the_last_step_changes_nothing(tmp_path):
    run = trainer(steps=1)
    step = run.step
    run.step = lambda: (os.kill(os.getpid(), signal.SIGTERM), step())[1]
    assert run.run(tmp_path, progress=False) is None


def test_a_folder_in_which_a_run_is_at_work_is_refused(tmp_path):
    with runs.locked(tmp_path), pytest.raises(RuntimeError, match="^out: expected a folder that no other run writes"):
        trainer().run(tmp_path, progress=False)
    assert os.listdir(tmp_path) == [".lock"]


def test_the_log_of_a_resumed_run_is_that_of_the_uninterrupted_one(tmp_path):
    """Two of the losses are logged by the process that follows the one that took the first of them."""
    run = trainer(steps=3, log_every=2)
    run.run(tmp_path / "parts", progress=False)
    Trainer.resume(tmp_path / "parts", run.dataset, steps=6).run(tmp_path / "parts", progress=False)
    trainer(steps=6, log_every=2).run(tmp_path / "whole", progress=False)
    parts, whole = ((tmp_path / out / "log.csv").read_text().splitlines() for out in ("parts", "whole"))
    assert len(whole) == 4  # the last line of the shorter run gave way
    assert [line.split(",")[:3] for line in parts] == [line.split(",")[:3] for line in whole]
    assert (tmp_path / "parts" / CHECKPOINT).read_bytes() == (tmp_path / "whole" / CHECKPOINT).read_bytes()


def test_a_run_outside_the_main_thread_works(tmp_path):
    run = trainer(steps=1)
    thread = threading.Thread(target=run.run, args=(tmp_path,), kwargs={"progress": False})
    thread.start()
    thread.join()
    assert read(tmp_path / CHECKPOINT)[0]["training"]["steps"] == 1


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(tmp_path, where):
    run = trainer(checkpoint_every=2, steps=100)
    loss = run.loss

    def diverging_loss(part):
        if run.steps < 3:
            return loss(part)
        return loss(part) * math.nan if where == "loss" else Explode.apply(loss(part))

    run.loss = diverging_loss
    with pytest.raises(Diverged, match="loss: expected a finite value, got .* at step 3"):
        run.run(tmp_path, progress=False)
    reference = trainer(steps=100, checkpoint_every=2)
    take(reference, 2)
    kept = Trainer.resume(tmp_path / CHECKPOINT, run.dataset)
    assert_equal(kept, reference)
    take(reference, 1)
    assert_equal(run, reference)  # the bad step changed nothing


class Explode(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


# --- configurations ---


def test_a_config_survives_json():
    for config in (Config(), *PRESETS.values()):
        assert json.dumps(vars(Config(**json.loads(json.dumps(vars(config)))))) == json.dumps(vars(config))


def test_numbers_of_numpy_and_torch_are_kept_as_python_s(tmp_path):
    numbers = dict(steps=np.int64(7), seed=np.uint8(3), lr=torch.tensor(0.5), betas=np.array([0.5, 0.75]))
    run = trainer(**numbers, network={**tiny.NETWORK, "channels": np.int64(8)})
    run.save(tmp_path / CHECKPOINT)
    stored = read(tmp_path / CHECKPOINT)[0]["training"]["config"]
    assert stored | dict(steps=7, seed=3, lr=0.5, betas=[0.5, 0.75], network=tiny.NETWORK) == stored


def test_the_shipped_recipe_builds_its_network():
    config = PRESETS["fashion-mnist"]
    model = new_model(tiny.dataset(classes=10, size=32), config)
    assert sum(p.numel() for p in model.network.parameters()) == 3_940_801
    assert model.schedule.config() == {"kind": "linear", "T": 1000, "beta_start": 1e-4, "beta_end": 0.02}


BAD_CONFIGS = [
    (dict(steps=0), ValueError, "steps: expected an int >= 1, got 0"),
    (dict(steps=1.5), TypeError, "steps: expected an int >= 1, got 1.5"),
    (dict(batch_size=-1), ValueError, "batch_size: expected an int >= 1, got -1"),
    (dict(checkpoint_every=0), ValueError, "checkpoint_every: expected an int >= 1, got 0"),
    (dict(log_every=0), ValueError, "log_every: expected an int >= 1, got 0"),
    (dict(sample_every=-1), ValueError, "sample_every: expected an int >= 0, got -1"),
    (dict(warmup=-1), ValueError, "warmup: expected an int >= 0, got -1"),
    (dict(lr=0), ValueError, "lr: expected a number > 0, got 0"),
    (dict(lr=math.nan), ValueError, "lr: expected a number > 0, got nan"),
    (dict(lr="1e-3"), TypeError, "lr: expected a number > 0, got '1e-3'"),
    (dict(lr_schedule="linear"), ValueError, "lr_schedule: expected one of .*, got 'linear'"),
    (dict(betas=(0.9,)), ValueError, r"betas: expected two numbers in \[0, 1\), got \(0.9,\)"),
    (dict(betas=(0.9, 1.0)), ValueError, r"betas: expected two numbers in \[0, 1\), got 1.0"),
    (dict(weight_decay=-1.0), ValueError, "weight_decay: expected a number >= 0, got -1.0"),
    (dict(grad_clip=math.inf), ValueError, "grad_clip: expected a number >= 0, got inf"),
    (dict(ema=1.0), ValueError, r"ema: expected a number in \[0, 1\), got 1.0"),
    (dict(label_dropout=1.1), ValueError, "label_dropout: expected a probability, got 1.1"),
    (dict(seed=2**64), ValueError, r"seed: expected an int in \[-2\^63, 2\^64\), got 18446744073709551616"),
    (dict(prediction="mu"), ValueError, "prediction: expected one of eps, x0, v, score, flow, edm, got 'mu'"),
    (dict(objective="mse"), ValueError, "objective: expected one of simple, eps, .*, got 'mse'"),
    (dict(times="cosine"), ValueError, "times: expected one of uniform, .*, importance, got 'cosine'"),
    (dict(times="uniform", times_std=1.0), ValueError, "times_std: expected None without times of a normal, got 1.0"),
    (dict(times="log_normal", times_std=0.0), ValueError, "times_std: expected a number > 0, got 0.0"),
    (dict(flip=1), TypeError, "flip: expected True or False, got 1"),
    (dict(bf16="yes"), TypeError, "bf16: expected True or False, got 'yes'"),
    (dict(network=[]), TypeError, "network: expected a dict, got list"),
    (dict(schedule="linear"), TypeError, "schedule: expected a dict, got str"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_CONFIGS, ids=[str(row[0]) for row in BAD_CONFIGS])
def test_a_bad_config_says_what_was_expected(changes, error, message):
    with pytest.raises(error, match=message):
        Config(**changes)


def with_prediction_v():
    data, config = tiny.dataset(), tiny.config(prediction="eps")
    model = new_model(data, config)
    model.prediction = "v"
    return Trainer(model, data, config)


BAD_RUNS = {
    "bound": (
        lambda: trainer(schedule={"kind": "ve"}, objective="vlb", network={**tiny.NETWORK, "learned_variance": True}),
        "previous: expected the .* that each step reaches, for the bound, got None",
    ),
    "process": (lambda: trainer(schedule={"kind": "edm", "t_max": -1}), "t_max: expected a number > 0, got -1"),
    "times": (lambda: trainer(objective="edm"), r"times: expected t in \[0, 1\], got LogNormal"),
    "prediction": (with_prediction_v, "prediction: expected 'eps', which is trained, got 'v'"),
    "variance": (
        lambda: trainer(network={**tiny.NETWORK, "learned_variance": True}),
        "one of hybrid, vlb with a network of a learned variance, as it returns 2 channels for 1, got 'simple'",
    ),
    "no variance": (lambda: trainer(objective="hybrid"), "objective: expected one of simple, .* of a fixed variance"),
    "groups": (lambda: trainer(network={**tiny.NETWORK, "groups": 5}), "groups: expected a divisor of every width"),
    "schedule": (lambda: trainer(schedule={"kind": "none"}), "config: expected a kind among"),
    "null": (lambda: trainer(network={**tiny.NETWORK, "null_class": False}), "label_dropout: expected 0 .*, got 0.1"),
    "timesteps": (lambda: trainer(schedule=Schedule.linear(2**20 + 1).config()), "T: expected at most 1048576, got"),
    "steps": (lambda: trainer(steps=5 * 10**18), r"steps: expected an int below 2\^62, got 5000000000000000000"),
    "size": (lambda: trainer(tiny.dataset(size=7)), "size: expected a multiple of 2 for .* 2 levels, got .* 7 x 7"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD_RUNS.values(), ids=BAD_RUNS)
def test_what_cannot_be_trained_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
