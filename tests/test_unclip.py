"""unCLIP: the words, the towers, what it draws, its file, its recipe. The networks are tiny and mostly untrained."""

import json
import math
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image

from diffkern import Model, Schedule, UNet, cli, images, interpolate, load, sample, save, similarity, vary
from diffkern.cascade.recipe import WIDTHS
from diffkern.datasets.emoji import Emoji
from diffkern.datasets.faces import Faces
from diffkern.io.files import read, write
from diffkern.networks import ResidualMLP
from diffkern.system import part_seeds
from diffkern.unclip import CLIP, UnCLIP, contrastive, pictures, recipe
from diffkern.unclip.vocabulary import UnknownWord, Vocabulary

WORDS = ("apple", "blue", "cat", "green", "heart", "red")
FEATURES = 16


def tiny_clip() -> CLIP:
    torch.manual_seed(0)
    return CLIP(
        WORDS, size=16, features=FEATURES, widths=(8, 8), text_width=16, text_layers=1, heads=2, length=4
    ).eval()


def filled(network: torch.nn.Module) -> torch.nn.Module:
    """With random numbers in the weights that begin as zeros, behind which nothing would be seen."""
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


def tiny(shape=(3, 16, 16)) -> UnCLIP:
    clip = tiny_clip()
    text, embedding = {"text": (FEATURES,)}, {"embedding": (FEATURES,), "caption": (FEATURES,)}
    prior = ResidualMLP(FEATURES, width=16, blocks=1, conditions=text)
    small = dict(channels=8, channel_mult=(1, 1), blocks=1, attention_levels=(), groups=4)
    decoder = filled(UNet(3, **small, conditions=embedding))
    schedule = Schedule.cosine(20)
    models = (
        Model(prior.eval(), schedule, "x0", (FEATURES,), clip=False, name="prior"),
        Model(decoder, schedule, "v", shape, name="decoder"),
    )
    return UnCLIP(clip, *models, steps=3, prior_steps=2, name="tiny")


@pytest.fixture(scope="module")
def system() -> UnCLIP:
    return tiny()


def draw(system, **options):
    return sample(system, progress=False, **options)


# --- words ---


def test_words_have_numbers_and_unknown_ones_are_told_with_their_neighbours():
    vocabulary = Vocabulary(WORDS)
    assert vocabulary.numbers_of("Red APPLE, red!") == [6, 1, 6]
    assert vocabulary.rows(["cat", "red heart"], 3).tolist() == [[3, 0, 0], [6, 5, 0]]
    with pytest.warns(UnknownWord, match=r"left out 'hart' \(nearest: heart, cat\)"):
        assert vocabulary.numbers_of("red hart") == [6]
    with pytest.raises(ValueError, match=r"prompt: expected words that the model knows, got 'zzz' \(nearest: none\)"):
        vocabulary.numbers_of("zzz")
    with pytest.raises(TypeError, match="prompt: expected text, got int"):
        vocabulary.numbers_of(3)


# --- the towers ---


def test_embeddings_are_unit_vectors_and_a_text_is_embedded_by_itself():
    clip = tiny_clip()
    drawings, texts = clip.embed_images(torch.rand(3, 3, 20, 24)), clip.embed_texts(["red cat", "apple", "red cat"])
    for found in (drawings, texts):
        torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    assert torch.equal(texts[0], texts[2]) and torch.equal(texts[1:2], clip.embed_texts(["apple"]))
    with pytest.raises(ValueError, match=r"images: expected floats \[N, 3, H, W\], got \(3, 16, 16\)"):
        clip.embed_images(torch.zeros(3, 16, 16))


def test_the_contrastive_loss_counts_pictures_of_one_thing_as_right():
    clip = tiny_clip()
    x, rows = torch.rand(4, 3, 16, 16) * 2 - 1, clip.vocabulary.rows(["red cat", "cat", "apple", "blue"], 4)
    things = torch.tensor([0, 0, 1, 2])
    z_i, z_t, scale = clip.image(x), clip.text(rows), clip.log_scale.exp()
    expected = 0.0
    for a, b in ((z_i, z_t), (z_t, z_i)):
        for i in range(4):
            scores = [scale * (a[i] @ b[j]) for j in range(4)]
            whole = torch.stack(scores).logsumexp(0)
            right = [whole - scores[j] for j in range(4) if things[j] == things[i]]
            expected = expected + sum(right) / len(right) / 8
    torch.testing.assert_close(clip.loss(x, rows, things), expected)
    distinct = clip.loss(x, rows, torch.arange(4))
    logits = scale * z_i @ z_t.T
    cross = torch.nn.functional.cross_entropy
    torch.testing.assert_close(distinct, (cross(logits, torch.arange(4)) + cross(logits.T, torch.arange(4))) / 2)


# --- what it draws ---


def test_a_picture_depends_on_its_seed_and_its_text_alone(system):
    both = draw(system, prompt=["red cat", "blue heart"], seeds=[1, 2], batch_size=2)
    assert both.shape == (2, 3, 16, 16) and both.abs().max() <= 1
    alone = draw(system, prompt="blue heart", seeds=[5, 2], batch_size=2)
    one, state = draw(system, prompt="blue heart", seeds=[2], batch_size=2), torch.get_rng_state()
    assert torch.equal(one[0], both[1]) and torch.equal(state, torch.get_rng_state())
    assert torch.equal(both[1], alone[1]) and not torch.equal(alone[0], alone[1])
    assert not torch.equal(draw(system, prompt="red heart", seeds=[2, 2])[0], both[1])
    assert torch.equal(draw(system, n=1), draw(system, seeds=[0]))  # of anything
    assert draw(system, prompt=["red", "blue", "cat"]).shape[0] == 3


def test_guidance_is_the_decoder_s_and_prior_guidance_the_prior_s(system):
    plain = draw(system, prompt="cat", n=1, guidance=1, prior_guidance=1)
    for change in (dict(guidance=3, prior_guidance=1), dict(guidance=1, prior_guidance=4)):
        assert not torch.equal(plain, draw(system, prompt="cat", n=1, **change))
    own = draw(system, prompt="cat", n=1)
    assert torch.equal(own, draw(system, prompt="cat", n=1, guidance=2.5, prior_guidance=2.0, steps=3))


def test_the_parts_draw_by_seeds_of_their_own():
    seeds = torch.tensor([0, 1, -1, 2**62])
    found = [part_seeds(seeds, part) for part in (1, 2)]
    assert found[0].tolist() == part_seeds(seeds, 1).tolist() and len({*found[0].tolist(), *found[1].tolist()}) == 8
    assert found[0][:2].tolist() == [-3025779480805814189, 7401736692487668644]


def test_variations_and_interpolations(system):
    x = torch.rand(3, 16, 16) * 2 - 1
    varied = vary(system, x, 3, progress=False)
    assert varied.shape == (3, 3, 16, 16)
    torch.testing.assert_close(varied[1:2], vary(system, x, seeds=[1], progress=False), rtol=0, atol=1e-3)
    between = interpolate(system, x, "red heart", 4, progress=False)
    assert between.shape == (4, 3, 16, 16)
    torch.testing.assert_close(between[0], varied[0], rtol=0, atol=1e-3)  # all frames have one seed's noise, 0
    assert interpolate(system, 3, 4, 2, seed=9, progress=False).shape[0] == 2
    ends = [system._end("a", end) for end in (x, "cat", 3)]
    assert [tuple(end.shape) for end in ends] == [(FEATURES,)] * 3


def test_similarity_is_the_cosine(system):
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    found = similarity(system, x, ["red cat", "apple"])
    expected = system.clip.embed_images(x) @ system.clip.embed_texts(["red cat", "apple"]).T
    torch.testing.assert_close(found, expected.detach())
    assert similarity(system, x, "cat").shape == (2, 1)


BAD = {
    "labels": (lambda s: draw(s, n=1, labels=[0]), "labels: expected None, this model has no classes"),
    "texts": (lambda s: draw(s, prompt=["cat"], n=2), "prompt: expected a text, or 2, one for each picture, got 1"),
    "seeds": (lambda s: draw(s, n=1, seeds=[0, 1]), "seeds: expected 1, one for each picture, got 2"),
    "image": (lambda s: vary(s, torch.zeros(1, 3, 16, 16)), r"image: expected a picture \[3, H, W\], got \(1, 3,"),
    "end": (lambda s: interpolate(s, 0.5, 1), "a: expected a picture .*, a text or a seed, got float"),
    "fraction": (lambda s: interpolate(s, 0, 1, fraction=0.5), "fraction: expected None with a system of models"),
    "option": (lambda s: draw(s, n=1, prompts="cat"), "prompts: expected "),
    "both": (lambda s: vary(s, torch.zeros(3, 16, 16), 3, seeds=[1]), "seeds: expected 3, one for each picture, got 1"),
    "model": (lambda s: vary("fashion-mnist", torch.zeros(3, 16, 16)), "model: expected an UnCLIP, .*, got Model"),
    "part": (lambda s: replace(s, upsampler="faces"), "upsampler: expected a Model, got 'faces'"),
    "parts": (lambda s: UnCLIP(s.clip, s.decoder, s.prior), r"decoder: expected a model with the conditions \('text',"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_told_by_name(system, name):
    call, message = BAD[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call(system)


# --- the file, and the command line ---


def test_a_file_holds_all_three_networks(system, tmp_path):
    save(system, tmp_path / "tiny.safetensors")
    loaded = load(tmp_path / "tiny.safetensors")
    assert loaded.name == "tiny" and loaded.clip.vocabulary.words == WORDS and loaded.steps == 3
    assert torch.equal(draw(loaded, prompt="red cat", n=2), draw(system, prompt="red cat", n=2))
    assert torch.equal(draw(tmp_path / "tiny.safetensors", prompt="red cat", n=2), draw(system, prompt="red cat", n=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d | {"system": "other"}, "system: expected one of cascade, unclip, got 'other'"),
        (lambda d: d | {"format": 2}, "expected a system of format 1, got 2"),
        (lambda d: d | {"steps": "x"}, "steps: expected a number, got 'x'"),
        (lambda d: d | {"clip": None}, "clip: expected an object, got None"),
        (lambda d: d | {"clip": d["clip"] | {"words": [1]}}, "words: expected a list of words, got list"),
        (lambda d: d | {"clip": d["clip"] | {"widths": [8]}}, "expected the tensors of its network|shape"),
        (lambda d: d | {"clip": d["clip"] | {"widths": []}}, "widths: expected multiples of 8"),
        (lambda d: d | {"clip": d["clip"] | {"heads": 3}}, "heads: expected a divisor of text_width 16, got 3"),
        (lambda d: d | {"clip": d["clip"] | {"text_layers": 10**9}}, "text_layers: expected at most 64"),
        (lambda d: d | {"prior": d["decoder"]}, "expected|prior"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused(system, tmp_path, change, message):
    path = tmp_path / "tiny.safetensors"
    save(system, path)
    description, tensors = read(path)
    write(path, change(description), tensors)
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*(" + message + ")"):
        load(path)


def test_the_commands_take_texts(system, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save(system, "tiny.safetensors")
    model = ["--model", "tiny.safetensors", "--no-progress"]
    assert cli.main(["sample", *model, "--prompt", "red cat", "--n", "2", "--out", "cats.png"]) == 0
    told = json.loads(Image.open("cats.png").text[images.KEY])
    assert told["prompt"] == "red cat" and told["guidance"] == 2.5 and told["steps"] == 3
    assert cli.main(["interpolate", *model, "red heart", "5", "--n", "3", "--steps", "2", "--out", "between.png"]) == 0
    assert cli.main(["sample", "--prompt", "cat", "--n", "1"]) == 2
    assert "prompt: expected none, for fashion-mnist reads no text, got 'cat'" in capsys.readouterr().err
    assert cli.main(["evaluate", "--model", "tiny.safetensors"]) == 2
    assert "model: expected one network, got the system tiny.safetensors" in capsys.readouterr().err


# --- the recipe ---


@pytest.fixture(scope="module")
def few_pictures():
    few = pictures.Pictures("test")
    few.x, few.things = few.x[:32], few.things[:32]
    return few


def test_the_recipe_trains_all_parts_and_resumes_clip_to_the_bit(tmp_path, monkeypatch, few_pictures):
    for name, value in dict(
        BATCH=8,
        retrieval=lambda clip, pictures: (0.0, 0.0),
        rate=lambda step, steps: 1e-3,  # of the step alone, so that a run can end early
    ).items():
        monkeypatch.setattr(contrastive, name, value)
    for module in (contrastive, recipe):
        monkeypatch.setattr(module, "Pictures", lambda split="train": few_pictures)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out, stops in ((whole, (3,)), (parts, (2, 3))):
        out.mkdir()
        for steps in stops:
            contrastive.train_clip(out, steps)
    (_, a), (_, b) = (read(out / contrastive.CLIP_FILE) for out in (whole, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    monkeypatch.setitem(WIDTHS, 64, dict(channels=8, channel_mult=(1, 1), blocks=1, attention_levels=()))
    monkeypatch.setattr(recipe.emoji.Emoji, "fetch", partial(Faces, 8))  # drawn at 64 x 64
    for part in ("prior", "decoder", "upsampler"):
        dataset, make, settings = recipe.PARTS[part]
        monkeypatch.setitem(recipe.PARTS, part, (dataset, make, settings | {"batch_size": 4}))
        recipe.train_part(part, parts, 1)
    packed = recipe.pack(parts)
    assert isinstance(load(parts / "emoji.safetensors"), UnCLIP)
    (tmp_path / "again").mkdir()
    recipe.train_part("decoder", tmp_path / "again", 1, str(parts / "emoji.safetensors"))  # CLIP comes with the rest
    assert (tmp_path / "again" / contrastive.CLIP_FILE).exists()
    assert packed.decoder.shape == (3, 32, 32) and packed.prior.shape == (128,) and packed.drawn.shape == (3, 64, 64)


def test_the_decoder_learns_without_each_condition(few_pictures):
    data = recipe.ForDecoder(CLIP(Emoji.vocabulary()).eval(), few_pictures)
    torch.manual_seed(0)
    items = [data[i] for i in range(len(data))] * 4
    left_out = {name: sum(not item[name].any() for item in items) / len(items) for name in recipe.LEFT_OUT}
    for name, chance in recipe.LEFT_OUT.items():
        assert abs(left_out[name] - chance) < 4 * math.sqrt(chance / len(data))
    assert items[0]["x"].dtype == torch.uint8 and items[0]["x"].shape == (3, 32, 32)
    mean_square = data.image.square().mean().item()
    assert abs(mean_square - 1) < 1e-5
