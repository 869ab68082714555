"""``fetch``, with the hubs' real clients, against a hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from golden.eras import make_checkout
from qwen_surgery import files as disk
from qwen_surgery.cli import main
from qwen_surgery.errors import Usage
from qwen_surgery.fetching.names import repository
from tests.fetching.hub import COMMIT, LARGE, FakeHub, serving, sha256

REPO = "Qwen/Qwen-7B-Chat"
NOT_NEEDED = {
    "README.md": b"# Qwen\n",
    "LICENSE": b"a licence\n",
    "cache_autogptq_cuda_256.cpp": b"int main() {}\n",
    "pytorch_model-00001-of-00001.bin": b"P" * LARGE,
    "pytorch_model.bin.index.json": b'{"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}',
    "assets/config.json": b"{}",
}
CODE = {"config.json", "modeling_qwen.py", "configuration_qwen.py", "model.safetensors.index.json"}
SHARDS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A small checkout's files by name, among some that nobody needs."""
    folder = tmp_path_factory.mktemp("upstream") / "Qwen-7B-Chat"
    make_checkout(folder, shards=2)
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert found.keys() >= CODE | SHARDS and all(len(found[name]) > LARGE for name in SHARDS)
    return found | NOT_NEEDED


@pytest.fixture
def hub(checkout: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.chdir(tmp_path)
    for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT", "HF_TOKEN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with serving(FakeHub(REPO, dict(checkout))) as hub:
        yield hub


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


@pytest.fixture
def run(hub: FakeHub, capsys: pytest.CaptureFixture[str]):
    """``qwen-surgery fetch`` from *hub*, in the folder of the test."""

    def call(*args: str, name: str = "Qwen-7B-Chat", endpoint: str = hub.url) -> Said:
        with pytest.raises(SystemExit) as stop:
            main(["fetch", name, *args, "--endpoint", endpoint])
        said = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return Said(stop.value.code, said.out, said.err)

    return call


def _there(folder: str = "Qwen-7B-Chat") -> dict[str, bytes]:
    """The checkout that was fetched, without what a client keeps for itself."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if not path.name.startswith(".")}


BOTH = pytest.mark.parametrize("source", ["hf", "modelscope"])


@BOTH
def test_what_is_needed_comes_and_nothing_else(run, hub: FakeHub, source: str) -> None:
    done = run("--from", source)
    assert done.code == 0, done.err
    there = _there()
    assert there == {name: data for name, data in hub.files.items() if name not in NOT_NEEDED}
    assert done.out == "Qwen-7B-Chat\n"
    for shard in SHARDS:  # which shards, and how large, is said
        assert f"{shard}  {len(there[shard]):,} bytes" in done.err
    assert "GB of disk are free" in done.err
    assert not [path for _, path, _, _ in hub.requests if path.endswith((".bin", ".md", ".cpp"))]


@BOTH
def test_code_only_brings_no_weights_and_is_enough_for_patch(run, hub: FakeHub, source: str) -> None:
    assert run("--from", source, "--code-only").code == 0
    assert set(_there()) >= CODE and not SHARDS & set(_there())
    for args in (["patch", "Qwen-7B-Chat", "--diff"], ["survey", "Qwen-7B-Chat"]):
        with pytest.raises(SystemExit) as stop:
            main(args)
        assert stop.value.code == 0, args


@BOTH
def test_a_second_run_transfers_nothing_and_completes_what_code_only_left(
    run, hub: FakeHub, source: str
) -> None:
    assert run("--from", source, "--code-only").code == 0
    hub.requests.clear()
    done = run("--from", source, "--json")
    assert set(json.loads(done.out)["transferred"]) == SHARDS
    assert not any(hub.sent(name) for name in CODE)
    hub.requests.clear()
    done = run("--from", source, "--json")
    assert json.loads(done.out)["transferred"] == []
    assert not any(hub.sent(name) for name in SHARDS)


@BOTH
def test_a_dropped_connection_is_resumed_where_it_broke(
    run, hub: FakeHub, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard of gigabytes that starts anew at every drop never arrives."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)  # its unit of writing: 10 MiB
    shard = min(SHARDS)
    hub.drops[shard] = 1000
    done = run("--from", source)
    assert done.code == 0, done.err
    assert hub.sent(shard)[-1] == "bytes=1000-"
    assert _there()[shard] == hub.files[shard]


@BOTH
def test_a_killed_run_is_completed_by_the_next(hub: FakeHub, tmp_path: Path, source: str) -> None:
    """What came whole stays. Of the file that was on its way, ModelScope's client goes on where it stopped;
    Hugging Face's begins it anew, and what the killed one left must not fill the disk."""
    shard = max(SHARDS)
    hub.files[shard] = hub.files[shard][:8] + os.urandom(8 << 20)
    hub.stalls[shard] = 6 << 20
    args = [sys.executable, "-m", "qwen_surgery", "fetch", REPO, "--endpoint", hub.url, "--from", source]
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(args, env=environ, cwd=tmp_path, stderr=subprocess.DEVNULL) as first:
        _wait_for(lambda: (tmp_path / "Qwen-7B-Chat" / min(SHARDS)).exists())
        _wait_for(lambda: _begun(tmp_path, source))
        first.kill()
    size = _begun(tmp_path, source)[0].stat().st_size
    hub.requests.clear()
    again = subprocess.run(args, env=environ, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert hub.sent(shard) == [f"bytes={size}-" if source == "modelscope" else None]
    assert not hub.sent(min(SHARDS))
    assert _there()[shard] == hub.files[shard]
    assert not list(tmp_path.rglob("*.incomplete"))


def _begun(folder: Path, source: str) -> list[Path]:
    """The shard that is on its way, as the client calls it."""
    if source == "modelscope":
        return [path for path in folder.rglob("*.safetensors.incomplete") if path.stat().st_size]
    return list((folder / "Qwen-7B-Chat/.cache").rglob("*.incomplete"))  # large ones are written in 10 MiB


def _wait_for(found: Callable[[], Any]) -> Any:
    for _ in range(600):
        if value := found():
            return value
        time.sleep(0.1)
    raise AssertionError("the client got nothing in a minute")


def test_a_wrong_hash_is_seen_and_the_file_removed(run, hub: FakeHub) -> None:
    """The client compares sizes only: a mirror's spoiled shard would become a model that talks nonsense."""
    shard = max(SHARDS)
    hub.spoiled.add(shard)
    done = run()
    assert done.code == 4
    assert done.err.splitlines()[-1].startswith(f"error: {shard} as it came has another sha256")
    assert "run the same command again" in done.err.splitlines()[-1]
    assert shard not in _there()
    hub.spoiled.clear()
    assert run().code == 0 and sha256(_there()[shard]) == sha256(hub.files[shard])


def test_a_wrong_small_file_is_seen_by_its_git_hash(run, hub: FakeHub) -> None:
    hub.spoiled.add("config.json")
    done = run()
    assert done.code == 4 and "config.json as it came has another git hash" in done.err
    assert "config.json" not in _there() and not hub.sent(min(SHARDS))


def test_modelscope_with_a_wrong_hash_leaves_no_wrong_file(run, hub: FakeHub) -> None:
    """Its client looks at hashes itself, tries again, and gives up."""
    hub.spoiled.add("config.json")
    done = run("--from", "modelscope")
    assert done.code == 4 and "run the same command again" in done.err.splitlines()[-1]
    assert "config.json" not in _there()


@BOTH
def test_a_shard_that_the_hub_lacks_is_told_before_any_is_fetched(run, hub: FakeHub, source: str) -> None:
    gone = max(SHARDS)
    del hub.files[gone]
    done = run("--from", source)
    assert done.code == 3
    assert f"it has no {gone}, which model.safetensors.index.json names" in done.err.splitlines()[-1]
    assert not hub.sent(min(SHARDS))


@BOTH
def test_no_such_model_is_one_line(run, source: str) -> None:
    done = run("--from", source, name="Qwen/Qwen-8B")
    assert done.code == 3
    assert "has no model Qwen/Qwen-8B for you" in done.err.splitlines()[-1]
    assert len(done.err.splitlines()) == 1


@BOTH
def test_no_such_revision_is_one_line(run, source: str) -> None:
    done = run("--from", source, "--revision", "v9")
    assert done.code == 3 and "has no revision v9" in done.err.splitlines()[-1]


def test_a_revision_is_asked_for_by_its_commit(run, hub: FakeHub) -> None:
    """Else a push between two files would mix two revisions."""
    done = run("--revision", "main", "--json")
    assert json.loads(done.out)["revision"] == COMMIT
    asked = [path for _, path, _, _ in hub.requests if "/resolve/" in path]
    assert asked and all(f"/resolve/{COMMIT}/" in path for path in asked)


def test_a_hub_that_is_down_says_what_to_do(run, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.down = True
    done = run()
    assert done.code == 4 and "--endpoint or HF_ENDPOINT names a mirror" in done.err.splitlines()[-1]


def test_an_address_that_nobody_answers_at(run) -> None:
    done = run(endpoint="http://127.0.0.1:9")
    assert done.code == 4 and "http://127.0.0.1:9" in done.err.splitlines()[-1]


def test_a_token_is_not_given_to_a_mirror(run, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """--endpoint may name anybody's server: it would get the user's account."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-secret")
    for source in ("hf", "modelscope"):
        assert run("--from", source, source).code == 0
    assert {authorization for *_, authorization in hub.requests} == {None}


@pytest.mark.parametrize(
    ("source", "variable"), [("hf", "HF_ENDPOINT"), ("modelscope", "MODELSCOPE_ENDPOINT")]
)
def test_the_clients_own_variables_name_the_hub(
    hub: FakeHub, tmp_path: Path, source: str, variable: str
) -> None:
    """A machine behind a mirror is set up once, for every program."""
    done = subprocess.run(
        [sys.executable, "-m", "qwen_surgery", "fetch", "qwen-7b-chat", "--code-only", "--from", source],
        env=os.environ | {variable: hub.url, "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Qwen-7B-Chat\n" and set(_there()) >= CODE


def test_what_is_there_and_different_is_never_overwritten(run, hub: FakeHub) -> None:
    """A patched checkout, or somebody's edit, must survive a second fetch."""
    folder = Path("Qwen-7B-Chat")
    folder.mkdir()
    (folder / "config.json").write_text('{"mine": true}')
    done = run()
    assert done.code == 3
    assert "nothing is overwritten" in done.err.splitlines()[-1]
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"config.json": '{"mine": true}'}


def test_a_full_disk_is_told_before_the_weights(run, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("--code-only").code == 0
    monkeypatch.setattr(disk, "free_disk", lambda folder: 1000)
    done = run()
    assert done.code == 4
    assert done.err.splitlines()[-1].startswith(f"error: {REPO} needs ")
    assert not any(hub.sent(name) for name in SHARDS)


def test_a_model_of_another_kind_is_refused_before_its_weights(run, hub: FakeHub) -> None:
    hub.files["config.json"] = b'{"model_type": "llama"}'
    done = run()
    assert done.code == 3 and "model_type llama" in done.err.splitlines()[-1]
    assert not any(hub.sent(name) for name in SHARDS)


def test_names_that_lead_elsewhere_are_not_taken(run, hub: FakeHub, tmp_path: Path) -> None:
    """A listing comes from a server: it may name any path."""
    hub.files |= {"../outside.py": b"evil = 1\n", "sub/inside.py": b"evil = 1\n"}
    assert run("--code-only").code == 0
    assert not (tmp_path / "outside.py").exists() and not Path("Qwen-7B-Chat/sub").exists()


def test_an_index_that_is_none_is_refused(run, hub: FakeHub) -> None:
    hub.files["model.safetensors.index.json"] = b'{"weight_map": [1]}'
    done = run()
    assert done.code == 3 and "not a weight index" in done.err.splitlines()[-1]


def test_a_repository_with_bin_only_gives_its_bin(run, hub: FakeHub) -> None:
    """Early revisions have nothing else."""
    for name in [*SHARDS, "model.safetensors.index.json"]:
        del hub.files[name]
    assert run().code == 0
    assert "pytorch_model-00001-of-00001.bin" in _there()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Qwen-7B-Chat", "Qwen/Qwen-7B-Chat"),
        ("qwen-1.8b-chat", "Qwen/Qwen-1_8B-Chat"),
        ("Qwen-72B", "Qwen/Qwen-72B"),
        ("Qwen-14B-Chat-Int4", "Qwen/Qwen-14B-Chat-Int4"),
        ("Qwen2-7B", "Qwen/Qwen2-7B"),
        ("someone/my-tune", "someone/my-tune"),
    ],
)
def test_short_names(name: str, found: str) -> None:
    assert repository(name) == found


@pytest.mark.parametrize("name", ["llama", "a/b/c", "../x", "a/..", "/etc"])
def test_names_that_mean_nothing(name: str) -> None:
    with pytest.raises(Usage):
        repository(name)
