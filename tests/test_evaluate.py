"""evaluate.py: the official scorers, the averages of the tables, every published format from disk
to table, predictions that continue, and a page that shows whatever a model wrote."""

import base64
import csv
import html.parser
import io
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import evaluate
import geometry
import rewards
from conftest import run


def jpeg(colour="red", size=(64, 48)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "JPEG")
    return buffer.getvalue()


def results(out):
    return json.loads((out / "results.json").read_text())


def predictions(out):
    head, *lines = (out / "predictions.jsonl").read_text().splitlines()
    assert "args" in json.loads(head)
    return {record["id"]: record for record in map(json.loads, lines)}


# ------------------------------------------------------------------------------- official scorers


def recorded(shared, name):
    lines = (shared / "scorer_cases" / name).read_text().splitlines()
    assert len(lines) > 20
    return map(json.loads, lines)


def test_recorded_spar_scores(shared):
    for case in recorded(shared, "spar_cases.jsonl"):
        expected = case["official_score"] if case["prediction"] else 0.0  # the one that differs
        assert evaluate.score_spar(case["task"], case["prediction"], case["gold"]) == (
            pytest.approx(expected, abs=1e-12)), case


def test_recorded_mindcube_letters(shared):
    for case in recorded(shared, "mindcube_cases.jsonl"):
        assert evaluate.mindcube_letter(case["text"]) == case["extracted"], case


def test_recorded_mmsi_letters(shared):
    for case in recorded(shared, "mmsi_cases.jsonl"):
        assert evaluate.mmsi_letter(case["prediction"]) == case["official_extracted"], case
        assert evaluate.score_answer("mmsi", "MSR", case["prediction"], case["gold"]) == (
            case["official_score"]), case


@pytest.mark.parametrize("task, prediction, gold, score", [
    ("obj_spatial_relation_oo", "D. right", "D", 1), ("obj_spatial_relation_oo", "(D)", "D", 0),
    ("obj_spatial_relation_oo", "", "D", 0), ("position_matching", "c", "C", 1),
    ("depth_prediction_oc", "between 2.0 and 9", "2.0", 1),  # one view: the first number
    ("depth_prediction_oc_mv", "between 2.0 and 9", "2.0", 0),  # several: the last
    ("depth_prediction_oc_mv", "between 9 and 2.0", "2.0", 1),
    ("depth_prediction_oc", "none", "0.0", 0), ("depth_prediction_oc", "^3 2", "2", 1),
    ("depth_prediction_oc", "1.8", "2.0", 0.9), ("depth_prediction_oc", "1", "none", 0),
    ("view_change_infer", "move_left:1.3", "move_left:2.6", 0.8),  # relative to the prediction
    ("view_change_infer", "move_left:5.2", "move_left:2.6", 0.82),  # 0.5 is within the loosest
    ("view_change_infer", "move_right:-2.6", "move_left:2.6", 1.0),
    ("view_change_infer", "move left", "move_left:2.6", 0)])
def test_spar_scores(task, prediction, gold, score):
    assert evaluate.score_spar(task, prediction, gold) == pytest.approx(score)


@pytest.mark.parametrize("text, letter", [
    ("(B)", "b"), ("b", "b"), ("The answer is (C).", "c"), ("Answer: A", "a"), ("D. left", "d"),
    ("", ""), ("A desk", "a"), ("b.", "b"), ("The answer is: B", ":")])  # so it reads this
def test_cvbench_letters(text, letter):
    assert evaluate.cvbench_letter(text) == letter


@pytest.mark.parametrize("text, letter", [
    ("The answer is Behind the sofa", "B"), ("My answer is Above", "A"), ("(B)Answer:D", "D"),
    ("<Answer>the answer is C<x> D", "C"), ("<Answer>A or B</Answer> C", "B"), ("", None)])
def test_mindcube_letters(text, letter):
    assert evaluate.mindcube_letter(text) == letter


@pytest.mark.parametrize("response, answer", [
    ("<action>[]</action><answer> B. left\n</answer>", "B. left"), ("plain", "plain"),
    ("<answer>cut off", "cut off"), ("<action>[{\"from\":0", ""), ("<think>A.</think> C", "C"),
    ("<answer>A</answer><answer>B</answer>", "A"), ("", "")])
def test_answer_is_cut_out(response, answer):
    assert evaluate.answer_of(response) == answer


def test_any_text_is_scored():
    hostile = ["", "\0", "`" * 9999, "<answer>" * 999, "9" * 5000, "move_left:" + "9" * 400,
               "move_left:nan", "move_left:inf,move_right:inf", "\ud800", "A" * 10**6, "`` ``",
               "10^" * 999, "<Answer>", "answer is", "(" * 999, ":" * 999, "<action>" * 999]
    for bench in evaluate.BENCHES:
        for task in evaluate.BENCHES[bench].tasks:
            for text in hostile:
                for gold in ("A", "(A)", "1.5", "move_left:2.6", "\ud800"):
                    score = evaluate.score_answer(bench, task, evaluate.answer_of(text), gold)
                    assert 0 <= score <= 1


# ------------------------------------------------------------------------------------- averages

# Table 1: Low, Mid., High, Avg. / Aro., Rot., Amo., Avg. / Pos., Att., Mot., MSR, Avg. / Overall;
# all rows but the two on a subset of SPAR-Bench
TABLE_1 = {
    "GPT-4.1": (38.2, 37.0, 43.1, 39.9, 59.6, 49.5, 47.2, 50.6, 29.3, 33.8, 38.7, 31.3, 31.7, 40.7),
    "LLaVA-OneVision-4B": (
        23.0, 28.0, 40.1, 31.5, 50.0, 33.5, 39.2, 40.7, 30.8, 26.9, 26.0, 26.8, 28.8, 33.7),
    "Qwen2.5-VL-32B": (
        25.6, 29.0, 45.4, 34.7, 43.6, 41.5, 38.2, 40.0, 25.9, 26.9, 28.7, 27.3, 26.7, 33.8),
    "Qwen2.5-VL-7B": (
        16.9, 29.4, 40.7, 30.1, 38.0, 33.5, 32.7, 34.1, 28.4, 21.5, 29.3, 25.8, 27.1, 30.4),
    "SpaceR-7B": (
        31.6, 32.3, 49.2, 39.1, 31.6, 31.5, 28.7, 29.9, 30.3, 25.4, 22.0, 21.7, 26.7, 31.9),
    "Video-R1": (
        29.4, 30.0, 46.2, 36.5, 44.0, 30.0, 38.5, 38.2, 30.5, 33.8, 18.7, 24.7, 28.0, 34.2),
    "Spatial-MLLM-4B": (
        22.3, 32.4, 35.2, 30.4, 52.0, 29.0, 34.5, 37.6, 28.0, 21.5, 14.7, 22.7, 24.1, 30.7),
    "InternVL-2.5-4B": (
        30.3, 30.1, 38.5, 33.6, 57.6, 33.5, 45.2, 45.9, 28.7, 26.2, 20.7, 28.3, 27.1, 35.5),
    "InternVL-2.5-8B": (
        31.8, 30.8, 48.2, 38.3, 25.6, 37.0, 20.3, 24.8, 31.0, 30.0, 20.7, 23.2, 27.8, 30.3),
    "Qwen2.5-VL-72B": (
        26.9, 32.7, 43.6, 35.4, 44.8, 42.0, 41.2, 42.2, 33.3, 38.5, 24.7, 28.8, 31.8, 36.5),
    "Qwen2.5-VL-3B": (
        13.4, 26.2, 32.6, 24.9, 46.4, 34.5, 35.3, 37.8, 27.8, 19.2, 23.3, 25.8, 25.6, 29.4),
    "SpatialLadder-3B": (
        26.2, 33.5, 44.5, 35.8, 56.4, 31.5, 47.8, 46.8, 24.1, 23.1, 26.7, 20.2, 23.6, 35.4),
    "HATCH": (41.3, 47.4, 67.1, 53.6, 65.6, 31.0, 50.2, 50.2, 30.5, 20.8, 23.3, 24.7, 27.0, 43.6)}
TABLE_4 = {  # Low, High, Avg. / 2D, 3D, Avg.; the same rows
    "GPT-4.1": (46.5, 50.1, 48.2, 75.0, 86.9, 80.9),
    "InternVL-2.5-4B": (32.1, 33.7, 32.9, 73.2, 74.6, 73.9),
    "LLaVA-OneVision-4B": (27.6, 41.4, 34.2, 70.8, 79.2, 75.0),
    "Qwen2.5-VL-32B": (35.6, 49.3, 42.2, 76.8, 84.0, 80.4),
    "Qwen2.5-VL-72B": (32.7, 48.0, 40.1, 77.1, 84.2, 80.7),
    "Qwen2.5-VL-7B": (18.7, 45.2, 31.4, 74.8, 83.3, 79.1),
    "SpaceR-7B": (33.6, 46.3, 39.7, 71.9, 81.1, 76.4),
    "Video-R1": (33.8, 42.7, 38.1, 71.7, 74.9, 73.3),
    "Spatial-MLLM-4B": (24.3, 37.6, 30.7, 65.7, 69.5, 67.6),
    "SpatialLadder-3B": (25.7, 39.8, 32.5, 72.2, 74.6, 73.4),
    "InternVL-2.5-8B": (32.9, 44.1, 38.3, 74.0, 79.5, 76.8),
    "Qwen2.5-VL-3B": (16.0, 32.5, 23.9, 69.3, 72.2, 70.7),
    "HATCH": (41.1, 49.7, 45.2, 70.5, 78.4, 74.5)}
SPAR_COUNTS = {
    "depth_prediction_oc": 360, "depth_prediction_oo": 372, "distance_prediction_oc": 393,
    "distance_prediction_oo": 363, "depth_prediction_oc_mv": 320, "depth_prediction_oo_mv": 372,
    "distance_prediction_oc_mv": 365, "distance_prediction_oo_mv": 297, "position_matching": 393,
    "camera_motion_infer": 400, "view_change_infer": 400, "distance_infer_center_oo": 340,
    "distance_infer_center_oo_mv": 336, "obj_spatial_relation_oo": 364,
    "obj_spatial_relation_oc_mv": 400, "obj_spatial_relation_oo_mv": 361,
    "spatial_imagination_oc": 372, "spatial_imagination_oc_mv": 344,
    "spatial_imagination_oo": 302, "spatial_imagination_oo_mv": 357}
MV = {task: n for task, n in SPAR_COUNTS.items() if task in evaluate.SPAR_MULTI_VIEW}
SI = {task: n for task, n in SPAR_COUNTS.items() if task not in MV}
MINDCUBE_COUNTS = {"around": 250, "rotation": 200, "among": 600}
MMSI_COUNTS = dict(zip(evaluate.MMSI_TASKS, (93, 94, 81, 86, 85, 83, 64, 66, 74, 76, 198)))


def average(bench, counts, groups):
    """The Avg that task_weights makes if every task of a group scores what the group does."""
    weights = dict(evaluate.task_weights(bench, counts))
    score = {task: value for label, value in groups.items() for task in weights[label]}
    return sum(w * score[task] for task, w in weights["Avg"].items())


def test_counts_of_the_published_benchmarks():
    assert sum(MV.values()) == 4345 and sum(SI.values()) == 2866
    assert sum(MINDCUBE_COUNTS.values()) == 1050 and sum(MMSI_COUNTS.values()) == 1000


def test_averages_of_table_1():
    """From its own groups; the printed groups are rounded, so 0.1 is as close as it can be. One
    printed average is not that of its own row."""
    assert len(TABLE_1) == len(TABLE_4) == 13
    for name, row in TABLE_1.items():
        spar = average("spar-mv", MV, dict(zip(("Low", "Middle", "High"), row)))
        cube = average("mindcube", MINDCUBE_COUNTS, dict(zip(
            ("Around", "Rotation", "Among"), row[4:])))
        mmsi = average("mmsi", MMSI_COUNTS, dict(zip(
            ("Position", "Attribute", "Motion", "MSR"), row[8:])))
        printed = 40.1 if name == "Qwen2.5-VL-32B" else row[7]  # there: 40.0
        assert (spar, cube, mmsi) == pytest.approx((row[3], printed, row[12]), abs=0.11), name
        assert (row[3] + row[7] + row[12]) / 3 == pytest.approx(row[13], abs=0.051), name


def test_averages_of_table_4():
    cv = {"ADE20K": 300, "COCO": 900, "Omni3D": 1200}  # the formula does not ask how many
    for name, row in TABLE_4.items():
        assert average("spar-si", SI, dict(zip(("Low", "High"), row))) == (
            pytest.approx(row[2], abs=0.11)), name
        assert average("cvbench", cv, {"2D": row[3], "3D": row[4]}) == (
            pytest.approx(row[5], abs=0.11)), name
    assert dict(evaluate.task_weights("cvbench", cv))["Avg"] == {
        "ADE20K": 0.25, "COCO": 0.25, "Omni3D": 0.5}


def test_paper_rows_are_the_tables():
    for name in ("Qwen2.5-VL-3B", "HATCH"):
        row = TABLE_1[name] + TABLE_4[name]
        ours = [value for bench in ("spar-mv", "mindcube", "mmsi")
                for value in evaluate.BENCHES[bench].paper[name].values()]
        ours += [evaluate.PAPER_OVERALL[name]] + [
            value for bench in ("spar-si", "cvbench")
            for value in evaluate.BENCHES[bench].paper[name].values()]
        assert tuple(ours) == row


def test_sample_weighted_and_task_mean():
    scores = {"depth_prediction_oc_mv": [1.0] * 9, "depth_prediction_oo_mv": [0.0]}
    for convention, low in (("hatch", 90.0), ("spar", 50.0)):
        rows = {row.label: row for row in evaluate.table_rows("spar-mv", scores, convention)}
        assert rows["Low"].score == rows["Avg"].score == pytest.approx(low)
        assert rows["Avg"].n == 10 and rows["depth_prediction_oo_mv"].depth == 1


def test_translation_does_not_count():
    scores = {"around": [1.0], "translation": [0.0] * 9}
    rows = {row.label: row.score for row in evaluate.table_rows("mindcube", scores)}
    assert rows == {"Around": 100, "Translation": 0, "Avg": 100}


def test_bootstrap_interval_is_as_wide_as_theory_says():
    scores = {"MSR": [0.0, 1.0] * 200}
    row = evaluate.table_rows("mmsi", scores)[-1]
    half = 100 * 1.96 * math.sqrt(0.25 / 400)
    assert row.score == 50
    assert (row.low, row.high) == pytest.approx((50 - half, 50 + half), abs=0.8)
    same = evaluate.table_rows("mmsi", {"MSR": [1.0] * 10})[-1]
    assert (same.low, same.high) == (100, 100)


# ------------------------------------------------------------------------- files, disk to table


def test_prompts_are_the_published_ones():
    def prompt(bench, task):
        item = evaluate.Item("1", task, "How {far}?", "A", None)
        return evaluate.prompt_of(item, bench, "direct")

    letter = "Answer with the option's letter from the given choices directly."
    assert prompt("spar-si", "depth_prediction_oc") == (
        "\nHow {far}?\nPlease answer the question using a single word or phrase.")
    assert prompt("spar-mv", "spatial_imagination_oo_mv") == f"\nHow {{far}}?\n\n{letter}"
    assert prompt("spar-mv", "position_matching") == (
        "\nHow {far}?\nThe values represent the bounding box coordinates normalized to a 0-1000 "
        f"scale, with the top-left corner as the origin of the image.\n{letter}")
    assert prompt("spar-mv", "view_change_infer") == "\nHow {far}?\n\n"
    assert prompt("mmsi", "MSR") == (
        f"How {{far}}?\n{letter} Enclose the option's letter within ``.")
    assert prompt("cvbench", "COCO") == f"How {{far}}?\n{letter}"
    assert prompt("mindcube", "among").startswith("[Task]\nYour task is to analyze the spatial")
    assert prompt("mindcube", "among").endswith("</answer>'.\n\n[Question]\nHow {far}?")


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow", reason="pip install pyarrow")
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path.parent


def write_spar(folder):
    def row(number, task, views, answer, **more):
        image = [{"bytes": jpeg(size=(64 + 8 * k, 48)), "path": f"{k}.jpg"} for k in range(views)]
        return {"id": number, "img_type": "multi_view" if views > 1 else "single_view",
                "format_type": "select", "task": task, "source": "scannet", "image": image,
                "question": f"Question {number}?", "answer": answer, **more}

    rows = [row(0, "depth_prediction_oc_mv", 3, "1.5"), row(1, "position_matching", 2, "A"),
            row(2, "depth_prediction_oc", 1, "2.0"), row(3, "view_change_infer", 2, "move_left:1"),
            row(4, "obj_spatial_relation_oo_mv", 3, "B"), row(5, "spatial_imagination_oc", 1, "C"),
            row(6, "no_such_task", 2, "A"), row(7, "position_matching", 2, "")]
    rows[4]["image"][1]["bytes"] = b"no jpeg"
    return write_parquet(folder / "data" / "test-00000-of-00001.parquet", rows)


def write_mindcube(folder):
    rows = [{"id": f"{name}_group00{k}_q0", "category": [], "type": "", "meta_info": [],
             "question": f"Where? A. Here B. There {k}", "gt_answer": "AB"[k % 2],
             "images": [f"other_all_image/{name}/{k}/{v}.jpg" for v in range(2 + k)]}
            for k, name in enumerate(("among", "around", "rotation"))]
    rows.append({"id": "among_x", "question": "No gold", "images": rows[0]["images"]})
    path = folder / "data" / "raw" / "MindCube_tinybench.jsonl"
    path.parent.mkdir(parents=True)
    for row in rows:
        for name in row["images"]:
            image = folder / "data" / name
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(jpeg("blue"))
    (folder / "data" / rows[2]["images"][1]).unlink()
    path.write_text("\n".join(map(json.dumps, rows)) + "\n{no json\n")
    return folder


def mmsi_rows():
    return [{"id": k, "images": [jpeg("green"), jpeg("blue", (80, 60))], "question_type": task,
             "question": f'Which "one"?\n\tA: x, B: {k}', "answer": "ABCD"[k], "thought": "..."}
            for k, task in enumerate(("MSR", "Motion (Cam.)", "Positional Relationship (Cam.-Obj.)",
                                      "No such type"))]


def write_mmsi(folder):
    return write_parquet(folder / "MMSI_Bench.parquet", mmsi_rows())


def write_mmsi_tsv(folder):
    with open(folder / "MMSI_bench.tsv", "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(("index", "image", "question", "answer", "category", "thought"))
        for row in mmsi_rows():
            images = [base64.b64encode(image).decode() for image in row["images"]]
            writer.writerow((row["id"], json.dumps(images), row["question"], row["answer"],
                             row["question_type"], row["thought"]))
    return folder


def write_cvbench(folder):
    for name, sources in (("2d", ("ADE20K", "COCO", "Nowhere")), ("3d", ("Omni3D",))):
        write_parquet(folder / f"test_{name}.parquet", [
            {"idx": k, "type": name.upper(), "task": "Count", "image": {
                "bytes": jpeg("gray"), "path": None}, "question": "How many?",
             "choices": ["one", "two"], "answer": "(B)", "prompt": "How many? (A) one (B) two",
             "source": source, "bbox": [[1.0]]} for k, source in enumerate(sources)])
    return folder


FORMATS = {  # what writes it, questions asked, what is said of the broken ones, labels of the table
    "spar-mv": (write_spar, 3, ("row 6: unknown task 'no_such_task'", "row 7: its answer is empty",
                                "4 (obj_spatial_relation_oo_mv): its images"),
                ("Low", "depth_prediction_oc_mv", "Middle", "position_matching",
                 "view_change_infer", "Avg")),
    "spar-si": (write_spar, 2, ("row 6",), (
        "Low", "depth_prediction_oc", "High", "spatial_imagination_oc", "Avg")),
    "mindcube": (write_mindcube, 2, ("row 3: it has no 'gt_answer'", "row 4: not a JSON object",
                                     "rotation_group002_q0 (rotation): its images"),
                 ("Around", "Among", "Avg")),
    "mmsi": (write_mmsi, 3, ("row 3: unknown task 'No such type'",), (
        "Position", "Positional Relationship (Cam.–Obj.)", "Motion", "Motion (Cam.)", "MSR",
        "Avg")),
    "mmsi-tsv": (write_mmsi_tsv, 3, ("row 3: unknown task 'No such type'",), (
        "Position", "Positional Relationship (Cam.–Obj.)", "Motion", "Motion (Cam.)", "MSR",
        "Avg")),
    "cvbench": (write_cvbench, 3, ("row 2: unknown task 'Nowhere'",), (
        "2D", "ADE20K", "COCO", "3D", "Omni3D", "Avg"))}


@pytest.mark.parametrize("name", FORMATS)
def test_published_formats_from_disk_to_table(name, root, tiny_model, tmp_path):
    write, count, said, labels = FORMATS[name]
    (tmp_path / "bench").mkdir()
    data, bench = write(tmp_path / "bench"), name.removesuffix("-tsv")
    done = run("evaluate.py", root, tmp_path, "--bench", bench, "--data", data, "--model",
               tiny_model, "--out", "out", "--max-new-tokens", 3, "--batch", 2)
    assert done.returncode == 0, done.stdout
    for text in said:
        assert text in done.stdout
    found = results(tmp_path / "out")
    assert tuple(row["label"] for row in found["runs"][0]["rows"]) == labels
    assert found["runs"][0]["rows"][-1]["n"] == count == len(predictions(tmp_path / "out"))
    assert len(found["skipped"]) >= len(said)
    assert f"skipped {len(found['skipped'])} rows, predictions" in done.stdout
    assert "HATCH (paper)" in done.stdout
    modes = {record["mode"] for record in predictions(tmp_path / "out").values()}
    assert modes == {"direct" if bench in ("spar-si", "cvbench") else "action"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<article>") == count and page.count("data:image/jpeg") >= count


def test_images_come_in_their_order(tmp_path):
    (item, *_) = evaluate.load_items("mmsi", write_mmsi_tsv(tmp_path), skip=lambda text: None)
    assert [picture.size for picture in item.images()] == [(64, 48), (80, 60)]
    last = evaluate.load_items("mmsi", tmp_path, skip=lambda text: None)[-1]
    assert last.gold == "C" and [p.size for p in last.images()] == [(64, 48), (80, 60)]


def test_a_line_that_is_no_tsv_is_named(tmp_path):
    write_mmsi_tsv(tmp_path)
    path, told = tmp_path / "MMSI_bench.tsv", []
    head, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(b"\xef\xbb\xbf" + head + b"\n9\tx\rx\ty\n" + rest)
    assert len(evaluate.load_items("mmsi", path, told.append)) == 3
    assert len(told) >= 2 and any("not a line of tsv" in line for line in told)


def test_deep_json_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("[" * 100_000 + "\n")
    told = []
    with pytest.raises(geometry.DataError, match="no usable question"):
        evaluate.load_items("mmsi", tmp_path / "a.jsonl", told.append)
    assert "not a JSON object" in told[0]


def test_a_repeated_id_is_told_apart(tmp_path):
    rows = [{"id": 7, "task": "position_matching", "question": "?", "answer": "A", "image": "x"}]
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(map(json.dumps, rows * 2)))
    assert [item.id for item in evaluate.load_items("spar-mv", path)] == ["7", "7#2"]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    import builtins
    real = builtins.__import__

    def no_pyarrow(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_pyarrow)
    (tmp_path / "test-0.parquet").write_bytes(b"")
    with pytest.raises(geometry.DataError, match="pip install pyarrow"):
        evaluate.load_items("spar-mv", tmp_path)


# ------------------------------------------------------------------ predictions: made, continued


@pytest.fixture(scope="module")
def answered(root, rooms, tiny_model, tmp_path_factory):
    """A whole evaluation of the rooms by the tiny model, ten tokens a response."""
    work = tmp_path_factory.mktemp("answered")
    done = run("evaluate.py", root, work, *flags(rooms, tiny_model))
    assert done.returncode == 0, done.stdout
    return work, done


def flags(rooms, tiny_model, out="out"):
    return ("--data", rooms, "--model", tiny_model, "--out", out, "--max-new-tokens", 10,
            "--batch", 4, "--show", 5)


def test_rooms_from_model_to_page(answered, rooms):
    work, done = answered
    items = {item.id: item for item in evaluate.load_items("rooms", rooms)}
    made = predictions(work / "out")
    assert set(made) == set(items)
    for name, record in made.items():
        assert record["gold"] == items[name].gold
        assert record["mode"] == ("action" if record["views"] > 1 else "direct")
    rows = {row["label"]: row for row in results(work / "out")["runs"][0]["rows"]}
    assert {"Low", "Middle", "High", "Avg", "depth_prediction_oc_mv"} <= set(rows)
    assert rows["Avg"]["n"] == len(items)
    assert "mean R_fmt" in done.stdout and "report.html" in done.stdout


def test_it_writes_what_the_library_would(answered, tiny_model):
    """Greedy text equals transformers' generate, one prompt at a time, without padding."""
    import torch
    from transformers import (AutoTokenizer, GenerationConfig, Qwen2_5_VLForConditionalGeneration,
                              Qwen2VLImageProcessorPil)

    work, _ = answered
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32)
    model.generation_config = GenerationConfig(pad_token_id=0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 56**2, "longest_edge": 448**2})
    data = json.loads((work / "out" / "predictions.jsonl").open().readline())["args"]["data"]
    items = {item.id: item for item in evaluate.load_items("rooms", data)}
    for record in list(predictions(work / "out").values())[::5]:
        images = processor(images=items[record["id"]].images(), return_tensors="pt")
        grids = images["image_grid_thw"]
        text = evaluate.prompt_of(items[record["id"]], "rooms", record["mode"])
        ids = torch.tensor([tokenizer(evaluate.chat_prompt(
            text, (grids.prod(1) // 4).tolist()))["input_ids"]])
        types = (ids == model.config.image_token_id).int()
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=images["pixel_values"],
            image_grid_thw=grids, mm_token_type_ids=types, do_sample=False, max_new_tokens=10,
            eos_token_id=tokenizer.convert_tokens_to_ids(evaluate.END))[0, ids.shape[1]:].tolist()
        ends = tokenizer.convert_tokens_to_ids(evaluate.END)
        out = out[:next((k for k, token in enumerate(out) if token in ends), len(out))]
        assert record["response"] == tokenizer.decode(out)


def test_an_interrupted_evaluation_continues(answered, root, rooms, tiny_model, tmp_path):
    work, _ = answered
    shutil.copytree(work / "out", tmp_path / "out")
    path = tmp_path / "out" / "predictions.jsonl"
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    path.write_text("".join(lines[:6]) + lines[6][:-1])  # killed before the end of the seventh
    done = run("evaluate.py", root, tmp_path, *flags(rooms, tiny_model))
    assert done.returncode == 0, done.stdout
    assert f"{len(lines) - 6} of them to be asked" in done.stdout
    assert path.read_text() == whole  # rows of a batch do not feel their neighbours
    again = run("evaluate.py", root, tmp_path, *flags(rooms, tiny_model))
    assert "0 of them to be asked" in again.stdout
    assert results(tmp_path / "out")["runs"] == results(work / "out")["runs"]


def test_predictions_of_another_model_are_put_aside(answered, root, rooms, tiny_model, tmp_path):
    work, _ = answered
    shutil.copytree(work / "out", tmp_path / "out")
    path = tmp_path / "out" / "predictions.jsonl"
    head, *lines = path.read_text().splitlines()
    head = json.loads(head)
    head["weights"][0][1] += 1  # as if the model had been trained again
    old = "\n".join([json.dumps(head), *lines]) + "\n"
    path.write_text(old)
    done = run("evaluate.py", root, tmp_path, *flags(rooms, tiny_model), "--limit", 3)
    assert done.returncode == 0, done.stdout
    assert "predictions.1.jsonl" in done.stdout
    assert (tmp_path / "out" / "predictions.1.jsonl").read_text() == old
    assert len(predictions(tmp_path / "out")) == 3


def test_predictions_of_other_questions_are_put_aside(answered, root, rooms, tiny_model, tmp_path):
    """The same ids, but the rooms have been rendered anew."""
    work, _ = answered
    shutil.copytree(work / "out", tmp_path / "out")
    shutil.copytree(rooms / "benchmark", tmp_path / "data" / "benchmark")
    path = tmp_path / "data" / "benchmark" / "rooms.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["question"] = f"New: {row['question']}"
    path.write_text("\n".join(map(json.dumps, rows)))
    done = run("evaluate.py", root, tmp_path, *flags(tmp_path / "data", tiny_model), "--limit", 2)
    assert "2 of them to be asked" in done.stdout and "predictions.1.jsonl" in done.stdout
    scored = run("evaluate.py", root, tmp_path, "--score", work / "out" / "predictions.jsonl",
                 "--data", tmp_path / "data")
    assert scored.returncode and "the benchmark's question for it is another" in scored.stdout


def test_two_processes_write_the_same(answered, root, rooms, tiny_model, tmp_path):
    work, _ = answered
    done = run("evaluate.py", root, tmp_path, *flags(rooms, tiny_model), processes=2)
    assert done.returncode == 0, done.stdout
    ours, theirs = predictions(tmp_path / "out"), predictions(work / "out")
    assert {k: r["response"] for k, r in ours.items()} == {
        k: r["response"] for k, r in theirs.items()}


# ------------------------------------------------------------------------------ scores alone


def test_predictions_of_another_engine(answered, root, rooms, tmp_path):
    """Only id and response are needed; the rest is looked up in the benchmark's file."""
    items = evaluate.load_items("rooms", rooms)
    path = tmp_path / "theirs.jsonl"
    path.write_text("".join(json.dumps({"id": item.id, "response": item.gold}) + "\n"
                            for item in items[1:]) + '{"id": "no such", "response": "A"}\n{"id\n')
    done = run("evaluate.py", root, tmp_path, "--score", path, "--bench", "rooms", "--data", rooms)
    assert done.returncode == 0, done.stdout
    assert "question 'no such': the benchmark has no such question" in done.stdout
    assert "not JSON" in done.stdout
    assert f"1 of the benchmark's {len(items)} questions have no prediction" in done.stdout
    (found,) = results(tmp_path / "out" / "evaluation")["runs"]
    assert found["rows"][-1]["score"] == 100 and found["name"].endswith("theirs")
    page = (tmp_path / "out" / "evaluation" / "report.html").read_text()
    assert "data:image/jpeg" in page


def test_scores_without_the_data(answered, root, tmp_path):
    work, _ = answered
    shutil.copy(work / "out" / "predictions.jsonl", tmp_path / "p.jsonl")
    text = (tmp_path / "p.jsonl").read_text().splitlines()
    head = json.loads(text[0])
    head["args"]["data"] = "/not/here"
    (tmp_path / "p.jsonl").write_text("\n".join([json.dumps(head), *text[1:]]))
    done = run("evaluate.py", root, tmp_path, "--score", "p.jsonl")
    assert done.returncode == 0, done.stdout
    assert results(tmp_path / "out" / "evaluation")["runs"][0]["rows"] == (
        results(work / "out")["runs"][0]["rows"])
    page = (tmp_path / "out" / "evaluation" / "report.html").read_text()
    assert "shown with --data" in page and "data:image/jpeg" not in page


def test_the_teachers_text_scores_fully(rooms):
    """gold_plans of the benchmark's poses are the teacher's of the training data."""
    samples = {tuple(s.answer.split()) + (s.task, s.question): s
               for s in geometry.load_samples(rooms, split="val")}
    records = []
    for item in evaluate.load_items("rooms", rooms):
        sample = samples[tuple(item.gold.split()) + (item.task, item.question)]
        if len(item.poses) > 1:
            text = rewards.write_response(rewards.gold_of(sample).actions, item.gold)
            records.append({"id": item.id, **evaluate.facts_of(item), "mode": "action",
                            "views": len(item.poses), "response": text, "item": item})
    run_ = evaluate.score_run("rooms", "teacher", records, "hatch")
    assert run_.rows[-1].score == pytest.approx(100)
    assert run_.form["format"] == 1 and run_.form["action"] == pytest.approx(1, abs=1e-9)


def test_reasoning_in_words(root, rooms, tiny_model, tmp_path):
    """Table 3's other modality: its own instruction, its own form, no R_act."""
    text = [item for item in evaluate.load_items("rooms", rooms) if len(item.poses) > 1][0]
    assert evaluate.prompt_of(text, "rooms", "language").endswith(rewards.LANGUAGE_INSTRUCTION)
    done = run("evaluate.py", root, tmp_path, *flags(rooms, tiny_model), "--mode", "language",
               "--limit", 3)
    assert done.returncode == 0 and "mean R_act" not in done.stdout, done.stdout
    (tmp_path / "p.jsonl").write_text(json.dumps({
        "id": text.id, "views": 2, "response": f"<think>So.</think><answer>{text.gold}</answer>"}))
    done = run("evaluate.py", root, tmp_path, "--score", "p.jsonl", "--bench", "rooms", "--data",
               rooms, "--mode", "language")
    assert "mean R_fmt 1.000 of 1 responses" in done.stdout
    assert results(tmp_path / "out" / "evaluation")["runs"][0]["rows"][-1]["score"] == 100


def test_scoring_and_drawing_need_no_torch(answered, root, tmp_path):
    predictions_ = answered[0] / "out" / "predictions.jsonl"
    (tmp_path / "log.jsonl").write_text('{"args": {}}\n' + "\n".join(
        json.dumps({"step": k, "loss": 1 / k}) for k in (1, 2, 3)))
    code = (f"import sys; sys.path.insert(0, {str(root)!r}); import evaluate; "
            f"evaluate.main(['--score', {str(predictions_)!r}]); "
            "evaluate.main(['--curves', 'log.jsonl']); sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0


def test_overall_is_the_mean_of_three(root, tmp_path):
    tasks = {"spar-mv": "position_matching", "mindcube": "among", "mmsi": "MSR"}
    for (bench, task), right in zip(tasks.items(), (4, 2, 0)):
        lines = [{"args": {"bench": bench, "model": "m", "mode": "direct"}}] + [
            {"id": k, "task": task, "gold": "A", "response": "A" if k < right else "B"}
            for k in range(4)]
        (tmp_path / f"{bench}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = run("evaluate.py", root, tmp_path, "--score", *(f"{bench}.jsonl" for bench in tasks))
    assert done.returncode == 0, done.stdout
    assert results(tmp_path / "out" / "evaluation")["overall"] == {"m, direct": 50}
    overall = done.stdout[done.stdout.index("Overall of Table 1"):]
    assert overall.split("\n")[1].split() == ["Overall", "50.0", "29.4", "43.6"]


# ------------------------------------------------------------------------------ the page


class Page(html.parser.HTMLParser):
    """What a browser would make of a page: its elements, their attributes, all its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


def test_hostile_responses_show_as_text(root, rooms, tmp_path):
    hostile = ["<script>alert(1)</script>", "</pre></article><img src=x onerror=alert(1)>",
               "\u202e\0\x1b[31mred\ud800", "&lt;b&gt; &amp;", "A" * 3_000_000, "\"'`--><!--",
               "<answer><svg onload=alert(1)></answer>", '<action>[{"from":0,"to":1,"action":'
               '[{"move_forward_m":1e299}]}]</action><answer>A</answer>',
               '<action>[{"from":0,"to":1,"action":' + "[" * 100_000]
    items = [item for item in evaluate.load_items("rooms", rooms) if len(item.poses) > 1]
    assert len(items) > len(hostile)
    plans = evaluate.gold_plans(items[-1].poses)
    hostile.append(rewards.write_response(
        {pair: [*plan, {"move_forward_m": 1.0}] for pair, plan in plans.items()}, "A"))
    lines = [{"args": {"bench": "rooms", "model": "<b>m\x1b", "mode": "action",
                       "data": str(rooms)}}]
    lines += [{"id": item.id, "views": len(item.poses), "response": text, "<i>": "\ud800"}
              for item, text in zip([*items[:len(hostile) - 1], items[-1]], hostile)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = run("evaluate.py", root, tmp_path, "--score", "p.jsonl", "--bench", "rooms")
    assert done.returncode == 0, done.stdout
    assert "\x1b" not in done.stdout
    source = (tmp_path / "out" / "evaluation" / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert page.tags.count("article") == page.tags.count("pre") == len(hostile)
    assert set(page.tags) <= {
        "html", "meta", "title", "style", "h1", "h2", "div", "table", "thead", "tr", "th", "td",
        "p", "b", "span", "article", "pre", "figure", "figcaption", "svg", "polyline", "path",
        "circle", "img"}
    attributes = dict(page.attributes)
    assert not [name for name in attributes if name.startswith("on")]
    assert all(value.startswith("data:image/jpeg;base64,") for name, value in page.attributes
               if name == "src")
    assert "<script>alert(1)</script>" in page.text and "3,000,000 characters" in page.text
    assert "&lt;b&gt; &amp;" in page.text and "off by 1 m and 0°" in page.text
    assert not set(source) & set("\0\x1b\u202e") and len(source) < 1_500_000


ODD = [{"views": "2"}, {"views": 1e300}, {"task": ["x"]}, {"gold": 1.5}, {"question": 7},
       {"question": None}, {"mode": ["action"]}, {"id": True}, {"id": None}, {"response": 3},
       {"gold": {"a": 1}}, {"id": "\ud800\x1b"}]


def test_odd_fields_are_named_or_read_over(root, tmp_path):
    """What another engine may have written never ends in a traceback."""
    good = {"task": "depth_prediction_oc_mv", "gold": "1.5", "response": "1.5", "views": 3}
    lines = [good | {"id": k} | odd for k, odd in enumerate([{}, *ODD])]
    lines = [*map(json.dumps, lines), "[" * 100_000, '["args"]', "7", "null", "{}"]
    for head in (None, {"args": None}, {"args": {"model": ["m"], "mode": 7, "data": 5}}, ["args"]):
        text = lines if head is None else [json.dumps(head), *lines]
        (tmp_path / "p.jsonl").write_text("\n".join(text))
        done = run("evaluate.py", root, tmp_path, "--score", "p.jsonl", "--bench", "spar-mv")
        assert done.returncode == 0, done.stdout
        assert "\x1b" not in done.stdout and "is no task of SPAR-Bench-MV" in done.stdout
        (found,) = results(tmp_path / "out" / "evaluation")["runs"]
        assert found["rows"][-1]["n"] >= 8
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"id": 1, "response": "1.5", "args": {}, "task": "view_change_infer",
                    "gold": "move_left:1"}))  # no head, though it has args
    done = run("evaluate.py", root, tmp_path, "--score", "p.jsonl", "--bench", "spar-mv")
    assert results(tmp_path / "out" / "evaluation")["runs"][0]["rows"][-1]["n"] == 1


def test_a_task_of_the_other_half_is_no_task_of_this(root, tmp_path):
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(
        {"id": k, "task": task, "gold": "1.5", "response": "1.5"})
        for k, task in enumerate(("depth_prediction_oc", "depth_prediction_oc_mv"))))
    done = run("evaluate.py", root, tmp_path, "--score", "p.jsonl", "--bench", "spar-mv")
    assert "'depth_prediction_oc' is no task of SPAR-Bench-MV" in done.stdout
    assert results(tmp_path / "out" / "evaluation")["runs"][0]["rows"][-1]["n"] == 1


def test_runs_side_by_side_keep_their_rows(root, tmp_path):
    """Tasks stand under their own level, each run with its own n, whichever it lacks."""
    for name, tasks in (("a", ("spatial_imagination_oc_mv",)),
                        ("b", ("depth_prediction_oc_mv", "position_matching",
                               "spatial_imagination_oc_mv", "spatial_imagination_oc_mv"))):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(
            {"id": k, "task": task, "gold": "1", "response": "1"})
            for k, task in enumerate(tasks)))
    done = run("evaluate.py", root, tmp_path, "--score", "a.jsonl", "b.jsonl", "--bench", "spar-mv",
               "--convention", "spar")
    assert done.returncode == 0, done.stdout
    first = [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
    labels = first[first.index("SPAR-Bench-MV") + 1:first.index("Avg") + 1]
    assert labels == ["Low", "depth_prediction_oc_mv", "Middle", "position_matching", "High",
                      "spatial_imagination_oc_mv", "Avg"]
    high = next(line for line in done.stdout.splitlines() if line.startswith("High"))
    assert high.split() == ["High", "100.0", "(100.0-100.0)", "1", "100.0", "(100.0-100.0)", "2",
                            "32.6", "67.1"]
    assert "averages over task means" in done.stdout


def test_camera_path_is_seen_from_above():
    path, gaze = evaluate.camera_path(
        [{"turn_right_deg": 90}, {"move_forward_m": 2}, {"turn_left_deg": 45}])
    np.testing.assert_allclose(path, [(0, 0), (0, 0), (2, 0), (2, 0)], atol=1e-12)
    assert gaze == pytest.approx(math.pi / 4)
    path, gaze = evaluate.camera_path([{"move_forward_m": 1}, {"turn_left_deg": 90}])
    np.testing.assert_allclose(path[-1], (0, 1), atol=1e-12)
    assert gaze == pytest.approx(-math.pi / 2)


# ------------------------------------------------------------------------------------- curves


def test_curves_of_several_runs(root, tmp_path):
    for name, level in (("with", 0.3), ("without", 0.1)):
        (tmp_path / name).mkdir()
        lines = [{"args": {}, "versions": {}}] + [
            {"step": k, "reward_action": level + k / 1000, "reward": 1.0, "kl": 0.01 * k}
            for k in range(1, 101)] + [{"step": 101, "skipped": "..."}]
        (tmp_path / name / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"st')
    done = run("evaluate.py", root, tmp_path, "--curves", "with/log.jsonl", "without/log.jsonl")
    assert done.returncode == 0, done.stdout
    sheet = Image.open(tmp_path / "out" / "evaluation" / "curves.png")
    assert sheet.size == (1280, 760)  # three panels: R_act, R, KL
    panel = np.asarray(sheet.convert("RGB"))[:380, :640].astype(int)
    for colour in evaluate.COLOURS[:2]:  # both runs are in the first
        rgb = np.array(list(bytes.fromhex(colour[1:])))
        assert (abs(panel - rgb).sum(-1) < 30).sum() > 200


def test_a_log_that_cannot_be_read_spoils_no_report(answered, root, tmp_path):
    for name, text in (("empty", ""), ("odd", '{"args": {}}\n{"step": "x", "kl": 1}\n')):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "log.jsonl").write_text(text)
    predictions_ = answered[0] / "out" / "predictions.jsonl"
    done = run("evaluate.py", root, tmp_path, "--score", predictions_)
    assert done.returncode == 0 and "a line has no step" in done.stdout, done.stdout
    done = run("evaluate.py", root, tmp_path, "--score", predictions_, "--curves",
               "out/odd/log.jsonl")
    assert done.returncode and "a line has no step" in done.stdout


def test_ticks_are_round_and_enclose():
    rng = np.random.default_rng(0)
    for _ in range(300):
        low = rng.normal() * 10.0 ** rng.integers(-6, 6)
        high = low + abs(rng.normal()) * 10.0 ** rng.integers(-6, 6)
        ticks = evaluate.nice_ticks(low, high)
        assert 2 <= len(ticks) <= 7
        most = 1e-6 * (high - low)
        assert ticks[0] <= low + most and ticks[-1] >= high - most
    assert evaluate.nice_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert len(evaluate.nice_ticks(3, 3)) >= 2


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("given, said", [
    ((), "run `python actor_grpo.py` first"),
    (("--model", "out/sft"), "run `python actor_sft.py --target answer` first"),
    (("--bench", "mmsi", "--data", "good.jsonl", "--model", "."), "a model directory holds"),
    (("--bench", "mmsi"), "--bench mmsi needs --data"),
    (("--bench", "cvbench", "--data", ".", "--mode", "action"), "one image a question"),
    (("--limit", 0), "--limit must be 1 or more, got 0"),
    (("--show", -1), "--show must be 0 or more, got -1"),
    (("--score", "none.jsonl"), "none.jsonl: cannot be read"),
    (("--score", "empty.jsonl"), "add --bench"),
    (("--score", "empty.jsonl", "--bench", "mmsi"), "holds no prediction that can be scored"),
    (("--score", "bare.jsonl", "--bench", "mmsi"), "name the benchmark's file with --data"),
    (("--curves", "none.jsonl"), "none.jsonl: no log.jsonl"),
    (("--curves", "short.jsonl"), "no log with two steps"),
    (("--bench", "mmsi", "--data", "nowhere", "--model", "MODEL"), "nowhere: not there"),
    (("--bench", "mmsi", "--data", "folder", "--model", "MODEL"), "none of MMSI_Bench.parquet"),
    (("--bench", "mmsi", "--data", "empty.jsonl", "--model", "MODEL"), "no usable question"),
    (("--bench", "mmsi", "--data", "notes.txt", "--model", "MODEL"), "neither .parquet nor")])
def test_bad_arguments(given, said, root, tiny_model, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "bare.jsonl").write_text('{"id": 1, "response": "A"}')
    (tmp_path / "good.jsonl").write_text(json.dumps({
        "id": 1, "question_type": "MSR", "question": "?", "answer": "A", "images": ["x.jpg"]}))
    (tmp_path / "short.jsonl").write_text('{"args": {}}\n{"step": 1, "kl": 1}\n')
    done = run("evaluate.py", root, tmp_path,
               *(tiny_model if word == "MODEL" else word for word in given))
    assert done.returncode and said in done.stdout + capsys.readouterr().err, done.stdout
    assert "Traceback" not in done.stdout
