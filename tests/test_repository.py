"""The repository keeps its own rules: copies stay copies, equations are found, the README true."""

import ast
import re
import subprocess
import sys

import pytest

import geometry
import rewards
from conftest import python_blocks, run_block
from scenes import write_recordings, write_tum

SCRIPTS = ("pasta.py", "actor_sft.py", "actor_grpo.py", "evaluate.py")
EQUATIONS = {"geometry.py": {1, 9}, "pasta.py": {2, 3, 4, 5},
             "rewards.py": {6, 7, 8, 10, 11, 12}}


def sources(root):
    return {path.name: path.read_text() for path in sorted(root.glob("*.py"))}


def definitions(text):
    """Name -> source of each function and class at the top level."""
    tree = ast.parse(text)
    return {node.name: ast.get_source_segment(text, node) for node in tree.body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_same_name_same_source(root):
    """Plumbing is copied from script to script, and a copy that was changed alone is a defect."""
    seen = {}
    for name, text in sources(root).items():
        if name in SCRIPTS:
            for function, source in definitions(text).items():
                if function not in ("parse_args", "main"):
                    where, known = seen.setdefault(function, (name, source))
                    assert source == known, (
                        f"{function} differs between {where} and {name}: copy it, or rename it. "
                        "A fork that changes one trainer on purpose may delete this test")


def test_no_script_imports_another(root):
    for name, text in sources(root).items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [node.module] if isinstance(node, ast.ImportFrom) else [
                    alias.name for alias in node.names]
                assert not {f"{module}.py" for module in modules} & set(SCRIPTS), (
                    f"{name} imports {modules}")


def test_the_allocator_is_told_before_torch_is_imported(root):
    for name in SCRIPTS:
        text = (root / name).read_text()
        assert 0 < text.index('("PYTORCH_ALLOC_CONF"') < text.index("import torch\n")


def test_every_equation_is_tagged_once(root):
    found = {name: [int(k) for k in re.findall(r"# Eq\. (\d+)$", text, re.MULTILINE)]
             for name, text in sources(root).items()}
    every = [k for tags in found.values() for k in tags]
    assert len(every) == len(set(every)), found
    assert {name: set(tags) for name, tags in found.items() if tags} == EQUATIONS


def test_shared_files_need_no_torch(root):
    for name in ("geometry", "rewards"):
        if (root / f"{name}.py").exists():
            code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
            assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def pages(root):
    """README and the pages that it links, in one text."""
    return "\n".join(path.read_text() for path in [root / "README.md", *root.glob("docs/*.md")])


def commands(readme):
    """Command lines of the code blocks of a text, with continued lines joined."""
    blocks = [body for language, body in re.findall(r"```(\w*)\n(.*?)```", readme, re.DOTALL)
              if language == "bash"]
    text = "\n".join(blocks).replace("\\\n", " ")
    return [part.split("#")[0].strip() for line in text.splitlines() for part in line.split("&&")]


def test_commands_of_the_readme_exist(root):
    """Every script that README and docs run is there and knows every flag that they give it."""
    readme, ran = pages(root), 0
    for command in commands(readme):
        words = command.split()
        scripts = [word for word in words if word.endswith(".py")]
        if not scripts or words[0] not in ("python", "torchrun"):
            continue
        assert (root / scripts[0]).exists(), command
        text = (root / scripts[0]).read_text()
        for flag in re.findall(r"(?<=\s)--[a-z0-9-]+", command[command.index(scripts[0]):]):
            assert f'"{flag}"' in text, f"{command}: {scripts[0]} has no {flag}"
        ran += 1
    assert ran >= 4
    assert re.search(r"pip install [^\n]*-r requirements.txt && python pasta.py --grid 4", readme)
    assert re.search(r"pip install [^\n]*-r requirements.txt && python -m pytest", readme)


def test_links_lead_somewhere(root):
    """Every file that README or a page links is there, and every page is linked."""
    linked = set()
    for page in [root / "README.md", *sorted(root.glob("docs/*.md"))]:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" not in target:
                path = (page.parent / target).resolve()
                assert path.exists(), f"{page.name} links {target}, which is not there"
                linked.add(path)
    lost = {page.name for page in root.glob("docs/*.md") if page.resolve() not in linked}
    assert not lost, f"no page links {lost}"


@pytest.mark.parametrize("page, above, code", [
    pytest.param(*block, id=f"{block[0]}-{k}") for k, block in enumerate(python_blocks())])
def test_python_blocks_run(page, above, code, rooms, tmp_path):
    """Each Python block of README and docs, as it stands, where the demo has been run and the data
    lie that a block may name; only compiled if the line above it says "needs ... `pip install"."""
    compile(code, page, "exec")
    if re.search("needs .*`pip install", above):
        return
    (tmp_path / "out/demo").mkdir(parents=True)
    (tmp_path / "out/demo/data").symlink_to(rooms)
    write_recordings(tmp_path / "frames", sorted((rooms / "rooms/images").iterdir())[:2])
    write_tum(tmp_path / "rgbd_dataset_freiburg1_room")
    run_block(code, tmp_path)


def test_answers_by_example(root):
    """docs/data.md has each task with an answer that earns R_ans 1, by the metric of its row."""
    page = (root / "docs/data.md").read_text()
    shown = set()
    for tasks, kind, answer in re.findall(
            r"^\| (any|`.+?`) \| `(select|fill)` \| `(.+?)` \|", page, re.MULTILINE):
        for task in re.findall(r"`(\w+)`", tasks):
            assert rewards._metric_of(task, kind), f"{task}: appendix C.3 has no metric"
            assert rewards.answer_reward(answer, answer, task, kind) == 1, task
            shown.add(task)
    assert shown == set(geometry.MULTI_VIEW_TASKS)


def test_every_choice_that_the_paper_leaves_open_is_listed(root):
    """A tag names a row of the list, and each row is tagged where the choice is made; a tagged flag
    is in its row, so that it is found there."""
    rows = {}
    for line in (root / "docs/choices.md").read_text().splitlines():
        if line.startswith("| ") and not line.startswith("| name |"):
            rows[line.split("|")[1].strip()] = line
    tagged, flags = set(), 0
    for name, text in sources(root).items():
        for line in text.splitlines():
            if "not in the paper" not in line or 'tagged "not in the paper: NAME"' in line:
                continue
            tag = re.search(r"# not in the paper: (.+)$", line)
            assert tag and tag[1] in rows, f"{name}: {line.strip()}: no such row"
            tagged.add(tag[1])
            if flag := re.search(r'add_argument\("(--[a-z0-9-]+)"', line):
                assert f"`{flag[1]}`" in rows[tag[1]], f"{flag[1]} is not in row {tag[1]}"
                flags += 1
    assert tagged == rows.keys() and flags >= 20, (rows.keys() - tagged, flags)


def test_readme_maps_every_equation(root):
    readme = (root / "README.md").read_text()
    for tags in EQUATIONS.values():
        for k in tags:
            assert re.search(rf"\| {k} \|", readme), f"the README's map lacks Eq. {k}"


def sections(text):
    """Name -> number of lines of each part of a file, from its ruler to the next one."""
    lines = text.splitlines()
    starts = [k for k, line in enumerate(lines) if re.match(r"# -{20,} ", line)]
    ends = [*starts[1:], len(lines)]
    return {lines[start].strip("# -"): end - start for start, end in zip(starts, ends)}


def test_line_counts_of_the_reading_path(root):
    """README's path names parts of files by their rulers, and says how long they are."""
    readme = (root / "README.md").read_text()
    path = re.findall(r"^\| `(\w+\.py)`(: \*.+?\*)? \| ([\d,]+) \|", readme, re.MULTILINE)
    assert len(path) >= 6
    for name, parts, stated in path:
        text = (root / name).read_text()
        lines = len(text.splitlines())
        if parts:
            found = sections(text)
            lines = sum(found[part] for part in re.findall(r"\*(.+?)\*", parts))
        stated = int(stated.replace(",", ""))
        assert stated % 10 == 0 and abs(stated - lines) <= 0.1 * lines, (
            f"{name}{parts}: {lines} lines, README says {stated}")


def test_line_width(root):
    for path in [*root.glob("*.py"), *root.glob("tests/*.py")]:
        long = [k for k, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
        assert not long, f"{path.name}: lines longer than 100 characters: {long}"


def test_requirements_are_pinned(root):
    lines = (root / "requirements.txt").read_text().split()
    assert lines[0] == "torch==2.13.0" and all("==" in line for line in lines)
    assert {line.split("==")[0] for line in lines} == {
        "torch", "transformers", "safetensors", "numpy", "pillow", "pytest"}
