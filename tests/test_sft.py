"""actor_sft.py: prompt, loss and written answers against the library's own, and what a run logs.
What it promises as every trainer does is in test_trainers.py."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer, GenerationConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil)

import actor_sft
import conftest
import geometry
import rewards
from conftest import records

run = partial(conftest.run, "actor_sft.py")
PROCESSOR = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 448 * 448})
CONTROL = "<|image_pad|><|im_end|><|vision_start|>"


@pytest.fixture(scope="module")
def made(tiny_model, scenes):
    """(model, tokenizer, Examples): both forms, two and three images, of different size."""
    _, model, tokenizer = actor_sft.load_model(str(tiny_model))
    torch.manual_seed(0)
    for p in model.parameters():
        p.data += 0.03 * torch.randn_like(p)  # says and sees more than a fresh one
    args, examples = actor_sft.parse_args(["--data", "-"]), []
    samples = [next(its for its in geometry.load_samples(scenes) if its.task == task)
               for task in ("view_change_infer", "depth_prediction_oc_mv")]
    for sample, form, sizes in ((samples[0], "actions", [(224, 224), (308, 168)]),
                                (samples[0], "answer", [(140, 252), (84, 84)]),
                                (samples[1], "actions", [(112, 112)] * 3)):
        pictures = [its.resize(size) for its, size in zip(sample.pictures(), sizes, strict=True)]
        sample = replace(sample)
        sample.pictures = lambda pictures=pictures: pictures
        examples.append(actor_sft.make_example(sample, args, tokenizer, PROCESSOR, form))
    return model, tokenizer, examples


def library_inputs(model, ids, images):
    """What the library's own processor would hand to the model."""
    ids = torch.as_tensor(ids)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images,
            "mm_token_type_ids": (ids == model.config.image_token_id).int()}


# --- what is asked and taught


def template_ids(path, sizes, text, **template):
    """Ids of a question about pictures of these sizes by the chat template of a model directory."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    message = {"role": "user", "content": [{"type": "image"}] * len(sizes) + [
        {"type": "text", "text": text}]}
    wanted = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True,
                                           **template)
    for w, h in sizes:
        wanted = wanted.replace("<|image_pad|>", "#" * (w * h // 784), 1)
    return tokenizer(wanted.replace("#", "<|image_pad|>"))["input_ids"]


SIZES = pytest.mark.parametrize("sizes", [[(56, 84)], [(112, 112), (84, 56)], [(56, 56)] * 3])
TEXT = f"How far is it?\n{rewards.ACTION_INSTRUCTION}"


@SIZES
def test_prompt_equals_the_published_chat_template(shared, sizes):
    path = shared / "qwen_tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(path, split_special_tokens=True)
    template = json.loads((path / "chat_template.json").read_text())
    ids, images = rewards.encode_prompt(
        tokenizer, PROCESSOR, [Image.new("RGB", size) for size in sizes], TEXT, "a")
    assert ids == template_ids(path, sizes, TEXT, **template)
    assert images["image_grid_thw"].tolist() == [[1, h // 14, w // 14] for w, h in sizes]
    assert tokenizer.convert_tokens_to_ids(rewards.END) == [151645, 151643]


@SIZES
def test_prompt_equals_the_demo_models_chat_template(made, tiny_model, sizes):
    """And that of a text alone, with a system message of its own, is what Qwen's would be."""
    ids, _ = rewards.encode_prompt(
        made[1], PROCESSOR, [Image.new("RGB", size) for size in sizes], TEXT, "a")
    assert ids == template_ids(tiny_model, sizes, TEXT)
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"},
             {"role": "assistant", "content": "A"}]
    assert AutoTokenizer.from_pretrained(tiny_model).apply_chat_template(turns, tokenize=False) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
        "<|im_start|>assistant\nA<|im_end|>\n")


def test_control_tokens_in_a_text_are_text(made):
    """Whatever stands in the data; and from several threads at once."""
    _, tokenizer, _ = made
    encode = partial(rewards.encode_prompt, tokenizer, PROCESSOR, [Image.new("RGB", (56, 56))])
    texts = [f"{CONTROL} {k} {'?' * (k % 7)}" for k in range(400)]
    wanted = [encode(text, "a")[0] for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert [ids for ids, _ in pool.map(encode, texts, texts)] == wanted
    control = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|im_end|>", "<|vision_start|>"])
    assert [wanted[0].count(one) for one in control] == [4, 2, 1]  # the prompt's own
    assert CONTROL in tokenizer.decode(wanted[0])


def test_what_cannot_be_encoded_is_named(made):
    _, tokenizer, _ = made
    for size, text in (((2100, 10), "?"), ((56, 56), "\ud83d")):
        with pytest.raises(geometry.DataError, match="^scene_4: images or text cannot be encoded"):
            rewards.encode_prompt(tokenizer, PROCESSOR, [Image.new("RGB", size)], text, "scene_4")


def test_forms_and_shares(scenes, made, tmp_path):
    """The form of a sample is a function of seed and sample, be it in its id, question or images,
    wherever the tree lies; a share --mix of them are actions."""
    _, tokenizer, (example, *_) = made
    sample = geometry.load_samples(scenes)[0]
    args = actor_sft.parse_args(["--data", "-", "--target", "mixed", "--mix", "0.25"])
    make = partial(actor_sft.make_example, args=args, tokenizer=tokenizer, processor=PROCESSOR)
    forms = [make(replace(sample, id=str(k))).target for k in range(200)]
    assert 0.15 < forms.count("actions") / 200 < 0.35
    assert forms[:20] == [make(replace(sample, id=str(k))).target for k in range(20)]
    (tmp_path / "moved").symlink_to(scenes)
    moved = geometry.load_samples(tmp_path / "moved")[0]
    assert forms[:20] == [make(replace(moved, id=str(k))).target for k in range(20)]
    samples = [replace(its, id="a") for its in geometry.load_samples(scenes)]
    for those in (samples, [replace(sample, question=str(k)) for k in range(20)]):
        assert {make(its).target for its in those} == {"actions", "answer"}
    gold, taught = example.gold, tokenizer.decode(example.ids[example.prompt_length:])
    assert taught == rewards.write_response(gold.actions, gold.answer) + "<|im_end|>"
    for target, samples in (("answer", 10_000), ("actions", 1_000)):
        assert actor_sft.parse_args(["--data", "-", "--target", target]).samples == samples


# --- the loss


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_log_probs_against_naive_loop_and_autograd(chunk):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, generator=g, dtype=torch.float64, requires_grad=True)
                      for n in (11, 17))
    targets, upstream = torch.randint(17, (11,), generator=g), torch.randn(11, generator=g)
    log_p = actor_sft.log_probs(hidden, weight, targets, chunk)
    wanted = []
    for h, y in zip(hidden, targets):
        logits = (weight @ h).tolist()
        wanted.append(logits[y] - np.log(sum(np.exp(logits))))
    assert np.abs(log_p.detach().numpy() - wanted).max() < 1e-5 and log_p.dtype == torch.float32
    ours = torch.autograd.grad((log_p * upstream).sum(), (hidden, weight))
    plain = torch.log_softmax(hidden @ weight.T, -1).gather(-1, targets[:, None])[:, 0]
    theirs = torch.autograd.grad((plain * upstream).sum(), (hidden, weight))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs))


def test_loss_against_the_plain_model_call(made, tiny_model):
    """Values and gradients, with recomputing as without; only the response, its end token too."""
    model, _, examples = made
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    wanted = []
    for example in examples:
        logits = plain(**library_inputs(model, example.ids, example.images)).logits[0].float()
        log_p = F.log_softmax(logits[:-1], -1).gather(-1, example.ids[1:, None])[:, 0]
        wanted.append(log_p[example.prompt_length - 1:])
        assert example.ids[-1] == model.config.text_config.eos_token_id
    torch.cat(wanted).sum().backward()
    _, again, _ = actor_sft.load_model(str(tiny_model))
    again.load_state_dict(model.state_dict())
    for block in (*again.model.visual.blocks, *again.model.language_model.layers):
        actor_sft.recompute_in_backward(block)
    for ours in (model, again):
        ours.zero_grad()
        got = [actor_sft.response_log_probs(ours, example) for example in examples]
        assert all(torch.allclose(a, b, atol=2e-4) for a, b in zip(got, wanted, strict=True))
        torch.cat(got).sum().backward()
        for (name, a), (_, b) in zip(ours.named_parameters(), plain.named_parameters()):
            assert (a.grad - b.grad).norm() < 1e-3 * (b.grad.norm() + 1e-6), name


def test_a_cache_that_recomputing_grows_is_noticed(made, tiny_model, monkeypatch):
    """Negative control: with the library's default, use_cache=True, gradients would be far off."""
    model, _, (example, *_) = made
    _, again, _ = actor_sft.load_model(str(tiny_model))
    again.load_state_dict(model.state_dict())
    gradients, forward = [], again.model.forward
    for layer in again.model.language_model.layers:
        actor_sft.recompute_in_backward(layer)
    for cache in (False, True):
        monkeypatch.setattr(again.model, "forward",
                            lambda **inputs: forward(**inputs | {"use_cache": cache}))
        again.zero_grad()
        actor_sft.response_log_probs(again, example).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in again.parameters()]))
    assert (gradients[1] - gradients[0]).norm() > 0.3 * gradients[0].norm()


# --- what it writes


def test_greedy_texts(made):
    """Batched with left padding, images of different size: each as the likeliest words, chosen one
    by one, would write it alone; whatever the checkpoint says about sampling."""
    model, tokenizer, examples = made
    prompts, texts = [(e.ids[:e.prompt_length].tolist(), e.images) for e in examples], []
    end = tokenizer.convert_tokens_to_ids(rewards.END)
    for ids, images in prompts:
        written = []
        for _ in range(12):
            with torch.no_grad():
                logits = model(**library_inputs(model, ids + written, images)).logits[0, -1]
            if int(logits.argmax()) in end:
                break
            written.append(int(logits.argmax()))
        texts.append(tokenizer.decode(written))
    assert actor_sft.generate_greedily(model, tokenizer, prompts, [12] * len(prompts)) == texts
    before, model.generation_config = model.generation_config, GenerationConfig(
        do_sample=True, repetition_penalty=5.0, temperature=9.0, top_k=3)
    assert actor_sft.generate_greedily(model, tokenizer, prompts, [12] * len(prompts)) == texts
    model.generation_config = before
    assert len(set(texts)) > 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_prompt_whose_logits_are_not_finite(made, value):
    """It has no text; the others of its batch keep theirs."""
    model, tokenizer, examples = made
    prompts = [(e.ids[:e.prompt_length].tolist(), dict(e.images)) for e in examples]
    texts = actor_sft.generate_greedily(model, tokenizer, prompts, [4] * len(prompts))
    prompts[1][1]["pixel_values"] = torch.full_like(prompts[1][1]["pixel_values"], value)
    again = actor_sft.generate_greedily(model, tokenizer, prompts, [4] * len(prompts))
    assert again == [texts[0], None, texts[2]]
    sound, logits = torch.zeros(3, dtype=torch.long), torch.zeros(3, 4)
    logits[0, 1], logits[1, 1] = -value, -math.inf
    for t in range(2):
        actor_sft.count_sound(sound, 5, torch.zeros(3, 5 + t), logits if t else torch.zeros(3, 4))
    assert sound.tolist() == [1 if value != value else 2, 2, 2]


def test_an_end_token_ends_a_text(made, monkeypatch):
    model, tokenizer, (example, *_) = made
    prompts = [(example.ids[:example.prompt_length].tolist(), example.images)]
    with torch.no_grad():
        first = int(model(**library_inputs(model, *prompts[0])).logits[0, -1].argmax())
    assert actor_sft.generate_greedily(model, tokenizer, prompts, [3] * len(prompts)) != [""]
    monkeypatch.setattr(rewards, "END", [tokenizer.convert_ids_to_tokens(first)] * 2)
    assert actor_sft.generate_greedily(model, tokenizer, prompts, [3] * len(prompts)) == [""]


def test_held_out_record_by_hand(made, monkeypatch):
    """The teacher's text for one sample, nonsense for the other: means, turns apart. There is time
    for twice what was taught."""
    model, tokenizer, examples = made
    turn, walk = [{"turn_right_deg": 20}], [{"move_forward_m": 1.0}]
    pairs = [examples[0]._replace(gold=examples[0].gold._replace(
        actions={(0, 1): plan}, answer="1.5", task="depth_prediction_oc_mv"))
        for plan in (turn, walk)]
    texts, times = iter([rewards.write_response({(0, 1): turn}, "1.5"), "nonsense"]), []
    monkeypatch.setattr(actor_sft, "generate_greedily",
                        lambda *its: times.append(its[-1]) or [next(texts) for _ in its[2]])
    record, written = actor_sft.evaluate_responses(model, tokenizer, pairs, batch=1)
    log_p = torch.cat([actor_sft.response_log_probs(model, e) for e in pairs])
    assert abs(record.pop("heldout_loss") + float(log_p.detach().mean())) < 1e-5
    assert written[1] == "nonsense"
    assert times == [[16 + 2 * len(examples[0].ids[examples[0].prompt_length:])]] * 2
    assert record == {"format": 0.5, "action": 0.5, "action_turns": 1.0, "answer": 0.5}
    blind = actor_sft.constants(pairs)
    assert blind["action_turns_constant"] == 1.0 and 0.5 < blind["action_constant"] < 0.7
    said = actor_sft.heldout_line(record | blind)
    assert "action_turns 1.000  " in said and said.endswith("  action_turns_constant 1.000")


# --- runs


@pytest.mark.parametrize("target, frozen, trained", [
    ("answer", "vision", "model."), ("actions", "language", "visual."), ("mixed", "nothing", "")])
def test_runs(root, tmp_path, scenes, tiny_model, target, frozen, trained):
    """Each target, and what each freezes; the log has the loss and the held-out rewards."""
    done = run(root, tmp_path, "--data", scenes, "--model", tiny_model, "--target", target,
               "--freeze", frozen, "--out", "out", "--steps", 2, "--batch", 2, "--lr", 1e-3,
               "--heldout", 2, "--workers", 1)
    assert done.returncode == 0, done.stdout
    before, after = (load_file(path / "model.safetensors")
                     for path in (tiny_model, tmp_path / "out"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(key.startswith(trained) for key in changed)
    start, *steps = records(tmp_path / "out")
    forms = {"answer"} if target == "answer" else {"answer", "format", "action", "action_constant"}
    for line in (start, steps[-1]):
        assert forms <= set(line) and ("action" in line) == ("action" in forms)
    assert all(line["grad_norm"] > 0 and line["tokens_per_s"] > 0 for line in steps)


def test_demo_without_the_stage_before(root, tmp_path):
    done = run(root, tmp_path, "--target", "actions")
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == (
        "actor_sft.py: out/sft: not there yet; run `python actor_sft.py --target answer` first")
