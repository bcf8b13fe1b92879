"""`python -m experiments.deq`: a tiny run, the penalty against its closed form, the gradients against each other."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from experiments import deq, deq_config, deq_gradient, deq_network, store
from experiments.deq_config import GradientConfig, NetworkConfig
from experiments.errors import NonFiniteError, UserError, explain
from theria.nn.equilibrium import DeepEquilibrium

ROOT = Path(__file__).resolve().parents[2]
FEW = (
    "seeds=[0]",
    "network.d_model=8",
    "network.n_heads=2",
    "network.d_ff=8",
    "training.steps=3",
    "gradient.batch=4",
    "gradient.repeats=1",
    "gradient.unrolled=[1,4,60]",
    "log_every=1",
)


@pytest.fixture
def composed():
    """Overrides -> the configuration as its dataclasses."""
    deq_config.register()
    with initialize_config_dir(store.CONFIG_DIR, version_base="1.3"):
        yield lambda *overrides: store.to_object(compose("deq", ["experiment=deq", *overrides, "run_dir=unused"]))
    GlobalHydra.instance().clear()


def test_a_tiny_run_writes_what_it_found(composed, tmp_path, capsys):
    results = deq.run(composed(*FEW), tmp_path / "run", ["experiment=deq", "run_dir=elsewhere"])
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    assert results["command"] == "python -m experiments.deq experiment=deq"
    assert results["networks"].keys() == {"equilibrium", "transformer_1", "transformer_3"}
    assert results["samples"] == {"train": 1297, "test": 500}
    assert {"torch", "python", "cpu", "scikit-learn"} <= results["machine"].keys()
    for when in ("at_the_start", "after_training"):
        differences = [results["gradient"][when][f"unrolled_{n}"]["relative_difference"] for n in (1, 4, 60)]
        assert differences[0] > differences[1] > differences[2]
        assert differences[2] < 1e-9
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 3
    assert "everything is in" in capsys.readouterr().out


def test_the_equilibrium_and_one_block_are_of_similar_size():
    networks = deq_network.build(NetworkConfig(), seed=0)
    count = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    assert count["transformer_1"] == count["equilibrium"] + 2 * NetworkConfig().d_model  # the final norm
    assert count["transformer_3"] > 2 * count["equilibrium"]


def test_the_memory_of_the_implicit_gradient_does_not_grow_with_the_depth():
    network = deq_network.build(NetworkConfig(d_model=8, n_heads=2, d_ff=8), seed=0)["equilibrium"]
    data = deq_network.draw(1700, seed=0)
    costs = deq_gradient.compare(
        network, data.x[:64], data.y[:64], GradientConfig(tol=1e-6, unrolled=[10, 100], repeats=1)
    )
    ten, hundred = (costs[f"unrolled_{n}"]["peak_mib"] for n in (10, 100))
    assert 8 < hundred / ten < 12
    assert costs["implicit"]["peak_mib"] < hundred / 10


def test_what_is_compared_stays_as_it_was():
    network = deq_network.build(NetworkConfig(d_model=8, n_heads=2, d_ff=8), seed=0)["equilibrium"]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    data = deq_network.draw(1700, seed=0)
    deq_gradient.compare(network, data.x[:2], data.y[:2], GradientConfig(unrolled=[2], repeats=1))
    assert isinstance(network.core, DeepEquilibrium)
    assert network.core.tol == NetworkConfig().tol
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


def test_expansion_is_that_of_the_jacobian():
    """Of z -> A z + x: |J|_F^2 / n = |A|_F^2 / D, and its gradient in A is 2 A / D, both by averages over noise."""
    D, draws = 4, 20_000
    torch.manual_seed(0)
    linear = nn.Linear(D, D, bias=False, dtype=torch.float64)

    class Block(nn.Module):
        def forward(self, x, z):
            return x + linear(z)

    x = torch.zeros(draws, 1, D, dtype=torch.float64)
    value = deq_network.expansion(Block(), x, torch.randn_like(x), torch.randn_like(x))
    (gradient,) = torch.autograd.grad(value, linear.weight)
    wanted = linear.weight.detach().square().sum() / D
    # The standard deviation of such a mean is below 2 / sqrt(20,000) = 1.4 % of the value.
    torch.testing.assert_close(value.detach(), wanted, rtol=0.05, atol=0)
    torch.testing.assert_close(gradient, 2 * linear.weight.detach() / D, rtol=0, atol=0.05)


def test_the_seed_decides_everything(composed, tmp_path):
    def accuracies(*overrides: str):
        few = ("training.steps=1", "network.layers=[1]", "gradient.unrolled=[]", "gradient.tol=1e-3")
        networks = deq.run(composed(*FEW, *few, *overrides), tmp_path / overrides[0], [])["networks"]
        return {name: figures["test_accuracy_of_each_seed"] for name, figures in networks.items()}

    both, first, second = (accuracies(f"seeds={seeds}") for seeds in ("[1,2]", "[1]", "[2]"))
    assert both == {name: first[name] + second[name] for name in both}


def test_intervals_are_of_one_seed_each():
    """Two seeds share test images and are not twice as many trials. Wilson: of 8 in 10, 0.4902 to 0.9433."""
    figures = {"parameters": 1, "processor_seconds": 0.0, "step_peak_mib": 0.0}
    summary = deq._summary([{"correct": (torch.arange(10) < right).double(), **figures} for right in (8, 10)])
    assert summary["test_accuracy"] == pytest.approx(0.9)
    assert summary["test_accuracy_of_each_seed"] == [0.8, 1.0]
    assert summary["test_accuracy_wilson95_of_each_seed"][0] == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert "test_accuracy_ci95" not in summary


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.steps=0", "training.steps=0: needed is at least 1"),
        ("training.lr=0", "positive"),
        ("training.lr=nan", "positive"),
        ("network.tol=-1", "positive"),
        ("training.contraction=-1", "at least 0"),
        ("network.d_model=10", "multiple of network.n_heads=4"),
        ("network.layers=[0]", "at least 1"),
        ("training.samples=1797", "left to test on"),
        ("training.samples=8", "size of a batch"),
        ("seeds=[]", "at least one"),
        ("seeds=[1,0,1]", "a seed is repeated"),
        ("network.layer=3", "did you mean network.layers"),
    ],
)
def test_a_mistake_is_named(composed, override, words, tmp_path):
    with pytest.raises(UserError, match=words):  # noqa: PT012
        try:
            config = composed(override)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(explain(error)) from error
        deq.run(config, tmp_path, [])


def test_an_equilibrium_that_is_not_reached_ends_with_advice(composed, tmp_path):
    with pytest.raises(NonFiniteError, match=r"raise training\.contraction"):
        deq.run(composed(*FEW, "gradient.max_iter=1"), tmp_path, [])


def test_the_command_and_its_committed_result(process, tmp_path):
    done = process("experiments.deq", "experiment=deq", *FEW, "run_dir=mine")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine" / "results.json").exists()
    results = json.loads((ROOT / "docs" / "benchmarks" / "deq" / "results.json").read_text())
    assert results["command"] == "python -m experiments.deq experiment=deq"
