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
    cells       patch k of n along an axis covers the fraction [k / n, (k + 1) / n) of it, so image,
                depth and feature map of one view agree although their resolutions differ.
    frames      stand in the names: points_world, cam2world_i.

Axes: V views, H W pixels, n grid side, P = n * n patches in raster order.

Beyond the paper: the choices tagged "not in the paper" on their lines.
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
    """One posed RGB-D view.

    image      (H', W', 3) uint8, the depth's field of view at any resolution
    depth      (H, W) float32 z-depth in metres, 0 = none
    K          (3, 3) intrinsics for the depth's pixels
    cam2world  (4, 4)
    """

    image: np.ndarray
    depth: np.ndarray
    K: np.ndarray
    cam2world: np.ndarray


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
    points = np.stack([x[None, :] * d, y[:, None] * d, d]).reshape(3, -1)  # camera frame; planes of
    points_world = cam2world[:3, :3] @ points + cam2world[:3, 3:]  # x, y, z: numpy likes long rows
    return np.moveaxis(points_world.reshape(3, H, W), 0, -1), valid


def project(points_world, K, cam2world):
    """Points to pixels: points (..., 3) world metres -> uv (..., 2) pixels, z (...) metres.

    Not clipped: a point behind the camera has z <= 0 and a uv that means nothing.
    """
    R, c = cam2world[:3, :3], cam2world[:3, 3:]
    points_world = np.moveaxis(np.asarray(points_world), -1, 0)  # (3, ...)
    x, y, z = (R.T @ (points_world.reshape(3, -1) - c)).reshape(points_world.shape)  # camera frame
    with np.errstate(divide="ignore", invalid="ignore"):
        uv = np.stack([x / z * K[0, 0] + K[0, 2], y / z * K[1, 1] + K[1, 2]])
    return np.moveaxis(uv, 0, -1), z


def directional_overlap(x, y, n, t=0.05, t_rel=0.05, stride=4):
    """How much of each patch of view x is seen by which patch of view y.

    x, y: View. n: grid side. t: metres, t_rel: share of the depth; a point is consistent when its
    depth in y differs from y's own depth map by less than max(t, t_rel z). stride: every how many
    pixels of x are used (4 moves S by 0.03 at most on real frames; 1 uses all).
    Returns M (P, P): M[i, j] = share of patch i's pixels *with valid depth* (appendix A) whose 3-D
    point lands in patch j. A patch with depth on under a quarter of its pixels has an empty row.
    Raises ValueError when a view is smaller than n pixels on a side.
    """
    for H, W in (x.depth.shape, y.depth.shape):
        if not 1 <= n <= min(H, W):
            raise ValueError(f"cannot cut a view of {W}x{H} pixels into {n}x{n} cells: use a "
                             "smaller --grid or larger images")
    H, W = x.depth.shape
    P = n * n
    stride = max(1, min(stride, H // (2 * n), W // (2 * n)))  # two or more samples a cell and axis
    first = stride // 2
    K = x.K.copy()  # intrinsics of the image that keeps every stride-th pixel
    K[:2, 2] -= first
    K[:2] /= stride

    cell_u = (2 * np.arange(first, W, stride) + 1) * n // (2 * W)  # floor((u + 1/2) / W * n)
    cell_v = (2 * np.arange(first, H, stride) + 1) * n // (2 * H)
    i = cell_v[:, None] * n + cell_u[None, :]  # patch of every sampled pixel

    points_world, valid = unproject(x.depth[first::stride, first::stride], K, x.cam2world)
    uv, z = project(points_world, y.K, y.cam2world)
    u, v = uv[..., 0], uv[..., 1]

    H_y, W_y = y.depth.shape
    inside = valid & (z > 0) & (u > -0.5) & (u < W_y - 0.5) & (v > -0.5) & (v < H_y - 0.5)
    u, v, z, i_inside = u[inside], v[inside], z[inside], i[inside]
    depth_y = y.depth[np.rint(v).astype(np.intp), np.rint(u).astype(np.intp)]  # nearest pixel
    seen = np.isfinite(depth_y) & (depth_y > 0)
    consistent = seen & (np.abs(z - depth_y) < np.maximum(t, t_rel * z))  # the same surface
    cell_u, cell_v = ((c + 0.5) * (n / size) for c, size in ((u, W_y), (v, H_y)))
    j = np.minimum(cell_v.astype(np.intp), n - 1) * n + np.minimum(cell_u.astype(np.intp), n - 1)

    M = np.bincount(i_inside[consistent] * P + j[consistent], minlength=P * P).reshape(P, P)
    pixels, with_depth = np.bincount(i.ravel(), minlength=P), np.bincount(i[valid], minlength=P)
    M = M / np.maximum(with_depth, 1)[:, None]
    M[with_depth < 0.25 * pixels] = 0.0  # not in the paper: too little depth to trust
    return M


def correspondence(x, y, n, t=0.05, t_rel=0.05, stride=4):
    """Symmetric patch correspondence S (P, P) in [0, 1]; arguments as in directional_overlap."""
    M_xy = directional_overlap(x, y, n, t, t_rel, stride)
    M_yx = directional_overlap(y, x, n, t, t_rel, stride)
    return (M_xy + M_yx.T) / 2  # Eq. 1


# ------------------------------------------------------------------- poses and actions, appendix B

AIM_MIN = 0.05  # metres; a nearer target is not aimed at                       # not in the paper
STEEP = math.radians(80)  # a steeper target is reached by move_up/down         # not in the paper


def relative_pose(cam2world_i, cam2world_j):
    """Camera j in camera i's frame, (4, 4): translation = where j stands, columns = j's axes."""
    return np.linalg.inv(cam2world_i) @ cam2world_j


def actions_from_pose(pose):
    """The teacher's plan for a relative pose: aim at the target, move there, turn to its gaze.

    pose (4, 4): relative_pose(i, j). Returns one-key dicts, whole degrees and centimetres, zeros
    left out, e.g. [{"turn_right_deg": 30}, {"move_forward_m": 1.4}]. Each turn is about the
    camera's own axes as the actions before it left them. The gaze is planned from the *rounded*
    aim, so rounding does not add up. Roll about the gaze has no action: see residual_roll. (B.3)
    """
    x, y, z = pose[:3, 3]
    distance, level = math.hypot(x, y, z), math.hypot(x, z)
    right = up = forward = rise = 0.0
    if distance >= AIM_MIN:
        steep = math.atan2(abs(y), level) > STEEP
        if not steep or level >= AIM_MIN:
            right = round(math.degrees(math.atan2(x, z)))
        if steep:
            forward, rise = (level if level >= AIM_MIN else 0.0), -y
        else:
            up = round(math.degrees(math.atan2(-y, level)))
            forward = distance
    aim = pose_from_actions([{"turn_right_deg": right}, {"turn_up_deg": up}])
    gaze = aim[:3, :3].T @ pose[:3, 2]  # in the frame that the aim left behind
    gaze_right = round(math.degrees(math.atan2(gaze[0], gaze[2])))
    gaze_up = round(math.degrees(math.atan2(-gaze[1], math.hypot(gaze[0], gaze[2]))))

    plan = [("turn_right_deg", right), ("turn_up_deg", up), ("move_forward_m", forward),
            ("move_up_m", rise), ("turn_right_deg", gaze_right), ("turn_up_deg", gaze_up)]
    opposite = {"turn_right_deg": "turn_left_deg", "turn_up_deg": "turn_down_deg",
                "move_up_m": "move_down_m"}
    plan = [(name, round(float(amount), 2) if name.endswith("_m") else amount)
            for name, amount in plan]
    return [{name if amount > 0 else opposite[name]: abs(amount)} for name, amount in plan
            if amount]


ACTIONS = {  # atomic action -> what it does, and in which direction (B.3; backward is read only)
    "turn_right_deg": ("turn right", 1), "turn_left_deg": ("turn right", -1),
    "turn_up_deg": ("turn up", 1), "turn_down_deg": ("turn up", -1),
    "move_forward_m": ("move forward", 1), "move_backward_m": ("move forward", -1),
    "move_up_m": ("move up", 1), "move_down_m": ("move up", -1)}


def read_actions(actions):
    """A plan as [(what, signed amount)], what as in ACTIONS, degrees or metres.

    Raises ValueError, naming it, on what is no one-key dict of a known action and a finite number.
    """
    steps = []
    for action in actions:
        if not isinstance(action, dict) or len(action) != 1:
            raise ValueError(f"an action is a dict with one key, got {action!r:.80}")
        ((name, amount),) = action.items()
        if name not in ACTIONS:
            raise ValueError(f"unknown action {name!r:.80}")
        if type(amount) not in (int, float) or not abs(amount) < 1e300:  # NaN fails this, too
            raise ValueError(f"{name} needs a finite number")
        what, sign = ACTIONS[name]
        steps.append((what, sign * float(amount)))
    return steps


def pose_from_actions(actions):
    """The relative pose (4, 4) that a plan leads to; inverts actions_from_pose up to rounding and
    roll. actions: one-key dicts, see ACTIONS. Raises ValueError on anything else (read_actions)."""
    x, y, z = np.eye(3)  # the camera's own axes, and where it is, in the frame it started from
    place = np.zeros(3)
    for what, amount in read_actions(actions):
        if what == "move forward":
            place = place + amount * z
        elif what == "move up":
            place = place - amount * y  # y points down
        else:
            c, s = math.cos(math.radians(amount)), math.sin(math.radians(amount))
            if what == "turn right":
                x, z = c * x - s * z, s * x + c * z
            else:
                y, z = c * y + s * z, c * z - s * y
    pose = np.eye(4)
    pose[:3] = np.array([x, y, z, place]).T
    return pose


def pose_error(pose_a, pose_b):
    """Translation error in metres and rotation error in degrees between two poses (4, 4)."""
    d_t = math.hypot(*(pose_a[:3, 3] - pose_b[:3, 3]))
    # chord = 2 sqrt(2) sin(angle / 2) keeps its precision at small angles, where the arc cosine of
    # the trace loses half of it
    chord = math.sqrt(np.square(pose_a[:3, :3] - pose_b[:3, :3]).sum())
    d_r = math.degrees(2 * math.asin(min(chord / math.sqrt(8), 1.0)))
    return d_t, d_r  # Eq. 9


def residual_roll(pose):
    """Signed roll in degrees about the gaze that the plan of actions_from_pose(pose) leaves out."""
    rest = pose_from_actions(actions_from_pose(pose))[:3, :3].T @ pose[:3, :3]
    return math.degrees(math.atan2(rest[1, 0] - rest[0, 1], rest[0, 0] + rest[1, 1]))


# ------------------------------------------------------------------------- SPAR-7M-RGBD on disk

MULTI_VIEW_TASKS = (  # two or three still images of one scene: what HATCH trains on
    "camera_motion_infer", "depth_prediction_oc_mv", "depth_prediction_oo_mv",
    "distance_infer_center_oc_mv", "distance_infer_center_oo_mv", "distance_prediction_oc_mv",
    "distance_prediction_oo_mv", "obj_spatial_relation_oc_mv", "obj_spatial_relation_oo_mv",
    "position_matching", "spatial_imagination_map_mv", "spatial_imagination_oc_mv",
    "spatial_imagination_oo_mv", "view_change_infer",
    "camera_turn")  # the rooms' own                                            # not in the paper

MARKER_RGB = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0),
              "yellow": (255, 255, 0)}
MARKER_ORDER = {  # which colour each entry of point_img_idx / bbox_img_idx speaks of; no others
    **dict.fromkeys(("camera_motion_infer", "view_change_infer", "distance_infer_center_oc",
                     "distance_infer_center_oc_mv"), ()),
    "distance_infer_center_oo_mv": ("red", "green", "blue"),
    "spatial_imagination_oc_mv": ("green", "blue", "red"),
    "spatial_imagination_oo_mv": ("green", "blue", "red", "yellow")}


@dataclass
class Sample:
    """One question of SPAR-7M about 1..N views of a scene. Reads pixels only when asked to.

    task: e.g. "view_change_infer"; kind: "select", "fill", "sentence" or "judge", the folder's
    name; question: without <image> tags; images, depths: paths; markers: the record's point and
    box fields. What cannot be used raises DataError naming the file.
    """

    id: str
    source: str
    task: str
    kind: str
    question: str
    answer: str
    images: list
    depths: list
    markers: dict = field(repr=False)

    def views(self):
        """All views, in the question's order."""
        return [self.view(k) for k in range(len(self.images))]

    def view(self, k):
        """View k as it was taken, without markers."""
        image_path, depth_path = self.images[k], self.depths[k]
        image, raw = np.asarray(open_image(image_path)), np.asarray(_load_image(depth_path))
        if raw.ndim != 2 or raw.dtype.kind not in "iu" or raw.dtype == np.uint8:
            raise DataError(f"{depth_path}: a depth map is a 16-bit one-channel png in "
                            f"millimetres, this one is {raw.dtype} {raw.shape}")
        if not (raw > 0).any():
            raise DataError(f"{depth_path}: no pixel has depth")
        (H, W), (H_i, W_i) = raw.shape, image.shape[:2]
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
        folder = {"video_color": "video_pose"}.get(image_path.parent.name, "pose")
        pose_path = image_path.parent.parent / folder / f"{image_path.stem}.txt"
        cam2world = _read_matrix(pose_path, rows=(4,))
        if self.source == "structured3d":
            cam2world[:3, 3] /= 1000  # the one source whose poses are in millimetres
        R = cam2world[:3, :3]
        if abs(R.T @ R - np.eye(3)).max() > 0.01 or abs(cam2world[3] - (0, 0, 0, 1)).max() > 1e-6:
            raise DataError(f"{pose_path}: not a rigid pose: a rotation and, below, 0 0 0 1")
        return cam2world

    def pictures(self):
        """The images as the question speaks of them: PIL, with the coloured points and boxes drawn.

        Points are discs of radius 20 and boxes outlines 20 wide and 17.5 larger on each side, in
        pixels of SPAR's originals (1280 wide and more); smaller images get proportionally smaller
        marks. Tasks that keep their markers in lists (spatial_imagination_map_mv and videos, no
        select or fill questions among the former) are shown as they are.
        """
        pictures = [open_image(path) for path in self.images]
        try:
            for shape in ("bbox", "point"):
                order = MARKER_ORDER.get(self.task, tuple(MARKER_RGB))
                present = [colour for colour in order if self.markers.get(f"{colour}_{shape}")]
                index = (self.markers.get(f"{shape}_img_idx") or [[0]])[0] or [0]
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
    """A read-only list of Sample that holds a byte offset a line; a line is parsed when indexed.

    files: paths of jsonl files, <source>/qa_jsonl/<split>/<task>/<kind>/<any>.jsonl below root.
    """

    def __init__(self, root, files):
        self.root, self.files = root, files
        size = sum(path.stat().st_size for path in files)
        shown = progress(files, len(files), "indexing") if size > 2**30 else files
        offsets = [_line_offsets(path) for path in shown]
        self.offset = np.concatenate([np.zeros(0, np.int64), *offsets])
        self.ends = np.cumsum([len(o) for o in offsets])  # samples up to and with each file

    def __len__(self):
        return len(self.offset)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        path = self.files[int(np.searchsorted(self.ends, index, side="right"))]
        with open(path, "rb") as file:
            file.seek(self.offset[index])
            line = file.readline()
        try:
            return _parse_record(line, self.root, path)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            with open(path, "rb") as file:
                number = file.read(int(self.offset[index])).count(b"\n") + 1
            raise DataError(f"{path}, line {number}: not a SPAR record "
                            f"({type(error).__name__}: {error})") from None


def _parse_record(line, root, path):
    """One line of annotations -> Sample; ValueError, KeyError, ... if it is none."""
    record, (source, *_, task, kind, _) = json.loads(line), path.relative_to(root).parts
    said = {"human": [], "gpt": []}
    for turn in record["conversations"]:
        if turn["from"] != "system":
            who = {"user": "human", "assistant": "gpt"}.get(turn["from"], turn["from"])
            said[who].append(turn["value"].strip())
    if [len(texts) for texts in said.values()] != [1, 1]:
        raise ValueError("conversations must be one question (human) and one answer (gpt)")
    (question,), (answer,) = said.values()
    images = [record["image"]] if isinstance(record["image"], str) else list(record["image"])
    depths = record.get("depth") or [_depth_name(name) for name in images]
    depths = [depths] if isinstance(depths, str) else list(depths)
    if len(depths) != len(images) or not images:
        raise ValueError(f"{len(images)} images and {len(depths)} depth maps")
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
                        "--data takes the folder that holds scannet/, ...")
    found = sorted(root.glob(f"*/qa_jsonl/{split}/*/*/*.jsonl"))
    samples = Samples(root, [path for path in found if path.parts[-2] in kinds and (
        tasks is None or path.parts[-3] in tasks)])
    if not len(samples):
        there = ", ".join(sorted({"/".join(path.parts[-3:-1]) for path in found})) or "nothing"
        raise DataError(f"{root}: no sample in */qa_jsonl/{split}/<task>/<kind>/*.jsonl with kind "
                        f"in {list(kinds)} and task in {'any' if tasks is None else list(tasks)}; "
                        f"found there: {there}")
    return samples


def _line_offsets(path, block=1 << 24):
    """Byte offset of each line of a file that is not blank, (lines,) int64; streams the file."""
    starts, position = [np.zeros(1, np.int64)], 0
    with open(path, "rb") as file:
        while chunk := file.read(block):
            starts.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + position + 1)
            position += len(chunk)
    starts = np.concatenate(starts)
    lengths = np.diff(starts, append=position)
    return starts[lengths > 2]  # "{}" and a line end is the shortest record; the rest is blank


def fingerprint(files):
    """What tells sets of files apart, wherever they lie: a checksum of their names and contents."""
    total = 0
    for path in sorted(files):
        total = zlib.crc32(path.name.encode(), total)
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                total = zlib.crc32(chunk, total)
    return f"{total:08x}"


def _depth_name(image_name):
    folder = str(image_name).replace("image_color", "image_depth")
    folder = folder.replace("video_color", "video_depth")
    return str(Path(folder).with_suffix(".png"))


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
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
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
    """Intrinsics (3, 3) for a depth map of `size` (W, H), whichever grid the file speaks of.

    ScanNet++ states the colour camera's for its small depth maps. Where depth and picture have one
    size, K is theirs if its principal point lies in the middle 80 % of it. Else K's grid is the one
    whose centre is near the principal point: the depth's, the picture's, or a larger one of their
    shape, which K itself tells, 2 c + 1. Raises DataError if none of these can be.
    """
    size, image_size, centre = np.array(size), np.array(image_size), 2 * K[:2, 2] + 1
    near = 0.8 if (size == image_size).all() else 0.2
    grids = [grid for grid, share in ((size, near), (image_size, 0.2))
             if np.all(np.abs(centre / grid - 1) < share)]
    if not grids and np.all(centre > np.maximum(size, image_size)) and (
            abs(centre[0] / centre[1] * size[1] / size[0] - 1) < 0.2):
        grids = [centre]
    if not grids or min(K[0, 0], K[1, 1]) <= 0 or tuple(K[2, :3]) != (0, 0, 1):
        raise DataError(f"{path}: fx {K[0, 0]:g}, fy {K[1, 1]:g}, cx {K[0, 2]:g}, cy {K[1, 2]:g}, "
                        f"last row {K[2, :3]}: not intrinsics of a depth map of {size[0]}x{size[1]}"
                        f" or a picture of {image_size[0]}x{image_size[1]} pixels")
    scale, K = size / grids[0], K[:3, :3].copy()
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
        grow, (x1, x2), (y1, y2) = unit * 7 / 8, sorted(xy[::2]), sorted(xy[1::2])
        draw.rectangle([x1 - grow, y1 - grow, x2 + grow, y2 + grow], outline=rgb,
                       width=max(1, round(unit)))


# ---------------------------------------------------------------- walking through a data set


def held_out(images):
    """Whether frames, paths, are kept from training where the data has no val split.

    One frame in ten is, by a hash of its name, and with it each pair and sample that it stands in.
    """
    return any(zlib.crc32("/".join(path.parts[-3:]).encode()) % 10 == 0 for path in images)


class Walk:
    """The way through a data set: what is drawn and in which order, what is held out.

    samples: all of the train split; drawn: indices of those to train on; own_val: whether there is
    a val split. Where there is none, drawn leaves out what is held_out. The order is a function of
    seed and position alone, so a resumed run goes on where it stopped. What cannot be used is named
    once, left out, and kept in `skipped`.
    """

    def __init__(self, root, count, seed, tasks=MULTI_VIEW_TASKS):
        self.samples, self.seed, self.skipped = load_samples(root, "train", tasks), seed, set()
        try:
            self.val, self.own_val = load_samples(root, "val", tasks), True
        except DataError:
            self.val, self.own_val = self.samples, False
        shuffled = np.random.default_rng([seed, 0]).permutation(len(self.samples))[:count]
        self.drawn = [int(k) for k in shuffled if self.own_val or self.attempt(
            lambda sample: not held_out(sample.images), self.samples, int(k))[1]]
        if not self.drawn or next(self.heldout(), None) is None:
            raise DataError(f"{root}: too few samples to train on some and hold out others; add "
                            "samples, or a val folder beside train")

    def attempt(self, prepare, samples, k):
        """(name, prepare(samples[k])), with None in its place if that raises DataError."""
        name = f"sample {k}"
        try:
            name = samples[k].id
            return name, prepare(samples[k])
        except DataError as error:
            if str(error) not in self.skipped:
                self.skipped.add(str(error))
                print(f"skipped {error}", flush=True)
            return name, None

    def at(self, position):
        """Index of the sample at a position of training: the drawn ones, shuffled each epoch."""
        epoch, place = divmod(position, len(self.drawn))
        order = np.random.default_rng([self.seed, 1, epoch]).permutation(len(self.drawn))
        return self.drawn[order[place]]

    def batches(self, prepare, start, steps, batch, rank, world, workers):
        """Yield the [(name, prepare(sample) or None), ...] of process `rank` of `world`, a step at
        a time from step `start` on, read ahead; every world-th sample of a batch is its own."""
        positions = (step * batch + k for step in range(start, steps)
                     for k in range(rank, batch, world))
        ready = read_ahead(lambda position: self.attempt(prepare, self.samples, self.at(position)),
                           positions, workers)
        for _ in range(start, steps):
            yield [next(ready) for _ in range(rank, batch, world)]

    def heldout(self):
        """Yield the samples to evaluate on, in random order."""
        for k in np.random.default_rng(0).permutation(len(self.val)):
            sample = self.attempt(lambda sample: sample, self.val, int(k))[1]
            if sample and (self.own_val or held_out(sample.images)):
                yield sample

    def prepared(self, prepare, samples, workers):
        """Yield prepare(sample) of each of `samples` that can be used, read ahead."""
        ready = read_ahead(partial(self.attempt, prepare, samples), range(len(samples)), workers)
        yield from (its for _, its in ready if its is not None)


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

    pairs: [(View x, View y, S), ...]. Wrong units, directions or axes leave few pairs with overlap;
    only pairs whose cameras stand apart tell, since a turn on the spot hides most mistakes.
    """
    depth = float(np.median([np.median(v.depth[v.depth > 0]) for x, y, _ in pairs for v in (x, y)]))
    apart = [S.max() for x, y, S in pairs
             if math.dist(x.cam2world[:3, 3], y.cam2world[:3, 3]) > AIM_MIN]
    empty = sum(most == 0 for most in apart)
    line = (f"median depth {depth:.2f} m; of {len(pairs)} pairs of views {len(apart)} stand apart, "
            f"{empty} of these without overlap")
    odd = not 0.2 <= depth <= 50 or empty > EMPTY_SHARE * len(apart)
    return line, (
        "this looks wrong: is depth in millimetres (16 bit), are poses camera-to-world in metres "
        "with OpenCV axes (x right, y down, z forward), and intrinsics those of the depth map or "
        "the picture?" if odd else None)


EMPTY_SHARE = 0.25  # of pairs that stand apart; in SPAR's samples views see common things
# ------------------------------------------------------- rendered rooms: the inverse of unproject

SOLID_RGB = {"red": (200, 35, 35), "green": (40, 150, 55), "blue": (40, 70, 200),
             "yellow": (235, 205, 40), "orange": (240, 130, 25), "purple": (125, 50, 160),
             "pink": (245, 150, 190), "cyan": (50, 200, 210), "brown": (115, 70, 35),
             "black": (30, 30, 35)}
ROOM_VERSION = 1  # of what render_rooms writes; raise it when that changes: old rooms are redone


@dataclass
class Solid:
    """A coloured solid on the floor: "box", "ball", "pillar"; centre and half extents in metres."""

    shape: str
    colour: str
    centre: np.ndarray  # (3,)
    half: np.ndarray  # (3,); a ball's are its radius, a pillar's first two are
    angle: float  # about the vertical, radians

    @property
    def name(self):
        return f"{self.colour} {self.shape}"


@dataclass
class Room:
    """A box-shaped room (world z up, a corner at the origin) with papered walls, and its solids."""

    size: np.ndarray  # (3,) metres
    paper: list  # of 6 dicts, a pattern a face: x=0, x=max, y=0, y=max, floor, ceiling
    solids: list


def make_room(rng):
    """A random room: 3.6-6.5 m a side, 4-8 solids of different colours that do not touch."""
    size = np.array([rng.uniform(3.6, 6.5), rng.uniform(3.6, 6.5), rng.uniform(2.4, 3.0)])
    hue = rng.uniform()
    paper = []
    for face in range(6):
        tint = hue + face * 0.25 + rng.uniform(-0.08, 0.08)  # neighbouring walls differ in colour
        light = (0.55, 0.9) if face < 4 else ((0.3, 0.6) if face == 4 else (0.85, 0.95))
        colours = [_tint(tint + shift, rng.uniform(0.25, 0.75) if face < 5 else 0.08,
                         rng.uniform(*light)) for shift in (0.0, 0.1, 0.5)]
        paper.append({"colours": np.array(colours), "pattern": int(rng.integers(4)),
                      "angle": rng.uniform(0, np.pi), "period": rng.uniform(0.35, 0.9),
                      "phase": rng.uniform(0, 2 * np.pi, 2),
                      "picture": _make_picture(rng, size, face)})
    solids, count = [], int(rng.integers(4, 9))
    colours = list(rng.permutation(list(SOLID_RGB)))
    for _ in range(200):
        shape = str(rng.choice(["box", "ball", "pillar"]))
        half = rng.uniform(0.15, 0.45, 3)
        if shape != "box":
            half[1] = half[0]
            half[2] = half[0] if shape == "ball" else rng.uniform(0.3, 0.7)
        reach = float(np.hypot(half[0], half[1])) if shape == "box" else half[0]
        spot = rng.uniform(reach + 0.05, size[:2] - reach - 0.05)
        if all(np.hypot(*(spot - s.centre[:2])) > reach + np.hypot(*s.half[:2]) + 0.1
               for s in solids):
            solids.append(Solid(shape, str(colours.pop()), np.array([*spot, half[2]]), half,
                                rng.uniform(0, np.pi / 2)))
        if len(solids) == count:
            break
    return Room(size, paper, solids)


def _make_picture(rng, size, face):
    """A framed picture on a wall: centre, half size (metres along the wall and up), two colours."""
    along = size[1] if face < 2 else size[0]
    half = np.array([rng.uniform(0.25, 0.6), rng.uniform(0.2, 0.45)])
    centre = np.array([rng.uniform(half[0] + 0.1, along - half[0] - 0.1), rng.uniform(1.1, 1.7)])
    return {"centre": centre, "half": half if face < 4 else np.zeros(2),
            "colours": np.array([_tint(rng.uniform(), 0.8, 0.85), _tint(rng.uniform(), 0.7, 0.5)])}


def _tint(hue, saturation, value):
    """HSV, each 0..1 (hue cyclic), to RGB 0..255."""
    k = (np.array([5.0, 3.0, 1.0]) + hue % 1.0 * 6) % 6
    return 255 * value * (1 - saturation * np.clip(np.minimum(k, 4 - k), 0, 1))


def look(position, heading, elevation):
    """cam2world (4, 4) of a camera without roll in a z-up world; heading from x to y, radians."""
    ch, sh, ce, se = math.cos(heading), math.sin(heading), math.cos(elevation), math.sin(elevation)
    forward, right = np.array([ch * ce, sh * ce, se]), np.array([sh, -ch, 0.0])
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    pose[:3, 3] = position
    return pose


def cast(room, K, cam2world, width, height):
    """Ray casting. Returns depth (H, W) metres, surface (H, W) (0..5 the faces, 6.. the solids) and
    points_world (H, W, 3).

    Rays have length 1 along the optical axis, so the ray parameter of a hit is its z-depth, and
    origin + depth * ray is what unproject(depth) gives back.
    """
    u, v = np.arange(width), np.arange(height)
    rays = np.stack(np.broadcast_arrays((u[None, :] - K[0, 2]) / K[0, 0],
                                        (v[:, None] - K[1, 2]) / K[1, 1], 1.0), axis=-1)
    rays = (rays @ cam2world[:3, :3].T).astype(np.float32)
    origin = cam2world[:3, 3].astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        reach = (np.where(rays > 0, room.size.astype(np.float32), 0) - origin) / rays
        reach[rays == 0] = np.inf  # along that axis a level ray reaches nothing
        axis = reach.argmin(-1)
        depth = reach.min(-1)
        surface = 2 * axis + (np.take_along_axis(rays, axis[..., None], -1)[..., 0] > 0)
        for number, solid in enumerate(room.solids):
            hit = _HIT[solid.shape](solid, origin, rays)
            closer = hit < depth
            depth, surface = np.where(closer, hit, depth), np.where(closer, 6 + number, surface)
    return depth, surface, origin + depth[..., None] * rays


def _hit_box(solid, origin, rays):
    """Depth (H, W) at which rays (H, W, 3) enter an upright box, inf for a miss."""
    c, s = np.float32(math.cos(solid.angle)), np.float32(math.sin(solid.angle))
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]], np.float32)  # box axes as columns
    half, local = solid.half.astype(np.float32), (origin - solid.centre.astype(np.float32)) @ turn
    rays = rays @ turn
    a, b = (-half - local) / rays, (half - local) / rays
    enter, leave = np.minimum(a, b).max(-1), np.maximum(a, b).min(-1)
    return np.where((enter < leave) & (enter > 0), enter, np.inf)


def _hit_ball(solid, origin, rays):
    away = origin - solid.centre.astype(np.float32)
    return _first_root((rays * rays).sum(-1), rays @ away, away @ away - solid.half[0] ** 2)


def _hit_pillar(solid, origin, rays):
    away, r = (origin - solid.centre.astype(np.float32)), solid.half[0]
    flat = rays[..., :2]
    side = _first_root((flat * flat).sum(-1), flat @ away[:2], away[:2] @ away[:2] - r**2)
    side = np.where(np.abs(away[2] + side * rays[..., 2]) <= solid.half[2], side, np.inf)
    top = (solid.half[2] - away[2]) / rays[..., 2]
    on_top = (top > 0) & (((away[:2] + top[..., None] * flat) ** 2).sum(-1) <= r**2)
    return np.minimum(side, np.where(on_top, top, np.inf))


def _first_root(a, b, c):
    """Smaller root of a t^2 + 2 b t + c = 0 where it is positive, else inf."""
    square = b * b - a * c
    t = (-b - np.sqrt(np.maximum(square, 0))) / a
    return np.where((square > 0) & (t > 0), t, np.inf)


_HIT = {"box": _hit_box, "ball": _hit_ball, "pillar": _hit_pillar}


def paint(room, surface, points_world, rng):
    """Colours (H, W, 3) uint8 of the surfaces cast found: paper, paint, a lamp, sensor noise."""
    rgb = np.empty(points_world.shape, np.float32)
    for number in np.unique(surface):
        here = surface == number
        p = points_world[here]  # (pixels, 3)
        if number < 6:
            rgb[here] = _paper(room.paper[number], p[:, [k for k in range(3) if k != number // 2]])
        else:
            solid = room.solids[number - 6]
            light = 0.8 + 0.25 * (_normals(solid, p) @ (0.5, 0.3, 0.8))
            band = 0.12 * np.tanh(3 * np.sin(14 * p[:, 2]))
            rgb[here] = np.array(SOLID_RGB[solid.colour]) * (light + band)[:, None]
    lamp = np.array([room.size[0] / 2, room.size[1] / 2, room.size[2]])
    fall = ((points_world - lamp) ** 2).sum(-1)
    rgb *= (0.55 + 0.6 / (1 + 0.15 * fall))[..., None]
    rgb += rng.normal(0, 2.0, rgb.shape)
    return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)


def _normals(solid, points_world):
    """Outward unit normals (pixels, 3) at points on a solid."""
    c, s = math.cos(solid.angle), math.sin(solid.angle)
    axes = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) if solid.shape == "box" else np.eye(3)
    out = (points_world - solid.centre) @ axes / solid.half
    if solid.shape == "box":
        out = np.sign(out) * (np.abs(out) == np.abs(out).max(-1, keepdims=True))
    elif solid.shape == "pillar":
        on_top = out[:, 2:] > 0.999
        out = np.where(on_top, (0, 0, 1), out * (1, 1, 0))
    return out @ axes.T


def _paper(paper, st):
    """Colour (pixels, 3) of a papered face at st (pixels, 2) metres along it and up."""
    wave = 2 * np.pi / paper["period"]
    c, s = math.cos(paper["angle"]), math.sin(paper["angle"])
    a = wave * (st[:, 0] * c + st[:, 1] * s) + paper["phase"][0]
    b = wave * (st[:, 1] * c - st[:, 0] * s) + paper["phase"][1]
    value = (np.sin(a), np.sin(a) * np.sin(b), np.sin(a + 1.5 * np.sin(b)),
             np.sin(a) + np.sin(b) - 1)
    mix = 0.5 + 0.5 * np.tanh(3 * value[paper["pattern"]])[:, None]  # soft edges: no aliasing
    drift = 0.5 + 0.5 * np.sin(0.9 * st[:, :1] + paper["phase"][0])  # no two places quite alike
    base, accent, far = paper["colours"]
    colour = (1 - 0.45 * mix) * ((1 - drift) * base + drift * far) + 0.45 * mix * accent
    picture = paper["picture"]
    inner = np.abs(st - picture["centre"]) / np.maximum(picture["half"], 1e-6)  # 1 at its edge
    framed = inner.max(-1) < 1
    motif = np.where((inner**2).sum(-1)[:, None] < 0.4,
                     picture["colours"][0], picture["colours"][1])
    motif = np.where(inner.max(-1)[:, None] > 0.85, 40.0, motif)
    return np.where(framed[:, None], motif, colour)


def _pick_cameras(room, rng, size):
    """K (3, 3) and three cam2world whose views share 20-80 % of each other's pixels, both ways."""
    f = size / 2 / math.tan(math.radians(rng.uniform(62, 84)) / 2)
    K = np.array([[f, 0, (size - 1) / 2 + rng.uniform(-4, 4)],
                  [0, f, (size - 1) / 2 + rng.uniform(-4, 4)], [0, 0, 1]])
    small = 32
    K_small = K * [[small / size], [small / size], [1]]
    for _ in range(100):
        views = []
        for _ in range(30):
            position = np.array([*rng.uniform(0.4, room.size[:2] - 0.4), rng.uniform(1.2, 1.7)])
            if any(np.hypot(*(position - s.centre)[:2]) < np.hypot(*s.half[:2]) + 0.3
                   for s in room.solids):
                continue
            towards = rng.uniform(0.3, 0.7, 2) * room.size[:2] - position[:2]
            cam2world = look(position, math.atan2(towards[1], towards[0]) + rng.normal(0, 0.25),
                             math.radians(rng.uniform(-22, 0)))
            depth, _, _ = cast(room, K_small, cam2world, small, small)
            view = View(np.zeros((1, 1, 3), np.uint8), depth, K_small, cam2world)
            shares = [directional_overlap(a, b, 1, stride=1)[0, 0]
                      for other in views for a, b in ((view, other), (other, view))]
            if all(0.2 <= share <= 0.8 for share in shares):
                views.append(view)
            if len(views) == 3:
                return K, [view.cam2world for view in views]
    raise DataError("no three overlapping views found in a room")  # never seen in 10,000 rooms


def render_rooms(root, rooms=300, seed=0, size=224, held_out=0.1):
    """Write `rooms` rendered rooms as a SPAR-7M-RGBD tree and a benchmark with SPAR-Bench's fields.

        root/rooms/images/<room>/{image_color,image_depth,pose,intrinsic}/...  3 views a room
        root/rooms/qa_jsonl/{train,val}/<task>/<kind>/<kind>_<N>.jsonl         the last 10 % are val
        root/benchmark/rooms.jsonl, root/benchmark/images/                     val, markers drawn

    Deterministic by seed. Rendered once: a finished tree with the same arguments is left alone, an
    interrupted one is redone. Returns root.
    """
    root = Path(root)
    stamp = {"rooms": rooms, "seed": seed, "size": size, "held_out": held_out,
             "version": ROOM_VERSION}
    done = root / "rooms.json"
    if done.exists() and json.loads(done.read_text()) == stamp:
        return root
    if root.exists() and not done.exists():
        raise DataError(f"{root}: exists, and is not a tree of rendered rooms; "
                        "remove it or name another folder")
    partial = root.with_name(root.name + ".partial")
    if partial.exists():
        print(f"{partial}: an interrupted rendering, starting over")
        shutil.rmtree(partial)
    partial.mkdir(parents=True)

    lines = {}  # (split, task, kind) -> records
    first_val = rooms - round(rooms * held_out)
    pool = ThreadPoolExecutor(os.cpu_count())  # numpy and Pillow release the lock
    try:
        jobs = pool.map(lambda number: _render_room(partial, number, seed, size), range(rooms))
        for number, records in enumerate(progress(jobs, rooms, "rendering rooms")):
            split = "train" if number < first_val else "val"
            for task, kind, record in records:
                lines.setdefault((split, task, kind), []).append(json.dumps(record))
    finally:
        pool.shutdown(cancel_futures=True)
    for (split, task, kind), records in lines.items():
        folder = partial / "rooms" / "qa_jsonl" / split / task / kind
        folder.mkdir(parents=True)
        (folder / f"{kind}_{len(records)}.jsonl").write_text("\n".join(records) + "\n")
    if first_val < rooms:
        _write_benchmark(partial)
    (partial / "rooms.json").write_text(json.dumps(stamp))
    if root.exists():
        shutil.rmtree(root)  # rooms of other arguments, as their stamp said
    partial.rename(root)
    return root


def _render_room(root, number, seed, size):
    """Render and write one room; return its questions as (task, kind, SPAR record)."""
    rng = np.random.default_rng([seed, number])
    while True:
        room = make_room(rng)
        K, poses = _pick_cameras(room, rng, size)
        shots = [cast(room, K, pose, size, size) for pose in poses]
        if all(_visible(shots[k][1], room) for k in range(3)):
            break
    name = f"room_{number:05d}"
    scene = root / "rooms" / "images" / name
    for folder in ("image_color", "image_depth", "pose", "intrinsic"):
        (scene / folder).mkdir(parents=True)
    K4 = np.eye(4)
    K4[:3, :3] = K
    for camera in ("color", "depth"):
        np.savetxt(scene / "intrinsic" / f"intrinsic_{camera}.txt", K4, fmt="%.6f")
    for k, (depth, surface, points_world) in enumerate(shots):
        picture = paint(room, surface, points_world, rng)
        Image.fromarray(picture).save(scene / "image_color" / f"{k}.jpg", quality=92)
        Image.fromarray(np.rint(depth * 1000).astype(np.uint16)).save(
            scene / "image_depth" / f"{k}.png", compress_level=1)
        np.savetxt(scene / "pose" / f"{k}.txt", poses[k], fmt="%.8f")
    return Questions(name, room, K, poses, shots, rng).records


def _visible(surface, room, pixels=150):
    """Numbers of the solids that show on at least `pixels` pixels and do not touch the border."""
    border = np.concatenate([surface[0], surface[-1], surface[:, 0], surface[:, -1]])
    counts = np.bincount(surface.ravel(), minlength=6 + len(room.solids))
    return [k for k in range(len(room.solids)) if counts[6 + k] >= pixels and 6 + k not in border]


class Questions:
    """Questions on three views of a room, with exact answers: `records`, (task, kind, SPAR record).

    room, K, poses (3 of cam2world) and shots (3 of what cast returns) say everything there is to
    know. A question whose answer would be nearly undecided is left out.
    """

    def __init__(self, scene, room, K, poses, shots, rng):
        self.scene, self.room, self.K, self.poses = scene, room, K, poses
        self.shots, self.rng = shots, rng
        self.size = shots[0][0].shape[0]
        self.names = [solid.name for solid in room.solids]
        self.seen = [_visible(surface, room) for _, surface, _ in shots]
        self.records = []
        for ask in (self.depth, self.distance, self.view_change, self.position, self.camera_motion,
                    self.side_of_camera, self.nearest, self.single_depth, self.single_relation):
            a, b = (int(k) for k in rng.permutation(3)[:2])  # two of the views, in either order
            ask(a, b, int(rng.choice(self.seen[a])), int(rng.choice(self.seen[b])))

    # each asks about views a and b; red is a solid seen in a, blue one seen in b

    def depth(self, a, b, red, blue):
        (red_uv, red_depth, _), (blue_uv, blue_depth, _) = self.point(a, red), self.point(b, blue)
        self.fill("depth_prediction_oc_mv", (0, 1, 2),
                  f"The {self.names[red]} (red point, image {a + 1}) is {red_depth:.1f} meters "
                  f"deep in its image. How deep is the {self.names[blue]} (blue point, image "
                  f"{b + 1}) in its image, in meters? Give one number.", f"{blue_depth:.1f}",
                  red_point=[red_uv], blue_point=[blue_uv], point_img_idx=[[a, b]])

    def distance(self, a, b, red, blue):
        (red_uv, _, red_point), (blue_uv, _, blue_point) = self.point(a, red), self.point(b, blue)
        if red != blue:
            self.fill("distance_prediction_oo_mv", (0, 1, 2),
                      f"How far is the {self.names[red]} (red point, image {a + 1}) from the "
                      f"{self.names[blue]} (blue point, image {b + 1}), in meters? "
                      "Give one number.", f"{np.linalg.norm(red_point - blue_point):.1f}",
                      red_point=[red_uv], blue_point=[blue_uv], point_img_idx=[[a, b]])

    def view_change(self, a, b, red, blue):
        pose = relative_pose(self.poses[a], self.poses[b])
        x, y, z = pose[:3, 3]
        right = round(math.degrees(math.atan2(pose[0, 2], pose[2, 2])))  # where b looks, seen by a
        up = round(math.degrees(math.asin(np.clip(-pose[1, 2], -1, 1))))
        parts = (("move", "right" if x >= 0 else "left", f"{abs(x):.1f}"),
                 ("move", "down" if y >= 0 else "up", f"{abs(y):.1f}"),
                 ("move", "forward" if z >= 0 else "backward", f"{abs(z):.1f}"),
                 ("rotate", "up" if up >= 0 else "down", abs(up)),
                 ("rotate", "right" if right >= 0 else "left", abs(right)))
        self.fill("view_change_infer", (a, b),
                  "How did the camera get from the first image to the second? Answer in meters and "
                  "degrees as move_<right_or_left>:x,move_<down_or_up>:x,"
                  "move_<forward_or_backward>:x,rotate_<down_or_up>:x,rotate_<right_or_left>:x.",
                  ",".join(f"{verb}_{way}:{amount}" for verb, way, amount in parts))

    def position(self, a, b, red, blue):
        if red not in self.seen[b]:
            return
        gold, write = self.box(b, red), "({},{},{},{})".format
        question = (f"The {self.names[red]} is in the red box of the first image. What is its "
                    "bounding box in the second image, as x1,y1,x2,y2 from 0 to 1000?")
        marks = {"red_bbox": [self.box(a, red)], "bbox_img_idx": [[0]]}
        self.fill("position_matching", (a, b), question, write(*gold), **marks)
        w, h = gold[2] - gold[0], gold[3] - gold[1]
        corners = [(int(self.rng.integers(0, 1001 - w)), int(self.rng.integers(0, 1001 - h)))
                   for _ in range(3)]  # boxes of its size
        if all(abs(x - gold[0]) + abs(y - gold[1]) > 100 for x, y in corners):  # all elsewhere
            self.select("position_matching", (a, b), question, write(*gold),
                        [write(x, y, x + w, y + h) for x, y in corners], **marks)

    def camera_motion(self, a, b, red, blue):
        for first, second in ((a, b), (b, a)):  # does one of the two see the place of the other?
            uv, depth = project(self.poses[second][:3, 3], self.K, self.poses[first])
            x, y = (int(np.clip(round((c + 0.5) / self.size * 1000), -9999, 9999)) for c in uv)
            if depth > 0.3 and 0 <= x <= 1000 and 0 <= y <= 1000:
                question = ("Where in the first image is the camera of the second image? Answer "
                            "with its position from 0 to 1000 and its depth in meters.")
                self.fill("camera_motion_infer", (first, second), f"{question} Write (x,y),depth.",
                          f"({x},{y}),{depth:.1f}")
                wrong = [(*self.rng.integers(0, 1001, 2),
                          depth * self.rng.choice([0.5, 0.7, 1.4, 1.8])) for _ in range(3)]
                write = "Image Coor:({}, {}), Depth:{:.1f} meters".format
                self.select("camera_motion_infer", (first, second), question, write(x, y, depth),
                            [write(*option) for option in wrong])
                return

    def side_of_camera(self, a, b, red, blue):
        centre = self.room.solids[red].centre
        here, there = (np.linalg.norm(centre - self.poses[k][:3, 3]) for k in (a, b))
        x, y, _ = self.in_camera(b, red)
        self.select_words("obj_spatial_relation_oc_mv", (0, 1, 2),
                          f"The {self.names[red]} is in the red box of image {a + 1}. Seen by the "
                          f"camera of image {b + 1}, on which side of its optical axis is it, and "
                          "is it closer to that camera or farther than to the camera of image "
                          f"{a + 1}?", (x, y, there - here),
                          (_LEFT_RIGHT, _ABOVE_BELOW, _CLOSER_FARTHER),
                          red_bbox=[self.box(a, red)], bbox_img_idx=[[a]])

    def nearest(self, a, b, red, blue):
        others = sorted({solid for seen in self.seen for solid in seen} - {red})
        if len(others) < 2:
            return
        green, blue = (int(k) for k in self.rng.permutation(others)[:2])
        on = [next(int(k) for k in self.rng.permutation(3) if s in self.seen[k])
              for s in (red, green, blue)]
        far = [np.linalg.norm(self.room.solids[s].centre - self.room.solids[red].centre)
               for s in (green, blue)]
        if abs(far[0] - far[1]) > 0.3:
            options = [f"{self.names[green]} (green point)", f"{self.names[blue]} (blue point)"]
            near = int(far[1] < far[0])
            self.select("distance_infer_center_oo_mv", (0, 1, 2),
                        f"Whose center is nearer to the center of the {self.names[red]} "
                        "(red point)?", options[near], [options[1 - near]],
                        red_point=[self.point(on[0], red)[0]],
                        green_point=[self.point(on[1], green)[0]],
                        blue_point=[self.point(on[2], blue)[0]], point_img_idx=[on])

    def single_depth(self, a, b, red, blue):
        uv, depth, _ = self.point(a, red)
        self.fill("depth_prediction_oc", (a,),
                  f"How deep is the {self.names[red]} (red point) in the image, in meters? "
                  "Give one number.", f"{depth:.1f}", red_point=[uv])

    def single_relation(self, a, b, red, blue):
        if blue in self.seen[a] and blue != red:
            x, _, z = self.in_camera(a, red) - self.in_camera(a, blue)
            self.select_words("obj_spatial_relation_oo", (a,),
                              f"Where is the {self.names[red]} (red box) relative to the "
                              f"{self.names[blue]} (blue box), seen by the camera?",
                              (x, z), (_LEFT_RIGHT, _CLOSER_FARTHER), red_bbox=[self.box(a, red)],
                              blue_bbox=[self.box(a, blue)], bbox_img_idx=[[0, 0]])

    # what the questions are made of

    def point(self, k, solid):
        """A pixel in the middle of a solid in view k: [x, y] of 0..1000, depth, point_world."""
        depth, surface, points_world = self.shots[k]
        v, u = np.nonzero(surface == 6 + solid)
        middle = np.argmin((u - u.mean()) ** 2 + (v - v.mean()) ** 2)
        v, u = v[middle], u[middle]
        return ([round(float(c + 0.5) / self.size * 1000) for c in (u, v)],
                depth[v, u], points_world[v, u])

    def box(self, k, solid):
        """[x1, y1, x2, y2] of a solid in view k, 0..1000."""
        v, u = np.nonzero(self.shots[k][1] == 6 + solid)
        return [round(float(c) / self.size * 1000)
                for c in (u.min(), v.min(), u.max() + 1, v.max() + 1)]

    def in_camera(self, k, solid):
        """A solid's centre (3,) in the frame of camera k."""
        return (self.room.solids[solid].centre - self.poses[k][:3, 3]) @ self.poses[k][:3, :3]

    def fill(self, task, views, question, answer, kind="fill", **markers):
        image = [f"{self.scene}/image_color/{k}.jpg" for k in views]
        self.records.append((task, kind, {
            "id": f"{self.scene}_{len(self.records)}", "image": image,
            "depth": [_depth_name(name) for name in image],
            "conversations": [{"from": "human", "value": question},
                              {"from": "gpt", "value": answer}],
            "type": task, **markers}))

    def select(self, task, views, question, right, wrong, **markers):
        """The same with lettered options in random order; the answer is the letter of `right`."""
        order = self.rng.permutation(1 + len(wrong))
        listed = " ".join(f"{letter}. {(right, *wrong)[o]}" for letter, o in zip("ABCD", order))
        self.fill(task, views, f"{question} {listed}", "ABCD"[int(np.argmin(order))],
                  kind="select", **markers)

    def select_words(self, task, views, question, values, words, margin=0.15, **markers):
        """Options combine word pairs, e.g. "left, closer"; each value's sign chooses its word."""
        if min(abs(value) for value in values) >= margin:
            right = ", ".join(pair[int(value > 0)] for pair, value in zip(words, values))
            every = [", ".join(combination) for combination in itertools.product(*words)]
            wrong = [combination for combination in self.rng.permutation(every)
                     if combination != right][:3]
            self.select(task, views, question, right, wrong, **markers)


_LEFT_RIGHT, _ABOVE_BELOW = ("left", "right"), ("above", "below")
_CLOSER_FARTHER = ("closer", "farther")


def _write_benchmark(root):
    """SPAR-Bench's rows for the val rooms: its formats per task, pictures with markers drawn."""
    folder = root / "benchmark" / "images"
    folder.mkdir(parents=True)
    rows = []
    for sample in load_samples(root, split="val"):
        if sample.kind == "fill" and sample.task in ("position_matching", "camera_motion_infer"):
            continue  # SPAR-Bench asks these two as select only
        paths = [f"images/{len(rows)}_{k}.jpg" for k in range(len(sample.images))]
        for path, picture in zip(paths, sample.pictures()):
            picture.save(root / "benchmark" / path, quality=92)
        rows.append({"id": len(rows), "img_type": "multi_view" if len(paths) > 1 else "single_view",
                     "format_type": sample.kind, "task": sample.task, "source": sample.source,
                     "image": paths, "question": sample.question, "answer": sample.answer,
                     "pose": [sample.pose(k).flatten().tolist() for k in range(len(paths))]})
    text = "\n".join(json.dumps(row) for row in rows) + "\n"
    (root / "benchmark" / "rooms.jsonl").write_text(text)


def progress(items, total, label):
    """Yield items, showing a bar with time left: in place on a terminal, else a line a quarter."""
    start, shown, live = time.monotonic(), 0.0, sys.stdout.isatty()
    for done, item in enumerate(items, 1):
        yield item
        passed = time.monotonic() - start
        due = passed - shown > 0.2 if live else 4 * done // total > 4 * (done - 1) // total
        if due or done == total:
            shown = passed
            print(f"{label} [{'#' * (24 * done // total):24}] {done}/{total}  {passed:.0f} s, "
                  f"{passed * (total - done) / done:.0f} s left",
                  end="\r" if live and done < total else "\n", flush=True)
