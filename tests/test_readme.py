"""The README keeps its promises: its Python runs as printed, its commands parse, its links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tiny_model import save_tiny_pipeline

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"

# Command lines that are quick enough to be run as well as parsed.
FAST = ("posteriori --help", "posteriori --version", "posteriori models", "posteriori restore --help")
COMMAND = Path(sys.executable).with_name("posteriori")


@dataclass(frozen=True)
class Block:
    """A fenced code block: its language, text, and the line it starts on."""

    language: str
    text: str
    line: int


def readme() -> str:
    assert README.is_file(), "there is no README.md"
    return README.read_text(encoding="utf-8")


def blocks(*languages: str) -> list[Block]:
    """Blocks of these languages; none when there is no README, which ``test_readme_has_...`` reports."""
    if not README.is_file():
        return []
    text = readme()
    fences = re.finditer(r"^(```+)[ \t]*(\w*)[^\n]*\n(.*?)^\1[ \t]*$", text, re.MULTILINE | re.DOTALL)
    found = [Block(m[2].lower(), m[3], text.count("\n", 0, m.start()) + 1) for m in fences]
    return [b for b in found if b.language in languages]


def command_lines() -> list[tuple[int, list[str]]]:
    """Every command in a shell block as (line, words), prompts and comments removed, continuations joined."""
    commands = []
    for block in blocks("sh", "bash", "shell", "console"):
        text = re.sub(r"\\\n\s*", " ", block.text)
        for line in text.splitlines():
            if block.language == "console" and not line.startswith("$"):
                continue  # output
            lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="&|;")
            lexer.whitespace_split = True
            words: list[str] = []
            for token in [*lexer, ";"]:
                if set(token) <= set("&|;"):
                    if words:
                        commands.append((block.line, words))
                    words = []
                else:
                    words.append(token)
    return commands


def posteriori_commands() -> list[list[str]]:
    return [words for _, words in command_lines() if words[0] == "posteriori"]


def photo() -> Path:
    """A bundled photo, to stand for the reader's own."""
    assets = ROOT / "src/posteriori/assets"
    photos = sorted(p for p in assets.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    assert photos, f"no photo under {assets.relative_to(ROOT)}"
    return photos[0]


def place_files(words: str, folder: Path) -> None:
    """Where a README names ``photo.jpg``, its reader has such a file."""
    for name in re.findall(r"[\w./-]+\.(?:jpg|jpeg|png)\b", words):
        target = folder / name
        if not Path(name).is_absolute() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(photo(), target)
    if '"my-ddpm"' in words:
        save_tiny_pipeline(folder / "my-ddpm")
    for name in re.findall(r"[\w./-]+\.yaml\b", words):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


@pytest.mark.slow
def test_own_forward_model_works_as_printed(tmp_path: Path) -> None:
    """A reader who follows the section on a forward model of his own gets an error at its second command."""
    files = {m[1]: b.text for b in blocks("python") if (m := re.match(r"# (\w+\.py):", b.text))}
    commands = [w for w in posteriori_commands() if any(name in part for name in files for part in w)]
    assert {w[1] for w in commands} == {"check", "restore"}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    for words in commands:
        for word in words:
            if word.endswith(".png"):
                with Image.open(photo()) as opened:
                    opened.convert("RGB").resize((48, 32)).save(tmp_path / word)
        fewer = ["--nfe", "3", "--samples", "1"] if words[1] == "restore" else []
        done = subprocess.run([COMMAND, *words[1:], *fewer], cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{' '.join(words)}:\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "restored" / "clean" / "report.json").is_file()


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_readme_has_python_and_shell() -> None:
    """Without a block of each, the tests below would have nothing to run and pass."""
    assert blocks("python"), "README.md has no ```python block"
    assert posteriori_commands(), "README.md has no posteriori command in a ```sh block"


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("python"), ids=lambda b: f"line-{b.line}")
def test_python_block_runs_as_printed(block: Block, tmp_path: Path) -> None:
    """A reader who pastes the block into a fresh session gets an error."""
    inputs = re.sub(r"\.(?:save|savefig)\([^)]*\)", "", block.text)  # what a block writes it need not find
    place_files(inputs, tmp_path)
    script = tmp_path / "block.py"
    script.write_text(block.text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", script.name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "MPLBACKEND": "agg"},
    )
    assert done.returncode == 0, f"README.md line {block.line}:\n{done.stdout}\n{done.stderr}"


def parse(command: Any, words: list[str], parent: Any = None) -> None:
    """Let the command line's own parser read the words, types and choices included, without running anything."""
    if getattr(command, "commands", None):
        context = command.make_context(words[0], words[1:], parent=parent)
        rest = [*getattr(context, "_protected_args", []), *context.args]
        if rest:
            name, child, left = command.resolve_command(context, rest)
            parse(child, [name, *left], context)
    else:
        command.make_context(words[0], words[1:], parent=parent)


def is_help(words: list[str]) -> bool:
    return bool({"--help", "--version"} & set(words)) or len(words) == 1


@pytest.mark.parametrize("words", posteriori_commands(), ids=" ".join)
def test_command_line_parses(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README shows an option, command or choice that the program does not have."""
    import typer

    from posteriori.cli import app

    monkeypatch.chdir(tmp_path)
    place_files(" ".join(words), tmp_path)
    if is_help(words):
        assert " ".join(words) in FAST, "add it to FAST: help and version are run, not parsed"
        return
    parse(typer.main.get_command(app), words)


def test_the_parser_check_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above would pass whatever the README says."""
    import typer

    from posteriori.cli import app

    monkeypatch.chdir(tmp_path)
    for words in ("posteriori restore p.jpg --no-such-option", "posteriori no-such-command", "posteriori demo --seed"):
        with pytest.raises(Exception, match=r"(?i)no such|requires an argument|unexpected"):
            parse(typer.main.get_command(app), words.split())


@pytest.mark.parametrize("line", [c for c in FAST if c.split() in posteriori_commands()])
def test_fast_command_runs(line: str, tmp_path: Path) -> None:
    """A command of the README fails."""
    done = subprocess.run([COMMAND, *line.split()[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert not list(tmp_path.iterdir()), "a command that only tells must not write"


def test_make_targets_exist() -> None:
    """The first two commands a reader tries are missing from the README or from the Makefile."""
    named = [words[1:] for _, words in command_lines() if words[0] == "make"]
    targets = {w for words in named for w in words if "=" not in w and not w.startswith("-")}
    assert {"demo", "test"} <= targets, "README.md must show `make demo` and `make test` in shell blocks"
    assert targets <= make_targets(), f"no such target in the Makefile: {targets - make_targets()}"


def test_relative_links_lead_somewhere() -> None:
    """A picture or page of the README is missing from the repository."""
    text = re.sub(r"^(```+).*?^\1[ \t]*$", "", readme(), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    local = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)]
    assert local, "README.md shows no picture"
    missing = [link for link in local if not (ROOT / link).exists()]
    assert not missing, f"README.md links to {', '.join(missing)}"


def help_seconds() -> float:
    start = time.perf_counter()
    done = subprocess.run([COMMAND, "--help"], capture_output=True, text=True, timeout=120)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    assert "restore" in done.stdout
    return seconds


def test_help_answers_at_once() -> None:
    """``posteriori --help`` keeps its reader waiting. The best of three, since the machine may be busy."""
    best = min(help_seconds() for _ in range(3))
    assert best < 1.0, f"posteriori --help took {best:.2f} s"


@pytest.mark.parametrize("words", [["--help"], ["restore", "--help"], ["demo", "--help"]], ids=" ".join)
def test_help_does_not_import_torch(words: list[str]) -> None:
    """Help waits for torch, which it does not need: seconds on a cold disk."""
    code = f"""
import sys
from posteriori.cli import main
sys.argv = ["posteriori", *{words!r}]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {{"torch", "numpy", "diffusers", "PIL"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
