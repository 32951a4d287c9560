"""actor_grpo.py: a group against separate rows, the sampler, the loss; what a run logs, its flags.
What it promises as every trainer does is in test_trainers.py."""

import contextlib
import itertools
import json
import math
import shutil
from copy import deepcopy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil)

import actor_grpo
import conftest
import geometry
import rewards
from conftest import pay, records

run = partial(conftest.run, "actor_grpo.py")
G, T = 4, 9
MASK = torch.arange(T) < torch.tensor([[T], [3], [1], [6]])  # completions of different length
TOKENS = torch.randint(10, 400, (G, T), generator=torch.Generator().manual_seed(0))
A = torch.tensor([1.2, -0.7, 0.0, -0.5], dtype=torch.float64)
END = list(range(0, 400, 9))  # so many words end a completion that some end early
SIZES = ([(168, 112), (112, 140)], [(112, 112), (84, 84), (112, 112)], [(84, 140), (112, 84)])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(autouse=True)
def payment(monkeypatch):
    monkeypatch.setattr(rewards, "total_reward", pay)


@pytest.fixture(scope="module")
def made(tiny_model, scenes):
    """(model, tokenizer, make: a prompt with pictures of these sizes), float64: a random model that
    says and sees more than a fresh one, and whose heads share their keys."""
    config = Qwen2_5_VLConfig.from_pretrained(tiny_model)
    config.text_config.num_attention_heads, config.text_config.num_key_value_heads = 4, 2
    config.text_config.rope_parameters["mrope_section"] = [6, 9, 9]  # no axis is hidden
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).double()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, split_special_tokens=True)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 56**2, "longest_edge": 448**2})
    three = next(its for its in geometry.load_samples(scenes) if len(its.images) == 3)

    def make(sizes, *flags):
        sample = replace(three, images=three.images[:len(sizes)], question="<|im_end|>?")
        sample.pictures = lambda: [geometry.open_image(path).resize(size)
                                   for path, size in zip(sample.images, sizes)]
        return actor_grpo.make_prompt(sample, actor_grpo.parse_args(["--data", "-", *flags]),
                                      tokenizer, processor, model)

    return model, tokenizer, make


# --- a group equals separate rows


@pytest.mark.parametrize("recompute", [False, True])
def test_layers_equal_the_librarys(made, recompute, monkeypatch):
    """One row at once, and its end behind the keys and values of its beginning. No fused kernel of
    CUDA takes a mask and grouped heads at once: none is asked to."""
    library = F.scaled_dot_product_attention
    whole, x = made[2](SIZES[1]).positions, normal(1, 12, 192)
    first = int((whole[1] != whole[2]).nonzero()[0])
    positions = whole[:, None, first - 2:first + 10]  # text, then an image
    theirs = made[0].model.language_model(inputs_embeds=x, position_ids=positions, use_cache=True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **b: library(*a, **b) if len(
        {"attn_mask", "enable_gqa"} & b.keys()) < 2 else pytest.fail("has both"))
    nothing, run = actor_grpo.zero_memory(made[0], 1, 0), actor_grpo.run_layers
    append = actor_grpo.append
    ours, kept = run(made[0], x, positions, nothing, None, append, recompute)
    torch.testing.assert_close((ours, kept), (theirs.last_hidden_state, [
        (layer.keys, layer.values) for layer in theirs.past_key_values.layers]))
    _, past = run(made[0], x[:, :7], positions[..., :7], nothing, None, append, recompute)
    mask = torch.ones(1, 1, 5, 12, dtype=torch.bool).tril(7)
    end, again = run(made[0], x[:, 7:], positions[..., 7:], past, mask, append, recompute)
    torch.testing.assert_close((end, again), (ours[:, 7:], kept))
    memory, write = actor_grpo.zero_memory(made[0], 1, 12), actor_grpo.overwrite
    with torch.no_grad():  # the same in a memory, which holds all keys and values in the end
        run(made[0], x[:, :7], positions[..., :7], memory[..., :7, :], None, write)
        end, again = run(made[0], x[:, 7:], positions[..., 7:], memory, mask, write)
    torch.testing.assert_close((end, again), (ours[:, 7:], kept))
    torch.testing.assert_close([(k, v) for k, v in memory], kept)


def separate_rows(model, prompt, temperature):
    """The oracle: log p (G, T) by the library, a row each, padded on the left."""
    rows = [torch.cat([prompt.ids, one[seen]]) for one, seen in zip(TOKENS, MASK)]
    longest, count = max(map(len, rows)), MASK.sum(-1).tolist()
    ids = torch.stack([F.pad(row, (longest - len(row), 0)) for row in rows])
    seen = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).int()
    logits = model(input_ids=ids, attention_mask=seen, use_cache=False,
                   mm_token_type_ids=(ids == model.config.image_token_id).int(),
                   **{key: its.repeat(G, 1) for key, its in prompt.images.items()}).logits
    log_p = (logits / temperature).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return torch.stack([F.pad(row[-n:], (0, T - n)) for row, n in zip(log_p, count)])


def with_gradient(model, log_p):
    """log p (G, T), and the gradient of all weights, in one row."""
    model.zero_grad()
    (log_p * normal(G, T)).sum().backward()
    return log_p.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.fixture(scope="module", params=[(0, 1.0), (1, 0.5), (2, 1.0)])
def case(made, request):
    """(prompt, temperature, the oracle's log p, its gradient)."""
    prompt, temperature = made[2](SIZES[request.param[0]]), request.param[1]
    return prompt, temperature, *with_gradient(made[0], separate_rows(
        made[0], prompt, temperature))


def apart(model, case, recompute=False):
    """Largest difference of log p from the oracle's, relative one of the gradient."""
    prompt, temperature, wanted, gradient = case
    log_p, its = with_gradient(model, actor_grpo.group_log_probs(
        model, prompt, TOKENS, MASK, temperature, recompute))
    return float((log_p - wanted).abs().max()), float((its - gradient).norm() / gradient.norm())


@pytest.mark.parametrize("recompute", [False, True])
def test_a_group_equals_separate_rows(made, case, recompute):
    value, gradient = apart(made[0], case, recompute)
    assert value < 1e-5 and gradient < 1e-6, (value, gradient)


@pytest.mark.parametrize("see, go_on", [(False, False), (True, False), (False, True)])
def test_wrong_layouts_are_noticed(made, case, see, go_on, monkeypatch):
    """Negative controls: completions that see those before them, or begin where these end."""
    right, order = actor_grpo.run_layers, torch.arange(G * T)

    def one_row(model, x, positions, past, mask, join, recompute):
        if mask is None:
            return right(model, x, positions, past, mask, join, recompute)
        own = torch.ones(G * T, G * T, dtype=torch.bool).tril()
        own &= see | (order[:, None] // T == order // T)
        positions = positions.repeat(1, 1, G) + go_on * (order - order % T)
        out, kept = right(model, x.reshape(1, G * T, -1), positions, past,
                          torch.cat([mask[..., :-T].repeat(1, 1, G, 1), own[None, None]], -1),
                          join, recompute)
        return out.view(G, T, -1), kept

    monkeypatch.setattr(actor_grpo, "run_layers", one_row)
    value, gradient = apart(made[0], case)
    assert (value > 1e-2 and gradient > 1e-2) if see or go_on else value < 1e-5, (value, gradient)


@pytest.mark.parametrize("more, instruction", [
    ([], rewards.ACTION_INSTRUCTION), (["--reasoning", "language"], rewards.LANGUAGE_INSTRUCTION)])
def test_prompt(made, more, instruction):
    """Qwen's ChatML, images first; what a question holds is text, control tokens too."""
    prompt = made[2](SIZES[0], *more)
    pictures = "".join(f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in (24, 20))
    assert made[1].decode(prompt.ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{pictures}<|im_end|>?\n{instruction}<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.ids.tolist().count(made[1].convert_tokens_to_ids("<|im_end|>")) == 2
    assert list(prompt.gold.actions) == ([] if more else [(0, 1)])


# --- rollouts


def naive_rollout(model, prompt, noise, temperature, banned):
    """One completion, the whole row again for every token, a sampler of three lines."""
    row = prompt.ids
    for u in noise.tolist():
        with torch.no_grad():
            logits = model(input_ids=row[None], mm_token_type_ids=(
                row == model.config.image_token_id).int()[None], **prompt.images).logits[0, -1]
        p = (logits / temperature).softmax(-1)
        p[banned] = 0
        row = torch.cat([row, (p.cumsum(0) <= u * p.sum()).sum()[None]])
        if int(row[-1]) in END:
            break
    return row[len(prompt.ids):].tolist()


def ids_of(tokenizer, *names):
    return torch.tensor(tokenizer.convert_tokens_to_ids(names), dtype=torch.long)


@pytest.mark.parametrize("which, temperature, budgets", [
    ((0,), 1.0, (9,)), ((0, 1, 2, 1), 0.7, (9, 3, 40, 24)), ((2, 0), 1.0, (1, 17))])
def test_rollouts_equal_naive_sampling(made, which, temperature, budgets, monkeypatch):
    """All prompts in one call, of different lengths, each as far as its own budget reaches; those
    that have ended leave the batch."""
    (model, _, make), banned = made, ids_of(made[1], *actor_grpo.BANNED)
    prompts = [make(SIZES[k], "--max-new-tokens", str(n)) for k, n in zip(which, budgets)]
    assert [prompt.longest for prompt in prompts] == list(budgets)
    noise = torch.stack([actor_grpo.uniforms(0, 1, k, G, max(budgets)) for k in which])
    layers, batches = actor_grpo.run_layers, []
    monkeypatch.setattr(actor_grpo, "run_layers", lambda model, x, *more: batches.append(
        len(x)) or layers(model, x, *more))
    sampled = actor_grpo.rollout(model, prompts, noise, temperature, banned, torch.tensor(END))
    lengths, steps = [], batches[len(prompts):]  # behind the prompts' own passes
    for prompt, own_noise, budget, (tokens, mask, log_p) in zip(prompts, noise, budgets, sampled):
        wanted = [naive_rollout(model, prompt, one[:budget], temperature, banned.tolist())
                  for one in own_noise]
        assert [row[seen].tolist() for row, seen in zip(tokens, mask)] == wanted
        # the first end token is inside the mask, nothing behind it
        assert mask.tolist() == [[t < len(row) for t in range(mask.shape[1])] for row in wanted]
        assert set(tokens[~mask].tolist()) <= set(END[:1])
        lengths.append(max(map(len, wanted)))
        assert tokens.shape == mask.shape == log_p.shape == (G, lengths[-1])
        with torch.no_grad():  # what sampling says of a token is what the policy's pass says
            again = actor_grpo.group_log_probs(model, prompt, tokens, mask, temperature)
        assert float((again - log_p)[mask].abs().max()) < 1e-5
    assert any(len(set(mask.sum(-1).tolist())) > 1 for _, mask, _ in sampled)
    # asked every 16 tokens: who has ended is out; the last token of all is read by nobody
    asked = [t - t % 16 for t in range(1, min(max(budgets), -(-max(lengths) // 16) * 16))]
    assert steps == [sum(n > t or t == 0 for n in lengths) for t in asked]


def test_a_batch_changes_no_completion(made):
    """Each prompt by itself, and next to others that are longer, or are given longer noise."""
    (model, _, make), end = made, torch.tensor(END)
    prompts = [make(its, "--max-new-tokens", "20") for its in SIZES]
    noise = torch.stack([actor_grpo.uniforms(0, 1, k, G, 30) for k in range(3)])
    none = torch.tensor([], dtype=torch.long)
    together = actor_grpo.rollout(model, prompts, noise, 1.0, none, end)
    for prompt, own_noise, many in zip(prompts, noise, together):
        one, = actor_grpo.rollout(model, [prompt], own_noise[None, :, :20], 1.0, none, end)
        assert torch.equal(one[0], many[0]) and torch.equal(one[1], many[1])
        torch.testing.assert_close(one[2], many[2], rtol=1e-6, atol=1e-6)
    ended = actor_grpo.rollout(  # and the loop ends when all have ended
        model, prompts, noise, 1.0, none, torch.arange(2000))
    assert all(its.shape == (G, 1) for group in ended for its in group)
    assert all(mask.all() for _, mask, _ in ended)


@pytest.mark.parametrize("see", ["prompt", "columns"])
def test_wrong_masks_of_sampling_are_noticed(made, see, monkeypatch):
    """Negative controls: completions that see the zeros before their prompt, or each other."""
    (model, _, make), layers = made, actor_grpo.run_layers
    prompts = [make(SIZES[k], "--max-new-tokens", "9") for k in (0, 1)]
    noise = torch.stack([actor_grpo.uniforms(0, 1, k, G, 9) for k in range(2)])
    L = max(len(prompt.ids) for prompt in prompts)

    def other(model, x, positions, past, mask, join, recompute=False):
        if mask is not None and mask.shape[0] == 2:
            mask = mask.clone()
            mask[..., slice(L) if see == "prompt" else slice(L, None)] = True
        return layers(model, x, positions, past, mask, join, recompute)

    monkeypatch.setattr(actor_grpo, "run_layers", other)
    end = torch.tensor(END)
    sampled = actor_grpo.rollout(model, prompts, noise, 1.0, end[:0], end)
    monkeypatch.setattr(actor_grpo, "run_layers", layers)
    apart = []
    for prompt, (tokens, mask, log_p) in zip(prompts, sampled):
        with torch.no_grad():
            again = actor_grpo.group_log_probs(model, prompt, tokens, mask, 1.0)
        apart.append(float((again - log_p)[mask].abs().max()))
    assert max(apart) > 1e-2, apart
    if see == "prompt":  # the longest one has no zeros before it
        assert min(apart) < 1e-5, apart


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampler_against_the_softmax(temperature):
    """Chi-square over 50,000 draws; banned words never come."""
    logits, banned, N = 2 * normal(12).float(), torch.tensor([3, 11]), 50_000
    u = torch.rand(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn, log_p = actor_grpo.sample_tokens(logits.expand(N, -1), u, temperature, banned)
    torch.testing.assert_close(log_p, (logits / temperature).log_softmax(-1)[drawn])
    counts = drawn.bincount(minlength=12)
    assert counts[banned].sum() == 0
    for other, fits in ((temperature, True), (1.5 - temperature, False)):
        p = (logits.double() / other).softmax(-1).index_fill(0, banned, 0)
        expected, keep = p / p.sum() * N, p > 0
        chi_square = float(((counts - expected)[keep] ** 2 / expected[keep]).sum())
        assert chi_square < 29.6 if fits else chi_square > 1000  # 9 degrees of freedom, p = 0.0005


def test_edges_of_the_sampler():
    """What has no probability never comes; NaN, of which the loss will tell, gives some word."""
    logits, u = torch.tensor([-math.inf, 0.0, 0.0, -math.inf]), normal(4)
    u[:] = torch.tensor([0.0, 0.4999, 0.5, 1 - 1e-16], dtype=torch.float64)
    none = torch.tensor([], dtype=torch.long)
    assert actor_grpo.sample_tokens(logits.expand(4, -1), u, 1.0, none)[0].tolist() == [1, 1, 2, 2]
    chosen, _ = actor_grpo.sample_tokens(math.nan * normal(4, 4), u, 1.0, none)
    assert set(chosen.tolist()) <= set(range(4))


def test_noise_is_a_function_of_seed_step_prompt_and_completion():
    a = actor_grpo.uniforms(0, 3, 1, 4, 10)
    assert torch.equal(a[:2, :5], actor_grpo.uniforms(0, 3, 1, 2, 5))
    others = [actor_grpo.uniforms(*key, 4, 10) for key in ((1, 3, 1), (0, 4, 1), (0, 3, 2))]
    assert not any(torch.equal(a[0], b[0]) for b in (*others, a[1:]))
    assert a.dtype == torch.float64 and 0.3 < a.mean() < 0.7 and a.min() >= 0 and a.max() < 1


# --- the loss


def test_advantages_by_hand():
    ours = actor_grpo.group_advantages(torch.tensor([1.0, 2.0, 3.0, 2.0]))
    wanted = torch.tensor([-1.0, 0.0, 1.0, 0.0]) / (math.sqrt(2 / 3) + 1e-4)
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=0)
    for value in (0.1, 1 / 3, 2.7):  # eight of them have a standard deviation in float32
        assert not actor_grpo.group_advantages(torch.full((8,), value)).any()
    assert actor_grpo.group_advantages(torch.tensor([0.0, 1e-5])).any()


def naive_loss(log_p, old, ref, clip_ratio, beta):
    total = 0.0
    for g in range(G):
        tokens, one = [t for t in range(T) if MASK[g, t]], 0.0
        for t in tokens:
            ratio = math.exp(min(20, max(-20, float(log_p[g, t] - old[g, t]))))
            clipped = min(max(ratio, 1 - clip_ratio), 1 + clip_ratio)
            r = min(20, max(-20, float(ref[g, t] - log_p[g, t])))
            one += min(ratio * float(A[g]), clipped * float(A[g])) - beta * (math.exp(r) - r - 1)
        total -= one / len(tokens)
    return total / G


@pytest.mark.parametrize("apart", [0.3, 30.0])  # within the clip and without; beyond the clamp
def test_loss_against_naive_loop(apart):
    log_p = -3 * normal(G, T).abs()
    old, ref = (log_p + apart * normal(G, T, seed=seed) for seed in (1, 2))
    loss, seen = actor_grpo.grpo_loss(log_p, old, ref, A, MASK, 0.2, 0.05)
    assert float(loss) == pytest.approx(naive_loss(log_p, old, ref, 0.2, 0.05), rel=1e-12)
    ratio, r = (its[MASK].clamp(-20, 20).exp() for its in (log_p - old, ref - log_p))
    k3 = r - r.log() - 1
    assert seen == pytest.approx({
        "kl": float(k3.mean()), "kl_max": float(k3.max()), "ratio_max": float(ratio.max()),
        "clip_share": float(((ratio < 0.8) | (ratio > 1.2)).double().mean())}, rel=1e-6)


def test_gradient_at_ratio_one_is_the_policy_gradient():
    """d loss / d log p = -A / length / G: REINFORCE with the group's advantage; of equal rewards,
    whose A is 0, exactly none."""
    log_p = -normal(G, T).abs().requires_grad_()
    loss, seen = actor_grpo.grpo_loss(log_p, log_p.detach(), None, A, MASK, 0.2, 0.0)
    (gradient,) = torch.autograd.grad(loss, log_p)
    torch.testing.assert_close(gradient, -A[:, None] / MASK.sum(-1, keepdim=True) / G * MASK)
    assert seen == {"kl": 0, "kl_max": 0, "ratio_max": 1, "clip_share": 0}


def test_clipping_and_clamping_stop_the_gradient():
    """Beyond the clip in the direction that A wants; in the other there is one."""
    log_p = torch.tensor([[0.5], [-0.5], [0.5], [-0.5], [-1e4], [1e4]]).requires_grad_()
    old, mask = torch.zeros(6, 1), torch.ones(6, 1, dtype=torch.bool)
    actor_grpo.grpo_loss(log_p, old, old, torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, -1.0]), mask,
                         0.2, 1e-9)[0].backward()
    assert (log_p.grad[:, 0].abs() > 1e-6).tolist() == [False, True, True, False, False, False]


# --- groups, and what is said of them


class Sgd:
    """In an Optimizer's place: what grpo_step asks of it, written down; its norms are `norms`."""

    def __init__(self, model, norms):
        self.model, self.norms, self.gradients = model, list(norms), []
        model.zero_grad()

    def backward(self, loss):
        loss.backward()

    def reduce(self):
        self.gradients.append(torch.cat([
            torch.zeros(p.numel()) if p.grad is None else p.grad.flatten()
            for p in self.model.parameters()]))
        return self.norms.pop(0)

    def step(self, norm):
        if math.isfinite(norm):
            for p in self.model.parameters():
                p.data -= 1e-3 * p.grad
        self.model.zero_grad()
        return math.isfinite(norm)


@pytest.mark.parametrize("more, block", [([], "action"), (["--reasoning", "language"], "think")])
def test_a_step_in_its_parts(made, monkeypatch, more, block):
    """Parts 2 to 6 with two updates, beside each part by itself: what is sampled, paid, compared,
    said by the reference; the gradient of both updates, the second from where the first led to."""
    (model, tokenizer, make), paid = made, []
    model, reference = deepcopy(model), model
    monkeypatch.setattr(rewards, "END", tokenizer.convert_ids_to_tokens(END))
    monkeypatch.setattr(rewards, "total_reward", lambda *a, **b: paid.append((*a, b)) or pay(*a))
    args = actor_grpo.parse_args(
        "--data - --group 4 --max-new-tokens 12 --weights 1 2 3 --tau-t 2 --tau-r 20 --seed 4 "
        "--temperature 0.7 --beta 0.1 --updates 2 --no-recompute".split() + more)
    prompts = {1: make(SIZES[0], "--max-new-tokens", "12"),
               3: make(SIZES[1], "--max-new-tokens", "7")}
    optimizer = Sgd(model, [1.0, 1.0])
    groups, count, moved, norm = actor_grpo.grpo_step(
        model, reference, tokenizer, optimizer, prompts, args, step=5)
    assert (len(groups), count, moved, norm, len(paid)) == (2, 2, True, 1.0, 2 * G)
    model, again = deepcopy(reference), Sgd(model, [1.0, 1.0])
    again.model = model
    for number, group in zip(prompts, groups):
        prompt = prompts[number]
        noise = actor_grpo.uniforms(4, 5, number, G, prompt.longest)
        (tokens, mask, sampled), = actor_grpo.rollout(
            reference, [prompt], noise[None], 0.7, ids_of(tokenizer, *actor_grpo.BANNED),
            torch.tensor(END))
        rows = [one[kept].tolist() for one, kept in zip(tokens, mask)]
        texts = [tokenizer.decode([k for k in row if k not in END]) for row in rows]
        asked, paid = paid[:G], paid[G:]
        assert asked == [(text, prompt.gold, [1, 2, 3], 2, 20, {"block": block}) for text in texts]
        scores = [pay(text) for text in texts]
        A = actor_grpo.group_advantages(torch.tensor([score["total"] for score in scores]))
        with torch.no_grad():
            ref = actor_grpo.group_log_probs(reference, prompt, tokens, mask, 0.7)
        for name, wanted in (("tokens", tokens), ("mask", mask), ("A", A), ("ref", ref)):
            assert torch.equal(getattr(group, name), wanted)
        assert group.prompt is prompt and not group.ref.requires_grad and group.scores == scores
        torch.testing.assert_close(group.sampled, sampled, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(group.old, ref)  # the reference is the policy that sampled
        assert actor_grpo.show(group, 5) == {
            "step": 5, "id": prompt.id, "task": prompt.gold.task, "gold": prompt.gold.answer,
            "responses": [{"text": text, **score, "advantage": float(a)}
                          for text, score, a in zip(texts, scores, A)]}
        cut = np.mean([row[-1] not in END for row in rows])
        logged = actor_grpo.log_of(group)
        assert 0 < cut < 1 and {name: logged[name] for name in (
            "scores", "length", "truncated", "distinct", "dead_groups")} == {
            "scores": scores, "length": pytest.approx(np.mean([len(row) for row in rows])),
            "truncated": pytest.approx(cut), "distinct": len(set(texts)), "dead_groups": 0}
        assert logged["gap"] == float((group.old - group.sampled)[mask].abs().max())
    for update in range(2):
        for group in groups:
            log_p = actor_grpo.group_log_probs(model, group.prompt, group.tokens, group.mask, 0.7)
            loss, statistics = actor_grpo.grpo_loss(
                log_p, group.old, group.ref, group.A, group.mask, 0.2, 0.1)
            again.backward(loss / 2)
            if update == 1:
                assert statistics == group.statistics and statistics["ratio_max"] > 1
                assert actor_grpo.log_of(group)["loss"] == loss.item() / 2
        assert again.step(again.reduce())
        torch.testing.assert_close(again.gradients[update], optimizer.gradients[update])
    assert float(optimizer.gradients[0].abs().max()) > 0


def test_steps_that_change_nothing(made):
    """Without a prompt on any process, or with a first gradient that is not finite; if the second
    one is not, the first update stands."""
    model, tokenizer, make = deepcopy(made[0]), *made[1:]
    args = actor_grpo.parse_args("--data - --group 2 --beta 0 --updates 2".split())
    for prompts, norms, wanted in (({}, [0.0], (0, False)), ({0: make(SIZES[0])}, [math.nan], (
            1, False)), ({0: make(SIZES[0])}, [1.0, math.inf], (1, True))):
        prompts = {k: prompt._replace(longest=3) for k, prompt in prompts.items()}
        optimizer = Sgd(model, norms)
        groups, count, moved, norm = actor_grpo.grpo_step(
            model, None, tokenizer, optimizer, prompts, args, 1)
        assert (count, moved) == wanted and len(groups) == count and not optimizer.norms
        assert all(group.ref is None for group in groups)
        assert (norm == 0.0) if not prompts else not math.isfinite(norm)


def test_budgets_follow_the_number_of_views(made, monkeypatch):
    """And noise is drawn for the longest one of them; equal rewards make a dead group."""
    (model, tokenizer, make), asked, draw = made, [], actor_grpo.uniforms
    monkeypatch.setattr(actor_grpo, "uniforms", lambda *its: asked.append(its) or draw(*its))
    monkeypatch.setattr(rewards, "END", tokenizer.convert_ids_to_tokens(
        range(len(tokenizer))))
    for more, wanted in (("", [96 + 3 * 64, 96 + 64]), ("--max-new-tokens 7", [7, 7]),
                         ("--reasoning language", [256, 256])):
        args = actor_grpo.parse_args(["--data", "-", *more.split()])
        prompts = {k: make(SIZES[which], *more.split()) for k, which in ((0, 1), (2, 0))}
        assert [prompt.longest for prompt in prompts.values()] == wanted
        groups = actor_grpo.roll_out_groups(model, tokenizer, prompts, args, 1)
        assert all(group.tokens.shape == (8, 1) and group.ended.all() for group in groups)
        assert asked[-2:] == [(0, 1, 0, 8, wanted[0]), (0, 1, 2, 8, wanted[0])]


def test_reasoning_in_words_needs_no_poses(made, scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "data")
    for folder in tmp_path.glob("data/*/images/*/pose"):
        shutil.rmtree(folder)
    sample, (model, tokenizer, _) = geometry.load_samples(tmp_path / "data")[0], made
    for reasoning, fits in (("language", True), ("action", False)):
        args = actor_grpo.parse_args(["--data", "-", "--reasoning", reasoning])
        with contextlib.nullcontext() if fits else pytest.raises(geometry.DataError):
            actor_grpo.make_prompt(sample, args, tokenizer, Qwen2VLImageProcessorPil(), model)


def test_summary_by_hand():
    score = dict.fromkeys(("action", "answer", "format", "new_term"), 0.5)
    mean = ("kl", "clip_share", "length", "truncated", "distinct", "dead_groups")
    groups = [{"scores": [score | {"total": x} for x in totals],
               **dict.fromkeys((*mean, "loss", "kl_max", "ratio_max", "gap"), value)}
              for totals, value in (([1.0, 3.0], 1.0), ([2.0, 2.0], 9.0), ([2.0, 2.0], 2.0))]
    assert actor_grpo.summary(groups) == pytest.approx({
        "loss": 12.0, "reward": 2.0, "reward_spread": math.sqrt(1 / 3), **dict.fromkeys(mean, 4.0),
        **{f"reward_{name}": 0.5 for name in score}, "kl_median": 2.0,
        **{f"reward_{name}_spread": 0 for name in score}, "kl_max": 9, "ratio_max": 9, "gap": 9})


@pytest.mark.parametrize("change, words", [
    ({}, None), ({"reward_format": 0.0, "truncated": 0.9}, "raise --max-new-tokens"),
    ({"reward_format": 0.0}, "is --model a cold start"), ({"reward_format": 1e-3}, None),
    ({"distinct": 1.0, "dead_groups": 1.0}, "the 8 completions of a group are the same text"),
    ({"distinct": 2.0}, None), ({"dead_groups": 1.0}, "no policy gradient"),
    ({"kl_median": 2.5}, "2.5 nats"), ({"kl_median": 0.9}, None),
    ({"grad_norm": math.nan}, "an update after the first was not finite")])
def test_warnings(change, words):
    said = actor_grpo.warnings_of({
        "reward_format": 0.5, "truncated": 0.4, "distinct": 8.0, "dead_groups": 0.9,
        "kl_median": 0.01, "grad_norm": 1.0, **change}, 8)
    assert len(said) == (words is not None) and (not said or words in said[0])


# --- runs


@pytest.mark.parametrize("more, moved", [
    ("", "model visual"), ("--updates 2 --lr 2e-3 --temperature 0.7", "model visual"),
    ("--beta 0 --freeze language --no-recompute", "visual"),
    ("--reasoning language --freeze vision", "model"),
    ("--precision bf16 --offload --max-new-tokens 2", "model visual")])
def test_runs(root, scenes, tmp_path, tiny_model, more, moved):
    """What a run logs, keeps of its rollouts and trains; a random model never ends by itself."""
    done = run(root, tmp_path, *f"--data {scenes} --model {tiny_model} --lr 1e-3 --group 3 --batch "
               "2 --max-pixels 3136 --max-new-tokens 6 --rollouts-every 3 --steps 3 --out out "
               f"--workers 1 {more}".split())
    assert done.returncode == 0, done.stdout
    lines, out = records(tmp_path / "out"), tmp_path / "out"
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["grad_norm"] > 0 for line in lines) and lines[0]["dead_groups"] < 1
    # the first policy is the reference: exact, though computed apart; and the one that sampled
    assert [line["kl"] > 0 for line in lines] == ["--updates" in more, *["--beta" not in more] * 2]
    assert (lines[0]["ratio_max"] > 1) == ("--updates" in more)
    rounding = 0.1 if "bf16" in more else 1e-4
    assert 0 < max(line["gap"] for line in lines) < rounding
    assert all(line["seconds"] > 0 for line in lines)
    assert ("no completion has the form" in done.stdout) == any("warnings" in its for its in lines)
    shown = [json.loads(line) for line in (out / "rollouts.jsonl").open()][1:]
    assert [group["step"] for group in shown] == [1, 1, 3, 3]
    assert all(len(group["responses"]) == 3 for group in shown)
    before, after = (load_file(path / "model.safetensors") for path in (tiny_model, out))
    assert {key.split(".")[0] for key in before
            if not torch.equal(before[key], after[key])} == set(moved.split())


def test_a_second_update_that_is_not_finite(root, scenes, tmp_path, tiny_model, monkeypatch):
    """The first one stands: the step is not told as one that was left out."""
    step, finite = actor_grpo.Optimizer.step, itertools.cycle([True, False])
    monkeypatch.setattr(actor_grpo.Optimizer, "step", lambda self, norm: step(
        self, norm if next(finite) else math.nan))
    done = run(root, tmp_path, *f"--data {scenes} --model {tiny_model} --group 3 --batch 1 --steps "
               "2 --max-pixels 3136 --max-new-tokens 6 --updates 2 --out out --workers 1".split())
    assert done.returncode == 0 and "left out" not in done.stdout, done.stdout
    assert not any("skipped" in line for line in records(tmp_path / "out"))


@pytest.mark.parametrize("flags, message", [
    ("--model out/cold_start", "run `python actor_sft.py --target actions` first"),
    ("--group 1", "--group must be 2 or more"), ("--beta -1", "--beta is out of range: -1.0"),
    ("--temperature 0", "--temperature is out of range: 0.0")])
def test_bad_arguments(root, scenes, tmp_path, flags, message):
    done = run(root, tmp_path, "--data", scenes, *flags.split())
    assert done.returncode in (1, 2) and message in done.stdout.splitlines()[-1]
