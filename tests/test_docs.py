"""README and docs: Python blocks run, commands have the options that they are shown with, links lead somewhere."""

import re
import shlex
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest
import test_cascade
import test_unclip
import tiny
import torch
from conftest import ROOT
from tiny import one_thread  # noqa: F401

import diffkern
from diffkern import cli, images, model
from diffkern.networks import UNet
from diffkern.samplers import SAMPLERS
from diffkern.training import CHECKPOINT, Trainer

PAGES = {str(page.relative_to(ROOT)): page for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]}
SLOW = {"docs/other_tools.md": "accelerate lightning peft onnx onnxscript onnxruntime"}
"""Pages whose blocks take long, with the packages that they are about."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in FENCE.findall(page.read_text()) if found == language]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A working directory, in which the models that ship have few weights."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    shipped = diffkern.load("fashion-mnist")
    network = UNet(**tiny.NETWORK | {"num_classes": 10})
    torch.nn.init.normal_(network.conv_out.weight, std=0.01, generator=torch.Generator().manual_seed(0))
    small = model.Model(network, shipped.schedule, "eps", shipped.shape, shipped.classes, name=shipped.name)
    diffkern.save(small, "models/fashion-mnist.safetensors")
    diffkern.save(small, "model.safetensors")
    diffkern.save(test_unclip.tiny((3, 32, 32)), "emoji.safetensors")
    upsamplers = [test_cascade.upsampler(size) for size in (32, 64)]
    diffkern.save(diffkern.Cascade(test_cascade.base(16), upsamplers), "faces.safetensors")
    diffkern.save(test_cascade.upsampler(32, noised=False), "palette.safetensors")
    monkeypatch.setattr(model, "MODELS", tmp_path / "models")
    for number, name in enumerate(("disc", "square")):
        (tmp_path / "my-photos" / name).mkdir(parents=True)
        images.save_png(images.picture(torch.full((3, 40, 36), float(number))), f"my-photos/{name}/{number}.png")


def from_pretrained(name: str):
    """A pipeline of small random weights, for one that would be fetched."""
    import diffusers

    network = diffusers.UNet2DModel(
        32, 3, 3, block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return diffusers.DDPMPipeline(network, diffusers.DDPMScheduler(clip_sample=True))


def one_step(trainer: Trainer, folder: str, **options) -> None:
    """In place of a run."""
    trainer.step()
    Path(folder).mkdir()
    trainer.save(Path(folder, CHECKPOINT))


@pytest.mark.filterwarnings("ignore::UserWarning")  # what a page says that a call warns of
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name, page in PAGES.items()
        if blocks(page, "python")
    ],
)
def test_every_block_of_python_runs(small, monkeypatch, capsys, name):
    import diffusers

    for package in SLOW.get(name, "").split():
        pytest.importorskip(package)

    monkeypatch.setattr(diffusers.DDPMPipeline, "from_pretrained", staticmethod(from_pretrained))
    monkeypatch.setattr(Trainer, "run", one_step)
    dataset = replace(tiny.dataset(classes=10, size=32), classes=diffkern.load("model.safetensors").classes)
    space = {"__name__": name, "dataset": dataset}
    with mock.patch.dict(SAMPLERS):  # a sampler that a page makes is known to this page alone
        for number, code in enumerate(blocks(PAGES[name], "python"), 1):
            exec(compile(code, f"{name}, block {number}", "exec"), space)


def commands(page: Path) -> set[str]:
    """The commands in the page's blocks and in its text, but for mere names and what is left out by three dots."""
    text = page.read_text()
    lines = [line for _, code in FENCE.findall(text) for line in code.splitlines()]
    lines += [" ".join(code.split()) for code in re.findall("`([^`]+)`", FENCE.sub("", text))]
    named = re.compile(rf"(?:diffkern|.*-m diffkern) ((?:{'|'.join(cli.COMMANDS)}) .*)")
    return {found[1] for found in map(named.match, lines) if found and "..." not in found[1]}


COMMANDS = sorted((name, line) for name, page in PAGES.items() for line in commands(page))


@pytest.mark.parametrize(("name", "line"), COMMANDS, ids=[line for _, line in COMMANDS])
def test_every_command_has_its_options(name, line):
    try:
        assert cli._parse(shlex.split(line, comments=True)).run
    except ValueError as error:  # a sentence may leave out what is clear
        if not re.search("arguments are required|expected one argument", str(error)):
            raise


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[name].read_text()):
        if link.startswith("http"):
            continue
        path, _, heading = link.partition("#")
        target = (PAGES[name].parent / path).resolve() if path else PAGES[name]
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], link


def test_every_command_s_examples_have_its_options():
    for command in cli.COMMANDS:
        module = import_module(f"diffkern.cli.{command}")
        for line in filter(None, map(str.strip, (module.EXAMPLES or "").splitlines())):
            _, arguments = re.split(r"(?:^| -m )diffkern ", line)
            assert cli._parse(shlex.split(arguments, comments=True)).run


def test_pages_name_files_and_tests_that_there_are():
    """A page says which test holds a system: as ``tests/test_run.py`` or ``tests/test_run.py::test_...``."""
    for name, page in PAGES.items():
        for path, test in re.findall(r"(tests/\w+\.py)(?:::(\w+))?", page.read_text()):
            assert (ROOT / path).exists(), f"{name}: {path}"
            assert f"def {test}" in (ROOT / path).read_text(), f"{name}: {path}::{test}"


def test_every_word_of_the_glossary_is_used_elsewhere():
    text = PAGES["docs/glossary.md"].read_text()
    words = re.findall(r"\*\*([^*]+)\*\*", text.replace("(m, grid, **options)", ""))
    others = [page for name, page in PAGES.items() if name != "docs/glossary.md"] + sorted(
        ROOT.glob("diffkern/**/*.py")
    )
    used = "\n".join(path.read_text() for path in others)
    unused = [word for word in words if not re.search(rf"(?<!\w){re.escape(word)}s?(?!\w)", used, re.IGNORECASE)]
    assert len(words) == len(set(words)) and not unused


@pytest.mark.slow
def test_the_site_is_made_without_a_warning(tmp_path):
    pytest.importorskip("furo"), pytest.importorskip("myst_parser")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", ".", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "docs" / "reference.html").read_text()
    assert all(f'id="diffkern.{name}"' in page for name in diffkern.__all__ if name != "__version__")
