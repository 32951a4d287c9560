"""geometry.py against hand-computed numbers and naive loops that share no code with it."""

import collections
import dataclasses
import functools
import io
import itertools
import json
import math
import re
import time
import zlib

import numpy as np
import pytest
from PIL import Image

import geometry
from scenes import render, write_view


def at(place, degrees=0):
    """A level camera here that looks so far to the right of z."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, 0, s, place[0]], [0, 1, 0, place[1]], [-s, 0, c, place[2]], [0, 0, 0, 1]])


def view(depth, cam2world=np.eye(4), side=20):
    """A view, 53 degrees wide, of this depth map, or of a wall this far."""
    depth = np.full((side, side), depth) if np.ndim(depth) == 0 else depth
    H, W = depth.shape
    K = np.array([[W, 0, (W - 1) / 2], [0, W, (H - 1) / 2], [0, 0, 1.0]])
    return geometry.View(np.zeros((H, W, 3), np.uint8), depth.astype(np.float32), K, cam2world)


def naive_overlap(x, y, n, every, t=0.05, t_rel=0.05):
    """Every such pixel in a loop, in float64, straight from section 3.3."""
    M, points, pixels = np.zeros((n * n, n * n)), np.zeros(n * n), np.zeros(n * n)
    inverse_K, inverse_y = np.linalg.inv(x.K), np.linalg.inv(y.cam2world)
    (H, W), (H_y, W_y) = x.depth.shape, y.depth.shape
    for v, u in itertools.product(range(every // 2, H, every), range(every // 2, W, every)):
        i, d = int((v + 0.5) / H * n) * n + int((u + 0.5) / W * n), float(x.depth[v, u])
        pixels[i] += 1
        if 0 < d < math.inf:
            points[i] += 1
            Z = inverse_y @ (x.cam2world @ [*(inverse_K @ [u * d, v * d, d]), 1.0])
            a, b, _ = y.K @ (Z[:3] / Z[2])
            if Z[2] > 0 and -0.5 < a < W_y - 0.5 and -0.5 < b < H_y - 0.5:
                d_y = float(y.depth[round(b), round(a)])
                if 0 < d_y < math.inf and abs(Z[2] - d_y) < max(t, t_rel * Z[2]):
                    M[i, int((b + 0.5) / H_y * n) * n + int((a + 0.5) / W_y * n)] += 1
    M[points < 0.25 * pixels] = 0
    return M / np.maximum(points, 1)[:, None]


@pytest.mark.parametrize("n, stride, given", [
    (1, 4, {}), (4, 4, {"t": 0.2, "t_rel": 0.01}), (7, 2, {"t_rel": 0.02}), (16, 1, {})])
def test_overlap_against_naive_loop(n, stride, given):
    """Views of two sizes of a bumpy wall, with holes. The stride, 4 if not given, leaves a patch
    and axis two pixels where there are as many pixels."""
    rng, views, M = np.random.default_rng(n), [], []
    for pose, (H, W) in ((np.eye(4), (36, 48)), (at((0.4, -0.1, 0.2), -12), (40, 32))):
        depth = 3 + 0.1 * rng.normal(size=(H, W))
        depth[rng.uniform(size=(H, W)) < 0.1] = 0
        depth[: H // 3, : W // 3] = rng.choice([0, np.nan, np.inf], (H // 3, W // 3))
        views.append(view(depth, pose))
    for x, y in (views, views[::-1]):
        every = min(stride, *(max(1, size // (2 * n)) for size in x.depth.shape))
        M.append(naive_overlap(x, y, n, every, **given))
    given = {**given, **({"stride": stride} if stride != 4 else {})}
    assert np.abs(geometry.directional_overlap(*views, n, **given) - M[0]).max() < 1e-9
    S = geometry.correspondence(*views, n, **given)
    assert np.abs(S - (M[0] + M[1].T) / 2).max() < 1e-9 and S.max() > 0.02  # Eq. 1, as printed


def test_overlap_by_hand():
    # a wall 2 m away; y stands to the right by one cell's width: x's left column is outside y
    x, y = view(2.0, side=16), view(2.0, at((2.0 * 4 / 16, 0, 0)), side=16)
    wanted = np.diag([float(i % 4 > 0) for i in range(1, 16)], -1)
    assert np.array_equal(geometry.directional_overlap(x, y, 4, stride=1), wanted)
    assert not geometry.directional_overlap(view(2.0), view(2.0, at((0, 0, 0), 180)), 3).any()
    for here, there, seen in ((2, 1.88, 0), (2, 2.08, 1), (2, 2.12, 0), (2, 1.92, 1),
                              (0.5, 0.54, 1), (0.5, 0.56, 0)):  # within 5 %, or 5 cm
        M = geometry.directional_overlap(view(here), view(there), 2)
        assert np.allclose(M, np.eye(4) * seen)
    for rows, kept in ((4, False), (5, True)):  # depth on a fifth of a patch, on a quarter
        depth = np.full((40, 40), 2.0)
        depth[rows:20, :20] = 0
        M = geometry.directional_overlap(view(depth), view(2.0), 2, stride=1)
        assert (M[0].sum() > 0) == kept and np.allclose(M[1:].sum(-1), 1)
    for x, y in ((view(np.ones((4, 9))), view(1.0)), (view(1.0), view(np.ones((9, 4))))):
        geometry.directional_overlap(x, y, 4)
        with pytest.raises(ValueError, match="into 5x5 patches: use a smaller --grid"):
            geometry.directional_overlap(x, y, 5)


@pytest.mark.parametrize("plan, gaze, up, place", [
    # OpenCV axes of the first camera: x right, y down, z forward
    *(([{name: 90}], gaze, up, (0, 0, 0)) for name, gaze, up in (
        ("turn_right_deg", (1, 0, 0), (0, -1, 0)), ("turn_left_deg", (-1, 0, 0), (0, -1, 0)),
        ("turn_up_deg", (0, -1, 0), (0, 0, -1)), ("turn_down_deg", (0, 1, 0), (0, 0, 1)))),
    *(([{name: 2}], (0, 0, 1), (0, -1, 0), place) for name, place in (
        ("move_forward_m", (0, 0, 2)), ("move_backward_m", (0, 0, -2)),
        ("move_up_m", (0, -2, 0)), ("move_down_m", (0, 2, 0)))),
    # appendix B.2's example, each in the frame that the ones before it left behind: gaze
    # (sin 30 cos 15, -sin 15, cos 30 cos 15), 1.4 of it, 0.3 of up
    ([{"turn_right_deg": 30}, {"turn_up_deg": 15}, {"move_forward_m": 1.4}, {"move_up_m": 0.3}],
     (0.482963, -0.258819, 0.836516), (-0.129410, -0.965926, -0.224144),
     (0.637325, -0.652124, 1.103880))])
def test_where_a_plan_leads(plan, gaze, up, place):
    wanted = np.array([np.cross(gaze, up), np.negative(up), gaze, place]).T
    assert np.allclose(geometry.pose_from_actions(plan), [*wanted, (0, 0, 0, 1)], atol=1e-5)


@pytest.mark.parametrize("place, gaze, plan", [
    ((0, 0, 0), -140, [{"turn_left_deg": 140}]), ((0.04, 0, 0.02), 0, []),  # nearer than 5 cm
    ((0, 0, 0.051), 0, [{"move_forward_m": 0.05}]),
    ((0.01, 2, 0.02), 0, [{"move_down_m": 2.0}]),  # nearly straight down: not aimed at
    ((0.1, -2, 0), 0, [{"turn_right_deg": 90}, {"move_forward_m": 0.1}, {"move_up_m": 2.0},
                       {"turn_left_deg": 90}]),
    ((0, -1, 0.2), 0, [{"turn_up_deg": 79}, {"move_forward_m": 1.02}, {"turn_down_deg": 79}]),
    ((0, -1, 0.17), 0, [{"move_forward_m": 0.17}, {"move_up_m": 1.0}]),  # steeper than 80 degrees
    # 30.4 right, then gaze at 60.8: the rest of the turn counts from the rounded 30
    ((2 * math.sin(0.53058), 0, 2 * math.cos(0.53058)), 60.8,
     [{"turn_right_deg": 30}, {"move_forward_m": 2.0}, {"turn_right_deg": 31}])])
def test_plans_by_hand(place, gaze, plan):
    got = geometry.actions_from_pose(at(place, gaze))
    assert json.dumps(got) == json.dumps(plan)  # plain numbers, whole degrees


def residual_roll(pose):
    """Signed roll in degrees about the gaze that the plan of a pose leaves out."""
    back = geometry.pose_from_actions(geometry.actions_from_pose(pose))
    rest = back[:3, :3].T @ pose[:3, :3]
    return math.degrees(math.atan2(rest[1, 0] - rest[0, 1], rest[0, 0] + rest[1, 1]))


def test_plans_lead_where_the_pose_is():
    """Any rotation, any place: both come back up to rounding (half a degree of yaw and pitch, half
    a centimetre), and the roll that is lost is what residual_roll says."""
    rng = np.random.default_rng(1)
    for _ in range(400):
        pose = geometry.pose_from_actions([
            {name: rng.uniform(-180, 180)} for name in ("turn_right_deg", "turn_up_deg") * 2])
        pose[:3, 3] = rng.normal(size=3) * rng.choice([0.1, 1, 5])
        back = geometry.pose_from_actions(geometry.actions_from_pose(pose))
        d_t, d_r = geometry.pose_error(pose, back)
        aside = math.hypot(pose[0, 3], pose[2, 3])  # under 5 cm of a steep target: not aimed at
        rounding = 0.006 + np.linalg.norm(pose[:3, 3]) * math.radians(0.71)
        assert d_t < max(rounding, 0.056 if aside < 0.05 else 0)
        assert math.degrees(math.acos(min(1, pose[:3, 2] @ back[:3, 2]))) < 0.72
        assert abs(d_r - abs(residual_roll(pose))) < 0.8
        half_turn = pose @ np.diag([1, -1, -1, 1])  # its sine may round to more than 1
        assert abs(geometry.pose_error(pose, half_turn)[1] - 180) < 1e-5


def test_poses_by_hand():
    a, plan = np.eye(4), geometry.pose_from_actions
    b = plan([{"move_forward_m": 3}, {"move_up_m": 4}, {"turn_left_deg": 60}])
    assert np.allclose(geometry.pose_error(a, b), (5, 60)) and geometry.pose_error(b, b) == (0, 0)
    # an arc cosine of the trace would give 0
    assert abs(geometry.pose_error(a, plan([{"turn_up_deg": 1e-6}]))[1] - 1e-6) < 1e-12
    pose = geometry.relative_pose(at((1, 2, 3), 90), at((3, 2, 3)))
    assert np.allclose(pose, at((0, 0, 2), -90))  # i looks along x, j stands there, turned left
    roll = np.array([[0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])  # against the clock
    assert geometry.actions_from_pose(roll) == [] and residual_roll(roll) == -90
    for wrong in ({"fly_m": 1}, {"turn_left_deg": "3"}, {"move_up_m": math.inf}, {}, "move_up_m",
                  {"move_up_m": math.nan}, {"move_up_m": True}, {"move_up_m": 1, "move_down_m": 1}):
        with pytest.raises(ValueError):
            plan([wrong])


def annotate(root, lines, split="train", task="view_change_infer", kind="fill", source="scannet"):
    """Write a file of annotations, a dict a line; what is missing there is filled in."""
    path = root / source / "qa_jsonl" / split / task / kind / f"{kind}_{len(lines)}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    filled = {"image": ["a.jpg", "b.jpg"], "conversations": turns(human="How?", gpt="So.")}
    path.write_text("".join(json.dumps({"id": f"s{k}", **filled, **line}) + "\n"
                            for k, line in enumerate(lines)))
    return path


def turns(**texts):
    return [{"from": who, "value": text} for who, text in texts.items()]


def write_tree(root, image=(64, 48), depth=(64, 48), K="60 0 31.5 0 60 23.5 0 0 1",
               pose=np.eye(4), source="scannet"):
    """A scene of two frames. Returns its folder, and the sample about both."""
    folder, colour = root / source / "images/scene", np.full((*image[::-1], 3), 90, np.uint8)
    for k in range(2):
        write_view(folder, k, geometry.View(colour, np.full(depth[::-1], 1.5 + k / 1000),
                                            np.array([K.split()], float), pose))
    annotate(root, [{"image": [f"scene/image_color/{k}.jpg" for k in range(2)]}], source=source)
    return folder, next(s for s in geometry.load_samples(root) if s.source == source)


def test_what_a_frame_is(tmp_path):
    """ScanNet: depth in millimetres, named after the picture where the record does not say; 4x4
    intrinsics a scene. Structured3D: poses in millimetres, too, and 3x3 intrinsics a frame."""
    scene = "60 0 31.5 0  0 60 23.5 0  0 0 1 0  0 0 0 1"
    _, scannet = write_tree(tmp_path, K=scene, pose=at((1, 2, 3)))
    folder, structured = write_tree(tmp_path, pose=at((1200, -300, 50)), source="structured3d")
    (folder / "intrinsic/intrinsic_depth.txt").rename(folder / "intrinsic/1.txt")
    x, y = scannet.views()
    assert x.depth.dtype == np.float32 and np.all(x.depth == 1.5) and np.allclose(y.depth, 1.501)
    assert x.image.shape == (48, 64, 3) and np.all(x.image == 90)
    for its, place in ((y, (1, 2, 3)), (structured.view(1), (1.2, -0.3, 0.05))):
        assert np.allclose(its.cam2world, at(place))
        assert np.array_equal(its.K, [[60, 0, 31.5], [0, 60, 23.5], [0, 0, 1]])
    annotate(tmp_path, [{"image": [f"s/video_color/{k}.jpg" for k in (7, 8)]}])
    video = geometry.load_samples(tmp_path)[0]
    assert video.depths == [tmp_path / f"scannet/images/s/video_depth/{k}.png" for k in (7, 8)]
    with pytest.raises(geometry.DataError, match="s/video_pose/7.txt: cannot be read"):
        video.pose(0)


@pytest.mark.parametrize("image, depth, K, wanted", [  # K: fx, fy, cx, cy
    # one size: K as it is where its principal point lies in the middle 80 % of the grid
    ((100, 100), (100, 100), (90, 90, 10, 89), (90, 90, 10, 89)),
    ((100, 100), (100, 100), (90, 90, 9, 49.5), None),
    ((320, 240), (320, 240), (600, 610, 319.5, 239.5), (300, 305, 159.5, 119.5)),  # both halved
    # ScanNet: the depth map's own, or the colour camera's, as ScanNet++ always has
    ((1296, 968), (640, 480), (577.87, 578.73, 319.5, 239.5), (577.87, 578.73, 319.5, 239.5)),
    ((1296, 968), (648, 484), (1296, 968, 640, 480), (648, 484, 319.75, 239.75)),
    # picture and depth both resized: a larger grid of their shape, which K's own centre tells
    ((320, 240), (160, 120), (1000, 1000, 639.5, 479.5), (125, 125, 79.5, 59.5)),
    ((320, 240), (160, 120), (1000, 1000, 639.5, 270), None),  # of another shape
    ((320, 240), (160, 120), (150, 150, 125, 90), None)])  # not larger, and nobody's centre
def test_which_grid_intrinsics_belong_to(tmp_path, image, depth, K, wanted):
    _, sample = write_tree(tmp_path, image, depth, "{0} 0 {2} 0 {1} {3} 0 0 1".format(*K))
    if wanted:
        K = sample.view(0).K
        assert np.allclose((K[0, 0], K[1, 1], K[0, 2], K[1, 2]), wanted, atol=1e-9)
    else:
        with pytest.raises(geometry.DataError, match="intrinsic_depth.txt: .*not intrinsics of a"):
            sample.view(0)


def encoded(pixels, mode=None, file="PNG", **save):
    """The bytes of a picture file."""
    written = io.BytesIO()
    Image.fromarray(pixels, mode).save(written, file, **save)
    return written.getvalue()


def test_frames_that_cannot_be_used(tmp_path):
    """The file is named, in one line."""
    grey, deep = np.ones((48, 64), np.uint8), np.ones((48, 64), np.uint16)
    for file, cases in {
            "image_color/1.jpg": {encoded(grey)[:-30]: "cannot be read"},
            "image_depth/1.png": {
                b"": "cannot be read as an image", encoded(grey): ".*this one is uint8",
                encoded(np.stack([grey] * 3, -1)): "a depth map is a 16-bit one-channel png",
                encoded(0 * deep): "no pixel has depth",
                encoded(deep[:, 2:]): "62x48 pixels and the image's 64x48 differ in shape",
                encoded(deep[2:]): "64x46 pixels and the image's 64x48 differ in shape"},
            "pose/1.txt": {
                b"1 2 3": "holds 3 numbers, expected 4x4", b"inf " * 16: "holds inf or NaN",
                b"1 0 0 0  0 1 0.02 0  0 0 1 0  0 0 0 1": "not a rigid pose",
                b"1 0 0 0  0 1 0 0  0 0 1 0  1 2 3 1": "not a rigid pose",
                b"-1 0 0 0  0 1 0 0  0 0 1 0  0 0 0 1": "not a rigid pose: a rotation .of det"},
            "intrinsic/intrinsic_depth.txt": {
                b"1 0 0 1": "holds 4 numbers, expected 3x3 or 4x4",
                b"60 0 31 0 60 23 0 0.1 1": ".*last row .*not", b"0 0 31 0 60 23 0 0 1": "fx 0, ",
                b"60 0 31 0 -1 23 0 0 1": ".*fy -1, .*not intrinsics"}}.items():
        for content, message in cases.items():
            folder, sample = write_tree(tmp_path)
            (folder / file).write_bytes(content)
            with pytest.raises(geometry.DataError, match=f"/{file}: {message}") as caught:
                sample.view(1)
            assert "\n" not in str(caught.value)


def test_what_a_line_says(tmp_path):
    """Who speaks counts, not the order. File and line of what is no sample are named; blank lines,
    Windows line ends and no final line end do no harm."""
    path = annotate(tmp_path, [{}])
    good = path.read_text().strip()
    fine = [turns(system="You are a helpful assistant.", human=" How far?", gpt="2.0\n"),
            turns(gpt="2.0", human="How far?"), turns(user="How far?", assistant="2.0"),
            turns(human="Frame-0: <image>\nFrame-1: <image>\nHow far?", gpt="2.0")]
    bad = [turns(human="a", gpt="b") * 2, turns(human="a", user="b", gpt="c"), turns(human="a"),
           turns(system="a", gpt="b"), turns(human="a", tool="b"), turns(human=3, gpt="b"), 5,
           *(turns(human="<image>\n" * n + "a", gpt="b") for n in (1, 3)),
           turns(human="Frame-0: <image>\na", gpt="b")]
    lines = [{"conversations": its} for its in (*fine, *bad)] + [
        {"image": 0}, {"image": []}, {"image": [3, 4]}, {"image": "a.jpg"}, {"image": ["a.jpg"]},
        {"image": ["a", "b"], "depth": ["a.png"]}]
    lines = [json.dumps({**json.loads(good), **line}) for line in lines] + ["{broken", "[1, 2, 3]"]
    path.write_bytes("\r\n \n".join([*lines, good]).encode())
    samples = geometry.load_samples(tmp_path)
    assert len(samples) == len(lines) + 1 and samples[-1].answer == "So."
    assert {(s.question, s.answer) for s in samples[:len(fine)]} == {("How far?", "2.0")}
    for k in range(len(fine), len(lines)):
        with pytest.raises(geometry.DataError, match=f"1.jsonl, line {2 * k + 1}: not a SPAR"):
            samples[k]


def test_filters_and_order(tmp_path):
    """What holds no question is refused in one line, which names the page that shows the layout."""
    with pytest.raises(geometry.DataError, match="nowhere: no such directory.*, see docs/data.md$"):
        geometry.load_samples(tmp_path / "nowhere")
    (tmp_path / "scannet/images").mkdir(parents=True)
    with pytest.raises(geometry.DataError, match="found there: nothing; see docs/data.md$"):
        geometry.load_samples(tmp_path)
    annotate(tmp_path, [{}], task="position_matching", kind="sentence")
    with pytest.raises(geometry.DataError, match="any; found there: position_matching/sentence; "):
        geometry.load_samples(tmp_path)
    annotate(tmp_path, [{}] * 2)
    annotate(tmp_path, [{}] * 3, task="position_matching", kind="select")
    annotate(tmp_path, [{}], split="val")
    samples = geometry.load_samples(tmp_path)
    assert [s.kind + s.id for s in samples] == "selects0 selects1 selects2 fills0 fills1".split()
    assert samples[-2].task == "view_change_infer" and len(samples[1:9]) == 4
    assert len(geometry.load_samples(tmp_path, tasks=("position_matching",))) == 3
    assert len(geometry.load_samples(tmp_path, kinds=("sentence",))) == 1
    assert len(geometry.load_samples(tmp_path, split="val")) == 1


@pytest.mark.parametrize("file, wanted", [
    (encoded(np.uint8([[0, 100, 255]])), [0, 100, 255]),
    (encoded(np.uint16([[0, 257, 25700]])), [0, 1, 100]),  # 16 bits, however dark
    (encoded(np.int32([[-9, 25700, 65535]]), file="TIFF"), [0, 100, 255]),
    (encoded(np.int32([[0, 2**30, 2**31 - 1]]), file="TIFF"), [0, 128, 255]),
    (encoded(np.uint8([[[9, 0], [9, 255], [0, 51]]]), "LA"), [255, 9, 204]),
    (encoded(np.uint8([[9, 7, 0]]), transparency=7), [9, 255, 0])])  # one value of grey
def test_one_function_opens_every_picture(tmp_path, file, wanted):
    """16 and 32 bits are scaled, what is transparent lies on white; from a path or from bytes."""
    (tmp_path / "a.png").write_bytes(file)
    for source in (tmp_path / "a.png", io.BytesIO(file)):
        image = geometry.open_image(source)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image)[0], np.repeat(np.array([wanted]).T, 3, 1))
    for bad, message in ((b"GIF", "cannot be read as an image"),
                         (encoded(np.float32([[0.5]]), file="TIFF"), "pixels are floats; save it")):
        with pytest.raises(geometry.DataError, match=f"a.png: {message}"):
            geometry.open_image(io.BytesIO(bad), "a.png")


def test_a_picture_that_the_library_cannot_decode(monkeypatch):
    """A damaged AVIF raises what no other format does."""
    def fail(*_):
        raise RuntimeError("Failed to decode image")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(geometry.DataError, match="a.avif: cannot be read as an image"):
        geometry.open_image("a.avif")


def marks(sample, task, **markers):
    """[{colour: the pixels (H, W) bool that have it, roughly: jpeg}] of the sample's pictures."""
    pictures = dataclasses.replace(sample, task=task, markers=markers).pictures()
    return [{name: np.abs(np.asarray(its).astype(int) - rgb).max(-1) < 70
             for name, rgb in geometry.MARKER_RGB.items()} for its in pictures]


@pytest.mark.parametrize("W, H, unit", [(1296, 968, 20), (640, 480, 10)])
def test_markers_in_pixels(tmp_path, W, H, unit):
    """A point is a disc of radius 20 at native size, a box an outline 20 wide and 17.5 larger;
    smaller pictures get smaller marks. Corners may be swapped."""
    _, sample = write_tree(tmp_path, (W, H))
    first, second = marks(sample, "position_matching", red_point=[[500, 250]], bbox_img_idx=[[0]],
                          point_img_idx=[[1]], blue_bbox=[[500, 500, 250, 250]])
    v, u = np.indices((H, W))
    disc = (u - W // 2) ** 2 + (v - H // 4) ** 2 <= unit**2
    outside = np.maximum(abs(u - W * 3 / 8) - W / 8, abs(v - H * 3 / 8) - H / 8) / unit
    assert (second["red"] != disc).sum() < 2 * math.pi * unit  # of a pixel along the edge
    assert (first["blue"] != (abs(outside - 3 / 8) < 1 / 2)).sum() < W + H
    for points, index in (([5, 5], [[0]]), ([["a", 1]], [[0]]), ([[5, 5]], [7]), ([[5, 5]], [[2]]),
                          ([[5, 5]], [[-1]])):
        with pytest.raises(geometry.DataError, match="s0: its point or box fields cannot be read"):
            marks(sample, "position_matching", red_point=points, point_img_idx=index)


@pytest.mark.parametrize("task, index, colours, pictures", [
    ("distance_infer_center_oo_mv", [1, 0, 1], ["red", "green", "blue"], [1, 0, 1]),
    ("depth_prediction_oo_mv", [1, 0, 0], ["red", "blue", "green"], [1, 0, 0]),
    ("spatial_imagination_oo_mv", [0, 1], ["green", "blue", "red", "yellow"], [0, 1, 1, 1]),
    ("obj_spatial_relation_oc_mv", [1, 0], ["red", "blue"], [1, 1]),
    ("depth_prediction_oc", [], ["red", "blue"], [0, 0]), ("view_change_infer", [0], ["red"], [])])
def test_which_picture_each_colour_is_on(tmp_path, task, index, colours, pictures):
    _, sample = write_tree(tmp_path, (640, 480))
    boxes = {f"{its}_bbox": [[200 * k + 90, 400, 200 * k + 150, 600]]
             for k, its in enumerate(colours)}
    shown = marks(sample, task, bbox_img_idx=[index], **boxes)
    assert [k for its in colours for k in (0, 1) if shown[k][its].sum() > 150] == pictures


FRAME = "scene/image_color/{}.jpg".format
KEPT = {k for k in range(100) if zlib.crc32(FRAME(k).encode()) % 10 == 0}  # one in ten, by name


def make_walk(root, count=1000, seed=0, val=()):
    """A walk through 60 samples of two frames each and a single view, which is not asked for."""
    annotate(root, [{"id": f"p{k}", "image": [FRAME(k), FRAME(7 * k % 50)]} for k in range(60)])
    annotate(root, [{"image": FRAME(0)}], task="depth_prediction_oc")
    annotate(root, val, split="val")
    return geometry.Walk(root, count, seed)


def test_no_frame_that_is_held_out_is_trained_on(tmp_path):
    walk, held = make_walk(tmp_path), {k for k in range(60) if {k, 7 * k % 50} & KEPT}
    assert 0 < len(held) < 30 and sorted(walk.drawn) == sorted(set(range(60)) - held)
    assert {s.id for s in walk.heldout_samples()} == {f"p{k}" for k in held} and not walk.has_val
    # a val split is held out instead
    walk = make_walk(tmp_path, val=[{"image": [FRAME(99), FRAME(98)]}] * 3)
    assert sorted(walk.drawn) == list(range(60)) and walk.has_val
    assert sorted(s.id for s in walk.heldout_samples()) == ["s0", "s1", "s2"]
    for name, frames in (("all", KEPT), ("none", {1, 2} - KEPT)):
        annotate(tmp_path / name, [{"image": [FRAME(k)] * 2} for k in frames])
        with pytest.raises(geometry.DataError, match="too few samples to .*, see docs/data.md$"):
            geometry.Walk(tmp_path / name, 100, 0)
        annotate(tmp_path / name, [{}], split="val")  # then all of train is trained on
        assert len(geometry.Walk(tmp_path / name, 100, 0).drawn) == len(frames)


def test_many_lines_that_are_no_samples(tmp_path, capsys, monkeypatch):
    """Twenty are named, all are counted; the first is told again in the last line. Lines of a file
    are counted once."""
    path = annotate(tmp_path, [{"conversations": None, "messages": []}] * 300)
    opened = []
    monkeypatch.setattr(geometry, "_line_offsets", lambda *a, count=geometry._line_offsets, **b: (
        opened.append(a), count(*a, **b))[1])
    with pytest.raises(geometry.DataError, match=r"too few .* \(300 problems, the first: .*line"):
        geometry.Walk(tmp_path, 100, 0)
    assert capsys.readouterr().out.count("skipped ") == 20
    assert opened == [(path,)] * 2


def test_order_is_a_function_of_seed_and_position(tmp_path):
    """Also where a run is taken up again; the processes' parts of a batch are one's batch."""
    first, again, other = (make_walk(tmp_path, count=40, seed=seed) for seed in (3, 3, 4))
    size = len(first.drawn)
    order = [first.at(k) for k in range(3 * size)]
    epochs = [order[k:k + size] for k in range(0, 3 * size, size)]
    assert all(sorted(epoch) == sorted(first.drawn) for epoch in epochs) and size == 40
    assert epochs[0] != epochs[1] != epochs[2] and set(other.drawn) != set(first.drawn)
    for start, rank, world in ((0, 0, 1), (4, 0, 1), (0, 1, 2)):
        got = again.batches(lambda s: s.id, start, 9, 5, rank, world, 2)
        assert [[name for name, _ in batch] for batch in got] == [
            [f"p{k}" for k in order[k:k + 5][rank::world]] for k in range(5 * start, 45, 5)]


def test_reading_ahead_keeps_the_order():
    begun = []
    ready = geometry.read_ahead(lambda k: begun.append(k) or 1 / (30 - k), itertools.count(), 4)
    assert [next(ready) for _ in range(10)] == [1 / (30 - k) for k in range(10)]  # without an end
    time.sleep(0.2)
    assert 10 < len(begun) <= 10 + 2 * 4  # ahead, but not far
    with pytest.raises(ZeroDivisionError):  # what is no fault of the data is not hidden
        list(ready)


def test_wrong_units_directions_axes_and_K_are_warned_of():
    """And nothing else is: eight cameras on a bow, all towards one place on a wall."""
    headings = np.radians(90 + 11 * np.arange(8) - 40)
    places = (4, 9, 1.5) - np.stack([np.cos(headings), np.sin(headings), 0 * headings], -1) * 2
    views = [render((6, 9, 3), *its, np.zeros((3, 3)), 64, 48) for its in zip(places, headings)]
    for change in (
            lambda v: {},  # right; then world-to-camera, OpenGL axes, metres, 1/5000 m, a larger K
            lambda v: {"cam2world": np.linalg.inv(v.cam2world)},
            lambda v: {"cam2world": v.cam2world @ np.diag([1, -1, -1, 1])},
            lambda v: {"depth": v.depth / 1000}, lambda v: {"depth": v.depth * 1000},
            lambda v: {"depth": v.depth / 5}, lambda v: {"K": np.diag([2.4, 2.4, 1]) @ v.K}):
        seen = [geometry.View(**(vars(its) | change(its))) for its in views]
        line, odd = geometry.describe_pairs([(x, y, geometry.correspondence(x, y, 6))
                                             for x, y in itertools.combinations(seen, 2)])
        assert (odd is None) == (not change(views[0])) == ("28 stand apart, 0 of" in line), line


@pytest.mark.parametrize("depth, away, empty, warned", [
    (2.0, 1, 3, True), (2.0, 1, 2, False), (2.0, 0, 10, False),  # a turn on the spot tells nothing
    (0.21, 1, 0, False), (0.19, 1, 0, True), (49.0, 1, 0, False), (51.0, 1, 0, True)])
def test_what_is_said_of_pairs(depth, away, empty, warned):
    x, y = view(depth), view(depth, at((0.04 + away, 0, 0)))
    x.depth[:9] = 0  # no value: does not count
    line, odd = geometry.describe_pairs([(x, y, np.eye(4) * (k >= empty)) for k in range(10)])
    assert line == (f"median depth {depth:.2f} m; of 10 pairs of views {10 * away} stand apart, "
                    f"{empty * away} of these without overlap")
    assert ("camera-to-world in metres with OpenCV" in odd) if warned else odd is None


def test_real_frames(shared):
    """They read; sampling every fourth pixel moves S by at most 0.03; our reading of a change of
    view agrees with answers that somebody else computed."""
    for sample in geometry.load_samples(shared / "spar")[::9]:
        for x, y in itertools.combinations(sample.views(), 2):
            fine, coarse = (geometry.correspondence(x, y, 4, stride=its) for its in (1, 4))
            assert np.abs(fine - coarse).max() < 0.03 and sample.pictures()
    for sample in geometry.load_samples(shared / "spar", tasks=("view_change_infer",)):
        assert is_view_change(sample.answer, np.linalg.inv(sample.pose(0)) @ sample.pose(1))


@functools.cache
def read_frame(image):
    """Pose and depth of a frame, without this project's reader. Rendering inverts unproject: pixels
    lie on a box, and none between."""
    scene = image.parent.parent
    room = geometry.make_room(np.random.default_rng([0, int(scene.name.removeprefix("room_"))]))
    pose, K = (np.loadtxt(scene / its) for its in (f"pose/{image.stem}.txt",
                                                   "intrinsic/intrinsic_depth.txt"))
    depth = np.asarray(Image.open(scene / f"image_depth/{image.stem}.png")) / 1000
    v, u = np.indices(depth.shape)
    x, y = (u - K[0, 2]) / K[0, 0] * depth, (v - K[1, 2]) / K[1, 1] * depth
    rays = np.stack([x, y, depth], -1) @ pose[:3, :3].T
    before, away = ((np.abs((share * rays + pose[:3, 3])[..., None, :] - room.centre)
                     - room.half).max(-1) for share in (0.9, 1))  # (H, W, boxes), 0 on a side
    assert min(before.min(), away.min()) > -2e-3 and away.min(-1).max() < 2e-3
    return pose, depth


def is_view_change(answer, pose):
    """Right, down, forward; rotated up, right: our reading of SPAR's five dimensions."""
    said = [float(amount) * (-1 if re.search("left|move_up|backward|rotate_down", name) else 1)
            for name, amount in (part.split(":") for part in answer.split(","))]
    right, up = math.atan2(pose[0, 2], pose[2, 2]), math.asin(-pose[1, 2])
    wanted = *pose[:3, 3], math.degrees(up), math.degrees(right)
    return np.all(np.abs(np.subtract(said, wanted)) < (0.051,) * 3 + (0.6,) * 2)


def asked(pose):
    return {task: answer for task, _, answer in geometry.pose_questions(pose)}


def test_questions_of_a_pose():
    view_change = "move_{}:{},move_{}:{},move_{}:{},rotate_{}:{},rotate_{}:{}".format
    assert asked(at((0.23, -0.41, 0.72), 25.4)) == {
        "camera_turn": "right 25",
        "view_change_infer": view_change(
            "right", 0.2, "up", 0.4, "forward", 0.7, "up", 0, "right", 25)}
    assert asked(at((-1.26, 0.31, -12), -59)) == {
        "camera_turn": "left 59", "view_change_infer": view_change(
            "left", 1.3, "down", 0.3, "backward", "12.0", "up", 0, "left", 59)}
    up = at((-1e-17, 0, 0))
    c, s = math.cos(math.radians(20)), math.sin(math.radians(20))
    up[1:3, 1:3] = [[c, -s], [s, c]]
    assert asked(up) == {"view_change_infer": view_change(  # too small a turn to the side
        "right", "0.0", "down", "0.0", "forward", "0.0", "up", 20, "right", 0)}
    assert [*asked(at((0, 0, 1), 9.4))] == ["view_change_infer"]
    assert [*asked(at((0, 0, 1), 9.6))] == ["camera_turn", "view_change_infer"]
    up[1:3, 1:3] = [[0, -1], [1, 0]]
    for pose in (at((0, 0, 1), 71), at((0, 0, 1), -180), up, up.T):
        assert geometry.pose_questions(pose) == []


def test_questions_of_any_pose():
    """However a camera stands, rolled as well: none where the gazes are over 70 degrees apart."""
    rng, seen = np.random.default_rng(0), collections.Counter()
    for _ in range(300):
        pose = np.eye(4)
        pose[:3, :3], _ = np.linalg.qr(rng.normal(size=(3, 3)))
        pose[:3, :3] *= np.linalg.det(pose[:3, :3])
        pose[:3, 3] = rng.normal(size=3)
        answers, right = asked(pose), math.degrees(math.atan2(pose[0, 2], pose[2, 2]))
        seen.update([*answers, "any"])
        assert bool(answers) == (math.degrees(math.acos(pose[2, 2])) <= 70)
        if answers:
            assert is_view_change(answers["view_change_infer"], pose)
        if "camera_turn" in answers:
            assert answers["camera_turn"] == f"{'right' if right > 0 else 'left'} {abs(right):.0f}"
        assert ("camera_turn" in answers) == (bool(answers) and abs(round(right)) >= 10)
    assert seen["any"] > seen["view_change_infer"] > seen["camera_turn"] > 40


def test_rooms_are_exact(rooms):
    """Frames are what was rendered; all questions of frame 0 and a turned one, and of two turned
    ones, are asked, about as many of each task."""
    samples = [*geometry.load_samples(rooms), *geometry.load_samples(rooms, split="val")]
    counts, found = collections.Counter(sample.task for sample in samples), {}
    for sample in samples:
        (first, depth), (last, _) = map(read_frame, sample.images)
        pose = np.linalg.inv(first) @ last
        x, y, z = pose[:3, 3]
        assert (sample.task, sample.question, sample.answer) in geometry.pose_questions(pose)
        assert sample.kind == "fill" and not sample.markers and math.hypot(x, y) < 1e-6
        assert abs(z) < 1e-6 or 0.4 <= z <= 1  # on the spot, or after a step ahead
        assert abs(first[2, 0]) < 1e-6 and depth.min() > 0.7  # no roll; stands free
        found.setdefault(sample.images[0].parent.parent, set()).add(
            (*(int(path.stem) for path in sample.images), sample.task))
    for scene, those in found.items():
        poses = [read_frame(scene / f"image_color/{k}.jpg")[0] for k in range(5)]
        assert those == {(i, j, task) for i in range(5) for j in range(1, 5) if i != j
                         for task in asked(np.linalg.inv(poses[i]) @ poses[j])}
    assert counts["camera_turn"] + counts["view_change_infer"] == counts.total()
    assert 0.75 < counts["camera_turn"] / counts["view_change_infer"] <= 1


def test_benchmark_of_rooms_is_drawn_by_task(rooms, tmp_path):
    """So many of each task, or all there are, evenly spaced; each question is asked once."""
    val = geometry.load_samples(rooms, split="val")
    there = collections.Counter(sample.task for sample in val)
    most = there["camera_turn"] + 1  # the rarer one
    geometry._write_benchmark(tmp_path, val, most)
    rows = [json.loads(line) for line in (tmp_path / "rooms.jsonl").read_text().splitlines()]
    asked = collections.Counter(row["task"] for row in rows)
    assert asked == {task: min(most, count) for task, count in there.items()}
    moves = [sample.answer for sample in val if sample.task == "view_change_infer"]
    drawn = [row["answer"] for row in rows if row["task"] == "view_change_infer"]
    assert drawn == [moves[k * len(moves) // most] for k in range(most)]
    assert {row["question"] for row in rows} == {sample.question for sample in val}
    first = [path.read_bytes() for path in val[0].images]
    assert [(tmp_path / path).read_bytes() for path in rows[0]["image"]] == first
    assert [row["id"] for row in rows] == list(range(len(rows)))


def test_rooms_are_deterministic_reused_and_redone(tmp_path):
    def make(name, seed=0):
        return geometry.render_rooms(tmp_path / name, rooms=3, seed=seed, held_out=0.34, size=64)

    def content(root):
        return {path.relative_to(root): path.read_bytes() for path in root.rglob("*.*")}

    first = make("a")
    before = (first / "rooms.json").stat().st_mtime_ns
    assert (make("a") / "rooms.json").stat().st_mtime_ns == before  # reused
    (tmp_path / "b.partial/rooms").mkdir(parents=True)  # what an interruption leaves
    assert content(make("b")) == content(first) != content(make("b", seed=1))  # others: redone
    (tmp_path / "mine").mkdir()
    with pytest.raises(geometry.DataError, match="not a tree of rendered rooms"):
        make("mine")
