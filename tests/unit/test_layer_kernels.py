"""The kernels of the layers, in triton's interpreter: the fused ReLU^2 MLP, and the tables' gradients."""

import pytest
import torch

from kdclimb.kernels import rows
from kdclimb.kernels.mlp import _mlp, relu2_mlp


def plain(x, up, down):
    return torch.relu(x @ up.T).square() @ down.T


def error(value, truth):
    return (value.double() - truth).norm() / truth.norm()


@pytest.mark.parametrize("tokens", [1, 700])
def test_result_and_gradients_are_as_exact_as_plain_bf16(tokens):
    torch.manual_seed(0)
    x, up, down = torch.randn(tokens, 40), 0.2 * torch.randn(136, 40), 0.2 * torch.randn(40, 136)
    upstream = torch.randn(tokens, 40).bfloat16()

    def run(function, x_dtype, weights_dtype):
        inputs = [x.bfloat16().to(x_dtype), up.bfloat16().to(weights_dtype), down.bfloat16().to(weights_dtype)]
        inputs = [t.requires_grad_() for t in inputs]
        out = function(*inputs)
        return [out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]

    truth = run(plain, torch.float64, torch.float64)
    ours = run(lambda *inputs: _mlp(*inputs)[0], torch.bfloat16, torch.float32)
    for mine, reference, true in zip(ours, run(plain, torch.bfloat16, torch.bfloat16), truth, strict=True):
        assert error(mine, true) <= 3 * error(reference, true)


def test_elsewhere_it_is_plain_pytorch():
    torch.manual_seed(0)
    x, up, down = torch.randn(5, 8), torch.randn(32, 8), torch.randn(8, 32)
    torch.testing.assert_close(relu2_mlp(x, up, down), plain(x, up, down))


def test_rows_are_added_where_they_belong_also_where_they_meet():
    torch.manual_seed(0)
    grad, places = torch.randn(9, 12).bfloat16(), torch.tensor([3, 0, 3, 6, 6, 6, 1, 0, 3])
    ours, theirs = torch.ones(7, 12), torch.ones(7, 12)
    rows._launch(ours, places, grad)
    rows.add_rows(theirs, places, grad)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(theirs[1], 1 + grad[6].float())
