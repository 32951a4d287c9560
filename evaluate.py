"""Evaluation of HATCH: Tables 1 to 4 of the paper as commands, and a page to look at.

    --bench rooms      held-out rendered rooms, with SPAR-Bench's tasks (needs no download)
    --bench spar-mv    SPAR-Bench, several images    Tables 1 to 3
    --bench mindcube   MindCube-Tiny                 Table 1
    --bench mmsi       MMSI-Bench                    Table 1
    --bench spar-si    SPAR-Bench, one image         Table 4
    --bench cvbench    CV-Bench, one image           Table 4

    what is asked      the benchmark's published prompt, or ACTION_INSTRUCTION    prompt_of
    what is answered   the likeliest token each time, up to a budget a question   generate_greedily
    how it is scored   its <answer> block, as the benchmark's official code does  score_answer
    what is reported   weighted means of task means, bootstrap intervals          table_rows

    python evaluate.py                        # reads out/grpo, writes out/evaluation/rooms
    python evaluate.py --blind                # the same, every picture grey
    python evaluate.py --bench spar-mv --data /path/to/SPAR-Bench
    python evaluate.py --score a/predictions.jsonl b/predictions.jsonl    # no model: scores only
    python evaluate.py --curves out/*/log.jsonl                           # training curves only
    python evaluate.py --images a.jpg b.jpg --ask "How did the camera turn from view 0 to view 1?"
    torchrun --nproc_per_node 4 evaluate.py --bench mmsi --data /path/to/MMSI-Bench

Writes --out: predictions.jsonl (as they are made: an interrupted evaluation continues),
results.json, report.html.

Deviations from the official scorers: a response ends at its first end token; the answer is cut out
of <answer>, or else of what follows reasoning, and stripped before the official rule sees it; an
empty answer scores 0, where SPAR-Bench's own code scores it 1.
"""

import argparse
import base64
import io
import itertools
import json
import math
import os
import re
import sys
import zlib
from collections import Counter
from datetime import timedelta
from functools import partial, reduce
from html import escape
from pathlib import Path
from typing import Callable, NamedTuple

# Torch reads this when it is imported. Without it, freed memory is left in pieces of no use.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from PIL import Image, ImageOps
from safetensors import safe_open
from transformers import (
    AutoTokenizer, GenerationConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil)

import geometry
import rewards


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Evaluate a Qwen2.5-VL on spatial benchmarks.")
    # what to evaluate on what
    p.add_argument("--bench", choices=tuple(BENCHES), help="default: rooms")
    p.add_argument("--model", help="directory or hub id; default: out/grpo. With --score: its name")
    p.add_argument("--data", help="the benchmark's file or folder; default: the demo's rooms")
    p.add_argument("--mode", choices=("action", "language", "direct"),
                   help="asked for before the answer: camera moves, words (Table 3), nothing; "
                        "about a single image always nothing")
    p.add_argument("--blind", action="store_true", help="every picture grey: what questions tell")
    p.add_argument("--limit", type=int, help="how many questions, sampled at random; default: all")
    # your own photos
    p.add_argument("--images", nargs="+", metavar="FILE", help="what to --ask about; then no bench")
    p.add_argument("--ask", metavar="QUESTION", help="print the response, its moves, its answer")
    # without a model
    p.add_argument("--score", nargs="+", metavar="FILE",
                   help="score these predictions.jsonl, of any engine, instead of making some")
    p.add_argument("--curves", nargs="+", metavar="FILE",
                   help="draw these log.jsonl; default: out/*/log.jsonl. Alone: writes curves.svg")
    p.add_argument("--convention", choices=("hatch", "spar"), default="hatch",
                   help="SPAR-Bench's averages: over questions, as the paper's, or over task means")
    # generation
    p.add_argument("--max-pixels", type=int,
                   help="per image; default: 448 * 448, demo 112 * 112, mindcube 480 * 480")
    p.add_argument("--max-new-tokens", type=int,  # not in the paper: longest completion
                   help="default: 96 + 64 a pair of views, 256 for language, for direct answers "
                        "as the benchmark's own code")
    p.add_argument("--batch", type=int, default=16, help="questions at a time, over all processes")
    p.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                   help="auto: bf16 on CUDA, fp16 on a GPU without bf16, fp32 on a CPU")
    p.add_argument("--workers", type=int, default=min(8, os.cpu_count()),
                   help="threads that prepare questions ahead")
    # looking
    p.add_argument("--out", help="default: out/evaluation, and the benchmark's name below it")
    p.add_argument("--overwrite", action="store_true", help="start over, whatever --out holds")
    p.add_argument("--show", type=int, default=24, help="questions in report.html")
    args = p.parse_args(argv)

    for name, value in vars(args).items():
        least = 0 if name == "show" else 1
        if type(value) is int and value < least:
            p.error(f"--{name.replace('_', '-')} is out of range: {value}")
    asks_else = args.bench or args.data or args.score or args.curves
    if bool(args.ask) != bool(args.images) or (args.ask and asks_else):
        p.error("--images FILE ... and --ask QUESTION go together, and without a benchmark's flags")
    curves_alone = args.curves and not (args.bench or args.data or args.model)
    args.needs_model = not args.score and not curves_alone
    if not args.needs_model:
        args.out = args.out or "out/evaluation"
        return args
    args.bench = args.bench or "rooms"
    args.model = args.model or "out/grpo"
    if args.bench == "rooms" and args.data is None and not args.ask:  # all that differs in the demo
        args.data = "out/demo/data"
        args.max_pixels = args.max_pixels or 112 * 112
    benchmark = BENCHES[args.bench]
    single = args.bench in ("spar-si", "cvbench")
    if args.data is None and not args.ask:
        p.error(f"--bench {args.bench} needs --data: {benchmark.data}")
    if args.mode not in (None, "direct") and single:
        p.error(f"--bench {args.bench} has one image a question: it is asked about directly")
    folder = f"{args.bench}-blind" if args.blind else args.bench
    args.out = args.out or f"out/evaluation/{folder}"
    args.mode = args.mode or ("direct" if single else "action")
    args.max_pixels = args.max_pixels or benchmark.max_pixels
    return args


# --------------------------------------------------------------------------------- what is asked


class Item(NamedTuple):
    """A question of a benchmark, as its published file has it."""

    id: str
    task: str  # what scores are averaged over
    question: str
    gold: str
    images: Callable  # call it for the PIL images, `views` of them
    views: int
    poses: np.ndarray | None = None  # cam2world (views, 4, 4), where they are known


SPAR_LEVELS = {
    "Low": tuple(f"{what}_prediction_{of}{views}" for views in ("", "_mv")
                 for what in ("depth", "distance") for of in ("oc", "oo")),
    "Middle": ("position_matching", "camera_motion_infer", "view_change_infer"),
    "High": ("distance_infer_center_oo", "distance_infer_center_oo_mv", "obj_spatial_relation_oo",
             "obj_spatial_relation_oc_mv", "obj_spatial_relation_oo_mv", "spatial_imagination_oc",
             "spatial_imagination_oc_mv", "spatial_imagination_oo", "spatial_imagination_oo_mv")}
SPAR_MULTI_VIEW = tuple(task for task in itertools.chain(*SPAR_LEVELS.values())
                        if task.endswith("_mv") or task in SPAR_LEVELS["Middle"])
MINDCUBE_SETTINGS = ("around", "rotation", "translation", "among", "other")
MMSI_GROUPS = {
    "Position": tuple(f"Positional Relationship ({pair})" for pair in (
        "Cam.–Cam.", "Obj.–Obj.", "Reg.–Reg.", "Cam.–Obj.", "Obj.–Reg.", "Cam.–Reg.")),
    "Attribute": ("Attribute (Meas.)", "Attribute (Appr.)"),
    "Motion": ("Motion (Cam.)", "Motion (Obj.)"), "MSR": ("MSR",)}

# The benchmarks' own prompts, to the letter; of SPAR-Bench by task.
BY_LETTER = "Answer with the option's letter from the given choices directly."
SPAR_PROMPTS = {
    **dict.fromkeys(SPAR_LEVELS["Low"],
                    "\n{question}\nPlease answer the question using a single word or phrase."),
    **dict.fromkeys(SPAR_LEVELS["Middle"],
                    "\n{question}\nThe values represent the bounding box coordinates normalized to "
                    "a 0-1000 scale, with the top-left corner as the origin of the image.\n"
                    + BY_LETTER),
    **dict.fromkeys(SPAR_LEVELS["High"], "\n{question}\n\n" + BY_LETTER),
    "view_change_infer": "\n{question}\n\n"}
MINDCUBE_PROMPT = (
    "[Task]\nYour task is to analyze the spatial arrangement of objects in the scene by examining "
    "the provided images, which show the scene from different viewpoints.\n[Answer Instruction]\n"
    "You only need to provide *ONE* correct answer selecting from the options listed below. For "
    "example, if you think the correct answer is 'A. Above' from 'A. Above B. Under C. Front D. "
    "Behind', your response should **only** be '<answer>A. Above</answer>'.\n\n[Question]\n"
    "{question}")
MMSI_PROMPT = "{question}\n" + BY_LETTER + " Enclose the option's letter within ``."
INSTRUCTIONS = {"action": rewards.ACTION_INSTRUCTION, "language": rewards.LANGUAGE_INSTRUCTION}


def prompt_of(item, bench, mode):
    """The text behind the images. mode "direct", or one image: the published prompt (the rooms':
    what training asked); "action", "language": what training asked, since HATCH's are unpublished.
    """
    if mode in INSTRUCTIONS and item.views > 1:
        return f"{item.question}\n{INSTRUCTIONS[mode]}"  # not in the paper: prompts
    return BENCHES[bench].prompt[item.task].replace("{question}", item.question)


# ------------------------------------------------------------------------------ what is answered


def ask_all(items, args, path, say, rank, world, device, dtype):
    """Ask a model those of `items` that predictions.jsonl at `path` has no line for."""
    source, model, tokenizer = load_model(args.model)
    wanted = sampled(items, args.limit)
    done = []
    if rank == 0:
        done = continue_predictions(path, items, wanted, args, source, dtype, say)
    done = set(gather(done))
    todo = [item for item in wanted if item.id not in done]
    say(f"data    {args.data}: {len(items):,} questions of {BENCHES[args.bench].title}, "
        f"{len(todo):,} to be asked")
    if not todo:
        return
    weights = sum(parameter.numel() for parameter in model.parameters())
    say(f"model   {args.model}: {weights:,} parameters, {dtype} on {device}; mode {args.mode}")
    say(f"memory  {dtype.itemsize * weights / 2**30:.2f} GiB of weights; activations come on top")
    place(model.eval(), dtype, device)
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": args.max_pixels})
    share = max(1, min(args.batch, len(todo)) // world)  # of each process
    batches = math.ceil(len(todo) / (share * world))
    prepare = partial(ask, todo, args, tokenizer, processor)
    prepared = geometry.read_ahead(prepare, range(rank, batches * share * world, world),
                                   args.workers)
    shown_batches = range(batches)
    if rank == 0:
        shown_batches = geometry.progress(shown_batches, batches, "answering")
    for _ in shown_batches:
        asked = [one for one in itertools.islice(prepared, share) if one]
        write_answers(model, tokenizer, [one for one in asked if one[2]], args)
        lines = gather([line for _, line, _ in asked])
        if rank == 0:
            with open(path, "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)


def ask(items, args, tokenizer, processor, k):
    """items[k], its line for predictions.jsonl, and (ids, images) for the model, None where it
    cannot be asked: the line says why. None behind the last."""
    if k >= len(items):
        return None
    item = items[k]
    line = {"id": item.id, "task": item.task, "question": item.question, "gold": item.gold}
    try:
        pictures = item.images()
        if args.blind:
            pictures = [Image.new("RGB", picture.size, "grey") for picture in pictures]
        text = prompt_of(item, args.bench, args.mode)
        prompt = rewards.encode_prompt(tokenizer, processor, pictures, text, item.id)
        return item, line, prompt
    except (OSError, ValueError, TypeError) as error:  # DataError is a ValueError
        return item, line | {"skipped": str(error)}, None


def write_answers(model, tokenizer, asked, args):
    """Put the model's responses into the lines of what `ask` returned. DataError without one."""
    if not asked:
        return
    prompts = [prompt for *_, prompt in asked]
    longest = [longest_response(item, args) for item, *_ in asked]
    texts = generate_greedily(model, tokenizer, prompts, longest)
    for (item, line, _), text in zip(asked, texts):
        if text is None:
            raise geometry.DataError(f"{item.id} ({item.task}): the model's logits are not finite "
                                     f"in --precision {args.precision}; try another one")
        line["response"] = text


def answer_one(args, dtype, device):
    """Ask the model the one question --ask about --images; print what it says."""
    # a phone's photo may lie on its side, and say so in its EXIF data
    pictures = [ImageOps.exif_transpose(geometry.open_image(path)) for path in args.images]
    _, model, tokenizer = load_model(args.model)
    place(model.eval(), dtype, device)
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": args.max_pixels})
    item = Item("--ask", "camera_turn", args.ask, "", lambda: pictures, len(pictures))
    _, line, prompt = ask([item], args, tokenizer, processor, 0)
    if prompt is None:
        raise geometry.DataError(line["skipped"])
    write_answers(model, tokenizer, [(item, line, prompt)], args)
    response = line["response"]
    print(f"response  {response}")
    for (i, j), plan in (rewards.parse_response(response).actions or {}).items():
        moves = [f"{name} {amount}" for action in plan for name, amount in action.items()]
        print(f"moves     view {i} to view {j}: {', '.join(moves) or 'none'}")
    if args.mode == "action" and item.views > 1 and not rewards.format_reward(response, item.views):
        print("form      not the one asked for: moves and answer are what can be read")
    print(f"answer    {answer_of(response)}")


def longest_response(item, args):
    """How many tokens a response to this question may have, whatever is asked beside it."""
    if args.max_new_tokens:
        return args.max_new_tokens
    if args.mode == "action":
        return 96 + 64 * len(rewards.required_pairs(item.views))
    if args.mode == "language":
        return 256
    return BENCHES[args.bench].longest


def generate_greedily(model, tokenizer, prompts, longest):
    """The response that the model writes to each prompt if it takes the likeliest token each time.

    prompts: [(ids, images) of rewards.encode_prompt]; longest: for each the tokens that its
    response may have. Returns a list of texts, None where a logit was NaN or +inf: then no token is
    the likeliest. All prompts are one batch, padded on the left; a response ends before its first
    end token, and what the batch writes behind its `longest` tokens does not count.
    """
    end = tokenizer.convert_tokens_to_ids(rewards.END)
    L = max(len(ids) for ids, _ in prompts)
    rows = [[end[0]] * (L - len(ids)) + list(ids) for ids, _ in prompts]
    seen = [[0] * (L - len(ids)) + [1] * len(ids) for ids, _ in prompts]
    rows = torch.tensor(rows, device=model.device)  # (B, L)
    pixels = torch.cat([images["pixel_values"] for _, images in prompts])
    grids = torch.cat([images["image_grid_thw"] for _, images in prompts])
    sound = torch.zeros(len(prompts), dtype=torch.long, device=model.device)
    model.generation_config = GenerationConfig()  # not the checkpoint's, which fills unset fields
    with torch.no_grad():
        written = model.generate(
            input_ids=rows, attention_mask=torch.tensor(seen, device=model.device),
            mm_token_type_ids=(rows == model.config.image_token_id).int(),
            pixel_values=pixels.to(model.device), image_grid_thw=grids.to(model.device),
            max_new_tokens=max(longest), do_sample=False, eos_token_id=end, pad_token_id=end[0],
            logits_processor=[partial(count_sound, sound, L)])
    texts = []
    for tokens, budget, sound_tokens in zip(written[:, L:].tolist(), longest, sound.tolist()):
        tokens = tokens[:budget]
        length = min([k for k, token in enumerate(tokens) if token in end], default=len(tokens))
        chosen = min(length + 1, len(tokens))  # the end token, too, if there is one
        texts.append(tokenizer.decode(tokens[:length]) if sound_tokens >= chosen else None)
    return texts


def count_sound(sound, L, ids, logits):
    """Called by `generate` before it chooses each token: ids (B, L + t), logits (B, W).

    Counts in `sound` (B,), in place, each row's tokens before the first whose logits hold NaN or
    +inf. It stays on the device, so that no token waits for the host.
    """
    fine = (logits < math.inf).all(-1)
    sound += fine & (sound == ids.shape[1] - L)  # as long as all t before were sound
    return logits


# ------------------------------------------------------------------------------ how it is scored


def before_end(text):
    """A text up to its first end token: other engines may return this token and text after it."""
    return re.split("|".join(map(re.escape, rewards.END)), text, maxsplit=1)[0]


def answer_of(response):
    """The answer in a response: its first <answer> block outside of reasoning that holds something;
    without a block, what follows the last reasoning.

    Reasoning stands between <think> or <action> and its closing tag, or the end of the text. If
    the first think tag of a text closes, a chat template had opened it before the text.
    """
    text = before_end(response)
    thoughts = re.findall("</?think>", text)
    depth = 1 if thoughts and thoughts[0] == "</think>" else 0
    outside = ""  # all that is no reasoning
    behind = ""  # what follows the last of it
    for part in re.split("(</?(?:think|action)>)", text):
        if part in ("<think>", "<action>"):
            depth += 1
            behind = ""
        elif part in ("</think>", "</action>"):
            depth = max(0, depth - 1)
            behind = ""
        elif depth == 0:
            outside += part
            behind = part
    blocks = re.findall(r"<answer>(.*?)(?=</?answer>|\Z)", outside, re.DOTALL)
    if blocks:
        return next(filter(None, map(str.strip, blocks)), "")
    return behind.strip()


def score_answer(bench, task, answer, gold):
    """Official score in [0, 1] of an answer's text (see answer_of)."""
    read_letter = BENCHES[bench].letter
    if read_letter is None:
        return score_spar(task, answer, gold)
    letter = read_letter(answer) or ""
    return float(letter.lower() == gold.lower())


def score_spar(task, prediction, gold):
    """SPAR-Bench's score of a text, in [0, 1]: its official rules, by task alone.

    Two of its oddities are kept, since they are in every published number: any part of the gold's
    text counts, and view changes are measured relative to the prediction. One is not: an empty
    prediction scores 0 here.
    """
    if not prediction:
        return 0.0
    if task == "camera_turn":  # the rooms' own, not in SPAR-Bench
        return rewards.camera_turn(prediction, gold)
    try:
        if task == "view_change_infer":  # mean of five axes; gold and prediction change places
            moved = _signed_moves(prediction)
            asked = _signed_moves(gold)
            return float(np.mean(list(map(rewards.mean_relative_accuracy, asked, moved))))
        if task in SPAR_LEVELS["Low"]:
            # as in the official code: no exponents ("m^3"); the last number if there are several
            # views (_mv), else the first
            numbers = re.findall(r"(?<!\^)\d+\.\d+|(?<!\^)\d+", prediction)
            number = numbers[-1] if task.endswith("_mv") else numbers[0]
            return rewards.mean_relative_accuracy(float(number), float(gold))
    except (IndexError, ValueError):  # no number, or an item that is not key:number
        return 0.0
    prediction = prediction.lower()
    gold = gold.lower()
    return float(prediction in gold or prediction[0] == gold)


def _signed_moves(text):
    """The signed amount along each of rewards.AXES of "move_left:2.6,rotate_up:10,..."."""
    amounts = {}
    for item in text.split(","):
        key, value = item.split(":")
        amounts[key] = float(value)
    return [amounts.get(positive, 0.0) - amounts.get(negative, 0.0)
            for positive, negative in rewards.AXES]


def mindcube_letter(text):
    """The letter A-E that MindCube's extractor reads, or None. The first rule that matches decides,
    by its last match. If none does, the last line with a letter decides, by its first one."""
    inside = re.search(r"<Answer>(.*?)(?:<|$)", text, re.DOTALL)
    for where, rules in (
            (text, (r"([A-E])\.",)),
            (inside[1] if inside else "", (
                r"[Mm]y answer is ([A-E])", r"[Tt]he answer is ([A-E])", r"\b([A-E])\b")),
            (text, (r"(?:^|\n)(?:Answer: )?([A-E])(?:$|\s)", r'[*"]([A-E])[*"]',
                    r"\bAnswer:?\s*([A-E])\b", r"[Mm]y answer is ([A-E])", r"answer is ([A-E])"))):
        for rule in rules:
            found = re.findall(rule, where)
            if found:
                return found[-1]
    for line in reversed(text.split("\n")):
        found = re.search(r"\b([A-E])\b", line)
        if found:
            return found[1]
    return None


def mmsi_letter(text):
    """The letter A-D that MMSI-Bench's extractor reads, or None."""
    for ticks in (r"``([^`]*)``", r"`([^`]*)`"):
        found = re.search(ticks, text)
        if found:
            text = found[1]
    found = re.search(r"\b[A-D]\b(?!\s[a-zA-Z])", text)
    return found[0] if found else None


def cvbench_letter(text):
    """The letter, lower case, that CV-Bench's extractors read; "" if nothing is there."""
    text = text.lower().strip()
    for phrase in ("answer is", "answer:"):
        text = text.rpartition(phrase)[2]
    return text.strip().rstrip(".:,").lstrip("(").rstrip(")")[:1]


class Bench(NamedTuple):
    """A benchmark: where it is, and how it is read, asked, scored and averaged."""

    title: str
    data: str  # what --data takes
    files: str  # a pattern of their names
    fields: tuple  # of a row: id, task, question, gold
    groups: dict  # of its table: {label: tasks}
    prompt: dict  # {task: text}, the question in place of {question}
    letter: Callable | None = None  # reads a choice from an answer; None: score_spar
    longest: int = 128  # tokens of a direct answer
    max_pixels: int = 448 * 448


# data, files and fields of both halves of SPAR-Bench
SPAR = ("a copy of huggingface.co/datasets/jasonzhango/SPAR-Bench",
        "test-*.parquet", ("id", "task", "question", "answer"))
BENCHES = {
    "rooms": Bench(
        "Rendered rooms", "the folder that `python pasta.py --grid 4` rendered", "rooms.jsonl",
        SPAR[2], SPAR_LEVELS | {"Middle": (*SPAR_LEVELS["Middle"], "camera_turn")},
        dict.fromkeys((*SPAR_MULTI_VIEW, "camera_turn"),
                      "{question}\n" + rewards.ANSWER_INSTRUCTION)),
    "spar-mv": Bench("SPAR-Bench-MV", *SPAR, SPAR_LEVELS, {
        task: SPAR_PROMPTS[task] for task in SPAR_MULTI_VIEW}, longest=100),
    "mindcube": Bench(
        "MindCube-Tiny", "a copy of huggingface.co/datasets/MLL-Lab/MindCube, data.zip unpacked",
        "MindCube_tinybench.jsonl", ("id", "id", "question", "gt_answer"),
        {name.capitalize(): (name,) for name in MINDCUBE_SETTINGS},
        dict.fromkeys(MINDCUBE_SETTINGS, MINDCUBE_PROMPT), mindcube_letter, 4096, 480 * 480),
    "mmsi": Bench(
        "MMSI-Bench", "a copy of huggingface.co/datasets/RunsenXu/MMSI-Bench",
        "MMSI_Bench.parquet", ("id", "question_type", "question", "answer"), MMSI_GROUPS,
        dict.fromkeys(itertools.chain(*MMSI_GROUPS.values()), MMSI_PROMPT), mmsi_letter),
    "spar-si": Bench("SPAR-Bench-SI", *SPAR, SPAR_LEVELS, {
        task: SPAR_PROMPTS[task] for task in SPAR_PROMPTS if task not in SPAR_MULTI_VIEW},
        longest=100),
    "cvbench": Bench(
        "CV-Bench", "a copy of huggingface.co/datasets/nyu-visionx/CV-Bench",
        "test_*.parquet", ("idx", "source", "prompt", "answer"),
        {"2D": ("ADE20K", "COCO"), "3D": ("Omni3D",)},
        dict.fromkeys(("ADE20K", "COCO", "Omni3D"), "{question}\n" + BY_LETTER), cvbench_letter)}


# ------------------------------------------------------------------------------ what is reported

PAPER_NAMES = ("Qwen2.5-VL-3B (paper)", "HATCH (paper)")
PAPER = {  # Tables 1 and 4
    "spar-mv": {"Low": (13.4, 41.3), "Middle": (26.2, 47.4), "High": (32.6, 67.1),
                "Avg": (24.9, 53.6)},
    "mindcube": {"Around": (46.4, 65.6), "Rotation": (34.5, 31.0), "Among": (35.3, 50.2),
                 "Avg": (37.8, 50.2)},
    "mmsi": {"Position": (27.8, 30.5), "Attribute": (19.2, 20.8), "Motion": (23.3, 23.3),
             "MSR": (25.8, 24.7), "Avg": (25.6, 27.0)},
    "overall": {"Overall": (29.4, 43.6)},  # the mean of these three averages
    "spar-si": {"Low": (16.0, 41.1), "High": (32.5, 49.7), "Avg": (23.9, 45.2)},
    "cvbench": {"2D": (69.3, 70.5), "3D": (72.2, 78.4), "Avg": (70.7, 74.5)}}
TABLE_1 = {"spar-mv", "mindcube", "mmsi"}
FORM = ("R_fmt", "R_act", "R_act, turns", "R_act, walks")  # further rows, where they can be had
NOTE = """Percent, in brackets 95 % bootstrap intervals. The paper's columns are from its tables.
R_fmt: the response has the form asked for; R_act: how close its camera moves are to the true ones;
constant: what one answer to all questions of a task, or one plan for every pair, can score."""


class Run(NamedTuple):
    """Scored predictions of one model on one benchmark."""

    bench: str
    name: str  # of the model, and how it was asked
    records: list
    scores: dict  # {task, or one of FORM: [in [0, 1]]}
    rows: dict  # of table_rows
    constants: dict  # {row's label: percent that can be had without looking}, where that is known


def table_rows(bench, scores, convention="hatch", resamples=1000):
    """A benchmark's table {label: (depth, n, score, low, high)}: groups (depth 0) with their tasks
    (1), the average, FORM; in percent, low to high the 95 % bootstrap interval.

    scores {task: [in [0, 1]]}. Groups and average are means over questions, except: with convention
    "spar" SPAR-Bench's are means over tasks; MindCube's average leaves "translation" out; CV-Bench:
    2D = (ADE20K + COCO) / 2, average = (2D + 3D) / 2.
    """
    counts = {task: len(values) for task, values in scores.items()}
    lines = []  # label, depth, {task: weight}
    for label, weights in group_weights(bench, counts, convention).items():
        if weights:
            lines.append((label, 0, weights))
        names = [task.lower() for task in weights]
        if label != "Avg" and label.lower() not in names:  # a group of one task has its name
            lines += [(task, 1, {task: 1}) for task in weights]
    for kind in FORM:
        if kind in counts:
            lines.append((kind, 1 if "," in kind else 0, {kind: 1}))

    means = bootstrap_means(scores, resamples)
    rows = {}
    for label, depth, weights in lines:
        total = sum(weight * means[task] for task, weight in weights.items())
        score, *resampled = 100 * total / sum(weights.values())  # as bootstrap_means orders them
        low, high = np.percentile(resampled, (2.5, 97.5)).tolist()
        n = sum(counts[task] for task in weights)
        rows[label] = depth, n, float(score), low, high
    return rows


def group_weights(bench, counts, convention):
    """{label: {task: weight in the label's mean}} of a benchmark's groups and of its average;
    counts: how many questions each task has."""
    even = bench == "cvbench" or (convention == "spar" and BENCHES[bench].letter is None)
    groups = {}
    for label, tasks in BENCHES[bench].groups.items():
        groups[label] = {task: 1 if even else counts[task] for task in tasks if task in counts}
    average = {}
    for weights in groups.values():
        for task, weight in weights.items():
            if task != "translation":  # MindCube's official code leaves this setting out
                average[task] = weight / len(weights) if bench == "cvbench" else weight
    return groups | {"Avg": average}


def bootstrap_means(scores, resamples):
    """{task: means (1 + resamples,)}: first the mean of its scores, then those of resamples (the
    bootstrap): as many scores, taken from them with replacement."""
    rng = np.random.default_rng(0)
    means = {}
    for task in sorted(scores):
        values = np.array(scores[task])
        taken = values[rng.integers(0, len(values), (resamples, len(values)))]
        means[task] = np.array([np.mean(values), *taken.mean(1)])
    return means


def score_run(bench, name, mode, records, convention="hatch"):
    """The Run of records {"item", "response"}, which score_record adds to. mode: how the model was
    asked, "action", "language" or "direct"."""
    scores = {}
    golds = {}  # {row's label, of R_act: [{pair: plan}]}
    for record in records:
        found, plans = score_record(bench, mode, record)
        for label, score in found.items():
            scores.setdefault(label, []).append(score)
        for label, those in plans.items():
            golds.setdefault(label, []).append(those)
    # what can be had without looking at the pictures
    constants = {}
    for label, those in golds.items():
        _, plan = rewards.constant_plan(those)
        constants[label] = rewards.plan_scores(plan, those)
    if bench == "rooms":
        for task in sorted(scores.keys() - FORM):
            same = [record["item"].gold for record in records if record["item"].task == task]
            constants[task] = constant_answer(bench, task, same)
    rows = table_rows(bench, scores, convention)
    of_constants = table_rows(bench, constants, convention, resamples=1)
    known = {label: row[2] for label, row in of_constants.items()}
    return Run(bench, name, records, scores, rows, known)


def score_record(bench, mode, record):
    """Score a record: adds "answer" and "score" and, where reasoning was asked for, "R_fmt",
    "R_act". Returns {row's label: score}, and {row's label: {pair: gold plan}} of the rows of
    R_act."""
    item = record["item"]
    text = before_end(record["response"] or "")
    if record["response"] is not None:
        record["response"] = text
    record["answer"] = answer_of(text)
    record["score"] = score_answer(bench, item.task, record["answer"], item.gold)
    found = {item.task: record["score"]}
    plans = {}
    reasons = mode in INSTRUCTIONS and item.views > 1
    if reasons:
        block = "action" if mode == "action" else "think"
        record["R_fmt"] = rewards.format_reward(text, item.views, block)
        found["R_fmt"] = record["R_fmt"]
    if reasons and mode == "action" and item.poses is not None:
        plans["R_act"] = rewards.gold_plans(item.poses)
        for pair, plan in plans["R_act"].items():
            label = "R_act, turns" if rewards.only_turns({pair: plan}) else "R_act, walks"
            plans.setdefault(label, {})[pair] = plan
        for label, those in plans.items():
            found[label] = rewards.action_reward(text, those)
        record["R_act"] = found["R_act"]
    return found, plans


def constant_answer(bench, task, golds):
    """[score] of all questions of a task, if each gets the same text: the gold for which the sum of
    scores is highest."""
    best = []
    for text in sorted(set(golds)):
        scores = [score_answer(bench, task, text, gold) for gold in golds]
        best = max(best, scores, key=sum)
    return best


def tables(runs):
    """The tables as text: for each benchmark its runs side by side, with the paper's columns; then
    Overall for each name that has a run on every benchmark of Table 1; then the notes."""
    found = []
    averages = {}  # {run's name: {benchmark: its average}}
    for bench in dict.fromkeys(run.bench for run in runs):
        found.append(bench_table(bench, [run for run in runs if run.bench == bench]))
    for run in runs:
        averages.setdefault(run.name, {})[run.bench] = run.rows["Avg"][2]
    for name, average in averages.items():
        if TABLE_1 <= average.keys():
            overall = np.mean([average[bench] for bench in TABLE_1])
            cells = [f"{score:.1f}" for score in (overall, *PAPER["overall"]["Overall"])]
            found.append([["Table 1", name, *PAPER_NAMES], ["Overall", *cells]])
    lines = []
    for table in found:
        lines += [*aligned(table), ""]
    for run in runs:
        missing = sum(record["response"] is None for record in run.records)
        if missing:
            lines.append(f"{run.name}: {missing:,} questions without a response count as wrong.")
    return "\n".join([*lines, NOTE])


def bench_table(bench, runs):
    """A benchmark's table as rows of texts: its runs side by side, then the paper's."""
    paper = PAPER.get(bench, {})
    with_constants = any(run.constants for run in runs)
    header = [BENCHES[bench].title]
    for run in runs:
        header += [run.name, "n"]
        if with_constants:
            header.append("constant")
    if paper:
        header += PAPER_NAMES
    table = [header]
    every = {task: [0] for run in runs for task in run.scores}  # only for the labels, in order
    for label, (depth, *_) in table_rows(bench, every, resamples=1).items():
        row = ["  " * depth + label]
        for run in runs:
            if label in run.rows:
                _, n, score, low, high = run.rows[label]
                row += [f"{score:.1f} ({low:.1f}-{high:.1f})", f"{n}"]
            else:
                row += ["", ""]
            if with_constants:
                row.append(f"{run.constants[label]:.1f}" if label in run.constants else "")
        if label in paper:
            row += [f"{score:.1f}" for score in paper[label]]
        elif paper:
            row += ["", ""]
        table.append(row)
    return table


def aligned(table):
    """A table's rows as lines of equal width: the first column to the left, the others right."""
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = []
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        cells[0] = row[0].ljust(widths[0])
        lines.append("   ".join(cells))
    return lines


# ----------------------------------------------------------------------------------------- main


def main(argv=None):
    args = parse_args(argv)
    rank, world, device, dtype = start_processes(args.precision)
    say = partial(print, flush=True) if rank == 0 else lambda *_: None
    if args.ask:
        return answer_one(args, dtype, device)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    skipped = []  # what could not be used, and why
    known = {}  # {(benchmark, data): items}
    if args.needs_model:
        items = load_items(args.bench, args.data, skipped.append)
        ask_all(items, args, out / "predictions.jsonl", say, rank, world, device, dtype)
        known[args.bench, args.data] = items
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    logs = args.curves or sorted(Path("out").glob("*/log.jsonl"))
    curves = draw_curves(logs)
    if args.curves and not curves:
        raise geometry.DataError(f"{', '.join(logs)}: no log with two steps or more")
    if not args.score and not args.needs_model:
        (out / "curves.svg").write_text(curves, encoding="utf-8")
        say(f"wrote   {out / 'curves.svg'}")
        return
    runs = []
    for file in args.score or [out / "predictions.jsonl"]:
        asked = read_run(file, args, skipped.append, known)
        runs.append(score_run(*asked, args.convention))
    results = [{"bench": run.bench, "name": run.name, "rows": run.rows,
                "constants": run.constants} for run in runs]
    (out / "results.json").write_text(json.dumps(
        {"args": vars(args), "skipped": skipped, "runs": results}, indent=1) + "\n")
    write_page(out / "report.html", runs, curves, args.show)
    print("", tables(runs), sep="\n", flush=True)  # after the files are there
    wrote = "results.json, report.html"
    if args.needs_model:
        wrote = f"predictions.jsonl, {wrote}"
    say(f"wrote   {out}: {wrote}")
    if skipped:
        say(f"skipped {len(skipped):,} rows or pictures, see results.json; the first: {skipped[0]}")


# -------------------------------------------------------------------------------- reading files


def load_items(bench, data, skip=print):
    """All usable questions of a benchmark: list[Item], in the file's order; opens no picture yet.

    bench: name in BENCHES; data: a file of it, under any name, or a folder with its published files
    at any depth; skip: told of each row that cannot be used. Raises DataError if nothing usable is
    there, or files in several folders, which may be copies.
    """
    benchmark = BENCHES[bench]
    data = Path(data)
    files = [data] if data.is_file() else sorted(data.rglob(benchmark.files))
    folders = sorted({path.parent for path in files})
    if len(folders) > 1:
        raise geometry.DataError(f"{benchmark.title} is in {folders[0]} and in {folders[1]}: name "
                                 "one with --data")
    items = []
    problem = f"no row in any {benchmark.files}"
    ids = Counter()
    for path in files:
        for number, row in enumerate(read_rows(path, benchmark.fields)):
            try:
                item = read_item(bench, row, path.parent)
            except (ValueError, TypeError) as error:  # DataError is a ValueError
                problem = f"{path.name}, row {number}: {error}"
                skip(problem)
                continue
            if item.task in benchmark.prompt:  # not of SPAR-Bench's other half
                ids[item.id] += 1
                if ids[item.id] > 1:  # CV-Bench counts in each of its files
                    item = item._replace(id=f"{item.id}#{ids[item.id]}")
                items.append(item)
    if not items:
        raise geometry.DataError(f"{data}: no usable question of {benchmark.title} "
                                 f"({problem}); --data takes {benchmark.data}")
    return items


def read_item(bench, row, folder):
    """Item of a row {field: value} of a file in `folder`. Raises DataError for one that cannot be
    used: a field is missing, or no answer can match its gold."""
    benchmark = BENCHES[bench]
    for field in benchmark.fields:
        if row.get(field) in (None, ""):
            raise geometry.DataError(f"it has no {field}")
    name, task, question, gold = (str(row[field]) for field in benchmark.fields)
    task = task.strip().replace("-", "–")  # MMSI-Bench's copies have either
    if bench == "mindcube":  # the first setting that the id names
        task = next((setting for setting in MINDCUBE_SETTINGS if setting in task.lower()), "other")
    if task not in benchmark.prompt and task not in SPAR_PROMPTS:
        raise geometry.DataError(f"unknown task {task!r:.60}")
    letter = re.fullmatch(r"\(?([A-Za-z])[).:]*", gold.strip())
    gold = letter[1].upper() if letter else gold.strip()
    if score_answer(bench, task, gold, gold) < 1:
        raise geometry.DataError(f"no answer can match its gold {gold!r:.60}")
    cells = row.get("images") or row.get("image")
    if not cells:
        raise geometry.DataError("it has no image")
    if not isinstance(cells, list):
        cells = [cells]
    poses = None
    if row.get("pose"):
        poses = np.array(row["pose"], float).reshape(len(cells), 4, 4)
    return Item(name, task, question, gold, partial(open_images, cells, folder), len(cells), poses)


def read_rows(path, fields):
    """The rows {field: value} of a parquet or jsonl file; {} for a line that is none."""
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet

            file = pyarrow.parquet.ParquetFile(path)
            wanted = (*fields, "image", "images")  # not the depth maps
            columns = [name for name in file.schema_arrow.names if name in wanted]
            yield from file.read(columns).to_pylist()
        except ImportError:
            raise geometry.DataError(f"{path}: reading it needs `pip install pyarrow`") from None
        except ValueError as error:  # as pyarrow's own are
            raise geometry.DataError(f"{path}: cannot be read as parquet ({error})") from None
    elif path.suffix == ".jsonl":
        text = path.read_text(encoding="utf-8-sig", errors="replace")  # Windows tools write a mark
        for line in filter(str.strip, text.split("\n")):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield row if isinstance(row, dict) else {}
    else:
        raise geometry.DataError(f"{path}: neither .parquet nor .jsonl")


def open_images(cells, folder):
    """PIL images of a row's cells: bytes, {"bytes", "path"}, or paths below `folder` or, as
    MindCube has it, below the folder above. Raises DataError."""
    pictures = []
    for k, cell in enumerate(cells):
        if isinstance(cell, dict):
            cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, str):
            path = folder / cell
            if not path.exists():
                path = folder.parent / cell
            pictures.append(geometry.open_image(path))
        else:
            pictures.append(geometry.open_image(io.BytesIO(cell), f"image {k}"))
    return pictures


def continue_predictions(path, items, wanted, args, source, dtype, say):
    """Ids of the answers at `path` that stand. The file is started anew if it has none, with
    --overwrite, or if the model has been trained again since. DataError if it has answers of
    another model, of other questions, or of other settings that change answers; of another dtype
    if one of the items `wanted` has no answer yet."""
    head = vars(args) | {"questions": checksum(items), "torch": torch.__version__,
                         "weights": geometry.fingerprint(weight_files(source)),
                         "precision": str(dtype)}  # what auto is here
    if path.exists() and not args.overwrite:
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # a kill can cut the last line
        then, lines = read_predictions(path, say)
        answered = {name for name, line in lines.items() if "response" in line}
        settings = ["bench", "mode", "blind", "max_pixels", "max_new_tokens", "questions",
                    "weights"]
        if not answered.issuperset(item.id for item in wanted):
            settings.append("precision")
        other = [name for name in settings if then.get(name) != head[name]]
        if not other:
            return list(answered)
        if other == ["weights"] and then["model"] == args.model:
            say(f"{args.model} has been trained again since {path} was written: starting over")
        elif lines:
            raise geometry.DataError(f"{path} holds answers of {then.get('model')} with another "
                                     f"{', '.join(other)}: name another --out, or --overwrite")
    path.write_text(json.dumps({"args": head}) + "\n")
    return []


def checksum(items):
    """What tells the questions of a benchmark from others with the same ids."""
    return zlib.crc32(repr([item[:4] for item in items]).encode(errors="replace"))


def read_predictions(path, skip):
    """(arguments as the first line has them, {id: line}) of a predictions.jsonl; of the lines with
    an id, the last counts. skip: told of the others."""
    head = {}
    lines = {}
    for number, line in enumerate(read_rows(Path(path), ()), 1):
        if type(line.get("id")) in (int, str):
            lines[str(line["id"])] = line
        elif isinstance(line.get("args"), dict) and not lines:
            head = line["args"]
        else:
            skip(f'{path}, line {number}: not JSON with an "id"')
    return head, lines


def read_run(path, args, skip, known):
    """(bench, name, mode, records) of a file of predictions, for score_run. Every question of the
    benchmark counts, one without a response as wrong; but not those that could not be asked.

    known: {(bench, data): items} that have been read. Raises DataError if nothing can be scored.
    """
    head, lines = read_predictions(path, skip)
    bench = args.bench or head.get("bench")
    data = args.data or head.get("data")
    if bench not in tuple(BENCHES) or not isinstance(data, str):
        raise geometry.DataError(f"{path}: does not say which benchmark's: add --bench and --data")
    if (bench, data) not in known:
        known[bench, data] = load_items(bench, data, skip)
    items = known[bench, data]
    if head.get("questions", checksum(items)) != checksum(items):
        raise geometry.DataError(f"{path}: was asked other questions than {data} holds now: name "
                                 "the right ones with --data")
    for name in lines.keys() - {item.id for item in items}:
        skip(f"{path}: the benchmark has no question {name!r:.60}")
    records = []
    for item in sampled(items, args.limit or head.get("limit")):
        line = lines.get(item.id, {})
        text = line.get("response")
        if "skipped" in line:
            skip(f"{item.id} ({item.task}): {line['skipped']}")
        else:
            records.append({"item": item, "response": text if isinstance(text, str) else None})
    if not any(record["response"] for record in records):
        raise geometry.DataError(f"{path}: holds no response to a question of {data}")
    mode = str(args.mode or head.get("mode") or "")
    name = str(args.model or head.get("model") or Path(path).with_suffix(""))
    how = [name]
    if mode:
        how.append(mode)
    if head.get("blind") is True:
        how.append("blind")
    return bench, ", ".join(how), mode, records


def sampled(items, limit):
    """`limit` of the questions, at random, in their order; without one, all."""
    if type(limit) is not int:
        return items
    kept = np.random.default_rng(0).permutation(len(items))[:limit]
    return [items[k] for k in sorted(kept)]


# -------------------------------------------------------------- looking: curves, a page of it all

PANELS = {  # of each stage: {field of its log: title}
    "pasta": {"match_accuracy": "PaStA: held-out matches that are right",
              "excess": "PaStA: loss above its floor"},
    "sft": {"loss": "fine-tuning: loss", "heldout_loss": "fine-tuning: held-out loss",
            "answer": "fine-tuning: held-out answer reward, R_ans",
            "action": "fine-tuning: held-out action reward, R_act"},
    "grpo": {"reward_action": "GRPO: action reward, R_act",
             "reward_answer": "GRPO: answer reward, R_ans", "reward": "GRPO: reward",
             "reward_format": "GRPO: format reward, R_fmt", "kl": "GRPO: KL to the start model"}}


def read_curve(path):
    """(stage, seed, {field: [(step, value)]}) of a log.jsonl; stage "" if its head names none."""
    fields = {}
    seed = None
    stage = ""
    for record in read_rows(Path(path), ()):
        if isinstance(record.get("args"), dict):  # the log's head
            seed = record["args"].get("seed")
            stage = Path(str(record.get("script", ""))).stem.removeprefix("actor_")
        if "step" not in record:
            continue
        for name, value in record.items():
            if type(value) in (int, float) and math.isfinite(value):
                fields.setdefault(name, []).append((record["step"], value))
    return stage, seed, fields


def draw_curves(logs):
    """An SVG with a panel for each quantity in the logs, all runs in one; "" if there is none."""
    curves = [read_curve(log) for log in logs]
    for log, (stage, *_) in zip(logs, curves):
        if stage not in PANELS:
            print(f"skipped {log}: its first line does not name the script that wrote it")
    names = run_names(logs, [seed for _, seed, _ in curves])
    logged = dict.fromkeys(itertools.chain(*(fields for *_, fields in curves)))
    rewarded = [field for field in logged if f"{field}_spread" in logged]  # a fork's terms as well
    panels = []
    for stage, titles in PANELS.items():
        for field in dict.fromkeys([*titles, *rewarded]):
            lines = []
            for name, (of_stage, _, fields) in zip(names, curves):
                if of_stage == stage and len(fields.get(field, ())) > 1:
                    lines.append((name, *np.array(fields[field]).T))
            constants = []
            if field == "action":
                for *_, fields in curves:
                    constants += [value for _, value in fields.get("action_constant", ())]
            if lines:
                panels.append(panel(titles.get(field, field), lines, constants))
    return svg_of(panels)


def run_names(logs, seeds):
    """A name for the run of each log: the path of its folder, from the deepest folder that holds
    all of them. Runs whose names differ only in digits, and whose seeds all differ, share one name,
    with their seeds in the digits' place."""
    runs = [Path(os.path.abspath(log)).parent for log in logs]
    base = os.path.commonpath([run.parent for run in runs]) if runs else ""
    names = [str(run.relative_to(base)) for run in runs]
    families = [re.sub(r"\W?\d+", "", name) for name in names]
    alike = {}
    for family, seed in zip(families, seeds):
        alike.setdefault(family, []).append(str(seed))
    for k, family in enumerate(families):
        if 1 < len(alike[family]) == len(set(alike[family])):
            names[k] = f"{family}, seeds {', '.join(sorted(alike[family]))}"
    return names


COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000", "#999999")
LEFT, RIGHT, TOP, BOTTOM = 72, 620, 36, 300  # of a panel's curves, in a width of 640


def svg_of(panels):
    """An SVG of panels (how many names, SVG), two in a row; "" if there is none."""
    if not panels:
        return ""
    height = BOTTOM + 60 + 20 * max(names for names, _ in panels)
    placed = [f'<g transform="translate({k % 2 * 640} {k // 2 * height})">{one}</g>'
              for k, (_, one) in enumerate(panels)]
    return ('<svg xmlns="http://www.w3.org/2000/svg" style="background:#fff" font-size="14" '
            'font-family="sans-serif" '
            f'viewBox="0 0 1280 {(len(panels) + 1) // 2 * height}">{"".join(placed)}</svg>')


def panel(title, lines, constants):
    """(How many names, SVG) of curves [(name, steps, values)], a colour for each name. The only
    curve of a name is drawn thin, and its running mean thick. If a name has several, their running
    means are drawn thin, and the mean of these, over the steps that all have, thick. constants:
    what one plan for every pair can score, a dashed line at their mean."""
    by_name = {}
    for name, steps, values in lines:
        by_name.setdefault(name, []).append((steps, values, running_mean(values)))
    means = [mean for curves in by_name.values() for _, _, mean in curves]
    x_ticks = round_ticks([steps for _, steps, _ in lines])
    y_ticks = round_ticks([*means, constants] if constants else means)
    frame = ((x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1]))
    parts = f'<text x="{LEFT}" y="20" font-weight="bold">{escape(title)}</text>'
    for tick, at in zip(y_ticks, np.linspace(BOTTOM, TOP, len(y_ticks))):
        parts += (f'<path d="M{LEFT} {at:.0f}H{RIGHT}" stroke="#ddd"/><text x="{LEFT - 8}" '
                  f'y="{at + 5:.0f}" text-anchor="end">{tick:g}</text>')
    for tick, at in zip(x_ticks, np.linspace(LEFT, RIGHT, len(x_ticks))):
        parts += f'<text x="{at:.0f}" y="{BOTTOM + 18}" text-anchor="middle">{tick:g}</text>'
    parts += f'<text x="{RIGHT}" y="{BOTTOM + 36}" text-anchor="end">step</text>'
    if constants:
        ends = np.full(2, np.mean(constants))
        parts += polyline(frame[0], ends, frame, "#000", 'stroke-dasharray="6 4"')
        parts += f'<text x="{LEFT}" y="{BOTTOM + 36}">dashed: best constant plan</text>'
    for k, (name, curves) in enumerate(by_name.items()):
        colour = COLOURS[k % len(COLOURS)]
        if len(curves) == 1:
            ((steps, values, mean),) = curves
            parts += polyline(steps, values, frame, colour, 'opacity=".3"')
            parts += polyline(steps, mean, frame, colour, 'stroke-width="2.5"')
        else:
            for steps, _, mean in curves:
                parts += polyline(steps, mean, frame, colour, 'opacity=".5"')
            common = reduce(np.intersect1d, [steps for steps, *_ in curves])
            of_all = [np.interp(common, steps, mean) for steps, _, mean in curves]
            parts += polyline(common, np.mean(of_all, axis=0), frame, colour, 'stroke-width="2.5"')
        parts += (f'<text x="{LEFT}" y="{BOTTOM + 58 + 20 * k}" fill="{colour}" '
                  f'font-weight="bold">{escape(name)}</text>')
    return len(by_name), parts


def round_ticks(values):
    """About five round numbers, evenly spaced, the first and the last around all of `values`."""
    low = min(map(np.min, values))
    high = max(max(map(np.max, values)), low + 0.01 * abs(low) + 1e-6)
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    apart = next(round_one * power for round_one in (1, 2, 5, 10)
                 if round_one * power >= (high - low) / 4)
    numbers = range(math.floor(low / apart), math.ceil(high / apart) + 1)
    return [float(f"{number * apart:.6g}") for number in numbers]


def running_mean(values):
    """Each value's mean with those around it, a twentieth of the curve."""
    half = len(values) // 40
    padded = np.pad(values, half, "edge")
    return np.convolve(padded, np.ones(2 * half + 1) / (2 * half + 1), "valid")


def polyline(steps, values, frame, colour, look):
    """SVG of one curve; frame: ((first, last step), (lowest, highest value)) of its panel."""
    x = np.interp(steps, frame[0], (LEFT, RIGHT))
    y = np.interp(values, frame[1], (BOTTOM, TOP))
    points = " ".join(f"{u:.1f},{v:.1f}" for u, v in zip(x, y))
    return f'<polyline points="{points}" fill="none" stroke="{colour}" {look}/>'


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>HATCH: evaluation</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: auto; padding: 1rem }
pre { overflow: auto; background: #f6f8fa; padding: .5rem; font-size: .9rem }
article { border-top: 1px solid #57606a; margin: 1rem 0; overflow-wrap: anywhere }
article pre { white-space: pre-wrap; max-height: 14rem }
.views { display: flex; flex-wrap: wrap; gap: .5rem } figure { margin: 0 }
figcaption { font-size: .85rem } img, figure svg { width: 12rem; background: #f6f8fa }
</style><h1>HATCH: evaluation</h1>"""
GOLD, WRITTEN = "#1a7f37", "#d55e00"


def write_page(path, runs, curves, show):
    """One self-contained page: tables, `show` questions, curves."""
    records = [(run.name, record) for run in runs for record in run.records]
    questions = sampled(records, show)
    parts = [PAGE, f'<pre class="tables">{escape(tables(runs))}</pre>',
             f"<p>{len(questions):,} of {len(records):,} questions, drawn at random. Camera paths "
             f'are seen from above, ahead is up: <b style="color:{GOLD}">true</b>, '
             f'<b style="color:{WRITTEN}">written</b>.</p>']
    parts += [article(name, record) for name, record in questions]
    # half a surrogate pair, which JSON can hold, is no text
    path.write_text("\n".join([*parts, curves]) + "</html>\n", encoding="utf-8", errors="replace")


def article(name, record):
    """A question of the page: its pictures, texts, scores and camera paths."""
    item = record["item"]
    response = record["response"] or ""
    figures = []
    try:
        pictures = item.images()
    except (OSError, ValueError, TypeError):  # named when it was to be asked
        pictures = []
    for k, picture in enumerate(pictures):
        picture.thumbnail((400, 400))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=80)
        data = base64.b64encode(buffer.getvalue()).decode()
        figures.append(f'<figure><img alt="" src="data:image/jpeg;base64,{data}">'
                       f"<figcaption>view {k}</figcaption></figure>")
    if "R_act" in record:
        written = rewards.parse_response(response).actions or {}
        for pair, plan in rewards.gold_plans(item.poses).items():
            figures.append(from_above(pair, plan, written.get(pair)))
    scores = ", ".join(f"{part} {record[part]:.2f}" for part in ("score", "R_act", "R_fmt")
                       if part in record)
    return (f'<article><b>{escape(item.task)}, {scores}</b> {escape(f"{item.id}, {name}")}'
            f'<div class="views">{"".join(figures)}</div><p>{escape(item.question)}</p>'
            f'<p>true <b>{escape(item.gold)}</b>, written <b>{escape(record["answer"])}</b></p>'
            f"<pre>{escape(response)}</pre></article>")


def from_above(pair, gold, written):
    """An SVG of the camera's way from view i to view j by two plans; `written` may be None."""
    gold_xy, gold_gaze = way_of(gold)
    reach = 1.8 * max(0.5, np.abs(gold_xy).max())  # what goes farther leaves the picture
    shapes = '<circle r=".05"/>' + draw_way(gold_xy / reach, gold_gaze, GOLD)
    caption = "no plan"
    if written is not None:
        xy, gaze = way_of(written)
        shapes += draw_way(xy / reach, gaze, WRITTEN)
        with np.errstate(all="ignore"):
            pose = geometry.pose_from_actions(written[:99])
        d_t, d_r = geometry.pose_error(pose, geometry.pose_from_actions(gold))
        caption = f"off by {d_t:.2g} m and {d_r:.0f}°"
    return (f'<figure><svg viewBox="-1 -1 2 2">{shapes}</svg>'
            f"<figcaption>view {pair[0]} to {pair[1]}, {caption}</figcaption></figure>")


def way_of(plan):
    """Where a plan's camera stands after each action (at most 99), to the right and behind, in
    metres, and in which direction it looks at last, in degrees to the right."""
    with np.errstate(all="ignore"):
        poses = [geometry.pose_from_actions(plan[:k]) for k in range(min(len(plan), 99) + 1)]
    xy = np.nan_to_num([(pose[0, 3], -pose[2, 3]) for pose in poses])
    return xy, math.degrees(math.atan2(poses[-1][0, 2], poses[-1][2, 2]))


def draw_way(xy, gaze, colour):
    """SVG of a way through xy (A, 2), in units of the picture, and an arrow for its gaze."""
    xy = np.clip(xy, -9, 9)
    line = " ".join(f"{x:.3f},{y:.3f}" for x, y in xy)
    x, y = xy[-1]
    return (f'<g fill="none" stroke="{colour}" stroke-width=".04"><polyline points="{line}"/>'
            f'<path d="M0 0V-.45M-.09 -.32L0 -.45L.09 -.32" '
            f'transform="translate({x:.3f} {y:.3f}) rotate({gaze:.0f})"/></g>')


# ------------------------------------------------------------------------------------- plumbing


MADE_BY = {"out/pasta": "python pasta.py --grid 4",  # the stages, and what runs them
           "out/sft": "python actor_sft.py --target answer",
           "out/cold_start": "python actor_sft.py --target actions",
           "out/grpo": "python actor_grpo.py"}


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


def place(model, dtype, device):
    """Move a model to a device, its weights in dtype, one by one: the whole never exists twice. The
    buffers, among them the rotary frequencies, keep their own dtype."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype)
    model.to(device)


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


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has none
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
    except (geometry.DataError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"evaluate.py: {str(error).strip().splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit("evaluate.py: interrupted; the same command goes on from the predictions made")
