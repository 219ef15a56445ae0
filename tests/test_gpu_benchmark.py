"""Tests of ``python -m benchmarks.gpu`` without a card: its cases, its answers, its options."""

import sys

import pytest
import torch

from benchmarks import gpu, gpu_cases


def test_every_case_agrees_with_its_peers(capsys):
    gpu.main(["--device", "cpu", "--check", "--no-compile"])
    lines = capsys.readouterr().out.splitlines()
    ops = ("noise", "q_sample", "reverse_step", "noise_loss", "group_norm_silu", "attention", "U-Net", "sampling")
    for op in ops:
        assert any(line.startswith(op) and "agrees with" in line for line in lines), op


def test_the_network_and_sampling_come_before_what_the_time_limit_may_cut():
    titles = [case.title for case in gpu_cases.Cases(torch.device("cpu"), small=True, compiled=False)]
    order = ("U-Net", "sampling", "attention", "group_norm_silu", "noise")
    first = [next(i for i, title in enumerate(titles) if title.startswith(op)) for op in order]
    assert first == sorted(first) and first[0] == 0


def test_it_runs_without_diffusers(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for op in ("U-Net", "sampling", "q_sample float32", "reverse_step float32"):
        gpu.main(["--device", "cpu", "--check", "--no-compile", "--only", op])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and not any("diffusers" in line for line in lines)


def test_a_wrong_result_is_not_timed():
    wrong = gpu_cases.Case("wrong", lambda: torch.ones(3), {"peer": lambda: torch.zeros(3)}, gpu_cases.close(0.5))
    with pytest.raises(AssertionError, match="expected an error of at most"):
        gpu_cases.check(wrong)


def test_without_a_card_it_says_so_and_fails(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="there is no CUDA device"):
        gpu.main([])


def test_times_are_of_a_card_only(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu"])
    assert "--device cpu: expected --check with it" in capsys.readouterr().err
