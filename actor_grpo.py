"""Stage 4 of HATCH: reinforcement learning with verifiable rewards (Action-then-Answer Reasoning,
section 3.4, appendices C and D) by Group Relative Policy Optimization as DeepSeekMath (arXiv
2402.03300) defines it.

One step, with the numbers that its parts carry below:

    1  draw B prompts
    2  roll out G completions of each from the current model           roll_out_groups, rollout
    3  score them: R = R_act + R_ans + R_fmt (Eq. 8)                   rewards.total_reward
    4  compare within each group: A = (R - mean) / std                 group_advantages
    5  log p of the completions under the frozen start model           group_log_probs
    6  update: clipped ratio, minus beta KL to the start model         grpo_loss

`main` does the first, `grpo_step` the others.

All G completions have the same prompt, most of it image tokens (three 448x448 views: 768). It is
computed once, and the completions continue from its keys and values (block). Gradients flow back
through these, so the result equals that of G separate rows, but for rounding. Sampling does the
same for the completions of all prompts at once.

    python actor_grpo.py                           # reads out/cold_start, writes out/grpo
    python actor_grpo.py --data /path/to/spar      # the paper's values
    torchrun --nproc_per_node 4 actor_grpo.py --data ...    # each process takes whole prompts

Writes --out: the model (an ordinary Hugging Face directory), log.jsonl, rollouts.jsonl (whole
responses with their rewards), checkpoint.pt (for --resume; may be deleted when the run has ended).

Axes: B prompts, G completions, R rows, L prompt tokens, T new tokens, D feature, W words, d of a
head.

Deviations from DeepSeekMath's Eq. 3 and 4: the reference is the start model for the whole run (one
outer iteration); A = (R - mean) / (std + 1e-4), and exactly 0 in a group without spread; log-ratios
are clamped to +-20; log p is that of the tempered policy, over all words, while sampling leaves the
vision tokens out.
Beyond the paper: the choices tagged "not in the paper: NAME"; docs/choices.md lists them.
"""

import argparse
import itertools
import json
import math
import os
import pickle
import platform
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

# Torch reads this when it is imported. Without it, freed memory is left in pieces of no use.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

import geometry
import rewards

MADE_BY = {"out/cold_start": "python actor_sft.py --target actions"}  # and what writes it
MAY_BE_0 = ("seed", "warmup", "beta")  # the other numbers of the command line are above 0
BANNED = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",  # not in the paper: sampling
          "<|image_pad|>", "<|video_pad|>"]
BLOCKS = {"action": "action", "language": "think"}  # what --reasoning stands between


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description="GRPO: reinforcement learning of Qwen2.5-VL with verifiable rewards.",
        allow_abbrev=False)
    # what to train on what
    p.add_argument("--model", default="out/cold_start", help="model directory or hub id")
    p.add_argument("--data", help="SPAR-7M-RGBD tree; default: the demo's rooms")
    p.add_argument("--out", default="out/grpo", help="where the model and the log go")
    p.add_argument("--samples", type=int, default=10_000,
                   help="how many multi-image samples to draw (paper: 10,000)")
    p.add_argument("--max-pixels", type=int, help="budget per image, larger ones are scaled down; "
                                                  "default: 448 * 448, demo: 112 * 112")
    p.add_argument("--freeze", default="nothing",  # not in the paper: what trains
                   choices=("vision", "language", "nothing"),
                   help="keep the image encoder, or the language model, as it is")
    # rewards
    p.add_argument("--reasoning", choices=("action", "language"), default="action",
                   help="what comes before the answer: camera moves, or words (Table 3's ablation)")
    p.add_argument("--weights", type=float, nargs=len(rewards.WEIGHTS), metavar=(*rewards.WEIGHTS,),
                   default=[*rewards.WEIGHTS.values()],
                   help="the lambda of each term of Eq. 8; paper: 1 1 1")
    p.add_argument("--tau-t", type=float, default=1.0,  # not in the paper: scales of R_act
                   help="metres at which R_act falls to 1 / e")
    p.add_argument("--tau-r", type=float, default=30.0,  # not in the paper: scales of R_act
                   help="degrees at which R_act falls to 1 / e")
    # the objective
    p.add_argument("--group", type=int, default=8, help="G: completions of each prompt; paper: 8")
    p.add_argument("--beta", type=float, default=0.01,
                   help="weight of the KL term; 0 leaves the reference out; paper: 0.01")
    p.add_argument("--clip-ratio", type=float, default=0.2,  # not in the paper: clipped ratio
                   help="how far the ratio counts; matters with --updates above 1 only")
    p.add_argument("--updates", type=int, default=1,  # not in the paper: clipped ratio
                   help="mu: optimiser steps on the same completions")
    p.add_argument("--temperature", type=float, default=1.0,  # not in the paper: sampling
                   help="of sampling, and of log p in the objective; 1: the model's distribution")
    p.add_argument("--max-new-tokens", type=int,  # not in the paper: longest completion
                   help="longest completion; default: 96 + 64 a pair of views, 256 for language")
    # optimisation
    p.add_argument("--steps", type=int, help="default: one epoch; demo: 100")
    p.add_argument("--batch", type=int,  # not in the paper: batch of GRPO
                   help="B: prompts a step over all processes; paper: a global batch of 32, read "
                        "here as 4 prompts x 8 completions; demo: 8")
    p.add_argument("--lr", type=float, help="fixed; paper: 1e-5; demo: 1e-4")
    p.add_argument("--vision-lr", type=float,  # not in the paper: rate of the encoder
                   help="lr of the image encoder; default: --lr; demo: 1e-5")
    p.add_argument("--clip", type=float, default=1.0,  # not in the paper: optimiser
                   help="largest gradient norm")
    p.add_argument("--seed", type=int, default=0, help="decides which samples, and all sampling")
    # looking and saving
    p.add_argument("--rollouts-every", type=int, default=10,
                   help="steps between the groups that rollouts.jsonl keeps")
    p.add_argument("--save-every", type=int, help="steps between checkpoints; default: a quarter")
    p.add_argument("--resume", action="store_true",
                   help="go on from --out's checkpoint; else the same command")
    # the machine
    p.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                   help="of the working weights; auto: bf16 on a GPU, fp16 where it has none, fp32 "
                        "on a CPU. Master weights are always fp32")
    p.add_argument("--offload", action="store_true",
                   help="master weights and moments in host memory: slower, but 2 bytes a "
                        "parameter on the GPU instead of 18")
    p.add_argument("--no-recompute", action="store_true",
                   help="keep activations instead of recomputing them: faster, more memory")
    p.add_argument("--workers", type=int, default=min(8, os.cpu_count()),
                   help="threads that prepare samples ahead")

    given = p.parse_args(argv)  # other defaults depend on it
    if given.data is None:  # the only place where demo and real run differ
        values = {"data": "out/demo/data", "max_pixels": 112 * 112, "batch": 8, "lr": 1e-4,
                  "vision_lr": 1e-5, "steps": 100, "no_recompute": True}
    else:
        values = {"max_pixels": 448 * 448, "batch": 4, "lr": 1e-5, "vision_lr": given.lr or 1e-5}
    args = settle(p, argv, values | {"betas": [0.9, 0.999], "warmup": 0})
    if args.group < 2:
        p.error("--group must be 2 or more: one completion has none to be compared with")
    return args


# ------------------------------------------------------------------------------------ the method


def group_advantages(R):
    """A (G,): how much better each completion is than its group, in standard deviations.

    R (G,) rewards. If they are all equal, A is set to 0: rounding can leave equal float numbers a
    mean that differs from them and a standard deviation above 0. `std` divides by G - 1.
    """
    if R.max() - R.min() < 1e-6:
        return torch.zeros_like(R)
    return (R - R.mean()) / (R.std() + 1e-4)  # not in the paper: advantage


def grpo_loss(log_p, old, ref, A, mask, clip_ratio, beta):
    """The loss of one group, and what to log of it.

    log_p, old, ref (G, T): log p of each token under the policy, the policy that sampled them, and
    the reference (None if beta is 0). A (G,) advantages; mask (G, T): the tokens of each
    completion, its end token included.
    """
    log_ratio = (log_p - old).clamp(-20, 20)  # (G, T)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    gain = torch.minimum(ratio * A[:, None], clipped * A[:, None])  # (G, T)
    k3 = torch.zeros_like(log_p)  # Schulman's name for the estimate of KL in DeepSeekMath's Eq. 4
    if beta:
        log_r = (ref - log_p).clamp(-20, 20)  # of the reference's p to the policy's
        k3 = log_r.exp() - log_r - 1  # never negative, (G, T)
    per_token = -(gain - beta * k3) * mask
    length = mask.sum(-1)  # (G,)
    loss = (per_token.sum(-1) / length).mean()  # mean of each sequence, then of the group
    k3 = k3.detach()[mask]
    ratio = ratio.detach()[mask]
    return loss, {"kl": float(k3.mean()), "kl_max": float(k3.max()),
                  "ratio_max": float(ratio.max()),
                  "clip_share": float(((ratio - 1).abs() > clip_ratio).float().mean())}


def grpo_step(model, reference, tokenizer, optimizer, prompts, args, step):
    """Parts 2 to 6 of a step for the prompts of this process, {number in the step: Prompt}.

    Returns a Group for each; how many groups all processes have; whether the model moved, and the
    norm of the last gradient: one that is not finite, or of no group, changes nothing.
    """
    count = sum(gather([len(prompts)]))  # their gradients add up
    # 2  roll out G completions of each from the current model
    groups = roll_out_groups(model, tokenizer, prompts, args, step)
    for group in groups:
        # 3  score them: R = R_act + R_ans + R_fmt
        group.scores = [rewards.total_reward(text, group.prompt.gold, args.weights, args.tau_t,
                                             args.tau_r, block=BLOCKS[args.reasoning])
                        for text in group.texts]
        # 4  compare within the group: A = (R - mean) / std
        R = torch.tensor([score["total"] for score in group.scores])
        group.A = group_advantages(R).to(model.device)
        # 5  log p of the completions under the frozen start model
        if reference is not None:
            with torch.no_grad():
                group.ref = group_log_probs(
                    reference, group.prompt, group.tokens, group.mask, args.temperature)
    # 6  update: clipped ratio, minus beta KL to the start model
    moved = False
    for update in range(args.updates):
        for group in groups:
            log_p = group_log_probs(model, group.prompt, group.tokens, group.mask,
                                    args.temperature, recompute=not args.no_recompute)
            if update == 0:  # the policy has not moved since it sampled
                group.old = log_p.detach()
            loss, group.statistics = grpo_loss(log_p, group.old, group.ref, group.A, group.mask,
                                               args.clip_ratio, args.beta)
            group.loss = loss.item() / count
            optimizer.backward(loss / count)
        grad_norm = optimizer.reduce()
        if not count or not optimizer.step(grad_norm):
            break  # the updates before it stay
        moved = True
    return groups, count, moved, grad_norm


# ------------------------------------------------------------------------------------- its data


class Prompt(NamedTuple):
    """A sample as the model is asked it: ids (L,), positions (3, L), images of
    rewards.encode_prompt; longest: how many tokens a completion may have."""

    id: str
    ids: torch.Tensor
    positions: torch.Tensor
    images: dict
    gold: rewards.Gold
    longest: int


def make_prompt(sample, args, tokenizer, processor, model):
    """The Prompt of a geometry.Sample."""
    instruction = {"action": rewards.ACTION_INSTRUCTION,
                   "language": rewards.LANGUAGE_INSTRUCTION}[args.reasoning]
    ids, images = rewards.encode_prompt(tokenizer, processor, sample.pictures(),
                                        f"{sample.question}\n{instruction}", sample.id)
    ids = torch.tensor(ids)
    positions, _ = model.model.get_rope_index(
        ids[None], (ids == model.config.image_token_id).int()[None],
        image_grid_thw=images["image_grid_thw"])
    gold = rewards.gold_of(sample, plans=args.reasoning == "action")
    # compact plans of Qwen's tokenizer have 67, 177 and 342 tokens for 2, 3 and 4 views
    longest = {"action": 96 + 64 * len(gold.actions), "language": 256}[args.reasoning]
    return Prompt(sample.id, ids, positions[:, 0], images, gold, args.max_new_tokens or longest)


@dataclass
class Group:
    """A prompt's G completions, and what a step finds of them.

    log p of each token, (G, T): `sampled` as sampling computed it, `old` under the policy that
    sampled, `ref` under the start model.
    """

    prompt: Prompt
    tokens: torch.Tensor  # (G, T)
    mask: torch.Tensor  # (G, T): the tokens of each completion, its end token included
    sampled: torch.Tensor
    ended: torch.Tensor  # (G,): whether there is an end token
    texts: list
    scores: list = None  # of rewards.total_reward
    A: torch.Tensor = None  # (G,) advantages
    ref: torch.Tensor = None
    old: torch.Tensor = None
    loss: float = 0.0
    statistics: dict = None  # of grpo_loss


def roll_out_groups(model, tokenizer, prompts, args, step):
    """G completions for each of {number in the step: Prompt}, as Groups without scores."""
    if not prompts:
        return []
    end = torch.tensor(tokenizer.convert_tokens_to_ids(rewards.END), device=model.device)
    banned = torch.tensor(tokenizer.convert_tokens_to_ids(BANNED), device=model.device)
    longest = max(prompt.longest for prompt in prompts.values())
    noise = [uniforms(args.seed, step, number, args.group, longest) for number in prompts]
    noise = torch.stack(noise).to(model.device)  # (B, G, longest)
    completions = rollout(model, [*prompts.values()], noise, args.temperature, banned, end)
    groups = []
    for prompt, (tokens, mask, log_p) in zip(prompts.values(), completions):
        ends = torch.isin(tokens, end) & mask  # (G, T), one token each
        texts = [tokenizer.decode(one[kept]) for one, kept in zip(tokens, mask & ~ends)]
        groups.append(Group(prompt, tokens, mask, log_p, ends.any(-1), texts))
    return groups


# ------------------------------------------------------------------------------------------ main


def main(argv=None):
    args = parse_args(argv)
    rank, world, device, dtype = start_processes(args.precision)
    say = partial(print, flush=True) if rank == 0 else lambda *_, **__: None
    out = Path(args.out)
    source, model, tokenizer = load_model(args.model)

    # samples to train on, in the order of --seed
    walk = geometry.Walk(args.data, args.samples, args.seed)
    args.steps = args.steps or max(1, len(walk.drawn) // args.batch)  # not in the paper: epochs
    args.save_every = args.save_every or max(1, args.steps // 4)
    identity, state = begin(args, dtype, walk, source)
    start = state["step"] if state else 0
    say(f"data    {args.data}: {len(walk.drawn):,} of {len(walk.samples):,} multi-image samples, "
        f"{args.batch} prompts x {args.group} completions a step over {world} process(es); "
        f"{args.steps - start:,} steps. Watch the reward: the loss starts near 0 by construction")

    # the policy in its working dtype, with fp32 masters of what trains; the frozen reference
    model.requires_grad_(args.freeze != "language")
    model.model.visual.requires_grad_(args.freeze != "vision")
    say(f"model   {args.model}: {dtype} on {device}, {args.freeze} frozen")
    say(memory_line(model, 2 if args.beta else 1, args, dtype, device))
    if not args.no_recompute:
        for vision_block in model.model.visual.blocks:
            recompute_in_backward(vision_block)
    optimizer = Optimizer(model, args, dtype, device)
    reference = None
    if args.beta:
        _, reference, _ = load_model(args.model)
        place(reference.requires_grad_(False), dtype, device)
    if rank == 0:
        open_logs(out, args, state, ("log.jsonl", "rollouts.jsonl"))
    if state:
        optimizer.load(state["optimizer"])
    state = None  # its file is closed

    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": args.max_pixels})
    prepare = partial(make_prompt, args=args, tokenizer=tokenizer, processor=processor, model=model)
    stops = catch_signals()
    begun = time.monotonic()
    missed = []  # why each step since the last update changed nothing
    # 1  draw B prompts
    batches = walk.batches(prepare, start, args.steps, args.batch, rank, world, args.workers)
    for step, batch in enumerate(batches, start + 1):
        tick = time.monotonic()
        # {number in the step: Prompt} of this process; None is a sample that cannot be used
        prompts = {rank + world * k: prompt for k, (_, prompt) in enumerate(batch) if prompt}
        # 2 to 6
        groups, count, moved, grad_norm = grpo_step(
            model, reference, tokenizer, optimizer, prompts, args, step)

        logged = gather([log_of(group) for group in groups])
        if moved:
            missed.clear()
            record = {"step": step, **summary(logged), "grad_norm": grad_norm,
                      "seconds": time.monotonic() - tick}
            warnings = warnings_of(record, args.group)
            if warnings:
                record["warnings"] = warnings
        else:
            record = left_out(step, count, grad_norm, batch, missed, say)
        looks = step == 1 or step % args.rollouts_every == 0
        shown = gather([show(group, step) for group in groups if looks])
        stop = gather(stops)
        saves = stop or step == args.steps or step % args.save_every == 0
        if rank == 0:
            for group in shown:
                write_line(out / "rollouts.jsonl", group)
            write_line(out / "log.jsonl", record)
            if saves:  # before a line is printed: a closed terminal takes none
                save_checkpoint(out, identity, step, args.steps, optimizer)
            left = (time.monotonic() - begun) / (step - start) * (args.steps - step)
            rewarded = [name for name in record if f"{name}_spread" in record]
            print_step(record, args.steps, left, (*rewarded, "kl", "grad_norm", "length"))
            if "warnings" in record:
                say(f"step {step}: {'; '.join(record['warnings'])}")
        if stop:
            gather([])  # wait until the first has saved: torchrun ends all when one ends
            say(f"stopped after step {step}; the same command with --resume goes on")
            sys.exit(128 + stop[0])
        if len(missed) == 25:
            break

    if optimizer.t == 0 or len(missed) == 25:
        raise geometry.DataError(
            f"{len(missed)} steps in a row changed no weight, the last: {', '.join(missed[-1:])}"
            f"{walk.first_problem()}; look at the samples named above, or lower --lr")
    problems = len(set(gather([*walk.skipped])))
    if rank == 0:
        save_model(model, source, out, optimizer)
        say(f"wrote   {out}: the model, log.jsonl, rollouts.jsonl; {problems} problems with the "
            "data")
    if world > 1:
        dist.destroy_process_group()


# ----------------------------------------------------------------------- looking at what it learnt


def log_of(group):
    """What the log takes from a Group; gap: the most by which log p of sampling is off."""
    gap = (group.old - group.sampled)[group.mask].abs().max()
    return {"scores": group.scores, "length": float(group.mask.sum(-1).float().mean()),
            "truncated": 1 - float(group.ended.float().mean()), "distinct": len(set(group.texts)),
            "dead_groups": float(not group.A.any()), "loss": group.loss, "gap": float(gap),
            **group.statistics}


def show(group, step):
    """A Group's line of rollouts.jsonl."""
    responses = [{"text": text, **score, "advantage": float(a)}
                 for text, score, a in zip(group.texts, group.scores, group.A)]
    return {"step": step, "id": group.prompt.id, "task": group.prompt.gold.task,
            "gold": group.prompt.gold.answer, "responses": responses}


def summary(logged):
    """One record of a step from what its groups logged."""
    record = {"loss": sum(group["loss"] for group in logged)}
    for key in logged[0]["scores"][0]:  # of rewards.total_reward
        name = "reward" if key == "total" else f"reward_{key}"
        values = [score[key] for group in logged for score in group["scores"]]
        record[name] = float(np.mean(values))
        record[f"{name}_spread"] = float(np.std(values))
    for name in ("kl", "clip_share", "length", "truncated", "distinct", "dead_groups"):
        record[name] = float(np.mean([group[name] for group in logged]))
    for name in ("kl_max", "ratio_max", "gap"):
        record[name] = float(np.max([group[name] for group in logged]))
    record["kl_median"] = float(np.median([group["kl"] for group in logged]))
    return record


def warnings_of(record, group):
    """What a record says that its reader should not miss, in words."""
    found = []
    if record["reward_format"] == 0 and record["truncated"] > 0.5:
        found.append("no completion has the form: most are cut off, raise --max-new-tokens")
    elif record["reward_format"] == 0:
        found.append("no completion has the form: is --model a cold start (actor_sft.py --target "
                     "actions)?")
    if record["distinct"] < 1.5:
        found.append(f"the {group} completions of a group are the same text: nothing to compare")
    elif record["dead_groups"] == 1:
        found.append("no group has any spread in its rewards: no policy gradient this step")
    if record["kl_median"] > 1:  # one unlikely token can lift the mean
        found.append(f"KL to the start model is {record['kl_median']:.1f} nats a token in half of "
                     "the groups: lower --lr, or raise --beta")
    if not math.isfinite(record["grad_norm"]):
        found.append("an update after the first was not finite and changed nothing: lower --lr")
    return found


# ---------------------------------------------------------------------- how the passes are computed


def block(layer, x, past_k, past_v, cos, sin, mask, join):
    """One layer of the language model on new tokens that stand behind others' keys and values.

    x (R, T, D); past_k, past_v (1 or R, heads, C, d); cos, sin (1 or R, T, d) of the new positions;
    join: `append` or `overwrite`, which puts the new k and v with the past ones; mask (1 or R, 1,
    T, columns) bool, or None for a prompt, which has no past: causal. Returns x, and joined k and
    v. With `append` nothing is changed in place: the block can be recomputed, and gradients flow
    from the new tokens into the past. Which token (row) sees which column, on the left in a prompt,
    on the right in a group behind a prompt of four tokens:

        first token     # . .        first token, of each completion     # # # #   # . .
        second          # # .        second                              # # # #   # # .
        third           # # #        third                               # # # #   # # #
    """
    attention = layer.self_attn
    h = layer.input_layernorm(x)
    q, k, v = (project(h).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
               for project in (attention.q_proj, attention.k_proj, attention.v_proj))
    q, k = apply_rotary_pos_emb(q, k, cos, sin)  # (R, heads, T, d)
    k = join(past_k, k)  # (R, heads, columns, d)
    v = join(past_v, v)
    out = attend(q, k, v, mask).transpose(1, 2).flatten(2)  # (R, T, heads * d)
    x = x + attention.o_proj(out)
    return x + layer.mlp(layer.post_attention_layernorm(x)), k, v


def append(past, new):
    """`new` (R, heads, T, d) behind `past` in a new tensor: gradients flow."""
    return torch.cat([past.expand(len(new), -1, -1, -1), new], dim=2)  # (R, heads, C + T, d)


def overwrite(past, new):
    """`new` in the last T columns of `past`, a view of sampling's memory: nothing is copied."""
    assert past.shape[:2] == new.shape[:2]  # one row would fill all
    past[:, :, -new.shape[2]:] = new
    return past


def attend(q, k, v, mask):
    """Attention; q has `shared` heads for each head of k and v. With a mask, these heads are laid
    out as further tokens: no fused kernel of CUDA takes both a mask and grouped heads."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    shared = q.shape[1] // k.shape[1]
    folded = q.unflatten(1, (-1, shared)).flatten(2, 3)  # (R, heads of k, shared * T, d)
    out = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask.repeat(1, 1, shared, 1))
    return out.unflatten(2, (shared, -1)).flatten(1, 2)


def run_layers(model, x, positions, past, mask, join, recompute=False):
    """All layers: x (R, T, D), positions (3, 1 or R, T), past: (k, v) of each layer -> features
    (R, T, D), and (k, v) of each layer, joined."""
    language = model.model.language_model
    kept = []
    cos, sin = language.rotary_emb(x, positions)
    for layer, (past_k, past_v) in zip(language.layers, past):
        run = partial(block, layer, cos=cos, sin=sin, mask=mask, join=join)
        if recompute:
            x, k, v = recomputed(layer, run, x, past_k, past_v)
        else:
            x, k, v = run(x, past_k, past_v)
        kept.append((k, v))
    return language.norm(x), kept


def zero_memory(model, rows, columns):
    """Room for keys and values, (layers, 2, rows, heads, columns, d). Zeros: NaN passes a mask."""
    config = model.config.text_config
    d = model.model.language_model.layers[0].self_attn.head_dim
    return model.get_input_embeddings().weight.new_zeros(
        config.num_hidden_layers, 2, rows, config.num_key_value_heads, columns, d)


def read_prompt(model, prompt, past, join, recompute=False):
    """A prompt, computed once for its whole group: last feature (1, 1, D), (k, v) of each layer.

    past, join: memory of 0 columns and `append`, or memory of L columns and `overwrite`.
    """
    ids = prompt.ids.to(model.device)[None]
    images = model.model.visual(
        prompt.images["pixel_values"].to(model.device),
        grid_thw=prompt.images["image_grid_thw"].to(model.device)).pooler_output
    x = model.get_input_embeddings()(ids)
    x = x.masked_scatter((ids == model.config.image_token_id)[..., None], images.to(x.dtype))
    positions = prompt.positions[:, None].to(model.device)
    x, past = run_layers(model, x, positions, past, None, join, recompute)
    return x[:, -1:], past


def group_log_probs(model, prompt, tokens, mask, temperature, recompute=False):
    """log p of every completion token, (G, T) fp32, 0 where mask is False.

    tokens, mask (G, T): completions, all behind the same prompt; temperature: that of sampling.
    """
    G, T = tokens.shape
    L = len(prompt.ids)
    last, past = read_prompt(model, prompt, zero_memory(model, 1, 0), append, recompute)
    sees = torch.ones(1, 1, T, L + T, dtype=torch.bool, device=tokens.device).tril(L)
    after = prompt.positions.max() + 1 + torch.arange(T, device=tokens.device)
    x = model.get_input_embeddings()(tokens)  # (G, T, D)
    x, _ = run_layers(model, x, after.expand(3, 1, T), past, sees, append, recompute)
    # the features of a token predict the next one; those of the prompt's last token, the first
    predicts = torch.cat([last.expand(G, 1, -1), x[:, :-1]], dim=1)  # (G, T, D)
    log_p = log_probs(predicts[mask] / temperature, model.lm_head.weight, tokens[mask])
    return torch.zeros(G, T, device=tokens.device).masked_scatter(mask, log_p)


def log_probs(hidden, weight, targets, chunk=128):
    """log p of target words: hidden (T, D), weight (W, D), targets (T,) -> (T,) fp32, of logits
    that were rounded to the working dtype.

    In chunks of positions, each computed again in the backward pass, so that logits never exist for
    all positions: of 2,000 tokens and 151,936 words they would take 1.2 GB, and autograd would hold
    several tensors of that size. The weight is an input of each chunk, so that autograd adds up its
    gradient before the optimiser takes it.
    """
    parts = zip(hidden.split(chunk), targets.split(chunk))
    return torch.cat([Recompute.apply(chunk_log_probs, h, weight, y) for h, y in parts])


def chunk_log_probs(hidden, weight, targets):
    logits = F.linear(hidden, weight).float()  # (chunk, W)
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


# ----------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def rollout(model, prompts, noise, temperature, banned, end):
    """Sample G completions of each of B prompts together. Returns a list: for each prompt tokens,
    mask, log p, each (G, T), with T the length of its longest completion.

    noise (B, G, longest) uniform; banned, end: tensors of token ids. mask: True up to and with the
    first end token, at most prompt.longest. All keys and values lie in one memory: 0.45 GiB at 3B
    for 4 x 8 completions, three 448x448 views.

    For each token run_layers gets one row a prompt, R = B; in the place of T new tokens stand the
    newest of the G completions, all at one position. Each sees the prompt and the columns of its
    own completion. The mask of three completions when their third tokens go in, behind a prompt of
    five tokens where the longest prompt has L = 7:

                    prompt             token 1   token 2   token 3
        first       . . # # # # #      # . .     # . .     # . .
        second      . . # # # # #      . # .     . # .     . # .
        third       . . # # # # #      . . #     . . #     . . #
    """
    B, G, longest = noise.shape
    device = noise.device
    L = max(len(prompt.ids) for prompt in prompts)
    memory = zero_memory(model, B, L + G * longest)
    sees = torch.eye(G, dtype=torch.bool, device=device).repeat(B, 1, 1, longest)
    sees = F.pad(sees, (L, 0))  # (B, 1, G, L + G * longest)
    x = []
    for b, prompt in enumerate(prompts):
        begin = L - len(prompt.ids)
        sees[b, :, :, begin:L] = True
        own = memory[:, :, b:b + 1, :, begin:L]
        last, _ = read_prompt(model, prompt, own, overwrite)
        x.append(last)
    x = torch.cat(x).expand(-1, G, -1)  # (B, G, D)
    assert x.shape[:2] == (B, G)
    after = torch.stack([prompt.positions.max() + 1 for prompt in prompts]).to(device)  # (B,)
    budget = torch.tensor([prompt.longest for prompt in prompts], device=device)  # (B,)
    tokens = torch.zeros_like(noise, dtype=torch.long)
    log_p = torch.zeros_like(noise, dtype=torch.float32)
    rows = torch.arange(B, device=device)  # prompts that are still in memory, sees and x
    for t in range(longest):
        if t > 0 and t % 16 == 0:  # drop prompts that have ended; rarely, as it waits for the GPU
            ended = torch.isin(tokens[rows, :, :t], end).any(-1) | (budget[rows, None] <= t)
            going = (~ended).any(-1).nonzero()[:, 0]
            if len(going) == 0:
                break
            if len(going) < len(rows):
                rows = rows[going]
                sees = sees[going]
                memory = memory[:, :, going]
        if t > 0:
            newest = model.get_input_embeddings()(tokens[rows, :, t - 1])  # (B, G, D)
            positions = (after[rows] + t - 1)[:, None].expand(3, -1, G)  # (3, B, G)
            columns = L + G * t
            x, _ = run_layers(model, newest, positions, memory[..., :columns, :],
                              sees[..., :columns], overwrite)
        u = noise[rows, :, t].flatten()
        logits = model.lm_head(x).flatten(0, 1)
        chosen, chosen_log_p = sample_tokens(logits, u, temperature, banned)
        tokens[rows, :, t] = chosen.view(-1, G)
        log_p[rows, :, t] = chosen_log_p.view(-1, G)
    ends = torch.isin(tokens, end).long()
    mask = ends.cumsum(-1) - ends == 0  # no end token before
    mask &= torch.arange(longest, device=device) < budget[:, None, None]
    tokens = torch.where(mask, tokens, end[0])
    lengths = mask.any(1).sum(-1).tolist()
    return [(tokens[b, :, :T], mask[b, :, :T], log_p[b, :, :T]) for b, T in enumerate(lengths)]


def sample_tokens(logits, u, temperature, banned):
    """One token a row, and its log p: logits (N, W), u (N,) uniform in [0, 1) -> (N,), (N,).

    u is looked up in the cumulative distribution of all words but `banned`, a tensor of ids. log p
    is still that over all words, as in the objective.
    """
    log_p = torch.log_softmax(logits.float() / temperature, -1)  # (N, W)
    p = log_p.exp().index_fill(-1, banned, 0)
    cumulative = p.double().cumsum(-1)
    token = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)
    token = token.clamp(max=logits.shape[-1] - 1)  # for NaN, which the loss will tell of
    return token[:, 0], log_p.gather(-1, token)[:, 0]


def uniforms(seed, step, prompt, G, T):
    """The noise of one group, (G, T): a function of seed, step, the prompt's number in the step and
    the completion's in the group, so that a resumed run, or one on more processes, samples the
    same. The 3 keeps it apart from the draws of geometry.Walk, which have 0 and 1 there."""
    rows = [np.random.default_rng([seed, 3, step, prompt, g]).random(T) for g in range(G)]
    return torch.tensor(np.stack(rows))


# ------------------------------------------------ mixed precision and checkpointing, by hand


class Recompute(torch.autograd.Function):
    """Activation checkpointing: keep what goes into a function, run it again in the backward pass.
    What it uses beside its inputs, a block's weights, gets gradients in that second run."""

    @staticmethod
    def forward(ctx, run, *inputs):
        ctx.run = run
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)  # outputs that nobody used cost nothing
        return run(*inputs)  # autograd is off in here: nothing inside is kept

    @staticmethod
    def backward(ctx, *grads):
        inputs = []
        for tensor, needs_grad in zip(ctx.saved_tensors, ctx.needs_input_grad[1:]):
            inputs.append(tensor.detach().requires_grad_(needs_grad))
        with torch.enable_grad():
            outputs = ctx.run(*inputs)
        if not isinstance(outputs, tuple):
            outputs = (outputs,)
        used = [k for k, grad in enumerate(grads) if grad is not None]  # outputs
        torch.autograd.backward([outputs[k] for k in used], [grads[k] for k in used])
        return None, *(tensor.grad for tensor in inputs)  # None: of `run`


def recomputed(module, run, x, *others):
    """run(x, *others), which uses the weights of `module`, by Recompute."""
    trains = any(p.requires_grad for p in module.parameters())
    if trains and torch.is_grad_enabled() and not x.requires_grad:
        x = x.detach().requires_grad_()  # without an input that needs a gradient: no second run
    return Recompute.apply(run, x, *others)


def recompute_in_backward(block):
    """Wrap a transformer block of the library, called as block(hidden, **others)."""
    run = block.forward
    block.forward = lambda hidden, **others: recomputed(block, partial(run, **others), hidden)


class Optimizer:
    """Mixed precision by hand: AdamW on fp32 master copies of what trains in a 16-bit model.

    At lr 1e-5 most updates are smaller than the spacing of bf16 numbers, which alone would hardly
    move. So the model computes in 16 bits, while weights, gradients and moments are kept in fp32.
    An fp32 model is its own master. fp16 gradients underflow: the loss is scaled up for them.
    Within a whole model the image encoder has a learning rate of its own.
    """

    def __init__(self, model, args, dtype, device):
        self.warmup = args.warmup
        self.clip = args.clip
        self.t = 0  # updates
        self.good = 0  # steps in a row whose gradient was finite
        self.scale = 2.0**16 if dtype == torch.float16 else 1.0
        self.tensors = {}  # {name: (the model's tensor, its master)}
        groups = {}  # {lr: masters}
        home = torch.device("cpu") if args.offload else device  # of masters and moments
        for name, p in model.named_parameters():
            if p.requires_grad:
                master = torch.nn.Parameter(p.data.to(home, torch.float32))
                if dtype == torch.float32 and home == device:
                    p.data = master.data  # one tensor
                p.register_post_accumulate_grad_hook(partial(self.take, master))
                self.tensors[name] = p, master
                lr = args.vision_lr if "visual." in name else args.lr
                groups.setdefault(lr, []).append(master)
        self.adam = torch.optim.AdamW(
            [{"params": masters, "lr": lr, "full_lr": lr} for lr, masters in groups.items()],
            betas=args.betas, weight_decay=0, fused=True)
        place(model, dtype, device)

    @staticmethod
    def take(master, p):
        """Called when a weight's gradient is there: the 16-bit ones never exist all at once."""
        grad = p.grad.to(master.device, torch.float32)
        master.grad = grad if master.grad is None else master.grad.add_(grad)
        p.grad = None

    def backward(self, loss):
        (loss * self.scale).backward()

    def reduce(self):
        """Sum the gradient over processes, undo the scale. Returns its norm, maybe inf or NaN."""
        norms = []
        for _, master in self.tensors.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            if dist.is_initialized():
                dist.all_reduce(master.grad)
            master.grad /= self.scale
            norms.append(master.grad.norm())
        return float(torch.stack(norms).norm())

    def step(self, norm):
        """One update by the gradient, clipped; norm: what `reduce` returned. Returns whether it was
        made: a gradient that is not finite changes nothing but the scale."""
        finite = math.isfinite(norm)
        if finite:
            self.t += 1
            self.good += 1
            shrink = min(1.0, self.clip / (norm + 1e-12))
            for group in self.adam.param_groups:
                group["lr"] = group["full_lr"] * min(1.0, self.t / max(self.warmup, 1))
            for _, master in self.tensors.values():
                master.grad *= shrink
            self.adam.step()
            for p, master in self.tensors.values():
                p.data.copy_(master.data)
            if self.scale > 1 and self.good % 1000 == 0:
                self.scale *= 2
        else:
            self.good = 0
            self.scale = max(1.0, self.scale / 2)
        self.adam.zero_grad()
        return finite

    def state(self):
        """What a checkpoint holds: masters and, after the first update, AdamW's state of each."""
        tensors = {}
        for name, (_, master) in self.tensors.items():
            tensors[name] = {"master": master.detach(), **self.adam.state.get(master, {})}
        return {"t": self.t, "good": self.good, "scale": self.scale, "tensors": tensors}

    def load(self, state):
        """Continue from what `state` returned; its tensors are copied one by one."""
        self.t = state["t"]
        self.good = state["good"]
        self.scale = state["scale"]
        for name, (p, master) in self.tensors.items():
            saved = dict(state["tensors"][name])
            master.data.copy_(saved.pop("master"))
            p.data.copy_(master.data)
            self.adam.state[master] = {
                kind: tensor.to(master.device, copy=True) for kind, tensor in saved.items()}


def place(model, dtype, device):
    """Move a model to a device, its weights in dtype, one by one: the whole never exists twice. The
    buffers, among them the rotary frequencies, keep their own dtype."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype)
    model.to(device)


# -------------------------------------------------------------------------------------- plumbing


def settle(p, argv, values):
    """The arguments, parsed again with `values` as defaults. One out of range ends the run."""
    p.set_defaults(**values)
    args = p.parse_args(argv)
    for name, value in vars(args).items():
        least = 0 if name in MAY_BE_0 else 1e-30  # above 0
        if type(value) in (int, float) and not value >= least:  # NaN is out of range as well
            p.error(f"--{name.replace('_', '-')} is out of range: {value}")
    return args


def start_processes(precision):
    """Join torchrun's process group if there is one. Returns rank, world, device, working dtype."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    best = "fp32"
    backend = "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # plans anew for every length of a text
        best = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        backend = "cpu:gloo,cuda:nccl"  # tensors may be on either side
    if world > 1:
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # one saves, others wait
    if precision == "auto" and best == "fp16" and rank == 0:
        print("warning: this GPU has no bf16: --precision auto is fp16")
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return rank, world, device, dtypes[best if precision == "auto" else precision]


def gather(items):
    """What the lists of all processes hold, in one list."""
    everyone = [items]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, items)
    return list(itertools.chain(*everyone))


def load_model(name):
    """The directory of model `name`, a path or an id on the hub; the model, on the CPU; tokenizer.
    The model is fp32 unless all tensors of its files are of one 16-bit dtype."""
    path = Path(name)
    if name in MADE_BY and not (path / "config.json").exists():
        raise geometry.DataError(f"{name}: not there yet; run `{MADE_BY[name]}` first")
    transformers.utils.logging.disable_progress_bar()
    try:
        if not path.is_dir():
            path = Path(snapshot_download(name, allow_patterns=[
                "*.json", "*.txt", "*.jinja", "*.safetensors"]))
        # without config.json the library builds its default giant until memory ends
        if "quantization_config" in json.loads((path / "config.json").read_text()):
            raise ValueError("its weights are quantised; take the 16-bit model")
        if not (path / "tokenizer.json").exists() and not (path / "vocab.json").exists():
            raise ValueError("it has no tokenizer.json; copy the tokenizer's files from its source")
        kinds = set()  # dtypes of the files themselves: config.json may say another
        for file in weight_files(path):
            with safe_open(file, framework="pt") as tensors:
                kinds |= {tensors.get_slice(key).get_dtype() for key in tensors.keys()}
        kind = kinds.pop() if len(kinds) == 1 else "mixed"
        dtype = {"BF16": torch.bfloat16, "F16": torch.float16}.get(kind, torch.float32)
        model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
        lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        if lacking:
            raise ValueError(f"{len(lacking)} tensors are missing or have another shape than "
                             f"config.json says, {lacking[0]} among them")
        # control tokens in texts are text; set once, since threads share the tokenizer
        tokenizer = AutoTokenizer.from_pretrained(path, split_special_tokens=True)
    except Exception as error:  # the library raises nearly any for a broken directory
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise geometry.DataError(f"{path}: no complete Qwen2.5-VL ({why})") from None
    # the library's 3-D convolution, one patch at a time, is slow; it is this matrix product
    embed = model.model.visual.patch_embed
    embed.forward = lambda pixels: F.linear(
        pixels.to(embed.proj.weight.dtype), embed.proj.weight.flatten(1))
    return path, model, tokenizer


def weight_files(path):
    """The files with a model's weights, as from_pretrained chooses them."""
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    index = json.loads((path / "model.safetensors.index.json").read_text())
    return [path / name for name in sorted(set(index["weight_map"].values()))]


def plain(key):
    """A tensor's name without the prefixes, which differ between files and releases."""
    return key.removeprefix("model.").removeprefix("language_model.")


def save_model(model, source, out, optimizer):
    """Write model directory `source` to `out` with the trained tensors in place of its own.

    All else leaves as it came: other tensors bit for bit, dtypes, names, shards, json files. Old
    weights go first, new ones come last: a kill leaves what load_model refuses, not a mixture.
    """
    masters = {p: master.detach() for p, master in optimizer.tensors.values()}
    trained = {}
    for name, p in model.named_parameters(remove_duplicate=False):  # tied weights have two names
        if p in masters:
            trained[plain(name)] = masters[p]
    for file in out.glob("model*.safetensors*"):
        file.unlink()
    for file in source.iterdir():
        if file.suffix in (".json", ".txt", ".jinja"):
            shutil.copyfile(file, out / file.name)
    for file in weight_files(source):
        tensors = load_file(file)
        for key, tensor in tensors.items():
            if plain(key) in trained:
                tensors[key] = trained[plain(key)].to("cpu", tensor.dtype, copy=True)
        save_file(tensors, out / file.name, {"format": "pt"})
        shutil.copymode(out / "config.json", out / file.name)  # safetensors lets only us read it


def memory_line(model, copies, args, dtype, device):
    """What weights and training take, by arithmetic; copies of the weights: 2 with a reference."""
    weights = copies * sum(p.numel() for p in model.parameters()) * dtype.itemsize
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    home = "cpu" if args.offload else device.type
    own_master = dtype == torch.float32 and home == device.type
    state = trained * (12 if own_master else 16)  # gradient, two moments, and a master, in fp32
    return (f"memory  weights {weights / 2**30:.2g} GiB on {device.type}, masters, gradients and "
            f"moments {state / 2**30:.2g} GiB on {home}; activations come on top")


def begin(args, dtype, walk, source):
    """Make --out. Returns the run's identity, which every checkpoint holds, and the checkpoint to
    --resume from, its tensors still in the file; None for a new run.

    The identity is all that numbers depend on: script, arguments, and checksums of data and start
    model: a run resumed on others would be wrong without a word. DataError if --out does not fit.
    """
    out = Path(args.out)
    if out.resolve() == source.resolve():
        raise geometry.DataError(f"--out {out} is the start model's; name another")
    out.mkdir(parents=True, exist_ok=True)
    identity = {"script": Path(__file__).name, **vars(args), "precision": str(dtype),
                "data": geometry.fingerprint(walk.samples.files),
                "model": geometry.fingerprint(weight_files(source))}
    for name in ("resume", "out", "steps", "save_every", "offload", "no_recompute", "workers"):
        identity.pop(name, None)
    path = out / "checkpoint.pt"
    state = None
    if path.exists():
        try:
            state = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
        except (RuntimeError, pickle.UnpicklingError) as error:
            raise geometry.DataError(f"{path}: cannot be read; remove it to start over "
                                     f"({str(error).splitlines()[0]})") from None
    if not args.resume:
        if state and state["step"] < state["steps"]:  # work that would be lost
            raise geometry.DataError(
                f"--out {out} holds a run stopped at step {state['step']} of {state['steps']}: the "
                "same command with --resume goes on, without its checkpoint.pt one starts over")
        return identity, None
    if state is None:
        raise geometry.DataError(f"--out {out} has no checkpoint.pt: leave --resume out")
    for name, value in identity.items():
        was = state["identity"].get(name)
        if was != value:
            raise geometry.DataError(f"--out {out} was begun with {name} {was}, not {value}: only "
                                     "the same command with --resume goes on")
    return identity, state


def save_checkpoint(out, identity, step, steps, optimizer):
    """Write checkpoint.pt beside the last one, then put it in its place: a kill or a full disk
    spares what was there. The logs' sizes say what of them belongs to it."""
    logs = {file.name: file.stat().st_size for file in out.glob("*.jsonl")}
    with open(out / "checkpoint.tmp", "wb") as file:
        torch.save({"identity": identity, "step": step, "steps": steps, "logs": logs,
                    "optimizer": optimizer.state()}, file)
    os.replace(out / "checkpoint.tmp", out / "checkpoint.pt")


def open_logs(out, args, state, names=("log.jsonl",)):
    """Begin each log with a line about the run; a resumed run's are cut to what was saved."""
    if state:
        for name, size in state["logs"].items():
            os.truncate(out / name, size)
        return
    (out / "checkpoint.pt").unlink(missing_ok=True)  # of a run that has ended
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "transformers": transformers.__version__, "numpy": np.__version__}
    for name in names:
        (out / name).write_text("")
        write_line(out / name, {
            "script": Path(__file__).name, "args": vars(args), "versions": versions})


def write_line(path, record):
    """Add a line of JSON that every reader takes: null for NaN and the infinities."""
    strict = json.loads(json.dumps(record), parse_constant=lambda _: None)
    with open(path, "a") as file:
        file.write(json.dumps(strict) + "\n")


def print_step(record, steps, left, fields):
    """One line a step on a terminal, else about 30 in all."""
    step = record["step"]
    if sys.stdout.isatty() or step in (1, steps) or step % max(1, steps // 30) == 0:
        shown = "  ".join(f"{name} {record[name]:.4g}" for name in fields if name in record)
        print(f"step {step}/{steps}  {shown}  left {timedelta(seconds=int(left))}", flush=True)


def left_out(step, count, grad_norm, batch, missed, say):
    """The record of a step that changed no weight; why is added to `missed`. count: what there was
    to learn from, 0 if no process had a sample; batch: [(name, prepared), ...] of this process."""
    names = ", ".join(gather([name for name, _ in batch]))
    why = f"gradient norm {grad_norm}" if count else "no usable sample"
    missed.append(why)
    say(f"step {step} left out: {why} ({names})")
    return {"step": step, "skipped": f"{why} ({names})"}


def catch_signals():
    """A list that SIGINT, SIGTERM and SIGHUP, a closed terminal, are added to when they come: the
    step is finished, then all is saved."""
    stops = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)  # Windows has none, under nohup it stays ignored
    for number in numbers:
        signal.signal(number, lambda number, _: stops.append(number))
    return stops


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # letters that a console lacks end no run
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
    except (geometry.DataError, OSError, SafetensorError, torch.OutOfMemoryError) as error:
        sys.exit(f"actor_grpo.py: {str(error).strip().splitlines()[0]}")
