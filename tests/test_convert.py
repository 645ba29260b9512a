"""Converting: bit-exact both ways, readable by orbax, small in memory, and polite about everything that is in the way."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from checkpoints import DTYPES, FAMILIES, config_values, write_model, write_shards

from convert.cli import main
from convert.disk import Disk
from convert.job import convert, verify
from convert.staging import ResourceError, UsageError, locked
from jaxpaged.checkpoint import CheckpointError, load, open_checkpoint, safetensors
from jaxpaged.config import ModelConfig
from jaxpaged.model.weights import declare, get, to_hf

CASES = [(family, dtype, shards) for family in FAMILIES for dtype, shards in (("bfloat16", 3), ("float32", 1))]


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path in sorted(directory.glob("*.safetensors")):
        file = safetensors.SafetensorsFile(path)
        found |= {name: file.read(tensor) for name, tensor in file.tensors.items()}
        file.close()
    return found


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name, array in a.items():
        assert array.dtype == b[name].dtype and array.shape == b[name].shape and array.tobytes() == b[name].tobytes(), name


def listing(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


# --- round trips -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "dtype", "shards"), CASES)
def test_round_trip_is_bit_exact(tmp_path: Path, family: str, dtype: str, shards: int):
    tensors = write_model(tmp_path / "hf", family, dtype=dtype, shards=shards)
    convert(tmp_path / "hf", tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back", layout="hf", max_shard_bytes=1500 if shards > 1 else 10**9)
    assert (tmp_path / "back" / "model.safetensors.index.json").exists() == (shards > 1)
    assert_same(tensors, tensors_of(tmp_path / "back"))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    for made in ("orbax", "back"):
        assert verify(tmp_path / made)[1] == []
        checkpoint = open_checkpoint(tmp_path / made)
        assert checkpoint.kind == ("orbax" if made == "orbax" else "hf") and checkpoint.config.eos_token_ids == (2, 3)
        assert_same(tensors, dict(to_hf(load(checkpoint, dtype), checkpoint.config)))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "phi3"])
def test_round_trip_of_models_saved_by_transformers(tmp_path: Path, torch: Any, name: str):
    transformers = pytest.importorskip("transformers")
    values = {key: value for key, value in config_values(name).items() if key != "architectures"}
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "hf", max_shard_size="8KB")
    convert(tmp_path / "hf", tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back", layout="hf")
    assert_same(tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    for (parameter, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert a.dtype == b.dtype and a.equal(b), parameter


@pytest.mark.parametrize("family", ["llama-biases", "qwen3"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_orbax_opens_the_result(tmp_path: Path, family: str, dtype: str):
    """As a plain tree, and into a tree of arrays on devices. Its keys are the paths of our parameters."""
    import orbax.checkpoint as ocp

    write_model(tmp_path / "hf", family, dtype=dtype)
    convert(tmp_path / "hf", tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    weights = load(checkpoint, dtype)
    for checkpointer in (ocp.StandardCheckpointer(), ocp.PyTreeCheckpointer()):
        with checkpointer:
            tree = checkpointer.restore(tmp_path / "out" / "weights")
        assert len(jax.tree.leaves(tree)) == len(declare(checkpoint.config))
        for parameter in declare(checkpoint.config):
            node = tree
            for step in parameter.path:
                node = node[step]
            assert node.dtype == DTYPES[dtype] and node.tobytes() == np.asarray(get(weights, parameter.path)).tobytes()

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), tree)
    with ocp.StandardCheckpointer() as checkpointer:
        placed = checkpointer.restore(tmp_path / "out" / "weights", target)
    assert isinstance(placed["embed"], jax.Array)
    assert all(
        np.asarray(a).tobytes() == b.tobytes() for a, b in zip(jax.tree.leaves(placed), jax.tree.leaves(tree), strict=True)
    )


def test_orbax_refuses_a_missing_chunk_too(tmp_path: Path):
    """A chunk that is gone must not read as zeros, even for a user who does not load through us."""
    import orbax.checkpoint as ocp

    write_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out")
    (tmp_path / "out" / "weights" / "norm" / "0").unlink()
    with pytest.raises(Exception, match="missing"), ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.restore(tmp_path / "out" / "weights")


@pytest.mark.parametrize("wanted", DTYPES)
def test_dtype_casts_weights_and_configuration(tmp_path: Path, wanted: str):
    tensors = write_model(tmp_path / "hf", dtype="float32")
    cast = {name: tensor.astype(DTYPES[wanted]) for name, tensor in tensors.items()}
    convert(tmp_path / "hf", tmp_path / "orbax", dtype=wanted)
    convert(tmp_path / "orbax", tmp_path / "back", layout="hf")
    convert(tmp_path / "hf", tmp_path / "direct", layout="hf", dtype=wanted)
    for made in ("back", "direct"):
        assert_same(cast, tensors_of(tmp_path / made))
    assert open_checkpoint(tmp_path / "orbax").config.dtype == open_checkpoint(tmp_path / "direct").config.dtype == wanted


def test_each_parameter_keeps_its_dtype_and_mixed_ones_need_a_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tensors = write_model(tmp_path / "hf")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    write_shards(tmp_path / "hf", tensors)
    convert(tmp_path / "hf", tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back", layout="hf")
    assert_same(tensors, tensors_of(tmp_path / "back"))

    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float32)
    write_shards(tmp_path / "hf", tensors)
    assert main([str(tmp_path / "hf"), str(tmp_path / "no"), "--quiet"]) == 3
    assert "layers.0.gate_up: made of different dtypes" in capsys.readouterr().err
    assert main([str(tmp_path / "hf"), str(tmp_path / "yes"), "--quiet", "--dtype", "bfloat16"]) == 0


def test_equal_sources_give_equal_bytes(tmp_path: Path):
    write_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "a")
    convert(tmp_path / "hf", tmp_path / "b")
    assert listing(tmp_path / "a") == listing(tmp_path / "b")


def test_manifest_names_every_parameter(tmp_path: Path):
    write_model(tmp_path / "hf", "qwen3")
    convert(tmp_path / "hf", tmp_path / "out")
    values = json.loads((tmp_path / "out" / "manifest.json").read_text())
    parameters = declare(ModelConfig.from_hf(config_values("qwen3")))
    assert list(values["tensors"]) == [parameter.name for parameter in parameters]
    embed = values["tensors"]["embed"]
    assert (embed["shape"], embed["dtype"], embed["bytes"]) == ([96, 16], "bfloat16", 96 * 16 * 2) and len(embed["sha256"]) == 64
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} < set(values["files"])
    # The digest file is that of the usual tool.
    check = subprocess.run(["sha256sum", "-c", "manifest.sha256"], cwd=tmp_path / "out", capture_output=True, check=False)
    assert check.returncode == 0


# --- memory ------------------------------------------------------------------------------------------------------

MEMORY_SCRIPT = """
import sys
from convert.job import convert

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

before = peak()
convert(sys.argv[1], sys.argv[2], layout=sys.argv[3], dtype=sys.argv[4] if len(sys.argv) > 4 else None)
print(peak() - before)
"""


def test_peak_memory_is_that_of_one_parameter(tmp_path: Path):
    """240 MB in three shards, the largest parameter 16.8 MB: a copy of the whole, or of one shard, would show."""
    shape = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 4096, "num_key_value_heads": 4}
    write_model(tmp_path / "hf", dtype="float32", shards=3, **shape)
    parameters = declare(open_checkpoint(tmp_path / "hf").config)
    largest, total = (4 * function(parameter.size for parameter in parameters) for function in (max, sum))
    assert total > 200e6 > 3 * largest + 64e6

    def peak(*arguments: str) -> int:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run(
            [sys.executable, "-c", MEMORY_SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=True
        )
        return int(run.stdout)

    peaks = {
        "to orbax": peak(str(tmp_path / "hf"), str(tmp_path / "out"), "orbax"),
        "to orbax, cast": peak(str(tmp_path / "hf"), str(tmp_path / "cast"), "orbax", "bfloat16"),
        "back": peak(str(tmp_path / "out"), str(tmp_path / "back"), "hf"),
    }
    print(
        {name: f"{value / 1e6:.0f} MB" for name, value in peaks.items()},
        f"largest {largest / 1e6:.1f} MB, all {total / 1e6:.0f} MB",
    )
    for value in peaks.values():
        assert value < 3 * largest + 64e6


# --- what is in the way ------------------------------------------------------------------------------------------


def test_a_second_run_finds_the_work_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_model(tmp_path / "hf")
    arguments = [str(tmp_path / "hf"), str(tmp_path / "out"), "--quiet"]
    assert main(arguments) == 0 and "converted in" in capsys.readouterr().out
    before = listing(tmp_path / "out")
    assert main(arguments) == 0 and "already converted" in capsys.readouterr().out
    assert listing(tmp_path / "out") == before and sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_a_stopped_run_is_taken_up(tmp_path: Path):
    """What was finished is not written again; what was finished and then damaged is."""
    write_model(tmp_path / "hf")

    class Stopping(Disk):
        def __init__(self, stop: bool):
            self.stop, self.written = stop, []

        def before(self, operation: str, path: Path) -> None:
            if operation == "create":
                self.written.append(path.parent.name)
            if self.stop and operation == "create" and path.parent.name == "norm":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "hf", tmp_path / "out", disk=Stopping(True))
    assert not (tmp_path / "out").exists()
    (staging,) = tmp_path.glob("out.converting-*")
    chunk = staging / "checkpoint" / "weights" / "layers.0.down" / "0.0"
    content = bytearray(chunk.read_bytes())
    content[7] ^= 1
    chunk.write_bytes(content)
    (staging / "done.jsonl").write_bytes((staging / "done.jsonl").read_bytes() + b'["config.js')

    disk = Stopping(False)
    convert(tmp_path / "hf", tmp_path / "out", disk=disk)
    assert "norm" in disk.written and "embed" not in disk.written and disk.written.count("layers.0.down") == 1
    assert verify(tmp_path / "out")[1] == [] and not list(tmp_path.glob("out.converting*"))


def test_an_existing_target_is_replaced_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_model(tmp_path / "one")
    write_model(tmp_path / "two", seed=1)
    convert(tmp_path / "one", tmp_path / "out")
    arguments = [str(tmp_path / "two"), str(tmp_path / "out"), "--quiet"]
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"jaxpaged: error: {tmp_path / 'out'}: exists; --overwrite replaces it\n"
    old = verify(tmp_path / "out")[0].job
    assert main([*arguments, "--overwrite"]) == 0
    manifest, problems = verify(tmp_path / "out")
    assert not problems and manifest.job != old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out", "two"]


def test_a_damaged_target_is_repaired_when_asked(tmp_path: Path):
    write_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out")
    sound = listing(tmp_path / "out")
    chunk = tmp_path / "out" / "weights" / "norm" / "0"
    chunk.write_bytes(b"\0" * len(chunk.read_bytes()))
    with pytest.raises(UsageError, match="exists; --overwrite replaces it"):
        convert(tmp_path / "hf", tmp_path / "out")
    convert(tmp_path / "hf", tmp_path / "out", overwrite=True)
    assert listing(tmp_path / "out") == sound


@pytest.mark.parametrize("kind", ["foreign", "hf", "extra file", "extra file inside", "file", "link"])
def test_never_replaces_what_it_did_not_make(tmp_path: Path, kind: str):
    write_model(tmp_path / "hf")
    target = tmp_path / "out"
    if kind == "foreign":
        target.mkdir()
        (target / "thesis.txt").write_text("years")
    elif kind == "hf":
        write_model(target, seed=1)
    elif kind.startswith("extra"):
        write_model(tmp_path / "other", seed=1)
        convert(tmp_path / "other", target)
        (target / ("weights/norm/notes" if "inside" in kind else "notes")).write_text("mine")
    elif kind == "file":
        target.write_text("years")
    else:
        write_model(tmp_path / "other", seed=1)
        convert(tmp_path / "other", tmp_path / "real")
        target.symlink_to("real")
    before = listing(tmp_path)
    with pytest.raises(UsageError):
        convert(tmp_path / "hf", target, overwrite=True)
    assert listing(tmp_path) == before


def test_an_empty_folder_is_a_fine_target(tmp_path: Path):
    write_model(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    convert(tmp_path / "hf", tmp_path / "out")
    assert verify(tmp_path / "out")[1] == [] and sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_a_foreign_folder_in_the_place_of_ours(tmp_path: Path):
    """A folder that has the very name of our working folder, and no mark of ours."""
    write_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out")
    staging = tmp_path / f"again.converting-{verify(tmp_path / 'out')[0].job[:12]}"
    staging.mkdir()
    (staging / "thesis.txt").write_text("years")
    with pytest.raises(UsageError, match="was not made by convert"):
        convert(tmp_path / "hf", tmp_path / "again")
    assert [path.name for path in staging.iterdir()] == ["thesis.txt"]


def test_the_working_folder_of_another_job_is_left_and_named(tmp_path: Path):
    write_model(tmp_path / "one")
    write_model(tmp_path / "two", seed=1)
    with pytest.raises(OSError, match="No space"):
        convert(tmp_path / "one", tmp_path / "out", disk=FailingDisk(40, errno.ENOSPC))
    result = convert(tmp_path / "two", tmp_path / "out")
    (staging,) = tmp_path.glob("out.converting-*")
    assert len(result.notes) == 1 and str(staging) in result.notes[0]
    convert(tmp_path / "one", tmp_path / "out", overwrite=True)  # which takes it up
    assert not list(tmp_path.glob("out.converting-*"))


def test_two_converters_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_model(tmp_path / "hf")
    with locked(tmp_path / "out", Disk()):
        with pytest.raises(ResourceError, match="another conversion into it is running"):
            convert(tmp_path / "hf", tmp_path / "out")
        assert main([str(tmp_path / "hf"), str(tmp_path / "out"), "--quiet"]) == 4
        convert(tmp_path / "hf", tmp_path / "other")
    convert(tmp_path / "hf", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "other", "out"]


def test_many_converters_at_once(tmp_path: Path):
    """Eight processes into one target: each ends well or is told to wait, and the result is whole."""
    write_model(tmp_path / "hf")
    script = "import sys; from convert.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(tmp_path / "hf"), str(tmp_path / "out"), "--quiet"]
    runs = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) for _ in range(4)]
    codes = [(run.communicate(timeout=120), run.returncode)[1] for run in runs]
    assert 0 in codes and set(codes) <= {0, 4}
    assert verify(tmp_path / "out")[1] == [] and sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


@pytest.mark.parametrize("case", ["same", "inside", "around", "no parent", "root"])
def test_impossible_targets(tmp_path: Path, case: str):
    write_model(tmp_path / "a" / "hf")
    source = tmp_path / "a" / "hf"
    target = {
        "same": source,
        "inside": source / "out",
        "around": tmp_path / "a",
        "no parent": tmp_path / "x" / "y",
        "root": Path("/"),
    }[case]
    before = listing(tmp_path)
    with pytest.raises(UsageError):
        convert(source, target, overwrite=True)
    assert listing(tmp_path) == before


# --- a failing disk ------------------------------------------------------------------------------------------------


class FailingDisk(Disk):
    """The n-th change fails, and every later one of its kind: a full disk stays full."""

    def __init__(self, at: int, error: int):
        self.count, self._at, self._error = 0, at, error
        self._broken: str | None = None

    def before(self, operation: str, path: Path) -> None:
        self.count += 1
        if self.count == self._at:
            self._broken = operation
        if operation == self._broken:
            raise OSError(self._error, os.strerror(self._error), str(path))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_failing_disk_is_one_line_and_the_next_run_succeeds(tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int):
    write_model(tmp_path / "hf", num_hidden_layers=1)
    write_model(tmp_path / "older", num_hidden_layers=1, seed=1)
    arguments = [str(tmp_path / "hf"), str(tmp_path / "out"), "--quiet", "--overwrite"]
    convert(tmp_path / "older", tmp_path / "out")
    old = listing(tmp_path / "out")
    for at in range(1, 230, 23):
        capsys.readouterr()
        code = main(arguments, disk=FailingDisk(at, number))
        output = capsys.readouterr()
        if listing(tmp_path / "out") == old:
            assert code == 4 and output.err.startswith("jaxpaged: error: ") and os.strerror(number) in output.err
            assert output.err.count("\n") == 1
        else:
            assert verify(tmp_path / "out")[1] == []
            assert main([str(tmp_path / "older"), str(tmp_path / "out"), "--quiet", "--overwrite"]) == 0
            old = listing(tmp_path / "out")
    assert main(arguments) == 0 and verify(tmp_path / "out")[1] == []


def test_a_real_limit_on_file_size(tmp_path: Path):
    """The kernel itself stops the write in the middle of a tensor."""
    write_model(tmp_path / "hf", vocab_size=4096)
    script = (
        "import resource, sys; from convert.cli import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); sys.exit(main(sys.argv[1:]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(tmp_path / "hf"), str(tmp_path / "out"), "--quiet"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 4 and run.stderr.count("\n") == 1 and "embed" in run.stderr and "File too large" in run.stderr
    convert(tmp_path / "hf", tmp_path / "out")
    assert verify(tmp_path / "out")[1] == []


def test_not_enough_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import shutil

    write_model(tmp_path / "hf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ResourceError, match=r"needs [\d,]+ bytes, has 1,000"):
        convert(tmp_path / "hf", tmp_path / "out")


# --- the command ---------------------------------------------------------------------------------------------------


def test_verify_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_model(tmp_path / "hf")
    assert main([str(tmp_path / "hf"), str(tmp_path / "out"), "--quiet", "--verify"]) == 0
    assert "all as converted" in capsys.readouterr().out
    assert main(["--verify", str(tmp_path / "out")]) == 0
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    (tmp_path / "out" / "weights" / "norm" / "0").unlink()
    capsys.readouterr()
    assert main(["--verify", str(tmp_path / "out")]) == 3
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and "(and 1 more, listed above)" in output.err
    assert "tokenizer.json: 2 bytes, manifest.json says" in output.out and "norm/0: missing" in output.out
    assert main(["--verify", str(tmp_path / "hf")]) == 3
    assert "not made by convert" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "needle"),
    [
        ([], 2, "SRC"),
        (["here"], 2, "DST: missing"),
        (["here", "there", "--dtype", "float8"], 2, "float8"),
        (["here", "there", "--ovrwrite"], 2, "--ovrwrite"),
        (["a b/c d", "there"], 3, "no such directory"),
        (["--verify", "nowhere"], 3, "no such directory"),
    ],
)
def test_usage(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    needle: str,
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    output = capsys.readouterr()
    assert needle in output.err and "Traceback" not in output.err and not list(tmp_path.iterdir())


def test_interrupt_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_model(tmp_path / "hf")

    class Interrupted(Disk):
        def before(self, operation: str, path: Path) -> None:
            if path.name == "0":
                raise KeyboardInterrupt

    assert main([str(tmp_path / "hf"), str(tmp_path / "out"), "--quiet"], disk=Interrupted()) == 130
    assert capsys.readouterr().err == "jaxpaged: error: interrupted; run the same command again to go on\n"


def test_help_is_quick_and_needs_no_jax():
    script = "import sys; from convert.cli import main; main(['--help']); print('jax' in sys.modules, 'numpy' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.endswith("False False\n") and "examples:" in run.stdout and "exit codes:" in run.stdout
    module = subprocess.run(
        [sys.executable, "-m", "convert", "--help"], env=environment, capture_output=True, text=True, check=True
    )
    assert module.stdout == run.stdout.removesuffix("False False\n")


# --- orbax directories that are not whole: table B4 --------------------------------------------------------------


def rewrite_manifest(directory: Path, old: str, new: str) -> None:
    """An edit that also renews the digest: what is left to find it are the checks of the content."""
    import hashlib

    text = (directory / "manifest.json").read_text()
    assert old in text
    (directory / "manifest.json").write_text(text.replace(old, new, 1))
    digest = hashlib.sha256((directory / "manifest.json").read_bytes()).hexdigest()
    (directory / "manifest.sha256").write_text(f"{digest}  manifest.json\n")


DAMAGES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "no commit marker": (lambda d: (d / "manifest.sha256").unlink(), ("checkpoint is incomplete (no manifest.sha256)", "rerun")),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), ("checkpoint is incomplete (no manifest.json)", "rerun")),
    "edited manifest": (lambda d: (d / "manifest.json").write_text("{}"), ("manifest.json", "digest in manifest.sha256")),
    "no orbax metadata": (lambda d: (d / "weights" / "_METADATA").unlink(), ("_METADATA: missing",)),
    "no orbax commit": (lambda d: (d / "weights" / "_CHECKPOINT_METADATA").unlink(), ("_CHECKPOINT_METADATA: missing",)),
    "missing array": (lambda d: (d / "weights" / "norm" / "0").unlink(), ("norm/0: missing",)),
    "extra array": (lambda d: (d / "weights" / "norm" / "1").write_bytes(b"0"), ("norm/1: not in manifest.json",)),
    "temporary of orbax": (
        lambda d: (d / "weights" / "x.orbax-checkpoint-tmp-1").write_bytes(b"0"),
        ("x.orbax-checkpoint-tmp-1: not in manifest.json",),
    ),
    "truncated chunk": (
        lambda d: os.truncate(d / "weights" / "embed" / "0.0", 100),
        ("embed/0.0: 100 bytes, manifest.json says 3,072",),
    ),
    "chunk is a link": (
        lambda d: (
            (d / "weights" / "norm" / "0").rename(d.parent / "x"),
            (d / "weights" / "norm" / "0").symlink_to(d.parent / "x"),
        ),
        ("norm/0: not a regular file",),
    ),
    "other version": (
        lambda d: rewrite_manifest(d, '"format_version": 1', '"format_version": 2'),
        ("format", "version 2", "convert again"),
    ),
    "other shape": (
        lambda d: rewrite_manifest(d, "96,\n    16", "16,\n    96"),
        ("embed", "[16, 96]", "the model needs [96, 16]"),
    ),
    "other dtype": (lambda d: rewrite_manifest(d, '"dtype": "bfloat16"', '"dtype": "float32"'), ("embed", "float32")),
    "unknown dtype": (lambda d: rewrite_manifest(d, '"dtype": "bfloat16"', '"dtype": "int8"'), ("embed", "int8")),
    "path out of the directory": (
        lambda d: rewrite_manifest(d, '"file": "weights/embed/0.0"', '"file": "../weights/embed/0.0"'),
        ("manifest.json", "../weights/embed/0.0"),
    ),
    "list of files is a list": (lambda d: rewrite_manifest(d, '"files": {', '"files": [], "x": {'), ("manifest.json",)),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_orbax_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str):
    apply, needles = DAMAGES[case]
    write_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "m")
    apply(tmp_path / "m")
    before = listing(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load(open_checkpoint(tmp_path / "m"), "bfloat16")
    assert main([str(tmp_path / "m"), str(tmp_path / "out"), "--to-hf", "--quiet"]) == 3
    assert capsys.readouterr().err == f"jaxpaged: error: {caught.value}\n"
    assert all(needle in str(caught.value) for needle in needles) and "\n" not in str(caught.value)
    assert listing(tmp_path) == before


def test_digests_are_read_unless_told_otherwise(tmp_path: Path):
    write_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "m")
    chunk = tmp_path / "m" / "weights" / "embed" / "0.0"
    content = bytearray(chunk.read_bytes())
    content[0] ^= 1
    chunk.write_bytes(content)
    checkpoint = open_checkpoint(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"embed/0\.0: content differs from its digest"):
        load(checkpoint, "bfloat16")
    load(checkpoint, "bfloat16", verify=False)


def test_a_moved_checkpoint_loads(tmp_path: Path):
    import shutil

    write_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "m")
    shutil.copytree(tmp_path / "m", tmp_path / "ein Ort ü")
    load(open_checkpoint(tmp_path / "ein Ort ü"), "bfloat16")
