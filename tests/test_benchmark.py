"""What a GPU's benchmark does where there is none: says what it needs, or runs a small model."""

import re

import benchmark
import pytest
import torch
from conftest import quicken

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="it would be measured on the GPU")


def test_without_a_gpu_it_says_what_it_needs():
    with pytest.raises(SystemExit, match="no CUDA GPU here. It needs .* --model"):
        benchmark.gpu()


def test_whole_steps_of_each_stage(tiny_model, monkeypatch, capsys):
    """On a CPU, by the code that a GPU runs: 3 steps, with short texts."""
    quicken(monkeypatch.setattr)
    for number, (module, flags, *rest) in enumerate(benchmark.STAGES):
        if module is benchmark.actor_grpo:
            short = module, [*flags, "--max-new-tokens", "4"], *rest
            stages = (*benchmark.STAGES[:number], short)
            monkeypatch.setattr(benchmark, "STAGES", stages)
    benchmark.gpu(str(tiny_model), size=112, steps=3)
    lines = capsys.readouterr().out.splitlines()
    for line, (_, _, in_all, *_) in zip(lines, benchmark.STAGES, strict=True):
        found = re.search(r"([\d.]+) s a step, ([\d,]+) steps ([\d.]+) h", line)
        assert found and found[2] == f"{in_all:,}", line
        assert abs(float(found[1]) * in_all / 3600 - float(found[3])) < 0.1
    assert "completions of 4 tokens" in lines[-1]
