"""bench/train_small.py and bench/models/small_models.py, whole, in a setting for a CPU."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import train_small
from bench.models import small_models, small_tasks, training

SETTINGS = train_small.TINY._replace(steps=12, questions=12)
# Widths are no part of what is asked here. Each expert takes its time backwards; of 16, a token still
# chooses half.
NARROW: dict[str, Any] = {"hidden": 64, "head_sliding": 16, "head_full": 32}
SIZES = {
    "moe": train_small.TINY_SIZES["moe"]._replace(**NARROW, experts=16, expert_width=8),
    "ple": train_small.TINY_SIZES["ple"]._replace(**NARROW, per_layer=16),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both models' folders."""
    out = tmp_path_factory.mktemp("small")
    for name, size in SIZES.items():
        train_small.train(name, size, SETTINGS, out, "cpu")
    return out


@pytest.mark.parametrize("name", SIZES)
def test_training_saves_what_it_judged(trained: Path, name: str):
    folder = trained / name
    notes = json.loads((folder / "training.json").read_text())
    found = notes["found"]
    assert notes["steps"] == 12
    assert notes["tokens"] == 12 * SETTINGS.batch * SETTINGS.length
    assert found["held-out text, nats a byte"] < 4.5  # of 5.8, where nothing is known
    model = small_models.load(folder, torch.float32, "cpu", "eager")
    pieces = small_tasks.windows(
        (folder / train_small.HELD_OUT).read_bytes(), SETTINGS.pieces, SETTINGS.length
    )
    assert small_models.text_loss(model, pieces) == pytest.approx(
        found["held-out text, nats a byte"], abs=1e-4
    )


def test_the_same_seed_gives_the_same_weights(tmp_path: Path):
    """Two steps: the second has what the first left in the optimizer."""
    weights = []
    for seed in (0, 0, 1):
        settings = SETTINGS._replace(steps=2, seed=seed)
        train_small.train("ple", SIZES["ple"], settings, tmp_path, "cpu")
        weights.append((tmp_path / "ple" / small_models.WEIGHTS).read_bytes())
    one, other, another_seeds = weights
    assert one == other
    assert one != another_seeds


@pytest.mark.parametrize("name", small_models.SIZES)
def test_sizes(name: str):
    """The real sizes: below 60 MB in bf16, and what the kernels take."""
    size = small_models.SIZES[name]
    with torch.device("meta"):
        model = small_models.build(small_models.published(size))
    numbers = train_small.numbers(model)
    assert 2 * numbers["numbers"] < small_models.MOST_BYTES - 1_000_000  # held-out text, tokenizer
    assert numbers["active"] > 9_000_000
    assert size.hidden % 256 == 0
    assert {size.head_sliding, size.head_full} == {256, 512}
    assert size.kinds[-1] == "f"


def test_config_and_back():
    for size in small_models.SIZES.values():
        fields = small_models.published(size)
        config = small_models.renamed(fields)
        assert config["head_dim"] == 512
        assert config["swa_head_dim"] == 256
        assert config["num_key_value_heads"] == size.kv_full
        assert config["swa_num_key_value_heads"] == size.kv_sliding
        assert small_models.unrenamed(json.loads(json.dumps(config))) == fields


def test_masks_are_transformers_own(trained: Path):
    model = small_models.load(trained / "moe", torch.float32, "cpu", "eager")
    model.config.sliding_window = 8
    ids = torch.randint(4, 260, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = model(input_ids=ids).logits
        torch.testing.assert_close(small_models.logits(model, ids), theirs)
        model.config.sliding_window = 9
        assert not torch.allclose(small_models.logits(model, ids), theirs)


def test_greedy_answers_by_one_forward(trained: Path):
    model = small_models.load(trained / "ple", torch.float32, "cpu", "eager")
    prompt = b"close ([|"
    ids = [small_tasks.BOS, *small_tasks.encoded(prompt)]
    with torch.no_grad():
        said: list[int] = []
        for _ in range(3):
            said.append(int(small_models.logits(model, torch.tensor([ids + said]))[0, -1].argmax()))
    padded = small_tasks.Question("copying", b"copy abcdefghijk|", b"abcdefghijk")
    # An answer that ends before EOS was said is no right one.
    ends = said.index(small_tasks.EOS) if small_tasks.EOS in said else None
    answer = small_tasks.decoded(said[:ends])
    question = small_tasks.Question("brackets", prompt, answer)
    right, _ = small_models.answered(model, [question, padded])
    assert right == [ends is not None, False]
    generator = random.Random(0)
    other = bytes(generator.choices(b"xyz", k=3))
    assert small_models.answered(model, [question._replace(answer=other)])[0] == [False]


def test_tokenizer(trained: Path):
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(trained / "moe" / "tokenizer.json"))
    text = "def f(x):\n\treturn 'ä\x00€'"
    ids = made.encode(text).ids
    assert ids == [small_tasks.BOS, *small_tasks.encoded(text.encode())]
    assert made.decode(ids) == text


class Router(torch.nn.Module):
    """In the place of transformers': says what it is given."""

    def forward(self, probabilities: Any, chosen: Any) -> Any:
        return probabilities, None, chosen


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = Router()


def test_balance_is_one_where_experts_share():
    layer = Layer()
    balance = train_small.Balance(layer)
    probabilities = torch.full((4, 4), 0.25, requires_grad=True)
    layer.router(probabilities, torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3]]))
    assert torch.as_tensor(balance.take()).item() == pytest.approx(1.0)
    one = torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 4, requires_grad=True)
    layer.router(one, torch.tensor([[0, 1]] * 4))
    spread = balance.take()
    assert float(spread) == pytest.approx(2.0)
    spread.backward()
    assert one.grad is not None
    assert one.grad[0, 0] > one.grad[0, 2]
    balance.remove()
    layer.router(probabilities, torch.tensor([[0, 1]]))
    assert balance.take() == 0.0


def test_balance_counts_more_than_bf16_can():
    """Of 8 experts one gets half of 4096 choices; bf16 has no integer behind 256 that is odd."""
    layer = Layer()
    balance = train_small.Balance(layer)
    chosen = torch.arange(4096) % 14 % 8  # the first six experts get two of 14
    chosen[:2048] = 0
    shares = chosen.bincount(minlength=8) / 4096
    probabilities = shares.bfloat16().expand(4096, 8).clone().requires_grad_()
    layer.router(probabilities, chosen[:, None])
    spread = torch.as_tensor(balance.take())
    expected = 8 * (shares * shares.bfloat16().float()).sum()
    torch.testing.assert_close(spread, expected, atol=0, rtol=1e-5)
    spread.backward()
    assert probabilities.grad is not None
    assert probabilities.grad[0, 0] > 4 * probabilities.grad[0, 7] > 0
    layer.router(probabilities, chosen[:, None])
    (load,) = balance.remove()
    torch.testing.assert_close(load, shares)


def test_schedule():
    rates = [train_small.schedule(step, 1000, 1.0) for step in range(1000)]
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) == training.WARM - 1
    assert rates[0] < 0.01
    assert rates[-1] == pytest.approx(0.02, abs=1e-3)


def test_the_first_rates_do_not_depend_on_the_number_of_steps():
    """It is known only after `TIMED`: a run with that number as --steps has the same rates."""
    known = range(train_small.TIMED.stop)
    assert train_small.TIMED.stop < training.WARM
    one, other = (
        [train_small.schedule(step, steps, 1.0) for step in known] for steps in (1000, 10_000_000)
    )
    assert one == other


def test_minutes_decide_how_many_steps(monkeypatch: pytest.MonkeyPatch, trained: Path):
    """Steps of half a second by a clock of its own, a minute of them."""
    clock = [0.0]
    monkeypatch.setattr(train_small.time, "monotonic", lambda: clock[0])

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

    class Data:
        text = torch.zeros(1)

        def batch(self) -> None:
            clock[0] += 0.5

    model = Model()
    monkeypatch.setattr(
        train_small, "losses", lambda *given: (model.weight.sum() * 0, model.weight.sum() * 0)
    )
    settings = train_small.Settings(minutes=1.0)
    done = train_small.fit(model, Data(), settings, lambda: False, 0.0)
    assert 118 <= done["steps"] <= 121
    end = clock[0] + 25
    stopped = train_small.fit(model, Data(), settings, lambda: clock[0] > end, clock[0])
    assert 49 <= stopped["steps"] <= 51 < stopped["planned"]
