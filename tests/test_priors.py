"""priors.py against values derived on paper."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import priors
from priors import (
    constrained_ranking_loss,
    cosine_similarity,
    encode_texts,
    fixed_bound,
    length_ratio,
    margin_bound,
    random_bound,
    ranking_loss,
)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_length_ratio():
    """3 against 12 tokens and 12 against 3 are both 3/12 = 0.25; equal lengths are 1."""
    ratio = length_ratio(torch.tensor([3, 12, 7]), torch.tensor([12, 3, 7]))
    assert ratio.tolist() == [0.25, 0.25, 1.0]


def test_cosine_similarity():
    """(1, 0) against (1, √3)/2 is 60°: cosine 1/2, angular 1 - (π/3)/π = 2/3. 90° gives 0 and 1/2. 120° has the cosine
    -1/2, clamped to 0: 1/2. The same direction gives 1, whatever the lengths."""
    root = math.sqrt(3)
    a = torch.tensor([[1.0, 0.0]] * 4)
    b = torch.tensor([[0.5, root / 2], [0.0, 1.0], [-0.5, root / 2], [7.0, 0.0]])
    assert cosine_similarity(a, b).tolist() == pytest.approx([2 / 3, 0.5, 0.5, 1.0])
    assert cosine_similarity(a, b, angular=False).tolist() == pytest.approx([0.5, 0.0, -0.5, 1.0], abs=1e-7)


@pytest.mark.parametrize(
    "similarity, betas, bound",
    [
        (1.0, (20, 0.001, -15), 4.98002),  # 20 / 1.001 - 15
        (0.25, (20, 0.001, -15), 64.68127),  # 20 / 0.251 - 15
        (0.5, (30, 0.001, -25), 34.88024),  # 30 / 0.501 - 25
        (1.0, (20,), 20 / 1.001),  # the signature's defaults
    ],
)
def test_margin_bound(similarity, betas, bound):
    assert margin_bound(torch.tensor([0.5, similarity]), *betas)[1].item() == pytest.approx(bound, abs=1e-4)


def test_loss_values():
    """-log σ(x) = log(1 + e^-x). m = 0, δ* = 4: log 2 + log(1 + e^-4). m = 3, δ* = 5: log(1 + e^-3) + log(1 + e^-2)."""
    margin, bound = torch.tensor([0.0, 3.0]), torch.tensor([4.0, 5.0])
    expected = [math.log(2) + softplus(-4), softplus(-3) + softplus(-2)]
    assert constrained_ranking_loss(margin, bound).tolist() == pytest.approx(expected)
    assert constrained_ranking_loss(margin).tolist() == pytest.approx([math.log(2), softplus(-3)])
    assert ranking_loss(margin).tolist() == pytest.approx([math.log(2), softplus(-3)])


def test_label_smoothing_mixes_both_terms():
    """ε = 0.25, m = 1, δ* = 3: 0.75 log(1 + e^-1) + 0.25 log(1 + e^1) + 0.75 log(1 + e^-2) + 0.25 log(1 + e^2)."""
    margin, bound = torch.tensor([1.0]), torch.tensor([3.0])
    first, second = (0.75 * softplus(-x) + 0.25 * softplus(x) for x in (1, 2))
    assert constrained_ranking_loss(margin, bound, 0.25).item() == pytest.approx(first + second)
    assert constrained_ranking_loss(margin, None, 0.25).item() == pytest.approx(first)
    assert ranking_loss(margin, 0.25).item() == pytest.approx(first)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_one_function_used_twice(smoothing):
    """L = ranking_loss(m) + ranking_loss(δ* - m), in values and gradients, in any shape."""
    margin = torch.linspace(-9, 9, 12).view(3, 4).requires_grad_()
    bound = torch.linspace(1, 40, 12).view(3, 4)
    both = ranking_loss(margin, smoothing) + ranking_loss(bound - margin, smoothing)
    loss = constrained_ranking_loss(margin, bound, smoothing)
    assert loss.shape == (3, 4) and torch.equal(loss, both)
    assert torch.equal(*(torch.autograd.grad(own.sum(), margin)[0] for own in (loss, both)))


def test_minimum_is_at_half_the_bound():
    """dL/dm = -σ(-m) + σ(m - δ*), which is 0 at m = δ*/2; L(δ*/2 + d) = L(δ*/2 - d); L'' > 0."""
    bound = torch.tensor([0.5, 5.0, 64.0], dtype=torch.float64)
    margin = (bound / 2).requires_grad_()
    (gradient,) = torch.autograd.grad(constrained_ranking_loss(margin, bound).sum(), margin)
    assert gradient.abs().max() < 1e-12
    offset = torch.tensor([0.3, 2.0, 40.0], dtype=torch.float64)
    left = constrained_ranking_loss(bound / 2 - offset, bound)
    assert torch.allclose(left, constrained_ranking_loss(bound / 2 + offset, bound))
    middle = constrained_ranking_loss(bound / 2, bound)
    assert (left > middle).all()
    grid = torch.linspace(-20, 30, 2001, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(constrained_ranking_loss(grid, torch.full_like(grid, 5.0)).sum(), grid)
    assert (first.diff() > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_stable(dtype):
    """At ±1e4 one term vanishes and the other is linear: L = |m| - δ* on the right (m = 1e4), |m| on the left."""
    margin = torch.tensor([1e4, -1e4, 0.0], dtype=dtype, requires_grad=True)
    bound = torch.tensor([5.0, 5.0, 5.0], dtype=dtype)
    loss = constrained_ranking_loss(margin, bound)
    loss.sum().backward()
    assert loss.dtype == dtype
    # bf16 has 8 significant bits: near 1e4 it steps by 64.
    assert loss[:2].tolist() == pytest.approx([9995.0, 10000.0], abs=64 if dtype == torch.bfloat16 else 1e-2)
    assert margin.grad[:2].tolist() == [1.0, -1.0]
    assert margin.grad.isfinite().all()


def test_no_gradient_into_the_bound():
    similarity = torch.tensor([0.5, 0.9], requires_grad=True)
    bound = margin_bound(similarity, 20, 0.001, -15)
    assert not bound.requires_grad
    margin, leaf = torch.tensor([1.0, 2.0], requires_grad=True), bound.clone().requires_grad_()
    constrained_ranking_loss(margin, leaf).sum().backward()
    assert leaf.grad is None and margin.grad is not None


def test_random_bound_is_a_function_of_seed_and_row():
    assert torch.equal(random_bound(100, 4, 5, 7), random_bound(100, 4, 5, 7))
    assert torch.equal(random_bound(10, 4, 5, 7), random_bound(100, 4, 5, 7)[:10])
    assert not torch.equal(random_bound(100, 4, 5, 7), random_bound(100, 4, 5, 8))
    many = random_bound(10000, 4, 5, 0)
    assert many.min() >= 4 and many.max() <= 5
    assert many.mean().item() == pytest.approx(4.5, abs=0.02)  # the mean's standard error is 0.0029


def test_fixed_bound():
    assert fixed_bound(3, 4.5).tolist() == [4.5, 4.5, 4.5]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: length_ratio(torch.tensor([1]), torch.tensor([1, 2])), r"\(1,\).*\(2,\)"),
        (lambda: length_ratio(torch.tensor([3, 0]), torch.tensor([1, 2])), "at least 1.*: 0 at index 1"),
        (lambda: cosine_similarity(torch.ones(1, 2), torch.ones(2, 2)), "shape"),
        (lambda: cosine_similarity(torch.tensor([[1.0, math.nan]]), torch.ones(1, 2)), "chosen.*not finite: nan"),
        (lambda: cosine_similarity(torch.ones(1, 2), torch.zeros(1, 2)), "rejected embedding is zero.*index 0"),
        (lambda: margin_bound(torch.tensor([1.0, 0.9]), 1, 0.001, -1), "beta3=-1 give: -0.000999.* at index 0"),
        (lambda: margin_bound(torch.tensor([0.5, math.nan]), 20), "positive and finite.*nan at index 1"),
        (lambda: margin_bound(torch.tensor([0.5]), 20, -0.5), "beta2=-0.5.*inf at index 0"),
        (lambda: fixed_bound(2, 0.0), "positive and finite, not 0.0"),
        (lambda: fixed_bound(2, math.nan), "not nan"),
        (lambda: random_bound(2, 5.0, 4.0, 0), "low=5.0, high=4.0"),
        (lambda: random_bound(2, 0.0, 4.0, 0), "low=0.0"),
        (lambda: constrained_ranking_loss(torch.ones(2), torch.ones(3)), r"margin.*\(2,\).*bound.*\(3,\)"),
        (lambda: constrained_ranking_loss(torch.ones(2), label_smoothing=0.6), "not 0.6"),
        (lambda: ranking_loss(torch.ones(2), -0.1), "not -0.1"),
        (lambda: encode_texts(["a"], "anything", pooling="max"), "'max'"),
    ],
)
def test_nonsense_is_refused_with_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture(scope="module")
def bert(tokenizer, tmp_path_factory) -> str:
    """A small encoder that looks both ways, with 64 positions."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        initializer_range=0.3,
    )
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("pooling, pool", [("mean", lambda h: h.mean(0)), ("cls", lambda h: h[0])])
@pytest.mark.parametrize("batch_tokens, batches", [(1, [1, 1, 1]), (51, [1, 2]), (10000, [3])])
def test_embeddings_are_those_of_each_text_alone(bert, tokenizer, pooling, pool, batch_tokens, batches):
    """Whatever its batch; the longest first, as many texts in a batch as the tokens allow, padding included; and a text
    that occurs twice is encoded once. Of 26, 5 and 4 tokens, 51 hold one of 26, or ten of 5."""
    texts, sizes = ["Aisle 3.", "You will find milk in aisle 2. " * 3, "Aisle 3.", "No."], []
    model = transformers.AutoModel.from_pretrained(bert).eval()
    with torch.no_grad():
        alone = [model(tokenizer(text, return_tensors="pt").input_ids).last_hidden_state[0] for text in texts]
    embeddings = encode_texts(
        texts, bert, pooling, batch_tokens=batch_tokens, progress=lambda b: sizes.extend(map(len, b)) or b
    )
    assert sizes == batches and torch.allclose(embeddings, torch.stack([pool(h) for h in alone]), atol=1e-4)
    assert not embeddings.is_inference()  # they may meet weights that are trained


def test_a_long_text_loses_its_beginning(bert, toy, tokenizer):
    """The first token stays, as the tokenizer sets it; an encoder that takes fewer tokens than asked for gets fewer."""
    text = "You will find milk in aisle 2. " * 9
    ids = tokenizer(text).input_ids
    for folder, asked, left in ((toy, 6, 6), (bert, 512, 64)):
        model = transformers.AutoModel.from_pretrained(folder).eval()
        with torch.no_grad():
            kept = model(torch.tensor([ids[:1] + ids[1 - left :]])).last_hidden_state.mean(1)
        assert len(ids) > left and torch.allclose(encode_texts([text], folder, "mean", asked), kept, atol=1e-4)
    assert encode_texts([], toy, "mean").shape == (0, 128)


def test_the_first_token_of_a_causal_encoder_is_refused(toy, bert):
    """It sees only itself: every pair would have similarity 1."""
    with pytest.raises(ValueError, match="causal.*mean"):
        encode_texts(["Aisle 3.", "No."], toy, "cls")


def test_priors_needs_torch_alone(tmp_path):
    """Pasted into an empty folder, everything but encode_texts works without transformers, numpy or this repository."""
    (tmp_path / "priors.py").write_text(Path(priors.__file__).read_text())
    code = (
        "import sys; sys.modules['transformers'] = None; import torch, priors\n"
        "s = priors.length_ratio(torch.tensor([2]), torch.tensor([4]))\n"
        "print(priors.constrained_ranking_loss(torch.zeros(1), priors.margin_bound(s, 20, beta3=-15)).item())\n"
        "assert not {'common', 'reward', 'deepspeed', 'datasets', 'tyro', 'scipy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(math.log(2))  # δ* = 24.9: the second term is e^-24.9
