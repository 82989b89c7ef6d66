"""A progress bar shows the epoch that its label names, not the whole run."""

import re

from vae_torch import bars
from vae_torch.bars import StepBar


def test_the_bar_is_of_the_epoch_that_it_names(monkeypatch):
    monkeypatch.setattr(bars, "hidden", lambda: False)
    bar = StepBar(epochs=4, steps=8)
    bar.begin_epoch(1, 0)
    bar.show(2, 123.456)
    assert re.match(r"epoch 2/4:  25%.* 2/8 .*train loss 123\.46", str(bar._bar))
    bar.begin_epoch(2, 4)  # resumed in the middle of an epoch
    bar.show(6, 1.0)
    assert re.match(r"epoch 3/4:  75%.* 6/8 ", str(bar._bar))
    bar.close()


def test_a_bar_shows_where_somebody_looks(monkeypatch):
    monkeypatch.delitem(bars.sys.modules, "ipykernel", raising=False)
    assert bars.hidden() is None  # tqdm: only on a terminal
    monkeypatch.setitem(bars.sys.modules, "ipykernel", bars)
    assert bars.hidden() is False
