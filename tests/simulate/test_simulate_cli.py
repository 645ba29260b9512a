"""`jaxpaged simulate`: what it prints, that a report can be made again, and one line for everything that goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpaged import cli
from jaxpaged.simulate.run import OPTIONS

pytestmark = pytest.mark.usefixtures("own_logger")

SMALL = ("--num-prompts", "20", "--dataset-name", "alpaca", "--request-rate", "50")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def run(*argv: str) -> tuple[int, str, str]:
        code = cli.main(["simulate", *argv])
        return code, *capsys.readouterr()

    return run


def test_a_table_names_its_assumptions(run):
    code, out, err = run(*SMALL, "--goodput", "ttft:500", "tpot:50")
    assert code == 0 and err.startswith("jaxpaged: simulated ") and err.count("\n") == 1
    assert "llama-3-8b on H100, 7,116 pages of 64 tokens (bfloat16)" in out
    assert "assumed: 75% of 3.35 TB/s, 65% of 989.4 TFLOP/s, 0.5 ms a step" in out
    assert "goodput" in out and "Time to first token" in out


def test_memory_is_told_when_asked(run):
    _, _, err = run(*SMALL, "-v")
    assert "weights (bfloat16): 15.0 GiB" in err and "GPU KV cache size: 455,360 tokens" in err
    assert "Maximum concurrency for 8,192 tokens per request: 55.59x" in err


def test_a_report_can_be_made_again(run):
    first, second, other = (run(*SMALL, "--json", "--seed", seed)[1] for seed in ("1", "1", "2"))
    assert first == second != other
    found = json.loads(first)
    assert found["completed"] == 20 and found["setting"]["seed"] == 1 and found["setting"]["gpu"] == "H100"
    assert found["setting"].keys() >= OPTIONS


def test_json_is_json(run):
    def refuse(word: str) -> None:
        raise ValueError(word)

    _, out, _ = run("--num-prompts", "2", "--request-rate", "inf", "--json")
    assert json.loads(out, parse_constant=refuse)["setting"]["request_rate"] == "inf"


def test_options_reach_the_scheduler(run):
    _, out, _ = run(*SMALL, "--json", "--max-num-seqs", "3", "--num-gpu-blocks-override", "50", "--block-size", "16")
    found = json.loads(out)
    assert found["max_running_requests"] <= 3 and found["num_gpu_blocks"] == 49
    assert json.loads(run(*SMALL, "--json", "--max-concurrency", "2")[1])["max_concurrent_requests"] == 2
    slow = json.loads(run(*SMALL, "--json", "--step-overhead-ms", "100")[1])
    assert slow["mean_tpot_ms"] > 100


def test_lengths_are_read(run):
    for words, tokens in (("30", 60), ("lognormal:30:0", 60), ("30:30", 60), ("3k", 6000)):
        assert json.loads(run("--num-prompts", "2", "--output-len", "4", "--input-len", words, "--json")[1])[
            "total_input_tokens"
        ] == (tokens)


def test_a_trace_is_served(run, tmp_path: Path):
    path = tmp_path / "day.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n100,30,5\n101,40,6\n103,9000,1\n")
    code, out, err = run("--trace", str(path), "--json")
    found = json.loads(out)
    assert code == 0 and (found["completed"], found["failed"], found["total_output_tokens"]) == (2, 1, 11)
    assert "1 refused, the first: prompt has 9,000 tokens, the limit is 8,191" in err
    assert 1.0 < found["duration"] < 1.1
    assert json.loads(run("--trace", str(path), "--num-prompts", "1", "--json")[1])["completed"] == 1


def test_measured_steps_take_the_place_of_the_roofline(run, tmp_path: Path):
    path = tmp_path / "steps.json"
    path.write_text(json.dumps({"steps": [{"decode_rows": 8, "prefill_tiles": 9, "num_context": 1, "seconds": 0.25}]}))
    code, out, _ = run("--step-times", str(path), "--num-prompts", "1", "--input-len", "50", "--output-len", "5", "--json")
    found = json.loads(out)
    assert code == 0 and (found["mean_ttft_ms"], found["mean_tpot_ms"], found["duration"]) == (250.0, 250.0, 1.25)


MEMORY = ("memory", "--num-prompts", "50", "--kv-cache-memory-bytes", "1G")


def test_the_memory_experiment(run):
    code, out, _ = run(*MEMORY, "--json")
    found = json.loads(out)
    assert code == 0 and found["setting"]["kv_cache_memory_bytes"] == 2**30 and found["setting"]["block_size"] == 16
    assert [(load["load"], load["kind"]) for load in found["loads"][-2:]] == [("mixed", "contiguous"), ("mixed", "paged")]
    assert len(found["loads"]) == 8 and all(0 < load["utilisation"] <= 1 for load in found["loads"])


def test_the_sharing_experiment(run):
    argv = ("sharing", "--num-prompts", "2")
    code, out, _ = run(*argv, "--json")
    found = json.loads(out)
    assert code == 0 and (found["setting"]["gpu"], found["setting"]["model"]) == ("A100-40GB", "llama-2-13b")
    assert [(saving["dataset"], saving["n"]) for saving in found["savings"][:6]] == [
        (dataset, n) for dataset in ("alpaca", "sharegpt") for n in (2, 4, 6)
    ]
    assert len(found["savings"]) == 12 and len(found["sensitivity"]) == 4
    assert found["savings"][-1]["published_high"] == 0.663
    _, shown, _ = run(*argv)
    for saving in found["savings"]:
        alone, owned, saved = saving["num_alone"], saving["num_owned"], saving["saved"]
        assert saved == pytest.approx((alone - owned) / alone) and f"({alone:,.1f} - {owned:,.1f}) / {alone:,.1f}" in shown
        assert f"{saved:.1%}" in shown
    assert "983 pages of 16 tokens" in shown and "37.6%-55.2%" in shown


def test_outputs_beams_and_priorities_reach_the_scheduler(run):
    plain, several, beams = (
        json.loads(run("--num-prompts", "5", "--input-len", "40", "--output-len", "30", "--json", *argv)[1])
        for argv in ((), ("--n", "3"), ("--n", "3", "--use-beam-search"))
    )
    assert (plain["total_output_tokens"], several["total_output_tokens"], beams["total_output_tokens"]) == (150, 450, 450)
    assert plain["kv_saved_by_sharing"] == 0 < several["kv_saved_by_sharing"] < beams["kv_saved_by_sharing"]
    assert beams["setting"]["n"] == 3 and beams["setting"]["beam_kinship"] > 0 and "beam_kinship" not in plain["setting"]
    crowd = ("--num-prompts", "100", "--output-len", "10:90", "--num-priorities", "2", "--max-num-seqs", "8", "--json")
    by_rank, by_time = (run(*crowd, "--scheduling-policy", policy)[1] for policy in ("priority", "fcfs"))
    assert json.loads(by_rank)["std_ttft_ms"] != json.loads(by_time)["std_ttft_ms"]


def test_a_directory_is_a_model(run, tmp_path: Path):
    values = {"model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "max_position_embeddings": 256, "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    code, out, _ = run("--model", str(tmp_path), "--input-len", "20", "--num-prompts", "2", "--json")
    found = json.loads(out)["setting"]
    assert code == 0 and (found["max_model_len"], found["dtype"]) == (256, "float32")


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--gpu", "H10"], "gpu: got 'H10', did you mean 'H100'"),
        (["--model", "llama-3-8"], "model: got 'llama-3-8', did you mean 'llama-3-8b'"),
        (["--gup", "H100"], "unknown flag '--gup', did you mean '--gpu'"),
        (["memry"], "got 'memry', expected nothing, 'memory' or 'sharing'"),
        (["memory", "memory"], "got 'memory memory'"),
        (["--num-prompts", "0"], "num_prompts: got 0"),
        (["--max-concurrency", "0"], "max_concurrency: got 0"),
        (["--request-rate", "-1"], "request_rate: got -1"),
        (["--input-len", "0"], "--input-len: got a length of 0"),
        (["--input-len", "a:b:c"], "--input-len: got 'a:b:c', expected N, LOW:HIGH or lognormal:MEAN:SIGMA"),
        (["--dataset-name", "sharegtp"], "dataset_name: got 'sharegtp', did you mean 'sharegpt'"),
        (["--dataset-name", "alpaca", "--input-len", "3"], "--input-len: not with --dataset-name"),
        (["--trace", "x", "--request-rate", "3"], "--request-rate: not with --trace"),
        (["--trace", "/none"], "/none: cannot be read"),
        (["--step-times", "x", "--flops-efficiency", "1"], "--flops-efficiency: not with --step-times"),
        (["memory", "--goodput", "ttft:3"], "--goodput: not with memory"),
        (["memory", "--n", "3"], "--n: not with memory"),
        (["sharing", "--n", "3"], "--n: not with sharing"),
        (["sharing", "--beam-kinship", "2"], "kinship: got 2, expected a number in [0, 1]"),
        (["sharing", "--num-prompts", "3", "--num-gpu-blocks-override", "6"], "sharegpt, parallel sampling: "),
        (["--trace", "x", "--use-beam-search"], "--use-beam-search: not with --trace"),
        (["--n", "0"], "n: got 0, expected a whole number in [1, 128]"),
        (["--goodput", "ttft"], "--goodput: got 'ttft', expected NAME:MS"),
        (["--goodput", "ttft:soon"], "--goodput: ttft: got 'soon', expected a number"),
        (["--goodput", "tft:3"], "goodput: got 'tft', did you mean 'ttft'"),
        (["--metric-percentiles", "50,101"], "metric_percentiles: got 101"),
        (["--block-size", "17"], "block_size: got 17, expected one of"),
        (["--max-model-len", "1M"], "max_model_len: got 1,048,576, the model's max_position_embeddings is 8,192"),
        (["--model", "llama-3-70b"], "less 131.4 GiB of weights leaves room for 0 pages"),
        (["--bandwidth-efficiency", "7"], "bandwidth_efficiency: got 7"),
        (["--enforce-eager"], "unknown flag '--enforce-eager'"),  # it would change nothing here
    ],
)
def test_bad_usage_is_one_line(argv: list[str], problem: str, run):
    code, out, err = run(*argv)
    assert code == cli.EXIT_USAGE and out == ""
    assert err.startswith("jaxpaged: error: ") and err.count("\n") == 1 and problem in err


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (SMALL, "Time to first token"),
        (MEMORY, "1.00 GiB / 2,097,152 bytes = 512 pages"),
        (("--num-prompts", "3", "--n", "2", "--use-beam-search"), "pages saved by sharing"),
    ],
)
def test_jax_stays_out(argv: tuple[str, ...], shown: str):
    code = "import sys; from jaxpaged.cli import main; print(main(['simulate', *sys.argv[1:]]), *sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=60, check=True)
    result, *modules = done.stderr.splitlines()[-1].split()
    assert result == "0" and shown in done.stdout
    assert not {"jax", "numpy", "transformers", "rich"} & set(modules)
