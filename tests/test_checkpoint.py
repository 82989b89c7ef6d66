import pickle
import random
import re

import pytest
import torch

from vae_torch import VAE, checkpoint, load_run
from vae_torch.checkpoint import (
    CheckpointError,
    Checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from vae_torch.files import remove_scratch, write_atomically


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
    assert "posterior.mean.weight" in state["model"]


def test_any_damage_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint({"config": {}, "model": {"w": torch.randn(30)}}, path)
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
    save_checkpoint({"config": Payload(), "model": {}}, path)
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


def test_every_write_has_a_scratch_file_of_its_own(tmp_path, monkeypatch):
    path, seen = tmp_path / "file", []
    replace = type(path).replace

    def between(scratch, target):  # another process writes the same file before this one renames
        seen.append(scratch.name)
        if len(seen) == 1:
            write_atomically(path, b"quicker")
            assert path.read_bytes() == b"quicker"
        return replace(scratch, target)

    monkeypatch.setattr(type(path), "replace", between)
    write_atomically(path, b"slower")
    assert path.read_bytes() == b"slower"
    assert len(set(seen)) == 2
    assert all(re.fullmatch(r"\.file\.[0-9a-f]{8}\.part", name) for name in seen)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_scratch_files_and_nothing_else_are_removed(tmp_path):
    inner = tmp_path / "figures" / "growth"
    inner.mkdir(parents=True)
    kept = [tmp_path / "metrics.jsonl", tmp_path / "a.part", inner / ".hidden"]
    for path in [*kept, tmp_path / ".metrics.jsonl.0123abcd.part", inner / ".last.pt.part"]:
        path.write_bytes(b"x")
    remove_scratch(tmp_path)
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == sorted(kept)


@pytest.mark.parametrize("history", [{}, {"epoch": [1, 2]}])
def test_checkpoints_that_were_moved_away_are_not_made_again(tmp_path, config, history):
    run_dir = tmp_path / "run"
    written = Checkpoints(run_dir / "checkpoints", config)
    written.save(epochs(1))
    for _ in range(2):
        if run_dir.exists():
            run_dir.rename(tmp_path / "elsewhere")
        with pytest.raises(FileNotFoundError):
            written.save({"epoch": 2, "history": history, "model": {}})
        assert not run_dir.exists()
    assert Checkpoints(tmp_path / "elsewhere" / "checkpoints", config).load("cpu")["epoch"] == 1


def test_a_run_moved_away_before_its_first_checkpoint_is_not_made_again(tmp_path, config):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    written = Checkpoints(run_dir / "checkpoints", config)
    run_dir.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        written.save(epochs(1))
    assert not run_dir.exists()


def test_folders_without_a_run_are_named(tmp_path, run_dir):
    with pytest.raises(CheckpointError, match="no such folder"):
        load_run(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="did it train"):
        load_run(tmp_path / "empty")
    state = load_checkpoint(run_dir / "checkpoints" / "last.pt")
    state["config"]["model"]["latent_dim"] = 3
    save_checkpoint(state, run_dir / "checkpoints" / "last.pt")
    with pytest.raises(CheckpointError, match=r"last\.pt: does not fit"):
        load_run(run_dir)


def test_resume_with_other_settings_is_refused(run_dir, composed):
    other = Checkpoints(run_dir / "checkpoints", composed("model.latent_dim=8"))
    with pytest.raises(CheckpointError, match=r"model\.latent_dim=2, this one has 8"):
        other.load("cpu")


def epochs(n):
    """The state after n epochs: scalars and a list per epoch, all with many decimals."""
    kl = [[i / 3, -i / 7] for i in range(n)]
    history = {"epoch": [*range(1, n + 1)], "test/elbo": [-i / 9 for i in range(n)], "kl": kl}
    return {"epoch": n, "history": history, "model": {}}


def test_a_history_comes_back_and_no_checkpoint_grows_with_it(tmp_path, config):
    written, sizes = Checkpoints(tmp_path, config), []
    for n in range(1, 9):
        written.save_epoch(epochs(n), best=n == 3, final=n == 8)
        sizes.append((tmp_path / "last.pt").stat().st_size)
    assert len(set(sizes)) == 1
    with (tmp_path / "history.jsonl").open("a") as file:  # of a later epoch, cut off by a crash
        file.write('{"epoch": 9, "te')
    again = Checkpoints(tmp_path, config)
    assert again.load("cpu")["history"] == epochs(8)["history"]
    again.save(epochs(10))
    assert Checkpoints(tmp_path, config).load("cpu")["history"] == epochs(10)["history"]


def test_a_run_begun_anew_begins_its_history_anew(tmp_path, config):
    Checkpoints(tmp_path, config).save(epochs(5))
    (tmp_path / "last.pt").unlink()
    fresh = Checkpoints(tmp_path, config)
    assert fresh.load("cpu") is None
    fresh.save(epochs(2))
    assert Checkpoints(tmp_path, config).load("cpu")["history"] == epochs(2)["history"]


def test_a_checkpoint_that_holds_its_history_is_read(tmp_path, config):
    """Checkpoints of earlier versions have such entries."""
    save_checkpoint({"config": config.to_dict(), **epochs(3)}, tmp_path / "last.pt")
    checkpoints = Checkpoints(tmp_path, config)
    assert checkpoints.load("cpu")["history"] == epochs(3)["history"]
    checkpoints.save(epochs(4))
    assert Checkpoints(tmp_path, config).load("cpu")["history"] == epochs(4)["history"]


def test_a_history_that_is_not_the_checkpoints_is_refused(tmp_path, config):
    Checkpoints(tmp_path, config).save(epochs(5))
    path = tmp_path / "history.jsonl"
    good = path.read_bytes()
    for bad in (good[:-1], good.replace(b"-0.1", b"-0.2"), b""):
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"history\.jsonl: damaged"):
            Checkpoints(tmp_path, config).load("cpu")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"history\.jsonl: No such file"):
        Checkpoints(tmp_path, config).load("cpu")


def test_the_best_checkpoint_is_written_before_the_last_one(tmp_path, config, monkeypatch):
    """Otherwise a run killed between the two would resume without its best epoch."""
    written = []
    monkeypatch.setattr(checkpoint, "write_atomically", lambda path, _: written.append(path.name))
    Checkpoints(tmp_path, config).save_epoch(epochs(1), best=True, final=True)
    assert written == ["best.pt", "last.pt"]


def test_an_epoch_may_lack_what_another_has(tmp_path, config):
    history = {"epoch": [1, 2, 3], "mine": [None, 0.5, None]}
    Checkpoints(tmp_path, config).save({"epoch": 3, "history": history, "model": {}})
    assert Checkpoints(tmp_path, config).load("cpu")["history"] == history
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert lines[0] == '{"epoch": 1}'
