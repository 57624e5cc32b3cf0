"""The package as a whole: how it is laid out, installed and called."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from linerate.__main__ import COMMANDS, main
from linerate.bench.readme import filled
from linerate.shards.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def run_cli(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "linerate", *argv], capture_output=True, text=True, timeout=120
    )


def test_help_names_every_command_and_imports_nothing_heavy():
    probe = (
        "import sys; from linerate.__main__ import main; main(['--help']);"
        "print('HEAVY', sorted({'torch', 'nvidia', 'numpy', 'tyro', 'timm', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert "HEAVY []" in done.stdout
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_answers_help(command, capsys):
    try:
        code = main([command, "--help"])
    except SystemExit as end:
        code = end.code
    assert code == 0
    assert "usage: linerate" in capsys.readouterr().out.replace("\n", " ")


def test_a_mistyped_command_gets_the_nearest_in_one_line(capsys):
    assert main(["shrd"]) == 2
    assert capsys.readouterr().err == "linerate: error: there is no command `shrd`; did you mean `shard`?\n"


def test_a_user_error_is_one_line_and_exit_code_2(monkeypatch, capsys):
    def refuse(argv: list[str]) -> int:
        raise UserError("two\n  lines become one")

    monkeypatch.setattr("linerate.shards.cli.main", refuse)
    assert main(["shard", "pack"]) == 2
    assert capsys.readouterr().err == "linerate: error: two lines become one\n"


def _as_rank(monkeypatch, folder: Path, rank: int) -> None:
    """The place that torchrun gives a rank: a file in a folder of its own beside those of the others."""
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / str(rank) / "error.json"))


def test_ranks_say_the_same_error_once_and_their_own_each(monkeypatch, capsys, tmp_path):
    said = {}
    for rank, command in ((1, "shrd"), (0, "shrd"), (2, "trian"), (3, "shrd")):
        _as_rank(monkeypatch, tmp_path, rank)
        assert main([command]) == 2
        said[rank] = capsys.readouterr().err
    assert "`shrd`" in said[1]
    assert "`trian`" in said[2]
    assert said[0] == said[3] == ""


def test_a_rank_repeats_itself_and_a_new_start_of_the_ranks_says_it_again(monkeypatch, capsys, tmp_path):
    for attempt, rank in ((0, 1), (0, 1), (1, 0)):
        folder = tmp_path / f"attempt_{attempt}"
        folder.mkdir(exist_ok=True)
        _as_rank(monkeypatch, folder, rank)
        assert main(["shrd"]) == 2
        assert "`shrd`" in capsys.readouterr().err


def test_ranks_that_can_leave_no_mark_all_speak(monkeypatch, capsys, tmp_path):
    for rank in (0, 1):
        _as_rank(monkeypatch, tmp_path / "not there", rank)
        assert main(["shrd"]) == 2
        assert "`shrd`" in capsys.readouterr().err
    # A file that somebody else named: its folders are not the ranks'.
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "some" / "error.json"))
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main(["shrd"]) == 2
        assert "`shrd`" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("shard pack in out", "the same command continues where it stopped"),
        ("demo --json", "the same command continues where it stopped"),
        (
            "train demo --run r",
            "the same command with --resume continues from the last checkpoint, if there is one",
        ),
        ("bench run pack", "records that are in --out already stay there; the same command measures anew"),
        ("shard verify out", "the same command starts anew"),
        ("shard beton out x", "the same command starts anew"),
        ("views v1", "the same command starts anew"),
        ("eval knn r", "the same command starts anew"),
        ("eval detect r", "the same command continues from its last checkpoint, if there is one"),
        ("export r", "the same command starts anew"),
        ("bench compare a b", "the same command starts anew"),
    ],
)
def test_an_interrupt_ends_with_130_and_what_is_true_of_the_command(words, line, monkeypatch, capsys):
    def interrupt(argv: list[str]) -> int:
        raise KeyboardInterrupt

    module, function, _ = COMMANDS[words.split()[0]]
    monkeypatch.setattr(f"{module}.{function}", interrupt)
    assert main(words.split()) == 130
    assert capsys.readouterr().err == f"linerate: interrupted; {line}\n"


def test_a_missing_folder_is_one_line_without_traceback(tmp_path):
    done = run_cli("shard", "verify", str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "nowhere" in done.stderr


@pytest.mark.parametrize("name", ["requirements.txt", "bench/peers.txt"])
def test_requirements_are_pinned_and_name_no_index(name):
    lines = (ROOT / name).read_text().splitlines()
    assert len(lines) > 50
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[^ ]+( ; .+)?", line), line


def test_the_four_folders_are_linked_relatively_into_the_package():
    for name in ("shards", "pipeline", "train", "bench"):
        link = ROOT / "src" / "linerate" / name
        assert link.is_symlink()
        assert str(link.readlink()) == f"../../{name}"


def test_sdist_and_wheel_hold_every_package(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("git is missing: that the wheel holds every package stays untested")
    copy = tmp_path / "copy"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if files.returncode:
        pytest.skip("not a git checkout: what belongs to the project is not known")
    for name in filter(None, files.stdout.split("\0")):
        source, target = ROOT / name, copy / name
        if not (source.is_symlink() or source.exists()):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
        else:
            target.write_bytes(source.read_bytes())
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path)]
    done = subprocess.run(build, cwd=copy, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    expected = {
        "linerate/" + str(path.parent)
        for path in (p.relative_to(copy) for p in copy.glob("*/**/__init__.py"))
        if path.parts[0] in ("shards", "pipeline", "train", "bench")
    } | {f"linerate/{path.parent}" for path in (p.relative_to(copy) for p in copy.glob("*/__init__.py"))}
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        packages = {str(Path(n).parent) for n in wheel.namelist() if n.endswith("/__init__.py")}
    assert packages == expected | {"linerate"}
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as sdist:
        held = {"/".join(n.split("/")[1:]) for n in sdist.getnames()}
    assert {"src/linerate/shards/pack.py", "src/linerate/train/step.py", "pyproject.toml"} <= held


def test_the_readme_holds_the_results_and_the_tree_as_they_are():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert filled(text, root=ROOT) == text, "run `make readme`"


def test_every_figure_of_the_readme_leads_to_its_line():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(
        r"^\| \[([a-z0-9-]+)\]\((\S+?)#L(\d+)\): (.*?) \| .*? \| ([\d,.]*)", text, re.MULTILINE
    )
    assert len(found) > 30
    for name, file, number, work, ours in found:
        line = json.loads((ROOT / file).read_text(encoding="utf-8").splitlines()[int(number) - 1])
        assert (line["name"], line["work"]) == (name, work)
        if ours:
            assert float(ours.replace(",", "")) == pytest.approx(line["ours"], rel=0.005)
