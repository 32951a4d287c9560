"""Evaluation of HATCH: Tables 1 to 4 of the paper as commands, and a page to look at.

    --bench rooms      held-out rendered rooms, with SPAR-Bench's tasks (needs no download)
    --bench spar-mv    SPAR-Bench, several images    Tables 1 to 3
    --bench mindcube   MindCube-Tiny                 Table 1
    --bench mmsi       MMSI-Bench                    Table 1
    --bench spar-si    SPAR-Bench, one image         Table 4
    --bench cvbench    CV-Bench, one image           Table 4

    what is asked         the benchmark's published prompt, or ACTION_INSTRUCTION    prompt_of
    what is answered      the <answer> block, if there is one                        answer_of
    how it is scored      as the benchmark's official code does                      score_spar, ...
    what is reported      weighted means of task means, bootstrap intervals          table_rows

    python evaluate.py                        # reads out/grpo, writes out/evaluation/rooms
    python evaluate.py --bench spar-mv --data /path/to/SPAR-Bench
    python evaluate.py --score a/predictions.jsonl b/predictions.jsonl    # no model: scores only
    python evaluate.py --curves out/*/log.jsonl                           # training curves only
    torchrun --nproc_per_node 4 evaluate.py --bench mmsi --data /path/to/MMSI-Bench

Writes --out: predictions.jsonl (as they are made: an interrupted evaluation continues),
results.json, curves.png, report.html.

Deviations from the official scorers: the answer is cut out of <answer>, or else of what follows a
reasoning block, and stripped before the official rule sees it; and an empty answer scores 0, where
SPAR-Bench's own code scores it 1.
"""

from __future__ import annotations

import argparse
import ast
import base64
import csv
import functools
import html
import io
import itertools
import json
import math
import os
import platform
import re
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import geometry
import rewards

DEMO = Path("out/demo")
MADE_BY = {"out/pasta": "python pasta.py --grid 4",  # the stages, and what runs them
           "out/sft": "python actor_sft.py --target answer",
           "out/cold_start": "python actor_sft.py --target actions",
           "out/grpo": "python actor_grpo.py"}
END = ["<|im_end|>", "<|endoftext|>"]  # of a turn; of a text, which a base model may write instead


def import_torch():
    """Import what only answering needs: that takes seconds, and scoring alone can do without."""
    global torch, dist, F, transformers, SafetensorError, AutoTokenizer, DynamicCache
    global Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil, apply_rotary_pos_emb_vision
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    import transformers
    from safetensors import SafetensorError
    from transformers import (
        AutoTokenizer, DynamicCache, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil)
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description="Evaluate a Qwen2.5-VL on spatial benchmarks; tables, curves, report.html.")
    # what to evaluate on what
    p.add_argument("--bench", choices=tuple(BENCHES), help="default: rooms")
    p.add_argument("--model", help="model directory or hub id; default: out/grpo. With --score: "
                                   "what to call it")
    p.add_argument("--data", help="the benchmark's published file or folder; default: the demo's "
                                  "rooms")
    p.add_argument("--mode", choices=("action", "language", "direct"),
                   help="what is asked about several images: camera moves, then the answer; words, "
                        "then the answer (Table 3); the answer alone. One image is always asked "
                        "about directly, as in the paper")
    p.add_argument("--limit", type=int, help="how many questions, drawn at random; default: all")
    # without a model
    p.add_argument("--score", nargs="+", metavar="FILE",
                   help="score these predictions.jsonl, of any engine, instead of making some")
    p.add_argument("--curves", nargs="+", metavar="FILE",
                   help="draw these log.jsonl; default: out/*/log.jsonl. Alone: draws, and no more")
    p.add_argument("--convention", choices=("hatch", "spar"), default="hatch",
                   help="SPAR-Bench's averages over all questions, as in the paper's tables, or "
                        "over task means, as SPAR-Bench's authors report")
    # generation
    p.add_argument("--max-pixels", type=int, help="budget per image; default: 448 * 448, as in "
                                                  "training; mindcube 480 * 480, as published")
    p.add_argument("--max-new-tokens", type=int,  # not in the paper
                   help="longest response; default: 96 + 64 a pair of views, 256 for language, for "
                        "direct answers what the benchmark's own code allows, else 128")
    p.add_argument("--batch", type=int, default=16, help="questions at a time, over all processes")
    p.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
                   help="auto: bf16 on CUDA, fp32 on a CPU")
    p.add_argument("--workers", type=int, default=min(8, os.cpu_count()),
                   help="threads that prepare questions ahead")
    # looking
    p.add_argument("--out", help="where everything goes; default: out/evaluation/BENCH, without a "
                                 "model out/evaluation")
    p.add_argument("--show", type=int, default=24, help="questions in report.html, evenly over "
                                                        "tasks, drawn at random")
    args = p.parse_args(argv)

    for name in ("limit", "max_pixels", "max_new_tokens", "batch", "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            p.error(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    if args.show < 0:
        p.error(f"--show must be 0 or more, got {args.show}")
    args.draw_only = bool(args.curves) and not (
        args.score or args.bench or args.data or args.model)
    args.answer = not args.score and not args.draw_only
    if not args.answer:
        args.out = args.out or "out/evaluation"
        return args
    args.bench, args.model = args.bench or "rooms", args.model or "out/grpo"
    args.out = args.out or f"out/evaluation/{args.bench}"
    bench = BENCHES[args.bench]
    args.demo = args.data is None and args.bench == "rooms"
    if args.demo:
        args.data = str(DEMO / "data")
    if args.data is None:
        p.error(f"--bench {args.bench} needs --data: {bench.data}")
    single = args.bench in ("spar-si", "cvbench")
    if args.mode not in (None, "direct") and single:
        p.error(f"--bench {args.bench} has one image a question: it is asked about directly")
    args.mode = args.mode or ("direct" if single else "action")
    args.max_pixels = args.max_pixels or bench.max_pixels
    return args


# ------------------------------------------------------------------------------------- questions


class Item(NamedTuple):
    """A question of a benchmark, as its published file has it.

    task: what scores are averaged over; gold: the answer; images: call it for the PIL images;
    poses: cam2world (views, 4, 4), where they are known.
    """

    id: str
    task: str
    question: str
    gold: str
    images: Callable
    poses: np.ndarray | None = None


SPAR_LEVELS = {
    "Low": ("depth_prediction_oc", "depth_prediction_oo", "distance_prediction_oc",
            "distance_prediction_oo", "depth_prediction_oc_mv", "depth_prediction_oo_mv",
            "distance_prediction_oc_mv", "distance_prediction_oo_mv"),
    "Middle": ("position_matching", "camera_motion_infer", "view_change_infer"),
    "High": ("distance_infer_center_oo", "distance_infer_center_oo_mv", "obj_spatial_relation_oo",
             "obj_spatial_relation_oc_mv", "obj_spatial_relation_oo_mv", "spatial_imagination_oc",
             "spatial_imagination_oc_mv", "spatial_imagination_oo", "spatial_imagination_oo_mv")}
SPAR_TASKS = tuple(itertools.chain(*SPAR_LEVELS.values()))
SPAR_MULTI_VIEW = tuple(
    task for task in SPAR_TASKS if task.endswith("_mv") or task in SPAR_LEVELS["Middle"])
MINDCUBE_SETTINGS = ("around", "rotation", "translation", "among", "other")
MMSI_GROUPS = {
    "Position": tuple(f"Positional Relationship ({pair})" for pair in (
        "Cam.–Cam.", "Obj.–Obj.", "Reg.–Reg.", "Cam.–Obj.", "Obj.–Reg.", "Cam.–Reg.")),
    "Attribute": ("Attribute (Meas.)", "Attribute (Appr.)"),
    "Motion": ("Motion (Cam.)", "Motion (Obj.)"),
    "MSR": ("MSR",)}
MMSI_TASKS = tuple(itertools.chain(*MMSI_GROUPS.values()))
CVBENCH_SOURCES = ("ADE20K", "COCO", "Omni3D")


def load_items(bench, data, skip=print):
    """All usable questions of a benchmark: list[Item], in the file's order; reads no image yet.

    bench: name in BENCHES; data: its published file, or a folder that holds it; skip: told of each
    row that cannot be used. Raises DataError if nothing usable is there.
    """
    items, ids, its = [], {}, BENCHES[bench]
    for path in find_files(its, Path(data)):
        for number, (row, images) in enumerate(read_rows(path)):
            try:
                if isinstance(row, geometry.DataError):
                    raise row
                item = its.read(row, images)
                if item.task not in its.tasks:
                    if item.task in SPAR_TASKS:
                        continue  # of the other half of SPAR-Bench
                    raise geometry.DataError(f"unknown task {item.task!r}")
            except KeyError as error:
                skip(f"{path.name}, row {number}: it has no {error}")
            except (ValueError, TypeError, AttributeError) as error:  # DataError is a ValueError
                skip(f"{path.name}, row {number}: {error}")
            else:
                times = ids[item.id] = ids.get(item.id, 0) + 1
                items.append(item if times == 1 else item._replace(id=f"{item.id}#{times}"))
    if not items:
        raise geometry.DataError(f"{data}: no usable question of {its.title}; --data takes "
                                 f"{its.data}")
    return items


def find_files(its, data):
    """The files of a Bench in a folder: the first of its patterns that finds any."""
    if data.is_file():
        return [data]
    files = next(filter(None, (sorted(data.rglob(pattern)) for pattern in its.files)), None)
    if not files:
        what = f"none of {', '.join(its.files)} in it" if data.is_dir() else "not there"
        raise geometry.DataError(f"{data}: {what}; --data takes {its.data}")
    return files


def read_spar(row, images):
    return Item(text_of(row, "id"), text_of(row, "task"), text_of(row, "question"),
                text_of(row, "answer"), images)


def read_room(row, images):
    """SPAR-Bench's fields, and a pose for each view: 16 numbers, as SPAR-Bench-RGBD has them."""
    poses = np.array(row["pose"], dtype=float).reshape(-1, 4, 4)
    if not np.isfinite(poses).all():
        raise geometry.DataError("its pose is not finite")
    return read_spar(row, images)._replace(poses=poses)


def read_mindcube(row, images):
    name = text_of(row, "id")
    setting = next((s for s in MINDCUBE_SETTINGS if s in name.lower()), "other")
    return Item(name, setting, text_of(row, "question"), text_of(row, "gt_answer"), images)


def read_mmsi(row, images):
    name, task = ("index", "category") if "category" in row else ("id", "question_type")
    task = text_of(row, task).replace("-", "–")
    return Item(text_of(row, name), task, text_of(row, "question"), text_of(row, "answer"), images)


def read_cvbench(row, images):
    return Item(text_of(row, "idx"), text_of(row, "source"), text_of(row, "prompt"),
                text_of(row, "answer"), images)


def text_of(row, name):
    """A row's field as text; it must be there and not empty."""
    value = row[name]
    if value is None or not str(value).strip():
        raise geometry.DataError(f"its {name} is empty")
    return str(value)


# ------------------------------------------------------------------------------- what is asked

# The benchmarks' own prompts, to the letter; of SPAR-Bench, by kind of task.
SPAR_PROMPTS = {
    "number": "\n{question}\nPlease answer the question using a single word or phrase.",
    "letter": "\n{question}\n\nAnswer with the option's letter from the given choices directly.",
    "place": "\n{question}\nThe values represent the bounding box coordinates normalized to a "
             "0-1000 scale, with the top-left corner as the origin of the image.\nAnswer with the "
             "option's letter from the given choices directly.",
    "motion": "\n{question}\n\n"}
MINDCUBE_PROMPT = (
    "[Task]\nYour task is to analyze the spatial arrangement of objects in the scene by examining "
    "the provided images, which show the scene from different viewpoints.\n[Answer Instruction]\n"
    "You only need to provide *ONE* correct answer selecting from the options listed below. For "
    "example, if you think the correct answer is 'A. Above' from 'A. Above B. Under C. Front D. "
    "Behind', your response should **only** be '<answer>A. Above</answer>'.\n\n[Question]\n"
    "{question}")
MMSI_PROMPT = ("{question}\nAnswer with the option's letter from the given choices directly. "
               "Enclose the option's letter within ``.")
CVBENCH_PROMPT = "{question}\nAnswer with the option's letter from the given choices directly."


def spar_prompt(task):
    if task == "view_change_infer":
        return SPAR_PROMPTS["motion"]
    if task in ("position_matching", "camera_motion_infer"):
        return SPAR_PROMPTS["place"]
    return SPAR_PROMPTS["number" if task in SPAR_LEVELS["Low"] else "letter"]


INSTRUCTIONS = {"action": rewards.ACTION_INSTRUCTION, "language": rewards.LANGUAGE_INSTRUCTION}


def prompt_of(item, bench, mode):
    """The text behind the images. mode "direct": the published prompt (the rooms': what training
    asked); "action", "language": what training asked, since HATCH's are unpublished."""
    if mode != "direct":
        return f"{item.question}\n{INSTRUCTIONS[mode]}"  # not in the paper
    return BENCHES[bench].prompt(item.task).replace("{question}", item.question)


# ---------------------------------------------------------------------------- how it is scored


def answer_of(response):
    """The answer in a response: its first <answer> block, else what follows a reasoning block."""
    _, opened, rest = response.partition("<answer>")
    if opened:
        return rest.partition("</answer>")[0].strip()
    for tag in ("action", "think"):
        if f"<{tag}>" in response:
            return response.partition(f"</{tag}>")[2].strip()
    return response.strip()


def score_spar(task, prediction, gold):
    """SPAR-Bench's score of a text, in [0, 1]: its official rules, by task alone.

    Two of its oddities are kept, since they are in every published number: any part of the gold's
    text counts, and view changes are measured relative to the prediction. One is not: an empty
    prediction scores 0 here.
    """
    if not prediction:
        return 0.0
    if task == "view_change_infer":
        return _score_view_change(prediction, gold)
    if task in SPAR_LEVELS["Low"]:
        numbers = re.findall(r"(?<!\^)\d+\.\d+|(?<!\^)\d+", prediction)
        try:  # of several views, the last number counts
            p = float(numbers[-1 if task.endswith("_mv") else 0])
            return rewards.mean_relative_accuracy(p, float(gold))
        except (IndexError, ValueError):  # no number, in the prediction or in the gold
            return 0.0
    prediction, gold = prediction.lower(), gold.lower()
    return float(prediction in gold or prediction[0] == gold)


def _score_view_change(prediction, gold):
    """Mean over five axes of the relative accuracy, divided by the prediction as published."""
    try:
        p, g = ({key: float(value) for key, value in (
            item.split(":") for item in text.split(","))} for text in (prediction, gold))
    except ValueError:  # an item that is not key:number
        return 0.0
    total = 0.0
    for positive, negative in rewards.AXES:
        moved, asked = (d.get(positive, 0.0) - d.get(negative, 0.0) for d in (p, g))
        total += rewards.mean_relative_accuracy(asked, moved)  # swapped, as in the official code
    return total / len(rewards.AXES)


def mindcube_letter(text):
    """The letter A-E that MindCube's extractor reads, or None. The first rule that fires; the last
    match within a rule, but for the final one."""
    if found := re.findall(r"([A-E])\.", text):
        return found[-1]
    if inside := re.search(r"<Answer>(.*?)(?:<|$)", text, re.DOTALL):
        for rule in (r"[Mm]y answer is ([A-E])", r"[Tt]he answer is ([A-E])", r"\b([A-E])\b"):
            if found := re.findall(rule, inside[1]):
                return found[-1]
    for rule in (r"(?:^|\n)(?:Answer: )?([A-E])(?:$|\s)", r'[*"]([A-E])[*"]',
                 r"\bAnswer:?\s*([A-E])\b", r"[Mm]y answer is ([A-E])", r"answer is ([A-E])"):
        if found := re.findall(rule, text):
            return found[-1]
    for line in reversed(text.split("\n")):
        if found := re.search(r"\b([A-E])\b", line):
            return found[1]
    return None


def mmsi_letter(text):
    """The letter A-D that MMSI-Bench's extractor reads, or None."""
    for ticks in (r"``([^`]*)``", r"`([^`]*)`"):
        if found := re.search(ticks, text):
            text = found[1]
    found = re.search(r"\b[A-D]\b(?!\s[a-zA-Z])", text)
    return found[0] if found else None


def cvbench_letter(text):
    """The letter, lower case, that CV-Bench's extractors read; "" if nothing is there."""
    text = text.lower().strip()
    for said in ("answer is", "answer:"):
        text = text.rpartition(said)[2]
    return text.strip().rstrip(".:,").lstrip("(").rstrip(")")[:1]


def score_answer(bench, task, answer, gold):
    """Official score in [0, 1] of an answer's text (see answer_of)."""
    if bench == "mindcube":
        return float(mindcube_letter(answer) == gold)
    if bench == "mmsi":
        return float((mmsi_letter(answer) or "").lower() == gold.lower())
    if bench == "cvbench":
        return float(cvbench_letter(answer) == gold.lower().strip("()"))
    return score_spar(task, answer, gold)


# ------------------------------------------------------------------------------- what is reported


class TableRow(NamedTuple):
    """A line of a table: percent, and the 95 % bootstrap interval of it."""

    label: str
    depth: int  # 0: a group or the average; 1: a task of the group above
    n: int
    score: float
    low: float
    high: float


def task_weights(bench, counts, convention="hatch"):
    """[(label, {task: weight})]: how a benchmark's numbers are made of its tasks' means.

    counts {task: questions}. SPAR-Bench: over all questions; convention "spar": over tasks.
    MindCube, MMSI-Bench: over all questions. CV-Bench: (2D + 3D) / 2, 2D = (ADE20K + COCO) / 2.
    """
    if bench == "cvbench":
        parts = {"2D": {"ADE20K": 1 / 2, "COCO": 1 / 2}, "3D": {"Omni3D": 1.0},
                 "Avg": {"ADE20K": 1 / 4, "COCO": 1 / 4, "Omni3D": 1 / 2}}
    elif bench == "mmsi":
        parts = {**MMSI_GROUPS, "Avg": MMSI_TASKS}
    elif bench == "mindcube":
        parts = {s.capitalize(): (s,) for s in MINDCUBE_SETTINGS}
        parts["Avg"] = tuple(s for s in MINDCUBE_SETTINGS if s != "translation")
    else:
        parts = {**SPAR_LEVELS, "Avg": SPAR_TASKS}
    weights = []
    for label, tasks in parts.items():
        here = {task: counts[task] for task in tasks if counts.get(task)}
        if bench == "cvbench":
            here = {task: tasks[task] for task in here}
        elif convention == "spar" and bench in ("rooms", "spar-mv", "spar-si"):
            here = dict.fromkeys(here, 1)
        if here:
            weights.append((label, {task: w / sum(here.values()) for task, w in here.items()}))
    return weights


def table_rows(bench, scores, convention="hatch", draws=1000):
    """[TableRow]: groups with their tasks, the average last. scores {task: [in [0, 1]]}."""
    scores = {task: np.array(values) for task, values in scores.items()}
    mean = {task: values.mean() for task, values in scores.items()}
    rng, drawn = np.random.default_rng(0), {}
    for task in sorted(scores):  # each task's questions are drawn again
        n = len(scores[task])
        drawn[task] = scores[task][rng.integers(0, n, (draws, n))].mean(1)
    rows, counts = [], {task: len(values) for task, values in scores.items()}
    for label, weights in task_weights(bench, counts, convention):
        lines = [(label, 0, weights)]
        if label != "Avg" and label.lower() not in map(str.lower, weights):
            lines += [(task, 1, {task: 1.0}) for task in weights]
        for name, depth, parts in lines:
            score = sum(w * mean[task] for task, w in parts.items())
            again = sum(w * drawn[task] for task, w in parts.items())  # (draws,)
            low, high = np.percentile(again, (2.5, 97.5))
            rows.append(TableRow(name, depth, sum(counts[task] for task in parts),
                                 100 * float(score), 100 * float(low), 100 * float(high)))
    return rows


class Bench(NamedTuple):
    """A benchmark. files: patterns of its files; paper: its rows in the paper's tables."""

    title: str
    data: str
    files: tuple
    tasks: tuple
    read: Callable
    prompt: Callable
    longest: int = 128  # tokens of a direct answer
    max_pixels: int = 448 * 448
    paper: dict = {}


SPAR_FILES = ("test-*.parquet", "*.parquet", "*.jsonl")
BENCHES = {
    "rooms": Bench(
        "Rendered rooms", "the folder that `python pasta.py --grid 4` rendered",
        ("rooms.jsonl",), SPAR_TASKS, read_room,
        lambda task: "{question}\n" + rewards.ANSWER_INSTRUCTION),
    "spar-mv": Bench(
        "SPAR-Bench-MV", "a copy of huggingface.co/datasets/jasonzhango/SPAR-Bench",
        SPAR_FILES, SPAR_MULTI_VIEW, read_spar, spar_prompt, 100,
        paper={"Qwen2.5-VL-3B": {"Low": 13.4, "Middle": 26.2, "High": 32.6, "Avg": 24.9},
               "HATCH": {"Low": 41.3, "Middle": 47.4, "High": 67.1, "Avg": 53.6}}),
    "mindcube": Bench(
        "MindCube-Tiny", "a copy of huggingface.co/datasets/MLL-Lab/MindCube, data.zip unpacked",
        ("MindCube_tinybench.jsonl",), MINDCUBE_SETTINGS, read_mindcube,
        lambda task: MINDCUBE_PROMPT, 4096, 480 * 480,
        paper={"Qwen2.5-VL-3B": {"Around": 46.4, "Rotation": 34.5, "Among": 35.3, "Avg": 37.8},
               "HATCH": {"Around": 65.6, "Rotation": 31.0, "Among": 50.2, "Avg": 50.2}}),
    "mmsi": Bench(
        "MMSI-Bench", "a copy of huggingface.co/datasets/RunsenXu/MMSI-Bench",
        ("MMSI_Bench.parquet", "MMSI_bench.tsv", "*.parquet", "*.jsonl"), MMSI_TASKS, read_mmsi,
        lambda task: MMSI_PROMPT,
        paper={"Qwen2.5-VL-3B": {"Position": 27.8, "Attribute": 19.2, "Motion": 23.3, "MSR": 25.8,
                                 "Avg": 25.6},
               "HATCH": {"Position": 30.5, "Attribute": 20.8, "Motion": 23.3, "MSR": 24.7,
                         "Avg": 27.0}}),
    "spar-si": Bench(
        "SPAR-Bench-SI", "a copy of huggingface.co/datasets/jasonzhango/SPAR-Bench",
        SPAR_FILES, tuple(task for task in SPAR_TASKS if task not in SPAR_MULTI_VIEW), read_spar,
        spar_prompt, 100,
        paper={"Qwen2.5-VL-3B": {"Low": 16.0, "High": 32.5, "Avg": 23.9},
               "HATCH": {"Low": 41.1, "High": 49.7, "Avg": 45.2}}),
    "cvbench": Bench(
        "CV-Bench", "a copy of huggingface.co/datasets/nyu-visionx/CV-Bench",
        ("test_*.parquet", "*.parquet", "*.jsonl"), CVBENCH_SOURCES, read_cvbench,
        lambda task: CVBENCH_PROMPT,
        paper={"Qwen2.5-VL-3B": {"2D": 69.3, "3D": 72.2, "Avg": 70.7},
               "HATCH": {"2D": 70.5, "3D": 78.4, "Avg": 74.5}})}
OVERALL = ("spar-mv", "mindcube", "mmsi")  # Table 1's last column: the mean of their averages
PAPER_OVERALL = {"Qwen2.5-VL-3B": 29.4, "HATCH": 43.6}


class Run(NamedTuple):
    """Scored predictions of one model on one benchmark."""

    bench: str
    name: str  # of the model, and how it was asked
    records: list
    rows: list
    form: dict  # means of R_fmt and R_act, where they can be had, and of how many responses


def score_run(bench, name, records, convention):
    """Score records {"id", "task", "gold", "response", "mode", "views", "item"}: adds "answer" and
    "score" and, where reasoning was asked for, "format" and "action". Returns the Run."""
    scores = {}
    for record in records:
        record["answer"] = answer_of(record["response"])
        record["score"] = score_answer(bench, record["task"], record["answer"], record["gold"])
        scores.setdefault(record["task"], []).append(record["score"])
        if record["mode"] in ("action", "language") and record["views"]:
            block = "action" if record["mode"] == "action" else "think"
            record["format"] = rewards.format_reward(record["response"], record["views"], block)
            if block == "action" and record["item"] and record["item"].poses is not None:
                record["action"] = rewards.action_reward(
                    record["response"], gold_plans(record["item"].poses))
    form = {}
    for part in ("format", "action"):
        if values := [record[part] for record in records if part in record]:
            form |= {part: float(np.mean(values)), f"{part}_n": len(values)}
    return Run(bench, name, records, table_rows(bench, scores, convention), form)


def gold_plans(poses):
    """The teacher's {(i, j): plan} between views of known poses."""
    return {(i, j): geometry.actions_from_pose(geometry.relative_pose(poses[i], poses[j]))
            for i, j in rewards.required_pairs(len(poses))}


def overall(runs):
    """{name: Overall} of the paper's Table 1, for what has a run on each of its benchmarks."""
    averages = {}
    for run in runs:
        if run.bench in OVERALL:
            averages.setdefault(run.name, {})[run.bench] = run.rows[-1].score
    return {name: sum(found.values()) / 3 for name, found in averages.items() if len(found) == 3}


def tables(runs):
    """[(title, header, lines)]: for each benchmark its runs side by side, then the paper's rows.

    A line is (label, depth, cells); cells are texts.
    """
    found = []
    for bench in dict.fromkeys(run.bench for run in runs):
        those, paper = [run for run in runs if run.bench == bench], BENCHES[bench].paper
        by_label = [{row.label: row for row in run.rows} for run in those]
        header = [text for run in those for text in (run.name, "n")]
        header += [f"{name} (paper)" for name in paper]
        every = {record["task"]: [0.0] for run in those for record in run.records}
        lines = []
        for label, depth, *_ in table_rows(bench, every, draws=1):  # all rows, in their order
            cells = []
            for row in (rows.get(label) for rows in by_label):
                cells += [f"{row.score:.1f} ({row.low:.1f}-{row.high:.1f})", f"{row.n:,}"] if (
                    row) else ["", ""]
            cells += [f"{row[label]:.1f}" if label in row else "" for row in paper.values()]
            lines.append((label, depth, cells))
        found.append((BENCHES[bench].title, header, lines))
    if means := overall(runs):
        cells = [f"{mean:.1f}" for mean in (*means.values(), *PAPER_OVERALL.values())]
        header = [*means, *(f"{name} (paper)" for name in PAPER_OVERALL)]
        found.append(("Overall of Table 1", header, [("Overall", 0, cells)]))
    return found


def notes(runs, convention):
    """What is to be said below the tables, a line each."""
    said = []
    for run in runs:
        parts = [f"mean {what} {run.form[part]:.3f} of {run.form[f'{part}_n']:,}"
                 for part, what in (("format", "R_fmt"), ("action", "R_act")) if part in run.form]
        if parts:
            said.append(f"{run.name}: {', '.join(parts)} responses with reasoning")
    said.append("Percent; in brackets 95 % bootstrap intervals.")
    if any(BENCHES[run.bench].paper for run in runs):
        said.append("The paper's rows are quoted from its tables.")
    if convention == "spar":
        said.append("SPAR-Bench: averages over task means; the paper's are over questions.")
    return said


def printable(text):
    """A text with control characters, lone surrogates and the like replaced."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}"
                   for c in text)


def print_tables(runs, convention):
    for title, header, lines in tables(runs):
        texts = [[title, *header]] + [["  " * depth + label, *cells]
                                      for label, depth, cells in lines]
        widths = [max(len(text[k]) for text in texts) for k in range(len(texts[0]))]
        print()
        for first, *others in texts:
            print(printable("   ".join([first.ljust(widths[0]), *(
                text.rjust(w) for text, w in zip(others, widths[1:]))])))
    print("", *map(printable, notes(runs, convention)), sep="\n", flush=True)


# -------------------------------------------------------------------------------- reading the files


class Skipped:
    """Told of what cannot be used. Says the first twenty at once and keeps all in `named`."""

    def __init__(self, say):
        self.say, self.named = say, []

    def __call__(self, message):
        self.named.append(message)
        if len(self.named) <= 20:
            self.say(f"skipped {printable(message)}")
        elif len(self.named) == 21:
            self.say("skipped more; results.json names them all")


FIELDS = ("id", "idx", "index", "task", "source", "category", "question_type", "question",
          "prompt", "answer", "gt_answer", "pose")  # not the depth maps of a parquet


def read_rows(path):
    """Yield (row, images) of a parquet, tsv or jsonl file: its fields, and what reads its images.

    row is a DataError if the line cannot be read at all.
    """
    reader = {".parquet": _parquet_rows, ".tsv": _tsv_rows, ".jsonl": _jsonl_rows}.get(path.suffix)
    if reader is None:
        raise geometry.DataError(f"{path}: neither .parquet nor .tsv nor .jsonl")
    return reader(path)


def _parquet_rows(path):
    file = _parquet(path)
    names = file.schema_arrow.names
    column = next((name for name in ("images", "image") if name in names), None)
    if column is None:
        raise geometry.DataError(f"{path}: has no column image or images, only {', '.join(names)}")
    for group in range(file.num_row_groups):
        try:
            rows = file.read_row_group(group, columns=[n for n in names if n in FIELDS])
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise geometry.DataError(f"{path}: row group {group} is damaged ({error})") from None
        for k, row in enumerate(rows.to_pylist()):
            yield row, partial(_parquet_images, path, group, column, k)


def _parquet(path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise geometry.DataError(f"{path}: reading parquet needs `pip install pyarrow`") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise geometry.DataError(f"{path}: cannot be read as parquet ({error})") from None


@functools.lru_cache(maxsize=2)  # questions are asked in the file's order
def _parquet_column(path, group, column):
    return _parquet(path).read_row_group(group, columns=[column]).column(0)


def _parquet_images(path, group, column, k):
    with ONE_READER:  # a row group may be the whole file: not once a thread
        cells = _parquet_column(path, group, column)[k]
    return open_images(cells.as_py(), path.parent)


ONE_READER = threading.Lock()


def _tsv_rows(path):
    csv.field_size_limit(1 << 30)  # an image is one field
    position = Position()
    with open(path, "rb") as file:
        reader = csv.reader(position.count(file), delimiter="\t")
        names = [name.removeprefix("\ufeff") for name in next(reader, [])]
        while True:
            start = position.bytes
            try:
                row = dict(zip(names, next(reader)))
            except StopIteration:
                return
            except csv.Error as error:
                yield geometry.DataError(f"not a line of tsv ({error})"), None
            else:
                row.pop("image", None)
                yield row, partial(_tsv_images, path, start, names)


class Position:
    """How far a file has been read while its lines are handed on as text."""

    bytes = 0

    def count(self, file):
        for line in file:
            self.bytes += len(line)
            yield line.decode("utf-8", errors="replace")


def _tsv_images(path, start, names):
    with open(path, "rb") as file:
        file.seek(start)
        values = next(csv.reader(Position().count(file), delimiter="\t"))
    cell = dict(zip(names, values)).get("image") or ""
    cells = ast.literal_eval(cell) if cell.startswith("[") else [cell]
    return open_images([base64.b64decode(one) for one in cells], path.parent)


def _jsonl_rows(path):
    with open(path, "rb") as file:
        for line in filter(bytes.strip, file):
            try:
                row = json.loads(line)
                names = row.get("images") or row.get("image")
                yield {k: v for k, v in row.items() if k in FIELDS}, partial(
                    open_images, names, path.parent)
            except (ValueError, AttributeError, RecursionError) as error:
                yield geometry.DataError(f"not a JSON object ({error})"), None


IMAGE_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, SyntaxError,
                Image.DecompressionBombError)  # of files that hold no image where one should be


def open_images(cells, folder):
    """PIL images of one or several cells: bytes, {"bytes", "path"}, or a path below `folder` or,
    as MindCube has it, below the folder above."""
    pictures = []
    for cell in cells if isinstance(cells, list) else [cells]:
        cell = cell.get("bytes") or cell["path"] if isinstance(cell, dict) else cell
        if isinstance(cell, str):
            places = [base / cell for base in (folder, folder.parent)]
            cell = next((place for place in places if place.exists()), places[0])
        else:
            cell = io.BytesIO(cell)
        pictures.append(Image.open(cell).convert("RGB"))
    if not pictures:
        raise ValueError("no image")
    return pictures


# ------------------------------------------------------------------------------------- answering


class Asked(NamedTuple):
    """A question as tokens: ids (L,), all of them prompt; patches and sizes of its images."""

    item: Item
    mode: str
    ids: torch.Tensor
    prompt: int
    patches: torch.Tensor
    sizes: list  # merged tokens (h, w) of each image


def ask(k, items, args, tokenizer, processor):
    """Asked of items[k]; None behind the last; a text if its images cannot be read."""
    if k >= len(items):
        return None
    item = items[k]
    try:
        pictures = item.images()
        images = processor(images=pictures, return_tensors="pt")
        if item.poses is not None and len(item.poses) != len(pictures):
            raise ValueError(f"{len(pictures)} images, {len(item.poses)} poses")
    except IMAGE_ERRORS as error:
        return f"{item.id} ({item.task}): its images cannot be read ({error})"
    mode = args.mode if len(pictures) > 1 else "direct"
    sizes = [tuple(size) for size in (
        images["image_grid_thw"][:, 1:] // processor.merge_size).tolist()]
    ids = tokenizer(chat_prompt(prompt_of(item, args.bench, mode), [h * w for h, w in sizes]))[
        "input_ids"]
    return Asked(item, mode, torch.tensor(ids), len(ids), images["pixel_values"], sizes)


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


def generate_greedily(model, examples, end, longest, device):
    """The likeliest response to each example's prompt, token by token: list of token lists.

    One batch, prompts padded on the left, the library's cache. A response ends before the first
    token that is in `end`, or after `longest` tokens.
    """
    prompts = [example.ids[:example.prompt] for example in examples]
    B, L = len(prompts), max(map(len, prompts))
    ids, seen = torch.full((B, L), end[0]), torch.zeros(B, L, dtype=torch.long)
    positions = torch.zeros(3, B, L, dtype=torch.long)
    for b, prompt in enumerate(prompts):
        ids[b, L - len(prompt):], seen[b, L - len(prompt):] = prompt, 1
        positions[:, b, L - len(prompt):] = rope_positions(
            prompt, model.config.image_token_id, examples[b].sizes)
    ids, seen, positions = ids.to(device), seen.to(device), positions.to(device)
    patches = torch.cat([example.patches for example in examples])
    cache, written, ended = DynamicCache(config=model.config.text_config), [], ids.new_zeros(B) > 0
    with torch.no_grad():
        features = embed(model, ids, patches, grids_of(examples))
        for _ in range(longest):
            hidden = model.model.language_model(
                inputs_embeds=features, position_ids=positions, attention_mask=seen,
                past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
            token = model.lm_head(hidden).argmax(-1)  # (B,)
            written.append(token.masked_fill(ended, end[0]))
            ended = ended | torch.isin(token, token.new_tensor(end))
            if ended.all():
                break
            features = model.get_input_embeddings()(token[:, None])
            positions = positions[:, :, -1:].amax(0, keepdim=True).expand(3, -1, -1) + 1
            seen = torch.cat([seen, seen.new_ones(B, 1)], dim=1)
    return [row[:next((k for k, token in enumerate(row) if token in end), len(row))]
            for row in torch.stack(written, dim=1).tolist()]


def grids_of(examples):
    """(images, 3): frames, rows and columns of patches of every image, as the encoder wants it."""
    return torch.tensor([(1, 2 * h, 2 * w) for e in examples for h, w in e.sizes])


def prepared_ahead(pool, prepare, order, args, start, rank, world):
    """Yield each step's [prepare(index), ...] of this process, computed ahead by `pool`."""
    mine = range(rank, args.batch, world)
    ahead, submitted, queue = 2 + args.workers // len(mine), start, deque()
    for step in range(start, args.steps):
        while submitted < min(step + ahead, args.steps):
            queue.append([pool.submit(prepare, order(submitted * args.batch + k)) for k in mine])
            submitted += 1
        yield [job.result() for job in queue.popleft()]


def longest_response(asked, args):
    """Most tokens of a response."""
    pairs = len(rewards.required_pairs(len(asked.sizes)))
    return args.max_new_tokens or {"action": 96 + 64 * pairs, "language": 256,
                                   "direct": BENCHES[args.bench].longest}[asked.mode]


def predict(items, args, path, skip, say, rank, world, device):
    """Answer what `path`, predictions.jsonl, has not; append as the answers come."""
    source = find_model(args.model)
    done = set(gather(continue_predictions(path, items, args, source, say) if rank == 0 else []))
    todo = [item for item in items if item.id not in done]
    say(f"data    {args.data}: {len(items):,} questions of {BENCHES[args.bench].title}, "
        f"{len(todo):,} of them to be asked")
    if not todo:
        return
    model, tokenizer = load_for_answers(source, args.precision, device)
    say(f"model   {args.model}: {model.dtype} on {device}; torch {torch.__version__}, "
        f"transformers {transformers.__version__}; several images are asked about in mode "
        f"{args.mode}")
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": args.max_pixels})
    end = tokenizer.convert_tokens_to_ids(END)
    prepare = partial(ask, items=todo, args=args, tokenizer=tokenizer, processor=processor)
    args.steps = math.ceil(len(todo) / args.batch)
    with ThreadPoolExecutor(args.workers) as pool:
        batches = prepared_ahead(pool, prepare, lambda k: k, args, 0, rank, world)
        if rank == 0:
            batches = geometry.progress(batches, args.steps, "answering")
        for batch in batches:
            for one in gather([one for one in batch if isinstance(one, str)]):
                skip(one)
            ready, lines = [one for one in batch if isinstance(one, Asked)], []
            if ready:
                longest = [longest_response(one, args) for one in ready]
                written = generate_greedily(model, ready, end, max(longest), device)
                lines = [record_of(one, tokenizer.decode(tokens[:most]))
                         for one, tokens, most in zip(ready, written, longest)]
            lines = gather(lines)
            if rank == 0:
                with open(path, "a") as file:
                    file.writelines(json.dumps(line) + "\n" for line in lines)


def record_of(asked, response):
    """The line of predictions.jsonl."""
    return {"id": asked.item.id, **facts_of(asked.item), "mode": asked.mode,
            "views": len(asked.sizes), "response": response}


def facts_of(item):
    """What a line of predictions.jsonl repeats of its question, to be scored without the data."""
    return {"task": item.task, "question": item.question, "gold": item.gold}


def continue_predictions(path, items, args, source, say):
    """Ids that `path` has if it is of this very run; otherwise put it aside and begin a new one."""
    weights = sorted([file.name, file.stat().st_size, int(file.stat().st_mtime)]
                     for file in source.glob("*.safetensors"))
    head = {"args": vars(args), "weights": weights, "versions": {
        "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "numpy": np.__version__}}
    if path.exists():
        whole = path.read_bytes()
        if not whole.endswith(b"\n"):  # a kill can cut the last line
            os.truncate(path, whole.rfind(b"\n") + 1)
        old, records, _ = read_predictions(path)
        facts = {item.id: facts_of(item) for item in items}
        if old.get("weights") == weights and all(
                old["args"].get(name) == getattr(args, name) for name in (
                    "bench", "model", "mode", "max_pixels", "max_new_tokens", "precision")) and all(
                facts.get(record["id"], record).items() <= record.items() for record in records):
            return [record["id"] for record in records]
        aside = next(place for k in itertools.count(1)
                     if not (place := path.with_name(f"predictions.{k}.jsonl")).exists())
        path.rename(aside)
        say(f"{path} was of another model, other arguments or questions: it is now {aside.name}")
    path.write_text(json.dumps(head) + "\n")
    return []


def read_predictions(path):
    """(head, records, broken) of a predictions.jsonl: the first line's arguments, if it has them,
    the lines with an id and a response, and what is wrong with the others."""
    head, records, broken = {}, {}, []
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise geometry.DataError(f"{path}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(text.split("\n"), 1):
        try:
            record = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            broken.append(f"{path}, line {number}: not JSON")
            continue
        if number == 1 and isinstance(record, dict) and "response" not in record and isinstance(
                record.get("args"), dict):
            head = record
        elif isinstance(record, dict) and isinstance(record.get("response"), str) and isinstance(
                record.get("id"), (str, int)):
            name = str(record["id"])
            if name in records:
                broken.append(f"{path}, line {number}: question {name!r} again; the last counts")
            records[name] = record | {"id": name}
        elif record is not None:
            broken.append(f'{path}, line {number}: needs "id" and "response", a text')
    return head, list(records.values()), broken


def read_run(path, args, skip, items=None):
    """(bench, name, records) of a file of predictions, the records ready for score_run.

    items: {id: Item}, if they have been read already. Raises DataError if no line can be used.
    """
    head, records, broken = read_predictions(path)
    said, complete = head.get("args", {}), []
    bench, mode = args.bench or said.get("bench"), said.get("mode") or args.mode
    if not isinstance(bench, str) or bench not in BENCHES:
        raise geometry.DataError(f"{path}: does not say which benchmark it is of: add --bench")
    if items is None:
        items = find_items(bench, args.data, said.get("data"), skip)
    else:  # with --limit, fewer than have been answered before
        records = [record for record in records if record["id"] in items]
    for record in records:
        try:
            complete.append(completed(record, items, bench, mode))
        except geometry.DataError as error:
            broken.append(f"{path}, question {record['id']!r:.60}: {error}")
    for line in broken:
        skip(line)
    if not complete:
        raise geometry.DataError(f"{path}: holds no prediction that can be scored"
                                 f"{'; ' + broken[0] if broken else ''}")
    if items and len(items) > len(complete):
        skip(f"{path}: {len(items) - len(complete):,} of the benchmark's {len(items):,} questions "
             "have no prediction")
    model = args.model or said.get("model") or Path(path).with_suffix("")
    return bench, f"{model}, {mode}" if mode else str(model), complete


def completed(record, items, bench, mode):
    """A record with what score_run asks for, whatever engine wrote it; DataError if it cannot be
    scored. items: {id: Item} of the benchmark, or None."""
    item = None if items is None else items.get(record["id"])
    if items is not None and item is None:
        raise geometry.DataError("the benchmark has no such question")
    facts = facts_of(item) if item else {
        name: record.get(name) for name in ("task", "question", "gold")}
    for name, fact in facts.items():
        if str(record.get(name, fact)) != str(fact):
            raise geometry.DataError(f"the benchmark's {name} for it is another")
    if facts["gold"] is None:
        raise geometry.DataError("it has no task and gold answer: name the benchmark's file with "
                                 "--data, so that they can be looked up")
    if facts["task"] not in BENCHES[bench].tasks:
        raise geometry.DataError(f"{facts['task']!r:.60} is no task of {BENCHES[bench].title}")
    views = record.get("views", item and item.poses is not None and len(item.poses))
    if type(views) is not int or not 1 <= views <= 64:
        views = None  # then nothing is said about its form
    return {"id": record["id"], "response": record["response"], "task": facts["task"],
            "question": str(facts["question"] or ""), "gold": str(facts["gold"]),
            "mode": record.get("mode", mode), "views": views, "item": item}


def find_items(bench, data, said, skip):
    """{id: Item} of the benchmark in --data, or where the predictions say that it was, if it is
    still there; else None."""
    if not data and not isinstance(said, str):
        return None
    try:
        return {item.id: item for item in load_items(bench, data or said, skip)}
    except geometry.DataError:
        if data:
            raise
        return None


# ------------------------------------------------------------------------------ looking at curves

PANELS = (  # stage, field, title; the first two are Figure 3 of the paper
    ("grpo", "reward_action", "GRPO: action reward R_act (Figure 3)"),
    ("grpo", "reward_answer", "GRPO: answer reward R_ans (Figure 3)"),
    ("grpo", "reward", "GRPO: reward R"), ("grpo", "reward_format", "GRPO: format reward R_fmt"),
    ("grpo", "kl", "GRPO: KL to the start model, a token"),
    ("grpo", "length", "GRPO: tokens of a completion"),
    ("pasta", "match_accuracy", "PaStA: match accuracy, held out"),
    ("pasta", "excess", "PaStA: loss above its floor"),
    ("sft", "loss", "SFT: loss, training"), ("sft", "heldout_loss", "SFT: loss, held out"),
    ("sft", "answer", "SFT: R_ans, held out"), ("sft", "action", "SFT: R_act, held out"))
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000", "#999999")


def read_curve(path):
    """(name, stage, {field: (steps, values)}) of a log.jsonl. Raises DataError if it is none."""
    fields, stage = {}, "sft"
    try:
        lines = Path(path).read_text().splitlines()[1:]
    except (OSError, ValueError) as error:
        raise geometry.DataError(f"{path}: no log.jsonl ({error})") from None
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # it is being written
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise geometry.DataError(f"{path}: no log.jsonl, a line has no step")
        stage = "grpo" if "kl" in record else "pasta" if "excess" in record else stage
        for name, value in record.items():
            if type(value) in (int, float) and math.isfinite(value):
                fields.setdefault(name, []).append((record["step"], value))
    return Path(path).parent.name or str(path), stage, {
        name: tuple(np.array(column, float) for column in zip(*points))
        for name, points in fields.items()}


def draw_curves(curves):
    """Plots of what read_curve returns: list of PIL images, one a quantity."""
    panels = []
    for stage, field, title in PANELS:
        lines = [(COLOURS[k % len(COLOURS)], name, *fields[field])
                 for k, (name, its, fields) in enumerate(curves)
                 if its == stage and len(fields.get(field, ((),))[0]) > 1]
        if lines:
            panels.append(draw_panel(title, lines))
    return panels


def on_one_sheet(panels, columns=2):
    (w, h), columns = panels[0].size, min(columns, len(panels))
    sheet = Image.new("RGB", (w * columns, h * math.ceil(len(panels) / columns)), "white")
    for k, panel in enumerate(panels):
        sheet.paste(panel, (k % columns * w, k // columns * h))
    return sheet


def draw_panel(title, lines, size=(640, 380)):
    """One plot: lines [(colour, name, steps, values)], each thin, its running mean thick."""
    scale = 2  # drawn larger and reduced: smooth lines
    W, H = (scale * s for s in size)
    left, right, top, bottom = (scale * s for s in (62, 16, 34, 62))
    picture = Image.new("RGB", (W, H), "white")
    draw = ImageDraw.Draw(picture)
    font, small = (ImageFont.load_default(scale * s) for s in (15, 12))
    smooth = [running_mean(values) for *_, values in lines]
    x0, x1 = (f(f(steps) for *_, steps, _ in lines) for f in (min, max))
    # a single outlier must not flatten the curve
    every = np.concatenate([*smooth, *(np.percentile(v, (2, 98)) for *_, v in lines)])
    ticks = nice_ticks(every.min(), every.max())
    y0, y1 = ticks[0], ticks[-1]

    def place(steps, values):
        x = left + (steps - x0) / max(x1 - x0, 1) * (W - left - right)
        y = H - bottom - (np.clip(values, y0, y1) - y0) / (y1 - y0) * (H - top - bottom)
        return list(zip(x.tolist(), y.tolist()))

    draw.text((left, scale * 8), title, fill="black", font=font)
    for tick in ticks:
        (_, y), = place(np.array([x0]), np.array([tick]))
        draw.line([(left, y), (W - right, y)], fill="#dddddd", width=scale)
        draw.text((left - scale * 6, y), f"{tick:g}", fill="#444444", font=small, anchor="rm")
    for tick in nice_ticks(x0, x1):
        if x0 <= tick <= x1:
            (x, _), = place(np.array([tick]), np.array([y0]))
            draw.line([(x, H - bottom), (x, H - bottom + scale * 4)], fill="#444444", width=scale)
            draw.text((x, H - bottom + scale * 7), f"{tick:g}", fill="#444444", font=small,
                      anchor="mt")
    draw.text((W - right, H - bottom + scale * 24), "step", fill="#444444", font=small, anchor="rt")
    at = left
    for (colour, name, steps, values), mean in zip(lines, smooth):
        if len(values) > 20:
            pale = tuple(255 - (255 - c) // 3 for c in bytes.fromhex(colour[1:]))
            draw.line(place(steps, values), fill=pale, width=scale)
        draw.line(place(steps, mean), fill=colour, width=scale * 2, joint="curve")
        y = H - bottom + scale * 44  # the legend
        draw.line([(at, y), (at + scale * 18, y)], fill=colour, width=scale * 3)
        draw.text((at + scale * 23, y), name, fill="black", font=small, anchor="lm")
        at += scale * 40 + draw.textlength(name, font=small)
    return picture.resize(size, Image.LANCZOS)


def running_mean(values):
    """Mean over a twentieth of the curve around each point; fewer points at its ends."""
    reach = len(values) // 40
    if not reach:
        return values
    total = np.concatenate([[0.0], np.cumsum(values)])
    k = np.arange(len(values))
    low, high = np.maximum(k - reach, 0), np.minimum(k + reach + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def nice_ticks(low, high, most=6):
    """Round numbers from at most `low` to at least `high`."""
    span = max(high - low, 1e-9 * max(abs(high), 1.0), 1e-12)
    for step in (m * 10.0**e for e in range(math.floor(math.log10(span)) - 2, 400)
                 for m in (1, 2, 5)):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first < most:
            return [round(k * step, 12) for k in range(first, max(last, first + 1) + 1)]


# ------------------------------------------------------------------------------ the page to look at

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>HATCH: evaluation</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: auto; padding: 1rem;
       color: #1b1f24; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem }
th, td { text-align: right; padding: .15rem .7rem; white-space: nowrap }
th:first-child, td:first-child { text-align: left } tr.group td { font-weight: 600 }
tr.group td { border-top: 1px solid #d0d7de } td.task { padding-left: 1.8rem }
thead th { border-bottom: 2px solid #57606a; vertical-align: bottom }
img { max-width: 100%; height: auto } .note { color: #57606a; font-size: .85rem }
article { border: 1px solid #d0d7de; border-radius: .5rem; padding: .8rem; margin: 1rem 0 }
.views { display: flex; flex-wrap: wrap; gap: .5rem } figure { margin: 0 }
.views img { width: 200px } figcaption { color: #57606a; font-size: .8rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f8fa; padding: .5rem;
      margin: .3rem 0; font-size: .8rem; max-height: 14rem; overflow-y: auto }
.score { font-weight: 600; padding: .05rem .5rem; border-radius: 1rem; color: #fff }
article { overflow-wrap: anywhere }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)) }
@media (max-width: 40rem) { body { padding: .6rem } .views img { width: 40vw }
 th, td { white-space: normal; padding: .15rem .3rem } td.task { padding-left: .8rem }
 table { font-size: .8rem } td:first-child { overflow-wrap: anywhere } }
</style>
"""
GOLD, WRITTEN = "#1a7f37", "#d55e00"


def shown(text, longest=2000):
    """Any text as HTML that shows it: escaped, control characters replaced, cut."""
    more = f" ... ({len(text):,} characters)" if len(text) > longest else ""
    return html.escape(printable(text[:longest])) + more


def write_report(path, runs, samples, curves, convention):
    """One self-contained page. samples: [(Run, record)]; curves: PIL images."""
    parts = [PAGE, "<h1>HATCH: evaluation</h1>"]
    for title, header, lines in tables(runs):
        head = "".join(f"<th>{shown(cell)}</th>" for cell in header)
        parts.append(f'<div class="wide"><table><thead><tr><th>{title}</th>{head}</tr></thead>')
        for label, depth, cells in lines:
            row = "".join(f"<td>{shown(cell)}</td>" for cell in cells)
            parts.append(f'<tr class="{"task" if depth else "group"}"><td class="'
                         f'{"task" if depth else ""}">{shown(label)}</td>{row}</tr>')
        parts.append("</table></div>")
    parts += [f'<p class="note">{shown(line)}</p>' for line in notes(runs, convention)]
    if curves:
        parts.append('<h2>Training</h2><p class="note">Thin: each step; thick: running mean.</p>'
                     f'<div class="curves">{"".join(img(panel, "PNG") for panel in curves)}</div>')
    if samples:
        parts.append('<h2>Questions</h2><p class="note">Drawn at random, evenly over tasks. Paths '
                     f'are seen from above, ahead is up: <b style="color:{GOLD}">gold</b>, '
                     f'<b style="color:{WRITTEN}">written</b>.</p>')
    parts += [article(*sample) for sample in samples]
    beside = path.with_name(path.name + ".tmp")
    beside.write_text("\n".join(parts) + "</html>\n", encoding="utf-8")
    os.replace(beside, path)


def article(run, record):
    """A question of the page: its images, texts, scores and camera paths."""
    try:
        pictures = record["item"].images() if record["item"] else []
    except IMAGE_ERRORS:
        pictures = []
    scores = [("score", record["score"])] + [
        (what, record[name]) for name, what in (("action", "R_act"), ("format", "R_fmt"))
        if name in record]
    badges = " ".join(
        f'<span class="score" style="background:hsl({120 * value:.0f} 60% 32%)">{what} {value:.2f}'
        "</span>" for what, value in scores)
    images = "".join(
        f"<figure>{img(picture, 'JPEG', 400)}<figcaption>view {k}</figcaption></figure>"
        for k, picture in enumerate(pictures))
    whose = f"{record['id']}, {run.name}" + ": asked directly" * (record["mode"] == "direct")
    parts = [f'<article><div>{badges} <b>{shown(record["task"])}</b> '
             f'<span class="note">{shown(whose)}</span></div>',
             f'<div class="views">{images}</div>' if images else
             '<p class="note">The images are shown with --data.</p>',
             f'<p>{shown(record["question"])}</p>',
             f'<p>gold <b>{shown(record["gold"])}</b>, read '
             f'<b>{shown(record["answer"], 200) or "nothing"}</b></p>',
             f'<pre>{shown(record["response"])}</pre>']
    if "action" in record:
        written = rewards.parse_response(record["response"]).actions or {}
        paths = "".join(from_above(pair, plan, written.get(pair))
                        for pair, plan in gold_plans(record["item"].poses).items())
        parts.append(f'<div class="views">{paths}</div>')
    return "".join(parts) + "</article>"


def img(picture, form, longest=10_000):
    """An <img> that holds its picture, reduced to `longest` pixels a side."""
    picture = picture.copy()
    picture.thumbnail((longest, longest))
    buffer = io.BytesIO()
    picture.save(buffer, form, quality=80)
    return (f'<img alt="" src="data:image/{form.lower()};base64,'
            f'{base64.b64encode(buffer.getvalue()).decode()}">')


def camera_path(plan):
    """Where a plan leads: positions (steps + 1, 2) right and ahead in metres, and the gaze's angle
    from ahead, clockwise, in radians."""
    pose, positions = np.eye(4), [(0.0, 0.0)]
    for step in plan[:100]:
        pose = pose @ geometry.pose_from_actions([step])
        positions.append((pose[0, 3], pose[2, 3]))
    return np.array(positions), math.atan2(pose[0, 2], pose[2, 2])


def from_above(pair, gold, written, side=150):
    """An SVG of two camera paths from view i to view j; `written` may be None."""
    paths = [(GOLD, *camera_path(gold))]
    if written is not None:
        with np.errstate(all="ignore"):
            paths.append((WRITTEN, *camera_path(written)))
    reach = max(0.5, 1.3 * np.abs(paths[0][1]).max())
    if written is not None and np.isfinite(paths[1][1]).all():  # a wild plan leaves the picture
        reach = max(reach, min(1.3 * np.abs(paths[1][1]).max(), 3 * reach))
    parts = [f'<figure><svg width="{side}" height="{side}" viewBox="-1.15 -1.15 2.3 2.3" '
             'style="background:#f6f8fa">']
    for colour, positions, gaze in paths:
        xy = np.clip(np.nan_to_num(positions / reach, nan=0.0), -9, 9) * (1, -1)
        x, y = xy[-1]
        line = " ".join(f"{px:.3f},{py:.3f}" for px, py in xy)
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width=".04"/>'
            f'<path d="M0 -.2L.09 .06L-.09 .06Z" fill="{colour}" transform="translate({x:.3f} '
            f'{y:.3f}) rotate({math.degrees(gaze) if math.isfinite(gaze) else 0:.0f})"/>')
    parts.append('<circle r=".05" fill="#1b1f24"/></svg>')
    metres, degrees = ("", "")
    if written is not None:
        d_t, d_r = geometry.pose_error(geometry.pose_from_actions(written),
                                       geometry.pose_from_actions(gold))
        metres, degrees = f", off by {d_t:.2g} m", f" and {d_r:.0f}°"
    return (f'{"".join(parts)}<figcaption>view {pair[0]} to {pair[1]}'
            f'{metres}{degrees}{"" if written is not None else ": no plan"}</figcaption></figure>')


def draw_examples(runs, how_many):
    """[(Run, record)] at random, evenly over the tasks of all runs."""
    rng, queues = np.random.default_rng(0), []
    for run in runs:
        by_task = {}
        for k in rng.permutation(len(run.records)):
            by_task.setdefault(run.records[k]["task"], deque()).append((run, run.records[k]))
        queues += by_task.values()
    chosen = []
    while len(chosen) < how_many and any(queues):
        chosen += [queue.popleft() for queue in queues if queue]
    return chosen[:how_many]


# -------------------------------------------------------------------------------------- plumbing


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


def load_for_answers(path, precision, device):
    """Model and tokenizer of a directory, to generate with."""
    transformers.utils.logging.disable_progress_bar()
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    try:
        model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision],
            output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise geometry.DataError(
            f"{path}: cannot be read as a Qwen2.5-VL ({str(error).splitlines()[0]})") from None
    if info["missing_keys"] or info["mismatched_keys"]:
        lacking = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
        raise geometry.DataError(f"{path}: {len(lacking)} tensors are missing or have another "
                                 f"shape than config.json says, {lacking[0]} among them")
    speed_up(model.model.visual)
    return model.eval().to(device), tokenizer


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


def gather(items):
    """What the lists of all processes hold, in one list."""
    everyone = [items]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, items)
    return [item for its in everyone for item in its]


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = int(os.environ.get("RANK", 0)), 1, None
    if args.answer:
        check_inputs(args)
        import_torch()
        rank, world, device = start_processes()
    say = partial(print, flush=True) if rank == 0 else lambda *_, **__: None
    out, skip = Path(args.out), Skipped(say)
    out.mkdir(parents=True, exist_ok=True)
    if args.answer:
        if args.batch % world:
            raise geometry.DataError(f"--batch {args.batch} cannot be shared by {world} processes: "
                                     f"use --batch {world}")
        if args.demo:
            say("Demo: rendered rooms. The real run, for example:\n"
                "  python evaluate.py --bench spar-mv --data /path/to/SPAR-Bench")
        items = load_items(args.bench, args.data, skip)
        kept = np.random.default_rng(0).permutation(len(items))[:args.limit]
        path, items = out / "predictions.jsonl", [items[k] for k in sorted(kept)]
        predict(items, args, path, skip, say, rank, world, device)
    if rank == 0:
        curves = []
        for log in args.curves or sorted(Path("out").glob("*/log.jsonl")):
            try:
                curves.append(read_curve(log))
            except geometry.DataError as error:
                if args.curves:
                    raise
                skip(str(error))
        panels = draw_curves(curves)
        if panels:
            on_one_sheet(panels).save(out / "curves.png")
        elif args.draw_only:
            raise geometry.DataError(f"{', '.join(args.curves)}: no log with two steps or more")
        if args.draw_only:
            say(f"wrote   {out / 'curves.png'}")
        else:
            found = [read_run(file, args, skip) for file in args.score] if args.score else [
                read_run(path, args, skip, {item.id: item for item in items})]
            runs = [score_run(*one, args.convention) for one in found]
            write_results(out, runs, panels, skip.named, args, say)
    if world > 1:
        dist.destroy_process_group()


def check_inputs(args):
    """Name what is missing, and the command that makes it, before anything slow begins."""
    if args.model in MADE_BY and not (Path(args.model) / "config.json").exists():
        raise geometry.DataError(f"{args.model}: not there yet; run `{MADE_BY[args.model]}` first")
    if args.demo and not Path(args.data).is_dir():
        raise geometry.DataError(f"{args.data}: not there yet; run `python pasta.py --grid 4`, "
                                 "which renders it, or name --data")


def write_results(out, runs, panels, skipped, args, say):
    """Print the tables; write results.json and report.html."""
    print_tables(runs, args.convention)
    (out / "results.json").write_text(json.dumps({
        "args": vars(args), "skipped": skipped, "overall": overall(runs), "runs": [
            {"bench": run.bench, "name": run.name, **run.form,
             "rows": [row._asdict() for row in run.rows]} for run in runs],
        "paper": {bench.title: bench.paper for bench in BENCHES.values() if bench.paper}},
        indent=1) + "\n")
    samples = draw_examples(runs, args.show)
    write_report(out / "report.html", runs, samples, panels, args.convention)
    if skipped:
        say(f"skipped {len(skipped):,} rows, predictions or logs, named above and in results.json")
    say(f"wrote   {out}: {'' if args.score else 'predictions.jsonl, '}results.json, "
        f"{'curves.png, ' if panels else ''}report.html")


if __name__ == "__main__":
    try:
        main()
    except geometry.DataError as error:
        sys.exit(f"evaluate.py: {error}")
    except OSError as error:  # a full disk, a file where a folder should be, no permission
        sys.exit(f"evaluate.py: {error}; predictions made before are kept")
    except KeyboardInterrupt:
        sys.exit("evaluate.py: interrupted; the same command goes on from the predictions made")
