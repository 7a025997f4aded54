"""
Every command and snippet of the documentation runs, as printed.

What stands for the user's files and for checkpoints lies under their names in the folder where it runs: real clips,
and tiny checkpoints that the original code wrote. Answers are cut short and trainings to a step.
"""

import importlib
import json
import os
import re
import shlex
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import typer
import yaml

from golden_utils import GOLDENS
from real_media import REAL, ffmpeg
from training_utils import make_folder
from videollama2_hf import VideoLlama2ForConditionalGeneration, VideoLlama2Processor, get_num_visual_tokens
from videollama2_hf.cli import app, main


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
AV = GOLDENS / "qwen2_siglip_beats_av"
VIDEO_LLAVA = GOLDENS / "video_llava"

# Pages that another file runs.
ELSEWHERE = {
    "serving.md": "test_serve.py",  # against a server that runs
    "explaining.md": "test_explaining.py",
    "differences.md": "test_readme.py",
    "training_data.md": "test_training_data.py",
}
# Commands, and snippets by a line of theirs, that do not run here, and why.
NOT_RUN = {
    "hf download *": "downloads 17 GB",
    "videollama2 doctor": "its exit code is about this machine; test_cli_doctor.py",
    "videollama2 convert * --reference *": "needs the original code; test_conversion_reference.py",
    "videollama2 web*": "runs until it is stopped; test_web.py",
    "torchrun *": "starts processes; test_training_distributed.py",
    "accelerate launch *": "starts processes; test_training_distributed.py",
    "python -m videollama2_hf.synthetic train *": "trains for hours; test_synthetic.py",
    "python -m videollama2_hf.synthetic export *": "of what that trains; test_synthetic.py",
    "python -m videollama2_hf.synthetic evaluate*": "takes minutes; test_small_model.py",
    "python -m videollama2_hf.synthetic example --search *": "asks about clip after clip; test_small_model.py",
    "python -m videollama2_hf.synthetic ablate *": "trains for hours; test_synthetic.py",
    "*DistributedConfig(fsdp_size=8)*": "needs 8 processes; test_training_distributed.py",
    "*quantization_config=get_quantization_config(*": "needs bitsandbytes",
    "*max_memory={0: *": "names a GPU",
    "*trust_remote_code=True*": "needs a process without this package; test_remote_code.py",
}
# What is made smaller.
SMALLER = {"num_workers=8": "num_workers=0", "--rows 1000": "--rows 3", "--rows 1024": "--rows 3"}
TRAINING = ["max_steps=1", "global_batch_size=1", "per_device_batch_size=1", "num_workers=0", "bf16=false"]


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of the fenced blocks in order, and of lines that are indented commands as `bash`."""
    found = [
        (match.start(), match[1], match[2])
        for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    ]
    for match in re.finditer(r"^    (videollama2 .*)$", text, flags=re.MULTILINE):
        if not any(start < match.start() < start + len(content) for start, _, content in found):
            found.append((match.start(), "bash", match[1]))
    return [(language, content) for _, language, content in sorted(found)]


def commands(text: str) -> list[list[str]]:
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def why_not(text: str) -> str | None:
    return next((pattern for pattern in NOT_RUN if fnmatch(text, pattern)), None)


RUN_HERE = [name for name, text in PAGES.items() if name not in ELSEWHERE and blocks(text)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the user of the documentation has: clips, rows of training data, checkpoints."""
    from test_conversion_video_llava import write_port

    folder = tmp_path_factory.mktemp("user")
    (folder / "holiday.mp4").write_bytes((GOLDENS / "processing_av" / "av_3s.mp4").read_bytes())
    (folder / "photo.jpg").write_bytes(REAL["lion.jpg"].read_bytes())
    ffmpeg("-i holiday.mp4 -an -c copy silent.mp4", folder)
    ffmpeg("-i holiday.mp4 -vn sound.wav", folder)
    ffmpeg("-stream_loop 39 -i holiday.mp4 -c copy lecture.mp4", folder)
    (folder / "clips").mkdir()
    for name, source in {"001.mp4": "holiday.mp4", "002.mp4": "silent.mp4", "003.jpg": "photo.jpg"}.items():
        (folder / "clips" / name).write_bytes((folder / source).read_bytes())

    (row,) = (json.loads(text) for language, text in blocks(PAGES["how_to/fine_tuning.md"]) if language == "json")
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "rows.json").write_text(json.dumps([row] * 2))

    links = {
        "DAMO-NLP-SG/VideoLLaMA2.1-7B-AV": AV / "checkpoint",
        "DAMO-NLP-SG/VideoLLaMA2-7B-Base": GOLDENS / "base_projector_only" / "checkpoint",
        "VideoLLaMA2.1-7B-AV": AV / "checkpoint",
        "checkpoint": AV / "checkpoint",
        "mistralai/Mistral-7B-Instruct-v0.2": GOLDENS / "lora" / "base_llm_mistral",
        "my-lora-run": GOLDENS / "lora" / "checkpoint-lora",
        "LanguageBind/Video-LLaVA-7B": VIDEO_LLAVA / "tiny-video-llava-7b",
        "LanguageBind/LanguageBind": VIDEO_LLAVA / "LanguageBind",  # found beside the checkpoint
        "LanguageBind/LanguageBind_Video_merge": VIDEO_LLAVA / "LanguageBind" / "LanguageBind_Video_merge",
        "BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2.pt": AV / "BEATs_tiny.pt",
    }
    for name, target in links.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(target)
    write_port(folder / "LanguageBind" / "Video-LLaVA-7B-hf")
    make_folder(folder / "my-stage-1", hears=False)
    return folder


@pytest.fixture
def here(folder, tmp_path, monkeypatch) -> Path:
    """A working folder with all of it, where answers are short."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    generate = VideoLlama2ForConditionalGeneration.generate

    def short(self, *args, max_new_tokens=4, **kwargs):
        return generate(self, *args, max_new_tokens=min(max_new_tokens, 4), **kwargs)

    monkeypatch.setattr(VideoLlama2ForConditionalGeneration, "generate", short)
    monkeypatch.setattr("typer.prompt", lambda *args, **kwargs: "/quit")
    return tmp_path


def prepare(page: str, names: dict) -> None:
    """What a page takes for granted."""
    if page == "training.md":
        from videollama2_hf.training import add_lora, get_lora_config

        model = VideoLlama2ForConditionalGeneration.from_pretrained("my-stage-1")
        add_lora(model, get_lora_config(model, r=2)).save_pretrained("my-adapter")
    if page == "training_distributed.md":
        Path("RECIPE.yaml").write_text(
            "{model: my-stage-1, data: rows.json, output_dir: trained, trainable: [mm_projector], "
            "learning_rate: 1.0e-3, global_batch_size: 1}"
        )
        names["model"] = VideoLlama2ForConditionalGeneration.from_pretrained("my-stage-1")
        names["processor"] = VideoLlama2Processor.from_pretrained("my-stage-1")


def run(words: list[str], monkeypatch) -> None:
    """One command, in this process."""
    if words[:2] == ["pip", "install"]:
        check_requirements(words[2:])
    elif words[0] == "export":
        monkeypatch.setenv(*words[1].split("=", 1))
    elif words[0] == "videollama2":
        assert words[1] not in ("serve", "web"), "runs until it is stopped: list it"
        if "fine-tuned" in words:
            VideoLlama2ForConditionalGeneration.from_pretrained("converted").save_pretrained("fine-tuned")
        if words[1] == "train" and "--estimate" not in words:
            values = [*TRAINING, *(["lora.r=2"] if words[2].endswith("lora") else [])]
            words = [*words, *(part for value in values for part in ("--set", value))]
        with pytest.raises(SystemExit) as end:
            main(words[1:])
        assert not end.value.code, shlex.join(words)
    else:
        assert words[:2] == ["python", "-m"], f"{shlex.join(words)!r} is neither run nor listed"
        importlib.import_module(f"{words[2]}.__main__").main(words[3:])


def check_requirements(names: list[str]) -> None:
    """They are this package with extras that it has, or among its dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dependencies = [re.match(r"[\w-]+", line)[0] for line in project["dependencies"]]
    for name in names:
        package, extra = re.match(r"([\w-]+)(?:\[(\w+)\])?", name).groups()
        assert package in (*dependencies, project["name"]) and (extra or "test") in project["optional-dependencies"]


@pytest.mark.parametrize("page", RUN_HERE)
def test_page_runs(page, here, monkeypatch, capsys):
    from videollama2_hf.training import Recipe

    names: dict = {}
    prepare(page, names)
    for language, text in blocks(PAGES[page]):
        for long, short in SMALLER.items():
            text = text.replace(long, short)
        if language == "bash":
            for words in commands(text):
                if not why_not(shlex.join(words)):
                    run(words, monkeypatch)
        elif language == "python":
            if not why_not(text):
                text = text.replace(
                    "openai/clip-vit-large-patch14-336",
                    f"{GOLDENS}/base_projector_only/checkpoint/vision/clip-vit-tiny-patch14-56",
                )
                exec(compile(text, page, "exec"), names)
        elif language == "yaml":
            Recipe.from_dict(yaml.safe_load(text))
        else:
            assert language == "json", f"There is no way to run {language} of {page}"


NOT_RUN_COMMANDS = [
    words
    for page in RUN_HERE
    for language, text in blocks(PAGES[page])
    if language == "bash"
    for words in commands(text)
    if why_not(shlex.join(words)) and words[0] != "hf"
]


@pytest.mark.parametrize("words", NOT_RUN_COMMANDS, ids=shlex.join)
def test_commands_that_do_not_run_here_are_understood(words, monkeypatch):
    """What launches them takes no option of theirs for one of its own, and they take what is left."""
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    if words[0] in ("torchrun", "accelerate"):
        parser, start = (get_args_parser(), 1) if words[0] == "torchrun" else (launch_command_parser(), 2)
        options = parser.parse_args(words[start:])
        assert options.module
        words = ["python", "-m", options.training_script, *options.training_script_args]
    if words[:3] == ["python", "-m", "videollama2_hf.training"]:
        words = ["videollama2", "train", *words[3:]]
    if words[0] == "videollama2":
        group = typer.main.get_command(app)
        group.commands[words[1]].make_context(words[1], words[2:])
    else:
        from videollama2_hf.synthetic import __main__ as synthetic

        assert words[:3] == ["python", "-m", "videollama2_hf.synthetic"]
        done = []
        monkeypatch.setattr(synthetic, f"_{words[3]}", done.append)
        synthetic.main(words[3:])
        assert len(done) == 1


def test_lists_are_of_what_there_is():
    texts = []
    for page in RUN_HERE:
        for language, content in blocks(PAGES[page]):
            texts += [content] if language == "python" else []
            texts += [shlex.join(words) for words in commands(content)] if language == "bash" else []
    for pattern, reason in NOT_RUN.items():
        assert any(fnmatch(text, pattern) for text in texts), pattern
        for name in re.findall(r"test_\w+\.py", reason):
            assert (ROOT / "tests" / name).exists(), name
    for page, test in ELSEWHERE.items():
        assert f'"{page}"' in (ROOT / "tests" / test).read_text()


def test_documented_checks_of_data(here, capsys):
    """The console sessions of training_data.md, with what they print."""
    media = [("image", "photo.jpg")] * 2 + [("video", "holiday.mp4")] * 4 + [("audio", "sound.wav")]
    rows: list[dict] = [{kind: file} for kind, file in media] + [{"id": "b3", "video": "clips/b3.mp4"}]
    for row in rows:
        question = {"from": "human", "value": f"<{list(row)[-1]}>\nWhat is it?"}
        row["conversations"] = [question, {"from": "gpt", "value": "A guitar."}]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for session in (text for language, text in blocks(PAGES["training_data.md"]) if language == "console"):
        command, *expected = session.removeprefix("$ ").splitlines()
        with pytest.raises(SystemExit) as end:
            main(shlex.split(command)[1:])
        printed = capsys.readouterr().out.replace(str(here), "/data").splitlines()
        if expected:
            assert printed == expected and end.value.code == 1
        else:
            assert not end.value.code and Path("row.png").stat().st_size > 1000


def test_table_of_tokens(monkeypatch):
    """docs/concepts/tokens.md against the formula and the shapes of the language models."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from true_shapes import MISTRAL_7B, MIXTRAL_8X7B, QWEN2_7B, QWEN2_72B, VIDEO_LLAVA

    models = {
        "VideoLLaMA2-7B": ("stc_connector", 24, MISTRAL_7B),
        "VideoLLaMA2-8x7B": ("stc_connector", 24, MIXTRAL_8X7B),
        "VideoLLaMA2-72B": ("stc_connector", 24, QWEN2_72B),
        "VideoLLaMA2.1-7B": ("stc_connector_v35", 27, QWEN2_7B),
        "Video-LLaVA-7B": ("frame_mlp2x_gelu", 16, VIDEO_LLAVA),
    }
    rows = [line for line in PAGES["concepts/tokens.md"].splitlines() if line.startswith("| Video")]
    assert len(rows) == 11
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        name = cells[0]
        connector, grid, text = next(value for key, value in models.items() if name.startswith(key))
        count = [
            get_num_visual_tokens(connector, n, grid, grid, int(connector == "frame_mlp2x_gelu")) for n in (8, 16, 32)
        ]
        head = text["hidden_size"] // text["num_attention_heads"]
        kib = 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * head * 2 / 1024
        if "×" in cells[1]:
            assert cells[1] == f"{grid} × {grid}" and [int(cell) for cell in cells[2:5]] == count
            assert int(cells[5]) == (256 if text is VIDEO_LLAVA else count["16F" in name or "2.1" in name])
        else:
            mib = [round(kib * n / 1024) for n in count]
            assert int(cells[2]) == kib and (f"{mib[1]}" in cells[3] or f"of 8 frames {mib[0]}" in cells[3])
            assert "AV" not in name or f"with its sound {round(kib * (count[1] + 1496) / 1024)}" in cells[3]
            sizes = re.findall(
                rf"`videollama2 convert \S+/{re.escape(cells[0].split(',')[0])} .*", PAGES["conversion.md"]
            )
            assert f"| {cells[1]} |" in sizes[0]


def test_table_of_media_reading():
    """docs/performance.md against what the benchmark wrote."""
    for row in json.loads((ROOT / "benchmarks" / "results" / "media.json").read_text())["rows"]:
        line = f"| {row['step']} | {row['reference']} | {row['ratio']:.3g} |"
        assert line in PAGES["performance.md"].splitlines(), line


def test_reference_is_of_public_names():
    """Every name of the reference is in the `__all__` of its module, and the packages' names are all there."""
    text = "\n".join(text for name, text in PAGES.items() if name.startswith("reference/"))
    documented = set()
    for path in re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE):
        module, name = path.rsplit(".", 1)
        assert name in importlib.import_module(module).__all__, path
        documented.add(name)
    for package, left_out in {
        "": set(),
        ".training": {"PARTS"},
        ".conversion": set(),
        ".serving": set(),
        ".synthetic": set(),
    }.items():
        names = set(importlib.import_module(f"videollama2_hf{package}").__all__) - left_out
        assert not names - documented, names - documented


def test_messages_of_this_package_are_quoted_as_they_are():
    """Those of docs/troubleshooting.md that people search for; strings of the source are joined."""
    page = " ".join(PAGES["troubleshooting.md"].split())
    source = "".join(path.read_text() for path in (ROOT / "src" / "videollama2_hf").rglob("*.py"))
    source = re.sub(r'"\n\s*f?"', "", source)
    for message in (
        "This model does not hear (has_audio=False)",
        "The logits for token ",
        "contain NaN or Inf. ",
        "The usual cause is float16, which these models overflow: load with dtype=torch.bfloat16 (as trained) or",
        "The window starts at ",
        "s, but the video ends at ",
        "tokens, but the model takes ",
        "There is no file",
        "does not say what it is",
        "cannot be decoded",
    ):
        assert message in page and message in source, message


def test_every_command_is_on_the_page_of_commands():
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    commands |= {group.name for group in app.registered_groups}
    assert set(re.findall(r"^\| `(\w+)` ", PAGES["reference/command_line.md"], flags=re.MULTILINE)) == commands


def test_navigation_has_every_page():
    text = (ROOT / "mkdocs.yml").read_text()
    assert {name for name in PAGES if not re.search(rf": {re.escape(name)}$", text, re.MULTILINE)} == set()
    assert "mkdocs build --strict" in (ROOT / ".ci" / "run").read_text()
    assert os.path.exists(DOCS / "images" / "architecture.svg")
