"""evaluate.py: the official scorers, the averages of the tables, every published format from disk
to table, files as people have them, predictions that continue, and a page that shows anything."""

import base64
import html
import io
import json
import math
import re
import shutil
import sys
import xml.etree.ElementTree
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

import benchmark
import evaluate
import geometry
import rewards
from conftest import block_with, run, run_block
from scenes import change_weights


def jpeg(colour="red", size=(64, 48)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "JPEG")
    return buffer.getvalue()


def results(out):
    """results.json with the fields of its last run, "rows" {label: [depth, n, score, ...]}."""
    found = json.loads((out / "results.json").read_text())
    return found | found["runs"][-1]


def predictions(out):
    _, *lines = map(json.loads, (out / "predictions.jsonl").read_text().splitlines())
    return {line["id"]: line for line in lines}


def write_lines(path, lines, tail="", encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*map(json.dumps, lines), tail]), encoding=encoding)
    return path


def test_recorded_official_scores(shared):
    for name, check in (
            ("spar", lambda case: evaluate.score_spar(
                case["task"], case["prediction"], case["gold"]) == pytest.approx(
                    case["official_score"] * bool(case["prediction"]), abs=1e-12)),  # it differs
            ("mindcube", lambda case: evaluate.mindcube_letter(case["text"]) == case["extracted"]),
            ("mmsi", lambda case: evaluate.mmsi_letter(
                case["prediction"]) == case["official_extracted"] and evaluate.score_answer(
                    "mmsi", "MSR", case["prediction"], case["gold"]) == case["official_score"])):
        lines = (shared / f"scorer_cases/{name}_cases.jsonl").read_text().splitlines()
        assert len(lines) > 20 and not [case for case in map(json.loads, lines) if not check(case)]


def test_scores_and_letters_of_good_and_of_hostile_texts():
    for task, *cases in (
            ("position_matching", ("D. r", "D", 1), ("(D)", "D", 0), ("", "D", 0), ("c", "C", 1)),
            ("depth_prediction_oc", ("between 2.0 and 9", "2.0", 1),  # one view: the first number
             ("none", "0.0", 0), ("^3 2", "2", 1), ("1.8", "2.0", 0.9), ("1", "none", 0)),
            ("depth_prediction_oc_mv", ("between 2.0 and 9", "2.0", 0),  # several: the last
             ("between 9 and 2.0", "2.0", 1)),
            ("view_change_infer", ("move_left:1.3", "move_left:2.6", 0.8),  # by the prediction
             ("move_left:5.2", "move_left:2.6", 0.82),  # 0.5 is within the loosest
             ("move_right:-2.6", "move_left:2.6", 1), ("move left", "move_left:2.6", 0),
             ("move_left:2.6,note:x", "move_left:2.6", 0)),
            ("camera_turn", ("left 20", "right 20", 0), ("right 20", "right 20", 1))):
        for prediction, gold, score in cases:
            assert evaluate.score_spar(task, prediction, gold) == pytest.approx(score), prediction
    for read, cases in (
            (evaluate.cvbench_letter, {
                "(B)": "b", "b": "b", "The answer is (C).": "c", "Answer: A": "a", "D. left": "d",
                "": "", "A desk": "a", "b.": "b", "The answer is: B": ":"}),  # so it reads this
            (evaluate.mindcube_letter, {
                "The answer is Behind the sofa": "B", "My answer is Above": "A", "": None,
                "(B)Answer:D": "D", "<Answer>the answer is C<x> D": "C",
                "<Answer>A or B</Answer> C": "B"}),
            (evaluate.answer_of, {
                "<action>[]</action><answer> B. left\n</answer>": "B. left", "plain": "plain",
                "<answer>cut off": "cut off", '<action>[{"from":0': "", "": "",
                "<think>A.</think> C": "C", "<answer>A</answer><answer>B</answer>": "A"})):
        assert {text: read(text) for text in cases} == cases
    hostile = ["", "\0", "`" * 9999, "<answer>" * 999, "9" * 5000, "move_left:" + "9" * 400,
               "move_left:nan", "move_left:inf,move_right:inf", "\ud800", "A" * 10**5, "`` ``",
               "10^" * 999, "<Answer>", "answer is", "(" * 999, ":" * 999, "<action>" * 999]
    for name, bench in evaluate.BENCHES.items():
        for task in list(bench.prompt)[:1 if bench.letter else None]:
            for text in map(evaluate.answer_of, hostile):
                for gold in ("A", "(A)", "1.5", "move_left:2.6", "\ud800"):
                    assert 0 <= evaluate.score_answer(name, task, text, gold) <= 1


COUNTS = dict(zip([task for tasks in evaluate.SPAR_LEVELS.values() for task in tasks], (
    360, 372, 393, 363, 320, 372, 365, 297, 393, 400, 400, 340, 336, 364, 400, 361, 372, 344, 302,
    357))) | {"around": 250, "rotation": 200, "among": 600} | dict(zip(
        evaluate.BENCHES["mmsi"].prompt, (93, 94, 81, 86, 85, 83, 64, 66, 74, 76, 198))
) | {"ADE20K": 300, "COCO": 900, "Omni3D": 1200}  # questions of each task, as published
PAPER = """382 370 431 399 596 495 472 506 293 338 387 313 317 407 465 501 482 750 869 809
134 262 326 249 464 345 353 378 278 192 233 258 256 294 160 325 239 693 722 707
413 474 671 536 656 310 502 502 305 208 233 247 270 436 411 497 452 705 784 745"""  # in tenths:
# GPT-4.1, Qwen2.5-VL-3B, HATCH; of each benchmark its groups and average, Overall after Table 1's


def test_averages_and_intervals():
    """Tables 1 and 4 from their rounded groups; other cases; an interval as wide as in theory."""
    rows = [[int(number) / 10 for number in row.split()] for row in PAPER.splitlines()]
    assert list(zip(*rows[1:])) == [two for its in evaluate.PAPER.values() for two in its.values()]
    for row, averages in zip(map(iter, rows), ([], [], [])):
        for bench, total in zip(list(evaluate.BENCHES)[1:], (4345, 1050, 1000, 2866, 2400)):
            if bench == "spar-si":  # Table 1 is done, but for Overall
                assert np.mean(averages) == pytest.approx(next(row), abs=0.051)
            its = evaluate.BENCHES[bench]
            groups = ([task for task in tasks if task in its.prompt and task in COUNTS]
                      for tasks in its.groups.values())
            scores = {task: [score / 100] * COUNTS[task]
                      for tasks, score in zip(filter(None, groups), row) for task in tasks}
            averages.append(next(row))
            _, n, average, *_ = evaluate.table_rows(bench, scores, resamples=1)["Avg"]
            assert (n, average) == (total, pytest.approx(averages[-1], abs=0.11)), bench
    spar = {"depth_prediction_oc_mv": [1.0] * 9, "depth_prediction_oo_mv": [0.0]}
    tasks = {"depth_prediction_oc_mv": 100, "depth_prediction_oo_mv": 0}
    for bench, scores, convention, expected in (
            ("spar-mv", spar, "hatch", {"Low": 90, **tasks, "Avg": 90}),
            ("spar-mv", spar, "spar", {"Low": 50, **tasks, "Avg": 50}),
            ("cvbench", {"ADE20K": [1.0] * 9, "COCO": [0.0], "Omni3D": [0.0]}, "hatch",
             {"2D": 50, "ADE20K": 100, "COCO": 0, "3D": 0, "Omni3D": 0, "Avg": 25}),
            ("mindcube", {"around": [1.0], "translation": [0.0] * 9}, "hatch",
             {"Around": 100, "Translation": 0, "Avg": 100})):  # translation does not count
        rows = evaluate.table_rows(bench, scores, convention, resamples=1)
        assert {label: row[2] for label, row in rows.items()} == pytest.approx(expected)
    rows, half = evaluate.table_rows("mmsi", {"MSR": [0.0, 1.0] * 200}), 98 * math.sqrt(1 / 400)
    assert rows["Avg"] == pytest.approx((0, 400, 50, 50 - half, 50 + half), abs=0.8)


def test_prompts_are_the_published_ones():
    """To the letter: length and checksum of the published text with this question in it."""
    for bench, task, *published in (
            ("spar-si", "depth_prediction_oc", 69, 0x6dbad909), ("mmsi", "MSR", 114, 0xf608e0a7),
            ("spar-mv", "spatial_imagination_oo_mv", 77, 0xb1deb755),
            ("spar-mv", "position_matching", 209, 0xe2c03d34),
            ("spar-mv", "view_change_infer", 13, 0xa3b2df27),
            ("cvbench", "COCO", 75, 0x671ca281), ("mindcube", "among", 457, 0xf4df6996)):
        item = evaluate.Item("1", task, "How {far}?", "A", None, 2)
        direct = evaluate.prompt_of(item, bench, "direct")
        assert [len(direct), zlib.crc32(direct.encode())] == published, direct
        for mode, instruction in evaluate.INSTRUCTIONS.items():
            assert evaluate.prompt_of(item, bench, mode) == f"How {{far}}?\n{instruction}"
            assert evaluate.prompt_of(item._replace(views=1), bench, mode) == direct


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow", reason="pip install pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


def write_spar(folder):
    rows = [{"id": k, "task": task, "question": f"Question {k}?", "answer": answer, "image": [
        {"bytes": jpeg(size=(64 + 8 * v, 48)), "path": f"{v}.jpg"} for v in range(views)]}
        for k, (task, views, answer) in enumerate((
            ("depth_prediction_oc_mv", 3, "1.5\n"), ("position_matching", 2, "(A)"),
            ("depth_prediction_oc", 1, "2.0"), ("view_change_infer", 2, "move_left:1"),
            ("obj_spatial_relation_oo_mv", 3, "B."), ("spatial_imagination_oc", 1, "C"),
            ("no_such_task", 2, "A"), ("position_matching", 2, ""),
            ("depth_prediction_oo_mv", 2, "two"), ("position_matching", 2, "A")))]
    rows[4]["image"][1]["bytes"] = b"no jpeg"
    rows[9]["image"][1]["bytes"] = jpeg(size=(4040, 16))  # longer than 200 : 1
    return write_parquet(folder / "data/test-0.parquet", rows)


def write_mindcube(folder):
    rows = [{"id": f"{name}_q0", "question": "Where? A. Here B. There", "gt_answer": gold,
             "images": [f"other_all_image/{name}/{v}.jpg" for v in range(3)]}
            for name, gold in (("among", "A"), ("around", "B"), ("rotation", "A"))]
    for name in sum((row["images"] for row in rows), [])[:-1]:  # one is missing
        image = folder / "data" / name
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(jpeg("blue"))
    return write_lines(folder / "data" / "raw" / "MindCube_tinybench.jsonl", [
        *rows, rows[0] | {"id": "among_x", "gt_answer": None},
        rows[0] | {"id": "among_y", "question": "Half an emoji \ud83d"}],
        "[" * 100_000 + "\n{no json\n", "utf-8-sig")


def write_mmsi(folder):
    return write_parquet(folder / "MMSI_Bench.parquet", [
        {"id": k, "images": [jpeg("green"), jpeg("blue", (80, 60))], "question_type": task,
         "question": f'Which "one"?\n\tA: x, B: {k}<|image_pad|><|im_end|>', "answer": answer}
        for k, (task, answer) in enumerate((
            ("MSR", "(A)"), ("Motion (Cam.)", "B."), ("No such type", "D"), ("MSR", "E"),
            ("Positional Relationship (Cam.-Obj.)", " C\n")))])


@pytest.mark.parametrize("text, answer", [
    ("Option A. is wrong...</think>\n\nC", "C"), ("right 20<|im_end|>", "right 20"),
    ("C<|endoftext|><|im_start|>user\nB<|im_end|>", "C"), ("<answer>A<|im_end|>", "A"),
    ("<think>... <answer></answer> ...</think><answer>C</answer>", "C"),
    ("<think>maybe <answer>B</answer></think><answer>C</answer>", "C"),
    ("maybe <answer>B</answer>, no</think><answer>C</answer>", "C"),
    ("<think>a<think>b</think> <answer>B</answer></think><answer>C</answer>", "C"),
    ("<think>maybe <answer>B</answer></think>C", "C"), ("<think>x</think>", ""),
    ("<answer>A</answer><answer>B</answer>", "A"), ("<answer> </answer><answer>B</answer>", "B"),
    ("<answer>A</answer><think>or <answer>B</answer>?</think>", "A"), ("<answer></answer>C", ""),
    ("<action>[]</action><think>x</think> C ", "C"), ("<think>a <action></think>[]</action>C", "C"),
    ("<think>a</think>B<think>so <answer>C</answer>", ""), ("<action>[]</action><answer>C", "C"),
    ("I think. <action>[]</action> C", "C"), ("Well: <answer>C</answer> it is", "C"), ("C", "C")])
def test_the_answer_of_a_response(text, answer):
    assert evaluate.answer_of(text) == answer


def write_cvbench(folder):
    for name, sources in (("2d", ("ADE20K", "COCO", "Nowhere")), ("3d", ("Omni3D",))):
        path = write_parquet(folder / f"test_{name}.parquet", [
            {"idx": k, "image": {"bytes": jpeg("gray"), "path": None}, "source": source,
             "prompt": "(A) one (B) two?", "answer": "(B)"} for k, source in enumerate(sources)])
    return path


@pytest.mark.parametrize("bench, write, golds, said, labels", [
    ("spar-mv", write_spar, {0: "1.5", 1: "A", 3: "move_left:1"}, (
        "row 6: unknown task 'no_such_task'", "row 7: it has no answer", "row 8: no answer can mat",
        "4 (obj_spatial_relation_oo_mv): image 1: cannot be read", "9 (position_matching): 9: "),
     ("Low", "depth_prediction_oc_mv", "Middle", "position_matching", "view_change_infer")),
    ("mindcube", write_mindcube, {"among_q0": "A", "around_q0": "B"}, (
        "row 3: it has no gt_answer", "row 5: it has no id", "row 6: it has no id",
        "rotation_q0 (rotation): ", "among_y (among): among_y: images"), ("Around", "Among")),
    ("mmsi", write_mmsi, {0: "A", 1: "B", 4: "C"}, (
        "row 2: unknown task 'No such type'", "row 3: no answer can match its gold 'E'"),
     ("Position", "Positional Relationship (Cam.–Obj.)", "Motion", "Motion (Cam.)", "MSR")),
    ("cvbench", write_cvbench, {0: "B", 1: "B", "0#2": "B"}, ("row 2: unknown task 'Nowhere'",),
     ("2D", "ADE20K", "COCO", "3D", "Omni3D"))])
def test_published_formats_from_disk_to_table(bench, write, golds, said, labels, root, tiny_model,
                                              tmp_path):
    """What can be asked is asked (its gold), anything else named (said) and left out."""
    write(tmp_path / "bench")
    done = run("evaluate.py", root, tmp_path, "--bench", bench, "--data", "bench", "--model",
               tiny_model, "--out", "out", "--max-new-tokens", 3, "--batch", 2)
    assert done.returncode == 0 and "HATCH (paper)" in done.stdout, done.stdout
    found, made = results(tmp_path / "out"), predictions(tmp_path / "out")
    assert [text for text in said if not any(text in its for its in found["skipped"])] == []
    assert f"skipped {len(said)} rows or pictures" in done.stdout, done.stdout
    assert len(found["skipped"]) == len(said) and found["rows"]["Avg"][1] == len(golds)
    assert [label for label in found["rows"] if label not in evaluate.FORM] == [*labels, "Avg"]
    assert {id_: line["gold"] for id_, line in made.items() if "response" in line} == {
        str(id_): gold for id_, gold in golds.items()}
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<article>") == len(golds) <= page.count("data:image/jpeg")


def test_two_copies_of_a_benchmark_are_refused(tmp_path):
    for revision in "12":
        write_spar(tmp_path / revision)
    with pytest.raises(geometry.DataError, match=f"{tmp_path}/1/data and in {tmp_path}/2/data: na"):
        evaluate.load_items("spar-mv", tmp_path, skip=lambda text: None)


def test_pictures_in_their_order_and_blind_ones_grey(tmp_path, monkeypatch):
    path, seen = write_spar(tmp_path), []
    items = evaluate.load_items("spar-mv", path, lambda text: None)
    evaluate.ask(items, evaluate.parse_args(["--blind"]), None,
                 lambda images, **_: seen.extend(images), 0)
    for pictures in (items[0].images(), seen):
        assert [picture.size for picture in pictures] == [(64, 48), (72, 48), (80, 48)]
    assert {grey.getextrema() for grey in seen} == {((128, 128),) * 3}
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(geometry.DataError, match="pip install pyarrow"):
        evaluate.load_items("spar-mv", path)


@pytest.fixture(scope="module")
def answered(root, rooms, tiny_model, tmp_path_factory):
    """Folder of a whole evaluation of the rooms by the tiny model, ten tokens a response."""
    work = tmp_path_factory.mktemp("answered")
    done = evaluation(root, work, rooms, tiny_model)
    assert done.returncode == 0 and "GiB" in done.stdout.split("answering")[0], done.stdout
    return work / "out"


def evaluation(root, work, data, model, *more, **how):
    return run("evaluate.py", root, work, "--data", data, "--model", model, "--out", "out",
               "--max-new-tokens", 10, "--batch", 4, "--show", 5, *more, **how)


def test_each_is_answered_as_if_asked_alone(answered, rooms, tiny_model):
    """What generate_greedily, which test_sft.py holds against the library's, says to it alone."""
    _, model, tokenizer = evaluate.load_model(str(tiny_model))
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 56**2, "longest_edge": 448**2})
    items, made = evaluate.load_items("rooms", rooms), predictions(answered)
    assert (answered / "report.html").read_text().count("<article>") == 5  # --show
    assert {item.id: item.gold for item in items} == {k: its["gold"] for k, its in made.items()}
    for item in items[::3]:
        prompt = rewards.encode_prompt(tokenizer, processor, item.images(),
                                        evaluate.prompt_of(item, "rooms", "action"), "")
        said = evaluate.generate_greedily(model, tokenizer, [prompt], [10])
        assert said == [made[item.id]["response"]]


def test_ask_about_photos(answered, rooms, tiny_model, tmp_path, monkeypatch, capsys):
    """About a question's pictures the model says what it says in the evaluation; what is written is
    read out; a single picture is asked about without moves."""
    item = evaluate.load_items("rooms", rooms)[0]
    paths = [str(tmp_path / f"{k}.png") for k in range(item.views)]
    for path, picture in zip(paths, item.images()):
        picture.save(path)
    given = ["--model", str(tiny_model), "--ask", item.question, "--max-new-tokens", "10"]
    evaluate.main([*given, "--images", *paths])
    said = predictions(answered)[item.id]["response"]
    assert capsys.readouterr().out.startswith(
        f"response  {said}\n"
        "form      not the one asked for: moves and answer are what can be read\nanswer    ")

    said = '<action>[{"from":0,"to":1,"action":[{"turn_right_deg":5}]}]</action><answer>x</answer>'
    prompts = []

    def write(model, tokenizer, asked, longest):
        prompts.extend(tokenizer.decode(ids) for ids, _ in asked)
        return [said]

    monkeypatch.setattr(evaluate, "generate_greedily", write)
    evaluate.main([*given, "--images", *paths])
    evaluate.main([*given, "--images", paths[0]])
    assert capsys.readouterr().out == 2 * (
        f"response  {said}\nmoves     view 0 to view 1: turn_right_deg 5\nanswer    x\n")
    assert [rewards.ACTION_INSTRUCTION in prompt for prompt in prompts] == [True, False]
    evaluate.main([*given, "--images", *paths, paths[0]])  # two of three pairs lack
    assert "turn_right_deg 5\nform      not the one asked for" in capsys.readouterr().out


def test_a_photo_on_its_side_is_put_upright(root, tiny_model, tmp_path, monkeypatch):
    """Where its EXIF data say so: the model sees the same pixels."""
    upright = Image.effect_noise((48, 96), 64).convert("RGB")
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lies.png", exif=exif)
    seen = []
    monkeypatch.setattr(evaluate, "generate_greedily", lambda model, tokenizer, asked, longest: [
        seen.append(images["pixel_values"]) or "x" for _, images in asked])
    for name in ("upright", "lies"):
        run("evaluate.py", root, tmp_path, "--model", tiny_model, "--ask", "?", "--images",
            f"{name}.png")
    assert torch.equal(*seen)


def test_a_response_depends_on_its_own_budget(tiny_model, monkeypatch):
    """Questions about two and about four images are answered in one batch as each alone: what comes
    behind a row's budget, tokens or NaN, is not its own."""
    for flags, of_two, of_four in (("--mode action", 160, 480), ("--max-new-tokens 7", 7, 7),
                                   ("--mode language", 256, 256), ("--mode direct", 128, 128)):
        args = evaluate.parse_args(flags.split())
        items = [evaluate.Item(str(views), "camera_turn", "How?", "A", lambda views=views: [
            Image.new("RGB", (64, 48), "red")] * views, views) for views in (2, 4)]
        assert [evaluate.longest_response(item, args) for item in items] == [of_two, of_four]
    _, model, tokenizer = evaluate.load_model(str(tiny_model))
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 56**2, "longest_edge": 448**2})
    monkeypatch.setattr(evaluate, "longest_response", lambda item, args: 3 * item.views)
    args = evaluate.parse_args([])
    together = [evaluate.ask(items, args, tokenizer, processor, k) for k in range(2)]
    alone = [evaluate.ask(items, args, tokenizer, processor, k) for k in range(2)]
    evaluate.write_answers(model, tokenizer, together, args)
    for one in alone:
        evaluate.write_answers(model, tokenizer, [one], args)
    texts = [line["response"] for _, line, _ in together]
    assert texts == [line["response"] for _, line, _ in alone] and len(texts[0]) < len(texts[1])
    passes = []
    model.lm_head.register_forward_hook(lambda module, given, logits: (
        passes.append(1), logits.fill_(math.nan) if len(passes) == 7 else logits)[1])
    prompts = [prompt for *_, prompt in together]
    assert evaluate.generate_greedily(model, tokenizer, prompts, [6, 12]) == [texts[0], None]


def test_the_dtype_counts_where_something_is_left_to_ask(answered, root, rooms, tiny_model,
                                                         tmp_path):
    """Not its flag: auto is fp32 on a CPU. What is complete is scored anywhere."""
    shutil.copytree(answered, tmp_path / "out")
    path = tmp_path / "out/predictions.jsonl"
    head, *lines = path.read_text().splitlines(keepends=True)
    assert json.loads(head)["args"]["precision"] == "torch.float32"
    path.write_text(head + "".join(lines[:-1]))
    done = evaluation(root, tmp_path, rooms, tiny_model, "--precision", "bf16")
    assert done.returncode == 1 and "with another precision: name another --out" in done.stdout
    done = evaluation(root, tmp_path, rooms, tiny_model, "--precision", "fp32")
    assert " 1 to be asked" in done.stdout
    assert predictions(tmp_path / "out") == predictions(answered)
    done = evaluation(root, tmp_path, rooms, tiny_model, "--precision", "bf16")
    assert done.returncode == 0 and " 0 to be asked" in done.stdout, done.stdout


def test_an_interrupted_evaluation_continues(answered, root, rooms, tiny_model, tmp_path):
    """With two processes, and whatever the model's own defaults: as one would have written."""
    shutil.copytree(answered, tmp_path / "out")
    shutil.copytree(tiny_model, tmp_path / "moved")
    write_lines(tmp_path / "moved/generation_config.json", [{"repetition_penalty": 9.0}])
    path = tmp_path / "out" / "predictions.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:6]) + lines[6][:-1])  # killed before the end of the seventh
    done = evaluation(root, tmp_path, rooms, "moved", processes=2)
    assert f"{len(lines) - 6} to be asked" in done.stdout, done.stdout
    assert predictions(tmp_path / "out") == predictions(answered)  # rows do not feel neighbours
    done = evaluation(root, tmp_path, rooms, "moved", "--limit", 3)
    assert " 0 to be asked" in done.stdout and results(tmp_path / "out")["rows"]["Avg"][1] == 3


def test_logits_that_are_not_finite(root, rooms, tiny_model, tmp_path):
    """They end an evaluation: nothing that they make the model write is scored."""
    shutil.copytree(tiny_model, tmp_path / "model")
    change_weights(tmp_path / "model", lambda tensors: tensors | {
        "model.norm.weight": torch.full((192,), math.nan)})
    done = run("evaluate.py", root, tmp_path, "--data", rooms, "--model", "model", "--limit", 3)
    assert done.returncode == 1 and re.search(
        r"^evaluate.py: \d+ \(\w+\): the model's logits are not finite in --precision auto; try",
        done.stdout.splitlines()[-1])
    assert '"response"' not in (tmp_path / "out/evaluation/rooms/predictions.jsonl").read_text()


def test_predictions_of_another_run_are_not_mixed(answered, root, rooms, tiny_model, tmp_path):
    shutil.copytree(answered, tmp_path / "out")
    shutil.copytree(tiny_model, tmp_path / "other")
    weights, path = tmp_path / "other/model.safetensors", tmp_path / "out/predictions.jsonl"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    text = (rooms / "benchmark/rooms.jsonl").read_text()  # the same ids, rendered anew
    anew = write_lines(tmp_path / "anew.jsonl", [], text.replace('"question": "', '"question": "?'))
    for given in ((rooms, "other"), (anew, tiny_model), (rooms, tiny_model, "--mode", "direct"),
                  (rooms, tiny_model, "--blind")):
        assert "--overwrite" in evaluation(root, tmp_path, *given).stdout
        assert path.read_bytes() == (answered / "predictions.jsonl").read_bytes()
    done = run("evaluate.py", root, tmp_path, "--score", path, "--data", anew)
    assert done.returncode and "was asked other questions" in done.stdout
    evaluation(root, tmp_path, rooms, "other", "--overwrite", "--limit", 2)
    assert len(predictions(tmp_path / "out")) == 2
    weights.write_bytes(weights.read_bytes()[:-1] + b"\2")  # trained again
    done = evaluation(root, tmp_path, rooms, "other", "--limit", 3)
    assert "other has been trained again" in done.stdout and " 3 to be asked" in done.stdout


@pytest.fixture
def score(root, tmp_path):
    """Scores lines, or a text each, for four rooms: a camera turns by 20, 20 and 60 degrees, or
    walks; asked is how it turned. Called: (stdout, rows)."""
    rows = []
    for k, (degrees, walked) in enumerate(((20, 0.0), (20, 0.04), (60, 0.0), (30, 2.0))):
        pose = geometry.pose_from_actions([{"move_forward_m": walked}, {"turn_right_deg": degrees}])
        (tmp_path / f"{k}.jpg").write_bytes(jpeg())
        rows.append({"id": k, "task": "camera_turn", "question": "?", "answer": f"right {degrees}",
                     "image": ["0.jpg", f"{k}.jpg"], "pose": [np.eye(4).tolist(), pose.tolist()]})
    write_lines(tmp_path / "rooms.jsonl", rows)

    def scored(lines, *more, **how):
        path = write_lines(tmp_path / "theirs.jsonl", [
            {"id": k, "response": x} if type(x) is str else x for k, x in enumerate(lines)], **how)
        done = run("evaluate.py", root, tmp_path, "--score", path, "--bench", "rooms", "--data",
                   "rooms.jsonl", *more)
        assert done.returncode == 0, done.stdout
        return done.stdout, results(tmp_path / "out" / "evaluation")["rows"]
    return scored


def test_turns_and_walks_apart_beside_the_best_constant_plan(score, tmp_path):
    items = evaluate.load_items("rooms", tmp_path / "rooms.jsonl")
    texts = [rewards.write_response(rewards.gold_plans(item.poses), said) for item, said in zip(
        items, ("right 20", "left 20", "right 60", "right 30"))]
    texts[2] = texts[0]  # 20 where 60 is right
    texts[0] += "<|im_end|>\nand more"  # as some engines hand it out
    _, rows = score(texts, "--mode", "action")
    off, walk = math.exp(-40 / 30), math.exp(-2 - 10 / 30)  # of 20 where it is 60; where it walks
    for label, n, expected in (
            ("camera_turn", 4, 0.5), ("Avg", 4, 0.5), ("R_fmt", 4, 1), ("R_act", 4, (3 + off) / 4),
            ("R_act, turns", 3, (2 + off) / 3), ("R_act, walks", 1, 1)):
        assert rows[label][1:3] == [n, pytest.approx(100 * expected, abs=1e-3)], label
    constants = results(tmp_path / "out/evaluation")["constants"]
    for label, expected in (
            ("R_act", (2 + off + walk) / 4), ("R_act, turns", (2 + off) / 3), ("R_act, walks", 1)):
        assert constants[label] == pytest.approx(100 * expected, abs=1e-3), label
    texts = (f"<think>So.</think><answer>{item.gold}</answer>" for item in items)
    _, rows = score(texts, "--mode", "language")  # its form is another
    assert rows["R_fmt"][2] == rows["Avg"][2] == 100 and "R_act" not in rows


def test_best_constant_answers_stand_beside_the_scores(root, tmp_path):
    """Of each task one of its golds, by its own scorer; groups and Avg weigh them as they do the
    scores; a published benchmark has none."""
    asked = (("camera_turn", "right 20"), ("camera_turn", "right 20"), ("camera_turn", "left 20"),
             ("obj_spatial_relation_oo_mv", "B"), ("obj_spatial_relation_oo_mv", "C"),
             ("depth_prediction_oc_mv", "2.0"), ("depth_prediction_oc_mv", "2.2"),
             ("depth_prediction_oc_mv", "40"), ("position_matching", "A"))
    rows = [{"id": k, "task": task, "question": "?", "answer": gold, "image": ["a.jpg", "b.jpg"]}
            for k, (task, gold) in enumerate(asked)]
    write_lines(tmp_path / "rooms.jsonl", rows)
    write_lines(tmp_path / "theirs.jsonl", [{"id": row["id"], "response": "B"} for row in rows])
    # "right 20" is right twice; "2.0" once, and 9 % off, within nine of the ten thresholds
    for convention, average in (("hatch", (2 + 1 + 1.9 + 1) / 9),
                                ("spar", (2 / 3 + 1 / 2 + 1.9 / 3 + 1) / 4)):
        done = run("evaluate.py", root, tmp_path, "--bench", "rooms", "--data", "rooms.jsonl",
                   "--score", "theirs.jsonl", "--convention", convention)
        assert done.returncode == 0, done.stdout
        constants = results(tmp_path / "out/evaluation")["constants"]
        for label, expected in (
                ("camera_turn", 2 / 3), ("obj_spatial_relation_oo_mv", 0.5), ("High", 0.5),
                ("depth_prediction_oc_mv", 1.9 / 3), ("position_matching", 1), ("Avg", average)):
            assert constants[label] == pytest.approx(100 * expected), label
        header, *lines = [line.split() for line in done.stdout.splitlines() if line.strip()]
        assert header[-3:] == ["theirs", "n", "constant"]
        shown = {words[0]: words[-1] for words in lines}
        assert all(shown[label] == f"{value:.1f}" for label, value in constants.items())
    rows = [row for row in rows if row["task"] != "camera_turn"]
    write_lines(tmp_path / "spar.jsonl", rows)
    done = run("evaluate.py", root, tmp_path, "--bench", "spar-mv", "--data", "spar.jsonl",
               "--score", "theirs.jsonl")
    assert done.returncode == 0 and results(tmp_path / "out/evaluation")["constants"] == {}
    (header,) = [line for line in done.stdout.splitlines() if line.startswith("SPAR-Bench-MV")]
    assert " ".join(header.split()).endswith("theirs n Qwen2.5-VL-3B (paper) HATCH (paper)")


@pytest.mark.parametrize("encoding, head", [
    ("utf-8", ["args"]), ("utf-8-sig", {"args": None}), ("utf-8", {"args": {}, "run": "x"}),
    ("utf-8", {"args": {"model": ["m"], "mode": 7, "data": 5, "bench": ["x"], "blind": True}})])
def test_predictions_of_another_engine(encoding, head, score, tmp_path):
    """Only id and response are needed, the last line of an id counts, what is missing is wrong;
    odd lines are named or read over; Windows tools write a mark."""
    said, rows = score([
        {"id": 0, "response": "right 20", "skipped": 3}, head, {"id": None}, 7,
        {"id": "\ud800\x1b", "response": "x"}, {"id": 1, "response": {"a": 1}, "mode": ["x"]},
        {"id": 3, "response": "left 30"}, {"id": 3, "response": "right 30", "views": "2"}],
        tail="[" * 100_000, encoding=encoding)
    assert rows["camera_turn"][1:3] == [3, pytest.approx(100 / 3)]
    skipped = results(tmp_path / "out/evaluation")["skipped"]
    assert sum("not JSON with an" in why for why in skipped) > 2
    assert any("the benchmark has no question '\\ud800" in why for why in skipped)
    assert "2 questions without a response count as wrong" in said


def test_tables_and_overall_on_any_console(root, tmp_path):
    """Tasks stand under their own level; Overall is the mean of three; files come first, and what
    the console lacks is replaced."""
    for bench, write, right in (("spar-mv", write_spar, 3), ("mindcube", write_mindcube, 1),
                                ("mmsi", write_mmsi, 0)):
        data = write(tmp_path)
        head = {"args": {"bench": bench, "data": str(data), "model": "m"}}
        items = evaluate.load_items(bench, data, skip=lambda text: None)
        write_lines(tmp_path / f"{bench}.jsonl", [head, *(
            {"id": item.id, "response": item.gold if k < right else "?"}
            for k, item in enumerate(items))])
    done = run("evaluate.py", root, tmp_path, "--convention", "spar", "--score", "spar-mv.jsonl",
               "mindcube.jsonl", "mmsi.jsonl", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "(Cam.?Obj.)" in done.stdout, done.stdout
    lines = list(filter(None, map(str.split, done.stdout.splitlines())))
    words = [word for word, *_ in lines]
    assert words[words.index("SPAR-Bench-MV"):][:9] == [
        "SPAR-Bench-MV", "Low", "depth_prediction_oc_mv", "Middle", "position_matching",
        "view_change_infer", "High", "obj_spatial_relation_oo_mv", "Avg"]
    averages = [run["rows"]["Avg"] for run in results(tmp_path / "out" / "evaluation")["runs"]]
    assert [average[1] for average in averages] == [5, 4, 3]
    assert lines[words.index("Overall")] == [
        "Overall", f"{sum(average[2] for average in averages) / 3:.1f}", "29.4", "43.6"]


@pytest.mark.parametrize("texts, seen", [
    (("<script>alert(1)</script></pre></article><img src=x onerror=alert(1)>", "A" * 3_000_000,
      "\u202e\0\x1b[31mred\ud800", "&lt;b&gt; &amp; \"'`--><!--"),
     ("<script>alert(1)</script>", "A" * 3_000_000, "&lt;b&gt; &amp;")),
    (("<answer><svg onload=alert(1)></answer>", '<action>[{"from":0,"to":1,"action":' + "[" * 10**5,
      '<action>[{"from":0,"to":1,"action":[{"move_forward_m":1e299}]}]</action><answer>A</answer>',
      rewards.write_response({(0, 1): [{"move_forward_m": 3.0}, {"turn_right_deg": 30}]}, "A")),
     ("no plan", "off by 1e+299 m", "off by 1 m and 0°"))])
def test_hostile_responses_show_as_text(texts, seen, score, tmp_path):
    """Every "<" of the page is one of its own tags."""
    score(texts, "--mode", "action", "--model", "<b>m\x1b")
    source = (tmp_path / "out" / "evaluation" / "report.html").read_text(encoding="utf-8")
    tags = re.findall("<([^<>]*)>", source.removeprefix("<!doctype html>"))
    assert {tag.strip("/").split()[0] for tag in tags} <= set(
        "html meta title style h1 div table tr th td p b span article pre figure figcaption svg g "
        "polyline path circle img".split()) and source.count("<") == len(tags) + 1
    assert tags.count("article") == tags.count("pre") == 4
    assert not [tag for tag in tags if re.search(r"\son|href|src=(?!.data:image/jpeg;)", tag)]
    assert all(html.escape(part) in source for part in seen)


def test_a_camera_path_is_seen_from_above():
    """Two metres to the right, then a gaze half left of that: right is right, ahead is up."""
    plan = [{"turn_right_deg": 90}, {"move_forward_m": 2}, {"turn_left_deg": 45}]
    svg = evaluate.from_above((0, 1), plan, [{"move_forward_m": 1}])
    ways = re.findall(r'stroke="(#.{6})"[^>]*><polyline points="([^"]*)"/>.*?rotate\((\S+)\)', svg)
    gold, written = (np.array([xy.split(",") for xy in way.split()], float) for _, way, _ in ways)
    assert [gaze for *_, gaze in ways] == ["45", "0"] and ways[0][0] == evaluate.GOLD
    assert gold[0, 0] == 0 < gold[-1, 0] < 1 and not gold[:, 1].any()
    assert written[0, 1] == 0 > written[-1, 1] > -1 and not written[:, 0].any()
    assert f"off by {5**0.5:.2g} m and 45°" in svg


def write_log(path, script, args, rows, tail=""):
    head = {"script": script, "args": args, "versions": {}}
    return write_lines(path / "log.jsonl", [head, *rows], tail)


def test_curves_of_several_runs(root, tmp_path):
    logs = {"grpo": 0.3, "without/grpo": 0.1, "<b>&": 0.2}
    for name, level in logs.items():
        write_log(tmp_path / name, "actor_grpo.py", {}, [*(
            {"step": k, "reward_action": level + k / 1000, "reward": 1.0, "kl": 0.01 * k,
             "length": float("inf"), "reward_<b>&": 0.5, "reward_<b>&_spread": 0.1}
            for k in range(1, 101)), {"step": 101}], '{"st')
    run("evaluate.py", root, tmp_path, "--curves", *(f"{name}/log.jsonl" for name in logs))
    first, *others = xml.etree.ElementTree.parse(tmp_path / "out/evaluation/curves.svg").getroot()
    title, *ticks = first.iter("{http://www.w3.org/2000/svg}text")
    assert [title.text, *(panel[0].text for panel in others)] == [
        "GRPO: action reward, R_act", "GRPO: reward", "GRPO: KL to the start model", "reward_<b>&"]
    assert [name.text for name in ticks[-3:]] == ["grpo", "without/grpo", "<b>&"]
    lines = [np.array([point.split(",") for point in line.get("points").split()], float)
             for line in first.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(line) for line in lines] == [100] * 6  # three runs, each thin and thick
    ticks = [(float(tick.text), float(tick.get("y")) - 5) for tick in ticks
             if tick.get("text-anchor") == "end" and tick.text != "step"]
    assert [value for value, _ in ticks] == [0.1, 0.2, 0.3, 0.4]
    y_of = np.polyfit(*zip(*ticks), 1)  # the axis is the one that the curve is drawn on
    assert lines[1][50, 1] == pytest.approx(np.polyval(y_of, 0.3 + 51 / 1000), abs=1.5)
    assert (np.diff(lines[1][:, 0]) > 0).all() and (np.diff(lines[1][:, 1]) <= 0).all()


def polylines(panel):
    return [(line.get("stroke"), line.get("stroke-width"),
             np.array([point.split(",") for point in line.get("points").split()], float))
            for line in panel.iter("{http://www.w3.org/2000/svg}polyline")]


def test_stages_in_their_order_and_a_colour_for_all_seeds(tmp_path):
    """Runs that differ in digits alone, each with a seed of its own, share a colour: thin their
    curves, thick the mean of these at steps that all have. With one seed they are other settings;
    a run that has been stopped ends the mean."""
    logs = [write_log(tmp_path / f"seed_{seed}" / name, "actor_grpo.py", {"seed": seed}, [
        {"step": k, "kl": level + seed, "length": 1.0}
        for k in range(1, 11 - 2 * seed)])
        for seed in (0, 1, 2) for name, level in (("grpo", 0.0), ("without/grpo", 7.0))]
    for width in (1, 2):
        logs.append(write_log(tmp_path / f"width_{width}", "pasta.py", {"seed": 0}, [
            {"step": k, "match_accuracy": 0.1 * k, "excess": 1.0} for k in range(1, 11)]))
    svg = xml.etree.ElementTree.fromstring(evaluate.draw_curves(logs))
    texts = [[*panel.iter("{http://www.w3.org/2000/svg}text")] for panel in svg]
    assert [its[0].text for its in texts] == [
        "PaStA: held-out matches that are right", "PaStA: loss above its floor",
        "GRPO: KL to the start model"]
    assert [[name.text for name in its[-2:]] for its in texts[1:]] == [
        ["width_1", "width_2"],
        ["seed_/grpo, seeds 0, 1, 2", "seed_/without/grpo, seeds 0, 1, 2"]]
    lines = polylines(svg[2])
    first, second, *_ = evaluate.COLOURS
    assert [colour for colour, *_ in lines] == [first] * 4 + [second] * 4
    for own in (lines[:4], lines[4:]):
        assert [width for _, width, _ in own] == [None] * 3 + ["2.5"]
        assert [len(points) for *_, points in own] == [10, 8, 6, 6]
        heights = [points[0, 1] for *_, points in own]
        assert heights[0] > heights[1] > heights[2] and (
            heights[3] == pytest.approx(heights[1], abs=0.2))


def test_the_best_constant_plan_is_dashed(tmp_path):
    log = write_log(tmp_path / "a", "actor_sft.py", {"seed": 0}, [
        {"step": k, "action": 0.1 * k, "action_constant": 0.4} for k in range(1, 9)])
    (panel,) = xml.etree.ElementTree.fromstring(evaluate.draw_curves([log]))
    (*_, (stroke, _, points)) = [line for line in polylines(panel) if line[0] == "#000"]
    assert "dashed: best constant plan" in [text.text for text in panel.iter()]
    assert stroke == "#000" and points[0, 1] == points[1, 1] and evaluate.TOP < points[0, 1]


@pytest.mark.parametrize("values, ticks", [
    ([[0.31, 0.64]], [0.3, 0.4, 0.5, 0.6, 0.7]), ([[1, 100]], [0, 50, 100]),
    ([[0, 0]], None), ([[-3.0, 7.5], [2.0]], [-5, 0, 5, 10])])
def test_round_ticks(values, ticks):
    found = evaluate.round_ticks(values)
    assert ticks is None or found == ticks
    assert found[0] <= min(map(min, values)) and found[-1] >= max(map(max, values))


def test_a_log_that_names_no_script_is_skipped(tmp_path, capsys):
    log = write_lines(tmp_path / "log.jsonl", [{"args": {}}, *(
        {"step": k, "kl": 1.0} for k in range(9))])
    assert evaluate.draw_curves([log]) == ""
    assert f"skipped {log}: its first line does not name the script" in capsys.readouterr().out


def test_table_of_an_archive(tmp_path, capsys):
    """Means, deviations and paired intervals by hand: gains of 2, 4 and 6 are 4 +- 4.97."""
    path = tmp_path / "table2.zip"
    with zipfile.ZipFile(path, "w") as files:
        for folder, gain in (("answers", 0), ("rooms", 2)):
            for seed in range(3):
                score = 50 + 10 * seed + gain * (1 + seed)
                name = f"{seed}/out/evaluation/{folder}/results.json"
                files.writestr(name, json.dumps({"runs": [{
                    "rows": {"camera_turn": [1, 250, score, 0, 0]},
                    "constants": {"camera_turn": 20.0}}]}))
        rewards_of_steps = [*[0.1, 0.3] * 5, *[0.9] * 7, *[0.5, 0.7] * 5]
        files.writestr("0/out/grpo/log.jsonl", "\n".join(
            json.dumps({"reward_action": value}) for value in rewards_of_steps))
    benchmark.table2(path)
    printed = capsys.readouterr().out
    assert "| best constant | 20.0 ± 0.0 |  |" in printed
    assert "| HATCH | 64.0 ± 12.0 |" in printed
    assert ("camera_turn: HATCH above PaStA, no ActoR by 4.0 +- 5.0, not shown (by seed 2.0, 4.0, "
            "6.0)") in printed
    assert ("0/out/grpo/log.jsonl: sampled R_act 0.200 in the first ten steps, 0.600 in the last; "
            "standard error of the difference 0.047") in printed


def test_the_library_says_the_same(root, tiny_model, tmp_path, capsys):
    pytest.importorskip("torchvision", reason="pip install torchvision: AutoProcessor wants it")
    shutil.copytree(tiny_model, tmp_path / "out/grpo")
    write_lines(tmp_path / "out/grpo/generation_config.json", [{"repetition_penalty": 9.0}])
    for name in "ab":  # of a size that no resizing changes
        Image.effect_noise((56, 84), 64).convert("RGB").save(tmp_path / f"{name}.jpg")
    block = block_with("AutoProcessor")
    run_block(block.replace(', device_map="auto"', ""), tmp_path)
    said = capsys.readouterr().out
    question = re.search('question = "(.*)"', block)[1]
    done = run("evaluate.py", root, tmp_path, "--images", "a.jpg", "b.jpg", "--ask", question)
    response = done.stdout.split("\nform ")[0].removeprefix("response  ")
    assert re.sub(r"<\|\w+\|>", "", response).strip() == said.strip() != ""  # skip_special_tokens


def test_tokens_of_a_picture_as_the_page_says(root):
    page = (root / "docs/benchmarks.md").read_text()
    for max_pixels, stated in ((448**2, "and 234 in"), (12_845_056, "has 1,610 of")):
        processor = Qwen2VLImageProcessorPil(
            size={"shortest_edge": 56**2, "longest_edge": max_pixels})
        tokens = processor.get_number_of_image_patches(968, 1296, {}) // 4
        assert f"{tokens:,}" in stated and stated in page
        assert f"{2 * tokens:,}" in page  # of two, in a reply


def test_a_server_is_asked_as_the_page_says(root, tmp_path, monkeypatch):
    """With a server that knows every answer."""
    data = write_mmsi(tmp_path / "data").parent
    items = evaluate.load_items("mmsi", data, skip=lambda text: None)
    bodies = []

    def answer(request):
        bodies.append(json.loads(request.data))
        text = rewards.write_response({(0, 1): []}, items[len(bodies) - 1].gold)
        return io.BytesIO(json.dumps({"choices": [{"message": {"content": text}}]}).encode())

    monkeypatch.setattr("urllib.request.urlopen", answer)
    run_block(block_with("urlopen").replace("/path/to/MMSI-Bench", str(data)), tmp_path)
    for item, body in zip(items, bodies, strict=True):
        *pictures, text = body["messages"][0]["content"]
        sent = [base64.b64decode(picture["image_url"]["url"].split(",")[1]) for picture in pictures]
        assert [Image.open(io.BytesIO(png)).tobytes() for png in sent] == [
            picture.tobytes() for picture in item.images()]
        assert text["text"] == evaluate.prompt_of(item, "mmsi", "action")
        assert (body["temperature"], body["max_tokens"]) == (0, 160)
    run("evaluate.py", root, tmp_path, "--bench", "mmsi", "--data", data, "--score",
        "theirs.jsonl", "--mode", "action")
    rows = results(tmp_path / "out/evaluation")["rows"]
    assert rows["Avg"][1:3] == [3, 100] and rows["R_fmt"][2] == 100


@pytest.mark.parametrize("said, given", [
    ("the folder that `python pasta.py --grid 4` rendered", ""),
    ("run `python actor_grpo.py` first", "--bench mmsi --data good.jsonl"),
    ("holds no response", "--bench mmsi --data good.jsonl --model MODEL"),
    ("holds no response", "--score empty.jsonl --bench mmsi --data good.jsonl"),
    ("--bench mmsi needs --data", "--bench mmsi"), ("no log with two", "--curves empty.jsonl"),
    ("one image a question", "--bench cvbench --data . --mode action"),
    ("none.jsonl", "--score none.jsonl"), ("add --bench and --data", "--score empty.jsonl"),
    ("no usable question of MMSI-Bench (no row in any MMSI_Be", "--bench mmsi --data MODEL"),
    ("--limit is out of range: 0", "--limit 0"), ("go together", "--ask why"),
    ("a.jpg: cannot be read as an image", "--model MODEL --ask why --images a.jpg"),
    ("go together", "--images long.png"),
    ("go together", "--ask why --images long.png --score empty.jsonl"),
    ("go together", "--ask why --images long.png --bench mmsi --data good.jsonl"),
    ("images or text cannot be encoded", "--model MODEL --ask why --images long.png"),
    ("neither .parquet nor", "--bench mmsi --data notes.txt"),
    ("cannot be read as parquet", "--bench mmsi --data bad.parquet")])
def test_bad_input_is_one_line(said, given, root, tiny_model, tmp_path):
    for name in ("empty.jsonl", "notes.txt", "bad.parquet"):
        (tmp_path / name).touch()
    Image.new("L", (4040, 16)).save(tmp_path / "long.png")  # longer than 200 : 1
    write_lines(tmp_path / "good.jsonl", [
        {"id": 1, "question_type": "MSR", "question": "?", "answer": "A", "images": ["x.jpg"]}])
    done = run("evaluate.py", root, tmp_path, *given.replace("MODEL", str(tiny_model)).split())
    assert done.returncode and said in done.stdout, done.stdout
