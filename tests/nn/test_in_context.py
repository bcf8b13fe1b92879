"""In-context learners: symmetries, independence of the queries, prefixes."""

import pytest
import torch

from theria.nn import InContextClassifier, InContextRegressor

EXACT = 1e-12  # float64, the same arithmetic in another order


@pytest.fixture
def classification():
    torch.manual_seed(0)
    model = InContextClassifier(4, image_size=12, d_model=16, n_heads=2, n_layers=2).double()
    support_x = torch.rand(3, 8, 1, 12, 12, dtype=torch.float64)
    support_y = torch.arange(4).repeat(3, 2)
    query_x = torch.rand(3, 5, 1, 12, 12, dtype=torch.float64)
    return model, support_x, support_y, query_x


def test_order_of_the_support_does_not_matter(classification):
    model, support_x, support_y, query_x = classification
    order = torch.randperm(8)
    expected = model(support_x, support_y, query_x)
    assert expected.shape == (3, 5, 4)
    permuted = model(support_x[:, order], support_y[:, order], query_x)
    torch.testing.assert_close(permuted, expected, rtol=EXACT, atol=EXACT)
    mislabelled = model(support_x[:, order], support_y, query_x)
    assert (mislabelled - expected).abs().max() > 1e-6


def test_queries_do_not_see_each_other(classification):
    model, support_x, support_y, query_x = classification
    together = model(support_x, support_y, query_x)
    alone = torch.cat([model(support_x, support_y, query_x[:, i : i + 1]) for i in range(5)], 1)
    torch.testing.assert_close(together, alone, rtol=EXACT, atol=EXACT)


def test_tasks_are_independent_and_vmap_agrees(classification):
    model, *episode = classification
    expected = torch.stack([model(*(part[t] for part in episode)) for t in range(3)])
    torch.testing.assert_close(model(*episode), expected, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(torch.func.vmap(model)(*episode), expected, rtol=EXACT, atol=EXACT)


def test_classifier_learns_from_its_context():
    """Binary tasks whose labels are drawn at random: only the support can tell them, chance is 50 %."""
    torch.manual_seed(0)
    model = InContextClassifier(2, image_size=8, stem="patch", patch=8, d_model=32, n_heads=2, n_layers=2)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(1)

    def sample(tasks):
        prototypes = torch.randn(tasks, 2, 64, generator=generator)
        labels = torch.randint(2, (tasks, 12), generator=generator)
        labels[:, :2] = torch.tensor([0, 1])  # each class is in the support
        x = prototypes.gather(1, labels[..., None].expand(-1, -1, 64))
        x = (x + 0.3 * torch.randn(x.shape, generator=generator)).reshape(tasks, 12, 1, 8, 8)
        return x[:, :6], labels[:, :6], x[:, 6:], labels[:, 6:]

    for _ in range(200):
        support_x, support_y, query_x, query_y = sample(32)
        logits = model(support_x, support_y, query_x)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), query_y.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    support_x, support_y, query_x, query_y = sample(200)
    assert (model(support_x, support_y, query_x).argmax(-1) == query_y).float().mean() > 0.9


@pytest.mark.parametrize("flat", [False, True])
def test_regressor_set_mode(flat):
    torch.manual_seed(0)
    model = InContextRegressor(3, d_model=16, n_heads=2, n_layers=2).double()
    x, query = torch.randn(2, 7, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    y = torch.randn(2, 7, *([] if flat else [1]), dtype=torch.float64)
    out = model(x, y, query)
    assert out.shape == ((2, 4) if flat else (2, 4, 1))
    order = torch.randperm(7)
    torch.testing.assert_close(model(x[:, order], y[:, order], query), out, rtol=EXACT, atol=EXACT)
    with pytest.raises(ValueError, match="causal=True"):
        model.prefixes(x, y)


def test_regressor_prefixes_equal_one_call_for_each_length():
    torch.manual_seed(0)
    model = InContextRegressor(3, d_model=16, n_heads=2, n_layers=2, causal=True).double()
    x, y = torch.randn(2, 6, 3, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    one_by_one = [model(x[:, :i], y[:, :i], x[:, i : i + 1]) for i in range(6)]
    torch.testing.assert_close(model.prefixes(x, y), torch.cat(one_by_one, 1), rtol=EXACT, atol=EXACT)


def test_regressor_refuses_flat_targets_of_several_outputs():
    model = InContextRegressor(3, y_dim=2)
    with pytest.raises(ValueError, match="last dimension of 2"):
        model(torch.randn(4, 3), torch.randn(4), torch.randn(1, 3))
