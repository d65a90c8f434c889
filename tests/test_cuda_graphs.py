"""What is recorded once gives the same when it is replayed."""

import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from switch_bank.config import Config
from switch_bank.cuda_graphs import CudaGraphs
from switch_bank.distributed import flat_gradients
from switch_bank.model.gpt import SwitchBankGPT
from switch_bank.numerics import set_numerics
from switch_bank.schedules import StepState, step_states

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
TOKENS = 256


def test_replays_give_the_losses_and_gradients_of_the_function_on_other_tokens_and_weights(config_of, model_of) -> None:
    config: Config = config_of(width=64, expert_width=64, window=128, dtype="bfloat16", experts=4)
    device = torch.device("cuda")
    set_numerics(device)
    graphs = CudaGraphs(device)
    model: SwitchBankGPT = model_of(config).to(device)
    gradients = flat_gradients(list(model.parameters()))
    model.compile()
    states, seed = step_states(config, device), torch.tensor(0, device=device)

    def forward_backward(tokens: Tensor, targets: Tensor, slices: Tensor, *state: Tensor) -> Tensor:
        output = model(tokens, targets, StepState(*state), slices, seed)
        output.loss.backward()
        return torch.cat([output.token_losses.flatten(), output.routing.flat()])

    generator = torch.Generator(device).manual_seed(0)
    for turn in range(4):
        tokens = torch.randint(97, (2, 2, TOKENS), device=device, generator=generator)
        arguments = (*tokens, torch.tensor([turn, turn + 1], device=device), *states[100 * turn])
        results = []
        for replayed in (False, True):
            gradients.zero_()
            row = graphs("any", forward_backward, *arguments) if replayed else forward_backward(*arguments)
            results.append((row.clone(), gradients.clone()))
        (row, gradient), (own_row, own_gradient) = results
        assert torch.equal(row, own_row) and gradient.abs().sum() > 0
        torch.testing.assert_close(own_gradient, gradient, rtol=0, atol=2e-2 * float(gradient.abs().max()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, device=device, generator=generator), alpha=0.02)


WAITS = """
import torch
from switch_bank.cuda_graphs import CudaGraphs
one = torch.ones((), device="cuda")
CudaGraphs(one.device)("any", lambda x: x * x.item(), one)
"""


def test_what_waits_for_the_gpu_is_refused_with_what_to_do() -> None:
    # In a process of its own: afterwards torch draws no more random numbers.
    finished = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True)
    assert finished.returncode == 1 and re.search("cannot be recorded.*--run.no-cuda-graphs", finished.stderr)
