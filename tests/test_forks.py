"""docs/fork.md: each fork, taken from the page, is applied to a copy of the scripts, does what
the page says, and runs two steps."""

import importlib
import re
import shutil
import subprocess
import sys

import pytest
import torch

import conftest
import evaluate
from conftest import ROOT, records

SCRIPTS = [path.stem for path in ROOT.glob("*.py")]
PAGE = (ROOT / "docs/fork.md").read_text()
DIFFS = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def fork(scenes, tiny_model, tmp_path, monkeypatch):
    """Applies a diff; returns what runs a forked script for two steps, in this process."""
    before = {name: sys.modules.pop(name) for name in SCRIPTS if name in sys.modules}

    def apply(diff):
        for name in SCRIPTS:
            shutil.copy(ROOT / f"{name}.py", tmp_path)
        subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)  # else git may skip it
        subprocess.run(["git", "apply", "-"], cwd=tmp_path, check=True, text=True, input=diff)
        monkeypatch.syspath_prepend(tmp_path)

        def run(script, *flags):
            return conftest.run(script, tmp_path, tmp_path, *(
                f"--data {scenes} --model {tiny_model} --max-pixels 3136 --workers 1 --steps 2 "
                "--out out").split(), *flags)
        return run

    yield apply
    for name in SCRIPTS:
        sys.modules.pop(name, None)
    sys.modules.update(before)


def test_the_forks_are_short():
    assert len(DIFFS) == 3 and max(len(diff.splitlines()) for diff in DIFFS) <= 25


def test_infonce(fork, tmp_path):
    """By hand: a row without overlap has no part in it; the floor is 0, so excess is the loss."""
    run = fork(DIFFS[0])
    pasta = importlib.import_module("pasta")
    e = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    S = torch.tensor([[0.2, 0.7, 0.1], [0, 0, 0], [0, 0, 0.01]])
    loss, floor = pasta.directional_loss(S, e, e.detach().roll(1, 0), 0.1, 0.07)
    log_q = pasta.log_prediction(e, e.roll(1, 0), 0.07)
    torch.testing.assert_close(loss, -(log_q[0, 1] + log_q[2, 2]) / 2)
    loss.backward()
    assert floor == 0 and e.grad.any(-1).tolist() == [True, False, True]
    assert pasta.directional_loss(0 * S, e, e, 0.1, 0.07)[0] == 0
    done = run("pasta.py", "--heldout", 3)
    assert done.returncode == 0, done.stdout
    start, *steps = records(tmp_path / "out")
    assert len(steps) == 2 and all(line["excess"] == line["loss"] > 0 for line in steps)
    assert start["heldout_excess"] == start["heldout_loss"] > 0


GRPO = "--batch 1 --group 3 --max-new-tokens 4".split()


def test_a_price_on_length(fork, tmp_path):
    """Its name is in log, console and curves, its weight in the total; ties below it stay ties."""
    run = fork(DIFFS[1])
    rewards = importlib.import_module("rewards")
    gold = rewards.Gold({(0, 1): []}, "2.0", "depth_prediction_oc_mv", "fill", 2)
    for more, wanted in ((0, 1), (300, 1), (800, None), (5000, 0)):
        score = rewards.total_reward(rewards.write_response(gold.actions, "2.0") + " " * more, gold)
        assert score["format"] == 1 and (0 < score["length"] < 1 if wanted is None
                                         else score["length"] == wanted)
        assert score["total"] == pytest.approx(3 + 0.2 * score["length"])
    assert rewards.total_reward("", gold) == dict.fromkeys(["total", *rewards.WEIGHTS], 0)
    done = run("actor_grpo.py", *GRPO, "--weights", 1, 1, 1, 0.1)
    assert done.returncode == 0 and "reward_length 0" in done.stdout, done.stdout
    lines = records(tmp_path / "out")
    assert len(lines) == 2 and all(line["reward_length_spread"] == 0 for line in lines)
    assert "reward_length" in importlib.import_module("evaluate").draw_curves(
        [tmp_path / "out/log.jsonl"])
    assert run("actor_grpo.py", *GRPO, "--weights", 1, 1, 1).returncode == 2


def test_another_metric(fork, tmp_path):
    """For the tasks that begin so, and for R_ans alone: the benchmarks are scored as before."""
    run = fork(DIFFS[2])
    answer, ours = importlib.import_module("rewards").answer_reward, evaluate.score_spar
    theirs = importlib.import_module("evaluate").score_spar
    assert answer("1.0", "2.0", "depth_prediction_oc_mv", "fill") == 0.5
    assert answer("1.0", "2.0", "depth_prediction_oo_mv", "fill") == pytest.approx(0.1)
    assert all(answer(text, "2", "depth_prediction_oc_mv", "fill") == 0
               for text in ("0", "-2", "2 2", "1e999", "two"))
    assert [score("depth_prediction_oc_mv", "1.0", "2.0") for score in (ours, theirs)] == [
        ours("depth_prediction_oc_mv", "1.0", "2.0")] * 2
    done = run("actor_grpo.py", *GRPO)
    assert done.returncode == 0 and len(records(tmp_path / "out")) == 2, done.stdout


def test_what_the_page_computes(capsys):
    """Its Python block prints what stands beside it."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(block, {})
    printed = [[float(number) for number in re.findall(r"-?\d\.\d{4}", line)]
               for line in re.sub(r",\n +", ", ", capsys.readouterr().out).splitlines()]
    said = re.findall(r"# (\S+) and (\S+)", block)
    assert len(printed) == len(said) == 2
    for numbers, both in zip(printed, said):
        assert {f"{number:.2f}" for number in numbers} == set(both)
