import json
import math

import numpy as np
import pytest

from vae_torch.cli.compare import main
from vae_torch.evaluation.compare import CompareError, compare_runs


def evaluated(path, values, sha256="a", num_samples=10, **model):
    path.mkdir()
    entry = {
        "value": 0.0, "num_images": len(values), "num_samples": num_samples, "seed": 0,
        "unit": "nats per image",
    }  # fmt: skip
    card = {"elbo": entry, "log_px": entry, "kl": entry, "data": {"sha256": sha256}}
    if model:
        card["model"] = model
    (path / "evaluation.json").write_text(json.dumps(card))
    np.savez(path / "evaluation.npz", log_px=values, elbo=values - 1, kl=values)
    return path


@pytest.fixture
def pair(tmp_path):
    random = np.random.default_rng(0)
    a = random.normal(-90, 30, 400)
    return evaluated(tmp_path / "a", a), evaluated(tmp_path / "b", a + random.normal(0.3, 1, 400))


def test_a_paired_difference_has_the_error_of_the_differences(pair):
    found = {each.metric: each for each in compare_runs(*pair)}
    log_px = found["log_px"]
    assert log_px.error == pytest.approx(1 / math.sqrt(400), rel=0.15)  # unpaired: 2.1
    assert abs(log_px.difference - 0.3) < 4 * log_px.error
    assert "the second run is 0." in log_px.sentence()
    assert " nats higher on 400 images" in log_px.sentence()
    same = compare_runs(pair[0], pair[0])[0]
    assert "no difference" in same.sentence()


def test_runs_that_cannot_be_compared_are_refused_in_one_line(pair, tmp_path):
    a, _ = pair
    values = np.zeros(400)
    other = evaluated(tmp_path / "other", values, sha256="b")
    samples = evaluated(tmp_path / "samples", values, num_samples=11)
    old = evaluated(tmp_path / "old", values)
    (old / "evaluation.npz").unlink()
    torn = evaluated(tmp_path / "torn", values)
    (torn / "evaluation.npz").write_bytes((a / "evaluation.npz").read_bytes()[:200])
    for run, words in (
        (other, "other images"), (samples, "measured alike"), (old, "older version"),
        (torn, "damaged"), (tmp_path / "none", "no evaluation.json"),
    ):  # fmt: skip
        with pytest.raises(CompareError, match=words) as error:
            compare_runs(a, run)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"likelihood": "continuous_bernoulli"}, {"conditional": True}])
def test_log_px_of_different_kinds_of_models_is_not_compared(tmp_path, caplog, change):
    model = {"likelihood": "bernoulli", "conditional": False}
    values = np.linspace(-90, -80, 20)
    a, same = (evaluated(tmp_path / name, values, **model) for name in "ab")
    names = {each.metric for each in compare_runs(a, same)}
    assert names == {"elbo", "log_px", "kl"}
    assert not caplog.messages
    other = evaluated(tmp_path / "other", values, **{**model, **change})
    assert [each.metric for each in compare_runs(a, other)] == ["kl"]
    (said,) = caplog.messages
    (key,) = change
    assert f"between {key}={model[key]} and {key}={change[key]}" in said
    old = evaluated(tmp_path / "old", values)  # its card does not say
    assert len(compare_runs(a, old)) == 3


def test_the_command_prints_every_figure_and_draws_one(pair, tmp_path, capsys):
    a, b = pair
    main([f"run={a}", f"run={b}", f"out={tmp_path / 'c.png'}"])
    assert "log_px: the second run" in capsys.readouterr().out
    assert (tmp_path / "c.png").stat().st_size > 0
    for words in ([f"run={a}"], [f"run={a}", f"run={b}", "metric=x"], ["runn=a"]):
        with pytest.raises(SystemExit):
            main(words)
