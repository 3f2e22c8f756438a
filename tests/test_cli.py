"""Mistakes at the command line: what each is told, and that a finished model in --out outlives them all.

Everything runs in this process.  The words that are expected are written down here and not read from
the scripts' tables, which are what is tested.
"""

import json
import os
import shutil
import sys

import datasets
import pytest
import torch
from conftest import random_model
from test_beta import RESPONSE
from test_pipeline import SCRIPTS

import stage0_model as stage0
import stage1_zero

WHOLE = "expected a whole number from"
ABOVE_0 = "expected a finite number above 0"
FROM_0 = "expected a finite number from 0"
SHARE = "expected a number from 0 to 1"
TEXT = "expected some text"
NO_NUMBER = ["", "x", "nan", "inf", "1e999", "-1"]

# flags that are to be refused: {what is expected: ([values], {script: flags})}
RANGES = {
    f"{WHOLE} 1": (
        [*NO_NUMBER, "0", "1.5", "2147483648", "9" * 5000],
        {
            "stage0_model.py": "--steps --batch-tokens --micro-batches --hidden-size --layers --save-every",
            "stage1_zero.py": "--steps --prompts --updates --max-rounds --max-new-tokens --overlong-buffer",
            "stage2_beta.py": "--problems --samples --keep --max-new-tokens --batch-tokens --save-every",
            "stage3_papo.py": "--steps --prompts --max-new-tokens --max-branches --save-every",
            "eval.py": "--n --k --greedy --max-new-tokens",
            "engine.py": "--max-new-tokens",
        },
    ),
    f"{WHOLE} 2": (
        ["1", "0", "-1", "nan"],
        {s: "--group-size" for s in ("stage1_zero.py", "stage3_papo.py")},
    ),
    f"{WHOLE} 0": (
        ["-1", "0.5", "nan"],
        {
            "stage1_zero.py": "--micro-tokens",
            "stage3_papo.py": "--micro-tokens --clip-updates",
            "eval.py": "--first --timed",
        },
    ),
    f"{WHOLE} 0 to 2^63 - 1": (["-1", "9223372036854775808", "x"], {s: "--seed" for s in SCRIPTS}),
    ABOVE_0: (
        ["0", "-0.0", "-0.1", "nan", "inf", "x"],
        {
            "stage0_model.py": "--lr",
            "stage1_zero.py": "--lr --temperature",
            "stage2_beta.py": "--lr --temperature --epochs",
            "stage3_papo.py": "--lr --temperature --gain-factor",
        },
    ),
    FROM_0: (
        ["-0.1", "nan", "inf"],
        {
            "stage0_model.py": "--muon-lr",
            "stage1_zero.py": "--eps-high",
            "stage2_beta.py": "--muon-lr --tag-lr",
            "stage3_papo.py": "--muon-lr --path-weight",
            "eval.py": "--temperature",
            "engine.py": "--temperature",
        },
    ),
    SHARE: (
        ["2", "-0.1", "nan"],
        {
            "stage0_model.py": "--slip --warmdown --valid-share --malformed-share",
            "stage1_zero.py": "--eps-low",
        },
    ),
    "expected a number above 0, at most 1": (["0", "1.5", "nan"], {"eval.py": "--top-p"}),
    TEXT: (
        ["", "  "],
        {
            "stage0_model.py": "--out",
            **{s: "--out --init" for s in ("stage1_zero.py", "stage2_beta.py", "stage3_papo.py")},
            "eval.py": "--out",
            "engine.py": "--init",
        },
    ),
    "expected auto, cpu, cuda, cuda:1 ..": (
        ["gpu", "", "cuda:", "cuda:x", "-1"],
        {s: "--device" for s in SCRIPTS},
    ),
}

# {plain} and {tagged} are checkpoints, {done} a finished run of other settings, {t} a folder to write in
MISTAKES = [
    # the folder
    ("stage0_model.py --out {done}", "holds another run, finished (--steps 7, now 2400"),
    ("stage0_model.py --out {done}/", "or --overwrite to move it aside"),
    ("stage0_model.py --out {done} --steps 7 --lr 0.5", "(--lr 0.003, now 0.5)"),
    ("stage0_model.py --out {done} --steps 7 --seed 1", "(--seed 0, now 1)"),
    ("stage1_zero.py --init {plain} --out {done}", "holds another run, finished"),
    ("stage2_beta.py --init {plain} --out {done}", "holds another run, finished"),
    ("stage3_papo.py --init {tagged} --out {done}", "holds another run, finished"),
    ("stage1_zero.py --init {done} --out {done}", "is --init, or lies in it"),
    ("stage1_zero.py --init {done}/ --out {done}", "is --init, or lies in it"),
    ("stage1_zero.py --init {done} --out {done}/../done", "is --init, or lies in it"),
    ("stage1_zero.py --init {done} --out {done}/next", "is --init, or lies in it"),
    ("stage2_beta.py --init {done} --out {done}", "is --init, or lies in it"),
    ("stage2_beta.py --init {plain} --start {done} --out {done}", "is --start, or lies in it"),
    ("stage2_beta.py --init {plain} --start {t}/nowhere --out {done}", "no such checkpoint folder"),
    ("stage3_papo.py --init {tagged} --out {tagged}", "is --init, or lies in it"),
    ("stage3_papo.py --init {tagged} --out {link}", "is --init, or lies in it"),
    (
        "stage0_model.py --out {plain}",
        "holds another run, finished (model.safetensors, which no stage wrote)",
    ),
    ("stage1_zero.py --init {done} --out {plain}", "model.safetensors, which no stage wrote"),
    ("stage0_model.py --out {t}/text.txt", "is a file; expected a folder"),
    ("stage0_model.py --out {t}/text.txt/x", "Not a directory"),
    ("stage0_model.py --out {t}/" + "x" * 300, "File name too long"),
    ("stage2_beta.py --init {plain} --data {done}/data --out {done}", "where this run writes"),
    ("stage2_beta.py --init {plain} --data {done}/data/ --out {done}/", "where this run writes"),
    ("eval.py {plain} --out {t}/foreign", "eval.json was not written by this script"),
    ("eval.py {plain} --out {t}/text.txt", "File exists"),
    # what is read
    ("stage1_zero.py --init {t}/nowhere --out {done}", "no such checkpoint folder"),
    ("stage1_zero.py --init {t} --out {done}", "config.json is missing"),
    ("stage1_zero.py --init {plain} --data {t}/none.json --out {done}", "no such file"),
    ("stage1_zero.py --init {plain} --data {t}/none --out {done}", "no such folder or file"),
    ("stage1_zero.py --init {plain} --data {t}/empty.json --out {done}", "found an empty one"),
    ("stage1_zero.py --init {plain} --data {t}/text.json --out {done}", "not readable as json"),
    ("stage1_zero.py --init {plain} --data {t}/rows.json --question-column q --out {done}", "no column q"),
    (
        "stage1_zero.py --init {plain} --prompt-file {t}/none.txt --out {done}",
        "--prompt-file {t}/none.txt: no such",
    ),
    ("stage2_beta.py --init {plain} --data {t}/untagged.json --out {done}", "no response has a tag"),
    (
        "stage2_beta.py --init {plain} --data {t}/null.json --out {done}",
        "null.json: row 1 has no text in its columns",
    ),
    ("stage2_beta.py --init {plain} --data {t}/nothing.json --out {done}", "nothing.json: row 0 has no text"),
    (
        "stage2_beta.py --init {plain} --data {t}/noproblem.json --out {done}",
        "row 0 has no text in its columns",
    ),
    ("stage2_beta.py --init {plain} --data {t}/broken.json --out {t}/new", "the response of row 0: token"),
    ("stage2_beta.py --init {plain} --data {t}/none.json --out {done}", "no such file"),
    ("stage3_papo.py --init {plain} --out {done}", "needs a checkpoint from stage 2 or 3"),
    ("stage3_papo.py --init {plain} --out {t}/new", "needs a checkpoint from stage 2 or 3"),
    ("eval.py {t}/nowhere --out {done}", "no such checkpoint folder"),
    ("eval.py {plain} {t}/nowhere --out {t}/judged", "no such checkpoint folder"),
    ("eval.py {plain}=sideways --out {done}", "unknown mode 'sideways'"),
    ("eval.py {plain} --n 1000000000 --kind sums --out {done}", "no 1000000000 distinct problems"),
    ("engine.py --init {plain} 1*2", "needs a checkpoint from stage 2 or 3"),
    ("engine.py --init {tagged} 1*2 --max-new-tokens 99999999", "exceed the KV budget"),
    # flags that do not go together
    ("stage0_model.py --out {done} --hidden-size 100", "--hidden-size 100: expected a multiple of 64"),
    ("stage0_model.py --out {done} --hidden-size 160", "--hidden-size 160: expected a multiple of 64"),
    ("stage0_model.py --out {done} --valid-share 0.7 --malformed-share 0.7", "more than 1 together"),
    (
        "stage1_zero.py --init {plain} --out {done} --overlong-buffer 897",
        "expected at most --max-new-tokens, 896",
    ),
    (
        "stage1_zero.py --init {plain} --out {done} --max-new-tokens 100",
        "--overlong-buffer 128: expected at most",
    ),
    ("stage3_papo.py --init {tagged} --out {done} --count-forced --clip-updates 2", "give one of them"),
    # flags that do not exist, or have no such value
    ("stage0_model.py --out {done} --warm 0.5", "unrecognized arguments: --warm"),
    ("stage0_model.py --out {done} --micro 2", "unrecognized arguments: --micro"),
    ("stage1_zero.py --out {done} --max-new 64", "unrecognized arguments: --max-new"),
    ("stage2_beta.py --out {done} --keep-w", "unrecognized arguments: --keep-w"),
    ("stage3_papo.py --out {done} --count", "unrecognized arguments: --count"),
    ("eval.py {plain} --out {done} --max 3", "unrecognized arguments: --max"),
    ("stage0_model.py --out {done} --overw", "unrecognized arguments: --overw"),
    ("stage0_model.py --out {done} extra", "unrecognized arguments: extra"),
    ("stage0_model.py --out", "argument --out: expected one argument"),
    ("stage0_model.py --out {done} --steps", "argument --steps: expected one argument"),
    ("stage0_model.py --out {done} --overwrite yes", "argument --overwrite: invalid choice: 'yes'"),
    ("stage0_model.py --out {done} --overwrite stale", "holds another run, finished (--steps 7, now 2400"),
    ("stage0_model.py --out {done} --track mlflow", "argument --track: invalid choice: 'mlflow'"),
    ("stage0_model.py --out {done} --track wandb", "--track wandb is not installed: pip install wandb"),
    (
        "stage1_zero.py --init {plain} --out {done} --lora -1",
        "argument --lora: '-1', expected a whole number",
    ),
    ("stage1_zero.py --init {t}/nowhere --plan", "no such checkpoint folder"),
    (
        "stage1_zero.py --init {plain} --out {done} --max-new-tokens 9999999",
        "which with --max-new-tokens 9999999",
    ),
    (
        "stage3_papo.py --init {tagged} --out {done} --max-new-tokens 9999999",
        "exceed the KV budget of 262144",
    ),
    ("stage1_zero.py --init {plain} --data {t}/long.json --out {done}", "the prompt of question 1 has 30"),
    ("stage2_beta.py --init {plain} --data {t}/long.json --out {done}", "the prompt of question 1 has 30"),
    ("stage3_papo.py --init {tagged} --data {t}/long.json --out {done}", "the prompt of question 1 has 30"),
    ("stage1_zero.py --out {done} --kind riddles", "argument --kind: invalid choice: 'riddles'"),
    ("stage1_zero.py --out {done} --dtype float16", "argument --dtype: invalid choice: 'float16'"),
    ("eval.py {plain} --out {done} --split test", "argument --split: invalid choice: 'test'"),
    ("eval.py {plain} --out {done} --bench aime26", "argument --bench: invalid choice: 'aime26'"),
    ("stage1_zero.py --init {plain} --device cuda --out {done}", "no CUDA device is visible"),
    ("stage1_zero.py --init {plain} --device cuda:7 --out {done}", "no CUDA device is visible"),
]

FIRST = {"eval.py": "{plain} --out {done}", "engine.py": "1*2", "stage0_model.py": "--out {done}"}
for expected, (values, scripts) in RANGES.items():
    for script, flags in scripts.items():
        for flag in flags.split():
            for value in values:
                words = [script, *FIRST.get(script, "--init {plain} --out {done}").split(), f"{flag}={value}"]
                MISTAKES.append((words, f"argument {flag}: {value[:40]!r}, {expected}"))


@pytest.fixture(scope="module")
def places(tmp_path_factory, plain_tokenizer, tokenizer):
    t = tmp_path_factory.mktemp("cli")
    stage0.save(random_model(len(plain_tokenizer)), plain_tokenizer, t / "plain")
    stage0.save(random_model(len(tokenizer)), tokenizer, t / "tagged")
    (t / "link").symlink_to(t / "tagged")

    # a finished run of stage 0, with a user's notes and data beside it
    run = stage0.Run(stage0.parse_args(["--out", str(t / "done"), "--steps", "7", "--device", "cpu"]))
    run.log(step=7, loss=1.0)
    run.finish(random_model(len(plain_tokenizer)), plain_tokenizer)
    (t / "done" / "notes.txt").write_text("mine")
    datasets.Dataset.from_list([{"text": "mine"}]).save_to_disk(str(t / "done" / "data"))

    # data with one thing wrong in each
    good = {"problem": "1+1?", "response": RESPONSE}
    files = {
        "empty": [],
        "rows": [{"problem": "1+1?", "answer": "2"}],
        "long": [{"problem": "1+1?", "answer": "2"}, {"problem": "1+" * 150_000 + "1?", "answer": "2"}],
        "untagged": [good | {"response": "\\boxed{2}"}],
        "null": [good, good | {"problem": None}],
        "nothing": [{"response": "", "problem": "1+1?"}],
        "noproblem": [{"response": RESPONSE}],
        "broken": [good | {"response": RESPONSE.replace("</guideline>", "")}],
    }
    for name, rows in files.items():
        (t / f"{name}.json").write_text(json.dumps(rows))
    (t / "text.json").write_text("{")
    (t / "text.txt").write_text("text")
    (t / "foreign").mkdir()
    (t / "foreign" / "eval.json").write_text("{}")
    return {name: t / name for name in ("plain", "tagged", "done", "link")} | {"t": t}


def files_of(folder):
    """{name: (bytes, time)} of all files below a folder."""
    return {
        str(f.relative_to(folder)): (f.read_bytes(), f.stat().st_mtime_ns)
        for f in folder.rglob("*")
        if f.is_file()
    }


def command(monkeypatch, capsys, places, words):
    """(exit status, what was printed, the lines of stderr) of a command line in this process."""
    words = [word.format(**places) for word in (words.split() if isinstance(words, str) else words)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", words)
    status = 0
    try:
        stage0.run_main(SCRIPTS[words[0]].main)
    except SystemExit as stopped:
        status = stopped.code or 0
    shown = capsys.readouterr()
    return status, shown.out, shown.err.splitlines()


def test_there_are_at_least_two_hundred_mistakes():
    assert len({str(words) for words, _ in MISTAKES}) == len(MISTAKES) >= 200


def test_every_mistake_gets_its_line_and_a_finished_model_outlives_them_all(monkeypatch, capsys, places):
    before = {name: files_of(places[name]) for name in ("done", "plain", "tagged")}
    wrong = []
    for words, expected in MISTAKES:
        status, _, lines = command(monkeypatch, capsys, places, words)
        expected = expected.format(**places) if "{t}" in expected else expected
        last = lines[-1] if lines else ""
        if status != 2 or not last.startswith("error: ") or expected not in last or "Traceback" in str(lines):
            wrong.append((words, status, last))
        if before != {name: files_of(places[name]) for name in before}:
            wrong.append((words, "touched what was finished"))
            break
    assert not wrong, "\n".join(map(str, wrong[:20]))


SMALL = "stage0_model.py --steps 4 --batch-tokens 600 --hidden-size 64 --layers 1 --device cpu"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A finished run of stage 0, to be copied."""
    folder = tmp_path_factory.mktemp("small") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*SMALL.split(), "--out", str(folder)])
        stage0.main()
    return folder


@pytest.mark.parametrize("more", ["", "--save-every 7", "--device auto", "--overwr"])
def test_a_finished_stage_with_the_same_settings_says_so_and_exits_with_0(
    monkeypatch, capsys, tmp_path, small, more
):
    out = shutil.copytree(small, tmp_path / "run", copy_function=shutil.copy2)
    before = files_of(out)
    status, shown, lines = command(monkeypatch, capsys, {}, f"{SMALL} --out {out}/ {more}")
    if more == "--overwr":
        assert status == 2 and "unrecognized" in lines[-1]
    else:
        assert status == 0 and "is finished" in shown and not lines
    assert files_of(out) == before


def test_overwrite_moves_the_old_run_aside_and_leaves_everything_else(monkeypatch, capsys, tmp_path, small):
    out = shutil.copytree(small, tmp_path / "run")
    (out / "notes.txt").write_text("mine")
    (out / "data").mkdir()
    (out / "data" / "rows.json").write_text("mine")
    old = files_of(small)
    for n, flags in enumerate(("--seed 1", "--seed 2"), 1):
        status, _, _ = command(monkeypatch, capsys, {}, f"{SMALL} --out {out} {flags} --overwrite")
        assert status == 0
        moved = files_of(tmp_path / f"run.old-{n}")
        assert {name: text for name, (text, _) in moved.items()} == {
            name: text for name, (text, _) in old.items()
        }
        old = {
            name: file for name, file in files_of(out).items() if name not in ("notes.txt", "data/rows.json")
        }
    assert (out / "notes.txt").read_text() == (out / "data" / "rows.json").read_text() == "mine"
    stage0.load(tmp_path / "run.old-1")  # what was moved is still a checkpoint


def test_overwrite_does_a_finished_stage_again_with_the_same_settings(monkeypatch, capsys, tmp_path, small):
    out = shutil.copytree(small, tmp_path / "run")
    assert command(monkeypatch, capsys, {}, f"{SMALL} --out {out} --overwrite")[0] == 0
    again = (out / "model.safetensors").read_bytes()
    assert again == (tmp_path / "run.old-1" / "model.safetensors").read_bytes()


def test_a_symlinked_folder_is_written_through_and_its_neighbours_stay(monkeypatch, capsys, tmp_path, small):
    real = shutil.copytree(small, tmp_path / "disk" / "run")
    (tmp_path / "link").symlink_to(real)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("mine")
    (real / "data").symlink_to(tmp_path / "elsewhere")
    status, _, _ = command(monkeypatch, capsys, {}, f"{SMALL} --out {tmp_path}/link --seed 1 --overwrite")
    assert status == 0 and (tmp_path / "link").is_symlink() and (real / "data").is_symlink()
    assert (tmp_path / "disk" / "run.old-1" / "model.safetensors").is_file()
    assert (tmp_path / "elsewhere" / "mine").read_text() == "mine"


def test_a_run_that_made_nothing_yet_gives_way_to_other_settings(tmp_path):
    for steps in (5, 6):
        stage0.Run(stage0.parse_args(["--out", str(tmp_path), "--steps", str(steps)]))
    assert json.loads((tmp_path / "args.json").read_text())["steps"] == 6


def test_a_half_done_run_goes_on_with_its_own_settings_only(tmp_path):
    def run(*flags):
        return stage0.Run(stage0.parse_args(["--out", str(tmp_path), *flags]))

    run().checkpoint(random_model(50), [], 3)
    for same in ((), ("--device", "cpu"), ("--save-every", "9"), ("--overwrite",)):
        run(*same)
        assert (tmp_path / "resume" / "state.pt").is_file()
    with pytest.raises(stage0.UserError, match=r"half-done \(--lr 0.003, now 0.001\)"):
        run("--lr", "1e-3")


def test_a_base_trained_anew_behind_the_same_path_is_noticed(monkeypatch, capsys, tmp_path, places):
    base = shutil.copytree(places["plain"], tmp_path / "base")
    flags = "--steps 1 --prompts 1 --group-size 2 --max-new-tokens 8 --overlong-buffer 4 --max-rounds 1"
    words = f"stage1_zero.py --init {base} --out {tmp_path}/out {flags} --device cpu"
    assert command(monkeypatch, capsys, {}, words)[0] == 0
    # the same weights written again are no difference, others are
    shutil.copy(places["plain"] / "model.safetensors", base / "model.safetensors")
    assert "is finished" in command(monkeypatch, capsys, {}, words)[1]
    model, tokenizer = stage0.load(base)
    with torch.no_grad():
        model.model["norm"].weight[0] += 1e-3
    stage0.save(model, tokenizer, base)
    status, _, lines = command(monkeypatch, capsys, {}, words)
    assert status == 2 and "(other content of --init)" in lines[-1]
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Think.")
    lines = command(monkeypatch, capsys, {}, f"{words} --prompt-file {prompt}")[2]
    assert "other content of --prompt-file; other content of --init" in lines[-1]


def test_two_processes_cannot_write_to_one_folder_and_a_killed_one_leaves_no_lock(tmp_path):
    import subprocess

    code = "import sys, time; sys.path.insert(0, '.'); import stage0_model as s\n"
    code += f"s.Run(s.parse_args(['--out', {str(tmp_path / 'run')!r}])); print('has it', flush=True); time.sleep(60)"
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS["eval.py"].__file__.rsplit("/", 1)[0])}
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert other.stdout.readline() == "has it\n"
    with pytest.raises(stage0.UserError, match="another process writes there"):
        stage0.Run(stage0.parse_args(["--out", str(tmp_path / "run")]))
    other.kill()
    other.wait()
    stage0.Run(stage0.parse_args(["--out", str(tmp_path / "run")]))


SHORT = (
    "--steps 1 --prompts 1 --group-size 2 --max-new-tokens 8 --overlong-buffer 4 --max-rounds 1 --device cpu"
)


def test_other_input_is_moved_aside_when_asked_for_and_other_settings_are_not(
    monkeypatch, capsys, tmp_path, places
):
    """--overwrite stale, which make gives: a base trained anew is no mistake, another rate may be one."""
    base = shutil.copytree(places["plain"], tmp_path / "base")
    words = f"stage1_zero.py --init {base} --out {tmp_path}/out {SHORT} --overwrite stale"
    assert command(monkeypatch, capsys, {}, words)[0] == 0
    old = files_of(tmp_path / "out")
    assert "is finished" in command(monkeypatch, capsys, {}, words)[1]
    status, _, lines = command(monkeypatch, capsys, {}, f"{words} --lr 0.5")
    assert status == 2 and "--lr 0.0001, now 0.5" in lines[-1]
    model, tokenizer = stage0.load(base)
    with torch.no_grad():
        model.model["norm"].weight[0] += 1e-3
    stage0.save(model, tokenizer, base)

    # both at once: refused all the same
    status, _, lines = command(monkeypatch, capsys, {}, f"{words} --lr 0.5")
    assert (
        status == 2 and "now 0.5; other content of --init" in lines[-1] and files_of(tmp_path / "out") == old
    )
    assert command(monkeypatch, capsys, {}, words)[0] == 0
    assert files_of(tmp_path / "out.old-1") == old
    assert files_of(tmp_path / "out")["model.safetensors"] != old["model.safetensors"]


def test_a_half_done_run_of_an_older_base_is_moved_aside_too(monkeypatch, capsys, tmp_path, places):
    base = shutil.copytree(places["plain"], tmp_path / "base")
    argv = ["--init", str(base), "--out", str(tmp_path / "out"), "--overwrite", "stale"]
    model, tokenizer = stage0.load(base)
    stage0.Run(stage1_zero.parse_args(argv)).checkpoint(model, [], 3)
    state = (tmp_path / "out" / "resume" / "state.pt").read_bytes()
    stage0.Run(stage1_zero.parse_args(argv))  # nothing has changed: it goes on
    assert (tmp_path / "out" / "resume" / "state.pt").read_bytes() == state
    stage0.save(random_model(len(tokenizer), seed=8), tokenizer, base)
    stage0.Run(stage1_zero.parse_args(argv))
    assert (tmp_path / "out.old-1" / "resume" / "state.pt").read_bytes() == state
    assert not (tmp_path / "out" / "resume").exists()


@pytest.mark.parametrize("lora, bytes_each", [(0, 12 + 12), (4, 4)])
def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    monkeypatch, capsys, tmp_path, places, lora, bytes_each
):
    model, _ = stage0.load(places["plain"])
    size = sum(p.numel() for p in model.parameters())
    inside = [p.shape for name, p in model.named_parameters() if "_proj" in name]
    needed = bytes_each * size + (24 - 12) * lora * sum(map(sum, inside))
    disk = shutil.disk_usage(tmp_path)
    out = shutil.copytree(places["done"], tmp_path / "out")
    before = files_of(out)
    words = f"stage1_zero.py --init {places['plain']} --out {out} {SHORT} --lora {lora} --overwrite"

    for free in (needed - 1, needed):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: disk._replace(free=free))
        status, _, lines = command(monkeypatch, capsys, {}, words)
        if free < needed:
            assert status == 2 and f"{needed / 1e9:.3f} GB will be written there" in lines[-1]
            assert files_of(out) == before and not (tmp_path / "out.old-1").exists()
    assert status == 0


def test_a_tracker_gets_the_rows_of_the_log_and_the_settings(monkeypatch, capsys, tmp_path):
    """A stand-in for trackio, whose functions have these names and arguments."""
    (tmp_path / "trackio.py").write_text(
        "seen = []\n"
        "def init(project, name=None, config=None, resume='never'): seen.append((project, name, dict(config)))\n"
        "def log(metrics, step=None): seen.append((dict(metrics), step))\n"
        "def finish(): seen.append('end')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "out"
    assert command(monkeypatch, capsys, {}, f"{SMALL} --out {out} --track trackio")[0] == 0
    import trackio

    (project, name, config), *rows, end = trackio.seen
    assert (project, name, config["steps"], end) == ("npr", str(out), 4, "end")
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert rows == [(row, row["step"]) for row in logged] and len(rows) == 4

    # where a run is told of is no setting of the run
    assert "is finished" in command(monkeypatch, capsys, {}, f"{SMALL} --out {out}")[1]
