"""actor_sft.py: prompt, positions, loss and packing against the library's own; runs; bad input."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

import actor_sft
import conftest
import geometry
import rewards
from conftest import records

run = partial(conftest.run, "actor_sft.py")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def flags(rooms, tiny_model):
    return ["--data", rooms, "--model", tiny_model, "--heldout", 4, "--lr", 1e-3, "--fraction", 1,
            "--eval-every", 2]


@pytest.fixture(scope="module")
def made(tiny_model, rooms):
    """(model, examples, [Example, ...]): both forms, two and three images, of different size."""
    args = actor_sft.parse_args(["--target", "mixed"])
    model, tokenizer = actor_sft.load_model(tiny_model, args, CPU)
    examples = actor_sft.Examples(args, tokenizer)
    samples = geometry.load_samples(rooms, tasks=geometry.MULTI_VIEW_TASKS)
    pick = [next(s for s in samples if s.task == task) for task in (
        "view_change_infer", "depth_prediction_oc_mv", "position_matching")]
    resized = [Resized(pick[0], [(224, 224), (308, 168)]), Resized(pick[2], [(140, 252), (84, 84)])]
    return model, examples, [
        examples.make(pick[0], "actions"), examples.make(pick[1], "answer"),
        examples.make(pick[1], "actions"), examples.make(resized[0], "answer"),
        examples.make(resized[1], "actions")]


class Resized:
    """A sample whose pictures have other sizes."""

    def __init__(self, sample, sizes):
        self.sample, self.sizes = sample, sizes

    def __getattr__(self, name):
        return getattr(self.sample, name)

    def pictures(self):
        return [p.resize(size) for p, size in zip(self.sample.pictures(), self.sizes, strict=True)]


def library_inputs(model, example):
    """What the library's own processor would hand to the model."""
    grids = actor_sft.grids_of([example])
    ids = example.ids[None]
    return {"input_ids": ids, "pixel_values": example.patches, "image_grid_thw": grids,
            "mm_token_type_ids": (ids == model.config.image_token_id).int(),
            "attention_mask": torch.ones_like(ids)}


# --- prompt and positions


@pytest.mark.parametrize("images", [(6,), (4, 9), (1, 30, 2)])
def test_prompt_equals_the_published_chat_template(shared, images):
    tokenizer = AutoTokenizer.from_pretrained(shared / "qwen_tokenizer")
    template = json.loads((shared / "qwen_tokenizer/chat_template.json").read_text())
    text = f"How far is it?\n{rewards.ACTION_INSTRUCTION}"
    message = {"role": "user", "content": [{"type": "image"}] * len(images) + [
        {"type": "text", "text": text}]}
    wanted = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True,
                                           chat_template=template["chat_template"])
    parts = wanted.split("<|image_pad|>")
    wanted = parts[0] + "".join(
        "<|image_pad|>" * n + part for n, part in zip(images, parts[1:], strict=True))
    prompt = actor_sft.chat_prompt(text, images)
    assert prompt == wanted
    ids = tokenizer(prompt)["input_ids"]
    assert ids.count(151655) == sum(images) and ids[0] == 151644
    assert tokenizer.convert_tokens_to_ids(actor_sft.END) == [151645, 151643]


@pytest.mark.parametrize("sizes", [[], [(8, 8)], [(8, 8), (5, 13)], [(13, 5), (8, 8), (2, 3)]])
def test_positions_equal_the_librarys(made, sizes):
    model, examples, _ = made
    prompt = actor_sft.chat_prompt("How far?", [h * w for h, w in sizes])
    ids = torch.tensor(examples.tokenizer(f"{prompt}3.1<|im_end|>")["input_ids"])
    image = model.config.image_token_id
    wanted, _ = model.model.get_rope_index(
        ids[None], mm_token_type_ids=(ids[None] == image).int(),
        image_grid_thw=torch.tensor([(1, 2 * h, 2 * w) for h, w in sizes]) if sizes else None)
    assert torch.equal(actor_sft.rope_positions(ids, image, sizes), wanted[:, 0])


# --- the loss


def naive_log_probs(hidden, weight, targets):
    """log softmax of one token at a time, in float64."""
    out = []
    for h, y in zip(hidden.double(), targets):
        logits = [float(h @ w) for w in weight.double()]
        top = max(logits)
        out.append(logits[int(y)] - top - math.log(sum(math.exp(x - top) for x in logits)))
    return torch.tensor(out, dtype=torch.float64)


def test_log_probs_against_naive_loop_and_autograd():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(11, 6, generator=g), torch.randn(17, 6, generator=g)
    targets, upstream = torch.randint(17, (11,), generator=g), torch.randn(11, generator=g)
    results = []
    for chunk in (1, 4, 100):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        log_p, likeliest = actor_sft.TokenLogProbs.apply(h, w, targets, chunk)
        (log_p * upstream).sum().backward()
        results.append((log_p.detach(), h.grad, w.grad))
        assert torch.equal(likeliest, (hidden @ weight.T).argmax(-1) == targets)
    assert (results[0][0] - naive_log_probs(hidden, weight, targets)).abs().max() < 1e-5
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    log_p = torch.log_softmax(h @ w.T, -1).gather(-1, targets[:, None])[:, 0]
    (log_p * upstream).sum().backward()
    for result in results:
        for ours, theirs in zip(result, (log_p.detach(), h.grad, w.grad)):
            assert (ours - theirs).abs().max() < 1e-5


def test_loss_against_the_plain_model_call(made):
    """Packed rows: values and gradients of separate, unpacked calls with the library's positions,
    attention, image encoder and loss. Images of different size, in both orders."""
    model, _, examples = made
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(model.name_or_path)
    wanted, right = [], []
    for example in examples:
        logits = plain(**library_inputs(model, example)).logits[0].float()
        log_p = F.log_softmax(logits[:-1], -1).gather(-1, example.ids[1:, None])[:, 0]
        wanted.append(log_p[example.prompt - 1:])
        right.append((logits[:-1].argmax(-1) == example.ids[1:])[example.prompt - 1:])
    torch.cat(wanted).sum().backward()
    theirs = {name: p.grad for name, p in plain.named_parameters()}
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0]):
        for longest in (10_000, 900):  # all in one row; in several
            model.zero_grad()
            rows = actor_sft.pack(
                [examples[k] for k in order], model.config.image_token_id, longest)
            assert (len(rows) == 1) == (longest == 10_000)
            got = [actor_sft.response_log_probs(model, row, CPU) for row in rows]
            ours = torch.cat([log_p for log_p, _ in got])
            assert (ours - torch.cat([wanted[k] for k in order])).abs().max() < 2e-4
            assert torch.equal(torch.cat([l for _, l in got]), torch.cat([right[k] for k in order]))
            ours.sum().backward()
            for name, p in model.named_parameters():
                difference = (p.grad - theirs[name]).norm() / (theirs[name].norm() + 1e-6)
                assert difference < 1e-3, (name, float(difference))


def test_only_the_response_is_trained_its_end_token_too(made):
    """The loss sends no gradient to features that predict a token of a question."""
    model, _, examples = made
    (row,) = actor_sft.pack(examples, model.config.image_token_id, 10_000)
    kept = []
    hook = model.model.language_model.register_forward_hook(
        lambda *call: kept.append(call[2].last_hidden_state.requires_grad_()) or
        kept[0].retain_grad())
    log_p, _ = actor_sft.response_log_probs(model, row, CPU)
    hook.remove()
    log_p.sum().backward()
    predicts = kept[0].grad[0].norm(dim=-1) > 0  # (L,)
    wanted, ends, start = torch.zeros(len(row.ids), dtype=torch.bool), [], 0
    for example in examples:
        wanted[start + example.prompt - 1:start + len(example.ids) - 1] = True
        start += len(example.ids)
        ends.append(start - 1)
    assert torch.equal(predicts, wanted)
    end = model.config.text_config.eos_token_id
    assert all(row.ids[k] == end and row.trained[k] for k in ends)
    assert int(row.trained.sum()) == len(log_p) == int(wanted.sum())


def test_samples_of_a_row_do_not_see_each_other(made):
    """Another answer in the first sample of a row changes no log-probability of the second."""
    model, _, examples = made
    first, second = examples[0], examples[1]
    ids = first.ids.clone()
    ids[-5:-1] = ids[-6]
    for both in ((first, second), (first._replace(ids=ids), second)):
        (row,) = actor_sft.pack(both, model.config.image_token_id, 10_000)
        with torch.no_grad():
            log_p = actor_sft.response_log_probs(model, row, CPU)[0]
        tail = log_p[-(len(second.ids) - second.prompt):]
        if both[0] is first:
            before, whole = tail, log_p
    assert torch.equal(before, tail) and not torch.equal(whole, log_p)


def test_recomputing_changes_no_gradient(made, tiny_model):
    model, _, examples = made
    args = actor_sft.parse_args(["--data", "-"])
    assert not args.no_recompute
    other, _ = actor_sft.load_model(tiny_model, args, CPU)
    (row,) = actor_sft.pack(examples[:2], model.config.image_token_id, 10_000)
    for m in (model, other):
        m.zero_grad()
        actor_sft.response_log_probs(m, row, CPU)[0].sum().backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-5), name


# --- generation


def test_greedy_text_equals_the_librarys(made):
    """Batched with left padding, images of different size; each as `generate` writes it alone."""
    model, examples, some = made
    end = examples.tokenizer.convert_tokens_to_ids(actor_sft.END)
    for seed in range(2):  # a random model repeats itself; shake it a little
        torch.manual_seed(seed)
        shaken = Qwen2_5_VLForConditionalGeneration.from_pretrained(model.name_or_path)
        for p in shaken.parameters():
            p.data += 0.03 * torch.randn_like(p)
        ours = actor_sft.generate_greedily(shaken, some, end, 24, CPU)
        for example, tokens in zip(some, ours, strict=True):
            inputs = library_inputs(model, example._replace(ids=example.ids[:example.prompt]))
            theirs = shaken.generate(**inputs, do_sample=False, max_new_tokens=24,
                                     eos_token_id=end, pad_token_id=end[0])[0, example.prompt:]
            theirs = theirs.tolist()
            stop = next((k for k, token in enumerate(theirs) if token in end), len(theirs))
            assert tokens == theirs[:stop]
        assert len({tuple(t) for t in ours}) > 1


def test_generation_ends_at_the_end_token(made):
    """With the first written token called an end, nothing is left."""
    model, _, some = made
    first = actor_sft.generate_greedily(model, some[:1], [-1], 3, CPU)[0]
    assert len(first) == 3
    assert actor_sft.generate_greedily(model, some[:1], [first[0]], 3, CPU) == [[]]


def test_constant_plan():
    """Two golds that turn right by 30 and one that goes forward: the turn is the better bet."""
    turn, go = [{"turn_right_deg": 30}], [{"move_forward_m": 2.0}]
    golds = [rewards.Gold({(0, 1): plan}, "1", "", "fill", 2) for plan in (turn, go, turn)]
    score, plan = actor_sft.constant_plan(golds)
    assert plan == turn and abs(score - (2 + math.exp(-2 - 1)) / 3) < 1e-9


# --- samples


def test_forms_and_shares():
    args = actor_sft.parse_args(["--target", "mixed", "--mix", "0.25"])
    forms = [actor_sft.form_of(k, args) for k in range(2000)]
    assert 0.2 < forms.count("actions") / 2000 < 0.3
    assert forms == [actor_sft.form_of(k, args) for k in range(2000)]
    args = actor_sft.parse_args(["--target", "actions"])
    assert args.fraction == 0.6 and args.model == "out/sft" and args.out == "out/cold_start"
    assert actor_sft.parse_args(["--target", "actions", "--data", "-"]).fraction == 0.1


def test_nothing_held_out_is_trained_on(shared):
    samples = geometry.load_samples(shared / "spar", tasks=geometry.MULTI_VIEW_TASKS)
    args = actor_sft.parse_args(["--data", str(shared / "spar")])
    held = actor_sft.find_heldout(samples, False, args, None)
    kept = [samples[k] for k in actor_sft.choose_samples(samples, False, args, None)]
    frames = [{frozenset(s.images) for s in some} for some in (held, kept)]
    assert all(frames) and not frames[0] & frames[1]


def test_a_sample_that_is_too_long_is_named(made, rooms, capsys):
    _, examples, _ = made
    args = actor_sft.parse_args(["--target", "actions", "--max-tokens", "300"])
    short = actor_sft.Examples(args, examples.tokenizer)
    sample = geometry.load_samples(rooms, tasks=("view_change_infer",))[0]
    assert short.make(sample, "actions") is None and len(short.skipped) == 1
    assert f"skipped {sample.id} (view_change_infer): " in capsys.readouterr().out
    assert short.make(sample, "answer").form == "answer"


# --- runs


@pytest.fixture(scope="module")
def four_steps(root, tmp_path_factory, flags):
    """One uninterrupted run of four steps."""
    cwd = tmp_path_factory.mktemp("sft")
    done = run(root, cwd, *flags, "--target", "actions", "--batch", 2, "--steps", 4,
               "--out", "four", "--show", 1)
    assert done.returncode == 0, done.stdout
    return cwd / "four", done.stdout


def test_log_and_output(four_steps):
    out, text = four_steps
    lines = records(out)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert set(lines[1]) == {"step", "loss", "token_accuracy", "grad_norm", "update_norm",
                             "tokens_per_s"}
    for line in (lines[0], lines[2], lines[4]):
        assert {"heldout_loss", "format", "action", "answer"} <= set(line)
    assert lines[4]["heldout_loss"] < lines[0]["heldout_loss"] and lines[0]["action_constant"] > 0
    assert "trains  model.visual" in text and "trains  model.language_model" in text
    assert "image tokens]" in text and "|im_end|>|" in text and text.count("gold    <action>") > 1


def test_saved_model_is_an_ordinary_directory(four_steps, tiny_model):
    """Every key, the tokenizer, and the configuration that it started from."""
    out, _ = four_steps
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert len(AutoTokenizer.from_pretrained(out)) == model.config.text_config.vocab_size
    before, after = (json.loads((path / "config.json").read_text()) for path in (tiny_model, out))
    for part in ("text_config", "vision_config"):  # written with their dtype when loaded with one
        assert after[part].pop("dtype") == before["dtype"]
    assert before == after
    assert (out / "preprocessor_config.json").exists() and not (out / "incoming").exists()
    a, b = (load_file(path / "model.safetensors") for path in (tiny_model, out))
    assert set(a) == set(b) and all(not torch.equal(a[key], b[key]) for key in a
                                    if key.endswith(("proj.weight", "qkv.weight")))


def test_resume_is_exact(root, four_steps, flags, tmp_path):
    """2 + 2 steps equal 4, to the last bit, log included."""
    whole, _ = four_steps
    flags = [*flags, "--target", "actions", "--batch", 2, "--out", "half"]
    assert run(root, tmp_path, *flags, "--steps", 2).returncode == 0
    done = run(root, tmp_path, *flags, "--steps", 4, "--resume")
    assert done.returncode == 0, done.stdout
    for name in ("checkpoint.safetensors", "model.safetensors"):
        a, b = load_file(whole / name), load_file(tmp_path / "half" / name)
        assert set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)
    for a, b in zip(records(whole), records(tmp_path / "half"), strict=True):
        assert {k: v for k, v in a.items() if k != "tokens_per_s"} == {
            k: v for k, v in b.items() if k != "tokens_per_s"}


def test_two_processes_equal_one(root, flags, tmp_path):
    for out, processes in (("one", 1), ("two", 2)):
        done = run(root, tmp_path, *flags, "--target", "mixed", "--mix", 0.5, "--steps", 2,
                   "--batch", 2, "--out", out, processes=processes)
        assert done.returncode == 0, done.stdout
    for a, b in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        for key in ("loss", "grad_norm", "token_accuracy", "heldout_loss"):
            if key in a:
                assert abs(a[key] - b[key]) < 2e-3 * max(1, abs(a[key]))
    a, b = (load_file(tmp_path / out / "model.safetensors") for out in ("one", "two"))
    far = torch.cat([(a[key] - b[key]).abs().flatten() for key in a])
    # a step is 1e-3; Adam's first one is lr * sign, even where the gradient is almost 0
    assert float((far > 2e-4).float().mean()) < 1e-3


def test_signal_saves_and_resume_goes_on(root, flags, tmp_path):
    flags = [*flags, "--eval-every", 5000, "--out", "out"]
    process = subprocess.Popen(
        [sys.executable, str(root / "actor_sft.py"), *map(str, flags), "--steps", "5000"],
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log, deadline = tmp_path / "out/log.jsonl", time.time() + 120
    while time.time() < deadline and not (log.exists() and log.read_text().count("\n") > 4):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM and "--resume goes on" in text
    step = records(tmp_path / "out")[-1]["step"]
    done = run(root, tmp_path, *flags, "--steps", step + 1, "--resume")
    assert done.returncode == 0 and records(tmp_path / "out")[-1]["step"] == step + 1


@pytest.mark.parametrize("frozen, trained", [("vision", "model."), ("language", "visual.")])
def test_freeze(root, flags, tmp_path, tiny_model, frozen, trained):
    done = run(root, tmp_path, *flags, "--steps", 1, "--out", "out", "--freeze", frozen)
    assert done.returncode == 0, done.stdout
    before, after = (load_file(path / "model.safetensors")
                     for path in (tiny_model, tmp_path / "out"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(key.startswith(trained) for key in changed)
    assert f"frozen  model.{'visual' if frozen == 'vision' else 'language_model'}" in done.stdout


def test_offloading_changes_no_bit(root, flags, tmp_path):
    """16-bit working weights and fp32 ones elsewhere: on a CPU the same place, the same numbers."""
    for out, more in (("kept", []), ("off", ["--offload"])):
        done = run(root, tmp_path, *flags, "--steps", 2, "--out", out, "--precision", "bf16", *more)
        assert done.returncode == 0, done.stdout
        assert all(line["update_norm"] > 0 for line in records(tmp_path / out)[1:])
    a, b = (load_file(tmp_path / out / "model.safetensors") for out in ("kept", "off"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert {t.dtype for t in a.values()} == {torch.bfloat16}
    done = run(root, tmp_path, *flags, "--steps", 2, "--out", "x", "--offload")
    assert done.returncode == 1 and "--offload" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("target", ["answer", "actions"])
def test_real_frames(root, shared, tiny_model, tmp_path, target):
    done = run(root, tmp_path, "--target", target, "--data", shared / "spar", "--model", tiny_model,
               "--steps", 2, "--heldout", 3, "--fraction", 1, "--out", "out")
    assert done.returncode == 0, done.stdout
    assert "no val split: one in five" in done.stdout and records(tmp_path / "out")[-1]["step"] == 2


def test_unusable_samples_are_named_skipped_and_counted(root, flags, tmp_path, rooms):
    """A broken picture, and a pose of infinities; the run goes on."""
    shutil.copytree(rooms, tmp_path / "data")
    picture, *_ = sorted((tmp_path / "data").glob("rooms/images/*/image_color/0.jpg"))
    picture.write_bytes(picture.read_bytes()[:500])
    pose = sorted((tmp_path / "data").glob("rooms/images/*/pose/1.txt"))[1]
    pose.write_text("\n".join([" ".join(["-inf"] * 4)] * 4))
    done = run(root, tmp_path, *flags, "--data", "data", "--steps", 12, "--batch", 4,
               "--eval-every", 12, "--out", "out")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(f"skipped data/{picture.relative_to(tmp_path / 'data')}") == 1
    assert done.stdout.count(f"skipped data/{pose.relative_to(tmp_path / 'data')}") == 1
    assert "skipped 2 samples that cannot be used" in done.stdout


def test_non_finite_steps_are_left_out_and_end_the_run(root, flags, tmp_path, tiny_model):
    shutil.copytree(tiny_model, tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][0] = math.nan
    save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
    done = run(root, tmp_path, *flags, "--model", "model", "--steps", 20, "--out", "out")
    assert done.returncode == 1
    assert done.stdout.count("left out: loss nan") == 5 and "(room_0000" in done.stdout
    assert "five steps in a row were not finite" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("change, message", [
    (["--data", "nowhere"], "actor_sft.py: nowhere: no such directory"),
    (["--model", "nowhere"], "nowhere: no such model directory"),
    (["--model", "out/sft"], "out/sft: not there yet; run `python actor_sft.py --target answer`"),
    (["--resume"], "out/checkpoint.safetensors: cannot be read as a checkpoint"),
    (["--seed", "-1"], "--seed must be 0 or more, got -1"),
    (["--max-pixels", "0"], "--max-pixels must be 1 or more, got 0"),
    (["--fraction", "0"], "--fraction must be above 0 and at most 1, got 0.0"),
    (["--mix", "1.5"], "--mix must be above 0 and at most 1, got 1.5"),
    (["--max-tokens", "0"], "--max-tokens must be 1 or more, got 0"),
    (["--max-tokens", "50"], "none of the 4 held-out samples can be read"),
])
def test_bad_arguments(root, flags, tmp_path, change, message):
    done = run(root, tmp_path, *flags, "--steps", 2, "--out", "out", *change)
    assert done.returncode in (1, 2) and message in done.stdout


def test_errors_are_one_line(root, flags, tmp_path):
    """As a user sees them: what ends the process is its last line, and no traceback."""
    (tmp_path / "taken").write_text("a file")
    for change, message in ((["--out", "taken"], "File exists: 'taken'"),
                            (["--data", "nowhere"], "nowhere: no such directory")):
        done = run(root, tmp_path, *flags, "--steps", 2, *change, env=None)
        assert done.returncode == 1 and "Traceback" not in done.stdout
        assert done.stdout.splitlines()[-1].startswith("actor_sft.py: ")
        assert message in done.stdout.splitlines()[-1]


def test_demo_without_the_stage_before(root, tmp_path):
    done = run(root, tmp_path)
    assert done.returncode == 1 and (
        "out/pasta: not there yet; run `python pasta.py --grid 4` first" in done.stdout)


def test_models_that_cannot_be_read(tiny_model, tmp_path):
    args = actor_sft.parse_args([])
    shutil.copytree(tiny_model, tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({key: t for key, t in tensors.items() if key != name}, weights, {"format": "pt"})
    with pytest.raises(geometry.DataError, match="1 tensors are missing or have another shape"):
        actor_sft.load_model(tmp_path / "model", args, CPU)
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(geometry.DataError, match="cannot be read as a Qwen2.5-VL"):
        actor_sft.load_model(tmp_path / "model", args, CPU)
