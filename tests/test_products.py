"""`precision=fp32` stays fp32 whichever library multiplies the matrices."""

import pytest
import torch

from vae_torch import machine
from vae_torch.machine import set_products

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    for flag in ("allow_tf32", "deterministic"):
        monkeypatch.setattr(torch.backends.cudnn, flag, getattr(torch.backends.cudnn, flag))
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("m", "k", "n"),
    [(128, 784, 512), (512, 128, 784), (1024, 512, 784), (1024, 2, 512), (100, 50, 200), (1, 9, 7)],
)
def test_a_product_is_off_by_fp32s_rounding(m, k, n):
    set_products("fp32", CPU)
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(m, k, generator=random), torch.randn(k, n, generator=random)
    exact = a.double() @ b.double()
    bound = 2**-24 * (k + 2) * (a.abs().double() @ b.abs().double())  # of any order of summation
    assert ((a @ b - exact).abs() <= bound).all()


def test_fast_multiplications_that_are_not_fp32_are_not_used(monkeypatch):
    seen = []

    def quick_is_fp32() -> bool:
        seen.append(torch.get_float32_matmul_precision())
        return False

    monkeypatch.setattr(machine, "_products_are_fp32", quick_is_fp32)
    set_products("fp32", CPU)
    assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.deterministic
    assert seen == ["medium"]  # the fast kernels were the ones tested
    assert torch.get_float32_matmul_precision() == "highest"
    set_products("medium", CPU)
    assert torch.get_float32_matmul_precision() == "medium"
    assert torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(machine, "_products_are_fp32", lambda: True)
    set_products("bf16", CPU)
    assert torch.get_float32_matmul_precision() == "medium"
    set_products("fp32", CUDA)  # the fast kernels there are TF32
    assert torch.get_float32_matmul_precision() == "highest"


def test_bf16_multiplications_are_distinguished_from_fp32(monkeypatch):
    assert machine._products_are_fp32()
    as_it_is = torch.Tensor.__matmul__

    def rounded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.dtype is torch.float32:
            return as_it_is(a.bfloat16(), b.bfloat16()).float()
        return as_it_is(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not machine._products_are_fp32()
