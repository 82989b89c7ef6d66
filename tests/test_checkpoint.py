import pickle
import random

import pytest
import torch

from vae_torch import VAE, load_run
from vae_torch.checkpoint import (
    CheckpointError,
    Checkpoints,
    load_checkpoint,
    save_checkpoint,
    write_atomically,
)


@pytest.fixture
def run_dir(tmp_path, config):
    vae = VAE.from_config(config)
    state = {"epoch": 1, "best": 0.0, "history": {}, "model": vae.state_dict()}
    Checkpoints(tmp_path / "checkpoints", config).save_epoch(state, best=True, final=True)
    return tmp_path


def test_load_run_gives_back_model_and_config(run_dir, config):
    vae, loaded = load_run(run_dir)
    assert loaded == config
    assert vae(torch.rand(3, 784)).logits.shape == (3, 784)
    stored = load_checkpoint(run_dir / "checkpoints" / "last.pt")["model"]
    assert all(torch.equal(stored[k], v) for k, v in vae.state_dict().items())


def test_torch_opens_a_checkpoint_without_us(run_dir):
    state = torch.load(run_dir / "checkpoints" / "last.pt", weights_only=True)
    assert "encoder.mean.weight" in state["model"]


def test_any_damage_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"config": {}, "model": {"w": torch.randn(30)}})
    good = path.read_bytes()
    dice = random.Random(0)
    for _ in range(200):
        bad = bytearray(good)
        if dice.random() < 0.3:
            del bad[dice.randrange(len(bad)) :]
        else:
            bad[dice.randrange(len(bad))] ^= 1 << dice.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"a\.pt"):
            load_checkpoint(path)


class Payload:
    def __reduce__(self):
        return exec, ("raise SystemExit('code ran')",)


def test_code_in_a_checkpoint_is_refused_not_run(tmp_path):
    path = tmp_path / "evil.pt"
    save_checkpoint(path, {"config": Payload(), "model": {}})
    with pytest.raises(CheckpointError, match=r"evil\.pt: refused"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_folders_that_are_no_run_are_named(tmp_path, run_dir):
    with pytest.raises(CheckpointError, match="no such folder"):
        load_run(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="did it train"):
        load_run(tmp_path / "empty")
    state = load_checkpoint(run_dir / "checkpoints" / "last.pt")
    state["config"]["model"]["latent_dim"] = 3
    save_checkpoint(run_dir / "checkpoints" / "last.pt", state)
    with pytest.raises(CheckpointError, match=r"last\.pt: does not fit"):
        load_run(run_dir)


def test_resume_with_other_settings_is_refused(run_dir, composed):
    other = Checkpoints(run_dir / "checkpoints", composed("model.latent_dim=8"))
    with pytest.raises(CheckpointError, match=r"model\.latent_dim=2, this one has 8"):
        other.load("cpu")
