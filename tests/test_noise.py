"""The noise: known answers, the same bits everywhere, and normal."""

import importlib
import math
import pkgutil
import re
from pathlib import Path

import levels
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import diffkern
from diffkern import _C, ops, reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert levels.digest(got) == levels.digest(expected), (got - expected).abs().max()


# --- words ---


def hexadecimal(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], np.uint32)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
        ("1 0 0 0", "0 0", "f8e4cca4 5cb200db b1a574eb 097eff67"),
        ("0 1 0 0", "0 0", "6ad0c5ec ea236249 73a459f5 074944b3"),
        ("0 0 1 0", "0 0", "844515e1 f08d6eaa 0f19c053 83f875f0"),
        ("0 0 0 1", "0 0", "2dce73e5 1348e23f fcf8e0ec a287aadb"),
    ],
)
def test_philox_gives_random123s_known_answers(counter, key, words):
    counter, key, words = hexadecimal(counter), hexadecimal(key), hexadecimal(words)
    np.testing.assert_array_equal(reference.philox4x32(counter, key), words)
    assert _C.philox(counter.tolist(), key.tolist()) == words.tolist()


def test_a_blocks_words_are_those_of_its_seed_step_and_stream():
    """The known answers above with key 0 are noise: of block 0 and 1, step 0 and 1, stream 0 and 1."""

    def normals(words: str) -> list[float]:
        return reference.normals(hexadecimal(words)).tolist()

    first, second = normals("6627e8d5 e169c58d bc57ac4c 9b00dbd8"), normals("f8e4cca4 5cb200db b1a574eb 097eff67")
    assert ops.noise(0, (8,), step=0)[0].tolist() == first + second
    assert ops.noise(0, (4,), step=1)[0].tolist() == normals("844515e1 f08d6eaa 0f19c053 83f875f0")
    assert ops.noise(0, (4,), step=0, stream=1)[0].tolist() == normals("2dce73e5 1348e23f fcf8e0ec a287aadb")


# --- the two functions of one word ---

# Sums over all 2^32 codes; the NumPy reference was run over all of them once and gave these.
RADIUS_HASH, ANGLE_HASH = 0x021831C11B97D6C8, 0x9C4B25819DB4BF3C
RUN = 1 << 20  # codes a partial hash covers
RADIUS_ULPS, ANGLE_ULPS = 2.23, 2.38  # the worst over all codes: 2.222 and 2.371


def word_hash(codes: np.ndarray, *weighted: tuple[np.ndarray, np.ndarray]) -> int:
    """csrc/ops/word_hash/cpu.cpp in NumPy: (weights, values) pairs."""
    low = high = 0
    for weight, value in weighted:
        bits = np.ascontiguousarray(value).view(np.uint32)
        low += int((bits * (np.uint32(2) * weight + np.uint32(1))).sum(dtype=np.uint32))
        mixed = (bits ^ (weight * np.uint32(0x9E3779B9))) * np.uint32(0x85EBCA6B) ^ (bits >> np.uint32(15))
        high += int(mixed.sum(dtype=np.uint32))
    return (high % 2**32) << 32 | low % 2**32


# The runs with the smallest and the largest u, and those where its logarithm changes branch or the quarter changes.
RUNS = (0, 1, 511, 512, 2047, 2048, 3071, 3584, 4095)


def test_radius_and_angle_of_millions_of_codes_have_the_references_bits_on_every_cpu_level(at_every_level):
    expected = []
    for run in RUNS:
        codes = np.arange(RUN, dtype=np.uint32) + np.uint32(run * RUN)
        cos, sin = reference.cos_sin(codes)
        expected.append(word_hash(codes, (codes, reference.radius(codes))))
        expected.append(word_hash(codes, (codes, cos), (codes * np.uint32(0x9E3779B1), sin)))
    hashes = f"[_C.word_hash(name, run, run + 1) for run in {RUNS} for name in ('radius', 'angle')]"
    for level, got in at_every_level(f"from diffkern import _C; print(*{hashes})", levels.WIDTHS).items():
        assert list(map(int, got.split())) == expected, level


@pytest.mark.slow
def test_radius_and_angle_are_the_same_over_all_codes_on_every_cpu_level(at_every_level):
    program = "from diffkern import _C; print(_C.word_hash('radius'), _C.word_hash('angle'))"
    for level, hashes in at_every_level(program, levels.WIDTHS).items():
        assert tuple(map(int, hashes.split())) == (RADIUS_HASH, ANGLE_HASH), level


def test_every_op_has_the_references_bits_on_every_cpu_level(at_every_level):
    expected = {name: levels.digest(result) for name, result in levels.results(reference)}
    for level, answer in levels.answers_at_every_level().items():
        assert answer["level"] == level
        assert answer["digests"] == expected, level


def ulps(got: np.ndarray, exact: np.ndarray) -> float:
    """The largest error, in units of the last place of a float32 of the exact value's size."""
    _, exponent = np.frexp(np.abs(exact))
    return float((np.abs(got - exact) / np.ldexp(1.0, exponent - 24)).max())


def every_kind_of_code() -> np.ndarray:
    """Both ends at full resolution and a lattice between them."""
    ends = np.arange(1 << 18, dtype=np.uint32)
    return np.concatenate((ends, ~ends, np.arange(0, 2**32, 2039).astype(np.uint32)))


def ulps_of(codes: np.ndarray) -> dict[str, float]:
    """The largest errors of the reference over these codes, against float64."""
    u, upper = (codes + 0.5) * 2.0**-32, (~codes + 0.5) * 2.0**-32
    logarithm = np.where(codes < 2**31, np.log(u), np.log1p(-upper))
    t = (codes << np.uint32(2)).view(np.int32) * (np.pi / 2 * 2.0**-32)  # reduced exactly
    quarter = (codes + np.uint32(1 << 29)) >> np.uint32(30)
    sin, cos = np.sin(t), np.cos(t)
    got_cos, got_sin = reference.cos_sin(codes)
    return {
        "radius": ulps(reference.radius(codes), np.sqrt(-2 * logarithm)),
        "cosine": ulps(got_cos, np.choose(quarter, [cos, -sin, -cos, sin])),
        "sine": ulps(got_sin, np.choose(quarter, [sin, cos, -sin, -cos])),
    }


def test_radius_cosine_and_sine_are_within_the_stated_ulps_of_float64():
    errors = ulps_of(every_kind_of_code())
    assert errors["radius"] < RADIUS_ULPS
    assert errors["cosine"] < ANGLE_ULPS and errors["sine"] < ANGLE_ULPS


def test_tails_are_full_and_no_uniform_rounds_to_one():
    extremes = reference.radius(np.array([0, 2**32 - 1, 2**32 - 128], np.uint32)).astype(np.float64)
    exact = [math.sqrt(66 * math.log(2)), math.sqrt(-2 * math.log1p(-(2.0**-33)))]
    np.testing.assert_allclose(extremes[:2], exact, rtol=1e-7)
    assert extremes[0] > 6.7637 and extremes[2] > extremes[1] > 0


# --- docs/noise.md ---

PAGE = (Path(__file__).parents[1] / "docs" / "noise.md").read_text()


def page_program() -> dict[str, object]:
    """The names that the page's NumPy program defines."""
    names: dict[str, object] = {}
    exec(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], names)
    return names


def test_the_page_lists_the_streams_that_the_package_draws_from():
    """0 to 2 are the ops'; modules name the others."""
    names = [module.name for module in pkgutil.walk_packages(diffkern.__path__, "diffkern.")]
    modules = [importlib.import_module(name) for name in names if "._" not in name]
    named = {value for module in modules for name, value in vars(module).items() if name.endswith("_STREAM")}
    table = re.search(r"\| stream \| what diffkern draws.*?\n\n", PAGE, re.S).group()
    listed = [int(number) for number in re.findall(r"^\| (\d+) \|", table, re.M)]
    assert listed == sorted({0, 1, 2} | named)
    free = f"from {listed[-1] + 1} on"
    assert f"any {free}" in PAGE and free in ops.noise.__doc__


def test_the_program_of_the_page_gives_the_kernels_bits():
    noise = page_program()["noise"]
    for seed, elements, step, stream in ((0, 7, 0, 0), (-3, 5000, 999, 1), (2**64 - 1, 1, 2**32 - 1, 2**32 - 1)):
        expected = ops.noise(seed, (elements,), step=step, stream=stream)[0].numpy()
        np.testing.assert_array_equal(noise(seed, elements, step, stream).view(np.int32), expected.view(np.int32))


def test_the_known_answers_of_the_page_are_the_kernels_and_the_programs():
    noise = page_program()["noise"]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| `([0-9a-f ]+)` \|$", PAGE, re.MULTILINE)
    assert len(rows) == 7
    for seed, step, stream, normals in rows:
        bits = hexadecimal(normals)
        address = dict(step=int(step), stream=int(stream))
        np.testing.assert_array_equal(noise(int(seed), 6, **address).view(np.uint32), bits)
        np.testing.assert_array_equal(ops.noise(int(seed), (6,), **address)[0].numpy().view(np.uint32), bits)


def test_the_hashes_and_worst_errors_that_the_page_states_are_those():
    for name, value in (("radius", RADIUS_HASH), ("angle", ANGLE_HASH)):
        assert f'| `word_hash("{name}")` | `{value:016x}` |' in PAGE
    rows = re.findall(r"^\| (radius|cosine|sine) \| ([0-9.]+) ulp \| (\d+) \|$", PAGE, re.MULTILINE)
    errors = {name: ulps_of(np.array([int(word)], np.uint32))[name] for name, _, word in rows}
    assert {name: f"{error:.3f}" for name, error in errors.items()} == {name: ulp for name, ulp, _ in rows}


# --- addressing ---


@given(
    seeds=st.lists(st.integers(-(2**63), 2**64 - 1), min_size=0, max_size=4),
    shape=st.lists(st.integers(0, 17), min_size=0, max_size=3),
    step=st.integers(0, 2**32 - 1),
    stream=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(list(DTYPES.values())),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_noise_has_the_references_bits(seeds, shape, step, stream, dtype):
    got = ops.noise(seeds, shape, step=step, stream=stream, dtype=dtype)
    assert_same_bits(got, reference.noise(seeds, shape, step=step, stream=stream, dtype=dtype))


def test_noise_of_any_size_is_a_beginning_of_the_same_sequence():
    seeds, longest = torch.tensor([7, -7]), 200_001
    whole = ops.noise(seeds, (longest,), step=5)
    assert_same_bits(whole, reference.noise(seeds, (longest,), step=5))
    for size in (*range(1, 201), 1023, 1024, 1025, 2049, 65_537):
        assert_same_bits(ops.noise(seeds, (size,), step=5), whole[:, :size])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_low_precision_noise_is_the_float32_value_rounded_once(dtype):
    z = ops.noise(3, (300_000,), step=1)
    assert_same_bits(ops.noise(3, (300_000,), step=1, dtype=dtype), z.to(dtype))


def test_noise_of_a_sample_is_independent_of_its_batch():
    seeds, steps = torch.arange(9) - 4, torch.arange(9) * 477_218_588
    batch = ops.noise(seeds, (3, 17, 19), step=steps)
    for n in range(9):
        assert torch.equal(ops.noise(seeds[n : n + 1], (3, 17, 19), step=steps[n]), batch[n : n + 1])
    for split in (1, 4, 8):
        parts = [ops.noise(s, (3, 17, 19), step=t) for s, t in zip(seeds.split(split), steps.split(split), strict=True)]
        assert torch.equal(torch.cat(parts), batch)


def test_noise_is_independent_of_the_thread_count():
    threads = torch.get_num_threads()
    try:
        got = []
        for count in range(1, 9):
            torch.set_num_threads(count)
            got.append(ops.noise([1, 2, 3], (100_003,), step=4))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(z, got[0]) for z in got)


def test_noise_is_independent_of_how_the_sample_is_shaped():
    flat = ops.noise([1, 2], (3 * 8 * 10,), step=4)
    assert torch.equal(ops.noise([1, 2], (3, 8, 10), step=4).flatten(1), flat)


def test_seeds_are_taken_modulo_two_to_the_64():
    for big, small in ((2**64 - 1, -1), (2**63, -(2**63))):
        assert torch.equal(ops.noise(big, (5,), step=0), ops.noise(small, (5,), step=0))
    assert torch.equal(ops.noise([2**64 - 1], (5,), step=0), ops.noise(torch.tensor([-1]), (5,), step=0))


@pytest.mark.parametrize(
    "seeds",
    [
        range(5), range(7, -8, -3), range(3, 3), range(2**63 - 2, 2**63 + 2), range(2**64 - 1, 2**64),
        range(-(2**63), 2**64, 2**61), range(2**64 - 1, -(2**63) - 1, -(2**62)),
    ],
)  # fmt: skip
def test_a_range_of_seeds_is_the_same_as_its_numbers(seeds):
    assert_same_bits(ops.as_seeds(seeds), ops.as_seeds(list(seeds)))


def test_a_range_of_seeds_is_checked_without_being_counted_out():
    for seeds, wrong in ((range(2**64, 2**64 + 1), 2**64), (range(-(2**63) - 1, 2**64), -(2**63) - 1)):
        with pytest.raises(ValueError, match=rf"^seeds: expected ints in \[-2\^63, 2\^64\), got {wrong}$"):
            ops.as_seeds(seeds)
    with pytest.raises(ValueError, match=rf"^seeds: expected fewer than 2\^60, got {2**64}$"):
        ops.as_seeds(range(2**64))


def test_a_step_for_each_sample_is_the_same_as_one_call_each():
    steps = torch.tensor([0, 2**32 - 1, 17])
    each = [ops.noise([seed], (6,), step=step) for seed, step in zip((1, 2, 3), steps.tolist(), strict=True)]
    assert torch.equal(ops.noise([1, 2, 3], (6,), step=steps), torch.cat(each))
    assert torch.equal(ops.noise([1, 2, 3], (6,), step=torch.stack((steps, steps), 1)[:, 0]), torch.cat(each))


def test_an_empty_shape_is_one_number_a_sample_and_an_empty_batch_is_empty():
    assert ops.noise([1, 2], (), step=0).shape == (2,)
    assert torch.equal(ops.noise([1, 2], (), step=0), ops.noise([1, 2], (1,), step=0)[:, 0])
    assert ops.noise([], (3, 4), step=0).shape == (0, 3, 4)
    assert ops.noise([1, 2], (3, 0), step=0).shape == (2, 3, 0)


# --- distribution: fixed seeds, bounds of five standard deviations ---

MILLIONS = 1 << 23


@pytest.mark.parametrize(("power", "moment"), [(1, 0), (2, 1), (3, 0), (4, 3), (5, 0), (6, 15), (7, 0), (8, 105)])
def test_moments_are_those_of_a_standard_normal(power, moment):
    z = ops.noise(power, (MILLIONS // 2,), step=0)[0].double()
    variance = math.prod(range(1, 2 * power, 2)) - moment**2  # E z^2k = (2k - 1)!!
    assert abs((z**power).mean() - moment) < 5 * math.sqrt(variance / len(z))


def test_the_distribution_passes_kolmogorov_and_smirnov():
    assert stats.kstest(ops.noise(2, (1 << 20,), step=0)[0].numpy(), "norm").pvalue > 1e-4


def test_tails_beyond_three_four_and_five_have_their_probability():
    counts = np.zeros(3)
    for seed in range(8):
        z = ops.noise(seed, (MILLIONS,), step=1).abs_()
        counts += [int((z > bound).sum()) for bound in (3, 4, 5)]
        assert 5 < z.max() < 6.7638
    expected = 8 * MILLIONS * 2 * stats.norm.sf([3, 4, 5])
    assert math.isclose(2 * stats.norm.sf(5), 5.733e-7, rel_tol=1e-4)
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all(), (counts, expected)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 1024])
def test_neighbouring_elements_are_uncorrelated(lag):
    z = ops.noise(3, (1 << 22,), step=0)[0].double()
    count = len(z) - lag
    assert abs((z[:-lag] * z[lag:]).mean()) < 5 / math.sqrt(count)
    assert abs(((z[:-lag] ** 2 - 1) * (z[lag:] ** 2 - 1)).mean()) < 5 * 2 / math.sqrt(count)


def test_seeds_steps_and_streams_are_independent_of_one_another():
    count = 1 << 18
    z = torch.cat(
        [
            ops.noise([0, 1, 2, 2**32, -1], (count,), step=0),
            *(ops.noise([0], (count,), step=step) for step in (1, 2, 999)),
            *(ops.noise([0], (count,), step=0, stream=stream) for stream in (1, 2, 3)),
        ]
    ).double()
    for power in (z, (z**2 - 1) / math.sqrt(2)):
        correlation = power @ power.T / count - torch.eye(len(z))
        correlation.fill_diagonal_(0)
        assert correlation.abs().max() < 5.5 / math.sqrt(count)


# --- the dispatcher ---


def test_noise_compiles_without_a_graph_break():
    def draw(seeds, step):
        return ops.noise(seeds, (3, 8, 8), step=step, stream=1) * 2

    seeds, step = torch.tensor([1, 2]), torch.tensor([3, 4])
    compiled = torch.compile(draw, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(seeds, step), draw(seeds, step))
