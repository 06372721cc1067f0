"""Steps of gradient descent on a few tensors, with a checkpoint to go on from."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from steno.errors import CalibrationError
from steno.learn import checkpoint
from steno.learn.options import Options

SAVE_EVERY = 20
MOMENTS = ("exp_avg", "exp_avg_sq")


def train(
    tensors: dict[str, Tensor], loss_of: Callable[[int], Tensor], options: Options, *, learning_rate: float
) -> Mapping[str, Tensor]:
    """The tensors after `options.steps` steps of AdamW on `loss_of(step)`, at most one call a step, in order.

    The rate rises over the first tenth and falls linearly to zero; gradients are cut at 0.5 by value. A checkpoint is
    written every 20 steps, and read where there is one.

    Raises CalibrationError if the checkpoint is of another run, or the loss is not finite.
    """
    for tensor in tensors.values():
        tensor.requires_grad_(True)
    optimizer = torch.optim.AdamW(tensors.values(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    done = _restore(tensors, optimizer, options)
    warm_up = max(1, options.steps // 10)
    for step in range(done, options.steps):
        options.report("training", step, options.steps)
        rate = min((step + 1) / warm_up, (options.steps - step) / max(1, options.steps - warm_up))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        loss = loss_of(step)
        if not torch.isfinite(loss):
            raise CalibrationError(f"training has failed: the loss of step {step} is {float(loss)}.")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_value_(tensors.values(), 0.5)
        optimizer.step()
        if options.checkpoint is not None and (step + 1) % SAVE_EVERY == 0 and step + 1 < options.steps:
            checkpoint.write(options.checkpoint, _state(tensors, optimizer), step + 1, options.identity)
    options.report("training", options.steps, options.steps)
    return {name: tensor.detach().half() for name, tensor in tensors.items()}


def _state(tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = {name: tensor.detach() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        state |= {f"{name}.{moment}": optimizer.state[tensor][moment] for moment in MOMENTS}
    return state


def _restore(tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, options: Options) -> int:
    """Steps that a checkpoint has done; tensors and optimizer are as it left them."""
    done, state = checkpoint.read(options, options.steps)
    if not done:
        return 0
    for name, tensor in tensors.items():
        moments = {moment: state.get(f"{name}.{moment}") for moment in MOMENTS}
        if any(x is None or x.shape != tensor.shape for x in (state.get(name), *moments.values())):
            raise CalibrationError(f"{options.checkpoint} does not fit this model; start without --resume.")
        with torch.no_grad():
            tensor.copy_(state[name])
        optimizer.state[tensor] = {
            "step": torch.tensor(float(done)),
            **{moment: x.to(tensor.device).clone() for moment, x in moments.items() if x is not None},
        }
    return done
