"""Stage 4 of HATCH: reinforcement learning with verifiable rewards (Action-then-Answer Reasoning,
section 3.4, appendices C and D) by Group Relative Policy Optimization as DeepSeekMath (arXiv
2402.03300) defines it.

One step, with the numbers that its parts carry in `main`:

    1  draw B prompts
    2  roll out G completions of each from the current model           rollout
    3  score them: R = R_act + R_ans + R_fmt (Eq. 8)                   rewards.total_reward
    4  compare within each group: A = (R - mean) / std                 group_advantages
    5  log p of the completions under the frozen start model           group_log_probs
    6  update: clipped ratio, minus beta KL to the start model         grpo_loss

A group is one sequence. All G completions have the same prompt, which is thousands of image tokens
long, so it is computed once: a row [prompt | c_1 | ... | c_G] in which each completion sees the
prompt and itself (layout `prompt_and_completions`). It equals G separate rows to rounding,
gradients included.

    python actor_grpo.py                           # reads out/cold_start, writes out/grpo
    python actor_grpo.py --data /path/to/spar      # the paper's values
    torchrun --nproc_per_node 4 actor_grpo.py --data ...    # each process takes whole prompts

Writes --out: the model (an ordinary Hugging Face directory), log.jsonl, rollouts.jsonl (whole
responses with their rewards), checkpoint.safetensors (for --resume).

Axes: B prompts, G completions, L prompt tokens, T completion tokens, D feature, W words.

Deviations from DeepSeekMath's Eq. 3 and 4: the reference is the start model for the whole run (one
outer iteration); A is divided by std + 1e-4, and exactly 0 in a group without spread; log-ratios
are clamped to +-20; log p is that of the tempered policy, over all words, while sampling leaves the
vision tokens out.
Beyond the paper: the choices tagged "not in the paper" on their lines; the README lists them.
"""

import argparse
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    apply_rotary_pos_emb, apply_rotary_pos_emb_vision)

import geometry
import rewards

DEMO = Path("out/demo")
MADE_BY = {"out/cold_start": "python actor_sft.py --target actions"}  # the stage before
END = ["<|im_end|>", "<|endoftext|>"]  # of a turn; of a text, which a base model may write instead
BANNED = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",  # not in the paper
          "<|image_pad|>", "<|video_pad|>"]


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description="GRPO: reinforcement learning of Qwen2.5-VL with verifiable rewards.")
    # what to train on what
    p.add_argument("--model", default="out/cold_start", help="model directory or hub id")
    p.add_argument("--data", help="SPAR-7M-RGBD tree; default: the demo's rooms")
    p.add_argument("--out", default="out/grpo", help="where the model and the log go")
    p.add_argument("--samples", type=int, default=10_000,
                   help="how many multi-image samples to draw (paper: 10,000)")
    p.add_argument("--max-pixels", type=int, default=448 * 448,
                   help="budget per image; larger ones are scaled down")
    p.add_argument("--max-tokens", type=int, default=8192,
                   help="longest prompt; a sample that is longer is left out")
    p.add_argument("--freeze", choices=("vision", "language"),
                   help="keep the image encoder, or the language model, as it is; with vision, "
                        "images are encoded once a step instead of three times")
    # rewards
    p.add_argument("--reasoning", choices=("action", "language"), default="action",
                   help="what comes before the answer: camera moves, or words (Table 3's ablation)")
    p.add_argument("--weights", type=float, nargs=3, default=list(rewards.WEIGHTS),
                   metavar=("ACT", "ANS", "FMT"), help="lambda 1 to 3 of Eq. 8; paper: 1 1 1")
    p.add_argument("--tau-t", type=float, default=1.0,  # not in the paper
                   help="metres at which R_act falls to 1 / e")
    p.add_argument("--tau-r", type=float, default=30.0,  # not in the paper
                   help="degrees at which R_act falls to 1 / e")
    # the objective
    p.add_argument("--group", type=int, default=8, help="G: completions of each prompt; paper: 8")
    p.add_argument("--beta", type=float, default=0.01,
                   help="weight of the KL term; 0 leaves the reference out; paper: 0.01")
    p.add_argument("--clip-ratio", type=float, default=0.2,  # not in the paper
                   help="how far the ratio counts; matters with --updates above 1 only")
    p.add_argument("--updates", type=int, default=1,  # not in the paper
                   help="mu: optimiser steps on the same completions")
    p.add_argument("--temperature", type=float, default=1.0,  # not in the paper
                   help="of sampling, and of log p in the objective; 1 is the model's own "
                        "distribution")
    p.add_argument("--max-new-tokens", type=int,  # not in the paper
                   help="longest completion; default: 96 + 64 a pair of views, 256 for language")
    # optimisation
    p.add_argument("--steps", type=int, help="default: one epoch; demo: 100")
    p.add_argument("--batch", type=int, default=4,
                   help="B: prompts a step over all processes; paper: a global batch of 32, read "
                        "here as 4 prompts x 8 completions")
    p.add_argument("--lr", type=float, help="fixed; paper: 1e-5; demo: 2e-4")
    p.add_argument("--clip", type=float, default=1.0,  # not in the paper
                   help="largest gradient norm")
    p.add_argument("--seed", type=int, default=0, help="decides which samples, and all sampling")
    # the machine
    p.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                   help="of the working weights; auto: bf16 on CUDA, fp32 on a CPU. "
                        "Master weights are always fp32")
    p.add_argument("--offload", action="store_true",
                   help="keep master weights and moments in host memory: slower steps, but on the "
                        "GPU 2 bytes a parameter instead of 18")
    p.add_argument("--no-recompute", action="store_true",
                   help="keep activations instead of recomputing them: faster, more memory")
    p.add_argument("--workers", type=int, default=min(8, os.cpu_count()),
                   help="threads that prepare samples ahead")
    # looking and saving
    p.add_argument("--rollouts-every", type=int, default=10,
                   help="steps between the groups that rollouts.jsonl keeps")
    p.add_argument("--save-every", type=int, help="steps between checkpoints; default: a quarter")
    p.add_argument("--resume", action="store_true", help="continue from --out's checkpoint")
    args = p.parse_args(argv)

    args.demo = args.data is None
    if args.demo:  # the only place where demo and real run differ
        args.data, args.no_recompute = str(DEMO / "data"), True
        scale = {"lr": 2e-4, "steps": 100}
    else:
        scale = {"lr": 1e-5, "steps": None}
    for name, value in scale.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.seed < 0:
        p.error(f"--seed must be 0 or more, got {args.seed}")
    for name in ("samples", "max_pixels", "max_tokens", "updates", "max_new_tokens", "steps",
                 "batch", "workers", "rollouts_every", "save_every"):
        value = getattr(args, name)
        if value is not None and value < 1:
            p.error(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    if args.group < 2:
        p.error(f"--group must be 2 or more, got {args.group}: one completion has none to be "
                "compared with")
    for name in ("lr", "clip", "tau_t", "tau_r", "temperature", "clip_ratio"):
        if not getattr(args, name) > 0:
            p.error(f"--{name.replace('_', '-')} must be above 0, got {getattr(args, name)}")
    if not args.beta >= 0:
        p.error(f"--beta must be 0 or more, got {args.beta}")
    return args


# ------------------------------------------------------------------------------------ the method


def group_advantages(R):
    """A (G,): how much better each completion is than its group, in standard deviations.

    R (G,) rewards. A group whose rewards are all equal has no better and no worse: exactly 0, since
    even equal float numbers can have a standard deviation that is not.
    """
    if R.max() - R.min() < 1e-6:
        return torch.zeros_like(R)
    return (R - R.mean()) / (R.std() + 1e-4)  # ddof 1; not in the paper


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
    k3 = torch.zeros_like(log_p)
    if beta:
        log_r = (ref - log_p).clamp(-20, 20)
        k3 = log_r.exp() - log_r - 1  # unbiased and never negative, (G, T)
    per_token = -(gain - beta * k3) * mask
    length = mask.sum(-1)  # (G,)
    loss = (per_token.sum(-1) / length).mean()  # mean of each sequence, then of the group
    k3, ratio = k3.detach()[mask], ratio.detach()[mask]
    return loss, {"kl": k3.mean(), "kl_max": k3.max(), "ratio_max": ratio.max(),
                  "clip_share": ((ratio - 1).abs() > clip_ratio).float().mean()}


def sample_tokens(logits, u, temperature, banned):
    """One token a row, and its log p: logits (N, W), u (N,) uniform in [0, 1) -> (N,), (N,).

    The inverse of the cumulative distribution. Only the `banned` words never come; log p is over
    all words, as in the objective.
    """
    log_p = torch.log_softmax(logits.float() / temperature, -1)  # (N, W)
    p = log_p.exp()
    p[:, banned] = 0
    steps = p.double().cumsum(-1)
    token = torch.searchsorted(steps, u[:, None] * steps[:, -1:], right=True)
    token = token.clamp(max=logits.shape[-1] - 1)  # for NaN, which the loss will tell of
    return token[:, 0], log_p.gather(-1, token)[:, 0]


def uniforms(seed, step, prompt, G, T):
    """The noise of one group, (G, T): a function of seed, step, prompt and completion alone, so
    that a resumed run, or one on more processes, samples the same."""
    return torch.tensor(np.stack([
        np.random.default_rng([seed, 3, step, prompt, g]).random(T) for g in range(G)]))


def prompt_and_completions(layer, q, k, v, L, G, mask):
    """Layout of [prompt | c_1 | ... | c_G]: q, k, v (1, heads, L + G * T, d).

    The prompt sees itself; completion g sees the prompt and itself. mask (T, L + T) bool.
    """
    prompt = F.scaled_dot_product_attention(
        q[:, :, :L], k[:, :, :L], v[:, :, :L], is_causal=True, enable_gqa=True)
    q, own_k, own_v = (x[0, :, L:].unflatten(1, (G, -1)).transpose(0, 1) for x in (q, k, v))
    k, v = (torch.cat([x[:, :, :L].expand(G, -1, -1, -1), own], dim=2)  # (G, heads, L + T, d)
            for x, own in ((k, own_k), (v, own_v)))
    completions = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return torch.cat([prompt, completions.transpose(0, 1).flatten(1, 2)[None]], dim=2)


def row_positions(prompt, G, T):
    """Rotary positions (3, L + G * T) of a row: every completion goes on at the prompt's end."""
    after = prompt.positions.max() + 1 + torch.arange(T)
    return torch.cat([prompt.positions, after.repeat(G).expand(3, -1)], dim=1)


def group_log_probs(model, prompt, tokens, mask, temperature, images=None):
    """log p of every completion token, (G, T) fp32, 0 where mask is False.

    prompt: Prompt; tokens, mask (G, T); temperature: that of sampling; images: the prompt's image
    tokens, if they are known already.
    """
    (G, T), L, device = tokens.shape, len(prompt.ids), tokens.device
    ids = prompt.ids.to(device)
    features = torch.cat([embed(model, ids, prompt.patches, prompt.grids, images),
                          model.get_input_embeddings()(tokens.flatten())])  # (L + G * T, D)
    sees = torch.ones(T, L + T, dtype=torch.bool, device=device).tril(L)
    hidden = model.model.language_model(
        inputs_embeds=features[None],
        position_ids=row_positions(prompt, G, T)[:, None].to(device),
        attention_mask={"full_attention": None}, use_cache=False,
        layout=partial(prompt_and_completions, L=L, G=G, mask=sees)).last_hidden_state[0]
    # the features of a token predict the one after it; the prompt's last one, every first token
    first, own = hidden[L - 1].expand(G, 1, -1), hidden[L:].unflatten(0, (G, T))
    predicts = torch.cat([first, own[:, :-1]], dim=1)  # (G, T, D)
    log_p, _ = TokenLogProbs.apply(
        predicts[mask] / temperature, model.lm_head.weight, tokens[mask])
    return torch.zeros(G, T, device=device).masked_scatter(mask, log_p)


def rollout(model, prompts, noise, budgets, temperature, banned, end, images):
    """Sample G completions of each prompt, all in one loop: tokens, mask, log p, each (B, G, T).

    noise (B, G, longest) uniform; budgets: most tokens for each prompt; banned, end: token ids;
    images: image tokens of each prompt, or None. mask: up to and with the first end token. The
    prompts are computed once and their keys and values kept; at each step the G tokens of a group
    are G queries at one position, and the keys lie as [prompt | G of step 0 | G of step 1 | ...].
    """
    device, (B, G, longest) = noise.device, noise.shape
    lengths = [len(prompt.ids) for prompt in prompts]
    L, text = max(lengths), model.config.text_config
    d = text.hidden_size // text.num_attention_heads
    shape = (2, B, text.num_key_value_heads, L + G * longest, d)
    cache = [torch.zeros(shape, dtype=model.dtype, device=device)
             for _ in range(text.num_hidden_layers)]
    sees = torch.zeros(B, 1, G, L + G * longest, dtype=torch.bool, device=device)
    for b, length in enumerate(lengths):
        sees[b, :, :, :length] = True
    sees[:, :, :, L:] = torch.eye(G, dtype=torch.bool, device=device).repeat(1, longest)
    after = torch.tensor([int(prompt.positions.max()) + 1 for prompt in prompts], device=device)
    language = model.model.language_model
    cos, sin = language.rotary_emb(cache[0], (after[:, None] + torch.arange(
        longest, device=device)).expand(3, -1, -1))  # (B, longest, d): all completions' positions
    budgets = torch.tensor(budgets, device=device)[:, None]

    features = torch.cat([embed(model, prompt.ids.to(device), prompt.patches, prompt.grids, its)
                          for prompt, its in zip(prompts, images)])
    hidden = language(
        inputs_embeds=features[None], use_cache=False, attention_mask={"full_attention": None},
        position_ids=torch.cat([prompt.positions for prompt in prompts], dim=1)[:, None].to(device),
        layout=partial(fill_cache, cache=cache, lengths=lengths)).last_hidden_state[0]
    last = torch.tensor(lengths, device=device).cumsum(0) - 1
    hidden = hidden[last, None].expand(B, G, -1)  # every completion starts from the prompt's last
    tokens = torch.full((B, G, longest), end[0], device=device)
    mask, log_p = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(noise).float()
    going = torch.ones(B, G, dtype=torch.bool, device=device)
    for t in range(longest):
        logits = model.lm_head(hidden).flatten(0, 1)  # (B * G, W)
        chosen, its = sample_tokens(logits, noise[:, :, t].flatten(), temperature, banned)
        chosen, log_p[:, :, t] = chosen.view(B, G), its.view(B, G)
        tokens[:, :, t] = torch.where(going, chosen, end[0])
        mask[:, :, t] = going
        going = going & ~torch.isin(chosen, chosen.new_tensor(end)) & (t + 1 < budgets)
        if not going.any():
            break
        hidden = decode_step(
            language, model.get_input_embeddings()(tokens[:, :, t]), cos[:, t, None],
            sin[:, t, None], partial(read_cache, cache=cache, at=L + G * t, sees=sees))
    return tokens[:, :, :t + 1], mask[:, :, :t + 1], log_p[:, :, :t + 1]


def decode_step(language, features, cos, sin, layout):
    """The language model on one new token of every completion: features (B, G, D) -> the same.

    Written out, since so small a step spends its time on calls: what the library's layers compute,
    with fewer of them. cos, sin (B, 1, d) of the one position that a prompt's completions share.
    """
    for layer in language.layers:
        attention, x = layer.self_attn, rms_norm(layer.input_layernorm, features)
        q, k, v = (project(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                   for project in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        out = layout(attention.layer_idx, q, k, v)  # (B, heads, G, d)
        features = features + attention.o_proj(out.transpose(1, 2).flatten(2))
        features = features + layer.mlp(rms_norm(layer.post_attention_layernorm, features))
    return rms_norm(language.norm, features)


def rms_norm(norm, x):
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def fill_cache(layer, q, k, v, cache, lengths):
    """Layout of a row of prompts, each_alone, whose keys and values are kept for read_cache."""
    for b, (one_k, one_v) in enumerate(zip(k.split(lengths, dim=2), v.split(lengths, dim=2))):
        cache[layer][:, b, :, :lengths[b]] = torch.cat([one_k, one_v])
    return each_alone(layer, q, k, v, lengths)


def read_cache(layer, q, k, v, cache, at, sees):
    """Layout of one new token of every completion: q, k, v (B, heads, G, d), cached at `at`."""
    G = q.shape[2]
    cache[layer][:, :, :, at:at + G] = torch.stack([k, v])
    return F.scaled_dot_product_attention(q, *cache[layer][:, :, :, :at + G],
                                          attn_mask=sees[..., :at + G], enable_gqa=True)


# -------------------------------------------------------- prompt, positions, attention, log p


def chat_prompt(text, image_tokens):
    """What the model reads before its response: the images, then the text, as Qwen's ChatML.

    image_tokens: how many merged tokens each image has. Equal to the published chat template with
    each <|image_pad|> repeated so often.
    """
    images = "".join(f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in image_tokens)
    return ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n{images}{text}<|im_end|>\n<|im_start|>assistant\n")


def rope_positions(ids, image_token, sizes):
    """Rotary positions (3, L) of tokens ids (L,): time, row and column.

    Text counts up in all three alike. The tokens of an image, of `sizes` [(h, w), ...] merged
    tokens, share one time and have its rows and columns; text goes on behind the largest.
    """
    parts, here, at = [], 0, 0  # here: token; at: position
    for h, w in sizes:
        text = int((ids[here:] == image_token).nonzero()[0])
        parts.append(at + torch.arange(text).expand(3, -1))
        at += text
        row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        parts.append(at + torch.stack([torch.zeros(h * w).long(), row.flatten(), column.flatten()]))
        here, at = here + text + h * w, at + max(h, w)
    parts.append(at + torch.arange(len(ids) - here).expand(3, -1))
    return torch.cat(parts, dim=1)


def embed(model, ids, patches, grids, images=None):
    """Words and images as features: ids (..., L), patches and grids of all images -> (..., L, D).

    images: the image tokens (sum of h * w, D), if they are known already.
    """
    features = model.get_input_embeddings()(ids)
    if images is None:
        images = encode_images(model, patches, grids, ids.device)
    here = (ids == model.config.image_token_id)[..., None]
    return features.masked_scatter(here, images.to(features.dtype))


def encode_images(model, patches, grids, device):
    """Image tokens (sum of h * w, D) of patches, in the order in which the prompt has them."""
    return model.model.visual(patches.to(device), grid_thw=grids.to(device)).pooler_output


def attend(attention, library, hidden_states, position_embeddings, layout=None, **kwargs):
    """The language model's self-attention, with `layout` to say which token sees which.

    layout(layer, q, k, v) -> (rows, heads, tokens, d), of q, k and v (rows, their heads, tokens,
    d). Without one, the library's own, which works with its cache.
    """
    if layout is None:
        return library(hidden_states=hidden_states, position_embeddings=position_embeddings,
                       **kwargs)
    q, k, v = (project(hidden_states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
               for project in (attention.q_proj, attention.k_proj, attention.v_proj))
    q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    out = layout(attention.layer_idx, q, k, v)
    return attention.o_proj(out.transpose(1, 2).flatten(2)), None


def each_alone(layer, q, k, v, lengths):
    """Layout of a row of samples of `lengths` tokens, each causal within itself: needs no mask."""
    samples = zip(*(x.split(lengths, dim=2) for x in (q, k, v)))
    return torch.cat([F.scaled_dot_product_attention(*sample, is_causal=True, enable_gqa=True)
                      for sample in samples], dim=2)


class TokenLogProbs(torch.autograd.Function):
    """log p of target tokens, in chunks of positions: logits never exist for all of them.

    hidden (T, D), weight (W, D), targets (T,) -> log p (T,) fp32, and whether the target is the
    likeliest word (T,). With 151,936 words the logits of 2,000 tokens would be 1.2 GB, three times.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk=128):
        ctx.chunk, log_p, likeliest, normaliser = chunk, [], [], []
        for h, y in zip(hidden.split(chunk), targets.split(chunk)):
            logits = (h @ weight.T).float()  # (chunk, W)
            normaliser.append(logits.logsumexp(-1))
            log_p.append(logits.gather(-1, y[:, None])[:, 0] - normaliser[-1])
            likeliest.append(logits.argmax(-1) == y)
        ctx.save_for_backward(hidden, weight, targets, torch.cat(normaliser))
        likeliest = torch.cat(likeliest)
        ctx.mark_non_differentiable(likeliest)
        return torch.cat(log_p), likeliest

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, normaliser = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            h, y, g = hidden[part], targets[part, None], grad[part, None]
            # d log p(y) / d logits = onehot(y) - p
            d_logits = (h @ weight.T).float().sub_(normaliser[part, None]).exp_().mul_(-g)
            d_logits.scatter_add_(-1, y, g)
            d_logits = d_logits.to(weight.dtype)
            d_hidden[part] = d_logits @ weight
            if d_weight is not None:
                d_weight.addmm_(d_logits.T, h)
        return d_hidden, d_weight, None, None


# -------------------------------------------------------------------------------------- prompts


class Prompt(NamedTuple):
    """A sample as the model is asked it: ids (L,), positions (3, L), patches of all its images."""

    id: str
    ids: torch.Tensor
    positions: torch.Tensor
    patches: torch.Tensor
    grids: torch.Tensor
    gold: rewards.Gold


class Prompts:
    """Turns samples into prompts. What cannot be used is reported once, by name, and left out;
    `skipped` holds it."""

    def __init__(self, args, tokenizer, image_token):
        self.args, self.tokenizer, self.image_token = args, tokenizer, image_token
        self.skipped = set()
        self.processor = Qwen2VLImageProcessorPil(
            size={"shortest_edge": 56 * 56, "longest_edge": args.max_pixels})

    def skip(self, error):
        if str(error) not in self.skipped:
            self.skipped.add(str(error))
            print(f"skipped {error}", flush=True)

    def make(self, sample):
        """Prompt of a geometry.Sample, or None if it is left out."""
        try:
            images = self.processor(images=sample.pictures(), return_tensors="pt")
            gold = rewards.gold_of(sample)
            grids = images["image_grid_thw"]
            sizes = [tuple(size) for size in (grids[:, 1:] // self.processor.merge_size).tolist()]
            instruction = (rewards.ACTION_INSTRUCTION if self.args.reasoning == "action"
                           else rewards.LANGUAGE_INSTRUCTION)
            ids = torch.tensor(self.tokenizer(chat_prompt(
                f"{sample.question}\n{instruction}", [h * w for h, w in sizes]))["input_ids"])
            if len(ids) > self.args.max_tokens:
                raise geometry.DataError(f"{sample.id} ({sample.task}): {len(ids)} tokens, "
                                         f"--max-tokens is {self.args.max_tokens}")
        except geometry.DataError as error:
            return self.skip(error)
        return Prompt(sample.id, ids, rope_positions(ids, self.image_token, sizes),
                      images["pixel_values"], grids, gold)


def prompt_at(samples, prompts, index):
    """(name, Prompt or None) of sample `index`."""
    try:
        sample = samples[index]
    except geometry.DataError as error:
        prompts.skip(error)
        return f"sample {index}", None
    return sample.id, prompts.make(sample)


def budget(prompt, args):
    """Most tokens that a completion may have."""
    if args.max_new_tokens:
        return args.max_new_tokens
    # compact plans of Qwen's tokenizer have 67, 177 and 342 tokens for 2, 3 and 4 views
    pairs = len(rewards.required_pairs(prompt.gold.views))
    return 96 + 64 * pairs if args.reasoning == "action" else 256


def held_out(sample):
    """Whether a sample is kept from training, where the data has no val split: one set of frames in
    five, by a hash of the frames' names."""
    names = sorted("/".join(path.parts[-3:]) for path in sample.images)  # scene, folder, frame
    return zlib.crc32("|".join(names).encode()) % 5 == 0


def choose_samples(samples, own_val, args, skip):
    """Indices of the samples to train on: the drawn ones that are not held out, in random order.

    skip: told of records that cannot be read.
    """
    kept = []
    for k in np.random.default_rng([args.seed, 0]).permutation(len(samples))[:args.samples]:
        try:
            if own_val or not held_out(samples[k]):
                kept.append(int(k))
        except geometry.DataError as error:
            skip(error)
    return kept


def sample_order(drawn, seed):
    """Position k of training -> index of a sample: the drawn ones, in a new order each epoch.

    A function of (seed, k) alone, so a resumed run goes on where it stopped.
    """
    epochs = {}

    def at(k):
        epoch, place = divmod(k, len(drawn))
        if epoch not in epochs:
            epochs.clear()
            epochs[epoch] = np.random.default_rng([seed, 1, epoch]).permutation(len(drawn))
        return int(drawn[epochs[epoch][place]])

    return at


def prepared_ahead(pool, prepare, order, args, start, rank, world):
    """Yield each step's [prepare(index), ...] of this process, computed ahead by `pool`."""
    mine = range(rank, args.batch, world)
    ahead, submitted, queue = 2 + args.workers // len(mine), start, deque()
    for step in range(start, args.steps):
        while submitted < min(step + ahead, args.steps):
            queue.append([pool.submit(prepare, order(submitted * args.batch + k)) for k in mine])
            submitted += 1
        yield [job.result() for job in queue.popleft()]


# ----------------------------------------------------------------------- looking at what it learnt


def summary(groups):
    """One record of a step from its groups' (each: rewards of G completions, statistics)."""
    record = {}
    for name, key in (("reward", "total"), ("reward_action", "action"),
                      ("reward_answer", "answer"), ("reward_format", "format")):
        values = [score[key] for group in groups for score in group["scores"]]
        record |= {name: float(np.mean(values)), f"{name}_spread": float(np.std(values))}
    record["kl"] = float(np.mean([group["kl"] for group in groups]))
    record["kl_median"] = float(np.median([group["kl"] for group in groups]))
    for name in ("kl_max", "ratio_max", "gap"):
        record[name] = float(np.max([group[name] for group in groups]))
    for name in ("clip_share", "length", "truncated", "distinct"):
        record[name] = float(np.mean([group[name] for group in groups]))
    record["dead_groups"] = float(np.mean([group["dead"] for group in groups]))
    return record


def warnings_of(record, group):
    """What a record says that its reader should not miss, in words."""
    found = []
    if record["reward_format"] == 0 and record["truncated"] > 0.5:
        found.append("no completion has the form and most are cut off: raise --max-new-tokens, or "
                     "start from a cold start (actor_sft.py --target actions)")
    elif record["reward_format"] == 0:
        found.append("no completion has the form: is --model a cold start "
                     "(actor_sft.py --target actions)?")
    if record["distinct"] < 1.5:
        found.append(f"the {group} completions of a group are the same text: nothing to compare")
    elif record["dead_groups"] == 1:
        found.append("no group has any spread in its rewards: no policy gradient this step")
    if record["kl_median"] > 1:  # one unlikely token can lift the mean
        found.append(f"KL to the start model is {record['kl_median']:.1f} nats a token in half of "
                     "the groups: lower --lr, or raise --beta")
    return found


def print_rewards(record, steps, left):
    """One line a step, in place on a terminal; else about 30 in all."""
    line = f"step {record['step']}/{steps}"
    line += "".join(f"  {name} {record[key]:.{digits}f}" for name, key, digits in (
        ("R", "reward", 3), ("act", "reward_action", 3), ("ans", "reward_answer", 3),
        ("fmt", "reward_format", 2), ("KL", "kl", 4), ("grad", "grad_norm", 2),
        ("tokens", "length", 0)) if key in record) + f"  left {clock(left)}"
    live, keep = sys.stdout.isatty(), record["step"] == steps
    if live or keep or record["step"] in (1, 5) or record["step"] % max(1, steps // 30) == 0:
        print(line.ljust(100) if live else line, end="\n" if keep or not live else "\r", flush=True)


# -------------------------------------------------------------------------------------- plumbing


class Recompute(torch.autograd.Function):
    """Activation checkpointing: keep a block's input only, run it again in the backward pass."""

    @staticmethod
    def forward(ctx, run, hidden):
        ctx.run = run
        ctx.save_for_backward(hidden)
        return run(hidden)  # autograd is off in here: nothing inside the block is kept

    @staticmethod
    def backward(ctx, grad):
        hidden = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.run(hidden)
        torch.autograd.backward(out, grad)  # adds to the gradients of the block's weights
        return None, hidden.grad


def recompute_in_backward(block):
    """Wrap a transformer block so that it keeps none of its activations.

    What goes into the block must require grad, since autograd sees the hidden states only.
    """
    run = block.forward
    block.forward = lambda hidden, **kwargs: Recompute.apply(partial(run, **kwargs), hidden)


def attend_in_groups(attention, hidden, cu_seqlens, position_embeddings, **_):
    """The image encoder's attention with all windows of one length in one call; same numbers.

    The library's own loops over windows: 448x448 pixels, three views and 32 blocks are 1,356 calls
    instead of 32. hidden (L, D); cu_seqlens: where windows (or images, in full attention) begin
    and end.
    """
    L = len(hidden)
    q, k, v = attention.qkv(hidden).view(L, 3, attention.num_heads, -1).unbind(1)  # (L, heads, d)
    q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
    outs, places = [], []
    for length in lengths.unique().tolist():
        rows = starts[lengths == length, None] + torch.arange(length, device=hidden.device)
        out = F.scaled_dot_product_attention(*(x[rows].transpose(1, 2) for x in (q, k, v)))
        outs.append(out.transpose(1, 2).reshape(rows.numel(), -1))  # (windows * length, D)
        places.append(rows.flatten())
    return attention.proj(torch.cat(outs)[torch.cat(places).argsort()])


def embed_patches(embed, pixels):
    """Patch embedding as the matrix product that it is: a 3-D convolution by patch is slow."""
    return F.linear(pixels.to(embed.proj.weight.dtype), embed.proj.weight.flatten(1))


def speed_up(encoder):
    encoder.patch_embed.forward = partial(embed_patches, encoder.patch_embed)
    for block in encoder.blocks:
        block.attn.forward = partial(attend_in_groups, block.attn)
    return encoder


class Adam:
    """AdamW without weight decay, on one flat fp32 master copy of what trains in a model.

    At lr 1e-5 most updates are smaller than the spacing of bf16 numbers: weights kept in bf16 alone
    would hardly move. So the model computes in its working dtype, while the optimiser keeps fp32
    weights and moments, and rounds back after each step. An fp32 model needs no copy: its
    parameters and gradients become views of the flat vectors. fp16 gradients underflow, so the loss
    is scaled up before the backward pass and the gradient down after it.
    """

    def __init__(self, model, dtype, lr, clip, betas=(0.9, 0.999), eps=1e-8):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.lr, self.clip, self.betas, self.eps = lr, clip, betas, eps
        self.master = torch.cat([p.detach().float().flatten() for p in self.parameters])
        self.grad, self.m, self.v = (torch.zeros_like(self.master) for _ in range(3))
        self.t = self.good = 0  # updates; updates since the loss scale last changed
        self.scale = 2.0**16 if dtype == torch.float16 else 1.0
        sizes = [p.numel() for p in self.parameters]
        self.weights = [w.view_as(p) for w, p in zip(self.master.split(sizes), self.parameters)]
        self.grads = [g.view_as(p) for g, p in zip(self.grad.split(sizes), self.parameters)]
        self.shared = dtype == torch.float32
        for p, w, g in zip(self.parameters, self.weights, self.grads):
            if self.shared:
                p.data, p.grad = w, g
            else:
                p.data = w.to(dtype)
                p.register_post_accumulate_grad_hook(partial(self.take, g))
        for p in model.parameters():
            if not p.requires_grad:  # frozen: no master copy
                p.data = p.data.to(dtype)

    def backward(self, loss):
        """Add a loss's gradient, in fp32, to that of the losses before it in this step."""
        (loss * self.scale).backward()

    @staticmethod
    def take(g, p):
        """Called when p's gradient is there: the 16-bit ones never exist all at once."""
        g += p.grad.to(g.device)
        p.grad = None

    def reduce(self):
        """Sum the gradient over processes. Returns its norm, which may be inf or NaN."""
        if dist.is_initialized():
            dist.all_reduce(self.grad)
        self.grad /= self.scale
        return float(self.grad.norm())

    def step(self, norm):
        """One update, gradient clipped to self.clip. Returns the norm of the weights' change."""
        self.t, self.good = self.t + 1, self.good + 1
        self.grad *= min(1.0, self.clip / (norm + 1e-12))
        (b1, b2), change = self.betas, 0.0
        flat = (self.master, self.grad, self.m, self.v)
        for w, g, m, v in zip(*(x.split(1 << 22) for x in flat)):  # in pieces: small temporaries
            m.lerp_(g, 1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            root = (v / (1 - b2**self.t)).sqrt_().add_(self.eps)
            update = root.reciprocal_().mul_(m).mul_(self.lr / (1 - b1**self.t))
            w -= update
            change = change + update.square().sum()
        if self.scale > 1 and self.good % 1000 == 0:
            self.scale *= 2
        self.publish()
        return float(change) ** 0.5

    def skip(self):
        """Drop a non-finite gradient. Returns True if a lower loss scale may mend it."""
        self.grad.zero_()
        self.good, may_mend = 0, self.scale > 1
        self.scale = max(1.0, self.scale / 2)
        return may_mend

    def publish(self):
        """Round the master weights into the model; clear the gradient."""
        self.grad.zero_()
        if not self.shared:
            for p, w in zip(self.parameters, self.weights):
                p.data.copy_(w)

    def state(self):
        return ({"master": self.master, "m": self.m, "v": self.v},
                {"t": self.t, "scale": self.scale, "good": self.good})

    def load(self, tensors, numbers):
        for name in ("master", "m", "v"):
            getattr(self, name).copy_(tensors[name])
        self.t, self.scale, self.good = numbers["t"], numbers["scale"], numbers["good"]
        self.publish()


def save_tensors(path, tensors, metadata):
    """Write safetensors beside `path`, then rename: a kill or full disk spares the old file."""
    beside = path.with_name(path.name + ".tmp")
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, beside, metadata)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise geometry.DataError(
            f"could not save {path} ({error}). What was saved before is untouched: "
            "free some space and continue with --resume") from None


def save_checkpoint(path, optimizer, step, args):
    tensors, numbers = optimizer.state()
    state = {"step": step, "optimizer": numbers, "args": vars(args)}
    save_tensors(path, tensors, {"state": json.dumps(state)})


def read_checkpoint(path):
    """The state beside a checkpoint's tensors: {"step", "optimizer", "args"}."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["state"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise geometry.DataError(f"{path}: cannot be read as a checkpoint ({error})") from None


def check_resume(state, args, names, path):
    """Resuming is exact only with the arguments that the run was started with."""
    for name in names:
        then, now = state["args"].get(name), getattr(args, name)
        if then != now:
            raise geometry.DataError(
                f"{path} was made with --{name.replace('_', '-')} {then}, not {now}: "
                "resume with the same, or start over in another --out")


def find_model(name):
    """Directory of a model: `name` itself, or the hub's copy of it."""
    path = Path(name)
    if not path.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) or path.parent.is_dir():
            raise geometry.DataError(
                f"{name}: no such model directory. `python pasta.py --grid 4` makes a tiny one in "
                f"{DEMO / 'model'}; the paper's is Qwen/Qwen2.5-VL-3B-Instruct")
        try:
            from huggingface_hub import snapshot_download

            path = Path(snapshot_download(
                name, allow_patterns=["*.json", "*.txt", "*.jinja", "*.safetensors"]))
        except Exception as error:  # the hub raises dozens of kinds: offline, gated, misspelt, ...
            raise geometry.DataError(
                f"{name}: no such directory, and the hub has not given it either "
                f"({str(error).strip().splitlines()[0]})") from None
    if not (path / "config.json").exists() or not list(path.glob("*.safetensors")):
        raise geometry.DataError(
            f"{path}: a model directory holds config.json and *.safetensors, this one does not")
    return path


def load_model(path, args, device):
    """Model and tokenizer of a directory; the model in fp32, frozen where --freeze says."""
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise geometry.DataError(
            f"{path}: cannot be read as a Qwen2.5-VL ({str(error).splitlines()[0]})") from None
    if info["missing_keys"] or info["mismatched_keys"]:
        lacking = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
        raise geometry.DataError(f"{path}: {len(lacking)} tensors are missing or have another "
                                 f"shape than config.json says, {lacking[0]} among them")
    prepare_model(model, args.freeze, not args.no_recompute)
    if not args.offload:
        model.to(device)
    return model, tokenizer


def prepare_model(model, freeze, recompute):
    """Freeze "vision", "language" or None, and put this file's attention and recomputing in."""
    frozen = {"vision": [model.model.visual], "language": [model.model.language_model,
                                                           model.lm_head], None: []}
    for part in frozen[freeze]:
        part.requires_grad_(False)
    speed_up(model.model.visual)
    for layer in model.model.language_model.layers:
        layer.self_attn.forward = partial(attend, layer.self_attn, layer.self_attn.forward)
    if recompute:
        for block in (*model.model.visual.blocks, *model.model.language_model.layers):
            recompute_in_backward(block)


def save_whole_model(model, source, out):
    """Write `model` to `out`, and beside it what `source` has of tokenizer and processor files.

    First to out/incoming; the files are moved when all are there, so a kill harms no model.
    """
    incoming = out / "incoming"
    shutil.rmtree(incoming, ignore_errors=True)
    try:
        model.save_pretrained(incoming)
        for file in source.iterdir():
            if file.suffix in (".json", ".txt", ".jinja") and not file.match("*.index.json"):
                if not (incoming / file.name).exists():
                    shutil.copyfile(file, incoming / file.name)
    except (OSError, SafetensorError) as error:
        raise geometry.DataError(
            f"could not save {incoming} ({error}). The checkpoint is untouched: free some space "
            "and run the same command with --resume") from None
    move_in(incoming, out)


def move_in(incoming, out):
    """Move the files of a whole model from `incoming` to `out`, in place of a former model's."""
    written = {file.name for file in incoming.iterdir()}
    for name in sorted(written):
        os.replace(incoming / name, out / name)
    incoming.rmdir()
    for file in out.glob("model*.safetensors*"):  # shards of a former model would be read as well
        if file.name not in written:
            file.unlink()


def start_processes():
    """Join torchrun's process group if there is one. Returns rank, world, device."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        # both, since --offload keeps gradients in host memory
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # the others wait while the first evaluates and saves
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    return rank, world, device


def all_sum(numbers, device):
    """Each number summed over all processes."""
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def gather(items):
    """What the lists of all processes hold, in one list."""
    everyone = [items]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, items)
    return [item for its in everyone for item in its]


class Interrupt:
    """Remembers SIGINT or SIGTERM, so that the loop can finish its step and save.

    Repeats are ignored, since launchers forward what the processes have got already; only Ctrl-C
    again, five seconds later, ends the process at once.
    """

    def __init__(self):
        self.number = self.since = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number, frame):
        if not self.number:
            self.number, self.since = number, time.monotonic()
            print(f"\n{signal.Signals(number).name}: finishing this step, then saving", flush=True)
        elif number == signal.SIGINT and time.monotonic() - self.since > 5:
            sys.exit("interrupted again: not saved")


class Log:
    """log.jsonl: arguments, versions, then a line a step; on resume, lines up to that step stay."""

    def __init__(self, path, args, resumed_at):
        self.path = path
        head = {"args": vars(args), "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "numpy": np.__version__}}
        kept = []
        if resumed_at is not None and path.exists():
            for line in path.read_text().splitlines(keepends=True)[1:]:
                # a kill can cut the last line
                if line.endswith("\n") and json.loads(line)["step"] <= resumed_at:
                    kept.append(line.rstrip())
        path.write_text("\n".join([json.dumps(head), *kept]) + "\n")

    def write(self, record):
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")


def print_trainable(model, parts):
    """What trains and what is frozen: parameters of each of the named submodules."""
    for name in parts:
        parameters = list(model.get_submodule(name).parameters())
        verb = "trains" if any(p.requires_grad for p in parameters) else "frozen"
        print(f"  {verb}  {name:21} {sum(p.numel() for p in parameters):>13,}")
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"  trains  {'in all':21} {count:>13,} parameters")


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = start_processes()
    say = partial(print, flush=True) if rank == 0 else lambda *_, **__: None
    if args.batch % world:
        raise geometry.DataError(
            f"--batch {args.batch} cannot be shared by {world} processes: use --batch {world}")
    precision = {"auto": "bf16" if device.type == "cuda" else "fp32"}.get(
        args.precision, args.precision)
    if args.offload and precision == "fp32":
        raise geometry.DataError("--offload keeps the fp32 master weights in host memory and needs "
                                 "--precision bf16 or fp16 beside them")
    if args.model in MADE_BY and not (Path(args.model) / "config.json").exists():
        raise geometry.DataError(f"{args.model}: not there yet; run `{MADE_BY[args.model]}` first")
    if args.demo:
        say("Demo: rendered rooms. The real run:\n  python actor_grpo.py --data /path/to/spar")
        if not Path(args.data).is_dir():
            raise geometry.DataError(f"{args.data}: not there yet; run `python pasta.py --grid 4`, "
                                     "which renders it, or name a tree with --data")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.safetensors"

    state = None
    if args.resume:
        state = read_checkpoint(checkpoint)
        check_resume(state, args, (
            "model", "data", "samples", "max_pixels", "max_tokens", "freeze", "reasoning",
            "weights", "tau_t", "tau_r", "group", "beta", "clip_ratio", "updates", "temperature",
            "max_new_tokens", "batch", "lr", "clip", "seed", "precision"), checkpoint)
    elif checkpoint.exists() and (
            old := read_checkpoint(checkpoint))["step"] < old["args"]["steps"]:
        raise geometry.DataError(
            f"{out} holds a run stopped at step {old['step']} of {old['args']['steps']}: continue "
            f"it with --resume, or remove {checkpoint} or name another --out to start over")
    start = state["step"] if state else 0

    source = find_model(args.model)
    model, tokenizer = load_model(source, args, device)
    prompts = Prompts(args, tokenizer, model.config.image_token_id)
    samples = geometry.load_samples(args.data, tasks=geometry.MULTI_VIEW_TASKS)
    try:
        geometry.load_samples(args.data, split="val", tasks=geometry.MULTI_VIEW_TASKS)
        own_val = True
    except geometry.DataError:
        own_val = False
    drawn = choose_samples(samples, own_val, args, prompts.skip)
    if not drawn:
        raise geometry.DataError(f"{args.data}: too few samples to train on some and hold out "
                                 "others; add samples, or a val folder beside train")
    order = sample_order(drawn, args.seed)
    args.steps = args.steps or max(1, len(drawn) // args.batch)
    args.save_every = args.save_every or max(1, args.steps // 4)
    say(f"data    {args.data}: {len(samples):,} multi-image samples, {len(drawn):,} of them used")

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    optimizer = Adam(model, dtype, args.lr, args.clip)
    if args.offload:
        model.to(device)  # the working weights; the optimiser's stay in host memory
    reference = None
    if args.beta:
        reference = load_model(source, args, torch.device("cpu"))[0].requires_grad_(False)
        for p in reference.parameters():  # not .to(dtype): that would round the rotary frequencies
            p.data = p.data.to(device, dtype)
        reference.to(device)
    trained = optimizer.master.numel()
    say(f"model   {args.model}: {precision} on {device}, fp32 master weights"
        f"{' in host memory' if args.offload else ''}; "
        f"torch {torch.__version__}, transformers {transformers.__version__}")
    if rank == 0:
        print_trainable(model, ("model.visual", "model.language_model"))
    memory = dtype.itemsize * sum(p.numel() for p in model.parameters()) * (2 if reference else 1)
    memory += trained * (16 * (not args.offload) - 4 * optimizer.shared)  # shared: no copy
    say(f"memory  {memory / 2**30:.2f} GiB of weights, gradients, moments"
        f"{' and the reference' if reference else ''}, and the activations of "
        f"{'one block' if not args.no_recompute else 'all blocks'} of one group\n"
        f"batch   {args.batch} prompts x {args.group} completions a step over {world} process(es); "
        f"{args.steps - start:,} steps. Watch the reward: the loss starts near 0 by construction")

    end, banned = (tokenizer.convert_tokens_to_ids(names) for names in (END, BANNED))
    with ThreadPoolExecutor(args.workers) as pool:
        if rank == 0:
            log = Log(out / "log.jsonl", args, start if state else None)
            rollouts = Log(out / "rollouts.jsonl", args, start if state else None)
        if state:
            optimizer.load(load_file(checkpoint), state["optimizer"])

        trouble, interrupt, clock_start = 0, Interrupt(), time.monotonic()
        tick = clock_start
        # 1  draw B prompts
        batches = prepared_ahead(
            pool, partial(prompt_at, samples, prompts), order, args, start, rank, world)
        for step, batch in enumerate(batches, start + 1):
            numbers = [rank + world * k for k, (_, prompt) in enumerate(batch) if prompt]
            drawn_prompts = [prompt for _, prompt in batch if prompt]
            # means are over the groups of all processes, so that their gradients add up
            count, stop = all_sum([len(drawn_prompts), interrupt.number], device)
            groups, grad_norm, update_norm = [], 0.0, 0.0
            if drawn_prompts:
                # 2  roll out G completions of each from the current model
                budgets = [budget(prompt, args) for prompt in drawn_prompts]
                noise = torch.stack([uniforms(args.seed, step, number, args.group, max(budgets))
                                     for number in numbers]).to(device)
                with torch.no_grad():  # an encoder that is frozen sees the images once
                    images = [encode_images(model, prompt.patches, prompt.grids, device)
                              if args.freeze == "vision" else None for prompt in drawn_prompts]
                    tokens, masks, sampled = rollout(
                        model, drawn_prompts, noise, budgets, args.temperature, banned, end, images)
                for prompt, its_images, *its in zip(drawn_prompts, images, tokens, masks, sampled):
                    longest = int(its[1].any(0).sum())
                    c, mask, sampled_log_p = (x[:, :longest] for x in its)  # (G, T)
                    # 3  score them: R = R_act + R_ans + R_fmt
                    ended = torch.isin(c, c.new_tensor(end)) & mask  # (G, T), one token each
                    texts = [tokenizer.decode(one[seen]) for one, seen in zip(c, mask & ~ended)]
                    scores = [rewards.total_reward(
                        text, prompt.gold, args.weights, args.tau_t, args.tau_r,
                        block="action" if args.reasoning == "action" else "think")
                        for text in texts]
                    # 4  compare within each group
                    R = torch.tensor([score["total"] for score in scores])
                    A = group_advantages(R).to(device)
                    # 5  log p under the frozen start model
                    ref = None
                    if reference is not None:
                        with torch.no_grad():
                            ref = group_log_probs(
                                reference, prompt, c, mask, args.temperature, its_images)
                    groups.append({
                        "prompt": prompt, "images": its_images, "tokens": c, "mask": mask, "A": A,
                        "ref": ref, "sampled": sampled_log_p, "texts": texts, "scores": scores,
                        "length": float(mask.sum(-1).float().mean()),
                        "truncated": 1 - float(ended.any(-1).float().mean()),
                        "distinct": len(set(texts)), "dead": float(not A.any())})

            # 6  update: clipped ratio, minus beta KL to the start model
            skipped = None
            for update in range(args.updates):
                loss = 0.0
                for group in groups:
                    log_p = group_log_probs(model, group["prompt"], group["tokens"], group["mask"],
                                            args.temperature, group["images"])
                    if update == 0:  # the policy that sampled; computed anew, which sampling checks
                        group["old"] = log_p.detach()
                        group["gap"] = float(
                            (group["old"] - group["sampled"])[group["mask"]].abs().max())
                    one_loss, statistics = grpo_loss(
                        log_p, group["old"], group["ref"], group["A"], group["mask"],
                        args.clip_ratio, args.beta)
                    optimizer.backward(one_loss / count)
                    loss += one_loss.item() / count
                    group.update({key: float(value) for key, value in statistics.items()})
                grad_norm = optimizer.reduce()
                if count and math.isfinite(grad_norm):
                    update_norm = optimizer.step(grad_norm)
                    continue
                names = ", ".join(gather([name for name, _ in batch]))
                skipped = f"gradient norm {grad_norm}" if count else "no usable sample"
                skipped = f"update {update + 1} of {args.updates}, {skipped} ({names})"
                say(f"step {step} left out: {skipped}")
                if count and not optimizer.skip():
                    trouble += 1
                if trouble == 5:
                    raise geometry.DataError(
                        f"five steps in a row were not finite, the last being step {step}: lower "
                        "--lr, or look at the samples named above. What was saved before is in "
                        f"{out}")
                break
            trouble = trouble if skipped else 0

            kept = ("scores", "gap", "kl", "kl_max", "ratio_max", "clip_share", "length",
                    "truncated", "distinct", "dead")
            everyone = gather([{key: group[key] for key in kept} for group in groups])
            (loss,) = all_sum([loss], device)
            keep_rollouts = step == 1 or step % args.rollouts_every == 0
            shown = gather([{
                "step": step, "id": group["prompt"].id, "task": group["prompt"].gold.task,
                "gold": group["prompt"].gold.answer, "responses": [
                    {"text": text, **score, "advantage": float(a)} for text, score, a
                    in zip(group["texts"], group["scores"], group["A"])]}
                for group in groups]) if keep_rollouts else []
            now = time.monotonic()
            left = (now - clock_start) / (step - start) * (args.steps - step)
            if rank == 0:
                record = {"step": step, "skipped": skipped} if skipped else {
                    "step": step, "loss": loss, **summary(everyone), "grad_norm": grad_norm,
                    "update_norm": update_norm, "seconds": now - tick}
                if not skipped and (said := warnings_of(record, args.group)):
                    record["warnings"] = said
                    say(f"step {step}: {'; '.join(said)}")
                if stop or step == args.steps or step % args.save_every == 0:
                    save_checkpoint(checkpoint, optimizer, step, args)
                for one in shown:
                    rollouts.write(one)
                log.write(record)
                print_rewards(record, args.steps, left)
            if stop:
                gather([])  # torchrun ends all when one has ended: after the first has saved
                say(f"stopped after step {step}, saved in {out}; "
                    "the same command with --resume goes on from here")
                sys.exit(128 + (interrupt.number or signal.SIGTERM))
            tick = time.monotonic()

    skipped = set(gather(sorted(prompts.skipped)))
    if rank == 0:
        save_whole_model(model, source, out)
        if skipped:
            say(f"skipped {len(skipped)} samples that cannot be used, named above")
        say(f"wrote   {out}: the model, log.jsonl, rollouts.jsonl")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except geometry.DataError as error:
        sys.exit(f"actor_grpo.py: {error}")
    except OSError as error:  # a full disk, a file where a folder should be, no permission
        sys.exit(f"actor_grpo.py: {error}; what was saved before is untouched")
    except KeyboardInterrupt:
        sys.exit("actor_grpo.py: interrupted before training began; nothing to save")
