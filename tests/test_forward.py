"""Training and evaluation passes, by torch's operations and by the compiled ones of a CPU."""

from collections.abc import Iterable, Iterator
from copy import deepcopy
from itertools import repeat

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tune_mnist.mnist import cpu, forward
from tune_mnist.mnist.forward import (
    TORCH,
    Backend,
    evaluation_forward,
    keep_mask,
    smoothed_loss,
    training_forward,
)
from tune_mnist.mnist.net import Net

# Five images: 5 x 81 x 8 values are no multiple of 64, the length of a row of the kernels. And
# few: in half of all batches of 128 rounding decides some maximum of the pool, or some sign at
# ReLU, which moves gradients by 1% in torch's own float32 as well (27 and 25 of 48 seeds, plain
# and compiled, against float64).
BATCH = 5


@pytest.fixture(params=["compiled", "compiled, two threads", "torch"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Run a test on all forms of the net; with two threads torch does the convolutions."""
    if request.param == "torch":
        yield TORCH
        return
    threads, before = 2 if "two" in request.param else 1, torch.get_num_threads()
    torch.set_num_threads(threads)
    found = cpu.backend(Net(), threads)
    if found is TORCH:
        pytest.skip("needs numba")
    yield found
    torch.set_num_threads(before)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(11)
    return with_arbitrary_norms(Net())


class GivenDropout(nn.Module):
    def __init__(self, factors: Iterator[Tensor]) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        return x * next(self.factors).to(x.dtype)


def with_arbitrary_norms(net: Net) -> Net:
    """Give batch norms scales of both signs, shifts and statistics far from the initial ones."""
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.2)
            with torch.no_grad():
                layer.weight[::3] *= -1
            assert layer.running_mean is not None
            assert layer.running_var is not None
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
    return net


def as_reference(net: Net, backend: Backend) -> Net:
    """Copy the plain net to what another form of it is compared with.

    The compiled form rounds as little as torch's contiguous one (gradients within 5e-6 of float64,
    6 seeds). Torch's own channels-last batch norm rounds more (up to 1e-3), so the form that is
    made of it is compared with the same operations.
    """
    if backend is not TORCH:
        return deepcopy(net).double().train()
    return deepcopy(net).to(memory_format=torch.channels_last).train()


def with_given_dropout(net: Net, factors: Iterator[Tensor]) -> Net:
    for name, layer in list(net.features.named_children()):
        if isinstance(layer, nn.Dropout):
            net.features.add_module(name, GivenDropout(factors))
    return net


def draw_batch(count: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(12)
    images = torch.randn(count, 1, 28, 28, generator=generator)
    return images, torch.randint(0, 10, (count,), generator=generator)


def seeded(seed: int = 13) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn_factors(
    net: Net, rate: float | Tensor, generator: torch.Generator, count: int = BATCH
) -> list[Tensor]:
    """What each dropout multiplies by, [B, channels, height, width]."""
    return list(forward._dropout_factors(net, draw_batch(count)[0], rate, generator))


def plain_loss(plain: Net) -> Tensor:
    images, labels = draw_batch()
    return functional.nll_loss(plain(images.to(plain.classifier.weight.dtype)), labels)


def loss_of(
    net: Net, backend: Backend, dropout: float = 0.1, count: int = BATCH, seed: int = 13
) -> Tensor:
    images, labels = draw_batch(count)
    log_probs = training_forward(net, images, dropout, seeded(seed), backend)
    return functional.nll_loss(log_probs, labels)


def backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def assert_gradients_near(
    found: Iterable[Tensor | None], expected: Iterable[Tensor | None]
) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        assert other is not None
        assert float((one - other).norm() / other.norm()) < 1e-4


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_step_equals_that_of_the_plain_modules_with_the_same_masks(
    net: Net, backend: Backend, dropout: float, memory_format: torch.memory_format
) -> None:
    net = net.to(memory_format=memory_format)
    plain = as_reference(net, backend)
    loss = loss_of(net, backend, dropout)
    backward(loss)
    factors = iter(drawn_factors(net, dropout, seeded()))
    expected_loss = plain_loss(with_given_dropout(plain, factors))
    backward(expected_loss)

    assert next(factors, None) is None
    assert loss.item() == pytest.approx(expected_loss.item(), rel=2e-6)
    assert_gradients_near(*((each.grad for each in of.parameters()) for of in (net, plain)))
    for buffer, of_plain in zip(net.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, of_plain.to(buffer.dtype), rtol=1e-4, atol=1e-5)


def test_a_seed_fixes_every_bit(net: Net, backend: Backend) -> None:
    def step(seed: int) -> list[Tensor]:
        copy = deepcopy(net)
        loss = loss_of(copy, backend, dropout=0.2, count=32, seed=seed)
        return [loss.detach(), *torch.autograd.grad(loss, list(copy.parameters()))]

    assert all(torch.equal(a, b) for a, b in zip(step(1), step(1), strict=True))
    assert not torch.equal(step(1)[0], step(2)[0])


@pytest.mark.parametrize("rate", [0.25, torch.tensor(0.25)], ids=["number", "tensor"])
def test_layers_and_steps_get_masks_of_the_asked_rate_that_are_independent(
    net: Net, rate: float | Tensor
) -> None:
    generator = seeded()
    factors = [factor for _ in range(2) for factor in drawn_factors(net, rate, generator, 64)]
    assert len(factors) == 16
    sigma = (0.25 * 0.75) ** 0.5
    deviations: list[Tensor] = []
    for factor in factors:
        assert sorted(set(factor.flatten().tolist())) == pytest.approx([0, 4 / 3])
        one = (factor.permute(0, 2, 3, 1).flatten() > 0).double() - 0.75
        assert abs(one.mean()) < 5 * sigma / one.numel() ** 0.5 + 2**-16
        for other in deviations:
            count = min(one.numel(), other.numel())
            correlation = (one[:count] * other[:count]).mean() / sigma**2
            assert abs(correlation) < 5 / count**0.5
        deviations.append(one)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_a_step_with_a_rate_that_is_a_tensor_equals_that_of_the_plain_modules(
    net: Net, backend: Backend, rate: float
) -> None:
    factors = drawn_factors(net, torch.tensor(rate), seeded(4))
    assert rate > 0 or all((factor == 1).all() for factor in factors)
    plain = with_given_dropout(as_reference(net, TORCH), iter(factors))
    images, _ = draw_batch()
    found = training_forward(net, images, torch.tensor(rate), seeded(4), backend)
    torch.testing.assert_close(found, plain(images), rtol=1e-5, atol=1e-5)


def test_training_does_not_look_at_the_modules_modes_and_rates(net: Net, backend: Backend) -> None:
    other = deepcopy(net).eval()
    for layer in other.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.9
    assert torch.equal(loss_of(other, backend), loss_of(net, backend))
    assert not other.training


def test_backward_may_run_twice_but_frees_activations_unless_asked_not_to(
    net: Net, backend: Backend
) -> None:
    images, labels = draw_batch()
    images.requires_grad_()
    loss = functional.nll_loss(training_forward(net, images, 0.1, seeded(), backend), labels)
    inputs = [images, *net.parameters()]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert first[0].abs().sum() > 0  # images may ask for a gradient too
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):  # torch's word for: they are gone
        backward(loss)


def test_batch_norm_with_scale_and_shift_0_has_gradients(net: Net, backend: Backend) -> None:
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.zeros_(layer.bias)
            with torch.no_grad():
                layer.weight[::2] = 0
    plain = with_given_dropout(as_reference(net, backend), repeat(torch.ones(())))
    losses = (loss_of(net, backend, dropout=0.0), net), (plain_loss(plain), plain)
    assert_gradients_near(
        *(torch.autograd.grad(loss, list(of.parameters())) for loss, of in losses)
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e38])
def test_a_net_that_diverges_has_a_nan_loss_and_no_warnings(
    net: Net, backend: Backend, value: float
) -> None:
    with torch.no_grad():
        next(net.parameters()).fill_(value)
    loss = loss_of(net, backend)
    backward(loss)
    assert not loss.isfinite()


def test_nan_of_one_image_reaches_the_loss_and_stays_with_it_in_evaluation(
    net: Net, backend: Backend
) -> None:
    images, _ = draw_batch()
    images[2, 0, 14, 14] = torch.nan
    is_nan = evaluation_forward(net, images, backend).isnan()
    assert torch.equal(is_nan, (torch.arange(BATCH) == 2)[:, None].expand(-1, 10))
    assert training_forward(net, images, 0.1, seeded(), backend).isnan().all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_the_loss_is_torchs_cross_entropy(smoothing: float) -> None:
    logits = torch.randn(50, 10, generator=seeded())
    labels = torch.randint(10, (50,), generator=seeded())
    found = smoothed_loss(functional.log_softmax(logits, 1), labels, smoothing)
    expected = functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("count", [1, 64, 150])
def test_evaluation_equals_the_plain_net_and_changes_nothing(
    net: Net, backend: Backend, count: int
) -> None:
    images, _ = draw_batch(count)
    before_pool = net.features[22]
    assert isinstance(before_pool, nn.BatchNorm2d)
    assert (before_pool.weight < 0).any()
    before, copy = deepcopy(net), images.clone()
    found = evaluation_forward(net, images, backend)
    assert net.training
    torch.testing.assert_close(net.state_dict(), before.state_dict(), rtol=0, atol=0)
    assert torch.equal(images, copy)
    with torch.inference_mode():
        expected = before.eval()(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_masks_are_splitmix64(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first outputs of SplitMix64 from seed 1234567, as published with the generator.
    words = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    quarters = np.array(words, np.uint64).view(np.uint16)
    for threshold in (1, 3_000, 20_000, 40_000, 65_535, 65_536):
        keep = keep_mask(1234567, threshold / 2**16, 16)
        assert np.array_equal(keep, quarters >= threshold)
