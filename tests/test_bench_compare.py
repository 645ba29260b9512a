"""`bench --compare`: peers in processes of their own answer what they were asked, or end the comparison with a reason."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text_model import FAST, write_text_model

from jaxpaged import cli, framed
from jaxpaged.bench import compare, compare_table, peer
from jaxpaged.bench.datasets import DatasetOptions, Ids, asks
from jaxpaged.bench.peers import gguf_file
from jaxpaged.config import ConfigError

FAKE = Path(__file__).parent / "fake_peer.py"
SMALL = [f"--{name.replace('_', '-')}={value[0] if isinstance(value, tuple) else value}" for name, value in FAST.items()][:-1]


def fake(monkeypatch: pytest.MonkeyPatch, wrong: str = "") -> peer.Peer:
    """A peer that goes wrong in one way. Unlike a real one it finds this package."""
    monkeypatch.setattr(peer, "_NOT_INHERITED", ())
    monkeypatch.setenv("PYTHONPATH", str(Path(peer.__file__).parents[2]))
    one = peer.Wanted("vllm", "float32")
    load = {"model": wrong, "max_model_len": 64, "max_num_seqs": 4, "num_threads": 3, "options": {}}
    return peer.Peer(one, load, timeout_s=60.0, script=FAKE)


def group(pid: int) -> list[int]:
    """Living processes of a group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(state[2]) == pid and state[0] != "Z":
                found.append(int(entry.name))
    return found


def is_gone(pid: int) -> bool:
    """Whether nothing of a group lives; what was killed may take a moment to end."""
    deadline = time.monotonic() + 10
    while group(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not group(pid)


def test_a_peer_answers_what_it_is_asked_and_is_gone_when_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    one = fake(monkeypatch)
    one.load()
    assert one.loaded == {"versions": {"fake": "1.0"}, "dtype": "float32", "threads": 3, "variable": "3"}
    assert one.tokens([[5], [1, 9]], [3, 1]) == [[6, 7, 8], [10]] and one.seconds == 4.0
    assert one.trace([5], 3) == ([2.0, 2.5, 3.0], [6, 7, 8])
    pid = one.pid
    assert pid is not None and group(pid)
    one.close()
    one.close()
    assert is_gone(pid)
    with pytest.raises(peer.PeerError, match="is not loaded"):
        one.tokens([[5]], [1])
    one.load()  # again, as when only one of them fits into memory
    assert one.tokens([[5]], [1]) == [[6]]
    one.close()


WRONGS = [
    ("raise", "vllm:float32: load: ValueError: no such model"),
    ("die", "died"),
    ("hang", "no answer to 'run' in 0.5 s"),
    ("garbage", "died, or said what is no answer, at 'run'"),
    ("fewer", r"made \[2\] tokens, asked for \[3\]"),
    ("no time", "expected seconds and tokens"),
]


@pytest.mark.parametrize(("wrong", "words"), WRONGS)
def test_a_peer_that_goes_wrong_ends_with_a_reason_and_leaves_nothing(
    wrong: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = fake(monkeypatch, wrong)
    pids: list[int] = []
    started = peer.subprocess.Popen

    def popen(*given: Any, **options: Any) -> Any:
        process = started(*given, **options)
        pids.append(process.pid)
        return process

    monkeypatch.setattr(peer.subprocess, "Popen", popen)
    with pytest.raises(peer.PeerError, match=words) as caught:
        one.load()
        one._timeout_s = 0.5 if wrong == "hang" else 60.0
        one.tokens([[5]], [3])
    assert len(pids) == 1 and is_gone(pids[0]) and not one.is_loaded
    if wrong == "die":
        assert "the last words" in str(caught.value)


def test_a_trace_of_too_few_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one = fake(monkeypatch, "fewer")
    one.load()
    with pytest.raises(peer.PeerError, match="expected 4 times and as many tokens"):
        one.trace([5], 4)


def test_a_peer_ends_with_all_that_it_started_when_its_pipe_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the process that measures is killed: nobody calls close."""
    one = fake(monkeypatch, "hang")
    one.load()
    process = one._process
    assert process is not None and process.stdin is not None
    deadline = time.monotonic() + 20
    framed.send(process, json.dumps({"do": "run", "prompts": [[5]], "num_outputs": [3]}).encode(), deadline)
    while len(group(process.pid)) < 3 and time.monotonic() < deadline:  # it, the shell's sleeps
        time.sleep(0.05)
    assert len(group(process.pid)) >= 3
    process.stdin.close()
    assert is_gone(process.pid)
    one.close()


class Counted:
    """A contender whose speed is told."""

    def __init__(self, name: str, seconds: list[float], log: list[str], tokens: list[list[int]]):
        self.name, self.loaded, self.seconds = name, {"versions": {name: "1"}}, 0.0
        self._left, self._log, self._tokens = list(seconds), log, tokens

    def load(self) -> None:
        self._log.append(f"load {self.name}")

    def tokens(self, prompts: list[list[int]], num_outputs: list[int]) -> list[list[int]]:
        self._log.append(self.name)
        self.seconds = self._left.pop(0)
        return self._tokens

    def trace(self, prompt: list[int], num_output: int) -> tuple[list[float], list[int]]:
        raise NotImplementedError

    def close(self) -> None:
        self._log.append(f"close {self.name}")


@pytest.mark.parametrize("is_together", [True, False])
def test_rounds_are_in_turn_and_ratios_are_of_one_round(is_together: bool) -> None:
    log: list[str] = []
    # The first of each (of each loading) is a warm-up. The machine was twice as slow in the second round: the ratio is 3 in both.
    theirs = [9.0, 3.0, 6.0] if is_together else [9.0, 3.0, 9.0, 6.0]
    sides = [Counted("ours", [9.0, 1.0, 2.0], log, [[1, 2, 3, 4]]), Counted("theirs", theirs, log, [[1, 2, 9, 4]])]
    turn = compare.throughput_turn([[7, 7]], [4])
    found = compare.in_turn(sides, turn, rounds=2, is_together=is_together, sleep=lambda seconds: None)
    again = ["theirs"] if is_together else ["close theirs", "load theirs", "theirs", "theirs", "close theirs"]
    expected = ["load ours", "ours", "ours", "load theirs", "theirs", "theirs"]
    assert log == expected + (["ours", *again] if is_together else [again[0], "ours", *again[1:]])
    numbers = compare.summary(found, ["output_tokens_per_second"])
    assert numbers["sides"]["ours"]["output_tokens_per_second"] == 3.0  # of 4 and 2 tokens a second
    ratio = numbers["ratios"]["theirs"]["output_tokens_per_second"]
    assert ratio["ratio"] == pytest.approx(3) and ratio["lowest"] == pytest.approx(3) and ratio["highest"] == pytest.approx(3)
    assert numbers["sides"]["theirs"]["same_tokens"] == 0.5  # two of four before the first difference
    on = {"cpu": "a chip", "cores": 2, "memory_gib": 4.0, "python": "3", "load_average": 0.5}
    numbers |= {"num_rounds": 2, "peers_loaded": "all loaded at once", "machine": on, "command": "jaxpaged bench"}
    assert "| theirs | 1.0 | 1.5 | 3.00 | 3.00-3.00 | 3.00-3.00 | 50% |" in compare_table.markdown(numbers)
    assert "more than 1 is faster" in compare_table.text(numbers) and "a chip, 2 cores" in compare_table.text(numbers)


def test_what_compare_names_is_checked_before_anything_is_loaded(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert [one.name for one in peer.wanted("vllm,llamacpp", "bfloat16", {})] == ["vllm:bfloat16", "llamacpp:bf16"]
    [static] = peer.wanted("hf-static:float32", "bfloat16", {"hf": "/p"})
    assert (static.name, static.python) == ("hf-static:float32", "/p")
    for text, pythons, words in (
        ("vlm", {}, "did you mean 'vllm'"),
        ("llamacpp:int8", {}, "of: bf16, f16, f32, q8_0, q4_0"),
        ("hf,hf", {}, "named twice"),
        ("hf", {"torch": "/p"}, "peer_python"),
    ):
        with pytest.raises(ConfigError, match=words):
            peer.wanted(text, "float32", pythons)
    for argv, words in (
        (["throughput", "--rounds", "3"], "--rounds: needs --compare"),
        (["throughput", "--compare", "hf", "--n", "2"], "--n: not with --compare"),
        (["throughput", "--compare", "hf", "--enable-prefix-caching"], "not with --compare"),
        (["throughput", "--compare", "hf", "--peer-options", "hf=3"], "--peer-options: hf: expected a JSON object"),
        (["latency", "--compare", "hf", "--batch-size", "2"], "with --compare it is 1"),
    ):
        assert cli.main(["bench", *argv]) == cli.EXIT_USAGE
        assert words in capsys.readouterr().err
    with pytest.raises(peer.PeerError, match="No such file"):
        peer.check(peer.Wanted("hf", "float32", str(tmp_path / "no")))
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(
        peer.PeerError, match=r"has no llama_cpp and no gguf\. Install it there: pip install llama-cpp-python gguf"
    ):
        peer.check(peer.Wanted("llamacpp", "f32", str(bare)))


@pytest.mark.usefixtures("own_logger")
def test_the_commands_compare(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(write_text_model(tmp_path_factory.mktemp("text-model")))
    monkeypatch.setattr(peer, "check", lambda one: None)
    monkeypatch.setattr("jaxpaged.cli.compare.check", lambda one: None)
    monkeypatch.setattr(
        "jaxpaged.cli.compare.Peer", lambda one, load, timeout_s: peer.Peer(one, load, timeout_s=timeout_s, script=FAKE)
    )
    monkeypatch.setattr(peer, "_NOT_INHERITED", ())
    monkeypatch.setenv("PYTHONPATH", str(Path(peer.__file__).parents[2]))
    many = [
        "throughput",
        "--num-prompts=4",
        "--random-input-len-range=2,20",
        "--random-output-len-range=2,9",
        "--skip-tokenizer-init",
    ]
    one = ["latency", "--input-len=5", "--output-len=5"]
    for argv, key in ((many, "output_tokens_per_second"), (one, "tpot")):
        file = str(tmp_path / "x.json")
        argv = ["bench", *argv, "--model", model, *SMALL, "--compare=vllm", "--rounds=2", "--json", "--output-json", file]
        assert cli.main(argv) == 0
        numbers = json.loads(capsys.readouterr().out)
        ours, theirs = (numbers["sides"][name] for name in ("jaxpaged:float32", "vllm:float32"))
        assert theirs[key] == (1.0 if key != "tpot" else 0.5) and len(theirs["rounds"]) == 2
        assert numbers["ratios"]["vllm:float32"][key]["ratio"] == pytest.approx(
            np.median([a[key] / b[key] for a, b in zip(ours["rounds"], theirs["rounds"], strict=True)])
        )
        assert numbers[key] == ours[key] and numbers["num_rounds"] == 2 and theirs["loaded"]["versions"] == {"fake": "1.0"}
        assert compare_table.main([file]) == 0 and "| vllm:float32 |" in capsys.readouterr().out


def test_gguf_turns_pairs_of_neighbours_where_hugging_face_turns_halves() -> None:
    """The law behind the new order of q's rows: both ropes give the same products of q and k."""
    rng, heads, size, width = np.random.default_rng(0), 3, 8, 5
    q, k = rng.normal(size=(heads * size, width)), rng.normal(size=(heads * size, width))
    x, y = rng.normal(size=width), rng.normal(size=width)
    frequencies = 100.0 ** (-np.arange(size // 2) / (size // 2))

    def halves(vector: np.ndarray, place: int) -> np.ndarray:
        a, b = vector[: size // 2], vector[size // 2 :]
        cos, sin = np.cos(place * frequencies), np.sin(place * frequencies)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin])

    def neighbours(vector: np.ndarray, place: int) -> np.ndarray:
        turned = (vector[0::2] + 1j * vector[1::2]) * np.exp(1j * place * frequencies)
        return np.stack([turned.real, turned.imag], axis=1).ravel()

    def products(matrix_q: np.ndarray, matrix_k: np.ndarray, turn: Any) -> list[float]:
        pairs = zip((matrix_q @ x).reshape(heads, size), (matrix_k @ y).reshape(heads, size), strict=True)
        return [float(turn(one, 11) @ turn(other, 4)) for one, other in pairs]

    ours = products(q, k, halves)
    assert products(gguf_file.in_pairs(q, heads), gguf_file.in_pairs(k, heads), neighbours) == pytest.approx(ours)
    assert products(q, k, neighbours) != pytest.approx(ours)


def test_gguf_reads_all_types_and_refuses_what_it_would_write_wrong(tmp_path: Path) -> None:
    import ml_dtypes
    from safetensors.numpy import save_file

    from jaxpaged.checkpoint import safetensors

    values = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    save_file({"a": values, "h": values.astype(np.float16)}, tmp_path / "1.safetensors")
    safetensors.write(tmp_path / "2.safetensors", {"b": values.astype(ml_dtypes.bfloat16)})
    found = dict(gguf_file.tensors(tmp_path))
    assert (found["a"] == values).all() and (found["h"] == values.astype(np.float16)).all()
    assert found["b"].dtype == np.float32 and (found["b"] == values.astype(ml_dtypes.bfloat16).astype(np.float32)).all()
    assert gguf_file.new_name("model.layers.11.self_attn.q_norm.weight") == "blk.11.attn_q_norm.weight"
    with pytest.raises(ValueError, match=r"self_attn\.q_proj\.bias"):
        gguf_file.new_name("model.layers.0.self_attn.q_proj.bias")
    for config, words in (
        ({"model_type": "gemma3"}, "model_type 'gemma3'"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "llama3"}}, "rope type 'llama3'"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias is set"),
    ):
        with pytest.raises(ValueError, match=words):
            gguf_file._check(config, "m")


def test_signals_of_the_terminal_are_not_for_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    one = fake(monkeypatch)
    one.load()
    assert one.pid is not None and os.getpgid(one.pid) == one.pid != os.getpgrp()
    os.killpg(one.pid, signal.SIGTERM)
    with pytest.raises(peer.PeerError, match="died"):
        one.tokens([[5]], [1])


def test_log_uniform_lengths_and_prompts_of_token_ids() -> None:
    options = DatasetOptions(num_prompts=4000, random_input_len_range=(16, 511), random_output_len_range=(1, 3), seed=3)
    found = asks(options, Ids(50))
    lengths = [ask.num_prompt for ask in found]
    assert min(lengths) == 16 and max(lengths) > 490 and max(lengths) <= 511
    for low in (16, 32, 64, 128, 256):  # five doublings, each as likely: 800 +- 25
        assert 690 < sum(low <= length < 2 * low for length in lengths) < 910
    assert {ask.num_output for ask in found} == {1, 2, 3}
    ids = [token for ask in found for token in ask.prompt]
    assert set(ids) == set(range(50)) and all(len(ask.prompt) == ask.num_prompt for ask in found)
    assert asks(options, Ids(50)) == found != asks(dataclasses.replace(options, seed=4), Ids(50))
    shared = asks(DatasetOptions(num_prompts=3, random_prefix_len=7, random_input_len=2), Ids(50))
    assert len({ask.prompt[:7] for ask in shared}) == 1 and len({ask.prompt for ask in shared}) == 3
    for bounds in ((5,), (0, 5), (6, 5)):
        with pytest.raises(ConfigError, match="random_input_len_range: got"):
            DatasetOptions(random_input_len_range=bounds)
    with pytest.raises(ConfigError, match="tokenizer: missing"):
        Ids(50).count("a text")
