"""The command line: its grammar, what it prints where, and the exit code and single line of everything that goes wrong."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from text_model import FAST, write_text_model

import jaxpaged.llm
from jaxpaged import cli
from jaxpaged.cli import demo, options
from jaxpaged.cli.generate import LEFT_OUT
from jaxpaged.config import EngineConfig
from jaxpaged.host.request import SamplingParams
from jaxpaged.version import __version__

pytestmark = pytest.mark.usefixtures("own_logger")
SMALL = [f"--{name.replace('_', '-')}={value[0] if isinstance(value, tuple) else value}" for name, value in FAST.items()][:-1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_text_model(tmp_path_factory.mktemp("text-model")))


class Result:
    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def run(*argv: str) -> Result:
        code = cli.main(list(argv))
        return Result(code, *capsys.readouterr())

    return run


def assert_one_line(result: Result, code: int, *parts: str) -> None:
    assert result.code == code, result.err
    assert result.err.startswith("jaxpaged: error: ") and result.err.count("\n") == 1 and result.err.endswith("\n"), result.err
    assert result.out == ""
    for part in parts:
        assert part in result.err, result.err


# --- help --------------------------------------------------------------------------------------------------------


def test_help_tells_everything(run):
    top = run("--help")
    assert top.code == 0 and top.err == ""
    for name, summary in cli.COMMANDS.items():
        assert name in top.out and summary in top.out
        shown = run(name, "--help")
        assert shown.code == 0 and shown.err == "" and "examples:" in shown.out
        assert all(len(line) <= 130 for line in shown.out.splitlines())
    nothing = run()
    assert nothing.code == 2 and nothing.out == top.out
    assert run("--version").out == f"jaxpaged {__version__}\n"


def test_every_field_is_a_flag_with_the_text_of_its_declaration(run):
    shown = " ".join(run("generate", "--help").out.split())
    for kind in (EngineConfig, SamplingParams):
        described = options.described_fields(kind)
        assert described.keys() == {field.name for field in dataclasses.fields(kind)}
        for name, text in described.items():
            if name == "logits_processors":  # functions
                assert "--logits-processors" not in shown
                continue
            # The engine has a --seed of its own.
            flag = re.search(rf"--{name.replace('_', '-')}(?![\w-])", shown)
            assert (flag is not None) is (kind is not SamplingParams or name not in LEFT_OUT[1:])
            if (kind, name) not in [(SamplingParams, one) for one in LEFT_OUT]:
                assert text.split(";")[0] in shown


@pytest.mark.parametrize(
    "argv", [["--help"], ["generate", "--help"], ["chat", "--help"], ["generate", "x", "--seed", "1", "--sed", "2"]]
)
def test_help_and_usage_errors_are_quick(argv: list[str]):
    code = (
        "import sys, time; from jaxpaged.cli import main; main(sys.argv[1:]); "
        "print('\\n', time.process_time(), *sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=60, check=True)
    seconds, *modules = done.stderr.splitlines()[-1].split()
    assert not {"jax", "transformers", "torch", "tokenizers", "rich"} & set(modules)
    assert float(seconds) < 0.5  # of this process alone, so that a busy machine does not fail it


# --- grammar -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, value",
    [
        ("4096", 4096),
        ("1k", 1000),
        ("1K", 1024),
        ("2.5k", 2500),
        ("25.6k", 25600),
        ("1m", 10**6),
        ("2M", 2**21),
        ("-1", -1),
        ("1.5K", 1536),
    ],
)
def test_whole_numbers(text: str, value: int):
    assert options.whole_number(text) == value


@pytest.mark.parametrize("text", ["", "k", "1.3", "1.0001k", "1e3", "0x10", "1kk", "nan", "1 k", "--1"])
def test_what_is_not_a_whole_number(text: str):
    with pytest.raises(options.argparse.ArgumentTypeError, match="whole number"):
        options.whole_number(text)


def parsed(*argv: str) -> dict[str, Any]:
    parser = options.Parser("test", "", "")
    parser.add_argument("words", nargs="*")
    options.add_fields(parser, EngineConfig, "engine")
    options.add_fields(parser, SamplingParams, "sampling", leave_out=LEFT_OUT)
    return vars(parser.parse(list(argv)))


def test_the_grammar_of_flags():
    assert parsed() == {"words": []}  # absent flags set nothing
    assert parsed("--max_num-seqs=1K", "--enforce_eager") == {"words": [], "max_num_seqs": 1024, "enforce_eager": True}
    assert parsed("a", "--no-ignore-eos", "b", "--top-k", "-1", "c") == {
        "words": ["a", "b", "c"],
        "ignore_eos": False,
        "top_k": -1,
    }
    assert parsed("--decode-row-buckets", "1,8,1k")["decode_row_buckets"] == (1, 8, 1000)
    assert parsed("--model", "a_b-c", "--temperature", ".5") == {"words": [], "model": "a_b-c", "temperature": 0.5}
    assert parsed("--seed", "1", "--", "--seed", "-x") == {"words": ["--seed", "-x"], "seed": 1}


# --- what goes wrong (B9) ----------------------------------------------------------------------------------------

USAGE = [
    (["nonsense"], "unknown command 'nonsense'"),
    (["genrate"], "did you mean 'generate'"),
    (["--verbos"], "unknown flag '--verbos'"),
    (["generate"], "PROMPT: missing"),
    (["generate", "x", "--max-num-sequences", "4"], "unknown flag '--max-num-sequences', did you mean '--max-num-seqs'"),
    (["generate", "x", "--zzz"], "unknown flag '--zzz'"),
    (["generate", "x", "--max-tok", "3"], "unknown flag '--max-tok', did you mean '--max-tokens'"),  # no abbreviations
    (["generate", "x", "--model"], "--model: expected one argument"),
    (["generate", "x", "--max-num-seqs", "four"], "--max-num-seqs: got 'four', expected a whole number"),
    (["generate", "x", "--max-num-seqs", "0"], "max_num_seqs: got 0, expected a whole number in [1, 4096]"),
    (["generate", "x", "--max-num-seqs", "-1"], "max_num_seqs: got -1"),
    (["generate", "x", "--max-num-seqs", "99999999999"], "max_num_seqs: got 99999999999"),
    (["generate", "x", "--scheduling-policy", "fair-share"], "scheduling_policy: got 'fair-share', expected a function or"),
    (["generate", "x", "--block-size", "17"], "block_size: got 17, expected one of 8, 16"),
    (["generate", "x", "--dtype", "int8"], "dtype: got 'int8', expected one of"),
    (["generate", "x", "--gpu-memory-utilization", "1.5"], "gpu_memory_utilization: got 1.5"),
    (["generate", "x", "--gpu-memory-utilization", "nan"], "gpu_memory_utilization: got nan"),
    (["generate", "x", "--temperature", "nan"], "temperature: got nan"),
    (["generate", "x", "--temperature", "hot"], "--temperature: got 'hot', expected a number"),
    (["generate", "x", "--top-p", "0"], "top_p: got 0.0"),
    (["generate", "x", "--max-tokens", "0"], "max_tokens: got 0"),
    (["generate", "x", "--stop-token-ids", "1,,2"], "--stop-token-ids: got ''"),
    (["generate", "x", "--seed", "1", "--seed", "2"], "--seed: given twice"),
    (["generate", "x", "--max-num-seqs=1", "--max_num_seqs", "2"], "--max-num-seqs: given twice"),
    (["generate", "x", "--ignore-eos", "--no-ignore-eos"], "--no-ignore-eos: given twice"),
    (["generate", "x", "--stream", "--json"], "--stream: not with --json"),
    (["generate", "-", "-"], "PROMPT: - is given twice"),
    (["chat", "--quick"], "--quick: expected one argument"),
    (["chat", "one", "stray"], "stray"),
    (["chat", "one", "--model", "two"], "MODEL: given twice"),
    (["chat", "--model-name", "x"], "--model-name: only with --url"),
    (["chat", "--url", "http://127.0.0.1:9", "--max-num-seqs", "3"], "--max-num-seqs: not with --url"),
    (["complete", "--url", "http://127.0.0.1:9"], "--url: http://127.0.0.1:9: "),
    (["complete", "--url", "gopher://x"], "base_url: got 'gopher://x'"),
    (["demo", "a", "b"], "b"),
    (["collect-env", "--jsn"], "did you mean '--json'"),
    (["convert", "only-a-source"], "DST: missing"),
]


@pytest.mark.parametrize("argv, problem", USAGE, ids=[" ".join(argv) for argv, _ in USAGE])
def test_usage_errors_are_one_line_and_2(run, monkeypatch: pytest.MonkeyPatch, argv: list[str], problem: str):
    monkeypatch.setattr(jaxpaged.llm, "LLM", None)  # nothing may be loaded
    assert_one_line(run(*argv), cli.EXIT_USAGE, problem)


def test_errors_of_the_model_are_one_line_and_3(run, model: str, tmp_path: Path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    assert_one_line(run("generate", "x", "--model", str(tmp_path / "nowhere")), cli.EXIT_CHECKPOINT, "no such directory")
    assert_one_line(run("generate", "x", "--model", str(tmp_path / "file")), cli.EXIT_CHECKPOINT, "is a file")
    assert_one_line(run("chat", "--model", str(tmp_path / "empty")), cli.EXIT_CHECKPOINT, "config.json", "missing")
    assert_one_line(run("demo", str(tmp_path / "empty")), cli.EXIT_CHECKPOINT, "config.json", "missing")
    assert_one_line(run("convert", str(tmp_path / "nowhere"), str(tmp_path / "out")), cli.EXIT_CHECKPOINT, "no such directory")


def test_requests_and_limits_that_the_model_refuses_are_2(run, model: str):
    flags = ["--model", model, "--enforce-eager", *SMALL]
    assert_one_line(run("generate", "x" * 999, *flags), cli.EXIT_USAGE, "the limit is 255 (max_model_len 256")
    assert_one_line(run("generate", "", *flags), cli.EXIT_USAGE, "prompt is empty")
    assert_one_line(run("generate", "x", "--model", model, "--max-model-len", "4k"), cli.EXIT_USAGE, "max_model_len: got 4,000")
    result = run("generate", "hello " * 9, *flags, "--num-gpu-blocks-override", "2", "--block-size", "8")
    assert_one_line(result, cli.EXIT_USAGE, "the whole page pool holds 8")


def test_too_little_memory_is_4(run, model: str):
    result = run("generate", "x", "--model", model, *SMALL, "--num-gpu-blocks-override", "1g")
    assert_one_line(result, cli.EXIT_RESOURCES, "GiB", "free")


@pytest.mark.parametrize(
    "error, code",
    [
        (OSError(errno.ENOSPC, "No space left on device", "cache"), cli.EXIT_RESOURCES),
        (MemoryError(), cli.EXIT_RESOURCES),
        (RuntimeError("RESOURCE_EXHAUSTED: out of memory\nlong\nstory"), cli.EXIT_RESOURCES),
        (KeyboardInterrupt(), cli.EXIT_INTERRUPTED),
    ],
)
def test_what_the_machine_refuses_is_one_line(run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int):
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(jaxpaged.llm, "LLM", fails)
    assert_one_line(run("generate", "x"), code)


def test_only_a_bug_shows_a_traceback(run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxpaged.llm, "LLM", lambda **_: 1 // 0)
    result = run("generate", "x")
    assert result.code == cli.EXIT_BUG and "Traceback" in result.err
    assert result.err.splitlines()[-1].startswith("jaxpaged: error: a bug (ZeroDivisionError)")


# --- generate ----------------------------------------------------------------------------------------------------


def test_generate_prints_the_texts_and_nothing_else(run, model: str):
    flags = ["--model", model, "--temperature", "0", "--max-tokens", "8", *SMALL]
    one = run("generate", "hello", *flags)
    assert one.code == 0 and "1 prompt, 8 tokens" in one.err
    several = run("generate", "hello", "one day", *flags)
    as_json = run("generate", "hello", "one day", "--json", *flags)
    lines = [json.loads(line) for line in as_json.out.splitlines()]
    assert [line["prompt"] for line in lines] == ["hello", "one day"]
    assert one.out == lines[0]["text"] + "\n"
    assert several.out == "".join(f"--- {line['prompt']}\n{line['text']}\n" for line in lines)
    assert [len(line["token_ids"]) for line in lines] == [8, 8] and lines[0]["finish_reason"] == "length"
    assert run("generate", "hello", "one day", "--stream", *flags).out == several.out


def test_generate_reads_stdin_and_says_more_when_asked(run, model: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    result = run("generate", "-", "--json", "-v", "--model", model, "--max-tokens", "2", *SMALL)
    assert json.loads(result.out)["prompt"] == "hello\n"
    assert "jaxpaged: GPU KV cache size: " in result.err and "Compiled" in result.err


# --- chat --------------------------------------------------------------------------------------------------------


def test_chat_remembers_and_forgets(run, model: str, monkeypatch: pytest.MonkeyPatch):
    asked: list[list[dict[str, str]]] = []
    original = jaxpaged.llm.LLM.chat_prompt

    def noted(self: Any, messages: Any, **options: Any) -> Any:
        asked.append(list(messages))
        return original(self, messages, **options)

    monkeypatch.setattr(jaxpaged.llm.LLM, "chat_prompt", noted)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"hello\n\nagain\n{'x' * 900}\n/help\n/reset\nnew\n/exit\nnever\n"))
    flags = ["--model", model, "--max-tokens", "4", "--temperature", "0", *SMALL]
    result = run("chat", "--system-prompt", "Be brief.", *flags)
    assert result.code == 0
    contents = [[message["content"] for message in messages] for messages in asked]
    first, second = contents[:2]
    assert first == ["Be brief.", "hello"]
    assert second[:2] == first and second[3:] == ["again"]
    assert contents[2][-1] == "x" * 900 and "max_model_len" in result.err and "/reset starts over" in result.err
    assert contents[3:] == [["Be brief.", "new"]]
    assert result.out.startswith(second[2] + "\n")
    quick = run("chat", "-q", "hello", "--system-prompt", "Be brief.", *flags)
    assert quick.out == second[2] + "\n"


def test_chat_needs_a_template(run, model: str, tmp_path: Path):
    write_text_model(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert_one_line(
        run("chat", "-q", "x", "--model", str(tmp_path), "--enforce-eager", *SMALL),
        cli.EXIT_USAGE,
        "the model has no chat template",
    )


# --- demo --------------------------------------------------------------------------------------------------------


def test_the_demo_shows_numbers_that_agree(run, model: str):
    result = run("demo", model, "--num-gpu-blocks-override", "65", "--block-size", "16")
    assert result.code == 0, result.out + result.err
    for index in range(len(demo.PROMPTS)):
        assert f"demo-{index + 1} ends" in result.out
    assert "64 pages of 16 tokens, which is 4.0 sequences of full length" in result.out
    assert "2 (K and V) x 2 heads x 16 x 2 layers x 4 bytes = 0.5 KiB" in result.out
    assert "8 sequences x 256 tokens x 0.5 KiB = 1 MiB" in result.out
    assert "8 of 8 prompts give the very same tokens alone" in result.out and "0 preemptions" in result.out


def test_the_demo_survives_too_few_pages(run, model: str):
    result = run("demo", model, "--num-gpu-blocks-override", "31", "--block-size", "8", "--max-model-len", "240")
    assert result.code == 0, result.out + result.err
    assert "preemption" in result.out and "0 preemptions" not in result.out and "8 of 8 prompts" in result.out


def test_the_demo_fails_when_a_prompt_alone_says_something_else(run, model: str, monkeypatch: pytest.MonkeyPatch):
    original = jaxpaged.llm.LLM.generate

    def other(self: Any, prompts: Any, params: Any, **options: Any) -> Any:
        return original(self, [7, 8, 9], params, **options)

    monkeypatch.setattr(jaxpaged.llm.LLM, "generate", other)
    result = run("demo", model)
    assert result.code == 1 and "differs alone, from token" in result.out and "0 of 8 prompts" in result.out


def test_the_live_view_draws(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(demo, "_FRAME_S", 0.0)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["demo", model]) == 0
    out = capsys.readouterr().out
    assert "■" in out and "text so far" in out and "8 of 8" in out


# --- the rest ----------------------------------------------------------------------------------------------------


def test_convert_is_the_converter(run, model: str, tmp_path: Path):
    result = run("convert", model, str(tmp_path / "out"), "--quiet", "--verify")
    assert result.code == 0 and "all as converted" in result.out
    flags = ["--temperature", "0", "--max-tokens", "4", *SMALL]
    assert (
        run("generate", "hello", "--model", str(tmp_path / "out"), *flags).out
        == run("generate", "hello", "--model", model, *flags).out
    )


def test_collect_env_in_a_process_of_its_own():
    code = "import sys; from jaxpaged.cli import main; main(['collect-env', '--json']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(done.stdout)
    assert found["packages"]["jaxpaged"] == __version__ and found["packages"]["jax"]
    assert found["devices"]["backend"] and found["system"]["cpu"] and "GiB" in found["system"]["memory"]
    assert str(Path.home()) not in done.stdout or len(str(Path.home())) == 1
    assert "torch" not in done.stderr.splitlines()[-1].split()


def test_collect_env_as_text(run):
    result = run("collect-env")
    assert result.code == 0 and result.out.startswith("system\n")
    assert {"cpu topology", "packages", "devices", "jax options", "compiled steps"} <= set(result.out.splitlines())


def test_ctrl_c_ends_a_process_with_130(model: str):
    argv = [
        sys.executable,
        "-m",
        "jaxpaged",
        "generate",
        "hello",
        "--model",
        model,
        "--enforce-eager",
        "--ignore-eos",
        "--stream",
    ]
    with subprocess.Popen([*argv, "--max-tokens", "200"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)  # it generates
        process.send_signal(signal.SIGINT)
        error = process.stderr.read()
    if process.returncode != 0:  # the machine may have been quicker than the signal
        assert (process.returncode, error) == (cli.EXIT_INTERRUPTED, "jaxpaged: error: interrupted\n")


def test_a_closed_pipe_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "jaxpaged", "--help"], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writing)
    assert done.returncode == cli.EXIT_PIPE and done.stderr == "" and time.monotonic() - started < 60
