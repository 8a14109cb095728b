"""Models of the hub, from a hub on loopback: what the cache lacks is fetched, what nobody reads is not, and a cache that has
everything is asked alone."""

import hashlib
import logging
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from command_line import INVALID, assert_error, run_command
from offload.errors import ModelError
from offload.model.locate import locate_model
from text_models import save_text_model

NAME, COMMIT = "org/m", "a" * 40
SECOND_COPIES = (
    "consolidated.safetensors",
    "original/consolidated.00.safetensors",
    "model.fp16.safetensors",
    "onnx/model.safetensors",
    "pytorch_model.bin",
)


class Hub:
    """Serves `folder` as NAME; `asked` has the files, as they are asked for. `cache` is the client's."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache, self.asked = folder, cache, list[str]()
        self.snapshot = cache / "models--org--m" / "snapshots" / COMMIT
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                name = self.path.split("?")[0].partition(f"/{NAME}/resolve/")[2].partition("/")[2]
                hub.asked.append(name)
                path = hub.folder / name
                body = path.read_bytes() if name and path.is_file() else None
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Length", str(len(body or b"")))
                self.send_header("X-Repo-Commit", COMMIT)
                if body is None:
                    self.send_header("X-Error-Code", "EntryNotFound")
                else:
                    self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body or b"")

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def cached(self) -> set[str]:
        return {str(path.relative_to(self.snapshot)) for path in self.snapshot.rglob("*") if path.is_file()}

    def put_into_cache(self, *patterns: str) -> None:
        """As another program left it that fetched these files."""
        self.snapshot.mkdir(parents=True)
        (self.snapshot.parent.parent / "refs").mkdir()
        (self.snapshot.parent.parent / "refs" / "main").write_text(COMMIT)
        for path in {path for pattern in patterns for path in self.folder.glob(pattern)}:
            shutil.copy(path, self.snapshot)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_model(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub(Path(shutil.copytree(folder, tmp_path / "hub")), tmp_path / "cache")
    thread = threading.Thread(target=hub.server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    constants = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(hub.cache),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }
    for name, value in constants.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    yield hub
    hub.server.shutdown()
    thread.join()
    hub.server.server_close()


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def weight_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("model-*.safetensors"))


def test_only_what_is_read_is_fetched_and_once(hub: Hub) -> None:
    read = {path.name for path in hub.folder.iterdir()}
    assert len(weight_files(hub.folder)) > 1
    for name in SECOND_COPIES:
        (hub.folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(hub.folder / weight_files(hub.folder)[0], hub.folder / name)
    assert locate_model(NAME, "--model") == hub.snapshot
    assert hub.cached() == read
    hub.asked.clear()
    assert locate_model(NAME, "--model") == hub.snapshot
    assert not hub.asked


@pytest.mark.parametrize(
    "cached",
    [
        ("config.json",),
        ("config.json", "tokenizer*"),
        ("*.json", "model-00001*"),
        ("config.json", "generation_config.json", "model*"),
        ("config.json", "tokenizer*", "model*"),
        ("config.json", "generation_config.json", "tokenizer.json", "model*"),
    ],
    ids=str,
)
def test_what_the_cache_lacks_is_fetched(hub: Hub, cached: tuple[str, ...]) -> None:
    hub.put_into_cache(*cached)
    before = hub.cached()
    assert locate_model(NAME, "--model") == hub.snapshot
    assert hub.cached() == {path.name for path in hub.folder.iterdir()}
    assert not before & set(hub.asked)


def test_a_complete_cache_needs_no_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    hub.put_into_cache("*")
    assert locate_model(NAME, "--model") == hub.snapshot and not hub.asked
    go_offline(monkeypatch)
    assert locate_model(NAME, "--model") == hub.snapshot and not caplog.records


def test_weights_in_one_file_need_no_index(hub: Hub) -> None:
    for name in [*weight_files(hub.folder)[1:], "model.safetensors.index.json"]:
        (hub.folder / name).unlink()
    (hub.folder / weight_files(hub.folder)[0]).rename(hub.folder / "model.safetensors")
    assert locate_model(NAME, "--model") == hub.snapshot
    assert hub.cached() == {path.name for path in hub.folder.iterdir()}
    assert "model.safetensors.index.json" not in hub.asked


def test_what_a_repository_does_not_have_is_asked_for_once(hub: Hub) -> None:
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (hub.folder / name).unlink()
    locate_model(NAME, "--model")
    assert {"generation_config.json", "tokenizer.model"} <= set(hub.asked)
    hub.asked.clear()
    assert locate_model(NAME, "--model") == hub.snapshot and not hub.asked


def test_without_the_hub_missing_weights_are_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    go_offline(monkeypatch)
    with pytest.raises(ModelError, match="neither a folder nor in the local cache"):
        locate_model(NAME, "--draft-model")
    hub.put_into_cache("*.json", "model-00001*")
    with pytest.raises(ModelError) as caught:
        locate_model(NAME, "--draft-model")
    assert weight_files(hub.folder)[1] in caught.value.what and caught.value.where == "--draft-model"
    for name in ("model.safetensors.index.json", "model-00001*"):
        next(hub.snapshot.glob(name)).unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors or model\.safetensors\.index\.json of org/m"):
        locate_model(NAME, "--model")


def test_without_the_hub_missing_small_files_are_named_and_missed(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    go_offline(monkeypatch)
    hub.put_into_cache("config.json", "model*")
    assert locate_model(NAME, "--model") == hub.snapshot
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "generation_config.json, tokenizer_config.json, tokenizer.json" in caplog.text


def test_a_repository_without_safetensors_says_so(hub: Hub) -> None:
    for path in hub.folder.glob("model*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        locate_model(NAME, "--model")


def test_an_index_that_names_other_folders_fetches_nothing_from_there(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    request = ("--model", NAME, "--prompt", "hello", "--max-new-tokens", 2)
    (hub.folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
    assert_error(run_command(capsys, *request), INVALID, "reach outside")
    assert not [name for name in hub.asked if "other" in name]


def test_an_interrupted_download_goes_on_where_it_stopped(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    request = ("--model", NAME, "--prompt", "hello", "--max-new-tokens", 2, "--ignore-eos")
    download, second = huggingface_hub.hf_hub_download, weight_files(hub.folder)[1]

    def interrupted(name: str, file: str, **options: str) -> str:
        if file == second:
            raise KeyboardInterrupt
        return download(name, file, **options)

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.hf_hub_download", interrupted)
        assert run_command(capsys, *request).code == 130
    before = hub.cached()
    assert weight_files(hub.folder)[0] in before and second not in before
    hub.asked.clear()
    assert run_command(capsys, *request).code == 0
    assert not before & set(hub.asked) and second in hub.asked
