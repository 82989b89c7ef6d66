import math

import pytest
import torch

from vae_torch import VAE, Decoder, Encoder, reparameterize
from vae_torch.parts.networks import ConvBlock, networks
from vae_torch.parts.posteriors import DiagonalGaussian, WithOtherNoise


@pytest.mark.parametrize("architecture", ["mlp", "residual", "conv", "resnet"])
@pytest.mark.parametrize("input_shape", [(784,), (1, 28, 28)])
def test_shapes_of_every_architecture(architecture, input_shape):
    small = {"model_options": {"channels": 4}} if architecture == "resnet" else {}
    width = {} if small else {"intermediate_dim": 8}
    vae = VAE(input_shape, latent_dim=3, architecture=architecture, **width, **small)
    flat, square = torch.rand(5, 784), torch.rand(5, 1, 28, 28)
    for x in (flat, square):
        out = vae(x)
        assert out.logits.shape == (5, *input_shape)
        assert out.mean.shape == out.logvar.shape == out.z.shape == (5, 3)
    assert vae.decode(torch.zeros(4, 2, 3)).shape == (4, 2, *input_shape)
    assert vae.decode(torch.zeros(3)).shape == input_shape
    assert vae.reconstruct(flat).shape == (5, *input_shape)
    assert vae.sample(6).shape == (6, *input_shape)


@pytest.mark.parametrize(
    ("shape", "smallest"),
    [((1, 28, 28), (16, 3, 3)), ((3, 64, 64), (32, 4, 4)), ((1, 5, 9), (4, 2, 4))],
)
def test_a_resnet_halves_images_until_a_side_has_four_pixels(shape, smallest):
    network = networks["resnet"](channels=4)
    assert network.scales(shape)[-1] == smallest
    features = network.encoder(shape)(torch.rand(2, *shape))
    assert features.shape == (2, math.prod(smallest))
    assert network.decoder(3, shape)(torch.rand(2, 3)).shape == (2, *shape)


def test_the_blocks_of_a_resnet_add_nothing_at_first_and_learn_at_once():
    block, x = ConvBlock(4, torch.nn.SiLU), torch.rand(2, 4, 5, 6)
    assert torch.equal(block(x), x)
    block(x).sum().backward()
    assert block.scale.grad.abs().min() > 0
    with torch.no_grad():
        block.scale.fill_(2.0)
    torch.testing.assert_close(block(x), x + 2 * block.body(x))


def test_decode_of_many_equals_decode_of_each(small_vae):
    z = torch.randn(3, 4, 2)
    one_by_one = torch.stack([torch.stack([small_vae.decode(v) for v in row]) for row in z])
    torch.testing.assert_close(small_vae.decode(z), one_by_one)


def test_depth_adds_hidden_layers():
    def weights(depth):
        return sum(p.numel() for p in Encoder((784,), 2, 16, depth=depth).parameters())

    assert weights(3) - weights(1) == 2 * (16 * 16 + 16)
    assert Decoder((784,), 2, 16)(torch.zeros(7, 2)).shape == (7, 784)


def test_reparameterize_has_the_moments_of_the_posterior():
    generator = torch.Generator().manual_seed(0)
    mean, logvar = torch.tensor([1.0, -2.0]), torch.tensor([0.0, math.log(4.0)])
    z = reparameterize(mean.expand(200_000, 2), logvar.expand(200_000, 2), generator=generator)
    torch.testing.assert_close(z.mean(0), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(z.var(0), logvar.exp(), atol=0.05, rtol=0)


def test_a_gaussian_with_gaussian_noise_is_a_gaussian_in_closed_form():
    mean, logvar, shift, spread = torch.randn(4, 5, 3).double()
    q = WithOtherNoise(DiagonalGaussian(mean, logvar), shift, spread)
    scale = torch.exp(logvar / 2)
    right = torch.distributions.Normal(mean + scale * shift, scale * torch.exp(spread / 2))
    z, log_q = q.sample(torch.randn(2, 5, 3).double())
    torch.testing.assert_close(log_q, right.log_prob(z).sum(-1))
    torch.testing.assert_close(q.mean, right.mean)


def test_reparameterize_passes_gradients():
    mean, logvar = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    eps = torch.tensor([0.5, -1.0])
    reparameterize(mean, logvar, eps=eps).sum().backward()
    torch.testing.assert_close(mean.grad, torch.ones(2))  # dz/dmean = 1
    torch.testing.assert_close(logvar.grad, 0.5 * eps)  # dz/dlogvar = exp(logvar / 2) eps / 2


def test_eval_mode_still_samples(small_vae):
    x = torch.rand(2, 784)
    small_vae.eval()
    assert not torch.equal(small_vae(x).z, small_vae(x).z)


def test_noise_comes_from_the_generator_alone(small_vae):
    x = torch.rand(2, 784)
    before = torch.get_rng_state()
    draws = [small_vae(x, generator=torch.Generator().manual_seed(3)).z for _ in range(2)]
    assert torch.equal(*draws)
    assert torch.equal(before, torch.get_rng_state())


def test_weights_start_glorot_uniform_with_zero_biases():
    layer = VAE().encoder.trunk[0]
    limit = math.sqrt(6 / (784 + 512))
    assert layer.weight.abs().max() <= limit
    assert layer.weight.abs().max() > 0.999 * limit
    assert abs(layer.weight.std() / (limit / math.sqrt(3)) - 1) < 0.01
    assert not layer.bias.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vae: vae.encode(torch.rand(4, 783)), r"\(4, 783\)"),
        (lambda vae: vae.encode(torch.rand(784)), r"\(784,\)"),
        (lambda vae: vae.encode(torch.zeros(4, 784, dtype=torch.uint8)), "uint8"),
        (lambda vae: vae.decode(torch.zeros(4, 3)), r"\(4, 3\)"),
        (lambda _: VAE(latent_dim=0), "latent_dim is 0"),
        (lambda _: VAE(architecture="transformer"), "transformer"),
        (lambda _: VAE(likelihood="poisson"), "poisson"),
        (lambda _: VAE((30,), architecture="conv"), r"shape \(30,\)"),
    ],
)
def test_callers_mistakes_name_the_value(small_vae, call, message):
    with pytest.raises(ValueError, match=message):
        call(small_vae)


def test_start_at_draws_the_mean_image_before_any_training():
    vae = VAE((16,), 3, 8, depth=2)
    with torch.no_grad():
        vae.decoder.out.weight.zero_()
    mean = torch.linspace(0, 1, 16)
    vae.init_output_bias(mean)
    drawn = torch.sigmoid(vae.decode(torch.randn(5, 3)))
    assert torch.allclose(drawn, mean.clamp(0.001, 0.999).expand(5, 16), atol=1e-6)
    with pytest.raises(ValueError, match="17 pixels"):
        vae.init_output_bias(torch.zeros(17))
    with pytest.raises(ValueError, match="bias per pixel"):
        VAE((16,), architecture="conv").init_output_bias(mean)


@pytest.mark.parametrize(
    ("model", "accepted"),
    [
        ((784,), [(784,), (28, 28), (1, 28, 28), (28, 28, 1), (4, 14, 14)]),
        ((1, 28, 28), [(784,), (28, 28), (1, 28, 28), (28, 28, 1)]),
        ((3, 8, 12), [(3, 8, 12), (288,), (1, 3, 8, 12)]),
    ],
)
def test_shapes_that_say_the_same_image_are_accepted(model, accepted):
    vae = VAE(model, 2, 4)
    x = torch.rand(2, math.prod(model))
    expected, _ = vae.encode(x)
    for shape in accepted:
        torch.testing.assert_close(vae.encode(x.reshape(2, *shape))[0], expected)
        assert vae.reconstruct(x.reshape(2, *shape)).shape == (2, *model)


@pytest.mark.parametrize(
    ("model", "refused"),
    [
        ((784,), [(3, 28, 28), (783,)]),
        ((1, 28, 28), [(4, 14, 14), (14, 56), (3, 28, 28)]),
        ((3, 28, 28), [(28, 28, 3), (28, 84), (3, 784), (784,)]),
    ],
)
def test_shapes_that_say_another_image_are_refused_with_both(model, refused):
    vae = VAE(model, 2, 4)
    takes = ", ".join(map(str, model))
    for shape in refused:
        has = ", ".join(map(str, shape))
        for call in (vae.encode, vae.check, vae.reconstruct, vae):
            with pytest.raises(ValueError, match=rf"\(5, {has}\).*\(B, {takes}\)"):
                call(torch.rand(5, *shape))


@pytest.mark.parametrize("value", [1.5, -0.5, 255.0, math.nan, math.inf])
def test_a_model_refuses_pixels_outside_0_and_1(small_vae, value):
    for call in (small_vae.check, small_vae.reconstruct):
        with pytest.raises(ValueError, match=rf"\(2, 784\) has values from {value:g} .*\[0, 1\]"):
            call(torch.full((2, 784), value))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        small_vae.init_output_bias(torch.full((784,), value))


@pytest.mark.parametrize("shape", [(3, 8, 12), (4, 32, 32), (2, 4, 4)])
def test_convolutions_see_channels_rows_and_columns(shape):
    """A convolution moves with its image: four pixels to the right are one feature to the right."""
    vae = VAE(shape, 2, 4, architecture="conv")
    first = next(m for m in vae.encoder.modules() if isinstance(m, torch.nn.Conv2d))
    assert first.weight.shape[1] == shape[0]
    features = vae.encoder.trunk[:4]
    x = torch.zeros(1, *shape)
    x[:, -1, -4, -4] = 1.0  # in the last channel, far from the upper left corner
    with torch.no_grad():
        change = features(x) - features(torch.zeros(1, *shape))
        assert change.shape == (1, 64, shape[1] // 4, shape[2] // 4)
        assert change[..., -1, -1].any() or change[..., -2, -2].any()
        assert not change[..., : shape[1] // 4 - 2, :].any()
        assert not change[..., : shape[2] // 4 - 2].any()
    out = vae(torch.rand(5, *shape))
    assert out.logits.shape == (5, *shape)
    assert vae.sample(2).shape == (2, *shape)


def test_grey_squares_make_the_same_convolutions_in_every_shape():
    models = []
    for shape in ((64,), (8, 8), (1, 8, 8), (8, 8, 1), (1, 1, 8, 8)):
        torch.manual_seed(0)
        models.append(VAE(shape, 2, 4, architecture="conv"))
    x = torch.rand(3, 64)
    for model in models[1:]:
        assert model.state_dict().keys() == models[0].state_dict().keys()
        assert torch.equal(model.encode(x)[0], models[0].encode(x)[0])


@pytest.mark.parametrize("shape", [(3, 30, 31), (30, 29), (900,), (3, 8, 10), (2, 7, 4), (1, 5, 6)])
def test_convolutions_take_sides_that_four_does_not_divide(shape):
    vae = VAE(shape, 2, 4, architecture="conv")
    assert vae(torch.rand(5, *shape)).logits.shape == (5, *shape)


@pytest.mark.parametrize("shape", [(63,), (28, 28, 3), (2, 3, 8, 8), (3, 2, 8), (3,)])
def test_shapes_without_rows_and_columns_are_refused_by_convolutions(shape):
    with pytest.raises(ValueError, match=r"conv.*shape \(.*\(channels, height, width\).*4 pixels"):
        VAE(shape, 2, 4, architecture="conv")


@pytest.mark.parametrize("shape", [(-28, -28), (0,), (28, 2.5)])
def test_sides_below_one_are_refused(shape):
    with pytest.raises(ValueError, match=r"input_shape\[\d\] is"):
        VAE(shape)
