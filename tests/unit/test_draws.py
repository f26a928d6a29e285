"""Draws by inversion and entropies, in triton's interpreter and in plain PyTorch, against float64."""

import pytest
import torch

from kdclimb.kernels import Softcap, draws

CAP = Softcap(23.0, 5.0, 7.5)
PATHS = {"triton": draws._launch, "torch": draws.draw}


def truth(logits, softcap, temperature):
    logits = logits.double()
    if softcap is not None:
        logits = softcap.a * torch.sigmoid((logits + softcap.b) / softcap.c)
    return (logits / temperature).softmax(dim=1)


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]


@pytest.mark.parametrize("softcap", [CAP, None])
@pytest.mark.parametrize(("vocab", "block", "temperature"), [(300, 32, 1.7), (300, 512, 1.0), (50304, 1024, 1.0)])
def test_each_number_draws_the_word_at_whose_place_it_lies(path, vocab, block, temperature, softcap, monkeypatch):
    monkeypatch.setattr(draws, "BLOCK", block)
    torch.manual_seed(0)
    tokens = 3 if vocab > 1000 else 8
    logits = (4 * torch.randn(tokens, vocab)).bfloat16()
    numbers = torch.rand(tokens, 20).sort(dim=1).values
    numbers[0, 0], numbers[0, -1] = 0.0, 1.0 - 2**-24
    before = logits.clone()
    words, entropies = path(logits, softcap, temperature, numbers)
    probs = truth(logits, softcap, temperature)
    ends = probs.cumsum(dim=1).gather(1, words)
    begins = ends - probs.gather(1, words)
    assert (begins <= numbers + 1e-6).all() and (numbers <= ends + 1e-6).all()
    assert words.max() < vocab and words.unique().numel() > 20 and torch.equal(logits, before)
    torch.testing.assert_close(entropies, torch.special.entr(probs).sum(dim=1).float(), rtol=1e-5, atol=1e-5)


def test_a_word_without_probability_is_never_drawn(path, monkeypatch):
    monkeypatch.setattr(draws, "BLOCK", 16)
    logits = torch.full((1, 50), -1e4)
    logits[0, [3, 20, 49]] = 0.0  # in three of four blocks
    words, entropy = path(logits, None, 1.0, torch.linspace(0.0, 0.999, 30)[None])
    assert torch.equal(words, torch.tensor([3, 20, 49]).repeat_interleave(10)[None])
    torch.testing.assert_close(entropy, torch.tensor([3.0]).log())


def test_a_certain_word_has_no_entropy(path):
    logits = torch.zeros(2, 50)
    logits[:, 7] = 1e4
    words, entropy = path(logits, None, 1.0, torch.rand(2, 5))
    assert words.eq(7).all() and entropy.eq(0.0).all()
