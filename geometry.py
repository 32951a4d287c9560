"""Posed views: where a pixel is in the room, which patches of two views show the same place, and
which camera moves lead from one view to the next. numpy and Pillow only.

    Eq. 1  patch-level spatial overlap S                  directional_overlap, correspondence
    Eq. 9  translation and rotation error of a pose       pose_error
    B.3    relative pose <-> atomic actions               actions_from_pose, pose_from_actions
           SPAR-7M-RGBD on disk, read lazily              load_samples, Sample, View
           drawing, holding out, order, reading ahead     Walk
           the same layout, rendered from nothing         render_rooms

Conventions, everywhere in this project
    camera      OpenCV: x right, y down, z forward. `cam2world` (4, 4) maps camera points to world
                points, so its last column is where the camera stands and its third where it looks.
    units       metres, and degrees at the boundary to text; radians inside.
    depth       z-depth (distance along the optical axis, not along the ray); 0, NaN, inf: no value.
    pixels      integer coordinates are pixel centres: a W pixel wide image spans -0.5 .. W - 0.5,
                and resizing it by s maps cx to (cx + 0.5) s - 0.5, for x and y separately.
    pose        relative_pose(i, j) is camera j in camera i's frame: it maps points of j to i.
    patches     patch k of n along an axis covers the fraction [k / n, (k + 1) / n) of it, so image,
                depth and feature map of one view agree although their resolutions differ.
    frames      stand in the names: points_world, cam2world_i.

Axes: V views, H W pixels, n grid side, P = n * n patches in raster order.

Beyond the paper: the choices tagged "not in the paper: NAME"; docs/choices.md lists them.
"""

import itertools
import json
import math
import os
import re
import shutil
import sys
import time
import zlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


class DataError(ValueError):
    """Input that cannot be used. The message is one line: which file, what is wrong, what to do."""


# ---------------------------------------------------------------------------------- views, Eq. 1


@dataclass
class View:
    """One posed RGB-D view."""

    image: np.ndarray  # (H', W', 3) uint8, the depth's field of view at any resolution
    depth: np.ndarray  # (H, W) float32 z-depth in metres, 0 = none
    K: np.ndarray  # (3, 3) intrinsics for the depth's pixels
    cam2world: np.ndarray  # (4, 4)


def unproject(depth, K, cam2world):
    """Pixels to points: depth (H, W) metres -> points_world (H, W, 3) metres, valid (H, W) bool.

    X = (u - cx) d / fx, Y = (v - cy) d / fy, Z = d, then into the world. Points whose depth has no
    value are the camera centre and not valid.
    """
    H, W = depth.shape
    valid = np.isfinite(depth) & (depth > 0)
    d = np.where(valid, depth, 0.0)
    x = (np.arange(W) - K[0, 2]) / K[0, 0]  # (W,)
    y = (np.arange(H) - K[1, 2]) / K[1, 1]  # (H,)
    # (3, H W), camera frame: numpy multiplies three long rows faster than many short ones
    points = np.stack([x[None, :] * d, y[:, None] * d, d]).reshape(3, -1)
    points_world = cam2world[:3, :3] @ points + cam2world[:3, 3:]
    return np.moveaxis(points_world.reshape(3, H, W), 0, -1), valid


def project(points_world, K, cam2world):
    """Points to pixels: points (..., 3) world metres -> uv (..., 2) pixels, z (...) metres.

    Not clipped: a point behind the camera has z <= 0 and a uv that means nothing.
    """
    R = cam2world[:3, :3]
    c = cam2world[:3, 3:]
    points = np.moveaxis(np.asarray(points_world), -1, 0)  # (3, ...)
    x, y, z = (R.T @ (points.reshape(3, -1) - c)).reshape(points.shape)  # in the camera's frame
    with np.errstate(divide="ignore", invalid="ignore"):
        uv = np.stack([x / z * K[0, 0] + K[0, 2], y / z * K[1, 1] + K[1, 2]])
    return np.moveaxis(uv, 0, -1), z


def directional_overlap(x, y, n, t=0.05, t_rel=0.05, stride=4):
    """How much of each patch of view x is seen by which patch of view y.

    x, y: View. n: grid side. t: metres, t_rel: share of the depth; a point is consistent when its
    depth z in y differs from y's own depth map by less than max(t, t_rel z). stride: every
    stride-th row and column of x is used; 1 uses all (4 moves S by 0.03 at most on real frames).
    Returns M (P, P): M[i, j] = share of patch i's pixels *with valid depth* (appendix A) whose 3-D
    point lands in patch j. A patch with depth on under a quarter of its pixels has an empty row.
    Raises ValueError when a view is smaller than n pixels on a side.
    """
    for H, W in (x.depth.shape, y.depth.shape):
        if not 1 <= n <= min(H, W):
            raise ValueError(f"cannot cut a view of {W}x{H} pixels into {n}x{n} patches: use "
                             "a smaller --grid or larger images")
    H, W = x.depth.shape
    P = n * n
    stride = max(1, min(stride, H // (2 * n), W // (2 * n)))  # two or more pixels a patch and axis
    first = stride // 2  # not in the paper: pixel stride
    K = x.K.copy()  # intrinsics of the image that keeps every stride-th pixel
    K[:2, 2] -= first
    K[:2] /= stride

    column_x = (2 * np.arange(first, W, stride) + 1) * n // (2 * W)  # floor((u + 1/2) / W * n)
    row_x = (2 * np.arange(first, H, stride) + 1) * n // (2 * H)
    i = row_x[:, None] * n + column_x[None, :]  # patch of every sampled pixel

    points_world, valid = unproject(x.depth[first::stride, first::stride], K, x.cam2world)
    uv, z = project(points_world, y.K, y.cam2world)
    u = uv[..., 0]
    v = uv[..., 1]

    H_y, W_y = y.depth.shape
    inside = valid & (z > 0) & (u > -0.5) & (u < W_y - 0.5) & (v > -0.5) & (v < H_y - 0.5)
    u = u[inside]
    v = v[inside]
    z = z[inside]
    i_inside = i[inside]
    depth_y = y.depth[np.rint(v).astype(np.intp), np.rint(u).astype(np.intp)]  # nearest pixel
    seen = np.isfinite(depth_y) & (depth_y > 0)
    consistent = seen & (np.abs(z - depth_y) < np.maximum(t, t_rel * z))  # the same surface
    column_y = np.minimum(((u + 0.5) * (n / W_y)).astype(np.intp), n - 1)
    row_y = np.minimum(((v + 0.5) * (n / H_y)).astype(np.intp), n - 1)
    j = row_y * n + column_y  # patch of y that each point lands in

    M = np.bincount(i_inside[consistent] * P + j[consistent], minlength=P * P).reshape(P, P)
    pixels = np.bincount(i.ravel(), minlength=P)
    with_depth = np.bincount(i[valid], minlength=P)
    M = M / np.maximum(with_depth, 1)[:, None]  # not in the paper: valid depth
    M[with_depth < 0.25 * pixels] = 0.0  # not in the paper: little depth
    return M


def correspondence(x, y, n, t=0.05, t_rel=0.05, stride=4):
    """Symmetric patch correspondence S (P, P) in [0, 1]; arguments as in directional_overlap."""
    M_xy = directional_overlap(x, y, n, t, t_rel, stride)
    M_yx = directional_overlap(y, x, n, t, t_rel, stride)
    return (M_xy + M_yx.T) / 2  # Eq. 1


# ------------------------------------------------------------------- poses and actions, appendix B


def relative_pose(cam2world_i, cam2world_j):
    """Camera j in camera i's frame, (4, 4): translation = where j stands, columns = j's axes."""
    return np.linalg.inv(cam2world_i) @ cam2world_j


# Metres: the camera does not turn towards a target that is nearer, nor move there.
AIM_MIN = 0.05  # not in the paper: aim of a plan
# A target this far above or below the level is reached by moving level, then by move_up/down.
STEEP = math.radians(80)  # not in the paper: aim of a plan


def actions_from_pose(pose):
    """The teacher's plan for a relative pose: aim at the target, move there, turn to its gaze.

    pose (4, 4): relative_pose(i, j). Returns one-key dicts, whole degrees and centimetres, zeros
    left out, e.g. [{"turn_right_deg": 30}, {"move_forward_m": 1.4}]. Each turn is about the
    camera's own axes as the actions before it left them. The gaze is planned from the *rounded*
    aim, so rounding does not add up. Roll about the gaze has no action and is dropped. (B.3)
    """
    x, y, z = pose[:3, 3]
    distance = math.hypot(x, y, z)
    level = math.hypot(x, z)
    right = up = forward = rise = 0
    if distance >= AIM_MIN and math.atan2(abs(y), level) > STEEP:
        rise = -y  # what is left of the way is level
        y = 0
        distance = level
    if distance >= AIM_MIN:
        right = round(math.degrees(math.atan2(x, z)))
        up = round(math.degrees(math.atan2(-y, level)))
        forward = distance
    aim = pose_from_actions([{"turn_right_deg": right}, {"turn_up_deg": up}])
    # where the target camera looks, seen from the aimed one; its other two axes are not asked
    gaze = aim[:3, :3].T @ pose[:3, 2]  # not in the paper: roll
    gaze_right = round(math.degrees(math.atan2(gaze[0], gaze[2])))
    gaze_up = round(math.degrees(math.atan2(-gaze[1], math.hypot(gaze[0], gaze[2]))))

    plan = [("turn_right_deg", right), ("turn_up_deg", up), ("move_forward_m", forward),
            ("move_up_m", rise), ("turn_right_deg", gaze_right), ("turn_up_deg", gaze_up)]
    opposite = {"turn_right_deg": "turn_left_deg", "turn_up_deg": "turn_down_deg",
                "move_up_m": "move_down_m"}
    actions = []
    for name, amount in plan:
        if name.endswith("_m"):
            amount = round(float(amount), 2)  # not in the paper: rounding
        if amount:
            actions.append({name if amount > 0 else opposite[name]: abs(amount)})
    return actions


ACTIONS = {  # atomic action -> motion, and its sign (B.3)
    "turn_right_deg": ("turn right", 1), "turn_left_deg": ("turn right", -1),
    "turn_up_deg": ("turn up", 1), "turn_down_deg": ("turn up", -1),
    "move_forward_m": ("move forward", 1), "move_up_m": ("move up", 1),
    "move_down_m": ("move up", -1),
    "move_backward_m": ("move forward", -1)}  # not in the paper: read beyond B.3


def read_actions(actions):
    """A plan as [(motion, signed amount)], motions as in ACTIONS, in degrees or metres.

    Raises ValueError if an action is not a one-key dict of a known name and a number under 1e300,
    so that poses of ten million of them and their distances are finite, too.
    """
    motions = []
    for action in actions:
        if not isinstance(action, dict) or len(action) != 1:
            raise ValueError(f"an action is a dict with one key, got {action!r:.80}")
        ((name, amount),) = action.items()
        if name not in ACTIONS:  # not in the paper: move_forward_px
            raise ValueError(f"unknown action {name!r:.80}")
        if type(amount) not in (int, float) or not abs(amount) < 1e300:  # NaN fails this, too
            raise ValueError(f"{name} needs a finite number")
        motion, sign = ACTIONS[name]
        motions.append((motion, sign * float(amount)))  # not in the paper: read beyond B.3
    return motions


def pose_from_actions(actions):
    """The relative pose (4, 4) that a plan leads to; inverts actions_from_pose up to rounding and
    roll. actions: one-key dicts, see ACTIONS. Raises ValueError on anything else (read_actions)."""
    x, y, z = np.eye(3)  # the camera's own axes, and where it is, in the frame it started from
    place = np.zeros(3)
    for motion, amount in read_actions(actions):
        if motion == "move forward":
            place = place + amount * z
        elif motion == "move up":
            place = place - amount * y  # y points down
        else:
            c = math.cos(math.radians(amount))
            s = math.sin(math.radians(amount))
            if motion == "turn right":
                x, z = c * x - s * z, s * x + c * z
            else:
                y, z = c * y + s * z, c * z - s * y
    pose = np.eye(4)
    pose[:3] = np.array([x, y, z, place]).T
    return pose


def pose_error(pose_a, pose_b):
    """Translation error in metres and rotation error in degrees between poses (..., 4, 4)."""
    d_t = np.hypot.reduce(pose_a[..., :3, 3] - pose_b[..., :3, 3], axis=-1)
    # chord = 2 sqrt(2) sin(angle / 2) keeps its precision at small angles, where the arc cosine of
    # the trace loses half of it
    chord = np.linalg.norm(pose_a[..., :3, :3] - pose_b[..., :3, :3], axis=(-2, -1))
    d_r = np.degrees(2 * np.arcsin(np.minimum(chord / math.sqrt(8), 1.0)))
    return d_t, d_r  # Eq. 9


def pose_questions(pose):
    """The questions that a relative pose answers, as [(task, question, answer)]; may be empty.

    pose (4, 4): relative_pose(i, j) of any two frames, in metres; they are views 0 and 1.
    camera_turn, after Actial, asks for the turn to the side, e.g. "right 20", where there is one of
    10 degrees or more. view_change_infer, as in SPAR, asks where view 1 stands and how it is
    turned, along and about the axes of view 0: "move_right:0.2,move_down:0.0,move_forward:0.7,
    rotate_up:3,rotate_left:25". Where the gazes are over 70 degrees apart there is no question: the
    two views hardly share anything. Roll is not asked for.
    """
    x, y, z = pose[:3, 3].round(1)
    gaze = pose[:3, 2]
    right = round(math.degrees(math.atan2(gaze[0], gaze[2])))
    up = round(math.degrees(math.atan2(-gaze[1], math.hypot(gaze[0], gaze[2]))))
    questions = []
    if gaze[2] < math.cos(math.radians(70)):
        return questions
    if abs(right) >= 10:
        questions.append((
            "camera_turn",
            "Which way did the camera turn from view 0 to view 1, and how many degrees?",
            f"{'right' if right > 0 else 'left'} {abs(right)}"))
    questions.append((
        "view_change_infer",
        "How did the camera get from view 0 to view 1? Answer in meters and degrees as "
        "move_<right_or_left>:x,move_<down_or_up>:x,move_<forward_or_backward>:x,"
        "rotate_<down_or_up>:x,rotate_<right_or_left>:x.",
        f"move_{'right' if x >= 0 else 'left'}:{abs(x)},"
        f"move_{'down' if y >= 0 else 'up'}:{abs(y)},"
        f"move_{'forward' if z >= 0 else 'backward'}:{abs(z)},"
        f"rotate_{'up' if up >= 0 else 'down'}:{abs(up)},"
        f"rotate_{'right' if right >= 0 else 'left'}:{abs(right)}"))
    return questions


# ------------------------------------------------------------------------- SPAR-7M-RGBD on disk

# Two or three still images of one scene; 4.1 says "samples with multiple images" and names no task.
MULTI_VIEW_TASKS = (
    "camera_motion_infer", "depth_prediction_oc_mv", "depth_prediction_oo_mv",
    "distance_infer_center_oc_mv", "distance_infer_center_oo_mv", "distance_prediction_oc_mv",
    "distance_prediction_oo_mv", "obj_spatial_relation_oc_mv", "obj_spatial_relation_oo_mv",
    "position_matching", "spatial_imagination_map_mv", "spatial_imagination_oc_mv",
    "spatial_imagination_oo_mv", "view_change_infer",
    "camera_turn")  # not in the paper: rooms

MARKER_RGB = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0),
              "yellow": (255, 255, 0)}
# Entry k of point_img_idx / bbox_img_idx is for the k-th of these colours that the record has.
# Tasks not listed have the order of MARKER_RGB; a colour that an order lacks is not drawn.
MARKER_ORDER = {
    **dict.fromkeys(("camera_motion_infer", "view_change_infer", "distance_infer_center_oc",
                     "distance_infer_center_oc_mv"), ()),
    "distance_infer_center_oo_mv": ("red", "green", "blue"),
    "spatial_imagination_oc_mv": ("green", "blue", "red"),
    "spatial_imagination_oo_mv": ("green", "blue", "red", "yellow")}


@dataclass
class Sample:
    """One question of SPAR-7M about 1..N views of a scene. Reads pixels only when asked to; what
    cannot be used raises DataError naming the file."""

    id: str
    source: str
    task: str  # e.g. "view_change_infer"
    kind: str  # "select", "fill", "sentence" or "judge", the folder's name
    question: str  # without <image> tags
    answer: str
    images: list  # paths
    depths: list  # paths
    markers: dict = field(repr=False)  # the record's point and box fields

    def views(self):
        """All views, in the question's order."""
        return [self.view(k) for k in range(len(self.images))]

    def view(self, k):
        """View k as it was taken, without markers."""
        image_path = self.images[k]
        depth_path = self.depths[k]
        image = np.asarray(open_image(image_path))
        raw = np.asarray(_load_image(depth_path))
        if raw.ndim != 2 or raw.dtype.kind not in "iu" or raw.dtype == np.uint8:
            raise DataError(f"{depth_path}: a depth map is a 16-bit one-channel png in "
                            f"millimetres, this one is {raw.dtype} {raw.shape}")
        if not (raw > 0).any():
            raise DataError(f"{depth_path}: no pixel has depth")
        H, W = raw.shape
        H_i, W_i = image.shape[:2]
        if abs(W / H * H_i / W_i - 1) > 0.03:
            raise DataError(f"{depth_path}: {W}x{H} pixels and the image's {W_i}x{H_i} "
                            "differ in shape")
        scene = image_path.parent.parent
        K_path = scene / "intrinsic" / f"{image_path.stem}.txt"  # Structured3D: one a frame
        if not K_path.exists():
            K_path = scene / "intrinsic" / "intrinsic_depth.txt"
        K = _fit_intrinsics(_read_matrix(K_path, rows=(3, 4)), (W, H), (W_i, H_i), K_path)
        return View(image, raw.astype(np.float32) / 1000, K, self.pose(k))  # mm in every source

    def pose(self, k):
        """cam2world (4, 4) of view k; reads no pixel."""
        image_path = self.images[k]
        folder = "video_pose" if image_path.parent.name == "video_color" else "pose"
        pose_path = image_path.parent.parent / folder / f"{image_path.stem}.txt"
        cam2world = _read_matrix(pose_path, rows=(4,))
        if self.source == "structured3d":
            cam2world[:3, 3] /= 1000  # the one source whose poses are in millimetres
        R = cam2world[:3, :3]
        mirrors = np.linalg.det(R) < 0  # one axis flipped: left would be right
        if mirrors or abs(R.T @ R - np.eye(3)).max() > 0.01 or (
                abs(cam2world[3] - (0, 0, 0, 1)).max() > 1e-6):
            raise DataError(f"{pose_path}: not a rigid pose: a rotation (of determinant 1, not -1) "
                            "and, below, 0 0 0 1")
        return cam2world

    def pictures(self):
        """The images as the question speaks of them: PIL, with the coloured points and boxes drawn.

        Points are discs of radius 20 and boxes outlines 20 wide and 17.5 larger on each side, in
        pixels of SPAR's originals (1280 wide and more); smaller images get proportionally smaller
        marks. Nothing is drawn where the markers are in other fields than <colour>_point and
        <colour>_bbox, as in spatial_imagination_map_mv (no select or fill questions) and videos.
        """
        pictures = [open_image(path) for path in self.images]
        try:
            for shape in ("bbox", "point"):
                order = MARKER_ORDER.get(self.task, tuple(MARKER_RGB))
                present = [colour for colour in order if self.markers.get(f"{colour}_{shape}")]
                indices = self.markers.get(f"{shape}_img_idx") or [[0]]  # a list in a list
                index = indices[0] or [0]
                if self.task == "obj_spatial_relation_oc_mv":
                    index = index[:1]  # all of its boxes are on one image
                for k, colour in enumerate(present):  # a short index: the rest on its last image
                    which = index[min(k, len(index) - 1)]
                    if which < 0:
                        raise ValueError(f"{colour} {shape} is on image {which}")
                    for mark in self.markers[f"{colour}_{shape}"]:
                        _draw_marker(pictures[which], mark, MARKER_RGB[colour])
        except (TypeError, ValueError, IndexError) as error:
            raise DataError(
                f"{self.id}: its point or box fields cannot be read ({error})") from None
        return pictures


class Samples(Sequence):
    """A read-only list of Sample. It holds where each line begins; indexing reads and parses it.

    files: paths of jsonl files, <source>/qa_jsonl/<split>/<task>/<kind>/<any>.jsonl below root.
    """

    def __init__(self, root, files):
        self.root = root
        self.files = files
        size = sum(path.stat().st_size for path in files)
        shown = progress(files, len(files), "indexing") if size > 2**30 else files
        offsets = [_line_offsets(path) for path in shown]
        self.offset = np.concatenate([np.zeros(0, np.int64), *offsets])
        self.ends = np.cumsum([len(of_file) for of_file in offsets])  # a file's last sample, + 1
        self.every_line = {}  # {file with a line that is no sample: where each of its lines begins}

    def __len__(self):
        return len(self.offset)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        offset = int(self.offset[index])  # IndexError behind the last one
        path = self.files[np.searchsorted(self.ends, index % len(self), side="right")]
        with open(path, "rb") as file:
            file.seek(offset)
            line = file.readline()
        try:
            return _parse_record(line, self.root, path)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if path not in self.every_line:
                self.every_line[path] = _line_offsets(path, shortest=1)
            number = np.searchsorted(self.every_line[path], offset) + 1
            raise DataError(f"{path}, line {number}: not a SPAR record "
                            f"({type(error).__name__}: {error})") from None


def _parse_record(line, root, path):
    """One line of annotations -> Sample; ValueError, KeyError, ... if it is none."""
    record = json.loads(line)
    source, *_, task, kind, _ = path.relative_to(root).parts
    names = {"user": "human", "assistant": "gpt"}  # sorted, "gpt" comes before "human"
    turns = sorted((names.get(turn["from"], turn["from"]), turn["value"].strip())
                   for turn in record["conversations"] if turn["from"] != "system")
    if [who for who, _ in turns] != ["gpt", "human"]:
        raise ValueError("conversations must be one question (human) and one answer (gpt)")
    (_, answer), (_, question) = turns
    tags = question.count("<image>")
    images = [record["image"]] if isinstance(record["image"], str) else list(record["image"])
    depths = record.get("depth") or [
        re.sub(r"(image|video)_color/(.*)\.\w+", r"\1_depth/\2.png", name) for name in images]
    depths = [depths] if isinstance(depths, str) else list(depths)
    least = 2 if task in MULTI_VIEW_TASKS else 1
    if len(depths) != len(images) or len(images) < least:
        raise ValueError(f"{len(images)} images and {len(depths)} depth maps")
    if tags not in (0, len(images)):
        raise ValueError(f"{tags} <image> tags in its question, and {len(images)} images")
    base = root / source / "images"
    return Sample(
        id=str(record.get("id", f"a sample of {path.name}")), source=source, task=task, kind=kind,
        question=re.sub(r"(Frame-\d+: )?<image>\n?", "", question).strip(), answer=answer,
        images=[base / name for name in images], depths=[base / name for name in depths],
        markers={k: v for k, v in record.items() if k.endswith(("_point", "_bbox", "_img_idx"))})


def load_samples(root, split="train", tasks=None, kinds=("select", "fill")):
    """Index SPAR-7M-RGBD: root/<source>/qa_jsonl/<split>/<task>/<kind>/*.jsonl. Reads no pixel.

    tasks: names, None for all; kinds: of select, fill, sentence, judge. Returns a list-like
    Samples, in the order of the sorted file names. Raises DataError when nothing is found, saying
    where it looked. A source that is none of SPAR's is read like ScanNet (metres, intrinsics per
    scene).
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such directory; "
                        "--data takes the folder that holds scannet/, ..., see docs/data.md")
    found = sorted(root.glob(f"*/qa_jsonl/{split}/*/*/*.jsonl"))
    samples = Samples(root, [path for path in found if path.parts[-2] in kinds and (
        tasks is None or path.parts[-3] in tasks)])
    if not len(samples):
        there = ", ".join(sorted({"/".join(path.parts[-3:-1]) for path in found})) or "nothing"
        raise DataError(f"{root}: no sample in */qa_jsonl/{split}/<task>/<kind>/*.jsonl with kind "
                        f"in {list(kinds)} and task in {'any' if tasks is None else list(tasks)}; "
                        f"found there: {there}; see docs/data.md")
    return samples


def _line_offsets(path, shortest=3):
    """Byte offset of each line of a file that is not shorter than that, its end included, (lines,)
    int64. The shortest record is "{}" and a line end."""
    with open(path, "rb") as file:
        lengths = np.array([len(line) for line in file], np.int64)
    return (np.cumsum(lengths) - lengths)[lengths >= shortest]


def fingerprint(files):
    """What tells sets of files apart, wherever they lie: a checksum of their names and contents."""
    total = 0
    for path in sorted(files):
        total = zlib.crc32(path.name.encode(), total)
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                total = zlib.crc32(chunk, total)
    return f"{total:08x}"


def open_image(file, name=None):
    """A picture, whatever it was, as PIL RGB of 8 bits. Every picture of this project comes here.

    file: path or binary file; name: of a binary file, for errors. 16-bit and 32-bit grey is scaled
    to 0..255, what is transparent laid on white. Raises DataError for floats, whose range nobody
    knows, and for what is no picture.
    """
    image = _load_image(file, name)
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float64)
        most = 65535 if image.mode != "I" or grey.max() <= 65535 else 2**31 - 1
        image = Image.fromarray(np.rint(grey.clip(0) / most * 255).astype(np.uint8))
    elif image.mode == "F":
        raise DataError(f"{name or file}: pixels are floats; save it with 8 or 16 bits")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _load_image(file, name=None):
    try:
        with Image.open(file) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
        raise DataError(f"{name or file}: cannot be read as an image ({error})") from None


def _read_matrix(path, rows):
    """A square text matrix with as many rows as one of `rows`; finite, or DataError."""
    try:
        numbers = np.array(path.read_text().split(), dtype=np.float64)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a matrix of numbers ({error})") from None
    if len(numbers) not in [r * r for r in rows]:
        wanted = " or ".join(f"{r}x{r}" for r in rows)
        raise DataError(f"{path}: holds {len(numbers)} numbers, expected {wanted}")
    if not np.isfinite(numbers).all():
        raise DataError(f"{path}: holds inf or NaN (ScanNet marks lost tracking so)")
    return numbers.reshape(math.isqrt(len(numbers)), -1)


def _fit_intrinsics(K, size, image_size, path):
    """Intrinsics (3, 3) for a depth map of `size` (W, H), from a file that may state them for
    another size of picture: ScanNet++ states the colour camera's beside its small depth maps.

    The principal point (cx, cy) lies near the middle, so the file speaks of a picture of about
    2 cx + 1 by 2 cy + 1 pixels. The first of these that fits is taken:
    - the depth map's size, within 20 %, or within 80 % if the picture's is the same;
    - the picture's size, within 20 %;
    - 2 c + 1 itself, if it is larger than both and has the depth map's shape within 20 %.
    Raises DataError if none fits.
    """
    size = np.array(size)
    image_size = np.array(image_size)
    about = 2 * K[:2, 2] + 1  # the size of a grid with this principal point in its middle
    off_depth = np.abs(about / size - 1).max()
    off_image = np.abs(about / image_size - 1).max()
    of_one_size = (size == image_size).all()
    larger = np.all(about > np.maximum(size, image_size))
    same_shape = abs(about[0] / about[1] * size[1] / size[0] - 1) < 0.2
    grid = None
    if off_depth < (0.8 if of_one_size else 0.2):
        grid = size
    elif off_image < 0.2:
        grid = image_size
    elif larger and same_shape:
        grid = about
    if grid is None or min(K[0, 0], K[1, 1]) <= 0 or tuple(K[2, :3]) != (0, 0, 1):
        raise DataError(f"{path}: fx {K[0, 0]:g}, fy {K[1, 1]:g}, cx {K[0, 2]:g}, cy {K[1, 2]:g}, "
                        f"last row {K[2, :3]}: not intrinsics of a depth map of {size[0]}x{size[1]}"
                        f" or a picture of {image_size[0]}x{image_size[1]} pixels")
    scale = size / grid
    K = K[:3, :3].copy()
    K[:2, 2] = (K[:2, 2] + 0.5) * scale - 0.5
    K[[0, 1], [0, 1]] *= scale
    return K


def _draw_marker(picture, mark, rgb):
    """Draw a point [x, y] or a box [x1, y1, x2, y2], 0..1000 of the picture's width and height."""
    W, H = picture.size
    unit = 20 * min(1.0, max(W, H) / 1280)
    xy = [int(c / 1000 * s) for c, s in zip(mark, (W, H, W, H))]
    draw = ImageDraw.Draw(picture)
    if len(mark) == 2:
        draw.ellipse([xy[0] - unit, xy[1] - unit, xy[0] + unit, xy[1] + unit], fill=rgb)
    else:
        grow = unit * 7 / 8
        x1, x2 = sorted(xy[::2])
        y1, y2 = sorted(xy[1::2])
        draw.rectangle([x1 - grow, y1 - grow, x2 + grow, y2 + grow], outline=rgb,
                       width=max(1, round(unit)))


# ---------------------------------------------------------------- walking through a data set


def is_held_out(images):
    """Whether a sample of these images (paths) is kept from training, if the data has no val split.

    A hash of a frame's name holds out one frame in ten. What shows a held-out frame is held out.
    """
    names = ["/".join(path.parts[-3:]) for path in images]
    return any(zlib.crc32(name.encode()) % 10 == 0 for name in names)  # not in the paper: held-out


class Walk:
    """The way through a data set: what is drawn and in which order, what is held out.

    samples: all of the train split; drawn: indices of those to train on; has_val: whether there is
    a val split. Where there is none, drawn leaves out what is_held_out. The order is a function of
    seed and position alone, so a resumed run goes on where it stopped. What cannot be used is left
    out, and why is kept in `skipped`, of this process; the first twenty are named.
    """

    def __init__(self, root, count, seed, tasks=MULTI_VIEW_TASKS):
        self.samples = load_samples(root, "train", tasks)
        self.seed = seed
        self.skipped = {}  # {why: name}
        try:
            self.val = load_samples(root, "val", tasks)
            self.has_val = True
        except DataError:
            self.val = self.samples
            self.has_val = False
        shuffled = np.random.default_rng([seed, 0]).permutation(len(self.samples)).tolist()
        self.drawn = list(itertools.islice(filter(self.may_train, shuffled), count))
        if not self.drawn or next(self.heldout_samples(), None) is None:
            raise DataError(
                f"{root}: too few samples to train on some and hold out others; add samples, or a "
                f"val folder beside train, see docs/data.md{self.first_problem()}")

    def may_train(self, k):
        """Whether sample k may be trained on. Each may, if there is a val split."""
        if self.has_val:
            return True
        _, may = self.attempt(lambda sample: not is_held_out(sample.images), self.samples, k)
        return may

    def attempt(self, prepare, samples, k):
        """(name, prepare(samples[k])), with None in its place if that raises DataError."""
        name = f"sample {k}"
        try:
            name = samples[k].id
            return name, prepare(samples[k])
        except DataError as error:
            if str(error) not in self.skipped:
                self.skipped[str(error)] = name
                if len(self.skipped) <= 20:
                    print(f"skipped {error}", flush=True)
            return name, None

    def first_problem(self):
        """How many problems there were, and the first, to end an error with; "" without any."""
        first = next(iter(self.skipped), None)
        return f" ({len(self.skipped):,} problems, the first: {first})" if first else ""

    def at(self, position):
        """Index of the sample at a position of training: the drawn ones, shuffled each epoch."""
        epoch, place = divmod(position, len(self.drawn))
        order = np.random.default_rng([self.seed, 1, epoch]).permutation(len(self.drawn))
        return self.drawn[order[place]]

    def batches(self, prepare, start, steps, batch, rank, world, workers):
        """Yield what process `rank` of `world` works on in each step from `start` on, read ahead:
        [(name, prepare(sample) or None), ...]. It has every world-th sample of a batch."""
        positions = (step * batch + k for step in range(start, steps)
                     for k in range(rank, batch, world))

        def prepare_at(position):
            return self.attempt(prepare, self.samples, self.at(position))

        ready = read_ahead(prepare_at, positions, workers)
        for _ in range(start, steps):
            yield [next(ready) for _ in range(rank, batch, world)]

    def heldout_samples(self):
        """Yield the samples to evaluate on, in random order."""
        for k in np.random.default_rng(0).permutation(len(self.val)):
            _, sample = self.attempt(lambda sample: sample, self.val, int(k))
            if sample and (self.has_val or is_held_out(sample.images)):
                yield sample

    def prepared(self, prepare, samples, workers):
        """[prepare(sample)] of those of `samples` that can be used, read ahead."""
        ready = read_ahead(partial(self.attempt, prepare, samples), range(len(samples)), workers)
        found = [prepared for _, prepared in ready if prepared is not None]
        if not found:
            raise DataError(
                f"none of {len(samples)} held-out samples can be used{self.first_problem()}")
        return found


def read_ahead(prepare, numbers, workers):
    """Yield prepare(k) for every k of `numbers`, in order, computed ahead by `workers` threads."""
    queue = deque()
    with ThreadPoolExecutor(workers) as pool:
        for k in numbers:
            queue.append(pool.submit(prepare, k))
            if len(queue) > 2 * workers:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()


def describe_pairs(pairs):
    """What posed views look like, in a line to print, and what is odd about them, or None.

    pairs: [(View x, View y, S), ...]. Wrong units, directions or axes leave few pairs with overlap,
    and SPAR asks about what views share: a quarter without any is odd.
    Pairs whose cameras stand at one place are left out: a turn on the spot hides most mistakes.
    """
    depths = []
    apart = []  # the largest overlap of each pair that stands apart
    for x, y, S in pairs:
        depths += [np.median(view.depth[view.depth > 0]) for view in (x, y)]
        if math.dist(x.cam2world[:3, 3], y.cam2world[:3, 3]) > AIM_MIN:
            apart.append(S.max())
    depth = float(np.median(depths))
    empty = sum(most == 0 for most in apart)
    line = (f"median depth {depth:.2f} m; of {len(pairs)} pairs of views {len(apart)} stand apart, "
            f"{empty} of these without overlap")
    if 0.2 <= depth <= 50 and empty <= len(apart) / 4:
        return line, None
    return line, (
        "this looks wrong: is depth in millimetres (16 bit), are poses camera-to-world in metres "
        "with OpenCV axes (x right, y down, z forward), and intrinsics those of the depth map or "
        "the picture?")


# ------------------------------------------------------- rendered rooms: the inverse of unproject

ROOM_VERSION = 4  # of what render_rooms writes; raise it when that changes: old rooms are redone
# Degrees. The six differences of two are 11, 22, .. 66, each once (a Golomb ruler). Each heading is
# drawn within +-5.5 degrees of its own, which makes the turns between two evenly frequent.
HEADINGS = 11 * np.array([-3, -2, 1, 3])
# red, green, blue, yellow, orange, purple, pink, white, black
ROOM_RGB = ((205, 45, 40), (50, 150, 65), (45, 85, 200), (240, 205, 55), (240, 135, 40),
            (130, 65, 170), (245, 155, 190), (240, 238, 230), (45, 45, 50))


@dataclass
class Room:
    """S boxes along the axes of a z-up world; metres, a corner of the room at the origin. The first
    six are the walls x = 0, x = max, y = 0, y = max, the floor and the ceiling."""

    centre: np.ndarray  # (S, 3)
    half: np.ndarray  # (S, 3) half extents
    rgb: np.ndarray  # (S, 3, 3) 0..255: ground, pattern, what the ground fades to along the room
    waves: np.ndarray  # (S, 2, 3) radians a metre: checks, or stripes where the second is 0
    poses: list  # five cam2world, see place_cameras


SHADES = ((130, 245), (70, 120), (205, 235))  # of the four walls, of floor, of ceiling


def make_room(rng):
    """A random room of 4-7 m: two pictures on each wall, up to nine blocks, some hanging."""
    size = rng.uniform((4, 4, 2.5), (7, 7, 3.1))
    poses = place_cameras(size, rng)
    colours = rng.permutation(ROOM_RGB).tolist()
    boxes = []  # (centre, half, rgb)

    # walls, floor and ceiling: thick boxes around the room, of which the inner sides are seen
    for face in range(6):
        axis, far = divmod(face, 2)
        centre = size / 2
        half = 2 * size
        centre[axis] = size[axis] + 0.5 if far else -0.5
        half[axis] = 0.5
        shade = SHADES[max(0, face - 3)]
        boxes.append((centre, half, rng.uniform(*shade, (3, 3))))

    # two pictures on each wall, flat boxes
    for k, colour in enumerate(colours[:8]):
        across = k // 4  # the axis that the wall stands across
        far = k // 2 % 2
        centre = np.full(3, rng.uniform(1.2, 1.9))
        half = rng.uniform(0.25, 0.5, 3)
        centre[across] = size[across] * far
        half[across] = 0.03
        centre[1 - across] = size[1 - across] * (k % 2 + rng.uniform(0.3, 0.7)) / 2
        boxes.append((centre, half, np.outer((1, 0.7, 1), colour)))

    # blocks, where there is room for them: on the floor, a quarter of them under the ceiling
    taken = [(pose[:2, 3], 1.0) for pose in poses[:2]]  # where, and how far around it
    for _ in range(40):
        half = rng.uniform((0.15, 0.15, 0.2), (0.45, 0.45, 0.8))
        reach = math.hypot(*half[:2])
        hangs = rng.uniform() < 0.25
        height = size[2] - half[2] if hangs else half[2]
        spot = rng.uniform(reach, size[:2] - reach)
        if colours and all(math.dist(spot, at) > reach + far for at, far in taken):
            taken.append((spot, reach))
            rgb = np.outer((1, 0.7, 1), colours.pop())
            boxes.append((np.array([*spot, height]), half, rgb))
    waves = rng.normal(0, 6, (len(boxes), 2, 3))
    waves[::2, 1] = 0
    centre, half, rgb = zip(*boxes)
    return Room(np.array(centre), np.array(half), np.array(rgb), waves, poses)


def place_cameras(size, rng):
    """Five cam2world: one camera with a level gaze, and four that stand together, a step ahead.

    The step is 0.4 to 1 m along the first one's gaze, and one of the four has the same heading. The
    four are tilted by up to 18 degrees, any two of them by angles that differ by up to 20. All five
    stand 1 m or more from the walls.
    """
    while True:
        place = np.array([*rng.uniform(1, size[:2] - 1), rng.uniform(1.3, 1.7)])
        aim = rng.uniform(0.25, 0.75, 2) * size[:2]  # about the middle of the room
        side = rng.choice([-1, 1])
        pans = side * HEADINGS + rng.uniform(-5.5, 5.5, 4)
        headings = math.atan2(aim[1] - place[1], aim[0] - place[0]) + np.radians(pans)
        tilts = np.radians(rng.uniform(-8, 8) + rng.uniform(-10, 10, 4))
        behind = look(place, rng.choice(headings), 0)
        behind[:3, 3] -= rng.uniform(0.4, 1) * behind[:3, 2]
        from_middle = np.abs(behind[:2, 3] - size[:2] / 2)
        if np.all(from_middle < size[:2] / 2 - 1):
            turned = [look(place, heading, tilt) for heading, tilt in zip(headings, tilts)]
            return [behind, *turned]


def look(position, heading, elevation):
    """cam2world (4, 4) of a camera without roll in a z-up world; heading from x to y, radians."""
    ch = math.cos(heading)
    sh = math.sin(heading)
    ce = math.cos(elevation)
    se = math.sin(elevation)
    right = (sh, -ch, 0)
    down = (ch * se, sh * se, -ce)
    forward = (ch * ce, sh * ce, se)
    pose = np.eye(4)
    pose[:3] = np.array([right, down, forward, position]).T
    return pose


def cast(room, K, cam2world, width, height):
    """What pixels see: depth (H, W) metres, and the number (H, W) of the box.

    The rays are what unproject makes of depth 1. So they are 1 long along the optical axis, a hit's
    ray parameter is its z-depth, and unproject(depth) is the place that was hit.
    """
    origin = cam2world[:3, 3]
    rays = np.moveaxis(unproject(np.ones((height, width)), K, cam2world)[0] - origin, -1, 0)
    inverse = np.float32(1 / np.where(rays == 0, 1e-9, rays)).reshape(3, -1)  # (3, pixels)
    depth = np.full(height * width, np.inf, np.float32)
    number = np.zeros(height * width, np.uint8)
    boxes = np.float32(np.stack([room.centre - origin, room.half], 1))  # (S, 2, 3)
    for k, (away, half) in enumerate(boxes):
        a = (away - half)[:, None] * inverse  # depths of the box's planes, along each axis
        b = (away + half)[:, None] * inverse
        enter = np.minimum(a, b).max(0)
        leave = np.maximum(a, b).min(0)
        hit = (0 < enter) & (enter < leave) & (enter < depth)
        depth[hit] = enter[hit]
        number[hit] = k
    return depth.reshape(height, width), number.reshape(height, width)


def paint(room, number, points_world):
    """Colours (H, W, 3) uint8 of the boxes seen at points_world (H, W, 3), lit from the middle."""
    p = np.float32(np.moveaxis(points_world, -1, 0))  # (3, H, W)

    def at_pixels(of_boxes):
        """(S, ...) of boxes -> (..., H, W) of the box that each pixel sees."""
        return np.take(np.float32(np.moveaxis(of_boxes, 0, -1)), number, axis=-1)

    centre = at_pixels(room.centre)
    half = at_pixels(room.half)
    ground, pattern, far = at_pixels(room.rgb)
    waves = at_pixels(room.waves)
    wave, across = (waves * p).sum(1)
    mix = 0.25 + 0.25 * np.tanh(4 * np.sin(wave) * np.cos(across))  # soft edges: no aliasing
    normal = (p - centre) / half  # 1 or -1 on the face that the point is on
    side = np.sort(np.abs(normal), axis=0)
    mix[side[1] > 0.88] = 2  # blocks and pictures have dark edges: twice as far as to the pattern
    to_lamp = room.centre[:6].mean(0).astype(np.float32)[:, None, None] - p
    light = (normal * to_lamp * (np.abs(normal) == side[2])).sum(0) / np.sqrt((to_lamp**2).sum(0))
    ground = ground + (0.5 + 0.5 * np.sin(p.sum(0))) * (far - ground)
    rgb = (0.6 + 0.45 * np.maximum(light, 0)) * (ground + mix * (pattern - ground))
    return np.moveaxis(np.clip(rgb, 0, 255), 0, -1).astype(np.uint8)


def render_rooms(root, rooms=1000, seed=0, size=128, held_out=0.1):
    """Write `rooms` rendered rooms as a SPAR-7M-RGBD tree and a benchmark with SPAR-Bench's fields.

        root/rooms/images/<room>/{image_color,image_depth,pose,intrinsic}/...  5 frames a room
        root/rooms/qa_jsonl/{train,val}/<task>/fill/fill_<N>.jsonl             the last ones are val
        root/benchmark/rooms.jsonl, root/benchmark/images/                     of val

    size: pixels of a side; held_out: share of the rooms. The seed decides everything. A finished
    tree with the same arguments is left alone; one with other arguments is deleted and redone.
    Returns root.
    """
    root = Path(root)
    unfinished = Path(f"{root}.partial")
    stamp = json.dumps({"rooms": rooms, "seed": seed, "size": size, "held_out": held_out,
                        "version": ROOM_VERSION})
    if root.exists():
        if not (root / "rooms.json").exists():
            raise DataError(f"{root}: exists, and is not a tree of rendered rooms; "
                            "remove it or name another folder")
        if (root / "rooms.json").read_text() == stamp:
            return root
    shutil.rmtree(unfinished, ignore_errors=True)  # of an interrupted run
    lines = {}  # {(split, task): [line]}
    first_val = rooms - round(rooms * held_out)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy and Pillow release the lock
        jobs = pool.map(partial(_render_room, unfinished, seed, size), range(rooms))
        for number, records in enumerate(progress(jobs, rooms, "rendering rooms")):
            split = "train" if number < first_val else "val"
            for record in records:
                place = (split, record["type"])
                lines.setdefault(place, []).append(json.dumps(record) + "\n")
    for (split, task), of_place in lines.items():
        folder = unfinished / "rooms" / "qa_jsonl" / split / task / "fill"
        folder.mkdir(parents=True)
        (folder / f"fill_{len(of_place)}.jsonl").write_text("".join(of_place))
    if first_val < rooms:
        _write_benchmark(unfinished / "benchmark", load_samples(unfinished, split="val"))
    (unfinished / "rooms.json").write_text(stamp)
    shutil.rmtree(root, ignore_errors=True)  # rooms of other arguments, as their stamp said
    unfinished.rename(root)
    return root


def _render_room(root, seed, size, serial):
    """Render and write one room; return its questions as SPAR records: of frame 0 and a
    turned one, and of every ordered pair of turned ones."""
    rng = np.random.default_rng([seed, serial])
    room = make_room(rng)
    name = f"room_{serial:05d}"
    f = size / 2 / math.tan(math.radians(40))  # one lens, of 80 degrees
    c = (size - 1) / 2
    K = np.array([[f, 0, c, 0], [0, f, c, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    scene = root / "rooms" / "images" / name
    for folder in ("image_color", "image_depth", "pose", "intrinsic"):
        (scene / folder).mkdir(parents=True)
    for camera in ("color", "depth"):
        np.savetxt(scene / "intrinsic" / f"intrinsic_{camera}.txt", K, fmt="%.6f")
    for k, pose in enumerate(room.poses):
        depth, number = cast(room, K, pose, size, size)
        picture = Image.fromarray(paint(room, number, unproject(depth, K, pose)[0]))
        picture.save(scene / "image_color" / f"{k}.jpg", quality=92)
        Image.fromarray(np.rint(depth * 1000).astype(np.uint16)).save(
            scene / "image_depth" / f"{k}.png", compress_level=1)
        np.savetxt(scene / "pose" / f"{k}.txt", pose, fmt="%.8f")
    records = []
    for i, j in itertools.product(range(5), range(1, 5)):
        if i == j:
            continue
        pose = relative_pose(room.poses[i], room.poses[j])
        for task, question, answer in pose_questions(pose):
            records.append({
                "id": f"{name}_{len(records)}", "type": task,
                "image": [f"{name}/image_color/{k}.jpg" for k in (i, j)],
                "depth": [f"{name}/image_depth/{k}.png" for k in (i, j)],
                "conversations": [{"from": "human", "value": question},
                                  {"from": "gpt", "value": answer}]})
    return records


def _write_benchmark(folder, samples, most=250):
    """SPAR-Bench's rows for at most so many samples of each task, evenly spaced within it."""
    (folder / "images").mkdir(parents=True)
    by_task = {}
    drawn = []
    rows = []
    for sample in samples:
        by_task.setdefault(sample.task, []).append(sample)
    for of_task in by_task.values():
        count = min(most, len(of_task))
        drawn += [of_task[k * len(of_task) // count] for k in range(count)]
    for sample in drawn:
        paths = [f"images/{len(rows)}_{k}.jpg" for k in range(len(sample.images))]
        for path, picture in zip(paths, sample.images):
            shutil.copyfile(picture, folder / path)
        rows.append(json.dumps({
            "id": len(rows), "img_type": "multi_view",
            "format_type": sample.kind, "task": sample.task, "source": sample.source,
            "image": paths, "question": sample.question, "answer": sample.answer,
            "pose": [sample.pose(k).flatten().tolist() for k in range(len(paths))]}) + "\n")
    (folder / "rooms.jsonl").write_text("".join(rows))


def progress(items, total, label):
    """Yield items, showing a bar with time left: in place on a terminal, else a line a quarter."""
    start = time.monotonic()
    live = sys.stdout.isatty()
    for done, item in enumerate(items, 1):
        yield item
        if live or 4 * done // total > 4 * (done - 1) // total:
            passed = time.monotonic() - start
            print(f"{label} [{'#' * (24 * done // total):24}] {done}/{total}  {passed:.0f} s, "
                  f"{passed * (total - done) / done:.0f} s left",
                  end="\r" if live and done < total else "\n", flush=True)
