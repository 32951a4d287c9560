"""actor_grpo.py: one sequence a group against separate rows, the sampler, the loss; runs; bad
input."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

import actor_grpo
import conftest
import geometry
import rewards
from conftest import records
from test_sft import Resized

run = partial(conftest.run, "actor_grpo.py")
CPU = torch.device("cpu")
G, T = 4, 9


@pytest.fixture(scope="module")
def flags(rooms, tiny_model):
    """A random model never ends by itself: short completions."""
    return ["--data", rooms, "--model", tiny_model, "--lr", 1e-3, "--group", 3, "--batch", 2,
            "--max-new-tokens", 12, "--save-every", 2, "--rollouts-every", 1]


def shake(model):
    """A fresh tiny model says one word only: larger weights let it say, and see, more."""
    torch.manual_seed(0)
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


@pytest.fixture(scope="module")
def made(tiny_model, rooms):
    """(model, plain model, tokenizer, prompts): float64; two and three images, different sizes."""
    args = actor_grpo.parse_args([])
    model, tokenizer = actor_grpo.load_model(tiny_model, args, CPU)
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32)
    prompts = actor_grpo.Prompts(args, tokenizer, model.config.image_token_id)
    samples = geometry.load_samples(rooms, tasks=geometry.MULTI_VIEW_TASKS)
    pick = [next(s for s in samples if s.task == task) for task in (
        "view_change_infer", "depth_prediction_oc_mv", "position_matching")]
    pick[0] = Resized(pick[0], [(224, 224), (308, 168)])
    pick[2] = Resized(pick[2], [(84, 140), (112, 84)])
    return shake(model).double(), shake(plain).double(), tokenizer, [
        prompts.make(sample) for sample in pick]


def completions(seed=0, vocabulary=500):
    """Random tokens (G, T) of different length and their mask."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(10, vocabulary, (G, T), generator=g)
    return tokens, torch.arange(T) < torch.tensor([[T], [3], [1], [6]])


def separate_rows(plain, prompt, tokens, mask, padding=5):
    """The oracle: G rows of prompt and completion, padded on the left, by the plain model call."""
    out = torch.zeros(tokens.shape, dtype=torch.float64)
    for g in range(len(tokens)):
        left = padding * g  # rows of different padding
        ids = torch.cat([torch.zeros(left, dtype=torch.long), prompt.ids, tokens[g]])[None]
        seen = torch.ones_like(ids)
        seen[:, :left] = 0
        logits = plain(
            input_ids=ids, attention_mask=seen, pixel_values=prompt.patches.double(),
            image_grid_thw=prompt.grids,
            mm_token_type_ids=(ids == plain.config.image_token_id).int()).logits[0]
        log_p = F.log_softmax(logits.double(), -1)[left + len(prompt.ids) - 1:-1]
        out[g] = log_p.gather(-1, tokens[g, :, None])[:, 0] * mask[g]
    return out


# --- a group is one sequence


def compare(made, prompt, temperature=1.0):
    """Largest difference of log p, and relative difference of gradients, from the oracle."""
    model, plain, _, _ = made
    tokens, mask = completions()
    weight = torch.randn(G, T, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model.zero_grad(), plain.zero_grad()
    ours = actor_grpo.group_log_probs(model, prompt, tokens, mask, temperature)
    theirs = separate_rows(plain, prompt, tokens, mask)
    (ours.double() * weight).sum().backward()
    (theirs * weight).sum().backward()
    pairs = [(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters())]
    gradient = (math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs))
                / math.sqrt(sum(float(b.square().sum()) for _, b in pairs)))
    return float((ours - theirs).detach().abs().max()), gradient


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_group_equals_separate_rows(made, which):
    value, gradient = compare(made, made[3][which])
    assert value < 1e-5 and gradient < 1e-6, (value, gradient)


def test_completions_that_see_each_other_are_noticed(made, monkeypatch):
    """Negative control: one causal row, as a naive packing would have it."""
    monkeypatch.setattr(actor_grpo, "prompt_and_completions", lambda layer, q, k, v, L, G, mask:
                        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    value, gradient = compare(made, made[3][0])
    assert value > 1e-2 and gradient > 1e-2, (value, gradient)


def test_positions_that_continue_are_noticed(made, monkeypatch):
    """Negative control: the second completion begins where the first ends."""
    monkeypatch.setattr(actor_grpo, "row_positions", lambda prompt, G, T: torch.cat([
        prompt.positions,
        (prompt.positions.max() + 1 + torch.arange(G * T)).expand(3, -1)], dim=1))
    value, gradient = compare(made, made[3][0])
    assert value > 1e-2 and gradient > 1e-2, (value, gradient)


def test_temperature_scales_the_logits(made):
    """At temperature 1/2 the log-odds of two words that may come first are twice as large."""
    model, _, _, prompts = made
    tokens = torch.tensor([[50], [51]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        warm, cold = (actor_grpo.group_log_probs(model, prompts[0], tokens, mask, t)[:, 0]
                      for t in (1.0, 0.5))
    assert abs(float((cold[0] - cold[1]) - 2 * (warm[0] - warm[1]))) < 1e-4
    assert abs(float(warm[0] - warm[1])) > 1e-3


def test_image_tokens_known_already(made):
    """With a frozen encoder the images are encoded once; the numbers are the same."""
    model, _, _, prompts = made
    tokens, mask = completions()
    with torch.no_grad():
        images = actor_grpo.encode_images(model, prompts[0].patches, prompts[0].grids, CPU)
        a = actor_grpo.group_log_probs(model, prompts[0], tokens, mask, 1.0)
        b = actor_grpo.group_log_probs(model, prompts[0], tokens, mask, 1.0, images)
    assert torch.equal(a, b)


# --- rollouts


def naive_rollout(plain, prompt, noise, budget, banned, end):
    """One completion at a time, the whole sequence again for every token."""
    rows = []
    for u in noise:
        ids, row = prompt.ids, []
        for t in range(budget):
            whole = torch.cat([ids, torch.tensor(row, dtype=torch.long)])[None]
            with torch.no_grad():
                logits = plain(
                    input_ids=whole, attention_mask=torch.ones_like(whole),
                    pixel_values=prompt.patches.double(), image_grid_thw=prompt.grids,
                    mm_token_type_ids=(whole == plain.config.image_token_id).int()).logits[0, -1:]
            row.append(int(actor_grpo.sample_tokens(logits, u[t:t + 1], 1.0, banned)[0]))
            if row[-1] in end:
                break
        rows.append(row)
    return rows


def test_rollouts_equal_naive_sampling(made):
    """Prompts of different length and image sizes in one loop; some words end a completion."""
    model, plain, tokenizer, prompts = made
    banned = tokenizer.convert_tokens_to_ids(actor_grpo.BANNED)
    end = list(range(0, 500, 12))  # so that some end early
    noise = torch.stack([actor_grpo.uniforms(0, 1, b, G, 14) for b in range(3)])
    budgets = [14, 9, 12]
    with torch.no_grad():
        tokens, mask, log_p = actor_grpo.rollout(
            model, prompts, noise, budgets, 1.0, banned, end, [None] * 3)
    lengths = set()
    for b, prompt in enumerate(prompts):
        wanted = naive_rollout(plain, prompt, noise[b], budgets[b], banned, end)
        for g in range(G):
            got = tokens[b, g][mask[b, g]].tolist()
            assert got == wanted[g], (b, g)
            assert mask[b, g].tolist() == [t < len(got) for t in range(mask.shape[2])]
            assert not set(got[:-1]) & set(end)  # the end token is inside the mask, none before
            lengths.add(len(got))
        with torch.no_grad():  # what sampling says of a token is what the policy's pass says
            again = actor_grpo.group_log_probs(model, prompt, tokens[b], mask[b], 1.0)
        assert float((again - log_p[b])[mask[b]].abs().max()) < 1e-5
    assert len(lengths) > 2 and max(lengths) == 14


def test_loop_ends_when_all_have_ended(made):
    model, _, _, prompts = made
    everything = list(range(model.config.text_config.vocab_size))
    noise = torch.rand(1, G, 50, dtype=torch.float64)
    with torch.no_grad():
        tokens, mask, _ = actor_grpo.rollout(
            model, prompts[:1], noise, [50], 1.0, [], everything, [None])
    assert tokens.shape == (1, G, 1) and mask.all()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampler_against_the_softmax(temperature):
    """Chi-square over 50,000 draws; banned words never come."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(12, generator=g) * 2
    banned = [3, 11]
    N = 50_000
    drawn, log_p = actor_grpo.sample_tokens(logits.expand(N, -1).clone(),
                                            torch.rand(N, generator=g, dtype=torch.float64),
                                            temperature, banned)
    torch.testing.assert_close(log_p, (logits / temperature).log_softmax(-1)[drawn])
    weights = [0.0 if k in banned else math.exp(float(x) / temperature)
               for k, x in enumerate(logits)]
    expected = np.array(weights) / sum(weights) * N
    counts = np.bincount(drawn.numpy(), minlength=12)
    assert counts[banned].sum() == 0
    keep = expected > 0
    chi2 = float(((counts - expected)[keep] ** 2 / expected[keep]).sum())
    assert chi2 < 29.6  # 9 degrees of freedom, p = 0.0005
    off = np.array([math.exp(float(x)) for x in logits])  # the control: another temperature
    off = off / off.sum() * N if temperature != 1 else np.full(12, N / 12)
    assert float(((counts - off) ** 2 / off).sum()) > 1000


def test_edges_of_the_sampler():
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]])
    for u, token in ((0.0, 1), (0.4999, 1), (0.5, 2), (1 - 1e-16, 2)):
        assert int(actor_grpo.sample_tokens(
            logits.clone(), torch.tensor([u], dtype=torch.float64), 1.0, [])[0]) == token


def test_noise_is_a_function_of_seed_step_prompt_and_completion():
    a = actor_grpo.uniforms(0, 3, 1, 4, 10)
    assert torch.equal(a, actor_grpo.uniforms(0, 3, 1, 4, 10))
    assert torch.equal(a[:2, :5], actor_grpo.uniforms(0, 3, 1, 2, 5))
    others = [actor_grpo.uniforms(*key, 4, 10) for key in ((1, 3, 1), (0, 4, 1), (0, 3, 2))]
    assert not any(torch.equal(a[0], b[0]) for b in (*others, a[1:]))


# --- the loss


def test_advantages_by_hand():
    A = actor_grpo.group_advantages(torch.tensor([1.0, 2.0, 3.0, 2.0]))
    std = math.sqrt(2 / 3)
    assert torch.allclose(A, torch.tensor([-1.0, 0.0, 1.0, 0.0]) / (std + 1e-4))
    for value in (0.1, 1 / 3, 2.7):
        assert not actor_grpo.group_advantages(torch.full((8,), value)).any()


def naive_loss(log_p, old, ref, A, mask, clip_ratio, beta):
    total = 0.0
    for g in range(len(A)):
        tokens = [t for t in range(mask.shape[1]) if mask[g, t]]
        one = 0.0
        for t in tokens:
            ratio = math.exp(min(20, max(-20, float(log_p[g, t] - old[g, t]))))
            clipped = min(max(ratio, 1 - clip_ratio), 1 + clip_ratio)
            r = float(ref[g, t] - log_p[g, t])
            kl = math.exp(r) - r - 1
            one += min(ratio * float(A[g]), clipped * float(A[g])) - beta * kl
        total -= one / len(tokens)
    return total / len(A)


def test_loss_against_naive_loop():
    g = torch.Generator().manual_seed(0)
    log_p, old, ref = (-3 * torch.rand(G, T, generator=g, dtype=torch.float64) for _ in range(3))
    old = log_p + 0.3 * torch.randn(G, T, generator=g, dtype=torch.float64)
    A = torch.tensor([1.2, -0.7, 0.0, -0.5], dtype=torch.float64)
    _, mask = completions()
    loss, seen = actor_grpo.grpo_loss(log_p, old, ref, A, mask, 0.2, 0.05)
    assert abs(float(loss) - naive_loss(log_p, old, ref, A, mask, 0.2, 0.05)) < 1e-12
    ratio = (log_p - old).exp()[mask]
    clipped = ((ratio < 0.8) | (ratio > 1.2)).double().mean()
    assert abs(float(seen["clip_share"]) - float(clipped)) < 1e-6
    assert abs(float(seen["ratio_max"]) - float(ratio.max())) < 1e-12
    assert 0 < float(seen["kl"]) < float(seen["kl_max"])


def test_gradient_at_ratio_one_is_the_policy_gradient():
    """d loss / d log p = -A / length / G: REINFORCE with the group's advantage."""
    log_p = -torch.rand(G, T, dtype=torch.float64)
    log_p.requires_grad_()
    A = torch.tensor([1.2, -0.7, 0.0, -0.5], dtype=torch.float64)
    _, mask = completions()
    loss, seen = actor_grpo.grpo_loss(log_p, log_p.detach(), None, A, mask, 0.2, 0.0)
    loss.backward()
    wanted = -A[:, None] / mask.sum(-1, keepdim=True) / G * mask
    assert torch.allclose(log_p.grad, wanted, atol=1e-15)
    assert float(seen["kl"]) == 0 and float(seen["clip_share"]) == 0


def test_clipping_stops_the_gradient():
    """A ratio beyond the clip in the direction that A wants gets none; in the other, it does."""
    old = torch.zeros(4, 1, dtype=torch.float64)
    log_p = torch.tensor([[0.5], [-0.5], [0.5], [-0.5]], dtype=torch.float64, requires_grad=True)
    A = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    mask = torch.ones(4, 1, dtype=torch.bool)
    loss, _ = actor_grpo.grpo_loss(log_p, old, None, A, mask, 0.2, 0.0)
    loss.backward()
    assert [bool(x) for x in log_p.grad[:, 0]] == [False, True, True, False]


def test_far_log_ratios_stay_finite():
    log_p = torch.tensor([[-1e4, -1.0]], requires_grad=True)
    loss, seen = actor_grpo.grpo_loss(log_p, torch.tensor([[-1.0, -1e4]]),
                                      torch.tensor([[-1.0, -1e4]]), torch.ones(1),
                                      torch.ones(1, 2, dtype=torch.bool), 0.2, 0.01)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(log_p.grad).all()
    assert all(math.isfinite(float(value)) for value in seen.values())


def test_equal_rewards_give_no_policy_gradient(made):
    model, _, _, prompts = made
    tokens, mask = completions()
    model.zero_grad()
    log_p = actor_grpo.group_log_probs(model, prompts[2], tokens, mask, 1.0)
    A = actor_grpo.group_advantages(torch.full((G,), 1.1))
    actor_grpo.grpo_loss(log_p, log_p.detach(), None, A, mask, 0.2, 0.0)[0].backward()
    assert all(float(p.grad.abs().max()) == 0 for p in model.parameters())


# --- what it says


def test_warnings():
    fine = {"reward_format": 0.5, "truncated": 0.1, "distinct": 8.0, "dead_groups": 0.2,
            "kl_median": 0.01}
    assert actor_grpo.warnings_of(fine, 8) == []
    for change, words in (({"reward_format": 0.0, "truncated": 0.9}, "raise --max-new-tokens"),
                          ({"reward_format": 0.0}, "is --model a cold start"),
                          ({"distinct": 1.0}, "the same text"),
                          ({"dead_groups": 1.0}, "no policy gradient"),
                          ({"kl_median": 2.5}, "2.5 nats")):
        (said,) = actor_grpo.warnings_of({**fine, **change}, 8)
        assert words in said


# --- runs

# A random model's completions all score 0, which would leave every weight where it is. So in these
# runs a completion is worth what its text's checksum says.
PAY = """import zlib
import rewards
def pay(text, *_, **__):
    total = zlib.crc32(text.encode()) % 1000 / 500
    return {"total": total, "action": total, "answer": 0.0, "format": 0.0}
rewards.total_reward = pay
"""


@pytest.fixture(scope="module", autouse=True)
def rewards_that_differ():
    whole = rewards.total_reward
    exec(PAY, {})
    yield
    rewards.total_reward = whole


def paid(root, folder):
    """The environment of a process of its own that pays the same."""
    (folder / "sitecustomize.py").write_text(PAY)
    return {**os.environ, "PYTHONPATH": f"{folder}:{root}", "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": ""}


def all_moved(out):
    """The records of a run in which every step changed the weights."""
    lines = records(out)
    assert all(line["update_norm"] > 0 and line["dead_groups"] < 1 for line in lines)
    return lines


@pytest.fixture(scope="module")
def four_steps(root, tmp_path_factory, flags):
    cwd = tmp_path_factory.mktemp("grpo")
    done = run(root, cwd, *flags, "--steps", 4, "--out", "four")
    assert done.returncode == 0, done.stdout
    return cwd / "four", done.stdout


def test_log_rollouts_and_model(four_steps, tiny_model):
    out, text = four_steps
    lines = all_moved(out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"step", "reward", "reward_spread", "reward_action", "reward_answer", "reward_format",
            "kl", "kl_median", "kl_max", "ratio_max", "gap", "clip_share", "grad_norm",
            "update_norm", "length", "truncated", "distinct", "dead_groups", "seconds"} <= set(
                lines[0])
    # the first policy is the reference: exact, though computed apart; and the one that sampled
    assert lines[0]["kl"] == 0 < lines[-1]["kl"]
    assert all(0 < line["gap"] < 1e-4 for line in lines)
    assert lines[0]["warnings"] and "no completion has the form" in text
    groups = records_of_rollouts(out)
    assert len(groups) == 8 and all(len(group["responses"]) == 3 for group in groups)
    assert {"text", "total", "action", "answer", "format", "advantage"} == set(
        groups[0]["responses"][0])
    _, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def records_of_rollouts(out):
    return [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()[1:]]


@pytest.mark.parametrize("worth, moves", [(None, True), (1.0, False)])
def test_weights_change_where_rewards_differ(root, flags, tmp_path, monkeypatch, worth, moves):
    """The KL term pulls nowhere at the start; so what moves the weights is the policy gradient."""
    if worth is not None:
        monkeypatch.setattr(rewards, "total_reward", lambda *_, **__: dict.fromkeys(
            ("total", "action", "answer", "format"), worth))
    done = run(root, tmp_path, *flags, "--steps", 1, "--out", "out", "--beta", 0)
    assert done.returncode == 0, done.stdout
    (record,) = records(tmp_path / "out")
    assert (record["grad_norm"] > 0) == (record["update_norm"] > 0) == moves
    assert record["dead_groups"] == 1 - moves and record["kl"] == 0


def test_resume_is_exact(root, four_steps, flags, tmp_path):
    """2 + 2 steps equal 4, to the last bit, log and rollouts included."""
    whole, _ = four_steps
    assert run(root, tmp_path, *flags, "--steps", 2, "--out", "half").returncode == 0
    done = run(root, tmp_path, *flags, "--steps", 4, "--out", "half", "--resume")
    assert done.returncode == 0, done.stdout
    for name in ("checkpoint.safetensors", "model.safetensors"):
        a, b = load_file(whole / name), load_file(tmp_path / "half" / name)
        assert set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)
    for a, b in zip(records(whole), records(tmp_path / "half"), strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {
            k: v for k, v in b.items() if k != "seconds"}
    assert records_of_rollouts(whole) == records_of_rollouts(tmp_path / "half")


def test_two_processes_equal_one(root, flags, tmp_path):
    for out, processes in (("one", 1), ("two", 2)):
        done = run(root, tmp_path, *flags, "--steps", 2, "--out", out, processes=processes,
                   env=paid(root, tmp_path))
        assert done.returncode == 0, done.stdout
        all_moved(tmp_path / out)
    a, b = (sorted(records_of_rollouts(tmp_path / out), key=lambda g: (g["step"], g["id"]))
            for out in ("one", "two"))
    assert a == b
    for a, b in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        for key in ("reward", "kl", "grad_norm", "length"):
            assert abs(a[key] - b[key]) < 1e-3 * max(1, abs(a[key]))


@pytest.mark.parametrize("more", [
    ["--updates", 2, "--lr", 1e-2], ["--reasoning", "language"], ["--freeze", "vision"],
    ["--precision", "fp16"], ["--temperature", 0.7]])
def test_other_ways(root, flags, tmp_path, tiny_model, more):
    done = run(root, tmp_path, *flags, "--steps", 2, "--out", "out", *more)
    assert done.returncode == 0, done.stdout
    lines = all_moved(tmp_path / "out")
    assert len(lines) == 2 and all(math.isfinite(line["kl"]) for line in lines)
    assert (lines[0]["ratio_max"] > 1) == (more[0] == "--updates")
    before, after = (load_file(folder / "model.safetensors")
                     for folder in (tiny_model, tmp_path / "out"))
    moved = {".".join(key.split(".")[:1]) for key in before
             if not torch.equal(before[key], after[key])}
    assert moved == ({"model"} if more[0] == "--freeze" else {"model", "visual"})


def test_offloading_changes_no_bit(root, flags, tmp_path):
    for out, more in (("kept", []), ("off", ["--offload"])):
        done = run(root, tmp_path, *flags, "--max-new-tokens", 2, "--steps", 2, "--out", out,
                   "--precision", "bf16", *more)
        assert done.returncode == 0, done.stdout
        all_moved(tmp_path / out)
    a, b = (load_file(tmp_path / out / "model.safetensors") for out in ("kept", "off"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_signal_saves_and_resume_goes_on(root, flags, tmp_path):
    flags = [*flags, "--save-every", 5000, "--out", "out"]
    process = subprocess.Popen(
        [sys.executable, str(root / "actor_grpo.py"), *map(str, flags), "--steps", "5000"],
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log, deadline = tmp_path / "out/log.jsonl", time.time() + 120
    while time.time() < deadline and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM and "--resume goes on" in text
    step = records(tmp_path / "out")[-1]["step"]
    done = run(root, tmp_path, *flags, "--steps", step + 1, "--resume")
    assert done.returncode == 0 and records(tmp_path / "out")[-1]["step"] == step + 1


def test_real_frames(root, shared, tiny_model, flags, tmp_path):
    done = run(root, tmp_path, *flags, "--data", shared / "spar", "--steps", 1, "--out", "out")
    assert done.returncode == 0, done.stdout
    assert records(tmp_path / "out")[-1]["step"] == 1


def test_unusable_samples_are_named_skipped_and_counted(root, flags, tmp_path, rooms):
    shutil.copytree(rooms, tmp_path / "data")
    pictures = sorted((tmp_path / "data").glob("rooms/images/*/image_color/0.jpg"))
    for picture in pictures[::2]:
        picture.write_bytes(picture.read_bytes()[:500])
    done = run(root, tmp_path, *flags, "--data", "data", "--steps", 6, "--out", "out")
    assert done.returncode == 0, done.stdout
    named = [picture for picture in pictures
             if f"skipped data/{picture.relative_to(tmp_path / 'data')}" in done.stdout]
    assert named and set(named) <= set(pictures[::2])
    assert f"skipped {len(named)} samples that cannot be used" in done.stdout
    assert sum(line.get("update_norm", 0) > 0 for line in records(tmp_path / "out")) >= 3


def test_non_finite_steps_are_left_out_and_end_the_run(root, flags, tmp_path, tiny_model):
    shutil.copytree(tiny_model, tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][0] = math.nan
    save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
    done = run(root, tmp_path, *flags, "--model", "model", "--steps", 20, "--out", "out")
    assert done.returncode == 1
    assert done.stdout.count("left out: update 1 of 1, gradient norm nan") == 5
    assert "(room_0000" in done.stdout
    assert "five steps in a row were not finite" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("change, message", [
    (["--data", "nowhere"], "actor_grpo.py: nowhere: no such directory"),
    (["--model", "nowhere"], "nowhere: no such model directory"),
    (["--model", "out/cold_start"],
     "out/cold_start: not there yet; run `python actor_sft.py --target actions` first"),
    (["--resume"], "out/checkpoint.safetensors: cannot be read as a checkpoint"),
    (["--seed", "-1"], "--seed must be 0 or more, got -1"),
    (["--max-pixels", "0"], "--max-pixels must be 1 or more, got 0"),
    (["--group", "1"], "--group must be 2 or more, got 1"),
    (["--beta", "-1"], "--beta must be 0 or more, got -1.0"),
    (["--temperature", "0"], "--temperature must be above 0, got 0.0"),
    (["--offload"], "--offload keeps the fp32 master weights"),
])
def test_bad_arguments(root, flags, tmp_path, change, message):
    done = run(root, tmp_path, *flags, "--steps", 2, "--out", "out", *change)
    assert done.returncode in (1, 2) and message in done.stdout


def test_errors_are_one_line(root, flags, tmp_path):
    """As a user sees them: what ends the process is its last line, and no traceback."""
    (tmp_path / "taken").write_text("a file")
    for change, message in ((["--out", "taken"], "File exists: 'taken'"),
                            (["--data", "nowhere"], "nowhere: no such directory")):
        done = run(root, tmp_path, *flags, "--steps", 2, *change, env=None)
        assert done.returncode == 1 and "Traceback" not in done.stdout
        assert done.stdout.splitlines()[-1].startswith("actor_grpo.py: ")
        assert message in done.stdout.splitlines()[-1]


def test_budgets_follow_the_number_of_views():
    gold = rewards.Gold({}, "1", "", "fill", 3)
    prompt = actor_grpo.Prompt("", None, None, None, None, gold)
    assert actor_grpo.budget(prompt, actor_grpo.parse_args([])) == 96 + 3 * 64
    assert actor_grpo.budget(prompt, actor_grpo.parse_args(["--max-new-tokens", "7"])) == 7
