"""Metrics: closed forms, naive twins that share no code with the package, Monte Carlo, hand-worked cases, refusals."""

import importlib.util
import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from aigc_course.metrics import (
    ModeCoverage,
    class_coverage,
    frechet_distance,
    frechet_distance_gaussians,
    kernel_distance,
    mode_coverage,
    nearest_neighbours,
    polynomial_kernel,
    precision_recall,
)
from aigc_course.metrics import features as metrics
from aigc_course.runtime import CourseError, rng_for

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape, key, dtype=torch.float64):
    return torch.randn(*shape, generator=rng_for("metrics", *key), dtype=dtype)


def random_gaussian(d, key):
    factor = normal(d, d, key=(key, d))
    return normal(d, key=(key, d, "mean")), factor @ factor.T / d + 0.1 * torch.eye(d, dtype=torch.float64)


def orthogonal(d, key):
    return torch.linalg.qr(normal(d, d, key=(key, "orthogonal"))).Q


def column(*numbers, dtype=torch.float64):
    return torch.tensor(numbers, dtype=dtype)[:, None]


# ---- the Fréchet distance ----

means, deviations = st.floats(-100, 100), st.floats(0, 100)


@given(means, deviations, means, deviations)
@settings(deadline=None, max_examples=60)
def test_frechet_on_the_line(m1, s1, m2, s2):
    moments = [torch.tensor(x, dtype=torch.float64) for x in ([m1], [[s1**2]], [m2], [[s2**2]])]
    expected = (m1 - m2) ** 2 + (s1 - s2) ** 2
    assert frechet_distance_gaussians(*moments) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("d", [1, 2, 7, 40])
def test_frechet_of_commuting_covariances(d):
    """With common axes the distance is that of the standard deviations along them; some of them are 0."""
    rng, axes = rng_for("commuting", d), orthogonal(d, key="commuting")
    s1, s2 = (torch.rand(2, d, generator=rng, dtype=torch.float64) * 3).where(torch.arange(d) % 3 != 1, 0.0)
    m1, m2 = normal(2, d, key=("commuting", d))
    expected = (m1 - m2).square().sum() + (s1 - s2).square().sum()
    actual = frechet_distance_gaussians(m1, (axes * s1**2) @ axes.T, m2, (axes * s2**2) @ axes.T)
    assert actual == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("d", [1, 2, 5, 30])
def test_frechet_agrees_with_the_square_root_of_the_product(d):
    """The formula as it is printed, with scipy's root of a matrix that is not symmetric."""
    (m1, c1), (m2, c2) = random_gaussian(d, "first"), random_gaussian(d, "second")
    product = scipy.linalg.sqrtm((c1 @ c2).numpy())
    expected = np.sum((m1 - m2).numpy() ** 2) + np.trace((c1 + c2).numpy() - 2 * product.real)
    assert frechet_distance_gaussians(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-10)


def test_frechet_of_correlated_pairs_by_hand():
    """For 2 x 2 matrices tr(root of M) is the root of tr M + 2 root of det M; here M = c1 c2 = [[1, .5], [2, 4]]."""
    c1, c2 = torch.tensor([[1.0, 0.5], [0.5, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, 4.0]])
    c1, c2, zero = c1.double(), c2.double() + torch.diag(torch.tensor([1.0, 0.0])).double(), torch.zeros(2).double()
    product = c1 @ c2
    expected = 2 + 5 - 2 * math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    assert frechet_distance_gaussians(zero, c1, zero, c2) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n", "m", "d"), [(2, 2, 1), (50, 80, 4), (300, 200, 20)])
def test_frechet_of_rows_is_that_of_their_unbiased_moments(n, m, d):
    a, b = normal(n, d, key=("rows", n)) @ normal(d, d, key=("mix", d)) + 3, normal(m, d, key=("rows", m, "b"))
    moments = []
    for x in (a.numpy(), b.numpy()):
        moments += [torch.tensor(x.mean(0)), torch.tensor(np.atleast_2d(np.cov(x, rowvar=False)))]
    assert frechet_distance(a, b) == pytest.approx(frechet_distance_gaussians(*moments), rel=1e-9)


@pytest.mark.parametrize(("n", "m", "d"), [(3, 4, 60), (2, 100, 30), (20, 10, 200)])
def test_frechet_with_fewer_rows_than_features(n, m, d):
    """tr(root of Ca Cb) is the nuclear norm of A Bᵀ, of centred rows, over the root of (n-1)(m-1)."""
    a, b = normal(n, d, key=("few", n)), 2 * normal(m, d, key=("few", m, "b")) + 1
    x, y = a - a.mean(0), b - b.mean(0)
    cross = torch.linalg.svdvals(x @ y.T).sum() / math.sqrt((n - 1) * (m - 1))
    traces = x.square().sum() / (n - 1) + y.square().sum() / (m - 1)
    expected = ((a.mean(0) - b.mean(0)).square().sum() + traces - 2 * cross).item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-7)
    assert 0 <= frechet_distance(a, a.flip(0)) < 1e-6


def test_frechet_does_not_change_with_features_that_say_nothing():
    """Three features, turned into fifty: the other 47 directions have no variance, and add none by rounding."""
    a, b = normal(40, 3, key=("three",)), normal(50, 3, key=("three", "b")) * 2 + 1
    axes = orthogonal(50, key="embedding")[:, :3]
    assert frechet_distance(a @ axes.T, b @ axes.T) == pytest.approx(frechet_distance(a, b), abs=1e-8)


@pytest.mark.parametrize("d", [1, 6, 25])
def test_frechet_is_a_distance_of_shapes_not_of_coordinates(d):
    a, b = normal(60, d, key=("shape", d)) * 2, normal(70, d, key=("shape", d, "b")) @ normal(d, d, key=("mix", d)) + 1
    expected, axes, shift = frechet_distance(a, b), orthogonal(d, key="turn"), 100 * normal(d, key=("shift", d))
    assert expected > 0.1
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a @ axes + shift, b @ axes + shift) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * expected, rel=1e-10)
    assert frechet_distance(a, a + shift) == pytest.approx(shift.square().sum().item(), rel=1e-9)


def test_frechet_of_samples_converges_to_that_of_their_gaussians():
    d, n, repeats = 4, 4000, 30
    (m1, c1), (m2, c2) = random_gaussian(d, "left"), random_gaussian(d, "right")
    l1, l2 = torch.linalg.cholesky(c1), torch.linalg.cholesky(c2)
    draws = [
        frechet_distance(normal(n, d, key=(i, "a")) @ l1.T + m1, normal(n, d, key=(i, "b")) @ l2.T + m2)
        for i in range(repeats)
    ]
    stderr = np.std(draws, ddof=1) / math.sqrt(repeats)
    exact = frechet_distance_gaussians(m1, c1, m2, c2)
    bias = (c1.trace() + c2.trace()).item() / n  # of |mean - mean|²; that of the traces is of the same order
    assert stderr < 0.01 * exact
    assert abs(np.mean(draws) - exact - bias) < 4 * stderr + bias


def test_frechet_of_one_distribution_falls_as_one_over_n():
    def average(n):
        return np.mean([frechet_distance(normal(n, 5, key=(n, i)), normal(n, 5, key=(n, i, "b"))) for i in range(20)])

    assert 8 < average(200) / average(2000) < 12.5


# ---- the kernel distance ----


def naive_kernel_distance(a, b):
    def k(x, y):
        return (sum(u * v for u, v in zip(x, y, strict=True)) / len(x) + 1) ** 3

    a, b = a.tolist(), b.tolist()
    within_a = [k(x, y) for x, y in itertools.permutations(a, 2)]
    within_b = [k(x, y) for x, y in itertools.permutations(b, 2)]
    between = [k(x, y) for x in a for y in b]
    return np.mean(within_a) + np.mean(within_b) - 2 * np.mean(between)


def test_the_kernel_by_hand():
    x, y = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0, 0.5], [-2.0, 0.0], [1.0, 1.0]])
    expected = torch.tensor([[27.0, 0.0, 2.5**3], [1.0, 1.0, 1.0]])  # (4 / 2 + 1)³, (-2 / 2 + 1)³, (3 / 2 + 1)³
    assert torch.equal(polynomial_kernel(x, y), expected)


@pytest.mark.parametrize(("n", "m", "d"), [(2, 2, 1), (6, 9, 3), (12, 5, 20)])
def test_kernel_distance_agrees_with_a_double_loop(n, m, d):
    a, b = normal(n, d, key=("loop", n)), normal(m, d, key=("loop", m, "b")) + 0.5
    assert kernel_distance(a, b) == pytest.approx(naive_kernel_distance(a, b), rel=1e-10)
    assert kernel_distance(b, a) == pytest.approx(kernel_distance(a, b), rel=1e-10)


ATOMS = torch.tensor([[0.0, 0.0], [1.0, 2.0], [-1.0, 1.0], [2.0, -1.0]], dtype=torch.float64)
UNLIKE = (0.1, 0.2, 0.3, 0.4), (0.4, 0.3, 0.2, 0.1)


@pytest.mark.parametrize(("n", "m"), [(2, 2), (4, 3)])
@pytest.mark.parametrize(("p", "q"), [UNLIKE, (UNLIKE[0], UNLIKE[0])], ids=["unlike", "the same"])
def test_kernel_distance_is_unbiased(n, m, p, q):
    """On four atoms the squared MMD is a finite sum. The estimate with the pairs (x, x) left in fails the same test."""
    p, q = torch.tensor([p, q], dtype=torch.float64)
    gram = (ATOMS @ ATOMS.T / 2 + 1) ** 3
    exact = ((p - q) @ gram @ (p - q)).item()
    rng, repeats = rng_for("unbiased", n, m), 1500
    of_a = torch.multinomial(p, n * repeats, replacement=True, generator=rng).view(repeats, n)
    of_b = torch.multinomial(q, m * repeats, replacement=True, generator=rng).view(repeats, m)
    unbiased = np.array([kernel_distance(ATOMS[i], ATOMS[j]) for i, j in zip(of_a, of_b, strict=True)])
    biased = [
        (gram[i][:, i].mean() + gram[j][:, j].mean() - 2 * gram[i][:, j].mean()).item()
        for i, j in zip(of_a, of_b, strict=True)
    ]

    def standard_errors_off(draws):
        return abs(np.mean(draws) - exact) / (np.std(draws, ddof=1) / math.sqrt(repeats))

    assert standard_errors_off(unbiased) < 4
    assert standard_errors_off(biased) > 8
    assert unbiased.min() < 0


# ---- neighbours ----


@pytest.mark.parametrize(("n", "m", "d", "k"), [(1, 1, 1, 1), (20, 30, 3, 4), (15, 8, 50, 8), (5, 200, 784, 2)])
def test_nearest_neighbours_agree_with_sorting_every_difference(n, m, d, k):
    queries, references = normal(n, d, key=("queries", n)), normal(m, d, key=("references", m))
    distances, indices = nearest_neighbours(queries, references, k)
    every = np.linalg.norm(queries.numpy()[:, None] - references.numpy()[None], axis=2)
    np.testing.assert_allclose(distances.numpy(), np.sort(every, axis=1)[:, :k], rtol=1e-12)
    np.testing.assert_array_equal(indices.numpy(), np.argsort(every, axis=1)[:, :k])


def test_the_copy_is_found_at_distance_zero():
    """Rounding would hide a copy: the squares of these numbers are a million times its distance from its neighbours."""
    references = 1000 + normal(500, 64, key=("copies",), dtype=torch.float32)
    distances, indices = nearest_neighbours(references[40:60], references, 2)
    assert indices[:, 0].tolist() == list(range(40, 60))
    assert (distances[:, 0] == 0).all() and (distances[:, 1] > 1).all()


def test_neighbours_far_from_the_origin():
    """In float32, |x|² + |y|² - 2 x·y would be off by more than the distance between any two of these rows."""
    references = 100_000 + torch.arange(50.0)[:, None].expand(50, 8)
    queries = references[torch.tensor([7, 31])] + 0.25
    distances, indices = nearest_neighbours(queries, references, 2)
    assert indices.tolist() == [[7, 8], [31, 32]]
    np.testing.assert_allclose(distances.numpy(), [[0.25 * 8**0.5, 0.75 * 8**0.5]] * 2, rtol=1e-12)


def test_neighbours_come_in_the_order_of_their_exact_distances():
    """So far out that the squares of these numbers are rounded to even ones, while the rows lie 1/64 apart."""
    steps = torch.randperm(40, generator=rng_for("order"))
    distances, indices = nearest_neighbours(column(1e8), 1e8 + steps[:, None].double() / 64, 40)
    assert distances[0].tolist() == [i / 64 for i in range(40)]
    assert torch.equal(indices[0], steps.argsort())


def naive_precision_recall(real, fake, k):
    def covered(centres, points):
        def distance(x, y):
            return math.sqrt(sum((u - v) ** 2 for u, v in zip(x, y, strict=True)))

        hits = [False] * len(points)
        for i, centre in enumerate(centres):
            radius = sorted(distance(centre, other) for j, other in enumerate(centres) if j != i)[k - 1]
            hits = [hit or distance(centre, point) <= radius for hit, point in zip(hits, points, strict=True)]
        return sum(hits) / len(points)

    real, fake = real.tolist(), fake.tolist()
    return covered(real, fake), covered(fake, real)


@pytest.mark.parametrize(
    ("real", "fake", "k", "precision", "recall"),
    [
        # Balls around the real rows: [-1, 1], [0, 2], [1, 5], [3, 17]; around the fakes: [-1.5, -0.5], [-2, -1],
        # [-1, 6], [16.5, 17.5], [17, 18]. Of the fakes -1.5 and 17.5 lie outside, of the real rows 10.
        ((0, 1, 3, 10), (-1, -1.5, 2.5, 17, 17.5), 1, 3 / 5, 3 / 4),
        # The second neighbour is farther: the ball of 10 is now [1, 19], that of -1.5 is [-5.5, 2.5].
        ((0, 1, 3, 10), (-1, -1.5, 2.5, 17, 17.5), 2, 1, 1),
        # A row's copy is its nearest neighbour, so its ball is a point: it holds a third copy and nothing else.
        ((0, 0, 5, 5), (0, 0.1, 5, 4.9), 1, 2 / 4, 1),
        ((0, 0, 5, 5), (0, 0.1, 5, 4.9), 2, 1, 1),
        # All fakes alike, on one of three real rows: faithful, and poor.
        ((0, 1, 2), (1, 1, 1, 1), 3 - 1, 1, 1 / 3),
        # All fakes alike, and nowhere.
        ((0, 1, 2), (9, 9, 9, 9), 1, 0, 0),
    ],
)
def test_precision_and_recall_by_hand(real, fake, k, precision, recall):
    assert precision_recall(column(*real), column(*fake), k) == pytest.approx((precision, recall))
    assert precision_recall(column(*fake), column(*real), k) == pytest.approx((recall, precision))


rows = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=4, max_size=12)


@given(rows, rows, st.integers(1, 3), st.sampled_from([torch.float32, torch.float64]))
@settings(deadline=None, max_examples=150)
def test_precision_and_recall_agree_with_a_naive_loop(real, fake, k, dtype):
    """On a lattice, where rows coincide and distances tie."""
    real, fake = torch.tensor(real, dtype=dtype), torch.tensor(fake, dtype=dtype)
    assert precision_recall(real, fake, k) == pytest.approx(naive_precision_recall(real, fake, k))


@pytest.mark.parametrize(("n", "m", "d", "k"), [(30, 40, 2, 3), (40, 60, 10, 1)])
def test_precision_and_recall_agree_with_a_naive_loop_on_scattered_rows(n, m, d, k):
    real, fake = normal(n, d, key=("scattered", n)), 0.8 * normal(m, d, key=("scattered", m, "b")) + 0.3
    expected = naive_precision_recall(real, fake, k)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
    assert precision_recall(real, fake, k) == pytest.approx(expected)


@pytest.mark.parametrize("scale", [1.0, 0.1, 1e-4])
def test_rows_on_the_edge_of_a_ball_are_inside(scale):
    """Half the points of a grid: the others lie one step away, just as far as the balls reach.

    Distances and radii are rounded alike, or some of the points would fall out.
    """
    grid = (torch.cartesian_prod(*[torch.arange(4.0)] * 4) + 0.3) * scale
    others = grid[torch.arange(0, len(grid), 2)]
    assert precision_recall(grid, others, 1) == pytest.approx(naive_precision_recall(grid, others, 1))
    assert precision_recall(grid, others, 3) == pytest.approx(naive_precision_recall(grid, others, 3))


def test_precision_without_recall_recall_without_precision():
    """Real rows in two far clusters; the fakes keep to one of them, or add a third."""
    left, right = normal(100, 8, key=("left",)), normal(100, 8, key=("right",)) + 50
    real, beyond = torch.cat([left, right]), normal(100, 8, key=("beyond",)) - 50
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(left, right) == (0, 0)
    assert precision_recall(real, left[:60]).precision == 1
    assert 0.3 <= precision_recall(real, left[:60]).recall <= 0.5
    assert precision_recall(real, torch.cat([real, beyond])) == pytest.approx((2 / 3, 1))


def test_precision_and_recall_grow_with_k():
    real, fake = normal(80, 10, key=("grow",)), normal(80, 10, key=("grow", "b")) + 0.5
    figures = np.array([precision_recall(real, fake, k) for k in range(1, 20)])
    assert (np.diff(figures, axis=0) >= 0).all() and (figures[-1] > figures[0] + 0.2).all()


# ---- blocks ----


def neighbours_of(a, b):
    distances, indices = nearest_neighbours(a, b, 5)
    return [*distances.flatten().tolist(), *indices.flatten().tolist()]


@pytest.mark.parametrize("function", [kernel_distance, precision_recall, neighbours_of])
def test_the_size_of_a_block_does_not_show(function, monkeypatch):
    a, b = normal(101, 6, key=("blocks",)), normal(67, 6, key=("blocks", "b")) + 0.3
    figures = []
    for size in (1, 100, 1000, 10**9):
        monkeypatch.setattr(metrics, "BLOCK", size)
        figures.append(function(a, b))
    for figure in figures:
        assert figure == pytest.approx(figures[0], rel=1e-10)


class Largest(TorchFunctionMode):
    """Notes the largest tensor that any operation returned."""

    numel = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("function", [kernel_distance, precision_recall, neighbours_of])
@pytest.mark.parametrize(("n", "m", "d"), [(900, 800, 4), (800, 900, 4), (1000, 10, 300)])
def test_the_matrix_of_all_pairs_is_never_held(function, n, m, d, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 20_000)
    a, b = normal(n, d, key=("pairs", n)), normal(m, d, key=("pairs", m, "b"))
    with Largest() as largest:
        function(a, b)
    assert 5000 < largest.numel <= max(20_000, n * d)


# ---- classes and modes ----


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_the_share_of_each_class(dtype):
    shares = class_coverage(torch.tensor([3, 0, 3, 1], dtype=dtype), n_classes=5)
    assert shares.tolist() == [0.25, 0.25, 0.0, 0.5, 0.0]
    assert class_coverage(torch.tensor([9], dtype=dtype)).tolist() == [0.0] * 9 + [1.0]


PAIR = torch.tensor([[0.0, 0.0], [10.0, 0.0]])


def around(x, count):
    return torch.tensor([[x, 0.0]]).expand(count, 2)


@pytest.mark.parametrize(
    ("samples", "options", "expected"),
    [
        ([around(0.0, 10), around(10.0, 10)], {}, (2, 1.0)),
        ([around(0.0, 10), around(5.0, 10)], {}, (1, 0.5)),  # half of them between the modes
        ([around(3.0, 1), around(7.0, 1)], {}, (2, 1.0)),  # three standard deviations are near enough,
        ([around(3.01, 1), around(6.99, 1)], {}, (0, 0.0)),  # more are not
        ([around(3.01, 1), around(6.99, 1)], {"radius": 4.0}, (2, 1.0)),
        ([around(0.0, 98), around(10.0, 2)], {}, (1, 1.0)),  # two of a hundred are strays: five are a tenth of fifty,
        ([around(0.0, 95), around(10.0, 5)], {}, (2, 1.0)),  # and enough
        ([around(0.0, 95), around(10.0, 5)], {"share": 0.2}, (1, 1.0)),
        ([around(0.0, 99), around(10.0, 1)], {"share": 0.0}, (2, 1.0)),  # one is enough for Lin et al.,
        ([around(0.0, 99), around(5.0, 1)], {"share": 0.0}, (1, 0.99)),  # and none is not
        ([around(0.0, 1)], {}, (1, 1.0)),
    ],
)
def test_modes_by_hand(samples, options, expected):
    result = mode_coverage(torch.cat(samples), PAIR, 1.0, **options)
    assert isinstance(result, ModeCoverage) and result == pytest.approx(expected)


def test_a_sample_near_two_modes_belongs_to_the_nearer():
    assert mode_coverage(around(4.0, 10), PAIR, 2.0, radius=4.0) == (1, 1.0)


def test_a_faithful_sample_covers_every_mode():
    """In the plane, 1 - exp(-9/2) of a Gaussian lies within three standard deviations."""
    grid, n = torch.cartesian_prod(torch.arange(-2.0, 3), torch.arange(-2.0, 3)), 20_000
    chosen = torch.randint(25, (n,), generator=rng_for("faithful"))
    samples = grid[chosen] + 0.05 * normal(n, 2, key=("faithful",), dtype=torch.float32)
    expected = 1 - math.exp(-4.5)
    modes, high_quality = mode_coverage(samples, grid, 0.05)
    assert modes == 25
    assert abs(high_quality - expected) < 4 * math.sqrt(expected * (1 - expected) / n)
    assert mode_coverage(samples[chosen < 7], grid, 0.05).modes == 7


# ---- what is taken, and what is refused ----


@pytest.mark.parametrize("function", [frechet_distance, kernel_distance, precision_recall])
def test_features_of_any_float_type_are_taken_and_left_alone(function):
    a, b = (torch.randint(-8, 9, (30, 5), generator=rng_for("types", i)) / 4 for i in range(2))
    before, expected = a.clone(), function(a.double(), b.double())
    for left, right in [(a, b), (a.half(), b.double()), (a.bfloat16(), b), (a.clone().requires_grad_(), b)]:
        assert function(left, right) == expected
    assert torch.equal(a, before)


@pytest.fixture(scope="module")
def plain():
    """The module as its users import it: without the checks of shapes, which refuse bad arguments before it does."""
    spec = importlib.util.spec_from_file_location("aigc_course.metrics.features", metrics.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


X, Y = normal(6, 3, key=("x",)), normal(7, 3, key=("y",))
BAD = X.clone()
BAD[1, 2], BAD[4, 0] = math.nan, math.inf
TWO = "frechet_distance", "kernel_distance", "precision_recall"
MEAN, COV = torch.zeros(3), torch.eye(3)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        *((name, (X[:1], Y), "(a|real) has 1 rows: at least 2") for name in TWO),
        *((name, (X, Y[:0]), "(b|fake) has 0 rows: at least 2") for name in TWO),
        *((name, (BAD, Y), "(a|real): 2 of 18 numbers are NaN or infinite") for name in TWO),
        *((name, (X, BAD), "(b|fake): 2 of 18 numbers are NaN or infinite") for name in TWO),
        *((name, (X, Y[:, :2]), "(a|real) has 3 and (b|fake) has 2 numbers a row") for name in TWO),
        *((name, (X, Y.long()), r"(b|fake) is int64 of shape \(7, 3\): expected .*floats") for name in TWO),
        *((name, (X.numpy(), Y), "(a|real) is ndarray: expected a tensor of floats") for name in TWO),
        *((name, (X[0], Y), r"(a|real) is float64 of shape \(3,\): .*\(n, d\).*flatten") for name in TWO),
        *((name, (X[:, :0], Y[:, :0]), r"(a|real) is float64 of shape \(6, 0\)") for name in TWO),
        ("precision_recall", (X, Y, 6), "k is 6: expected a whole number from 1 to 5.*real"),
        ("precision_recall", (Y, X, 6), "k is 6: expected a whole number from 1 to 5.*fake"),
        ("precision_recall", (X, Y, 0), "k is 0"),
        ("precision_recall", (X, Y, 1.5), "k is 1.5"),
        ("nearest_neighbours", (X, Y, 8), "k is 8: expected a whole number from 1 to 7.*references"),
        ("nearest_neighbours", (X, Y, -1), "k is -1"),
        ("nearest_neighbours", (X[:0], Y), "queries has 0 rows"),
        ("nearest_neighbours", (X, BAD), "references: 2 of 18"),
        ("nearest_neighbours", (X.view(6, 3, 1), Y), "queries is .*flatten"),
        ("frechet_distance_gaussians", (MEAN, COV, MEAN[:2], COV), r"mean_b is float32 of shape \(2,\)"),
        ("frechet_distance_gaussians", (MEAN, COV[:2], MEAN, COV), r"cov_a is .*expected .*\(3, 3\)"),
        ("frechet_distance_gaussians", (COV, COV, MEAN, COV), "mean_a is float32"),
        ("frechet_distance_gaussians", ([0.0], COV, MEAN, COV), "mean_a is list"),
        ("frechet_distance_gaussians", (MEAN, COV, MEAN / 0, COV), "mean_b: 3 of 3 numbers"),
        ("frechet_distance_gaussians", (MEAN, COV, MEAN, -COV), "cov_b has the eigenvalue -1"),
        ("frechet_distance_gaussians", (MEAN, COV + COV.roll(1, 0), MEAN, COV), "cov_a is not symmetric"),
        ("class_coverage", (torch.tensor([1, 10, 12]),), "labels hold 10: expected 0 to 9"),
        ("class_coverage", (torch.tensor([1, -1]),), "labels hold -1"),
        ("class_coverage", (torch.tensor([2, 1]), 2), "labels hold 2: expected 0 to 1"),
        ("class_coverage", (torch.zeros(3),), r"labels are float32 of shape \(3,\): expected whole numbers"),
        ("class_coverage", (torch.zeros(3, 2).long(),), r"labels are int64 of shape \(3, 2\)"),
        ("class_coverage", (torch.zeros(0).long(),), r"labels are int64 of shape \(0,\)"),
        ("class_coverage", (torch.zeros(3).bool(),), "labels are bool"),
        ("class_coverage", ([1, 2],), "labels are list"),
        ("mode_coverage", (BAD[:, :2], PAIR, 1.0), "samples: 1 of 12"),
        ("mode_coverage", (X, PAIR, 1.0), "samples has 3 and means has 2"),
        ("mode_coverage", (PAIR[:0], PAIR, 1.0), "samples has 0 rows"),
        ("mode_coverage", (PAIR, PAIR, 0.0), "std is 0"),
        ("mode_coverage", (PAIR, PAIR, math.nan), "std is nan"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(plain, name, arguments, message):
    with pytest.raises(plain.MetricError, match=message) as refusal:
        getattr(plain, name)(*arguments)
    assert "\n" not in str(refusal.value)
    assert isinstance(refusal.value, CourseError)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"radius": -1.0}, "radius is -1"), ({"share": 1.5}, "share is 1.5"), ({"share": -0.1}, "share")],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(metrics.MetricError, match=message):
        mode_coverage(PAIR, PAIR, 1.0, **options)


def test_a_covariance_rounded_in_float32_is_taken():
    """Singular, so that its smallest eigenvalues come out a little below 0."""
    x = normal(10, 40, key=("rounded",), dtype=torch.float32)
    cov, mean = x.T.cov(), x.mean(0)
    assert torch.linalg.eigvalsh(cov.double())[0] < 0
    assert frechet_distance_gaussians(mean, cov, mean, cov) == pytest.approx(0, abs=1e-4)
