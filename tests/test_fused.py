from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from tune_mnist.errors import ConfigError
from tune_mnist.mnist import fused
from tune_mnist.mnist.cpu import loops as kernels
from tune_mnist.mnist.cpu.loops import Bytes
from tune_mnist.mnist.fused import evaluation_forward, keep_freed_memory, training_forward
from tune_mnist.mnist.net import Net

Masks = list[Tensor]

# Five images: 5 x 81 x 8 values are no multiple of 64, the length of a row of the kernels. And
# few: in half of all batches of 128 rounding decides some maximum of the pool, or some sign at
# ReLU, which moves gradients by 1% in torch's own float32 as well (27 and 25 of 48 seeds, plain
# and fused, against float64).
BATCH = 5


@pytest.fixture(params=["compiled", "compiled, two threads", "torch"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run every test on all forms of the step; with two threads torch does the convolutions."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "COMPILED", False)
    elif not kernels.COMPILED:
        pytest.skip("needs numba")
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if "two" in request.param else 1)
    yield request.param
    torch.set_num_threads(threads)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(11)
    return with_arbitrary_norms(Net())


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> Masks:
    """Collect every mask that is drawn, flat in channels-last order."""
    drawn: Masks = []
    draw = kernels.draw_keep

    def record(seed: int, dropout: float, keep: Bytes) -> None:
        draw(seed, dropout, keep)
        drawn.append(torch.from_numpy(keep.copy()))

    monkeypatch.setattr(kernels, "draw_keep", record)
    return drawn


class GivenDropout(nn.Module):
    """Dropout by given masks."""

    def __init__(self, rate: float, masks: Iterator[Tensor]) -> None:
        super().__init__()
        self.rate, self.masks = rate, masks

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        mask = next(self.masks).view(batch, height, width, channels).permute(0, 3, 1, 2)
        return x * (mask.to(x.dtype) * (1 / (1 - self.rate)))


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


def as_reference(net: Net, path: str) -> Net:
    """Copy the plain net to what its fused form is compared with.

    The compiled form rounds as little as torch's contiguous one (gradients within 5e-6 of float64,
    6 seeds). Torch's own channels-last batch norm rounds more (up to 1e-3), so the form that is
    made of it is compared with the same operations.
    """
    if path != "torch":
        return deepcopy(net).double().train()
    return deepcopy(net).to(memory_format=torch.channels_last).train()


def draw_batch(count: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(12)
    images = torch.randn(count, 1, 28, 28, generator=generator)
    return images, torch.randint(0, 10, (count,), generator=generator)


def seeded(seed: int = 13) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loss_of(net: Net, dropout: float = 0.1, count: int = BATCH) -> Tensor:
    images, labels = draw_batch(count)
    return nn.functional.nll_loss(training_forward(net, images, dropout, seeded()), labels)


def relative_error(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_step_equals_that_of_the_plain_modules_with_the_same_masks(
    net: Net, masks: Masks, path: str, dropout: float, memory_format: torch.memory_format
) -> None:
    net = net.to(memory_format=memory_format)
    plain = as_reference(net, path)
    loss = loss_of(net, dropout)
    loss.backward()  # type: ignore[no-untyped-call]
    assert len(masks) == (8 if dropout else 0)

    given = iter(masks)
    for name, layer in list(plain.features.named_children()):
        if isinstance(layer, nn.Dropout):
            without = nn.Identity()
            plain.features.add_module(name, GivenDropout(dropout, given) if masks else without)
    images, labels = draw_batch()
    plain_loss = nn.functional.nll_loss(plain(images.to(plain.classifier.weight.dtype)), labels)
    plain_loss.backward()  # type: ignore[no-untyped-call]

    assert loss.item() == pytest.approx(plain_loss.item(), rel=2e-6)
    for (name, parameter), expected in zip(
        net.named_parameters(), plain.parameters(), strict=True
    ):
        assert relative_error(parameter.grad, expected.grad) < 1e-4, name
    for buffer, of_plain in zip(net.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, of_plain.to(buffer.dtype), rtol=1e-4, atol=1e-5)


def test_both_forms_give_the_same_loss_for_the_same_seed(
    net: Net, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "torch":
        pytest.skip("compared from the compiled form")
    compiled = loss_of(deepcopy(net), dropout=0.3).item()
    monkeypatch.setattr(kernels, "COMPILED", False)
    assert loss_of(net, dropout=0.3).item() == pytest.approx(compiled, rel=5e-5)


def test_a_seed_fixes_every_bit(net: Net) -> None:
    def step(seed: int) -> list[Tensor]:
        copy = deepcopy(net)
        images, labels = draw_batch(count=32)
        loss = nn.functional.nll_loss(training_forward(copy, images, 0.2, seeded(seed)), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return [loss.detach(), *(p.grad for p in copy.parameters() if p.grad is not None)]

    assert all(torch.equal(a, b) for a, b in zip(step(1), step(1), strict=True))
    assert not torch.equal(step(1)[0], step(2)[0])


def test_dropout_0_draws_nothing(net: Net) -> None:
    generator = seeded()
    before, global_before = generator.get_state(), torch.get_rng_state()
    training_forward(net, draw_batch()[0], 0.0, generator)
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), global_before)


def test_only_the_given_generator_is_used(net: Net) -> None:
    generator = seeded()
    before, global_before = generator.get_state(), torch.get_rng_state()
    training_forward(net, draw_batch()[0], 0.1, generator)
    assert not torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), global_before)


def test_layers_and_steps_get_masks_of_the_asked_rate_that_are_independent(
    net: Net, masks: Masks
) -> None:
    generator = seeded()
    images, _ = draw_batch(count=64)
    for _ in range(2):
        training_forward(net, images, 0.25, generator)
    assert len(masks) == 16
    deviations = [mask.double() - 0.75 for mask in masks]
    sigma = (0.25 * 0.75) ** 0.5
    for i, one in enumerate(deviations):
        assert abs(one.mean()) < 5 * sigma / one.numel() ** 0.5 + 2**-16
        for other in deviations[:i]:
            count = min(one.numel(), other.numel())
            correlation = (one[:count] * other[:count]).mean() / sigma**2
            assert abs(correlation) < 5 / count**0.5


def drawn_factors(net: Net, rate: float, seed: int, count: int = 16) -> list[Tensor]:
    """What each layer is multiplied by where the rate is a tensor, flat in channels-last order."""
    images, _ = draw_batch(count)
    drawn = fused._draw_factors(net, images, torch.tensor(rate), seeded(seed))
    return [factor.permute(0, 2, 3, 1).flatten() for factor in drawn]


def test_a_rate_that_is_a_tensor_gives_masks_of_that_rate_that_are_independent(net: Net) -> None:
    factors = drawn_factors(net, 0.25, seed=1) + drawn_factors(net, 0.25, seed=2)
    assert len(factors) == 16
    sigma = (0.25 * 0.75) ** 0.5
    deviations = []
    for factor in factors:
        assert sorted(set(factor.tolist())) == pytest.approx([0, 4 / 3])
        deviations.append((factor > 0).double() - 0.75)
    for i, one in enumerate(deviations):
        assert abs(one.mean()) < 5 * sigma / one.numel() ** 0.5
        for other in deviations[:i]:
            count = min(one.numel(), other.numel())
            assert abs((one[:count] * other[:count]).mean()) / sigma**2 < 5 / count**0.5


def test_a_rate_that_is_a_tensor_of_0_keeps_everything(net: Net) -> None:
    assert all((factor == 1).all() for factor in drawn_factors(net, 0.0, seed=1, count=4))


def test_a_step_with_a_rate_that_is_a_tensor_equals_that_of_the_plain_modules(net: Net) -> None:
    plain = as_reference(net, "torch")
    given = iter([factor > 0 for factor in drawn_factors(net, 0.3, seed=4, count=BATCH)])
    for name, layer in list(plain.features.named_children()):
        if isinstance(layer, nn.Dropout):
            plain.features.add_module(name, GivenDropout(0.3, given))
    images, _ = draw_batch()
    found = training_forward(net, images, torch.tensor(0.3), seeded(4))
    torch.testing.assert_close(found, plain(images), rtol=1e-5, atol=1e-5)
    assert next(given, None) is None


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_impossible_dropout_is_refused(net: Net, dropout: float) -> None:
    with pytest.raises(ConfigError, match="0 <= dropout < 1"):
        training_forward(net, draw_batch()[0], dropout, None)


def test_training_does_not_look_at_the_modules_modes_and_rates(net: Net) -> None:
    other = deepcopy(net).eval()
    for layer in other.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.9
    assert torch.equal(loss_of(other), loss_of(net))
    assert not other.training


def test_backward_may_run_twice(net: Net) -> None:
    loss = loss_of(net)
    parameters = list(net.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_activations_are_freed_by_the_backward(net: Net) -> None:
    loss = loss_of(net)
    loss.backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="second time"):  # torch's word for: they are gone
        loss.backward()  # type: ignore[no-untyped-call]


def test_images_may_ask_for_a_gradient(net: Net) -> None:
    images, labels = draw_batch()
    images.requires_grad_()
    loss = nn.functional.nll_loss(training_forward(net, images, 0.1, seeded()), labels)
    (gradient,) = torch.autograd.grad(loss, images)
    assert gradient.abs().sum() > 0


def test_batch_norm_with_scale_and_shift_0_has_gradients(net: Net, path: str) -> None:
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.zeros_(layer.bias)
            with torch.no_grad():
                layer.weight[::2] = 0
    plain = as_reference(net, path)
    for layer in plain.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    images, labels = draw_batch()
    found = torch.autograd.grad(loss_of(net, dropout=0.0), list(net.parameters()))
    loss = nn.functional.nll_loss(plain(images.to(plain.classifier.weight.dtype)), labels)
    expected = torch.autograd.grad(loss, list(plain.parameters()))
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 1e-4


def test_nan_reaches_the_loss(net: Net) -> None:
    images, labels = draw_batch()
    images[2, 0, 14, 14] = torch.nan
    assert training_forward(net, images, 0.1, seeded()).isnan().all()
    with torch.no_grad():
        next(net.parameters())[0] = torch.nan
    assert nn.functional.nll_loss(
        training_forward(net, draw_batch()[0], 0.1, seeded()), labels
    ).isnan()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [torch.inf, 1e38])
def test_a_net_that_diverges_has_a_nan_loss_and_no_warnings(net: Net, value: float) -> None:
    with torch.no_grad():
        next(net.parameters()).fill_(value)
    loss = loss_of(net)
    loss.backward()  # type: ignore[no-untyped-call]
    assert not loss.isfinite()


def plain_evaluation(net: Net, images: Tensor) -> Tensor:
    with torch.inference_mode():
        log_probabilities: Tensor = deepcopy(net).eval()(images)
    return log_probabilities


@pytest.mark.parametrize("count", [1, 64, 150])
def test_evaluation_equals_the_plain_net(net: Net, count: int) -> None:
    images, _ = draw_batch(count)
    before_pool = net.features[22]
    assert isinstance(before_pool, nn.BatchNorm2d)
    assert (before_pool.weight < 0).any()
    expected = plain_evaluation(net, images)
    torch.testing.assert_close(evaluation_forward(net, images), expected, rtol=1e-4, atol=1e-4)


def test_evaluation_changes_nothing(net: Net) -> None:
    before = deepcopy(net.state_dict())
    images, _ = draw_batch()
    copy = images.clone()
    evaluation_forward(net, images)
    assert net.training
    assert torch.equal(images, copy)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_nan_of_one_image_stays_with_it_in_evaluation(net: Net) -> None:
    images, _ = draw_batch()
    images[2, 0, 14, 14] = torch.nan
    is_nan = evaluation_forward(net, images).isnan()
    assert torch.equal(is_nan.all(1), torch.arange(BATCH) == 2)
    assert torch.equal(is_nan.any(1), torch.arange(BATCH) == 2)


def test_memory_settings_are_taken_where_the_c_library_knows_them() -> None:
    assert keep_freed_memory() in (True, False)


def test_off_the_cpu_no_value_is_read(net: Net) -> None:
    # The meta device has shapes but no values: whatever would wait for a GPU raises there.
    images = torch.empty(4, 1, 28, 28, device="meta")
    dropout = torch.empty((), device="meta")
    log_probabilities = training_forward(net.to("meta"), images, dropout, None)
    log_probabilities.sum().backward()  # type: ignore[no-untyped-call]
    assert evaluation_forward(net, images).shape == (4, 10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_captured_step_reads_the_dropout_rate_at_each_replay(net: Net) -> None:
    device = torch.device("cuda")
    net = net.to(device)
    images, labels = (tensor.to(device) for tensor in draw_batch(count=64))
    dropout = torch.zeros((), device=device)
    parameters = list(net.parameters())

    def step() -> Tensor:
        loss = nn.functional.nll_loss(training_forward(net, images, dropout, None), labels)
        return torch.autograd.grad(loss, parameters)[0].abs().sum() + loss.detach()

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replayed(rate: float) -> float:
        dropout.fill_(rate)
        graph.replay()
        return float(result)

    assert replayed(0.0) == pytest.approx(replayed(0.0), rel=1e-3)
    assert replayed(0.5) != pytest.approx(replayed(0.5), rel=1e-3)
