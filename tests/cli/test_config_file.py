"""Options from files: those that come along are options, flags win, and what is wrong is told in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxpaged.admission import QueueOptions
from jaxpaged.cli import config_file, main, serve
from jaxpaged.cli.options import UsageError
from jaxpaged.config import EngineConfig
from jaxpaged.server.options import ServerOptions

pytest.importorskip("yaml", reason="the extra `serve` is not installed")


def read(tmp_path: Path, text: str) -> dict[str, Any]:
    path = tmp_path / "some.yaml"
    path.write_text(text)
    return config_file.read(str(path), serve.KINDS)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `serve` would load and listen with."""
    found: dict[str, Any] = {}
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    import jaxpaged.async_llm
    import jaxpaged.server.run

    monkeypatch.setattr(jaxpaged.async_llm.AsyncLLM, "from_options", lambda **options: found.update(options))
    monkeypatch.setattr(jaxpaged.server.run, "serve", lambda llm, options, bound, **_: found.update(server=options))
    return found


@pytest.mark.parametrize("name", ["online-chat", "batch", "low-cost"])
def test_those_that_come_along_load(name: str, served: dict[str, Any]) -> None:
    assert config_file.shipped() == ["batch", "low-cost", "online-chat"]
    assert main(["serve", "--config", name, "--port", "0"]) == 0
    assert served["queue"] != QueueOptions() and served["server"] != ServerOptions(port=0)
    assert len(served) > 4, "options of the engine too"
    config = EngineConfig.from_options(**{key: one for key, one in served.items() if hasattr(EngineConfig, key)})
    assert config != EngineConfig()


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path, served: dict[str, Any]) -> None:
    path = tmp_path / "some.yml"
    text = "model: other\nmax-num-seqs: 4\nmax_queued_tokens: 4k\nenable-prefix-caching: false\nserved-model-name: [a, b]\n"
    path.write_text(
        text + "drain_s:\ndecode_row_buckets: [2, 4]\nspeculative_config: {method: ngram, num_speculative_tokens: 2}\n"
    )
    assert main(["serve", "mine", "--config", str(path), "--max-num-seqs", "8", "--port", "0"]) == 0
    assert (served["model"], served["max_num_seqs"], served["enable_prefix_caching"]) == ("mine", 8, False)
    assert served["queue"].max_queued_tokens == 4000 and served["decode_row_buckets"] == (2, 4)
    assert served["server"].served_model_name == ("a", "b") and served["server"].drain_s == ServerOptions().drain_s
    assert main(["serve", "--config", str(path), "--enable-prefix-caching", "--port", "0"]) == 0
    assert (served["model"], served["enable_prefix_caching"]) == ("other", True)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("max_num_seq: 4", "did you mean 'max_num_seqs'"),
        ("max_num_seqs: 4\nmax-num-seqs: 5", "given twice"),
        ("port: 1\nport: 2", "given twice"),
        ("max_num_seqs: many", "expected a whole number"),
        ("- a", "expected options"),
        ("5: 6", "unknown option '5'"),
        ("port: [", "expected the node content"),
        ("port: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: &a [x]\nb: *a", "aliases"),
        ("[" * 5000, ""),
        ("port: " + "9" * 70_000, "more than 65,536 bytes"),
        ("port: " + "9" * 6_000, ""),
        ("port: \x00", ""),
    ],
)
def test_what_is_no_option_is_refused_in_one_line(
    tmp_path: Path, text: str, told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError) as refused:
        read(tmp_path, text)
    assert told in str(refused.value) and len(str(refused.value)) < 400
    assert main(["serve", "--config", str(tmp_path / "some.yaml")]) == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_values_are_checked_as_those_of_flags_are(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for text, told in (("port: 99999", "port: got 99999"), ("max_num_seqs: true", "max_num_seqs"), ("host: 5", "host: got 5")):
        (tmp_path / "some.yaml").write_text(text)
        assert main(["serve", "--config", str(tmp_path / "some.yaml")]) == 2
        assert told in capfd.readouterr().err


def test_a_name_that_is_none_is_told_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'online-chat'"):
        config_file.read("online_chat", serve.KINDS)
    with pytest.raises(UsageError, match="No such file"):
        config_file.read("nowhere.yaml", serve.KINDS)
