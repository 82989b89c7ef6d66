"""Callbacks, by name or as a function."""

import json
import socket
import struct

import pytest
import torch

from vae_torch import VAE, train
from vae_torch.callbacks import callbacks, print_epochs
from vae_torch.cli import messages
from vae_torch.cli.compose import compose
from vae_torch.config import ConfigError
from vae_torch.runs.run import run


@pytest.fixture
def settings(made_up_root):
    def make(*more):
        return compose(
            [
                *("data=fashion_mnist", f"data.root={made_up_root}", "model.intermediate_dim=8"),
                *("train.epochs=2", "train.figure_every=0", "data.limit_train=50", "threads=1"),
                *("data.limit_test=20", *more),
            ]
        )

    return make


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_callback_of_ones_own_is_attached_by_its_name(settings, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(callbacks, "_parts", dict(callbacks))

    @callbacks.register("mine")
    class Mine:
        def __init__(self, config, run_dir):
            seen.append((config.seed, run_dir))

        def __enter__(self):
            return lambda _, vae: {"test/latents": vae.latent_dim}

        def __exit__(self, kind, *rest):
            seen.append(kind)

    run(settings("train.callbacks=[mine]"), tmp_path)
    assert [row["test/latents"] for row in rows_of(tmp_path)] == [2, 2]
    assert seen == [(0, tmp_path), None]
    with pytest.raises(ConfigError, match="callbacks=nobody: must be one of wandb, mlflow, "):
        run(settings("train.callbacks=[nobody]"), tmp_path / "other")


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_an_absent_library_is_one_line(settings, tmp_path, monkeypatch, name):
    monkeypatch.setitem(messages.sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"\[{name}\]: needs {name}, .* pip install -e '\.\["):
        run(settings(f"train.callbacks=[{name}]"), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def log_records(content):
    """The records of a LevelDB log, each behind a header of seven bytes."""
    at, record = 7, b""
    while at < len(content):
        if 2**15 - at % 2**15 < 7:  # the end of a block is left empty
            at += 2**15 - at % 2**15
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield record
            record = b""


@pytest.mark.filterwarnings("ignore")
def test_wandb_has_every_epoch_offline(settings, tmp_path, monkeypatch):
    library = pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    for key, value in (("MODE", "offline"), ("SILENT", "true"), ("DATA_DIR", str(tmp_path))):
        monkeypatch.setenv(f"WANDB_{key}", value)
    run(settings("train.callbacks=[wandb]"), tmp_path / "run")
    library.teardown()  # as when a program exits: MLflow's process has written everything
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    logged, configured = [], {}
    for record in map(Record.FromString, log_records(file.read_bytes())):
        if record.HasField("history"):
            items = record.history.item
            logged.append(
                {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
            )
        for item in (*record.run.config.update, *record.config.update):
            configured[item.key] = json.loads(item.value_json)
    assert configured["model.intermediate_dim"] == 8
    for row, found in zip(rows_of(tmp_path / "run"), logged, strict=True):
        assert found["test/elbo"] == row["test/elbo"]
        assert found["test/kl_per_dim/2"] == row["test/kl_per_dim"][1]
        assert found["_step"] == row["epoch"]


@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_every_epoch_offline(settings, tmp_path, monkeypatch):
    library = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    library.set_tracking_uri((tmp_path / "store").as_uri())
    run(settings("train.callbacks=[mlflow]"), tmp_path / "run")
    (found,) = library.search_runs(output_format="list")
    assert found.info.status == "FINISHED"
    assert found.data.params["model.intermediate_dim"] == "8"
    client = library.MlflowClient()
    points = client.get_metric_history(found.info.run_id, "test/elbo")
    assert [(p.step, p.value) for p in points] == [
        (row["epoch"], row["test/elbo"]) for row in rows_of(tmp_path / "run")
    ]


def test_a_notebook_gets_a_line_an_epoch(capsys):
    vae, x = VAE((6,), 2, 4), torch.rand(20, 6)
    history = train(vae, x, x, epochs=2, callbacks=[print_epochs])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["epoch", "1"], ["epoch", "2"]]
    assert f"test/elbo {history['test/elbo'][1]:.2f}" in lines[1]


def test_the_hint_names_a_port_that_is_free(tmp_path):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        before, messages._PORT = messages._PORT, port
        try:
            hint = messages.tensorboard(tmp_path)
        finally:
            messages._PORT = before
    assert f"--port {port + 1}   then open http://localhost:{port + 1}" in hint
